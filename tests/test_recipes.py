import doctest
import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_images

from nearfold.models.denoise import DenoiseNet
from nearfold.models.registry import entry_of
from nearfold.recipes import backbone, denoise, denoise_report, detection, photographs, scenes, segmentation

TINY = backbone.Settings(arguments={"width": 8, "depths": (1, 1, 1, 1)}, size=64, steps=25, batch=6, lr=5e-3)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos():
    """Two small pieces of a real photograph in grey, and one for validation, far from one another."""
    china = torch.from_numpy(load_sample_images().images[0].copy()).float().mean(2)[None, None] / 255
    return [china[:, :, :96, :96], china[:, :, 300:396, 300:400]], [china[:, :, 150:214, 500:564]]


@pytest.mark.parametrize("module", ["scenes", "backbone", "detection", "denoise_report"])
def test_examples(module):
    result = doctest.testmod(importlib.import_module(f"nearfold.recipes.{module}"))
    assert result.attempted and not result.failed


def test_boxes_are_tight_around_their_masks():
    made = scenes.scenes(30, 64, seed=3)
    for scene in made:
        assert scene.image.min() >= 0 and scene.image.max() <= 1
        covered = torch.zeros_like(scene.mask, dtype=torch.bool)
        for (x0, y0, x1, y1), label in zip(scene.boxes.long(), scene.labels, strict=True):
            inside = scene.mask[y0:y1, x0:x1] == label
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            covered[y0:y1, x0:x1] = True
        assert not scene.mask[~covered].any()
    assert {int(label) for s in made for label in s.labels} == {1, 2, 3}
    again = scenes.scenes(30, 64, seed=3)
    assert all(torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) for a, b in zip(made, again, strict=True))


@pytest.mark.parametrize(
    ("recipe", "steps", "fall", "reached"), [(detection, 25, 0.75, 0.3), (segmentation, 50, 0.5, 0.4)]
)
def test_a_backbone_learns_under_a_head(recipe, steps, fall, reached):
    settings = replace(TINY, steps=steps)
    batch = scenes.scenes(settings.batch, settings.size, seed=0)
    model = recipe.build(settings)
    before = recipe.mean_iou(model, batch)
    history = backbone.train(settings, model, recipe.loss_of, batch)
    assert sum(history[-5:]) < fall * sum(history[:5])
    assert before < 0.25 and recipe.mean_iou(model, batch) > reached  # 0.24: everything is ground
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.features.parameters())


@pytest.mark.parametrize("name", ["vgg11_hybrid", "densenet121_convnn", "swin_tiny"])
def test_other_networks_are_backbones_too(name):
    net = backbone.Pyramid(name, 32, **entry_of(name).tiny)
    maps = net(torch.zeros(1, 3, 64, 64))
    assert [m.shape[-1] * r for m, r in zip(maps.values(), net.reductions, strict=True)] == [64] * len(maps)


def test_a_perfect_detector_has_iou_one(monkeypatch):
    batch = scenes.scenes(4, 64, seed=0)
    truth = {id(s.image): (s.boxes, s.labels) for s in batch}
    monkeypatch.setattr(detection, "detect", lambda model, image, most: truth[id(image)])
    model = torch.nn.Identity()
    assert detection.mean_iou(model, batch) == 1
    monkeypatch.setattr(detection, "detect", lambda *_: (torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([9])))
    assert detection.mean_iou(model, batch) == 0


def test_a_perfect_segmenter_has_iou_one():
    batch = scenes.scenes(4, 64, seed=0)
    masks = torch.stack([s.mask for s in batch])
    truth = torch.nn.functional.one_hot(masks, 4).permute(0, 3, 1, 2)

    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, x):
            return self.logits

    assert segmentation.mean_iou(Fixed(truth), batch) == 1
    ground = torch.zeros_like(truth)
    assert segmentation.mean_iou(Fixed(ground), batch) == pytest.approx(
        float((masks == 0).float().mean()) / len(masks.unique())
    )


def test_the_command_line_trains(capsys, monkeypatch):
    monkeypatch.setattr(backbone, "scenes", lambda count, size, seed: scenes.scenes(3, 64, seed))
    found = segmentation.main(["--steps", "5", "--backbone", "resnet18_conv"])
    assert found["last loss"] < found["first loss"] * 1.5
    assert "resnet18_conv, 5 steps" in capsys.readouterr().out


def test_denoise_net():
    net = DenoiseNet("nearest(5, cosine, window(5), self) | ranked | kernel", 3, width=8, depth=2)
    x = torch.rand(2, 3, 13, 18)
    assert torch.equal(net(x), x)
    torch.nn.init.normal_(net.head.weight)
    moved = net(x)
    assert moved.shape == x.shape and not torch.allclose(moved, x)
    moved.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    with pytest.raises(ValueError, match="depth must be a whole number of at least 1, got 0"):
        DenoiseNet("window(3) | box | kernel", depth=0)


def test_the_parts_share_no_photograph():
    names = [*photographs.TRAIN, *photographs.VALIDATION, *photographs.TEST]
    assert len(names) == len(set(names))


def test_the_twins_cost_what_they_should():
    costs = {name: denoise.cost(name, 16) for name in denoise.NETWORKS}
    parameters, macs = costs["conv"]
    assert costs["hybrid"][0] == costs["ConvNN"][0] == costs["conv, dilated half"][0] == parameters
    assert macs == (4 * 16 * 9 * 2 + 6 * 16 * 16 * 9) / 4  # one position for 2 x 2 pixels
    assert costs["hybrid"][1] == costs["ConvNN"][1] == macs + 3 * 15 * 15 * 16 / 4
    assert denoise.cost("conv, deeper", denoise.Settings.width)[1] > denoise.cost("hybrid", denoise.Settings.width)[1]


@pytest.mark.parametrize("name", ["conv", "hybrid"])
def test_a_denoiser_learns_and_keeps_its_best_weights(name, photos):
    settings = denoise.Settings(width=8, steps=30, batch=4, crop=32, check=15, lr=5e-3)
    train, validation = photos
    torch.manual_seed(0)
    net = denoise.build(name, 8)
    start = denoise.scores(denoise.denoised(net, validation, 50, "validation"), validation)[0]
    best, kept = denoise.train(net, settings, 50, 0, train, validation)
    net.load_state_dict(kept)
    assert denoise.scores(denoise.denoised(net, validation, 50, "validation"), validation) == [best]
    assert 14.1 < start < 18 and best > start + 2  # 14.15 dB is what sigma 50 leaves, more of it where it is clipped


def test_the_best_weights_are_kept_not_the_last(photos, monkeypatch):
    seen, values = [], iter([[2.0], [3.0], [1.0]])
    monkeypatch.setattr(
        denoise, "denoised", lambda net, *_: seen.append({k: v.clone() for k, v in net.state_dict().items()})
    )
    monkeypatch.setattr(denoise, "scores", lambda *_: next(values))
    settings = replace(denoise.Settings(), steps=3, check=1, crop=16, batch=1)
    best, kept = denoise.train(denoise.build("conv", 4), settings, 25, 0, *photos)
    assert best == 3 and len(seen) == 3
    assert all(torch.equal(kept[name], tensor) for name, tensor in seen[1].items())
    assert not torch.equal(kept["head.weight"], seen[2]["head.weight"])


def test_every_network_sees_the_same(photos, monkeypatch):
    seen = []
    monkeypatch.setattr(denoise, "noisy", lambda *a: seen.append(photographs.noisy(*a)) or seen[-1])
    for name in ("conv", "conv, dilated half"):
        denoise.train(denoise.build(name, 4), replace(denoise.Settings(), steps=2, crop=16), 25, 1, *photos)
    half = len(seen) // 2
    assert half >= 3 and all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_the_study_writes_its_results_and_does_not_train_twice(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(denoise, "photograph", lambda name: photos[0][name == "china"])
    monkeypatch.setattr(denoise, "nonlocal_means", lambda sigma: dict.fromkeys(photographs.TEST, 25.0))
    monkeypatch.setattr(denoise, "DETAIL", ("china", (0, 0)))
    monkeypatch.setattr(denoise.Settings, "__init__", _small(denoise.Settings.__init__))
    command = ["--sigma", "25", "--seeds", "2", "--steps", "1", "--runs", str(tmp_path / "w"), "--out", str(tmp_path)]
    denoise.main(command)
    file = tmp_path / "benchmarks/results/denoise.json"
    found = json.loads(file.read_text())
    assert len(found["runs"]) == 2 * len(denoise.NETWORKS)
    assert (tmp_path / "docs/pictures/denoise.png").stat().st_size < 200_000
    monkeypatch.setattr(denoise, "train", None)
    denoise.main(command)
    assert json.loads(file.read_text()) == found
    with pytest.raises(TypeError, match="NoneType"):  # other settings: trained anew
        denoise.main([*command[:5], "2", *command[6:]])


def _small(init):
    return lambda self, **given: init(self, **{"width": 4, "batch": 2, "crop": 16} | given)


def test_the_table():
    def one(network, seed, db):
        test = dict.fromkeys(photographs.TEST, db)
        fixed = {"sigma": 25, "parameters": 1234, "macs_per_pixel": 5000, "cpu_seconds": 7.0}
        return {"network": network, "seed": seed, "test": test} | fixed

    results = [one("conv", 0, 28.0), one("hybrid", 0, 28.5), one("conv", 1, 29.0), one("hybrid", 1, 28.9)]
    results += [one("conv, deeper", 1, 29.0), one("conv, deeper", 0, 28.6)]
    conv, hybrid, _ = denoise_report.rows(results)
    assert conv["psnr"][0] == 28.5 and conv["psnr"][1] == pytest.approx(0.5**0.5)
    assert conv["ahead"][0] is None and hybrid["ahead"][0] == pytest.approx((0.2, 0.6 / 2**0.5, 5, 10))
    text = denoise_report.markdown(results, {25: {"noisy": dict.fromkeys(photographs.TEST, 20.0)}}, denoise.NETWORKS)
    assert "| hybrid | 1,234 | 5.0 | 7 | 28.700 ± 0.283 | +0.200 ± 0.424, 5 of 10 | -0.100 ± 0.000, 0 of 10 |" in text
    assert "`window(3) \\| box \\| kernel`" in text


def test_the_page_says_what_was_measured():
    measured = set(re.findall(r"[+-]?\d+\.\d{3} ± \d\.\d{3}", (ROOT / "benchmarks/results/denoise.md").read_text()))
    said = set(re.findall(r"[+-]?\d+\.\d{3} ± \d\.\d{3}", (ROOT / "docs/denoising.md").read_text()))
    assert said and said <= measured


def test_photographs_need_scikit_image():
    pytest.importorskip("skimage")
    for name in (*photographs.TRAIN, *photographs.VALIDATION, *photographs.TEST):
        image = photographs.photograph(name)
        assert image.shape[:2] == (1, 1) and min(image.shape[2:]) > 150 and 0 <= image.min() < image.max() <= 1
    assert photographs.centre(photographs.photograph("text")).shape == (1, 1, 172, 256)
