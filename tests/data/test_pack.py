"""Packs: what is written is what is read, nobody ever sees half of one, and damage is found and named."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera_cli.data import pack as pack_module
from chimera_cli.data.pack import (
    Caption,
    Item,
    Pack,
    Picture,
    Skipped,
    Unreadable,
    default_pack,
    list_packs,
    open_pack,
    split_name,
    verify_pack,
    write_pack,
)
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


def test_unreadable_images_are_left_out_and_listed(tmp_path: Path) -> None:
    told: list[Event] = []
    stream = [picture(0), Unreadable("cut"), picture(2), picture(3), picture(4)]
    pack = make(tmp_path, images=stream, max_bad=0.2, skipped=[Skipped("x.jpg", "no caption")], listener=told.append)
    assert pack.images[:, 0, 0, 0].tolist() == [0, 2, 3, 4]
    assert pack.split_indices("train").tolist() == [2]
    assert pack.captions("train").texts == ("d zero", "d one", "d two")
    assert pack.manifest["skipped"] == [
        {"source_file": "x.jpg", "reason": "no caption"},
        {"source_file": "1.jpg", "reason": "cut"},
    ]
    assert any(isinstance(event, Note) and "1.jpg: cut" in event.message for event in told)
    assert verify_pack(pack) == []


def test_too_many_unreadable_images_are_an_error(tmp_path: Path) -> None:
    stream = [picture(0), Unreadable("cut"), picture(2), picture(3), picture(4)]
    with pytest.raises(ChimeraError, match=r"1 of 5 images can't be read.*1\.jpg: cut") as caught:
        make(tmp_path, images=stream, max_bad=0.19)
    assert "--max-bad" in caught.value.hint
    assert visible(tmp_path) == []


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


def test_the_same_source_again_changes_nothing(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("the images were read again")
        yield

    told: list[Event] = []
    first = make(tmp_path, source_digest="d1")
    before = {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()}
    again = make(tmp_path, images=never(), source_digest="d1", listener=told.append)
    assert again.manifest == first.manifest
    assert {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()} == before
    assert any(isinstance(event, Note) and "up to date" in event.message for event in told)


def test_a_touched_source_with_the_same_content_keeps_the_pack(tmp_path: Path) -> None:
    first = make(tmp_path, source_digest="d1")
    again = make(tmp_path, source_digest="d2")
    assert again.manifest["created_at"] == first.manifest["created_at"]
    assert open_pack(tmp_path, "tiny").manifest["source_digest"] == "d2"


def test_other_content_replaces_the_pack_and_a_damaged_one_is_made_anew(tmp_path: Path) -> None:
    make(tmp_path, source_digest="d1")
    replaced = make(tmp_path, images=[picture(9)] * 5, source_digest="d2")
    assert replaced.images[0, 0, 0, 0] == 9
    (replaced.path / "images.npy").write_bytes(b"")
    assert make(tmp_path, images=[picture(9)] * 5, source_digest="d2").images[4, 0, 0, 0] == 9
    assert visible(tmp_path) == ["tiny"]


def test_leftovers_of_a_killed_writer_are_cleared_and_its_old_pack_comes_back(tmp_path: Path) -> None:
    first = make(tmp_path, source_digest="d1")
    first.path.rename(tmp_path / ".tiny.old")
    (tmp_path / ".tiny.partial").mkdir()
    (tmp_path / ".tiny.partial" / "images.npy").write_bytes(b"half")
    assert list_packs(tmp_path) == []
    assert make(tmp_path, source_digest="d1").manifest == first.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


def test_two_writers_never_mix(tmp_path: Path) -> None:
    gate = threading.Barrier(2)

    def writer(value: int) -> None:
        gate.wait()
        make(tmp_path, images=(picture(value) for _ in range(5)))

    threads = [threading.Thread(target=writer, args=(value,)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pack = open_pack(tmp_path, "tiny")
    assert len(np.unique(pack.images)) == 1
    assert verify_pack(pack) == []


def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path: Path) -> None:
    # The limit on a file's size stands in for the full disk: real writes that really fail, halfway into images.npy.
    script = f"""
import resource, signal, numpy as np
from pathlib import Path
from chimera_cli.data.pack import Item, Picture, write_pack
from chimera_cli.errors import ChimeraError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
image = Picture(np.zeros((64, 64, 3), dtype=np.uint8), "", 64, 64)
try:
    items = [Item("i", "train")] * 40
    write_pack(Path({str(tmp_path)!r}), name="p", source="s", images=[image] * 40, items=items, size=64)
except ChimeraError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "can't be written: File too large" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [".p.lock"]


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ChimeraError, match="free and the pack needs"):
        make(tmp_path)


def test_an_error_number_becomes_a_sentence_with_its_hint(tmp_path: Path) -> None:
    def full() -> Any:
        yield picture(0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ChimeraError, match="No space left on device") as caught:
        make(tmp_path, images=full())
    assert "CHIMERA_HOME" in caught.value.hint
    assert visible(tmp_path) == []


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(ChimeraError, match="data"):
        make(tmp_path / "data")


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


def visible(data_dir: Path) -> list[str]:
    return sorted(path.name for path in data_dir.iterdir() if not path.name.endswith(".lock"))
