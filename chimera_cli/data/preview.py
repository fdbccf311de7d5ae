"""Images of a pack to look at: contact sheets with a text below each image, and small JPEGs."""

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from chimera_cli.data.pack import SPLITS, UNUSED, Pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.runs import cannot_write

_ACROSS, _DOWN = 6, 4
_TILE, _TEXT, _GAP = 200, 62, 10  # pixels: side of an image, height of its caption, space around
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_FONT_SIZE, _LETTERS, _LINES = 12, 34, 4
_JPEG_QUALITY = 82


def contact_sheet(pack: Pack, path: Path) -> Path:
    """Write 24 images, evenly spaced over the pack's first split, with a caption each; return `path`.

    Raises UsageError where `path` does not end in .png, .jpg, .jpeg or .webp, ChimeraError where it can't be written.
    """
    check_ending(path)
    split = next((split for split in (*SPLITS, UNUSED) if pack.manifest["splits"][split]["images"]), None)
    if split is None:
        raise ChimeraError(f"the pack {pack.name} has no images", "prepare it again")
    indices, table = pack.split_indices(split), pack.captions(split)
    rows = table.by_image()
    chosen = np.unique(np.linspace(0, len(indices) - 1, _ACROSS * _DOWN).astype(np.int64)).tolist()
    captions = [table.texts[rows[position][0]] if len(rows[position]) else "(no caption)" for position in chosen]
    return write_sheet(pack, [int(indices[position]) for position in chosen], captions, path)


def check_ending(path: Path) -> None:
    """Raise UsageError where `path` does not end as an image does that can be written."""
    if path.suffix.lower() not in _ENDINGS:
        raise UsageError(
            f"{path} has no ending of an image format that is written", f"it ends in {', '.join(_ENDINGS)}"
        )


def write_sheet(pack: Pack, indices: Sequence[int], texts: Sequence[str], path: Path) -> Path:
    """Write the images `indices` of a pack, six in a row, with a text below each; return `path`.

    Raises UsageError for an ending that no image has, ChimeraError where the file can't be written.
    """
    check_ending(path)
    width, height = _TILE + _GAP, _TILE + _TEXT + _GAP
    down = -(-len(indices) // _ACROSS)
    sheet = Image.new("RGB", (_ACROSS * width + _GAP, down * height + _GAP), "white")
    for place, (index, text) in enumerate(zip(indices, texts, strict=True)):
        left, top = place % _ACROSS * width + _GAP, place // _ACROSS * height + _GAP
        sheet.paste(_scaled(pack, index, _TILE), (left, top))
        _write(sheet, (left, top + _TILE + 2), text)
    try:
        sheet.save(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def small_jpeg(pack: Pack, index: int, side: int) -> bytes:
    """Return an image of a pack as a JPEG of `side` pixels."""
    buffer = io.BytesIO()
    _scaled(pack, index, side).save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def _scaled(pack: Pack, index: int, side: int) -> Image.Image:
    return Image.fromarray(np.array(pack.images[index])).resize((side, side), Image.Resampling.BICUBIC)


def _write(sheet: Image.Image, place: tuple[int, int], caption: str) -> None:
    clean = "".join(sign if sign.isprintable() else " " for sign in caption)
    text = "\n".join(wrap(clean, _LETTERS, max_lines=_LINES, placeholder=" …"))
    ImageDraw.Draw(sheet).multiline_text(place, text, fill="black", font=ImageFont.load_default(_FONT_SIZE), spacing=2)
