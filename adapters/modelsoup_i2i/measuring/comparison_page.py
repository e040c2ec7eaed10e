"""The page of a comparison: one HTML file with its pictures in it, and no script."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from modelsoup import counted, printable

from ..pictures.images import list_images
from .metric_names import is_better, reading_of
from .metrics import Result

SHOWN = 8  # test pictures, from all parts
_STYLE = """
:root { color-scheme: light dark; --soft: #66727f; --rule: #8884; --best: #2e8b5733; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 80rem;
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.best { background: var(--best); font-weight: 600; }
.soft { color: var(--soft); } .flaw { color: #a05a00; }
.pictures td { padding: 2px; border: 0; } .pictures img { display: block; width: 8rem; }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--rule); }
"""


@dataclass(frozen=True)
class Row:
    """What became of one trainer.

    Attributes:
        name: what the table calls it.
        trainer: its name.
        options: all of them, as plain data.
        given: the names of those that are not the trainer's defaults.
        steps: of a training.
        seconds: of a step.
        memory: bytes at the most.
        parameters: of all networks.
        took: seconds of each training.
        results: of each metric, one for each seed.
        remarks: what went wrong, or is to be known.
        pictures: the folder of the first seed's translations.
    """

    name: str
    trainer: str
    options: dict[str, Any]
    given: tuple[str, ...]
    steps: int
    seconds: float
    memory: int
    parameters: int
    took: list[float] = field(default_factory=list)
    results: dict[str, list[Result]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    pictures: Path | None = None

    def add(self, results: Iterable[Result]) -> None:
        """Those of a seed."""
        for result in results:
            self.results.setdefault(result.name, []).append(result)

    def mean(self, metric: str) -> float:
        """Over seeds; NaN where there is none."""
        values = [result.value for result in self.results.get(metric, [])]
        return fmean(values) if values else math.nan

    def spread(self, metric: str) -> float:
        """The standard deviation over seeds, of n − 1; NaN of fewer than two."""
        values = [result.value for result in self.results.get(metric, [])]
        return stdev(values) if len(values) > 1 else math.nan

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name, "trainer": self.trainer, "options": self.options,
            "steps": self.steps, "seconds_a_step": self.seconds, "memory": self.memory,
            "parameters": self.parameters, "took": self.took, "remarks": self.remarks,
            "results": {n: [r.as_json() for r in own] for n, own in self.results.items()},
        }  # fmt: skip


def page(
    rows: Sequence[Row], inputs: Path, real: Path, *, title: str, budget: str, seeds: int,
    metrics: Sequence[str], remarks: Sequence[str], command: str,
) -> str:  # fmt: skip
    """The page.

    Args:
        rows: one for each trainer.
        inputs: the folder of test pictures, by whose names translations are found.
        real: that of the other domain's.
        title: what is translated.
        budget: of each training.
        seeds: how often each was trained.
        metrics: the columns.
        remarks: on all of it.
        command: that makes it again.
    """
    flaws = [*remarks, *(f"{row.name}: {remark}" for row in rows for remark in row.remarks)]
    notes = dict.fromkeys(
        result.note for row in rows for own in row.results.values() for result in own
        if result.note
    )  # fmt: skip
    trained = f"{budget} of training each" + (f", {seeds} seeds" if seeds > 1 else "")
    counts = f"{counted(len(list_images(inputs)), 'test picture')} translated, " + (
        f"{len(list_images(real))} of the other domain"
    )
    body = [
        f"<h1>{_text(title)}</h1>", f'<p class="soft">{_text(f"{trained}; {counts}")}.</p>',
        *(f'<p class="flaw">{_text(flaw)}</p>' for flaw in (*flaws, *notes)),
        "<h2>Metrics</h2>", _table(rows, metrics),
        "<h2>Cost</h2>", _cost(rows),
        "<h2>Pictures</h2>", _pictures(rows, inputs, real),
        "<h2>Options</h2>", *map(_options, rows),
        "<h2>How to make it again</h2>", f"<pre>{_text(command)}</pre>",
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def best(rows: Sequence[Row], metric: str) -> Row | None:
    """The one whose mean is the best; None where that is not known, or nothing is compared."""
    if reading_of(metric) in ("to_real", "to_input"):
        return None
    measured = [row for row in rows if not math.isnan(row.mean(metric))]
    if len(measured) < 2:
        return None
    found = measured[0]
    for row in measured[1:]:
        if is_better(metric, row.mean(metric), found.mean(metric)):
            found = row
    return found


def _table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    lines = []
    winners = {metric: best(rows, metric) for metric in metrics}
    for row in rows:
        cells = []
        for metric in metrics:
            mark = ' class="best"' if winners[metric] is row else ""
            cells.append(f"<td{mark}>{_figure(row, metric)}</td>")
        lines.append([f"<td>{_text(row.name)}</td>", *cells])
    legend = "Mean ± standard deviation over seeds, where there are several; the best is marked."
    return _made(["", *metrics], lines) + f'<p class="soft">{legend}</p>'


def _figure(row: Row, metric: str) -> str:
    mean, spread = row.mean(metric), row.spread(metric)
    if math.isnan(mean):
        return "–"
    return f"{mean:.4g}" + ("" if math.isnan(spread) else f" ± {spread:.2g}")


def _cost(rows: Sequence[Row]) -> str:
    heads = ["", "steps", "seconds a step", "a training took", "memory", "parameters"]
    lines = [
        [
            f"<td>{_text(row.name)}</td>",
            *(f"<td>{told}</td>" for told in (
                f"{row.steps:,}", f"{row.seconds:.3g}", f"{fmean(row.took):,.0f} s",
                f"{row.memory / 1e9:.2f} GB", f"{row.parameters:,}",
            )),
        ]
        for row in rows
    ]  # fmt: skip
    legend = (
        "Seconds a step and memory, at the most, are those of a process of its own, which made "
        "some steps before the trainings; parameters are those of all networks."
    )
    return _made(heads, lines) + f'<p class="soft">{legend}</p>'


def _pictures(rows: Sequence[Row], inputs: Path, real: Path) -> str:
    """Some inputs, what became of each, and pictures of the other domain."""
    files, there = list_images(inputs), list_images(real)
    count = min(SHOWN, len(files))
    chosen = [files[n * len(files) // count] for n in range(count)]
    shown = [row for row in rows if row.pictures is not None]
    lines = []
    for number, file in enumerate(chosen):
        name = file.relative_to(inputs)
        partner = real / name
        other = partner if partner.is_file() else there[number * len(there) // count]
        own = [file, *(row.pictures / name for row in shown if row.pictures), other]
        lines.append([f"<td>{_image(one)}</td>" for one in own])
    heads = ["A", *(row.name for row in shown), "of B"]
    return _made(heads, lines, "pictures")


def _image(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{_text(file.name)}" src="data:image/png;base64,{data}">'


def _options(row: Row) -> str:
    given = {name: row.options[name] for name in row.given if name in row.options}
    rest = {name: value for name, value in row.options.items() if name not in given}
    return (
        f"<h3>{_text(row.name)}</h3><p>{_text(row.trainer)}: {_listed(given)}</p>"
        f"<details><summary>All others, which are its defaults</summary><p>{_listed(rest)}</p>"
        f"</details>"
    )


def _listed(options: dict[str, Any]) -> str:
    return _text("; ".join(f"{n} {json.dumps(v, ensure_ascii=False)}" for n, v in options.items()))


def _made(heads: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "figures") -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    rows = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in lines)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>\n{rows}</table></div>'


def _text(value: object) -> str:
    """Whatever comes from files, as text of the page."""
    return escape(printable(str(value)))
