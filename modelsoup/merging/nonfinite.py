"""NaN and infinity in what a merge reads and makes: where they are, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import counted, listed, patterns_option
from ..files.dtypes import count_nonfinite, has_nonfinite
from .jobs import Unit
from .plan import Made, Unmade


@dataclass(frozen=True)
class Nonfinite:
    """NaN or infinity in one tensor.

    Attributes:
        name: the tensor's name.
        where: an input, or `the result`.
        count: how many elements.
        allowed: whether it may be there: it was only copied, or the recipe says so.
        written: whether it is in what its merge makes, and not just in what that is made of.
    """

    name: str
    where: str
    count: int
    allowed: bool
    written: bool


def found_in(
    unit: Unit, inputs: Sequence[np.ndarray], result: np.ndarray | None
) -> list[Nonfinite]:  # fmt: skip
    """Where there is NaN or infinity in a unit.

    What is only copied may hold it, as a mask does, as long as the copy has no more of it.

    Args:
        unit: the unit.
        inputs: its sources' elements.
        result: what was made of them; None where it is the one input.
    """
    job, step = unit.job, unit.job.step
    is_copy, may = step.kind == "copy", job.plan.may_be_nonfinite
    faults = []
    copied: dict[str, int] = {}
    for source, array in zip(step.sources, inputs, strict=True):
        if isinstance(source, Made) and not is_copy and not source.may_be_nonfinite:
            continue  # refused where it was made
        counts = _by_tensor(unit, array, source.info.dtype)
        if is_copy:
            copied = counts
        if counts and (not is_copy or result is None):
            model = source.model
            given = f"the result of {model.node}" if isinstance(model, Unmade) else model.name
            where = f"{given}, {job.plan.name_of(model)}"
            faults += [
                Nonfinite(name, where, n, is_copy or name in may, is_copy)
                for name, n in counts.items()
            ]
    if result is not None:
        faults += [
            Nonfinite(name, job.result, n, n <= copied.get(name, 0) or name in may, True)
            for name, n in _by_tensor(unit, result, step.dtype).items()
        ]
    return list(dict.fromkeys(faults))  # a checkpoint may be given twice


def _by_tensor(unit: Unit, array: np.ndarray, dtype: str) -> dict[str, int]:
    """How many elements of each tensor of a unit are NaN or infinite, where any are."""
    if not has_nonfinite(array, dtype):
        return {}
    counts = ((name, count_nonfinite(part)) for name, part in _divided(unit, array))
    return {name: count for name, count in counts if count}


def _divided(unit: Unit, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A unit's elements, divided among the tensors that they belong to."""
    if not unit.job.parts:
        yield unit.job.step.name, array
        return
    start = 0
    for step in unit.job.parts:
        stop = start + step.elements
        first, last = max(start, unit.start), min(stop, unit.stop)
        if first < last:
            yield step.name, array[first - unit.start : last - unit.start]
        start = stop


def nonfinite_sentence(faults: Sequence[Nonfinite], hinted: Sequence[str] = ()) -> str:
    """Which tensors, where and how many elements, the first few by name.

    Args:
        faults: where.
        hinted: patterns of the tensors, to say how they may pass.
    """
    totals: dict[tuple[str, str], int] = {}
    for fault in faults:
        key = (fault.name, fault.where)
        totals[key] = totals.get(key, 0) + fault.count
    names = list(dict.fromkeys(name for name, _ in totals))
    said = [f"{name} ({count} in {where})" for (name, where), count in sorted(totals.items())]
    how = ""
    if hinted:
        how = f" ({patterns_option('allow_nonfinite', hinted)} lets them pass)"
    return f"NaN or infinity in {counted(len(names), 'tensor')}: {listed(said)}{how}"
