"""The dry run: nothing is written, parts by hand, and the recipe for the 8 GB card stays below its limit."""

from pathlib import Path

import pytest
from support import REPOSITORY

from chimera_cli.config import TrainConfig, load_config
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


def test_the_recipe_for_8_gb_fits_and_is_a_large_batch(small_home: Path) -> None:
    config = load_config(TrainConfig, RECIPES / "gtx1080.yaml", ["data=small"])
    found = estimate_full(small_home, config)["figures"]["vram_estimate_gb"]
    assert config.batch >= 1024
    assert not config.image.locked
    assert 4 < found < 7.5
    again = load_config(TrainConfig, RECIPES / "gtx1080.yaml", ["data=small", "checkpointing=true"])
    assert estimate_full(small_home, again)["figures"]["vram_estimate_gb"] < found
