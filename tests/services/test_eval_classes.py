"""Files of classifications: what was asked differently never replaces what was asked before."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from chimera_cli.runs import create_group
from chimera_cli.services.eval_classes import _Labels, _store


def test_every_question_has_a_file_of_its_own(tmp_path: Path) -> None:
    group = create_group(tmp_path, "train", "made", [0], {})
    subject: Any = SimpleNamespace(group=group, pack=SimpleNamespace(name="toy"), split="dev")
    questions = [
        ("a b", ["x", "y"], ["{}"]),
        ("a-b", ["x", "y"], ["{}"]),
        ("色", ["x", "y"], ["{}"]),
        ("形", ["x", "y"], ["{}"]),
        ("形", ["x", "z"], ["{}"]),
        ("形", ["x", "z"], ["a {}"]),
        ("c" * 300, ["x", "y"], ["{}"]),
    ]
    for column, classes, templates in [*questions, questions[0]]:
        document = {"seed": 0, "column": column, "classes": classes, "templates": templates}
        _store(subject, _Labels(column, np.zeros(1, dtype=np.int64)), [document])
    names = sorted(path.name for path in (group.seed_dir(0) / "evaluations" / "zero-shot").iterdir())
    assert len(names) == len(questions)
    assert all(name.startswith("toy-dev-") and name.isascii() for name in names)
