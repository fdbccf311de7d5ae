"""The pack: one data set on disk as memory-mapped pixels, two tables and a manifest (images.npy, *.parquet, *.json).

Opening one reads the manifest and file headers alone; numpy and pyarrow are imported when rows or pixels are asked for.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, Progress, ignore
from chimera_cli.runs import cannot_write, content_hash, read_json, write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

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

# What every manifest holds, by type; packs made before duplicates were looked for lack `leakage` and `decoders`.
_COUNTS = {"images": int, "captions": int}
_FACTS = {"sha256": str, "bytes": int, "mtime_ns": int}
_SHAPE: Mapping[str, Any] = {
    **dict.fromkeys(("name", "source", "source_digest", "created_at", "fit", "licence", "fingerprint"), str),
    **dict.fromkeys(("size", "image_count", "caption_count"), int),
    "columns": [str],
    "skipped": [{"source_file": str, "reason": str}],
    "captions_per_image": {"least": int, "most": int},
    "splits": dict.fromkeys((*SPLITS, UNUSED), _COUNTS),
    "content": dict.fromkeys(("images", "items", "captions"), str),
    "files": dict.fromkeys((IMAGES, ITEMS, CAPTIONS), _FACTS),
}
_WORDS = {"least": int, "mean": (int, float), "most": int}


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
    """A prepared data set. `fingerprint` names its content: equal pixels, rows and captions have equal fingerprints.

    Files are opened when they are first asked for. One that is not of this content any more, because the pack was
    prepared anew since, is a ChimeraError: what is read always belongs together.
    """

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

        try:
            pixels: np.ndarray = np.load(self.path / IMAGES, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            self._check_unreplaced()
            raise ChimeraError(f"{self.path / IMAGES} can't be read: {error}", "prepare the pack again") from error
        self._check_unreplaced()
        return pixels

    def column(self, name: str) -> list[Any]:
        """Return a column of the items table in the order of the images. Raises UsageError when there is none."""
        if name not in self._items.column_names:
            columns = ", ".join(sorted(self._items.column_names))
            raise UsageError(f"the pack {self.name} has no column {name!r}", f"it has {columns}")
        values: list[Any] = self._items[name].to_pylist()
        return values

    def split_indices(self, split: str) -> np.ndarray:
        """Return the image indices of a split, (n,) int64 ascending. Raises UsageError for an unknown or empty one."""
        import numpy as np
        import pyarrow.compute as pc

        name = split_name(split)
        indices = np.flatnonzero(pc.equal(self._items["split"], name).to_numpy()).astype(np.int64)
        if not len(indices):
            filled = ", ".join(split for split, counts in self.manifest["splits"].items() if counts["images"])
            raise UsageError(f"the pack {self.name} has no images in the split {name!r}", f"it has {filled}")
        return indices

    def captions(self, split: str) -> CaptionTable:
        """Return the captions of a split, ordered by image and caption index; an empty table where there are none."""
        import numpy as np
        import pyarrow as pa

        indices = self.split_indices(split)
        positions = np.full(len(self), -1, dtype=np.int64)
        positions[indices] = np.arange(len(indices))
        places = positions[self._captions["image_index"].to_numpy()]
        texts = self._captions["text"].filter(pa.array(places >= 0))
        return CaptionTable(places[places >= 0], tuple(texts.to_pylist()), len(indices))

    def image_ids(self, split: str) -> np.ndarray:
        """Return one number per image of a split, (n,) int64; equal for images whose source files are identical.

        Flickr8k has two such photos in its training split: their captions are no negatives of each other.
        """
        import numpy as np

        codes = self._items["sha256"].combine_chunks().dictionary_encode().indices.to_numpy()
        _, first = np.unique(codes, return_index=True)  # codes are 0, 1, 2 ... in the order of their first images
        ids: np.ndarray = first[codes[self.split_indices(split)]].astype(np.int64)
        return ids

    @cached_property
    def _items(self) -> pa.Table:
        return self._table(ITEMS, "image_index")

    @cached_property
    def _captions(self) -> pa.Table:
        return self._table(CAPTIONS, "image_index", "caption_index")

    def _table(self, name: str, *order: str) -> pa.Table:
        try:
            table = _read_table(self.path / name, *order)
        except ChimeraError:
            self._check_unreplaced()
            raise
        self._check_unreplaced()
        return table

    def _check_unreplaced(self) -> None:
        """Raise ChimeraError when another content stands where this pack was opened.

        Called after a file was opened, which from then on is the same whatever takes its place.
        """
        try:
            now = read_json(self.path / MANIFEST).get("fingerprint")
        except ChimeraError:
            now = None
        if now != self.fingerprint:
            raise ChimeraError(
                f"the pack {self.name} was replaced while it was read", "run the command again: it takes the new one"
            )


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


# ---- what a pack is made of -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """An image to be written: its name in the source, its split, and whatever else the source says of it.

    The split "" is left to the writer's `SplitRule`. Column values are whatever Arrow can hold.
    """

    source_file: str
    split: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption to be written; `image` is its image's position among the items, `index` counts within the image."""

    image: int
    index: int
    text: str


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """A decoded image: (size, size, 3) uint8, the SHA-256 of its source, width and height of the source in pixels.

    `decoder` names the library that decoded it; empty where none did.
    """

    pixels: np.ndarray
    sha256: str
    width: int
    height: int
    decoder: str = ""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands in the stream of images for one that can't be decoded."""

    reason: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image of the source that is not in the pack, and why."""

    source_file: str
    reason: str


# ---- finding and opening --------------------------------------------------------------------------------------------


def pack_names(data_dir: Path) -> list[str]:
    """Return the names of all packs in `data_dir`, sorted; [] where the folder does not exist."""
    if not data_dir.is_dir():
        return []
    return sorted(p.name for p in data_dir.iterdir() if not p.name.startswith(".") and (p / MANIFEST).is_file())


def list_packs(data_dir: Path, listener: Listener = ignore) -> list[Pack]:
    """Return all packs by name, their manifests read and nothing else checked; the listener is told of broken ones."""
    packs = []
    for name in pack_names(data_dir):
        try:
            packs.append(open_pack(data_dir, name, check=False))
        except ChimeraError as error:
            listener(Note(f"the pack {name} is left out: {error.message}", "warning"))
    return packs


def default_pack(data_dir: Path, listener: Listener = ignore) -> Pack | None:
    """Return the newest pack that was not made by `toy`, else the newest toy, else None; checked as by `open_pack`."""
    packs = list_packs(data_dir, listener)
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

    Where only times differ (a copied or restored pack) they are noted in the manifest, so that it opens again. Nobody
    writes the pack meanwhile: who does is waited for, and what he replaced is a ChimeraError.
    """
    with _still(pack, listener) as now:
        return _verify(now, listener)


@contextmanager
def _still(pack: Pack, listener: Listener) -> Iterator[Pack]:
    """Yield the pack as it is once nobody writes it, and keep it so; where its lock can't be had nobody writes."""
    data_dir = pack.path.parent
    lock: AbstractContextManager[None]
    try:
        lock_path(data_dir, pack.name).open("a").close()
        lock = locked_pack(data_dir, pack.name, listener)
    except OSError:
        lock = nullcontext()
    with lock:
        pack._check_unreplaced()
        yield Pack(pack.name, pack.path, _read_manifest(pack.path / MANIFEST))


def lock_path(data_dir: Path, name: str) -> Path:
    """Return the file on which writers of a pack wait for each other."""
    return data_dir / f".{name}.lock"


@contextmanager
def locked_pack(data_dir: Path, name: str, listener: Listener) -> Iterator[None]:
    """Hold the lock of a pack; where another process holds it, say so and wait. It ends with its process."""
    path = lock_path(data_dir, name)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            listener(Note(f"the pack {name} is being written or verified by another process: waiting for it"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _verify(pack: Pack, listener: Listener) -> list[str]:
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
    """Return a manifest with all that is read of it. Raises ChimeraError naming what is absent or of another type."""
    manifest = read_json(path)
    if manifest.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        what = f"has schema version {manifest['schema_version']}"
        raise ChimeraError(f"{path} {what}; this chimera reads version {SCHEMA_VERSION}", "prepare the pack again")
    shape: dict[str, Any] = {"schema_version": int, **_SHAPE}
    if manifest.get("caption_words") is not None:
        shape["caption_words"] = _WORDS
    if lacking := sorted(_misfits(manifest, shape)):
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        what = f"lacks {', '.join(lacking[:8])}{more}, or they are of another type"
        raise ChimeraError(f"{path} {what}; this chimera reads version {SCHEMA_VERSION}", "prepare the pack again")
    return manifest


def _misfits(value: Any, shape: Any, place: str = "") -> Iterator[str]:
    """Yield the dotted names of what is absent from a JSON value or of another type than `shape` gives."""
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            yield place
            return
        for key, inner in shape.items():
            yield from _misfits(value.get(key), inner, f"{place}.{key}" if place else key)
    elif isinstance(shape, list):
        if not isinstance(value, list) or any(True for entry in value for _ in _misfits(entry, shape[0], "entry")):
            yield place
    elif not isinstance(value, shape) or isinstance(value, bool):
        yield place


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


def _read_table(path: Path, *order: str) -> pa.Table:
    """Return a Parquet file as a table ordered by the columns `order`, as Chimera wrote it.

    It stays in Arrow's memory, a tenth of what Python objects take: values are made of what is asked for alone.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ChimeraError(f"{path} can't be read: {error}", "prepare the pack again") from error
    return table if _is_ordered(table, order) else table.sort_by([(name, "ascending") for name in order])


def _is_ordered(table: pa.Table, order: Sequence[str]) -> bool:
    """Return whether the rows stand in the order of the integer columns `order`, the first of which weighs most."""
    import numpy as np

    tied = np.ones(max(len(table) - 1, 0), dtype=bool)
    for name in order:
        steps = np.diff(table[name].to_numpy())
        if (steps[tied] < 0).any():
            return False
        tied &= steps == 0
    return True
