"""Small files of all kinds that the tests of the sources read: photos, tables, shards; and a look at a corpus."""

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from PIL import Image

from chimera_cli.data.sources.corpus import Corpus
from chimera_cli.events import Event, Note

Members = Sequence[tuple[str, bytes]]


def jpeg(value: int) -> bytes:
    """Return a photo of 12 x 9 pixels in a red of its own."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_photos(folder: Path, names: Sequence[str]) -> None:
    """Write one photo per name, the first with the value 0."""
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(value))


def write_tar(path: Path, members: Members) -> Path:
    """Write a shard with these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _with_pax(**facts: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (("a.jpg", {}), ("b.jpg", {f"GNU.sparse.{key}": value for key, value in facts.items()})):
            info = tarfile.TarInfo(name)
            info.pax_headers = headers
            archive.addfile(info)
    return buffer.getvalue()


def _with_long_names(count: int, size: int = 1) -> bytes:
    """Return a shard that begins with headers of long names, each for the next, of `size` bytes as they say."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = b"L", size
    return (info.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * count + _with_pax()


# What tarfile lets through as ValueError, RecursionError or OverflowError.
HOSTILE_SHARDS: Mapping[str, Callable[[], bytes]] = {
    "a sparse size that is no number": lambda: _with_pax(size="abc"),
    "a sparse map that is not there": lambda: _with_pax(major="1", minor="0"),
    "long names without end": lambda: _with_long_names(3000),
    "a name longer than any memory": lambda: _with_long_names(1, 1 << 70),
}


class Seen:
    """What a source yields while it is open: the corpus, its photos' bytes by name, its captions by name, its notes."""

    def __init__(self) -> None:
        self.told: list[Event] = []

    def look(self, opened: AbstractContextManager[Corpus]) -> "Seen":
        """Enter `opened`, read every photo and leave."""
        with opened as corpus:
            self.corpus = corpus
            names = [item.source_file for item in corpus.items]
            self.photos: Mapping[str, bytes] = {name: read() for name, read in zip(names, corpus.reads, strict=True)}
        self.splits = {item.source_file: item.split for item in corpus.items}
        self.columns = {item.source_file: dict(item.columns) for item in corpus.items}
        self.captions: dict[str, list[str]] = {name: [] for name in names}
        for caption in corpus.captions:
            assert caption.index == len(self.captions[names[caption.image]])
            self.captions[names[caption.image]].append(caption.text)
        return self

    @property
    def notes(self) -> str:
        """Return all sentences told, one per line."""
        return "\n".join(event.message for event in self.told if isinstance(event, Note))
