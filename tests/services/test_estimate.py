"""The dry run: nothing is written, parts by hand, and the recipe for the 8 GB card stays below its limit."""

from pathlib import Path

import pytest
from support import REPOSITORY

from chimera_cli.config import TrainConfig, load_config
from chimera_cli.data.pack import open_pack
from chimera_cli.models.text_tower import build_text_tower
from chimera_cli.models.weights import DEFAULT_TEXT
from chimera_cli.runtime import MemoryPeaks
from chimera_cli.services.estimate import GIB, estimate_full

RECIPES = REPOSITORY / "configs" / "train"


def test_parts_follow_from_shapes_and_nothing_is_written(small_home: Path) -> None:
    changes = [
        "data=small", "image.image_size=32", "text.learn_layers=0", "augmentation.flip=true", "heads.kind=linear",
        "heads.dim=64", "batch=60", "epochs=3",
    ]  # fmt: skip
    figures = estimate_full(small_home, load_config(TrainConfig, RECIPES / "toy.yaml", changes))["figures"]
    # Two linear heads, 1280 and 384 wide, and the temperature learn; Adam keeps two numbers for each.
    learning = 4 * (64 * (1280 + 384) + 1)
    assert figures["gradients_gb"] == pytest.approx(learning / GIB)
    assert figures["optimiser_gb"] == pytest.approx(2 * learning / GIB)
    # 300 images in two views, and the five captions of each.
    assert figures["features_gb"] == pytest.approx(4 * 300 * (2 * 1280 + 5 * 384) / GIB)
    assert figures["updates"] == 3 * 4
    assert figures["wall_s"] is None
    assert not (small_home / "runs").exists()
    assert [path.name for path in (small_home / "data").iterdir()] == ["small"]


def test_every_member_has_its_heads_and_its_part_of_the_loss(small_home: Path) -> None:
    changes = ["data=small", "image.image_size=32", "text.learn_layers=0", "heads.kind=linear", "heads.dim=64",
               "batch=60"]  # fmt: skip
    one, three = (
        estimate_full(small_home, load_config(TrainConfig, RECIPES / "toy.yaml", [*changes, *more]))["figures"]
        for more in ([], ["heads.members=3"])
    )
    assert three["gradients_gb"] == pytest.approx(4 * (3 * 64 * (1280 + 384) + 1) / GIB)
    # Eight times the embeddings of the batch, beside the tiles.
    assert three["loss_gb"] - one["loss_gb"] == pytest.approx(4 * 8 * 60 * 2 * 64 / GIB)
    assert three["activations_gb"] > one["activations_gb"]
    assert three["features_gb"] == one["features_gb"]


def test_views_maps_and_states_are_counted_as_they_are_cached(small_home: Path) -> None:
    changes = ["data=small", "image.image_size=64", "augmentation.flip=true", "augmentation.views=4",
               "augmentation.crop_scale=0.5", "batch=60"]  # fmt: skip
    recipe = RECIPES / "toy.yaml"
    locked = estimate_full(small_home, load_config(TrainConfig, recipe, changes))["figures"]
    # 240 training images in four views, 60 of dev in two; every image has five captions.
    assert locked["features_gb"] == pytest.approx(4 * ((240 * 4 + 60 * 2) * 1280 + 300 * 5 * 384) / GIB)
    assert locked["features_cache_gb"] == locked["features_gb"]
    changes += ["image.learn_blocks=2", "text.learn_layers=1"]
    partly = estimate_full(small_home, load_config(TrainConfig, recipe, changes))["figures"]
    assert partly["features_gb"] == 0
    pack = open_pack(small_home / "data", "small")
    tower = build_text_tower(DEFAULT_TEXT)
    tokens = sum(len(tower.token_table(pack.captions(split).texts, 40).ids) for split in ("train", "dev"))
    # Half precision; of an image the last but two blocks make 192 maps of 2 x 2.
    cached = 2 * ((240 * 4 + 60 * 2) * 192 * 2 * 2 + tokens * 384)
    assert partly["features_cache_gb"] == pytest.approx(cached / GIB)
    # A batch is in float32: maps, hidden states of 40 tokens, and 40 entries of the mask.
    assert partly["inputs_gb"] == pytest.approx(2 * 60 * (4 * 192 * 4 + 40 * (4 * 384 + 8)) / GIB)
    assert partly["gradients_gb"] > locked["gradients_gb"]
    streamed = load_config(TrainConfig, recipe, [*changes, "stream=shards", "augmentation.views=1"])
    assert estimate_full(small_home, streamed)["figures"]["features_cache_gb"] < partly["features_cache_gb"]


def test_places_are_read_from_the_disk_and_captions_of_an_image_share_it(
    small_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chimera_cli.runtime.memory_peaks", lambda _device: MemoryPeaks(None, None, 1.5))
    changes = ["data=small", "image.image_size=64", "image.stages=2", "heads.queries=2", "text.learn_layers=0",
               "augmentation.flip=true", "batch=60"]  # fmt: skip
    one, three = (
        estimate_full(small_home, load_config(TrainConfig, RECIPES / "toy.yaml", [*changes, *more]))["figures"]
        for more in ([], ["captions_per_image=3"])
    )
    # Captions stay on the device: five of 240 images and of 60. Of an image there are 2 x 2 places with 512 channels.
    assert one["features_gb"] == pytest.approx(4 * 300 * 5 * 384 / GIB)
    width = 1280 + 4 * (192 + 320)
    assert one["features_cache_gb"] == pytest.approx((2 * 300 * 2 * width + 4 * 300 * 5 * 384) / GIB)
    assert one["inputs_gb"] == pytest.approx(2 * 60 * 4 * (width + 384) / GIB)
    # What is read of the file counts in the peak of a process, beside what it has had and what it trains with.
    files = one["features_cache_gb"] - one["features_gb"]
    assert one["ram_estimate_gb"] == pytest.approx(1.5 + one["vram_estimate_gb"] + files)
    assert three["inputs_gb"] == pytest.approx(2 * 20 * 4 * (width + 3 * 384) / GIB)
    assert three["activations_gb"] < one["activations_gb"]


def test_the_recipe_for_8_gb_fits_and_is_a_large_batch(small_home: Path) -> None:
    config = load_config(TrainConfig, RECIPES / "gtx1080.yaml", ["data=small"])
    found = estimate_full(small_home, config)["figures"]["vram_estimate_gb"]
    assert config.batch >= 1024
    assert not config.image.locked
    assert 4 < found < 7.5
    again = load_config(TrainConfig, RECIPES / "gtx1080.yaml", ["data=small", "checkpointing=true"])
    assert estimate_full(small_home, again)["figures"]["vram_estimate_gb"] < found
