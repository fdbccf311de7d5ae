"""`chimera data`: sources become packs, packs are described, verified and shown."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.data.pack import Fit, Pack, check_pack_name, list_packs, open_pack, verify_pack
from chimera_cli.data.pack_writer import SplitRule, write_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, ignore
from chimera_cli.runs import content_hash, read_json

if TYPE_CHECKING:
    from chimera_cli.data.sources.corpus import Corpus

_LARGEST_SIZE = 1024


@dataclass(frozen=True)
class PrepareResult:
    """The pack as it is now; `unchanged` where it was there already and nothing had to be done."""

    pack: Pack
    unchanged: bool


@dataclass(frozen=True)
class SourceOptions:
    """What only some sources take; None where nothing was said. Paths are of folders or files that must exist."""

    images: Path | None = None
    split_file: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    split_column: str | None = None
    split_seed: int | None = None
    dev_share: float | None = None
    test_share: float | None = None

    def given(self) -> list[str]:
        """Return the names of the options that were given."""
        return [option.name for option in fields(self) if getattr(self, option.name) is not None]


@dataclass(frozen=True)
class _Order:
    """What was asked for, with the defaults of the source filled in."""

    source: str
    data_dir: Path
    name: str
    origin: Path | None
    size: int
    fit: Fit
    max_bad: float
    max_pixels: int | None
    options: SourceOptions


def prepare(
    source: str,
    *,
    home: Path,
    origin: Path | None = None,
    name: str | None = None,
    size: int | None = None,
    fit: Fit = "crop",
    max_bad: float = 0.01,
    max_pixels: int | None = None,
    options: SourceOptions = SourceOptions(),
    listener: Listener = ignore,
) -> PrepareResult:
    """Return the pack `home/data/<name>` made from `source`; the same source and options change nothing.

    `size` in pixels defaults to 224 (`toy`: 96), `name` to that of the source, or for `table`, `karpathy` and
    `webdataset` of the file or folder. Without `origin` Flickr8k is downloaded. Images of more than `max_pixels` count
    as unreadable. Raises UsageError for words that can't be meant, ChimeraError for broken input and a disk that takes
    no files.
    """
    if source not in _SOURCES:
        raise UsageError(f"there is no source {source!r}", f"the sources are {', '.join(sorted(_SOURCES))}")
    known = _SOURCES[source]
    if not known.least <= (size or known.default) <= _LARGEST_SIZE:
        raise UsageError(
            f"--size {size} is not between {known.least} and {_LARGEST_SIZE}", f"{known.default} is the default"
        )
    if not 0 <= max_bad <= 1:
        raise UsageError(f"--max-bad {max_bad} is not between 0 and 1", "0.01 allows one unreadable image in a hundred")
    if max_pixels is not None and max_pixels < 1:
        raise UsageError(f"--max-pixels {max_pixels} allows no image", "leave it out for the usual limit")
    _check_options(source, origin, options)
    chosen = check_pack_name(name or _default_name(known, source, origin))
    order = _Order(source, home / "data", chosen, origin, size or known.default, fit, max_bad, max_pixels, options)
    _check_apart(order)
    before = _created_at(order.data_dir / order.name)
    pack = known.make(order, listener)
    return PrepareResult(pack, unchanged=before == pack.manifest["created_at"])


def info(home: Path, name: str | None = None, listener: Listener = ignore) -> dict[str, Any]:
    """Return `{"packs": [...]}`: the named pack, checked as on every use, or all packs by their manifests alone.

    A broken pack is told and left out of the list.
    """
    data_dir = home / "data"
    packs = list_packs(data_dir, listener) if name is None else [open_pack(data_dir, name)]
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
    facts = {"name": pack.name, "path": str(pack.path), "bytes": total} | {key: manifest[key] for key in told}
    reasons = Counter(entry["reason"] for entry in manifest["skipped"])
    # Packs made before duplicates were looked for don't have the key.
    return facts | {"skipped_reasons": dict(reasons.most_common()), "leakage": manifest.get("leakage")}


def _created_at(folder: Path) -> str | None:
    try:
        return str(read_json(folder / "manifest.json").get("created_at"))
    except ChimeraError:
        return None


# ---- what is typed --------------------------------------------------------------------------------------------------


def _check_options(source: str, origin: Path | None, options: SourceOptions) -> None:
    """Raise UsageError for an option that the source does not take, and for a missing --from."""
    known = _SOURCES[source]
    for option in options.given():
        if option not in known.options:
            takers = ", ".join(name for name, other in _SOURCES.items() if option in other.options)
            raise UsageError(f"{source} takes no --{option.replace('_', '-')}", f"it belongs to {takers}")
    if origin is None and known.needs:
        raise UsageError(f"{source} needs --from", f"give {known.needs}")


def _check_apart(order: _Order) -> None:
    """Raise UsageError where a source lies in the folder that the pack would replace."""
    target = (order.data_dir / order.name).resolve()
    for option, path in (
        ("--from", order.origin),
        ("--images", order.options.images),
        ("--split-file", order.options.split_file),
    ):
        if path is not None and path.expanduser().resolve().is_relative_to(target):
            raise UsageError(f"{option} {path} lies in {target}, where the pack goes", "choose another --name")


def _default_name(known: "_Source", source: str, origin: Path | None) -> str:
    """Return the source's name, or for sets of the user's own that of the file or folder, without what packs forbid."""
    if not known.named_by_origin or origin is None:
        return source
    place = origin if origin.exists() else origin.parent
    stem = place.resolve().name if place.is_dir() else place.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or source


def _rule(options: SourceOptions) -> SplitRule | None:
    """Return how splits are drawn where that was asked for in any of its options, None where it was not."""
    from chimera_cli.data.sources.corpus import DEFAULT_RULE

    asked = (options.split_seed, options.dev_share, options.test_share)
    usual = (DEFAULT_RULE.seed, DEFAULT_RULE.dev, DEFAULT_RULE.test)
    if all(value is None for value in asked):
        return None
    seed, dev, test = (ours if value is None else value for value, ours in zip(asked, usual, strict=True))
    return SplitRule(int(seed), dev, test)


# ---- sources --------------------------------------------------------------------------------------------------------


def _from_corpus(open_corpus: Callable[[_Order, Listener], AbstractContextManager["Corpus"]]) -> "_Make":
    """Return the function that makes a pack of what a source yields: the one road for all of them but `toy`."""

    def make(order: _Order, listener: Listener) -> Pack:
        from chimera_cli.data.images import MAX_PIXELS, decode_all

        max_pixels = order.max_pixels or MAX_PIXELS
        with open_corpus(order, listener) as corpus:
            _check_there(corpus, order.max_bad, listener)
            rule = corpus.split_rule
            drawn = [rule.seed, rule.dev, rule.test] if rule else None
            return write_pack(
                order.data_dir,
                name=order.name,
                source=order.source,
                images=decode_all(corpus.reads, order.size, order.fit, max_pixels=max_pixels),
                items=corpus.items,
                captions=corpus.captions,
                size=order.size,
                fit=order.fit,
                licence=corpus.licence,
                skipped=corpus.skipped,
                max_bad=order.max_bad,
                source_digest=content_hash([order.source, corpus.digest, order.size, order.fit, max_pixels, drawn]),
                split_rule=rule,
                listener=listener,
            )

    return make


def _check_there(corpus: "Corpus", max_bad: float, listener: Listener) -> None:
    """Raise ChimeraError where more images are absent than `max_bad` allows; tell of fewer."""
    absent, total = len(corpus.skipped), len(corpus.skipped) + len(corpus.items)
    if not absent:
        return
    first = f"first {corpus.skipped[0].source_file}: {corpus.skipped[0].reason}"
    if absent > max_bad * total:
        raise ChimeraError(
            f"{absent:,} of {total:,} images are not there, more than the {max_bad:.1%} allowed; {first}",
            "check the folder of the images, or allow a larger share with --max-bad",
        )
    listener(Note(f"{absent:,} of {total:,} images are not there and left out; {first}", "warning"))


@contextmanager
def _open_flickr8k(order: _Order, listener: Listener) -> Iterator["Corpus"]:
    from chimera_cli.data.sources import flickr8k

    origin = order.origin or _download_flickr8k(order.data_dir, listener)
    with flickr8k.open_flickr8k(origin, listener, official_counts=order.origin is None) as corpus:
        yield corpus


def _download_flickr8k(data_dir: Path, listener: Listener) -> Path:
    from chimera_cli.data.sources.download import download
    from chimera_cli.data.sources.flickr8k import DATASET_ARCHIVE_URL, TEXT_ARCHIVE_URL

    folder = data_dir / "downloads" / "flickr8k"
    for url in (TEXT_ARCHIVE_URL, DATASET_ARCHIVE_URL):
        download(url, folder / url.rpartition("/")[2], listener)
    return folder


def _open_coco(order: _Order, listener: Listener) -> AbstractContextManager["Corpus"]:
    from chimera_cli.data.sources.coco import open_coco

    return open_coco(_origin(order), order.options.images, order.options.split_file, listener)


def _open_karpathy(order: _Order, listener: Listener) -> AbstractContextManager["Corpus"]:
    from chimera_cli.data.sources.karpathy import open_karpathy

    return open_karpathy(_origin(order), order.options.images, listener)


def _open_table(order: _Order, listener: Listener) -> AbstractContextManager["Corpus"]:
    from chimera_cli.data.sources.table import Columns, open_table

    given = order.options
    columns = Columns(given.image_column, given.caption_column, given.split_column)
    return open_table(_origin(order), given.images, columns, listener, _rule(given))


def _open_shards(order: _Order, listener: Listener) -> AbstractContextManager["Corpus"]:
    from chimera_cli.data.sources.shards import open_shards

    return open_shards(str(_origin(order)), listener, _rule(order.options))


def _origin(order: _Order) -> Path:
    assert order.origin is not None
    return order.origin.expanduser()


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


_Make = Callable[[_Order, Listener], Pack]


@dataclass(frozen=True)
class _Source:
    """How a pack is made from a source: sides in pixels, what --from must be, and which further options it takes."""

    make: _Make
    needs: str = ""
    options: tuple[str, ...] = ()
    named_by_origin: bool = False
    least: int = 16
    default: int = 224


_DRAWN = ("split_seed", "dev_share", "test_share")
_COLUMNS = ("image_column", "caption_column", "split_column")
_SOURCES: Mapping[str, _Source] = {
    "flickr8k": _Source(_from_corpus(_open_flickr8k)),
    "coco": _Source(
        _from_corpus(_open_coco),
        "the folder with annotations/captions_train2017.json and train2017/, or a captions_*.json",
        ("images", "split_file"),
    ),
    "karpathy": _Source(
        _from_corpus(_open_karpathy), "a file such as dataset_flickr30k.json", ("images",), named_by_origin=True
    ),
    "table": _Source(
        _from_corpus(_open_table),
        "a .csv, .tsv, .jsonl or .parquet file",
        ("images", *_COLUMNS, *_DRAWN),
        named_by_origin=True,
    ),
    "webdataset": _Source(
        _from_corpus(_open_shards),
        "a folder with .tar files or a pattern such as 'shards/{00000..00099}.tar'",
        _DRAWN,
        named_by_origin=True,
    ),
    "toy": _Source(_toy, least=32, default=96),
}
