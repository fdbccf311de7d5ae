"""Figures in the words of a report: a missing one is a dash or the command that measures it."""

import re
from collections.abc import Mapping
from typing import Any

from chimera_cli.figures import format_spread, format_value
from chimera_cli.reporting.document import Mono, Span, Text
from chimera_cli.statistics import Summary

DASH = "–"


def spread(name: str, summary: Summary | None) -> str:
    """Return a figure over seeds as text."""
    return DASH if summary is None else format_spread(name, summary.mean, summary.std, summary.n)


def without_n(text: str) -> str:
    """Return a spread without its number of seeds, where a heading says it for all."""
    return re.sub(r" \(n=\d+\)$", "", text)


def format_ms(value: float | None) -> str:
    """Return milliseconds with three meaningful digits."""
    if value is None:
        return DASH
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} ms"


def times(value: float | None) -> str:
    """Return a ratio with three meaningful digits: `0.84×`, `21.3×`, `120×`."""
    if value is None:
        return DASH
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}×"


def gib(value: float | None) -> str:
    """Return GiB."""
    return format_value("vram_peak_gb", value)


def plural(count: int, word: str) -> str:
    """Return `1 seed`, `3 seeds`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def unmeasured(name: str, command: str, width: int) -> tuple[Text, ...]:
    """Return a row of dashes that names what would fill it in."""
    return (((f"{name}: not measured here, run ", Mono(command))), *[DASH] * (width - 1))


def hardware_line(hardware: Mapping[str, Any]) -> str:
    """Return the machine in one line."""
    cpu = f"{hardware.get('cpu') or 'unknown processor'}, {hardware.get('cores', '?')} cores"
    return f"{hardware['gpu']}; {cpu}" if hardware.get("gpu") else f"{cpu}, no GPU"


def commit_words(environment: Mapping[str, Any]) -> tuple[Span, ...]:
    """Return the commit of an environment.json, and whether it had uncommitted changes."""
    commit = environment.get("git_commit")
    if not commit:
        return ("no git commit",)
    return ("commit ", Mono(commit[:12]), " with uncommitted changes" if environment.get("git_dirty") else "")


def sentence(text: str) -> str:
    """Return a remark as a sentence of its own."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
