"""Runs made by hand for the tests of `slo`: groups with sealed results and evaluations, without any training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from chimera_cli.config import SanityConfig, TrainConfig
from chimera_cli.runs import MADE_WITH, Group, create_group, finish_group, write_sealed_json, write_text

CONFIGS = Path(__file__).parent.parent / "configs"
LAW, TOY = CONFIGS / "slo.yaml", CONFIGS / "slo-toy.yaml"

CPU = {"device": "cpu", "cpu": "a processor", "cores": 2, "gpu": None}
GPU = {"device": "cuda", "cpu": "a processor", "cores": 8, "gpu": "GeForce GTX 1080"}
FLICKR = {"name": "flickr8k", "fingerprint": "f" * 64, "source": "flickr8k"}
TOY_PACK = {"name": "toy", "fingerprint": "t" * 64, "source": "toy"}

# The real hash changes whenever somebody saves a file of the package, between two groups of one test too.
SOURCE = "5" * 64

TRAINED = {
    "epoch_10k_pairs_s": 900.0,
    "epoch_10k_pairs_cached_s": 20.0,
    "vram_peak_gb": 5.5,
    "vram_reserved_peak_gb": 6.0,
}
ALIVE = {"loss_first": 3.5, "loss_drop": 1.2, "loss_tail_mean": 2.1, "chance_loss": math.log(32), "wall_s": 150.0}
LOADED = {"loader_images_per_s": 900.0, "gpu_util_mean": 0.93, "wall_s": 61.0}
RECALL = {"i2t_r1": 0.31, "i2t_r5": 0.6, "i2t_r10": 0.72, "t2i_r1": 0.23, "t2i_r5": 0.52, "t2i_r10": 0.66, "rsum": 3.04}


def make_group(
    home: Path,
    kind: str,
    figures: Sequence[Mapping[str, Any]],
    *,
    pack: Mapping[str, Any] = FLICKR,
    hardware: Mapping[str, Any] = CPU,
    source: str | None = None,
    details: Mapping[str, Any] | None = None,
    command: str = "chimera train full --config configs/train/locked.yaml --seeds 0,1,2",
    config: Mapping[str, Any] | None = None,
) -> Group:
    """Write a finished group with one result per entry of `figures`."""
    facts = {
        "command": command,
        "pack": dict(pack),
        "hardware": dict(hardware),
        "source_hash": source or SOURCE,
    }
    group = create_group(home, kind, "made", range(len(figures)), facts)
    for seed, values in enumerate(figures):
        write_text(group.seed_dir(seed) / "config.yaml", yaml.safe_dump(dict(config or TrainConfig().model_dump())))
        document = {"schema_version": 1, "kind": kind, "seed": seed, "status": "finished"}
        document |= {"figures": dict(values), "details": dict(details or {})}
        write_sealed_json(group.seed_dir(seed) / "result.json", document)
    return finish_group(group, "finished")


def add_evaluation(group: Group, seed: int, split: str = "dev", images: int = 1000, **changes: Any) -> Path:
    pack = {key: group.facts["pack"][key] for key in ("name", "fingerprint")}
    path = group.seed_dir(seed) / "evaluations" / f"{pack['name']}-{split}.json"
    document = {"schema_version": 1, "pack": pack, "split": split, "seed": seed, "images": images, "figures": RECALL}
    document |= {"source_hash": group.facts["source_hash"], "group": group.name, "checkpoint_sha256": "c" * 64}
    document |= {"made_with": {key: group.facts.get(key) for key in MADE_WITH}}
    write_sealed_json(path, document | changes)
    return path


def make_sanity(
    home: Path, pack: Mapping[str, Any] = FLICKR, hardware: Mapping[str, Any] = CPU, **changes: Any
) -> Group:
    details = {"updates": 200, "shuffled": False} | changes.pop("details", {})
    command = "chimera train sanity --seed 0"
    return make_group(
        home, "sanity", [ALIVE | changes], pack=pack, hardware=hardware, details=details, command=command,
        config=SanityConfig().model_dump(),
    )  # fmt: skip


def make_loader(
    home: Path, pack: Mapping[str, Any] = FLICKR, hardware: Mapping[str, Any] = CPU, **changes: Any
) -> Group:
    details = {"seconds": 60.2, "config": "configs/train/locked.yaml"} | changes.pop("details", {})
    command = "chimera bench loader"
    figures = LOADED if hardware is GPU else LOADED | {"gpu_util_mean": None}
    return make_group(
        home, "bench-loader", [figures | changes], pack=pack, hardware=hardware, details=details, command=command
    )


def make_run(home: Path, hardware: Mapping[str, Any] = CPU, pack: Mapping[str, Any] = FLICKR, **changes: Any) -> Group:
    """Write a run of three seeds that meets every law, with its evidence."""
    figures = TRAINED if hardware is GPU else TRAINED | {"vram_peak_gb": None, "vram_reserved_peak_gb": None}
    group = make_group(home, "train", [figures | changes] * 3, hardware=hardware, pack=pack)
    for seed in range(3):
        add_evaluation(group, seed, images=1000 if pack is FLICKR else 300)
    make_sanity(home, pack, hardware)
    make_loader(home, pack, hardware)
    return group


def verdicts(result: Mapping[str, Any]) -> dict[str, str]:
    return {objective["id"]: objective["verdict"] for objective in result["objectives"]}


def objective(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(dict(one) for one in result["objectives"] if one["id"] == name)
