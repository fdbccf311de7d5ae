"""`chimera train`: proof of life and real training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from chimera_cli.cli.common import Json, emit, live, new_app
from chimera_cli.errors import ExitCode
from chimera_cli.figures import FIGURES, RETRIEVAL, format_spread, format_value
from chimera_cli.runs import home

app = new_app("Train a dual encoder: first the proof of life, then the real thing.")

Data = Annotated[str | None, typer.Option(help="Pack to train on; without it the newest that is not `toy`.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change one config key: key.sub=value. May be repeated.")]
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
    as_json: Json = False,
) -> None:
    """Proof of life: 200 updates of both towers; the loss must fall for the right reason. Exit 3 when it does not."""
    from chimera_cli.config import SanityConfig, load_config
    from chimera_cli.services.provenance import command_line
    from chimera_cli.services.train import train_sanity

    resolved = load_config(SanityConfig, config, _with_data(changes, data))
    with live("proof of life", wall_s=1500, vram_peak_gb=7.5) as listener:
        result = train_sanity(home(), resolved, seed, command_line(), listener, shuffled)
    emit(result, as_json, _sanity_table)
    if not result["details"]["passed"]:
        raise typer.Exit(ExitCode.BREACHED)


@app.command("full")
def full(
    config: Annotated[Path, typer.Option("--config", help="YAML file with the whole recipe.")],
    seeds: Annotated[str, typer.Option(help="Seeds, one run each: 0,1,2.")] = "0,1,2",
    data: Data = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Real training: one group with one run per seed, the best checkpoint of each chosen on dev."""
    from chimera_cli.config import TrainConfig, load_config, parse_seeds
    from chimera_cli.services.provenance import command_line
    from chimera_cli.services.train import train_full

    resolved = load_config(TrainConfig, config, _with_data(changes, data))
    wanted = parse_seeds(seeds)
    with live(f"train {config.stem}", vram_peak_gb=7.5) as listener:
        result = train_full(home(), resolved, wanted, config.stem, command_line(), listener)
    emit(result, as_json, _full_table)


def _with_data(changes: list[str] | None, data: str | None) -> list[str]:
    return [*(changes or []), *([] if data is None else [f"data={json.dumps(data)}"])]


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
    return facts("trained", rows)
