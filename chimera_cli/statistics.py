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
