"""What is written is read again where it is meant to run, compared, and put in its place only then."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cells import slow_but
from torch import nn

from nearfold.cli import main
from nearfold.export import decompositions, to_aoti, to_onnx, to_pt2
from nearfold.export.program import shorten
from nearfold.export.table import slots
from nearfold.grammar import CATALOGUE
from nearfold.models import create
from nearfold.nn import ConvNN2d, KVTAttention, Mixer, SelectiveScan2d
from nearfold.testing import context_for, make

ROOT = Path(__file__).parents[1]
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

NEEDED = (
    *("conv_strided", "convnn", "deformable_v2", "mamba", "gla", "mlstm", "nsa", "fno", "s4d", "performer", "swin"),
    *("bigbird", "dynamic_conv", "pvt_linear"),
)
"""Rows that together need every form of torch's own operators that is made for ONNX."""


def example(name):
    layer, x = make(CATALOGUE[name].operation, (28, 26), torch.float32)
    context = context_for(layer.eval(), x)
    return layer, (x,) if context is None else (x, context.detach())


@pytest.mark.parametrize("name", slow_but(("convnn",), NEEDED))
def test_onnx_with_open_sizes(name, tmp_path):
    made = to_onnx(*example(name), tmp_path / "row.onnx", dynamic="sizes")
    assert made.difference < 1e-5 and len(made.sizes) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["row.onnx"]
    graph = onnx.load(made.path)
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    names = [dim.dim_param for dim in graph.graph.input[0].type.tensor_type.shape.dim]
    assert names[0] == "batch" and names[1] == "" and set(names[2:]) <= {"height", "width", "length"}


@pytest.mark.slow
def test_a_window_is_no_node_for_every_slot(tmp_path):
    few, many = (
        to_onnx(Mixer(f"window({k}) | box | softmax(heads=2)", 8).eval(), torch.randn(1, 8, 9, 9), tmp_path / "w.onnx")
        for k in (3, 7)
    )
    assert few.nodes == many.nodes < 60


@pytest.mark.slow
def test_a_scan_is_one_node_however_long(tmp_path):
    made = to_onnx(SelectiveScan2d(8, 4).eval(), torch.randn(1, 8, 8, 9), tmp_path / "s.onnx", dynamic="sizes")
    assert made.operators["Scan"] == 4


@pytest.mark.slow
def test_tokens_have_a_length(tmp_path):
    made = to_onnx(KVTAttention(8, 2, k=3).eval(), torch.randn(2, 12, 8), tmp_path / "t.onnx", dynamic="sizes")
    assert made.open == ((0, 1),)
    shape = onnx.load(made.path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["batch", "length", 8]


@pytest.mark.slow
def test_more_neighbours_than_positions(tmp_path):
    layer = ConvNN2d(4, 4, k=60).eval()
    made = to_onnx(layer, torch.randn(1, 4, 9, 9), tmp_path / "k.onnx", dynamic="sizes")
    session = onnxruntime.InferenceSession(made.path)
    few = torch.randn(1, 4, 5, 6)
    found = session.run(None, {session.get_inputs()[0].name: few.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), layer(few), rtol=1e-4, atol=1e-5)


def test_equal_neighbours_and_nan_in_onnx(tmp_path):
    layer = ConvNN2d(4, 4, k=5).eval()
    x = torch.randn(1, 4, 3).repeat_interleave(12, 2).view(1, 4, 6, 6)
    made = to_onnx(layer, torch.randn(1, 4, 6, 6), tmp_path / "ties.onnx")
    session = onnxruntime.InferenceSession(made.path)
    lost = x.clone()
    lost[0, :, 2, 2] = float("nan")
    for given in (x, lost):
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, layer(given), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("write", [to_pt2, pytest.param(to_aoti, marks=pytest.mark.inductor)])
def test_it_runs_where_nearfold_is_not(write, tmp_path):
    layer, x = ConvNN2d(4, 4, k=3).eval(), torch.randn(2, 4, 6, 5)
    made = write(layer, x, tmp_path / "layer.pt2", dynamic="batch")
    assert made.difference < 1e-5 and made.open == ((0,),)
    with torch.no_grad():
        torch.save((x, layer(x)), tmp_path / "pair.pt")
    load = {
        to_pt2: "torch.export.load('layer.pt2').module()",
        to_aoti: "__import__('torch._inductor')._inductor.aoti_load_package('layer.pt2')",
    }[write]
    script = f"""
import sys; sys.modules['nearfold'] = None
import torch
x, y = torch.load('pair.pt')
with torch.no_grad(): torch.testing.assert_close({load}(x), y, rtol=1e-4, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_our_operators_can_stay(tmp_path):
    made = to_pt2(ConvNN2d(4, 4, k=3).eval(), torch.randn(2, 4, 6, 5), tmp_path / "own.pt2", own_operators=True)
    assert made.operators["nearfold.select.default"] == 1


@pytest.mark.slow
def test_a_batch_of_one_can_be_left_open(tmp_path):
    net = create("resnet8s_hybrid", pretrained=True).eval()
    made = to_onnx(net, torch.randn(1, 3, 32, 32), tmp_path / "net.onnx", dynamic="batch")
    assert made.open == ((0,),) and made.sizes[1][0][0] == 2


class Four(nn.Module):
    """Takes four samples."""

    def forward(self, x):
        return x.expand(len(x), -1)


class Few(nn.Module):
    """Answers otherwise for many samples."""

    def forward(self, x):
        return x[:, :2] if x.shape[0] < 5 else x


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"args": [1, 2]}, "args must be a tensor or a tuple of tensors.*got list"),
        ({"path": "layer.pt"}, "path must end in .onnx, got"),
        ({"path": "not/there.onnx"}, "the folder .*not is not there"),
        ({"dynamic": "all"}, "dynamic must be None, 'batch', 'sizes' or what torch.export.export takes.*got 'all'"),
        ({"opset": 17}, "opset must be from 20 to .*, got 17"),
        ({"model": ConvNN2d(4, 4, k=3)}, r"training mode.*call model.eval\(\) first"),
        (
            {"model": Four().eval(), "args": torch.randn(4, 4), "dynamic": "batch"},
            "the number 4 of samples as such",
        ),
        (
            {"model": Few().eval(), "args": torch.randn(4, 4), "dynamic": "batch"},
            "sizes cannot be left open: of 1",
        ),
    ],
)
def test_what_cannot_be_exported_is_said(change, said, tmp_path):
    given = {"model": ConvNN2d(4, 4, k=3).eval(), "args": torch.randn(1, 4, 6, 6), "path": "layer.onnx"} | change
    given["path"] = tmp_path / given["path"]
    with pytest.raises(ValueError, match=said):
        to_onnx(given.pop("model"), given.pop("args"), given.pop("path"), **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [to_onnx, to_pt2])
def test_a_wrong_export_is_not_left_behind(write, tmp_path, monkeypatch):
    right = slots.gathered
    monkeypatch.setattr(slots, "gathered", lambda value, index: right(value, index) * 1.01)
    path = tmp_path / ("layer.onnx" if write is to_onnx else "layer.pt2")
    with pytest.raises(ValueError, match=r"differs from the model by .*e-0\d of the largest output.*3 draws of inputs"):
        write(ConvNN2d(4, 4, k=3).eval(), torch.randn(1, 4, 6, 6), path)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, capsys):
    out = tmp_path / "net.onnx"
    assert main(["export", "resnet8s_conv", "--pretrained", "--to", "onnx", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 1.9 MiB" in said and "compared with the model at 1, 3, 32, 32: differs by" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["resnet8s_con"], "MODEL must be a network.*did you mean resnet8s_conv"),
        (["torchvision:resnet18"], "--input must say the size of an input of torchvision:resnet18"),
        (["torchvision:resnet18", "--pretrained"], "--pretrained is for the networks"),
        (["resnet8s_conv", "--input", "3"], "wanted batch, channels and grid"),
    ],
)
def test_the_command_says_what_it_wants(args, said, capsys):
    try:
        code = main(["export", *args, "--to", "onnx"])
    except SystemExit as end:
        code = end.code
    assert code == 2 and re.search(said, capsys.readouterr().err)


@pytest.fixture(scope="module")
def export_matrix():
    """recipes/export_matrix.py, where there is a tree around the package."""
    place = importlib.util.spec_from_file_location("export_matrix", ROOT / "recipes" / "export_matrix.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("way", ["openvino", "executorch"])
@pytest.mark.parametrize("name", ["conv", "convnn", "swin", "deformable_v2", "nsa", "mamba"])
def test_other_runtimes(name, way, export_matrix):
    pytest.importorskip(way)
    found = export_matrix.tried(export_matrix.row(name), way)
    assert found["open"] == ("batch and sizes" if way == "openvino" else "nothing"), found["why"]
    assert found["difference"] <= export_matrix.NEAR


def test_the_page_has_every_row(export_matrix):
    """docs/export.md is what recipes/export_matrix.py makes of its results; at least 95 % leave with open sizes."""
    kept = json.loads(export_matrix.KEPT.read_text())
    assert export_matrix.page(kept) in export_matrix.PAGE.read_text()
    found = [kept[name]["onnx"] for name in CATALOGUE]
    assert all(result["difference"] <= export_matrix.NEAR for result in found if result["open"])
    assert sum(result["open"] == "batch and sizes" for result in found) >= 0.95 * len(CATALOGUE)
    assert all(kept[name]["onnx"] for name in export_matrix.kinds())


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        (lambda x: x.topk(12).indices[..., :3], 3),
        (lambda x: x.topk(12, 1).values[:, :4], 4),
        (lambda x: x.topk(12, largest=False).values[..., :2], 2),
        (lambda x: [part[..., : 3 + i] for i, part in enumerate(x.topk(12))], 4),
        (lambda x: x.sort(stable=True, descending=True).indices[..., :5], 5),
        (lambda x: [x.topk(12).values, x.topk(12).values[..., :2]], 12),
        (lambda x: x.topk(12).values[..., 1:3], 12),
        (lambda x: x.topk(12).values[..., :6:2], 12),
        (lambda x: x.topk(12).values[..., :-2], 12),
        (lambda x: x.topk(12).values[:1], 12),
        (lambda x: x.topk(12).values.sum(-1), 12),
        (lambda x: x.topk(12, sorted=False).values[..., :2].sum(-1), 12),
    ],
)
def test_a_topk_is_asked_for_no_more_than_is_read(read, wanted):
    class Model(nn.Module):
        def forward(self, x):
            return read(x)

    x = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Model(), (x,)).run_decompositions(decompositions(stable_topk=True))
    shorten(program)
    found = [node.args[1] for node in program.graph.nodes if node.target is torch.ops.aten.topk.default]
    assert max(found) == wanted
    torch.testing.assert_close(program.module()(x), Model()(x), rtol=0, atol=0)


@pytest.mark.parametrize("way", [to_onnx, to_pt2])
def test_a_model_that_cannot_run_or_is_half_in_training_is_told(way, tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 6, 6)
    path = tmp_path / ("a.onnx" if way is to_onnx else "a.pt2")
    with pytest.raises(ValueError, match=r"args: the model does not run on \(2, 1, 6, 6\) torch.float32"):
        way(net, x[:, :1], path)
    net[1].train()
    with pytest.raises(ValueError, match=r"its part '1' is in training mode"):
        way(net, x, path)
    with pytest.raises(ValueError, match=r"model must be an nn\.Module, got function"):
        way(lambda x: x, x, path)
    assert not net[1].num_batches_tracked and not list(tmp_path.iterdir())


def test_what_onnx_cannot_say_is_told_in_a_line(tmp_path):
    class Third(nn.Module):
        def forward(self, x):
            return x.kthvalue(3, -1).values

    conv, x, path = nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 6, 6), tmp_path / "a.onnx"
    cases = {
        "no ONNX for the model: .*kthvalue": (Third().eval(), x, {}),
        r"onnxruntime does not take the file \(torch.float64\)": (conv.double(), x.double(), {}),
        "opset must be from 20 to": (conv, x, {"opset": 99}),
    }
    for said, (model, given, options) in cases.items():
        with pytest.raises(ValueError, match=said) as told:
            to_onnx(model, given, path, **options)
        assert "\n" not in str(told.value) and "\x1b" not in str(told.value)
    assert not list(tmp_path.iterdir())
