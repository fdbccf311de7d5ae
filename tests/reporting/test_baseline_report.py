"""The closed-form baseline in a report: beside every seed of its pack and split, and told when it is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chimera_cli.reporting.facts import collect
from chimera_cli.reporting.markdown import render
from chimera_cli.reporting.sections import build
from chimera_cli.reporting.verdicts import Verdicts, verdicts_of
from chimera_cli.runs import Group, read_json, write_sealed_json
from chimera_cli.slo.baseline import baseline_path

NO_VERDICTS = Verdicts((), (), "chimera slo check --run latest")


def report(home: Path, group: Group) -> str:
    return render(build(collect(home, group), NO_VERDICTS))


def add_baseline(group: Group, recall: float, **changes: Any) -> None:
    """Write the baseline of a group: the evaluation of its first seed with another R@1."""
    document = read_json(group.seed_dir(0) / "evaluations" / "flickr8k-dev.json")
    figures = document["figures"] | {"i2t_r1": recall}
    facts = {"baseline": "cca", "group": group.name, "figures": figures}
    write_sealed_json(baseline_path(group, "flickr8k", "dev"), document | facts | changes)


def test_the_baseline_has_a_column_and_a_sentence(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    group = new_train_group(tmp_path)
    assert "baseline" not in report(tmp_path, group)
    add_baseline(group, 0.36)
    text = report(tmp_path, group)
    (line,) = [line for line in text.splitlines() if line.startswith("| image to text R@1 ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[4:] == ["34.0 ± 1.0 % (n=3)", "36.0 % (30.0 – 36.0)", "0.1 %"]
    assert "CCA baseline" in text
    assert "below the CCA baseline of the same frozen features in image to text R@1 (34.0 % against 36.0 %)." in text


def test_a_baseline_of_other_content_heads_the_report(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    group = new_train_group(tmp_path)
    add_baseline(group, 0.36, pack={"name": "flickr8k", "fingerprint": "0" * 64})
    text = report(tmp_path, group)
    file = f"{group.name}/evaluations/baselines/flickr8k-dev-cca.json"
    assert f"`{file}` was measured on another content of the pack flickr8k." in text
    assert "36.0 % (30.0" not in text.split("chance", 1)[1].split("\n| image to text R@5", 1)[0]


def test_the_verdict_carries_the_words() -> None:
    condition = {"figure": "t2i_r10", "comparison": ">=", "limit": 0.25, "law": "≥ 25 %", "measured": "23 %"}
    objective = {
        "id": "viability",
        "title": "recall",
        "verdict": "pass",
        "reason": "",
        "measure": None,
        "run": "train-x",
    }
    objective |= {"run": "train-x", "conditions": [condition], "baseline": {"words": "below the CCA baseline"}}
    check = {"objectives": [objective], "law": True, "remarks": [], "command": "chimera slo check"}
    (row,) = verdicts_of(check).rows
    assert row.evidence[-1] == "below the CCA baseline"
