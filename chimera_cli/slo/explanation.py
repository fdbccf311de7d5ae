"""A verdict step by step: the formula of the law, the samples, mean, spread, interval, and what follows from them."""

from collections.abc import Sequence
from typing import Any

from chimera_cli.figures import FIGURES, format_value
from chimera_cli.slo.evidence import Evidence
from chimera_cli.slo.objectives import Condition
from chimera_cli.slo.verdicts import Finding
from chimera_cli.slo.words import limit_words
from chimera_cli.statistics import Summary, summarise, t_quantile_95

_HOLDS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}
_SIGNS = {">=": "≥", ">": ">", "<=": "≤", "<": "<"}
_STATISTICS = {
    "mean": "the mean over the seeds",
    "worst": "the worst seed",
    "bound95": "the pessimistic end of the 95 % interval of the mean over the seeds",
}


def explain(finding: Finding, evidence: Evidence) -> dict[str, Any]:
    """Return one condition explained: `law` and `formula` in words and symbols, `samples` by seed, `steps` to the word.

    `t` is the two-sided 95 % quantile of Student's t with n - 1 degrees of freedom; None for one seed.
    """
    condition, samples = finding.condition, _samples(finding, evidence)
    known = [sample["judged"] for sample in samples if sample["judged"] is not None]
    complete = bool(known) and len(known) == len(samples)
    summary = summarise(known) if complete else None
    return {
        "figure": condition.figure,
        "label": FIGURES[condition.figure].label,
        "law": _law_words(condition),
        "formula": _formula(condition),
        "samples": samples,
        "n": None if summary is None else summary.n,
        "mean": None if summary is None else summary.mean,
        "std": None if summary is None else summary.std,
        "t": t_quantile_95(summary.n - 1) if summary is not None and summary.n > 1 else None,
        "interval": None if summary is None or summary.low is None else [summary.low, summary.high],
        "verdict": finding.word,
        "steps": [finding.reason] if summary is None else _steps(finding, summary, samples),
    }


def _samples(finding: Finding, evidence: Evidence) -> list[dict[str, Any]]:
    """Return per seed the value, what it is relative to, their difference, which is judged, and the file of both."""
    condition = finding.condition
    if evidence.missing is not None or not evidence.seeds:
        return []
    nothing = (None,) * len(evidence.seeds)
    values = evidence.figures.get(condition.figure, nothing)
    bases = nothing if condition.relative_to is None else evidence.figures.get(condition.relative_to, nothing)
    samples = []
    for seed, file, value, base in zip(evidence.seeds, evidence.files, values, bases, strict=True):
        judged = value
        if condition.relative_to is not None:
            judged = None if value is None or base is None else value - base
        samples.append({"seed": seed, "file": file, "value": value, "relative_to": base, "judged": judged})
    return samples


def _law_words(condition: Condition) -> str:
    what = f"{_STATISTICS[condition.statistic]} of {FIGURES[condition.figure].label}"
    limit = format_value(condition.figure, condition.limit)
    if condition.relative_to is not None:
        limit = limit_words(condition, None).partition(" ")[2]
    return f"{what} is {_HOLDS[condition.comparison]} {limit}"


def _formula(condition: Condition) -> str:
    x = condition.figure if condition.relative_to is None else f"({condition.figure} - {condition.relative_to})"
    upwards = condition.comparison in (">=", ">")
    left = {
        "mean": f"(1/n) Σ {x}",
        "worst": f"{'min' if upwards else 'max'} {x}",
        "bound95": f"mean({x}) {'-' if upwards else '+'} t(0.975, n-1) · std({x}) / √n",
    }[condition.statistic]
    return f"{left} {_SIGNS[condition.comparison]} {condition.limit:g}"


def _steps(finding: Finding, summary: Summary, samples: Sequence[dict[str, Any]]) -> list[str]:
    """Return the way from the samples to the word, each number such that a reader can do it again."""
    return [*_spread_steps(summary), *_verdict_steps(finding, summary, samples)]


def _spread_steps(summary: Summary) -> list[str]:
    n = summary.n
    total = " + ".join(_exact(value) for value in summary.values)
    mean = f"mean = ({total}) / {n} = {_exact(summary.mean)}" if n > 1 else f"mean = {_exact(summary.mean)} (n = 1)"
    if summary.std is None or summary.low is None or summary.high is None:
        return [mean, "std and 95 % interval: none, one seed has no spread"]
    half = f"{t_quantile_95(n - 1):.4f} · {_exact(summary.std)} / √{n}"
    return [
        mean,
        f"std = √(Σ (x - mean)² / (n - 1)) = {_exact(summary.std)}",
        f"95 % interval = mean ± t(0.975, {n - 1}) · std / √n = {_exact(summary.mean)} ± {half}"
        f" = {_exact(summary.low)} to {_exact(summary.high)}",
    ]


def _verdict_steps(finding: Finding, summary: Summary, samples: Sequence[dict[str, Any]]) -> list[str]:
    condition = finding.condition
    upwards = condition.comparison in (">=", ">")
    end = summary.low if upwards else summary.high
    test = f"{_SIGNS[condition.comparison]} {condition.limit:g}"
    if condition.statistic == "worst":
        worst = (min if upwards else max)(samples, key=lambda sample: sample["judged"])
        return [f"worst seed: {_exact(worst['judged'])} (seed {worst['seed']}) {test}? {_answer(finding)}"]
    if condition.statistic == "bound95":
        if end is None:
            return [finding.reason]
        return [f"pessimistic end of the interval: {_exact(end)} {test}? {_answer(finding)}"]
    if finding.word == "fail":
        return [f"mean: {_exact(summary.mean)} {test}? {_answer(finding)}"]
    steps = [f"mean: {_exact(summary.mean)} {test}? yes"]
    if end is None:
        return [*steps, "without an interval the mean decides: pass"]
    straddles = finding.word == "inconclusive"
    doubt = "no, the interval straddles the limit: inconclusive" if straddles else "yes: pass"
    return [*steps, f"pessimistic end of the interval: {_exact(end)} {test}? {doubt}"]


def _answer(finding: Finding) -> str:
    return "yes: pass" if finding.word == "pass" else f"no: {finding.word}"


def _exact(value: float) -> str:
    return f"{value:.6g}"
