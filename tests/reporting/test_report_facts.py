"""What a report says: evidence that fits, missing figures as dashes or commands, the ladder only where it may stand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from chimera_cli.reporting.facts import collect, newest_like
from chimera_cli.reporting.markdown import render
from chimera_cli.reporting.sections import Verdicts, build, ladder_rows
from chimera_cli.runs import Group, read_json, update_group

NO_VERDICTS = Verdicts((), (), "chimera slo check --run latest")


def report(home: Path, group: Group) -> str:
    return render(build(collect(home, group), NO_VERDICTS))


def test_benchmarks_of_the_same_pack_hardware_and_source_fill_the_tables(
    tmp_path: Path, new_train_group: Callable[..., Group], new_bench_groups: Callable[..., list[Group]]
) -> None:
    new_bench_groups(tmp_path)
    text = report(tmp_path, new_train_group(tmp_path))
    assert "512.5 images/s" in text
    assert "12.8 % of memory copy" in text
    assert "2 min 03 s" in text
    assert "1 min 21 s ± 1.00 s (n=3)" in text
    assert "not measured" not in text


def test_without_them_the_report_names_the_commands(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    text = report(tmp_path, new_train_group(tmp_path))
    for command in ("chimera bench loader", "chimera bench encoders", "chimera train sanity --seed 0"):
        assert f"not measured here, run `{command}`" in text


@pytest.mark.parametrize(
    "change",
    [
        {"source_hash": "0" * 64},
        {"hardware": {"device": "cuda", "cpu": "x", "cores": 2, "gpu": "GTX 1080"}},
        {"pack": {"name": "toy", "fingerprint": "0" * 64, "source": "toy"}},
        {"status": "failed"},
    ],
)
def test_evidence_of_anything_else_does_not_count(
    tmp_path: Path,
    new_train_group: Callable[..., Group],
    new_bench_groups: Callable[..., list[Group]],
    change: dict[str, object],
) -> None:
    group = new_train_group(tmp_path)
    loader = new_bench_groups(tmp_path)[0]
    assert newest_like(tmp_path, group, "bench-loader") is not None
    update_group(loader, **change)
    assert newest_like(tmp_path, group, "bench-loader") is None


def test_the_newest_finished_evidence_counts(
    tmp_path: Path, new_train_group: Callable[..., Group], new_bench_groups: Callable[..., list[Group]]
) -> None:
    group = new_train_group(tmp_path)
    older, newer = new_bench_groups(tmp_path)[0], new_bench_groups(tmp_path)[0]
    found = newest_like(tmp_path, group, "bench-loader")
    assert found is not None
    assert found.group.name == newer.name
    update_group(older, finished_at="2999-01-01T00:00:00.000000+00:00")
    found = newest_like(tmp_path, group, "bench-loader")
    assert found is not None
    assert found.group.name == older.name


def test_recall_stands_by_seed_with_intervals_mean_and_deviation(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    text = report(tmp_path, new_train_group(tmp_path))
    (line,) = [line for line in text.splitlines() if line.startswith("| image to text R@1 ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        "33.0 % (30.0 – 36.0)",
        "34.0 % (31.0 – 37.0)",
        "35.0 % (32.0 – 38.0)",
        "34.0 ± 1.0 % (n=3)",
        "0.1 %",
    ]


def test_the_ladder_stands_only_beside_figures_of_the_whole_flickr8k_test_split(
    tmp_path: Path, new_train_group: Callable[..., Group], evaluate: Callable[..., None]
) -> None:
    group = new_train_group(tmp_path)
    assert ladder_rows(collect(tmp_path, group)) == []
    assert f"chimera eval --run {group.name} --split test" in report(tmp_path, group)
    for seed in group.seeds:
        evaluate(group, seed, "test", 0.0)
    rows = ladder_rows(collect(tmp_path, group))
    # R@10 of 0.76 is above mini-CLIP's 0.642 and below CLIP's 0.946.
    assert [ours for *_, ours in rows] == [False, False, False, False, True, False]
    for seed in group.seeds:
        evaluate(group, seed, "test", 0.0, images=300)
    assert ladder_rows(collect(tmp_path, group)) == []


def test_no_ladder_and_a_warning_on_the_toy_pack(
    tmp_path: Path, new_train_group: Callable[..., Group], evaluate: Callable[..., None]
) -> None:
    group = new_train_group(tmp_path, "toy")
    for seed in group.seeds:
        evaluate(group, seed, "test", 0.0)
    text = report(tmp_path, group)
    assert "**Built-in toy set.**" in text
    assert "this pack is another one" in text
    assert "CCA" not in text


def test_a_missing_seed_is_told_and_its_figures_are_not_averaged_away(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    group = new_train_group(tmp_path)
    (group.seed_dir(1) / "result.json").unlink()
    text = report(tmp_path, group)
    assert "No result of seed 1." in text
    assert "(n=2)" in text


def test_names_in_result_files_can_not_break_the_page(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    text = report(tmp_path, new_train_group(tmp_path))
    assert "<b>" not in text.replace("\\<b>", "")


def test_commands_that_reproduce_come_from_the_groups_themselves(
    tmp_path: Path, new_train_group: Callable[..., Group], new_bench_groups: Callable[..., list[Group]]
) -> None:
    new_bench_groups(tmp_path)
    group = new_train_group(tmp_path)
    block = report(tmp_path, group).split("```sh\n")[1].split("\n```")[0].splitlines()
    assert block == [
        "chimera data prepare flickr8k",
        "chimera train sanity --seed 0",
        "chimera bench loader",
        "chimera bench encoders",
        read_json(group.path / "group.json")["command"],
        "chimera eval --run latest --split dev",
        "chimera slo check --run latest",
        "chimera report --run latest > benchmarks.md",
    ]
