"""What the trainer sees of an image depends on the seed and on the batch's place alone."""

import numpy as np
import pytest
import torch

from chimera_cli.data.augmentation import Augmentation, augment
from chimera_cli.training.augment import augmented_pixels, noisy_rows
from chimera_cli.training.batches import Place

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3), dtype=np.uint8)


def test_noise_has_the_asked_share_of_each_features_deviation() -> None:
    views = torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1])
    place = Place(0, 0, 4000)
    loud, quiet = noisy_rows(views, 1, noise=0.5), noisy_rows(views, 1, noise=0.0)
    positions = np.arange(4000)
    spread = (loud(positions, place) - quiet(positions, place)).std(dim=0) / views.flatten(0, 1).std(dim=0)
    assert spread.tolist() == pytest.approx([0.5, 0.5, 0.5], rel=0.05)


def test_views_are_drawn_at_random_but_only_the_first_where_a_side_is_named() -> None:
    views = torch.arange(2.0).repeat(400, 1).unsqueeze(-1)
    allowed = torch.arange(400) % 2 == 0
    shown = noisy_rows(views, 0, 0.0, allowed)(np.arange(400), Place(0, 0, 400))[:, 0]
    assert not shown[~allowed].any()
    assert 70 < int(shown.sum()) < 130


def test_seed_epoch_number_and_stream_all_matter() -> None:
    views = torch.randn(50, 1, 4, generator=torch.Generator().manual_seed(0))
    positions = np.arange(50)

    def drawn(seed: int, epoch: int, number: int, stream: str = "images") -> torch.Tensor:
        return noisy_rows(views, seed, 1.0, stream=stream)(positions, Place(epoch, number, 50))  # type: ignore[arg-type]

    assert torch.equal(drawn(3, 1, 2), drawn(3, 1, 2))
    for other in (drawn(4, 1, 2), drawn(3, 2, 2), drawn(3, 1, 3), drawn(3, 2, 1), drawn(3, 1, 2, "texts")):
        assert not torch.equal(drawn(3, 1, 2), other)


def test_pixels_are_those_of_the_positions_augmented() -> None:
    how = Augmentation(16, 0.5, flip=True, colour_jitter=0.1)
    indices = np.arange(39, -1, -2)
    allowed = torch.arange(20) < 10
    pixels = augmented_pixels(IMAGES, indices, how, 5, CPU, allowed)
    # Larger and smaller batches in turn go through the same buffer.
    for number, positions in enumerate((np.array([3, 0, 7]), np.array([19, 1, 2, 3, 4]), np.array([11]))):
        place = Place(2, number, len(positions))
        wanted = augment(
            IMAGES[indices[positions]], how, place.generator(5, "images"), CPU, allowed[torch.from_numpy(positions)]
        )
        assert torch.equal(pixels(positions, place), wanted)


def test_a_batch_once_given_is_never_overwritten() -> None:
    pixels = augmented_pixels(IMAGES, np.arange(40), Augmentation(16, 0.5), 0, CPU)
    first = pixels(np.arange(8), Place(0, 0, 8))
    kept = first.clone()
    pixels(np.arange(8, 16), Place(0, 1, 8))
    assert torch.equal(first, kept)
