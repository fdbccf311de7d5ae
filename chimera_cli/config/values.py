"""What the keys of configurations hold: frozen sections, and numbers in their ranges."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


def _number(value: Any) -> Any:
    """Return a number for text such as `3e-4`, which YAML 1.1 reads as a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
PositiveShare = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]


def _a_list(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError("give a list such as [0, 3]")
    return value


# It is dumped as the list that a file gives back: a run is compared with the settings that it recorded.
Numbers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_a_list), PlainSerializer(list, return_type=list[int])
]


class Frozen(BaseModel):
    """Unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
