"""COCO Captions (Chen et al., arXiv 1504.00325, 2015): captions_*.json beside or above the folders of the photos.

The official splits come from the files' names (captions_train2017.json, captions_val2017.json), or from the split file
of Karpathy and Fei-Fei (dataset_coco.json), which most published retrieval figures use.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chimera_cli.data.pack import UNUSED
from chimera_cli.data.sources.corpus import (
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
from chimera_cli.data.sources.karpathy import read_entries
from chimera_cli.data.sources.licences import licence_of
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, ignore

_NAME = re.compile(r"captions_((train|val|dev|test)(\d{4})?)\.json")
_WHAT = "--from the folder that holds annotations/captions_train2017.json, or that file"
_HINT = "take the file from annotations_trainval2017.zip, or write one in the same form"
_KEPT = ("images", "annotations", "id", "file_name", "flickr_url", "license")


@dataclass(frozen=True, slots=True)
class _Caption:
    image: int
    text: str


@dataclass(frozen=True)
class _Annotations:
    """One captions_*.json: `folder` is where its photos usually lie (`train2017`), `split` its official split."""

    path: Path
    folder: str
    split: str
    images: Sequence[Mapping[str, Any]]
    captions: Sequence[_Caption]


@contextlib.contextmanager
def open_coco(
    origin: Path, images: Path | None = None, split_file: Path | None = None, listener: Listener = ignore
) -> Iterator[Corpus]:
    """Yield what a folder with COCO's captions, or one captions_*.json, holds.

    Photos lie in train2017/ and the like below `origin` or `images`; a caption file of which no photo is there is left
    out. With `split_file` images get its splits, those it does not name `unused`. Raises ChimeraError naming file and
    entry of whatever is broken.
    """
    paths = _find_files(must_exist(origin, _WHAT))
    split_of = _read_splits(split_file, listener) if split_file else None
    base = must_exist(images, "--images the folder that holds the photos") if images else None
    yield _gather(paths, base or (origin if origin.is_dir() else origin.parent), split_of, listener).finish(
        origin, licence_of("coco")
    )


def _gather(paths: Sequence[Path], base: Path, split_of: Mapping[int, str] | None, listener: Listener) -> Draft:
    """Return what the caption files say. What was read of them is given back to the memory before the pack is made."""
    draft = Draft(listener)
    seen: dict[int, str] = {}
    for path in paths:
        read = _read(path)
        folders = _photo_folders(read, base)
        if not folders and len(paths) > 1:
            listener(Note(f"{path.name}: none of its {len(read.images):,} photos is here; left out", "warning"))
            continue
        _add(draft, read, folders, split_of, seen)
    if split_of is not None:
        _tell_absent(split_of, seen, listener)
    return draft


# ---- where things lie -----------------------------------------------------------------------------------------------


def _find_files(origin: Path) -> list[Path]:
    """Return the caption files, training first. Raises UsageError where there is none, or those of two years."""
    if not origin.is_dir():
        return [origin]
    for folder in (origin, origin / "annotations", origin.resolve().parent / "annotations", *subfolders(origin)):
        paths = sorted(path for path in folder.glob("captions_*.json") if _NAME.fullmatch(path.name))
        if len({path.stem[-4:] for path in paths if path.stem[-4:].isdecimal()}) > 1:
            names = ", ".join(path.name for path in paths)
            raise UsageError(
                f"{folder} holds {names}: the years have the same photos in other splits",
                "move the files of the year you don't want elsewhere",
            )
        if paths:
            return paths
    raise UsageError(f"{origin} holds no captions_train*.json, nor does its folder annotations/", f"give {_WHAT}")


def _photo_folders(read: _Annotations, base: Path) -> list[Path]:
    names = [image["file_name"] for image in read.images]
    above = [base, base.resolve().parent] if base.name == "annotations" else [base]
    candidates = [Path(place, *inner) for place in above for inner in ((read.folder,), ("images", read.folder))]
    candidates += [folder for place in above for folder in (place, *subfolders(place))]
    return folders_with(candidates, names)


# ---- what they say --------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Annotations:
    name = _NAME.fullmatch(path.name)
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_compact)
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ChimeraError(f"{path} is not valid JSON: {error}", "it was cut off or edited; get it again") from error
    for key in ("images", "annotations"):
        if not isinstance(value, dict) or not isinstance(value.get(key), list) or not value[key]:
            raise ChimeraError(f"{path} has no list `{key}`", _HINT)
    for number, image in enumerate(value["images"]):
        if not isinstance(image, dict) or not isinstance(image.get("id"), int) or not image.get("file_name"):
            raise ChimeraError(f"{path}: images[{number}] has no `id` or no `file_name`", _HINT)
        check_inside(str(image["file_name"]), f"{path}: images[{number}]")
    for number, caption in enumerate(value["annotations"]):
        if not isinstance(caption, _Caption):
            raise ChimeraError(f"{path}: annotations[{number}] has no `image_id` or no `caption`", _HINT)
    split = (split_word(name[2]) if name else None) or ""
    return _Annotations(path, name[1] if name else "", split, value["images"], value["annotations"])


def _compact(pairs: Sequence[tuple[str, Any]]) -> Any:
    """Return an annotation as what is needed of it: as dictionaries the half million of COCO fill a third of a GB."""
    value = dict(pairs)
    if isinstance(value.get("caption"), str) and isinstance(value.get("image_id"), int):
        return _Caption(value["image_id"], value["caption"])
    return {key: value[key] for key in _KEPT if key in value}


def _add(
    draft: Draft, read: _Annotations, folders: Sequence[Path], split_of: Mapping[int, str] | None, seen: dict[int, str]
) -> None:
    """Add the photos of one file and their captions; `seen` gets every image id and the file that has it."""
    if not read.split and split_of is None:
        raise UsageError(
            f"the name of {read.path} says no split",
            "call it captions_train.json or captions_val.json, or --split-file",
        )
    numbers: dict[int, int] = {}
    for image in read.images:
        identity, file_name = image["id"], str(image["file_name"])
        if identity in seen:
            raise ChimeraError(f"{read.path}: the image {identity} is in {seen[identity]} already", _HINT)
        seen[identity] = read.path.name
        name = f"{read.folder}/{file_name}" if read.folder and "/" not in file_name else file_name
        found = locate(folders, file_name)
        if not isinstance(found, Photo):
            numbers[identity] = -1
            draft.skip(name, found)
            continue
        columns = {"coco_id": identity, "file_name": file_name}
        columns |= {key: image[key] for key in ("flickr_url", "license") if key in image}
        split = read.split if split_of is None else split_of.get(identity, UNUSED)
        numbers[identity] = draft.add_photo(name, split, found, columns)
    for position, caption in enumerate(read.captions):
        number = numbers.get(caption.image)
        where = f"{read.path.name}: annotations[{position}]"
        if number is None:
            draft.left_out.add("captions left out of images that the file does not name", where)
        elif number >= 0:
            draft.add_caption(number, caption.text, where)


def _read_splits(path: Path, listener: Listener) -> dict[int, str]:
    """Return the split of each image id in dataset_coco.json."""
    must_exist(path, "--split-file dataset_coco.json as published by Karpathy and Fei-Fei")
    try:
        entries = read_entries(path.read_bytes(), str(path))
    except OSError as error:
        raise cannot_read(path, error) from error
    split_of = {entry.columns["coco_id"]: entry.split for entry in entries if "coco_id" in entry.columns}
    if len(split_of) != len(entries):
        raise ChimeraError(f"{path} does not give every image a `cocoid` of its own", "take dataset_coco.json")
    listener(Note(f"splits come from {path.name}: train and restval are train, val is dev"))
    return split_of


def _tell_absent(split_of: Mapping[int, str], seen: Mapping[int, str], listener: Listener) -> None:
    absent, unnamed = len(split_of.keys() - seen.keys()), len(seen.keys() - split_of.keys())
    if absent:
        listener(Note(f"{absent:,} of {len(split_of):,} images of the split file are not here", "warning"))
    if unnamed:
        listener(Note(f"{unnamed:,} images are not in the split file: they are {UNUSED}", "warning"))
