"""`chimera train full --dry-run`: what a recipe will take, before anything is trained or written."""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from chimera_cli.config import TrainConfig
from chimera_cli.events import Listener, ignore
from chimera_cli.runs import content_hash, list_groups

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

    Activations are measured on this machine's CPU with 2 and 4 pairs and scaled to the micro-batch; the rest follows
    from shapes. `vram_estimate_gb` is what torch's allocator will hold at most on a GPU, its context left out, as
    `vram_limit_gb` counts.
    """
    import torch

    from chimera_cli.services.learning import epoch_updates, fresh_architecture
    from chimera_cli.services.session import need_pack
    from chimera_cli.training.footprint import measure_activations

    pack = need_pack(home, config.data, listener)
    architecture = fresh_architecture(config)
    model = _shape(architecture, config.checkpointing)
    plain = _shape(architecture, False) if config.checkpointing else None
    pairs = min(config.micro_batch or config.batch, config.batch)
    maps = None if config.stream else _map_shape(model)
    found = measure_activations(model, lambda count: _pairs(model, count, maps, config.stream is None), plain)
    half = 0.5 if config.precision in ("float16", "bfloat16") else 1.0
    activations = half * found.peak_bytes(pairs, config.checkpointing)
    features, cached = _cache_bytes(model, pack, config, maps)
    total = sum(part.numel() for part in model.parameters()) * _FLOAT
    learning = sum(part.numel() for part in model.parameters() if part.requires_grad) * _FLOAT
    parts: dict[str, float] = {
        "parameters_gb": total,
        "gradients_gb": learning,
        "optimiser_gb": 2 * learning + (learning if config.ema else 0),
        "activations_gb": activations,
        # The batch that is trained on and the one that is made meanwhile.
        "inputs_gb": 2 * config.batch * _input_bytes(_pairs(model, 1, maps, config.stream is None)),
        "loss_gb": _FLOAT * (8 * config.batch * architecture.embedding_width + 4 * min(config.batch, 4096) ** 2),
        "features_gb": features,
    }
    figures: dict[str, float | None] = {name: value / GIB for name, value in parts.items()}
    figures["vram_estimate_gb"] = _MARGIN * sum(parts.values()) / GIB
    figures["features_cache_gb"] = cached / GIB
    figures["ram_estimate_gb"] = _ram_bytes(config, parts, torch.cuda.is_available()) / GIB
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


def _pairs(model: "DualEncoder", count: int, maps: tuple[int, ...] | None, cached: bool) -> "PairBatch":
    """Return so many pairs as the towers take them: captions of the full length, the dearest there are.

    Images are `maps` of that shape where it is known, and `cached` says that captions are states where some layers are
    locked.
    """
    import torch

    from chimera_cli.training.batches import PairBatch

    shape, ids = model.architecture, torch.arange(count)
    image = torch.zeros(count, model.image_tower.width)
    if not shape.image_locked:
        image = torch.zeros(count, *(maps or (3, shape.image_size, shape.image_size)))
        image = image.contiguous(memory_format=torch.channels_last) if image.ndim == 4 else image
    if shape.learn_layers == 0:
        return PairBatch(0, image, torch.zeros(count, model.text_tower.width), ids)
    tokens = torch.ones(count, shape.max_tokens, dtype=torch.int64)
    if shape.learn_layers and cached:
        states = torch.zeros(count, shape.max_tokens, model.text_tower.width)
        return PairBatch(0, image, {"states": states, "attention_mask": tokens}, ids)
    return PairBatch(0, image, {"input_ids": tokens, "attention_mask": tokens}, ids)


def _input_bytes(batch: "PairBatch") -> int:
    """Return the bytes of what the towers are given."""
    text = batch.text
    captions = text.values() if isinstance(text, Mapping) else [text]
    return batch.image.nbytes + sum(part.nbytes for part in captions)


def _cache_bytes(
    model: "DualEncoder", pack: "Pack", config: TrainConfig, maps: tuple[int, ...] | None
) -> tuple[int, int]:
    """Return the bytes of what is cached of train and dev: those that stay on the device, and all, on the disk.

    Features of whole towers stay on the device; maps and hidden states are read from the disk batch by batch. A stream
    caches nothing of train.
    """
    shape, features, lower = model.architecture, 0, 0
    plain = 2 if shape.flipped_view else 1
    for split, views in (("train", max(plain, config.augmentation.views)), ("dev", plain)):
        if split == "train" and config.stream is not None:
            continue
        images, captions = (pack.manifest["splits"][split][name] for name in ("images", "captions"))
        features += images * views * model.image_tower.width if shape.image_locked else 0
        features += captions * model.text_tower.width if shape.learn_layers == 0 else 0
        lower += images * views * math.prod(maps) if maps else 0
        if shape.learn_layers:
            table = model.text_tower.token_table(pack.captions(split).texts, shape.max_tokens)
            lower += len(table.ids) * model.text_tower.width
    return _FLOAT * features, _FLOAT * features + _HALF * lower


def _ram_bytes(config: TrainConfig, parts: dict[str, float], has_gpu: bool) -> float:
    """Return what the process will have resident at most: what it has by now, and the tensors that stay in RAM."""
    from chimera_cli.runtime import memory_peaks, pick_device

    now = memory_peaks(pick_device("cpu")).ram_peak_gb * GIB
    on_gpu = has_gpu and config.device != "cpu"
    return now + (parts["features_gb"] + parts["inputs_gb"] if on_gpu else _MARGIN * sum(parts.values()))


def _measured(home: Path, config: TrainConfig) -> float | None:
    """Return the mean seconds of a seed in the newest finished run of exactly this config, None where there is none."""
    wanted = content_hash(config.model_dump())
    for group in list_groups(home, "train"):
        if group.status == "finished" and group.facts.get("config_hash") == wanted:
            return fmean(float(result["figures"]["wall_s"]) for result in group.results())
    return None
