"""What one merge does: a recipe, and the plan it makes of given models, from headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict, cast

import numpy as np

from .checkpoint import Checkpoint, TensorInfo
from .dtypes import DTYPES, compute_dtype, parse_dtype
from .errors import MismatchError, ParameterError, listed, nearest
from .methods import Method, build_parameters, get_method
from .methods.registry import densities, rescales
from .rules import (
    BASE,
    RESTS,
    Assignment,
    ParameterValue,
    Rest,
    Rule,
    assign,
    parse_fractions,
    parse_layers,
    parse_value,
    source_name,
)

OnInteger = Literal["max", "first", "error"]
ON_INTEGER: tuple[OnInteger, ...] = ("max", "first", "error")
Kind = Literal["merge", "copy", "integer"]

ZERO_SUM = 1e-8
"""Weights whose sum is smaller cannot be normalised."""

_COUNTER = "num_batches_tracked"
_RUNNING = ("running_mean", "running_var")
_SPECTRAL = ("weight_u", "weight_v", "weight.0._u", "weight.0._v")


class RecipeFields(TypedDict, total=False):
    """The keywords of `Recipe`, for `modelsoup.merge(…, **fields)`."""

    method: str
    beta: float | None
    weights: Sequence[float] | None
    parameters: Mapping[str, ParameterValue]
    layers: Any
    rest: Rest
    groups: Mapping[str, Sequence[str]]
    low_level: Any
    dtype: str | None
    seed: int
    on_integer: OnInteger | None


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of a merge, the models aside.

    Attributes:
        method: the merge method's name, see `soup methods`.
        beta: the first of two models' share, in [0, 1].
        weights: one weight a model.
        parameters: the method's other parameters.
        layers: layer rules, see `modelsoup.rules.parse_layers`; none merges every tensor.
        rest: what happens to tensors that no rule matches: kept from the `first`, `second` or
            `base` model, `drop`, or `error`.
        groups: name → patterns, for `group:NAME`.
        low_level: how much of the depth counts as low-level, see `modelsoup.rules.parse_fractions`.
        dtype: the stored dtype of all float tensors; None keeps the first model's.
        seed: seeds the methods that drop at random.
        on_integer: what to take where integer tensors differ; None takes the maximum of
            `num_batches_tracked` and is an error elsewhere.

    Raises:
        SoupError: a value that is wrong whatever the models are.
    """

    method: str = "linear"
    beta: float | None = None
    weights: Sequence[float] | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    layers: Any = ()
    rest: Rest = "first"
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    low_level: Any = None
    dtype: str | None = None
    seed: int = 0
    on_integer: OnInteger | None = None

    def __post_init__(self) -> None:
        get_method(self.method)
        if self.beta is not None and self.weights is not None:
            raise ParameterError("give --beta or --weights, not both")
        if self.beta is not None:
            _check_beta(self.beta)
        if self.rest not in RESTS:
            raise ParameterError(
                f"rest is {self.rest!r}{nearest(str(self.rest), RESTS)} "
                f"(expected {', '.join(RESTS)})"
            )
        if self.on_integer is not None and self.on_integer not in ON_INTEGER:
            raise ParameterError(
                f"on_integer is {self.on_integer!r}{nearest(str(self.on_integer), ON_INTEGER)} "
                f"(expected {', '.join(ON_INTEGER)})"
            )
        if self.dtype is not None:
            object.__setattr__(self, "dtype", parse_dtype(str(self.dtype)))
        if self.weights is not None:
            _check_list("weights", self.weights)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ParameterError(f"seed is {self.seed!r}, not an integer")
        for name in ("groups", "parameters"):
            if not isinstance(getattr(self, name), Mapping):
                raise ParameterError(f"{name} is {getattr(self, name)!r}, not a mapping from names")
        object.__setattr__(self, "layers", tuple(parse_layers(self.layers)))
        object.__setattr__(self, "low_level", parse_fractions(self.low_level))


def recipe_from_mapping(content: object, where: str) -> Recipe:
    """A recipe from a YAML mapping; what is no field of `Recipe` is one of the method's parameters.

    Raises:
        ParameterError: not a mapping, or a key that neither the recipe nor its method knows.
    """
    if not isinstance(content, Mapping):
        raise ParameterError(f"{where} is no mapping of options")
    known = {f.name for f in dataclasses.fields(Recipe)}
    method = get_method(str(content.get("method", "linear")))
    own = {f.name.rstrip("_") for f in dataclasses.fields(method.parameters)}
    given: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name == "parameters":
            if not isinstance(value, Mapping):
                raise ParameterError(f"{where} has {value!r} as parameters, which is no mapping")
            parameters.update({k: parse_value(k, v) for k, v in value.items()})
        elif name in known:
            given[name] = value
        elif name in own:
            parameters[name] = parse_value(name, value)
        else:
            raise ParameterError(
                f"{where} has the unknown key {key!r}{nearest(name, known | own)} "
                f"(expected {', '.join(sorted(known))}, or a parameter of {method.name!r})"
            )
    return Recipe(**given, parameters=parameters)


def _check_list(name: str, numbers: object) -> None:
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise ParameterError(f"{name} is {numbers!r}, not a list of numbers")


def _check_beta(beta: object) -> float:
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
        raise ParameterError(f"beta is {beta!r}, but must be between 0 and 1")
    return float(beta)


class Step(NamedTuple):
    """How one tensor of the output is made.

    Attributes:
        name, dtype, shape: of the output tensor.
        kind: `merge` (a copy if it comes from one source unchanged), `copy`, or `integer`.
        rule: index of its rule.
        sources: (model index, tensor) of what is read; the base has the index `BASE` and is first.
        method: for `merge`.
        parameters: for `merge`, prepared.
        policy: for `integer`, what to take where they differ.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    rule: int
    sources: tuple[tuple[int, TensorInfo], ...]
    method: Method | None = None
    parameters: Any = None
    policy: OnInteger = "error"

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """The dtype of the arithmetic."""
        return compute_dtype(tuple(info.dtype for _, info in self.sources))

    @property
    def passes(self) -> int:
        """How often the sources are read: for `select` as a rule, nearly equal values cost more.

        A gram takes one pass before the merge itself; an exact threshold two; restoring a norm one.
        """
        method, parameters = self.method, self.parameters
        if method is None or method.shape in ("elementwise", "whole"):
            return 1
        if method.shape == "gram":
            return 2
        models = len(self.sources) - 1
        if method.sparsify is None or all(d in (0, 1) for d in densities(parameters, models)):
            return 1
        threshold = 2 if method.sparsify == "magnitude" else 0
        return 1 + threshold + rescales(parameters)


@dataclass(frozen=True)
class Notice:
    """Something the user did not ask for and should know.

    Attributes:
        kind: `dropped`, `added`, `carried`, `recalibrate` or `dtype`.
        message: one sentence.
        names: the tensors it is about.
        level: a `warning` is an error under `strict`; a `note` only says what was done.
    """

    kind: str
    message: str
    names: tuple[str, ...]
    level: Literal["warning", "note"] = "warning"


@dataclass(frozen=True)
class RuleCount:
    """What one rule took: how many tensors and parameters."""

    rule: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class MergePlan:
    """A checked merge: what is done for each tensor of the output, from headers alone.

    Attributes:
        models: the models, the first of which gives dtypes and metadata.
        base: the base model, if there is one.
        recipe: what was planned.
        assignment: which rule each tensor falls under.
        steps: one for each output tensor, in the first model's order.
        dropped: names of the models' tensors that are not in the output.
        added: names in the output that the first model has not.
        frozen: names that a trainer must not change afterwards.
        notices: what the user should know before anything is read.
    """

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    recipe: Recipe
    assignment: Assignment
    steps: tuple[Step, ...]
    dropped: tuple[str, ...]
    added: tuple[str, ...]
    frozen: tuple[str, ...]
    notices: tuple[Notice, ...]

    @property
    def bytes_written(self) -> int:
        """The output's tensor bytes."""
        return sum(step.elements * DTYPES[step.dtype].bits // 8 for step in self.steps)

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that are read at least once."""
        return sum(map(self.bytes_to_read, self.steps))

    def bytes_to_read(self, step: Step) -> int:
        """Bytes that one pass over a step's sources reads."""
        return sum(self.model(index).bytes_to_read(info) for index, info in step.sources)

    def model(self, index: int) -> Checkpoint:
        """A model by its index, `rules.BASE` for the base."""
        model = self.base if index == BASE else self.models[index]
        assert model is not None
        return model

    @property
    def bytes_streamed(self) -> int:
        """Tensor bytes read, over all passes, and written."""
        read = sum(step.passes * self.bytes_to_read(step) for step in self.steps)
        return read + self.bytes_written

    def rule_counts(self) -> list[RuleCount]:
        """Per rule, how many tensors and parameters it took."""
        sizes = {step.name: step.elements for step in self.steps}
        for model in reversed(self.models):
            sizes.update({n: model.tensors[n].elements for n in self.dropped if n in model.tensors})
        counts = []
        for index, rule in enumerate(self.assignment.rules):
            taken = self.assignment.taken(index)
            if taken or index < len(self.assignment.rules) - 1:
                counts.append(RuleCount(str(rule), len(taken), sum(sizes[n] for n in taken)))
        return counts


def plan_merge(
    models: Sequence[Checkpoint], recipe: Recipe, *, base: Checkpoint | None = None,
    allow_nonfinite: bool = False,
) -> MergePlan:  # fmt: skip
    """Decide for every tensor how it is made, and find every fault that headers can show.

    Args:
        models: the models, the first of which gives the output's dtypes.
        recipe: what to do with them.
        base: the base model, for methods and rules that use one.
        allow_nonfinite: let weights sum to zero although they are to be normalised.

    Raises:
        ParameterError: a method, parameter or count that does not fit.
        RuleError: a rule that matches nothing.
        MismatchError: names, shapes or dtypes do not fit together under the rules.
    """
    return _Planner(tuple(models), recipe, base, allow_nonfinite).plan()


class _Planner:
    def __init__(
        self, models: tuple[Checkpoint, ...], recipe: Recipe, base: Checkpoint | None,
        allow_nonfinite: bool,
    ) -> None:  # fmt: skip
        self.models = models
        self.recipe = recipe
        self.base = base
        self.allow_nonfinite = allow_nonfinite
        self.rules: tuple[Rule, ...] = ()
        self.prepared: dict[int, tuple[Method, Any, int | None]] = {}
        self.missing: dict[str, list[str]] = {}
        self.shapes: list[str] = []
        self.dtypes: list[str] = []
        self.mixed: list[str] = []
        self.unbased: list[str] = []

    def plan(self) -> MergePlan:
        if not self.models:
            raise ParameterError("a merge needs at least one model")
        recipe, first = self.recipe, self.models[0]
        names = list(dict.fromkeys(name for model in self.models for name in model.tensors))
        assignment = assign(
            names, recipe.layers, rest=recipe.rest, groups=recipe.groups,
            fractions=recipe.low_level,
        )  # fmt: skip
        self.rules = assignment.rules
        if recipe.low_level and not any(rule.low_level for rule in self.rules):
            raise ParameterError(
                "low-level has a depth, but no rule uses it (add the rule low-level: "
                "--layers low-level)"
            )
        self._check_sources()
        for index, rule in enumerate(self.rules):
            if rule.action == "merge":
                self.prepared[index] = self._prepare(rule)
        uses_base = any(m.base for m, _, _ in self.prepared.values()) or any(
            rule.source == BASE for rule in self.rules if rule.action == "keep"
        )
        if self.base is not None and not uses_base:
            named = ", ".join(sorted({m.name for m, _, _ in self.prepared.values()})) or "no method"
            raise ParameterError(f"--base was given, but {named} uses no base model")

        steps: list[Step] = []
        dropped: list[str] = []
        for name in names:
            step = self._step(name, assignment.chosen[name])
            if step is None:
                dropped.append(name)
            else:
                steps.append(step)
        self._raise_mismatches()
        added = tuple(step.name for step in steps if step.name not in first.tensors)
        frozen = tuple(n for n, index in assignment.chosen.items() if self.rules[index].frozen)
        if not steps:
            raise MismatchError("the output would have no tensors: every one is dropped")
        notices = self._notices(assignment, steps, dropped, added)
        return MergePlan(
            self.models, self.base, recipe, assignment, tuple(steps), tuple(dropped), added,
            frozen, tuple(notices),
        )  # fmt: skip

    def _check_sources(self) -> None:
        for rule in self.rules:
            if rule.action != "keep":
                continue
            if rule.source == BASE and self.base is None:
                raise ParameterError(f"the rule {str(rule)!r} wants a base model (--base)")
            if rule.source >= len(self.models):
                raise ParameterError(
                    f"the rule {str(rule)!r} wants model {rule.source + 1}, but there are "
                    f"{len(self.models)}"
                )

    def _prepare(self, rule: Rule) -> tuple[Method, Any, int | None]:
        """A rule's method, its prepared parameters, and the model it copies, if it does."""
        recipe, count = self.recipe, len(self.models)
        method = get_method(rule.method or recipe.method)
        own_method = rule.method is not None and rule.method != recipe.method
        given: dict[str, Any] = {} if own_method else dict(recipe.parameters)
        changed = dict(rule.parameters)
        beta = changed.pop("beta", None)
        # The rule's own β or weights stand in for the recipe's.
        if beta is None and "weight" not in changed and not (own_method and recipe.beta is None):
            beta = recipe.beta
        if recipe.weights is not None and beta is None and not own_method:
            if "weight" in given:
                raise ParameterError("the weights are given twice: by --weights and as 'weight'")
            given["weight"] = tuple(recipe.weights)
        if beta is not None:
            meant = self._from_beta(method, _check_beta(beta))
            twice = sorted(meant.keys() & (changed.keys() if "beta" in rule.parameters else given))
            if twice:
                raise ParameterError(f"the same is given twice: by beta and as {twice[0]!r}")
            given.update(meant)
        given.update(changed)
        low, high = method.models
        if count < low or (high is not None and count > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            raise ParameterError(f"{method.name!r} merges {wanted} models, but {count} were given")
        if method.base and self.base is None:
            raise ParameterError(f"{method.name!r} needs a base model (--base BASE)")
        checked = build_parameters(method, given, count)
        if method.prepare and getattr(checked, "normalize", False) and not self.allow_nonfinite:
            total = sum(checked.weight)
            if abs(total) < ZERO_SUM:
                raise ParameterError(
                    f"the weights of {method.name!r} sum to {total:g} and cannot be normalised "
                    f"(--set normalize=false, or other weights)"
                )
        prepared = method.prepare(checked) if method.prepare else checked
        copied = method.identity(checked) if method.identity else None
        return method, prepared, copied

    def _from_beta(self, method: Method, beta: float) -> dict[str, Any]:
        if method.from_beta is None:
            raise ParameterError(f"beta means nothing to {method.name!r}: use --weights")
        if len(self.models) != 2:
            raise ParameterError(
                f"beta is the share of the first of two models, but {len(self.models)} were given: "
                f"use --weights"
            )
        return method.from_beta(beta)

    def _step(self, name: str, index: int) -> Step | None:
        rule = self.rules[index]
        if rule.action == "drop":
            return None
        if rule.action == "keep":
            source = self.base if rule.source == BASE else self.models[rule.source]
            assert source is not None  # _check_sources saw to it
            info = source.tensors.get(name)
            if info is None:
                if index < len(self.rules) - 1:  # asked for by a rule, not by --rest
                    who = source_name(rule.source)
                    self.missing.setdefault(f"kept from the {who} model", []).append(name)
                return None
            return self._copy(name, index, rule.source, info)
        found = [model.tensors.get(name) for model in self.models]
        if None in found:
            absent = " and ".join(
                f"{self.models[index].name}, the {source_name(index)} model"
                for index, info in enumerate(found)
                if info is None
            )
            self.missing.setdefault(f"missing from {absent}", []).append(name)
            return None
        return self._merge(name, index, cast("list[TensorInfo]", found))

    def _copy(self, name: str, index: int, model: int, info: TensorInfo) -> Step:
        return Step(
            name, self._output_dtype(info.dtype), info.shape, "copy", index, ((model, info),)
        )

    def _output_dtype(self, dtype: str) -> str:
        wanted = self.recipe.dtype
        return wanted if wanted is not None and DTYPES[dtype].kind == "float" else dtype

    def _merge(self, name: str, index: int, infos: list[TensorInfo]) -> Step | None:
        method, parameters, copied = self.prepared[index]
        based = None
        if method.base and self.base is not None:
            based = self.base.tensors.get(name)
        every = [*infos, based] if based is not None else infos
        if len({info.shape for info in every}) > 1:
            shapes = " and ".join(str(list(info.shape)) for info in every)
            self.shapes.append(f"{name} ({shapes})")
            return None
        dtypes = {info.dtype for info in every}
        kinds = {DTYPES[dtype].kind for dtype in dtypes}
        if kinds == {"float"}:
            if method.base and based is None:
                self.unbased.append(name)
                return None
            if copied is not None:
                return self._copy(name, index, copied, infos[copied])
            sources = [*enumerate(infos)]
            if based is not None:
                sources.insert(0, (BASE, based))
            if len(dtypes) > 1:
                self.mixed.append(name)
            dtype = self._output_dtype(infos[0].dtype)
            return Step(
                name, dtype, infos[0].shape, "merge", index, tuple(sources), method, parameters
            )
        if len({info.dtype for info in infos}) > 1 or len(kinds) > 1:
            self.dtypes.append(f"{name} ({' and '.join(info.dtype for info in every)})")
            return None
        default: OnInteger = "max" if name.rpartition(".")[2] == _COUNTER else "error"
        return Step(
            name, infos[0].dtype, infos[0].shape, "integer", index, tuple(enumerate(infos)),
            policy=self.recipe.on_integer or default,
        )  # fmt: skip

    def _raise_mismatches(self) -> None:
        """One sentence for each way in which the models do not fit, all at once."""
        faults = [
            f"{len(names)} tensors are {where}: {listed(names)} ({self._remedy(names[0])})"
            for where, names in self.missing.items()
        ]
        if self.unbased:
            faults.append(
                f"{len(self.unbased)} tensors are missing from the base: {listed(self.unbased)} "
                f"(keep them with a rule such as --layers '{self.unbased[0]}=first')"
            )
        if self.shapes:
            faults.append(
                f"{len(self.shapes)} tensors differ in shape: {listed(self.shapes)} (keep them "
                f"with a rule such as --layers '{self.shapes[0].split(' ')[0]}=first')"
            )
        if self.dtypes:
            faults.append(
                f"{len(self.dtypes)} tensors differ in dtype and cannot be merged: "
                f"{listed(self.dtypes)} (keep them with a rule such as --layers "
                f"'{self.dtypes[0].split(' ')[0]}=first')"
            )
        if faults:
            raise MismatchError("the models do not fit together: " + "; ".join(faults))

    def _remedy(self, name: str) -> str:
        """What to do about a tensor that not every model has."""
        has = next(index for index, model in enumerate(self.models) if name in model.tensors)
        keep = f"keep them with a rule such as --layers '{name}={source_name(has)}', or "
        return f"{keep if has < 2 else ''}leave them out with '=drop'"

    def _notices(
        self, assignment: Assignment, steps: list[Step], dropped: list[str], added: tuple[str, ...]
    ) -> list[Notice]:
        notices = []

        def notice(kind: str, names: Sequence[str], message: str) -> None:
            if names:
                text = f"{len(names)} tensors {message}: {listed(names)}"
                notices.append(Notice(kind, text, tuple(names)))

        unasked = [n for n in dropped if self.rules[assignment.chosen[n]].action != "drop"]
        notice(
            "dropped", unasked, "are not in the model that the rest is kept from, so are left out"
        )
        last = len(self.rules) - 1
        notice(
            "added", [n for n in added if assignment.chosen[n] == last],
            "are not in the first model and were added",
        )  # fmt: skip
        if self.recipe.on_integer is None:
            carried = [s.name for s in steps if s.kind == "integer"]
            notice("carried", carried, "are not floats and are carried over, not averaged")
        merged = [s.name for s in steps if s.kind == "merge"]
        running = [n for n in merged if n.rpartition(".")[2] in _RUNNING]
        notice("recalibrate", running, "are BatchNorm statistics, averaged: re-estimate them")
        spectral = [n for n in merged if n.endswith(_SPECTRAL)]
        notice("recalibrate", spectral, "are spectral-norm vectors, averaged: re-estimate them")
        notice(
            "dtype", self.mixed, f"are stored in different dtypes; the output has {_stored(steps)}"
        )
        return notices


def _stored(steps: list[Step]) -> str:
    return ", ".join(sorted({step.dtype for step in steps if step.kind == "merge"}))
