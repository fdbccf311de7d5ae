"""The two lock files are complete, agree with pyproject.toml, and name no address."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)", re.MULTILINE)
ADDRESS = re.compile(r"://|\bfile:|\s@\s|--index-url|--find-links")
CHANNEL = "${CONDA_CHANNEL_ALIAS}/conda-forge/"


@pytest.fixture(scope="module")
def lock_text() -> str:
    return (ROOT / "requirements.lock").read_text("utf-8")


@pytest.fixture(scope="module")
def pins(lock_text: str) -> dict[str, set[str]]:
    """Versions by canonical name; a universal lock may hold several for different interpreters."""
    found: dict[str, set[str]] = {}
    for match in PIN.finditer(lock_text):
        found.setdefault(canonicalize_name(match["name"]), set()).add(match["version"])
    return found


@pytest.fixture(scope="module")
def conda_lock() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / "conda-lock.yml").read_text("utf-8"))
    return parsed


def direct_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]


@pytest.mark.parametrize("requirement", direct_requirements(), ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_pinned_within_its_range(
    requirement: Requirement, pins: dict[str, set[str]]
) -> None:
    versions = pins[canonicalize_name(requirement.name)]
    assert all(requirement.specifier.contains(version, prereleases=True) for version in versions)


def test_torch_is_the_last_default_wheel_with_pascal_kernels(pins: dict[str, set[str]]) -> None:
    assert pins["torch"] == {"2.7.1"}


def test_nvml_comes_from_one_distribution(pins: dict[str, set[str]]) -> None:
    assert "nvidia-ml-py" in pins
    assert "pynvml" not in pins  # torch warns of it, and warnings are errors here


def test_every_pin_has_hashes_and_no_line_an_address(lock_text: str) -> None:
    starts = [match.start() for match in PIN.finditer(lock_text)]
    for start, end in zip(starts, [*starts[1:], len(lock_text)], strict=True):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", lock_text[start:end]), lock_text[start:end].splitlines()[0]
    assert not ADDRESS.search(lock_text)
    others = [line for line in lock_text.splitlines() if not line.startswith((" ", "#")) and not PIN.match(line)]
    assert others == []


def test_conda_lock_is_closed_under_its_dependencies(conda_lock: dict[str, Any]) -> None:
    names = [package["name"] for package in conda_lock["package"]]
    assert len(names) == len(set(names))
    wanted = {dependency for package in conda_lock["package"] for dependency in package["dependencies"]}
    assert {name for name in wanted if not name.startswith("__")} <= set(names)


def test_conda_lock_holds_python_3_11_and_pip_for_one_platform(conda_lock: dict[str, Any]) -> None:
    versions = {package["name"]: package["version"] for package in conda_lock["package"]}
    assert versions["python"].startswith("3.11.")
    assert "pip" in versions
    assert conda_lock["version"] == 1
    assert conda_lock["metadata"]["platforms"] == ["linux-64"]
    assert {package["platform"] for package in conda_lock["package"]} == {"linux-64"}


def test_conda_packages_are_hashed_and_located_by_variable_alone(conda_lock: dict[str, Any]) -> None:
    assert conda_lock["metadata"]["channels"] == [{"url": "conda-forge", "used_env_vars": ["CONDA_CHANNEL_ALIAS"]}]
    for package in conda_lock["package"]:
        assert re.fullmatch(r"[0-9a-f]{64}", package["hash"]["sha256"]), package["name"]
        assert re.fullmatch(r"[0-9a-f]{32}", package["hash"]["md5"]), package["name"]
        stem = re.escape(f"{package['name']}-{package['version']}-")
        assert re.fullmatch(rf"{re.escape(CHANNEL)}(linux-64|noarch)/{stem}\w+\.conda", package["url"]), package["name"]
    assert not ADDRESS.search((ROOT / "conda-lock.yml").read_text("utf-8"))
