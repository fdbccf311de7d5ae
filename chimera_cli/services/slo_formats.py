"""The result of `slo check` for other readers than a person: JSON, JUnit XML, Markdown, annotations of GitHub Actions.

Names, reasons and commands come from files that anybody may have edited; each format shows them and obeys none.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chimera_cli.services.slo_lines import STEERING, Result, condition_line, harmless, notes, title

_UNSAFE_IN_JSON = re.compile(f"[{STEERING}]")


# ---- JSON -----------------------------------------------------------------------------------------------------------


def as_json(result: Result) -> str:
    """Return a result as one JSON object; what a terminal might obey is escaped, so that it means the same."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


# ---- JUnit ----------------------------------------------------------------------------------------------------------


def as_junit(result: Result) -> str:
    """Return a JUnit file with one test case per objective, as Jenkins, GitLab and others read it.

    A breach is a failure, missing evidence an error, a waiver a skipped test; a doubt passes with its warning in
    `system-out`, and is an error where the check is strict.
    """
    from xml.etree import ElementTree

    result = harmless(result)
    objectives = result["objectives"]
    outcomes = [_outcome(objective, result["strict"]) for objective in objectives]
    counts = {
        "tests": str(len(objectives)),
        "failures": str(outcomes.count("failure")),
        "errors": str(outcomes.count("error")),
        "skipped": str(outcomes.count("skipped")),
        "time": "0",
    }
    suites = ElementTree.Element("testsuites", {"name": "chimera slo check", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": title(result), **counts})
    _properties(suite, _suite_properties(result))
    for objective, outcome in zip(objectives, outcomes, strict=True):
        _test_case(suite, objective, outcome, result["profile"])
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suites, encoding="unicode")


def _outcome(objective: Result, strict: bool) -> str | None:
    if objective["verdict"] == "inconclusive" and strict:
        return "error"
    return {"fail": "failure", "unmeasured": "error", "waived": "skipped"}.get(objective["verdict"])


def _test_case(suite: Any, objective: Result, outcome: str | None, profile: str) -> None:
    from xml.etree.ElementTree import SubElement

    case = SubElement(suite, "testcase", {"classname": f"chimera.slo.{profile}", "name": objective["id"], "time": "0"})
    _properties(case, _case_properties(objective))
    lines = [*map(condition_line, objective["conditions"]), *notes(objective)]
    if outcome is not None:
        message = objective["reason"] or objective["verdict"]
        SubElement(case, outcome, {"message": message, "type": objective["verdict"]}).text = "\n".join(lines)
    else:
        SubElement(case, "system-out").text = "\n".join(lines)


def _properties(parent: Any, pairs: Sequence[tuple[str, Any]]) -> None:
    from xml.etree.ElementTree import SubElement

    properties = SubElement(parent, "properties")
    for name, value in pairs:
        if value is not None:
            SubElement(properties, "property", {"name": name, "value": str(value)})


def _suite_properties(result: Result) -> list[tuple[str, Any]]:
    pairs = [(name, result[name]) for name in ("schema_version", "run", "slo", "profile", "checked_on", "verdict")]
    pairs += [("pack", result["pack"].get("name")), ("command", result["command"])]
    pairs += [("remark", remark) for remark in result["remarks"]]
    return pairs + [("waiver", waiver["words"]) for waiver in result["waivers"]]


def _case_properties(objective: Result) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = [(name, objective[name]) for name in ("title", "verdict", "run")]
    for condition in objective["conditions"]:
        name, summary = condition["figure"], condition["summary"] or {}
        pairs += [(f"{name}.{key}", condition[key]) for key in ("value", "statistic", "comparison", "limit", "margin")]
        pairs += [(f"{name}.{key}", summary.get(key)) for key in ("mean", "std", "n")]
        low, high = condition["interval"] or (None, None)
        pairs += [(f"{name}.low", low), (f"{name}.high", high)]
    pairs += [("file", file) for file in objective["files"]]
    return pairs + ([("waiver", objective["waiver"]["words"])] if objective["waiver"] else [])


def as_markdown(result: Result) -> str:
    """Return the verdicts as a Markdown table with notes below it, for a job summary or a pull request."""
    # Only this format pays for the import of the renderer.
    from chimera_cli.services.slo_markdown import render_check

    return render_check(result)


# ---- GitHub Actions -------------------------------------------------------------------------------------------------


def as_github(result: Result) -> str:
    """Return workflow commands that annotate a run of GitHub Actions: one line per remark, waiver and objective.

    What makes the check leave with another code than 0 is an error, a doubt or a waiver a warning, the rest a notice.
    Source: GitHub documentation, Workflow commands for GitHub Actions.
    """
    result = harmless(result)
    lines = [_command("notice", "SLO check", remark) for remark in result["remarks"]]
    lines += [_command("warning", "SLO waiver", waiver["words"]) for waiver in result["waivers"]]
    for objective in result["objectives"]:
        text = [objective["title"], *map(condition_line, objective["conditions"]), *notes(objective)]
        heading = f"SLO {objective['id']}: {objective['verdict']}"
        lines.append(_command(_level(objective, result["strict"]), heading, "\n".join(text)))
    return "\n".join(lines)


def _level(objective: Result, strict: bool) -> str:
    if _outcome(objective, strict) in ("failure", "error"):
        return "error"
    return "notice" if objective["verdict"] == "pass" else "warning"


def _command(level: str, heading: str, message: str) -> str:
    """Return one workflow command, escaped as the runner unescapes it (actions/toolkit, packages/core, command.ts)."""
    text = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    name = heading.replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{text}"


FORMATS: Mapping[str, Callable[[Result], str]] = {
    "json": as_json,
    "junit": as_junit,
    "markdown": as_markdown,
    "github": as_github,
}
