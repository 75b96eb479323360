"""Whatever a name, a label or a stored result holds, a page has the tags it always has, and it is drawn."""

import json
from dataclasses import replace

import pytest
from helpers.studies import COSTS, Tags, record, result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nearfold.study import page
from nearfold.study.catalogue import find
from nearfold.study.charts import CHARTS
from nearfold.study.document import markdown
from nearfold.study.files import leave, summary
from nearfold.study.store import Store

ATTACKS = (
    "\"><script>alert(1)</script>", "'><img src=x onerror=alert(2)>", "</title></style></svg><b>", "--><i>", "]]><u>",
    "{{ 7*7 }}{% raw %}", "$1_{x$", "\\$2^$", "\\frac{", "&lt;script&gt;", "a|b`c`",
    "λ 文字 \N{RIGHT-TO-LEFT OVERRIDE}", "\x00\x1b[31m", "caf\udce9", "line\nbreak", 'x" onload="alert(3)', "#2f6db3", "https://example.org/x.js",
)  # fmt: skip


def drawn(name, figure):
    return page.html(record(name, figure))


def without_optional(tags):
    """Tags whose number follows the names' width: which names find room in a figure, and in how many lines."""
    return {
        tag: n
        for tag, n in tags.found.items()
        if tag[0] not in ("g", "text", "tspan", "path", "use", "defs", "clippath", "rect")
    }


@pytest.mark.parametrize("figure", sorted(CHARTS))
def test_no_text_from_outside_makes_a_tag_or_loses_the_page(figure):
    tame = without_optional(Tags(drawn("name", figure)))
    wild = drawn("".join(ATTACKS), figure)
    found = Tags(wild)
    assert without_optional(found) == tame
    assert {tag for tag, _ in found.found} <= {tag for tag, _ in tame} | {
        "g",
        "text",
        "tspan",
        "path",
        "use",
        "defs",
        "clippath",
        "rect",
    }
    for sign in ("<script>alert", "<img", "<b>", "<i>", "<u>"):
        assert sign not in wild
    assert "{{ 7*7 }}" in wild and "$1_{x$" in wild.replace("&#39;", "'")  # as they are, neither filled in nor typeset
    wild.encode()


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(ATTACKS) | st.text(max_size=5), min_size=1, max_size=3).map("".join))
def test_any_name_draws(name):
    Tags(drawn(name, "settings"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_summary_in_markdown_has_the_cells_and_lines_it_always_has(attack):
    def shape(name):
        return [(line[:2], line.replace("\\|", "").count("|")) for line in summary(record(name).results).splitlines()]

    wild, tame = summary(record(attack).results), shape("name")
    found = shape(attack)
    assert [count for _, count in found] == [count for _, count in tame] and len(found) == len(tame)
    assert "<" not in wild and "\n" not in markdown(attack)


@pytest.mark.parametrize("label", ["cost $1_{x$", "cost \\$2^$", "$$", "$\\frac{1}$", "a_b^c"])
def test_a_dollar_is_a_dollar(label):
    """A label used to be read as mathematics by matplotlib, and a broken formula lost the page after all runs."""
    text = drawn(label, "settings")
    assert label.replace("&", "&amp;") in text.replace("&#39;", "'")


def test_a_page_that_cannot_be_drawn_loses_nothing_and_is_one_line(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no ink\nsecond line")

    monkeypatch.setattr(page, "draw", broken)
    with pytest.raises(ValueError, match=r"report\.html could not be made, and every result is kept: .*no ink$"):
        leave(record("name"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", "results.json", "summary.md"}


GOOD = {
    **{k: v for k, v in result(0.5).items() if k != "run"},
    "steps": 3,
    "images_per_second": 1.0,
    "train_loss": 0.1,
}
BAD = [
    {"best_epoch": "<img src=x onerror=alert(2)>"}, {"test_accuracy": 1.5}, {"test_accuracy": -0.1},
    {"val_accuracy": True}, {"seconds": float("nan")}, {"seconds": float("inf")}, {"epochs": 2.5}, {"epochs": None},
    {"train_accuracy": []}, {"seconds": 10**400}, {"train_loss": "0.1"}, {"steps": -1},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD, ids=str)
def test_a_stored_result_of_a_wrong_type_or_size_is_one_line_that_names_the_file(tmp_path, change):
    store, config = Store(tmp_path), {"task": "train"}
    store.save(config, GOOD)
    assert store.load(config) == GOOD
    path = store.result_path(config)
    path.write_text(json.dumps({"config": config, "result": GOOD | change}))
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be .* delete it") as error:
        store.load(config)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"result": {k: v for k, v in GOOD.items() if k != "epochs"}}), "epochs is missing"),
        ('{"result": [1]}', "must be an object"),
        ("[" * 100_000, "delete it"),
        ('{"result": {"epochs": ' + "9" * 5000 + "}}", "delete it"),
    ],
)
def test_a_stored_file_that_is_none_is_one_line(tmp_path, content, message):
    store = Store(tmp_path)
    path = store.result_path({"task": "train"})
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        store.load({"task": "train"})


def test_a_stored_error_is_one_line_without_the_terminal_s_commands(tmp_path):
    store = Store(tmp_path)
    store.save_failure({}, "Error: \x1b]0;title\x07 \x1b[31mred\nsecond", "")
    assert store.failure({}) == "Error: ]0;title [31mred second"


def test_a_cost_has_the_fields_of_a_cost_and_no_other(tmp_path):
    store, config = Store(tmp_path), {"task": "cost"}
    store.save(config, COSTS)
    with pytest.raises(ValueError, match="flops must be a whole number"):
        store.load(config)
    store.save(config, COSTS | {"flops": 100, "order": 3})
    with pytest.raises(ValueError, match="no run leaves 'order'"):
        store.load(config)
    store.save(config, COSTS | {"flops": 100})
    assert store.load(config)["flops"] == 100


def test_intervals_end_where_shares_end_and_one_seed_has_none():
    r = record("name").results
    best = replace(r.rows[2], results={s: result(t) for s, t in enumerate((1.0, 0.9))}, beside=r.rows[:2])
    e = best.estimate("test_accuracy")
    assert e.high == 1.0 and e.low < 0.95 and e.arms[0] > e.arms[1]
    one = replace(best, results={0: result(0.9)}).estimate("test_accuracy")
    assert one.low != one.low and one.mean == 0.9
    assert find("k", "cpu").verdict is None
