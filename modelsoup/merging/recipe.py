"""What one merge does, whichever models it is given: a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, cast

import numpy as np

from ..errors import (
    ParameterError,
    nearest,
    option,
    said,
)
from ..files.dtypes import parse_dtype
from .layout import parse_slices, slice_text
from .methods import get_method, method_names
from .renames import model_word, parse_model, parse_renames
from .rules import (
    RESTS,
    WORDS,
    Rest,
    Rule,
    default_rest,
    parse_fractions,
    parse_layers,
    rule_as_json,
)
from .values import ParameterValue, parse_value, scalars_in, value_as_json

OnInteger = Literal["max", "first", "error"]
UNION = "union"
"""What `tokenizer_from` has in place of a model: the tokens of all of them."""
ON_INTEGER: tuple[OnInteger, ...] = ("max", "first", "error")


class RecipeFields(TypedDict, total=False):
    """The keywords of `Recipe`, for `modelsoup.merge(…, **fields)`."""

    method: str | None
    beta: float | None
    weights: Sequence[float] | None
    parameters: Mapping[str, ParameterValue]
    layers: Any
    rest: Rest | None
    groups: Mapping[str, Sequence[str]]
    low_level: Any
    renames: Any
    slices: Any
    files_from: str | None
    tokenizer_from: str | None
    chat_template: str | None
    dtype: Any
    seed: int
    on_integer: OnInteger | None
    allow_nonfinite: bool | str | Sequence[str]
    estimates: str | Sequence[str]


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of a merge, the models aside.

    Attributes:
        method: the merge method's name, see `soup methods`; None is `linear`.
        beta: the first of two models' share, in [0, 1].
        weights: one weight a model.
        parameters: the method's other parameters.
        layers: layer rules, see `modelsoup.rules.parse_layers`; none merges every tensor.
        rest: what happens to tensors that no rule matches: `merge`, kept from the `first`, `second`
            or `base` model, `drop`, or `error`. None: they are merged where all rules only keep or
            drop, as these are exceptions; else kept from the first, as the rules say what to merge.
        groups: name → patterns, for `group:NAME`.
        low_level: how much of the depth counts as low-level, see `modelsoup.rules.parse_fractions`.
        renames: what tensors of models are called otherwise, see `modelsoup.merging.renames`;
            everything else goes by the new names.
        slices: layers of the models that are stacked anew, see there; none takes them as they are.
        files_from: which model's config and other files go along into a folder: `first`, `second`,
            `3`, or `base`; None is the first.
        tokenizer_from: which model's tokenizer does, or `union`, that of `files_from` with the
            tokens of all others; embeddings are put in its order. None is that of `files_from`.
        chat_template: the chat template that the tokenizer gets; None leaves it its own.
        dtype: the stored dtype of all float tensors, a name or a numpy or torch dtype; None keeps
            the first model's.
        seed: seeds the methods that drop at random.
        on_integer: what to take where integer tensors differ; None takes the maximum of
            `num_batches_tracked` and is an error elsewhere.
        allow_nonfinite: patterns of tensors that may hold NaN and infinity where they are merged;
            True is all of them, and weights that sum to zero as well.
        estimates: patterns of tensors that say something of others and are found anew by whatever
            loads a result without them: where they would be merged, they are left out.

    Raises:
        SoupError: a value that is wrong whatever the models are.
    """

    method: str | None = None
    beta: float | None = None
    weights: Sequence[float] | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    layers: Any = ()
    rest: Rest | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    low_level: Any = None
    renames: Any = ()
    slices: Any = ()
    files_from: str | None = None
    tokenizer_from: str | None = None
    chat_template: str | None = None
    dtype: Any = None
    seed: int = 0
    on_integer: OnInteger | None = None
    allow_nonfinite: Any = ()
    estimates: Any = ()

    def __post_init__(self) -> None:
        get_method(self.method_name)
        if self.beta is not None and self.weights is not None:
            raise ParameterError(
                f"give {option('beta', 'β')} or {option('weights', 'W')}, not both"
            )
        if self.beta is not None:
            self._set("beta", check_beta(self.beta))
        if self.rest is not None and self.rest not in RESTS:
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
            self._set("dtype", parse_dtype(self.dtype))
        if self.weights is not None:
            self._set("weights", _check_list("weights", self.weights))
        self._set("seed", check_seed(self.seed))
        for name in ("groups", "parameters"):
            given = getattr(self, name)
            if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
                raise ParameterError(f"{name} is {given!r}, not a mapping from names")
        for name, group in self.groups.items():
            _patterns("groups", name, group)
        self._set("parameters", {name: parse_value(name, v) for name, v in self.parameters.items()})
        self._set("layers", tuple(parse_layers(self.layers)))
        for rule in self.layers:
            _check_method(rule)
        self._set("low_level", parse_fractions(self.low_level))
        self._set("renames", parse_renames(self.renames))
        self._set("slices", parse_slices(self.slices))
        for name in ("files_from", "tokenizer_from"):
            given = getattr(self, name)
            if given is not None and (name, given) != ("tokenizer_from", UNION):
                self._set(name, model_word(parse_model(name, given)))
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise ParameterError(f"chat_template is {said(self.chat_template)}, not a text")
        if self.rest is None:
            self._set("rest", default_rest(self.layers))
        if isinstance(self.allow_nonfinite, bool):
            self._set("allow_nonfinite", ("*",) if self.allow_nonfinite else ())
        for name in ("allow_nonfinite", "estimates"):
            given = getattr(self, name)
            if isinstance(given, str):
                given = (given,) if given else ()
            fits = isinstance(given, Sequence | AbstractSet)
            if not fits or not all(isinstance(pattern, str) for pattern in given):
                raise ParameterError(f"{name} is {given!r}, not a list of patterns")
            self._set(name, tuple(given))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def method_name(self) -> str:
        """The method where a rule does not name another."""
        return "linear" if self.method is None else self.method

    @property
    def asks_to_merge(self) -> list[str]:
        """What was given that has a use only where something is merged."""
        given = [name for name in ("method", "beta", "weights") if getattr(self, name) is not None]
        return [*given, *self.parameters]


def _check_method(rule: Rule) -> None:
    """Whether what is no word of the grammar is a method: one could mean either."""
    names = () if rule.method is None else method_names()
    if rule.method is not None and rule.method not in names:
        raise ParameterError(
            f"the rule for {rule.pattern!r} has {rule.method!r}, which is no word of rules and no "
            f"merge method{nearest(rule.method, [*WORDS, *names])}"
        )


def methods_of(recipe: Recipe) -> list[str]:
    """All methods that decide the bytes of a merge: those that others go on from among them."""
    every = set(method_names())
    asked = [(recipe.method_name, recipe.parameters)]
    asked += [
        (rule.method or recipe.method_name, {**recipe.parameters, **rule.parameters})
        for rule in recipe.layers if rule.action == "merge"
    ]  # fmt: skip
    used: set[str] = set()
    for name, parameters in asked:
        used.add(name)
        for own in get_method(name).parameters.values():
            if own.kind == "word":
                given = parameters.get(own.name, own.default)
                used.update(str(word) for word in scalars_in(given) if word in every)
    return sorted(used)


_NAMED = (
    "groups", "low_level", "files_from", "tokenizer_from", "chat_template", "dtype", "on_integer",
)  # fmt: skip
WRITTEN = (
    "method", "beta", "weights", "parameters", "rules", "rest", "renames", "slices", *_NAMED,
    "allow_nonfinite", "estimates", "seed",
)  # fmt: skip
"""The keys of `recipe_as_json`."""


def recipe_as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, without what was left at its default; `recipe_from_mapping` takes it back.

    Its layer rules are `rules`, each a mapping.
    """
    content: dict[str, Any] = {"method": recipe.method_name}
    if recipe.beta is not None:
        content["beta"] = recipe.beta
    if recipe.weights is not None:
        content["weights"] = list(recipe.weights)
    if recipe.parameters:
        content["parameters"] = {k: value_as_json(v) for k, v in recipe.parameters.items()}
    if recipe.layers:
        content["rules"] = [rule_as_json(rule) for rule in recipe.layers]
    if recipe.rest is not None:
        content["rest"] = recipe.rest
    if recipe.renames:
        content["renames"] = list(map(str, recipe.renames))
    if recipe.slices:
        content["slices"] = list(map(slice_text, recipe.slices))
    for name in _NAMED:
        value = getattr(recipe, name)
        if value or value == "":  # an empty chat template is one
            content[name] = value
    if recipe.allow_nonfinite:
        content["allow_nonfinite"] = list(recipe.allow_nonfinite)
    if recipe.estimates:
        content["estimates"] = list(recipe.estimates)
    content["seed"] = recipe.seed
    return content


def recipe_from_mapping(content: object, where: str, beside: Iterable[str] = ()) -> Recipe:
    """A recipe from a YAML mapping, as plans and `--config` have it; see `recipe_fields`."""
    return Recipe(**recipe_fields(content, where, beside))


def recipe_fields(content: object, where: str, beside: Iterable[str] = ()) -> RecipeFields:
    """The fields of a `Recipe` from a YAML mapping.

    What is no field is one of the method's parameters. `layers` may have `rest` as a key like any
    other, and `subnetwork` may be a key of its own beside `layers: subnetwork`.

    Args:
        content: the mapping.
        where: what it is called.
        beside: other keys that may stand there, and were taken out of it.

    Raises:
        ParameterError: not a mapping, or a key that neither the recipe nor its method knows.
    """
    given = plain_keys(content, where)
    if "rules" in given:  # as `recipe_as_json` has them
        if "layers" in given:
            raise ParameterError(f"{where} has 'layers' and 'rules', which are the same")
        given["layers"] = given.pop("rules")
    known = {f.name for f in dataclasses.fields(Recipe)}
    method = get_method(str(given.get("method") or "linear"))
    own = set(method.parameters)
    parameters = given.pop("parameters", {})
    if not isinstance(parameters, Mapping):
        raise ParameterError(f"{where} has {parameters!r} as parameters, which is no mapping")
    layers = given.get("layers")
    if layers == "subnetwork" and "subnetwork" in given:
        given["layers"] = {"subnetwork": given.pop("subnetwork")}
    elif isinstance(layers, Mapping) and "rest" in layers:
        if "rest" in given:
            raise ParameterError(f"{where} has 'rest' twice: beside 'layers' and in it")
        given["rest"] = layers["rest"]
        given["layers"] = {pattern: what for pattern, what in layers.items() if pattern != "rest"}
    if isinstance(groups := given.get("groups"), Mapping):
        given["groups"] = {name: _patterns(where, name, group) for name, group in groups.items()}
    unknown = [name for name in given if name not in known | own]
    if unknown:
        keys = sorted({*known, *beside})
        raise ParameterError(
            f"{where} has the unknown key {unknown[0]!r}{nearest(unknown[0], [*keys, *own])} "
            f"(expected {', '.join(keys)}, or a parameter of {method.name!r})"
        )
    alone = {name: value for name, value in given.items() if name not in known}
    twice = sorted(alone.keys() & parameters.keys())
    if twice:
        raise ParameterError(f"{where} has {twice[0]!r} twice: among 'parameters' and beside them")
    named = {**parameters, **alone}
    fields = {name: value for name, value in given.items() if name in known}
    fields["parameters"] = {name: parse_value(name, value) for name, value in named.items()}
    return cast(RecipeFields, fields)


def plain_keys(content: object, where: str) -> dict[str, Any]:
    """A mapping's content, `on-integer` and `on_integer` being one key.

    Raises:
        ParameterError: not a mapping, or one that has a key in both spellings.
    """
    if not isinstance(content, Mapping):
        raise ParameterError(f"{where} is no mapping of options")
    given: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in given:
            raise ParameterError(f"{where} has the key {name!r} twice")
        given[name] = value
    return given


def _patterns(where: str, name: object, group: object) -> list[str]:
    patterns = [group] if isinstance(group, str) else group
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise ParameterError(f"{where}: the group {name!r} is no list of patterns: {group!r}")
    return list(patterns)


def _check_list(name: str, numbers: object) -> tuple[float, ...]:
    numbers = numbers.tolist() if isinstance(numbers, np.ndarray) else numbers
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise ParameterError(f"{name} is {numbers!r}, not a list of numbers")
    for number in numbers:
        if not _is_number(number):
            raise ParameterError(f"{name} has {number!r}, which is no number")
    return tuple(float(number) for number in numbers)


def _is_number(value: object) -> bool:
    """Whether a value is a number, of Python or numpy, and no truth value."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def check_beta(beta: object) -> float:
    if not _is_number(beta) or not 0 <= float(beta) <= 1:  # type: ignore[arg-type]
        raise ParameterError(f"beta is {beta!r}, but must be between 0 and 1")
    return float(beta)  # type: ignore[arg-type]


def check_seed(seed: object) -> int:
    """A seed that a lineage and a plan can hold.

    Raises:
        ParameterError: it is none.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ParameterError(f"seed is {said(seed)}, not an integer")
    if not 0 <= seed < 2**63:
        raise ParameterError(f"seed is {said(seed)}, not an integer from 0 to 2^63 - 1")
    return int(seed)
