"""The training loop: gradient, update, an evaluation now and then, and a checkpoint from which it goes on as before."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from chimera_cli.errors import ChimeraError
from chimera_cli.events import Evaluated, Listener, StepDone, ignore
from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.runtime import Stopwatch
from chimera_cli.training.averaging import WeightAverage
from chimera_cli.training.batches import PairBatch
from chimera_cli.training.contingency import Relief, relieved_backward
from chimera_cli.training.distributed import ALONE, Processes
from chimera_cli.training.large_batch import backward, loss_without_gradient
from chimera_cli.training.losses import ContrastiveLoss

Figures = Mapping[str, float | None]


class NotFiniteError(ChimeraError):
    """The loss or its gradient is infinite or no number: the model is as it was before the step."""


@dataclass(slots=True)
class LoopState:
    """How far a loop has come: all of it that is no tensor, so that another process can go on from there.

    `done` updates are made, and the next batch is number `number` of epoch `epoch`. `losses[k]` is the batch loss
    before update k; `worse` counts the evaluations since the best. `train_s` excludes evaluations and checkpoints,
    `elapsed_s` holds everything, both over all the processes that the run took.
    """

    done: int = 0
    epoch: int = 0
    number: int = 0
    pairs: int = 0
    losses: list[float] = field(default_factory=list)
    best_rsum: float = -math.inf
    best_step: int | None = None
    best_epoch: int | None = None
    best_figures: Figures | None = None
    worse: int = 0
    train_s: float = 0.0
    elapsed_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Keeper:
    """Who keeps what training has reached: `due` says whether a checkpoint is, `save` writes one.

    `save` is told whether the model is the best so far. Where `stop` says that somebody wants the run to end, the loop
    finishes its step, saves and ends.
    """

    due: Callable[[LoopState], bool]
    save: Callable[[LoopState, bool], None]
    stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training run came to; `train_s` excludes evaluations, `losses[k]` is the batch loss before update k."""

    losses: tuple[float, ...]
    updates: int
    pairs: int
    train_s: float
    best_step: int | None
    best_epoch: int | None
    best_figures: Figures | None
    stopped_early: bool
    interrupted: bool = False


def train(
    model: DualEncoder,
    batches: Iterator[PairBatch],
    loss_of: ContrastiveLoss,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    updates: int,
    device: torch.device,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    scaler: torch.amp.grad_scaler.GradScaler | None = None,
    micro_batch: int | None = None,
    clip_norm: float = 1.0,
    average: WeightAverage | None = None,
    evaluate: Callable[[], Figures] | None = None,
    evaluate_every: int = 0,
    patience: int = 0,
    closing_loss: bool = False,
    state: LoopState | None = None,
    keeper: Keeper | None = None,
    processes: Processes = ALONE,
    relief: Relief | None = None,
    listener: Listener = ignore,
) -> Outcome:
    """Return the outcome of `updates` updates, those that `state` has made included; model and state are changed.

    At most `micro_batch` pairs (None: all) are in memory with their activations; the gradient is that of the batch.
    `evaluate` is called every `evaluate_every` updates with the model in evaluation mode and with the weights of
    `average` where there is one; the run stops early after `patience` evaluations without a better `rsum`.
    `closing_loss` adds one forward pass after the last update, so that loss[updates] exists. `scaler` is that of
    float16 and made here if there is none. Of many `processes` each gives the batches of its own share. `relief` helps
    where memory runs out. Raises NotFiniteError when loss or gradient is not finite.
    """
    autocast = (
        nullcontext if precision == "float32" else partial(torch.autocast, device.type, getattr(torch, precision))
    )
    if scaler is None:
        scaler = gradient_scaler(device, precision)
    memory: dict[str, Any] = {"micro_batch": micro_batch, "autocast": autocast, "exchange": processes.exchange}
    gradient = backward if relief is None else partial(relieved_backward, relief)
    learning = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state = state or LoopState()
    stopped_early = interrupted = False
    watch = Stopwatch(device)
    watch.seconds = state.train_s
    began_at = time.perf_counter() - state.elapsed_s
    first = state.done
    model.train()
    watch.start()

    for step in range(first, updates + closing_loss):
        if patience and state.worse >= patience:
            stopped_early = True
            break

        # ---- gradient -----------------------------------------------------------------------------------------------
        batch = next(batches)
        if step == updates:
            state.losses.append(loss_without_gradient(model, batch, loss_of, **memory).item())
            break
        optimiser.zero_grad(set_to_none=True)
        loss = gradient(model, batch, loss_of, scaled=scaler.scale, **memory).item()
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss} at step {step}", _CALMER)
        processes.add_gradients(model, learning)

        # ---- update -------------------------------------------------------------------------------------------------
        scaler.unscale_(optimiser)
        # Norm of the whole gradient, as in the CLIP family; without a limit it is only measured.
        norm = torch.nn.utils.clip_grad_norm_(learning, clip_norm if clip_norm > 0 else math.inf)
        finite = bool(torch.isfinite(norm))
        if not finite and not scaler.is_enabled():
            raise NotFiniteError(f"the gradient is not finite at step {step}", _CALMER)
        rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
        # The scaler skips an update that overflowed in float16 and halves its scale: no step, no new rate.
        scaler.step(optimiser)
        scaler.update()
        if finite:
            schedule.step()
        model.clamp_logit_scale()
        if average is not None and finite:
            average.update(model)
        state.losses.append(loss)
        state.done, state.epoch, state.number = step + 1, batch.epoch, batch.number + 1
        state.pairs += batch.whole or len(batch)

        # ---- announce -----------------------------------------------------------------------------------------------
        metrics = {"loss": loss, "lr": rates["image_head"]}
        metrics |= {"grad_norm": norm.item()} if finite else {}
        metrics |= {"logit_scale": model.logit_scale.exp().item(), "elapsed_s": time.perf_counter() - began_at}
        if step > first:
            metrics["pairs_per_s"] = state.pairs / max(1e-9, watch.seconds + watch.running_s())
        listener(StepDone(step, batch.epoch, metrics))

        # ---- evaluate -----------------------------------------------------------------------------------------------
        better = False
        if evaluate is not None and state.done % evaluate_every == 0:
            watch.stop()
            model.eval()
            with nullcontext() if average is None else average.shown(model):
                figures = evaluate()
            model.train()
            listener(Evaluated(step, "dev", figures))
            better = _judge(state, step, batch.epoch, figures)
            watch.start()

        # ---- keep ---------------------------------------------------------------------------------------------------
        if keeper is not None:
            interrupted, due = processes.agree(keeper.stop(), better or keeper.due(state))
            if interrupted or due:
                watch.stop()
                state.train_s, state.elapsed_s = watch.seconds, time.perf_counter() - began_at
                keeper.save(state, better)
                watch.start()
            if interrupted:
                break

    watch.stop()
    stopped_early = stopped_early or bool(patience and state.worse >= patience)
    state.train_s, state.elapsed_s = watch.seconds, time.perf_counter() - began_at
    return _outcome(state, stopped_early, interrupted)


_CALMER = "lower the learning rates or set precision: float32"


def gradient_scaler(device: torch.device, precision: str) -> torch.amp.grad_scaler.GradScaler:
    """Return the scaler that keeps small float16 gradients from vanishing; for other precisions it does nothing."""
    return torch.amp.grad_scaler.GradScaler(device.type, enabled=precision == "float16")


def _judge(state: LoopState, step: int, epoch: int, figures: Figures) -> bool:
    """Return whether the figures are the best so far, and remember them where they are."""
    rsum = figures["rsum"] or 0.0
    if rsum > state.best_rsum:
        state.best_rsum, state.best_step, state.best_epoch, state.best_figures = rsum, step, epoch, dict(figures)
        state.worse = 0
        return True
    state.worse += 1
    return False


def _outcome(state: LoopState, stopped_early: bool, interrupted: bool) -> Outcome:
    return Outcome(
        tuple(state.losses),
        state.done,
        state.pairs,
        state.train_s,
        state.best_step,
        state.best_epoch,
        state.best_figures,
        stopped_early,
        interrupted,
    )
