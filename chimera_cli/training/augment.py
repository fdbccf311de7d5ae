"""What the trainer sees of an image: augmented pixels, or a view of its cached features with noise."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chimera_cli.data.augmentation import horizontal_flip, normalise, random_resized_crop, resize, to_float
from chimera_cli.data.loader import gather
from chimera_cli.models.image_tower import ImageTower

Indices = NDArray[np.int64]


def noisy_rows(
    views: Tensor, generator: torch.Generator, noise: float, may_flip: Tensor | None = None
) -> Callable[[Indices, int], Tensor]:
    """Return a function (positions, epoch) -> features (batch, width): a random view of each row, with noise.

    `views` is (n, views, width); where `may_flip` (n,) is false only the first is shown. The noise is Gaussian with
    `noise` times the standard deviation of each feature, which keeps heads from learning single features by heart.
    """
    scale = noise * views.flatten(0, 1).std(dim=0)

    def rows(positions: Indices, _epoch: int) -> Tensor:
        index = torch.from_numpy(positions).to(views.device)
        view = torch.randint(views.shape[1], index.shape, generator=generator).to(views.device)
        if may_flip is not None:
            view = view * may_flip.to(views.device)[index]
        picked = views[index, view]
        if noise == 0:
            return picked
        return picked + scale * torch.randn(picked.shape, generator=generator).to(views.device)

    return rows


def augmented_pixels(
    images: NDArray[np.uint8],
    indices: Indices,
    tower: ImageTower,
    image_size: int,
    device: torch.device,
    generator: torch.Generator,
    *,
    crop_scale: float,
    may_flip: Tensor | None,
) -> Callable[[Indices, int], Tensor]:
    """Return a function (positions, epoch) -> normalised pixels (batch, 3, S, S), cropped and flipped at random.

    `may_flip` (n,) says which images may be mirrored; None mirrors none.
    """

    def pixels(positions: Indices, _epoch: int) -> Tensor:
        rows = indices[positions]
        buffer = np.empty((len(rows), *images.shape[1:]), dtype=np.uint8)
        batch = to_float(torch.from_numpy(gather(images, rows, buffer)).to(device, non_blocking=True))
        if crop_scale < 1:
            batch = random_resized_crop(batch, image_size, generator, scale=(crop_scale, 1.0))
        else:
            batch = resize(batch, image_size)
        if may_flip is not None:
            batch = horizontal_flip(batch, generator, may_flip[torch.from_numpy(positions)])
        floats: Tensor = normalise(batch, tower.mean, tower.std)
        return floats.contiguous(memory_format=torch.channels_last)

    return pixels
