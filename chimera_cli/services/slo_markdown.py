"""The result of `slo check` as Markdown."""

from chimera_cli.reporting.document import Block, Code, Document, Mono, Paragraph, Section, Span, Strong, Text, table
from chimera_cli.reporting.markdown import render
from chimera_cli.services.slo_lines import ENDINGS, Result, beside_words, harmless, limit_of, margin_of, title


def render_check(result: Result) -> str:
    """Return the verdicts as a Markdown table with notes below it, for a job summary or a pull request."""
    result = harmless(result)
    verdict = (Strong(result["verdict"]), f": {ENDINGS[result['verdict']].replace('`', '')}.")
    lead: list[Block] = [*(Paragraph(remark, quoted=True) for remark in result["remarks"]), Paragraph(verdict)]
    lead += [Paragraph(("Waiver: ", waiver["words"])) for waiver in result["waivers"]]
    columns = ("law", "verdict", "figure", "measured", "95 % interval", "limit", "margin")
    rows = [row for objective in result["objectives"] for row in _markdown_rows(objective)]
    lead.append(table(columns, rows))
    lead += [_markdown_notes(objective) for objective in result["objectives"]]
    ending = Section("again", "Check it again", (Code(result["command"], "sh"),))
    return render(Document(title(result), tuple(lead), (ending,)))


def _markdown_rows(objective: Result) -> list[tuple[Text, ...]]:
    rows: list[tuple[Text, ...]] = []
    for number, condition in enumerate(objective["conditions"]):
        word = objective["verdict"]
        head: tuple[Text, Text] = ("", "")
        if number == 0:
            head = (Mono(objective["id"]), word if word == "pass" else Strong(word))
        cells = (condition["label"], condition["measured"], condition["interval_words"])
        rows.append((*head, *cells, limit_of(condition), margin_of(condition)))
    return rows


def _markdown_notes(objective: Result) -> Paragraph:
    """Return one line per objective; commands and files are set as code."""
    parts: list[Span] = [Mono(objective["id"]), f": {objective['title']}"]
    parts += [f"; {objective['reason']}"] if objective["reason"] else []
    parts += ["; measure it: ", Mono(objective["measure"])] if objective["measure"] else []
    parts += [f"; {line}" for line in beside_words(objective)]
    parts += ["; evidence: ", Mono(objective["evidence"])] if objective["evidence"] else []
    return Paragraph(tuple(parts))
