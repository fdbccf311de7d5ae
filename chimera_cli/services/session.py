"""The frame of every measured run: a group with its status, the recorder, the machine watched, MLflow told."""

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError
from chimera_cli.events import (
    Evaluated,
    Event,
    Listener,
    MeasureTaken,
    RunFinished,
    RunStarted,
    Saved,
    StepDone,
    TelemetrySampled,
)
from chimera_cli.events import broadcast as tell_all
from chimera_cli.runs import (
    EVENTS,
    MADE_WITH,
    SCHEMA_VERSION,
    Group,
    append_json_line,
    cannot_write,
    content_hash,
    create_group,
    finish_group,
    json_line,
    read_json_lines,
    update_group,
    utc_now,
    write_json,
    write_sealed_json,
    write_text,
)

if TYPE_CHECKING:
    import torch


@contextmanager
def group_session(
    home: Path,
    kind: str,
    label: str,
    seeds: Sequence[int],
    facts: Mapping[str, Any],
    resumed: Group | None = None,
    command: str = "",
) -> Iterator[Group]:
    """Make a group and close it with the status that fits how the work ended; what went wrong is raised on.

    With `resumed` that group goes on instead, and group.json says since when, by which `command`. Raises ChimeraError
    where another process is at work on it.
    """
    group = create_group(home, kind, label, seeds, facts) if resumed is None else resumed
    with _at_work(group):
        if resumed is not None:
            group = _again(resumed, facts, command)
        try:
            yield group
        except KeyboardInterrupt:
            finish_group(group, "interrupted")
            raise
        except BaseException:
            finish_group(group, "failed")
            raise
        finish_group(group, "finished")


@contextmanager
def _at_work(group: Group) -> Iterator[None]:
    """Hold the right to work on a group: the system takes it back however the process ends, by kill -9 too."""
    path = group.path / ".working.lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ChimeraError(
                f"{group.name} is still being worked on by another process (pid {group.facts.get('pid')})",
                "wait until it is done, or stop it first",
            ) from error
        yield


def _again(group: Group, facts: Mapping[str, Any], command: str) -> Group:
    """Return the group running again. What two versions of the source made is evidence for neither of them."""
    before = group.facts
    sources = [before["source_hash"], facts["source_hash"]]
    return update_group(
        group,
        status="running",
        finished_at=None,
        pid=os.getpid(),
        # By its first process the tracking store knows the group.
        first_pid=before.get("first_pid", before.get("pid")),
        source_hash=sources[0] if sources[0] == sources[1] else content_hash(sources),
        contingency=facts.get("contingency", "off"),
        resumed=[*before.get("resumed", []), {"at": utc_now(), "command": command}],
    )


# ---- a wish to stop -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stop:
    """Whether somebody wants the run to end; while `heeded` the work looks at `wanted` by itself, after each step."""

    wanted: bool = False
    heeded: bool = False

    @contextmanager
    def heed(self) -> Iterator[None]:
        """Heed the wish while the block lasts."""
        self.heeded = True
        try:
            yield
        finally:
            self.heeded = False


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a wish to stop where the work heeds it, else and the second time into an interrupt.

    A signal that the process was told to ignore, as a shell's background jobs are, stays ignored.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def hear(_number: int, _frame: object) -> None:
        if stop.wanted or not stop.heeded:
            raise KeyboardInterrupt
        stop.wanted = True

    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- one seed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeedSession:
    """One seed at work: where it writes, whom it tells, and how it hands in its result."""

    directory: Path
    tell: Listener
    started_at: str
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
    steps_done: int | None = None,
    started_at: str | None = None,
) -> Iterator[SeedSession]:
    """Write config and environment of one seed, record all it announces, sample the machine until it is over.

    `steps_done` is what a seed that goes on has behind it, since `started_at`: its records are cut back to there.
    """
    from chimera_cli.telemetry.sampler import gpu_uuid_of, sample_machine

    directory = group.seed_dir(seed)
    _write_begin(directory, config, device, steps_done)
    record, others = recorder(directory), tell_all([telemetry_recorder(directory), *listeners])

    def tell(event: Event) -> None:
        # Not as one listener among others: a run whose metrics can't be written must stop, not lose them.
        record(event)
        others(event)

    since = started_at or utc_now()
    tell(RunStarted(group.name, group.kind, seed, str(directory), total_steps, dict(config)))

    def finish(figures: Mapping[str, float | None], details: Mapping[str, Any]) -> dict[str, Any]:
        result = _result(group, seed, since, figures, details)
        write_sealed_json(directory / "result.json", result)
        tell(Saved(str(directory / "result.json"), "result"))
        tell(RunFinished(seed, "finished", dict(figures)))
        return result

    try:
        # Another card of this machine, or an idle one beside a CPU run, says nothing about this run.
        uuid = gpu_uuid_of(device.index or 0) if device.type == "cuda" else None
        with sample_machine(on_sample=lambda snapshot: tell(snapshot.as_event()), gpu_uuid=uuid) as sampler:
            gpu_util = sampler.mean_gpu_util if device.type == "cuda" else lambda: None
            yield SeedSession(directory, tell, since, gpu_util, finish)
    except KeyboardInterrupt:
        tell(RunFinished(seed, "interrupted"))
        raise
    except BaseException as error:
        tell(RunFinished(seed, "failed"))
        known = _known(error)
        if known is error:
            raise
        raise known from error


def _write_begin(directory: Path, config: Mapping[str, Any], device: "torch.device", steps_done: int | None) -> None:
    """Write config and environment; a seed that goes on keeps the environment in which it began."""
    import yaml

    from chimera_cli.services.provenance import environment

    write_text(directory / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    if not steps_done or not (directory / "environment.json").is_file():
        write_json(directory / "environment.json", environment(device))
    if steps_done is not None:
        cut_back(directory, steps_done)


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
        "made_with": {name: group.facts.get(name) for name in MADE_WITH},
        "status": "finished",
        "started_at": started_at,
        "finished_at": utc_now(),
        "figures": dict(figures),
        "details": dict(details),
    }


def cut_back(directory: Path, steps_done: int) -> None:
    """Take from metrics.jsonl what comes after so many steps, and from both series a last line that a crash cut short.

    Steps that a crash took along are made again: each is recorded once.
    """
    for name, last in (("metrics.jsonl", steps_done - 1), ("telemetry.jsonl", None)):
        path = directory / name
        if not path.is_file():
            continue
        rows = [row for row in read_json_lines(path) if last is None or row["step"] <= last]
        write_text(path, "".join(json_line(row) for row in rows))


def recorder(directory: Path) -> Listener:
    """Return the listener that writes metrics.jsonl, one flushed line per step and evaluation, and events.jsonl."""

    def record(event: Event) -> None:
        if isinstance(event, StepDone):
            append_json_line(directory / "metrics.jsonl", {"step": event.step, "epoch": event.epoch, **event.metrics})
        elif isinstance(event, Evaluated):
            named = {f"{event.split}/{name}": value for name, value in event.figures.items()}
            append_json_line(directory / "metrics.jsonl", {"step": event.step, **named})
        elif isinstance(event, MeasureTaken):
            append_json_line(directory / EVENTS, {"event": "contingency", "at": utc_now(), **asdict(event)})

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
    pack = default_pack(home / "data", listener)
    if pack is not None:
        return pack
    from chimera_cli.services.data import prepare

    listener(Note("no pack is prepared yet: making the built-in toy set"))
    prepare("toy", home=home, listener=listener)
    pack = default_pack(home / "data", listener)
    if pack is None:
        raise ChimeraError("the toy pack can't be found after making it", "run `chimera data prepare toy`")
    return pack
