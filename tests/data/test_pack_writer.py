"""Writing packs: the whole or nothing, whoever is killed or beside us; splits, leakage, and no more memory than due."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera_cli.data import pack_writer
from chimera_cli.data.pack import (
    Caption,
    Item,
    Pack,
    Picture,
    Skipped,
    Unreadable,
    list_packs,
    open_pack,
    pack_names,
    verify_pack,
)
from chimera_cli.data.pack_writer import SplitRule, write_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note
from chimera_cli.runs import content_hash

SIZE = 8
SPLITS = ("test", "train", "dev", "train", "unused")


def picture(value: int, sha256: str | None = None) -> Picture:
    return Picture(np.full((SIZE, SIZE, 3), value, dtype=np.uint8), sha256 or f"sha-{value}", 20, 10)


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


def unsplit(data_dir: Path, contents: list[str], rule: SplitRule, given: dict[int, str] | None = None) -> Pack:
    """Write one image per content, named by it and its place; all but the `given` ones are left to the rule."""
    items = [Item(f"{content}-{place}", (given or {}).get(place, "")) for place, content in enumerate(contents)]
    stream = [picture(place % 250, content) for place, content in enumerate(contents)]
    return write_pack(data_dir, name="p", source="s", images=stream, items=items, size=SIZE, split_rule=rule)


def notes(told: list[Event]) -> list[str]:
    return [event.message for event in told if isinstance(event, Note)]


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


def never() -> Any:
    raise AssertionError("the images were read")
    yield


def test_what_is_no_pack_is_never_replaced(tmp_path: Path) -> None:
    photos = tmp_path / "mine"
    photos.mkdir()
    (photos / "a.jpg").write_text("all I have")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / "images.npy").write_text("embeddings of my own")
    (tmp_path / "array" / "manifest.json").write_text("{}")
    for name, told in (("mine", "mine is there and is no pack: it holds a.jpg"), ("file", "file is there and is no")):
        with pytest.raises(ChimeraError, match=told) as caught:
            make(tmp_path, name, never())
        assert caught.value.hint == "choose another --name, or move it elsewhere"
    for name in ("link", "array"):
        with pytest.raises(ChimeraError, match=f"{name} is there and is no pack"):
            make(tmp_path, name, never())
    assert [path.name for path in photos.iterdir()] == ["a.jpg"]
    assert (tmp_path / "array" / "images.npy").exists()
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "empty").mkdir()
    assert len(make(tmp_path, "empty")) == 5


def test_what_somebody_laid_into_a_pack_is_never_deleted(tmp_path: Path) -> None:
    first = make(tmp_path, source_digest="d1")
    (first.path / "my-notes.txt").write_text("weeks of work")
    assert make(tmp_path, images=never(), source_digest="d1").manifest == first.manifest
    with pytest.raises(ChimeraError, match=r"tiny is there and is no pack: it holds my-notes\.txt"):
        make(tmp_path, images=never(), source_digest="d2")

    def late() -> Iterator[Picture]:
        yield from (picture(9) for _ in range(5))
        (tmp_path / "other" / "late.txt").write_text("laid there while images were decoded")

    make(tmp_path, "other")
    with pytest.raises(ChimeraError, match=r"late\.txt"):
        make(tmp_path, "other", late())
    assert open_pack(tmp_path, "other").images.max() == 4
    assert visible(tmp_path) == ["other", "tiny"]


@pytest.mark.parametrize("manifest", ["{", '{"schema_version": 1}', '{"fingerprint": "x", "schema_version": 99}'])
def test_a_pack_with_a_broken_manifest_is_made_anew(tmp_path: Path, manifest: str) -> None:
    (make(tmp_path).path / "manifest.json").write_text(manifest)
    assert verify_pack(make(tmp_path)) == []


def test_a_stricter_share_of_unreadable_images_holds_for_a_pack_that_is_there(tmp_path: Path) -> None:
    stream = [picture(0), Unreadable("cut"), picture(2), picture(3), picture(4)]
    absent = [Skipped("x.jpg", "absent")]
    options: dict[str, Any] = {"source_digest": "d1", "skipped": absent}
    first = make(tmp_path, images=stream, max_bad=0.2, **options)
    assert make(tmp_path, images=never(), max_bad=0.2, **options).manifest == first.manifest
    with pytest.raises(ChimeraError, match="1 of 5 images can't be read"):
        make(tmp_path, images=stream, max_bad=0.19, **options)
    assert open_pack(tmp_path, "tiny").manifest == first.manifest


def test_leftovers_of_a_killed_writer_are_cleared_and_its_old_pack_comes_back(tmp_path: Path) -> None:
    first = make(tmp_path, source_digest="d1")
    first.path.rename(tmp_path / ".tiny.old")
    (tmp_path / ".tiny.partial").mkdir()
    (tmp_path / ".tiny.partial" / "images.npy").write_bytes(b"half")
    assert list_packs(tmp_path) == []
    assert make(tmp_path, source_digest="d1").manifest == first.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda _path: usage)
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


def test_images_end_when_the_writer_gives_up(tmp_path: Path) -> None:
    closed = []

    def stream() -> Iterator[Picture]:
        try:
            yield picture(0)
            yield Picture(np.zeros((3, 3, 3), dtype=np.uint8), "", 1, 1)
        finally:
            closed.append(True)

    with pytest.raises(ValueError, match="is no picture"):
        make(tmp_path, images=stream())
    assert closed == [True]
    assert visible(tmp_path) == []


def test_there_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ChimeraError, match="no images"):
        make(tmp_path, items=[], images=[], captions=[])
    with pytest.raises(ValueError, match=r"0\.jpg is in the split ''"):
        make(tmp_path, items=[Item("0.jpg", "")], images=[picture(0)], captions=[])


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_hashes_are_those_of_the_whole_lists(tmp_path: Path) -> None:
    pack = make(tmp_path)
    rows = [[f"{place}.jpg", split, f"sha-{place}", 20, 10, {"label": split[0]}] for place, split in enumerate(SPLITS)]
    lines = [(0, 0, "a zero"), (1, 0, "b zero"), (1, 1, "b one"), (3, 0, "d zero"), (3, 1, "d one"), (3, 2, "d two")]
    content = pack.manifest["content"]
    assert content["items"] == content_hash(rows)
    assert content["captions"] == content_hash([*lines, (4, 0, "e zero")])
    assert content["images"] == hashlib.sha256((pack.path / "images.npy").read_bytes()).hexdigest()
    many = [(number, number % 5, f"caption “{number}”") for number in range(10_000)]
    assert pack_writer._hash_rows(iter(many)) == content_hash(many)
    assert pack_writer._hash_rows([]) == content_hash([])


def test_columns_hold_what_arrow_can(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [
        {"boxes": [[0.5, 1.0]], "tags": ["a"], "raw": b"\xff", "width": 640},
        {"boxes": [], "meta": {"x": 1}, "split": "val"},
        {},
        {"raw": b"", "meta": {"x": 2}},
        {"tags": None},
    ]
    items = [Item(f"{number}.jpg", "train", columns) for number, columns in enumerate(values)]
    pack = make(tmp_path, items=items)
    assert pack.column("boxes") == [[[0.5, 1.0]], [], None, None, None]
    assert pack.column("meta") == [None, {"x": 1}, None, {"x": 2}, None]
    assert pack.column("raw") == [b"\xff", None, None, b"", None]
    # The pack's own columns are what they are in every pack; those of the source stand beside them.
    assert pack.column("width") == [20] * 5
    assert pack.column("source_width") == [640, None, None, None, None]
    assert pack.column("split") == ["train"] * 5
    assert pack.column("source_split") == [None, "val", None, None, None]
    assert pack.manifest["columns"] == ["boxes", "meta", "raw", "source_split", "tags", "source_width"]


def test_columns_that_would_share_a_name_are_all_kept(tmp_path: Path) -> None:
    columns = {"width": "wide", "source_width": "by hand", "source_file": "x", "source_source_file": "y"}
    pack = make(tmp_path, items=[Item(f"{number}.jpg", "train", columns) for number in range(5)])
    assert pack.column("width") == [20] * 5
    assert pack.column("source_width") == ["by hand"] * 5
    assert pack.column("source_source_width") == ["wide"] * 5
    assert pack.column("source_source_file") == ["y"] * 5
    assert pack.column("source_source_source_file") == ["x"] * 5
    assert len(set(pack.manifest["columns"])) == 4


def test_a_column_of_several_kinds_is_named_before_the_work(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("the images were read")
        yield

    items = [Item("a", "train", {"year": 1999}), Item("b", "train", {"year": "last"})]
    with pytest.raises(ChimeraError, match="column 'year' can't be stored") as caught:
        make(tmp_path, items=items, images=never())
    assert "one type" in caught.value.hint


def test_file_names_that_are_no_text_are_kept_readable(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    items = [Item(odd, "train"), Item("b.jpg", "train"), Item(odd, "train")]
    pack = make(tmp_path, items=items, images=[picture(0), picture(1), Unreadable("cut")], max_bad=0.5, captions=[])
    assert pack.column("source_file") == ["caf\\udce9.jpg", "b.jpg"]
    assert open_pack(tmp_path, "tiny").manifest["skipped"][0]["source_file"] == "caf\\udce9.jpg"


def test_the_libraries_that_decoded_are_counted(tmp_path: Path) -> None:
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    stream = [Picture(pixels, str(number), 1, 1, "pillow" if number == 3 else "simplejpeg") for number in range(5)]
    assert make(tmp_path, images=stream).manifest["decoders"] == {"simplejpeg": 4, "pillow": 1}
    assert make(tmp_path, "drawn").manifest["decoders"] == {}


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_contents_are_drawn_in_the_order_of_their_hashes(tmp_path: Path) -> None:
    contents = [f"content {number}" for number in range(10)]
    order = sorted(contents, key=lambda content: hashlib.sha256(f"7:{content}".encode()).hexdigest())
    expected = dict.fromkeys(order, "train") | dict.fromkeys(order[:2], "test") | dict.fromkeys(order[2:5], "dev")
    pack = unsplit(tmp_path, contents, SplitRule(7, dev=0.3, test=0.2))
    assert pack.column("split") == [expected[content] for content in contents]
    assert {split: counts["images"] for split, counts in pack.manifest["splits"].items()} == {
        "train": 5, "dev": 3, "test": 2, "unused": 0,
    }  # fmt: skip


def test_the_order_of_the_source_says_nothing_and_the_seed_all(tmp_path: Path) -> None:
    def drawn(contents: list[str], seed: int) -> dict[str, str]:
        pack = unsplit(tmp_path / str(random.random()), contents, SplitRule(seed, 0.25, 0.25))
        return dict(zip(pack.column("sha256"), pack.column("split"), strict=True))

    contents = [str(number) for number in range(40)]
    assert drawn(contents, 0) == drawn(contents[::-1], 0)
    assert drawn(contents, 0) != drawn(contents, 1)


def test_identical_files_land_in_one_split_and_count_once(tmp_path: Path) -> None:
    contents = [str(number % 8) for number in range(40)]
    pack = unsplit(tmp_path, contents, SplitRule(0, 0.25, 0.25))
    splits = dict(zip(contents, pack.column("split"), strict=True))
    assert pack.column("split") == [splits[content] for content in contents]
    assert sorted(splits.values()) == ["dev"] * 2 + ["test"] * 2 + ["train"] * 4
    assert pack.manifest["leakage"] == []


def test_a_content_with_a_given_split_keeps_it(tmp_path: Path) -> None:
    contents = ["a", "b", "a", "c", "b", "d"]
    pack = unsplit(tmp_path, contents, SplitRule(0, dev=0, test=1), given={2: "dev", 4: "train", 5: "unused"})
    assert pack.column("split") == ["dev", "train", "dev", "test", "train", "unused"]


@pytest.mark.parametrize(
    ("count", "dev", "test", "sizes"),
    [(3, 0.1, 0.1, (1, 1, 1)), (3, 0.1, 0.8, (1, 1, 1)), (4, 0.1, 0.1, (2, 1, 1)), (4, 0.1, 0, (3, 1, 0)),
     (2, 0.1, 0, (1, 1, 0)), (2, 0, 1, (0, 0, 2)), (3, 0.5, 0.5, (0, 1, 2))],
)  # fmt: skip
def test_a_share_gets_one_image_at_least(
    tmp_path: Path, count: int, dev: float, test: float, sizes: tuple[int, int, int]
) -> None:
    pack = unsplit(tmp_path, [str(number) for number in range(count)], SplitRule(0, dev, test))
    assert tuple(pack.manifest["splits"][split]["images"] for split in ("train", "dev", "test")) == sizes


def test_a_share_that_got_no_image_is_told(tmp_path: Path) -> None:
    told: list[Event] = []
    options: dict[str, Any] = {"captions": (), "split_rule": SplitRule(0, 0.1, 0.1), "listener": told.append}
    make(tmp_path, items=[Item("a", ""), Item("b", "")], images=[picture(0), picture(1)], **options)
    (note,) = notes(told)
    assert "too few different images" in note
    assert "dev and test got none" in note
    given = [Item("a", "train"), Item("b", "dev")]
    make(tmp_path, "given", items=given, images=[picture(0), picture(1)], **options)
    assert len(notes(told)) == 1


@pytest.mark.parametrize(("dev", "test"), [(-0.1, 0), (0.6, 0.5), (float("nan"), 0), (0, 1.5)])
def test_shares_that_can_not_be_are_refused(dev: float, test: float) -> None:
    with pytest.raises(UsageError, match="can't be drawn from one set"):
        SplitRule(0, dev, test)


def test_leakage_is_noted_and_listed(tmp_path: Path) -> None:
    told: list[Event] = []
    # In test and train: 0 and 1. Twice in train: 3. In dev and in no split: 2 and 4, which nobody trains on.
    stream = [picture(0, "same"), picture(1, "same"), picture(2, "other"), picture(3, "same"), picture(4, "other")]
    pack = make(tmp_path, images=stream, listener=told.append)
    files = [["0.jpg", "test"], ["1.jpg", "train"], ["3.jpg", "train"]]
    assert pack.manifest["leakage"] == [{"sha256": "same", "files": files}]
    (note,) = [note for note in notes(told) if "more than one split" in note]
    assert "1 images" in note
    assert "0.jpg in test and 1.jpg in train" in note
    assert verify_pack(pack) == []


def test_leakage_is_part_of_no_hash(tmp_path: Path) -> None:
    first = make(tmp_path, source_digest="d1")
    (first.path / "manifest.json").write_text(
        json.dumps({key: value for key, value in first.manifest.items() if key not in ("leakage", "decoders")})
    )
    # As packs of earlier versions are: readable, up to date, and given what they lack when they are made again.
    old = open_pack(tmp_path, "tiny")
    assert old.manifest.get("leakage", []) == []
    assert make(tmp_path, source_digest="d1").manifest == old.manifest
    assert make(tmp_path, source_digest="d2").manifest["leakage"] == []
    assert make(tmp_path, source_digest="d2").fingerprint == first.fingerprint


# ---- other processes ------------------------------------------------------------------------------------------------

# Tells its notes and when it has begun, then waits for a line before the last image.
WRITER = """
import sys, numpy as np
from pathlib import Path
from chimera_cli.data.pack import Item, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.events import Note

def images():
    for number in range(20):
        if number == 10:
            print("begun", flush=True)
            sys.stdin.readline()
        yield Picture(np.full((64, 64, 3), int(sys.argv[2]), dtype=np.uint8), str(number), 64, 64)

def listen(event):
    if isinstance(event, Note):
        print(event.message, flush=True)

pack = write_pack(
    Path(sys.argv[1]), name="p", source="s", images=images(), items=[Item(str(n), "train") for n in range(20)],
    size=64, source_digest=sys.argv[3], listener=listen,
)
print("value", int(pack.images.max()), int(pack.images.min()), flush=True)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_second_of_two_says_that_it_waits_and_finds_all_done(tmp_path: Path) -> None:
    with start(WRITER, tmp_path, 1, "same") as first, start(WRITER, tmp_path, 1, "same") as second:
        told = line(first), line(second)
        begun, waiting = (first, second) if told[0] == "begun" else (second, first)
        lines = [said for said in told if said != "begun"]
        assert pack_names(tmp_path) == []
        print(file=begun.stdin)
        out, err = waiting.communicate(timeout=60)
        lines += out.splitlines()
        assert begun.wait(60) == 0, err
    assert lines[0] == "the pack p is being written or verified by another process: waiting for it"
    assert "up to date" in lines[1]
    assert lines[2] == "value 1 1"


def test_the_second_of_two_with_other_content_replaces_the_whole(tmp_path: Path) -> None:
    with start(WRITER, tmp_path, 1, "one") as first:
        assert line(first) == "begun"
        with start(WRITER, tmp_path, 2, "two") as second:
            assert "waiting" in line(second)
            first.communicate("go\n", timeout=60)
            assert open_pack(tmp_path, "p").images.max() == 1
            assert line(second) == "begun"
            out, _ = second.communicate("go\n", timeout=60)
    assert "had other content and was replaced" in out
    assert "value 2 2" in out
    assert visible(tmp_path) == ["p"]


def test_killed_at_any_moment_nothing_is_half(tmp_path: Path) -> None:
    # Replaces one pack by another without end, fast enough that a kill falls into every part of the work.
    script = WRITER.split("def images", maxsplit=1)[0] + textwrap.dedent("""
        import itertools
        items = [Item(str(n), "train") for n in range(300)]
        print("begun", flush=True)
        for value in itertools.count(1):
            image = Picture(np.full((32, 32, 3), value % 200, dtype=np.uint8), str(value), 32, 32)
            write_pack(Path(sys.argv[1]), name="p", source="s", images=[image] * 300, items=items, size=32)
        """)
    chance = random.Random(0)
    for _ in range(6):
        with start(script, tmp_path) as process:
            assert line(process) == "begun"
            time.sleep(chance.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
        if pack_names(tmp_path):
            pack = open_pack(tmp_path, "p")
            assert len(np.unique(pack.images)) == 1
            assert verify_pack(pack) == []
    pack = write_pack(tmp_path, name="p", source="s", images=[picture(0)], items=[Item("a", "dev")], size=SIZE)
    assert verify_pack(pack) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".p.lock", "p"]


# The limit on a file's size stands in for the full disk: real writes that really fail, in one file or the other.
LIMITED = """
import resource, signal, sys, numpy as np
from pathlib import Path
from chimera_cli.data.pack import Caption, Item, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.errors import ChimeraError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import pyarrow.parquet
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
image = Picture(np.zeros((64, 64, 3), dtype=np.uint8), "", 64, 64)
count, texts = int(sys.argv[2]), int(sys.argv[3])
try:
    items = [Item("i", "train")] * count
    captions = [Caption(0, number, f"{number**7 % 1_000_003} {number**9 % 999_983}") for number in range(texts)]
    write_pack(
        Path(sys.argv[1]), name="p", source="s", images=[image] * count, items=items, captions=captions, size=64
    )
except ChimeraError as error:
    print(error.message)
"""


@pytest.mark.parametrize(("images", "captions"), [(40, 0), (1, 20_000)])
def test_a_file_that_can_not_grow_leaves_nothing(tmp_path: Path, images: int, captions: int) -> None:
    with start(LIMITED, tmp_path, images, captions) as process:
        out, err = process.communicate(timeout=60)
    assert "can't be written" in out, err
    assert "File too large" in out
    assert len(out.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".p.lock"]


def test_a_disk_that_fills_while_packing_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs the right to mount a small disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here")
    try:

        def stream() -> Iterator[Picture]:
            for number in range(100):
                if number == 50:  # somebody else takes the rest of the space
                    (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
                yield Picture(np.zeros((64, 64, 3), dtype=np.uint8), str(number), 64, 64)

        items = [Item(str(number), "train") for number in range(100)]
        with pytest.raises(ChimeraError, match="can't be written: No space left on device") as caught:
            write_pack(disk / "data", name="p", source="s", images=stream(), items=items, size=64)
        assert "free some space" in caught.value.hint
        assert [path.name for path in (disk / "data").iterdir()] == [".p.lock"]
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- memory ---------------------------------------------------------------------------------------------------------

# Prepares and reads so many small images with five captions each; prints the peak of the process's own memory in MiB.
MEMORY = """
import io, sys, threading, time, numpy as np
from functools import partial
from pathlib import Path
from PIL import Image
from chimera_cli.data.images import decode_all
from chimera_cli.data.pack import Caption, Item, open_pack
from chimera_cli.data.pack_writer import SplitRule, write_pack

peak = 0
def watch():
    global peak
    while True:
        own = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        peak = max(peak, int(own.split()[1]))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()

count, where = int(sys.argv[1]), Path(sys.argv[2])
buffer = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
items = [Item(f"images/{n:09d}.jpg", "", {"url": f"https://example.org/{n}", "score": n / 7}) for n in range(count)]
captions = [Caption(n, k, f"caption {k} of picture {n} with some more words") for n in range(count) for k in range(5)]
reads = [partial(lambda n: buffer.getvalue() + n.to_bytes(4, "little"), n) for n in range(count)]
write_pack(
    where, name="p", source="s", images=decode_all(reads, 32, "crop"), items=items, captions=captions, size=32,
    split_rule=SplitRule(0, 0.1, 0.1),
)
pack = open_pack(where, "p")
tables = [pack.captions(split) for split in ("train", "dev", "test")]
assert sum(len(table) for table in tables) == 5 * count
assert len(pack.image_ids("train")) + len(pack.image_ids("dev")) + len(pack.image_ids("test")) == count
assert len(set(pack.column("url"))) == count
time.sleep(0.05)
print(peak / 1024)
"""


def peak_mib(count: int, where: Path) -> float:
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not say how much memory is a process's own")
    with start(MEMORY, count, where) as process:
        out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return float(out)


def test_memory_grows_by_little_for_each_entry(tmp_path: Path) -> None:
    # The source's own list of items and captions included, an entry takes about 3 KiB.
    assert peak_mib(12_000, tmp_path / "many") - peak_mib(4_000, tmp_path / "few") < 8_000 * 8 / 1024


@pytest.mark.slow
def test_a_hundred_thousand_entries_stay_below_a_gigabyte(tmp_path: Path) -> None:
    assert peak_mib(100_000, tmp_path) < 1024


def visible(data_dir: Path) -> list[str]:
    return sorted(path.name for path in data_dir.iterdir() if not path.name.endswith(".lock"))
