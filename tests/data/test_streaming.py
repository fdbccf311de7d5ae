"""Streaming from tar shards: every sample once over all processes, exact resumption, and every kind of bad shard."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chimera_cli.data import streaming
from chimera_cli.data.images import decode
from chimera_cli.data.pack import Picture
from chimera_cli.data.sources.toy import draw, make_scenes
from chimera_cli.data.streaming import (
    CAPTIONLESS,
    LEAKED,
    UNREADABLE,
    ShardSet,
    StreamBatch,
    StreamState,
    batches_per_epoch,
    captions_of,
    find_shards,
    open_shards,
    stream_batches,
)
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note

SIZE = 32
COUNTS = (7, 5, 11, 3, 9)  # samples per shard
SCENES = make_scenes(sum(COUNTS), seed=3)

Members = Sequence[tuple[str, bytes]]


def photo(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(SCENES[number], SIZE, 3, number)).save(buffer, kind)
    return buffer.getvalue()


def sample(number: int, caption: str | None = None) -> Members:
    key, facts = f"{number:05d}", json.dumps({"url": "x", "width": SIZE}).encode()
    return [
        (f"{key}.png", photo(number)),
        (f"{key}.txt", (f"caption {key}" if caption is None else caption).encode()),
        (f"{key}.json", facts),
    ]


def write_tar(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            tar.addfile(facts, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: Sequence[int] = COUNTS) -> None:
    folder.mkdir()
    first = 0
    for number, count in enumerate(counts):
        members = [member for place in range(first, first + count) for member in sample(place)]
        write_tar(folder / f"{number:05d}.tar", members)
        first += count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of uneven size with 35 samples, keys 00000 to 00034."""
    path = tmp_path_factory.mktemp("set") / "shards"
    write_shards(path)
    return path


@pytest.fixture(scope="module")
def shards(folder: Path) -> ShardSet:
    return open_shards(str(folder / "{00000..00004}.tar"))


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("loader", "decode"))] == []


def keys(batches: Sequence[StreamBatch], epoch: int = 0) -> list[str]:
    return [key for batch in batches if batch.epoch == epoch for key in batch.keys]


def read(shards: ShardSet, **options: Any) -> list[StreamBatch]:
    return list(stream_batches(shards, **({"batch": 4, "size": SIZE, "epochs": 1, "buffer": 8} | options)))


# ---- what is given --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_sample_once_per_epoch_over_all_processes(
    shards: ShardSet, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the library would go by; the arguments alone count.
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "WORKER": "1", "NUM_WORKERS": "3"}.items():
        monkeypatch.setenv(name, value)
    parts = [read(shards, rank=rank, world=world, epochs=2) for rank in range(world)]
    for epoch in (0, 1):
        assert Counter(key for part in parts for key in keys(part, epoch)) == Counter(f"{n:05d}" for n in range(35))
    shares = [set(keys(part)) for part in parts]
    assert sum(map(len, shares)) == 35, "no two processes share a sample"


def test_seed_and_epoch_decide_the_order_and_nothing_else(shards: ShardSet) -> None:
    first = read(shards, epochs=2)
    again = read(shards, epochs=2, threads=3, prefetch=3)
    assert [batch.keys for batch in again] == [batch.keys for batch in first]
    assert all((a.pixels == b.pixels).all() for a, b in zip(first, again, strict=True))
    assert keys(first, 0) != keys(first, 1)
    assert keys(first, 0) != keys(read(shards, seed=1))
    assert keys(first, 0) != sorted(keys(first, 0))


def test_the_buffer_mixes_shards_and_its_room_is_bounded_in_bytes(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changes(order: list[str]) -> int:
        edges = np.cumsum(COUNTS)
        homes = [int(np.searchsorted(edges, int(key), side="right")) for key in order]
        return sum(a != b for a, b in pairwise(homes))

    assert changes(keys(read(shards, buffer=1))) == len(COUNTS) - 1, "without a buffer one shard follows the other"
    assert changes(keys(read(shards, buffer=100))) > 15
    # Where the samples are so large that one alone fills the room, none can be mixed.
    monkeypatch.setattr(streaming, "_BUFFER_BYTES", 1)
    assert changes(keys(read(shards, buffer=100))) == len(COUNTS) - 1


def test_pixels_are_those_of_a_pack_and_captions_belong_to_them(shards: ShardSet) -> None:
    for batch in read(shards):
        assert batch.pixels.dtype == np.uint8
        assert batch.pixels.shape == (len(batch), SIZE, SIZE, 3)
        for pixels, key, caption in zip(batch.pixels, batch.keys, batch.captions, strict=True):
            picture = decode(photo(int(key)), SIZE, "crop")
            assert isinstance(picture, Picture)
            assert (pixels == picture.pixels).all()
            assert caption == f"caption {key}"


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(4, [4] * 8 + [3]), (10, [10, 10, 10, 5]), (11, [11, 11, 13]), (25, [35]), (23, [23, 12]), (99, [35])],
)
def test_no_batch_is_a_scrap(shards: ShardSet, batch: int, sizes: list[int]) -> None:
    batches = read(shards, batch=batch)
    assert [len(one) for one in batches] == sizes
    assert [one.number for one in batches] == list(range(batches_per_epoch(35, batch)))


def test_identical_images_have_equal_ids(tmp_path: Path) -> None:
    members = [("a.png", photo(0)), ("a.txt", b"one"), ("b.png", photo(1)), ("b.txt", b"two")]
    members += [("c.png", photo(0)), ("c.txt", b"three")]
    write_tar(tmp_path / "0.tar", members)
    (batch,) = read(open_shards(str(tmp_path)))
    ids = dict(zip(batch.keys, batch.image_ids.tolist(), strict=True))
    assert batch.image_ids.dtype == np.int64
    assert ids["a"] == ids["c"] != ids["b"]


def test_of_several_captions_seed_epoch_and_key_draw_one(tmp_path: Path) -> None:
    told = [f"caption {number}" for number in range(5)]
    members: list[tuple[str, bytes]] = []
    for number in range(8):
        members += [
            (f"{number}.webp", photo(number, "WEBP")),
            (f"{number}.json", json.dumps({"captions": told}).encode()),
        ]
    write_tar(tmp_path / "0.tar", members)
    shards = open_shards(str(tmp_path / "*.tar"))

    def chosen(**options: Any) -> list[dict[str, str]]:
        return [dict(zip(one.keys, one.captions, strict=True)) for one in read(shards, batch=8, **options)]

    epochs = chosen(epochs=30)
    assert {caption for epoch in epochs for caption in epoch.values()} == set(told)
    assert len(set(epochs[0].values())) > 1
    # Whatever else is different: buffer, threads, where it was resumed.
    assert chosen(epochs=8, start=StreamState(7), buffer=1, threads=1) == [epochs[7]]
    assert chosen(seed=1) != epochs[:1]


def test_shards_of_the_library_itself_are_read_as_it_reads_them(tmp_path: Path) -> None:
    import webdataset as wds

    with wds.ShardWriter(str(tmp_path / "s-%02d.tar"), maxcount=6, verbose=0) as writer:
        for number in range(20):
            writer.write({"__key__": f"{number:04d}", "jpg": photo(number, "JPEG"), "txt": f"a {number}", "cls": 3})
    expected = {}
    for path in sorted(tmp_path.glob("*.tar")):
        with path.open("rb") as file:
            for one in wds.tariterators.group_by_keys(
                wds.tariterators.tar_file_expander([{"url": "x", "stream": file}])
            ):
                expected[one["__key__"]] = one["txt"].decode()
    got = {
        key: text
        for batch in read(open_shards(str(tmp_path)))
        for key, text in zip(batch.keys, batch.captions, strict=True)
    }
    assert got == expected
    assert len(got) == 20


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [1, 8, 100])
@pytest.mark.parametrize("world", [1, 2])
def test_resuming_gives_exactly_the_shards_that_were_not_used_up(shards: ShardSet, buffer: int, world: int) -> None:
    options: dict[str, Any] = {"buffer": buffer, "world": world, "rank": world - 1, "seed": 5}
    whole = read(shards, **options)
    order = streaming.epoch_order(len(COUNTS), 5, 0, world - 1, world)
    edges = [0, *np.cumsum(COUNTS)]
    homes = [{f"{n:05d}" for n in range(edges[shard], edges[shard + 1])} for shard in order]
    for number, batch in enumerate(whole[:-1]):
        assert batch.state.epoch == 0
        rest = keys(read(shards, start=batch.state, **options))
        assert Counter(rest) == Counter(key for home in homes[batch.state.shards :] for key in home)
        given = set(keys(whole[: number + 1]))
        # Nothing is lost; what comes twice is of shards that were not used up.
        assert given | set(rest) == set().union(*homes)
        repeated = given & set(rest)
        assert all(home <= given for home in homes[: batch.state.shards])
        if buffer == 1:
            touched = [home for home in homes[batch.state.shards :] if home & repeated]
            assert len(touched) <= 1
    assert whole[-1].state == StreamState(1, 0)


def test_from_the_end_of_an_epoch_the_next_one_is_the_same_as_uninterrupted(shards: ShardSet) -> None:
    whole = read(shards, epochs=3)
    start = next(batch.state for batch in whole if batch.state.epoch == 1)
    resumed = read(shards, epochs=3, start=start)
    rest = [batch for batch in whole if batch.epoch >= 1]
    assert [batch.keys for batch in resumed] == [batch.keys for batch in rest]
    assert all((a.pixels == b.pixels).all() for a, b in zip(resumed, rest, strict=True))


# ---- what is left out -----------------------------------------------------------------------------------------------


def test_unreadable_captionless_and_leaked_samples_are_left_out_and_counted_once_told(tmp_path: Path) -> None:
    import hashlib

    members = [member for number in range(20) for member in sample(number)]
    members += [("bad.png", photo(20)[:200]), ("bad.txt", b"a"), ("none.png", photo(21)), ("none.txt", b" \n ")]
    members += [("alone.txt", b"no image at all"), ("mute.png", photo(22))]
    write_tar(tmp_path / "0.tar", members)
    shards = open_shards(str(tmp_path))
    assert shards.samples == 23
    told: list[Event] = []
    excluded = frozenset({hashlib.sha256(photo(4)).hexdigest(), "0" * 64})
    batches = read(shards, epochs=3, max_bad=0.05, excluded=excluded, listener=told.append)
    for epoch in range(3):
        assert sorted(keys(batches, epoch)) == sorted(f"{number:05d}" for number in range(20) if number != 4)
        last = [batch for batch in batches if batch.epoch == epoch][-1]
        assert last.left_out == {CAPTIONLESS: 2, UNREADABLE: 1, LEAKED: 1}
    (note,) = told
    assert isinstance(note, Note)
    assert note.level == "warning"
    assert "of 23 samples left out" in note.message
    assert "2 without a caption (first 0.tar: none)" in note.message
    assert "1 unreadable (first 0.tar: bad: " in note.message
    with pytest.raises(ChimeraError, match=r"1 of 23 images of the shards can't be read, more than the 1\.0% allowed"):
        read(shards)


def test_a_set_of_which_nothing_can_be_used_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", photo(0)), ("b.png", photo(1))])
    with pytest.raises(ChimeraError, match=r"no sample of .*0\.tar .* can be used: 2 without a caption"):
        read(open_shards(str(tmp_path)), epochs=None)


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"txt": b"  two\n words ", "json": b'{"caption": "other"}'}, ("two words",)),
        ({"txt": "\ufeffwith a mark".encode()}, ("with a mark",)),
        ({"txt": b"\xff\xfe"}, ()),
        ({"txt": b"word " * 3000}, ()),
        ({"json": b'{"caption": "one"}'}, ("one",)),
        ({"json": b'{"caption": null, "captions": ["a", " ", 3, "b", "a"]}'}, ("a", "b")),
        ({"json": b'["caption"]'}, ()),
        ({"json": b"{"}, ()),
        ({"json": b"[" * 100_000}, ()),
        ({}, ()),
    ],
)
def test_captions_are_found_where_img2dataset_puts_them(members: dict[str, bytes], captions: tuple[str, ...]) -> None:
    assert captions_of(members) == captions


# ---- shards that are not as they should be --------------------------------------------------------------------------


def damaged(path: Path, **options: Any) -> ChimeraError:
    with pytest.raises(ChimeraError) as caught:
        read(open_shards(str(path)), **options)
    return caught.value


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("stated", [False, True])
def test_a_shard_cut_off_anywhere_is_named(folder: Path, tmp_path: Path, share: float, stated: bool) -> None:
    content = (folder / "00002.tar").read_bytes()
    end = len(content.rstrip(b"\0"))
    (tmp_path / "00002.tar").write_bytes(content[: int(end * share)])
    if stated:
        (tmp_path / "00002_stats.json").write_text('{"successes": 11}', encoding="utf-8")
    error = damaged(tmp_path)
    assert "00002.tar was cut off" in error.message or "00002.tar is no tar archive" in error.message
    assert "get this shard again" in error.hint


@pytest.mark.parametrize("stated", [False, True])
def test_a_header_damaged_in_the_middle_is_no_early_end(folder: Path, tmp_path: Path, stated: bool) -> None:
    with tarfile.open(folder / "00002.tar") as tar:
        at = tar.getmember("00017.png").offset
    content = bytearray((folder / "00002.tar").read_bytes())
    content[at : at + 200] = b"\x07" * 200
    (tmp_path / "x.tar").write_bytes(content)
    if stated:
        (tmp_path / "x_stats.json").write_text('{"successes": 11}', encoding="utf-8")
    words = "gave 5 images where 11 were counted" if stated else f"is damaged at byte {at:,}"
    assert words in damaged(tmp_path / "x.tar").message


def test_what_is_no_tar_is_told_from_what_is_compressed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress((folder / "00000.tar").read_bytes()))
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(b"no tar at all, " * 200)
    assert "a.tar is compressed with gzip" in damaged(tmp_path / "a.tar").message
    assert "b.tar is empty" in damaged(tmp_path / "b.tar").message
    assert "c.tar is no tar archive" in damaged(tmp_path / "c.tar").message
    (tmp_path / "d.tar.gz").write_bytes((tmp_path / "a.tar").read_bytes())
    assert "compressed" in damaged(tmp_path / "d.tar.gz").message


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "link.png"])
def test_members_that_climb_out_and_links_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        facts = tarfile.TarInfo(name)
        if name == "link.png":
            facts.type, facts.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(facts, io.BytesIO(b""))
    assert f"0.tar holds {name!r}, a link or a path that leaves the shard" in damaged(tmp_path).message


def sparse(headers: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, pax in (("a.png", {}), ("b.png", headers)):
            facts = tarfile.TarInfo(name)
            facts.pax_headers = pax
            tar.addfile(facts)
    return buffer.getvalue()


def long_names(count: int) -> bytes:
    facts = tarfile.TarInfo("././@LongLink")
    facts.type, facts.size = b"L", 1
    return (facts.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * count + sparse({})


def endless(kind: bytes) -> bytes:
    """Return a shard whose member says that it has 2**70 bytes."""
    facts = tarfile.TarInfo("a.png")
    facts.type, facts.size = kind, 1 << 70
    return facts.tobuf(tarfile.GNU_FORMAT) + sparse({})


@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        sparse({"GNU.sparse.size": "abc"}),
        sparse({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
        long_names(3000),
        endless(b"L"),
        endless(b"V"),
    ],
    ids=["sparse size", "sparse map", "long names", "endless name", "endless member"],
)
def test_headers_made_to_do_harm_are_damage(tmp_path: Path, content: bytes, stated: bool) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    if stated:
        (tmp_path / "0_stats.json").write_text('{"successes": 2}', encoding="utf-8")
    assert "the shard" in damaged(tmp_path).message


def test_a_key_with_two_files_of_one_kind_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", photo(0)), ("a.txt", b"x"), ("a.png", photo(1))])
    assert "0.tar is damaged: a.png: duplicate file name" in damaged(tmp_path).message


def test_statistics_are_believed_and_checked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes((folder / "00000.tar").read_bytes())
    notes = tmp_path / "00000_stats.json"
    for text, samples in (
        ('{"successes": 7}', 7),
        ('{"successes": "7"}', 7),
        ("[1]", 7),
        ("{", 7),
        ('{"successes": 6}', 6),
    ):
        notes.write_text(text, encoding="utf-8")
        assert open_shards(str(tmp_path)).samples == samples
    assert "00000.tar gave 7 images where 6 were counted" in damaged(tmp_path).message


def test_a_shard_that_changes_while_training_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("00000.tar", "00001.tar"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    shards = open_shards(str(tmp_path))
    (tmp_path / "00001.tar").write_bytes((folder / "00002.tar").read_bytes())
    with pytest.raises(ChimeraError, match=r"00001\.tar gave 11 images where 5 were counted"):
        read(shards)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(ChimeraError, match=r"00001\.tar can't be read: No such file"):
        read(shards)


def test_shards_without_images_are_refused_together_but_not_one_of_several(folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.txt", b"words")])
    write_tar(tmp_path / "1.tar", [])
    assert "the 2 shards of" in damaged(tmp_path).message
    write_tar(tmp_path / "2.tar", sample(0))
    assert keys(read(open_shards(str(tmp_path)))) == ["00000"]


# ---- patterns -------------------------------------------------------------------------------------------------------


def test_folders_globs_and_braces_find_the_same_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sorted(folder.glob("*.tar"))
    (folder / "00000_stats.json").unlink(missing_ok=True)
    monkeypatch.chdir(folder.parent)
    for pattern in (str(folder), "shards", "shards/*.tar", "shards/{00000..00004}.tar", "shards/{00000,*}.tar"):
        assert find_shards(pattern) == expected, pattern
    assert find_shards("shards/0000[13].tar") == [expected[1], expected[3]]


def test_the_digest_is_of_names_and_sizes_wherever_they_lie(folder: Path, shards: ShardSet, tmp_path: Path) -> None:
    for path in folder.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert open_shards(str(tmp_path)).digest == shards.digest
    (tmp_path / "00004.tar").rename(tmp_path / "00009.tar")
    assert open_shards(str(tmp_path)).digest != shards.digest


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nowhere/*.tar", "no .tar"),
        ("shards/{00003..00007}.tar", "00005.tar does not exist"),
        ("shards/{00000..00004.tar", "not balanced"),
        ("pipe:cat shards/00000.tar", "local"),
        ("https://example.org/{0..9}.tar", "local"),
    ],
)
def test_patterns_that_find_nothing_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, words: str
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UsageError, match="stream: ") as caught:
        find_shards(pattern)
    assert words in caught.value.message
    assert "--set stream=" in caught.value.hint


def test_fewer_shards_than_processes_are_refused(shards: ShardSet) -> None:
    with pytest.raises(UsageError, match="5 shards can't be shared by 6 processes") as caught:
        stream_batches(shards, 4, SIZE, rank=5, world=6)
    assert "at most 5 processes" in caught.value.hint


# ---- ending ---------------------------------------------------------------------------------------------------------


def test_threads_end_when_the_consumer_stops_early_raises_or_never_starts(shards: ShardSet) -> None:
    stream = stream_batches(shards, 4, SIZE)
    next(stream)
    stream.close()
    stream = stream_batches(shards, 4, SIZE, buffer=1, prefetch=3)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    stream_batches(shards, 4, SIZE).close()


def test_what_fails_in_the_thread_is_raised_to_the_consumer(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(streaming, "decode_all", broken)
    with pytest.raises(MemoryError, match="no room"):
        read(shards)


def test_ctrl_c_ends_a_process_in_the_middle_of_a_stream(folder: Path) -> None:
    script = (
        "import signal, sys\n"
        "from chimera_cli.data.streaming import open_shards, stream_batches\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "for number, batch in enumerate(stream_batches(open_shards(sys.argv[1]), 4, 64)):\n"
        "    number == 20 and print('going', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
