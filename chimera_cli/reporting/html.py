"""A document and its plots as one self-contained HTML page: light, dark, on a phone and on paper."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from chimera_cli.reporting.sections import DASH, Verdicts, spread

_VERDICTS = ("pass", "fail", "inconclusive", "unmeasured", "waived")


@dataclass(frozen=True, slots=True)
class Headline:
    """One figure at the top of the page; `state` is a verdict where the figure is one."""

    label: str
    value: str
    state: str = ""


def render(document: Document, plots: Sequence[Plot], headlines: Sequence[Headline]) -> str:
    """Return the page. All text is escaped by the template; the plots are this program's own SVG."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    kinds = {"paragraph": Paragraph, "table": Table, "code": Code, "mono": Mono, "strong": Strong}
    return template.render(
        document=document,
        plots={section.key: [plot for plot in plots if plot.section == section.key] for section in document.sections},
        headlines=headlines,
        spans=spans,
        clean=clean,
        clean_code=clean_code,
        drawn=Markup,
        verdict=_verdict,
        kind=lambda value: next((name for name, kind in kinds.items() if isinstance(value, kind)), "text"),
    )


def headlines(facts: Facts, verdicts: Verdicts) -> list[Headline]:
    """Return what a reader wants to see first: verdicts, then recall on the most telling split, then time."""
    counts = [(name, sum(row.verdict == name for row in verdicts.rows)) for name in _VERDICTS]
    told = ", ".join(f"{count} {name}" for name, count in counts if count)
    worst = next((name for name in ("fail", "unmeasured", "inconclusive", "waived", "pass") if dict(counts)[name]), "")
    found = [Headline("objectives" if verdicts.law else "objectives, not the law", told or DASH, worst)]
    if facts.evaluations:
        evaluation = facts.evaluations[-1]
        for name, label in (("i2t_r10", "image → text R@10"), ("t2i_r10", "text → image R@10"), ("rsum", "rsum")):
            text = spread(name, evaluation.figures.get(name))
            found.append(Headline(f"{label}, {evaluation.split}", _without_n(text)))
    found.append(
        Headline(
            "10,000 pairs from cold", _without_n(spread("epoch_10k_pairs_s", facts.figures.get("epoch_10k_pairs_s")))
        )
    )
    return found


def _without_n(text: str) -> str:
    return re.sub(r" \(n=\d+\)$", "", text)


def _verdict(text: Text) -> str:
    """Return the verdict a table cell consists of, or nothing: such cells are coloured."""
    only = spans(text)[0] if len(spans(text)) == 1 else ""
    word = only if isinstance(only, str) else only.text
    return word if word in _VERDICTS else ""
