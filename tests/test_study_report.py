import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from nearfold.study.looks import Look, interesting_position
from nearfold.study.report import Report, html
from nearfold.study.table import Row


def row(i, family, title, seeds=3):
    test = tuple(0.9 - 0.01 * i + 0.002 * s for s in range(seeds))
    return Row(f"op{i}", title, "all | row | softmax(heads=4)", family, i, test, tuple(1.0 for _ in test),
               30_000, 3_000_000 + i, 1.5, 5000.0 + i, 12.0)  # fmt: skip


@pytest.fixture(scope="module")
def report():
    rows = [row(1, "space", "conv <3x3>"), row(2, "between", "blend"), row(3, "features", "attention")]
    weights = torch.zeros(8, 8)
    weights[2:5, 2:5] = 1 / 9
    return Report(
        data="digits",
        facts=["Some facts & figures."],
        rows=rows,
        n_test=360,
        planned=9,
        finished=9,
        image=(torch.arange(64).reshape(1, 8, 8) * 4).to(torch.uint8),
        image_label="class 4",
        looks={r.name: Look(r.title, weights, (3, 3)) for r in rows},
        command="nearfold study spectrum",
        settings={"lr": 0.003},
        environment={"PyTorch": "2"},
    )


@pytest.fixture(scope="module")
def page(report):
    return html(report)


class Strict(HTMLParser):
    """Collects text and the addresses the page would load; insists that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.loads = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_startendtag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and "script" not in self.open:
            self.text.append(data)


def read(page):
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_well_formed_and_loads_nothing(page):
    parser = read(page)
    assert parser.loads and all(address.startswith(("#", "data:")) for address in parser.loads)
    assert page.count("<script>") == 1 and "@import" not in page and "url(http" not in page
    assert "<metadata" not in page


def test_every_section_and_operator_is_there(page):
    text = " ".join(read(page).text)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "What may be concluded", "What was asked", "The answer in full", "The numbers", "Along the spectrum",
        "Accuracy against cost", "Where each operator looks", "The recipe", "To reproduce",
    ]  # fmt: skip
    for part in ("conv <3x3>", "Some facts & figures.", "all | row | softmax(heads=4)", "89.2 ± 0.2", "0.003",
                 "class 4", "nearfold study spectrum"):  # fmt: skip
        assert part in text
    assert page.count("<svg") == 3


def test_failed_and_missing_runs_are_told(report):
    broken = replace(report, failures=[("ACmix, seed 1", "RuntimeError: <no> memory")], finished=8)
    text = " ".join(read(html(broken)).text)
    assert "Runs that failed" in text and "RuntimeError: <no> memory" in text
    assert "8 of 9 runs have finished" in text


def test_an_operator_without_a_picture_is_told(report):
    partial = replace(report, looks={"op1": report.looks["op1"]}, missing_looks=[("blend", "no weights")])
    assert "blend: no weights" in " ".join(read(html(partial)).text)
    none = html(replace(report, looks={}))
    assert "Where each operator looks" not in none and none.count("<svg") == 2


def test_one_operator_one_seed_draws(report):
    single = replace(report, rows=[row(1, "space", "conv", seeds=1)])
    assert read(html(single)).text


def test_colour_images_and_coarser_grids_draw(report):
    look = Look("x", torch.full((4, 4), 1 / 16), (1, 1))
    image = torch.arange(192).reshape(3, 8, 8).to(torch.uint8)
    coarse = replace(report, rows=report.rows[:1], looks={"op1": look}, image=image)
    assert html(coarse).count("<image") >= 2


def test_effective_positions_and_reach():
    one = torch.zeros(5, 5)
    one[2, 4] = 1
    look = Look("point", one, (2, 1))
    assert look.positions == pytest.approx(1)
    assert look.reach == pytest.approx(3)
    assert Look("all", torch.full((4, 4), 1 / 16), (0, 0)).positions == pytest.approx(16)


def test_interesting_position_is_inside_and_where_the_image_changes():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 20:22, 10:12] = 255
    assert interesting_position(image, (16, 16)) == (10, 5)
    row, column = interesting_position(torch.zeros(1, 8, 8, dtype=torch.uint8), (8, 8))
    assert 2 <= row < 6 and 2 <= column < 6
