"""The one gate to NVML: what an NVIDIA card says of itself. Without a driver there is no card, and no exception.

A field that the card, the driver or a virtual machine does not give is None: missing is not zero.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One look at the card: utilisation 0-1 over the driver's last sample period, memory of all processes in GiB."""

    gpu_util: float | None = None
    vram_used_gb: float | None = None
    vram_total_gb: float | None = None
    gpu_temperature_c: float | None = None
    gpu_power_w: float | None = None


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What does not change while a run lasts; `capability` is CUDA's (major, minor)."""

    name: str | None
    capability: tuple[int, int] | None
    driver_version: str | None
    vram_total_gb: float | None
    vram_free_gb: float | None


class Nvml:
    """An open connection to one card; `close` it once."""

    def __init__(self, pynvml: Any, handle: Any) -> None:
        self._pynvml = pynvml
        self._handle = handle

    def read(self) -> GpuReading:
        """Return the present readings."""
        p, handle = self._pynvml, self._handle
        memory = self._ask(lambda: p.nvmlDeviceGetMemoryInfo(handle))
        percent = self._ask(lambda: p.nvmlDeviceGetUtilizationRates(handle).gpu)
        milliwatts = self._ask(lambda: p.nvmlDeviceGetPowerUsage(handle))
        temperature = self._ask(lambda: p.nvmlDeviceGetTemperature(handle, p.NVML_TEMPERATURE_GPU))
        return GpuReading(
            gpu_util=None if percent is None else percent / 100,
            vram_used_gb=None if memory is None else memory.used / GIB,
            vram_total_gb=None if memory is None else memory.total / GIB,
            gpu_temperature_c=None if temperature is None else float(temperature),
            gpu_power_w=None if milliwatts is None else milliwatts / 1000,
        )

    def facts(self) -> GpuFacts:
        """Return name, compute capability, driver and memory of the card."""
        p, handle = self._pynvml, self._handle
        memory = self._ask(lambda: p.nvmlDeviceGetMemoryInfo(handle))
        capability = self._ask(lambda: p.nvmlDeviceGetCudaComputeCapability(handle))
        return GpuFacts(
            name=_text(self._ask(lambda: p.nvmlDeviceGetName(handle))),
            capability=None if capability is None else (int(capability[0]), int(capability[1])),
            driver_version=_text(self._ask(p.nvmlSystemGetDriverVersion)),
            vram_total_gb=None if memory is None else memory.total / GIB,
            vram_free_gb=None if memory is None else memory.free / GIB,
        )

    def close(self) -> None:
        """Let go of the driver."""
        self._ask(self._pynvml.nvmlShutdown)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Return the answer, None where the driver refuses it: not supported, no permission, card lost."""
        try:
            return question()
        except self._pynvml.NVMLError:
            return None


def open_nvml(uuid: str | None = None) -> Nvml | None:
    """Return the card with `uuid`, else the first of CUDA_VISIBLE_DEVICES, else the first; None where there is none.

    Never raises: no package, no driver, no such card and a card hidden from CUDA are all None.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    wanted = uuid if uuid is not None else first_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        if wanted is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        if wanted.isdecimal():
            return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(wanted)))
        return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(wanted))
    except pynvml.NVMLError:
        pynvml.nvmlShutdown()
        return None


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, such as `550.54.14`; None where there is none."""
    nvml = open_nvml()
    if nvml is None:
        return None
    try:
        return nvml.facts().driver_version
    finally:
        nvml.close()


def first_visible(devices: str | None) -> str | None:
    """Return index or UUID of the first card CUDA may use by CUDA_VISIBLE_DEVICES; None where it hides all of them.

    Unset means card 0. CUDA ends the list at the first invalid entry, so `-1` in front hides everything
    (CUDA C++ Programming Guide, environment variables).
    """
    if devices is None:
        return "0"
    first = devices.split(",")[0].strip()
    return first if first.isdecimal() or first.startswith(("GPU-", "MIG-")) else None


def _text(value: Any) -> str | None:
    # pynvml answers in bytes before version 11.5 and in text since.
    return value.decode(errors="replace") if isinstance(value, bytes) else value
