"""`chimera data`: sources become packs, packs are described, verified and shown."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chimera_cli.data.pack import Fit, Pack, check_pack_name, list_packs, open_pack, verify_pack, write_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, ignore
from chimera_cli.runs import content_hash, read_json

_LARGEST_SIZE = 1024


@dataclass(frozen=True)
class PrepareResult:
    """The pack as it is now; `unchanged` where it was there already and nothing had to be done."""

    pack: Pack
    unchanged: bool


@dataclass(frozen=True)
class _Order:
    """What was asked for, with the defaults of the source filled in."""

    data_dir: Path
    name: str
    origin: Path | None
    size: int
    fit: Fit
    max_bad: float


def prepare(
    source: str,
    *,
    home: Path,
    origin: Path | None = None,
    name: str | None = None,
    size: int | None = None,
    fit: Fit = "crop",
    max_bad: float = 0.01,
    listener: Listener = ignore,
) -> PrepareResult:
    """Return the pack `home/data/<name>` made from `source`; the same source and options change nothing.

    `size` in pixels defaults to 224 (`toy`: 96), `name` to the source's. Without `origin` Flickr8k is downloaded.
    Raises UsageError for words that can't be meant, ChimeraError for broken input and a disk that takes no files.
    """
    if source not in _SOURCES:
        raise UsageError(f"there is no source {source!r}", f"the sources are {', '.join(sorted(_SOURCES))}")
    make, least, default = _SOURCES[source]
    if not least <= (size or default) <= _LARGEST_SIZE:
        raise UsageError(f"--size {size} is not between {least} and {_LARGEST_SIZE}", f"{default} is the default")
    if not 0 <= max_bad <= 1:
        raise UsageError(f"--max-bad {max_bad} is not between 0 and 1", "0.01 allows one unreadable image in a hundred")
    order = _Order(home / "data", check_pack_name(name or source), origin, size or default, fit, max_bad)
    before = _created_at(order.data_dir / order.name)
    pack = make(order, listener)
    return PrepareResult(pack, unchanged=before == pack.manifest["created_at"])


def info(home: Path, name: str | None = None) -> dict[str, Any]:
    """Return `{"packs": [...]}`: the named pack, checked as on every use, or all packs by their manifests alone."""
    data_dir = home / "data"
    packs = list_packs(data_dir) if name is None else [open_pack(data_dir, name)]
    return {"packs": [describe(pack) for pack in packs]}


def verify(home: Path, name: str, listener: Listener = ignore) -> dict[str, Any]:
    """Return `{"name", "path", "fingerprint", "problems"}` after reading every byte of the pack; no problems: whole."""
    pack = open_pack(home / "data", name, check=False)
    problems = verify_pack(pack, listener)
    return {"name": name, "path": str(pack.path), "fingerprint": pack.fingerprint, "problems": problems}


def preview(home: Path, name: str, path: Path) -> Path:
    """Write a contact sheet of the pack as an image file and return its path."""
    from chimera_cli.data.preview import contact_sheet

    return contact_sheet(open_pack(home / "data", name), path)


def describe(pack: Pack) -> dict[str, Any]:
    """Return what a person wants to know of a pack, from its manifest alone."""
    manifest = pack.manifest
    told = ["source", "created_at", "size", "fit", "image_count", "caption_count", "splits"]
    told += ["captions_per_image", "caption_words", "columns", "skipped", "licence", "fingerprint"]
    total = sum(int(facts["bytes"]) for facts in manifest["files"].values())
    return {"name": pack.name, "path": str(pack.path), "bytes": total} | {key: manifest[key] for key in told}


def _created_at(folder: Path) -> str | None:
    try:
        return str(read_json(folder / "manifest.json").get("created_at"))
    except ChimeraError:
        return None


def _flickr8k(order: _Order, listener: Listener) -> Pack:
    from chimera_cli.data.images import decode_all
    from chimera_cli.data.sources import flickr8k

    origin = order.origin or _download_flickr8k(order.data_dir, listener)
    with flickr8k.open_flickr8k(origin, listener, official_counts=order.origin is None) as corpus:
        return write_pack(
            order.data_dir,
            name=order.name,
            source="flickr8k",
            images=decode_all([file.read for file in corpus.files], order.size, order.fit),
            items=corpus.items,
            captions=corpus.captions,
            size=order.size,
            fit=order.fit,
            licence=flickr8k.LICENCE,
            max_bad=order.max_bad,
            source_digest=content_hash(["flickr8k", corpus.digest, order.size, order.fit]),
            listener=listener,
        )


def _download_flickr8k(data_dir: Path, listener: Listener) -> Path:
    from chimera_cli.data.sources.download import download
    from chimera_cli.data.sources.flickr8k import DATASET_ARCHIVE_URL, TEXT_ARCHIVE_URL

    folder = data_dir / "downloads" / "flickr8k"
    for url in (TEXT_ARCHIVE_URL, DATASET_ARCHIVE_URL):
        download(url, folder / url.rpartition("/")[2], listener)
    return folder


def _toy(order: _Order, listener: Listener) -> Pack:
    from chimera_cli.data.sources import toy

    if order.origin is not None:
        raise UsageError("toy is made by chimera and takes no --from", "leave --from out")
    scenes = toy.make_toy()
    return write_pack(
        order.data_dir,
        name=order.name,
        source="toy",
        images=toy.draw_all(scenes, order.size),
        items=scenes.items,
        captions=scenes.captions,
        size=order.size,
        licence=toy.LICENCE,
        source_digest=content_hash(["toy", toy.GENERATOR_VERSION, toy.COUNTS, order.size]),
        listener=listener,
    )


# The function that makes the pack, the least side of its images in pixels, and the default.
_SOURCES: dict[str, tuple[Callable[[_Order, Listener], Pack], int, int]] = {
    "flickr8k": (_flickr8k, 16, 224),
    "toy": (_toy, 32, 96),
}
