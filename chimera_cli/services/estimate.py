"""`chimera train full --dry-run`: what a recipe will take, before anything is trained or written."""

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


def estimate_full(home: Path, config: TrainConfig, listener: Listener = ignore) -> dict[str, Any]:
    """Return the memory by parts, in GiB, and the updates that a recipe takes; its time where it has been trained.

    Activations are measured on this machine's CPU with 2 and 4 pairs and scaled to the micro-batch; the rest follows
    from shapes. `vram_estimate_gb` is what torch's allocator will hold at most on a GPU, its context left out, as
    `vram_limit_gb` counts.
    """
    import torch

    from chimera_cli.services.session import need_pack
    from chimera_cli.services.train import epoch_updates, fresh_architecture
    from chimera_cli.training.footprint import measure_activations

    pack = need_pack(home, config.data, listener)
    architecture = fresh_architecture(config)
    model = _shape(architecture, config.checkpointing)
    plain = _shape(architecture, False) if config.checkpointing else None
    pairs = min(config.micro_batch or config.batch, config.batch)
    found = measure_activations(model, lambda count: _pairs(model, count), plain)
    half = 0.5 if config.precision in ("float16", "bfloat16") else 1.0
    activations = half * found.peak_bytes(pairs, config.checkpointing)
    features = _features_bytes(model, pack, config)
    total = sum(part.numel() for part in model.parameters()) * _FLOAT
    learning = sum(part.numel() for part in model.parameters() if part.requires_grad) * _FLOAT
    parts: dict[str, float] = {
        "parameters_gb": total,
        "gradients_gb": learning,
        "optimiser_gb": 2 * learning + (learning if config.ema else 0),
        "activations_gb": activations,
        # The batch that is trained on and the one that is made meanwhile.
        "inputs_gb": 2 * config.batch * _input_bytes(model, architecture),
        "loss_gb": _FLOAT * (8 * config.batch * architecture.dim + 4 * min(config.batch, 4096) ** 2),
        "features_gb": features,
    }
    figures: dict[str, float | None] = {name: value / GIB for name, value in parts.items()}
    figures["vram_estimate_gb"] = _MARGIN * sum(parts.values()) / GIB
    figures["features_cache_gb"] = features / GIB
    figures["ram_estimate_gb"] = _ram_bytes(config, parts, torch.cuda.is_available()) / GIB
    figures["updates"] = config.epochs * epoch_updates(pack, config.batch)
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


def _pairs(model: "DualEncoder", count: int) -> "PairBatch":
    """Return so many pairs as the towers take them: captions of the full length, the dearest there are."""
    import torch

    from chimera_cli.training.batches import PairBatch

    shape = model.architecture
    ids = torch.arange(count)
    image = torch.zeros(count, model.image_tower.width)
    if not shape.image_locked:
        image = torch.zeros(count, 3, shape.image_size, shape.image_size).contiguous(memory_format=torch.channels_last)
    if shape.learn_layers == 0:
        return PairBatch(0, image, torch.zeros(count, model.text_tower.width), ids)
    tokens = torch.ones(count, shape.max_tokens, dtype=torch.int64)
    return PairBatch(0, image, {"input_ids": tokens, "attention_mask": tokens}, ids)


def _input_bytes(model: "DualEncoder", shape: "Architecture") -> int:
    pixels = model.image_tower.width if shape.image_locked else 3 * shape.image_size**2
    tokens = model.text_tower.width if shape.learn_layers == 0 else 4 * shape.max_tokens
    return _FLOAT * (pixels + tokens)


def _features_bytes(model: "DualEncoder", pack: "Pack", config: TrainConfig) -> int:
    """Return the bytes of the cached features of locked towers, train and dev."""
    splits = [pack.manifest["splits"][name] for name in ("train", "dev")]
    shape, numbers = model.architecture, 0
    if shape.image_locked:
        numbers += sum(split["images"] for split in splits) * (2 if shape.flipped_view else 1) * model.image_tower.width
    if shape.learn_layers == 0:
        numbers += sum(split["captions"] for split in splits) * model.text_tower.width
    return _FLOAT * numbers if config.stream is None else 0


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
