import math

import pytest
import torch
from scipy import stats

from nearfold.study.statistics import between, estimate, holm, paired, pareto, within


def test_intervals_are_students():
    values = [0.3, 0.5, 0.4, 0.9]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=found.mean, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert found.n == 4 and found.half == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_cover_as_often_as_they_say(n):
    draws = torch.randn(4000, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 7
    covered = sum(e.low <= 7 <= e.high for e in (estimate(row.tolist()) for row in draws))
    assert covered / len(draws) == pytest.approx(0.95, abs=0.012)  # three standard errors


def test_differences_are_paired_by_seed_and_use_common_ones_only():
    a, b = {0: 0.9, 1: 0.6, 2: 0.8, 5: 0.1}, {2: 0.75, 0: 0.8, 1: 0.55, 7: 0.9}
    found = paired(a, b)
    expected = stats.ttest_rel([0.9, 0.6, 0.8], [0.8, 0.55, 0.75])
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    with pytest.raises(ValueError, match="no seed in common"):
        paired({0: 1.0}, {1: 1.0})


def test_two_settings_are_compared_as_a_paired_t_test_does():
    a, b = {0: 0.9, 1: 0.6, 2: 0.8, 3: 0.1}, {2: 0.75, 0: 0.8, 1: 0.55, 3: 0.2}
    assert paired(a, b, between([a, b])) == paired(a, b)


def test_many_settings_share_their_spread_and_differences_cover_as_often_as_they_say():
    g = torch.Generator().manual_seed(3)
    covered, halves, alone = 0, 0.0, 0.0
    for _ in range(1500):
        effect, seed = torch.randn(8, 1, generator=g), torch.randn(1, 3, generator=g)
        table = (effect + 5 * seed + torch.randn(8, 3, generator=g)).double()
        settings = [dict(enumerate(row)) for row in table.tolist()]
        found = paired(settings[0], settings[1], between(settings))
        covered += found.low <= (effect[0] - effect[1]).item() <= found.high
        halves, alone = halves + found.half, alone + paired(settings[0], settings[1]).half
    assert covered / 1500 == pytest.approx(0.95, abs=0.018)  # three standard errors
    assert halves < 0.6 * alone  # t(14) instead of t(2)


def test_spreads_use_what_is_there():
    assert between([]) is None and between([{0: 1.0, 1: 2.0}]) is None and between([{0: 1.0}, {0: 2.0}]) is None
    uneven = [{0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.0, 1: 3.0}]
    assert between(uneven) == between([{0: 1.0, 1: 2.0}, {0: 0.0, 1: 3.0}])
    assert between([*uneven, {0: 5.0}, {}]) == between(uneven) and between([uneven[0], {0: 5.0}]) is None
    assert within([{0: 1.0}, {}]) is None
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = within([dict(enumerate(row)) for row in values.tolist()])
    assert found.freedom == 15 and found.deviation == pytest.approx(values.var(1).mean().sqrt().item())


def test_one_value_has_no_interval_and_equal_values_have_none_but_their_own():
    alone = estimate([0.4])
    assert alone.mean == 0.4 and all(map(math.isnan, (alone.low, alone.high, alone.p)))
    assert estimate([0.0, 0.0, 0.0]).p == 1 and estimate([0.1, 0.1, 0.1]).p < 1e-10


def test_holm_keeps_the_error_of_the_whole_family():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    adjusted = holm([math.nan, 0.02])
    assert math.isnan(adjusted[0]) and adjusted[1] == 0.02  # what cannot be tested is no comparison
    g = torch.Generator().manual_seed(1)
    ps = torch.rand(3000, 6, generator=g, dtype=torch.float64)  # nothing there to be found
    assert sum(min(holm(row.tolist())) < 0.05 for row in ps) / 3000 == pytest.approx(0.05, abs=0.012)


def test_pareto_keeps_what_no_other_point_beats():
    g = torch.Generator().manual_seed(2)
    points = [tuple(p) for p in torch.randint(0, 8, (40, 2), generator=g).tolist()]

    def beaten(p):
        return any((c <= p[0] and v > p[1]) or (c < p[0] and v >= p[1]) for c, v in points)

    found = {points[i] for i in pareto(points)}
    assert found == {p for p in points if not beaten(p)}
    assert pareto([]) == []
