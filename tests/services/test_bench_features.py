"""`bench features`: both ways compute the same, and the result says how fast each is."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from chimera_cli.cli.bench_features import _features_table
from chimera_cli.models import sessions
from chimera_cli.models.weights import DEFAULT_IMAGE
from chimera_cli.runs import list_groups, read_json
from chimera_cli.services.bench_features import FeatureSetting, bench_features

SETTING = FeatureSetting(DEFAULT_IMAGE, "tiny", 32, 32, 40, 50, 2)


def test_both_ways_agree_and_are_timed_in_turn(small_home: Path) -> None:
    result = bench_features(small_home, "small", SETTING, "chimera bench features")
    details = result["details"]
    assert [one["count"] for one in details["components"]] == [40, 50]
    for one in details["components"]:
        assert one["backend"] == (sessions.session_backend() or "torch")
        assert one["greatest_error"] < 1e-3
        assert len(one["ratio_by_round"]) == 2
        assert one["ours_per_s"] == one["count"] / one["ours_s"]
        assert min(one["ratio_by_round"]) <= one["ratio"] <= max(one["ratio_by_round"])
    stored = read_json(list_groups(small_home)[0].seed_dir(0) / "result.json")
    assert stored["details"]["components"] == details["components"]
    console = Console(width=150, file=StringIO())
    with console.capture() as capture:
        console.print(_features_table(result))
    text = capture.get()
    assert "image features" in text
    assert "greatest difference" in text


def test_without_the_libraries_our_own_way_is_still_measured(small_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "session_backend", lambda: None)
    details = bench_features(small_home, "small", SETTING, "chimera bench features")["details"]
    assert {one["backend"] for one in details["components"]} == {"torch"}
