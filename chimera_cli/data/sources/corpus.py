"""What every source hands to the pack: how to read its photos, their rows and captions, and what was left out."""

import hashlib
import json
import posixpath
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from chimera_cli.data.captions import tidy
from chimera_cli.data.pack import Caption, Item, Skipped
from chimera_cli.data.pack_writer import SplitRule
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, Progress, ignore

LONGEST_CAPTION = 10_000  # characters; the longest novel-like alt texts on the web have some hundreds
LARGEST_FILE_BYTES = 1 << 30  # no photo: a disk image or a film in the image column must not fill the memory
MOST_COLUMNS = 200
DEFAULT_RULE = SplitRule(seed=0, dev=0.1, test=0.1)
NO_LICENCE = "The source states none; what applies is what applies to the photos you gave."

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("dev", "val", "valid", "validation"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ANNOUNCE_EVERY = 10_000

Read = Callable[[], bytes]


@dataclass(frozen=True, eq=False)
class Corpus:
    """A source as found: `reads[i]` returns the bytes of the photo of `items[i]`; `digest` names all of the input.

    Items without a split get theirs by `split_rule`. `skipped` are photos that the source names but does not hold.
    """

    reads: Sequence[Read]
    items: Sequence[Item]
    captions: Sequence[Caption]
    digest: str
    licence: str
    skipped: Sequence[Skipped] = ()
    split_rule: SplitRule | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


# ---- what is left out -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What was left out so far, counted by reason, each with where it was met first."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, where: str) -> None:
        """Count one more of `what`, such as "captions that are empty"."""
        self.counts[what] = self.counts.get(what, 0) + 1
        self.first.setdefault(what, printable(where))

    def tell(self, listener: Listener) -> None:
        """Tell each reason with its count in a sentence of its own."""
        for what, count in self.counts.items():
            listener(Note(f"{what}: {count:,} (first: {self.first[what]})", "warning"))


def sift_caption(text: str) -> tuple[str, str]:
    """Return the caption in tidy form and "", or "" and the reason why it is left out."""
    clean = tidy(text.replace("\0", " "))
    if not clean:
        return "", "captions left out that are empty or only spaces"
    if len(clean) > LONGEST_CAPTION:
        return "", f"captions left out that are longer than {LONGEST_CAPTION:,} characters"
    if not _encodable(clean):
        return "", "captions left out that are no valid Unicode"
    return clean, ""


def printable(text: str) -> str:
    """Return `text` with what UTF-8 can't hold (half of a surrogate pair) replaced by question marks."""
    return text if _encodable(text) else text.encode("utf-8", "replace").decode()


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- splits ---------------------------------------------------------------------------------------------------------


def split_word(word: str) -> str | None:
    """Return the split that `word` means in any of the usual spellings, None where it means none."""
    return _SPLIT_WORDS.get(word.strip().lower())


def splits_by_name(paths: Sequence[Path]) -> list[str] | None:
    """Return the split of each file by its folder's name or its own beginning (`val-00000.tar`), None if none has one.

    Files that all name the same split count as unnamed: a set in one split can't be trained on and judged. Raises
    UsageError where some name a split and some don't: an official test split must not end up in the training data.
    """
    splits = [split_of_name(path) for path in paths]
    unnamed = [path for path, split in zip(paths, splits, strict=True) if not split]
    if unnamed and len(unnamed) < len(paths):
        first = ", ".join(str(path) for path in unnamed[:4]) + (" …" if len(unnamed) > 4 else "")
        raise UsageError(
            f"{len(unnamed):,} of {len(paths):,} files name no split, the others do: {first}",
            "begin their names with train, val or test, move them elsewhere, or draw all splits with --split-seed 0",
        )
    named = [split for split in splits if split]
    return named if len(set(named)) > 1 else None


def split_of_name(path: Path) -> str | None:
    """Return the split that a file's name begins with or its folder is called, None where there is none."""
    word = re.match(r"[a-z]+", path.name.lower())
    return (split_word(word[0]) if word else None) or split_word(path.absolute().parent.name)


def tell_rule(rule: SplitRule, why: str, listener: Listener) -> None:
    """Tell that the splits are drawn, and how."""
    shares = f"{1 - rule.dev - rule.test:.0%} train, {rule.dev:.0%} dev, {rule.test:.0%} test"
    listener(Note(f"{why}: images are split by their content with seed {rule.seed} ({shares})"))


# ---- photos on disk -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Photo:
    """A file that can be read: `stamp` (size, time) is its identity."""

    read: Read
    stamp: tuple[int, int]


def find_photo(path: str) -> Photo | str:
    """Return the photo at `path`, or why there is none. Only regular files count: a pipe would never end."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_size > LARGEST_FILE_BYTES:
        return f"{found.st_size / 1e9:.1f} GB are no photo"
    return Photo(partial(read_file, path), (found.st_size, found.st_mtime_ns))


def read_file(path: str) -> bytes:
    """Return the content of a file."""
    return Path(path).read_bytes()


def check_inside(name: str, where: str) -> str:
    """Return the name of a photo in a published list. Raises ChimeraError where it leads out of the images' folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ChimeraError(f"{where}: {name!r} leads out of the folder of the images", "do not use this file")
    return name


def folders_with(candidates: Iterable[Path], names: Sequence[str]) -> list[Path]:
    """Return the folders that hold at least one file of the `names` (which may begin with folders), as ordered."""
    by_top: dict[str, list[str]] = {}
    for name in names:
        by_top.setdefault(posixpath.normpath(name).partition("/")[0], []).append(name)
    sample = names[:: max(len(names) // 100, 1)]
    existing = dict.fromkeys(folder for folder in candidates if folder.is_dir())
    return [folder for folder in existing if _any_file(folder, sample) or _holds(folder, by_top)]


def _holds(folder: Path, by_top: Mapping[str, Sequence[str]]) -> bool:
    """Return whether a folder has any of the names, given by their first part: one listing instead of all names."""
    try:
        entries = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    return any(_any_file(folder, by_top[entry]) for entry in entries if entry in by_top)


def _any_file(folder: Path, names: Iterable[str]) -> bool:
    return any(isinstance(find_photo(f"{folder}/{name}"), Photo) for name in names)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders directly in `folder`, by name, at most 200 of them."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))[:200]
    except OSError:
        return []


def locate(folders: Sequence[Path], *names: str) -> Photo | str:
    """Return the photo that lies in one of `folders` by one of `names`, or why there is none."""
    reason = "no such file"
    for folder in folders:
        for name in names:
            found = find_photo(f"{folder}/{name}")
            if isinstance(found, Photo):
                return found
            reason = found if reason == "no such file" else reason
    return reason


# ---- gathering ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Draft:
    """A corpus while its source is read: photos come one by one, captions at any time after theirs."""

    listener: Listener = ignore
    left_out: Tally = field(default_factory=Tally)
    reads: list[Read] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    columns: list[dict[str, Any]] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    per_image: list[int] = field(default_factory=list)
    stamps: Any = field(default_factory=hashlib.sha256)

    def add_photo(self, name: str, split: str, photo: Photo, columns: dict[str, Any]) -> int:
        """Add a photo and return its number; `columns` is what else the source says of it."""
        self.reads.append(photo.read)
        self.names.append(printable(name))
        self.splits.append(split)
        self.columns.append(columns)
        self.per_image.append(0)
        self.stamps.update(json.dumps([name, *photo.stamp]).encode())
        if len(self.names) % _ANNOUNCE_EVERY == 0:
            self.listener(Progress("reading the list", len(self.names), 0))
        return len(self.names) - 1

    def skip(self, name: str, reason: str) -> None:
        """Note a photo that the source names and that can't be had."""
        self.skipped.append(Skipped(printable(name), reason))

    def add_caption(self, image: int, text: str, where: str) -> None:
        """Add a caption of photo number `image`, or count why it is left out."""
        clean, problem = sift_caption(text)
        if problem:
            self.left_out.add(problem, where)
            return
        self.captions.append(Caption(image, self.per_image[image], clean))
        self.per_image[image] += 1

    def finish(self, origin: Path, licence: str, rule: SplitRule | None = None) -> Corpus:
        """Return the corpus, with `rule` for photos without a split. Raises ChimeraError where there is no photo."""
        if not self.names:
            raise ChimeraError(f"{origin} leads to no image{self._first_skipped()}", "check the path of the images")
        columns = uniform_columns(self.columns, self.left_out)
        items = tuple(Item(name, split, row) for name, split, row in zip(self.names, self.splits, columns, strict=True))
        without = sum(not count for count in self.per_image)
        if self.captions and without:
            self.listener(Note(f"{without:,} of {len(items):,} images have no caption", "warning"))
        self.left_out.tell(self.listener)
        digest = self._digest(items)
        return Corpus(self.reads, items, self.captions, digest, licence, self.skipped, rule)

    def _first_skipped(self) -> str:
        if not self.skipped:
            return ""
        return (
            f" (of {len(self.skipped):,} named, the first is {self.skipped[0].source_file}: {self.skipped[0].reason})"
        )

    def _digest(self, items: Iterable[Item]) -> str:
        """Return the SHA-256 of all that decides the pack; row by row, since one JSON text of a large set is huge."""
        digest = self.stamps.copy()
        for item in items:
            digest.update(_line([item.source_file, item.split, dict(item.columns)]))
        for caption in self.captions:
            digest.update(f"{caption.image} {caption.index} {caption.text}\n".encode())
        digest.update(_line([[skipped.source_file, skipped.reason] for skipped in self.skipped]))
        return str(digest.hexdigest())


def _line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode() + b"\n"


# ---- columns --------------------------------------------------------------------------------------------------------


def uniform_columns(rows: Sequence[dict[str, Any]], left_out: Tally) -> Sequence[dict[str, Any]]:
    """Return the rows, changed in place, so that each column has a name and values that Parquet can hold."""
    _rename(rows)
    names = sorted({name for row in rows for name in row})
    for name in names[MOST_COLUMNS:]:
        left_out.add(f"columns left out beyond the first {MOST_COLUMNS}", name)
        _each(rows, name, None)
    for name in names[:MOST_COLUMNS]:
        if not _fits(rows, name):
            left_out.add("columns with values of several kinds, kept as text", name)
            _each(rows, name, _as_text)
    return rows


def _rename(rows: Sequence[dict[str, Any]]) -> None:
    """Give columns whose names UTF-8 can't hold others, in place."""
    names = {name for row in rows for name in row}
    for name in sorted(name for name in names if not _encodable(name)):
        clean = printable(name)
        while clean in names:
            clean += "_"
        names.add(clean)
        for row in rows:
            if name in row:
                row[clean] = row.pop(name)


def _fits(rows: Sequence[dict[str, Any]], name: str) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = pa.array([row.get(name) for row in rows])
        # Parquet refuses some nested types that Arrow has, such as objects without a single key.
        if pa.types.is_nested(values.type):
            pq.write_table(pa.table({name: values}), pa.BufferOutputStream())
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
        return False
    return True


def _each(rows: Iterable[dict[str, Any]], name: str, change: Callable[[Any], Any] | None) -> None:
    """Change the values of a column; without `change` they go."""
    for row in rows:
        if name in row:
            value = row.pop(name)
            if change is not None:
                row[name] = change(value)


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


# ---- texts ----------------------------------------------------------------------------------------------------------


def text_lines(content: Iterable[bytes], label: str, hint: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of UTF-8 bytes, line breaks kept. Raises ChimeraError naming a line that is not."""
    for number, line in enumerate(content, 1):
        try:
            yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ChimeraError(f"{label}:{number}: the line is not UTF-8", hint) from error


def cannot_read(path: Path | str, error: OSError) -> ChimeraError:
    """Return the one sentence for a file of the source that can't be read."""
    return ChimeraError(f"{path} can't be read: {error.strerror or error}", "check the file's permissions")


def must_exist(path: Path, what: str) -> Path:
    """Return `path`. Raises UsageError where nothing is there; `what` completes the hint "give --from ..."."""
    if not path.exists():
        raise UsageError(f"{path} does not exist", f"give {what}")
    return path
