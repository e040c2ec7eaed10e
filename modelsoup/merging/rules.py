"""Layer rules: what happens to each tensor of a merge. The first rule that matches decides.

A rule is a pattern over whole tensor names and what to do with them. Patterns:

- a glob: `disc.*`, `G_?.model.1.*` (`*` crosses dots);
- `re:` and a regular expression that must match the whole name;
- `group:NAME`, where the recipe (or a trainer) defines that group;
- `slice:N`, the tensors of a recipe's Nth slice.

The presets of the tree paper (Table I and section III of "Tree-based Optimization for
Image-to-Image Translation with Imbalanced Datasets on the Edge") are words in the same place:
`all` (S1), `low-level` (S2-A), `frozen` (S2-B), and one strategy per subnetwork (S3).
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from ..errors import RuleError, counted, listed, nearest, option, said
from ..files.names import natural_key
from .values import ParameterValue, parse_value, truth, value_as_json, written

Action = Literal["merge", "keep", "drop"]
Rest = Literal["merge", "first", "second", "base", "drop", "error"]

RESTS: tuple[Rest, ...] = ("merge", "first", "second", "base", "drop", "error")
BASE = -1
"""As `Rule.source`: the base model."""

_SOURCES = {"keep": 0, "first": 0, "copy": 0, "second": 1, "base": BASE}
_DROPS = ("drop", "scratch")
_PRESETS = ("all", "low-level", "frozen", "subnetwork")
WORDS = ("merge", *_SOURCES, *_DROPS, "freeze", *_PRESETS[:3])

_EXPECTED = f" (expected, separated by ';': a number, {', '.join(WORDS)}, a method, NAME:VALUE)"

_PATIENCE = 10.0  # seconds for a regular expression and all names
_NESTED = 100  # groups in groups


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do with the tensors whose names match.

    Attributes:
        pattern: a glob, `re:…` or `group:…`.
        action: `merge` them, `keep` them from one model, or `drop` them from the output.
        source: for `keep`: 0 the first model, 1 the second, …, `BASE` the base model.
        low_level: take only the low-level layers among the matching tensors.
        frozen: a trainer must not change these tensors afterwards.
        method: the merge method, None for the recipe's.
        parameters: the method's parameters, over the recipe's.
    """

    pattern: str
    action: Action = "merge"
    source: int = 0
    low_level: bool = False
    frozen: bool = False
    method: str | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """What is done, as the grammar has it."""
        words = {"merge": self.method or "merge", "drop": "drop", "keep": source_name(self.source)}
        parts = [words[self.action]]
        parts += ["low-level"] if self.low_level else []
        parts += ["freeze"] if self.frozen else []
        return [*parts, *(f"{k}:{written(v)}" for k, v in self.parameters.items())]

    def __str__(self) -> str:
        return f"{self.pattern} → {'; '.join(self.words)}"


def source_name(source: int) -> str:
    """`first`, `second`, `base`, `model 3`: how a person calls an input."""
    named = {BASE: "base", 0: "first", 1: "second"}
    return named.get(source, f"model {source + 1}")


def parse_rule(text: str) -> Rule:
    """A rule from its command-line form: `PATTERN` or `PATTERN=ITEM;ITEM;…`.

    Items: a number (β), `merge`, `keep` or `first`, `second`, `base`, `drop`, `freeze`, a preset
    (`all`, `low-level`, `frozen`), a method's name, or `parameter:value` (a list as `0.2,0.8`).

    Raises:
        RuleError: an empty pattern, or an item that is none of these.
    """
    pattern, items = _split(text)
    return rule_from(pattern, [item.strip() for item in items.split(";")])


def _split(text: str) -> tuple[str, str]:
    """Divide at the last `=` whose right side cannot belong to a regular expression."""
    pattern, equals, items = text.rpartition("=")
    if not equals or any(c in items for c in "()[]*?\\|^$"):
        return text.strip(), "merge"
    return pattern.strip(), items.strip()


def rule_from(pattern: str, items: object) -> Rule:
    """A rule from a pattern and its items, as the command line or a YAML file has them.

    Args:
        pattern: a glob, `re:…`, `group:…`, or a preset.
        items: a word or number, a list of such, or a mapping with `action`, `method`, `freeze`
            and the method's parameters.

    Raises:
        RuleError: an item that is not known.
    """
    if not pattern:
        raise RuleError("a layer rule has an empty pattern (expected a glob such as 'disc.*')")
    rule = Rule(pattern)
    if pattern in _PRESETS:
        if pattern == "subnetwork":
            raise RuleError(
                "the preset 'subnetwork' wants a strategy for each subnetwork: give one rule for "
                "each, such as 'D_*=all' and 'G_*=low-level'"
            )
        rule = _with_word(Rule("*"), pattern)
    if items is None or items in ({}, []):
        raise RuleError(f"the rule for {pattern!r} says nothing{_EXPECTED}")
    if isinstance(items, Mapping):
        parameters = {str(name).replace("_", "-"): value for name, value in items.items()}
        words = [str(parameters.pop(w)) for w in ("action", "method") if w in parameters]
        switched = {"freeze": "freeze", "frozen": "freeze", "low-level": "low-level"}
        for name in [name for name in parameters if name in switched]:
            if truth(name, parameters.pop(name)):
                words.append(switched[name])
        rule = _with_words(rule, words)
        given = {n.replace("-", "_"): parse_value(n, v) for n, v in parameters.items()}
        if twice := sorted(rule.parameters.keys() & given.keys()):
            raise RuleError(f"the rule for {pattern!r} has {twice[0]!r} twice")
        rule = replace(rule, parameters={**rule.parameters, **given})
    else:
        rule = _with_words(rule, items if isinstance(items, list) else [items])
    if rule.action != "merge" and (rule.method or rule.parameters):
        useless = rule.method or next(iter(rule.parameters))
        raise RuleError(
            f"the rule {str(replace(rule, method=None, parameters={}))!r} merges nothing, so that "
            f"{useless!r} has no use"
        )
    return rule


def _with_words(rule: Rule, words: Sequence[object]) -> Rule:
    """A rule with all its words, none of which says something else than another."""
    told: dict[object, tuple[object, object]] = {}  # what is said → by which word, and how
    for word in words:
        alone = _with_word(Rule(rule.pattern), word)
        says: dict[object, object] = dict(alone.parameters.items())
        if str(word) in ("all", "merge", *_SOURCES, *_DROPS):
            says[("action",)] = alone.action, alone.source
        if alone.method is not None:
            says[("method",)] = alone.method
        for what, how in says.items():
            first, known = told.setdefault(what, (word, how))
            if known != how:
                raise RuleError(f"the rule for {rule.pattern!r} has both {first!r} and {word!r}")
        rule = _with_word(rule, word)
    return rule


def _with_word(rule: Rule, item: object) -> Rule:
    text = "" if isinstance(item, bool | Mapping | list) else str(item)
    if text in ("all", "merge"):
        return replace(rule, action="merge")
    if text in _SOURCES:
        return replace(rule, action="keep", source=_SOURCES[text])
    if text in _DROPS:
        return replace(rule, action="drop")
    if text == "freeze":
        return replace(rule, frozen=True)
    if text in ("low-level", "frozen"):
        return replace(rule, low_level=True, frozen=rule.frozen or text == "frozen")
    name, colon, value = text.partition(":")
    if colon:
        return _with_parameter(rule, name.strip(), value.strip())
    if isinstance(item, int | float) or _is_number(text):
        return _with_parameter(rule, "beta", text)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", text):
        raise RuleError(
            f"the rule for {rule.pattern!r} has {item!r}{nearest(text, WORDS) or _EXPECTED}"
        )
    return replace(rule, method=text)  # whether there is such a method, the recipe checks


def _with_parameter(rule: Rule, name: str, value: object) -> Rule:
    return replace(rule, parameters={**rule.parameters, name: parse_value(name, value)})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_layers(layers: object) -> list[Rule]:
    """Rules from what a recipe's `layers` may be.

    A text (one rule), a list of texts, `Rule`s and mappings, or a mapping from patterns to what to
    do. In a mapping, `subnetwork` may hold a mapping of its own, from patterns to strategies. One
    in a list is such a mapping, or a rule as `rule_as_json` has it.

    Raises:
        RuleError: anything else, or a malformed rule.
    """
    if isinstance(layers, Mapping):
        rules = []
        for pattern, items in layers.items():
            if pattern == "subnetwork" and isinstance(items, Mapping):
                rules += [rule_from(str(inner), what) for inner, what in items.items()]
            else:
                rules.append(rule_from(str(pattern), items))
        return rules
    if isinstance(layers, str):
        return [parse_rule(layers)]
    if isinstance(layers, Sequence):
        return [rule for item in layers for rule in _rules_from_item(item)]
    raise RuleError(f"layers is {layers!r}, not a pattern, a list of them, or a mapping")


def _rules_from_item(item: object) -> list[Rule]:
    if isinstance(item, Rule):
        return [item]
    if isinstance(item, Mapping) and item:
        return [rule_from_json(item)] if "pattern" in item else parse_layers(item)
    if not isinstance(item, str):
        raise RuleError(f"layers has {item!r}, which is no rule (expected 'PATTERN=WHAT')")
    return [parse_rule(str(item))]


def low_level(names: Iterable[str], fraction: float) -> set[str]:
    """The tensors of the first layers, in natural name order, of each subnetwork.

    A subnetwork is what comes before the first dot (`G_A`), or a part of a folder (`unet/`); a
    layer, what comes before the last dot (`G_A.model.1`, with its weight and bias). At least one
    layer of each is taken.

    Args:
        names: tensor names.
        fraction: the share of each subnetwork's layers, in (0, 1].
    """
    layers: dict[str, dict[str, list[str]]] = {}
    for name in names:
        start, *more = re.split(r"[./]", name, maxsplit=1)
        subnetwork = start if more else ""
        layers.setdefault(subnetwork, {}).setdefault(name.rpartition(".")[0], []).append(name)
    taken: set[str] = set()
    for of_one in layers.values():
        count = math.ceil(fraction * len(of_one) - 1e-9)  # 0.1 × 30 is 3, not 3.0000000000000004
        for layer in sorted(of_one, key=natural_key)[:count]:
            taken.update(of_one[layer])
    return taken


def parse_fractions(value: object) -> dict[str, float]:
    """`--low-level`: a fraction for all names, or `PATTERN=FRACTION`, several times.

    Raises:
        RuleError: not a number in (0, 1].
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        pairs = [(str(pattern), fraction) for pattern, fraction in value.items()]
    else:
        many = list(value) if isinstance(value, list | tuple) else [value]
        pairs = [(p or "*", f) for p, _, f in (str(item).rpartition("=") for item in many)]
    fractions = {}
    for pattern, text in pairs:
        try:
            fraction = float(text)
        except (TypeError, ValueError):
            fraction = math.nan
        if not 0 < fraction <= 1:
            raise RuleError(f"low-level has {text!r} for {pattern!r}, not a fraction in (0, 1]")
        fractions[pattern] = fraction
    return fractions


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which rule each tensor falls under.

    Attributes:
        rules: the rules, and after them the one for the rest.
        chosen: tensor name → index into `rules`.
    """

    rules: tuple[Rule, ...]
    chosen: Mapping[str, int]

    def taken(self, index: int) -> list[str]:
        """The names that one rule took."""
        return [name for name, chosen in self.chosen.items() if chosen == index]


def assign(
    names: Sequence[str], rules: Sequence[Rule], *, rest: Rest = "first",
    groups: Mapping[str, Sequence[str]] | None = None,
    fractions: Mapping[str, float] | None = None, slices: Mapping[str, set[str]] | None = None,
) -> Assignment:  # fmt: skip
    """Find for each tensor the first rule that matches it.

    Args:
        names: all tensor names.
        rules: in order; none at all means `all`.
        rest: what happens to a tensor that no rule matches: it is merged, kept from the `first`,
            `second` or `base` model, dropped, or an error.
        groups: name → patterns, for `group:` patterns and the preset `low-level`.
        fractions: pattern → fraction, for the preset `low-level` where no such group is defined.
        slices: `slice:1` → the tensors of the first slice, and so on.

    Raises:
        RuleError: a malformed pattern; one that matches nothing, or nothing that an earlier rule
            left; an unknown group; or, with `rest="error"`, tensors that no rule matches.
    """
    context = _Context(names, dict(groups or {}), dict(fractions or {}), slices or {})
    chosen: dict[str, int] = {}
    final = [*(rules or [Rule("*")])]
    for index, rule in enumerate(final):
        matching = context.matching(rule)
        if not matching and names:
            raise RuleError(context.nothing(rule.pattern))
        fresh = [name for name in names if name in matching and name not in chosen]
        if not fresh and names:
            raise RuleError(
                f"the rule {str(rule)!r} never applies: earlier rules take all of the "
                f"{counted(len(matching), 'tensor')} that it matches"
            )
        chosen.update(dict.fromkeys(fresh, index))
    left = [name for name in names if name not in chosen]
    if left and rest == "error":
        raise RuleError(f"no rule matches {counted(len(left), 'tensor')}: {listed(left)}")
    final.append(_with_word(Rule("(rest)"), "first" if rest == "error" else rest))
    chosen.update(dict.fromkeys(left, len(final) - 1))
    return Assignment(tuple(final), {name: chosen[name] for name in names})


def matching(
    patterns: Sequence[str], names: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> set[str]:
    """The names that any of some patterns match.

    Raises:
        RuleError: a malformed pattern, or one that matches nothing.
    """
    context = _Context(names, dict(groups), {})
    found: set[str] = set()
    for pattern in patterns:
        matched = context.matching(Rule(pattern))
        if not matched:
            raise RuleError(context.nothing(pattern))
        found |= matched
    return found


def names_of(pattern: str, names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> set[str]:
    """The names that a pattern matches, which may be none.

    Raises:
        RuleError: a malformed pattern, or an unknown group.
    """
    return _Context(names, dict(groups), {}).matching(Rule(pattern))


class _Context:
    """Patterns against one set of names."""

    def __init__(
        self, names: Sequence[str], groups: dict[str, Sequence[str]], fractions: dict[str, float],
        slices: Mapping[str, set[str]] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.names = names
        self.groups = groups
        self.fractions = fractions
        self.found = dict(slices)  # pattern → what it matches

    def matching(self, rule: Rule) -> set[str]:
        matching = self._by_pattern(rule.pattern)
        return matching & self._low_level(matching) if rule.low_level else matching

    def _by_pattern(self, pattern: str, within: tuple[str, ...] = ()) -> set[str]:
        """The names that match; looked for once, however many groups name a pattern."""
        if pattern not in self.found:
            self.found[pattern] = self._find(pattern, within)
        return self.found[pattern]

    def _find(self, pattern: str, within: tuple[str, ...]) -> set[str]:
        if pattern == "*":
            return set(self.names)
        if pattern.startswith("group:"):
            group = pattern.removeprefix("group:")
            if pattern in within:
                raise RuleError(f"the group {group!r} contains itself")
            if len(within) > _NESTED:
                raise RuleError(f"the group {group!r} is nested more than {_NESTED} deep in others")
            if group not in self.groups:
                known = nearest(group, self.groups)
                defined = f" (defined: {listed(sorted(self.groups))})" if self.groups else ""
                raise RuleError(f"no group is called {group!r}{known}{defined}")
            patterns = self.groups[group]
            patterns = [patterns] if isinstance(patterns, str) else patterns
            nested = (self._by_pattern(inner, (*within, pattern)) for inner in patterns)
            return set().union(*nested)
        if pattern.startswith("re:"):
            return _matching(pattern, self.names)
        matches = re.compile(fnmatch.translate(pattern)).match
        return {name for name in self.names if matches(name)}

    def _low_level(self, within: set[str]) -> set[str]:
        if self.fractions:
            found: set[str] = set()
            for pattern, fraction in self.fractions.items():
                matching = self._by_pattern(pattern)
                if not matching and self.names:
                    raise RuleError(self.nothing(pattern))
                of_pattern = within & matching
                found |= low_level((n for n in self.names if n in of_pattern), fraction)
            return found
        if "low-level" in self.groups:
            return self._by_pattern("group:low-level")
        raise RuleError(
            f"the preset 'low-level' needs a group of that name or a fraction of the depth "
            f"({option('low_level', '0.3')})"
        )

    def nothing(self, pattern: str) -> str:
        """That a pattern matches nothing, with the nearest names."""
        stems = {name.rpartition(".")[0] or name for name in self.names}
        firsts = {name.partition(".")[0] for name in self.names}
        # difflib is slow over 100,000 names; layers and subnetworks say enough.
        words = {*_PRESETS, *(f"group:{name}" for name in self.groups)}
        candidates = sorted(firsts | words | set(sorted(stems)[:2000]) | set(self.names[:2000]))
        wanted = pattern.removeprefix("re:").rstrip(".*$")
        return (
            f"the pattern {pattern!r} matches no tensor (of {len(self.names):,})"
            f"{nearest(wanted, candidates) or f' (the first are {listed(self.names[:3])})'}"
        )


# What a process of its own does, which can be ended: a pattern may try more ways than anybody can
# wait for, or fill the memory.
_MATCH = """
import json, re, resource, sys
limits = [n for n in (1 << 31, *resource.getrlimit(resource.RLIMIT_AS)) if n >= 0]
try:
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), min(limits)))
except (ValueError, OSError):  # macOS does not limit it
    pass
pattern, names = json.load(sys.stdin)
try:
    matches = re.compile(pattern).fullmatch
    told = [i for i, name in enumerate(names) if matches(name)]
except (re.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
    told = str(error) or type(error).__name__
json.dump(told, sys.stdout)
"""


def _matching(pattern: str, names: Sequence[str]) -> set[str]:
    """The names that a regular expression matches whole.

    Raises:
        RuleError: it is none, or takes too long or too much memory.
    """
    import subprocess  # few rules have one

    try:
        done = subprocess.run(  # noqa: S603  # this very interpreter
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _MATCH],
            input=json.dumps([pattern.removeprefix("re:"), list(names)]), capture_output=True,
            text=True, timeout=_PATIENCE, check=True,
        )  # fmt: skip
        told = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise RuleError(
            f"{pattern!r} could not be compared with {counted(len(names), 'name')} in "
            f"{_PATIENCE:g} s: avoid repetitions of repetitions, such as (a+)+"
        ) from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        told = lines[-1] if lines and error.returncode > 0 else "it is too large"
    if isinstance(told, str):
        raise RuleError(f"{pattern!r} is not a regular expression that can be used: {told}")
    return {names[index] for index in told}


def covering(names: Sequence[str], every: Iterable[str]) -> list[str]:
    """Few patterns that match just these of all names: by how they begin, or else how they end."""
    if len(names) == 1:
        return [plainly(names[0])]
    wanted = set(names)
    others = [name for name in every if name not in wanted]
    by_start = _patterns(names, others, lambda dots: [slice(0, dot + 1) for dot in dots], "{}*")
    by_end = _patterns(names, others, lambda dots: [slice(dot, None) for dot in dots[::-1]], "*{}")
    return min(by_start, by_end, key=len)


def _patterns(
    names: Sequence[str], others: Sequence[str], ends: Callable[[list[int]], list[slice]], glob: str
) -> list[str]:
    """For each name the shortest of its ends that no other name has, or all of it; each once."""

    def ends_of(name: str) -> list[str]:
        return [name[end] for end in ends([i for i, c in enumerate(name) if c == "."])]

    taken = {end for name in others for end in ends_of(name)}
    patterns: dict[str, None] = {}
    for name in names:
        end = next((end for end in ends_of(name) if end not in taken), None)
        patterns[plainly(name) if end is None else glob.format(plainly(end))] = None
    return list(patterns)


def plainly(text: str) -> str:
    """A glob that matches a text, whatever is in it."""
    special = text in _PRESETS or text.startswith(("re:", "group:", "slice:", " "))
    # What is not printable would be spelt out where the pattern is shown.
    escaped = [f"[{c}]" if c in "[*?" else c if c.isprintable() else "?" for c in text]
    if escaped and special and len(escaped[0]) == 1:
        escaped[0] = f"[{escaped[0]}]"
    if escaped[-1:] == [" "]:
        escaped[-1] = "[ ]"
    return "".join(escaped)


def default_rest(rules: Iterable[Rule]) -> Rest:
    """What is meant by the tensors that no rule matches, where nothing says so.

    Rules that only keep or drop are exceptions, and the rest is merged; others say what to merge.
    """
    given = list(rules)
    return "merge" if given and all(rule.action != "merge" for rule in given) else "first"


def rule_as_json(rule: Rule) -> dict[str, Any]:
    """A rule as plain data, without what was left at its default: what a lineage holds."""
    content: dict[str, Any] = {"pattern": rule.pattern, "action": rule.action}
    if rule.action == "keep":
        content["source"] = rule.source
    for name in ("low_level", "frozen", "method"):
        if getattr(rule, name):
            content[name] = getattr(rule, name)
    if rule.parameters:
        content["parameters"] = {
            name: value_as_json(value) for name, value in rule.parameters.items()
        }
    return content


_JSON: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "pattern": (lambda value: isinstance(value, str) and value != "", "a text"),
    "action": (lambda value: value in get_args(Action), "merge, keep or drop"),
    "source": (lambda value: type(value) is int and BASE <= value < 2**31, "a model's number"),
    "low_level": (lambda value: isinstance(value, bool), "true or false"),
    "frozen": (lambda value: isinstance(value, bool), "true or false"),
    "method": (lambda value: isinstance(value, str), "a name"),
    "parameters": (lambda value: isinstance(value, Mapping), "a mapping"),
}


def rule_from_json(content: Mapping[str, Any]) -> Rule:
    """A rule from what `rule_as_json` makes of it.

    Raises:
        RuleError: an unknown key, or a value of the wrong type.
    """
    if "pattern" not in content:
        raise RuleError("a layer rule has no pattern")
    for name, value in content.items():
        if name not in _JSON:
            raise RuleError(
                f"a layer rule has the unknown key {name!r}{nearest(str(name), _JSON)} "
                f"(expected {', '.join(_JSON)})"
            )
        fits, expected = _JSON[name]
        if not fits(value):
            raise RuleError(f"{name} of a layer rule is {said(value)}, not {expected}")
    given = dict(content)
    try:
        parameters = {k: parse_value(k, v) for k, v in given.pop("parameters", {}).items()}
    except OverflowError:
        raise RuleError("a parameter of a layer rule is too large for a number") from None
    return Rule(**given, parameters=parameters)
