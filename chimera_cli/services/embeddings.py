"""Embeddings of a split by the checkpoint of a run, with the cached features of locked towers where there are any."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.events import Listener, Note, ignore

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from chimera_cli.data.pack import Pack
    from chimera_cli.models.combination import Encoder
    from chimera_cli.models.dual_encoder import DualEncoder
    from chimera_cli.models.tokens import StateTable, Tokens, TokenTable
    from chimera_cli.training.cache import Allocate, CachedFeatures
    from chimera_cli.training.features import Views

# Captions by which another way of computing is compared with the tower before it is used.
_SAMPLES = 8
# Images, likewise; their pixels are read at each evaluation.
_IMAGE_SAMPLES = 4
# The source that decides features: of towers, of the looks of images, and which of them may be mirrored.
_SOURCES = (
    "models",
    "training/features.py",
    "training/batches.py",
    "data/augmentation.py",
    "data/captions.py",
    "services/embeddings.py",
)
# Images whose cached features or maps are embedded at a time.
_AT_ONCE = 64
# What this process has said of computing features, and hashes of what it has tried in vain: no session, no cache.
_said: set[str] = set()
_unfit: set[str] = set()


@dataclass(frozen=True, slots=True)
class Crops:
    """Random views that are cached beside the plain and the mirrored one, for training alone: `count` of them."""

    count: int
    crop_scale: float
    colour_jitter: float


def embed_split(
    seed_dir: Path, pack: "Pack", split: str, device: "torch.device", listener: Listener = ignore
) -> "tuple[NDArray[np.float32], NDArray[np.float32]]":
    """Return image_features (images, dim) and text_features (captions, dim) of a split, L2-normalised.

    Rows are in the order of `pack.split_indices(split)` and `pack.captions(split)`. Raises ChimeraError for a
    checkpoint that is missing or damaged.
    """
    from chimera_cli.models.combination import load_model

    model = load_model(seed_dir / "checkpoints" / "best.safetensors", device)
    return embed_images(model, pack, split, device, listener), embed_captions(model, pack, split, device, listener)


def embed_texts(
    seed_dir: Path, texts: Sequence[str], device: "torch.device", listener: Listener = ignore
) -> "NDArray[np.float32]":
    """Return text_features (texts, dim), L2-normalised, of any sentences by the best checkpoint of a seed."""
    from chimera_cli.models.combination import load_model

    model = load_model(seed_dir / "checkpoints" / "best.safetensors", device)
    return embed_texts_with(model, texts, device, listener)


def embed_images(
    model: "Encoder", pack: "Pack", split: str, device: "torch.device", listener: Listener
) -> "NDArray[np.float32]":
    """Return image_features (images, dim) of a split; views of a model that averages them are averaged.

    As far as the tower is locked, what it makes comes from the cache.
    """
    from chimera_cli.models.combination import members_of, side_by_side

    return side_by_side([_images_of(one, pack, split, device, listener) for one in members_of(model)])


def _images_of(
    model: "DualEncoder", pack: "Pack", split: str, device: "torch.device", listener: Listener
) -> "NDArray[np.float32]":
    import torch

    from chimera_cli.training.features import Views, image_features

    if model.architecture.image_locked:
        return _embed_cached(
            model.project_image, locked_image_features(model, pack, split, device, listener).values, device
        )
    if (maps := image_maps(model, pack, split, device, listener)) is not None:
        return _embed_cached(model.encode_image, maps.values, device)
    values = image_features(
        model.encode_image,
        model.image_tower,
        pack.images,
        pack.split_indices(split),
        image_size=model.architecture.image_size,
        device=device,
        views=Views(mirrored=model.architecture.flipped_view),
        listener=listener,
        stage=f"{split} images",
    )
    return mean_direction(torch.from_numpy(values)).numpy()


def _embed_cached(
    embed: "Callable[[Tensor], Tensor]", cached: "NDArray[Any]", device: "torch.device"
) -> "NDArray[np.float32]":
    """Return image_features (images, dim) of features or maps (images, views, ...): each view's `embed`, averaged."""
    import numpy as np
    import torch

    parts = []
    with torch.inference_mode():
        for start in range(0, len(cached), _AT_ONCE):
            some = torch.from_numpy(cached[start : start + _AT_ONCE])
            features = embed(as_floats(some.flatten(0, 1), device)).float()
            parts.append(mean_direction(features.view(*some.shape[:2], -1)).cpu().numpy())
    return np.concatenate(parts)


def as_floats(cached: "Tensor", device: "torch.device") -> "Tensor":
    """Return cached features or maps (batch, ...) as a model takes them: on its device, in float32, channels last."""
    import torch

    floats = cached.to(device, non_blocking=True).float()
    return floats.contiguous(memory_format=torch.channels_last) if floats.ndim == 4 else floats


def embed_captions(
    model: "Encoder", pack: "Pack", split: str, device: "torch.device", listener: Listener
) -> "NDArray[np.float32]":
    """Return text_features (captions, dim), L2-normalised, of a split, from the cache as far as the tower is locked."""
    from chimera_cli.models.combination import members_of, side_by_side

    return side_by_side([_captions_of(one, pack, split, device, listener) for one in members_of(model)])


def _captions_of(
    model: "DualEncoder", pack: "Pack", split: str, device: "torch.device", listener: Listener
) -> "NDArray[np.float32]":
    import torch

    from chimera_cli.training.features import caption_features

    if model.architecture.learn_layers == 0:
        pooled = pooled_caption_features(model, pack, split, device, listener).values
        with torch.inference_mode():
            return model.project_text(torch.from_numpy(pooled).to(device)).float().cpu().numpy()
    known = caption_states(model, pack, split, device, listener)
    if known is None:
        return _texts_of(model, pack.captions(split).texts, device, listener)
    return caption_features(model.encode_text, known[0], device=device, listener=listener, stage=f"{split} captions")


def embed_texts_with(
    model: "Encoder", texts: Sequence[str], device: "torch.device", listener: Listener = ignore
) -> "NDArray[np.float32]":
    """Return text_features (texts, dim), L2-normalised, of any sentences."""
    from chimera_cli.models.combination import members_of, side_by_side

    return side_by_side([_texts_of(one, texts, device, listener) for one in members_of(model)])


def _texts_of(
    model: "DualEncoder", texts: Sequence[str], device: "torch.device", listener: Listener
) -> "NDArray[np.float32]":
    from chimera_cli.training.features import caption_features

    table = model.text_tower.token_table(texts, model.architecture.max_tokens)
    return caption_features(model.encode_text, table, device=device, listener=listener, stage="captions")


def mean_direction(views: "torch.Tensor") -> "torch.Tensor":
    """Return the normalised mean (n, dim) of unit features (n, views, dim)."""
    import torch.nn.functional as F

    return F.normalize(views.mean(dim=1), dim=-1)


def locked_image_features(
    model: "DualEncoder",
    pack: "Pack",
    split: str,
    device: "torch.device",
    listener: Listener,
    crops: "Crops | None" = None,
) -> "CachedFeatures":
    """Return what the locked image tower makes of a split, (images, views, ...), from the cache, made if need be.

    The views are the image itself, its mirror image where the model averages both, and then those of `crops`. Features
    of all places are kept in half precision, where its range is wide enough.
    """
    from chimera_cli.models.sessions import image_session

    tower = model.image_tower.eval()
    images = _Images(model, pack, split, device, listener, crops)
    compute = partial(images.cached, "images", tower, partial(image_session, tower))
    stages = {"stages": tower.stages}
    return images.in_half(compute, stages | {"places": True}) if tower.places else compute(stages)


def image_maps(
    model: "DualEncoder",
    pack: "Pack",
    split: str,
    device: "torch.device",
    listener: Listener,
    crops: "Crops | None" = None,
) -> "CachedFeatures | None":
    """Return the maps (images, views, ...) of a split after the locked blocks of the image tower, made if need be.

    The views are those of pooled features; in half precision, where its range is wide enough. None where no block is
    locked or all are, and for a tower that can't be computed in two parts.
    """
    from chimera_cli.models.sessions import SessionError, compare_image_parts, map_session

    tower = model.image_tower
    if tower.locked_blocks is None:
        return None
    images = _Images(model, pack, split, device, listener, crops)
    try:
        compare_image_parts(tower, images.samples().to(device))
    except SessionError as error:
        _say_once(listener, f"{error}: nothing of the image tower is cached")
        return None
    compute = partial(images.cached, "maps", tower.lower_maps, partial(map_session, tower))
    return images.in_half(compute, {"blocks": tower.locked_blocks})


@dataclass(frozen=True, slots=True)
class _Images:
    """The images of a split, of which something is to be cached."""

    model: "DualEncoder"
    pack: "Pack"
    split: str
    device: "torch.device"
    listener: Listener
    crops: "Crops | None"

    def samples(self) -> "Tensor":
        """Return the first images as the tower takes them, (4, 3, S, S) at most."""
        import torch

        from chimera_cli.training.features import preprocess

        some = self.pack.images[self.pack.split_indices(self.split)[:_IMAGE_SAMPLES]]
        return preprocess(torch.from_numpy(some), self.model.image_tower, self.model.architecture.image_size)

    def in_half(self, compute: "Callable[..., CachedFeatures]", key: dict[str, Any]) -> "CachedFeatures":
        """Return what `compute(key, half=True)` gives, or in float32 where its values don't fit into half precision."""
        from chimera_cli.runs import content_hash

        looks = None if self.crops is None else asdict(self.crops)
        tried = content_hash(["half", key, self.pack.fingerprint, self.split, self.model.architecture.as_dict(), looks])
        if tried not in _unfit:
            try:
                return compute(key, half=True)
            except OverflowError as error:
                _unfit.add(tried)
                _say_once(self.listener, f"{error}: float32 is cached, which takes twice the disk")
        return compute(key | {"dtype": "float32"})

    def cached(
        self,
        what: str,
        tower: "Callable[[Tensor], Tensor]",
        session: "Callable[[Tensor], Callable[[Tensor], Tensor]]",
        more: dict[str, Any],
        half: bool = False,
    ) -> "CachedFeatures":
        """Return what `tower`, or the `session` of some samples, makes of the views; `more` is of its key."""
        import numpy as np

        from chimera_cli.models.image_tower import image_weights_hash
        from chimera_cli.training.features import image_features

        shape, pack, split = self.model.architecture, self.pack, self.split
        key = _key(pack, split, shape.image_weights, image_weights_hash(shape.image_weights), self.device)
        key |= {"image_size": shape.image_size, "flipped_view": shape.flipped_view} | more
        key |= {} if self.crops is None else {"crops": asdict(self.crops)}

        def compute(encode: "Callable[[Any], Tensor]", allocate: "Allocate") -> object:
            return image_features(
                encode,
                self.model.image_tower,
                pack.images,
                pack.split_indices(split),
                image_size=shape.image_size,
                device=self.device,
                views=_views(self.model, pack, split, self.crops),
                allocate=allocate,
                dtype=np.float16 if half else np.float32,
                listener=self.listener,
                stage=f"{split} image {'maps' if what == 'maps' else 'features'}",
            )

        def made() -> "Callable[[Tensor], Tensor]":
            return session(self.samples())

        return _cached(pack, f"{split}-{what}", key, made, tower, compute, self.device, self.listener)


def _views(model: "DualEncoder", pack: "Pack", split: str, crops: "Crops | None") -> "Views":
    from chimera_cli.data.augmentation import Augmentation
    from chimera_cli.training.features import Views

    shape, tower = model.architecture, model.image_tower
    if crops is None:
        return Views(mirrored=shape.flipped_view)
    how = Augmentation(
        shape.image_size,
        crop_scale=crops.crop_scale,
        flip=shape.flipped_view,
        colour_jitter=crops.colour_jitter,
        mean=tower.mean,
        std=tower.std,
    )
    return Views(shape.flipped_view, crops.count, how, images_without_sides(pack, split))


def images_without_sides(pack: "Pack", split: str = "train") -> "Tensor":
    """Return for each image of a split, (n,) bool, that none of its captions says left or right: it may be mirrored."""
    import torch

    from chimera_cli.data.captions import mentions_side

    table = pack.captions(split)
    sided = [any(mentions_side(table.texts[row]) for row in rows) for rows in table.by_image()]
    return ~torch.tensor(sided)


def pooled_caption_features(
    model: "DualEncoder", pack: "Pack", split: str, device: "torch.device", listener: Listener
) -> "CachedFeatures":
    """Return the locked text tower's features (captions, width) of a split from the cache, made if need be."""
    from chimera_cli.models.sessions import caption_session
    from chimera_cli.models.text_tower import text_weights_hash
    from chimera_cli.training.features import caption_features

    shape, tower = model.architecture, model.text_tower.eval()
    key = _key(pack, split, shape.text_weights, text_weights_hash(shape.text_weights), device)
    key |= {"max_tokens": shape.max_tokens}
    key |= {"hidden_states": list(shape.text_hidden_states)} if shape.text_hidden_states else {}

    @cache
    def table() -> "TokenTable":
        return tower.token_table(pack.captions(split).texts, shape.max_tokens)

    def session() -> "Callable[[Tokens], Tensor]":
        return caption_session(tower, table().samples(_SAMPLES))

    def compute(encode: "Callable[[Any], Tensor]", allocate: "Allocate") -> object:
        stage = f"{split} caption features"
        return caption_features(encode, table(), device=device, allocate=allocate, listener=listener, stage=stage)

    return _cached(pack, f"{split}-captions", key, session, tower, compute, device, listener)


def caption_states(
    model: "DualEncoder", pack: "Pack", split: str, device: "torch.device", listener: Listener
) -> "tuple[StateTable, float] | None":
    """Return the hidden states of a split after the locked layers of the text tower, and what they took in seconds.

    None where no layer is locked, where none learns, and for an encoder that can't be computed in two parts.
    """
    from chimera_cli.models.sessions import SessionError, compare_text_parts, state_session
    from chimera_cli.models.text_tower import text_weights_hash
    from chimera_cli.models.tokens import StateTable
    from chimera_cli.runs import content_hash
    from chimera_cli.training import features

    shape, tower = model.architecture, model.text_tower
    if not shape.learn_layers:
        return None
    table = tower.token_table(pack.captions(split).texts, shape.max_tokens)
    key = _key(pack, split, shape.text_weights, text_weights_hash(shape.text_weights), device)
    key |= {"max_tokens": shape.max_tokens, "layers": tower.locked_layers}
    key |= {"hidden_states": tower.lower_numbers} if tower.lower_numbers else {}
    tried = content_hash(["states", key])
    if tried in _unfit:
        return None

    def compute(encode: "Callable[[Any], Tensor]", allocate: "Allocate") -> object:
        stage = f"{split} caption states"
        return features.caption_states(encode, table, device=device, allocate=allocate, listener=listener, stage=stage)

    session = partial(state_session, tower, table.samples(_SAMPLES))
    try:
        compare_text_parts(tower, table.samples(_SAMPLES), device)
        known = _cached(pack, f"{split}-states", key, session, tower.lower_states, compute, device, listener)
    except (SessionError, OverflowError) as error:
        _unfit.add(tried)
        _say_once(listener, f"{error}: nothing of the text tower is cached")
        return None
    return StateTable(table, known.values), known.seconds


# ---- the cache ------------------------------------------------------------------------------------------------------


def _cached(
    pack: "Pack",
    label: str,
    key: dict[str, Any],
    session: "Callable[[], Callable[[Any], Tensor]]",
    tower: "Callable[[Any], Tensor]",
    compute: "Callable[[Callable[[Any], Tensor], Allocate], object]",
    device: "torch.device",
    listener: Listener,
) -> "CachedFeatures":
    """Return the features of `key` from the cache, made if need be: on a CPU by a session where there can be one.

    What computed them is part of the key: features of two makes differ in their last digits and are never mixed.
    """
    from chimera_cli.models.sessions import SessionError, session_backend
    from chimera_cli.runs import content_hash
    from chimera_cli.training.cache import cached

    folder = _features_dir(pack)
    backend = session_backend() if device.type == "cpu" else None
    tried = content_hash([label, key])
    if backend is not None and tried not in _unfit:
        try:
            return cached(
                folder, label, key | {"backend": backend}, lambda allocate: compute(session(), allocate), device
            )
        except SessionError as error:
            _unfit.add(tried)
            _say_once(listener, f"{error}: PyTorch computes the features itself, which takes longer")

    def plainly(allocate: "Allocate") -> object:
        if backend is None and device.type == "cpu":
            missing = "onnxruntime and onnx are not both installed: locked features take up to twice as long"
            _say_once(listener, f"{missing}; `pip install onnxruntime onnx` brings them")
        return compute(tower, allocate)

    return cached(folder, label, key | {"backend": "torch"}, plainly, device)


def _say_once(listener: Listener, words: str) -> None:
    """Announce what would otherwise be said of each split and at each evaluation."""
    if words not in _said:
        _said.add(words)
        listener(Note(words, "warning"))


def _key(pack: "Pack", split: str, weights: str, weights_hash: str | None, device: "torch.device") -> dict[str, Any]:
    import timm
    import torch
    import transformers

    from chimera_cli.runs import source_hash
    from chimera_cli.runtime import hardware

    # Versions are part of the key: a changed resize or attention kernel changes the features in their last digits.
    versions = {"torch": torch.__version__, "timm": timm.__version__, "transformers": transformers.__version__}
    return {
        "pack": pack.fingerprint,
        "split": split,
        "weights": weights,
        "weights_sha256": weights_hash,
        "versions": versions,
        # The stored seconds are evidence: those of another machine or of other code must not be taken for this one's.
        "hardware": hardware(device),
        "source_sha256": source_hash(*_SOURCES),
    }


def _features_dir(pack: "Pack") -> Path:
    return pack.path.parent / ".features" / pack.name
