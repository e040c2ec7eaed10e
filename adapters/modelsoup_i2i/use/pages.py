"""Pages of what a model makes: its pictures in rows and columns, and what each of them is."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modelsoup import ParameterError, placed

from ..pictures.sheets import grid, save
from .models import Model

SAMPLES_AT_ONCE = 16  # a batch, whatever the page's size


@dataclass(frozen=True)
class Page:
    """Pictures in rows of one length.

    Attributes:
        titles: one a column.
        rows: uint8, height × width × channels.
        tiles: of each picture, in their order: row, column, source, class, z.
    """

    titles: list[str]
    rows: list[list[np.ndarray]] = field(default_factory=list)
    tiles: list[dict[str, object]] = field(default_factory=list)

    def save(self, path: str | os.PathLike[str], *, model: str = "", force: bool = False) -> None:
        """Write it as PNG, and beside it a CSV that tells what each of its pictures is.

        Raises:
            OutputError: one of them exists, or cannot be written.
        """
        png = Path(path)
        with placed(png.with_suffix(".csv"), force=force) as partial:
            columns = ["row", "column", "source", "class", "z"]
            with partial.open("w", newline="", encoding="utf-8") as file:
                told = csv.DictWriter(file, [*columns, "checkpoint"], lineterminator="\n")
                told.writeheader()
                told.writerows({**tile, "checkpoint": model} for tile in self.tiles)
            save(grid(self.rows, self.titles), png)


def by_class(
    model: Model, sources: Sequence[tuple[str, np.ndarray]] | None, labels: Sequence[int], *,
    samples: int = 1, seed: int = 0,
) -> Page:  # fmt: skip
    """A column for each class; a row for each source and sample, or for each sample alone.

    All rows of a sample have the same noise, so that what differs is the source's.

    Args:
        model: which takes a class.
        sources: names and pictures; None for a model that sees none.
        labels: indices of classes.
        samples: for each source.
        seed: of the noise.

    Raises:
        ParameterError: the model takes no class, or the sources are what it does not see.
    """
    if not model.how.classes:
        raise ParameterError(f"{model.name} makes pictures of no classes")
    if (sources is None) != (model.how.source is None):
        wanted = "sees no pictures" if sources else "wants pictures to translate"
        raise ParameterError(f"{model.name} {wanted}")
    names = [model.classes[label] if model.classes else str(label) for label in labels]
    page = Page([*([] if sources is None else ["image"]), *names])
    for name, picture in sources if sources is not None else [("", None)]:
        for sample in range(samples):
            own: list[np.ndarray] = []
            told: list[dict[str, object]] = []
            if picture is not None:
                own, told = [model.seen(picture)], [{"source": name}]
            for label, called in zip(labels, names, strict=True):
                given = model.how.given([""], label, seed=seed, sample=sample)
                own += model.made(None if picture is None else [picture], given)
                told.append({"source": name, "class": called, "z": sample})
            row = len(page.rows)
            page.tiles += [{"row": row, "column": n, **tile} for n, tile in enumerate(told)]
            page.rows.append(own)
    return page
