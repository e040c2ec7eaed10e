"""Interpolation on the sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .registry import method, parameter

_PARALLEL = 0.9995  # above this |cos θ|, sin θ is too small to divide by
_SMALL_NORM = 1e-8  # vectors shorter than this have no direction


@dataclass(frozen=True)
class SlerpParameters:
    """Parameters of `slerp`."""

    t: float = parameter(
        low=0, high=1, doc="0 is the first model, 1 the second; --beta β is t = 1 − β"
    )


@method(
    "slerp",
    SlerpParameters,
    shape="gram",
    models=(2, 2),
    from_beta=lambda beta: {"t": 1 - beta},
    identity=lambda p: {0.0: 0, 1.0: 1}.get(p.t),
    version="1",
    summary="spherical interpolation of each tensor, taken as one long vector",
    source="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; as in mergekit",
)
def slerp(gram: np.ndarray, p: SlerpParameters) -> tuple[float, float]:
    """The coefficients of the two models, from their inner products.

    sin((1−t)θ)/sin θ and sin(tθ)/sin θ with θ the angle between the tensors, which are not
    normalised themselves; the straight line where |cos θ| > 0.9995.
    """
    first, second = (
        norm if norm > _SMALL_NORM else 1.0 for norm in np.sqrt(np.diag(gram)).tolist()
    )
    cosine = min(1.0, max(-1.0, float(gram[0, 1]) / (first * second)))
    if not abs(cosine) <= _PARALLEL:  # NaN too: the result then shows it
        return 1 - p.t, p.t
    angle = math.acos(cosine)
    return math.sin((1 - p.t) * angle) / math.sin(angle), math.sin(p.t * angle) / math.sin(angle)
