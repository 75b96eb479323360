"""`nearfold.recipes.ocr`: what needs no wheel is tested everywhere, the recogniser where its wheel is installed."""

import doctest
import functools
import importlib
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nearfold.recipes import ocr, ocr_lines, ocr_network, ocr_report, ocr_tune, onnx_part
from nearfold.recipes.onnx_part import Graph, Node, Part

ROOT = Path(__file__).parents[1]
WHEEL = all(importlib.util.find_spec(name) for name in ("rapidocr_onnxruntime", "onnx", "onnxruntime"))
needs_wheel = pytest.mark.skipif(not WHEEL, reason=f"the recogniser's weights are not here: {ocr_network.INSTALL}")


@pytest.mark.parametrize("module", ["ocr_lines", "ocr_network", "ocr_report", "ocr_tune"])
def test_examples(module):
    result = doctest.testmod(importlib.import_module(f"nearfold.recipes.{module}"))
    assert result.attempted and not result.failed


# Lines


def test_edits_against_the_definition():
    @functools.cache
    def slowly(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slowly(a[1:], b) + 1, slowly(a, b[1:]) + 1, slowly(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
        assert ocr_lines.edits(a, b) == slowly(a, b), (a, b)
    assert ocr_lines.edits("", "abc") == ocr_lines.edits("abc", "") == 3


def test_shares_and_their_intervals():
    read, truth = ["abcd", "ab d", "x", ""], ["abcd", "abcd", "y", "zz"]
    own = ocr_lines.marks(read, truth)
    assert own.wrong.tolist() == [0, 1, 1, 2] and own.length.tolist() == [4, 4, 1, 2]
    best = ocr_lines.marks(truth, truth)
    found = ocr_lines.share("characters", own)
    assert found.mean == pytest.approx(1 - 4 / 11) and found.low < found.mean < found.high
    apart = ocr_lines.share("characters", own, best)
    assert apart.mean == pytest.approx(-4 / 11) and apart.high <= 0
    whole = ocr_lines.share("characters", best)
    assert (whole.mean, whole.low, whole.high) == (1, 1, 1)
    assert ocr_lines.share("lines", own).mean == 0.25 and ocr_lines.share("lines", best).high == 1
    assert ocr_lines.share("lines", own, best).mean == -0.75 and ocr_lines.share("lines", best, own).mean == 0.75
    same = ocr_lines.share("lines", own, own)
    assert same.mean == same.low == same.high == 0
    both = ocr_lines.pooled([own, best])
    assert both.right.tolist() == [1, 0.5, 0.5, 0.5]
    assert ocr_lines.share("characters", both).mean == pytest.approx(1 - 2 / 11)


def test_the_bootstrap_agrees_with_its_own_spread():
    """Of many alike lines the interval is that of a mean: 1.96 standard errors."""
    rng = np.random.default_rng(1)
    wrong = rng.binomial(10, 0.2, 400)
    found = ocr_lines.share("characters", ocr_lines.Marks(wrong, np.full(400, 10), wrong == 0))
    error = wrong.std(ddof=1) / 10 / 400**0.5
    assert found.half == pytest.approx(1.96 * error, rel=0.1)


@pytest.mark.parametrize("size", [(1, 1), (1, 99), (500, 3), (640, 48), (641, 48), (7, 48)])
def test_pictures_of_any_size(size):
    made = ocr_lines.prepared(Image.new("L", size, 255), 640)
    own = min(640, max(1, round(size[0] * 48 / size[1])))
    assert made.shape == (3, 48, 640) and made.dtype == torch.float32
    assert (made[:, :, :own] == 1).all() and not made[:, :, own:].any()


@pytest.mark.parametrize("kind", ocr_lines.WIDTHS)
def test_lines_are_the_same_again_and_in_one_part_only(kind):
    made = ocr_lines.lines(kind, "test", 5)
    assert made.images.shape == (5, 3, 48, ocr_lines.WIDTHS[kind]) and len(made.texts) == 5
    assert made.images.min() >= -1 and made.images.max() <= 1 and made.images.std() > 0.1
    again = ocr_lines.lines(kind, "test", 5)
    assert torch.equal(made.images, again.images) and made.texts == again.texts
    assert torch.equal(ocr_lines.lines(kind, "test", 2).images, made.images[:2])
    assert not torch.equal(ocr_lines.lines(kind, "test", 5, seed=1).images, made.images)
    for bad in ({"kind": "print"}, {"part": "tests"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be one of"):
            ocr_lines.lines(**{"kind": kind, "part": "test", "count": 1} | bad)


def test_the_parts_share_nothing():
    names, fonts, digits = zip(*ocr_lines.PARTS.values(), strict=True)
    for of in (names, fonts, digits):
        assert len({thing for part in of for thing in part}) == sum(map(len, of))
    texts = [set(ocr_lines.passages(part)) for part in ocr_lines.PARTS]
    assert all(texts) and not texts[2] & (texts[0] | texts[1])
    train, validation, test = digits
    assert test[0] - max(train[-1], validation[-1]) > 138 and test[-1] == 1796


def test_all_digits_of_a_part_are_used_once():
    from sklearn.datasets import load_digits

    made = ocr_lines.lines("digits", "test")
    numbers = ocr_lines.PARTS["test"][2]
    assert len(made.texts) == len(numbers) // 6
    assert sorted("".join(made.texts)) == sorted(str(t) for t in load_digits().target[numbers.start : numbers.stop])
    assert len(ocr_lines.lines("digits", "validation", 40).texts) == 40  # more than there are: drawn again


# The ONNX file


def small_graph() -> Graph:
    """relu(bn(conv(x))) * sigmoid(mean) + a constant, clipped, pooled; beside it an operation nobody knows."""
    g = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(4, 1, 3, 3, generator=g), "b": torch.randn(4, generator=g), "extra": torch.randn(1)}
    weights |= {name: torch.rand(4, generator=g) + 0.5 for name in ("scale", "shift", "mean", "var")}
    constants = {"half": torch.tensor(0.5), "low": torch.tensor(0.625), "high": torch.tensor(0.75)}
    nodes = (
        Node("Conv", ("x", "w", "b"), "c", {"group": 2, "pads": [1, 0, 1, 0], "strides": [2, 1], "dilations": [1, 1]}),
        Node("BatchNormalization", ("c", "scale", "shift", "mean", "var"), "n", {"epsilon": 1e-3}),
        Node("Relu", ("n",), "r", {}),
        Node("GlobalAveragePool", ("r",), "g", {}),
        Node("Sigmoid", ("g",), "s", {}),
        Node("Mul", ("r", "s"), "m", {}),
        Node("Add", ("m", "half"), "a", {}),
        Node("Clip", ("a", "low", "high"), "k", {}),
        Node("AveragePool", ("k",), "y", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Node("Mystery", ("y",), "z", {}),
        Node("HardSigmoid", ("z",), "after", {"alpha": 0.2, "beta": 0.5}),
        Node("Concat", ("r", "m"), "both", {"axis": 1}),
        Node("ReduceMean", ("both",), "t", {"axes": [2, 3], "keepdims": 0}),
        Node("Div", ("t", "extra"), "u", {}),
    )
    return Graph(nodes, weights, constants, {})


def by_hand(w: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = F.conv2d(x, w["w"], w["b"], (2, 1), (1, 0), 1, 2)
    r = F.relu(F.batch_norm(x, w["mean"], w["var"], w["scale"], w["shift"], eps=1e-3))
    m = r * r.mean((2, 3), keepdim=True).sigmoid()
    return F.avg_pool2d((m + 0.5).clamp(0.625, 0.75), 2), torch.cat([r, m], 1).mean((2, 3)) / w["extra"]


@pytest.mark.parametrize("size", [(3, 5), (9, 4), (8, 8)])
@pytest.mark.parametrize("batch", [0, 3])
def test_a_part_of_a_graph(size, batch):
    graph = small_graph()
    x = torch.randn(batch, 2, *size, dtype=torch.float64, requires_grad=True)
    for start, end, at in (("x", "y", 0), ("x", "u", 1)):
        part = Part(graph, start, end).double().eval()
        found, truth = part(x), by_hand({k: v.double() for k, v in graph.weights.items()}, x)[at]
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
        (a,), (b,) = (torch.autograd.grad(y.square().sum(), x, retain_graph=True) for y in (found, truth))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    names = [name for name, _ in Part(graph, "x", "u").named_parameters()]
    assert sorted(names) == ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight", "tensor0"]
    torch.testing.assert_close(Part(graph, "z", "after")(x.float()), (x.float() * 0.2 + 0.5).clamp(0, 1))


def test_what_a_part_cannot_be():
    graph = small_graph()
    with pytest.raises(ValueError, match=r"Mystery \('z'\) is none of the operations"):
        Part(graph, "x", "after")
    with pytest.raises(ValueError, match="'y' needs 'x', which is neither"):
        Part(graph, "elsewhere", "y")
    with pytest.raises(ValueError, match="no weight and no constant called 'v'"):
        graph.tensor("v")
    odd = Node("Conv", ("x", "w", "b"), "c", {"group": 2, "pads": [1, 0, 0, 0]})
    with pytest.raises(ValueError, match=r"Conv 'c': its padding .* is none that is read"):
        Part(Graph((odd,), graph.weights, {}, {}), "x", "c")
    with pytest.raises(ValueError, match=r"weight of Linear is \(3, 2\); got \(2, 3\)"):
        onnx_part.filled(torch.nn.Linear(2, 3), weight=torch.zeros(2, 3))


def test_a_file_is_read(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, tensor = onnx.helper, onnx.numpy_helper.from_array
    number = helper.make_node("Constant", [], ["two"], value=tensor(np.array(2.0, np.float32)))
    nodes = [number, helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Mul", ["c", "two"], ["y"])]
    w = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    kind = onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, [1, c, None, None]) for name, c in (("x", 1), ("y", 2))]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], [tensor(w, "w")])
    model = helper.make_model(graph)
    helper.set_model_props(model, {"character": "a\nb"})
    onnx.save(model, tmp_path / "small.onnx")
    found = onnx_part.read(tmp_path / "small.onnx")
    assert found.notes == {"character": "a\nb"} and found.constants["two"] == 2
    x = torch.randn(1, 1, 4, 5)
    torch.testing.assert_close(Part(found, "x", "y")(x), 2 * F.conv2d(x, torch.from_numpy(w)))


# Reading and training


def test_decoding():
    names = ("", "a", "b", " ")
    scores = torch.eye(4)[torch.tensor([[0, 1, 1, 0, 1, 3, 2, 2], [0] * 8])]
    assert ocr_network.decoded(scores, names) == ["aa b", ""]
    assert ocr_network.decoded(scores[:0], names) == []


def test_the_loss_against_all_paths():
    """The probability of a text is the sum over all rows of characters that are read as it."""
    names, texts = ("", "a", "b"), ("ab", "a", "bb")
    scores = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    paths = torch.cartesian_prod(*[torch.arange(3)] * 4)
    read = ocr_network.decoded(F.one_hot(paths, 3), names)
    wanted = 0.0
    for own, text in zip(scores.log_softmax(-1), texts, strict=True):
        of = torch.stack([own.gather(1, p[:, None]).sum() for p, r in zip(paths, read, strict=True) if r == text])
        wanted -= of.logsumexp(0) / len(text) / 3
    torch.testing.assert_close(ocr_tune.ctc(scores, texts, names), wanted)
    with pytest.raises(ValueError, match="does not know: 'c', 'd'"):
        ocr_tune.ctc(scores, ("ab", "dc", "a"), names)


def example() -> dict:
    """What a run finds, in small."""
    share = {what: [0.9, 0.875, 0.925] for what in ocr_report.WHATS}
    apart = {what: [-0.01, -0.02, 0.005] for what in ocr_report.WHATS}
    first = {"network": "as it was"} | {kind: {"read": share} for kind in ocr_lines.WIDTHS}
    second = {"network": "8 best keys"} | {kind: {"read": share, "ahead": apart} for kind in ocr_lines.WIDTHS}
    said = {
        "operation": "a | b",
        "grade": "approximate",
        "difference": 0.25,
        "macs": 1e6,
        "layers": 2,
    }
    tuned = {"seconds": 7.0, "gained": {kind: apart for kind in ocr_lines.WIDTHS}}
    return {
        "date": "2026-01-01",
        "environment": {"processor": "any"},
        "onnxruntime": {"320": 3e-6},
        "lines": {kind: {"test": 5, "characters": 30} for kind in ocr_lines.WIDTHS},
        "train": {"lines": 4, "seeds": 1, "steps": 2, "batch": 2, "lr": 1e-4},
        "untrained": [first, second | said],
        "trained": [first | tuned, second | tuned],
        "times": [{"network": "as it was", "tokens": t, "milliseconds": 2.5, "ratio": 1.0} for t in (None, 80)],
    }


def test_the_tables():
    text = ocr_report.markdown(example())
    assert "| 8 best keys | 90.0 [87.5, 92.5] |" in text and "| 8 best keys | -1.0 [-2.0, +0.5] |" in text
    assert "| 8 best keys | `a \\| b` | approximate | 2.5e-01 | 1.00 |" in text
    assert "| one attention layer, 80 tokens | as it was | 2.50 | 1.00 |" in text
    alone = {k: v for k, v in example().items() if k not in ("untrained", "trained")}
    assert "training" not in ocr_report.markdown(alone)


def test_the_page_says_what_was_measured():
    numbers = re.compile(r"[+-]?\d+\.\d \[[+-]?\d+\.\d, [+-]?\d+\.\d\]")
    found = json.loads((ROOT / "benchmarks/results/ocr.json").read_text())
    tables = (ROOT / "benchmarks/results/ocr.md").read_text()
    assert tables == ocr_report.markdown(found)
    said = set(numbers.findall((ROOT / "docs/ocr.md").read_text()))
    assert said and said <= set(numbers.findall(tables))


# The command


def test_without_the_wheel_one_error_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        ocr.main(["--quick", "--out", str(tmp_path)])
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.endswith(f"which is not installed: {ocr_network.INSTALL}\n")


def test_steps_are_counted(capsys):
    with pytest.raises(SystemExit):
        ocr.main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def net():
    return ocr_network.load()


@needs_wheel
def test_the_network_is_the_one_that_was_published(net):
    assert sum(p.numel() for p in net.parameters()) == 2_688_397 and len(net.characters) == 6625
    assert ocr_network.difference(net, 96) < 1e-5
    with torch.no_grad():  # the check sees a change
        net.blocks[1].fc2.bias[3] += 0.1
        assert ocr_network.difference(net, 96) > 1e-5
        net.blocks[1].fc2.bias[3] -= 0.1


@needs_wheel
def test_a_network_that_is_another_is_not_reported_on(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ocr, "difference", lambda *_: float("nan"))
    with pytest.raises(SystemExit):
        ocr.main(["--quick", "--out", str(tmp_path)])
    assert "differs from onnxruntime by nan" in capsys.readouterr().err and not list(tmp_path.iterdir())


@needs_wheel
def test_all_keys_are_exact_and_few_are_not(net, monkeypatch):
    monkeypatch.setitem(ocr.WIDTHS, "printed", 96)
    same, report = ocr.converted(net, ocr.NEAREST.format(k=12))
    assert report.exact and len(report.replaced) == 2 and report.difference_seen < 1e-5
    other, report = ocr.converted(net, ocr.NEAREST.format(k=2))
    assert not report.exact and ocr.said(report)["grade"] == "approximate"
    features = torch.randn(2, 480, 1, 12, generator=torch.Generator().manual_seed(0))
    was = net.read_features(features)
    torch.testing.assert_close(same.read_features(features), was, rtol=1e-4, atol=1e-4)
    assert (other.read_features(features) - was).abs().max() > 1e-3


@needs_wheel
def test_training_changes_what_follows_the_backbone_alone(net):
    made, _ = ocr.converted(net, None)
    data = [ocr_tune.Seen(torch.randn(3, 480, 1, 12), ("12", "3", "45"))]
    losses = [ocr_tune.ctc(made.read_features(data[0].features), data[0].texts, made.characters).item()]
    ocr_tune.tune(made, data, ocr_tune.Tuning(steps=8, batch=3, lr=1e-3))
    losses.append(ocr_tune.ctc(made.read_features(data[0].features), data[0].texts, made.characters).item())
    assert losses[1] < losses[0]
    was = net.state_dict()
    changed = {name.split(".")[0] for name, now in made.state_dict().items() if not torch.equal(now, was[name])}
    assert changed == {"squeeze", "blocks", "norm", "expand", "last", "head"}


@needs_wheel
@pytest.mark.slow
def test_the_rehearsal(monkeypatch, tmp_path, capsys):
    ocr.main(["--quick", "--runs", str(tmp_path / "w"), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "benchmarks/results/ocr.json").read_text())
    assert [row["network"] for row in found["untrained"]] == [*ocr.NETWORKS]
    was, same, *_ = found["untrained"]
    assert was["printed"]["read"] == same["printed"]["read"] and same["grade"] == "exact"
    assert [row["network"] for row in found["trained"]] == [*ocr.TUNED]
    assert (tmp_path / "docs/pictures/ocr.png").stat().st_size < 300_000
    assert "## Times" in capsys.readouterr().out
    monkeypatch.setattr(onnx_part.Part, "forward", None)
    again = ocr_tune.seen(ocr_network.load(), "digits", "test", 3, 0, tmp_path / "w")
    assert len(again.texts) == 3  # read, not made
