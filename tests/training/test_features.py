"""Features of splits: every row at its place, whatever is sorted, shared out or prepared ahead on the way."""

import numpy as np
import pytest
import torch
from torch import Tensor

from chimera_cli.data.augmentation import Augmentation
from chimera_cli.events import Event, Progress
from chimera_cli.models.image_tower import ImageTower, build_image_tower
from chimera_cli.models.text_tower import build_text_tower
from chimera_cli.models.tokens import Tokens, TokenTable
from chimera_cli.training.features import (
    Views,
    _batches_by_length,
    caption_features,
    caption_states,
    image_features,
    preprocess,
)

CPU = torch.device("cpu")
SIZE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (150, SIZE, SIZE, 3), dtype=np.uint8)
# Not in order, one of them twice, and more than two batches.
INDICES = np.concatenate([np.arange(149, -1, -1), [7]])


@pytest.fixture(scope="module")
def tower() -> ImageTower:
    torch.manual_seed(0)
    return build_image_tower("tiny").eval()


def means(pixels: Tensor) -> Tensor:
    """What a tower could make of images: the means of left and right halves, (batch, 2)."""
    half = pixels.shape[-1] // 2
    return torch.stack([pixels[..., :half].mean(dim=(1, 2, 3)), pixels[..., half:].mean(dim=(1, 2, 3))], dim=1)


PLAIN = Views()


def features(encode, tower: ImageTower, views: Views = PLAIN, **settings) -> np.ndarray:
    return image_features(encode, tower, IMAGES, INDICES, image_size=SIZE, device=CPU, views=views, **settings)


def test_each_image_has_its_row_and_each_view_its_column(tower: ImageTower) -> None:
    values = features(tower, tower, Views(mirrored=True))
    assert values.shape == (151, 2, tower.width)
    assert values.dtype == np.float32
    with torch.inference_mode():
        for row in (0, 63, 64, 150):
            plain = preprocess(torch.from_numpy(IMAGES[INDICES[row : row + 1]]), tower, SIZE)
            assert np.allclose(values[row, 0], tower(plain)[0], atol=1e-5)
            assert np.allclose(values[row, 1], tower(plain.flip(-1))[0], atol=1e-5)
    assert np.array_equal(values[150], values[142])


def test_a_mirrored_view_has_its_halves_changed_over(tower: ImageTower) -> None:
    values = features(means, tower, Views(mirrored=True))
    assert np.allclose(values[:, 1], values[:, 0, ::-1], atol=1e-6)


def test_random_views_are_the_same_again_and_differ_among_themselves(tower: ImageTower) -> None:
    how = Augmentation(SIZE, crop_scale=0.3, flip=True)
    first = features(means, tower, Views(mirrored=True, crops=2, how=how))
    assert first.shape == (151, 4, 2)
    assert np.array_equal(first, features(means, tower, Views(mirrored=True, crops=2, how=how)))
    # More views leave those that were there as they are.
    assert np.array_equal(first, features(means, tower, Views(mirrored=True, crops=3, how=how))[:, :4])
    assert np.array_equal(first[:, :2], features(means, tower, Views(mirrored=True)))
    assert not np.isclose(first[:, 2], first[:, 3]).all(axis=1).any()


def test_random_views_mirror_only_what_may_be_mirrored(tower: ImageTower) -> None:
    how = Augmentation(SIZE, flip=True, colour_jitter=0.01)
    may_flip = torch.arange(151) < 80
    values = features(means, tower, Views(mirrored=True, crops=1, how=how, may_flip=may_flip))
    # Which half is the brighter one stays what it is under a change of brightness.
    leans = np.sign(values[:, :, 0] - values[:, :, 1])
    is_plain = leans[:, 2] == leans[:, 0]
    assert is_plain[80:].all()
    assert 20 < is_plain[:80].sum() < 60


def test_progress_counts_images_and_an_error_comes_through(tower: ImageTower) -> None:
    seen: list[Progress] = []

    def listen(event: Event) -> None:
        assert isinstance(event, Progress)
        seen.append(event)

    features(means, tower, Views(mirrored=True), listener=listen, stage="dev images")
    assert [(event.done, event.total) for event in seen][-1] == (151, 151)
    assert [event.done for event in seen] == sorted(event.done for event in seen)

    def broken(_pixels: Tensor) -> Tensor:
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        features(broken, tower)


def test_features_are_written_into_what_is_given_for_them(tower: ImageTower) -> None:
    given: list[np.ndarray] = []

    def allocate(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        given.append(np.zeros(shape, dtype))
        return given[-1]

    values = features(means, tower, allocate=allocate)
    assert len(given) == 1
    assert values is given[0]


def table(lengths: list[int]) -> TokenTable:
    """Captions whose tokens are numbered through."""
    return TokenTable(np.arange(sum(lengths), dtype=np.int32), np.cumsum([0, *lengths]), 0)


@pytest.mark.parametrize("mixed", [False, True])
def test_every_caption_is_in_one_batch(mixed: bool) -> None:
    lengths = np.random.default_rng(1).integers(3, 9, 100)
    batches = _batches_by_length(lengths, 7, mixed)
    assert sorted(np.concatenate(batches)) == list(range(100))
    assert max(len(batch) for batch in batches) == 7
    spreads = [np.ptp(lengths[batch]) for batch in batches]
    assert max(spreads) == (1 if mixed else 0)
    assert [lengths[batch].max() for batch in batches] == sorted((lengths[b].max() for b in batches), reverse=True)


def test_captions_come_back_in_their_order() -> None:
    captions = table([5, 2, 7, 2, 5, 1] * 20)

    def first_and_last(tokens: Tokens) -> Tensor:
        assert tokens["attention_mask"].all(), "a batch of one length has no padding"
        return torch.stack([tokens["input_ids"][:, 0], tokens["input_ids"][:, -1]], dim=1).float()

    values = caption_features(first_and_last, captions, device=CPU)
    assert np.array_equal(values[:, 0], captions.starts[:-1])
    assert np.array_equal(values[:, 1], captions.starts[1:] - 1)


def test_features_of_captions_equal_those_of_one_at_a_time() -> None:
    torch.manual_seed(0)
    tower = build_text_tower("tiny").eval()
    texts = [" ".join(["word"] * (1 + row * 7 % 13)) + f" {row}" for row in range(70)]
    values = caption_features(tower, tower.token_table(texts, 12), device=CPU)
    with torch.inference_mode():
        alone = torch.cat([tower(tower.tokenise([text], 12)) for text in texts])
    assert np.allclose(values, alone, atol=1e-5)


def test_states_lie_end_to_end_in_the_order_of_the_table() -> None:
    captions = table([5, 2, 7, 2, 5, 1] * 20)

    def numbered(tokens: Tokens) -> Tensor:
        return torch.stack([tokens["input_ids"], -tokens["input_ids"]], dim=2).float()

    states = caption_states(numbered, captions, device=CPU)
    assert states.dtype == np.float16
    assert np.array_equal(states[:, 0], captions.ids)
    assert np.array_equal(states[:, 1], -captions.ids)


def test_nothing_to_encode_is_an_error(tower: ImageTower) -> None:
    with pytest.raises(ValueError, match="no images"):
        image_features(means, tower, IMAGES, INDICES[:0], image_size=SIZE, device=CPU)
    with pytest.raises(ValueError, match="no captions"):
        caption_features(lambda _tokens: torch.zeros(1), table([]), device=CPU)
