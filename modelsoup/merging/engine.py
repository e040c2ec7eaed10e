"""The streaming engine: it carries out a `MergePlan` slice by slice into a writer.

Workers take slices of the output in file order. Each reads the inputs' slices into buffers that it
keeps, computes in blocks that fit the second-level cache, and writes the result to its place; while
one computes, another reads. A method that must know of whole tensors first gets passes of its own
over a group of tensors small enough to stay in the page cache.

No byte of the result depends on the number of workers or the size of a slice.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MismatchError, ParameterError, SoupError, counted, listed, option, said
from ..files.checkpoint import TensorInfo
from ..files.digest import FileDigest, FileReader
from ..files.dtypes import DTYPES, count_nonfinite, has_nonfinite, narrow, numpy_dtype, widen
from ..files.quantized import Quantizer, Scales, dequantize
from ..files.writer import CheckpointWriter, OutputFile
from .forms import (
    BLOCK,
    Block,
    Merging,
    Rows,
    WeightedSum,
    Whole,
    added_up,
    weighted_deltas,
    weighted_sum,
    weighted_sum_into,
)
from .hints import instead
from .lineage import Digests
from .methods.asking import Asked
from .plan import MergePlan, Step
from .reductions import PART, sampled
from .rules import BASE
from .sources import Computed, Stored, Values
from .unmade import Unmade, is_undecided

if TYPE_CHECKING:
    from .compiled import Loop

SLICE = 16 * BLOCK
"""Elements of the output that a worker takes at a time."""

# Elements; where nothing is counted per block, fewer and longer calls of numpy pay: two threads
# that ask for the interpreter at the same time wait for each other.
_ELEMENTWISE_BLOCK = 2 * BLOCK
_BUFFERS = 48 << 20  # bytes, all workers together
_LARGEST_TEMPORARY = 8 << 20  # bytes, above that of any block
_GROUP = 256 << 20  # input bytes between two passes over the same tensors
STATE = 32 << 20  # bytes of what is gathered in them, unless one tensor takes more
_SMALL = BLOCK // 4  # elements
_WORTH_LOOPS = 128 << 20  # elements in a merge; for fewer, numpy is done before a loop is loaded
MOST_WORKERS = 1024
"""To start many threads takes long, and each has buffers."""
_MAX_WORKERS = 8  # more do not read faster

Weights = namedtuple("Weights", ["weight"])  # noqa: PYI024  # which compiled loops can take

Progress = Callable[[int, int], None]
"""`progress(bytes, total)`: bytes read or written since the last call; all that are expected."""


def _keep_freed_memory() -> None:
    """Let malloc keep the memory of numpy's temporaries instead of returning it every time.

    Getting a block of a few hundred KB from the kernel and giving it back costs more than the
    arithmetic on it. glibc raises its thresholds for both to the largest block that was freed.
    """
    np.empty(_LARGEST_TEMPORARY, np.uint8)


def default_workers() -> int:
    """As many as there are cores for this process, at least 2 (to read while computing)."""
    return max(2, min(_MAX_WORKERS, usable_cores()))


def check_workers(workers: int | None) -> int:
    """A number of workers that was asked for, or what there is where none was.

    Raises:
        ParameterError: no integer, or more than any machine has use for.
    """
    if workers is None:
        return default_workers()
    if isinstance(workers, bool) or not isinstance(workers, int) or not 0 < workers <= MOST_WORKERS:
        raise ParameterError(
            f"workers is {said(workers)}, but must be an integer from 1 to {MOST_WORKERS:,}"
        )
    return workers


def usable_cores() -> int:
    """How many cores this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


@dataclass(frozen=True)
class Nonfinite:
    """NaN or infinity in one tensor.

    Attributes:
        name: the tensor's name.
        where: an input's file name, or `the result`.
        count: how many elements.
        allowed: whether it may be there: it was only copied, or the recipe says so.
        written: whether it is in the output, and not just in what that was made of.
    """

    name: str
    where: str
    count: int
    allowed: bool
    written: bool


class Inputs:
    """The open input files, each model's for itself: two models may be the same file.

    A model that is merged on the way has no file, but inputs of its own.
    """

    def __init__(self, plan: MergePlan, *, sha256: bool) -> None:
        self.plan = plan
        models = dict(enumerate(plan.models))
        if plan.base is not None:
            models[BASE] = plan.base
        models.update(enumerate(plan.beside, len(plan.models)))
        self.models = models
        self.below: dict[int, Inputs] = {}
        self._readers: dict[tuple[int, Path], FileReader] = {}
        try:
            for index, model in models.items():
                if isinstance(model, Unmade):
                    self.below[index] = Inputs(model.plan, sha256=sha256)
                for file in model.files:
                    self._readers[index, file] = FileReader(file, of=model, sha256=sha256)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise SoupError(f"cannot read {error.filename}: {error.strerror}") from error
            raise

    def reader(self, model: int, info: TensorInfo) -> FileReader:
        """What reads a tensor of an input."""
        return self._readers[model, info.file]

    @property
    def extra_bytes(self) -> int:
        own = sum(reader.extra_bytes for reader in self._readers.values())
        return own + sum(inputs.extra_bytes for inputs in self.below.values())

    def digests(self) -> Digests:
        """Finish the digests; what the merge had no use for is read now."""
        readers = list(self._readers.values())
        with ThreadPoolExecutor(default_workers()) as pool:
            finished = list(pool.map(FileReader.finish, readers))
        by_model: dict[int, list[FileDigest]] = {
            index: [] for index in self.models if index not in self.below
        }
        for (index, _), digest in zip(self._readers, finished, strict=True):
            by_model[index].append(digest)
        below = {index: inputs.digests() for index, inputs in self.below.items()}
        return {**by_model, **below}

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        for inputs in self.below.values():
            inputs.close()


class _Opened:
    """A source that is computed, with what computes it while its tensor is merged."""

    def __init__(self, source: Computed) -> None:
        self.source = source
        self.values: Values | None = None

    def take(self, start: int, stop: int) -> np.ndarray:
        """Elements, in the source's dtype."""
        assert self.values is not None
        with np.errstate(all="ignore"):
            made = self.values(start, stop)
        return np.ascontiguousarray(made, numpy_dtype(self.source.info.dtype))


@dataclass
class _Job:
    """One step with all that is needed to carry it out.

    `readers` has what is streamed from files, in the order of the sources. A source that is merged
    on the way has its own job in `made`, and its readers in the place of a reader; one that is
    computed has what computes it there, and no reader.
    """

    step: Step
    readers: list[tuple[FileReader, TensorInfo]]
    inputs: Inputs
    file_name: str = ""
    offset: int = 0
    made: tuple[_Job | _Opened | None, ...] = ()  # of sources that are not read; or none at all
    result: str = "the result"  # what errors call it
    parts: tuple[Step, ...] = ()  # the steps that were joined into `step`, if any were
    asked: Asked | None = None  # what the method is to know of it, under way
    form: Merging | None = None  # what is done with it
    scales: list[tuple[Scales, np.ndarray] | None] = field(default_factory=list)  # of the sources
    quantizer: Quantizer | None = None
    weights: Weights | None = None  # of a weighted sum
    is_gathered: bool = False  # something must be known of whole tensors before it is written
    loop: Loop | None = None
    loop_parameters: np.ndarray | None = None

    @cached_property
    def order(self) -> list[int]:
        """In which order the readers are asked: as their files were opened, and within a file.

        What all tensors have is opened first, so that a tensor that has less overtakes none.
        """
        readers = self.readers
        if len(readers) < 2:
            return list(range(len(readers)))
        places = [(reader.number, info.start) for reader, info in readers]
        return sorted(range(len(readers)), key=places.__getitem__)

    @property
    def is_whole(self) -> bool:
        return self.step.outline is not None and isinstance(self.step.outline.form, Whole)

    @property
    def deltas(self) -> list[int]:
        """The places of the sources that are task vectors."""
        return [
            k for k, source in enumerate(self.step.sources)
            if not isinstance(source, Stored) and source.is_delta
        ]  # fmt: skip

    def row(self, *, in_a_pass: bool) -> int:
        """How long the rows are that its blocks are made of; 0 where they are none."""
        x = self.step.tensor
        asks = self.asked is not None and self.asked.rows
        by_rows = asks if in_a_pass else isinstance(self.form, Rows)
        return max(1, x.row) if by_rows and x is not None else 0

    def block(self, *, in_a_pass: bool) -> int:
        """How many elements a block of it has."""
        if row := self.row(in_a_pass=in_a_pass):
            assert self.step.tensor is not None
            return row * self.step.tensor.rows_at_once
        by_number = in_a_pass or not (self.form is None or isinstance(self.form, WeightedSum))
        return BLOCK if by_number else _ELEMENTWISE_BLOCK


@dataclass(frozen=True, slots=True)
class _Unit:
    """A slice of one job: elements `start` to `stop`."""

    job: _Job
    start: int
    stop: int


Work = Callable[[_Unit, list[np.ndarray], "_Buffers"], None]
"""What is done with a unit, whose inputs' bytes were read."""


class _Buffers:
    """One worker's memory, grown to the largest slice that it met."""

    def __init__(self) -> None:
        self._raw: list[np.ndarray] = []
        self._wide: list[np.ndarray] = []
        self._below: list[_Buffers] = []

    def raw(self, index: int, nbytes: int) -> np.ndarray:
        """Bytes for slice `index`; 0 is the output."""
        return self._take(self._raw, index, nbytes, np.dtype(np.uint8))

    def wide(self, index: int, elements: int, dtype: np.dtype[Any]) -> np.ndarray:
        """A block of float32 or float64 for input `index`."""
        return self._take(self._wide, index, elements, dtype)

    def below(self, index: int) -> _Buffers:
        """Buffers for source `index`, which is merged on the way."""
        while len(self._below) <= index:
            self._below.append(_Buffers())
        return self._below[index]

    @staticmethod
    def _take(arrays: list[np.ndarray], index: int, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        while len(arrays) <= index:
            arrays.append(np.empty(0, dtype))
        if arrays[index].size < size or arrays[index].dtype != dtype:
            arrays[index] = np.empty(size, dtype)
        return arrays[index][:size]


class Stream:
    def __init__(
        self, plan: MergePlan, inputs: Inputs, workers: int, slice_elements: int,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.inputs = inputs
        self.workers = workers
        self.progress = progress
        self.nonfinite: list[Nonfinite] = []
        self.bytes_read = 0
        most = _most_buffers(plan)
        affordable = _BUFFERS // (workers * most * 4) // BLOCK * BLOCK
        self.slice_elements = max(BLOCK, min(slice_elements, affordable))
        self._total = plan.bytes_streamed
        elements = sum(step.elements for step in plan.steps)
        self._wants_loops = elements >= _WORTH_LOOPS or os.environ.get("MODELSOUP_FAST") == "1"
        self._places: dict[str, tuple[str, int]] = {}  # of tensors of scales
        self._order = threading.Lock()
        self._count = threading.Lock()
        self._stop = threading.Event()
        self._writer: CheckpointWriter | None = None
        self._buffers = [_Buffers() for _ in range(workers)]
        _keep_freed_memory()

    def run(self, writer: CheckpointWriter, files: Sequence[OutputFile]) -> None:
        """Write every tensor of the output."""
        self._writer = writer
        jobs = _joined(self._jobs(files))
        with ThreadPoolExecutor(self.workers) as pool:
            for group in _groups(jobs):
                for job in group:
                    self._open(job)
                    self._begin(job)
                while waiting := [j for j in group if j.asked and j.asked.needs_pass]:
                    self._all(pool, waiting, self._gather)
                    for job in waiting:
                        assert job.asked is not None
                        job.asked.end_pass()
                        self._sample(job)
                for job in group:
                    self._prepare(job)
                if quantized := [job for job in group if job.quantizer]:
                    self._all(pool, quantized, self._measure)
                    for job in quantized:
                        self._write_scales(job)
                self._all(pool, group, self._write)
                for job in group:  # its memory is wanted for the next group
                    job.asked = job.form = job.quantizer = None
                    job.scales.clear()
                    _close(job)

    def refused_nonfinite(self) -> list[Nonfinite]:
        """What must not be there."""
        return [fault for fault in self.nonfinite if not fault.allowed]

    def nonfinite_results(self) -> dict[str, int]:
        """How many elements of the output's tensors are NaN or infinite, where any are."""
        found: Counter[str] = Counter()
        for fault in self.nonfinite:
            if fault.written:
                found[fault.name] += fault.count
        return dict(sorted(found.items()))

    def _jobs(self, files: Sequence[OutputFile]) -> Iterator[_Job]:
        steps = {step.name: step for step in self.plan.steps}
        for file in files:
            offset = 0
            for tensor in file.tensors:
                step = steps[tensor.name]
                job = _job_of(step, self.inputs, file.name, offset)
                if step.kind == "scales":
                    self._places[step.name] = (file.name, offset)
                elif step.elements:
                    self._prepare_below(job)
                    yield job
                offset += tensor.nbytes

    def _prepare_below(self, job: _Job) -> None:
        """What is merged on the way waits for no statistic, and is wanted for those above it."""
        for below in job.made:
            if isinstance(below, _Job):
                self._prepare_below(below)
                self._prepare(below)

    def _open(self, job: _Job) -> None:
        """Read what sources that are computed must have at hand."""
        for opened in job.made:
            if isinstance(opened, _Job):
                self._open(opened)
            elif opened is not None:
                inputs = job.inputs

                def read(of: Stored, start: int, stop: int) -> np.ndarray:
                    return self._peek(inputs, of.model, of.info, start, stop)  # noqa: B023

                with np.errstate(all="ignore"):  # NaN and infinity are looked for in results
                    opened.values = opened.source.opened(read)

    def _peek(
        self, inputs: Inputs, model: int, info: TensorInfo, start: int, stop: int
    ) -> np.ndarray:
        """Elements of a stored tensor, outside of the order in which its file is streamed."""
        kind = numpy_dtype(info.dtype)
        stored = np.empty(stop - start, kind)
        inputs.reader(model, info).peek(
            stored.view(np.uint8).data, info.start + start * kind.itemsize
        )
        self._report(stored.nbytes, read=True)
        wide = np.empty(stop - start, np.float64 if info.dtype == "F64" else np.float32)
        widen(stored, wide)
        return wide

    def _begin(self, job: _Job) -> None:
        """Set up what is to be known of a job's tensors before they are merged."""
        step, method = job.step, job.step.method
        for source, scales in zip(step.sources, step.scales, strict=bool(step.scales)):
            found = None
            if scales is not None:
                found = scales, self._read_scales(job, source.model, scales)
            job.scales.append(found)
        if step.quantized is not None:
            job.quantizer = Quantizer(step.quantized, step.dtype)
        if method is not None and step.outline is not None and step.outline.rounds:
            assert step.tensor is not None and step.parameters is not None
            job.asked = Asked(method, step.tensor, step.parameters, step.outline)
            self._sample(job)

    def _sample(self, job: _Job) -> None:
        """Some elements of all parts of a tensor, where what is asked of it is sooner found so."""
        step, x = job.step, job.step.tensor
        if x is None or job.asked is None or not job.asked.wants_sample:
            return
        blocks = []
        for start in sampled(x):
            values = [
                self._peek(job.inputs, source.model, source.info, start, start + PART)
                for source in step.sources
            ]
            values = [one.astype(step.compute_dtype, copy=False) for one in values]
            blocks.append(Block(0, start, values, int(x.has_base)))
        with np.errstate(all="ignore"):
            job.asked.sample(blocks)

    def _read_scales(self, job: _Job, model: int, scales: Scales) -> np.ndarray:
        """A tensor's scales, flattened, in float32."""
        info = job.inputs.models[model].tensors[scales.name]
        stored = np.empty(info.elements, numpy_dtype(info.dtype))
        job.inputs.reader(model, info).peek(stored.view(np.uint8).data, info.start)
        self._report(info.nbytes, read=True)
        wide = np.empty(info.elements, np.float32)
        widen(stored, wide)
        return wide

    def _write_scales(self, job: _Job) -> None:
        """The scales of a result that was measured."""
        assert job.quantizer is not None and self._writer is not None
        stored = job.quantizer.finish().view(np.uint8)
        file_name, offset = self._places[job.quantizer.scales.name]
        self._writer.write(file_name, stored.data, offset)
        self._report(stored.nbytes, read=False)

    def _prepare(self, job: _Job) -> None:
        """Find what is done with the blocks of a job, now that all is known of its tensors."""
        step, dtype = job.step, job.step.compute_dtype
        if step.outline is None:
            return
        job.form = step.outline.form if job.asked is None else job.asked.merging
        if not isinstance(job.form, WeightedSum):
            return
        job.weights = Weights(tuple(dtype.type(c) for c in job.form.coefficients))
        may_be_compiled = dtype == np.float32 and not any(step.scales) and step.quantized is None
        if self._wants_loops and may_be_compiled and not job.made:
            from .compiled import loop_for, parameter_array  # not for small merges

            stored = tuple(source.info.dtype for source in step.sources)
            function = weighted_deltas if job.form.of_deltas else weighted_sum
            job.loop = loop_for(function, stored, step.dtype, job.weights)
            job.loop_parameters = parameter_array(job.weights)

    def _units(self, jobs: Iterable[_Job], work: Work) -> Iterator[_Unit]:
        for job in jobs:
            size = job.step.elements
            length = self._slice_of(job, in_a_pass=work == self._gather)
            for start in range(0, size, length):
                yield _Unit(job, start, min(size, start + length))

    def _slice_of(self, job: _Job, *, in_a_pass: bool) -> int:
        """How many elements a worker takes at a time: whole blocks."""
        if job.is_whole and not in_a_pass:
            return job.step.elements
        length = job.block(in_a_pass=in_a_pass)
        return max(1, self.slice_elements // length) * length

    def _all(self, pool: ThreadPoolExecutor, jobs: Sequence[_Job], work: Work) -> None:
        """Have every worker do units until there are none; the first error ends all.

        Over small tensors, which take longer to fetch than to merge, several workers would only
        wait for each other's turn at the interpreter; and each would hold a whole tensor's memory.
        """
        average = sum(job.step.elements for job in jobs) // len(jobs)
        several = average >= _SMALL and not any(job.is_whole for job in jobs)
        workers = self._buffers if several else self._buffers[:1]
        units = self._units(jobs, work)
        futures = [pool.submit(self._drain, units, work, own) for own in workers]
        try:
            for future in futures:
                future.result()
        except BaseException:
            self._stop.set()
            raise

    def _drain(self, units: Iterator[_Unit], work: Work, buffers: _Buffers) -> None:
        try:
            while (fetched := self._fetch(units, buffers)) is not None:
                unit, stored = fetched
                if unit.job.made:
                    stored = self._made_on_the_way(unit, iter(stored), buffers)
                work(unit, stored, buffers)
        except BaseException:
            self._stop.set()
            raise

    def _fetch(
        self, units: Iterator[_Unit], buffers: _Buffers
    ) -> tuple[_Unit, list[np.ndarray]] | None:
        """The next unit and its inputs' bytes.

        A lock is released only once the next file's is held, so that every file is read in the
        units' order, which its digest needs, while several files are read at the same time. Slices
        may take files in any order and a file twice; locks are taken in one order, each once.
        """
        held = self._order
        held.acquire()
        try:
            unit = None if self._stop.is_set() else next(units, None)
            if unit is None:
                return None
            stored, total = [np.empty(0)] * len(unit.job.readers), 0
            for index in unit.job.order:
                reader, info = unit.job.readers[index]
                bits = DTYPES[info.dtype].bits
                start, stop = unit.start * bits // 8, -(-unit.stop * bits // 8)
                if info.nbytes != -(-unit.job.step.elements * bits // 8):  # read as a whole
                    start, stop = 0, info.nbytes
                buffer = buffers.raw(index + 1, stop - start)
                if reader.lock is not held:
                    reader.lock.acquire()
                    held.release()
                    held = reader.lock
                reader.read(buffer.data, info.start + start)
                stored[index] = buffer
                total += buffer.nbytes
        finally:
            held.release()
        self._report(total, read=True)
        return unit, stored

    def _made_on_the_way(
        self, unit: _Unit, stored: Iterator[np.ndarray], buffers: _Buffers
    ) -> list[np.ndarray]:
        """A unit's sources, as they would be stored, from what was read of their own sources."""
        sources = []
        for index, job in enumerate(unit.job.made):
            if job is None:
                sources.append(next(stored))
                continue
            if isinstance(job, _Opened):
                sources.append(job.take(unit.start, unit.stop).view(np.uint8))
                continue
            inner, own = _Unit(job, unit.start, unit.stop), buffers.below(index)
            if job.made:
                parts = self._made_on_the_way(inner, stored, own)
            else:
                parts = [next(stored) for _ in job.readers]
            sources.append(self._made(inner, parts, own))
        return sources

    def _report(self, nbytes: int, *, read: bool) -> None:
        if read:
            with self._count:
                self.bytes_read += nbytes
        if self.progress is not None:
            self.progress(nbytes, self._total)

    def _blocks(
        self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers, dtype: np.dtype[Any], *,
        in_a_pass: bool = False,
    ) -> Iterator[tuple[slice, Block]]:  # fmt: skip
        """Each block of a unit, with its place in the unit."""
        job, arrays = unit.job, _typed(unit.job, stored)
        length, row = job.block(in_a_pass=in_a_pass), job.row(in_a_pass=in_a_pass)
        has_base = job.step.tensor is not None and job.step.tensor.has_base
        adds_up = isinstance(job.form, WeightedSum) and job.form.of_deltas  # and asks for no model
        for start in range(unit.start, unit.stop, length):
            place = slice(start - unit.start, min(start + length, unit.stop) - unit.start)
            x = []
            for index, array in enumerate(arrays):
                if array.dtype == dtype:
                    x.append(array[place])
                    continue
                wide = buffers.wide(index, place.stop - place.start, dtype)
                widen(array[place], wide)
                if job.scales and (scales := job.scales[index]) is not None:
                    dequantize(wide, start, *scales)
                x.append(wide)
            deltas = {k: x[k] for k in job.deltas}
            if in_a_pass or not adds_up:
                for k, delta in deltas.items():
                    x[k] = x[0] + delta
            if row:
                x = [values.reshape(-1, row) for values in x]
                deltas = {k: delta.reshape(-1, row) for k, delta in deltas.items()}
            yield place, Block(start // length, start, x, int(has_base), deltas)

    def _gather(self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers) -> None:
        """One slice of a pass over whole tensors."""
        asked = unit.job.asked
        assert asked is not None
        # Widened once, from what is stored, for products that are summed in float64.
        dtype = np.dtype(np.float64) if asked.wide else unit.job.step.compute_dtype
        with np.errstate(all="ignore"):
            for _, block in self._blocks(unit, stored, buffers, dtype, in_a_pass=True):
                asked.add(block)

    def _write(self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers) -> None:
        """Compute one slice of the output, and write it."""
        job, result = unit.job, self._made(unit, stored, buffers)
        offset = job.offset + unit.start * DTYPES[job.step.dtype].bits // 8
        assert self._writer is not None
        self._writer.write(job.file_name, result.data, offset)
        self._report(result.nbytes, read=False)

    def _made(self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers) -> np.ndarray:
        """The bytes of a slice of a result, which was searched for NaN and infinity."""
        step = unit.job.step
        if step.kind == "integer":
            return _resolve_integers(step, stored, buffers)
        if _is_copy(step):
            if DTYPES[step.dtype].kind == "float":
                self._look(unit, _typed(unit.job, stored), None)
            return stored[0]
        return self._compute(unit, stored, buffers)

    def _measure(self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers) -> None:
        """Look at one slice of a result that is to be quantised."""
        assert unit.job.quantizer is not None
        with np.errstate(all="ignore"):
            for place, made in self._merged(unit, stored, buffers, None):
                unit.job.quantizer.measure(made, unit.start + place.start)

    def _compute(self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers) -> np.ndarray:
        job, elements = unit.job, unit.stop - unit.start
        kind = numpy_dtype(job.step.dtype)
        result = buffers.raw(0, elements * kind.itemsize)
        if job.loop is not None:
            assert job.loop_parameters is not None
            addresses = [array.ctypes.data for array in stored]
            if job.loop(addresses, result.ctypes.data, elements, job.loop_parameters):
                return result
        out = result.view(kind)
        plainly = isinstance(job.form, WeightedSum) and not job.form.of_deltas
        target = out if plainly and kind == job.step.compute_dtype else None
        with np.errstate(all="ignore"):
            for place, made in self._merged(unit, stored, buffers, target):
                if job.quantizer is not None:
                    narrow(job.quantizer.quantize(made, unit.start + place.start), out[place])
                elif target is None:
                    narrow(made, out[place])
        # In a weighted sum NaN and infinity in any input show in the result.
        shows = job.form is None or isinstance(job.form, WeightedSum)
        if not shows or has_nonfinite(out, job.step.dtype):
            self._look(unit, _typed(job, stored), out)
        return result

    def _merged(
        self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers, target: np.ndarray | None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The values of a slice of a result, block by block: the place in the slice, the values.

        They are valid until the next block; in `target`, where one is given.
        """
        job, dtype = unit.job, unit.job.step.compute_dtype
        form, weights = job.form, job.weights
        if isinstance(form, Whole):
            yield slice(0, unit.stop - unit.start), self._whole(job, form, stored)
            return
        own = [numpy_dtype(source.info.dtype) != dtype for source in job.step.sources]
        for place, b in self._blocks(unit, stored, buffers, dtype):
            x = b.values
            if form is None:  # stored as another dtype
                yield place, x[0]
            elif not isinstance(form, WeightedSum):
                made = np.asarray(form.function(b) if isinstance(form, Rows) else form(b))
                if made.shape != x[0].shape:
                    raise ParameterError(
                        f"the method {job.step.method and job.step.method.name!r} returned an "
                        f"array of shape {list(made.shape)} for {list(x[0].shape)} elements"
                    )
                yield place, made.reshape(-1)
            elif form.of_deltas and job.deltas:
                assert weights is not None
                yield place, added_up(b, weights.weight)
            elif form.of_deltas:
                yield place, weighted_deltas(x, weights)
            else:
                made = x[0] if own[0] else np.empty_like(x[0])
                made = made if target is None else target[place]
                weighted_sum_into(x, weights, made, own)
                yield place, made

    def _whole(self, job: _Job, form: Whole, stored: list[np.ndarray]) -> np.ndarray:
        step = job.step
        assert step.method is not None
        x = []
        for k, (source, array) in enumerate(zip(step.sources, _typed(job, stored), strict=True)):
            wide = np.empty(array.size, step.compute_dtype)
            widen(array, wide)
            if job.scales and (scales := job.scales[k]) is not None:
                dequantize(wide, 0, *scales)
            x.append(wide.reshape(source.info.shape))
        for k in job.deltas:
            x[k] += x[0]
        made = np.asarray(form.function(tuple(x)))
        if made.shape != step.shape:
            raise ParameterError(
                f"the method {step.method.name!r} made {step.name} with the shape "
                f"{list(made.shape)}, not {list(step.shape)}"
            )
        return made.reshape(-1).astype(step.compute_dtype, copy=False)

    def _look(self, unit: _Unit, inputs: Sequence[np.ndarray], result: np.ndarray | None) -> None:
        """Note where there is NaN or infinity.

        What is only copied may hold it, as a mask does, as long as the copy has no more of it.
        """
        job, step = unit.job, unit.job.step
        is_copy, may = step.kind == "copy", job.inputs.plan.may_be_nonfinite
        outermost = job.inputs is self.inputs
        faults = []
        copied: dict[str, int] = {}
        for source, array in zip(step.sources, inputs, strict=True):
            model, info = source.model, source.info
            if model in job.inputs.below:  # looked at when it was made
                continue
            where = f"{job.inputs.models[model].name}, {job.inputs.plan.name_of(model)}"
            counts = _nonfinite_by_tensor(unit, array, info.dtype)
            if is_copy:
                copied = counts
            if not is_copy or result is None:
                faults += [
                    Nonfinite(name, where, n, is_copy or name in may, is_copy and outermost)
                    for name, n in counts.items()
                ]
        if result is not None:
            faults += [
                Nonfinite(name, job.result, n, n <= copied.get(name, 0) or name in may, outermost)
                for name, n in _nonfinite_by_tensor(unit, result, step.dtype).items()
            ]
        if faults:
            with self._count:
                self.nonfinite += faults

    def compare_integers(self) -> None:
        """Read integer tensors first: where they differ, nothing must be written.

        Raises:
            MismatchError: they differ, and nothing says what to take.
        """
        differing = [
            step for step in self.plan.steps
            if step.elements and is_undecided(step) and self._differs(step)
        ]  # fmt: skip
        if differing:
            names = [step.name for step in differing]
            plan = self.plan
            are = "is no float differs" if len(names) == 1 else "are no floats differ"
            raise MismatchError(
                f"{counted(len(names), 'tensor')} that {are} "
                f"between the models: {listed([f'{s.name} ({s.dtype})' for s in differing])} "
                f"({option('on_integer', 'first')} or max says what to take, or keep them with "
                f"{instead(plan.recipe, plan.assignment, names, 'first', 'drop')})"
            )

    def _differs(self, step: Step) -> bool:
        nbytes = step.sources[0].info.nbytes
        for start in range(0, nbytes, SLICE):
            stored = []
            for index, source in enumerate(step.sources):
                model, info = source.model, source.info
                buffer = self._buffers[0].raw(index, min(SLICE, nbytes - start))
                self.inputs.reader(model, info).peek(buffer.data, info.start + start)
                self.bytes_read += buffer.nbytes
                stored.append(buffer)
            if any(not np.array_equal(stored[0], other) for other in stored[1:]):
                return True
        return False


def _job_of(step: Step, inputs: Inputs, file_name: str = "", offset: int = 0) -> _Job:
    readers: list[tuple[FileReader, TensorInfo]] = []
    made: list[_Job | _Opened | None] = []
    for source in step.sources:
        model, info = source.model, source.info
        inner = inputs.models[model]
        if isinstance(inner, Unmade):
            job = _job_of(inner.steps[info.name], inputs.below[model])
            job.result = f"the result of {inner.node}"
            readers += job.readers
            made.append(job)
        elif isinstance(source, Stored):
            readers.append((inputs.reader(model, info), info))
            made.append(None)
        else:
            made.append(_Opened(source))
    found = tuple(made) if any(made) else ()
    job = _Job(step, readers, inputs, file_name, offset, found)
    asks = step.outline is not None and bool(step.outline.rounds)
    job.is_gathered = asks or step.quantized is not None or any(step.scales)
    return job


def _most_buffers(plan: MergePlan) -> int:
    """How many slices a worker holds at most: results, and what they are made of."""
    most = max(len(step.sources) for step in plan.steps)
    models = [*plan.models, *([] if plan.base is None else [plan.base])]
    return 1 + most + sum(_most_buffers(m.plan) for m in models if isinstance(m, Unmade))


def _nonfinite_by_tensor(unit: _Unit, array: np.ndarray, dtype: str) -> dict[str, int]:
    """How many elements of each tensor of a unit are NaN or infinite, where any are."""
    if not has_nonfinite(array, dtype):
        return {}
    counts = ((name, count_nonfinite(part)) for name, part in _by_tensor(unit, array))
    return {name: count for name, count in counts if count}


def _by_tensor(unit: _Unit, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
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


def _is_copy(step: Step) -> bool:
    """Whether a step's bytes are its source's."""
    return step.kind == "copy" and step.sources[0].info.dtype == step.dtype


def _is_opaque(step: Step) -> bool:
    return DTYPES[step.dtype].kind == "opaque"


def _typed(job: _Job, stored: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [
        array.view(numpy_dtype(source.info.dtype))
        for source, array in zip(job.step.sources, stored, strict=True)
    ]


def _resolve_integers(step: Step, stored: list[np.ndarray], buffers: _Buffers) -> np.ndarray:
    """Equal ones, or what the policy takes."""
    if step.policy != "max" or _is_opaque(step):
        return stored[0]
    kind = numpy_dtype(step.dtype)
    result = buffers.raw(0, stored[0].nbytes)
    np.copyto(result, stored[0])
    for other in stored[1:]:
        np.maximum(result.view(kind), other.view(kind), out=result.view(kind))
    return result


def _joined(jobs: Iterable[_Job]) -> list[_Job]:
    """Jobs with neighbours that are made in the same way, and lie side by side, made one.

    Thousands of small tensors then cost a few reads and writes, not thousands.
    """
    joined: list[_Job] = []
    run: list[_Job] = []
    for job in jobs:
        if run and not _continues(run[-1], job):
            joined.append(_one_of(run))
            run = []
        run.append(job)
    if run:
        joined.append(_one_of(run))
    return joined


def _continues(job: _Job, following: _Job) -> bool:
    step, other = job.step, following.step
    return (
        not job.made
        and not following.made
        and not job.is_gathered
        and not following.is_gathered
        and step.kind != "integer"
        and (step.kind, step.dtype) == (other.kind, other.dtype)
        and _do_alike(step, other)
        and job.file_name == following.file_name
        and len(job.readers) == len(following.readers)
        and all(
            a_reader is b_reader and a.dtype == b.dtype and a.stop == b.start
            for (a_reader, a), (b_reader, b) in zip(job.readers, following.readers, strict=True)
        )
    )


def _do_alike(step: Step, other: Step) -> bool:
    """Whether the same is done with two tensors, whatever they are called: a weighted sum."""
    if step.outline is None or other.outline is None:
        return step.outline is other.outline
    form = step.outline.form
    return isinstance(form, WeightedSum) and form == other.outline.form


def _close(job: _Job) -> None:
    """Give back what sources that are computed have at hand."""
    for opened in job.made:
        if isinstance(opened, _Job):
            _close(opened)
        elif opened is not None:
            opened.values = None


def _one_of(run: list[_Job]) -> _Job:
    if len(run) == 1:
        return run[0]
    first, steps = run[0], tuple(job.step for job in run)
    sources = tuple(
        Stored(s.model, s.info._replace(nbytes=run[-1].readers[k][1].stop - s.info.start))
        for k, s in enumerate(first.step.sources)
    )
    step = first.step._replace(shape=(sum(s.elements for s in steps),), sources=sources)
    readers = [(r, s.info) for (r, _), s in zip(first.readers, sources, strict=True)]
    return _Job(step, readers, first.inputs, first.file_name, first.offset, parts=steps)


def _groups(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Jobs that go through their passes together; those with one pass need no division."""
    group: list[_Job] = []
    filled = state = 0
    for job in jobs:
        nbytes = sum(info.nbytes for _, info in job.readers) if job.is_gathered else 0
        held = job.step.state_bytes
        if group and (filled + nbytes > _GROUP or state + held > STATE):
            yield group
            group, filled, state = [], 0, 0
        group.append(job)
        filled += nbytes
        state += held
    if group:
        yield group
