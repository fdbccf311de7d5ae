"""Memory that runs out: less of it for the same step, in the order of the plan."""

from typing import Any

import pytest
import torch
from tiny_model import TINY

from chimera_cli.models.dual_encoder import DualEncoder, build_dual_encoder
from chimera_cli.training import contingency
from chimera_cli.training.batches import PairBatch
from chimera_cli.training.contingency import Relief, halve_rates, relieved_backward
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
    told: list[str] = []
    relief = Relief(None, False, told.append)
    torch.manual_seed(7)
    loss = relieved_backward(relief, model, batch, infonce, micro_batch=None)
    assert tried == [None, 3]
    assert told == ["out of memory: micro_batch 3 in place of 5"]
    assert loss == wanted_loss
    assert torch.equal(gradient(model), wanted), "the failed attempt leaves neither gradients nor random numbers"


def test_measures_come_in_the_order_of_the_plan_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    tried = short_of_memory(monkeypatch, 9)
    told: list[str] = []
    with pytest.raises(torch.cuda.OutOfMemoryError):
        relieved_backward(Relief(4, False, told.append), model, batch, infonce)
    assert tried == [4, 2, 1, 1]
    assert told[-1] == "out of memory: activations are computed again (checkpointing: true)"
    assert model.image_tower.backbone.grad_checkpointing


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
