import json
from dataclasses import replace

import pytest
import torch

from nearfold.models import SpectrumNet, stem_stride
from nearfold.study import measure, tasks
from nearfold.study.plots import FAMILIES
from nearfold.study.publish import publish
from nearfold.study.spectrum import RECIPE, SPECTRUM, Settings, open_study, run
from nearfold.train import Result

SMALL = Settings(limit=100, epochs=1, seeds=2, only=("conv", "convnn", "attention"), width=8, device="cpu")


@pytest.fixture
def settings(tmp_path):
    return replace(SMALL, out=tmp_path / "study")


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by a list of what would have been trained: (seed, epochs, first mixing layer).

    Costs are measured, once instead of many times.
    """
    monkeypatch.setattr(measure, "STEPS", 1)
    calls = []

    def fit(model, data, recipe, **_):
        calls.append((recipe.seed, recipe.epochs, str(model.mixers[0].operation)))
        return Result(recipe.epochs, 1, 0.1, 0.9, 0.8, 1, 0.7 + 0.01 * recipe.seed, 0.7, 0.9, 1.0, 2.0, 3.0, [])

    monkeypatch.setattr(tasks, "fit", fit)
    return calls


def quiet(line):
    assert line


def test_the_spectrum_is_well_formed():
    assert len({stop.name for stop in SPECTRUM}) == len({stop.notation for stop in SPECTRUM}) == len(SPECTRUM)
    assert {stop.family for stop in SPECTRUM} == set(FAMILIES)
    assert RECIPE.augment == "none"


@pytest.mark.parametrize("stop", SPECTRUM, ids=lambda stop: stop.name)
def test_every_operator_trains_in_the_network(stop):
    torch.manual_seed(0)
    net = SpectrumNet(stop.notation, 3, 5, width=8, depth=2)
    for size in ((8, 8), (5, 7)):
        net.zero_grad()
        logits = net(torch.randn(4, 3, *size))
        assert logits.shape == (4, 5)
        logits.square().sum().backward()
        missing = [name for name, p in net.named_parameters() if p.grad is None]
        assert missing == []
        assert all(p.grad.isfinite().all() for p in net.parameters())


def test_networks_differ_in_the_mixing_layer_only():
    torch.manual_seed(0)
    shapes = set()
    for stop in SPECTRUM:
        parameters = SpectrumNet(stop.notation, 1, 10).named_parameters()
        shapes.add(tuple((name, p.shape) for name, p in parameters if ".mixer." not in name))
    assert len(shapes) == 1


def test_the_network_knows_where_a_position_is():
    """Without a position code, a network of attention and pointwise maps could not tell these two apart."""
    torch.manual_seed(0)
    net = SpectrumNet("all | row | softmax(heads=4)", 1, 10, width=16).eval()
    net.stem.padding = (0, 0)  # zero padding tells the border: leave only the code
    image = torch.zeros(1, 1, 12, 12)
    image[..., 3:5, 3:5] = 1
    assert not torch.allclose(net(image), net(image.roll((4, 4), (2, 3))), atol=1e-4)
    with torch.no_grad():
        net.place.zero_()
    torch.testing.assert_close(net(image), net(image.roll((4, 4), (2, 3))))


def test_stem_brings_images_to_an_affordable_grid():
    for size in (8, 16, 28, 32, 64, 224):
        stride = stem_stride(size)
        net = SpectrumNet("window(3) | box | kernel", 3, 10, width=8, depth=1, stride=stride)
        grid = net.stem(torch.zeros(1, 3, size, size)).shape[-1]
        assert 8 <= grid <= 16


@pytest.mark.parametrize("name", ["classes", "width", "depth", "stride"])
def test_network_refuses_numbers_below_one(name):
    arguments = {"classes": 10, **{name: 0}}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        SpectrumNet("window(3) | box | kernel", 1, **arguments)


def test_seeds_are_interleaved_so_that_an_interrupted_study_is_of_use(settings, trained):
    run(open_study(settings), say=quiet)
    assert [seed for seed, *_ in trained] == [0, 0, 0, 1, 1, 1]
    assert len({operation for *_, operation in trained[:3]}) == 3


def test_finished_runs_are_not_run_again_and_more_seeds_add_to_them(settings, trained):
    run(open_study(settings), say=quiet)
    run(open_study(settings), say=quiet)
    assert len(trained) == 6
    run(open_study(replace(settings, seeds=3)), say=quiet)
    assert [seed for seed, *_ in trained[6:]] == [2, 2, 2]


@pytest.mark.parametrize("change", [{"epochs": 2}, {"width": 16}, {"limit": 90}])
def test_another_configuration_is_another_run(settings, trained, change):
    run(open_study(settings), say=quiet)
    run(open_study(replace(settings, **change)), say=quiet)
    assert len(trained) == 12


def test_a_failed_run_is_recorded_reported_and_tried_again(settings, trained, monkeypatch):
    works = tasks.fit

    def fails_for_attention(model, data, recipe, **options):
        if "softmax" in str(model.mixers[0].operation):
            raise RuntimeError("no memory left\nsecond line")
        return works(model, data, recipe, **options)

    monkeypatch.setattr(tasks, "fit", fails_for_attention)
    study = open_study(settings)
    lines = []
    run(study, say=lines.append)
    assert len(study.finished) == 4 and len(trained) == 4
    assert [label for label, _ in study.failures] == [f"self-attention (digits), seed {seed}" for seed in (0, 1)]
    assert sum("FAILED: RuntimeError: no memory left" in line for line in lines) == 2
    assert [row.name for row in study.rows()] == ["conv", "convnn"]
    page = publish(study)[-1].read_text()
    assert "self-attention (digits), seed 1" in page and "4 of 6 runs have finished" in page
    monkeypatch.setattr(tasks, "fit", works)
    run(study, say=quiet)
    assert study.failures == [] and len(study.finished) == 6 and len(trained) == 6


def test_interruption_keeps_what_has_finished(settings, trained, monkeypatch):
    works = tasks.fit

    def interrupted(model, data, recipe, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return works(model, data, recipe, **options)

    monkeypatch.setattr(tasks, "fit", interrupted)
    study = open_study(settings)
    with pytest.raises(KeyboardInterrupt):
        run(study, say=quiet)
    assert len(study.finished) == 2 and study.failures == []


def test_progress_counts_and_estimates(settings, trained):
    lines = []
    run(open_study(settings), say=lines.append)
    assert "0 of 9 runs have finished before, 9 to do" in lines[0]  # three measurements, six that train
    assert [line.split("]")[0] for line in lines[1:]] == [f"[{i}/9" for i in range(1, 10)]
    assert all("about" in line and "left" in line for line in lines[1:-1]) and "left" not in lines[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": ("conv", "con")}, "no operator 'con'.*choose from conv, separable"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 1, got -1"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_what_no_run_could_do_is_found_before_the_first(settings):
    with pytest.raises(ValueError, match="heads"):
        open_study(replace(settings, width=6))
    with pytest.raises(ValueError, match="nowhere"):
        open_study(replace(settings, data="nowhere"))
    with pytest.raises(ValueError, match="cuda:97"):
        open_study(replace(settings, device="cuda:97"))


def test_nothing_to_publish_before_a_run(settings):
    with pytest.raises(ValueError, match=r"no run under .* has finished"):
        publish(open_study(settings))


def test_a_whole_small_study(settings):
    """The real thing, with real training: results, table, report with a picture from the kept weights."""
    study = open_study(settings)
    run(study, say=quiet)
    assert study.failures == []
    table, results, page = publish(study)
    rows = study.rows()
    assert [row.name for row in rows] == ["conv", "convnn", "attention"]
    assert all(row.n == 2 and row.parameters > 0 and row.flops > 0 for row in rows)
    lines = table.read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + 3
    assert any("convolution 3x3" in line and line.endswith(".") for line in lines)  # what may be concluded
    record = json.loads(results.read_text())
    assert record["finished"] == record["planned"] == 6
    assert record["rows"][0]["test"] == list(rows[0].test)
    assert len(list((settings.out / "weights").iterdir())) == 3
    text = page.read_text()
    assert text.count("<svg") == 3 and "Not in the picture" not in text
    for path in (settings.out / "weights").iterdir():
        path.unlink()
    assert "there are no weights" in publish(study)[-1].read_text()
