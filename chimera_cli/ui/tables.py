"""Result tables of all commands in one style: a quiet rule under the head, numbers to the right."""

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from chimera_cli.ui.text import CONTROLS

Cell = str | Text

# `41.7 %`, `-0.3`, `≥ 0.25`, `2 min 03 s`, a missing `–`: what reads best aligned to the right.
_NUMERIC = re.compile(r"^([<>=≤≥±~]*\s*[-+−]?\d.*|–|)$")
_STYLES = {
    "pass": "green",
    "ok": "green",
    "finished": "green",
    "fail": "bold red",
    "failed": "bold red",
    "warn": "yellow",
    "inconclusive": "yellow",
    "interrupted": "yellow",
    "unmeasured": "yellow",
    "waived": "yellow",
    "running": "cyan",
    "died": "bold red",
}


def word(text: str) -> Text:
    """Return a verdict, level or status in its colour; a word without one stays plain."""
    return Text(text, style=_STYLES.get(text.lower(), ""))


def cell(value: Cell) -> Text:
    """Return `value` for a table: a string is never read as markup, its control characters become spaces."""
    return value if isinstance(value, Text) else Text(CONTROLS.sub(" ", value))


def result_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """Return a table; a column is aligned to the right where all its cells read as numbers.

    Strings are shown as they are (no markup); coloured cells are `rich.text.Text`, such as `word("pass")`.
    """
    cells = [[cell(value) for value in row] for row in rows]
    table = Table(
        title=cell(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        border_style="dim",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
    )
    for index, name in enumerate(columns):
        right = bool(cells) and all(index >= len(row) or _NUMERIC.match(row[index].plain) for row in cells)
        # A folded verdict reads badly; names and sentences may fold.
        short = bool(cells) and all(index >= len(row) or row[index].plain in _STYLES for row in cells)
        table.add_column(cell(name), justify="right" if right else "left", overflow="fold", no_wrap=short)
    for row in cells:
        table.add_row(*row)
    return table


def facts(title: str, pairs: Iterable[tuple[str, Cell]]) -> RenderableType:
    """Return names and values in two columns below a bold title; strings are shown as they are (no markup)."""
    table = Table(
        title=cell(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(cell(name), cell(value))
    return table
