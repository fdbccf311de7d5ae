"""The cache of features: computed once, verified, mapped; whatever goes wrong leaves nothing half-made behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from chimera_cli.errors import ChimeraError
from chimera_cli.training import cache
from chimera_cli.training.cache import Allocate, CachedFeatures, cached

CPU = torch.device("cpu")


def test_the_second_time_values_come_from_their_file(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute(allocate: Allocate) -> None:
        calls.append(1)
        allocate((3, 2), np.float16)[:] = [[1, 2], [3, 4], [5, 6]]

    def again(**key: int) -> CachedFeatures:
        return cached(tmp_path, "dev-images", key, compute, CPU)

    first, second = again(width=2), again(width=2)
    assert (first.from_cache, second.from_cache, len(calls)) == (False, True, 1)
    assert first.seconds == second.seconds > 0
    assert second.values.dtype == np.float16
    assert second.values.tolist() == [[1, 2], [3, 4], [5, 6]]
    again(width=3)
    assert len(calls) == 2
    facts = [json.loads(path.read_text()) for path in tmp_path.glob("dev-images-*.json")]
    assert sorted(one["key"]["width"] for one in facts) == [2, 3]


def test_what_is_done_to_mapped_values_does_not_reach_the_file(tmp_path: Path) -> None:
    def compute(allocate: Allocate) -> None:
        allocate((4,), np.float32)[:] = 1

    cached(tmp_path, "x", {}, compute, CPU).values[0] = 5
    # No warning of read-only memory either, which tests would turn into an error.
    assert torch.from_numpy(cached(tmp_path, "x", {}, compute, CPU).values).tolist() == [1, 1, 1, 1]


def test_a_changed_file_is_computed_anew(tmp_path: Path) -> None:
    def compute(allocate: Allocate) -> None:
        allocate((2,), np.float32)[:] = 7

    cached(tmp_path, "x", {}, compute, CPU)
    path = next(tmp_path.glob("x-*.npy"))
    np.save(path, np.zeros(2, dtype=np.float32))
    assert cached(tmp_path, "x", {}, compute, CPU).values.tolist() == [7, 7]
    path.with_suffix(".json").write_text("{")
    assert not cached(tmp_path, "x", {}, compute, CPU).from_cache


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def compute(allocate: Allocate) -> None:
        allocate((2,), np.float32)[:] = 7
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "x", {}, compute, CPU)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_is_named_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: int) -> None:
        raise OSError(28, "No space left on device")

    def compute(allocate: Allocate) -> None:
        allocate((1000,), np.float32)
        raise AssertionError("there was no room")

    monkeypatch.setattr(cache.os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(cache.sys, "platform", "linux")
    with pytest.raises(ChimeraError, match=r"x-\w+\.npy can't be written: No space left") as caught:
        cached(tmp_path, "x", {}, compute, CPU)
    assert "free some space" in caught.value.hint
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
