"""The ladder: published retrieval figures on the 1,000-image Flickr8k test set, from chance to CLIP.

Rows are test figures and stand only beside test figures. All but the last are reached with Flickr8k's pairs alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from chimera_cli.figures import RECALLS

# Where a run may be placed on the ladder: another test set or gallery makes the figures incomparable.
PACK_SOURCE = "flickr8k"
TEST_IMAGES = 1000


@dataclass(frozen=True, slots=True)
class Rung:
    """One row: recalls as fractions by figure name (a figure the source does not give is absent)."""

    id: str
    name: str
    source: str
    kind: Literal["chance", "law", "published", "orientation"]
    figures: Mapping[str, float] = field(default_factory=dict)


def _percent(*values: float | None) -> Mapping[str, float]:
    """Return i2t R@1/5/10 and t2i R@1/5/10, given in percent, as fractions by figure name."""
    pairs = zip(RECALLS, values, strict=True)
    return MappingProxyType({name: round(value / 100, 6) for name, value in pairs if value is not None})


LADDER: tuple[Rung, ...] = (
    Rung("chance", "chance", "a random order of 1,000 images", "chance", _percent(0.1, 0.5, 1.0, 0.1, 0.5, 1.0)),
    Rung("law", "the viability law", "configs/slo.yaml", "law", _percent(5.0, None, 25.0, 5.0, None, 25.0)),
    Rung(
        "cca",
        "CCA on frozen features",
        "Klein et al. 2015",
        "published",
        _percent(22.6, 48.8, 61.2, 19.1, 45.3, 60.4),
    ),
    Rung(
        "mini-clip",
        "mini-CLIP with ResNet-18",
        "MINI-CLIP-VLM",
        "published",
        _percent(23.4, 50.8, 64.2, 17.3, 43.1, 56.9),
    ),
    Rung(
        "clip",
        "zero-shot CLIP ViT-B/32 (400 million pairs)",
        "Radford et al. 2021, for orientation",
        "orientation",
        _percent(68.2, 88.4, 94.6, 51.1, 77.9, 86.4),
    ),
)


def gaps(rung: Rung, figures: Mapping[str, float]) -> dict[str, float]:
    """Return how far `figures` stand above (+) or below (-) each figure of the rung, in fractions."""
    return {name: figures[name] - value for name, value in rung.figures.items() if name in figures}


def next_rung(figures: Mapping[str, float]) -> Rung | None:
    """Return the lowest rung of which at least one figure is not reached yet; None above all of them."""
    for rung in LADDER:
        distances = gaps(rung, figures)
        if len(distances) < len(rung.figures) or any(distance < 0 for distance in distances.values()):
            return rung
    return None


def comparable(pack_source: str, split: str, images: int) -> bool:
    """Return whether figures may stand beside the ladder: Flickr8k's whole test split and nothing else."""
    return pack_source == PACK_SOURCE and split == "test" and images == TEST_IMAGES
