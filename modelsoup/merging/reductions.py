"""What a method must know of whole tensors before it can merge them element by element.

Everything here is counted per block of `BLOCK` elements and put together in the order of the
blocks, so that a result does not depend on how a tensor was sliced or who worked on which slice.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import xxhash

from .methods.registry import densities, rescales
from .plan import FEW, Step

BLOCK = 1 << 16
"""Elements: small enough for the second-level cache, large enough for numpy to be quick."""

_LANES = 1 << 10  # sums side by side, which the first-level cache holds
# How many bits of a magnitude each pass counts, from the top. The first pass sorts every element
# into a table, which must stay in the first-level cache; the others few.
_DIGITS = {4: (12, 10, 9), 8: (12, 13, 13, 13, 12)}
_MOST = 4 << 20  # elements: so many that may hold the threshold are collected, not counted on
_L1_EPSILON = 1e-7  # as in mergekit: a norm below this is not restored


class Statistic(Protocol):
    """Something that is gathered in one or more passes over a tensor's inputs."""

    @property
    def needs_pass(self) -> bool:
        """Whether another pass over the inputs is needed."""
        ...

    def add(self, block: int, x: Sequence[np.ndarray]) -> None:
        """Take in block number `block` of each input, as float32 or float64."""
        ...

    def end_pass(self) -> None:
        """All blocks were added."""
        ...


class Gram:
    """The matrix of the inputs' inner products, in float64."""

    def __init__(self, models: int, elements: int) -> None:
        self._models = models
        self._partial = np.zeros((-(-elements // BLOCK), models, models))
        self.matrix: np.ndarray | None = None

    @property
    def needs_pass(self) -> bool:
        """True until the one pass was made."""
        return self.matrix is None

    def add(self, block: int, x: Sequence[np.ndarray]) -> None:
        """Take in block number `block` of each input, as float64."""
        rest = x[0].size % _LANES
        whole = x[0].size - rest
        rows = [values[:whole].reshape(-1, _LANES) for values in x]
        for i in range(self._models):
            for j in range(i, self._models):
                # Not a BLAS dot product, whose order of additions depends on the machine. Here each
                # lane adds up its column from above, however wide the machine's vectors are; and
                # whether it fuses or not, as the products of what was float32 are exact.
                lanes = np.einsum("rl,rl->l", rows[i], rows[j])
                lanes[:rest] += x[i][whole:] * x[j][whole:]
                self._partial[block, i, j] = np.add.reduce(lanes)

    def end_pass(self) -> None:
        """Add up the blocks."""
        upper = self._partial.sum(axis=0)
        self.matrix = upper + np.triu(upper, 1).T


class Sparsifier(Protocol):
    """Decides which elements of one task vector are kept, and what the kept are multiplied by."""

    needs_pass: bool

    def add(self, block: int, delta: np.ndarray) -> None:
        """Take in one block of the task vector."""
        ...

    def end_pass(self) -> None:
        """All blocks were added."""
        ...

    def apply(self, block: int, delta: np.ndarray) -> None:
        """Set what is dropped to zero and rescale what is kept, in place."""
        ...


class _Rescale:
    """The factor that gives a thinned vector its L1 norm back."""

    def __init__(self, blocks: int) -> None:
        self._norms = np.zeros((blocks, 2))
        self.factor = 1.0

    def add(self, block: int, delta: np.ndarray, keep: np.ndarray) -> None:
        magnitude = np.abs(delta)
        self._norms[block, 0] = np.add.reduce(magnitude, dtype=np.float64)
        magnitude *= keep
        self._norms[block, 1] = np.add.reduce(magnitude, dtype=np.float64)

    def end_pass(self) -> None:
        before, after = self._norms.sum(axis=0).tolist()
        if before >= _L1_EPSILON and after >= _L1_EPSILON:
            self.factor = before / after


class LargestMagnitudes:
    """Keeps the `kept` largest magnitudes; of those equal at the threshold, the first ones.

    The threshold is exact. The bits of a magnitude order as the magnitude does: one pass counts the
    upper dozen, which leaves few elements that may hold the threshold, and a second collects
    those. Where too many are left (a tensor of nearly equal magnitudes) more passes count on, a
    dozen bits each, so that memory stays bounded. Of a small tensor all are collected at once.
    """

    def __init__(self, kept: int, elements: int, dtype: np.dtype[Any], *, rescale: bool) -> None:
        blocks = -(-elements // BLOCK)
        self._key = np.dtype(f"u{dtype.itemsize}")
        self._mask = self._key.type(2 ** (8 * dtype.itemsize - 1) - 1)
        self._digits = list(_DIGITS[dtype.itemsize])  # those still to be counted
        self._stage = "collect" if elements <= FEW else "count"  # or equal, and then norm
        counted = 2 ** self._digits[0] if self._stage == "count" else 0
        self._counts = np.zeros(counted, np.int64)
        self._lock = threading.Lock()
        self._prefix = 0  # the threshold's bits, as far as they are known
        self._wanted = kept  # how many to take among those with that prefix
        self._whole = False  # whether all of them are kept
        self._equal = np.zeros(blocks, np.int64)  # elements at the threshold, then those before
        self._collected: list[np.ndarray] = [np.empty(0, self._key)] * blocks
        self._rescale = _Rescale(blocks) if rescale else None
        self.needs_pass = True

    def _keys(self, delta: np.ndarray) -> np.ndarray:
        keys: np.ndarray = delta.view(self._key) & self._mask
        return keys

    def add(self, block: int, delta: np.ndarray) -> None:
        """Count one block."""
        if self._stage == "norm":
            assert self._rescale is not None
            self._rescale.add(block, delta, self._keep(block, delta))
            return
        keys = self._keys(delta)
        if self._stage == "equal":
            self._equal[block] = np.count_nonzero(keys == self._prefix)
            return
        if len(self._digits) < len(_DIGITS[self._key.itemsize]):  # it is known how they begin
            keys = keys[(keys >> self._key.type(sum(self._digits))) == self._prefix]
        if self._stage == "collect":
            self._collected[block] = keys
            return
        digits = keys >> self._key.type(sum(self._digits[1:]))
        digits &= self._key.type(2 ** self._digits[0] - 1)
        counted = np.bincount(digits.astype(np.intp), minlength=self._counts.size)
        with self._lock:  # other workers count other blocks of this tensor
            self._counts += counted

    def end_pass(self) -> None:
        """Narrow the threshold down, or finish."""
        if self._stage == "count":
            self._narrow_down()
        elif self._stage == "collect":
            candidates = np.concatenate(self._collected)
            place = candidates.size - self._wanted
            candidates.partition(place)
            self._prefix = int(candidates[place])
            above = int(np.count_nonzero(candidates > self._prefix))
            self._wanted -= above
            self._equal[:] = [np.count_nonzero(keys == self._prefix) for keys in self._collected]
            self._collected.clear()
            self._found()
        elif self._stage == "equal":
            self._found()
        else:
            assert self._rescale is not None
            self._rescale.end_pass()
            self.needs_pass = False

    def _narrow_down(self) -> None:
        from_top = np.cumsum(self._counts[::-1])
        position = int(np.searchsorted(from_top, self._wanted))
        digit = self._counts.size - 1 - position
        left = int(self._counts[digit])
        self._wanted -= int(from_top[position]) - left
        self._prefix = (self._prefix << self._digits.pop(0)) | digit
        if not self._digits:
            self._stage = "equal"
        elif left <= _MOST:
            self._stage = "collect"
        else:
            self._counts = np.zeros(2 ** self._digits[0], np.int64)

    def _found(self) -> None:
        self._whole = int(self._equal.sum()) == self._wanted
        self._equal = np.concatenate([[0], np.cumsum(self._equal)[:-1]])
        self._stage = "norm"
        self.needs_pass = self._rescale is not None

    def _keep(self, block: int, delta: np.ndarray) -> np.ndarray:
        keys = self._keys(delta)
        if self._whole:
            reached: np.ndarray = keys >= self._key.type(self._prefix)
            return reached
        keep: np.ndarray = keys > self._key.type(self._prefix)
        room = self._wanted - int(self._equal[block])
        if room > 0:
            keep[np.flatnonzero(keys == self._key.type(self._prefix))[:room]] = True
        return keep

    def apply(self, block: int, delta: np.ndarray) -> None:
        """Zero what is below the threshold."""
        delta *= self._keep(block, delta)
        if self._rescale is not None:
            delta *= delta.dtype.type(self._rescale.factor)


class RandomPart:
    """Keeps each element with the probability `density`.

    The random numbers come from the counter-based generator Philox, keyed by the seed, the
    tensor's name and the model's number, with the element's index as the counter: so a mask does
    not depend on slices, workers or the order of tensors.
    """

    def __init__(
        self, density: float, elements: int, *, seed: int, name: str, model: int, rescale: bool
    ) -> None:
        digest = xxhash.xxh3_128_digest(f"{seed}\0{model}\0{name}".encode())
        self._key = int.from_bytes(digest, "little")
        self._limit = np.uint32(min(round(density * 2**32), 2**32 - 1))
        self._rescale = _Rescale(-(-elements // BLOCK)) if rescale else None
        self.needs_pass = rescale

    def _keep(self, block: int, elements: int) -> np.ndarray:
        # Philox gives four 64-bit numbers a count, so eight 32-bit ones.
        generator = np.random.Philox(key=self._key, counter=block * (BLOCK // 8))
        raw = generator.random_raw(-(-elements // 2))
        keep: np.ndarray = raw.view(np.uint32)[:elements] < self._limit
        return keep

    def add(self, block: int, delta: np.ndarray) -> None:
        """Sum one block's magnitudes."""
        if self._rescale is not None:
            self._rescale.add(block, delta, self._keep(block, delta.size))

    def end_pass(self) -> None:
        """Find the factor."""
        if self._rescale is not None:
            self._rescale.end_pass()
        self.needs_pass = False

    def apply(self, block: int, delta: np.ndarray) -> None:
        """Zero the dropped elements and rescale the others."""
        delta *= self._keep(block, delta.size)
        if self._rescale is not None:
            delta *= delta.dtype.type(self._rescale.factor)


class Nothing:
    """Keeps nothing: density 0."""

    needs_pass = False

    def add(self, block: int, delta: np.ndarray) -> None:
        """Nothing to count."""

    def end_pass(self) -> None:
        """Nothing to find."""

    def apply(self, block: int, delta: np.ndarray) -> None:
        """Zero everything."""
        delta[:] = 0


class TaskVectors:
    """The sparsified task vectors of one tensor: a `Statistic`, and what comes after it."""

    def __init__(self, sparsifiers: Sequence[Sparsifier | None]) -> None:
        self._sparsifiers = sparsifiers

    @property
    def needs_pass(self) -> bool:
        """Whether any task vector needs another pass."""
        return any(s is not None and s.needs_pass for s in self._sparsifiers)

    def add(self, block: int, x: Sequence[np.ndarray]) -> None:
        """Take in one block of the base and the models."""
        for sparsifier, values in zip(self._sparsifiers, x[1:], strict=True):
            if sparsifier is not None and sparsifier.needs_pass:
                sparsifier.add(block, values - x[0])

    def end_pass(self) -> None:
        """End the pass of those that took part."""
        for sparsifier in self._sparsifiers:
            if sparsifier is not None and sparsifier.needs_pass:
                sparsifier.end_pass()

    def apply(self, block: int, x: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """The base and the sparsified task vectors of one block."""
        deltas = [values - x[0] for values in x[1:]]
        for sparsifier, delta in zip(self._sparsifiers, deltas, strict=True):
            if sparsifier is not None:
                sparsifier.apply(block, delta)
        return (x[0], *deltas)


def state_bytes(step: Step) -> int:
    """How much memory what is gathered of a step's tensors takes at most.

    Candidates for a threshold are most of it: as many as there are elements, where magnitudes are
    nearly equal.
    """
    method, blocks = step.method, -(-step.elements // BLOCK)
    if method is None or method.shape not in ("gram", "select"):
        return 0
    if method.shape == "gram":
        return 8 * blocks * len(step.sources) ** 2
    models = len(step.sources) - 1
    if method.sparsify != "magnitude":
        return 16 * blocks * models
    thinned = sum(0 < density < 1 for density in densities(step.parameters, models))
    itemsize = step.compute_dtype.itemsize
    collected = min(step.elements, _MOST) * itemsize
    counts = 0 if step.elements <= FEW else 8 << _DIGITS[itemsize][0]
    return int(thinned * (counts + collected + 32 * blocks))


def task_vectors(
    parameters: Any, kind: str, elements: int, dtype: np.dtype[Any], *, models: int, seed: int,
    name: str,
) -> TaskVectors:  # fmt: skip
    """The task vectors of one tensor under a method's `density` and `rescale`.

    Args:
        parameters: with the field `density`, and perhaps `rescale`.
        kind: `magnitude` or `random`, see `Method.sparsify`.
        elements: of the tensor.
        dtype: of the arithmetic.
        models: how many task vectors there are.
        seed: seeds the random part.
        name: the tensor's name, on which the random part depends too.
    """

    def one(model: int, density: float) -> Sparsifier | None:
        if density >= 1 or elements == 0:
            return None
        if density <= 0:
            return Nothing()
        if kind == "magnitude":
            kept = max(1, math.floor(density * elements))
            return LargestMagnitudes(kept, elements, dtype, rescale=rescales(parameters))
        return RandomPart(
            density, elements, seed=seed, name=name, model=model, rescale=rescales(parameters)
        )

    shares = densities(parameters, models)
    return TaskVectors([one(model, density) for model, density in enumerate(shares)])
