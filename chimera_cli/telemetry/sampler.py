"""A thread that looks at the machine twice a second and leaves immutable snapshots to be drawn and recorded."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import psutil

from chimera_cli.events import TelemetrySampled
from chimera_cli.runtime import cpu_cores
from chimera_cli.telemetry.nvml import GIB, GpuReading, Nvml, open_nvml

# The limit that a container sets on its memory, cgroup version 2 and 1.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The machine at `elapsed_s` after the sampler began: shares 0-1, memory in GiB; None where nothing can say.

    GPU values are of the whole card, CPU and RAM of this process and its children: `cpu_util` is their share of the
    cores the process may use, `ram_used_gb` the sum of their resident memory.
    """

    elapsed_s: float
    gpu_util: float | None
    vram_used_gb: float | None
    vram_total_gb: float | None
    gpu_temperature_c: float | None
    gpu_power_w: float | None
    cpu_util: float | None
    ram_used_gb: float | None
    ram_total_gb: float | None

    def values(self) -> dict[str, float | None]:
        """Return all readings by name, as `TelemetrySampled.values` and telemetry.jsonl hold them."""
        values = asdict(self)
        del values["elapsed_s"]
        return values

    def as_event(self) -> TelemetrySampled:
        """Return the snapshot as listeners hear of it."""
        return TelemetrySampled(self.elapsed_s, self.values())


def _ignore(_snapshot: Snapshot) -> None:
    return None


class Sampler:
    """What the thread has seen so far; read it from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: Snapshot | None = None
        self._gpu_utils: list[float] = []

    def latest(self) -> Snapshot | None:
        """Return the newest snapshot, None before the first."""
        return self._latest

    def start_window(self) -> None:
        """Begin a new window for `mean_gpu_util`: what was sampled before, such as the warm-up, no longer counts."""
        with self._lock:
            self._gpu_utils = []

    def mean_gpu_util(self) -> float | None:
        """Return the mean GPU utilisation (0-1) of the window, None where no card has given any."""
        with self._lock:
            return fmean(self._gpu_utils) if self._gpu_utils else None

    def record(self, snapshot: Snapshot) -> None:
        """Take in one snapshot."""
        with self._lock:
            self._latest = snapshot
            if snapshot.gpu_util is not None:
                self._gpu_utils.append(snapshot.gpu_util)


@contextmanager
def sample_machine(
    interval_s: float = 0.5, on_sample: Callable[[Snapshot], None] = _ignore, gpu_uuid: str | None = None
) -> Iterator[Sampler]:
    """Sample card (None: the first visible one) and process every `interval_s` seconds while the block lasts.

    `on_sample` is called in the sampler's thread. Leaving the block ends the thread without waiting out an interval.
    """
    sampler, stop = Sampler(), threading.Event()
    thread = threading.Thread(
        target=_sample, args=(sampler, stop, interval_s, on_sample, gpu_uuid), name="chimera-sampler", daemon=True
    )
    thread.start()
    try:
        yield sampler
    finally:
        stop.set()
        thread.join(timeout=5)


def gpu_uuid_of(device_index: int) -> str:
    """Return the UUID by which NVML knows torch's CUDA device: the two may count the cards in different orders."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device_index).uuid}"


def ram_total_gb() -> float:
    """Return the memory this process may use in GiB: the machine's, or less where a container sets a limit."""
    total = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        if text.isdecimal():
            total = min(total, int(text))
    return total / GIB


def _sample(
    sampler: Sampler,
    stop: threading.Event,
    interval_s: float,
    on_sample: Callable[[Snapshot], None],
    gpu_uuid: str | None,
) -> None:
    started_at = time.monotonic()
    total_gb, cores = ram_total_gb(), cpu_cores()
    nvml: Nvml | None = open_nvml(gpu_uuid)
    try:
        seconds_by_pid, _ = _process_usage()
        before = time.monotonic()
        while not stop.wait(interval_s):
            was, (seconds_by_pid, resident) = seconds_by_pid, _process_usage()
            now = time.monotonic()
            gpu = nvml.read() if nvml else GpuReading()
            cpu_util = cpu_share(was, seconds_by_pid, (now - before) * cores)
            before = now
            snapshot = Snapshot(
                now - started_at,
                gpu.gpu_util,
                gpu.vram_used_gb,
                gpu.vram_total_gb,
                gpu.gpu_temperature_c,
                gpu.gpu_power_w,
                cpu_util,
                resident / GIB,
                total_gb,
            )
            sampler.record(snapshot)
            on_sample(snapshot)
    finally:
        if nvml:
            nvml.close()


def cpu_share(was: dict[int, float], now: dict[int, float], core_seconds: float) -> float | None:
    """Return the share (0-1) of `core_seconds` used between two looks at CPU seconds by process id.

    A process that has ended takes its seconds along and counts nothing; a new one counts from its start.
    """
    if core_seconds <= 0:
        return None
    used = sum(max(seconds - was.get(pid, 0.0), 0.0) for pid, seconds in now.items())
    return min(used / core_seconds, 1.0)


def _process_usage() -> tuple[dict[int, float], int]:
    """Return CPU seconds by process id and the sum of resident bytes, of this process and its children."""
    me = psutil.Process()
    seconds: dict[int, float] = {}
    resident = 0
    for process in (me, *me.children(recursive=True)):
        try:
            with process.oneshot():
                times = process.cpu_times()
                memory = process.memory_info().rss
        except psutil.Error:
            continue  # it ended, or belongs to another user, between the listing and the look
        seconds[process.pid] = times.user + times.system
        resident += memory
    return seconds, resident
