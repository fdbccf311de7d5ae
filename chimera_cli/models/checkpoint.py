"""Checkpoints: what has learned as safetensors, what is locked by name and hash, loop state for torch alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chimera_cli.errors import ChimeraError
from chimera_cli.models.dual_encoder import Architecture, DualEncoder, build_dual_encoder
from chimera_cli.models.image_tower import image_weights_hash
from chimera_cli.models.text_tower import text_weights_hash
from chimera_cli.models.weights import TINY


def save_model(model: DualEncoder, path: Path) -> None:
    """Replace `path` by the model in one step: learned tensors and buffers, the architecture in the header.

    Locked tensors of pretrained towers are not stored again; the header holds the hashes of the weights they come from.
    """
    state = model.state_dict()
    locked = _locked_names(model)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name not in locked}
    header = {
        "architecture": json.dumps(model.architecture.as_dict(), sort_keys=True),
        "weights": json.dumps(_weights_hashes(model.architecture), sort_keys=True),
        "locked": json.dumps(sorted(locked)),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, temporary, metadata=header)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ChimeraError(
            f"{path} can't be written: {error}", "free some space or set CHIMERA_HOME to another disk"
        ) from error


def load_model(path: Path, device: torch.device) -> DualEncoder:
    """Return the model stored in `path`, ready to evaluate.

    Raises ChimeraError where the file is missing or damaged, or where the locked weights on this machine are not those
    it was trained with.
    """
    header, stored = _read(path)
    architecture = Architecture(**json.loads(header["architecture"]))
    was, here = json.loads(header["weights"]), _weights_hashes(architecture)
    changed = [name for name in was if was[name] != here.get(name)]
    if changed:
        raise ChimeraError(
            f"{path} was trained with other weights of {', '.join(changed)} than are installed here",
            "install requirements.lock of the commit in environment.json",
        )
    locked = set(json.loads(header["locked"]))
    model = build_dual_encoder(architecture, pretrained=bool(locked))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in locked}
    given = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if wanted != given:
        names = sorted({name for name, _ in wanted.items() ^ given.items()})
        raise ChimeraError(
            f"{path} does not fit its architecture in {len(names)} tensors, such as {', '.join(names[:3])}",
            "it was made by another version; train again",
        )
    model.load_state_dict(stored, strict=False)
    return model.to(device).eval()


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Replace `path` by optimiser and loop state in one step; it is read again with `weights_only=True`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        torch.save(dict(state), temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise ChimeraError(
            f"{path} can't be written: {error}", "free some space or set CHIMERA_HOME to another disk"
        ) from error


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise ChimeraError(f"{path} does not exist", "the run saved no checkpoint; train again")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ChimeraError(f"{path} is damaged: {error}", "train again, or restore the file") from error


def _weights_hashes(architecture: Architecture) -> dict[str, str | None]:
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
