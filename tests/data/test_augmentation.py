"""Augmentation: against Pillow and torchvision, by hand, and with choices that the generator alone decides."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from chimera_cli.data.augmentation import (
    Augmentation,
    augment,
    augment_each,
    augment_together,
    colour_maps,
    crop_boxes,
    normalise,
    resize,
    to_float,
)

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)


def smooth(side: int, batch: int = 1) -> torch.Tensor:
    """Return (batch, side, side, 3) uint8: red grows to the right, green downwards, blue is a soft blob."""
    line = np.linspace(0, 255, side)
    across, down = np.meshgrid(line, line)
    blob = 255 * np.exp(-((across - 128) ** 2 + (down - 128) ** 2) / 3000)
    return torch.from_numpy(np.stack([across, down, blob], -1).round().astype(np.uint8)).repeat(batch, 1, 1, 1)


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    """Images (24, 96, 96, 3) of sharp rectangles over a slope, with some noise: harder to scale than flat colours."""
    random = np.random.default_rng(0)
    images = np.repeat(smooth(96).numpy(), 24, axis=0).astype(np.int64)
    for image in images:
        for top, left in random.integers(0, 80, (6, 2)):
            image[top : top + 30, left : left + 16] = random.integers(0, 256, 3)
    images += random.integers(-10, 11, images.shape)
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


def levels(images: torch.Tensor, how: Augmentation) -> torch.Tensor:
    """Return augmented images as grey levels 0 to 255 (batch, S, S, 3)."""
    return (images.permute(0, 2, 3, 1) * torch.tensor(how.std) + torch.tensor(how.mean)) * 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- whole images ---------------------------------------------------------------------------------------------------


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


def test_with_nothing_asked_for_pixels_are_normalised_alone(scenes: torch.Tensor) -> None:
    how = Augmentation(96, mean=(0.5, 0.4, 0.0), std=(0.5, 0.25, 1.0))
    wanted = normalise(to_float(scenes), how.mean, how.std)
    assert torch.allclose(augment(scenes, how, seeded(), CPU), wanted, atol=1e-6)
    assert torch.allclose(augment(scenes.numpy(), how, seeded(), CPU), wanted, atol=1e-6)
    assert torch.allclose(augment_together(scenes, how, *whole(scenes), None), wanted, atol=1e-5)


def whole(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boxes and flips that change nothing."""
    height, width = pixels.shape[1:3]
    return torch.tensor([[0, 0, height, width]]).repeat(len(pixels), 1), torch.zeros(len(pixels), dtype=torch.bool)


# ---- crops and flips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "scale"), [(224, 224, 0.9), (300, 200, 0.3), (97, 333, 0.95)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: float) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    n = 2500
    boxes = crop_boxes(torch.rand((22, n), generator=seeded()), Augmentation(64, scale), height, width)
    assert boxes.dtype == torch.int64
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [transforms.RandomResizedCrop.get_params(image, (scale, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    a, b = boxes.double(), torch.tensor(theirs).double()
    error = ((a.var(0) + b.var(0)) / n).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() <= 4 * error).all()
    assert torch.allclose(a.std(0), b.std(0), rtol=0.07)
    top, left, tall, wide = boxes.unbind(1)
    assert (torch.stack((top, left)) >= 0).all()
    assert (tall >= 1).all() and (wide >= 1).all()  # noqa: PT018
    assert (top + tall).max() <= height
    assert (left + wide).max() <= width


def test_boxes_of_one_pixel_stay_inside() -> None:
    boxes = crop_boxes(torch.rand((22, 50), generator=seeded()), Augmentation(8, 0.5), 1, 1)
    assert boxes.tolist() == [[0, 0, 1, 1]] * 50
    # Draws of 0 and just below 1 are the corners.
    low, high = torch.zeros((22, 1)), torch.full((22, 1), 1 - 2**-24)
    for draws in (low, high):
        box = crop_boxes(draws, Augmentation(8, 0.25, ratio=(1, 1)), 40, 40)[0].tolist()
        assert box in ([0, 0, 20, 20], [0, 0, 40, 40])


@pytest.mark.parametrize(("size", "scale"), [(96, 0.9), (64, 0.3), (131, 0.08), (40, 1.0)])
def test_both_ways_agree_with_pillow(scenes: torch.Tensor, size: int, scale: float) -> None:
    how = Augmentation(size, scale, flip=True)
    draws = torch.rand((22, len(scenes)), generator=seeded(1))
    boxes, flips = crop_boxes(draws, how, 96, 96), torch.arange(len(scenes)) % 3 == 0
    each = augment_each(scenes, how, boxes, flips, None, 2)
    together = augment_together(scenes, how, boxes, flips, None)
    assert each.shape == together.shape == (24, 3, size, size)
    for images in (each, together):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == torch.float32
    wanted = torch.stack([pillow(scenes[k], boxes[k].tolist(), bool(flips[k]), size) for k in range(len(scenes))])
    # Pillow rounds to whole levels, and so do the kernels on the CPU; the matrices do not.
    assert (levels(each, how) - wanted).abs().mean() < 0.3
    assert (levels(together, how) - wanted).abs().mean() < 0.4
    assert (levels(each, how) - levels(together, how)).abs().mean() < 0.4


def pillow(image: torch.Tensor, box: list[int], mirrored: bool, size: int) -> torch.Tensor:
    top, left, tall, wide = box
    part = Image.fromarray(image.numpy()).crop((left, top, left + wide, top + tall))
    scaled = part.resize((size, size), Image.Resampling.BICUBIC)
    flipped = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else scaled
    return torch.from_numpy(np.array(flipped)).float()


def test_images_need_not_be_square() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 40, 70, 3), dtype=np.uint8))
    how = Augmentation(32, 0.5, flip=True)
    draws = torch.rand((22, 4), generator=seeded())
    boxes, flips = crop_boxes(draws, how, 40, 70), torch.tensor([True, False, True, False])
    a, b = augment_each(pixels, how, boxes, flips, None, 1), augment_together(pixels, how, boxes, flips, None)
    assert (levels(a, how) - levels(b, how)).abs().mean() < 0.4
    assert augment(pixels, Augmentation(32), seeded(), CPU).shape == (4, 3, 32, 32)


def test_flips_are_whole_and_only_where_allowed() -> None:
    pixels = smooth(16, 400)
    allowed = torch.arange(400) % 2 == 0
    plain = augment(pixels, Augmentation(16), seeded(), CPU)
    some = augment(pixels, Augmentation(16, flip=True), seeded(), CPU, allowed)
    mirrored = (some == plain.flip(-1)).flatten(1).all(1)
    kept = (some == plain).flatten(1).all(1)
    assert torch.equal(mirrored, ~kept)
    assert not mirrored[~allowed].any()
    assert 70 < int(mirrored.sum()) < 130
    free = augment(pixels, Augmentation(16, flip=True), seeded(), CPU)
    assert 160 < int((free == plain.flip(-1)).flatten(1).all(1).sum()) < 240


# ---- choices --------------------------------------------------------------------------------------------------------


def test_the_generator_decides_and_a_setting_moves_no_other_choice(scenes: torch.Tensor) -> None:
    how = Augmentation(48, 0.4)
    first, again, other = (augment(scenes, how, seeded(seed), CPU) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    flipping = augment(scenes, Augmentation(48, 0.4, flip=True), seeded(1), CPU)
    same = (flipping == first).flatten(1).all(1)
    # Flipped before or after scaling, the kernel may round one level differently.
    turned = (flipping.flip(-1) - first).abs().flatten(1).amax(1) * 127.5 < 1.5
    assert (same | turned).all()
    assert 0 < int(turned.sum()) < len(scenes)


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_threads_and_buffers_change_nothing(scenes: torch.Tensor, jitter: float) -> None:
    how = Augmentation(48, 0.4, flip=True, colour_jitter=jitter)
    wanted = augment(scenes, how, seeded(), CPU, threads=1)
    out = torch.empty_like(wanted)
    for threads in (2, 5):
        got = augment(scenes, how, seeded(), CPU, threads=threads, out=out.fill_(torch.nan))
        assert torch.equal(got, wanted)
        assert got.data_ptr() == out.data_ptr()
    with torch.inference_mode():
        assert torch.equal(augment(scenes, how, seeded(), CPU), wanted)
    for wrong in (out[:3], out.double(), out.contiguous()):
        with pytest.raises(ValueError, match="channels last"):
            augment(scenes, how, seeded(), CPU, out=wrong)


def test_processes_share_a_batch(scenes: torch.Tensor) -> None:
    how = Augmentation(48, 0.4, flip=True, colour_jitter=0.2)
    whole_batch = augment(scenes, how, seeded(), CPU)
    for rank in range(3):
        part = slice(rank, None, 3)
        share = augment(scenes[part], how, seeded(), CPU, share=(len(scenes), part))
        assert torch.equal(share, whole_batch[part])
    with pytest.raises(ValueError, match="not the share"):
        augment(scenes[:5], how, seeded(), CPU, share=(len(scenes), slice(3)))


def test_an_empty_batch_is_no_error(scenes: torch.Tensor) -> None:
    assert augment(scenes[:0], Augmentation(48, 0.4, flip=True), seeded(), CPU).shape == (0, 3, 48, 48)


def test_the_threads_leave_torchs_own_number_alone(scenes: torch.Tensor) -> None:
    before = torch.get_num_threads()
    augment(scenes, Augmentation(48, 0.4), seeded(), CPU, threads=3)
    seen: list[int] = []
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert [torch.get_num_threads(), *seen] == [before, before]


def test_shares_outside_their_range_are_refused() -> None:
    for wrong in ({"crop_scale": 0.0}, {"crop_scale": 1.1}, {"colour_jitter": 1.0}, {"colour_jitter": -0.1}):
        with pytest.raises(ValueError, match="crop_scale"):
            Augmentation(32, **wrong)


# ---- colours --------------------------------------------------------------------------------------------------------


def test_colours_by_hand() -> None:
    how = Augmentation(2, colour_jitter=0.5, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = torch.tensor([[[[100, 0, 0], [0, 0, 0]], [[0, 0, 0], [100, 100, 100]]]], dtype=torch.uint8)
    boxes, flips = whole(pixels)
    grey = torch.tensor([29.9, 0.0, 0.0, 100.0])

    def shown(*factors: float) -> torch.Tensor:
        given = torch.tensor([factors], dtype=torch.float32).T
        each, together = (
            levels(images, how).view(4, 3)
            for images in (
                augment_each(pixels, how, boxes, flips, given, 1),
                augment_together(pixels, how, boxes, flips, given),
            )
        )
        assert torch.allclose(each, together, atol=1e-3)
        return each

    flat = pixels.view(4, 3).float()
    assert torch.allclose(shown(1, 1, 1), flat, atol=1e-3)
    assert torch.allclose(shown(1.5, 1, 1), 1.5 * flat, atol=1e-3)
    assert torch.allclose(shown(1, 0.5, 1), 0.5 * flat + 0.5 * grey.mean(), atol=1e-3)
    assert torch.allclose(shown(1, 1, 0.5), 0.5 * flat + 0.5 * grey[:, None], atol=1e-3)
    assert shown(3, 1, 1).max() == pytest.approx(255, abs=1e-3)
    assert shown(1, 1.5, 1).min() == pytest.approx(0, abs=1e-3)


def test_colours_change_as_torchvisions(scenes: torch.Tensor) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    how = Augmentation(96, colour_jitter=0.1, mean=HALF, std=HALF)
    factors = torch.tensor([[0.9, 1.1, 0.95]]).T.repeat(1, len(scenes))
    # Muted, so that nothing is cut to black or white: torchvision does that after each step, here it is done once.
    muted = scenes // 2 + 64
    got = levels(augment_each(muted, how, *whole(muted), factors, 2), how)
    wanted = to_float(muted)
    for step, factor in zip(("brightness", "contrast", "saturation"), (0.9, 1.1, 0.95), strict=True):
        wanted = getattr(functional, f"adjust_{step}")(wanted, factor)
    assert (got - wanted.permute(0, 2, 3, 1) * 255).abs().max() < 0.05


@pytest.mark.parametrize("size", [96, 37])
def test_jitter_is_the_same_both_ways_and_different_by_image(scenes: torch.Tensor, size: int) -> None:
    how = Augmentation(size, 0.5, flip=True, colour_jitter=0.4, mean=(0.48, 0.45, 0.4), std=(0.27, 0.26, 0.28))
    draws = torch.rand((22, len(scenes)), generator=seeded())
    boxes, flips = crop_boxes(draws, how, 96, 96), torch.arange(len(scenes)) % 2 == 0
    factors = 1 + 0.4 * (2 * torch.rand((3, len(scenes)), generator=seeded()) - 1)
    a = augment_each(scenes, how, boxes, flips, factors, 2)
    b = augment_together(scenes, how, boxes, flips, factors)
    assert (levels(a, how) - levels(b, how)).abs().mean() < 0.4
    assert levels(a, how).min() > -1e-3
    assert levels(a, how).max() < 255.001
    plain = augment(scenes, Augmentation(size, 0.5), seeded(), CPU)
    jittered = augment(scenes, Augmentation(size, 0.5, colour_jitter=0.4), seeded(), CPU)
    brightness = jittered.mean(dim=(1, 2, 3)) - plain.mean(dim=(1, 2, 3))
    assert brightness.std() > 0.05


def test_no_jitter_is_no_change_of_colour() -> None:
    how = Augmentation(8)
    matrices, gains = colour_maps(how, torch.ones(3, 2))
    assert torch.allclose(matrices, torch.eye(3).expand(2, 3, 3) / 127.5)
    assert not gains.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_what_the_cpu_sees(scenes: torch.Tensor) -> None:
    how = Augmentation(64, 0.3, flip=True, colour_jitter=0.2)
    allowed = torch.arange(len(scenes)) % 2 == 0
    on_cpu = augment(scenes, how, seeded(), CPU, allowed)
    on_gpu = augment(scenes.numpy(), how, seeded(), torch.device("cuda"), allowed)
    assert on_gpu.is_cuda
    assert (levels(on_cpu, how) - levels(on_gpu.cpu(), how)).abs().mean() < 0.5
