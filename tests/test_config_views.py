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


@pytest.mark.parametrize("change", ["image.locked=false", "image.learn_blocks=2", "text.learn_layers=2"])
def test_mixup_needs_the_features_of_locked_towers(change: str) -> None:
    assert load_config(TrainConfig, None, ["mixup=0.3"]).mixup == 0.3
    with pytest.raises(UsageError, match="mixup needs features of locked towers: set mixup: 0, or"):
        load_config(TrainConfig, None, ["mixup=0.3", change])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ["text.learn_layers=2", "text.hidden_states=[0]", "mixup=0.3"],
            "text.hidden_states and mixup need features of locked towers: set text.hidden_states: [] and mixup: 0, or"
            " text.learn_layers: 0",
        ),
        (
            ["heads.queries=8"],
            "heads.queries needs features of locked towers: set heads.queries: 0, or image.stages: 1 or more",
        ),
        (
            ["heads.queries=8", "image.learn_blocks=2", "text.learn_layers=2", "mixup=0.3"],
            "heads.queries and mixup need features of locked towers: set heads.queries: 0 and mixup: 0, or"
            " image.locked: true, image.learn_blocks: 0, text.learn_layers: 0 and image.stages: 1 or more",
        ),
        (
            ["heads.queries=8", "image.stages=1", "feature_noise=0.1"],
            "feature_noise is for pooled features: set heads.queries: 0 or feature_noise: 0",
        ),
    ],
)
def test_all_that_needs_a_locked_tower_is_told_of_in_one_sentence(changes: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(TrainConfig, None, changes)
    assert caught.value.message == f"the options: {sentence}"


@pytest.mark.parametrize("change", ["text.hidden_states=[0]", "heads.queries=2"])
def test_the_proof_of_life_has_nothing_locked(change: str) -> None:
    with pytest.raises(UsageError, match="needs features of locked towers"):
        load_config(SanityConfig, None, [change])


def test_a_stream_has_nothing_to_mix() -> None:
    with pytest.raises(UsageError, match="mixup needs the cached features of a whole set"):
        load_config(TrainConfig, None, ["mixup=0.3", "stream=x"])
