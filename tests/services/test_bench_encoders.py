"""The encoders' benchmark on a pack of a few images: what it measures and what it writes."""

from pathlib import Path

import numpy as np
import pytest

from chimera_cli.data.pack import Caption, Item, Pack, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.events import Event, Progress
from chimera_cli.runs import latest_group
from chimera_cli.services.bench_encoders import bench_encoders

SIZE = 32


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
