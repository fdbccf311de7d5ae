"""Training in several processes, with the result of one: features are exchanged, gradients added up.

Every process has the whole model and a share of each batch. The loss is that of the whole batch everywhere, so what a
process gets as its gradient is the part through its own pairs, and the sum over the processes is the gradient.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.training.large_batch import Exchange, alone

# Longer than any evaluation or feature extraction, in which all other processes wait for one.
_PATIENCE = timedelta(hours=6)

# Groups that this process has left, as long as it lives.
_LEFT: list[Any] = []


@dataclass(frozen=True, slots=True)
class Processes:
    """This process (`rank`) among the `world` that train together, and how they talk.

    `share` gives every process the value that process 0 has.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    exchange: Exchange = alone
    share: Callable[[Any], Any] = lambda value: value

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, announces and evaluates."""
        return self.rank == 0

    def add_gradients(self, model: DualEncoder, learning: Sequence[Tensor]) -> None:
        """Make every process's gradients the sum over all; temperature and bias have theirs whole already."""
        if self.world == 1:
            return
        whole = {id(part) for part in (model.logit_scale, model.logit_bias) if part is not None}
        added = [parameter for parameter in learning if id(parameter) not in whole]
        for parameter in added:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in added if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """Return for each wish whether any process has it."""
        if self.world == 1:
            return wishes
        votes = torch.tensor(wishes, dtype=torch.int64, device=self.device)
        dist.all_reduce(votes)
        return tuple(bool(vote) for vote in votes)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes by rank."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered


ALONE = Processes()


def rank_and_world() -> tuple[int, int]:
    """Return which of how many processes this is, as `torchrun` tells it; (0, 1) where nobody does."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, over gloo on a CPU and NCCL on GPUs; alone where there are none."""
    rank, world = rank_and_world()
    if world == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(rank, world, device, _exchange(rank, world), _share)
    finally:
        # The last reference would end gloo's threads with Python's lock held, and wait for ever for one that wants that
        # lock to let go of a tensor.
        _LEFT.append(dist.group.WORLD)
        dist.destroy_process_group()


def _exchange(rank: int, world: int) -> Exchange:
    def exchange(features: Tensor) -> tuple[Tensor, slice]:
        """Return the features (or ids) of all processes by rank; their numbers may differ."""
        lengths = [torch.zeros(1, dtype=torch.int64, device=features.device) for _ in range(world)]
        dist.all_gather(lengths, torch.tensor([len(features)], dtype=torch.int64, device=features.device))
        counts = [int(length) for length in lengths]
        padded = features.new_zeros((max(counts), *features.shape[1:]))
        padded[: len(features)] = features.detach()
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        start = sum(counts[:rank])
        whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return whole, slice(start, start + counts[rank])

    return exchange


def _share(value: Any) -> Any:
    """Return the value of process 0."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
