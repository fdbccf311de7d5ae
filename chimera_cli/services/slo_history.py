"""`chimera slo history`: verdicts on past runs, pass rate and remaining error budget of each objective."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from chimera_cli.errors import UsageError
from chimera_cli.figures import FIGURES
from chimera_cli.runs import SCHEMA_VERSION, Group, list_groups, runs_dir
from chimera_cli.services.slo import NOT_THE_LAW, default_slo_path, judge_subject, load_slos, shown_path, slo_file
from chimera_cli.slo.evidence import Subject, pack_of
from chimera_cli.slo.objectives import PROFILES, Profile, Slos, left_out
from chimera_cli.slo.verdicts import Verdict, Word, worst_of

# How a run counts; without evidence it does not.
_COUNTS: Mapping[Word, str] = {"pass": "met", "inconclusive": "met", "fail": "missed"}


@dataclass(frozen=True, slots=True)
class Budget:
    """The error budget of one objective over some runs: `share` (0-1) of the measured ones may miss it.

    As in site reliability engineering (Beyer et al., The Site Reliability Workbook, chapter 2): what counts are runs
    that were measured; a run without evidence is no event, neither good nor bad. A breach that somebody waived is
    excused and still spends the budget. An inconclusive run meets its objective in the mean, and counts as met.
    """

    share: float
    met: int
    missed: int

    @property
    def measured(self) -> int:
        """Return how many runs count."""
        return self.met + self.missed

    @property
    def pass_rate(self) -> float | None:
        """Return the share of measured runs that met the objective; None where none was measured."""
        return self.met / self.measured if self.measured else None

    @property
    def allowed(self) -> float:
        """Return how many of the measured runs may miss the objective; with few runs less than one."""
        return self.share * self.measured

    @property
    def remaining(self) -> float:
        """Return how many more may; negative where the budget is overspent."""
        return self.allowed - self.missed

    @property
    def remaining_share(self) -> float | None:
        """Return what is left as a share of the whole budget, at most 1; None where no miss is allowed at all."""
        return self.remaining / self.allowed if self.allowed else None


def history(
    home: Path,
    last: int = 10,
    slo_path: Path | None = None,
    profile: str = "gpu",
    data: str | None = None,
    budget: float = 0.0,
    today: date | None = None,
) -> dict[str, Any]:
    """Return the verdicts on the last finished train runs, the newest last, as JSON takes them.

    Every run is judged by the law as the file has it today, with the evidence that is there today. Per objective: how
    many runs met and missed it, the pass rate, the remaining error budget (see `Budget`), and how its figures moved.
    `data` keeps to the runs on one pack. Raises UsageError for a file or profile that is not there, and without runs.
    """
    if profile not in PROFILES:
        raise UsageError(f"there is no profile {profile!r}", f"the profiles are {', '.join(PROFILES)}")
    path = slo_file(slo_path) if slo_path else default_slo_path()
    slos = load_slos(path)
    chosen: Profile = "cpu" if profile == "cpu" else "gpu"
    groups = tuple(list_groups(home))
    runs = _finished(home, groups, data)[-last:]
    table = [judge_subject(Subject(home, run, run.seeds, groups), slos, path, chosen, today).verdicts for run in runs]
    rows = [_objective_facts(verdicts, budget) for verdicts in zip(*table, strict=True)]
    return {
        "schema_version": SCHEMA_VERSION,
        "slo": shown_path(path),
        "law": slos.law,
        "profile": chosen,
        "data": data,
        "budget": budget,
        "remarks": _remarks(slos, path, chosen),
        "figures": {figure["figure"]: figure["last"] for row in rows for figure in row["figures"]},
        "runs": [_run_facts(run, verdicts) for run, verdicts in zip(runs, table, strict=True)],
        "objectives": rows,
    }


def _finished(home: Path, groups: Sequence[Group], data: str | None) -> list[Group]:
    """Return the finished train runs, the one that finished last at the end. Raises UsageError where there is none."""
    finished = [group for group in groups if group.kind == "train" and group.status == "finished"]
    fitting = [group for group in finished if data is None or pack_of(group).get("name") == data]
    if not fitting:
        packs = sorted({str(pack_of(group).get("name")) for group in finished})
        hint = f"there are runs on {', '.join(packs)}" if packs else "`chimera train full` makes one"
        on = f" on {data}" if data else ""
        raise UsageError(f"there is no finished train run{on} below {runs_dir(home)}", hint)
    return sorted(fitting, key=lambda group: (str(group.facts["finished_at"]), group.name))


def _remarks(slos: Slos, path: Path, profile: Profile) -> list[str]:
    found = [] if slos.law else [f"{NOT_THE_LAW}: {shown_path(path)} checks the plumbing alone"]
    omitted = left_out(slos, profile)
    if omitted:
        found.append(f"profile {profile}: {', '.join(FIGURES[name].label for name in omitted)} left out")
    return found


# ---- as JSON takes it -----------------------------------------------------------------------------------------------


def _run_facts(run: Group, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "run": run.name,
        "finished_at": str(run.facts["finished_at"]),
        "pack": pack_of(run).get("name"),
        "seeds": list(run.seeds),
        "verdict": worst_of([verdict.word for verdict in verdicts]),
        "objectives": {
            verdict.objective.id: {
                "verdict": verdict.word,
                "reason": verdict.reason,
                "evidence": verdict.evidence.group.name if verdict.evidence.group else None,
            }
            for verdict in verdicts
        },
    }


def _objective_facts(verdicts: Sequence[Verdict], share: float) -> dict[str, Any]:
    """Return one objective over the runs."""
    objective = verdicts[0].objective
    words = [verdict.word for verdict in verdicts]
    budget = _budget(verdicts, share)
    behind = {
        verdict.evidence.group.name for verdict in verdicts if verdict.evidence.group and _found(verdict) in _COUNTS
    }
    return {
        "id": objective.id,
        "title": objective.title,
        "verdicts": words,
        "measured": budget.measured,
        "met": budget.met,
        "missed": budget.missed,
        "unmeasured": len(verdicts) - budget.measured,
        "evidence_runs": len(behind),
        "pass_rate": budget.pass_rate,
        "budget": {
            "share": budget.share,
            "allowed": budget.allowed,
            "remaining": budget.remaining,
            "remaining_share": budget.remaining_share,
        },
        "figures": [_trend(verdicts, place) for place in range(len(objective.all_of))],
    }


def _budget(verdicts: Sequence[Verdict], share: float) -> Budget:
    found = [_COUNTS.get(_found(verdict)) for verdict in verdicts]
    return Budget(share, found.count("met"), found.count("missed"))


def _found(verdict: Verdict) -> Word:
    """Return what the evidence says, whatever a waiver makes of it."""
    return worst_of([finding.word for finding in verdict.findings])


def _trend(verdicts: Sequence[Verdict], place: int) -> dict[str, Any]:
    """Return how the figure of one condition moved: its values by run, the first and last known, the change."""
    findings = [verdict.findings[place] for verdict in verdicts]
    condition = findings[0].condition
    values = [finding.value for finding in findings]
    known = [value for value in values if value is not None]
    change = known[-1] - known[0] if len(known) > 1 else None
    return {
        "figure": condition.figure,
        "label": FIGURES[condition.figure].label,
        "statistic": condition.statistic,
        "values": values,
        "first": known[0] if known else None,
        "last": known[-1] if known else None,
        "change": change,
        "direction": _direction(condition.figure, change),
    }


def _direction(figure: str, change: float | None) -> str | None:
    """Return whether a figure got better or worse; None where that can't be said."""
    better = FIGURES[figure].better
    if change is None or better == "neither":
        return None
    if change == 0:
        return "unchanged"
    return "better" if (change > 0) == (better == "higher") else "worse"
