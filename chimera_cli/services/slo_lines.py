"""The words of `slo check` that its formats share, made from the result as JSON has it."""

import re
from collections.abc import Mapping
from typing import Any

from chimera_cli.figures import FIGURES, format_spread, format_value

Result = Mapping[str, Any]

ENDINGS = {
    "pass": "every objective is met",
    "waived": "every objective is met or waived",
    "inconclusive": "no objective is missed, not all are certain",
    "unmeasured": "not everything was measured, so nothing is proven",
    "fail": "an objective is missed; `chimera slo plan` says what to do next",
}

# What a terminal or an editor would obey, or no encoding has: C1 controls, those that turn the direction of writing
# (Unicode Standard Annex 9, section 2), half surrogate pairs. C0 controls JSON escapes by itself.
STEERING = r"\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
# With C0 controls and the two non-characters: also what XML 1.0 (section 2.2) forbids.
_UNSAFE = re.compile(rf"[\x00-\x1f{STEERING}\ufffe\uffff]")


def title(result: Result) -> str:
    """Return what was held against what."""
    pack, seeds = result["pack"].get("name", "no pack"), len(result["seeds"])
    count = f"{seeds} seed{'' if seeds == 1 else 's'}"
    return f"SLO check of {result['run']} ({count}, {pack}) by {result['slo']}"


def limit_of(condition: Result) -> str:
    """Return the demanded side of a condition without its label."""
    return str(condition["law"]).removeprefix(condition["label"]).strip()


def margin_of(condition: Result) -> str:
    """Return the distance to the limit with its sign, + on the good side."""
    margin = condition["margin"]
    if margin is None:
        return format_value(condition["figure"], None)
    return f"{'+' if margin >= 0 else '-'}{format_value(condition['figure'], abs(margin))}"


def notes(objective: Result) -> list[str]:
    """Return why an objective is no pass, what would measure it, what is beside it, and where it comes from."""
    lines = [objective["reason"]] if objective["reason"] else []
    lines += [f"measure it: {objective['measure']}"] if objective["measure"] else []
    lines += beside_words(objective)
    return lines + ([f"evidence: {objective['evidence']}"] if objective["evidence"] else [])


def beside_words(objective: Result) -> list[str]:
    """Return the targets of an objective, the figures that are reported beside it, and how it stands to a baseline."""
    lines = []
    for condition in objective["conditions"]:
        if condition["target"] is not None:
            target = format_value(condition["figure"], condition["target"])
            lines.append(f"target: {condition['label']} {limit_of(condition).split()[0]} {target}")
    for beside in objective["beside"]:
        summary = beside["summary"]
        if summary is not None:
            text = format_spread(beside["figure"], summary["mean"], summary["std"], summary["n"])
            wish = "" if beside["target"] is None else f", target {format_value(beside['figure'], beside['target'])}"
            lines.append(f"beside it: {FIGURES[beside['figure']].label} {text}{wish}")
    baseline = objective.get("baseline")
    return lines if baseline is None else [*lines, baseline["words"]]


def condition_line(condition: Result) -> str:
    """Return a condition on one line: verdict, figure, spread, interval, limit, margin."""
    interval = "" if condition["interval"] is None else f", 95 % interval {condition['interval_words']}"
    margin = "" if condition["margin"] is None else f" (margin {margin_of(condition)})"
    return (
        f"{condition['verdict']}: {condition['label']} {condition['measured']}{interval}, {limit_of(condition)}{margin}"
    )


def harmless(value: Any) -> Any:
    """Return a result with a space for every control character in its texts: nothing in it steers what shows it."""
    if isinstance(value, str):
        return _UNSAFE.sub(" ", value)
    if isinstance(value, Mapping):
        return {harmless(key): harmless(item) for key, item in value.items()}
    return [harmless(item) for item in value] if isinstance(value, list | tuple) else value
