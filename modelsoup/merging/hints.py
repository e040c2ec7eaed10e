"""Rules that an error proposes: to be put before those that there are, or in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import (
    layer_option,
    listed,
)
from .plan import model_called
from .recipe import Recipe
from .rules import (
    Assignment,
    Rule,
    covering,
    default_rest,
    rule_from,
)

_HINTED = 5  # patterns in a hint


def instead(recipe: Recipe, assignment: Assignment, names: Sequence[str], *what: str) -> str:
    """An option that has rules do something else with some tensors, and what was meant with others.

    Args:
        recipe: what was meant.
        assignment: which of its rules each tensor falls under.
        names: the tensors.
        what: one or more things to do; the first is spelt out, the others are said to be possible.
    """
    patterns = covering(names, assignment.chosen)
    other = "".join(f", or '={word}'" for word in what[1:])
    return in_place(recipe, assignment, dict.fromkeys(patterns, what[0]), set(names), other)


def in_place(
    recipe: Recipe, assignment: Assignment, rules: Mapping[str, str], taken: set[str],
    other: str = "",
) -> str:  # fmt: skip
    """Rules to be put before those of a recipe, or in their place.

    Args:
        recipe: whose rules are there.
        assignment: which of them each tensor falls under.
        rules: pattern → what is done.
        taken: the tensors that they match.
        other: what else can be done.
    """
    given = assignment.rules[: len(recipe.layers)]
    # One from which all its tensors are taken would never apply, which is an error.
    lost = {i for i in range(len(given)) if taken.issuperset(assignment.taken(i))}
    left = [rule for i, rule in enumerate(given) if i not in lost]
    new = [rule_from(pattern, what.split(";")) for pattern, what in rules.items()]
    meant = recipe.rest if given else "merge"
    would_be = default_rest([*new, *left]) if recipe.rest == default_rest(given) else recipe.rest
    unmatched = any(
        name not in taken and (index >= len(given) or index in lost)
        for name, index in assignment.chosen.items()
    )
    rest = meant if unmatched and would_be != meant else None
    shown = layer_option(list(rules.items())[:_HINTED], rest)
    more = "" if len(rules) <= _HINTED else " …"
    place = " before your other rules" if given else ""
    if lost:
        place = f" in place of {listed([repr(str(given[i])) for i in sorted(lost)])}"
        place += " and before your other rules" if left else ""
    return f"{shown}{more}{other}{place}"


def in_rule(rule: Rule, parameter: str, value: str) -> str:
    """A rule with one more parameter, in the place of its β if it has one, as an option."""
    own = [word for word in rule.words if word.partition(":")[0] not in ("beta", parameter)]
    return layer_option([(rule.pattern, ";".join([*own, f"{parameter}:{value}"]))])


def done(rule: Rule) -> str:
    """What a rule does, as something that was done."""
    if rule.action == "merge":
        return "merged"
    return "left out" if rule.action == "drop" else f"kept from {model_called(rule.source)}"
