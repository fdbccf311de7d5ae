"""`bench speedrun`: a cache that is not the user's, a clock without evaluations, and misses that are no times."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chimera_cli.cli.bench_speedrun import _speedrun_table
from chimera_cli.config import TrainConfig, load_config
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, StepDone
from chimera_cli.models import sessions
from chimera_cli.runs import list_groups, read_json, read_json_lines
from chimera_cli.services import time_to_target
from chimera_cli.services.bench_speedrun import LOG, SpeedrunSetting, bench_speedrun, log_line, over_seeds, plain_pass
from chimera_cli.services.learning import open_bench
from chimera_cli.services.time_to_target import empty_cache, run_to_target
from chimera_cli.statistics import summarise

# A locked image tower at 32 pixels, a text tower from scratch that learns: no minutes of features.
CHANGES = (
    "data=small", "image.image_size=32", "text.weights=tiny", "text.learn_layers=null", "heads.dim=32",
    "heads.hidden=32", "batch=60", "epochs=2", "device=cpu", "optimiser.lr_text=3e-3",
)  # fmt: skip
SETTING = SpeedrunSetting(0.01, True, 8, 8)
TOY = Path(__file__).parents[2] / "configs" / "train" / "toy.yaml"


@pytest.fixture(autouse=True)
def _without_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling a tower takes longer than computing 300 small images without."""
    monkeypatch.setattr(sessions, "session_backend", lambda: None)


def recipe(*changes: str) -> TrainConfig:
    return load_config(TrainConfig, TOY, [*CHANGES, *changes])


def shown(result: Any) -> str:
    console = Console(width=200, file=StringIO())
    with console.capture() as capture:
        console.print(_speedrun_table(result))
    return capture.get()


def test_a_seed_runs_cold_and_cached_and_says_so_in_one_line_each(small_home: Path) -> None:
    heard: list[Event] = []
    result = bench_speedrun(small_home, recipe(), (0, 1), SETTING, "toy", "chimera bench speedrun", heard.append)
    assert result["reached"] == {"cold": 2, "cached": 2}
    for one in result["results"]:
        cold, cached = one["details"]["runs"]
        assert (cold["kind"], cached["kind"]) == ("cold", "cached")
        # The same training to the last digit: only the way to the features differs.
        assert cold["figures"] == cached["figures"]
        assert cold["updates"] == cached["updates"] == 4
        assert cold["wall_s"] == pytest.approx(cold["model_s"] + cold["features_s"] + cold["train_s"])
        assert cold["features_s"] > cached["features_s"] > 0
        plain = one["details"]["plain"]
        assert (plain["images"], plain["captions"]) == (300, 1500)
        assert plain["seconds"] == pytest.approx(sum(plain["seconds_each"]) / 2)
        assert one["figures"]["cold_share"] == pytest.approx(cold["wall_s"] / plain["seconds"])
    times = [one["figures"]["cold_s"] for one in result["results"]]
    assert result["over_seeds"]["cold_s"] == summarise(times).as_dict()
    group = list_groups(small_home)[0]
    assert group.kind == "bench-speedrun"
    assert (group.path / LOG).read_text(encoding="utf-8").splitlines() == result["log"]
    assert len(result["log"]) == 4
    for seed in (0, 1):
        assert read_json(group.seed_dir(seed) / "result.json")["details"] == result["results"][seed]["details"]
        steps = [row["step"] for row in read_json_lines(group.seed_dir(seed) / "metrics.jsonl") if "loss" in row]
        assert steps == [0, 1, 2, 3]
    assert sum(isinstance(event, StepDone) for event in heard) == 16
    assert not (small_home / "data" / ".features").exists()
    assert "2 seeds" not in (text := shown(result))
    assert "(n=2)" in text


def test_an_empty_cache_is_beside_the_homes_and_gone_in_the_end(small_home: Path) -> None:
    bench = open_bench(small_home, "small", "cpu", "float32", lambda _event: None)
    own = small_home / "data" / ".features" / "small" / "mine.npy"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with empty_cache(bench) as fresh:
        run_to_target(fresh, recipe("epochs=1"), 0, 1.0, lambda _event: None)
        made = fresh.pack.path.parent / ".features" / "small"
        assert any(path.suffix == ".npy" for path in made.iterdir())
        assert fresh.pack.fingerprint == bench.pack.fingerprint
    assert not made.exists()
    assert [path.name for path in own.parent.iterdir()] == ["mine.npy"]


def test_a_target_that_is_missed_is_no_time(small_home: Path) -> None:
    result = bench_speedrun(
        small_home, recipe(), (0,), replace(SETTING, target=1.0, cached=False), "toy", "chimera bench speedrun"
    )
    assert result["reached"] == {"cold": 0}
    assert result["figures"]["cold_s"] is None
    assert result["figures"]["cold_share"] is None
    assert result["results"][0]["details"]["runs"][0]["epochs"] == 2
    assert " seconds=missed " in result["log"][0]
    assert "missed by 1 of 1 seed" in shown(result)


def test_one_miss_leaves_no_mean() -> None:
    def seed(number: int, reached: bool) -> dict[str, Any]:
        run = {"kind": "cold", "reached": reached, "line": f"seed {number}"}
        return {
            "seed": number,
            "figures": {"cold_s": 1.0 if reached else None},
            "details": {"target": 0.5, "runs": [run]},
        }

    result = over_seeds("group", [seed(0, True), seed(1, False)])
    assert result["figures"] == {"cold_s": None}
    assert result["reached"] == {"cold": 1}
    assert result["log"] == ["seed 0", "seed 1"]


def test_evaluations_are_not_on_the_clock(small_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still but in evaluations, which take 1,000 seconds each: the clock must show none of it."""
    now = [0.0]
    monkeypatch.setattr("chimera_cli.runtime.time.perf_counter", lambda: now[0])
    evaluations = iter([0.1, 0.2, 0.7, 0.9])

    def evaluation(*_arguments: Any) -> Any:
        def evaluate() -> dict[str, float]:
            now[0] += 1000
            recall = next(evaluations)
            return {"t2i_r10": recall, "rsum": recall}

        return evaluate

    monkeypatch.setattr(time_to_target, "dev_evaluation", evaluation)
    bench = open_bench(small_home, "small", "cpu", "float32", lambda _event: None)
    run = run_to_target(bench, recipe("epochs=4"), 0, 0.6, lambda _event: None)
    assert (run.reached, run.epochs, run.updates, run.pairs) == (True, 3, 12, 720)
    assert (run.wall_s, run.train_s, run.evaluation_s) == (0, 0, 3000)
    assert run.figures["t2i_r10"] == 0.7


def test_the_plain_pass_is_drawn_out_from_its_sample(small_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each batch: 40 images are 2 batches, 300 of them at that rate 15 s; 1,500 captions likewise."""
    now = [0.0]
    monkeypatch.setattr("chimera_cli.runtime.time.perf_counter", lambda: now[0])
    batches: list[int] = []

    def work(*_arguments: Any) -> Any:
        def run(rows: Any) -> None:
            now[0] += 1
            batches.append(len(rows))

        return run

    monkeypatch.setattr("chimera_cli.services.bench_speedrun._image_work", work)
    monkeypatch.setattr("chimera_cli.services.bench_speedrun._caption_work", work)
    bench = open_bench(small_home, "small", "cpu", "float32", lambda _event: None)
    plain = plain_pass(bench, recipe(), SpeedrunSetting(0.5, True, 40, 30), 0, lambda _event: None)
    # The first of each kind warms up.
    assert batches == [32, 32, 8, 30, 30]
    assert plain["images_per_s"] == 20
    assert plain["captions_per_s"] == 30
    assert plain["seconds"] == 300 / 20 + 1500 / 30


def test_a_line_holds_what_others_need_to_compare() -> None:
    row = {
        "kind": "cold", "seed": 3, "reached": True, "wall_s": 12.34, "figures": {"t2i_r10": 0.6612, "rsum": 3.0},
        "epochs": 2, "pairs": 100, "features_s": 10.0, "train_s": 2.0, "evaluation_s": 5.0, "share": 0.25,
    }  # fmt: skip
    facts = {
        "pack": {"name": "flickr8k", "fingerprint": "f" * 64}, "recipe_hash": "a" * 64, "source_hash": "5" * 64,
        "hardware": {"cpu": 'Some "fast" processor', "cores": 2, "gpu": None},
        "git_commit": "c" * 40, "git_dirty": True,
    }  # fmt: skip
    line = log_line(row, 0.66, facts)
    assert "\n" not in line
    assert line.startswith("speedrun=flickr8k pack=ffffffffffff features=cold seed=3 target=0.66 seconds=12.3 ")
    for words in ("t2i_r10=0.6612", "config=aaaaaaaaaaaa", "commit=cccccccccccc+changes", "cores=2 gpu=none"):
        assert words in line
    assert re.search(r'cpu="Some \\"fast\\" processor"', line)


def test_what_can_not_be_timed_is_refused_before_anything_is_made(small_home: Path) -> None:
    with pytest.raises(UsageError, match="stream"):
        bench_speedrun(small_home, recipe("stream=shards"), (0,), SETTING, "toy", "chimera")
    with pytest.raises(ChimeraError, match="larger than the 240"):
        bench_speedrun(small_home, recipe("batch=500"), (0,), SETTING, "toy", "chimera")
    assert not (small_home / "runs").exists()


def test_without_anything_locked_there_is_no_cached_run(small_home: Path) -> None:
    bare = recipe("image.weights=tiny", "image.locked=false", "epochs=1")
    result = bench_speedrun(small_home, bare, (0,), SETTING, "toy", "chimera bench speedrun")
    assert list(result["reached"]) == ["cold"]
