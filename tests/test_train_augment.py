import importlib
from dataclasses import replace

import pytest
import torch

from nearfold import _torchvision
from nearfold.train import Recipe, load_data
from nearfold.train.augment import AUGMENTATIONS, crop_flip, randaugment, shift_flip
from nearfold.train.data import Split
from nearfold.train.distributed import Team
from nearfold.train.feed import open_feed
from nearfold.train.mix import Mix, draw_mix, mixed
from nearfold.train.seeds import derive


def images(count=6, channels=3, height=16, width=24):
    draws = torch.Generator().manual_seed(0)
    shape = (count, channels, height, width)
    return torch.randint(1, 256, shape, generator=draws, dtype=torch.uint8)


def shifts(image, border_y, border_x, mode="constant"):
    """Every image that a shift by so much may make of one, by (top, left, mirrored)."""
    _, height, width = image.shape
    border = (border_x, border_x, border_y, border_y)
    padded = torch.nn.functional.pad(image[None].float(), border, mode=mode)[0].to(torch.uint8)
    for top in range(2 * border_y + 1):
        for left in range(2 * border_x + 1):
            crop = padded[:, top : top + height, left : left + width]
            yield (top, left, False), crop
            yield (top, left, True), crop.flip(2)


@pytest.mark.parametrize(("augment", "size", "mode"), [(crop_flip, 8, "constant"), (shift_flip, 16, "reflect")])
def test_a_shift_of_each_image_is_made_and_all_are_used(augment, size, mode):
    batch = images(1, 1, size, 2 * size).expand(400, 1, size, 2 * size).contiguous()
    results = augment(batch, 7, 400, slice(None))
    possible = {crop.numpy().tobytes(): place for place, crop in shifts(batch[0], 1, 2, mode)}
    assert len(possible) == 3 * 5 * 2
    seen = {possible[result.numpy().tobytes()] for result in results}
    assert seen == set(possible.values())


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_shares_together_are_the_whole_batch(name):
    batch, augment = images(), AUGMENTATIONS[name]
    whole = augment(batch, 3, 6, slice(None))
    parts = [augment(batch[share], 3, 6, share) for share in (slice(0, 2), slice(2, 4), slice(4, 6))]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.uint8 and whole.shape == batch.shape
    if name != "none":
        assert not torch.equal(whole, batch)
        assert not torch.equal(whole, augment(batch, 4, 6, slice(None)))


def test_an_image_is_treated_anew_in_every_epoch():
    digits = load_data("digits", limit=60)
    one = digits.train.images[:1].expand(40, -1, -1, -1).contiguous()
    data = replace(digits, train=Split(one, torch.zeros(40, dtype=torch.int64)))
    feed = open_feed(data, Recipe(batch_size=40, augment="crop_flip"), Team(0, 1, torch.device("cpu")))
    assert feed.steps_per_epoch == 1
    (first, _), (second, _) = (next(feed.train(step)) for step in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_augmentation_leaves_global_randomness_alone(name):
    batch = images()
    before = batch.clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = AUGMENTATIONS[name](batch, 3, 6, slice(None))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(AUGMENTATIONS[name](batch, 3, 6, slice(None)), first)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_treats_every_image_on_its_own(channels):
    pytest.importorskip("PIL")
    one = images(1, channels, 8, 8).expand(12, channels, 8, 8).contiguous()
    results = randaugment(one, 0, 12, slice(None))
    assert len({result.numpy().tobytes() for result in results}) > 6


def fail_with(monkeypatch, error):
    """Make the import of the transforms fail once, as `error`, then succeed with a stand-in."""
    outcomes = [error, "module"]

    def imported(name):
        assert name == "torchvision.transforms.v2"
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(importlib, "import_module", imported)
    monkeypatch.setattr(_torchvision, "_declared", [])
    declared = []

    class Library:
        def __init__(self, name, kind):
            assert (name, kind) == ("torchvision", "DEF")

        def define(self, schema):
            declared.append(schema.split("(")[0])

    monkeypatch.setattr(torch.library, "Library", Library)
    return declared


def test_missing_operators_are_declared_only_on_that_very_error(monkeypatch):
    declared = fail_with(monkeypatch, RuntimeError("operator torchvision::nms does not exist"))
    assert _torchvision.transforms() == "module"
    assert declared == ["nms", "qnms"]
    declared = fail_with(monkeypatch, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        _torchvision.transforms()
    assert declared == []


def test_without_torchvision_the_extra_is_named(monkeypatch):
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'torchvision'"))
    with pytest.raises(ImportError, match=r"pip install torchvision.*crop_flip"):
        _torchvision.transforms()


def test_derived_seeds_depend_on_every_part():
    seeds = [derive(*place) for place in ((0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 1))]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


# Images mixed in pairs.


def test_mixup_and_cutmix_by_hand():
    batch, labels = images(4, 1, 4, 6).float(), torch.tensor([0, 1, 2, 2])
    partners = batch[[1, 0, 3, 2]]
    added, targets = mixed(Mix(0.7), batch, labels, 3)
    torch.testing.assert_close(added, 0.7 * batch + 0.3 * partners)
    expected = torch.tensor([[0.7, 0.3, 0], [0.3, 0.7, 0], [0, 0, 1], [0, 0, 1]])
    torch.testing.assert_close(targets, expected)
    pasted, targets = mixed(Mix(0.75, (1, 3, 2, 5)), batch, labels, 3)
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[1:3, 2:5] = True
    assert torch.equal(pasted, torch.where(inside, partners, batch))
    torch.testing.assert_close(targets[0], torch.tensor([0.75, 0.25, 0]))


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_are_mixed_as_the_whole(parts):
    batch, labels = images(8).float(), torch.arange(8) % 3
    for mix in (Mix(0.7), Mix(0.75, (1, 3, 2, 5))):
        whole = mixed(mix, batch, labels, 3)
        pieces = [mixed(mix, *part, 3) for part in zip(batch.chunk(parts), labels.chunk(parts), strict=True)]
        for index in (0, 1):
            assert torch.equal(torch.cat([piece[index] for piece in pieces]), whole[index])


def test_what_is_mixed_is_drawn_from_seed_and_step():
    recipe = Recipe(mixup=0.5, cutmix=1.0)
    drawn = [draw_mix(recipe, step, 16, 24) for step in range(400)]
    assert drawn == [draw_mix(recipe, step, 16, 24) for step in range(400)]
    assert drawn != [draw_mix(Recipe(mixup=0.5, cutmix=1.0, seed=1), step, 16, 24) for step in range(400)]
    boxes = [mix for mix in drawn if mix.box]
    assert 160 < len(boxes) < 240, "either in about half of the steps"
    for mix in boxes:
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 16 and 0 <= left <= right <= 24
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / (16 * 24))
    assert min(mix.share for mix in boxes) < 0.2 and max(mix.share for mix in boxes) > 0.95
    shares = torch.tensor([mix.share for mix in drawn if not mix.box])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.08)
    assert shares.var().item() == pytest.approx(1 / 8, abs=0.03)  # of Beta(1/2, 1/2)
    assert not any(draw_mix(Recipe(mixup=0.5), step, 16, 24).box for step in range(50))
    assert all(draw_mix(Recipe(cutmix=0.5), step, 16, 24).box for step in range(50))
