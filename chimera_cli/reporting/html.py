"""A document and its plots as one self-contained HTML page: light, dark, on a phone and on paper."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chimera_cli.reporting.document import (
    Code,
    Document,
    Mono,
    Paragraph,
    Strong,
    Table,
    Text,
    clean,
    clean_code,
    spans,
)
from chimera_cli.reporting.facts import Facts
from chimera_cli.reporting.plots import Plot
from chimera_cli.reporting.verdicts import WORDS, Verdicts, tally
from chimera_cli.reporting.words import DASH, spread, without_n

if TYPE_CHECKING:
    from jinja2 import Template

_TILE = 9  # characters; three of them and their gaps fit on a phone
_TIED = re.compile(r"(?<=\d) (?=(?:%|GiB|ms|s|h|min|px|×)(?!\w))|(?<=[≥≤]) (?=[-\d])")


@dataclass(frozen=True, slots=True)
class Headline:
    """One figure at the top of the page; `state` is a verdict where the figure is one."""

    label: str
    value: str
    state: str = ""


def render(document: Document, plots: Sequence[Plot], headlines: Sequence[Headline], run: str = "") -> str:
    """Return the page, titled with the name of the `run`.

    All text is escaped by the template; the plots are this program's own SVG.
    """
    from markupsafe import Markup

    template = template_of("page.html")
    kinds = {"paragraph": Paragraph, "table": Table, "code": Code, "mono": Mono, "strong": Strong}
    return template.render(
        document=document,
        style=style(),
        title=f"{document.title}: {run}" if run else document.title,
        plots={section.key: [plot for plot in plots if plot.section == section.key] for section in document.sections},
        headlines=headlines,
        spans=spans,
        clean=clean,
        clean_code=clean_code,
        drawn=Markup,
        verdict=_verdict,
        plain=_plain,
        tied=_tied,
        shape=_shape,
        row_class=_row_class,
        kind=lambda value: next((name for name, kind in kinds.items() if isinstance(value, kind)), "text"),
    )


def template_of(name: str) -> "Template":
    """Return one of the templates beside this file; what it is given is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def style() -> str:
    """Return the style sheet that all pages share."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def headlines(facts: Facts, verdicts: Verdicts) -> list[Headline]:
    """Return what a reader wants to see first: verdicts, then recall on the most telling split, then time."""
    counts = tally(verdicts)
    told = ", ".join(f"{len(names)} {word}" for word, names in counts.items())
    gravest = next(iter(counts), "")
    found = [Headline("objectives" if verdicts.law else "objectives, not the law", told or DASH, gravest)]
    if facts.evaluations:
        evaluation = facts.evaluations[-1]
        for name, label in (("i2t_r10", "image → text R@10"), ("t2i_r10", "text → image R@10"), ("rsum", "rsum")):
            text = spread(name, evaluation.figures.get(name))
            found.append(Headline(f"{label}, {evaluation.split}", without_n(text)))
    found.append(
        Headline(
            "10,000 pairs from cold", without_n(spread("epoch_10k_pairs_s", facts.figures.get("epoch_10k_pairs_s")))
        )
    )
    return found


def _verdict(text: Text) -> str:
    """Return the verdict a table cell consists of, or nothing: such cells are coloured."""
    only = spans(text)[0] if len(spans(text)) == 1 else ""
    word = only if isinstance(only, str) else only.text
    return word if word in WORDS else ""


def _plain(text: Text) -> str:
    return "".join(span if isinstance(span, str) else span.text for span in spans(text))


def _tied(text: str) -> str:
    """Return text whose numbers stay on one line with their unit and their sign."""
    return _TIED.sub("\N{NO-BREAK SPACE}", text)


def _shape(block: Table) -> str:
    """Return what becomes of a table on a phone: `pairs` stay a table, short figures (`tiles`) stand three in a row."""
    if len(block.columns) == 2:
        return "pairs"
    figures = [row[index] for row in (block.columns, *block.rows) for index in block.right]
    return "rows tiles" if figures and max(len(_plain(text)) for text in figures) <= _TILE else "rows"


def _row_class(row: Sequence[Text]) -> str:
    """Return `more` for a row that continues the one above, `bare` for one that has a name and nothing else."""
    if not _plain(row[0]):
        return "more"
    return "bare" if all(_plain(cell) == DASH for cell in row[1:]) else ""
