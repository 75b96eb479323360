import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.studies import spectrum_of

from nearfold import cli
from nearfold.models import SpectrumNet, stem_stride
from nearfold.study import measure, record, tasks
from nearfold.study.catalogue import STUDIES, find
from nearfold.study.files import gather
from nearfold.study.headline import verdict
from nearfold.study.plots import FAMILIES
from nearfold.study.spectrum import RECIPE, SPECTRUM, Settings, open_study, run
from nearfold.train import Result

WORDS = "--limit 100 --epochs 1 --seeds 2 --only conv,convnn,attention --width 8 --device cpu --jobs 1"
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


def finished(study):
    return study.results.finished


def done(settings):
    """Exit code of the command with these settings, in their folder."""
    return cli.main(["study", "spectrum", *WORDS.split(), "--out", str(settings.out)])


def test_the_spectrum_is_well_formed():
    assert len({stop.name for stop in SPECTRUM}) == len({stop.notation for stop in SPECTRUM}) == len(SPECTRUM)
    assert {stop.family for stop in SPECTRUM} == set(FAMILIES)
    assert RECIPE.augment == "none"


def test_the_spectrum_is_a_study_of_the_catalogue(settings):
    assert next(iter(STUDIES)) == "spectrum"
    ours, theirs = find("spectrum", "cpu"), open_study(replace(settings, only=(), width=32, epochs=6)).study
    assert {t.labels["operator"] for t in ours.trials} == {stop.title for stop in SPECTRUM} == set(ours.families)
    digits = [dict(t.network) for t in ours.trials if t.data.name == "digits"]
    assert digits == [dict(t.network) for t in theirs.trials]  # the command's study is the catalogue's on digits
    named = ("axis", "reference", "figure", "looks", "cost", "seeds", "families", "question")
    assert all(getattr(ours, name) == getattr(replace(theirs, seeds=3), name) for name in named)


def test_a_run_is_filed_as_it_always_was(settings):
    """So that folders of earlier versions are continued: another spelling would be another run."""
    planned = open_study(settings)
    train, cost = planned.training[1, 1].config, planned.costs[1].config
    network = {
        "name": "spectrum", "operation": "nearest(9, cosine, self) | ranked | kernel", "width": 8, "depth": 2,
        "stride": 1,
    }  # fmt: skip
    assert train["network"] == cost["network"] == network
    assert {k: v for k, v in train["data"].items() if k != "fingerprint"} == {"name": "digits", "limit": 100}
    assert train["recipe"] == {
        "epochs": 1, "batch_size": 32, "lr": 0.005, "weight_decay": 0.05, "device": "cpu", "seed": 1,
    }  # fmt: skip
    assert set(train) == {"version", "task", "network", "data", "recipe"} and set(cost) == {*train, "machine"}
    assert [run.keep_weights for run in planned.training.values()] == [True, False] * 3
    assert planned.place.root == settings.out


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


def test_a_failed_run_is_recorded_reported_and_tried_again(settings, trained, monkeypatch, capsys):
    works = tasks.fit

    def fails_for_attention(model, data, recipe, **options):
        if "softmax" in str(model.mixers[0].operation):
            raise RuntimeError("no memory left\nsecond line")
        return works(model, data, recipe, **options)

    monkeypatch.setattr(tasks, "fit", fails_for_attention)
    assert done(settings) == 1
    printed = capsys.readouterr()
    study = open_study(settings)
    assert finished(study) == 4 and len(trained) == 4
    failed = [f"self-attention (digits), seed {seed}" for seed in (0, 1)]
    assert [label for label, _ in study.results.failures] == failed
    assert printed.out.count("FAILED: RuntimeError: no memory left") == 2
    assert [line.split(": ")[2] for line in printed.err.splitlines()] == failed
    assert [row.title for row in study.results.rows] == ["convolution 3x3", "ConvNN all"]
    page = (settings.out / "report.html").read_text()
    assert "self-attention (digits), seed 1" in page and "4 of 6 runs have finished" in page
    monkeypatch.setattr(tasks, "fit", works)
    assert done(settings) == 0
    study = open_study(settings)
    assert study.results.failures == [] and finished(study) == 6 and len(trained) == 6


def test_interruption_keeps_what_has_finished_and_reports_it(settings, trained, monkeypatch):
    works = tasks.fit

    def interrupted(model, data, recipe, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return works(model, data, recipe, **options)

    monkeypatch.setattr(tasks, "fit", interrupted)
    assert done(settings) == 130
    study = open_study(settings)
    assert finished(study) == 2 and study.results.failures == []
    assert "2 of 6 runs have finished" in (settings.out / "report.html").read_text()


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


def test_nothing_to_report_before_a_run(settings):
    with pytest.raises(ValueError, match=r"no run under .* has finished"):
        gather(open_study(settings), "nearfold study spectrum")


def test_a_whole_small_study(settings, capsys):
    """The real thing, with real training: numbers, tables, a page with a panel from the kept weights, drawn again."""
    assert done(settings) == 0
    printed = capsys.readouterr().out
    names = ("runs.csv", "results.json", "summary.md", "report.html")
    assert printed.split()[-4:] == [str(settings.out / name) for name in names]
    assert "convolution 3x3" in printed and "“Not found” is not “equal”" in printed and " left" in printed
    rows = open_study(settings).results.rows
    assert [row.title for row in rows] == ["convolution 3x3", "ConvNN all", "self-attention"]
    assert all(len(row.results) == 2 and row.cost["parameters"] > 0 and row.cost["flops"] > 0 for row in rows)
    left = json.loads((settings.out / "results.json").read_text())
    assert left["finished"] == left["planned"] == 6 and left["tested"] == {"digits": 100}
    assert left["rows"][0]["runs"]["1"]["test_accuracy"] == rows[0].results[1]["test_accuracy"]
    assert [look["setting"] for look in left["looks"]["found"]] == [row.title for row in rows]
    assert left["command"] == (
        "nearfold study spectrum --limit 100 --seeds 2 --epochs 1 --only conv,convnn,attention --width 8 "
        f"--out {settings.out} --device cpu"
    )
    assert len(list((settings.out / "weights").iterdir())) == 3
    page = (settings.out / "report.html").read_text()
    assert page.count("<svg") == 4 and "Not among the pictures" not in page
    assert cli.main(["study", "page", str(settings.out)]) == 0
    again = (settings.out / "report.html").read_text()
    assert again.count("<svg") == 4 and len(again) == pytest.approx(len(page), rel=0.01)
    assert "One of the 100 test images of digits" in again
    for path in (settings.out / "weights").iterdir():
        path.unlink()
    capsys.readouterr()
    assert done(settings) == 0 and "9 of 9 runs have finished before, 0 to do" in capsys.readouterr().out
    assert "there are no weights" in (settings.out / "report.html").read_text()


def test_what_the_others_were_compared_with_is_kept(tmp_path):
    results = spectrum_of({"separable": (0.90, 0.92, 0.94), "attention": (0.70, 0.72, 0.74)})
    path, said = tmp_path / "results.json", verdict(results)
    path.write_text(record.Record(results, [], "", {}).to_json([], said))
    again = record.read(path, find("spectrum", "cpu"))
    assert "“depthwise + pointwise”" in said and verdict(again.results) == said
    assert again.results.tested == {"digits": 400} and again.looks is None


def test_results_of_an_older_spectrum_are_not_misread(tmp_path, capsys):
    path = Path(tmp_path / "results.json")
    path.write_text(json.dumps({"study": "spectrum", "command": "nearfold study spectrum", "rows": []}))
    assert cli.main(["study", "page", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "does not say its preset" in line and "its command writes it anew" in line
