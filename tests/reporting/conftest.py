"""A home as training, benchmarks and evaluation leave it: three seeds on Flickr8k, with awkward names."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from chimera_cli.runs import (
    Group,
    append_json_line,
    create_group,
    finish_group,
    utc_now,
    write_json,
    write_sealed_json,
    write_text,
)

CPU = {"device": "cpu", "cpu": "Testor <b>3000</b> | 2.5 GHz", "cores": 2, "gpu": None}
RECALLS = {"i2t_r1": 0.33, "i2t_r5": 0.63, "i2t_r10": 0.76, "t2i_r1": 0.25, "t2i_r5": 0.55, "t2i_r10": 0.69}


def group_facts(command: str, source: str = "flickr8k", hardware: Mapping[str, Any] = CPU) -> dict[str, Any]:
    """Return the facts services put into group.json."""
    return {
        "command": command,
        "pack": {"name": source, "fingerprint": source[0] * 64, "source": source},
        "config_hash": "c" * 64,
        "source_hash": "5" * 64,
        "hardware": dict(hardware),
        "chimera_version": "0.1.0",
    }


def write_result(group: Group, seed: int, figures: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Write a finished result.json."""
    facts = {"schema_version": 1, "kind": group.kind, "seed": seed, "status": "finished"}
    times = {"started_at": utc_now(), "finished_at": utc_now()}
    write_sealed_json(group.seed_dir(seed) / "result.json", facts | times | {"figures": figures, "details": details})


def write_evaluation(group: Group, seed: int, split: str, shift: float, images: int = 1000, **more: Any) -> None:
    """Write the evaluation of one seed: `RECALLS` plus `shift`, and `more` keys of the file."""
    pack = group.facts["pack"]
    figures = {name: value + shift for name, value in RECALLS.items()}
    figures |= {"i2t_medr": 3.0, "t2i_medr": 5.0, "rsum": sum(figures.values())}
    chance = {name: int(name.split("_r")[1]) / images for name in RECALLS}
    value = {
        "schema_version": 1,
        "pack": {"name": pack["name"], "fingerprint": pack["fingerprint"]},
        "split": split,
        "seed": seed,
        "checkpoint": "best",
        "checkpoint_step": 120,
        "images": images,
        "captions": 5 * images,
        "captions_per_image": {"min": 5, "max": 5},
        "figures": figures,
        "intervals": {name: [value - 0.03, value + 0.03] for name, value in figures.items()},
        "bootstrap": {"resamples": 1000, "seed": 0, "units": "query images"},
        "chance": chance | {"i2t_medr": images / 2, "t2i_medr": images / 2, "rsum": sum(chance.values())},
        "zero_shot": None,
        "created_at": utc_now(),
    }
    value |= more
    write_sealed_json(group.seed_dir(seed) / "evaluations" / f"{pack['name']}-{split}.json", value)


def train_group(home: Path, source: str = "flickr8k", seeds: tuple[int, ...] = (0, 1, 2)) -> Group:
    """Make a finished training group with curves, results and a dev evaluation."""
    command = "chimera train full --config configs/train/locked.yaml --seeds 0,1,2"
    group = create_group(home, "train", "locked", seeds, group_facts(command, source))
    for seed in seeds:
        directory = group.seed_dir(seed)
        write_text(directory / "config.yaml", "batch: 500\nheads:\n  kind: mlp\n")
        write_json(directory / "environment.json", environment())
        for step in range(60):
            loss = 2 + 4 * math.exp(-step / 20) + 0.1 * math.sin(step + seed)
            row = {"step": step, "epoch": step // 12, "loss": loss, "pairs_per_s": 900 + 40 * math.sin(step)}
            append_json_line(directory / "metrics.jsonl", row | {"elapsed_s": 0.5 * step})
            reading = {"gpu_util": None, "cpu_util": 0.9, "ram_used_gb": 1.5 + 0.002 * step, "vram_used_gb": None}
            append_json_line(directory / "telemetry.jsonl", {"elapsed_s": 0.5 * step} | reading)
            if step % 12 == 11:
                rsum = 3.2 - 20 / (step + seed + 8)
                append_json_line(directory / "metrics.jsonl", {"step": step, "dev/i2t_r1": 0.3, "dev/rsum": rsum})
        figures = {
            "wall_s": 30.0 + seed,
            "pairs_per_s": 900.0 + seed,
            "features_s": 40.0,
            "epoch_10k_pairs_s": 80.0 + seed,
            "epoch_10k_pairs_cached_s": 11.0,
            "vram_peak_gb": None,
            "vram_reserved_peak_gb": None,
            "ram_peak_gb": 1.6 + 0.1 * seed,
            "gpu_util_mean": None,
        }
        write_result(group, seed, figures, {"best_dev": {"rsum": 3.2}, "batch": 500})
        write_evaluation(group, seed, "dev", 0.01 * seed)
    return finish_group(group, "finished")


def bench_groups(home: Path, source: str = "flickr8k", hardware: Mapping[str, Any] = CPU) -> list[Group]:
    """Make finished benchmark groups and a proof of life that fit `train_group`."""
    loader = create_group(home, "bench-loader", "", (0,), group_facts("chimera bench loader", source, hardware))
    details = {"batch": 64, "image_size": 224, "workers": 2, "latency_ms_p50": 123.456, "latency_ms_p95": 150.0}
    details["ceiling"] = {"name": "memory copy", "images_per_s": 4000.0, "share_reached": 0.128}
    for second in range(5):
        row = {"step": second, "elapsed_s": 1.0 + second, "loader_images_per_s": 500 + second}
        append_json_line(loader.seed_dir(0) / "metrics.jsonl", row)
    write_result(loader, 0, {"loader_images_per_s": 512.5, "ram_peak_gb": 0.5}, details)
    encoders = create_group(home, "bench-encoders", "", (0,), group_facts("chimera bench encoders", source, hardware))
    part = {"name": "a_name|with*marks", "batch": 32, "latency_ms_p50": 9.876, "latency_ms_p95": 12.0}
    part |= {"throughput_per_s": 1234.0, "vram_peak_gb": None, "ceiling": None}
    parts = [
        {"component": "image encoder", "unit": "images", **part},
        {"component": "text encoder", "unit": "captions", **part},
    ]
    write_result(encoders, 0, {"ram_peak_gb": 0.7}, {"components": parts})
    sanity = create_group(home, "sanity", "", (0,), group_facts("chimera train sanity --seed 0", source, hardware))
    losses = {"loss_first": 3.47, "loss_last": 2.0, "loss_drop": 1.47, "wall_s": 123.0, "ram_peak_gb": 1.2}
    write_result(sanity, 0, losses, {"batch": 32, "image_size": 96, "updates": 200})
    return [finish_group(group, "finished") for group in (loader, encoders, sanity)]


def environment() -> dict[str, Any]:
    """Return the content of an environment.json without a GPU."""
    return {
        "schema_version": 1,
        "git_commit": "ab" * 20,
        "git_dirty": True,
        "python": "3.11.7",
        "platform": "Linux",
        "packages": {"torch": "2.7.1", "timm": "1.0.20"},
        "torch": {"version": "2.7.1", "cuda": None},
        "gpu": None,
        "driver": None,
        "cpu": CPU["cpu"],
        "cores": 2,
        "ram_gb": 23.4,
        "lock_sha256": "d" * 64,
    }


@pytest.fixture
def new_train_group() -> Callable[..., Group]:
    return train_group


@pytest.fixture
def new_bench_groups() -> Callable[..., list[Group]]:
    return bench_groups


@pytest.fixture
def evaluate() -> Callable[..., None]:
    return write_evaluation


@pytest.fixture(name="write_result")
def result_writer() -> Callable[..., None]:
    return write_result
