"""Memory that runs out: less of it for the same step, in the order of the plan."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from tiny_model import TINY

from chimera_cli.models.dual_encoder import DualEncoder, build_dual_encoder
from chimera_cli.training import contingency
from chimera_cli.training.batches import PairBatch
from chimera_cli.training.contingency import LoaderWatch, Relief, halve_rates, relieved_backward, smaller_side
from chimera_cli.training.large_batch import backward
from chimera_cli.training.losses import infonce
from chimera_cli.training.optimiser import build_optimiser, build_schedule


def model_and_batch() -> tuple[DualEncoder, PairBatch]:
    torch.manual_seed(0)
    model = build_dual_encoder(TINY)
    model.image_tower.frozen_statistics = True
    model.train()
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model, PairBatch(0, pixels, model.tokenise([f"dog {row}" for row in range(5)]), torch.arange(5))


def gradient(model: DualEncoder) -> torch.Tensor:
    return torch.cat([part.grad.flatten() for part in model.parameters() if part.grad is not None])


def short_of_memory(monkeypatch: pytest.MonkeyPatch, failures: int) -> list[int | None]:
    """Let so many attempts fail half-way, with some gradient and some random numbers gone; return what was tried."""
    tried: list[int | None] = []

    def scarce(model: DualEncoder, batch: PairBatch, *args: Any, micro_batch: int | None, **settings: Any) -> Any:
        tried.append(micro_batch)
        loss = backward(model, batch, *args, micro_batch=micro_batch, **settings)
        if len(tried) <= failures:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(contingency, "backward", scarce)
    return tried


def test_once_out_of_memory_the_step_is_made_with_half_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    torch.manual_seed(7)
    wanted_loss = backward(model, batch, infonce, micro_batch=3)
    wanted = gradient(model)
    model.zero_grad()
    tried = short_of_memory(monkeypatch, 1)
    told: list[tuple[str, Mapping[str, Any]]] = []
    relief = Relief(None, False, lambda *measure: told.append(measure))
    torch.manual_seed(7)
    loss = relieved_backward(relief, model, batch, infonce, micro_batch=None)
    assert tried == [None, 3]
    assert told == [("out of memory: micro_batch 3 in place of 5", {"micro_batch": 3})]
    assert loss == wanted_loss
    assert torch.equal(gradient(model), wanted), "the failed attempt leaves neither gradients nor random numbers"


def test_measures_come_in_the_order_of_the_plan_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    tried = short_of_memory(monkeypatch, 9)
    told: list[Any] = []
    with pytest.raises(torch.OutOfMemoryError):
        relieved_backward(Relief(4, False, lambda *measure: told.append(measure)), model, batch, infonce)
    assert tried == [4, 2, 1, 1]
    words = "out of memory: activations are computed again (checkpointing: true)"
    assert told[-1] == (words, {"checkpointing": True})
    assert model.image_tower.backbone.grad_checkpointing


def test_statistics_of_the_batch_leave_nothing_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    model.image_tower.frozen_statistics = False
    model.train()
    tried = short_of_memory(monkeypatch, 9)
    with pytest.raises(torch.OutOfMemoryError):
        relieved_backward(Relief(None, False, lambda *_: pytest.fail("another function")), model, batch, infonce)
    assert tried == [None]


def test_images_shrink_by_a_seventh_to_multiples_of_32() -> None:
    sides: list[int | None] = [224]
    while sides[-1] is not None:
        sides.append(smaller_side(sides[-1]))
    assert sides == [224, 192, 160, 128, 96, 64, None]
    assert [smaller_side(side) for side in (512, 240, 74)] == [416, 192, None]


# ---- the loader -----------------------------------------------------------------------------------------------------


def watched(shares: list[float], **settings: int) -> LoaderWatch:
    """Return the watch after steps of 10 s on a made clock, of which these shares were waited."""
    now = [0.0]
    watch = LoaderWatch(clock=lambda: now[0], **settings)

    def batches() -> Iterator[Any]:
        for share in shares:
            now[0] += 10 * share
            yield share

    for share in watch.watched(batches()):
        now[0] += 10 * (1 - share)
    return watch


def test_a_loader_is_too_slow_by_the_median_of_whole_windows_after_the_warm_up() -> None:
    late = [0.9] * 3 + [0.1, 0.3, 0.3, 0.1, 0.3]
    assert watched(late, updates=5, warm_up=3).share == pytest.approx(0.3)
    assert watched(late, updates=5, warm_up=3).too_slow
    assert watched(late[:-1], updates=5, warm_up=3).share is None, "a window is judged when it is whole"
    at_the_limit = watched([0.2 - 1e-12] * 60)
    assert (round(at_the_limit.share or 0, 6), at_the_limit.too_slow) == (0.2, False)
    assert watched([0.21] * 60).too_slow, "10 updates of warm-up and 50 that count"
    assert not watched([0.21] * 59).too_slow


def test_single_late_batches_make_no_slow_loader_and_slowness_is_remembered() -> None:
    assert not watched([0.0, 0.0, 0.99, 0.0, 0.99] * 4, updates=5, warm_up=0).too_slow
    assert watched([0.5] * 5 + [0.0] * 5, updates=5, warm_up=0).too_slow


def test_halved_rates_stay_halved() -> None:
    model, _ = model_and_batch()
    made = [build_optimiser(model, lr_heads=1.0, lr_image=0.5, lr_text=0.1, weight_decay=0.0) for _ in range(2)]
    schedules = [build_schedule(one, 10, 0.2) for one in made]
    halve_rates(made[1], schedules[1], 2)
    for _ in range(5):
        for whole, halved in zip(made[0].param_groups, made[1].param_groups, strict=True):
            assert halved["lr"] == pytest.approx(whole["lr"] / 4)
        for one, schedule in zip(made, schedules, strict=True):
            one.step()
            schedule.step()
