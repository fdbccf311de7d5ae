"""Verdicts in words: the same for the terminal, the report and `--json`."""

from chimera_cli.figures import FIGURES, format_spread, format_value
from chimera_cli.slo.evidence import Evidence
from chimera_cli.slo.objectives import Condition
from chimera_cli.slo.verdicts import Finding
from chimera_cli.statistics import Summary, summarise


def law_words(finding: Finding) -> str:
    """Return a whole condition: `image to text R@10 ≥ 25.0 %`."""
    condition = finding.condition
    return f"{FIGURES[condition.figure].label} {limit_words(condition, finding.limit)}"


def limit_words(condition: Condition, limit: float | None) -> str:
    """Return the demanded side of a condition: `≥ 25.0 %`; a relative one says to what, `≤ 3.32 (ln(batch) - 0.15)`."""
    sign = {">=": "≥", "<=": "≤"}.get(condition.comparison, condition.comparison)
    if condition.relative_to is None:
        return f"{sign} {format_value(condition.figure, condition.limit)}"
    base = "ln(batch)" if condition.relative_to == "chance_loss" else FIGURES[condition.relative_to].label
    words = f"{base} {'-' if condition.limit < 0 else '+'} {abs(condition.limit):g}"
    return f"{sign} {words}" if limit is None else f"{sign} {format_value(condition.figure, limit)} ({words})"


def measured_words(finding: Finding) -> str:
    """Return mean ± standard deviation (n), and what was judged where that is not the mean: `..., worst 6.90 GiB`."""
    summary, condition = finding.summary, finding.condition
    if summary is None:
        return format_value(condition.figure, None)
    words = format_spread(condition.figure, summary.mean, summary.std, summary.n)
    judged, mean = (format_value(condition.figure, value) for value in (finding.value, summary.mean))
    return words if finding.value is None or judged == mean else f"{words}, {condition.statistic} {judged}"


def evidence_words(evidence: Evidence) -> str:
    """Return the files behind a verdict, seeds of one group in one pattern."""
    if not evidence.files:
        return evidence.group.name if evidence.group else ""
    first = evidence.files[0]
    if len(evidence.files) == 1 or not evidence.seeds:
        return ", ".join(evidence.files)
    inner = ",".join(str(seed) for seed in evidence.seeds)
    return first.replace(f"/seed-{evidence.seeds[0]}/", f"/seed-{{{inner}}}/", 1)


def over_seeds(evidence: Evidence, name: str) -> Summary | None:
    """Return a figure over the seeds of the evidence; None where any of them lacks it."""
    known = [value for value in evidence.figures.get(name, ()) if value is not None]
    return summarise(known) if known and len(known) == len(evidence.seeds) else None
