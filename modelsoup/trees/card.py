"""The model card of what a tree makes: its leaves, its methods, and the plan."""

from __future__ import annotations

from pathlib import Path

from ..errors import counted
from ..files.reading import read_small
from ..files.yaml_text import MAX_BYTES
from ..merging.card import called, card
from ..merging.methods import get_method
from ..merging.recipe import methods_of
from ..merging.renames import parse_model
from ..merging.rules import BASE
from .keys import checkpoints_of, files_beside
from .operations import FineTune, Merge, Train, Tree
from .reproduce import plan_text


def tree_card(tree: Tree, name: str, made: Path) -> str:
    """What a README.md says of a tree's result.

    Args:
        tree: the tree.
        name: what the result is called.
        made: the result, whose lineage is the configuration where the tree was read from no file.
    """
    operations = [operation for _, operation in tree.operations()]
    merges = [operation for operation in operations if isinstance(operation, Merge)]
    trained = sum(isinstance(operation, Train | FineTune) for operation in operations)
    paths = [path for operation in operations for path in checkpoints_of(operation)]
    paths += [path for operation in merges for path, _ in files_beside(operation)]
    told = [counted(len(merges), "merge")] if merges else []
    told += [counted(trained, "training")] if trained else []
    methods = {
        method for merge in merges
        for method in (["task_arithmetic"] if merge.lora and merge.recipe.method is None
                       else methods_of(merge.recipe))
    }  # fmt: skip
    if tree.file is not None:
        text = read_small(tree.file, MAX_BYTES).decode()
    else:  # which calls the result by the name that it has before it is in its place
        text = plan_text(made).replace(f"What {made.name} was", f"What {name} was", 1)
    parents = list(dict.fromkeys(called(path, path.resolve().name) for path in paths))
    return card(
        name, f"Made by modelsoup, in {' and '.join(told)}, of", parents, _companions(tree),
        [get_method(method) for method in sorted(methods)], text,
    )  # fmt: skip


def _companions(tree: Tree) -> Path | None:
    """The model folder whose config and other files came along."""
    node = tree.root
    while inputs := tree.inputs(node):
        operation, index = tree.operation(node), 0
        if isinstance(operation, Merge) and operation.recipe.files_from is not None:
            index = parse_model("files_from", operation.recipe.files_from)
            if index == BASE:
                return operation.base
        node = inputs[index]
    paths = checkpoints_of(tree.operation(node))
    return paths[0] if paths and paths[0].is_dir() else None
