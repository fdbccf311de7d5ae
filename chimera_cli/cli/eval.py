"""`chimera eval`: retrieval recall of a run, with intervals over images and spread over seeds."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from chimera_cli.cli.common import Device, Json, emit, live
from chimera_cli.runs import home


def eval_command(
    run: Annotated[
        str, typer.Option(help="`latest`, a run, a seed of it (RUN/seed-1), or a name's beginning.")
    ] = "latest",
    split: Annotated[
        str, typer.Option(help="dev (also val, validation), train or test; looks at test are counted.")
    ] = "dev",
    data: Annotated[str | None, typer.Option(help="Another pack than the one the run was trained on.")] = None,
    zero_shot: Annotated[
        str | None,
        typer.Option("--zero-shot", help="Column of the pack's items whose values are the classes to tell apart."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, max=100_000, help="Bootstrap resamples for the intervals.")] = 1000,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Retrieval recall of a run in both directions, with 95 % intervals, chance beside it; zero-shot classification."""
    from chimera_cli.services.eval import evaluate_group

    with live(f"eval {split}") as listener:
        result = evaluate_group(home(), run, split, data, device, resamples, zero_shot, listener)
    emit(result, as_json, _table)


def _table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.figures import FIGURES, format_value
    from chimera_cli.ui.tables import result_table

    seeds = result["by_seed"]
    # More than three seeds don't fit beside each other; --json has them all.
    shown = seeds if len(seeds) <= 3 else []
    columns = ["figure", "mean ± std (n)", *(f"seed {one['seed']} (95 %)" for one in shown), "chance"]
    rows = []
    for name in result["figures"]:
        cells = [_with_interval(name, one) for one in shown]
        chance = format_value(name, result["chance"].get(name))
        rows.append([FIGURES[name].label, _spread(name, result["over_seeds"][name]), *cells, chance])
    title = f"{result['run']} on {result['pack']['name']}, {result['split']}"
    return Group(result_table(title, columns, rows), *(Text(line, style="dim") for line in _remarks(result)))


def _spread(name: str, summary: Mapping[str, Any] | None) -> str:
    from chimera_cli.figures import format_spread

    return "–" if summary is None else format_spread(name, summary["mean"], summary["std"], summary["n"])


def _with_interval(name: str, document: Mapping[str, Any]) -> str:
    """Return `41.7 % (38.5–44.8)`; zero-shot figures have no interval."""
    from chimera_cli.figures import format_value

    figures = document["figures"] | ((document["zero_shot"] or {}).get("figures") or {})
    ends = document["intervals"].get(name)
    if ends is None:
        return format_value(name, figures.get(name))
    low, high = (format_value(name, end).removesuffix(" %") for end in ends)
    return f"{format_value(name, figures[name])} ({low}–{high})"


def _remarks(result: Mapping[str, Any]) -> list[str]:
    first = result["by_seed"][0]
    per_image = first["captions_per_image"]
    each = (
        str(per_image["min"]) if per_image["min"] == per_image["max"] else f"{per_image['min']} to {per_image['max']}"
    )
    lines = [
        f"{result['images']:,} images, {result['captions']:,} captions, {each} per image",
        f"intervals: bootstrap over query images, {first['bootstrap']['resamples']:,} resamples",
    ]
    if first["images_without_captions"]:
        lines.append(f"{first['images_without_captions']:,} images without captions are in the gallery and no queries")
    if result["split"] == "dev":
        lines.append("the checkpoint was chosen on this split, so its figures are a little optimistic")
    if result["split"] == "test":
        lines.append(f"looks at the test split with this run: {result['test_looks']}")
    return lines
