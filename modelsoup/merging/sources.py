"""Where the values of an input's tensor come from: a source.

A tensor that lies in a file is streamed from it. Any other source says which stored tensors it is
made of. The product of two low-rank factors gives rows of values on demand; what another merge
makes (`plan.Made`) is computed, block by block, of what is streamed. A method never learns which
source it got.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ..files.adapters import as_matrices
from ..files.checkpoint import Checkpoint, TensorInfo
from .forms import BLOCK


class Stored(NamedTuple):
    """A tensor of a model, as it lies in its file.

    Attributes:
        model: the model.
        info: the tensor.
    """

    model: Checkpoint
    info: TensorInfo


_ALONE = 1 << 18  # multiplications that OpenBLAS does without threads
_FEWEST = 64  # columns

Read = Callable[[Stored, int, int], np.ndarray]
"""`read(tensor, start, stop)`: elements of a stored tensor, flattened, as float32 or float64."""

Values = Callable[[int, int], np.ndarray]
"""`values(start, stop)`: elements of a source, flattened, in its dtype."""


class Computed(Protocol):
    """A source whose values are computed from stored tensors.

    Attributes:
        model: the input that has it.
        info: name, dtype and shape of what is computed; it lies in no file.
        is_delta: whether it is a task vector, to be added to the base.
        memory: bytes that it holds while its tensor is merged.
        at_hand: bytes that are read once, before its values are asked for.
        on_demand: bytes that are read in each pass, with its values.
    """

    @property
    def model(self) -> Checkpoint: ...

    @property
    def info(self) -> TensorInfo: ...

    @property
    def is_delta(self) -> bool: ...

    @property
    def memory(self) -> int: ...

    @property
    def at_hand(self) -> int: ...

    @property
    def on_demand(self) -> int: ...

    def opened(self, read: Read) -> Values:
        """Read what must be at hand, and give what computes values from it."""
        ...


Source = Stored | Computed


def computed_info(name: str, shape: tuple[int, ...], dtype: str = "F32") -> TensorInfo:
    """What a tensor that lies in no file is like."""
    size = 8 if dtype == "F64" else 4
    elements = int(np.prod(shape, dtype=np.int64))
    return TensorInfo(name, dtype, shape, Path(name), 0, size * elements)


@dataclass(frozen=True)
class Product:
    """A task vector of low rank: scale · up · down, in float32.

    Attributes:
        info: name and shape of the product, whose first axis is that of `up`; of a convolution the
            other axes are those of `down`.
        up: m × r; axes of length 1 after these are ignored.
        down: r × n, or r × n × a kernel's sides.
        scale: what the product is multiplied by.
        transposed: the product is stored the other way round, n × m, as embeddings have it.
        mid: of a convolution of three factors, what is between them (see `files.adapters`).
    """

    info: TensorInfo
    up: Stored
    down: Stored
    scale: float = 1.0
    transposed: bool = False
    mid: Stored | None = None
    is_delta = True
    on_demand = 0

    @property
    def model(self) -> Checkpoint:
        """That of the factors."""
        return self.up.model

    @property
    def factors(self) -> tuple[Stored, ...]:
        """What it is the product of."""
        return (self.up, self.down, *(() if self.mid is None else (self.mid,)))

    @property
    def at_hand(self) -> int:
        """The factors."""
        return sum(factor.info.nbytes for factor in self.factors)

    @property
    def memory(self) -> int:
        """The factors in float32, the product of two of three among them."""
        rows, columns = self.info.shape[0], math.prod(self.info.shape[1:])
        return 4 * self.up.info.shape[1] * (rows + columns)

    def opened(self, read: Read) -> Values:
        """Read the factors; rows are multiplied when they are asked for."""
        up, down, *mid = (
            read(one, 0, one.info.elements).astype(np.float32, copy=False).reshape(one.info.shape)
            for one in self.factors
        )
        left, right = as_matrices(up, down, *mid)
        left = left * np.float32(self.scale)
        if self.transposed:
            left, right = right.T.copy(), left.T.copy()
        return rows_of_product(left, right)


def rows_of_product(left: np.ndarray, right: np.ndarray) -> Values:
    """Elements of left · right, the same bytes however it is sliced.

    What BLAS sums up depends on how many rows it is given, so that it gets always the same. And so
    few columns that it has no use for threads, of which workers are enough: its own would wait for
    one another longer than such a product takes.
    """
    width, rank = right.shape[1], max(1, right.shape[0])
    at_once = max(1, BLOCK // max(1, width))
    columns = max(_FEWEST, _ALONE // (at_once * rank) // _FEWEST * _FEWEST)

    def values(start: int, stop: int) -> np.ndarray:
        first = start // width // at_once * at_once
        last = min(-(-stop // (width * at_once)) * at_once, len(left))
        made = np.empty((last - first, width), left.dtype)
        for row in range(first, last, at_once):
            place = slice(row, min(row + at_once, last))
            rows = made[row - first : place.stop - first]
            for column in range(0, width, columns):
                part = np.s_[:, column : column + columns]
                np.matmul(left[place], right[part], out=rows[part])
        flat: np.ndarray = made.reshape(-1)[start - first * width : stop - first * width]
        return flat

    return values


@dataclass(frozen=True, eq=False)
class RowsOf:
    """Rows of stored tensors, gathered by an index.

    A row is the mean of those that are named for it, as a rule of one; of none it is zeros.

    Attributes:
        model: the input that has it.
        info: name, dtype and shape of what is gathered.
        of: stored tensors, each with the row of it that each row is made of, -1 for none.
    """

    model: Checkpoint
    info: TensorInfo
    of: tuple[tuple[Stored, np.ndarray], ...]
    is_delta = False
    memory = 0
    at_hand = 0

    @property
    def on_demand(self) -> int:
        """The rows that are named, as often as they are."""
        return sum(
            int(np.count_nonzero(index >= 0)) * (stored.info.nbytes // stored.info.shape[0])
            for stored, index in self.of
        )

    def opened(self, read: Read) -> Values:
        """Nothing is read beforehand."""
        counts = np.sum([index >= 0 for _, index in self.of], 0)
        width = math.prod(self.info.shape[1:])
        wide = np.dtype(np.float64 if self.info.dtype == "F64" else np.float32)

        def values(start: int, stop: int) -> np.ndarray:
            first, last = start // width, -(-stop // width)
            made: np.ndarray = np.full(stop - start, -0.0, wide)  # -0 + x is x, whatever x is
            for stored, index in self.of:
                for row, after in _runs(index[first:last]):
                    begin = max(start, (first + row) * width)
                    end = min(stop, (first + after) * width)
                    shift = (int(index[first + row]) - first - row) * width
                    made[begin - start : end - start] += read(stored, begin + shift, end + shift)
            if (counts[first:last] != 1).any():
                of_each = counts[first:last].repeat(width)[start - first * width :][: len(made)]
                made /= np.maximum(of_each, 1)
                made[of_each == 0] = 0
            return made

        return values


def _runs(index: np.ndarray) -> list[tuple[int, int]]:
    """Where rows that lie side by side are gathered side by side: from, and up to."""
    there = np.flatnonzero(index >= 0)
    if not len(there):
        return []
    breaks = np.flatnonzero((np.diff(there) != 1) | (np.diff(index[there]) != 1)) + 1
    parts = np.split(there, breaks)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]
