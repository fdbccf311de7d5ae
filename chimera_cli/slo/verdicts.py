"""Evidence against law: pass, fail, inconclusive, unmeasured or waived. Pure functions; nothing is read here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal

from chimera_cli.figures import FIGURES, format_value
from chimera_cli.slo.evidence import Evidence
from chimera_cli.slo.objectives import Condition, Objective, Waiver
from chimera_cli.statistics import Summary, summarise

Word = Literal["pass", "fail", "inconclusive", "unmeasured", "waived"]
WaiverState = Literal["in force", "not needed", "beyond its bound", "expired", "no evidence"]

# From the mildest to the worst: one condition that fails breaches the law whatever the others say.
_ORDER: tuple[Word, ...] = ("pass", "waived", "inconclusive", "unmeasured", "fail")

# A limit missed by the rounding of a mean alone is met.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Finding:
    """One condition judged. `value` is what `statistic` makes of the seeds, `limit` what it was held against.

    `margin` is the distance to the limit on the good side (negative: missing). `interval` is the 95 % t interval of the
    mean of what is held against the limit; one seed has none. All are None where unmeasured.
    """

    condition: Condition
    word: Word
    summary: Summary | None = None
    value: float | None = None
    limit: float | None = None
    margin: float | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One objective judged; `reason` says why it is not a pass, or what else a reader must know.

    `waiver_state` says what its waiver does; None without one.
    """

    objective: Objective
    word: Word
    findings: tuple[Finding, ...]
    evidence: Evidence
    reason: str = ""
    waiver: Waiver | None = None
    waiver_state: WaiverState | None = None


def judge(objective: Objective, evidence: Evidence, waiver: Waiver | None, today: date) -> Verdict:
    """Return the verdict on an objective. A waiver in force excuses it, one that has expired breaches it."""
    if evidence.missing is not None:
        findings = tuple(Finding(condition, "unmeasured") for condition in objective.all_of)
        plain = Verdict(objective, "unmeasured", findings, evidence, evidence.missing, waiver)
    else:
        findings = tuple(_judge_condition(condition, evidence) for condition in objective.all_of)
        word = worst_of([finding.word for finding in findings])
        reason = "; ".join(finding.reason for finding in findings if finding.word == word and finding.reason)
        plain = Verdict(objective, word, findings, evidence, reason, waiver)
    return plain if waiver is None else _waive(plain, waiver, today)


def worst_of(words: Sequence[Word]) -> Word:
    """Return the gravest of some verdicts; `unmeasured` where there are none, because nothing proves nothing."""
    return max(words, key=_ORDER.index, default="unmeasured")


def _waive(verdict: Verdict, waiver: Waiver, today: date) -> Verdict:
    """Return the verdict as the waiver leaves it.

    It covers a breach up to its bound, and a doubt, but never missing evidence.
    """
    by = f"the waiver by {waiver.owner}: {waiver.reason}"
    expired = today > waiver.expires
    if verdict.word == "pass":
        reason = f"{by} is not needed{' and has expired' if expired else ''}"
        return replace(verdict, reason=reason, waiver_state="not needed")
    was = f"{verdict.word}{f' ({verdict.reason})' if verdict.reason else ''}"
    if expired:
        reason = f"{was}; {by} expired on {waiver.expires.isoformat()}"
        return replace(verdict, word="fail", reason=reason, waiver_state="expired")
    beyond = _beyond(verdict, waiver)
    if beyond:
        reason = f"{was}; {by} does not cover {', '.join(beyond)}"
        return replace(verdict, word="fail", reason=reason, waiver_state="beyond its bound")
    if "unmeasured" in [finding.word for finding in verdict.findings]:
        reason = f"{was}; {by} covers a breach, not missing evidence"
        return replace(verdict, word="unmeasured", reason=reason, waiver_state="no evidence")
    reason = f"waived until {waiver.expires.isoformat()} by {waiver.owner}: {waiver.reason}; otherwise {was}"
    return replace(verdict, word="waived", reason=reason, waiver_state="in force")


def _beyond(verdict: Verdict, waiver: Waiver) -> list[str]:
    """Return the figures that are worse than the waiver allows, in words; without a bound it allows all."""
    bounds = waiver.bounds(verdict.objective)
    if bounds is None:
        return []
    beyond = []
    for finding in verdict.findings:
        name = finding.condition.figure
        if finding.word != "fail" or finding.value is None:
            continue
        if name not in bounds:
            beyond.append(f"{FIGURES[name].label}, for which it has no bound")
        elif not _met(finding.value, finding.condition.model_copy(update={"limit": bounds[name]})):
            beyond.append(f"{FIGURES[name].label} beyond {format_value(name, bounds[name])}")
    return beyond


# ---- one condition --------------------------------------------------------------------------------------------------


def _judge_condition(condition: Condition, evidence: Evidence) -> Finding:
    """Return the finding on one condition; unmeasured where any seed lacks a figure it needs."""
    values = _known(evidence, condition.figure)
    if values is None:
        return Finding(condition, "unmeasured", reason=f"{condition.figure} was not measured")
    if condition.relative_to is None:
        return _compare(condition, values, [0.0] * len(values))
    bases = _known(evidence, condition.relative_to)
    if bases is None:
        return Finding(condition, "unmeasured", reason=f"{condition.relative_to} was not measured")
    return _compare(condition, values, bases)


def _compare(condition: Condition, values: Sequence[float], bases: Sequence[float]) -> Finding:
    """Return the finding on values by seed, each relative to the base of its seed, by the condition's statistic.

    `worst` is the worst seed, `bound95` the pessimistic end of the 95 % t interval of the mean. With `mean` an interval
    that reaches across the limit makes a met condition inconclusive.
    """
    over = summarise([value - base for value, base in zip(values, bases, strict=True)])
    upwards = condition.comparison in (">=", ">")
    pessimistic = over.low if upwards else over.high
    worst = min(over.values) if upwards else max(over.values)
    judged = {"mean": over.mean, "worst": worst, "bound95": pessimistic}[condition.statistic]
    base = sum(bases) / len(bases)
    limit = base + condition.limit
    interval = None if over.low is None or over.high is None else (base + over.low, base + over.high)
    if judged is None:
        reason = f"the 95 % bound of {condition.figure} needs at least two seeds, there is one"
        return Finding(condition, "unmeasured", summarise(values), None, limit, None, None, reason)
    word: Word = "pass" if _met(judged, condition) else "fail"
    reason = "" if word == "pass" else f"{condition.figure} misses its limit"
    if word == "pass" and condition.statistic == "mean" and not (pessimistic is None or _met(pessimistic, condition)):
        word, reason = "inconclusive", f"{condition.figure} meets its limit in the mean, its interval straddles it"
    margin = _margin(judged, condition)
    return Finding(condition, word, summarise(values), base + judged, limit, margin, interval, reason)


def _known(evidence: Evidence, name: str) -> list[float] | None:
    """Return a figure of every seed; None where any seed lacks it, because a mean over the others would mislead."""
    known = [value for value in evidence.figures.get(name, ()) if value is not None]
    return known if known and len(known) == len(evidence.seeds) else None


def _margin(value: float, condition: Condition) -> float:
    distance = value - condition.limit
    return distance if condition.comparison in (">=", ">") else -distance


def _met(value: float, condition: Condition) -> bool:
    margin = _margin(value, condition)
    if abs(margin) <= _ROUNDING * max(1.0, abs(condition.limit)):
        return condition.comparison in (">=", "<=")
    return margin > 0
