"""What a seed hands in: a sealed result that says what it was made with."""

import json
from pathlib import Path

import pytest
import torch

from chimera_cli.errors import ChimeraError
from chimera_cli.runs import create_group, read_sealed_json
from chimera_cli.services.session import seed_session


def test_a_result_is_sealed_and_repeats_what_its_group_was_made_with(tmp_path: Path) -> None:
    facts = {"pack": {"name": "toy"}, "stream": {"digest": "d"}, "config_hash": "c", "source_hash": "s"}
    facts |= {"hardware": {"device": "cpu"}}
    group = create_group(tmp_path, "sanity", "", [3], facts | {"command": "chimera train sanity"})
    with seed_session(group, 3, {"batch": 8}, torch.device("cpu"), [], 10) as session:
        session.finish({"loss_drop": 0.5, "gpu_util_mean": None}, {"losses": [3.0, 2.5]})
    path = group.seed_dir(3) / "result.json"
    result = read_sealed_json(path)
    assert (result["seed"], result["figures"]["loss_drop"], result["made_with"]) == (3, 0.5, facts)
    path.write_text(json.dumps(result | {"figures": {"loss_drop": 0.9}}), encoding="utf-8")
    with pytest.raises(ChimeraError, match="was edited after it was written"):
        read_sealed_json(path)
