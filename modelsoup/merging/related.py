"""Whether models look as if they came from one start, by a few values of each.

Networks that were trained apart from different starts have weights at right angles to each other,
nearly, and whatever is merged of them is none of both; fine-tunings of one start point the same way
even where they went far. Headers cannot tell, so a bounded sample of values is read, outside of
what a merge reads, counts and takes digests of. What was measured is in docs/merging.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import counted
from ..files.checkpoint import Checkpoint
from ..files.dtypes import numpy_dtype
from .plan import MergePlan, Notice, Step
from .sources import Stored

UNRELATED = 0.25
"""The cosine of weights: nets trained apart are below it, those of one start above."""

_LEAST = 1 << 10  # elements of a tensor that is looked at, and with two axes: gains are all alike
_FEWEST = 3  # tensors of which the middle one says something
_TENSORS = 16  # at most, of each model
_MODELS = 16  # at most
_PART = 1 << 13  # elements of each tensor, from its middle


@dataclass(frozen=True)
class Likeness:
    """How alike two models of a merge are.

    Attributes:
        first: the base, or the first model.
        second: another one.
        cosines: of the weights, of each tensor that was looked at.
    """

    first: Checkpoint
    second: Checkpoint
    cosines: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The cosine that half of the tensors do not reach."""
        # Not numpy's median, at which numpy imports masked arrays: a tenth of the start of a merge.
        ordered, half = sorted(self.cosines), len(self.cosines) // 2
        return (ordered[half] + ordered[~half]) / 2


def unrelated(
    plan: MergePlan, models: Sequence[Checkpoint] | None = None, base: Checkpoint | None = None
    ) -> list[Notice]:  # fmt: skip
    """What to say of a merge's models that look unrelated; see `likenesses`."""
    return [
        Notice(
            "unrelated",
            f"{found.first.name} and {found.second.name} look unrelated: of "
            f"{counted(len(found.cosines), 'tensor')} that were looked at half have a cosine of "
            f"{found.middle:.2f} or less, and what comes from one start has {UNRELATED:g} or more; "
            f"a merge of others is likely to be good for nothing (merge what was tuned from one "
            f"start; soup diff shows each tensor)",
            (),
        )
        for found in likenesses(plan, models, base)
        if found.middle < UNRELATED
    ]


def likenesses(
    plan: MergePlan, models: Sequence[Checkpoint] | None = None, base: Checkpoint | None = None
    ) -> list[Likeness]:  # fmt: skip
    """How alike models are to the base of their merge, or else to the first one.

    Of each at most 128 Ki elements are read. Nothing is said of models with fewer than three large
    tensors, of adapters, codes, results that are not written yet, or layers put beside others.

    Args:
        plan: the merge.
        models: what to read in the place of its models, where these have no values.
        base: likewise in the place of its base.

    Raises:
        CheckpointError: a file cannot be read.
    """
    planned = [*plan.models, *([] if plan.base is None else [plan.base])]
    opened = planned if models is None else [*models, *([] if base is None else [base])]
    readable = {id(one): other for one, other in zip(planned, opened, strict=True) if other.files}
    seen: dict[tuple[int, int], list[tuple[Stored, Stored]]] = {}
    for step in plan.steps:
        if len(step.shape) < 2 or step.elements < _LEAST:  # of which there may be 100,000
            continue
        for one, other in _pairs(step, moved=bool(plan.recipe.slices)):
            key = id(one.model), id(other.model)
            if readable.keys() >= {*key}:
                seen.setdefault(key, []).append((one, other))
    found = []
    for key, pairs in _spread(list(seen.items()), _MODELS - 1):
        first, second = (readable[model] for model in key)
        cosines = [
            _cosine(_sample(first, a), _sample(second, b)) for a, b in _spread(pairs, _TENSORS)
        ]
        known = tuple(cosine for cosine in cosines if not math.isnan(cosine))
        if len(known) >= _FEWEST:
            found.append(Likeness(first, second, known))
    return found


def _pairs(step: Step, *, moved: bool) -> list[tuple[Stored, Stored]]:
    """What is compared in a tensor's merge: each model's with the base's, or with the first's.

    Args:
        step: the merge of the tensor.
        moved: whether layers are stacked anew, so that it may be of several layers.
    """
    x = step.tensor
    if step.kind != "merge" or x is None or any(step.scales):
        return []
    first, *others = step.sources[: x.has_base + x.count]
    return [
        (first, other)
        for other in others
        if isinstance(first, Stored) and isinstance(other, Stored)
        and first.model is not other.model
        and not (moved and first.info.name != other.info.name)
    ]  # fmt: skip


def _spread(several: list[Any], count: int) -> list[Any]:
    """At most so many of them, from all over."""
    step = max(1, -(-len(several) // count))
    return several[::step]


def _sample(model: Checkpoint, source: Stored) -> np.ndarray:
    info = model.tensors[source.info.name]
    kind, count = numpy_dtype(info.dtype), min(_PART, info.elements)
    stored = np.empty(count, kind)
    with model.reading(info) as read:
        read(stored.view(np.uint8).data, (info.elements - count) // 2 * kind.itemsize)
    return stored.astype(np.float64)


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    """NaN where one has nothing but zeros, or holds NaN."""
    with np.errstate(all="ignore"):
        norms = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
        return float(x @ y) / norms if norms else math.nan
