"""`chimera bench speedrun`: how long a recipe takes from the pack to a recall on dev."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from chimera_cli.cli.common import Json, emit, live
from chimera_cli.runs import home

Recipe = Annotated[Path, typer.Option("--config", help="YAML file with the recipe.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change one config key: key.sub=value. May be repeated.")]
Target = Annotated[float, typer.Option(min=0.001, max=1.0, help="Text to image R@10 on dev to be reached.")]
Data = Annotated[str | None, typer.Option(help="Pack to train on; without it the newest that is not `toy`.")]


def speedrun_command(
    config: Recipe = Path("configs/train/speedrun.yaml"),
    seeds: Annotated[str, typer.Option(help="Seeds, one cold and one cached run each.")] = "0,1,2",
    target: Target = 0.66,
    cold_only: Annotated[bool, typer.Option("--cold-only", help="Leave out the runs with cached features.")] = False,
    data: Data = None,
    changes: Set = None,
    sample_images: Annotated[int, typer.Option(min=1, help="Images that the plain pass is measured on.")] = 512,
    sample_captions: Annotated[int, typer.Option(min=1, help="Captions that it is measured on.")] = 2048,
    as_json: Json = False,
) -> None:
    """Wall time from the pack to a recall on dev, cold and with cached features, one log line for each run.

    The clock holds building the model, the features of train and dev, and the updates; evaluating dev after each epoch
    is not in it. Beside it: its share of one plain float32 pass of both towers over the same images and captions.
    """
    from chimera_cli.config import TrainConfig, load_config, parse_seeds
    from chimera_cli.services.bench_speedrun import SpeedrunSetting, bench_speedrun
    from chimera_cli.services.provenance import command_line

    recipe = load_config(TrainConfig, config, with_data(changes, data))
    setting = SpeedrunSetting(target, not cold_only, sample_images, sample_captions)
    with live("bench speedrun") as listener:
        result = bench_speedrun(home(), recipe, parse_seeds(seeds), setting, config.stem, command_line(), listener)
    emit(result, as_json, _speedrun_table)


def with_data(changes: list[str] | None, data: str | None) -> list[str]:
    """Return what `--set` and `--data` change, as the loader of configs takes it."""
    import json

    return [*(changes or []), *([] if data is None else [f"data={json.dumps(data)}"])]


def _speedrun_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.figures import format_seconds, format_spread, format_value
    from chimera_cli.reporting.training_benchmarks import share_words
    from chimera_cli.reporting.words import plural
    from chimera_cli.statistics import Summary
    from chimera_cli.ui.tables import facts, result_table

    rows, seeds = [], len(result["seeds"])
    for kind, reached in result["reached"].items():
        time, share = (result["over_seeds"][f"{kind}_{what}"] for what in ("s", "share"))
        missed = f"missed by {seeds - reached} of {plural(seeds, 'seed')}"
        rows.append([
            kind,
            missed if time is None else format_spread("wall_s", time["mean"], time["std"], time["n"]),
            "–" if share is None else share_words(Summary(**share)),
        ])  # fmt: skip
    plain, figures = result["results"][0]["details"]["plain"], result["figures"]
    return Group(
        facts("speedrun", [
            ("run", result["group"]),
            ("target", f"dev text to image R@10 of {100 * result['target']:g} %, looked at after each epoch"),
            ("clock", "model, features of train and dev, updates; evaluations are not in it"),
            ("plain pass", f"{format_seconds(plain['seconds'])} for {plain['images']:,} images and "
                           f"{plain['captions']:,} captions (eager float32, NCHW), drawn out from "
                           f"{plain['sampled_images']:,} and {plain['sampled_captions']:,} at random"),
            ("log", f"speedrun.log in the folder of the run, one line each: {plural(len(result['log']), 'line')}"),
            ("peak RAM", format_value("ram_peak_gb", figures["ram_peak_gb"])),
        ]),
        "",
        result_table("", ["features", "time to the target", "share of the plain pass"], rows),
        "",
        *(Text(line, overflow="fold") for line in result["log"]),
    )  # fmt: skip
