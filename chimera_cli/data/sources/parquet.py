"""Tables in Parquet, with images in a column as Hugging Face writes them (`struct<bytes, path>`) or as plain bytes.

Photos are read in the order of the rows, a few at a time: a row group of some gigabytes never lies in memory whole.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

from chimera_cli.data.sources.corpus import Read, cannot_read, read_file
from chimera_cli.data.sources.rows import Row, Table
from chimera_cli.errors import ChimeraError

_ROWS = 4096  # per batch without images
_PHOTOS = 16  # per batch of images
_FAR = 1024  # rows; a jump further on than this leaves out the row groups between


@dataclass(slots=True)
class _Cursor:
    """A place in a column of images: rows before `position` that nobody has asked for yet wait in `pending`."""

    path: str
    column: str
    starts: list[int]  # the first row of each row group
    lock: threading.Lock = field(default_factory=threading.Lock)
    batches: Iterator[list[bytes | None]] | None = None
    position: int = 0
    pending: dict[int, bytes | None] = field(default_factory=dict)


def read_parquet(path: Path) -> Table:
    """Return the table in a Parquet file. Columns with bytes are `embedded` images or, nested deeper, dropped."""
    import pyarrow as pa

    file = _open(path)
    try:
        schema, metadata = file.schema_arrow, file.metadata
        kinds = {field.name: _kind(field.type) for field in schema}
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    except (pa.ArrowException, ValueError) as error:
        raise _broken(path, error) from error
    finally:
        file.close()
    starts = [0, *accumulate(sizes)][:-1]
    cells = {"binary": "{}", "struct": "{}.bytes"}
    embedded = {
        name: partial(_reader, _Cursor(str(path), cells[kind].format(name), starts))
        for name, kind in kinds.items()
        if kind in cells
    }
    wanted = {"plain": "{}", "struct": "{}.path"}
    read = {name: wanted[kind].format(name) for name, kind in kinds.items() if kind in wanted}
    dropped = [name for name, kind in kinds.items() if kind == "bytes inside"]
    stat = path.stat()
    return Table(list(kinds), _rows(path, read), True, embedded, dropped, (stat.st_size, stat.st_mtime_ns))


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Mapped, so that pages are read as they are needed and count as the file's memory, not as the process's own.
        return pq.ParquetFile(path, memory_map=True)
    except OSError as error:
        raise cannot_read(path, error) from error
    # ValueError: names and texts that are no UTF-8.
    except (pa.ArrowException, ValueError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ChimeraError:
    return ChimeraError(f"{path} is no Parquet file, or was cut off or damaged: {error}", "get it again")


def _kind(type_: Any) -> str:
    """Return `plain`, `binary` (a photo), `struct` (a photo with its path) or `bytes inside`."""
    import pyarrow as pa

    if pa.types.is_dictionary(type_):
        return _kind(type_.value_type)
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_):
        return "binary"
    if pa.types.is_struct(type_):
        inner = {type_.field(index).name: _kind(type_.field(index).type) for index in range(type_.num_fields)}
        if inner == {"bytes": "binary", "path": "plain"}:
            return "struct"
        return "plain" if set(inner.values()) <= {"plain"} else "bytes inside"
    if pa.types.is_nested(type_):
        children = [type_.field(index).type for index in range(type_.num_fields)]
        return "plain" if all(_kind(child) == "plain" for child in children) else "bytes inside"
    return "plain"


def _rows(path: Path, read: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of the columns `read` (name: place in the file), images as their paths."""
    import pyarrow as pa

    number = 0
    inside = [name for name, place in read.items() if place != name]
    file = _open(path)
    try:
        for batch in file.iter_batches(batch_size=_ROWS, columns=list(read.values())):
            columns = [_cells(column) for column in batch.columns]
            for cells in zip(*columns, strict=True) if columns else repeat((), batch.num_rows):
                number += 1
                values = dict(zip(batch.schema.names, cells, strict=True))
                for name in inside:
                    values[name] = values[name] and values[name]["path"]
                yield f"{path} row {number:,}", values
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ChimeraError(f"{path} is damaged after row {number:,}: {error}", "get the file again") from error
    finally:
        file.close()


def _cells(column: Any) -> list[Any]:
    import pyarrow as pa

    # Python's own times end at microseconds; without pandas pyarrow refuses the rest.
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    cells: list[Any] = column.to_pylist()
    return cells


def _reader(cursor: _Cursor, row: int, path: str | None) -> Read:
    return partial(_read_cell, cursor, row, path)


def _read_cell(cursor: _Cursor, row: int, path: str | None) -> bytes:
    """Return the image of a row; without one in its cell that of the file at `path`."""
    import pyarrow as pa

    try:
        with cursor.lock:
            content = _take(cursor, row)
    except (pa.ArrowException, OSError, StopIteration) as error:
        cursor.batches = None  # the next row group may be whole
        raise OSError(f"damaged in the table: {error}") from error
    if content is not None:
        return content
    if path is None:
        raise OSError("the cell is empty")
    return read_file(path)


def _take(cursor: _Cursor, row: int) -> bytes | None:
    """Return the image of a row, reading on to it. Threads ask a little out of order: what they pass by is kept."""
    if row not in cursor.pending:
        group = bisect_right(cursor.starts, row) - 1
        if cursor.batches is None or row < cursor.position or cursor.starts[group] - cursor.position > _FAR:
            cursor.pending.clear()
            cursor.position = cursor.starts[group]
            cursor.batches = _photos(cursor, group)
    while row not in cursor.pending:
        assert cursor.batches is not None
        for content in next(cursor.batches):
            cursor.pending[cursor.position] = content
            cursor.position += 1
    return cursor.pending.pop(row)


def _photos(cursor: _Cursor, group: int) -> Iterator[list[bytes | None]]:
    """Yield the cells of the column from a row group on, a few at a time."""
    file = _open(Path(cursor.path))
    try:
        groups = range(group, len(cursor.starts))
        for batch in file.iter_batches(batch_size=_PHOTOS, row_groups=groups, columns=[cursor.column]):
            cells = batch.column(0).to_pylist()
            yield [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
    finally:
        file.close()
