"""The model card of a merge: parents, method and configuration, as the Hub reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import counted, printable
from ..files.checkpoint import Checkpoint
from ..files.hub import name_in_cache
from ..files.reading import read_small
from ..files.yaml_text import dump_yaml
from .methods import Method, get_method
from .plan import MergePlan
from .recipe import recipe_as_json

CARD = "README.md"
_LARGEST = 10_000_000
_LICENSE = re.compile(r"(license|license_name|license_link)\s*:\s*(.+)")


def model_card(plan: MergePlan, name: str, configuration: str | None) -> str:
    """What a README.md says of a merge; see `card`.

    Args:
        plan: the merge.
        name: what the result is called.
        configuration: the text of the configuration that it was made by; None writes the recipe.
    """
    parents = list(dict.fromkeys(map(_called, plan.models)))
    of_base = None if plan.base is None else _called(plan.base)
    recipe = plan.recipe
    used = {rule.method or recipe.method_name for rule in recipe.layers if rule.action == "merge"}
    over = "" if of_base is None else f", over the base `{of_base}`"
    what = f"{counted(len(parents), 'model')} made one by modelsoup{over}"
    if plan.given != plan.models:
        what = f"{counted(len(parents), 'low-rank adapter')} folded by modelsoup into `{of_base}`"
    return card(
        name, what, parents, plan.files_from.companions,
        [get_method(method) for method in sorted(used or {recipe.method_name})],
        dump_yaml(_configuration(plan)) if configuration is None else configuration,
        [] if of_base is None else [of_base],
    )  # fmt: skip


def card(
    name: str, what: str, parents: Sequence[str], folder: Path | None, methods: Sequence[Method],
    text: str, bases: Sequence[str] = (),
) -> str:  # fmt: skip
    """A README.md.

    Its front matter has `base_model`, the parents by their names on the Hub or by those of their
    folders, the tags `merge` and `modelsoup`, and the licence of the model whose config goes along.

    Args:
        name: what the result is called.
        what: what was done with the parents, who follow.
        parents: what it was made of.
        folder: the model folder whose config went along.
        methods: by which it was merged.
        text: the configuration.
        bases: more parents, of which `what` speaks.
    """
    front: dict[str, Any] = {
        "base_model": list(dict.fromkeys([*parents, *bases])),
        **_license(folder),
        **({"library_name": "transformers"} if _is_of_transformers(folder) else {}),
        "tags": ["merge", "modelsoup"],
    }
    sources = [f"- `{method.name}`: {method.summary} ({method.source})" for method in methods]
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    lines = [
        "---", dump_yaml(front).rstrip("\n"), "---", "",
        f"# {printable(name)}", "",
        f"{what}:", "",
        *(f"- `{parent}`" for parent in parents), "",
        "## Method", "", *sources, "",
        "## Configuration", "", f"{fence}yaml", text.rstrip("\n"), fence, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _configuration(plan: MergePlan) -> dict[str, Any]:
    """A merge as a `--config` file has it."""
    names, recipe = list(map(_called, plan.models)), recipe_as_json(plan.recipe)
    if plan.given == plan.models:
        return {"models": names, **recipe}
    weights = recipe.pop("weights", [1.0] * len(names))
    adapters = dict(zip(names, weights, strict=True))
    return {"models": list(map(_called, plan.given)), "lora": adapters, **recipe}


def _called(model: Checkpoint) -> str:
    return called(model.path, model.plan_name or model.name)


def called(path: Path, name: str) -> str:
    """What a card calls a model: its name on the Hub, or else this one."""
    return name_in_cache(path) or printable(name)


def _license(folder: Path | None) -> dict[str, str]:
    """What a parent's own card says of its licence."""
    if folder is None:
        return {}
    try:
        text = read_small(folder / CARD, _LARGEST).decode("utf-8")
    except (OSError, ValueError):
        return {}
    start, *rest = text.split("\n---", 1)
    if not rest or not start.startswith("---"):
        return {}
    found = (_LICENSE.fullmatch(line.strip()) for line in start.splitlines())
    return {match[1]: printable(match[2].strip("'\" ")) for match in found if match}


def _is_of_transformers(folder: Path | None) -> bool:
    try:
        content = json.loads(read_small((folder or Path()) / "config.json", _LARGEST))
    except (OSError, ValueError, RecursionError):
        return False
    return folder is not None and "architectures" in content
