"""The x-ray of other libraries' layers: the dense truth of their own code, and our layers with the same weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfold import Rule, _torchvision, convert, xray
from nearfold.examine import XRayLayer
from nearfold.examine.layout import Layout
from nearfold.examine.reading import probed
from nearfold.look.measures import measure
from nearfold.nn import Mixer, SelectiveScan

SIDE = 8
N = SIDE * SIDE
CLOSE = 1e-5

pytestmark = pytest.mark.usefixtures("seeded")


def same(mine: dict[str, float], truth: dict[str, float], but: tuple[str, ...] = ()) -> None:
    """Every measure is the other's, and defined where the other is."""
    assert mine.keys() == truth.keys()
    for name in mine.keys() - set(but):
        assert mine[name] == pytest.approx(truth[name], abs=CLOSE, rel=CLOSE, nan_ok=True), name


def as_ours(net: nn.Module, x: torch.Tensor, layers: list[XRayLayer]) -> None:
    """Layers of this library with the same weights, in their places, have the same measures."""
    twin = copy.deepcopy(net)
    names = [one.name for one in layers]
    report = convert(twin, Rule("{self}", where=lambda site: site.name in names), inputs=x)
    assert [row.grade for row in report.replaced] == ["exact"] * len(names)
    ours = {one.name.removesuffix(".mixer"): one for one in xray(twin, x, network=False).layers}
    for layer in layers:
        assert "nearfold" in type(twin.get_submodule(layer.name)).__module__
        assert ours[layer.name].way == layer.way == "words"
        same(layer.measures, ours[layer.name].measures)


def vision():
    try:
        return _torchvision.load("torchvision")
    except ImportError as error:
        pytest.skip(str(error))


def test_a_resnet_of_torchvision():
    vision()
    from torchvision.models.resnet import BasicBlock, ResNet

    whole = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2).eval()
    net = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.maxpool, whole.layer1, whole.layer2)
    x = torch.randn(3, 3, 2 * SIDE, 2 * SIDE)
    seen = xray(net, x, network=False)
    assert not seen.left
    convolutions = [one for one in seen.layers if one.kind == "Conv2d"]
    assert len(convolutions) == len([m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)])
    for layer in convolutions[1:4]:
        module = net.get_submodule(layer.name)
        C, O = module.in_channels, module.out_channels
        places = torch.eye(math.prod(layer.grid)).view(-1, 1, *layer.grid)
        blocks = torch.stack([F.conv2d(places, one[:, None], None, module.stride, module.padding)
                              for one in module.weight.detach().unbind(1)])  # (C, N, O, *out)  # fmt: skip
        truth = (blocks.square().sum((0, 2)) / O).sqrt().flatten(1).T
        assert truth.shape == (math.prod(layer.out_grid), math.prod(layer.grid))
        assert len(blocks) == C
        expected = measure(truth.expand(3, 1, *truth.shape), layer.grid, None, layer.out_grid, signed=False).mean()
        same(layer.measures, expected)
    as_ours(net, x, convolutions[1:4])


def test_a_swin_of_timm():
    vision()
    timm = pytest.importorskip("timm")
    net = timm.models.swin_transformer.SwinTransformer(
        img_size=2 * SIDE, patch_size=2, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,), num_classes=2
    ).eval()
    for block in net.layers[0].blocks:
        block.attn.fused_attn = False
        nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(3, 3, 2 * SIDE, 2 * SIDE)
    seen = {one.name: one for one in xray(net, x, network=False).layers}
    weights: dict[str, torch.Tensor] = {}
    heard = copy.deepcopy(net)
    for i, block in enumerate(heard.layers[0].blocks):
        block.attn.softmax.register_forward_hook(lambda m, given, made, i=i: weights.update({i: made}))
    with torch.no_grad():
        heard(x)
    for i, shift in enumerate((0, 2)):
        layer = seen[f"layers.0.blocks.{i}.attn"]
        numbers = torch.arange(N).view(SIDE, SIDE).roll((-shift, -shift), (0, 1))
        windows = numbers.view(2, 4, 2, 4).transpose(1, 2).reshape(4, 16)
        truth = torch.zeros(3, 2, N, N)
        for w, its in enumerate(windows):
            truth[:, :, its[:, None], its] = weights[i].view(3, 4, 2, 16, 16)[:, w]
        assert torch.allclose(truth.sum(-1), torch.ones(()))
        same(layer.measures, measure(truth, (SIDE, SIDE)).mean())
    as_ours(net, x, [one for name, one in seen.items() if name.endswith("attn")])


def test_a_vit_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=2 * SIDE,
        patch_size=2, attn_implementation="eager", initializer_range=0.5,
    )  # fmt: skip
    net = transformers.ViTModel(config).eval()
    x = torch.randn(3, 3, 2 * SIDE, 2 * SIDE)
    layers = [one for one in xray(net, x, network=False).layers if "ttention" in one.kind]
    with torch.no_grad():
        weights = copy.deepcopy(net)(x, output_attentions=True).attentions  # which leaves hooks
    assert len(layers) == len(weights) == 2
    for layer, truth in zip(layers, weights, strict=True):
        assert (layer.way, layer.grid, layer.beside, layer.groups) == ("words", (SIDE, SIDE), 1, 2)
        same(layer.measures, measure(truth[:, :, 1:], (SIDE, SIDE), beside=1).mean())
    as_ours(net, x, layers)


class Ours(nn.Module):
    """A mixer of Mamba from layers of this library, with the weights of transformers' own."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.in_proj, self.out_proj = theirs.in_proj, theirs.out_proj
        inner, state = theirs.A_log.shape
        self.conv = Mixer("window(4) | causal | depthwise", inner, ndim=1, bias=True)
        self.scan = SelectiveScan(inner, state, rank=theirs.dt_proj.in_features)
        own = theirs.state_dict()
        carried = {f"scan.{name.replace('.', '_')}": own[name] for name in own if name.partition(".")[0] not in AROUND}
        made = self.conv.state_dict()
        carried |= {f"conv.{name}": own[f"conv1d.{name}"].reshape(made[name].shape) for name in made}
        missing, unexpected = self.load_state_dict(carried, strict=False)
        assert not unexpected
        assert {name.partition(".")[0] for name in missing} <= {"in_proj", "out_proj"}

    def forward(self, x):
        z, gate = self.in_proj(x).chunk(2, -1)
        z = F.silu(self.conv(z.mT).mT)
        return self.out_proj(self.scan(z) * F.silu(gate))


AROUND = ("in_proj", "out_proj", "conv1d")


class Sequences(nn.Module):
    """(B, C, N) through a layer of tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.mT).mT


def test_a_mamba_of_transformers():
    """It is differentiated with the gate and the short convolution around its scan: so is the one of our layers."""
    pytest.importorskip("transformers")
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    theirs = MambaMixer(MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=1), layer_idx=0).eval()
    ours = Ours(theirs).eval()
    x = torch.randn(2, 8, 20)
    with torch.no_grad():
        assert torch.allclose(theirs(x.mT), ours(x.mT), atol=1e-6)
    (layer,) = xray(Sequences(theirs), x, network=False).layers
    assert (layer.kind, layer.way, layer.notation) == ("MambaMixer", "derivative", "scan(state=4) | causal | selective")
    rows = torch.stack([probed(ours, ours, one[None].mT, layer.rows, Layout(-1)) for one in x])[:, None]
    same(layer.measures, measure(rows, (20,), layer.rows, signed=False).mean())
    assert layer.measures["before"] == pytest.approx(1.0, abs=1e-6)
