"""`chimera slo plan`: the next contingency step for a breach, which were taken before, and applying one."""

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from chimera_cli.config import SanityConfig, TrainConfig, load_config, read_yaml
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.figures import FIGURES, format_value
from chimera_cli.runs import Group
from chimera_cli.services.runs import status_of
from chimera_cli.services.slo import (
    Judgement,
    command_of,
    default_slo_path,
    heading,
    judge_run,
    judged_figures,
    load_slos,
    measure_command,
    placeholders,
    shown_path,
    slo_file,
    validate_config,
)
from chimera_cli.slo.contingency import (
    changed,
    fill,
    holds,
    more_seeds,
    option,
    planned,
    resolve,
    same_command,
    with_plan,
    with_seeds,
)
from chimera_cli.slo.evidence import Subject, evidence_of, pack_of
from chimera_cli.slo.objectives import Action, Objective
from chimera_cli.slo.verdicts import Finding, Verdict, judge, worst_of
from chimera_cli.slo.words import limit_words

# ---- applying -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanStep:
    """A step of the contingency plan by its full `name`, OBJECTIVE/ACTION."""

    objective: Objective
    action: Action

    @property
    def name(self) -> str:
        return f"{self.objective.id}/{self.action.id}"


def find_steps(slo_path: Path | None, names: Sequence[str], kind: Literal["train", "sanity"]) -> tuple[PlanStep, ...]:
    """Return the steps that `names` mean, OBJECTIVE/ACTION or the ACTION alone where it is the only one of its name.

    Raises UsageError for an unknown or ambiguous name, and for a step that is no change of a config of this kind.
    """
    if not names:
        return ()
    path = slo_file(slo_path) if slo_path else default_slo_path()
    slos = load_slos(path)
    steps = [PlanStep(objective, action) for objective in slos.objectives for action in objective.actions]
    return tuple(_step_named(name, steps, path, kind) for name in names)


def _step_named(name: str, steps: Sequence[PlanStep], path: Path, kind: str) -> PlanStep:
    named = [step for step in steps if name in (step.name, step.action.id)]
    if not named:
        known = [*dict.fromkeys([*(step.name for step in steps), *(step.action.id for step in steps)])]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"the steps are {', '.join(step.name for step in steps)}"
        raise UsageError(f"--plan {name!r} is no step of the contingency plan in {path}", hint)
    fitting = [step for step in named if step.objective.kind == kind and step.action.keys]
    if len({step.name for step in fitting}) > 1:
        raise UsageError(f"--plan {name!r} may be {' or '.join(step.name for step in fitting)}", "give the full name")
    if fitting:
        return fitting[0]
    other = named[0]
    if other.action.command is not None:
        raise UsageError(f"{other.name} changes no config, it is a command", f"it is: {other.action.command}")
    raise UsageError(f"{other.name} is about a {other.objective.kind} run, not a {kind} run", "choose another step")


def settings_of(steps: Sequence[PlanStep], config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the values that the steps give config keys together, one after the other, in a whole `config`.

    Without one, bounds are taken as they are. Raises UsageError for a step that multiplies what the config lacks.
    """
    settings: dict[str, Any] = {}
    for step in steps:
        found = resolve(step.action, changed(config or {}, settings))
        unknown = [key for key in step.action.keys if key not in found]
        if unknown:
            raise UsageError(f"{step.name} multiplies {unknown[0]}, which has no value", "give the key a number")
        settings |= found
    return settings


_NOT_POSSIBLE = "not possible here"

# ---- what was tried -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attempt:
    """How a step was taken: the `run` that shows it, where there is one, and `how` in words."""

    action: Action
    run: str | None
    how: str


def attempts(verdict: Verdict, subject: Subject) -> dict[str, Attempt | None]:
    """Return for each action of an objective, in its order, how it was taken already; None where it was not."""
    values, config = placeholders(subject), config_of(_group_of(verdict, subject))
    found: dict[str, Attempt | None] = {}
    for action in verdict.objective.actions:
        if action.command is not None:
            found[action.id] = _tried_command(action, fill(action.command, values), subject)
        else:
            found[action.id] = _tried_settings(verdict, action, subject, config)
    return found


def _tried_settings(verdict: Verdict, action: Action, subject: Subject, config: Mapping[str, Any]) -> Attempt | None:
    """Settings are taken when a finished run of the lineage recorded the step, or the run itself holds them all."""
    name = f"{verdict.objective.id}/{action.id}"
    group = _group_of(verdict, subject)
    # The oldest one: later runs carry the step along.
    run = next((one.name for one in reversed(lineage(verdict, subject)) if name in recorded_steps(one)), None)
    if run is not None:
        return Attempt(action, run, f"--plan {name} in {run}")
    if holds(action, config):
        return Attempt(action, group.name, f"the config of {group.name} has it")
    problem = _refusal(verdict.objective, action, config)
    return None if problem is None else Attempt(action, None, f"{_NOT_POSSIBLE}: {problem}")


def _refusal(objective: Objective, action: Action, config: Mapping[str, Any]) -> str | None:
    """Return why a config, that holds by itself, would be refused with the settings of an action; None if it isn't."""
    if not config:
        return None
    try:
        validate_config(objective, config, "the config")
    except UsageError:
        # Of another state of the source code: nothing can be said.
        return None
    try:
        validate_config(objective, changed(config, resolve(action, config)), name := "the step")
    except UsageError as error:
        return error.message.removeprefix(f"{name}: ")
    return None


def _tried_command(action: Action, command: str, subject: Subject) -> Attempt | None:
    """A command is taken when it was run; one that prepares a pack, which leaves no run, when the pack is there."""
    run = next((one.name for one in subject.groups if same_command(command_of(one), command)), None)
    if run is not None:
        return Attempt(action, run, f"it was run as {run}")
    pack = option(command, "--name") if command.startswith("chimera data prepare") else None
    if pack is not None and (subject.home / "data" / pack / "manifest.json").is_file():
        return Attempt(action, None, f"the pack {pack} is there")
    return None


def recorded_steps(group: Group) -> tuple[str, ...]:
    """Return the contingency steps that a group was made with, OBJECTIVE/ACTION each."""
    plan = group.facts.get("plan")
    if not isinstance(plan, Mapping):
        return ()
    before = plan.get("before")
    earlier = [str(step) for step in before] if isinstance(before, list) else []
    return (*earlier, f"{plan.get('objective')}/{plan.get('action')}")


def lineage(verdict: Verdict, subject: Subject) -> list[Group]:
    """Return the finished runs that tried to meet the same law with the same recipe, pack and hardware, newest first.

    What another recipe, set or machine was tried with says nothing about this one. The source code may differ: the
    plan would otherwise begin anew with every change of it.
    """
    group = _group_of(verdict, subject)

    def identity(one: Group) -> tuple[Any, ...]:
        recipe = option(command_of(one), "--config")
        return one.kind, recipe, pack_of(one).get("fingerprint"), one.facts.get("hardware")

    if group.combines:
        return [group]
    same = identity(group)
    return [one for one in subject.groups if one.status == "finished" and identity(one) == same]


def _group_of(verdict: Verdict, subject: Subject) -> Group:
    return verdict.evidence.group or subject.group


def config_of(group: Group) -> dict[str, Any]:
    """Return the whole config of a group's first seed; empty where it has none that can be read.

    Keys that came later have their defaults: that is what the run was made with.
    """
    path = group.seed_dir(group.seeds[0]) / "config.yaml" if group.seeds else group.path
    if not path.is_file():
        return {}
    try:
        return load_config(SanityConfig if group.kind == "sanity" else TrainConfig, path).model_dump()
    except ChimeraError:
        pass
    try:
        # Of another state of the source code, which had keys that this one lacks.
        return read_yaml(path)
    except ChimeraError:
        return {}


# ---- how far it came ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reached:
    """What a run of the lineage made of an objective."""

    group: Group
    verdict: Verdict

    @property
    def worst_margin(self) -> float:
        """The smallest distance to a limit as a share of it, negative where it is missed."""
        margins = [_relative_margin(finding) for finding in self.verdict.findings]
        return min(margins, default=float("-inf"))


def reached(verdict: Verdict, subject: Subject) -> list[Reached]:
    """Return what each run of the lineage reached, the best first; those without the evidence are left out."""
    objective = verdict.objective
    runs = []
    for group in lineage(verdict, subject):
        evidence = evidence_of(objective, subject.home, group, group.seeds)
        if evidence.missing is None:
            runs.append(Reached(group, judge(objective, evidence, None, date.min)))
    return sorted(runs, key=lambda run: run.worst_margin, reverse=True)


def _relative_margin(finding: Finding) -> float:
    if finding.margin is None or finding.limit is None:
        return float("-inf")
    return finding.margin / max(abs(finding.limit), 1e-12)


def missed_words(verdict: Verdict) -> str:
    """Return what a run misses and by how much: `image to text R@10 21.3 %, ≥ 25.0 % is demanded (3.7 points away)`."""
    parts = []
    for finding in verdict.findings:
        name = finding.condition.figure
        if finding.word != "fail" or finding.margin is None:
            continue
        distance = format_value(name, abs(finding.margin))
        if FIGURES[name].kind == "share":
            distance = f"{100 * abs(finding.margin):.1f} points"
        value, limit = format_value(name, finding.value), limit_words(finding.condition, finding.limit)
        parts.append(f"{FIGURES[name].label} {value}, {limit} is demanded ({distance} away)")
    return "; ".join(parts)


# ---- plan -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next: in words, and as a command where one does it; `action` is the step of the table."""

    kind: Literal["contingency", "measure", "more-seeds", "exhausted", "none"]
    words: str
    command: str | None = None
    action: Action | None = None
    remaining: tuple[str, ...] = ()


def plan(
    home: Path, run: str = "latest", slo_path: Path | None = None, profile: str = "gpu", today: date | None = None
) -> dict[str, Any]:
    """Return the next contingency step for the first law that a run breaks, as JSON takes it.

    Without a breach: the command that measures what is unmeasured, else more seeds for what is inconclusive. A law
    whose steps are all taken is a NO-GO, told with the best that was reached.
    """
    judgement = judge_run(home, run, slo_path, profile, today)
    verdict, step = _next_step(judgement)
    tried = {} if verdict is None else attempts(verdict, judgement.subject)
    return heading(judgement) | {
        "figures": {} if verdict is None else judged_figures([verdict]),
        "objective": None if verdict is None else verdict.objective.id,
        "verdict": worst_of([one.word for one in judgement.verdicts]),
        "reason": "" if verdict is None else verdict.reason,
        "step": step.kind,
        "do": step.words,
        "action": None if step.action is None else step.action.id,
        "sets": {} if verdict is None else _sets(verdict, step, judgement.subject),
        "tried": [{"action": one.action.id, "run": one.run, "how": one.how} for one in tried.values() if one],
        "remaining": list(step.remaining),
        "command": step.command,
        "exhausted": [one.objective.id for one in _exhausted(judgement)],
    }


def _sets(verdict: Verdict, step: Step, subject: Subject) -> dict[str, Any]:
    """Return the values that a step gives the config of the run that it is for."""
    return {} if step.action is None else resolve(step.action, config_of(_group_of(verdict, subject)))


def _exhausted(judgement: Judgement) -> list[Verdict]:
    """Return the breaches against which no step is left."""
    failed = [verdict for verdict in judgement.verdicts if verdict.word == "fail"]
    return [verdict for verdict in failed if None not in attempts(verdict, judgement.subject).values()]


def _next_step(judgement: Judgement) -> tuple[Verdict | None, Step]:
    """Return the verdict that asks for something first, and what: breaches, then gaps, then doubts."""
    subject = judgement.subject
    failed = [one for one in judgement.verdicts if one.word == "fail"]
    for verdict in failed:
        step = _contingency(verdict, judgement)
        if step is not None:
            return verdict, step
    if failed:
        return failed[0], Step("exhausted", no_go_words(failed[0], subject))
    for verdict in judgement.verdicts:
        if verdict.word == "unmeasured":
            return verdict, _measurement(verdict, judgement)
    for verdict in judgement.verdicts:
        if verdict.word == "inconclusive" and verdict.evidence.group is not None:
            return verdict, _widening(verdict.evidence.group)
    return None, Step("none", _content_words(judgement))


def _widening(group: Group) -> Step:
    """Return the command of a group with two seeds more; where the group does not say its command, there is none."""
    words = "Two more seeds narrow the interval."
    if group.combines:
        return Step("more-seeds", f"{words} Train its members with them, and combine these again.")
    if not command_of(group):
        return Step("more-seeds", f"{words} The command of {group.name} is not recorded: repeat it with them.")
    seeds = more_seeds(group.seeds, len(group.seeds) + 2)
    return Step("more-seeds", words, with_seeds(command_of(group), seeds))


def _content_words(judgement: Judgement) -> str:
    """Return that there is nothing to do; what is only waived is named with its last day."""
    waived = [
        f"{one.objective.id} (waived until {one.waiver.expires.isoformat()})"
        for one in judgement.verdicts
        if one.word == "waived" and one.waiver is not None
    ]
    if waived:
        return f"Every objective is met or waived: {', '.join(waived)}; there is nothing to do until then."
    return "Every objective is met; there is nothing to do."


def no_go_words(verdict: Verdict, subject: Subject) -> str:
    """Return why a breach is final: every step was taken, and the best run still misses by so much."""
    count = len(verdict.objective.actions)
    steps = f"all {count} steps of its contingency plan are taken" if count else "it has no contingency plan"
    if any(one is not None and one.how.startswith(_NOT_POSSIBLE) for one in attempts(verdict, subject).values()):
        steps += f" or {_NOT_POSSIBLE}"
    runs = reached(verdict, subject)
    best = f" The best of {len(runs)} runs, {runs[0].group.name}, has {missed_words(runs[0].verdict)}." if runs else ""
    if runs and runs[0].verdict.word != "fail":
        best = f" {runs[0].group.name} met it: go back to its recipe ({command_of(runs[0].group)})."
    change = "Change the recipe or the law's owner waives the breach."
    return f"NO-GO: {verdict.objective.id} is missed and {steps}.{best} {change}"


def _contingency(verdict: Verdict, judgement: Judgement) -> Step | None:
    """Return the first step of an objective's table that was not taken yet; None where all were."""
    subject, group = judgement.subject, _group_of(verdict, judgement.subject)
    tried = attempts(verdict, subject)
    left = [action for action in verdict.objective.actions if tried[action.id] is None]
    if not left:
        return None
    first, rest = left[0], tuple(action.id for action in left[1:])
    if group.combines and first.command is None:
        words = "take a step with its members (`chimera slo plan --run MEMBER`), and combine these again"
        return Step("contingency", f"{group.name} was combined: {words}.")
    if first.command is not None:
        return Step("contingency", first.do, fill(first.command, placeholders(subject)), first, rest)
    return Step("contingency", first.do, step_command(verdict.objective, first, group, judgement), first, rest)


def step_command(objective: Objective, action: Action, group: Group, judgement: Judgement) -> str | None:
    """Return the command that repeats a group with one more step of the plan; earlier steps stay in force.

    None for a group that was combined: its members take the step.
    """
    if group.combines:
        return None
    command = command_of(group) or fill(objective.measure, placeholders(judgement.subject))
    steps = [*planned(command), f"{objective.id}/{action.id}"]
    planning = with_plan(command, [*dict.fromkeys(steps)])
    default = judgement.path.resolve() == default_slo_path().resolve()
    if default or option(planning, "--slo") is not None:
        return planning
    return f"{planning} --slo {shlex.quote(shown_path(judgement.path))}"


def _measurement(verdict: Verdict, judgement: Judgement) -> Step:
    objective, subject = verdict.objective, judgement.subject
    command = measure_command(objective, judgement, verdict.evidence)
    if command is None and verdict.evidence.again and subject.group.combines:
        seeds = f"{objective.seeds_at_least} seeds" if objective.seeds_at_least > 1 else "a seed"
        return Step("measure", f"Train its members with one state of the source and {seeds}, and combine these again.")
    if command is None:
        machine = objective.hardware.upper()
        return Step("measure", f"Measure it on a machine with a {machine}, or check with the other --profile.")
    if verdict.evidence.again and status_of(subject.group) == "running":
        return Step("measure", "Wait until the run has finished.", command)
    return Step("measure", "Measure what is missing.", command)
