"""Measures of data, on data whose measures are known; and that they read the training images and nothing else."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nearfold import cli, parse
from nearfold.grammar import CATALOGUE
from nearfold.study.alignment import (
    Measure,
    Positions,
    Profile,
    confidence,
    features,
    labels,
    measure,
    positions,
    scores,
)
from nearfold.study.alignment.command import report
from nearfold.study.alignment.inputs import of_inputs
from nearfold.study.alignment.labels import ITSELF, PROBES, of_labels
from nearfold.study.alignment.positions import BLOCKS, FOLDS, slots, window
from nearfold.study.alignment.recommend import nearest_probe
from nearfold.study.alignment.ridge import PENALTIES, Task, _fitted, beside, explained, right, screened
from nearfold.study.alignment.words import sentences
from nearfold.study.fourteen import FOURTEEN
from nearfold.train import ImageData, load_data
from nearfold.train.data import Split

ROOT = Path(__file__).resolve().parents[1]
CONV, TABLE, ATTENTION = "window(3) | box | kernel", "all | row | table(64)", "all | row | softmax(heads=4)"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(values_NPD, grid, told=None) -> Positions:
    x = values_NPD - values_NPD.mean((0, 1))
    scale = x.std((0, 1))
    told = torch.arange(len(x)) // BLOCKS % 2 if told is None else told
    return Positions(x / scale, scale, grid, told, int(told.max()) + 1)


def averaged(count, side, weights, seed=0):
    """White noise, filtered: (count, side * side, 1)."""
    k = weights.shape[0] - 1
    white = torch.randn(count, 1, side + k, side + k, generator=rng(seed))
    return F.conv2d(white, weights[None, None]).flatten(2).mT


def values(found) -> dict[str, float]:
    return {name: float(blocks.mean()) for name, blocks in found.items()}


def test_white_noise_explains_nothing():
    found = values(of_inputs(maps(torch.randn(600, 64, 2, generator=rng()), (8, 8))))
    assert {"window(3)", "column(7)", "everywhere", "nearest", "own", "table", "content", "similar"} <= set(found)
    assert all(abs(value) < 0.01 for value in found.values()), found


def test_a_filter_of_three_has_the_share_that_its_covariance_says():
    weights = torch.tensor([[1.0, 2.0, 1.0], [0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
    side = 10
    found = values(of_inputs(maps(averaged(1500, side, weights), (side, side))))
    # covariance at every offset; outside the map neighbours are zero
    padded = F.pad(weights[None, None], (8, 8, 8, 8))
    at = F.conv2d(padded, weights[None, None])[0, 0]
    middle = at.shape[0] // 2

    def covariance(a, b=(0, 0)):
        row, column = a[0] - b[0], a[1] - b[1]
        return at[middle + row, middle + column] if max(abs(row), abs(column)) <= middle else torch.tensor(0.0)

    for size in (3, 5):
        offsets = [offset for offset in window(size) if offset != (0, 0)]
        inside = (slots((side, side), offsets) < side * side).float()
        both = inside.T @ inside / side**2
        among = torch.tensor([[covariance(a, b) for b in offsets] for a in offsets]) * both
        to = torch.tensor([covariance(a) for a in offsets]) * inside.mean(0)
        theory = float(to @ torch.linalg.solve(among, to) / covariance((0, 0)))
        assert found[f"window({size})"] == pytest.approx(theory, abs=0.01), size
    assert found["window(3)"] > 0.3
    assert abs(found["place"]) < 0.01 and abs(found["own"]) < 0.01  # the same everywhere


def test_stripes_hang_together_along_rows():
    found = values(of_inputs(positions(load_data("made:stripes"), 600)))
    assert found["row(7)"] > 0.15 and abs(found["column(7)"]) < 0.01


def test_where_positions_have_changed_places_a_window_is_blind_and_a_table_is_not():
    smooth = averaged(800, 8, torch.ones(3, 3))
    before = values(of_inputs(maps(smooth, (8, 8))))
    after = values(of_inputs(maps(smooth[:, torch.randperm(64, generator=rng(1))], (8, 8))))
    assert after["window(3)"] < before["window(3)"] - 0.4
    assert after["own"] > before["own"] + 0.1
    assert after["table"] == pytest.approx(before["table"], abs=1e-3) and after["table"] > 0.7


def test_weights_that_differ_from_place_to_place_are_seen():
    x = torch.randn(800, 36, 1, generator=rng()).unflatten(1, (6, 6))
    x[:, :, 1::2] = x[:, :, ::2] * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])[:, None, None] + 0.5 * x[:, :, 1::2]
    found = values(of_inputs(maps(x.flatten(1, 2), (6, 6))))
    assert found["window(3)"] < 0.1 < 0.5 < found["own"]


def test_what_looks_alike_is_found_by_content():
    alike = values(of_inputs(positions(load_data("made:alike"), 200)))
    assert alike["similar"] > 0.4 and alike["similar"] > 2 * alike["window(7)"]
    texture = values(of_inputs(positions(load_data("made:texture"), 400)))  # one of eight filters: no fixed weights
    assert texture["content"] > 0.2 > 0.1 > texture["window(3)"]


def test_explained_is_what_regressions_by_hand_give():
    z, noise = torch.randn(400, 3, generator=rng()), torch.randn(400, 2, generator=rng(1))
    y = z @ torch.randn(3, 2, generator=rng(2)) + noise
    block = torch.arange(400) % BLOCKS
    by_hand = []
    for penalty in PENALTIES:
        errors = torch.zeros(BLOCKS)
        for fold in range(FOLDS):
            out = block % FOLDS == fold
            fit = torch.linalg.solve(z[~out].T @ z[~out] + penalty * 400 * torch.eye(3), z[~out].T @ y[~out])
            errors.index_add_(0, block[out], (y[out] - z[out] @ fit).square().sum(1))
        by_hand.append(errors)
    best = min(by_hand, key=lambda errors: float(errors.sum()))
    total = 1 - float(best.sum() / y.square().sum())
    assert float(explained(z, y, block).mean()) == pytest.approx(total, abs=1e-5)


def test_the_penalty_is_that_of_the_least_error_left_one_out():
    z, y = torch.randn(60, 20, generator=rng()).double(), torch.randn(60, 1, generator=rng(1)).double()
    y = y + z[:, :1]
    z, y = z - z.mean(0), y - y.mean(0)

    def fit(penalty, rows, count=60):
        zc, yc = z[rows] - z[rows].mean(0), y[rows] - y[rows].mean(0)
        return torch.linalg.solve(zc.T @ zc + penalty * count * torch.eye(20, dtype=z.dtype), zc.T @ yc)

    def left_out(penalty):
        errors = []
        for n in range(60):
            rows = torch.arange(60) != n
            mean_z, mean_y = z[rows].mean(0), y[rows].mean(0)
            errors.append(float((y[n] - mean_y - (z[n] - mean_z) @ fit(penalty, rows)).square().sum()))
        return sum(errors)

    least = min((1e-3, 1e-2, 1e-1, 1.0), key=left_out)
    torch.testing.assert_close(_fitted(z, y), fit(least, torch.arange(60) >= 0))


def test_labels_of_chance_stay_at_chance(monkeypatch):
    """Thousands of features are chosen from; were they chosen by the images left out, this would be far above zero."""
    told = torch.randint(2, (600,), generator=rng(3))
    found = screened(torch.randn(600, 5000, generator=rng()), task := Task(told, 2, torch.arange(600) % FOLDS))
    own = screened(torch.randn(600, 50, generator=rng(1)), task)
    for good in (right(found, task), beside(own, found, right(own, task), task)):
        assert abs(float(good.float().mean()) - 0.5) < 0.07
    monkeypatch.setattr(labels, "PROBES", {name: PROBES[name] for name in (CONV, "all | row | table(1)")})
    at = positions(load_data("made:texture"), 400)
    shuffled = replace(at, labels=at.labels[torch.randperm(400, generator=rng())])
    assert all(abs(value) < 0.1 for value in values(of_labels(shuffled)).values())


def told(name, limit, *probes, monkeypatch) -> list[float]:
    """Above chance, position by position and from these probes."""
    monkeypatch.setattr(labels, "PROBES", {probe: PROBES[probe] for probe in probes})
    return list(values(of_labels(positions(load_data(f"made:{name}"), limit))).values())


@pytest.mark.parametrize(
    ("name", "seeing", "blind"),
    [
        ("texture", "window(3) | box | kernel", "all | row | softmax"),
        ("stripes", "window((1, 7)) | box | kernel", "window((7, 1)) | box | kernel"),
        ("copy", "all | row | table(1)", "window(9) | box | kernel"),
    ],
)
def test_each_structure_is_seen_by_its_word(name, seeing, blind, monkeypatch):
    alone, sees, other = told(name, 800, seeing, blind, monkeypatch=monkeypatch)
    assert sees > alone + 0.2 and sees > other + 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seeing", "blind"),
    [
        ("offset", "window(7) | box | kernel", "window(5) | box | kernel"),
        ("retrieval", "all | row | softmax", "window(7) | box | kernel"),
        ("alike", "all | row | softmax", "window(7) | box | kernel"),
        ("induction", labels.BOTH, "nearest(9, euclidean) | ranked | kernel"),
        ("selective", "scan(state=4) | causal | selective", "window(7) | box | kernel"),
        ("tracking", "scan(state=4) | causal | selective", "window(7) | box | kernel"),
    ],
)
def test_each_structure_is_seen_by_its_word_at_length(name, seeing, blind, monkeypatch):
    alone, sees, other = told(name, 2000, seeing, blind, monkeypatch=monkeypatch)
    assert sees > alone + 0.15 and sees > other + 0.15


def test_no_image_but_those_of_training_is_read(monkeypatch):
    data = load_data("made:texture", limit=200)

    class Guarded:
        name, classes, channels, size = data.name, data.classes, data.channels, data.size
        train, mean, std = data.train, data.mean, data.std

        @property
        def test(self):
            raise AssertionError("the test images were asked for")

        @property
        def val(self):
            raise AssertionError("the validation images were asked for")

    monkeypatch.setattr(labels, "PROBES", {CONV: PROBES[CONV]})
    found = measure(Guarded())
    assert found.images == len(data.train) and found.labels[CONV].value > 0.2
    with pytest.raises(ValueError, match="at least 160 are needed"):
        positions(Guarded(), 100)


def test_of_a_row_of_positions_each_is_one_pixel():
    assert positions(load_data("made:points"), 160).grid == (1, 48)
    at = positions(load_data("digits", limit=200, image_size=20), 160)
    assert at.grid == (10, 10) and at.x_NPD.shape[2] == 4
    gram = torch.corrcoef(at.x_NPD.flatten(0, 1).T)
    assert float((gram - torch.eye(4)).abs().max()) < 0.05  # principal components


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"size": (1, 2)}, "1 x 2 positions, and from 4 to 1024"),
        ({"size": (1, 2000)}, "1 x 2000 positions"),
        ({"alike": True}, "all training images are alike"),
        ({"classes": 1}, "all training images are of one class"),
    ],
)
def test_data_that_cannot_be_measured(changed, said):
    size = changed.get("size", (4, 4))
    images = torch.randint(256, (160, 1, *size), dtype=torch.uint8, generator=rng())
    images = torch.full_like(images, 7) if changed.get("alike") else images
    split = Split(images, torch.arange(160) % changed.get("classes", 2))
    with pytest.raises(ValueError, match=said):
        positions(ImageData("given", ("a", "b"), split, split, split))


def profile(inputs=(), **gains: float) -> Profile:
    """Nothing explains anything, but for these gains of probes and shares of inputs."""

    def flat(value: float) -> Measure:
        return Measure((value,) * BLOCKS)

    found = {name: flat(0.2) for name in (ITSELF, *PROBES)}
    return Profile("given", 200, (8, 8), 1, 2, dict(inputs), found | {name: flat(v) for name, v in gains.items()})


def test_the_operator_with_the_words_that_tell_comes_first():
    for probe, name in (
        (CONV, "convolution 3x3"), ("all | row | table(1)", "token mixing"), ("all | row | softmax", "self-attention"),
        ("scan(state=4) | causal | selective", "selective scan"),
        ("deformable(3) | box | kernel", "deformable convolution"),
        ("window(7) | box | generated(groups=1)", "involution"),
        ("window(3, dilation=2) | box | kernel", "dilated convolution"),
        ("nearest(9, euclidean) | ranked | softmax", "KVT"), ("nearest(9, euclidean) | ranked | kernel", "ConvNN"),
        ("nearest(9, blend(0.5)) | ranked | kernel", "blend 0.5"), ("window(5) | box | kernel", "depthwise 5x5"),
        ("window(5) | box | softmax", "neighbourhood attention"),
    ):  # fmt: skip
        found = scores(profile(**{probe: 0.9}), list(FOURTEEN.values()))
        assert max(found, key=lambda one: found[one]) == FOURTEEN[name], probe


def test_any_operation_has_its_evidence_and_names_do_not_matter():
    given = profile(**{CONV: 0.7, "all | row | softmax": 0.5})
    for entry in CATALOGUE.values():
        found = features(given, entry.notation)
        assert all(torch.isfinite(torch.tensor(value)) for value in found.values())
        assert -1 <= found["gain"] <= 1
    assert nearest_probe(parse("window(3) | box | separable")) == CONV
    assert features(given, CONV) == features(given, parse(CONV))
    both = features(given, f"a*({CONV}) + b*({ATTENTION})")
    assert both["gain"] == pytest.approx(0.5) and features(given, ATTENTION)["gain"] == pytest.approx(0.3)
    half = features(given, f"branch(0.5, {ATTENTION}, {CONV})")
    assert half["gain"] == pytest.approx((0.5 + 0.4) / 2)


def test_what_two_operands_find_together_is_evidence_for_their_combination_alone():
    given = profile(**{labels.BOTH: 0.9})
    nearest = "nearest(9, cosine, self) | ranked | kernel"
    assert features(given, f"branch(0.5, {nearest}, {CONV}, mix)")["gain"] == pytest.approx(0.7)
    assert features(given, f"a*({ATTENTION}) + b*({CONV})")["gain"] == 0 == features(given, nearest)["gain"]


def test_confidence_is_how_often_an_operator_comes_first():
    sure = confidence(profile(**{CONV: 0.9}), [CONV, ATTENTION])
    assert sure == {CONV: 1.0, ATTENTION: 0.0}
    close = profile(**{CONV: 0.5})
    noisy = Measure(tuple(0.5 + 0.3 * (-1) ** n for n in range(BLOCKS)))
    unsure = confidence(replace(close, labels={**close.labels, "all | row | softmax": noisy}), [CONV, ATTENTION])
    assert sum(unsure.values()) == pytest.approx(1) and 0.05 < unsure[CONV] < 0.95


def test_only_clear_differences_are_told():
    assert "nothing that is read from other positions helps" in sentences(
        profile({name: Measure((0.0,) * BLOCKS) for name in ("window(3)", "everywhere", "place", "own", "content")})
    )[-1]  # fmt: skip


def test_the_command_says_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "nearfold.study.alignment.command.measure",
        lambda data, limit, progress: measured.append(len(data.train)) or profile(INPUTS, **{CONV: 0.9}),
    )
    measured: list[int] = []
    assert cli.main(["align", "made:texture", "--limit", "200", "--json", str(tmp_path / "found.json")]) == 0
    text = capsys.readouterr().out
    kept = json.loads((tmp_path / "found.json").read_text())
    assert measured == [184] and " 1  conv" in text and "100 %" in text
    assert next(iter(kept["operators"])) == "convolution 3x3" and kept["operators"]["convolution 3x3"]["first"] == 1
    assert Profile.from_dict(kept) == profile(INPUTS, **{CONV: 0.9})
    assert cli.main(["align", "made:textur"]) == 2
    assert "did you mean texture?" in capsys.readouterr().err
    assert cli.main(["align", "digits", "--limit", "100"]) == 2


INPUTS = {
    name: Measure((0.5,) * BLOCKS) for name in ("window(3)", "window(7)", "everywhere", "place", "own", "content")
}


@pytest.mark.slow
def test_the_page_is_what_the_kept_profiles_say():
    """After a change to what is measured: python recipes/alignment_data.py FILE.json ..."""
    recipe = SimpleNamespace(**runpy.run_path(str(ROOT / "recipes/alignment_data.py")))
    page = (ROOT / "docs/alignment.md").read_text(encoding="utf-8")
    assert recipe.filled(page, recipe.kept()) == page


@pytest.mark.slow
def test_where_nothing_is_told_no_operator_is_pointed_to():
    draw = torch.Generator().manual_seed(0)

    def noise(count):
        images = torch.randint(256, (count, 1, 6, 6), dtype=torch.uint8, generator=draw)
        return Split(images, torch.randint(2, (count,), generator=draw))

    said = report(measure(ImageData("noise", ("a", "b"), noise(300), noise(2), noise(2))))
    assert said[-1].endswith("no operator is pointed to.") and not any("comes first" in line for line in said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["digits", "--json", "."], "argument --json: '.' is a folder: name a file"),
        (["nosuch"], "'made:NAME'"),
        ([""], "the name of the data is empty"),
        (["made:texture", "--image-size", "1"], "--image-size"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(given, said, capsys):
    assert cli.main(["align", *given]) == 2
    assert said in capsys.readouterr().err
