"""The panel of where each setting looks: what is seen, how it is stored and read again, how it is drawn."""

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers.studies import Tags, record, spectrum_of

from nearfold.study import page
from nearfold.study.looks import Look, Looks, interesting_position
from nearfold.study.record import Record


@pytest.fixture(scope="module")
def seen():
    weights = torch.zeros(8, 8)
    weights[2:5, 2:5] = 1 / 9
    image = (torch.arange(64).reshape(1, 8, 8) * 4).to(torch.uint8)
    return Looks(image, "class 4 of digits", [Look(f"{name}0", weights, (3, 3)) for name in ("a", "b")])


def drawn(seen):
    text = page.html(replace(record("name", "spectrum"), looks=seen))
    Tags(text)
    return text


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


def test_the_panel_is_one_figure_more_and_says_what_is_on_it(seen):
    without, text = drawn(None), drawn(seen)
    assert text.count("<svg") == without.count("<svg") + 1 and "class 4 of digits" in text
    assert "Where each operator looks" not in without and "9.0 positions" in text


def test_marks_points_and_titles_have_the_colour_of_their_family():
    results = spectrum_of({"conv": (0.5, 0.6), "blend-0.5": (0.5, 0.7), "kvt": (0.4, 0.6), "acmix": (0.5, 0.5)})
    looks = [Look(row.title, torch.full((4, 4), 1 / 16), (1, 1)) for row in results.rows]
    seen = Looks(torch.zeros(1, 8, 8, dtype=torch.uint8), "a 4", looks)
    text = page.html(Record(results, [], "nearfold study spectrum", {}, looks=seen))
    for title, colour in (("blend λ = 0.5", "purple"), ("KVT k = 9", "orange"), ("ACmix", "green")):
        assert f'<tr class="{colour}"><th scope="row">{title}' in text
        assert f'<span class="dot {colour}"></span>{title}' in text
        (heading,) = re.findall(rf"<text style=\"font-weight: 700[^>]*>{title}</text>", text)
        assert f"var(--{colour}," in heading
    assert "Blue looks in space, purple between the ends, orange looks in features, green both at once." in text


def test_a_setting_without_a_picture_is_told(seen):
    text = drawn(replace(seen, found=seen.found[:1], missing=[("b0", "there are <no> weights")]))
    assert "<li>b0: there are &lt;no&gt; weights</li>" in text
    none = drawn(replace(seen, found=[], missing=[("b0", "gone")]))
    assert "<li>b0: gone</li>" in none and none.count("<svg") == drawn(None).count("<svg")


def test_colour_images_and_coarser_grids_draw(seen):
    look = Look("x", torch.full((4, 4), 1 / 16), (1, 1))
    image = torch.arange(192).reshape(3, 8, 8).to(torch.uint8)
    assert drawn(replace(seen, image=image, found=[look])).count("<image") >= 2


def test_looks_are_read_as_they_were_written(seen):
    torch.manual_seed(0)
    found = [*seen.found, Look("c", torch.rand(3, 5).pow(8), (2, 4))]
    found[-1] = replace(found[-1], weights=found[-1].weights / found[-1].weights.sum())
    image = torch.randint(0, 256, (3, 6, 4), dtype=torch.uint8)
    ours = replace(seen, image=image, found=found, missing=[("d", "gone")])
    again = Looks.from_json(json.loads(json.dumps(ours.to_json())))
    assert torch.equal(again.image, ours.image) and again.image.dtype == torch.uint8
    assert (again.label, [*map(tuple, again.missing)]) == (ours.label, [("d", "gone")])
    for one, other in zip(again.found, found, strict=True):
        assert (one.title, one.at) == (other.title, other.at)
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-2, atol=1e-5)  # three digits are kept
        assert one.positions == pytest.approx(other.positions, rel=1e-2)
    content = seen.to_json()
    content["found"][0] |= {"weights": ["1 0.5", "0.5 0"], "at": [0, 1]}
    assert Looks.from_json(content).found[0].weights.tolist() == [[0.5, 0.25], [0.25, 0.0]]  # they sum to 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": [["0 1", "2"]]}, "an image must be rows of numbers from 0 to 255"),
        ({"image": [["0 256"]]}, "an image must be rows of numbers from 0 to 255"),
        ({"image": [["0 nan"]]}, "an image must be rows of numbers from 0 to 255"),
        ({"image": [[]]}, "an image must be rows"),
        ({"image": []}, "channels of one size"),
        ({"image": [["0"], ["0 1"]]}, "channels of one size"),
        ({"weights": ["0 -1"]}, "weights must be rows of numbers from 0 to 1"),
        ({"weights": [""]}, "weights must be rows"),
        ({"weights": ["0 0"]}, "must not all be 0"),
        ({"weights": ["1 1"]}, r"read at a position of theirs, got \[3, 3\]"),
        ({"at": ["<b>", 0]}, "read at a position of theirs"),
    ],
    ids=str,
)
def test_looks_from_a_stranger_are_checked(seen, change, message):
    content = seen.to_json()
    (content if "image" in change else content["found"][0]).update(change)
    with pytest.raises(ValueError, match=message):
        Looks.from_json(content)
