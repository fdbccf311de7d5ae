"""What locked towers compute, kept on disk: keyed by all that decides it, verified, and mapped instead of loaded."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chimera_cli.models.weights import file_hash
from chimera_cli.runs import cannot_write, content_hash, locked, write_json
from chimera_cli.runtime import Stopwatch

# What files were when this process last read them, and their hashes: evaluations ask again after every epoch.
_hashes: dict[Path, tuple[tuple[int, int, int], str]] = {}
# (shape, type) -> an array to fill, in memory or in a file.
Allocate = Callable[[tuple[int, ...], Any], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """Features (n, views, width) of images, maps (n, views, ...) of them, or features (n, width) of captions.

    `seconds` is what computing them once took.

    The values are mapped from their file: only what is looked at takes memory, and no change of them reaches the file.
    """

    values: NDArray[Any]
    seconds: float
    from_cache: bool


def cached(
    folder: Path, label: str, key: dict[str, Any], compute: Callable[[Allocate], object], device: torch.device
) -> CachedFeatures:
    """Return the features of `key` from `folder`, computing and storing them the first time.

    The key holds all that decides the values: pack fingerprint, split, weights and their hash, transform. `compute`
    fills the one array that it asks for, which lies in the file: features need not fit into memory. A stored file
    whose content no longer has its recorded hash is computed anew. A second process that wants the same waits.
    """
    digest = content_hash(key)[:16]
    values_path, facts_path = folder / f"{label}-{digest}.npy", folder / f"{label}-{digest}.json"
    with locked(folder / f".{label}-{digest}.lock"):
        facts = _valid_facts(values_path, facts_path)
        if facts is not None:
            return CachedFeatures(_mapped(values_path), float(facts["seconds"]), True)
        watch = Stopwatch(device)
        watch.start()
        _fill(values_path, compute)
        seconds = watch.stop()
        facts = {"schema_version": 1, "key": key, "seconds": seconds, "sha256": file_hash(values_path)}
        write_json(facts_path, facts)
        return CachedFeatures(_mapped(values_path), seconds, False)


def _mapped(path: Path) -> NDArray[Any]:
    # Private pages instead of read-only ones, of which torch would warn; nobody writes to them.
    values: NDArray[Any] = np.load(path, mmap_mode="c")
    return values


def _valid_facts(values_path: Path, facts_path: Path) -> dict[str, Any] | None:
    if not (values_path.is_file() and facts_path.is_file()):
        return None
    try:
        facts: dict[str, Any] = json.loads(facts_path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return facts if facts.get("sha256") == _current_hash(values_path) else None


def _current_hash(path: Path) -> str:
    """Return the hash of a file, which is read again only where the file is no longer as it was."""
    found = path.stat()
    now = (found.st_ino, found.st_mtime_ns, found.st_size)
    if path not in _hashes or _hashes[path][0] != now:
        _hashes[path] = now, file_hash.__wrapped__(path)
    return _hashes[path][1]


def _fill(path: Path, compute: Callable[[Allocate], object]) -> None:
    """Let `compute` fill a new file of its shape and put it at `path` when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        compute(lambda shape, dtype: _new_file(temporary, shape, dtype))
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    file_hash.cache_clear()


def _new_file(path: Path, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    values: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if sys.platform == "linux":
        # The file is sparse; a page that found no room on the disk later on would end the process without a word.
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return values
