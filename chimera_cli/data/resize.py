"""From the pixels of a photo to a square: which part is seen, how it is scaled, turned and padded."""

import threading
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from PIL.Image import Resampling, Transpose

from chimera_cli.data.pack import Fit

if TYPE_CHECKING:
    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

Box = tuple[float, float, float, float]

# What undoes each orientation (Exif 2.32, tag 0x0112).
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
ON_ITS_SIDE = (5, 6, 7, 8)

# A crop begins at a whole or a half pixel of the photo, at a sixteenth when that was decoded at an eighth of its size.
_PARTS = (1, 2, 4, 8, 16)
_LEAST_REDUCTION = 1.5


@dataclass(frozen=True, slots=True)
class Plan:
    """The `box` (left, top, right, bottom) of an image that is seen, and the `inner` width and height it gets."""

    box: Box
    inner: tuple[int, int]

    @property
    def reduction(self) -> tuple[float, float]:
        """Return by how much width and height shrink."""
        left, top, right, bottom = self.box
        return (right - left) / self.inner[0], (bottom - top) / self.inner[1]

    def scaled(self, scale: float) -> "Plan":
        """Return the plan for an image decoded at `scale`, exactly: 3/8 of 375 rows are 140.625, not 141."""
        left, top, right, bottom = (edge * scale for edge in self.box)
        return Plan((left, top, right, bottom), self.inner)


def make_plan(width: int, height: int, size: int, fit: Fit) -> Plan:
    """Return which part of an image becomes a square of `size`, and how large. All fits treat both axes alike.

    So it does not matter that an image is turned upright only after it was scaled.
    """
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return Plan((left, top, left + side, top + side), (size, size))
    whole = (0.0, 0.0, float(width), float(height))
    if fit == "squash":
        return Plan(whole, (size, size))
    longer = max(width, height)
    return Plan(whole, (max(round(width / longer * size), 1), max(round(height / longer * size), 1)))


def finish(scaled: "Image.Image | Pixels", orientation: int, size: int) -> "Pixels":
    """Return a scaled image upright, in RGB and on black: (size, size, 3)."""
    if isinstance(scaled, np.ndarray) and scaled.shape == (size, size, 3) and orientation not in UPRIGHT:
        return scaled
    image = Image.fromarray(scaled) if isinstance(scaled, np.ndarray) else scaled
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    image = image.convert("RGB")
    if image.size != (size, size):
        square = Image.new("RGB", (size, size))
        square.paste(image, (round((size - image.width) / 2), round((size - image.height) / 2)))
        image = square
    return np.asarray(image)


# ---- any image, by Pillow -------------------------------------------------------------------------------------------


def resize(image: Image.Image, plan: Plan) -> Image.Image:
    """Return the part of an RGB or L image that `plan` shows, scaled with Pillow's antialiased bicubic."""
    left, top, right, bottom = plan.box
    width, height = plan.inner
    if width > right - left and height < bottom - top:
        # Pillow goes by rows first: a strip of 1 x 60,000 would be widened in all its rows. Only `squash` does that.
        image = image.resize((image.width, height), Resampling.BICUBIC, box=(0, top, image.width, bottom))
        top, bottom = 0.0, float(height)
    return image.resize((width, height), Resampling.BICUBIC, box=(left, top, right, bottom))


# ---- large images, by torch -----------------------------------------------------------------------------------------


def shrinks(plan: Plan) -> bool:
    """Return whether `shrink` does what `plan` says as well as `resize`: nothing gets larger, something smaller.

    Repeated pixels are little boxes instead of points. At two thirds of the size that makes 1.4 grey levels in white
    noise and 0.3 in photos; nearer to the whole it would be more.
    """
    return min(plan.reduction) >= (_LEAST_REDUCTION if begins_within(plan) else 1) and max(plan.reduction) > 1


def begins_within(plan: Plan) -> bool:
    """Return whether the box begins within a pixel."""
    return bool(plan.box[0] % 1 or plan.box[1] % 1)


def shrink(pixels: "Pixels", plan: Plan) -> "Pixels":
    """Return the part of (height, width, 3) that `plan` shows, scaled down to (inner height, inner width, 3).

    The same antialiased bicubic as `resize`, by torch's kernels for bytes, which take a seventh of the time. They know
    boxes that begin at whole pixels: for one that begins within a pixel, pixels are repeated to finer ones, which
    takes an image of four channels (the last is not looked at).
    """
    _settle()
    left, top, right, bottom = plan.box
    pixels = pixels[floor(top) : ceil(bottom), floor(left) : ceil(right)]
    axes = [(0, top % 1, bottom - top, plan.inner[1]), (1, left % 1, right - left, plan.inner[0])]
    # The axis with the whole pixels first: what is repeated is smaller then.
    for axis, start, extent, length in sorted(axes, key=lambda it: it[1]):
        pixels = _shrink_axis(_finer(pixels, axis, start), axis, extent * _parts(start), length)
    if pixels.shape[2] == 3:
        return pixels
    height, width, _ = pixels.shape
    # Pillow drops the fourth channel in less than half the time that numpy takes.
    return np.asarray(Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1).convert("RGB"))


def work_alone() -> None:
    """Let `shrink` compute on the calling thread alone from now on: for threads to which whole images are shared out.

    By itself torch divides every image among as many threads as there are cores, which costs more than it brings.
    """
    _thread.is_alone = True


class _Thread(threading.local):
    """What is known of a thread: whether it works alone, and whether torch has been told."""

    is_alone = False
    is_settled = False


_thread = _Thread()
_settling = threading.Lock()


def _settle() -> None:
    """Tell torch once that a thread works alone. Not before it is needed: importing torch takes seconds."""
    if not _thread.is_alone or _thread.is_settled:
        return
    import torch

    with _settling:
        for_others = torch.get_num_threads()
        torch.set_num_threads(1)
        # That holds for this thread, and for all that begin later unless another one takes it back.
        another = threading.Thread(target=torch.set_num_threads, args=(for_others,))
        another.start()
        another.join()
    _thread.is_settled = True


def _parts(start: float) -> int:
    """Return into how many parts pixels must be divided for `start` to lie between two of them."""
    return next((parts for parts in _PARTS if start * parts % 1 == 0), _PARTS[-1])


def _finer(pixels: "Pixels", axis: int, start: float) -> "Pixels":
    """Return pixels (height, width, channels) divided along `axis` as `start` wants it, from there on."""
    parts = _parts(start)
    if parts == 1:
        return pixels
    whole = pixels.view(np.int32)[:, :, 0]  # four channels as one number
    height, width = whole.shape
    finer = np.empty((height, parts, width) if axis == 0 else (height, width, parts), dtype=np.int32)
    # One assignment per part takes half the time of numpy.repeat and lets other threads work meanwhile.
    for part in range(parts):
        finer[(slice(None), part) if axis == 0 else (..., part)] = whole
    rows = finer.reshape(height * parts, width) if axis == 0 else finer.reshape(height, width * parts)
    skipped = round(start * parts)
    divided: Pixels = rows[:, :, None].view(np.uint8)
    return divided[skipped:] if axis == 0 else divided[:, skipped:]


def _shrink_axis(pixels: "Pixels", axis: int, extent: float, length: int) -> "Pixels":
    """Return pixels (height, width, channels) with the first `extent` of them along `axis` made `length`."""
    import torch.nn.functional as F
    from torch import from_numpy

    whole = ceil(extent)
    pixels = pixels[:whole] if axis == 0 else pixels[:, :whole]
    images = from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # in this order torch sees that channels come last
    if whole == extent:
        target = [pixels.shape[0], pixels.shape[1]]
        target[axis] = length
        scaled = F.interpolate(images, size=target, mode="bicubic", antialias=True)
    else:
        factors = [1.0, 1.0]
        factors[axis] = length / extent
        scaled = F.interpolate(images, scale_factor=factors, mode="bicubic", antialias=True)
    result: Pixels = scaled[0].permute(1, 2, 0).numpy()
    return result
