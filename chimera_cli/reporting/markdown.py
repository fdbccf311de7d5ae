"""A document as GitHub-flavoured Markdown that also reads well as plain text."""

import re
from collections.abc import Iterable

from tabulate import tabulate

from chimera_cli.reporting.document import (
    Block,
    Code,
    Document,
    Mono,
    Paragraph,
    Section,
    Strong,
    Table,
    Text,
    clean,
    clean_code,
    spans,
)

# What could begin markup, HTML or an entity (CommonMark 0.31); `a_b` and `x < y` can't and stay readable.
_SPECIAL = re.compile(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w)|<(?=[a-zA-Z/!?])|&(?=[#\w]))")
# What begins a heading, list, quote or rule at the start of a paragraph.
_AT_START = re.compile(r"^(\s*\d*)([#>+=.)-])")


def render(document: Document) -> str:
    """Return the whole document as Markdown, ending in one line break."""
    parts = [f"# {escape(document.title)}", *map(_block, document.lead)]
    for section in document.sections:
        parts += _section(section)
    return _joined(parts)


def render_blocks(blocks: Iterable[Block]) -> str:
    """Return blocks alone as Markdown, without any heading, ending in one line break."""
    return _joined(map(_block, blocks))


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Return `text` such that Markdown shows it as it is: no markup, no HTML, no new cell, no control characters."""
    return _SPECIAL.sub(r"\\\1", clean(text))


def _section(section: Section) -> Iterable[str]:
    yield f"## {escape(section.title)}"
    yield from map(_block, section.blocks)


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Code):
        return _fenced(block)
    return _paragraph(block)


def _paragraph(block: Paragraph) -> str:
    text = _AT_START.sub(r"\1\\\2", _inline(block.text))
    return f"> {text}" if block.quoted else text


def _table(block: Table) -> str:
    if not block.rows:
        return ""
    align = ["right" if index in block.right else "left" for index in range(len(block.columns))]
    rows = [[_inline(cell, in_table=True) for cell in row] for row in block.rows]
    head = [escape(column) for column in block.columns]
    return tabulate(rows, head, tablefmt="pipe", colalign=align, disable_numparse=True)


def _fenced(block: Code) -> str:
    text = clean_code(block.text).rstrip("\n")
    fence = "`" * max(3, 1 + _longest_ticks(text))
    return f"{fence}{block.language}\n{text}\n{fence}"


def _inline(text: Text, in_table: bool = False) -> str:
    return "".join(_span(span, in_table) for span in spans(text))


def _span(span: str | Mono | Strong, in_table: bool) -> str:
    if isinstance(span, Strong):
        return f"**{escape(span.text)}**"
    if isinstance(span, str):
        return escape(span)
    text = clean(span.text)
    # Inside a table GitHub splits cells before it looks at code, so a bar is escaped even there.
    text = text.replace("|", r"\|") if in_table else text
    ticks = "`" * (1 + _longest_ticks(text)) if "`" in text else "`"
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}" if text.strip() else ""


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
