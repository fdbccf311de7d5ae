"""Download of large archives: with progress, resuming where a connection broke, and never half a file in its place."""

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener, Note, Progress, ignore
from chimera_cli.runs import cannot_write, locked

if TYPE_CHECKING:
    import requests

_BLOCK_BYTES = 1 << 16  # what a broken connection costs at most
_TIMEOUT_S = (10.0, 30.0)  # to connect, and between two blocks
_ATTEMPTS = 5  # in a row without a single new byte


def download(url: str, target: Path, listener: Listener = ignore) -> Path:
    """Return `target` holding what `url` serves; a file that is there already is taken as it is.

    Bytes gather in `<target>.part` and a later call goes on from there (HTTP Range, RFC 9110 section 14); a server
    that ignores the range starts anew. Raises ChimeraError in one sentence when the server can't be reached or says
    no, when the connection keeps breaking, and when the disk does not take the file.
    """
    with locked(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return target
        part = target.with_name(f"{target.name}.part")
        idle = 0
        while idle < _ATTEMPTS:
            before = _size(part)
            if _fetch(url, part, listener):
                part.replace(target)
                return target
            idle = 0 if _size(part) > before else idle + 1
            listener(
                Note(f"the connection broke after {_size(part) / 1e6:.1f} MB of {target.name}; going on from there")
            )
    raise ChimeraError(
        f"the download of {url} broke off {_ATTEMPTS} times without progress",
        "run the command again to go on from there, or download it yourself and give --from",
    )


def _fetch(url: str, part: Path, listener: Listener) -> bool:
    """Append to `part` what it still lacks; return whether it is whole, False when the connection broke."""
    import requests

    have = _size(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    # Without this a server may compress, and ranges would count other bytes than the file's.
    headers["Accept-Encoding"] = "identity"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
            if response.status_code == 416:
                return _beyond_the_end(response, part, have)
            if response.status_code not in (200, 206):
                raise ChimeraError(f"{url} answers {response.status_code} {response.reason}", _offline_hint())
            return _append(response, part, have, listener)
    except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ReadTimeout):
        return False
    except requests.exceptions.ConnectionError as error:
        # requests reports a connection that breaks between two blocks as the same error as one that never was.
        if _size(part) > have:
            return False
        raise ChimeraError(f"{url} can't be reached: {_cause(error)}", _offline_hint()) from error
    except requests.exceptions.RequestException as error:
        raise ChimeraError(f"{url} can't be downloaded: {_cause(error)}", _offline_hint()) from error


def _append(response: "requests.Response", part: Path, have: int, listener: Listener) -> bool:
    start, total = _range(response)
    if start not in (0, have):
        part.unlink(missing_ok=True)
        return False
    done = start
    try:
        with part.open("ab" if start else "wb") as file:
            for block in response.iter_content(_BLOCK_BYTES):
                file.write(block)
                file.flush()
                before, done = done, done + len(block)
                if before >> 20 != done >> 20 or done == total:
                    listener(Progress("downloading", done >> 20, total >> 20, "MiB"))
    except OSError as error:
        # requests' own errors are OSErrors as well; those of the disk carry a number.
        if error.errno is None:
            raise
        raise cannot_write(part, error) from error
    return done == total or not total


def _range(response: "requests.Response") -> tuple[int, int]:
    """Return the position of the first byte that comes (-1: it can't be known) and the file's size (0: likewise)."""
    if response.status_code != 206:
        return 0, int(response.headers.get("Content-Length") or 0)
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None:
        return -1, 0
    return int(match[1]), 0 if match[2] == "*" else int(match[2])


def _beyond_the_end(response: "requests.Response", part: Path, have: int) -> bool:
    """Return whether the part is the whole file (then nothing lies beyond it); otherwise it is wrong and goes away."""
    if response.headers.get("Content-Range", "").removeprefix("bytes */") == str(have):
        return True
    part.unlink(missing_ok=True)
    return False


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _offline_hint() -> str:
    return "check the network, or get the archives another way and give --from FOLDER"


def _cause(error: BaseException) -> str:
    """Return what the operating system said, which libraries wrap in several layers of their own."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    strerror = getattr(error, "strerror", None)
    return str(strerror or error) or type(error).__name__
