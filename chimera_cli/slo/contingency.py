"""What to do about a breach: the next step of an objective's contingency table as a command to paste."""

import math
import operator
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import yaml

from chimera_cli.slo.objectives import Action


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a command of the law with its placeholders filled in, each as one shell word."""
    return template.format_map({name: shlex.quote(value) for name, value in values.items()})


def holds(action: Action, config: Mapping[str, Any]) -> bool:
    """Return whether an action would change nothing in a config; one that is a command does not say."""
    settings = resolve(action, config)
    known = bool(action.keys) and settings.keys() == set(action.keys)
    return known and all(_lookup(config, key) == value for key, value in settings.items())


# What the null of a key stands for, where that is another key.
_NULL_IS = {"micro_batch": "batch"}


def resolve(action: Action, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return by dotted key the values that an action gives a config.

    What is scaled has to be known: a key without a number is left out. Whole numbers stay whole and at least 1.
    """
    settings: dict[str, Any] = dict(action.set)
    for bounds, beyond in ((action.at_least, operator.ge), (action.at_most, operator.le)):
        for key, bound in bounds.items():
            value = _lookup(config, key)
            over = math.inf if value is None else value
            settings[key] = value if _is_number(over) and beyond(over, bound) else bound
    for key, factor in action.scale.items():
        value = _lookup(config, key)
        if value is None and key in _NULL_IS:
            value = _lookup(config, _NULL_IS[key])
        if _is_number(value):
            settings[key] = max(1, round(value * factor)) if isinstance(value, int) else value * factor
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def changed(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with other values for some dotted keys; what it was made from stays as it was."""
    result = dict(config)
    for key, value in settings.items():
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            inner = place.get(parent)
            place[parent] = dict(inner) if isinstance(inner, Mapping) else {}
            place = place[parent]
        place[last] = value
    return result


def same_command(one: str, other: str) -> bool:
    """Return whether two commands do the same: the order of options, `--a=b` and `--json` change nothing."""
    return _parts(one) == _parts(other)


def _parts(command: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the words before the first option, and the options with their values in alphabetical order."""
    words = [part for word in _split(command) for part in _option_and_value(word) if part != "--json"]
    start = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    options: list[tuple[str, ...]] = []
    for word in words[start:]:
        options = [*options, (word,)] if word.startswith("--") else [*options[:-1], (*options[-1], word)]
    return words[:start], sorted(options)


def _option_and_value(word: str) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if word.startswith("--") and equals else [word]


def _split(command: str) -> list[str]:
    """Return the words of a command; one that was edited and has an open quote is split at its spaces."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


_ABSENT = object()


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def with_plan(command: str, steps: Sequence[str]) -> str:
    """Return `command` with `--plan` for each of `steps` (OBJECTIVE/ACTION), in place of those it has."""
    kept: list[str] = []
    words = iter(_split(command))
    for word in words:
        if word == "--plan":
            next(words, None)
        elif not word.startswith("--plan="):
            kept.append(word)
    return shlex.join([*kept, *(part for step in steps for part in ("--plan", step))])


def planned(command: str) -> tuple[str, ...]:
    """Return the contingency steps that a command applies, OBJECTIVE/ACTION each, in their order."""
    words = [part for word in _split(command) for part in _option_and_value(word)]
    return tuple(value for word, value in pairwise(words) if word == "--plan")


def with_seeds(command: str, seeds: Sequence[int]) -> str:
    """Return `command` run with other seeds."""
    words = _split(command)
    text = ",".join(str(seed) for seed in seeds)
    for index, word in enumerate(words):
        if word == "--seeds" and index + 1 < len(words):
            return shlex.join([*words[: index + 1], text, *words[index + 2 :]])
        if word.startswith("--seeds="):
            return shlex.join([*words[:index], f"--seeds={text}", *words[index + 1 :]])
    return shlex.join([*words, "--seeds", text])


def more_seeds(seeds: Sequence[int], n: int) -> tuple[int, ...]:
    """Return `seeds`, or `n` of them where those are fewer: the following numbers are added."""
    start = max(seeds, default=-1) + 1
    return (*seeds, *range(start, start + n - len(seeds)))


def option(command: str, name: str) -> str | None:
    """Return the value of an option such as `--config` in a command; None where it is not given."""
    words = _split(command)
    for word, following in pairwise([*words, None]):
        if word == name:
            return following
        if word is not None and word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def setting(key: str, value: Any) -> str:
    """Return a setting as `--set` reads it: `key=value`, the value as YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True)
    value_text = text.removesuffix("...\n").strip()
    return f"{key}={value_text}"
