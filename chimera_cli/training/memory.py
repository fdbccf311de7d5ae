"""Memory against time: activations that are computed again instead of being kept."""

from typing import Any

from chimera_cli.errors import ChimeraError
from chimera_cli.models.dual_encoder import DualEncoder


def recompute_activations(model: DualEncoder) -> None:
    """Let the towers that learn keep only what goes into each block, and compute the rest again for the gradient.

    With dropout too the gradient is the same: the random numbers are those of the first time (Chen et al. 2016).
    Raises ChimeraError for a tower that can't.
    """
    towers = {"image": model.image_tower, "text": model.text_tower}
    for name, tower in towers.items():
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            continue
        try:
            _switch_on(tower)
        except (AssertionError, AttributeError, ValueError) as error:
            raise ChimeraError(
                f"the {name} tower can't compute its activations again: {error}", "--set checkpointing=false"
            ) from error


def _switch_on(tower: Any) -> None:
    if hasattr(tower, "backbone"):
        tower.backbone.set_grad_checkpointing(True)
        return
    # Named differently before transformers 5.
    encoder = tower.encoder
    encoder.config.use_cache = False  # a cache for generating text, of no use here and at odds with this
    switch = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
    switch({"use_reentrant": False})
