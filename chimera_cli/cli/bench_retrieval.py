"""`chimera bench retrieval`: the time of ranking beside the bare matrix product."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from chimera_cli.cli.common import Json, emit, live
from chimera_cli.runs import home


def retrieval_command(
    images: Annotated[int, typer.Option(min=1, help="Image embeddings.")] = 5_000,
    captions: Annotated[int, typer.Option(min=1, help="Caption embeddings, shared out evenly.")] = 25_000,
    dim: Annotated[int, typer.Option(min=1, help="Dimensions of an embedding.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of product and ranks in turn.")] = 5,
    as_json: Json = False,
) -> None:
    """How long all retrieval ranks take, beside the bare matrix product on the same cores, and how much memory."""
    from chimera_cli.services.bench_retrieval import bench_retrieval
    from chimera_cli.services.provenance import command_line

    with live("bench retrieval") as listener:
        result = bench_retrieval(
            home(), images=images, captions=captions, dim=dim, rounds=rounds, command=command_line(), listener=listener
        )
    emit(result, as_json, _retrieval_table)


def _retrieval_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.figures import format_value
    from chimera_cli.ui.tables import facts

    details = result["details"]
    lowest, highest = (end(details["ratio_by_round"]) for end in (min, max))
    setting = f"{details['images']:,} images x {details['captions']:,} captions, {details['dim']} dimensions"
    checked = f"{details['wrong_ranks']} of {details['checked_queries']} queries differ from float64"
    return facts("retrieval", [
        ("run", result["group"]),
        ("setting", f"{setting}, threads: {details['threads']}, rounds: {details['rounds']}"),
        ("bare product", format_value("wall_s", details["product_s"])),
        ("ranks, both ways", format_value("wall_s", details["ranks_s"])),
        ("ratio", f"{details['ratio']:.2f} ({lowest:.2f} to {highest:.2f})"),
        ("extra memory", f"{1024 * details['extra_memory_gb']:,.0f} MiB"),
        ("check", checked),
        ("peak RAM", format_value("ram_peak_gb", result["figures"]["ram_peak_gb"])),
    ])  # fmt: skip
