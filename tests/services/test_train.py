"""Training as a whole on the toy pack: the proof of life and its control, a locked recipe, what is left on disk."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support import TINY_SANITY

from chimera_cli.config import SanityConfig, TrainConfig, load_config
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Progress
from chimera_cli.runs import latest_group, list_groups, read_json_lines, resolve_run
from chimera_cli.services.sanity import train_sanity
from chimera_cli.services.train import train_full

pytestmark = pytest.mark.usefixtures("lean")

SCRATCH = (
    "data=toy", "image.weights=tiny", "image.locked=false", "image.image_size=32",
    "text.weights=tiny", "text.learn_layers=null",
    "heads.kind=linear", "heads.dim=64", "epochs=2", "batch=250", "optimiser.lr_image=3e-3", "optimiser.lr_text=3e-3",
)  # fmt: skip
LOCKED = (
    "data=small", "image.image_size=32", "augmentation.flip=true", "heads.hidden=128", "heads.dim=64",
    "epochs=3", "batch=60",
)  # fmt: skip


def test_proof_of_life_and_its_shuffled_control(toy_home: Path) -> None:
    config = load_config(SanityConfig, None, [*TINY_SANITY, "data=toy"])
    alive = train_sanity(toy_home, config, 0, "chimera train sanity")
    control = train_sanity(toy_home, config, 0, "chimera train sanity --shuffled", shuffled=True)
    assert alive["details"]["passed"]
    assert not control["details"]["passed"]
    losses = alive["details"]["losses"]
    assert len(losses) == 201
    assert alive["figures"]["loss_drop"] == losses[0] - losses[200]
    assert alive["figures"]["loss_tail_mean"] == pytest.approx(np.mean(losses[191:]))
    # 2,000 images in 62 batches as even as can be.
    assert alive["figures"]["chance_loss"] == pytest.approx(math.log(2000 / 62))
    assert alive["figures"]["vram_peak_gb"] is None


def test_both_towers_learn_in_the_proof_of_life(toy_home: Path) -> None:
    from chimera_cli.models.dual_encoder import build_dual_encoder
    from chimera_cli.services.learning import architecture_of

    config = SanityConfig()
    architecture = architecture_of(config.image, config.text, config.heads, config.loss, flipped_view=False)
    model = build_dual_encoder(architecture)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_group_holds_one_run_per_seed_and_all_its_files(toy_home: Path) -> None:
    config = load_config(TrainConfig, None, SCRATCH)
    result = train_full(toy_home, config, (0, 1), "scratch", "chimera train full ...")
    group = latest_group(toy_home)
    assert group.name == result["group"]
    assert group.status == "finished"
    assert group.facts["pack"]["name"] == "toy"
    for seed in (0, 1):
        folder = group.seed_dir(seed)
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "telemetry.jsonl", "result.json"):
            assert (folder / name).stat().st_size > 0, name
        steps = [row["step"] for row in read_json_lines(folder / "metrics.jsonl") if "loss" in row]
        assert steps == list(range(16))
        assert (folder / "checkpoints" / "best.safetensors").exists()
    first, second = (part["figures"]["loss_first"] for part in result["results"])
    assert first != second, "seeds must change the run"


def test_the_same_seed_gives_the_same_losses(toy_home: Path) -> None:
    config = load_config(TrainConfig, None, [*SCRATCH, "epochs=1"])
    losses = []
    for _ in range(2):
        group, _ = resolve_run(toy_home, train_full(toy_home, config, (4,), "again", "x")["group"])
        losses.append([row["loss"] for row in read_json_lines(group.seed_dir(4) / "metrics.jsonl") if "loss" in row])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_locked_features_are_computed_once_and_verified(small_home: Path) -> None:
    config = load_config(TrainConfig, None, LOCKED)
    stages: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            stages.append(event.stage)

    first = train_full(small_home, config, (0,), "locked", "x", listen)
    assert "train image features" in stages
    assert "train caption features" in stages
    stages.clear()
    second = train_full(small_home, config, (0,), "locked", "x", listen)
    assert stages == []
    assert second["figures"]["rsum"] == first["figures"]["rsum"]
    assert second["figures"]["features_s"] == first["figures"]["features_s"]
    stored = next((small_home / "data").rglob("train-images-*.npy"))
    features = np.load(stored)
    assert features.shape == (240, 2, 1280)
    features[0] = 0
    np.save(stored, features)
    train_full(small_home, config, (0,), "locked", "x", listen)
    assert "train image features" in stages, "a changed cache file must be computed anew"


@pytest.mark.parametrize(
    ("more", "members"),
    [
        ([], 1),
        (["heads.members=2", "heads.queries=3", "image.stages=2", "mixup=0.3", "captions_per_image=2"], 2),
        (["text.learn_layers=1", "text.hidden_states=[5]", "mixup=0.3", "captions_per_image=2", "epochs=1"], 1),
    ],
    ids=["one pair of heads", "two with queries", "a layer learns from mixtures"],
)
def test_embeddings_of_the_best_checkpoint_repeat_its_dev_figures(
    small_home: Path, more: list[str], members: int
) -> None:
    import torch

    from chimera_cli.data.pack import open_pack
    from chimera_cli.evaluation.retrieval import retrieval_figures, retrieval_ranks
    from chimera_cli.services.embeddings import embed_split

    config = load_config(TrainConfig, None, [*LOCKED, *more])
    result = train_full(small_home, config, (0,), "locked", "x")
    group, _ = resolve_run(small_home, result["group"])
    pack = open_pack(small_home / "data", "small")
    image, text = embed_split(group.seed_dir(0), pack, "dev", torch.device("cpu"))
    assert image.shape[1] == text.shape[1] == members * 64
    figures = retrieval_figures(retrieval_ranks(image, text, pack.captions("dev").image_positions))
    assert figures == pytest.approx(result["results"][0]["details"]["best_dev"])


def test_a_locked_run_with_hidden_states_repeats_its_dev_figures_from_its_checkpoint(small_home: Path) -> None:
    import torch

    from chimera_cli.data.pack import open_pack
    from chimera_cli.evaluation.retrieval import retrieval_figures, retrieval_ranks
    from chimera_cli.services.embeddings import embed_split, embed_texts

    changes = [*LOCKED, "epochs=1", "augmentation.flip=false", "text.hidden_states=[0, 3]"]
    result = train_full(small_home, load_config(TrainConfig, None, changes), (0,), "locked", "x")
    group, _ = resolve_run(small_home, result["group"])
    pack = open_pack(small_home / "data", "small")
    stored = next((small_home / "data").rglob("train-captions-*.npy"))
    assert np.load(stored, mmap_mode="r").shape[1] == 3 * 384
    image, text = embed_split(group.seed_dir(0), pack, "dev", torch.device("cpu"))
    figures = retrieval_figures(retrieval_ranks(image, text, pack.captions("dev").image_positions))
    assert figures == pytest.approx(result["results"][0]["details"]["best_dev"])
    sentences = pack.captions("dev").texts[:9]
    assert np.allclose(embed_texts(group.seed_dir(0), sentences, torch.device("cpu")), text[:9], atol=1e-4)


def test_an_epoch_with_several_captions_an_image_has_so_many_more_pairs(small_home: Path) -> None:
    changes = [*LOCKED, "epochs=2", "captions_per_image=4", "batch=300"]
    result = train_full(small_home, load_config(TrainConfig, None, changes), (0,), "locked", "x")
    rows = read_json_lines(resolve_run(small_home, result["group"])[0].seed_dir(0) / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(6)), "960 pairs are 3.2 batches of 300"
    assert result["results"][0]["details"]["epochs_done"] == 2.0


def test_a_batch_needs_two_images_with_all_their_captions() -> None:
    assert load_config(TrainConfig, None, ["captions_per_image=5", "batch=10"]).batch == 10
    with pytest.raises(UsageError, match="a batch of 9 pairs holds no two images with 5 captions each: set batch: 10"):
        load_config(TrainConfig, None, ["captions_per_image=5", "batch=9"])


def test_a_batch_larger_than_the_set_is_refused_and_leaves_nothing(toy_home: Path) -> None:
    with pytest.raises(ChimeraError, match=r"batch 5000 is larger than the 2000 training images of toy$"):
        train_full(toy_home, load_config(TrainConfig, None, [*SCRATCH, "batch=5000"]), (0,), "x", "x")
    assert list_groups(toy_home) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("image.stages=9", "image.stages: 9 is more than the tower's 7"),
        ("image={stages: 3, learn_blocks: 2}", "image.stages: 3 needs what leaves a block below those that learn"),
        ("text.hidden_states=[0, 6]", "text.hidden_states: 6 is none of the states before the tower's last, 0 to 5"),
    ],
)
def test_towers_without_what_is_asked_of_them_are_refused_and_leave_nothing(
    small_home: Path, change: str, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        train_full(small_home, load_config(TrainConfig, None, [*LOCKED, change]), (0,), "x", "x")
    assert caught.value.message == words
    assert list_groups(small_home) == []


def test_the_proof_of_life_refuses_what_a_tower_lacks_and_leaves_nothing(toy_home: Path) -> None:
    config = load_config(SanityConfig, None, [*TINY_SANITY, "data=toy", "image.stages=9"])
    with pytest.raises(UsageError, match=r"image\.stages: 9 is more than the tower's \d"):
        train_sanity(toy_home, config, 0, "x")
    assert list_groups(toy_home) == []


def test_a_run_that_fails_says_so_in_its_group(toy_home: Path) -> None:
    config = load_config(TrainConfig, None, [*SCRATCH, "optimiser.lr_heads=1e30", "optimiser.clip_norm=0"])
    with pytest.raises(ChimeraError, match="the loss is"):
        train_full(toy_home, config, (0,), "broken", "x")
    assert [group.status for group in list_groups(toy_home)] == ["failed"]
    facts = json.loads((list_groups(toy_home)[0].path / "group.json").read_text(encoding="utf-8"))
    assert facts["finished_at"]
