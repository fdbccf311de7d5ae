"""The way to a recall in a report: spreads, misses, and ratios that say what they are."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_group

from chimera_cli.reporting.benchmarks import benchmarks_section
from chimera_cli.reporting.document import Document, Table
from chimera_cli.reporting.facts import collect
from chimera_cli.reporting.markdown import render, render_blocks
from chimera_cli.reporting.sections import build
from chimera_cli.reporting.training_benchmarks import race_blocks, speedrun_blocks
from chimera_cli.reporting.verdicts import Verdicts
from chimera_cli.runs import write_json


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


def test_a_target_that_ours_missed_stays_in_the_table() -> None:
    details = {"target": 0.66, "against": "open_clip", "locked": {"basis": None, "peer": {"failed": None}}}
    one = seed(details, cold_s=20.0, cached_s=None, peer_s=None, ratio_cold=None, ratio_cached=None)
    assert rows(race_blocks([one])) == [
        ["locked, to R@10 of 66 %, nothing cached", "20.0 s", "–", "–"],
        ["locked, to R@10 of 66 %, features cached", "missed", "–", "–"],
    ]
    both = rows(race_blocks([seed(details, cold_s=None, cached_s=None, peer_s=None)]))
    assert [row[1] for row in both] == ["missed", "missed"]


def test_a_peer_that_failed_is_told_with_its_reason() -> None:
    details = {
        "target": 0.66,
        "against": "open_clip",
        "locked": {"basis": None, "peer": {"failed": "out of memory\nafter 3 updates"}},
        "full": {"failed": "killed."},
    }
    one = seed(details, cold_s=20.0, cached_s=2.0, peer_s=None, full_pairs_per_s=8.0, full_peer_pairs_per_s=None)
    blocks = list(race_blocks([one]))
    assert [row[1:3] for row in rows(blocks)] == [["20.0 s", "failed"], ["2.00 s", "failed"], ["8.0 pairs/s", "failed"]]
    text = render_blocks(blocks)
    assert "failed on the way to the recall: Out of memory after 3 updates." in text
    assert "failed in full fine-tuning: Killed." in text


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


DETAILS = {"target": 0.66, "plain": {"seconds": 100.0}}


@pytest.mark.parametrize("damage", ["missing", "broken", "edited", "of another seed"])
def test_a_seed_without_a_whole_result_is_named_and_nothing_averaged(tmp_path: Path, damage: str) -> None:
    train = make_group(tmp_path, "train", [{"wall_s": 1.0}])
    runs = [{"cold_s": seconds, "cold_share": seconds / 100, "ram_peak_gb": 1.5} for seconds in (20.0, 24.0, 28.0)]
    group = make_group(tmp_path, "bench-speedrun", runs, details=DETAILS)
    path = group.seed_dir(1) / "result.json"
    if damage == "missing":
        path.unlink()
    elif damage == "of another seed":
        shutil.copy(group.seed_dir(0) / "result.json", path)
    else:
        path.write_text("{" if damage == "broken" else path.read_text().replace("24.0", "2.0"))
    text = text_of(tmp_path, train)
    assert f"`{group.name}/seed-1/result.json`" in text
    assert "so there is no mean over the seeds" in text
    assert "20.0 s, 28.0 s" in text
    assert "(n=2)" not in text
    assert "(n=3)" not in text


def test_a_report_says_which_run_its_figures_are_of(tmp_path: Path) -> None:
    train = make_group(tmp_path, "train", [{"wall_s": 1.0}])
    command = "chimera bench speedrun --seeds 0,1"
    runs = [{"cold_s": 20.0, "ram_peak_gb": 1.5}, {"cold_s": 20.0, "ram_peak_gb": 2.5}]
    fast = make_group(tmp_path, "bench-speedrun", runs, details=DETAILS, command=command)
    write_json(fast.seed_dir(0) / "environment.json", {"git_commit": "ab" * 20, "git_dirty": True})
    details = {"against": "open_clip", "target": 0.66, "locked": {"basis": None}}
    race = make_group(tmp_path, "bench-train", [{"cold_s": 20.0}], details=details, command="chimera bench train")
    text = render(build(collect(tmp_path, train), Verdicts((), (), "chimera slo check --run latest")))
    told = f"run `{fast.name}`, recipe `made`, commit `abababababab` with uncommitted changes, by `{command}`."
    assert told in text
    assert f"run `{race.name}`, recipe `made`, no git commit, by `chimera bench train`." in text
    assert "Training beside `open_clip`" in text
    (row,) = [line for line in text.splitlines() if "speedrun, highest of all seeds" in line]
    assert "2.5" in row
    assert "training beside a peer, ours" in text
    assert f"\n{command}\nchimera bench train\n" in text


def text_of(home: Path, group: Any) -> str:
    return render(Document("title", (), (benchmarks_section(collect(home, group)),)))
