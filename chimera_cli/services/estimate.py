"""`chimera train full --dry-run`: what a recipe will take, before anything is trained or written."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from chimera_cli.config import TrainConfig
from chimera_cli.events import Listener, ignore
from chimera_cli.runs import content_hash, list_groups
from chimera_cli.services.warm_start import warm_start

if TYPE_CHECKING:
    from chimera_cli.data.pack import Pack
    from chimera_cli.models.dual_encoder import Architecture, DualEncoder
    from chimera_cli.training.batches import PairBatch

GIB = 2**30
# What the allocator loses to blocks that don't fit, and convolutions to work space.
_MARGIN = 1.15
_FLOAT = 4  # bytes; half precision halves activations alone
_HALF = 2  # bytes, of which cached maps and hidden states are


def estimate_full(home: Path, config: TrainConfig, listener: Listener = ignore) -> dict[str, Any]:
    """Return the memory by parts, in GiB, and the updates that a recipe takes; its time where it has been trained.

    Activations are measured on this machine's CPU with 2 and 4 images and their captions, and scaled to the
    micro-batch; the rest follows from shapes. `vram_estimate_gb` is what torch's allocator will hold at most on a
    GPU, its context left out, as `vram_limit_gb` counts. `ram_estimate_gb` is the peak that a run would report: what it
    reads of files of cached features counts, although the system takes that back where memory is short.
    """
    import torch

    from chimera_cli.services.learning import epoch_updates, fresh_architecture
    from chimera_cli.services.session import need_pack
    from chimera_cli.training.footprint import measure_activations

    pack = need_pack(home, config.data, listener)
    architecture = fresh_architecture(config)
    model = _shape(architecture, config.checkpointing)
    plain = _shape(architecture, False) if config.checkpointing else None
    pairs, captions = min(config.micro_batch or config.batch, config.batch), config.captions_per_image
    image = _image_shape(model, config.stream is None)
    shown = partial(_pairs, model, captions=captions, image_shape=image, cached=config.stream is None)
    found = measure_activations(model, shown, plain)
    half = 0.5 if config.precision in ("float16", "bfloat16") else 1.0
    # The captions of an image share what is computed of it. What is mixed is gathered twice, both parts by themselves.
    images = math.ceil(pairs / captions)
    mixed = 2 * images * _input_bytes(shown(1)) if config.mixup else 0
    activations = half * found.peak_bytes(images, config.checkpointing) + mixed
    features, cached = _cache_bytes(model, pack, config, image)
    total = sum(part.numel() for part in model.parameters()) * _FLOAT
    learning = sum(part.numel() for part in model.parameters() if part.requires_grad) * _FLOAT
    parts: dict[str, float] = {
        "parameters_gb": total,
        "gradients_gb": learning,
        "optimiser_gb": 2 * learning + (learning if config.ema else 0),
        "activations_gb": activations,
        # The batch that is trained on and the one that is made meanwhile.
        "inputs_gb": 2 * math.ceil(config.batch / captions) * _input_bytes(shown(1)),
        "loss_gb": _FLOAT * (8 * config.batch * architecture.embedding_width + 4 * min(config.batch, 4096) ** 2),
        "features_gb": features,
    }
    figures: dict[str, float | None] = {name: value / GIB for name, value in parts.items()}
    figures["vram_estimate_gb"] = _MARGIN * sum(parts.values()) / GIB
    figures["features_cache_gb"] = cached / GIB
    figures["ram_estimate_gb"] = (_ram_bytes(config, parts, torch.cuda.is_available()) + cached - features) / GIB
    figures["updates"] = config.epochs * epoch_updates(pack, config.batch, config.captions_per_image)
    figures["wall_s"] = _measured(home, config)
    details = {"pack": pack.name, "batch": config.batch, "micro_batch": pairs, "checkpointing": config.checkpointing}
    return {"figures": figures, "details": details}


def _shape(architecture: "Architecture", checkpointing: bool) -> "DualEncoder":
    """Return the model without its pretrained weights, ready to train as pretrained ones are."""
    from chimera_cli.models.dual_encoder import build_dual_encoder
    from chimera_cli.training.memory import recompute_activations

    model = build_dual_encoder(architecture, pretrained=False)
    if checkpointing:
        recompute_activations(model)
    return model.train()


def _image_shape(model: "DualEncoder", cached: bool) -> tuple[int, ...]:
    """Return the shape of what an image is to the trainer: features, maps where they are `cached`, or pixels."""
    import torch

    tower, side = model.image_tower, model.architecture.image_size
    if not model.architecture.image_locked:
        return (_map_shape(model) if cached else None) or (3, side, side)
    if not tower.places:
        return (tower.width,)
    with torch.inference_mode():
        return tuple(tower.eval()(torch.zeros(1, 3, side, side)).shape[1:])


def _map_shape(model: "DualEncoder") -> tuple[int, ...] | None:
    """Return the shape of what the locked blocks of the image tower make of an image; None where it is not cached."""
    import torch

    from chimera_cli.models.sessions import SessionError, compare_image_parts

    tower, side = model.image_tower, model.architecture.image_size
    if tower.locked_blocks is None:
        return None
    pixels = torch.zeros(1, 3, side, side)
    try:
        compare_image_parts(tower, pixels)
    except SessionError:
        return None
    with torch.inference_mode():
        return tuple(tower.lower_maps(pixels).shape[1:])


def _pairs(model: "DualEncoder", images: int, captions: int, image_shape: tuple[int, ...], cached: bool) -> "PairBatch":
    """Return so many images with their captions as the towers take them, these of the full length, the dearest.

    `cached` says that captions are states where some layers are locked.
    """
    import torch

    from chimera_cli.training.batches import PairBatch

    shape, ids = model.architecture, torch.arange(images).repeat_interleave(captions)
    image = torch.zeros(images, *image_shape)
    image = image.contiguous(memory_format=torch.channels_last) if image.ndim == 4 else image
    rows = ids if captions > 1 else None
    if shape.learn_layers == 0:
        return PairBatch(0, image, torch.zeros(len(ids), model.text_tower.width), ids, image_rows=rows)
    tokens = torch.ones(len(ids), shape.max_tokens, dtype=torch.int64)
    text = {"input_ids": tokens, "attention_mask": tokens}
    if shape.learn_layers and cached:
        states = torch.zeros(len(ids), shape.max_tokens, model.text_tower.lower_width)
        text = {"states": states, "attention_mask": tokens}
    return PairBatch(0, image, text, ids, image_rows=rows)


def _input_bytes(batch: "PairBatch") -> int:
    """Return the bytes of what the towers are given."""
    text = batch.text
    captions = text.values() if isinstance(text, Mapping) else [text]
    return batch.image.nbytes + sum(part.nbytes for part in captions)


def _cache_bytes(
    model: "DualEncoder", pack: "Pack", config: TrainConfig, image_shape: tuple[int, ...]
) -> tuple[int, int]:
    """Return the bytes of what is cached of train and dev: those that stay on the device, and all, on the disk.

    Pooled features stay on the device; those of all places, maps and hidden states are read from the disk batch by
    batch. A stream caches nothing of train.
    """
    shape, features, lower = model.architecture, 0, 0
    of_image = 0 if image_shape == (3, shape.image_size, shape.image_size) else math.prod(image_shape)
    pooled = shape.image_locked and not model.image_tower.places
    plain = 2 if shape.flipped_view else 1
    for split, views in (("train", max(plain, config.augmentation.views)), ("dev", plain)):
        if split == "train" and config.stream is not None:
            continue
        images, captions = (pack.manifest["splits"][split][name] for name in ("images", "captions"))
        features += images * views * of_image if pooled else 0
        features += captions * model.text_tower.width if shape.learn_layers == 0 else 0
        lower += 0 if pooled else images * views * of_image
        if shape.learn_layers:
            table = model.text_tower.token_table(pack.captions(split).texts, shape.max_tokens)
            lower += len(table.ids) * model.text_tower.lower_width
    return _FLOAT * features, _FLOAT * features + _HALF * lower


def _ram_bytes(config: TrainConfig, parts: dict[str, float], has_gpu: bool) -> float:
    """Return what the process will have resident at most: what it has by now, and the tensors that stay in RAM."""
    from chimera_cli.runtime import memory_peaks, pick_device

    now = memory_peaks(pick_device("cpu")).ram_peak_gb * GIB
    on_gpu = has_gpu and config.device != "cpu"
    return now + (parts["features_gb"] + parts["inputs_gb"] if on_gpu else _MARGIN * sum(parts.values()))


def _measured(home: Path, config: TrainConfig) -> float | None:
    """Return the mean seconds of a seed in the newest finished run of exactly this config, None where there is none."""
    # Runs record in full the name of the one that they begin with.
    begun = config.model_copy(update={"init_from": warm_start(home, config, ()).run})
    wanted = content_hash(begun.model_dump())
    for group in list_groups(home, "train"):
        if group.status == "finished" and group.facts.get("config_hash") == wanted:
            return fmean(float(result["figures"]["wall_s"]) for result in group.results())
    return None
