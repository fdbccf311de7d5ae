"""`chimera report`: result files in, Markdown and one HTML page out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli import runs
from chimera_cli.errors import UsageError

if TYPE_CHECKING:
    from chimera_cli.reporting.facts import Evidence, Facts
    from chimera_cli.reporting.sections import Verdicts


@dataclass(frozen=True, slots=True)
class Report:
    """The report as Markdown and as JSON-ready `facts`; `html` is the page that was written, if one was asked for."""

    markdown: str
    facts: dict[str, Any]
    html: Path | None


def report(
    home: Path, run: str = "latest", *, profile: str | None = None, slo: Path | None = None, html: Path | None = None
) -> Report:
    """Return the report of a training run and write it with plots to `html` where one is given.

    `profile` None: cpu for a run that was made without a GPU, else gpu; the report says which. Raises UsageError where
    `run` names nothing or no training run, ChimeraError for broken result files or a page that can't be written.
    """
    from chimera_cli.reporting import markdown, sections
    from chimera_cli.reporting.facts import collect

    group, seed = runs.resolve_run(home, run)
    if group.kind != "train":
        raise UsageError(
            f"{group.name} is a {group.kind} run", "report takes a train run and finds the benchmarks that fit it"
        )
    facts = collect(home, group, None if seed is None else (seed,))
    check = _check(home, facts, profile, slo)
    verdicts = sections.verdicts_of(check, _why_this_profile(profile, str(check["profile"])))
    document = sections.build(facts, verdicts)
    if html is not None:
        _write_page(html, document, facts, verdicts)
    return Report(markdown.render(document), _as_json(facts, check, html), html)


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


def _write_page(path: Path, document: Any, facts: "Facts", verdicts: "Verdicts") -> None:
    from chimera_cli.reporting import html, plots
    from chimera_cli.reporting.facts import read_curves

    drawn = plots.draw(facts, read_curves(facts))
    runs.write_text(path, html.render(document, drawn, html.headlines(facts, verdicts)))


def _as_json(facts: "Facts", check: Mapping[str, Any], html: Path | None) -> dict[str, Any]:
    """Return what the report says for programs: figures over seeds, those of the run's own dev split among them."""
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
                "figures": {name: None if s is None else s.as_dict() for name, s in one.figures.items()},
            }
            for one in facts.evaluations
        ],
        "benchmarks": {
            "loader": _evidence(facts.loader),
            "encoders": _evidence(facts.encoders),
            "sanity": _evidence(facts.sanity),
        },
        "slo": dict(check),
        "environment": dict(facts.environment),
        "html": None if html is None else str(html),
    }


def _evidence(evidence: "Evidence | None") -> dict[str, Any] | None:
    if evidence is None:
        return None
    details = {key: value for key, value in evidence.details.items() if key != "losses"}
    return {"run": evidence.group.name, "figures": evidence.figures, "details": details}
