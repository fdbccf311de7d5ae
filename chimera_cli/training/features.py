"""Features of whole splits through a tower, on a CPU with all its cores."""

import itertools
import mmap
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chimera_cli.data.augmentation import Augmentation, augment, cpu_workers, normalise, resize, to_float
from chimera_cli.data.loader import ahead, image_batches, to_device
from chimera_cli.events import Listener, Progress, ignore
from chimera_cli.models.image_tower import ImageTower
from chimera_cli.models.sessions import TOLERANCE
from chimera_cli.models.tokens import Tokens, TokenTable
from chimera_cli.training.batches import Place
from chimera_cli.training.cache import Allocate

Floats = NDArray[np.float32]

# Images prepared at a time. The random crops of a cached view are drawn batch by batch: another number, other crops.
_IMAGES = 64
# Batches between two times that pages of the pack are let go: 150 MB at 224 pixels.
_LET_GO = 16
# Captions that a core or a GPU takes at a time: beyond 32 a core gains 2 % and threads share the work less evenly.
_CAPTIONS = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True, slots=True)
class Views:
    """What is encoded of each image: itself, its mirror image where `mirrored`, then `crops` random ones as `how` says.

    `may_flip` (n,) bool says which images a crop may mirror, None that all may.
    """

    mirrored: bool = False
    crops: int = 0
    how: Augmentation | None = None
    may_flip: Tensor | None = None

    def __len__(self) -> int:
        return 1 + self.mirrored + self.crops


def preprocess(pixels: Tensor, tower: ImageTower, image_size: int) -> Tensor:
    """Return what `tower` takes, (batch, 3, S, S) normalised floats, of uint8 pixels (batch, H, W, 3)."""
    floats: Tensor = normalise(resize(to_float(pixels), image_size), tower.mean, tower.std)
    return floats.contiguous(memory_format=torch.channels_last)


def image_features(
    encode: Callable[[Tensor], Tensor],
    tower: ImageTower,
    images: NDArray[np.uint8],
    indices: NDArray[np.int64],
    *,
    image_size: int,
    device: torch.device,
    views: Views = Views(),
    allocate: Allocate = np.empty,
    dtype: type[np.floating[Any]] = np.float32,
    listener: Listener = ignore,
    stage: str = "image features",
) -> NDArray[Any]:
    """Return what `encode` makes of the images at `indices`: (n, views, dim), in what `allocate` gives.

    Of maps (batch, channels, H, W) it makes (n, views, channels, H, W). Raises OverflowError where half precision is
    asked for and some values are too large or too small for it.

    On a CPU each core encodes one image at a time, which keeps its activations in the core's cache, while the next
    images are made ready.
    """
    result: NDArray[Any] | None = None
    on_cpu = device.type == "cpu"
    encode = _by_image(encode) if on_cpu else encode
    inputs = _inputs(tower, images, indices, image_size, device, views)
    with torch.inference_mode(), closing(ahead(inputs, 1 if on_cpu else 0)) as ready:
        for rows, view, pixels in ready:
            values = _rounded(encode(pixels).float().cpu().numpy(), dtype)
            if result is None:
                result = allocate((len(indices), len(views), *values.shape[1:]), dtype)
            result[rows, view] = values
            done = rows.start * len(views) + len(values) * (view + 1)
            listener(Progress(stage, done // len(views), len(indices), "images"))
    if result is None:
        raise ValueError("no images to compute features of")
    return result


def _inputs(
    tower: ImageTower,
    images: NDArray[np.uint8],
    indices: NDArray[np.int64],
    image_size: int,
    device: torch.device,
    views: Views,
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield the rows of the result, the number of a view, and what `tower` takes of it: view after view of a batch."""
    with torch.inference_mode():
        for number, batch in enumerate(image_batches(images, indices, _IMAGES, pinned=device.type == "cuda")):
            rows = slice(number * _IMAGES, number * _IMAGES + len(batch))
            if number % _LET_GO == 0:
                _let_go(images)
            pixels = to_device(batch, device)
            plain = preprocess(pixels, tower, image_size)
            yield rows, 0, plain
            if views.mirrored:
                yield rows, 1, plain.flip(-1)
            for view in range(1 + views.mirrored, len(views)):
                assert views.how is not None
                # Seed 0 whatever the run's: the seeds of a group share the views.
                generator = Place(view, number, len(batch)).generator(0, "images")
                may_flip = None if views.may_flip is None else views.may_flip[rows]
                yield rows, view, augment(pixels, views.how, generator, device, may_flip)


def _rounded(values: Floats, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Return values (n, ...) in the precision they are kept in.

    Raises OverflowError where half precision changes those of one image or token by more than what a session may be
    off by: in its range it rounds to within 5e-4.
    """
    if dtype != np.float16:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float16)
        lost = (rounded.astype(np.float32) - values).reshape(len(values), -1)
        fits = np.linalg.norm(lost, axis=1) <= TOLERANCE * np.linalg.norm(values.reshape(len(values), -1), axis=1)
    # Written so that a distance which is not a number is none that fits.
    if not fits.all():
        raise OverflowError("some of what the locked part of a tower makes is beyond half precision")
    return rounded


def _let_go(images: NDArray[np.uint8]) -> None:
    """Take what was read of a mapped pack out of this process's memory; the system still has it, if it has room.

    A whole pack counted as this process's own would hide what computing takes: 0.9 GB for 6,000 images of 224 pixels.
    """
    mapped = getattr(images, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _by_image(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `encode` with the images of a batch shared out to the CPU's cores."""
    pool = cpu_workers(torch.get_num_threads())

    def alone(image: Tensor) -> Tensor:
        # What torch records is a setting of each thread.
        with torch.inference_mode():
            return encode(image)

    def whole(pixels: Tensor) -> Tensor:
        return torch.cat(list(pool.map(alone, torch.split(pixels, 1))))

    return whole


class Captions(Protocol):
    """Captions that can be taken in batches in any order: tokens, or the hidden states made of them."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each caption, (captions,)."""

    def batch(self, rows: NDArray[np.int64]) -> Tokens:
        """Return the captions `rows`, padded to the longest of them."""


def caption_features(
    encode: Callable[[Tokens], Tensor],
    captions: Captions,
    *,
    device: torch.device,
    allocate: Allocate = np.empty,
    listener: Listener = ignore,
    stage: str = "caption features",
) -> Floats:
    """Return what `encode` makes of captions: (n, dim), in what `allocate` gives.

    Batches are of similar length, so that little is padding. On a CPU each core takes batches of its own, of captions
    of one length: nothing is padding.
    """
    result: Floats | None = None
    for rows, values in _encoded(encode, captions, device, listener, stage):
        if result is None:
            result = allocate((len(captions.lengths), values.shape[1]), np.float32)
        result[rows] = values.float().cpu().numpy()
    if result is None:
        raise ValueError("no captions to compute features of")
    return result


def caption_states(
    encode: Callable[[Tokens], Tensor],
    table: TokenTable,
    *,
    device: torch.device,
    allocate: Allocate = np.empty,
    listener: Listener = ignore,
    stage: str = "caption states",
) -> NDArray[np.float16]:
    """Return the hidden states (batch, tokens, width) that `encode` makes of captions, without padding, end to end.

    (all tokens, width), in the order of the table and in half precision, whose rounding changes sentence features by
    2e-4 of their length: half the size on disk. Raises OverflowError where some are too large or too small for it.
    """
    result: NDArray[np.float16] | None = None
    for rows, values in _encoded(encode, table, device, listener, stage):
        if result is None:
            result = allocate((len(table.ids), values.shape[2]), np.float16)
        real, places = table.places(rows)
        result[places] = _rounded(values.float().cpu().numpy()[real], np.float16)
    if result is None:
        raise ValueError("no captions to compute states of")
    return result


def _encoded(
    encode: Callable[[Tokens], Tensor], captions: Captions, device: torch.device, listener: Listener, stage: str
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield rows and what `encode` makes of them, until there were all."""
    batches = _batches_by_length(captions.lengths, _CAPTIONS[device.type], mixed=device.type != "cpu")

    def encoded(rows: NDArray[np.int64]) -> Tensor:
        with torch.inference_mode():
            tokens = captions.batch(rows)
            return encode({name: part.to(device, non_blocking=True) for name, part in tokens.items()})

    on_cpu = device.type == "cpu"
    parts = (cpu_workers(torch.get_num_threads()).map if on_cpu else map)(encoded, batches)
    done, total = 0, len(captions.lengths)
    for rows, values in zip(batches, parts, strict=True):
        yield rows, values
        done += len(rows)
        listener(Progress(stage, done, total, "captions"))


def _batches_by_length(lengths: NDArray[np.int64], batch: int, mixed: bool) -> list[NDArray[np.int64]]:
    """Return all rows in batches, the longest first: of one length, or `mixed` with the next shorter ones.

    Short ones last: then no core has much to do when the others have finished.
    """
    order = np.argsort(-lengths, kind="stable")
    edges = [0, len(order)] if mixed else [0, *(np.flatnonzero(np.diff(lengths[order])) + 1), len(order)]
    return [
        order[start : min(start + batch, last)]
        for first, last in itertools.pairwise(edges)
        for start in range(first, last, batch)
    ]
