"""Values of which some are kept and the others are not, by a threshold or by chance.

Random masks come from a counter-based generator, so that they depend on no slice and no worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from .forms import Block, Of, Tensor
from .reductions import Gathering, block_count

_REMEMBERED = 1 << 27  # elements of all models: of larger tensors masks are drawn once more


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


def either(mask: np.ndarray, values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`values` where a mask is true, `others` elsewhere: arrays of one shape and dtype.

    As `np.where`, which takes a branch for each element, and several times as long where the mask
    is as random as it mostly is here.
    """
    bits = np.dtype(f"u{values.itemsize}")
    found: np.ndarray = values.view(bits) ^ others.view(bits)
    found *= mask
    found ^= others.view(bits)
    return found.view(values.dtype)


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
        return 16 * block_count(x, rows=self.rows) + self.remembers(x) * (x.elements // 8)

    def guess(self, x: Tensor) -> tuple[float, float, Kept]:
        """Nothing was dropped."""
        return 1.0, 1.0, self.kept

    def begin(self, x: Tensor) -> Gathering:
        """Begin to gather."""
        return _Norms(self, x)


class _Norms:
    def __init__(self, asked: Norms, x: Tensor) -> None:
        self._kept = asked.kept
        blocks = block_count(x, rows=asked.rows)
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
