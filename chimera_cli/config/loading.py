"""Configurations from complete YAML files, changed by `--set key=value`.

All errors of a file are reported at once, each with its path in the file; unknown keys are refused with near names.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from chimera_cli.errors import UsageError

C = TypeVar("C", bound=BaseModel)


def load_config(model: type[C], path: Path | None, changes: Sequence[str] = ()) -> C:
    """Return the config in the YAML file `path` (None: the defaults) with `key.sub=value` changes applied.

    Raises UsageError that names the file and every wrong key at once.
    """
    # Onto the defaults of this model, section by section: a section that sets one key keeps the others.
    values = _merged(model().model_dump(), {} if path is None else read_yaml(path))
    for change in changes:
        _apply(values, change)
    return validate(model, values, str(path) if path else "the options")


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` over `defaults`; where both hold a mapping, merged likewise."""
    result = dict(defaults)
    for key, value in given.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises UsageError naming file and line where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
        value = _load_yaml(text)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "configs/ holds the files that ship with chimera"
        raise UsageError(f"{path} does not exist", hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: {error}", "give a YAML text file") from error
    except _KeyTwiceError as error:
        raise UsageError(f"{path}:{error}", "keep one of the two; the parser would take the last") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply to be read", "a config has a few levels") from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date such as 2024-13-45, which the parser takes for one.
        mark = getattr(error, "problem_mark", None)
        # An end that comes too soon is told of the line behind the last one.
        where = f"{path}:{min(mark.line + 1, len(text.splitlines()))}" if mark else str(path)
        raise UsageError(
            f"{where} is not valid YAML: {getattr(error, 'problem', error)}", "check the indentation"
        ) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no keys", "a config is a mapping such as `epochs: 20`")
    return value


# The parser in C, where PyYAML was built with it, is about ten times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _KeyTwiceError(Exception):
    """A mapping holds a key twice; the message begins with the line of the second."""


def _load_yaml(text: str) -> Any:
    """Return what a YAML text means. Raises _KeyTwiceError where a mapping holds a key twice."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _refuse_keys_twice(root, loader)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _refuse_keys_twice(root: yaml.Node, loader: Any) -> None:
    """Look through all mappings as they are written: what `<<` merges may be overridden, a key of one's own not."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        # An alias is the node of its anchor again.
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            waiting += node.value
            continue
        lines: dict[Any, int] = {}
        for key, value in node.value:
            waiting.append(value)
            name = _key_of(key, loader)
            line = key.start_mark.line + 1
            if name in lines:
                raise _KeyTwiceError(f"{line} has the key {key.value!r} again, it is in line {lines[name]} already")
            lines[name] = line


def _key_of(node: yaml.Node, loader: Any) -> Any:
    """Return what tells two keys apart: 1 and 0x1 are one. What can't be a key is refused when it is constructed."""
    if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:merge":
        return (node.tag, node.value) if isinstance(node, yaml.ScalarNode) else id(node)
    return loader.construct_object(node, deep=True)


def validate(model: type[C], values: Mapping[str, Any], origin: str) -> C:
    """Return `values` as a `model`. Raises UsageError listing every wrong key of `origin` with its path."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_sentence(model, problem) for problem in error.errors()]
        raise UsageError(f"{origin}: {'; '.join(problems)}", _key_hint(model, error)) from error


def _sentence(model: type[BaseModel], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "the config"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(problem["loc"][-1]), _known_keys(model, problem["loc"][:-1]), n=1, cutoff=0.5
        )
        return f"{key} is an unknown key" + (f" (did you mean {near[0]}?)" if near else "")
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    # A whole section would drown the sentence; its key says enough.
    given = "" if isinstance(problem["input"], Mapping) else f", not {problem['input']!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"


def _key_hint(model: type[BaseModel], error: ValidationError) -> str:
    unknown = next((problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"), None)
    if unknown is None:
        return "correct the value; the shipped files in configs/ show every key"
    place = ".".join(str(part) for part in unknown[:-1])
    if not _known_keys(model, unknown[:-1]):
        return "the shipped files in configs/ show every key"
    return f"the keys {'of ' + place if place else 'there'} are {', '.join(_known_keys(model, unknown[:-1]))}"


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue  # a place in a list: the model of its entries was found with the list's own key
        field = model.model_fields.get(part)
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that a field holds, by itself or in a tuple or list of them; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part)) is not None), None)


def _apply(values: dict[str, Any], change: str) -> None:
    key, separator, text = change.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set {change!r} is not key=value", "for example --set optimiser.lr_heads=3e-4")
    *parents, last = key.strip().split(".")
    for parent in parents:
        section = values.get(parent) or {}
        if not isinstance(section, Mapping):
            raise UsageError(f"--set {change!r}: {parent} is {section!r} and has no keys", f"set {parent} itself")
        values[parent] = dict(section)
        values = values[parent]
    try:
        values[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"--set {change!r} has a value that is not YAML", "quote text that holds : or #") from error


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one phrase such as `optimiser.lr_heads 0.001 (now 0.01)` for each key that differs, nested ones too."""
    before, after = _flat(then), _flat(now)
    changed = [key for key in {**before, **after} if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    return [f"{key} {_shown(before, key)} (now {_shown(after, key)})" for key in changed]


_ABSENT = object()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(values: Mapping[str, Any], key: str) -> str:
    return yaml.safe_dump(values[key]).splitlines()[0] if key in values else "absent"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds in `0,1,2`. Raises UsageError for anything else, and for a seed named twice."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--seeds {text!r} is not a list of whole numbers", "for example --seeds 0,1,2") from error
    if any(not 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise UsageError(
            f"--seeds {text!r} names a seed twice, or one outside 0 to 2^32 - 1", "for example --seeds 0,1,2"
        )
    return seeds
