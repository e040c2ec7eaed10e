"""Pages of pictures with labels, for a person to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from modelsoup import ParameterError

from .images import as_rgb, pillow_image, save_atomically

GAP = 4
_LINE = 16


def grid(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Any:
    """A `PIL.Image` of rows of pictures, each uint8 height × width × channels.

    Args:
        rows: of one length. A column is as wide as its widest picture or title, a row as high
            as its highest picture; pictures are centred, never scaled.
        titles: one a column, above it.
        labels: one a row, at its left.

    Raises:
        ParameterError: no pictures, or not as many texts as columns or rows.
    """
    from PIL import Image, ImageDraw

    columns = {len(row) for row in rows}
    if len(columns) != 1 or 0 in columns:
        raise ParameterError("a page needs rows of pictures, all of one length")
    (count,) = columns
    titles, labels = titles or (), labels or ()
    for texts, there, what in ((titles, count, "titles"), (labels, len(rows), "labels")):
        if texts and len(texts) != there:
            raise ParameterError(f"a page of {there} has {len(texts)} {what}")
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def length(text: str) -> int:
        pixels: float = ruler.textlength(text)
        return ceil(pixels)

    wide = [max(row[n].shape[1] for row in rows) for n in range(count)]
    if titles:
        wide = [max(w, length(title) + 2 * GAP) for w, title in zip(wide, titles, strict=True)]
    high = [max(picture.shape[0] for picture in row) for row in rows]
    if labels:
        high = [max(h, _LINE) for h in high]
    left = GAP + (max(map(length, labels)) + GAP if labels else 0)
    top = GAP + (_LINE if titles else 0)
    size = (left + sum(wide) + GAP * count, top + sum(high) + GAP * len(rows))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for n, title in enumerate(titles):
        x = left + sum(wide[:n]) + GAP * n
        draw.text((x + (wide[n] - length(title)) // 2, 2), title, fill="black")
    y = top
    for number, row in enumerate(rows):
        if labels:
            draw.text((GAP, y + (high[number] - _LINE) // 2), labels[number], fill="black")
        x = left
        for n, picture in enumerate(row):
            dx, dy = (wide[n] - picture.shape[1]) // 2, (high[number] - picture.shape[0]) // 2
            page.paste(pillow_image(as_rgb(picture)), (x + dx, y + dy))
            x += wide[n] + GAP
        y += high[number] + GAP
    return page


def save(page: Any, path: str | os.PathLike[str]) -> None:
    """Write a page as PNG, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    save_atomically(page, Path(path))
