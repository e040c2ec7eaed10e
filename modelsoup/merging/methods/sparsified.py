"""Task vectors thinned in other ways than TIES and DARE thin them: Breadcrumbs and DELLA.

Names, parameters and defaults are mergekit's. Equal magnitudes are in the order of their indices,
so that exactly as many are kept as is said; what is drawn at random does not depend on how a merge
is carried out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...errors import ParameterError
from ..forms import Block, Of, PerModel, Rows, Tensor
from ..kept import Kept, drawn, random_key, uniform
from ..thresholds import Ranked
from .parameters import parameter
from .registry import Asking, method
from .task_vectors import (
    LAMBDA,
    OVER_AGREEING,
    OVER_SUM,
    RESCALE,
    WEIGHT,
    Thinning,
    agreed,
    folded,
    rescaled,
    summed,
    zero,
)

_ROUNDING = 1e-9  # of two shares that are written as 0.7 and 0.3

_DENSITY = parameter(1.0, low=0, high=1, doc="the share of each task vector that is kept; 1 is all")
_GAMMA = parameter(0.01, low=0, high=1, doc="the share of each that is dropped as the largest")
_PROBABLE = parameter(
    1.0, low=0, high=1, doc="the mean probability that an element is kept; 1 keeps all"
)
_EPSILON = parameter(
    0.15, low=0, high=1, doc="a row's smallest is kept with density − ε, the largest with + ε"
)


@method(
    "breadcrumbs",
    base=True,
    models=(1, None),
    normalizes="normalize",
    purpose="task vectors",
    version="1",
    summary="task arithmetic without the largest and the smallest elements of task vectors",
    source="Davari and Belilovsky, Model breadcrumbs, ECCV 2024; as in mergekit",
)
def breadcrumbs(
    x: Tensor,
    weight: PerModel = WEIGHT,
    density: PerModel = _DENSITY,
    gamma: PerModel = _GAMMA,
    normalize: bool = parameter(False, doc=OVER_SUM),
    rescale: bool = parameter(False, doc=RESCALE),
    lambda_: float = LAMBDA,
) -> Asking:
    """Base + λ·Σ wᵢ·dᵢ over task vectors dᵢ without outliers."""
    thin = yield from without_outliers("breadcrumbs", x, density, gamma, rescale=rescale)
    return summed(thin, folded(weight, lambda_, normalize=normalize))


@method(
    "breadcrumbs_ties",
    base=True,
    models=(1, None),
    purpose="task vectors",
    version="1",
    summary="TIES' sign election on task vectors without their largest and smallest elements",
    source="Davari and Belilovsky, ECCV 2024; Yadav et al., NeurIPS 2023; as in mergekit",
)
def breadcrumbs_ties(
    x: Tensor,
    weight: PerModel = WEIGHT,
    density: PerModel = _DENSITY,
    gamma: PerModel = _GAMMA,
    normalize: bool = parameter(False, doc=OVER_AGREEING),
    rescale: bool = parameter(False, doc=RESCALE),
    lambda_: float = LAMBDA,
) -> Asking:
    """Base + λ·Σ wᵢ·dᵢ (/ Σ wᵢ under normalize) over those without outliers that agree in sign."""
    thin = yield from without_outliers("breadcrumbs_ties", x, density, gamma, rescale=rescale)
    return agreed(thin, weight, lambda_, normalize=normalize)


def without_outliers(
    name: str, x: Tensor, density: PerModel, gamma: PerModel, *, rescale: bool
) -> Thinning:
    """Task vectors without the largest ⌊γ·n⌋ elements, and of the rest the largest ⌊density·n⌋."""
    for d, g in zip(density, gamma, strict=True):
        if d < 1 and d + g > 1 + _ROUNDING:
            raise ParameterError(
                f"parameter 'density' of {name!r} is {d:g} and 'gamma' {g:g}: more than 1 together "
                f"(density 1 keeps all, whatever gamma is)"
            )
    kept = [math.floor(d * x.elements) for d in density]
    above = [
        min(math.floor(g * x.elements), x.elements - n) for g, n in zip(gamma, kept, strict=True)
    ]
    of: list[Of] = [x.delta(k) if n else zero for k, n in enumerate(kept)]
    thinned = [k for k, n in enumerate(kept) if 0 < n < x.elements]
    counts = [tuple(n for n in (above[k] + kept[k], above[k]) if n) for k in thinned]
    found = yield [Ranked(x.delta(k), n) for k, n in zip(thinned, counts, strict=True)]
    for k, (largest, *outliers) in zip(thinned, found, strict=True):
        of[k] = Kept(x.delta(k), _Between(largest, outliers[0])) if outliers else largest
    return (yield from rescaled(of)) if rescale else of


@dataclass(frozen=True)
class _Between:
    """Those that are among the largest and not among the very largest; a `keeps` of `Kept`."""

    largest: Kept
    above: Kept

    def __call__(self, b: Block, values: np.ndarray) -> np.ndarray:
        keep: np.ndarray = self.largest.keeps(b, values) & ~self.above.keeps(b, values)
        return keep


@method(
    "della_linear",
    base=True,
    models=(1, None),
    normalizes="normalize",
    purpose="task vectors",
    version="1",
    summary="task arithmetic on task vectors thinned at random, small elements the more",
    source="Deep et al., DELLA-Merging, 2024; as in mergekit",
)
def della_linear(
    x: Tensor,
    weight: PerModel = WEIGHT,
    density: PerModel = _PROBABLE,
    epsilon: PerModel = _EPSILON,
    normalize: bool = parameter(False, doc=OVER_SUM),
    rescale: bool = parameter(True, doc=RESCALE),
    lambda_: float = LAMBDA,
) -> Asking:
    """Base + λ·Σ wᵢ·dᵢ over task vectors dᵢ thinned by the ranks in their rows."""
    thin = yield from dropped_by_rank("della_linear", x, density, epsilon, rescale=rescale)
    return by_rows(summed(thin, folded(weight, lambda_, normalize=normalize)), density)


@method(
    "della",
    base=True,
    models=(1, None),
    purpose="task vectors",
    version="1",
    summary="TIES' sign election on task vectors thinned at random, small elements the more",
    source="Deep et al., DELLA-Merging, 2024; Yadav et al., NeurIPS 2023; as in mergekit",
)
def della(
    x: Tensor,
    weight: PerModel = WEIGHT,
    density: PerModel = _PROBABLE,
    epsilon: PerModel = _EPSILON,
    normalize: bool = parameter(True, doc=OVER_AGREEING),
    rescale: bool = parameter(True, doc=RESCALE),
    lambda_: float = LAMBDA,
) -> Asking:
    """Base + λ·Σ wᵢ·dᵢ (/ Σ wᵢ under normalize) over those thinned by rank that agree in sign."""
    thin = yield from dropped_by_rank("della", x, density, epsilon, rescale=rescale)
    return by_rows(agreed(thin, weight, lambda_, normalize=normalize), density)


def by_rows(of: Of, density: PerModel) -> Rows | Of:
    """What is done by rows where a task vector is thinned, and with any block where none is."""
    return Rows(of) if min(density) < 1 else of


def dropped_by_rank(
    name: str, x: Tensor, density: PerModel, epsilon: PerModel, *, rescale: bool
) -> Thinning:
    """Task vectors of which elements are kept at random, by their magnitudes' ranks in a row.

    The probability goes in a straight line from density − ε for a row's smallest to density + ε for
    its largest.
    """
    of: list[Of] = []
    for k, (d, e) in enumerate(zip(density, epsilon, strict=True)):
        if d < 1 and not 0 < d - e <= d + e < 1:
            raise ParameterError(
                f"parameter 'density' of {name!r} is {d:g} and 'epsilon' {e:g}: the probabilities "
                f"from {d - e:g} to {d + e:g} are not between 0 and 1 (density 1 keeps all)"
            )
        if d < 1 and (e == 0 or x.row == 1):
            of.append(drawn(x, k, x.delta(k), d))
        else:
            keeps = _DrawnByRank(random_key(x, k), d, e)
            of.append(Kept(x.delta(k), keeps, is_drawn=True) if d < 1 else x.delta(k))
    return (yield from rescaled(of, rows=min(density) < 1)) if rescale else of


@dataclass(frozen=True)
class _DrawnByRank:
    """Each element of a row with the probability of its rank; a `keeps` of `Kept`.

    What is drawn for an element says which rank would just be kept or just not, and the element is
    compared with the magnitude of that rank. So no ranks need be known, and equal magnitudes have
    the mean of their ranks' probabilities.
    """

    key: int
    density: float
    epsilon: float

    def __call__(self, b: Block, values: np.ndarray) -> np.ndarray:
        row = values.shape[-1]
        numbers = uniform(self.key, b.start, values.size)
        slope = (row - 1) / (2 * self.epsilon)
        wanted = numbers * (slope * 2.0**-32)
        wanted += 0.5 - slope * (self.density - self.epsilon)
        keep: np.ndarray = wanted < 0  # as any rank would be
        some = np.flatnonzero((wanted >= 0) & (wanted < row))  # they wait for their rank
        wanted = wanted[some]
        rank = np.floor(wanted)
        magnitudes = np.abs(values)
        at_rank = np.sort(magnitudes, axis=-1).reshape(-1)[some // row * row + rank.astype(np.intp)]
        own = magnitudes.reshape(-1)[some]
        # Half of the time an element of that very rank is kept.
        keep[some] = (own > at_rank) | ((own == at_rank) & (wanted - rank < 0.5))
        return keep.reshape(values.shape)
