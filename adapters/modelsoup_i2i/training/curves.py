"""Figures by step in a file that grows and that any program reads: CSV."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path


class Curve:
    """A table with a row for each step that is told, and a column for each figure.

    A run that goes on from an earlier step takes what comes after that step out first. A figure
    that was not there before is a column more, which is empty in the rows above.

    Args:
        path: the file; its folder is made when the first row comes.
        after: the step from which the training goes on.
    """

    def __init__(self, path: Path, after: int) -> None:
        self._path = path
        self._columns = ["step", "seconds"]
        self._rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                there = csv.DictReader(file)
                columns = list(there.fieldnames or ())
                if columns[:2] == self._columns:  # else it is somebody else's, or was cut short
                    self._columns = columns
                    self._rows = [row for row in there if _step(row) <= after]
        before = float(self._rows[-1]["seconds"]) if self._rows else 0.0
        self._begun = time.monotonic() - before
        self._stale = path.exists()

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """A row, which is in the file at once."""
        seconds = f"{time.monotonic() - self._begun:.1f}"
        row = {"step": str(step), "seconds": seconds}
        row |= {name: f"{value:.6g}" for name, value in figures.items()}
        new = [name for name in row if name not in self._columns]
        self._columns += new
        self._rows.append(row)
        if self._stale or new or not self._path.exists():
            self._write()
        else:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                file.write(self._text([row]))

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f".{self._path.name}.partial")
        head = ",".join(self._columns) + "\n"
        partial.write_text(head + self._text(self._rows), "utf-8", newline="")
        partial.replace(self._path)
        self._stale = False

    def _text(self, rows: list[dict[str, str]]) -> str:
        made = io.StringIO()
        csv.DictWriter(made, self._columns, lineterminator="\n").writerows(rows)
        return made.getvalue()


def _step(row: Mapping[str, str]) -> int:
    """A row that was cut short, as a crash may leave the last one, counts as a later one."""
    whole = None not in row and None not in row.values()
    text = row.get("step") or ""
    return int(text) if whole and text.isdigit() else 1 << 62
