"""Verdicts in words: the same for the terminal, the report and `--json`."""

from datetime import date
from typing import Any

from chimera_cli.figures import FIGURES, format_spread, format_value
from chimera_cli.slo.evidence import Evidence
from chimera_cli.slo.objectives import Condition, Waiver
from chimera_cli.slo.verdicts import Finding, Verdict
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


def interval_words(finding: Finding) -> str:
    """Return the 95 % interval of the mean, `71.1 to 73.9 %`; a dash where one seed or none was looked at."""
    name = finding.condition.figure
    if finding.interval is None:
        return format_value(name, None)
    low, high = (format_value(name, end) for end in finding.interval)
    # `11.7 to 39.0 %`, but `59 min 40 s to 1 h 02 min`: there the unit is part of each number.
    unit = f" {FIGURES[name].unit or '%'}"
    return f"{low if 'min' in f'{low}{high}' else low.removesuffix(unit)} to {high}"


def sources(evidence: Evidence, name: str) -> list[dict[str, Any]]:
    """Return where each value of a figure comes from: seed, run, file and the value itself."""
    if evidence.group is None or not evidence.seeds:
        return []
    values = evidence.figures.get(name, (None,) * len(evidence.seeds))
    rows = zip(evidence.seeds, evidence.files, values, strict=True)
    run = evidence.group.name
    return [{"seed": seed, "run": run, "file": file, "value": value} for seed, file, value in rows]


def waiver_facts(waiver: Waiver, verdict: Verdict | None, today: date) -> dict[str, Any]:
    """Return a waiver as JSON takes it, with its state in words; without a `verdict` it applies to nothing judged."""
    days = (waiver.expires - today).days
    state = "not judged under this profile" if verdict is None else verdict.waiver_state
    bounds = None if verdict is None else waiver.bounds(verdict.objective)
    left = f"{-days} days ago" if days < -1 else {-1: "yesterday", 0: "the last day", 1: "1 day left"}.get(days)
    until = f"until {waiver.expires.isoformat()} ({left or f'{days} days left'})"
    only = ", ".join(f"{FIGURES[name].label} {format_value(name, value)}" for name, value in (bounds or {}).items())
    bound = f", no worse than {only}" if only else ""
    return {
        "objective": waiver.objective,
        "owner": waiver.owner,
        "reason": waiver.reason,
        "expires": waiver.expires.isoformat(),
        "days_left": days,
        "bound": bounds,
        "state": state,
        "words": f"{waiver.objective}, by {waiver.owner}: {waiver.reason}; {until}{bound}; {state}",
    }


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
