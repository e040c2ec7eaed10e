"""What a training's result was made of, as it is recorded beside that of merges."""

from __future__ import annotations

from typing import Any

from ..files.checkpoint import Checkpoint
from ..files.digest import digest_checkpoint
from ..merging.lineage import FORMAT, input_entry, read_lineage, refuse_circles
from ..version import __version__
from .operations import FineTune, Train


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
        entry = input_entry(start, digest_checkpoint(start), sha256=False)
        content["inputs"].append(entry)
        earlier = read_lineage(start)
        if earlier is not None:
            ancestors = earlier.pop("ancestors", {})
            content["ancestors"] = {**ancestors, entry["xxh3_128"]: earlier}
            refuse_circles(content, [str(start.path)])
    return content
