"""Values of a method's parameters: the same for all tensors, or varying with name and layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RuleError, said

Scalar = float | bool | str

_TRUTHS = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}
_WORD = re.compile(r"[A-Za-z_][\w-]*")


@dataclass(frozen=True)
class Gradient:
    """Values along the depth of a model.

    Layer i of n is at t = i/(n − 1), between the first value and the last; numbers are interpolated
    in a straight line, of words and truth values the last one that was reached is taken. A tensor
    that is in no layer is at t = 0, the only layer there is at t = 1. (As in mergekit.)

    Attributes:
        values: at least two.
    """

    values: tuple[Scalar, ...]

    def at(self, layer: tuple[int, int] | None) -> Scalar:
        """The value for a layer, its index and how many there are."""
        index, count = layer or (0, 2)
        last = len(self.values) - 1
        place = last * (index / (count - 1) if count > 1 else 1.0)
        below = min(math.floor(place), last)
        first = self.values[below]
        if below == last or isinstance(first, bool | str):
            return first
        return (1 - (place - below)) * first + (place - below) * float(self.values[below + 1])


@dataclass(frozen=True)
class Varying:
    """A value by the names of tensors: that of the first pattern that matches.

    Attributes:
        parts: pairs of a pattern, as rules have them, and a value.
    """

    parts: tuple[tuple[str, Scalar | Gradient], ...]

    def at(
        self, name: str, layer: tuple[int, int] | None, matches: Callable[[str, str], bool]
    ) -> Scalar | None:
        """The value for a tensor, or None where no pattern matches."""
        for pattern, value in self.parts:
            if matches(pattern, name):
                return value.at(layer) if isinstance(value, Gradient) else value
        return None


Single = Scalar | Gradient | Varying
ParameterValue = Single | tuple[Single, ...]


def varies(value: ParameterValue) -> bool:
    """Whether it is not the same for all tensors."""
    several = value if isinstance(value, tuple) else (value,)
    return any(isinstance(one, Gradient | Varying) for one in several)


def value_at(
    value: ParameterValue,
    name: str,
    layer: tuple[int, int] | None,
    matches: Callable[[str, str], bool],
) -> Scalar | tuple[Scalar, ...] | None:
    """A parameter's value for a tensor; None where it says nothing for it.

    Args:
        value: the value.
        name: the tensor's name.
        layer: its layer's index and how many there are.
        matches: whether a pattern matches a name.

    Raises:
        RuleError: it says something for some of the models and nothing for others.
    """
    if not isinstance(value, tuple):
        return _single_at(value, name, layer, matches)
    several = [_single_at(one, name, layer, matches) for one in value]
    if None in several and any(one is not None for one in several):
        raise RuleError(
            f"a parameter has a value for {said(name)} in some of the models, and none in others"
        )
    return None if None in several else tuple(one for one in several if one is not None)


def _single_at(
    value: Single, name: str, layer: tuple[int, int] | None,
    matches: Callable[[str, str], bool],
) -> Scalar | None:  # fmt: skip
    if isinstance(value, Gradient):
        return value.at(layer)
    return value.at(name, layer, matches) if isinstance(value, Varying) else value


def plain(value: object) -> object:
    """A number or array of numpy as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def parse_value(name: str, value: object) -> ParameterValue:
    """A parameter's value from text, YAML, Python or `value_as_json`.

    That is a number, a truth value or a word; a list of such, one a model; a mapping with the one
    key `gradient`, whose values are a list along the depth; or a mapping from patterns to values.

    Raises:
        RuleError: none of these.
    """
    value = plain(value)
    if isinstance(value, str) and "," in value:
        value = value.split(",")
    if isinstance(value, list | tuple):
        return tuple(_parse_single(name, item) for item in value)
    return _parse_single(name, value)


def _parse_single(name: str, value: object) -> Single:
    if isinstance(value, Gradient | Varying):
        return value
    if not isinstance(value, Mapping):
        return _parse_scalar(name, value)
    if value.keys() == {"gradient"}:
        return _parse_gradient(name, value["gradient"])
    if not value or not all(isinstance(pattern, str) for pattern in value):
        raise RuleError(f"parameter {name!r} is {said(dict(value))}, no mapping from patterns")
    return Varying(tuple((pattern, _parse_part(name, one)) for pattern, one in value.items()))


def _parse_part(name: str, value: object) -> Scalar | Gradient:
    parsed = _parse_single(name, value)
    if isinstance(parsed, Varying):
        raise RuleError(f"parameter {name!r} has a mapping in a mapping: {said(value)}")
    return parsed


def _parse_gradient(name: str, value: object) -> Gradient:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < 2:
        raise RuleError(
            f"the gradient of parameter {name!r} is {said(value)}, not a list of at least two "
            f"values"
        )
    values = tuple(_parse_scalar(name, one) for one in value)
    if len({isinstance(one, bool | str) for one in values}) > 1:
        raise RuleError(f"the gradient of parameter {name!r} mixes numbers with others: {value!r}")
    return Gradient(values)


def _parse_scalar(name: str, value: object) -> Scalar:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _TRUTHS:
            return _TRUTHS[text.lower()]
        try:
            return float(text)
        except ValueError:
            if _WORD.fullmatch(text):
                return text
    elif isinstance(value, int | float):
        return float(value)
    raise RuleError(
        f"parameter {name!r} has the value {value!r}, which is no number, truth value, word or "
        f"list of such"
    )


def truth(name: str, value: object) -> bool:
    """A truth value, however YAML gives it: in YAML 1.2 `yes` is a word.

    Raises:
        RuleError: it is none.
    """
    known = _TRUTHS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(known, bool):
        raise RuleError(f"{name!r} is {value!r}, not true or false")
    return known


def value_as_json(value: ParameterValue) -> Any:
    """A value as plain data, which `parse_value` takes back."""
    if isinstance(value, tuple):
        return [value_as_json(one) for one in value]
    if isinstance(value, Gradient):
        return {"gradient": list(value.values)}
    if isinstance(value, Varying):
        return {pattern: value_as_json(one) for pattern, one in value.parts}
    return value


def written(value: ParameterValue) -> str:
    """A value as a person reads it, and `--set` takes it where it does not vary."""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    if isinstance(value, Gradient):
        return f"gradient({', '.join(map(str, value.values))})"
    if isinstance(value, Varying):
        return "{" + ", ".join(f"{pattern}: {written(one)}" for pattern, one in value.parts) + "}"
    return str(value)


def patterns_in(value: ParameterValue) -> Iterator[str]:
    """All patterns in a value."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, Varying):
            yield from (pattern for pattern, _ in one.parts)


def has_gradient(value: ParameterValue) -> bool:
    """Whether any of it goes along the depth."""
    several = value if isinstance(value, tuple) else (value,)
    parts = [p for one in several if isinstance(one, Varying) for _, p in one.parts]
    return any(isinstance(one, Gradient) for one in (*several, *parts))


def scalars_in(value: ParameterValue) -> Iterator[Scalar]:
    """All single values in one."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, Gradient):
            yield from one.values
        elif isinstance(one, Varying):
            for _, part in one.parts:
                yield from scalars_in(part)
        else:
            yield one
