"""Writing packs: beside what is there, in a temporary folder that takes its name when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from chimera_cli.data.captions import word_count
from chimera_cli.data.pack import (
    CAPTIONS,
    IMAGES,
    ITEMS,
    MANIFEST,
    SCHEMA_VERSION,
    SPLITS,
    UNUSED,
    Caption,
    Fit,
    Item,
    Pack,
    Picture,
    Skipped,
    Unreadable,
    check_pack_name,
    fingerprint,
    hash_file,
    locked_pack,
    open_pack,
)
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, Progress, ignore
from chimera_cli.runs import cannot_write, read_json, utc_now, write_json

if TYPE_CHECKING:
    import pyarrow as pa

# Written pixels are sent to the disk in steps, so that no long wait is left for the end.
_SYNC_BYTES = 1 << 26
# Contents matter on the way, their metadata only at the end; not every system tells the two apart.
_to_disk = getattr(os, "fdatasync", os.fsync)
_HASHED_ROWS = 4096
# Less than any share that can be meant: what is left for training is 1 minus two decimal fractions.
_NO_SHARE = 1e-9
# What a pack that is only touched takes over from its new source.
_TOUCHED = ("source_digest", "skipped", "fit", "licence", "leakage", "decoders")
_FILES = (IMAGES, ITEMS, CAPTIONS, MANIFEST)
_OWN_COLUMNS = ("image_index", "source_file", "split", "sha256", "width", "height")


@dataclass(frozen=True, slots=True)
class SplitRule:
    """How images without a split get one: the shares `dev` and `test` (0-1), drawn by `seed`; the rest is for training.

    Drawn are contents, not files: identical images always land in one split, and the order of the source says nothing.
    """

    seed: int
    dev: float
    test: float

    def __post_init__(self) -> None:
        """Raise UsageError for shares that can't be."""
        if not (self.dev >= 0 and self.test >= 0 and self.dev + self.test <= 1):
            raise UsageError(
                f"shares of {self.dev:g} for dev and {self.test:g} for test can't be drawn from one set",
                "both are between 0 and 1, and so is their sum",
            )


@dataclass(frozen=True, slots=True)
class _Row:
    """An image that was written: its position among the items and what its picture said."""

    item: int
    sha256: str
    width: int
    height: int
    decoder: str


@dataclass(frozen=True, slots=True)
class _Written:
    """What came of the images. `sha256` is the hash of images.npy."""

    rows: list[_Row]
    bad: list[Skipped]
    sha256: str


def write_pack(
    data_dir: Path,
    *,
    name: str,
    source: str,
    images: Iterable[Picture | Unreadable],
    items: Sequence[Item],
    captions: Sequence[Caption] = (),
    size: int,
    fit: Fit = "crop",
    licence: str = "",
    skipped: Sequence[Skipped] = (),
    max_bad: float = 0.01,
    source_digest: str = "",
    split_rule: SplitRule | None = None,
    listener: Listener = ignore,
) -> Pack:
    """Write the pack `data_dir/name` and return it; readers see the old one or the whole new one, never a half.

    `images` yields one entry per item, in order; it is not touched where a pack of the same `source_digest` is there
    already (that one is returned). Items with the split "" get theirs from `split_rule` once all contents are known.
    Identical files in different splits are noted and listed in the manifest as `leakage`. A column of the source with
    a name that packs use themselves is kept as `source_<name>`. Two writers of one pack wait for each other. Raises
    ChimeraError, and leaves nothing, where more than the share `max_bad` of the images is unreadable, a column holds
    values of several kinds, the disk does not take the files, or something that is no pack has the name.
    """
    told: dict[str, Any] = {"name": check_pack_name(name), "source": source, "source_digest": source_digest}
    told |= {"size": size, "fit": fit, "licence": licence}
    with locked_pack(data_dir, name, listener):
        temporary = _sweep(data_dir, name)
        most_skipped = len(skipped) + int(max_bad * len(items))
        if kept := _unchanged(data_dir, name, source_digest, most_skipped, listener):
            return kept
        _check_replaceable(data_dir / name)
        _check_items(items, split_rule)
        _check_space(data_dir, len(items) * size * size * 3)
        try:
            columns = _column_types(items)
            temporary.mkdir()
            written = _write_images(temporary / IMAGES, images, items, size, listener)
            _check_readable(written.bad, len(items), max_bad, listener)
            left_out = (*skipped, *written.bad)
            told["skipped"] = [{"source_file": _utf8(s.source_file), "reason": _utf8(s.reason)} for s in left_out]
            told |= _finish_files(temporary, items, written, captions, columns, split_rule)
            _tell_leakage(told["leakage"], listener)
            _tell_empty_splits(items, split_rule, told["splits"], listener)
            return _publish(temporary, data_dir / name, told, listener)
        except OSError as error:
            raise cannot_write(Path(error.filename or temporary), error) from error
        finally:
            if isinstance(images, Generator):
                images.close()
            shutil.rmtree(temporary, ignore_errors=True)


# ---- before ---------------------------------------------------------------------------------------------------------


def _sweep(data_dir: Path, name: str) -> Path:
    """Clear what a killed writer left and return the temporary folder's path.

    A pack that such a writer had set aside before putting the new one in its place comes back.
    """
    temporary, aside = data_dir / f".{name}.partial", data_dir / f".{name}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    if aside.exists() and not (data_dir / name).exists():
        aside.rename(data_dir / name)
    shutil.rmtree(aside, ignore_errors=True)
    return temporary


def _unchanged(data_dir: Path, name: str, source_digest: str, most_skipped: int, listener: Listener) -> Pack | None:
    """Return the pack that is there when it was made from `source_digest`, looks whole and lacks few enough images."""
    try:
        pack = open_pack(data_dir, name)
    except ChimeraError:
        return None
    if not source_digest or pack.manifest["source_digest"] != source_digest:
        return None
    if len(pack.manifest["skipped"]) > most_skipped:
        return None
    listener(Note(f"the pack {name} is up to date: same source, same options, nothing to do"))
    return pack


def _check_replaceable(target: Path) -> None:
    """Raise ChimeraError where a pack would take the place of what is none: it may be all that somebody has of it."""
    if not target.exists() and not target.is_symlink():
        return
    hint = "choose another --name, or move it elsewhere"
    if target.is_symlink() or not target.is_dir():
        raise ChimeraError(f"{target} is there and is no pack", hint)
    try:
        entries = sorted(target.iterdir())
    except OSError as error:
        raise ChimeraError(f"{target} can't be read: {error.strerror or error}", "check its permissions") from error
    foreign = [entry.name for entry in entries if entry.name not in _FILES or _is_folder(entry)]
    if foreign:
        raise ChimeraError(f"{target} is there and is no pack: it holds {_utf8(foreign[0])}", hint)
    if entries and not _has_manifest(target):
        raise ChimeraError(f"{target} is there and is no pack", hint)


def _has_manifest(folder: Path) -> bool:
    """Return whether a folder has a manifest of ours; one that can't be read is when the other files stand beside."""
    try:
        return "fingerprint" in read_json(folder / MANIFEST) or _is_complete(folder)
    except ChimeraError:
        return _is_complete(folder)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _check_items(items: Sequence[Item], rule: SplitRule | None) -> None:
    """Raise ChimeraError where there is nothing to write, ValueError for a split that no reader would find."""
    if not items:
        raise ChimeraError("the source holds no images", "a pack has at least one")
    known = {*SPLITS, UNUSED} | ({""} if rule else set())
    for item in items:
        if item.split not in known:
            raise ValueError(f"{item.source_file} is in the split {item.split!r}")


def _check_space(data_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(data_dir).free
    if free < needed * 1.02:
        raise ChimeraError(
            f"{data_dir} has {free / 1e9:.1f} GB free and the pack needs {needed / 1e9:.1f} GB",
            "free some space, choose a smaller --size, or set CHIMERA_HOME to another disk",
        )


def _column_types(items: Sequence[Item]) -> dict[str, pa.DataType]:
    """Return the type of each column of the source, sorted by name. Raises ChimeraError where values don't agree.

    Known before hours of decoding, and from all items: what is skipped changes no type.
    """
    import pyarrow as pa

    types = {}
    for column in sorted({name for item in items for name in item.columns}):
        try:
            types[column] = pa.array([item.columns.get(column) for item in items]).type
        except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
            raise ChimeraError(
                f"the column {column!r} can't be stored: {str(error).splitlines()[0]}", "give all its values one type"
            ) from error
    return types


# ---- pixels ---------------------------------------------------------------------------------------------------------


def _write_images(
    path: Path, images: Iterable[Picture | Unreadable], items: Sequence[Item], size: int, listener: Listener
) -> _Written:
    """Write the readable images one after the other; return their rows, the unreadable ones and the file's hash.

    Not through a memory map: a full disk is an OSError here and would be a fatal SIGBUS there.
    """
    rows: list[_Row] = []
    bad: list[Skipped] = []
    every = max(len(items) // 200, 1)
    header = _header(len(items), size)
    digest = hashlib.sha256(header)
    with path.open("wb") as file, _syncing(file) as sync:
        file.write(header)
        for number, (item, image) in enumerate(zip(items, images, strict=True)):
            if isinstance(image, Unreadable):
                bad.append(Skipped(item.source_file, image.reason))
            else:
                data = _pixel_bytes(item, image, size)
                file.write(data)
                digest.update(data)
                sync(len(data))
                rows.append(_Row(number, image.sha256, image.width, image.height, image.decoder))
            if (number + 1) % every == 0 or number + 1 == len(items):
                listener(Progress("packing", number + 1, len(items)))
        file.seek(0)
        file.write(_header(len(rows), size))
        file.flush()
        os.fsync(file.fileno())
    # The header comes first and says how many images follow: with one left out the hash has to begin anew.
    return _Written(rows, bad, hash_file(path) if bad else digest.hexdigest())


def _pixel_bytes(item: Item, image: Picture, size: int) -> memoryview:
    """Return the pixels as they lie in the file. Raises ValueError for what is no square picture of this size."""
    import numpy as np

    if image.pixels.shape != (size, size, 3) or image.pixels.dtype != np.uint8:
        raise ValueError(f"{item.source_file}: {image.pixels.shape} {image.pixels.dtype} is no picture")
    return np.ascontiguousarray(image.pixels).reshape(-1).data


def _header(images: int, size: int) -> bytes:
    """Return the header of images.npy. numpy pads it so that its length does not depend on the number of images."""
    import io

    import numpy as np

    buffer = io.BytesIO()
    shape = (images, size, size, 3)
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@contextmanager
def _syncing(file: BinaryIO) -> Iterator[Any]:
    """Yield a function that is told of written bytes and has a thread send them to the disk every now and then."""
    unsynced = 0
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="sync") as pool:

        def sync(written: int) -> None:
            nonlocal unsynced, pending
            unsynced += written
            if unsynced < _SYNC_BYTES or (pending is not None and not pending.done()):
                return
            if pending is not None:
                pending.result()
            file.flush()
            pending, unsynced = pool.submit(_to_disk, file.fileno()), 0

        yield sync
        if pending is not None:
            pending.result()


def _check_readable(bad: Sequence[Skipped], total: int, max_bad: float, listener: Listener) -> None:
    if not bad:
        return
    first = f"{bad[0].source_file}: {bad[0].reason}"
    if len(bad) > max_bad * total or len(bad) == total:
        raise ChimeraError(
            f"{len(bad):,} of {total:,} images can't be read, more than the {max_bad:.1%} allowed; first {first}",
            "replace the damaged files, or allow a larger share with --max-bad",
        )
    listener(Note(f"skipped {len(bad):,} unreadable of {total:,} images ({first}); {MANIFEST} lists them", "warning"))


# ---- splits ---------------------------------------------------------------------------------------------------------


def _assign_splits(items: Sequence[Item], rows: Sequence[_Row], rule: SplitRule | None) -> list[str]:
    """Return the split of each row. A content that has one given somewhere keeps it; the others are drawn."""
    splits = [items[row.item].split for row in rows]
    if rule is None:
        return splits
    given: dict[str, str] = {}
    for wanted in (*SPLITS, UNUSED):
        for row, split in zip(rows, splits, strict=True):
            if split == wanted:
                given.setdefault(row.sha256, split)
    free = {row.sha256 for row, split in zip(rows, splits, strict=True) if not split} - given.keys()
    order = sorted(free, key=lambda content: hashlib.sha256(f"{rule.seed}:{content}".encode()).digest())
    test, dev = _split_sizes(rule, len(order), set(given.values()))
    drawn = given | dict.fromkeys(order, "train")
    drawn |= dict.fromkeys(order[:test], "test") | dict.fromkeys(order[test : test + dev], "dev")
    return [split or drawn[row.sha256] for row, split in zip(rows, splits, strict=True)]


def _split_sizes(rule: SplitRule, count: int, filled: Collection[str]) -> tuple[int, int]:
    """Return how many of `count` contents are for test and for dev.

    By rounding, but a split with a share gets one at least, of the largest, if there is one for each; what the source
    itself has `filled` needs none.
    """
    test = round(rule.test * count)
    dev = min(round(rule.dev * count), count - test)
    sizes = {"train": count - test - dev, "dev": dev, "test": test}
    shares = {"train": 1 - rule.dev - rule.test, "dev": rule.dev, "test": rule.test}
    wanted = [split for split, share in shares.items() if share > _NO_SHARE and split not in filled]
    if count >= len(wanted):
        for split in wanted:
            if not sizes[split]:
                sizes[max(sizes, key=lambda name: sizes[name])] -= 1
                sizes[split] = 1
    return sizes["test"], sizes["dev"]


def _tell_empty_splits(
    items: Sequence[Item], rule: SplitRule | None, counts: Mapping[str, Mapping[str, int]], listener: Listener
) -> None:
    """Tell of the splits that have a share in what was drawn and got no image."""
    if rule is None or all(item.split for item in items):
        return
    shares = {"train": 1 - rule.dev - rule.test, "dev": rule.dev, "test": rule.test}
    empty = [split for split, share in shares.items() if share > _NO_SHARE and not counts[split]["images"]]
    if empty:
        told = f"there are too few different images to draw all splits: {' and '.join(empty)} got none"
        listener(Note(told, "warning"))


def _find_leakage(items: Sequence[Item], rows: Sequence[_Row], splits: Sequence[str]) -> list[dict[str, Any]]:
    """Return the contents that are in more than one split, each with its files; what no split uses leaks nothing."""
    first: dict[str, int] = {}
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if splits[place] != UNUSED and first.setdefault(row.sha256, place) != place:
            places.setdefault(row.sha256, [first[row.sha256]]).append(place)
    return [
        {"sha256": content, "files": [[_utf8(items[rows[place].item].source_file), splits[place]] for place in twins]}
        for content, twins in places.items()
        if len({splits[place] for place in twins}) > 1
    ]


def _tell_leakage(leakage: Sequence[Mapping[str, Any]], listener: Listener) -> None:
    if not leakage:
        return
    files = leakage[0]["files"]
    one, other = files[0], next(entry for entry in files if entry[1] != files[0][1])
    listener(
        Note(
            f"{len(leakage):,} images are in more than one split, byte for byte (first {one[0]} in {one[1]} and "
            f"{other[0]} in {other[1]}): what is learnt of one flatters the other; {MANIFEST} lists them",
            "warning",
        )
    )


# ---- tables and manifest --------------------------------------------------------------------------------------------


def _finish_files(
    folder: Path,
    items: Sequence[Item],
    written: _Written,
    captions: Sequence[Caption],
    columns: Mapping[str, pa.DataType],
    rule: SplitRule | None,
) -> dict[str, Any]:
    """Write the tables beside the images and return the part of the manifest that follows from all that."""
    rows = written.rows
    splits = _assign_splits(items, rows, rule)
    hashes = _write_items(folder / ITEMS, items, rows, splits, columns)
    lines = _caption_lines(rows, captions)
    hashes |= _write_captions(folder / CAPTIONS, lines)
    content = {"images": written.sha256, **hashes}
    files = {IMAGES: _file_facts(folder / IMAGES, written.sha256)}
    files |= {name: _file_facts(folder / name) for name in (ITEMS, CAPTIONS)}
    facts = {
        "schema_version": SCHEMA_VERSION,
        "created_at": utc_now(),
        "fingerprint": fingerprint(content),
        "image_count": len(rows),
        "columns": [_stored_name(column, columns) for column in columns],
        "leakage": _find_leakage(items, rows, splits),
        "decoders": dict(Counter(row.decoder for row in rows if row.decoder)),
    }
    return facts | _caption_facts(splits, lines) | {"content": content, "files": files}


def _write_items(
    path: Path, items: Sequence[Item], rows: Sequence[_Row], splits: Sequence[str], columns: Mapping[str, pa.DataType]
) -> dict[str, str]:
    """Write the table of the images and return its hash by values, which no version of Parquet can change."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = [items[row.item] for row in rows]
    table = {
        "image_index": pa.array(range(len(rows)), pa.int64()),
        "source_file": pa.array([_utf8(item.source_file) for item in kept], pa.string()),
        "split": pa.array(splits, pa.string()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
        "width": pa.array([row.width for row in rows], pa.int32()),
        "height": pa.array([row.height for row in rows], pa.int32()),
    } | {
        _stored_name(column, columns): pa.array([item.columns.get(column) for item in kept], kind)
        for column, kind in columns.items()
    }
    pq.write_table(pa.table(table), path)
    values = (
        [item.source_file, split, row.sha256, row.width, row.height, dict(item.columns)]
        for item, split, row in zip(kept, splits, rows, strict=True)
    )
    return {"items": _hash_rows(values)}


def _utf8(name: str) -> str:
    """Return a file's name with \\udc.. in place of bytes that are no UTF-8: Linux has such names, Parquet has not."""
    return name.encode("utf-8", "backslashreplace").decode()


def _stored_name(column: str, columns: Collection[str]) -> str:
    """Return the name under which one of the source's `columns` is kept: one that neither packs nor the source use."""
    if column not in _OWN_COLUMNS:
        return column
    name = f"source_{column}"
    while name in columns or name in _OWN_COLUMNS:
        name = f"source_{name}"
    return name


def _caption_lines(rows: Sequence[_Row], captions: Sequence[Caption]) -> pa.Table:
    """Return the captions of the images that were written, ordered by image, caption index and text."""
    import pyarrow as pa

    index = {row.item: position for position, row in enumerate(rows)}
    kept = [caption for caption in captions if caption.image in index]
    lines = pa.table(
        {
            "image_index": pa.array((index[caption.image] for caption in kept), pa.int64(), size=len(kept)),
            "caption_index": pa.array((caption.index for caption in kept), pa.int32(), size=len(kept)),
            "text": pa.array((caption.text for caption in kept), pa.string(), size=len(kept)),
        }
    )
    return lines.sort_by([(name, "ascending") for name in lines.column_names])


def _write_captions(path: Path, lines: pa.Table) -> dict[str, str]:
    """Write the table of the captions and return its hash by values."""
    import pyarrow.parquet as pq

    pq.write_table(lines, path)
    return {"captions": _hash_rows(chain.from_iterable(zip(*some, strict=True) for some in _some_at_a_time(lines)))}


def _some_at_a_time(table: pa.Table) -> Iterator[list[list[Any]]]:
    """Yield the columns of some thousand rows at a time as Python values."""
    for batch in table.to_batches(max_chunksize=_HASHED_ROWS):
        yield [column.to_pylist() for column in batch.columns]


def _caption_facts(splits: Sequence[str], lines: pa.Table) -> dict[str, Any]:
    """Return the manifest's counts of images and captions."""
    import numpy as np

    per_image = np.bincount(lines["image_index"].to_numpy(), minlength=len(splits))
    images = Counter(splits)
    captions: Counter[str] = Counter()
    for split, count in zip(splits, per_image.tolist(), strict=True):
        captions[split] += count
    texts = (text for (some,) in _some_at_a_time(lines.select(["text"])) for text in some)
    words = np.fromiter(map(word_count, texts), np.int64, len(lines))
    return {
        "caption_count": len(lines),
        "splits": {split: {"images": images[split], "captions": captions[split]} for split in (*SPLITS, UNUSED)},
        "captions_per_image": {"least": int(per_image.min()), "most": int(per_image.max())},
        "caption_words": {"least": int(words.min()), "mean": float(words.mean()), "most": int(words.max())}
        if len(words)
        else None,
    }


def _hash_rows(rows: Iterable[Any]) -> str:
    """Return `content_hash` of the list of all `rows`, without ever holding it or its JSON."""
    encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str).encode
    digest = hashlib.sha256(b"[")
    rest, comma = iter(rows), ""
    while some := list(islice(rest, _HASHED_ROWS)):
        digest.update(f"{comma}{encode(some)[1:-1]}".encode())
        comma = ","
    digest.update(b"]")
    return digest.hexdigest()


def _file_facts(path: Path, sha256: str | None = None) -> dict[str, Any]:
    stat = path.stat()
    return {"sha256": sha256 or hash_file(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _publish(temporary: Path, target: Path, manifest: Mapping[str, Any], listener: Listener) -> Pack:
    """Put the finished folder in its place, unless the pack that is there holds the very same content."""
    data_dir, name = target.parent, target.name
    try:
        there: Pack | None = open_pack(data_dir, name)
    except ChimeraError:
        there = None
    # The fingerprint goes by the source's names of columns, not by those they are stored under.
    if there and all(there.manifest[key] == manifest[key] for key in ("fingerprint", "columns")):
        kept = dict(there.manifest, **{key: manifest[key] for key in _TOUCHED})
        write_json(target / MANIFEST, kept)
        listener(Note(f"the pack {name} is up to date: the source was touched, its content is the same"))
        return Pack(name, target, kept)
    write_json(temporary / MANIFEST, manifest)
    aside = data_dir / f".{name}.old"
    _check_replaceable(target)  # again: hours may have passed
    if target.exists():
        target.rename(aside)
        listener(Note(f"the pack {name} had other content and was replaced", "warning"))
    temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
    return Pack(name, target, manifest)
