"""Interpolation on the sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..forms import Block, PerModel, Rows, Tensor, WeightedSum, Whole
from ..reductions import Gram, products_along
from .parameters import parameter
from .registry import Asking, method

_PARALLEL = 0.9995  # above this |cos θ|, sin θ is too small to divide by
_SMALL_NORM = 1e-8  # vectors shorter than this have no direction
_SMALL_SINE = 2.0**-24  # sin² θ that float32 does not tell from 0
_SMALL_SUM = 1e-6  # as in mergekit: a smaller sum of weights does not divide
_SMALL_ANGLE = 1e-7  # of a vector that is the mean, or its opposite, and pulls nowhere
_SLAB = 1 << 18  # elements of a tensor that are merged at a time where it is in memory


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


@method(
    "nuslerp",
    models=(2, 2),
    base=None,
    from_beta=lambda beta: {"weight": (beta, 1 - beta)},
    purpose="interpolate",
    version="1",
    summary="spherical interpolation by weights: of tensors, rows or columns, or of task vectors",
    source="mergekit's nuslerp; Shoemake, SIGGRAPH 1985",
)
def nuslerp(
    x: Tensor,
    weight: PerModel = parameter(doc="the models' weights: t is the second's share of their sum"),
    nuslerp_flatten: bool = parameter(True, doc="take each tensor as one long vector"),
    nuslerp_row_wise: bool = parameter(
        False, doc="without flatten: vectors along the first axis, and not along the last"
    ),
) -> Asking:
    """sin((1−t)θ)/sin θ · x₁ + sin(tθ)/sin θ · x₂, t = w₂/(w₁ + w₂); with a base of task vectors.

    The straight line where they are parallel, and t = ½ where the weights' sum is 0.
    """
    total = sum(weight)
    t = 0.5 if abs(total) < _SMALL_SUM else weight[1] / total
    if nuslerp_flatten:
        (gram,) = yield [Gram("deltas" if x.has_base else "inputs")]
        return WeightedSum(_on_arc(gram, t).tolist(), of_deltas=x.has_base)
    if nuslerp_row_wise and len(x.shape) > 1:
        return Whole(lambda inputs: _along_the_first_axis(x, inputs, t))

    def merged(b: Block) -> np.ndarray:
        if not x.has_base:
            return _merged_on_arc(b.values, t, axis=-1)
        made: np.ndarray = b.base + _merged_on_arc([b.delta(k) for k in x.models], t, axis=-1)
        return made

    return Rows(merged)


def _on_arc(gram: np.ndarray, t: float) -> np.ndarray:
    """The coefficients of two vectors, from their inner products in the last two axes."""
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    norms = np.where(norms <= _SMALL_NORM, 1.0, norms)
    cosine = np.clip(gram[..., 0, 1] / norms.prod(axis=-1), -1, 1)
    angle = np.arccos(cosine)
    shares = np.stack([(1 - t) * angle, t * angle], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        arc = np.sin(shares) / np.sin(angle)[..., None]
    straight = (1 - cosine**2 < _SMALL_SINE)[..., None]
    found: np.ndarray = np.where(straight, np.array([1 - t, t]), arc)
    return found


def _merged_on_arc(vectors: Sequence[np.ndarray], t: float, *, axis: int) -> np.ndarray:
    """Two arrays' vectors along an axis, interpolated."""
    shares = _on_arc(products_along(vectors, axis), t).astype(vectors[0].dtype)
    first, second = (np.expand_dims(shares[..., k], axis) for k in (0, 1))
    made: np.ndarray = first * vectors[0] + second * vectors[1]
    return made


def _along_the_first_axis(x: Tensor, inputs: Sequence[np.ndarray], t: float) -> np.ndarray:
    matrices = [one.reshape(x.shape[0], -1) for one in inputs]
    made = np.empty_like(matrices[0])
    width = max(1, _SLAB // x.shape[0])
    for start in range(0, made.shape[1], width):
        place = np.s_[:, start : start + width]
        base, *vectors = [one[place] for one in matrices]
        if x.has_base:
            made[place] = base + _merged_on_arc([one - base for one in vectors], t, axis=0)
        else:
            made[place] = _merged_on_arc([base, *vectors], t, axis=0)
    return made.reshape(x.shape)


@method(
    "multislerp",
    models=(1, None),
    base=None,
    normalizes="normalize_weights",
    purpose="interpolate",
    version="1",
    summary="the mean direction of models, or of task vectors, at their mean length",
    source="Goddard, Multi-SLERP, 2025; as in mergekit",
)
def multislerp(
    x: Tensor,
    weight: PerModel = parameter(doc="each model's weight"),
    normalize_weights: bool = parameter(True, doc="divide the weights by their sum"),
    eps: float = parameter(1e-8, low=0, doc="what is added to a length before it divides"),
) -> Asking:
    """Σ wᵢ‖xᵢ‖ · m/‖m‖, m = Σ wᵢ·xᵢ/‖xᵢ‖; where m is 0 there is no direction: Σ wᵢ·xᵢ.

    The tangents of unit vectors at the direction of their mean sum to 0, so that mergekit's step
    along them is none.
    """
    if x.count == 1:
        return WeightedSum((0.0, 1.0) if x.has_base else (1.0,))
    (gram,) = yield [Gram("deltas" if x.has_base else "inputs")]
    w = np.array(weight) / (sum(weight) if normalize_weights else 1.0)
    norms = np.sqrt(np.diag(gram))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(norms > _SMALL_NORM, w / (norms + eps), 0.0)
        length = np.sqrt(dot(shares, dot(gram, shares)))
        found = shares * dot(w, norms) / length
    return WeightedSum((found if length > _SMALL_NORM else w).tolist(), of_deltas=x.has_base)


@method(
    "karcher",
    models=(1, None),
    purpose="average",
    version="1",
    summary="the point on the sphere that is nearest to all models, at their mean length",
    source="Karcher, Riemannian center of mass, CPAM 1977; as in mergekit",
)
def karcher(
    x: Tensor,
    max_iter: int = parameter(10, low=1, doc="the most steps towards it"),
    tol: float = parameter(1e-5, low=0, doc="a step shorter than this is the last"),
) -> Asking:
    """mean(‖xᵢ‖) · u, where the logarithms of xᵢ/‖xᵢ‖ at u have the mean 0; all weigh the same.

    From the direction of their mean u goes along the mean logarithm until that is short. All is
    done on inner products: u is a sum of the models. Those without a length have no direction.
    """
    if x.count == 1:
        return WeightedSum((1.0,))
    (gram,) = yield [Gram()]
    norms = np.sqrt(np.diag(gram))
    used = norms > _SMALL_NORM
    if not used.any() or not np.isfinite(gram).all():
        return WeightedSum((1 / x.count,) * x.count)
    direction = np.zeros(x.count)
    direction[used] = _mean_direction(gram[np.ix_(used, used)], norms[used], max_iter, tol)
    return WeightedSum((direction * norms.mean()).tolist())


def _mean_direction(
    gram: np.ndarray, norms: np.ndarray, max_iter: int, tol: float
) -> np.ndarray:  # fmt: skip
    """The coefficients of the Karcher mean of the unit vectors that belong to a Gram matrix."""
    cosines = gram / np.multiply.outer(norms, norms)

    def length(of: np.ndarray) -> float:
        return math.sqrt(max(0.0, dot(of, dot(cosines, of))))

    u = np.full(len(norms), 1 / len(norms))
    if length(u) <= _SMALL_NORM:  # they cancel out: the first is as good as any
        u = np.eye(len(norms))[0]
    u /= length(u)
    for _ in range(max_iter):
        along = np.clip(dot(cosines, u), -1, 1)
        angles = np.arccos(along)
        sines = np.sin(angles)
        pulls = np.divide(angles, sines, out=np.zeros_like(sines), where=sines > _SMALL_ANGLE)
        tangent = (pulls - dot(pulls, along) * u) / len(norms)
        step = length(tangent)
        if step < tol or step == 0:
            break
        u = math.cos(step) * u + math.sin(step) / step * tangent
        u /= length(u)
    found: np.ndarray = u / norms
    return found


def dot(of: np.ndarray, vector: np.ndarray) -> Any:
    """Their product, added up in an order that does not depend on the machine as a BLAS does."""
    return np.add.reduce(of * vector, axis=-1)
