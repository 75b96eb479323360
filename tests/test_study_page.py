"""What a study says and leaves, from results that are made up so that the right sentence is known."""

import csv
import json
import re
from dataclasses import replace

import pytest
from helpers.studies import Tags, result, results_of

from nearfold import cli
from nearfold.study import page
from nearfold.study.authors import read
from nearfold.study.catalogue import find, readings
from nearfold.study.charts import CHARTS
from nearfold.study.compare import against_reference, differences
from nearfold.study.grid import Authors
from nearfold.study.record import Record
from nearfold.study.statistics import paired

CLEAR = {"a": (0.80, 0.81, 0.79, 0.80), "b": (0.90, 0.91, 0.89, 0.905), "c": (0.80, 0.82, 0.78, 0.81)}


def test_a_difference_is_found_where_there_is_one_and_only_there():
    (text,) = against_reference(results_of(CLEAR))
    assert "held-out images choose b, which has 90.1 % (" in text and "(4 seeds)" in text
    assert re.search(r"Better than a: b \(\+10\.1 points, \+9\.\d to \+1[01]\.\d\)", text)
    assert "no difference found between a and c" in text and "better than a: c" not in text.lower()


def test_holm_counts_all_comparisons_of_the_data_set():
    tests = {"a": (0.5, 0.5, 0.5, 0.5), "b": (0.52, 0.50, 0.53, 0.54)}
    (alone,) = differences(*_rows_and_reference(tests))
    assert alone.p == alone.estimate.p
    many = differences(*_rows_and_reference(tests | {f"x{i}": (0.51, 0.49, 0.5, 0.5) for i in range(9)}))
    assert many[0].p == pytest.approx(10 * many[0].estimate.p)


def _rows_and_reference(tests):
    results = results_of(tests)
    return results.rows, results.rows[0]


def test_the_spread_of_a_difference_is_that_of_all_settings():
    tests = {"a": (0.5, 0.5, 0.5), "b": (0.52, 0.521, 0.522), "c": (0.4, 0.6, 0.5)}
    b, _ = differences(*_rows_and_reference(tests))
    alone = paired({0: 0.52, 1: 0.521, 2: 0.522}, {0: 0.5, 1: 0.5, 2: 0.5})
    assert b.estimate.mean == pytest.approx(alone.mean) and b.estimate.half > 20 * alone.half


def test_gaps_are_compared_where_both_have_memorised():
    results = results_of({"a": (0.5, 0.5), "b": (0.6, 0.6), "c": (0.7, 0.7)}, train=1.0)
    a, b, c = results.rows
    slow = replace(b, results={s: result(0.6, train=0.9) for s in range(2)})
    assert [d.row.title for d in differences([a, slow, c], a, "gap_last")] == ["c"]
    assert [d.row.title for d in differences([a, slow, c], a)] == ["b", "c"]
    assert differences([a, slow, c], slow, "gap_last") == []


def test_settings_are_chosen_by_held_out_images_not_by_test_images():
    results = results_of({"a": (0.9, 0.9), "b": (0.8, 0.8)})
    rows = [results.rows[0], replace(results.rows[1], results={s: result(0.8, val=0.95) for s in range(2)})]
    (text,) = against_reference(replace(results, rows=rows))
    assert "the held-out images choose b, which has 80.0 %" in text


def test_one_seed_finds_nothing():
    (text,) = against_reference(results_of({"a": (0.1,), "b": (0.9,)}))
    assert "With one seed there is no interval: no difference can be found." in text


def test_memorise_compares_only_what_memorised():
    tests = {
        "attention": (0.5, 0.52, 0.51),
        "conv": (0.7, 0.71, 0.70),
        "kvt": (0.52, 0.5, 0.51),
        "depthwise": (0.6,) * 3,
    }
    results = results_of(tests, "gaps", train=1.0, measure="gap_last")
    slow = replace(results.rows[3], results={s: result(0.6, train=t) for s, t in enumerate((1.0, 0.91, 1.0))})
    results = replace(results, rows=[*results.rows[:3], slow])
    (text,) = readings.memorise_answer(results)
    assert "among the 3 of 4 operators that memorised" in text and "smallest for conv, 29.7 points" in text
    assert "Smaller than attention: conv" in text
    assert "Did not memorise with every seed, so no gap is compared: depthwise (97.0 %)." in text


def test_scores_and_tiers_are_gwos():
    results = results_of({"conv": (0.6931,)}, "ranking")
    trial = replace(results.rows[0].trial, network={"name": "gwo_conv", "layer": "window(3) | box | kernel"})
    (score,) = readings.scores([replace(results.rows[0], trial=trial)])
    assert (score.omega, round(score.score, 2), score.tier) == (6, 990.14, "B")  # as printed


def test_a_budget_picks_the_best_that_fits_and_says_what_is_not_known():
    results = results_of({"a": (0.7, 0.72, 0.71), "b": (0.8, 0.83, 0.81), "c": (0.9, 0.91, 0.92)}, "costs", cost=True)
    assert readings.recommend(results, {"latency_ms": 2.5})[0].startswith("digits: b, 81.3 %")
    alike = results_of({"a": (0.7, 0.72, 0.71), "b": (0.8, 0.83, 0.81), "c": (0.81, 0.82, 0.82)}, "costs", cost=True)
    (text,) = readings.recommend(alike, {"latency_ms": 5.0})
    rows = [  # alike on held-out images, and not on the test images, which must not decide
        replace(row, results={seed: r | {"test_accuracy": 0.1 * i} for seed, r in row.results.items()})
        for i, row in enumerate(alike.rows)
    ]
    assert readings.recommend(replace(alike, rows=rows), {"latency_ms": 5.0})[0].startswith("digits: b, 10.0 %")
    assert text.startswith("digits: b, 81.3 %") and "has the least latency. The best on them: c, 81.7 %" in text
    assert readings.recommend(results, {"latency_ms": 0.5}) == [
        "digits: no setting fits; the least there is: latency 1 ms."
    ]
    assert readings.recommend(results, {"flops": 1e9})[0].startswith("digits: c, ")
    with pytest.raises(ValueError, match="no cost is called 'joules'"):
        readings.recommend(results, {"joules": 1})
    with pytest.raises(ValueError, match="nothing was measured"):
        readings.recommend(results_of({"a": (0.5,)}), {"flops": 1})
    assert [row.title for row in readings.front(results.rows, "latency_ms")] == ["a", "b", "c"]


@pytest.mark.parametrize("figure", sorted(CHARTS))
def test_the_page_is_whole_and_asks_for_nothing(figure):
    names = list(CLEAR) if figure != "gaps" else ["attention", "b", "c"]
    results = results_of(dict(zip(names, CLEAR.values(), strict=True)), figure, train=1.0, cost=True)
    results = replace(results, failures=[("x <1>", "RuntimeError: <bad>")])
    text = page.html(Record(results, ["Facts & figures."], "nearfold study run s", {"PyTorch": "2"}))
    assert all(address.startswith("#") for address in Tags(text).addresses)
    assert "http" not in re.sub(r'(xmlns(:\w+)?|xlink:\w+)="[^"]*"', "", re.sub(r"<!DOCTYPE[^>]*>", "", text))
    assert "A title &lt;&amp;&gt;" in text and "<1>" not in text and "RuntimeError: &lt;bad&gt;" in text
    for words in ("Which?", "That one.", "The answer in full", "Every run", "Facts &amp; figures."):
        assert words in text
    assert text.count("<title>") > (3 if figure == "matrix" else 10)  # every point says its numbers


def test_the_authors_runs_are_read_by_their_arguments(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("final_test_top1,arg_K,arg_m\n80.0,9,vgg\n81.0,9,vgg\n70,3,vgg\n10,3,other\n60,x,vgg\n")
    asked = Authors("cifar10", ("arg_K",), {"arg_m": "vgg"}, "theirs", {"x": "all"})
    (points,) = read(path, [asked])
    assert points.values == {3.0: [70.0], 9.0: [80.0, 81.0], "all": [60.0]}
    assert points.differences(9.0)[3.0] == [-10.5] and points.differences(4.0) == {}
    (both,) = read(path, [replace(asked, columns=("arg_K", "arg_m"), where={}, values={"3 other": "none"})])
    assert both.values == {"3 vgg": [70.0], "9 vgg": [80.0, 81.0], "none": [10.0], "x vgg": [60.0]}
    with pytest.raises(ValueError, match="no column arg_z"):
        read(path, [replace(asked, columns=("arg_K", "arg_z"))])
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "no.csv", [asked])
    path.write_text("final_test_top1,arg_K,arg_m\n<b>,9,vgg\n")
    with pytest.raises(ValueError, match="must be a number in every line"):
        read(path, [asked])


def test_a_wrong_table_of_authors_is_found_before_any_run(tmp_path, capsys):
    command = ["study", "run", "recipes/own_study.py", "--out", str(tmp_path), "--authors", str(tmp_path / "no.csv")]
    assert cli.main(command) == 2
    printed = capsys.readouterr()
    assert "does not exist" in printed.err and "runs have finished" not in printed.out


def test_the_command_runs_a_study_of_ones_own(tmp_path, capsys):
    study = tmp_path / "mine.py"
    study.write_text(
        "from nearfold.study.grid import Data, Study, Trial\n"
        "from nearfold.train import Recipe\n"
        "def study(preset):\n"
        "    recipe = Recipe(epochs=1, batch_size=20, warmup_epochs=0, device='cpu')\n"
        "    data = {'digits': Data('digits', limit=60), 'cifar10': Data('cifar10')}\n"
        "    network = {'name': 'plain', 'operation': 'window(3) | box | kernel'}\n"
        "    trials = [Trial({'data': d, 'width': float(w)}, network | {'width': w}, data[d], recipe)\n"
        "              for d in data for w in (4, 6)]\n"
        "    return Study('mine', preset.name, 'Mine', '?', '-', trials, 2, 'width', 4.0, cost=True)\n"
    )
    command = ["study", "run", str(study), "--out", str(tmp_path), "--jobs", "1"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "left out, since nobody said where it is: --data cifar10=FOLDER" in printed.err
    assert "[6/6] " in printed.out  # two measurements, four that train
    folder = tmp_path / "mine-cpu"
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert [(row["width"], row["seed"]) for row in rows] == [("4.0", "0"), ("4.0", "1"), ("6.0", "0"), ("6.0", "1")]
    record = json.loads((folder / "results.json").read_text())
    assert record["finished"] == record["planned"] == 4 and record["rows"][0]["recipe"]["epochs"] == 1
    assert {run["run"] for run in rows} == {path.stem for path in (tmp_path / "store" / "runs").glob("*")} - _costs(
        tmp_path
    )
    assert "Without cifar10" in (folder / "report.html").read_text()
    assert "| width = 6 |" in (folder / "summary.md").read_text()
    assert cli.main(command) == 0 and "6 of 6 runs have finished before, 0 to do" in capsys.readouterr().out


def _costs(root):
    paths = (root / "store" / "runs").glob("*")
    return {path.stem for path in paths if json.loads(path.read_text())["config"]["task"] == "cost"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "ratios"], "no study is called 'ratios'"),
        (["run", "ratio", "--data", "cifar10"], "--data must be NAME=FOLDER"),
        (["run", "ratio", "--data", "cfar10=x"], "its data sets are digits, cifar10; did you mean cifar10?"),
        (
            ["run", "ratio", "--data", "cifar10=x", "--data", "cifar10=y"],
            "--data cifar10 is given twice, as x and as y",
        ),
        (["run", "ratio", "--data", "cifar10=nowhere"], "nowhere does not exist"),
        (["run", "augmentation"], "where is the data set 'cifar10'"),
        (["budget"], "say a budget"),
        (["budget", "--latency-ms", "5", "--data", "cifar10=nowhere"], "nowhere does not exist"),
        (["budget", "--latency-ms", "5", "--preset", "paper"], "where is the data set"),
        (["budget", "--latency-ms", "0"], "wanted a number above 0, got '0'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert cli.main(["study", *arguments, "--out", str(tmp_path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "left out" not in line]
    assert len(errors) == 1 and message in errors[0]


def test_the_list_names_every_study(capsys):
    assert cli.main(["study", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("memorise", "budget", "k  "))
    assert find("k", "cpu").title in printed
