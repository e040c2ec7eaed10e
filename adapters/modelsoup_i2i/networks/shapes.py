"""Names and shapes in a checkpoint beside those that a network has; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelsoup import MismatchError

Shape = tuple[int, ...]
ESTIMATES = ("u0", "sv0", "weight_u", "weight_v")
"""The last parts of names of what weights decide: see `spectral.estimated`."""


def is_estimate(name: str) -> bool:
    """Whether a tensor is found anew where it lacks."""
    return name.rpartition(".")[2] in ESTIMATES


def part_of(
    tensors: Mapping[str, Sequence[int]], prefix: str, kind: str
) -> tuple[dict[str, Shape], str]:
    """The shapes of one network in a checkpoint, by its own names, and what errors call it.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the network's names begin with; may be empty.
        kind: what it is: `generator`, say.
    """
    own = {n.removeprefix(prefix): tuple(s) for n, s in tensors.items() if n.startswith(prefix)}
    return own, f"the {kind} {prefix.rstrip('.')!r}" if prefix else f"the {kind}"


def must_have(
    tensors: Mapping[str, Sequence[int]], prefix: str, kind: str
) -> tuple[dict[str, Shape], str]:
    """As `part_of`, of a network that must be there.

    Raises:
        MismatchError: no tensor of it is.
    """
    own, said = part_of(tensors, prefix, kind)
    if not own:
        raise MismatchError(f"there is no tensor of {said} (names that begin with {prefix!r})")
    return own, said


def must_match(own: Mapping[str, Shape], expected: Mapping[str, Shape], said: str) -> None:
    """Check names and shapes of a network against what they must be; estimates may be missing.

    Raises:
        MismatchError: a name is missing, unknown or of another shape; the message names it.
    """
    for name, shape in expected.items():
        if name not in own:
            if is_estimate(name):
                continue
            raise MismatchError(f"{said} lacks {name} {list(shape)}")
        if own[name] != shape:
            raise MismatchError(
                f"{said}: {name} has the shape {list(own[name])}, where {list(shape)} is expected"
            )
    for name, shape in own.items():
        if name not in expected:
            raise MismatchError(f"{said} has {name} {list(shape)}, which such a network lacks")
