"""One self-contained page with the queries that a model does worst and best: what it was to find and what it found."""

from dataclasses import dataclass
from typing import Any

from chimera_cli.figures import format_value
from chimera_cli.reporting import drawing
from chimera_cli.reporting.document import clean
from chimera_cli.reporting.html import Headline, style, template_of


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of the page: its file in the source and, as a JPEG in base64, its pixels."""

    file: str
    jpeg: str


@dataclass(frozen=True, slots=True)
class Found:
    """One of the things a query found: an image, a caption with the image that it belongs to, and the similarity.

    `own` where it is what the query should find.
    """

    picture: Picture
    score: float
    own: bool
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """A query: an image and its captions (image to text), or a caption and its image (text to image)."""

    picture: Picture
    captions: tuple[str, ...]
    rank: int
    gallery: int
    score: float
    found: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Direction:
    """One direction of retrieval: its worst and best cases, and the shares of queries by groups of ranks."""

    key: str
    title: str
    worst: tuple[Case, ...]
    best: tuple[Case, ...]
    queries: int
    histogram: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Page:
    """All that the page says; `remarks` stand below its title."""

    title: str
    remarks: tuple[str, ...]
    headlines: tuple[Headline, ...]
    directions: tuple[Direction, ...]


def render(page: Page) -> str:
    """Return the page. All text is escaped by the template; drawings are this program's own SVG, images JPEGs."""
    from markupsafe import Markup

    return template_of("errors_page.html").render(
        page=page,
        style=style(),
        clean=clean,
        drawn=Markup,
        plots={one.key: _histogram(one) for one in page.directions},
        words={one.key: _told(one) for one in page.directions},
        similarity=lambda score: f"{score:.3f}".replace("-", "\N{MINUS SIGN}"),
    )


def _histogram(direction: Direction) -> str:
    figure, axes = drawing.canvas("rank of what was to be found", "share of queries, %")
    shares = [100 * share for _, share in direction.histogram]
    axes.bar(range(len(shares)), shares, width=0.72, color=drawing.series(0 if direction.key == "i2t" else 1))
    for place, share in enumerate(shares):
        text = f"{share:.1f}" if share < 10 else f"{share:.0f}"
        where: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "center",
            "fontsize": drawing.TEXT_PT - 0.5,
            "color": drawing.INK,
        }
        axes.annotate(text, (place, share), (0, 3), **where)
    labels = [label for label, _ in direction.histogram]
    axes.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > 4 else 0)
    axes.grid(visible=False, axis="x")
    drawing.from_zero(axes, max([*shares, 1.0]) * 1.05)
    return drawing.svg(figure, f"ranks-{direction.key}", f"{direction.title}. {_told(direction)}")


def _told(direction: Direction) -> str:
    """Return the histogram in words."""
    shares = ", ".join(f"{label}: {format_value('t2i_r1', share)}" for label, share in direction.histogram)
    return f"Ranks of {direction.queries:,} queries: {shares}."
