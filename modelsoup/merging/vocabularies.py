"""Models whose tokenizers have other tokens, or number them otherwise, put in the order of one.

Embeddings and heads have a row for each token. Where the output's tokenizer is not that of all the
models, their rows are gathered, each by the number that the model's own tokenizer gives the token.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import MismatchError, counted, listed
from ..files.checkpoint import Checkpoint, TensorInfo
from ..files.companions import Renumbered
from ..files.dtypes import DTYPES
from ..files.names import is_of_tokens, layer_of
from ..files.quantized import scaled_weights
from ..files.tokenizer import Vocabulary, union
from .folding import Adapted
from .layout import Layout, Origin
from .recipe import UNION
from .renames import parse_model
from .rules import BASE
from .sources import RowsOf, Stored

_NORM = re.compile(r"norm|(?:^|[._])ln", re.IGNORECASE)


@dataclass(frozen=True)
class Retokenized:
    """The vocabulary of an output that is made of several.

    Attributes:
        vocabulary: its tokens.
        added: those that the tokenizer that goes along gets, as `tokenizer.json` says them.
        numbers: the tokens that its config speaks of, as they are numbered now.
        filled: model's index → how many tokens it lacks.
    """

    vocabulary: Vocabulary
    added: tuple[Any, ...]
    numbers: Renumbered
    filled: Mapping[int, int]


def in_one_order(
    layout: Layout, models: Sequence[Checkpoint], base: Checkpoint | None, wanted: str,
    files_from: str | None,
) -> tuple[Layout, Retokenized | None]:  # fmt: skip
    """A layout in which embeddings and heads have a row for each token of one tokenizer.

    A token that a model lacks has the row of the base; without a base, of the model that
    `files_from` names; else the mean of those that have it, and zeros where none has. Where all
    models have the same tokens, the layout is as it was.

    Args:
        layout: the models as a merge sees them.
        models: those that are read.
        base: the base model that is read.
        wanted: whose tokenizer the output has, or `UNION`.
        files_from: whose config goes along; None is the first model's.

    Raises:
        MismatchError: the tokens of a model are not known, or which of its rows are theirs.
    """
    given = dict(enumerate(models)) | ({} if base is None else {BASE: base})
    known = {k: model.vocabulary for k, model in given.items()}
    if any(isinstance(model, Adapted) for model in models):
        _must_be_alike(given, known)
        return layout, None
    config = parse_model("files_from", files_from or "first")
    found = known.get(config if wanted == UNION else parse_model("tokenizer_from", wanted))
    if found is None:
        if wanted == UNION and config in given:
            raise _without_tokens([given[config].name])
        return layout, None  # whether there is a tokenizer is looked at where its files are copied
    added: list[Any] = []
    if wanted == UNION:
        found, added = union(found, [one for one in known.values() if one is not None])
    origins = {
        place: {n: layout.origin(place, t) for n, t in view.tensors.items() if is_of_tokens(n)}
        for place, view in layout.views.items()
    }
    of_name: dict[str, dict[int, Origin]] = {}
    for place, of_place in origins.items():
        for name, origin in of_place.items():
            of_name.setdefault(name, {})[place] = origin
    other = [given[k].name for k, one in known.items() if one is not None and one.ids != found.ids]
    lengths = [{_rows(info) for _, info in own.values()} for own in of_name.values()]
    if not other and all(len(rows) == 1 for rows in lengths):
        return layout, None
    vocabularies = {k: one for k, one in known.items() if one is not None}
    if unknown := [model.name for k, model in given.items() if k not in vocabularies]:
        raise _without_tokens(unknown)
    if not of_name:
        raise MismatchError(
            f"{listed(other)} has other tokens than the output, but by its name no tensor is one "
            f"of a row for each token"
        )
    _must_be_whole(layout, of_name, given, vocabularies)
    rows = 1 + max(found.ids.values())
    indices = {k: _index(one, found, rows) for k, one in vocabularies.items()}
    preferred = BASE if base is not None else None if files_from is None else config
    gathered = {
        (place, name): source
        for name, own in of_name.items()
        for place, source in _gathered(name, own, given, indices, preferred).items()
    }
    views = {place: _with(view, place, gathered) for place, view in layout.views.items()}
    before = [_rows(info) for own in of_name.values() for k, info in own.values() if k == config]
    numbers = {n: found.ids[t] for t, n in vocabularies[config].ids.items() if t in found.ids}
    filled = {k: int(np.count_nonzero(index < 0)) for k, index in indices.items()}
    every = {
        place: {name: layout.origin(place, info) for name, info in view.tensors.items()}
        for place, view in layout.views.items()
    }
    layout = replace(
        layout, models=tuple(views[k] for k in range(len(layout.models))), base=views.get(BASE),
        origins=every, gathered=gathered,
    )  # fmt: skip
    return layout, Retokenized(
        found, tuple(added), Renumbered(before[0] if before else 0, rows, numbers), filled
    )


def _rows(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 0


def _without_tokens(names: Sequence[str]) -> MismatchError:
    return MismatchError(
        f"{listed(names)} {'has' if len(names) == 1 else 'have'} no tokenizer.json that tells the "
        f"tokens, by which the rows of embeddings are put in one order"
    )


def _must_be_alike(
    given: Mapping[int, Checkpoint], known: Mapping[int, Vocabulary | None]
) -> None:  # fmt: skip
    """Whether adapters have the tokens of the model that they are for."""
    of_base = known[BASE]
    for k, own in known.items():
        if own is not None and of_base is not None and own.ids != of_base.ids:
            raise MismatchError(
                f"the adapter {given[k].name} has other tokens than {given[BASE].name}, whose "
                f"embeddings cannot be put in another order while adapters are folded: fold first"
            )


def _must_be_whole(
    layout: Layout, of_name: Mapping[str, Mapping[int, Origin]], given: Mapping[int, Checkpoint],
    vocabularies: Mapping[int, Vocabulary],
) -> None:  # fmt: skip
    """Whether all that has a row for each token is known, with the row of each."""
    for name, own in of_name.items():
        shapes = {info.shape[1:] for _, info in own.values()}
        if len(shapes) > 1:
            told = " and ".join(str(list(info.shape)) for _, info in own.values())
            raise MismatchError(f"the rows of {name} are not of one length: {told}")
        for k, info in own.values():
            model, last = given[k], max(vocabularies[k].ids.values())
            if last >= _rows(info):
                raise MismatchError(
                    f"the tokenizer of {model.name} has tokens up to number {last}, but its "
                    f"{info.name} has {counted(_rows(info), 'row')}"
                )
            if DTYPES[info.dtype].kind != "float" or info.name in scaled_weights(model.tensors):
                raise MismatchError(
                    f"{info.name} of {model.name} is quantised, and the rows of codes are not put "
                    f"in another order: dequantise it first"
                )
    for place, view in layout.views.items():
        lengths = {_rows(own[place][1]) for own in of_name.values() if place in own}
        for name, info in view.tensors.items():
            is_norm = len(info.shape) == 1 and _NORM.search(name) is not None
            if name in of_name or layer_of(name) or is_norm or lengths.isdisjoint(info.shape):
                continue
            raise MismatchError(
                f"{name} of {view.name} is as long as there are rows of embeddings, but its name "
                f"does not tell whether it has a row for each token, which are put in another order"
            )


def _index(own: Vocabulary, wanted: Vocabulary, rows: int) -> np.ndarray:
    """The row that a model has for each row of the output, -1 for none."""
    index = np.full(rows, -1, np.int32)
    for token, number in wanted.ids.items():
        index[number] = own.ids.get(token, -1)
    return index


def _gathered(
    name: str,
    own: Mapping[int, Origin],
    given: Mapping[int, Checkpoint],
    indices: Mapping[int, np.ndarray],
    preferred: int | None,
) -> dict[int, RowsOf]:
    """For each place of a merge its rows of a tensor, and others' where it has none."""
    stored = {k: Stored(given[k], info) for k, info in own.values()}
    found = {}
    for place, (k, info) in own.items():
        of = [(stored[k], indices[k])]
        lacking = indices[k] < 0
        if preferred in stored and preferred != k:
            index = np.where(lacking, indices[preferred], np.int32(-1))
            of.append((stored[preferred], index))
            lacking = lacking & (index < 0)
        for other, tensor in stored.items():
            if other not in (k, preferred):
                of.append((tensor, np.where(lacking, indices[other], np.int32(-1))))
        of = [of[0], *((tensor, index) for tensor, index in of[1:] if (index >= 0).any())]
        is_mean = np.sum([index >= 0 for _, index in of], 0).max() > 1
        dtypes = {info.dtype for _, info in own.values()}
        dtype = info.dtype
        if is_mean or len(dtypes) > 1:  # not rounded before the arithmetic
            dtype = "F64" if "F64" in dtypes else "F32"
        shape = (len(indices[k]), *info.shape[1:])
        elements = info.elements // _rows(info) * shape[0]
        told = info._replace(
            name=name, dtype=dtype, shape=shape, start=0, nbytes=elements * DTYPES[dtype].bits // 8
        )
        found[place] = RowsOf(given[k], told, tuple(of))
    return found


def _with(
    view: Checkpoint, place: int, gathered: Mapping[tuple[int, str], RowsOf]
) -> Checkpoint:  # fmt: skip
    """A model as a merge sees it, with other rows of some tensors, stored as they are."""
    seen = copy.copy(view)
    seen.tensors = dict(view.tensors)
    for (of, name), source in gathered.items():
        if of == place:
            stored = view.tensors[name].dtype
            nbytes = source.info.elements * DTYPES[stored].bits // 8
            seen.tensors[name] = source.info._replace(dtype=stored, nbytes=nbytes)
    return seen
