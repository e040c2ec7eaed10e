"""What a tree will do, from headers alone: checked, priced, and compared with what is done already.

`check` finds every problem at once; a plan without problems can be run. What a trainer writes is
taken to be what it says (`tensors`), else what its start has, with what the merge below dropped as
it was in the first model that has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import (
    CheckpointError,
    ParameterError,
    PlanError,
    SoupError,
    counted,
    listed,
    said,
    speaking,
)
from ..files.checkpoint import (
    SUFFIX,
    Checkpoint,
    StrPath,
    must_be_whole,
    open_checkpoint,
)
from ..files.header import Row, read_header
from ..files.placing import overlapped
from ..files.tokenizer import Vocabulary, vocabulary_of
from ..merging.folding import with_adapters
from ..merging.plan import MergePlan, Unmade
from ..merging.planning import plan_merge
from ..merging.recipe import UNION
from ..merging.related import unrelated
from ..merging.renames import parse_model
from ..merging.rules import BASE
from .keys import (
    Digest,
    checkpoints_of,
    described,
    files_read,
    node_key,
    node_seed,
    trainer_of,
)
from .operations import FineTune, Load, Merge, Operation, Train, Tree
from .price import bytes_read_by, memory_of
from .store import Companions, Contents
from .trainer import (
    named_files,
    trainer_fitting,
    trainer_notices,
    trainer_outputs,
    trainer_reshapes,
    trainer_tensors,
)
from .virtual import Signature, elements_of, nbytes_of, virtual

_FUSED = 32  # merges on the way, one in the other: each has a buffer, and calls the next


@dataclass(frozen=True)
class NodePlan:
    """What one node will do.

    Attributes:
        node: its name.
        operation: what it is.
        key: what its result is named by; None where a leaf's content was not read yet.
        done: whether its result is in the store.
        skipped: whether nothing of it is needed, because something above it is done.
        fused: whether it is merged on the way, in the pass of the merge above it.
        signature: the tensors of its result; None where only the trainer knows them.
        merged, kept, dropped, frozen: names of tensors, for merges.
        elements: how many parameters those of each of these groups have in all.
        bytes_read: tensor bytes that it reads: over all passes, and those that it has no use for
            once, for the digests of its inputs.
        bytes_written: tensor bytes of its result; 0 for a `Load`.
        memory: bytes that it needs at most, about; None where only the trainer knows.
        notices: what the user should know.
        outputs: files and folders that its trainer writes beside its result.
        estimates: those of the dropped that are found anew by whatever loads the result.
    """

    node: str
    operation: Operation
    key: str | None
    done: bool = False
    skipped: bool = False
    fused: bool = False
    signature: Signature | None = None
    merged: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    elements: Mapping[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    memory: int | None = None
    notices: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    estimates: tuple[str, ...] = ()

    @property
    def parameters(self) -> int | None:
        """How many elements the result has."""
        if self.signature is None:
            return None
        return sum(elements_of(shape) for _, shape in self.signature.values())

    @property
    def kind(self) -> str:
        """`load`, `train`, `merge` or `finetune`."""
        return type(self.operation).__name__.lower()


@dataclass(frozen=True)
class Plan:
    """A checked tree.

    Attributes:
        tree: what was checked.
        nodes: node name → what it will do, inputs before what is made of them.
        problems: why it cannot be run, one sentence each; empty if it can.
        warnings: what the user should know.
    """

    tree: Tree
    nodes: Mapping[str, NodePlan]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    _checker: _Checker | None = field(default=None, repr=False, compare=False)

    def renewed(
        self, *, done: Callable[[str], bool] | None = None, digest: Digest | None = None,
        companions: Callable[[Path], Companions | None] | None = None,
        contents: Callable[[Sequence[Path]], Contents | None] | None = None, fuse: bool = False,
        wanted: Collection[str] = (),
    ) -> Plan:  # fmt: skip
        """The plan with what is known by now of leaves and results; no header is read again.

        Args:
            done: as in `check`.
            digest: as in `check`.
            companions: as in `check`.
            contents: as in `check`.
            fuse: as in `check`.
            wanted: nodes whose results are to be there though the root may need them no more.
        """
        assert self._checker is not None
        return self._checker.plan(done, digest, companions, contents, fuse=fuse, wanted=wanted)

    def unrelated(self) -> list[str]:
        """What to say of leaves that are merged and look unrelated; a few values of each are read.

        Raises:
            CheckpointError: one cannot be read.
        """
        assert self._checker is not None
        found: dict[str, list[str]] = {}
        for name, plan in self._checker.merge_plans.items():
            leaves = [self.nodes[i].operation for i in self.tree.inputs(name)]
            paths = [leaf.path for leaf in leaves if isinstance(leaf, Load)]
            node = self.nodes[name]
            if len(paths) < len(leaves) or node.done or node.skipped:
                continue
            assert isinstance(node.operation, Merge)
            base = node.operation.base
            models = [open_checkpoint(path) for path in paths]
            for notice in unrelated(plan, models, None if base is None else open_checkpoint(base)):
                _tell(found, notice.message, name)
        return [f"{self._checker.whom(of)}: {said}" for said, of in found.items()]

    @property
    def steps(self) -> list[NodePlan]:
        """What will be carried out, in order: neither leaves that exist nor what is done."""
        return [
            node for node in self.nodes.values()
            if not (node.kind == "load" or node.done or node.skipped or node.fused)
        ]  # fmt: skip

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that the merges read."""
        return sum(node.bytes_read for node in self.steps)

    @property
    def bytes_written(self) -> int:
        """Tensor bytes that are written."""
        return sum(node.bytes_written for node in self.steps)

    @property
    def memory(self) -> int:
        """Bytes that the most demanding merge needs, about; trainers not counted."""
        return max((node.memory or 0 for node in self.steps), default=0)

    def raise_problems(self) -> None:
        """Raise what was found, if anything was.

        Raises:
            PlanError: one line for each problem.
        """
        if self.problems:
            raise PlanError(*self.problems)

    def as_json(self) -> dict[str, Any]:
        """Plain data: what `soup plan --json` prints."""
        return {
            "root": self.tree.root,
            "levels": self.tree.levels,
            "models": len(self.tree.models()),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "memory": self.memory,
            "steps": [node.node for node in self.steps],
            "nodes": [
                {
                    "node": node.node, "operation": node.kind,
                    "level": self.tree.graph.nodes[node.node]["level"],
                    "inputs": self.tree.inputs(node.node), **described(node.operation),
                    "key": node.key, "done": node.done, "skipped": node.skipped,
                    "fused": node.fused,
                    "tensors": None if node.signature is None else len(node.signature),
                    "parameters": node.parameters,
                    "merged": len(node.merged), "kept": len(node.kept),
                    "dropped": list(node.dropped), "frozen": list(node.frozen),
                    "estimates": list(node.estimates),
                    "parameters_of": dict(node.elements),
                    "bytes_read": node.bytes_read, "bytes_written": node.bytes_written,
                    "notices": list(node.notices), "outputs": list(map(str, node.outputs)),
                }
                for node in self.nodes.values()
            ],
        }  # fmt: skip


def check(
    tree: Tree, *, done: Callable[[str], bool] | None = None, digest: Digest | None = None,
    companions: Callable[[Path], Companions | None] | None = None,
    contents: Callable[[Sequence[Path]], Contents | None] | None = None, fuse: bool = False,
    warnings: Sequence[str] = (),
) -> Plan:  # fmt: skip
    """Check and price a tree, reading headers only.

    Args:
        tree: what to check.
        done: whether the result of a key is in the store; None has none.
        digest: the digest of a checkpoint, where it is known without reading it all.
        companions: as in `node_key`.
        contents: as in `node_key`, but None reads none.
        fuse: let merges of merges be made in one pass where they can, with nothing in between.
        warnings: what was noticed before, when the tree was read.

    Returns:
        the plan, with every problem that was found.

    Raises:
        ParameterError: it is no tree.
    """
    if not isinstance(tree, Tree):
        raise ParameterError(
            f"tree is {said(tree)}, but must be a Tree, such as the first of what read_tree gives"
        )
    return _Checker(tree, warnings).plan(done, digest, companions, contents, fuse=fuse)


def _unread(files: Sequence[Path]) -> Contents | None:
    return None


def _tell(told: dict[str, list[str]], sentence: str, node: str) -> None:
    nodes = told.setdefault(sentence, [])
    if node not in nodes[-1:]:
        nodes.append(node)


def lie_apart(first: Path, second: Path) -> bool:
    """Whether neither of two paths leads to, or into, the other's place."""
    return not _overlap(_place(first), _place(second))


def _place(path: Path) -> Path:
    """Where a path leads; a link that is its last part is what would be replaced itself."""
    whole = Path(os.path.abspath(path))
    return whole.parent.resolve() / whole.name


def _overlap(first: Path, second: Path) -> bool:
    """Whether two places are one, or one is in the other."""
    return first == second or first in second.parents or second in first.parents


@dataclass(frozen=True)
class _Merged:
    """What a merge does, whichever models of these signatures it is given."""

    plan: MergePlan
    signature: Signature
    merged: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    frozen: tuple[str, ...]
    estimates: tuple[str, ...]
    elements: Mapping[str, int]
    bytes_read: int
    bytes_written: int
    memory: int
    notices: tuple[str, ...]


@dataclass
class _Checker:
    """Looks at every header once; what is done, and what keys are, may be asked again later."""

    tree: Tree
    warnings: Sequence[str]
    nodes: dict[str, NodePlan] = field(default_factory=dict)  # without keys
    problems: dict[str, list[str]] = field(default_factory=dict)  # sentence → whom it is about
    signatures: dict[str, Signature] = field(default_factory=dict)
    files: dict[Path, Signature] = field(default_factory=dict)
    interned: dict[Any, Signature] = field(default_factory=dict)
    headers: dict[int, tuple[list[Row], Signature]] = field(default_factory=dict)
    merges: dict[Any, _Merged | SoupError] = field(default_factory=dict)
    merge_plans: dict[str, MergePlan] = field(default_factory=dict)  # node → what it does
    vocabularies: dict[Path, Vocabulary | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node, operation in self.tree.operations():
            inputs = [self.nodes[name] for name in self.tree.inputs(node)]
            self.nodes[node] = made = self._node(node, operation, inputs)
            if made.signature is not None:
                self.signatures[node] = made.signature
        self._must_be_apart()

    def plan(
        self, done: Callable[[str], bool] | None, digest: Digest | None,
        companions: Callable[[Path], Companions | None] | None,
        contents: Callable[[Sequence[Path]], Contents | None] | None, *, fuse: bool,
        wanted: Collection[str] = (),
    ) -> Plan:  # fmt: skip
        found = {sentence: list(of) for sentence, of in self.problems.items()}
        faulty = {node for of in found.values() for node in of}
        nodes: dict[str, NodePlan] = {}

        def known(path: Path) -> str | None:
            return digest(path) if digest is not None and path.exists() else None

        for name, node in self.nodes.items():
            if name in faulty:
                nodes[name] = node
                continue
            try:
                keys = [nodes[i].key for i in self.tree.inputs(name)]
                key = node_key(self.tree, name, keys, known, companions, contents or _unread)
                if isinstance(node.operation, Load):
                    _must_be_meant(node.operation, known)
                is_done = key is not None and done is not None and done(key)
                nodes[name] = replace(node, key=key, done=is_done)
            except SoupError as error:
                for line in error.args:
                    _tell(found, line, name)
                nodes[name] = node
            except OSError as error:  # a script that may not be read
                _tell(found, f"cannot read {error.filename}: {error.strerror or error}", name)
                nodes[name] = node
        nodes = self._skip(nodes, wanted)
        if fuse:
            nodes = self._fused(nodes)
        notices: dict[str, list[str]] = {}
        for name, node in nodes.items():
            for notice in node.notices if not node.done and not node.skipped else ():
                _tell(notices, notice, name)
        return Plan(
            self.tree, nodes,
            tuple(f"{self.whom(of, place=True)}: {said}" for said, of in found.items()),
            (*self.warnings, *(f"{self.whom(of)}: {said}" for said, of in notices.items())),
            self,
        )  # fmt: skip

    def whom(self, nodes: Sequence[str], *, place: bool = False) -> str:
        """The first node that something is said of, where it is written, and the others."""
        first, *others = nodes
        where = self.tree.graph.nodes[first].get("place") if place else None
        also = f" (and {listed(others)})" if others else ""
        return f"{where}: {first}{also}" if where else f"{first}{also}"

    def _skip(
        self, nodes: dict[str, NodePlan], wanted: Collection[str]
    ) -> dict[str, NodePlan]:  # fmt: skip
        """Mark what nobody asks for, because what would be made of it is done."""
        needed, pending = set(), [self.tree.root, *wanted]
        while pending:
            node = pending.pop()
            needed.add(node)
            if not nodes[node].done:
                pending += self.tree.inputs(node)
        return {
            name: node if name in needed else replace(node, skipped=True)
            for name, node in nodes.items()
        }

    def _fused(self, nodes: dict[str, NodePlan]) -> dict[str, NodePlan]:
        """Mark the merges that are made on the way, and price what takes them anew."""
        found: dict[str, NodePlan] = {}
        depth: dict[str, int] = {}  # how many merges on the way, one in the other, a merge takes
        plans = dict(self.merge_plans)
        for name, node in nodes.items():
            inputs = self.tree.inputs(name)
            depth[name] = max((depth[i] + 1 for i in inputs if found[i].fused), default=0)
            if name in plans and any(found[i].fused for i in inputs):
                models = [
                    Unmade(plans[i], name=i, node=i, key="") if found[i].fused else model
                    for i, model in zip(inputs, plans[name].models, strict=True)
                ]
                plan = plan_merge(models, plans[name].recipe, base=plans[name].base)
                plans[name] = plan
                node = replace(node, bytes_read=bytes_read_by(plan))  # noqa: PLW2901
            above = list(self.tree.graph.successors(name))
            wanted = [n for n in (name, *above) if not (nodes[n].done or nodes[n].skipped)]
            fused = (
                len(wanted) == 2
                and depth[name] < _FUSED
                and name in plans
                and above[0] in plans
                and plans[name].can_be_unmade
                and plans[above[0]].takes_unmade
            )
            if fused:
                node = replace(node, fused=True, bytes_read=0, bytes_written=0)  # noqa: PLW2901
            found[name] = node
        return found

    def _node(self, node: str, operation: Operation, inputs: Sequence[NodePlan]) -> NodePlan:
        made = NodePlan(node, operation, None)
        try:
            if isinstance(operation, Load):
                return replace(made, signature=self._signature_of(operation.path))
            if isinstance(operation, Merge):
                return self._merge(made, operation, inputs)
            return self._training(made, operation, inputs)
        except SoupError as error:
            for line in error.args:
                self._problem(node, line)
        except OSError as error:
            self._problem(node, f"cannot read {error.filename}: {error.strerror or error}")
        return made

    def _problem(self, node: str, sentence: str) -> None:
        _tell(self.problems, sentence, node)

    def _must_be_apart(self) -> None:
        """Whether what trainers write beside their results replaces nothing of the plan's."""
        outputs = [(name, path) for name, node in self.nodes.items() for path in node.outputs]
        if not outputs:
            return
        read = {_place(path): path for path in files_read(self.tree)}
        seen: list[tuple[Path, str]] = []
        for name, path in outputs:
            try:
                own, lost = _place(path), overlapped(path, read.values())
            except OSError as error:
                self._problem(name, f"cannot write {path}: {error.strerror or error}")
                continue
            for place, given in read.items():
                if given == lost or _overlap(own, place):
                    self._problem(
                        name, f"it would write {path} in the place of {given}, which is read"
                    )
            for place, other in seen:
                if not _overlap(own, place):
                    continue
                if self._is_one(name, other):
                    break
                too = "the same" if place == own else place
                self._problem(
                    name,
                    f"it would write {path}, and {other} {too}: the later would replace "
                    f"the other's; name two places apart",
                )
                break
            else:
                seen.append((own, name))

    def _is_one(self, node: str, other: str) -> bool:
        """Whether two nodes are one model that is used twice, and so computed once."""
        pending = [(node, other)]
        while pending:
            pair = pending.pop()
            inputs = [self.tree.inputs(name) for name in pair]
            told = [(self.tree.operation(name), node_seed(self.tree, name)) for name in pair]
            if told[0] != told[1] or len(inputs[0]) != len(inputs[1]):
                return False
            pending += zip(*inputs, strict=True)
        return True

    def _signature_of(self, path: Path) -> Signature:
        if path not in self.files:
            self.files[path] = self._read(path)
        return self.files[path]

    def _read(self, path: Path) -> Signature:
        if path.is_file() and path.suffix == SUFFIX:
            must_be_whole(path)
            rows = read_header(path).rows
            known = self.headers.get(id(rows))
            if known is None:
                made = self._intern({name: (dtype, shape) for name, dtype, shape, *_ in rows})
                known = self.headers[id(rows)] = (rows, made)
            return known[1]
        tensors = open_checkpoint(path).tensors
        return self._intern({name: (info.dtype, info.shape) for name, info in tensors.items()})

    def _intern(self, signature: Signature) -> Signature:
        """The same object for the same tensors: sixty leaves of a plan are checked like one."""
        return self.interned.setdefault(tuple(signature.items()), signature)

    def _merge(self, made: NodePlan, operation: Merge, inputs: Sequence[NodePlan]) -> NodePlan:
        signatures = [node.signature for node in inputs]
        base = None if operation.base is None else self._signature_of(operation.base)
        known = [signature for signature in signatures if signature is not None]
        if len(known) < len(signatures):
            return made  # a trainer will tell
        told = json.dumps(described(operation), sort_keys=True)
        tokens: list[Vocabulary | None] = []
        if operation.recipe.tokenizer_from is not None:
            tokens = [self._vocabulary(node.node) for node in inputs]
            tokens += [] if operation.base is None else [self._vocabulary_at(operation.base)]
        key = (told, *map(id, known), *map(id, tokens))
        if key not in self.merges:
            names = [node.node for node in inputs]
            aux = {
                name: [virtual(str(path), self._signature_of(path)) for path in paths]
                for name, paths in operation.aux
            }
            self.merges[key] = _merged(operation, known, names, base, tokens, aux)
            if isinstance(made_once := self.merges[key], _Merged):
                signature = self._intern(made_once.signature)
                self.merges[key] = replace(made_once, signature=signature)
        found = self.merges[key]
        if isinstance(found, SoupError):
            raise found
        if not (operation.lora or operation.aux):  # which are made from files alone
            self.merge_plans[made.node] = found.plan
        return replace(
            made, signature=found.signature, merged=found.merged, kept=found.kept,
            dropped=found.dropped, frozen=found.frozen, estimates=found.estimates,
            elements=found.elements,
            bytes_read=found.bytes_read, bytes_written=found.bytes_written, memory=found.memory,
            notices=found.notices,
        )  # fmt: skip

    def _vocabulary(self, node: str) -> Vocabulary | None:
        """The tokens of the tokenizer that lies beside a node's checkpoint, if one does."""
        first = node
        while inputs := self.tree.inputs(first):  # it is a folder where that is one
            first = inputs[0]
        if not any(path.is_dir() for path in checkpoints_of(self.tree.operation(first))):
            return None
        operation, inputs = self.tree.operation(node), self.tree.inputs(node)
        index = 0
        if isinstance(operation, Merge) and node in self.merge_plans:
            if (made := self.merge_plans[node].tokens) is not None:
                return made.vocabulary
            words = [operation.recipe.tokenizer_from, operation.recipe.files_from, "first"]
            index = parse_model("the model", next(w for w in words if w not in (None, UNION)))
        if inputs and index != BASE:
            return self._vocabulary(inputs[index])
        return self._vocabulary_at(checkpoints_of(operation)[0])

    def _vocabulary_at(self, path: Path) -> Vocabulary | None:
        if path not in self.vocabularies:
            self.vocabularies[path] = vocabulary_of(path)
        return self.vocabularies[path]

    def _training(
        self, made: NodePlan, operation: Train | FineTune, inputs: Sequence[NodePlan]
    ) -> NodePlan:
        trainer, options = trainer_of(operation.training)
        named_files(trainer, options)  # whether they are there
        made = replace(
            made, notices=tuple(trainer_notices(trainer, options)),
            outputs=tuple(trainer_outputs(trainer, options)),
        )  # fmt: skip
        start: Signature | None = None
        if isinstance(operation, FineTune):
            start, below = inputs[0].signature, inputs[0]
            if start is not None and below.dropped:
                start = {**start, **self._as_they_were(below)}
        elif operation.start is not None:
            start = self._signature_of(operation.start)
        told = trainer_tensors(trainer, options)
        if told is not None:
            node, begun = "its start", start
            if isinstance(operation, FineTune):
                node, begun = inputs[0].node, inputs[0].signature
            if begun is not None:
                reshapes = trainer_reshapes(trainer, options)
                fault = _compare(operation.training.trainer, told, node, begun, reshapes)
                if fault:
                    shapes = {tensor: shape for tensor, (_, shape) in begun.items()}
                    fitting = trainer_fitting(trainer, options, shapes)
                    has = ", ".join(f"{option}: {value}" for option, value in fitting.items())
                    raise PlanError(f"{fault} ({node} has {has})" if has else fault)
        signature = told if told is not None else start
        if signature is None:
            return made
        signature = self._intern(signature)
        merge = inputs[0] if inputs and inputs[0].kind == "merge" else None
        return replace(
            made, signature=signature, frozen=merge.frozen if merge else (),
            elements={"frozen": merge.elements["frozen"]} if merge and merge.frozen else {},
            bytes_written=sum(nbytes_of(*entry) for entry in signature.values()),
        )  # fmt: skip

    def _as_they_were(self, below: NodePlan) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensors that a merge drops, as its first input that has them has them."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        inputs = self.tree.inputs(below.node)
        for name in below.dropped:
            for signature in (self.signatures[i] for i in inputs if i in self.signatures):
                if name in signature:
                    found[name] = signature[name]
                    break
        return found


def _must_be_meant(leaf: Load, digest: Digest) -> None:
    """Whether a leaf is the file that the plan means, as far as its content is known."""
    found = None if leaf.digest is None else digest(leaf.path)
    if found is not None and found != leaf.digest:
        raise PlanError(
            f"{leaf.path} is another file than the plan means: its XXH3-128 digest is {found}, "
            f"not {leaf.digest}"
        )


def _compare(
    trainer: str, told: Signature, node: str, signature: Signature, reshapes: Mapping[str, str]
) -> str | None:
    """Why what a trainer starts with does not fit what it says that it writes."""
    strange = [name for name in signature if name not in told]
    if strange:
        return (
            f"the trainer {trainer!r} knows nothing of {counted(len(strange), 'tensor')} of "
            f"{node}: {listed(strange)}"
        )
    other = [
        name for name, (_, shape) in signature.items()
        if told[name][1] != shape and reshapes.get(name) != ""
    ]  # fmt: skip
    if other:
        options = dict.fromkeys(reshapes.get(name, "") for name in other)
        hint = f" ({' and '.join(options)} takes them)" if all(options) else ""
        return (
            f"the trainer {trainer!r} has other shapes for {counted(len(other), 'tensor')} of "
            f"{node}: {listed(other)}{hint}"
        )
    return None


def _merged(
    operation: Merge, signatures: Sequence[Signature], names: Sequence[str],
    base: Signature | None, vocabularies: Sequence[Vocabulary | None],
    aux: Mapping[str, Sequence[Checkpoint]],
) -> _Merged | SoupError:  # fmt: skip
    """What `plan_merge` says of models that need not exist yet."""
    found = [virtual(name, signature) for name, signature in zip(names, signatures, strict=True)]
    found += [] if base is None else [virtual(str(operation.base), base)]
    for model, own in zip(found, vocabularies, strict=False):
        model.vocabulary = own
    models: list[Checkpoint] = list(found[: len(names)])
    based: Checkpoint | None = None if base is None else found[-1]
    recipe = operation.recipe
    try:
        with speaking("plan"):
            if operation.lora:
                adapters: dict[StrPath, float] = dict(operation.lora)
                models, based, recipe = with_adapters(models, based, recipe, adapters)
            plan = plan_merge(models, recipe, base=based, aux=aux)
    except CheckpointError:
        raise
    except SoupError as error:
        return error
    merged = tuple(step.name for step in plan.steps if step.kind == "merge")
    taken = set(merged)
    kept = tuple(step.name for step in plan.steps if step.name not in taken)
    seen = [*([plan.layout.base] if plan.layout.base else []), *reversed(plan.layout.models)]
    shapes = {name: info.shape for model in seen for name, info in model.tensors.items()}
    estimates = tuple(n for own in plan.notices if own.kind == "estimates" for n in own.names)
    groups = {
        "merged": merged, "kept": kept, "dropped": plan.dropped, "frozen": plan.frozen,
        "estimates": estimates,
    }  # fmt: skip
    elements = {
        group: sum(elements_of(shapes[name]) for name in names if name in shapes)
        for group, names in groups.items()
    }
    return _Merged(
        plan, {step.name: (step.dtype, step.shape) for step in plan.steps}, merged, kept,
        plan.dropped, plan.frozen, estimates, elements, bytes_read_by(plan), plan.bytes_written,
        memory_of(plan),
        tuple(notice.message for notice in plan.notices if notice.level == "warning"),
    )  # fmt: skip
