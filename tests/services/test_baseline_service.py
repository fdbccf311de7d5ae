"""The baseline beside a run and alone: what it learns from, where it lies, which looks count, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from support import Chimera

from chimera_cli.config import TrainConfig
from chimera_cli.data.pack import Caption, Item, Pack, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.errors import UsageError
from chimera_cli.figures import RETRIEVAL
from chimera_cli.runs import (
    Group,
    create_group,
    finish_group,
    list_groups,
    read_sealed_json,
    write_json,
    write_sealed_json,
    write_text,
)
from chimera_cli.services import baseline, embeddings
from chimera_cli.services.baseline import evaluate_baseline
from chimera_cli.services.eval import evaluate_group

SPLITS = {"train": 60, "dev": 20, "test": 20}
WIDTH = 6
# What each split's features are drawn from; a test changes one of them.
Draws = dict[str, int]


def make_pack(home: Path, name: str = "small") -> Pack:
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    items = [Item(f"{i}.png", split, {}) for i, split in enumerate(splits)]
    captions = [Caption(i, j, f"caption {j} of {i}") for i in range(len(splits)) for j in range(2)]
    pictures = [Picture(np.full((4, 4, 3), i, dtype=np.uint8), str(i), 4, 4) for i in range(len(splits))]
    (home / "data").mkdir(parents=True, exist_ok=True)
    return write_pack(home / "data", name=name, source="table", images=pictures, items=items, captions=captions, size=4)


def make_group(home: Path, pack: Pack) -> Group:
    facts = {"pack": {"name": pack.name, "fingerprint": pack.fingerprint, "source": "table"}}
    group = create_group(home, "train", "made", range(2), facts)
    for seed in range(2):
        write_json(group.seed_dir(seed) / "checkpoints" / "best.json", {"step": seed, "epoch": 1})
        config = TrainConfig().model_dump() | {"augmentation": {"flip": True}}
        write_text(group.seed_dir(seed) / "config.yaml", yaml.safe_dump(config))
    return finish_group(group, "finished")


@pytest.fixture
def draws() -> Draws:
    return {"train": 1, "dev": 2, "test": 3}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draws: Draws) -> Path:
    """A home with a pack whose frozen features share three causes, and learned embeddings that know nothing."""

    def causes(split: str) -> NDArray[np.float64]:
        return np.random.default_rng(draws[split]).normal(size=(SPLITS[split], 3))

    def images(_model: Any, _pack: Pack, split: str, *_rest: Any) -> Any:
        mixed = causes(split) @ np.random.default_rng(7).normal(size=(3, WIDTH))
        return SimpleNamespace(values=np.stack([mixed, mixed], axis=1).astype(np.float32))

    def captions(_model: Any, _pack: Pack, split: str, *_rest: Any) -> Any:
        each = np.repeat(causes(split), 2, axis=0) @ np.random.default_rng(8).normal(size=(3, WIDTH))
        noise = 0.3 * np.random.default_rng(draws[split]).normal(size=each.shape)
        return SimpleNamespace(values=(each + noise).astype(np.float32))

    def embed_split(seed_dir: Path, _pack: Pack, split: str, *_rest: Any) -> Any:
        draw = np.random.default_rng(int(seed_dir.name.removeprefix("seed-")))
        return draw.normal(size=(SPLITS[split], 4)), draw.normal(size=(2 * SPLITS[split], 4))

    def frozen(config: TrainConfig, _device: Any) -> Any:
        names = {"image_weights": config.image.weights, "text_weights": config.text.weights}
        return SimpleNamespace(
            architecture=SimpleNamespace(
                **names,
                image_size=224,
                image_stages=0,
                text_hidden_states=(),
                flipped_view=config.augmentation.flip,
                max_tokens=config.text.max_tokens,
            )
        )

    monkeypatch.setattr(embeddings, "locked_image_features", images)
    monkeypatch.setattr(embeddings, "pooled_caption_features", captions)
    monkeypatch.setattr(embeddings, "embed_split", embed_split)
    monkeypatch.setattr(baseline, "_frozen", frozen)
    # MLflow makes a database for every home, which takes seconds.
    monkeypatch.setattr("chimera_cli.services.eval.deliver", lambda *_arguments: None)
    monkeypatch.setattr(baseline, "deliver", lambda *_arguments: None)
    # The real hash changes whenever somebody saves a file of the package, between two evaluations of one test too.
    monkeypatch.setattr("chimera_cli.services.eval.source_hash", lambda: "5" * 64)
    make_pack(tmp_path)
    return tmp_path


def group_of(home: Path) -> Group:
    return list_groups(home, "train")[0]


def test_the_baseline_stands_beside_the_run_and_in_its_group(home: Path) -> None:
    group = make_group(home, make_pack(home))
    result = evaluate_baseline(home, device="cpu", resamples=100)
    stored = read_sealed_json(group.path / "evaluations" / "baselines" / "small-dev-cca.json")
    assert result["baseline"] == stored
    assert (result["run"], result["seeds"]) == (group.name, [0, 1])
    assert stored["group"] == group.name
    assert stored["features"]["flipped_view"] is True
    assert stored["learned_from"] == {"split": "train", "images": 60, "captions": 120}
    assert (stored["images"], stored["captions"]) == (20, 40)
    assert stored["figures"]["rsum"] == stored["chosen_on"]["rsum"] > 3 > result["figures"]["rsum"]
    for name in RETRIEVAL:
        low, high = stored["intervals"][name]
        assert low <= stored["figures"][name] <= high
    # What evaluates the run later shows the baseline too.
    assert evaluate_group(home, device="cpu", resamples=100)["baseline"] == stored


def test_evaluations_that_hold_are_not_made_again(home: Path) -> None:
    group = make_group(home, make_pack(home))
    evaluate_group(home, device="cpu", resamples=100)
    path = group.seed_dir(0) / "evaluations" / "small-dev.json"
    before = path.read_bytes()
    first = evaluate_baseline(home, device="cpu", resamples=100)
    assert path.read_bytes() == before
    write_json(path, read_sealed_json(path) | {"images": 7})
    second = evaluate_baseline(home, device="cpu", resamples=100)
    assert second["figures"] == first["figures"]
    assert read_sealed_json(path)["images"] == 20
    write_sealed_json(path, read_sealed_json(path) | {"source_hash": "6" * 64, "images": 7})
    evaluate_baseline(home, device="cpu", resamples=100)
    assert read_sealed_json(path)["images"] == 20


def test_a_tracking_server_gets_the_baseline_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = make_group(home, make_pack(home))
    path = group.path / "evaluations" / "baselines" / "small-dev-cca.json"
    sent: list[bool] = []
    monkeypatch.setattr(baseline, "deliver", lambda *_arguments: sent.append(path.is_file()))
    evaluate_baseline(home, device="cpu", resamples=100)
    assert sent == [True]


def test_the_same_figures_each_time_whatever_test_holds(home: Path, draws: Draws) -> None:
    make_group(home, make_pack(home))
    kept = ("figures", "intervals", "settings", "chosen_on", "similarities")
    first, again = (evaluate_baseline(home, device="cpu", resamples=100)["baseline"] for _ in range(2))
    assert {key: first[key] for key in kept} == {key: again[key] for key in kept}
    one = evaluate_baseline(home, split="test", device="cpu", resamples=100)["baseline"]
    draws["test"] = 77
    other = evaluate_baseline(home, split="test", device="cpu", resamples=100)["baseline"]
    assert one["figures"] != other["figures"]
    for test in (one, other):
        assert (test["settings"], test["chosen_on"]) == (first["settings"], first["chosen_on"])


def test_a_look_at_test_counts_once(home: Path) -> None:
    make_group(home, make_pack(home))
    assert evaluate_baseline(home, split="test", device="cpu", resamples=100)["test_looks"] == 1
    assert evaluate_baseline(home, split="test", device="cpu", resamples=100)["test_looks"] == 2
    assert group_of(home).facts["test_looks"] == 2
    assert evaluate_baseline(home, split="dev", device="cpu", resamples=100)["test_looks"] == 2


@pytest.mark.parametrize("arguments", [{}, {"changes": ["text.max_tokens=16"]}, {"data": "other"}], ids=str)
def test_a_pack_alone_needs_no_run_and_leaves_no_trace(home: Path, arguments: dict[str, Any]) -> None:
    if arguments:
        make_group(home, make_pack(home))
        make_pack(home, "other")
    before = sorted(home.rglob("*"))
    result = evaluate_baseline(home, device="cpu", resamples=100, **arguments)
    assert sorted(home.rglob("*")) == before
    assert (result["run"], result["by_seed"], result["test_looks"]) == (None, [], None)
    assert result["figures"] == result["baseline"]["figures"]
    # Nothing could count a look at test.
    with pytest.raises(UsageError, match="no run to count a look at the test split with"):
        evaluate_baseline(home, split="test", device="cpu", resamples=100, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": "train-made", "changes": ["text.max_tokens=16"]}, "--run names one"),
        ({"run": "nobody"}, "no run is called"),
        ({"split": "tset"}, "tset"),
        ({"data": "nothing"}, "nothing"),
    ],
    ids=str,
)
def test_words_that_mean_nothing_are_usage_errors(home: Path, arguments: dict[str, Any], message: str) -> None:
    make_group(home, make_pack(home))
    with pytest.raises(UsageError, match=message):
        evaluate_baseline(home, device="cpu", resamples=100, **arguments)
    assert group_of(home).facts["test_looks"] == 0


def test_towers_from_scratch_have_no_frozen_features(tmp_path: Path) -> None:
    make_pack(tmp_path)
    changes = ["image.weights=tiny", "image.locked=false"]
    with pytest.raises(UsageError, match=r"image\.weights: tiny starts from scratch"):
        evaluate_baseline(tmp_path, changes=changes, device="cpu")


def test_the_real_towers_tell_toy_scenes_apart(chimera: Chimera, small_home: Path) -> None:
    small = ("--set", "image.image_size=32", "--set", "text.max_tokens=24", "--device", "cpu")
    done = chimera("eval", "--baseline", "cca", *small, home=small_home)
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("text to image R@10")]
    assert float(line.split()[4]) > 30 > float(line.split()[-2])
    assert "CCA (95 %)" in done.out
    assert "CCA of 240 images and 1,200 captions: " in done.out
    assert chimera("eval", "--set", "image.image_size=32", home=small_home).code == 2
