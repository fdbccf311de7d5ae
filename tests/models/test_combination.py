"""Several models in one file: what is stored, what they share in memory, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_model import TINY

from chimera_cli.errors import ChimeraError
from chimera_cli.models.checkpoint import save_model
from chimera_cli.models.combination import Combination, load_model, save_combination
from chimera_cli.models.dual_encoder import build_dual_encoder, count_parameters
from chimera_cli.models.weights import DEFAULT_IMAGE, DEFAULT_TEXT

CPU = torch.device("cpu")
LOCKED = replace(
    TINY, image_weights=DEFAULT_IMAGE, image_locked=True, text_weights=DEFAULT_TEXT, learn_layers=2, head="mlp"
)


def test_members_come_back_and_locked_towers_are_there_once(tmp_path: Path) -> None:
    shapes = [replace(LOCKED, learn_layers=0), replace(LOCKED, learn_layers=0, dim=4), LOCKED, TINY]
    models = [build_dual_encoder(shape).eval() for shape in shapes]
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        save_model(model, path)
    save_combination(paths, tmp_path / "all.safetensors")
    again = load_model(tmp_path / "all.safetensors", CPU)
    assert isinstance(again, Combination)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for own, other in zip(models, again.members, strict=True):
        tokens = own.tokenise(["a dog", "two children"])
        with torch.inference_mode():
            assert torch.equal(own.encode_image(pixels), other.encode_image(pixels))
            assert torch.equal(own.encode_text(tokens), other.encode_text(tokens))
    first, second, third, last = again.members
    assert first.image_tower is second.image_tower is third.image_tower is not last.image_tower
    assert first.text_tower is second.text_tower is not third.text_tower, "two layers of it have learned"
    alone = [count_parameters(model)["parameters_total"] for model in models]
    shared = sum(p.numel() for p in models[0].image_tower.parameters()) * 2
    shared += sum(p.numel() for p in models[0].text_tower.parameters())
    assert count_parameters(again)["parameters_total"] == sum(alone) - shared
    with safe_open(tmp_path / "all.safetensors", framework="pt") as file:
        assert "members.0.image_head.shortcut.weight" in file.keys()  # noqa: SIM118 - no mapping
        assert not any(name.startswith("members.0.image_tower") for name in file.keys())  # noqa: SIM118


def test_a_combination_of_combinations_and_half_a_file_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for path in paths:
        save_model(build_dual_encoder(TINY), path)
    save_combination(paths, tmp_path / "both.safetensors")
    with pytest.raises(ChimeraError, match="is a combination itself"):
        save_combination([paths[0], tmp_path / "both.safetensors"], tmp_path / "more.safetensors")
    assert not (tmp_path / "more.safetensors").exists()
    whole = (tmp_path / "both.safetensors").read_bytes()
    (tmp_path / "both.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ChimeraError, match="is damaged"):
        load_model(tmp_path / "both.safetensors", CPU)
