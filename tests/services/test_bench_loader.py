"""The loader's benchmark on a pack of a few images: what it measures, what it writes, and what it says limits it."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chimera_cli.config import TrainConfig, validate
from chimera_cli.data.pack import Caption, Item, Pack, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Progress
from chimera_cli.runs import latest_group, read_json
from chimera_cli.services.bench_loader import (
    LoaderSetting,
    LoaderTimes,
    augmenter,
    bench_loader,
    bound_by,
    endless_batches,
    loader_setting,
    may_flip,
    measure_copy,
    measure_loader,
    measure_stages,
    ready_batches,
)
from chimera_cli.services.training_step import make_training_step

SIZE = 32
CPU = torch.device("cpu")
SCRATCH = {
    "image": {"weights": "tiny", "image_size": SIZE, "locked": False},
    "text": {"weights": "tiny", "learn_layers": None},
    "heads": {"kind": "linear", "dim": 8},
    "batch": 4,
}


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    generator = np.random.default_rng(0)
    pictures = [
        Picture(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), str(i), SIZE, SIZE) for i in range(20)
    ]
    items = [Item(f"{index}.png", "train" if index < 16 else "dev") for index in range(20)]
    captions = [Caption(index, 0, f"picture number {index}" + " on the left" * (index == 3)) for index in range(20)]
    return write_pack(
        tmp_path / "data", name="few", source="test", images=pictures, items=items, captions=captions, size=SIZE
    )


def loader(home: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "seconds": 0.2,
        "batch": 5,
        "config_path": None,
        "device": "cpu",
        "command": "chimera x",
    }
    return bench_loader(home, "few", **(settings | changes))


def train_config(**changes: Any) -> TrainConfig:
    return validate(TrainConfig, SCRATCH | changes, "test")


# ---- the command ----------------------------------------------------------------------------------------------------


def test_it_writes_a_finished_group_with_its_evidence(pack: Pack, tmp_path: Path) -> None:
    told: list[Event] = []
    result = loader(tmp_path, listener=told.append)
    group = latest_group(tmp_path, "bench-loader")
    assert (group.name, group.status) == (result["group"], "finished")
    assert group.facts["pack"]["fingerprint"] == pack.fingerprint
    stored = read_json(group.seed_dir(0) / "result.json")
    assert {name: stored[name] for name in result if name != "group"} == {
        name: value for name, value in result.items() if name != "group"
    }
    figures, details = stored["figures"], stored["details"]
    # Epochs of 16 images are joined: every batch of the window is full.
    images = figures["loader_images_per_s"] * details["seconds"]
    assert images == pytest.approx(5 * details["batches"])
    assert figures["gpu_util_mean"] is None
    assert figures["vram_peak_gb"] is None
    assert [stage["stage"] for stage in details["stages"]] == ["gather", "augment"]
    assert details["latency_ms_p50"] <= details["latency_ms_p95"]
    assert details["bound_by"] in ("cpu", "disk")
    assert "peers" not in details
    assert "bus" not in details
    stages = {event.stage: (event.done, event.total) for event in told if isinstance(event, Progress)}
    assert {"stages alone", "memory copy"} <= stages.keys()
    assert all(done == total for done, total in stages.values())


def test_size_batch_and_augmentation_come_from_a_config(pack: Pack, tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "image: {weights: tiny, image_size: 48, locked: false}\nbatch: 4\naugmentation: {crop_scale: 0.5, flip: true}\n"
    )
    details = loader(tmp_path, batch=None, config_path=config)["details"]
    assert (details["image_size"], details["batch"], details["crop_scale"], details["flip"]) == (48, 4, 0.5, True)
    assert details["config"] == str(config)


def test_a_batch_beyond_the_training_split_is_a_usage_error(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a batch of 1,000,000,000 is more than the 16 images") as caught:
        loader(tmp_path, batch=1_000_000_000)
    assert "--batch 16" in caught.value.hint
    assert not (tmp_path / "runs").exists()


def test_an_unknown_pack_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        loader(tmp_path)


# ---- what is loaded -------------------------------------------------------------------------------------------------


def test_batches_without_end_hold_every_image_once_per_epoch_in_new_orders(pack: Pack) -> None:
    indices = pack.split_indices("train")
    batches = endless_batches(pack.images, indices, 5, CPU)
    pixels, positions = [], []
    for part, where in itertools.islice(batches, 7):
        pixels += [picture.tobytes() for picture in part]
        positions += where.tolist()
    batches.close()
    # Seven batches of five: two epochs of 16 and three images of the third.
    assert [pack.images[indices[position]].tobytes() for position in positions] == pixels
    assert [sorted(positions[:16]), sorted(positions[16:32])] == [list(range(16))] * 2
    assert positions[:16] != positions[16:32]


def test_pixels_are_normalised_by_the_statistics_of_the_setting() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    setting = LoaderSetting(SIZE, 3, 1.0, False, None, mean=mean, std=std)
    floats = augmenter(setting, CPU)(torch.from_numpy(pixels), np.arange(3))
    wanted = (pixels / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(floats.numpy(), wanted.transpose(0, 3, 1, 2), atol=1e-5)
    cropped = augmenter(LoaderSetting(48, 3, 0.5, True, None), CPU)(torch.from_numpy(pixels), np.arange(3))
    assert cropped.shape == (3, 3, 48, 48)


def test_the_setting_of_a_config_takes_the_statistics_of_its_tower(pack: Pack) -> None:
    config = train_config(image={"weights": "resnet18", "image_size": 64, "locked": False})
    setting = loader_setting(pack, None, config)
    assert setting.mean == pytest.approx((0.485, 0.456, 0.406))
    assert setting.std == pytest.approx((0.229, 0.224, 0.225))
    assert (setting.image_size, setting.batch, setting.config) == (64, 4, None)
    several = config.model_copy(update={"batch": 12, "captions_per_image": 3})
    assert loader_setting(pack, None, several).batch == 4, "an image is read once for all its captions"


def test_an_image_whose_captions_name_a_side_is_never_mirrored(pack: Pack) -> None:
    setting = LoaderSetting(SIZE, 16, 1.0, True, None)
    allowed = may_flip(pack, setting)
    assert allowed is not None
    assert allowed.tolist() == [index != 3 for index in range(16)]
    prepare = augmenter(setting, CPU, allowed)
    pixels = torch.from_numpy(np.array(pack.images[:16]))
    straight = augmenter(LoaderSetting(SIZE, 16, 1.0, False, None), CPU)(pixels, np.arange(16)).clone()
    mirrored = np.zeros(16, dtype=bool)
    for _ in range(20):
        result = prepare(pixels, np.arange(16))
        mirrored |= np.array([not torch.equal(a, b) for a, b in zip(result, straight, strict=True)])
    assert mirrored.tolist() == [index != 3 for index in range(16)]


# ---- windows and stages ---------------------------------------------------------------------------------------------


def test_throughput_and_waiting_of_a_window_by_hand() -> None:
    times = LoaderTimes(images=600, seconds=2.0, latency_s=(0.5, 1.5), wait_s=(0.1, 0.3))
    assert times.images_per_s == 300
    assert times.wait_share == pytest.approx(0.2)


def test_a_window_counts_what_was_used_after_the_warm_up(pack: Pack) -> None:
    setting = LoaderSetting(SIZE, 4, 1.0, False, None)
    used: list[int] = []

    def feed(batches: Iterator[Tensor]) -> None:
        used.extend(len(batch) for batch in batches)

    batches = ready_batches(pack.images, pack.split_indices("train"), 4, CPU, augmenter(setting, CPU))
    times = measure_loader(batches, feed, 0.1, CPU, lambda _event: None)
    batches.close()
    assert len(times.latency_s) == len(times.wait_s) == len(used) - 3
    assert times.images == 4 * len(times.latency_s)
    assert times.seconds >= 0.1
    assert all(waited <= took for waited, took in zip(times.wait_s, times.latency_s, strict=True))


@pytest.mark.parametrize(
    ("device", "wait_share", "gather_ms", "augment_ms", "copy_ms", "limit"),
    [
        ("cpu", 0.1, 1.0, 50.0, 1.0, "cpu"),
        ("cpu", 0.9, 90.0, 50.0, 1.0, "disk"),
        ("cpu", 0.9, 90.0, 50.0, 60.0, "cpu"),
        ("cuda", 0.02, 1.0, 50.0, 1.0, "gpu"),
        ("cuda", 0.5, 10.0, 5.0, 8.0, "cpu"),
        ("cuda", 0.5, 100.0, 5.0, 8.0, "disk"),
    ],
)
def test_what_limits_the_throughput(
    device: str, wait_share: float, gather_ms: float, augment_ms: float, copy_ms: float, limit: str
) -> None:
    stages = [{"stage": "gather", "p50_ms": gather_ms}, {"stage": "augment", "p50_ms": augment_ms}]
    assert bound_by(device, wait_share, stages, copy_ms) == limit


@pytest.mark.parametrize("batch", [4, 50])
def test_the_ceiling_is_a_copy_in_turn_with_the_gathering(pack: Pack, batch: int) -> None:
    told: list[Event] = []
    ceiling = measure_copy(pack.images, pack.split_indices("train"), batch, told.append)
    assert ceiling["share_least"] <= ceiling["share_reached"] <= ceiling["share_most"]
    assert ceiling["copy_ms"] == pytest.approx(1000 * batch / ceiling["images_per_s"])
    assert ceiling["gather_images_per_s"] > 0
    assert len(told) == ceiling["rounds"] == 15


# ---- the real step --------------------------------------------------------------------------------------------------


def train_on(count: int, config: TrainConfig, pack: Pack) -> None:
    """Run the step on so many batches of noise."""
    pairs, run = make_training_step(config, pack, CPU)
    generator = torch.Generator().manual_seed(0)
    run(pairs(torch.randn(4, 3, SIZE, SIZE, generator=generator)) for _ in range(count))


def test_the_real_step_is_one_run_of_the_training_loop(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    scaler = torch.amp.grad_scaler.GradScaler
    make = scaler.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(1)
        make(self, *args, **kwargs)

    monkeypatch.setattr(scaler, "__init__", counted)
    norms: list[float] = []
    adamw = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        return adamw(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train_on(5, train_config(optimiser={"clip_norm": 1e-3}), pack)
    assert len(made) == 1
    assert len(norms) == 5
    # The clipping of the config, not a default, has limited each whole gradient.
    assert all(norm <= 1e-3 * 1.001 for norm in norms)


def test_the_real_step_has_all_captions_of_each_image(pack: Pack) -> None:
    pairs, run = make_training_step(train_config(captions_per_image=3, batch=12), pack, CPU)
    batch = pairs(torch.randn(4, 3, SIZE, SIZE))
    assert (len(batch.image), len(batch)) == (4, 12)
    assert isinstance(batch.text, Mapping)
    assert len(batch.text["input_ids"]) == 12
    assert batch.image_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    run(iter([batch]))


def test_the_real_step_runs_until_its_batches_fail(pack: Pack) -> None:
    pairs, run = make_training_step(train_config(), pack, CPU)

    def broken() -> Iterator[Any]:
        yield pairs(torch.randn(4, 3, SIZE, SIZE))
        raise ChimeraError("the disk is gone", "")

    with pytest.raises(ChimeraError, match="the disk is gone"):
        run(broken())


def test_a_locked_text_tower_encodes_its_captions_once(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    from chimera_cli.models.text_tower import TextTower

    calls: list[int] = []
    encode = TextTower.forward
    monkeypatch.setattr(TextTower, "forward", lambda self, tokens: calls.append(1) or encode(self, tokens))
    train_on(3, train_config(text={"learn_layers": 0}), pack)
    assert len(calls) == 1


def test_the_real_step_is_fed_and_timed(pack: Pack) -> None:
    setting = LoaderSetting(SIZE, 4, 1.0, False, None)
    step = make_training_step(train_config(), pack, CPU)
    indices, prepare = pack.split_indices("train"), augmenter(setting, CPU)
    batches = ready_batches(pack.images, indices, 4, CPU, prepare, step)
    times = measure_loader(batches, step[1], 0.1, CPU, lambda _event: None)
    batches.close()
    assert times.images == 4 * len(times.latency_s) > 0
    stages = measure_stages(pack.images, indices, setting, prepare, step, CPU)
    assert [stage["stage"] for stage in stages] == ["gather", "augment", "training step"]


def test_a_pack_without_captions_has_no_training_step(tmp_path: Path) -> None:
    pictures = [Picture(np.zeros((SIZE, SIZE, 3), dtype=np.uint8), str(i), SIZE, SIZE) for i in range(4)]
    items = [Item(f"{i}.png", "train") for i in range(4)]
    mute = write_pack(tmp_path / "data", name="mute", source="test", images=pictures, items=items, size=SIZE)
    with pytest.raises(ChimeraError, match="no captions"):
        make_training_step(train_config(), mute, CPU)
