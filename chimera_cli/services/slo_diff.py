"""`chimera slo diff`: two runs on the same queries, what differs between them and what is only chance."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError, ExitCode, UsageError
from chimera_cli.figures import RECALLS
from chimera_cli.runs import SCHEMA_VERSION, Group, read_sealed_json, resolve_run
from chimera_cli.slo.evidence import foreign_evaluation
from chimera_cli.statistics import Change, change_of, paired_bootstrap, summarise

if TYPE_CHECKING:
    from chimera_cli.evaluation.retrieval import Ranks

RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
_NO_SETTING = "not set"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two runs: its group, the seeds that are compared, and their evaluations in the same order."""

    group: Group
    seeds: tuple[int, ...]
    documents: tuple[Mapping[str, Any], ...]
    files: tuple[str, ...]
    ranks: "tuple[Ranks, ...]"

    @property
    def name(self) -> str:
        """Return the run as it is typed; a single seed of several is named."""
        return self.group.name if self.seeds == self.group.seeds else f"{self.group.name}/seed-{self.seeds[0]}"


def diff(
    home: Path, a: str, b: str, split: str = "dev", data: str | None = None, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Return how the recalls of run b differ from those of run a, as JSON takes it, by a paired bootstrap.

    Both were evaluated on the same images: a resample draws images once for both runs, and with them their captions;
    where a run has several seeds, their figures are averaged and the seeds drawn as well (`paired_bootstrap`), so that
    a change must stand out against new photos and new seeds. Nothing is computed anew and no look at the test split is
    counted. `data` is another pack than the one run a was trained on. Raises UsageError for runs that can't be
    compared, ChimeraError for evaluations that are missing, edited, or older than the ranks.
    """
    from chimera_cli.data.pack import check_pack_name, split_name

    chosen = split_name(split)
    first, second = resolve_run(home, a), resolve_run(home, b)
    pack = check_pack_name(data) if data else _pack_of(first[0])
    if data is None:
        _need_same_training_pack(first[0], second[0])
    sides = (_side(home, *first, pack, chosen), _side(home, *second, pack, chosen))
    _need_same_queries(*sides, chosen)
    changes = compare([side.ranks for side in sides], resamples)
    one = sides[0].documents[0]
    worse = [name for name in RECALLS if _verdict(changes[name]) == "worse"]
    return {
        "schema_version": SCHEMA_VERSION,
        "a": _side_facts(sides[0]),
        "b": _side_facts(sides[1]),
        "pack": dict(one["pack"]),
        "split": chosen,
        "images": int(sides[0].ranks[0].queries.size),
        "captions": int(one["captions"]),
        "bootstrap": {"resamples": resamples, "seed": BOOTSTRAP_SEED, "units": "query images and seeds"},
        "figures": {name: change.absolute for name, change in changes.items()},
        "changes": {name: _change_facts(name, changes[name], sides) for name in changes},
        "verdict": _verdict(changes["rsum"]),
        "worse": worse,
        "settings": _settings(*sides),
        "remarks": _remarks(*sides),
    }


def exit_code(result: Mapping[str, Any], fail_on_regression: bool) -> ExitCode:
    """Return the code to leave with: breached where a recall got worse and that was asked about."""
    return ExitCode.BREACHED if fail_on_regression and result["worse"] else ExitCode.OK


def compare(runs: "Sequence[Sequence[Ranks]]", resamples: int) -> dict[str, Change]:
    """Return the change of every recall and of `rsum` from the first run to the second; each has ranks by seed."""
    import numpy as np

    from chimera_cli.evaluation.retrieval import hits_by_image

    hits = [np.stack([hits_by_image(one)[0] for one in ranks]) for ranks in runs]
    sizes = hits_by_image(runs[0][0])[1]
    samples = paired_bootstrap(hits[0], hits[1], sizes, resamples=resamples, seed=BOOTSTRAP_SEED)
    points = [(one.sum(axis=2) / sizes.sum(axis=1)).mean(axis=0) for one in hits]
    changes = {
        name: change_of(float(points[0][f]), float(points[1][f]), samples[0][:, f], samples[1][:, f])
        for f, name in enumerate(RECALLS)
    }
    totals = [float(point.sum()) for point in points]
    return changes | {"rsum": change_of(totals[0], totals[1], samples[0].sum(axis=1), samples[1].sum(axis=1))}


# ---- the two runs ---------------------------------------------------------------------------------------------------


def _pack_of(group: Group) -> str:
    pack = group.facts.get("pack")
    if not isinstance(pack, Mapping) or "name" not in pack:
        raise ChimeraError(f"{group.path / 'group.json'} names no pack", "say which one with --data")
    return str(pack["name"])


def _need_same_training_pack(a: Group, b: Group) -> None:
    names = _pack_of(a), _pack_of(b)
    if names[0] != names[1]:
        raise UsageError(
            f"{a.name} was trained on {names[0]}, {b.name} on {names[1]}: they have no queries in common",
            "evaluate both on one pack with `chimera eval --data NAME` and name it here with --data",
        )


def _side(home: Path, group: Group, seed: int | None, pack: str, split: str) -> Side:
    """Return a run with its evaluations of a pack's split. Raises ChimeraError naming the command that makes them."""
    from chimera_cli.evaluation.rank_files import read_ranks

    if group.kind != "train":
        raise UsageError(f"{group.name} is a {group.kind} run", "`chimera slo diff` compares train runs")
    seeds = group.seeds if seed is None else (seed,)
    documents, files, ranks = [], [], []
    for one in seeds:
        again = _eval_command(group, pack, split)
        path = group.seed_dir(one) / "evaluations" / f"{pack}-{split}.json"
        if not path.exists():
            raise ChimeraError(
                f"seed {one} of {group.name} was not evaluated on {pack}, {split}", f"evaluate it: {again}"
            )
        document = read_sealed_json(path)
        foreign = foreign_evaluation(document, group, one)
        if foreign:
            raise ChimeraError(foreign, f"evaluate again: {again}")
        stored = document.get("ranks")
        if not isinstance(stored, Mapping):
            raise ChimeraError(f"{path} was written without the ranks of its queries", f"evaluate again: {again}")
        ranks.append(read_ranks(path.parent / Path(str(stored["file"])).name, str(stored["sha256"]), again))
        documents.append(document)
        files.append(path.relative_to(home).as_posix())
    return Side(group, seeds, tuple(documents), tuple(files), tuple(ranks))


def _eval_command(group: Group, pack: str, split: str) -> str:
    words = ["chimera", "eval", "--run", group.name, "--split", split]
    trained_on = group.facts.get("pack")
    own = isinstance(trained_on, Mapping) and trained_on.get("name") == pack
    return shlex.join([*words, *([] if own else ["--data", pack])])


def _need_same_queries(a: Side, b: Side, split: str) -> None:
    """Refuse evaluations of another content of the pack or another split, in either run."""
    reference = a.documents[0]
    for side in (a, b):
        for seed, document, file in zip(side.seeds, side.documents, side.files, strict=True):
            if document.get("split") != split:
                raise ChimeraError(f"{file} says that it is of the split {document.get('split')}", "evaluate again")
            prints = [str((one.get("pack") or {}).get("fingerprint")) for one in (reference, document)]
            if prints[0] != prints[1]:
                words = f"seed {seed} of {side.group.name} on {prints[1][:12]}"
                raise UsageError(
                    f"the pack {reference['pack']['name']} had other content: seed {a.seeds[0]} of {a.group.name} was "
                    f"evaluated on {prints[0][:12]}, {words}",
                    "evaluate both on the pack as it is now",
                )


# ---- what is told ---------------------------------------------------------------------------------------------------


def _verdict(change: Change) -> str:
    if not change.significant:
        return "no difference"
    return "better" if change.absolute > 0 else "worse"


def _side_facts(side: Side) -> dict[str, Any]:
    return {"run": side.name, "seeds": list(side.seeds), "files": list(side.files)}


def _change_facts(name: str, change: Change, sides: tuple[Side, Side]) -> dict[str, Any]:
    """Return a change as JSON takes it, with the spread over seeds of both runs beside it."""
    over = [summarise([float(document["figures"][name]) for document in side.documents]) for side in sides]
    return {
        "a": change.a,
        "b": change.b,
        "a_over_seeds": over[0].as_dict(),
        "b_over_seeds": over[1].as_dict(),
        "absolute": change.absolute,
        "absolute_interval": list(change.absolute_interval),
        "relative": change.relative,
        "relative_interval": None if change.relative_interval is None else list(change.relative_interval),
        "standard_error": change.standard_error,
        "p_value": change.p_value,
        "smallest_effect": change.smallest_effect,
        "significant": change.significant,
        "verdict": _verdict(change),
    }


def _settings(a: Side, b: Side) -> list[dict[str, Any]]:
    """Return the config keys in which the two runs differ, by dotted path."""
    flat = [_flat(_config_of(side)) for side in (a, b)]
    keys = sorted(set(flat[0]) | set(flat[1]))
    values = [(key, *(one.get(key, _NO_SETTING) for one in flat)) for key in keys]
    return [{"key": key, "a": left, "b": right} for key, left, right in values if left != right]


def _config_of(side: Side) -> dict[str, Any]:
    from chimera_cli.config import read_yaml

    path = side.group.seed_dir(side.seeds[0]) / "config.yaml"
    return read_yaml(path) if path.is_file() else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _remarks(a: Side, b: Side) -> list[str]:
    """Return what a reader must know to take the figures for no more than they are."""
    found = [
        f"{side.name} is one seed: a difference may be that seed's and not the recipe's"
        for side in (a, b)
        if len(side.seeds) == 1
    ]
    for what, fact in (("on other hardware", "hardware"), ("with another state of the source code", "source_hash")):
        if a.group.facts.get(fact) != b.group.facts.get(fact):
            found.append(f"{b.group.name} was made {what} than {a.group.name}")
    return found
