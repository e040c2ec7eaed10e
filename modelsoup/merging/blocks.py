"""A slice of a result, computed from the same slice of its sources, block by block."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ..errors import ParameterError
from ..files.dtypes import DTYPES, has_nonfinite, numpy_dtype, round_into, widen
from ..files.quantized import dequantize
from .forms import (
    Block,
    Rows,
    WeightedSum,
    Whole,
    added_up,
    weighted_deltas,
    weighted_sum,
)
from .jobs import Job, Opened, Unit
from .plan import Step

Look = Callable[[Unit, Sequence[np.ndarray], "np.ndarray | None"], None]
"""Looks for NaN and infinity in a unit: in its sources' elements, and what was made of them."""


class Buffers(dict[Hashable, np.ndarray]):
    """One worker's memory: arrays by what they are for, grown to the largest that was needed."""

    def take(self, key: Hashable, size: int, dtype: Any = np.uint8) -> np.ndarray:
        """An array with anything in it."""
        found = self.get(key)
        if found is None or found.size < size or found.dtype != dtype:
            found = self[key] = np.empty(size, dtype)
        return found[:size]


def sources_of(
    unit: Unit, streamed: Iterator[np.ndarray], buffers: Buffers, look: Look
) -> list[np.ndarray]:
    """The bytes of a unit's sources, as they would be stored, from what was read for them."""
    job = unit.job
    if not job.below:
        return list(islice(streamed, len(job.streamed)))
    found = []
    for below in job.below:
        if below is None:
            found.append(next(streamed))
        elif isinstance(below, Opened):
            found.append(below.take(unit.start, unit.stop).view(np.uint8))
        else:
            inner = Unit(below, unit.start, unit.stop)
            found.append(made(inner, sources_of(inner, streamed, buffers, look), buffers, look))
    return found


def made(unit: Unit, stored: list[np.ndarray], buffers: Buffers, look: Look) -> np.ndarray:
    """The bytes of a slice of a result, which was searched for NaN and infinity."""
    step = unit.job.step
    if step.kind == "integer":
        return _resolved(unit, stored, buffers)
    if step.kind == "copy" and step.sources[0].info.dtype == step.dtype:
        if DTYPES[step.dtype].kind == "float":
            look(unit, _typed(step, stored), None)
        return stored[0]
    return _computed(unit, stored, buffers, look)


def _typed(step: Step, stored: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [
        array.view(numpy_dtype(source.info.dtype))
        for source, array in zip(step.sources, stored, strict=True)
    ]


def _resolved(unit: Unit, stored: list[np.ndarray], buffers: Buffers) -> np.ndarray:
    """Integers: equal ones, or what the policy takes."""
    step = unit.job.step
    if step.policy != "max" or DTYPES[step.dtype].kind == "opaque":
        return stored[0]
    kind = numpy_dtype(step.dtype)
    result = buffers.take((unit.job.place, "result"), stored[0].nbytes)
    np.copyto(result, stored[0])
    for other in stored[1:]:
        np.maximum(result.view(kind), other.view(kind), out=result.view(kind))
    return result


def _computed(unit: Unit, stored: list[np.ndarray], buffers: Buffers, look: Look) -> np.ndarray:
    job, elements = unit.job, unit.stop - unit.start
    kind = numpy_dtype(job.step.dtype)
    result = buffers.take((job.place, "result"), elements * kind.itemsize)
    if job.loop is not None:
        assert job.loop_parameters is not None
        addresses = [array.ctypes.data for array in stored]
        if job.loop(addresses, result.ctypes.data, elements, job.loop_parameters):
            return result
    out = result.view(kind)
    plainly = isinstance(job.form, WeightedSum) and not job.form.of_deltas
    target = out if plainly and kind == job.step.compute_dtype else None
    with np.errstate(all="ignore"):
        for place, values in merged(unit, stored, buffers, target):
            if job.quantizer is not None:
                round_into(job.quantizer.quantize(values, unit.start + place.start), out[place])
            elif target is None:
                round_into(values, out[place])
    # In a weighted sum NaN and infinity in any input show in the result.
    shows = job.form is None or isinstance(job.form, WeightedSum)
    if not shows or has_nonfinite(out, job.step.dtype):
        look(unit, _typed(job.step, stored), out)
    return result


def merged(
    unit: Unit, stored: list[np.ndarray], buffers: Buffers, target: np.ndarray | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """The values of a slice of a result, block by block: the place in the slice, the values.

    They are valid until the next block; in `target`, where one is given.
    """
    job, step, form = unit.job, unit.job.step, unit.job.form
    dtype = step.compute_dtype
    if isinstance(form, Whole):
        yield slice(0, unit.stop - unit.start), _whole(job, form, stored)
        return
    if isinstance(form, WeightedSum) and not form.of_deltas and not job.deltas:
        yield from _summed(unit, stored, buffers, target)
        return
    for place, b in blocks(unit, stored, buffers, dtype):
        x = b.values
        if form is None:  # stored as another dtype
            yield place, x[0]
        elif not isinstance(form, WeightedSum):
            values = np.asarray(form.function(b) if isinstance(form, Rows) else form(b))
            if values.shape != x[0].shape:
                raise ParameterError(
                    f"the method {step.method and step.method.name!r} returned an array of shape "
                    f"{list(values.shape)} for {list(x[0].shape)} elements"
                )
            yield place, values.reshape(-1)
        elif form.of_deltas and job.deltas:
            yield place, added_up(b, job.weights.weight)
        elif form.of_deltas:
            yield place, weighted_deltas(x, job.weights)
        else:
            yield place, weighted_sum(x, job.weights)


def _summed(
    unit: Unit, stored: list[np.ndarray], buffers: Buffers, target: np.ndarray | None
) -> Iterator[tuple[slice, np.ndarray]]:
    """As `merged`, for a weighted sum: one source after the other is widened, and added.

    So a sum of fifty models needs no more of the cache than one of two.
    """
    job, arrays = unit.job, _typed(unit.job.step, stored)
    dtype = job.step.compute_dtype
    for start, place in _places(unit, job.block(in_a_pass=False)):
        size = place.stop - place.start
        total = buffers.take((job.place, "sum"), size, dtype) if target is None else target[place]
        part = buffers.take((job.place, "part"), size, dtype)
        for index, (weight, array) in enumerate(zip(job.weights.weight, arrays, strict=True)):
            own = part if index else total
            np.multiply(weight, _wide(job, index, array[place], start, own), out=own)
            if index:
                np.add(total, part, out=total)
        yield place, total


def _places(unit: Unit, length: int) -> Iterator[tuple[int, slice]]:
    """Where each block of a unit begins in its tensor, and its place in the unit."""
    for start in range(unit.start, unit.stop, length):
        yield start, slice(start - unit.start, min(start + length, unit.stop) - unit.start)


def _wide(job: Job, index: int, array: np.ndarray, start: int, out: np.ndarray) -> np.ndarray:
    """A source's elements from `start` on, in the dtype of `out`: themselves, or widened there.

    As `widen`, where numpy is told already to ignore signalling NaN.
    """
    if array.dtype == out.dtype:
        return array
    np.copyto(out, array)
    if job.scales and (scales := job.scales[index]) is not None:
        dequantize(out, start, *scales)
    return out


def whole_block(job: Job, stored: list[np.ndarray]) -> Block:
    """All of a job's tensor as one block, the sources in its shape."""
    step, x = job.step, []
    for k, (source, array) in enumerate(zip(step.sources, _typed(step, stored), strict=True)):
        wide = np.empty(array.size, step.compute_dtype)
        widen(array, wide)
        if job.scales and (scales := job.scales[k]) is not None:
            dequantize(wide, 0, *scales)
        x.append(wide.reshape(source.info.shape))
    for k in job.deltas:
        x[k] += x[0]
    has_base = step.tensor is not None and step.tensor.has_base
    return Block(0, 0, x, int(has_base))


def _whole(job: Job, form: Whole, stored: list[np.ndarray]) -> np.ndarray:
    step = job.step
    assert step.method is not None
    values = np.asarray(form.function(tuple(whole_block(job, stored).values)))
    if values.shape != step.shape:
        raise ParameterError(
            f"the method {step.method.name!r} made {step.name} with the shape "
            f"{list(values.shape)}, not {list(step.shape)}"
        )
    return values.reshape(-1).astype(step.compute_dtype, copy=False)


def blocks(
    unit: Unit, stored: list[np.ndarray], buffers: Buffers, dtype: np.dtype[Any] | None, *,
    in_a_pass: bool = False,
) -> Iterator[tuple[slice, Block]]:  # fmt: skip
    """Each block of a unit, with its place in the unit; without a dtype as it is stored."""
    job, arrays = unit.job, _typed(unit.job.step, stored)
    length, row = job.block(in_a_pass=in_a_pass), job.row(in_a_pass=in_a_pass)
    has_base = job.step.tensor is not None and job.step.tensor.has_base
    form, are_deltas = job.form, job.deltas
    adds_up = isinstance(form, WeightedSum) and form.of_deltas  # and asks for no model
    for start, place in _places(unit, length):
        x = []
        for index, array in enumerate(arrays):
            if dtype is None or array.dtype == dtype:
                x.append(array[place])
            else:
                wide = buffers.take((job.place, index), place.stop - place.start, dtype)
                x.append(_wide(job, index, array[place], start, wide))
        deltas = {k: x[k] for k in are_deltas}
        if in_a_pass or not adds_up:
            for k, delta in deltas.items():
                x[k] = x[0] + delta
        if row:
            x = [values.reshape(-1, row) for values in x]
            deltas = {k: delta.reshape(-1, row) for k, delta in deltas.items()}
        yield place, Block(start // length, start, x, int(has_base), deltas)
