"""Verdicts on a run from result files alone: what counts as evidence, exit codes, ladder, plan, and a light start."""

import json
import math
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import (
    ALIVE,
    CPU,
    FLICKR,
    GPU,
    LAW,
    RECALL,
    SOURCE,
    TOY,
    TOY_PACK,
    TRAINED,
    add_evaluation,
    make_group,
    make_loader,
    make_run,
    make_sanity,
    objective,
    verdicts,
)

from chimera_cli.config import SanityConfig, TrainConfig, load_config
from chimera_cli.errors import UsageError
from chimera_cli.runs import create_group, read_json, update_group, write_json, write_sealed_json, write_text
from chimera_cli.services.slo import check, default_slo_path, load_slos
from chimera_cli.services.slo_history import history
from chimera_cli.services.slo_plan import plan
from chimera_cli.slo.contingency import resolve


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs made by hand are of the source code that checks them."""
    monkeypatch.setattr("chimera_cli.services.slo.source_hash", lambda: SOURCE)


# ---- the five laws --------------------------------------------------------------------------------------------------


def test_a_run_on_a_cpu_meets_the_law_under_its_profile_and_says_what_is_left_out(tmp_path: Path) -> None:
    make_run(tmp_path)
    result = check(tmp_path, slo_path=LAW, profile="cpu")
    assert verdicts(result) == {"loader": "pass", "sanity": "pass", "epoch": "pass", "viability": "pass"}
    assert (result["verdict"], result["exit_code"]) == ("pass", 0)
    assert result["left_out"] == ["gpu_util_mean", "vram_peak_gb"]
    assert result["remarks"] == ["profile cpu: GPU utilisation, peak VRAM allocated left out"]
    assert result["figures"]["loader_images_per_s"] == 900.0
    assert objective(result, "viability")["files"] == [
        f"runs/{result['run']}/seed-{seed}/evaluations/flickr8k-dev.json" for seed in range(3)
    ]
    json.dumps(result, allow_nan=False)


def test_without_a_gpu_the_whole_law_is_not_measurable(tmp_path: Path) -> None:
    make_run(tmp_path)
    result = check(tmp_path, slo_path=LAW)
    assert verdicts(result) == {
        "loader": "unmeasured", "sanity": "pass", "epoch": "pass", "vram": "unmeasured", "viability": "pass",
    }  # fmt: skip
    assert result["exit_code"] == 4
    assert objective(result, "vram")["reason"] == "needs a GPU, this run was made on a CPU"
    assert objective(result, "vram")["measure"] is None


def test_a_run_on_a_gpu_meets_the_whole_law(tmp_path: Path) -> None:
    make_run(tmp_path, GPU)
    result = check(tmp_path, slo_path=LAW)
    assert set(verdicts(result)) == {"loader", "sanity", "epoch", "vram", "viability"}
    assert (result["verdict"], result["exit_code"], result["left_out"], result["remarks"]) == ("pass", 0, [], [])


@pytest.mark.parametrize(
    ("law", "figure", "met", "missed"),
    [
        ("loader", "gpu_util_mean", 0.85, 0.8499),
        ("sanity", "loss_drop", 0.15, 0.1499),
        ("sanity", "loss_tail_mean", math.log(32) - 0.15, math.log(32) - 0.1499),
        ("sanity", "wall_s", 1500.0, 1500.1),
        ("epoch", "epoch_10k_pairs_s", 10800.0, 10800.1),
        ("vram", "vram_peak_gb", 7.5, 7.501),
        ("viability", "i2t_r10", 0.25, 0.2499),
        ("viability", "t2i_r10", 0.25, 0.2499),
        ("viability", "i2t_r1", 0.05, 0.0499),
        ("viability", "t2i_r1", 0.05, 0.0499),
    ],
)
def test_each_limit_is_exact(tmp_path: Path, law: str, figure: str, met: float, missed: float) -> None:
    group = make_run(tmp_path, GPU)
    for value, verdict, code in ((met, "pass", 0), (missed, "fail", 3)):
        if law == "loader":
            make_loader(tmp_path, hardware=GPU, **{figure: value})
        elif law == "sanity":
            make_sanity(tmp_path, hardware=GPU, **{figure: value})
        for seed in range(3):
            if law == "viability":
                add_evaluation(group, seed, figures=RECALL | {figure: value})
            elif law in ("epoch", "vram"):
                path = group.seed_dir(seed) / "result.json"
                write_sealed_json(path, read_json(path) | {"figures": TRAINED | {figure: value}})
        result = check(tmp_path, slo_path=LAW)
        others = {name: word for name, word in verdicts(result).items() if name != law}
        assert verdicts(result)[law] == verdict
        assert set(others.values()) == {"pass"}
        assert result["exit_code"] == code


def test_the_worst_seed_counts_for_time_and_memory(tmp_path: Path) -> None:
    group = make_run(tmp_path, GPU)
    path = group.seed_dir(1) / "result.json"
    write_sealed_json(path, read_json(path) | {"figures": TRAINED | {"vram_peak_gb": 8.0}})
    found = objective(check(tmp_path, slo_path=LAW), "vram")
    assert (found["verdict"], found["conditions"][0]["value"]) == ("fail", 8.0)
    assert found["measured"] == "6.33 ± 1.44 GiB (n=3), worst 8.00 GiB"


def test_an_interval_across_the_limit_is_inconclusive_and_strict_minds(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    for seed, value in enumerate((0.20, 0.25, 0.31)):
        add_evaluation(group, seed, figures=RECALL | {"i2t_r10": value})
    assert check(tmp_path, slo_path=LAW, profile="cpu")["exit_code"] == 0
    result = check(tmp_path, slo_path=LAW, profile="cpu", strict=True)
    assert (verdicts(result)["viability"], result["exit_code"]) == ("inconclusive", 4)


def test_a_breach_outranks_what_is_unmeasured(tmp_path: Path) -> None:
    make_run(tmp_path, epoch_10k_pairs_s=20000.0)
    result = check(tmp_path, slo_path=LAW)
    assert {"fail", "unmeasured"} <= set(verdicts(result).values())
    assert (result["verdict"], result["exit_code"]) == ("fail", 3)


# ---- evidence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (
            {"pack": FLICKR | {"fingerprint": "0" * 64}},
            "with another pack (flickr8k 00000000 instead of flickr8k ffffffff)",
        ),
        ({"hardware": CPU | {"cores": 4}}, "on other hardware (cores 4 instead of 2)"),
        ({"source": "0" * 64}, "with another state of the source code (00000000 instead of 55555555)"),
    ],
)
def test_evidence_of_another_pack_machine_or_source_does_not_count(
    tmp_path: Path, difference: dict[str, Any], words: str
) -> None:
    group = make_group(tmp_path, "train", [TRAINED] * 3)
    for seed in range(3):
        add_evaluation(group, seed)
    make_loader(tmp_path)
    other = make_group(tmp_path, "sanity", [ALIVE], details={"updates": 200, "shuffled": False}, **difference)
    result = check(tmp_path, slo_path=LAW, profile="cpu")
    assert verdicts(result) == {"loader": "pass", "sanity": "unmeasured", "epoch": "pass", "viability": "pass"}
    assert objective(result, "sanity")["reason"] == f"the newest sanity run, {other.name}, was made {words}"
    assert objective(result, "sanity")["measure"] == "chimera train sanity --seed 0 --data flickr8k"
    assert result["exit_code"] == 4


def test_the_newest_finished_evidence_counts_and_controls_never_do(tmp_path: Path) -> None:
    make_run(tmp_path)
    make_sanity(tmp_path, loss_drop=0.1)
    newest = make_sanity(tmp_path, loss_drop=0.9)
    unfinished = make_sanity(tmp_path, loss_drop=0.0)
    update_group(unfinished, status="failed")
    make_sanity(tmp_path, loss_drop=0.0, details={"shuffled": True})
    make_sanity(tmp_path, loss_drop=0.0, details={"updates": 20})
    found = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "sanity")
    assert (found["verdict"], found["run"], found["conditions"][0]["value"]) == ("pass", newest.name, 0.9)


def test_a_loader_without_the_training_step_proves_nothing_about_the_gpu(tmp_path: Path) -> None:
    make_run(tmp_path, GPU)
    for path in tmp_path.glob("runs/bench-loader-*"):
        shutil.rmtree(path)
    make_loader(tmp_path, hardware=GPU, details={"config": None})
    found = objective(check(tmp_path, slo_path=LAW), "loader")
    assert (found["verdict"], "training step" in found["reason"]) == ("unmeasured", True)
    wanted = "chimera bench loader --data flickr8k --config configs/train/locked.yaml --seconds 60"
    assert found["measure"] == wanted


def test_another_data_set_too_few_seeds_and_gaps_are_unmeasured(tmp_path: Path) -> None:
    toy = make_run(tmp_path / "toy", pack=TOY_PACK)
    found = objective(check(tmp_path / "toy", toy.name, LAW, "cpu"), "viability")
    assert (found["verdict"], "trained on toy" in found["reason"]) == ("unmeasured", True)
    group = make_run(tmp_path)
    one = objective(check(tmp_path, f"{group.name}/seed-1", LAW, "cpu"), "viability")
    assert (one["verdict"], one["reason"].startswith("3 seeds are needed")) == ("unmeasured", True)
    path = add_evaluation(group, 2, images=300)
    assert "has 300 images" in objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")["reason"]
    path.unlink()
    missing = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")
    assert "seed 2 of" in missing["reason"]
    assert missing["measure"] == f"chimera eval --run {group.name} --split dev"


def test_a_null_figure_is_unmeasured_and_never_a_pass(tmp_path: Path) -> None:
    make_run(tmp_path)
    make_sanity(tmp_path, wall_s=None)
    assert verdicts(check(tmp_path, slo_path=LAW, profile="cpu"))["sanity"] == "unmeasured"
    make_sanity(tmp_path, wall_s=None, loss_drop=0.0)
    assert verdicts(check(tmp_path, slo_path=LAW, profile="cpu"))["sanity"] == "fail"


def test_an_evaluation_of_another_checkpoint_or_pack_content_is_stale(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    path = group.seed_dir(0) / "result.json"
    write_sealed_json(path, read_json(path) | {"details": {"best_step": 120}})
    add_evaluation(group, 0, checkpoint_step=96)
    found = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")
    assert (found["verdict"], "at step 96" in found["reason"]) == ("unmeasured", True)
    add_evaluation(group, 0, pack={"name": "flickr8k", "fingerprint": "0" * 64})
    assert "another content" in objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")["reason"]


def test_seeds_of_different_recipes_are_no_experiment(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    write_text(group.seed_dir(2) / "config.yaml", yaml.safe_dump(TrainConfig(batch=64).model_dump()))
    result = check(tmp_path, slo_path=LAW, profile="cpu")
    assert (verdicts(result)["epoch"], verdicts(result)["viability"]) == ("unmeasured", "unmeasured")
    assert "different configs" in objective(result, "epoch")["reason"]


@pytest.mark.parametrize(
    ("name", "laws"),
    [
        ("group.json", {"epoch", "viability"}),
        ("seed-1/result.json", {"epoch", "viability"}),
        ("seed-1/evaluations/flickr8k-dev.json", {"viability"}),
    ],
)
def test_a_file_edited_by_hand_is_no_evidence_until_it_is_made_anew(tmp_path: Path, name: str, laws: set[str]) -> None:
    group = make_run(tmp_path)
    path = group.path / name
    whole = path.read_text(encoding="utf-8")
    # As an editor would save it: another layout is no edit, another figure is.
    path.write_text(json.dumps(json.loads(whole), indent=4, sort_keys=True), encoding="utf-8")
    assert check(tmp_path, group.name, LAW, "cpu")["verdict"] == "pass"
    for old, new in ((": 1,", ": 0,"), ('"sha256"', '"sha512"')):
        path.write_text(whole.replace(old, new, 1), encoding="utf-8")
        result = check(tmp_path, group.name, LAW, "cpu")
        assert {law for law, verdict in verdicts(result).items() if verdict == "unmeasured"} == laws
        words = "was edited after it was written (its hash no longer matches)"
        if "sha512" in new:
            words = "was written by an older chimera or edited (it has no seal)"
        for law in laws:
            assert objective(result, law)["reason"] == f"runs/{group.name}/{name} {words}"
    measure = f"chimera eval --run {group.name} --split dev" if "dev" in name else group.facts["command"]
    assert objective(result, "viability")["measure"] == measure


def test_a_change_of_an_edited_group_does_not_seal_the_edit(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    path = group.path / "group.json"
    write_json(path, read_json(path) | {"hardware": GPU})
    update_group(group, label="renamed")
    found = objective(check(tmp_path, group.name, LAW, "cpu"), "epoch")
    assert (found["verdict"], "was edited" in found["reason"]) == ("unmeasured", True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema_version": 1, "figures"', "is not valid JSON"),
        ('{"schema_version": 99}', "has schema version 99, this chimera reads up to 1"),
        ("[1, 2]", "holds no JSON object"),
        ("", "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["seed-1/result.json", "seed-1/evaluations/flickr8k-dev.json"])
def test_a_file_that_cannot_be_read_is_missing_evidence_that_names_it(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    group = make_run(tmp_path)
    (group.path / name).write_text(text, encoding="utf-8")
    result = check(tmp_path, slo_path=LAW, profile="cpu")
    reason = objective(result, "viability")["reason"]
    assert reason.startswith(f"runs/{group.name}/{name} {words}")
    assert (verdicts(result)["viability"], verdicts(result)["sanity"], result["exit_code"]) == ("unmeasured", "pass", 4)


@pytest.mark.parametrize(
    "facts", [{"figures": [1]}, {"figures": None}, {"details": "x"}, {"made_with": 3}, {"seed": []}]
)
def test_a_sealed_file_of_another_shape_crashes_nothing(tmp_path: Path, facts: dict[str, Any]) -> None:
    group = make_run(tmp_path)
    for path in (group.seed_dir(0) / "result.json", group.seed_dir(0) / "evaluations" / "flickr8k-dev.json"):
        write_sealed_json(path, read_json(path) | facts)
    assert check(tmp_path, slo_path=LAW, profile="cpu")["run"] == group.name


def test_a_group_of_another_shape_crashes_nothing(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    changes = {"pack": "a pack", "hardware": [2], "plan": {"before": 1}, "command": None, "test_looks": "two"}
    for name, value in changes.items():
        update_group(group, **{name: value})
        assert check(tmp_path, slo_path=LAW, profile="cpu")["run"] == group.name
        plan(tmp_path, slo_path=LAW, profile="cpu")


def test_a_run_in_progress_is_unmeasured_and_to_be_waited_for(tmp_path: Path) -> None:
    facts = {"pack": FLICKR, "hardware": CPU, "source_hash": SOURCE, "command": "chimera train full --config a.yaml"}
    group = create_group(tmp_path, "train", "running", [0, 1, 2], facts)
    found = objective(check(tmp_path, group.name, LAW, "cpu"), "epoch")
    assert (found["verdict"], found["reason"]) == ("unmeasured", f"{group.name} is not finished but running")
    assert found["measure"] == f"chimera runs show {group.name}"
    # Its process has gone without a word.
    update_group(group, pid=2**22 + 1)
    again = objective(check(tmp_path, group.name, LAW, "cpu"), "epoch")
    assert again["measure"] == "chimera train full --config a.yaml --seeds 0,1,2"


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        ({"source_hash": "0" * 64}, "with another state of the source code (00000000 instead of 55555555)"),
        ({"config_hash": "1" * 64}, "with another config (11111111 instead of unknown)"),
        ({"pack": TOY_PACK}, "with another pack (toy tttttttt instead of flickr8k ffffffff)"),
        ({"hardware": CPU | {"cores": 8}}, "on other hardware (cores 8 instead of 2)"),
        ({"stream": {"digest": "d" * 64}}, "from a stream instead of the pack"),
    ],
)
def test_a_result_put_into_another_group_is_noticed(tmp_path: Path, fact: dict[str, Any], words: str) -> None:
    group = make_run(tmp_path)
    path = group.seed_dir(2) / "result.json"
    made = {"pack": FLICKR, "config_hash": None, "source_hash": SOURCE, "hardware": CPU}
    write_sealed_json(path, read_json(path) | {"made_with": made})
    assert check(tmp_path, slo_path=LAW, profile="cpu")["verdict"] == "pass"
    write_sealed_json(path, read_json(path) | {"made_with": made | fact})
    reason = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "epoch")["reason"]
    assert reason == f"seed 2 of {group.name} was made {words}: its result is no part of this group"


def test_a_result_of_another_seed_and_evaluations_by_different_code_are_not_averaged(tmp_path: Path) -> None:
    # A group that does not say which code trained it: its evaluations have to agree among themselves.
    group = make_run(tmp_path)
    update_group(group, source_hash=None)
    for seed in range(3):
        path = group.seed_dir(seed) / "evaluations" / "flickr8k-dev.json"
        write_sealed_json(path, {key: value for key, value in read_json(path).items() if key != "made_with"})
    for seed, source in enumerate(("a" * 64, "a" * 64, "b" * 64)):
        add_evaluation(group, seed, source_hash=source, made_with=None)
    reason = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")["reason"]
    assert reason == f"seeds 0 and 2 of {group.name} were evaluated by different source code (aaaaaaaa and bbbbbbbb)"
    shutil.copy(group.seed_dir(0) / "result.json", group.seed_dir(1) / "result.json")
    reason = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "epoch")["reason"]
    assert reason == f"the result of seed 1 of {group.name} is that of seed 0"


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({}, "is that of a seed of {other}"),
        ({"pack": FLICKR | {"fingerprint": "0" * 64}}, "is that of a seed of {other}"),
    ],
)
def test_evaluations_copied_from_another_group_are_no_evidence(
    tmp_path: Path, difference: dict[str, Any], words: str
) -> None:
    other = make_group(tmp_path, "train", [TRAINED] * 3, **difference)
    group = make_run(tmp_path)
    for seed in range(3):
        path = add_evaluation(other, seed)
        shutil.copy(path, group.seed_dir(seed) / "evaluations" / path.name)
    found = objective(check(tmp_path, group.name, LAW, "cpu"), "viability")
    assert (found["verdict"], found["measure"]) == ("unmeasured", f"chimera eval --run {group.name} --split dev")
    assert found["reason"] == f"the evaluation of seed 0 of {group.name} {words.format(other=other.name)}"


def test_an_evaluation_of_another_state_of_the_group_or_another_seed_is_no_evidence(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    made = {"pack": FLICKR, "config_hash": "1" * 64, "source_hash": SOURCE, "hardware": CPU}
    add_evaluation(group, 1, made_with=made)
    reason = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")["reason"]
    assert reason == (
        f"the evaluation of seed 1 of {group.name} is of a run made with another config (11111111 instead of unknown): "
        "it is no part of this group"
    )
    shutil.copy(add_evaluation(group, 0), add_evaluation(group, 1))
    reason = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")["reason"]
    assert reason == f"the evaluation of seed 1 of {group.name} is that of seed 0"


def test_evaluations_by_other_code_than_the_training_are_unmeasured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_run(tmp_path)
    for seed in range(3):
        add_evaluation(group, seed, source_hash="e" * 64)
    found = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")
    assert (found["verdict"], found["reason"]) == (
        "unmeasured",
        f"seed 0 of {group.name} was evaluated by another state of the source code than it was trained with (eeeeeeee "
        "instead of 55555555): train again, or evaluate with the code that trained it",
    )
    # This code did not train it either: evaluating again would be refused again.
    assert found["measure"] == group.facts["command"]
    monkeypatch.setattr("chimera_cli.slo.evidence.source_hash", lambda: SOURCE)
    again = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")
    assert again["measure"] == f"chimera eval --run {group.name} --split dev"


def test_the_command_for_more_seeds_keeps_file_and_profile(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    found = objective(check(tmp_path, f"{group.name}/seed-1", LAW, "cpu"), "viability")
    assert found["measure"] == f"chimera slo check --run {group.name} --slo configs/slo.yaml --profile cpu"


def test_shipped_files_are_named_and_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, pack=TOY_PACK)
    monkeypatch.chdir(tmp_path)
    for result in (
        check(tmp_path, slo_path=Path("configs/slo-toy.yaml"), profile="cpu"),
        history(tmp_path, slo_path=TOY),
    ):
        assert result["slo"] == "configs/slo-toy.yaml"
        assert "not the law: configs/slo-toy.yaml checks the plumbing alone" in result["remarks"]
    assert check(tmp_path, profile="cpu")["slo"] == "configs/slo.yaml"
    with pytest.raises(UsageError, match=r"^configs/absent\.yaml does not exist"):
        load_slos(Path("configs/absent.yaml"))


def test_each_figure_names_its_run_and_files(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    add_evaluation(group, 1, figures=RECALL | {"i2t_r10": 0.75})
    condition = objective(check(tmp_path, slo_path=LAW, profile="cpu"), "viability")["conditions"][0]
    assert condition["sources"] == [
        {"seed": seed, "run": group.name, "value": value,
         "file": f"runs/{group.name}/seed-{seed}/evaluations/flickr8k-dev.json"}
        for seed, value in enumerate((0.72, 0.75, 0.72))
    ]  # fmt: skip
    # 0.73 -+ 4.3027 * 0.017321 / sqrt(3)
    assert condition["interval"] == pytest.approx([0.68697, 0.77303], abs=1e-5)
    assert (condition["measured"], condition["interval_words"]) == ("73.0 ± 1.7 % (n=3)", "68.7 to 77.3 %")


def test_the_command_names_the_run_that_was_checked(tmp_path: Path) -> None:
    old = make_run(tmp_path)
    make_run(tmp_path)
    result = check(tmp_path, f"{old.name}/seed-1", LAW, "cpu")
    assert result["command"] == f"chimera slo check --run {old.name}/seed-1 --slo configs/slo.yaml --profile cpu"
    elsewhere = tmp_path / "configs" / "slo.yaml"
    write_text(elsewhere, LAW.read_text(encoding="utf-8"))
    assert check(tmp_path, old.name, elsewhere)["command"] == f"chimera slo check --run {old.name} --slo {elsewhere}"


def test_only_train_runs_are_judged(tmp_path: Path) -> None:
    sanity = make_sanity(tmp_path)
    with pytest.raises(UsageError, match="is a sanity run"):
        check(tmp_path, sanity.name, LAW)
    with pytest.raises(UsageError, match="no finished train run"):
        check(tmp_path, slo_path=LAW)
    with pytest.raises(UsageError, match="no profile 'tpu'"):
        check(tmp_path, slo_path=LAW, profile="tpu")


@pytest.mark.parametrize(
    ("waiver", "message"),
    [
        ({"objective": "epoc"}, "a waiver names epoc, which is no objective (did you mean epoch?)"),
        ({"owner": " "}, "owner: must not be empty"),
        ({"reason": None}, "reason"),
        ({"owner": ...}, "waivers.0.owner: field required"),
        ({"expires": 20300131}, "must be a date such as 2030-01-31"),
        ({"expires": "soon"}, "expires"),
        ({"until": "2030-01-31"}, "until is an unknown key"),
        ({"bound": float("nan")}, "must be a finite number"),
        ({"bound": 9000}, "the bound 9000 on epoch_10k_pairs_s excuses nothing, its limit is 10800"),
        ({"bound": {"wall_s": 20000}}, "the bound on epoch names wall_s (there are epoch_10k_pairs_s)"),
        ({"objective": "viability", "bound": 0.2}, "has to say of which figure: {i2t_r1: 0.2}"),
        ({"objective": "viability", "bound": {"i2t_r1O": 0.2}}, "names i2t_r1O (did you mean i2t_r1?)"),
        ({"objective": "viability", "bound": {"i2t_r10": 0.3}}, "excuses nothing, its limit is 0.25"),
    ],
)
def test_a_waiver_that_says_nothing_is_refused(tmp_path: Path, waiver: dict[str, Any], message: str) -> None:
    whole = {"objective": "epoch", "owner": "an owner", "reason": "slow disk", "expires": date(2030, 1, 31)} | waiver
    path = tmp_path / "waived.yaml"
    document = yaml.safe_load(LAW.read_text(encoding="utf-8"))
    given = {key: value for key, value in whole.items() if value is not ...}
    path.write_text(yaml.safe_dump(document | {"waivers": [given]}), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_slos(path)
    assert message in caught.value.message


# ---- waivers, toy, ladder -------------------------------------------------------------------------------------------


def waived(tmp_path: Path, expires: str, **more: Any) -> Path:
    document = yaml.safe_load(LAW.read_text(encoding="utf-8"))
    waiver = {"objective": "epoch", "owner": "an owner", "reason": "slow disk", "expires": expires} | more
    path = tmp_path / "waived.yaml"
    path.write_text(yaml.safe_dump(document | {"waivers": [waiver]}), encoding="utf-8")
    return path


def test_a_waiver_holds_until_its_last_day_and_then_breaches(tmp_path: Path) -> None:
    make_run(tmp_path, epoch_10k_pairs_s=20000.0)
    path = waived(tmp_path, "2030-01-31")
    held = check(tmp_path, slo_path=path, profile="cpu", today=date(2030, 1, 31))
    assert (verdicts(held)["epoch"], held["exit_code"]) == ("waived", 0)
    assert "an owner: slow disk" in objective(held, "epoch")["reason"]
    expired = check(tmp_path, slo_path=path, profile="cpu", today=date(2030, 2, 1))
    assert (verdicts(expired)["epoch"], expired["exit_code"]) == ("fail", 3)


def test_a_waiver_holds_down_to_its_bound_and_is_listed_in_every_state(tmp_path: Path) -> None:
    group = make_run(tmp_path, epoch_10k_pairs_s=20000.0)
    today = date(2030, 1, 1)
    for bound, state, code in ((20000, "in force", 0), (19999, "beyond its bound", 3)):
        path = waived(tmp_path, "2030-01-31", bound=bound)
        result = check(tmp_path, slo_path=path, profile="cpu", today=today)
        assert [one["state"] for one in result["waivers"]] == [state]
        assert (result["exit_code"], result["waivers"][0]["bound"]) == (code, {"epoch_10k_pairs_s": bound})
        assert objective(result, "epoch")["waiver"] == result["waivers"][0]
    other = check(tmp_path, slo_path=waived(tmp_path, "2030-01-31", objective="vram"), profile="cpu", today=today)
    assert other["waivers"][0]["state"] == "not judged under this profile"
    (group.seed_dir(1) / "result.json").unlink()
    gap = check(tmp_path, slo_path=waived(tmp_path, "2030-01-31"), profile="cpu", today=today)
    assert (verdicts(gap)["epoch"], gap["waivers"][0]["state"], gap["exit_code"]) == ("unmeasured", "no evidence", 4)
    assert objective(gap, "epoch")["reason"].endswith("covers a breach, not missing evidence")


def test_the_toy_file_is_headed_not_the_law_everywhere(tmp_path: Path) -> None:
    make_run(tmp_path, pack=TOY_PACK)
    result = check(tmp_path, slo_path=TOY, profile="cpu")
    assert (set(verdicts(result).values()), result["law"], result["exit_code"]) == ({"pass"}, False, 0)
    for output in (result, plan(tmp_path, slo_path=TOY, profile="cpu")):
        assert output["remarks"][0].startswith("not the law")


def test_the_ladder_stands_only_beside_test_figures_of_flickr8k(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    assert check(tmp_path, slo_path=LAW, profile="cpu")["ladder"] is None
    between = {"i2t_r1": 0.2, "i2t_r5": 0.5, "i2t_r10": 0.62, "t2i_r1": 0.2, "t2i_r5": 0.46, "t2i_r10": 0.61}
    for seed in range(3):
        add_evaluation(group, seed, "test", figures=between)
    ladder = check(tmp_path, slo_path=LAW, profile="cpu")["ladder"]
    assert ladder["next"]["id"] == "cca"
    assert ladder["gaps"]["i2t_r1"] == pytest.approx(-0.026)
    assert ladder["gaps"]["i2t_r5"] == pytest.approx(0.012)
    add_evaluation(group, 1, "test", images=500)
    assert check(tmp_path, slo_path=LAW, profile="cpu")["ladder"] is None


# ---- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LAW, TOY], ids=lambda path: path.name)
def test_shipped_actions_set_keys_that_exist(path: Path) -> None:
    models = {"train": TrainConfig, "sanity": SanityConfig}
    for one in load_slos(path).objectives:
        for action in one.actions:
            if action.keys:
                values = resolve(action, models[one.kind]().model_dump())
                assert values.keys() == set(action.keys)
                load_config(models[one.kind], None, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def test_the_law_has_its_five_ids_and_a_contingency_for_each() -> None:
    law = load_slos(LAW)
    assert law.law
    assert {one.id for one in law.objectives} == {"loader", "sanity", "epoch", "vram", "viability"}
    assert all(one.actions for one in law.objectives)
    assert default_slo_path().resolve() == LAW.resolve()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("figure: gpu_util_mean", "figure: gpu_util", "did you mean gpu_util_mean"),
        ("limit: 0.85", "limit: .nan", "must be a finite number"),
        ("limit: 0.85", "limit: .inf", "must be a finite number"),
        ("limit: 0.85", "limit: yes", "must be a number"),
        ("limit: 0.85", "limt: 0.85", "limt is an unknown key"),
        ('comparison: ">=", limit: 0.85', 'comparison: "<=", limit: 0.85', "would reward the worse side"),
        ("profiles: [cpu]", "profiles: [gpu]", "an objective is there twice: loader"),
        ("split: dev", "split: holdout", "split"),
        ("{text.learn_layers: 0}", "{text.learn_layer: 0}", "learn_layer is an unknown key"),
        ("--device {device}", "--device {gadget}", "{gadget} is no placeholder"),
        ("--device {device}", "--device {device:>9}", "the placeholder {device} takes no format and no conversion"),
        ("--device {device}", "--device {device!r}", "the placeholder {device} takes no format and no conversion"),
        ("scale: {batch: 2}", "scale: {batch: 0}", "scale.batch"),
        ("scale: {batch: 2}", "scale: {precision: 2}", "scale: precision is no number to be multiplied"),
        ("scale: {batch: 2}", "scale: {batch: 2}\n        set: {batch: 3}", "batch is changed in two ways"),
        ("at_most: {text.learn_layers: 2}", "at_most: {text.learn_layer: 2}", "learn_layer is an unknown key"),
        ("at_least: {loss.temperature: 0.2}", "at_least: {loss.temperature: .nan}", "must be a finite number"),
        ("schema_version: 1", "schema_version: 2", "schema_version"),
        ("limit: 0.85", "limit: 1" + "0" * 400, "must be a finite number"),
        ("limit: 0.85", "limit: 0.85, statistic: bound95", "bound95 of gpu_util_mean needs an interval"),
        ("limit: 0.85", "limit: 0.85, statistic: median", "statistic"),
        ("seeds_at_least: 3", "seeds_at_least: -3", "seeds_at_least"),
        ("do: Read larger batches.", "do: Read larger batches.\n        undo: no", "undo is an unknown key"),
        ("do: Read larger batches.", "do: Read larger batches.\n        set: {batch: 1}", "either `set` or `command`"),
    ],
)
def test_a_broken_law_is_refused_by_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = LAW.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "slo.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_slos(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "unmeasured"),
    [
        ("runs/sanity-*", {"sanity"}),
        ("runs/bench-loader-*", {"loader"}),
        ("runs/train-*/seed-1/evaluations", {"viability"}),
        ("runs/train-*/seed-2", {"epoch", "viability"}),
    ],
)
def test_taking_evidence_away_makes_exactly_its_laws_unmeasured(
    tmp_path: Path, gone: str, unmeasured: set[str]
) -> None:
    make_run(tmp_path)
    for path in tmp_path.glob(gone):
        shutil.rmtree(path)
    found = verdicts(check(tmp_path, slo_path=LAW, profile="cpu"))
    assert {law for law, verdict in found.items() if verdict == "unmeasured"} == unmeasured
    assert {verdict for law, verdict in found.items() if law not in unmeasured} == {"pass"}


def test_checking_imports_nothing_heavy(tmp_path: Path) -> None:
    make_run(tmp_path)
    code = f"""
import sys
from pathlib import Path
import chimera_cli.cli.slo
from chimera_cli.services.slo import check
from chimera_cli.services.slo_explain import explain_objective
from chimera_cli.services.slo_formats import FORMATS
from chimera_cli.services.slo_plan import plan
home, law = Path({str(tmp_path)!r}), Path({str(LAW)!r})
plan(home, slo_path=law)
explain_objective(home, "viability", slo_path=law)
for form in FORMATS.values():
    form(check(home, slo_path=law))
heavy = {{"torch", "timm", "transformers", "mlflow", "pandas", "scipy", "pyarrow", "matplotlib", "numpy"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
