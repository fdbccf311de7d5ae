"""The report in short, for a README: recall by split, verdicts, machine and command, between two markers."""

import re
from collections.abc import Iterator

from chimera_cli.errors import UsageError
from chimera_cli.figures import FIGURES, RECALLS
from chimera_cli.reporting.document import Block, Mono, Paragraph, Span, Strong, Text, table
from chimera_cli.reporting.facts import Facts
from chimera_cli.reporting.sections import run_line, warnings
from chimera_cli.reporting.verdicts import Verdicts, tally
from chimera_cli.reporting.words import hardware_line, sentence, spread, without_n

BEGIN, END = "<!-- chimera:report -->", "<!-- /chimera:report -->"

# A marker counts where it stands alone: a README may speak of it in the middle of a sentence.
_MARKER = re.compile(
    rb"^[ \t]*(" + re.escape(BEGIN.encode()) + rb"|" + re.escape(END.encode()) + rb")[ \t]*(\r?)$", re.MULTILINE
)


def brief(facts: Facts, verdicts: Verdicts) -> tuple[Block, ...]:
    """Return the blocks of the short form."""
    machine = hardware_line(facts.group.facts.get("hardware") or {})
    command = Mono(str(facts.group.facts.get("command") or "not recorded"))
    return (
        *warnings(facts, verdicts),
        Paragraph(run_line(facts)),
        *_recall(facts),
        Paragraph(_verdict_line(verdicts)),
        Paragraph((f"Hardware: {machine}. Command: ", command)),
    )


def _recall(facts: Facts) -> Iterator[Block]:
    if not facts.evaluations:
        yield Paragraph(("Not evaluated: run ", Mono(f"chimera eval --run {facts.group.name}"), "."))
        return
    columns = ("split", "seeds", *(name.replace("_r", " R@") for name in RECALLS), "rsum")
    rows: list[tuple[Text, ...]] = []
    for one in facts.evaluations:
        cells = [without_n(spread(name, one.figures.get(name))) for name in (*RECALLS, "rsum")]
        rows.append((f"{one.pack}, {one.split}", str(len(one.by_seed)), *cells))
    yield table(columns, rows, right=range(1, len(columns)))
    what = f"i2t is image to text, t2i is text to image, rsum is the {FIGURES['rsum'].label}"
    yield Paragraph(f"Mean ± sample standard deviation over seeds; {what}.")


def _verdict_line(verdicts: Verdicts) -> Text:
    """Return the verdicts in one sentence, the gravest first, with the remarks and waivers of every output."""
    parts: list[Span] = [f"Service level objectives{'' if verdicts.law else ' (not the law)'}: "]
    for number, (word, names) in enumerate(tally(verdicts).items()):
        parts += ["; " if number else "", Strong(f"{len(names)} {word}") if word != "pass" else f"{len(names)} pass"]
        for place, name in enumerate(names):
            parts += [", " if place else " (", Mono(name)]
        parts.append(")")
    told = (*verdicts.remarks, *(f"waiver: {waiver}" for waiver in verdicts.waivers))
    return (*parts, ".", *(f" {sentence(remark)}" for remark in told))


def replace_block(text: bytes, block: str, name: str) -> bytes:
    """Return `text` with what stands between the two markers replaced by `block`, all else byte for byte as it was.

    The block takes the line ends of the first marker. Raises UsageError, naming the file by `name`, unless each marker
    stands exactly once on a line of its own, the opening one first.
    """
    found = list(_MARKER.finditer(text))
    lines = {marker: [_line(text, match) for match in found if match[1] == marker.encode()] for marker in (BEGIN, END)}
    problem = _problem(lines)
    if problem:
        hint = f"put {BEGIN} and, below it, {END} on lines of their own where the report belongs"
        raise UsageError(f"{name} {problem}", hint)
    first, second = found
    line_end = first[2] + b"\n"
    lines_of_block = [b"", *block.strip("\n").encode().split(b"\n"), b"", b""]
    # From the end of the first marker's line to the start of the second one's: even their indentation stays.
    return text[: first.end()] + b"\n" + line_end.join(lines_of_block) + text[second.start() :]


def _line(text: bytes, match: re.Match[bytes]) -> int:
    return text.count(b"\n", 0, match.start()) + 1


def _problem(lines: dict[str, list[int]]) -> str:
    """Return what is wrong with the markers, found on these lines; empty where they are right."""
    for marker, places in lines.items():
        if not places:
            return f"has no line {marker}"
        if len(places) > 1:
            return f"has {marker} more than once, on lines {', '.join(map(str, places))}"
    begin, end = lines[BEGIN][0], lines[END][0]
    return f"has {END} on line {end} above {BEGIN} on line {begin}" if end < begin else ""
