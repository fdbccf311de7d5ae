"""The sampler thread: what a snapshot holds, that windows count what they should, that it stops when told."""

import dataclasses
import threading

import pytest

from chimera_cli.events import TelemetrySampled
from chimera_cli.telemetry import sampler as module
from chimera_cli.telemetry.nvml import GpuReading
from chimera_cli.telemetry.sampler import Sampler, Snapshot, cpu_share, ram_total_gb, sample_machine


class FakeCard:
    """A card that answers and remembers having been let go."""

    closed = False

    def read(self) -> GpuReading:
        return GpuReading(0.5, 1.0, 8.0, 60.0, 100.0)

    def close(self) -> None:
        self.closed = True


def snapshot(gpu_util: float | None) -> Snapshot:
    return Snapshot(1.0, gpu_util, None, None, None, None, 0.5, 1.0, 8.0)


def test_snapshots_of_this_process_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard()
    monkeypatch.setattr(module, "open_nvml", lambda _uuid: card)
    seen: list[Snapshot] = []
    enough = threading.Event()

    def look(now: Snapshot) -> None:
        seen.append(now)
        if len(seen) == 3:
            enough.set()

    with sample_machine(0.01, look) as machine:
        assert enough.wait(20)
    count = len(seen)
    newest = machine.latest()
    assert newest is seen[-1]
    assert card.closed
    assert not [thread for thread in threading.enumerate() if thread.name == "chimera-sampler"]
    assert len(seen) == count
    assert machine.mean_gpu_util() == 0.5
    assert newest.vram_total_gb == 8.0
    assert newest.cpu_util is not None
    assert 0 <= newest.cpu_util <= 1
    assert newest.ram_used_gb is not None
    assert 0.01 < newest.ram_used_gb <= ram_total_gb()
    assert [s.elapsed_s for s in seen] == sorted(s.elapsed_s for s in seen)
    with pytest.raises(dataclasses.FrozenInstanceError):
        newest.gpu_util = 1.0  # type: ignore[misc]


def test_leaving_the_block_does_not_wait_out_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_nvml", lambda _uuid: None)
    # The test would run into its time limit if the thread slept out the hour; joining it gives up after 5 seconds.
    with sample_machine(3600) as machine:
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "chimera-sampler"]
    assert machine.latest() is None
    assert machine.mean_gpu_util() is None


def test_a_window_forgets_the_warm_up_and_missing_readings() -> None:
    machine = Sampler()
    for share in (0.1, None):
        machine.record(snapshot(share))
    machine.start_window()
    assert machine.mean_gpu_util() is None
    for share in (0.8, None, 1.0):
        machine.record(snapshot(share))
    assert machine.mean_gpu_util() == pytest.approx(0.9)


def test_a_snapshot_as_event_holds_the_names_of_telemetry() -> None:
    event = snapshot(None).as_event()
    assert isinstance(event, TelemetrySampled)
    assert event.elapsed_s == 1.0
    assert list(event.values) == [
        "gpu_util", "vram_used_gb", "vram_total_gb", "gpu_temperature_c", "gpu_power_w", "cpu_util", "ram_used_gb",
        "ram_total_gb",
    ]  # fmt: skip
    assert event.values["gpu_util"] is None


def test_cpu_share_over_cores_with_processes_coming_and_going() -> None:
    # 1 s of this process and 0.5 s of a new child on two cores in one second; the child that ended counts nothing.
    assert cpu_share({1: 10.0, 2: 99.0}, {1: 11.0, 3: 0.5}, 2.0) == pytest.approx(0.75)
    assert cpu_share({1: 0.0}, {1: 9.0}, 2.0) == 1.0
    assert cpu_share({}, {}, 0.0) is None
