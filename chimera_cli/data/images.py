"""From the bytes of a photo to the square of pixels that a pack holds."""

import hashlib
import io
import struct
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from chimera_cli.data.pack import Fit, Picture, Unreadable
from chimera_cli.data.resize import (
    ON_ITS_SIDE,
    Plan,
    begins_within,
    finish,
    make_plan,
    resize,
    shrink,
    shrinks,
    work_alone,
)
from chimera_cli.runtime import cpu_cores

if TYPE_CHECKING:
    from chimera_cli.data.resize import Pixels

Decoder = Literal["auto", "pillow"]

# Pillow's own default: a quarter of a gigabyte of RGB. A decompression bomb is some kilobytes that unpack to far more.
MAX_PIXELS = 89_478_485
# The longest side a JPEG can have; a strip of one by many million pixels passes the limit on pixels and costs a pointer
# per row.
MAX_SIDE = 65_535
# Pillow's limit is one for the whole process, says no limit in its words and lets the double of it pass with a warning.
# `decode` checks every header against its own before a pixel is unpacked, and opens no format that nests another image.
Image.MAX_IMAGE_PIXELS = None
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "MPO")

# Formats whose pixels have 16 bits at most, whatever Pillow unpacks them to.
_SIXTEEN_BITS = ("PNG", "PPM")

# Decoding at n/8 of the size makes no difference where all that the resize looks at lies below the frequencies cut off.
# That goes by how much larger than the target the decoded image still is, here in grey levels on the average at worst:
# twice 0.4 for photos, but 3.6 for uniform noise, 4.0 for a page of text and 4.8 for dithered black and white; three
# times 1.6, 2.3 and 2.2; four times 0.9, 1.4 and 1.5, for at most a quarter more time. Other eighths are left out:
# libjpeg-turbo has no SIMD for them and takes as long as for the whole.
_OVERSAMPLING = 4
_EIGHTHS = (1, 2, 4)

# Images a thread takes at a time: handing over less than some milliseconds of work costs more than it is worth.
_RUN = 16
# Runs in flight per thread: enough that no thread waits while another works on large photos.
_AHEAD = 2
# What decoded squares may hold while they wait for those before them, and photos while they are decoded.
_WAITING_BYTES = 1 << 27
_DECODING_BYTES = 1 << 28

# What is raised for damaged files; the last two where a damaged header makes Pillow want the impossible.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, OverflowError, MemoryError)


# ---- one image ------------------------------------------------------------------------------------------------------


def decode(
    content: bytes, size: int, fit: Fit, *, max_pixels: int = MAX_PIXELS, decoder: Decoder = "auto"
) -> Picture | Unreadable:
    """Return the image in `content` as (size, size, 3) uint8 RGB, upright by its EXIF orientation.

    `crop` scales the shorter side to `size` and takes the centre (as CLIP does), `squash` ignores proportions, `pad`
    scales the longer side and fills with black. Bicubic, antialiased; the crop is the exact one, to fractions of a
    pixel. Transparency is dropped, 16 bits become 8, animations show their first frame. Every byte is decoded: a
    truncated file comes back as Unreadable, and so do an image of more than `max_pixels`, before it is unpacked, and
    anything that can't be read. JPEGs go through libjpeg-turbo, scaled while they are decoded where that makes no
    difference to speak of, the rest and with `pillow` all through Pillow.
    """
    _quiet_pillow()
    return _decode(content, size, fit, max_pixels, decoder, _Room(_DECODING_BYTES))


def _quiet_pillow() -> None:
    """Let Pillow keep to itself what it thinks of the metadata of single photos: that is nobody's business.

    For good, not for a while: threads share the filters, and a generator may be put aside with them changed.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _decode(
    content: bytes, size: int, fit: Fit, max_pixels: int, decoder: Decoder, room: "_Room"
) -> Picture | Unreadable:
    if not content:
        return Unreadable("the file is empty")
    try:
        with _blaming_the_file():
            opened = Image.open(io.BytesIO(content), formats=_formats())
        with opened as image:
            if problem := _size_problem(image.width, image.height, max_pixels):
                return Unreadable(problem)
            return _decode_open(image, content, size, fit, decoder, room)
    except UnidentifiedImageError:
        return Unreadable("not an image of a known format")
    except (*_DAMAGE, Warning) as error:
        return Unreadable(str(error) or type(error).__name__)


def _decode_open(image: ImageFile, content: bytes, size: int, fit: Fit, decoder: Decoder, room: "_Room") -> Picture:
    """Return the picture of an image whose header is read; what its decoder needs is taken from `room` meanwhile."""
    plan = make_plan(image.width, image.height, size, fit)
    if decoder == "auto" and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        eighths = _eighths(plan)
        with room.taken(_jpeg_bytes(image, eighths)):
            inner = _decode_jpeg(content, image, eighths, plan)
        if inner is not None:
            return _picture(inner, image, size, content, "simplejpeg")
    with room.taken(_pillow_bytes(image)):
        with _blaming_the_file():
            image.load()
        inner = resize(_plain(image, image.format), plan)
    return _picture(inner, image, size, content, "pillow")


def _picture(inner: "Image.Image | Pixels", image: Image.Image, size: int, content: bytes, decoder: str) -> Picture:
    """Return the picture of an `image` of which `inner` is what is seen, scaled and not yet upright."""
    orientation = _orientation(image)
    width, height = reversed(image.size) if orientation in ON_ITS_SIDE else image.size
    return Picture(finish(inner, orientation, size), hashlib.sha256(content).hexdigest(), width, height, decoder)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation. Metadata that can't be read says nothing against an image: 1, upright."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*_DAMAGE, KeyError, TypeError, Warning):
        return 1


@contextmanager
def _blaming_the_file() -> Iterator[None]:
    """Turn what Pillow's plugins stumble over in damaged files into OSError; elsewhere the same would be a bug."""
    try:
        yield
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise OSError(f"damaged: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Return those of the formats that this Pillow knows, JPEG first; nothing else is tried on a user's file."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _size_problem(width: int, height: int, max_pixels: int) -> str | None:
    if width < 1 or height < 1:
        return f"{width} x {height} pixels are no image"
    if width * height > max_pixels:
        return f"{width:,} x {height:,} pixels are more than the limit of {max_pixels:,}"
    if max(width, height) > MAX_SIDE:
        return f"{width:,} x {height:,} pixels: a side is longer than the limit of {MAX_SIDE:,}"
    return None


# ---- decoders -------------------------------------------------------------------------------------------------------


def _decode_jpeg(content: bytes, image: Image.Image, eighths: int, plan: Plan) -> "Image.Image | Pixels | None":
    """Return what `plan` shows of a JPEG decoded at `eighths` / 8; None where libjpeg-turbo has a word of warning.

    Pillow decides then: it reads files with stray bytes, which are whole, and refuses truncated ones.
    """
    width, height = (-(-side * eighths // 8) for side in image.size)
    plan = plan.scaled(eighths / 8)
    space = "RGBX" if shrinks(plan) and begins_within(plan) else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(content, space, min_height=height, min_width=width)
    except ValueError:
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return shrink(pixels, plan) if shrinks(plan) else resize(Image.fromarray(pixels), plan)


def _eighths(plan: Plan) -> int:
    """Return the eighths of its size at which a JPEG is decoded: the least whose result looks like the whole's.

    That goes by both sides: a strip may be far longer than the square and far narrower.
    """
    enough = (eighths for eighths in _EIGHTHS if eighths * min(plan.reduction) >= 8 * _OVERSAMPLING)
    return next(enough, 8)


def _jpeg_bytes(image: Image.Image, eighths: int) -> int:
    """Return about how many bytes libjpeg-turbo needs: the pixels, and of a progressive file all coefficients."""
    pixels = image.width * image.height
    return pixels * eighths**2 // 16 + (6 * pixels if "progressive" in image.info else 0)


def _pillow_bytes(image: Image.Image) -> int:
    """Return about how many bytes Pillow needs: the pixels twice, converted and not, and the coefficients likewise."""
    return image.width * image.height * (16 if "progressive" in image.info else 8)


def _plain(image: Image.Image, kind: str | None) -> Image.Image:
    """Return a loaded image of the format `kind` as RGB or L. Raises ValueError for pixels whose range is not known.

    Pillow unpacks 16 bits of PNG and PPM into 32 in some of its versions; elsewhere 32 bits may mean anything.
    """
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I;16"):
        return _upper_bytes(np.asarray(image))
    if image.mode == "I" and kind in _SIXTEEN_BITS:
        return _upper_bytes(np.asarray(image))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels: convert the image to 8 or 16 bits")
    # A palette with transparency converts to RGB through RGBA only.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _upper_bytes(values: np.ndarray) -> Image.Image:
    """Return 16-bit grey levels, (height, width), as 8-bit ones; Pillow's own conversion cuts off all above 255."""
    return Image.fromarray((values >> 8).astype(np.uint8))


# ---- many images ----------------------------------------------------------------------------------------------------


def decode_all(
    reads: Iterable[Callable[[], bytes]],
    size: int,
    fit: Fit,
    *,
    max_pixels: int = MAX_PIXELS,
    decoder: Decoder = "auto",
    threads: int | None = None,
) -> Iterator[Picture | Unreadable]:
    """Yield what `decode` makes of each, in order, in threads: the libraries let go of Python's lock.

    There are as many threads as cores: the writer waits for the disk meanwhile, and the kernel reads ahead; one more
    costs five percent where the files are in memory and gains nothing where they are not.

    What is in memory at a time does not grow with the number of images, and large ones wait for each other: together
    they get a quarter of a gigabyte, a single one what it needs. A read that raises OSError is an image that can't be
    read. Closing the generator ends the threads after the image that each is at.
    """
    threads = threads or cpu_cores()
    ahead = max(threads, min(threads * _AHEAD * _RUN, _WAITING_BYTES // (3 * size * size)))
    run = max(ahead // (threads * _AHEAD), 1)
    room = _Room(_DECODING_BYTES)
    stopped = threading.Event()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=work_alone)
    waiting: deque[Future[list[Picture | Unreadable]]] = deque()

    def work(some: list[Callable[[], bytes]]) -> list[Picture | Unreadable]:
        return [_read_and_decode(read, size, fit, max_pixels, decoder, room) for read in some if not stopped.is_set()]

    _quiet_pillow()
    try:
        rest = iter(reads)
        while some := list(islice(rest, run)):
            waiting.append(pool.submit(work, some))
            if len(waiting) >= ahead // run:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _read_and_decode(
    read: Callable[[], bytes], size: int, fit: Fit, max_pixels: int, decoder: Decoder, room: "_Room"
) -> Picture | Unreadable:
    try:
        content = read()
    except OSError as error:
        return Unreadable(error.strerror or str(error))
    return _decode(content, size, fit, max_pixels, decoder, room)


class _Room:
    """So many bytes for all threads together; who asks for more than is left waits, and gets all there is at most."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._left = total
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Hold `amount` bytes of it."""
        held = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= held)
            self._left -= held
        try:
            yield
        finally:
            with self._changed:
                self._left += held
                self._changed.notify_all()
