"""`chimera report`: result files in; Markdown, one HTML page, or a block in a README out."""

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli import runs
from chimera_cli.errors import ChimeraError, UsageError

if TYPE_CHECKING:
    from chimera_cli.reporting.document import Document
    from chimera_cli.reporting.facts import Curves, Evidence, Facts
    from chimera_cli.reporting.verdicts import Verdicts


@dataclass(frozen=True, slots=True)
class Report:
    """The report as Markdown and as JSON-ready `facts`.

    `html` is the page that was written and `updated` the file whose block is fresh, if they were asked for; `changed`
    says whether that file had to be written.
    """

    markdown: str
    facts: dict[str, Any]
    html: Path | None = None
    updated: Path | None = None
    changed: bool = False


def report(
    home: Path,
    run: str = "latest",
    *,
    profile: str | None = None,
    slo: Path | None = None,
    html: Path | None = None,
    update: Path | None = None,
) -> Report:
    """Return the report of a training run, write it with plots to `html` and in short between the markers of `update`.

    `profile` None: cpu for a run that was made without a GPU, else gpu; the report says which. Raises UsageError where
    `run` names nothing or no training run, `update` lacks its markers or `html` is something else than a page,
    ChimeraError for a page that can't be written. Broken result files are told in the report.
    """
    from chimera_cli.reporting import markdown, sections
    from chimera_cli.reporting.facts import collect, read_curves, with_problems
    from chimera_cli.reporting.verdicts import verdicts_of

    if html is not None:
        check_page(html, update)
    groups = runs.list_groups(home)
    group, seed = runs.resolve_run(home, run, groups=groups)
    if group.kind != "train":
        raise UsageError(
            f"{group.name} is a {group.kind} run", "report takes a train run and finds the benchmarks that fit it"
        )
    facts = collect(home, group, None if seed is None else (seed,), groups)
    curves = {} if html is None else read_curves(facts)
    facts = with_problems(facts, curves)
    check = _check(home, facts, profile, slo)
    verdicts = verdicts_of(check, _why_this_profile(profile, str(check["profile"])))
    document = sections.build(facts, verdicts)
    changed = update is not None and _update(update, facts, verdicts)
    if html is not None:
        _write_page(html, document, facts, curves, verdicts)
    return Report(markdown.render(document), _as_json(facts, check, html, update, changed), html, update, changed)


def _check(home: Path, facts: "Facts", profile: str | None, slo: Path | None) -> Mapping[str, Any]:
    from chimera_cli.services.slo import check

    run = facts.group.name if facts.seeds == facts.group.seeds else f"{facts.group.name}/seed-{facts.seeds[0]}"
    return check(home, run, slo, profile or _profile_of(facts))


def _profile_of(facts: "Facts") -> str:
    return "gpu" if (facts.group.facts.get("hardware") or {}).get("device") == "cuda" else "cpu"


def _why_this_profile(wanted: str | None, used: str) -> tuple[str, ...]:
    if wanted is not None or used == "gpu":
        return ()
    return (f"judged under profile {used}, because this run was made without a GPU",)


def check_page(html: Path, update: Path | None = None) -> None:
    """Raise UsageError where the page would replace something that is no page."""
    elsewhere = "name another file, such as report.html"
    if update is not None and html.resolve() == update.resolve():
        raise UsageError(f"--html and --update both name {html}", elsewhere)
    if html.is_dir():
        raise UsageError(f"{html} is a folder", f"name a file, such as {html / 'report.html'}")
    if not html.exists():
        return
    if not html.is_file():
        raise UsageError(f"{html} is no file", elsewhere)
    try:
        with html.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise ChimeraError(f"{html} can't be read: {error.strerror}", "check the file's permissions") from error
    # An empty file is what `mktemp` leaves.
    if start and not start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(b"<!doctype html"):
        raise UsageError(f"{html} exists and is no HTML page", f"{elsewhere}, or remove it first")


def _write_page(
    path: Path, document: "Document", facts: "Facts", curves: "Mapping[int, Curves]", verdicts: "Verdicts"
) -> None:
    from chimera_cli.reporting import html, plots
    from chimera_cli.reporting.facts import loader_curves

    drawn = plots.draw(facts, curves, loader_curves(facts), verdicts)
    runs.write_text(path, html.render(document, drawn, html.headlines(facts, verdicts), facts.group.name))


def _update(path: Path, facts: "Facts", verdicts: "Verdicts") -> bool:
    from chimera_cli.reporting import brief, markdown

    return update_block(path, markdown.render_blocks(brief.brief(facts, verdicts)))


def update_block(path: Path, block: str) -> bool:
    """Put `block` between the markers of a file, all else byte for byte as it was; return whether that changed it.

    The file is replaced in one step and keeps its permissions; behind a symbolic link its target is. Raises UsageError
    for a file that is missing or lacks its markers, ChimeraError for one that can't be read or written.
    """
    from chimera_cli.reporting.brief import BEGIN, END, replace_block

    target = path.resolve()
    if not target.is_file():
        hint = f"name a text file with the lines {BEGIN} and {END}"
        raise UsageError(f"{path} {'is no file' if target.exists() else 'does not exist'}", hint)
    try:
        old = target.read_bytes()
    except OSError as error:
        raise ChimeraError(f"{path} can't be read: {error.strerror}", "check the file's permissions") from error
    new = replace_block(old, block, str(path))
    if new == old:
        return False
    if not os.access(target, os.W_OK):
        raise ChimeraError(f"{path} is write-protected", f"allow it with `chmod u+w {path}`")
    _replace(target, new)
    return True


def _replace(path: Path, content: bytes) -> None:
    """Replace a file in one step, synced to disk, with its old permissions."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise runs.cannot_write(path, error) from error


def _as_json(
    facts: "Facts", check: Mapping[str, Any], html: Path | None, update: Path | None, changed: bool
) -> dict[str, Any]:
    """Return what the report says for programs: figures over seeds, those of the run's own dev split among them."""
    from chimera_cli.reporting.contingency import measures_of

    pack = (facts.group.facts.get("pack") or {}).get("name")
    dev = next((one.figures for one in facts.evaluations if (one.pack, one.split) == (pack, "dev")), {})
    figures = dict(facts.figures) | dict(dev)
    return {
        "schema_version": runs.SCHEMA_VERSION,
        "run": facts.group.name,
        "facts": dict(facts.group.facts),
        "figures": {name: None if summary is None else summary.as_dict() for name, summary in figures.items()},
        "evaluations": [
            {
                "pack": one.pack,
                "split": one.split,
                "seeds": list(one.by_seed),
                "mixed": one.mixed or None,
                "baseline": None if one.baseline is None else dict(one.baseline.get("figures") or {}),
                "figures": {name: None if s is None else s.as_dict() for name, s in one.figures.items()},
            }
            for one in facts.evaluations
        ],
        "measures": {str(seed): [dict(measure) for measure in measures_of(facts, seed)] for seed in facts.seeds},
        "benchmarks": {
            "prepare": _evidence(facts.prepare),
            "loader": _evidence(facts.loader),
            "encoders": _evidence(facts.encoders),
            "sanity": _evidence(facts.sanity),
            "retrieval": _evidence(facts.retrieval),
        },
        "contingency": [{"run": one.name, "status": one.status, **one.facts["plan"]} for one in facts.activations],
        "seal_problems": {problem: list(files) for problem, files in facts.seal_problems.items()},
        "slo": dict(check),
        "environment": dict(facts.environment),
        "html": None if html is None else str(html),
        "update": None if update is None else {"file": str(update), "changed": changed},
    }


def _evidence(evidence: "Evidence | None") -> dict[str, Any] | None:
    if evidence is None:
        return None
    details = {key: value for key, value in evidence.details.items() if key != "losses"}
    return {"run": evidence.group.name, "figures": evidence.figures, "details": details}
