"""Which tensors of the models become one tensor of the output: those of its name, or others.

A plain merge takes the tensor of the same name from every model. *Renames* have a model's tensors
go by other names; *slices* stack layers of the models anew. Both are done before anything else: a
`Layout` has the models as rules and methods see them, and where each of their tensors really lies.

A slice is `MODEL[START:STOP]`, the layers from START up to STOP, without it; with a `+` between
them, those of several models that are merged: `1[0:16]+2[8:24]`. `base[0:16]` is what they are
merged over, and `1:encoder.layers[0:6]` says which layers, where a model has several stacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import (
    MismatchError,
    ParameterError,
    RuleError,
    are_counted,
    counted,
    listed,
    nearest,
    option,
    said,
)
from ..files.checkpoint import Checkpoint, TensorInfo
from ..files.names import Layer, is_embedding, layer_of
from .proposals import proposal
from .renames import Rename, Renaming, expression, model_index
from .rules import BASE, source_name
from .sources import RowsOf

_SPAN = re.compile(r"(first|second|base|[1-9]\d{0,4})(?::([^\[\]]+))?\[(\d{1,5}):(\d{1,5})\]")

Origin = tuple[int, TensorInfo]
"""Where a tensor lies: in which model, `BASE` for the base, and there."""


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
    return Span(model_index(found[1]), int(found[3]), int(found[4]), found[2] or "")


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
        gathered: place and output name → what gathers its rows, where these lie in another order.
    """

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    origins: Mapping[int, Mapping[str, Origin]] = field(default_factory=dict)
    slices: Mapping[str, set[str]] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    depths: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    gathered: Mapping[tuple[int, str], RowsOf] = field(default_factory=dict)

    @property
    def views(self) -> dict[int, Checkpoint]:
        """The models by their places, the base under `BASE`."""
        return dict(enumerate(self.models)) | ({} if self.base is None else {BASE: self.base})

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
    renaming = Renaming(renames)
    seen = {}
    for index, model in given.items():
        names = renaming.names(model, index)
        seen[index] = {new: (index, model.tensors[old]) for new, old in names.items()}
    for number, rename in enumerate(renames):
        if number not in renaming.used:
            every = dict.fromkeys(name for model in given.values() for name in model.tensors)
            wanted = rename.pattern.replace("*", "").rstrip(".")
            starts = sorted({name.partition(".")[0] for name in every})
            if any(map(expression(rename.pattern).fullmatch, every)):
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
