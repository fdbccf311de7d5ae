"""`chimera bench`: how fast the loader and the encoders are here, with what the machine could do at best beside it."""

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.events import Listener, Note, Progress, StepDone, ignore

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from chimera_cli.data.pack import Pack
    from chimera_cli.services.session import SeedSession

    Pixels = NDArray[np.uint8]
    Prepare = Callable[[Pixels], "torch.Tensor"]
    Step = Callable[["torch.Tensor"], None]

SEED = 0
WARM_UP_BATCHES = 3
_STAGE_ROUNDS = 20
# A mapped file in memory is gathered about as fast as memory is copied; beyond this many times it waits for the disk.
_DISK_FACTOR = 5.0
# Below this share of the wall clock the consumer does not wait for the loader.
_WAITING = 0.1
_HALF = (0.5, 0.5, 0.5)
_SENTENCES = (
    "a dog runs through shallow water",
    "two children play with a red ball on the grass",
    "a man in a blue jacket climbs a steep rock above the sea while another one watches him",
    "people are waiting at a bus stop in the rain",
)


# ---- loader ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoaderSetting:
    """What is done to `batch` images: crop to at least `crop_scale` of the area, mirror, bring to `image_size`."""

    image_size: int
    batch: int
    crop_scale: float
    flip: bool
    config: str | None


@dataclass(frozen=True, slots=True)
class LoaderTimes:
    """One timed window: seconds per batch from asking to having it ready, and of these the seconds spent waiting."""

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
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return the throughput from the pack to normalised floats on the device, measured for `seconds`.

    With a config its sizes and augmentation hold, and on a GPU its real training step takes the batches while the
    utilisation is averaged; the CPU law asks for the loader alone. Writes a group of kind `bench-loader`.
    """
    from chimera_cli.runtime import pick_device, reset_memory_peaks, seed_everything
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, need_pack, seed_session

    picked = pick_device(device)
    pack = need_pack(home, data, listener)
    setting = _loader_setting(pack, batch, config_path)
    seed_everything(SEED)
    reset_memory_peaks(picked)
    settings = asdict(setting) | {"seconds": seconds}
    facts = group_facts(command, pack, settings, picked)
    label = config_path.stem if config_path else ""
    with group_session(home, "bench-loader", label, [SEED], facts) as group:
        step = _real_step(config_path, pack, picked)
        if picked.type == "cuda" and step is None:
            listener(Note("GPU utilisation counts under a real training step: add --config", "warning"))
        with seed_session(group, SEED, settings, picked, [listener], 0) as session:
            return {"group": group.name} | _loader_seed(session, pack, setting, picked, seconds, step)


def _loader_seed(
    session: "SeedSession",
    pack: "Pack",
    setting: LoaderSetting,
    device: "torch.device",
    seconds: float,
    step: "Step | None",
) -> dict[str, Any]:
    from chimera_cli.services.session import memory_figures
    from chimera_cli.telemetry.sampler import gpu_uuid_of, sample_machine

    started_at = time.perf_counter()
    indices = pack.split_indices("train")
    prepare = augmenter(setting, device)
    uuid = gpu_uuid_of(device.index or 0) if device.type == "cuda" else None
    batches = endless_batches(pack.images, indices, setting.batch)
    try:
        take = step or _drop
        for _ in range(WARM_UP_BATCHES):
            take(prepare(next(batches)))
        with sample_machine(gpu_uuid=uuid) as sampler:
            times = measure_loader(batches, prepare, take, seconds, device, session.tell)
        utilisation = sampler.mean_gpu_util() if device.type == "cuda" and step else None
    finally:
        batches.close()
    stages = measure_stages(pack.images, indices, setting, prepare, step, device)
    ceiling = _loader_ceiling(pack, setting, device)
    figures: dict[str, float | None] = {"loader_images_per_s": times.images_per_s, "gpu_util_mean": utilisation}
    figures |= memory_figures(device) | {"wall_s": time.perf_counter() - started_at}
    details = _loader_details(times, setting, stages, ceiling, device)
    return session.finish(figures, details | {"seconds": times.seconds})


def _loader_details(
    times: LoaderTimes,
    setting: LoaderSetting,
    stages: Sequence[Mapping[str, Any]],
    ceiling: Mapping[str, Any],
    device: "torch.device",
) -> dict[str, Any]:
    p50, p95 = percentiles_ms(times.latency_s)
    reached = times.images_per_s / ceiling["images_per_s"]
    return {
        "batch": setting.batch,
        "image_size": setting.image_size,
        "crop_scale": setting.crop_scale,
        "flip": setting.flip,
        "workers": 1,
        "device": device.type,
        "stages": list(stages),
        "latency_ms_p50": p50,
        "latency_ms_p95": p95,
        "wait_share": times.wait_share,
        "ceiling": {**ceiling, "share_reached": reached},
        "batches": len(times.latency_s),
        "config": setting.config,
        "bound_by": bound_by(device.type, times.wait_share, stages, ceiling["copy_ms"]),
    }


def _loader_setting(pack: "Pack", batch: int | None, config_path: Path | None) -> LoaderSetting:
    """Return the loader's part of a config; without one the pack's own size with light cropping and mirroring."""
    from chimera_cli.config import TrainConfig, load_config

    if config_path is None:
        return LoaderSetting(pack.size, batch or 64, 0.9, True, None)
    config = load_config(TrainConfig, config_path)
    looks = config.augmentation
    size = config.image.image_size
    return LoaderSetting(size, batch or config.batch, looks.crop_scale, looks.flip, str(config_path))


def _real_step(config_path: Path | None, pack: "Pack", device: "torch.device") -> "Step | None":
    """Return one training step of the config on pixels (batch, 3, S, S); None on a CPU: its law asks for the loader."""
    if config_path is None or device.type == "cpu":
        return None
    from chimera_cli.config import TrainConfig, load_config
    from chimera_cli.services.train import make_training_step

    return make_training_step(load_config(TrainConfig, config_path), pack, device)


def _drop(_pixels: "torch.Tensor") -> None:
    return None


def endless_batches(images: "Pixels", indices: "NDArray[np.int64]", batch: int) -> "Generator[Pixels, None, None]":
    """Yield batches (<= batch, S, S, 3) uint8 of the images at `indices` without end, each epoch in a new order."""
    from chimera_cli.data.loader import epoch_order, image_batches

    for epoch in itertools.count():
        yield from image_batches(images, indices[epoch_order(len(indices), SEED, epoch)], batch)


def augmenter(setting: LoaderSetting, device: "torch.device") -> "Prepare":
    """Return the function from uint8 pixels (batch, S, S, 3) to augmented, normalised floats on the device."""
    import torch

    from chimera_cli.data.augmentation import horizontal_flip, normalise, random_resized_crop, resize, to_float

    generator = torch.Generator().manual_seed(SEED)

    def prepare(pixels: "Pixels") -> "torch.Tensor":
        batch = to_float(torch.from_numpy(pixels).to(device, non_blocking=True))
        if setting.crop_scale < 1:
            batch = random_resized_crop(batch, setting.image_size, generator, scale=(setting.crop_scale, 1.0))
        else:
            batch = resize(batch, setting.image_size)
        if setting.flip:
            batch = horizontal_flip(batch, generator)
        return normalise(batch, _HALF, _HALF)

    return prepare


def measure_loader(
    batches: "Iterator[Pixels]",
    prepare: "Prepare",
    take: "Step",
    seconds: float,
    device: "torch.device",
    tell: Listener,
) -> LoaderTimes:
    """Return what `seconds` of loading give; the device is waited for at the end alone, as in training."""
    from chimera_cli.runtime import Stopwatch

    latency: list[float] = []
    wait: list[float] = []
    images, told_at = 0, 0.0
    watch = Stopwatch(device)
    watch.start()
    began_at = time.perf_counter()
    while (asked_at := time.perf_counter()) - began_at < seconds:
        pixels = next(batches)
        wait.append(time.perf_counter() - asked_at)
        take(prepare(pixels))
        images += len(pixels)
        latency.append(time.perf_counter() - asked_at)
        elapsed = time.perf_counter() - began_at
        if elapsed - told_at >= 1:
            told_at = elapsed
            tell(Progress("loader", min(round(elapsed), round(seconds)), round(seconds), "seconds"))
            tell(StepDone(len(latency), 0, {"loader_images_per_s": images / elapsed, "elapsed_s": elapsed}))
    return LoaderTimes(images, watch.stop(), tuple(latency), tuple(wait))


def measure_stages(
    images: "Pixels",
    indices: "NDArray[np.int64]",
    setting: LoaderSetting,
    prepare: "Prepare",
    step: "Step | None",
    device: "torch.device",
) -> list[dict[str, Any]]:
    """Return the time per batch of each stage done alone, one after the other, with the device waited for.

    Their sum is more than the latency in the pipeline, where the gathering overlaps with the rest.
    """
    import numpy as np

    from chimera_cli.data.loader import epoch_order, gather
    from chimera_cli.runtime import Stopwatch

    times: dict[str, list[float]] = {}
    order = itertools.cycle(
        np.array_split(indices[epoch_order(len(indices), SEED, 0)], -(-len(indices) // setting.batch))
    )
    buffer = np.empty((setting.batch, *images.shape[1:]), dtype=np.uint8)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        watch = Stopwatch(device)
        watch.start()
        value = work()
        times.setdefault(name, []).append(watch.stop())
        return value

    for rows in itertools.islice(order, _STAGE_ROUNDS):
        pixels = timed("gather", partial(gather, images, rows, buffer))
        inputs = timed("copy and augment" if device.type == "cuda" else "augment", partial(prepare, pixels))
        if step is not None:
            timed("training step", partial(step, inputs))
    return [
        {"stage": name, "p50_ms": p50, "p95_ms": p95}
        for name, laps in times.items()
        for p50, p95 in [percentiles_ms(laps)]
    ]


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


def percentiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile in milliseconds."""
    import numpy as np

    p50, p95 = np.percentile(np.asarray(seconds) * 1000, (50, 95))
    return float(p50), float(p95)


def _loader_ceiling(pack: "Pack", setting: LoaderSetting, device: "torch.device") -> dict[str, Any]:
    """Return the images/s at which memory (or the bus to the GPU) moves what the loader can't avoid moving.

    On a CPU each pixel is read once as uint8 and written once as float32: a copy of half the sum of both moves as
    much. To a GPU the uint8 pixels cross the bus once. `copy_ms` is a copy of a uint8 batch within memory.
    """
    import torch

    raw = setting.batch * 3 * pack.size**2
    source = torch.zeros(raw, dtype=torch.uint8)
    cpu = torch.device("cpu")
    copy_s = fastest(lambda: torch.empty_like(source).copy_(source), cpu)
    if device.type == "cuda":
        name, seconds = "copy of the pixels to the GPU", fastest(lambda: source.to(device), device)
    else:
        moved = torch.zeros((raw + 4 * setting.batch * 3 * setting.image_size**2) // 2, dtype=torch.uint8)
        target = torch.empty_like(moved)
        name, seconds = "memory copy: pixels read once, floats written once", fastest(lambda: target.copy_(moved), cpu)
    return {"name": name, "images_per_s": setting.batch / seconds, "copy_ms": 1000 * copy_s}


def fastest(work: Callable[[], Any], device: "torch.device", rounds: int = 10) -> float:
    """Return the seconds of the fastest of some rounds after two for warming up: what the machine can do at best."""
    from chimera_cli.runtime import Stopwatch

    laps = []
    for _ in range(rounds + 2):
        watch = Stopwatch(device)
        watch.start()
        work()
        laps.append(watch.stop())
    return min(laps[2:])


# ---- encoders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Component:
    """One encoder ready to be timed: `run` encodes one batch of `unit`."""

    component: str
    name: str
    unit: str
    run: Callable[[], Any]


def bench_encoders(
    home: Path,
    *,
    image: str,
    text: str,
    image_size: int,
    batch: int,
    repeats: int,
    device: str,
    data: str | None,
    command: str,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return latency, throughput and peak VRAM of both towers for inference, with their share of the GEMM ceiling.

    Pixels are random, captions come from the pack (fixed sentences where none is prepared). Writes a group of kind
    `bench-encoders`.
    """
    from chimera_cli.data.pack import default_pack, open_pack
    from chimera_cli.runtime import device_capability, pick_device, pick_precision, seed_everything
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, seed_session

    picked = pick_device(device)
    precision = pick_precision("auto", device_capability(picked))
    pack = open_pack(home / "data", data) if data else default_pack(home / "data")
    seed_everything(SEED)
    settings = {"image": image, "text": text, "image_size": image_size, "batch": batch, "repeats": repeats}
    settings |= {"precision": precision}
    facts = group_facts(command, pack, settings, picked)
    with group_session(home, "bench-encoders", "", [SEED], facts) as group:
        started_at = time.perf_counter()
        with seed_session(group, SEED, settings, picked, [listener], 0) as session:
            peak_flops = gemm_flops(picked, precision)
            components = [
                _measure(make, batch, repeats, picked, precision, peak_flops, session.tell)
                for make in (
                    lambda: _image_component(image, image_size, batch, picked),
                    lambda: _text_component(text, pack, batch, picked),
                )
            ]
            return {"group": group.name} | _finish_encoders(session, components, repeats, precision, picked, started_at)


def _finish_encoders(
    session: "SeedSession",
    components: Sequence[Mapping[str, Any]],
    repeats: int,
    precision: str,
    device: "torch.device",
    started_at: float,
) -> dict[str, Any]:
    from chimera_cli.services.session import memory_figures

    peaks = [row["vram_peak_gb"] for row in components if row["vram_peak_gb"] is not None]
    figures = {
        "vram_peak_gb": max(peaks) if peaks else None,
        "ram_peak_gb": memory_figures(device)["ram_peak_gb"],
        "wall_s": time.perf_counter() - started_at,
    }
    details = {"components": list(components), "repeats": repeats, "precision": precision, "device": device.type}
    return session.finish(figures, details)


def _measure(
    make: Callable[[], Component],
    batch: int,
    repeats: int,
    device: "torch.device",
    precision: str,
    peak_flops: float,
    tell: Listener,
) -> dict[str, Any]:
    """Return the row of one component: built, warmed up, its FLOPs counted, timed with the device waited for."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from chimera_cli.runtime import Stopwatch, memory_peaks, reset_memory_peaks

    reset_memory_peaks(device)
    half = torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
    with torch.inference_mode(), half:
        component = make()
        with FlopCounterMode(display=False) as counter:
            component.run()
        for _ in range(WARM_UP_BATCHES):
            component.run()
        laps = []
        for done in range(1, repeats + 1):
            watch = Stopwatch(device)
            watch.start()
            component.run()
            laps.append(watch.stop())
            tell(Progress(component.component, done, repeats, "batches"))
    p50, p95 = percentiles_ms(laps)
    flops = counter.get_total_flops()
    return {
        "component": component.component,
        "name": component.name,
        "batch": batch,
        "latency_ms_p50": p50,
        "latency_ms_p95": p95,
        "throughput_per_s": 1000 * batch / p50,
        "unit": component.unit,
        "vram_peak_gb": memory_peaks(device).vram_peak_gb,
        "gflops_per_batch": flops / 1e9,
        "ceiling": {
            "name": f"{precision} matrix multiplication, {peak_flops / 1e9:,.0f} GFLOP/s",
            "share_reached": flops / (p50 / 1000) / peak_flops,
        },
    }


def _image_component(weights: str, image_size: int, batch: int, device: "torch.device") -> Component:
    import torch

    from chimera_cli.data.augmentation import normalise, to_float
    from chimera_cli.models.image_tower import build_image_tower

    tower = build_image_tower(weights).to(device).eval()
    tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    raw = torch.randint(0, 256, (batch, image_size, image_size, 3), dtype=torch.uint8).to(device)
    pixels = normalise(to_float(raw), tower.mean, tower.std)
    return Component("image encoder", weights, "images", lambda: tower(pixels))


def _text_component(weights: str, pack: "Pack | None", batch: int, device: "torch.device") -> Component:
    from chimera_cli.config import TextTower as TextSetting
    from chimera_cli.models.text_tower import build_text_tower

    tower = build_text_tower(weights).to(device).eval()
    texts = pack.captions("train").texts if pack is not None else ()
    chosen = list(itertools.islice(itertools.cycle(texts or _SENTENCES), batch))
    tokens = {name: t.to(device) for name, t in tower.tokenise(chosen, TextSetting().max_tokens).items()}
    return Component("text encoder", weights, "captions", lambda: tower(tokens))


def gemm_flops(device: "torch.device", precision: str) -> float:
    """Return the FLOP/s of one large matrix multiplication in `precision`: what arithmetic can be had here at best."""
    import torch

    # Large enough to fill the device, small enough for a second or so on a two-core CPU.
    side = 1024 if device.type == "cpu" else 4096
    dtype = getattr(torch, precision)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return float(2 * side**3 / fastest(lambda: a @ b, device))
