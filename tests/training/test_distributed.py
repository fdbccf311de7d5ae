"""Two processes against one: the same losses, from features that are exchanged and gradients that are added up."""

import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import TINY

from chimera_cli.models.dual_encoder import DualEncoder, build_dual_encoder
from chimera_cli.training.batches import Place, pair_batches
from chimera_cli.training.distributed import ALONE, joined, rank_and_world
from chimera_cli.training.loop import Keeper, train
from chimera_cli.training.losses import contrastive_loss
from chimera_cli.training.optimiser import build_optimiser, build_schedule

CPU = torch.device("cpu")
IMAGES, BATCH, UPDATES = 46, 11, 20
WORDS = ["a", "red", "dog", "runs", "over", "the", "green", "hill", "and", "far", "away", "from", "here"]


def model_of(kind: str, members: int) -> DualEncoder:
    """Return the smallest dual encoder in float64, batch statistics frozen as those of pretrained towers are."""
    torch.manual_seed(0)
    bias = -2.0 if kind == "sigmoid" else None
    model = build_dual_encoder(replace(TINY, head="mlp", members=members, logit_bias=bias)).double()
    model.image_tower.frozen_statistics = True
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def trained(kind: str, micro_batch: int | None, members: int) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms of 20 updates on this process's share of uneven batches with repeated images."""
    model = model_of(kind, members)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(IMAGES, 3, 32, 32, generator=generator).double()
    captions = [" ".join(WORDS[row % 5 : 3 + row % 5 + row % 7]) for row in range(2 * IMAGES)]

    def images(positions: Any, _place: Place) -> torch.Tensor:
        return pixels[torch.from_numpy(positions)]

    def texts(rows: Any, _place: Place) -> Any:
        return model.tokenise([captions[row] for row in rows])

    with joined(CPU) as processes:
        pairs = pair_batches(
            [np.array([2 * image, 2 * image + 1]) for image in range(IMAGES)],
            np.arange(IMAGES) // 2 * 2,
            images,
            texts,
            batch=BATCH,
            seed=3,
            device=CPU,
            rank=processes.rank,
            world=processes.world,
        )
        optimiser = build_optimiser(model, lr_heads=1e-3, lr_image=1e-3, lr_text=1e-3, weight_decay=0.1)
        norms: list[float] = []
        wish = Keeper(lambda _: False, lambda _state, _better: None, lambda: False)
        outcome = train(
            model,
            pairs,
            contrastive_loss(kind, members, label_smoothing=0.1),
            optimiser,
            build_schedule(optimiser, UPDATES, 0.1),
            updates=UPDATES,
            device=CPU,
            micro_batch=micro_batch,
            processes=processes,
            keeper=wish,
            listener=lambda event: norms.append(event.metrics["grad_norm"]),
        )
    assert outcome.pairs == sum(len(batch) for batch in islice(everything(), UPDATES))
    return list(outcome.losses), norms


def everything() -> Any:
    """Return the batches of a single process, for their sizes alone."""
    rows = [np.array([image]) for image in range(IMAGES)]

    def nothing(positions: Any, _place: Place) -> torch.Tensor:
        return torch.empty(len(positions), 0)

    return pair_batches(rows, np.arange(IMAGES), nothing, nothing, batch=BATCH, seed=3, device=CPU)


def work(rank: int, port: int, setting: tuple[str, int | None, int], results: Any) -> None:
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place)
    results.put((rank, *trained(*setting)))


@pytest.mark.parametrize("setting", [("infonce", None, 1), ("sigmoid", 3, 2)], ids=str)
def test_two_processes_have_the_losses_of_one(setting: tuple[str, int | None, int]) -> None:
    alone, norms = trained(*setting)
    assert len(set(alone)) == UPDATES
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed"])
    results = context.SimpleQueue()
    processes = [context.Process(target=work, args=(rank, port, setting, results)) for rank in range(2)]
    for process in processes:
        process.start()
    # The one that lives waits for ever for one that died.
    while any(process.is_alive() for process in processes) and all(
        process.exitcode in (None, 0) for process in processes
    ):
        wait([process.sentinel for process in processes if process.is_alive()])
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    first, second = sorted([results.get(), results.get()])
    # Temperature and bias included: their part is not added up twice.
    assert first[1] == pytest.approx(alone, rel=0, abs=1e-9)
    assert first[2] == pytest.approx(norms, rel=1e-9)
    assert second[1] == first[1], "both compute the whole loss, from the same features"


def test_processes_leave_whatever_the_threads_of_the_group_still_hold() -> None:
    """Without the reference that is kept, one pair in four to twelve waited for ever."""
    script = Path(__file__).with_name("leave_often.py")
    done = subprocess.run([sys.executable, str(script), "24"], capture_output=True, text=True, check=True, timeout=400)
    assert done.stdout.splitlines() == ["0 0"] * 24


def test_alone_nothing_is_exchanged() -> None:
    assert rank_and_world() == (0, 1)
    assert ALONE.agree(True, False) == (True, False)
    assert ALONE.gather("x") == ["x"]
    assert ALONE.share("x") == "x"
    assert ALONE.leads
    features = torch.ones(3, 2)
    assert ALONE.exchange(features)[0] is features
