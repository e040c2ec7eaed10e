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
from ...files.names import is_embedding
from ..forms import Block, Merging, Tensor, WeightedSum, Whole
from ..reductions import Sum, Total
from .parameters import parameter
from .registry import Asking, method

Conv = Literal["mean", "flatten"]
Delta = Callable[[int], np.ndarray]
"""A model's task vector as a matrix, made anew at each call."""

_HEAD = re.compile(
    r"(?:.*[._/])?(?:shared|lm_head|heads?|score|classifier|text_projection)(?:[._/].*)?"
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
    if not embeddings and is_table(x.name):
        return None
    return x.shape[0], x.elements // x.shape[0]


def is_table(name: str) -> bool:
    """Whether a tensor's name is that of an embedding or a head."""
    return is_embedding(name) or _HEAD.fullmatch(name) is not None


def mean_of_deltas(x: Tensor, lambda_: float) -> WeightedSum:
    """Base + λ/T·Σ dᵢ."""
    return WeightedSum((lambda_ / x.count,) * x.count, of_deltas=True)


def of_matrices(
    x: Tensor,
    shape: tuple[int, int] | None,
    lambda_: float,
    merged: Callable[[Delta], np.ndarray],
    wide: float,
) -> Merging:
    """Base + λ·(what is made of the matrices Dᵢ), or the mean where the tensor is no matrix.

    Args:
        x: the tensor.
        shape: of the matrices; None of what is none.
        lambda_: λ.
        merged: of the matrices, one of their shape; it is not asked where one is not finite, and
            the result is NaN there.
        wide: how many float64 arrays of the tensor's size it holds at once.
    """
    if shape is None:
        return mean_of_deltas(x, lambda_)

    def whole(inputs: Sequence[np.ndarray]) -> np.ndarray:
        base, models = inputs[0], inputs[1:]

        def delta(k: int) -> np.ndarray:
            return difference(models[k], base).reshape(shape)

        if not all(is_finite(delta(k)) for k in x.models):
            return np.full(x.shape, np.nan, x.dtype)  # no decomposition would end
        made = merged(delta)
        made *= lambda_
        made = made.reshape(x.shape).astype(x.dtype, copy=False)
        made += base
        return made

    return Whole(whole, in_arrays(x, wide))


def difference(model: np.ndarray, base: np.ndarray) -> np.ndarray:
    """A task vector in float64, in which numpy decomposes matrices whatever they are given in."""
    made: np.ndarray = np.subtract(model, base, dtype=np.float64)
    return made


def in_arrays(x: Tensor, wide: float) -> float:
    """Arrays of float64 counted as those of a tensor's own dtype."""
    return wide * 8 / x.dtype.itemsize


def is_finite(values: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity; without a mask of the values' size."""
    return math.isfinite(values.max()) and math.isfinite(values.min())


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, σ and Vᵀ with as many singular values as the shorter side has."""
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK is three times as quick the other way round
        vt, s, u = svd(matrix.T)
        return u.T, s, vt.T
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def svd_memory(shape: tuple[int, int]) -> float:
    """How many float64 arrays of a matrix's size it takes to decompose it, itself among them.

    That is numpy's copy, U and Vᵀ twice, and what LAPACK's gesdd works in: 3 or 4 squares.
    """
    short, long = min(shape), max(shape)
    square = short / long
    return 2 + 2 * (1 + square) + (4 if long >= 11 / 6 * short else 3) * square


def polar(matrix: np.ndarray) -> np.ndarray:
    """U·Vᵀ of a matrix, the nearest one with orthonormal rows or columns.

    Directions that it does not have are left out: those that a decomposition finds for them are
    arbitrary. So two models that are the same count as one.
    """
    u, s, vt = svd(matrix)
    u *= s > s.max(initial=0) * max(matrix.shape) * np.finfo(s.dtype).eps
    nearest: np.ndarray = u @ vt
    return nearest


class _Triplets:
    """Singular triplets of several matrices of one shape, joined."""

    def __init__(self, shape: tuple[int, int], count: int) -> None:
        self._u = np.empty((shape[0], count))
        self._s = np.empty(count)
        self._vt = np.empty((count, shape[1]))
        self._filled = 0

    def add(self, matrix: np.ndarray, count: int) -> np.ndarray:
        """Take in a matrix's strongest ones: its U."""
        u, s, vt = svd(matrix)
        place = slice(self._filled, self._filled + count)
        self._u[:, place], self._s[place], self._vt[place] = u[:, :count], s[:count], vt[:count]
        self._filled += count
        return self._u[:, place]

    def orthogonal(self, *, flat: bool) -> np.ndarray:
        """polar(U)·diag(σ)·polar(V), with all σ their mean where it is to be flat."""
        u = self._u = polar(self._u)
        u *= self._s.mean() if flat else self._s
        made: np.ndarray = u @ polar(self._vt)
        return made


def _triplets_memory(shape: tuple[int, int]) -> float:
    return svd_memory(shape) + 1 + min(shape) / max(shape)


@method(
    "tsv_m",
    base=True,
    models=(1, None),
    matrices=True,
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
        assert shape is not None
        triplets = _Triplets(shape, kept * x.count)
        for k in x.models:
            triplets.add(delta(k), kept)
        return triplets.orthogonal(flat=False)

    return of_matrices(x, shape, lambda_, merged, _triplets_memory(shape) if shape else 0)


@method(
    "iso_c",
    base=True,
    models=(1, None),
    matrices=True,
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

    return of_matrices(x, shape, lambda_, merged, svd_memory(shape) if shape else 0)


def _sum(delta: Delta, x: Tensor) -> np.ndarray:
    total = delta(0)
    for k in x.models[1:]:
        total += delta(k)
    return total


@method(
    "iso_cts",
    base=True,
    models=(1, None),
    matrices=True,
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
        assert shape is not None
        triplets = _Triplets(shape, rank)
        first = triplets.add(_sum(delta, x), shared)
        for k in x.models if each else ():
            residual = delta(k)
            residual -= first @ (first.T @ residual)
            triplets.add(residual, each)
        return triplets.orthogonal(flat=True)

    return of_matrices(x, shape, lambda_, merged, _triplets_memory(shape) if shape else 0)


@method(
    "wudi",
    base=True,
    models=(1, None),
    matrices=True,
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
    rows, columns = shape or (0, 1)
    by_rows = x.count * rows < columns  # all of them lie in a space that is smaller than theirs
    size = min(x.count * rows, columns)

    def merged(delta: Delta) -> np.ndarray:
        return _by_rows(delta, x, rows, t) if by_rows else _by_columns(delta, x, columns, t)

    square, flat = size**2, rows * columns
    memory = max(5 * square + rows * size, 3 * flat + square)
    if not by_rows:
        memory = max(2 * flat + 5 * square, 4 * flat + 2 * square)
    return of_matrices(x, shape, lambda_, merged, memory / max(1, flat))


def _by_columns(delta: Delta, x: Tensor, columns: int, t: float) -> np.ndarray:
    start = np.zeros_like(delta(0))
    pulled, inner = np.zeros_like(start), np.zeros((columns, columns))
    for k in x.models:
        _pull(delta(k), start, pulled, inner)
    q, decay, gain = _flow(inner, t)
    del inner
    flow: np.ndarray = start @ q
    del start
    flow *= decay
    more: np.ndarray = pulled @ q
    del pulled
    more *= gain
    flow += more
    del more
    made: np.ndarray = flow @ q.T
    return made


def _pull(d: np.ndarray, start: np.ndarray, pulled: np.ndarray, inner: np.ndarray) -> None:
    """Add what a task vector contributes to X₀, R and C."""
    start += d
    norm = _over_norm(d)
    gram = d.T @ d
    inner += gram
    gram *= norm
    pulled += d @ gram


def _by_rows(delta: Delta, x: Tensor, rows: int, t: float) -> np.ndarray:
    """The same, as C = AᵀA of the stacked Dᵢ/‖Dᵢ‖, and X₀ = E·A, R = B·A: A·f(AᵀA) = f(AAᵀ)·A."""
    places = [slice(k * rows, (k + 1) * rows) for k in x.models]
    outer = np.empty((x.count * rows, x.count * rows))
    norms = [_multiply(delta, k, outer, places) for k in x.models]
    own = [norm * outer[place, place] for norm, place in zip(norms, places, strict=True)]
    q, decay, gain = _flow(outer, t)
    del outer
    factors = np.zeros((rows, q.shape[0]))
    for norm, square, place in zip(norms, own, places, strict=True):
        factors += (norm * q[place]) * decay + (square @ q[place]) * gain
    factors = factors @ q.T
    del q
    made = np.zeros_like(delta(0))
    for k, place in enumerate(places):
        d = delta(k)
        _over_norm(d)
        made += factors[:, place] @ d
    return made


def _multiply(delta: Delta, k: int, outer: np.ndarray, places: Sequence[slice]) -> float:
    """Fill in one model's rows and columns of AAᵀ, up to its own; its norm."""
    d = delta(k)
    norm = _over_norm(d)
    for j, place in enumerate(places[: k + 1]):
        other = delta(j)
        _over_norm(other)
        outer[places[k], place] = d @ other.T
        outer[place, places[k]] = outer[places[k], place].T
    return norm


def _over_norm(d: np.ndarray) -> float:
    """Divide a matrix by its norm, which is given back; zero stays zero."""
    norm = float(np.linalg.norm(d))
    d /= norm or 1.0
    return norm


def _flow(matrix: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvectors, and of each eigenvalue c e^(−2tc) and (1 − e^(−2tc))/c."""
    values, q = np.linalg.eigh(matrix)
    values = np.maximum(values, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(values > 0, -np.expm1(-2 * t * values) / values, 2 * t)
    return q, np.exp(-2 * t * values), gain


@method(
    "opcm",
    base=True,
    models=(1, None),
    matrices=True,
    purpose="matrices",
    version="1",
    summary="task vectors one after the other, each without what touches the directions before it",
    source="Tang et al., Merging models on the fly without retraining, 2025 (arXiv 2501.09522)",
)
def opcm(
    x: Tensor,
    alpha: float = parameter(
        0.5, low=0, high=1, doc="the share of the singular values whose directions are closed"
    ),
    lambda_: float = LAMBDA,
    conv: Conv = CONV,
    embeddings: bool = EMBEDDINGS,
) -> Asking:
    """Base + λ·S·n/‖S‖ with S₁ = D₁ and Sₜ = Sₜ₋₁ + U·P·Vᵀ, the models in their order.

    P is Uᵀ·Dₜ·V of Sₜ₋₁ = U·diag(σ)·Vᵀ, zero on its diagonal and in its first q rows of the first q
    columns, of which the σ come to at most alpha of all. What is no matrix is summed up. n, the
    mean norm of the task vectors, and ‖S‖ are the whole model's. (The paper rescales after each
    model; as that changes no direction, once at the end is the same.)
    """
    shape = matrix_shape(x, conv, embeddings=embeddings)

    def merged(delta: Delta, base: np.ndarray) -> np.ndarray:
        # What a task vector lost when it was added to the base is noise in all directions.
        noise = x.count * np.finfo(x.dtype).eps * float(np.linalg.norm(base))
        total = delta(0)
        for k in x.models[1:]:
            total += _beside(delta, k, total, alpha, noise)
        return total

    def squares(b: Block) -> tuple[np.ndarray, ...]:
        def delta(k: int) -> np.ndarray:
            made = difference(b.model(k), b.base)
            return made if shape is None else made.reshape(shape)

        if shape is None:
            made = _sum(delta, x)
        elif all(is_finite(delta(k)) for k in x.models):
            made = merged(delta, b.base)
        else:
            made = np.full(1, np.nan)
        return (*(_square(delta(k)) for k in x.models), _square(made))

    of_tensor = Sum(squares, x.count + 1, whole=shape is not None)
    (sums,) = yield [Total("squares", of_tensor)]
    *own, length = np.sqrt(sums).tolist()
    lambda_ *= sum(own) / x.count / length if length else 1.0
    if shape is None:
        return WeightedSum((lambda_,) * x.count, of_deltas=True)
    memory = svd_memory(shape) if x.count > 1 else 1

    def whole(inputs: Sequence[np.ndarray]) -> np.ndarray:
        own = of_matrices(x, shape, lambda_, lambda delta: merged(delta, inputs[0]), memory)
        assert isinstance(own, Whole)
        return own.function(inputs)

    return Whole(whole, in_arrays(x, memory))


def _square(values: np.ndarray) -> np.ndarray:
    """The sum of squares."""
    return np.add.reduce(np.square(values), axis=None, keepdims=True)


def _beside(
    delta: Delta, k: int, total: np.ndarray, alpha: float, noise: float
    ) -> np.ndarray:  # fmt: skip
    """What a task vector adds to a sum: not along a direction of it, nor from a strong to a strong.

    Directions that the sum does not have, but for noise, are arbitrary, and close nothing.
    """
    u, s, vt = svd(total)
    u *= s > max(noise, s.max(initial=0) * max(total.shape) * np.finfo(s.dtype).eps)
    strong = int(np.count_nonzero(np.cumsum(s) <= alpha * s.sum()))
    d = delta(k)
    inner = u.T @ d
    along = np.einsum("rn,rn->r", inner, vt)
    closed = inner[:strong] @ vt[:strong].T
    del inner
    np.fill_diagonal(closed, 0)
    d -= u[:, :strong] @ (closed @ vt[:strong])
    u *= along
    d -= u @ vt
    return d
