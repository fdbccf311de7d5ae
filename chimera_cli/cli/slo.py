"""`chimera slo`: verdicts on a run, and what to do about a breach."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from chimera_cli.cli.common import Json, emit, new_app, write
from chimera_cli.cli.slo_history import diff_command, history_command
from chimera_cli.errors import ExitCode, UsageError
from chimera_cli.runs import home

# Columns of a terminal below which the intervals and margins of a check are left out; --explain and --json have them.
_WHOLE_TABLE = 90

app = new_app("Hold a run against the service level objectives, and plan what to do about a breach.")

Run = Annotated[str, typer.Option(help="`latest`, a run, a seed of it (RUN/seed-1), or the beginning of a name.")]
Profile = Annotated[str, typer.Option(help="gpu: the whole law. cpu: leaves out GPU utilisation and VRAM.")]
SloFile = Annotated[Path | None, typer.Option("--slo", help="Objectives to check; configs/slo.yaml is the law.")]
Strict = Annotated[bool, typer.Option("--strict", help="Leave with 4 where a verdict is inconclusive.")]
Explain = Annotated[
    str | None, typer.Option("--explain", help="One objective step by step; leaves with the code of its verdict alone.")
]
Format = Annotated[
    Literal["table", "json", "junit", "markdown", "github"],
    typer.Option("--format", help="junit: a file for CI servers. github: annotations of a workflow run."),
]


@app.command("check")
def check_command(
    run: Run = "latest",
    profile: Profile = "gpu",
    slo: SloFile = None,
    strict: Strict = False,
    explain: Explain = None,
    form: Format = "table",
    as_json: Json = False,
) -> None:
    """Verdicts on a run. Leaves with 0 when all is met, 3 for a breach, 4 where something could not be measured."""
    chosen = _format(form, as_json, explain)
    if explain is not None:
        from chimera_cli.services.slo_explain import explain_objective

        result = explain_objective(home(), explain, run, slo, profile, strict)
    else:
        from chimera_cli.services.slo import check

        result = check(home(), run, slo, profile, strict)
    _show(result, chosen, explain is not None)
    if result["exit_code"] != ExitCode.OK:
        raise typer.Exit(result["exit_code"])


@app.command("plan")
def plan_command(run: Run = "latest", profile: Profile = "gpu", slo: SloFile = None, as_json: Json = False) -> None:
    """The next contingency step for a run that breaks a law, as a command to paste."""
    from chimera_cli.services.slo_plan import plan

    result = plan(home(), run, slo, profile)
    if as_json:
        _show(result, "json")
    else:
        _show(result, "script")


app.command("history")(history_command)
app.command("diff")(diff_command)


def _format(form: str, as_json: bool, explain: str | None) -> str:
    if as_json and form not in ("table", "json"):
        raise UsageError(f"--json and --format {form} are two formats", "give one of them")
    if explain is not None and form not in ("table", "json"):
        raise UsageError(f"--explain can't be written as {form}", "leave --format out, or take --format json")
    return "json" if as_json else form


def _show(result: Mapping[str, Any], form: str, explained: bool = False) -> None:
    """Print a result on stdout in the wanted format; doubts are told on stderr, whatever stdout is read by."""
    from chimera_cli.services.slo_formats import FORMATS
    from chimera_cli.services.slo_lines import harmless

    if form in FORMATS:
        write(FORMATS[form](result).rstrip("\n") + "\n")
    elif form == "script":
        write(_script(harmless(result)) + "\n")
    elif explained:
        _print_whole(_explanation(harmless(result)))
    else:
        _print_table(harmless(result))
    doubtful = [one["id"] for one in result.get("objectives", ()) if one["verdict"] == "inconclusive"]
    if doubtful:
        typer.echo(f"warning: {', '.join(doubtful)} inconclusive; `chimera slo plan` narrows the interval", err=True)


# ---- the table ------------------------------------------------------------------------------------------------------


def _print_table(result: Mapping[str, Any]) -> None:
    emit(result, False, _verdicts)
    _print_whole([*_notes(result), "", *_waivers(result), _rung(result), _conclusion(result)])


def _verdicts(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.services.slo_lines import limit_of, title
    from chimera_cli.ui.tables import result_table, word

    rows = []
    for objective in result["objectives"]:
        name, verdict = objective["id"], word(objective["verdict"])
        for condition in objective["conditions"]:
            cells = [condition["label"], condition["measured"], condition["interval_words"], limit_of(condition)]
            rows.append([name, verdict, *cells, _margin(condition)])
            name, verdict = "", word("")
    columns = ["law", "verdict", "figure", "measured", "95 % interval", "limit", "margin"]
    shown = [0, 1, 2, 3, 5] if _is_narrow() else range(len(columns))
    table = result_table("", [columns[i] for i in shown], [[row[i] for i in shown] for row in rows])
    table.columns[1].no_wrap = True
    return Group(*_heading(result, title(result)), table)


def _is_narrow() -> bool:
    """Return whether the whole table has no room; in a pipe without COLUMNS `emit` keeps to no width."""
    return (sys.stdout.isatty() or "COLUMNS" in os.environ) and Console().width < _WHOLE_TABLE


def _print_whole(lines: Sequence[str | Text]) -> None:
    """Print lines without breaking them: commands and paths in them are there to be copied."""
    console = Console()
    with console.capture() as capture:
        for line in lines:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    write(capture.get())


def _heading(result: Mapping[str, Any], title: str) -> list[RenderableType]:
    """Return what stands above every output: that it is not the law or not the whole of it comes before the title."""
    return [*(Text(remark, style="bold yellow") for remark in result["remarks"]), Text(title, style="bold"), ""]


def _margin(condition: Mapping[str, Any]) -> Text:
    """Return the distance to the limit on the good side, coloured where the condition is no pass."""
    from chimera_cli.services.slo_lines import margin_of

    style = {"fail": "bold red", "inconclusive": "yellow"}.get(condition["verdict"], "")
    return Text(margin_of(condition), style=style)


def _notes(result: Mapping[str, Any]) -> list[str | Text]:
    """Return per law why it is no pass, what would measure it, what is reported beside it, and where it comes from."""
    from chimera_cli.services.slo_lines import notes

    lines: list[str | Text] = []
    for objective in result["objectives"]:
        lines += ["", Text(f"{objective['id']}: {objective['title']}", style="bold")]
        lines += [f"  {note}" for note in notes(objective)]
    return lines


def _waivers(result: Mapping[str, Any]) -> list[str | Text]:
    lines = [Text(f"waiver: {waiver['words']}", style="yellow") for waiver in result["waivers"]]
    return [*lines, ""] if lines else []


def _conclusion(result: Mapping[str, Any]) -> Text:
    from chimera_cli.services.slo_lines import ENDINGS
    from chimera_cli.ui.tables import word

    return Text.assemble(word(result["verdict"]), f": {ENDINGS[result['verdict']]}")


def _rung(result: Mapping[str, Any]) -> Text:
    """Return the distance to the next rung of the ladder; published figures stand only beside test figures."""
    from chimera_cli.figures import FIGURES

    ladder = result["ladder"]
    if ladder is None:
        if result["pack"].get("source") != "flickr8k":
            return Text("ladder: the published figures are of Flickr8k, this run is not", style="dim")
        return Text(f"ladder: needs test figures, chimera eval --run {result['run']} --split test", style="dim")
    if ladder["next"] is None:
        return Text("ladder: above every rung")
    gaps = ", ".join(f"{FIGURES[name].label} {100 * gap:+.1f}" for name, gap in ladder["gaps"].items())
    return Text(f"next rung: {ladder['next']['name']} ({ladder['next']['source']}); points to it: {gaps}")


# ---- one objective --------------------------------------------------------------------------------------------------


def _explanation(result: Mapping[str, Any]) -> list[str | Text]:
    """Return one verdict step by step: conditions, reason, commands that make the evidence again, contingency plan."""
    from chimera_cli.services.slo_lines import title
    from chimera_cli.ui.tables import word

    objective = result["objective"]
    lines: list[str | Text] = [Text(remark, style="bold yellow") for remark in result["remarks"]]
    lines += [Text(title(result), style="bold"), ""]
    lines.append(Text.assemble(word(result["verdict"]), f"  {objective['id']}: {objective['title']}"))
    lines += [f"  {objective['reason']}"] if objective["reason"] else []
    lines += [f"  {objective['baseline']['words']}"] if objective["baseline"] else []
    lines += [f"  {objective['waiver']['words']}"] if objective["waiver"] else []
    for condition in result["conditions"]:
        lines += _condition(condition)
    again = result["reproduce"] or ["not on this machine"]
    lines += ["", Text("make the evidence again", style="bold"), *(f"  {command}" for command in again)]
    lines += ["", Text("check it again", style="bold"), f"  {result['command']}"]
    return [*lines, "", Text("contingency plan", style="bold"), *_steps_of_plan(result["contingency"])]


def _condition(condition: Mapping[str, Any]) -> list[str | Text]:
    from chimera_cli.ui.tables import word

    lines: list[str | Text] = ["", Text.assemble(word(condition["verdict"]), f"  {condition['law']}")]
    lines.append(f"  formula: {condition['formula']}")
    for sample in condition["samples"]:
        value = "not measured" if sample["judged"] is None else f"{sample['judged']:.6g}"
        if sample["relative_to"] is not None and sample["value"] is not None:
            value += f" = {sample['value']:.6g} - {sample['relative_to']:.6g}"
        lines.append(f"  seed {sample['seed']}: {value}  {sample['file']}")
    return [*lines, *(f"  {step}" for step in condition["steps"] if step)]


def _steps_of_plan(steps: Sequence[Mapping[str, Any]]) -> list[str | Text]:
    from chimera_cli.slo.contingency import setting

    lines: list[str | Text] = [] if steps else ["  there is none"]
    for step in steps:
        state = f"tried: {step['tried']}" if step["tried"] else "not tried"
        sets = ", ".join(setting(key, value) for key, value in step["sets"].items())
        lines.append(f"  {step['step']} ({state})")
        lines.append(f"    {step['do']}{f' Sets {sets}.' if sets else ''}")
        lines += [f"    {run['run']}: {run['verdict']}, {run['measured']}" for run in step["reached"]]
        lines += [] if step["tried"] else [f"    {step['command']}"]
    return lines


# ---- the plan -------------------------------------------------------------------------------------------------------


def _script(result: Mapping[str, Any]) -> str:
    """Return a piece of shell: what to know as comments, the command by itself, whole on one line."""
    from chimera_cli.slo.contingency import setting

    lines = [*result["remarks"], f"{result['run']}, profile {result['profile']}: {result['verdict']}"]
    if result["objective"]:
        lines.append(f"{result['objective']}: {result['reason']}")
    lines += [f"tried {one['action']}: {one['how']}" for one in result["tried"]]
    lines.append(result["do"] + (f" ({result['action']})" if result["action"] else ""))
    lines += [f"it sets {setting(key, value)}" for key, value in result["sets"].items()]
    if result["remaining"]:
        lines.append(f"after it: {', '.join(result['remaining'])}")
    spent = [name for name in result["exhausted"] if name != result["objective"]]
    lines += [f"NO-GO for {name}: all steps of its plan are taken" for name in spent]
    return "\n".join([*(f"# {line}" for line in lines), *([result["command"]] if result["command"] else [])])
