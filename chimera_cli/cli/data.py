"""`chimera data`: make, describe and verify packs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType

from chimera_cli.cli.common import Json, emit, live, new_app
from chimera_cli.errors import ExitCode, UsageError
from chimera_cli.events import Event, Note
from chimera_cli.runs import home

app = new_app("Make packs from data sets, describe and verify them.")

Name = Annotated[str, typer.Argument(help="Name of a pack below data/.")]


_OF_IMAGES = "coco, karpathy, table"
_OF_TABLES = "table"
_OF_SPLITS = "table, webdataset"


@app.command("prepare")
def prepare(
    source: Annotated[str, typer.Argument(help="flickr8k, coco, karpathy, table, webdataset or toy.")],
    origin: Annotated[
        Path | None,
        typer.Option("--from", help="File, folder, zip file or pattern that holds it; flickr8k without it: download."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the pack; without it the source's or the file's.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels: 224, toy 96.")] = None,
    fit: Annotated[
        Literal["crop", "squash", "pad"], typer.Option(help="How photos become squares; crop as in CLIP.")
    ] = "crop",
    max_bad: Annotated[
        float, typer.Option(help="Share of absent or unreadable images that is skipped without an error.")
    ] = 0.01,
    max_pixels: Annotated[
        int | None, typer.Option(help="Images of more pixels count as unreadable: 89,478,485.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the photos; without it they are searched beside the list.", rich_help_panel=_OF_IMAGES
        ),
    ] = None,
    split_file: Annotated[
        Path | None,
        typer.Option(help="dataset_coco.json, for Karpathy's splits of COCO.", rich_help_panel="coco"),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column with paths, or with the images.", rich_help_panel=_OF_TABLES)
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column with captions; a list is several.", rich_help_panel=_OF_TABLES)
    ] = None,
    split_column: Annotated[
        str | None, typer.Option(help="Column with train, dev (val) or test.", rich_help_panel=_OF_TABLES)
    ] = None,
    split_seed: Annotated[
        int | None, typer.Option(help="Draw the splits by content with this seed: 0.", rich_help_panel=_OF_SPLITS)
    ] = None,
    dev_share: Annotated[
        float | None, typer.Option(help="Share of the images drawn for dev: 0.1.", rich_help_panel=_OF_SPLITS)
    ] = None,
    test_share: Annotated[
        float | None, typer.Option(help="Share of the images drawn for test: 0.1.", rich_help_panel=_OF_SPLITS)
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a pack from a source; the same source and options again change nothing."""
    from chimera_cli.services import data

    options = data.SourceOptions(
        images, split_file, image_column, caption_column, split_column, split_seed, dev_share, test_share
    )
    with live(f"prepare {source}") as tell:
        made = data.prepare(
            source,
            home=home(),
            origin=origin,
            name=name,
            size=size,
            fit=fit,
            max_bad=max_bad,
            max_pixels=max_pixels,
            options=options,
            listener=tell,
        )
    emit({"unchanged": made.unchanged, **data.describe(made.pack)}, as_json, _pack_facts)


@app.command("info")
def info(
    name: Annotated[str | None, typer.Argument(help="Name of a pack; without it all packs.")] = None,
    preview: Annotated[Path | None, typer.Option(help="Write 24 images with captions to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Counts, sizes and captions of a pack, or a list of all packs."""
    from chimera_cli.services import data

    if preview is not None and name is None:
        raise UsageError("--preview needs the name of a pack", "chimera data info NAME --preview sheet.png")
    result = data.info(home(), name, _warn)
    if preview is not None and name is not None:
        result["preview"] = str(data.preview(home(), name, preview))
    emit(result, as_json, _pack_list if name is None else _pack_info)


@app.command("verify")
def verify(name: Name, as_json: Json = False) -> None:
    """Read every byte of a pack and compare it with the manifest. Exit 1 when anything differs."""
    from chimera_cli.services import data

    with live(f"verify {name}") as listener:
        result = data.verify(home(), name, listener)
    emit(result, as_json, _verdict)
    if result["problems"]:
        raise typer.Exit(ExitCode.ERROR)


def _warn(event: Event) -> None:
    if isinstance(event, Note):
        typer.echo(f"warning: {event.message}", err=True)


def _pack_list(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import result_table

    if not result["packs"]:
        return "no packs yet: `chimera data prepare flickr8k` or `chimera data prepare toy`"
    rows = [
        (p["name"], p["source"], f"{p['image_count']:,}", f"{p['caption_count']:,}", f"{p['size']}", _size(p["bytes"]))
        for p in result["packs"]
    ]
    return result_table("packs", ("name", "source", "images", "captions", "pixels", "on disk"), rows)


def _pack_info(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import facts

    shown = _pack_facts(result["packs"][0])
    return Group(shown, facts("", [("contact sheet", result["preview"])])) if "preview" in result else shown


def _pack_facts(pack: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import facts

    splits = [
        (split, f"{counts['images']:,} images, {counts['captions']:,} captions")
        for split, counts in pack["splits"].items()
        if counts["images"]
    ]
    per_image, words = pack["captions_per_image"], pack["caption_words"]
    told = f"{pack['caption_count']:,}, {per_image['least']} to {per_image['most']} per image"
    if words:
        told += f", {words['least']} to {words['most']} words (mean {words['mean']:.1f})"
    rows = [("path", pack["path"]), ("source", pack["source"]), ("made", pack["created_at"])]
    rows += [("images", f"{pack['image_count']:,} of {pack['size']} px ({pack['fit']}), {_size(pack['bytes'])}")]
    rows += [("captions", told), *splits]
    if pack["columns"]:
        rows.append(("columns", ", ".join(pack["columns"])))
    rows += [*_skipped(pack), *_leakage(pack)]
    rows += [("fingerprint", pack["fingerprint"][:16]), ("licence", pack["licence"])]
    return facts(f"pack {pack['name']}" + (", unchanged" if pack.get("unchanged") else ""), rows)


def _skipped(pack: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how many images were skipped for each reason, the most frequent first, and the first three of them."""
    if not pack["skipped"]:
        return []
    reasons = [f"{count:,} {reason}" for reason, count in pack["skipped_reasons"].items()]
    files = [entry["source_file"] for entry in pack["skipped"]]
    return [("skipped", f"{_images(len(files))}: {_cut(reasons, 5)} ({_cut(files, 3)})")]


def _leakage(pack: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the images that are in several splits; packs of older versions did not look for them."""
    if pack["leakage"] is None:
        return []
    twins = [" = ".join(f"{file} ({split})" for file, split in entry["files"]) for entry in pack["leakage"]]
    if not twins:
        return [("leakage", "no image is in two splits")]
    verb = "is" if len(twins) == 1 else "are"
    return [("leakage", f"{_images(len(twins))} {verb} in several splits: {_cut(twins, 3)}")]


def _images(count: int) -> str:
    return f"{count:,} image" + ("" if count == 1 else "s")


def _cut(words: Sequence[str], most: int) -> str:
    """Return a list as text, with a count of what is beyond the first few."""
    return "; ".join(words[:most]) + (f"; … {len(words) - most:,} more" if len(words) > most else "")


def _verdict(result: Mapping[str, Any]) -> RenderableType:
    from chimera_cli.ui.tables import facts, word

    if not result["problems"]:
        return facts(f"pack {result['name']}", [("verdict", word("ok")), ("fingerprint", result["fingerprint"])])
    problems = [("problem", problem) for problem in result["problems"]]
    return facts(f"pack {result['name']}", [("verdict", word("failed")), *problems])


def _size(count: int) -> str:
    """Return bytes as GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
