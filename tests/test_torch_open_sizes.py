"""Layers between other layers, whose sizes a compiler leaves open: compiled training, export, torch.fx, TorchScript."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from nearfold._torchvision import load
from nearfold.look import mixing_matrix
from nearfold.lower import inductor
from nearfold.nn import (
    ACmix2d,
    BlockAttention2d,
    BranchingConv2d,
    ConvNN2d,
    DeformConv2d,
    Involution2d,
    KVTAttention,
    Mixer,
    NeighborhoodAttention2d,
    SelectiveScan2d,
    SelfAttention,
    knn_attention,
)

C = 8
LAYERS = {
    "conv": lambda: Mixer("window(3) | box | kernel", C),
    "ConvNN2d": lambda: ConvNN2d(C, C, k=5),
    "scored neighbours": lambda: Mixer("nearest(5, cosine) | box | softmax*depthwise", C),
    "strided neighbours": lambda: Mixer("nearest(5, blend(0.35), stride=2, padding=1) | ranked | kernel", C),
    "ACmix2d": lambda: ACmix2d(C, C),
    "Involution2d": lambda: Involution2d(C, 3),
    "NeighborhoodAttention2d": lambda: NeighborhoodAttention2d(C, 2, 3),
    "BlockAttention2d": lambda: BlockAttention2d(C, 2, 3),
    "DeformConv2d": lambda: DeformConv2d(C, C, 3),
    "SelectiveScan2d": lambda: SelectiveScan2d(C, 4),
    "gated delta rule": lambda: Mixer("scan(state=4, order=columns) | causal | delta(heads=2, decay=head)", C),
    "matrix memory": lambda: Mixer("scan(state=4, reverse) | causal | mlstm(heads=2)", C),
    "retention": lambda: Mixer("scan(state=4) | causal | additive(heads=2)", C),
    "BranchingConv2d": lambda: BranchingConv2d(C, C),
    "window scores and a kernel": lambda: Mixer("window(3) | box | softmax(heads=2)*depthwise", C),
    "every third": lambda: Mixer("all | strided(3) | softmax(heads=2)", C),
    "attention": lambda: Mixer("all | row | softmax(heads=2)", C),
    "KVTAttention": lambda: KVTAttention(C, 2, k=3),
    "SelfAttention": lambda: SelfAttention(C, 2),
    "continuous kernel": lambda: Mixer("all | row | continuous_depthwise(8, length=9)", C),
    "state space": lambda: Mixer("all | causal | s4d(8)", C),
    "lowest frequencies": lambda: Mixer("all | row | spectral(3)", C),
    "global filter": lambda: Mixer("all | row | global_filter((12, 10))", C),
}
TOKENS = ("KVTAttention", "SelfAttention")
QUICK = ("ConvNN2d", "NeighborhoodAttention2d")


def marked(names, quick=QUICK):
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


def check_export(name: str, strict: bool) -> None:
    """One program for every batch, height and width: the layer's own results, also at sizes it never saw."""
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    if name in TOKENS:
        x, others = torch.randn(2, 12, C), [torch.randn(3, 17, C), torch.randn(1, 5, C)]
        sizes = ({0: Dim("b", min=1, max=64), 1: Dim("n", min=4, max=512)},)
    else:
        x, others = torch.randn(2, C, 12, 10), [torch.randn(3, C, 9, 14), torch.randn(1, C, 8, 8)]
        sizes = ({0: Dim("b", min=1, max=64), 2: Dim("h", min=8, max=512), 3: Dim("w", min=8, max=512)},)
    exported, kept = torch.export.export(layer, (x,), dynamic_shapes=sizes, strict=strict), io.BytesIO()
    torch.export.save(exported, kept)
    kept.seek(0)
    program = torch.export.load(kept).module()
    for t in (x, *others):
        torch.testing.assert_close(program(t), layer(t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", marked(LAYERS))
def test_export_with_open_sizes(name):
    check_export(name, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ConvNN2d", "ACmix2d", "BlockAttention2d", "KVTAttention"])
def test_strict_export_with_open_sizes(name):
    check_export(name, strict=True)


@pytest.mark.slow
def test_an_exported_scan_can_be_trained():
    """Without the states that the forward keeps elsewhere: their number is a size that export would fix."""
    layer = SelectiveScan2d(C, 4)
    x = torch.randn(2, C, 6, 7)
    program = torch.export.export(layer, (x,), strict=False).module()
    for forward in (layer, program):
        forward(x).square().sum().backward()
    exported = dict(program.named_parameters())
    for name, p in layer.named_parameters():
        torch.testing.assert_close(exported[name].grad, p.grad, rtol=1e-4, atol=1e-4)


def network(name: str, stem: int = 2) -> nn.Module:
    """A layer between convolutions, after sizes that are quotients."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, C, 3, stem, 1)
    return nn.Sequential(first, nn.BatchNorm2d(C), nn.ReLU(), LAYERS[name](), nn.Conv2d(C, C, 3), nn.Conv2d(C, 4, 1))


def outcome(forward, net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_(net.training)
    with torch.set_grad_enabled(net.training):
        y = forward(x)
    if not net.training:
        return [y]
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def check_compiled(name: str, backend: str, training: bool, dynamic: bool | None, mark: bool = False) -> None:
    net = network(name).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend=backend, dynamic=dynamic)
    for size in ((20, 20), (24, 16), (17, 28)):
        x = torch.randn(2, 3, *size)
        if mark:
            torch._dynamo.mark_dynamic(x, (2, 3))
        found, truth = outcome(compiled, net, x), outcome(net, net, x)
        least = 0.05 * max(t.abs().max().item() for t in truth)
        for mine, true in zip(found, truth, strict=True):
            off = (mine - true).abs().max().item() / max(true.abs().max().item(), least)
            assert off < 1e-4, f"{name} at {size}: {off:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in LAYERS if n not in TOKENS and n != "every third"])
def test_compiled_between_layers(name):
    check_compiled(name, "aot_eager", training=True, dynamic=None)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dynamic", "mark"), [(True, False), (None, True)])
def test_compiled_with_sizes_open_from_the_start(training, dynamic, mark):
    check_compiled("ConvNN2d", "aot_eager", training, dynamic, mark)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv", "ConvNN2d", "attention"])
def test_inductor_trains_between_convolutions(name):
    """Its own error with open sizes is mended: lower/inductor.py."""
    check_compiled(name, "inductor", training=True, dynamic=None)


class Three(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(3, C, 1), layer, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x)) + 1)


@pytest.mark.parametrize("name", ["ConvNN2d", "ACmix2d", "conv", "BranchingConv2d"])
def test_fx_takes_a_layer_as_a_leaf(name):
    net, x = Three(LAYERS[name]()).eval(), torch.randn(1, 3, 5, 6)
    graph = torch.fx.symbolic_trace(net)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["first", "layer", "last"]
    torch.testing.assert_close(graph(x), net(x))


def test_fx_tokens_and_a_second_input():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.self = Mixer("all(cross) | row | softmax(heads=2)", C), KVTAttention(C, 2, k=3)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.self(self.layer(x, other).flatten(2).transpose(1, 2))

    net, given = Cross(), (torch.randn(1, C, 3, 4), torch.randn(1, C, 2, 5))
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(*given), net(*given))


def test_torchvision_extracts_features():
    load("torchvision")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net, x = Three(ConvNN2d(C, C, k=3)).eval(), torch.randn(1, 3, 5, 6)
    found = extraction.create_feature_extractor(net, ["first", "layer"])(x)
    torch.testing.assert_close(found["layer"], net.layer(net.first(x)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ConvNN2d", "NeighborhoodAttention2d", "DeformConv2d", "SelectiveScan2d"])
def test_torchscript_is_refused_in_words(name):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace.*torch\.export\.export.*backend='oracle'"):
        torch.jit.trace(LAYERS[name]().eval(), torch.randn(1, C, 6, 7))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_works_where_torch_has_the_operators():
    x = torch.randn(1, C, 6, 7)
    for layer in (LAYERS["conv"](), LAYERS["attention"](), ConvNN2d(C, C, k=3, backend="oracle")):
        torch.testing.assert_close(torch.jit.trace(layer.eval(), x)(x), layer(x))
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(NotImplementedError, match=r"knn_attention.*torch\.export"):
        torch.jit.trace(lambda t: knn_attention(t, t, t, 2), q)


@pytest.mark.parametrize("start", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.ELU(inplace=True)])
def test_mixing_matrix_of_a_block_that_writes_in_place(start):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 5)
    before, conv = x.clone(), nn.Conv2d(4, 4, 3, padding=1)
    inplace = mixing_matrix(nn.Sequential(start, conv), x)
    assert torch.equal(x, before)
    apart = type(start)()
    torch.testing.assert_close(inplace, mixing_matrix(nn.Sequential(apart, conv), x))


def test_a_compiler_arranged_otherwise_is_named_and_left_alone(monkeypatch):
    ir = pytest.importorskip("torch._inductor.ir")

    def other(strides):
        return strides

    monkeypatch.setattr(ir, "get_fill_order", other)
    with pytest.warns(RuntimeWarning, match=r"get_fill_order takes \['strides'\].*issue 185510.*dynamic=False"):
        inductor._repair.__wrapped__()
    assert ir.get_fill_order is other
