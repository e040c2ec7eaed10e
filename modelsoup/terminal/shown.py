"""What a training leaves to be looked at, in the folder that its record names; all is optional.

losses.csv                  step,seconds,LOSS,…
metrics.csv                 step,epoch,seconds,METRIC,…
samples/step-0000012.png    a sheet of samples

What is missing or damaged is told in a line.
"""

from __future__ import annotations

import csv
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import are_counted
from ..files.reading import read_small

LOSSES, METRICS = "losses.csv", "metrics.csv"
_OTHERS = ("seconds", "epoch")  # columns that are no curves
_SHEET = re.compile(r"step-(\d{1,15})\.png")
_TABLE = 64 << 20  # bytes of a file of curves
_ROWS = 4000  # that are read of it, evenly
_PICTURE = 8 << 20  # bytes of a file of samples
_PIXELS = 64 << 20  # of one picture, which a browser has to hold


@dataclass(frozen=True)
class Curves:
    """What a file holds.

    Attributes:
        steps: ascending.
        columns: name → a value for each step, NaN where there is none.
        flaw: what could not be read, in a few words; empty if all could.
    """

    steps: Sequence[float]
    columns: Mapping[str, Sequence[float]]
    flaw: str = ""


def read_curves(file: Path) -> Curves:
    """The curves of a file whose header is `step`, perhaps `epoch` and `seconds`, then their names.

    Of a long file some thousand lines are read, evenly. Of a step that is there twice, as after an
    interruption, the later line counts; a line without an end is being written.

    Raises:
        OSError: it cannot be read, or is too large.
    """
    lines = read_small(file, _TABLE).decode("utf-8", "replace").split("\n")[:-1]
    try:
        header = next(csv.reader(lines[:1]), [])
    except csv.Error:
        header = []
    if header[:1] != ["step"]:
        return Curves([], {}, f"{file.name} is no table whose first column is step")
    rows = lines[1:]
    stride = -(-len(rows) // _ROWS) or 1
    found: dict[float, list[float]] = {}
    bad = 0
    for line in rows[::-1][::stride][::-1]:  # counted from the end: the last line is among them
        try:
            step, *values = [float(cell) if cell.strip() else math.nan for cell in line.split(",")]
            if not math.isfinite(step) or len(values) != len(header) - 1:
                raise ValueError
        except ValueError:
            bad += 1
            continue
        found[step] = values
    steps = sorted(found)
    columns = {
        name: [found[step][index] for step in steps]
        for index, name in enumerate(header[1:])
        if name not in _OTHERS
    }
    flaw = f"{are_counted(bad, 'line')} not readable in {file.name}" if bad else ""
    return Curves(steps, columns, flaw)


@dataclass
class Look:
    """What a training left to be looked at.

    Attributes:
        curves: by the name of their file.
        sheets: pictures, by step.
        flaws: what is missing or damaged, a line each.
    """

    curves: dict[str, Curves] = field(default_factory=dict)
    sheets: list[tuple[int, Path]] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)


def look_at(told: object) -> Look:
    """What there is of a training.

    Args:
        told: where, as a record names it.
    """
    look = Look()
    if not isinstance(told, str) or not told.startswith("/") or "\0" in told:
        look.flaws.append("The record names no folder of curves and samples by its whole path.")
        return look
    folder = Path(told)
    absent = []
    try:
        if not folder.is_dir():
            look.flaws.append(f"Its curves and samples are no longer in {folder}.")
            return look
        for name in (LOSSES, METRICS):
            try:
                look.curves[name] = read_curves(folder / name)
                look.flaws += filter(None, [look.curves[name].flaw])
            except FileNotFoundError:
                absent.append(name)
            except OSError as error:
                look.flaws.append(f"{name} cannot be read: {error.strerror or error}.")
        if (folder / "samples").is_dir():
            files = (folder / "samples").iterdir()
            found = ((_SHEET.fullmatch(file.name), file) for file in files)
            look.sheets = sorted((int(match[1]), file) for match, file in found if match)
    except OSError as error:
        look.flaws.append(f"{folder} cannot be read: {error.strerror or error}.")
        return look
    absent += [] if look.sheets else ["samples"]
    if absent:
        look.flaws.append(f"Not in {folder}: {', '.join(absent)}.")
    return look


def read_sheet(file: Path) -> tuple[bytes, tuple[int, int]]:
    """A sheet of samples, which is whole, and its width and height.

    Raises:
        OSError: it cannot be read, or is too large.
        ValueError: it is no picture, or damaged.
    """
    content = read_small(file, _PICTURE)
    return content, png_size(content)


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG picture that is whole: every part of it is what it was written as.

    Raises:
        ValueError: it is none, or damaged; a few words say so.
    """
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("it is no PNG picture")
    place, kind, size = 8, b"", (0, 0)
    while kind != b"IEND":
        head = content[place : place + 8]
        length = int.from_bytes(head[:4], "big")
        part = content[place + 4 : place + 8 + length]
        end = content[place + 8 + length : place + 12 + length]
        if len(end) < 4 or zlib.crc32(part) != int.from_bytes(end, "big"):
            raise ValueError("it is damaged")
        kind = head[4:]
        if place == 8:
            if kind != b"IHDR" or length != 13:
                raise ValueError("it is damaged")
            size = struct.unpack(">II", part[4:12])
        place += 12 + length
    if not 0 < size[0] * size[1] <= _PIXELS:
        raise ValueError(f"it has {size[0]:,} × {size[1]:,} pixels")
    return size
