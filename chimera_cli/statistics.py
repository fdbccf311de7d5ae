"""Mean, sample standard deviation and 95 % intervals, without scipy, and without numpy but for the bootstrap.

`slo` and `report` summarise a few seeds; importing numpy for that would double the time they take to start.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Two-sided 95 % quantiles of Student's t by degrees of freedom (Fisher and Yates, Table III); tests hold them against
# scipy. Beyond 30 the Cornish-Fisher expansion around the normal quantile is right to four decimals.
_T_95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Summary:
    """A figure over seeds: `std` is the sample deviation (n - 1), `low` and `high` the 95 % t interval of the mean.

    With one value there is no spread: `std`, `low` and `high` are None.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None
    values: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON takes it."""
        return asdict(self) | {"values": list(self.values)}


def t_quantile_95(degrees_of_freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution. Raises ValueError below one degree."""
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {degrees_of_freedom}")
    if degrees_of_freedom <= len(_T_95):
        return _T_95[degrees_of_freedom - 1]
    z, v = _Z_95, degrees_of_freedom
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2) + third


def summarise(values: Sequence[float]) -> Summary:
    """Return n, mean, sample standard deviation and 95 % interval. Raises ValueError for none or non-finite ones."""
    if not values:
        raise ValueError("nothing to summarise")
    numbers = tuple(float(value) for value in values)
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a value to summarise is not finite")
    n = len(numbers)
    mean = math.fsum(numbers) / n
    if n == 1:
        return Summary(1, mean, None, None, None, numbers)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in numbers) / (n - 1))
    half = t_quantile_95(n - 1) * std / math.sqrt(n)
    return Summary(n, mean, std, mean - half, mean + half, numbers)


def summarise_known(values: Sequence[float | None]) -> Summary | None:
    """Return the summary, or None where any value is missing: a mean over fewer seeds than asked would mislead."""
    known = [value for value in values if value is not None]
    return summarise(known) if known and len(known) == len(values) else None


def bootstrap_interval(
    statistic: "Callable[[NDArray[np.int64]], float]", units: int, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of `statistic` over `units` sampling units.

    `statistic` takes (units,) resampled indices and returns one number. The resamples depend on `seed` alone.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    draws = [statistic(generator.integers(0, units, size=units)) for _ in range(resamples)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


# ---- two runs on the same units -------------------------------------------------------------------------------------

# Standard normal quantile of 80 % power.
_Z_POWER_80 = 0.841621
# Draws held at once: 32 MB as float64.
_DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of two runs a and b on the same units: `absolute` = b - a, `relative` = (b - a) / a, 95 % intervals.

    `p_value` is two-sided; `smallest_effect` is the absolute change that this comparison finds with 80 % power. The
    relative parts are None where a is 0, or gets to 0 in a resample.
    """

    a: float
    b: float
    absolute: float
    absolute_interval: tuple[float, float]
    relative: float | None
    relative_interval: tuple[float, float] | None
    standard_error: float
    p_value: float
    smallest_effect: float

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval of the absolute change excludes 0."""
        low, high = self.absolute_interval
        return low > 0 or high < 0


def paired_bootstrap(
    a: "NDArray[np.float64]", b: "NDArray[np.float64]", sizes: "NDArray[np.float64]", *, resamples: int, seed: int
) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Return the resampled figures (resamples, figures) of two runs measured on the same units.

    `a` (seeds of a, figures, units) and `b` (seeds of b, figures, units) hold what each unit adds to a figure,
    `sizes` (figures, units) how much it weighs: a figure is sum / sum, averaged over the seeds. One draw of units
    serves both runs and all seeds, so that what makes a unit easy or hard cancels in the difference. The seeds of each
    run are drawn beside it, independently for a and b: of n seeds n - 1 (one stays itself), because n of n would
    make the variance of the mean too small by (n - 1) / n, which is much with three. The draws depend on `seed` alone;
    memory is bounded whatever the number of resamples.

    Sources: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13 (clusters, pairs); Rao and Wu
    1988, Resampling inference with complex survey data (n - 1 of n).
    """
    import numpy as np

    units = sizes.shape[1]
    for_units, for_seeds = np.random.default_rng(seed).spawn(2)
    shares = [_seed_shares(len(run), resamples, for_seeds) for run in (a, b)]
    samples: tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]] = ([], [])
    at_once = max(1, _DRAWS_AT_ONCE // units)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        times = _times_drawn(units, count, for_units)
        total = times @ sizes.T
        for run, share, found in zip((a, b), shares, samples, strict=True):
            by_seed = np.stack([times @ one.T / total for one in run])
            found.append(np.einsum("srf,rs->rf", by_seed, share[start : start + count]))
    return np.concatenate(samples[0]), np.concatenate(samples[1])


def _times_drawn(units: int, resamples: int, generator: "np.random.Generator") -> "NDArray[np.float64]":
    """Return how often each of `units` is drawn with replacement, (resamples, units), rows adding up to `units`."""
    import numpy as np

    draws = generator.integers(0, units, size=(resamples, units)) + np.arange(resamples)[:, None] * units
    times = np.bincount(draws.ravel(), minlength=resamples * units).reshape(resamples, units)
    # Floats, because products of whole numbers don't go through BLAS.
    return times.astype(np.float64)


def _seed_shares(seeds: int, resamples: int, generator: "np.random.Generator") -> "NDArray[np.float64]":
    """Return the share of each seed in the mean, (resamples, seeds), rows adding up to 1."""
    import numpy as np

    drawn = max(1, seeds - 1)
    return generator.multinomial(drawn, np.full(seeds, 1 / seeds), size=resamples) / drawn


def change_of(a: float, b: float, samples_a: "NDArray[np.float64]", samples_b: "NDArray[np.float64]") -> Change:
    """Return the change from a to b, judged by paired resamples (resamples,) of both.

    Intervals are percentiles. The p value is twice the share of resamples on the other side of 0, the observed change
    counted as one more resample (Davison and Hinkley, Bootstrap Methods and Their Application, 4.2), at most 1.
    """
    import numpy as np

    changes = samples_b - samples_a
    low, high = np.quantile(changes, (0.025, 0.975))
    relative, ends = None, None
    if a != 0:
        relative = (b - a) / a
        if (samples_a > 0).all():
            first, last = np.quantile(changes / samples_a, (0.025, 0.975))
            ends = float(first), float(last)
    error = float(changes.std(ddof=1))
    rarer = min(int((changes <= 0).sum()), int((changes >= 0).sum()))
    p_value = min(1.0, 2 * (rarer + 1) / (changes.size + 1))
    interval = float(low), float(high)
    return Change(a, b, b - a, interval, relative, ends, error, p_value, minimum_detectable_effect(error))


def minimum_detectable_effect(standard_error: float) -> float:
    """Return the smallest true change that a two-sided test at 5 % finds with 80 % power: (1.96 + 0.84) * error.

    Source: Bloom 1995, Minimum detectable effects, Evaluation Review 19(5).
    """
    return (_Z_95 + _Z_POWER_80) * standard_error
