"""What `chimera eval` does besides recall: a page of errors, a search by words, classes from a file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from chimera_cli.cli.common import emit, live, write
from chimera_cli.errors import UsageError
from chimera_cli.runs import home

Errors = Annotated[
    Path | None,
    typer.Option(
        help="Write one HTML page with the worst and best queries and their images.", rich_help_panel="Errors"
    ),
]
Query = Annotated[
    str | None, typer.Option(help="Show the images of the split that are nearest to this.", rich_help_panel="Search")
]
Top = Annotated[int | None, typer.Option(min=1, help="How many images to show: 12.", rich_help_panel="Search")]
Sheet = Annotated[Path | None, typer.Option(help="Draw them on this PNG.", rich_help_panel="Search")]
Classes = Annotated[
    Path | None,
    typer.Option(help="File with one class per line: give each image to one.", rich_help_panel="Classification"),
]
Templates = Annotated[
    Path | None,
    typer.Option(help="File with one prompt per line, {} for the class.", rich_help_panel="Classification"),
]
Labels = Annotated[
    str | None,
    typer.Option(help="Column of the pack's items with the true classes.", rich_help_panel="Classification"),
]

_NEEDS = {"top": "query", "sheet": "query", "templates": "classes", "labels": "classes"}
_TOP = 12


@dataclass(frozen=True, slots=True)
class Looks:
    """The options of `chimera eval` that ask for something else than recall."""

    errors: Path | None
    query: str | None
    top: int | None
    sheet: Path | None
    classes: Path | None
    templates: Path | None
    labels: str | None

    def asked(self) -> str:
        """Return which of errors, query and classes is asked for, "" for none of them.

        Raises UsageError for two, and for an option whose other half is not there.
        """
        given = [name for name in ("errors", "query", "classes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"--{given[0]} and --{given[1]} are two commands", "ask for one of them at a time")
        for name, other in _NEEDS.items():
            if getattr(self, name) is not None and other not in given:
                raise UsageError(f"--{name} is only for --{other}", f"add --{other}, or leave --{name} out")
        return given[0] if given else ""


def show_look(
    looks: Looks, where: Mapping[str, Any], resamples: int, others: Mapping[str, object], as_json: bool
) -> None:
    """Do what is asked for; `where` are run, split, data and device.

    Raises UsageError where one of `others`, options of the evaluation by their names, was given as well.
    """
    asked = looks.asked()
    for name, value in others.items():
        if value is not None:
            raise UsageError(f"--{name} and --{asked} are two commands", "ask for one of them at a time")
    _COMMANDS[asked](looks, where, resamples, as_json)


# ---- a page of errors -----------------------------------------------------------------------------------------------


def _errors(looks: Looks, where: Mapping[str, Any], _resamples: int, as_json: bool) -> None:
    from chimera_cli.services.eval_errors import error_page

    assert looks.errors is not None
    with live(f"eval {where['split']}") as listener:
        result = error_page(home(), looks.errors, **where, listener=listener)
    emit(result, as_json, _page)


def _page(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import result_table

    rows = []
    for key, words in (("t2i", "caption"), ("i2t", "image")):
        for kind in ("worst", "best"):
            for one in result["cases"][key][kind][:1]:
                what = one["captions"][0] if key == "t2i" else one["file"]
                rows.append((f"{kind} {words}", f"{one['rank']:,}", f"{one['score']:.3f}", what))
    title = f"{result['page']}: seed {result['seed']} of {result['run']} on {result['pack']['name']}, {result['split']}"
    return Group(result_table(title, ("query", "rank", "similarity", ""), rows), *_test_looks(result))


# ---- search ---------------------------------------------------------------------------------------------------------


def _query(looks: Looks, where: Mapping[str, Any], _resamples: int, as_json: bool) -> None:
    from chimera_cli.services.eval_query import search_images

    assert looks.query is not None
    top = _TOP if looks.top is None else looks.top
    with live(f"search {where['split']}") as listener:
        result = search_images(home(), looks.query, **where, top=top, sheet=looks.sheet, listener=listener)
    if as_json:
        emit(result, as_json, str)
        return
    write("".join(f"{one['score']:.4f}\t{_on_one_line(one['file'])}\n" for one in result["images"]))
    if result["sheet"] is not None:
        typer.echo(f"{result['sheet']} shows them", err=True)


def _on_one_line(name: str) -> str:
    """Return a name that neither breaks a line or a column nor steers the terminal."""
    from chimera_cli.ui.text import CONTROLS

    return CONTROLS.sub(" ", name)


# ---- classes --------------------------------------------------------------------------------------------------------


def _classes(looks: Looks, where: Mapping[str, Any], resamples: int, as_json: bool) -> None:
    from chimera_cli.services.eval_classes import classify_images

    assert looks.classes is not None
    with live(f"classify {where['split']}") as listener:
        result = classify_images(
            home(),
            looks.classes,
            looks.templates,
            looks.labels,
            **where,
            resamples=resamples,
            listener=listener,
        )
    if as_json or looks.labels is not None:
        emit(result, as_json, _accuracy)
        return
    best = [(one["classes"][0], one["file"]) for one in result["predictions"]]
    write("".join(f"{one['score']:.4f}\t{_on_one_line(one['class'])}\t{_on_one_line(file)}\n" for one, file in best))


def _accuracy(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.figures import FIGURES, format_value
    from chimera_cli.ui.tables import result_table

    first, rows = result["by_seed"][0], []
    for name in result["figures"]:
        ends = first["intervals"].get(name)
        low, high = ("", "") if ends is None else (format_value(name, end).removesuffix(" %") for end in ends)
        cells = [_spread(name, result["over_seeds"][name]), f"{low}–{high}" if ends else "–"]
        rows.append((FIGURES[name].label, *cells, format_value(name, result["chance"][name])))
    by_class = [
        (
            one["class"],
            f"{one['images']:,}",
            format_value("zero_shot_top1", one["recall"]),
            one["mistaken_for"] or "–",
            format_value("zero_shot_top1", one["mistaken_share"]),
        )
        for one in result["by_class"]
    ]
    columns = ("figure", "mean ± std (n)", f"seed {first['seed']} (95 %)", "chance")
    title = f"{result['column']}: {result['run']} on {result['pack']['name']}, {result['split']}"
    remark = f"{result['images']:,} images, {len(result['classes'])} classes, {len(result['templates'])} prompts each"
    return Group(
        result_table(title, columns, rows),
        Text(remark, style="dim"),
        Text(""),
        result_table("", ("class", "images", "recall", "mistaken most for", "in"), by_class),
        *_test_looks(result),
    )


def _spread(name: str, summary: Mapping[str, Any] | None) -> str:
    from chimera_cli.figures import format_spread

    return "–" if summary is None else format_spread(name, summary["mean"], summary["std"], summary["n"])


def _test_looks(result: Mapping[str, Any]) -> list[Text]:
    if result["split"] != "test":
        return []
    return [Text(f"looks at the test split with this run: {result['test_looks']}", style="dim")]


_COMMANDS: Mapping[str, Callable[[Looks, Mapping[str, Any], int, bool], None]] = {
    "errors": _errors,
    "query": _query,
    "classes": _classes,
}
