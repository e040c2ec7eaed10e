"""Names by which models' tensors go instead of their own: renames.

A rename is `PATTERN=NEW`: `*` in the pattern stands for any characters, and in the new name for
the same ones; `[x]` is the character x, whatever it is. Of several the first that matches decides.
`second:PATTERN=NEW` is for that model alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..errors import (
    ParameterError,
    RuleError,
    renaming_option,
    said,
)
from ..files.checkpoint import Checkpoint
from .rules import BASE, source_name

_MODELS = {"first": 0, "second": 1, "base": BASE}
_OF_MODEL = re.compile(r"(first|second|base|[1-9]\d{0,4}):(.*)", re.DOTALL)
_BARE = re.compile(r"(?<!\[)=|=(?!\])")  # a `=` that divides
_TOKENS = re.compile(r"\[(.)\]|(\*)|(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rename:
    """What tensors are called otherwise.

    Attributes:
        pattern: of names in a model: `module.*`.
        new: what they are called in the merge: `*`.
        model: of which model, `BASE` for the base; None of all.
    """

    pattern: str
    new: str
    model: int | None = None

    @property
    def of_whom(self) -> str:
        """The pattern, and of which model's tensors, as a mapping has it."""
        return self.pattern if self.model is None else f"{model_word(self.model)}:{self.pattern}"

    def __str__(self) -> str:
        return "=".join(_BARE.sub("[=]", side) for side in (self.of_whom, self.new))


def model_word(model: int) -> str:
    """What a recipe calls a model: `first`, `second`, `3`, `base`."""
    return source_name(model).removeprefix("model ")


def model_index(word: str) -> int:
    return _MODELS[word] if word in _MODELS else int(word) - 1


def parse_model(name: str, value: object) -> int:
    """A model's index from its word, or from its number, counted from 1.

    Raises:
        ParameterError: it is neither.
    """
    text = str(value)
    if isinstance(value, bool) or not _OF_MODEL.fullmatch(f"{text}:"):
        raise ParameterError(
            f"{name} is {said(value)}, not a model: first, second, base or a number from 1 on"
        )
    return model_index(text)


def literally(name: str) -> str:
    """The pattern, or the new name, that is just a name."""
    escaped = re.sub(r"[*\[=]", r"[\g<0>]", name)
    return f"[{escaped[0]}]{escaped[1:]}" if _OF_MODEL.match(escaped) else escaped


def strip_prefix(prefix: str) -> Rename:
    """The rename that takes something off the beginning of names."""
    return Rename(f"{literally(prefix)}*", "*")


def parse_renames(value: object) -> tuple[Rename, ...]:
    """Renames from what a recipe's `renames` may be.

    Args:
        value: `PATTERN=NEW`, a list of such, of pairs and of `Rename`s, or a mapping from patterns
            to new names.

    Raises:
        RuleError: anything else, or a malformed rename.
    """
    if isinstance(value, Mapping):
        return tuple(_rename(pattern, new) for pattern, new in value.items())
    items = [value] if isinstance(value, str | Rename) else value
    if not isinstance(items, Sequence):
        raise RuleError(f"renames is {said(value)}, not 'PATTERN=NEW', a list of them or a mapping")
    return tuple(rename for item in items for rename in _renames_from_item(item))


def _renames_from_item(item: object) -> Iterator[Rename]:
    if isinstance(item, Rename):
        yield item
    elif isinstance(item, Mapping):
        yield from parse_renames(item)
    elif isinstance(item, str):
        pattern, *new = _BARE.split(item)
        if len(new) != 1:
            raise RuleError(
                f"the rename {item!r} is not PATTERN=NEW, such as 'module.*=*' (an = within a name "
                f"is [=])"
            )
        yield _rename(pattern, new[0])
    elif isinstance(item, list | tuple) and len(item) == 2:
        yield _rename(*item)
    else:
        raise RuleError(f"renames has {said(item)}, which is no rename (expected 'PATTERN=NEW')")


def _rename(pattern: object, new: object) -> Rename:
    if not isinstance(pattern, str) or not isinstance(new, str):
        raise RuleError(f"renames has {said(pattern)} → {said(new)}, which are no names")
    of, model = _OF_MODEL.fullmatch(pattern), None
    if of is not None:
        pattern, model = of[2], model_index(of[1])
    rename = Rename(pattern, new, model)
    stars = [_tokens(text).count(None) for text in (rename.pattern, rename.new)]
    if stars[0] != stars[1]:
        raise RuleError(
            f"the rename {str(rename)!r} has {stars[0]} * in its pattern and {stars[1]} in the new "
            f"name: each stands for what the other one of its place does"
        )
    if not rename.pattern or not rename.new:
        raise RuleError(f"the rename {str(rename)!r} is empty on one side")
    return rename


def _tokens(text: str) -> list[str | None]:
    """The characters of a pattern or a new name; None for a `*`."""
    return [None if star else one or other for one, star, other in _TOKENS.findall(text)]


def _exact(text: str) -> str | None:
    """The one name that a pattern matches, None where it has a `*`."""
    tokens = _tokens(text)
    return None if None in tokens else "".join(token or "" for token in tokens)


@lru_cache(maxsize=4096)
def expression(pattern: str) -> re.Pattern[str]:
    """A regular expression with a group for each `*`, which takes time in proportion to a name."""
    first, *parts = _parts(pattern)
    if not parts:
        return re.compile(re.escape(first))
    inner = "".join(f"(?>(.*?){re.escape(part)})" for part in parts[:-1])
    return re.compile(f"{re.escape(first)}{inner}(.*){re.escape(parts[-1])}", re.DOTALL)


def _parts(text: str) -> list[str]:
    """What stands between the stars."""
    parts = [""]
    for token in _tokens(text):
        if token is None:
            parts.append("")
        else:
            parts[-1] += token
    return parts


class Renaming:
    """Renames against the names of one model after the other."""

    def __init__(self, renames: Sequence[Rename]) -> None:
        self.renames = renames
        self.used: set[int] = set()

    def names(self, model: Checkpoint, index: int) -> dict[str, str]:
        """What its tensors are called in the merge → what they are in the model.

        Raises:
            RuleError: one is called nothing, or two are called the same.
        """
        of_it = [(k, r) for k, r in enumerate(self.renames) if r.model in (None, index)]
        exact: dict[str, int] = {}
        globs = []
        for k, rename in of_it:
            name = _exact(rename.pattern)
            if name is None:
                globs.append((k, expression(rename.pattern), _parts(rename.new)))
            else:
                exact.setdefault(name, k)
        found: dict[str, str] = {}
        for name in model.tensors:
            first = exact.get(name, len(self.renames))
            new = name if first == len(self.renames) else _exact(self.renames[first].new) or ""
            for k, matching, parts in globs:
                if k > first:
                    break
                if match := matching.fullmatch(name):
                    first = k
                    new = parts[0] + "".join(
                        group + part for group, part in zip(match.groups(), parts[1:], strict=True)
                    )
                    break
            self.used.add(first)
            if new != name and "" in new.split("."):
                _check_renamed(self.renames[first], name, new)
            if new in found:
                raise RuleError(
                    f"the renames make one tensor of two in {model.name}: {found[new]} and {name} "
                    f"would both be {new}"
                )
            found[new] = name
        return found


def _check_renamed(rename: Rename, name: str, new: str) -> None:
    """Whether a new name has something between its dots, as far as the old one has.

    Raises:
        RuleError: it has not.
    """
    if not new:
        raise RuleError(f"the rename {str(rename)!r} leaves nothing of the name {name!r}")
    if "" in name.split("."):
        return
    whole = Rename(f"{rename.pattern.removesuffix('*')}.*", "*", rename.model)
    is_prefix = rename.new == "*" and new[0] == "." and rename.pattern[-1] == "*"
    hint = f" ({renames_option([whole])} takes the dot off too)" if is_prefix else ""
    raise RuleError(f"the rename {str(rename)!r} makes {new!r} of {name!r}, no name{hint}")


def renames_option(renames: Sequence[Rename]) -> str:
    """Renames as whoever reads a hint would write them."""
    return renaming_option([(str(rename), rename.of_whom, rename.new) for rename in renames])
