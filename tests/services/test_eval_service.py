"""Evaluation of a run: files per seed and group, counted looks, zero-shot, and what is refused."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chimera_cli.data.pack import Caption, Item, Pack, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.evaluation.rank_files import read_ranks
from chimera_cli.evaluation.retrieval import retrieval_figures
from chimera_cli.events import Event, Note
from chimera_cli.figures import RETRIEVAL
from chimera_cli.runs import (
    MADE_WITH,
    Group,
    create_group,
    finish_group,
    list_groups,
    read_json,
    read_sealed_json,
    update_group,
    write_json,
)
from chimera_cli.services import embeddings
from chimera_cli.services.eval import evaluate_group

COLOURS = ("red", "green", "blue")
DIM = 12


def make_pack(home: Path, name: str = "small") -> Pack:
    """Write 12 dev and 6 test images; image i has 1 + i % 3 captions."""
    images = 18
    items = [Item(f"{i}.png", "dev" if i < 12 else "test", {"colour": COLOURS[i % 3]}) for i in range(images)]
    captions = [Caption(i, j, f"caption {j} of image {i}") for i in range(images) for j in range(1 + i % 3)]
    pictures = [Picture(np.full((4, 4, 3), i, dtype=np.uint8), str(i), 4, 4) for i in range(images)]
    (home / "data").mkdir(parents=True, exist_ok=True)
    return write_pack(home / "data", name=name, source="table", images=pictures, items=items, captions=captions, size=4)


def make_group(home: Path, pack: Pack, seeds: int = 3) -> Group:
    facts = {"pack": {"name": pack.name, "fingerprint": pack.fingerprint, "source": "table"}}
    group = create_group(home, "train", "made", range(seeds), facts)
    for seed in range(seeds):
        write_json(group.seed_dir(seed) / "checkpoints" / "best.json", {"step": 10 * seed, "epoch": 1})
    return finish_group(group, "finished")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a pack and a run of three seeds whose embeddings get noisier with the seed."""

    def embed_split(
        seed_dir: Path, pack: Pack, split: str, *_rest: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        generator = np.random.default_rng(5)
        images = generator.normal(size=(len(pack.split_indices(split)), DIM)).astype(np.float32)
        texts = images[pack.captions(split).image_positions]
        noise = 0.8 * int(seed_dir.name.removeprefix("seed-"))
        return images, texts + noise * generator.normal(size=texts.shape).astype(np.float32)

    def embed_texts(_seed_dir: Path, texts: Sequence[str], *_rest: Any) -> NDArray[np.float32]:
        # Every prompt stands for the first image of its colour.
        images = np.random.default_rng(5).normal(size=(12, DIM)).astype(np.float32)
        return np.stack([images[next(i for i, name in enumerate(COLOURS) if name in text)] for text in texts])

    monkeypatch.setattr(embeddings, "embed_split", embed_split)
    monkeypatch.setattr(embeddings, "embed_texts", embed_texts)
    # MLflow makes a database for every home, which takes seconds; its own tests and the whole road deliver to it.
    monkeypatch.setattr("chimera_cli.services.eval.deliver", lambda *_arguments: None)
    make_group(tmp_path, make_pack(tmp_path))
    return tmp_path


def test_every_seed_and_the_group_get_a_file(home: Path) -> None:
    result = evaluate_group(home, split="validation", device="cpu", resamples=100)
    group = home / "runs" / result["run"]
    documents = [read_sealed_json(group / f"seed-{seed}" / "evaluations" / "small-dev.json") for seed in range(3)]
    assert result["by_seed"] == documents
    assert [document["checkpoint_step"] for document in documents] == [0, 10, 20]
    assert [(document["images"], document["captions"]) for document in documents] == [(12, 24)] * 3
    assert documents[0]["captions_per_image"] == {"min": 1, "max": 3}
    # Seed 0 has no noise: every image is found by its captions and finds them.
    assert documents[0]["figures"] | {"i2t_medr": 1.0, "t2i_medr": 1.0, "rsum": 6.0} == documents[0]["figures"]
    assert documents[0]["chance"]["t2i_r1"] == pytest.approx(1 / 12)
    for name in RETRIEVAL:
        values = [document["figures"][name] for document in documents]
        assert result["figures"][name] == pytest.approx(np.mean(values))
        assert result["over_seeds"][name]["std"] == pytest.approx(np.std(values, ddof=1))
        for document in documents:
            low, high = document["intervals"][name]
            assert low <= document["figures"][name] <= high
    aggregate = read_sealed_json(group / "evaluations" / "small-dev.json")
    assert (aggregate["seeds"], aggregate["test_looks"]) == ([0, 1, 2], 0)
    assert aggregate["figures"]["rsum"] == result["over_seeds"]["rsum"]


def test_ranks_and_similarities_lie_beside_the_figures(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chimera_cli.services.eval.source_hash", lambda: "a state of the code")
    result = evaluate_group(home, device="cpu", resamples=100)
    folder = home / "runs" / result["run"] / "seed-1" / "evaluations"
    document = read_sealed_json(folder / "small-dev.json")
    ranks = read_ranks(folder / document["ranks"]["file"], document["ranks"]["sha256"], "")
    assert document["ranks"]["file"] == "small-dev.ranks.npz"
    assert ranks.captions_per_query().tolist() == [1, 2, 3] * 4
    assert retrieval_figures(ranks) == document["figures"]
    similar = document["similarities"]
    assert (len(similar["edges"]), sum(similar["matched"]), sum(similar["unmatched"])) == (101, 24, 100_000)
    # What noise of 0.8 leaves of a caption is still nearer to its own image than to others.
    middle = np.convolve(similar["edges"], [0.5, 0.5], "valid")
    assert np.average(middle, weights=similar["matched"]) > 0.5 > np.average(middle, weights=similar["unmatched"]) + 0.3
    assert document["source_hash"] == "a state of the code"


def test_an_evaluation_says_of_which_run_and_checkpoint_it_is(home: Path) -> None:
    group = next(iter(list_groups(home)))
    (group.seed_dir(1) / "checkpoints" / "best.safetensors").write_bytes(b"weights")
    # A count that an edit spoilt stops nothing.
    update_group(group, test_looks="two")
    first, second, _ = evaluate_group(home, device="cpu", resamples=100)["by_seed"]
    assert (first["group"], first["seed"], first["checkpoint_sha256"]) == (group.name, 0, None)
    assert second["checkpoint_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert first["made_with"] == {key: group.facts.get(key) for key in MADE_WITH}


def test_an_edited_file_of_a_seed_makes_no_mean_of_the_group(home: Path) -> None:
    name = evaluate_group(home, device="cpu", resamples=100)["run"]
    group = home / "runs" / name
    path = group / "seed-0" / "evaluations" / "small-dev.json"
    path.write_text(path.read_text().replace('"images": 12', '"images": 1000'))
    (group / "evaluations" / "small-dev.json").unlink()
    evaluate_group(home, f"{name}/seed-1", device="cpu", resamples=100)
    assert not (group / "evaluations" / "small-dev.json").exists()


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_seed_that_is_not_finished_is_refused_and_no_look_is_counted(home: Path, status: str) -> None:
    group = update_group(next(iter(list_groups(home))), status=status)
    write_json(group.seed_dir(0) / "result.json", {"status": "finished"})
    with pytest.raises(ChimeraError, match=f"seed 1 of {group.name} is not finished: the run is {status}") as raised:
        evaluate_group(home, group.name, split="test", device="cpu")
    assert raised.value.hint
    assert ("wait" in raised.value.hint) == (status == "running")
    assert read_json(group.path / "group.json")["test_looks"] == 0
    # A seed of it that came to its end can be looked at by itself.
    assert evaluate_group(home, f"{group.name}/seed-0", device="cpu", resamples=100)["seeds"] == [0]


def test_one_seed_alone_makes_no_mean_of_the_group(home: Path) -> None:
    name = next((home / "runs").iterdir()).name
    result = evaluate_group(home, f"{name}/seed-1", device="cpu", resamples=100)
    assert (result["seeds"], result["over_seeds"]["rsum"]["std"]) == ([1], None)
    assert not (home / "runs" / name / "evaluations").exists()
    evaluate_group(home, f"{name}/seed-0", device="cpu", resamples=100)
    evaluate_group(home, f"{name}/seed-2", device="cpu", resamples=100)
    assert (home / "runs" / name / "evaluations" / "small-dev.json").exists()


def test_looks_at_the_test_split_are_counted_and_told(home: Path) -> None:
    told: list[Event] = []
    evaluate_group(home, device="cpu", resamples=100)
    evaluate_group(home, split="test", device="cpu", resamples=100)
    result = evaluate_group(home, split="test", device="cpu", resamples=100, listener=told.append)
    assert (result["test_looks"], result["images"]) == (2, 6)
    assert read_json(home / "runs" / result["run"] / "group.json")["test_looks"] == 2
    warnings = [event.message for event in told if isinstance(event, Note) and event.level == "warning"]
    assert len(warnings) == 1
    assert "looked at 2 times" in warnings[0]


def test_another_pack_is_evaluated_beside_the_runs_own(home: Path) -> None:
    make_pack(home, "other")
    result = evaluate_group(home, data="other", device="cpu", resamples=100)
    files = sorted(path.name for path in (home / "runs" / result["run"] / "seed-0" / "evaluations").iterdir())
    assert files == ["other-dev.json", "other-dev.ranks.npz"]


def test_zero_shot_takes_a_column_as_classes(home: Path) -> None:
    result = evaluate_group(home, device="cpu", resamples=100, zero_shot="colour")
    guess = result["by_seed"][0]["zero_shot"]
    assert (guess["column"], guess["classes"]) == ("colour", ["blue", "green", "red"])
    assert result["chance"]["zero_shot_top1"] == pytest.approx(1 / 3)
    assert result["figures"]["zero_shot_top5"] is None
    # The three images that the prompts stand for are surely classified rightly.
    assert 3 / 12 <= result["figures"]["zero_shot_top1"] <= 1
    with pytest.raises(UsageError, match="no column 'shape'"):
        evaluate_group(home, device="cpu", zero_shot="shape")


def test_features_that_are_not_finite_leave_no_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return np.full((12, DIM), np.nan, dtype=np.float32), np.ones((24, DIM), dtype=np.float32)

    monkeypatch.setattr(embeddings, "embed_split", broken)
    with pytest.raises(ChimeraError, match="12 of 12 image features are NaN"):
        evaluate_group(home, device="cpu")
    assert list(home.rglob("evaluations")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "holdout"}, "there is no split 'holdout'"),
        ({"split": "unused"}, "can't be evaluated"),
        ({"split": "train"}, "no images in the split 'train'"),
        ({"data": "absent"}, "no pack 'absent'"),
        ({"run": "absent"}, "no run is called 'absent'"),
    ],
)
def test_words_that_mean_nothing_are_usage_errors(home: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_group(home, device="cpu", **arguments)


def test_a_run_of_another_kind_is_refused(home: Path) -> None:
    sanity = finish_group(create_group(home, "sanity", "", [0], {}), "finished")
    with pytest.raises(UsageError, match="is a sanity run"):
        evaluate_group(home, sanity.name, device="cpu")
