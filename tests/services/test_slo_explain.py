"""One verdict step by step: formula, samples with their files, spread, interval, commands and what was tried."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import LAW, RECALL, SOURCE, TRAINED, add_evaluation, make_group, make_run, make_sanity

from chimera_cli.config import TrainConfig
from chimera_cli.errors import UsageError
from chimera_cli.runs import update_group
from chimera_cli.services.provenance import plan_facts
from chimera_cli.services.slo_explain import explain_objective
from chimera_cli.slo.evidence import Evidence
from chimera_cli.slo.explanation import explain
from chimera_cli.slo.objectives import Objective
from chimera_cli.slo.verdicts import judge
from chimera_cli.statistics import t_quantile_95


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs made by hand are of the source code that checks them."""
    monkeypatch.setattr("chimera_cli.services.slo.source_hash", lambda: SOURCE)


def explained(values: tuple[float, ...], **condition: Any) -> dict[str, Any]:
    whole = {"figure": "i2t_r10", "comparison": ">=", "limit": 0.25, "statistic": "mean"} | condition
    seeds = 2 if whole["statistic"] == "bound95" else 1
    objective = Objective.model_validate(
        {"id": "one", "title": "one", "kind": "train", "all_of": [whole], "measure": "x", "seeds_at_least": seeds}
    )
    files = tuple(f"seed-{seed}.json" for seed in range(len(values)))
    figures = {str(whole["figure"]): values, "chance_loss": (3.0,) * len(values)}
    evidence = Evidence(None, files, tuple(range(len(values))), figures)
    verdict = judge(objective, evidence, None, None)  # type: ignore[arg-type]
    return explain(verdict.findings[0], evidence)


def test_a_mean_is_explained_down_to_the_quantile() -> None:
    found = explained((0.20, 0.25, 0.31))
    assert found["law"] == "the mean over the seeds of image to text R@10 is at least 25.0 %"
    assert found["formula"] == "(1/n) Σ i2t_r10 ≥ 0.25"
    assert [(one["seed"], one["judged"], one["file"]) for one in found["samples"]] == [
        (0, 0.20, "seed-0.json"), (1, 0.25, "seed-1.json"), (2, 0.31, "seed-2.json"),
    ]  # fmt: skip
    assert found["t"] == t_quantile_95(2) == 4.3027
    assert found["steps"] == [
        "mean = (0.2 + 0.25 + 0.31) / 3 = 0.253333",
        "std = √(Σ (x - mean)² / (n - 1)) = 0.0550757",
        "95 % interval = mean ± t(0.975, 2) · std / √n = 0.253333 ± 4.3027 · 0.0550757 / √3 = 0.116516 to 0.39015",
        "mean: 0.253333 ≥ 0.25? yes",
        "pessimistic end of the interval: 0.116516 ≥ 0.25? no, the interval straddles the limit: inconclusive",
    ]
    assert explained((0.24,))["steps"][1:] == [
        "std and 95 % interval: none, one seed has no spread", "mean: 0.24 ≥ 0.25? no: fail",
    ]  # fmt: skip
    assert explained((0.26,))["steps"][-1] == "without an interval the mean decides: pass"


@pytest.mark.parametrize(
    ("condition", "formula", "last"),
    [
        ({"statistic": "worst"}, "min i2t_r10 ≥ 0.25", "worst seed: 0.2 (seed 1) ≥ 0.25? no: fail"),
        (
            {"statistic": "bound95", "limit": 0.1},
            "mean(i2t_r10) - t(0.975, n-1) · std(i2t_r10) / √n ≥ 0.1",
            "pessimistic end of the interval: -0.38531 ≥ 0.1? no: fail",
        ),
        (
            {"figure": "loss_tail_mean", "comparison": "<=", "relative_to": "chance_loss", "limit": -0.15},
            "(1/n) Σ (loss_tail_mean - chance_loss) ≤ -0.15",
            "pessimistic end of the interval: -2.11469 ≤ -0.15? yes: pass",
        ),
    ],
)
def test_each_statistic_has_its_formula(condition: dict[str, Any], formula: str, last: str) -> None:
    found = explained((0.3, 0.2), **condition)
    assert (found["formula"], found["steps"][-1]) == (formula, last)


def test_an_explanation_names_files_commands_and_the_plan_with_what_was_tried(tmp_path: Path) -> None:
    group = make_run(tmp_path)
    for seed in range(3):
        add_evaluation(group, seed, figures=RECALL | {"i2t_r1": 0.04})
    command = f"{group.facts['command']} --plan viability/regularise"
    tried = make_group(tmp_path, "train", [TRAINED] * 3, command=command)
    update_group(tried, plan=plan_facts(command), finished_at="2000-01-01")
    for seed in range(3):
        add_evaluation(tried, seed, figures=RECALL | {"i2t_r1": 0.045})
    found = explain_objective(tmp_path, "viability", "latest", LAW, "cpu")
    assert (found["run"], found["verdict"], found["exit_code"]) == (group.name, "fail", 3)
    assert found["reproduce"] == [group.facts["command"], f"chimera eval --run {group.name} --split dev"]
    checked = f"chimera slo check --run {group.name} --slo configs/slo.yaml --profile cpu --explain viability"
    assert found["command"] == checked
    first, second = found["contingency"][:2]
    assert first["tried"] == f"--plan viability/regularise in {tried.name}"
    assert [(one["run"], one["verdict"], one["figures"]["i2t_r1"]) for one in first["reached"]] == [
        (tried.name, "fail", pytest.approx(0.045))
    ]
    wanted = {"text.learn_layers": 2, "optimiser.lr_text": 1e-4}
    assert (second["tried"], second["sets"]) == (None, wanted)
    assert second["command"] == f"{group.facts['command']} --plan viability/learn-text"


def test_missing_evidence_and_evidence_of_another_group_are_explained(tmp_path: Path) -> None:
    config = TrainConfig().model_dump()
    make_group(tmp_path, "train", [TRAINED] * 3, config=config)
    gap = explain_objective(tmp_path, "sanity", "latest", LAW, "cpu")
    assert (gap["exit_code"], gap["reproduce"]) == (4, ["chimera train sanity --seed 0 --data flickr8k"])
    assert [one["samples"] for one in gap["conditions"]] == [[], [], []]
    sanity = make_sanity(tmp_path)
    found = explain_objective(tmp_path, "sanity", "latest", LAW, "cpu")
    assert (found["objective"]["run"], found["reproduce"]) == (sanity.name, ["chimera train sanity --seed 0"])
    sample = found["conditions"][1]["samples"][0]
    assert sample["judged"] == sample["value"] - sample["relative_to"]
    with pytest.raises(UsageError, match=r"there is no objective 'vram' in configs/slo\.yaml, profile cpu"):
        explain_objective(tmp_path, "vram", "latest", LAW, "cpu")
