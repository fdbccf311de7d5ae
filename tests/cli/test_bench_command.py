"""What `chimera bench` prints, and what wrong input is told."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import Chimera

from chimera_cli.cli.bench import _loader_table

COPY = {
    "name": "a memory copy of the same bytes, by gathering alone",
    "images_per_s": 100_000.0,
    "gather_images_per_s": 95_000.0,
    "share_reached": 0.95,
    "share_least": 0.9,
    "share_most": 0.975,
}
RESULT: dict[str, Any] = {
    "group": "bench-loader-1",
    "figures": {"loader_images_per_s": 2000.0, "gpu_util_mean": None, "vram_peak_gb": None, "ram_peak_gb": 1.0},
    "details": {
        "batch": 64, "image_size": 224, "device": "cpu", "batches": 10, "seconds": 60.0, "bound_by": "cpu",
        "ceiling": COPY, "latency_ms_p50": 30.0, "latency_ms_p95": 40.0,
        "stages": [{"stage": "gather", "p50_ms": 0.7, "p95_ms": 1.2}],
    },
}  # fmt: skip
AGAINST = {
    "images": 2000, "width": 500, "height": 375, "mean_kb": 137.2, "jpeg_quality": 97, "seconds": 15.0, "rounds": 3,
    "peer_workers": 2, "torch_threads": 2, "files_ceiling": {"images_per_s": 600.0},
    "file_stages": [{"stage": "decode", "p50_ms": 99.0, "p95_ms": 120.0}],
    "ours": [{"name": "gather only", "images_per_s": 90_000.0, "spread": [80_000.0, 91_000.0]}],
}  # fmt: skip
PEERS = [
    {
        "name": "pillow", "failed": None, "images_per_s": 100.0, "spread": [90.0, 110.0], "ratio_equal_output": 20.0,
        "ratio_gather": 900.0, "settings": {"version": "13.0.0", "loader": "Pillow [red]and[/] torchvision"},
    },
    {"name": "open_clip", "failed": "RuntimeError: no memory", "images_per_s": None, "settings": {}},
]  # fmt: skip


def shown(details: dict[str, Any]) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(_loader_table(RESULT | {"details": RESULT["details"] | details}))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_the_loaders_table_says_what_was_reached_and_what_limits() -> None:
    text = shown({})
    words = "95,000 images/s, median share 95.0 % (90.0 – 97.5 %) of a memory copy (100,000 images/s)"
    assert words in " ".join(text.split())
    assert "against" not in text
    assert "bus" not in text
    bus = {"name": "copy of the pixels to the GPU from pinned memory", "images_per_s": 80_000.0, "share_reached": 0.5}
    assert "80,000 images/s (copy of the pixels to the GPU from pinned memory), 50.0 % reached" in shown({"bus": bus})


def test_peers_stand_beside_ours_and_a_failed_one_says_why() -> None:
    lines = shown({"peers": PEERS, "against": AGAINST}).splitlines()
    (ours,) = [line.split() for line in lines if line.startswith("chimera, gather only")]
    assert ours[3:] == ["90,000", "80,000", "–", "91,000"]
    pillow, words = [line.split() for line in lines if line.startswith("pillow")]
    assert pillow == ["pillow", "100", "90", "–", "110", "20.0", "x", "900.0", "x"]
    assert words == ["pillow", "13.0.0,", "Pillow", "[red]and[/]", "torchvision"]
    assert [line.split()[1] for line in lines if line.startswith("open_clip")] == ["failed", "failed:"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["loader", "--against", "pilow"], ["no peer 'pilow'", "did you mean pillow?"]),
        (["loader", "--against", ","], ["names no peer", "open_clip, pillow, webdataset"]),
        (["loader", "--data", "nothing", "--against", "pillow"], ["there is no pack 'nothing'"]),
        (["loader", "--original-size"], ["--original-size", "--against pillow"]),
        (["loader", "--against", "pillow", "--peer-seconds", "0"], ["--peer-seconds"]),
        (["prepare", "--from", "no/such/folder"], ["no/such/folder is not a folder"]),
        (["prepare", "--images", "0"], ["--images"]),
    ],
)
def test_wrong_input_gets_a_sentence_and_leaves_nothing(
    chimera: Chimera, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    done = chimera("bench", *arguments)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    for word in words:
        assert word in done.err
    assert not (tmp_path / "runs").exists()


def test_prepare_prints_its_rates(chimera: Chimera, tmp_path: Path) -> None:
    done = chimera("bench", "prepare", "--images", "2", "--size", "32")
    assert done.code == 0, done.err
    assert "against Pillow alone" in done.out
    assert "32 px (crop)" in done.out
    assert len(list((tmp_path / "runs").glob("bench-prepare-*"))) == 1
