"""Decoding: the right part of a photo, upright, in RGB, and damaged files told from whole ones."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from chimera_cli.data.images import decode, decode_all
from chimera_cli.data.pack import Picture, Unreadable

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def thirds() -> Image.Image:
    """Return 30 x 10 pixels: a red, a green and a blue square side by side."""
    image = Image.new("RGB", (30, 10), GREEN)
    image.paste(RED, (0, 0, 10, 10))
    image.paste(BLUE, (20, 0, 30, 10))
    return image


def decoded(content: bytes, fit: str = "crop", size: int = 10) -> Picture:
    result = decode(content, size, fit)  # type: ignore[arg-type]
    assert isinstance(result, Picture)
    assert result.pixels.shape == (size, size, 3)
    assert result.pixels.dtype == np.uint8
    return result


def test_crop_takes_the_centre() -> None:
    result = decoded(encoded(thirds()))
    assert (result.pixels == GREEN).all()
    assert (result.width, result.height) == (30, 10)


def test_squash_keeps_everything() -> None:
    pixels = decoded(encoded(thirds()), "squash").pixels
    assert [pixels[5, x].argmax() for x in (1, 5, 8)] == [0, 1, 2]


def test_pad_adds_black_above_and_below() -> None:
    pixels = decoded(encoded(thirds()), "pad", 30).pixels
    assert not pixels[:10].any()
    assert not pixels[20:].any()
    assert (pixels[15, 2] == RED).all()
    assert (pixels[15, 28] == BLUE).all()


def test_the_orientation_of_the_camera_is_undone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned = encoded(thirds().rotate(90, expand=True), "JPEG", exif=exif, quality=100, subsampling=0)
    result = decoded(turned, "squash")
    assert (result.width, result.height) == (30, 10)
    assert [result.pixels[5, x].argmax() for x in (1, 5, 8)] == [0, 1, 2]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    decoded(encoded(thirds().convert("RGB").convert(mode), kind))


def test_a_palette_with_transparency_becomes_rgb() -> None:
    assert (decoded(encoded(thirds().quantize(4), transparency=b"\x80\xff\xff\xff")).pixels[5, 5] == GREEN).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"hello", "not an image"), (encoded(thirds().resize((300, 100)), "JPEG")[:-200], "truncated")],
)
def test_damage_is_told(content: bytes, reason: str) -> None:
    result = decode(content, 10, "crop")
    assert isinstance(result, Unreadable)
    assert reason in result.reason


def test_many_are_decoded_in_order_and_damage_stands_in_its_place() -> None:
    def absent() -> bytes:
        raise FileNotFoundError(2, "No such file or directory")

    def shade(value: int) -> bytes:
        return encoded(Image.new("RGB", (4, 4), (value, value, value)))

    reads = [lambda value=value: shade(value) for value in range(100)]
    reads[50] = absent
    results = list(decode_all(reads, 4, "crop"))
    assert results[50] == Unreadable("No such file or directory")
    values = [int(result.pixels[0, 0, 0]) for result in results if isinstance(result, Picture)]
    assert values == [value for value in range(100) if value != 50]


def test_a_bomb_is_an_unreadable_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # 300 pixels warn, more than 400 would raise
    (result,) = decode_all([lambda: encoded(thirds())], 4, "crop")
    assert isinstance(result, Unreadable)


def test_stopping_early_ends_the_threads() -> None:
    stream = decode_all([lambda: encoded(thirds())] * 100, 4, "crop")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
