"""`chimera train`: proof of life and real training."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType

from chimera_cli.cli.common import Device, Json, emit, live, new_app
from chimera_cli.errors import ExitCode, UsageError
from chimera_cli.events import Listener, ignore
from chimera_cli.figures import FIGURES, RETRIEVAL, format_spread, format_value
from chimera_cli.runs import Group, home

app = new_app("Train a dual encoder: first the proof of life, then the real thing.")

Data = Annotated[str | None, typer.Option(help="Pack to train on; without it the newest that is not `toy`.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change one config key: key.sub=value. May be repeated.")]
Plan = Annotated[
    list[str] | None,
    typer.Option("--plan", help="Take a step of the contingency plan, OBJECTIVE/ACTION. It outranks --set."),
]
SloFile = Annotated[Path | None, typer.Option("--slo", help="File of the plan; without it configs/slo.yaml.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with the whole config.")]


@app.command("sanity")
def sanity(
    seed: Annotated[int, typer.Option(help="Decides initialisation, order and dropout.", min=0)] = 0,
    data: Data = None,
    config: ConfigFile = None,
    changes: Set = None,
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="Pair images with wrong captions: the control that must fail.")
    ] = False,
    plan: Plan = None,
    slo: SloFile = None,
    as_json: Json = False,
) -> None:
    """Proof of life: 200 updates of both towers; the loss must fall for the right reason. Exit 3 when it does not."""
    from chimera_cli.config import SanityConfig, load_config
    from chimera_cli.services.sanity import train_sanity

    given = _with(changes, data=data)
    steps, command = _planned(slo, plan, "sanity", config, given)
    resolved = load_config(SanityConfig, config, [*given, *steps])
    with live("proof of life", wall_s=1500, vram_peak_gb=7.5) as listener:
        result = train_sanity(home(), resolved, seed, command, listener, shuffled)
    emit(result, as_json, _sanity_table)
    if not result["details"]["passed"]:
        raise typer.Exit(ExitCode.BREACHED)


@app.command("full")
def full(
    config: ConfigFile = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, one run each; 0,1,2 without it.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with a run that was stopped: its name, or `latest` for the last begun.")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Begin with the weights of a finished run, seed for seed, or of one RUN/seed-N for all."),
    ] = None,
    data: Data = None,
    changes: Set = None,
    plan: Plan = None,
    slo: SloFile = None,
    contingency: Annotated[
        Literal["off", "auto"] | None,
        typer.Option(
            help="auto: less memory where it runs out, more threads where data is late, smaller images at last; back "
            "and half the rates where the loss is no number. Without it off; with --resume as the run was begun."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Real training: one group with one run per seed, the best checkpoint of each chosen on dev.

    Stopped by Ctrl-C or SIGTERM it finishes its step and saves; --resume goes on from there. `torchrun
    --nproc-per-node N -m chimera_cli train full ...` shares the work between N processes, with the result of one.
    """
    from chimera_cli.config import TrainConfig, load_config, parse_seeds
    from chimera_cli.services.estimate import estimate_full
    from chimera_cli.services.train import train_full

    group, recipe = _recipe(config, resume)
    given = _with(changes, data=data, init_from=init_from)
    steps, command = _planned(slo, plan, "train", recipe, given)
    resolved = load_config(TrainConfig, recipe, [*given, *steps])
    if dry_run:
        emit(estimate_full(home(), resolved), as_json, _estimate_table)
        return
    wanted = group.seeds if group is not None and seeds is None else parse_seeds(seeds or "0,1,2")
    title = recipe.stem if group is None else group.name
    with _leading_live(f"train {title}") as listener:
        result = train_full(home(), resolved, wanted, recipe.stem, command, listener, group, contingency)
    if _leads():
        emit(result, as_json, _full_table)


@app.command("combine")
def combine(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Finished runs, or a seed of each (RUN/seed-1).")],
    label: Annotated[str, typer.Option(help="Goes into the name of the new run.")] = "combined",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Several finished runs as one model, seed by seed: its similarity is the mean of theirs.

    The new run holds all their weights, and `eval`, `report` and `slo check` take it as they take any other. Of several
    runs that a name begins it is the newest.
    """
    from chimera_cli.services.combine import combine as combine_runs
    from chimera_cli.services.provenance import command_line

    with live("combine") as listener:
        result = combine_runs(home(), runs, label, device, command_line(), listener)
    emit(result, as_json, _full_table)


def _recipe(config: Path | None, resume: str | None) -> tuple[Group | None, Path]:
    """Return the group to go on with, if any, and the file with the settings: of the run where none is named."""
    if resume is None:
        if config is None:
            raise UsageError(
                "a recipe is missing", "--config configs/train/locked.yaml, or --resume RUN to go on with a run"
            )
        return None, config
    from chimera_cli.services.resume import recorded_config, resumable_group

    group = resumable_group(home(), resume)
    return group, config or recorded_config(group)


def _leads() -> bool:
    """Whether this is the process that shows and prints, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _leading_live(title: str) -> Iterator[Listener]:
    if not _leads():
        yield ignore
        return
    with live(title, vram_peak_gb=7.5) as listener:
        yield listener


def _with(changes: list[str] | None, **given: str | None) -> list[str]:
    """Return the changes and behind them, as `--set` takes them, the options that were given."""
    return [*(changes or []), *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)]


def _planned(
    slo: Path | None, names: list[str] | None, kind: Literal["train", "sanity"], config: Path | None, given: list[str]
) -> tuple[list[str], str]:
    """Return what the steps of the contingency plan set, as `--set` takes it, and the command with their full names.

    Steps such as "halve" take the values of `config` with the changes `given`. The command is what the run records, so
    that `slo plan` knows which steps were taken.
    """
    from chimera_cli.services.provenance import command_line

    if not names:
        if slo is not None:
            raise UsageError("--slo says where the steps of --plan are", "add --plan OBJECTIVE/ACTION")
        return [], command_line()
    from chimera_cli.config import SanityConfig, TrainConfig, load_config
    from chimera_cli.services.slo_plan import find_steps, settings_of
    from chimera_cli.slo.contingency import setting, with_plan

    steps = find_steps(slo, names, kind)
    values = load_config(TrainConfig if kind == "train" else SanityConfig, config, given).model_dump()
    changes = [setting(key, value) for key, value in settings_of(steps, values).items()]
    for step in steps:
        typer.echo(f"plan: {step.name}: {step.action.do}", err=True)
    return changes, with_plan(command_line(), [step.name for step in steps])


def _sanity_table(result: Mapping[str, Any]) -> RenderableType:
    from rich.text import Text

    from chimera_cli.ui.tables import facts

    figures, details = result["figures"], result["details"]
    verdict = Text("alive: the loss fell for the right reason", "green")
    if not details["passed"]:
        verdict = Text("no proof of life", "bold red")
    names = ("loss_first", "loss_last", "loss_drop", "loss_tail_mean", "chance_loss", "wall_s", "pairs_per_s")
    rows = [
        (FIGURES[name].label, format_value(name, figures[name])) for name in (*names, "vram_peak_gb", "ram_peak_gb")
    ]
    size, kind = (
        f"batch {details['batch']} at {details['image_size']} px",
        f"{details['precision']} on {details['device']}",
    )
    setting = f"{details['updates']} updates, {size}, {kind}"
    head = [("verdict", verdict), ("run", result["group"]), ("setting", setting)]
    return facts(f"proof of life, seed {result['seed']}", [*head, *rows])


def _full_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import facts

    seeds = ", ".join(str(seed) for seed in result["seeds"])
    rows = [("run", result["group"]), ("seeds", seeds)]
    for name, summary in result["over_seeds"].items():
        if summary is not None:
            label = ("dev " if name in RETRIEVAL else "") + FIGURES[name].label
            rows.append((label, format_spread(name, summary["mean"], summary["std"], summary["n"])))
    members = [("members", ", ".join(result["members"]))] if "members" in result else []
    return facts("combined" if members else "trained", rows[:1] + members + rows[1:])


def _estimate_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import facts

    figures, details = result["figures"], result["details"]
    labels = {
        "parameters_gb": "parameters",
        "gradients_gb": "gradients",
        "optimiser_gb": "optimiser",
        "activations_gb": f"activations of {details['micro_batch']:,} pairs",
        "inputs_gb": f"two batches of {details['batch']:,}",
        "loss_gb": "loss",
        "features_gb": "cached features",
        "features_cache_gb": "cache on the disk",
        "vram_estimate_gb": "VRAM at most, estimated",
        "ram_estimate_gb": "RAM at most, estimated",
    }
    rows = [(label, f"{figures[name]:.2f} GiB") for name, label in labels.items()]
    known = figures["wall_s"] is not None
    time = format_value("wall_s", figures["wall_s"]) if known else "not measured: no run of this recipe is finished"
    return facts(f"what it takes on {details['pack']}", [*rows, ("updates", f"{figures['updates']:,}"), ("wall", time)])
