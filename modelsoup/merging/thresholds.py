"""Which elements are the largest: exact thresholds by magnitude, whatever a tensor's size."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from .forms import Block, Of, Tensor
from .kept import Kept
from .reductions import Gathering, block_count

FEW = 1 << 13
"""Elements: among so few a threshold is found in one pass."""

# How many bits of a magnitude each pass counts, from the top. The first pass sorts every element
# into a table, which must stay in the first-level cache; the others few.
_DIGITS = {4: (12, 10, 9), 8: (12, 13, 13, 13, 12)}
_MOST = 4 << 20  # elements: so many that may hold the threshold are collected, not counted on
PART = 1 << 11
"""Elements: neighbours that are in a sample together."""
_SAMPLED = 1 << 16  # elements at least, and one in 512
_FEW_PLACES = 0.03  # of a mask's elements
_PADDED = 8  # one in so many are added, so that more than a tenth are true
_DEVIATIONS = 8  # on each side of where the sample has the threshold; its parts are neighbours


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
        return int(counts + collected + 16 * block_count(x, rows=self.rows))

    def guess(self, x: Tensor) -> Kept:
        """One that keeps everything."""
        return Kept(self.of, lambda _, values: np.ones(values.shape, bool), 0.0)

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        return _Thresholds([self], x, itemgetter(0))


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
        return _Thresholds(self.each, x, tuple)


class _Threshold:
    """One exact threshold.

    Of a large tensor a sample tells between which magnitudes it surely is (`_Between`). Where there
    is no sample, or it was wrong, bits are counted, which order as magnitudes do: one pass counts
    the upper dozen, which leaves few elements that may hold the threshold, and a second collects
    those. Where too many are left (a tensor of nearly equal magnitudes) more passes count on, a
    dozen bits each, so that memory stays bounded. Of a small tensor all are collected at once.
    """

    def __init__(self, asked: Largest, x: Tensor) -> None:
        blocks = block_count(x, rows=asked.rows)
        self._of = asked.of
        self._key = np.dtype(f"u{x.dtype.itemsize}")
        self._number = x.dtype
        self._elements = x.elements
        self._asked = asked.count
        self._lock = threading.Lock()
        self._whole = False  # whether all of them are kept
        self._equal = np.zeros(blocks, np.int64)  # elements at the threshold, then those before
        self._collected: list[np.ndarray] = [np.empty(0, self._key)] * blocks
        self._begin_to_count("collect" if x.elements <= FEW else "count")
        self.needs_pass = True

    def _begin_to_count(self, stage: str) -> None:
        self._stage = stage  # or equal
        self._digits = list(_DIGITS[self._key.itemsize])  # those still to be counted
        self._counts = np.zeros(2 ** self._digits[0] if stage == "count" else 0, np.int64)
        self._prefix = 0  # the threshold's bits, as far as they are known
        self._wanted = self._asked  # how many to take among those with that prefix

    def between(self, ordered: np.ndarray) -> tuple[int, int]:
        """The magnitudes that it surely lies between, by a sample of them in order."""
        share = self._asked / self._elements
        place = ordered.size * (1 - share)
        width = 1 + _DEVIATIONS * math.sqrt(ordered.size * share * (1 - share))
        low, high = int(place - width), int(place + width)
        return (
            int(ordered[low]) if low >= 0 else 0,
            int(ordered[high]) if high < ordered.size else int(_mask(self._key)),
        )

    def found_between(self, above: int, collected: list[np.ndarray]) -> None:
        """Of each block those between the magnitudes that were told; `above` are larger."""
        wanted = self._asked - above
        if 0 < wanted <= sum(keys.size for keys in collected) <= _MOST:
            self._stage, self._wanted, self._collected = "collect", wanted, collected
            self.end_pass()

    def counts_with(self, other: _Threshold) -> None:
        """Take over what another counts of the same values in the first pass."""
        self._counts = other._counts

    @property
    def counts(self) -> np.ndarray | None:
        """Where this pass counts magnitudes, if it does."""
        return self._counts if self._stage == "count" else None

    def take(self, b: Block, keys: np.ndarray) -> None:
        """Take in a block's magnitudes."""
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

    def end_pass(self) -> None:
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
        keys = _keys(values)
        if self._whole:
            reached: np.ndarray = keys >= self._key.type(self._prefix)
            return reached
        keep: np.ndarray = keys > self._key.type(self._prefix)
        room = self._wanted - int(self._equal[b.number])
        if room > 0:
            flat = keep.reshape(-1)
            flat[np.flatnonzero(keys == self._key.type(self._prefix))[:room]] = True
        return keep


class _Between:
    """A pass that looks for thresholds of the same values where a sample told that they are.

    Of each it counts those above, and those between are collected, for all thresholds together.

    Args:
        bounds: of each threshold, the least and the largest magnitude that it may be.
        blocks: how many there are.
        key: the dtype of magnitudes as integers.
    """

    def __init__(
        self, bounds: Sequence[tuple[int, int]], blocks: int, key: np.dtype[Any]
    ) -> None:  # fmt: skip
        # Arrays: numpy is slower with its numbers.
        self._bounds = [(np.array(low, key), np.array(high, key)) for low, high in bounds]
        self._above = np.zeros((len(bounds), blocks), np.int64)
        self._collected: list[np.ndarray] = [np.empty(0, key)] * blocks
        self._held = 0  # how many are collected
        self._lock = threading.Lock()

    def take(self, b: Block, keys: np.ndarray) -> None:
        """Take in a block's magnitudes."""
        is_between = np.zeros(keys.size + keys.size // _PADDED, bool)
        for n, (low, high) in enumerate(self._bounds):
            larger = keys > high
            self._above[n, b.number] = np.count_nonzero(larger)
            larger ^= keys >= low
            is_between[: keys.size] |= larger
        if self._held > _MOST * len(self._bounds):  # more than memory is for: bits will be counted
            return
        found = keys[_places(is_between, keys.size)]
        self._collected[b.number] = found
        with self._lock:
            self._held += found.size

    def tell(self, thresholds: Sequence[_Threshold]) -> None:
        """Tell each threshold what was found."""
        if self._held > _MOST * len(thresholds):
            return
        for one, above, (low, high) in zip(thresholds, self._above, self._bounds, strict=True):
            own = self._collected
            if len(thresholds) > 1:
                own = [keys[((keys >= low) & (keys <= high)).nonzero()] for keys in own]
            one.found_between(int(above.sum()), own)


class _Thresholds:
    """Exact thresholds of the same values: what a pass does for one, it does for all.

    Args:
        asked: one or several.
        x: the tensor.
        of: of what is known of each the value that was asked for.
    """

    def __init__(
        self, asked: Sequence[Largest], x: Tensor, of: Callable[[tuple[Kept, ...]], Any]
    ) -> None:  # fmt: skip
        self._values = asked[0].of
        self._blocks = block_count(x, rows=asked[0].rows)
        self._each = [_Threshold(one, x) for one in asked]
        for other in self._each[1:]:
            other.counts_with(self._each[0])
        self._between: _Between | None = None
        self._of = of
        self.needs_pass = True

    def sample(self, blocks: Sequence[Block]) -> None:
        """Learn about where thresholds are, from some elements of all parts of the tensor."""
        keys = np.sort(np.concatenate([_keys(self._values(b)).reshape(-1) for b in blocks]))
        bounds = [one.between(keys) for one in self._each]
        self._between = _Between(bounds, self._blocks, keys.dtype)

    def add(self, b: Block) -> None:
        keys = _keys(np.ascontiguousarray(self._values(b))).reshape(-1)
        if self._between is not None:
            self._between.take(b, keys)
            return
        counted: set[int] = set()  # tables that two of them share
        for one in self._each:
            if one.needs_pass and id(one.counts) not in counted:
                one.take(b, keys)
                counted |= set() if one.counts is None else {id(one.counts)}

    def end_pass(self) -> None:
        if self._between is not None:
            self._between.tell(self._each)
            self._between = None
        else:
            for one in self._each:
                if one.needs_pass:
                    one.end_pass()
        self.needs_pass = any(one.needs_pass for one in self._each)

    @property
    def value(self) -> Any:
        return self._of(tuple(one.value for one in self._each))


def _keys(values: np.ndarray) -> np.ndarray:
    """Magnitudes, as integers that order as they do."""
    key = np.dtype(f"u{values.itemsize}")
    keys: np.ndarray = values.view(key) & _mask(key)
    return keys


def _mask(key: np.dtype[Any]) -> Any:
    """All bits but the sign."""
    return key.type(2 ** (8 * key.itemsize - 1) - 1)


def _places(mask: np.ndarray, size: int) -> np.ndarray:
    """Where the first `size` elements of a mask are true; what is behind them is written to.

    Where fewer than a tenth are, numpy takes a branch for each, which costs more than to look at
    all as soon as one in thirty is: then those behind make it a tenth.
    """
    if np.count_nonzero(mask) < _FEW_PLACES * size:
        return mask[:size].nonzero()[0]
    mask[size:] = True
    found: np.ndarray = mask.nonzero()[0]
    return found[: found.size - (mask.size - size)]


def sampled(x: Tensor) -> list[int]:
    """Where the parts of a sample begin, each of which is as long as `PART`."""
    parts = max(_SAMPLED, x.elements // 512) // PART
    return [(x.elements - PART) * n // (parts - 1) for n in range(parts)]
