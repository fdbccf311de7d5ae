"""The pack: one data set on disk as memory-mapped pixels, two tables and a manifest (images.npy, *.parquet, *.json).

Opening one reads the manifest and file headers alone; numpy and pyarrow are imported when rows or pixels are asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.data.captions import word_count
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, Progress, ignore
from chimera_cli.runs import cannot_write, content_hash, locked, read_json, utc_now, write_json

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1
SPLITS = ("train", "dev", "test")
UNUSED = "unused"  # images of a source that are in none of its official splits
Fit = Literal["crop", "squash", "pad"]

IMAGES = "images.npy"
ITEMS = "items.parquet"
CAPTIONS = "captions.parquet"
MANIFEST = "manifest.json"

_ALIASES = {"val": "dev", "valid": "dev", "validation": "dev"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = ("downloads",)
_BLOCK_BYTES = 1 << 22


# ---- what a pack is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CaptionTable:
    """The captions of one split, ordered by image and then by caption index.

    `image_positions` (captions,) int64 says for each caption where its image stands within the split's index array,
    which has `image_count` entries.
    """

    image_positions: np.ndarray
    texts: tuple[str, ...]
    image_count: int

    def __len__(self) -> int:
        return len(self.texts)

    def by_image(self) -> list[range]:
        """Return for each image of the split the rows of its captions; an empty range where it has none."""
        import numpy as np

        edges = np.searchsorted(self.image_positions, np.arange(self.image_count + 1)).tolist()
        return [range(start, stop) for start, stop in pairwise(edges)]


@dataclass(frozen=True, eq=False)
class Pack:
    """A prepared data set. `fingerprint` names its content: equal pixels, rows and captions have equal fingerprints."""

    name: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def size(self) -> int:
        """Return the side of the square images in pixels."""
        return int(self.manifest["size"])

    def __len__(self) -> int:
        return int(self.manifest["image_count"])

    @cached_property
    def images(self) -> np.ndarray:
        """Return all pixels, (images, size, size, 3) uint8, mapped from disk and read-only."""
        import numpy as np

        pixels: np.ndarray = np.load(self.path / IMAGES, mmap_mode="r", allow_pickle=False)
        return pixels

    def column(self, name: str) -> list[Any]:
        """Return a column of the items table in the order of the images. Raises UsageError when there is none."""
        if name not in self._items:
            columns = ", ".join(sorted(self._items))
            raise UsageError(f"the pack {self.name} has no column {name!r}", f"it has {columns}")
        return list(self._items[name])

    def split_indices(self, split: str) -> np.ndarray:
        """Return the image indices of a split, (n,) int64 ascending. Raises UsageError for an unknown or empty one."""
        import numpy as np

        name = split_name(split)
        indices = np.flatnonzero(np.asarray(self._items["split"], dtype=object) == name).astype(np.int64)
        if not len(indices):
            filled = ", ".join(split for split, counts in self.manifest["splits"].items() if counts["images"])
            raise UsageError(f"the pack {self.name} has no images in the split {name!r}", f"it has {filled}")
        return indices

    def captions(self, split: str) -> CaptionTable:
        """Return the captions of a split, ordered by image and caption index; an empty table where there are none."""
        import numpy as np

        indices = self.split_indices(split)
        images = np.asarray(self._captions["image_index"], dtype=np.int64)
        positions = np.full(len(self), -1, dtype=np.int64)
        positions[indices] = np.arange(len(indices))
        rows = np.flatnonzero(positions[images] >= 0)
        texts = self._captions["text"]
        return CaptionTable(positions[images[rows]], tuple(texts[row] for row in rows.tolist()), len(indices))

    def image_ids(self, split: str) -> np.ndarray:
        """Return one number per image of a split, (n,) int64; equal for images whose source files are identical.

        Flickr8k has two such photos in its training split: their captions are no negatives of each other.
        """
        import numpy as np

        hashes = self._items["sha256"]
        first = {sha: index for index, sha in reversed(list(enumerate(hashes)))}
        return np.asarray([first[hashes[index]] for index in self.split_indices(split).tolist()], dtype=np.int64)

    @cached_property
    def _items(self) -> dict[str, list[Any]]:
        return _read_table(self.path / ITEMS, "image_index")

    @cached_property
    def _captions(self) -> dict[str, list[Any]]:
        return _read_table(self.path / CAPTIONS, "image_index", "caption_index")


def split_name(word: str) -> str:
    """Return the name of a split in packs; `val` and `validation` mean `dev`. Raises UsageError for any other word."""
    name = _ALIASES.get(word.lower(), word.lower())
    if name not in (*SPLITS, UNUSED):
        raise UsageError(f"there is no split {word!r}", f"the splits are {', '.join(SPLITS)}")
    return name


def check_pack_name(name: str) -> str:
    """Return `name` when it can be a folder of its own below data/. Raises UsageError otherwise."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise UsageError(f"{name!r} can't be the name of a pack", "use letters, digits, dots, dashes and underscores")
    return name


# ---- finding and opening --------------------------------------------------------------------------------------------


def pack_names(data_dir: Path) -> list[str]:
    """Return the names of all packs in `data_dir`, sorted; [] where the folder does not exist."""
    if not data_dir.is_dir():
        return []
    return sorted(p.name for p in data_dir.iterdir() if not p.name.startswith(".") and (p / MANIFEST).is_file())


def list_packs(data_dir: Path) -> list[Pack]:
    """Return all packs by name, their manifests read and nothing else checked."""
    return [open_pack(data_dir, name, check=False) for name in pack_names(data_dir)]


def default_pack(data_dir: Path) -> Pack | None:
    """Return the newest pack that was not made by `toy`, else the newest toy, else None; checked as by `open_pack`."""
    packs = list_packs(data_dir)
    if not packs:
        return None
    return open_pack(data_dir, max(packs, key=lambda p: (p.manifest["source"] != "toy", p.manifest["created_at"])).name)


def open_pack(data_dir: Path, name: str, *, check: bool = True) -> Pack:
    """Return the pack `name` after a look at its manifest and, with `check`, at each file's header, size and time.

    Raises UsageError where there is no such pack, ChimeraError where its manifest or a file is not what was written.
    """
    names = pack_names(data_dir)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        hint = f"there is {', '.join(near)}" if near else "make one with `chimera data prepare flickr8k` or `... toy`"
        raise UsageError(f"there is no pack {name!r} in {data_dir}", hint)
    pack = Pack(name, data_dir / name, _read_manifest(data_dir / name / MANIFEST))
    if check:
        for problem in _surface_problems(pack):
            raise ChimeraError(
                problem, f"`chimera data verify {name}` checks all of it; `chimera data prepare` makes it anew"
            )
    return pack


def verify_pack(pack: Pack, listener: Listener = ignore) -> list[str]:
    """Return one sentence for each thing that is wrong with a pack after reading all its bytes; [] when it is whole.

    Where only times differ (a copied or restored pack) they are noted in the manifest, so that it opens again.
    """
    problems = []
    times = {}
    total = sum(int(facts["bytes"]) for facts in pack.manifest["files"].values())
    done = 0
    for name, facts in pack.manifest["files"].items():
        path = pack.path / name
        if not path.is_file():
            problems.append(f"{path} is missing")
            continue
        times[name] = path.stat().st_mtime_ns
        if hash_file(path, listener, done, total) != facts["sha256"]:
            problems.append(f"{path} does not have the SHA-256 that the manifest gives")
        done += int(facts["bytes"])
    if fingerprint(pack.manifest["content"]) != pack.fingerprint:
        problems.append(f"{pack.path / MANIFEST}: the fingerprint does not belong to the content")
    if not problems:
        problems += _surface_problems(pack, times=False)
    if not problems and any(times[name] != facts["mtime_ns"] for name, facts in pack.manifest["files"].items()):
        files = {name: dict(facts, mtime_ns=times[name]) for name, facts in pack.manifest["files"].items()}
        write_json(pack.path / MANIFEST, dict(pack.manifest, files=files))
    return problems


def fingerprint(content: Mapping[str, str]) -> str:
    """Return the SHA-256 that names a content, given the hashes of its pixels, rows and captions."""
    return content_hash({"schema_version": SCHEMA_VERSION, **content})


def hash_file(path: Path, listener: Listener = ignore, done: int = 0, total: int = 0) -> str:
    """Return the SHA-256 of a file; with a `total` in bytes, tell the listener how far the checking has come."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                if total:
                    listener(Progress("checking", done >> 20, max(total >> 20, 1), "MiB"))
    except OSError as error:
        raise ChimeraError(f"{path} can't be read: {error.strerror or error}", "check the disk") from error
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    needed = {"schema_version", "name", "source", "size", "splits", "files", "content", "fingerprint", "created_at"}
    lacking = sorted((needed | {"image_count"}) - set(manifest))
    if lacking or manifest["schema_version"] != SCHEMA_VERSION:
        what = f"lacks {', '.join(lacking)}" if lacking else f"has schema version {manifest['schema_version']}"
        raise ChimeraError(f"{path} {what}; this chimera reads version {SCHEMA_VERSION}", "prepare the pack again")
    return manifest


def _surface_problems(pack: Pack, *, times: bool = True) -> list[str]:
    """Return what can be seen wrong without reading the data: absent files, other sizes, shapes or times."""
    for name, facts in pack.manifest["files"].items():
        path = pack.path / name
        try:
            stat = path.stat()
        except OSError as error:
            return [f"{path} can't be read: {error.strerror or error}"]
        if stat.st_size != facts["bytes"]:
            return [f"{path} has {stat.st_size:,} bytes instead of {facts['bytes']:,}: it was cut or changed"]
        if name == IMAGES and (problem := _header_problem(pack)):
            return [problem]
        if times and stat.st_mtime_ns != facts["mtime_ns"]:
            return [f"{path} was modified or copied after it was written"]
    return []


def _header_problem(pack: Pack) -> str | None:
    """Return what is wrong with the header of images.npy. Reads its few bytes without importing numpy."""
    path = pack.path / IMAGES
    with path.open("rb") as file:
        header = file.read(256)
    shape = f"({len(pack)}, {pack.size}, {pack.size}, 3)".encode()
    if header[:6] != b"\x93NUMPY" or b"'|u1'" not in header or b"'shape': " + shape not in header:
        return f"{path} does not hold {len(pack):,} images of {pack.size} pixels: its header says otherwise"
    return None


def _read_table(path: Path, *order: str) -> dict[str, list[Any]]:
    """Return the columns of a Parquet file as lists, sorted by the columns `order`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ChimeraError(f"{path} can't be read: {error}", "prepare the pack again") from error
    columns: dict[str, list[Any]] = table.sort_by([(name, "ascending") for name in order]).to_pydict()
    return columns


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """An image to be written: its name in the source, its split, and whatever else the source says of it."""

    source_file: str
    split: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Caption:
    """A caption to be written; `image` is its image's position among the items, `index` counts within the image."""

    image: int
    index: int
    text: str


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image: (size, size, 3) uint8, the SHA-256 of its source, width and height of the source in pixels."""

    pixels: np.ndarray
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Unreadable:
    """Stands in the stream of images for one that can't be decoded."""

    reason: str


@dataclass(frozen=True)
class Skipped:
    """An image of the source that is not in the pack, and why."""

    source_file: str
    reason: str


@dataclass(frozen=True)
class _Row:
    item: int
    sha256: str
    width: int
    height: int


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
    listener: Listener = ignore,
) -> Pack:
    """Write the pack `data_dir/name` and return it; readers see the old one or the whole new one, never a half.

    `images` yields one entry per item, in order; it is not touched where a pack of the same `source_digest` is there
    already (that one is returned). Two writers of one pack wait for each other. Raises ChimeraError, and leaves
    nothing, where more than the share `max_bad` of the images is unreadable or the disk does not take the files.
    """
    told: dict[str, Any] = {"name": check_pack_name(name), "source": source, "source_digest": source_digest}
    told |= {"size": size, "fit": fit, "licence": licence}
    with locked(data_dir / f".{name}.lock"):
        temporary = _sweep(data_dir, name)
        if kept := _unchanged(data_dir, name, source_digest, listener):
            return kept
        _check_space(data_dir, len(items) * size * size * 3)
        try:
            temporary.mkdir()
            rows, bad = _write_images(temporary / IMAGES, images, items, size, listener)
            _check_readable(bad, len(items), max_bad, listener)
            told["skipped"] = [{"source_file": s.source_file, "reason": s.reason} for s in (*skipped, *bad)]
            told |= _finish_files(temporary, items, rows, captions, listener)
            return _publish(temporary, data_dir / name, told, listener)
        except OSError as error:
            raise cannot_write(Path(error.filename or temporary), error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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


def _unchanged(data_dir: Path, name: str, source_digest: str, listener: Listener) -> Pack | None:
    """Return the pack that is there when it was made from `source_digest` and looks whole."""
    try:
        pack = open_pack(data_dir, name)
    except ChimeraError:
        return None
    if not source_digest or pack.manifest["source_digest"] != source_digest:
        return None
    listener(Note(f"the pack {name} is up to date: same source, same options, nothing to do"))
    return pack


def _check_space(data_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(data_dir).free
    if free < needed * 1.02:
        raise ChimeraError(
            f"{data_dir} has {free / 1e9:.1f} GB free and the pack needs {needed / 1e9:.1f} GB",
            "free some space, choose a smaller --size, or set CHIMERA_HOME to another disk",
        )


def _write_images(
    path: Path, images: Iterable[Picture | Unreadable], items: Sequence[Item], size: int, listener: Listener
) -> tuple[list[_Row], list[Skipped]]:
    """Write the readable images one after the other; return their rows and the unreadable ones.

    Not through a memory map: a full disk is an OSError here and would be a fatal SIGBUS there.
    """
    import numpy as np

    rows: list[_Row] = []
    bad: list[Skipped] = []
    every = max(len(items) // 200, 1)
    with path.open("wb") as file:
        _write_header(file, len(items), size)
        for number, (item, image) in enumerate(zip(items, images, strict=True)):
            if isinstance(image, Unreadable):
                bad.append(Skipped(item.source_file, image.reason))
            else:
                if image.pixels.shape != (size, size, 3) or image.pixels.dtype != np.uint8:
                    raise ValueError(f"{item.source_file}: {image.pixels.shape} {image.pixels.dtype} is no picture")
                file.write(np.ascontiguousarray(image.pixels).data)
                rows.append(_Row(number, image.sha256, image.width, image.height))
            if (number + 1) % every == 0 or number + 1 == len(items):
                listener(Progress("packing", number + 1, len(items)))
        file.seek(0)
        _write_header(file, len(rows), size)
        file.flush()
        os.fsync(file.fileno())
    return rows, bad


def _write_header(file: Any, images: int, size: int) -> None:
    """Write the header of images.npy. numpy pads it so that its length does not depend on the number of images."""
    import numpy as np

    shape = (images, size, size, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


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


def _write_tables(
    folder: Path, items: Sequence[Item], rows: Sequence[_Row], captions: Sequence[Caption]
) -> dict[str, str]:
    """Write both tables and return a hash of each by its values, which no version of Parquet can change."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = [items[row.item] for row in rows]
    extra = sorted({column for item in kept for column in item.columns})
    index = {row.item: position for position, row in enumerate(rows)}
    lines = sorted((index[c.image], c.index, c.text) for c in captions if c.image in index)
    table = {
        "image_index": pa.array(range(len(rows)), pa.int64()),
        "source_file": pa.array([item.source_file for item in kept], pa.string()),
        "split": pa.array([item.split for item in kept], pa.string()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
        "width": pa.array([row.width for row in rows], pa.int32()),
        "height": pa.array([row.height for row in rows], pa.int32()),
    } | {column: pa.array([item.columns.get(column) for item in kept]) for column in extra}
    texts = {
        "image_index": pa.array([line[0] for line in lines], pa.int64()),
        "caption_index": pa.array([line[1] for line in lines], pa.int32()),
        "text": pa.array([line[2] for line in lines], pa.string()),
    }
    pq.write_table(pa.table(table), folder / ITEMS)
    pq.write_table(pa.table(texts), folder / CAPTIONS)
    values = [
        [item.source_file, item.split, row.sha256, row.width, row.height, dict(item.columns)]
        for item, row in zip(kept, rows, strict=True)
    ]
    return {"items": content_hash(values), "captions": content_hash(lines)}


def _finish_files(
    folder: Path,
    items: Sequence[Item],
    rows: Sequence[_Row],
    captions: Sequence[Caption],
    listener: Listener,
) -> dict[str, Any]:
    """Write the tables beside the images and return the part of the manifest that follows from all that."""
    hashes = _write_tables(folder, items, rows, captions)
    kept = {row.item for row in rows}
    texts = [caption for caption in captions if caption.image in kept]
    words = [word_count(caption.text) for caption in texts]
    per_image = Counter(caption.image for caption in texts)
    image_counts = Counter(items[row.item].split for row in rows)
    caption_counts = Counter(items[caption.image].split for caption in texts)
    files = {name: _file_facts(folder / name, listener) for name in (IMAGES, ITEMS, CAPTIONS)}
    content = {"images": files[IMAGES]["sha256"], **hashes}
    spread = [per_image.get(row.item, 0) for row in rows]
    return {
        "schema_version": SCHEMA_VERSION,
        "created_at": utc_now(),
        "fingerprint": fingerprint(content),
        "image_count": len(rows),
        "caption_count": len(texts),
        "splits": {
            split: {"images": image_counts[split], "captions": caption_counts[split]} for split in (*SPLITS, UNUSED)
        },
        "captions_per_image": {"least": min(spread), "most": max(spread)},
        "caption_words": {"least": min(words), "mean": sum(words) / len(words), "most": max(words)} if words else None,
        "columns": sorted({column for row in rows for column in items[row.item].columns}),
        "content": content,
        "files": files,
    }


def _file_facts(path: Path, listener: Listener) -> dict[str, Any]:
    stat = path.stat()
    return {
        "sha256": hash_file(path, listener, 0, stat.st_size if path.name == IMAGES else 0),
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
    }


def _publish(temporary: Path, target: Path, manifest: Mapping[str, Any], listener: Listener) -> Pack:
    """Put the finished folder in its place, unless the pack that is there holds the very same content."""
    data_dir, name = target.parent, target.name
    try:
        there: Pack | None = open_pack(data_dir, name)
    except ChimeraError:
        there = None
    if there and there.fingerprint == manifest["fingerprint"]:
        kept = dict(there.manifest, **{key: manifest[key] for key in ("source_digest", "skipped", "fit", "licence")})
        write_json(target / MANIFEST, kept)
        listener(Note(f"the pack {name} is up to date: the source was touched, its content is the same"))
        return Pack(name, target, kept)
    write_json(temporary / MANIFEST, manifest)
    aside = data_dir / f".{name}.old"
    if target.exists():
        target.rename(aside)
        listener(Note(f"the pack {name} had other content and was replaced", "warning"))
    temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
    return Pack(name, target, manifest)
