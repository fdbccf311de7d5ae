"""The contingency plan: which step is next, what counts as tried, applying a step, and NO-GO when all are spent."""

import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import (
    CPU,
    FLICKR,
    GPU,
    LAW,
    LOADED,
    RECALL,
    TOY,
    TRAINED,
    add_evaluation,
    make_group,
    make_loader,
    make_run,
)

from chimera_cli.config import TrainConfig, load_config, validate
from chimera_cli.errors import UsageError
from chimera_cli.runs import Group, update_group
from chimera_cli.services.provenance import plan_facts
from chimera_cli.services.slo_explain import explain_objective
from chimera_cli.services.slo_plan import find_steps, plan, settings_of
from chimera_cli.slo.contingency import changed, setting

SLOW = [TRAINED | {"epoch_10k_pairs_s": 2e4}] * 3
LOCKED = {
    "image.locked": True,
    "image.learn_blocks": 0,
    "augmentation.crop_scale": 1.0,
    "augmentation.colour_jitter": 0,
    "augmentation.views": 1,
}
COMMAND = "chimera train full --config configs/train/joint.yaml --seeds 0,1,2 --set image.locked=false"


def joint(**changes: Any) -> dict[str, Any]:
    """A config of which no step of the epoch's plan holds."""
    values = TrainConfig(image={"locked": False}, text={"learn_layers": None}).model_dump()
    return values | changes


def take(home: Path, step: dict[str, Any], seconds: float = 2e4, **changes: Any) -> Group:
    """Make the run that the command of a step would leave."""
    command = str(step["command"])
    group = make_group(home, "train", [TRAINED | {"epoch_10k_pairs_s": seconds}] * 3, command=command, **changes)
    return update_group(group, plan=plan_facts(command))


def test_the_plan_goes_through_the_contingency_table_step_by_step(tmp_path: Path) -> None:
    make_group(tmp_path, "train", SLOW, config=joint(), command=COMMAND)
    first = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert (first["objective"], first["action"], first["sets"]) == ("epoch", "lock-image-tower", LOCKED)
    assert first["command"] == f"{COMMAND} --plan epoch/lock-image-tower"
    assert (first["remaining"], first["tried"]) == (["lock-text-tower", "smaller-images"], [])
    # Recorded is enough: the config of this run does not hold the setting.
    taken = take(tmp_path, first, config=joint())
    second = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert second["command"] == f"{COMMAND} --plan epoch/lock-image-tower --plan epoch/lock-text-tower"
    how = f"--plan epoch/lock-image-tower in {taken.name}"
    assert second["tried"] == [{"action": "lock-image-tower", "run": taken.name, "how": how}]
    best = take(tmp_path, second, 11_000, config=joint())
    third = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert [one["run"] for one in third["tried"]] == [taken.name, best.name]
    assert (third["action"], third["remaining"]) == ("smaller-images", [])
    take(tmp_path, third, 12_000, config=joint())
    spent = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert (spent["step"], spent["command"], spent["exhausted"]) == ("exhausted", None, ["epoch"])
    assert spent["do"] == (
        "NO-GO: epoch is missed and all 3 steps of its contingency plan are taken. "
        f"The best of 4 runs, {best.name}, has 10,000 pairs from cold 3 h 03 min, ≤ 3 h 00 min is demanded "
        "(3 min 20 s away). Change the recipe or the law's owner waives the breach."
    )


def test_settings_that_hold_already_are_no_step(tmp_path: Path) -> None:
    group = make_group(tmp_path, "train", SLOW, command=COMMAND)
    found = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert found["action"] == "smaller-images"
    assert [one["how"] for one in found["tried"]] == [f"the config of {group.name} has it"] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"pack": FLICKR | {"fingerprint": "0" * 64}},
        {"hardware": CPU | {"cores": 8}},
        {"status": "failed"},
        {"command": "chimera train full --config configs/train/other.yaml --plan epoch/lock-image-tower"},
    ],
)
def test_what_another_recipe_pack_or_machine_tried_does_not_count(tmp_path: Path, changes: dict[str, Any]) -> None:
    judged = make_group(tmp_path, "train", SLOW, config=joint(), command=COMMAND)
    first = plan(tmp_path, judged.name, LAW, "cpu")
    other = take(tmp_path, first, config=joint())
    assert plan(tmp_path, judged.name, LAW, "cpu")["action"] == "lock-text-tower"
    update_group(other, **changes)
    assert plan(tmp_path, judged.name, LAW, "cpu")["action"] == "lock-image-tower"


def test_another_file_of_objectives_is_named_in_the_command(tmp_path: Path) -> None:
    make_group(tmp_path, "train", SLOW, config=joint(), command=COMMAND, pack=FLICKR | {"source": "toy"})
    found = plan(tmp_path, slo_path=TOY, profile="cpu")
    assert found["command"] == f"{COMMAND} --plan epoch/lock-image-tower --slo configs/slo-toy.yaml"
    assert plan_facts(f"{found['command']} --plan=epoch/more") == {
        "objective": "epoch", "action": "more", "slo": "configs/slo-toy.yaml", "before": ["epoch/lock-image-tower"],
    }  # fmt: skip
    assert plan_facts(COMMAND) is None


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


def test_a_command_that_was_run_is_not_proposed_again_nor_a_pack_that_is_there(tmp_path: Path) -> None:
    make_run(tmp_path)
    for path in tmp_path.glob("runs/bench-loader-*"):
        shutil.rmtree(path)
    make_loader(tmp_path, loader_images_per_s=200.0)
    first = plan(tmp_path, slo_path=LAW, profile="cpu")["command"]
    assert first == "chimera bench loader --data flickr8k --device cpu --batch 128"
    typed = "chimera bench loader --batch=128 --device cpu --data flickr8k --json"
    slow = [LOADED | {"loader_images_per_s": 250.0}]
    run = make_group(tmp_path, "bench-loader", slow, command=typed, details={"seconds": 60})
    assert plan(tmp_path, slo_path=LAW, profile="cpu")["action"] == "smaller-pack"
    (tmp_path / "data" / "flickr8k-160").mkdir(parents=True)
    (tmp_path / "data" / "flickr8k-160" / "manifest.json").write_text("{}", encoding="utf-8")
    spent = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert [one["how"] for one in spent["tried"]] == [f"it was run as {run.name}", "the pack flickr8k-160 is there"]
    assert (spent["step"], "loader throughput 250.0 images/s" in spent["do"]) == ("exhausted", True)


@pytest.mark.parametrize(
    ("changes", "sets"),
    [
        ({"batch": 512, "micro_batch": None}, {"micro_batch": 256}),
        ({"batch": 1024, "micro_batch": 48}, {"micro_batch": 24}),
    ],
)
def test_a_relative_step_fits_the_config_of_the_run(
    tmp_path: Path, changes: dict[str, Any], sets: dict[str, int]
) -> None:
    config = TrainConfig(image={"locked": True}, text={"learn_layers": 1}, **changes).model_dump()
    big = [TRAINED | {"vram_peak_gb": 9.0}] * 3
    make_group(tmp_path, "train", big, config=config, command=COMMAND, hardware=GPU)
    found = plan(tmp_path, slo_path=LAW)
    # One text layer learns: to let only two learn would be no step down.
    assert [one["action"] for one in found["tried"]] == ["lock-image-tower", "fewer-text-layers"]
    assert (found["action"], found["sets"]) == ("smaller-batch", sets)
    shown = explain_objective(tmp_path, "vram", "latest", LAW)["contingency"]
    assert next(step["sets"] for step in shown if step["step"] == "vram/smaller-batch") == sets


def test_a_step_that_a_run_would_refuse_is_not_proposed(tmp_path: Path) -> None:
    config = TrainConfig(image={"locked": True, "image_size": 40}, text={"learn_layers": 0}).model_dump()
    group = make_group(tmp_path, "train", SLOW, config=config, command=COMMAND)
    found = plan(tmp_path, slo_path=LAW, profile="cpu")
    assert (found["step"], found["command"]) == ("exhausted", None)
    assert [one["run"] for one in found["tried"]] == [group.name, group.name, None]
    assert found["tried"][2]["how"].startswith("not possible here: image.image_size: input should be greater")
    assert "are taken or not possible here" in found["do"]


def test_what_is_waived_is_not_said_to_be_met_and_a_lost_command_is_not_made_up(tmp_path: Path) -> None:
    group = make_run(tmp_path, epoch_10k_pairs_s=20000.0)
    document = yaml.safe_load(LAW.read_text(encoding="utf-8"))
    waiver = {"objective": "epoch", "owner": "an owner", "reason": "slow disk", "expires": date(2030, 1, 31)}
    path = tmp_path / "slo.yaml"
    path.write_text(yaml.safe_dump(document | {"waivers": [waiver]}), encoding="utf-8")
    found = plan(tmp_path, slo_path=path, profile="cpu", today=date(2030, 1, 1))
    words = "Every objective is met or waived: epoch (waived until 2030-01-31); there is nothing to do until then."
    assert (found["step"], found["do"]) == ("none", words)
    update_group(group, command=None)
    for seed, value in enumerate((0.20, 0.25, 0.31)):
        add_evaluation(group, seed, figures=RECALL | {"i2t_r10": value})
    doubt = plan(tmp_path, slo_path=path, profile="cpu", today=date(2030, 1, 1))
    assert (doubt["step"], doubt["command"]) == ("more-seeds", None)
    assert f"The command of {group.name} is not recorded" in doubt["do"]


# ---- applying -------------------------------------------------------------------------------------------------------


def test_a_step_sets_what_the_law_says(tmp_path: Path) -> None:
    steps = find_steps(LAW, ["regularise", "viability/more-negatives"], "train")
    assert [step.name for step in steps] == ["viability/regularise", "viability/more-negatives"]
    given = load_config(TrainConfig, None, ["batch=700", "heads.dropout=0.5"])
    changes = [setting(key, value) for key, value in settings_of(steps, given.model_dump()).items()]
    config = load_config(TrainConfig, None, ["batch=700", "heads.dropout=0.5", *changes])
    # More dropout than the step asks for stays; the batch is twice that of the recipe.
    assert (config.heads.dropout, config.optimiser.weight_decay, config.batch) == (0.5, 0.1, 1400)
    with pytest.raises(UsageError, match="viability/more-negatives multiplies batch, which has no value"):
        settings_of(steps)
    assert find_steps(None, [], "train") == ()


@pytest.mark.parametrize(
    ("name", "kind", "message", "hint"),
    [
        ("regularize", "train", "--plan 'regularize' is no step", "did you mean"),
        ("qqq", "train", "--plan 'qqq' is no step", "the steps are"),
        ("lock-image-tower", "train", "epoch/lock-image-tower or vram/lock-image-tower", "give the full name"),
        ("loader/bigger-batch", "train", "loader/bigger-batch changes no config", "it is: chimera bench loader"),
        ("softer-loss", "train", "sanity/softer-loss is about a sanity run", ""),
        ("viability/regularise", "sanity", "viability/regularise is about a train run", ""),
    ],
)
def test_a_step_that_cannot_be_meant_is_refused(name: str, kind: Any, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_steps(LAW, [name], kind)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_of_two_steps_that_set_one_key_the_later_holds(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    document = yaml.safe_load(LAW.read_text(encoding="utf-8"))
    document["objectives"][3]["actions"].append({"id": "unlock", "do": "Unlock.", "set": {"image.locked": False}})
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    steps = find_steps(path, ["epoch/lock-image-tower", "unlock"], "train")
    assert settings_of(steps) == LOCKED | {"image.locked": False}
    twice = find_steps(path, ["more-negatives", "more-negatives"], "train")
    assert settings_of(twice, {"batch": 100}) == {"batch": 400}


CONFIGS = Path(__file__).parents[2] / "configs"
TRAIN_STEPS = [
    f"{objective['id']}/{action['id']}"
    for objective in yaml.safe_load(LAW.read_text(encoding="utf-8"))["objectives"]
    for action in objective["actions"]
    if action.keys() & {"set", "at_least", "at_most", "scale"} and objective["id"] != "sanity"
]


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("name", TRAIN_STEPS)
def test_every_step_leads_from_every_shipped_recipe_to_one_that_can_be_trained(name: str, path: Path) -> None:
    values = load_config(TrainConfig, path).model_dump()
    validate(TrainConfig, changed(values, settings_of(find_steps(LAW, [name], "train"), values)), name)
