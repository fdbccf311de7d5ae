"""The closed-form baseline that `chimera eval --baseline` left beside a run: where it lies, and who is below it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chimera_cli.errors import ChimeraError
from chimera_cli.figures import FIGURES, RECALLS, format_value
from chimera_cli.runs import Group, read_json, seal_problem
from chimera_cli.slo.evidence import Evidence, Subject, number, pack_of
from chimera_cli.slo.objectives import Objective

METHODS: Mapping[str, str] = {"cca": "CCA"}

# Recalls that differ by the rounding of a mean alone are equal.
_ROUNDING = 1e-9


def baseline_path(group: Group, pack: str, split: str, method: str = "cca") -> Path:
    """Return the file of a baseline; its own folder keeps it apart from what the group has learned."""
    return group.path / "evaluations" / "baselines" / f"{pack}-{split}-{method}.json"


def unfit_baseline(
    document: Mapping[str, Any], group: Group, pack: Mapping[str, Any], split: str, method: str = "cca"
) -> str | None:
    """Return why a file is not the baseline of this group on this content of the pack and this split; None if it is."""
    theirs = document.get("pack")
    theirs = theirs if isinstance(theirs, Mapping) else {}
    if document.get("baseline") != method or not isinstance(document.get("figures"), Mapping):
        return "is no baseline"
    if (theirs.get("name"), document.get("split")) != (pack.get("name"), split):
        return f"is the baseline on {theirs.get('name')}, {document.get('split')}"
    if theirs.get("fingerprint") != pack.get("fingerprint"):
        return f"was measured on another content of the pack {pack.get('name')}"
    return None if document.get("group") == group.name else f"is that of {document.get('group')}"


def read_baseline(
    group: Group, pack: Mapping[str, Any], split: str, method: str = "cca"
) -> tuple[dict[str, Any] | None, str | None]:
    """Return the baseline of a group on a pack (name, fingerprint) and split, and what is wrong with its file.

    Both are None where there is no file; a file that is edited, cut off or of something else is no baseline.
    """
    path = baseline_path(group, str(pack.get("name")), split, method)
    if not path.is_file():
        return None, None
    try:
        document = read_json(path)
    except ChimeraError as error:
        return None, error.message.removeprefix(f"{path} ")
    problem = seal_problem(document) or unfit_baseline(document, group, pack, split, method)
    return (None, problem) if problem else (document, None)


def below_baseline(figures: Mapping[str, float | None], baseline: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the recalls in which `figures` are lower than the baseline's; what either lacks is not compared."""
    return tuple(
        name
        for name in RECALLS
        if (ours := number(figures.get(name))) is not None
        and (theirs := number(baseline.get(name))) is not None
        and ours < theirs - _ROUNDING
    )


def baseline_words(figures: Mapping[str, float | None], baseline: Mapping[str, Any], method: str = "cca") -> str:
    """Return how `figures` stand to the baseline's: in which recalls they are below it, or that they are in none."""
    name = f"the {METHODS[method]} baseline of the same frozen features"
    below = below_baseline(figures, baseline)
    if below:
        parts = [
            f"{FIGURES[one].label} ({format_value(one, figures[one])} against {format_value(one, baseline[one])})"
            for one in below
        ]
        return f"below {name} in {', '.join(parts)}"
    compared = [one for one in RECALLS if figures.get(one) is not None and number(baseline.get(one)) is not None]
    if not compared:
        return f"shares no recall with {name}"
    return f"not below {name} in any of {len(compared)} recalls"


def baseline_beside(objective: Objective, evidence: Evidence, subject: Subject) -> dict[str, Any] | None:
    """Return the baseline beside an objective about a split, as JSON takes it; None where none was measured.

    `below` names the recalls in which the mean over the seeds is lower.
    """
    if objective.split is None or evidence.missing is not None:
        return None
    group, pack = subject.group, pack_of(subject.group)
    document, problem = read_baseline(group, pack, objective.split)
    if document is None and problem is None:
        return None
    file = baseline_path(group, str(pack.get("name")), objective.split).relative_to(subject.home).as_posix()
    facts: dict[str, Any] = {"method": "cca", "file": file, "figures": {}, "below": []}
    if document is None:
        return facts | {"words": f"no baseline counts: {file} {problem}"}
    figures = {name: _mean(evidence, name) for name in RECALLS}
    known = {name: number(document["figures"].get(name)) for name in (*RECALLS, "rsum")}
    below = list(below_baseline(figures, known))
    return facts | {"figures": known, "below": below, "words": baseline_words(figures, known)}


def _mean(evidence: Evidence, name: str) -> float | None:
    values = evidence.figures.get(name, ())
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
