"""`chimera data` as typed: results on stdout, the rest on stderr, exit codes, and a light start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chimera_cli.cli.data import app
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
