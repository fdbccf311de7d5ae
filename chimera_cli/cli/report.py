"""`chimera report`: benchmark tables, verdicts and ladder as Markdown on stdout, with plots as HTML in a file."""

from pathlib import Path
from typing import Annotated

import typer

from chimera_cli.cli.common import Json, emit, write
from chimera_cli.runs import home


def report_command(
    run: Annotated[str, typer.Option(help="A training run, a unique prefix of one, or latest.")] = "latest",
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page with plots here.")] = None,
    update: Annotated[
        Path | None, typer.Option(help="Refresh the short report between the markers of this file instead.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="cpu or gpu, as in `slo check`; without it what the run's hardware is.")
    ] = None,
    slo: Annotated[Path | None, typer.Option("--slo", help="YAML file with the objectives.")] = None,
    as_json: Json = False,
) -> None:
    """Benchmark tables, SLO verdicts, recall and ladder as Markdown: `chimera report > benchmarks.md`."""
    from chimera_cli.services.report import report

    made = report(home(), run, profile=profile, slo=slo, html=html, update=update)
    if as_json:
        emit(made.facts, as_json, str)
    elif made.updated is not None:
        write(f"{made.updated}: the report {'is refreshed' if made.changed else 'was up to date already'}\n")
    else:
        write(made.markdown)
    if made.html is not None and not as_json:
        typer.echo(f"{made.html} holds the same with plots", err=True)
