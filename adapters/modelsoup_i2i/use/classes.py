"""Which class, or attribute, has which index in a checkpoint: its metadata say so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from modelsoup import MismatchError, ParameterError, listed, nearest, open_checkpoint

from .translator import Switched

CLASSES = "modelsoup.classes"
"""The key in the metadata: a JSON object, name → index."""
ATTRIBUTES = "modelsoup.attributes"
"""The same in its place, of attributes, of which a picture may have several."""


def classes_in(checkpoint: Path) -> tuple[str, ...] | None:
    """The classes, or attributes, of a checkpoint by their indices; None where it does not say.

    Raises:
        CheckpointError: it is missing or damaged.
        MismatchError: what it says is no such mapping.
    """
    metadata = open_checkpoint(checkpoint).metadata
    key = ATTRIBUTES if ATTRIBUTES in metadata else CLASSES
    text = metadata.get(key)
    if text is None:
        return None
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if not isinstance(told, dict) or list(told.values()) != list(range(len(told))):
        raise MismatchError(
            f"{checkpoint}: {key} in its metadata gives no index to each "
            f"{'attribute' if key == ATTRIBUTES else 'class'}, from 0 on"
        )
    return tuple(told)


def has_attributes(checkpoint: Path) -> bool:
    """Whether a checkpoint says that its networks know attributes.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return ATTRIBUTES in open_checkpoint(checkpoint).metadata


def classes_told(names: Sequence[str], *, attributes: bool = False) -> dict[str, str]:
    """The metadata of a checkpoint whose networks know these classes, by their indices.

    Args:
        names: of the classes; or, as `attributes` says, of attributes.
        attributes: which of both.
    """
    if not names:
        return {}
    key = ATTRIBUTES if attributes else CLASSES
    return {key: json.dumps({name: index for index, name in enumerate(names)})}


def switched(text: str, names: Sequence[str], called: str) -> Switched:
    """Attributes by their names: `Blond_Hair+Male`, to be there; `Male=0`, to be gone.

    Args:
        text: names with `+` between them; after one `=0`, or `=1`, which is meant without it.
        names: of all attributes, by their indices.
        called: what errors call the model.

    Raises:
        ParameterError: one is not there, or named twice, or set to something else.
    """
    found: dict[str, str] = {}
    for part in text.split("+"):
        name, told, value = (own.strip() for own in part.partition("="))
        if name not in names:
            raise ParameterError(
                f"{called} has no attribute {name!r}{nearest(name, names)} (it has {listed(names)})"
            )
        if name in found:
            raise ParameterError(f"the attribute {name!r} is named twice in {text!r}")
        if told and value not in ("0", "1"):
            raise ParameterError(f"{name} is {value!r} in {text!r}, where 0 or 1 is expected")
        found[name] = value or "1"
    on, off = (tuple(n for n, name in enumerate(names) if found.get(name) == v) for v in "10")
    return Switched(on, off)
