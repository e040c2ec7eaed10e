"""What a checkpoint was made of: recorded in its `__metadata__`, read back, and verified."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .digest import FileDigest, combined, digest_checkpoint, digest_file
from .errors import CheckpointError
from .recipe import MergePlan, Recipe
from .rules import BASE, Rule
from .unmade import Unmade
from .version import __version__
from .writer import LINEAGE_KEY

if TYPE_CHECKING:
    import networkx

    from .tree import FineTune, Train

FORMAT = 1

Digests = Mapping[int, "Sequence[FileDigest] | Digests"]
"""Model index → its files' digests, or those of the models that it is merged from on the way."""


def record(
    plan: MergePlan, digests: Digests | None, *, sha256: bool,
    nonfinite: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The lineage of a merge, as it is stored.

    Inputs that have a lineage bring it along, each ancestor once, under its digest in `ancestors`:
    nested, a running average would nest without end, and what came in twice would double.

    It holds no time and no path, so that the same merge gives the same bytes. A merge's result
    within a tree has a key in place of a digest, which would not be known before the result is.

    Args:
        plan: what was merged.
        digests: the digests of each model's files, by model index, `BASE` for the base; None puts
            something in their place that takes at least as much room, and as much if the models
            know their digests.
        sha256: whether SHA-256 digests are among them.
        nonfinite: how many elements of a tensor are NaN or infinite, and may be.
    """
    recipe = plan.recipe
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "operation": "merge",
        **recipe_as_json(recipe),
        "inputs": [
            _input(model, _of_files(digests, index), index, sha256=sha256)
            for index, model in enumerate(plan.models)
        ],
    }
    if plan.base is not None:
        content["base"] = _input(plan.base, _of_files(digests, BASE), BASE, sha256=sha256)
    ancestors: dict[str, Any] = {}
    entries = [*content["inputs"], *([content["base"]] if plan.base is not None else [])]
    models = [*range(len(plan.models)), *([BASE] if plan.base is not None else [])]
    for index, entry in zip(models, entries, strict=True):
        model = plan.model(index)
        if isinstance(model, Unmade):
            below = digests[index] if digests else None
            assert below is None or isinstance(below, Mapping)
            earlier: dict[str, Any] | None = record(model.plan, below, sha256=sha256)
        else:
            earlier = read_lineage(model)
        if earlier is not None:
            ancestors |= earlier.pop("ancestors", {})
            ancestors[identity(entry)] = earlier
    if ancestors:
        content["ancestors"] = ancestors
    if nonfinite:
        content["nonfinite"] = dict(nonfinite)
    return content


def record_training(
    operation: Train | FineTune, start: Checkpoint | None, *, seed: int
) -> dict[str, Any]:
    """The lineage of what a trainer made, as it is stored beside that of merges.

    Args:
        operation: what was done.
        start: what it began with, if with anything.
        seed: the trainer's.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "operation": type(operation).__name__.lower(),
        "trainer": operation.training.trainer,
        "options": {k: v for k, v in operation.training.options.items() if k != "folder"},
        "seed": seed,
        "inputs": [],
    }
    if start is not None:
        entry = _input(start, digest_checkpoint(start), 0, sha256=False)
        content["inputs"].append(entry)
        earlier = read_lineage(start)
        if earlier is not None:
            ancestors = earlier.pop("ancestors", {})
            content["ancestors"] = {**ancestors, entry["xxh3_128"]: earlier}
    return content


def recipe_as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, without what was left at its default."""
    content: dict[str, Any] = {"method": recipe.method_name}
    if recipe.beta is not None:
        content["beta"] = recipe.beta
    if recipe.weights is not None:
        content["weights"] = list(recipe.weights)
    if recipe.parameters:
        content["parameters"] = dict(recipe.parameters)
    if recipe.layers:
        content["rules"] = [_rule(rule) for rule in recipe.layers]
    content["rest"] = recipe.rest
    for name in ("groups", "low_level", "dtype", "on_integer"):
        if getattr(recipe, name):
            content[name] = getattr(recipe, name)
    if recipe.allow_nonfinite:
        content["allow_nonfinite"] = list(recipe.allow_nonfinite)
    content["seed"] = recipe.seed
    return content


def _rule(rule: Rule) -> dict[str, Any]:
    content: dict[str, Any] = {"pattern": rule.pattern, "action": rule.action}
    if rule.action == "keep":
        content["source"] = rule.source
    for name in ("low_level", "frozen", "method"):
        if getattr(rule, name):
            content[name] = getattr(rule, name)
    if rule.parameters:
        content["parameters"] = dict(rule.parameters)
    return content


def _of_files(digests: Digests | None, index: int) -> Sequence[FileDigest] | None:
    """A model's own digests; None where they are not known, or where it has no files."""
    found = None if digests is None else digests[index]
    return None if isinstance(found, Mapping) else found


def identity(entry: Mapping[str, Any]) -> str:
    """What stands for an input's content: its XXH3-128 digest, or a result's key."""
    return str(entry["key"] if "key" in entry else entry["xxh3_128"])


def _input(
    model: Checkpoint, digests: Sequence[FileDigest] | None, index: int, *, sha256: bool
) -> dict[str, Any]:
    if model.key is not None:
        return {"name": model.name, "key": model.key}
    if digests is None:
        # Different for each model, as digests may be: equal ones would be one ancestor.
        known = model.digest or f"{index + 1:032x}"
        blank = FileDigest("", 0, known, "0" * 64 if sha256 else None)
        digests = [
            FileDigest(file.name, file.stat().st_size, blank.xxh3_128, blank.sha256)
            for file in model.files
        ]
    algorithms = ("xxh3_128", "sha256") if sha256 else ("xxh3_128",)
    content: dict[str, Any] = {"name": model.name, "size": sum(d.size for d in digests)}
    for algorithm in algorithms:
        one_file = len(digests) == 1
        value = getattr(digests[0], algorithm)
        content[algorithm] = value if one_file else combined(list(digests), algorithm)
    if model.is_folder:
        content["files"] = [
            {"name": d.name, "size": d.size, **{a: getattr(d, a) for a in algorithms}}
            for d in digests
        ]
    return content


def read_lineage(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What `record` stored in a checkpoint, or None where there is nothing.

    Raises:
        CheckpointError: the entry is there and is not a lineage that this version can read.
    """
    text = checkpoint.metadata.get(LINEAGE_KEY)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{checkpoint.path}: its lineage has format {content['format']!r}, "
            f"this version reads {FORMAT}"
        )
    ancestors = content.get("ancestors", {}) if isinstance(content, dict) else None
    if not isinstance(ancestors, dict) or not all(map(_is_made, [content, *ancestors.values()])):
        raise CheckpointError(f"{checkpoint.path}: the lineage in its metadata is not readable")
    return dict(content)


def _is_made(content: object) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), list):
        return False
    inputs = content["inputs"]
    if content.get("operation") in ("train", "finetune"):
        named = isinstance(content.get("trainer"), str)
        options = isinstance(content.get("options"), dict)
        return named and options and all(map(_is_input, inputs))
    if not isinstance(content.get("method"), str) or not inputs:
        return False
    if not isinstance(content.get("parameters", {}), dict):
        return False
    rules = content.get("rules", [])
    if not isinstance(rules, list) or not all(
        isinstance(r, dict) and "pattern" in r for r in rules
    ):
        return False
    return all(map(_is_input, [*inputs, *([content["base"]] if "base" in content else [])]))


def _is_input(entry: object) -> bool:
    if isinstance(entry, dict) and "key" in entry:
        return isinstance(entry.get("name"), str) and isinstance(entry["key"], str)
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("xxh3_128"), str)
        and "lineage" not in entry
        and all(_is_input(file) for file in entry.get("files", []))
    )


def parents(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of what was made, a base last."""
    return [*made["inputs"], *([made["base"]] if "base" in made else [])]


def lineage_graph(checkpoint: Checkpoint) -> networkx.DiGraph[str]:
    """All ancestors of a checkpoint, with an edge from each to what was made of it.

    Nodes are XXH3-128 digests, or keys of merges within a tree; the checkpoint itself is
    `"output"`. Each has a `name`, the merges
    among them a `method`, and what was trained a `trainer`. An ancestor that
    came in by several ways is one node.

    Raises:
        CheckpointError: the lineage is not readable.
    """
    import networkx

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_node("output", name=checkpoint.name)
    made = read_lineage(checkpoint)
    if made is None:
        return graph
    for node, step in {**made.get("ancestors", {}), "output": made}.items():
        kind = "method" if "method" in step else "trainer"
        graph.add_node(node, **{kind: step[kind]})
        for parent in parents(step):
            graph.add_node(identity(parent), name=parent["name"])
            graph.add_edge(identity(parent), node)
    return graph


@dataclass(frozen=True)
class InputCheck:
    """Whether an input that a lineage names is at hand, unchanged.

    Attributes:
        name: the input's name in the lineage.
        found: where it was found, or None.
        intact: whether all digests agree; None where it was not found.
    """

    name: str
    found: Path | None
    intact: bool | None


def check_inputs(checkpoint: Checkpoint, folders: Sequence[Path]) -> list[InputCheck]:
    """Look for a checkpoint's inputs by name in some folders, and compare their digests.

    Raises:
        CheckpointError: the lineage is not readable.
        OSError: an input that is there cannot be read.
    """
    made = read_lineage(checkpoint)
    if made is None:
        return []
    checks = []
    for entry in parents(made):
        if "key" in entry:  # of a merge within a tree, whose file may never have been
            continue
        candidates = [folder / entry["name"] for folder in folders]
        paths = [path for path in candidates if path.exists()]
        verdicts = [_intact(path, entry) for path in paths]
        if not paths:
            checks.append(InputCheck(entry["name"], None, None))
        else:
            best = verdicts.index(True) if True in verdicts else 0
            checks.append(InputCheck(entry["name"], paths[best], verdicts[best]))
    return checks


def _intact(path: Path, entry: Mapping[str, Any]) -> bool:
    files = entry.get("files", [{**entry, "name": path.name}])
    folder = path if "files" in entry else path.parent
    for expected in files:
        file = folder / expected["name"]
        if not file.is_file() or file.stat().st_size != expected["size"]:
            return False
        digest = digest_file(file, sha256="sha256" in expected)
        if digest.xxh3_128 != expected["xxh3_128"]:
            return False
        if "sha256" in expected and digest.sha256 != expected["sha256"]:
            return False
    return True
