"""Which way features of locked towers are computed, what is said of it, and what of it is in the cache's key."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import TINY

from chimera_cli.data.pack import Pack, open_pack
from chimera_cli.events import Event, Note
from chimera_cli.models import sessions
from chimera_cli.models.dual_encoder import DualEncoder, build_dual_encoder
from chimera_cli.models.sessions import SessionError, session_backend
from chimera_cli.models.weights import DEFAULT_IMAGE, DEFAULT_TEXT
from chimera_cli.services import embeddings
from chimera_cli.services.embeddings import (
    Crops,
    caption_states,
    embed_captions,
    embed_images,
    embed_texts_with,
    image_maps,
    images_without_sides,
    locked_image_features,
    mean_direction,
    pooled_caption_features,
)
from chimera_cli.services.inputs import Workbench, training_batches, warm_caches
from chimera_cli.training.batches import embed_pairs
from chimera_cli.training.features import preprocess

CPU = torch.device("cpu")
needs_sessions = pytest.mark.skipif(session_backend() is None, reason="onnxruntime or onnx is not installed")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A process that has said nothing yet."""
    embeddings._said.clear()
    embeddings._unfit.clear()
    yield
    embeddings._said.clear()
    embeddings._unfit.clear()


@pytest.fixture
def pack(small_home: Path) -> Pack:
    return open_pack(small_home / "data", "small")


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    shape = replace(TINY, image_weights=DEFAULT_IMAGE, image_locked=True, flipped_view=True)
    return build_dual_encoder(replace(shape, text_weights=DEFAULT_TEXT, learn_layers=0, max_tokens=32)).eval()


class Ear:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.message)


def keys(pack: Pack) -> list[dict[str, object]]:
    files = sorted((pack.path.parent / ".features" / pack.name).glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["key"] for path in files]


def test_hidden_states_have_features_of_their_own_and_leave_the_others_theirs(pack: Pack, model: DualEncoder) -> None:
    plain = pooled_caption_features(model, pack, "dev", CPU, Ear())
    assert all("hidden_states" not in key for key in keys(pack))
    more = build_dual_encoder(replace(model.architecture, text_hidden_states=(0, 3))).eval()
    ear = Ear()
    both = pooled_caption_features(more, pack, "dev", CPU, ear)
    assert not both.from_cache
    assert not [note for note in ear.notes if "onnxruntime" in note], "the session takes them"
    assert [key["hidden_states"] for key in keys(pack) if "hidden_states" in key] == [[0, 3]]
    assert np.allclose(both.values[:, :384], plain.values, atol=1e-5)
    assert pooled_caption_features(more, pack, "dev", CPU, ear).from_cache
    assert pooled_caption_features(model, pack, "dev", CPU, ear).from_cache


def test_places_are_kept_in_half_precision_and_embedded_as_the_model_does(pack: Pack, model: DualEncoder) -> None:
    shape = replace(model.architecture, image_size=64, image_stages=2, image_queries=2)
    seeing = build_dual_encoder(shape).eval()
    pooled = build_dual_encoder(replace(shape, image_queries=0)).eval()
    ear = Ear()
    places, means = (locked_image_features(each, pack, "dev", CPU, ear) for each in (seeing, pooled))
    assert ear.notes == []
    channels = 192 + 320
    count = (shape.image_size // 32) ** 2
    assert places.values.shape == (60, 2, 1280 + count * channels)
    assert (places.values.dtype, means.values.dtype) == (np.float16, np.float32)
    found = places.values[..., 1280:].reshape(60, 2, count, channels).astype(np.float32).mean(axis=2)
    assert np.allclose(found, means.values[..., 1280:], atol=2e-2, rtol=2e-2)
    assert sorted(key.get("places", False) for key in keys(pack)) == [False, True]
    with torch.inference_mode():
        indices = pack.split_indices("dev")[:3]
        pixels = preprocess(torch.from_numpy(pack.images[indices]), seeing.image_tower, shape.image_size)
        views = torch.stack([seeing.encode_image(view) for view in (pixels, pixels.flip(-1))], dim=1)
    embedded = embed_images(seeing, pack, "dev", CPU, ear)
    assert np.allclose(embedded[:3], mean_direction(views).numpy(), atol=2e-3)


def test_places_beyond_half_precision_are_kept_in_float32(pack: Pack, model: DualEncoder) -> None:
    shape = replace(model.architecture, image_stages=1, image_queries=2)
    loud = build_dual_encoder(shape).eval()
    with torch.no_grad():
        loud.image_tower._stages()[-1][-1].bn3.weight.mul_(1e6)  # type: ignore[union-attr, operator]
    ear = Ear()
    assert locked_image_features(loud, pack, "dev", CPU, ear).values.dtype == np.float32
    assert any("float32 is cached, which takes twice the disk" in note for note in ear.notes)


@needs_sessions
def test_a_session_and_pytorch_agree_and_are_kept_apart(
    pack: Pack, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ear = Ear()
    pairs = []
    for features in (locked_image_features, pooled_caption_features):
        fast = features(model, pack, "dev", CPU, ear)
        assert ear.notes == []
        with monkeypatch.context() as patch:
            patch.setattr(sessions, "session_backend", lambda: None)
            plain = features(model, pack, "dev", CPU, ear)
        assert not plain.from_cache
        pairs.append((fast.values, plain.values))
        ear.notes.clear()
    for fast, plain in pairs:
        # Of so small an image nothing may be left behind the last activation.
        error = np.linalg.norm(fast - plain, axis=-1) / np.linalg.norm(plain, axis=-1).clip(min=1e-2)
        assert 0 < error.max() < 1e-3
    assert sorted(str(key["backend"]) for key in keys(pack)) == sorted(2 * [session_backend(), "torch"])
    assert pairs[0][0].shape == (60, 2, 1280)


def test_without_the_libraries_it_is_said_once_and_only_when_it_matters(
    pack: Pack, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "session_backend", lambda: None)
    ear = Ear()
    for split in ("dev", "test"):
        pooled_caption_features(model, pack, split, CPU, ear)
    assert len(ear.notes) == 1
    assert "pip install onnxruntime onnx" in ear.notes[0]
    embeddings._said.clear()
    assert pooled_caption_features(model, pack, "dev", CPU, ear).from_cache
    assert len(ear.notes) == 1


def test_a_misfit_falls_back_names_the_error_and_is_not_tried_again(
    pack: Pack, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def misfit(*_arguments: object) -> None:
        tries.append(1)
        raise SessionError("onnxruntime is off by 2.0e-02 on some captions, 1e-03 is allowed")

    monkeypatch.setattr(sessions, "session_backend", lambda: "onnxruntime 9.9")
    monkeypatch.setattr(sessions, "caption_session", misfit)
    ear = Ear()
    first = pooled_caption_features(model, pack, "dev", CPU, ear)
    second = pooled_caption_features(model, pack, "dev", CPU, ear)
    assert (first.from_cache, second.from_cache, len(tries)) == (False, True, 1)
    assert len(ear.notes) == 1
    assert "off by 2.0e-02" in ear.notes[0]
    assert "PyTorch computes" in ear.notes[0]
    assert [key["backend"] for key in keys(pack)] == ["torch"]
    with torch.inference_mode():
        table = model.text_tower.token_table(pack.captions("dev").texts, 32)
        assert np.allclose(first.values[0], model.text_tower(table.batch(np.array([0])))[0], atol=1e-5)


@needs_sessions
def test_crops_are_further_views_with_a_key_of_their_own(pack: Pack, model: DualEncoder) -> None:
    plain = locked_image_features(model, pack, "dev", CPU, Ear())
    crops = locked_image_features(model, pack, "dev", CPU, Ear(), Crops(2, 0.5, 0.0))
    assert crops.values.shape == (60, 4, 1280)
    assert np.array_equal(crops.values[:, :2], plain.values)
    other = locked_image_features(model, pack, "dev", CPU, Ear(), Crops(2, 0.6, 0.0))
    assert not np.array_equal(other.values[:, 2:], crops.values[:, 2:])
    assert locked_image_features(model, pack, "dev", CPU, Ear(), Crops(2, 0.5, 0.0)).from_cache


def test_sided_images_are_those_whose_captions_name_a_side(pack: Pack) -> None:
    table = pack.captions("dev")
    free = images_without_sides(pack, "dev")
    for image, rows in enumerate(table.by_image()):
        words = " ".join(table.texts[row] for row in rows).split()
        assert bool(free[image]) == (not {"left", "right"} & set(words))


@pytest.mark.parametrize(("numbers", "given"), [((), 1), ((4, 5), 1), ((0, 3, 4), 3)])
def test_captions_of_a_half_locked_tower_come_from_cached_states(
    pack: Pack, numbers: tuple[int, ...], given: int
) -> None:
    shape = replace(TINY, text_weights=DEFAULT_TEXT, learn_layers=2, max_tokens=32, text_hidden_states=numbers)
    torch.manual_seed(0)
    model = build_dual_encoder(shape).eval()
    ear = Ear()
    known = caption_states(model, pack, "dev", CPU, ear)
    assert known is not None
    assert ear.notes == []
    table, seconds = known
    assert seconds > 0
    assert table.states.shape == (int(table.lengths.sum()), given * 384)
    ours = embed_captions(model, pack, "dev", CPU, Ear())
    theirs = embed_texts_with(model, pack.captions("dev").texts, CPU)
    assert np.linalg.norm(ours - theirs, axis=1).max() < 1e-3
    # What learns is in neither key nor values: other upper layers find the same states.
    with torch.no_grad():
        model.text_tower.layers()[5].output.dense.weight.mul_(1.5)
    embed_captions(model, pack, "dev", CPU, Ear())
    assert [key["layers"] for key in keys(pack)] == [4]
    assert caption_states(build_dual_encoder(TINY), pack, "dev", CPU, Ear()) is None


PARTLY = replace(TINY, image_weights=DEFAULT_IMAGE, learn_blocks=2, flipped_view=True)


def whole_images(model: DualEncoder, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Return the image_features of dev without a cache."""
    with monkeypatch.context() as patch:
        patch.setattr(model.image_tower, "locked_blocks", None)
        return embed_images(model, pack, "dev", CPU, Ear())


@pytest.mark.parametrize("stages", [0, 2])
def test_images_of_a_half_locked_tower_come_from_cached_maps(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    torch.manual_seed(0)
    model = build_dual_encoder(replace(PARTLY, image_stages=stages, image_queries=stages)).eval()
    maps = image_maps(model, pack, "dev", CPU, Ear())
    assert maps is not None
    assert maps.values.shape == (60, 2, 192, 1, 1)
    assert maps.values.dtype == np.float16
    for _ in range(2):
        ours = embed_images(model, pack, "dev", CPU, Ear())
        assert np.linalg.norm(ours - whole_images(model, pack, monkeypatch), axis=1).max() < 2e-3
        # What learns is in neither key nor values: other upper blocks find the same maps.
        with torch.no_grad():
            model.image_tower.backbone.conv_head.weight.mul_(1.5)
    assert [key["blocks"] for key in keys(pack)] == [14]
    assert image_maps(build_dual_encoder(TINY), pack, "dev", CPU, Ear()) is None


def test_maps_beyond_half_precision_are_kept_in_single(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_dual_encoder(PARTLY).eval()
    lower = model.image_tower.lower_maps
    monkeypatch.setattr(sessions, "session_backend", lambda: None)
    monkeypatch.setattr(model.image_tower, "lower_maps", lambda pixels: lower(pixels) * 1e6)
    monkeypatch.setattr(sessions, "compare_image_parts", lambda *_: None)
    ear = Ear()
    for split in ("dev", "dev", "test"):
        maps = image_maps(model, pack, split, CPU, ear)
        assert maps is not None
        assert maps.values.dtype == np.float32
        assert np.isfinite(maps.values).all()
    assert len([note for note in ear.notes if "beyond half precision" in note]) == 1
    assert [key["dtype"] for key in keys(pack)] == ["float32", "float32"]


def test_an_image_tower_that_cannot_be_parted_is_computed_whole(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ear = build_dual_encoder(PARTLY).eval(), Ear()
    monkeypatch.setattr(model.image_tower, "_after", lambda: [model.image_tower.backbone.conv_stem])
    for _ in range(2):
        ours = embed_images(model, pack, "dev", CPU, ear)
    assert np.array_equal(ours, whole_images(model, pack, monkeypatch))
    assert len(ear.notes) == 1
    assert "two parts" in ear.notes[0]
    assert "nothing of the image tower is cached" in ear.notes[0]
    with closing(training_batches(Workbench(pack, CPU, "float32"), model, 60, 0, ear)) as batches:
        assert next(batches).image.shape == (60, 3, 32, 32)


def test_training_reads_maps_states_and_views_from_the_cache(pack: Pack) -> None:
    model = build_dual_encoder(replace(PARTLY, flipped_view=False, text_weights=DEFAULT_TEXT, learn_layers=1))
    bench = Workbench(pack, CPU, "float32")
    seconds, per_pair = warm_caches(model, bench, Ear(), views=3, crop_scale=0.5)
    assert seconds > 0
    assert per_pair == seconds / 240
    with closing(training_batches(bench, model, 60, 0, Ear(), views=3, crop_scale=0.5)) as batches:
        batch = next(batches)
        assert batch.image.shape == (60, 192, 1, 1)
        assert batch.image.dtype == torch.float32
        assert set(batch.text) == {"states", "attention_mask"}
        image, text = embed_pairs(model.train(), batch)
    (image * text).sum().backward()
    assert model.image_tower.backbone.conv_head.weight.grad is not None
    assert model.image_tower.backbone.conv_stem.weight.grad is None
    stored = {str(key["split"]): key for key in keys(pack) if "blocks" in key}
    assert stored["train"]["crops"] == {"count": 2, "crop_scale": 0.5, "colour_jitter": 0.0}
    assert "crops" not in stored["dev"]


def test_states_beyond_half_precision_are_not_encoded_at_each_evaluation(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def overflows(*_arguments: object, **_settings: object) -> None:
        tries.append(1)
        raise OverflowError("states are beyond half precision")

    monkeypatch.setattr(sessions, "session_backend", lambda: None)
    monkeypatch.setattr("chimera_cli.training.features.caption_states", overflows)
    model, ear = build_dual_encoder(replace(TINY, learn_layers=1)).eval(), Ear()
    assert [caption_states(model, pack, split, CPU, ear) for split in ("dev", "dev", "test")] == [None] * 3
    assert len(tries) == 2, "once for each split"
    assert len([note for note in ear.notes if "beyond half precision" in note]) == 1


@needs_sessions
def test_a_misfit_of_one_size_says_nothing_of_another(
    pack: Pack, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def misfit(*_arguments: object) -> None:
        tries.append(1)
        raise SessionError("off")

    monkeypatch.setattr(sessions, "session_backend", lambda: "onnxruntime 9.9")
    monkeypatch.setattr(sessions, "image_session", misfit)
    shape = model.architecture
    for side in (32, 32, 64):
        monkeypatch.setattr(model, "architecture", replace(shape, image_size=side))
        locked_image_features(model, pack, "dev", CPU, Ear())
    assert len(tries) == 2


@pytest.mark.parametrize("name", ["data/captions.py", "training/batches.py", "services/embeddings.py", "models"])
def test_all_source_that_decides_features_is_in_the_key(pack: Pack, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("chimera_cli.runs.source_hash", lambda *parts: list(parts))
    assert name in embeddings._key(pack, "dev", "tiny", None, CPU)["source_sha256"]


def test_a_tower_that_cannot_be_parted_is_computed_whole(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise SessionError("this text tower can't be computed in two parts (no layers)")

    monkeypatch.setattr(sessions, "compare_text_parts", refuse)
    ear = Ear()
    model = build_dual_encoder(replace(TINY, learn_layers=1)).eval()
    for _ in range(2):
        ours = embed_captions(model, pack, "dev", CPU, ear)
    assert np.array_equal(ours, embed_texts_with(model, pack.captions("dev").texts, CPU))
    assert len(ear.notes) == 1
    assert "nothing of the text tower is cached" in ear.notes[0]
