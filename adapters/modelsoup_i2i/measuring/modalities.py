"""How good modalities are: sizes, cosines, and agreement with classes that are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from modelsoup import listed

from ..pictures.modalities import DOMAINS, Modalities
from .clusters import mutual_information, purity


def figures(own: Modalities, names: Mapping[str, str] | None = None) -> dict[str, float]:
    """Of the modalities: how many, how large, how close; and with names how pure.

    Args:
        own: of pictures.
        names: the classes of A's pictures that are known, by their paths.

    Returns:
        `modalities`, `smallest` and `largest`, of A; `cosine`, the mean to the own centroid, where
        there are such; `purity` and `nmi`, where names are known of pictures.
    """
    sizes = own.sizes[: own.k_source]
    told = {
        "modalities": float(own.k_source), "smallest": float(min(sizes)),
        "largest": float(max(sizes)),
    }  # fmt: skip
    scores = [i.score for i in own.items if i.domain == "A" and i.score is not None]
    if scores:
        told["cosine"] = float(np.mean(scores))
    both = [(i.label, (names or {})[i.path]) for i in own.items
            if i.domain == "A" and i.path in (names or {})]  # fmt: skip
    if both:
        labels, classes = (
            np.unique(one, return_inverse=True)[1] for one in zip(*both, strict=True)
        )
        told |= {"purity": purity(labels, classes), "nmi": mutual_information(labels, classes)}
    return told


def told(own: Modalities) -> Iterator[str]:
    """The sizes, a line for each domain that has pictures."""
    for domain in DOMAINS:
        if any(item.domain == domain for item in own.items):
            classes = [f"{own.classes[n]} {own.sizes[n]}" for n in _labels(own)[domain]]
            yield f"modalities of {domain}, {len(classes)}: {listed(classes, len(classes))}"


def warnings(own: Modalities, count_b: int | None = None) -> Iterator[str]:
    """What a translator will have trouble with, as sentences.

    Args:
        own: of the pictures that it will be trained on.
        count_b: how many pictures B has, if that is known.
    """
    sizes = own.sizes
    for domain, labels in _labels(own).items():
        mean = sum(sizes[n] for n in labels) / max(len(labels), 1)
        empty = [own.classes[n] for n in labels if mean and not sizes[n]]
        small = [f"{own.classes[n]} {sizes[n]}" for n in labels if 0 < sizes[n] < mean / 4]
        large = [
            f"{own.classes[n]} {sizes[n]}" for n in labels
            if domain == "A" and count_b is not None and sizes[n] > 2 * count_b
        ]  # fmt: skip
        if empty:
            yield f"modalities without pictures: {listed(empty)}"
        if small:
            yield f"modalities of less than a quarter of the mean, {mean:.0f}: {listed(small)}"
        if large:
            yield (
                f"modalities of more than twice as many pictures as B, which has {count_b}: "
                f"{listed(large)} (a larger k makes smaller ones)"
            )


def _labels(own: Modalities) -> dict[str, range]:
    first, last = own.k_source, len(own.classes)
    return {"A": range(first), "B": range(first, last)}
