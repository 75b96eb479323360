"""results.json is enough: pages are drawn again from it, and `study budget` answers from the one that comes along."""

import itertools
import json
import re
from pathlib import Path

import pytest

from nearfold import cli
from nearfold.study import record
from nearfold.study.catalogue import STUDIES, find
from nearfold.study.files import summary
from nearfold.study.headline import verdict

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "docs/studies").glob("*/results.json"))


def study_of(folder):
    return find(folder.name if folder.name in STUDIES else "recipes/gwo_table.py", "cpu")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_pages_say_what_their_results_come_to(folder, monkeypatch):
    """After a change to what a study says: nearfold study page docs/studies/NAME."""
    monkeypatch.chdir(ROOT)
    found = record.read(folder / "results.json", study_of(folder))
    said = verdict(found.results)
    assert summary(found.results) == (folder / "summary.md").read_text()
    page = (folder / "report.html").read_text()
    assert f"<strong>{said}</strong>" in page and all(f"<li>{fact}</li>" in page for fact in found.facts)
    assert json.loads((folder / "results.json").read_text())["verdict"] == said
    assert said.endswith(".") and len(said) < 350


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_verdict_and_its_figure_come_first(folder):
    page = (folder / "report.html").read_text()
    body = page[page.index("<main>") :]
    parts = (
        'class="verdict"', 'class="forest"', "What may be concluded", "What was asked", "The answer in full",
        "The numbers", "Every run", "To reproduce",
    )  # fmt: skip
    order = [body.index(text) for text in parts]
    assert order == sorted(order)
    assert '<html lang="en">' in page and 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert body.count("<table") == body.count("<caption>") and "<th>" not in body
    levels = [int(level) for level in re.findall(r"<h(\d)>", body)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels)) and levels.count(1) == 1
    for end in re.findall(r"(?:left|right):(-?[\d.]+)%", body):
        assert 0 <= float(end) <= 100
    colours = set(re.findall(r"(?<!, )#[0-9a-f]{6}", body[: body.index("</main>")]))
    assert colours <= {"#ffffff"}, "a colour that a dark screen does not change"


def test_the_results_that_come_along_are_those_of_the_docs():
    ours = ROOT / "src/nearfold/study/catalogue/budget.json"
    assert ours.read_bytes() == (ROOT / "docs/studies/budget/results.json").read_bytes()


def test_a_budget_is_answered_without_a_run_and_it_is_said_from_what(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", "budget", "--latency-ms", "2"]) == 0
    out = capsys.readouterr().out
    assert "From the 60 runs that come with nearfold" in out and "Costs were measured elsewhere: nearfold 0.1.0" in out
    assert "\ndigits: convolution, 98.7 % (97.9 to 99.5)" in out and "\ncifar10: convolution, 42.1 %" in out
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_drawn_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    ours = (ROOT / "docs/studies/aggregation/results.json").read_text()
    old = json.dumps(json.loads(ours) | {"verdict": "what was said once", "answer": []}, indent=1)
    (tmp_path / "results.json").write_text(old)
    assert cli.main(["study", "page", str(tmp_path)]) == 0
    files = ("results.json", "summary.md", "report.html")
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in files]
    assert (tmp_path / "results.json").read_text() == ours
    assert (tmp_path / "summary.md").read_text() == (ROOT / "docs/studies/aggregation/summary.md").read_text()
    assert "the authors" in (tmp_path / "report.html").read_text()


def test_results_never_run_the_file_they_name(tmp_path, capsys):
    content = json.loads((ROOT / "docs/studies/k/results.json").read_text())
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "results.json").write_text(json.dumps(content | {"study": str(evil)}))
    assert cli.main(["study", "page", str(tmp_path)]) == 2
    assert "none of nearfold's studies: say its file, --study" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def _change(content, *path, value):
    *outer, last = path
    for part in outer:
        content = content[part]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows", 0, "runs", "0", "test_accuracy"), "<b>", "test_accuracy must be a number of at least 0"),
        (("rows", 0, "runs", "0", "best_epoch"), "<img src=x>", "best_epoch must be a whole number"),
        (("rows", 0, "runs", "0"), [], "must have best_epoch"),
        (("rows", 0, "runs"), {"<b>": {}}, "must go by their seeds"),
        (("rows", 0, "runs"), {}, "has no run"),
        (("rows", 0, "labels"), {"k": []}, "must be a number or a text"),
        (("rows", 0, "labels"), {"q": 1}, "no label 'k'"),
        (("rows", 0, "cost"), {"latency_ms": "x"}, "parameters is missing"),
        (("rows", 0, "recipe", "epochs"), "many", "epochs"),
        (("rows",), [], "rows is empty"),
        (("rows",), 3, "rows must be of the type list"),
        (("environment",), [], "environment must be of the type dict"),
        (("planned",), True, "planned must be of the type int"),
        (("facts",), "text", "a list of texts"),
        (("seeds",), "<b>", "seeds"),
        (("reference",), [], "reference must be a number or a text"),
        (("tested",), {"digits": 0}, "tested must be a whole number of at least 1"),
        (("tested",), [], "tested must be a whole number of at least 1"),
        (("looks",), {"image": [["300"]]}, "an image must be rows of numbers from 0 to 255"),
        (("looks",), {}, "no field 'image'"),
        (("looks",), [], "looks must be of the type dict"),
        (("authors",), [{"data": 1}], "values"),
        (("study",), None, "does not say its study"),
        (("preset",), "huge", "preset must be one of"),
    ],
    ids=str,
)
def test_results_of_a_wrong_type_are_one_line_that_names_the_file(tmp_path, path, value, message, capsys):
    content = json.loads((ROOT / "docs/studies/k/results.json").read_text())
    _change(content, *path, value=value)
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert cli.main(["study", "page", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and (str(tmp_path) in line or path == ("preset",))
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["", "[" * 100_000, "{}", "[1]", "\0"])
def test_what_is_no_results_is_one_line(tmp_path, content, capsys):
    (tmp_path / "results.json").write_text(content)
    assert cli.main(["study", "page", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert cli.main(["study", "page", str(tmp_path / "none")]) == 2
    assert "does not exist: name the folder" in capsys.readouterr().err
