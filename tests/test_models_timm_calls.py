"""Calls that timm's users make: the same shapes as timm's own networks, or an error that says what there is."""

from __future__ import annotations

import pytest
import torch

from nearfold import Rule, convert
from nearfold._torchvision import load
from nearfold.models import create
from nearfold.nn import no_weight_decay

load("torchvision")
timm = pytest.importorskip("timm")
from timm.optim import create_optimizer_v2  # noqa: E402

import nearfold.models.timm  # noqa: E402, F401

PAIRS = {
    "resnet18": ("resnet18", "nearfold_resnet18_conv", {}),
    "vit": ("vit_tiny_patch16_224", "nearfold_vit_tiny_attention", {"depth": 4}),
}


def pair(kind: str, **arguments):
    theirs, ours, fewer = PAIRS[kind]
    return tuple(timm.create_model(name, **fewer, **arguments).eval() for name in (theirs, ours))


@pytest.mark.parametrize("kind", PAIRS)
@torch.no_grad()
def test_pooling_and_classifiers(kind):
    x = torch.randn(1, 3, 224, 224)
    theirs, ours = pair(kind, num_classes=5)
    assert theirs.num_features == ours.num_features and ours(x).shape == theirs(x).shape == (1, 5)
    assert ours.get_classifier().out_features == theirs.get_classifier().out_features
    for pool in ("", "avg", "max", "avgmax") + (("token",) if kind == "vit" else ()):
        for net in (theirs, ours):
            net.reset_classifier(0, pool)
        assert ours(x).shape == theirs(x).shape, pool
        kept = ours.forward_head(ours.forward_features(x), pre_logits=True)
        assert kept.shape == theirs.forward_head(theirs.forward_features(x), pre_logits=True).shape, pool
        torch.testing.assert_close(kept, ours(x))
    whole = ours.forward_features(x)
    places = whole.flatten(2) if whole.dim() == 4 else whole[:, 1:].transpose(1, 2)
    for pool, truth in (("avg", places.mean(2)), ("max", places.amax(2)), ("", whole)):
        ours.reset_classifier(0, pool)
        torch.testing.assert_close(ours(x), truth)


@pytest.mark.parametrize("kind", PAIRS)
@torch.no_grad()
def test_unpooled_when_made(kind):
    x = torch.randn(1, 3, 224, 224)
    theirs, ours = pair(kind, num_classes=0, global_pool="")
    assert ours(x).shape == theirs(x).shape
    again = create(ours.architecture, **ours.arguments)
    assert again(x).shape == ours(x).shape


@torch.no_grad()
def test_intermediates_and_features():
    x = torch.randn(2, 3, 64, 96)
    theirs, ours = pair("resnet18")
    for indices in (None, 2, [0, 3], [-1]):
        (last, maps), (their_last, their_maps) = (
            net.forward_intermediates(x, indices=indices) for net in (ours, theirs)
        )
        assert last.shape == their_last.shape and [m.shape for m in maps] == [m.shape for m in their_maps]
        alone = ours.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, maps, strict=True))
    assert torch.equal(ours.forward_head(last), ours(x))
    theirs, ours = pair("resnet18", features_only=True, out_indices=(1, 3))
    assert [m.shape for m in ours(x)] == [m.shape for m in theirs(x)]
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    net = create("vit_tiny_attention", width=12, heads=2, depth=2, img_size=64)
    last, maps = net.forward_intermediates(x, 1, output_fmt="NLC")
    assert last.shape == (2, 25, 12) and [m.shape for m in maps] == [(2, 24, 12)]
    assert torch.equal(last, net.forward_features(x)) and torch.equal(last[:, 1:], maps[0])


def test_what_cannot_be_is_said():
    net = create("resnet18_conv", width=8, num_classes=4)
    before = net.fc
    for call, words in (
        (lambda: net.reset_classifier(4, ""), "global_pool='' leaves a map.*num_classes=0"),
        (lambda: net.reset_classifier(4, "token"), "global_pool must be one of 'avg', 'max'"),
        (lambda: create("vgg11_conv", width=8, hidden=8).reset_classifier(0, ""), "global_pool must be one of 'avg'"),
        (lambda: create("resnet18_conv", output_stride=8), "output_stride=8.* 32 and stays"),
        (lambda: net.forward_intermediates(torch.zeros(1, 3, 32, 32), [9]), "indices must be some of 0 to 4"),
        (lambda: net.forward_intermediates(torch.zeros(1, 3, 32, 32), 6), "indices=6"),
        (lambda: net.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="HWC"), "output_fmt"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert net.fc is before and net.global_pool == "avg"


def _spared(model):
    """Names of what timm's optimizer does not decay, of more than one axis."""
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert len({id(p) for group in optimizer.param_groups for p in group["params"]}) == sum(
        p.requires_grad for p in model.parameters()
    )
    return {name for name, p in model.named_parameters() if id(p) in free and p.dim() > 1}


SMALL = {"widths": (4, 4, 8, 8), "heads": (1, 1, 2, 2), "img_size": (32, 32)}


@pytest.mark.parametrize(
    ("name", "arguments", "kinds"),
    [
        ("acmix_pvt_tiny", SMALL, {"class_token", "class_place", "places"}),
        ("vit_tiny_attention", {"width": 12, "heads": 2, "depth": 1}, {"class_token"}),
        ("acmix_swin_tiny", {"width": 12, "heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1)}, {"relative_bias"}),
        ("resnet8_scan", {}, {"A_log"}),
        ("acmix_resnet26", {"width": 8}, set()),
    ],
)
def test_timm_decays_the_weights_alone(name, arguments, kinds):
    net = timm.create_model(f"nearfold_{name}", **arguments)
    spared = _spared(net)
    assert {kind for kind in kinds if any(kind in n.split(".") for n in spared)} == kinds
    assert all(kinds & set(n.split(".")) for n in spared)
    assert net.no_weight_decay() <= {n for n, _ in net.named_parameters()}


def test_a_converted_network_says_what_is_not_decayed():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1))
    term = "a*(window(3, scaled(bias=table)) | box | softmax(heads=2))"
    convert(net, Rule(f"({{self}}) + {term}", name="1"), input_size=(3, 8, 8))
    named = dict(net.named_parameters())
    spared = {name for name in no_weight_decay(net) if named[name].dim() > 1}
    assert len(spared) == 1 and spared.pop().endswith("relative_bias")
    assert {n for n in no_weight_decay(net) if named[n].dim() == 1} == {"1.rates"}


@torch.no_grad()
def test_timms_own_wrapper_of_features():
    """``feature_cls="getter"`` calls `forward_intermediates`."""
    x = torch.randn(1, 3, 64, 64)
    ours = timm.create_model("nearfold_resnet18_conv", features_only=True, feature_cls="getter", out_indices=(1, 3))
    theirs = timm.create_model("resnet18", features_only=True, feature_cls="getter", out_indices=(1, 3))
    assert type(ours) is type(theirs) and ours.feature_info.channels() == theirs.feature_info.channels()
    assert [m.shape for m in ours.eval()(x)] == [m.shape for m in theirs.eval()(x)]


@pytest.mark.parametrize("name", ["resnet18_hybrid", "vgg11_hybrid", "swin_tiny"])
def test_segmentation_models(name):
    """``tu-`` and our name in timm; a test of what is installed beside (extra `stacks`)."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = smp.Unet(f"tu-nearfold_{name}", encoder_weights=None, classes=3, decoder_channels=(16, 8, 8, 4, 4))
    x = torch.randn(2, 3, 64, 64)
    y = net(x)
    assert y.shape == (2, 3, 64, 64)
    y.square().mean().backward()
    unused = {n for n, p in net.named_parameters() if p.grad is None}
    assert unused <= {f"encoder.model.network.norm.{what}" for what in ("weight", "bias")}  # of the head that is gone
    with pytest.raises(ValueError, match="output_stride=16"):
        smp.DeepLabV3Plus(f"tu-nearfold_{name}", encoder_weights=None)
