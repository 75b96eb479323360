"""The explorer: graphs that say what the library says, a page that asks for the runtime alone, a server for us."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import zipfile

import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from nearfold.cli import main
from nearfold.explorer import layers_to_onnx
from nearfold.explorer.command import server
from nearfold.explorer.graphs import SIDE, STORE, kept
from nearfold.explorer.operators import GRID, LAMBDA, OPERATORS, START
from nearfold.explorer.page import BESIDE, CDN, RUNTIME, page, write
from nearfold.grammar import parse
from nearfold.look import mixing_matrix
from nearfold.look.layers import FEATURES, features, plain_layer
from nearfold.look.picture import load_image
from nearfold.models import create
from nearfold.models.look import readings
from nearfold.models.pretrained import pretrained

TOLERANCE = 1e-4
SETTINGS = [(name, chosen) for name, operator in OPERATORS.items() for chosen in operator.variants()]
START_OR_SLOW = [
    pytest.param(
        name, chosen, id=OPERATORS[name].key(**chosen),
        marks=() if all(START[slider] == value for slider, value in chosen.items()) else pytest.mark.slow,
    )
    for name, chosen in SETTINGS
]  # fmt: skip


@pytest.fixture(scope="module")
def pixels():
    photograph = load_image("sample:china.jpg")[None, :, :, 100:527]
    return F.interpolate(photograph, (SIDE, SIDE), mode="bilinear", antialias=True)[0]


def ran(graph, *inputs):
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named)], [y.name for y in session.get_outputs()]


def matrix_of(notation, x):
    op = parse(notation)
    layer = plain_layer(op, 1 if op.for_sequences else 2, len(FEATURES))
    return mixing_matrix(layer, x.flatten(2) if op.for_sequences else x)[0].mean(0)


def assert_same(found, wanted):
    """Row by row; a few rows may have another one of two neighbours that are equally near but for roundoff."""
    assert found.isfinite().all()
    apart = (found - wanted).abs().amax(1) > TOLERANCE
    assert apart.sum() <= 4
    torch.testing.assert_close(found.sort(1).values, wanted.sort(1).values, rtol=0, atol=TOLERANCE)


def test_the_store_has_the_graphs_of_the_page_and_no_others():
    with zipfile.ZipFile(STORE) as store:
        names = {name.removesuffix(".onnx") for name in store.namelist()}
    assert names == {"features", *pretrained(), *(OPERATORS[name].key(**chosen) for name, chosen in SETTINGS)}
    assert len(OPERATORS) == 12


def test_patches_are_described_as_the_library_does(pixels):
    (found,), _ = ran(kept("features"), pixels)
    torch.testing.assert_close(found, features(pixels, (GRID, GRID)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "chosen"), START_OR_SLOW)
def test_a_graph_reads_what_the_library_reads(name, chosen, pixels):
    operator, x = OPERATORS[name], features(pixels, (GRID, GRID))
    lam = [torch.tensor([LAMBDA])] if operator.blends else []
    (found,), _ = ran(kept(operator.key(**chosen)), x, *lam)
    assert found.shape == (GRID,) * 4
    assert_same(found.flatten(2).flatten(0, 1), matrix_of(operator.written(**chosen), x))


@pytest.mark.parametrize("lam", [0.0, 0.2, 1.0])
def test_lambda_is_the_word_of_the_notation(lam, pixels):
    operator, x = OPERATORS["blend"], features(pixels, (GRID, GRID))
    (found,), _ = ran(kept("blend-k9"), x, torch.tensor([lam]))
    notation = operator.written(lam, k=9).replace(", learned", "")
    assert f"blend({lam:g})" in notation
    assert_same(found.flatten(2).flatten(0, 1), matrix_of(notation, x))


def test_heads_share_the_features(pixels):
    x = features(pixels, (GRID, GRID))
    one, eight = (matrix_of(f"all | row | softmax(heads={heads})", x) for heads in (1, 8))
    assert (one - eight).abs().max() > 1e-3, "else the slider would do nothing"


@pytest.mark.parametrize("name", list(pretrained()))
def test_layers_of_networks_are_those_of_look(name, pixels):
    small = F.adaptive_avg_pool2d(pixels, (32, 32))
    found, labels = ran(kept(name), small)
    wanted = readings(create(name, pretrained=True), small, (0.4, 0.7))
    assert labels == [f"{reading.title}: {reading.notation}" for reading in wanted]
    for weights, reading in zip(found, wanted, strict=True):
        row = weights[int(0.4 * weights.shape[0]), int(0.7 * weights.shape[1])]
        torch.testing.assert_close(row, reading.row, rtol=0, atol=TOLERANCE * float(reading.row.max()))


def test_what_cannot_be_shown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Sequential has no Mixer layer on maps"):
        layers_to_onnx(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), tmp_path / "x.onnx", size=(8, 8))
    with pytest.raises(ValueError, match=r"size=\(32, 32\)"):
        layers_to_onnx(torch.nn.Sequential(), tmp_path / "x.onnx")
    network = create("resnet8s_conv", layer="window(3) | box | experts(4)", widths=(8, 8, 8))
    with pytest.raises(ValueError, match="its kernel depends on the input"):
        layers_to_onnx(network, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_network_of_ones_own(tmp_path, pixels):
    torch.manual_seed(0)
    network = create("resnet8s_hybrid", widths=(8, 8, 8))
    network.eval()
    layers_to_onnx(network, tmp_path / "own.onnx", size=(24, 40))
    small = F.adaptive_avg_pool2d(pixels, (24, 40))
    found, _ = ran((tmp_path / "own.onnx").read_bytes(), small)
    assert [tuple(w.shape) for w in found] == [(12, 20, 12, 20), (6, 10, 6, 10), (3, 5, 3, 5)]
    for weights, reading in zip(found, readings(network, small, (0.4, 0.7)), strict=True):
        row = weights[int(0.4 * weights.shape[0]), int(0.7 * weights.shape[1])]
        torch.testing.assert_close(row, reading.row, rtol=0, atol=TOLERANCE)


def test_the_page_asks_for_the_runtime_alone():
    text = page({"<b>&": b"graph"})
    outside = set(re.findall(r"""(?:https?:)?//[^\s"'<>`]+""", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)))
    links = set(re.findall(r'<a href="([^"]+)"', text))
    assert {url for url in outside - links if "." in url.partition("//")[2].partition("/")[0]} == {CDN}
    assert "<b>&" not in text and 'value="&lt;b&gt;&amp;"' in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert data["networks"] == ["<b>&"] and data["runtime"]["files"] == RUNTIME
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and set(re.findall(r"byId\('([\w-]+)'\)", text)) <= set(ids)


def test_another_runtime_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no ort\.wasm\.bundle\.min\.mjs: onnxruntime-web"):
        write(tmp_path / "page", {}, tmp_path)
    (tmp_path / "dist").mkdir()
    for name in RUNTIME:
        (tmp_path / "dist" / name).write_text("another")
    with pytest.raises(ValueError, match="is another version: onnxruntime-web"):
        write(tmp_path / "page", {}, tmp_path)
    assert not (tmp_path / "page").exists()


@pytest.fixture
def served(tmp_path):
    (tmp_path / BESIDE).mkdir()
    for name in ("index.html", *(BESIDE + name for name in RUNTIME)):
        (tmp_path / name).write_text("here")
    with server(tmp_path, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def asked(serving, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers["Content-Type"], answer.read()


def test_the_server_says_what_files_are(served):
    assert asked(served, "/") == (200, "text/html; charset=utf-8", b"here")
    kinds = {asked(served, f"/{BESIDE}{name}")[1] for name in RUNTIME}
    assert kinds == {"text/javascript", "application/wasm"}


def test_the_server_is_for_this_machine(served, tmp_path):
    assert served.server_address[0] == "127.0.0.1"
    assert asked(served, "/", Host="elsewhere.example:80")[0] == 403
    assert asked(served, "/", Host=f"localhost:{served.server_port}")[0] == 200
    with pytest.raises(ValueError, match="name another one, or none"):
        server(tmp_path, served.server_port)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "nonsense"], "MODEL must be a network that `nearfold models` lists"),
        (["--model", "nonsense.onnx"], "no such file"),
        (["--runtime", "nowhere"], "has no ort.wasm.bundle.min.mjs"),
        (["--port", "99999"], "wanted a whole number from 0 to 65,535"),
    ],
)
def test_the_command_says_what_is_wrong(args, said, tmp_path, capsys):
    assert main(["explore", "--no-browser", "--out", str(tmp_path / "page"), *args]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_the_command_writes_the_page(tmp_path, capsys):
    file = tmp_path / "mine.onnx"
    file.write_bytes(kept("resnet8s_conv"))
    assert main(["explore", "--out", str(tmp_path / "page"), "--model", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert all(f'<option value="{name}">' in text for name in (*pretrained(), "mine"))


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)

    def interrupted(self):
        with socket.create_connection(self.server_address, timeout=5):
            raise KeyboardInterrupt

    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", interrupted)
    assert main(["explore"]) == 0
    assert opened == [capsys.readouterr().out.split()[0]] and opened[0].startswith("http://127.0.0.1:")
