"""Weighted averages of models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .registry import method, parameter


@dataclass(frozen=True)
class LinearParameters:
    """Parameters of `linear`."""

    weight: tuple[float, ...] = parameter(
        1.0, per_model=True, doc="each model's weight; --beta β is weights β, 1 − β"
    )
    normalize: bool = parameter(True, doc="divide the weights by their sum")


def normalized(weight: tuple[float, ...]) -> tuple[float, ...]:
    """Weights over their sum, in float64; infinite or NaN where they sum to zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return tuple(float(w) for w in np.array(weight) / np.sum(weight))


def _prepare(p: LinearParameters) -> LinearParameters:
    return replace(p, weight=normalized(p.weight)) if p.normalize else p


def _identity(p: LinearParameters) -> int | None:
    weights = _prepare(p).weight
    used = [index for index, weight in enumerate(weights) if weight != 0]
    return used[0] if len(used) == 1 and weights[used[0]] == 1 else None


def _linear_into(x: Any, p: Any, out: Any, own: Any) -> None:
    np.multiply(p.weight[0], x[0], out=out)
    for k in range(1, len(x)):
        part = np.multiply(p.weight[k], x[k], out=x[k] if own[k] else None)
        np.add(out, part, out=out)


@method(
    "linear",
    LinearParameters,
    models=(1, None),
    prepare=_prepare,
    from_beta=lambda beta: {"weight": (beta, 1 - beta), "normalize": False},
    propagates=True,
    identity=_identity,
    into=_linear_into,
    version="1",
    summary="weighted average: Σ wᵢ·xᵢ, with Σ wᵢ = 1 unless normalize is false",
    source="Wortsman et al., Model soups, ICML 2022; two models: w = β·w₁ + (1 − β)·w₂",
)
def linear(x: Any, p: Any) -> Any:
    """Σ wᵢ·xᵢ, added up in the models' order."""
    total = p.weight[0] * x[0]
    for k in range(1, len(x)):
        total += p.weight[k] * x[k]
    return total
