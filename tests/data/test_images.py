"""Decoding: the right part of a photo, upright, in RGB, as Pillow would show it, and damaged files told from whole."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps

from chimera_cli.data import images
from chimera_cli.data.images import MAX_PIXELS, decode, decode_all
from chimera_cli.data.pack import Fit, Picture, Unreadable
from chimera_cli.data.resize import make_plan

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


def photo(width: int, height: int, detail: float = 1.0) -> Image.Image:
    """Return a picture with the statistics of photos: amplitudes fall as 1/frequency, and things have edges.

    `detail` 0 leaves the smooth part alone; at 3 it is rough as gravel all over.
    """
    generator = np.random.default_rng([width, height])
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    steep = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((3, height, width))) / frequency**2, s=(height, width))
    rough = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((1, height, width))) / frequency, s=(height, width))
    pixels = 120 + 30 * steep / (steep.std() + 1e-9) + 25 * detail * rough / (rough.std() + 1e-9)
    y, x = np.mgrid[:height, :width]
    for _ in range(6):
        centre = generator.uniform(0, 1, 2) * (height, width)
        inside = np.hypot(y - centre[0], x - centre[1]) < generator.uniform(0.05, 0.3) * min(width, height)
        pixels[:, inside] = generator.uniform(0, 255, (3, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def by_pillow(content: bytes, size: int, fit: Fit) -> np.ndarray:
    """Return what Pillow's own operations make of the fully decoded file."""
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    if fit == "squash":
        return np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    make = ImageOps.fit if fit == "crop" else ImageOps.pad
    return np.asarray(make(upright, (size, size), Image.Resampling.BICUBIC)).astype(int)


def decoded(content: bytes, fit: str = "crop", size: int = 10, **options: Any) -> Picture:
    result = decode(content, size, fit, **options)  # type: ignore[arg-type]
    assert isinstance(result, Picture)
    assert result.pixels.shape == (size, size, 3)
    assert result.pixels.dtype == np.uint8
    return result


def difference(content: bytes, size: int, fit: Fit) -> float:
    """Return the mean difference to Pillow in grey levels."""
    return float(np.abs(decoded(content, fit, size).pixels - by_pillow(content, size, fit)).mean())


# ---- what is seen ---------------------------------------------------------------------------------------------------


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


# ---- JPEGs ----------------------------------------------------------------------------------------------------------

SMOOTH, ROUGH = 0.0, 3.0
WAYS: list[dict[str, Any]] = [
    {"quality": quality, "subsampling": subsampling, "progressive": quality == 85}
    for quality, subsampling in product((30, 85, 98), ("4:4:4", "4:2:2", "4:2:0"))
]


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("detail", [SMOOTH, 1.0, ROUGH])
def test_jpegs_of_all_kinds_look_as_pillow_shows_them(detail: float, fit: Fit) -> None:
    # 500 x 375 is decoded whole, the larger one at half, the largest at a quarter of its size.
    for sides, size, eighths in (((500, 375), 224, 8), ((641, 483), 56, 4), ((701, 900), 40, 2)):
        assert images._eighths(make_plan(*sides, size, "crop")) == eighths
        image = photo(*sides, detail)
        for way in WAYS:
            content = encoded(image, "JPEG", **way)
            result = decoded(content, fit, size)
            assert result.decoder == "simplejpeg"
            assert np.abs(result.pixels - by_pillow(content, size, fit)).mean() < 1.5, (sides, way)


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize(
    "sides", [(1, 1), (2, 1), (7, 9), (17, 16), (33, 1), (31, 47), (225, 224), (1200, 90), (90, 1200), (2000, 17)]
)
def test_odd_tiny_and_wide_jpegs_look_as_pillow_shows_them(sides: tuple[int, int], fit: Fit) -> None:
    content = encoded(photo(*sides), "JPEG", quality=90)
    for size in (24, 100):
        if fit != "pad" or min(sides) * size >= max(sides):  # Pillow's own gives up where a side would vanish
            assert difference(content, size, fit) < 1.5


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)


def dither() -> np.ndarray:
    """Return a ramp from black to white in pixels that are one or the other."""
    ramp = np.linspace(0, 255, 1200)[None].repeat(900, axis=0).astype(np.uint8)
    return np.asarray(Image.fromarray(ramp).convert("1").convert("RGB"))


def halftone() -> np.ndarray:
    """Return the same ramp in dots of six pixels, as newspapers print it."""
    y, x = np.mgrid[:900, :1200]
    dots = 128 + 127 * np.sin(x * np.pi / 3) * np.sin(y * np.pi / 3)
    return np.asarray(Image.fromarray(np.uint8(255) * (np.linspace(0, 255, 1200)[None] > dots)).convert("RGB"))


def page() -> np.ndarray:
    """Return a page of small black letters on white."""
    page = Image.new("RGB", (1200, 900), "white")
    for top in range(4, 900, 14):
        words = "the quick brown fox jumps over the lazy dog " * 6
        ImageDraw.Draw(page).text((4, top), words, fill="black", font=ImageFont.load_default(12))
    return np.asarray(page)


@pytest.mark.parametrize("draw", [noise, dither, halftone, page])
def test_what_is_all_edges_still_looks_as_pillow_shows_it(draw: Callable[[], np.ndarray]) -> None:
    # From decoded whole to at an eighth, both just after the step to fewer eighths and before the next.
    content = encoded(Image.fromarray(draw()), "JPEG", quality=95, subsampling="4:4:4")
    differences = {size: difference(content, size, "crop") for size in (300, 224, 150, 113, 112, 90, 64, 56, 40, 28)}
    assert max(differences.values()) < 2, differences


@pytest.mark.parametrize(
    ("mode", "decoder"), [("RGB", "simplejpeg"), ("L", "simplejpeg"), ("CMYK", "pillow"), ("YCbCr", "simplejpeg")]
)
def test_jpegs_in_all_colour_spaces(mode: str, decoder: str) -> None:
    content = encoded(photo(300, 203).convert(mode), "JPEG", quality=90)
    assert decoded(content).decoder == decoder
    for size in (224, 100, 40):
        assert difference(content, size, "crop") < 1.0


def test_a_jpeg_that_stores_rgb_is_no_ycc() -> None:
    content = encoded(photo(300, 203), "JPEG", quality=90, keep_rgb=True)
    assert decoded(content).decoder == "simplejpeg"
    assert difference(content, 100, "crop") < 1.0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_camera_is_undone(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, sides, size in (("JPEG", (300, 203), 96), ("JPEG", (900, 600), 64), ("JPEG", (60, 40), 96)):
        content = encoded(photo(*sides), kind, exif=exif, quality=90)
        for fit in ("crop", "squash", "pad"):
            assert difference(content, size, fit) < 1.0  # type: ignore[arg-type]
    result = decoded(encoded(thirds(), "JPEG", exif=exif))
    assert (result.width, result.height) == ((30, 10) if orientation < 5 else (10, 30))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_formats_have_an_orientation_too(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    options = {"lossless": True} if kind == "WEBP" else {}
    result = decoded(encoded(thirds().rotate(90, expand=True), kind, exif=exif, **options), "squash")
    assert (result.width, result.height) == (30, 10)
    assert [result.pixels[5, x].argmax() for x in (1, 5, 8)] == [0, 1, 2]


@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"])
def test_damaged_metadata_is_nobodys_business(exif: bytes) -> None:
    (result,) = decode_all([lambda: encoded(thirds(), "JPEG", exif=exif)], 10, "crop")
    assert isinstance(result, Picture)


def test_pillow_alone_gives_what_pillow_gives() -> None:
    content = encoded(photo(300, 203), "JPEG", quality=90)
    result = decoded(content, "crop", 96, decoder="pillow")
    assert result.decoder == "pillow"
    assert (result.pixels == by_pillow(content, 96, "crop")).all()


def test_real_photos_look_as_pillow_shows_them(flickr8k: Path) -> None:
    for path in sorted((flickr8k / "Flicker8k_Dataset").glob("*.jpg"))[:3000:100]:
        content = path.read_bytes()
        assert (decoded(content, size=224).pixels == by_pillow(content, 224, "crop")).all()
        for size in (180, 100, 48, 24):
            assert difference(content, size, "crop") < 1.5


# ---- other images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    result = decoded(encoded(thirds().convert("RGB").convert(mode), kind))
    assert result.decoder == "pillow"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_every_format_is_read(kind: str) -> None:
    assert (np.abs(decoded(encoded(thirds(), kind)).pixels[:, 3:7].astype(int) - GREEN) < 10).all()


def test_a_palette_with_transparency_becomes_rgb() -> None:
    assert (decoded(encoded(thirds().quantize(4), transparency=b"\x80\xff\xff\xff")).pixels[5, 5] == GREEN).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(kind: str) -> None:
    values = np.repeat([0x00FF, 0x8000, 0xFFFF], 10).astype(np.uint16)[None].repeat(10, axis=0)
    pixels = decoded(encoded(Image.fromarray(values), kind), "squash", 30).pixels
    assert [int(pixels[15, x, 0]) for x in (5, 15, 25)] == pytest.approx([0, 128, 255], abs=2)
    netpbm = b"P5 30 10 65535\n" + values.astype(">u2").tobytes()
    assert (decoded(netpbm, "squash", 30).pixels == pixels).all()


def test_pixels_of_unknown_range_are_refused() -> None:
    # The last would be all black if its 32 bits were taken for 16.
    kinds = ((0.5, np.float32), (1_000_000, np.int32), (200, np.int32))
    for values in (np.full((9, 9), value, dtype=kind) for value, kind in kinds):
        result = decode(encoded(Image.fromarray(values), "TIFF"), 8, "crop")
        assert result == Unreadable("32-bit pixels: convert the image to 8 or 16 bits")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    first, *others = (Image.new("RGB", (20, 20), colour) for colour in (RED, GREEN, BLUE))
    content = encoded(first, kind, save_all=True, append_images=others)
    assert (np.abs(decoded(content).pixels.astype(int) - RED) < 5).all()


# ---- damage ---------------------------------------------------------------------------------------------------------

WHOLE = encoded(photo(300, 100), "JPEG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (encoded(thirds().resize((32, 32)), "ICO"), "not an image of a known format"),
        (WHOLE[:-200], "truncated"),
        (encoded(photo(300, 100), "JPEG", progressive=True)[:-200], "truncated"),
        (encoded(photo(300, 100))[:-200], "truncated"),
        (WHOLE[:2], "not an image"),
    ],
)
def test_damage_is_told(content: bytes, reason: str) -> None:
    result = decode(content, 10, "crop")
    assert isinstance(result, Unreadable)
    assert reason in result.reason


def test_a_jpeg_with_a_harmless_flaw_is_read_by_pillow() -> None:
    # Bytes between two segments: libjpeg warns of them and goes on, simplejpeg takes the warning for an error.
    start = WHOLE.index(b"\xff\xdb")
    flawed = WHOLE[:start] + b"\x00\x00" + WHOLE[start:]
    result = decoded(flawed, "crop", 96)
    assert (result.pixels == by_pillow(WHOLE, 96, "crop")).all()
    assert result.decoder == "pillow"


def jpeg_of(width: int, height: int) -> bytes:
    """Return a JPEG whose header gives other sides than the picture has."""
    start = WHOLE.index(b"\xff\xc0") + 5
    return WHOLE[:start] + struct.pack(">HH", height, width) + WHOLE[start + 4 :]


def png_of(width: int, height: int) -> bytes:
    """Return a PNG of black pixels, which take next to no bytes however many they are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 + 3 * width) * min(height, 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("make", [jpeg_of, png_of])
def test_bombs_are_refused_by_their_headers_and_the_limit_is_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_arguments: object, **_named: object) -> None:
        raise AssertionError("pixels were unpacked")

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", never)
    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    (result,) = decode_all([lambda: make(20_000, 20_000)], 8, "crop")
    assert result == Unreadable("20,000 x 20,000 pixels are more than the limit of 89,478,485")
    assert decode(make(101, 100), 8, "crop", max_pixels=10_000) == Unreadable(
        "101 x 100 pixels are more than the limit of 10,000"
    )
    assert MAX_PIXELS == 89_478_485


def test_the_given_limit_alone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_image: object) -> None:
        raise OSError("unpacking")

    monkeypatch.setattr(ImageFile.ImageFile, "load", stop)
    # More than twice of Pillow's own limit, at which it refuses on its part.
    assert decode(png_of(14_000, 14_000), 8, "crop", max_pixels=2 * 10**8) == Unreadable("unpacking")


@pytest.mark.parametrize("sides", [(0, 0), (0, 5), (5, 0)])
def test_images_without_pixels_are_unreadable(sides: tuple[int, int]) -> None:
    assert isinstance(decode(png_of(*sides), 8, "crop"), Unreadable)
    assert isinstance(decode(jpeg_of(*sides), 8, "crop"), Unreadable)


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_one_pixel_and_long_strips_are_images(fit: str) -> None:
    for sides in ((1, 1), (1, 10_000), (10_000, 1), (3, 65_000)):
        for kind in ("PNG", "JPEG"):
            result = decoded(encoded(Image.new("RGB", sides, (10, 200, 90)), kind), fit, 64)
            seen = result.pixels[:, 32] if sides[0] <= sides[1] else result.pixels[32]
            assert np.abs(seen.astype(int) - (10, 200, 90)).max() <= 2
            assert (result.width, result.height) == sides
    too_long = decode(encoded(Image.new("1", (1, 65_536))), 8, fit)  # type: ignore[arg-type]
    assert too_long == Unreadable("1 x 65,536 pixels: a side is longer than the limit of 65,535")


# ---- many -----------------------------------------------------------------------------------------------------------


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


def test_stopping_early_ends_the_threads_and_reads_no_further() -> None:
    read: list[int] = []

    def slow(number: int) -> bytes:
        read.append(number)
        time.sleep(0.01)
        return encoded(thirds())

    stream = decode_all([lambda number=number: slow(number) for number in range(1000)], 4, "crop", threads=3)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    # Two runs of sixteen are on their way to each thread.
    assert len(read) <= 3 * 2 * 16


def test_no_more_is_read_than_will_be_taken_soon() -> None:
    read: list[int] = []

    def one(number: int) -> bytes:
        read.append(number)
        return encoded(thirds())

    stream = decode_all((lambda number=number: one(number) for number in range(500)), 4, "crop", threads=2)
    for taken, _ in enumerate(stream, 1):
        assert len(read) <= taken + 2 * 2 * 16
    assert sorted(read) == list(range(500))


def test_large_photos_wait_for_each_other() -> None:
    room = images._Room(100)
    inside, most, total = 0, 0, []
    lock = threading.Lock()

    def work(amount: int) -> None:
        nonlocal inside, most
        with room.taken(amount):
            with lock:
                inside += min(amount, 100)
                most = max(most, inside)
                total.append(amount)
            time.sleep(0.001)
            with lock:
                inside -= min(amount, 100)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in [60, 30, 50, 1_000, 10, 100] * 10]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(total) == 60
    assert most == 100
