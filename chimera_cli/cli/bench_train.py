"""`chimera bench train`: our training beside a peer's, on the same towers, weights and pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType

from chimera_cli.cli.bench_speedrun import Data, Recipe, Set, Target, with_data
from chimera_cli.cli.common import Json, emit, live
from chimera_cli.runs import home

Parts = Annotated[
    Literal["both", "locked", "full"],
    typer.Option(help="The way to a recall with a locked image tower, full fine-tuning, or both."),
]
PeerUpdates = Annotated[
    int | None,
    typer.Option(min=3, help="Time the peer for so many updates and project its time, instead of letting it train."),
]
_FULL = "Full fine-tuning"
PROJECTION = (
    "the peer did not train to the target: its time is the pairs that ours needed at its measured rate, "
    "which takes it to learn as fast from a pair"
)


def train_command(
    against: Annotated[str, typer.Option(help="The peer: open_clip.")] = "open_clip",
    config: Recipe = Path("configs/train/locked.yaml"),
    parts: Parts = "both",
    target: Target = 0.66,
    give_up: Annotated[float, typer.Option(min=1, help="Stop the peer at so many times our cold time.")] = 25.0,
    peer_updates: PeerUpdates = None,
    updates: Annotated[int, typer.Option(min=1, help="Timed updates of each.", rich_help_panel=_FULL)] = 50,
    batch: Annotated[int, typer.Option(min=2, help="Pairs per update of both.", rich_help_panel=_FULL)] = 32,
    peer_lr: Annotated[float, typer.Option(min=0, help="The peer's one learning rate; its own default.")] = 5e-4,
    peer_workers: Annotated[int, typer.Option(min=0, help="The peer's loading processes.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Decides the pairs and their order, for both.")] = 0,
    data: Data = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Our training beside open_clip's: time to a recall with a locked image tower, pairs/s of full fine-tuning."""
    from chimera_cli.config import TrainConfig, load_config
    from chimera_cli.services.bench_train import TrainRace, bench_train
    from chimera_cli.services.provenance import command_line

    recipe = load_config(TrainConfig, config, with_data(changes, data))
    race = TrainRace(
        against, parts, seed, target, give_up, peer_updates, updates, batch, peer_lr, peer_workers
    )  # fmt: skip
    with live("bench train") as listener:
        result = bench_train(home(), recipe, race, config.stem, command_line(), listener)
    emit(result, as_json, _train_table)


def _train_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.figures import format_value
    from chimera_cli.ui.tables import facts

    details = result["details"]
    basis = (details["locked"] or {}).get("basis")
    shown: list[RenderableType] = [
        facts(f"training against {details['against']}", [
            ("run", result["group"]),
            ("same for both", "towers, weights, pairs in order, batch, threads; one stands still while the other runs"),
            ("clock", "ours with building the model and features; the peer's updates alone; evaluations in neither"),
            *([("projected", PROJECTION)] if basis == "projected" else []),
            ("peak RAM", format_value("ram_peak_gb", result["figures"]["ram_peak_gb"]) + " (ours)"),
        ]),
    ]  # fmt: skip
    if details["locked"]:
        shown += ["", *_locked(details)]
    if details["full"]:
        shown += ["", *_full(details["full"])]
    return Group(*shown)


def _locked(details: Mapping[str, Any]) -> list[RenderableType]:
    from chimera_cli.reporting.training_benchmarks import ratio_words
    from chimera_cli.ui.tables import facts, result_table

    part = details["locked"]
    peer = part["peer"]
    ours = [
        [f"chimera, {name}", _time(part[kind]), _rate(part[kind]["pairs"] / part[kind]["train_s"]), _recall(part[kind]),
         ratio_words(part["basis"], part[f"ratio_{kind}"])]
        for kind, name in (("cold", "nothing cached"), ("cached", "features cached"))
    ]  # fmt: skip
    row = [details["against"], peer_words(details), _rate(peer["pairs_per_s"]), _recall(peer), ""]
    columns = ["", f"to t2i R@10 {100 * details['target']:g} %", "pairs/s in updates", "t2i R@10 on dev", "peer took"]
    setting = f"image tower locked, batch {part['batch']} at {part['image_size']} px"
    return [
        result_table("", columns, [*ours, row]),
        "",
        facts("", _settings(setting, peer["settings"], peer["failed"])),
    ]


def _full(part: Mapping[str, Any]) -> list[RenderableType]:
    from chimera_cli.ui.tables import facts, result_table

    ends = [min(part["ratio_by_round"]), max(part["ratio_by_round"])] if part["ratio_by_round"] else []
    ratio = "–" if part["ratio"] is None else f"{part['ratio']:.2f} x ({ends[0]:.2f} to {ends[1]:.2f})"
    rows = [["chimera", _rate(part["ours_pairs_per_s"]), ratio], ["open_clip", _rate(part["peer_pairs_per_s"]), ""]]
    what = f"batch {part['batch']} at {part['image_size']} px, {part['updates']} updates each in turn"
    table = result_table("", ["", "pairs/s", "of the peer's"], rows)
    return [table, "", facts("", _settings(f"full fine-tuning, {what}", part["settings"], part["failed"]))]


def _settings(setting: str, peer: Mapping[str, Any], failed: str | None) -> list[tuple[str, str]]:
    words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in peer.items())
    return [("setting", setting), ("open_clip", f"failed: {failed}" if failed else words)]


def peer_words(details: Mapping[str, Any]) -> str:
    """Return how long the peer took, or what is known of it."""
    from chimera_cli.figures import format_seconds

    part = details["locked"]
    peer = part["peer"]
    if peer["failed"]:
        return "failed"
    if part["basis"] == "projected":
        return f"{format_seconds(part['peer_s'])} projected"
    took = format_seconds(peer["seconds"])
    if part["basis"] is None:
        return f"not compared, ours missed the target; {took} in all"
    if peer["reached"]:
        return took
    return f"stopped after {took}" if peer["stopped"] else f"missed in its {took}"


def _time(run: Mapping[str, Any]) -> str:
    from chimera_cli.figures import format_seconds

    return format_seconds(run["wall_s"]) if run["reached"] else "missed"


def _rate(pairs_per_s: float | None) -> str:
    return "–" if pairs_per_s is None else f"{pairs_per_s:,.1f}"


def _recall(run: Mapping[str, Any]) -> str:
    found = (run["figures"] or {}).get("t2i_r10")
    return "–" if found is None else f"{100 * found:.1f} %"
