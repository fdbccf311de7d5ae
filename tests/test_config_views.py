"""Cached views: what would change nothing is refused with what to write instead."""

import pytest

from chimera_cli.config import SanityConfig, TrainConfig, load_config
from chimera_cli.errors import UsageError


@pytest.mark.parametrize(
    ("changes", "random_views"),
    [
        ([], 0),
        (["augmentation.flip=true"], 0),
        (["augmentation.flip=true", "augmentation.views=2"], 0),
        (["augmentation.flip=true", "augmentation.views=4", "augmentation.crop_scale=0.6"], 2),
        (["augmentation.views=4", "augmentation.colour_jitter=0.2"], 3),
    ],
)
def test_views_beyond_the_plain_and_the_mirrored_one_are_random(changes: list[str], random_views: int) -> None:
    assert load_config(TrainConfig, None, changes).augmentation.random_views == random_views


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["views=2", "crop_scale=0.6", "flip=true"], "augmentation.views: 3 or more"),
        (["colour_jitter=0.1"], "colour_jitter above 0 needs image.locked: false, or augmentation.views: 2 or more"),
        (["views=3", "flip=true"], "views: 3 needs crop_scale below 1 or colour_jitter above 0"),
        (["views=2"], "views: 2 needs crop_scale below 1"),
        (["views=17"], "less than or equal to 16"),
        (["views=0"], "greater than or equal to 1"),
    ],
)
def test_views_that_would_show_nothing_new_are_refused(changes: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(TrainConfig, None, [f"augmentation.{change}" for change in changes])
    assert words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    ("change", "words"),
    [("image.locked=false", "needs image.locked: true"), ("stream=shards", "which a stream has not")],
)
def test_only_a_cache_has_views(change: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_config(TrainConfig, None, ["augmentation.views=4", "augmentation.crop_scale=0.5", change])


def test_a_stream_is_computed_anew_and_may_be_cropped_without_views() -> None:
    config = load_config(TrainConfig, None, ["stream=shards", "augmentation.crop_scale=0.5", "image.learn_blocks=2"])
    assert config.augmentation.random_views == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["learn_blocks=2", "locked=false"], "image: learn_blocks needs locked: true"),
        (["learn_blocks=-1"], "image.learn_blocks: input should be greater than or equal to 0"),
        (["learn_blocks=null"], "image.learn_blocks: input should be a valid integer"),
        (["learn_blocks=1", "weights=tiny"], "a tiny tower starts from scratch and can't be locked"),
    ],
)
def test_blocks_learn_in_a_locked_pretrained_tower_alone(changes: list[str], words: str) -> None:
    assert load_config(TrainConfig, None, ["image.learn_blocks=2"]).image.learn_blocks == 2
    with pytest.raises(UsageError) as caught:
        load_config(TrainConfig, None, [f"image.{change}" for change in changes])
    assert words in caught.value.message


def test_noise_needs_a_tower_that_is_locked_whole() -> None:
    changes = ["image.learn_blocks=2", "feature_noise=0.1"]
    assert load_config(TrainConfig, None, changes).feature_noise == 0.1, "the captions get it"
    with pytest.raises(UsageError, match="feature_noise is for features of a tower that is locked whole"):
        load_config(TrainConfig, None, [*changes, "text.learn_layers=1"])


@pytest.mark.parametrize("more", [[], ["image.learn_blocks=2"], ["image.locked=false"]])
def test_queries_need_places(more: list[str]) -> None:
    changes = ["image.stages=2", "heads.queries=8", *more]
    assert load_config(TrainConfig, None, [*changes, "text.learn_layers=2", "mixup=0.3"]).heads.queries == 8
    with pytest.raises(UsageError, match=r"heads\.queries chooses among the places of the image tower's stages"):
        load_config(TrainConfig, None, [*changes, "image.stages=0"])
    with pytest.raises(UsageError, match=r"feature_noise is for pooled features: set heads\.queries: 0 or"):
        load_config(TrainConfig, None, [*changes, "feature_noise=0.1"])


def test_the_proof_of_life_needs_places_too() -> None:
    with pytest.raises(UsageError, match=r"heads\.queries chooses among the places"):
        load_config(SanityConfig, None, ["heads.queries=2"])
    assert load_config(SanityConfig, None, ["heads.queries=2", "image.stages=2"]).heads.queries == 2


def test_a_stream_has_nothing_to_mix() -> None:
    with pytest.raises(UsageError, match="a stream mixes no pairs: set mixup: 0"):
        load_config(TrainConfig, None, ["mixup=0.3", "stream=x"])
