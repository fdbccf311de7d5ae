"""What training does by itself where memory runs out or the loss is no number, where that was asked for."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.training.batches import PairBatch
from chimera_cli.training.large_batch import RandomState, backward
from chimera_cli.training.losses import ContrastiveLoss
from chimera_cli.training.memory import recompute_activations

# A loss that is no number after so many halvings of the rates has another reason than the rates.
MOST_HALVINGS = 3


@dataclass(slots=True)
class Relief:
    """How little memory a step takes by now: pairs at a time (None: all), and whether activations are kept.

    `taken` is told of each measure in words; neither changes what is computed.
    """

    micro_batch: int | None
    recomputing: bool
    taken: Callable[[str], None]

    def next_measure(self, model: DualEncoder, pairs: int) -> bool:
        """Return whether there was something left to do: half the micro-batch down to 1, then keep no activations."""
        size = min(self.micro_batch or pairs, pairs)
        if size > 1:
            self.micro_batch = -(-size // 2)
            self.taken(f"out of memory: micro_batch {self.micro_batch} in place of {size}")
            return True
        if not self.recomputing:
            recompute_activations(model)
            self.recomputing = True
            self.taken("out of memory: activations are computed again (checkpointing: true)")
            return True
        return False


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
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def halve_rates(optimiser: torch.optim.Optimizer, schedule: Any, times: int) -> None:
    """Halve all learning rates `times` times, for this update and for all that the schedule makes of them."""
    factor = 0.5**times
    for group in optimiser.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
