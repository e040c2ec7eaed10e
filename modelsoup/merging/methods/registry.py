"""What a merge method is, and where methods are found."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_origin, get_type_hints

from ...errors import ParameterError, counted, nearest, parameter_option
from ..forms import Block, Merging, PerModel, Rows, Tensor, WeightedSum, Whole
from ..reductions import PART, Gathering, Largest, Ranked, Reduction, sampled

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "modelsoup.methods"
PURPOSES = (
    "average", "interpolate", "task vectors", "matrices", "experts", "after a merge", "two models",
    "one model",
)  # fmt: skip
"""What methods are for, in the order in which `soup methods` has them; others follow."""
_LARGE = (4096, 4096)
Kind = Literal["number", "numbers", "integer", "truth", "word"]
_KINDS: Mapping[Any, Kind] = {
    float: "number", PerModel: "numbers", int: "integer", bool: "truth",
}  # fmt: skip

Asking = Generator[Sequence[Reduction], Sequence[Any], Merging]
"""A method at work: it yields what it must know, and returns what is to be done."""


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
    without one, the default's, or a number.

    Args:
        default: its value where none is given; without one it is required.
        low: the smallest value that is valid.
        high: the largest value that is valid.
        doc: one line for `soup methods NAME`.
    """
    return _Given(default, low, high, doc)


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
        hints = get_type_hints(self.function)
        found = {}
        for argument in list(inspect.signature(self.function).parameters.values())[1:]:
            hint, given = hints.get(argument.name), argument.default
            if not isinstance(given, _Given):
                given = _Given(given, None, None, "")
            if hint is None:  # not annotated: as its default is
                is_given = given.default is not inspect.Parameter.empty
                hint = type(given.default) if is_given else float
            words = tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()
            kind = "word" if words else _KINDS.get(hint)
            if kind is None:
                raise ParameterError(
                    f"the parameter {argument.name!r} of the method {self.name!r} is of no kind "
                    f"that a parameter can be: float, int, bool, PerModel or a Literal of words"
                )
            name = argument.name.rstrip("_")
            found[name] = Parameter(
                name, kind, given.default, given.low, given.high, words, given.doc
            )
        return found

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


@dataclass(frozen=True)
class Outline:
    """What a method asks of a tensor, and the form of what it does, before any value is read.

    Attributes:
        rounds: of reductions.
        form: what it does; for its form alone, where reductions come first.
    """

    rounds: tuple[tuple[Reduction, ...], ...]
    form: Merging

    @property
    def is_elementwise(self) -> bool:
        """Whether a block of the result takes nothing but the same block of the inputs."""
        return not self.rounds and not isinstance(self.form, Rows | Whole)

    @property
    def only(self) -> int | None:
        """The one input that the result equals exactly, whatever the values, where it does."""
        is_sum = not self.rounds and isinstance(self.form, WeightedSum)
        return self.form.only if is_sum else None  # type: ignore[union-attr]

    def passes(self, x: Tensor) -> int:
        """How often the inputs are read; for thresholds as a rule."""
        return 1 + sum(max(r.passes(x) for r in asked) for asked in self.rounds if asked)

    def sampled(self, x: Tensor) -> int:
        """How many elements of each input are read for samples."""
        if not x.is_sampled:
            return 0
        rounds = sum(
            any(isinstance(r, Largest | Ranked) and not r.rows for r in a) for a in self.rounds
        )
        return rounds * len(sampled(x)) * PART

    def state_bytes(self, x: Tensor) -> int:
        """How much memory what is gathered takes at most."""
        return sum(r.state_bytes(x) for asked in self.rounds for r in asked)


def outline(chosen: Method, x: Tensor, parameters: Mapping[str, Any]) -> Outline:
    """What a method will ask of a tensor, by asking it with guesses for an answer."""
    asking, rounds = chosen.ask(x, parameters), []
    try:
        asked = next(asking)
        while True:
            _must_be_alike(chosen, x, asked)
            rounds.append(tuple(asked))
            asked = asking.send([reduction.guess(x) for reduction in asked])
    except StopIteration as end:
        return Outline(tuple(rounds), end.value)


def _must_be_alike(chosen: Method, x: Tensor, asked: Sequence[Reduction]) -> None:
    if not isinstance(asked, Sequence):
        raise ParameterError(
            f"the method {chosen.name!r} yields {type(asked).__name__} for {x.name}, and no list "
            f"of reductions"
        )
    if len({reduction.rows for reduction in asked}) > 1:
        raise ParameterError(
            f"the method {chosen.name!r} asks for {x.name} by blocks and by rows at once: yield "
            f"them one after the other"
        )


class Asked:
    """A method at work on a tensor: the reductions under way, then what is to be done.

    Args:
        chosen: the method.
        x: the tensor.
        parameters: checked ones.
        planned: what it was found to ask for.

    Raises:
        ParameterError: later, where it asks for something else than was planned.
    """

    def __init__(
        self, chosen: Method, x: Tensor, parameters: Mapping[str, Any], planned: Outline
    ) -> None:
        self._method = chosen
        self._x = x
        self._planned = list(planned.rounds)
        self._asking = chosen.ask(x, parameters)
        self._gathering: list[Gathering] = []
        self.rows = self.wide = self._is_new = False
        self.merging: Merging | None = None
        self._go_on(None)

    @property
    def needs_pass(self) -> bool:
        """Whether another pass over the inputs is needed."""
        return self.merging is None

    @property
    def wants_sample(self) -> bool:
        """Whether some elements of all parts of the tensor would spare a pass."""
        return self._is_new and self._x.is_sampled and bool(self._sampling)

    @property
    def _sampling(self) -> list[Any]:
        if self.rows:
            return []
        return [gathering for gathering in self._gathering if hasattr(gathering, "sample")]

    def sample(self, blocks: Sequence[Block]) -> None:
        """Take in some elements of all parts of the tensor."""
        self._is_new = False
        for gathering in self._sampling:
            gathering.sample(blocks)

    def add(self, b: Block) -> None:
        """Take in a block."""
        for gathering in self._gathering:
            if gathering.needs_pass:
                gathering.add(b)

    def end_pass(self) -> None:
        """All blocks were added."""
        for gathering in self._gathering:
            if gathering.needs_pass:
                gathering.end_pass()
        while self.merging is None and not any(g.needs_pass for g in self._gathering):
            self._go_on([gathering.value for gathering in self._gathering])

    def _go_on(self, values: Sequence[Any] | None) -> None:
        try:
            asked = next(self._asking) if values is None else self._asking.send(values)
        except StopIteration as end:
            self._gathering = []
            if self._planned:
                self._differs()
            self.merging = end.value
            return
        expected = self._planned.pop(0) if self._planned else ()
        if [(type(r), r.rows) for r in asked] != [(type(r), r.rows) for r in expected]:
            self._differs()
        self.rows = any(reduction.rows for reduction in asked)
        self.wide = all(reduction.wide for reduction in asked)
        self._gathering = [reduction.begin(self._x) for reduction in asked]
        self._is_new = True

    def _differs(self) -> None:
        raise ParameterError(
            f"the method {self._method.name!r} asks of {self._x.name} something else than it did "
            f"before its values were known: what it yields may depend on parameters and shapes only"
        )


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
        values[_argument(chosen, name)] = _checked(chosen.name, own, value, models)
    return values


def check_value(chosen: Method, own: Parameter, value: Any) -> None:
    """Whether a value is one that a parameter takes, for one model.

    Raises:
        ParameterError: it is of another kind, or out of range.
    """
    _checked(chosen.name, own, value, 1)


def _argument(chosen: Method, name: str) -> str:
    arguments = inspect.signature(chosen.function).parameters
    return name if name in arguments else f"{name}_"


def _checked(method_name: str, own: Parameter, value: Any, models: int) -> Any:
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


@dataclass(frozen=True)
class Cost:
    """What a merge of a large matrix costs.

    Attributes:
        passes: how often the inputs are read, as a rule.
        at_once: what must be in memory at a time: a `block`, a `row`, or the `tensor`.
    """

    passes: int
    at_once: Literal["block", "row", "tensor"]


def cost(chosen: Method) -> Cost | None:
    """What a method costs where it keeps half of what it may keep, else with its defaults.

    What has no default is ½. None of a method that refuses such parameters.
    """
    low, high = chosen.models
    count = max(low, min(2, high or 2))
    x = Tensor("", _LARGE, count, chosen.base is True, layer=(0, 2), can_be_sampled=True)
    for thinned in (True, False):
        given = {name: _usual(own, thinned) for name, own in chosen.parameters.items()}
        try:
            planned = outline(chosen, x, build_parameters(chosen, given, count))
        except ParameterError:
            continue
        passes = planned.passes(x)
        if isinstance(planned.form, Whole):
            return Cost(passes, "tensor")
        asked = [reduction for several in planned.rounds for reduction in several]
        by_rows = isinstance(planned.form, Rows) or any(reduction.rows for reduction in asked)
        return Cost(passes, "row" if by_rows else "block")
    return None


def _usual(own: Parameter, thinned: bool) -> Any:
    if own.words:
        return own.words[0] if own.is_required else own.default
    is_share = own.kind in ("number", "numbers") and own.default == own.high == 1
    if own.is_required or (is_share and thinned):
        return 1 if own.kind in ("integer", "truth") else 0.5
    return own.default


def sorted_by_purpose(described: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Descriptions by what methods are for, then the cheaper first; what is not loaded is last."""

    def place(one: Mapping[str, Any]) -> tuple[bool, int, str, int, str]:
        purpose = one.get("purpose", "")
        known = PURPOSES.index(purpose) if purpose in PURPOSES else len(PURPOSES)
        return "from" in one, known, purpose, one.get("passes") or 0, one["name"]

    return sorted(described, key=place)


def describe(chosen: Method) -> dict[str, Any]:
    """A method as plain data, for `soup methods`."""
    costs = cost(chosen)
    return {
        "name": chosen.name,
        "summary": chosen.summary,
        "source": chosen.source,
        "purpose": chosen.purpose,
        "passes": None if costs is None else costs.passes,
        "at_once": None if costs is None else costs.at_once,
        "models": list(chosen.models),
        "base": chosen.base,
        "beta": chosen.from_beta is not None,
        "aux": {name: aux.doc for name, aux in chosen.aux.items()},
        "version": code_version(chosen),
        "parameters": [
            {
                "name": own.name,
                "kind": own.kind,
                "required": own.is_required,
                "default": None if own.is_required else own.default,
                "per_model": own.kind == "numbers",
                "low": own.low,
                "high": own.high,
                "words": list(own.words),
                "doc": own.doc,
            }
            for own in chosen.parameters.values()
        ],
    }
