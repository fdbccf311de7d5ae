"""Result files as a report takes them: what an edit made something else of is left out and told, never a crash."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chimera_cli.errors import ChimeraError
from chimera_cli.figures import FIGURES
from chimera_cli.runs import Group, read_json, read_json_lines, seal_problem

# Nothing that is measured here comes near it; sums and squares of larger numbers overflow.
_LARGEST = 1e15

# What a key holds wherever it stands in a result file. None may stand for any of them.
_FIGURES = ("figures", "chance")
_MAPPINGS = ("details", "pack", "hardware", "stream", "bootstrap", "similarities", "zero_shot", "ceiling", "against",
             "best_dev")  # fmt: skip
_RECORDS = ("components", "peers", "ours")
_SERIES = ("edges", "matched", "unmatched", "spread")
_LISTS = ("classes", "templates")
_TEXTS = ("finished_at", "git_commit", "lock_sha256")
_NUMBERS = frozenset(FIGURES) | {
    "images", "captions", "latency_ms_p50", "latency_ms_p95", "throughput_per_s", "images_per_s", "share_reached",
    "ratio_to_pillow", "ratio_equal_output", "ratio_gather", "ratio_shards", "mean_kb", "ranks_s", "ratio",
    "extra_memory_gb", "ram_gb",
}  # fmt: skip


def mapping_of(value: Any) -> Mapping[str, Any]:
    """Return `value`, or nothing where it is no mapping."""
    return value if isinstance(value, Mapping) else {}


def number_of(value: Any) -> int | float | None:
    """Return a finite number of a size that can be measured; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        return None
    return value


def tidy(value: Any, key: str = "") -> Any:
    """Return a part of a result file that stands under `key`, all in it of the kind that its key promises.

    A number that is none becomes None, a mapping that is none becomes empty, and NaN and infinity None everywhere.
    """
    if value is None:
        return None
    if key in _NUMBERS:
        return number_of(value)
    if key in _FIGURES:
        return {name: number_of(item) for name, item in mapping_of(value).items()}
    if key == "intervals":
        pairs = ((name, tidy(ends, "spread")) for name, ends in mapping_of(value).items())
        return {name: pair for name, pair in pairs if pair and len(pair) == 2}
    if key in (*_RECORDS, *_SERIES, *_LISTS):
        return _list(value, key)
    if key in _TEXTS:
        return value if isinstance(value, str) else None
    if isinstance(value, Mapping):
        # The settings of another program have names of their own.
        return {name: tidy(item, "" if key == "settings" else name) for name, item in value.items()}
    if key in _MAPPINGS:
        # The peer of a training by name, those of the data loader with all that is known of them.
        return value if key == "against" and isinstance(value, str) else {}
    if isinstance(value, list):
        return [tidy(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _list(value: Any, key: str) -> list[Any]:
    """Return a list of mappings, of numbers (empty where one of them is none) or of anything, as `key` promises."""
    items = value if isinstance(value, list) else []
    if key in _RECORDS:
        return [tidy(item) for item in items if isinstance(item, Mapping)]
    if key in _SERIES:
        numbers = [number_of(item) for item in items]
        return [] if None in numbers else numbers
    return [tidy(item) for item in items]


def read(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return a result file, tidied, and what is wrong with it: unreadable (then it is empty), or edited."""
    try:
        document = read_json(path)
        return tidy(document), seal_problem(document)
    except ChimeraError as error:
        return {}, error.message.removeprefix(f"{path} ")
    except RecursionError:
        return {}, "is no result file (it is nested too deeply)"


def read_environment(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return environment.json and what is wrong with it; it has no seal, because it proves nothing."""
    document, problem = read(path)
    if not document:
        return {}, problem
    # In one the name of a library stands for its version, in the other for what is known of it.
    nested = {key: tidy(mapping_of(document.get(key))) for key in ("torch", "packages")}
    return document | nested, None


def read_rows(path: Path) -> tuple[tuple[Mapping[str, Any], ...], str | None]:
    """Return the numbers in each line of a JSON-lines file, by name, and what is wrong where it can't be read."""
    try:
        rows = read_json_lines(path)
    except ChimeraError as error:
        return (), error.message.replace(f"{path}:", "line ").removeprefix(f"{path} ")
    except (OSError, RecursionError):
        return (), "can't be read"
    kept = ({name: number_of(value) for name, value in row.items()} for row in rows if isinstance(row, Mapping))
    return tuple(kept), None


def results(group: Group) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Yield name, content and seal problem of every result.json of a group that can be read."""
    for seed in group.seeds:
        path = group.seed_dir(seed) / "result.json"
        document, problem = read(path) if path.is_file() else ({}, None)
        if document:
            yield f"{group.name}/seed-{seed}/result.json", document, problem


def tidied(group: Group) -> Group:
    """Return the group with facts of the kinds that their keys promise."""
    return Group(group.path, tidy(dict(group.facts)))
