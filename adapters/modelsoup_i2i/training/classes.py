"""Which class has which index: kept in a checkpoint's metadata, and compared with a start's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modelsoup import MismatchError, listed

from ..pictures.picture import Images, labels_of
from ..use.classes import CLASSES, classes_in


def classes_told(names: Sequence[str]) -> dict[str, str]:
    """The metadata of a checkpoint whose networks know these classes, by their indices."""
    if not names:
        return {}
    return {CLASSES: json.dumps({name: index for index, name in enumerate(names)})}


def by_class(names: Sequence[str], images: Images) -> dict[str, dict[str, dict[str, int]]]:
    """How many pictures of each class the sets have, under `classes`; nothing without classes."""
    if not names:
        return {}
    found = {}
    for of_set, own in images.items():
        counts = np.bincount(labels_of(own), minlength=len(names)).tolist()
        found[of_set] = dict(zip(names, counts, strict=True))
    return {"classes": found}


def must_have_classes(start: Path, names: Sequence[str], *, more: bool = False) -> None:
    """Check that a start knows the classes of the data, each by the same index.

    Args:
        start: a checkpoint.
        names: of the data.
        more: whether it may know others after them.

    Raises:
        MismatchError: it does not; the message names classes that are lacking.
    """
    known = classes_in(start)
    if known is None or not names or tuple(names) == (known[: len(names)] if more else known):
        return
    said = []
    for there, other, where in ((known, names, "the data lack"), (names, known, "it lacks")):
        lacking = [repr(name) for name in there if name not in other]
        if lacking:
            said.append(f"{where} {listed(lacking)}")
    if not said:
        index = next(n for n, (old, new) in enumerate(zip(known, names, strict=True)) if old != new)
        said = [f"it has {known[index]!r} where the data have {names[index]!r}, at index {index}"]
    raise MismatchError(
        f"{start} was trained on other classes than those of the data: {'; '.join(said)}"
    )
