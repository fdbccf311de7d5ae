"""The GitHub workflow stays true: its commands and options exist, and a broken law still leaves a report to read."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support import REPOSITORY

from chimera_cli.cli.main import app

WORKFLOW = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
STEPS = {name: job["steps"] for name, job in WORKFLOW["jobs"].items()}


def lines() -> list[str]:
    """Return every line of shell of all jobs."""
    return [line for steps in STEPS.values() for step in steps for line in step.get("run", "").splitlines()]


def step(name: str) -> dict[str, Any]:
    (found,) = [one for one in STEPS["reproduce"] if one.get("name") == name]
    return dict(found)


def options_of(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that the words lead to, and what is left of them."""
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def test_every_command_of_the_workflow_is_known_with_all_its_options() -> None:
    commands = [shlex.split(line.split(">")[0]) for line in lines() if line.startswith(".venv/bin/chimera ")]
    assert len(commands) == 2
    for words in commands:
        command, rest = options_of(words[1:])
        assert not hasattr(command, "commands"), f"{shlex.join(words)} names no command"
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known
        for path in (word for word in rest if word.startswith("configs/")):
            assert (REPOSITORY / path).is_file()


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z_]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = [line.split()[1] for line in lines() if line.startswith("make ")]
    assert {"lint", "test", "reproduce_small"} <= set(called) <= targets


def test_foreign_actions_are_pinned_to_a_commit() -> None:
    uses = [one["uses"] for steps in STEPS.values() for one in steps if "uses" in one]
    assert uses
    assert [one for one in uses if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", one)] == []


def test_the_gate_annotates_and_nothing_hides_its_exit_code() -> None:
    gate = step("SLO gate")
    assert gate["run"].endswith("--slo configs/slo-toy.yaml --format github")
    assert not {"continue-on-error", "shell"} & set(gate)
    assert "|" not in gate["run"]
    assert WORKFLOW["defaults"]["run"]["shell"] == "bash"


@pytest.mark.parametrize("verdict", [0, 3, 4])
def test_the_report_reaches_the_summary_whatever_the_verdict(tmp_path: Path, verdict: int) -> None:
    """The last job's steps run as GitHub runs them: a step after a failed one only if it says so."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tmp_path / "benchmarks.md").write_text("left over from the checkout\n")
    stubs = {
        tools / "chimera": f'#!/bin/sh\ncase "$1" in slo) echo "::error::law"; exit {verdict};; esac\nexit 0\n',
        tmp_path / "make": f'#!/bin/sh\necho "# Fresh" > benchmarks.md\nexit {verdict}\n',
    }
    for path, text in stubs.items():
        path.write_text(text)
        path.chmod(0o755)
    summary = tmp_path / "summary.md"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(summary)}
    codes: dict[str, int] = {}
    for one in (step for step in STEPS["reproduce"] if "run" in step):
        condition = one.get("if", "success()")
        assert condition in ("success()", "${{ !cancelled() && hashFiles('benchmarks.md') != '' }}")
        if condition == "success()" and any(codes.values()):
            continue
        # `shell: bash` of a workflow means exactly these options.
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", one["run"]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True)
        codes[one.get("name", one["run"])] = done.returncode
    assert summary.read_text() == "# Fresh\n"
    assert codes["SLO gate"] == codes["make reproduce_small PYTHON=python"] == verdict
    assert codes["Report"] == codes["Report with plots"] == 0
