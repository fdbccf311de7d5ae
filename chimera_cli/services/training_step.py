"""The real training step by itself, for what measures the loader that feeds it."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from chimera_cli.config import TrainConfig
from chimera_cli.errors import ChimeraError
from chimera_cli.services.inputs import Workbench
from chimera_cli.services.learning import architecture_of, fresh_model, new_learner, run_loop

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from chimera_cli.data.pack import Pack
    from chimera_cli.models.dual_encoder import DualEncoder
    from chimera_cli.training.batches import PairBatch

# More updates than any benchmark makes; the learning rate of so long a run is still warming up.
_ENDLESS = 1_000_000


def make_training_step(
    config: TrainConfig, pack: "Pack", device: "torch.device"
) -> "tuple[Callable[[Tensor], PairBatch], Callable[[Iterator[PairBatch]], None]]":
    """Return what makes a batch of normalised pixels (batch, 3, S, S) one of pairs, and what trains until these end.

    For the loader's benchmark: it is the loop, the loss and the optimiser of training. A locked image tower runs
    without gradients, as it does when its features are computed; a locked text tower's features are computed once. The
    captions are the first ones of the pack: what a step costs does not depend on which they are. Raises ChimeraError
    for a pack without captions.
    """
    import torch

    from chimera_cli.runtime import device_capability, pick_precision
    from chimera_cli.training.batches import PairBatch

    shape = architecture_of(config.image, config.text, config.heads, config.loss, flipped_view=False)
    model = fresh_model(shape, 0, device, config.checkpointing)
    bench = Workbench(pack, device, pick_precision(config.precision, device_capability(device)))
    captions, count = _first_captions(model, pack, device), config.captions_per_image

    def pairs(pixels: "Tensor") -> PairBatch:
        text = captions(count * len(pixels))
        rows = torch.arange(len(pixels), device=device).repeat_interleave(count)
        return PairBatch(0, pixels, text, rows, image_rows=rows if count > 1 else None)

    def run(batches: "Iterator[PairBatch]") -> None:
        # The batches decide when it ends, not the number of updates.
        with suppress(StopIteration):
            run_loop(
                new_learner(model, config.optimiser, bench, _ENDLESS, config.ema),
                batches,
                config.loss,
                bench,
                updates=_ENDLESS,
                clip_norm=config.optimiser.clip_norm,
                micro_batch=config.micro_batch,
            )

    return pairs, run


def _first_captions(
    model: "DualEncoder", pack: "Pack", device: "torch.device"
) -> "Callable[[int], Tensor | dict[str, Tensor]]":
    """Return what gives n captions, tokenised anew each time or as features of a locked tower."""
    import torch

    texts = pack.captions("train").texts
    if not texts:
        raise ChimeraError(
            f"the pack {pack.name} has no captions in its train split", "a training step needs them: leave out --config"
        )
    known: dict[int, Tensor] = {}

    def tokens(count: int) -> "dict[str, Tensor]":
        encoded = model.tokenise([texts[row % len(texts)] for row in range(count)])
        return {name: part.to(device, non_blocking=True) for name, part in encoded.items()}

    def captions(count: int) -> "Tensor | dict[str, Tensor]":
        if model.architecture.learn_layers != 0:
            return tokens(count)
        if count not in known:
            with torch.no_grad():
                known[count] = model.text_tower(tokens(count)).float()
        return known[count]

    return captions
