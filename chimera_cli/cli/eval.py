"""`chimera eval`: retrieval recall of a run, with intervals over images and spread over seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from chimera_cli.cli import eval_looks
from chimera_cli.cli.common import Device, Json, emit, live
from chimera_cli.errors import UsageError
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
    baseline: Annotated[
        Literal["cca"] | None,
        typer.Option(help="Beside the run, or of a pack without one: cca in closed form on the same frozen features."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="With --baseline and no run: the recipe whose features it takes.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="With --baseline and no run: key.sub=value of that recipe.")
    ] = None,
    errors: eval_looks.Errors = None,
    query: eval_looks.Query = None,
    top: eval_looks.Top = None,
    sheet: eval_looks.Sheet = None,
    classes: eval_looks.Classes = None,
    templates: eval_looks.Templates = None,
    labels: eval_looks.Labels = None,
    resamples: Annotated[int, typer.Option(min=100, max=100_000, help="Bootstrap resamples for the intervals.")] = 1000,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Retrieval recall of a run in both directions, with 95 % intervals, chance beside it; zero-shot classification."""
    _check_baseline(baseline, config, changes, zero_shot)
    looks = eval_looks.Looks(errors, query, top, sheet, classes, templates, labels)
    if looks.asked():
        where = {"run": run, "split": split, "data": data, "device": device}
        eval_looks.show_look(looks, where, resamples, {"zero-shot": zero_shot, "baseline": baseline}, as_json)
        return
    with live(f"eval {split}") as listener:
        if baseline is None:
            from chimera_cli.services.eval import evaluate_group

            result = evaluate_group(home(), run, split, data, device, resamples, zero_shot, listener)
        else:
            from chimera_cli.services.baseline import evaluate_baseline

            result = evaluate_baseline(home(), run, split, data, device, resamples, config, changes or (), listener)
    emit(result, as_json, _table)


def _check_baseline(
    baseline: str | None, config: Path | None, changes: list[str] | None, zero_shot: str | None
) -> None:
    """Refuse options that would have no effect."""
    if baseline is None and (config is not None or changes):
        raise UsageError("--config and --set choose the features of a baseline", "add --baseline cca or leave them out")
    if baseline is not None and zero_shot is not None:
        raise UsageError("the baseline classifies nothing", "give --baseline and --zero-shot one after the other")


def _table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.figures import FIGURES, format_value
    from chimera_cli.ui.tables import result_table

    seeds, baseline = result["by_seed"], result["baseline"]
    # More than three columns with intervals don't fit beside each other; --json has all seeds.
    shown = seeds if len(seeds) + bool(baseline) <= 3 else []
    documents = {f"seed {one['seed']} (95 %)": one for one in shown} | ({"CCA (95 %)": baseline} if baseline else {})
    mean = ["mean ± std (n)"] if seeds else []
    rows = []
    for name in result["figures"]:
        cells = [_spread(name, result["over_seeds"][name])] if seeds else []
        cells += [_with_interval(name, one) for one in documents.values()]
        rows.append([FIGURES[name].label, *cells, format_value(name, result["chance"].get(name))])
    columns = ["figure", *mean, *documents, "chance"]
    title = f"{result['run'] or 'baseline'} on {result['pack']['name']}, {result['split']}"
    return Group(result_table(title, columns, rows), *(Text(line, style="dim") for line in _remarks(result)))


def _spread(name: str, summary: Mapping[str, Any] | None) -> str:
    from chimera_cli.figures import format_spread

    return "–" if summary is None else format_spread(name, summary["mean"], summary["std"], summary["n"])


def _with_interval(name: str, document: Mapping[str, Any]) -> str:
    """Return `41.7 % (38.5–44.8)`; zero-shot figures have no interval."""
    from chimera_cli.figures import format_value

    figures = document["figures"] | ((document.get("zero_shot") or {}).get("figures") or {})
    ends = document["intervals"].get(name)
    if ends is None:
        return format_value(name, figures.get(name))
    low, high = (format_value(name, end).removesuffix(" %") for end in ends)
    return f"{format_value(name, figures[name])} ({low}–{high})"


def _remarks(result: Mapping[str, Any]) -> list[str]:
    baseline = result["baseline"]
    first = result["by_seed"][0] if result["by_seed"] else baseline
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
        chosen = "the checkpoint was" if result["by_seed"] else "the settings were"
        lines.append(f"{chosen} chosen on this split, so its figures are a little optimistic")
    if baseline is not None:
        lines += _of_baseline(result, baseline)
    if result["split"] == "test" and result["by_seed"]:
        lines.append(f"looks at the test split with this run: {result['test_looks']}")
    return lines


def _of_baseline(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    from chimera_cli.services.baseline import described
    from chimera_cli.slo.baseline import baseline_words

    if not result["by_seed"]:
        return [described(baseline)]
    return [described(baseline), f"the run is {baseline_words(result['figures'], baseline['figures'])}"]
