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
    from .compare import DiffReport, diff
    from .digest import FileDigest, digest_file
    from .engine import MergeReport, merge
    from .errors import (
        CheckpointError,
        MismatchError,
        NonfiniteError,
        OutputError,
        ParameterError,
        RuleError,
        SoupError,
    )
    from .inspection import Node, summarize
    from .lineage import lineage_graph, read_lineage
    from .methods import Method, get_method, method, method_names, parameter
    from .recipe import MergePlan, Notice, Recipe, Step, plan_merge
    from .rules import Rule, parse_rule
    from .torch_convert import ConvertReport, convert
    from .verification import VerifyReport, verify
    from .writer import CheckpointWriter, OutputTensor

_HOMES = {
    "checkpoint": ("Checkpoint", "TensorInfo", "open_checkpoint"),
    "compare": ("DiffReport", "diff"),
    "digest": ("FileDigest", "digest_file"),
    "engine": ("MergeReport", "merge"),
    "errors": (
        "CheckpointError", "MismatchError", "NonfiniteError", "OutputError", "ParameterError",
        "RuleError", "SoupError",
    ),
    "inspection": ("Node", "summarize"),
    "lineage": ("lineage_graph", "read_lineage"),
    "methods": ("Method", "get_method", "method", "method_names", "parameter"),
    "recipe": ("MergePlan", "Notice", "Recipe", "Step", "plan_merge"),
    "rules": ("Rule", "parse_rule"),
    "torch_convert": ("ConvertReport", "convert"),
    "verification": ("VerifyReport", "verify"),
    "writer": ("CheckpointWriter", "OutputTensor"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "ConvertReport",
    "DiffReport",
    "FileDigest",
    "MergePlan",
    "MergeReport",
    "Method",
    "MismatchError",
    "Node",
    "NonfiniteError",
    "Notice",
    "OutputError",
    "OutputTensor",
    "ParameterError",
    "Recipe",
    "Rule",
    "RuleError",
    "SoupError",
    "Step",
    "TensorInfo",
    "VerifyReport",
    "__version__",
    "convert",
    "diff",
    "digest_file",
    "get_method",
    "lineage_graph",
    "merge",
    "method",
    "method_names",
    "open_checkpoint",
    "parameter",
    "parse_rule",
    "plan_merge",
    "read_lineage",
    "summarize",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'modelsoup' has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return __all__
