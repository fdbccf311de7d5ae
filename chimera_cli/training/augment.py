"""What the trainer sees of an image: augmented pixels, or a view of its cached features with noise.

Which crop, view and noise a batch gets depends on the seed and on the batch's place in training alone: a run that is
taken up again in the middle goes on as if it had never stopped.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chimera_cli.data.augmentation import Augmentation, augment
from chimera_cli.data.loader import empty_buffer, end_copy, gather
from chimera_cli.training.batches import Place

Indices = NDArray[np.int64]


def noisy_rows(
    views: Tensor,
    seed: int,
    noise: float,
    may_flip: Tensor | None = None,
    *,
    stream: Literal["images", "texts"] = "images",
) -> Callable[[Indices, Place], Tensor]:
    """Return a function (positions, place) -> features (batch, width): a random view of each row, with noise.

    `views` is (n, views, width), or maps (n, views, ...) where there is no noise; where `may_flip` (n,) is false the
    second, the mirrored one, is not shown. The noise is Gaussian with `noise` times the standard deviation of each
    feature, which keeps heads from learning single features by heart. `stream` keeps the noise of captions apart from
    that of images.
    """
    # Without noise nothing but the rows that are picked is ever read: the views may lie in a file.
    scale = noise * views.flatten(0, 1).std(dim=0) if noise else None

    def rows(positions: Indices, place: Place) -> Tensor:
        generator = place.generator(seed, stream)
        index = torch.from_numpy(positions).to(views.device)
        view = torch.randint(views.shape[1], (place.whole,), generator=generator)[place.part].to(views.device)
        if may_flip is not None:
            view = view.masked_fill((view == 1) & ~may_flip.to(views.device)[index], 0)
        picked = views[index, view]
        if scale is None:
            return picked
        drawn = torch.randn((place.whole, views.shape[2]), generator=generator)[place.part]
        return picked + scale * drawn.to(views.device)

    return rows


def augmented_pixels(
    images: NDArray[np.uint8],
    indices: Indices,
    how: Augmentation,
    seed: int,
    device: torch.device,
    may_flip: Tensor | None = None,
) -> Callable[[Indices, Place], Tensor]:
    """Return a function (positions, place) -> normalised pixels (batch, 3, S, S) of the images at indices[positions].

    `may_flip` (n,) says which of them may be mirrored where `how` asks for it; None mirrors any. Only one call may run
    at a time: the pixels are gathered into one buffer.
    """
    buffer = empty_buffer((0, *images.shape[1:]))

    def pixels(positions: Indices, place: Place) -> Tensor:
        nonlocal buffer
        if len(positions) > len(buffer):
            buffer = empty_buffer((len(positions), *images.shape[1:]), pinned=device.type == "cuda")
        end_copy(buffer)
        return augment(
            gather(images, indices[positions], buffer),
            how,
            place.generator(seed, "images"),
            device,
            None if may_flip is None else may_flip[torch.from_numpy(positions)],
            share=(place.whole, place.part),
        )

    return pixels
