"""The contingency ladder of a seed: memory, then speed, in their order; what was taken is told, kept and repeatable."""

import shutil
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from chimera_cli.config import TrainConfig, load_config
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, MeasureTaken, StepDone, ignore
from chimera_cli.models.combination import load_model
from chimera_cli.runs import Group, list_groups, read_json, read_json_lines, resolve_run
from chimera_cli.services import contingency as rungs
from chimera_cli.services.resume import Kept, halvings, kept_by, recorded_config, resumable_group
from chimera_cli.services.session import SeedSession, recorder
from chimera_cli.services.train import _refuse_shares, train_full
from chimera_cli.training import contingency
from chimera_cli.training.checkpoints import write_checkpoint
from chimera_cli.training.distributed import Processes
from chimera_cli.training.large_batch import backward
from chimera_cli.training.loop import LoopState

pytestmark = pytest.mark.usefixtures("lean")

# A tower from scratch has the statistics of its batch: of all measures only a smaller image is left to it.
SETTINGS = (
    "data=small", "image.weights=tiny", "image.locked=false", "text.weights=tiny", "text.learn_layers=null",
    "heads.hidden=32", "heads.dim=16", "heads.dropout=0.3", "augmentation.crop_scale=0.6", "patience=9",
    "optimiser.schedule=constant", "epochs=2", "batch=24", "device=cpu",
)  # fmt: skip
TIMES = ("elapsed_s", "pairs_per_s")


def config(side: int, *changes: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*SETTINGS, f"image.image_size={side}", *changes])


def rows(group: Group, seed: int = 0) -> list[dict[str, Any]]:
    """Return metrics.jsonl without its clocks."""
    lines = read_json_lines(group.seed_dir(seed) / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def helped(home: Path, side: int, seeds: tuple[int, ...] = (0,), listener: Any = ignore) -> Group:
    result = train_full(home, config(side), seeds, "r", "x", listener, contingency="auto")
    return resolve_run(home, result["group"])[0]


def measures(group: Group, seed: int = 0) -> list[dict[str, Any]]:
    """Return the measures in the result, which are those of events.jsonl."""
    told = read_json(group.seed_dir(seed) / "result.json")["details"]["contingency"]
    events = read_json_lines(group.seed_dir(seed) / "events.jsonl")
    assert [{name: event[name] for name in measure} for event, measure in zip(events, told, strict=True)] == told
    return list(told)


@pytest.fixture(scope="module")
def plain(small_pack_home: Path, tmp_path_factory: pytest.TempPathFactory, lean: None) -> Group:
    """Two seeds at 64 pixels as nobody had to change anything about them."""
    home = tmp_path_factory.mktemp("plain")
    (home / "data").mkdir()
    shutil.copytree(small_pack_home / "data" / "small", home / "data" / "small")
    return resolve_run(home, train_full(home, config(64), (0, 1), "r", "x")["group"])[0]


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gradient of images above 64 pixels find no memory, from the fourth step on."""
    steps = count()

    def short(model: Any, batch: Any, *arguments: Any, **settings: Any) -> Any:
        if batch.image.shape[-1] > 64 and next(steps) >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(model, batch, *arguments, **settings)

    monkeypatch.setattr(contingency, "backward", short)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let half of every step be waited, on a clock that goes on by one with each look at it, and windows be short."""
    watch = contingency.LoaderWatch
    monkeypatch.setattr(contingency, "LoaderWatch", lambda: watch(clock=partial(next, count()), updates=3, warm_up=1))


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_smaller_images_are_the_run_that_would_have_been_begun_with_them(
    small_home: Path, plain: Group, scarce: None
) -> None:
    group = helped(small_home, 96, (0, 1))
    (first,) = measures(group)
    assert (first["step"], first["measure"], first["back_to"]) == (0, "memory", 0)
    assert first["settings"] == {"image.image_size": 64}
    assert first["what"].startswith("out of memory: images of 64 px in place of 96. THE FUNCTION CHANGES")
    (carried,) = measures(group, 1)
    assert carried["what"] == "begun with what the seed before it came to: image.image_size 64"
    for seed in (0, 1):
        assert rows(group, seed) == rows(plain, seed)
        directory = group.seed_dir(seed)
        assert yaml.safe_load((directory / "config.yaml").read_text())["image"]["image_size"] == 64
        assert yaml.safe_load((directory / "config-begun.yaml").read_text())["image"]["image_size"] == 96
        assert (
            load_model(directory / "checkpoints" / "best.safetensors", torch.device("cpu")).architecture.image_size
            == 64
        )


def test_a_run_with_smaller_images_goes_on_with_them(small_home: Path, plain: Group, scarce: None) -> None:
    taken: list[Event] = []

    def listen(event: Event) -> None:
        taken.extend([event] if isinstance(event, MeasureTaken) else [])
        if isinstance(event, StepDone) and event.step == 13 and taken:
            taken.clear()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        helped(small_home, 96, listener=listen)
    group = resumable_group(small_home, "latest")
    resolved = load_config(TrainConfig, recorded_config(group))
    assert resolved == config(96), "what was asked for is what goes on"
    train_full(small_home, resolved, (0,), "r", "x", listen, group, contingency="auto")
    assert rows(group) == rows(plain)
    assert [measure["settings"] for measure in measures(group)] == [{"image.image_size": 64}]
    assert taken == [], "it is not taken again"


def ladder_of(tmp_path: Path, *changes: str) -> tuple[rungs.Ladder, list[Event]]:
    told: list[Event] = []
    session = SeedSession(tmp_path, told.append, "", lambda: None, lambda _figures, _details: {})
    return rungs.begin_ladder(load_config(TrainConfig, None, changes), session, True, Kept(), {}), told


def test_outside_of_the_gradient_micro_batches_are_halved_then_images_shrink_then_it_ends(tmp_path: Path) -> None:
    ladder, told = ladder_of(tmp_path, "image.locked=false", "batch=6")
    error = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(8):
        rungs.less_memory(ladder, {}, error)
    assert [measure.settings for measure in ladder.taken] == [
        {"micro_batch": 3}, {"micro_batch": 2}, {"micro_batch": 1},
        *({"image.image_size": side} for side in (192, 160, 128, 96, 64)),
    ]  # fmt: skip
    assert ladder.taken == told
    assert (ladder.now.micro_batch, ladder.now.image.image_size, ladder.now.batch) == (1, 64, 6)
    with pytest.raises(torch.OutOfMemoryError):
        rungs.less_memory(ladder, {}, error)


def test_what_is_done_inside_a_step_is_a_rung_at_that_step(tmp_path: Path) -> None:
    ladder, told = ladder_of(tmp_path, "image.locked=false")
    relief = rungs.relief_of(ladder, LoopState(done=7))
    assert (relief.micro_batch, relief.recomputing) == (None, False)
    relief.taken("out of memory: micro_batch 3 in place of 6", {"micro_batch": 3})
    assert told == [MeasureTaken(7, "memory", "out of memory: micro_batch 3 in place of 6", {"micro_batch": 3})]
    again = rungs.relief_of(ladder, LoopState(done=9))
    assert again.micro_batch == 3, "after a step back it begins with what fitted"


def test_images_of_a_locked_tower_never_shrink(tmp_path: Path) -> None:
    ladder, _ = ladder_of(tmp_path, "batch=2", "micro_batch=1")
    with pytest.raises(torch.OutOfMemoryError):
        rungs.less_memory(ladder, {}, torch.OutOfMemoryError("CUDA out of memory"))
    assert rungs.watch_of(ladder) is None, "its features are cached: nothing is loaded"
    assert not (tmp_path / "config.yaml").exists()


def test_the_record_is_cut_back_to_what_the_checkpoint_knows(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    known = MeasureTaken(4, "memory", "out of memory: micro_batch 3 in place of 6", {"micro_batch": 3})
    for event in (known, MeasureTaken(9, "loader", "lost with the crash", {"loader_threads": 2})):
        record(event)
    session = SeedSession(tmp_path, record, "", lambda: None, lambda _figures, _details: {})
    row = {"step": 4, "measure": "memory", "what": known.what, "settings": {"micro_batch": 3}, "back_to": None}
    kept = Kept({"session": {"contingency": [row]}})
    ladder = rungs.begin_ladder(load_config(TrainConfig, None), session, True, kept, {"micro_batch": 1})
    assert (ladder.taken, ladder.now.micro_batch) == ([known], 3)
    (line,) = read_json_lines(tmp_path / "events.jsonl")
    assert {"event": "contingency", **row}.items() <= line.items()


def test_what_a_seed_came_to_holds_for_the_next_without_the_ladder_too(tmp_path: Path) -> None:
    session = SeedSession(tmp_path, ignore, "", lambda: None, lambda _figures, _details: {})
    settings = {"image.image_size": 64, "micro_batch": 2}
    ladder = rungs.begin_ladder(load_config(TrainConfig, None), session, False, Kept(), settings)
    assert (ladder.now.image.image_size, ladder.now.micro_batch) == (64, 2)
    assert [measure.measure for measure in ladder.taken] == ["carried over"]


def test_before_the_records_are_cut_no_checkpoint_is_left_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder, told = ladder_of(tmp_path, "image.locked=false", "batch=2", "micro_batch=1")
    folder = tmp_path / "checkpoints"
    write_checkpoint({"identity": {}, "loop": {"done": 7}}, folder, 7, 2)

    def killed(_directory: Path, _updates: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rungs, "_cut_back", killed)
    with pytest.raises(KeyboardInterrupt):
        rungs.less_memory(ladder, {}, torch.OutOfMemoryError("CUDA out of memory"))
    assert kept_by(tmp_path, {}, ignore) == Kept()
    assert list(folder.iterdir()) == []
    assert told == [], "nobody is told before the records are cut"


def test_the_rates_may_be_halved_as_often_again_after_the_seed_began_anew(tmp_path: Path) -> None:
    ladder, _ = ladder_of(tmp_path, "image.locked=false", "batch=2", "micro_batch=1")
    broken = ChimeraError("the loss is nan at step 3", "")
    for _ in range(3):
        rungs.half_the_rates(ladder, {}, broken)
    rungs.less_memory(ladder, {}, torch.OutOfMemoryError("CUDA out of memory"))
    for done in range(3):
        assert halvings(ladder.taken) == done
        rungs.half_the_rates(ladder, {}, broken)
    with pytest.raises(ChimeraError, match="after 3 times half the learning rate"):
        rungs.half_the_rates(ladder, {}, broken)


@pytest.mark.parametrize(("given", "stays"), [(None, "auto"), ("off", "off")])
def test_a_run_goes_on_with_the_ladder_it_was_begun_with(
    small_home: Path, scarce: None, given: Literal["off"] | None, stays: str
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        helped(small_home, 96, listener=interrupt)
    group = resumable_group(small_home, "latest")
    ends = pytest.raises(ChimeraError, match="too little memory") if stays == "off" else nullcontext()
    with pytest.MonkeyPatch.context() as patch, ends:
        # Without relief the loop takes the gradient by itself.
        patch.setattr("chimera_cli.training.loop.backward", contingency.backward)
        train_full(small_home, config(96), (0,), "r", "x", ignore, group, given)
    found = resolve_run(small_home, group.name)[0]
    assert found.facts["contingency"] == stays
    assert (found.seed_dir(0) / "events.jsonl").exists() == (stays == "auto")


# ---- the loader -----------------------------------------------------------------------------------------------------


def test_more_threads_change_nothing_but_the_speed(small_home: Path, plain: Group, slow: None) -> None:
    group = helped(small_home, 64)
    (measure,) = measures(group)
    assert (measure["step"], measure["measure"], list(measure["settings"])) == (5, "loader", ["loader_threads"])
    assert measure["what"].startswith("training waits 50 % of its time for data (more than 20 %): ")
    assert rows(group) == rows(plain)


def test_where_threads_do_not_help_images_shrink_while_little_is_lost(
    small_home: Path, plain: Group, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rungs, "_GIVEN_UP_SHARE", 0.5)
    group = helped(small_home, 96)
    threads, smaller = measures(group)
    assert (threads["measure"], smaller["measure"], smaller["step"]) == ("loader", "loader", 10)
    assert smaller["settings"] == {"image.image_size": 64}
    assert rows(group) == rows(plain)


def test_late_in_a_run_no_image_shrinks_for_speed_alone(tmp_path: Path) -> None:
    ladder, _ = ladder_of(tmp_path, "image.locked=false")
    watch = contingency.LoaderWatch(share=0.5, too_slow=True)
    assert rungs.wants_rung(ladder, watch, LoopState(done=99), 100)
    ladder.take(99, "loader", "threads", {"loader_threads": 2})
    assert rungs.wants_rung(ladder, watch, LoopState(done=25), 100)
    assert not rungs.wants_rung(ladder, watch, LoopState(done=26), 100)


# ---- refused --------------------------------------------------------------------------------------------------------


def test_several_processes_are_refused_with_the_reason() -> None:
    two = Processes(0, 2, torch.device("cpu"))
    with pytest.raises(UsageError, match="the others wait for features that never come"):
        _refuse_shares(config(64), two, "auto")
    _refuse_shares(load_config(TrainConfig, None), two, "off")


def test_a_training_image_without_captions_is_named_before_a_group_is_made(tmp_path: Path) -> None:
    from chimera_cli.data.pack_writer import write_pack
    from chimera_cli.data.sources.toy import draw_all, make_toy

    toy = make_toy({"train": 40, "dev": 10, "test": 10})
    without = [index for index, item in enumerate(toy.items) if item.split == "train"][3:5]
    captions = [caption for caption in toy.captions if caption.image not in without]
    write_pack(
        tmp_path / "data", name="small", source="toy", images=draw_all(toy, 32), items=toy.items, captions=captions,
        size=32,
    )  # fmt: skip
    file = toy.items[without[0]].source_file
    with pytest.raises(ChimeraError, match=f"^{file} and 1 more training images of small have no caption$"):
        train_full(tmp_path, config(64), (0,), "r", "x")
    assert list_groups(tmp_path) == []


def test_without_contingency_memory_that_runs_out_ends_the_run(small_home: Path, scarce: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Without relief the loop takes the gradient by itself.
        patch.setattr("chimera_cli.training.loop.backward", contingency.backward)
        with pytest.raises(ChimeraError, match="the GPU has too little memory for this run"):
            train_full(small_home, config(96), (0,), "r", "x")
    (group,) = list_groups(small_home)
    assert group.status == "failed"
    assert not (group.seed_dir(0) / "events.jsonl").exists()
