"""What is done with the result of another method: singular values calibrated, layers scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ...errors import ParameterError
from ..forms import (
    Block,
    Merging,
    PerModel,
    Rows,
    Tensor,
    WeightedSum,
    Whole,
    evaluated,
    of_block,
)
from ..reductions import Sum, Total
from .masks import summed
from .parameters import parameter
from .registry import Asking, build_parameters, get_method, method
from .spectral import EMBEDDINGS, difference, in_arrays, is_finite, matrix_shape, svd, svd_memory

Inner = Literal[
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
    "della", "della_linear", "sce", "ram", "ramplus_tl", "model_stock", "magmax", "consensus",
    "emr", "tsv_m", "iso_c", "iso_cts", "opcm",
]  # fmt: skip

_WEIGHT = parameter(1.0, doc="of the method `of`, where it has weights")
_DENSITY = parameter(1.0, low=0, high=1, doc="of the method `of`, where it has a density")
_LAMBDA = parameter(1.0, doc="of the method `of`")


def merged_by(
    x: Tensor, of: str, weight: PerModel, density: PerModel, lambda_: float
    ) -> Asking:  # fmt: skip
    """What another method does with a tensor.

    Raises:
        ParameterError: too few models, or a parameter that is not the default, and which that
            method does not have.
    """
    inner = get_method(of)
    if x.count < inner.models[0]:
        raise ParameterError(f"the method {of!r} merges at least {inner.models[0]} models")
    given = {"weight": weight, "density": density, "lambda": (lambda_,)}
    for name in given.keys() - inner.parameters.keys():
        if set(given.pop(name)) != {1.0}:
            raise ParameterError(f"the method {of!r} has no parameter {name!r}")
    return (yield from inner.ask(x, build_parameters(inner, given, x.count)))


@method(
    "svc",
    base=True,
    models=(1, None),
    matrices=True,
    purpose="after a merge",
    version="1",
    summary="another method's result, with singular values that count no direction twice",
    source="Singular value calibration, ICML 2026 (arXiv 2602.05536)",
)
def svc(
    x: Tensor,
    of: Inner = parameter("task_arithmetic", doc="the method whose result is calibrated"),
    alpha: float = parameter(
        0.1, low=0.001, high=1, doc="no singular value grows by more than 1/alpha"
    ),
    weight: PerModel = _WEIGHT,
    density: PerModel = _DENSITY,
    lambda_: float = _LAMBDA,
    embeddings: bool = EMBEDDINGS,
) -> Asking:
    """U·diag(γ·σ)·Vᵀ of a merged task vector M = U·diag(σ)·Vᵀ.

    γᵣ = T / Σᵢ max(alpha, ⟨aᵣ, aᵣᵢ⟩/‖aᵣᵢ‖²), with aᵣ and aᵣᵢ the rows of Uᵀ·M and Uᵀ·Dᵢ: what M
    and what each task vector make of direction r. Tensors that are no matrices are left as they
    were merged.
    """
    form = yield from merged_by(x, of, weight, density, lambda_)
    shape = matrix_shape(x, embeddings=embeddings)
    if shape is None:
        return form

    def whole(inputs: Sequence[np.ndarray]) -> np.ndarray:
        base, models = inputs[0], inputs[1:]
        merged = difference(evaluated(form, x, inputs), base)
        if not is_finite(merged):
            return np.full(x.shape, np.nan, x.dtype)
        u, s, vt = svd(merged)
        del merged
        response = s[:, None] * vt
        total = np.zeros(s.size)
        for model in models:
            own = u.T @ difference(model, base)
            length = np.einsum("rn,rn->r", own, own)
            along = np.einsum("rn,rn->r", response, own)
            total += np.maximum(alpha, np.divide(along, length, out=length, where=length > 0))
        u *= x.count / total
        made: np.ndarray = (u @ response).astype(x.dtype, copy=False)
        made += base
        return made

    inner = form.memory if isinstance(form, Whole) else 0
    return Whole(whole, max(inner, in_arrays(x, svd_memory(shape))))


@method(
    "lines",
    base=True,
    models=(1, None),
    layers=True,
    purpose="after a merge",
    version="1",
    summary="another method's result, the task vector scaled up from the first layer to the last",
    source="Wang et al., LiNeS, ICLR 2025 (arXiv 2410.17146)",
)
def lines(
    x: Tensor,
    shallow: float | None = parameter(
        None,
        doc="the scale of the first layer, and of what is in no layer; as LiNeS finds it for T "
        "task vectors: 1/T, times how much of the length of their sum the merge has lost",
    ),
    deep: float = parameter(1.0, doc="the scale of the last layer"),
    of: Literal[Inner, "svc"] = parameter(
        "task_arithmetic", doc="the method whose result is scaled"
    ),
    weight: PerModel = _WEIGHT,
    density: PerModel = _DENSITY,
    lambda_: float = _LAMBDA,
) -> Asking:
    """Base + s·(merged − base), with s = shallow + (deep − shallow)·ℓ/(L − 1) in layer ℓ of L.

    Without `shallow` it is (‖Σ dᵢ‖₁ / ‖merged − base‖₁) / T, both of the whole model.
    """
    form = yield from merged_by(x, of, weight, density, lambda_)
    if shallow is None:
        by_rows, whole = isinstance(form, Rows), isinstance(form, Whole)
        sizes = Sum(lambda b: _sizes(x, form, b), 2, rows=by_rows, whole=whole)
        ((of_sum, merged),) = yield [Total("sizes", sizes)]
        shallow = (of_sum / merged if merged else 1.0) / x.count
    index, count = x.layer or (0, 1)
    return scaled(form, shallow + (deep - shallow) * (index / (count - 1) if count > 1 else 0))


def _sizes(x: Tensor, form: Merging, b: Block) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of the sum of task vectors, and of what was merged."""
    merged = of_block(form, x, b) - b.base  # first, as it may take much memory on the way
    return np.abs(summed(map(b.task_vector, x.models))), np.abs(merged)


def scaled(form: Merging, scale: float) -> Merging:
    """Base + scale·(merged − base), for any form over inputs of which the first is the base."""
    if isinstance(form, WeightedSum):
        weights = [scale * c for c in form.coefficients]
        if not form.of_deltas:
            weights[0] += 1 - scale
        return WeightedSum(weights, form.of_deltas)
    if isinstance(form, Whole):
        function = form.function

        def whole(inputs: Sequence[np.ndarray]) -> np.ndarray:
            made = function(inputs)
            made -= inputs[0]
            made *= scale
            made += inputs[0]
            return made

        return Whole(whole, form.memory)
    of = form.function if isinstance(form, Rows) else form

    def merged(b: Block) -> np.ndarray:
        made: np.ndarray = b.base + scale * (of(b) - b.base)
        return made

    return Rows(merged) if isinstance(form, Rows) else merged
