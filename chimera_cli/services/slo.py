"""`chimera slo check`: a run before the law."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from chimera_cli.config import SanityConfig, TrainConfig, read_yaml, validate
from chimera_cli.errors import ChimeraError, ExitCode, UsageError
from chimera_cli.figures import FIGURES
from chimera_cli.runs import Group, list_groups, read_sealed_json, resolve_run, source_hash
from chimera_cli.slo.baseline import baseline_beside
from chimera_cli.slo.contingency import changed, fill, more_seeds, option, resolve, with_seeds
from chimera_cli.slo.evidence import Evidence, Subject, device_of, gather, number, pack_of
from chimera_cli.slo.ladder import TEST_IMAGES, comparable, gaps, next_rung
from chimera_cli.slo.objectives import PROFILES, Action, Objective, Profile, Slos, for_profile, left_out
from chimera_cli.slo.verdicts import Finding, Verdict, Word, judge, worst_of
from chimera_cli.slo.words import (
    evidence_words,
    interval_words,
    law_words,
    measured_words,
    over_seeds,
    sources,
    waiver_facts,
)
from chimera_cli.statistics import Summary, summarise_known

NOT_THE_LAW = "not the law"

# Of the JSON that `slo` prints: keys are only added within a version.
OUTPUT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Judgement:
    """All verdicts on one run, with what the words of a report are made from."""

    subject: Subject
    slos: Slos
    path: Path
    profile: Profile
    today: date
    verdicts: tuple[Verdict, ...]


# ---- the law --------------------------------------------------------------------------------------------------------


def default_slo_path() -> Path:
    """Return configs/slo.yaml of the current folder, else of the source tree, else of the installed package."""
    package = Path(__file__).parents[1]
    places = [Path("configs"), package.parent / "configs", package / "configs"]
    return next((place / "slo.yaml" for place in places if (place / "slo.yaml").is_file()), places[0] / "slo.yaml")


def slo_file(path: Path) -> Path:
    """Return the file that `path` means: `configs/NAME`, as outputs write it, is found outside of the tree too."""
    shipped = default_slo_path().parent / path.name
    return shipped if path.parent == Path("configs") and not path.exists() and shipped.is_file() else path


def load_slos(path: Path) -> Slos:
    """Return the objectives in a YAML file. Raises UsageError naming every wrong key, figure and setting."""
    slos = validate(Slos, read_yaml(slo_file(path)), str(path))
    for place, objective in enumerate(slos.objectives):
        for action in objective.actions:
            _check_settings(objective, action, f"{path}: objectives.{place}.actions.{action.id}")
    return slos


def _check_settings(objective: Objective, action: Action, origin: str) -> None:
    """Refuse a contingency step that the command it is meant for would refuse."""
    if not action.keys:
        return
    if objective.kind not in ("train", "sanity"):
        raise UsageError(f"{origin}: a {objective.kind} run takes no --set", "give a `command` instead")
    defaults = (TrainConfig() if objective.kind == "train" else SanityConfig()).model_dump()
    for key in action.keys:
        place: Any = defaults
        for parent in key.split(".")[:-1]:
            place = place.get(parent, {})
            if not isinstance(place, dict):
                raise UsageError(f"{origin}: {parent} in {key} holds no keys", "use the dotted path of a config key")
    settings = resolve(action, defaults)
    missing = [key for key in action.scale if key not in settings]
    if missing:
        raise UsageError(f"{origin}.scale: {missing[0]} is no number to be multiplied", "give its value with `set`")
    validate_config(objective, changed(defaults, settings), origin)


def validate_config(objective: Objective, values: Mapping[str, Any], origin: str) -> None:
    """Raise UsageError where a run of the objective's kind would refuse a config, naming every wrong key."""
    if objective.kind == "train":
        validate(TrainConfig, values, origin)
    else:
        validate(SanityConfig, values, origin)


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
    word = worst_of([verdict.word for verdict in judgement.verdicts])
    return heading(judgement) | {
        "left_out": list(left_out(judgement.slos, judgement.profile)),
        "strict": strict,
        "verdict": word,
        "exit_code": int(exit_code(word, strict)),
        "figures": judged_figures(judgement.verdicts),
        "objectives": [objective_facts(verdict, judgement) for verdict in judgement.verdicts],
        "waivers": _waivers(judgement),
        "ladder": _ladder(judgement.subject),
        "command": own_command(judgement),
    }


def heading(judgement: Judgement) -> dict[str, Any]:
    """Return what stands above every output of `slo`: which run was held against what, and what to know of it."""
    subject = judgement.subject
    return {
        "schema_version": OUTPUT_VERSION,
        "run": subject.group.name,
        "seeds": list(subject.seeds),
        "pack": dict(pack_of(subject.group)),
        "slo": shown_path(judgement.path),
        "law": judgement.slos.law,
        "profile": judgement.profile,
        "checked_on": judgement.today.isoformat(),
        "remarks": remarks(judgement),
    }


def judge_run(home: Path, run: str, slo_path: Path | None, profile: str, today: date | None = None) -> Judgement:
    """Return the verdicts of all objectives of a profile on a run, in the order of the file."""
    if profile not in PROFILES:
        raise UsageError(f"there is no profile {profile!r}", f"the profiles are {', '.join(PROFILES)}")
    path = slo_file(slo_path) if slo_path else default_slo_path()
    slos = load_slos(path)
    groups = tuple(list_groups(home))
    group, seed = resolve_run(home, run, groups=groups)
    if group.kind != "train":
        raise UsageError(
            f"{group.name} is a {group.kind} run", "name a train run; its proof of life is found by itself"
        )
    subject = Subject(home, group, group.seeds if seed is None else (seed,), groups)
    return judge_subject(subject, slos, path, "cpu" if profile == "cpu" else "gpu", today)


def judge_subject(subject: Subject, slos: Slos, path: Path, profile: Profile, today: date | None = None) -> Judgement:
    """Return the verdicts on a run that was read already, by objectives that were read from `path`."""
    objectives = for_profile(slos, profile)
    if not objectives:
        raise UsageError(f"{path} has no objective for the profile {profile}", "choose another --profile or --slo")
    waivers = {waiver.objective: waiver for waiver in slos.waivers}
    day = today or datetime.now(UTC).date()
    verdicts = tuple(judge(one, gather(one, subject), waivers.get(one.id), day) for one in objectives)
    return Judgement(subject, slos, path, profile, day, verdicts)


def remarks(judgement: Judgement) -> list[str]:
    """Return what every output must say beside the verdicts."""
    found = [] if judgement.slos.law else [f"{NOT_THE_LAW}: {shown_path(judgement.path)} checks the plumbing alone"]
    omitted = left_out(judgement.slos, judgement.profile)
    if omitted:
        labels = ", ".join(FIGURES[name].label for name in omitted)
        found.append(f"profile {judgement.profile}: {labels} left out")
    made_with = judgement.subject.group.facts.get("source_hash")
    if made_with and made_with != source_hash():
        found.append("the run was made with another state of the source code than this one")
    return found


def exit_code(word: Word, strict: bool) -> ExitCode:
    """Return what a verdict asks the process to leave with; `strict` takes a doubt for a gap."""
    codes = {"fail": ExitCode.BREACHED, "unmeasured": ExitCode.UNMEASURED}
    if strict and word == "inconclusive":
        return ExitCode.UNMEASURED
    return codes.get(word, ExitCode.OK)


def own_command(judgement: Judgement) -> str:
    """Return the command that judges this very run again, whatever is the latest by then."""
    subject = judgement.subject
    seed = f"/seed-{subject.seeds[0]}" if subject.seeds != subject.group.seeds else ""
    return check_command(f"{subject.group.name}{seed}", judgement.path, judgement.profile)


def check_command(run: str, path: Path, profile: Profile) -> str:
    """Return the command that judges a run by a file under a profile."""
    words = ["chimera", "slo", "check", "--run", run, "--slo", shown_path(path)]
    return shlex.join([*words, *(["--profile", "cpu"] if profile == "cpu" else [])])


def shown_path(path: Path) -> str:
    """Return the path of a shipped file as it is written in the README, any other as it was given."""
    shipped = path.resolve().parent == default_slo_path().resolve().parent
    return f"configs/{path.name}" if shipped else str(path)


# ---- verdicts in words ----------------------------------------------------------------------------------------------


def judged_figures(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Return by name what was held against the limits."""
    return {finding.condition.figure: finding.value for verdict in verdicts for finding in verdict.findings}


def objective_facts(verdict: Verdict, judgement: Judgement) -> dict[str, Any]:
    """Return one verdict as JSON takes it: words, numbers, and the files that they come from."""
    objective, evidence, waiver = verdict.objective, verdict.evidence, verdict.waiver
    missing = "unmeasured" in [verdict.word, *(finding.word for finding in verdict.findings)]
    return {
        "id": objective.id,
        "title": objective.title,
        "verdict": verdict.word,
        "reason": verdict.reason,
        "law": "; ".join(law_words(finding) for finding in verdict.findings),
        "measured": "; ".join(measured_words(finding) for finding in verdict.findings),
        "evidence": evidence_words(evidence),
        "measure": measure_command(objective, judgement, evidence) if missing else None,
        "conditions": [_condition_facts(finding, evidence) for finding in verdict.findings],
        "beside": [
            {"figure": one.figure, "target": one.target, "summary": _summary(over_seeds(evidence, one.figure))}
            for one in objective.beside
        ],
        "baseline": baseline_beside(objective, evidence, judgement.subject),
        "run": evidence.group.name if evidence.group else None,
        "files": list(evidence.files),
        "seeds": list(evidence.seeds),
        "waiver": None if waiver is None else waiver_facts(waiver, verdict, judgement.today),
    }


def _condition_facts(finding: Finding, evidence: Evidence) -> dict[str, Any]:
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
        "interval": None if finding.interval is None else list(finding.interval),
        "summary": _summary(finding.summary),
        "law": law_words(finding),
        "measured": measured_words(finding),
        "interval_words": interval_words(finding),
        "sources": sources(evidence, condition.figure),
    }


def _summary(summary: Summary | None) -> dict[str, Any] | None:
    return None if summary is None else summary.as_dict()


def _waivers(judgement: Judgement) -> list[dict[str, Any]]:
    """Return every waiver of the file with its state, those of other profiles too: nobody may overlook one."""
    judged = {verdict.objective.id: verdict for verdict in judgement.verdicts}
    return [waiver_facts(one, judged.get(one.objective), judgement.today) for one in judgement.slos.waivers]


# ---- commands -------------------------------------------------------------------------------------------------------


def placeholders(subject: Subject) -> dict[str, str]:
    """Return what the commands of the law leave open, from the run itself."""
    group, pack = subject.group, pack_of(subject.group)
    return {
        "run": group.name,
        "pack": str(pack.get("name", "flickr8k")),
        "source": str(pack.get("source", "flickr8k")),
        "config": option(command_of(group), "--config") or "configs/train/locked.yaml",
        "seeds": ",".join(str(seed) for seed in group.seeds),
        "device": "cuda" if device_of(group) == "gpu" else "cpu",
    }


def command_of(group: Group) -> str:
    """Return the command that trained a group; "" where it is not known, and for one that combines others.

    Such a one takes neither seeds nor steps of a plan: its members do.
    """
    return "" if group.combines else str(group.facts.get("command") or "")


def measure_command(objective: Objective, judgement: Judgement, evidence: Evidence) -> str | None:
    """Return the command that would make the missing evidence; None where another machine, or other members have to."""
    from chimera_cli.services.runs import status_of

    subject = judgement.subject
    group, values = subject.group, placeholders(subject)
    if objective.hardware not in ("any", device_of(group)):
        return None
    if objective.pack not in (None, pack_of(group).get("source")):
        words = ["chimera", "train", "full", "--config", values["config"], "--data", str(objective.pack)]
        return shlex.join([*words, "--seeds", "0,1,2"])
    if objective.kind != group.kind or not evidence.again:
        return fill(objective.measure, values)
    if status_of(group) == "running":
        return shlex.join(["chimera", "runs", "show", group.name])
    if len(subject.seeds) < objective.seeds_at_least <= len(group.seeds):
        return check_command(group.name, judgement.path, judgement.profile)
    if group.combines:
        return None
    if not command_of(group):
        return fill(objective.measure, values)
    return with_seeds(command_of(group), more_seeds(group.seeds, objective.seeds_at_least))


# ---- ladder ---------------------------------------------------------------------------------------------------------


def _ladder(subject: Subject) -> dict[str, Any] | None:
    """Return where the run stands on the ladder; None where it has no test figures that may stand beside it."""
    pack = pack_of(subject.group)
    name = f"{pack.get('name')}-test.json"
    paths = [subject.group.seed_dir(seed) / "evaluations" / name for seed in subject.seeds]
    if not paths or not all(path.exists() for path in paths):
        return None
    try:
        documents = [read_sealed_json(path) for path in paths]
    except ChimeraError:
        # No law looks at the test split: figures that prove nothing leave the place on the ladder open.
        return None
    if not all(_on_the_ladder(document, pack) for document in documents):
        return None
    figures = _mean_figures([document["figures"] for document in documents])
    rung = next_rung(figures)
    return {
        "figures": figures,
        "images": TEST_IMAGES,
        "next": None if rung is None else {"id": rung.id, "name": rung.name, "source": rung.source},
        "gaps": {} if rung is None else gaps(rung, figures),
    }


def _on_the_ladder(document: Mapping[str, Any], pack: Mapping[str, Any]) -> bool:
    images, theirs = document.get("images"), document.get("pack")
    return (
        isinstance(images, int)
        and isinstance(theirs, Mapping)
        and isinstance(document.get("figures"), Mapping)
        and comparable(str(pack.get("source")), "test", images)
        and theirs.get("fingerprint") == pack.get("fingerprint")
    )


def _mean_figures(documents: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    known = {name: [number(document.get(name)) for document in documents] for name in documents[0]}
    summaries = {name: summarise_known(values) for name, values in known.items()}
    return {name: summary.mean for name, summary in summaries.items() if summary is not None}
