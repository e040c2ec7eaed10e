"""Task arithmetic and its sparsified forms: TIES and DARE.

A task vector is what fine-tuning changed: model − base. Names, parameters and defaults are
mergekit's. Where methods keep the largest magnitudes of a tensor, equal magnitudes at the
threshold are kept from the lowest index on; DARE restores the L1 norm of each task vector, tensor
by tensor, where `rescale` is true (not 1/density, as the paper has it).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from ..forms import Block, Of, PerModel, Tensor, WeightedSum
from ..kept import Kept, Norms, drawn
from ..reductions import Reduction
from ..thresholds import Largest
from .parameters import parameter
from .registry import Asking, method

_ZERO_SUM = 1e-8  # as in mergekit: a smaller sum of weights does not divide
_L1_EPSILON = 1e-7  # as in mergekit: a norm below this is not restored

WEIGHT = parameter(doc="what each task vector is multiplied by (--weights)")
LAMBDA = parameter(1.0, doc="what the sum of the task vectors is multiplied by")
_LARGEST = parameter(
    1.0, low=0, high=1, doc="the share of each task vector that is kept: the largest"
)
_RANDOM = parameter(1.0, low=0, high=1, doc="the probability that an element is kept")
OVER_SUM = "divide by the sum of the weights"
OVER_AGREEING = "divide by the sum of the weights that agree in sign"
RESCALE = "restore each task vector's L1 norm after elements were dropped"


def folded(weight: PerModel, lambda_: float, *, normalize: bool) -> PerModel:
    """λ, and the sum of the weights where they are normalised, taken into the weights."""
    total = sum(weight) if normalize else 1.0
    divisor = 1.0 if abs(total) < _ZERO_SUM else total
    return tuple(lambda_ * w / divisor for w in weight)


@method(
    "task_arithmetic",
    base=True,
    models=(1, None),
    normalizes="normalize",
    purpose="task vectors",
    version="1",
    summary="base + λ·Σ wᵢ·(xᵢ − base)",
    source="Ilharco et al., Editing models with task arithmetic, ICLR 2023",
)
def task_arithmetic(
    x: Tensor,
    weight: PerModel = WEIGHT,
    normalize: bool = parameter(False, doc=OVER_SUM),
    lambda_: float = LAMBDA,
) -> WeightedSum:
    """Base + λ·Σ wᵢ·(xᵢ − base), with λ and normalisation in the weights."""
    return WeightedSum(folded(weight, lambda_, normalize=normalize), of_deltas=True)


Thinning = Generator[Sequence[Reduction], Sequence[Any], list[Of]]


def trimmed(x: Tensor, density: PerModel, *, rescale: bool) -> Thinning:
    """Task vectors of which the largest `density` of the elements are kept."""
    of: list[Of] = [x.delta(k) if d > 0 else zero for k, d in enumerate(density)]
    counts = {
        k: max(1, math.floor(d * x.elements))
        for k, d in enumerate(density) if 0 < d < 1 and x.elements
    }  # fmt: skip
    found = yield [Largest(x.delta(k), count) for k, count in counts.items()]
    for k, kept in zip(counts, found, strict=True):
        of[k] = kept
    return (yield from rescaled(of)) if rescale else of


def dropped(x: Tensor, density: PerModel, *, rescale: bool) -> Thinning:
    """Task vectors of which each element is kept with the probability `density`."""
    of: list[Of] = [
        drawn(x, k, x.delta(k), d) if 0 < d < 1 else x.delta(k) if d > 0 else zero
        for k, d in enumerate(density)
    ]
    return (yield from rescaled(of)) if rescale else of


def rescaled(of: list[Of], *, rows: bool = False) -> Thinning:
    """Those that were thinned times what restores their L1 norm, where they have one."""
    kept = {k: one for k, one in enumerate(of) if isinstance(one, Kept)}
    found = yield [Norms(one, rows) for one in kept.values()]
    for k, (before, after, one) in zip(kept, found, strict=True):
        restores = before >= _L1_EPSILON and after >= _L1_EPSILON
        of[k] = Scaled(one, before / after) if restores else one
    return of


def zero(b: Block) -> np.ndarray:
    """Nothing is kept."""
    return np.zeros_like(b.base)


@dataclass(frozen=True)
class Scaled:
    """Values times a number, as a function of a block."""

    of: Of
    factor: float

    def __call__(self, b: Block) -> np.ndarray:
        """The product, a new array."""
        values = self.of(b)
        values *= values.dtype.type(self.factor)
        return values


@method(
    "dare_linear",
    base=True,
    models=(1, None),
    normalizes="normalize",
    purpose="task vectors",
    version="1",
    summary="task arithmetic on randomly thinned task vectors",
    source="Yu et al., Language models are super Mario, ICML 2024",
)
def dare_linear(
    x: Tensor,
    weight: PerModel = WEIGHT,
    density: PerModel = _RANDOM,
    normalize: bool = parameter(False, doc=OVER_SUM),
    rescale: bool = parameter(True, doc=RESCALE),
    lambda_: float = LAMBDA,
) -> Asking:
    """Base + λ·Σ wᵢ·dᵢ over thinned task vectors dᵢ."""
    thin = yield from dropped(x, density, rescale=rescale)
    return summed(thin, folded(weight, lambda_, normalize=normalize))


def summed(of: Sequence[Of], weight: PerModel) -> Of:
    """Base + Σ wᵢ·dᵢ, the sum added up in order."""

    def merged(b: Block) -> np.ndarray:
        total = weight[0] * of[0](b)
        for w, one in zip(weight[1:], of[1:], strict=True):
            total += w * one(b)
        made: np.ndarray = b.base + total
        return made

    return merged


@method(
    "ties",
    base=True,
    models=(1, None),
    purpose="task vectors",
    version="1",
    summary="trim task vectors, elect a sign for each element, average those that agree",
    source="Yadav et al., TIES-merging, NeurIPS 2023",
)
def ties(
    x: Tensor,
    weight: PerModel = WEIGHT,
    density: PerModel = _LARGEST,
    normalize: bool = parameter(True, doc=OVER_AGREEING),
    rescale: bool = parameter(False, doc=RESCALE),
    lambda_: float = LAMBDA,
) -> Asking:
    """Base + λ·Σ wᵢ·dᵢ / Σ wᵢ over the trimmed task vectors that have the elected sign."""
    thin = yield from trimmed(x, density, rescale=rescale)
    return agreed(thin, weight, lambda_, normalize=normalize)


@method(
    "dare_ties",
    base=True,
    models=(1, None),
    purpose="task vectors",
    version="1",
    summary="TIES' sign election on randomly thinned task vectors",
    source="Yu et al., Language models are super Mario, ICML 2024; Yadav et al., NeurIPS 2023",
)
def dare_ties(
    x: Tensor,
    weight: PerModel = WEIGHT,
    density: PerModel = _RANDOM,
    normalize: bool = parameter(False, doc=OVER_AGREEING),
    rescale: bool = parameter(True, doc=RESCALE),
    lambda_: float = LAMBDA,
) -> Asking:
    """Base + λ·Σ wᵢ·dᵢ (/ Σ wᵢ under normalize) over thinned task vectors of the elected sign."""
    thin = yield from dropped(x, density, rescale=rescale)
    return agreed(thin, weight, lambda_, normalize=normalize)


def agreed(of: Sequence[Of], weight: PerModel, lambda_: float, *, normalize: bool) -> Of:
    """Base + λ·Σ of the weighted task vectors that agree with the elected sign.

    The elected sign is that of the weighted sum, + for zero (Yadav et al., section 3).
    Masks are multiplied with: signs come at random, and numpy's `where` would mispredict them.
    """

    def merged(b: Block) -> np.ndarray:
        weighted = [one(b) for one in of]
        for w, delta in zip(weight, weighted, strict=True):
            np.multiply(delta, w, out=delta)
        positive = reduce(np.add, weighted) >= 0
        total = np.zeros_like(b.base)
        divisor = np.zeros_like(b.base) if normalize else None
        for w, delta in zip(weight, weighted, strict=True):
            agrees = (delta > 0) == positive
            if divisor is not None:
                divisor += total.dtype.type(w) * (agrees & (delta != 0))
            np.multiply(delta, agrees, out=delta)
            total += delta
        if divisor is not None:
            divisor += divisor == 0
            total /= divisor
        total *= lambda_
        total += b.base
        return total

    return merged
