from dataclasses import replace

import pytest

from nearfold.study.findings import answer, conclusions, verdict
from nearfold.study.table import COLUMNS, Row, cells, count, markdown_table, percent, spread


def row(name, test, *, train=None, family="space", flops=1_000_000, speed=1000.0, order=1):
    train = train or tuple(1.0 for _ in test)
    return Row(name, name, "window(3) | box | kernel", family, order, tuple(test), tuple(train),
               27_900, flops, 1.5, speed, 11.0)  # fmt: skip


CLEAR = [
    row("conv", (0.90, 0.92, 0.94)),
    row("knn", (0.905, 0.915, 0.935)),
    row("attn", (0.70, 0.72, 0.74)),
]


def test_the_best_is_named_with_its_numbers_and_what_was_found_against_convolution():
    text = answer(CLEAR)[0]
    assert text.startswith("Conv has the highest mean test accuracy, 92.0 ± 2.0 % over 3 seeds")
    assert "attn has the lowest, 72.0 ± 2.0 %" in text
    assert "Worse than conv: attn (−20.0 points, −" in text and "no difference found between conv and knn" in text


def test_the_verdict_is_one_sentence_about_the_comparisons_with_convolution():
    assert verdict(CLEAR).startswith("“attn” is found worse than “conv”, by 20.0 points, none better (less than about ")
    better = [row("conv", (0.70, 0.71, 0.72)), row("attn", (0.90, 0.92, 0.94))]
    assert verdict(better) == "“attn” is found better than “conv”, by 21.0 points."
    assert verdict([CLEAR[0]]) == "Conv has 92.0 ± 2.0 % test accuracy; nothing else was run."


def test_an_operator_that_lacks_a_seed_is_compared_by_the_seeds_it_has():
    lacks = replace(row("attn", (0.70, 0.74)), seeds=(0, 2))
    by_place = [row("conv", (0.90, 0.92, 0.94)), row("attn", (0.70, 0.74))]
    assert "by 20.0 points" in verdict([CLEAR[0], lacks])
    assert "by 20.0 points" not in verdict(by_place)  # seeds 0 and 1: the wrong pairs


def test_one_seed_allows_no_ranking():
    one = [row("conv", (0.9,)), row("attn", (0.7,))]
    text = " ".join([verdict(one), *answer(one), *conclusions(one, 1000)])
    assert verdict(one) == "With one seed no difference can be found."
    assert "±" not in text and "is found" not in text


def test_one_operator_alone():
    text = " ".join(answer([row("conv", (0.9, 0.8))]))
    assert "the only operator" in text


def test_blend_sentence_finds_an_inner_maximum_and_the_ends():
    blend = [row(f"b{i}", (a, a + 0.01), family="between") for i, a in enumerate((0.5, 0.8, 0.6))]
    text = answer(blend)[1]
    assert "the ends differ by +10.0 points, +" in text and "highest on the way, 80.5 ± 0.7 % (b1)" in text
    falling = answer(blend[1:])[1]
    assert "−20.0 points" in falling and "highest at an end" in falling


def test_a_small_gap_from_a_low_ceiling_is_called_so():
    low = row("low", (0.60, 0.61), train=(0.62, 0.63))
    high = row("high", (0.80, 0.81), train=(1.0, 1.0))
    text = next(part for part in answer([low, high]) if part.startswith("The gap"))
    assert "smallest for low (2.0 ± 0.0 points" in text and "largest for high (19.5 ± 0.7 points" in text
    assert "lower ceiling" in text
    even = next(part for part in answer([row("a", (0.9, 0.9)), high]) if part.startswith("The gap"))
    assert "lower ceiling" not in even


def test_what_may_be_concluded_counts_test_images_and_what_cannot_be_seen():
    (text,) = conclusions([row("conv", (0.9, 0.9)), row("attn", (0.8, 0.8))], 400)
    assert "One of the 400 test images is 0.25 points" in text
    assert "by about 1.5 points" in text  # 100 * sqrt(.9 * .1 / 400)
    (text,) = conclusions(CLEAR, 400)
    assert text.startswith("“Not found” is not “equal”: with 3 seeds a difference of less than about ")


@pytest.mark.parametrize(("layer", "said"), [((0.70, 0.72, 0.74), "is found"), ((0.91, 0.91, 0.94), "is not found")])
def test_a_result_against_the_headline_layer_is_said_with_its_interval_and_its_limits(layer, said):
    text = conclusions([CLEAR[0], row("convnn", layer)], 400)[0]
    assert f"{said} different from conv here: " in text and " to " in text
    assert "one small network" in text and "does not say how a layer does in a large network" in text


def test_numbers_as_text():
    assert spread((0.5,)) is None
    assert percent((0.5,)) == "50.0"
    assert percent((0.90, 0.92)) == "91.0 ± 1.4"
    assert [count(v) for v in (7, 999, 1000, 45_678, 2_345_678, 3e9)] == [
        "7", "999", "1.00k", "45.7k", "2.35M", "3.00G"
    ]  # fmt: skip


def test_markdown_table_has_a_cell_for_every_column_and_escapes_bars():
    text = markdown_table([row("conv", (0.9, 0.8))])
    header, rule, line = text.splitlines()
    assert header.count("|") == rule.count("|") == len(COLUMNS) + 2
    assert "`window(3) \\| box \\| kernel`" in line
    assert len(cells(row("conv", (0.9, 0.8)))) == len(COLUMNS)
