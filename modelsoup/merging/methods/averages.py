"""Weighted averages of models."""

from __future__ import annotations

import numpy as np

from ..forms import PerModel, Tensor, WeightedSum
from .registry import method, parameter


def over_their_sum(weight: PerModel) -> PerModel:
    """Weights over their sum, in float64; infinite or NaN where they sum to zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return tuple(float(w) for w in np.array(weight) / np.sum(weight))


@method(
    "linear",
    models=(1, None),
    from_beta=lambda beta: {"weight": (beta, 1 - beta), "normalize": False},
    normalizes=True,
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
