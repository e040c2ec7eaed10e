"""Renames that an error proposes: models that call the same tensors otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import (
    RuleError,
    listed,
)
from ..files.checkpoint import Checkpoint
from ..files.names import layer_of
from .renames import Rename, Renaming, literally, renames_option
from .rules import BASE

_PROPOSED = 10  # renames: a hint of more is no hint


@dataclass(frozen=True)
class Proposal:
    """Renames by which models call their tensors as the first one does.

    Attributes:
        renames: which.
        examples: for each, a name that it changes, and to what.
    """

    renames: tuple[Rename, ...]
    examples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        told = [f"{old} is {new}" for old, new in self.examples]
        return f"{listed(told)} ({renames_option(self.renames)} has them called alike)"


def proposal(models: Sequence[Checkpoint], base: Checkpoint | None) -> Proposal | None:
    """What is to be renamed where models call the same tensors otherwise, if that is all.

    Tensors that only one of two models has are paired by the ends of their names or, where these
    tell nothing, by shapes that only one tensor of a layer has. Where a single one finds no partner
    that way, nothing is proposed: a wrong pair would look like a merge.
    """
    found: dict[Rename, tuple[str, str]] = {}
    others = dict(enumerate(models)) | ({} if base is None else {BASE: base})
    for index, other in others.items():
        pairs = {} if index == 0 else _pairs(models[0], other)
        for name, new, rename in (
            () if pairs is None else _generalised(pairs, models[0], other, index)
        ):
            found.setdefault(rename, (name, new))
            if len(found) > _PROPOSED:
                return None
        if pairs is None:
            return None
    return Proposal(tuple(found), tuple(found.values())) if found else None


def _pairs(first: Checkpoint, other: Checkpoint) -> dict[str, str] | None:
    """The other model's names → the first's, of tensors that only go by other names.

    None where they are not certain.
    """
    here = [name for name in first.tensors if name not in other.tensors]
    there = [name for name in other.tensors if name not in first.tensors]
    if not here or not there:
        return {}
    wanted, longer = set(here), _by(here, _ends)
    pairs: dict[str, str] = {}
    for name in there:  # one is the end of the other: it only has no prefix
        ends = [end for end in _ends(name) if end in wanted] or longer.get(name, [])
        if ends and first.tensors[ends[0]].shape == other.tensors[name].shape:
            pairs[name] = ends[0]
    if len(set(pairs.values())) == len(pairs) and len(pairs) in (len(here), len(there)):
        return pairs
    return _by_shape(first, other, here, there)


def _by(names: Iterable[str], keys: Callable[[str], Iterable[Hashable]]) -> dict[Any, list[str]]:
    """Names by what they have in common."""
    found: dict[Any, list[str]] = {}
    for name in names:
        for key in keys(name):
            found.setdefault(key, []).append(name)
    return found


def _ends(name: str) -> Iterator[str]:
    """What a name ends with, all of it first: `a.b.c`, `b.c`, `c`."""
    yield name
    for index, character in enumerate(name):
        if character in "./":
            yield name[index + 1 :]


def _by_shape(
    first: Checkpoint, other: Checkpoint, here: Sequence[str], there: Sequence[str]
) -> dict[str, str] | None:
    """Pairs of which nothing else in a layer could be taken for the other; None if not all are."""

    def kind(model: Checkpoint) -> Callable[[str], list[Hashable]]:
        def of(name: str) -> list[Hashable]:
            layer = layer_of(name)
            return [(None if layer is None else layer.number, model.tensors[name].shape)]

        return of

    ours, theirs = _by(here, kind(first)), _by(there, kind(other))
    pairs: dict[str, str] = {}
    for key in {**ours, **theirs}:
        left, open_names = list(ours.get(key, ())), list(theirs.get(key, ()))
        if len(left) != len(open_names):
            return None
        alike = _by(left, _tail), _by(open_names, _tail)
        taken = set()
        for tail, names in alike[1].items() if len(left) > 1 else ():
            if len(names) == len(alike[0].get(tail, ())) == 1:
                pairs[names[0]] = alike[0][tail][0]
                taken.add(pairs[names[0]])
        left = [name for name in left if name not in taken]
        open_names = [name for name in open_names if name not in pairs]
        if len(left) > 1:
            return None
        pairs.update(zip(open_names, left, strict=True))
    # A shape alone tells something where all names are others, and not of one tensor among many.
    are_alike = all(_tail(old) == _tail(new) for old, new in pairs.items())
    return pairs if are_alike or len(there) == len(other.tensors) else None


def _tail(name: str) -> list[str]:
    """The last two words of a name: `q_proj.weight`."""
    return [".".join(re.split(r"[./]", name)[-2:])]


def _generalised(
    pairs: Mapping[str, str], first: Checkpoint, other: Checkpoint, index: int
) -> Iterator[tuple[str, str, Rename]]:
    """Few renames that have a model's tensors called as the first's are, and change no other.

    Yields:
        a name, what it becomes, and by which rename.
    """
    left = dict(pairs)
    while left:
        name, new = next(iter(left.items()))
        for rename in _candidates(name, new):
            changed = _changed(rename, other)
            if changed is None or changed.get(name) != new:
                continue
            if any(pairs.get(old) != made for old, made in changed.items()):
                continue
            yield (
                name,
                new,
                replace(rename, model=index) if _changed(rename, first) != {} else rename,
            )
            left = {old: made for old, made in left.items() if old not in changed}
            break


def _changed(rename: Rename, model: Checkpoint) -> dict[str, str] | None:
    """Which of a model's names would be others, None where two would be one."""
    try:
        made = Renaming([rename]).names(model, 0)
    except RuleError:
        return None
    return {old: new for new, old in made.items() if new != old}


def _candidates(name: str, new: str) -> Iterator[Rename]:
    """Renames of which the most general comes first, and that of the one name last."""
    words = [re.split(r"(?<=[./])", text) for text in (name, new)]
    shorter = min(map(len, words))
    differing = (k for k in range(1, shorter + 1) if words[0][-k] != words[1][-k])
    for kept in range(next(differing, shorter + 1) - 1, 0, -1):
        old, made = (f"{literally(''.join(of[: len(of) - kept]))}*" for of in words)
        yield Rename(old, made)
    layers = [found for found in (layer_of(name), layer_of(new)) if found is not None]
    if len(layers) == 2:
        old, made = (f"{literally(own.stack)}.*.{literally(own.rest)}" for own in layers)
        yield Rename(old, made)
    yield Rename(literally(name), literally(new))
