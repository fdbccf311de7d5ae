"""The display in a real terminal (a pseudo-terminal), without one, and when it is interrupted."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from chimera_cli.events import Note, Progress, RunStarted
from chimera_cli.ui.live import display
with display("proof of life", {}) as tell:
    tell(RunStarted("group", "sanity", 0, "d"))
    for done in range(3):
        tell(Progress("features", done, 2))
    for number in range(4):
        tell(Note(f"[b]warning {number}[/nope]", "warning"))
    print("the result")
    INTERRUPT
"""


def run_in_terminal(script: str, **environment: str) -> tuple[int, str, str]:
    """Return exit code, stdout and what stderr, a terminal of 100 columns, was sent."""
    master, slave = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=slave, env=env | environment
    ) as process:
        os.close(slave)
        chunks = []
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # Linux ends a pseudo-terminal whose other side is closed with EIO
                break
            if not chunk:
                break
            chunks.append(chunk)
        assert process.stdout is not None
        out = process.stdout.read().decode()
    os.close(master)
    return process.returncode, out, b"".join(chunks).decode()


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("raise KeyboardInterrupt", -2)])
def test_a_dashboard_leaves_the_terminal_as_it_was(ending: str, code: int) -> None:
    returned, out, screen = run_in_terminal(SCRIPT.replace("INTERRUPT", ending))
    assert returned in (code, 130)
    assert out == "the result\n"
    assert "proof of life" in screen
    assert "╭" in screen
    assert screen.count("\x1b[?25l") == screen.count("\x1b[?25h") == 1
    assert screen.index("\x1b[?25l") < screen.index("\x1b[?25h")
    # The first of four warnings had scrolled out of the picture; it is printed below.
    assert "warning: [b]warning 0[/nope]" in screen


def test_no_color_draws_without_colour() -> None:
    _, _, screen = run_in_terminal(SCRIPT.replace("INTERRUPT", ""), NO_COLOR="1")
    assert "╭" in screen
    assert not [code for code in range(30, 38) if f"\x1b[{code}m" in screen or f";{code}m" in screen]


@pytest.mark.parametrize(
    "environment", [{"TERM": "dumb"}, {"CI": "true"}, {"COLUMNS": "39"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_where_a_picture_is_not_wanted_there_are_lines(environment: dict[str, str]) -> None:
    code, out, screen = run_in_terminal(SCRIPT.replace("INTERRUPT", ""), **environment)
    assert (code, out) == (0, "the result\n")
    assert "╭" not in screen
    assert "\x1b[?25l" not in screen
    assert "group: seed 0 begins" in screen
    assert "warning: [b]warning 3[/nope]" in screen


def test_a_redirected_stderr_gets_lines_even_where_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    env = os.environ | {"FORCE_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("INTERRUPT", "")], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout == "the result\n"
    assert "╭" not in done.stderr
    assert "features: 2 images done" in done.stderr
