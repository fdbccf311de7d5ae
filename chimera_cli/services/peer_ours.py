"""Our own loaders as contestants beside the peers, and a bare loop over the same files."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.events import Listener, Progress
from chimera_cli.services.bench_common import percentiles_ms

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from chimera_cli.data.pack import Pack
    from chimera_cli.services.bench_loader import LoaderSetting
    from chimera_cli.services.peer_files import Photos

GATHER = "gather only"
EQUAL = "equal output"
SHARDS = "from shards"
BARE = "bare loop"
_WARM_UP = 3
_STAGE_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Lap:
    """One turn of a contestant: images per second, or in `failed` the last line of what went wrong."""

    images_per_s: float | None
    failed: str | None = None
    settings: Mapping[str, Any] | None = None


def our_contestants(
    pack: "Pack",
    indices: "NDArray[np.int64]",
    setting: "LoaderSetting",
    photos: "Photos",
    shards: Sequence[Path],
    seconds: float,
) -> dict[str, Callable[[], Lap]]:
    """Return what runs one turn of each: gathering alone, the whole way to floats on the CPU, and the bare loop.

    Where there are shards, the whole way from these too. A turn takes `seconds` after a warm-up of three batches.
    """
    works: dict[str, Callable[[], Iterator[int]]] = {
        GATHER: lambda: _gathered(pack, indices, setting),
        EQUAL: lambda: _augmented(pack, indices, setting),
        BARE: lambda: _bare(photos, pack),
    }
    if shards:
        works[SHARDS] = lambda: _streamed(pack, setting, shards)

    def turn(work: Callable[[], Iterator[int]]) -> Callable[[], Lap]:
        return lambda: Lap(images_per_s(work(), seconds))

    return {name: turn(work) for name, work in works.items()}


def images_per_s(sizes: Iterator[int], seconds: float) -> float:
    """Return the images per second of a window of at least `seconds` after a warm-up, and close the iterator.

    `sizes` yields without end how many images have come.
    """
    try:
        for _ in itertools.islice(sizes, _WARM_UP):
            pass
        images, elapsed = 0, 0.0
        started_at = time.perf_counter()
        while elapsed < seconds or not images:
            images += next(sizes)
            elapsed = time.perf_counter() - started_at
    finally:
        close = getattr(sizes, "close", None)
        if close is not None:
            close()
    return images / elapsed


def _gathered(pack: "Pack", indices: "NDArray[np.int64]", setting: "LoaderSetting") -> Iterator[int]:
    import torch

    from chimera_cli.services.bench_loader import endless_batches

    with closing(endless_batches(pack.images, indices, setting.batch, torch.device("cpu"))) as batches:
        for pixels, _positions in batches:
            yield len(pixels)


def _augmented(pack: "Pack", indices: "NDArray[np.int64]", setting: "LoaderSetting") -> Iterator[int]:
    import torch

    from chimera_cli.services.bench_loader import augmenter, may_flip, ready_batches

    cpu = torch.device("cpu")
    prepare = augmenter(setting, cpu, may_flip(pack, setting))
    with closing(ready_batches(pack.images, indices, setting.batch, cpu, prepare)) as batches:
        for floats in batches:
            yield len(floats)


def _streamed(pack: "Pack", setting: "LoaderSetting", shards: Sequence[Path]) -> Iterator[int]:
    import numpy as np
    import torch

    from chimera_cli.data.loader import to_device
    from chimera_cli.data.streaming import open_shards, stream_batches
    from chimera_cli.services.bench_loader import augmenter

    cpu = torch.device("cpu")
    prepare = augmenter(setting, cpu)
    opened = open_shards(str(shards[0].parent))
    with closing(stream_batches(opened, setting.batch, pack.size)) as batches:
        for batch in batches:
            yield len(prepare(to_device(batch.pixels, cpu), np.arange(len(batch))))


def _bare(photos: "Photos", pack: "Pack") -> Iterator[int]:
    """Yield 1 per file read, decoded, resized to the pack's size and hashed, on one thread, without end."""
    from chimera_cli.data.images import decode

    for path in itertools.cycle(photos.paths):
        decode(path.read_bytes(), pack.size, "crop")
        yield 1


def file_stages(
    photos: "Photos", pack: "Pack", setting: "LoaderSetting", tell: Listener
) -> list[dict[str, str | float]]:
    """Return the time per batch of each stage on the road from files, done alone on one thread, augmenting on all."""
    import numpy as np
    import torch

    from chimera_cli.data.images import decode
    from chimera_cli.data.pack import Picture
    from chimera_cli.services.bench_loader import augmenter

    prepare = augmenter(setting, torch.device("cpu"))
    times: dict[str, list[float]] = {}
    paths = itertools.cycle(photos.paths)

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        started_at = time.perf_counter()
        value = work(*arguments)
        times.setdefault(name, []).append(time.perf_counter() - started_at)
        return value

    def decoded(contents: Sequence[bytes]) -> list[Any]:
        return [decode(content, pack.size, "crop") for content in contents]

    for done in range(1, _STAGE_ROUNDS + 1):
        batch = list(itertools.islice(paths, setting.batch))
        contents = timed("read", lambda files: [file.read_bytes() for file in files], batch)
        pictures = timed("decode", decoded, contents)
        parts = [picture.pixels for picture in pictures if isinstance(picture, Picture)]
        pixels = timed("collate", np.stack, parts)
        timed("augment", prepare, torch.from_numpy(pixels), np.arange(len(pixels)))
        tell(Progress("stages of files", done, _STAGE_ROUNDS, "batches"))
    return [
        {"stage": name, "p50_ms": p50, "p95_ms": p95}
        for name, laps in times.items()
        for p50, p95 in [percentiles_ms(laps)]
    ]
