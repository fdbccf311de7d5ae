"""Flickr8k (Hodosh, Young and Hockenmaier, JAIR 47, 2013) in its official layout and in that of Kaggle.

Official: `Flicker8k_Dataset/` with the photos, `Flickr8k_text/` with `Flickr8k.token.txt` and three split lists.
Kaggle: `Images/` and `captions.txt`, a CSV; the official split lists have to be put beside it, or Karpathy's
`dataset_flickr8k.json`, which has the same splits and may stand in for the captions as well.
"""

import contextlib
import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chimera_cli.data.captions import tidy
from chimera_cli.data.pack import SPLITS, UNUSED, Caption, Item
from chimera_cli.data.sources.archives import SourceFile, folder_files, open_source, open_zip_files
from chimera_cli.data.sources.corpus import Corpus
from chimera_cli.data.sources.karpathy import Entry, read_entries
from chimera_cli.data.sources.licences import licence_of
from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener, Note, ignore
from chimera_cli.runs import content_hash

LISTS = {split: f"Flickr_8k.{split}Images.txt" for split in SPLITS}
TOKENS = "Flickr8k.token.txt"
KAGGLE_CAPTIONS = "captions.txt"
KARPATHY = "dataset_flickr8k.json"
TEXT_FOLDER = "Flickr8k_text"
TEXT_ARCHIVE_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_text.zip"
DATASET_ARCHIVE_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_Dataset.zip"

# The official caption file names one image that was never in the archive; its five captions are in no split.
GHOST = "2258277193_586949ec62.jpg.1"
OFFICIAL_COUNTS = {"caption lines": 40_460, "usable images": 8_091, "train": 6_000, "dev": 1_000, "test": 1_000}

_TEXTS = frozenset((TOKENS, KAGGLE_CAPTIONS, KARPATHY, *LISTS.values()))
_IMAGE_FOLDERS = ("flicker8k_dataset", "flickr8k_dataset", "images", "flickr8k_images")
_SUFFIXES = (".jpg", ".jpeg", ".png")
_LARGEST_TEXT_BYTES = 256 << 20  # the official texts have 3 MB, Karpathy's file 7


@dataclass(frozen=True)
class _Layout:
    """Where things lie: `entries` of Karpathy's file stand in for split lists that are not there."""

    images: Mapping[str, SourceFile]
    captions: SourceFile
    lists: Mapping[str, SourceFile]
    entries: Sequence[Entry] = ()


@dataclass(frozen=True)
class _CaptionLine:
    image: str
    index: int
    text: str
    line: int


@contextlib.contextmanager
def open_flickr8k(origin: Path, listener: Listener = ignore, *, official_counts: bool = False) -> Iterator[Corpus]:
    """Yield what `origin` (a folder, a zip file, or a folder with zip files) holds; archives stay open inside.

    The texts may lie in `origin`, beside or above it. Counts other than the official ones are noted; with
    `official_counts` (a download) they are an error. Raises ChimeraError naming file and line of whatever is broken:
    a missing list, a malformed caption, a caption or list entry without its image, an image in two splits.
    """
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(open_source(origin, _complete))
        if not _complete(files):
            files = [*files, *_companions(origin, stack)]
        layout = _find_layout(origin, files, listener)
        corpus = _read(layout, listener)
        _check_counts(corpus.counts, listener, official_counts)
        yield corpus


# ---- where things lie -----------------------------------------------------------------------------------------------


def _complete(files: Sequence[SourceFile]) -> bool:
    names = {file.path.name for file in files}
    texts = bool(names & {TOKENS, KAGGLE_CAPTIONS}) and set(LISTS.values()) <= names
    return bool(_find_images(files)) and (texts or KARPATHY in names)


def _companions(origin: Path, stack: contextlib.ExitStack) -> list[SourceFile]:
    """Return the text files beside and above `origin`: loose, in Flickr8k_text/, or in its archive."""
    above = origin.resolve().parent
    files = folder_files(above, depth=0)
    if (above / TEXT_FOLDER).is_dir():
        files += folder_files(above / TEXT_FOLDER, depth=0)
    if (above / f"{TEXT_FOLDER}.zip").is_file():
        files += open_zip_files(above / f"{TEXT_FOLDER}.zip", stack)
    return [file for file in files if file.path.name in _TEXTS]


def _find_images(files: Sequence[SourceFile]) -> dict[str, SourceFile]:
    """Return the photos by file name: those in the first folder of a known name, else the loose ones."""
    folders: dict[str, dict[str, SourceFile]] = {}
    for file in files:
        if file.path.suffix.lower() in _SUFFIXES:
            folder = file.label.removesuffix(file.path.name)
            folders.setdefault(folder, {})[file.path.name] = file
    known = [
        photos for photos in folders.values() if next(iter(photos.values())).path.parent.name.lower() in _IMAGE_FOLDERS
    ]
    loose = [photos for photos in folders.values() if len(next(iter(photos.values())).path.parts) == 1]
    return next(iter(known + loose), {})


def _find_layout(origin: Path, files: Sequence[SourceFile], listener: Listener) -> _Layout:
    images = _find_images(files)
    if not images:
        raise ChimeraError(
            f"{origin} holds no photos of Flickr8k",
            "they are looked for in Flicker8k_Dataset/, Flickr8k_Dataset/ or Images/, unpacked or zipped",
        )
    by_name: dict[str, SourceFile] = {}
    for file in sorted(files, key=lambda file: len(file.path.parts)):
        by_name.setdefault(file.path.name, file)
    captions = by_name.get(TOKENS) or by_name.get(KAGGLE_CAPTIONS) or by_name.get(KARPATHY)
    if captions is None:
        raise ChimeraError(
            f"{origin} holds no captions of Flickr8k: neither {TEXT_FOLDER}/{TOKENS} nor {KAGGLE_CAPTIONS}",
            f"unpack {TEXT_ARCHIVE_URL} beside the photos",
        )
    missing = [name for name in LISTS.values() if name not in by_name]
    if missing and KARPATHY in by_name:
        listener(Note(f"the official split lists are not there: splits come from {KARPATHY}, which has the same"))
        return _Layout(images, captions, {}, read_entries(_content(by_name[KARPATHY]), by_name[KARPATHY].label))
    if missing:
        raise ChimeraError(
            f"{origin} lacks the official split lists {', '.join(missing)}",
            f"take them from {TEXT_ARCHIVE_URL} and put them (or {KARPATHY}) beside {captions.path.name}",
        )
    return _Layout(images, captions, {split: by_name[name] for split, name in LISTS.items()})


# ---- what they say --------------------------------------------------------------------------------------------------


def _read(layout: _Layout, listener: Listener) -> Corpus:
    lines = _PARSERS[layout.captions.path.name](layout.captions)
    known = _known_captions(lines, layout, listener)
    split_of = _read_lists(layout, set(known)) | _entry_splits(layout, set(known))
    strays = len(layout.images.keys() - known.keys())
    if strays:
        listener(Note(f"{strays:,} images have no caption in {layout.captions.label} and are left out", "warning"))
    order = {split: position for position, split in enumerate((*SPLITS, UNUSED))}
    names = sorted(known, key=lambda name: (order[split_of.get(name, UNUSED)], name))
    items = tuple(Item(name, split_of.get(name, UNUSED)) for name in names)
    captions = tuple(
        Caption(position, line.index, line.text) for position, name in enumerate(names) for line in known[name]
    )
    files = [layout.images[name] for name in names]
    counts = {"caption lines": len(lines), "usable images": len(names)}
    counts |= {split: sum(item.split == split for item in items) for split in SPLITS}
    photos = [(file.path.name, file.size_bytes, file.stamp) for file in files]
    rows = [(item.source_file, item.split) for item in items]
    digest = content_hash([photos, rows, [(c.image, c.index, c.text) for c in captions]])
    reads = tuple(file.read for file in files)
    return Corpus(reads, items, captions, digest, licence_of("flickr8k"), counts=counts)


def _known_captions(
    lines: Sequence[_CaptionLine], layout: _Layout, listener: Listener
) -> dict[str, list[_CaptionLine]]:
    """Return the caption lines by image, without those of the one image that is known to be absent."""
    known: dict[str, list[_CaptionLine]] = {}
    seen: set[tuple[str, int]] = set()
    ghosts = 0
    for line in lines:
        if (line.image, line.index) in seen:
            raise _broken(layout.captions, line.line, f"caption {line.index} of {line.image} is there twice")
        seen.add((line.image, line.index))
        if line.image in layout.images:
            known.setdefault(line.image, []).append(line)
        elif line.image == GHOST:
            ghosts += 1
        else:
            raise _broken(layout.captions, line.line, f"there is no image {line.image}")
    if ghosts:
        listener(Note(f"{ghosts} captions of {GHOST}, which the corpus names but does not hold, are left out"))
    return known


def _read_lists(layout: _Layout, captioned: set[str]) -> dict[str, str]:
    """Return the split of every image that a list names."""
    split_of: dict[str, str] = {}
    for split, file in layout.lists.items():
        for number, line in _lines(file):
            name = line.strip()
            if not name:
                continue
            if name not in layout.images:
                raise _broken(file, number, f"there is no image {name}")
            if name not in captioned:
                raise _broken(file, number, f"{name} has no caption in {layout.captions.path.name}")
            if name in split_of:
                raise _broken(file, number, f"{name} is in the list of {split_of[name]} already")
            split_of[name] = split
        if split not in split_of.values():
            raise ChimeraError(f"{file.label} names no image", "take the official list")
    return split_of


def _entry_splits(layout: _Layout, captioned: set[str]) -> dict[str, str]:
    """Return the split of every image by the entries that stand in for the lists."""
    for entry in layout.entries:
        if entry.filename not in captioned:
            what = "has no caption" if entry.filename in layout.images else "is not there"
            raise ChimeraError(f"{entry.where}: the image {entry.filename} {what}", "take the file as published")
    return {entry.filename: entry.split for entry in layout.entries}


def _parse_tokens(file: SourceFile) -> list[_CaptionLine]:
    """Return the lines of the official caption file: `image.jpg#2<TAB>text`."""
    rows = []
    for number, line in _lines(file):
        if not line.strip():
            continue
        key, tab, text = line.partition("\t")
        image, _, index = key.rpartition("#")
        if not tab or not image or not index.isdecimal():
            raise _broken(file, number, "expected IMAGE#NUMBER, a tab and the caption")
        rows.append(_CaptionLine(image, int(index), _caption(file, number, text), number))
    return rows


def _parse_kaggle(file: SourceFile) -> list[_CaptionLine]:
    """Return the lines of Kaggle's CSV (`image,caption` with that header), captions numbered as they come."""
    rows: list[_CaptionLine] = []
    count: dict[str, int] = {}
    for number, line in _lines(file):
        if not line.strip() or (number == 1 and tidy(line) == "image,caption"):
            continue
        try:
            fields = next(csv.reader([line], strict=True))
        except csv.Error:
            fields = []
        if len(fields) != 2 or not fields[0]:
            raise _broken(file, number, "expected IMAGE,CAPTION with the caption quoted where it holds a comma")
        image = fields[0].strip()
        rows.append(_CaptionLine(image, count.get(image, 0), _caption(file, number, fields[1]), number))
        count[image] = count.get(image, 0) + 1
    return rows


def _parse_karpathy(file: SourceFile) -> list[_CaptionLine]:
    """Return the captions of Karpathy's file; the number of an entry stands for the line."""
    return [
        _CaptionLine(entry.filename, index, _caption(file, number, text), number)
        for number, entry in enumerate(read_entries(_content(file), file.label), 1)
        for index, text in enumerate(entry.sentences)
    ]


_PARSERS = {TOKENS: _parse_tokens, KAGGLE_CAPTIONS: _parse_kaggle, KARPATHY: _parse_karpathy}


def _caption(file: SourceFile, number: int, text: str) -> str:
    clean = tidy(text)
    if not clean:
        raise _broken(file, number, "the caption is empty")
    return clean


def _lines(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a UTF-8 text; line breaks are \\n and \\r\\n alone, as every editor counts them."""
    for number, line in enumerate(_content(file).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            yield number, line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise _broken(file, number, "the line is not UTF-8") from error


def _content(file: SourceFile) -> bytes:
    if file.size_bytes > _LARGEST_TEXT_BYTES:
        raise ChimeraError(f"{file.label} has {file.size_bytes / 1e6:,.0f} MB, far too much", "take the official file")
    try:
        return file.read()
    except OSError as error:
        raise ChimeraError(
            f"{file.label} can't be read: {error.strerror or error}", "check the file's permissions, or get it again"
        ) from error


def _broken(file: SourceFile, number: int, what: str) -> ChimeraError:
    return ChimeraError(f"{file.label}:{number}: {what}", "correct the line, or take the official file")


def _check_counts(counts: Mapping[str, int], listener: Listener, required: bool) -> None:
    """Compare with the official counts, or with those of Kaggle's and of Karpathy's file.

    Kaggle's leaves out the captions of the image that does not exist, Karpathy's those of images in no split as well.
    """
    official = dict(OFFICIAL_COUNTS)
    if counts["caption lines"] == official["caption lines"] - 5:
        official["caption lines"] -= 5
    in_splits = sum(official[split] for split in SPLITS)
    if (counts["caption lines"], counts["usable images"]) == (5 * in_splits, in_splits):
        official |= {"caption lines": 5 * in_splits, "usable images": in_splits}
    other = [
        f"{counts[what]:,} {what} (official: {number:,})" for what, number in official.items() if counts[what] != number
    ]
    if not other:
        return
    message = f"this is not the whole of Flickr8k: {', '.join(other)}"
    if required:
        raise ChimeraError(message, "delete data/downloads and prepare again, or give --from")
    listener(Note(f"{message}; its figures compare with nobody else's", "warning"))
