"""Task vectors merged by where the models agree: SCE and RAM."""

from __future__ import annotations

import math

import numpy as np

from ..forms import Block, Of, Tensor
from ..kept import either
from ..reductions import Sum
from ..thresholds import Largest
from .parameters import parameter
from .registry import Asking, method
from .task_vectors import zero

_SMALL = 1e-6  # as in mergekit: a smaller sum of weights does not divide


@method(
    "sce",
    base=True,
    models=(2, None),
    purpose="task vectors",
    version="1",
    summary="select elements of the largest variance, weigh models by energy, elect signs",
    source="Wan et al., FuseChat, 2024; as in mergekit",
)
def sce(
    x: Tensor,
    select_topk: float = parameter(
        1.0, low=0, high=1, doc="the share that is kept of the elements in which models differ"
    ),
) -> Asking:
    """Base + Σ wᵢ·dᵢ / Σ wᵢ over the task vectors that have the sign of Σ dᵢ.

    Of all dᵢ only those elements are kept whose variance over the models is largest; wᵢ is the
    mean of dᵢ² over the sum of these.
    """
    selected: Of | None = None
    if select_topk < 1:
        (differing,) = yield [Sum(lambda b: variance(x, b) > 0)]
        count = math.floor(select_topk * differing)
        (kept,) = yield [Largest(lambda b: variance(x, b), max(1, count))]
        selected = kept.mask if count else zero
    (energy,) = yield [Sum(lambda b: tuple(d * d for d in _selected(x, b, selected)), x.count)]
    mean = [e / max(1, x.elements) for e in energy]
    shares = [e / sum(mean) if sum(mean) > _SMALL else 1 / x.count for e in mean]

    def merged(b: Block) -> np.ndarray:
        deltas = _selected(x, b, selected)
        positive = np.asarray(sum(deltas) >= 0)
        total, divisor = np.zeros_like(b.base), np.zeros_like(b.base)
        for share, delta in zip(shares, deltas, strict=True):
            agrees = share * either(positive, delta > 0, delta < 0).astype(x.dtype)
            total += agrees * delta
            divisor += agrees
        made: np.ndarray = b.base + total / np.maximum(divisor, _SMALL)
        return made

    return merged


def _selected(x: Tensor, b: Block, selected: Of | None) -> list[np.ndarray]:
    if selected is None:
        return [b.delta(k) for k in x.models]
    mask = selected(b)
    return [b.delta(k) * mask for k in x.models]


def variance(x: Tensor, b: Block) -> np.ndarray:
    """Of the models, and so of their task vectors; exactly 0 where they are the same."""
    apart = [b.model(k) - b.model(0) for k in x.models]
    mean = sum(apart) / x.count
    found: np.ndarray = sum((d - mean) ** 2 for d in apart) / x.count
    return found


_EPSILON = parameter(1e-5, low=0, doc="a task vector's element that is larger is a change")


@method(
    "ram",
    base=True,
    models=(1, None),
    purpose="task vectors",
    version="1",
    summary="what one model changed is kept whole, what several changed is averaged",
    source="Reinforced Agent Merging, 2026 (arXiv 2601.13572); as in mergekit",
)
def ram(x: Tensor, epsilon: float = _EPSILON) -> Of:
    """Base + the mean of those dᵢ that are larger than ε."""

    def merged(b: Block) -> np.ndarray:
        deltas, count = _changes(x, b, epsilon)
        made: np.ndarray = b.base + sum(deltas) / np.maximum(count, 1)
        return made

    return merged


def _changes(x: Tensor, b: Block, epsilon: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Task vectors without what is no change, and how many models changed each element."""
    deltas = [b.delta(k) for k in x.models]
    changed = [np.abs(delta) > epsilon for delta in deltas]
    return [d * is_one for d, is_one in zip(deltas, changed, strict=True)], np.sum(
        changed, axis=0, dtype=x.dtype
    )


@method(
    "ramplus_tl",
    base=True,
    models=(1, None),
    purpose="task vectors",
    version="1",
    summary="as ram, and what one model changed is amplified by how much it shares with others",
    source="Reinforced Agent Merging Plus, 2026 (arXiv 2601.13572), by tensor; as in mergekit",
)
def ramplus_tl(
    x: Tensor,
    r: float = parameter(0.1, doc="how much sharing amplifies"),
    alpha: float = parameter(0.2, low=0, doc="the largest share that counts"),
    epsilon: float = _EPSILON,
) -> Asking:
    """Base + the mean of those dᵢ > ε where several are; else dᵢ·(1 + r·min(sharedᵢ/uniqueᵢ, α)).

    uniqueᵢ elements of a tensor were changed by model i alone, sharedᵢ by it and by others.
    """

    def counted(b: Block) -> tuple[np.ndarray, ...]:
        deltas, count = _changes(x, b, epsilon)
        return tuple((d != 0) & alone for d in deltas for alone in (count == 1, count > 1))

    (counts,) = yield [Sum(counted, 2 * x.count)]
    pairs = zip(counts[::2], counts[1::2], strict=True)
    factors = [1 + r * min(shared / max(1, unique), alpha) for unique, shared in pairs]

    def merged(b: Block) -> np.ndarray:
        deltas, count = _changes(x, b, epsilon)
        alone = sum(factor * d for factor, d in zip(factors, deltas, strict=True))
        mean: np.ndarray = sum(deltas) / np.maximum(count, 1)
        made: np.ndarray = b.base + either(count > 1, mean, np.asarray(alone))
        return made

    return merged
