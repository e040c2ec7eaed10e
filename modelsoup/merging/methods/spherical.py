"""Interpolation on the sphere."""

from __future__ import annotations

import math

import numpy as np

from ..forms import Tensor, WeightedSum
from ..reductions import Gram
from .registry import Asking, method, parameter

_PARALLEL = 0.9995  # above this |cos θ|, sin θ is too small to divide by
_SMALL_NORM = 1e-8  # vectors shorter than this have no direction


@method(
    "slerp",
    models=(2, 2),
    from_beta=lambda beta: {"t": 1 - beta},
    purpose="interpolate",
    version="1",
    summary="spherical interpolation of each tensor, taken as one long vector",
    source="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; as in mergekit",
)
def slerp(
    x: Tensor,
    t: float = parameter(
        low=0, high=1, doc="0 is the first model, 1 the second; --beta β is t = 1 − β"
    ),
) -> Asking:
    """sin((1−t)θ)/sin θ · x₁ + sin(tθ)/sin θ · x₂, with θ the angle between the tensors.

    They are not normalised themselves; the straight line where |cos θ| > 0.9995.
    """
    if t in (0, 1):
        return WeightedSum((1 - t, t))
    (gram,) = yield [Gram()]
    first, second = (
        norm if norm > _SMALL_NORM else 1.0 for norm in np.sqrt(np.diag(gram)).tolist()
    )
    cosine = min(1.0, max(-1.0, float(gram[0, 1]) / (first * second)))
    if not abs(cosine) <= _PARALLEL:  # NaN too: the result then shows it
        return WeightedSum((1 - t, t))
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return WeightedSum((math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine))
