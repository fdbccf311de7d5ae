"""Configurations: frozen pydantic models read from complete YAML files, changed by `--set key=value`."""

from chimera_cli.config.loading import differences, load_config, parse_seeds, read_yaml, validate
from chimera_cli.config.training import (
    Augmentation,
    Heads,
    ImageTower,
    Loss,
    Optimiser,
    SanityConfig,
    TextTower,
    TrainConfig,
)

__all__ = [
    "Augmentation",
    "Heads",
    "ImageTower",
    "Loss",
    "Optimiser",
    "SanityConfig",
    "TextTower",
    "TrainConfig",
    "differences",
    "load_config",
    "parse_seeds",
    "read_yaml",
    "validate",
]
