"""One node of a tree, carried out: in this process, another, or on another machine.

A `Task` holds all that is needed, and the result goes into the store, so that whoever asked may
die meanwhile. Every input is compared with the digest that it had when it was made: what a disk
changed is found, and made again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import (
    CheckpointError,
    RunError,
    SoupError,
    StoreError,
    TrainerError,
    counted,
    listed,
    speaking,
)
from ..files.checkpoint import SUFFIX, Checkpoint, TensorInfo, open_checkpoint
from ..files.dtypes import DTYPES, has_nonfinite, numpy_dtype
from ..files.placing import LINEAGE_KEY
from ..files.writer import CheckpointWriter, OutputTensor, layout
from ..merging.lineage import Digests
from ..merging.merge import merge
from ..merging.plan import MergePlan, Unmade
from ..merging.planning import plan_merge
from ..trees.keys import described, trainer_of, training_of
from ..trees.lineage import record_training
from ..trees.operations import FineTune, Merge, Operation, Train
from ..trees.price import bytes_read_by
from ..trees.store import (
    Store,
    content_digest,
    digest_of,
    output_name,
    remove_strays,
    store_error,
    write_note,
)
from ..trees.trainer import SECONDS_LEFT, CommandTrainer, build_options, carry_out, failure
from ..version import __version__

_CHUNK = 8 << 20
_OFTEN = 0.2  # seconds between two notes of progress
_AGAIN = 0.2  # seconds between two looks whether a node is free


class DamagedError(StoreError):
    """A stored result is not what it was when it was made.

    Attributes:
        key: what it is named by.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class LeafChangedError(RunError):
    """A file of the user's is not what it was when the run began.

    Attributes:
        path: which.
    """

    def __init__(self, message: str, path: Path = Path()) -> None:
        super().__init__(message)
        self.path = path


class NodeError(RunError):
    """What was called for a node raised something that no sentence foresees.

    Attributes:
        trace: the traceback, as text; the exception itself may be in another process.
    """

    trace: str = ""


def leaf_changed(path: Path) -> LeafChangedError:
    """That a file of the user's is not what it was."""
    return LeafChangedError(f"{path} changed while the run read it: run again", path)


@dataclass(frozen=True)
class Source:
    """An input of a node.

    Attributes:
        node: its name.
        path: its checkpoint.
        digest: the digest that it must have.
        key: in the store; None for a file of the user's.
        merged: whether a merge made it, so that lineages name it by its key.
        model: what the plan calls it, for lineages; None for what only has a path there.
    """

    node: str
    path: Path
    digest: str
    key: str | None
    merged: bool = False
    model: str | None = None


@dataclass(frozen=True)
class OnTheWay:
    """An input of a merge that is merged in the same pass, and never written.

    Attributes:
        node: its name.
        key: what its result would be named by.
        operation: how it is merged.
        sources: its own inputs.
        base: its base model.
        model: what the plan calls it, for lineages.
    """

    node: str
    key: str
    operation: Merge
    sources: tuple[Source | OnTheWay, ...]
    base: Source | None = None
    model: str | None = None


@dataclass(frozen=True)
class Task:
    """What is needed to carry out one node.

    Attributes:
        store: the store's folder.
        key: what the result is named by.
        node: its name in the tree.
        operation: what to do.
        sources: its inputs, in order; for `Train` its start, if it has one. Only a merge has
            some that are `OnTheWay`.
        base: the base model of a merge.
        frozen: names that a trainer must not change.
        seed: for the trainer.
        workers: threads of a merge.
        capture: put what is printed into the node's log; for processes of their own.
        run: who asks, so that others who wait for the same node see that it is not they.
        shown: the folder for what a trainer shows; None for none.
        beside: the adapters and auxiliary inputs of a merge.
    """

    store: Path
    key: str
    node: str
    operation: Operation
    sources: tuple[Source | OnTheWay, ...] = ()
    base: Source | None = None
    frozen: tuple[str, ...] = ()
    seed: int = 0
    workers: int | None = None
    capture: bool = False
    run: str = ""
    shown: Path | None = None
    beside: tuple[Source, ...] = ()


def get_ready() -> None:
    """Import and set up what most nodes need, in a process that waits for one."""
    import safetensors.numpy  # noqa: F401  # for trainers

    build_options(CommandTrainer(), {"command": ["{output}"]})  # sets up pydantic


def perform(task: Task) -> tuple[dict[str, Any], bool]:
    """Carry out a node, unless it is done; its record, and whether it was made here and now.

    Raises:
        DamagedError: an input in the store is damaged.
        SoupError: the merge or the trainer failed.
    """
    store = Store(task.store)
    while True:
        with store.lock(task.key, wait=False) as held:
            if store.has(task.key):  # another run was quicker
                return dict(store.entry(task.key).record), False
            if held:
                return _perform(task, store), True
        time.sleep(_AGAIN)  # another run is at it


def _perform(task: Task, store: Store) -> dict[str, Any]:
    """`perform`, under the key's lock."""
    try:
        folder = store.folder_of(task.key)
        folder.mkdir(parents=True, exist_ok=True)
        remove_strays(folder)
        note = _Note(store.progress(task.key), task.run)  # it has begun
        started, clock = time.time(), time.monotonic()
        # Where a process has other threads, they may print too, and not for this node's log.
        alone = threading.current_thread() is threading.main_thread()
        with (
            store.log(task.key).open("a", encoding="utf-8", errors="replace") as log,
            _captured(log, wanted=task.capture and alone),
            _explained(log, "the merge" if isinstance(task.operation, Merge) else "the training"),
        ):
            output, made = _carry_out(task, store, folder, log, note)
    except OSError as error:  # of the store's own files: those of merges and trainers are told
        raise store_error(task.store, error) from error
    record = {
        "node": task.node,
        "operation": type(task.operation).__name__.lower(),
        **described(task.operation),
        "inputs": [_input(source) for source in task.sources],
        "seed": task.seed, "seed_is_given": _seed_is_given(task.operation),
        "started": started,
        "seconds": round(time.monotonic() - clock, 3),
        "host": socket.gethostname(),
        "versions": {
            "modelsoup": __version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
        **made,
    }  # fmt: skip
    return store.put(task.key, output, record)


def _seed_is_given(operation: Operation) -> bool:
    """Whether a plan says which seed a training has."""
    training = training_of(operation)
    return training is not None and training.seed is not None


@contextlib.contextmanager
def _explained(log: IO[str], said: str) -> Iterator[None]:
    """Tell in one sentence what strange code raises, and put the whole of it into the log."""
    try:
        yield
    except Exception as error:
        is_trainers = isinstance(error, TrainerError)
        strange = error.__cause__ if is_trainers else error
        # Errors of ours and of the system are sentences; what a trainer's code met is told whole.
        if strange is None or (not is_trainers and isinstance(strange, SoupError | OSError)):
            raise
        trace = "".join(traceback.format_exception(strange))
        print(trace, end="", file=log, flush=True)
        lines = error.args if isinstance(error, SoupError) else failure(said, error)
        told = NodeError(*lines)
        told.trace = trace
        raise told from strange


def _input(source: Source | OnTheWay) -> dict[str, Any]:
    """An input, for records."""
    if isinstance(source, Source):
        return {"node": source.node, "key": source.key, "digest": source.digest}
    inputs = [_input(inner) for inner in source.sources]
    return {"node": source.node, "key": source.key, **described(source.operation), "inputs": inputs}


def _read(sources: Sequence[Source | OnTheWay]) -> list[Source]:
    """The checkpoints that are read, base models aside."""
    return [
        found for source in sources
        for found in ([source] if isinstance(source, Source) else _read(source.sources))
    ]  # fmt: skip


def _carry_out(
    task: Task, store: Store, folder: Path, log: IO[str], note: _Note
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """The checkpoint, and what its record says of it."""
    files = _read(task.sources)
    for source in files:
        _must_open(source)
    is_folder = bool(files) and open_checkpoint(files[0].path).is_folder
    output = folder / output_name(is_folder=is_folder)
    if isinstance(task.operation, Merge):
        with speaking("plan"):
            return output, _merge(task, task.operation, output, note)
    assert isinstance(task.operation, Train | FineTune)
    start = files[0] if files else None
    if start is not None and content_digest(start.path) != start.digest:
        raise _damaged(start)
    trained = folder / f"trained{SUFFIX}"
    try:
        return output, _trained(task, store, trained, output, log, start, note)
    finally:
        trained.unlink(missing_ok=True)


def _trained(
    task: Task, store: Store, trained: Path, output: Path, log: IO[str], start: Source | None,
    note: _Note,
) -> dict[str, Any]:  # fmt: skip
    """Have the trainer write `trained`, and make the result of it."""
    assert isinstance(task.operation, Train | FineTune)
    trainer, options = trainer_of(task.operation.training)
    carry_out(
        trainer, options, start=None if start is None else start.path, output=trained,
        work=store.work(task.key), frozen=task.frozen, seed=task.seed, report=note.take,
        log=lambda line: print(line, file=log, flush=True), note=note.keep, shown=task.shown,
    )  # fmt: skip
    checkpoint = open_checkpoint(trained)
    content = record_training(
        task.operation, None if start is None else _named(start), seed=task.seed
    )
    _adopt(checkpoint, output, content, start, said=f"the trainer {trainer.name!r}")
    return {
        "metrics": note.metrics, "notes": note.notes, "digest": content_digest(output),
        "bytes_read": 0, "bytes_written": checkpoint.nbytes, "frozen": list(task.frozen),
    }  # fmt: skip


def _merge(task: Task, operation: Merge, output: Path, note: _Note) -> dict[str, Any]:
    report = merge(
        [_model(source) for source in task.sources], output, operation.recipe,
        base=None if task.base is None else _model(task.base), workers=task.workers, force=True,
        progress=note.count, lora=dict(operation.lora) or None, aux=dict(operation.aux),
    )  # fmt: skip
    # The inputs' digests were computed while they were merged; what does not agree made nothing.
    plan = report.plan
    adapters = task.beside[: len(operation.lora)]  # which are merged, with the one input as a base
    every = [*adapters, *task.sources, *([] if task.base is None else [task.base])]
    _must_agree(report.digests, plan, [*every, *task.beside[len(adapters) :]])
    there = {step.name for step in plan.steps}
    return {
        "frozen": [name for name in plan.frozen if name in there],
        "notices": [
            *_notices_on_the_way(plan.models),
            *(notice.message for notice in report.notices if notice.level == "warning"),
        ],
        "digest": content_digest(output),
        "bytes_read": bytes_read_by(plan),
        "bytes_written": plan.bytes_written,
    }


def _model(source: Source | OnTheWay) -> Checkpoint:
    if isinstance(source, OnTheWay):
        models = [_model(inner) for inner in source.sources]
        base = None if source.base is None else _model(source.base)
        plan = plan_merge(models, source.operation.recipe, base=base)
        name = output_name(is_folder=models[0].is_folder)
        return Unmade(plan, name=name, node=source.node, key=source.key, plan_name=source.model)
    checkpoint = _named(source)
    checkpoint.digest = source.digest
    checkpoint.key = source.key if source.merged else None
    return checkpoint


def _named(source: Source) -> Checkpoint:
    """A source, opened, with what lineages call it."""
    checkpoint = open_checkpoint(source.path)
    checkpoint.plan_name = source.model
    checkpoint.is_stored = source.key is not None
    return checkpoint


def _must_agree(
    digests: Digests, plan: MergePlan, sources: Sequence[Source | OnTheWay]
) -> None:  # fmt: skip
    """Whether everything that was read is what it was when it was made."""
    for model, source in zip(plan.inputs, sources, strict=True):
        if isinstance(source, OnTheWay):
            assert isinstance(model, Unmade)
            below = [*source.sources, *([] if source.base is None else [source.base])]
            _must_agree(digests, model.plan, below)
        elif digest_of(digests[model]) != source.digest:
            raise _damaged(source)


def _notices_on_the_way(models: Sequence[Checkpoint]) -> list[str]:
    found = []
    for model in models:
        if isinstance(model, Unmade):
            found += _notices_on_the_way(model.plan.models)
            found += [n.message for n in model.plan.notices if n.level == "warning"]
    return found


def _must_open(source: Source) -> None:
    try:
        open_checkpoint(source.path)
    except CheckpointError as error:
        if source.key is None:
            raise
        raise _damaged(source) from error


def _damaged(source: Source) -> StoreError | RunError:
    if source.key is None:
        return leaf_changed(source.path)
    return DamagedError(f"the stored result of {source.node} ({source.key}) is damaged", source.key)


def _adopt(
    checkpoint: Checkpoint, output: Path, lineage: Mapping[str, Any], start: Source | None, *,
    said: str,
) -> None:  # fmt: skip
    """Write what a trainer made as modelsoup writes, with its lineage, and look at every value."""
    metadata = {k: v for k, v in checkpoint.metadata.items() if k != LINEAGE_KEY}
    metadata[LINEAGE_KEY] = json.dumps(lineage, separators=(",", ":"))
    tensors = checkpoint.tensors
    files = layout(
        (OutputTensor(info.name, info.dtype, info.shape) for info in tensors.values()),
        file_name=output_name(is_folder=False), shard_size=None,
    )  # fmt: skip
    file_name = files[0].name if output.suffix != SUFFIX else output.name
    files = [type(files[0])(file_name, files[0].tensors)]
    copy_from = start.path if start is not None and output.suffix != SUFFIX else None
    bad: list[str] = []
    with CheckpointWriter(output, files, metadata, force=True, copy_from=copy_from) as writer:
        offset = 0
        for tensor in files[0].tensors:
            info = tensors[tensor.name]
            if not _copied(checkpoint, info, writer, file_name, offset):
                bad.append(tensor.name)
            offset += info.nbytes
        if bad:
            tensors_told = counted(len(bad), "tensor")
            raise TrainerError(f"{said} made NaN or infinity in {tensors_told}: {listed(bad)}")
        writer.commit()


def _copied(
    checkpoint: Checkpoint, info: TensorInfo, writer: CheckpointWriter, file_name: str, offset: int
) -> bool:
    """Copy one tensor; whether all of it is finite."""
    looked_at = DTYPES[info.dtype].kind == "float"
    finite = True
    with checkpoint.reading(info) as read:
        for begin in range(0, info.nbytes, _CHUNK):
            buffer = np.empty(min(_CHUNK, info.nbytes - begin), np.uint8)
            read(buffer.data, begin)
            if looked_at and has_nonfinite(buffer.view(numpy_dtype(info.dtype)), info.dtype):
                finite = False
            writer.write(file_name, buffer.data, offset + begin)
    return finite


class _Note:
    """Keeps a node's last figures, and puts them where whoever waits can read them."""

    def __init__(self, file: Path, run: str) -> None:
        self.metrics: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        self._file = file
        self._run = run
        self._counted = 0
        self._lock = threading.Lock()
        self._last = 0.0
        self._write(None, None)

    def keep(self, told: Mapping[str, Any]) -> None:
        """Keep what is to be in the record; what JSON cannot hold is told now, not at the end."""
        self.notes |= json.loads(json.dumps(dict(told)))

    def take(self, done: float | None, metrics: Mapping[str, float]) -> None:
        """A trainer's report."""
        figures = {str(name): float(v) for name, v in metrics.items() if math.isfinite(v)}
        left = figures.pop(SECONDS_LEFT, None)  # it is true at one moment only
        self.metrics |= figures
        if done is not None:
            done = min(max(float(done), 0.0), 1.0)
        if time.monotonic() - self._last >= _OFTEN or done == 1:
            self._write(done, left)

    def count(self, nbytes: int, total: int) -> None:
        """A merge's progress, from any of its threads."""
        with self._lock:
            self._counted += nbytes
            if time.monotonic() - self._last >= _OFTEN:
                self._write(min(self._counted / max(total, 1), 1.0), None)

    def _write(self, done: float | None, left: float | None) -> None:
        self._last = time.monotonic()
        content = {"run": self._run, "done": done, SECONDS_LEFT: left, "metrics": self.metrics}
        with contextlib.suppress(OSError):  # what is only shown must not end a training
            write_note(self._file, json.dumps(content), durable=False)


@contextlib.contextmanager
def _captured(log: IO[str], *, wanted: bool) -> Any:
    """Put what this process prints into the log, C libraries included."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    try:
        for number, _ in saved:
            os.dup2(log.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
