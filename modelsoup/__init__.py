"""modelsoup: one checkpoint out of several.

The whole public face is here. A name is imported when it is first used, so that `import modelsoup`
and `soup --help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import moved  # noqa: F401  (importing it finds modules by their old names)
from .version import __version__

if TYPE_CHECKING:
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
    from .files.cache import cache_folder
    from .files.checkpoint import Checkpoint, TensorInfo, open_checkpoint
    from .files.digest import FileDigest, digest_file, digest_files
    from .files.inspection import Node, summarize
    from .files.placing import beside, check_apart, check_output, place, placed
    from .files.torch_convert import ConvertReport, convert
    from .files.writer import CheckpointWriter, OutputTensor
    from .files.yaml_text import parse_yaml
    from .merging.compare import DiffReport, diff
    from .merging.experts import PackReport, get_expert, pack_experts
    from .merging.extraction import extract_adapter
    from .merging.forms import Block, PerModel, Rows, Tensor, WeightedSum, Whole
    from .merging.in_memory import merge_arrays
    from .merging.kept import Kept, drawn
    from .merging.lineage import lineage_graph, read_lineage
    from .merging.lora import AdapterReport, merge_adapters
    from .merging.merge import MergeReport, merge
    from .merging.methods import Method, get_method, method, method_names, parameter
    from .merging.plan import MergePlan, Notice, Step
    from .merging.planning import plan_merge
    from .merging.recipe import Recipe
    from .merging.reductions import Gram, Sum, Total
    from .merging.rules import Rule, parse_rule
    from .merging.thresholds import Largest
    from .merging.verification import VerifyReport, verify
    from .running.executors import RayExecutor
    from .running.processes import ProcessExecutor
    from .running.runner import Event, RunReport, run
    from .terminal.cli_shared import GivenPath, print_json
    from .terminal.cli_train import training_command
    from .trees.lineage import record_training
    from .trees.operations import FineTune, Load, Merge, Train, Training, Tree, binary_tree
    from .trees.plan import NodePlan, Plan, check
    from .trees.reproduce import plan_text
    from .trees.store import Store
    from .trees.trainer import (
        Job,
        Trainer,
        build_options,
        get_trainer,
        options_as_json,
        register_trainer,
        trainer_names,
    )
    from .trees.tree_yaml import parse_tree, read_tree

_HOMES = {
    "files.checkpoint": ("Checkpoint", "TensorInfo", "open_checkpoint"),
    "terminal.cli_shared": ("GivenPath", "print_json"),
    "terminal.cli_train": ("training_command",),
    "merging.compare": ("DiffReport", "diff"),
    "files.cache": ("cache_folder",),
    "files.digest": ("FileDigest", "digest_file", "digest_files"),
    "merging.experts": ("PackReport", "get_expert", "pack_experts"),
    "merging.extraction": ("extract_adapter",),
    "merging.lora": ("AdapterReport", "merge_adapters"),
    "merging.merge": ("MergeReport", "merge"),
    "errors": (
        "CheckpointError", "MismatchError", "NonfiniteError", "OutputError", "ParameterError",
        "PlanError", "RuleError", "RunError", "SoupError", "StoreError", "TrainerError", "counted",
        "how_to_install", "listed", "nearest", "printable",
    ),
    "running.executors": ("RayExecutor",),
    "files.inspection": ("Node", "summarize"),
    "merging.forms": ("Block", "PerModel", "Rows", "Tensor", "WeightedSum", "Whole"),
    "merging.in_memory": ("merge_arrays",),
    "merging.kept": ("Kept", "drawn"),
    "merging.reductions": ("Gram", "Sum", "Total"),
    "merging.thresholds": ("Largest",),
    "merging.lineage": ("lineage_graph", "read_lineage"),
    "trees.lineage": ("record_training",),
    "merging.methods": ("Method", "get_method", "method", "method_names", "parameter"),
    "trees.plan": ("NodePlan", "Plan", "check"),
    "files.placing": ("beside", "check_apart", "check_output", "place", "placed"),
    "running.processes": ("ProcessExecutor",),
    "merging.plan": ("MergePlan", "Notice", "Step"),
    "merging.planning": ("plan_merge",),
    "merging.recipe": ("Recipe",),
    "trees.reproduce": ("plan_text",),
    "merging.rules": ("Rule", "parse_rule"),
    "running.runner": ("Event", "RunReport", "run"),
    "trees.store": ("Store",),
    "files.torch_convert": ("ConvertReport", "convert"),
    "trees.trainer": (
        "Job", "Trainer", "build_options", "get_trainer", "options_as_json", "register_trainer",
        "trainer_names",
    ),
    "trees.operations": ("FineTune", "Load", "Merge", "Train", "Training", "Tree", "binary_tree"),
    "trees.tree_yaml": ("parse_tree", "read_tree"),
    "merging.verification": ("VerifyReport", "verify"),
    "files.writer": ("CheckpointWriter", "OutputTensor"),
    "files.yaml_text": ("parse_yaml",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterReport",
    "Block",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "ConvertReport",
    "DiffReport",
    "Event",
    "FileDigest",
    "FineTune",
    "GivenPath",
    "Gram",
    "Job",
    "Kept",
    "Largest",
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
    "PackReport",
    "ParameterError",
    "PerModel",
    "Plan",
    "PlanError",
    "ProcessExecutor",
    "RayExecutor",
    "Recipe",
    "Rows",
    "Rule",
    "RuleError",
    "RunError",
    "RunReport",
    "SoupError",
    "Step",
    "Store",
    "StoreError",
    "Sum",
    "Tensor",
    "TensorInfo",
    "Total",
    "Train",
    "Trainer",
    "TrainerError",
    "Training",
    "Tree",
    "VerifyReport",
    "WeightedSum",
    "Whole",
    "__version__",
    "beside",
    "binary_tree",
    "build_options",
    "cache_folder",
    "check",
    "check_apart",
    "check_output",
    "convert",
    "counted",
    "diff",
    "digest_file",
    "digest_files",
    "drawn",
    "extract_adapter",
    "get_expert",
    "get_method",
    "get_trainer",
    "how_to_install",
    "lineage_graph",
    "listed",
    "merge",
    "merge_adapters",
    "merge_arrays",
    "method",
    "method_names",
    "nearest",
    "open_checkpoint",
    "options_as_json",
    "pack_experts",
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
