"""Long work on the screen: a dashboard where stderr is a terminal, plain lines everywhere else. stdout stays clean."""

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live

from chimera_cli.events import Event, Listener
from chimera_cli.telemetry.sampler import Snapshot, sample_machine
from chimera_cli.ui.dashboard import render
from chimera_cli.ui.lines import plain_lines
from chimera_cli.ui.state import DashboardState, advance
from chimera_cli.ui.text import plain

MIN_WIDTH = 40
# Below this height the blank lines between the sections go, so that the picture isn't cut.
_ROOMY_HEIGHT = 24


@contextmanager
def display(title: str, limits: Mapping[str, float]) -> Iterator[Listener]:
    """Show what is announced on stderr while the block lasts and yield the listener to announce it to.

    `limits` are SLO limits by figure name (`gpu_util_mean`, `vram_peak_gb`, `wall_s` ...), drawn beside the readings.
    The listener may be called from any thread.
    """
    console = Console(stderr=True)
    with _dashboard(console, title, limits) if wants_dashboard(console) else _lines(console, title, limits) as listener:
        yield listener


def wants_dashboard(console: Console) -> bool:
    """Return whether a moving picture is wanted: a real terminal of 40 columns that is neither dumb nor a CI log."""
    # Rich lets FORCE_COLOR pass for a terminal; a redirected stderr must get lines all the same.
    real = sys.stderr.isatty() and not console.is_dumb_terminal
    unicode = (console.encoding or "").lower().replace("-", "").startswith("utf")
    return real and unicode and not os.environ.get("CI") and console.width >= MIN_WIDTH


@contextmanager
def _dashboard(console: Console, title: str, limits: Mapping[str, float]) -> Iterator[Listener]:
    state = DashboardState(title, dict(limits), time.monotonic())
    lock = threading.Lock()

    def listen(event: Event) -> None:
        nonlocal state
        with lock:
            state = advance(state, event, time.monotonic())

    def look(snapshot: Snapshot) -> None:
        listen(snapshot.as_event())

    def picture() -> RenderableType:
        # Two columns stay free: the ^C that a terminal echoes there must not wrap and shift the picture.
        return render(state, time.monotonic(), console.width - 2, compact=console.height < _ROOMY_HEIGHT)

    # stdout may be a file or a pipe: Live must not draw what is written there into the terminal.
    live = Live(get_renderable=picture, console=console, refresh_per_second=4, redirect_stdout=False)
    try:
        with live, sample_machine(on_sample=look):
            yield listen
    finally:
        for note in state.hidden_warnings:
            console.print(f"warning: {plain(note.message)}", style="yellow", highlight=False)


@contextmanager
def _lines(console: Console, title: str, limits: Mapping[str, float]) -> Iterator[Listener]:
    lock = threading.Lock()

    def write(line: str) -> None:
        console.print(plain(line), highlight=False, soft_wrap=True)

    tell = plain_lines(title, limits, write, time.monotonic)

    def listen(event: Event) -> None:
        with lock:
            tell(event)

    yield listen
