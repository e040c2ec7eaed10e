"""What a rule merges with: its method, and parameters, for each tensor, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ParameterError, option, parameter_option
from .hints import in_rule
from .methods import Method, build_parameters, get_method
from .recipe import Recipe, check_beta
from .rules import Rule, names_of
from .values import has_gradient, patterns_in, value_at, varies

ZERO_SUM = 1e-8
"""Weights whose sum is smaller cannot be normalised."""


class Prepared:
    """What a rule merges with.

    Attributes:
        rule: the rule.
        method: its method.
        given: parameters, as they were given.
        is_own: whether the method is the rule's, and not the recipe's.
        varies: whether a parameter is not the same for all tensors.
        checked: parameters as given → as the method takes them.
    """

    def __init__(self, rule: Rule, method: Method, given: Mapping[str, Any], is_own: bool) -> None:
        self.rule = rule
        self.method = method
        self.given = given
        self.is_own = is_own
        self.varies = any(varies(value) for value in given.values())
        self.checked: dict[Any, dict[str, Any]] = {}


class Preparation:
    """Finds methods and parameters of rules.

    Args:
        recipe: what to do.
        names: of the tensors.
        layers: the place of a tensor in the depth, by name, and how deep that is.
        count: of models.
        has_base: whether there is a base model.
        are_adapters: whether models are adapters.

    Attributes:
        unmatched: sentences on patterns of parameters that match no name.
    """

    def __init__(
        self, recipe: Recipe, names: Sequence[str], layers: Mapping[str, tuple[int, int]], *,
        count: int, has_base: bool, are_adapters: bool,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.names = names
        self.layers = layers
        self.count = count
        self.has_base = has_base
        self.are_adapters = are_adapters
        self.unmatched: dict[str, None] = {}
        self._by_pattern: dict[str, set[str]] = {}

    def prepare(self, rule: Rule) -> Prepared:
        """A rule's method and its parameters."""
        recipe, count = self.recipe, self.count
        method = get_method(rule.method or recipe.method_name)
        if self.are_adapters and method.base is False:
            raise ParameterError(
                f"{method.name!r} merges no task vectors, which adapters are: give a method that "
                f"does ({option('method', 'task_arithmetic')})"
            )
        own_method = rule.method is not None and rule.method != recipe.method_name
        given: dict[str, Any] = {} if own_method else dict(recipe.parameters)
        changed = dict(rule.parameters)
        beta = changed.pop("beta", None)
        # The rule's own β or weights stand in for the recipe's.
        if beta is None and "weight" not in changed and not (own_method and recipe.beta is None):
            beta = recipe.beta
        if recipe.weights is not None and beta is None and not own_method:
            if "weight" in given:
                raise ParameterError("the weights are given twice: as 'weights' and as 'weight'")
            given["weight"] = tuple(recipe.weights)
        if beta is not None:
            asked_by = rule if own_method or "beta" in rule.parameters else None
            meant = self._from_beta(method, check_beta(beta), asked_by)
            twice = sorted(meant.keys() & (changed.keys() if "beta" in rule.parameters else given))
            if twice:
                raise ParameterError(f"the same is given twice: by beta and as {twice[0]!r}")
            given.update(meant)
        given.update(changed)
        low, high = method.models
        if count < low or (high is not None and count > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            raise ParameterError(f"{method.name!r} merges {wanted} models, but {count} were given")
        if method.base is True and not self.has_base:
            raise ParameterError(f"{method.name!r} needs a base model ({option('base', 'BASE')})")
        if method.layers and not self.layers:
            raise ParameterError(
                f"{method.name!r} goes by the depth of layers, but no tensor is in one: none has a "
                f"name like 'layers.0.weight' or 'blocks.0.weight'"
            )
        for parameter, value in given.items():
            if has_gradient(value) and not self.layers:
                raise ParameterError(
                    f"parameter {parameter!r} goes along the depth, but no tensor is in a layer: "
                    f"none has a name like 'layers.0.weight' or 'blocks.0.weight'"
                )
            for pattern in patterns_in(value):
                if not self._matched(pattern):
                    self.unmatched[
                        f"the pattern {pattern!r} of parameter {parameter!r} matches no tensor"
                    ] = None
        prepared = Prepared(rule, method, given, own_method)
        if not prepared.varies:
            self._checked(prepared, given)
        return prepared

    def _matched(self, pattern: str) -> set[str]:
        """The names that a pattern of a parameter matches."""
        if pattern not in self._by_pattern:
            self._by_pattern[pattern] = names_of(pattern, self.names, self.recipe.groups)
        return self._by_pattern[pattern]

    def _matches(self, pattern: str, name: str) -> bool:
        return name in self._matched(pattern)

    def _checked(self, prepared: Prepared, given: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters that are the same for all tensors, or those of one, checked."""
        rule, method, own = prepared.rule, prepared.method, prepared.is_own
        asked = (lambda name: in_rule(rule, name, "…")) if own else None
        checked = build_parameters(method, given, self.count, asked=asked)
        anything = "*" in self.recipe.allow_nonfinite
        if method.normalizes and checked[method.normalizes] and not anything:
            total = sum(checked["weight"])
            if abs(total) < ZERO_SUM:
                how = parameter_option(method.normalizes, "false")
                if own or "weight" in rule.parameters:
                    how = in_rule(rule, method.normalizes, "false")
                raise ParameterError(
                    f"the weights of {method.name!r} sum to {total:g} and cannot be normalised "
                    f"({how}, or other weights)"
                )
        return checked

    def parameters(self, prepared: Prepared, name: str) -> dict[str, Any]:
        """A method's parameters for a tensor; the very same object where they are the same."""
        given = prepared.given
        if prepared.varies:
            layer = self.layers.get(name)
            at = {k: value_at(v, name, layer, self._matches) for k, v in given.items()}
            given = {k: value for k, value in at.items() if value is not None}
        key = tuple(given.items())
        if key not in prepared.checked:
            prepared.checked[key] = self._checked(prepared, given)
        return prepared.checked[key]

    def _from_beta(self, method: Method, beta: float, asked_by: Rule | None) -> dict[str, Any]:
        """The parameters that β stands for, of the recipe, or of the rule that asks for it."""
        use = option("weights", "W") if asked_by is None else in_rule(asked_by, "weight", "…")
        if method.from_beta is None:
            raise ParameterError(f"beta means nothing to {method.name!r}: use {use}")
        if self.count != 2:
            raise ParameterError(
                f"beta is the share of the first of two models, but {self.count} were given: "
                f"use {use}"
            )
        return method.from_beta(beta)
