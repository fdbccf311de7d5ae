"""What a report says, read from result files alone: the group, its evaluations, and the benchmarks that fit it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chimera_cli import runs
from chimera_cli.figures import RETRIEVAL
from chimera_cli.reporting import reading
from chimera_cli.reporting.reading import mapping_of
from chimera_cli.runs import Group
from chimera_cli.slo.baseline import baseline_path, read_baseline
from chimera_cli.slo.evidence import pack_of
from chimera_cli.statistics import Summary, summarise_known

ZERO_SHOT = ("zero_shot_top1", "zero_shot_top5")

# By their names in `Facts`, the kinds of the groups that are looked for beside the reported one.
_BENCHMARKS = {
    "prepare": "bench-prepare",
    "sanity": "sanity",
    "loader": "bench-loader",
    "encoders": "bench-encoders",
    "retrieval": "bench-retrieval",
    "speedrun": "bench-speedrun",
    "race": "bench-train",
}
_ON_CPU_ALONE = ("bench-prepare", "bench-retrieval")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One split of one pack: the evaluation file of each seed that has one, and the figures over those seeds.

    `mixed` says why there are none over the seeds: they were evaluated on different things. Empty where they were not.
    `baseline` is the file of the closed-form baseline on the same pack and split, if there is one.
    """

    pack: str
    split: str
    by_seed: Mapping[int, Mapping[str, Any]]
    figures: Mapping[str, Summary | None]
    mixed: str = ""
    baseline: Mapping[str, Any] | None = None

    @property
    def first(self) -> Mapping[str, Any]:
        """The file of the first seed: images, captions and chance are the same in all of them."""
        return next(iter(self.by_seed.values()))


@dataclass(frozen=True, slots=True)
class Curves:
    """Rows of metrics.jsonl and telemetry.jsonl of one seed; `problems` maps files without any to what is wrong."""

    metrics: tuple[Mapping[str, Any], ...]
    telemetry: tuple[Mapping[str, Any], ...]
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a report is made of.

    `prepare` to `race` are result.json of the newest group of their kind that fits; `activations` are the groups
    on the same pack that took a contingency step, the oldest first; `seal_problems` maps what is wrong with result
    files (edited, cut off) to their names, relative to the folder of all runs.
    """

    group: Group
    seeds: tuple[int, ...]
    results: Mapping[int, Mapping[str, Any]]
    figures: Mapping[str, Summary | None]
    evaluations: tuple[Evaluation, ...]
    environment: Mapping[str, Any]
    config: str
    prepare: "Evidence | None"
    sanity: "Evidence | None"
    loader: "Evidence | None"
    encoders: "Evidence | None"
    retrieval: "Evidence | None"
    speedrun: "Evidence | None"
    race: "Evidence | None"
    activations: tuple[Group, ...]
    seal_problems: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The result of another group that was made with the same pack, hardware and source as the reported one."""

    group: Group
    result: Mapping[str, Any]
    file: str
    problem: str | None = None

    @property
    def figures(self) -> Mapping[str, Any]:
        return dict(self.result.get("figures") or {})

    @property
    def details(self) -> Mapping[str, Any]:
        return dict(self.result.get("details") or {})


def collect(
    home: Path, group: Group, seeds: Sequence[int] | None = None, groups: Sequence[Group] | None = None
) -> Facts:
    """Return the facts of `group`, of all its seeds or only of `seeds`; `groups` are all of the home, if read already.

    A file that is broken stands in `seal_problems`, and nothing of it in the report.
    """
    group = reading.tidied(group)
    chosen = tuple(group.seeds if seeds is None else seeds)
    paths = {seed: group.seed_dir(seed) for seed in chosen}
    documents, problems = _documents(paths)
    results = {seed: found for seed, path in paths.items() if (found := documents.get(path / "result.json"))}
    evaluations, misplaced = _evaluations(paths, documents)
    evaluations, unfit = _with_baselines(group, evaluations)
    environment, config, unread = _made_in(paths)
    others = runs.list_groups(home) if groups is None else groups
    benchmarks = {name: _newest(others, group, kind) for name, kind in _BENCHMARKS.items()}
    return Facts(
        group=group,
        seeds=chosen,
        results=results,
        figures=_over_seeds([result.get("figures") or {} for result in results.values()]),
        evaluations=evaluations,
        environment=environment,
        config=config,
        activations=_activations(others, group),
        seal_problems=_by_problem({**_of_groups(group, benchmarks), **problems, **misplaced, **unfit, **unread}),
        **benchmarks,
    )


def with_problems(facts: Facts, curves: Mapping[int, Curves]) -> Facts:
    """Return the facts with the files of curves that can't be read among those that are no evidence."""
    found = {file: problem for one in curves.values() for file, problem in one.problems.items()}
    known = {file: problem for problem, files in facts.seal_problems.items() for file in files}
    return replace(facts, seal_problems=_by_problem({**known, **found}))


def newest_like(home: Path, group: Group, kind: str) -> Evidence | None:
    """Return the newest finished group of `kind` with the pack, hardware and source of `group`, None without one.

    A benchmark that needs no pack (encoders on made-up input) fits every pack, one that never uses a GPU every card of
    the machine; a control with shuffled captions fits none.
    """
    return _newest(runs.list_groups(home, kind), group, kind)


def _newest(groups: Sequence[Group], group: Group, kind: str) -> Evidence | None:
    fitting = [other for other in groups if other.kind == kind and other.status == "finished" and _fits(other, group)]
    # The newest first: with a thousand groups the results of all but one need not be read.
    for other in sorted(fitting, key=lambda one: str(one.facts["finished_at"]), reverse=True):
        # What is broken in another group says nothing against this one.
        results = list(reading.results(other))
        if results and not (results[-1][1].get("details") or {}).get("shuffled"):
            file, result, problem = results[-1]
            return Evidence(reading.tidied(other), result, file, problem)
    return None


def _fits(other: Group, group: Group) -> bool:
    if other.facts.get("pack") is not None and not _same_pack(other, group):
        return False
    if other.facts.get("source_hash") != group.facts.get("source_hash"):
        return False
    machine, mine = mapping_of(other.facts.get("hardware")), mapping_of(group.facts.get("hardware"))
    if other.kind in _ON_CPU_ALONE:
        return all(machine.get(key) == mine.get(key) for key in ("cpu", "cores"))
    return bool(machine == mine)


def _activations(groups: Sequence[Group], group: Group) -> tuple[Group, ...]:
    """Return the groups on the same pack that took a step of the contingency plan, the oldest first."""
    taken = [one for one in groups if isinstance(one.facts.get("plan"), Mapping) and _same_pack(one, group)]
    return tuple(map(reading.tidied, sorted(taken, key=lambda one: str(one.facts["created_at"]))))


def _same_pack(one: Group, other: Group) -> bool:
    fingerprint = pack_of(one).get("fingerprint")
    return fingerprint is not None and bool(fingerprint == pack_of(other).get("fingerprint"))


def read_curves(facts: Facts) -> dict[int, Curves]:
    """Return the curves of every seed, for plots."""
    return {seed: _curves(facts.group.seed_dir(seed)) for seed in facts.seeds}


def loader_curves(facts: Facts) -> Curves:
    """Return the curves of the loader's benchmark, empty ones where it was not measured."""
    if facts.loader is None:
        return Curves((), ())
    return _curves(facts.loader.group.seed_dir(facts.loader.group.seeds[-1]))


def _curves(path: Path) -> Curves:
    files = [path / f"{name}.jsonl" for name in ("metrics", "telemetry")]
    (metrics, _), (telemetry, _) = found = [reading.read_rows(file) for file in files]
    problems = {_short(file): problem for file, (_, problem) in zip(files, found, strict=True) if problem}
    return Curves(metrics, telemetry, problems)


def _has(path: Path, name: str) -> bool:
    return (path / name).is_file()


def _documents(paths: Mapping[int, Path]) -> tuple[dict[Path, dict[str, Any]], dict[str, str]]:
    """Return result.json and the evaluations of all seeds by their path, and by name what is wrong with any of them."""
    files: list[Path] = []
    for path in paths.values():
        files += [path / "result.json"] if _has(path, "result.json") else []
        files += sorted((path / "evaluations").glob("*.json"))
    found = {file: reading.read(file) for file in files}
    documents = {file: document for file, (document, _) in found.items() if document}
    return documents, {_short(file): problem for file, (_, problem) in found.items() if problem}


def _made_in(paths: Mapping[int, Path]) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Return environment and config of the first seed that has a config, and by name what can't be read of them."""
    first = next((path for path in paths.values() if _has(path, "config.yaml")), None)
    if first is None:
        return {}, "", {}
    problems: dict[str, str] = {}
    environment, problem = reading.read_environment(first / "environment.json")
    if problem and _has(first, "environment.json"):
        problems[_short(first / "environment.json")] = problem
    try:
        config = (first / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        config, problems[_short(first / "config.yaml")] = "", f"can't be read: {error.strerror}"
    return environment, config, problems


def _short(path: Path) -> str:
    """Return the path of a seed's file from its group on."""
    return "/".join(path.parts[-4 if path.parent.name == "evaluations" else -3 :])


def _of_groups(group: Group, benchmarks: Mapping[str, Evidence | None]) -> dict[str, str]:
    """Return by name what is wrong with group.json and with the results of other groups that are used."""
    used = [one for one in benchmarks.values() if one is not None]
    found = {
        f"{one.name}/group.json": reading.read(one.path / "group.json")[1] for one in (group, *(u.group for u in used))
    }
    found |= {one.file: one.problem for one in used}
    return {name: problem for name, problem in found.items() if problem}


def _by_problem(problems: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the names of files by what is wrong with them."""
    return {
        problem: tuple(name for name, other in problems.items() if other == problem)
        for problem in dict.fromkeys(problems.values())
    }


# ---- evaluations ----------------------------------------------------------------------------------------------------


def _evaluations(
    paths: Mapping[int, Path], documents: Mapping[Path, Mapping[str, Any]]
) -> tuple[tuple[Evaluation, ...], dict[str, str]]:
    """Return the evaluations of all seeds by pack and split, `dev` before `test`, and by name why a file is none."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    problems: dict[str, str] = {}
    for seed, path in paths.items():
        for file, evaluation in documents.items():
            if file.parent != path / "evaluations":
                continue
            if problem := _no_evaluation(file, evaluation, seed):
                problems[_short(file)] = problem
            else:
                key = str(evaluation["pack"]["name"]), str(evaluation["split"])
                found.setdefault(key, {})[seed] = evaluation
    return tuple(_evaluation(*key, by_seed) for key, by_seed in sorted(found.items())), problems


def _no_evaluation(file: Path, evaluation: Mapping[str, Any], seed: int) -> str | None:
    """Return why a file is no evaluation of this seed by the name it has; None where it is one."""
    pack, split = (evaluation.get("pack") or {}).get("name"), evaluation.get("split")
    facts = {"pack": pack, "split": split, **{key: evaluation.get(key) for key in ("images", "captions", "figures")}}
    lacking = [key for key, value in facts.items() if not value]
    if lacking:
        return f"holds no {', '.join(lacking)}"
    if file.name != f"{pack}-{split}.json" or evaluation.get("seed", seed) != seed:
        return f"is the evaluation of seed {evaluation.get('seed', seed)} on {pack}, {split}"
    return None


def _evaluation(pack: str, split: str, by_seed: Mapping[int, Mapping[str, Any]]) -> Evaluation:
    """Return retrieval over the seeds, and zero-shot figures where every seed has them."""
    mixed = _mixed(by_seed)
    if mixed:
        return Evaluation(pack, split, by_seed, dict.fromkeys((*RETRIEVAL, *ZERO_SHOT)), mixed)
    zero_shot = [(one.get("zero_shot") or {}).get("figures") or {} for one in by_seed.values()]
    figures = _over_seeds([one["figures"] for one in by_seed.values()], RETRIEVAL)
    return Evaluation(pack, split, by_seed, figures | _over_seeds(zero_shot, ZERO_SHOT))


def _with_baselines(group: Group, evaluations: Sequence[Evaluation]) -> tuple[tuple[Evaluation, ...], dict[str, str]]:
    """Return the evaluations with the baselines that the group has of them, and by name why a file is none."""
    found: list[Evaluation] = []
    problems: dict[str, str] = {}
    for one in evaluations:
        document, problem = read_baseline(group, one.first["pack"], one.split)
        path = baseline_path(group, one.pack, one.split)
        if problem:
            problems["/".join((group.name, *path.parts[-3:]))] = problem
        found.append(replace(one, baseline=None if document is None else reading.tidy(document)))
    return tuple(found), problems


# What seeds must share before a mean over them is the figure of anything.
_SHARED: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "on different content of the pack": lambda one: one["pack"].get("fingerprint"),
    "by different source code": lambda one: one.get("source_hash"),
    "on different numbers of images": lambda one: one["images"],
}


def _mixed(by_seed: Mapping[int, Mapping[str, Any]]) -> str:
    """Return why the evaluations of several seeds may not be averaged, empty where they may."""
    (first_seed, first), *others = by_seed.items()
    for words, fact in _SHARED.items():
        for seed, one in others:
            ours, theirs = ("unknown" if value is None else str(value)[:8] for value in (fact(first), fact(one)))
            if fact(one) != fact(first):
                return f"seeds {first_seed} and {seed} were evaluated {words} ({ours} and {theirs})"
    return ""


def _over_seeds(
    figures: Sequence[Mapping[str, float | None]], names: Sequence[str] | None = None
) -> dict[str, Summary | None]:
    """Return each figure over the seeds; None where a seed lacks it."""
    if not figures:
        return {}
    wanted = names if names is not None else tuple(figures[0])
    return {name: summarise_known([one.get(name) for one in figures]) for name in wanted}
