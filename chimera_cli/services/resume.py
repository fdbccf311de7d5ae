"""Training that goes on: which group, with which settings, from which checkpoint, and who writes the next ones."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.config import TrainConfig, differences
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, MeasureTaken, Note, Saved
from chimera_cli.runs import (
    SCHEMA_VERSION,
    Group,
    list_groups,
    read_json,
    read_sealed_json,
    resolve_run,
    seal_problem,
    write_json,
)

if TYPE_CHECKING:
    import torch

    from chimera_cli.services.session import SeedSession
    from chimera_cli.training.checkpoints import Learner
    from chimera_cli.training.distributed import Processes
    from chimera_cli.training.loop import Keeper, LoopState


# The config that a seed was begun with, where config.yaml tells of another since.
BEGUN_CONFIG = "config-begun.yaml"


# ---- the group ------------------------------------------------------------------------------------------------------


def resumable_group(home: Path, name: str) -> Group:
    """Return the training group that `name` means; `latest` is the one begun last that is not finished.

    Raises UsageError where there is none, where it is finished, and for a single seed.
    """
    groups = list_groups(home, "train")
    unfinished = [group for group in groups if group.status != "finished" and not group.combines]
    if name == "latest":
        if not unfinished:
            raise UsageError("there is no training run to go on with", "`chimera runs list` shows what has been run")
        return unfinished[0]
    group, seed = resolve_run(home, name, groups=groups)
    if seed is not None:
        raise UsageError(f"{name} is one seed, and a whole group goes on", f"--resume {group.name}")
    if group.combines:
        members = " ".join(str(part.get("run")) for part in group.combines)
        raise UsageError(f"{group.name} was combined, not trained", f"`chimera train combine {members}` does it again")
    if group.status == "finished":
        raise UsageError(f"{group.name} is finished", "start a new run, with more epochs perhaps")
    problem = seal_problem(group.facts)
    if problem:
        raise ChimeraError(f"{group.path / 'group.json'} {problem}", "restore the file, or train anew")
    return group


def recorded_config(group: Group) -> Path:
    """Return the config file that a group's first seed was begun with. Raises ChimeraError where none began."""
    paths = [group.seed_dir(seed) / name for seed in group.seeds for name in (BEGUN_CONFIG, "config.yaml")]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise ChimeraError(f"no seed of {group.name} has begun", "start it anew; nothing is lost")
    return found


def refuse_changes(group: Group, config: TrainConfig, seeds: Sequence[int], facts: Mapping[str, Any]) -> None:
    """Raise UsageError naming what differs between a group and the run that is to go on with it.

    Settings and seeds, the pack's content, the shards, the machine: figures of two of them are never mixed.
    """
    recorded = _recorded(group)
    changed = differences(recorded, config.model_dump())
    if list(seeds) != list(group.seeds):
        changed.append(f"seeds {list(group.seeds)} (now {list(seeds)})")
    if changed:
        raise UsageError(
            f"{group.name} was begun with other settings: {', '.join(changed)}",
            f"`chimera train full --resume {group.name}` alone takes those of the run",
        )
    if group.facts.get("config_hash") != facts["config_hash"]:
        raise ChimeraError(
            f"{recorded_config(group)} was edited after the run began", "restore the file, or train anew"
        )
    for name in ("pack", "stream", "init_from", "hardware"):
        changed = differences(_mapping(group.facts.get(name)), _mapping(facts.get(name)))
        if changed:
            raise ChimeraError(
                f"{group.name} was begun with another {name}: {', '.join(changed)}",
                "go on where it was begun, or train anew: figures of both would be mixed",
            )


def note_other_source(group: Group, facts: Mapping[str, Any], listener: Listener) -> None:
    """Tell that the source was changed since a group began: the run goes on, and is no evidence for either source."""
    if group.facts.get("source_hash") != facts["source_hash"]:
        listener(
            Note(f"the source was changed since {group.name} began: it will be no evidence for `slo check`", "warning")
        )


def finished_result(group: Group, seed: int) -> dict[str, Any] | None:
    """Return the result of a seed that is finished, None where it is still to be trained."""
    path = group.seed_dir(seed) / "result.json"
    return read_sealed_json(path) if path.is_file() else None


def _recorded(group: Group) -> dict[str, Any]:
    import yaml

    values = yaml.safe_load(recorded_config(group).read_text(encoding="utf-8"))
    return dict(values) if isinstance(values, dict) else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# ---- one seed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    """What a seed left behind: the content of its newest whole checkpoint, None where it has none."""

    content: Mapping[str, Any] | None = None

    @property
    def updates(self) -> int:
        return 0 if self.content is None else int(self.content["loop"]["done"])

    @property
    def place(self) -> tuple[int, int]:
        """Return epoch and number of the next batch."""
        return (0, 0) if self.content is None else (self.content["loop"]["epoch"], self.content["loop"]["number"])

    @property
    def started_at(self) -> str | None:
        return None if self.content is None else str(self.content["session"]["started_at"])

    @property
    def wall_s(self) -> float:
        return 0.0 if self.content is None else float(self.content["session"]["wall_s"])

    @property
    def peaks(self) -> Mapping[str, float | None]:
        return {} if self.content is None else dict(self.content["session"]["peaks"])

    @property
    def measures(self) -> Sequence[MeasureTaken]:
        """Return the contingency measures that had been taken by then."""
        return () if self.content is None else [MeasureTaken(**row) for row in self.content["session"]["contingency"]]


def kept_by(directory: Path, identity: Mapping[str, Any], listener: Listener) -> Kept:
    """Return what the seed in `directory` left behind.

    Raises ChimeraError where the checkpoint was made with other settings than `identity`, naming the keys.
    """
    from chimera_cli.training.checkpoints import read_checkpoint

    content = read_checkpoint(directory / "checkpoints", listener)
    if content is not None:
        changed = differences(content["identity"], identity)
        if changed:
            raise ChimeraError(
                f"the checkpoint in {directory} was made with other settings: {', '.join(changed)}",
                "it belongs to another run; restore the run's own, or train anew",
            )
    return Kept(content)


def take_up(
    kept: Kept,
    learner: "Learner",
    directory: Path,
    device: "torch.device",
    processes: "Processes",
    measures: Sequence[MeasureTaken] = (),
) -> "LoopState":
    """Return the state of the loop to begin with, everything that learns put back to where it was.

    Rates that `measures` have halved since then are halved.
    """
    from chimera_cli.training.checkpoints import restore
    from chimera_cli.training.contingency import halve_rates
    from chimera_cli.training.loop import LoopState

    if kept.content is None:
        if processes.leads:
            _drop_best(directory / "checkpoints")
        return LoopState()
    state = restore(kept.content, learner, device, processes)
    halve_rates(learner.optimiser, learner.schedule, halvings(measures) - halvings(kept.measures))
    if processes.leads:
        _mend_best(learner, state, directory / "checkpoints")
    return state


def _mend_best(learner: "Learner", state: "LoopState", folder: Path) -> None:
    """Make best.safetensors the one that the checkpoint knows of.

    It is written after the checkpoint: a crash in between leaves an older one, which this model replaces. One of a
    future that a damaged checkpoint took along goes: it will be made again, and best.json tells so until then. Raises
    ChimeraError where it is missing, or another, and this model is not it.
    """
    path = folder / "best.json"
    step = read_json(path).get("step") if path.is_file() else None
    if step == state.best_step and (step is None or (folder / "best.safetensors").is_file()):
        return
    if state.best_step is not None and state.best_step == state.done - 1:
        save_best(learner, state, folder)
    elif step is not None and step >= state.done:
        (folder / "best.safetensors").unlink(missing_ok=True)
    else:
        there = "no best model" if step in (None, state.best_step) else f"the best model of step {step}"
        raise ChimeraError(
            f"{folder} holds {there}, and the run's is that of step {state.best_step}",
            "the files were changed; restore them, or train anew",
        )


def _drop_best(folder: Path) -> None:
    """Remove the best model of a training that is given up: one made anew may be best at the same step."""
    for name in ("best.json", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)


def save_best(learner: "Learner", state: "LoopState", folder: Path) -> None:
    """Write the model as the best so far; where there is an average of the weights, that is the model."""
    from chimera_cli.training.checkpoints import save_shown

    save_shown(learner, folder / "best.safetensors")
    best = {"schema_version": SCHEMA_VERSION, "step": state.best_step, "epoch": state.best_epoch}
    write_json(folder / "best.json", best)


def keeper_of(
    learner: "Learner",
    session: "SeedSession",
    config: TrainConfig,
    identity: Mapping[str, Any],
    kept: Kept,
    measures: Sequence[MeasureTaken],
    device: "torch.device",
    processes: "Processes",
    stop: Callable[[], bool],
) -> "Keeper":
    """Return who writes the checkpoints of a seed: every so many updates and minutes, the best, and at a `stop`."""
    from chimera_cli.services.session import memory_figures
    from chimera_cli.training.checkpoints import captured, write_checkpoint
    from chimera_cli.training.loop import Keeper

    folder = session.directory / "checkpoints"
    began_at = saved_at = time.monotonic()

    def due(state: "LoopState") -> bool:
        by_updates = config.save_every_updates is not None and state.done % config.save_every_updates == 0
        return by_updates or (processes.leads and time.monotonic() - saved_at >= 60 * config.save_every_minutes)

    def save(state: "LoopState", better: bool) -> None:
        nonlocal saved_at
        content = captured(learner, state, device, processes)
        if processes.leads:
            wall_s = kept.wall_s + time.monotonic() - began_at
            peaks = highest(kept.peaks, memory_figures(device))
            about: dict[str, Any] = {"started_at": session.started_at, "wall_s": wall_s, "peaks": peaks}
            about["contingency"] = [asdict(measure) for measure in measures]
            content |= {"identity": dict(identity), "session": about}
            write_checkpoint(content, folder, state.done, config.keep)
            if better:
                save_best(learner, state, folder)
                session.tell(Saved(str(folder / "best.safetensors"), "best checkpoint", state.done - 1))
        saved_at = time.monotonic()

    return Keeper(due, save, stop)


def highest(before: Mapping[str, float | None], now: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the peaks over both parts of a run; None where neither measured one."""
    pairs = {name: [value for value in (before.get(name), now[name]) if value is not None] for name in now}
    return {name: max(values, default=None) for name, values in pairs.items()}


# ---- measures -------------------------------------------------------------------------------------------------------


HALVED: Literal["half the learning rates"] = "half the learning rates"
# The key that a smaller image changes.
SIDE = "image.image_size"


def halvings(measures: Sequence[MeasureTaken]) -> int:
    """Return how often the learning rates were halved since the seed began, or began anew with smaller images."""
    anew = [place for place, measure in enumerate(measures) if measure.back_to == 0 and SIDE in measure.settings]
    return sum(measure.measure == HALVED for measure in measures[max(anew, default=0) :])
