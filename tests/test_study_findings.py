"""What the spectrum study says of results that are made up so that the right sentence is known."""

from dataclasses import replace

import pytest
from helpers.studies import spectrum_of

from nearfold.study.document import count
from nearfold.study.files import summary
from nearfold.study.headline import limits, verdict
from nearfold.study.page import answer, printed
from nearfold.study.record import Record

CLEAR = {"conv": (0.90, 0.92, 0.94), "convnn": (0.905, 0.915, 0.935), "attention": (0.70, 0.72, 0.74)}


def printed_of(results):
    return printed(Record(results, ["A fact."], "nearfold study spectrum", {}))


def test_the_answer_says_what_was_found_against_convolution():
    text = answer(spectrum_of(CLEAR))[0]
    assert "digits: the held-out images choose convolution 3x3, which has 92.0 % (" in text
    assert "Worse than convolution 3x3: self-attention (−20.0 points, −" in text
    assert "no difference found between convolution 3x3 and ConvNN all" in text


def test_the_verdict_is_one_sentence_about_the_comparisons_with_convolution():
    said = verdict(spectrum_of(CLEAR))
    assert said.startswith(
        "“self-attention” is found worse than “convolution 3x3”, by 20.0 points, none better (less than about "
    )
    better = spectrum_of({"conv": (0.70, 0.71, 0.72), "attention": (0.90, 0.92, 0.94)})
    assert verdict(better) == "“self-attention” is found better than “convolution 3x3”, by 21.0 points."
    alike = spectrum_of({name: (0.9, 0.91, 0.92) for name in ("conv", "kvt", "acmix")})
    assert verdict(alike).startswith("None of 2 other operators is found better or worse than “convolution 3x3”")


def test_without_convolution_the_first_operator_is_what_the_others_are_compared_with():
    found = {"separable": (0.90, 0.92, 0.94), "attention": (0.70, 0.72, 0.74)}
    assert verdict(spectrum_of(found)) == (
        "“self-attention” is found worse than “depthwise + pointwise”, by 20.0 points."
    )


def test_an_operator_that_lacks_a_seed_is_compared_by_the_seeds_it_has():
    results = spectrum_of({"conv": (0.90, 0.92, 0.94), "attention": (0.70, 0.74)})
    conv, attention = results.rows
    lacks = replace(attention, results={0: attention.results[0], 2: attention.results[1]})
    assert "by 20.0 points" in verdict(replace(results, rows=[conv, lacks]))
    assert "by 20.0 points" not in verdict(results)  # seeds 0 and 1: the wrong pairs


def test_one_seed_allows_no_ranking():
    results = spectrum_of({"conv": (0.9,), "attention": (0.7,)})
    text = " ".join([*answer(results), printed_of(results)])
    assert verdict(results) == "With one seed no difference can be found."
    assert " to " not in printed_of(results).splitlines()[3] and "is found" not in text


def test_one_operator_alone():
    results = spectrum_of({"conv": (0.9, 0.8)})
    text = " ".join([*answer(results), printed_of(results)])
    assert "Nothing to compare it with." in text and "The gap" not in text


def test_the_way_between_the_ends_finds_an_inner_maximum_and_the_ends():
    def way(*means):
        names = ("blend-0", "blend-0.1", "blend-0.5")[-len(means) :]
        return answer(spectrum_of({name: (a, a + 0.01) for name, a in zip(names, means, strict=True)}))[1]

    text = way(0.5, 0.8, 0.6)
    assert text.startswith("digits: on the way from space to features") and "the ends differ by +10.0 points, +" in text
    assert "highest on the way, 80.5 % (" in text and "(blend λ = 0.1)" in text
    falling = way(0.8, 0.6)
    assert "−20.0 points" in falling and "highest at an end" in falling


def test_a_small_gap_from_a_low_ceiling_is_called_so():
    def gap(tests, train):
        found = answer(spectrum_of(tests, train))
        return next(text for text in found if text.startswith("digits: the gap"))

    tests = {"conv": (0.60, 0.61), "attention": (0.80, 0.81)}
    text = gap(tests, {"conv": (0.62, 0.63)})
    assert "smallest for convolution 3x3, 2.0 points (" in text and "largest for self-attention, 19.5 points (" in text
    assert "lower ceiling" in text
    assert "lower ceiling" not in gap(tests | {"conv": (0.9, 0.9)}, {})


def test_the_cost_names_the_ends():
    text = answer(spectrum_of(CLEAR))[-1]
    assert "fastest to train is self-attention (300 images/s), 3.0 times as fast as convolution 3x3" in text
    assert "range from 1.00M (convolution 3x3) to 3.00M (self-attention)" in text


def test_what_may_be_concluded_counts_test_images_and_what_cannot_be_seen():
    results = spectrum_of({"conv": (0.9, 0.9), "attention": (0.8, 0.8)})
    text = " ".join(limits(results, []))
    assert "One of the 400 test images of digits is 0.25 points" in text
    assert "by about 1.5 points" in text  # 100 * sqrt(.9 * .1 / 400)
    sure = " ".join(limits(spectrum_of({"conv": (1.0, 1.0)}, tested=16), []))
    assert "an accuracy of 100.0 % by about 6.7 points" in sure  # 16 right of 16 do not make it certain
    assert "cannot be seen" not in text
    text = " ".join(limits(spectrum_of(CLEAR), []))
    assert "“Not found” is not “equal”: with these seeds a difference of less than about " in text
    assert "test images of" not in " ".join(limits(replace(results, tested={}), []))


@pytest.mark.parametrize(("layer", "said"), [((0.70, 0.72, 0.74), "is found"), ((0.91, 0.91, 0.94), "is not found")])
def test_a_result_against_the_headline_layer_is_said_with_its_interval_and_its_limits(layer, said):
    text = limits(spectrum_of({"conv": CLEAR["conv"], "convnn": layer}), [])[0]
    assert f"{said} different from convolution 3x3 on digits: " in text and " to " in text
    assert "one small network" in text and "does not say how a layer does in a large network" in text


@pytest.mark.parametrize(("lead", "alone"), [(0.04, True), (0.03, False), (0.1, False)])
def test_an_interval_that_excludes_zero_is_not_counted_among_many_comparisons(lead, alone):
    """Alone, 0.04 would be found; Holm's correction says that among many such an interval is to be expected."""
    up, down = (0.50, 0.54) * 2, (0.54, 0.50) * 2
    others = {f"blend-{lam:g}": (down, up)[i % 2] for i, lam in enumerate((0, 0.05, 0.1, 0.25, 0.5, 1))}
    results = spectrum_of({"conv": up, **others, "convnn": tuple(a + lead for a in down)})
    text = limits(results, [])[0]
    assert ("(taken alone; among 7 comparisons such an interval is to be expected" in text) == alone
    assert ("is found different" in text) == (lead == 0.1)


def test_what_is_printed_has_intervals_and_what_differs():
    text = printed_of(spectrum_of(CLEAR))
    lines = text.splitlines()
    assert lines[0] == "digits" and lines[1].split()[0] == "setting" and "difference, points" in lines[1]
    assert lines[3].startswith("convolution 3x3  92.0 (") and lines[5].startswith("self-attention")
    assert "“self-attention” is found worse than “convolution 3x3”" in text and "A fact." in text
    assert max(map(len, lines)) < 130


def test_numbers_as_text():
    assert [count(v) for v in (7, 999, 1000, 45_678, 2_345_678, 3e9)] == [
        "7", "999", "1.00k", "45.7k", "2.35M", "3.00G"
    ]  # fmt: skip


def test_the_summary_has_a_cell_for_every_column():
    lines = [line for line in summary(spectrum_of(CLEAR)).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 and len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| digits | test acc. % |") and lines[1].startswith("| --- | ---: |")


def test_one_seed_beside_a_data_set_without_comparison_is_no_finding_either():
    results = spectrum_of({"conv": (0.9,), "attention": (0.7,)})
    (conv, attention) = results.rows

    def on(row, data):
        return replace(row, trial=replace(row.trial, labels=row.trial.labels | {"data": data}))

    both = replace(results, rows=[conv, attention, on(conv, "other")])
    said = verdict(replace(both, tested=both.tested | {"other": 100}))
    assert "no difference found" not in said and "digits: with one seed no difference can be found; other: " in said
