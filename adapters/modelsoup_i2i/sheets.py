"""Pages of pictures with labels, for a person to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelsoup import ParameterError

from .images import save_atomically

GAP = 4
_LINE = 16


def grid(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Any:
    """A `PIL.Image` of rows of pictures, each uint8 height × width × 3.

    Args:
        rows: of one length; cells are as large as the largest picture.
        titles: one a column, above it.
        labels: one a row, above it.

    Raises:
        ParameterError: no pictures, or not as many texts as columns or rows.
    """
    from PIL import Image, ImageDraw

    columns = {len(row) for row in rows}
    if len(columns) != 1 or 0 in columns:
        raise ParameterError("a page needs rows of pictures, all of one length")
    (width,) = columns
    for texts, there, what in ((titles, width, "titles"), (labels, len(rows), "labels")):
        if texts and len(texts) != there:
            raise ParameterError(f"a page of {there} has {len(texts)} {what}")
    high, wide = (max(picture.shape[axis] for row in rows for picture in row) for axis in (0, 1))
    top = _LINE if titles else 0
    step = high + GAP + (_LINE if labels else 0)
    page = Image.new("RGB", (width * (wide + GAP) + GAP, top + len(rows) * step + GAP), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (wide + GAP), 2), title, fill="black")
    for number, row in enumerate(rows):
        y = top + GAP + number * step
        if labels:
            draw.text((GAP, y), labels[number], fill="black")
            y += _LINE
        for column, picture in enumerate(row):
            page.paste(Image.fromarray(picture), (GAP + column * (wide + GAP), y))
    return page


def save(page: Any, path: str | os.PathLike[str]) -> None:
    """Write a page as PNG, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    save_atomically(page, Path(path))
