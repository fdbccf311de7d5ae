"""Device, precision, seeds and a stopwatch that waits for the device. Imports torch only inside functions."""

import os
import platform
import random
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.errors import ChimeraError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def pick_device(wanted: str = "auto") -> "torch.device":
    """Return the device to compute on: `auto` is the GPU where there is one, else the CPU.

    Raises ChimeraError where a GPU is asked for by name and there is none, and for a card that this torch has no
    kernels for: a run that quietly took the CPU instead would take days.
    """
    import torch

    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if not runs_on(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()):
            raise ChimeraError(
                f"this torch has no kernels for {torch.cuda.get_device_name(device)}",
                "`chimera doctor` prints the pip command that mends it; --set device=cpu works anywhere",
            )
        return device
    if wanted == "auto":
        return torch.device("cpu")
    raise ChimeraError(
        "no CUDA device can be used by this torch", "`chimera doctor` says why; --device cpu works anywhere"
    )


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Return whether kernels for `archs` run on a card of compute `capability`.

    `sm_XY` runs on the same major version from minor Y on, `compute_XY` (PTX) on all that is newer; `a` and `f`
    variants, such as sm_90a, on exactly theirs (CUDA C++ Programming Guide, binary and PTX compatibility).
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        target = int(match[2]), int(match[3])
        if match[4] and target == capability:
            return True
        if not match[4] and target <= capability and (match[1] == "compute" or target[0] == capability[0]):
            return True
    return False


def pick_precision(wanted: Precision, capability: tuple[int, int] | None) -> Literal["float32", "bfloat16", "float16"]:
    """Return the precision to compute in for a card of compute `capability` (None: CPU).

    `auto`: bfloat16 from Ampere (8.0) on, float16 on Volta and Turing (7.x), float32 on Pascal, whose float16
    arithmetic is 64 times slower (CUDA C++ Programming Guide, arithmetic throughput of 6.1), and on CPU.
    """
    if wanted != "auto":
        return wanted
    if capability is None or capability < (7, 0):
        return "float32"
    return "bfloat16" if capability >= (8, 0) else "float16"


def device_capability(device: "torch.device") -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device, None for a CPU."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; dropout and initialisation draw from these, data order from its own generator."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def synchronise(device: "torch.device") -> None:
    """Wait until the device has done all it was given; without this a GPU timing measures the launch alone."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


class Stopwatch:
    """Wall time of the work between `start` and `stop`, the device synchronised at both; `seconds` accumulates."""

    def __init__(self, device: "torch.device") -> None:
        self._device = device
        self._started_at: float | None = None
        self.seconds = 0.0

    def start(self) -> None:
        """Begin a lap."""
        synchronise(self._device)
        self._started_at = time.perf_counter()

    @property
    def is_running(self) -> bool:
        """Whether a lap has begun and not ended."""
        return self._started_at is not None

    def running_s(self) -> float:
        """Return the seconds of the lap so far without waiting for the device: for displays, not for figures."""
        return 0.0 if self._started_at is None else time.perf_counter() - self._started_at

    def stop(self) -> float:
        """End the lap and return its seconds. Raises RuntimeError where none was begun."""
        if self._started_at is None:
            raise RuntimeError("the stopwatch was not started")
        synchronise(self._device)
        lap = time.perf_counter() - self._started_at
        self._started_at = None
        self.seconds += lap
        return lap


@dataclass(frozen=True, slots=True)
class MemoryPeaks:
    """Peaks in GiB; the VRAM ones are None without a CUDA device."""

    vram_peak_gb: float | None
    vram_reserved_peak_gb: float | None
    ram_peak_gb: float


def reset_memory_peaks(device: "torch.device") -> None:
    """Begin a new VRAM peak; the RAM peak is the process's own and can't be reset."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def memory_peaks(device: "torch.device") -> MemoryPeaks:
    """Return the peaks since the last reset: torch's allocator for VRAM, the operating system's accounting for RAM."""
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    scale = 1 if sys.platform == "darwin" else 1024
    ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
    if device.type != "cuda":
        return MemoryPeaks(None, None, ram)
    import torch

    allocated = torch.cuda.max_memory_allocated(device) / 2**30
    return MemoryPeaks(allocated, torch.cuda.max_memory_reserved(device) / 2**30, ram)


def cpu_name() -> str:
    """Return the processor's model name."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(device: "torch.device") -> dict[str, Any]:
    """Return what evidence must agree on: device kind, its name, cores; figures of two machines are never mixed."""
    facts: dict[str, Any] = {"device": device.type, "cpu": cpu_name(), "cores": cpu_cores(), "gpu": None}
    if device.type == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
