"""The rows of a table file, one after the other: CSV, TSV and JSON lines; Parquet is in `parquet`."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from chimera_cli.data.sources.corpus import Read, cannot_read, text_lines
from chimera_cli.errors import ChimeraError, UsageError

Row = tuple[str, Mapping[str, Any]]  # where it stands (`data.csv:17`) and its values by column
# From a row's number (from 0) and the path of a file that stands in for an empty cell to what reads the image.
Embedded = Callable[[int, str | None], Read]

_SEPARATORS = (",", "\t", ";", "|")
_LONGEST_FIELD = 1 << 30  # characters; the csv module's own limit would end at the first caption of 128 KiB
_HINT = "correct the line, or take it out"


@dataclass(frozen=True)
class Table:
    """A table being read: its columns, and its rows, which can be read once.

    `embedded` has the columns that hold images; their cells are paths or None in the rows. `dropped` are columns that
    can't be kept; `typed` says whether values have types (all that a CSV holds is text).
    """

    columns: Sequence[str]
    rows: Iterator[Row]
    typed: bool = True
    embedded: Mapping[str, Embedded] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    stamp: tuple[int, int] = (0, 0)


def read_csv(path: Path) -> Table:
    """Return the table in a CSV or TSV file with a header. The separator is the one most frequent in the header."""
    records = _records(path)
    _, header = next(records, (0, []))
    columns = [name.strip() or f"column_{number}" for number, name in enumerate(header, 1)]
    if not columns:
        raise ChimeraError(f"{path} is empty", "a table begins with the names of its columns")
    for name in columns:
        if columns.count(name) > 1:
            raise ChimeraError(f"{path}:1: the column {name!r} is there twice", "rename one of them")

    def rows() -> Iterator[Row]:
        for line, record in records:
            if len(record) != len(columns):
                raise ChimeraError(
                    f"{path}:{line}: {len(record)} fields, the header has {len(columns)}",
                    "quote fields that hold the separator, or correct the line",
                )
            yield f"{path}:{line}", dict(zip(columns, record, strict=True))

    return Table(columns, rows(), typed=False)


def read_json_lines(path: Path) -> Table:
    """Return the table in a file with one JSON object per line; its columns are the keys of all of them."""
    # Read twice: captions that begin at row 1,000 are captions, and to keep all rows would fill the memory.
    columns = dict.fromkeys(name for _, values in _objects(path) for name in values)
    return Table(list(columns), _objects(path))


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, fields) of the records that are not empty."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        lines = _lines(path)
        _, first = next(lines, (0, ""))
        reader = csv.reader(chain([first], (line for _, line in lines)), delimiter=_separator(path, first), strict=True)
        line = 1
        try:
            for record in reader:
                if record:
                    yield line, record
                line = reader.line_num + 1
        except csv.Error as error:
            raise ChimeraError(f"{path}:{line}: {error}", _HINT) from error
    finally:
        csv.field_size_limit(before)


def _separator(path: Path, header: str) -> str:
    if path.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    return max(_SEPARATORS, key=header.count)


def _objects(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise UsageError(
                f"{path} is one JSON list; a table has one object per line", f"jq -c '.[]' {path.name} > table.jsonl"
            )
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ChimeraError(f"{path}:{number}: not valid JSON: {error}", _HINT) from error
        if not isinstance(value, dict):
            raise ChimeraError(f"{path}:{number}: not a JSON object", _HINT)
        yield f"{path}:{number}", value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            yield from text_lines(file, str(path), "save the table as UTF-8")
    except OSError as error:
        raise cannot_read(path, error) from error
