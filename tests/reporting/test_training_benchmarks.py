"""The way to a recall in a report: spreads, misses, and ratios that say what they are."""

from pathlib import Path
from typing import Any

from made_runs import make_group

from chimera_cli.reporting.benchmarks import benchmarks_section
from chimera_cli.reporting.document import Document, Table
from chimera_cli.reporting.facts import collect
from chimera_cli.reporting.markdown import render
from chimera_cli.reporting.training_benchmarks import race_blocks, speedrun_blocks


def seed(details: dict[str, Any], **figures: float | None) -> dict[str, Any]:
    return {"figures": figures, "details": details}


def rows(blocks: Any) -> list[list[str]]:
    found = [block for block in blocks if isinstance(block, Table)]
    return [[str(cell) for cell in row] for row in found[0].rows]


def test_a_speedrun_is_a_mean_with_its_spread() -> None:
    details = {"target": 0.66, "plain": {"seconds": 100.0}}
    seeds = [
        seed(details, cold_s=20.0, cold_share=0.2, cached_s=3.0, cached_share=0.03),
        seed(details, cold_s=24.0, cold_share=0.24, cached_s=None, cached_share=None),
    ]
    assert rows(speedrun_blocks(seeds)) == [
        ["nothing cached", "22.0 s ± 2.83 s (n=2)", "0.220 ± 0.028 (n=2)"],
        ["features cached", "missed by 1 of 2 seeds", "–"],
    ]


def test_a_race_says_what_its_ratios_are() -> None:
    details = {"target": 0.66, "against": "open_clip", "locked": {"basis": "at least"}}
    one = seed(
        details, cold_s=20.0, cached_s=2.0, peer_s=500.0, ratio_cold=25.0, ratio_cached=250.0,
        full_pairs_per_s=8.0, full_peer_pairs_per_s=4.0, ratio_full=2.0,
    )  # fmt: skip
    assert rows(race_blocks([one])) == [
        ["locked, to R@10 of 66 %, nothing cached", "20.0 s", "8 min 20 s", "more than 25.0×"],
        ["locked, to R@10 of 66 %, features cached", "2.00 s", "8 min 20 s", "more than 250×"],
        ["full fine-tuning", "8.0 pairs/s", "4.0 pairs/s", "2.00×"],
    ]


def test_results_that_were_edited_into_nonsense_leave_words_out() -> None:
    assert list(race_blocks([{"figures": None, "details": {"locked": 3}}])) == []
    assert rows(speedrun_blocks([{"details": "none"}])) == []


def test_the_report_takes_both_from_their_newest_groups(tmp_path: Path) -> None:
    train = make_group(tmp_path, "train", [{"wall_s": 1.0}])
    assert "plain pass" not in text_of(tmp_path, train)
    details = {"target": 0.66, "plain": {"seconds": 100.0}}
    make_group(tmp_path, "bench-speedrun", [{"cold_s": 30.0, "cold_share": 0.3}] * 3, details=details)
    figures = {"cold_s": 30.0, "peer_s": 300.0, "ratio_cold": 10.0}
    make_group(tmp_path, "bench-train", [figures], details={"target": 0.66, "locked": {"basis": "projected"}})
    text = text_of(tmp_path, train)
    assert "0.300 ± 0.000 (n=3)" in text
    assert "10.0× projected" in text


def text_of(home: Path, group: Any) -> str:
    return render(Document("title", (), (benchmarks_section(collect(home, group)),)))
