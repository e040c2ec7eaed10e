"""Task arithmetic and its sparsified forms: TIES and DARE.

A task vector is what fine-tuning changed: model − base. Names, parameters and defaults are
mergekit's. Where methods keep the largest magnitudes of a tensor, equal magnitudes at the
threshold are kept from the lowest index on; DARE restores the L1 norm of each task vector, tensor
by tensor, where `rescale` is true (not 1/density, as the paper has it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .registry import method, parameter

_ZERO_SUM = 1e-8  # as in mergekit: a smaller sum of weights does not divide


def _weight() -> Any:
    return parameter(per_model=True, doc="what each task vector is multiplied by (--weights)")


def _density(doc: str) -> Any:
    return parameter(1.0, per_model=True, low=0, high=1, doc=doc)


def _lambda() -> Any:
    return parameter(1.0, doc="what the sum of the task vectors is multiplied by")


_NORMALIZE = "divide by the sum of the weights"
_RESCALE = "restore each task vector's L1 norm after elements were dropped"


@dataclass(frozen=True)
class TaskArithmeticParameters:
    """Parameters of `task_arithmetic`."""

    weight: tuple[float, ...] = _weight()
    normalize: bool = parameter(False, doc=_NORMALIZE)
    lambda_: float = _lambda()


@dataclass(frozen=True)
class TiesParameters:
    """Parameters of `ties`."""

    weight: tuple[float, ...] = _weight()
    density: tuple[float, ...] = _density("the share of each task vector that is kept: the largest")
    normalize: bool = parameter(True, doc="divide by the sum of the weights that agree in sign")
    rescale: bool = parameter(False, doc=_RESCALE)
    lambda_: float = _lambda()


@dataclass(frozen=True)
class DareLinearParameters:
    """Parameters of `dare_linear`."""

    weight: tuple[float, ...] = _weight()
    density: tuple[float, ...] = _density("the probability that an element is kept")
    normalize: bool = parameter(False, doc=_NORMALIZE)
    rescale: bool = parameter(True, doc=_RESCALE)
    lambda_: float = _lambda()


@dataclass(frozen=True)
class DareTiesParameters:
    """Parameters of `dare_ties`."""

    weight: tuple[float, ...] = _weight()
    density: tuple[float, ...] = _density("the probability that an element is kept")
    normalize: bool = parameter(False, doc="divide by the sum of the weights that agree in sign")
    rescale: bool = parameter(True, doc=_RESCALE)
    lambda_: float = _lambda()


def _fold(p: Any) -> Any:
    """λ, and the sum of the weights under `normalize`, taken into the weights."""
    total = sum(p.weight) if p.normalize else 1.0
    divisor = 1.0 if abs(total) < _ZERO_SUM else total
    return replace(p, weight=tuple(p.lambda_ * w / divisor for w in p.weight))


@method(
    "task_arithmetic",
    TaskArithmeticParameters,
    base=True,
    models=(1, None),
    prepare=_fold,
    propagates=True,
    version="1",
    summary="base + λ·Σ wᵢ·(xᵢ − base)",
    source="Ilharco et al., Editing models with task arithmetic, ICLR 2023",
)
def task_arithmetic(x: Any, p: Any) -> Any:
    """Base + Σ wᵢ·(xᵢ − base), with λ and normalisation in the weights."""
    total = p.weight[0] * (x[1] - x[0])
    for k in range(2, len(x)):
        total += p.weight[k - 1] * (x[k] - x[0])
    return x[0] + total


@method(
    "dare_linear",
    DareLinearParameters,
    shape="select",
    sparsify="random",
    base=True,
    models=(1, None),
    prepare=_fold,
    version="1",
    summary="task arithmetic on randomly thinned task vectors",
    source="Yu et al., Language models are super Mario, ICML 2024",
)
def dare_linear(x: Any, p: Any) -> Any:
    """Base + Σ wᵢ·dᵢ over thinned task vectors dᵢ."""
    total = p.weight[0] * x[1]
    for k in range(2, len(x)):
        total += p.weight[k - 1] * x[k]
    return x[0] + total


def _add_agreed(x: Any, p: Any) -> Any:
    """Add to the base λ·Σ of the weighted task vectors that agree with the elected sign.

    The elected sign is that of the weighted sum, + for zero (Yadav et al., section 3). Those that
    agree with + are the positive ones, so sums of positive and of negative parts are all it takes.
    Masks are multiplied with: signs come at random, and numpy's `where` would mispredict them.
    """
    weighted = [p.weight[k] * delta for k, delta in enumerate(x[1:])]
    elected = weighted[0].copy()
    for delta in weighted[1:]:
        elected += delta
    positive = elected >= 0
    total = sum(np.maximum(delta, 0) for delta in weighted) * positive
    total += sum(np.minimum(delta, 0) for delta in weighted) * ~positive
    if p.normalize:
        divisor = sum(p.weight[k] * (delta > 0) for k, delta in enumerate(weighted)) * positive
        divisor += sum(p.weight[k] * (delta < 0) for k, delta in enumerate(weighted)) * ~positive
        divisor += divisor == 0
        total /= divisor
    return x[0] + p.lambda_ * total


@method(
    "ties",
    TiesParameters,
    shape="select",
    sparsify="magnitude",
    base=True,
    models=(1, None),
    version="1",
    summary="trim task vectors, elect a sign for each element, average those that agree",
    source="Yadav et al., TIES-merging, NeurIPS 2023",
)
def ties(x: Any, p: Any) -> Any:
    """Base + λ·Σ wᵢ·dᵢ / Σ wᵢ over the trimmed task vectors that have the elected sign."""
    return _add_agreed(x, p)


@method(
    "dare_ties",
    DareTiesParameters,
    shape="select",
    sparsify="random",
    base=True,
    models=(1, None),
    version="1",
    summary="TIES' sign election on randomly thinned task vectors",
    source="Yu et al., Language models are super Mario, ICML 2024; Yadav et al., NeurIPS 2023",
)
def dare_ties(x: Any, p: Any) -> Any:
    """Base + λ·Σ wᵢ·dᵢ (/ Σ wᵢ under normalize) over thinned task vectors of the elected sign."""
    return _add_agreed(x, p)
