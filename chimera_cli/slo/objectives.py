"""The law as a file: objectives, conditions, waivers and contingency actions. Figures are checked against the table."""

import difflib
import math
import string
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from chimera_cli.figures import FIGURES, near_names

Profile = Literal["gpu", "cpu"]
Comparison = Literal[">=", ">", "<=", "<"]
Statistic = Literal["mean", "worst", "bound95"]
PROFILES: tuple[Profile, ...] = ("gpu", "cpu")


def _finite(value: Any) -> Any:
    """Refuse what pydantic would turn into a number although nobody means one: yes, no, NaN and infinity."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, float | int | str):
        try:
            if not math.isfinite(float(value)):
                raise ValueError("must be a finite number")
        except (ValueError, OverflowError) as error:
            raise ValueError("must be a finite number") from error
    return value


def _known_figure(name: str) -> str:
    if name not in FIGURES:
        near = near_names(name)
        raise ValueError("no figure has this name" + (f" (did you mean {', '.join(near)}?)" if near else ""))
    return name


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text.strip()


# What a command in the law may leave open; `slo` fills it in from the run that is checked.
PLACEHOLDERS = ("run", "pack", "source", "config", "seeds", "device")


def _known_placeholders(text: str) -> str:
    try:
        fields = [part for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"has a broken placeholder: {error}") from error
    for _, name, form, conversion in fields:
        if name not in PLACEHOLDERS:
            raise ValueError(f"{{{name}}} is no placeholder (there are {', '.join(PLACEHOLDERS)})")
        if form or conversion:
            raise ValueError(f"the placeholder {{{name}}} takes no format and no conversion: write {{{name}}}")
    return text


Finite = Annotated[float, BeforeValidator(_finite)]
# A whole number stays one: it is a setting.
Bound = Annotated[int | float, BeforeValidator(_finite)]
FigureName = Annotated[str, AfterValidator(_known_figure)]
Text = Annotated[str, AfterValidator(_not_blank)]
Command = Annotated[Text, AfterValidator(_known_placeholders)]
Identifier = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]


class Strict(BaseModel):
    """Unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Condition(Strict):
    """`figure` stands in `comparison` to `limit`, judged by `statistic` over the seeds.

    With `relative_to` the limit is added to another figure of the same seed. A `target` is wished for, not demanded.
    """

    figure: FigureName
    comparison: Comparison
    limit: Finite
    relative_to: FigureName | None = None
    statistic: Statistic = "worst"
    target: Finite | None = None

    @model_validator(mode="after")
    def _rewards_the_better_side(self) -> "Condition":
        better = FIGURES[self.figure].better
        if (better == "higher" and self.comparison in ("<=", "<")) or (
            better == "lower" and self.comparison in (">=", ">")
        ):
            raise ValueError(f"{self.figure} is better when {better}, {self.comparison} would reward the worse side")
        return self


class Beside(Strict):
    """A figure that is reported with an objective and not judged."""

    figure: FigureName
    target: Finite | None = None


class Requirement(Strict):
    """What the evidence must be made with: `detail` of result.json is there, equals a value, or is at least one."""

    detail: Text
    equals: str | bool | int | float | None = None
    at_least: Finite | None = None
    why: Text

    def met_by(self, value: object) -> bool:
        """Return whether the value of the detail (None: absent) meets the requirement."""
        if value is None:
            return False
        if self.equals is not None and value != self.equals:
            return False
        if self.at_least is None:
            return True
        return isinstance(value, int | float) and not isinstance(value, bool) and value >= self.at_least


class Action(Strict):
    """One contingency step: what to `do`, and settings of the config or a `command` where one does it.

    Settings are made to fit the config that they change: `set` gives a key a value, `at_least` and `at_most` raise or
    lower a number that is not there yet, `scale` multiplies it. A null counts as above every number (all layers).
    """

    id: Identifier
    do: Text
    set: dict[str, str | bool | int | float | list[int] | None] = Field(default_factory=dict)
    at_least: dict[str, Bound] = Field(default_factory=dict)
    at_most: dict[str, Bound] = Field(default_factory=dict)
    scale: dict[str, Annotated[Finite, Field(gt=0)]] = Field(default_factory=dict)
    command: Command | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the config keys that the step changes; none where it is a command."""
        return (*self.set, *self.at_least, *self.at_most, *self.scale)

    @model_validator(mode="after")
    def _one_way(self) -> "Action":
        if bool(self.keys) == (self.command is not None):
            raise ValueError("give either `set` or `command` (at_least, at_most and scale are settings too)")
        twice = sorted({key for key in self.keys if self.keys.count(key) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is changed in two ways")
        return self


class Objective(Strict):
    """One law. Its evidence is a group of `kind`, or with `split` that group's evaluation of the split."""

    id: Identifier
    title: Text
    kind: Literal["train", "sanity", "bench-loader", "bench-encoders"]
    profiles: tuple[Profile, ...] = Field(PROFILES, min_length=1)
    hardware: Literal["any", "gpu", "cpu"] = "any"
    pack: Text | None = None
    split: Literal["train", "dev", "test"] | None = None
    images_at_least: int | None = Field(None, ge=1)
    seeds_at_least: int = Field(1, ge=1)
    requires: tuple[Requirement, ...] = ()
    all_of: tuple[Condition, ...] = Field(min_length=1)
    beside: tuple[Beside, ...] = ()
    measure: Command
    actions: tuple[Action, ...] = ()

    @model_validator(mode="after")
    def _bounds_have_intervals(self) -> "Objective":
        bounds = [condition.figure for condition in self.all_of if condition.statistic == "bound95"]
        if bounds and self.seeds_at_least < 2:
            raise ValueError(
                f"bound95 of {', '.join(bounds)} needs an interval, and that two seeds: set seeds_at_least to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _makes_sense(self) -> "Objective":
        if self.split is not None and self.kind != "train":
            raise ValueError("`split` needs kind: train, nothing else is evaluated")
        if self.images_at_least is not None and self.split is None:
            raise ValueError("`images_at_least` needs a `split`")
        names = [action.id for action in self.actions]
        if len(set(names)) != len(names):
            raise ValueError(f"an action is there twice: {', '.join(names)}")
        return self


# The key of a bound that names no figure, which an objective with one figure needs not.
_ONLY = "the only figure"


def _by_figure(value: Any) -> Any:
    return value if value is None or isinstance(value, dict) else {_ONLY: value}


def _a_date(value: Any) -> Any:
    """Refuse a number, which pydantic would read as seconds since 1970."""
    if isinstance(value, bool | int | float):
        raise ValueError("must be a date such as 2030-01-31")
    return value


class Waiver(Strict):
    """Somebody answers for a breach until the end of the day `expires` (UTC).

    With a `bound` it holds only while the judged value is no worse: one number, or figure: number where an objective
    has several. Figures without a bound then have to meet the law.
    """

    objective: Identifier
    owner: Text
    reason: Text
    expires: Annotated[date, BeforeValidator(_a_date)]
    bound: Annotated[dict[str, Finite] | None, BeforeValidator(_by_figure)] = None

    def bounds(self, objective: Objective) -> dict[str, float] | None:
        """Return the bound of each figure of an objective that has one; None where the waiver is without bound."""
        if self.bound is None:
            return None
        figures = {condition.figure for condition in objective.all_of}
        if _ONLY in self.bound:
            return dict.fromkeys(figures, self.bound[_ONLY])
        return {figure: value for figure, value in self.bound.items() if figure in figures}


class Slos(Strict):
    """A whole file of objectives; `law: false` heads every output with "not the law"."""

    schema_version: Literal[1]
    law: bool
    objectives: tuple[Objective, ...] = Field(min_length=1)
    waivers: tuple[Waiver, ...] = ()

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Slos":
        held = [(objective.id, profile) for objective in self.objectives for profile in objective.profiles]
        twice = sorted({f"{name} (profile {profile})" for name, profile in held if held.count((name, profile)) > 1})
        if twice:
            raise ValueError(f"an objective is there twice: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _waivers_make_sense(self) -> "Slos":
        waived = [waiver.objective for waiver in self.waivers]
        for waiver in self.waivers:
            known = [objective for objective in self.objectives if objective.id == waiver.objective]
            if not known:
                ids = sorted({objective.id for objective in self.objectives})
                near = _near(waiver.objective, ids)
                raise ValueError(f"a waiver names {waiver.objective}, which is no objective {near}")
            if waived.count(waiver.objective) > 1:
                raise ValueError(f"{waiver.objective} is waived twice")
            _check_bound(waiver, known)
        return self


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"(did you mean {near[0]}?)" if near else f"(there are {', '.join(names)})"


def _check_bound(waiver: Waiver, objectives: Iterable[Objective]) -> None:
    """Raise ValueError for a bound of a figure that is not judged, or one that would excuse nothing."""
    conditions = [condition for objective in objectives for condition in objective.all_of]
    figures = sorted({condition.figure for condition in conditions})
    for figure, bound in (waiver.bound or {}).items():
        if figure == _ONLY and len(figures) > 1:
            raise ValueError(
                f"the bound on {waiver.objective} has to say of which figure: {{{figures[0]}: {bound:g}}} "
                f"(it judges {', '.join(figures)})"
            )
        if figure not in (*figures, _ONLY):
            raise ValueError(f"the bound on {waiver.objective} names {figure} {_near(figure, figures)}")
        meant = [one for one in conditions if figure in (one.figure, _ONLY) and one.relative_to is None]
        for condition in meant:
            upwards = condition.comparison in (">=", ">")
            if bound >= condition.limit if upwards else bound <= condition.limit:
                raise ValueError(
                    f"the bound {bound:g} on {condition.figure} excuses nothing, its limit is {condition.limit:g}"
                )


def for_profile(slos: Slos, profile: Profile) -> tuple[Objective, ...]:
    """Return the objectives that hold under a profile, in the order of the file."""
    return tuple(objective for objective in slos.objectives if profile in objective.profiles)


def left_out(slos: Slos, profile: Profile) -> tuple[str, ...]:
    """Return the figures that other profiles judge and this one neither judges nor reports, in the file's order."""
    told = {figure for objective in for_profile(slos, profile) for figure in _figures_of(objective)}
    others = [condition.figure for objective in slos.objectives for condition in objective.all_of]
    return tuple(dict.fromkeys(figure for figure in others if figure not in told))


def _figures_of(objective: Objective) -> list[str]:
    return [condition.figure for condition in objective.all_of] + [one.figure for one in objective.beside]
