"""Batches of uint8 pixels from a memory-mapped pack: gathered ahead by a thread, into buffers that are used again.

numpy lets go of the interpreter's lock while it copies, so one thread is enough to overlap reading with computing.
"""

import queue
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]


def epoch_order(n: int, seed: int, epoch: int, rank: int = 0, world: int = 1) -> Indices:
    """Return the share of process `rank` of `world` in a permutation of 0..n-1 that (seed, epoch) fixes, int64.

    The shares are disjoint and cover everything; their lengths differ by at most one. Batches of b images on each
    process are together the same images as one batch of b * world on a single process.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in 0..{world - 1}")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(n).astype(np.int64, copy=False)[rank::world]


def gather(images: Pixels, indices: Indices, out: Pixels) -> Pixels:
    """Copy `images[indices]` into the front of `out`, (at least len(indices), ...), and return that part of it.

    Raises IndexError for an index outside of 0..len(images)-1.
    """
    if len(indices) and not (indices.min() >= 0 and indices.max() < len(images)):
        raise IndexError(f"indices {indices.min()}..{indices.max()} are not all in 0..{len(images) - 1}")
    part = out[: len(indices)]
    # Any mode but "clip" makes numpy copy through a buffer of its own; the check above has seen to the range.
    np.take(images, indices, axis=0, out=part, mode="clip")
    return part


def image_batches(images: Pixels, indices: Indices, batch: int, prefetch: int = 2) -> Iterator[Pixels]:
    """Yield `images[indices]` in batches (b, S, S, 3) in order, the last one maybe smaller; `prefetch` wait ready.

    A batch is valid until the next one is asked for: its buffer is then filled anew. The thread behind it ends with
    the iterator, also when the consumer stops early or raises; what fails in it is raised here.
    """
    if batch < 1:
        raise ValueError(f"batch {batch} is not positive")
    free: queue.SimpleQueue[Pixels | None] = queue.SimpleQueue()
    ready: queue.SimpleQueue[Pixels | BaseException | None] = queue.SimpleQueue()
    for _ in range(min(prefetch, -(-len(indices) // batch)) + 1):
        free.put(np.empty((batch, *images.shape[1:]), dtype=np.uint8))
    stop = threading.Event()
    work = (images, indices, batch, free, ready, stop)
    thread = threading.Thread(target=_fill, args=work, name="loader", daemon=True)
    thread.start()
    try:
        while (part := ready.get()) is not None:
            if isinstance(part, BaseException):
                raise part
            yield part
            free.put(part if part.base is None else part.base)
    finally:
        stop.set()
        free.put(None)  # wakes the thread where it waits for a buffer
        thread.join()


def _fill(
    images: Pixels,
    indices: Indices,
    batch: int,
    free: "queue.SimpleQueue[Pixels | None]",
    ready: "queue.SimpleQueue[Pixels | BaseException | None]",
    stop: threading.Event,
) -> None:
    """Fill free buffers and hand them over as ready, then None; an exception is handed over likewise."""
    try:
        for start in range(0, len(indices), batch):
            buffer = free.get()
            if buffer is None or stop.is_set():
                return
            ready.put(gather(images, indices[start : start + batch], buffer))
    except Exception as error:  # noqa: BLE001 - raised again in the consumer's thread
        ready.put(error)
        return
    ready.put(None)
