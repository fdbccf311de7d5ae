"""What a run changed by itself while it was trained, as a report tells it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chimera_cli.errors import ChimeraError
from chimera_cli.reporting.document import Block, Paragraph, Strong, Text, table
from chimera_cli.reporting.facts import Facts
from chimera_cli.reporting.reading import mapping_of, number_of, tidy
from chimera_cli.reporting.words import DASH
from chimera_cli.runs import EVENTS, read_json_lines


def measures(facts: Facts) -> tuple[Block, ...]:
    """Return the table of contingency measures of all seeds in the order in which they were taken; () without any."""
    rows = [_row(seed, measure) for seed in facts.seeds for measure in measures_of(facts, seed)]
    if not rows:
        return ()
    text = "Contingency measures that training took by itself:"
    return (Paragraph(text), table(("seed", "after update", "measure"), rows, right=(0, 1)))


def measures_of(facts: Facts, seed: int) -> Iterator[Mapping[str, Any]]:
    """Yield the measures of a seed: those of its result, or of its events where it has none yet."""
    result = facts.results.get(seed)
    told: Any
    if result is None:
        told = _events(facts.group.seed_dir(seed) / EVENTS)
    else:
        told = mapping_of(result.get("details")).get("contingency")
    yield from (row for row in told if isinstance(row, Mapping)) if isinstance(told, list) else ()


def _events(path: Path) -> list[Any]:
    """Return what an unfinished seed has told of its measures so far; nothing where that can't be read."""
    try:
        return [tidy(row) for row in read_json_lines(path) if mapping_of(row).get("event") == "contingency"]
    except (ChimeraError, OSError, RecursionError):
        return []


def _row(seed: int, measure: Mapping[str, Any]) -> tuple[Text, ...]:
    step = number_of(measure.get("step"))
    what = str(measure.get("what", measure.get("measure", "?")))
    changed = "image.image_size" in mapping_of(measure.get("settings"))
    told: Text = (Strong("Another function."), " ", what) if changed else what
    return (str(seed), DASH if step is None else f"{step:,}", told)
