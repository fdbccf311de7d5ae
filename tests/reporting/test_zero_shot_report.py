"""Classifications in a report: those of the run itself, and by name those that are not."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import make_group

from chimera_cli.reporting.markdown import render_blocks
from chimera_cli.reporting.reading import tidied
from chimera_cli.reporting.zero_shot import zero_shot_blocks
from chimera_cli.runs import MADE_WITH, Group, write_sealed_json


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return tidied(make_group(tmp_path, "train", [{}, {}]))


def classify(group: Group, seed: int, /, **changes: Any) -> None:
    pack = {key: group.facts["pack"][key] for key in ("name", "fingerprint")}
    document = {"schema_version": 1, "pack": pack, "split": "dev", "seed": seed, "column": "colour", "images": 4}
    document |= {"classes": ["red", "blue"], "templates": ["{}"], "recall_by_class": [0.5, 1.0]}
    document |= {"figures": {"zero_shot_top1": 0.75, "zero_shot_top5": None, "zero_shot_class_recall": 0.75}}
    document |= {"group": group.name, "made_with": {key: group.facts.get(key) for key in MADE_WITH}}
    path = group.seed_dir(seed) / "evaluations" / "zero-shot" / "flickr8k-dev-colour-0.json"
    write_sealed_json(path, document | changes)


def told(group: Group) -> str:
    return render_blocks(list(zero_shot_blocks(group, group.seeds)))


def test_those_of_the_run_are_shown(group: Group) -> None:
    classify(group, 0)
    classify(group, 1)
    assert "left out" not in told(group)
    assert "75.0 ± 0.0 % (n=2)" in told(group)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"group": "train-other"}, "is of train-other"),
        ({"group": None}, "is of a run without a name"),
        ({"made_with": None}, "made otherwise (pack, source_hash, hardware)"),
        ({"seed": 7}, "is no classification of this seed"),
    ],
    ids=str,
)
def test_those_of_another_run_are_named_and_left_out(group: Group, changes: dict[str, Any], problem: str) -> None:
    classify(group, 0)
    classify(group, 1, **changes)
    text = told(group)
    assert "seed-1/evaluations/zero-shot/flickr8k-dev-colour-0.json" in text
    assert problem.replace("_", "\\_") in text or problem in text
    assert "seed 1" not in text
