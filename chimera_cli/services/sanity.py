"""`chimera train sanity`: proof of life, 200 updates of both towers."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.config import SanityConfig
from chimera_cli.events import Listener, ignore
from chimera_cli.services.inputs import Workbench, training_batches
from chimera_cli.services.learning import (
    architecture_of,
    epoch_updates,
    fresh_model,
    new_learner,
    open_bench,
    refuse_unfit_pack,
    refuse_unfit_towers,
    run_loop,
)

if TYPE_CHECKING:
    from chimera_cli.models.dual_encoder import Architecture
    from chimera_cli.services.session import SeedSession
    from chimera_cli.training.loop import Outcome

# The law compares 200 updates: loss[0] against loss[200], and the mean of the last ten losses against chance.
_TAIL = 10
SANITY_LOSS_DROP = 0.15
SANITY_WALL_S = 25 * 60


def train_sanity(
    home: Path, config: SanityConfig, seed: int, command: str, listener: Listener = ignore, shuffled: bool = False
) -> dict[str, Any]:
    """Return the result of 200 updates of both towers: did the loss fall, and for the right reason?

    `shuffled` pairs every image with another image's caption: the control that must fail. Writes a group of kind
    `sanity`; the caller decides the exit code from `details.passed`.
    """
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, seed_session
    from chimera_cli.tracking import track

    bench = open_bench(home, config.data, config.device, config.precision, listener)
    refuse_unfit_pack(bench.pack, config.batch, ("train",))
    refuse_unfit_towers(_architecture(config))
    facts = group_facts(command, bench.pack, config.model_dump(), bench.device)
    label = "shuffled" if shuffled else ""
    with group_session(home, "sanity", label, [seed], facts) as group, track(home, group, listener) as tracker:
        listeners = [listener, tracker]
        with seed_session(group, seed, config.model_dump(), bench.device, listeners, config.updates) as session:
            return {"group": group.name} | _sanity_seed(bench, config, seed, session, shuffled)


def _sanity_seed(
    bench: Workbench, config: SanityConfig, seed: int, session: "SeedSession", shuffled: bool
) -> dict[str, Any]:
    from chimera_cli.services.session import memory_figures

    started = time.perf_counter()
    model = fresh_model(_architecture(config), seed, bench.device)
    batches = training_batches(bench, model, config.batch, seed, session.tell, shuffled=shuffled)
    learner = new_learner(model, config.optimiser, bench, config.updates)
    outcome = run_loop(
        learner,
        batches,
        config.loss,
        bench,
        updates=config.updates,
        clip_norm=config.optimiser.clip_norm,
        closing_loss=True,
        listener=session.tell,
    )
    tail = sum(outcome.losses[-_TAIL:]) / _TAIL
    # Batches are as even as can be, so their size may be a little off the configured one.
    images = len(bench.pack.split_indices("train"))
    chance = math.log(images / epoch_updates(bench.pack, config.batch))
    figures: dict[str, float | None] = {
        "loss_first": outcome.losses[0],
        "loss_last": outcome.losses[-1],
        "loss_drop": outcome.losses[0] - outcome.losses[-1],
        "loss_tail_mean": tail,
        "chance_loss": chance,
        "wall_s": time.perf_counter() - started,
        "pairs_per_s": outcome.pairs / outcome.train_s,
        "gpu_util_mean": session.mean_gpu_util(),
    } | memory_figures(bench.device)
    drop, wall_s = outcome.losses[0] - outcome.losses[-1], time.perf_counter() - started
    passed = drop >= SANITY_LOSS_DROP and tail <= chance - SANITY_LOSS_DROP and wall_s <= SANITY_WALL_S
    return session.finish(figures, {"passed": passed} | _sanity_details(bench, config, outcome, shuffled))


def _architecture(config: SanityConfig) -> "Architecture":
    return architecture_of(config.image, config.text, config.heads, config.loss, flipped_view=False)


def _sanity_details(bench: Workbench, config: SanityConfig, outcome: "Outcome", shuffled: bool) -> dict[str, Any]:
    return {
        "batch": config.batch,
        "image_size": config.image.image_size,
        "updates": outcome.updates,
        "precision": bench.precision,
        "device": bench.device.type,
        "shuffled": shuffled,
        "losses": list(outcome.losses),
    }
