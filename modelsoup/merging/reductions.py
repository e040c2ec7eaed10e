"""What a method may know of a whole tensor before it merges it: reductions.

Everything here is counted per block and put together in the order of the blocks, so that a result
does not depend on how a tensor was sliced or who worked on which slice.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import xxhash

from .forms import Block, Of, Tensor, pairs, products_in_lanes

if TYPE_CHECKING:
    from .compiled import Loop

FEW = 1 << 13
"""Elements: among so few a threshold is found in one pass."""

_LANES = 1 << 10  # sums side by side, which the first-level cache holds
# How many bits of a magnitude each pass counts, from the top. The first pass sorts every element
# into a table, which must stay in the first-level cache; the others few.
_DIGITS = {4: (12, 10, 9), 8: (12, 13, 13, 13, 12)}
_MOST = 4 << 20  # elements: so many that may hold the threshold are collected, not counted on
PART = 1 << 11
"""Elements: neighbours that are in a sample together."""
_SAMPLED = 1 << 16  # elements at least, and one in 512
_DEVIATIONS = 8  # on each side of where the sample has the threshold; its parts are neighbours
_REMEMBERED = 1 << 27  # elements of all models: of larger tensors masks are drawn once more


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


def _blocks(x: Tensor, *, rows: bool, whole: bool = False) -> int:
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
        return 8 * self.count * _blocks(x, rows=self.rows, whole=self.whole)

    def guess(self, x: Tensor) -> Any:
        """Ones."""
        return 1.0 if self.count == 1 else (1.0,) * self.count

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        return _Sums(self, _blocks(x, rows=self.rows, whole=self.whole))


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


@dataclass(frozen=True)
class Largest:
    """The largest magnitudes of a tensor; of those equal at the threshold, the first ones.

    The value is a `Kept`.

    Attributes:
        of: a function of a block to an array of its shape.
        count: how many are kept, from 1 to all.
        rows: whether its blocks are whole rows.
    """

    of: Of
    count: int
    rows: bool = False
    wide = False

    def passes(self, x: Tensor) -> int:
        """One over a small tensor, or one of which a sample can be taken; else two.

        More where magnitudes are nearly equal, or a sample told wrongly.
        """
        return 1 if x.elements <= FEW or (x.is_sampled and not self.rows) else 2

    def state_bytes(self, x: Tensor) -> int:
        """Candidates for the threshold, at most: as many as there are nearly equal magnitudes."""
        collected = min(x.elements, _MOST) * x.dtype.itemsize
        counts = 0 if x.elements <= FEW else 8 << _DIGITS[x.dtype.itemsize][0]
        return int(counts + collected + 16 * _blocks(x, rows=self.rows))

    def guess(self, x: Tensor) -> Kept:
        """One that keeps everything."""
        return Kept(self.of, lambda _, values: np.ones(values.shape, bool), 0.0)

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        return _Threshold(self, x)


@dataclass(frozen=True)
class Ranked:
    """Several of `Largest` of the same values, which are looked at once; the value is their tuple.

    Attributes:
        of: a function of a block to an array of its shape.
        counts: how many are kept by each, from 1 to all.
        rows: whether its blocks are whole rows.
    """

    of: Of
    counts: tuple[int, ...]
    rows: bool = False
    wide = False

    @property
    def each(self) -> list[Largest]:
        """One for each count."""
        return [Largest(self.of, count, self.rows) for count in self.counts]

    def passes(self, x: Tensor) -> int:
        """As of the largest."""
        return max(one.passes(x) for one in self.each)

    def state_bytes(self, x: Tensor) -> int:
        """Of all."""
        return sum(one.state_bytes(x) for one in self.each)

    def guess(self, x: Tensor) -> tuple[Kept, ...]:
        """Those that keep everything."""
        return tuple(one.guess(x) for one in self.each)

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        return _Thresholds(self, x)


@dataclass(frozen=True)
class Kept:
    """Values of which some are kept, and the others zero: a function of a block, as `of` is.

    Attributes:
        of: all the values.
        keeps: of a block's number and values, which of them are kept.
        threshold: the smallest magnitude that is kept, where that decides.
        is_drawn: whether chance decides, which takes long to ask.
    """

    of: Of
    keeps: Callable[[Block, np.ndarray], np.ndarray]
    threshold: float = math.nan
    is_drawn: bool = False

    def __call__(self, b: Block) -> np.ndarray:
        """The values, zero where they are not kept."""
        values = self.of(b)
        kept: np.ndarray = values * self.keeps(b, values)
        return kept

    def mask(self, b: Block) -> np.ndarray:
        """Whether each element is kept."""
        return self.keeps(b, self.of(b))


class _Threshold:
    """The exact threshold.

    Of a large tensor a sample tells between which magnitudes it surely is; one pass counts those
    above and collects those between. Where there is no sample, or it was wrong, bits are counted,
    which order as magnitudes do: one pass counts the upper dozen, which leaves few elements that
    may hold the threshold, and a second collects those. Where too many are
    left (a tensor of nearly equal magnitudes) more passes count on, a dozen bits each, so that
    memory stays bounded. Of a small tensor all are collected at once.
    """

    def __init__(self, asked: Largest, x: Tensor) -> None:
        blocks = _blocks(x, rows=asked.rows)
        self._of = asked.of
        self._key = np.dtype(f"u{x.dtype.itemsize}")
        self._number = x.dtype
        self._mask = self._key.type(2 ** (8 * x.dtype.itemsize - 1) - 1)
        self._elements = x.elements
        self._asked = asked.count
        self._lock = threading.Lock()
        self._between: tuple[int, int] | None = None  # the threshold, by a sample
        self._above = np.zeros(blocks, np.int64)  # how many are larger than these
        self._held = 0  # how many are collected between them
        self._begin_to_count("collect" if x.elements <= FEW else "count")
        self._whole = False  # whether all of them are kept
        self._equal = np.zeros(blocks, np.int64)  # elements at the threshold, then those before
        self._collected: list[np.ndarray] = [np.empty(0, self._key)] * blocks
        self.needs_pass = True

    def _begin_to_count(self, stage: str) -> None:
        self._stage = stage  # or between, or equal
        self._digits = list(_DIGITS[self._key.itemsize])  # those still to be counted
        self._counts = np.zeros(2 ** self._digits[0] if stage == "count" else 0, np.int64)
        self._prefix = 0  # the threshold's bits, as far as they are known
        self._wanted = self._asked  # how many to take among those with that prefix

    def sample(self, blocks: Sequence[Block]) -> None:
        """Learn about where the threshold is, from some elements of all parts of the tensor."""
        keys = np.sort(np.concatenate([self._keys(self._of(b)).reshape(-1) for b in blocks]))
        share = self._asked / self._elements
        place = keys.size * (1 - share)
        width = 1 + _DEVIATIONS * math.sqrt(keys.size * share * (1 - share))
        low, high = int(place - width), int(place + width)
        self._between = (
            int(keys[low]) if low >= 0 else 0,
            int(keys[high]) if high < keys.size else int(self._mask),
        )
        self._stage = "between"

    def _keys(self, delta: np.ndarray) -> np.ndarray:
        keys: np.ndarray = delta.view(self._key) & self._mask
        return keys

    def counts_with(self, other: _Threshold) -> None:
        """Take over what another counts of the same values in the first pass."""
        self._counts = other._counts

    @property
    def counts(self) -> np.ndarray | None:
        """Where this pass counts magnitudes, if it does."""
        return self._counts if self._stage == "count" else None

    def keys_of(self, b: Block) -> np.ndarray:
        """The magnitudes of a block, as integers that order as they do."""
        return self._keys(np.ascontiguousarray(self._of(b))).reshape(-1)

    def add(self, b: Block) -> None:
        self.take(b, self.keys_of(b))

    def take(self, b: Block, keys: np.ndarray) -> None:
        """Take in a block's magnitudes."""
        if self._stage == "between":
            self._add_between(b, keys)
            return
        if self._stage == "equal":
            self._equal[b.number] = np.count_nonzero(keys == self._prefix)
            return
        if len(self._digits) < len(_DIGITS[self._key.itemsize]):  # it is known how they begin
            keys = keys[(keys >> self._key.type(sum(self._digits))) == self._prefix]
        if self._stage == "collect":
            self._collected[b.number] = keys
            return
        digits = keys >> self._key.type(sum(self._digits[1:]))
        digits &= self._key.type(2 ** self._digits[0] - 1)
        counted = np.bincount(digits.astype(np.intp), minlength=self._counts.size)
        with self._lock:  # other workers count other blocks of this tensor
            self._counts += counted

    def _add_between(self, b: Block, keys: np.ndarray) -> None:
        assert self._between is not None
        low, high = map(self._key.type, self._between)
        larger = keys > high
        self._above[b.number] = np.count_nonzero(larger)
        if self._held > _MOST:  # more than memory is for: the bits will be counted
            return
        found = keys[np.flatnonzero((keys >= low) ^ larger)]  # few: sooner by their places
        self._collected[b.number] = found
        with self._lock:
            self._held += found.size

    def end_pass(self) -> None:
        if self._stage == "between":
            self._wanted = self._asked - int(self._above.sum())
            if self._held <= _MOST and 0 < self._wanted <= self._held:
                self._stage = "collect"
                self.end_pass()
            else:
                self._collected = [np.empty(0, self._key)] * len(self._collected)
                self._begin_to_count("count")
        elif self._stage == "count":
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
        else:
            self._found()

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
        self.needs_pass = False

    @property
    def value(self) -> Kept:
        threshold = np.array([self._prefix], self._key).view(self._number)
        return Kept(self._of, self._keep, float(threshold[0]))

    def _keep(self, b: Block, values: np.ndarray) -> np.ndarray:
        keys = self._keys(values)
        if self._whole:
            reached: np.ndarray = keys >= self._key.type(self._prefix)
            return reached
        keep: np.ndarray = keys > self._key.type(self._prefix)
        room = self._wanted - int(self._equal[b.number])
        if room > 0:
            flat = keep.reshape(-1)
            flat[np.flatnonzero(keys == self._key.type(self._prefix))[:room]] = True
        return keep


class _Thresholds:
    """Several exact thresholds of the same values; a pass that counts all counts for all."""

    def __init__(self, asked: Ranked, x: Tensor) -> None:
        self._each = [_Threshold(one, x) for one in asked.each]
        for other in self._each[1:]:
            other.counts_with(self._each[0])
        self.needs_pass = True

    def sample(self, blocks: Sequence[Block]) -> None:
        for one in self._each:
            one.sample(blocks)

    def add(self, b: Block) -> None:
        keys = self._each[0].keys_of(b)
        counted: set[int] = set()  # tables that two of them share
        for one in self._each:
            if one.needs_pass and id(one.counts) not in counted:
                one.take(b, keys)
                counted |= set() if one.counts is None else {id(one.counts)}

    def end_pass(self) -> None:
        for one in self._each:
            if one.needs_pass:
                one.end_pass()
        self.needs_pass = any(one.needs_pass for one in self._each)

    @property
    def value(self) -> tuple[Kept, ...]:
        return tuple(one.value for one in self._each)


@dataclass(frozen=True)
class Norms:
    """L1 norms in float64, of values before and after some were dropped.

    The value is both, and the `Kept`: what was drawn for it is remembered, a bit an element, where
    that is not too much.

    Attributes:
        kept: values, and which of them are kept.
        rows: whether its blocks are whole rows.
    """

    kept: Kept
    rows: bool = False
    wide = False

    def passes(self, x: Tensor) -> int:
        """One."""
        return 1

    def remembers(self, x: Tensor) -> bool:
        """Whether what is kept is remembered."""
        return self.kept.is_drawn and x.elements * x.count <= _REMEMBERED

    def state_bytes(self, x: Tensor) -> int:
        """Two numbers for each block, and a bit for each element that is remembered."""
        return 16 * _blocks(x, rows=self.rows) + self.remembers(x) * (x.elements // 8)

    def guess(self, x: Tensor) -> tuple[float, float, Kept]:
        """Nothing was dropped."""
        return 1.0, 1.0, self.kept

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        return _Norms(self, x)


class _Norms:
    def __init__(self, asked: Norms, x: Tensor) -> None:
        self._kept = asked.kept
        blocks = _blocks(x, rows=asked.rows)
        self._partial = np.zeros((blocks, 2))
        self._masks = [np.empty(0, np.uint8)] * blocks if asked.remembers(x) else None
        self.needs_pass = True

    def add(self, b: Block) -> None:
        values = self._kept.of(b)
        keep = self._kept.keeps(b, values)
        if self._masks is not None:
            self._masks[b.number] = np.packbits(keep)
        magnitudes = np.abs(values)
        for k, of in enumerate((magnitudes, magnitudes * keep)):
            self._partial[b.number, k] = np.add.reduce(of, axis=None, dtype=np.float64)

    def end_pass(self) -> None:
        self.needs_pass = False

    @property
    def value(self) -> tuple[float, float, Kept]:
        before, after = self._partial.sum(axis=0).tolist()
        if self._masks is None:
            return before, after, self._kept
        return before, after, Kept(self._kept.of, _Remembered(self._masks))


@dataclass(frozen=True)
class _Remembered:
    """What was kept of each block; a `keeps` of `Kept`."""

    masks: Sequence[np.ndarray]

    def __call__(self, b: Block, values: np.ndarray) -> np.ndarray:
        bits = np.unpackbits(self.masks[b.number], count=values.size)
        return bits.view(bool).reshape(values.shape)


@dataclass(frozen=True)
class _Drawn:
    """Each element with the probability `density`; a `keeps` of `Kept`."""

    key: int
    limit: np.uint32

    def __call__(self, b: Block, values: np.ndarray) -> np.ndarray:
        keep: np.ndarray = uniform(self.key, b.start, values.size) < self.limit
        return keep.reshape(values.shape)


def sampled(x: Tensor) -> list[int]:
    """Where the parts of a sample begin, each of which is as long as `PART`."""
    parts = max(_SAMPLED, x.elements // 512) // PART
    return [(x.elements - PART) * n // (parts - 1) for n in range(parts)]


def uniform(key: int, start: int, size: int) -> np.ndarray:
    """Random 32-bit numbers for the elements from `start` on, whichever block they are in."""
    # Philox gives four 64-bit numbers a count, so eight 32-bit ones.
    generator = np.random.Philox(key=key, counter=start // 8)
    before = start % 8
    raw = generator.random_raw(-(-(before + size) // 2))
    numbers: np.ndarray = raw.view(np.uint32)[before : before + size]
    return numbers


def random_key(x: Tensor, k: int) -> int:
    """What a model's random numbers are keyed by: the seed, the model, the tensor's name."""
    digest = xxhash.xxh3_128_digest(f"{x.seed}\0{k}\0{x.name}".encode())
    return int.from_bytes(digest, "little")


def drawn(x: Tensor, k: int, of: Of, density: float) -> Kept:
    """Values of which each is kept with the probability `density`.

    The random numbers come from the counter-based generator Philox, keyed by the seed, the
    tensor's name and the model's number, with the element's index as the counter: so a mask does
    not depend on slices, workers or the order of tensors.
    """
    limit = np.uint32(min(round(density * 2**32), 2**32 - 1))
    return Kept(of, _Drawn(random_key(x, k), limit), is_drawn=True)
