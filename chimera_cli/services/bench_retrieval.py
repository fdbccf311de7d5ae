"""`chimera bench retrieval`: the time that all ranks take, beside the bare matrix product that they need."""

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import UsageError
from chimera_cli.events import Listener, Progress, ignore
from chimera_cli.services.bench_common import SEED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from chimera_cli.evaluation.retrieval import Ranks
    from chimera_cli.services.session import SeedSession

    Vectors = NDArray[np.float32]

# Queries of each direction that are ranked once more, plainly and in float64.
_CHECKED = 64
# Noise against signal in the captions: their cosine with their image is 0.16, about that of a small CLIP.
_NOISE = 6.0


@dataclass(frozen=True, slots=True)
class RetrievalSetting:
    """How many embeddings of how many dimensions are ranked, and how often that is timed."""

    images: int
    captions: int
    dim: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Unit embeddings, `images` (images, dim) and `texts` (captions, dim), and `owner` (captions,) of each caption."""

    images: "Vectors"
    texts: "Vectors"
    owner: "NDArray[np.int64]"


def bench_retrieval(
    home: Path,
    *,
    images: int,
    captions: int,
    dim: int,
    rounds: int,
    command: str,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return the time of ranking made-up embeddings in both directions, its ratio to the bare product, and its memory.

    Product and ranks are timed in turn, `rounds` times after a round for warming up, on the same cores and in the same
    blocks, so that a busy machine slows both; the ratio is the median of the rounds' ratios. The extra memory is the
    peak of what numpy asked for, from a run that is not timed. Some queries are ranked again in float64. On the CPU
    alone, as evaluation does it. Writes a group of kind `bench-retrieval`. Raises UsageError for nothing to rank.
    """
    from chimera_cli.runtime import pick_device
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, seed_session

    if min(images, captions, dim, rounds) < 1:
        raise UsageError("images, captions, dim and rounds must be at least 1", "without options it is 5,000 x 25,000")
    setting = RetrievalSetting(images, captions, dim, rounds)
    device = pick_device("cpu")
    facts = group_facts(command, None, asdict(setting), device)
    with group_session(home, "bench-retrieval", "", [SEED], facts) as group:
        started_at = time.perf_counter()
        with seed_session(group, SEED, asdict(setting), device, [listener], 0) as session:
            details = measure(setting, session.tell)
            return {"group": group.name} | _finish(session, details, started_at)


def _finish(session: "SeedSession", details: dict[str, Any], started_at: float) -> dict[str, Any]:
    import torch

    from chimera_cli.services.session import memory_figures

    figures = {
        "ram_peak_gb": memory_figures(torch.device("cpu"))["ram_peak_gb"],
        "wall_s": time.perf_counter() - started_at,
    }
    return session.finish(figures, details)


def measure(setting: RetrievalSetting, tell: Listener = ignore) -> dict[str, Any]:
    """Return what is in the details of the result: seconds, ratios, memory, and how many ranks were found wrong."""
    from chimera_cli.evaluation.retrieval import retrieval_ranks, threads

    problem = made_up(setting)

    def rank() -> "Ranks":
        return retrieval_ranks(problem.images, problem.texts, problem.owner)

    product_s, ranks_s = [], []
    for done in range(setting.rounds + 1):
        laps = _seconds(lambda: bare_product(problem)), _seconds(rank)
        if done:
            product_s.append(laps[0])
            ranks_s.append(laps[1])
        tell(Progress("retrieval", done, setting.rounds, "rounds"))
    ratios = [ours / bare for ours, bare in zip(ranks_s, product_s, strict=True)]
    ranks, extra = _with_memory(rank)
    return asdict(setting) | {
        "product_s": median(product_s),
        "ranks_s": median(ranks_s),
        "ratio": median(ratios),
        "ratio_by_round": ratios,
        "extra_memory_gb": extra,
        "checked_queries": 2 * min(_CHECKED, setting.images, setting.captions),
        "wrong_ranks": wrong_ranks(problem, ranks),
        "threads": threads(),
    }


def made_up(setting: RetrievalSetting) -> Problem:
    """Return seeded embeddings of which about half the captions find their image first, as a trained model's do."""
    import numpy as np

    generator = np.random.default_rng(SEED)
    owner = np.sort(np.arange(setting.captions) % setting.images)
    images = _unit(generator.standard_normal((setting.images, setting.dim), dtype=np.float32))
    noise = _unit(generator.standard_normal((setting.captions, setting.dim), dtype=np.float32))
    return Problem(images, _unit(images[owner] + _NOISE * noise), owner)


def _unit(vectors: "Vectors") -> "Vectors":
    import numpy as np

    scaled: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def bare_product(problem: Problem) -> None:
    """Multiply all images with all captions in the blocks that `retrieval_ranks` takes, and look at nothing."""
    from chimera_cli.evaluation.retrieval import BLOCK_COLUMNS, BLOCK_ROWS

    for top in range(0, len(problem.images), BLOCK_ROWS):
        for left in range(0, len(problem.texts), BLOCK_COLUMNS):
            problem.images[top : top + BLOCK_ROWS] @ problem.texts[left : left + BLOCK_COLUMNS].T


def wrong_ranks(problem: Problem, ranks: "Ranks") -> int:
    """Return how many of some evenly spread queries have another rank when scored plainly in float64."""
    import numpy as np

    images, texts, owner = problem.images.astype(np.float64), problem.texts.astype(np.float64), problem.owner
    count = min(_CHECKED, len(images), len(texts))
    wrong = 0
    for caption in np.linspace(0, len(texts) - 1, count).astype(int):
        scores = images @ texts[caption]
        rivals = np.delete(scores, owner[caption])
        wrong += ranks.t2i[caption] != 1 + (rivals >= scores[owner[caption]]).sum()
    for image in np.linspace(0, len(images) - 1, count).astype(int):
        scores, own = texts @ images[image], owner == image
        rank = 1 + (scores[~own] >= scores[own].max()).sum() if own.any() else 0
        wrong += ranks.i2t[image] != rank
    return int(wrong)


def _seconds(work: Callable[[], Any]) -> float:
    started_at = time.perf_counter()
    work()
    return time.perf_counter() - started_at


def _with_memory(work: "Callable[[], Ranks]") -> "tuple[Ranks, float]":
    """Return what `work` returns and the peak of memory that it allocated, in GiB."""
    tracemalloc.start()
    try:
        result = work()
        return result, tracemalloc.get_traced_memory()[1] / 2**30
    finally:
        tracemalloc.stop()
