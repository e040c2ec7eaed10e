"""What a merge method is, and where methods are found."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from types import GeneratorType
from typing import TYPE_CHECKING, Any, cast

from ...errors import ParameterError, counted, nearest, parameter_option
from ..forms import Merging, Rows, Tensor, WeightedSum, Whole
from ..reductions import Reduction

# `parameter` was here: who imports it by its path finds it still.
from .parameters import Parameter, checked, parameter, parameters_of  # noqa: F401

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "modelsoup.methods"

Asking = Generator[Sequence[Reduction], Sequence[Any], Merging]
"""A method at work: it yields what it must know, and returns what is to be done."""


def _same(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return shape


@dataclass(frozen=True)
class Auxiliary:
    """What a method takes beside the models: a checkpoint for each, with tensors of their names.

    Where no such checkpoint has a tensor, the method is asked to do without.

    Attributes:
        doc: one line for `soup methods NAME`.
        shape: of a tensor's shape, the one of what belongs to it; None where nothing does.
    """

    doc: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...] | None] = _same


@dataclass(frozen=True)
class Method:
    """A merge method: one function.

    Attributes:
        name: as `--method` takes it.
        function: `function(x, parameter=…, …)` with a `Tensor`: it gives back a `WeightedSum`, a
            function of a block, `Rows` or `Whole`. As a generator it yields lists of reductions
            first, and gets their values. What it asks for may depend on parameters, and on shapes,
            but not on values.
        models: how few and how many models it merges, the base not counted.
        base: whether it needs a base model; None: it can do with or without one.
        from_beta: the parameters that `--beta β` stands for, if it means anything here.
        normalizes: the parameter under which its weights are divided by their sum, so that they
            must have one; empty where there is none.
        layers: whether it treats layers by their depth, so that there must be some.
        matrices: whether it is made for matrices, and does something else with other tensors.
        aux: auxiliary inputs that it needs, by name. Where one has another shape than its tensor,
            the method gives a `Whole` without reductions.
        purpose: what it is for: `average`, `interpolate`, `task vectors`, …; `soup methods` sorts
            by it.
        summary: one line for `soup methods`.
        source: the paper or page that defines it.
        version: changes when the same inputs would give other bytes; results in a store are named
            by it. Without one, the text of the modules that define the method stands in its place.
    """

    name: str
    function: Callable[..., Any]
    models: tuple[int, int | None] = (2, None)
    base: bool | None = False
    from_beta: Callable[[float], dict[str, Any]] | None = None
    normalizes: str = ""
    layers: bool = False
    matrices: bool = False
    aux: Mapping[str, Auxiliary] = field(default_factory=dict, hash=False)
    purpose: str = "other"
    summary: str = ""
    source: str = ""
    version: str = ""

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """Its parameters, by the names that users write: `lambda` for an argument `lambda_`."""
        return parameters_of(self.function, self.name)

    def auxiliary(self, name: str) -> Auxiliary:
        """An auxiliary input by its name.

        Raises:
            ParameterError: the method has none of that name.
        """
        if name not in self.aux:
            has = f" (it has {', '.join(self.aux)})" if self.aux else " (it has none)"
            raise ParameterError(
                f"the method {self.name!r} has no auxiliary input {name!r}"
                f"{nearest(name, self.aux) or has}"
            )
        return self.aux[name]

    def ask(self, x: Tensor, parameters: Mapping[str, Any]) -> Asking:
        """Have it say what it must know of a tensor, and what is to be done with it.

        Args:
            x: the tensor.
            parameters: checked ones, by the names of its arguments.
        """
        made: Any = self.function(x, **parameters)
        if isinstance(made, GeneratorType):
            made = yield from made
        if not isinstance(made, WeightedSum | Rows | Whole) and not callable(made):
            raise ParameterError(
                f"the method {self.name!r} gave {type(made).__name__} for {x.name}, and not a "
                f"WeightedSum, Rows, Whole or a function of a block"
            )
        if isinstance(made, WeightedSum):
            if x.aux:
                raise ParameterError(
                    f"the method {self.name!r} gave a WeightedSum, which leaves auxiliary inputs "
                    f"out: give a function of a block"
                )
            wanted = x.count + (x.has_base and not made.of_deltas)
            if len(made.coefficients) != wanted:
                raise ParameterError(
                    f"the method {self.name!r} returned {len(made.coefficients)} coefficients for "
                    f"{counted(wanted, 'input')}"
                )
            made = replace(made, coefficients=tuple(map(float, made.coefficients)))
        return cast("Merging", made)


_methods: dict[str, Method] = {}


def method(name: str, **properties: Any) -> Callable[[Callable[..., Any]], Method]:
    """Register a function as a merge method; the keywords are the attributes of `Method`.

    Raises:
        ParameterError: the name is taken, or a parameter of the function is of no known kind.
    """

    def register(function: Callable[..., Any]) -> Method:
        known = _methods.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise ParameterError(
                f"a method called {name!r} exists already, in {known.function.__module__}"
            )
        _methods[name] = Method(name, function, **properties)
        return _methods[name]

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

    Args:
        name: of a registered method, of one that a package offers, or `module:function`.

    Raises:
        ParameterError: there is none of that name, or its package cannot be imported.
    """
    if not isinstance(name, str):  # a plan may say anything
        raise ParameterError(f"method is {name!r}, not a name")
    if name not in _methods:
        point = entry_point_methods().get(name)
        if point is None and ":" not in name:
            known = method_names()
            hint = nearest(name, known) or f" (there are {', '.join(known)})"
            raise ParameterError(f"no merge method is called {name!r}{hint}")
        value = name if point is None else point.value
        try:
            loaded = _imported(name) if point is None else point.load()
        except Exception as error:  # a strange module may raise anything
            told = str(error) or type(error).__name__
            raise ParameterError(f"the method {name!r} ({value}) failed: {told}") from error
        if not isinstance(loaded, Method):
            raise ParameterError(f"the method {name!r} ({value}) is no modelsoup Method")
        _methods[name] = loaded
    return _methods[name]


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@cache
def code_version(chosen: Method) -> str:
    """What names the code of a method: its version, or a digest of the modules that define it.

    Raises:
        ParameterError: it has neither a version nor a text.
    """
    if chosen.version:
        return chosen.version
    import hashlib  # loads OpenSSL, which a merge seldom needs

    digest = hashlib.sha256()
    parts = (chosen.function, chosen.from_beta)
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


def build_parameters(
    chosen: Method,
    given: Mapping[str, Any],
    models: int,
    *,
    asked: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """Check parameters and fill in defaults.

    Args:
        chosen: the method.
        given: name → number, truth value, word, or one number a model.
        models: how many models are merged, the base not counted.
        asked: how a parameter is given, where it is not as the recipe's are.

    Returns:
        by the names of the function's arguments; of a `PerModel` one a tuple of `models` floats.

    Raises:
        ParameterError: an unknown name, a missing one, a wrong count, or a value out of range.
    """
    known = chosen.parameters
    for name in given:
        if name not in known:
            there = f" (it has {', '.join(known)})" if known else " (it has none)"
            raise ParameterError(
                f"the method {chosen.name!r} has no parameter {name!r}"
                f"{nearest(name, known) or there}"
            )
    values = {}
    for name, own in known.items():
        value = given.get(name, own.default)
        if value is inspect.Parameter.empty:
            how = parameter_option(name, "…") if asked is None else asked(name)
            raise ParameterError(
                f"the method {chosen.name!r} needs the parameter {name!r} ({how}): {own.doc}"
            )
        values[_argument(chosen, name)] = checked(chosen.name, own, value, models)
    return values


def check_value(chosen: Method, own: Parameter, value: Any) -> None:
    """Whether a value is one that a parameter takes, for one model.

    Raises:
        ParameterError: it is of another kind, or out of range.
    """
    checked(chosen.name, own, value, 1)


def _argument(chosen: Method, name: str) -> str:
    arguments = inspect.signature(chosen.function).parameters
    return name if name in arguments else f"{name}_"
