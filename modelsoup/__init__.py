"""modelsoup: one checkpoint out of several.

The whole public face is here. A name is imported when it is first used, so that `import modelsoup`
and `soup --help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, TensorInfo, open_checkpoint
    from .cli_shared import GivenPath, print_json
    from .cli_train import training_command
    from .compare import DiffReport, diff
    from .digest import FileDigest, digest_file, digest_files
    from .engine import MergeReport, merge
    from .errors import (
        CheckpointError,
        MismatchError,
        NonfiniteError,
        OutputError,
        ParameterError,
        PlanError,
        RuleError,
        RunError,
        SoupError,
        StoreError,
        TrainerError,
        counted,
        how_to_install,
        listed,
        nearest,
        printable,
    )
    from .executors import RayExecutor
    from .inspection import Node, summarize
    from .lineage import lineage_graph, read_lineage, record_training
    from .merge_plan import MergePlan, Notice, Step, plan_merge
    from .methods import Method, get_method, method, method_names, parameter
    from .placing import beside, check_apart, check_output, place, placed
    from .plan import NodePlan, Plan, check
    from .processes import ProcessExecutor
    from .recipe import Recipe
    from .reproduce import plan_text
    from .rules import Rule, parse_rule
    from .runner import Event, RunReport, run
    from .store import Store
    from .torch_convert import ConvertReport, convert
    from .trainer import (
        Job,
        Trainer,
        build_options,
        get_trainer,
        options_as_json,
        register_trainer,
        trainer_names,
    )
    from .tree import FineTune, Load, Merge, Train, Training, Tree, binary_tree
    from .tree_yaml import parse_tree, read_tree
    from .verification import VerifyReport, verify
    from .writer import CheckpointWriter, OutputTensor
    from .yaml_text import parse_yaml

_HOMES = {
    "checkpoint": ("Checkpoint", "TensorInfo", "open_checkpoint"),
    "cli_shared": ("GivenPath", "print_json"),
    "cli_train": ("training_command",),
    "compare": ("DiffReport", "diff"),
    "digest": ("FileDigest", "digest_file", "digest_files"),
    "engine": ("MergeReport", "merge"),
    "errors": (
        "CheckpointError", "MismatchError", "NonfiniteError", "OutputError", "ParameterError",
        "PlanError", "RuleError", "RunError", "SoupError", "StoreError", "TrainerError", "counted",
        "how_to_install", "listed", "nearest", "printable",
    ),
    "executors": ("RayExecutor",),
    "inspection": ("Node", "summarize"),
    "lineage": ("lineage_graph", "read_lineage", "record_training"),
    "methods": ("Method", "get_method", "method", "method_names", "parameter"),
    "plan": ("NodePlan", "Plan", "check"),
    "placing": ("beside", "check_apart", "check_output", "place", "placed"),
    "processes": ("ProcessExecutor",),
    "merge_plan": ("MergePlan", "Notice", "Step", "plan_merge"),
    "recipe": ("Recipe",),
    "reproduce": ("plan_text",),
    "rules": ("Rule", "parse_rule"),
    "runner": ("Event", "RunReport", "run"),
    "store": ("Store",),
    "torch_convert": ("ConvertReport", "convert"),
    "trainer": (
        "Job", "Trainer", "build_options", "get_trainer", "options_as_json", "register_trainer",
        "trainer_names",
    ),
    "tree": ("FineTune", "Load", "Merge", "Train", "Training", "Tree", "binary_tree"),
    "tree_yaml": ("parse_tree", "read_tree"),
    "verification": ("VerifyReport", "verify"),
    "writer": ("CheckpointWriter", "OutputTensor"),
    "yaml_text": ("parse_yaml",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "ConvertReport",
    "DiffReport",
    "Event",
    "FileDigest",
    "FineTune",
    "GivenPath",
    "Job",
    "Load",
    "Merge",
    "MergePlan",
    "MergeReport",
    "Method",
    "MismatchError",
    "Node",
    "NodePlan",
    "NonfiniteError",
    "Notice",
    "OutputError",
    "OutputTensor",
    "ParameterError",
    "Plan",
    "PlanError",
    "ProcessExecutor",
    "RayExecutor",
    "Recipe",
    "Rule",
    "RuleError",
    "RunError",
    "RunReport",
    "SoupError",
    "Step",
    "Store",
    "StoreError",
    "TensorInfo",
    "Train",
    "Trainer",
    "TrainerError",
    "Training",
    "Tree",
    "VerifyReport",
    "__version__",
    "beside",
    "binary_tree",
    "build_options",
    "check",
    "check_apart",
    "check_output",
    "convert",
    "counted",
    "diff",
    "digest_file",
    "digest_files",
    "get_method",
    "get_trainer",
    "how_to_install",
    "lineage_graph",
    "listed",
    "merge",
    "method",
    "method_names",
    "nearest",
    "open_checkpoint",
    "options_as_json",
    "parameter",
    "parse_rule",
    "parse_tree",
    "parse_yaml",
    "place",
    "placed",
    "plan_merge",
    "plan_text",
    "print_json",
    "printable",
    "read_lineage",
    "read_tree",
    "record_training",
    "register_trainer",
    "run",
    "summarize",
    "trainer_names",
    "training_command",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'modelsoup' has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return __all__
