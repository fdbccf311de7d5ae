"""The NVML gate against a driver made of plain functions: what it reads, what it can't, and that it never raises."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from chimera_cli.telemetry.nvml import GpuReading, driver_version, first_visible, open_nvml

GIB = 2**30


class FakeError(Exception):
    """Stands for pynvml.NVMLError, whose subclasses all refusals of the driver are."""


def refuse(*_arguments: Any) -> Any:
    raise FakeError


def driver(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> SimpleNamespace:
    """Install a pynvml for a GTX 1080 at work; `changes` replace single functions."""
    calls: dict[str, Any] = {
        "NVMLError": FakeError,
        "NVML_ERROR_NOT_FOUND": 6,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: f"index {index}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"uuid {uuid}",
        "nvmlDeviceGetMemoryInfo": lambda _h: SimpleNamespace(total=8 * GIB, used=2 * GIB, free=6 * GIB),
        "nvmlDeviceGetUtilizationRates": lambda _h: SimpleNamespace(gpu=87),
        "nvmlDeviceGetPowerUsage": lambda _h: 171_500,
        "nvmlDeviceGetTemperature": lambda _h, _sensor: 66,
        "nvmlDeviceGetCudaComputeCapability": lambda _h: (6, 1),
        "nvmlDeviceGetName": lambda _h: b"NVIDIA GeForce GTX 1080",
        "nvmlSystemGetDriverVersion": lambda: "550.54.14",
    }
    fake = SimpleNamespace(**(calls | changes))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_readings_in_the_units_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch)
    card = open_nvml()
    assert card is not None
    assert card.read() == GpuReading(0.87, 2.0, 8.0, 66.0, 171.5)
    facts = card.facts()
    assert (facts.name, facts.capability, facts.driver_version) == ("NVIDIA GeForce GTX 1080", (6, 1), "550.54.14")
    assert (facts.vram_total_gb, facts.vram_free_gb) == (8.0, 6.0)
    assert driver_version() == "550.54.14"


def test_a_field_that_is_refused_is_missing_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, nvmlDeviceGetUtilizationRates=refuse, nvmlDeviceGetPowerUsage=refuse)
    card = open_nvml()
    assert card is not None
    reading = card.read()
    assert reading.gpu_util is None
    assert reading.gpu_power_w is None
    assert reading.vram_used_gb == 2.0


def test_no_package_no_driver_and_no_card_are_all_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shut = []
    driver(monkeypatch, nvmlInit=refuse)
    assert open_nvml() is None
    driver(monkeypatch, nvmlDeviceGetHandleByIndex=refuse, nvmlShutdown=lambda: shut.append(1))
    assert open_nvml() is None
    assert shut == [1]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() is None
    assert driver_version() is None


def test_the_card_is_the_one_that_cuda_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    driver(monkeypatch, nvmlDeviceGetHandleByIndex=asked.append, nvmlDeviceGetHandleByUUID=asked.append)
    open_nvml()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    open_nvml()
    open_nvml(uuid="GPU-1234")
    assert asked == [0, 2, "GPU-1234"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert open_nvml() is None


@pytest.mark.parametrize(
    ("devices", "first"),
    [(None, "0"), ("1", "1"), (" 3 ,1", "3"), ("GPU-ab,0", "GPU-ab"), ("MIG-x", "MIG-x"), ("", None), ("-1,0", None)],
)
def test_first_visible_card(devices: str | None, first: str | None) -> None:
    assert first_visible(devices) == first
