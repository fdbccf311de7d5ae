"""`chimera data` below the command line: sources become packs, twice is once, and senseless words are refused."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chimera_cli.data.pack import Pack, open_pack
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


@pytest.mark.parametrize("inside", [".", "Flicker8k_Dataset"])
def test_a_source_where_the_pack_would_go_is_refused_and_stays(tmp_path: Path, source: Path, inside: str) -> None:
    own = tmp_path / "data" / "own"
    own.parent.mkdir()
    source.rename(own)
    before = sorted(own.rglob("*"))
    (tmp_path / "link").symlink_to(own / inside)
    for origin in (own / inside, tmp_path / "link"):
        with pytest.raises(UsageError, match=r"--from .* lies in .*own, where the pack goes") as caught:
            data.prepare("flickr8k", home=tmp_path, origin=origin, name="own", size=16)
        assert "--name" in caught.value.hint
    table = tmp_path / "table.csv"
    table.write_text("image\n00.jpg\n")
    options = data.SourceOptions(images=own / "Flicker8k_Dataset")
    with pytest.raises(UsageError, match=r"--images .* lies in .*own, where the pack goes"):
        data.prepare("table", home=tmp_path, origin=table, name="own", size=16, options=options)
    assert sorted(own.rglob("*")) == before
    assert len(data.prepare("flickr8k", home=tmp_path, origin=own, size=16).pack) == 12


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
        ({"source": "imagenet"}, "no source 'imagenet'"),
        ({"source": "coco"}, "coco needs --from"),
        ({"source": "table"}, "table needs --from"),
        (
            {"source": "flickr8k", "options": data.SourceOptions(caption_column="x")},
            "flickr8k takes no --caption-column",
        ),
        ({"source": "webdataset", "options": data.SourceOptions(images=Path())}, "webdataset takes no --images"),
        ({"source": "toy", "options": data.SourceOptions(split_seed=0)}, "toy takes no --split-seed"),
        ({"source": "toy", "max_pixels": 0}, "--max-pixels 0"),
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


# ---- sets of one's own ----------------------------------------------------------------------------------------------


def jpeg(value: int, size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with a table, shards, COCO's and Karpathy's files, all of the same twenty photos."""
    root = tmp_path / "own"
    (root / "train2017").mkdir(parents=True)
    names = [f"{number:02}.jpg" for number in range(20)]
    for number, name in enumerate(names):
        (root / "train2017" / name).write_bytes(jpeg(10 * number))
    lines = [f"train2017/{name},photo {number},{number % 3}" for number, name in enumerate(names)]
    (root / "My table (1).csv").write_text("\n".join(["image,caption,kind", *lines]))
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    captions = [{"image_id": number, "caption": f"photo {number}"} for number in range(20)]
    (root / "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
    entries = [
        {"filename": name, "split": ["train", "val"][number % 2], "sentences": [{"raw": f"photo {number}"}]}
        for number, name in enumerate(names)
    ]
    (root / "dataset_mine.json").write_text(json.dumps({"images": entries}))
    with tarfile.open(root / "00000.tar", "w") as archive:
        for number, name in enumerate(names):
            archive.add(root / "train2017" / name, name)
            caption = tarfile.TarInfo(f"{number:02}.txt")
            caption.size = len(f"photo {number}")
            archive.addfile(caption, io.BytesIO(f"photo {number}".encode()))
    return root


SETS = [
    ("table", "My table (1).csv", "My-table-1"),
    ("webdataset", "*.tar", "own"),
    ("webdataset", "00000.tar", "00000"),
    ("coco", ".", "coco"),
    ("karpathy", "dataset_mine.json", "dataset_mine"),
]


@pytest.mark.parametrize(("source", "origin", "name"), SETS)
def test_every_source_makes_the_same_pixels_and_captions_and_twice_is_once(
    tmp_path: Path, own: Path, source: str, origin: str, name: str
) -> None:
    made = data.prepare(source, home=tmp_path, origin=own / origin, size=16)
    assert made.pack.name == name
    assert made.pack.manifest["source"] == source
    captions = {}
    for split in ("train", "dev", "test"):
        if made.pack.manifest["splits"][split]["images"]:
            table, indices = made.pack.captions(split), made.pack.split_indices(split)
            captions |= dict(zip(indices[table.image_positions].tolist(), table.texts, strict=True))
    for number in range(20):
        assert captions[number] == f"photo {number}"
        assert np.abs(made.pack.images[number].astype(int) - 10 * number).max() <= 1
    again = data.prepare(source, home=tmp_path, origin=own / origin, size=16)
    assert again.unchanged
    assert again.pack.manifest == made.pack.manifest


def test_drawn_splits_follow_seed_and_shares_and_keep_twins_together(tmp_path: Path, own: Path) -> None:
    table = own / "My table (1).csv"
    with table.open("a") as file:
        for number in range(20):
            (own / f"twin-{number}.jpg").write_bytes(jpeg(10 * number))
            file.write(f"\ntwin-{number}.jpg,twin,0")

    def prepare(**options: Any) -> data.PrepareResult:
        return data.prepare(
            "table", home=tmp_path, origin=table, size=16, name="own", options=data.SourceOptions(**options)
        )

    first = prepare(dev_share=0.25)
    assert {split: first.pack.manifest["splits"][split]["images"] for split in ("train", "dev", "test")} == {
        "train": 26, "dev": 10, "test": 4,
    }  # fmt: skip
    splits = dict(zip(first.pack.column("source_file"), first.pack.column("split"), strict=True))
    assert all(splits[f"train2017/{number:02}.jpg"] == splits[f"twin-{number}.jpg"] for number in range(20))
    assert data.describe(first.pack)["leakage"] == []
    assert prepare(dev_share=0.25, split_seed=0).unchanged
    other = prepare(dev_share=0.25, split_seed=1)
    assert not other.unchanged
    assert other.pack.column("split") != first.pack.column("split")
    with pytest.raises(UsageError, match="can't be drawn from one set"):
        prepare(dev_share=0.7, test_share=0.7)


def test_absent_photos_are_allowed_up_to_a_share_and_told_with_reasons(tmp_path: Path, own: Path) -> None:
    (own / "train2017" / "03.jpg").unlink()
    (own / "train2017" / "04.jpg").write_bytes(b"no photo")
    table = own / "My table (1).csv"
    with pytest.raises(
        ChimeraError, match=r"1 of 20 images are not there, more than the 1\.0% allowed; first train2017/03"
    ):
        data.prepare("table", home=tmp_path, origin=table, size=16)
    told: list[Event] = []
    made = data.prepare("table", home=tmp_path, origin=table, size=16, max_bad=0.1, listener=told.append)
    absent, damaged = data.describe(made.pack)["skipped_reasons"].items()
    assert absent == ("no such file", 1)
    assert damaged[0].startswith("not an image")
    assert any(
        isinstance(event, Note) and "1 of 20 images are not there and left out" in event.message for event in told
    )


def test_an_image_of_too_many_pixels_is_unreadable(tmp_path: Path, own: Path) -> None:
    (own / "train2017" / "03.jpg").write_bytes(jpeg(9, (400, 300)))
    table = own / "My table (1).csv"
    with pytest.raises(ChimeraError, match=r"1 of 20 images can't be read.*03\.jpg.*100,000"):
        data.prepare("table", home=tmp_path, origin=table, size=16, max_pixels=100_000)
    assert len(data.prepare("table", home=tmp_path, origin=table, size=16).pack) == 20


def test_duplicates_across_given_splits_are_told(tmp_path: Path, own: Path) -> None:
    rows = ["image,split", "train2017/00.jpg,train", "train2017/01.jpg,val", "twin.jpg,test"]
    (own / "twin.jpg").write_bytes(jpeg(0))
    (own / "set.csv").write_text("\n".join(rows))
    told: list[Event] = []
    made = data.prepare("table", home=tmp_path, origin=own / "set.csv", size=16, listener=told.append)
    assert [entry["files"] for entry in data.describe(made.pack)["leakage"]] == [
        [["train2017/00.jpg", "train"], ["twin.jpg", "test"]]
    ]
    assert any(isinstance(event, Note) and event.level == "warning" and "twin.jpg" in event.message for event in told)


@pytest.mark.flickr8k
def test_the_real_set_through_a_table_is_the_same(tmp_path: Path, flickr8k: Path) -> None:
    """The first 200 photos of the official captions, as a CSV over the same files."""
    tokens = (flickr8k / "Flickr8k_text" / TOKENS).read_text(encoding="utf-8").splitlines()
    names = sorted({line.partition("#")[0] for line in tokens})[:200]
    source, texts = tmp_path / "source" / "Flicker8k_Dataset", tmp_path / "source" / "Flickr8k_text"
    source.mkdir(parents=True)
    texts.mkdir()
    for name in names:
        (source / name).symlink_to(flickr8k / "Flicker8k_Dataset" / name)
    lines = [line for line in tokens if line.partition("#")[0] in set(names)]
    (texts / TOKENS).write_text("\n".join(lines), encoding="utf-8")
    split_of = {}
    for split, file in LISTS.items():
        official = set((flickr8k / "Flickr8k_text" / file).read_text(encoding="utf-8").split())
        own = [name for name in names if name in official]
        (texts / file).write_text("\n".join(own), encoding="utf-8")
        split_of |= dict.fromkeys(own, split)
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(line.partition("#")[0], line.partition("\t")[2]) for line in lines]
        csv.writer(file).writerows(
            [("image", "caption", "split"), *((name, text, split_of.get(name, "")) for name, text in rows)]
        )
    one = data.prepare("flickr8k", home=tmp_path, origin=tmp_path / "source", size=64).pack
    other = data.prepare(
        "table", home=tmp_path, origin=tmp_path / "table.csv", size=64, options=data.SourceOptions(images=source)
    ).pack
    places = {name: index for index, name in enumerate(other.column("source_file"))}
    order = [places[name] for name in one.column("source_file")]
    assert len(order) == 200
    np.testing.assert_array_equal(one.images, other.images[order])
    assert one.column("split") == [other.column("split")[index] for index in order]
    assert _captions_by_file(one) == _captions_by_file(other)


def _captions_by_file(pack: Pack) -> dict[str, list[str]]:
    names = pack.column("source_file")
    captions: dict[str, list[str]] = {}
    for split in ("train", "dev", "test"):
        table, indices = pack.captions(split), pack.split_indices(split)
        for position, text in zip(table.image_positions.tolist(), table.texts, strict=True):
            captions.setdefault(names[indices[position]], []).append(text)
    return captions
