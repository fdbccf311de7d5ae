"""What a training step keeps in memory, measured on a few pairs on the CPU and scaled to any number."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.training.batches import PairBatch, embed_pairs


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that the graph of a micro-batch keeps: `fixed` plus `per_pair` for each pair.

    `largest` is the largest tensor, and `segment` what the largest stage of a tower keeps, both per pair: the first
    is there twice more while the gradient passes it, the second is computed again where activations are not kept.
    """

    fixed: float
    per_pair: float
    largest: float
    segment: float

    def peak_bytes(self, pairs: int, recomputing: bool) -> float:
        """Return the most that a micro-batch of so many pairs has in memory beside weights and gradients."""
        working = 2 * self.largest + (self.segment if recomputing else 0.0)
        return self.fixed + pairs * (self.per_pair + working)


def measure_activations(
    model: DualEncoder, pairs_of: Callable[[int], PairBatch], segments: DualEncoder | None = None
) -> Activations:
    """Return what the graphs of 2 and of 4 pairs keep; `pairs_of` makes so many.

    `segments` is the same model without activations that are computed again, where `model` has these.
    """
    few, many = _kept(model, pairs_of(2)), _kept(model, pairs_of(4))
    per_pair = (many.total - few.total) / 2
    plain = many if segments is None else _kept(segments, pairs_of(4))
    return Activations(max(0.0, few.total - 2 * per_pair), per_pair, plain.largest / 4, plain.segment / 4)


@dataclass(slots=True)
class _Kept:
    total: int = 0
    largest: int = 0
    segment: int = 0


def _kept(model: DualEncoder, batch: PairBatch) -> _Kept:
    """Return the bytes that a forward pass keeps for the gradient, weights left out, each memory counted once."""
    kept = _Kept()
    # Held until the end: a memory that was let go would be handed out again under the same address.
    held: dict[int, Tensor] = {part.untyped_storage().data_ptr(): part for part in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            held[storage.data_ptr()] = tensor.detach()
            kept.total += storage.nbytes()
            kept.largest = max(kept.largest, storage.nbytes())
        return tensor

    handles = [handle for stage in _stages(model) for handle in _watch(stage, kept)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            image, text = embed_pairs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    del image, text
    return kept


def _stages(model: DualEncoder) -> list[nn.Module]:
    """Return the stages of both towers: what stands in their outermost lists."""
    lists = [module for tower in (model.image_tower, model.text_tower) for module in _outermost(tower)]
    return [stage for module in lists for stage in module.children()]


def _outermost(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return [module]
    return [found for child in module.children() for found in _outermost(child)]


def _watch(stage: nn.Module, kept: _Kept) -> list[torch.utils.hooks.RemovableHandle]:
    """Note in `kept` how much a stage adds while it runs."""
    before: list[int] = []

    def begin(_module: nn.Module, _inputs: object) -> None:
        before.append(kept.total)

    def end(_module: nn.Module, _inputs: object, _outputs: object) -> None:
        kept.segment = max(kept.segment, kept.total - before.pop())

    return [stage.register_forward_pre_hook(begin), stage.register_forward_hook(end)]
