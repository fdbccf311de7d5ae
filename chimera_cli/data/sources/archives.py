"""Sources as lists of named files, whether they lie in a folder or in zip files; nothing is unpacked to disk."""

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from chimera_cli.data.sources.corpus import LARGEST_FILE_BYTES
from chimera_cli.errors import ChimeraError, UsageError

_DEPTH = 3  # how far below the given folder files are looked for: archive folder / data set / images
_STEP_BYTES = 1 << 14  # zipfile unpacks whole steps of the archive, whatever a member says of its size


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source: `path` inside it, `label` as errors name it, `stamp` (time or CRC-32) for its identity.

    `read` raises OSError for what can't be read, is damaged, or is larger than any photo.
    """

    path: PurePosixPath
    label: str
    size_bytes: int
    stamp: int
    read: Callable[[], bytes]


@contextlib.contextmanager
def open_source(origin: Path, complete: Callable[[Sequence[SourceFile]], bool]) -> Iterator[list[SourceFile]]:
    """Yield the files of a folder or of one zip file; archives stay open inside.

    Zip files in a folder count when what lies there unpacked is not `complete`, and come after it. Raises UsageError
    where `origin` does not exist, ChimeraError where it is empty, or where a zip file is none or has entries that
    climb out of it.
    """
    if not origin.exists():
        raise UsageError(f"{origin} does not exist", "give --from the folder or zip file that holds the data set")
    with contextlib.ExitStack() as stack:
        if origin.is_dir():
            files = folder_files(origin)
            zips = [origin / file.path for file in files if file.path.suffix.lower() == ".zip"]
            archives = [] if complete(files) else zips
        else:
            files, archives = [], [origin]
        for archive in archives:
            files += open_zip_files(archive, stack)
        if not files:
            raise ChimeraError(f"{origin} is empty", "give --from the folder or zip file that holds the data set")
        yield files


def folder_files(folder: Path, depth: int = _DEPTH) -> list[SourceFile]:
    """Return the files in `folder` and `depth` levels below it, sorted by path; hidden ones are left out."""
    try:
        return sorted(_walk(folder, PurePosixPath(), depth), key=lambda file: file.path)
    except OSError as error:
        raise ChimeraError(
            f"{error.filename or folder} can't be read: {error.strerror}", "check the folder's permissions"
        ) from error


def zip_files(archive: zipfile.ZipFile, path: Path) -> list[SourceFile]:
    """Return the files of an open zip file, sorted by path, without hidden ones and those macOS adds.

    Raises ChimeraError for an entry whose name is absolute or climbs out with `..`, and for an encrypted one.
    """
    files = []
    for info in archive.infolist():
        name = PurePosixPath(info.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or (name.parts and name.parts[0].endswith(":")):
            raise ChimeraError(
                f"{path} has an entry that climbs out of it: {info.filename!r}", "do not use this archive"
            )
        if info.flag_bits & 1:
            raise ChimeraError(f"{path} is encrypted (entry {info.filename!r})", "unpack it and give --from the folder")
        if not info.is_dir() and not _hidden(name):
            read = partial(_read_member, archive, info)
            files.append(SourceFile(name, f"{path}/{name}", info.file_size, info.CRC, read))
    return sorted(files, key=lambda file: file.path)


def open_zip_files(path: Path, stack: contextlib.ExitStack) -> list[SourceFile]:
    """Return the files of the zip file at `path`, which stays open as long as `stack`."""
    return zip_files(stack.enter_context(_open_zip(path)), path)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ChimeraError(
            f"{path} is not a zip file, or was cut off", "delete it and get it again, or give --from a folder"
        ) from error
    except OSError as error:
        raise ChimeraError(f"{path} can't be read: {error.strerror or error}", "check its permissions") from error


def _walk(folder: Path, inside: PurePosixPath, depth: int) -> Iterator[SourceFile]:
    for path in folder.iterdir():
        name = inside / path.name
        if _hidden(name):
            continue
        if path.is_dir():
            if depth > 0:
                yield from _walk(path, name, depth - 1)
        elif path.is_file():
            stat = path.stat()
            yield SourceFile(name, str(path), stat.st_size, stat.st_mtime_ns, partial(_read_path, path))


def _hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


def _read_path(path: Path) -> bytes:
    _check_size(path.stat().st_size)
    return path.read_bytes()


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a member's bytes; what can't be unpacked becomes the OSError that a damaged file would give."""
    _check_size(info.file_size)
    try:
        with archive.open(info) as member:
            return b"".join(iter(partial(member.read, _STEP_BYTES), b""))
    # RuntimeError is how zipfile tells of an encrypted member and of a compression that it does not know.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise OSError(f"damaged in the archive: {error}") from error


def _check_size(size: int) -> None:
    if size > LARGEST_FILE_BYTES:
        raise OSError(f"{size / 1e9:.1f} GB are no photo")
