"""Commands to paste: settings replaced, seeds changed, placeholders quoted."""

import shlex

import pytest
import yaml

from chimera_cli.slo.contingency import fill, option, untried, with_seeds, with_settings
from chimera_cli.slo.objectives import Action

BASE = "chimera train full --config 'my recipes/a.yaml' --seeds 0,1,2 --set batch=500 --set=epochs=3"


def test_settings_replace_what_the_command_had() -> None:
    command = with_settings(BASE, {"batch": 250, "text.learn_layers": None, "image.locked": False})
    assert shlex.split(command) == [
        "chimera", "train", "full", "--config", "my recipes/a.yaml", "--seeds", "0,1,2", "--set=epochs=3",
        "--set", "batch=250", "--set", "text.learn_layers=null", "--set", "image.locked=false",
    ]  # fmt: skip
    assert "epochs=3" not in with_settings(BASE, {"epochs": 9})


@pytest.mark.parametrize("value", [1e-05, 0.1, 3, True, None, "float16", "a b"])
def test_settings_are_read_back_as_they_were_meant(value: object) -> None:
    words = shlex.split(with_settings("chimera train full", {"key": value}))
    assert yaml.safe_load(words[-1].partition("=")[2]) == value


def test_seeds_are_replaced_or_added() -> None:
    assert with_seeds(BASE, range(5)).count("--seeds 0,1,2,3,4 ") == 1
    assert with_seeds("chimera train full --seeds=0", [0, 1]) == "chimera train full --seeds=0,1"
    assert with_seeds("chimera train full", [0, 1]) == "chimera train full --seeds 0,1"


def test_options_and_placeholders() -> None:
    assert option(BASE, "--config") == "my recipes/a.yaml"
    assert option("chimera x --config=a.yaml", "--config") == "a.yaml"
    assert option(BASE, "--data") is None
    assert fill("chimera eval --run {run}", {"run": "a b; rm"}) == "chimera eval --run 'a b; rm'"


def test_taken_actions_are_not_proposed_again() -> None:
    actions = [
        Action(id="a", do="a", set={"text.learn_layers": 0, "batch": 5}),
        Action(id="b", do="b", command="chimera bench loader --data {pack}"),
        Action(id="c", do="c", set={"image.deeper.key": 1}),
    ]
    config = {"text": {"learn_layers": 0}, "batch": 5, "image": {"deeper": None}}
    left = untried(actions, config, ["chimera  bench loader --data 'toy'"], {"pack": "toy"})
    assert [action.id for action in left] == ["c"]
    assert [action.id for action in untried(actions, {"batch": 5}, [], {"pack": "toy"})] == ["a", "b", "c"]
