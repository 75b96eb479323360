"""Conversion of real architectures, random weights: exact rules leave the output as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.cells import slow_but
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nearfold import Rule, _torchvision, convert

SIZE = 64
RULES = [
    Rule("({self}) + new*(nearest(5, cosine, self, stride={stride}) | ranked | depthwise)", where=lambda s: _narrow(s)),
    Rule("({self}) + new*(nearest(5, cosine, self, stride={stride}) | ranked | kernel)", where=lambda s: _square(s)),
    Rule("({self}) + new*(nearest(5, scaled) | ranked | softmax(heads={heads}))", where=lambda s: s.source.tokens),
    Rule("{self}"),
]


def _narrow(site) -> bool:
    return site.kind == "conv" and "depthwise" in str(site.operation) and _same(site)


def _square(site) -> bool:
    return site.kind == "conv" and site.kernel_size == 3 and "groups" not in str(site.operation) and _same(site)


def _same(site) -> bool:
    return "padding" not in str(site.operation) and "dilation" not in str(site.operation)


NAMES = {
    "torchvision": (
        "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2",
        "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d",
        "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vit_b_16",
    ),
    "timm": (
        "convnext_atto", "deit_tiny_patch16_224", "dla34", "edgenext_xx_small", "efficientnet_lite0",
        "ese_vovnet19b_slim", "fbnetc_100", "ghostnet_050", "hrnet_w18_small", "lcnet_050", "mixnet_s",
        "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobilevit_xxs", "nf_regnet_b0", "poolformer_s12",
        "regnetx_002", "regnety_002", "repghostnet_050", "repvgg_a0", "res2net50_14w_8s", "resnet10t", "rexnet_100",
        "semnasnet_075", "swin_tiny_patch4_window7_224", "tinynet_e", "vit_tiny_patch16_224",
    ),
    "transformers": (
        "beit", "convnext", "deit", "dinov2", "focalnet", "levit", "mobilenet_v2", "poolformer", "regnet", "resnet",
        "segformer", "swiftformer", "swin", "vit", "vit_mae", "yolos",
    ),
}  # fmt: skip
QUICK = {"torchvision:resnet18", "timm:vit_tiny_patch16_224", "timm:lcnet_050", "transformers:segformer"}
ARCHITECTURES = [f"{library}:{name}" for library, names in NAMES.items() for name in names]
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
CONFIGS = {
    "beit": ("Beit", SMALL | {"image_size": SIZE}),
    "convnext": ("ConvNext", STAGES),
    "deit": ("DeiT", SMALL | {"image_size": SIZE}),
    "dinov2": ("Dinov2", {n: v for n, v in SMALL.items() if n != "intermediate_size"} | {"image_size": 56}),
    "focalnet": ("FocalNet", {"image_size": SIZE, "embed_dim": 12, "depths": [1, 1, 1, 1]}),
    "levit": ("Levit", {"image_size": SIZE}),
    "mobilenet_v2": ("MobileNetV2", {"depth_multiplier": 0.35}),
    "poolformer": ("PoolFormer", STAGES),
    "regnet": ("RegNet", STAGES | {"hidden_sizes": [16, 16, 32, 32], "embedding_size": 16, "groups_width": 8}),
    "resnet": ("ResNet", STAGES | {"embedding_size": 16}),
    "segformer": ("Segformer", STAGES | {"num_attention_heads": [1, 2, 3, 4]}),
    "swiftformer": ("SwiftFormer", {"depths": [1, 1, 1, 1], "embed_dims": [12, 16, 24, 32]}),
    "swin": ("Swin", {"image_size": SIZE, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    "vit": ("ViT", SMALL | {"image_size": SIZE}),
    "vit_mae": ("ViTMAE", SMALL | {"image_size": SIZE}),
    "yolos": ("Yolos", SMALL | {"image_size": [SIZE, SIZE]}),
}
"""Of transformers: a prefix of classes, and arguments that make it small."""


def build(spec: str) -> nn.Module:
    library, _, name = spec.partition(":")
    try:
        _torchvision.load("torchvision")
        import timm
        import torchvision
    except ImportError as error:
        pytest.skip(f"{library}: {error}")
    torch.manual_seed(0)
    if library == "transformers":
        transformers = pytest.importorskip("transformers")
        prefix, arguments = CONFIGS[name]
        config = getattr(transformers, f"{prefix}Config")(**arguments)
        head = "Model" if name in ("vit_mae", "yolos", "segformer") else "ForImageClassification"
        model = getattr(transformers, f"{prefix}{head}")(config)
    elif library == "timm":
        sized = {"img_size": SIZE} if name.startswith(("vit", "deit")) else {}
        model = timm.create_model(name, pretrained=False, num_classes=10, **sized)
    else:
        sized = {"image_size": SIZE} if name.startswith("vit") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **sized)
    with torch.no_grad():
        for p in model.parameters():  # some start as zero, and would hide everything behind them
            if not p.any():
                p.normal_(0, 0.1)
    return model.eval().double()


def outcome(model: nn.Module, x: Tensor, train: bool) -> tuple[list[Tensor], Tensor]:
    """Outputs, and the input's gradient."""
    model.train(train)
    x = x.clone().requires_grad_(True)
    torch.manual_seed(1)
    made = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor) and t.is_floating_point()]
    weights = torch.Generator().manual_seed(2)
    sum((t * torch.randn(t.shape, generator=weights, dtype=t.dtype)).sum() for t in made).backward()
    return [t.detach() for t in made], x.grad


def off(mine: Tensor, truth: Tensor) -> float:
    assert mine.shape == truth.shape and truth.abs().max() > 0
    return ((mine - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("spec", slow_but(QUICK, ARCHITECTURES))
def test_exact_means_exact(spec):
    """In evaluation and training, on another batch than the one that `convert` has seen; and undo is undo."""
    model = build(spec)
    size = 224 if "swin_t" in spec else 56 if "dinov2" in spec else SIZE
    frozen = list(model.parameters())[-1].requires_grad_(False)
    twin, modules = copy.deepcopy(model), list(model.named_modules())
    report = convert(model, RULES, input_size=(3, size, size))
    assert report.replaced and report.exact, str(report)
    assert report.difference_seen <= 1e-12
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for train in (False, True):
        (before, slope), (after, mine) = outcome(twin, x, train), outcome(model, x, train)
        assert len(before) == len(after) and max(map(off, after, before)) <= 1e-11
        assert off(mine, slope) <= 1e-10 if not train else off(mine, slope) <= 1e-8  # through batches' statistics
    assert f"-> {sum(p.numel() for p in model.parameters()):,}" in str(report)
    if frozen in set(model.parameters()):
        assert not frozen.requires_grad
    grown = [row for row in report.replaced if "nearest" in row.to]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("rates"):
                p.fill_(0.3)  # what entered with no effect is there
    if grown:
        before = outcome(twin, x, False)[0]
        assert max(map(off, outcome(model, x, False)[0], before)) > 1e-9
    report.undo()
    assert list(model.named_modules()) == modules


def test_there_are_at_least_60_architectures():
    assert len(set(ARCHITECTURES)) >= 60
