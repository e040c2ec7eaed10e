"""What a merge method sees of a tensor, and the forms of what it gives back.

Nothing here has values but a block: a method is asked once what it wants to know of a tensor and
what is to be done with each block, and an engine, or `evaluated` in memory, does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

BLOCK = 1 << 16
"""Elements: small enough for the second-level cache, large enough for numpy to be quick."""

MANY = 1 << 20
"""Elements: of so many a sample tells about how large they are."""

FLOAT32 = np.dtype(np.float32)

PerModel = tuple[float, ...]
"""The kind of a parameter that has a number for each model; one number stands for all."""


class Block:
    """Some elements of a tensor in all inputs, as float32 or float64; arrays of any shape.

    Attributes:
        number: the block's, counted from 0.
        start: the index of its first element in the tensor.
        values: of each input, the base first if there is one. They are not to be written to.
    """

    __slots__ = ("_deltas", "_own", "number", "start", "values")

    def __init__(
        self, number: int, start: int, values: Sequence[np.ndarray], own: int,
        deltas: Mapping[int, np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self.number = number
        self.start = start
        self.values = values
        self._own = own  # the place of the first model
        self._deltas = deltas or {}  # place → what is given as a task vector

    @property
    def base(self) -> np.ndarray:
        """The base model's values."""
        return self.values[0]

    def model(self, k: int) -> np.ndarray:
        """A model's values."""
        return self.values[self._own + k]

    def delta(self, k: int) -> np.ndarray:
        """A model's task vector, model − base: a new array, which may be written to."""
        made = self.task_vector(k)
        return made.copy() if self._own + k in self._deltas else made

    def task_vector(self, k: int) -> np.ndarray:
        """As `delta`, but not to be written to."""
        given = self._deltas.get(self._own + k)
        return self.values[self._own + k] - self.values[0] if given is None else given

    @property
    def wide(self) -> Block:
        """The same in float64, so that task vectors are differences in that."""
        values = [one.astype(np.float64, copy=False) for one in self.values]
        deltas = {k: one.astype(np.float64, copy=False) for k, one in self._deltas.items()}
        return Block(self.number, self.start, values, self._own, deltas)


Of = Callable[[Block], np.ndarray]
"""Values for the elements of a block: an array of its shape."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that is to be merged, without its values.

    Attributes:
        name: of the output tensor.
        shape: of all inputs and of the result.
        count: how many models there are, the base not counted.
        has_base: whether there is a base model.
        dtype: of the arithmetic, float32 or float64.
        seed: of what is drawn at random.
        layer: of its layer, the index and how many there are; None where the name has none.
        can_be_sampled: whether any elements can be read without reading all.
        aux: names of the auxiliary inputs that there are for it, each one a model.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    has_base: bool = False
    dtype: np.dtype[Any] = FLOAT32
    seed: int = 0
    layer: tuple[int, int] | None = None
    can_be_sampled: bool = False
    aux: tuple[str, ...] = ()

    @cached_property
    def elements(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def is_sampled(self) -> bool:
        """Whether a sample of it is worth its reading."""
        return self.can_be_sampled and self.elements >= MANY

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return -(-self.elements // BLOCK)

    @property
    def models(self) -> range:
        """The models' numbers."""
        return range(self.count)

    @property
    def row(self) -> int:
        """The length of a row, which is the last axis."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows_at_once(self) -> int:
        """How many rows a block of rows has."""
        return max(1, BLOCK // max(1, self.row))

    def place(self, aux: str, k: int) -> int:
        """Where an auxiliary input for a model is among all inputs: after the models."""
        return self.has_base + self.count * (1 + self.aux.index(aux)) + k

    @staticmethod
    def model(k: int) -> Of:
        """A model's values, as a function of a block."""
        return Values(k, "model")

    @staticmethod
    def delta(k: int) -> Of:
        """A model's task vector, as a function of a block."""
        return Values(k, "delta")


@dataclass(frozen=True)
class Values:
    """A model's values or its task vector in a block."""

    k: int
    what: str

    def __call__(self, b: Block) -> np.ndarray:
        """A new array for a task vector; for a model's own values not to be written to."""
        return b.delta(self.k) if self.what == "delta" else b.model(self.k)


@dataclass(frozen=True)
class WeightedSum:
    """Σ cₖ·xₖ over all inputs, the base first; or base + Σ cₖ·(xₖ − base) over the models.

    Attributes:
        coefficients: one for each.
        of_deltas: whether it is the sum over task vectors.
    """

    coefficients: Sequence[float]
    of_deltas: bool = False

    @property
    def only(self) -> int | None:
        """The one input that the sum equals exactly, where it equals one."""
        used = [k for k, c in enumerate(self.coefficients) if c != 0]
        is_one = not self.of_deltas and len(used) == 1 and self.coefficients[used[0]] == 1
        return used[0] if is_one else None


@dataclass(frozen=True)
class Rows:
    """A function of a block of whole rows: arrays of rows × row length.

    Attributes:
        function: of such a block.
    """

    function: Of


@dataclass(frozen=True)
class Whole:
    """A function of whole tensors, in memory.

    Attributes:
        function: of the inputs' arrays in their shape, the base first.
        memory: how many arrays of the tensor's size it holds at once, the result among them and
            the inputs not.
    """

    function: Callable[[Sequence[np.ndarray]], np.ndarray]
    memory: float = 0


Merging = WeightedSum | Rows | Whole | Of
"""What is done with a tensor, once all that must be known of it is known."""


def evaluated(form: Merging, x: Tensor, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The values of a form over whole arrays, in the shape of the tensor."""
    made = np.empty(x.elements, x.dtype)
    with np.errstate(all="ignore"):
        if isinstance(form, Whole):
            return np.asarray(form.function(tuple(inputs)), x.dtype)
        for b in blocks_of(x, inputs, rows=isinstance(form, Rows)):
            place = slice(b.start, b.start + b.values[0].size)
            made[place] = of_block(form, x, b).reshape(-1)
    return made.reshape(x.shape)


def of_block(form: Merging, x: Tensor, b: Block) -> np.ndarray:
    """The values of a form in a block: of whole rows, or the whole tensor, where it takes these."""
    if isinstance(form, Rows):
        return form.function(b)
    if isinstance(form, Whole):
        return np.asarray(form.function(tuple(b.values)), x.dtype)
    if not isinstance(form, WeightedSum):
        return form(b)
    vectors = [b.delta(k) for k in x.models] if form.of_deltas else b.values
    total: np.ndarray = sum(
        (x.dtype.type(c) * v for c, v in zip(form.coefficients, vectors, strict=True)),
        start=np.zeros((), x.dtype),
    )
    return b.base + total if form.of_deltas else total


def blocks_of(x: Tensor, inputs: Sequence[np.ndarray], *, rows: bool) -> Iterator[Block]:
    """A tensor's blocks in order, of inputs that are at hand."""
    row = max(1, x.row)
    length = row * x.rows_at_once if rows else BLOCK
    flat = [one.reshape(-1) for one in inputs]
    for number, start in enumerate(range(0, x.elements, length)):
        values = [one[start : start + length] for one in flat]
        if rows:
            values = [one.reshape(-1, row) for one in values]
        yield Block(number, start, values, int(x.has_base))


def pairs(count: int) -> list[tuple[int, int]]:
    """The pairs of vectors of which there are inner products."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def products_in_lanes(vectors: Sequence[np.ndarray], lanes: int) -> Iterator[np.ndarray]:
    """Of each of the `pairs` of float64 vectors the products, element i added to lane i mod lanes.

    Not a BLAS dot product, whose order of additions depends on the machine: here each lane adds up
    its column from above, however wide the machine's vectors are.
    """
    rest = vectors[0].size % lanes
    whole = vectors[0].size - rest
    lanes_of = [values[:whole].reshape(-1, lanes) for values in vectors]
    for i, j in pairs(len(vectors)):
        made: np.ndarray = np.einsum("rl,rl->l", lanes_of[i], lanes_of[j])
        made[:rest] += vectors[i][whole:] * vectors[j][whole:]
        yield made


def weighted_sum(x: Any, p: Any) -> Any:
    """Σ cₖ·xₖ, added up in order; `p.weight` has the coefficients."""
    total = p.weight[0] * x[0]
    for k in range(1, len(x)):
        total += p.weight[k] * x[k]
    return total


def added_to(x: Any, p: Any) -> Any:
    """x₀ + Σ cₖ·xₖ₊₁, added up in order: a weighted sum that is gone on with."""
    total = x[0]
    for k in range(1, len(x)):
        total += p.weight[k - 1] * x[k]
    return total


def added_up(b: Block, weights: Sequence[Any]) -> np.ndarray:
    """x₀ + Σ cₖ·dₖ, of which task vectors may be known as such, the sum added up in order."""
    total: np.ndarray = weights[0] * b.task_vector(0)
    for k in range(1, len(weights)):
        total += weights[k] * b.task_vector(k)
    total += b.base
    return total


def weighted_deltas(x: Any, p: Any) -> Any:
    """x₀ + Σ cₖ·(xₖ − x₀), the sum added up in order."""
    total = p.weight[0] * (x[1] - x[0])
    for k in range(2, len(x)):
        total += p.weight[k - 1] * (x[k] - x[0])
    return x[0] + total
