"""The outcome of `slo check` in a report: verdicts, the limits that plots draw, and the contingency steps taken."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chimera_cli.figures import format_value
from chimera_cli.reporting.contingency import measures
from chimera_cli.reporting.document import Block, Mono, Paragraph, Section, Span, Strong, Text, table
from chimera_cli.reporting.facts import Facts
from chimera_cli.reporting.reading import number_of, results
from chimera_cli.reporting.words import DASH, sentence
from chimera_cli.runs import Group

WORDS = ("fail", "unmeasured", "inconclusive", "waived", "pass")  # from the gravest to the mildest
_SIGNS = {">=": "≥", "<=": "≤"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One condition of an objective as the report shows it; what all of them share stands in the first one alone."""

    objective: str
    title: str
    law: str
    measured: str
    verdict: str
    evidence: Text
    interval: str = DASH


@dataclass(frozen=True, slots=True)
class Limit:
    """What a figure is held against: `kind` says whose limit it is (`law`, a `target` that is wished for ...)."""

    figure: str
    sign: str
    value: float
    kind: str = "law"

    @property
    def label(self) -> str:
        """The limit as the label of a line: `law ≤ 7.50 GiB`."""
        return f"{self.kind} {self.sign} {format_value(self.figure, self.value)}"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The outcome of `slo check`: `remarks` are sentences that every output of it must carry.

    `waivers` say who answers for which breach until when, as every output must. Without `law` the objectives are a
    check of the plumbing, and the report says so before anything else. `options` make `chimera report` check alike.
    """

    rows: tuple[Verdict, ...]
    remarks: tuple[str, ...]
    command: str
    law: bool = True
    limits: tuple[Limit, ...] = ()
    waivers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def limit(self, figure: str) -> Limit | None:
        """Return what a figure is held against, a demand before a wish; None where nothing says."""
        found = [limit for limit in self.limits if limit.figure == figure]
        return next((limit for limit in found if limit.kind != "target"), found[0] if found else None)


def verdicts_of(check: Mapping[str, Any], remarks: Sequence[str] = ()) -> Verdicts:
    """Return the result of `slo check`, as JSON has it, for a report; `remarks` come before its own."""
    rows = []
    for objective in check["objectives"]:
        for index, condition in enumerate(objective["conditions"]):
            shared = (objective["id"], objective["title"], objective["verdict"]) if index == 0 else ("", "", "")
            name, title, word = shared
            evidence: Text = _evidence(objective) if index == 0 else ""
            interval = str(condition.get("interval_words") or DASH)
            rows.append(Verdict(name, title, condition["law"], condition["measured"], word, evidence, interval))
    law = bool(check["law"])
    limits = [limit for objective in check["objectives"] for limit in _limits(objective, "law" if law else "limit")]
    waivers = tuple(str(waiver["words"]) for waiver in check.get("waivers") or ())
    return Verdicts(
        rows=tuple(rows),
        remarks=(*remarks, *check["remarks"]),
        command=str(check["command"]),
        law=law,
        limits=tuple(limits),
        waivers=waivers,
        options=_options(check),
    )


def _options(check: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the file of objectives, as the check's own command names it, and the profile."""
    words = shlex.split(str(check["command"]))
    file = words[words.index("--slo") + 1] if "--slo" in words[:-1] else None
    given = {"--slo": file, "--profile": check.get("profile")}
    return tuple(word for option, value in given.items() if value for word in (option, str(value)))


def _limits(objective: Mapping[str, Any], kind: str) -> Iterator[Limit]:
    """Yield the limits and targets of an objective; one that follows another figure is no line in a plot."""
    for condition in objective["conditions"]:
        if condition.get("limit") is not None and not condition.get("relative_to"):
            sign = _SIGNS.get(condition["comparison"], str(condition["comparison"]))
            yield Limit(condition["figure"], sign, float(condition["limit"]), kind)
    for beside in objective.get("beside") or ():
        if beside.get("target") is not None:
            yield Limit(beside["figure"], "≥", float(beside["target"]), "target")


def _evidence(objective: Mapping[str, Any]) -> Text:
    """Return which run the verdict rests on, why it is no pass, and what would measure it."""
    run, reason = objective["run"], objective["reason"]
    parts: list[Span] = [Mono(run)] if run and run not in reason else []
    if reason:
        parts += [*(["; "] if parts else []), reason]
    if objective["measure"]:
        parts += ["; run " if parts else "run ", Mono(objective["measure"])]
    if objective.get("baseline"):
        parts += [*(["; "] if parts else []), objective["baseline"]["words"]]
    return tuple(parts)


def tally(verdicts: Verdicts) -> dict[str, list[str]]:
    """Return the objectives by verdict, the gravest verdict first; a verdict without any is left out."""
    named = {word: [row.objective for row in verdicts.rows if row.verdict == word] for word in WORDS}
    return {word: names for word, names in named.items() if names}


def slo_section(facts: Facts, verdicts: Verdicts) -> Section:
    """Return the table of verdicts with all remarks, and what was done about breaches."""
    rows: list[tuple[Text, ...]] = []
    for row in verdicts.rows:
        name: Text = (Mono(row.objective), f" {row.title}") if row.objective else ""
        word: Text = Strong(row.verdict) if row.verdict not in ("pass", "") else row.verdict
        rows.append((name, row.law, row.measured, row.interval, word, row.evidence))
    remarks = tuple(Paragraph(sentence(remark), quoted=True) for remark in verdicts.remarks)
    columns = ("objective", "law", "measured", "95 % interval", "verdict", "evidence")
    waivers = tuple(Paragraph(sentence(f"waiver: {waiver}")) for waiver in verdicts.waivers)
    blocks = (*remarks, table(columns, rows), *waivers, *_contingency(facts), *measures(facts))
    return Section("slo", "Service level objectives", blocks)


def _contingency(facts: Facts) -> tuple[Block, ...]:
    """Return the steps of the contingency plan that were taken with this pack, the oldest first; () without any."""
    if not facts.activations:
        return ()
    rows = [_activation(group, group.name == facts.group.name) for group in facts.activations]
    text = "Contingency steps taken on this pack, each as a run of its own:"
    return (Paragraph(text), table(("step", "for", "run", "status", "best rsum on dev"), rows, right=(4,)))


def _activation(group: Group, ours: bool) -> tuple[Text, ...]:
    plan = group.facts["plan"]
    name: Text = (Mono(group.name), " (this run)") if ours else Mono(group.name)
    best = [value for _, result, _ in results(group) if (value := _best_rsum(result)) is not None]
    reached = format_value("rsum", sum(best) / len(best) if best else None)
    return (Mono(str(plan.get("action"))), Mono(str(plan.get("objective"))), name, group.status, reached)


def _best_rsum(result: Mapping[str, Any]) -> float | None:
    return number_of(((result.get("details") or {}).get("best_dev") or {}).get("rsum"))
