"""Training from shards: what a run says of its stream, features of locked towers, and no image of dev among them."""

import io
import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import Chimera

from chimera_cli.config import TrainConfig, load_config
from chimera_cli.data.captions import mentions_side
from chimera_cli.data.images import decode
from chimera_cli.data.pack import Caption, open_pack
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.data.sources.toy import draw, make_toy
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note
from chimera_cli.runs import list_groups, read_json, read_json_lines, resolve_run
from chimera_cli.services.inputs import Workbench
from chimera_cli.services.learning import architecture_of
from chimera_cli.services.streaming import open_stream, stream_pairs
from chimera_cli.services.train import train_full
from chimera_cli.training.batches import PairBatch

pytestmark = pytest.mark.usefixtures("lean")

TRAIN, DEV = 120, 40
TOY = make_toy({"train": TRAIN, "dev": DEV})
SIZE = 32

SCRATCH = (
    "data=small", "image.weights=tiny", "image.locked=false", "image.image_size=32", "text.weights=tiny",
    "text.learn_layers=null", "heads.kind=linear", "heads.dim=32", "epochs=2", "batch=40", "optimiser.lr_image=3e-3",
    "optimiser.lr_text=3e-3", "augmentation.flip=true", "augmentation.crop_scale=0.8",
)  # fmt: skip
LOCKED = ("data=small", "image.image_size=32", "heads.hidden=64", "heads.dim=32", "epochs=1", "batch=60")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(TOY.scenes[number], SIZE, 0, number)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return [png(number) for number in range(TRAIN + DEV)]


@pytest.fixture(scope="module")
def pack_home(tmp_path_factory: pytest.TempPathFactory, photos: list[bytes]) -> Path:
    """A home with a pack `small` made of PNG files: its SHA-256 are those of files, as the shards hold them."""
    home = tmp_path_factory.mktemp("stream-home")
    pictures = (decode(content, SIZE, "crop") for content in photos)
    write_pack(
        home / "data", name="small", source="toy", images=pictures, items=TOY.items, captions=TOY.captions, size=SIZE
    )
    return home


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, photos: list[bytes]) -> Path:
    """Four shards of the train images, five captions each; three of dev have slipped in, and two can't be used."""
    import webdataset as wds

    folder = tmp_path_factory.mktemp("stream") / "shards"
    folder.mkdir()
    captions = [[c.text for c in TOY.captions if c.image == number] for number in range(TRAIN + 3)]
    for shard in range(4):
        with wds.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(shard, TRAIN + 3, 4):
                facts = json.dumps({"captions": captions[number]}).encode()
                writer.write({"__key__": f"{number:05d}", "png": photos[number], "json": facts})
            if shard == 1:
                writer.write({"__key__": "broken", "png": photos[0][:90], "txt": "cut off"})
                writer.write({"__key__": "silent", "png": photos[1], "txt": ""})
    return folder


def trained(
    home: Path, changes: tuple[str, ...], seeds: tuple[int, ...] = (0,), listener: Any = None
) -> dict[str, Any]:
    told: list[Event] = []
    return train_full(home, load_config(TrainConfig, None, changes), seeds, "s", "x", listener or told.append)


def losses(home: Path, result: dict[str, Any], seed: int) -> list[float]:
    group, _ = resolve_run(home, result["group"])
    return [row["loss"] for row in read_json_lines(group.seed_dir(seed) / "metrics.jsonl") if "loss" in row]


def test_a_run_on_shards_says_what_they_were_and_what_it_left_out(pack_home: Path, shards: Path) -> None:
    told: list[Event] = []
    pattern = f"{shards}/{{00000..00003}}.tar"
    result = trained(pack_home, (*SCRATCH, f"stream={pattern}"), (0, 1), told.append)
    group, _ = resolve_run(pack_home, result["group"])
    assert group.facts["pack"]["name"] == "small"
    stream = dict(group.facts["stream"])
    assert len(stream.pop("digest")) == 64
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert stream == {"pattern": pattern, "shards": 4, "samples": 125, "bytes": size}
    for seed in (0, 1):
        document = read_json(group.seed_dir(seed) / "result.json")
        figures, details = document["figures"], document["details"]
        assert details["stream"]["left_out"] == {
            "unreadable": 1, "without a caption": 1, "identical to an image of dev or test": 3
        }  # fmt: skip
        assert figures["features_s"] is None
        assert figures["epoch_10k_pairs_cached_s"] is None
        assert figures["epoch_10k_pairs_s"] == pytest.approx(10_000 / figures["pairs_per_s"])
        assert details["best_dev"]["rsum"] > 0
        # 125 samples counted, 120 pairs given: three updates an epoch by either.
        assert len(losses(pack_home, result, seed)) == 6
    notes = [event.message for event in told if isinstance(event, Note)]
    assert any("stream: 125 samples in 4 shards; dev is that of small" in note for note in notes)
    assert sum("3 identical to an image of dev or test" in note for note in notes) == 2, (
        "once a seed, not once an epoch"
    )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("loader", "decode"))]


def opened(home: Path, changes: tuple[str, ...]) -> Any:
    """Return a function seed -> two batches of pairs of a stream, its model in training as the loop leaves it."""
    from chimera_cli.models.dual_encoder import build_dual_encoder

    config = load_config(TrainConfig, None, changes)
    bench = Workbench(open_pack(home / "data", "small"), torch.device("cpu"), "float32")
    architecture = architecture_of(config.image, config.text, config.heads, config.loss, config.augmentation.flip)
    model = build_dual_encoder(architecture).train()
    told: list[Event] = []
    stream = open_stream(config, bench.pack, told.append)
    assert stream is not None

    def batches(seed: int, start: tuple[int, int] = (0, 0)) -> list[PairBatch]:
        with closing(stream_pairs(stream, bench, model, config, seed, told.append, start)) as pairs:
            return [next(pairs) for _ in range(4)]

    return batches, model, bench, told


def test_seed_and_epoch_decide_what_is_seen(pack_home: Path, shards: Path) -> None:
    batches, *_ = opened(pack_home, (*SCRATCH, "batch=60", f"stream={shards}"))
    first, again, other = batches(3), batches(3), batches(4)
    assert [(batch.epoch, batch.number, len(batch)) for batch in first] == [
        (0, 0, 60),
        (0, 1, 60),
        (1, 0, 60),
        (1, 1, 60),
    ]
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one.image, same.image)
        assert torch.equal(one.text["input_ids"], same.text["input_ids"])
    assert not torch.equal(first[0].image, other[0].image)
    for start in ((0, 1), (1, 0), (1, 1)):
        taken_up = batches(3, start)[0]
        expected = next(batch for batch in first if (batch.epoch, batch.number) == start)
        assert (taken_up.epoch, taken_up.number) == start
        assert torch.equal(taken_up.image, expected.image)
        assert torch.equal(taken_up.text["input_ids"], expected.text["input_ids"])
    assert first[0].image.shape == (60, 3, 32, 32)
    # Over an epoch every image once, in another order and otherwise cropped in the next.
    ids = [torch.cat([batch.image_ids for batch in first if batch.epoch == epoch]) for epoch in (0, 1)]
    assert ids[0].sort().values.equal(ids[1].sort().values)
    assert len(ids[0].unique()) == TRAIN
    assert not ids[0].equal(ids[1])


def test_an_image_whose_caption_names_a_side_is_not_mirrored(pack_home: Path, shards: Path) -> None:
    plain, *_ = opened(
        pack_home, (*SCRATCH, "augmentation.crop_scale=1", "augmentation.flip=false", f"stream={shards}")
    )
    maybe, model, *_ = opened(pack_home, (*SCRATCH, "augmentation.crop_scale=1", f"stream={shards}"))
    mirrored = 0
    for still, moved in zip(plain(0)[:3], maybe(0)[:3], strict=True):
        texts = model.text_tower._tokeniser.batch_decode(moved.text["input_ids"], skip_special_tokens=True)
        for text, image, other in zip(texts, still.image, moved.image, strict=True):
            assert torch.equal(image, other) or torch.equal(image.flip(-1), other)
            if mentions_side(text):
                assert torch.equal(image, other), text
            mirrored += not torch.equal(image, other)
    assert mirrored > 10


def test_a_locked_tower_sees_the_shards_as_it_would_see_a_pack(pack_home: Path, shards: Path) -> None:
    from chimera_cli.services.embeddings import locked_image_features, pooled_caption_features

    batches, model, bench, told = opened(pack_home, (*LOCKED, f"stream={shards}"))
    assert any("features are computed for every batch" in event.message for event in told if isinstance(event, Note))
    epoch = [batch for batch in batches(0) if batch.epoch == 0]
    image = torch.cat([batch.image for batch in epoch])
    text = torch.cat([batch.text for batch in epoch])
    assert not image.requires_grad
    assert not text.requires_grad
    cached = torch.from_numpy(locked_image_features(model, bench.pack, "train", bench.device, told.append).values[:, 0])
    # Each streamed image is one of the pack's, and all of them are there.
    places = torch.cdist(image, cached).argmin(dim=1)
    assert sorted(places.tolist()) == list(range(TRAIN))
    assert (image - cached[places]).abs().max() < 1e-4
    table = bench.pack.captions("train")
    known = torch.from_numpy(pooled_caption_features(model, bench.pack, "train", bench.device, told.append).values)
    rows = torch.cdist(text, known).argmin(dim=1)
    assert (table.image_positions[rows.numpy()] == places.numpy()).all(), "the caption is its image's own"
    assert (text - known[rows]).abs().max() < 1e-4


def test_a_locked_run_on_a_stream_caches_dev_alone(pack_home: Path, shards: Path) -> None:
    changes = (*LOCKED, f"stream={shards}", "text.learn_layers=0", "augmentation.flip=true")
    result = trained(pack_home, changes)
    assert result["figures"]["rsum"] is not None
    assert result["figures"]["epoch_10k_pairs_cached_s"] is None
    made = {path.name.partition("-")[0] for path in (pack_home / "data" / ".features" / "small").glob("*image*.npy")}
    assert "dev" in made


def test_what_can_not_be_trained_on_is_refused_and_leaves_no_group(
    pack_home: Path, shards: Path, tmp_path: Path, photos: list[bytes]
) -> None:
    before = len(list_groups(pack_home))
    with pytest.raises(ChimeraError, match="batch 500 is larger than the 125 samples of the stream") as caught:
        trained(pack_home, (*SCRATCH, f"stream={shards}", "batch=500"))
    assert caught.value.hint == "--set batch=62"
    with pytest.raises(UsageError, match="stream: "):
        trained(pack_home, (*SCRATCH, f"stream={tmp_path}/*.tar"))
    (tmp_path / "cut.tar").write_bytes((shards / "00000.tar").read_bytes()[:5000])
    with pytest.raises(ChimeraError, match=r"cut\.tar was cut off"):
        trained(pack_home, (*SCRATCH, f"stream={tmp_path}"))
    with pytest.raises(UsageError, match="feature_noise needs the cached features"):
        load_config(TrainConfig, None, [*LOCKED, "stream=x", "feature_noise=0.1"])
    with pytest.raises(UsageError, match="a stream has one caption of an image at a time"):
        load_config(TrainConfig, None, [*LOCKED, "stream=x", "captions_per_image=2"])
    with pytest.raises(UsageError, match="stream: string should have at least 1 character"):
        load_config(TrainConfig, None, [*LOCKED, "stream=''"])
    assert len(list_groups(pack_home)) == before


def test_a_stream_that_breaks_fails_the_run_and_says_so(pack_home: Path, shards: Path, tmp_path: Path) -> None:
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "00002_stats.json").write_text('{"successes": 999}', encoding="utf-8")
    with pytest.raises(ChimeraError, match=r"00002\.tar gave 31 images where 999 were counted"):
        trained(pack_home, (*SCRATCH, f"stream={tmp_path}"))
    assert list_groups(pack_home)[0].status == "failed" or "failed" in {g.status for g in list_groups(pack_home)}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("loader", "decode"))]


def test_the_command_trains_on_a_pattern_beside_a_pack_of_dev_images_alone(
    chimera: Chimera, shards: Path, tmp_path: Path, photos: list[bytes]
) -> None:
    import yaml

    write_pack(
        tmp_path / "data",
        name="small",
        source="toy",
        images=(decode(content, SIZE, "crop") for content in photos[TRAIN:]),
        items=TOY.items[TRAIN:],
        captions=[Caption(c.image - TRAIN, c.index, c.text) for c in TOY.captions if c.image >= TRAIN],
        size=SIZE,
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(load_config(TrainConfig, None, [*SCRATCH, "epochs=1"]).model_dump(mode="json")))
    pattern = f"{shards}/{{00000..00003}}.tar"
    done = chimera("train", "full", "--config", str(recipe), "--seeds", "0", "--json", "--set", f"stream={pattern}")
    assert done.code == 0, done.err
    assert done.json()["results"][0]["details"]["epochs_done"] == pytest.approx(120 / 125, abs=0.01)
    assert "stream: 125 samples in 4 shards" in done.err
    assert "3 identical to an image of dev or test" in done.err
