"""Weighted averages of models."""

from __future__ import annotations

import numpy as np

from ..forms import Block, PerModel, Rows, Tensor, WeightedSum
from ..reductions import Gram, products_along
from .parameters import parameter
from .registry import Asking, method

_LEAST_NORMS = 1e-6  # as in mergekit: the product of two norms that a cosine is divided by at least
_CANCELLED = 1e-6  # a divisor below this is zero but for rounding

WEIGHT = parameter(1.0, low=0, doc="each model's weight")


def over_their_sum(weight: PerModel) -> PerModel:
    """Weights over their sum, in float64; infinite or NaN where they sum to zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return tuple(float(w) for w in np.array(weight) / np.sum(weight))


@method(
    "linear",
    models=(1, None),
    from_beta=lambda beta: {"weight": (beta, 1 - beta), "normalize": False},
    normalizes="normalize",
    purpose="average",
    version="1",
    summary="weighted average: Σ wᵢ·xᵢ, with Σ wᵢ = 1 unless normalize is false",
    source="Wortsman et al., Model soups, ICML 2022; two models: w = β·w₁ + (1 − β)·w₂",
)
def linear(
    x: Tensor,
    weight: PerModel = parameter(1.0, doc="each model's weight; --beta β is weights β, 1 − β"),
    normalize: bool = parameter(True, doc="divide the weights by their sum"),
) -> WeightedSum:
    """Σ wᵢ·xᵢ, added up in the models' order."""
    return WeightedSum(over_their_sum(weight) if normalize else weight)


@method(
    "passthrough",
    models=(1, 1),
    purpose="one model",
    version="1",
    summary="one model as it is, or times a number: scale·x",
    source="mergekit's passthrough",
)
def passthrough(
    x: Tensor, scale: float = parameter(1.0, doc="what the model is multiplied by")
) -> WeightedSum:
    """scale·x."""
    return WeightedSum((scale,))


@method(
    "model_stock",
    models=(2, None),
    base=True,
    purpose="average",
    version="1",
    summary="the mean of models, drawn to their base the more the less their task vectors agree",
    source="Jang et al., Model Stock, ECCV 2024; as in mergekit",
)
def model_stock(
    x: Tensor,
    filter_wise: bool = parameter(False, doc="for each row by itself, and not for each tensor"),
) -> Asking:
    """t·mean(xᵢ) + (1 − t)·base, t = N·c/(1 + (N − 1)·c), c the mean cosine of two task vectors."""
    if filter_wise:

        def merged(b: Block) -> np.ndarray:
            deltas = [b.delta(k) for k in x.models]
            t = stocked(products_along(deltas, -1)) / x.count
            made: np.ndarray = b.base + t.astype(x.dtype)[:, None] * sum(deltas)
            return made

        return Rows(merged)
    (gram,) = yield [Gram("deltas")]
    return WeightedSum((float(stocked(gram)) / x.count,) * x.count, of_deltas=True)


def stocked(gram: np.ndarray) -> np.ndarray:
    """t, from the inner products of task vectors in the last two axes; 0 where they cancel out."""
    count = gram.shape[-1]
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    products = np.maximum(norms[..., :, None] * norms[..., None, :], _LEAST_NORMS)
    cosine = (gram / products)[..., *np.triu_indices(count, 1)].mean(axis=-1)
    divisor = 1 + (count - 1) * cosine
    t: np.ndarray = count * cosine / np.where(np.abs(divisor) < _CANCELLED, np.inf, divisor)
    return t
