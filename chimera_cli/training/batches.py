"""From a pack to batches of pairs: one caption per image and epoch, in an order that seed and epoch alone decide."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chimera_cli.data.loader import epoch_order
from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.models.text_tower import Tokens

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """`image`: pooled features (batch, width) of a locked tower, or normalised pixels (batch, 3, S, S).

    `text`: pooled features (batch, width) of a locked tower, or tokens. `image_ids`: (batch,), equal for equal images.
    """

    epoch: int
    image: Tensor
    text: Tensor | Tokens
    image_ids: Tensor

    def __len__(self) -> int:
        return len(self.image_ids)


def pair_order(
    captions_by_image: list[Indices], batch: int, seed: int, epoch: int
) -> Iterator[tuple[Indices, Indices]]:
    """Yield (image positions, caption rows) of one epoch: every image once, with one of its captions at random.

    The batches are as even as can be, so that no tail of one or two pairs makes a step of its own.
    """
    order = epoch_order(len(captions_by_image), seed, epoch)
    choices = np.random.default_rng(np.random.SeedSequence([seed, epoch, 1]))
    count = max(1, round(len(order) / batch))
    for positions in np.array_split(order, count):
        rows = [
            captions_by_image[position][choices.integers(len(captions_by_image[position]))] for position in positions
        ]
        yield positions, np.asarray(rows, dtype=np.int64)


def pair_batches(
    captions_by_image: list[Indices],
    image_ids: Indices,
    images: Callable[[Indices, int], Tensor],
    texts: Callable[[Indices], Tensor | Tokens],
    *,
    batch: int,
    seed: int,
    device: torch.device,
) -> Iterator[PairBatch]:
    """Yield batches without end, epoch after epoch.

    `images` gives the images at positions in an epoch, `texts` the captions of rows; `image_ids` is (images,).
    """
    epoch = 0
    while True:
        for positions, rows in pair_order(captions_by_image, batch, seed, epoch):
            ids = torch.from_numpy(image_ids[positions]).to(device)
            yield PairBatch(epoch, images(positions, epoch), texts(rows), ids)
        epoch += 1


def embed_pairs(model: DualEncoder, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Return image_features and text_features, both (batch, dim) and L2-normalised."""
    image = model.project_image(batch.image) if batch.image.ndim == 2 else model.encode_image(batch.image)
    text = model.project_text(batch.text) if isinstance(batch.text, Tensor) else model.encode_text(batch.text)
    return image, text
