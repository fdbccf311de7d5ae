"""`chimera doctor`: is this machine fit for a run, and if not, the exact fix."""

from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from chimera_cli.cli.common import Json, emit
from chimera_cli.errors import ExitCode
from chimera_cli.runs import home


def doctor_command(as_json: Json = False) -> None:
    """Check driver, torch build, card, memory, disk, data and weights. Exit 1 when a run would fail."""
    from chimera_cli.services.doctor import doctor

    result = doctor(home())
    emit(result, as_json, _table)
    if not result["fit"]:
        raise typer.Exit(ExitCode.ERROR)


def _table(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import facts, word

    pairs: list[tuple[str, str | Text]] = []
    for check in result["checks"]:
        pairs.append((check["name"], Text.assemble(word(check["level"]), "  ", check["message"])))
        if check["fix"]:
            pairs.append(("", Text.assemble(("fix   ", "dim"), (check["fix"], "bold"))))
    verdict = Text("fit for a run", "green") if result["fit"] else Text("a run would fail here", "bold red")
    return Group(facts("", pairs), "", verdict)
