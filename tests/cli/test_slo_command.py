"""`chimera slo` as a process: exit codes, JSON, and commands that survive a narrow pipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from chimera_cli.runs import Group, create_group, finish_group, source_hash, write_json

FACTS: dict[str, Any] = {
    "command": "chimera train full --config configs/train/locked.yaml --seeds 0,1,2",
    "pack": {"name": "flickr8k", "fingerprint": "f", "source": "flickr8k"},
    "hardware": {"device": "cpu", "cpu": "a processor", "cores": 2, "gpu": None},
    "source_hash": source_hash(),
}
SANE = {"loss_drop": 1.0, "loss_tail_mean": 2.0, "chance_loss": 3.4, "wall_s": 100.0}


def made(home: Path, kind: str, figures: dict[str, float], details: dict[str, Any], seeds: int = 1) -> Group:
    group = create_group(home, kind, "", range(seeds), FACTS)
    for seed in range(seeds):
        document = {"schema_version": 1, "status": "finished", "figures": figures, "details": details}
        write_json(group.seed_dir(seed) / "result.json", document)
    return finish_group(group, "finished")


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    group = made(tmp_path, "train", {"epoch_10k_pairs_s": 900.0}, {}, seeds=3)
    recalls = dict.fromkeys(("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10", "rsum"), 0.5)
    for seed in range(3):
        path = group.seed_dir(seed) / "evaluations" / "flickr8k-dev.json"
        write_json(path, {"pack": FACTS["pack"], "split": "dev", "images": 1000, "figures": recalls})
    made(tmp_path, "sanity", SANE, {"updates": 200, "shuffled": False})
    made(tmp_path, "bench-loader", {"loader_images_per_s": 500.0}, {"seconds": 60.0, "config": None})
    return tmp_path


def test_check_leaves_with_the_code_of_its_verdict(chimera: Any, judged: Path) -> None:
    met = chimera("slo", "check", "--profile", "cpu", home=judged)
    assert (met.code, met.err) == (0, "")
    assert met.out.startswith("profile cpu: ")
    assert "pass: every objective is met" in met.out
    whole = chimera("slo", "check", home=judged)
    assert whole.code == 4
    made(judged, "sanity", SANE | {"loss_drop": 0.1}, {"updates": 200, "shuffled": False})
    broken = chimera("slo", "check", "--json", home=judged)
    assert broken.code == 3
    assert broken.json()["figures"]["loss_drop"] == 0.1
    assert {one["id"]: one["verdict"] for one in broken.json()["objectives"]}["sanity"] == "fail"


def test_plan_prints_a_command_whole_on_one_line(chimera: Any, judged: Path) -> None:
    made(judged, "sanity", SANE | {"loss_drop": 0.1}, {"updates": 200, "shuffled": False})
    done = chimera("slo", "plan", "--profile", "cpu", home=judged, COLUMNS="40")
    lines = done.out.splitlines()
    assert done.code == 0
    assert all(line.startswith("# ") for line in lines[:-1])
    assert lines[-1].startswith("chimera train full")
    assert lines[-1].endswith("--set optimiser.lr_text=5.0e-05")


def test_toy_objectives_head_every_output(chimera: Any, judged: Path) -> None:
    for arguments in (("check",), ("plan",)):
        done = chimera("slo", *arguments, "--slo", "configs/slo-toy.yaml", "--profile", "cpu", home=judged)
        assert "not the law" in done.out.splitlines()[0]
        as_json = chimera("slo", *arguments, "--slo", "configs/slo-toy.yaml", "--json", home=judged)
        assert json.loads(as_json.out)["remarks"][0].startswith("not the law")


def test_what_is_not_there_is_a_usage_error(chimera: Any, judged: Path) -> None:
    for arguments in (("--run", "absent"), ("--slo", "absent.yaml"), ("--profile", "tpu")):
        done = chimera("slo", "check", *arguments, home=judged)
        assert (done.code, done.out) == (2, "")
        assert "Traceback" not in done.err
