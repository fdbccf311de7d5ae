"""The contact sheet: which endings it takes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chimera_cli.data.pack import Item, Pack, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.data.preview import contact_sheet
from chimera_cli.errors import UsageError


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    return write_pack(
        tmp_path / "data", name="p", source="s", images=[Picture(pixels, "x", 8, 8)], items=[Item("a", "test")], size=8
    )


@pytest.mark.parametrize("ending", [".png", ".JPG", ".jpeg", ".webp"])
def test_every_ending_it_names_is_written(pack: Pack, tmp_path: Path, ending: str) -> None:
    with Image.open(contact_sheet(pack, tmp_path / f"sheet{ending}")) as sheet:
        assert sheet.width > 1000


@pytest.mark.parametrize("ending", [".xyz", "", ".hdf5", ".palm", ".psd"])
def test_other_endings_are_usage_errors(pack: Pack, tmp_path: Path, ending: str) -> None:
    with pytest.raises(UsageError) as caught:
        contact_sheet(pack, tmp_path / f"sheet{ending}")
    assert all(word in caught.value.hint for word in ("png", "jpg", "webp"))
    assert not list(tmp_path.glob("sheet*"))
