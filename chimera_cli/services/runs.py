"""What has been run: the list, one run's facts, and delivery to MLflow of what could not be delivered before."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from chimera_cli import runs
from chimera_cli.errors import UsageError
from chimera_cli.events import Listener, Progress, ignore
from chimera_cli.runs import Group

# The one figure that tells most about a run of each kind.
_HEADLINES = {
    "train": "rsum",
    "sanity": "loss_drop",
    "bench-loader": "loader_images_per_s",
    "bench-encoders": "wall_s",
}


def list_runs(home: Path) -> dict[str, Any]:
    """Return all groups, the newest first: `{"runs": [...]}` with name, kind, status, seeds, pack, age and a figure."""
    return {"runs": [_row(group) for group in runs.list_groups(home)]}


def show_run(home: Path, name: str) -> dict[str, Any]:
    """Return one group's facts, its figures over seeds and by seed, its evaluations and where it lies.

    Raises UsageError when `name` fits no run or more than one.
    """
    from chimera_cli.statistics import summarise_known

    group, seed = runs.resolve_run(home, name)
    results = [result for result in group.results() if seed in (None, result["seed"])]
    names = dict.fromkeys(figure for result in results for figure in result["figures"])
    summaries = {figure: summarise_known([result["figures"].get(figure) for result in results]) for figure in names}
    return _row(group) | {
        "path": str(group.path),
        "facts": {key: value for key, value in group.facts.items() if key not in ("kind", "status", "seeds")},
        "figures": {figure: None if summary is None else summary.as_dict() for figure, summary in summaries.items()},
        "by_seed": {str(result["seed"]): result["figures"] for result in results},
        "evaluations": _evaluations(group, seed),
        "members": [str(part.get("run")) for part in group.combines],
        "mlflow": _mlflow_ids(group),
    }


def sync_runs(home: Path, name: str | None = None, listener: Listener = ignore) -> dict[str, Any]:
    """Deliver to MLflow what it has not got, of one run or of all, and return the counts by run.

    A group whose process still works delivers by itself and is passed over when all are meant. Raises ChimeraError
    where MLflow can't be reached, UsageError where nothing has been run.
    """
    from chimera_cli.tracking import Delivered, sync

    if name is None:
        groups = [group for group in runs.list_groups(home) if status_of(group) != "running"]
    else:
        groups = [runs.resolve_run(home, name)[0]]
    if not groups:
        raise UsageError(f"there is nothing to deliver below {runs.runs_dir(home)}", "`chimera runs list` shows runs")
    total, delivered = Delivered(), []
    for number, group in enumerate(groups):
        listener(Progress("deliver to MLflow", number, len(groups), "runs"))
        sent = sync(home, group)
        total += sent
        delivered.append({"run": group.name} | asdict(sent))
    listener(Progress("deliver to MLflow", len(groups), len(groups), "runs"))
    return {"delivered": delivered, "total": asdict(total)}


def status_of(group: Group) -> str:
    """Return the group's status; `died` when it is said to run and its process is gone."""
    return "died" if group.status == "running" and not _is_alive(group.facts.get("pid")) else group.status


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It is there and belongs to somebody else.
        return True
    return True


def _row(group: Group) -> dict[str, Any]:
    figure, value = _headline(group)
    created = datetime.fromisoformat(str(group.facts["created_at"]))
    return {
        "name": group.name,
        "kind": group.kind,
        "status": status_of(group),
        "seeds": list(group.seeds),
        "pack": (group.facts.get("pack") or {}).get("name"),
        "created_at": group.facts["created_at"],
        "age_s": round((datetime.now(UTC) - created).total_seconds()),
        "headline": {"figure": figure, "value": value},
    }


def _headline(group: Group) -> tuple[str, float | None]:
    """Return the kind's telling figure, as the mean over its seeds; of a training run the best dev `rsum`."""
    name = _HEADLINES.get(group.kind, "wall_s")
    values = []
    for result in group.results():
        source: Mapping[str, Any] = result["figures"]
        if name == "rsum":
            source = result["details"].get("best_dev") or {}
        values.append(source.get(name))
    known = [value for value in values if value is not None]
    return name, fmean(known) if known and len(known) == len(values) else None


def _evaluations(group: Group, seed: int | None) -> list[dict[str, Any]]:
    """Return the evaluation files of the group, or of one seed: pack, split and figures."""
    folder = (group.path if seed is None else group.seed_dir(seed)) / "evaluations"
    found = []
    for path in sorted(folder.glob("*.json")):
        evaluation = runs.read_json(path)
        pack = evaluation["pack"]
        name = pack["name"] if isinstance(pack, dict) else pack
        found.append({"pack": name, "split": evaluation["split"], "figures": evaluation["figures"]})
    return found


def _mlflow_ids(group: Group) -> dict[str, str]:
    """Return the run id of the group in every MLflow store that has it."""
    path = group.path / "mlflow.json"
    stores = runs.read_json(path).get("stores", {}) if path.exists() else {}
    return {store: ledger["run_id"] for store, ledger in stores.items() if "run_id" in ledger}
