"""Averages that a model far from the others does not move far."""

from __future__ import annotations

import math

import numpy as np

from ..forms import PerModel, Tensor, WeightedSum
from ..reductions import Gram
from .averages import WEIGHT, over_their_sum
from .registry import Asking, method

_SAME = 1e-14  # squared distance over squared norms: as near as float32 can tell
_SETTLED = 1e-10
_MOST_STEPS = 1000


@method(
    "geometric_median",
    models=(1, None),
    purpose="average",
    version="1",
    summary="the point with the smallest sum of distances to the models, tensor by tensor",
    source="Weiszfeld 1937; Vardi and Zhang, PNAS 2000; Pillutla et al., IEEE TSP 2022",
)
def geometric_median(x: Tensor, weight: PerModel = WEIGHT) -> Asking:
    """The y with the smallest Σ wᵢ·‖xᵢ − y‖, by Weiszfeld's steps from the mean.

    Each tensor is taken as one long vector. A model that is the median itself is found first, by
    the condition of Vardi and Zhang, and then the result is exactly it.
    """
    (gram,) = yield [Gram()]
    return WeightedSum(median_weights(gram, np.array(weight)))


def median_weights(gram: np.ndarray, weight: np.ndarray) -> PerModel:
    """The weights, which sum to 1, with which vectors add up to their geometric median.

    Args:
        gram: their inner products.
        weight: of each vector's distance.
    """
    mean = over_their_sum(tuple(weight.tolist()))
    if not (np.isfinite(gram).all() and np.isfinite(mean).all()):
        return mean  # the result then shows it
    norms = np.diag(gram)
    squared = norms[:, None] + norms - 2 * gram
    same = squared <= _SAME * (norms[:, None] + norms)
    distance = np.sqrt(np.where(same, 1, np.maximum(squared, 0)))
    pull = np.where(same, 0, weight / distance)  # of each vector, at the place of each
    # What pulls at vector j is Σ pᵢ·(xᵢ − xⱼ); its weight holds against that, or it does not.
    against = pull - np.diag(pull.sum(axis=1))
    force = np.einsum("ji,ik,jk->j", against, gram, against)
    holds = force <= (same @ weight) ** 2
    if holds.any():
        first = int(np.argmax(holds))
        return tuple(float(k == first) for k in range(len(weight)))
    share = np.array(mean)
    for _ in range(_MOST_STEPS):
        apart = np.maximum(norms - 2 * gram @ share + share @ gram @ share, 0)
        step = weight / np.sqrt(np.maximum(apart, math.ulp(float(norms.max()))))
        step /= step.sum()
        moved = float(np.abs(step - share).max())
        share = step
        if moved <= _SETTLED:
            break
    return tuple(share.tolist())
