"""The `chimera` command: all its parts by name."""

from typing import Annotated

import typer

from chimera_cli import __version__
from chimera_cli.cli import bench, data, runs, slo, train
from chimera_cli.cli.common import new_app
from chimera_cli.cli.doctor import doctor_command
from chimera_cli.cli.eval import eval_command
from chimera_cli.cli.report import report_command

app = new_app("Train, prove and gate small vision-language models on one consumer GPU or a CPU.")
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(train.app, name="train")
app.command("eval")(eval_command)
app.add_typer(slo.app, name="slo")
app.command("report")(report_command)
app.command("doctor")(doctor_command)
app.add_typer(runs.app, name="runs")

_options = {"debug": False}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chimera {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a known failure.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Train, prove and gate small vision-language models on one consumer GPU or a CPU.

    Start with `chimera train sanity --seed 0`: it needs no data and no network.
    """
    _options["debug"] = debug


def debug_wanted() -> bool:
    """Whether `--debug` was typed."""
    return _options["debug"]
