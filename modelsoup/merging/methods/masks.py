"""Merges that choose elements: where task vectors agree, and which of them each one follows.

Consensus and EMR also give a single expert back, out of what the merge of all of them keeps: with
`expert` n the n-th one's reconstruction is made, and not the merge.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...errors import ParameterError, counted
from ..forms import Block, Of, PerModel, Tensor
from ..kept import either
from ..reductions import Sum, Total
from .parameters import parameter
from .registry import Asking, method
from .spectral import LAMBDA

_EXPERT = parameter(0, low=0, doc="0 is the merge; n is the n-th model as the merge can rebuild it")


def _check_expert(x: Tensor, expert: int) -> None:
    if expert > x.count:
        raise ParameterError(
            f"expert is {expert}, but there {'is' if x.count == 1 else 'are'} "
            f"{counted(x.count, 'model')}"
        )


@method(
    "magmax",
    base=True,
    models=(1, None),
    purpose="task vectors",
    version="1",
    summary="of each element, the task vector in which it is largest",
    source="Marczak et al., MagMax, ECCV 2024 (arXiv 2407.06322)",
)
def magmax(
    x: Tensor,
    lambda_: float = parameter(
        1.0, doc="what the merged task vector is multiplied by (0.5 in the paper)"
    ),
) -> Of:
    """Base + λ·(the dᵢ of the largest |dᵢ|, the later one of equals)."""

    def merged(b: Block) -> np.ndarray:
        largest = b.delta(0)
        for k in x.models[1:]:
            delta = b.delta(k)
            largest = either(np.abs(delta) >= np.abs(largest), delta, largest)
        made: np.ndarray = b.base + lambda_ * largest
        return made

    return merged


@method(
    "consensus",
    base=True,
    models=(1, None),
    purpose="experts",
    version="1",
    summary="the sum of task vectors, where enough of them matter; or one expert of it",
    source="Wang et al., Localizing task information, ICML 2024 (arXiv 2405.07813)",
)
def consensus(
    x: Tensor,
    k: int = parameter(2, low=0, doc="how many task vectors an element must matter to"),
    threshold: PerModel = parameter(
        0.6, low=0, doc="how large an element must be, by all that the others add to it"
    ),
    lambda_: float = LAMBDA,
    expert: int = _EXPERT,
) -> Of:
    """Base + λ·S·[Σ mᵢ ≥ k], with S = Σ dᵢ and the TALL masks mᵢ = |dᵢ| > thresholdᵢ·|S − dᵢ|.

    The expert n is base + λ·S·mₙ; k = 0 is task arithmetic with weights of 1.
    """
    _check_expert(x, expert)

    def merged(b: Block) -> np.ndarray:
        deltas = [b.delta(i) for i in x.models]
        total = summed(deltas)
        if expert:
            kept = matters(total, deltas[expert - 1], threshold[expert - 1])
        else:
            counts = np.zeros(total.shape, np.int32)
            for delta, limit in zip(deltas, threshold, strict=True):
                counts += matters(total, delta, limit)
            kept = counts >= k
        total *= kept
        made: np.ndarray = b.base + lambda_ * total
        return made

    return merged


def summed(deltas: Iterable[np.ndarray]) -> np.ndarray:
    """The sum of task vectors, a new array."""
    each = iter(deltas)
    total = next(each).copy()
    for delta in each:
        total += delta
    return total


def matters(total: np.ndarray, delta: np.ndarray, limit: float) -> np.ndarray:
    """Whether each element of a task vector is large beside what the others add to it."""
    mask: np.ndarray = np.abs(delta) > limit * np.abs(total - delta)
    return mask


@method(
    "emr",
    base=True,
    models=(1, None),
    purpose="experts",
    version="2",
    summary="one vector of elected signs and largest magnitudes; or one expert of it",
    source="Huang et al., EMR-merging, NeurIPS 2024 (arXiv 2405.17461)",
)
def emr(x: Tensor, lambda_: float = LAMBDA, expert: int = _EXPERT) -> Asking:
    """Base + λ·u: the sign of Σ dᵢ (− for zero), and the largest |dᵢ| that has it.

    The expert n is base + λ·cₙ·u where dₙ has the elected sign, 0 elsewhere, with cₙ such that the
    whole model's L1 norm is that of dₙ. (The paper's code also has a mean over the tensors' own.)
    """
    _check_expert(x, expert)

    if not expert:
        return lambda b: b.base + lambda_ * unified(x, b)

    def own(b: Block) -> np.ndarray:
        values = unified(x, b)
        values *= agrees(b, expert - 1, values)
        return values

    def norms(b: Block) -> tuple[np.ndarray, np.ndarray]:
        return np.abs(b.delta(expert - 1)), np.abs(own(b))

    ((wanted, there),) = yield [Total("norms", Sum(norms, 2))]
    scale = lambda_ * (wanted / there if there else 1.0)
    return lambda b: b.base + scale * own(b)


def unified(x: Tensor, b: Block) -> np.ndarray:
    """The sign of the sum of task vectors, − for zero, and the largest magnitude that has it."""
    total = summed(map(b.delta, x.models))
    sign = (total > 0).astype(total.dtype)
    sign *= 2
    sign -= 1
    largest = np.zeros_like(total)
    for k in x.models:
        np.maximum(largest, sign * b.delta(k), out=largest)
    largest *= sign
    return largest


def agrees(b: Block, k: int, elected: np.ndarray) -> np.ndarray:
    """Where a model's task vector has the elected sign."""
    mask: np.ndarray = (b.delta(k) * elected) > 0
    return mask
