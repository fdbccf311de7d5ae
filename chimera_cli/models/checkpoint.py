"""Checkpoints: what has learned as safetensors, what is locked by name and hash, loop state for torch alone."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chimera_cli.errors import ChimeraError
from chimera_cli.models.dual_encoder import Architecture, DualEncoder, build_dual_encoder
from chimera_cli.models.image_tower import image_weights_hash
from chimera_cli.models.text_tower import text_weights_hash
from chimera_cli.models.weights import TINY

# The entry of the safetensors metadata that says what the tensors belong to.
_HEADER = "chimera"


@dataclass(frozen=True, slots=True)
class Stored:
    """What a checkpoint holds: tensors by name, and the header that says what they belong to."""

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save_model(model: DualEncoder, path: Path) -> None:
    """Replace `path` by the model in one step: learned tensors and buffers, the architecture in the header.

    Locked tensors of pretrained towers are not stored again; the header holds the hashes of the weights they come from.
    """
    stored = {name: tensor.cpu() for name, tensor in learned_state(model).items()}
    header = {
        "architecture": model.architecture.as_dict(),
        "weights": weights_hashes(model.architecture),
        "locked": sorted(_locked_names(model)),
    }
    write_stored(Stored(header, stored), path)


def write_stored(stored: Stored, path: Path) -> None:
    """Replace `path` by what it is to hold, in one step. Raises ChimeraError where it can't be written."""
    # One entry: safetensors writes several in random order, and the same model should give the same bytes.
    metadata = {_HEADER: json.dumps(stored.header, sort_keys=True)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(stored.tensors), temporary, metadata=metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ChimeraError(
            f"{path} can't be written: {error}", "free some space or set CHIMERA_HOME to another disk"
        ) from error


def model_of(stored: Stored, path: Path, device: torch.device) -> DualEncoder:
    """Return the model of which `stored` is what `path` holds, ready to evaluate.

    Raises ChimeraError where they don't fit each other, or where the locked weights on this machine are not those it
    was trained with.
    """
    architecture = Architecture(**stored.header["architecture"])
    _refuse_other_weights(path, stored.header["weights"], architecture)
    locked = set(stored.header["locked"])
    model = build_dual_encoder(architecture, pretrained=bool(locked))
    _load(model, stored.tensors, locked, str(path))
    return model.to(device).eval()


def begin_with(model: DualEncoder, path: Path) -> None:
    """Put what has learned in the checkpoint `path` into a model; raises as `fitting_state`.

    What was locked there stays as the named weights have it, and may learn here.
    """
    model.load_state_dict(dict(fitting_state(model, path)), strict=False)


def fitting_state(model: DualEncoder, path: Path) -> dict[str, Tensor]:
    """Return what has learned in the checkpoint `path`, for a model in which all of it learns, and maybe more.

    Raises ChimeraError where the file is missing or damaged, where it was trained with other weights, and where the
    model has other towers or heads, or locks what has learned there.
    """
    single = _single(path)
    header, stored = single.header, dict(single.tensors)
    there, here = Architecture(**header["architecture"]), model.architecture
    unlike = [f"{key} {was}, not {now}" for key, was, now in _shapes(there, here) if was != now]
    if unlike:
        raise ChimeraError(
            f"{path} was trained with {unlike[0]}", "give the recipe the same, or begin with another run"
        )
    _refuse_other_weights(path, header["weights"], here)
    ours = learned_state(model)
    locked = sorted(name for name in stored if name not in ours and name in model.state_dict())
    if locked:
        raise ChimeraError(
            f"{path} has learned {len(locked)} tensors that are locked here, such as {locked[0]}",
            "let as much learn as in that run: image.locked, image.learn_blocks, text.learn_layers",
        )
    wrong = _misfits({name: tensor for name, tensor in ours.items() if name not in header["locked"]}, stored)
    if wrong:
        raise ChimeraError(f"{path} does not fit this recipe in {wrong}", "begin with a run of this version")
    return stored


def _shapes(there: Architecture, here: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Yield what two models must have in common for the heads to mean the same: the key of a recipe and both values."""
    for key, name in (
        ("image.weights", "image_weights"),
        ("image.stages", "image_stages"),
        ("text.weights", "text_weights"),
        ("text.hidden_states", "text_hidden_states"),
        ("heads.kind", "head"),
        ("heads.hidden", "hidden"),
        ("heads.dim", "dim"),
        ("heads.members", "members"),
        ("heads.queries", "image_queries"),
    ):
        was, now = getattr(there, name), getattr(here, name)
        yield (key, list(was), list(now)) if isinstance(was, tuple) else (key, was, now)
    was, now = ("infonce" if one.logit_bias is None else "sigmoid" for one in (there, here))
    yield "loss.kind", was, now


def _refuse_other_weights(path: Path, was: Mapping[str, str | None], architecture: Architecture) -> None:
    here = weights_hashes(architecture)
    # Where no hash was recorded, the name was all that was known.
    changed = [name for name in was if was[name] not in (None, here.get(name))]
    if changed:
        raise ChimeraError(
            f"{path} was trained with other weights of {', '.join(changed)} than are installed here",
            "install requirements.lock of the commit in environment.json",
        )


def learned_state(model: DualEncoder) -> dict[str, Tensor]:
    """Return the tensors and buffers that the named weights don't give back: what has learned."""
    locked = _locked_names(model)
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in locked}


def load_learned_state(model: DualEncoder, stored: Mapping[str, Tensor], origin: str) -> None:
    """Put `learned_state` back into a model of the same architecture.

    Raises ChimeraError naming `origin` and the tensors that are of another shape, missing or too many.
    """
    _load(model, stored, _locked_names(model), origin)


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Replace `path` by optimiser and loop state in one step, synced to disk; `weights_only=True` reads it again."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise ChimeraError(
            f"{path} can't be written: {error}", "free some space or set CHIMERA_HOME to another disk"
        ) from error


def read_stored(path: Path) -> Stored:
    """Return what a checkpoint holds. Raises ChimeraError where it is missing, damaged or of another version."""
    if not path.is_file():
        raise ChimeraError(f"{path} does not exist", "the run saved no checkpoint; train again")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ChimeraError(f"{path} is damaged: {error}", "train again, or restore the file") from error
    if not header:
        raise ChimeraError(f"{path} was not written by this version of chimera", "train again")
    return Stored(header, stored)


def _single(path: Path) -> Stored:
    """Return what the checkpoint of one model holds. Raises ChimeraError for a combination of several."""
    stored = read_stored(path)
    if "members" in stored.header:
        count = len(stored.header["members"])
        raise ChimeraError(f"{path} is a combination of {count} models", "name one of the runs that it is made of")
    return stored


def _load(model: DualEncoder, stored: Mapping[str, Tensor], locked: set[str], origin: str) -> None:
    needed = {name: tensor for name, tensor in model.state_dict().items() if name not in locked}
    wrong = _misfits(needed, stored)
    if wrong:
        raise ChimeraError(
            f"{origin} does not fit its architecture in {wrong}", "it was made by another version; train again"
        )
    model.load_state_dict(dict(stored), strict=False)


def _misfits(needed: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """Return how many tensors are missing, too many or of another shape, and which for example; "" where all fit."""
    wanted, given = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (needed, stored))
    wrong = sorted({name for name, _ in wanted.items() ^ given.items()})
    words = [f"{name} {given.get(name, 'missing')} for {wanted.get(name, 'none')}" for name in wrong[:3]]
    return f"{len(wrong)} tensors, such as {', '.join(words)}" if wrong else ""


def weights_hashes(architecture: Architecture) -> dict[str, str | None]:
    """Return the hashes of the weights that the towers come from, by name; None where only the name is known."""
    return {
        architecture.image_weights: image_weights_hash(architecture.image_weights),
        architecture.text_weights: text_weights_hash(architecture.text_weights),
    }


def _locked_names(model: DualEncoder) -> set[str]:
    """Return the tensors that the named weights give back: those of pretrained towers that don't learn.

    A tower from scratch has no source but the checkpoint; buffers (batch-norm statistics) go with a tower in which
    nothing learns.
    """
    names: set[str] = set()
    towers = (
        ("image_tower", model.image_tower, model.architecture.image_weights),
        ("text_tower", model.text_tower, model.architecture.text_weights),
    )
    for prefix, tower, weights in towers:
        if weights == TINY:
            continue
        parameters = {f"{prefix}.{name}": value.requires_grad for name, value in tower.named_parameters()}
        names |= {name for name, learns in parameters.items() if not learns}
        if not any(parameters.values()):
            names |= {f"{prefix}.{name}" for name, _ in tower.named_buffers()}
    return names & set(model.state_dict())
