"""What a report says, read from result files alone: the group, its evaluations, and the benchmarks that fit it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chimera_cli import runs
from chimera_cli.errors import ChimeraError
from chimera_cli.figures import RETRIEVAL
from chimera_cli.runs import Group
from chimera_cli.statistics import Summary, summarise_known

ZERO_SHOT = ("zero_shot_top1", "zero_shot_top5")

# By their names in `Facts`, the kinds of the groups that are looked for beside the reported one.
_BENCHMARKS = {
    "prepare": "bench-prepare",
    "sanity": "sanity",
    "loader": "bench-loader",
    "encoders": "bench-encoders",
    "retrieval": "bench-retrieval",
}
_ON_CPU_ALONE = ("bench-prepare", "bench-retrieval")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One split of one pack: the evaluation file of each seed that has one, and the figures over those seeds."""

    pack: str
    split: str
    by_seed: Mapping[int, Mapping[str, Any]]
    figures: Mapping[str, Summary | None]

    @property
    def first(self) -> Mapping[str, Any]:
        """The file of the first seed: images, captions and chance are the same in all of them."""
        return next(iter(self.by_seed.values()))


@dataclass(frozen=True, slots=True)
class Curves:
    """Rows of metrics.jsonl and telemetry.jsonl of one seed."""

    metrics: tuple[Mapping[str, Any], ...]
    telemetry: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a report is made of.

    `prepare` to `retrieval` are result.json of the newest group of their kind that fits; `activations` are the groups
    on the same pack that took a contingency step, the oldest first; `seal_problems` maps what is wrong with the seal of
    result files to their names, relative to the folder of all runs.
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
    activations: tuple[Group, ...]
    seal_problems: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The result of another group that was made with the same pack, hardware and source as the reported one."""

    group: Group
    result: Mapping[str, Any]

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

    Raises ChimeraError for broken result files.
    """
    chosen = tuple(group.seeds if seeds is None else seeds)
    paths = {seed: group.seed_dir(seed) for seed in chosen}
    documents = _documents(paths)
    made = {seed: documents.get(path / "result.json") for seed, path in paths.items()}
    results = {seed: result for seed, result in made.items() if result is not None}
    first = next((path for path in paths.values() if _has(path, "config.yaml")), None)
    others = runs.list_groups(home) if groups is None else groups
    benchmarks = {name: _newest(others, group, kind) for name, kind in _BENCHMARKS.items()}
    return Facts(
        group=group,
        seeds=chosen,
        results=results,
        figures=_over_seeds([result.get("figures") or {} for result in results.values()]),
        evaluations=_evaluations(paths, documents),
        environment=runs.read_json(first / "environment.json") if first and _has(first, "environment.json") else {},
        config=(first / "config.yaml").read_text(encoding="utf-8", errors="replace") if first else "",
        activations=_activations(others, group),
        seal_problems=_seal_problems(group, documents, [one for one in benchmarks.values() if one is not None]),
        **benchmarks,
    )


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
        results = other.results()
        if results and not (results[-1].get("details") or {}).get("shuffled"):
            return Evidence(other, results[-1])
    return None


def _fits(other: Group, group: Group) -> bool:
    pack, own = other.facts.get("pack"), group.facts.get("pack") or {}
    if pack is not None and pack.get("fingerprint") != own.get("fingerprint"):
        return False
    if other.facts.get("source_hash") != group.facts.get("source_hash"):
        return False
    machine, mine = other.facts.get("hardware") or {}, group.facts.get("hardware") or {}
    if other.kind in _ON_CPU_ALONE:
        return all(machine.get(key) == mine.get(key) for key in ("cpu", "cores"))
    return bool(machine == mine)


def _activations(groups: Sequence[Group], group: Group) -> tuple[Group, ...]:
    """Return the groups on the same pack that took a step of the contingency plan, the oldest first."""
    fingerprint = (group.facts.get("pack") or {}).get("fingerprint")
    taken = [one for one in groups if isinstance(one.facts.get("plan"), Mapping)]
    same = [one for one in taken if (one.facts.get("pack") or {}).get("fingerprint") == fingerprint]
    return tuple(sorted(same, key=lambda one: str(one.facts["created_at"])))


def read_curves(facts: Facts) -> dict[int, Curves]:
    """Return the curves of every seed, for plots."""
    return {seed: _curves(facts.group.seed_dir(seed)) for seed in facts.seeds}


def loader_curves(facts: Facts) -> Curves:
    """Return the curves of the loader's benchmark, empty ones where it was not measured."""
    if facts.loader is None:
        return Curves((), ())
    return _curves(facts.loader.group.seed_dir(facts.loader.group.seeds[-1]))


def _curves(path: Path) -> Curves:
    metrics, telemetry = (tuple(runs.read_json_lines(path / f"{name}.jsonl")) for name in ("metrics", "telemetry"))
    return Curves(metrics, telemetry)


def _has(path: Path, name: str) -> bool:
    return (path / name).is_file()


def _documents(paths: Mapping[int, Path]) -> dict[Path, dict[str, Any]]:
    """Return result.json and the evaluations of all seeds that have them, by their path."""
    files: list[Path] = []
    for path in paths.values():
        files += [path / "result.json"] if _has(path, "result.json") else []
        files += sorted((path / "evaluations").glob("*.json"))
    return {file: runs.read_json(file) for file in files}


def _short(path: Path) -> str:
    """Return the path of a seed's file from its group on."""
    return "/".join(path.parts[-4 if path.parent.name == "evaluations" else -3 :])


def _seal_problems(
    group: Group, documents: Mapping[Path, Mapping[str, Any]], benchmarks: Sequence[Evidence]
) -> dict[str, tuple[str, ...]]:
    """Return the files that were changed, or written without a seal, by what is wrong with them."""
    groups = [group, *(one.group for one in benchmarks)]
    named = {f"{one.name}/group.json": runs.read_json(one.path / "group.json") for one in groups}
    named |= {_short(path): dict(document) for path, document in documents.items()}
    named |= {f"{one.group.name}/seed-{one.result.get('seed')}/result.json": dict(one.result) for one in benchmarks}
    problems: dict[str, tuple[str, ...]] = {}
    for name, document in named.items():
        if problem := runs.seal_problem(document):
            problems[problem] = (*problems.get(problem, ()), name)
    return problems


def _evaluations(paths: Mapping[int, Path], documents: Mapping[Path, Mapping[str, Any]]) -> tuple[Evaluation, ...]:
    """Return the evaluations of all seeds by pack and split; `dev` comes before `test`."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for file, evaluation in documents.items():
        if file.parent.name != "evaluations":
            continue
        pack, split = (evaluation.get("pack") or {}).get("name"), evaluation.get("split")
        lacking = [key for key in ("images", "captions", "figures") if not evaluation.get(key)]
        if not pack or not split or lacking:
            what = ", ".join(lacking) or ("pack" if not pack else "split")
            raise ChimeraError(f"{file} holds no {what}", "the file was edited; evaluate the run again")
        seed = next(seed for seed, path in paths.items() if path == file.parents[1])
        found.setdefault((str(pack), str(split)), {})[seed] = evaluation
    return tuple(
        Evaluation(pack, split, by_seed, _figures_of(by_seed)) for (pack, split), by_seed in sorted(found.items())
    )


def _figures_of(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Summary | None]:
    """Return retrieval over the seeds, and zero-shot figures where every seed has them."""
    zero_shot = [(one.get("zero_shot") or {}).get("figures") or {} for one in by_seed.values()]
    return _over_seeds([one["figures"] for one in by_seed.values()], RETRIEVAL) | _over_seeds(zero_shot, ZERO_SHOT)


def _over_seeds(
    figures: Sequence[Mapping[str, float | None]], names: Sequence[str] | None = None
) -> dict[str, Summary | None]:
    """Return each figure over the seeds; None where a seed lacks it."""
    if not figures:
        return {}
    wanted = names if names is not None else tuple(figures[0])
    return {name: summarise_known([one.get(name) for one in figures]) for name in wanted}
