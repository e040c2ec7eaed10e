"""Walk a plan: children first, independent nodes at the same time, nothing twice.

The scheduler holds no state that a crash could lose: what is done is in the store, what is not is
planned again.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import queue
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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
from .node import (
    DamagedError,
    LeafChangedError,
    OnTheWay,
    Source,
    Task,
    leaf_changed,
    perform,
)
from .plan import NodePlan, Plan, check, node_seed
from .store import DEFAULT_STORE, NoResultError, Store, content_digest
from .stream import default_workers
from .tree import FineTune, Load, Merge, Operation, Train, Tree
from .writer import PARTIAL_SUFFIX, check_output, flush, place, remove, remove_stale

State = Literal["waiting", "running", "done", "kept", "failed", "skipped", "fused"]
KEEPS = ("all", "root")
_ATTEMPTS = 3  # for a node whose worker was lost, and for a result that does not stay as it was
_POLL = 0.25  # seconds between two looks at how far trainers are
_SHARE = 0.1  # of the time, at most, goes into such looks
_RESOURCES = "resources"


@dataclass(frozen=True)
class Event:
    """Something that a watcher may show.

    Attributes:
        node: which node.
        state: what it is now; `kept` was there already, `fused` is merged on the way, in the
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
        self.order = {node: number for number, node in enumerate(plan.nodes)}
        self.there: set[str] = set()  # keys of results that are in the store
        self.waits: dict[str, set[str]] = {}  # node → keys of inputs that it waits for
        self.readers: dict[str, set[str]] = {}  # key → nodes that still have to read it
        self.ready: list[tuple[int, str]] = []  # a heap of nodes, in the plan's order
        self.running: dict[Future[dict[str, Any]], str] = {}
        self.busy: set[str] = set()  # keys of what runs
        self.finished: queue.SimpleQueue[Future[dict[str, Any]]] = queue.SimpleQueue()
        self.next_look = 0.0
        self.failed: dict[str, Exception] = {}
        self.lost: Counter[str] = Counter()  # node → how often its worker was
        self.damaged: Counter[str] = Counter()  # key → how often its result was
        self.made: set[str] = set()  # keys of what this run made
        self.pinned: tuple[int, set[str]] = (0, set())
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
        self._drop_damaged(damaged)
        self.plan = check(
            self.tree, done=self.store.has, digest=self.digests.get, fuse=self.fuse
        )  # fmt: skip
        self.plan.raise_problems()

    def go(self) -> None:
        """Carry out all that is not done."""
        try:
            self._survey()
            self._submit_ready()
            while self.running:
                with contextlib.suppress(queue.Empty):
                    self._finish(self.finished.get(timeout=_POLL))
                    while True:
                        self._finish(self.finished.get_nowait())
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

    def _survey(self) -> None:
        """Ask the store what is there, and note what the root still needs and waits for."""
        self.there.clear()
        asked: set[str] = set()
        wanted: dict[str, str] = {}  # what occurs twice in a tree is made once
        pending = [self.tree.root]
        while pending:
            node = pending.pop()
            if isinstance(self.tree.operation(node), Load):
                continue
            key = self.key(node)
            if key not in asked and self.store.has(key):
                self.there.add(key)
            asked.add(key)
            if key not in self.there:
                if not self.plan.nodes[node].fused:
                    wanted.setdefault(key, node)
                pending += self.tree.inputs(node)
        self.waits, self.readers, self.ready = {}, {}, []
        for key, node in wanted.items():
            keys = self._keys_read_by(node)
            for read in keys:
                self.readers.setdefault(read, set()).add(node)
            self.waits[node] = keys - self.there
            if not self.waits[node] and key not in self.busy:
                self._is_ready(node)

    def _is_ready(self, node: str) -> None:
        if node not in self.failed:
            heapq.heappush(self.ready, (self.order[node], node))

    def _is_there(self, node: str) -> bool:
        """Whether a node's checkpoint can be read."""
        return isinstance(self.tree.operation(node), Load) or self.key(node) in self.there

    def _read_by(self, node: str) -> list[str]:
        """The nodes whose checkpoints a node reads: through inputs that are merged on the way."""
        found = []
        for name in self.tree.inputs(node):
            on_the_way = self.plan.nodes[name].fused and not self._is_there(name)
            found += self._read_by(name) if on_the_way else [name]
        return found

    def _keys_read_by(self, node: str) -> set[str]:
        """Keys of the results that a node reads."""
        return {
            self.key(name) for name in self._read_by(node)
            if not isinstance(self.tree.operation(name), Load)
        }  # fmt: skip

    def _submit_ready(self) -> None:
        while self.ready:
            _, node = heapq.heappop(self.ready)
            if self.store.has(self.key(node)):  # another run was quicker
                self._tell(Event(node, "kept"))
                self._arrived(node)
                continue
            try:
                self._submit(self.plan.nodes[node])
            except NoResultError:  # another run, which keeps less, has just removed an input
                self._survey()

    def _arrived(self, node: str) -> None:
        """A node's result is there: what waited for it alone can begin."""
        key = self.key(node)
        self.there.add(key)
        for above in self.readers.get(key, ()):
            if key in self.waits[above]:
                self.waits[above].discard(key)
                if not self.waits[above]:
                    self._is_ready(above)
        for read in self._keys_read_by(node):
            self.readers.get(read, set()).discard(node)

    def _drop_damaged(self, key: str) -> None:
        """Remove a result that is not what it was, so that it is made again.

        Raises:
            StoreError: it was made again often enough.
        """
        self.damaged[key] += 1
        if self.damaged[key] >= _ATTEMPTS:
            raise StoreError(
                f"the store {self.store.folder} does not keep what is written: the result {key} "
                f"was damaged {_ATTEMPTS} times"
            )
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
        future = self.executor.submit(perform, task, **more)
        self.running[future] = node.node
        self.busy.add(task.key)
        future.add_done_callback(self.finished.put)

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
        return OnTheWay(
            node, self.key(node), operation, sources, self._base(operation), self.tree.model(node)
        )

    def _base(self, operation: Operation) -> Source | None:
        merges = isinstance(operation, Merge) and operation.base is not None
        return self._file(operation.base) if merges else None  # type: ignore[union-attr, arg-type]

    def _source(self, node: str) -> Source:
        operation = self.tree.operation(node)
        if isinstance(operation, Load):
            return replace(self._file(operation.path, node), model=self.tree.model(node))
        entry = self.store.entry(self.key(node))
        self.found.setdefault(node, entry.record)
        return Source(
            node, entry.path.absolute(), str(entry.record.get("digest")), entry.key,
            merged=isinstance(operation, Merge), model=self.tree.model(node),
        )  # fmt: skip

    def _file(self, path: Path, node: str = "") -> Source:
        return Source(node or path.name, path.absolute(), self.digests[path], None)

    def _finish(self, future: Future[dict[str, Any]]) -> None:
        node = self.running.pop(future)
        self.busy.discard(self.key(node))
        try:
            record = future.result()
        except DamagedError as error:
            self._drop_damaged(error.key)
            for name, of in self.plan.nodes.items():
                if error.key == of.key:
                    self._tell(Event(name, "waiting", message="its result was damaged"))
            self._tell(Event(node, "waiting", message=f"{error}: it is made again"))
            self._survey()
            return
        except SoupError as error:
            if isinstance(error, LeafChangedError):
                self.store.forget_digest(error.path)
            self._fail(node, error)
            return
        except Exception as error:  # noqa: BLE001  # the worker or the way to it broke, not the node
            self.lost[node] += 1
            why = str(error) or type(error).__name__
            if self.lost[node] >= _ATTEMPTS:
                self._fail(node, RunError(f"its worker was lost {_ATTEMPTS} times: {why}"))
            else:
                self._tell(Event(node, "waiting", message=f"its worker was lost: {why}"))
                self._is_ready(node)
            return
        self.computed.append(node)
        self.made.add(self.key(node))
        self.found[node] = record
        self._tell(Event(node, "done", 1.0, record.get("metrics", {})))
        self._arrived(node)
        if self.keep == "root":
            self._drop_inputs(node)

    def _drop_inputs(self, node: str) -> None:
        """Remove what this run made for a node, unless another node or another tree wants it."""
        for key in self._keys_read_by(node) & self.made:
            if not self.readers.get(key) and key not in self._wanted_elsewhere():
                self.store.drop(key)

    def _wanted_elsewhere(self) -> set[str]:
        """Keys of the other trees that were run here."""
        changed = self.store.pins_changed()
        if self.pinned[0] != changed:
            root, pins = self.key(self.tree.root), self.store.pinned()
            every = set().union(*(keys for key, keys in pins.items() if key != root))
            self.pinned = (changed, every)
        return self.pinned[1]

    def _fail(self, node: str, error: Exception) -> None:
        self.failed[node] = error
        self._tell(Event(node, "failed", message=str(error)))

    def _look(self) -> None:
        """Tell what runs, and how far trainers are; a cluster's futures do not know."""
        begin = time.monotonic()
        if begin < self.next_look:
            return
        for node in self.running.values():
            try:
                content = json.loads(self.store.progress(self.key(node)).read_bytes())
            except (OSError, ValueError):
                continue  # it waits for a worker
            self._tell(Event(node, "running", content.get("done"), content.get("metrics", {})))
        end = time.monotonic()
        self.next_look = end + max(_POLL, (end - begin) / _SHARE)

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
        raise RunError(*lines)


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
        flush(partial)
        place(partial, output, force=force)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        remove(partial)
    return output


def _verify(source: Source, copy: Path) -> None:
    try:
        same = content_digest(copy) == source.digest
    except CheckpointError:
        same = False
    if not same:
        if source.key is None:
            raise leaf_changed(source.path)
        raise DamagedError(f"the stored result of {source.node} is damaged", source.key)
