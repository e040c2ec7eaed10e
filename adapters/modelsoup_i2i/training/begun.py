"""Networks that begin with another checkpoint's: `init_from`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from modelsoup import Checkpoint, MismatchError, ParameterError, nearest, open_checkpoint

from ..networks.biggans import remade
from ..networks.shapes import is_estimate

_OF = re.compile(r"(?P<path>.+):(?P<network>\w+)")


def source_of(place: Path, network: str) -> tuple[Path, str]:
    """The checkpoint that `file` or `file:D` names, and the network in it: its own one, or D."""
    named = None if place.exists() else _OF.fullmatch(str(place))
    return (place, network) if named is None else (Path(named["path"]), named["network"])


def files_begun_with(given: Mapping[str, Path]) -> list[Path]:
    """The files whose content decides how networks begin."""
    opened = (open_checkpoint(source_of(place, name)[0]) for name, place in given.items())
    return list(dict.fromkeys(file for each in opened for file in each.files))


def must_have_network(given: Mapping[str, Path], networks: Sequence[str]) -> None:
    """Raise a ParameterError for a network that the trainer lacks."""
    for name in given:
        if name not in networks:
            raise ParameterError(
                f"init_from has {name!r}, which is no network of the trainer"
                f"{nearest(name, networks)} (there are {', '.join(networks)})"
            )


def values_for(
    network: str, place: Path, wanted: Mapping[str, tuple[int, ...]], *,
    rows: Collection[str] = (), seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The tensors of one network, by its own names, as float32 or what they are stored as.

    What the other has beside them is not asked for, as a discriminator's head is not for an
    encoder. Estimates that it lacks are left out, and vectors of spectral norm of other classes.

    Args:
        network: its name.
        place: `file`, or `file:other`.
        wanted: names and shapes.
        rows: those that have a row for each class, and are re-made if their number is another one.
        seed: of what is drawn for them.

    Raises:
        CheckpointError: the file is missing or damaged.
        MismatchError: a tensor is missing or of another shape; the message names it.
    """
    path, other = source_of(place, network)
    opened: Checkpoint = open_checkpoint(path)
    there = sorted({name.partition(".")[0] for name in opened.tensors})
    if other not in there:
        raise MismatchError(
            f"init_from: {path} has no network {other!r} for {network}{nearest(other, there)} (it "
            f"has {', '.join(there)})"
        )
    found = {}
    for name, shape in wanted.items():
        info = opened.tensors.get(f"{other}.{name}")
        if info is None:
            if is_estimate(name):
                continue
            raise MismatchError(f"init_from: {path} lacks {other}.{name} {list(shape)}")
        if name in rows and info.shape[0] != shape[0] and tuple(info.shape[1:]) == tuple(shape[1:]):
            found[name] = remade(opened[f"{other}.{name}"], shape[0], seed)
            continue
        if tuple(info.shape) != tuple(shape):
            if name in map(vector_of, rows):
                continue
            raise MismatchError(
                f"init_from: {path}: {other}.{name} has the shape {list(info.shape)}, but in "
                f"{network} it is {list(shape)}"
            )
        found[name] = opened[f"{other}.{name}"]
    return found


def vector_of(weight: str) -> str:
    """The name of the singular vector beside a weight with a row for each class."""
    return f"{weight.removesuffix('weight')}u0"


def with_rows(
    start: Path, rows: Mapping[str, int], into: Path, *, seed: int, anew: bool = False
) -> Path:
    """A start whose rows are those of other classes: a copy where any number differs.

    Args:
        start: a checkpoint.
        rows: names of tensors with a row for each class → how many there must be.
        into: where the copy is made.
        seed: of what is drawn.
        anew: the classes are others even where their number is the same.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    opened = open_checkpoint(start)
    other = [n for n, count in rows.items() if n in opened.tensors
             and (anew or opened.tensors[n].shape[0] != count)]  # fmt: skip
    if not other:
        return start
    vectors = set(map(vector_of, other))
    tensors = {}
    for name in opened.tensors:
        if name in vectors:
            continue  # of so many classes: found anew when it is loaded
        values = np.asarray(opened[name])
        if values.dtype.kind not in "iub":
            values = values.astype(np.float32)
        tensors[name] = remade(values, rows[name], seed) if name in other else values
    save_file(tensors, into, {"format": "pt"})
    return into
