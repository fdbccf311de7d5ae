"""Batches of pixels and captions straight from WebDataset tar shards, for sets that don't fit on disk unpacked.

One thread reads shards in sequence, mixes their samples in a buffer of encoded bytes and hands them to a pool that
decodes them in order (decoders let go of the interpreter's lock, so no worker processes are needed). The `webdataset`
library reads and groups the members and shuffles the buffer. Which process reads which shard is decided here from
(seed, epoch, rank, world) alone: the library's own splitting, which asks environment variables, is not used, and it
never sees a name that it would take for a URL or a shell command.
"""

import hashlib
import itertools
import json
import os
import random
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from chimera_cli.data.images import decode_all
from chimera_cli.data.loader import ahead, empty_buffer, epoch_order
from chimera_cli.data.pack import Fit, Picture, Unreadable
from chimera_cli.data.sources.corpus import sift_caption
from chimera_cli.data.sources.shards import IMAGE_ENDINGS, TAR_DAMAGE, expand
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, Progress, ignore
from chimera_cli.runs import content_hash
from chimera_cli.runtime import cpu_cores

Sample = Mapping[str, Any]

_WANTED = frozenset((*IMAGE_ENDINGS, "txt", "json"))
_META = re.compile(r"__[^/]*__($|/)")  # the library's names for notes about a shard, which are no samples
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_TAR_END = bytes(1024)  # two blocks of zeros end every tar archive (POSIX.1-2017, pax, "ustar Interchange Format")
_READ_BYTES = 1 << 20
_READS_AT_END = 100  # more than tarfile needs to see that an archive was cut off
_BUFFER_BYTES = 256 << 20  # what the samples of the shuffle buffer may take at their mean size


# ---- shards ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its size in bytes and how many samples (images with their texts) it holds."""

    path: Path
    bytes: int
    samples: int


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The shards that a pattern stands for, in the order of their names."""

    pattern: str
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """Return a SHA-256 over names and sizes, wherever the folder lies."""
        folder = os.path.commonpath([shard.path.parent for shard in self.shards])
        return content_hash([[os.path.relpath(shard.path, folder), shard.bytes] for shard in self.shards])


def find_shards(pattern: str) -> list[Path]:
    """Return the tar files of a folder, a glob or a brace pattern (`shards/{00000..00099}.tar`), sorted, each once.

    Raises UsageError for a pattern that finds nothing, names a file that is not there, or is not of this machine.
    """
    try:
        # Not through Path as it is: that would make one slash of the two in an address.
        local = str(Path(pattern).expanduser()) if pattern.startswith("~") else pattern
        return sorted({path.resolve() for path in expand(local)})
    except UsageError as error:
        raise UsageError(f"stream: {error.message}", "for example --set stream='shards/{00000..00099}.tar'") from error


def open_shards(pattern: str, listener: Listener = ignore) -> ShardSet:
    """Return the shards of a pattern with the number of samples in each.

    The number comes from img2dataset's `<shard>_stats.json` where one lies beside the shard, else from all headers of
    the tar, which takes a second or two for 10,000 samples. Raises UsageError as `find_shards` does, and ChimeraError
    for a shard that is compressed, damaged or cut off.
    """
    paths = find_shards(pattern)
    shards = []
    for number, path in enumerate(paths, 1):
        try:
            _check_ends(path)
            stated = _stated_samples(path)
            shards.append(Shard(path, path.stat().st_size, _count_samples(path) if stated is None else stated))
        except OSError as error:
            raise _broken(path, f"can't be read: {error.strerror or error}") from error
        listener(Progress("counting samples", number, len(paths), "shards"))
    found = ShardSet(pattern, tuple(shards))
    if not found.samples:
        raise ChimeraError(
            f"the {len(shards)} shards of {pattern!r} hold no images",
            "a shard holds files such as 000000001.jpg and 000000001.txt, as img2dataset writes them",
        )
    return found


def _broken(path: Path, what: str) -> ChimeraError:
    return ChimeraError(f"the shard {path} {what}", "get this shard again, or leave it out of the pattern")


def _check_ends(path: Path) -> None:
    """Raise ChimeraError where the first and last bytes of a file are not those of a whole, plain tar archive."""
    with path.open("rb") as file:
        head = file.read(8)
        kind = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        if kind:
            raise ChimeraError(
                f"the shard {path} is compressed with {kind}",
                "decompress it: the images in it don't get smaller by it, and reading would cost a core",
            )
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_TAR_END)))
        if not _begins_as_tar(path):
            raise _broken(path, "is no tar archive" if size else "is empty")
        if file.read() != _TAR_END:
            raise _broken(path, f"was cut off: its {size:,} bytes don't end as a tar archive ends")


def _begins_as_tar(path: Path) -> bool:
    import tarfile

    try:
        return tarfile.is_tarfile(path)
    except TAR_DAMAGE as error:
        raise _broken(path, f"is damaged: {_first(error)}") from error


def _stated_samples(path: Path) -> int | None:
    """Return how many samples img2dataset says it wrote into a shard, None where it says nothing."""
    with suppress(OSError, ValueError, AttributeError):
        stated = json.loads(path.with_name(f"{path.stem}_stats.json").read_bytes()).get("successes")
        if isinstance(stated, int) and not isinstance(stated, bool) and stated >= 0:
            return stated
    return None


def _count_samples(path: Path) -> int:
    """Return how many samples a shard holds by its headers. Raises ChimeraError for a member that can't be meant."""
    import tarfile

    from webdataset.tariterators import group_by_keys

    def names(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else every header of the shard stays in memory
            if member.issym() or member.islnk() or member.name.startswith("/") or ".." in member.name.split("/"):
                raise _broken(path, f"holds {member.name!r}, a link or a path that leaves the shard")
            if member.isreg() and _is_wanted(member.name):
                yield {"fname": member.name, "data": b"", "__url__": path.name}

    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            samples = sum(_image_of(sample) is not None for sample in group_by_keys(names(tar)))
            # tarfile takes a damaged header for the end of the archive.
            end = raw.seek(tar.offset)
            if any(raw.read(512)):
                raise _broken(path, f"is damaged at byte {end:,}")
    except TAR_DAMAGE as error:
        raise _broken(path, f"is damaged: {_first(error)}") from error
    return samples


def _is_wanted(name: str) -> bool:
    """Return whether a member is read: images, captions and their facts, but no notes about the shard."""
    return name.rpartition(".")[2].lower() in _WANTED and _META.match(name) is None


def _image_of(sample: Sample) -> bytes | None:
    return next((sample[ending] for ending in IMAGE_ENDINGS if ending in sample), None)


def _first(error: BaseException) -> str:
    # The library adds streams and names to the message and to the arguments of what it raises.
    return str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__


# ---- samples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A sample as it waits in the buffer; `place` is that of its shard in the order of the epoch."""

    place: int
    name: str
    key: str
    image: bytes
    captions: tuple[str, ...]


@dataclass(slots=True)
class _Ledger:
    """What has become of the samples of an epoch: which shards are used up, what was left out and why.

    `used` shards at the front of the order are read to the end, all their samples given or left out.
    """

    used: int
    open: Counter[int] = field(default_factory=Counter)
    read: set[int] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def settle(self, places: Iterable[int]) -> None:
        """Note that one sample of each shard at `places` is given or left out."""
        self.open.subtract(places)
        while self.used in self.read and not self.open[self.used]:
            self.used += 1

    def leave_out(self, sample: _Encoded, reason: str, detail: str = "") -> None:
        """Note that a sample is left out."""
        self.left_out[reason] += 1
        self.examples.setdefault(reason, f"{sample.name}: {detail}" if detail else sample.name)
        self.settle([sample.place])


UNREADABLE, CAPTIONLESS, LEAKED = "unreadable", "without a caption", "identical to an image of dev or test"


def _encoded(order: Sequence[Shard], ledger: _Ledger, stop: threading.Event) -> Iterator[_Encoded]:
    """Yield the captioned samples of the shards that are not used up, in the order of the shards."""
    for place in range(ledger.used, len(order)):
        shard, given = order[place], 0
        for sample in _read_shard(shard.path):
            if stop.is_set():
                return
            image = _image_of(sample)
            if image is None:
                continue
            given += 1
            ledger.open[place] += 1
            key = str(sample["__key__"])
            found = _Encoded(place, f"{shard.path.name}: {key}", key, image, captions_of(sample))
            if found.captions:
                yield found
            else:
                ledger.leave_out(found, CAPTIONLESS)
        if given != shard.samples:
            raise _broken(
                shard.path,
                f"gave {given:,} images where {shard.samples:,} were counted: it is damaged, has changed, or its "
                "_stats.json is of another file",
            )
        ledger.read.add(place)
        ledger.settle([])


@dataclass(slots=True)
class _Ending:
    """A file whose end is an error for whoever reads on and on: tarfile would, up to the size that a header states."""

    file: BinaryIO
    empty: int = 0

    def read(self, size: int) -> bytes:
        import tarfile

        content = self.file.read(size)
        self.empty += not content
        if self.empty > _READS_AT_END:
            raise tarfile.ReadError("unexpected end of data")
        return content


def _read_shard(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard as the library groups them. Raises ChimeraError for one that is damaged."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        # Opened here: the library would take a name for a URL or a command, and would never close the file. Each read
        # of the file itself lets go of the interpreter's lock and must get it back from the decoders.
        with path.open("rb", buffering=_READ_BYTES) as file:
            opened = [{"url": path.name, "stream": _Ending(file)}]
            yield from group_by_keys(tar_file_expander(opened, select_files=_is_wanted))
    except TAR_DAMAGE as error:
        raise _broken(path, f"is damaged: {_first(error)}") from error
    except OSError as error:
        raise _broken(path, f"can't be read: {error.strerror or _first(error)}") from error


def captions_of(sample: Sample) -> tuple[str, ...]:
    """Return the captions of a sample, tidied: its `txt`, else the `caption` or `captions` of its `json`; () without.

    By the same rules as when shards are made into a pack: what is empty, not UTF-8 or too long is no caption.
    """
    with suppress(ValueError, RecursionError):
        if "txt" in sample:
            return _sifted([sample["txt"].decode("utf-8-sig")])
        fields = json.loads(sample.get("json", b"{}"))
        for given in (fields.get(name) for name in ("caption", "captions") if isinstance(fields, dict)):
            if given is not None:
                return _sifted(given if isinstance(given, list) else [given])
    return ()


def _sifted(texts: Sequence[Any]) -> tuple[str, ...]:
    clean = (sift_caption(text)[0] for text in texts if isinstance(text, str))
    return tuple(dict.fromkeys(text for text in clean if text))


# ---- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a process stands: `shards` of its order in `epoch` are used up.

    Resuming from the state of a batch gives every sample of the shards that were not used up then, mixed anew. Nothing
    is left out. Repeated are those samples of these shards that had been given already: the shuffle buffer holds
    samples of several shards at once, and the last few of a shard may leave it late. Without a buffer (`buffer=1`)
    they are of one shard alone, the one in which the batch ended.
    """

    epoch: int = 0
    shards: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class StreamBatch:
    """`pixels` (b, size, size, 3) uint8, one caption each, `image_ids` (b,) int64, equal for identical image files.

    `number` counts the batches of the epoch, `state` is where to resume after this batch, `left_out` says how many
    samples of the epoch were left out so far, by reason.
    """

    pixels: NDArray[np.uint8]
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    image_ids: NDArray[np.int64]
    epoch: int
    number: int
    state: StreamState
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that decides what a stream gives."""

    shards: tuple[Shard, ...]
    batch: int
    size: int
    fit: Fit
    seed: int
    rank: int
    world: int
    start: StreamState
    epochs: int | None
    buffer: int
    threads: int
    max_bad: float
    excluded: frozenset[str]


def batches_per_epoch(samples: int, batch: int) -> int:
    """Return how many batches `stream_batches` makes of `samples`, at least 1."""
    return max(1, (samples + batch // 2) // batch)


def stream_batches(
    shards: ShardSet,
    batch: int,
    size: int,
    fit: Fit = "crop",
    seed: int = 0,
    *,
    rank: int = 0,
    world: int = 1,
    start: StreamState | None = None,
    epochs: int | None = None,
    buffer: int = 1000,
    threads: int | None = None,
    prefetch: int = 1,
    max_bad: float = 0.01,
    excluded: frozenset[str] = frozenset(),
    listener: Listener = ignore,
) -> Generator[StreamBatch, None, None]:
    """Return the batches of process `rank` of `world` from `start` on, up to epoch `epochs` or without end.

    Every captioned, readable sample comes once per epoch and on one process. All batches of an epoch have `batch`
    samples but the last, which has between half and one and a half times as many, or fewer where there are no more.
    Processes have whole shards each, so their numbers of batches may differ. A sample with several captions shows one
    of them, by (seed, epoch, key). `buffer` samples wait to be drawn from, fewer where they would take more than
    256 MiB; `prefetch` batches wait ready; `excluded` are SHA-256 of image files that are left out.

    Raises UsageError where there are fewer shards than processes, ChimeraError where a shard is damaged or more than
    the share `max_bad` of the images is unreadable. The threads end with the iterator: close it, or use it up.
    """
    if min(batch, buffer, prefetch) < 1 or not 0 <= rank < world:
        raise ValueError(f"batch {batch}, buffer {buffer}, prefetch {prefetch} or rank {rank} of {world} can't be")
    if len(shards.shards) < world:
        raise UsageError(
            f"{len(shards.shards)} shards can't be shared by {world} processes: each reads whole shards",
            f"start at most {len(shards.shards)} processes, or write the set into more and smaller shards",
        )
    mean_bytes = max(1, shards.bytes // max(1, shards.samples))
    room = max(1, min(buffer, _BUFFER_BYTES // mean_bytes))
    first, workers = start or StreamState(), threads or cpu_cores()
    plan = _Plan(shards.shards, batch, size, fit, seed, rank, world, first, epochs, room, workers, max_bad, excluded)
    return _given(plan, prefetch, listener)


def _given(plan: _Plan, prefetch: int, listener: Listener) -> Generator[StreamBatch, None, None]:
    """Yield the batches, made ahead by a thread, and tell the notes between them."""
    stop = threading.Event()
    made = ahead(_epochs(plan, stop), prefetch)
    try:
        for item in made:
            if isinstance(item, Note):
                listener(item)
            else:
                yield item
    finally:
        stop.set()  # else the thread would finish the batch it is at, or fill the buffer first
        made.close()


def _epochs(plan: _Plan, stop: threading.Event) -> Iterator[StreamBatch | Note]:
    for epoch in itertools.count(plan.start.epoch):
        if stop.is_set() or (plan.epochs is not None and epoch >= plan.epochs):
            return
        yield from _epoch(plan, epoch, stop)


def _epoch(plan: _Plan, epoch: int, stop: threading.Event) -> Iterator[StreamBatch | Note]:
    """Yield the batches of an epoch; before the last one of the first epoch a note of what was left out."""
    from webdataset.filters import shuffle

    indices = epoch_order(len(plan.shards), plan.seed, epoch, plan.rank, plan.world)
    order = [plan.shards[index] for index in indices]
    begins = epoch == plan.start.epoch
    ledger = _Ledger(plan.start.shards if begins else 0)
    draw = random.Random(_entropy(plan.seed, epoch, plan.rank, ledger.used))
    mixed = shuffle(plan.buffer, initial=plan.buffer, rng=draw)(_encoded(order, ledger, stop))
    waiting: list[tuple[_Encoded, Picture]] = []
    number = 0
    for sample, picture in _decoded(mixed, plan):
        if stop.is_set():
            return
        if isinstance(picture, Unreadable):
            ledger.leave_out(sample, UNREADABLE, picture.reason)
            _check_readable(ledger, order, plan.max_bad)
        elif picture.sha256 in plan.excluded:
            ledger.leave_out(sample, LEAKED)
        else:
            waiting.append((sample, picture))
        # Half a batch stays behind: no tail of one or two pairs makes a step of its own.
        if len(waiting) >= plan.batch + (plan.batch + 1) // 2:
            given, waiting = waiting[: plan.batch], waiting[plan.batch :]
            ledger.settle(sample.place for sample, _ in given)
            yield _batch(plan, given, epoch, number, StreamState(epoch, ledger.used), ledger)
            number += 1
    if ledger.left_out and begins:
        yield _note(ledger, order, epoch)
    if waiting:
        yield _batch(plan, waiting, epoch, number, StreamState(epoch + 1, 0), ledger)
    elif not (begins and plan.start.shards):
        raise _nothing_left(ledger, order)


def _decoded(samples: Iterable[_Encoded], plan: _Plan) -> Iterator[tuple[_Encoded, Picture | Unreadable]]:
    """Yield the samples, their bytes gone, with their pictures in order; some of the next are in the pool meanwhile."""
    begun: deque[_Encoded] = deque()

    def reads() -> Iterator[Callable[[], bytes]]:
        for sample in samples:
            begun.append(replace(sample, image=b""))
            yield partial(_encoded_image, sample)

    for picture in decode_all(reads(), plan.size, plan.fit, threads=plan.threads):
        yield begun.popleft(), picture


def _encoded_image(sample: _Encoded) -> bytes:
    return sample.image


def _batch(
    plan: _Plan,
    given: Sequence[tuple[_Encoded, Picture]],
    epoch: int,
    number: int,
    state: StreamState,
    ledger: _Ledger,
) -> StreamBatch:
    pixels = empty_buffer((len(given), plan.size, plan.size, 3))
    np.stack([picture.pixels for _, picture in given], out=pixels)
    ids = [int.from_bytes(bytes.fromhex(picture.sha256[:16]), "big", signed=True) for _, picture in given]
    return StreamBatch(
        pixels,
        tuple(_chosen(sample, plan.seed, epoch) for sample, _ in given),
        tuple(sample.key for sample, _ in given),
        np.asarray(ids, dtype=np.int64),
        epoch,
        number,
        state,
        dict(ledger.left_out),
    )


def _chosen(sample: _Encoded, seed: int, epoch: int) -> str:
    """Return one caption of a sample, drawn by (seed, epoch, key) wherever and whenever the sample is read."""
    if len(sample.captions) == 1:
        return sample.captions[0]
    return sample.captions[_entropy(seed, epoch, sample.key) % len(sample.captions)]


def _entropy(*parts: int | str) -> int:
    """Return 64 bits that the parts fix, on every machine and in every process."""
    text = ":".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def _check_readable(ledger: _Ledger, order: Sequence[Shard], max_bad: float) -> None:
    total = sum(shard.samples for shard in order)
    if ledger.left_out[UNREADABLE] > max_bad * total:
        raise ChimeraError(
            f"{ledger.left_out[UNREADABLE]:,} of {total:,} images of the shards can't be read, more than the "
            f"{max_bad:.1%} allowed; first {ledger.examples[UNREADABLE]}",
            "replace the damaged shards, or allow a larger share with --set stream_max_bad=...",
        )


def _nothing_left(ledger: _Ledger, order: Sequence[Shard]) -> ChimeraError:
    return ChimeraError(
        f"no sample of {order[0].path} and {len(order) - 1} more shards can be used: {_told(ledger)}",
        "shards need readable images with captions that are in neither dev nor test",
    )


def _note(ledger: _Ledger, order: Sequence[Shard], epoch: int) -> Note:
    total = sum(shard.samples for shard in order)
    return Note(f"stream, epoch {epoch}: of {total:,} samples left out: {_told(ledger)}", "warning")


def _told(ledger: _Ledger) -> str:
    counts = ledger.left_out.items()
    return ", ".join(f"{number:,} {reason} (first {ledger.examples[reason]})" for reason, number in counts)
