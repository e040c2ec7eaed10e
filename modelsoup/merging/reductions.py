"""What a method may know of a whole tensor before it merges it: reductions.

Everything here is counted per block and put together in the order of the blocks, so that a result
does not depend on how a tensor was sliced or who worked on which slice. Those that tell which
elements are kept are in `thresholds` and in `kept`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from .forms import Block, Of, Tensor, pairs, products_in_lanes

if TYPE_CHECKING:
    from .compiled import Loop

_LANES = 1 << 10  # sums side by side, which the first-level cache holds


class Reduction(Protocol):
    """What a method asks of a tensor.

    Attributes:
        rows: whether its blocks are whole rows.
        wide: whether it takes values in float64, whatever the arithmetic is in.
    """

    @property
    def rows(self) -> bool: ...

    @property
    def wide(self) -> bool: ...

    def passes(self, x: Tensor) -> int:
        """How often the inputs are read for it, as a rule."""
        ...

    def state_bytes(self, x: Tensor) -> int:
        """How much memory what is gathered takes at most."""
        ...

    def guess(self, x: Tensor) -> Any:
        """A value of the kind that it will have, for a plan."""
        ...

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        ...


class Gathering(Protocol):
    """A reduction under way.

    One that has `sample(blocks)` is given some elements of all parts of a large tensor first.
    """

    needs_pass: bool

    def add(self, b: Block) -> None:
        """Take in a block."""
        ...

    def end_pass(self) -> None:
        """All blocks were added."""
        ...

    @property
    def value(self) -> Any:
        """What was asked for, once no pass is needed."""
        ...


def block_count(x: Tensor, *, rows: bool, whole: bool = False) -> int:
    """How many blocks a tensor has: of whole rows, or a single one, where it is so asked for."""
    if whole:
        return 1
    if not rows:
        return x.blocks
    return -(-(x.elements // max(1, x.row)) // x.rows_at_once)


@dataclass(frozen=True)
class Gram:
    """The matrix of inner products in float64: of all inputs, the base first, or of task vectors.

    Attributes:
        of: `inputs`, or `deltas`: model − base, each in float64.
    """

    of: Literal["inputs", "deltas"] = "inputs"
    rows = False
    wide = True

    def passes(self, x: Tensor) -> int:
        """One."""
        return 1

    def _count(self, x: Tensor) -> int:
        return x.count + (x.has_base and self.of == "inputs")

    def state_bytes(self, x: Tensor) -> int:
        """A matrix for each block."""
        return 8 * x.blocks * self._count(x) ** 2

    def guess(self, x: Tensor) -> np.ndarray:
        """That of vectors at right angles."""
        return np.eye(self._count(x))

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        return Products(self._count(x), x.blocks, of_deltas=self.of == "deltas")


class Products:
    """Inner products under way.

    Attributes:
        loop: takes blocks of what is stored, where it is there; else they are in floats.
    """

    def __init__(self, count: int, blocks: int, *, of_deltas: bool) -> None:
        self._count = count
        self._of_deltas = of_deltas
        self._pairs = pairs(count)
        self.loop: Loop | None = None
        self._partial = np.zeros((blocks, count, count))
        self.needs_pass = True
        self.value: np.ndarray | None = None

    def loop_over(self, stored: tuple[str, ...]) -> Loop | None:
        """What computes them of inputs that are stored in these dtypes, where that is compiled."""
        from .compiled import products_loop  # not for small merges

        used = stored[: self._count + self._of_deltas]
        return products_loop(used, _LANES, of_deltas=self._of_deltas)

    def add(self, b: Block) -> None:
        """Take in a block."""
        for (i, j), lanes in zip(self._pairs, self._lanes(b), strict=True):
            self._partial[b.number, i, j] = np.add.reduce(lanes)

    def _lanes(self, b: Block) -> Iterable[np.ndarray]:
        """Of each pair of vectors the products, added up in lanes."""
        if self.loop is None:
            wide = b.wide
            vectors = wide.values[: self._count]
            if self._of_deltas:
                vectors = [wide.task_vector(k) for k in range(self._count)]
            return products_in_lanes(vectors, _LANES)
        made = np.zeros((len(self._pairs), _LANES))
        used = [one.ctypes.data for one in b.values[: self._count + self._of_deltas]]
        self.loop(used, made.ctypes.data, b.values[0].size, made)
        return made

    def end_pass(self) -> None:
        """All blocks were added."""
        upper = self._partial.sum(axis=0)
        self.value = upper + np.triu(upper, 1).T
        self.needs_pass = False


def products_along(vectors: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """The matrices of inner products in float64 of the vectors along an axis.

    Args:
        vectors: arrays of the same shape.
        axis: which is not in the result; that has two more at its end.
    """
    wide = [array.astype(np.float64) for array in vectors]
    pairs = [[(a * b).sum(axis=axis) for a in wide] for b in wide]
    return np.stack([np.stack(row, axis=-1) for row in pairs], axis=-2)


@dataclass(frozen=True)
class Sum:
    """Sums in float64 over all elements: of one array, or of each of several.

    Attributes:
        of: a function of a block, to an array, or to a tuple of as many as `count` says.
        count: how many arrays there are; of one the value is a number, of several a tuple.
        rows: whether its blocks are whole rows.
        whole: whether its one block is the whole tensor, in its shape.
    """

    of: Callable[[Block], Any]
    count: int = 1
    rows: bool = False
    whole: bool = False
    wide = False

    def passes(self, x: Tensor) -> int:
        """One."""
        return 1

    def state_bytes(self, x: Tensor) -> int:
        """A number for each block."""
        return 8 * self.count * block_count(x, rows=self.rows, whole=self.whole)

    def guess(self, x: Tensor) -> Any:
        """Ones."""
        return 1.0 if self.count == 1 else (1.0,) * self.count

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        return _Sums(self, block_count(x, rows=self.rows, whole=self.whole))


class _Sums:
    def __init__(self, asked: Sum, blocks: int) -> None:
        self._of = asked.of
        self._partial = np.zeros((blocks, asked.count))
        self.needs_pass = True
        self.value: Any = None

    def add(self, b: Block) -> None:
        made = self._of(b)
        several = made if isinstance(made, tuple) else (made,)
        for k, values in enumerate(several):
            self._partial[b.number, k] = np.add.reduce(values, axis=None, dtype=np.float64)

    def end_pass(self) -> None:
        sums = self._partial.sum(axis=0).tolist()
        self.value = sums[0] if len(sums) == 1 else tuple(sums)
        self.needs_pass = False


@dataclass(frozen=True)
class Total:
    """Sums over all tensors that the same rule merges: of a model, and not of one tensor.

    What a tensor adds that is not finite is left out. `merge_arrays` takes its array for the model.

    Attributes:
        name: what it is called; those of one name are added up.
        of: the sums of one tensor.
    """

    name: str
    of: Sum
    wide = False

    @property
    def rows(self) -> bool:
        """As of the sums."""
        return self.of.rows

    def passes(self, x: Tensor) -> int:
        """As of the sums."""
        return self.of.passes(x)

    def state_bytes(self, x: Tensor) -> int:
        """As of the sums."""
        return self.of.state_bytes(x)

    def guess(self, x: Tensor) -> Any:
        """As of the sums."""
        return self.of.guess(x)

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather those of one tensor."""
        return self.of.begin(x)


def takes_whole(reduction: Reduction) -> bool:
    """Whether a reduction's one block is the whole tensor."""
    of = reduction.of if isinstance(reduction, Total) else reduction
    return isinstance(of, Sum) and of.whole


def total_of(several: Sequence[Any]) -> Any:
    """The sums of several tensors, each a number or a tuple, added up whatever their order is."""
    rows = [one if isinstance(one, tuple) else (one,) for one in several]
    finite = [row for row in rows if all(map(math.isfinite, row))]
    sums = tuple(math.fsum(column) for column in zip(*finite, strict=True)) or (0.0,) * len(rows[0])
    return sums if isinstance(several[0], tuple) else sums[0]


@dataclass(frozen=True)
class EachRow:
    """A number for each row, in float64; the value is an array of them, in the rows' order.

    Attributes:
        of: a function of a block of rows to an array of one number a row.
    """

    of: Of
    rows = True
    wide = False

    def passes(self, x: Tensor) -> int:
        """One."""
        return 1

    def state_bytes(self, x: Tensor) -> int:
        """A number for each row."""
        return 8 * (x.elements // max(1, x.row))

    def guess(self, x: Tensor) -> np.ndarray:
        """Ones."""
        return np.ones(1)

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        return _Numbers(self, x)


class _Numbers:
    def __init__(self, asked: EachRow, x: Tensor) -> None:
        self._of = asked.of
        self._row = max(1, x.row)
        self.needs_pass = True
        self.value = np.empty(x.elements // self._row)

    def add(self, b: Block) -> None:
        made = self._of(b)
        first = b.start // self._row
        self.value[first : first + len(made)] = made

    def end_pass(self) -> None:
        self.needs_pass = False
