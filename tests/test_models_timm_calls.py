"""Calls that timm's users make: the same shapes as timm's own networks, or an error that says what there is."""

from __future__ import annotations

import pytest
import torch

from nearfold._torchvision import load
from nearfold.models import create

load("torchvision")
timm = pytest.importorskip("timm")
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
