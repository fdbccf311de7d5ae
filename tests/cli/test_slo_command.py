"""`chimera slo` as a process: exit codes, JSON, and commands that survive a narrow pipe."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support import REPOSITORY

from chimera_cli.cli.main import app
from chimera_cli.config import TrainConfig
from chimera_cli.errors import UsageError
from chimera_cli.runs import (
    Group,
    create_group,
    finish_group,
    latest_group,
    read_sealed_json,
    source_hash,
    update_group,
    write_sealed_json,
)
from chimera_cli.services.provenance import group_facts

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
        write_sealed_json(group.seed_dir(seed) / "result.json", document)
    return finish_group(group, "finished")


FORMS = ("table", "json", "junit", "markdown", "github")


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    group = made(tmp_path, "train", {"epoch_10k_pairs_s": 900.0}, {}, seeds=3)
    recalls = dict.fromkeys(("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10", "rsum"), 0.5)
    for seed in range(3):
        path = group.seed_dir(seed) / "evaluations" / "flickr8k-dev.json"
        write_sealed_json(path, {"pack": FACTS["pack"], "split": "dev", "images": 1000, "figures": recalls})
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
    assert lines[-1].endswith("--plan sanity/gentler-towers")
    assert "# it sets optimiser.lr_text=5.0e-05" in lines


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


def test_every_format_leaves_with_the_same_code_and_nothing_but_itself_on_stdout(chimera: Any, judged: Path) -> None:
    made(judged, "sanity", SANE | {"loss_drop": 0.1}, {"updates": 200, "shuffled": False})
    done = {form: chimera("slo", "check", "--profile", "cpu", "--format", form, home=judged) for form in FORMS}
    assert {form: one.code for form, one in done.items()} == dict.fromkeys(FORMS, 3)
    assert {one.err for one in done.values()} == {""}
    assert done["json"].json()["verdict"] == "fail"
    assert ElementTree.fromstring(done["junit"].out.encode()).get("failures") == "1"
    assert done["github"].out.count("::error title=SLO sanity%3A fail::") == 1
    assert done["markdown"].out.startswith("# SLO check of train-")


def test_a_doubt_warns_on_stderr_and_strict_leaves_with_4(chimera: Any, judged: Path) -> None:
    path = judged / "runs" / latest_group(judged).name / "seed-1" / "evaluations" / "flickr8k-dev.json"
    document = read_sealed_json(path)
    write_sealed_json(path, document | {"figures": document["figures"] | {"i2t_r10": 0.2}})
    done = chimera("slo", "check", "--profile", "cpu", "--format", "markdown", home=judged)
    assert (done.code, done.err.startswith("warning: viability inconclusive")) == (0, True)
    assert chimera("slo", "check", "--profile", "cpu", "--strict", home=judged).code == 4


def test_explain_is_about_one_objective_and_its_code(chimera: Any, judged: Path) -> None:
    made(judged, "sanity", SANE | {"loss_drop": 0.1}, {"updates": 200, "shuffled": False})
    met = chimera("slo", "check", "--profile", "cpu", "--explain", "epoch", home=judged)
    assert (met.code, "formula: max epoch_10k_pairs_s ≤ 10800" in met.out) == (0, True)
    missed = chimera("slo", "check", "--profile", "cpu", "--explain", "sanity", "--json", home=judged)
    assert (missed.code, missed.json()["objective"]["id"]) == (3, "sanity")
    for arguments in (
        ("--explain", "absent"),
        ("--explain", "epoch", "--format", "junit"),
        ("--json", "--format", "junit"),
    ):
        assert chimera("slo", "check", "--profile", "cpu", *arguments, home=judged).code == 2


@pytest.mark.parametrize("form", [*FORMS, "explain", "plan"])
def test_a_closed_pipe_changes_no_exit_code(judged: Path, form: str) -> None:
    made(judged, "sanity", SANE | {"loss_drop": 0.1}, {"updates": 200, "shuffled": False})
    words = ["plan"] if form == "plan" else ["check", *(["--explain", "sanity"] if form == "explain" else [])]
    words += ["--format", form] if form in FORMS else []
    # The reader has gone before anything is written.
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "chimera_cli", "slo", *words, "--profile", "cpu"],
        env=os.environ | {"CHIMERA_HOME": str(judged)}, stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0 if form == "plan" else 3, "")


def test_a_narrow_terminal_gets_the_columns_it_can_show(chimera: Any, judged: Path) -> None:
    narrow = chimera("slo", "check", "--profile", "cpu", home=judged, COLUMNS="60")
    whole = chimera("slo", "check", "--profile", "cpu", home=judged, COLUMNS="120")
    assert ("margin" in whole.out, "95 % interval" in whole.out) == (True, True)
    assert ("margin" in narrow.out, "interval" in narrow.out) == (False, False)
    head = next(line for line in narrow.out.splitlines() if line.startswith("law"))
    assert head.split() == ["law", "verdict", "figure", "measured", "limit"]


def test_names_from_files_reach_the_terminal_harmless(chimera: Any, judged: Path) -> None:
    group = latest_group(judged)
    nasty = "a[red]b[/red]\x1b[31m\x9b2J<b>\u202eabc\u2066"
    update_group(group, pack=FACTS["pack"] | {"name": nasty}, command=f"chimera '{nasty}'")
    for arguments in (("check",), ("check", "--explain", "sanity"), ("check", "--json"), ("plan",)):
        done = chimera("slo", *arguments, "--profile", "cpu", home=judged)
        assert arguments == ("plan",) or "a[red]b[/red]" in done.out
        assert not set(done.out + done.err) & set("\x1b\x9b\u202e\u2066")


def test_a_step_of_the_plan_changes_the_config_and_the_command_that_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text((REPOSITORY / "configs" / "slo.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    seen: list[tuple[Any, ...]] = []

    def train_full(home: Path, config: TrainConfig, seeds: Any, label: str, command: str, *_rest: Any) -> Any:
        seen.append((config, command))
        return {"group": "x", "seeds": seeds, "over_seeds": {}}

    monkeypatch.setattr("chimera_cli.services.train.train_full", train_full)
    words = ["train", "full", "--config", str(REPOSITORY / "configs" / "train" / "locked.yaml"), "--set", "batch=32"]
    words += ["--plan", "more-negatives", "--slo", str(path)]
    # The command line of the process is what the run records.
    monkeypatch.setattr("sys.argv", ["chimera", *words])
    app(words, standalone_mode=False)
    ((config, command),) = seen
    assert config.batch == 64
    assert command.endswith(f"--set batch=32 --slo {path} --plan viability/more-negatives")
    facts = group_facts(command, None, config.model_dump(), torch.device("cpu"))
    step = {"objective": "viability", "action": "more-negatives", "slo": str(path)}
    assert facts["plan"] == step | {"before": []}
    assert "plan" not in group_facts("chimera train full", None, {}, torch.device("cpu"))
    assert capsys.readouterr().err.startswith("plan: viability/more-negatives: Double the batch")
    for wrong in (["--plan", "more-negative"], ["--slo", str(path)]):
        with pytest.raises(UsageError):
            app([*words[:4], *wrong], standalone_mode=False)
