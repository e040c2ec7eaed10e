"""Which tensors of the models become one tensor of the output: those of its name, or others.

A plain merge takes the tensor of the same name from every model. *Renames* have a model's tensors
go by other names; *slices* stack layers of the models anew. Both are done before anything else: a
`Layout` has the models as rules and methods see them, and where each of their tensors really lies.

A rename is `PATTERN=NEW`: `*` in the pattern stands for any characters, and in the new name for
the same ones; `[x]` is the character x, whatever it is. Of several the first that matches decides.
`second:PATTERN=NEW` is for that model alone.

A slice is `MODEL[START:STOP]`, the layers from START up to STOP, without it; with a `+` between
them, those of several models that are merged: `1[0:16]+2[8:24]`. `base[0:16]` is what they are
merged over, and `1:encoder.layers[0:6]` says which layers, where a model has several stacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import (
    MismatchError,
    ParameterError,
    RuleError,
    are_counted,
    counted,
    listed,
    nearest,
    option,
    renaming_option,
    said,
)
from ..files.checkpoint import Checkpoint, TensorInfo
from ..files.names import Layer, is_embedding, layer_of
from .rules import BASE, source_name

_MODELS = {"first": 0, "second": 1, "base": BASE}
_OF_MODEL = re.compile(r"(first|second|base|[1-9]\d{0,4}):(.*)", re.DOTALL)
_SPAN = re.compile(r"(first|second|base|[1-9]\d{0,4})(?::([^\[\]]+))?\[(\d{1,5}):(\d{1,5})\]")
_BARE = re.compile(r"(?<!\[)=|=(?!\])")  # a `=` that divides
_TOKENS = re.compile(r"\[(.)\]|(\*)|(.)", re.DOTALL)

_PROPOSED = 10  # renames: a hint of more is no hint

Origin = tuple[int, TensorInfo]
"""Where a tensor lies: in which model, `BASE` for the base, and there."""


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


def _model_index(word: str) -> int:
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
    return _model_index(text)


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
        pattern, model = of[2], _model_index(of[1])
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
def _expression(pattern: str) -> re.Pattern[str]:
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


class _Renaming:
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
                globs.append((k, _expression(rename.pattern), _parts(rename.new)))
            else:
                exact.setdefault(name, k)
        found: dict[str, str] = {}
        for name in model.tensors:
            first = exact.get(name, len(self.renames))
            new = name if first == len(self.renames) else _exact(self.renames[first].new) or ""
            for k, expression, parts in globs:
                if k > first:
                    break
                if match := expression.fullmatch(name):
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


@dataclass(frozen=True, slots=True)
class Span:
    """Layers of one model: part of a slice.

    Attributes:
        model: which, counted from 0, `BASE` for the base.
        start: the first layer.
        stop: the layer after the last.
        stack: what they are layers of, or a part of its name: `encoder`; empty where the model has
            one stack only.
    """

    model: int
    start: int
    stop: int
    stack: str = ""

    def __str__(self) -> str:
        stack = f":{self.stack}" if self.stack else ""
        model = "base" if self.model == BASE else self.model + 1
        return f"{model}{stack}[{self.start}:{self.stop}]"


Slice = tuple[Span, ...]
"""Layers that are merged with each other, those of the base among them."""


def slice_text(of: Slice) -> str:
    """A slice as it is written: `1[0:16]+2[8:24]`."""
    return "+".join(map(str, of))


def parse_slices(value: object) -> tuple[Slice, ...]:
    """Slices from what a recipe's `slices` may be: a text, or a list of them.

    Raises:
        RuleError: anything else; a malformed or an empty range; or slices that do not merge the
            same number of layers with each other everywhere.
    """
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence):
        raise RuleError(f"slices is {said(value)}, not 'MODEL[START:STOP]' or a list of them")
    slices = tuple(_slice(item) for item in items)
    counts = [sum(span.model != BASE for span in spans) for spans in slices]
    if len(set(counts)) > 1:
        first = next(k for k, count in enumerate(counts) if count != counts[0])
        raise RuleError(
            f"the slice {slice_text(slices[0])!r} is of {counted(counts[0], 'model')}, and "
            f"{slice_text(slices[first])!r} of {counts[first]}: all must be of as many"
        )
    return slices


def _slice(item: object) -> Slice:
    if isinstance(item, tuple) and item and all(isinstance(span, Span) for span in item):
        spans = item
    elif isinstance(item, str):
        spans = tuple(_span(part.strip(), item) for part in item.split("+"))
    else:
        raise RuleError(f"slices has {said(item)}, which is no slice (such as '1[0:16]')")
    text = slice_text(spans)
    lengths = {span.stop - span.start for span in spans}
    if min(lengths) <= 0:
        raise RuleError(
            f"the slice {text!r} has no layers: it begins with the first number and ends before "
            f"the second"
        )
    if len(lengths) > 1:
        raise RuleError(f"the slice {text!r} merges ranges of different lengths")
    if len({span.stack for span in spans}) > 1:
        raise RuleError(f"the slice {text!r} is of different stacks of layers")
    models = [span.model for span in spans]
    if models.count(BASE) > 1 or models == [BASE]:
        raise RuleError(f"the slice {text!r} must have layers of models, and of the base once")
    return spans


def _span(part: str, item: str) -> Span:
    found = _SPAN.fullmatch(part)
    if found is None:
        raise RuleError(
            f"the slice {item!r} has {part!r}, which is not MODEL[START:STOP], such as 1[0:16] or "
            f"base[8:24]"
        )
    return Span(_model_index(found[1]), int(found[3]), int(found[4]), found[2] or "")


@dataclass(frozen=True)
class Layout:
    """The models as a merge sees them.

    Attributes:
        models: for each place in the merge, a checkpoint whose tensors go by the output's names.
        base: the base model, the same way.
        origins: place, `BASE` for the base → output name → where its tensor really lies; empty
            where all models are as they are.
        slices: `slice:1` → the output tensors of the first slice, and so on.
        layers: output name → its layer's number within its slice, and how many that has; empty
            without slices.
        depths: where slices are, model, `BASE` for the base → what its layers are called → how
            many it has.
    """

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    origins: Mapping[int, Mapping[str, Origin]] = field(default_factory=dict)
    slices: Mapping[str, set[str]] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    depths: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def origin(self, place: int, info: TensorInfo) -> Origin:
        """Where a tensor lies that a place of the merge has."""
        return self.origins[place][info.name] if self.origins else (place, info)


def laid_out(
    models: Sequence[Checkpoint], base: Checkpoint | None, renames: Sequence[Rename] = (),
    slices: Sequence[Slice] = (),
) -> Layout:  # fmt: skip
    """The models as a merge with these renames and slices sees them.

    Raises:
        RuleError: a rename that matches nothing, or that makes two tensors one.
        ParameterError: a slice of a model that is not given, or a model in no slice.
        MismatchError: a slice past the end of a model, of a model without layers, or of models
            that do not fit.
    """
    if not renames and not slices:
        return Layout(tuple(models), base)
    given = dict(enumerate(models)) | ({} if base is None else {BASE: base})
    _must_be_given([r.model for r in renames if r.model is not None], given, "rename")
    seen = _renamed(given, renames)
    if slices:
        return _stacked(given, seen, slices)
    views = {place: _view([given[place]], origins) for place, origins in seen.items()}
    return Layout(tuple(views[k] for k in range(len(models))), views.get(BASE), seen)


def _must_be_given(wanted: Iterable[int], given: Mapping[int, Checkpoint], what: str) -> None:
    for model in wanted:
        if model == BASE and BASE not in given:
            raise ParameterError(f"a {what} is of the base model ({option('base', 'BASE')})")
        if model not in given:
            count = len(given) - (BASE in given)
            raise ParameterError(f"a {what} is of model {model + 1}, but there are {count}")


def _renamed(
    given: Mapping[int, Checkpoint], renames: Sequence[Rename]
) -> dict[int, dict[str, Origin]]:
    renaming = _Renaming(renames)
    seen = {}
    for index, model in given.items():
        names = renaming.names(model, index)
        seen[index] = {new: (index, model.tensors[old]) for new, old in names.items()}
    for number, rename in enumerate(renames):
        if number not in renaming.used:
            every = dict.fromkeys(name for model in given.values() for name in model.tensors)
            wanted = rename.pattern.replace("*", "").rstrip(".")
            starts = sorted({name.partition(".")[0] for name in every})
            if any(map(_expression(rename.pattern).fullmatch, every)):
                raise RuleError(
                    f"the rename {str(rename)!r} never applies: earlier ones take all that it "
                    f"matches"
                )
            raise RuleError(
                f"the rename {str(rename)!r} matches no tensor"
                f"{nearest(wanted, [*starts, *every]) or f' (there are {listed([*every][:3])})'}"
            )
    return seen


def _view(of: Sequence[Checkpoint], origins: Mapping[str, Origin]) -> Checkpoint:
    """A checkpoint that is not there: tensors of some models under other names."""
    first = of[0]
    path = first.path if len(of) == 1 else Path(" and ".join(model.name for model in of))
    tensors = {
        name: info if info.name == name else info._replace(name=name)
        for name, (_, info) in origins.items()
    }
    notes = dict.fromkeys(note for model in of for note in model.notes)
    return Checkpoint(
        path, (), tensors, first.metadata, is_folder=first.is_folder, parts=first.parts,
        notes=[*notes],
    )  # fmt: skip


def _stacked(
    given: Mapping[int, Checkpoint], seen: Mapping[int, Mapping[str, Origin]],
    slices: Sequence[Slice],
) -> Layout:  # fmt: skip
    """Layers stacked anew; they are numbered in the order of the slices."""
    used = dict.fromkeys(span.model for spans in slices for span in spans)
    _must_be_given(used, given, "slice")
    if unused := [source_name(k) for k in given if k not in used]:
        raise ParameterError(f"no slice has layers of the {unused[0]} model")
    inside = {index: _by_layer(origins) for index, origins in seen.items()}
    stacks = {
        span: _stack_of(span, given[span.model], inside[span.model])
        for spans in slices for span in spans
    }  # fmt: skip
    _must_fit(slices, stacks, given, inside)

    # Place in the merge → for each slice, the span there. The base has a place of its own.
    places: dict[int, list[Span | None]] = {}
    for number, spans in enumerate(slices):
        models = [span for span in spans if span.model != BASE]
        of_base = [span for span in spans if span.model == BASE]
        for place, span in [*enumerate(models), *((BASE, span) for span in of_base)]:
            places.setdefault(place, [None] * len(slices))[number] = span
    names: dict[str, set[str]] = {f"slice:{n}": set() for n in range(1, len(slices) + 1)}
    layers: dict[str, tuple[int, int]] = {}
    depths: dict[str, int] = {}
    origins: dict[int, dict[str, Origin]] = {place: {} for place in places}
    for number, spans in enumerate(slices):
        stack = stacks[next(span for span in spans if span.model != BASE)]
        length = spans[0].stop - spans[0].start
        begin = depths.get(stack, 0)
        depths[stack] = begin + length
        for place, of_place in places.items():
            own = of_place[number]
            for offset in range(0 if own is None else length):
                assert own is not None
                here = inside[own.model][stacks[own]].get(own.start + offset, {})
                for rest, origin in here.items():
                    name = Layer(stack, begin, rest).numbered(begin + offset)
                    origins[place][name] = origin
                    layers[name] = offset, length
                    names[f"slice:{number + 1}"].add(name)
    # Of what stands before the layers and behind them, slices of its own stack decide, if they can.
    numbers: dict[str, list[int]] = {"": list(range(len(slices)))}
    for number, spans in enumerate(slices):
        numbers.setdefault(f"{stacks[spans[0]].rpartition('.')[0]}.", []).append(number)
    stacked = set(stacks.values())
    for place, of_place in places.items():
        for home, inside_home in numbers.items():
            for number in dict.fromkeys((inside_home[0], inside_home[-1])):
                own = of_place[number]
                for name, origin in () if own is None else seen[own.model].items():
                    found = layer_of(name)
                    if found is not None and found.stack in stacked:
                        continue
                    if home != max((h for h in numbers if name.startswith(h)), key=len):
                        continue
                    is_first = found is not None or is_embedding(name)
                    if number == inside_home[0 if is_first else -1]:
                        origins[place][name] = origin
                        names[f"slice:{number + 1}"].add(name)
    views = {
        place: _view([given[k] for k in dict.fromkeys(s.model for s in of_place if s)], there)
        for (place, of_place), there in zip(places.items(), origins.values(), strict=True)
    }
    return Layout(
        tuple(views[k] for k in range(len(views) - (BASE in views))), views.get(BASE), origins,
        names, layers, {index: _depths(own) for index, own in inside.items()},
    )  # fmt: skip


_Stacks = dict[str, dict[int, dict[str, Origin]]]
"""Stack of layers → layer → the rest of a name → where it lies."""


def _by_layer(origins: Mapping[str, Origin]) -> _Stacks:
    found: _Stacks = {}
    for name, origin in origins.items():
        if layer := layer_of(name):
            found.setdefault(layer.stack, {}).setdefault(layer.number, {})[layer.rest] = origin
    return found


def _depths(stacks: _Stacks) -> dict[str, int]:
    return {stack: max(layers) + 1 for stack, layers in stacks.items()}


def _stack_of(span: Span, model: Checkpoint, stacks: _Stacks) -> str:
    """What the layers of a span are called, after a look at whether they are there."""
    depths = _depths(stacks)
    told = listed([f"{stack} ({depth})" for stack, depth in depths.items()])
    if not depths:
        raise MismatchError(
            f"{model.name} has no layers that a slice could take: none of its tensors is called "
            f"layers.N, blocks.N, h.N, resblocks.N or layer.N"
        )
    within = [stack for stack in depths if f".{span.stack}." in f".{stack}."]
    if span.stack in depths:
        within = [span.stack]
    if span.stack and not within:
        raise MismatchError(
            f"{model.name} has no layers called {span.stack!r}"
            f"{nearest(span.stack, depths) or f' (there are {told})'}"
        )
    if len(within if span.stack else depths) > 1:
        named = replace(span, stack=next(iter(depths)))
        raise MismatchError(
            f"{model.name} has several stacks of layers, {told}: say which, as in {named}"
        )
    stack = within[0] if span.stack else next(iter(depths))
    if span.stop > depths[stack]:
        raise MismatchError(
            f"the slice {span} goes past the end: {model.name} has "
            f"{counted(depths[stack], 'layer')}, {stack}.0 to {stack}.{depths[stack] - 1}"
        )
    return stack


def _must_fit(
    slices: Sequence[Slice], stacks: Mapping[Span, str], given: Mapping[int, Checkpoint],
    inside: Mapping[int, _Stacks],
) -> None:  # fmt: skip
    """Whether layers of different models can stand in one stack."""
    firsts: dict[str, Span] = {}  # stack, as slices name it → whose layers came first
    for span in (span for spans in slices for span in spans):
        first = firsts.setdefault(span.stack, span)
        if span.model == first.model:
            continue
        names = [given[first.model].name, given[span.model].name]
        if stacks[span] != stacks[first]:
            models = [model for index, model in given.items() if index != BASE]
            told = proposal(models, given.get(BASE))
            raise MismatchError(
                f"{names[0]} calls its layers {stacks[first]}, and {names[1]} {stacks[span]}"
                f"{'' if told is None else f': {told}'}"
            )
        shapes = [_shapes(inside[s.model][stacks[s]]) for s in (first, span)]
        other = [rest for rest in shapes[0] if shapes[0][rest].isdisjoint(shapes[1].get(rest, ()))]
        other = [rest for rest in other if rest in shapes[1]]
        if other:
            rest = other[0]
            unlike = [str(list(min(found[rest]))) for found in shapes]
            raise MismatchError(
                f"layers of {names[0]} and of {names[1]} cannot be stacked: "
                f"{are_counted(len(other), 'tensor')} of other shapes, such as {rest} "
                f"({' and '.join(unlike)})"
            )


def _shapes(layers: Mapping[int, Mapping[str, Origin]]) -> dict[str, set[tuple[int, ...]]]:
    found: dict[str, set[tuple[int, ...]]] = {}
    for inside in layers.values():
        for rest, (_, info) in inside.items():
            found.setdefault(rest, set()).add(info.shape)
    return found


def renames_option(renames: Sequence[Rename]) -> str:
    """Renames as whoever reads a hint would write them."""
    return renaming_option([(str(rename), rename.of_whom, rename.new) for rename in renames])


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
        made = _Renaming([rename]).names(model, 0)
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
