"""Summaries and intervals against scipy, the standard library and known coverage."""

import math
import statistics as standard

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from chimera_cli.statistics import bootstrap_interval, summarise, summarise_known, t_quantile_95

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)


@pytest.mark.parametrize("degrees", [*range(1, 61), 100, 1000, 100_000])
def test_quantiles_of_student_are_scipys(degrees: int) -> None:
    assert t_quantile_95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-5)


def test_no_degrees_of_freedom_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        t_quantile_95(0)


@given(NUMBERS)
def test_summaries_are_the_standard_librarys(values: list[float]) -> None:
    summary = summarise(values)
    scale = max(1.0, *(abs(value) for value in values))
    assert summary.n == len(values)
    assert summary.values == tuple(values)
    assert summary.mean == pytest.approx(standard.fmean(values), abs=1e-12 * scale)
    assert summary.std == pytest.approx(standard.stdev(values), abs=1e-9 * scale)


def test_the_interval_is_scipys() -> None:
    values = [0.304, 0.311, 0.298]
    summary = summarise(values)
    ends = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (summary.low, summary.high) == pytest.approx(ends, rel=1e-5)


def test_one_value_has_no_spread_and_none_no_summary() -> None:
    one = summarise([0.3])
    assert (one.n, one.mean, one.std, one.low, one.high) == (1, 0.3, None, None, None)
    with pytest.raises(ValueError, match="nothing"):
        summarise([])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        summarise([0.1, bad])


def test_a_missing_value_makes_the_summary_missing() -> None:
    assert summarise_known([0.1, None, 0.3]) is None
    assert summarise_known([]) is None
    known = summarise_known([0.1, 0.3])
    assert known is not None
    assert known.as_dict()["values"] == [0.1, 0.3]


def test_the_bootstrap_is_the_percentile_method_and_repeatable() -> None:
    data = np.random.default_rng(3).normal(size=80)
    ends = bootstrap_interval(lambda drawn: float(data[drawn].mean()), 80, resamples=4000)
    assert ends == bootstrap_interval(lambda drawn: float(data[drawn].mean()), 80, resamples=4000)
    reference = stats.bootstrap((data,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert ends == pytest.approx((reference.low, reference.high), abs=0.02)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        data = generator.normal(loc=1.0, size=60)
        low, high = bootstrap_interval(lambda drawn, data=data: float(data[drawn].mean()), 60, resamples=200)
        covered += low <= 1.0 <= high
    # Binomial(100, 0.95): fewer than 88 or the full 100 would be a rare accident (p < 0.01).
    assert 88 <= covered < 100
