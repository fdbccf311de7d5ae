"""`chimera slo check --explain`: one verdict with all that it rests on, and what can be done about it."""

import difflib
import shlex
from datetime import date
from pathlib import Path
from typing import Any

from chimera_cli.errors import UsageError
from chimera_cli.services.slo import (
    Judgement,
    command_of,
    exit_code,
    heading,
    judge_run,
    judged_figures,
    objective_facts,
    own_command,
    placeholders,
    shown_path,
)
from chimera_cli.services.slo_plan import Attempt, Reached, attempts, config_of, reached, recorded_steps, step_command
from chimera_cli.slo.contingency import fill, resolve
from chimera_cli.slo.explanation import explain
from chimera_cli.slo.objectives import Action
from chimera_cli.slo.verdicts import Verdict
from chimera_cli.slo.words import measured_words


def explain_objective(
    home: Path,
    name: str,
    run: str = "latest",
    slo_path: Path | None = None,
    profile: str = "gpu",
    strict: bool = False,
    today: date | None = None,
) -> dict[str, Any]:
    """Return one verdict explained, as JSON takes it: formulas, samples with their files, steps, commands and plan.

    The `exit_code` is that of this objective alone. Raises UsageError for an objective that the profile does not judge.
    """
    judgement = judge_run(home, run, slo_path, profile, today)
    verdict = _named(judgement, name)
    evidence = verdict.evidence
    return heading(judgement) | {
        "verdict": verdict.word,
        "exit_code": int(exit_code(verdict.word, strict)),
        "figures": judged_figures([verdict]),
        "objective": objective_facts(verdict, judgement),
        "conditions": [explain(finding, evidence) for finding in verdict.findings],
        "reproduce": _reproduce(verdict, judgement),
        "command": f"{own_command(judgement)} --explain {shlex.quote(name)}",
        "contingency": _contingency(verdict, judgement),
    }


def _named(judgement: Judgement, name: str) -> Verdict:
    found = next((verdict for verdict in judgement.verdicts if verdict.objective.id == name), None)
    if found is not None:
        return found
    names = [verdict.objective.id for verdict in judgement.verdicts]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the objectives are {', '.join(names)}"
    where = f"{shown_path(judgement.path)}, profile {judgement.profile}"
    raise UsageError(f"there is no objective {name!r} in {where}", hint)


def _reproduce(verdict: Verdict, judgement: Judgement) -> list[str]:
    """Return the commands that make the evidence again, in their order; the missing evidence where there is none."""
    objective, group = verdict.objective, verdict.evidence.group
    measure = fill(objective.measure, placeholders(judgement.subject))
    if group is None:
        command = objective_facts(verdict, judgement)["measure"]
        return [str(command)] if command else []
    made = [command for command in (command_of(group),) if command]
    return [*made, measure] if objective.split is not None else made or [measure]


def _contingency(verdict: Verdict, judgement: Judgement) -> list[dict[str, Any]]:
    """Return every step of the plan: what it changes, how it was taken already, and what the runs with it reached."""
    subject = judgement.subject
    runs, tried = reached(verdict, subject), attempts(verdict, subject)
    return [_step_facts(verdict, action, tried[action.id], runs, judgement) for action in verdict.objective.actions]


def _step_facts(
    verdict: Verdict, action: Action, attempt: Attempt | None, runs: list[Reached], judgement: Judgement
) -> dict[str, Any]:
    objective, subject = verdict.objective, judgement.subject
    name = f"{objective.id}/{action.id}"
    group = verdict.evidence.group or subject.group
    command: str | None
    if action.command is not None:
        command = fill(action.command, placeholders(subject))
    else:
        command = step_command(objective, action, group, judgement)
    # A run that a command left, or one that recorded the step; the settings of many runs were never a step.
    with_it = [run for run in runs if name in recorded_steps(run.group) or (attempt and run.group.name == attempt.run)]
    return {
        "step": name,
        "do": action.do,
        "sets": resolve(action, config_of(group)),
        "command": command,
        "tried": None if attempt is None else attempt.how,
        "reached": [
            {
                "run": run.group.name,
                "verdict": run.verdict.word,
                "measured": "; ".join(measured_words(finding) for finding in run.verdict.findings),
                "figures": judged_figures([run.verdict]),
            }
            for run in with_it
        ],
    }
