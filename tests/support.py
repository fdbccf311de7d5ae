"""What tests and fixtures name: where things lie, small settings, a finished process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
FLICKR8K = REPOSITORY.parent / "shared" / "flickr8k"

# Small towers from scratch: 200 updates take a second, and nothing is read but the packaged vocabulary.
TINY_SANITY = (
    "image.weights=tiny", "text.weights=tiny", "image.image_size=48",
    "optimiser.lr_image=3e-3", "optimiser.lr_text=3e-3",
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    """A finished process."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Chimera = Callable[..., Done]
