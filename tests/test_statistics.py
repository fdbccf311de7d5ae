"""Summaries and intervals against scipy, the standard library and known coverage."""

import math
import statistics as standard

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from chimera_cli.statistics import (
    bootstrap_interval,
    change_of,
    minimum_detectable_effect,
    paired_bootstrap,
    summarise,
    summarise_known,
    t_quantile_95,
)

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


# ---- two runs on the same units -------------------------------------------------------------------------------------


def _two_runs(units: int, figures: int = 1) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Two runs of one seed whose units are hard for both: sums of each unit, and unequal weights."""
    generator = np.random.default_rng(2)
    sizes = generator.integers(1, 4, size=(figures, units)).astype(float)
    ease = generator.uniform(size=(figures, units))
    a = sizes * np.clip(ease + 0.1 * generator.normal(size=ease.shape), 0, 1)
    b = sizes * np.clip(ease + 0.03 + 0.1 * generator.normal(size=ease.shape), 0, 1)
    return a[None], b[None], sizes


def test_paired_intervals_are_scipys() -> None:
    a, b, sizes = _two_runs(150)
    first, second = paired_bootstrap(a, b, sizes, resamples=10_000, seed=0)
    ours = change_of(a.sum() / sizes.sum(), b.sum() / sizes.sum(), first[:, 0], second[:, 0])

    def absolute(x: NDArray, y: NDArray, w: NDArray, axis: int) -> NDArray:
        return (y.sum(axis) - x.sum(axis)) / w.sum(axis)

    def relative(x: NDArray, y: NDArray, w: NDArray, axis: int) -> NDArray:
        return (y.sum(axis) - x.sum(axis)) / x.sum(axis)

    data = (a[0, 0], b[0, 0], sizes[0])
    for statistic, ends in ((absolute, ours.absolute_interval), (relative, ours.relative_interval)):
        reference = stats.bootstrap(
            data, statistic, paired=True, vectorized=True, n_resamples=10_000, method="percentile", rng=1
        )
        width = reference.confidence_interval.high - reference.confidence_interval.low
        assert ends == pytest.approx(tuple(reference.confidence_interval), abs=0.04 * width)
        if statistic is absolute:
            assert ours.standard_error == pytest.approx(reference.standard_error, rel=0.04)
    # Unpaired, the same runs would be three times as uncertain: what is hard for one is hard for the other.
    assert ours.standard_error < 0.5 * np.hypot(first.std(), second.std())


def test_resamples_are_those_of_a_plain_loop_and_do_not_depend_on_the_memory_at_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b, sizes = _two_runs(12, figures=2)
    first, second = paired_bootstrap(a, b, sizes, resamples=30, seed=5)
    draws = np.random.default_rng(5).spawn(2)[0].integers(0, 12, size=(30, 12))
    for r, drawn in enumerate(draws):
        for run, samples in ((a, first), (b, second)):
            plain = run[0][:, drawn].sum(axis=1) / sizes[:, drawn].sum(axis=1)
            assert samples[r] == pytest.approx(plain, abs=1e-12)
    monkeypatch.setattr("chimera_cli.statistics._DRAWS_AT_ONCE", 7 * 12)
    again = paired_bootstrap(a, b, sizes, resamples=30, seed=5)
    assert np.allclose(again[0], first)
    assert np.allclose(again[1], second)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_drawn_seeds_have_the_variance_of_their_mean(seeds: int) -> None:
    # The same in every unit: all the spread comes from the seeds, whose mean varies by s^2 / n.
    values = np.random.default_rng(seeds).normal(size=seeds)
    a, sizes = np.tile(values[:, None, None], (1, 1, 4)), np.ones((1, 4))
    first, second = paired_bootstrap(a, np.zeros((1, 1, 4)), sizes, resamples=40_000, seed=0)
    assert first.std() == pytest.approx(values.std(ddof=1) / math.sqrt(seeds), rel=0.02)
    assert first.mean() == pytest.approx(values.mean(), abs=0.02)
    assert set(second.ravel()) == {0.0}


def test_a_run_against_itself_has_no_change_and_p_1() -> None:
    a, _, sizes = _two_runs(40)
    first, second = paired_bootstrap(a, a, sizes, resamples=1000, seed=0)
    change = change_of(0.5, 0.5, first[:, 0], second[:, 0])
    assert (change.absolute, change.absolute_interval, change.relative) == (0, (0, 0), 0)
    assert (change.p_value, change.significant, change.smallest_effect) == (1, False, 0)


def test_a_change_by_hand() -> None:
    # 99 resamples of the change, from -0.09 to 0.89 by 0.01: ten at or below 0.
    changes = np.arange(-9, 90) / 100
    change = change_of(0.5, 0.9, np.full(99, 0.5), 0.5 + changes)
    assert change.absolute == pytest.approx(0.4)
    assert change.relative == pytest.approx(0.8)
    assert change.p_value == pytest.approx(2 * (10 + 1) / 100)
    assert change.absolute_interval == pytest.approx((-0.0655, 0.8655))
    assert change.relative_interval == pytest.approx((-0.131, 1.731))
    assert not change.significant
    assert change.standard_error == pytest.approx(standard.stdev(changes))
    assert change.smallest_effect == pytest.approx(2.801585 * standard.stdev(changes))


def test_nothing_is_relative_to_zero() -> None:
    none = change_of(0.0, 0.1, np.zeros(100), np.full(100, 0.1))
    assert (none.relative, none.relative_interval, none.significant) == (None, None, True)
    sometimes = change_of(0.1, 0.2, np.linspace(0, 0.2, 100), np.full(100, 0.2))
    assert sometimes.relative == pytest.approx(1)
    assert sometimes.relative_interval is None


def test_the_smallest_effect_is_found_four_times_in_five() -> None:
    found = stats.norm.sf(1.959964 - minimum_detectable_effect(1.0)) + stats.norm.cdf(
        -1.959964 - minimum_detectable_effect(1.0)
    )
    assert found == pytest.approx(0.8, abs=1e-5)


def test_two_equal_recipes_are_told_apart_about_as_rarely_as_promised() -> None:
    generator = np.random.default_rng(0)
    told = 0
    for trial in range(200):
        ease = generator.uniform(size=120)
        a, b = ((generator.uniform(size=120) < ease).astype(float)[None, None] for _ in range(2))
        first, second = paired_bootstrap(a, b, np.ones((1, 120)), resamples=400, seed=trial)
        told += change_of(a.mean(), b.mean(), first[:, 0], second[:, 0]).significant
    # Binomial(200, 0.05): more than 20 would be a rare accident.
    assert 2 <= told <= 20
