"""Conversion of real architectures, random weights: exact rules leave the output as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


ARCHITECTURES = [
    *(
        f"torchvision:{name}"
        for name in (
            "convnext_tiny", "densenet121", "efficientnet_b0", "mnasnet0_5", "mobilenet_v2",
            "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5",
            "squeezenet1_1", "swin_t", "vit_b_16",
        )
    ),
    *(
        f"timm:{name}"
        for name in (
            "convnext_atto", "deit_tiny_patch16_224", "dla34", "edgenext_xx_small", "efficientnet_lite0",
            "ghostnet_050", "hrnet_w18_small", "mobilenetv3_small_050", "mobilevit_xxs", "poolformer_s12",
            "regnetx_002", "repvgg_a0", "resnet10t", "res2net50_14w_8s", "swin_tiny_patch4_window7_224", "tinynet_e",
            "vit_tiny_patch16_224",
        )
    ),
    "transformers:vit",
]  # fmt: skip


class Logits(nn.Module):
    """A transformers model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


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
        config = transformers.ViTConfig(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=SIZE,
            num_labels=10,
        )
        model = Logits(transformers.ViTForImageClassification(config))
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


@pytest.mark.parametrize("spec", ARCHITECTURES)
def test_exact_rules_leave_the_output_as_it_was(spec):
    model = build(spec)
    size = 224 if "swin" in spec else SIZE
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    before = model(x)
    state = model.state_dict()
    report = convert(model, RULES, input_size=(3, size, size))
    assert report.replaced and report.exact, str(report)
    grown = [row for row in report.replaced if "nearest" in row.to]
    with torch.no_grad():
        y = model(x)
        scale = before.abs().max().item()
        assert scale > 0
        assert (y - before).abs().max().item() <= 1e-12 * scale
        for name, p in model.named_parameters():
            if name.endswith("rates"):
                p.fill_(0.3)  # what entered with no effect is there
        if grown:
            assert (model(x) - before).abs().max().item() > 1e-9 * scale
    report.undo()
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model(x), before)


def test_there_are_at_least_25_architectures():
    assert len(set(ARCHITECTURES)) >= 25
