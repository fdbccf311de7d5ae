"""Augmentation of whole batches on the device that holds them; every random choice comes from a passed generator.

Choices are drawn where the generator lives (usually the CPU) and moved, so that a GPU sees the same ones as a CPU.
"""

from collections.abc import Sequence
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(pixels: Tensor) -> Tensor:
    """Return uint8 pixels (batch, H, W, 3) as float32 (batch, 3, H, W) from 0 to 1, channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std by channel; `images` is (batch, 3, H, W) from 0 to 1."""
    shape = (1, len(mean), 1, 1)
    centre = torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape)
    spread = torch.tensor(std, dtype=images.dtype, device=images.device).view(shape)
    # One pass over the pixels instead of two.
    return torch.addcmul(-centre / spread, images, 1 / spread)


def resize(images: Tensor, size: int) -> Tensor:
    """Return images (batch, 3, H, W) from 0 to 1 as (batch, 3, size, size): bicubic, antialiased, clamped."""
    if images.shape[-2:] == (size, size):
        return images
    scaled: Tensor = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return scaled.clamp_(0, 1)


def random_resized_crop(
    images: Tensor,
    size: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Return a random part of each image (batch, 3, H, W), scaled to (batch, 3, size, size).

    The part covers a share of the area uniform in `scale`, its width over height log-uniform in `ratio` (Szegedy et
    al. 2015, as torchvision's RandomResizedCrop) but cut to the image. All parts of a batch are sampled bilinearly at
    the images' resolution first; only then comes the antialiased step down to `size`.
    """
    batch = len(images)
    area, shape, x, y = torch.rand((4, batch), generator=generator, device=generator.device).to(images.device)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = torch.exp(log(ratio[0]) + (log(ratio[1]) - log(ratio[0])) * shape)
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    # In the coordinates of grid_sample the image spans -1 to 1: a part of width w has its centre within -(1-w)..(1-w).
    # A crop needs no rotation, so its grid is an outer sum: built from two lines it costs a fifth of affine_grid.
    side = max(size, min(images.shape[-2:]))
    line = torch.linspace(-1 + 1 / side, 1 - 1 / side, side, dtype=images.dtype, device=images.device)
    columns = width[:, None] * line + ((1 - width) * (2 * x - 1))[:, None]
    rows = height[:, None] * line + ((1 - height) * (2 * y - 1))[:, None]
    shape_2d = (batch, side, side)
    grid = torch.stack((columns[:, None, :].expand(shape_2d), rows[:, :, None].expand(shape_2d)), dim=-1)
    parts = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return resize(parts, size)


def horizontal_flip(
    images: Tensor, generator: torch.Generator, allowed: Tensor | None = None, probability: float = 0.5
) -> Tensor:
    """Return images (batch, 3, H, W), each mirrored with `probability`, but only where `allowed` (batch,) is true.

    `captions.mentions_side` tells which captions forbid it.
    """
    chosen = torch.rand(len(images), generator=generator, device=generator.device).to(images.device) < probability
    if allowed is not None:
        chosen = chosen & allowed.to(images.device)
    mirrored = images.clone()
    mirrored[chosen] = images[chosen].flip(-1)
    return mirrored
