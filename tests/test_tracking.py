"""MLflow gets every figure once: live, late, after a cut back, and training never waits for a dead server."""

import json
import logging
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chimera_cli import tracking
from chimera_cli.errors import ChimeraError
from chimera_cli.events import Note, RunFinished, RunStarted, Saved, StepDone
from chimera_cli.runs import (
    Group,
    append_json_line,
    create_group,
    finish_group,
    read_json,
    read_json_lines,
    utc_now,
    write_json,
    write_text,
)

# MLflow's own imports warn of what its dependencies deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STEPS = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all tests here: making its SQLite file takes seconds."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def new_group(home: Path, seeds: tuple[int, ...] = (0, 1)) -> Group:
    facts = {
        "command": "chimera train full --config configs/train/locked.yaml",
        "pack": {"name": "flickr8k", "fingerprint": "f" * 64, "source": "flickr8k"},
        "config_hash": "c" * 64,
        "source_hash": "s" * 64,
        "hardware": {"device": "cpu", "cpu": "Testor 3000", "cores": 2, "gpu": None},
        "chimera_version": "0.1.0",
    }
    return create_group(home, "train", "locked", seeds, facts)


def begin(directory: Path) -> None:
    write_text(directory / "config.yaml", yaml.safe_dump({"batch": 500, "heads": {"kind": "mlp", "dim": 512}}))
    write_json(directory / "environment.json", {"schema_version": 1, "git_commit": "a" * 40})


def step(directory: Path, number: int, loss: float) -> None:
    row = {"step": number, "epoch": 0, "loss": loss, "grad_norm": None, "elapsed_s": 0.5 * number}
    append_json_line(directory / "metrics.jsonl", row)


def reading(directory: Path, elapsed_s: float) -> None:
    append_json_line(directory / "telemetry.jsonl", {"elapsed_s": elapsed_s, "gpu_util": None, "cpu_util": 0.5})


def finish(directory: Path, seed: int) -> None:
    facts = {"kind": "train", "seed": seed, "status": "finished", "started_at": utc_now(), "finished_at": utc_now()}
    figures = {"wall_s": 2.5, "vram_peak_gb": None}
    write_json(directory / "result.json", {"schema_version": 1, **facts, "figures": figures, "details": {}})


def whole_seed(group: Group, seed: int) -> None:
    directory = group.seed_dir(seed)
    begin(directory)
    for number in range(STEPS):
        step(directory, number, 3.0 - 0.1 * number)
        reading(directory, 2.0 * number)
    append_json_line(directory / "metrics.jsonl", {"step": STEPS - 1, "dev/i2t_r1": 0.25, "dev/rsum": 2.5})
    finish(directory, seed)


def client(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking.tracking_uri(home))


def history(home: Path, directory: Path, name: str) -> list[tuple[int, float]]:
    run_id = read_json(directory / "mlflow.json")["stores"]["default"]["run_id"]
    return sorted((metric.step, metric.value) for metric in client(home).get_metric_history(run_id, name))


def run_of(home: Path, directory: Path) -> Any:
    return client(home).get_run(read_json(directory / "mlflow.json")["stores"]["default"]["run_id"])


def all_runs(home: Path, group: Group) -> list[Any]:
    experiment = client(home).get_experiment_by_name("chimera-train")
    return list(
        client(home).search_runs([experiment.experiment_id], f"tags.`chimera.group` = '{group.name}'", max_results=50)
    )


@pytest.fixture(scope="module")
def tracked(home: Path) -> Group:
    """A group of two seeds tracked while it ran."""
    group = new_group(home)
    with tracking.track(home, group, patience_s=120) as listener:
        for seed in group.seeds:
            directory = group.seed_dir(seed)
            listener(RunStarted(group.name, "train", seed, str(directory)))
            whole_seed(group, seed)
            listener(StepDone(STEPS - 1, 0, {"loss": 1.0}))
            listener(Saved(str(directory / "result.json"), "result"))
            listener(RunFinished(seed, "finished"))
        finish_group(group, "finished")
    return group


def test_a_group_is_a_run_and_its_seeds_are_nested_in_it(home: Path, tracked: Group) -> None:
    parent = run_of(home, tracked.path)
    child = run_of(home, tracked.seed_dir(1))
    assert parent.info.run_name == tracked.name
    assert parent.info.status == child.info.status == "FINISHED"
    assert child.info.run_name == "seed-1"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["mlflow.source.git.commit"] == "a" * 40
    assert parent.data.params["pack_fingerprint"] == "f" * 64
    assert child.data.params == {"seed": "1", "batch": "500", "heads.kind": "mlp", "heads.dim": "512"}
    assert len(all_runs(home, tracked)) == 3


def test_every_step_evaluation_and_reading_arrives_and_missing_ones_are_not_zero(home: Path, tracked: Group) -> None:
    directory = tracked.seed_dir(0)
    assert history(home, directory, "loss") == [(n, pytest.approx(3.0 - 0.1 * n)) for n in range(STEPS)]
    assert history(home, directory, "dev/i2t_r1") == [(STEPS - 1, 0.25)]
    assert history(home, directory, "system/cpu_util") == [(n, 0.5) for n in range(STEPS)]
    assert history(home, directory, "result/wall_s") == [(0, 2.5)]
    for absent in ("grad_norm", "system/gpu_util", "result/vram_peak_gb"):
        assert history(home, directory, absent) == []


def test_artifacts_lie_below_home_and_hold_the_same_bytes(home: Path, tracked: Group) -> None:
    run = run_of(home, tracked.seed_dir(0))
    assert run.info.artifact_uri.startswith((home / "mlartifacts").as_uri())
    names = {entry.path for entry in client(home).list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "telemetry.jsonl", "result.json"}
    kept = Path(run.info.artifact_uri.removeprefix("file://")) / "metrics.jsonl"
    assert kept.read_bytes() == (tracked.seed_dir(0) / "metrics.jsonl").read_bytes()


def test_sync_after_a_full_delivery_sends_nothing(home: Path, tracked: Group) -> None:
    assert tracking.sync(home, tracked) == tracking.Delivered()


def test_an_evaluation_made_later_is_delivered_by_sync_once(home: Path) -> None:
    group = new_group(home, (0,))
    whole_seed(group, 0)
    group = finish_group(group, "finished")
    assert tracking.sync(home, group).runs == 2
    facts = {"schema_version": 1, "split": "test", "created_at": utc_now()}
    write_json(
        group.seed_dir(0) / "evaluations" / "flickr8k-test.json",
        {**facts, "checkpoint_step": 3, "figures": {"i2t_r1": 0.3, "rsum": None}},
    )
    mean = {"n": 1, "mean": 0.3, "std": None, "low": None, "high": None, "values": [0.3]}
    write_json(group.path / "evaluations" / "flickr8k-test.json", {**facts, "figures": {"i2t_r1": mean}})
    assert tracking.sync(home, group) == tracking.Delivered(0, 2, 2)
    assert tracking.sync(home, group) == tracking.Delivered()
    assert history(home, group.seed_dir(0), "best/test/i2t_r1") == [(3, 0.3)]
    assert history(home, group.path, "best/test/i2t_r1") == [(0, 0.3)]


def test_a_resumed_run_sends_newer_steps_only(home: Path) -> None:
    group = new_group(home, (0,))
    directory = group.seed_dir(0)
    begin(directory)
    for number in range(4):
        step(directory, number, 1.0)
        reading(directory, 2.0 * number)
    tracking.sync(home, group)
    # Cut back to step 1 as a resume does, then learn on with other numbers; the sampler's clock starts again.
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    write_text(directory / "metrics.jsonl", "".join(lines[:2]))
    for number in range(2, 6):
        step(directory, number, 2.0)
    reading(directory, 0.0)
    reading(directory, 4.0)
    finish(directory, 0)
    tracking.sync(home, group)
    assert history(home, directory, "loss") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert [place for place, _ in history(home, directory, "system/cpu_util")] == [0, 1, 2, 3, 5]


def test_contingency_measures_are_counted_tagged_and_what_they_took_back_is_sent_anew(home: Path) -> None:
    group = new_group(home, (0,))
    directory = group.seed_dir(0)
    begin(directory)
    for number in range(4):
        step(directory, number, 1.0)
    row = {"event": "contingency", "at": utc_now(), "measure": "memory", "settings": {"micro_batch": 4}}
    append_json_line(directory / "events.jsonl", row | {"step": 1, "what": "micro_batch 4", "back_to": None})
    tracking.sync(home, group)
    append_json_line(directory / "events.jsonl", row | {"step": 2, "what": "half the rates", "back_to": 2})
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    write_text(directory / "metrics.jsonl", "".join(lines[:2]))
    for number in range(2, 5):
        step(directory, number, 2.0)
    finish(directory, 0)
    tracking.sync(home, group)
    assert tracking.sync(home, group) == tracking.Delivered()
    assert history(home, directory, "contingency/measures") == [(1, 1.0), (2, 2.0)]
    tags = {name: value for name, value in run_of(home, directory).data.tags.items() if "contingency" in name}
    assert tags == {
        "chimera.contingency": "2",
        "chimera.contingency.1": "update 1: micro_batch 4",
        "chimera.contingency.2": "update 2: half the rates",
    }
    again = [(0, 1.0), (1, 1.0), (2, 1.0), (2, 2.0), (3, 1.0), (3, 2.0), (4, 2.0)]
    assert history(home, directory, "loss") == again
    assert "events.jsonl" in read_json(directory / "mlflow.json")["stores"]["default"]["files"]


def test_a_living_process_sends_what_was_made_again_after_a_cut(home: Path) -> None:
    group = new_group(home, (0,))
    directory = group.seed_dir(0)
    begin(directory)
    for number in range(3):
        step(directory, number, 1.0)
    store, memory = tracking._connect(home), tracking._Memory()
    news = tracking._News(live=True, learning={0})
    tracking._deliver(store, group.path, news, memory, documents=False)
    row = {"event": "contingency", "at": utc_now(), "measure": "memory", "settings": {"image.image_size": 192}}
    append_json_line(directory / "events.jsonl", row | {"step": 2, "what": "192 px", "back_to": 0})
    (directory / "metrics.jsonl").unlink()
    for number in range(5):
        step(directory, number, 2.0)
    tracking._deliver(store, group.path, news, memory, documents=False)
    assert [place for place, loss in history(home, directory, "loss") if loss == 2.0] == [0, 1, 2, 3, 4]
    assert run_of(home, directory).data.tags["chimera.image_size"] == "192"


def test_a_measure_after_a_cut_of_the_record_is_sent(home: Path) -> None:
    group = new_group(home, (0,))
    directory = group.seed_dir(0)
    begin(directory)
    row = {"event": "contingency", "at": utc_now(), "measure": "memory", "settings": {}, "back_to": None}
    for number in range(2):
        append_json_line(directory / "events.jsonl", row | {"step": number, "what": f"measure {number}"})
    tracking.sync(home, group)
    write_text(directory / "events.jsonl", "")
    tracking.sync(home, group)
    append_json_line(directory / "events.jsonl", row | {"step": 7, "what": "another"})
    tracking.sync(home, group)
    tags = run_of(home, directory).data.tags
    assert tags["chimera.contingency"] == "1"
    assert tags["chimera.contingency.1"] == "update 7: another"


def test_a_line_still_being_written_waits_for_its_end(home: Path) -> None:
    group = new_group(home, (0,))
    directory = group.seed_dir(0)
    begin(directory)
    step(directory, 0, 1.0)
    whole = json.dumps({"step": 1, "epoch": 0, "loss": 0.5, "elapsed_s": 1.0})
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(whole[:20])
    tracking.sync(home, group)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(whole[20:] + "\n")
    tracking.sync(home, group)
    assert history(home, directory, "loss") == [(0, 1.0), (1, 0.5)]


def test_a_run_that_died_is_killed_and_one_made_by_a_lost_answer_is_found_again(home: Path) -> None:
    group = new_group(home, (0,))
    begin(group.seed_dir(0))
    tracking.sync(home, group)
    assert run_of(home, group.seed_dir(0)).info.status == "KILLED"
    # The answer to `create_run` never arrived: the store has the run, the ledger has not.
    for directory in (group.path, group.seed_dir(0)):
        (directory / "mlflow.json").unlink()
    assert tracking.sync(home, group).runs == 0
    assert len(all_runs(home, group)) == 2


def test_a_run_deleted_in_mlflow_stays_deleted(home: Path) -> None:
    group = new_group(home, (0,))
    whole_seed(group, 0)
    tracking.sync(home, group)
    client(home).delete_run(read_json(group.path / "mlflow.json")["stores"]["default"]["run_id"])
    step(group.seed_dir(0), STEPS, 1.0)
    assert tracking.sync(home, group) == tracking.Delivered()


def test_a_store_thrown_away_is_filled_again(home: Path, tmp_path: Path) -> None:
    group = new_group(home, (0,))
    whole_seed(group, 0)
    first = tracking.sync(home, group)
    shutil.copytree(group.path, tmp_path / "runs" / group.name)
    shutil.copy(home / "mlflow.db", tmp_path / "mlflow.db")
    copied = Group(tmp_path / "runs" / group.name, group.facts)
    for directory in (copied.path, copied.seed_dir(0)):
        ledger = read_json(directory / "mlflow.json")
        ledger["stores"]["default"]["run_id"] = "0" * 32
        write_json(directory / "mlflow.json", ledger)
    # The copied store still has the runs under other ids: found by identity, their figures are sent again, not doubled.
    again = tracking.sync(tmp_path, copied)
    assert (again.runs, again.metrics) == (0, first.metrics)
    assert len(history(tmp_path, copied.seed_dir(0), "loss")) == STEPS


@pytest.fixture(params=["closed", "silent"])
def dead_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A port where nobody listens, and one that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen()
        uri = f"http://anna:secret@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri
        for thread in threading.enumerate():
            if thread.name == "mlflow":
                thread.join()


def test_a_dead_server_holds_nobody_up_and_sync_delivers_later(
    home: Path, dead_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = new_group(home, (0,))
    notes: list[Any] = []

    def interrupted_run() -> None:
        with tracking.track(home, group, notes.append, patience_s=0.0) as listener:
            listener(RunStarted(group.name, "train", 0, str(group.seed_dir(0))))
            whole_seed(group, 0)
            listener(RunFinished(0, "finished"))
            raise KeyboardInterrupt

    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        interrupted_run()
    finish_group(group, "interrupted")
    assert [note.level for note in notes if isinstance(note, Note)] == ["warning"]
    assert f"chimera runs sync {group.name}" in notes[0].message
    assert "secret" not in notes[0].message
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join()
    assert caplog.records == []
    with pytest.raises(ChimeraError, match="did not take"):
        tracking.sync(home, group)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.sync(home, group).runs == 2
    assert run_of(home, group.path).info.status == "KILLED"
    assert run_of(home, group.seed_dir(0)).info.status == "FINISHED"
    assert len(history(home, group.seed_dir(0), "loss")) == STEPS
    assert len(read_json_lines(group.seed_dir(0) / "metrics.jsonl")) == STEPS + 1


def test_two_processes_never_deliver_the_same_group(home: Path) -> None:
    group = new_group(home, (0,))
    held = tracking._claim(group.path)
    assert held is not None
    with held, pytest.raises(ChimeraError, match="another process"):
        tracking.sync(home, group)


def test_a_child_that_died_is_told_and_replaced(home: Path) -> None:
    group = new_group(home, (0,))
    signals = tracking._Signals()
    order = {"live": True, "ended": "KILLED", "documents": True, "learning": [], "started": {}, "endings": {}}
    for _ in range(2):
        signals.courier.append(tracking._start_courier(home, group.path))
        signals.courier[0].kill()
        assert tracking._ask(home, group.path, signals, order) != ""
        assert signals.courier == []
