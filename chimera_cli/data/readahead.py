"""The images of batches to come, read from disk by several threads before the loader asks for them.

A pack is mapped into memory: what is not in the system's cache yet is read, page by page, when it is first touched. One
thread waits for each page; several keep as many reads under way as a disk can take.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Item = TypeVar("Item")


def read_ahead(
    items: Iterator[Item], images: NDArray[np.uint8], order: Iterator[Indices], threads: int, depth: int = 4
) -> Generator[Item, None, None]:
    """Yield `items` as they are; meanwhile `threads` threads read the images of the next `depth` batches.

    `order` gives the indices into `images` of batch after batch, from that of the first item on. Where reading lags
    behind, further batches are left to the loader. The threads end with the iterator.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    under_way: deque[list[Future[None]]] = deque()

    def begin() -> None:
        indices = next(order, None)
        while under_way and all(part.done() for part in under_way[0]):
            under_way.popleft()
        if indices is not None and len(under_way) < depth:
            under_way.append([pool.submit(_touch, images, part) for part in np.array_split(indices, threads)])

    try:
        for _ in range(depth):
            begin()
        for item in items:
            yield item
            begin()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _touch(images: NDArray[np.uint8], indices: Indices) -> None:
    """Copy image after image into the same place: the interpreter's lock is free while a page is read."""
    scratch = np.empty(images.shape[1:], dtype=images.dtype)
    for index in indices:
        np.copyto(scratch, images[index])
