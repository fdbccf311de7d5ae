"""`chimera data` below the command line: sources become packs, twice is once, and senseless words are refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chimera_cli.data.pack import open_pack
from chimera_cli.data.sources.flickr8k import LISTS, TOKENS
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note
from chimera_cli.services import data

SPLIT_OF = {f"{number:02d}.jpg": ("train", "dev", "test")[number % 3] for number in range(12)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder in the official layout: twelve photos 30 x 20, each in a grey of its own."""
    photos, texts = tmp_path / "source" / "Flicker8k_Dataset", tmp_path / "source" / "Flickr8k_text"
    photos.mkdir(parents=True)
    texts.mkdir()
    for number, name in enumerate(SPLIT_OF):
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20), (20 * number,) * 3).save(buffer, "JPEG")
        (photos / name).write_bytes(buffer.getvalue())
    lines = [f"{name}#{index}\tcaption {index} of {name}" for name in SPLIT_OF for index in range(5)]
    (texts / TOKENS).write_text("\n".join(lines))
    for split, file in LISTS.items():
        (texts / file).write_text("\n".join(name for name, its in SPLIT_OF.items() if its == split))
    return tmp_path / "source"


def test_flickr8k_becomes_a_pack_and_twice_is_once(tmp_path: Path, source: Path) -> None:
    first = data.prepare("flickr8k", home=tmp_path, origin=source, size=16)
    assert not first.unchanged
    pack = open_pack(tmp_path / "data", "flickr8k")
    names = pack.column("source_file")
    assert [SPLIT_OF[names[index]] for index in pack.split_indices("dev")] == ["dev"] * 4
    for index, name in enumerate(names):
        assert np.abs(pack.images[index].astype(int) - 20 * int(name[:2])).max() <= 1
        assert name in "".join(text for text in pack.captions(SPLIT_OF[name]).texts)
    assert (pack.column("width")[0], pack.column("height")[0]) == (30, 20)
    again = data.prepare("flickr8k", home=tmp_path, origin=source, size=16)
    assert again.unchanged
    assert again.pack.manifest == pack.manifest


def test_other_options_make_another_pack(tmp_path: Path, source: Path) -> None:
    first = data.prepare("flickr8k", home=tmp_path, origin=source, size=16)
    other = data.prepare("flickr8k", home=tmp_path, origin=source, size=24)
    assert not other.unchanged
    assert other.pack.fingerprint != first.pack.fingerprint
    assert [pack["size"] for pack in data.info(tmp_path)["packs"]] == [24]
    data.prepare("flickr8k", home=tmp_path, origin=source, size=16, name="small")
    assert [pack["name"] for pack in data.info(tmp_path)["packs"]] == ["flickr8k", "small"]


def test_a_damaged_photo_is_skipped_when_that_is_allowed(tmp_path: Path, source: Path) -> None:
    (source / "Flicker8k_Dataset" / "04.jpg").write_bytes(b"")
    photo = source / "Flicker8k_Dataset" / "05.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    with pytest.raises(ChimeraError, match=r"2 of 12 images can't be read.*04\.jpg: the file is empty"):
        data.prepare("flickr8k", home=tmp_path, origin=source, size=16)
    assert data.info(tmp_path) == {"packs": []}
    told: list[Event] = []
    made = data.prepare("flickr8k", home=tmp_path, origin=source, size=16, max_bad=0.2, listener=told.append)
    assert len(made.pack) == 10
    assert [entry["source_file"] for entry in made.pack.manifest["skipped"]] == ["04.jpg", "05.jpg"]
    assert any(isinstance(event, Note) and "skipped 2 unreadable of 12 images" in event.message for event in told)


def test_without_an_origin_the_two_archives_are_downloaded(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from chimera_cli.data.sources import download as module

    asked = []

    def serve(url: str, target: Path, _listener: object) -> Path:
        asked.append(url.rpartition("/")[2])
        folder = {"Flickr8k_Dataset.zip": "Flicker8k_Dataset", "Flickr8k_text.zip": "Flickr8k_text"}[target.name]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.make_archive(str(target.with_suffix("")), "zip", source, folder)
        return target

    monkeypatch.setattr(module, "download", serve)
    with pytest.raises(ChimeraError, match="not the whole of Flickr8k: 60 caption lines"):
        data.prepare("flickr8k", home=tmp_path)
    assert sorted(asked) == ["Flickr8k_Dataset.zip", "Flickr8k_text.zip"]
    made = data.prepare("flickr8k", home=tmp_path, origin=tmp_path / "data" / "downloads" / "flickr8k", size=16)
    assert len(made.pack) == 12


def test_toy_verifies_and_shows_itself(tmp_path: Path) -> None:
    made = data.prepare("toy", home=tmp_path, size=32)
    assert made.pack.manifest["splits"]["dev"] == {"images": 300, "captions": 1500}
    assert data.prepare("toy", home=tmp_path, size=32).unchanged
    assert data.verify(tmp_path, "toy")["problems"] == []
    sheet = data.preview(tmp_path, "toy", tmp_path / "sheet.png")
    with Image.open(sheet) as image:
        assert image.size == (6 * 210 + 10, 4 * 272 + 10)
    with pytest.raises(UsageError, match="no ending of an image format"):
        data.preview(tmp_path, "toy", tmp_path / "sheet.xyz")
    with pytest.raises(ChimeraError, match=r"absent/sheet\.png can't be written"):
        data.preview(tmp_path, "toy", tmp_path / "absent" / "sheet.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"source": "coco"}, "no source 'coco'"),
        ({"source": "toy", "size": 8}, "--size 8"),
        ({"source": "toy", "max_bad": 1.5}, "--max-bad 1.5"),
        ({"source": "toy", "name": "a/b"}, "'a/b' can't be the name"),
        ({"source": "toy", "origin": Path()}, "toy .* takes no --from"),
        ({"source": "flickr8k", "origin": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_words_that_can_not_be_meant(tmp_path: Path, words: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        data.prepare(home=tmp_path, **words)  # type: ignore[arg-type]
    assert caught.value.hint
    assert not list(tmp_path.glob("data/[!.]*"))
