"""`chimera data` as typed: results on stdout, the rest on stderr, exit codes, and a light start."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from support import Chimera
from typer.testing import CliRunner

from chimera_cli.cli.data import _leakage, _skipped, app
from chimera_cli.errors import UsageError


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("CHIMERA_HOME", str(tmp_path))
    return CliRunner()


def test_prepare_info_and_verify(runner: CliRunner, tmp_path: Path) -> None:
    made = json.loads(runner.invoke(app, ["prepare", "toy", "--size", "32", "--json"]).stdout)
    assert (made["name"], made["image_count"], made["unchanged"]) == ("toy", 2600, False)
    again = runner.invoke(app, ["prepare", "toy", "--size", "32"])
    assert "unchanged" in again.stdout
    assert "up to date" in again.stderr
    shown = runner.invoke(app, ["info", "toy", "--preview", str(tmp_path / "sheet.png")]).stdout
    assert "2,000 images, 10,000 captions" in shown
    assert (tmp_path / "sheet.png").exists()
    assert json.loads(runner.invoke(app, ["info", "--json"]).stdout)["packs"][0]["fingerprint"] == made["fingerprint"]
    assert "toy" in runner.invoke(app, ["info"]).stdout
    assert runner.invoke(app, ["verify", "toy"]).exit_code == 0
    images = tmp_path / "data" / "toy" / "images.npy"
    images.write_bytes(images.read_bytes()[:-1])
    broken = runner.invoke(app, ["verify", "toy", "--json"])
    assert broken.exit_code == 1
    assert "images.npy" in json.loads(broken.stdout)["problems"][0]


def test_errors_reach_the_entry_point_as_they_are(runner: CliRunner) -> None:
    for words in (["prepare", "coco"], ["info", "nothing"], ["info", "--preview", "x.png"]):
        assert isinstance(runner.invoke(app, words).exception, UsageError)
    assert runner.invoke(app, ["prepare", "toy", "--fit", "stretch"]).exit_code == 2
    assert "no packs yet" in runner.invoke(app, ["info"]).stdout


def test_info_starts_without_the_heavy_libraries(runner: CliRunner, tmp_path: Path) -> None:
    runner.invoke(app, ["prepare", "toy", "--size", "32"])
    script = """
import sys
from chimera_cli.cli.data import app
app(["info", "toy"], standalone_mode=False)
heavy = "torch timm transformers mlflow pandas scipy pyarrow PIL requests numpy".split()
sys.exit(f"imported {[name for name in heavy if name in sys.modules]}" if set(heavy) & set(sys.modules) else 0)
"""
    environment = os.environ | {"CHIMERA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Return a CSV of ten photos, one of them absent, one there twice in two splits, with an escape in a caption."""
    folder = tmp_path / "own"
    folder.mkdir()
    lines = ["photo,words,part"]
    for number in range(10):
        if number != 4:
            Image.new("RGB", (20, 20), (25 * (number % 9),) * 3).save(folder / f"{number}.png")
        lines.append(f"{number}.png,photo \x1b[31m[bold]{number},{('train', 'val')[number % 2]}")
    (folder / "set.csv").write_text("\n".join(lines))
    return folder / "set.csv"


def test_a_table_as_a_user_types_it(chimera: Chimera, tmp_path: Path, table: Path) -> None:
    words = ["data", "prepare", "table", "--from", str(table), "--size", "16"]
    columns = ["--image-column", "photo", "--caption-column", "words", "--split-column", "part"]
    done = chimera(*words)
    assert (done.code, done.out) == (2, "")
    assert "error: " in done.err
    assert "set.csv has no column of a name known for images" in done.err
    assert "hint:  give --image-column one of photo, words, part" in done.err
    done = chimera(*words, *columns)
    assert done.code == 1
    assert "1 of 10 images are not there, more than the 1.0% allowed; first 4.png: no such file" in done.err
    done = chimera(*words, *columns, "--max-bad", "0.1")
    assert done.code == 0, done.err
    assert "pack set" in done.out
    assert "1 image: 1 no such file (4.png)" in done.out
    assert "1 image is in several splits: 0.png (train) = 9.png (dev)" in done.out
    assert "warning: 1 images are in more than one split" in done.err
    assert "\x1b" not in done.out + done.err
    facts = chimera("data", "info", "set", "--json").json()["packs"][0]
    assert facts["skipped"] == [{"source_file": "4.png", "reason": "no such file"}]
    assert facts["skipped_reasons"] == {"no such file": 1}
    assert [entry["files"] for entry in facts["leakage"]] == [[["0.png", "train"], ["9.png", "dev"]]]
    again = chimera(*words, *columns, "--max-bad", "0.1", "--json")
    assert again.json()["unchanged"] is True
    assert "up to date" in again.err


def test_options_of_another_source_are_refused_in_one_sentence(chimera: Chimera) -> None:
    done = chimera("data", "prepare", "flickr8k", "--caption-column", "x")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == ["error: flickr8k takes no --caption-column", "hint:  it belongs to table"]


def test_a_damaged_shard_is_one_sentence(chimera: Chimera, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(Path(__file__), "a.jpg")
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:3000])
    done = chimera("data", "prepare", "webdataset", "--from", f"{tmp_path}/{{0,0}}.tar")
    assert (done.code, done.out) == (1, "")
    assert "0.tar is cut off or damaged in the member 'a.jpg', at byte 3,000" in done.err
    assert "Traceback" not in done.err


def test_long_lists_are_cut_with_a_count() -> None:
    pack = {
        "skipped": [{"source_file": f"{number}.jpg", "reason": "gone"} for number in range(1234)],
        "skipped_reasons": {f"reason {number}": 1 for number in range(7)},
        "leakage": [{"sha256": "x", "files": [["a", "train"], ["b", "dev"]]}] * 5,
    }
    ((_, skipped),) = _skipped(pack)
    assert skipped.startswith("1,234 images: 1 reason 0; ")
    assert skipped.endswith("… 2 more (0.jpg; 1.jpg; 2.jpg; … 1,231 more)")
    ((_, leakage),) = _leakage(pack)
    assert leakage == "5 images are in several splits: " + "a (train) = b (dev); " * 3 + "… 2 more"
    assert _leakage(pack | {"leakage": None}) == []
