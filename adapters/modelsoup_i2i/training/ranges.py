"""Options that know their ranges: annotations, as is what decides nothing of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from modelsoup import ParameterError

FREE = "decides nothing of the result, but for the rounding of another device or layout"

Count = Annotated[int, Ge(1)]
Number = Annotated[int, Ge(0)]
Weight = Annotated[float, Ge(0), Lt(float("inf"))]
Rate = Annotated[float, Gt(0), Lt(float("inf"))]


@dataclass(frozen=True)
class Options:
    """What every trainer's options can do: say what is wrong with them, and what decides."""

    def __post_init__(self) -> None:
        for name, limits in annotated(type(self)).items():
            value = getattr(self, name)
            for limit in limits:
                number = isinstance(value, int | float)
                wanted = _violated(limit, value) if number else None
                if wanted:
                    raise ValueError(f"{name} is {value}, but must be {wanted}")
        try:
            self.must_fit()
        except ParameterError as error:
            raise ValueError(str(error)) from None

    def must_fit(self) -> None:
        """Raise a ValueError or a ParameterError for what no range says."""

    def read(self) -> list[Path]:
        """The folders of pictures that there are."""
        return []

    def must_be_apart(self, said: str, shown: Path) -> None:
        """Raise a ParameterError where pages of samples would be among the pictures."""
        for folder in self.read():
            above = (shown, *shown.absolute().parents)
            if any(place.exists() and place.samefile(folder) for place in above):
                raise ParameterError(
                    f"{said} is {shown}, but what lies in {folder} is taken for pictures to train "
                    f"or to test on"
                )

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result, as plain data."""
        told = annotated(type(self))
        return {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)
            if FREE not in told[f.name]
        }  # fmt: skip


def annotated(kind: type) -> Mapping[str, tuple[Any, ...]]:
    """What is said of each option of a dataclass beside its type, such as a range."""
    # To mypy a dataclass's type is no key of a cache.
    found: Mapping[str, tuple[Any, ...]] = _read_annotations(kind)
    return found


@cache
def _read_annotations(kind: Any) -> Mapping[str, tuple[Any, ...]]:
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: _told(hints[f.name]) for f in dataclasses.fields(kind)}


def _told(hint: Any) -> tuple[Any, ...]:
    """What annotations say, those within a union too: `Weight | None`."""
    own = getattr(hint, "__metadata__", ())
    inner = [_told(part) for part in getattr(hint, "__args__", ()) if hasattr(part, "__metadata__")]
    return (*own, *(limit for part in inner for limit in part))


def _violated(limit: Any, value: Any) -> str | None:
    """What a value must be and is not."""
    if isinstance(limit, Ge) and not value >= limit.ge:
        return f"at least {limit.ge}"
    if isinstance(limit, Gt) and not value > limit.gt:
        return f"more than {limit.gt}" if limit.gt else "positive"
    if isinstance(limit, Le) and not value <= limit.le:
        return f"at most {limit.le}"
    if isinstance(limit, Lt) and not value < limit.lt:
        return "finite" if limit.lt == float("inf") else f"less than {limit.lt}"
    return None
