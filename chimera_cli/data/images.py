"""From the bytes of a photo to the square of pixels that a pack holds."""

import hashlib
import io
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from chimera_cli.data.pack import Fit, Picture, Unreadable
from chimera_cli.runtime import cpu_cores

# Tasks in flight per thread: enough that no thread waits, few enough that memory stays at some hundred photos.
_AHEAD = 4


def decode(content: bytes, size: int, fit: Fit) -> Picture | Unreadable:
    """Return the image in `content` as (size, size, 3) uint8 RGB, upright by its EXIF orientation.

    `crop` scales the shorter side to `size` and takes the centre (as CLIP does), `squash` ignores proportions, `pad`
    scales the longer side and fills with black. Bicubic, antialiased. Every byte is decoded: a truncated file comes
    back as Unreadable, and so does anything else that Pillow can't read.
    """
    if not content:
        return Unreadable("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
        # A palette with transparency converts to RGB through RGBA only.
        rgb = (upright.convert("RGBA") if "transparency" in upright.info else upright).convert("RGB")
    except UnidentifiedImageError:
        return Unreadable("not an image")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Warning) as error:
        return Unreadable(str(error) or type(error).__name__)
    pixels = np.asarray(_fit(rgb, size, fit))
    return Picture(pixels, hashlib.sha256(content).hexdigest(), rgb.width, rgb.height)


def decode_all(reads: Sequence[Callable[[], bytes]], size: int, fit: Fit) -> Iterator[Picture | Unreadable]:
    """Yield the decoded images in order, decoded by one thread per core (Pillow lets go of the interpreter's lock)."""
    threads = cpu_cores()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    waiting: deque[Future[Picture | Unreadable]] = deque()
    try:
        with warnings.catch_warnings():
            # Damaged metadata of single photos is nobody's business; a decompression bomb makes its image unreadable.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for read in reads:
                waiting.append(pool.submit(_read_and_decode, read, size, fit))
                if len(waiting) >= threads * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_and_decode(read: Callable[[], bytes], size: int, fit: Fit) -> Picture | Unreadable:
    try:
        content = read()
    except OSError as error:
        return Unreadable(error.strerror or str(error))
    return decode(content, size, fit)


def _fit(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    if fit == "squash":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if fit == "pad":
        return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC)
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
