"""What to do about a breach: the next step of an objective's contingency table as a command to paste."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from chimera_cli.slo.objectives import Action


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a command of the law with its placeholders filled in, each as one shell word."""
    return template.format_map({name: shlex.quote(value) for name, value in values.items()})


def untried(
    actions: Sequence[Action], config: Mapping[str, Any], ran: Iterable[str], values: Mapping[str, str]
) -> list[Action]:
    """Return the actions that were not taken yet, in their order.

    Settings are taken when `config`, the one the evidence was made with, holds them all; a command, filled in with
    `values`, when it is among those that `ran`.
    """
    done = {tuple(shlex.split(command)) for command in ran}

    def taken(action: Action) -> bool:
        if action.command is not None:
            return tuple(shlex.split(fill(action.command, values))) in done
        return all(_lookup(config, key) == value for key, value in action.set.items())

    return [action for action in actions if not taken(action)]


_ABSENT = object()


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def with_settings(command: str, settings: Mapping[str, Any]) -> str:
    """Return `command` with a `--set key=value` for each setting, in place of those it has for the same keys."""
    words = shlex.split(command)
    kept: list[str] = []
    skip = False
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if skip:
            skip = False
        elif word == "--set" and following.partition("=")[0].strip() in settings:
            skip = True
        elif not (word.startswith("--set=") and word.removeprefix("--set=").partition("=")[0] in settings):
            kept.append(word)
    for key, value in settings.items():
        kept += ["--set", f"{key}={_as_yaml(value)}"]
    return shlex.join(kept)


def with_seeds(command: str, seeds: Sequence[int]) -> str:
    """Return `command` run with other seeds."""
    words = shlex.split(command)
    text = ",".join(str(seed) for seed in seeds)
    for index, word in enumerate(words):
        if word == "--seeds" and index + 1 < len(words):
            return shlex.join([*words[: index + 1], text, *words[index + 2 :]])
        if word.startswith("--seeds="):
            return shlex.join([*words[:index], f"--seeds={text}", *words[index + 1 :]])
    return shlex.join([*words, "--seeds", text])


def option(command: str, name: str) -> str | None:
    """Return the value of an option such as `--config` in a command; None where it is not given."""
    words = shlex.split(command)
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _as_yaml(value: Any) -> str:
    """Return a setting as `--set` reads it back."""
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return text.removesuffix("...\n").strip()
