"""Tables of images: CSV, TSV, JSON lines and Parquet, with a path or the image itself in each row.

Several rows of one path are several captions of that image, and so is a list in the caption column. A folder may hold
several tables of one kind, as Hugging Face writes them (`train-00000-of-00002.parquet`, `test-...`).
"""

import contextlib
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

from chimera_cli.data.pack import UNUSED
from chimera_cli.data.pack_writer import SplitRule
from chimera_cli.data.sources.corpus import (
    DEFAULT_RULE,
    MOST_COLUMNS,
    NO_LICENCE,
    Corpus,
    Draft,
    Photo,
    find_photo,
    must_exist,
    printable,
    split_of_name,
    split_word,
    splits_by_name,
    tell_rule,
)
from chimera_cli.data.sources.parquet import read_parquet
from chimera_cli.data.sources.rows import Table, read_csv, read_json_lines
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, ignore

IMAGE_COLUMNS = (
    "image", "image_path", "img_path", "filepath", "file_path", "file", "path", "filename", "file_name", "image_name",
    "image_file", "img",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences", "description", "comment")
SPLIT_COLUMNS = ("split",)

_READERS: dict[str, Callable[[Path], Table]] = {
    **dict.fromkeys((".csv", ".tsv", ".tab"), read_csv),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), read_json_lines),
    **dict.fromkeys((".parquet", ".pq"), read_parquet),
}
_WHAT = "--from a .csv, .tsv, .jsonl or .parquet file, or a folder with such files of one kind"
_HINT = "correct the row, or take it out"
# No leading zeros: an article number 0042 is a word.
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Columns:
    """The columns that hold images, captions and splits; None: found by their names."""

    image: str | None = None
    caption: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class _Plan:
    """How one table is read: its columns, and the split of all its rows where it has no column for that."""

    table: Table
    image: str
    caption: str | None
    split: str | None
    whole: str
    further: tuple[str, ...]
    beyond: int  # how many columns more there are than a pack keeps
    base: Path


@contextlib.contextmanager
def open_table(
    origin: Path,
    images: Path | None = None,
    columns: Columns | None = None,
    listener: Listener = ignore,
    rule: SplitRule | None = None,
) -> Iterator[Corpus]:
    """Yield what a table, or the tables in a folder, name; relative paths start from `images` or the table's folder.

    Splits come from a column, else from the names of several tables, else from the images' content; a `rule` given is
    followed in any case. Raises UsageError for a column that is not there, ChimeraError naming the row of whatever is
    broken: a line, an unknown split, an image in two splits.
    """
    columns = columns or Columns()
    if rule and columns.split:
        raise UsageError("--split-column and a drawn split exclude each other", "leave one of them out")
    paths = _find_files(must_exist(origin, _WHAT))
    base = must_exist(images, "--images the folder that the paths start from") if images else None
    by_name = cache(lambda: dict(zip(paths, splits_by_name(paths) or repeat(""), strict=False)))
    draft = Draft(listener)
    known: dict[str, int] = {}
    untyped, drawn = False, False
    for path in paths:
        table = _READERS[path.suffix.lower()](path)
        plan = _plan(path, table, columns, base or path.parent, by_name, rule)
        drawn = drawn or not (plan.split or plan.whole)
        untyped = untyped or not table.typed
        _tell_plan(path, plan, listener)
        for position, (where, values) in enumerate(table.rows):
            _add_row(draft, plan, position, where, values, known)
    if untyped:
        _give_types(draft.columns)
    if drawn:
        rule = rule or DEFAULT_RULE
        tell_rule(rule, "no split column is used", listener)
    yield draft.finish(origin, NO_LICENCE, rule if drawn else None)


# ---- which files and columns ----------------------------------------------------------------------------------------


def _find_files(origin: Path) -> list[Path]:
    """Return the tables: `origin` itself, or those of one kind in it or one level below. Raises UsageError."""
    if not origin.is_dir():
        if origin.suffix.lower() not in _READERS:
            raise UsageError(f"{origin.name} is no kind of table that is read", f"give {_WHAT}; unpack it before")
        return [origin]
    for pattern in ("*", "*/*"):
        found = sorted(path for path in origin.glob(pattern) if path.is_file() and path.suffix.lower() in _READERS)
        found = [path for path in found if not path.name.startswith(".")]
        kinds = {_READERS[path.suffix.lower()] for path in found}
        if len(kinds) == 1 and (len(found) == 1 or kinds == {read_parquet} or _name_splits(found)):
            return found
        if found:
            names = ", ".join(path.name for path in found[:4]) + (" …" if len(found) > 4 else "")
            raise UsageError(f"{origin} holds {names}: it is not clear which to read", "give --from one of them")
    raise UsageError(f"{origin} holds no table", f"give {_WHAT}")


def _name_splits(paths: Sequence[Path]) -> bool:
    splits = {split_of_name(path) for path in paths}
    return None not in splits and len(splits) > 1


def _plan(
    path: Path,
    table: Table,
    columns: Columns,
    base: Path,
    by_name: Callable[[], Mapping[Path, str]],
    rule: SplitRule | None,
) -> _Plan:
    """Return how a table is read; `by_name` is asked only where neither a column nor a rule says the splits."""
    image = _pick(path, table, columns.image, IMAGE_COLUMNS)
    if image is None and len(table.embedded) == 1:
        image = next(iter(table.embedded))
    if image is None:
        raise UsageError(
            f"{path} has no column of a name known for images", f"give --image-column one of {_some(table.columns)}"
        )
    if image in table.dropped:
        raise UsageError(f"{path}: the column {image!r} holds no paths, and images only deeper inside", f"give {_WHAT}")
    caption = _pick(path, table, columns.caption, CAPTION_COLUMNS)
    split = None if rule else _pick(path, table, columns.split, SPLIT_COLUMNS)
    used = {image, caption, split, *table.dropped, *table.embedded}
    further = [name for name in table.columns if name not in used]
    # Here already: rows that all have keys of their own would grow with the square of their number.
    kept = further if len(further) <= MOST_COLUMNS else sorted(further)[:MOST_COLUMNS]
    whole = "" if split or rule else by_name()[path]
    return _Plan(table, image, caption, split, whole, tuple(kept), len(further) - len(kept), base)


def _pick(path: Path, table: Table, wanted: str | None, usual: Sequence[str]) -> str | None:
    """Return the wanted column, else the first of the usual names that there is (in any case), else None."""
    if wanted is not None:
        if wanted not in table.columns:
            raise UsageError(f"{path} has no column {wanted!r}", f"its columns are {_some(table.columns)}")
        return wanted
    own = {name.lower(): name for name in reversed(table.columns)}
    return next((own[name] for name in usual if name in own), None)


def _tell_plan(path: Path, plan: _Plan, listener: Listener) -> None:
    captions = f"captions from {plan.caption!r}" if plan.caption else "no captions"
    split = f"splits from {plan.split!r}" if plan.split else f"all of it {plan.whole}" if plan.whole else "no splits"
    kept = f"; kept as columns: {_some(plan.further)}" if plan.further else ""
    listener(Note(f"{path.name}: images from {plan.image!r}, {captions}, {split}{kept}"))
    if plan.beyond:
        listener(Note(f"{path.name}: columns left out beyond the first {MOST_COLUMNS}: {plan.beyond:,}", "warning"))
    unused = [name for name in (*plan.table.dropped, *plan.table.embedded) if name != plan.image]
    if unused:
        listener(Note(f"{path.name}: columns with bytes are left out: {_some(unused)}", "warning"))


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:12])) + (f" and {len(names) - 12:,} more" if len(names) > 12 else "")


# ---- rows -----------------------------------------------------------------------------------------------------------


def _add_row(
    draft: Draft, plan: _Plan, position: int, where: str, values: Mapping[str, Any], known: dict[str, int]
) -> None:
    """Add a row's image, unless an earlier row had it, and its captions. -1 in `known` is an image that is absent."""
    cell = values.get(plan.image)
    if cell is not None and not isinstance(cell, str):
        raise ChimeraError(f"{where}: {plan.image!r} holds no path but {type(cell).__name__}", _HINT)
    embedded = plan.table.embedded.get(plan.image)
    row = where.rpartition("/")[2]
    if embedded is None and not (cell and cell.strip()):
        draft.skip(row, "the row names no image")
        return
    name = _name(cell, where) if cell else ""
    split = _split(plan, where, values)
    columns = {column: values.get(column) for column in plan.further}
    if embedded is not None:
        photo = Photo(embedded(position, f"{plan.base / name}" if name else None), plan.table.stamp)
        name = name if name and name not in known else row
        known[name] = draft.add_photo(name, split, photo, columns)
    elif name in known:
        _compare(draft, known[name], split, columns, where)
    else:
        found = find_photo(f"{plan.base / name}")
        if isinstance(found, Photo):
            known[name] = draft.add_photo(name, split, found, columns)
        else:
            known[name] = -1
            draft.skip(name, found)
    if known[name] >= 0 and plan.caption:
        for text in _texts(values.get(plan.caption), plan.caption, where):
            draft.add_caption(known[name], text, row)


def _name(cell: str, where: str) -> str:
    """Return a path in one spelling. Anything may be named, `..` too: the table is the user's, nothing is written."""
    if re.match(r"[a-z][a-z0-9+.-]+://", cell.strip(), re.IGNORECASE):
        raise ChimeraError(
            f"{where}: {cell.strip()[:80]!r} is an address, and nothing is downloaded",
            "fetch the images with img2dataset and prepare them with the source webdataset",
        )
    return posixpath.normpath(cell.strip())


def _split(plan: _Plan, where: str, values: Mapping[str, Any]) -> str:
    """Return the split of a row, `unused` where its cell is empty, "" where splits are drawn."""
    if plan.split is None:
        return plan.whole
    cell = values.get(plan.split)
    if cell is None or (isinstance(cell, str) and cell.strip() in ("", UNUSED)):
        return UNUSED
    split = split_word(cell) if isinstance(cell, str) else None
    if split is None:
        raise ChimeraError(
            f"{where}: {cell!r} in the column {plan.split!r} is no split", "known are train, dev (val) and test"
        )
    return split


def _texts(cell: Any, column: str, where: str) -> Sequence[str]:
    """Return the captions in a cell: none, one, or a list of them."""
    texts = cell if isinstance(cell, list) else [] if cell is None else [cell]
    for text in texts:
        if not isinstance(text, str):
            raise ChimeraError(f"{where}: {column!r} holds {type(text).__name__} and no text", _HINT)
    return texts


def _compare(draft: Draft, number: int, split: str, columns: Mapping[str, Any], where: str) -> None:
    """Hold a further row of an image against its first one, whose columns are kept."""
    if number < 0:
        return
    if draft.splits[number] != split:
        raise ChimeraError(
            f"{where}: {draft.names[number]} is in {split} here and in {draft.splits[number]} above", _HINT
        )
    first = draft.columns[number]
    for column, value in columns.items():
        if first.get(column) != value:
            draft.left_out.add(f"values of {column!r} left out that differ from those of the image's first row", where)


def _give_types(rows: Sequence[dict[str, Any]]) -> None:
    """Turn columns of text into numbers, in place, where every value is one; an empty cell becomes None."""
    for name in sorted({name for row in rows for name in row}):
        cells = {row[name] for row in rows if row.get(name)}
        kind = _kind_of(cells)
        for row in rows:
            if name in row:
                row[name] = kind(row[name]) if row[name] else None


def _kind_of(cells: set[str]) -> Callable[[str], Any]:
    for pattern, kind in ((_INTEGER, int), (_NUMBER, float)):
        if cells and all(pattern.fullmatch(cell) for cell in cells):
            return kind
    return str
