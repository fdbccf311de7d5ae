"""Scaling: the exact part of a photo, as Pillow would scale it, and no more memory for strips than for squares."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from chimera_cli.data.pack import Fit
from chimera_cli.data.resize import Plan, begins_within, finish, make_plan, resize, shrink, shrinks, work_alone

FITS: tuple[Fit, ...] = ("crop", "squash", "pad")


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    """Return smooth noise with fine detail on top: what blurred edges and shifts show on."""
    generator = np.random.default_rng([width, height])
    coarse = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    fine = np.asarray(coarse) * 0.8 + generator.normal(25, 12, (height, width, 3))
    pixels = fine.clip(0, 255).astype(np.uint8)
    return pixels if channels == 3 else np.dstack([pixels, np.zeros((height, width, 1), dtype=np.uint8)])


def by_pillow(image: Image.Image, size: int, fit: Fit) -> np.ndarray:
    """Return the square that Pillow's own operations make of an image."""
    if fit == "squash":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    make = ImageOps.fit if fit == "crop" else ImageOps.pad
    return np.asarray(make(image, (size, size), Image.Resampling.BICUBIC))


def test_plans_by_hand() -> None:
    assert make_plan(500, 375, 224, "crop") == Plan((62.5, 0, 437.5, 375), (224, 224))
    assert make_plan(375, 500, 224, "crop") == Plan((0, 62.5, 375, 437.5), (224, 224))
    assert make_plan(500, 375, 224, "squash") == Plan((0, 0, 500, 375), (224, 224))
    assert make_plan(500, 375, 224, "pad") == Plan((0, 0, 500, 375), (224, 168))
    assert make_plan(1, 10_000, 224, "pad") == Plan((0, 0, 1, 10_000), (1, 224))
    assert make_plan(500, 375, 224, "crop").scaled(3 / 8).box == (23.4375, 0, 164.0625, 140.625)
    assert make_plan(500, 375, 100, "squash").reduction == (5, 3.75)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("sides", [(61, 44), (44, 61), (50, 50), (20, 13), (7, 90), (90, 7), (1, 1)])
def test_pillow_agrees_to_the_last_bit(sides: tuple[int, int], fit: Fit) -> None:
    image = Image.fromarray(noise(*sides))
    plan = make_plan(*sides, 24, fit)
    assert (finish(resize(image, plan), 1, 24) == by_pillow(image, 24, fit)).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("sides", [(500, 375), (375, 500), (400, 300), (300, 300), (227, 400)])
def test_bytes_are_shrunk_as_pillow_does(sides: tuple[int, int], fit: Fit) -> None:
    plan = make_plan(*sides, 96, fit)
    assert shrinks(plan)
    pixels = noise(*sides, channels=4 if begins_within(plan) else 3)
    expected = by_pillow(Image.fromarray(pixels[..., :3]), 96, fit).astype(int)
    result = finish(Image.fromarray(shrink(pixels, plan)), 1, 96)
    assert np.abs(result - expected).mean() < 0.5


@pytest.mark.parametrize("eighths", [1, 2, 4])
def test_a_box_in_fractions_of_a_pixel_is_taken_exactly(eighths: int) -> None:
    pixels = noise(300, 203, channels=4)
    # What a photo decoded at n/8 has: its last row and column are partly void, its box begins anywhere.
    sides = (300 * 8 // eighths - 1, 203 * 8 // eighths - 4 // eighths)
    plan = make_plan(*sides, 64, "crop").scaled(eighths / 8)
    expected = np.asarray(resize(Image.fromarray(pixels[..., :3]), plan)).astype(int)
    assert np.abs(shrink(pixels, plan) - expected).mean() < 0.6
    shifted = Plan((plan.box[0] + 1, plan.box[1], plan.box[2] + 1, plan.box[3]), plan.inner)
    assert np.abs(np.asarray(resize(Image.fromarray(pixels[..., :3]), shifted)) - expected).mean() > 2


def test_only_what_gets_smaller_is_shrunk() -> None:
    assert not shrinks(make_plan(224, 224, 224, "crop"))
    assert not shrinks(make_plan(100, 100, 224, "crop"))
    assert not shrinks(make_plan(100, 1000, 224, "squash"))
    assert shrinks(make_plan(226, 300, 224, "crop"))
    # Repeated pixels would blur: half a pixel off and hardly smaller.
    assert not shrinks(make_plan(225, 300, 224, "crop"))


@pytest.mark.parametrize("sides", [(1, 60_000), (60_000, 1), (2, 50_000)])
def test_strips_take_no_memory_on_the_way(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: object, **named: object) -> Image.Image:
        box = named["box"]
        assert isinstance(box, tuple)
        # Pillow's first pass has the new width and the rows of the box.
        made.append(size[0] * round(box[3] - box[1]))
        return original(self, size, *args, **named)

    monkeypatch.setattr(Image.Image, "resize", watched)
    resized = resize(Image.new("RGB", sides, (9, 200, 9)), make_plan(*sides, 64, "squash"))
    assert resized.getextrema() == ((9, 9), (200, 200), (9, 9))
    assert max(made) <= 2 * 60_000


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_after_scaling_is_turning_before(orientation: int, fit: Fit) -> None:
    upright = Image.fromarray(noise(61, 44))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.info["exif"] = exif.tobytes()
    expected = by_pillow(ImageOps.exif_transpose(stored), 24, fit)
    assert (np.asarray(ImageOps.exif_transpose(stored)) == np.asarray(upright)).all()
    result = finish(resize(stored, make_plan(*stored.size, 24, fit)), orientation, 24)
    assert np.abs(result.astype(int) - expected).max() <= 2


def test_threads_that_work_alone_change_nothing_for_others() -> None:
    import torch

    plan, pixels = make_plan(100, 100, 24, "crop"), noise(100, 100)

    def threads_of_torch(alone: bool) -> int:
        if alone:
            work_alone()
        assert shrink(pixels, plan).shape == (24, 24, 3)
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(1) as other:
            assert alone.submit(threads_of_torch, True).result() == 1
            assert other.submit(threads_of_torch, False).result() == 3
            assert alone.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
