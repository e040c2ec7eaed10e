"""What is in a checkpoint: its names as a tree, with sums at every branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import are_counted, listed
from .checkpoint import Checkpoint, TensorInfo
from .names import natural_key

_DEEPEST = 100  # branches, one below the other; what lies deeper stays one name


@dataclass(frozen=True)
class Node:
    """A branch or leaf of the tree of names.

    Attributes:
        name: the part of the name between two dots; `0…11` for siblings alike in everything but
            their number.
        tensors: how many tensors lie below it (the siblings together).
        parameters: how many elements.
        nbytes: how many bytes.
        dtypes: dtype → how many tensors have it.
        shape: a tensor's shape; None for a branch. Of siblings alike, each one's.
        children: in natural order.
        repeats: how many siblings it stands for.
    """

    name: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    shape: tuple[int, ...] | None
    children: tuple[Node, ...]
    repeats: int = 1


def notes_on(checkpoint: Checkpoint) -> list[str]:
    """Sentences on what a reader might not expect: which files were taken, and what is empty."""
    empty = [name for name, info in checkpoint.tensors.items() if not info.elements]
    told = [f"{are_counted(len(empty), 'tensor')} without elements: {listed(empty)}"]
    return [*checkpoint.notes, *(told if empty else [])]


def summarize(checkpoint: Checkpoint, buffers: Collection[str] = ()) -> Node:
    """The tree of a checkpoint's names; numbered siblings that are alike are one node.

    Args:
        checkpoint: whose.
        buffers: the names of what is known to be no parameter.
    """
    entries = [(name.split(".", _DEEPEST), info) for name, info in checkpoint.tensors.items()]
    return _branch(checkpoint.name, entries, buffers)


def _branch(
    name: str, entries: Sequence[tuple[list[str], TensorInfo]], buffers: Collection[str]
) -> Node:
    below: dict[str, list[tuple[list[str], TensorInfo]]] = {}
    leaves: list[Node] = []
    for parts, info in entries:
        if len(parts) > 1:
            below.setdefault(parts[0], []).append((parts[1:], info))
        else:
            parameters = 0 if info.name in buffers else info.elements
            leaves.append(
                Node(parts[0], 1, parameters, info.nbytes, {info.dtype: 1}, info.shape, ())
            )
    branches = [_branch(part, inner, buffers) for part, inner in below.items()]
    children = sorted([*branches, *leaves], key=lambda node: natural_key(node.name))
    return _sum(name, tuple(_collapsed(children)))


def _sum(name: str, children: tuple[Node, ...], repeats: int = 1) -> Node:
    dtypes: Counter[str] = Counter()
    for child in children:
        dtypes.update(child.dtypes)
    return Node(
        name, sum(c.tensors for c in children), sum(c.parameters for c in children),
        sum(c.nbytes for c in children), dict(dtypes.most_common()), None, children, repeats,
    )  # fmt: skip


def _signature(node: Node) -> object:
    """What makes numbered siblings alike: all below the name."""
    inner = tuple((child.name, _signature(child)) for child in node.children)
    return (node.shape, tuple(sorted(node.dtypes.items())), node.parameters, inner)


def _collapsed(children: Sequence[Node]) -> Iterator[Node]:
    run: list[Node] = []
    for child in children:
        follows = (
            run
            and _is_number(child.name)
            and _is_number(run[-1].name)
            and int(child.name) == int(run[-1].name) + 1
            and _signature(child) == _signature(run[0])
        )
        if not follows:
            yield from _one(run)
            run = []
        run.append(child)
    yield from _one(run)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


def _one(run: Sequence[Node]) -> Iterator[Node]:
    if len(run) < 2:
        yield from run
        return
    first = run[0]
    together = _sum(f"{first.name}…{run[-1].name}", tuple(run))
    yield Node(
        together.name, together.tensors, together.parameters, together.nbytes, together.dtypes,
        first.shape, first.children, len(run),
    )  # fmt: skip


def as_json(node: Node) -> dict[str, Any]:
    """A tree as plain data."""
    content: dict[str, Any] = {
        "name": node.name,
        "tensors": node.tensors,
        "parameters": node.parameters,
        "nbytes": node.nbytes,
        "dtypes": node.dtypes,
    }
    if node.repeats > 1:
        content["repeats"] = node.repeats
    if node.shape is not None:
        content["shape"] = list(node.shape)
    if node.children:
        content["children"] = [as_json(child) for child in node.children]
    return content
