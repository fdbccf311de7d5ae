"""`chimera bench prepare`: how fast photos become a pack here, beside the bare work of one core and Pillow alone."""

import io
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.data.pack import Fit
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Progress, ignore

if TYPE_CHECKING:
    import numpy as np

SEED = 0
ROUNDS = 5
# What the photos of Flickr8k and its like are: 500 pixels on the longer side and 137 KB on the average.
PHOTO_WIDTH, PHOTO_HEIGHT = 500, 375
PHOTO_BYTES = 137_000
_SUFFIXES = (".jpg", ".jpeg", ".png")
_PACKS = "packs"
# So many different pictures are drawn; the files beyond are copies of them, which to a decoder is all the same.
_DRAWN = 32


@dataclass(frozen=True, slots=True)
class PrepareSetting:
    """What is done: the `images` at `origin` (None: drawn ones) become squares of `size` pixels by `fit`."""

    images: int
    size: int
    fit: Fit
    origin: str | None


@dataclass(frozen=True, slots=True)
class Rates:
    """Images per second of the same work in each round."""

    name: str
    images_per_s: tuple[float, ...]

    def facts(self) -> dict[str, Any]:
        """Return the median over the rounds with their standard deviation (None for a single one)."""
        several = len(self.images_per_s) > 1
        return {
            "name": self.name,
            "images_per_s": statistics.median(self.images_per_s),
            "std": statistics.stdev(self.images_per_s) if several else None,
            "rounds": list(self.images_per_s),
        }


def bench_prepare(
    home: Path,
    *,
    origin: Path | None,
    images: int,
    size: int,
    fit: Fit,
    command: str,
    original_size: bool,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return how many images per second become a pack, with their share of what the cores could do at best.

    Taken are the first `images` photos below `origin`; without one, or with `original_size`, JPEGs of 500 x 375 pixels
    and about 137 KB are drawn. In each of some rounds follow each other: the real road from files to a pack on the disk
    of `home`, the bare loop (read, decode, resize, hash, nothing written) on one thread and on all cores, and the real
    road with Pillow alone. Ratios are taken within a round, so that what slows the machine down hits both. Writes a
    group of kind `bench-prepare`. Raises UsageError for words that can't be meant, ChimeraError where nothing can be
    read or written.
    """
    from chimera_cli.runtime import pick_device
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, memory_figures, seed_session

    _check(origin, images, size)
    source = None if original_size else origin
    setting = PrepareSetting(images, size, fit, None if source is None else str(source))
    device = pick_device("cpu")
    facts = group_facts(command, None, asdict(setting), device)
    with group_session(home, "bench-prepare", "", [SEED], facts) as group:
        started_at = time.perf_counter()
        with seed_session(group, SEED, asdict(setting), device, [listener], 0) as session:
            details = measure(home, source, setting, session.tell)
            figures = {
                "prepare_images_per_s": details["prepare"]["images_per_s"],
                "ram_peak_gb": memory_figures(device)["ram_peak_gb"],
                "wall_s": time.perf_counter() - started_at,
            }
            return {"group": group.name} | session.finish(figures, details)


def _check(origin: Path | None, images: int, size: int) -> None:
    if images < 1:
        raise UsageError(f"--images {images} is not a number of images", "1000 is the default")
    if not 1 <= size <= 1024:
        raise UsageError(f"--size {size} is not between 1 and 1024", "224 is the default")
    if origin is not None and not origin.is_dir():
        raise UsageError(f"{origin} is not a folder", "give --from a folder with JPEG or PNG files, or leave it out")


def measure(home: Path, origin: Path | None, setting: PrepareSetting, tell: Listener, rounds: int = ROUNDS) -> Any:
    """Return the details of the result: rates, the share of the bare loop reached, and the ratio to Pillow alone."""
    from chimera_cli.runtime import cpu_cores

    cores = cpu_cores()
    with working_folder(home) as folder:
        photos = find_photos(origin, setting.images) if origin else draw_photos(folder, setting.images, tell)
        works: dict[str, Callable[[], None]] = {
            "prepare": lambda: prepare(photos, folder, setting, "auto"),
            "bare loop, 1 thread": lambda: bare_loops(photos, setting, 1),
            f"bare loops, {cores} threads": lambda: bare_loops(photos, setting, cores),
            "prepare with Pillow alone": lambda: prepare(photos, folder, setting, "pillow"),
        }
        real, bare, bare_threads, pillow = _interleaved(works, len(photos), rounds, folder / _PACKS, tell)
        total_bytes = sum(photo.stat().st_size for photo in photos if photo.is_file())
    at_best = [cores * rate for rate in bare.images_per_s]
    return {
        "images": len(photos),
        "bytes_per_image": total_bytes / len(photos),
        "photos": setting.origin or f"drawn, {PHOTO_WIDTH} x {PHOTO_HEIGHT}",
        "size": setting.size,
        "fit": setting.fit,
        "cores": cores,
        "prepare": real.facts(),
        "bare": bare.facts(),
        "bare_threads": bare_threads.facts(),
        "pillow": pillow.facts(),
        "ceiling": {
            "name": f"bare loop of read, decode, resize and hash, times {cores} cores",
            "images_per_s": statistics.median(at_best),
            "share_reached": median_ratio(real.images_per_s, at_best),
        },
        "share_of_bare_threads": median_ratio(real.images_per_s, bare_threads.images_per_s),
        "ratio_to_pillow": median_ratio(real.images_per_s, pillow.images_per_s),
    }


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios within rounds: what slows a round down slows both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


@contextmanager
def working_folder(home: Path) -> Iterator[Path]:
    """Yield a folder on the disk where packs lie, gone afterwards. Raises ChimeraError where it can't be made."""
    from chimera_cli.runs import cannot_write

    try:
        made = tempfile.TemporaryDirectory(prefix=".bench-prepare-", dir=home, ignore_cleanup_errors=True)
    except OSError as error:
        raise cannot_write(home, error) from error
    with made as folder:
        yield Path(folder)


def _interleaved(
    works: dict[str, Callable[[], None]], images: int, rounds: int, packs: Path, tell: Listener
) -> list[Rates]:
    """Return the rates of all works, which take turns; a first round reads the files into memory and does not count.

    What they leave in `packs` goes when the clock has stopped.
    """
    rates: dict[str, list[float]] = {name: [] for name in works}
    for done in range(rounds + 1):
        for name, work in works.items():
            started_at = time.perf_counter()
            work()
            rates[name].append(images / (time.perf_counter() - started_at))
            shutil.rmtree(packs, ignore_errors=True)
        tell(Progress("preparing and rivals", done + 1, rounds + 1, "rounds"))
    return [Rates(name, tuple(values[1:])) for name, values in rates.items()]


# ---- the works ------------------------------------------------------------------------------------------------------


def prepare(photos: Sequence[Path], folder: Path, setting: PrepareSetting, decoder: Literal["auto", "pillow"]) -> None:
    """Make a pack of the photos in `folder` as `chimera data prepare` does."""
    from chimera_cli.data.images import decode_all
    from chimera_cli.data.pack import Item
    from chimera_cli.data.pack_writer import write_pack

    write_pack(
        folder / _PACKS,
        name=decoder,
        source="bench",
        images=decode_all([photo.read_bytes for photo in photos], setting.size, setting.fit, decoder=decoder),
        items=[Item(photo.name, "train") for photo in photos],
        size=setting.size,
        fit=setting.fit,
        max_bad=1.0,
    )


def bare_loops(photos: Sequence[Path], setting: PrepareSetting, threads: int) -> None:
    """Do on so many threads what no way of preparing can leave out: read, decode, resize, hash. Nothing is kept.

    Each has photos of its own and knows of no other. Where others use the machine too, or two cores are one with two
    faces, many threads give less than many times what one gives.
    """
    from chimera_cli.data.resize import work_alone

    with ThreadPoolExecutor(threads, initializer=work_alone) as pool:
        list(pool.map(lambda start: _bare_loop(photos[start::threads], setting), range(threads)))


def _bare_loop(photos: Sequence[Path], setting: PrepareSetting) -> None:
    from chimera_cli.data.images import decode

    for photo in photos:
        decode(_read(photo), setting.size, setting.fit)


def _read(photo: Path) -> bytes:
    """Return the bytes of a photo; none of one that can't be read, which the real road leaves out as well."""
    try:
        return photo.read_bytes()
    except OSError:
        return b""


# ---- photos ---------------------------------------------------------------------------------------------------------


def find_photos(origin: Path, count: int) -> list[Path]:
    """Return the first `count` JPEG and PNG files below a folder. Raises ChimeraError where there is none."""
    try:
        found = sorted(path for path in origin.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    except OSError as error:
        raise ChimeraError(f"{origin} can't be read: {error.strerror or error}", "check its permissions") from error
    if not found:
        raise ChimeraError(f"{origin} holds no JPEG or PNG files", "give --from another folder, or leave it out")
    return found[:count]


def draw_photos(folder: Path, count: int, tell: Listener = ignore) -> list[Path]:
    """Return `count` JPEGs with the size and detail of photos, written to `folder`."""
    import numpy as np

    from chimera_cli.runs import cannot_write

    different = min(count, _DRAWN)
    pictures = []
    for number in range(different):
        pictures.append(draw_picture(np.random.default_rng([SEED, number])))
        tell(Progress("drawing photos", number + 1, different))
    quality = _fitting_quality(pictures)
    contents = [encode(picture, quality) for picture in pictures]
    photos = []
    for number, content in zip(range(count), itertools.cycle(contents), strict=False):
        photos.append(folder / f"{number:06d}.jpg")
        try:
            photos[-1].write_bytes(content)
        except OSError as error:
            raise cannot_write(photos[-1], error) from error
    return photos


def draw_picture(generator: "np.random.Generator") -> "np.ndarray":
    """Return (375, 500, 3) uint8 with the statistics of photos: amplitudes fall as 1/frequency, and things have edges.

    Field, Relations between the statistics of natural images and the response properties of cortical cells, 1987.
    """
    import numpy as np

    shape = (PHOTO_HEIGHT, PHOTO_WIDTH)
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :])
    frequency[0, 0] = 1.0
    spectra = np.fft.rfft2(generator.standard_normal((4, *shape))) / frequency
    noise = np.fft.irfft2(spectra, s=shape)
    noise /= noise.std(axis=(1, 2), keepdims=True)
    # One pattern of light for all channels, a fainter one of colour for each.
    picture = 120 + 40 * noise[:1] + 12 * noise[1:]
    y, x = np.mgrid[: shape[0], : shape[1]]
    for _ in range(12):
        centre_x, centre_y = generator.uniform(0, shape[1]), generator.uniform(0, shape[0])
        inside = np.hypot(x - centre_x, y - centre_y) < generator.uniform(10, 90)
        picture[:, inside] = 0.5 * picture[:, inside] + generator.uniform(0, 128, (3, 1))
    return np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def encode(picture: "np.ndarray", quality: int) -> bytes:
    """Return the JPEG of a picture (height, width, 3) uint8, colours at half the resolution as cameras do."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _fitting_quality(pictures: Sequence["np.ndarray"]) -> int:
    """Return the JPEG quality at which the pictures have about 137 KB on the average."""
    some = pictures[:4]
    sizes = {quality: statistics.mean(len(encode(picture, quality)) for picture in some) for quality in range(80, 101)}
    return min(sizes, key=lambda quality: abs(sizes[quality] - PHOTO_BYTES))
