"""Activations that are computed again give the gradient of those that were kept."""

import pytest
import torch
from tiny_model import TINY

from chimera_cli.errors import ChimeraError
from chimera_cli.models.dual_encoder import DualEncoder, build_dual_encoder
from chimera_cli.training.batches import PairBatch
from chimera_cli.training.large_batch import backward
from chimera_cli.training.losses import infonce
from chimera_cli.training.memory import recompute_activations


def gradient(model: DualEncoder, micro_batch: int | None) -> tuple[torch.Tensor, int]:
    """Return the gradient of one batch, dropout included, and the bytes that its graph keeps."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(6, 3, 32, 32, generator=generator)
    batch = PairBatch(0, pixels, model.tokenise([f"a dog number {row}" for row in range(6)]), torch.arange(6))
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(2)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward(model, batch, infonce, micro_batch=micro_batch)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), kept


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_the_gradient_stays_and_less_is_kept(micro_batch: int | None) -> None:
    torch.manual_seed(0)
    model = build_dual_encoder(TINY)
    model.image_tower.frozen_statistics = True
    model.train()
    wanted, kept = gradient(model, micro_batch)
    recompute_activations(model)
    found, kept_less = gradient(model, micro_batch)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert wanted.norm() > 0
    assert kept_less < kept


def test_a_tower_that_can_not_is_named() -> None:
    model = build_dual_encoder(TINY)
    model.image_tower.backbone = torch.nn.Flatten()
    model.image_tower.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ChimeraError, match="the image tower can't compute its activations again"):
        recompute_activations(model)


def test_a_locked_tower_keeps_nothing_anyway() -> None:
    model = build_dual_encoder(TINY)
    model.requires_grad_(False)
    recompute_activations(model)
    assert not model.image_tower.backbone.grad_checkpointing
