"""What the trainer is given: every image once per epoch, one of its own captions, decided by seed and epoch."""

import numpy as np
import pytest
import torch

from chimera_cli.training.augment import noisy_rows
from chimera_cli.training.batches import pair_batches, pair_order
from chimera_cli.training.optimiser import build_schedule

CAPTIONS = [np.arange(5 * image, 5 * image + 5) for image in range(103)]


def test_every_image_once_with_a_caption_of_its_own() -> None:
    pairs = list(pair_order(CAPTIONS, batch=25, seed=3, epoch=0))
    positions = np.concatenate([part for part, _ in pairs])
    rows = np.concatenate([rows for _, rows in pairs])
    assert sorted(positions) == list(range(103))
    assert (rows // 5 == positions).all()
    assert {len(part) for part, _ in pairs} <= {25, 26}


def test_seed_and_epoch_decide_and_both_matter() -> None:
    def rows(seed: int, epoch: int) -> list[int]:
        return np.concatenate([rows for _, rows in pair_order(CAPTIONS, 25, seed, epoch)]).tolist()

    assert rows(1, 0) == rows(1, 0)
    assert rows(1, 0) != rows(2, 0)
    assert rows(1, 0) != rows(1, 1)


def test_over_many_epochs_every_caption_is_drawn() -> None:
    seen = {int(row) for epoch in range(60) for _, rows in pair_order(CAPTIONS[:4], 4, 0, epoch) for row in rows}
    assert seen == set(range(20))


def test_an_endless_stream_counts_its_epochs_and_carries_image_ids() -> None:
    stream = pair_batches(
        CAPTIONS[:4],
        np.array([9, 9, 1, 2]),
        lambda positions, _epoch: torch.from_numpy(positions).float()[:, None],
        lambda rows: torch.from_numpy(rows).float()[:, None],
        batch=2,
        seed=0,
        device=torch.device("cpu"),
    )
    batches = [next(stream) for _ in range(4)]
    assert [batch.epoch for batch in batches] == [0, 0, 1, 1]
    ids = {0: 9, 1: 9, 2: 1, 3: 2}
    for batch in batches:
        assert [ids[int(p)] for p in batch.image[:, 0]] == batch.image_ids.tolist()


def test_noise_has_the_asked_share_of_each_features_deviation() -> None:
    views = torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1])
    rows = noisy_rows(torch.zeros_like(views) + views, torch.Generator().manual_seed(1), noise=0.5)
    quiet = noisy_rows(views, torch.Generator().manual_seed(1), noise=0.0)
    positions = np.arange(4000)
    spread = (rows(positions, 0) - quiet(positions, 0)).std(dim=0) / views.flatten(0, 1).std(dim=0)
    assert spread.tolist() == pytest.approx([0.5, 0.5, 0.5], rel=0.05)


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimiser, updates=100, warmup_share=0.1)
    rates = []
    for _ in range(101):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
