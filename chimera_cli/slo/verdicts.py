"""Evidence against law: pass, fail, inconclusive, unmeasured or waived. Pure functions; nothing is read here."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

from chimera_cli.slo.evidence import Evidence
from chimera_cli.slo.objectives import Comparison, Condition, Objective, Waiver
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
    """Return the finding on one condition by its statistic over the seeds.

    `worst` is the value of the worst seed, `bound95` the pessimistic end of the 95 % t interval of the mean. With
    `mean` an interval that reaches across the limit makes a met condition inconclusive.
    """
    values = _known(evidence, condition.figure)
    bases = _known(evidence, condition.relative_to) if condition.relative_to else [0.0] * len(values)
    over = summarise([value - base for value, base in zip(values, bases, strict=True)])
    base, summary = sum(bases) / len(bases), summarise(values)
    limit = base + condition.limit
    if condition.statistic == "bound95" and over.std is None:
        return Finding(condition, "unmeasured", summary, None, limit, None, "an interval needs at least two seeds")
    pessimistic = over.low if condition.comparison in (">=", ">") else over.high
    judged = {"mean": over.mean, "worst": _worst(over, condition.comparison), "bound95": pessimistic}
    value = judged[condition.statistic]
    if value is None:
        raise ValueError(f"{condition.figure} has no {condition.statistic} over {over.n} values")
    margin = _margin(value, condition)
    found = Finding(condition, "pass", summary, base + value, limit, margin)
    if not _met(value, condition):
        return _with(found, "fail", f"{condition.figure} misses its limit")
    if condition.statistic == "mean" and pessimistic is not None and not _met(pessimistic, condition):
        return _with(found, "inconclusive", f"the mean of {condition.figure} meets its limit, its interval straddles it")
    return found


def _known(evidence: Evidence, name: str) -> list[float]:
    """Return a figure of every seed. Evidence that lacks one never comes this far."""
    return [value for value in evidence.figures[name] if value is not None]


def _worst(over: Summary, comparison: Comparison) -> float:
    return min(over.values) if comparison in (">=", ">") else max(over.values)


def _margin(value: float, condition: Condition) -> float:
    distance = value - condition.limit
    return distance if condition.comparison in (">=", ">") else -distance


def _met(value: float, condition: Condition) -> bool:
    margin = _margin(value, condition)
    if abs(margin) <= _ROUNDING * max(1.0, abs(condition.limit)):
        return condition.comparison in (">=", "<=")
    return margin > 0


def _with(finding: Finding, word: Word, reason: str) -> Finding:
    return Finding(
        finding.condition, word, finding.summary, finding.value, finding.limit, finding.margin, reason
    )
