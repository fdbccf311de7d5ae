"""The split files of Karpathy and Fei-Fei (CVPR 2015): dataset_flickr8k.json, _flickr30k.json and _coco.json.

One JSON object: `images`, a list of `filename`, perhaps `filepath` (a folder), `split` and `sentences`.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chimera_cli.data.sources.corpus import (
    NO_LICENCE,
    Corpus,
    Draft,
    Photo,
    cannot_read,
    check_inside,
    folders_with,
    locate,
    must_exist,
    split_word,
    subfolders,
)
from chimera_cli.data.sources.licences import licence_of
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, ignore

PATTERN = "dataset_*.json"
_KEPT = ("images", "filename", "filepath", "split", "sentences", "imgid", "cocoid", "dataset")
_COLUMNS = {"cocoid": "coco_id", "imgid": "imgid"}
_HINT = "give --from one of dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json as published"


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a split file: `where` names it in errors, `folder` may be "", `columns` are its numbers."""

    filename: str
    folder: str
    split: str
    sentences: Sequence[str]
    columns: Mapping[str, Any]
    where: str


@contextlib.contextmanager
def open_karpathy(origin: Path, images: Path | None = None, listener: Listener = ignore) -> Iterator[Corpus]:
    """Yield what a split file (or the folder it lies in) holds, with the photos in `images` or beside it.

    `train` and `restval` become train, `val` dev. Raises ChimeraError naming the entry that is broken, leads out of
    the folder of the images, or has an unknown split.
    """
    path = _find_file(must_exist(origin, "--from a file such as dataset_flickr30k.json"))
    base = must_exist(images or path.parent, "--images the folder that holds the photos")
    yield _gather(path, base, listener).finish(path, licence_of(path.stem.removeprefix("dataset_")) or NO_LICENCE)


def _gather(path: Path, base: Path, listener: Listener) -> Draft:
    """Return what the split file says. What was read of it is given back to the memory before the pack is made."""
    try:
        entries = read_entries(path.read_bytes(), str(path))
    except OSError as error:
        raise cannot_read(path, error) from error
    names = [f"{entry.folder}/{entry.filename}" if entry.folder else entry.filename for entry in entries]
    folders = folders_with([base, *subfolders(base)], [*names, *(entry.filename for entry in entries)]) or [base]
    draft = Draft(listener)
    seen: dict[str, str] = {}
    for entry, name in zip(entries, names, strict=True):
        if name in seen:
            raise ChimeraError(f"{entry.where}: {name} is there already as {seen[name]}", _HINT)
        seen[name] = entry.where.rpartition(": ")[2]
        found = locate(folders, name, entry.filename)
        if not isinstance(found, Photo):
            draft.skip(name, found)
            continue
        number = draft.add_photo(name, entry.split, found, dict(entry.columns))
        for sentence in entry.sentences:
            draft.add_caption(number, sentence, entry.where)
    return draft


def read_entries(content: bytes, label: str) -> list[Entry]:
    """Return the images of a split file, given its bytes and its name for errors."""
    try:
        # The hook drops the tokens of each sentence as soon as it is read: for COCO they would fill a gigabyte.
        value = json.loads(content, object_pairs_hook=_compact)
    except (ValueError, RecursionError) as error:
        raise ChimeraError(f"{label} is not valid JSON: {error}", "it was cut off or edited; get it again") from error
    images = value.get("images") if isinstance(value, dict) else None
    if not isinstance(images, list) or not images:
        raise ChimeraError(f"{label} has no list `images`", _HINT)
    return [_entry(image, f"{label}: images[{number}]") for number, image in enumerate(images)]


def _find_file(origin: Path) -> Path:
    if not origin.is_dir():
        return origin
    found = sorted(origin.glob(PATTERN))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:4]) or f"no {PATTERN}"
        raise UsageError(f"{origin} holds {names}", "give --from the split file itself")
    return found[0]


def _compact(pairs: Sequence[tuple[str, Any]]) -> Any:
    """Return a sentence as its words alone, and any other object without the keys that nobody needs."""
    for key, value in pairs:
        if key == "raw":
            return value
    return {key: value for key, value in pairs if key in _KEPT}


def _entry(image: Any, where: str) -> Entry:
    filename = image.get("filename") if isinstance(image, dict) else None
    if not isinstance(filename, str) or not filename:
        raise ChimeraError(f"{where} has no `filename`", _HINT)
    check_inside(filename, where)
    folder = image.get("filepath") or ""
    if not isinstance(folder, str):
        raise ChimeraError(f"{where}: `filepath` is no text", _HINT)
    if folder:
        check_inside(folder, where)
    split = split_word(image["split"]) if isinstance(image.get("split"), str) else None
    if split is None:
        raise ChimeraError(f"{where}: {image.get('split')!r} is no split", "known are train, restval, val and test")
    sentences = image.get("sentences", [])
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise ChimeraError(f"{where}: `sentences` is no list of objects with `raw`", _HINT)
    columns = {ours: image[theirs] for theirs, ours in _COLUMNS.items() if isinstance(image.get(theirs), int)}
    return Entry(filename, folder.strip("/"), split, sentences, columns, where)
