"""Several dual encoders as one model, and the one file that holds them."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from chimera_cli.errors import ChimeraError
from chimera_cli.models.checkpoint import Stored, model_of, read_stored, write_stored
from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.models.weights import TINY

# What the tensors of member k begin with, in the file of a combination.
_PREFIX = "members.{}."


class Combination(nn.Module):
    """Dual encoders that answer together: the cosine of its embeddings is the mean of its members' cosines.

    The members share nothing but locked towers of the same name, which are in memory once. Source: Lakshminarayanan et
    al. 2017, deep ensembles.
    """

    def __init__(self, members: Sequence[DualEncoder]) -> None:
        super().__init__()
        self.members: Sequence[DualEncoder] = nn.ModuleList(_sharing(members))  # type: ignore[assignment]


Encoder = DualEncoder | Combination


def members_of(model: Encoder) -> Sequence[DualEncoder]:
    """Return the dual encoders of a model: its members, or the one that it is itself."""
    return model.members if isinstance(model, Combination) else (model,)


def side_by_side(embeddings: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the members' unit embeddings, each (n, dim of its own), as one of unit length, (n, sum of the dims)."""
    if len(embeddings) == 1:
        return embeddings[0]
    return np.concatenate(embeddings, axis=1) / np.float32(math.sqrt(len(embeddings)))


def save_combination(checkpoints: Sequence[Path], path: Path) -> None:
    """Replace `path` by one file with all that has learned in `checkpoints`, those of single models.

    Raises ChimeraError for a checkpoint that is missing or damaged, or itself a combination.
    """
    stored = [read_stored(checkpoint) for checkpoint in checkpoints]
    for checkpoint, one in zip(checkpoints, stored, strict=True):
        if "members" in one.header:
            raise ChimeraError(f"{checkpoint} is a combination itself", "name the runs that it is made of instead")
    tensors = {
        _PREFIX.format(number) + name: tensor
        for number, one in enumerate(stored)
        for name, tensor in one.tensors.items()
    }
    write_stored(Stored({"members": [one.header for one in stored]}, tensors), path)


def load_model(path: Path, device: torch.device) -> Encoder:
    """Return the model, or the combination of models, that is stored in `path`, ready to evaluate.

    Raises ChimeraError where the file is missing or damaged, or where the locked weights on this machine are not those
    it was trained with.
    """
    stored = read_stored(path)
    if "members" not in stored.header:
        return model_of(stored, path, device)
    members = []
    for number, header in enumerate(stored.header["members"]):
        prefix = _PREFIX.format(number)
        own = {name.removeprefix(prefix): part for name, part in stored.tensors.items() if name.startswith(prefix)}
        members.append(model_of(Stored(header, own), path, device))
    return Combination(members).eval()


def _sharing(members: Sequence[DualEncoder]) -> Sequence[DualEncoder]:
    """Return the members, each with the locked towers of the first that has the same; one from scratch is alone."""
    towers: dict[tuple[object, ...], nn.Module] = {}
    for member in members:
        shape = member.architecture
        if shape.image_locked and shape.image_weights != TINY:
            key: tuple[object, ...] = ("image", shape.image_weights, shape.image_stages, shape.image_queries > 0)
            member.image_tower = towers.setdefault(key, member.image_tower)  # type: ignore[assignment]
        if shape.learn_layers == 0 and shape.text_weights != TINY:
            key = ("text", shape.text_weights, shape.text_hidden_states)
            member.text_tower = towers.setdefault(key, member.text_tower)  # type: ignore[assignment]
    return members
