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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import MismatchError, counted, listed, option
from ..files.dtypes import DTYPES
from ..files.quantized import Quantizer
from ..files.writer import CheckpointWriter, OutputFile
from .blocks import Buffers, blocks, made, merged, sources_of, whole_block
from .forms import BLOCK, Block, WeightedSum, weighted_deltas, weighted_sum
from .hints import instead
from .inputs import Inputs
from .jobs import (
    Job,
    Opened,
    Unit,
    groups,
    jobs_of,
    joined,
    most_slices,
    placed,
    read_together,
)
from .methods.asking import Asked
from .nonfinite import Nonfinite, found_in
from .plan import MergePlan, Step
from .reductions import total_of
from .sources import Stored
from .thresholds import PART, sampled

SLICE = 16 * BLOCK
"""Elements of the output that a worker takes at a time."""

_BUFFERS = 48 << 20  # bytes, all workers together
_LARGEST_TEMPORARY = 8 << 20  # bytes, above that of any block
_SMALL = BLOCK // 4  # elements
_WORTH_LOOPS = 256 << 20  # elements of all inputs; for fewer, numpy is done before a loop is loaded

Progress = Callable[[int, int], None]
"""`progress(bytes, total)`: bytes read or written since the last call; all that are expected."""

Work = Callable[[Unit, list[np.ndarray], Buffers], None]
"""What is done with a unit, of which the bytes of its sources are there."""


def _keep_freed_memory() -> None:
    """Let malloc keep the memory of numpy's temporaries instead of returning it every time.

    Getting a block of a few hundred KB from the kernel and giving it back costs more than the
    arithmetic on it. glibc raises its thresholds for both to the largest block that was freed.
    """
    np.empty(_LARGEST_TEMPORARY, np.uint8)


class Stream:
    """One merge under way.

    Args:
        plan: what is to be done.
        inputs: the open files of all that it reads.
        workers: threads.
        slice_elements: a multiple of `BLOCK`; less is taken where buffers would grow too large.
        progress: told of every read and write.
    """

    def __init__(
        self, plan: MergePlan, inputs: Inputs, workers: int, slice_elements: int,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.inputs = inputs
        self.workers = workers
        self.progress = progress
        self.nonfinite: list[Nonfinite] = []
        self._made_nonfinite: dict[int, dict[tuple[str, int], int]] = {}  # by plan, where it begins
        self.bytes_read = 0
        affordable = _BUFFERS // (workers * most_slices(plan) * 4) // BLOCK * BLOCK
        self.slice_elements = max(BLOCK, min(slice_elements, affordable))
        self._total = plan.bytes_streamed
        elements = sum(step.elements * len(step.sources) for step in plan.steps)
        self._wants_loops = elements >= _WORTH_LOOPS or os.environ.get("MODELSOUP_FAST") == "1"
        self._places: dict[str, tuple[str, int]] = {}  # of tensors of scales
        self._totals: dict[int, dict[str, Any]] = {}  # of each rule's tensors, by their names
        self._order = threading.Lock()
        self._count = threading.Lock()
        self._stop = threading.Event()
        self._writer: CheckpointWriter | None = None
        self._buffers = [Buffers() for _ in range(workers)]
        _keep_freed_memory()

    def run(self, writer: CheckpointWriter, files: Sequence[OutputFile]) -> None:
        """Write every tensor of the output."""
        self._writer = writer
        scales = {step.name for step in self.plan.steps if step.kind == "scales"}
        self._places = {t.name: (f, start) for t, f, start in placed(files) if t.name in scales}
        with ThreadPoolExecutor(self.workers) as pool:
            self._find_totals(files, pool)
            for group in groups(joined(jobs_of(self.plan, self.inputs, files))):
                self._carry_out(group, pool)

    def refused_nonfinite(self) -> list[Nonfinite]:
        """What must not be there."""
        return [fault for fault in self.nonfinite if not fault.allowed]

    def nonfinite_results(self, plan: MergePlan) -> dict[str, int]:
        """How many elements of what a merge makes are NaN or infinite, by tensor, where any are."""
        found: Counter[str] = Counter()
        for (name, _), count in self._made_nonfinite.get(id(plan), {}).items():
            found[name] += count
        return dict(sorted(found.items()))

    def _find_totals(self, files: Sequence[OutputFile], pool: ThreadPoolExecutor) -> None:
        """What methods ask of all tensors that a rule merges, before one of them is written.

        What a tensor's own reductions told on the way there is forgotten, and gathered again.
        """
        steps = self.plan.steps
        rounds = {s.name: s.outline.totals for s in steps if s.outline and s.outline.rounds}
        for known in range(max(rounds.values(), default=0)):
            jobs = jobs_of(self.plan, self.inputs, files)
            waiting = (job for job in jobs if rounds.get(job.step.name, 0) > known)
            found: dict[tuple[int, str], list[Any]] = {}
            for group in groups(waiting):
                self._learn(group, pool)
                for job in group:
                    assert job.asked is not None
                    for name, value in job.asked.adds.items():
                        found.setdefault((job.step.rule, name), []).append(value)
                group.clear()
            for (rule, name), values in found.items():
                self._totals.setdefault(rule, {})[name] = total_of(values)

    def _learn(self, group: Sequence[Job], pool: ThreadPoolExecutor) -> None:
        """Gather what methods ask of tensors before they are merged."""
        for job in group:
            self._open(job)
            self._begin(job)
        while waiting := [job for job in group if job.asked and job.asked.needs_pass]:
            self._all(pool, waiting, self._gather)
            for job in waiting:
                assert job.asked is not None
                with np.errstate(all="ignore"):
                    job.asked.end_pass()
                self._sample(job)

    def _carry_out(self, group: list[Job], pool: ThreadPoolExecutor) -> None:
        self._learn(group, pool)
        for job in group:
            self._find_loop(job)
        if quantized := [job for job in group if job.quantizer]:
            self._all(pool, quantized, self._measure)
            for job in quantized:
                self._write_scales(job)
        self._all(pool, group, self._write)
        group.clear()  # the memory of what was gathered is wanted for the next one

    def _open(self, job: Job) -> None:
        """Read what sources that are computed must have at hand; prepare those that are made."""
        for below in job.below:
            if isinstance(below, Opened):
                below.open(self._peek)
            elif below is not None:
                self._open(below)
                self._find_loop(below)

    def _peek(self, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Elements of a stored tensor, outside of the order in which its file is streamed."""
        found = self.inputs.peek(stored, start, stop)
        self._report((stop - start) * DTYPES[stored.info.dtype].bits // 8, read=True)
        return found

    def _begin(self, job: Job) -> None:
        """Set up what is to be known of a job's tensors before they are merged."""
        step, method = job.step, job.step.method
        for source, scales in zip(step.sources, step.scales, strict=bool(step.scales)):
            found = None
            if scales is not None:
                info = source.model.tensors[scales.name]
                values = self._peek(Stored(source.model, info), 0, info.elements)
                found = scales, values.astype(np.float32, copy=False)
            job.scales.append(found)
        if step.quantized is not None:
            job.quantizer = Quantizer(step.quantized, step.dtype)
        if method is not None and step.outline is not None and step.outline.rounds:
            assert step.tensor is not None and step.parameters is not None
            stored = self._wants_loops and not job.below and not any(step.scales)
            kinds = tuple(source.info.dtype for source in step.sources) if stored else ()
            known = self._totals.get(step.rule, {})
            job.asked = Asked(
                method, step.tensor, step.parameters, step.outline, kinds, totals=known
            )
            self._sample(job)

    def _sample(self, job: Job) -> None:
        """Some elements of all parts of a tensor, where what is asked of it is sooner found so."""
        step, x = job.step, job.step.tensor
        if x is None or job.asked is None or not job.asked.wants_sample:
            return
        parts = []
        for start in sampled(x):
            values = [self._peek(stored, start, start + PART) for stored in step.streamed]
            values = [one.astype(step.compute_dtype, copy=False) for one in values]
            parts.append(Block(0, start, values, int(x.has_base)))
        with np.errstate(all="ignore"):
            job.asked.sample(parts)

    def _find_loop(self, job: Job) -> None:
        """The compiled loop of a job, now that it is known what is done with it."""
        step, form = job.step, job.form
        plain = step.quantized is None and not any(step.scales) and not job.below
        if not self._wants_loops or not plain or step.compute_dtype != np.float32:
            return
        if isinstance(form, WeightedSum):
            from .compiled import loop_for, parameter_array  # not for small merges

            stored = tuple(source.info.dtype for source in step.sources)
            function = weighted_deltas if form.of_deltas else weighted_sum
            job.loop = loop_for(function, stored, step.dtype, job.weights)
            job.loop_parameters = parameter_array(job.weights)

    def _write_scales(self, job: Job) -> None:
        """The scales of a result that was measured."""
        assert job.quantizer is not None and self._writer is not None
        stored = job.quantizer.finish().view(np.uint8)
        file_name, offset = self._places[job.quantizer.scales.name]
        self._writer.write(file_name, stored.data, offset)
        self._report(stored.nbytes, read=False)

    def _units(self, jobs: Iterable[Job], work: Work) -> Iterator[Unit]:
        for job in jobs:
            size = job.step.elements
            length = self._slice_of(job, in_a_pass=work == self._gather)
            for start in range(0, size, length):
                yield Unit(job, start, min(size, start + length))

    def _slice_of(self, job: Job, *, in_a_pass: bool) -> int:
        """How many elements a worker takes at a time: whole blocks."""
        if job.asked.whole if in_a_pass and job.asked else job.is_whole:
            return job.step.elements
        length = job.block(in_a_pass=in_a_pass)
        return max(1, self.slice_elements // length) * length

    def _all(self, pool: ThreadPoolExecutor, jobs: Sequence[Job], work: Work) -> None:
        """Have every worker do units until there are none; the first error ends all.

        Over small tensors, which take longer to fetch than to merge, several workers would only
        wait for each other's turn at the interpreter; and each would hold a whole tensor's memory.
        """
        average = sum(job.step.elements for job in jobs) // len(jobs)
        several = average >= _SMALL and not any(job.is_whole for job in jobs)
        workers = self._buffers if several else self._buffers[:1]
        units = read_together(self._units(jobs, work))
        futures = [pool.submit(self._drain, units, work, own) for own in workers]
        try:
            for future in futures:
                future.result()
        except BaseException:
            self._stop.set()
            raise

    def _drain(self, units: Iterator[list[Unit]], work: Work, buffers: Buffers) -> None:
        # What is merged on the way is made in every pass, and looked at in the last.
        look = self._look if work == self._write else _unseen
        try:
            while (fetched := self._fetch(units, buffers)) is not None:
                for unit, streamed in zip(*fetched, strict=True):
                    work(unit, sources_of(unit, iter(streamed), buffers, look), buffers)
        except BaseException:
            self._stop.set()
            raise

    def _fetch(
        self, units: Iterator[list[Unit]], buffers: Buffers
    ) -> tuple[list[Unit], list[list[np.ndarray]]] | None:
        """The next units, and for each the bytes that are streamed for it.

        A lock is released only once the next file's is held, so that every file is read in the
        units' order, which its digest needs, while several files are read at the same time. Slices
        may take files in any order and a file twice; locks are taken in one order, each once.
        """
        held = self._order
        held.acquire()
        try:
            batch = None if self._stop.is_set() else next(units, None)
            if batch is None:
                return None
            unit, last = batch[0], batch[-1]
            streamed = [[np.empty(0, np.uint8)] * len(unit.job.streamed) for _ in batch]
            total = 0
            for index in unit.job.order:
                reader, info = unit.job.streamed[index]
                bits = DTYPES[info.dtype].bits
                start, stop = unit.start * bits // 8, -(-unit.stop * bits // 8)
                if info.nbytes != -(-unit.job.step.elements * bits // 8):  # read as a whole
                    start, stop = 0, info.nbytes
                if last is not unit:
                    stop = last.job.streamed[index][1].stop - info.start
                buffer = buffers.take(index, stop - start)
                if reader.lock is not held:
                    reader.lock.acquire()
                    held.release()
                    held = reader.lock
                reader.read(buffer.data, info.start + start)
                for own, part in zip(streamed, _divided(buffer, index, batch), strict=True):
                    own[index] = part
                total += buffer.nbytes
        finally:
            held.release()
        self._report(total, read=True)
        return batch, streamed

    def _report(self, nbytes: int, *, read: bool) -> None:
        if read:
            with self._count:
                self.bytes_read += nbytes
        if self.progress is not None:
            self.progress(nbytes, self._total)

    def _gather(self, unit: Unit, stored: list[np.ndarray], buffers: Buffers) -> None:
        """One slice of a pass over whole tensors."""
        asked = unit.job.asked
        assert asked is not None
        dtype = None if asked.takes_stored else unit.job.step.compute_dtype
        if asked.wide and not asked.takes_stored:
            dtype = np.dtype(np.float64)  # widened once, for products that are summed in float64
        with np.errstate(all="ignore"):
            if asked.whole:
                asked.add(whole_block(unit.job, stored))
                return
            for _, block in blocks(unit, stored, buffers, dtype, in_a_pass=True):
                asked.add(block)

    def _measure(self, unit: Unit, stored: list[np.ndarray], buffers: Buffers) -> None:
        """Look at one slice of a result that is to be quantised."""
        assert unit.job.quantizer is not None
        with np.errstate(all="ignore"):
            for place, values in merged(unit, stored, buffers):
                unit.job.quantizer.measure(values, unit.start + place.start)

    def _write(self, unit: Unit, stored: list[np.ndarray], buffers: Buffers) -> None:
        """Compute one slice of the output, and write it."""
        job, result = unit.job, made(unit, stored, buffers, self._look)
        offset = job.offset + unit.start * DTYPES[job.step.dtype].bits // 8
        assert self._writer is not None
        self._writer.write(job.file_name, result.data, offset)
        self._report(result.nbytes, read=False)

    def _look(self, unit: Unit, inputs: Sequence[np.ndarray], result: np.ndarray | None) -> None:
        """Note where there is NaN or infinity."""
        if faults := found_in(unit, inputs, result):
            # What is merged on the way may be made several times, for layers that are stacked.
            found = {(fault.name, unit.start): fault.count for fault in faults if fault.written}
            with self._count:
                self.nonfinite += faults
                self._made_nonfinite.setdefault(id(unit.job.plan), {}).update(found)

    def compare_integers(self) -> None:
        """Read integer tensors first: where they differ, nothing must be written.

        Raises:
            MismatchError: they differ, and nothing says what to take.
        """
        plan = self.plan
        differing = [
            step for step in plan.steps
            if step.elements and step.is_undecided and self._differs(step)
        ]  # fmt: skip
        if differing:
            names = [step.name for step in differing]
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
            found = []
            for index, stored in enumerate(step.streamed):
                buffer = self._buffers[0].take(index, min(SLICE, nbytes - start))
                self.inputs.reader(stored).peek(buffer.data, stored.info.start + start)
                self.bytes_read += buffer.nbytes
                found.append(buffer)
            if any(not np.array_equal(found[0], other) for other in found[1:]):
                return True
        return False


def _unseen(unit: Unit, inputs: Sequence[np.ndarray], result: np.ndarray | None) -> None:
    """Note nothing."""


def _divided(buffer: np.ndarray, index: int, batch: Sequence[Unit]) -> list[np.ndarray]:
    """What was read at once, for each unit."""
    if len(batch) == 1:
        return [buffer]
    infos = [unit.job.streamed[index][1] for unit in batch]
    first = infos[0].start
    return [buffer[info.start - first : info.stop - first] for info in infos]
