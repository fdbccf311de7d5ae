"""Features of whole splits through a tower, and their cache on disk for towers that are locked."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chimera_cli.data.augmentation import normalise, resize, to_float
from chimera_cli.data.loader import image_batches
from chimera_cli.events import Listener, Progress, ignore
from chimera_cli.models.image_tower import ImageTower
from chimera_cli.models.text_tower import TextTower
from chimera_cli.models.weights import file_hash
from chimera_cli.runs import cannot_write, content_hash, locked, write_json
from chimera_cli.runtime import Stopwatch

Floats = NDArray[np.float32]

# Captions of one batch have similar lengths; beyond this many the padding saved no longer pays on a CPU.
_CAPTION_BATCH = 128


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """Features (n, views, width) of images or (n, width) of captions; `seconds` is what computing them once took."""

    values: Floats
    seconds: float
    from_cache: bool


def preprocess(pixels: Tensor, tower: ImageTower, image_size: int) -> Tensor:
    """Return what `tower` takes, (batch, 3, S, S) normalised floats, of uint8 pixels (batch, H, W, 3)."""
    floats: Tensor = normalise(resize(to_float(pixels), image_size), tower.mean, tower.std)
    return floats.contiguous(memory_format=torch.channels_last)


def image_features(
    encode: Callable[[Tensor], Tensor],
    tower: ImageTower,
    images: NDArray[np.uint8],
    indices: NDArray[np.int64],
    *,
    image_size: int,
    device: torch.device,
    flipped_view: bool = False,
    batch: int = 32,
    listener: Listener = ignore,
    stage: str = "image features",
) -> Floats:
    """Return what `encode` makes of the images at `indices`: (n, 1 or 2, dim), the second view mirrored."""
    parts: list[Floats] = []
    done = 0
    with torch.inference_mode():
        for pixels in image_batches(images, indices, batch):
            inputs = preprocess(torch.from_numpy(pixels).to(device, non_blocking=True), tower, image_size)
            views = [encode(inputs)] + ([encode(inputs.flip(-1))] if flipped_view else [])
            parts.append(torch.stack(views, dim=1).float().cpu().numpy())
            done += len(parts[-1])
            listener(Progress(stage, done, len(indices), "images"))
    return np.concatenate(parts)


def caption_features(
    encode: Callable[[dict[str, Tensor]], Tensor],
    tower: TextTower,
    texts: Sequence[str],
    *,
    max_tokens: int,
    device: torch.device,
    batch: int = _CAPTION_BATCH,
    listener: Listener = ignore,
    stage: str = "caption features",
) -> Floats:
    """Return what `encode` makes of `texts`: (n, dim), computed in order of length so that little is padding."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    result: Floats | None = None
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            tokens = tower.tokenise([texts[row] for row in rows], max_tokens)
            values = encode({name: tensor.to(device) for name, tensor in tokens.items()}).float().cpu().numpy()
            if result is None:
                result = np.empty((len(texts), values.shape[1]), dtype=np.float32)
            result[rows] = values
            listener(Progress(stage, min(start + batch, len(order)), len(order), "captions"))
    if result is None:
        raise ValueError("no captions to compute features of")
    return result


def cached(
    folder: Path, label: str, key: dict[str, Any], compute: Callable[[], Floats], device: torch.device
) -> CachedFeatures:
    """Return the features of `key` from `folder`, computing and storing them the first time.

    The key holds all that decides the values: pack fingerprint, split, weights and their hash, transform. A stored
    file whose content no longer has its recorded hash is computed anew. A second process that wants the same waits.
    """
    digest = content_hash(key)[:16]
    values_path, facts_path = folder / f"{label}-{digest}.npy", folder / f"{label}-{digest}.json"
    with locked(folder / f".{label}-{digest}.lock"):
        facts = _valid_facts(values_path, facts_path)
        if facts is not None:
            return CachedFeatures(np.load(values_path), float(facts["seconds"]), True)
        watch = Stopwatch(device)
        watch.start()
        values = compute()
        seconds = watch.stop()
        _store(values_path, values)
        facts = {"schema_version": 1, "key": key, "seconds": seconds, "sha256": file_hash(values_path)}
        write_json(facts_path, facts)
        return CachedFeatures(values, seconds, False)


def _valid_facts(values_path: Path, facts_path: Path) -> dict[str, Any] | None:
    if not (values_path.is_file() and facts_path.is_file()):
        return None
    try:
        facts: dict[str, Any] = json.loads(facts_path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return facts if facts.get("sha256") == file_hash.__wrapped__(values_path) else None


def _store(path: Path, values: Floats) -> None:
    temporary = path.with_name(f".{path.name}.tmp.npy")
    try:
        np.save(temporary, values)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    file_hash.cache_clear()
