"""`chimera slo`: a run before the law, and the next contingency step where it breaks one."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

from chimera_cli.config import SanityConfig, TrainConfig, read_yaml, validate
from chimera_cli.errors import ExitCode, UsageError
from chimera_cli.figures import FIGURES
from chimera_cli.runs import SCHEMA_VERSION, Group, list_groups, read_json, resolve_run, source_hash
from chimera_cli.slo.contingency import fill, option, untried, with_seeds, with_settings
from chimera_cli.slo.evidence import Subject, device_of, gather, pack_of
from chimera_cli.slo.ladder import TEST_IMAGES, comparable, gaps, next_rung
from chimera_cli.slo.objectives import PROFILES, Action, Objective, Profile, Slos, for_profile, left_out
from chimera_cli.slo.verdicts import Finding, Verdict, Word, judge, worst_of
from chimera_cli.slo.words import evidence_words, law_words, measured_words, over_seeds
from chimera_cli.statistics import Summary, summarise

NOT_THE_LAW = "not the law"


@dataclass(frozen=True, slots=True)
class Judgement:
    """All verdicts on one run, with what the words of a report are made from."""

    subject: Subject
    slos: Slos
    path: Path
    profile: Profile
    verdicts: tuple[Verdict, ...]


# ---- the law --------------------------------------------------------------------------------------------------------


def default_slo_path() -> Path:
    """Return configs/slo.yaml of the current folder, else of the source tree, else of the installed package."""
    package = Path(__file__).parents[1]
    places = [Path("configs"), package.parent / "configs", package / "configs"]
    return next((place / "slo.yaml" for place in places if (place / "slo.yaml").is_file()), places[0] / "slo.yaml")


def load_slos(path: Path) -> Slos:
    """Return the objectives in a YAML file. Raises UsageError naming every wrong key, figure and setting."""
    slos = validate(Slos, read_yaml(path), str(path))
    for number, objective in enumerate(slos.objectives):
        for action in objective.actions:
            _check_settings(objective, action, f"{path}: objectives.{number}.actions.{action.id}")
    return slos


def _check_settings(objective: Objective, action: Action, origin: str) -> None:
    """Refuse a contingency step that the command it is meant for would refuse."""
    if not action.set:
        return
    if objective.kind not in ("train", "sanity"):
        raise UsageError(f"{origin}.set: a {objective.kind} run takes no --set", "give a `command` instead")
    values: dict[str, Any] = (TrainConfig() if objective.kind == "train" else SanityConfig()).model_dump()
    for key, value in action.set.items():
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UsageError(
                    f"{origin}.set: {parent} in {key} holds no keys", "use the dotted path of a config key"
                )
        place[last] = value
    if objective.kind == "train":
        validate(TrainConfig, values, f"{origin}.set")
    else:
        validate(SanityConfig, values, f"{origin}.set")


# ---- check ----------------------------------------------------------------------------------------------------------


def check(
    home: Path,
    run: str = "latest",
    slo_path: Path | None = None,
    profile: str = "gpu",
    strict: bool = False,
    today: date | None = None,
) -> dict[str, Any]:
    """Return the verdicts on a run as JSON takes them, with the `exit_code` they ask for.

    `objectives` hold per law the words of a table (`law`, `measured`, `verdict`, `evidence`, `reason`) and the numbers
    behind them; `remarks` are sentences that every output must carry. Raises UsageError for a run, file or profile that
    is not there.
    """
    judgement = judge_run(home, run, slo_path, profile, today)
    group = judgement.subject.group
    word = worst_of([verdict.word for verdict in judgement.verdicts])
    return {
        "schema_version": SCHEMA_VERSION,
        "run": group.name,
        "seeds": list(judgement.subject.seeds),
        "pack": dict(pack_of(group)),
        "slo": str(judgement.path),
        "law": judgement.slos.law,
        "profile": judgement.profile,
        "left_out": list(left_out(judgement.slos, judgement.profile)),
        "remarks": remarks(judgement),
        "verdict": word,
        "exit_code": int(_exit_code(word, strict)),
        "figures": _judged_figures(judgement.verdicts),
        "objectives": [_objective_facts(verdict, judgement.subject) for verdict in judgement.verdicts],
        "ladder": _ladder(judgement.subject),
        "command": _own_command(judgement),
    }


def judge_run(home: Path, run: str, slo_path: Path | None, profile: str, today: date | None = None) -> Judgement:
    """Return the verdicts of all objectives of a profile on a run, in the order of the file."""
    if profile not in PROFILES:
        raise UsageError(f"there is no profile {profile!r}", f"the profiles are {', '.join(PROFILES)}")
    path = slo_path or default_slo_path()
    slos = load_slos(path)
    chosen: Profile = "cpu" if profile == "cpu" else "gpu"
    objectives = for_profile(slos, chosen)
    if not objectives:
        raise UsageError(f"{path} has no objective for the profile {profile}", "choose another --profile or --slo")
    group, seed = resolve_run(home, run)
    if group.kind != "train":
        raise UsageError(
            f"{group.name} is a {group.kind} run", "name a train run; its proof of life is found by itself"
        )
    subject = Subject(home, group, group.seeds if seed is None else (seed,))
    waivers = {waiver.objective: waiver for waiver in slos.waivers}
    day = today or datetime.now(UTC).date()
    verdicts = tuple(judge(one, gather(one, subject), waivers.get(one.id), day) for one in objectives)
    return Judgement(subject, slos, path, chosen, verdicts)


def remarks(judgement: Judgement) -> list[str]:
    """Return what every output must say beside the verdicts."""
    found = [] if judgement.slos.law else [f"{NOT_THE_LAW}: {judgement.path} checks the plumbing alone"]
    omitted = left_out(judgement.slos, judgement.profile)
    if omitted:
        labels = ", ".join(FIGURES[name].label for name in omitted)
        found.append(f"profile {judgement.profile}: {labels} left out")
    made_with = judgement.subject.group.facts.get("source_hash")
    if made_with and made_with != source_hash():
        found.append("the run was made with another state of the source code than this one")
    return found


def _exit_code(word: Word, strict: bool) -> ExitCode:
    codes = {"fail": ExitCode.BREACHED, "unmeasured": ExitCode.UNMEASURED}
    if strict and word == "inconclusive":
        return ExitCode.UNMEASURED
    return codes.get(word, ExitCode.OK)


def _own_command(judgement: Judgement) -> str:
    words = ["chimera slo check --run latest", f"--slo {_shown(judgement.path)}"]
    return " ".join([*words, *(["--profile cpu"] if judgement.profile == "cpu" else [])])


def _shown(path: Path) -> str:
    """Return the path of a shipped file as it is written in the README, any other as it was given."""
    return f"configs/{path.name}" if path.parent.name == "configs" else str(path)


# ---- verdicts in words ----------------------------------------------------------------------------------------------


def _judged_figures(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Return by name what was held against the limits."""
    return {finding.condition.figure: finding.value for verdict in verdicts for finding in verdict.findings}


def _objective_facts(verdict: Verdict, subject: Subject) -> dict[str, Any]:
    objective, evidence, waiver = verdict.objective, verdict.evidence, verdict.waiver
    return {
        "id": objective.id,
        "title": objective.title,
        "verdict": verdict.word,
        "reason": verdict.reason,
        "law": "; ".join(law_words(finding) for finding in verdict.findings),
        "measured": "; ".join(measured_words(finding) for finding in verdict.findings),
        "evidence": evidence_words(evidence),
        "measure": _measure_command(objective, subject) if verdict.word == "unmeasured" else None,
        "conditions": [_condition_facts(finding) for finding in verdict.findings],
        "beside": [
            {"figure": one.figure, "target": one.target, "summary": _summary(over_seeds(evidence, one.figure))}
            for one in objective.beside
        ],
        "run": evidence.group.name if evidence.group else None,
        "files": list(evidence.files),
        "seeds": list(evidence.seeds),
        "waiver": None if waiver is None else waiver.model_dump(mode="json"),
    }


def _condition_facts(finding: Finding) -> dict[str, Any]:
    condition = finding.condition
    return {
        "figure": condition.figure,
        "label": FIGURES[condition.figure].label,
        "comparison": condition.comparison,
        "limit": finding.limit if condition.relative_to else condition.limit,
        "relative_to": condition.relative_to,
        "statistic": condition.statistic,
        "target": condition.target,
        "verdict": finding.word,
        "reason": finding.reason,
        "value": finding.value,
        "margin": finding.margin,
        "summary": _summary(finding.summary),
        "law": law_words(finding),
        "measured": measured_words(finding),
    }


def _summary(summary: Summary | None) -> dict[str, Any] | None:
    return None if summary is None else summary.as_dict()


def _placeholders(subject: Subject) -> dict[str, str]:
    """Return what the commands of the law leave open, from the run itself."""
    group, pack = subject.group, pack_of(subject.group)
    return {
        "run": group.name,
        "pack": str(pack.get("name", "flickr8k")),
        "source": str(pack.get("source", "flickr8k")),
        "config": option(_command_of(group), "--config") or "configs/train/locked.yaml",
        "seeds": ",".join(str(seed) for seed in group.seeds),
        "device": "cuda" if device_of(group) == "gpu" else "cpu",
    }


def _command_of(group: Group) -> str:
    return str(group.facts.get("command", ""))


def _measure_command(objective: Objective, subject: Subject) -> str | None:
    """Return the command that would make the missing evidence; None where another machine has to."""
    group = subject.group
    if objective.hardware not in ("any", device_of(group)):
        return None
    if objective.pack not in (None, pack_of(group).get("source")):
        config = _placeholders(subject)["config"]
        return shlex.join(
            ["chimera", "train", "full", "--config", config, "--data", str(objective.pack), "--seeds", "0,1,2"]
        )
    if objective.kind == group.kind and (
        group.status != "finished" or max(len(subject.seeds), len(group.seeds)) < objective.seeds_at_least
    ):
        return with_seeds(_command_of(group), range(max(objective.seeds_at_least, len(group.seeds))))
    if objective.kind == group.kind and len(subject.seeds) < objective.seeds_at_least:
        return f"chimera slo check --run {shlex.quote(group.name)}"
    return fill(objective.measure, _placeholders(subject))


# ---- ladder ---------------------------------------------------------------------------------------------------------


def _ladder(subject: Subject) -> dict[str, Any] | None:
    """Return where the run stands on the ladder; None where it has no test figures that may stand beside it."""
    pack = pack_of(subject.group)
    name = f"{pack.get('name')}-test.json"
    paths = [subject.group.seed_dir(seed) / "evaluations" / name for seed in subject.seeds]
    if not paths or not all(path.exists() for path in paths):
        return None
    documents = [read_json(path) for path in paths]
    fitting = [
        comparable(str(pack.get("source")), "test", int(document.get("images") or 0))
        and (document.get("pack") or {}).get("fingerprint") == pack.get("fingerprint")
        for document in documents
    ]
    if not all(fitting):
        return None
    figures = _mean_figures([document.get("figures") or {} for document in documents])
    rung = next_rung(figures)
    return {
        "figures": figures,
        "images": TEST_IMAGES,
        "next": None if rung is None else {"id": rung.id, "name": rung.name, "source": rung.source},
        "gaps": {} if rung is None else gaps(rung, figures),
    }


def _mean_figures(documents: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [
        name for name in documents[0] if all(isinstance(document.get(name), int | float) for document in documents)
    ]
    return {name: summarise([float(document[name]) for document in documents]).mean for name in names}


# ---- plan -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next: in words, and as a command where one does it."""

    kind: Literal["contingency", "measure", "more-seeds", "exhausted", "none"]
    words: str
    command: str | None = None
    action: str | None = None
    remaining: tuple[str, ...] = ()


def plan(
    home: Path, run: str = "latest", slo_path: Path | None = None, profile: str = "gpu", today: date | None = None
) -> dict[str, Any]:
    """Return the next contingency step for the first law that a run breaks, as JSON takes it.

    Without a breach: the command that measures what is unmeasured, else more seeds for what is inconclusive.
    """
    judgement = judge_run(home, run, slo_path, profile, today)
    verdict, step = _next_step(judgement)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": judgement.subject.group.name,
        "slo": str(judgement.path),
        "law": judgement.slos.law,
        "profile": judgement.profile,
        "remarks": remarks(judgement),
        "figures": {} if verdict is None else _judged_figures([verdict]),
        "objective": None if verdict is None else verdict.objective.id,
        "verdict": worst_of([one.word for one in judgement.verdicts]),
        "reason": "" if verdict is None else verdict.reason,
        "step": step.kind,
        "do": step.words,
        "action": step.action,
        "remaining": list(step.remaining),
        "command": step.command,
    }


def _next_step(judgement: Judgement) -> tuple[Verdict | None, Step]:
    """Return the verdict that asks for something first, and what: breaches, then gaps, then doubts."""
    subject = judgement.subject
    failed = [one for one in judgement.verdicts if one.word == "fail"]
    for verdict in failed:
        step = _contingency(verdict, subject)
        if step is not None:
            return verdict, step
    if failed:
        words = "Every step of the contingency plan has been taken; change the recipe, or somebody waives the breach."
        return failed[0], Step("exhausted", words)
    for verdict in judgement.verdicts:
        if verdict.word == "unmeasured":
            return verdict, _measurement(verdict.objective, subject)
    for verdict in judgement.verdicts:
        if verdict.word == "inconclusive" and verdict.evidence.group is not None:
            seeds = range(len(verdict.evidence.seeds) + 2)
            command = with_seeds(_command_of(verdict.evidence.group), seeds)
            return verdict, Step("more-seeds", "Two more seeds narrow the interval.", command)
    return None, Step("none", "Every objective is met; there is nothing to do.")


def _contingency(verdict: Verdict, subject: Subject) -> Step | None:
    """Return the first step of an objective's table that was not taken yet; None where all were."""
    group = verdict.evidence.group or subject.group
    ran = [_command_of(other) for other in list_groups(subject.home)]
    values = _placeholders(subject)
    left = untried(verdict.objective.actions, _config_of(group), ran, values)
    if not left:
        return None
    first, rest = left[0], tuple(action.id for action in left[1:])
    if first.command is not None:
        return Step("contingency", first.do, fill(first.command, values), first.id, rest)
    return Step("contingency", first.do, with_settings(_command_of(group), first.set), first.id, rest)


def _measurement(objective: Objective, subject: Subject) -> Step:
    command = _measure_command(objective, subject)
    if command is None:
        machine = objective.hardware.upper()
        return Step("measure", f"Measure it on a machine with a {machine}, or check with the other --profile.")
    return Step("measure", "Measure what is missing.", command)


def _config_of(group: Group) -> dict[str, Any]:
    """Return the resolved config of a group's first seed; empty where it has none."""
    path = group.seed_dir(group.seeds[0]) / "config.yaml" if group.seeds else group.path
    return read_yaml(path) if path.is_file() else {}
