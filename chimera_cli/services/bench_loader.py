"""`chimera bench loader`: how fast pixels come from a pack, what they wait for, and what memory could do at best."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.errors import UsageError
from chimera_cli.events import Listener, Note, Progress, StepDone, ignore
from chimera_cli.services.bench_common import SEED, WARM_UP_BATCHES, fastest, percentiles_ms

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from chimera_cli.config import TrainConfig
    from chimera_cli.data.pack import Pack
    from chimera_cli.services.peers import Against
    from chimera_cli.services.session import SeedSession
    from chimera_cli.telemetry.sampler import Sampler

    Pixels = NDArray[np.uint8]
    Indices = NDArray[np.int64]
    Batches = Generator[tuple[Pixels, Indices], None, None]
    Prepare = Callable[[torch.Tensor, Indices], torch.Tensor]
    # From augmented pixels to a batch of pairs, and what trains on such batches until they end.
    Step = tuple[Callable[[torch.Tensor], Sized], Callable[[Iterator[Any]], None]]

_HALF = (0.5, 0.5, 0.5)
_STAGE_ROUNDS = 20
# Short epochs are joined up to this many images: the loader's start is not what is measured.
_JOINED = 1 << 16
# A mapped file in memory is gathered about as fast as memory is copied; beyond this many times it waits for the disk.
_DISK_FACTOR = 5.0
# Below this share of the wall clock the consumer does not wait for the loader.
_WAITING = 0.1
_COPY_ROUNDS = 15
_COPY_IMAGES = 4096
# What is gathered and copied in turn: far more than a cache holds, little enough to be in memory anywhere.
_COPY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class LoaderSetting:
    """What is done to `batch` images: crop to at least `crop_scale` of the area, mirror, bring to `image_size`."""

    image_size: int
    batch: int
    crop_scale: float
    flip: bool
    config: str | None
    colour_jitter: float = 0.0
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF


@dataclass(frozen=True, slots=True)
class LoaderTimes:
    """One timed window: seconds per batch from asking to having used it, and of these the seconds spent waiting."""

    images: int
    seconds: float
    latency_s: tuple[float, ...]
    wait_s: tuple[float, ...]

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def wait_share(self) -> float:
        """Return the share of the window (0-1) in which the consumer waited for the loader."""
        return sum(self.wait_s) / self.seconds


def bench_loader(
    home: Path,
    data: str | None,
    *,
    seconds: float,
    batch: int | None,
    config_path: Path | None,
    device: str,
    command: str,
    against: "Against | None" = None,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return the throughput from the pack to normalised floats on the device, measured for `seconds`.

    With a config its sizes and augmentation hold, and on a GPU its real training step takes the batches while the
    utilisation is averaged; the CPU law asks for the loader alone. `against` names the peers to measure beside it.
    Writes a group of kind `bench-loader`. Raises UsageError for a batch larger than the training split.
    """
    from chimera_cli.runtime import pick_device, reset_memory_peaks, seed_everything
    from chimera_cli.services.peers import need_peers
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, need_pack, seed_session

    if against is not None:
        need_peers(against.names)
    config = _config(config_path)
    picked = pick_device(device)
    pack = need_pack(home, data, listener)
    setting = loader_setting(pack, batch, config, config_path)
    _check_batch(pack, setting.batch)
    seed_everything(SEED)
    reset_memory_peaks(picked)
    settings = asdict(setting) | {"seconds": seconds} | ({"against": asdict(against)} if against else {})
    facts = group_facts(command, pack, settings, picked)
    label = config_path.stem if config_path else ""
    with group_session(home, "bench-loader", label, [SEED], facts) as group:
        step = _real_step(config, pack, picked, listener)
        with seed_session(group, SEED, settings, picked, [listener], 0) as session:
            result = _measure(session, pack, setting, picked, seconds, step, against)
    return {"group": group.name} | result


def _measure(
    session: "SeedSession",
    pack: "Pack",
    setting: LoaderSetting,
    device: "torch.device",
    seconds: float,
    step: "Step | None",
    against: "Against | None",
) -> dict[str, Any]:
    from chimera_cli.services.peers import measure_against
    from chimera_cli.services.session import memory_figures
    from chimera_cli.telemetry.sampler import gpu_uuid_of, sample_machine

    started_at = time.perf_counter()
    indices = pack.split_indices("train")
    prepare = augmenter(setting, device, may_flip(pack, setting))
    uuid = gpu_uuid_of(device.index or 0) if device.type == "cuda" else None
    with (
        closing(ready_batches(pack.images, indices, setting.batch, device, prepare, step)) as batches,
        sample_machine(gpu_uuid=uuid) as sampler,
    ):
        times = measure_loader(batches, step[1] if step else _drain, seconds, device, session.tell, sampler)
        utilisation = sampler.mean_gpu_util() if device.type == "cuda" and step else None
        memory = memory_figures(device)
    stages = measure_stages(pack.images, indices, setting, prepare, step, device, session.tell)
    ceiling = measure_copy(pack.images, indices, setting.batch, session.tell)
    details = _details(times, setting, stages, ceiling, device)
    if device.type == "cuda":
        details["bus"] = _bus(pack, setting, device, times)
    if against is not None:
        details |= measure_against(pack, setting, against, session.tell)
    figures: dict[str, float | None] = {"loader_images_per_s": times.images_per_s, "gpu_util_mean": utilisation}
    figures |= memory | {"wall_s": time.perf_counter() - started_at}
    return session.finish(figures, details)


def _details(
    times: LoaderTimes,
    setting: LoaderSetting,
    stages: Sequence[Mapping[str, Any]],
    ceiling: Mapping[str, Any],
    device: "torch.device",
) -> dict[str, Any]:
    import torch

    p50, p95 = percentiles_ms(times.latency_s)
    return {
        "batch": setting.batch,
        "image_size": setting.image_size,
        "crop_scale": setting.crop_scale,
        "flip": setting.flip,
        "colour_jitter": setting.colour_jitter,
        "workers": 1,
        "torch_threads": torch.get_num_threads(),
        "device": device.type,
        "stages": list(stages),
        "latency_ms_p50": p50,
        "latency_ms_p95": p95,
        "wait_share": times.wait_share,
        "ceiling": dict(ceiling),
        "batches": len(times.latency_s),
        "config": setting.config,
        "bound_by": bound_by(device.type, times.wait_share, stages, ceiling["copy_ms"]),
        "seconds": times.seconds,
    }


# ---- what is loaded -------------------------------------------------------------------------------------------------


def _config(path: Path | None) -> "TrainConfig | None":
    from chimera_cli.config import TrainConfig, load_config

    return None if path is None else load_config(TrainConfig, path)


def loader_setting(
    pack: "Pack", batch: int | None, config: "TrainConfig | None", path: Path | None = None
) -> LoaderSetting:
    """Return the loader's part of a config; without one the pack's own size with light cropping and mirroring."""
    if config is None:
        return LoaderSetting(pack.size, batch or 64, 0.9, True, None)
    from chimera_cli.models.image_tower import build_image_tower

    looks, size = config.augmentation, config.image.image_size
    tower = build_image_tower(config.image.weights, pretrained=False)
    return LoaderSetting(
        image_size=size,
        # A batch counts pairs; the loader reads an image once for all of its captions there.
        batch=batch or max(1, config.batch // config.captions_per_image),
        crop_scale=looks.crop_scale,
        flip=looks.flip,
        config=None if path is None else str(path),
        colour_jitter=looks.colour_jitter,
        mean=tuple(tower.mean),
        std=tuple(tower.std),
    )


def _check_batch(pack: "Pack", batch: int) -> None:
    """Raise UsageError for a batch that no epoch fills."""
    if batch > (images := len(pack.split_indices("train"))):
        raise UsageError(
            f"a batch of {batch:,} is more than the {images:,} images in the training split of {pack.name}",
            f"give --batch {images} or less",
        )


def _real_step(config: "TrainConfig | None", pack: "Pack", device: "torch.device", listener: Listener) -> "Step | None":
    """Return what trains the config on batches of pixels; None on a CPU, whose law asks for the loader alone."""
    if device.type == "cpu":
        return None
    if config is None:
        listener(Note("GPU utilisation counts under a real training step: add --config", "warning"))
        return None
    from chimera_cli.services.training_step import make_training_step

    return make_training_step(config, pack, device)


def _drain(batches: "Iterator[Sized]") -> None:
    for _ in batches:
        pass


def endless_batches(images: "Pixels", indices: "Indices", batch: int, device: "torch.device") -> "Batches":
    """Yield (pixels (<= batch, S, S, 3) uint8, their positions in `indices`) without end, each epoch in a new order."""
    import numpy as np

    from chimera_cli.data.loader import epoch_order, image_batches

    pinned = device.type == "cuda"
    joined = -(-_JOINED // len(indices))
    for first in itertools.count(step=joined):
        order = np.concatenate([epoch_order(len(indices), SEED, first + epoch) for epoch in range(joined)])
        done = 0
        with closing(image_batches(images, indices[order], batch, pinned=pinned)) as parts:
            for pixels in parts:
                yield pixels, order[done : done + len(pixels)]
                done += len(pixels)


def may_flip(pack: "Pack", setting: LoaderSetting) -> "torch.Tensor | None":
    """Return which training images, (n,) bool, the setting lets be mirrored; None where it mirrors none."""
    from chimera_cli.services.embeddings import images_without_sides

    return images_without_sides(pack) if setting.flip else None


def augmenter(setting: LoaderSetting, device: "torch.device", allowed: "torch.Tensor | None" = None) -> "Prepare":
    """Return the function from uint8 pixels (batch, S, S, 3) to augmented, normalised floats on the device.

    `allowed` (n,) says by position which images may be mirrored; None: all. A result on the CPU is overwritten by the
    next but one: one is used while the next is made.
    """
    import torch

    from chimera_cli.data.augmentation import Augmentation, augment

    how = Augmentation(
        size=setting.image_size,
        crop_scale=setting.crop_scale,
        flip=setting.flip,
        colour_jitter=setting.colour_jitter,
        mean=setting.mean,
        std=setting.std,
    )
    generator = torch.Generator().manual_seed(SEED)
    # New memory for every batch of floats would cost up to half as much time again.
    results: deque[torch.Tensor] = deque(maxlen=2)

    def prepare(pixels: "torch.Tensor", positions: "Indices") -> "torch.Tensor":
        chosen = None if allowed is None else allowed[torch.from_numpy(positions)]
        again = results[0] if len(results) == 2 and len(results[0]) == len(pixels) else None
        result = augment(pixels, how, generator, device, chosen, out=again)
        if device.type == "cpu":
            results.append(result)
        return result

    return prepare


def ready_batches(
    images: "Pixels",
    indices: "Indices",
    batch: int,
    device: "torch.device",
    prepare: "Prepare",
    step: "Step | None" = None,
) -> "Generator[Sized, None, None]":
    """Yield without end what the consumer takes: floats, or pairs for a `step`; a thread makes the next meanwhile.

    As in training. The batch is valid until the next one is asked for.
    """
    from chimera_cli.data.loader import ahead, to_device

    def made() -> "Iterator[Sized]":
        with closing(endless_batches(images, indices, batch, device)) as batches:
            for pixels, positions in batches:
                floats = prepare(to_device(pixels, device), positions)
                yield step[0](floats) if step else floats

    return ahead(made(), 1)


# ---- the pipeline ---------------------------------------------------------------------------------------------------


def measure_loader(
    batches: "Iterator[Sized]",
    consume: "Callable[[Iterator[Any]], None]",
    seconds: float,
    device: "torch.device",
    tell: Listener,
    sampler: "Sampler | None" = None,
) -> LoaderTimes:
    """Return what `seconds` of loading give after a warm-up; the device is waited for at both ends alone.

    The utilisation that `sampler` averages begins with the window.
    """
    from chimera_cli.runtime import Stopwatch

    watch = Stopwatch(device)
    latency: list[float] = []
    wait: list[float] = []
    sizes: list[int] = []

    def timed() -> "Iterator[Sized]":
        yield from itertools.islice(batches, WARM_UP_BATCHES)
        watch.start()
        if sampler is not None:
            sampler.start_window()
        began_at = told_at = asked_at = time.perf_counter()
        while asked_at - began_at < seconds:
            batch = next(batches)
            wait.append(time.perf_counter() - asked_at)
            yield batch
            sizes.append(len(batch))
            now = time.perf_counter()
            latency.append(now - asked_at)
            asked_at = now
            if now - told_at >= 1:
                told_at = now
                _tell(tell, len(latency), sum(sizes), now - began_at, seconds)

    consume(timed())
    return LoaderTimes(sum(sizes), watch.stop(), tuple(latency), tuple(wait))


def _tell(tell: Listener, batches: int, images: int, elapsed: float, seconds: float) -> None:
    tell(Progress("loader", min(round(elapsed), round(seconds)), round(seconds), "seconds"))
    tell(StepDone(batches, 0, {"loader_images_per_s": images / elapsed, "elapsed_s": elapsed}))


# ---- one stage after the other --------------------------------------------------------------------------------------


def measure_stages(
    images: "Pixels",
    indices: "Indices",
    setting: LoaderSetting,
    prepare: "Prepare",
    step: "Step | None",
    device: "torch.device",
    tell: Listener = ignore,
) -> list[dict[str, Any]]:
    """Return the time per batch of each stage done alone, one after the other, with the device waited for.

    On the road from a pack reading, decoding and collating are one: the gathering of rows into a batch. The sum is
    more than the latency in the pipeline, where the gathering overlaps with the rest.
    """
    from chimera_cli.data.loader import empty_buffer, epoch_order, gather, to_device
    from chimera_cli.runtime import Stopwatch

    times: dict[str, list[float]] = {}
    order = epoch_order(len(indices), SEED, 0)
    starts = itertools.cycle(range(0, len(order), setting.batch))
    buffer = empty_buffer((setting.batch, *images.shape[1:]), pinned=device.type == "cuda")

    def timed(name: str, work: Callable[[], Any]) -> Any:
        watch = Stopwatch(device)
        watch.start()
        value = work()
        times.setdefault(name, []).append(watch.stop())
        return value

    def inputs() -> "Iterator[Sized]":
        for done, start in enumerate(itertools.islice(starts, _STAGE_ROUNDS), 1):
            positions = order[start : start + setting.batch]
            pixels = timed("gather", partial(gather, images, indices[positions], buffer))
            copied = timed("copy", partial(to_device, pixels, device))
            batch = timed("augment", partial(prepare, copied, positions))
            watch = Stopwatch(device)
            watch.start()
            yield step[0](batch) if step else batch
            times.setdefault("training step", []).append(watch.stop())
            tell(Progress("stages alone", done, _STAGE_ROUNDS, "batches"))

    (step[1] if step else _drain)(inputs())
    absent = {"training step"} if step is None else set()
    absent |= set() if device.type == "cuda" else {"copy"}
    return [_stage(name, laps) for name, laps in times.items() if name not in absent]


def _stage(name: str, laps: Sequence[float]) -> dict[str, Any]:
    p50, p95 = percentiles_ms(laps)
    return {"stage": name, "p50_ms": p50, "p95_ms": p95}


def bound_by(
    device: str, wait_share: float, stages: Sequence[Mapping[str, Any]], copy_ms: float
) -> Literal["cpu", "gpu", "disk"]:
    """Return what limits the throughput, from the stages' medians and the time to copy a batch in memory.

    The disk does where gathering is the slowest stage and far slower than memory; else the GPU, where it is never
    kept waiting; else the CPU.
    """
    medians = {stage["stage"]: stage["p50_ms"] for stage in stages}
    if medians["gather"] >= max(medians.values()) and medians["gather"] > _DISK_FACTOR * copy_ms:
        return "disk"
    return "gpu" if device == "cuda" and wait_share < _WAITING else "cpu"


# ---- ceilings -------------------------------------------------------------------------------------------------------


def measure_copy(images: "Pixels", indices: "Indices", batch: int, tell: Listener = ignore) -> dict[str, Any]:
    """Return how fast memory copies batches of this size, and the share of it that the loader's gathering reaches.

    Both take turns, so that what else the machine does hits both: some batches gathered at random by the loader, as
    many copied from one place after the other of the same mapping, by one thread each, into as many reused buffers.
    Rates and share are medians over the rounds; everything is touched once before.
    """
    import numpy as np

    from chimera_cli.data.loader import ahead, empty_buffer, epoch_order, image_batches

    rows = indices[: max(batch, _COPY_BYTES // images[0].nbytes)]
    per_round, depth = max(2, _COPY_IMAGES // batch), 2
    epochs = 1 + -(-_COPY_ROUNDS * (per_round + depth + 1) * batch // len(rows))
    order = np.concatenate([epoch_order(len(rows), SEED, epoch) for epoch in range(epochs)])
    buffers = [empty_buffer((batch, *images.shape[1:])) for _ in range(depth + 1)]
    rates: dict[str, list[float]] = {"gather": [], "copy": []}
    with (
        closing(image_batches(images, rows[order], batch, depth)) as gathers,
        # By a thread as well: where other programs want the cores too, they come round to threads differently.
        closing(ahead(_copies(images[: len(rows)], buffers), depth)) as copies,
    ):
        for work in (gathers, copies):
            _images_per_s(work, -(-len(rows) // batch))
        for done in range(1, _COPY_ROUNDS + 1):
            for name, work in (("gather", gathers), ("copy", copies)):
                # The batches that waited ready from the turn before cost nothing now.
                _images_per_s(work, depth + 1)
                rates[name].append(_images_per_s(work, per_round))
            tell(Progress("memory copy", done, _COPY_ROUNDS, "rounds"))
    copy, gather = float(np.median(rates["copy"])), float(np.median(rates["gather"]))
    shares = np.divide(rates["gather"], rates["copy"])
    return {
        "name": "a memory copy of the same bytes, by gathering alone",
        "images_per_s": copy,
        "copy_ms": 1000 * batch / copy,
        "gather_images_per_s": gather,
        "share_reached": float(np.median(shares)),
        "share_least": float(shares.min()),
        "share_most": float(shares.max()),
        "rounds": _COPY_ROUNDS,
    }


def _copies(block: "Pixels", buffers: "Sequence[Pixels]") -> "Iterator[Pixels]":
    """Yield without end copies of one stretch of `block` after the other, in one buffer after the other."""
    import numpy as np

    batch = min(len(buffers[0]), len(block))
    starts = itertools.cycle(range(0, len(block) - batch + 1, batch))
    for start, buffer in zip(starts, itertools.cycle(buffers), strict=False):
        part = buffer[:batch]
        np.copyto(part, block[start : start + batch])
        yield part


def _images_per_s(batches: "Iterator[Pixels]", count: int) -> float:
    started_at = time.perf_counter()
    images = sum(len(pixels) for pixels in itertools.islice(batches, count))
    return images / (time.perf_counter() - started_at)


def _bus(pack: "Pack", setting: LoaderSetting, device: "torch.device", times: LoaderTimes) -> dict[str, Any]:
    """Return the images/s that cross the bus to the GPU from pinned memory, and the share of it the loader reaches."""
    import torch

    from chimera_cli.data.loader import empty_buffer

    source = torch.from_numpy(empty_buffer((setting.batch, pack.size, pack.size, 3), pinned=True))
    rate = setting.batch / fastest(lambda: source.to(device, non_blocking=True), device)
    name = "copy of the pixels to the GPU from pinned memory"
    return {"name": name, "images_per_s": rate, "share_reached": times.images_per_s / rate}
