"""The loop against a plain reference written out by hand, and its early stop."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_model import TINY

from chimera_cli.errors import ChimeraError
from chimera_cli.models.dual_encoder import DualEncoder, build_dual_encoder
from chimera_cli.training.batches import PairBatch
from chimera_cli.training.loop import Keeper, train
from chimera_cli.training.losses import infonce
from chimera_cli.training.optimiser import build_optimiser, build_schedule

CPU = torch.device("cpu")


def model_of(seed: int) -> DualEncoder:
    torch.manual_seed(seed)
    return build_dual_encoder(TINY)


def batches(model: DualEncoder, count: int) -> list[PairBatch]:
    generator = torch.Generator().manual_seed(5)
    widths = (model.image_tower.width, model.text_tower.width)
    return [
        PairBatch(0, *(torch.randn(8, width, generator=generator) for width in widths), torch.arange(8))
        for _ in range(count)
    ]


def parts(model: DualEncoder, updates: int) -> tuple[Any, Any]:
    optimiser = build_optimiser(model, lr_heads=1e-2, lr_image=1e-3, lr_text=1e-3, weight_decay=0.1)
    return optimiser, build_schedule(optimiser, updates, 0.2)


def test_losses_equal_a_loop_written_out_by_hand() -> None:
    ours, theirs = model_of(0), model_of(0)
    data = batches(ours, 6)
    outcome = train(ours, iter(data), infonce, *parts(ours, 5), updates=5, device=CPU, clip_norm=0.5, closing_loss=True)

    optimiser, schedule = parts(theirs, 5)
    losses = []
    for step, batch in enumerate(data):
        image = torch.nn.functional.normalize(theirs.image_head(batch.image), dim=-1)
        text = torch.nn.functional.normalize(theirs.text_head(batch.text), dim=-1)
        loss = infonce(image, text, batch.image_ids, theirs.logit_scale)
        losses.append(loss.item())
        if step == 5:
            break
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.grad is not None], 0.5)
        optimiser.step()
        schedule.step()
        theirs.logit_scale.data.clamp_(0, math.log(100))
    # Equal but for the order in which the norms of the tensors are added up before clipping.
    assert outcome.losses == pytest.approx(losses, rel=1e-6)
    assert outcome.updates == 5
    assert outcome.pairs == 40
    assert torch.allclose(ours.image_head.weight, theirs.image_head.weight, atol=1e-6)


def test_it_stops_after_patience_and_remembers_the_best() -> None:
    model = model_of(1)
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    told: list[tuple[int, bool]] = []
    outcome = train(
        model,
        iter(batches(model, 10)),
        infonce,
        *parts(model, 10),
        updates=10,
        device=CPU,
        evaluate=lambda: {"rsum": next(scores)},
        evaluate_every=2,
        patience=2,
        keeper=Keeper(lambda state: state.done % 2 == 0, lambda state, better: told.append((state.done - 1, better))),
    )
    assert told == [(1, True), (3, True), (5, False), (7, False)]
    assert outcome.stopped_early
    assert outcome.best_step == 3
    assert outcome.updates == 8


def test_a_loss_that_is_not_finite_stops_with_a_hint() -> None:
    model = model_of(2)
    broken: Iterator[PairBatch] = iter(
        [PairBatch(0, batch.image * math.nan, batch.text, batch.image_ids) for batch in batches(model, 1)]
    )
    with pytest.raises(ChimeraError, match="the loss is nan at step 0"):
        train(model, broken, infonce, *parts(model, 1), updates=1, device=CPU)


def test_the_temperature_stays_within_its_bounds() -> None:
    model = model_of(3)
    model.logit_scale.data.fill_(math.log(99.99))
    optimiser, schedule = parts(model, 3)
    for group in optimiser.param_groups:
        group["lr"] = 10.0
    train(model, iter(batches(model, 3)), infonce, optimiser, schedule, updates=3, device=CPU)
    assert 0 <= model.logit_scale.item() <= math.log(100) + 1e-6


def test_an_infinite_gradient_stops_with_a_hint() -> None:
    model = model_of(4)

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(_context: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * math.inf

    def overflowing(*arguments: Any) -> torch.Tensor:
        loss: torch.Tensor = Overflow.apply(infonce(*arguments))
        return loss

    with pytest.raises(ChimeraError, match="the gradient is not finite at step 0"):
        train(model, iter(batches(model, 1)), overflowing, *parts(model, 1), updates=1, device=CPU)
