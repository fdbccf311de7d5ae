"""What training does by itself where memory runs out, the loader is too slow or the loss is no number, if asked to."""

import gc
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chimera_cli.errors import ChimeraError
from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.training.batches import PairBatch
from chimera_cli.training.large_batch import RandomState, backward, refuse_batch_statistics
from chimera_cli.training.losses import ContrastiveLoss
from chimera_cli.training.memory import recompute_activations

# A loss that is no number after so many halvings of the rates has another reason than the rates.
MOST_HALVINGS = 3
# The loader is too slow where more than this share of a step is spent waiting for its batch.
WAIT_SHARE = 0.2
# Over so many updates: the first ones start threads and tune kernels, and a single slow read means nothing.
WATCHED_UPDATES = 50
_WARM_UP_UPDATES = 10
# Towers halve their maps five times, so sides are multiples of 32; below 64 pixels little of a photo is left.
_STRIDE, _LEAST_SIDE = 32, 64


# ---- memory ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Relief:
    """How little memory a step takes by now: pairs at a time (None: all), and whether activations are kept.

    `taken` is told of each measure in words and as the config keys it changes; none changes what is computed.
    """

    micro_batch: int | None
    recomputing: bool
    taken: Callable[[str, Mapping[str, Any]], None]

    def next_measure(self, model: DualEncoder, pairs: int) -> bool:
        """Return whether there was something left to do: half the micro-batch down to 1, then keep no activations.

        A model that normalises by the statistics of its batch has neither: both would be another function.
        """
        size = min(self.micro_batch or pairs, pairs)
        if not _allows(refuse_batch_statistics, model):
            return False
        if size > 1:
            self.micro_batch = -(-size // 2)
            words = f"out of memory: micro_batch {self.micro_batch} in place of {size}"
            self.taken(words, {"micro_batch": self.micro_batch})
            return True
        if not self.recomputing and _allows(recompute_activations, model):
            self.recomputing = True
            self.taken("out of memory: activations are computed again (checkpointing: true)", {"checkpointing": True})
            return True
        return False


def _allows(measure: Callable[[DualEncoder], None], model: DualEncoder) -> bool:
    try:
        measure(model)
    except ChimeraError:
        return False
    return True


def relieved_backward(
    relief: Relief, model: DualEncoder, batch: PairBatch, loss_of: ContrastiveLoss, **settings: Any
) -> Tensor:
    """Do what `large_batch.backward` does, in less memory each time it runs out; the gradients were zero before.

    Every attempt has the same random numbers. Raises torch.cuda.OutOfMemoryError where all measures are taken.
    """
    settings.pop("micro_batch", None)
    before = RandomState.now(batch.image_ids.device)
    while True:
        try:
            return backward(model, batch, loss_of, micro_batch=relief.micro_batch, **settings)
        except torch.cuda.OutOfMemoryError:
            if not relief.next_measure(model, len(batch)):
                raise
        # Outside of the handler: the error holds the frames, and these the tensors that have to go.
        before.put_back()
        model.zero_grad(set_to_none=True)
        release_memory()


def release_memory() -> None:
    """Give back what nobody holds any more, to the allocator and from it to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_side(side: int) -> int | None:
    """Return the next smaller side of images: 6/7 of it, down to a multiple of 32; None below 64 pixels.

    From 224 these are 192, 160, 128, 96 and 64, each with about three quarters of the memory of the one before.
    """
    smaller = 6 * side // 7 // _STRIDE * _STRIDE
    return smaller if smaller >= _LEAST_SIDE else None


# ---- loader ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LoaderWatch:
    """How much of each step training waits for its batch; `clock` gives seconds.

    `share` is the median over the newest `updates` updates that were measured whole, None before: evaluations and
    checkpoints between two batches make single steps long, not all of them. `too_slow` stays once it is so.
    """

    clock: Callable[[], float] = time.perf_counter
    updates: int = WATCHED_UPDATES
    warm_up: int = _WARM_UP_UPDATES
    share: float | None = None
    too_slow: bool = False
    _shares: list[float] = field(default_factory=list)

    def watched(self, batches: Iterator[PairBatch]) -> Generator[PairBatch, None, None]:
        """Yield the batches as they are, watching how long each is waited for and worked on."""
        left = self.warm_up
        asked_at = self.clock()
        for batch in batches:
            waited = self.clock() - asked_at
            yield batch
            began_at, asked_at = asked_at, self.clock()
            if left > 0:
                left -= 1
            else:
                self._measured(waited / max(1e-9, asked_at - began_at))

    def _measured(self, share: float) -> None:
        self._shares.append(share)
        if len(self._shares) < self.updates:
            return
        self.share = statistics.median(self._shares)
        self.too_slow = self.too_slow or self.share > WAIT_SHARE
        self._shares.clear()


# ---- rates ----------------------------------------------------------------------------------------------------------


def halve_rates(optimiser: torch.optim.Optimizer, schedule: Any, times: int) -> None:
    """Halve all learning rates `times` times, for this update and for all that the schedule makes of them."""
    factor = 0.5**times
    for group in optimiser.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
