"""What a usual loader reads: the images of a pack as JPEG files, with a CSV and tar shards beside them."""

import csv
import io
import itertools
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from chimera_cli.events import Listener, Progress, ignore
from chimera_cli.runtime import cpu_cores
from chimera_cli.services.bench_prepare import PHOTO_BYTES, PHOTO_HEIGHT, PHOTO_WIDTH, encode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

PACK_QUALITY = 80
_QUALITIES = range(30, 99)
# Grey levels (standard deviation) of the grain: without it an enlarged image compresses far better than a photo.
_GRAIN = 12.0
_SAMPLE = 32
_PER_SHARD = 100
_AHEAD = 8


@dataclass(frozen=True, slots=True)
class Photos:
    """JPEG files in `folder` of width x height pixels; their mean size in kB (1,000 bytes), and their quality."""

    folder: Path
    paths: tuple[Path, ...]
    mean_kb: float
    width: int
    height: int
    quality: int


def write_photos(
    images: "Pixels", indices: Sequence[int], folder: Path, original_size: bool, tell: Listener = ignore
) -> Photos:
    """Write `images[indices]` as JPEG files, at their own size or enlarged to that of the original photos.

    Enlarged ones are bicubic with a little grain, as many bytes as the originals in the mean. Raises OSError where the
    disk is full.
    """
    quality = PACK_QUALITY
    if original_size:
        quality = fitting_quality([images[row] for row in indices[:: max(1, len(indices) // _SAMPLE)]])
    works = (
        partial(photo, images[row], quality, row) if original_size else partial(encode, images[row], quality)
        for row in indices
    )
    paths, total = [], 0
    for number, content in enumerate(_in_threads(works)):
        paths.append(folder / f"{number:06d}.jpg")
        paths[-1].write_bytes(content)
        total += len(content)
        tell(Progress("writing JPEG files", number + 1, len(indices), "files"))
    width, height = (PHOTO_WIDTH, PHOTO_HEIGHT) if original_size else (images.shape[2], images.shape[1])
    return Photos(folder, tuple(paths), total / len(paths) / 1000, width, height, quality)


def fitting_quality(sample: "Sequence[Pixels]", target: int = PHOTO_BYTES) -> int:
    """Return the JPEG quality at which the enlarged images of `sample` have a mean size nearest to `target` bytes."""

    def mean_bytes(quality: int) -> float:
        return sum(len(photo(pixels, quality, number)) for number, pixels in enumerate(sample)) / len(sample)

    # The size grows with the quality: the interval is halved until two neighbours are left.
    low, high = _QUALITIES[0], _QUALITIES[-1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean_bytes(middle) < target else (low, middle)
    return min((low, high), key=lambda quality: abs(mean_bytes(quality) - target))


def photo(pixels: "Pixels", quality: int, seed: int) -> bytes:
    """Return pixels (H, W, 3) as a JPEG of 500 x 375 with grain that `seed` decides."""
    import numpy as np
    from PIL import Image

    enlarged = Image.fromarray(pixels).resize((PHOTO_WIDTH, PHOTO_HEIGHT), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(seed).standard_normal((PHOTO_HEIGHT, PHOTO_WIDTH, 1), dtype=np.float32)
    grainy = np.asarray(enlarged) + np.rint(_GRAIN * grain).astype(np.int16)
    return encode(np.clip(grainy, 0, 255).astype(np.uint8), quality)


def write_csv(photos: Photos) -> Path:
    """Write the table that open_clip reads, tab-separated `filepath` and `title`, and return its path."""
    path = photos.folder / "photos.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("filepath", "title"))
        writer.writerows((photo, f"photo {number}") for number, photo in enumerate(photos.paths))
    return path


def write_shards(photos: Photos, tell: Listener = ignore) -> list[Path]:
    """Write tar shards of 100 photos each as img2dataset does, key.jpg beside key.txt, and return their paths."""
    paths = []
    for number, start in enumerate(range(0, len(photos.paths), _PER_SHARD)):
        paths.append(photos.folder / f"{number:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for path in photos.paths[start : start + _PER_SHARD]:
                tar.add(path, path.name)
                text = f"photo {path.stem}".encode()
                member = tarfile.TarInfo(f"{path.stem}.txt")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
        tell(Progress("writing shards", min(start + _PER_SHARD, len(photos.paths)), len(photos.paths), "files"))
    return paths


def _in_threads(works: "Iterator[Callable[[], bytes]]") -> Iterator[bytes]:
    """Yield what the works return, in order, by one thread per core; a few are ahead."""
    waiting: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(cpu_cores(), thread_name_prefix="jpeg")
    try:
        waiting.extend(pool.submit(work) for work in itertools.islice(works, _AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work) for work in itertools.islice(works, 1))
    finally:
        pool.shutdown(cancel_futures=True)
