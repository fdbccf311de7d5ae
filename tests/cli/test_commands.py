"""Every command through the real entry point: the whole road on the toy pack, and what wrong input is told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import REPOSITORY, TINY_SANITY, Chimera

SCRATCH = [
    part
    for change in (
        "data=toy", "image.weights=tiny", "image.locked=false", "image.image_size=48", "text.weights=tiny",
        "text.learn_layers=null", "heads.kind=linear", "heads.dim=64", "epochs=3", "batch=100",
        "optimiser.lr_image=3e-3", "optimiser.lr_text=3e-3",
    )
    for part in ("--set", change)
]  # fmt: skip
SANITY = [part for change in TINY_SANITY for part in ("--set", change)]
TOY_SLO = ("--profile", "cpu", "--slo", "configs/slo-toy.yaml")


def test_the_whole_road(chimera: Chimera, tmp_path: Path) -> None:
    sanity = chimera("train", "sanity", "--seed", "0", *SANITY, "--json")
    assert sanity.code == 0, sanity.err
    assert "making the built-in toy set" in sanity.err
    assert sanity.json()["figures"]["loss_drop"] > 0.15

    again = chimera("data", "prepare", "toy", "--json")
    assert again.code == 0, again.err
    assert again.json()["unchanged"] is True

    trained = chimera("train", "full", "--config", "configs/train/toy.yaml", "--seeds", "0,1,2", *SCRATCH, "--json")
    assert trained.code == 0, trained.err
    assert trained.json()["over_seeds"]["rsum"]["n"] == 3

    looked = chimera("eval", "--run", "latest", "--json")
    assert looked.code == 0, looked.err
    figures = looked.json()["figures"]
    assert figures["t2i_r10"] > 3 * 10 / 300, "three times chance"
    assert figures["rsum"] == pytest.approx(trained.json()["figures"]["rsum"], abs=1e-6)

    loader = chimera("bench", "loader", "--seconds", "2", "--json")
    assert loader.code == 0, loader.err
    assert loader.json()["figures"]["loader_images_per_s"] > 0

    encoders = chimera("bench", "encoders", "--image", "tiny", "--text", "tiny", "--repeats", "3", "--json")
    assert encoders.code == 0, encoders.err
    components = encoders.json()["details"]["components"]
    assert {part["component"] for part in components} == {"image encoder", "text encoder"}

    checked = chimera("slo", "check", "--run", "latest", *TOY_SLO, "--json")
    verdicts = {one["id"]: one["verdict"] for one in checked.json()["objectives"]}
    assert verdicts["sanity"] == "pass", checked.out
    assert verdicts["epoch"] == "pass"
    assert "unmeasured" not in verdicts.values()
    assert checked.code == (3 if "fail" in verdicts.values() else 0)

    law = chimera("slo", "check", "--run", "latest", "--profile", "cpu")
    assert law.code == 4, "the toy set is no evidence for the law"

    report = chimera("report", *TOY_SLO, "--html", str(tmp_path / "out.html"))
    assert report.code == 0, report.err
    assert report.out.startswith("# ")
    assert "Not the law" in report.out
    assert "<svg" in (tmp_path / "out.html").read_text(encoding="utf-8")

    listed = chimera("runs", "list", "--json").json()["runs"]
    assert {row["kind"] for row in listed} == {"train", "sanity", "bench-loader", "bench-encoders"}
    shown = chimera("runs", "show", "latest", "--json")
    assert shown.code == 0
    assert chimera("runs", "sync").code == 0
    assert chimera("slo", "plan", *TOY_SLO).code in (0, 3, 4)
    assert chimera("data", "info", "toy", "--preview", str(tmp_path / "sheet.png")).code == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert chimera("data", "verify", "toy").code == 0
    assert chimera("doctor", "--json").json()


def test_the_shuffled_control_exits_3(chimera: Chimera, toy_home: Path) -> None:
    # All 200 updates of the control are run where the two proofs are compared.
    done = chimera("train", "sanity", "--shuffled", *SANITY, "--set", "updates=20", home=toy_home)
    assert done.code == 3
    # So few updates would prove nothing without the option either: that it arrived is seen in the run.
    assert [path.name[:15] for path in (toy_home / "runs").iterdir()] == ["sanity-shuffled"]
    assert "no proof of life" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "full", "--config", "configs/train/toy.yaml", "--seeds", "a,b"], 2, ["--seeds", "0,1,2"]),
        (["train", "full", "--config", "configs/train/toy.yaml", "--set", "epohcs=3"], 2, ["did you mean epochs"]),
        (["train", "full", "--config", "configs/train/toy.yaml", "--set", "epochs=many"], 2, ["epochs", "'many'"]),
        (["train", "full", "--config", "configs/train/tyo.yaml"], 2, ["tyo.yaml does not exist", "toy.yaml"]),
        (["train", "sanity", "--data", "nothing"], 2, ["nothing"]),
        (["eval", "--run", "nothing"], 2, ["no run is called 'nothing'"]),
        (["eval", "--run", "latest"], 2, ["there is no finished train run", "chimera train full"]),
        (["slo", "check", "--run", "latest"], 2, ["there is no finished train run"]),
        (["report", "--run", "nothing"], 2, ["no run is called 'nothing'"]),
        (["data", "prepare", "flickr8k", "--from", "no/such/folder"], 2, ["no/such/folder", "hint"]),
        (["data", "prepare", "flicker8k"], 2, ["flickr8k", "toy"]),
        (["data", "info", "nothing"], 2, ["nothing"]),
        (["train", "full"], 2, ["--config"]),
    ],
)  # fmt: skip
def test_wrong_input_gets_a_sentence_and_leaves_nothing(
    chimera: Chimera, tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    done = chimera(*arguments)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    for word in words:
        assert word in done.err
    assert not (tmp_path / "runs").exists()


def test_the_version_needs_no_command(chimera: Chimera) -> None:
    done = chimera("--version")
    assert (done.code, done.out) == (0, "chimera 0.1.0\n")


def test_debug_shows_the_traceback(chimera: Chimera) -> None:
    assert "Traceback" in chimera("--debug", "eval", "--run", "nothing").err


def test_interrupted_training_exits_130_and_says_so(toy_home: Path) -> None:
    # A shell's background job ignores SIGINT, and its children inherit that: here it must arrive as at a terminal.
    start = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from chimera_cli.__main__ import main\nmain()\n"
    )
    arguments = [
        "train",
        "full",
        "--config",
        "configs/train/toy.yaml",
        "--seeds",
        "0",
        *SCRATCH,
        "--set",
        "epochs=5000",
    ]
    environment = os.environ | {"CHIMERA_HOME": str(toy_home)}
    with subprocess.Popen(
        [sys.executable, "-c", start, *arguments], cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(toy_home.glob("runs/*/seed-0/metrics.jsonl")):
                assert time.monotonic() < deadline, "training never began"
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 130
        finally:
            process.kill()
    (group,) = toy_home.glob("runs/*/group.json")
    assert json.loads(group.read_text(encoding="utf-8"))["status"] == "interrupted"


HEAVY = ("torch", "timm", "transformers", "mlflow", "pandas", "scipy")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["slo", "check"], ["report"], ["runs", "list"], ["data", "info"]], ids=" ".join
)
def test_light_commands_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    script = (
        "import sys\nfrom chimera_cli.__main__ import main\n"
        f"sys.argv = ['chimera', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=os.environ | {"CHIMERA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "[]"
