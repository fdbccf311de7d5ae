"""README and shipped configs stay true: every command is named, every YAML file loads, every make target is there."""

import re
from pathlib import Path

import pytest

from chimera_cli.cli.main import app
from chimera_cli.config import TrainConfig, load_config, read_yaml

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    names = [str(command.name) for command in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        for command in group.typer_instance.registered_commands:
            names.append(f"{group.name} {command.name}")
    return names


def test_every_command_is_in_the_readme() -> None:
    missing = [name for name in commands() if f"chimera {name}" not in README]
    assert missing == []


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z_]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^ {4}make ([a-z_]+)", README, re.MULTILINE)) <= targets


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "train").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_recipe_loads_is_complete_and_says_how_to_run_it(path: Path) -> None:
    config = load_config(TrainConfig, path)
    assert read_yaml(path).keys() == TrainConfig.model_fields.keys(), "a recipe names every key"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# chimera train full --config configs/train/{path.name}")
    assert config.batch > 1
