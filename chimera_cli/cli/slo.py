"""`chimera slo`: verdicts on a run, and what to do about a breach."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from chimera_cli.cli.common import Json, emit, new_app
from chimera_cli.errors import ExitCode
from chimera_cli.runs import home

app = new_app("Hold a run against the service level objectives, and plan what to do about a breach.")

Run = Annotated[str, typer.Option(help="`latest`, a run, a seed of it (RUN/seed-1), or the beginning of a name.")]
Profile = Annotated[str, typer.Option(help="gpu: the whole law. cpu: leaves out GPU utilisation and VRAM.")]
SloFile = Annotated[Path | None, typer.Option("--slo", help="Objectives to check; configs/slo.yaml is the law.")]


@app.command("check")
def check_command(
    run: Run = "latest",
    profile: Profile = "gpu",
    slo: SloFile = None,
    strict: Annotated[bool, typer.Option("--strict", help="Leave with 4 where a verdict is inconclusive.")] = False,
    as_json: Json = False,
) -> None:
    """Verdicts on a run. Leaves with 0 when all is met, 3 for a breach, 4 where something could not be measured."""
    from chimera_cli.services.slo import check

    result = check(home(), run, slo, profile, strict)
    emit(result, as_json, _verdicts)
    if not as_json:
        _print_whole([*_notes(result), "", _rung(result), _conclusion(result)])
        _warn_inconclusive(result)
    if result["exit_code"] != ExitCode.OK:
        raise typer.Exit(result["exit_code"])


@app.command("plan")
def plan_command(run: Run = "latest", profile: Profile = "gpu", slo: SloFile = None, as_json: Json = False) -> None:
    """The next contingency step for a run that breaks a law, as a command to paste."""
    from chimera_cli.services.slo import plan

    result = plan(home(), run, slo, profile)
    if as_json:
        emit(result, as_json, str)
    else:
        typer.echo(_script(result))


def _warn_inconclusive(result: Mapping[str, Any]) -> None:
    doubtful = [one["id"] for one in result["objectives"] if one["verdict"] == "inconclusive"]
    if doubtful:
        typer.echo(f"warning: {', '.join(doubtful)} inconclusive; `chimera slo plan` narrows the interval", err=True)


# ---- rendering ------------------------------------------------------------------------------------------------------


def _verdicts(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import result_table, word

    rows = []
    for objective in result["objectives"]:
        name, verdict = objective["id"], word(objective["verdict"])
        for condition in objective["conditions"]:
            limit = condition["law"].removeprefix(condition["label"]).strip()
            rows.append([name, verdict, condition["label"], condition["measured"], limit, _margin(condition)])
            name, verdict = "", word("")
    pack = result["pack"].get("name", "no pack")
    title = f"SLO check of {result['run']} ({len(result['seeds'])} seeds, {pack}) by {result['slo']}"
    table = result_table("", ["law", "verdict", "figure", "measured", "limit", "margin"], rows)
    table.columns[1].no_wrap = True
    return Group(*_heading(result, title), table)


def _print_whole(lines: Sequence[str | Text]) -> None:
    """Print lines without breaking them: commands and paths in them are there to be copied."""
    console = Console()
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _heading(result: Mapping[str, Any], title: str) -> list[RenderableType]:
    """Return what stands above every output: that it is not the law or not the whole of it comes before the title."""
    return [*(Text(remark, style="bold yellow") for remark in result["remarks"]), Text(title, style="bold"), ""]


def _margin(condition: Mapping[str, Any]) -> Text:
    """Return the distance to the limit on the good side, coloured where the condition is no pass."""
    from chimera_cli.figures import format_value

    margin, word = condition["margin"], condition["verdict"]
    if margin is None:
        return Text(format_value(condition["figure"], None))
    style = {"fail": "bold red", "inconclusive": "yellow"}.get(word, "")
    return Text(f"{'+' if margin >= 0 else '-'}{format_value(condition['figure'], abs(margin))}", style=style)


def _notes(result: Mapping[str, Any]) -> list[str | Text]:
    """Return per law why it is no pass, what would measure it, what is reported beside it, and where it comes from."""
    lines: list[str | Text] = []
    for objective in result["objectives"]:
        parts = [objective["reason"]] if objective["reason"] else []
        parts += [f"measure it: {objective['measure']}"] if objective["measure"] else []
        parts += _beside(objective)
        parts += [f"evidence: {objective['evidence']}"] if objective["evidence"] else []
        lines += ["", Text(f"{objective['id']}: {objective['title']}", style="bold")]
        lines += [f"  {part}" for part in parts]
    return lines


def _beside(objective: Mapping[str, Any]) -> list[str]:
    from chimera_cli.figures import FIGURES, format_spread, format_value

    lines = []
    for condition in objective["conditions"]:
        if condition["target"] is not None:
            target = format_value(condition["figure"], condition["target"])
            sign = condition["law"].removeprefix(condition["label"]).split()[0]
            lines.append(f"target: {condition['label']} {sign} {target}")
    for beside in objective["beside"]:
        summary = beside["summary"]
        if summary is not None:
            text = format_spread(beside["figure"], summary["mean"], summary["std"], summary["n"])
            wish = "" if beside["target"] is None else f", target {format_value(beside['figure'], beside['target'])}"
            lines.append(f"beside it: {FIGURES[beside['figure']].label} {text}{wish}")
    return lines


def _conclusion(result: Mapping[str, Any]) -> Text:
    from chimera_cli.ui.tables import word

    ends = {
        "pass": "every objective is met",
        "waived": "every objective is met or waived",
        "inconclusive": "no objective is missed, not all are certain",
        "unmeasured": "not everything was measured, so nothing is proven",
        "fail": "an objective is missed; `chimera slo plan` says what to do next",
    }
    return Text.assemble(word(result["verdict"]), f": {ends[result['verdict']]}")


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


def _script(result: Mapping[str, Any]) -> str:
    """Return a piece of shell: what to know as comments, the command by itself, whole on one line."""
    lines = [*result["remarks"], f"{result['run']}, profile {result['profile']}: {result['verdict']}"]
    if result["objective"]:
        lines.append(f"{result['objective']}: {result['reason']}")
    lines.append(result["do"] + (f" ({result['action']})" if result["action"] else ""))
    if result["remaining"]:
        lines.append(f"after it: {', '.join(result['remaining'])}")
    return "\n".join([*(f"# {line}" for line in lines), *([result["command"]] if result["command"] else [])])
