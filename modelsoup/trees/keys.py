"""What decides a node's result: its key, its seed, and the files that it reads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import SoupError
from ..files.adapters import open_adapter
from ..files.checkpoint import open_checkpoint
from ..files.digest import content_of
from ..merging.methods import code_version, get_method
from ..merging.recipe import methods_of, recipe_as_json
from .operations import FineTune, Load, Merge, Operation, Train, Training, Tree
from .store import Companions, Contents, companions_of
from .trainer import Trainer, build_options, get_trainer, named_files, trainer_identity

KEY_FORMAT = 2
"""Changes when the same operation on the same inputs would give other bytes."""

Digest = Callable[[Path], str | None]
"""The digest of a checkpoint's weights, or None where it is not known yet."""


def described(operation: Operation) -> dict[str, Any]:
    """An operation's parameters as plain data."""
    if isinstance(operation, Load):
        return {"path": str(operation.path)}
    if isinstance(operation, Merge):
        content: dict[str, Any] = {"recipe": recipe_as_json(operation.recipe)}
        if operation.base is not None:
            content["base"] = str(operation.base)
        if operation.lora:
            content["lora"] = {str(path): weight for path, weight in operation.lora}
        if operation.aux:
            content["aux"] = {name: list(map(str, paths)) for name, paths in operation.aux}
        return content
    training = operation.training
    content = {"trainer": training.trainer, "options": dict(training.options)}
    if training.seed is not None:
        content["seed"] = training.seed
    if training.resources:
        content["resources"] = dict(training.resources)
    if isinstance(operation, Train) and operation.start is not None:
        content["start"] = str(operation.start)
    return content


def node_seed(tree: Tree, node: str) -> int:
    """The seed of a node's trainer, in [0, 2⁶³)."""
    training = training_of(tree.operation(node))
    if training is not None and training.seed is not None:
        return training.seed
    # A model that is used twice is one model, and so is all that it is made of.
    digest = hashlib.sha256(f"{tree.seed}\0{tree.model(node)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def checkpoints_of(operation: Operation) -> list[Path]:
    """The checkpoints that an operation reads from outside of the tree."""
    if isinstance(operation, Load):
        return [operation.path]
    given = operation.base if isinstance(operation, Merge) else None
    if isinstance(operation, Train):
        given = operation.start
    return [] if given is None else [given]


def checkpoints_read(tree: Tree) -> list[Path]:
    """All checkpoints that a tree reads from outside, each once."""
    return list(dict.fromkeys(p for _, made in tree.operations() for p in checkpoints_of(made)))


def files_beside(operation: Operation) -> list[tuple[Path, tuple[Path, ...]]]:
    """The adapters and auxiliary inputs of a merge, in this order, each with its files.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    if not isinstance(operation, Merge):
        return []
    adapters = [(path, open_adapter(path).checkpoint.files) for path, _ in operation.lora]
    others = [(path, open_checkpoint(path).files) for _, of in operation.aux for path in of]
    return [*adapters, *others]


def files_read(tree: Tree) -> list[Path]:
    """The plan, all checkpoints, and the trainers' other files: what nothing may replace."""
    found = dict.fromkeys([*([] if tree.file is None else [tree.file]), *checkpoints_read(tree)])
    for _, operation in tree.operations():
        training = training_of(operation)
        with contextlib.suppress(SoupError):  # `check` tells what is wrong with a training
            found |= dict.fromkeys(_files_of(training) if training else ())
            for path, files in files_beside(operation):
                found |= dict.fromkeys((path, *files))
    return list(found)


def _files_of(training: Training) -> list[Path]:
    """The module that holds a trainer's code, and the files that its options name."""
    trainer, options = trainer_of(training)
    code = getattr(sys.modules.get(type(trainer).__module__), "__file__", None)
    return [*([] if code is None else [Path(code)]), *named_files(trainer, options)]


def training_of(operation: Operation) -> Training | None:
    """What a trainer is told, for the operations that have one."""
    return operation.training if isinstance(operation, Train | FineTune) else None


def trainer_of(training: Training) -> tuple[Trainer, Any]:
    """The trainer and its checked options, with paths that lead somewhere.

    Raises:
        TrainerError: it is not there, or the options do not fit.
    """
    trainer = get_trainer(training.trainer)
    return trainer, build_options(trainer, training.options, training.folder)


def node_key(
    tree: Tree, node: str, inputs: Sequence[str | None], digest: Digest,
    companions: Callable[[Path], Companions | None] | None = None,
    contents: Callable[[Sequence[Path]], Contents | None] | None = None,
) -> str | None:  # fmt: skip
    """What a node's result is named by: a hash of its operation and of its inputs' keys.

    Args:
        tree: the tree.
        node: the node.
        inputs: its inputs' keys.
        digest: the digest of a checkpoint's weights, or None where it is not known yet.
        companions: name and digest of the files that a model folder's results take over besides
            its weights, where they are known without reading them all; None reads them.
        contents: name and digest of the files that a trainer names, the same way.

    Returns:
        32 hexadecimal digits, or None where something is not known yet.

    Raises:
        TrainerError: the trainer is not there, or its options do not fit.
    """
    operation = tree.operation(node)
    content: dict[str, Any] = {"format": KEY_FORMAT, "operation": type(operation).__name__}
    if None in inputs:
        return None
    more: list[str | None] = []
    first: Path | None = None  # whose companions go along
    if isinstance(operation, Load):
        more.append(digest(operation.path))
        first = operation.path
    elif isinstance(operation, Merge):
        recipe = operation.recipe
        content["recipe"] = recipe_as_json(recipe)
        content["methods"] = {name: code_version(get_method(name)) for name in methods_of(recipe)}
        if operation.base is not None:
            more.append(digest(operation.base))
        if beside := [(contents or content_of)(files) for _, files in files_beside(operation)]:
            if None in beside:
                return None
            content["beside"] = beside
            content["lora"] = [weight for _, weight in operation.lora]
            content["aux"] = [[name, len(paths)] for name, paths in operation.aux]
        if recipe.files_from == "base" or recipe.tokenizer_from is not None:
            first = operation.base
    else:
        trainer, options = trainer_of(operation.training)
        content["trainer"] = operation.training.trainer
        content["version"] = str(getattr(trainer, "version", ""))
        content["options"] = trainer_identity(trainer, options, operation.training.options)
        files = named_files(trainer, options)
        content["files"] = (contents or content_of)(files) if files else []
        if content["files"] is None:
            return None
        content["seed"] = node_seed(tree, node)
        if isinstance(operation, Train) and operation.start is not None:
            more.append(digest(operation.start))
            first = operation.start
    if None in more:
        return None
    if first is not None:
        along = (companions or companions_of)(first) if first.is_dir() else ()
        if along is None:
            return None
        content["folder"] = [list(entry) for entry in along] if first.is_dir() else None
    content["inputs"] = [*inputs, *more]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
