"""One model taken over into another: two models, of which the first is what is changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..forms import Block, Of, Tensor
from ..kept import either
from ..reductions import EachRow
from ..thresholds import Ranked
from .parameters import parameter
from .registry import Asking, method

_LEAST_DIFFERENCE = 1e-6  # as in mergekit
_LEAST_PROBABILITY = 1e-8  # as in mergekit: added to each
_LONG = 512  # elements of a row: of fewer, numpy is slow row by row
_BUFFER = 8192  # elements, as numpy has it


@method(
    "nearswap",
    models=(2, 2),
    purpose="two models",
    version="1",
    summary="the second model where it is near the first, the less of it the farther it is",
    source="alchemonaut, QuartetAnemoi-70B, 2024; as in mergekit",
)
def nearswap(
    x: Tensor, t: float = parameter(low=0, doc="as far as this the second is taken whole")
) -> Of:
    """w·x₂ + (1 − w)·x₁, w = min(t / max(|x₁ − x₂|, 1e-6), 1)."""

    def merged(b: Block) -> np.ndarray:
        first, second = b.values
        share = np.minimum(t / np.maximum(np.abs(first - second), _LEAST_DIFFERENCE), 1)
        made: np.ndarray = share * second + (1 - share) * first
        return made

    return merged


@method(
    "arcee_fusion",
    models=(2, 2),
    purpose="two models",
    version="1",
    summary="the first model with those elements of the second that matter far more than most",
    source="Arcee AI, Arcee fusion, 2025; as in mergekit",
)
def arcee_fusion(x: Tensor) -> Asking:
    """x₂ where |x₂ − x₁|·KL ≥ median + 1.5·(Q₃ − Q₁) of all of these, else x₁.

    KL is the divergence of a row's softmax in the second model from the first's. Quartile q of n
    elements is that at ⌊(n − 1)·q⌋ in ascending order; mergekit draws a sample of large tensors.
    """
    (divergence,) = yield [EachRow(_divergence)]
    numbers = divergence.astype(x.dtype)

    def importance(b: Block) -> np.ndarray:
        found: np.ndarray = b.values[1] - b.values[0]
        np.abs(found, out=found)
        found *= _for_each_element(numbers, b.start, found.size, x.row)
        return found

    places = [math.floor((x.elements - 1) * q) for q in (0.25, 0.5, 0.75)]
    counts = tuple(max(1, x.elements - place) for place in places)
    ((lower, median, upper),) = yield [Ranked(importance, counts)]
    least = median.threshold + 1.5 * (upper.threshold - lower.threshold)
    return lambda b: either(importance(b) >= least, b.values[1], b.values[0])


def _for_each_element(numbers: np.ndarray, start: int, size: int, row: int) -> np.ndarray:
    """Of numbers that belong to rows, those of the elements from `start` on."""
    first, last = start // row, -(-(start + size) // row)
    if row <= size:  # and little more is made than is wanted
        return numbers[first:last].repeat(row)[start - first * row :][:size]
    begins = np.arange(first, last) * row
    lengths = np.minimum(begins + row, start + size) - np.maximum(begins, start)
    return np.repeat(numbers[first:last], lengths)


def _divergence(b: Block) -> np.ndarray:
    """The Kullback-Leibler divergence of each row's softmax in the second model from the first."""
    both = softmax(b.values)
    both += _LEAST_PROBABILITY
    q, p = both
    parts = np.log(np.divide(p, q, out=q), out=q)
    parts *= p
    found: np.ndarray = np.maximum(parts.sum(axis=-1), 0)  # but for rounding
    return found


def softmax(several: Sequence[np.ndarray]) -> np.ndarray:
    """Of each row of arrays of one shape, which are along the first axis; in float64."""
    made = np.empty((len(several), *several[0].shape))
    with _a_row_at_a_time(made.shape[-1]):
        for rows, wide in zip(several, made, strict=True):
            largest = rows.max(axis=-1, keepdims=True).astype(np.float64)
            np.subtract(rows, largest, out=wide)
    np.exp(made, out=made)
    total = made.sum(axis=-1, keepdims=True)
    with _a_row_at_a_time(made.shape[-1]):
        made /= total
    return made


@contextmanager
def _a_row_at_a_time(row: int) -> Iterator[None]:
    """For arithmetic with one number for each row of so many elements.

    Where several rows fit numpy's buffer, it copies the number there for each of their elements,
    which takes as long as the arithmetic. (Not for sums, whose order depends on it.)
    """
    if not _LONG <= row < _BUFFER:
        yield
        return
    size = np.setbufsize(row // 16 * 16)
    try:
        yield
    finally:
        np.setbufsize(size)
