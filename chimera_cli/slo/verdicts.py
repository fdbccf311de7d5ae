"""Evidence against law: pass, fail, inconclusive, unmeasured or waived. Pure functions; nothing is read here."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

from chimera_cli.slo.evidence import Evidence
from chimera_cli.slo.objectives import Condition, Objective, Waiver
from chimera_cli.statistics import Summary, summarise

Word = Literal["pass", "fail", "inconclusive", "unmeasured", "waived"]

# From the mildest to the worst: one condition that fails breaches the law whatever the others say.
_ORDER: tuple[Word, ...] = ("pass", "waived", "inconclusive", "unmeasured", "fail")

# A limit missed by the rounding of a mean alone is met.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Finding:
    """One condition judged. `value` is what `statistic` makes of the seeds, `limit` what it was held against.

    `margin` is the distance to the limit on the good side (negative: missing). All three are None where unmeasured.
    """

    condition: Condition
    word: Word
    summary: Summary | None = None
    value: float | None = None
    limit: float | None = None
    margin: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One objective judged; `reason` says why it is not a pass, or what else a reader must know."""

    objective: Objective
    word: Word
    findings: tuple[Finding, ...]
    evidence: Evidence
    reason: str = ""
    waiver: Waiver | None = None


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
    named = f"{waiver.owner}: {waiver.reason}"
    expired = today > waiver.expires
    if verdict.word == "pass":
        reason = f"the waiver by {named} is not needed{' and has expired' if expired else ''}"
        return Verdict(verdict.objective, "pass", verdict.findings, verdict.evidence, reason, waiver)
    was = f"{verdict.word}{f' ({verdict.reason})' if verdict.reason else ''}"
    if expired:
        reason = f"{was}; the waiver by {named} expired on {waiver.expires.isoformat()}"
        return Verdict(verdict.objective, "fail", verdict.findings, verdict.evidence, reason, waiver)
    reason = f"waived until {waiver.expires.isoformat()} by {named}; it is {was}"
    return Verdict(verdict.objective, "waived", verdict.findings, verdict.evidence, reason, waiver)


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
    base, summary = sum(bases) / len(bases), summarise(values)
    limit = base + condition.limit
    if judged is None:
        return Finding(condition, "unmeasured", summary, None, limit, None, "an interval needs at least two seeds")
    word: Word = "pass" if _met(judged, condition) else "fail"
    reason = "" if word == "pass" else f"{condition.figure} misses its limit"
    if word == "pass" and condition.statistic == "mean" and not (pessimistic is None or _met(pessimistic, condition)):
        word, reason = "inconclusive", f"{condition.figure} meets its limit in the mean, its interval straddles it"
    return Finding(condition, word, summary, base + judged, limit, _margin(judged, condition), reason)


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
