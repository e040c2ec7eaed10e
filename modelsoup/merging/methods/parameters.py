"""What a method may be told: its parameters, their kinds and ranges."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ...errors import ParameterError, counted, nearest
from ..forms import PerModel

if TYPE_CHECKING:
    pass

Kind = Literal["number", "numbers", "integer", "truth", "word"]
_KINDS: Mapping[Any, Kind] = {
    float: "number", PerModel: "numbers", int: "integer", bool: "truth",
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method.

    Attributes:
        name: as users write it.
        kind: a number, one number a model, an integer, true or false, or a word.
        default: its value where none is given; `inspect.Parameter.empty` where one is needed.
        low: the smallest value that is valid.
        high: the largest value that is valid.
        words: of which a word is one.
        doc: one line for `soup methods NAME`.
    """

    name: str
    kind: Kind
    default: Any
    low: float | None
    high: float | None
    words: tuple[str, ...]
    doc: str

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class _Given:
    """The default of an argument, until the method is registered."""

    default: Any
    low: float | None
    high: float | None
    doc: str


def parameter(
    default: Any = inspect.Parameter.empty, *, low: float | None = None, high: float | None = None,
    doc: str = "",
) -> Any:  # fmt: skip
    """What a parameter of a method has as its default, in the method's signature.

    Its kind is the annotation's: `float`, `int`, `bool`, a `Literal` of words, or `PerModel`;
    without one, the default's, or a number. With `| None` the method finds a value where none is
    given, and the default is None.

    Args:
        default: its value where none is given; without one it is required.
        low: the smallest value that is valid.
        high: the largest value that is valid.
        doc: one line for `soup methods NAME`.
    """
    return _Given(default, low, high, doc)


def parameters_of(function: Callable[..., Any], method_name: str) -> dict[str, Parameter]:
    """What a function takes besides a tensor, by the names that users write.

    Raises:
        ParameterError: one is of no kind that a parameter can be.
    """
    hints = get_type_hints(function)
    found = {}
    for argument in list(inspect.signature(function).parameters.values())[1:]:
        hint, given = hints.get(argument.name), argument.default
        if not isinstance(given, _Given):
            given = _Given(given, None, None, "")
        if hint is None:  # not annotated: as its default is
            is_given = given.default is not inspect.Parameter.empty
            hint = type(given.default) if is_given else float
        if get_origin(hint) is UnionType and len(own := set(get_args(hint)) - {NoneType}) == 1:
            (hint,) = own
        words = tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()
        kind = "word" if words else _KINDS.get(hint)
        if kind is None:
            raise ParameterError(
                f"the parameter {argument.name!r} of the method {method_name!r} is of no kind "
                f"that a parameter can be: float, int, bool, PerModel or a Literal of words"
            )
        name = argument.name.rstrip("_")
        found[name] = Parameter(name, kind, given.default, given.low, given.high, words, given.doc)
    return found


def checked(method_name: str, own: Parameter, value: Any, models: int) -> Any:
    if value is None and own.default is None:
        return None
    where = f"parameter {own.name!r} of {method_name!r}"
    if own.kind == "truth":
        if not isinstance(value, str) and value in (0, 1):  # True and False among them
            return bool(value)
        told = f"{value:g}" if isinstance(value, float) else repr(value)
        raise ParameterError(f"{where} is {told}, not true or false")
    if own.kind == "word":
        if value in own.words:
            return value
        hint = nearest(str(value), own.words)
        raise ParameterError(f"{where} is {value!r}{hint} (expected {', '.join(own.words)})")
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    for number in numbers:
        _check_number(where, own, number)
    if own.kind != "numbers":
        if len(numbers) != 1:
            raise ParameterError(f"{where} is one number, but {len(numbers)} were given")
        return int(numbers[0]) if own.kind == "integer" else float(numbers[0])
    if len(numbers) == 1:
        numbers *= models
    if len(numbers) != models:
        raise ParameterError(
            f"{where} has {counted(len(numbers), 'value')} for {counted(models, 'model')}"
        )
    return tuple(float(number) for number in numbers)


def _check_number(where: str, own: Parameter, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ParameterError(f"{where} is {number!r}, not a number")
    if not math.isfinite(number):
        raise ParameterError(f"{where} is {number!r}, not a finite number")
    if own.kind == "integer" and number != int(number):
        raise ParameterError(f"{where} is {number!r}, not an integer")
    low, high = own.low, own.high
    if (low is not None and number < low) or (high is not None and number > high):
        ends = [] if low is None else [f"at least {low:g}"]
        ends += [] if high is None else [f"at most {high:g}"]
        expected = " and ".join(ends)
        if low is not None and high is not None:
            expected = f"between {low:g} and {high:g}"
        raise ParameterError(f"{where} is {number:g}, but must be {expected}")
