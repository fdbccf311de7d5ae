"""WebDataset tar shards as img2dataset writes them: `key.jpg`, `key.txt` and `key.json` one after the other.

Nothing is unpacked: a shard is read once for its table of contents, photos later by their place in it.
"""

import contextlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from chimera_cli.data.pack_writer import SplitRule
from chimera_cli.data.sources.corpus import (
    DEFAULT_RULE,
    LARGEST_FILE_BYTES,
    LONGEST_CAPTION,
    NO_LICENCE,
    Corpus,
    Draft,
    Photo,
    cannot_read,
    printable,
    splits_by_name,
    tell_rule,
)
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, Progress, ignore

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")  # the first that a sample has is taken
_CAPTIONS = ("caption", "captions")  # fields of the JSON file
_MOST_SHARDS = 100_000
_LARGEST_JSON_BYTES = 1 << 20
_BLOCK = 512  # bytes; tar knows no smaller unit
_WHAT = "give --from a folder with .tar files or a pattern such as 'shards/{00000..00099}.tar'"
_DAMAGED = "get the shard again, or leave it out of --from"
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# What tarfile raises for headers that are damaged or made to do harm: texts where numbers belong, sizes that no memory
# holds, long names of long names without end. The last three it lets through.
TAR_DAMAGE = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
# As the webdataset library divides names: up to the first dot of the last part, then the ending.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


@dataclass(slots=True)
class _Sample:
    """Members with one key: where each lies, by its ending."""

    key: str
    at: int
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)


@contextlib.contextmanager
def open_shards(pattern: str, listener: Listener = ignore, rule: SplitRule | None = None) -> Iterator[Corpus]:
    """Yield what the shards of a folder, of one file, or of a pattern with `{00..99}`, `*` or `?` hold.

    Splits come from the names of the shards or their folders, without any from the photos' content; a `rule` given is
    followed in any case. Raises UsageError where only some name a split, ChimeraError naming shard, member and byte
    where one is damaged, holds a link or a name that climbs out, or has a key twice.
    """
    shards = expand(pattern)
    splits = None if rule else splits_by_name(shards)
    if splits is None:
        rule = rule or DEFAULT_RULE
        tell_rule(rule, "the names of the shards say no split", listener)
    else:
        listener(Note("splits come from the names of the shards"))
    names = _short_names(shards)
    draft = Draft(listener)
    lists: set[str] = set()
    for number, (shard, name) in enumerate(zip(shards, names, strict=True)):
        listener(Progress("reading the shards", number, len(shards), "shards"))
        _add_shard(draft, shard, name, splits[number] if splits else "", lists)
    listener(Progress("reading the shards", len(shards), len(shards), "shards"))
    if lists:
        listener(Note(f"fields of the JSON files that are no plain values are left out: {_some(lists)}"))
    yield draft.finish(Path(pattern), NO_LICENCE, None if splits else rule)


# ---- which shards ---------------------------------------------------------------------------------------------------


def expand(pattern: str) -> list[Path]:
    """Return the shards that a folder (two levels deep), a file or a pattern with braces and wildcards means, sorted.

    Raises UsageError where it means none, one that does not exist, an address, or only compressed ones.
    """
    if "://" in pattern or re.match(r"(https?|s3|gs|pipe):", pattern):
        raise UsageError(f"{pattern} is an address: only local shards are read", "download them first")
    path = Path(pattern)
    if path.is_dir():
        found = sorted({*path.glob("*.tar"), *path.glob("*/*.tar"), *path.glob("*/*/*.tar")})
        packed = (file for ending in _PACKED for file in path.rglob(f"*{ending}"))
        return _all_tar(found or list(islice(packed, 1)), pattern)
    if path.is_file():
        return _all_tar([path], pattern)
    return _all_tar(_expand_pattern(pattern), pattern)


def _expand_pattern(pattern: str) -> list[Path]:
    from braceexpand import braceexpand

    try:
        words = list(islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError as error:
        raise UsageError(f"the braces of {pattern!r} are not balanced", _WHAT) from error
    if len(words) > _MOST_SHARDS:
        raise UsageError(f"{pattern!r} means more than {_MOST_SHARDS:,} shards", _WHAT)
    found: dict[Path, None] = {}
    for word in words:
        wild = any(sign in word for sign in "*?[")
        matches = sorted(_glob(word)) if wild else [Path(word)]
        if not wild and not matches[0].is_file():
            raise UsageError(f"{word} does not exist" + (f" (of {pattern})" if word != pattern else ""), _WHAT)
        found |= dict.fromkeys(matches)
    return list(found)


def _glob(word: str) -> Iterator[Path]:
    path = Path(word)
    anchor = Path(path.anchor)
    return (match for match in anchor.glob(str(path.relative_to(anchor))) if match.is_file())


def _all_tar(paths: Sequence[Path], pattern: str) -> list[Path]:
    if not paths:
        raise UsageError(f"{pattern} holds no .tar file", _WHAT)
    for path in paths:
        if path.name.endswith(_PACKED):
            raise UsageError(
                f"{path} is compressed: photos in it can't be reached singly",
                f"unpack it to a .tar: gunzip {path.name}",
            )
    return list(paths)


def _short_names(shards: Sequence[Path]) -> list[str]:
    """Return the shards' names as source files begin with them: relative to the folder they have in common."""
    if len(shards) == 1:
        return [shards[0].stem]
    common = os.path.commonpath([shard.absolute().parent for shard in shards])
    return [shard.absolute().relative_to(common).with_suffix("").as_posix() for shard in shards]


# ---- one shard ------------------------------------------------------------------------------------------------------


def _add_shard(draft: Draft, shard: Path, name: str, split: str, lists: set[str]) -> None:
    """Add the samples of a shard; `lists` gets the names of JSON fields that are no plain values."""
    try:
        with shard.open("rb") as file:
            stamp = (os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mtime_ns)
            for sample in _samples(shard, file, draft):
                endings = [ending for ending in IMAGE_ENDINGS if ending in sample.parts]
                if not endings:
                    draft.skip(f"{name}/{sample.key}", "the sample has no image")
                    continue
                if len(endings) > 1:
                    draft.left_out.add("further images of a sample left out", f"{shard.name}: {sample.key}")
                offset, size = sample.parts[endings[0]]
                if size > LARGEST_FILE_BYTES:
                    draft.skip(f"{name}/{sample.key}.{endings[0]}", f"{size / 1e9:.1f} GB are no photo")
                    continue
                columns, texts = _told(file, sample, f"{shard.name}: {sample.key}", draft, lists)
                photo = Photo(partial(_read_at, str(shard), offset, size), stamp)
                number = draft.add_photo(f"{name}/{sample.key}.{endings[0]}", split, photo, columns)
                for text in texts:
                    draft.add_caption(number, text, f"{shard.name}: {sample.key}")
    except OSError as error:
        raise cannot_read(shard, error) from error


def _samples(shard: Path, file: BinaryIO, draft: Draft) -> Iterator[_Sample]:
    """Yield the samples of an open shard. Raises ChimeraError where a key or one of its members is there twice."""
    sample: _Sample | None = None
    seen: set[str] = set()
    for member in _members(shard, file):
        parts = _MEMBER.fullmatch(member.name.removeprefix("./"))
        if parts is None:
            draft.left_out.add("files left out whose name is no key with an ending", f"{shard.name}: {member.name}")
            continue
        key, ending = parts[1], parts[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                raise _twice(shard, member, key)
            seen.add(key)
            sample = _Sample(key, member.offset)
        if ending in sample.parts:
            raise _twice(shard, member, f"{key}.{ending}")
        sample.parts[ending] = (member.offset_data, member.size)
    if sample is not None:
        yield sample


def _members(shard: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the files of an open shard, none of them reaching beyond its end.

    tarfile takes a header that it can't read for the end of the archive: that the end mark stands there is checked.
    """
    total = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            last = "its beginning"
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                if member.size < 0 or member.offset_data + member.size > total:
                    raise _cut(shard, total, f"in the member {member.name!r}")
                if _refused(shard, member):
                    continue
                last = f"the member {member.name!r}"
                yield member
            end = archive.offset
    except TAR_DAMAGE as error:
        raise _not_tar(shard, file, error) from error
    if os.pread(file.fileno(), _BLOCK, end) != bytes(_BLOCK):
        raise _cut(shard, min(end, total), f"after {last}")


def _refused(shard: Path, member: tarfile.TarInfo) -> bool:
    """Return whether a member is a folder, which holds nothing. Raises ChimeraError for what no shard should hold."""
    name = PurePosixPath(member.name.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise ChimeraError(f"{shard} has a member that climbs out of it: {member.name!r}", "do not use this shard")
    if not member.isreg() and not member.isdir():
        kind = "link" if member.islnk() or member.issym() else "device or pipe"
        raise ChimeraError(f"{shard} has a member that is a {kind}: {member.name!r}", "do not use this shard")
    return member.isdir()


def _cut(shard: Path, byte: int, where: str) -> ChimeraError:
    return ChimeraError(f"{shard} is cut off or damaged {where}, at byte {byte:,}", _DAMAGED)


def _not_tar(shard: Path, file: BinaryIO, error: Exception) -> ChimeraError:
    if os.pread(file.fileno(), 2, 0) == b"\x1f\x8b":
        return ChimeraError(
            f"{shard} is compressed: photos in it can't be reached singly", f"mv {shard.name} x.tar.gz; gunzip x.tar.gz"
        )
    return ChimeraError(f"{shard} is no tar file, or damaged before byte {file.tell():,}: {error}", _DAMAGED)


def _twice(shard: Path, member: tarfile.TarInfo, what: str) -> ChimeraError:
    return ChimeraError(
        f"{shard} has {what!r} twice, again at byte {member.offset:,}", "keys must be unique within a shard"
    )


# ---- one sample -----------------------------------------------------------------------------------------------------


def _told(
    file: BinaryIO, sample: _Sample, where: str, draft: Draft, lists: set[str]
) -> tuple[dict[str, Any], Sequence[str]]:
    """Return the columns and the captions of a sample: the text file's, else those of its JSON file."""
    fields = _fields(file, sample, where, draft)
    lists |= {name for name, value in fields.items() if isinstance(value, list | dict) and name not in _CAPTIONS}
    columns = {
        name: value for name, value in fields.items() if name not in _CAPTIONS and not isinstance(value, list | dict)
    }
    if "txt" in sample.parts:
        text = _text(file, sample.parts["txt"], where, draft)
        return columns, [] if text is None else [text]
    for name in _CAPTIONS:
        value = fields.get(name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            texts = [text for text in values if isinstance(text, str)]
            if len(texts) != len(values):
                draft.left_out.add("captions left out that are no text", where)
            return columns, texts
    return columns, []


def _fields(file: BinaryIO, sample: _Sample, where: str, draft: Draft) -> dict[str, Any]:
    offset, size = sample.parts.get("json", (0, 0))
    if not size:
        return {}
    if size > _LARGEST_JSON_BYTES:
        draft.left_out.add(f"JSON files left out that are larger than {_LARGEST_JSON_BYTES >> 20} MiB", where)
        return {}
    try:
        value = json.loads(os.pread(file.fileno(), size, offset))
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    draft.left_out.add("JSON files left out that hold no valid JSON object", where)
    return {}


def _text(file: BinaryIO, place: tuple[int, int], where: str, draft: Draft) -> str | None:
    offset, size = place
    # A character has four bytes at most; one byte more than the longest caption can have makes it too long for sure.
    content = os.pread(file.fileno(), min(size, 4 * LONGEST_CAPTION + 4), offset)
    try:
        return content.decode("utf-8-sig", "strict" if len(content) == size else "ignore")
    except UnicodeDecodeError:
        draft.left_out.add("captions left out that are not UTF-8", where)
        return None


def _read_at(path: str, offset: int, size: int) -> bytes:
    """Return bytes of a shard. Opened anew each time: thousands of shards are more than a process may hold open."""
    with Path(path).open("rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise OSError("the shard was cut off while it was read")
    return content


def _some(names: set[str]) -> str:
    shown = [printable(name) for name in sorted(names)[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
