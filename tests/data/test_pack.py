"""Packs: what is written is what is read, nobody ever sees half of one, and damage is found and named."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera_cli.data.pack import (
    Caption,
    Item,
    Pack,
    Picture,
    default_pack,
    list_packs,
    lock_path,
    open_pack,
    split_name,
    verify_pack,
)
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note

SIZE = 8
SPLITS = ("test", "train", "dev", "train", "unused")


def picture(value: int) -> Picture:
    return Picture(np.full((SIZE, SIZE, 3), value, dtype=np.uint8), f"sha-{value}", 20, 10)


def make(data_dir: Path, name: str = "tiny", images: Any = None, **changes: Any) -> Pack:
    """Write five images whose captions come in a muddled order; the third has none, the fourth three."""
    captions = [Caption(3, 1, "d one"), Caption(0, 0, "a zero"), Caption(3, 0, "d zero"), Caption(1, 1, "b one")]
    captions += [Caption(1, 0, "b zero"), Caption(4, 0, "e zero"), Caption(3, 2, "d two")]
    options: dict[str, Any] = {
        "source": "flickr8k",
        "items": [Item(f"{number}.jpg", split, {"label": split[0]}) for number, split in enumerate(SPLITS)],
        "captions": captions,
        "size": SIZE,
    }
    stream = images if images is not None else [picture(value) for value in range(5)]
    return write_pack(data_dir, name=name, images=stream, **(options | changes))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    make(tmp_path)
    pack = open_pack(tmp_path, "tiny")
    assert len(pack) == 5
    assert pack.size == SIZE
    assert pack.images.shape == (5, SIZE, SIZE, 3)
    assert isinstance(pack.images, np.memmap)
    assert pack.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert pack.split_indices("train").tolist() == [1, 3]
    assert pack.split_indices("train").dtype == np.int64
    assert pack.column("label") == ["t", "t", "d", "t", "u"]
    assert pack.column("width") == [20] * 5
    assert pack.manifest["splits"] == {
        "train": {"images": 2, "captions": 5},
        "dev": {"images": 1, "captions": 0},
        "test": {"images": 1, "captions": 1},
        "unused": {"images": 1, "captions": 1},
    }


def test_captions_stand_in_the_order_of_the_split(tmp_path: Path) -> None:
    table = make(tmp_path).captions("train")
    assert table.texts == ("b zero", "b one", "d zero", "d one", "d two")
    assert table.image_positions.tolist() == [0, 0, 1, 1, 1]
    assert table.by_image() == [range(2), range(2, 5)]
    assert len(table) == 5


def test_images_without_captions_keep_their_place(tmp_path: Path) -> None:
    assert make(tmp_path).captions("dev").by_image() == [range(0)]
    bare = make(tmp_path, "bare", captions=())
    assert bare.captions("train").by_image() == [range(0), range(0)]
    assert bare.manifest["caption_words"] is None


def test_identical_sources_share_an_id(tmp_path: Path) -> None:
    pack = make(tmp_path, images=[picture(value) for value in (0, 7, 2, 7, 4)])
    assert pack.image_ids("train").tolist() == [1, 1]
    assert pack.image_ids("dev").tolist() == [2]


def test_the_fingerprint_names_the_content_alone(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", "one"), make(tmp_path / "b", "two", source="toy", fit="pad")
    assert first.fingerprint == second.fingerprint
    changes: list[dict[str, Any]] = [
        {"images": [picture(value) for value in (0, 1, 2, 3, 5)]},
        {"captions": [Caption(0, 0, "other")]},
        {"items": [Item(f"{number}.jpg", "train") for number in range(5)]},
    ]
    for number, change in enumerate(changes):
        assert make(tmp_path / str(number), **change).fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["images.npy", "items.parquet", "captions.parquet"])
def test_a_cut_file_is_named(tmp_path: Path, name: str) -> None:
    path = make(tmp_path).path / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ChimeraError, match=name) as caught:
        open_pack(tmp_path, "tiny")
    assert "chimera data verify tiny" in caught.value.hint
    assert verify_pack(open_pack(tmp_path, "tiny", check=False)) != []


def test_a_header_that_says_otherwise_is_found(tmp_path: Path) -> None:
    path = make(tmp_path).path / "images.npy"
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"(5, 8, 8, 3)", b"(5, 8, 3, 8)"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ChimeraError, match="header says otherwise"):
        open_pack(tmp_path, "tiny")


def test_verify_finds_one_changed_byte(tmp_path: Path) -> None:
    pack = make(tmp_path)
    path = pack.path / "images.npy"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    problems = verify_pack(open_pack(tmp_path, "tiny"))
    assert len(problems) == 1
    assert "images.npy does not have the SHA-256" in problems[0]


def test_a_copied_pack_opens_again_once_it_is_verified(tmp_path: Path) -> None:
    os.utime(make(tmp_path).path / "images.npy", ns=(1, 1))
    with pytest.raises(ChimeraError, match="modified or copied"):
        open_pack(tmp_path, "tiny")
    assert verify_pack(open_pack(tmp_path, "tiny", check=False)) == []
    assert len(open_pack(tmp_path, "tiny")) == 5


def test_a_broken_manifest_is_named(tmp_path: Path) -> None:
    manifest = make(tmp_path).path / "manifest.json"
    manifest.write_text('{"schema_version": 1}')
    with pytest.raises(ChimeraError, match=r"manifest\.json lacks .*fingerprint"):
        open_pack(tmp_path, "tiny")


@pytest.mark.parametrize(
    "keys", [("licence",), ("files", "captions.parquet"), ("files", "images.npy", "mtime_ns"), ("splits", "dev")]
)
def test_all_that_is_read_of_a_manifest_is_checked(tmp_path: Path, keys: tuple[str, ...]) -> None:
    path = make(tmp_path).path / "manifest.json"
    manifest = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    for broken in ([], None):
        inner[keys[-1]] = broken
        path.write_text(json.dumps(manifest))
        with pytest.raises(ChimeraError, match=f"lacks {re.escape('.'.join(keys))}"):
            open_pack(tmp_path, "tiny", check=False)


def test_a_broken_pack_is_in_no_others_way(tmp_path: Path) -> None:
    make(tmp_path, "good")
    (make(tmp_path, "bad").path / "manifest.json").write_text("{")
    told: list[Event] = []
    assert [pack.name for pack in list_packs(tmp_path, told.append)] == ["good"]
    (note,) = told
    assert isinstance(note, Note)
    assert (note.level, "bad is left out" in note.message) == ("warning", True)
    assert getattr(default_pack(tmp_path), "name", None) == "good"


def test_a_pack_never_mixes_two_contents(tmp_path: Path) -> None:
    before = make(tmp_path)
    kept = before.images
    opened = open_pack(tmp_path, "tiny")
    make(tmp_path, images=[picture(9)] * 5, captions=())
    assert kept[4, 0, 0, 0] == 4
    for read in (lambda: opened.images, lambda: opened.split_indices("train"), lambda: before.captions("train")):
        with pytest.raises(ChimeraError, match="the pack tiny was replaced while it was read"):
            read()
    with pytest.raises(ChimeraError, match="replaced"):
        verify_pack(before)
    shutil.rmtree(before.path)
    with pytest.raises(ChimeraError, match="replaced"):
        _ = opened.images


def test_a_touched_pack_is_still_the_same(tmp_path: Path) -> None:
    first = make(tmp_path, source_digest="d1")
    make(tmp_path, source_digest="d2")
    assert first.images.shape[0] == 5
    assert verify_pack(first) == []


def test_nobody_writes_what_is_being_verified(tmp_path: Path) -> None:
    pack = make(tmp_path)
    states: list[bool] = []

    def look(event: Event) -> None:
        with lock_path(tmp_path, "tiny").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                states.append(False)
            except BlockingIOError:
                states.append(True)

    assert verify_pack(pack, look) == []
    assert states
    assert all(states)


def test_an_unknown_name_brings_the_near_ones(tmp_path: Path) -> None:
    make(tmp_path, "flickr8k")
    with pytest.raises(UsageError, match="no pack 'flicker8k'") as caught:
        open_pack(tmp_path, "flicker8k")
    assert "flickr8k" in caught.value.hint
    for name in ("../x", ".hidden", "", "downloads"):
        with pytest.raises(UsageError, match="can't be the name"):
            make(tmp_path, name)


def test_the_default_is_the_newest_pack_that_is_no_toy(tmp_path: Path) -> None:
    assert default_pack(tmp_path) is None
    make(tmp_path, "t1", source="toy")
    assert getattr(default_pack(tmp_path), "name", None) == "t1"
    make(tmp_path, "z-old")
    make(tmp_path, "a-new")
    make(tmp_path, "t2", source="toy")
    assert getattr(default_pack(tmp_path), "name", None) == "a-new"


def test_split_names_have_aliases() -> None:
    assert [split_name(word) for word in ("val", "Validation", "dev", "TEST")] == ["dev", "dev", "dev", "test"]
    with pytest.raises(UsageError, match="no split 'eval'"):
        split_name("eval")


def test_unknown_columns_and_empty_splits_are_usage_errors(tmp_path: Path) -> None:
    pack = make(tmp_path, items=[Item(f"{number}.jpg", "train") for number in range(5)])
    with pytest.raises(UsageError, match="no images in the split 'test'"):
        pack.split_indices("test")
    with pytest.raises(UsageError, match="no column 'label'"):
        pack.column("label")
