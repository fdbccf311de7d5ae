"""`chimera bench features`: how fast the features of locked towers are computed on a CPU, beside plain PyTorch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener, Note, Progress, ignore
from chimera_cli.services.bench_common import SEED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from chimera_cli.data.pack import Pack
    from chimera_cli.services.session import SeedSession

    Vectors = NDArray[np.float32]

# The batch of a plain loop over images or captions.
_PLAIN_BATCH = 32


@dataclass(frozen=True, slots=True)
class FeatureSetting:
    """What is encoded by which towers, and how often that is timed."""

    image: str
    text: str
    image_size: int
    max_tokens: int
    images: int
    captions: int
    rounds: int


@dataclass(frozen=True, slots=True)
class _Race:
    """The same features computed in two ways; `built_s` is what `ours` took to get ready."""

    component: str
    unit: str
    count: int
    backend: str
    built_s: float
    plain: "Callable[[], Vectors]"
    ours: "Callable[[], Vectors]"


def bench_features(
    home: Path, data: str | None, setting: FeatureSetting, command: str, listener: Listener = ignore
) -> dict[str, Any]:
    """Return how many features a second training computes of a pack's images and captions, and plain PyTorch.

    On the CPU alone, from the pack to features. Writes a group of kind `bench-features`.
    """
    from chimera_cli.runtime import pick_device
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, need_pack, seed_session

    pack, device = need_pack(home, data, listener), pick_device("cpu")
    facts = group_facts(command, pack, asdict(setting), device)
    with group_session(home, "bench-features", "", [SEED], facts) as group:
        started_at = time.perf_counter()
        with seed_session(group, SEED, asdict(setting), device, [listener], 0) as session:
            details = compare_backends(pack, setting, session.tell)
            return {"group": group.name} | _finish(session, details, started_at)


def _finish(session: "SeedSession", details: dict[str, Any], started_at: float) -> dict[str, Any]:
    import torch

    from chimera_cli.services.session import memory_figures

    figures = {
        "ram_peak_gb": memory_figures(torch.device("cpu"))["ram_peak_gb"],
        "wall_s": time.perf_counter() - started_at,
    }
    return session.finish(figures, details)


def compare_backends(pack: "Pack", setting: FeatureSetting, tell: Listener = ignore) -> dict[str, Any]:
    """Return seconds, rates, ratios and the greatest disagreement of both towers' features, ours against plain ones.

    Plain are eager float32 batches of 32: images in NCHW, captions in the order of the pack, padded to the longest of
    the batch. Both are timed in turn, `rounds` times, on the same cores and from the pack on, so that a busy machine
    slows both; the ratio is the median of the rounds' ratios. Raises ChimeraError for a pack without captions.
    """
    import torch

    if not len(pack.captions("train").texts):
        raise ChimeraError(f"the pack {pack.name} has no training captions", "take a pack with captions: --data NAME")
    components = [_race(make(pack, setting, tell), setting.rounds, tell) for make in (_images, _captions)]
    return asdict(setting) | {"components": components, "threads": torch.get_num_threads()}


def _race(race: _Race, rounds: int, tell: Listener) -> dict[str, Any]:
    import numpy as np

    plain_s, ours_s = [], []
    for done in range(rounds):
        plain, seconds = _timed(race.plain)
        plain_s.append(seconds)
        ours, seconds = _timed(race.ours)
        ours_s.append(seconds)
        tell(Progress(race.component, done + 1, rounds, "rounds"))
    errors = np.linalg.norm(ours - plain, axis=1) / np.linalg.norm(plain, axis=1).clip(min=1e-12)
    ratios = [theirs / own for theirs, own in zip(plain_s, ours_s, strict=True)]
    return {
        "component": race.component,
        "unit": race.unit,
        "count": race.count,
        "backend": race.backend,
        "built_s": race.built_s,
        "plain_s": median(plain_s),
        "ours_s": median(ours_s),
        "plain_per_s": race.count / median(plain_s),
        "ours_per_s": race.count / median(ours_s),
        "ratio": median(ratios),
        "ratio_by_round": ratios,
        "greatest_error": float(errors.max()),
    }


def _timed(work: "Callable[[], Vectors]") -> "tuple[Vectors, float]":
    started_at = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started_at


# ---- the two ways ---------------------------------------------------------------------------------------------------


def _images(pack: "Pack", setting: FeatureSetting, tell: Listener) -> _Race:
    import torch

    from chimera_cli.models.image_tower import build_image_tower
    from chimera_cli.models.sessions import image_session
    from chimera_cli.training.features import image_features, preprocess

    plain_tower, tower = (build_image_tower(setting.image).eval() for _ in range(2))
    tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    indices = pack.split_indices("train")[: setting.images]

    def ready(rows: "NDArray[np.int64]") -> "torch.Tensor":
        return preprocess(torch.from_numpy(pack.images[rows]), tower, setting.image_size)

    def plain() -> "Vectors":
        with torch.inference_mode():
            return torch.cat([plain_tower(ready(rows).contiguous()) for rows in _batches(indices)]).numpy()

    encode, backend, built_s = _ours(lambda: image_session(tower, ready(indices[:4])), tower, tell)

    def ours() -> "Vectors":
        features = image_features(
            encode, tower, pack.images, indices, image_size=setting.image_size, device=torch.device("cpu")
        )
        return features[:, 0]

    return _Race("image features", "images", len(indices), backend, built_s, plain, ours)


def _captions(pack: "Pack", setting: FeatureSetting, tell: Listener) -> _Race:
    import torch

    from chimera_cli.models.sessions import caption_session
    from chimera_cli.models.text_tower import build_text_tower
    from chimera_cli.training.features import caption_features

    tower = build_text_tower(setting.text).eval()
    texts = list(pack.captions("train").texts[: setting.captions])

    def plain() -> "Vectors":
        with torch.inference_mode():
            parts = [tower(tower.tokenise(some, setting.max_tokens)) for some in _batches(texts)]
            return torch.cat(parts).numpy()

    samples = tower.token_table(texts, setting.max_tokens).samples(8)
    encode, backend, built_s = _ours(lambda: caption_session(tower, samples), tower, tell)

    def ours() -> "Vectors":
        table = tower.token_table(texts, setting.max_tokens)
        return caption_features(encode, table, device=torch.device("cpu"))

    return _Race("caption features", "captions", len(texts), backend, built_s, plain, ours)


def _batches(items: Sequence[Any] | Any) -> list[Any]:
    return [items[start : start + _PLAIN_BATCH] for start in range(0, len(items), _PLAIN_BATCH)]


def _ours(
    session: Callable[[], Callable[[Any], Any]], tower: Callable[[Any], Any], tell: Listener
) -> tuple[Callable[[Any], Any], str, float]:
    """Return what training would encode with here, its name, and the seconds until it was ready."""
    from chimera_cli.models.sessions import SessionError, session_backend

    backend, started_at = session_backend(), time.perf_counter()
    if backend is None:
        return tower, "torch", 0.0
    try:
        return session(), backend, time.perf_counter() - started_at
    except SessionError as error:
        tell(Note(str(error), "warning"))
        return tower, "torch", 0.0
