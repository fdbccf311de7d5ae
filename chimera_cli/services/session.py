"""The frame of every measured run: a group with its status, the recorder, the machine watched, MLflow told."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError
from chimera_cli.events import Evaluated, Event, Listener, RunFinished, RunStarted, Saved, StepDone, TelemetrySampled
from chimera_cli.events import broadcast as tell_all
from chimera_cli.runs import (
    SCHEMA_VERSION,
    Group,
    append_json_line,
    create_group,
    finish_group,
    utc_now,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    import torch


@contextmanager
def group_session(home: Path, kind: str, label: str, seeds: Sequence[int], facts: Mapping[str, Any]) -> Iterator[Group]:
    """Make a group and close it with the status that fits how the work ended; what went wrong is raised on."""
    group = create_group(home, kind, label, seeds, facts)
    try:
        yield group
    except KeyboardInterrupt:
        finish_group(group, "interrupted")
        raise
    except BaseException:
        finish_group(group, "failed")
        raise
    finish_group(group, "finished")


@dataclass(frozen=True, slots=True)
class SeedSession:
    """One seed at work: where it writes, whom it tells, and how it hands in its result."""

    directory: Path
    tell: Listener
    mean_gpu_util: Callable[[], float | None]
    finish: Callable[[Mapping[str, float | None], Mapping[str, Any]], dict[str, Any]]


@contextmanager
def seed_session(
    group: Group,
    seed: int,
    config: Mapping[str, Any],
    device: "torch.device",
    listeners: Sequence[Listener],
    total_steps: int,
) -> Iterator[SeedSession]:
    """Write config and environment of one seed, record all it announces, sample the machine until it is over."""
    import yaml

    from chimera_cli.services.provenance import environment
    from chimera_cli.telemetry.sampler import gpu_uuid_of, sample_machine

    directory = group.seed_dir(seed)
    write_text(directory / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    write_json(directory / "environment.json", environment(device))
    record, others = recorder(directory), tell_all([telemetry_recorder(directory), *listeners])

    def tell(event: Event) -> None:
        # Not as one listener among others: a run whose metrics can't be written must stop, not lose them.
        record(event)
        others(event)

    started_at = utc_now()
    tell(RunStarted(group.name, group.kind, seed, str(directory), total_steps, dict(config)))

    def finish(figures: Mapping[str, float | None], details: Mapping[str, Any]) -> dict[str, Any]:
        result = _result(group, seed, started_at, figures, details)
        write_json(directory / "result.json", result)
        tell(Saved(str(directory / "result.json"), "result"))
        tell(RunFinished(seed, "finished", dict(figures)))
        return result

    try:
        # Another card of this machine, or an idle one beside a CPU run, says nothing about this run.
        uuid = gpu_uuid_of(device.index or 0) if device.type == "cuda" else None
        with sample_machine(on_sample=lambda snapshot: tell(snapshot.as_event()), gpu_uuid=uuid) as sampler:
            gpu_util = sampler.mean_gpu_util if device.type == "cuda" else lambda: None
            yield SeedSession(directory, tell, gpu_util, finish)
    except KeyboardInterrupt:
        tell(RunFinished(seed, "interrupted"))
        raise
    except BaseException as error:
        tell(RunFinished(seed, "failed"))
        known = _known(error)
        if known is error:
            raise
        raise known from error


def _known(error: BaseException) -> BaseException:
    """Return a memory that is full as a known failure, anything else as it is.

    By name: torch's error can't be named here without importing torch.
    """
    if type(error).__name__ != "OutOfMemoryError":
        return error
    return ChimeraError(
        "the GPU has too little memory for this run", "--set batch=... with half of it, or lock a tower"
    )


def _result(
    group: Group, seed: int, started_at: str, figures: Mapping[str, float | None], details: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": group.kind,
        "seed": seed,
        "status": "finished",
        "started_at": started_at,
        "finished_at": utc_now(),
        "figures": dict(figures),
        "details": dict(details),
    }


def recorder(directory: Path) -> Listener:
    """Return the listener that writes metrics.jsonl, one flushed line per step and per evaluation."""

    def record(event: Event) -> None:
        if isinstance(event, StepDone):
            append_json_line(directory / "metrics.jsonl", {"step": event.step, "epoch": event.epoch, **event.metrics})
        elif isinstance(event, Evaluated):
            named = {f"{event.split}/{name}": value for name, value in event.figures.items()}
            append_json_line(directory / "metrics.jsonl", {"step": event.step, **named})

    return record


def telemetry_recorder(directory: Path) -> Listener:
    """Return the listener that writes telemetry.jsonl, one flushed line per machine snapshot."""

    def record(event: Event) -> None:
        if isinstance(event, TelemetrySampled):
            append_json_line(directory / "telemetry.jsonl", {"elapsed_s": event.elapsed_s, **event.values})

    return record


def memory_figures(device: "torch.device") -> dict[str, float | None]:
    """Return the peaks of VRAM and RAM by their names of figures."""
    from chimera_cli.runtime import memory_peaks

    return asdict(memory_peaks(device))


def need_pack(home: Path, name: str | None, listener: Listener) -> Any:
    """Return the pack called `name`, else the newest that is not `toy`, else a toy pack made on the spot.

    A fresh machine without data or network thus still gets its proof of life. Raises UsageError for an unknown name.
    """
    from chimera_cli.data.pack import default_pack, open_pack
    from chimera_cli.events import Note

    if name is not None:
        return open_pack(home / "data", name)
    pack = default_pack(home / "data")
    if pack is not None:
        return pack
    from chimera_cli.services.data import prepare

    listener(Note("no pack is prepared yet: making the built-in toy set"))
    prepare("toy", home=home, listener=listener)
    pack = default_pack(home / "data")
    if pack is None:
        raise ChimeraError("the toy pack can't be found after making it", "run `chimera data prepare toy`")
    return pack
