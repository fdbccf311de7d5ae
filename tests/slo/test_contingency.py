"""Commands to paste: steps added, seeds changed, placeholders quoted; which settings hold, which commands are one."""

import shlex
from typing import Any

import pytest
import yaml

from chimera_cli.slo.contingency import (
    changed,
    fill,
    holds,
    more_seeds,
    option,
    planned,
    resolve,
    same_command,
    setting,
    with_plan,
    with_seeds,
)
from chimera_cli.slo.objectives import Action

BASE = "chimera train full --config 'my recipes/a.yaml' --seeds 0,1,2 --set batch=500 --set=epochs=3"


def test_steps_replace_those_the_command_had() -> None:
    command = with_plan(f"{BASE} --plan regularise --plan=b/two --slo x.yaml", ["a/one", "b/two"])
    assert shlex.split(command) == [
        "chimera", "train", "full", "--config", "my recipes/a.yaml", "--seeds", "0,1,2", "--set", "batch=500",
        "--set=epochs=3", "--slo", "x.yaml", "--plan", "a/one", "--plan", "b/two",
    ]  # fmt: skip
    assert planned(command) == ("a/one", "b/two")
    assert planned("chimera train full --plan=a/one --plan b/two") == ("a/one", "b/two")
    assert planned(BASE) == ()


@pytest.mark.parametrize("value", [1e-05, 0.1, 3, True, None, "float16", "a b"])
def test_settings_are_read_back_as_they_were_meant(value: object) -> None:
    key, _, text = setting("optimiser.lr", value).partition("=")
    assert (key, yaml.safe_load(text)) == ("optimiser.lr", value)


def test_seeds_are_replaced_or_added() -> None:
    assert with_seeds(BASE, range(5)).count("--seeds 0,1,2,3,4 ") == 1
    assert with_seeds("chimera train full --seeds=0", [0, 1]) == "chimera train full --seeds=0,1"
    assert with_seeds("chimera train full", [0, 1]) == "chimera train full --seeds 0,1"
    assert (more_seeds((0,), 3), more_seeds((7, 5), 3), more_seeds((0, 1), 1), more_seeds((), 2)) == (
        (0, 1, 2), (7, 5, 8), (0, 1), (0, 1),
    )  # fmt: skip


def test_options_and_placeholders() -> None:
    assert option(BASE, "--config") == "my recipes/a.yaml"
    assert option("chimera x --config=a.yaml", "--config") == "a.yaml"
    assert option(BASE, "--data") is None
    assert fill("chimera eval --run {run}", {"run": "a b; rm"}) == "chimera eval --run 'a b; rm'"
    # A command that an edit left with an open quote is still only words.
    assert option("chimera x 'y --config a.yaml", "--config") == "a.yaml"


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("chimera  bench loader --batch 512 --data 'toy' --json", True),
        ("chimera bench loader --data=toy --batch=512", True),
        ("chimera bench loader --data toy --batch 256", False),
        ("chimera bench loader --data toy", False),
        ("chimera bench encoders --data toy --batch 512", False),
    ],
)
def test_one_command_may_be_typed_in_many_ways(other: str, same: bool) -> None:
    assert same_command("chimera bench loader --data toy --batch 512", other) is same


def test_settings_hold_where_a_config_has_them_all() -> None:
    config = {"text": {"learn_layers": 0}, "batch": 5, "image": {"deeper": None}}

    def held(**change: Any) -> bool:
        return holds(Action(id="a", do="a", **change), config)

    assert held(set={"text.learn_layers": 0, "batch": 5})
    assert not held(set={"text.learn_layers": 0, "batch": 6})
    assert not held(set={"image.deeper.key": 1})
    assert not held(set={"absent": None})
    assert not held(command="chimera bench loader")


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"at_least": {"batch": 4}}, {"batch": 5}),
        ({"at_least": {"batch": 6}}, {"batch": 6}),
        ({"at_most": {"batch": 4}}, {"batch": 4}),
        ({"at_most": {"text.learn_layers": 2}}, {"text.learn_layers": 2}),
        ({"at_least": {"text.learn_layers": 2}}, {"text.learn_layers": None}),
        ({"scale": {"batch": 2}}, {"batch": 10}),
        ({"scale": {"batch": 0.1}}, {"batch": 1}),
        ({"scale": {"rate": 2}}, {"rate": 0.5}),
        ({"scale": {"micro_batch": 0.6}}, {"micro_batch": 3}),
        ({"scale": {"text.learn_layers": 2}}, {}),
        ({"scale": {"locked": 2}}, {}),
        ({"scale": {"absent": 2}, "set": {"batch": 7}}, {"batch": 7}),
    ],
)
def test_settings_fit_the_config_they_change(change: dict[str, Any], settings: dict[str, Any]) -> None:
    config = {"text": {"learn_layers": None}, "batch": 5, "micro_batch": None, "rate": 0.25, "locked": True}
    action = Action(id="a", do="a", **change)
    assert resolve(action, config) == settings
    # What changes nothing is held; what can't be said is not.
    assert holds(action, config) == (bool(settings) and changed(config, settings) == config)


def test_a_changed_config_leaves_the_first_as_it_was() -> None:
    config = {"text": {"learn_layers": 0, "max_tokens": 32}, "batch": 5}
    assert changed(config, {"text.learn_layers": 2, "new.key": 1}) == {
        "text": {"learn_layers": 2, "max_tokens": 32}, "batch": 5, "new": {"key": 1},
    }  # fmt: skip
    assert config == {"text": {"learn_layers": 0, "max_tokens": 32}, "batch": 5}
