"""`chimera slo history` and `chimera slo diff`: past runs before the law, and two runs beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from chimera_cli.cli.common import Json, emit
from chimera_cli.errors import ExitCode
from chimera_cli.runs import home

_MARKS = {"pass": "✓", "inconclusive": "~", "waived": "w", "unmeasured": "·", "fail": "✗"}
_LEGEND = "verdicts, oldest first: ✓ pass, ~ inconclusive (met in the mean), w waived, · unmeasured, ✗ fail"

OneRun = Annotated[str, typer.Argument(help="`latest`, a run, a seed of it (RUN/seed-1), or the beginning of a name.")]


def history_command(
    last: Annotated[int, typer.Option(min=1, help="How many finished train runs to look back.")] = 10,
    slo: Annotated[Path | None, typer.Option("--slo", help="Objectives to check; configs/slo.yaml is the law.")] = None,
    profile: Annotated[str, typer.Option(help="gpu: the whole law. cpu: leaves out GPU utilisation and VRAM.")] = "gpu",
    data: Annotated[str | None, typer.Option(help="Only runs on this pack.")] = None,
    budget: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the measured runs that may miss an objective.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Verdicts on past runs: pass rate, error budget and trend of each objective."""
    from chimera_cli.services.slo_history import history

    emit(history(home(), last, slo, profile, data, budget), as_json, _history)


def diff_command(
    a: OneRun,
    b: OneRun,
    split: Annotated[str, typer.Option(help="dev (also val, validation), train or test; no look is counted.")] = "dev",
    data: Annotated[str | None, typer.Option(help="Another pack on which both were evaluated.")] = None,
    resamples: Annotated[int, typer.Option(min=1000, max=100_000, help="Bootstrap resamples.")] = 10_000,
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Leave with 3 where any recall got significantly worse.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What run B does better or worse than run A on the same images, and how small a change could have been seen."""
    from chimera_cli.services.slo_diff import diff, exit_code

    result = diff(home(), a, b, split, data, resamples)
    emit(result, as_json, _diff)
    code = exit_code(result, fail_on_regression)
    if code != ExitCode.OK:
        raise typer.Exit(int(code))


# ---- history --------------------------------------------------------------------------------------------------------


def _history(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import result_table, word

    names = [one["id"] for one in result["objectives"]]
    rows = [
        [run["run"], run["finished_at"][:10], *(word(run["objectives"][name]["verdict"]) for name in names)]
        for run in result["runs"]
    ]
    count = "the last train run" if len(rows) == 1 else f"the last {len(rows)} train runs"
    on = f" on {result['data']}" if result["data"] else ""
    title = f"SLO history of {count}{on} by {result['slo']}, newest last"
    columns = ["objective", "verdicts", "pass rate", "budget left", "figure", "first", "last", "change"]
    return Group(
        *_heading(result["remarks"], title), result_table("", ["run", "finished", *names], rows), "",
        result_table("", columns, [row for one in result["objectives"] for row in _objective_rows(one)]), "",
        *_notes(result), *_dim(_history_notes(result)),
    )  # fmt: skip


def _heading(remarks: Sequence[str], title: str) -> list[RenderableType]:
    from chimera_cli.ui.tables import cell

    lines = [cell(line) for line in (*remarks, title)]
    for line in lines:
        line.stylize("bold" if line is lines[-1] else "bold yellow")
    return [*lines, ""]


def _dim(lines: Sequence[str]) -> list[Text]:
    return [Text(line, style="dim") for line in lines]


def _objective_rows(one: Mapping[str, Any]) -> list[list[str | Text]]:
    from chimera_cli.figures import format_value

    rate = "–" if one["pass_rate"] is None else f"{one['met']} of {one['measured']}, {100 * one['pass_rate']:.0f} %"
    first: list[str | Text] = [one["id"], "".join(_MARKS[word] for word in one["verdicts"]), rate, _budget_left(one)]
    rows = []
    for figure in one["figures"]:
        values = [format_value(figure["figure"], figure[end]) for end in ("first", "last")]
        rows.append([*first, figure["label"], *values, _change(figure)])
        first = ["", "", "", ""]
    return rows


def _budget_left(one: Mapping[str, Any]) -> str:
    """Return what is left of the error budget in runs, and as a share of it; nothing measured is nothing known."""
    budget = one["budget"]
    if not one["measured"]:
        return "–"
    runs = f"{budget['remaining']:.3g} run{'' if budget['remaining'] == 1 else 's'}"
    return runs if budget["remaining_share"] is None else f"{runs}, {100 * budget['remaining_share']:.0f} %"


def _change(figure: Mapping[str, Any]) -> Text:
    from chimera_cli.figures import format_value

    change = figure["change"]
    if not change:
        return Text("–" if change is None else "0")
    style = {"worse": "yellow", "better": "green"}.get(figure["direction"] or "", "")
    return Text(f"{'+' if change > 0 else '-'}{format_value(figure['figure'], abs(change))}", style=style)


def _notes(result: Mapping[str, Any]) -> list[RenderableType]:
    """Return why the newest run does not pass, and which verdicts rest on fewer measurements than there are runs."""
    from chimera_cli.ui.tables import cell

    newest = result["runs"][-1]
    lines = [
        f"{name} of {newest['run']}: {one['verdict']}, {one['reason']}"
        for name, one in newest["objectives"].items()
        if one["verdict"] != "pass"
    ]
    for one in result["objectives"]:
        if 0 < one["evidence_runs"] < one["measured"]:
            behind = (
                "one measurement stands" if one["evidence_runs"] == 1 else f"{one['evidence_runs']} measurements stand"
            )
            lines.append(f"{one['id']}: {behind} for {one['measured']} runs made alike")
    return [cell(line) for line in lines]


def _history_notes(result: Mapping[str, Any]) -> list[str]:
    return [
        _LEGEND,
        f"budget: {100 * result['budget']:g} % of the measured runs may miss an objective; a waived breach counts, "
        "an unmeasured run does not",
    ]


# ---- diff -----------------------------------------------------------------------------------------------------------


def _diff(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import cell, result_table

    columns = ["figure", "A", "B", "change (95 %)", "relative % (95 %)", "smallest effect", "verdict"]
    rows: list[list[str | Text]] = [
        [_short(name), *_values(name, one), _points(name, one), _relative(one), _amount(name, one["smallest_effect"]),
         Text(one["verdict"], style={"better": "green", "worse": "bold red"}.get(one["verdict"], ""))]
        for name, one in result["changes"].items()
    ]  # fmt: skip
    title = f"B against A on the same {result['images']:,} images of {result['pack']['name']}, {result['split']}"
    sides = [f"{side.upper()}: {result[side]['run']} ({_seeds(result[side])})" for side in ("a", "b")]
    return Group(
        *_heading(result["remarks"], title), *map(cell, sides), *map(cell, _settings(result)), "",
        result_table("", columns, rows), "", Text(_conclusion(result), style="bold"), *_dim(_diff_notes(result)),
    )  # fmt: skip


def _short(name: str) -> str:
    """Return a recall as the field writes it: `i2t R@10`; eight columns leave no room for more."""
    return name.replace("_r", " R@")


def _seeds(side: Mapping[str, Any]) -> str:
    seeds = ", ".join(str(seed) for seed in side["seeds"])
    return f"seed {seeds}" if len(side["seeds"]) == 1 else f"seeds {seeds}"


def _settings(result: Mapping[str, Any]) -> list[str]:
    changed = result["settings"]
    if not changed:
        return ["settings: the same"]
    return ["settings that differ:", *(f"  {one['key']}: {one['a']} -> {one['b']}" for one in changed)]


def _values(name: str, one: Mapping[str, Any]) -> list[str]:
    from chimera_cli.figures import format_spread

    spreads = (one["a_over_seeds"], one["b_over_seeds"])
    return [format_spread(name, over["mean"], over["std"], over["n"]).rpartition(" (n=")[0] for over in spreads]


def _points(name: str, one: Mapping[str, Any]) -> str:
    """Return a change with its interval in percentage points, that of `rsum` as it is: `+2.1 (-0.3, +4.5)`."""
    scale, digits = (1, 3) if name == "rsum" else (100, 1)
    low, high = (f"{scale * end:+.{digits}f}" for end in one["absolute_interval"])
    return f"{scale * one['absolute']:+.{digits}f} ({low}, {high})"


def _amount(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "rsum" else f"{100 * value:.1f}"


def _relative(one: Mapping[str, Any]) -> str:
    if one["relative"] is None:
        return "–"
    if one["relative_interval"] is None:
        return f"{100 * one['relative']:+.1f}"
    low, high = (f"{100 * end:+.1f}" for end in one["relative_interval"])
    return f"{100 * one['relative']:+.1f} ({low}, {high})"


def _conclusion(result: Mapping[str, Any]) -> str:
    """Return the verdict on the sum of recalls in a sentence, and which single recalls got worse."""
    change, images = result["changes"]["rsum"], f"{result['images']:,} images"
    if result["verdict"] == "no difference":
        least = _amount("rsum", change["smallest_effect"])
        sentence = f"rsum: no difference that {images} could show; one of {least} would be seen four times in five"
    else:
        sentence = f"rsum: B is {result['verdict']} than A by {abs(change['absolute']):.3f}"
    return f"{sentence}; worse: {', '.join(map(_short, result['worse']))}" if result["worse"] else sentence


def _diff_notes(result: Mapping[str, Any]) -> list[str]:
    return [
        "recalls change by percentage points; A and B: mean ± standard deviation over seeds",
        "smallest effect: the true change that this comparison finds with 80 % power; verdicts at 5 % each",
        f"intervals: paired bootstrap over images (their captions with them) and seeds, "
        f"{result['bootstrap']['resamples']:,} resamples",
    ]
