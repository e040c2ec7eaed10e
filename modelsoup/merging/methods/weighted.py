"""Averages in which each model counts for as much as its data said it should.

What data say is given beside the models: for each a checkpoint with tensors of the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..forms import Block, Merging, Of, PerModel, Tensor, WeightedSum, Whole
from .averages import WEIGHT, over_their_sum
from .parameters import parameter
from .registry import Auxiliary, method
from .spectral import EMBEDDINGS, LAMBDA, Delta, in_arrays, is_finite, matrix_shape, of_matrices


@method(
    "fisher",
    models=(1, None),
    aux={"fisher": Auxiliary("the diagonal of the Fisher matrix, of each tensor's shape")},
    purpose="average",
    version="1",
    summary="each element weighted by how sure its model's data are of it",
    source="Matena and Raffel, Merging models with Fisher-weighted averaging, NeurIPS 2022",
)
def fisher(x: Tensor, weight: PerModel = WEIGHT) -> WeightedSum | Of:
    """Σ wᵢ·Fᵢ·xᵢ / Σ wᵢ·Fᵢ; where that divisor is zero, the mean weighted by w."""
    shares = over_their_sum(weight)
    if not x.aux:
        return WeightedSum(shares)

    def merged(b: Block) -> np.ndarray:
        of = [share * b.values[x.place("fisher", k)] for k, share in enumerate(shares)]
        divisor = sum(of[1:], start=of[0].copy())
        unsure = divisor == 0
        divisor += unsure
        total = np.zeros_like(divisor)
        for k, share in enumerate(shares):
            of[k] += unsure * b.values[0].dtype.type(share)
            total += of[k] / divisor * b.model(k)
        return total

    return merged


def _gram_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return (shape[1], shape[1]) if len(shape) == 2 else None


@method(
    "regmean",
    models=(1, None),
    matrices=True,
    aux={
        "gram": Auxiliary(
            "XᵀX of each weight's inputs X, in × in, by the weight's name", _gram_shape
        )
    },
    purpose="average",
    version="1",
    summary="linear layers whose outputs are nearest to all models' on the models' own data",
    source="Jin et al., Dataless knowledge fusion by merging weights, ICLR 2023",
)
def regmean(
    x: Tensor,
    scale: float = parameter(
        0.9,
        low=0,
        high=1,
        doc="what elements of a Gram matrix beside its diagonal are multiplied by",
    ),
) -> Merging:
    """(Σ Wᵢ·Gᵢ)·(Σ Gᵢ)⁻¹; the mean of tensors that have no Gram matrix.

    Written as W̄ + (Σ (Wᵢ − W̄)·Gᵢ)·(Σ Gᵢ)⁺, so that what no data tell of is the mean.
    """
    mean = (1 / x.count,) * x.count
    if not x.aux:
        return WeightedSum(mean)
    rows, columns = x.shape

    def whole(inputs: Sequence[np.ndarray]) -> np.ndarray:
        models = inputs[: x.count]
        if not all(is_finite(one) for one in inputs):
            return np.full(x.shape, np.nan, x.dtype)
        middle = np.zeros(x.shape)
        for model in models:
            middle += model
        middle /= x.count
        total, pulled = np.zeros((columns, columns)), np.zeros(x.shape)
        for k, model in enumerate(models):
            gram = inputs[x.place("gram", k)]
            _add(model - middle, _less_beside_the_diagonal(gram, scale), pulled, total)
        made: np.ndarray = middle + _over(pulled, total)
        return made.astype(x.dtype, copy=False)

    flat, square = rows * columns, columns**2
    wide = max(4 * flat + 2 * square, 2 * flat + 5 * square) / max(1, flat)
    return Whole(whole, in_arrays(x, wide))


def _less_beside_the_diagonal(gram: np.ndarray, scale: float) -> np.ndarray:
    made: np.ndarray = np.multiply(gram, scale, dtype=np.float64)
    np.fill_diagonal(made, np.diagonal(gram))
    return made


def _add(d: np.ndarray, gram: np.ndarray, pulled: np.ndarray, total: np.ndarray) -> None:
    total += gram
    pulled += d @ gram


def _over(pulled: np.ndarray, total: np.ndarray) -> np.ndarray:
    """R·C⁺ of a positive semi-definite C: nothing along directions that it does not have."""
    values, q = np.linalg.eigh(total)
    there = values > values.max(initial=0) * len(values) * np.finfo(values.dtype).eps
    made: np.ndarray = pulled @ q
    made *= np.divide(1, values, out=np.zeros_like(values), where=there)
    over: np.ndarray = made @ q.T
    return over


@method(
    "actmat",
    base=True,
    models=(1, None),
    matrices=True,
    purpose="matrices",
    version="1",
    summary="regmean without data: the Gram matrices are estimated from the task vectors",
    source="ACTMat, 2026 (arXiv 2604.01329), in its plain form",
)
def actmat(
    x: Tensor,
    lambda_: float = LAMBDA,
    embeddings: bool = EMBEDDINGS,
) -> Merging:
    """Base + λ·(Σ Dᵢ·Gᵢ)·(Σ Gᵢ)⁺ with Gᵢ = DᵢᵀDᵢ."""
    shape = matrix_shape(x, embeddings=embeddings)

    def merged(delta: Delta) -> np.ndarray:
        pulled = np.zeros_like(delta(0))
        total = np.zeros((pulled.shape[1], pulled.shape[1]))
        for k in x.models:
            d = delta(k)
            _add(d, d.T @ d, pulled, total)
            del d
        return _over(pulled, total)

    flat, square = (1, 1) if shape is None else (shape[0] * shape[1], shape[1] ** 2)
    wide = max(3 * flat + 2 * square, flat + 5 * square) / flat
    return of_matrices(x, shape, lambda_, merged, wide)
