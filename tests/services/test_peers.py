"""The loaders of others beside ours: real processes on a few small files, the files themselves, and what goes wrong."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from chimera_cli.data.pack import Item, Pack, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.errors import UsageError
from chimera_cli.events import Event, Note
from chimera_cli.services import peers
from chimera_cli.services.bench_loader import bench_loader
from chimera_cli.services.bench_prepare import PHOTO_BYTES
from chimera_cli.services.peer_files import Photos, fitting_quality, photo, write_csv, write_photos, write_shards
from chimera_cli.services.peer_loaders import PeerTask, as_json, measure, pillow_loader
from chimera_cli.services.peer_ours import BARE, EQUAL, GATHER, SHARDS, Lap, images_per_s
from chimera_cli.services.peers import Against, need_peers, parse_peers, run_peer, summarise

SIZE = 32
IMAGES = 32


def scenes(count: int, size: int) -> list[np.ndarray]:
    """Return pictures with large shapes in them, as photos have."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in coarse]


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    pictures = [Picture(pixels, str(index), SIZE, SIZE) for index, pixels in enumerate(scenes(IMAGES, SIZE))]
    items = [Item(f"{index}.png", "train") for index in range(IMAGES)]
    return write_pack(tmp_path / "data", name="few", source="test", images=pictures, items=items, size=SIZE)


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    folder = tmp_path / "photos"
    folder.mkdir()
    return write_photos(np.stack(scenes(IMAGES, SIZE)), range(IMAGES), folder, original_size=False)


def task(name: str, photos: Photos, **changes: Any) -> PeerTask:
    settings: dict[str, Any] = {
        "name": name,
        "paths": tuple(map(str, photos.paths)),
        "csv": str(write_csv(photos)),
        "shards": tuple(map(str, write_shards(photos))),
        "batch": 4,
        "image_size": SIZE,
        "crop_scale": 0.9,
        "flip": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "seconds": 0.5,
        "workers": 1,
    }
    return PeerTask(**(settings | changes))


def lap(rate: float | None, failed: str | None = None) -> Lap:
    return Lap(rate, failed, {"loader": "one"})


# ---- names ----------------------------------------------------------------------------------------------------------


def test_peers_are_named_once_and_a_near_name_is_proposed() -> None:
    assert parse_peers("pillow, open_clip,pillow") == ("pillow", "open_clip")
    with pytest.raises(UsageError, match="no peer 'open-clp'") as caught:
        parse_peers("pillow,open-clp")
    assert caught.value.hint == "did you mean open_clip?"
    with pytest.raises(UsageError) as caught:
        parse_peers("xyz")
    assert "open_clip, pillow, webdataset" in caught.value.hint
    with pytest.raises(UsageError, match="names no peer"):
        parse_peers(" , ")


def test_a_peer_that_is_not_installed_is_refused_before_anything_is_measured(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "open_clip_train" else find(name))
    need_peers(["pillow", "webdataset"])
    with pytest.raises(UsageError, match="open_clip_train") as caught:
        bench_loader(
            tmp_path, "few", seconds=0.1, batch=4, config_path=None, device="cpu", command="chimera x",
            against=Against(("pillow", "open_clip")),
        )  # fmt: skip
    assert caught.value.hint == "pip install 'chimera-cli[peers]'"
    assert not (tmp_path / "runs").exists()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_files_of_the_packs_size_hold_its_images(photos: Photos) -> None:
    for path, wanted in zip(photos.paths, scenes(IMAGES, SIZE), strict=True):
        with Image.open(path) as image:
            assert image.format == "JPEG"
            # Quality 80: some grey levels off, but nothing is shifted or swapped.
            assert np.abs(np.asarray(image).astype(int) - wanted).mean() < 8
    sizes = [path.stat().st_size for path in photos.paths]
    assert photos.mean_kb == pytest.approx(np.mean(sizes) / 1000)
    assert (photos.width, photos.height, photos.quality) == (SIZE, SIZE, 80)


def test_files_of_the_original_size_have_its_pixels_and_bytes(tmp_path: Path) -> None:
    images = np.stack(scenes(8, 64))
    made = write_photos(images, range(8), tmp_path, original_size=True)
    with Image.open(made.paths[0]) as image:
        assert image.size == (500, 375) == (made.width, made.height)
    assert made.mean_kb * 1000 == pytest.approx(PHOTO_BYTES, rel=0.1)
    again = photo(images[3], made.quality, 3)
    assert again == made.paths[3].read_bytes()


@pytest.mark.parametrize("target", [30_000, 90_000])
def test_the_quality_found_is_the_nearest(target: int) -> None:
    sample = scenes(2, 64)

    def off(quality: int) -> float:
        return abs(sum(len(photo(pixels, quality, number)) for number, pixels in enumerate(sample)) / 2 - target)

    found = fitting_quality(sample, target)
    assert off(found) == min(off(quality) for quality in range(max(30, found - 3), min(98, found + 3) + 1))


def test_the_csv_and_the_shards_name_every_photo(photos: Photos) -> None:
    with write_csv(photos).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["filepath"] for row in rows] == [str(path) for path in photos.paths]
    (shard,) = write_shards(photos)
    with tarfile.open(shard) as tar:
        assert tar.getnames()[:4] == ["000000.jpg", "000000.txt", "000001.jpg", "000001.txt"]
        assert len(tar.getnames()) == 2 * IMAGES
        member = tar.extractfile("000001.jpg")
        assert member is not None
        assert member.read() == photos.paths[1].read_bytes()


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_a_window_begins_after_the_batches_that_waited_and_ends_with_a_turn(photos: Photos) -> None:
    taken: list[int] = []

    def batches() -> Any:
        while True:
            taken.append(1)
            yield "four"

    result = measure(batches(), task("pillow", photos, workers=3, seconds=0.01))
    assert result["images"] == 4 * (len(taken) - 9)
    assert result["images"] % 12 == 0
    assert result["seconds"] >= 0.01


def test_our_window_closes_what_it_read() -> None:
    closed: list[bool] = []

    def sizes() -> Any:
        try:
            while True:
                time.sleep(0.001)
                yield 7
        finally:
            closed.append(True)

    assert 0 < images_per_s(sizes(), 0.02) < 7000
    assert closed == [True]


def test_the_pillow_loader_gives_normalised_floats(photos: Photos) -> None:
    loader = pillow_loader(task("pillow", photos, workers=0, crop_scale=1.0, flip=False))
    batch = next(loader.batches)
    assert batch.shape == (4, 3, SIZE, SIZE)
    assert -1 <= float(batch.min()) < float(batch.max()) <= 1
    assert loader.settings["workers"] == 0
    assert "no flip" in loader.settings["loader"]


def test_all_run_on_the_same_images_and_leave_nothing_behind(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "ROUNDS", 1)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    told: list[Event] = []
    details = bench_loader(
        tmp_path, "few", seconds=0.1, batch=4, config_path=None, device="cpu", command="chimera x",
        against=Against(("open_clip", "webdataset"), images=24, seconds=0.5), listener=told.append,
    )["details"]  # fmt: skip
    assert [event for event in told if isinstance(event, Note)] == []
    ran = details["against"]
    assert (ran["images"], ran["width"], ran["original_size"], ran["peer_workers"]) == (24, SIZE, False, 2)
    assert [row["name"] for row in ran["ours"]] == [GATHER, EQUAL, SHARDS]
    assert ran["files_ceiling"]["images_per_s"] > 0
    assert [stage["stage"] for stage in ran["file_stages"]] == ["read", "decode", "collate", "augment"]
    gather, equal, shards = (row["images_per_s"] for row in ran["ours"])
    for row in details["peers"]:
        rate = row["images_per_s"]
        assert row["failed"] is None
        assert row["spread"] == [rate, rate]
        assert row["ratio_gather"] == pytest.approx(gather / rate)
        assert row["ratio_equal_output"] == pytest.approx(equal / rate)
        assert row["settings"]["workers"] == 2
        assert row["settings"]["batch"] == 4
    assert details["peers"][1]["ratio_shards"] == pytest.approx(shards / details["peers"][1]["images_per_s"])
    assert list(scratch.iterdir()) == []


def test_a_peer_that_fails_is_told_by_its_last_line(photos: Photos) -> None:
    failed = run_peer(task("nobody", photos), photos.folder)
    assert failed == Lap(None, "KeyError: 'nobody'")


def test_a_failed_peer_takes_no_further_turn_and_the_others_go_on() -> None:
    runs: list[str] = []

    def contestant(name: str, result: Lap) -> Any:
        return lambda: runs.append(name) or result

    told: list[Event] = []
    laps = peers._take_turns(
        {"a": contestant("a", lap(None, "no memory")), "b": contestant("b", lap(5.0))}, told.append
    )
    assert runs == ["a", "b", "b", "b"]
    assert [len(laps["a"]), len(laps["b"])] == [1, 3]
    assert [event.message for event in told if isinstance(event, Note)] == ["a failed: no memory"]


def test_ratios_are_medians_of_the_rounds_own() -> None:
    laps = {
        GATHER: [lap(1000.0), lap(4000.0), lap(2000.0)],
        EQUAL: [lap(100.0), lap(200.0), lap(300.0)],
        BARE: [lap(1.0)] * 3,
        "pillow": [lap(10.0), lap(40.0), lap(20.0)],
        "open_clip": [lap(None, "ended with code 1 and said nothing")],
    }
    pillow, open_clip = summarise(laps, ("pillow", "open_clip"))["peers"]
    assert pillow == {
        "name": "pillow", "failed": None, "settings": {"loader": "one"}, "images_per_s": 20.0, "spread": [10.0, 40.0],
        "rounds": [10.0, 40.0, 20.0], "ratio_equal_output": 10.0, "ratio_gather": 100.0,
    }  # fmt: skip
    assert open_clip["failed"] == "ended with code 1 and said nothing"
    assert open_clip["images_per_s"] is None
    assert open_clip["ratio_equal_output"] is None


def test_ctrl_c_ends_a_peer_and_its_workers(photos: Photos) -> None:
    start = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from chimera_cli.services.peer_loaders import PeerTask\n"
        "from chimera_cli.services.peers import run_peer\n"
        "import json, pathlib\nrun_peer(PeerTask(**json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]))\n"
    )
    endless = as_json(task("pillow", photos, workers=1, seconds=300.0))
    with subprocess.Popen(
        [sys.executable, "-c", start, endless, str(photos.folder)], stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + 60
            # The peer, and its worker.
            while len(family := psutil.Process(process.pid).children(recursive=True)) < 2:
                assert time.monotonic() < deadline, "the peer never began"
                assert process.poll() is None
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(timeout=30) != 0
            _gone, alive = psutil.wait_procs(family, timeout=10)
            assert alive == []
        finally:
            process.kill()
