"""What a merge method is, and where methods are found."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections import namedtuple
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from ...errors import ParameterError, counted, nearest, parameter_option

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Shape = Literal["elementwise", "gram", "select", "whole"]
Sparsify = Literal["magnitude", "random"]

ENTRY_POINTS = "modelsoup.methods"
REQUIRED: Any = dataclasses.MISSING


@dataclass(frozen=True)
class Method:
    """A merge method: one function, its parameters, and how much of a tensor it must see.

    Attributes:
        name: as `--method` takes it.
        function: see `shape`.
        parameters: a frozen dataclass whose fields are made by `parameter`.
        shape: what `function` is given, which decides how often the inputs are read.
            `elementwise`: `function(x, p)`, with `x` a tuple of the models' values (the base first,
            where there is one) and `p` the prepared parameters; `x` holds arrays of any length, or
            scalars in a compiled loop, and the result is the same.
            `gram`: `function(gram, p)`, with the float64 matrix of the models' inner products; it
            returns one coefficient a model, and the result is their linear combination.
            `select`: as elementwise, but `x[1:]` are task vectors (model − base), sparsified as
            `sparsify` says.
            `whole`: `function(x, p)` with whole tensors in their shape, all in memory at once.
        models: how few and how many models it merges, the base not counted.
        base: whether it needs a base model.
        sparsify: for `select`: None to leave the task vectors whole, or what to keep of them, the
            largest magnitudes or a random part, to the share that the parameter `density` gives,
            one number or one for each model;
            where the parameter `rescale` is true, the L1 norm is restored afterwards.
        prepare: turns checked parameters into the ones that `function` sees (normalised weights).
        from_beta: the parameters that `--beta β` stands for, if it means anything here.
        propagates: whether NaN or infinity in any input always shows in the result, so that looking
            at the result alone finds it. (That of a `gram` method always does.)
        identity: which model the result equals exactly under these parameters, or None.
        into: the same as an elementwise `function`, faster: `into(x, p, out, own)` puts the result
            into `out`, an array that may be `x[0]`; where `own[k]` is true, `x[k]` may be
            overwritten.
        summary: one line for `soup methods`.
        source: the paper or page that defines it.
        version: changes when the same inputs would give other bytes; results in a store are named
            by it. Without one, the text of the modules that define the method stands in its place.
    """

    name: str
    function: Callable[..., Any]
    parameters: type
    shape: Shape = "elementwise"
    models: tuple[int, int | None] = (2, None)
    base: bool = False
    sparsify: Sparsify | None = None
    prepare: Callable[[Any], Any] | None = None
    from_beta: Callable[[float], dict[str, Any]] | None = None
    propagates: bool = False
    identity: Callable[[Any], int | None] | None = None
    into: Callable[[Any, Any, Any, Any], None] | None = None
    summary: str = ""
    source: str = ""
    version: str = ""

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)


def parameter(
    default: Any = REQUIRED, *, per_model: bool = False, low: float | None = None,
    high: float | None = None, doc: str = "",
) -> Any:  # fmt: skip
    """A field of a method's parameters.

    Args:
        default: its value where none is given; without one it is required.
        per_model: a number for each model; one number stands for all.
        low: the smallest value that is valid.
        high: the largest value that is valid.
        doc: one line for `soup methods NAME`.
    """
    metadata = {"per_model": per_model, "low": low, "high": high, "doc": doc}
    return dataclasses.field(default=default, metadata=metadata)


_methods: dict[str, Method] = {}


def method(
    name: str, parameters: type, **properties: Any
) -> Callable[[Callable[..., Any]], Method]:
    """Register a function as a merge method; the keywords are the attributes of `Method`.

    Raises:
        ParameterError: the name is taken.
    """

    def register(function: Callable[..., Any]) -> Method:
        known = _methods.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise ParameterError(
                f"a method called {name!r} exists already, in {known.function.__module__}"
            )
        made = Method(name, function, parameters, **properties)
        if made.sparsify and "density" not in (f.name for f in dataclasses.fields(parameters)):
            raise ParameterError(f"the method {name!r} sparsifies: it needs a parameter 'density'")
        _methods[name] = made
        return made

    return register


@cache
def entry_point_methods() -> dict[str, EntryPoint]:
    """Methods that other packages offer, not loaded."""
    from importlib.metadata import entry_points  # 0.05 s

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def method_names() -> list[str]:
    """All method names: those registered and those that other packages offer."""
    return sorted({*_methods, *entry_point_methods()})


def registered_methods() -> list[Method]:
    """The methods that are loaded, by name."""
    return [_methods[name] for name in sorted(_methods)]


def offered_methods() -> dict[str, str]:
    """The methods that other packages offer and nobody asked for yet: name → where it is."""
    offered = entry_point_methods()
    return {name: offered[name].value for name in sorted(offered.keys() - _methods.keys())}


def get_method(name: str) -> Method:
    """A method by its name; one from another package is imported now.

    Raises:
        ParameterError: there is none of that name, or its package cannot be imported.
    """
    if not isinstance(name, str):  # a plan may say anything
        raise ParameterError(f"method is {name!r}, not a name")
    if name not in _methods:
        point = entry_point_methods().get(name)
        if point is None:
            known = method_names()
            hint = nearest(name, known) or f" (there are {', '.join(known)})"
            raise ParameterError(f"no merge method is called {name!r}{hint}")
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise ParameterError(f"the method {name!r} ({point.value}) failed: {error}") from error
        if not isinstance(loaded, Method):
            raise ParameterError(f"the method {name!r} ({point.value}) is no modelsoup Method")
        _methods[name] = loaded
    return _methods[name]


@cache
def code_version(chosen: Method) -> str:
    """What names the code of a method: its version, or a digest of the modules that define it.

    Raises:
        ParameterError: it has neither a version nor a text.
    """
    if chosen.version:
        return chosen.version
    parts = (
        chosen.function, chosen.parameters, chosen.prepare, chosen.from_beta, chosen.identity,
        chosen.into,
    )  # fmt: skip
    digest = hashlib.sha256()
    for name in sorted({str(part.__module__) for part in parts if part is not None}):
        file = getattr(sys.modules.get(name), "__file__", None)
        try:
            text = Path(file or "").read_bytes()
        except OSError:
            raise ParameterError(
                f"the method {chosen.name!r} has no version, and the text of its module {name!r} "
                f"cannot be read: give it a version, by which its results are named"
            ) from None
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
    return f"sha256:{digest.hexdigest()[:32]}"


def external_name(field: dataclasses.Field[Any]) -> str:
    """A parameter's name as users write it: `lambda`, which no Python field can be called."""
    return field.name.rstrip("_")


def build_parameters(
    chosen: Method,
    given: Mapping[str, Any],
    models: int,
    *,
    asked: Callable[[str], str] | None = None,
) -> Any:
    """Check parameters and fill in defaults.

    Args:
        chosen: the method.
        given: name → number, truth value, or one number a model.
        models: how many models are merged, the base not counted.
        asked: how a parameter is given, where it is not as the recipe's are.

    Returns:
        an instance of `chosen.parameters`; per-model fields hold a tuple of `models` floats.

    Raises:
        ParameterError: an unknown name, a missing one, a wrong count, or a value out of range.
    """
    fields = {external_name(f): f for f in dataclasses.fields(chosen.parameters)}
    for name in given:
        if name not in fields:
            known = f" (it has {', '.join(fields)})" if fields else " (it has none)"
            raise ParameterError(
                f"the method {chosen.name!r} has no parameter {name!r}"
                f"{nearest(name, fields) or known}"
            )
    values = {}
    for name, field in fields.items():
        value = given.get(name, field.default)
        if value is dataclasses.MISSING:
            how = parameter_option(name, "…") if asked is None else asked(name)
            raise ParameterError(
                f"the method {chosen.name!r} needs the parameter {name!r} ({how}): "
                f"{field.metadata['doc']}"
            )
        values[field.name] = _checked(chosen.name, name, field, value, models)
    return chosen.parameters(**values)


def _checked(method_name: str, name: str, field: Any, value: Any, models: int) -> Any:
    where = f"parameter {name!r} of {method_name!r}"
    if field.type in ("bool", bool):
        if value in (0, 1):  # True and False among them
            return bool(value)
        raise ParameterError(f"{where} is {value!r}, not true or false")
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    low, high = field.metadata["low"], field.metadata["high"]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ParameterError(f"{where} is {number!r}, not a number")
        if not math.isfinite(number):
            raise ParameterError(f"{where} is {number!r}, not a finite number")
        if (low is not None and number < low) or (high is not None and number > high):
            ends = [] if low is None else [f"at least {low:g}"]
            ends += [] if high is None else [f"at most {high:g}"]
            expected = " and ".join(ends)
            if low is not None and high is not None:
                expected = f"between {low:g} and {high:g}"
            raise ParameterError(f"{where} is {number:g}, but must be {expected}")
    if not field.metadata["per_model"]:
        if len(numbers) != 1:
            raise ParameterError(f"{where} is one number, but {len(numbers)} were given")
        return float(numbers[0])
    if len(numbers) == 1:
        numbers *= models
    if len(numbers) != models:
        raise ParameterError(
            f"{where} has {counted(len(numbers), 'value')} for {counted(models, 'model')}"
        )
    return tuple(float(number) for number in numbers)


def densities(parameters: Any, models: int) -> tuple[float, ...]:
    """The share that is kept of each task vector; one number stands for all."""
    density = parameters.density
    return density if isinstance(density, tuple) else (density,) * models


def rescales(parameters: Any) -> bool:
    """Whether the L1 norm of sparsified task vectors is restored."""
    return bool(getattr(parameters, "rescale", False))


@cache
def number_type(parameters: Hashable) -> Any:
    """A named tuple with a parameter class's fields, which compiled loops can take."""
    kind = cast(type, parameters)
    names = [f.name for f in dataclasses.fields(kind)]
    return namedtuple(kind.__name__ + "Numbers", names)  # noqa: PYI024


def numbers(prepared: Any, dtype: np.dtype[Any]) -> Any:
    """Prepared parameters, each number as a scalar of the dtype that the arithmetic is in."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(dtype.type(item) for item in value)
        return value if isinstance(value, bool) else dtype.type(value)

    fields = dataclasses.fields(prepared)
    return number_type(cast(Hashable, type(prepared)))(
        *(convert(getattr(prepared, f.name)) for f in fields)
    )


def describe(chosen: Method) -> dict[str, Any]:
    """A method as plain data, for `soup methods`."""
    fields = dataclasses.fields(chosen.parameters)
    return {
        "name": chosen.name,
        "summary": chosen.summary,
        "source": chosen.source,
        "shape": chosen.shape,
        "models": list(chosen.models),
        "base": chosen.base,
        "beta": chosen.from_beta is not None,
        "version": code_version(chosen),
        "parameters": [
            {
                "name": external_name(field),
                "required": field.default is dataclasses.MISSING,
                "default": None if field.default is dataclasses.MISSING else field.default,
                "per_model": field.metadata["per_model"],
                "low": field.metadata["low"],
                "high": field.metadata["high"],
                "doc": field.metadata["doc"],
            }
            for field in fields
        ],
    }
