"""The training loop: forward, loss, backward, update, and an evaluation now and then."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from chimera_cli.errors import ChimeraError
from chimera_cli.events import Evaluated, Listener, StepDone, ignore
from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.runtime import Stopwatch
from chimera_cli.training.batches import PairBatch, embed_pairs
from chimera_cli.training.losses import ContrastiveLoss

Figures = Mapping[str, float | None]


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
    clip_norm: float = 1.0,
    evaluate: Callable[[], Figures] | None = None,
    evaluate_every: int = 0,
    patience: int = 0,
    closing_loss: bool = False,
    on_evaluated: Callable[[int, int, bool, dict[str, Any]], None] | None = None,
    listener: Listener = ignore,
) -> Outcome:
    """Return the outcome of `updates` updates; the model is changed in place.

    `evaluate` is called every `evaluate_every` updates with the model in evaluation mode; the run stops early after
    `patience` evaluations without a better `rsum`. `on_evaluated` is told (step, epoch, best so far, loop state), which
    is when checkpoints are written. `closing_loss` adds one forward pass after the last update, so that loss[updates]
    exists. Raises ChimeraError when the loss is not finite.
    """
    autocast = nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))
    scaler = torch.amp.grad_scaler.GradScaler(device.type, enabled=precision == "float16")
    parts: dict[str, Any] = {"optimiser": optimiser, "schedule": schedule, "scaler": scaler}
    learning = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    losses: list[float] = []
    done, pairs, best_rsum, best_step, best_epoch, best_figures, worse = 0, 0, -math.inf, None, None, None, 0
    stopped_early = False
    watch = Stopwatch(device)
    started_at = time.perf_counter()
    model.train()
    watch.start()

    for step in range(updates + closing_loss):
        # ---- forward ------------------------------------------------------------------------------------------------
        batch = next(batches)
        with autocast:
            image_features, text_features = embed_pairs(model, batch)
        # The loss is computed in float32: a half-precision softmax over a large batch loses the small terms.
        loss = loss_of(
            image_features.float(), text_features.float(), batch.image_ids, model.logit_scale, model.logit_bias
        )
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ChimeraError(
                f"the loss is {losses[-1]} at step {step}", "lower the learning rates or set precision: float32"
            )
        if step == updates:
            break

        # ---- update -------------------------------------------------------------------------------------------------
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(scaler.scale(loss))
        scaler.unscale_(optimiser)
        # Norm of the whole gradient, as in the CLIP family; without a limit it is only measured.
        norm = torch.nn.utils.clip_grad_norm_(learning, clip_norm if clip_norm > 0 else math.inf)
        finite = bool(torch.isfinite(norm))
        if not finite and not scaler.is_enabled():
            raise ChimeraError(
                f"the gradient is not finite at step {step}", "lower the learning rates or set precision: float32"
            )
        rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
        # The scaler skips an update that overflowed in float16 and halves its scale: no step, no new rate.
        scaler.step(optimiser)
        scaler.update()
        if finite:
            schedule.step()
        model.clamp_logit_scale()
        done += 1
        pairs += len(batch)

        # ---- announce -----------------------------------------------------------------------------------------------
        elapsed = time.perf_counter() - started_at
        metrics = {"loss": losses[-1], "lr": rates["image_head"]}
        metrics |= {"grad_norm": norm.item()} if finite else {}
        metrics |= {"logit_scale": model.logit_scale.exp().item(), "elapsed_s": elapsed}
        if step > 0:
            metrics["pairs_per_s"] = pairs / max(1e-9, watch.seconds + watch.running_s())
        listener(StepDone(step, batch.epoch, metrics))

        # ---- evaluate -----------------------------------------------------------------------------------------------
        if evaluate is None or (step + 1) % evaluate_every:
            continue
        watch.stop()
        model.eval()
        figures = evaluate()
        model.train()
        listener(Evaluated(step, "dev", figures))
        rsum = figures["rsum"] or 0.0
        better = rsum > best_rsum
        if better:
            best_rsum, best_step, best_epoch, best_figures, worse = rsum, step, batch.epoch, figures, 0
        else:
            worse += 1
        if on_evaluated is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            on_evaluated(step, batch.epoch, better, state | {"step": done, "rng": torch.get_rng_state()})
        watch.start()
        if patience and worse >= patience:
            stopped_early = True
            break

    if watch.is_running:
        watch.stop()
    return Outcome(
        tuple(losses),
        len(losses) - closing_loss,
        pairs,
        watch.seconds,
        best_step,
        best_epoch,
        best_figures,
        stopped_early,
    )
