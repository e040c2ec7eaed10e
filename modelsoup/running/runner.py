"""Walk a plan: children first, independent nodes at the same time, nothing twice.

The scheduler holds no state that a crash could lose: what is done is in the store, what is not is
planned again.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import os
import queue
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import (
    CheckpointError,
    OutputError,
    ParameterError,
    RunError,
    SoupError,
    StoreError,
    listed,
    nearest,
)
from ..files.checkpoint import SUFFIX, StrPath, open_checkpoint
from ..files.digest import FileDigest
from ..files.placing import LINEAGE_KEY, check_apart, check_output, remove_stale
from ..files.writer import CheckpointWriter
from ..merging.merge import DEFAULT_OUTPUT
from ..merging.threads import check_workers, default_workers
from ..trees.keys import (
    checkpoints_read,
    files_beside,
    files_read,
    node_seed,
    trainer_of,
    training_of,
)
from ..trees.operations import FineTune, Load, Merge, Operation, Train, Tree
from ..trees.plan import NodePlan, Plan, check, lie_apart
from ..trees.store import (
    DEFAULT_STORE,
    Companions,
    Contents,
    NoResultError,
    Store,
    companions_of,
    content_digest,
    digest_of,
)
from ..trees.trainer import SECONDS_LEFT, build_options, named_files, options_as_json
from .node import (
    DamagedError,
    LeafChangedError,
    NodeError,
    OnTheWay,
    Source,
    Task,
    leaf_changed,
    perform,
)

State = Literal["waiting", "running", "done", "kept", "failed", "skipped", "fused"]
KEEPS = ("all", "root")
_ATTEMPTS = 3  # for a node whose worker was lost, and for a result that does not stay as it was
_POLL = 0.25  # seconds between two looks at how far trainers are
_SHARE = 0.1  # of the time, at most, goes into such looks
_DAMAGED = "its result was damaged"
HEARTBEAT = 60.0  # seconds after which what still runs is told again
_RESOURCES = "resources"
_NO_NAME = re.compile(r"^\.|[^\w .#@+=,()-]")  # what stands as %2F in the name of a node's folder
_LONG = 150  # bytes of such a name; systems allow 255


@dataclass(frozen=True)
class Event:
    """Something that a watcher may show.

    Attributes:
        node: which node.
        state: what it is now; `kept` was there already, `fused` is merged on the way, in the
            merge above it.
        done: the share of a training that is done, where it is told.
        metrics: a trainer's last figures.
        message: why it waits, failed or is tried again.
        seconds_left: of a training, where it is told.
    """

    node: str
    state: State
    done: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    seconds_left: float | None = None


Watch = Callable[[Event], None]
_Future = Future[tuple[dict[str, Any], bool]]


@dataclass(frozen=True)
class RunReport:
    """What a run did.

    Attributes:
        output: the root's checkpoint, where it was asked for.
        plan: what was carried out.
        records: node name → its record, for all nodes in the store that the root is made of.
        computed: the nodes that this run carried out, in the order in which they finished; not
            those that another run on the same store did meanwhile.
        was_there: whether the output was this very result already, and was left as it is.
    """

    output: Path | None
    plan: Plan
    records: Mapping[str, Mapping[str, Any]]
    computed: tuple[str, ...]
    was_there: bool = False

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
            "was_there": self.was_there,
            "computed": list(self.computed),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "nodes": {node: dict(record) for node, record in self.records.items()},
        }


def run(
    tree: Tree, output: StrPath | None = DEFAULT_OUTPUT, *, store: StrPath = DEFAULT_STORE,
    executor: Executor | None = None, workers: int | None = None, keep: str = "all",
    fuse: bool = False, force: bool = False, planned: Callable[[Plan], None] | None = None,
    watch: Watch | None = None, shown: StrPath | None = None, model_card: bool = False,
) -> RunReport:  # fmt: skip
    """Carry out a tree, and put the root's checkpoint in its place.

    Run it again after any interruption: what is finished is never done again.

    Args:
        tree: what to do; see `read_tree` and `binary_tree`.
        output: a path that ends in `.safetensors`, or, where the leaves are model folders, a
            folder; None leaves the result in the store.
        store: the folder of results; several runs may share it.
        executor: where nodes run; None runs them in threads of this process.
        workers: how many nodes run at the same time; None is one, or as many as the executor can.
        keep: `all` results stay in the store, or only the `root`'s.
        fuse: make merges of merges in one pass, where every tensor is merged element by element:
            the same bytes, and nothing in between is written or kept.
        force: replace an existing output.
        planned: called with the plan, its warnings included, before a node is begun.
        watch: called, from this thread, when a node's state changes, and each minute while it runs.
        shown: a folder in which each trainer has one, of its node's name, for what a person looks
            at, such as pictures; made by the first trainer that leaves any. None has none kept.
        model_card: write a model card, README.md, into the folder that the output is.

    Raises:
        PlanError: the tree has problems; nothing was started.
        OutputError: the output exists and is not this result, or cannot be written.
        RunError: nodes failed, a line or more for each; all that did not need them was finished.
            Its `__cause__` is what the first of them raised, with its traceback.
        KeyboardInterrupt: as it came; what was finished is kept.
    """
    if keep not in KEEPS:
        raise ParameterError(f"keep is {keep!r}{nearest(keep, KEEPS)} (expected all or root)")
    check_workers(workers)
    plan = check(tree, fuse=fuse)
    plan.raise_problems()
    own = Store(store)
    own.remove_strays()
    target = None if output is None else _target(plan, Path(output), own, force=force)
    if model_card and not any(isinstance(made, Merge) for _, made in tree.operations()):
        raise ParameterError("a model card tells of merges, and there is none in this tree")
    if model_card and target is not None and target.suffix == SUFFIX:
        raise OutputError(
            f"the output {target} is one file, and a model card goes into a folder: name a folder"
        )
    if target is not None and shown is not None and not lie_apart(target, Path(shown)):
        raise OutputError(
            f"the output {target} and the folder {shown}, for what trainers show, are in one place"
        )
    leaves = _read_leaves(tree, own)
    plan = leaves.know(plan, own, fuse=fuse)
    damaged = _remove_damaged(plan, own)
    if damaged:
        again = damaged if keep == "all" else ()
        plan = leaves.know(plan, own, fuse=fuse, wanted=again)
    was_there = target is not None and _is_there(plan, own, leaves, target)
    if target is not None:
        remove_stale(target)
        check_output(target, force=force or was_there)
    plan = replace(plan, warnings=(*plan.warnings, *made_otherwise(plan, own)))
    if planned is not None:
        planned(plan)
    threads = None if executor is not None else ThreadPoolExecutor(workers or 1)
    try:
        walk = _Walk(
            plan, own, leaves, executor or threads, watch or (lambda _: None), keep, fuse,  # type: ignore[arg-type]
            limit=workers, capture=threads is None,
            shown=None if shown is None else Path(shown).absolute(),
        )  # fmt: skip
        walk.tell_damaged(damaged)
        while True:
            walk.go()
            if target is None or was_there:
                break
            try:
                _export(walk.root(), target, tree if model_card else None, force=force)
                break
            except DamagedError as error:
                walk.again(error.key)
            except LeafChangedError as error:
                own.forget_digest(error.path)
                raise
    finally:
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
    return RunReport(target, walk.plan, walk.records(), tuple(walk.computed), was_there)


@dataclass(frozen=True)
class _Leaves:
    """What the user's files held when keys were made of them, whatever they hold now."""

    digests: Mapping[Path, str]
    companions: Mapping[Path, Companions]
    contents: Mapping[tuple[Path, ...], Contents]  # of what trainers and merges name beside

    def know(self, plan: Plan, store: Store, *, fuse: bool, wanted: Collection[str] = ()) -> Plan:
        """The plan with what is done, now that all keys can be told."""
        plan = plan.renewed(
            done=store.has, digest=self.digests.get, companions=self.companions.get,
            contents=lambda files: self.contents.get(tuple(files)), fuse=fuse, wanted=wanted,
        )  # fmt: skip
        plan.raise_problems()
        return plan


def _read_leaves(tree: Tree, store: Store) -> _Leaves:
    """Read every file of the user's once, unless it did not change since it was read."""
    paths = checkpoints_read(tree)
    folders = [path for path in paths if path.is_dir()]
    trainings = (training_of(operation) for _, operation in tree.operations())
    named = dict.fromkeys(tuple(named_files(*trainer_of(t))) for t in trainings if t is not None)
    for _, operation in tree.operations():
        named |= dict.fromkeys(files for _, files in files_beside(operation))
    with ThreadPoolExecutor(default_workers()) as pool:
        digests = pool.map(store.digest_now, paths)
        companions = pool.map(store.companions_now, folders)
        contents = pool.map(store.contents_now, named)
        return _Leaves(
            dict(zip(paths, digests, strict=True)), dict(zip(folders, companions, strict=True)),
            dict(zip(named, contents, strict=True)),
        )  # fmt: skip


def _target(plan: Plan, output: Path, store: Store, *, force: bool) -> Path:
    """The output's path, checked before anything is done for it."""
    tree = plan.tree
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
    # A leaf, or one with a lineage, may be this very result: known once the leaves are read.
    may_be = isinstance(tree.operation(tree.root), Load) or _has_lineage(output)
    check_output(output, force=force or may_be)
    inputs = files_read(tree)
    inputs += [file for p in checkpoints_read(tree) for file in open_checkpoint(p).files]
    check_apart(output, [*inputs, store.folder])
    for planned in plan.nodes.values():
        for path in planned.outputs:
            if not lie_apart(output, path):
                raise OutputError(
                    f"the output {output} and {path}, which {planned.node} writes, are in one "
                    f"place: name two places apart"
                )
    return output


def _has_lineage(output: Path) -> bool:
    try:
        return LINEAGE_KEY in open_checkpoint(output).metadata
    except CheckpointError:
        return False


def _is_there(plan: Plan, store: Store, leaves: _Leaves, output: Path) -> bool:
    """Whether an output is the root's result already, all of it."""
    root = plan.nodes[plan.tree.root]
    if not output.exists():
        return False
    if isinstance(root.operation, Load):
        path, digest = root.operation.path, leaves.digests[root.operation.path]
    elif root.done and root.key is not None:
        entry = store.entry(root.key)
        path, digest = entry.path, entry.record["digest"]
    else:
        return False
    try:
        if content_digest(output) != digest:
            return False
    except (CheckpointError, OSError):
        return False
    return output.is_file() or _beside(output) == _beside(path)


def _beside(folder: Path) -> dict[str, str | None]:
    """What a model folder holds: the digests of what goes along, and the names of all else."""
    found: dict[str, str | None] = dict.fromkeys(
        str(path.relative_to(folder)) for path in folder.rglob("*")
    )
    return found | {name: digest for name, digest in companions_of(folder)}  # noqa: C416


def _remove_damaged(plan: Plan, store: Store) -> list[str]:
    """Remove results that are not what they were, whether or not they are needed; their nodes."""
    keys = {node.key: name for name, node in plan.nodes.items() if node.key is not None}
    with ThreadPoolExecutor(default_workers()) as pool:
        found = zip(keys, pool.map(store.is_damaged, keys), strict=True)
        damaged = [key for key, is_so in found if is_so]
    for key in damaged:
        store.drop(key)
    return [keys[key] for key in damaged]


def made_otherwise(plan: Plan, store: Store) -> list[str]:
    """A sentence for each result that is kept although options of its trainer changed.

    They are options that the trainer does not count as part of the result.
    """
    said = []
    for name, node in plan.nodes.items():
        training = training_of(node.operation)
        if training is None or not node.done or node.skipped or node.key is None:
            continue
        trainer, _ = trainer_of(training)
        try:
            earlier = build_options(trainer, store.entry(node.key).record["options"])
        except (SoupError, KeyError):  # the trainer had other options then
            continue
        now = options_as_json(build_options(trainer, training.options))
        changed = [
            f"{option} is {now[option]!r}, and was {value!r}"
            for option, value in options_as_json(earlier).items()
            if now[option] != value
        ]
        if changed:
            said.append(
                f"{name}: its result is kept, which these options do not change: "
                f"{listed(changed)}; what they ask for is not done again"
            )
    return said


class _Walk:
    """One walk over a plan: what runs, what is done, what failed."""

    def __init__(
        self, plan: Plan, store: Store, leaves: _Leaves, executor: Executor, watch: Watch,
        keep: str, fuse: bool, *, limit: int | None, capture: bool, shown: Path | None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.tree = plan.tree
        self.store = store
        self.leaves = leaves
        self.executor = executor
        self.watch = watch
        self.keep = keep
        self.fuse = fuse
        self.limit = limit  # how many nodes run at the same time
        at_once = limit or getattr(executor, "workers", None)  # else its hosts' cores are unknown
        self.merge_workers = None if at_once is None else max(1, default_workers() // at_once)
        self.capture = capture
        self.shown = shown
        self.id = os.urandom(8).hex()
        self.order = {node: number for number, node in enumerate(plan.nodes)}
        self.there: set[str] = set()  # keys of results that are in the store
        self.waits: dict[str, set[str]] = {}  # node → keys of inputs that it waits for
        self.readers: dict[str, set[str]] = {}  # key → nodes that still have to read it
        self.ready: list[tuple[int, str]] = []  # a heap of nodes, in the plan's order
        self.running: dict[_Future, str] = {}
        self.busy: set[str] = set()  # keys of what runs
        self.finished: queue.SimpleQueue[_Future] = queue.SimpleQueue()
        self.next_look = 0.0
        self.failed: dict[str, Exception] = {}
        self.lost: Counter[str] = Counter()  # node → how often its worker was
        self.damaged: Counter[str] = Counter()  # key → how often its result was
        self.made: set[str] = set()  # keys of what this run made
        self.pinned: tuple[int, set[str]] = (0, set())
        self.wanted: list[str] = []  # besides the root
        self.computed: list[str] = []
        self.found: dict[str, Mapping[str, Any]] = {}  # records of what may be removed again
        self.told: dict[str, tuple[Event, float]] = {}  # and when
        keys = {n: node.key for n, node in plan.nodes.items() if node.key and node.kind != "load"}
        place = str(self.tree.graph.nodes[self.tree.root].get("place") or "")
        store.pin(self.key(self.tree.root), keys, plan=place.rsplit(":", 2)[0])
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

    def tell_damaged(self, nodes: Sequence[str]) -> None:
        """Tell which results were damaged, and have them made again if they are to be kept."""
        if self.keep == "all":
            self.wanted = list(nodes)
        for node in nodes:
            again = self.wanted or not self.plan.nodes[node].skipped
            said = "it is made again" if again else "it is removed"
            self._tell(
                Event(node, "waiting" if again else "skipped", message=f"{_DAMAGED}: {said}")
            )

    def again(self, damaged: str) -> None:
        """Forget a result that turned out to be damaged, and plan once more."""
        self._drop_damaged(damaged)
        self.plan = self.leaves.know(self.plan, self.store, fuse=self.fuse)

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
        pending = [self.tree.root, *self.wanted]
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
        """Whether a node's result is in the store."""
        return self.key(node) in self.there

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
        while self.ready and (self.limit is None or len(self.running) < self.limit):
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
            self.merge_workers, self.capture, self.id, self._shown_of(node.node),
            tuple(self._beside(operation)),
        )  # fmt: skip
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

    def _shown_of(self, node: str) -> Path | None:
        return None if self.shown is None else self.shown / folder_name(node)

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

    def _beside(self, operation: Operation) -> Iterator[Source]:
        """Adapters and auxiliary inputs of a merge, as they were when keys were made of them."""
        for path, files in files_beside(operation):
            digests = [FileDigest(n, 0, digest) for n, digest in self.leaves.contents[files]]
            yield Source(path.name, path.absolute(), digest_of(digests), None)

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
        return Source(node or path.name, path.absolute(), self.leaves.digests[path], None)

    def _finish(self, future: _Future) -> None:
        node = self.running.pop(future)
        self.busy.discard(self.key(node))
        try:
            record, made_here = future.result()
        except DamagedError as error:
            self._drop_damaged(error.key)
            for name, of in self.plan.nodes.items():
                if error.key == of.key:
                    self._tell(Event(name, "waiting", message=_DAMAGED))
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
        self.found[node] = record
        if made_here:
            self.computed.append(node)
            self.made.add(self.key(node))
            self._tell(Event(node, "done", 1.0, record.get("metrics", {})))
        else:
            self._tell(Event(node, "kept", message="another run made it"))
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
            root = self.key(self.tree.root)
            every = set().union(*(pin.keys for pin in self.store.pinned() if pin.root != root))
            self.pinned = (changed, every)
        return self.pinned[1]

    def _fail(self, node: str, error: Exception) -> None:
        if isinstance(error, NodeError) and error.__cause__ is None:  # that is in another process
            error.__cause__ = _ElsewhereError(f"\n{error.trace}")
        self.failed[node] = error
        self._tell(Event(node, "failed", message=str(error)))

    def _look(self) -> None:
        """Tell what runs, and how far it is; a cluster's futures do not know."""
        begin = time.monotonic()
        if begin < self.next_look:
            return
        for node in self.running.values():
            try:
                content = json.loads(self.store.progress(self.key(node)).read_bytes())
            except (OSError, ValueError):
                continue  # it waits for a worker
            done, left = content.get("done"), content.get(SECONDS_LEFT)
            metrics = content.get("metrics", {})
            if content.get("run") == self.id:
                self._tell(Event(node, "running", done, metrics, seconds_left=left))
                continue
            with self.store.lock(self.key(node), wait=False) as free:
                if not free:
                    said = "another run is at it"
                    self._tell(Event(node, "waiting", done, metrics, said, left))
        end = time.monotonic()
        self.next_look = end + max(_POLL, (end - begin) / _SHARE)

    def _tell(self, event: Event) -> None:
        told, then = self.told.get(event.node, (None, 0.0))
        now = time.monotonic()
        if told != event or (event.state == "running" and now - then >= HEARTBEAT):
            self.told[event.node] = event, now
            self.watch(event)

    def _raise_failures(self) -> None:
        if not self.failed:
            return
        lines: list[str] = []
        for node, error in self.failed.items():
            first, *more = error.args or (type(error).__name__,)
            key = self.key(node)
            log = f" (log: {self.store.log(key)})" if self.store.has_log(key) else ""
            lines += [f"{node}: {first}{log}", *(f"  {line}" for line in more)]
        raise RunError(*lines) from next(iter(self.failed.values()))


def folder_name(node: str) -> str:
    """A node's name as that of a folder, another one for each; what no folder may have as `%2F`."""
    name = _NO_NAME.sub(lambda found: _escaped(found[0]), node) or "%"
    if len(name.encode()) <= _LONG:
        return name
    digest = hashlib.sha256(node.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{name.encode()[:_LONG].decode(errors='ignore')}%{digest}"


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))


class _ElsewhereError(Exception):
    """A traceback of another process, as the cause of what was raised there."""


def _export(source: Source, output: Path, of: Tree | None, *, force: bool) -> None:
    """Copy the root's checkpoint to where it is wanted, whole or not at all.

    Args:
        source: the root's checkpoint.
        output: where it is wanted.
        of: the tree, if a model card is to tell of it; None writes none.
        force: replace what is there.

    Raises:
        DamagedError: it is not what it was when it was made.
    """
    try:
        with CheckpointWriter(output, (), {}, force=force) as writer:
            copy = writer.path("")
            if source.path.is_dir():
                shutil.copytree(source.path, copy, dirs_exist_ok=True)
            else:
                shutil.copyfile(source.path, copy)
            _verify(source, copy)
            if of is not None:
                from ..merging.card import CARD  # with YAML, which a run seldom needs
                from ..trees.card import tree_card

                (copy / CARD).write_text(tree_card(of, output.name, copy), "utf-8")
            writer.commit()
    except OSError as error:
        if error.filename is not None and Path(error.filename).is_relative_to(source.path):
            raise StoreError(f"cannot read {error.filename}: {error.strerror}") from error
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error


def _verify(source: Source, copy: Path) -> None:
    try:
        same = content_digest(copy) == source.digest
    except CheckpointError:
        same = False
    if not same:
        if source.key is None:
            raise leaf_changed(source.path)
        raise DamagedError(f"the stored result of {source.node} is damaged", source.key)
