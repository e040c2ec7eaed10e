"""modelsoup: one checkpoint out of several.

The whole public face is here; each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, TensorInfo, open_checkpoint
    from .engine import MergeReport, merge
    from .recipe import MergePlan, Recipe, plan_merge

_HOMES = {
    "Checkpoint": "checkpoint",
    "TensorInfo": "checkpoint",
    "open_checkpoint": "checkpoint",
    "MergeReport": "engine",
    "merge": "engine",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'modelsoup' has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)
