"""The process: runs the command line and turns known failures into one sentence, one hint and an exit code."""

import os
import sys
from typing import NoReturn

from chimera_cli.errors import ChimeraError, ExitCode


def main() -> NoReturn:
    """Run `chimera` with the arguments of the process and leave with its exit code."""
    # Before torch is loaded: OpenMP's threads else spin while they wait, and the threads that load data and those that
    # train take the cores from each other (four times slower on two busy cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from chimera_cli.cli.main import app, debug_wanted

    try:
        app()
    except ChimeraError as error:
        if debug_wanted():
            raise
        _print_failure(error)
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))
    except BrokenPipeError:
        # The reader of our stdout has gone, as in `chimera report | head`: nothing is wrong, and nobody listens.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(int(ExitCode.OK))
    sys.exit(int(ExitCode.OK))


def _print_failure(error: ChimeraError) -> None:
    from rich.console import Console

    from chimera_cli.ui.text import plain

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {plain(error.message)}")
    if error.hint:
        console.print(f"[dim]hint:[/]  {plain(error.hint)}")


if __name__ == "__main__":
    main()
