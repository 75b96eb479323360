import pytest

from nearfold.study.findings import answer, chance_of_separation, separated
from nearfold.study.table import COLUMNS, Row, cells, count, markdown_table, percent, spread


def row(name, test, *, train=None, family="space", flops=1_000_000, speed=1000.0, order=1):
    train = train or tuple(1.0 for _ in test)
    return Row(name, name, "window(3) | box | kernel", family, order, tuple(test), tuple(train),
               27_900, flops, 1.5, speed, 11.0)  # fmt: skip


def test_the_best_is_named_with_its_numbers_and_overlap_is_not_called_a_difference():
    rows = [row("conv", (0.90, 0.92, 0.94)), row("knn", (0.91, 0.90, 0.93)), row("attn", (0.70, 0.71, 0.72))]
    text = answer(rows, 1000)[0]
    assert text.startswith("Conv has the highest mean test accuracy, 92.0 ± 2.0 % over 3 seeds")
    assert "attn has the lowest, 71.0 ± 1.0 %" in text
    assert "Every seed of conv is above every seed of attn" in text
    assert "Against knn the seeds overlap" in text


def test_the_answer_follows_the_numbers():
    rows = [row("conv", (0.70, 0.71, 0.72)), row("attn", (0.90, 0.92, 0.94))]
    assert answer(rows, 1000)[0].startswith("Attn has the highest mean test accuracy, 92.0 ± 2.0 %")


def test_one_seed_allows_no_ranking():
    text = " ".join(answer([row("conv", (0.9,)), row("attn", (0.7,))], 1000))
    assert "With one seed there is no spread" in text
    assert "Every seed" not in text and "±" not in text and "overlap" not in text


def test_one_operator_alone():
    text = " ".join(answer([row("conv", (0.9, 0.8))], 1000))
    assert "the only operator" in text


def test_blend_sentence_finds_an_inner_maximum_and_the_ends():
    blend = [row(f"b{i}", (a, a + 0.01), family="between") for i, a in enumerate((0.5, 0.8, 0.6))]
    text = answer(blend, 1000)[1]
    assert "+10.0 points" in text and "highest on the way, 80.5 ± 0.7 % (b1)" in text
    assert "do not overlap" in text
    falling = answer(blend[1:], 1000)[1]
    assert "−20.0 points" in falling and "highest at an end" in falling


def test_a_small_gap_from_a_low_ceiling_is_called_so():
    low = row("low", (0.60, 0.61), train=(0.62, 0.63))
    high = row("high", (0.80, 0.81), train=(1.0, 1.0))
    text = next(part for part in answer([low, high], 1000) if part.startswith("The gap"))
    assert "smallest for low (2.0 ± 0.0 points" in text and "largest for high (19.5 ± 0.7 points" in text
    assert "lower ceiling" in text
    even = next(part for part in answer([row("a", (0.9, 0.9)), high], 1000) if part.startswith("The gap"))
    assert "lower ceiling" not in even


def test_caution_counts_test_images():
    text = answer([row("conv", (0.9, 0.9)), row("attn", (0.8, 0.8))], 400)[-1]
    assert "one of the 400 test images is 0.25 points" in text
    assert "by about 1.5 points" in text  # 100 * sqrt(.9 * .1 / 400)


def test_separation_asks_for_all_seeds():
    assert separated(row("a", (0.9, 0.8)), row("b", (0.7, 0.79)))
    assert not separated(row("a", (0.9, 0.8)), row("b", (0.7, 0.8)))
    assert chance_of_separation(3, 3) == pytest.approx(2 / 20)


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
