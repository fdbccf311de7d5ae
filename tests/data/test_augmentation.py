"""Augmentation: against Pillow, on hand-made images, and with choices that the generator alone decides."""

import numpy as np
import torch
from PIL import Image

from chimera_cli.data.augmentation import horizontal_flip, normalise, random_resized_crop, resize, to_float


def smooth(side: int, batch: int = 1) -> torch.Tensor:
    """Return (batch, side, side, 3) uint8: red grows to the right, green downwards, blue is a soft blob."""
    line = np.linspace(0, 255, side)
    across, down = np.meshgrid(line, line)
    blob = 255 * np.exp(-((across - 128) ** 2 + (down - 128) ** 2) / 3000)
    return torch.from_numpy(np.stack([across, down, blob], -1).round().astype(np.uint8)).repeat(batch, 1, 1, 1)


def test_to_float_and_normalise() -> None:
    pixels = torch.zeros((2, 4, 5, 3), dtype=torch.uint8)
    pixels[1, 2, 3] = torch.tensor([255, 51, 0], dtype=torch.uint8)
    floats = to_float(pixels)
    assert floats.shape == (2, 3, 4, 5)
    assert floats.dtype == torch.float32
    assert floats[1, :, 2, 3].tolist() == [1.0, 0.20000000298023224, 0.0]
    assert not pixels[0].any()
    scaled = normalise(floats, (0.5, 0.5, 0.0), (0.5, 0.25, 1.0))
    assert torch.allclose(scaled[1, :, 2, 3], torch.tensor([1.0, -1.2, 0.0]))


def test_resize_agrees_with_pillow() -> None:
    pixels = smooth(112)
    wanted = np.asarray(Image.fromarray(pixels[0].numpy()).resize((48, 48), Image.Resampling.BICUBIC))
    got = resize(to_float(pixels), 48)[0].permute(1, 2, 0).mul(255)
    assert np.abs(got.numpy() - wanted).max() < 2
    assert resize(to_float(pixels), 112).shape == (1, 3, 112, 112)


def test_resize_stays_between_0_and_1() -> None:
    edges = torch.zeros((1, 3, 16, 16))
    edges[..., 8:] = 1
    scaled = resize(edges, 40)
    assert scaled.min() >= 0
    assert scaled.max() <= 1


def test_the_whole_area_is_the_image_itself() -> None:
    images = to_float(smooth(64, 3))
    same = random_resized_crop(images, 64, torch.Generator().manual_seed(0), scale=(1, 1), ratio=(1, 1))
    assert torch.allclose(same, images, atol=1e-5)


def test_crops_cover_the_share_of_the_area_and_stay_inside() -> None:
    images = to_float(smooth(64, 200))
    crops = random_resized_crop(images, 32, torch.Generator().manual_seed(0), scale=(0.25, 0.25), ratio=(1, 1))
    assert crops.shape == (200, 3, 32, 32)
    # A quarter of the area is half of the side: red grows by half of its range from the left to the right.
    red = crops[:, 0, 16]
    assert torch.allclose(red[:, -1] - red[:, 0], torch.tensor(0.5 * 31 / 32 * 64 / 63), atol=0.02)
    left = red[:, 0]
    assert left.min() < 0.05
    assert left.max() > 0.45
    assert left.max() < 0.53


def test_the_generator_decides_the_crops() -> None:
    images = to_float(smooth(32, 4))
    first, again, other = (
        random_resized_crop(images, 32, torch.Generator().manual_seed(seed), scale=(0.5, 0.9)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_flips_are_whole_and_only_where_allowed() -> None:
    images = to_float(smooth(16, 400))
    allowed = torch.arange(400) % 2 == 0
    flipped = horizontal_flip(images, torch.Generator().manual_seed(0), allowed)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~kept)
    assert not mirrored[~allowed].any()
    assert 70 < int(mirrored.sum()) < 130
    assert torch.equal(horizontal_flip(images, torch.Generator(), probability=1.0), images.flip(-1))
