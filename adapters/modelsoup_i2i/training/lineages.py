"""At which size a checkpoint was trained, as its lineage tells."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

from modelsoup import Checkpoint, CheckpointError, read_lineage

from ..pictures.transforms import Mode


def trained_at(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, Any]:
    """Mode and sizes of the trainings that a checkpoint was made of; nothing if they differ.

    Args:
        checkpoint: with a lineage.
        names: how a plan, and with it a lineage, may call the trainer.
    """
    try:
        made = read_lineage(checkpoint)
    except CheckpointError:  # of a later version, say: then it tells as little as none
        return {}
    if made is None:
        return {}
    steps: Mapping[str, Any] = made.get("ancestors", {})
    found: list[dict[str, Any]] = []
    pending: list[tuple[Mapping[str, Any], dict[str, Any]]] = [(made, {})]
    seen: set[str] = set()
    while pending:
        step, later = pending.pop()
        options = step.get("options", {})
        own = step.get("trainer") in names
        # What is trained in INT8 has the trainer's options in its own, and the start's sizes.
        told = _sizes(options if own else options.get("training", {}))
        if told is None:
            return {}
        later = {**told, **later}
        if own:
            found.append({**_DEFAULTS, **later})
            continue
        inputs = [entry.get("key") or entry.get("xxh3_128") for entry in step["inputs"]]
        if options.get("of") in names and not any(name in steps for name in inputs):
            # Its start said nothing: it was told these, or took them.
            found.append({**_DEFAULTS, **later})
        for name in inputs:
            if name in steps and name not in seen:
                seen.add(name)
                pending.append((steps[name], later))
    return found[0] if found and all(sizes == found[0] for sizes in found) else {}


_DEFAULTS = {"mode": "resize_and_crop", "load_size": 286, "crop_size": 256}


def _sizes(options: object) -> dict[str, Any] | None:
    """Those of the options, from a file that anybody may have written, that say a size.

    None where they are not what such options can be.
    """
    if not isinstance(options, dict):
        return None
    found = {name: options[name] for name in _DEFAULTS if name in options}
    numbers = [found[name] for name in ("load_size", "crop_size") if name in found]
    flat = [n for number in numbers for n in (number if isinstance(number, list) else [number])]
    sound = found.get("mode", "none") in get_args(Mode) and all(type(n) is int for n in flat)
    return found if sound else None
