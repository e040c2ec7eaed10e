"""Walk a plan: children first, independent nodes at the same time, nothing twice.

The scheduler holds no state that a crash could lose: what is done is in the store, what is not is
planned again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .checkpoint import SUFFIX, StrPath, open_checkpoint
from .engine import DEFAULT_OUTPUT
from .errors import (
    CheckpointError,
    OutputError,
    ParameterError,
    RunError,
    SoupError,
    StoreError,
    nearest,
)
from .node import DamagedError, LeafChangedError, OnTheWay, Source, Task, perform
from .plan import NodePlan, Plan, check, node_seed
from .store import DEFAULT_STORE, Store, content_digest
from .stream import default_workers
from .tree import FineTune, Load, Merge, Operation, Train, Tree
from .writer import PARTIAL_SUFFIX, check_output, remove_stale, replace_folder

State = Literal["waiting", "running", "done", "kept", "failed", "skipped", "fused"]
KEEPS = ("all", "root")
_ATTEMPTS = 3  # for a node whose worker was lost
_POLL = 0.25  # seconds between two looks at how far trainers are
_RESOURCES = "resources"


@dataclass(frozen=True)
class Event:
    """Something that a watcher may show.

    Attributes:
        node: which node.
        state: what it is now; `kept` was done before this run, `fused` is merged on the way, in the
            merge above it.
        done: the share of a training that is done, where it is told.
        metrics: a trainer's last figures.
        message: why, where it failed or is tried again.
    """

    node: str
    state: State
    done: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


Watch = Callable[[Event], None]


@dataclass(frozen=True)
class RunReport:
    """What a run did.

    Attributes:
        output: the root's checkpoint, where it was asked for.
        plan: what was carried out.
        records: node name → its record, for all nodes in the store that the root is made of.
        computed: the nodes that this run carried out, in the order in which they finished.
    """

    output: Path | None
    plan: Plan
    records: Mapping[str, Mapping[str, Any]]
    computed: tuple[str, ...]

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that the merges of this run read."""
        return sum(self.records[node]["bytes_read"] for node in self.computed)

    @property
    def bytes_written(self) -> int:
        """Tensor bytes that this run wrote into the store."""
        return sum(self.records[node]["bytes_written"] for node in self.computed)

    def as_json(self) -> dict[str, Any]:
        """Plain data: what `soup run --json` prints."""
        return {
            "output": None if self.output is None else str(self.output),
            "computed": list(self.computed),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "nodes": {node: dict(record) for node, record in self.records.items()},
        }


def run(
    tree: Tree, output: StrPath | None = DEFAULT_OUTPUT, *, store: StrPath = DEFAULT_STORE,
    executor: Executor | None = None, workers: int = 1, keep: str = "all", fuse: bool = False,
    force: bool = False, watch: Watch | None = None,
) -> RunReport:  # fmt: skip
    """Carry out a tree, and put the root's checkpoint in its place.

    Run it again after any interruption: what is finished is never done again.

    Args:
        tree: what to do; see `read_tree` and `binary_tree`.
        output: a path that ends in `.safetensors`, or, where the leaves are model folders, a
            folder; None leaves the result in the store.
        store: the folder of results; several runs may share it.
        executor: where nodes run; None runs them in threads of this process.
        workers: how many nodes run at the same time, where there is no executor.
        keep: `all` results stay in the store, or only the `root`'s.
        fuse: make merges of merges in one pass, where every tensor is merged element by element:
            the same bytes, and nothing in between is written or kept.
        force: replace an existing output.
        watch: called, from this thread, when a node's state changes.

    Raises:
        PlanError: the tree has problems; nothing was started.
        OutputError: the output exists, or cannot be written.
        RunError: a node failed; all that did not need it was finished.
        SoupError: a node's own error, if only one failed.
        KeyboardInterrupt: as it came; what was finished is kept.
    """
    if keep not in KEEPS:
        raise ParameterError(f"keep is {keep!r}{nearest(keep, KEEPS)} (expected all or root)")
    if workers < 1:
        raise ParameterError(f"workers is {workers}, but must be at least 1")
    check(tree).raise_problems()
    own = Store(store)
    target = None if output is None else _target(tree, Path(output), force=force)
    digests = _digest_leaves(tree, own)
    plan = check(tree, done=own.has, digest=digests.get, fuse=fuse)
    plan.raise_problems()
    threads = None if executor is not None else ThreadPoolExecutor(workers)
    try:
        walk = _Walk(
            plan, own, digests, executor or threads, watch or (lambda _: None), keep, fuse,  # type: ignore[arg-type]
            merge_workers=max(1, default_workers() // workers), capture=threads is None,
        )  # fmt: skip
        while True:
            walk.go()
            try:
                written = None if target is None else _export(walk.root(), target, force=force)
                break
            except DamagedError as error:
                walk.again(error.key)
            except LeafChangedError as error:
                own.forget_digest(error.path)
                raise
    finally:
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
    return RunReport(written, walk.plan, walk.records(), tuple(walk.computed))


def _digest_leaves(tree: Tree, store: Store) -> dict[Path, str]:
    """Read every file of the user's once, unless it did not change since it was read."""
    paths: list[Path] = []
    for _, operation in tree.operations():
        if isinstance(operation, Load):
            paths.append(operation.path)
        elif isinstance(operation, Merge) and operation.base is not None:
            paths.append(operation.base)
        elif isinstance(operation, Train) and operation.start is not None:
            paths.append(operation.start)
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(default_workers()) as pool:
        return dict(zip(unique, pool.map(store.digest_now, unique), strict=True))


def _target(tree: Tree, output: Path, *, force: bool) -> Path:
    """The output's path, checked before anything is done for it."""
    node = tree.root
    while tree.inputs(node):
        node = tree.inputs(node)[0]  # what the first input is, so is the result
    leaf = tree.operation(node)
    path = leaf.path if isinstance(leaf, Load) else getattr(leaf, "start", None)
    is_folder = path is not None and open_checkpoint(path).is_folder
    if is_folder != (output.suffix != SUFFIX):
        wanted = "a folder" if is_folder else f"a file that ends in {SUFFIX}"
        are = "folders" if is_folder else "files"
        raise OutputError(f"the models are {are}, so the output {output} must be {wanted}")
    for _, operation in tree.operations():
        for path in (getattr(operation, name, None) for name in ("path", "base", "start")):
            if path is not None and output.exists() and output.resolve() == path.resolve():
                raise OutputError(f"the output {output} is one of the inputs")
    check_output(output, force=force)
    return output


class _Walk:
    """One walk over a plan: what runs, what is done, what failed."""

    def __init__(
        self, plan: Plan, store: Store, digests: Mapping[Path, str], executor: Executor,
        watch: Watch, keep: str, fuse: bool, *, merge_workers: int, capture: bool,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.tree = plan.tree
        self.store = store
        self.digests = digests  # of the leaves when keys were made of them, whatever they are now
        self.executor = executor
        self.watch = watch
        self.keep = keep
        self.fuse = fuse
        self.merge_workers = merge_workers
        self.capture = capture
        self.there: set[str] = set()  # nodes whose checkpoints were there when last asked
        self.running: dict[Future[dict[str, Any]], str] = {}
        self.failed: dict[str, Exception] = {}
        self.attempts: dict[str, int] = {}
        self.computed: list[str] = []
        self.found: dict[str, Mapping[str, Any]] = {}  # records of what may be removed again
        self.told: dict[str, Event] = {}
        keys = {n: node.key for n, node in plan.nodes.items() if node.key and node.kind != "load"}
        store.pin(self.key(self.tree.root), keys)
        for name, node in plan.nodes.items():
            if node.done:
                self._tell(Event(name, "kept"))
            elif node.skipped:
                self._tell(Event(name, "skipped"))
            elif node.fused:
                self._tell(Event(name, "fused"))

    def key(self, node: str) -> str:
        key = self.plan.nodes[node].key
        assert key is not None  # the leaves' digests are known
        return key

    def root(self) -> Source:
        return self._source(self.tree.root)

    def records(self) -> dict[str, Mapping[str, Any]]:
        return {node: self._record(node) for node in self.plan.nodes if self._has_record(node)}

    def _has_record(self, node: str) -> bool:
        loads = isinstance(self.tree.operation(node), Load)
        return not loads and (node in self.found or self.store.has(self.key(node)))

    def _record(self, node: str) -> Mapping[str, Any]:
        return self.found.get(node) or self.store.entry(self.key(node)).record

    def again(self, damaged: str) -> None:
        """Forget a result that turned out to be damaged, and plan once more."""
        self._drop(damaged)
        self.plan = check(
            self.tree, done=self.store.has, digest=self.digests.get, fuse=self.fuse
        )  # fmt: skip
        self.plan.raise_problems()

    def go(self) -> None:
        """Carry out all that is not done."""
        try:
            self._submit_ready()
            while self.running:
                done, _ = wait(self.running, timeout=_POLL, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finish(self.running.pop(future), future)
                self._submit_ready()
                self._look()
        except BaseException:
            for future in self.running:
                future.cancel()
            terminate = getattr(self.executor, "terminate", None)
            if terminate is not None:
                terminate()
            raise
        self._raise_failures()

    def _wanted(self) -> list[NodePlan]:
        """What the root still needs, inputs first."""
        wanted, pending = set(), [self.tree.root]
        while pending:
            node = pending.pop()
            if self._is_there(node):
                continue
            if not self.plan.nodes[node].fused:
                wanted.add(node)
            pending += self.tree.inputs(node)
        return [plan for name, plan in self.plan.nodes.items() if name in wanted]

    def _submit_ready(self) -> None:
        for node in self._wanted():
            busy = {self.key(name) for name in self.running.values()}
            if self.key(node.node) in busy or node.node in self.failed:
                continue  # what occurs twice in a tree is made once
            if all(self._is_there(name) for name in self._read_by(node.node)):
                try:
                    self._submit(node)
                except StoreError:
                    # Another run, which keeps less, has just removed an input: it is made again. If
                    # it is still there, the store itself has failed.
                    self.there.clear()
                    if all(self._is_there(name) for name in self._read_by(node.node)):
                        raise

    def _is_there(self, node: str) -> bool:
        """Whether a node's checkpoint can be read; asked often, so what was there is believed."""
        if node not in self.there and (
            isinstance(self.tree.operation(node), Load) or self.store.has(self.key(node))
        ):
            self.there.add(node)
        return node in self.there

    def _read_by(self, node: str) -> list[str]:
        """The nodes whose checkpoints a node reads: through inputs that are merged on the way."""
        found = []
        for name in self.tree.inputs(node):
            on_the_way = self.plan.nodes[name].fused and not self._is_there(name)
            found += self._read_by(name) if on_the_way else [name]
        return found

    def _drop(self, key: str) -> None:
        self.there.clear()
        self.store.drop(key)

    def _submit(self, node: NodePlan) -> None:
        operation = node.operation
        sources = [self._input(name) for name in self.tree.inputs(node.node)]
        frozen: tuple[str, ...] = ()
        if isinstance(operation, Train) and operation.start is not None:
            sources = [self._file(operation.start)]
        if isinstance(operation, FineTune):
            frozen = self._frozen(node.node)
        task = Task(
            self.store.folder.absolute(), self.key(node.node), node.node, operation,
            tuple(sources), self._base(operation), frozen, node_seed(self.tree, node.node),
            self.merge_workers, self.capture,
        )  # fmt: skip
        with contextlib.suppress(OSError):
            self.store.progress(task.key).unlink()
        more: dict[str, Any] = {}
        if isinstance(operation, Train | FineTune) and operation.training.resources:
            more = self._resources(operation.training.resources)
        self.running[self.executor.submit(_perform, task, **more)] = node.node

    def _resources(self, wanted: Mapping[str, float]) -> dict[str, Any]:
        """As keywords for `submit`: only clusters know resources."""
        return {_RESOURCES: dict(wanted)} if hasattr(self.executor, "takes_resources") else {}

    def _frozen(self, node: str) -> tuple[str, ...]:
        """The names that the merge below froze, as far as they are in its result."""
        below = self.tree.inputs(node)[0]
        if not isinstance(self.tree.operation(below), Merge):
            return ()
        return tuple(self._record(below)["frozen"])

    def _input(self, node: str) -> Source | OnTheWay:
        operation = self.tree.operation(node)
        if not self.plan.nodes[node].fused or self._is_there(node):
            return self._source(node)
        assert isinstance(operation, Merge)
        sources = tuple(self._input(name) for name in self.tree.inputs(node))
        return OnTheWay(node, self.key(node), operation, sources, self._base(operation))

    def _base(self, operation: Operation) -> Source | None:
        merges = isinstance(operation, Merge) and operation.base is not None
        return self._file(operation.base) if merges else None  # type: ignore[union-attr, arg-type]

    def _source(self, node: str) -> Source:
        operation = self.tree.operation(node)
        if isinstance(operation, Load):
            return self._file(operation.path, node)
        entry = self.store.entry(self.key(node))
        self.found.setdefault(node, entry.record)
        return Source(
            node, entry.path.absolute(), str(entry.record.get("digest")), entry.key,
            merged=isinstance(operation, Merge),
        )  # fmt: skip

    def _file(self, path: Path, node: str = "") -> Source:
        return Source(node or path.name, path.absolute(), self.digests[path], None)

    def _finish(self, node: str, future: Future[dict[str, Any]]) -> None:
        try:
            record = future.result()
        except DamagedError as error:
            self._drop(error.key)
            self._tell(Event(node, "waiting", message=f"{error}: it is made again"))
            return
        except SoupError as error:
            if isinstance(error, LeafChangedError):
                self.store.forget_digest(error.path)
            self._fail(node, error)
            return
        except Exception as error:  # noqa: BLE001  # the worker or the way to it broke, not the node
            self.attempts[node] = self.attempts.get(node, 0) + 1
            why = str(error) or type(error).__name__
            if self.attempts[node] >= _ATTEMPTS:
                self._fail(node, RunError(f"its worker was lost {_ATTEMPTS} times: {why}"))
            else:
                self._tell(Event(node, "waiting", message=f"its worker was lost: {why}"))
            return
        self.computed.append(node)
        self.found[node] = record
        self._tell(Event(node, "done", 1.0, record.get("metrics", {})))
        if self.keep == "root":
            self._drop_inputs(node)

    def _drop_inputs(self, node: str) -> None:
        """Remove what this run made for a node, unless another node or another tree wants it."""
        wanted = {self.key(name) for plan in self._wanted() for name in self._read_by(plan.node)}
        root = self.key(self.tree.root)
        pins = self.store.pinned()
        elsewhere = set().union(*(keys for key, keys in pins.items() if key != root))
        made = {self.key(name) for name in self.computed} - wanted - elsewhere - {root}
        for name in self._read_by(node):
            if self.key(name) in made:
                self._drop(self.key(name))

    def _fail(self, node: str, error: Exception) -> None:
        self.failed[node] = error
        self._tell(Event(node, "failed", message=str(error)))

    def _look(self) -> None:
        """Tell what runs, and how far trainers are; a cluster's futures do not know."""
        for node in self.running.values():
            try:
                content = json.loads(self.store.progress(self.key(node)).read_bytes())
            except (OSError, ValueError):
                continue  # it waits for a worker
            self._tell(Event(node, "running", content.get("done"), content.get("metrics", {})))

    def _tell(self, event: Event) -> None:
        if self.told.get(event.node) != event:
            self.told[event.node] = event
            self.watch(event)

    def _raise_failures(self) -> None:
        if not self.failed:
            return
        lines = [
            f"{node}: {error} (log: {self.store.log(self.key(node))})"
            if self.store.log(self.key(node)).exists() and not isinstance(error, RunError)
            else f"{node}: {error}"
            for node, error in self.failed.items()
        ]
        raise RunError("\n".join(lines))


def _perform(task: Task) -> dict[str, Any]:
    """On the worker: carry out a node, and note that it has begun."""
    with contextlib.suppress(OSError):
        Store(task.store).progress(task.key).write_text("{}")
    # Where a process has other threads, they may print too, and not for this node's log.
    alone = threading.current_thread() is threading.main_thread()
    return perform(replace(task, capture=task.capture and alone))


def _export(source: Source, output: Path, *, force: bool) -> Path:
    """Copy the root's checkpoint to where it is wanted, whole or not at all.

    Raises:
        DamagedError: it is not what it was when it was made.
    """
    check_output(output, force=force)
    remove_stale(output)
    partial = output.with_name(f".{output.name}.{os.urandom(4).hex()}{PARTIAL_SUFFIX}")
    try:
        if source.path.is_dir():
            shutil.copytree(source.path, partial)
        else:
            shutil.copyfile(source.path, partial)
        _verify(source, partial)
        _flush(partial)
        if partial.is_dir():
            replace_folder(partial, output)
        else:
            os.replace(partial, output)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
    return output


def _verify(source: Source, copy: Path) -> None:
    try:
        same = content_digest(copy) == source.digest
    except CheckpointError:
        same = False
    if not same:
        if source.key is None:
            raise LeafChangedError(source.path)
        raise DamagedError(f"the stored result of {source.node} is damaged", source.key)


def _flush(path: Path) -> None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
