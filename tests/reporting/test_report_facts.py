"""What a report says: evidence that fits, missing figures as dashes or commands, the ladder only where it may stand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from chimera_cli.reporting.brief import brief
from chimera_cli.reporting.facts import Curves, collect, newest_like, read_curves, with_problems
from chimera_cli.reporting.markdown import render, render_blocks
from chimera_cli.reporting.plots import draw
from chimera_cli.reporting.retrieval import ladder_rows
from chimera_cli.reporting.sections import build, commands, prepare_command
from chimera_cli.reporting.verdicts import Verdicts, verdicts_of
from chimera_cli.runs import (
    Group,
    create_group,
    finish_group,
    read_json,
    update_group,
    write_json,
    write_sealed_json,
)

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


def rows_after(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table after a line that begins with `heading`, its own heading included."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(heading))
    first = next(place for place in range(start, len(lines)) if lines[place].startswith("|"))
    last = next(place for place in range(first, len(lines)) if not lines[place].startswith("|"))
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines[first:last] if "|:-" not in line]


def test_seeds_stand_one_by_one_with_time_and_memory(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    rows = rows_after(report(tmp_path, new_train_group(tmp_path)), "Seeds one by one")
    assert rows[1] == ["seed 0", "30.0 s", "900.0 pairs/s", "–", "–", "–", "1.60 GiB", "–"]
    assert [row[1] for row in rows[1:]] == ["30.0 s", "31.0 s", "32.0 s"]
    assert [row[6] for row in rows[1:]] == ["1.60 GiB", "1.70 GiB", "1.80 GiB"]


def test_zero_shot_figures_stand_beside_chance(
    tmp_path: Path, new_train_group: Callable[..., Group], evaluate: Callable[..., None]
) -> None:
    group = new_train_group(tmp_path, seeds=(0, 1))
    assert "Zero-shot" not in report(tmp_path, group)
    for seed, top1 in ((0, 0.30), (1, 0.34)):
        guesses = {
            "column": "kind|of",
            "classes": ["a", "b", "c", "d"],
            "templates": ["{}", "a {}"],
            "figures": {"zero_shot_top1": top1, "zero_shot_top5": None},
            "chance": {"zero_shot_top1": 0.25, "zero_shot_top5": None},
        }
        evaluate(group, seed, "dev", 0.0, zero_shot=guesses)
    text = report(tmp_path, group)
    assert "**Zero-shot, flickr8k, dev**: by the column `kind|of`, 4 classes, 2 prompts each." in text
    assert rows_after(text, "**Zero-shot")[1:] == [
        ["zero-shot top-1", "30.0 %", "34.0 %", "32.0 ± 2.8 % (n=2)", "25.0 %"],
        ["zero-shot top-5", "–", "–", "–", "–"],
    ]


def test_peers_stand_beside_ours_and_one_that_failed_says_why(
    tmp_path: Path, new_train_group: Callable[..., Group], new_bench_groups: Callable[..., list[Group]]
) -> None:
    loader = new_bench_groups(tmp_path)[0]
    path = loader.seed_dir(0) / "result.json"
    peers = [
        {"name": "open_clip", "images_per_s": 212.4, "spread": [203.0, 219.5], "failed": None}
        | {"ratio_equal_output": 4.7, "ratio_gather": 161.2, "settings": {"workers": 2, "crop_scale": 0.9}},
        {"name": "webdataset", "images_per_s": None, "spread": None, "failed": "<b>no</b>", "settings": {}}
        | {"ratio_equal_output": None, "ratio_gather": None, "ratio_shards": None},
    ]
    against = {"images": 2000, "width": 500, "height": 375, "mean_kb": 137.2}
    against["ours"] = [{"name": "gather only", "images_per_s": 34000.0, "spread": [33000.0, 35000.0]}]
    result = read_json(path)
    result["details"] |= {"peers": peers, "against": against}
    write_sealed_json(path, result)
    text = report(tmp_path, new_train_group(tmp_path))
    assert "on the same 2,000 JPEGs of 500 x 375 px, 137 KB on average." in text
    assert rows_after(text, "The data loader against peers")[1:] == [
        ["chimera, gather only", "34,000 images/s (33,000 – 35,000)", "–", "–", "–"],
        ["`open_clip`", "212.4 images/s (203.0 – 219.5)", "4.70×", "161×", "workers 2, crop scale 0.9"],
        ["`webdataset`", "–", "–", "–", "failed: \\<b>no\\</b>"],
    ]


def test_benchmarks_that_use_no_gpu_fit_a_run_on_any_card_of_the_machine(
    tmp_path: Path, new_train_group: Callable[..., Group], write_result: Callable[..., None]
) -> None:
    group = new_train_group(tmp_path)
    assert "preparing" not in report(tmp_path, group)
    same = {key: group.facts[key] for key in ("source_hash", "hardware")}
    prepare = create_group(
        tmp_path, "bench-prepare", "", (0,), {**same, "command": "chimera bench prepare", "pack": None}
    )
    details = {"size": 224, "ratio_to_pillow": 1.456}
    details["ceiling"] = {"name": "bare loop, times 2 cores", "share_reached": 0.913}
    write_result(prepare, 0, {"prepare_images_per_s": 812.5, "ram_peak_gb": 0.4}, details)
    recall = create_group(tmp_path, "bench-retrieval", "", (0,), {**same, "command": "chimera bench retrieval"})
    details = {"images": 5000, "captions": 25000, "dim": 512, "ranks_s": 2.345, "ratio": 1.623}
    write_result(recall, 0, {"ram_peak_gb": 0.7}, details | {"extra_memory_gb": 0.255})
    for other in (prepare, recall):
        finish_group(other, "finished")
    update_group(group, hardware={**group.facts["hardware"], "device": "cuda", "gpu": "GTX 1080"})
    group = type(group)(group.path, read_json(group.path / "group.json"))
    text = report(tmp_path, group)
    row = rows_after(text, "Components")[1]
    assert row[0] == "preparing a pack (224 px)"
    assert row[4] == "812.5 images/s"
    assert row[6] == "91.3 % of bare loop, times 2 cores; 1.46× Pillow alone"
    assert rows_after(text, "Tasks")[-1] == [
        "recall of 5,000 images x 25,000 captions, 512 dimensions",
        "2.35 s",
        "1.62× the bare matrix product; 0.26 GiB extra",
    ]
    assert {"chimera bench prepare", "chimera bench retrieval"} <= set(text.splitlines())


def test_contingency_steps_on_the_same_pack_are_listed_oldest_first(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    plan = {"objective": "viability", "action": "learn-text", "slo": "configs/slo.yaml"}
    older = update_group(new_train_group(tmp_path), plan={**plan, "action": "regularise"})
    new_train_group(tmp_path)
    update_group(new_train_group(tmp_path, "toy"), plan=plan)
    group = update_group(new_train_group(tmp_path), plan=plan)
    text = report(tmp_path, group)
    assert "This run takes the contingency step `learn-text` of the objective `viability`." in text
    assert rows_after(text, "Contingency steps")[1:] == [
        ["`regularise`", "`viability`", f"`{older.name}`", "finished", "3.200"],
        ["`learn-text`", "`viability`", f"`{group.name}` (this run)", "finished", "3.200"],
    ]


def test_a_result_that_was_edited_heads_the_report(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    group = new_train_group(tmp_path)
    assert "No evidence" not in report(tmp_path, group)
    path = group.seed_dir(2) / "result.json"
    result = read_json(path)
    result["figures"]["wall_s"] = 1.0
    write_json(path, result)
    first = report(tmp_path, group).splitlines()[2]
    assert first == (
        f"> **No evidence.** `{group.name}/seed-2/result.json` was edited after it was written "
        "(its hash no longer matches)."
    )


@pytest.mark.parametrize("key", ["images", "figures", "pack", "split"])
def test_an_evaluation_that_lacks_what_every_one_has_is_none(
    tmp_path: Path, new_train_group: Callable[..., Group], key: str
) -> None:
    group = new_train_group(tmp_path, seeds=(0,))
    path = group.seed_dir(0) / "evaluations" / "flickr8k-dev.json"
    write_sealed_json(path, {name: value for name, value in read_json(path).items() if name != key})
    text = report(tmp_path, group)
    assert f"> **No evidence.** `{group.name}/seed-0/evaluations/flickr8k-dev.json` holds no {key}." in text
    assert f"Not evaluated: run `chimera eval --run {group.name}`." in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_hash": "6" * 64}, "by different source code (unknown and 66666666)"),
        (
            {"pack": {"name": "flickr8k", "fingerprint": "e" * 64}},
            "on different content of the pack (ffffffff and eeeeeeee)",
        ),
        ({"images": 300}, "on different numbers of images (1000 and 300)"),
    ],
)
def test_seeds_that_were_not_evaluated_alike_have_no_mean(
    tmp_path: Path,
    new_train_group: Callable[..., Group],
    evaluate: Callable[..., None],
    change: dict[str, object],
    words: str,
) -> None:
    group = new_train_group(tmp_path)
    similar = {"edges": [0, 1, 2], "matched": [0, 2], "unmatched": [2, 0]}
    for seed in group.seeds:
        for split in ("dev", "test"):
            evaluate(group, seed, split, 0.0, **{"similarities": similar, **(change if seed == 2 else {})})
    told = f"seeds 0 and 2 were evaluated {words}"
    text = report(tmp_path, group)
    command = f"chimera eval --run {group.name} --split test"
    assert f"> **Not averaged.** flickr8k, test: {told}; run `{command}`." in text
    for row in rows_after(text, "**flickr8k, dev**")[1:]:
        assert row[1] != "–", "each seed's own figures stand"
        assert row[4] == "–"
    facts = collect(tmp_path, group)
    assert ladder_rows(facts) == []
    assert f"no place on the ladder: run `{command}` again." in text
    assert [plot for plot in draw(facts, {}, Curves((), ()), NO_VERDICTS) if plot.section == "retrieval"] == []
    block = render_blocks(brief(facts, NO_VERDICTS))
    assert told in block
    assert "±" not in block.replace("Mean ± sample", "")


def test_a_file_that_is_broken_is_told_where_it_is_ours_and_passed_over_where_it_is_not(
    tmp_path: Path, new_train_group: Callable[..., Group], new_bench_groups: Callable[..., list[Group]]
) -> None:
    new_bench_groups(tmp_path)
    loader = new_bench_groups(tmp_path)[0]
    (loader.seed_dir(0) / "result.json").write_text('{"figures')
    group = new_train_group(tmp_path)
    (group.seed_dir(1) / "result.json").write_text('{"figures')
    (group.seed_dir(0) / "environment.json").write_text("[]")
    (group.seed_dir(2) / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"st\n[1]\n{"step": 2, "loss": "x"}\n')
    facts = collect(tmp_path, group)
    facts = with_problems(facts, read_curves(facts))
    text = render(build(facts, NO_VERDICTS))
    assert f"> **No evidence.** `{group.name}/seed-1/result.json` is not valid JSON: " in text
    assert f"> **No evidence.** `{group.name}/seed-0/environment.json` holds no JSON object." in text
    assert f"> **No evidence.** `{group.name}/seed-2/metrics.jsonl` line 2 is not valid JSON." in text
    assert "No result of seed 1." in text
    assert loader.name not in text
    assert "512.5 images/s" in text, "the older benchmark, which is whole"


def test_a_copied_evaluation_counts_for_no_other_seed_or_split(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    group = new_train_group(tmp_path, seeds=(0, 1))
    dev, other = (group.seed_dir(seed) / "evaluations" / "flickr8k-dev.json" for seed in group.seeds)
    other.write_bytes(dev.read_bytes())
    dev.with_name("flickr8k-test.json").write_bytes(dev.read_bytes())
    (one,) = collect(tmp_path, group).evaluations
    assert (one.split, list(one.by_seed)) == ("dev", [0])
    text = report(tmp_path, group)
    assert "is the evaluation of seed 0 on flickr8k, dev." in text


def test_a_run_trained_from_a_stream_names_it(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    group = update_group(new_train_group(tmp_path), stream={"pattern": "shards/{000..009}.tar", "samples": 9})
    first = report(tmp_path, group).splitlines()[2]
    assert "(0, 1, 2) on the stream `shards/{000..009}.tar`, dev and test of the pack `flickr8k`, finished" in first


@pytest.mark.parametrize(
    ("pack", "command"),
    [
        ({}, ""),
        ({"source": "toy", "name": "toy"}, "chimera data prepare toy"),
        ({"source": "flickr8k", "name": "small"}, "chimera data prepare flickr8k --name small"),
        ({"source": "coco", "name": "coco"}, "chimera data prepare coco --from PATH"),
        ({"source": "table", "name": "a b"}, "chimera data prepare table --from PATH --name 'a b'"),
    ],
)
def test_the_command_that_makes_a_pack_says_from_where(pack: dict[str, str], command: str) -> None:
    assert prepare_command(pack) == command


def test_the_report_is_made_again_with_the_same_law_profile_and_seed(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    group = new_train_group(tmp_path)
    own = f"chimera slo check --run {group.name}/seed-1 --slo 'my law.yaml' --profile cpu"
    check = {"objectives": [], "remarks": [], "law": True, "command": own, "profile": "cpu"}
    assert commands(collect(tmp_path, group, (1,)), verdicts_of(check))[-2:] == [
        "chimera slo check --run latest/seed-1 --slo 'my law.yaml' --profile cpu",
        "chimera report --run latest/seed-1 --slo 'my law.yaml' --profile cpu > benchmarks.md",
    ]


def test_verdicts_carry_intervals_waivers_and_limits() -> None:
    def condition(figure: str, limit: float, **more: object) -> dict[str, object]:
        words = {"law": "law", "measured": "m", "interval_words": "1 to 2"}
        return {"figure": figure, "comparison": ">=", "limit": limit, "relative_to": None, **words, **more}

    objective = {"id": "loader", "title": "fast", "verdict": "waived", "reason": "why", "run": None, "measure": None}
    objective["conditions"] = [
        condition("gpu_util_mean", 0.85),
        condition("loss_tail_mean", -0.15, relative_to="chance_loss"),
    ]
    objective["beside"] = [{"figure": "loader_images_per_s", "target": 300}, {"figure": "rsum", "target": None}]
    check = {"objectives": [objective], "remarks": [], "command": "chimera slo check", "law": True}
    found = verdicts_of(check | {"waivers": [{"words": "loader waived by <b>"}]})
    assert [(row.objective, row.interval) for row in found.rows] == [("loader", "1 to 2"), ("", "1 to 2")]
    assert [limit.label for limit in found.limits] == ["law ≥ 85.0 %", "target ≥ 300.0 images/s"]
    assert found.limit("rsum") is None
    assert found.waivers == ("loader waived by <b>",)
    assert [limit.kind for limit in verdicts_of(check | {"law": False}).limits] == ["limit", "target"]
