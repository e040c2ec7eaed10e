"""Trees of operations: what a plan is once every shorthand is spelt out.

Four operations make one checkpoint each: `Load` reads a file, `Train` makes a leaf, `Merge` makes
one of several, `FineTune` one of one. A `Tree` is a `networkx.DiGraph` of them, with an edge from
what is read to what is made of it; with its edges turned round it is an arborescence.

    >>> tree = binary_tree(["a.safetensors", "b.safetensors"], merge=Merge(Recipe(beta=0.5)))
    >>> [type(operation).__name__ for _, operation in tree.operations()]
    ['Load', 'Load', 'Merge']
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError, must_be_several, nearest
from ..files.checkpoint import StrPath
from ..merging.recipe import Recipe

if TYPE_CHECKING:
    import networkx

OddModel = str
"""Which model of a level with an odd count goes up alone: by chance, the last, or one by name."""

ROOT = "root"
INNER = ".merge"
"""Ends the name of a merge whose result is fine-tuned in the same node of a plan."""
MAX_NODES = 20_000


@dataclass(frozen=True)
class Load:
    """A checkpoint that exists: a file or a model folder.

    Attributes:
        path: where it is.
        digest: the XXH3-128 digest that its content must have; None takes what is there.
    """

    path: Path
    digest: str | None = None


@dataclass(frozen=True)
class Training:
    """What a trainer is told, but for the checkpoints.

    Attributes:
        trainer: its name, `module:Class`, or `command`.
        options: the trainer's own options, not yet checked.
        resources: what a cluster must have free for it, such as `{"gpus": 1}`.
        seed: for the trainer; None derives one from the tree's seed and the node's name.
        folder: what options that are paths are relative to, the plan's folder; None is the current
            one.
    """

    trainer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    folder: Path | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Train:
    """A leaf that a trainer makes, from a start checkpoint or from nothing.

    Attributes:
        training: which trainer, how.
        start: the checkpoint that it begins with; None lets the trainer initialise all.
    """

    training: Training
    start: Path | None = None


@dataclass(frozen=True)
class Merge:
    """Several checkpoints, in order, made one.

    Attributes:
        recipe: how.
        base: the base model, for methods and rules that use one.
        lora: low-rank adapters that are folded into the one input, with their weights.
        aux: what some methods take beside the models: name → a checkpoint a model.
    """

    recipe: Recipe = field(default_factory=Recipe)
    base: Path | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    aux: tuple[tuple[str, tuple[Path, ...]], ...] = ()


@dataclass(frozen=True)
class FineTune:
    """One checkpoint, trained further; what a merge below dropped is initialised by the trainer."""

    training: Training


Operation = Load | Train | Merge | FineTune
Leaf = StrPath | Load | Train


@dataclass(frozen=True)
class Tree:
    """A tree of operations.

    Attributes:
        graph: node names, each with its `operation`; the `level` that it is drawn at (1 is the
            root's); and the `model` that it is, which is its name, or the name of its first use
            where a model is used again. An edge leads from each input to what is made of it, with
            its `position` among the inputs.
        root: the node whose checkpoint is the result.
        seed: what the seeds of the nodes are derived from.
        file: the plan that it was read from, which no output replaces.
    """

    graph: networkx.DiGraph[str]
    root: str
    seed: int = 0
    file: Path | None = None

    def operation(self, node: str) -> Operation:
        """The operation of a node."""
        found: Operation = self.graph.nodes[node]["operation"]
        return found

    def model(self, node: str) -> str:
        """What a node's model is called: a model that is used again is one node each time."""
        name: str = self.graph.nodes[node]["model"]
        return name

    def inputs(self, node: str) -> list[str]:
        """The nodes that a node reads, in order."""
        edges: Any = self.graph.in_edges(node, data="position")
        return [source for source, _, _ in sorted(edges, key=lambda edge: edge[2])]

    def parent(self, node: str) -> str | None:
        """The node that reads a node; None for the root."""
        return next(iter(self.graph.successors(node)), None)

    def operations(self) -> Iterator[tuple[str, Operation]]:
        """Every node and its operation, inputs before what is made of them."""
        import networkx

        for node in networkx.topological_sort(self.graph):
            yield node, self.operation(node)

    def models(self) -> list[str]:
        """The nodes whose checkpoint is a model of the tree: a merge that is fine-tuned is none."""
        return [node for node, _ in self.operations() if not self.is_inner_merge(node)]

    def is_inner_merge(self, node: str) -> bool:
        """Whether a node is a merge whose result goes into a fine-tuning only."""
        parent = self.parent(node)
        return (
            isinstance(self.operation(node), Merge)
            and parent is not None
            and isinstance(self.operation(parent), FineTune)
        )

    def below(self, node: str) -> set[str]:
        """A node and all that it is made of."""
        import networkx

        return {node, *networkx.ancestors(self.graph, node)}

    @property
    def levels(self) -> int:
        """How many levels of models it has; a single leaf has one."""
        return max(int(self.graph.nodes[node]["level"]) for node in self.graph)


class Builder:
    """Collects nodes into a `Tree`; names are made unique where the caller gives none."""

    def __init__(self, seed: int = 0) -> None:
        import networkx

        self.graph: networkx.DiGraph[str] = networkx.DiGraph()
        self._seed = seed
        self._last: dict[str, int] = {}  # name → the last number that it got
        self._first: dict[str, str] = {}  # name with a number → without it
        self.place = ""  # where the nodes to come are written, file:line:column, for problems

    def add(self, name: str, operation: Operation, inputs: Sequence[str] = ()) -> str:
        """Add a node.

        Raises:
            PlanError: the name is taken.
        """
        if name in self.graph:
            raise PlanError(f"two nodes are called {name!r}")
        if len(self.graph) >= MAX_NODES:
            raise PlanError(f"the tree has more than {MAX_NODES:,} nodes")
        self.graph.add_node(
            name, operation=operation, level=1, place=self.place, model=self.model(name)
        )
        for position, source in enumerate(inputs):
            self.graph.add_edge(source, name, position=position)
        return name

    def free_name(self, name: str) -> str:
        """The name, or with a number behind it if it is taken: a model may be used twice."""
        if name not in self.graph:
            return name
        number = self._last.get(name, 1) + 1  # counting from 2 each time would be quadratic
        while f"{name}#{number}" in self.graph:
            number += 1
        self._last[name] = number
        self._first[f"{name}#{number}"] = name
        return f"{name}#{number}"

    def model(self, name: str) -> str:
        """What a node is called that is part of a model's first use, or of its only one."""
        end = len(name)
        while end > 0:
            first = self._first.get(name[:end])
            if first is not None:
                return first + name[end:]
            end = name.rfind(".", 0, end)
        return name

    def folded(self, name: str, model: Load, adapters: Sequence[tuple[Path, float]]) -> str:
        """Add a model into which adapters are folded, and the model below it."""
        below = self.add(self.free_name(f"{name}.1"), model)
        return self.add(name, Merge(lora=tuple(adapters)), [below])

    def join(
        self, name: str, inputs: Sequence[str], merge: Merge, finetune: FineTune | None, *,
        merge_one: bool = False,
    ) -> str:  # fmt: skip
        """Merge nodes, and fine-tune the result if wanted; the last node has the name.

        One input is merged only with `merge_one`: else it is fine-tuned on its own, or goes up as
        it is.
        """
        if len(inputs) == 1 and not merge_one:
            return self.add(name, finetune, inputs) if finetune is not None else inputs[0]
        if finetune is None:
            return self.add(name, merge, inputs)
        return self.add(name, finetune, [self.add(f"{name}{INNER}", merge, inputs)])

    def tree(self, root: str) -> Tree:
        """The finished tree, with the level of every node.

        Raises:
            PlanError: a node is read by more than one other, or not part of the tree.
        """
        tree = Tree(self.graph, root, self._seed)
        for node in self.graph:
            if self.graph.out_degree(node) > 1:
                raise PlanError(f"the node {node!r} goes into more than one other")
        stray = sorted(set(self.graph) - tree.below(root))
        if stray:
            raise PlanError(f"the node {stray[0]!r} does not lead to {root!r}")
        pending = [(root, 1)]
        while pending:
            node, level = pending.pop()
            self.graph.nodes[node]["level"] = level
            for source in tree.inputs(node):
                pending.append((source, level if tree.is_inner_merge(source) else level + 1))
        return tree


def pair_levels(
    builder: Builder, nodes: Sequence[str], merge: Merge, finetune: FineTune | None, *,
    shuffle: int | None = None, odd: OddModel = "random", name: str = ROOT,
) -> str:  # fmt: skip
    """Pair nodes level by level until one is left, as in the tree paper (figure 1 and eq. 2).

    At each level the models are shuffled, paired, merged and fine-tuned. Of an odd count one model
    is fine-tuned on its own and goes up unchanged otherwise, to be merged at the next level
    (figure 1 (b)): where that has an odd count too, it is another model that goes up alone.

    Args:
        builder: where the nodes are, and their ancestors will be.
        nodes: the models of the lowest level.
        merge: how each pair is merged.
        finetune: how each merged model is fine-tuned; None leaves it as it is.
        shuffle: a seed for the pairing; None pairs neighbours.
        odd: which model of an odd count goes up alone; a name is one of the lowest level, and
            levels above take their last one that may.
        name: what the last node is called.

    Returns:
        the last node's name.

    Raises:
        PlanError: `odd` names no model of the lowest level.
    """
    if odd not in ("random", "last") and odd not in nodes:
        raise PlanError(
            f"odd is {odd!r}{nearest(odd, ['random', 'last', *nodes])} (expected random, last or "
            f"one of {', '.join(nodes)})"
        )
    chance = random.Random(0 if shuffle is None else shuffle)  # noqa: S311  # not for secrets
    level, depth = list(nodes), len(nodes).bit_length() + (len(nodes).bit_count() > 1)
    went_alone = None  # as it is called at this level
    while len(level) > 1:
        depth -= 1
        alone = None
        if len(level) % 2:
            others = [node for node in level if node != went_alone]
            if odd == "random":
                alone = others[chance.randrange(len(others))]
            else:
                alone = odd if odd in others else others[-1]
            level.remove(alone)
        if shuffle is not None:
            chance.shuffle(level)
        pairs = [level[index : index + 2] for index in range(0, len(level), 2)]
        ups = [*pairs, *([[alone]] if alone is not None else [])]
        last = len(ups) == 1
        raised = [
            builder.join(name if last else f"{name}.{depth}-{number}", inputs, merge, finetune)
            for number, inputs in enumerate(ups, 1)
        ]
        went_alone = raised[-1] if alone is not None else None
        level = raised
    return level[0]


def binary_tree(
    leaves: Mapping[str, Leaf] | Sequence[Leaf], *, merge: Merge | None = None,
    finetune: FineTune | None = None, shuffle: int | None = None, odd: OddModel = "random",
    seed: int = 0,
) -> Tree:  # fmt: skip
    """A tree that merges pairs of leaves, then pairs of the results, and so on.

    A symmetric tree of N levels has 2^(N−1) leaves and 2^N − 1 models.

    Args:
        leaves: checkpoint paths or operations, by name; a sequence names files by their stems.
        merge: how each pair is merged; None averages.
        finetune: how each merged model is fine-tuned; None leaves it as it is.
        shuffle: a seed for the pairing; None pairs neighbours.
        odd: which model goes up alone where the count is odd: `random`, `last`, or a leaf's name.
        seed: what the trainers' seeds are derived from.

    Raises:
        PlanError: there are no leaves, or `odd` names none of them.
    """
    must_be_several("leaves", leaves)
    if not leaves:
        raise PlanError("a tree needs at least one leaf")
    builder = Builder(seed)
    if isinstance(leaves, Mapping):
        named = [(name, _leaf(leaf)) for name, leaf in leaves.items()]
    else:
        made = [_leaf(leaf) for leaf in leaves]
        named = [
            (leaf.path.stem if isinstance(leaf, Load) else f"leaf-{number}", leaf)
            for number, leaf in enumerate(made, 1)
        ]
    nodes = [builder.add(builder.free_name(name), leaf) for name, leaf in named]
    root = pair_levels(
        builder, nodes, merge or Merge(), finetune, shuffle=shuffle, odd=odd
    )  # fmt: skip
    return builder.tree(root)


def _leaf(leaf: Leaf) -> Load | Train:
    return leaf if isinstance(leaf, Load | Train) else Load(Path(leaf))
