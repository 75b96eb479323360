"""What the fast recipe is made of: orthogonalised steps, channels last, a network that looks at its images first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.small_runs import RECIPE, net
from torch import nn

from nearfold.models import create
from nearfold.train import Recipe, begin, evaluate, fit, load_data, open_data, prepare
from nearfold.train.optimizer import REST


def test_a_step_of_muon_is_orthogonal_and_leaves_biases_to_adamw(digits):
    recipe = Recipe(
        epochs=1, batch_size=len(digits.train), optimizer="muon", lr=0.1, momentum=0.0, weight_decay=0.0,
        warmup_epochs=0, clip_grad_norm=0.0, device="cpu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 10, 2), nn.Flatten()
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, digits, recipe, progress=False)
    for name, p in model.named_parameters():
        moved = before[name] - p.detach()
        if p.ndim == 1:  # the first step of Adam is the sign of the gradient
            assert moved.abs().allclose(torch.tensor(REST * recipe.lr), rtol=0.01)
            continue
        values = torch.linalg.svdvals(moved.flatten(1))
        wanted = 0.2 * recipe.lr * max(moved.flatten(1).shape) ** 0.5  # 0.2: the size of AdamW's steps (2502.16982)
        values = values[:9] / wanted  # logits of ten classes have nine directions
        assert values.min() > 0.6 and values.max() < 1.3, name  # five Newton-Schulz steps


def test_channels_last_changes_nothing_but_rounding(digits):
    plain, last = net(), net()
    for model in (plain, last):
        model.layers[3].p = 0.0  # which elements are dropped goes by their order in memory
    recipe = replace(RECIPE, optimizer="sgd", lr=0.01, epochs=1, batch_size=90)
    results = [
        fit(m, digits, replace(recipe, channels_last=c), progress=False) for m, c in ((plain, False), (last, True))
    ]
    weight = last.layers[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(plain.state_dict().values(), last.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert results[0].history[-1]["train_loss"] == pytest.approx(results[1].history[-1]["train_loss"], rel=1e-4)


def test_a_stem_makes_patches_white(digits):
    model = create("resnet8s_conv", in_chans=1, widths=(8, 8, 8))
    drawn = model.stem.weight.clone()
    begin(model, digits)
    assert not torch.equal(model.stem.weight, drawn) and not model.stem.weight.requires_grad
    with torch.no_grad():
        out = model.stem(prepare(digits.train.images, digits))
    found = out[:, :4].movedim(1, -1).flatten(0, 2).T
    assert torch.allclose(torch.cov(found), torch.eye(4), atol=0.1)
    assert torch.equal(out[:, :4], -out[:, 4:])
    kept = model.stem.weight.clone()
    fit(model, digits, replace(RECIPE, epochs=1), progress=False)
    assert torch.equal(model.stem.weight, kept)


def test_networks_that_take_nothing_stay_as_they_are(digits):
    for model in (net(), create("gwo_conv", in_chans=1, width=4, side=2)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        begin(model, digits)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_that_are_read_while_training_are_looked_at_too(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    for split, count in (("train", 12), ("test", 4)):
        for i in range(count):
            folder = tmp_path / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            draws = torch.Generator().manual_seed(i)
            pil.fromarray(torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=draws).numpy()).save(
                folder / f"{i}.png"
            )
    held, streamed = load_data(tmp_path), open_data(tmp_path, image_size=16)
    one, other = (create("resnet8s_conv", num_classes=2, widths=(8, 8, 8)) for _ in range(2))
    begin(one, held)
    begin(other, streamed)
    ours, theirs = (m.stem.weight.flatten(1) for m in (one, other))
    assert torch.isfinite(theirs).all() and theirs.norm() == pytest.approx(float(ours.norm()), rel=0.2)


def test_it_trains_on_digits(digits):
    torch.manual_seed(0)
    model = create("resnet8s_hybrid", in_chans=1, widths=(16, 16, 16))
    begin(model, digits)
    recipe = Recipe(
        epochs=10, batch_size=30, optimizer="muon", lr=0.05, momentum=0.8, weight_decay=0.0, schedule="linear",
        channels_last=True, device="cpu",
    )  # fmt: skip
    fit(model, digits, recipe, progress=False)
    assert evaluate(model, digits.test, digits)[1] > 0.8


def test_what_muon_needs_is_said(digits, monkeypatch):
    from nearfold.train import optimizer

    monkeypatch.setattr(optimizer, "sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"optimizer='muon' needs whole matrices.*parallel='ddp'"):
        optimizer.optimizer_of(net(), replace(RECIPE, optimizer="muon"), torch.device("cpu"))
    monkeypatch.undo()

    def gone(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("nearfold._torchvision.load", gone)
    with pytest.raises(ImportError, match="pip install timm"):
        optimizer.optimizer_of(net(), replace(RECIPE, optimizer="muon"), torch.device("cpu"))
