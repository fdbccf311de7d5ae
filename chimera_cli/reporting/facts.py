"""What a report says, read from result files alone: the group, its evaluations, and the benchmarks that fit it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chimera_cli import runs
from chimera_cli.figures import RETRIEVAL
from chimera_cli.runs import Group
from chimera_cli.statistics import Summary, summarise_known


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
    """All that a report is made of; `loader`, `encoders` and `sanity` are result.json of the newest group that fits."""

    group: Group
    seeds: tuple[int, ...]
    results: Mapping[int, Mapping[str, Any]]
    figures: Mapping[str, Summary | None]
    evaluations: tuple[Evaluation, ...]
    environment: Mapping[str, Any]
    config: str
    loader: "Evidence | None"
    encoders: "Evidence | None"
    sanity: "Evidence | None"


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


def collect(home: Path, group: Group, seeds: Sequence[int] | None = None) -> Facts:
    """Return the facts of `group`, of all its seeds or only of `seeds`. Raises ChimeraError for broken result files."""
    chosen = tuple(group.seeds if seeds is None else seeds)
    paths = {seed: group.seed_dir(seed) for seed in chosen}
    results = {seed: runs.read_json(path / "result.json") for seed, path in paths.items() if _has(path, "result.json")}
    first = next((path for path in paths.values() if _has(path, "config.yaml")), None)
    return Facts(
        group=group,
        seeds=chosen,
        results=results,
        figures=_over_seeds([result["figures"] for result in results.values()]),
        evaluations=_evaluations(paths),
        environment=runs.read_json(first / "environment.json") if first and _has(first, "environment.json") else {},
        config=(first / "config.yaml").read_text(encoding="utf-8") if first else "",
        loader=newest_like(home, group, "bench-loader"),
        encoders=newest_like(home, group, "bench-encoders"),
        sanity=newest_like(home, group, "sanity"),
    )


def newest_like(home: Path, group: Group, kind: str) -> Evidence | None:
    """Return the newest finished group of `kind` with the pack, hardware and source of `group`, None without one.

    A benchmark that needs no pack (encoders on made-up input) fits every pack; a control with shuffled captions fits
    none.
    """
    fitting = []
    for other in runs.list_groups(home, kind):
        pack = other.facts.get("pack")
        same_pack = pack is None or pack["fingerprint"] == (group.facts.get("pack") or {}).get("fingerprint")
        same = all(other.facts.get(key) == group.facts.get(key) for key in ("hardware", "source_hash"))
        if other.status == "finished" and same_pack and same and (results := other.results()):
            evidence = Evidence(other, results[-1])
            fitting += [] if evidence.details.get("shuffled") else [evidence]
    return max(fitting, key=lambda evidence: str(evidence.group.facts["finished_at"]), default=None)


def read_curves(facts: Facts) -> dict[int, Curves]:
    """Return the curves of every seed, for plots."""
    paths = {seed: facts.group.seed_dir(seed) for seed in facts.seeds}
    return {
        seed: Curves(
            tuple(runs.read_json_lines(path / "metrics.jsonl")), tuple(runs.read_json_lines(path / "telemetry.jsonl"))
        )
        for seed, path in paths.items()
    }


def _has(path: Path, name: str) -> bool:
    return (path / name).is_file()


def _evaluations(paths: Mapping[int, Path]) -> tuple[Evaluation, ...]:
    """Return the evaluations of all seeds by pack and split; `dev` comes before `test`."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for seed, path in paths.items():
        for file in sorted((path / "evaluations").glob("*.json")):
            evaluation = runs.read_json(file)
            found.setdefault((evaluation["pack"]["name"], evaluation["split"]), {})[seed] = evaluation
    return tuple(
        Evaluation(pack, split, by_seed, _over_seeds([e["figures"] for e in by_seed.values()], RETRIEVAL))
        for (pack, split), by_seed in sorted(found.items())
    )


def _over_seeds(
    figures: Sequence[Mapping[str, float | None]], names: Sequence[str] | None = None
) -> dict[str, Summary | None]:
    """Return each figure over the seeds; None where a seed lacks it."""
    if not figures:
        return {}
    wanted = names if names is not None else tuple(figures[0])
    return {name: summarise_known([one.get(name) for one in figures]) for name in wanted}
