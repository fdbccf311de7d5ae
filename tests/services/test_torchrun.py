"""The command under torchrun: two processes, one group, the losses of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

from chimera_cli.runs import list_groups, read_json_lines

SETTINGS = (
    "data=small", "image.image_size=64", "heads.hidden=64", "heads.dim=32", "heads.dropout=0", "augmentation.flip=true",
    "mixup=0.3", "epochs=2", "batch=50", "device=cpu",
)  # fmt: skip


def losses(home: Path) -> list[float]:
    (group,) = list_groups(home)
    assert group.status == "finished"
    rows = read_json_lines(group.seed_dir(0) / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["text.learn_layers=0", "feature_noise=0.1"],
        ["text.learn_layers=0", "image.stages=2", "heads.queries=2", "captions_per_image=3"],
    ],
    ids=["noise", "queries"],
)
def test_torchrun_makes_one_group_with_the_losses_of_one_process(
    small_home: Path, tmp_path: Path, more: list[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    # One set of cached features for both: computing them anew may differ in the last digits.
    (other / "data").symlink_to(small_home / "data")
    command = ["-m", "chimera_cli", "train", "full", "--config", "configs/train/toy.yaml", "--seeds", "0", "--json"]
    changes = [part for change in (*SETTINGS, *more) for part in ("--set", change)]
    runs = {
        small_home: [sys.executable, *command, *changes],
        other: [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command, *changes,
        ],
    }  # fmt: skip
    for home, words in runs.items():
        environment = os.environ | {"CHIMERA_HOME": str(home), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"group":') == 1, "one process prints the result"
    assert losses(other) == pytest.approx(losses(small_home), rel=1e-5)
