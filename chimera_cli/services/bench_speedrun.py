"""`chimera bench speedrun`: wall time from a pack to a recall on dev, beside one plain pass of both towers."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.config import TrainConfig
from chimera_cli.events import Listener, Note, Progress, ignore
from chimera_cli.runs import content_hash, write_text
from chimera_cli.services.inputs import Workbench
from chimera_cli.services.time_to_target import (
    TARGET_FIGURE,
    Sprint,
    caches_features,
    empty_cache,
    refuse_unfit,
    run_to_target,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from chimera_cli.runs import Group
    from chimera_cli.services.session import SeedSession

COLD, CACHED = "cold", "cached"
LOG = "speedrun.log"
# The batch of a plain loop over images or captions.
_PLAIN_BATCH = 32
_SPLITS = ("train", "dev")


@dataclass(frozen=True, slots=True)
class SpeedrunSetting:
    """The recall to reach, whether runs with cached features follow the cold ones, and the sample of the plain pass."""

    target: float
    cached: bool
    sample_images: int
    sample_captions: int


def bench_speedrun(
    home: Path,
    config: TrainConfig,
    seeds: Sequence[int],
    setting: SpeedrunSetting,
    label: str,
    command: str,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return the seconds that each seed took to the target, cold and with cached features, and the log lines.

    Writes a group of kind `bench-speedrun` with a result per seed, and its log lines beside them. Raises UsageError for
    a recipe that can't be timed, ChimeraError for a pack that it can't be trained on.
    """
    from chimera_cli.services.learning import open_bench
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, seed_session, stoppable

    bench = open_bench(home, config.data, config.device, config.precision, listener)
    refuse_unfit(config, bench)
    settings = {"recipe": config.model_dump()} | asdict(setting)
    facts = group_facts(command, bench.pack, settings, bench.device)
    with stoppable(), group_session(home, "bench-speedrun", label, seeds, facts) as group:
        results: list[dict[str, Any]] = []
        for seed in seeds:
            with seed_session(group, seed, settings, bench.device, [listener], 0) as session:
                results.append(_one_seed(bench, config, seed, setting, group, session, listener))
            lines = [run["line"] for result in results for run in result["details"]["runs"]]
            write_text(group.path / LOG, "".join(f"{line}\n" for line in lines))
        return over_seeds(group.name, results)


def _one_seed(
    bench: Workbench,
    config: TrainConfig,
    seed: int,
    setting: SpeedrunSetting,
    group: "Group",
    session: "SeedSession",
    listener: Listener,
) -> dict[str, Any]:
    """Return the result of a seed: its runs one after the other between two plain passes, whose mean is the measure."""
    from chimera_cli.services.session import memory_figures

    started_at = time.perf_counter()
    passes = [plain_pass(bench, config, setting, seed, session.tell)]
    runs: dict[str, Sprint] = {}
    with empty_cache(bench) as fresh:
        for kind in _kinds(config, setting, session.tell):
            session.tell(Note(f"seed {seed}, {kind}: from the pack to dev t2i R@10 {setting.target:g}"))
            # The steps of the second run are those of the first again: in metrics.jsonl each stands once.
            runs[kind] = run_to_target(fresh, config, seed, setting.target, listener if runs else session.tell)
    passes.append(plain_pass(bench, config, setting, seed, session.tell))
    plain = _mean_of(passes)
    facts = {**group.facts, "recipe_hash": content_hash(config.model_dump()), **_environment(session.directory)}
    rows = [_row(kind, run, plain["seconds"], setting.target, seed, facts) for kind, run in runs.items()]
    figures: dict[str, float | None] = {f"{row['kind']}_s": row["reached_s"] for row in rows}
    figures |= {f"{row['kind']}_share": row["share"] for row in rows}
    figures |= {"wall_s": time.perf_counter() - started_at} | memory_figures(bench.device)
    details = asdict(setting) | {"runs": rows, "plain": plain, "device": bench.device.type, "batch": config.batch}
    return session.finish(figures, details)


def _kinds(config: TrainConfig, setting: SpeedrunSetting, tell: Listener) -> list[str]:
    if not setting.cached:
        return [COLD]
    if caches_features(config):
        return [COLD, CACHED]
    tell(Note("no tower is locked: there are no features to cache, and only cold runs"))
    return [COLD]


def _row(kind: str, run: Sprint, plain_s: float, target: float, seed: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run as the result holds it; the time and share of one that missed the target are None."""
    reached_s = run.wall_s if run.reached else None
    share = None if reached_s is None else reached_s / plain_s
    row = {"kind": kind, "seed": seed} | asdict(run) | {"reached_s": reached_s, "share": share}
    return row | {"line": log_line(row, target, facts)}


def _environment(directory: Path) -> Mapping[str, Any]:
    """Return commit and dirty flag of the code that runs."""
    from chimera_cli.runs import read_json

    stored = read_json(directory / "environment.json")
    return {name: stored.get(name) for name in ("git_commit", "git_dirty")}


def log_line(row: Mapping[str, Any], target: float, facts: Mapping[str, Any]) -> str:
    """Return a run as one line of `key=value`: what, how long, how good, with which recipe, code and machine.

    `facts` are those of the group, with `recipe_hash`, `git_commit` and `git_dirty` beside them.
    """
    machine, commit = facts["hardware"], str(facts["git_commit"] or "none")[:12]
    took = f"{row['wall_s']:.1f}" if row["reached"] else "missed"
    words = {
        "speedrun": facts["pack"]["name"],
        "pack": facts["pack"]["fingerprint"][:12],
        "features": row["kind"],
        "seed": row["seed"],
        "target": f"{target:g}",
        "seconds": took,
        TARGET_FIGURE: f"{row['figures'].get(TARGET_FIGURE) or 0:.4f}",
        "rsum": f"{row['figures'].get('rsum') or 0:.4f}",
        "epochs": row["epochs"],
        "pairs": row["pairs"],
        "features_s": f"{row['features_s']:.1f}",
        "train_s": f"{row['train_s']:.1f}",
        "evaluation_s_not_counted": f"{row['evaluation_s']:.1f}",
        "share_of_plain_pass": "missed" if row["share"] is None else f"{row['share']:.3f}",
        "config": facts["recipe_hash"][:12],
        "commit": commit + ("+changes" if facts["git_dirty"] else ""),
        "source": facts["source_hash"][:12],
        "cpu": _quoted(machine["cpu"]),
        "cores": machine["cores"],
        "gpu": _quoted(machine["gpu"] or "none"),
    }
    return " ".join(f"{key}={value}" for key, value in words.items())


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False) if " " in text else text


def over_seeds(group: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the command prints. A figure has a mean only where every seed has it: a miss is no time."""
    from chimera_cli.statistics import summarise_known

    names = list(results[0]["figures"])
    summaries = {name: summarise_known([one["figures"][name] for one in results]) for name in names}
    rows = [run for one in results for run in one["details"]["runs"]]
    kinds = dict.fromkeys(run["kind"] for run in rows)
    return {
        "group": group,
        "seeds": [one["seed"] for one in results],
        "target": results[0]["details"]["target"],
        "figures": {name: None if one is None else one.mean for name, one in summaries.items()},
        "over_seeds": {name: None if one is None else one.as_dict() for name, one in summaries.items()},
        "reached": {kind: sum(run["reached"] for run in rows if run["kind"] == kind) for kind in kinds},
        "log": [run["line"] for run in rows],
        "results": list(results),
    }


# ---- the measure ----------------------------------------------------------------------------------------------------


def plain_pass(
    bench: Workbench, config: TrainConfig, setting: SpeedrunSetting, seed: int, tell: Listener
) -> dict[str, Any]:
    """Return the seconds of one plain pass of both towers over all train and dev images and captions.

    Plain is eager float32 PyTorch without gradients in batches of 32: each image once, without its mirror image, in
    NCHW, from the pack on; captions in the order of the pack, padded to the longest of the batch. It is measured on a
    random sample and drawn out to all of them: `seconds` = images / images per second + captions / captions per second.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    indices = np.concatenate([bench.pack.split_indices(split) for split in _SPLITS])
    texts = [text for split in _SPLITS for text in bench.pack.captions(split).texts]
    images = _sample(len(indices), setting.sample_images, generator)
    captions = _sample(len(texts), setting.sample_captions, generator)
    parts = {
        "images": (len(indices), images, _image_work(bench, config, indices)),
        "captions": (len(texts), captions, _caption_work(bench, config, texts)),
    }
    row: dict[str, Any] = {"seconds": 0.0}
    for name, (total, rows, work) in parts.items():
        taken = _timed(work, rows, bench.device, f"plain {name}", tell)
        row |= {name: total, f"sampled_{name}": len(rows), f"{name}_per_s": len(rows) / taken}
        row["seconds"] += total * taken / len(rows)
    return row


def _mean_of(passes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of equal passes, and the seconds of each: how steady the machine was in between."""
    names = ("seconds", "images_per_s", "captions_per_s")
    means = {name: sum(one[name] for one in passes) / len(passes) for name in names}
    return dict(passes[0]) | means | {"seconds_each": [one["seconds"] for one in passes]}


def _sample(total: int, wanted: int, generator: "np.random.Generator") -> "NDArray[np.int64]":
    """Return up to `wanted` of `total` positions at random, ascending."""
    import numpy as np

    return np.sort(generator.choice(total, size=min(wanted, total), replace=False))


def _image_work(
    bench: Workbench, config: TrainConfig, indices: "NDArray[np.int64]"
) -> "Callable[[NDArray[np.int64]], torch.Tensor]":
    import torch

    from chimera_cli.models.image_tower import build_image_tower
    from chimera_cli.training.features import preprocess

    tower = build_image_tower(config.image.weights).eval().to(bench.device)

    def work(rows: "NDArray[np.int64]") -> torch.Tensor:
        pixels = torch.from_numpy(bench.pack.images[indices[rows]]).to(bench.device)
        features: torch.Tensor = tower(preprocess(pixels, tower, config.image.image_size).contiguous())
        return features

    return work


def _caption_work(
    bench: Workbench, config: TrainConfig, texts: Sequence[str]
) -> "Callable[[NDArray[np.int64]], torch.Tensor]":
    import torch

    from chimera_cli.models.text_tower import build_text_tower

    tower = build_text_tower(config.text.weights).eval().to(bench.device)

    def work(rows: "NDArray[np.int64]") -> torch.Tensor:
        tokens = tower.tokenise([texts[row] for row in rows], config.text.max_tokens)
        features: torch.Tensor = tower({name: part.to(bench.device) for name, part in tokens.items()})
        return features

    return work


def _timed(
    work: "Callable[[NDArray[np.int64]], torch.Tensor]",
    rows: "NDArray[np.int64]",
    device: "torch.device",
    stage: str,
    tell: Listener,
) -> float:
    """Return the seconds of `work` on all rows in batches, after one batch for warming up."""
    import torch

    from chimera_cli.runtime import Stopwatch

    watch = Stopwatch(device)
    with torch.inference_mode():
        work(rows[:_PLAIN_BATCH])
        watch.start()
        for done, batch in _batches(rows):
            work(batch)
            tell(Progress(stage, done, len(rows), stage.split()[-1]))
        return watch.stop()


def _batches(rows: "NDArray[np.int64]") -> "Iterator[tuple[int, NDArray[np.int64]]]":
    for start in range(0, len(rows), _PLAIN_BATCH):
        batch = rows[start : start + _PLAIN_BATCH]
        yield start + len(batch), batch
