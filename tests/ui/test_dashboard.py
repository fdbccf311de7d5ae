"""The picture: every line fits from 40 columns up, values stand where they belong, foreign text stays text."""

import io
import math
from collections.abc import Mapping

import pytest
from rich.cells import cell_len
from rich.console import Console

from chimera_cli.events import (
    Evaluated,
    Event,
    MeasureTaken,
    Note,
    Progress,
    RunFinished,
    RunStarted,
    StepDone,
    TelemetrySampled,
)
from chimera_cli.ui.dashboard import clock, meter, render, sparkline
from chimera_cli.ui.state import DashboardState, advance

GPU = {"gpu_util": 0.7, "vram_used_gb": 7.8, "vram_total_gb": 8.0, "gpu_temperature_c": 66.0, "gpu_power_w": 171.0}
CPU = {"gpu_util": None, "vram_used_gb": None, "cpu_util": 0.97, "ram_used_gb": 1.8, "ram_total_gb": 23.4}
RECALLS = {"i2t_r1": 0.332, "i2t_r5": 0.627, "i2t_r10": 1.0, "t2i_r1": 0.245, "t2i_r5": 0.553, "rsum": 3.209}


def state_of(*events: Event, limits: Mapping[str, float] | None = None) -> DashboardState:
    state = DashboardState("train full · locked", limits or {}, 0.0)
    for second, event in enumerate(events):
        state = advance(state, event, float(second))
    return state


def busy(machine: Mapping[str, float | None] = GPU) -> DashboardState:
    return state_of(
        RunStarted("train-locked-20250101-101010", "train", 1, "runs/x", 2400),
        Progress("train caption features", 30_000, 30_000, "captions"),
        *(StepDone(s, 1, {"loss": 9 - s / 10, "lr": 8.3e-4, "pairs_per_s": 2310.0}) for s in range(1, 60)),
        Evaluated(50, "dev", RECALLS),
        TelemetrySampled(1.0, machine),
        Note("data: flickr8k"),
        Note("MLflow does not answer: " + "a long reason " * 8, "warning"),
        RunFinished(0, "finished", {"rsum": 3.1}),
        limits={"gpu_util_mean": 0.85, "vram_peak_gb": 7.5, "wall_s": 1500.0},
    )


def drawn(state: DashboardState, width: int, *, colour: bool = False, compact: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None,
        no_color=not colour, legacy_windows=False,
    )  # fmt: skip
    console.print(render(state, 61.0, width, compact))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [38, 40, 55, 56, 60, 83, 84, 100, 200])
@pytest.mark.parametrize("machine", [GPU, CPU])
def test_every_line_has_the_same_width_and_fits(width: int, machine: Mapping[str, float | None]) -> None:
    lines = drawn(busy(machine), width).splitlines()
    widths = {cell_len(line) for line in lines}
    assert len(widths) == 1
    assert widths.pop() <= width


@pytest.mark.parametrize("width", [40, 60, 100])
def test_what_matters_is_there_at_every_width(width: int) -> None:
    text = drawn(busy(), width)
    for needed in ("seed 1", "1:01", "training", "loss", "3.100", "33.2", "100.0", "GPU", "70 %", "7.8 of 8.0 GiB"):
        assert needed in text
    assert "(≥ 85)" in text
    assert "(≤ 7.5)" in text


def test_readings_outside_their_limit_are_coloured_and_nothing_else_is_yellow() -> None:
    fine = state_of(TelemetrySampled(1.0, GPU))
    assert "\x1b[33m" not in drawn(fine, 100, colour=True)
    assert drawn(busy(), 100, colour=True).count("\x1b[33m70 %") == 1
    assert drawn(busy(), 100, colour=True).count("\x1b[33m7.8 of 8.0 GiB") == 1


def test_without_a_card_cpu_and_ram_are_shown() -> None:
    text = drawn(busy(CPU), 100)
    assert "CPU" in text
    assert "97 %" in text
    assert "1.8 of 23.4 GiB" in text
    assert "GPU" not in text


def test_missing_recalls_are_dashes_and_an_empty_state_is_a_picture() -> None:
    text = drawn(state_of(Evaluated(1, "dev", {"i2t_r1": 0.5, "rsum": None})), 100)
    assert "50.0" in text
    assert "–" in text
    assert "best" not in text
    assert drawn(state_of(), 40)


def test_foreign_text_is_neither_markup_nor_terminal_commands() -> None:
    text = drawn(state_of(Note("[bold]x[/nope] \x1b[2J\x07"), Progress("[red]s[/]", 1, 2)), 100)
    assert "[bold]x[/nope]" in text
    assert "[red]s[/]" in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text


def test_contingency_measures_stay_counted_when_their_notes_are_gone() -> None:
    measures = [MeasureTaken(step, "memory", f"micro_batch {8 // step}") for step in (1, 2)]
    state = state_of(RunStarted("g", "train", 1, "runs/x", 2400), StepDone(0, 0, {"loss": 9.0}), *measures)
    assert "! contingency at update 2: micro_batch 4" in drawn(state, 100)
    for number in range(3):
        state = advance(state, Note(f"note {number}"), 9.0)
    picture = drawn(state, 100)
    assert "contingency 2" in picture
    assert "micro_batch" not in picture


def test_compact_leaves_out_the_blank_lines() -> None:
    assert len(drawn(busy(), 100, compact=True).splitlines()) <= 17


def test_sparkline_scales_bins_and_survives_what_is_not_finite() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 7, 0, 0], 2) == "█▁"
    assert sparkline([1.0, math.nan, 2.0], 3) == "▁ █"
    assert sparkline([3.0, 3.0], 9) == "▁▁"
    assert sparkline([], 9) == ""
    assert sparkline([math.inf], 1) == " "


def test_meter_fills_and_ticks_without_colour() -> None:
    assert meter(0.5, 10).plain == "━━━━━─────"
    assert meter(None, 4).plain == "────"
    assert meter(7.0, 4).plain == "━━━━"
    assert meter(0.2, 10, limit=0.9).plain == "━━───────┃"
    assert meter(0.2, 10, limit=1.5).plain == "━━────────"


def test_clock_reads_like_a_clock() -> None:
    assert [clock(s) for s in (0, 59.9, 103, 3723, -5)] == ["0:00", "0:59", "1:43", "1:02:03", "0:00"]
