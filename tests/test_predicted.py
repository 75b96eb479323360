"""Predictors are judged rightly: on orders that are known."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from nearfold.study.catalogue import find
from nearfold.study.catalogue.aligned import level, on_average
from nearfold.study.catalogue.alignment import ALIGNED, DATA
from nearfold.study.fourteen import FOURTEEN
from nearfold.study.predicted import accuracies, another_seed, apart, baselines, judge, leave_one_out
from nearfold.study.results import Results, Row, together

STUDY = find("alignment", "cpu")
TITLES = [str(title) for title in FOURTEEN]


def made(best: dict[str, str], tasks: int = 6) -> Results:
    """Results in which an operator's accuracy falls with its distance, in the list, from the best one of the task."""
    draws, rows = random.Random(0), []
    for trial in STUDY.trials:
        task = trial.panel
        if task in best and list(best).index(task) < tasks:
            far = abs(TITLES.index(trial.title) - TITLES.index(best[task]))
            runs = {
                seed: {
                    "test_accuracy": 0.9 - 0.05 * far + draws.gauss(0, 0.005),
                    "history": [{"val_accuracy": 0.5 - 0.02 * far}],
                }
                for seed in range(3)
            }
            rows.append(Row(trial, runs, {}))
    return Results(replace(STUDY, trials=[row.trial for row in rows]), together(rows), len(rows), [])


BEST = dict(zip(list(ALIGNED)[:6], ("convolution 3x3", "KVT", "token mixing", "KVT", "ConvNN", "hybrid"), strict=True))


def test_a_right_order_is_judged_right_and_its_reverse_wrong() -> None:
    results = made(BEST)
    right = judge("right", results, accuracies(results))
    assert right.correlation == pytest.approx(1) and right.share == 1 and right.lost == 0
    wrong = judge("wrong", results, {t: {k: -v for k, v in row.items()} for t, row in accuracies(results).items()})
    assert wrong.correlation == pytest.approx(-1) and wrong.share == 0 and wrong.lost > 20


def test_no_order_has_no_correlation() -> None:
    results = made(BEST)
    assert (
        judge("none", results, {t: dict.fromkeys(row, 1.0) for t, row in accuracies(results).items()}).correlation == 0
    )


def test_only_what_is_not_found_worse_is_level() -> None:
    rows = made(BEST).panels["texture"]
    assert level(rows) == ["convolution 3x3"]
    equal = [replace(row, results={s: {"test_accuracy": 0.9 + 0.001 * s} for s in range(3)}, beside=()) for row in rows]
    assert len(level(together(equal))) == len(rows)


def test_tasks_that_tell_nothing_apart_are_known() -> None:
    results = made(BEST)
    equal = [
        replace(row, results={s: {"test_accuracy": 0.9 + 0.001 * s} for s in range(3)}, beside=())
        if row.trial.panel == "texture" else row
        for row in results.rows
    ]  # fmt: skip
    told = apart(replace(results, rows=together(equal)))
    assert set(told) == set(BEST) - {"texture"}


def test_another_seed_is_judged_by_those_that_it_is_not_one_of() -> None:
    results = made(BEST)
    rest, said = another_seed(results)
    assert all(sorted(row.results) == [1, 2] for row in rest.rows)
    row = results.panels["stripes"][3]
    assert said["stripes"][row.title] == row.results[0]["test_accuracy"]
    assert judge("again", rest, said).correlation > 0.9


def test_evidence_that_tells_is_learnt_from_other_tasks_and_the_left_out_one_is_not_looked_at() -> None:
    results = made(BEST)
    told = {
        t: {k: {"told": v, "noise": len(t + k) % 7} for k, v in row.items()} for t, row in accuracies(results).items()
    }
    assert judge("fitted", results, leave_one_out(results, told)).correlation > 0.9
    one = "texture"  # where evidence is reversed, and only there, the fit of the others is not changed
    turned = told | {one: {k: {"told": -v["told"], "noise": v["noise"]} for k, v in told[one].items()}}
    assert judge("fitted", results, leave_one_out(results, turned)).correlations[one] < -0.5


def test_baselines_are_what_they_are_called() -> None:
    results = made(BEST)
    found = {name: judge(name, results, table) for name, table in baselines(results).items()}
    assert found["always convolution"].hits == ["texture"]
    assert found["one epoch of every operator, one seed"].correlation > 0.95
    assert set(baselines(results)["mean rank on the other tasks"]["texture"]) == set(TITLES)
    assert on_average(results, "texture") == on_average(made({t: b for t, b in BEST.items() if t != "texture"}))


def test_every_task_has_an_aligned_operator_and_every_operator_is_one_of_the_study() -> None:
    assert {trial.panel for trial in STUDY.trials} == set(ALIGNED) and len(DATA) == len(ALIGNED)
    assert set(ALIGNED.values()) <= set(TITLES)
    assert len(TITLES) >= 14 and len(ALIGNED) >= 16


def test_the_networks_of_a_task_have_one_number_of_parameters() -> None:
    import torch

    from nearfold.models import SpectrumNet

    for task in ("texture", "copy", "photographs"):
        counts = []
        for trial in (t for t in STUDY.trials if t.panel == task):
            network = dict(trial.network) | {}
            network.pop("name")
            with torch.device("meta"):
                model = SpectrumNet(network.pop("operation"), 3, 10, **network)
            counts.append(sum(p.numel() for p in model.parameters()))
        assert max(counts) / min(counts) < 1.02, (task, counts)
