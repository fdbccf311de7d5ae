"""Several pairs of heads: their mean similarity, their differences, and what a single pair stays."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_model import TINY

from chimera_cli.models.checkpoint import save_model
from chimera_cli.models.combination import load_model
from chimera_cli.models.dual_encoder import DualEncoder, EnsembleHead, build_dual_encoder
from chimera_cli.training.optimiser import build_optimiser

CPU = torch.device("cpu")
THREE = replace(TINY, members=3)


def pooled(model: DualEncoder, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(n, tower.width, generator=generator) for tower in (model.image_tower, model.text_tower))
    return image, text


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_similarity_is_the_mean_of_the_members(head: str) -> None:
    model = build_dual_encoder(replace(THREE, head=head)).eval()
    image, text = pooled(model)
    with torch.inference_mode():
        ours = model.project_image(image) @ model.project_text(text).T
        members = zip(model.image_head.members, model.text_head.members, strict=True)  # type: ignore[arg-type]
        cosines = [F.cosine_similarity(of(image)[:, None], to(text)[None], dim=-1) for of, to in members]
        assert model.project_image(image).shape == (5, model.architecture.embedding_width) == (5, 24)
        assert torch.allclose(model.project_text(text).norm(dim=-1), torch.ones(5), atol=1e-6)
    assert torch.allclose(ours, torch.stack(cosines).mean(dim=0), atol=1e-6)
    assert not torch.allclose(cosines[0], cosines[1], atol=1e-2), "each member begins elsewhere"


def test_each_member_drops_other_features() -> None:
    model = build_dual_encoder(replace(THREE, head="mlp", dropout=0.5)).train()
    first, second, _ = model.image_head.members  # type: ignore[misc]
    second.load_state_dict(first.state_dict())
    one, another, _ = model.project_image(pooled(model)[0]).chunk(3, dim=-1)
    assert not torch.allclose(one, another, atol=1e-2)
    one, another, _ = model.eval().project_image(pooled(model)[0]).chunk(3, dim=-1)
    assert torch.equal(one, another)


def test_a_single_pair_of_heads_is_as_it_was() -> None:
    model = build_dual_encoder(TINY)
    assert not any(isinstance(module, EnsembleHead) for module in model.modules())
    names = {name for name in model.state_dict() if name.startswith(("image_head", "text_head"))}
    assert names == {"image_head.weight", "text_head.weight"}
    image, _ = pooled(model)
    assert torch.equal(model.project_image(image), F.normalize(model.image_head(image), dim=-1))


def test_a_checkpoint_keeps_every_member(tmp_path: Path) -> None:
    model = build_dual_encoder(replace(THREE, head="mlp"))
    save_model(model, tmp_path / "best.safetensors")
    again = load_model(tmp_path / "best.safetensors", CPU)
    assert again.architecture == model.architecture
    image, _ = pooled(model)
    with torch.inference_mode():
        assert torch.equal(again.project_image(image), model.eval().project_image(image))


def test_a_checkpoint_from_before_there_were_members_is_read(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    model = build_dual_encoder(TINY)
    save_model(model, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["chimera"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    del header["architecture"]["members"]
    save_file(tensors, path, metadata={"chimera": json.dumps(header)})
    assert torch.equal(load_model(path, CPU).image_head.weight, model.image_head.weight)


def test_all_members_learn_at_the_rate_of_the_heads() -> None:
    model = build_dual_encoder(replace(THREE, head="mlp"))
    optimiser = build_optimiser(model, lr_heads=1.0, lr_image=0.1, lr_text=0.2, weight_decay=0.05)
    for name in ("image_head", "text_head"):
        groups = [group for group in optimiser.param_groups if group["name"] == name]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in getattr(model, name).parameters()}
        # Norm, shortcut, expansion and contraction of each member, all with a bias.
        assert len(held) == 3 * 8
        assert {group["lr"] for group in groups} == {1.0}
