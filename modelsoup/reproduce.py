"""From a checkpoint's lineage back to the plan that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .checkpoint import Checkpoint
from .errors import PlanError
from .lineage import identity, parents, read_lineage
from .rules import BASE

_MERGE_KEYS = (
    "method", "beta", "weights", "parameters", "rest", "groups", "low_level", "dtype",
    "on_integer", "seed",
)  # fmt: skip


def plan_text(checkpoint: Checkpoint) -> str:
    """A `tree.yaml` that makes a checkpoint again, from the lineage in its metadata.

    Leaves are named as the lineage names them; where they lie, a lineage does not say: put them
    beside the plan, which takes no others, by their digests. Each training has the seed that it
    had.

    Raises:
        PlanError: it holds no lineage.
        CheckpointError: the lineage is not readable.
    """
    made = read_lineage(checkpoint)
    if made is None:
        raise PlanError(f"{checkpoint.path} holds no lineage: modelsoup did not make it")
    writer = _Writer(made.get("ancestors", {}))
    tree = writer.node(made)
    content = {"soup": 1, "models": writer.models, "tree": tree}
    lines = [f"# What {checkpoint.name} was made by. The files that went into it, by XXH3-128:"]
    lines += [f"#   {digest}  {name}" for digest, name in writer.leaves.items()]
    names = list(writer.leaves.values())
    twice = sorted({name for name in names if names.count(name) > 1})
    lines += [
        f"# Different files are called {name}: give each a path of its own." for name in twice
    ]
    text = yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None
    )
    return "\n".join(lines) + "\n" + text


class _Digest(str):
    """A text that may look like a number."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Digest, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")
)


class _Writer:
    def __init__(self, ancestors: Mapping[str, Any]) -> None:
        self.ancestors = ancestors
        self.models: dict[str, Any] = {}
        self.leaves: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def node(self, made: Mapping[str, Any]) -> Any:
        """What a lineage entry says, as a node of a plan."""
        if "trainer" in made:
            if made["operation"] == "train":
                return self._name("output", self._train(made))
            training = _training(made)
            below = self._input(made["inputs"][0])
            if isinstance(below, dict) and below.get("finetune") is False:
                return {**below, "finetune": training}
            return {"of": [below], "finetune": training}
        content: dict[str, Any] = {"of": [self._input(entry) for entry in made["inputs"]]}
        merge = {key: made[key] for key in _MERGE_KEYS if key in made}
        if "rules" in made:
            merge["layers"] = {
                rule["pattern"]: _rule(rule) for rule in made["rules"]
            }  # fmt: skip
        if "base" in made:
            merge["base"] = self._leaf(parents(made)[-1])
        return {**content, "merge": merge, "finetune": False}

    def _input(self, entry: Mapping[str, Any]) -> Any:
        content = identity(entry)
        made = self.ancestors.get(content)
        if made is None:
            path = self._leaf(entry)
            if "key" in entry:
                return self._name(content, path)
            return self._name(content, {"path": path, "xxh3_128": _Digest(content)})
        if made.get("operation") == "train":
            return self._name(content, self._train(made))
        return self.node(made)

    def _train(self, made: Mapping[str, Any]) -> dict[str, Any]:
        model: dict[str, Any] = {"train": _training(made)}
        if made["inputs"]:
            model["start"] = self._leaf(made["inputs"][0])
        return model

    def _leaf(self, entry: Mapping[str, Any]) -> str:
        self.leaves[identity(entry)] = entry["name"]
        return str(entry["name"])

    def _name(self, digest: str, model: Any) -> str:
        """A model's name in the plan, the same for the same content."""
        if digest not in self._names:
            path = model if isinstance(model, str) else model.get("path")
            stem = "trained" if path is None else path.rpartition(".")[0] or path
            name, number = stem, 1
            while name in self.models:
                number += 1
                name = f"{stem}-{number}"
            self._names[digest] = name
            self.models[name] = model
        return self._names[digest]


def _training(made: Mapping[str, Any]) -> dict[str, Any]:
    named = {} if made["trainer"] == "command" else {"trainer": made["trainer"]}
    return {**named, **made["options"], "seed": made["seed"]}


def _rule(rule: Mapping[str, Any]) -> Any:
    content: dict[str, Any] = dict(rule.get("parameters", {}))
    action = rule["action"]
    if action == "keep":
        content["action"] = {0: "first", 1: "second", BASE: "base"}.get(rule.get("source", 0))
    elif action == "drop":
        content["action"] = "drop"
    elif rule.get("low_level"):
        content["action"] = "low-level"
    if rule.get("method"):
        content["method"] = rule["method"]
    if rule.get("frozen"):
        content["freeze"] = True
    return content or "merge"
