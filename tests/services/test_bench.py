"""The benchmarks on a pack of a few images: what they measure, what they write, and the judgement on what limits."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chimera_cli.data.pack import Caption, Item, Pack, Picture, write_pack
from chimera_cli.errors import UsageError
from chimera_cli.events import Event, Progress
from chimera_cli.runs import latest_group, read_json
from chimera_cli.services.bench import (
    LoaderSetting,
    LoaderTimes,
    augmenter,
    bench_encoders,
    bench_loader,
    bound_by,
    endless_batches,
    percentiles_ms,
)

SIZE = 32
CPU = torch.device("cpu")


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    generator = np.random.default_rng(0)
    pictures = [
        Picture(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), str(i), SIZE, SIZE) for i in range(20)
    ]
    items = [Item(f"{index}.png", "train" if index < 16 else "dev") for index in range(20)]
    captions = [Caption(index, 0, f"picture number {index}") for index in range(20)]
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


def test_loader_writes_a_finished_group_with_its_evidence(pack: Pack, tmp_path: Path) -> None:
    result = loader(tmp_path)
    group = latest_group(tmp_path, "bench-loader")
    assert (group.name, group.status) == (result["group"], "finished")
    assert group.facts["pack"]["fingerprint"] == pack.fingerprint
    stored = read_json(group.seed_dir(0) / "result.json")
    assert stored == {name: value for name, value in result.items() if name != "group"}
    figures, details = stored["figures"], stored["details"]
    # 16 images in batches of five: 5, 5, 5, 1. The mean batch holds four.
    images = figures["loader_images_per_s"] * details["seconds"]
    assert 1 <= round(images) <= 5 * details["batches"]
    assert images == pytest.approx(round(images), abs=1e-6)
    assert figures["gpu_util_mean"] is None
    assert figures["vram_peak_gb"] is None
    assert [stage["stage"] for stage in details["stages"]] == ["gather", "augment"]
    assert details["latency_ms_p50"] <= details["latency_ms_p95"]
    ceiling = details["ceiling"]
    assert ceiling["share_reached"] == pytest.approx(figures["loader_images_per_s"] / ceiling["images_per_s"])
    assert details["bound_by"] in ("cpu", "disk")


def test_loader_takes_size_batch_and_augmentation_from_a_config(pack: Pack, tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "image: {weights: tiny, image_size: 48, locked: false}\nbatch: 4\naugmentation: {crop_scale: 0.5, flip: true}\n"
    )
    details = loader(tmp_path, batch=None, config_path=config)["details"]
    assert (details["image_size"], details["batch"], details["crop_scale"], details["flip"]) == (48, 4, 0.5, True)
    assert details["config"] == str(config)


def test_loader_with_an_unknown_pack_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        loader(tmp_path)


def test_batches_without_end_hold_every_image_once_per_epoch_in_new_orders(pack: Pack) -> None:
    indices = pack.split_indices("train")
    batches = endless_batches(pack.images, indices, 5)
    rows = [picture.tobytes() for part in itertools.islice(batches, 8) for picture in part]
    batches.close()
    epochs = rows[:16], rows[16:]
    wanted = sorted(pack.images[index].tobytes() for index in indices)
    assert [sorted(epoch) for epoch in epochs] == [wanted, wanted]
    assert epochs[0] != epochs[1]


def test_pixels_without_augmentation_are_scaled_to_minus_one_to_one() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    floats = augmenter(LoaderSetting(SIZE, 3, 1.0, False, None), CPU)(pixels)
    np.testing.assert_allclose(floats.numpy(), pixels.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert augmenter(LoaderSetting(48, 3, 0.5, True, None), CPU)(pixels).shape == (3, 3, 48, 48)


def test_throughput_and_waiting_of_a_window_by_hand() -> None:
    times = LoaderTimes(images=600, seconds=2.0, latency_s=(0.5, 1.5), wait_s=(0.1, 0.3))
    assert times.images_per_s == 300
    assert times.wait_share == pytest.approx(0.2)
    assert percentiles_ms([0.1] * 50 + [0.2] + [0.3] * 50) == pytest.approx((200.0, 300.0))


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


@pytest.mark.parametrize("data", ["few", None])
def test_encoders_write_a_row_for_each_tower(pack: Pack, tmp_path: Path, data: str | None) -> None:
    told: list[Event] = []
    home = tmp_path if data else tmp_path / "empty"
    result = bench_encoders(
        home, image="tiny", text="tiny", image_size=64, batch=4, repeats=3, device="cpu", data=data,
        command="chimera x", listener=told.append,
    )  # fmt: skip
    assert latest_group(home, "bench-encoders").name == result["group"]
    rows = result["details"]["components"]
    assert [(row["component"], row["unit"]) for row in rows] == [
        ("image encoder", "images"),
        ("text encoder", "captions"),
    ]
    for row in rows:
        assert row["throughput_per_s"] == pytest.approx(4000 / row["latency_ms_p50"])
        assert row["gflops_per_batch"] > 0
        assert 0 < row["ceiling"]["share_reached"] < 1
        assert row["vram_peak_gb"] is None
    stages = {event.stage: event.done for event in told if isinstance(event, Progress)}
    assert stages == {"image encoder": 3, "text encoder": 3}
