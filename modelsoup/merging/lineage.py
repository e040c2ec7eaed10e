"""What a checkpoint was made of: recorded in its `__metadata__`, read back, and verified."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, RuleError, counted, said
from ..files.checkpoint import Checkpoint, StrPath, open_checkpoint
from ..files.digest import FileDigest, combined, digest_file
from ..files.placing import LINEAGE_KEY
from ..version import __version__
from .folding import Adapted
from .layout import parse_slices
from .plan import MergePlan, Unmade
from .recipe import recipe_as_json
from .renames import parse_renames
from .rules import rule_from_json
from .values import parse_value, scalars_in

if TYPE_CHECKING:
    import networkx

FORMAT = 1
_MAX_DEPTH = 128
_DIGEST = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Digests = Mapping[Checkpoint, Sequence[FileDigest]]
"""For each checkpoint that was read, those of its files."""


def record(
    plan: MergePlan, digests: Digests | None, *, sha256: bool,
    nonfinite: Callable[[MergePlan], Mapping[str, int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The lineage of a merge, as it is stored.

    Inputs that have a lineage bring it along, each ancestor once, under its digest in `ancestors`:
    nested, a running average would nest without end, and what came in twice would double.

    It holds no time and no path, so that the same merge gives the same bytes. A merge's result
    within a tree has a key in place of a digest, which would not be known before the result is. An
    input has the `name` of its file, and as `node` what the plan calls it; the file of a result in
    a store has no name of its own.

    Args:
        plan: what was merged.
        digests: of the files of all checkpoints that were read; None puts something in their place
            that takes at least as much room, and as much if the models know their digests.
        sha256: whether SHA-256 digests are among them.
        nonfinite: how many elements of the tensors that a merge makes are NaN or infinite, and may
            be; asked of this merge and of those that were made on the way.

    Raises:
        CheckpointError: an input's lineage is not readable, or two of them contradict each other.
    """
    recipe = plan.recipe
    entries = [
        input_entry(
            model, digests[model] if digests and not isinstance(model, Unmade) else None,
            sha256=sha256, number=number,
        )
        for number, model in enumerate(plan.inputs)
    ]  # fmt: skip
    left = iter(entries)
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "operation": "merge",
        **recipe_as_json(recipe),
        **(plan.models[0].folded if isinstance(plan.models[0], Adapted) else {}),
        "inputs": [next(left) for _ in plan.models],
    }
    if plan.base is not None:
        content["base"] = next(left)
    for name, models in plan.aux.items():
        content.setdefault("aux", {})[name] = [next(left) for _ in models]
    ancestors: dict[str, Any] = {}
    for model, entry in zip(plan.inputs, entries, strict=True):
        if isinstance(model, Unmade):
            earlier: dict[str, Any] | None = record(
                model.plan, digests, sha256=sha256, nonfinite=nonfinite
            )
        else:
            earlier = read_lineage(model)
        if earlier is not None:
            ancestors |= earlier.pop("ancestors", {})
            ancestors[identity(entry)] = earlier
    if ancestors:
        content["ancestors"] = ancestors
        refuse_circles(content, [str(model.path) for model in plan.inputs])
    if found := nonfinite and nonfinite(plan):
        content["nonfinite"] = dict(found)
    return content


def refuse_circles(content: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Refuse what strangers' lineages say together, though each of them is sound alone."""
    try:
        _check_circles(content)
    except ValueError as error:
        raise CheckpointError(f"the lineages of {', '.join(paths)} do not fit: {error}") from None


def identity(entry: Mapping[str, Any]) -> str:
    """What stands for an input's content: its XXH3-128 digest, or a result's key."""
    return str(entry["key"] if "key" in entry else entry["xxh3_128"])


def input_entry(
    model: Checkpoint, digests: Sequence[FileDigest] | None, *, sha256: bool, number: int = 0
) -> dict[str, Any]:
    """An input, as a lineage has it; `number` tells it from others whose digests are not known."""
    named = {} if model.is_stored else {"name": model.name}
    if model.plan_name is not None:
        named["node"] = model.plan_name
    if model.key is not None:
        return {**named, "key": model.key}
    if digests is None:
        # Different for each model, as digests may be: equal ones would be one ancestor.
        known = model.digest or f"{number:032x}"
        blank = FileDigest("", 0, known, "0" * 64 if sha256 else None)
        digests = [
            FileDigest(file.name, file.stat().st_size, blank.xxh3_128, blank.sha256)
            for file in model.files
        ]
    algorithms = ("xxh3_128", "sha256") if sha256 else ("xxh3_128",)
    content: dict[str, Any] = {**named, "size": sum(d.size for d in digests)}
    content |= {algorithm: _whole(digests, algorithm) for algorithm in algorithms}
    if model.is_folder:
        content["files"] = [
            {"name": d.name, "size": d.size, **{a: getattr(d, a) for a in algorithms}}
            for d in digests
        ]
    return content


def _whole(digests: Sequence[FileDigest], algorithm: str) -> str:
    """A checkpoint's digest from those of its files."""
    return (
        getattr(digests[0], algorithm) if len(digests) == 1 else combined(list(digests), algorithm)
    )


def read_lineage(checkpoint: Checkpoint | StrPath) -> dict[str, Any] | None:
    """What `record` stored in a checkpoint, or None where there is nothing.

    Args:
        checkpoint: an open one, or a path.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the entry is there and is not a lineage
            that this version can read.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    text = opened.metadata.get(LINEAGE_KEY)
    if text is None:
        return None
    try:
        content = json.loads(text)
        _check(content)
    except RecursionError:
        raise CheckpointError(f"{opened.path}: its lineage is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(
            f"{opened.path}: the lineage in its metadata is not readable: {error}"
        ) from None
    return dict(content)


def _check(content: Any) -> None:
    """Whether a lineage, which a stranger may have written, is one: all that is read of it later.

    Raises:
        ValueError: it is none; a few words say why.
    """
    _check_depth(content)
    if not isinstance(content, dict):
        raise ValueError(f"it is {said(content)}, not an object")
    if content.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"it has format {said(content['format'])}, this version of modelsoup reads {FORMAT}"
        )
    ancestors = content.get("ancestors", {})
    if not isinstance(ancestors, dict):
        raise ValueError(f"its ancestors are {said(ancestors)}, not an object")
    for name, made in [("the output", content), *ancestors.items()]:
        if made is not content and not _DIGEST.fullmatch(name):
            raise ValueError(f"an ancestor is called {said(name)}, which is no digest")
        try:
            _check_made(made)
        except (ValueError, RuleError) as error:
            raise ValueError(f"{name}: {error}") from None
    for made in (content, *ancestors.values()):
        for entry in parents(made):
            if "key" in entry and entry["key"] not in ancestors:
                raise ValueError(f"nothing says how {said(label(entry))} was made")
    _check_circles(content)


def _check_depth(content: Any) -> None:
    pending = [(content, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        if isinstance(value, dict | list):
            inside = value.values() if isinstance(value, dict) else value
            pending += [(inner, depth + 1) for inner in inside if isinstance(inner, dict | list)]


def _check_circles(content: Mapping[str, Any]) -> None:
    from graphlib import CycleError, TopologicalSorter

    made = content.get("ancestors", {}).items()
    try:
        TopologicalSorter({name: map(identity, parents(step)) for name, step in made}).prepare()
    except CycleError as error:
        raise ValueError(f"{error.args[1][0]} is made of itself") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    """Whether a float can hold it, and it is no NaN."""
    largest = sys.float_info.max
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -largest <= value <= largest  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in (".", "..") and not {"/", "\0"} & set(value)


def _is_path_inside(value: object) -> bool:
    return isinstance(value, str) and all(
        part and _is_file_name(part) for part in value.split("/")
    )  # fmt: skip


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_mapping_to(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


_Fields = Mapping[str, tuple[Callable[[Any], object], str]]
_is_numbers = _is_list_of(_is_number)


def _is_parameter(value: object) -> bool:
    """Whether a method's parameter can have a value, of numbers that a float can hold."""
    try:
        return all(
            isinstance(one, bool | str) or _is_number(one)
            for one in scalars_in(parse_value("", value))
        )
    except (RuleError, OverflowError):
        return False


_MERGE: _Fields = {
    "method": (_is_text, "a name"),
    "lora": (lambda v: v in ("folded", "merged", "extracted"), "folded, merged or extracted"),
    "experts": (lambda v: v == "packed" or (_is_count(v) and v > 0), "packed, or a number"),
    "beta": (_is_number, "a number"),
    "weights": (_is_numbers, "a list of numbers"),
    "parameters": (
        _is_mapping_to(_is_parameter),
        "a mapping to numbers, truth values, words, and lists and mappings of such",
    ),
    "rules": (_is_list_of(lambda v: isinstance(v, dict)), "a list of rules"),
    "rest": (_is_text, "a word"),
    "groups": (_is_mapping_to(lambda v: _is_text(v) or _is_list_of(_is_text)(v)), "a mapping"),
    "low_level": (_is_mapping_to(_is_number), "a mapping to numbers"),
    "renames": (_is_list_of(_is_text), "a list of renames"),
    "slices": (_is_list_of(_is_text), "a list of slices"),
    "files_from": (_is_text, "a model"),
    "tokenizer_from": (_is_text, "a model"),
    "chat_template": (_is_text, "a text"),
    "dtype": (_is_text, "a dtype"),
    "on_integer": (_is_text, "a word"),
    "allow_nonfinite": (_is_list_of(_is_text), "a list of patterns"),
    "estimates": (_is_list_of(_is_text), "a list of patterns"),
    "seed": (lambda v: type(v) is int and _is_number(v), "an integer"),
    "nonfinite": (_is_mapping_to(_is_count), "a mapping to counts"),
    "aux": (_is_mapping_to(_is_list_of(lambda v: isinstance(v, dict))), "a mapping to inputs"),
}
_TRAINING: _Fields = {
    "trainer": (_is_text, "a name"),
    "options": (lambda v: isinstance(v, dict), "a mapping"),
    "seed": (lambda v: _is_count(v) and v < 2**63, "an integer from 0 to 2^63 - 1"),
}
_FILE: _Fields = {
    "name": (_is_file_name, "a file's name"),
    "size": (_is_count, "a number of bytes"),
    "xxh3_128": (lambda v: _is_text(v) and _DIGEST.fullmatch(v), "32 hexadecimal digits"),
    "sha256": (lambda v: _is_text(v) and _SHA256.fullmatch(v), "64 hexadecimal digits"),
}
_FILES: _Fields = {**_FILE, "name": (_is_path_inside, "a file within its folder")}
_ENTRY: _Fields = {
    **_FILE,
    "node": (_is_text, "a name"),
    "key": _FILE["xxh3_128"],
    "files": (
        lambda v: v != [] and _is_list_of(lambda f: isinstance(f, dict))(v),
        "a list of files",
    ),
}


def _check_made(made: Any) -> None:
    if not isinstance(made, dict):
        raise ValueError(f"it is {said(made)}, not an object")
    operation = made.get("operation", "merge")
    if operation not in ("merge", "train", "finetune"):
        raise ValueError(f"its operation is {said(operation)}, not merge, train or finetune")
    inputs = made.get("inputs")
    if not isinstance(inputs, list):
        raise ValueError(f"its inputs are {said(inputs)}, not a list")
    if operation == "merge":
        _check_fields(made, _MERGE, required=("method",))
        for rule in made.get("rules", ()):
            rule_from_json(rule)
        parse_renames(made.get("renames", ()))
        parse_slices(made.get("slices", ()))
    else:
        _check_fields(made, _TRAINING, required=_TRAINING)
    low, high = {"merge": (1, len(inputs)), "train": (0, 1), "finetune": (1, 1)}[operation]
    if not low <= len(inputs) <= high:
        raise ValueError(f"a {operation} has {counted(len(inputs), 'input')}")
    for entry in parents(made):
        if not isinstance(entry, dict) or not {"name", "node"} & entry.keys():
            raise ValueError(f"an input is {said(entry)}, which has no name")
        by_digest = () if "key" in entry else ("size", "xxh3_128")
        _check_fields(entry, _ENTRY, required=by_digest)
        for file in entry.get("files", ()):
            _check_fields(file, _FILES, required=("name", "size", "xxh3_128"))


def _check_fields(
    content: Mapping[str, Any], fields: _Fields, *, required: Collection[str]
) -> None:
    for name in required:
        if name not in content:
            raise ValueError(f"it has no {name}")
    for name, (fits, expected) in fields.items():
        if name in content and not fits(content[name]):
            raise ValueError(f"{name} is {said(content[name])}, not {expected}")


def label(entry: Mapping[str, Any]) -> str:
    """What an input is called: by its file, by the plan, or by both."""
    name, node = entry.get("name"), entry.get("node")
    if name is None or node is None:
        return str(node if name is None else name)
    return str(name) if Path(name).stem == node else f"{node} ({name})"


def is_merge(made: Mapping[str, Any]) -> bool:
    """Whether a merge made it, and not a trainer."""
    return bool(made.get("operation", "merge") == "merge")


def parents(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of what was made, a base and what a method took beside the models last."""
    beside = [entry for entries in made.get("aux", {}).values() for entry in entries]
    return [*made["inputs"], *([made["base"]] if "base" in made else []), *beside]


def lineage_graph(checkpoint: Checkpoint | StrPath) -> networkx.DiGraph[str]:
    """All ancestors of a checkpoint, with an edge from each to what was made of it.

    Nodes are XXH3-128 digests, or keys of merges within a tree; the checkpoint itself is
    `"output"`. Each has a `name`, the merges among them a `method`, and what was trained a
    `trainer`. An ancestor that came in by several ways is one node.

    Args:
        checkpoint: an open one, or a path.

    Raises:
        CheckpointError: the lineage is not readable.
    """
    import networkx

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    graph.add_node("output", name=opened.name)
    made = read_lineage(opened)
    if made is None:
        return graph
    for node, step in {**made.get("ancestors", {}), "output": made}.items():
        kind = "method" if is_merge(step) else "trainer"
        graph.add_node(node, **{kind: step[kind]})
        for parent in parents(step):
            graph.add_node(identity(parent), name=label(parent))
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
    entries = [entry for entry in parents(made) if entry.get("name")]  # not results in a store
    found = []
    for entry in entries:
        paths = [folder / entry["name"] for folder in folders]
        # (A name may be too long for stat.)
        found.append({path: _intact(path, entry) for path in paths if os.path.exists(path)})
    right = {path for verdicts in found for path, is_intact in verdicts.items() if is_intact}
    checks = []
    for entry, verdicts in zip(entries, found, strict=True):
        # Files of one name in several folders: what is another input, is not a changed this one.
        path = next((path for path, is_intact in verdicts.items() if is_intact), None)
        path = path or next((path for path in verdicts if path not in right), None)
        checks.append(InputCheck(entry["name"], path, None if path is None else verdicts[path]))
    return checks


def _intact(path: Path, entry: Mapping[str, Any]) -> bool:
    files = entry.get("files", [{**entry, "name": path.name}])
    folder = path if "files" in entry else path.parent
    found = []
    for expected in files:
        file = folder / expected["name"]
        if not os.path.isfile(file) or file.stat().st_size != expected["size"]:
            return False
        digest = digest_file(file, sha256="sha256" in expected)
        if digest.xxh3_128 != expected["xxh3_128"]:
            return False
        if "sha256" in expected and digest.sha256 != expected["sha256"]:
            return False
        found.append(digest)
    if "files" not in entry:
        return True
    return bool(entry["size"] == sum(digest.size for digest in found)) and all(
        entry[algorithm] == _whole(found, algorithm)
        for algorithm in ("xxh3_128", "sha256") if algorithm in entry
    )  # fmt: skip
