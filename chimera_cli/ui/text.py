"""Foreign text made harmless: captions and names may carry Rich markup, terminal escapes or line breaks."""

import re

from rich.markup import escape

# C0 and C1 controls, and those that turn the direction of writing; an escape sequence without its ESC is plain text.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str, limit: int = 0) -> str:
    """Return `text` for a Rich console: controls as spaces, markup escaped, cut to `limit` characters (0: no)."""
    clean = CONTROLS.sub(" ", text)
    if limit and len(clean) > limit:
        clean = clean[: limit - 1] + "…"
    return escape(clean)
