"""The jobs of a merge: its steps with what is needed to carry them out, and how they go together.

Neighbours that are made in the same way become one job, so that thousands of small tensors cost a
few reads and writes. Jobs that need passes over whole tensors go through them in groups, small
enough to stay in the page cache.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..files.checkpoint import TensorInfo
from ..files.digest import FileReader
from ..files.dtypes import numpy_dtype
from ..files.quantized import Quantizer, Scales
from ..files.writer import OutputFile, OutputTensor
from .forms import BLOCK, Merging, Rows, WeightedSum, Whole
from .inputs import Inputs
from .methods.asking import Asked
from .plan import Made, MergePlan, Step, Unmade
from .sources import Computed, Read, Stored, Values

if TYPE_CHECKING:
    from .compiled import Loop

STATE = 32 << 20
"""Bytes of what is gathered in the passes of a group, unless one tensor takes more."""
GROUP = 256 << 20
"""Input bytes between two passes over the same tensors."""
MOST = 1 << 11
"""Jobs in a group: what is known of each takes memory beside what is gathered."""

# Elements; where nothing is counted per block, fewer and longer calls of numpy pay: two threads
# that ask for the interpreter at the same time wait for each other.
_ELEMENTWISE_BLOCK = 2 * BLOCK
_SMALL = BLOCK // 16  # elements

Weights = namedtuple("Weights", ["weight"])  # noqa: PYI024  # which compiled loops can take


class Opened:
    """A source that is computed, with what computes it while its tensor is merged."""

    def __init__(self, source: Computed) -> None:
        self._source = source
        self._values: Values | None = None

    def open(self, read: Read) -> None:
        """Read what must be at hand."""
        with np.errstate(all="ignore"):  # NaN and infinity are looked for in results
            self._values = self._source.opened(read)

    def take(self, start: int, stop: int) -> np.ndarray:
        """Elements, in the source's dtype."""
        assert self._values is not None
        with np.errstate(all="ignore"):
            made = self._values(start, stop)
        return np.ascontiguousarray(made, numpy_dtype(self._source.info.dtype))


@dataclass
class Job:
    """One step with all that is needed to carry it out.

    Attributes:
        plan: what it is a step of.
        step: the step.
        streamed: what is read from files for it, in the order of the sources.
        below: for each source that is not stored, what makes it; empty where all are.
        place: where it is among the jobs that are below one another.
        file_name, offset: where its result lies.
        result: what errors call that.
        parts: the steps that were joined into `step`, if any were.
        asked: what the method is to know of it, under way.
        scales: of the sources, where they are codes.
        quantizer: of the result, where it is to be codes.
        loop, loop_parameters: what was compiled for it.
    """

    plan: MergePlan
    step: Step
    streamed: list[tuple[FileReader, TensorInfo]]
    below: tuple[Job | Opened | None, ...] = ()
    place: tuple[int, ...] = ()
    file_name: str = ""
    offset: int = 0
    result: str = "the result"
    parts: tuple[Step, ...] = ()
    asked: Asked | None = None
    scales: list[tuple[Scales, np.ndarray] | None] = field(default_factory=list)
    quantizer: Quantizer | None = None
    loop: Loop | None = None
    loop_parameters: np.ndarray | None = None

    @cached_property
    def order(self) -> list[int]:
        """In which order the readers are asked: as their files were opened, and within a file.

        What all tensors have is opened first, so that a tensor that has less overtakes none.
        """
        places = [(reader.number, info.start) for reader, info in self.streamed]
        return sorted(range(len(places)), key=places.__getitem__)

    @cached_property
    def is_gathered(self) -> bool:
        """Whether something must be known of whole tensors before it is written."""
        step = self.step
        asks = step.outline is not None and bool(step.outline.rounds)
        return asks or step.quantized is not None or any(step.scales)

    @property
    def form(self) -> Merging | None:
        """What is done with it; None where it is only stored as another dtype, or not known yet."""
        if self.asked is not None:
            return self.asked.merging
        return None if self.step.outline is None else self.step.outline.form

    @cached_property
    def weights(self) -> Weights:
        """Of a weighted sum, in the dtype of the arithmetic."""
        assert isinstance(self.form, WeightedSum)
        number = self.step.compute_dtype.type
        return Weights(tuple(number(c) for c in self.form.coefficients))

    @property
    def is_whole(self) -> bool:
        """Whether whole tensors are merged at once."""
        return self.step.outline is not None and isinstance(self.step.outline.form, Whole)

    @property
    def deltas(self) -> list[int]:
        """The places of the sources that are task vectors."""
        return [
            k for k, source in enumerate(self.step.sources)
            if not isinstance(source, Stored | Made) and source.is_delta
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
class Unit:
    """A slice of one job: elements `start` to `stop`."""

    job: Job
    start: int
    stop: int


def placed(files: Iterable[OutputFile]) -> Iterator[tuple[OutputTensor, str, int]]:
    """Each tensor of the output, with its file's name and where it begins among the file's data."""
    for file in files:
        offset = 0
        for tensor in file.tensors:
            yield tensor, file.name, offset
            offset += tensor.nbytes


def jobs_of(plan: MergePlan, inputs: Inputs, files: Iterable[OutputFile]) -> Iterator[Job]:
    """A job for each tensor that is made for itself, in the order of the output."""
    steps = {step.name: step for step in plan.steps}
    for tensor, file_name, offset in placed(files):
        step = steps[tensor.name]
        if step.elements and step.kind != "scales":  # which are written with their codes
            job = _job(plan, step, inputs)
            job.file_name, job.offset = file_name, offset
            yield job


def _job(plan: MergePlan, step: Step, inputs: Inputs, place: tuple[int, ...] = ()) -> Job:
    streamed = [(inputs.reader(stored), stored.info) for stored in step.streamed]
    if all(isinstance(source, Stored) for source in step.sources):
        return Job(plan, step, streamed, place=place)
    below: list[Job | Opened | None] = []
    for number, source in enumerate(step.sources):
        if isinstance(source, Made):
            job = _job(source.model.plan, source.step, inputs, (*place, number))
            job.result = f"the result of {source.model.node}"
            below.append(job)
        else:
            below.append(None if isinstance(source, Stored) else Opened(source))
    return Job(plan, step, streamed, tuple(below), place)


def joined(jobs: Iterable[Job]) -> Iterator[Job]:
    """Jobs with neighbours that are made in the same way, and lie side by side, made one."""
    run: list[Job] = []
    for job in jobs:
        if run and not _continues(run[-1], job):
            yield _one_of(run)
            run = []
        run.append(job)
    if run:
        yield _one_of(run)


def _continues(job: Job, following: Job) -> bool:
    step, other = job.step, following.step
    return (
        not job.below
        and not following.below
        and not job.is_gathered
        and not following.is_gathered
        and step.kind != "integer"
        and (step.kind, step.dtype) == (other.kind, other.dtype)
        and _do_alike(step, other)
        and job.file_name == following.file_name
        and _lies_before(job, following)
    )


def _lies_before(job: Job, following: Job) -> bool:
    """Whether all that is streamed for two jobs lies side by side."""
    return len(job.streamed) == len(following.streamed) and all(
        a_reader is b_reader and a.dtype == b.dtype and a.stop == b.start
        for (a_reader, a), (b_reader, b) in zip(job.streamed, following.streamed, strict=True)
    )


def _do_alike(step: Step, other: Step) -> bool:
    """Whether the same is done with two tensors, whatever they are called: a weighted sum."""
    if step.outline is None or other.outline is None:
        return step.outline is other.outline
    form = step.outline.form
    return isinstance(form, WeightedSum) and form == other.outline.form


def _one_of(run: list[Job]) -> Job:
    if len(run) == 1:
        return run[0]
    first, steps = run[0], tuple(job.step for job in run)
    sources = tuple(
        Stored(s.model, s.info._replace(nbytes=run[-1].streamed[k][1].stop - s.info.start))
        for k, s in enumerate(first.step.sources)
    )
    step = first.step._replace(shape=(sum(s.elements for s in steps),), sources=sources)
    streamed = [(r, s.info) for (r, _), s in zip(first.streamed, sources, strict=True)]
    return Job(
        first.plan, step, streamed, file_name=first.file_name, offset=first.offset, parts=steps
    )


def groups(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Jobs that go through their passes together."""
    group: list[Job] = []
    filled = state = 0
    for job in jobs:
        nbytes = sum(info.nbytes for _, info in job.streamed) if job.is_gathered else 0
        held = job.step.state_bytes
        is_full = len(group) == MOST or filled + nbytes > GROUP or state + held > STATE
        if group and is_full:
            yield group
            group, filled, state = [], 0, 0
        group.append(job)
        filled += nbytes
        state += held
    if group:
        yield group


def read_together(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Units, of small tensors that lie side by side several at once: they are read as one."""
    batch: list[Unit] = []
    elements = 0
    for unit in units:
        size = unit.stop - unit.start
        is_small = size == unit.job.step.elements and size <= _SMALL
        more = is_small and elements + size <= BLOCK
        if batch and not (more and _lies_before(batch[-1].job, unit.job)):
            yield batch
            batch, elements = [], 0
        batch.append(unit)
        elements += size if is_small else BLOCK
    if batch:
        yield batch


def most_slices(plan: MergePlan) -> int:
    """How many slices a worker holds at most: results, and what they are made of."""
    most = max(len(step.sources) for step in plan.steps)
    models: Sequence[object] = [*plan.models, plan.base]
    return 1 + most + sum(most_slices(m.plan) for m in models if isinstance(m, Unmade))
