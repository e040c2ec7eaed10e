"""Data-free merges of task vectors as matrices: by their singular directions and row spaces.

A matrix Dᵢ is the task vector of a weight with two axes, rows being outputs. Everything else
(biases, norms, embeddings, heads, and kernels of convolutions unless `conv` is `flatten`) is merged
by the mean of the task vectors, times the same λ, as the papers' own code does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from ...errors import ParameterError, counted
from ..forms import Merging, Tensor, WeightedSum, Whole
from .registry import method, parameter

Conv = Literal["mean", "flatten"]
Delta = Callable[[int], np.ndarray]
"""A model's task vector as a matrix, made anew at each call."""

_LOOKED_UP = re.compile(
    r"(?:.*[._/])?(?:embed\w*|wte|wpe|shared|lm_head|heads?|score|classifier|text_projection)"
    r"(?:[._/].*)?"
)

LAMBDA = parameter(1.0, doc="what the merged task vector is multiplied by")
CONV = parameter("mean", doc="kernels of convolutions: the mean, or matrices of out × the rest")
EMBEDDINGS = parameter(False, doc="take matrices that are called embedding or head as the others")


def matrix_shape(
    x: Tensor, conv: Conv = "mean", *, embeddings: bool = False
    ) -> tuple[int, int] | None:  # fmt: skip
    """Rows and columns of a tensor that is taken as a matrix; None of any other."""
    axes = len(x.shape)
    if not x.elements or axes < 2 or (axes > 2 and conv == "mean"):
        return None
    if not embeddings and _LOOKED_UP.fullmatch(x.name):
        return None
    return x.shape[0], x.elements // x.shape[0]


def mean_of_deltas(x: Tensor, lambda_: float) -> WeightedSum:
    """Base + λ/T·Σ dᵢ."""
    return WeightedSum((lambda_ / x.count,) * x.count, of_deltas=True)


def of_matrices(
    x: Tensor,
    shape: tuple[int, int] | None,
    lambda_: float,
    merged: Callable[[Delta], np.ndarray],
    memory: float,
) -> Merging:
    """Base + λ·(what is made of the matrices Dᵢ), or the mean where the tensor is no matrix.

    Args:
        x: the tensor.
        shape: of the matrices; None of what is none.
        lambda_: λ.
        merged: of the matrices, one of their shape; it is not asked where one is not finite, and
            the result is NaN there.
        memory: as of `Whole`, without a task vector and the sum with the base.
    """
    if shape is None:
        return mean_of_deltas(x, lambda_)

    def whole(inputs: Sequence[np.ndarray]) -> np.ndarray:
        base, models = inputs[0], inputs[1:]

        def delta(k: int) -> np.ndarray:
            made: np.ndarray = (models[k] - base).reshape(shape)
            return made

        if not all(is_finite(delta(k)) for k in x.models):
            return np.full(x.shape, np.nan, x.dtype)  # no decomposition would end
        made = merged(delta)
        made *= lambda_
        made = made.reshape(x.shape).astype(x.dtype, copy=False)
        made += base
        return made

    return Whole(whole, memory)


def is_finite(values: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity; without a mask of the values' size."""
    return math.isfinite(values.max()) and math.isfinite(values.min())


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, σ and Vᵀ with as many singular values as the shorter side has."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def polar(matrix: np.ndarray) -> np.ndarray:
    """U·Vᵀ of a matrix, the nearest one with orthonormal rows or columns.

    Directions that it does not have are left out: those that a decomposition finds for them are
    arbitrary. So two models that are the same count as one.
    """
    u, s, vt = svd(matrix)
    u *= s > s.max(initial=0) * max(matrix.shape) * np.finfo(s.dtype).eps
    nearest: np.ndarray = u @ vt
    return nearest


@method(
    "tsv_m",
    base=True,
    models=(1, None),
    purpose="matrices",
    version="1",
    summary="the strongest singular directions of each task vector, made orthogonal to each other",
    source="Gargiulo et al., Task singular vectors, CVPR 2025 (arXiv 2412.00081)",
)
def tsv_m(
    x: Tensor,
    lambda_: float = LAMBDA,
    conv: Conv = CONV,
    embeddings: bool = EMBEDDINGS,
) -> Merging:
    """polar(U)·diag(σ)·polar(V) of the joined first ⌊rank/T⌋ singular triplets of each Dᵢ."""
    shape = matrix_shape(x, conv, embeddings=embeddings)
    rank = 0 if shape is None else min(shape)
    kept = rank // x.count
    if shape is not None and not kept:
        raise ParameterError(
            f"tsv_m keeps ⌊rank / models⌋ directions of each task vector, which is none of "
            f"{x.name}, of rank {rank}, with {counted(x.count, 'model')}: merge it by another "
            f"method with a layer rule"
        )

    def merged(delta: Delta) -> np.ndarray:
        parts = [_strongest(delta(k), kept) for k in x.models]
        u = polar(np.concatenate([u for u, _, _ in parts], axis=1))
        s = np.concatenate([s for _, s, _ in parts])
        vt = np.concatenate([vt for _, _, vt in parts])
        parts.clear()
        u *= s
        made: np.ndarray = u @ polar(vt)
        return made

    return of_matrices(x, shape, lambda_, merged, 0)


def _strongest(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first singular triplets, in memory of their own."""
    u, s, vt = svd(matrix)
    return u[:, :count].copy(), s[:count].copy(), vt[:count].copy()


@method(
    "iso_c",
    base=True,
    models=(1, None),
    purpose="matrices",
    version="1",
    summary="the sum of task vectors with a flat spectrum",
    source="Marczak et al., No task left behind, ICML 2025 (arXiv 2502.04959)",
)
def iso_c(
    x: Tensor,
    lambda_: float = LAMBDA,
    conv: Conv = CONV,
    embeddings: bool = EMBEDDINGS,
) -> Merging:
    """σ̄·U·Vᵀ of Σ Dᵢ = U·diag(σ)·Vᵀ; of one model it is no identity."""
    shape = matrix_shape(x, conv, embeddings=embeddings)

    def merged(delta: Delta) -> np.ndarray:
        u, s, vt = svd(_sum(delta, x))
        u *= s.mean()
        made: np.ndarray = u @ vt
        return made

    return of_matrices(x, shape, lambda_, merged, 0)


def _sum(delta: Delta, x: Tensor) -> np.ndarray:
    total = delta(0)
    for k in x.models[1:]:
        total += delta(k)
    return total


@method(
    "iso_cts",
    base=True,
    models=(1, None),
    purpose="matrices",
    version="1",
    summary="iso_c with some of the directions taken from each task vector, not from their sum",
    source="Marczak et al., No task left behind, ICML 2025 (arXiv 2502.04959)",
)
def iso_cts(
    x: Tensor,
    common: float = parameter(0.8, low=0, high=1, doc="the share of directions of the sum's own"),
    lambda_: float = LAMBDA,
    conv: Conv = CONV,
    embeddings: bool = EMBEDDINGS,
) -> Merging:
    """σ̄·polar(U)·polar(V) of the sum's first directions and of each residual Dᵢ − U_c·U_cᵀ·Dᵢ.

    Of rank r the sum keeps r − p·T directions and each of T residuals p, the rounded share of
    (1 − common)·r.
    """
    shape = matrix_shape(x, conv, embeddings=embeddings)
    rank = 0 if shape is None else min(shape)
    each = min(round((rank - math.floor(common * rank)) / x.count), rank // x.count)
    shared = rank - each * x.count

    def merged(delta: Delta) -> np.ndarray:
        first = _strongest(_sum(delta, x), shared)
        parts = []
        for k in x.models if each else ():
            residual = delta(k)
            residual -= first[0] @ (first[0].T @ residual)
            parts.append(_strongest(residual, each))
        parts.append(first)
        u = polar(np.concatenate([u for u, _, _ in parts], axis=1))
        u *= np.concatenate([s for _, s, _ in parts]).mean()
        vt = np.concatenate([vt for _, _, vt in parts])
        parts.clear()
        made: np.ndarray = u @ polar(vt)
        return made

    return of_matrices(x, shape, lambda_, merged, 0)


@method(
    "wudi",
    base=True,
    models=(1, None),
    purpose="matrices",
    version="1",
    summary="the task vector that disturbs each task least within the rows of its own, in t steps",
    source="Cheng et al., Whoever started the interference should end it, ICML 2025 "
    "(arXiv 2503.08099); its gradient flow in closed form",
)
def wudi(
    x: Tensor,
    t: float = parameter(doc="how far to go from the sum of the task vectors, at 0"),
    lambda_: float = LAMBDA,
    conv: Conv = CONV,
    embeddings: bool = EMBEDDINGS,
) -> Merging:
    """X(t) of dX/dt = −∇ Σ ‖(X − Dᵢ)·Dᵢᵀ‖²/‖Dᵢ‖² from X(0) = Σ Dᵢ.

    With C = Σ DᵢᵀDᵢ/‖Dᵢ‖² = Q·diag(c)·Qᵀ and R = Σ DᵢDᵢᵀDᵢ/‖Dᵢ‖² it is
    X₀·Q·e^(−2tc)·Qᵀ + R·Q·(1 − e^(−2tc))/c·Qᵀ. The trace of C is the number of tasks, so that t
    means the same for tensors of any scale; t → ∞ is R·C⁺.
    """
    shape = matrix_shape(x, conv, embeddings=embeddings)

    def merged(delta: Delta) -> np.ndarray:
        assert shape is not None
        basis = None
        if x.count * shape[0] < shape[1]:  # all rows lie in a space that is smaller than theirs
            joined = np.concatenate([delta(k) for k in x.models])
            basis = np.linalg.qr(joined.T)[0]
            del joined
        size = shape[1] if basis is None else basis.shape[1]
        start = np.zeros((shape[0], size), x.dtype)
        pulled = np.zeros((shape[0], size), x.dtype)
        inner = np.zeros((size, size))
        for k in x.models:
            d = delta(k) if basis is None else delta(k) @ basis
            start += d
            wide = d.astype(np.float64)
            norm = float(np.linalg.norm(wide))
            if not norm:
                continue
            wide /= norm  # both products are then of moderate size
            gram = wide.T @ wide
            inner += gram
            gram *= norm
            pulled += (wide @ gram).astype(x.dtype)
        values, q = np.linalg.eigh(inner)
        values = np.maximum(values, 0)
        decay = np.exp(-2 * t * values)
        with np.errstate(all="ignore"):
            gain = np.where(values > 0, -np.expm1(-2 * t * values) / values, 2 * t)
        q = q.astype(x.dtype)
        flow = (start @ q) * decay.astype(x.dtype)
        flow += (pulled @ q) * gain.astype(x.dtype)
        made: np.ndarray = flow @ q.T
        return made if basis is None else made @ basis.T

    return of_matrices(x, shape, lambda_, merged, 0)
