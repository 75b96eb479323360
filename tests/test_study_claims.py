"""The studies of published claims: every one can be planned, and holds equal what it says it does."""

import functools
import json
import statistics

import pytest
import torch
from helpers.cells import slow_but

from nearfold.structures import PREFIX, structure
from nearfold.study import catalogue
from nearfold.study.catalogue import PRESETS, STUDIES, find, gwo, matched, readings
from nearfold.study.catalogue.alignment import SECONDS
from nearfold.study.grid import Study
from nearfold.study.measure import count_flops, count_parameters
from nearfold.study.tasks import build
from nearfold.train import ImageData, Split

SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "imagenet": (3, 224, 224)}
CLASSES = {"cifar100": 100, "imagenet": 1000}
# of the networks at their published size, two studies' are quick
ALL = slow_but(
    [f"{name}-cpu" for name in STUDIES if not name.startswith(("alignment", "benchmark"))]
    + ["ratio-strong", "ratio-paper"],
    [f"{name}-{preset}" for name in STUDIES for preset in PRESETS],
)


def data_like(data):
    """A data set of the right shape and classes, with one image."""
    made = data.name.startswith(PREFIX)
    channels, *size = structure(data.name).size if made else SHAPES[data.name]
    size = size if data.image_size is None else (data.image_size, data.image_size)
    split = Split(torch.zeros(1, channels, *size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    classes = len(structure(data.name).classes) if made else CLASSES.get(data.name, 10)
    return ImageData(data.name, tuple(map(str, range(classes))), split, split, split)


@functools.cache  # trials often differ in their recipes alone
def runs(network, data):
    """Whether a network, spelled in JSON, makes logits of a data set's images."""
    data = data_like(data)
    with torch.device("meta"):
        net = build(json.loads(network), data).eval()
        return net(torch.zeros(2, data.channels, *data.size)).shape == (2, len(data.classes))


@pytest.mark.parametrize("study", ALL)
def test_every_network_of_every_study_runs_on_its_images(study):
    study = find(*study.split("-"))
    assert study.seeds >= 3 and study.question and study.claim and study.title
    panels = {trial.labels["data"] for trial in study.trials}
    against = {t.labels["data"] for t in study.trials if t.labels[study.axis] == study.reference_on(t.labels["data"])}
    assert against == panels  # every panel has its reference
    assert set(study.references) <= panels
    assert all(runs(json.dumps(trial.network), trial.data) for trial in study.trials)


def test_every_claim_of_the_seeds_has_a_study():
    wanted = """spectrum k candidates ratio blend similarity aggregation augmentation memorise benchmark shared
    budget operators surgery alignment alignment_time"""
    assert set(STUDIES) == set(wanted.split())


@pytest.mark.parametrize(
    ("name", "preset", "measure"),
    [("memorise", "cpu", count_parameters), ("memorise", "paper", count_parameters), ("shared", "cpu", None)],
)
def test_budgets_are_equal_within_five_percent(name, preset, measure):
    study = find(name, preset)
    found = {}
    for trial in study.trials:
        data = data_like(trial.data)
        with torch.device("meta"):
            net = build(trial.network, data)
        cost = count_parameters(net) if measure else count_flops(net, SHAPES[trial.data.name])
        found.setdefault(trial.data.name, []).append(cost)
    assert set(found) == ({"digits", "cifar10"} if preset == "cpu" else {"cifar10"})
    for costs in found.values():
        assert max(costs) <= 1.05 * min(costs)


def test_a_budget_that_cannot_be_met_is_refused(monkeypatch):
    monkeypatch.setattr(matched, "TOLERANCE", 1e-9)
    with pytest.raises(ValueError, match="off the budget of"):
        matched.matched(gwo.OPERATORS, "operator", find("memorise", "cpu").trials[0].data, gwo.Recipe(), matched.flops)


def test_memorising_has_no_regularisation():
    for trial in find("memorise", "cpu").trials:
        recipe = trial.recipe
        assert recipe.until == 0.995 and recipe.weight_decay == 0 and recipe.label_smoothing == 0
        assert recipe.augment == "none" and recipe.mixup == recipe.cutmix == recipe.ema == 0


def test_the_benchmark_has_the_whole_catalogue_and_the_published_complexity():
    study = find("benchmark", "paper")
    panels = {}
    for trial in study.trials:
        panels.setdefault(trial.labels["data"], []).append(trial)
    assert set(panels) == {"cifar10, as published", "cifar10, repaired"}
    names = {trial.labels["operator"] for trial in panels["cifar10, repaired"]}
    assert names | set(gwo.LEFT_OUT) == set(catalogue.gwo.CATALOGUE)
    from nearfold.study.results import Row

    omegas = {
        t.labels["operator"]: readings.complexity(Row(t, {}, {}))["Omega"] for t in panels["cifar10, as published"]
    }
    assert omegas["conv"] == 6 and omegas["separable"] == 8
    assert omegas["deformable"] == pytest.approx(8.003, abs=5e-4)  # as printed
    recipe = study.trials[0].recipe
    assert (recipe.optimizer, recipe.lr, recipe.momentum, recipe.batch_size, recipe.epochs) == (
        "sgd",
        1e-3,
        0.9,
        64,
        30,
    )


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("ratios", "cpu", "no study is called 'ratios': ratio"),
        ("ratio", "gpu", "preset must be one of cpu, strong, paper, got 'gpu'"),
        ("nowhere.py", "cpu", "nowhere.py does not exist"),
    ],
)
def test_what_is_not_there_is_refused(name, preset, message):
    with pytest.raises(ValueError, match=message):
        find(name, preset)


def test_a_study_of_ones_own_is_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("x = 1")
    with pytest.raises(ValueError, match=r"has no function study\(preset\)"):
        find(str(path), "cpu")
    assert isinstance(find("recipes/own_study.py", "cpu"), Study)


def test_gwos_table_has_the_published_networks():
    rows = {t.labels["operator"]: t for t in find("recipes/gwo_table.py", "cpu").trials}
    published = {t.labels["operator"]: t for t in find("benchmark", "paper").trials[:3]}
    names = {"StandardConv, as published": "conv", "DeformableConv": "deformable", "DepthwiseConv": "separable"}
    for ours, theirs in names.items():
        assert rows[ours].network == published[theirs].network and rows[ours].recipe == published[theirs].recipe
    sizes = {}
    for name, trial in rows.items():
        model = build(dict(trial.network), data_like(trial.data))
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes["StandardConv, padded"] - sizes["StandardConv, as published"] == 32 * (8**2 - 6**2) * 120


def test_labels_must_differ_and_have_the_axis():
    study = find("k", "cpu")
    from dataclasses import replace

    with pytest.raises(ValueError, match="two trials have the labels"):
        replace(study, trials=[*study.trials, study.trials[0]])
    with pytest.raises(ValueError, match="has no label 'ratio'"):
        replace(study, axis="ratio")
    with pytest.raises(ValueError, match="families must be among space, between, features, both; got near"):
        replace(study, families={9.0: "near"})
    with pytest.raises(ValueError, match="looks=True wants networks called 'spectrum', got 'plain'"):
        replace(study, looks=True)


def test_networks_of_equal_time_train_about_equally_long():
    long, usual = find("alignment_time", "cpu"), find("alignment", "cpu")
    seconds = json.loads(SECONDS.read_text())["seconds"]
    took: dict[str, list[float]] = {}
    for trial, before in zip(long.trials, usual.trials, strict=True):
        assert (trial.labels, trial.network, trial.data) == (before.labels, before.network, before.data)
        one, epochs = seconds[trial.panel][trial.title], trial.recipe.epochs
        took.setdefault(trial.panel, []).append(one * epochs)
        budget = statistics.median(seconds[trial.panel].values()) * before.recipe.epochs
        assert abs(one * epochs - budget) <= one / 2 or epochs == 1
        assert trial.recipe.warmup_epochs * before.recipe.epochs == pytest.approx(before.recipe.warmup_epochs * epochs)
    assert set(took) == set(seconds)
