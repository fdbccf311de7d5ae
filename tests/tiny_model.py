"""The smallest model there is, for tests."""

from chimera_cli.models.dual_encoder import Architecture

TINY = Architecture(
    image_weights="tiny",
    image_size=32,
    image_locked=False,
    flipped_view=False,
    text_weights="tiny",
    learn_layers=None,
    max_tokens=16,
    head="linear",
    hidden=16,
    dim=8,
    dropout=0.0,
    temperature=0.07,
)
