"""Verdicts on a run from result files alone: what counts as evidence, exit codes, ladder, plan, and a light start."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from chimera_cli.config import SanityConfig, TrainConfig, load_config
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.runs import (
    Group,
    create_group,
    finish_group,
    read_json,
    source_hash,
    update_group,
    write_json,
    write_text,
)
from chimera_cli.services.slo import check, default_slo_path, load_slos, plan

CONFIGS = Path(__file__).parents[2] / "configs"
LAW, TOY = CONFIGS / "slo.yaml", CONFIGS / "slo-toy.yaml"

CPU = {"device": "cpu", "cpu": "a processor", "cores": 2, "gpu": None}
GPU = {"device": "cuda", "cpu": "a processor", "cores": 8, "gpu": "GeForce GTX 1080"}
FLICKR = {"name": "flickr8k", "fingerprint": "f" * 64, "source": "flickr8k"}
TOY_PACK = {"name": "toy", "fingerprint": "t" * 64, "source": "toy"}

TRAINED = {
    "epoch_10k_pairs_s": 900.0,
    "epoch_10k_pairs_cached_s": 20.0,
    "vram_peak_gb": 5.5,
    "vram_reserved_peak_gb": 6.0,
}
ALIVE = {"loss_first": 3.5, "loss_drop": 1.2, "loss_tail_mean": 2.1, "chance_loss": math.log(32), "wall_s": 150.0}
LOADED = {"loader_images_per_s": 900.0, "gpu_util_mean": 0.93, "wall_s": 61.0}
RECALL = {"i2t_r1": 0.31, "i2t_r5": 0.6, "i2t_r10": 0.72, "t2i_r1": 0.23, "t2i_r5": 0.52, "t2i_r10": 0.66, "rsum": 3.04}


def make_group(
    home: Path,
    kind: str,
    figures: Sequence[Mapping[str, Any]],
    *,
    pack: Mapping[str, Any] = FLICKR,
    hardware: Mapping[str, Any] = CPU,
    source: str | None = None,
    details: Mapping[str, Any] | None = None,
    command: str = "chimera train full --config configs/train/locked.yaml --seeds 0,1,2",
    config: Mapping[str, Any] | None = None,
) -> Group:
    """Write a finished group with one result per entry of `figures`."""
    facts = {
        "command": command,
        "pack": dict(pack),
        "hardware": dict(hardware),
        "source_hash": source or source_hash(),
    }
    group = create_group(home, kind, "made", range(len(figures)), facts)
    for seed, values in enumerate(figures):
        write_text(group.seed_dir(seed) / "config.yaml", yaml.safe_dump(dict(config or TrainConfig().model_dump())))
        document = {"schema_version": 1, "kind": kind, "seed": seed, "status": "finished"}
        document |= {"figures": dict(values), "details": dict(details or {})}
        write_json(group.seed_dir(seed) / "result.json", document)
    return finish_group(group, "finished")


def add_evaluation(group: Group, seed: int, split: str = "dev", images: int = 1000, **changes: Any) -> Path:
    pack = {key: group.facts["pack"][key] for key in ("name", "fingerprint")}
    path = group.seed_dir(seed) / "evaluations" / f"{pack['name']}-{split}.json"
    document = {"schema_version": 1, "pack": pack, "split": split, "seed": seed, "images": images, "figures": RECALL}
    write_json(path, document | changes)
    return path


def make_sanity(
    home: Path, pack: Mapping[str, Any] = FLICKR, hardware: Mapping[str, Any] = CPU, **changes: Any
) -> Group:
    details = {"updates": 200, "shuffled": False} | changes.pop("details", {})
    command = "chimera train sanity --seed 0"
    return make_group(
        home, "sanity", [ALIVE | changes], pack=pack, hardware=hardware, details=details, command=command,
        config=SanityConfig().model_dump(),
    )  # fmt: skip


def make_loader(
    home: Path, pack: Mapping[str, Any] = FLICKR, hardware: Mapping[str, Any] = CPU, **changes: Any
) -> Group:
    details = {"seconds": 60.2, "config": "configs/train/locked.yaml"} | changes.pop("details", {})
    command = "chimera bench loader"
    figures = LOADED if hardware is GPU else LOADED | {"gpu_util_mean": None}
    return make_group(
        home, "bench-loader", [figures | changes], pack=pack, hardware=hardware, details=details, command=command
    )


def make_run(home: Path, hardware: Mapping[str, Any] = CPU, pack: Mapping[str, Any] = FLICKR, **changes: Any) -> Group:
    """Write a run of three seeds that meets every law, with its evidence."""
    figures = TRAINED if hardware is GPU else TRAINED | {"vram_peak_gb": None, "vram_reserved_peak_gb": None}
    group = make_group(home, "train", [figures | changes] * 3, hardware=hardware, pack=pack)
    for seed in range(3):
        add_evaluation(group, seed, images=1000 if pack is FLICKR else 300)
    make_sanity(home, pack, hardware)
    make_loader(home, pack, hardware)
    return group


def verdicts(result: Mapping[str, Any]) -> dict[str, str]:
    return {objective["id"]: objective["verdict"] for objective in result["objectives"]}


def objective(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(dict(one) for one in result["objectives"] if one["id"] == name)


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
                write_json(path, read_json(path) | {"figures": TRAINED | {figure: value}})
        result = check(tmp_path, slo_path=LAW)
        others = {name: word for name, word in verdicts(result).items() if name != law}
        assert verdicts(result)[law] == verdict
        assert set(others.values()) == {"pass"}
        assert result["exit_code"] == code


def test_the_worst_seed_counts_for_time_and_memory(tmp_path: Path) -> None:
    group = make_run(tmp_path, GPU)
    path = group.seed_dir(1) / "result.json"
    write_json(path, read_json(path) | {"figures": TRAINED | {"vram_peak_gb": 8.0}})
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
        ({"pack": FLICKR | {"fingerprint": "0" * 64}}, "with another pack"),
        ({"hardware": CPU | {"cores": 4}}, "on other hardware"),
        ({"source": "0" * 64}, "with another state of the source code"),
    ],
)
def test_evidence_of_another_pack_machine_or_source_does_not_count(
    tmp_path: Path, difference: dict[str, Any], words: str
) -> None:
    group = make_group(tmp_path, "train", [TRAINED] * 3)
    for seed in range(3):
        add_evaluation(group, seed)
    make_loader(tmp_path)
    make_group(tmp_path, "sanity", [ALIVE], details={"updates": 200, "shuffled": False}, **difference)
    result = check(tmp_path, slo_path=LAW, profile="cpu")
    assert verdicts(result) == {"loader": "pass", "sanity": "unmeasured", "epoch": "pass", "viability": "pass"}
    assert words in objective(result, "sanity")["reason"]
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
    write_json(path, read_json(path) | {"details": {"best_step": 120}})
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


def test_a_cut_result_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    path = group.seed_dir(1) / "result.json"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(ChimeraError, match=r"seed-1/result\.json is not valid JSON"):
        check(tmp_path, slo_path=LAW, profile="cpu")


def test_only_train_runs_are_judged(tmp_path: Path) -> None:
    sanity = make_sanity(tmp_path)
    with pytest.raises(UsageError, match="is a sanity run"):
        check(tmp_path, sanity.name, LAW)
    with pytest.raises(UsageError, match="no finished train run"):
        check(tmp_path, slo_path=LAW)
    with pytest.raises(UsageError, match="no profile 'tpu'"):
        check(tmp_path, slo_path=LAW, profile="tpu")


# ---- waivers, toy, ladder -------------------------------------------------------------------------------------------


def waived(tmp_path: Path, expires: str) -> Path:
    document = yaml.safe_load(LAW.read_text(encoding="utf-8"))
    waiver = {"objective": "epoch", "owner": "an owner", "reason": "slow disk", "expires": expires}
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


# ---- plan -----------------------------------------------------------------------------------------------------------


def test_the_plan_goes_through_the_contingency_table_step_by_step(tmp_path: Path) -> None:
    changed: dict[str, Any] = TrainConfig().model_dump()
    changed["image"]["locked"] = False
    changed["text"]["learn_layers"] = None
    command = "chimera train full --config configs/train/joint.yaml --seeds 0,1,2 --set epochs=3"
    make_group(tmp_path, "train", [TRAINED | {"epoch_10k_pairs_s": 2e4}] * 3, config=changed, command=command)
    first = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert (first["objective"], first["action"]) == ("epoch", "lock-image-tower")
    assert first["command"] == f"{command} --set image.locked=true"
    assert first["remaining"] == ["lock-text-tower", "smaller-images"]
    changed["image"]["locked"] = True
    make_group(tmp_path, "train", [TRAINED | {"epoch_10k_pairs_s": 2e4}] * 3, config=changed, command=first["command"])
    second = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert second["command"] == f"{command} --set image.locked=true --set text.learn_layers=0"
    changed["text"]["learn_layers"] = 0
    changed["image"]["image_size"] = 160
    make_group(tmp_path, "train", [TRAINED | {"epoch_10k_pairs_s": 2e4}] * 3, config=changed, command=second["command"])
    assert plan(tmp_path, slo_path=LAW, profile="cpu")["step"] == "exhausted"


def test_the_plan_measures_gaps_widens_doubts_and_is_content(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    assert plan(tmp_path, slo_path=LAW, profile="cpu")["step"] == "none"
    for seed, value in enumerate((0.20, 0.25, 0.31)):
        add_evaluation(group, seed, figures=RECALL | {"i2t_r10": value})
    doubt = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert doubt["command"] == "chimera train full --config configs/train/locked.yaml --seeds 0,1,2,3,4"
    add_evaluation(group, 2).unlink()
    gap = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert (gap["step"], gap["command"]) == ("measure", f"chimera eval --run {group.name} --split dev")
    for path in tmp_path.glob("runs/bench-loader-*"):
        shutil.rmtree(path)
    loader = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert loader["command"] == "chimera bench loader --data flickr8k --device cpu"


def test_a_command_that_was_run_is_not_proposed_again(tmp_path: Path) -> None:
    make_run(tmp_path)
    make_loader(tmp_path, loader_images_per_s=200.0)
    first = plan(tmp_path, slo_path=LAW, profile="cpu")["command"]
    assert first == "chimera bench loader --data flickr8k --device cpu --batch 128"
    make_group(
        tmp_path, "bench-loader", [LOADED | {"loader_images_per_s": 250.0}], command=first, details={"seconds": 60}
    )
    assert plan(tmp_path, slo_path=LAW, profile="cpu")["action"] == "smaller-pack"


# ---- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LAW, TOY], ids=lambda path: path.name)
def test_shipped_actions_set_keys_that_exist(path: Path) -> None:
    models = {"train": TrainConfig, "sanity": SanityConfig}
    for one in load_slos(path).objectives:
        for action in one.actions:
            changes = [f"{key}={json.dumps(value)}" for key, value in action.set.items()]
            if changes:
                load_config(models[one.kind], None, changes)


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
        ("schema_version: 1", "schema_version: 2", "schema_version"),
        ("law: true", "law: true\nwaivers: [{objective: speed, owner: a, reason: b, expires: 2030-01-01}]", "speed"),
        ("law: true", "law: true\nwaivers: [{objective: vram, owner: ' ', reason: b, expires: 2030-01-01}]", "owner"),
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
from chimera_cli.services.slo import check, plan
for judge in (check, plan):
    judge(Path({str(tmp_path)!r}), slo_path=Path({str(LAW)!r}))
heavy = {{"torch", "timm", "transformers", "mlflow", "pandas", "scipy", "pyarrow", "matplotlib"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
