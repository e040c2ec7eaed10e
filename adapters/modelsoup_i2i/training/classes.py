"""The classes of pictures: counted, and compared with those that a start knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from modelsoup import MismatchError, listed

from ..pictures.picture import Attributed, Images, labels_of
from ..use.classes import classes_in, has_attributes


def by_class(names: Sequence[str], images: Images) -> dict[str, dict[str, Any]]:
    """How many pictures of each class the sets have, under `classes`; nothing without classes.

    Of pictures with attributes it is how many have each, under `attributes`, and under `vectors`
    the XXH3-128 of which has which, in their order, as no file of a picture tells it.
    """
    if not names:
        return {}
    vectors = {of_set: [p.attributes for p in own if isinstance(p, Attributed)]
               for of_set, own in images.items()}  # fmt: skip
    if any(vectors.values()):
        joined = {of_set: b"".join(own) for of_set, own in vectors.items()}
        sums = {
            of_set: np.frombuffer(own, np.uint8).reshape(-1, len(names)).sum(0).tolist()
            for of_set, own in joined.items()
        }
        return {
            "attributes": {n: dict(zip(names, own, strict=True)) for n, own in sums.items()},
            "vectors": {n: xxhash.xxh3_128_hexdigest(own) for n, own in joined.items()},
        }
    found = {}
    for of_set, own in images.items():
        counts = np.bincount(labels_of(own), minlength=len(names)).tolist()
        found[of_set] = dict(zip(names, counts, strict=True))
    return {"classes": found}


def must_have_classes(
    start: Path, names: Sequence[str], *, more: bool = False, attributes: bool = False
) -> None:
    """Check that a start knows the classes of the data, each by the same index.

    Args:
        start: a checkpoint.
        names: of the data.
        more: whether it may know others after them.
        attributes: whether they are attributes, of which a picture may have several.

    Raises:
        MismatchError: it does not; the message names classes that are lacking.
    """
    known, what = classes_in(start), "attributes" if attributes else "classes"
    if known is None or not names:
        return
    if has_attributes(start) != attributes:
        raise MismatchError(
            f"{start} was trained on {'classes' if attributes else 'attributes'}, and the data "
            f"have {what}: of attributes a picture may have several, of classes it has one"
        )
    if tuple(names) == (known[: len(names)] if more else known):
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
        f"{start} was trained on other {what} than those of the data: {'; '.join(said)}"
    )
