"""Modules by the names that they had before the core had rooms; they go with the next version."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

MOVED = {
    "checkpoint": "files.checkpoint",
    "cli": "terminal.cli",
    "cli_report": "terminal.cli_report",
    "cli_shared": "terminal.cli_shared",
    "cli_train": "terminal.cli_train",
    "cli_tree": "terminal.cli_tree",
    "companions": "files.companions",
    "compare": "merging.compare",
    "curves": "terminal.curves",
    "digest": "files.digest",
    "dtypes": "files.dtypes",
    "engine": "merging.merge",
    "executors": "running.executors",
    "fused": "merging.compiled",
    "header": "files.header",
    "inspection": "files.inspection",
    "lineage": "merging.lineage",
    "low_rank": "files.low_rank",
    "merge_plan": "merging.planning",
    "methods": "merging.methods",
    "methods.averages": "merging.methods.averages",
    "methods.registry": "merging.methods.registry",
    "methods.spherical": "merging.methods.spherical",
    "methods.task_vectors": "merging.methods.task_vectors",
    "node": "running.node",
    "pickles": "files.pickles",
    "picture": "terminal.picture",
    "placing": "files.placing",
    "plan": "trees.plan",
    "processes": "running.processes",
    "quantized": "files.quantized",
    "reading": "files.reading",
    "recipe": "merging.recipe",
    "report": "terminal.report",
    "reproduce": "trees.reproduce",
    "rules": "merging.rules",
    "runner": "running.runner",
    "show": "terminal.show",
    "show_tree": "terminal.show_tree",
    "shown": "terminal.shown",
    "statistics": "merging.reductions",
    "store": "trees.store",
    "stream": "merging.engine",
    "subject": "terminal.subject",
    "torch_bridge": "running.torch_bridge",
    "torch_convert": "files.torch_convert",
    "torch_load": "files.torch_load",
    "trainer": "trees.trainer",
    "trainer_options": "trees.trainer_options",
    "tree": "trees.operations",
    "tree_yaml": "trees.tree_yaml",
    "unmade": "merging.plan",
    "verification": "merging.verification",
    "writer": "files.writer",
    "yaml_text": "files.yaml_text",
}


class Moved:
    """Finds a module under its old name, and says its new one.

    (No `importlib.abc` is inherited from: to import that takes longer than all of the rest.)
    """

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """The place of one that has moved."""
        package, old = fullname.split(".", 1) if "." in fullname else (fullname, "")
        loader = cast("Any", self)
        return ModuleSpec(fullname, loader) if package == __package__ and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Nothing new."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module itself there: what is imported by either name is one and the same."""
        name = module.__name__
        new = f"{__package__}.{MOVED[name.split('.', 1)[1]]}"
        warnings.warn(f"{name} is {new} now", DeprecationWarning, stacklevel=2)
        sys.modules[name] = import_module(new)


sys.meta_path.insert(0, Moved())  # before what would find a module's file a second time
