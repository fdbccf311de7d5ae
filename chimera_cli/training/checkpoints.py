"""Checkpoints that training goes on from: the newest few, each written whole or not at all and checked when read.

`checkpoints.json` names them with their hashes, the newest last; a file it does not name is a leftover of a crash. The
files hold what learns, optimiser, schedule, scaler, the random numbers of every process and the state of the loop.
"""

import hashlib
import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener, Note, ignore
from chimera_cli.models.checkpoint import learned_state, load_learned_state, save_model, save_state, weights_hashes
from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.runs import SCHEMA_VERSION, read_sealed_json, write_sealed_json
from chimera_cli.training.averaging import WeightAverage
from chimera_cli.training.distributed import ALONE, Processes
from chimera_cli.training.loop import LoopState

INDEX = "checkpoints.json"


@dataclass(frozen=True, slots=True)
class Learner:
    """All that an update changes."""

    model: DualEncoder
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.grad_scaler.GradScaler
    average: WeightAverage | None = None


# ---- files ----------------------------------------------------------------------------------------------------------


def write_checkpoint(content: Mapping[str, Any], folder: Path, step: int, keep: int) -> Path:
    """Write `content` as the newest checkpoint, after `step` updates, and return its file; the newest `keep` stay.

    A crash at any moment leaves the checkpoints that were there, or these and the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    # One of the same name is of a run's lost future: until the new one is in the index it counts as damaged.
    save_state(content, path)
    entry = {"file": path.name, "step": step, "sha256": _hash(path)}
    earlier = [one for one in _entries(folder) if one["step"] < step]
    kept = [*earlier, entry][-max(1, keep) :]
    write_sealed_json(folder / INDEX, {"schema_version": SCHEMA_VERSION, "checkpoints": kept})
    named = {one["file"] for one in kept}
    for leftover in folder.glob("step-*.pt"):
        if leftover.name not in named:
            leftover.unlink(missing_ok=True)
    return path


def read_checkpoint(folder: Path, listener: Listener = ignore) -> dict[str, Any] | None:
    """Return the content of the newest checkpoint that is whole, None where there never was one.

    One that is missing or damaged is passed over with a warning. Raises ChimeraError where none is whole.
    """
    entries = _entries(folder)
    for number, entry in enumerate(reversed(entries)):
        path = folder / str(entry["file"])
        problem = _problem(path, str(entry["sha256"]))
        if problem is None:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return content
        rest = "falling back to the one before" if number + 1 < len(entries) else "there is none before it"
        listener(Note(f"the checkpoint {path.name} after {entry['step']} updates {problem}: {rest}", "warning"))
    if entries:
        raise ChimeraError(f"no checkpoint in {folder} is whole", "restore the files, or train anew without --resume")
    return None


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, the index first: whatever a crash leaves of them, training begins anew."""
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("step-*.pt"):
        path.unlink(missing_ok=True)


def has_checkpoint(folder: Path) -> bool:
    """Return whether the folder names a checkpoint, whole or not."""
    return bool(_entries(folder))


def _entries(folder: Path) -> list[dict[str, Any]]:
    path = folder / INDEX
    return list(read_sealed_json(path)["checkpoints"]) if path.is_file() else []


def _problem(path: Path, sha256: str) -> str | None:
    if not path.is_file():
        return "is missing"
    return None if _hash(path) == sha256 else "is damaged (its hash is not the recorded one)"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_shown(learner: Learner, path: Path) -> None:
    """Write the model as it is evaluated: with the average of its weights where there is one."""
    with nullcontext() if learner.average is None else learner.average.shown(learner.model):
        save_model(learner.model, path)


# ---- content --------------------------------------------------------------------------------------------------------


def captured(learner: Learner, state: LoopState, device: torch.device, processes: Processes = ALONE) -> dict[str, Any]:
    """Return all that training needs to go on as if nothing had happened; every process has to call it."""
    average = learner.average
    return {
        "model": learned_state(learner.model),
        "weights": weights_hashes(learner.model.architecture),
        "optimiser": learner.optimiser.state_dict(),
        "schedule": learner.schedule.state_dict(),  # type: ignore[no-untyped-call]
        "scaler": learner.scaler.state_dict(),
        "average": None if average is None else {"weights": average.weights, "updates": average.updates},
        "loop": state.as_dict(),
        "random": processes.gather(random_state(device)),
    }


def restore(
    content: Mapping[str, Any], learner: Learner, device: torch.device, processes: Processes = ALONE
) -> LoopState:
    """Put back what `captured` returned and return the state of the loop.

    Raises ChimeraError where the locked weights on this machine are others, where tensors have another shape, and
    where it was made by another number of processes: their random numbers are missing.
    """
    here = weights_hashes(learner.model.architecture)
    changed = [name for name, was in content["weights"].items() if was not in (None, here.get(name))]
    if changed:
        raise ChimeraError(
            f"the checkpoint was trained with other weights of {', '.join(changed)} than are installed here",
            "install requirements.lock of the commit in environment.json",
        )
    if len(content["random"]) != processes.world:
        raise ChimeraError(
            f"the run was begun by {len(content['random'])} processes, not by {processes.world}",
            f"torchrun --nproc-per-node {len(content['random'])}",
        )
    load_learned_state(learner.model, content["model"], "the checkpoint")
    learner.optimiser.load_state_dict(content["optimiser"])
    learner.schedule.load_state_dict(content["schedule"])
    if learner.scaler.is_enabled():
        learner.scaler.load_state_dict(content["scaler"])
    if learner.average is not None:
        for name, value in learner.average.weights.items():
            value.copy_(content["average"]["weights"][name])
        learner.average.updates = content["average"]["updates"]
    set_random_state(content["random"][processes.rank], device)
    return LoopState(**content["loop"])


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the random numbers of torch, on the device too, of numpy and of Python, as `weights_only` reads them."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Let all random numbers go on from `state`, as `random_state` returned it."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, following = state["python"]
    random.setstate((version, tuple(words), following))
