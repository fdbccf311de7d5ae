"""What the benchmarks share: the seed, the warm-up, percentiles, and what a machine can do at best."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEED = 0
WARM_UP_BATCHES = 3


def percentiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile in milliseconds."""
    import numpy as np

    p50, p95 = np.percentile(np.asarray(seconds) * 1000, (50, 95))
    return float(p50), float(p95)


def fastest(work: Callable[[], Any], device: "torch.device", rounds: int = 10) -> float:
    """Return the seconds of the fastest of some rounds after two for warming up: what the machine can do at best."""
    from chimera_cli.runtime import Stopwatch

    laps = []
    for _ in range(rounds + 2):
        watch = Stopwatch(device)
        watch.start()
        work()
        laps.append(watch.stop())
    return min(laps[2:])
