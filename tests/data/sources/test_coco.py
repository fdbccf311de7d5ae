"""COCO's captions: where photos and splits come from, and what is said of files that are none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_files import Seen, jpeg, write_photos

from chimera_cli.data.sources.coco import open_coco
from chimera_cli.errors import ChimeraError, UsageError

IDS = {"train": (10, 11, 12), "val": (20, 21)}


def file_name(year: str, split: str, identity: int) -> str:
    return f"{identity:012}.jpg" if year == "2017" else f"COCO_{split}{year}_{identity:012}.jpg"


def annotations(split: str, year: str = "2017") -> dict[str, Any]:
    """Return a captions_*.json in COCO's form, the captions not in the order of the images."""
    images = [
        {"license": 3, "file_name": file_name(year, split, identity), "coco_url": "c", "height": 9, "width": 12,
         "date_captured": "2013", "flickr_url": f"f{identity}", "id": identity}
        for identity in IDS[split]
    ]  # fmt: skip
    captions = [
        {"image_id": identity, "id": 9, "caption": f"{identity} number {index}\n"}
        for index in range(2)
        for identity in IDS[split]
    ]
    return {"info": {"year": 2017}, "licenses": [{"url": "u", "id": 1, "name": "n"}]} | {
        "images": images, "annotations": captions,
    }  # fmt: skip


def coco(root: Path, year: str = "2017", texts: str = "annotations", photos: str = ".") -> Path:
    (root / texts).mkdir(parents=True, exist_ok=True)
    for split in IDS:
        write_photos(root / photos / f"{split}{year}", [file_name(year, split, identity) for identity in IDS[split]])
        (root / texts / f"captions_{split}{year}.json").write_text(json.dumps(annotations(split, year)))
    return root


def splits(path: Path, change: Callable[[list[dict[str, Any]]], None] = lambda _images: None) -> Path:
    """Write a split file in Karpathy's form: 10 train, 11 restval, 12 test, 20 val, and one that is not here."""
    words = {10: "train", 11: "restval", 12: "test", 20: "val", 99: "train"}
    images = [
        {"filepath": "val2014", "sentids": [1], "filename": f"COCO_val2014_{identity:012}.jpg", "imgid": number,
         "split": word, "cocoid": identity,
         "sentences": [{"tokens": ["a"], "raw": "theirs", "imgid": number, "sentid": 1}]}
        for number, (identity, word) in enumerate(words.items())
    ]  # fmt: skip
    change(images)
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def look(origin: Path, **options: Any) -> Seen:
    seen = Seen()
    return seen.look(open_coco(origin, listener=seen.told.append, **options))


def check(seen: Seen, year: str = "2017") -> None:
    names = {
        f"{split}{year}/{file_name(year, split, identity)}": (identity, split)
        for split in IDS
        for identity in IDS[split]
    }
    assert list(seen.photos) == list(names)
    assert list(seen.photos.values()) == [jpeg(0), jpeg(1), jpeg(2), jpeg(0), jpeg(1)]
    for name, (identity, split) in names.items():
        assert seen.captions[name] == [f"{identity} number 0", f"{identity} number 1"]
        assert seen.splits[name] == {"train": "train", "val": "dev"}[split]
        assert seen.columns[name] == {
            "coco_id": identity, "file_name": file_name(year, split, identity), "license": 3,
            "flickr_url": f"f{identity}",
        }  # fmt: skip
    assert seen.corpus.licence.startswith("Photos belong to their Flickr owners.")


@pytest.mark.parametrize(
    ("year", "texts", "photos", "origin"),
    [
        ("2017", "annotations", ".", "."),
        ("2014", "annotations", ".", "."),
        ("2017", ".", ".", "."),
        ("2017", "annotations", "images", "."),
        ("2017", "annotations", ".", "annotations"),
        ("2017", "annotations_trainval2017", ".", "."),
    ],
)
def test_layouts(tmp_path: Path, year: str, texts: str, photos: str, origin: str) -> None:
    check(look(coco(tmp_path, year, texts, photos) / origin), year)


def test_images_elsewhere(tmp_path: Path) -> None:
    coco(tmp_path / "texts", photos="../photos")
    check(look(tmp_path / "texts", images=tmp_path / "photos"))
    with pytest.raises(ChimeraError, match="leads to no image"):
        look(tmp_path / "texts")
    with pytest.raises(UsageError, match="nowhere does not exist"):
        look(tmp_path / "texts", images=tmp_path / "nowhere")


def test_one_file_alone(tmp_path: Path) -> None:
    seen = look(coco(tmp_path) / "annotations" / "captions_val2017.json")
    assert set(seen.splits.values()) == {"dev"}
    assert len(seen.photos) == 2


def test_the_split_file_of_karpathy(tmp_path: Path) -> None:
    seen = look(coco(tmp_path), split_file=splits(tmp_path / "dataset_coco.json"))
    assert list(seen.splits.values()) == ["train", "train", "test", "dev", "unused"]
    assert "theirs" not in str(seen.captions)
    assert "1 of 5 images of the split file are not here" in seen.notes
    assert "1 images are not in the split file: they are unused" in seen.notes


def test_absent_photos_are_skipped_and_an_absent_folder_is_left_out(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "train2017" / "000000000011.jpg").unlink()
    seen = look(tmp_path)
    assert [(skipped.source_file, skipped.reason) for skipped in seen.corpus.skipped] == [
        ("train2017/000000000011.jpg", "no such file")
    ]
    assert len(seen.corpus.captions) == 8
    for path in (tmp_path / "train2017").iterdir():
        path.unlink()
    seen = look(tmp_path)
    assert len(seen.photos) == 2
    assert "captions_train2017.json: none of its 3 photos is here; left out" in seen.notes


def test_a_part_of_many_photos_is_found_wherever_it_begins(tmp_path: Path) -> None:
    """Of 400 photos the last of each four is there: the names that are tried at first are all absent."""
    names = [f"{number:012}.jpg" for number in range(400)]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    captions = [{"image_id": 3, "caption": "x"}]
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        value = {"images": images if split == "train2017" else [{"id": 999, "file_name": "gone.jpg"}]}
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(json.dumps(value | {"annotations": captions}))
    write_photos(tmp_path / "train2017", names[3::4])
    seen = look(tmp_path)
    assert len(seen.photos) == 100
    assert len(seen.corpus.skipped) == 300
    assert "captions_train2017.json" not in seen.notes
    assert "captions_val2017.json: none of its 1 photos is here; left out" in seen.notes


def test_captions_of_unknown_images_are_counted(tmp_path: Path) -> None:
    path = coco(tmp_path) / "annotations" / "captions_val2017.json"
    value = annotations("val")
    value["annotations"] += [{"image_id": 77, "id": 1, "caption": "x"}, {"image_id": 20, "id": 2, "caption": " "}]
    path.write_text(json.dumps(value))
    seen = look(tmp_path)
    assert "captions left out of images that the file does not name: 1 (first: captions_val2017.json" in seen.notes
    assert "captions left out that are empty or only spaces: 1" in seen.notes


def test_two_years_at_once_are_refused(tmp_path: Path) -> None:
    coco(coco(tmp_path), "2014")
    with pytest.raises(UsageError, match="the years have the same photos in other splits"):
        look(tmp_path)


def edited(**changes: Any) -> str:
    return json.dumps(annotations("val") | changes)


BROKEN = [
    ('{"images": [{"id"', "is not valid JSON"),
    ("[" * 100_000, "is not valid JSON"),
    ("[]", "has no list `images`"),
    (edited(images=[]), "has no list `images`"),
    (edited(annotations={}), "has no list `annotations`"),
    (edited(images=[{"id": 1}]), r"images\[0\] has no `id` or no `file_name`"),
    (edited(images=[{"id": 1, "file_name": "../../a.jpg"}]), r"images\[0\].*leads out of the folder"),
    (edited(images=[{"id": 1, "file_name": "/etc/passwd"}]), r"images\[0\].*leads out of the folder"),
    (edited(annotations=[{"image_id": 20, "bbox": []}]), r"annotations\[0\] has no `image_id` or no `caption`"),
    (edited(images=[{"id": 1, "file_name": "a.jpg"}] * 2), "the image 1 is in captions_val2017.json already"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = coco(tmp_path) / "annotations" / "captions_val2017.json"
    path.write_text(content)
    with pytest.raises(ChimeraError, match=message) as caught:
        look(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_names_without_a_split_and_folders_without_captions(tmp_path: Path) -> None:
    path = coco(tmp_path) / "annotations" / "captions_val2017.json"
    own = path.rename(tmp_path / "annotations" / "mine.json")
    with pytest.raises(UsageError, match=r"the name of .*mine\.json says no split"):
        look(own)
    (tmp_path / "deep" / "empty").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no captions_train"):
        look(tmp_path / "deep" / "empty")
    with pytest.raises(UsageError, match="nowhere does not exist"):
        look(tmp_path / "nowhere")


def test_a_split_file_without_ids(tmp_path: Path) -> None:
    path = splits(tmp_path / "dataset_coco.json", lambda images: images[2].pop("cocoid"))
    with pytest.raises(ChimeraError, match="does not give every image a `cocoid`"):
        look(coco(tmp_path), split_file=path)
