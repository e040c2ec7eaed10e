"""Networks that begin with another checkpoint's: `init_from`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelsoup import Checkpoint, MismatchError, ParameterError, nearest, open_checkpoint

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


def values_for(network: str, place: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The tensors of one network, by its own names, as float32 or what they are stored as.

    What the other has beside them is not asked for, as a discriminator's head is not for an
    encoder.

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
            raise MismatchError(f"init_from: {path} lacks {other}.{name} {list(shape)}")
        if tuple(info.shape) != tuple(shape):
            raise MismatchError(
                f"init_from: {path}: {other}.{name} has the shape {list(info.shape)}, but in "
                f"{network} it is {list(shape)}"
            )
        found[name] = opened[f"{other}.{name}"]
    return found
