"""What all commands share: results on stdout, live progress on stderr, failures in one sentence."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType

from chimera_cli.events import Listener
from chimera_cli.runs import cannot_write

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU where there is one.")]


def new_app(help: str) -> typer.Typer:
    """Return a group of commands that shows its help when called with none."""
    return typer.Typer(help=help, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


def emit(result: Mapping[str, Any], as_json: bool, render: Callable[[Mapping[str, Any]], RenderableType]) -> None:
    """Print a result on stdout: one JSON object, or what `render` makes of it."""
    if as_json:
        write(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        # In a pipe there is no width to keep to; 80 columns would break tables that a file has room for.
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
        console = Console(width=width)
        with console.capture() as capture:
            console.print(render(result))
        write(capture.get())


def write(text: str) -> None:
    """Write to stdout as it is. A reader who has gone (`| head`) is no error and changes no exit code.

    Raises ChimeraError where stdout can't take it, as a file on a full disk.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of_stdout()
    except OSError as error:
        _let_go_of_stdout()
        raise cannot_write(Path("stdout"), error) from error


def _let_go_of_stdout() -> None:
    """Send what is still buffered nowhere, instead of failing once more when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def live(title: str, **limits: float) -> Iterator[Listener]:
    """Show long work on stderr and yield its listener: a dashboard on a terminal, plain lines elsewhere.

    `limits` are SLO limits by figure name, drawn beside the readings.
    """
    from chimera_cli.ui.live import display

    with display(title, limits) as listener:
        yield listener
