"""Plain lines: at most one every five seconds, and nothing that must be told is held back."""

from chimera_cli.events import Evaluated, Event, MeasureTaken, Note, Progress, RunFinished, RunStarted, StepDone
from chimera_cli.ui.lines import plain_lines


def told(*timed: tuple[float, Event]) -> list[str]:
    lines: list[str] = []
    moment = 0.0
    listener = plain_lines("title", {}, lines.append, lambda: moment)
    for moment, event in timed:  # noqa: B007 - the listener's clock reads it
        listener(event)
    return lines


def test_steps_are_told_every_five_seconds_with_all_that_is_known() -> None:
    metrics = {"loss": 4.0, "lr": 1e-3, "pairs_per_s": 250.0}
    steps = [(second * 1.0, StepDone(second - 1, 0, metrics)) for second in range(1, 13)]
    lines = told((0.0, RunStarted("g", "train", 0, "d", 100)), *steps)
    assert lines[0] == "g: seed 0 begins"
    assert lines[1:] == [
        "training: 5 of 100 steps, epoch 1, loss 4, lr 0.001, 250.0 pairs/s, 1:35 left",
        "training: 10 of 100 steps, epoch 1, loss 4, lr 0.001, 250.0 pairs/s, 1:30 left",
    ]


def test_beginnings_ends_and_notes_are_told_at_once() -> None:
    lines = told(
        (0.1, Progress("features", 32, 6000)),
        (0.2, Progress("features", 64, 6000)),
        (0.3, Note("the server is away", "warning")),
        (0.4, Note("data: toy")),
        (0.4, MeasureTaken(1200, "memory", "out of memory: micro_batch 4 in place of 8")),
        (0.5, Progress("features", 6000, 6000)),
        (0.6, Progress("features", 6000, 6000)),
        (0.7, RunFinished(0, "finished", {"wall_s": 75.0})),
    )
    assert lines == [
        "features: 32 of 6,000 images",
        "warning: the server is away",
        "data: toy",
        "warning: contingency at update 1,200: out of memory: micro_batch 4 in place of 8",
        "features: 6,000 images done",
        "seed 0 finished after 1 min 15 s",
    ]


def test_an_evaluation_is_told_with_the_next_step() -> None:
    lines = told((1.0, Evaluated(1, "dev", {"rsum": 2.5})), (6.0, StepDone(1, 0, {"loss": 1.0})))
    assert lines == ["training: 2 steps, epoch 1, loss 1, dev rsum 2.500"]
