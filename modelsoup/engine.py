"""The streaming engine: it carries out a `MergePlan` slice by slice into a writer.

Workers take slices of the output in file order. Each reads the inputs' slices into buffers that it
keeps, computes in blocks that fit the second-level cache, and writes the result to its place; while
one computes, another reads. A method that must know of whole tensors first (`gram`, `select`) gets
passes of its own over a group of tensors small enough to stay in the page cache.

No byte of the result depends on the number of workers or the size of a slice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from .checkpoint import SUFFIX, Checkpoint, StrPath, TensorInfo, open_checkpoint
from .digest import FileDigest, FileReader
from .dtypes import DTYPES, count_nonfinite, has_nonfinite, narrow, numpy_dtype, widen
from .errors import (
    MismatchError,
    NonfiniteError,
    OutputError,
    ParameterError,
    SoupError,
    listed,
    nearest,
)
from .fused import WORTH_COMPILING, Loop, loop_for, parameter_array
from .lineage import record
from .methods import get_method
from .methods.registry import number_type, numbers
from .recipe import MergePlan, Notice, Recipe, RecipeFields, Step, plan_merge
from .rules import BASE, source_name
from .statistics import BLOCK, Gram, Statistic, TaskVectors, task_vectors
from .writer import (
    LINEAGE_KEY,
    CheckpointWriter,
    OutputFile,
    OutputTensor,
    check_output,
    header_bytes,
    layout,
    parse_size,
)

DEFAULT_OUTPUT = "soup.safetensors"
_DIFFUSION = "diffusion_pytorch_model"

SLICE = 8 * BLOCK
"""Elements of the output that a worker takes at a time."""

_BUFFERS = 48 << 20  # bytes, all workers together
_GROUP = 256 << 20  # input bytes between two passes over the same tensors
_MAX_WORKERS = 8  # more do not read faster

Progress = Callable[[int], None]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: the file or folder that was written; None after a dry run.
        plan: what was done.
        notices: what the user should know: the plan's, and what only values could tell.
        bytes_read: from the inputs, extra passes and digests included.
        bytes_written: headers included.
        digests: of each model's files, by model index (`rules.BASE` for the base).
    """

    output: Path | None
    plan: MergePlan
    notices: tuple[Notice, ...]
    bytes_read: int = 0
    bytes_written: int = 0
    digests: dict[int, list[FileDigest]] = field(default_factory=dict)


def merge(
    models: Sequence[StrPath | Checkpoint],
    output: StrPath = DEFAULT_OUTPUT,
    recipe: Recipe | None = None,
    *,
    base: StrPath | Checkpoint | None = None,
    shard_size: int | str | None = None,
    workers: int | None = None,
    force: bool = False,
    strict: bool = False,
    allow_nonfinite: bool = False,
    sha256: bool = False,
    fsync: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
    **fields: Unpack[RecipeFields],
) -> MergeReport:
    """Merge checkpoints into one.

    >>> modelsoup.merge(["a.safetensors", "b.safetensors"], beta=0.5, layers=["disc.*"])

    Args:
        models: paths, or open checkpoints; the first gives names, order, dtypes and metadata.
        output: a path that ends in `.safetensors` makes a file, any other a model folder, into
            which the first model's config and tokenizer are copied.
        recipe: what to do; or give its fields as keywords.
        base: the base model of task-vector methods.
        shard_size: bytes, or `5GB`: divide a folder's weights into shards of at most this size.
        workers: threads; None takes the number of cores, at most 8.
        force: replace an existing output.
        strict: make an error of every notice.
        allow_nonfinite: let NaN, infinity and a zero sum of weights pass.
        sha256: record SHA-256 digests of the inputs too.
        fsync: flush to the disk before the output appears.
        dry_run: check everything that headers can show, and write nothing.
        progress: called with the number of bytes that were read or written since the last call,
            from any thread.
        **fields: of `Recipe`: `method`, `beta`, `weights`, `parameters`, `layers`, `rest`,
            `groups`, `low_level`, `dtype`, `seed`, `on_integer`.

    Raises:
        SoupError: anything that the user can put right; no output is left behind then.
    """
    if recipe is None:
        recipe = _recipe_of(fields)
    elif fields:
        raise ParameterError(f"give a recipe or its fields, not both: {', '.join(fields)}")
    if workers is not None and workers < 1:
        raise ParameterError(f"workers is {workers}, but must be at least 1")
    output = Path(output)
    opened = [_open(model) for model in models]
    opened_base = None if base is None else _open(base)
    plan = plan_merge(opened, recipe, base=opened_base, allow_nonfinite=allow_nonfinite)
    _refuse_inputs(output, [*opened, *([opened_base] if opened_base else [])])
    check_output(output, force=force)
    files = layout(
        (OutputTensor(step.name, step.dtype, step.shape) for step in plan.steps),
        file_name=_weights_name(output, plan.models[0]),
        shard_size=None if shard_size is None else parse_size(shard_size),
    )
    if len(files) > 1 and output.suffix == SUFFIX:
        raise OutputError(
            f"the output {output} is one file, but shards of that size would be {len(files)}: "
            f"name a folder"
        )
    _strict(plan.notices, strict)
    if dry_run:
        return MergeReport(None, plan, plan.notices)
    return _execute(
        plan, output, files, workers=workers or default_workers(), force=force,
        allow_nonfinite=allow_nonfinite, sha256=sha256, fsync=fsync, progress=progress,
    )  # fmt: skip


def _recipe_of(fields: RecipeFields) -> Recipe:
    known = {f.name for f in dataclasses.fields(Recipe)}
    for name in fields:
        if name not in known:
            raise ParameterError(f"merge() has no option {name!r}{nearest(name, known)}")
    return Recipe(**fields)


def _open(model: StrPath | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def _refuse_inputs(output: Path, inputs: Sequence[Checkpoint]) -> None:
    for model in inputs:
        for path in (model.path, *model.files):
            if output.exists() and path.exists() and output.samefile(path):
                raise OutputError(f"the output {output} is one of the inputs")


def _weights_name(output: Path, first: Checkpoint) -> str:
    """A file's own name; in a folder, the name that the first model's weights have there."""
    if output.suffix == SUFFIX:
        return output.name
    diffusion = any(file.name.startswith(_DIFFUSION) for file in first.files)
    return f"{_DIFFUSION if diffusion else 'model'}{SUFFIX}"


def _strict(notices: Sequence[Notice], strict: bool) -> None:
    if strict and notices:
        raise MismatchError("; ".join(notice.message for notice in notices) + " (--strict)")


def default_workers() -> int:
    """As many as there are cores for this process, at least 2 (to read while computing)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(2, min(_MAX_WORKERS, cores or 1))


def _execute(
    plan: MergePlan, output: Path, files: list[OutputFile], *, workers: int, force: bool,
    allow_nonfinite: bool, sha256: bool, fsync: bool, progress: Progress | None,
    slice_elements: int = SLICE,
) -> MergeReport:  # fmt: skip
    """Carry out a plan. `slice_elements` (a multiple of `BLOCK`) is there for the tests."""
    _allow_many_files()
    metadata = {k: v for k, v in plan.models[0].metadata.items() if k != LINEAGE_KEY}
    first = plan.models[0]

    def with_lineage(digests: dict[int, list[FileDigest]] | None) -> dict[str, str]:
        content = record(plan, digests, sha256=sha256)
        return {**metadata, LINEAGE_KEY: json.dumps(content, separators=(",", ":"))}

    inputs = _Inputs(plan, sha256=sha256)
    try:
        engine = _Engine(plan, inputs, workers, slice_elements, progress)
        engine.compare_integers()
        copy_from = first.path if first.path.is_dir() and output.suffix != SUFFIX else None
        with CheckpointWriter(
            output, files, with_lineage(None), force=force, fsync=fsync, copy_from=copy_from
        ) as writer:
            engine.run(writer, files)
            if engine.nonfinite and not allow_nonfinite:
                raise NonfiniteError(_nonfinite_sentence(engine.nonfinite))
            digests = inputs.digests()
            writer.update_metadata(with_lineage(digests))
            if copy_from is not None and plan.recipe.dtype is not None:
                _update_config(writer.path("config.json"), plan.recipe.dtype)
            writer.commit()
    finally:
        inputs.close()
    notices = list(plan.notices)
    if engine.nonfinite:
        names = tuple(dict.fromkeys(fault.name for fault in engine.nonfinite))
        notices.append(Notice("nonfinite", _nonfinite_sentence(engine.nonfinite), names))
    return MergeReport(
        output, plan, tuple(notices), engine.bytes_read + inputs.extra_bytes,
        sum(len(header_bytes(f, with_lineage(digests))) for f in files) + plan.bytes_written,
        digests,
    )  # fmt: skip


def _allow_many_files() -> None:
    """Let shards of many models be open at once: the default limit is low, the hard one is not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _update_config(config: Path, dtype: str) -> None:
    """Let a model folder's config name the dtype that its weights now have."""
    if not config.is_file():
        return
    try:
        content = json.loads(config.read_text("utf-8"))
    except ValueError:
        return  # not transformers' config; it was copied as it is
    keys = [key for key in ("torch_dtype", "dtype") if key in content]
    if keys:
        content.update(dict.fromkeys(keys, numpy_dtype(dtype).name))
        config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


@dataclass(frozen=True)
class Nonfinite:
    """NaN or infinity in one tensor.

    Attributes:
        name: the tensor's name.
        where: an input's file name, or `the result`.
        count: how many elements.
    """

    name: str
    where: str
    count: int


def _nonfinite_sentence(faults: Sequence[Nonfinite]) -> str:
    """Which tensors, where and how many elements, the first few by name."""
    totals: dict[tuple[str, str], int] = {}
    for fault in faults:
        key = (fault.name, fault.where)
        totals[key] = totals.get(key, 0) + fault.count
    tensors = len({name for name, _ in totals})
    said = [f"{name} ({count} in {where})" for (name, where), count in sorted(totals.items())]
    return (
        f"NaN or infinity in {tensors} tensors: {listed(said)} (--allow-nonfinite lets them pass)"
    )


class _Inputs:
    """The open input files, each model's for itself: two models may be the same file."""

    def __init__(self, plan: MergePlan, *, sha256: bool) -> None:
        models = dict(enumerate(plan.models))
        if plan.base is not None:
            models[BASE] = plan.base
        self.models = models
        self._readers: dict[tuple[int, Path], FileReader] = {}
        try:
            for index, model in models.items():
                for file in model.files:
                    self._readers[index, file] = FileReader(file, sha256=sha256)
        except OSError as error:
            self.close()
            raise SoupError(f"cannot read {error.filename}: {error.strerror}") from error

    def reader(self, model: int, info: TensorInfo) -> FileReader:
        return self._readers[model, info.file]

    @property
    def extra_bytes(self) -> int:
        return sum(reader.extra_bytes for reader in self._readers.values())

    def digests(self) -> dict[int, list[FileDigest]]:
        """Finish the digests; what the merge had no use for is read now."""
        readers = list(self._readers.values())
        with ThreadPoolExecutor(default_workers()) as pool:
            finished = list(pool.map(FileReader.finish, readers))
        by_model: dict[int, list[FileDigest]] = {index: [] for index in self.models}
        for (index, _), digest in zip(self._readers, finished, strict=True):
            by_model[index].append(digest)
        return by_model

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()


@dataclass
class _Job:
    """One step with all that is needed to carry it out."""

    step: Step
    readers: list[tuple[FileReader, TensorInfo]]
    file_name: str
    offset: int
    statistic: Statistic | None = None
    function: Callable[[Any, Any], Any] | None = None  # elementwise, over `numbers`
    numbers: Any = None
    loop: Loop | None = None
    loop_parameters: np.ndarray | None = None

    @property
    def is_whole(self) -> bool:
        return self.step.method is not None and self.step.method.shape == "whole"


@dataclass(frozen=True, slots=True)
class _Unit:
    """A slice of one job: elements `start` to `stop`."""

    job: _Job
    start: int
    stop: int


class _Buffers:
    """One worker's memory, grown to the largest slice that it met."""

    def __init__(self) -> None:
        self._raw: list[np.ndarray] = []
        self._wide: list[np.ndarray] = []

    def raw(self, index: int, nbytes: int) -> np.ndarray:
        """Bytes for slice `index`; 0 is the output."""
        return self._take(self._raw, index, nbytes, np.dtype(np.uint8))

    def wide(self, index: int, elements: int, dtype: np.dtype[Any]) -> np.ndarray:
        """A block of float32 or float64 for input `index`."""
        return self._take(self._wide, index, elements, dtype)

    @staticmethod
    def _take(arrays: list[np.ndarray], index: int, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        while len(arrays) <= index:
            arrays.append(np.empty(0, dtype))
        if arrays[index].size < size or arrays[index].dtype != dtype:
            arrays[index] = np.empty(size, dtype)
        return arrays[index][:size]


class _Engine:
    def __init__(
        self, plan: MergePlan, inputs: _Inputs, workers: int, slice_elements: int,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.inputs = inputs
        self.workers = workers
        self.progress = progress
        self.nonfinite: list[Nonfinite] = []
        self.bytes_read = 0
        most = 1 + max(len(step.sources) for step in plan.steps)
        affordable = _BUFFERS // (workers * most * 4) // BLOCK * BLOCK
        self.slice_elements = max(BLOCK, min(slice_elements, affordable))
        self._order = threading.Lock()
        self._count = threading.Lock()
        self._stop = threading.Event()
        self._writer: CheckpointWriter | None = None
        self._buffers = [_Buffers() for _ in range(workers)]

    def run(self, writer: CheckpointWriter, files: Sequence[OutputFile]) -> None:
        """Write every tensor of the output."""
        self._writer = writer
        jobs = list(self._jobs(files))
        with ThreadPoolExecutor(self.workers) as pool:
            for group in _groups(jobs):
                while waiting := [j for j in group if j.statistic and j.statistic.needs_pass]:
                    self._all(pool, self._units(waiting), self._gather)
                    for job in waiting:
                        assert job.statistic is not None
                        job.statistic.end_pass()
                for job in group:
                    self._prepare(job)
                self._all(pool, self._units(group), self._write)
                for job in group:
                    job.statistic = None  # its memory is wanted for the next group

    def _jobs(self, files: Sequence[OutputFile]) -> Iterator[_Job]:
        steps = {step.name: step for step in self.plan.steps}
        for file in files:
            offset = 0
            for tensor in file.tensors:
                step = steps[tensor.name]
                readers = [(self.inputs.reader(m, info), info) for m, info in step.sources]
                job = _Job(step, readers, file.name, offset)
                offset += tensor.nbytes
                if step.elements:
                    self._add_statistic(job)
                    yield job

    def _add_statistic(self, job: _Job) -> None:
        step, method = job.step, job.step.method
        if method is None or step.kind != "merge":
            return
        if method.shape == "gram":
            job.statistic = Gram(len(step.sources), step.elements)
        elif method.shape == "select" and method.sparsify is not None:
            job.statistic = task_vectors(
                step.parameters, method.sparsify, step.elements, step.compute_dtype,
                seed=self.plan.recipe.seed, name=step.name,
            )  # fmt: skip

    def _prepare(self, job: _Job) -> None:
        """Find the elementwise function of a job, now that its statistics are known."""
        step, method = job.step, job.step.method
        if step.kind == "integer" or job.is_whole or _is_copy(step):
            return
        dtype = step.compute_dtype
        if method is None:
            job.function, job.numbers = _identity, ()
        elif method.shape == "gram":
            assert isinstance(job.statistic, Gram) and job.statistic.matrix is not None
            coefficients = method.function(job.statistic.matrix, step.parameters)
            linear = get_method("linear")
            job.function = linear.function
            weights = tuple(dtype.type(c) for c in coefficients)
            job.numbers = number_type(linear.parameters)(weights, False)
        else:
            job.function, job.numbers = method.function, numbers(step.parameters, dtype)
        if dtype == np.float32 and not isinstance(job.statistic, TaskVectors) and method:
            worth = sum(s.elements for s in self.plan.steps) >= WORTH_COMPILING
            stored = tuple(info.dtype for _, info in step.sources)
            job.loop = loop_for(job.function, stored, step.dtype, job.numbers, worth=worth)
            job.loop_parameters = parameter_array(job.numbers)

    def _units(self, jobs: Iterable[_Job]) -> Iterator[_Unit]:
        for job in jobs:
            size = job.step.elements
            length = size if job.is_whole else self.slice_elements
            for start in range(0, size, length):
                yield _Unit(job, start, min(size, start + length))

    def _all(
        self, pool: ThreadPoolExecutor, units: Iterator[_Unit],
        work: Callable[[_Unit, list[np.ndarray], _Buffers], None],
    ) -> None:  # fmt: skip
        """Have every worker do units until there are none; the first error ends all."""
        futures = [pool.submit(self._drain, units, work, own) for own in self._buffers]
        try:
            for future in futures:
                future.result()
        except BaseException:
            self._stop.set()
            raise

    def _drain(
        self, units: Iterator[_Unit], work: Callable[[_Unit, list[np.ndarray], _Buffers], None],
        buffers: _Buffers,
    ) -> None:  # fmt: skip
        try:
            while (fetched := self._fetch(units, buffers)) is not None:
                work(*fetched, buffers)
        except BaseException:
            self._stop.set()
            raise

    def _fetch(
        self, units: Iterator[_Unit], buffers: _Buffers
    ) -> tuple[_Unit, list[np.ndarray]] | None:
        """The next unit and its inputs' bytes.

        A lock is released only once the next file's is held, so that every file is read in the
        units' order, which its digest needs, while several files are read at the same time.
        """
        held = self._order
        held.acquire()
        try:
            unit = None if self._stop.is_set() else next(units, None)
            if unit is None:
                return None
            stored, total = [], 0
            for index, (reader, info) in enumerate(unit.job.readers, 1):
                bits = DTYPES[info.dtype].bits
                start, stop = unit.start * bits // 8, -(-unit.stop * bits // 8)
                buffer = buffers.raw(index, stop - start)
                reader.lock.acquire()
                held.release()
                held = reader.lock
                reader.read(memoryview(buffer), info.start + start)
                stored.append(buffer)
                total += buffer.nbytes
        finally:
            held.release()
        self._report(total, read=True)
        return unit, stored

    def _report(self, nbytes: int, *, read: bool) -> None:
        if read:
            with self._count:
                self.bytes_read += nbytes
        if self.progress is not None:
            self.progress(nbytes)

    def _blocks(
        self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers
    ) -> Iterator[tuple[int, slice, list[np.ndarray]]]:
        """Each block of a unit: its number in the tensor, its place in the unit, its values."""
        dtype = unit.job.step.compute_dtype
        arrays = _typed(unit.job, stored)
        for start in range(unit.start, unit.stop, BLOCK):
            place = slice(start - unit.start, min(start + BLOCK, unit.stop) - unit.start)
            x = []
            for index, array in enumerate(arrays):
                if array.dtype == dtype:
                    x.append(array[place])
                    continue
                wide = buffers.wide(index, place.stop - place.start, dtype)
                widen(array[place], wide)
                x.append(wide)
            yield start // BLOCK, place, x

    def _gather(self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers) -> None:
        """One slice of a pass over whole tensors."""
        assert unit.job.statistic is not None
        with np.errstate(all="ignore"):
            for block, _, x in self._blocks(unit, stored, buffers):
                unit.job.statistic.add(block, x)

    def _write(self, unit: _Unit, stored: list[np.ndarray], buffers: _Buffers) -> None:
        """Compute one slice of the output, look for NaN and infinity, and write it."""
        job, step = unit.job, unit.job.step
        if step.kind == "integer":
            result = _resolve_integers(step, stored, buffers)
        elif _is_copy(step):
            result = stored[0]
            if DTYPES[step.dtype].kind == "float":
                self._look(unit, _typed(job, stored), None)
        else:
            result = self._compute(unit, stored, buffers)
        bits = DTYPES[step.dtype].bits
        assert self._writer is not None
        offset = job.offset + unit.start * bits // 8
        self._writer.write(job.file_name, memoryview(result), offset)
        self._report(result.nbytes, read=False)

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
        with np.errstate(all="ignore"):
            if job.is_whole:
                self._whole(job, stored, out)
            else:
                for block, place, x in self._blocks(unit, stored, buffers):
                    assert job.function is not None
                    values: Sequence[np.ndarray] = x
                    if isinstance(job.statistic, TaskVectors):
                        values = job.statistic.apply(block, x)
                    narrow(job.function(tuple(values), job.numbers), out[place])
        self._look(unit, _typed(job, stored), out)
        return result

    def _whole(self, job: _Job, stored: list[np.ndarray], out: np.ndarray) -> None:
        step = job.step
        assert step.method is not None
        x = []
        for (_, info), array in zip(step.sources, _typed(job, stored), strict=True):
            wide = np.empty(array.size, step.compute_dtype)
            widen(array, wide)
            x.append(wide.reshape(info.shape))
        made = np.asarray(step.method.function(tuple(x), numbers(step.parameters, wide.dtype)))
        if made.shape != step.shape:
            raise ParameterError(
                f"the method {step.method.name!r} made {step.name} with the shape "
                f"{list(made.shape)}, not {list(step.shape)}"
            )
        narrow(made.reshape(-1).astype(step.compute_dtype, copy=False), out)

    def _look(self, unit: _Unit, inputs: Sequence[np.ndarray], result: np.ndarray | None) -> None:
        """Note where there is NaN or infinity."""
        step = unit.job.step
        faults = []
        for (model, info), array in zip(step.sources, inputs, strict=True):
            if has_nonfinite(array, info.dtype):
                where = f"{self.inputs.models[model].name}, the {source_name(model)} model"
                faults.append(Nonfinite(step.name, where, count_nonfinite(array)))
        if result is not None and has_nonfinite(result, step.dtype):
            faults.append(Nonfinite(step.name, "the result", count_nonfinite(result)))
        if faults:
            with self._count:
                self.nonfinite += faults

    def compare_integers(self) -> None:
        """Read integer tensors first: where they differ, nothing must be written.

        Raises:
            MismatchError: they differ, and nothing says what to take.
        """
        differing = []
        for step in self.plan.steps:
            if step.kind != "integer" or not step.elements:
                continue
            if (step.policy == "error" or _is_opaque(step)) and self._differs(step):
                if step.policy != "first":
                    differing.append(f"{step.name} ({step.dtype})")
        if differing:
            raise MismatchError(
                f"{len(differing)} tensors that are not floats differ between the models: "
                f"{listed(differing)} (--on-integer first or max says what to take, or a rule such "
                f"as --layers '{differing[0].split(' ')[0]}=first')"
            )

    def _differs(self, step: Step) -> bool:
        nbytes = step.sources[0][1].nbytes
        for start in range(0, nbytes, SLICE):
            stored = []
            for index, (model, info) in enumerate(step.sources):
                buffer = self._buffers[0].raw(index, min(SLICE, nbytes - start))
                self.inputs.reader(model, info).peek(memoryview(buffer), info.start + start)
                self._report(buffer.nbytes, read=True)
                stored.append(buffer)
            if any(not np.array_equal(stored[0], other) for other in stored[1:]):
                return True
        return False


def _identity(x: Any, p: Any) -> Any:
    return x[0]


def _is_copy(step: Step) -> bool:
    """Whether a step's bytes are its source's."""
    return step.kind == "copy" and step.sources[0][1].dtype == step.dtype


def _is_opaque(step: Step) -> bool:
    return DTYPES[step.dtype].kind == "opaque"


def _typed(job: _Job, stored: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [
        array.view(numpy_dtype(info.dtype))
        for (_, info), array in zip(job.readers, stored, strict=True)
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


def _groups(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Jobs that go through their passes together; those with one pass need no division."""
    group: list[_Job] = []
    filled = 0
    for job in jobs:
        nbytes = sum(info.nbytes for _, info in job.readers) if job.statistic else 0
        if group and filled + nbytes > _GROUP:
            yield group
            group, filled = [], 0
        group.append(job)
        filled += nbytes
    if group:
        yield group
