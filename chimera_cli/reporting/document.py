"""What a report is made of, before it is Markdown or HTML: sections of paragraphs, tables and code.

Text is either a plain `str`, which every renderer escapes, or `Mono`, which is set as code; so a name that carries
markup stays a name in both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# What steers a terminal (C0, C1), turns the order of letters round, or can't be written as UTF-8 or XML at all.
_NEVER = r"\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff"
_CONTROLS = re.compile(rf"[\x00-\x1f{_NEVER}]")
_CONTROLS_IN_CODE = re.compile(rf"[\x00-\x08\x0b-\x1f{_NEVER}]")


@dataclass(frozen=True, slots=True)
class Mono:
    """Text that is typed or read by a machine: a command, a name, a hash."""

    text: str


@dataclass(frozen=True, slots=True)
class Strong:
    """Text that must not be overlooked."""

    text: str


Span = str | Mono | Strong
Text = Span | tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Paragraph:
    """`quoted` paragraphs are set apart: a warning that applies to the whole report."""

    text: Text
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`right` holds the numbers of the columns that are aligned to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    right: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to paste or to read as they are."""

    text: str
    language: str = "text"


Block = Paragraph | Table | Code


@dataclass(frozen=True, slots=True)
class Section:
    """`key` names the section for links and for the plots that belong to it."""

    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report: `lead` stands below the title, before the first section."""

    title: str
    lead: tuple[Block, ...] = ()
    sections: tuple[Section, ...] = field(default=())


def spans(text: Text) -> tuple[Span, ...]:
    """Return `text` as its spans."""
    return text if isinstance(text, tuple) else (text,)


def clean(text: str) -> str:
    """Return `text` on one line: control characters and what no file can hold become spaces."""
    return _CONTROLS.sub(" ", text)


def clean_code(text: str) -> str:
    """Return `text` with its line breaks and tabs, all else that `clean` takes out as spaces."""
    return _CONTROLS_IN_CODE.sub(" ", text.replace("\r\n", "\n"))


def table(columns: Sequence[str], rows: Sequence[Sequence[Text]], right: Sequence[int] = ()) -> Table:
    """Return a table; every row must be as long as `columns`."""
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"a row does not have {len(columns)} cells")
    return Table(tuple(columns), tuple(tuple(row) for row in rows), frozenset(right))
