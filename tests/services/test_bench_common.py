"""What the benchmarks share."""

import pytest
import torch

from chimera_cli.services.bench_common import fastest, percentiles_ms


def test_percentiles_by_hand() -> None:
    assert percentiles_ms([0.1] * 50 + [0.2] + [0.3] * 50) == pytest.approx((200.0, 300.0))
    assert percentiles_ms([0.004]) == pytest.approx((4.0, 4.0))


def test_the_fastest_round_counts_after_two_for_warming_up() -> None:
    rounds: list[int] = []
    seconds = fastest(lambda: rounds.append(1), torch.device("cpu"), rounds=3)
    assert len(rounds) == 5
    assert 0 <= seconds < 1
