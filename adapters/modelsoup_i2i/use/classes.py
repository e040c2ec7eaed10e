"""Which class has which index in a checkpoint: its metadata say so."""

from __future__ import annotations

import json
from pathlib import Path

from modelsoup import MismatchError, open_checkpoint

CLASSES = "modelsoup.classes"
"""The key in the metadata: a JSON object, name → index."""


def classes_in(checkpoint: Path) -> tuple[str, ...] | None:
    """The classes of a checkpoint by their indices; None where it does not say.

    Raises:
        CheckpointError: it is missing or damaged.
        MismatchError: what it says is no such mapping.
    """
    text = open_checkpoint(checkpoint).metadata.get(CLASSES)
    if text is None:
        return None
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if not isinstance(told, dict) or list(told.values()) != list(range(len(told))):
        raise MismatchError(
            f"{checkpoint}: {CLASSES} in its metadata gives no index to each class, from 0 on"
        )
    return tuple(told)
