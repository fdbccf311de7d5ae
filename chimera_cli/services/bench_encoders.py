"""`chimera bench encoders`: latency, throughput and memory of both towers, beside the machine's arithmetic."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.events import Listener, Progress, ignore
from chimera_cli.services.bench_common import SEED, WARM_UP_BATCHES, fastest, percentiles_ms

if TYPE_CHECKING:
    import torch

    from chimera_cli.data.pack import Pack
    from chimera_cli.services.session import SeedSession

_SENTENCES = (
    "a dog runs through shallow water",
    "two children play with a red ball on the grass",
    "a man in a blue jacket climbs a steep rock above the sea while another one watches him",
    "people are waiting at a bus stop in the rain",
)


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
