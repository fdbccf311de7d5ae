"""The benchmark of ranking: what it measures and writes on a small case, and that it would notice wrong ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chimera_cli.errors import UsageError
from chimera_cli.evaluation.retrieval import retrieval_figures, retrieval_ranks
from chimera_cli.events import Event, Progress
from chimera_cli.runs import latest_group, read_sealed_json
from chimera_cli.services.bench_retrieval import RetrievalSetting, bench_retrieval, made_up, wrong_ranks


def test_it_writes_a_finished_group_with_ratio_memory_and_check(tmp_path: Path) -> None:
    told: list[Event] = []
    result = bench_retrieval(
        tmp_path, images=300, captions=1000, dim=16, rounds=3, command="chimera x", listener=told.append
    )
    group = latest_group(tmp_path, "bench-retrieval")
    assert (group.name, group.facts["pack"]) == (result["group"], None)
    stored = read_sealed_json(group.seed_dir(0) / "result.json")
    details = stored["details"]
    assert details == result["details"]
    assert (details["images"], details["captions"], details["dim"]) == (300, 1000, 16)
    assert details["ratio"] == sorted(details["ratio_by_round"])[1]
    assert len(details["ratio_by_round"]) == 3
    assert (details["checked_queries"], details["wrong_ranks"]) == (128, 0)
    # The features once more in float32 (83 KB) and a block with its comparisons (some MB).
    assert 1e-5 < details["extra_memory_gb"] < 0.02
    assert [event.done for event in told if isinstance(event, Progress)] == [0, 1, 2, 3]


def test_made_up_embeddings_are_unit_vectors_of_middling_difficulty() -> None:
    problem = made_up(RetrievalSetting(400, 2000, 512, 1))
    for vectors in (problem.images, problem.texts):
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.bincount(problem.owner).tolist() == [5] * 400
    figures = retrieval_figures(retrieval_ranks(problem.images, problem.texts, problem.owner))
    assert 0.4 < figures["t2i_r1"] < 0.95


def test_wrong_ranks_are_noticed() -> None:
    # Fewer captions than images: most images are no queries.
    problem = made_up(RetrievalSetting(90, 60, 8, 1))
    ranks = retrieval_ranks(problem.images, problem.texts, problem.owner)
    assert wrong_ranks(problem, ranks) == 0
    assert wrong_ranks(problem, replace(ranks, t2i=ranks.t2i + 1)) == 60
    assert wrong_ranks(problem, replace(ranks, i2t=ranks.i2t * 2)) > 30


def test_nothing_to_rank_is_a_usage_error_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        bench_retrieval(tmp_path, images=0, captions=1, dim=1, rounds=1, command="chimera x")
    assert list(tmp_path.iterdir()) == []
