"""Augmentation of batches: random resized crop, flip, colour jitter and normalisation, on a GPU or on the CPU's cores.

All random numbers of a batch are drawn at once from a passed generator: a GPU sees the same crops as a CPU, and a flip
switched on moves no crop.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from math import gcd, log
from threading import Barrier

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from chimera_cli.data.loader import empty_buffer, to_device

# torchvision's RandomResizedCrop draws up to ten boxes and takes the first that fits.
_TRIES = 10
# Per image: the area and the shape of each try, the place of the box down and across, the flip, three colour factors.
_DRAWS = 2 * _TRIES + 6
# Of grey in red, green, blue, ITU-R BT.601: what Pillow's and torchvision's colour operations use.
_GREY = (0.299, 0.587, 0.114)
# Images a thread takes at a time: few enough to share the work evenly between the threads.
_RUN = 8
# Numbers in float at once on a GPU, 66 images of 224 pixels: they and what is made of them take about 200 MB.
_CHUNK = 10_000_000


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to images of uint8: a random box of them, scaled to `size` pixels square, maybe mirrored, as floats.

    The box covers a share of the area uniform in [crop_scale, 1], its width over height is log-uniform in `ratio`; with
    `crop_scale` 1 it is the whole image. `colour_jitter` s multiplies brightness, contrast and saturation by factors
    uniform in [1 - s, 1 + s]. The result is (pixels / 255 - mean) / std.
    """

    size: int
    crop_scale: float = 1.0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    colour_jitter: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        """Refuse shares outside their range."""
        if not (0 < self.crop_scale <= 1 and 0 <= self.colour_jitter < 1):
            raise ValueError(f"crop_scale {self.crop_scale} is not in (0, 1], or jitter {self.colour_jitter} in [0, 1)")


def augment(
    pixels: NDArray[np.uint8] | Tensor,
    how: Augmentation,
    generator: torch.Generator,
    device: torch.device,
    may_flip: Tensor | None = None,
    threads: int | None = None,
    *,
    out: Tensor | None = None,
    share: tuple[int, slice | NDArray[np.int64]] | None = None,
) -> Tensor:
    """Return (batch, 3, size, size) float32, normalised and channels last, of uint8 pixels (batch, H, W, 3).

    `may_flip` (batch,) bool says which images may be mirrored, None that all may. On a GPU the whole batch is computed
    at once; on the CPU image by image in `threads` threads (None: as many as torch computes with), by bicubic kernels
    for uint8 whose result is rounded to whole grey levels, as Pillow's is. `out`, such as an earlier result, takes the
    floats on the CPU; new memory for every batch costs time. Where several processes share a batch of n images,
    `share` is (n, which of them these images are): they get what they would get in the whole batch.
    """
    count, part = share or (len(pixels), slice(None))
    draws = torch.rand((_DRAWS, count), generator=generator, device=generator.device).cpu()[:, part]
    if draws.shape[1] != len(pixels):
        raise ValueError(f"{len(pixels)} images are not the share of {draws.shape[1]}")
    boxes = crop_boxes(draws[: 2 * _TRIES + 2], how, pixels.shape[1], pixels.shape[2])
    flips = (draws[-4] < 0.5) & how.flip
    if may_flip is not None:
        flips &= may_flip.cpu()
    factors = 1 + how.colour_jitter * (2 * draws[-3:] - 1) if how.colour_jitter else None
    batch = to_device(pixels, device) if isinstance(pixels, np.ndarray) else pixels.to(device, non_blocking=True)
    if device.type == "cpu":
        return augment_each(batch, how, boxes, flips, factors, threads or torch.get_num_threads(), out)
    return augment_together(batch, how, boxes, flips, factors)


# ---- choices --------------------------------------------------------------------------------------------------------


def crop_boxes(draws: Tensor, how: Augmentation, height: int, width: int) -> Tensor:
    """Return a box (top, left, height, width) in whole pixels for each column of `draws` (22, batch): (batch, 4) int64.

    `draws` are uniform in 0..1. The distribution is that of torchvision's RandomResizedCrop, which open_clip trains
    with (Szegedy et al. 2015): the first of ten tries that fits into the image, else the largest centred box whose
    shape is allowed.
    """
    batch = draws.shape[1]
    if how.crop_scale == 1:
        return torch.tensor([0, 0, height, width]).repeat(batch, 1)
    draws = draws.double()
    area = height * width * (how.crop_scale + (1 - how.crop_scale) * draws[:_TRIES])
    low, high = log(how.ratio[0]), log(how.ratio[1])
    aspect = torch.exp(low + (high - low) * draws[_TRIES : 2 * _TRIES])
    heights, widths = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    # argmax gives the first of equal values: the first try that fits.
    first = fits.int().argmax(dim=0, keepdim=True)
    tall, wide = heights.gather(0, first)[0], widths.gather(0, first)[0]
    top = (draws[2 * _TRIES] * (height - tall + 1)).floor()
    left = (draws[2 * _TRIES + 1] * (width - wide + 1)).floor()
    boxes = torch.stack((top, left, tall, wide), dim=1).long()
    boxes[~fits.any(dim=0)] = torch.tensor(_centred(how.ratio, height, width))
    return boxes


def _centred(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    tall = min(height, round(width / ratio[0]))
    wide = min(width, round(height * ratio[1]))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


# ---- on the CPU, image by image -------------------------------------------------------------------------------------


def augment_each(
    pixels: Tensor,
    how: Augmentation,
    boxes: Tensor,
    flips: Tensor,
    factors: Tensor | None,
    threads: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return what `augment` does, with its choices made: `boxes` (batch, 4), `flips` (batch,), `factors` (3, batch)."""
    shape = (len(pixels), how.size, how.size, 3)
    # Memory from numpy, so that threads may write into it also where the caller is in inference mode.
    floats = _float_buffer(shape) if out is None else out.permute(0, 2, 3, 1).numpy()
    if floats.shape != shape or floats.dtype != np.float32 or not floats.flags.c_contiguous:
        raise ValueError(f"out is not float32 {(len(pixels), 3, how.size, how.size)}, channels last")
    choices = list(zip(boxes.tolist(), flips.tolist(), strict=True))
    colour = _straight(how) if factors is None else _jittered(how, factors)

    def work(start: int) -> None:
        for k in range(start, min(start + _RUN, len(choices))):
            rows = torch.from_numpy(floats[k]).view(how.size, how.size * 3)
            colour(k, _part(pixels[k], *choices[k], how.size), rows)

    list(cpu_workers(threads).map(work, range(0, len(choices), _RUN)))
    return torch.from_numpy(floats).permute(0, 3, 1, 2)


def _float_buffer(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return empty_buffer((*shape[:-1], 4 * shape[-1])).view(np.float32)


def _part(image: Tensor, box: Sequence[int], mirrored: bool, size: int) -> Tensor:
    """Return the box of an image (H, W, 3) uint8, scaled with antialiased bicubic: (size, size * 3) uint8."""
    top, left, height, width = box
    # One image with a dimension of its own before the channels move is what torch takes for channels last.
    part = image[top : top + height, left : left + width].unsqueeze(0).permute(0, 3, 1, 2)
    if mirrored:
        part = part.flip(-1)
    if (height, width) != (size, size):
        part = F.interpolate(part, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return part[0].permute(1, 2, 0).reshape(size, size * 3)


def _straight(how: Augmentation) -> Callable[[int, Tensor, Tensor], None]:
    """Return what normalises image k from uint8 rows (size, size * 3) into rows of floats."""
    # Whole rows of constants: with one value per channel torch would not use vector instructions.
    scale, shift = (part.repeat(how.size) for part in _affine(how, torch.device("cpu")))

    def colour(_k: int, part: Tensor, rows: Tensor) -> None:
        torch.addcmul(shift, rows.copy_(part), scale, out=rows)

    return colour


def _jittered(how: Augmentation, factors: Tensor) -> Callable[[int, Tensor, Tensor], None]:
    """Return what jitters and normalises image k from uint8 rows (size, size * 3) into rows of floats."""
    matrices, gains = colour_maps(how, factors)
    scale, shift = _affine(how, factors.device)
    low, high = shift.repeat(how.size), (shift + 255 * scale).repeat(how.size)
    grey_of = (torch.tensor(_GREY) / how.size**2).repeat(how.size)
    # One product maps several pixels by a matrix in blocks: four times as fast as (pixels, 3) @ (3, 3).
    block = gcd(how.size**2, 4)
    maps = torch.einsum("ab,nij->naibj", torch.eye(block), matrices.mT).reshape(-1, 3 * block, 3 * block)

    def colour(k: int, part: Tensor, rows: Tensor) -> None:
        levels = part.float()
        offset = shift + gains[k] * (levels.sum(dim=0) @ grey_of)
        width = 3 * block
        torch.addmm(offset.repeat(block), levels.view(-1, width), maps[k], out=rows.view(-1, width))
        torch.clamp(rows, low, high, out=rows)

    return colour


@lru_cache
def cpu_workers(threads: int) -> ThreadPoolExecutor:
    """Return threads in which torch starts no threads of its own: images are shared out, not their pixels."""
    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "cpu", initializer=partial(torch.set_num_threads, 1))
    # The setting is the thread's own, but threads that start later begin with it too: once all are up it is put back.
    all_up = Barrier(threads)
    list(pool.map(lambda _: all_up.wait(), range(threads)))
    torch.set_num_threads(own)
    return pool


# ---- on a GPU, the batch at once ------------------------------------------------------------------------------------


def augment_together(pixels: Tensor, how: Augmentation, boxes: Tensor, flips: Tensor, factors: Tensor | None) -> Tensor:
    """Return the same as `augment_each` but for its rounding, computed on the device of `pixels` in float32.

    Scaling is linear along each side, so that a crop, its antialiased bicubic scaling and the flip of an image are two
    matrices: rows (size, H) before and columns (W, size) behind it.
    """
    device, size = pixels.device, how.size
    floats = torch.empty((len(pixels), size, size, 3), device=device).permute(0, 3, 1, 2)
    scale, shift = (part.view(1, 3, 1, 1) for part in _affine(how, device))
    step = max(1, _CHUNK // (3 * max(pixels.shape[1] * pixels.shape[2], size**2)))
    for first in range(0, len(pixels), step):
        last = min(first + step, len(pixels))
        top, left, tall, wide = boxes[first:last].to(device).unbind(1)
        images = pixels[first:last].float()
        count, height, width, _ = images.shape
        rows = _bicubic(top, tall, height, size)
        columns = _bicubic(left, wide, width, size)
        columns = torch.where(flips[first:last].to(device)[:, None, None], columns.flip(1), columns)
        lines = (rows @ images.view(count, height, width * 3)).view(count, size, width, 3)
        # (batch, 3 * size, W) @ (batch, W, size): one large product per image instead of three small ones.
        parts = lines.permute(0, 3, 1, 2).reshape(count, 3 * size, width) @ columns.transpose(1, 2)
        parts = parts.clamp_(0, 255).view(count, 3, size, size)
        if factors is None:
            floats[first:last] = torch.addcmul(shift, parts, scale)
        else:
            floats[first:last] = _colour_together(parts, how, factors[:, first:last].to(device))
    return floats


def _colour_together(levels: Tensor, how: Augmentation, factors: Tensor) -> Tensor:
    """Return images (batch, 3, S, S) of grey levels 0..255 jittered and normalised."""
    matrices, gains = colour_maps(how, factors)
    scale, shift = _affine(how, levels.device)
    grey = levels.mean(dim=(2, 3)) @ torch.tensor(_GREY, device=levels.device)
    offsets = (shift + gains * grey[:, None]).unsqueeze(-1)
    floats = torch.baddbmm(offsets, matrices, levels.flatten(2)).view_as(levels)
    return floats.clamp(shift.view(1, 3, 1, 1), (shift + 255 * scale).view(1, 3, 1, 1))


def _bicubic(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """Return matrices (batch, size, full) that scale pixels start..start+length-1 of a line of `full` to `size`.

    The kernel is Keys' cubic with a = -0.5 (1981), stretched where it makes lines shorter: what Pillow and torch's
    antialiased scaling use. Pixels outside of the box have no say.
    """
    device = start.device
    begin, extent = start.float()[:, None, None], length.float()[:, None, None]
    step = extent / size
    centre = begin + step * (torch.arange(size, device=device) + 0.5)[None, :, None]
    pixel = (torch.arange(full, device=device) + 0.5)[None, None, :]
    d = ((pixel - centre) / step.clamp(min=1)).abs()
    weight = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
    weight = weight * ((d < 2) & (pixel > begin) & (pixel < begin + extent))
    return weight / weight.sum(dim=-1, keepdim=True)


# ---- colours --------------------------------------------------------------------------------------------------------


def colour_maps(how: Augmentation, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices (batch, 3, 3) and gains (batch, 3): how `factors` (3, batch) and normalisation change colours.

    A pixel x of grey levels 0..255 becomes matrix @ x + gain * mean grey of its image - mean / std. The factors of
    brightness, contrast (the distance from the mean grey) and saturation (the distance from the pixel's grey) mean
    what they mean in torchvision; but the three are one linear map, and values are cut to black and white once.
    """
    brightness, contrast, saturation = factors
    scale, _ = _affine(how, factors.device)
    grey = torch.tensor(_GREY, device=factors.device).expand(3, 3)
    own = torch.eye(3, device=factors.device)
    mixed = torch.lerp(grey, own, saturation[:, None, None])
    matrices = (brightness * contrast)[:, None, None] * mixed * scale[:, None]
    return matrices, (brightness * (1 - contrast))[:, None] * scale


def _affine(how: Augmentation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift (3,) that normalise grey levels from 0 to 255."""
    mean, std = (torch.tensor(part, dtype=torch.float32, device=device) for part in (how.mean, how.std))
    return 1 / (255 * std), -mean / std


# ---- whole images ---------------------------------------------------------------------------------------------------


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
