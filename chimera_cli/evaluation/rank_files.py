"""The ranks of every query as a file of their own beside an evaluation, for paired comparisons of runs."""

import contextlib
import hashlib
import io
import os
from pathlib import Path

import numpy as np

from chimera_cli.errors import ChimeraError
from chimera_cli.evaluation.retrieval import Ranks
from chimera_cli.runs import cannot_write

_NAMES = ("i2t", "t2i", "image_of_text")


def write_ranks(path: Path, ranks: Ranks) -> str:
    """Replace `path` by the ranks as a compressed npz in one step and return its SHA-256.

    Arrays: `i2t` (images,), `t2i` (captions,), `image_of_text` (captions,), all int32, as `Ranks` has them; about 12 kB
    for a thousand images. Raises ChimeraError where it can't be written.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: getattr(ranks, name).astype(np.int32) for name in _NAMES})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_ranks(path: Path, sha256: str, again: str) -> Ranks:
    """Return the ranks in a file written by `write_ranks`. Raises ChimeraError where it is missing or its hash differs.

    `again` is the command that makes it anew.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ChimeraError(f"{path} does not exist", f"evaluate again: {again}") from error
    except OSError as error:
        raise ChimeraError(f"{path} can't be read: {error.strerror}", "check the file's permissions") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ChimeraError(f"{path} is not the file that its evaluation was written with", f"evaluate again: {again}")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return Ranks(*(arrays[name].astype(np.int64) for name in _NAMES))
