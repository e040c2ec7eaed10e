"""From a checkpoint's lineage back to the plan that makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path, PurePath
from typing import Any

from ..errors import PlanError, counted, listed, printable
from ..files.checkpoint import Checkpoint, StrPath, open_checkpoint
from ..files.yaml_text import dump_yaml
from ..merging.lineage import identity, is_merge, label, parents, read_lineage
from ..merging.methods import method_names
from ..merging.recipe import WRITTEN, recipe_from_mapping
from .operations import (
    INNER,
    ROOT,
    Builder,
    FineTune,
    Load,
    Merge,
    Operation,
    Train,
    Training,
    Tree,
)
from .trainer import COMMAND

_DERIVED = 1 << 32  # seeds from here on are taken for derived ones, which have 63 bits


@dataclass(frozen=True)
class Reproduction:
    """How a checkpoint is made again.

    Attributes:
        text: a `tree.yaml`.
        names: what stands for the content of a model that it was made of, a digest or a key → what
            the plan calls it. The checkpoint itself is the plan's root.
    """

    text: str
    names: Mapping[str, str]


def plan_text(checkpoint: Checkpoint | StrPath) -> str:
    """A `tree.yaml` that makes a checkpoint again, from the lineage in its metadata.

    Every model that is read by another has a name, the one that it had, and is written once,
    however often it is read. Leaves are named as the lineage names them; where they lie, a lineage
    does not say: put them beside the plan, which takes no others, by their digests. Each training
    has the seed that it had.

    Args:
        checkpoint: an open one, or a path.

    Raises:
        PlanError: it holds no lineage, or one that no plan can say.
        CheckpointError: it cannot be read, or its lineage.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    made = read_lineage(opened) or {}
    for step in (made, *made.get("ancestors", {}).values()):
        if step.get("lora", "folded") != "folded" or "experts" in step:
            what = "packed experts" if "experts" in step else f"adapters that were {step['lora']}"
            raise PlanError(f"{opened.path} was made with {what}, which no plan can say yet")
    return reproduction(opened).text


def reproduction(checkpoint: Checkpoint | StrPath) -> Reproduction:
    """`plan_text`, and which of its models is which of the lineage's."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    made = read_lineage(opened)
    if made is None:
        raise PlanError(f"{opened.path} holds no lineage")
    ancestors = made.get("ancestors", {})
    trains = not all(map(is_merge, (made, *ancestors.values())))
    writer = _Writer(ancestors, trains)
    tree = writer.root(made)
    content = {"soup": 1, "models": writer.models(), "tree": tree}
    lines = [f"What {opened.name} was made by. The files that went into it, by XXH3-128:"]
    lines += [f"  {digest}  {name}" for digest, name in writer.files.items()]
    names = list(writer.files.values())
    twice = sorted({name for name in names if names.count(name) > 1})
    lines += [f"Different files are called {name}: give each a path of its own." for name in twice]
    text = "".join(f"# {printable(line)}\n" for line in lines) + dump_yaml(content)
    return Reproduction(text, writer.names)


def tree_of(
    made: Mapping[str, Any], names: Mapping[str, str], *, root: str, most: int
) -> tuple[Tree, dict[str, str]]:  # fmt: skip
    """The tree that a lineage tells of, to be looked at: no trainer that it names is imported.

    A model that is read twice is two nodes, as in a plan. Seeds that are long enough to be derived
    ones are left out: a plan does not say them.

    Args:
        made: a lineage.
        names: what stands for a model's content → its name, see `Reproduction`.
        root: what the root is called.
        most: how many nodes it may have.

    Returns:
        the tree, and node → what stands for its content; the root, which nothing stands for, is
        not among them.

    Raises:
        PlanError: it has more nodes.
        SoupError: a merge method or a rule is none that this version knows.
    """
    ancestors = made.get("ancestors", {})
    numbers, contents = {root: 1}, {}
    found: list[tuple[str, Operation, list[str]]] = []
    pending: list[tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]] = [(root, made, {})]
    while pending:
        node, step, entry = pending.pop()
        inputs = []
        is_leaf = step is None or step.get("operation") == "train"
        for below in () if step is None or is_leaf else _inputs_of(step):
            content = identity(below)
            name = free = names.get(content) or below.get("node") or label(below)
            while free in numbers:
                numbers[name] += 1
                free = f"{name}#{numbers[name]}"
            numbers[free] = 1
            contents[free] = content
            inputs.append(free)
            pending.append((free, ancestors.get(content), below))
        found.append((node, _operation(step, entry), inputs))
        if len(found) + len(pending) > most:
            raise PlanError(f"it has more than {most:,} nodes")
    builder = Builder()
    for node, operation, inputs in reversed(found):  # what is read before what is made of it
        builder.add(node, operation, inputs)
    return builder.tree(root), contents


def _operation(step: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> Operation:
    if step is None:
        return Load(Path(label(entry)))
    if is_merge(step):
        _import_nothing(step)
        merge = _merge_of(step)
        aux = tuple((n, tuple(Path(label(e)) for e in of)) for n, of in step.get("aux", {}).items())
        if _is_folded(step):
            lora = tuple((Path(label(e)), weight) for e, weight in _adapters_of(step, merge))
            return Merge(recipe_from_mapping(merge, "merge"), None, lora, aux)
        base = Path(label(step["base"])) if "base" in step else None
        return Merge(recipe_from_mapping(merge, "merge"), base, (), aux)
    seed = step["seed"] if step["seed"] < _DERIVED else None
    training = Training(step["trainer"], step["options"], seed=seed)
    if step["operation"] == "finetune":
        return FineTune(training)
    return Train(training, Path(label(step["inputs"][0])) if step["inputs"] else None)


def _merge_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a lineage says of a merge, as a plan says it; its base aside."""
    merge = {key: made[key] for key in WRITTEN if key in made}
    return {"layers" if key == "rules" else key: value for key, value in merge.items()}


def _is_folded(made: Mapping[str, Any]) -> bool:
    """Whether the inputs of a merge are adapters, which were folded into its base."""
    return made.get("lora") == "folded" and "base" in made


def _inputs_of(made: Mapping[str, Any]) -> list[Any]:
    """What a plan's node reads: adapters are folded into the one, which is the base."""
    return [made["base"]] if _is_folded(made) else list(made["inputs"])


def _adapters_of(
    made: Mapping[str, Any], merge: dict[str, Any]
) -> list[tuple[Mapping[str, Any], float]]:  # fmt: skip
    """The adapters that were folded, with their weights, which are taken out of the merge."""
    weights = merge.pop("weights", None) or [1.0] * len(made["inputs"])
    if len(weights) != len(made["inputs"]):
        raise PlanError(
            f"the lineage has {counted(len(weights), 'weight')} for "
            f"{counted(len(made['inputs']), 'adapter')}"
        )
    return list(zip(made["inputs"], weights, strict=True))


def _import_nothing(made: Mapping[str, Any]) -> None:
    """Refuse methods `module:function`: who wrote a lineage has no say in what is imported here.

    Raises:
        PlanError: there is one, and nobody here has named it yet.
    """
    names = [made["method"], *(rule.get("method") for rule in made.get("rules", ()))]
    for name in names:
        if name is not None and ":" in name and name not in method_names():
            raise PlanError(
                f"the lineage names {printable(name)} as a merge method, and a module is imported "
                f"only where a plan or a command names it"
            )


class _Writer:
    def __init__(self, ancestors: Mapping[str, Any], trains: bool) -> None:
        self.ancestors = ancestors
        self.trains = trains
        self.files: dict[str, str] = {}  # digest → name of what lies beside the plan
        self.leaves: dict[str, Any] = {}
        self.nodes: dict[str, Any] = {}
        self.names: dict[str, str] = {}  # what stands for a content → the model's name
        self.taken: set[str] = set()
        self.pending: list[tuple[str, Mapping[str, Any]]] = []  # named, and not yet written

    def root(self, made: Mapping[str, Any]) -> Any:
        """The tree's root; all that it is made of is in `leaves` and `nodes` then."""
        inner = str(parents(made)[0].get("node", "")) if made["inputs"] else ""
        name = inner.removesuffix(INNER) if not is_merge(made) and inner.endswith(INNER) else ROOT
        self.taken.add(name)
        root = self._made(made, name)
        while self.pending:
            found, entry = self.pending.pop()
            below = self.ancestors.get(identity(entry))
            if below is None:
                self.leaves[found] = {"path": self._file(entry), "xxh3_128": identity(entry)}
            else:
                model = self._made(below, found)
                (self.leaves if "train" in model else self.nodes)[found] = model
        if "train" in root:
            self.leaves[name] = root
            return name
        return root if name == ROOT else {"name": name, **root}

    def models(self) -> dict[str, Any]:
        """The leaves, and the named nodes, each after what it is made of."""
        inputs = {name: node["of"] for name, node in self.nodes.items()}
        order = [name for name in TopologicalSorter(inputs).static_order() if name in inputs]
        return {**self.leaves, **{name: self.nodes[name] for name in order}}

    def _made(self, made: Mapping[str, Any], name: str) -> dict[str, Any]:
        """What a lineage's entry says, as a model of a plan; its inputs are named, and wait."""
        if is_merge(made):
            return self._merged(made)
        training = {**made["options"], "seed": made["seed"]}
        if made["trainer"] != COMMAND:
            training = {"trainer": made["trainer"], **training}
        if made["operation"] == "train":
            start = {"start": self._file(made["inputs"][0])} if made["inputs"] else {}
            return {"train": training, **start}
        (entry,) = made["inputs"]
        below, inner = self.ancestors.get(identity(entry)), f"{name}{INNER}"
        is_inner = entry.get("node", inner) == inner and inner not in self.taken
        if is_inner and below is not None and is_merge(below):
            self.taken.add(inner)
            return {**self._merged(below), "finetune": training}
        return {"of": self._models([entry]), "finetune": training}

    def _merged(self, made: Mapping[str, Any]) -> dict[str, Any]:
        merge = _merge_of(made)
        if self.trains:
            merge.setdefault("estimates", [])  # whatever a trainer would tell today
        if _is_folded(made):
            adapters = _adapters_of(made, merge)
            merge["lora"] = {self._file(entry): weight for entry, weight in adapters}
            if len(merge["lora"]) < len(adapters):
                raise PlanError(
                    f"of the adapters {listed(list(merge['lora']))} several are called the same, "
                    f"and a plan could not tell them apart"
                )
        elif "base" in made:
            merge["base"] = self._file(made["base"])
        if "aux" in made:
            merge["aux"] = {name: list(map(self._file, of)) for name, of in made["aux"].items()}
        return {"of": self._models(_inputs_of(made)), "merge": merge}

    def _models(self, entries: Sequence[Mapping[str, Any]]) -> list[str]:
        """Names in the plan, the same for the same content."""
        new = []
        for entry in entries:
            if identity(entry) not in self.names:
                named = entry.get("node") or PurePath(entry.get("name", "")).stem or "model"
                name = self._free_name(named)
                self.names[identity(entry)] = name
                new.append((name, entry))
        self.pending += reversed(new)
        return [self.names[identity(entry)] for entry in entries]

    def _free_name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self.taken:
            number += 1
            name = f"{wanted}-{number}"
        self.taken.add(name)
        return name

    def _file(self, entry: Mapping[str, Any]) -> str:
        if not entry.get("name"):
            raise PlanError(f"the lineage does not say how {label(entry)!r} was made")
        self.files[identity(entry)] = entry["name"]
        return str(entry["name"])
