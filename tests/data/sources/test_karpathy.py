"""Karpathy's split files: with their photos, in place of Flickr8k's lists, and broken."""

import json
from pathlib import Path
from typing import Any

import pytest
from source_files import Seen, jpeg, write_photos

from chimera_cli.data.sources.flickr8k import KARPATHY, TOKENS, open_flickr8k
from chimera_cli.data.sources.karpathy import open_karpathy
from chimera_cli.errors import ChimeraError, UsageError

SPLITS = {"a.jpg": "train", "b.jpg": "restval", "c.jpg": "val", "d.jpg": "test"}


def entry(name: str, split: str, **fields: Any) -> dict[str, Any]:
    sentences = [
        {"tokens": ["a", "dog"], "raw": f" {name}  number {index} .", "imgid": 7, "sentid": index} for index in range(2)
    ]
    return {"sentids": [1, 2], "imgid": 7, "sentences": sentences, "split": split, "filename": name} | fields


def write(path: Path, images: Any, dataset: str = "flickr30k") -> Path:
    path.write_text(json.dumps({"images": images, "dataset": dataset}))
    return path


def dataset(root: Path, photos: str = "flickr30k-images") -> Path:
    write_photos(root / photos, list(SPLITS))
    return write(root / "dataset_flickr30k.json", [entry(*pair) for pair in SPLITS.items()])


def look(origin: Path, **options: Any) -> Seen:
    seen = Seen()
    return seen.look(open_karpathy(origin, listener=seen.told.append, **options))


@pytest.mark.parametrize("photos", [".", "Images", "flickr30k-images"])
def test_photos_beside_the_file(tmp_path: Path, photos: str) -> None:
    path = dataset(tmp_path, photos)
    for origin in (path, tmp_path):
        seen = look(origin)
        assert seen.photos == {name: jpeg(value) for value, name in enumerate(SPLITS)}
        assert seen.splits == {"a.jpg": "train", "b.jpg": "train", "c.jpg": "dev", "d.jpg": "test"}
        assert seen.captions["c.jpg"] == ["c.jpg number 0 .", "c.jpg number 1 ."]
        assert seen.columns["c.jpg"] == {"imgid": 7}
        assert "TACL" in seen.corpus.licence


def test_folders_of_coco_and_photos_elsewhere(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", ["val2014/a.jpg", "train2014/b.jpg"])
    images = [entry("a.jpg", "val", filepath="val2014", cocoid=3), entry("b.jpg", "train", filepath="train2014")]
    seen = look(write(tmp_path / "dataset_coco.json", images), images=tmp_path / "photos")
    assert seen.photos == {"val2014/a.jpg": jpeg(0), "train2014/b.jpg": jpeg(1)}
    assert seen.columns["val2014/a.jpg"] == {"imgid": 7, "coco_id": 3}


def test_absent_photos_are_skipped(tmp_path: Path) -> None:
    path = dataset(tmp_path)
    (tmp_path / "flickr30k-images" / "b.jpg").unlink()
    seen = look(path)
    assert list(seen.photos) == ["a.jpg", "c.jpg", "d.jpg"]
    assert [(skipped.source_file, skipped.reason) for skipped in seen.corpus.skipped] == [("b.jpg", "no such file")]


BROKEN = [
    ([], "has no list `images`"),
    ([{"split": "train"}], r"images\[0\] has no `filename`"),
    ([entry("a.jpg", "train"), entry("b.jpg", "holdout")], r"images\[1\]: 'holdout' is no split"),
    ([entry("../a.jpg", "train")], r"images\[0\].*leads out"),
    ([entry("a.jpg", "train", filepath="/etc")], r"images\[0\].*leads out"),
    ([entry("a.jpg", "train", filepath=7)], r"images\[0\]: `filepath` is no text"),
    ([entry("a.jpg", "train", sentences=[{"tokens": []}])], r"images\[0\]: `sentences` is no list"),
    ([entry("a.jpg", "train")] * 2, r"images\[1\]: a\.jpg is there already as images\[0\]"),
]


@pytest.mark.parametrize(("images", "message"), BROKEN)
def test_broken_entries_are_named(tmp_path: Path, images: Any, message: str) -> None:
    with pytest.raises(ChimeraError, match=rf"dataset_x\.json.*{message}") as caught:
        look(write(tmp_path / "dataset_x.json", images))
    assert caught.value.hint


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no dataset_\*\.json"):
        look(tmp_path)
    path = dataset(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ChimeraError, match="is not valid JSON"):
        look(path)


@pytest.mark.parametrize("tokens", [True, False])
def test_flickr8k_takes_it_in_place_of_its_lists_and_captions(tmp_path: Path, tokens: bool) -> None:
    write_photos(tmp_path / "Images", [*SPLITS, "unused.jpg"])
    write(tmp_path / KARPATHY, [entry(name, split) for name, split in SPLITS.items()], "flickr8k")
    if tokens:
        lines = [f"{name}#0\ttoken of {name}" for name in (*SPLITS, "unused.jpg")]
        (tmp_path / TOKENS).write_text("\n".join(lines))
    seen = Seen()
    seen.look(open_flickr8k(tmp_path, seen.told.append))
    assert {name: seen.splits[name] for name in SPLITS} == {
        "a.jpg": "train", "b.jpg": "train", "c.jpg": "dev", "d.jpg": "test",
    }  # fmt: skip
    assert "splits come from dataset_flickr8k.json, which has the same" in seen.notes
    if tokens:
        assert seen.splits["unused.jpg"] == "unused"
        assert seen.captions["a.jpg"] == ["token of a.jpg"]
    else:
        assert "unused.jpg" not in seen.splits
        assert seen.captions["a.jpg"] == ["a.jpg number 0 .", "a.jpg number 1 ."]
    (tmp_path / "Images" / "d.jpg").unlink()
    with pytest.raises(ChimeraError, match=r"d\.jpg"), open_flickr8k(tmp_path):
        pass
