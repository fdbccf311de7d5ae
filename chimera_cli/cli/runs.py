"""`chimera runs`: what has been run, and delivery to MLflow."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from chimera_cli.cli.common import Json, emit, live, new_app
from chimera_cli.figures import FIGURES, format_spread, format_value
from chimera_cli.runs import home

app = new_app("What has been run: list, show, deliver to MLflow.")

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """All runs, the newest first."""
    from chimera_cli.services.runs import list_runs

    emit(list_runs(home()), as_json, _runs_table)


@app.command("show")
def show_command(
    run: Annotated[str, typer.Argument(help="A group, GROUP/seed-N, a unique prefix, or latest.")],
    as_json: Json = False,
) -> None:
    """One run: facts, figures over seeds and by seed, evaluations."""
    from chimera_cli.services.runs import show_run

    emit(show_run(home(), run), as_json, _run_page)


@app.command("sync")
def sync_command(
    run: Annotated[str | None, typer.Argument(help="Only this run; without it all of them.")] = None,
    as_json: Json = False,
) -> None:
    """Deliver to MLflow what it has not got yet. Typing it twice does no harm."""
    from chimera_cli.services.runs import sync_runs

    with live("deliver to MLflow") as listener:
        result = sync_runs(home(), run, listener)
    emit(result, as_json, _sync_table)


def age(seconds: float) -> str:
    """Return how long ago something was, in its largest unit: `3 h`."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def _runs_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import result_table, word

    if not result["runs"]:
        return "nothing has been run here yet: `chimera train sanity --seed 0` is a start"
    rows = []
    for row in result["runs"]:
        told = _headline(row["headline"]["figure"], row["headline"]["value"])
        seeds = ",".join(str(seed) for seed in row["seeds"])
        rows.append((row["name"], word(row["status"]), seeds, row["pack"] or "–", age(row["age_s"]), told))
    # A run's name begins with its kind, and is there to be copied.
    table = result_table("", ("run", "status", "seeds", "pack", "age", "figure"), rows)
    table.columns[0].no_wrap = True
    return table


def _headline(name: str, value: float | None) -> str:
    """Return a figure in few words; one with a unit says by it what it is."""
    text = format_value(name, value)
    label = "dev rsum" if name == "rsum" else FIGURES[name].label
    return text if value is None or FIGURES[name].unit else f"{label} {text}"


def _run_page(result: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group

    from chimera_cli.ui.tables import facts, result_table, word

    known = result["facts"]
    pairs: list[tuple[str, Any]] = [
        ("kind", result["kind"]),
        ("status", word(result["status"])),
        ("pack", result["pack"] or "–"),
        ("begun", f"{result['created_at'][:19].replace('T', ' ')} UTC, {age(result['age_s'])} ago"),
        ("command", str(known.get("command") or "–")),
        *(("member", name) for name in result["members"]),
        ("hardware", _hardware(known.get("hardware") or {})),
        ("source", str(known.get("source_hash") or "–")[:12]),
        ("looks at test", str(known.get("test_looks", 0))),
        ("folder", result["path"]),
        *((f"MLflow ({store})", run_id) for store, run_id in result["mlflow"].items()),
    ]
    seeds = list(result["by_seed"])
    rows = [
        (
            _label(name),
            *(format_value(name, result["by_seed"][seed].get(name)) for seed in seeds),
            _spread(name, summary),
        )
        for name, summary in result["figures"].items()
    ]
    parts: list[RenderableType] = [facts(result["name"], pairs)]
    if rows:
        parts += ["", result_table("", ("figure", *(f"seed {seed}" for seed in seeds), "mean ± std (n)"), rows)]
    for evaluation in result["evaluations"]:
        cells = [(_label(name), _spread(name, value)) for name, value in evaluation["figures"].items()]
        parts += ["", result_table(f"{evaluation['pack']}, {evaluation['split']}", ("figure", "value"), cells)]
    return Group(*parts)


def _sync_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import result_table

    rows = [(row["run"], *(str(row[name]) for name in ("runs", "metrics", "artifacts"))) for row in result["delivered"]]
    return result_table("", ("run", "new MLflow runs", "metric values", "files"), rows)


def _hardware(hardware: Mapping[str, Any]) -> str:
    return f"{hardware.get('gpu') or 'no GPU'}; {hardware.get('cpu', '?')}, {hardware.get('cores', '?')} cores"


def _label(name: str) -> str:
    return FIGURES[name].label if name in FIGURES else name


def _spread(name: str, value: Any) -> str:
    """Return a summary over seeds, or one seed's plain value, as text."""
    if isinstance(value, Mapping):
        return format_spread(name, value["mean"], value["std"], value["n"])
    return format_value(name, value)
