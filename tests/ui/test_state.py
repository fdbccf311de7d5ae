"""The state of the dashboard: what each event changes, with a clock that the test holds in its hand."""

import pytest

from chimera_cli.events import (
    Evaluated,
    MeasureTaken,
    Note,
    Progress,
    RunFinished,
    RunStarted,
    StepDone,
    TelemetrySampled,
)
from chimera_cli.ui.state import DashboardState, LossCurve, advance

START = DashboardState("train", {}, 0.0)
RUN = RunStarted("group", "train", 0, "runs/group/seed-0", 100)


def evaluated(step: int, rsum: float | None) -> Evaluated:
    return Evaluated(step, "dev", {"i2t_r1": 0.3, "rsum": rsum})


def test_time_left_follows_the_speed_since_the_first_step_and_runs_down() -> None:
    state = advance(START, RUN, 0.0)
    # A resumed run: the 50 steps before it took no time of this clock.
    state = advance(state, StepDone(49, 1, {"loss": 2.0}), 10.0)
    assert state.steps is not None
    assert state.steps.seconds_left(10.0) is None
    state = advance(state, StepDone(59, 1, {"loss": 1.5}), 20.0)
    assert state.steps is not None
    assert state.steps.share == 0.6
    assert state.steps.seconds_left(20.0) == pytest.approx(40.0)
    assert state.steps.seconds_left(25.0) == pytest.approx(35.0)
    assert state.steps.seconds_left(999.0) == 0.0


def test_a_stage_begins_anew_when_its_name_changes_or_its_count_falls() -> None:
    state = advance(START, Progress("features", 10, 20), 1.0)
    state = advance(state, Progress("features", 20, 20), 3.0)
    assert state.stage is not None
    assert state.stage.complete
    assert state.stage.seconds == 2.0
    state = advance(state, Progress("features", 5, 20), 9.0)
    assert state.stage is not None
    assert (state.stage.began_at, state.stage.began_with) == (9.0, 5)
    state = advance(state, Progress("evaluation", 0, 0), 10.0)
    assert state.stage is not None
    assert (state.stage.name, state.stage.share, state.stage.seconds_left(11.0)) == ("evaluation", None, None)


def test_the_best_evaluation_is_the_one_of_the_highest_rsum() -> None:
    state = START
    for event in (evaluated(10, None), evaluated(20, 2.5), evaluated(30, 2.0)):
        state = advance(state, event, 0.0)
    assert state.best is not None
    assert state.latest is not None
    assert (state.latest.step, state.best.step) == (30, 20)


def test_a_new_seed_clears_the_run_and_keeps_machine_notes_and_finished_seeds() -> None:
    state = advance(START, RUN, 0.0)
    for event in (
        StepDone(1, 1, {"loss": 2.0}),
        evaluated(1, 1.0),
        TelemetrySampled(1.0, {"cpu_util": 0.5}),
        Note("hello"),
        RunFinished(0, "finished", {"rsum": 1.0}),
        RunStarted("group", "train", 1, "runs/group/seed-1", 100),
    ):
        state = advance(state, event, 1.0)
    assert (state.seed, state.steps, state.loss.last, state.latest, state.best) == (1, None, None, None, None)
    assert state.machine == {"cpu_util": 0.5}
    assert [note.message for note in state.notes] == ["hello"]
    assert [seed.seed for seed in state.finished] == [0]


def test_three_notes_are_shown_and_no_warning_is_lost() -> None:
    state = START
    for number in range(5):
        state = advance(state, Note(f"note {number}", "warning" if number < 2 else "info"), 0.0)
    assert [note.message for note in state.notes] == ["note 2", "note 3", "note 4"]
    assert [note.message for note in state.hidden_warnings] == ["note 0", "note 1"]


def test_a_long_loss_curve_stays_small_and_keeps_its_mean_and_ends() -> None:
    curve = LossCurve()
    losses = [float(step) for step in range(512 * 6)]
    for loss in losses:
        curve = curve.add(loss)
    assert len(curve.points) < 512
    assert (curve.first, curve.last) == (losses[0], losses[-1])
    seen = curve.stride * len(curve.points)
    assert seen + len(curve.rest) == len(losses)
    # The mean of equal stretches is the mean of the whole.
    assert sum(curve.points) / len(curve.points) == pytest.approx(sum(losses[:seen]) / seen)


def test_a_contingency_measure_is_a_warning_is_counted_and_takes_progress_back() -> None:
    state = advance(START, RUN, 0.0)
    for event in (StepDone(39, 1, {"loss": 2.0}), evaluated(39, 1.0), MeasureTaken(40, "memory", "micro_batch 4")):
        state = advance(state, event, 10.0)
    assert state.notes[-1] == Note("contingency at update 40: micro_batch 4", "warning")
    assert state.steps is not None
    assert (state.steps.done, state.loss.last) == (40, 2.0)
    state = advance(state, MeasureTaken(40, "half the learning rates", "back", back_to=30), 20.0)
    assert state.steps is not None
    assert (state.steps.done, state.steps.began_with, state.loss.last) == (30, 30, 2.0)
    state = advance(state, MeasureTaken(40, "memory", "images of 64 px", {"image.image_size": 64}, 0), 30.0)
    assert state.steps is not None
    assert (state.steps.done, state.loss, state.best, len(state.measures)) == (0, LossCurve(), None, 3)
    assert advance(state, RUN, 40.0).measures == ()
