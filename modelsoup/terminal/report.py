"""A page of HTML on a store or a checkpoint: trees, metrics, curves, samples, how to make it again.

The page stands alone: no script, nothing from elsewhere, which its own policy forbids. Whatever
comes from files is escaped.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import SoupError, counted, printable, sized
from ..trees.operations import Tree
from ..trees.plan import NodePlan, Plan
from ..trees.reproduce import tree_of
from ..trees.store import Store
from ..trees.trainer import trainer_defaults
from ..version import __version__
from .curves import chart, charts
from .picture import made_by, svg, worded
from .shown import LOSSES, Look, look_at, read_sheet
from .subject import SHOWN, Model, Root, Subject, begun, inputs_of, mapping_of, of_path, quoted

FIGURES, TEXTS = 24_000_000, 5_000_000
"""Bytes of a page that pictures and curves may take, and what is said of models: with trees and the
table of metrics it has about 32 MB at most. What has no place is counted, and not shown."""
_MODELS = 500  # that are told one by one, the newest
_NODES = 1000  # of all trees that are drawn
_COLUMNS = 40  # metrics in one table
_EARLIER = 6  # sheets of a model beside its newest
_OPEN = 12  # models up to which each one's part of the page is unfolded
_IN_A_BOX = 3  # metrics
_LONG = 2000  # characters of a value
_TOLD = ("device", "versions", SHOWN)  # notes that have places of their own

Names = Mapping[str, str]
"""A model's mark → what the page calls it."""


def report(path: Path, store: Store | None = None) -> str:
    """The page on a store, or on a checkpoint.

    Args:
        path: either.
        store: where records of what a checkpoint was made of may be.

    Raises:
        CheckpointError: it is neither, or cannot be read.
        PlanError: the checkpoint holds no lineage.
        StoreError: the store cannot be read.
    """
    return _page(of_path(path, store))


class _Room:
    """What may still be put into a page."""

    def __init__(self, nbytes: int) -> None:
        self.left = nbytes
        self.refused = 0

    def holds(self, *parts: str) -> bool:
        """Whether there is a place for some parts, which they take then."""
        nbytes = sum(len(part.encode()) for part in parts)
        if nbytes > self.left:
            self.refused += 1
            return False
        self.left -= nbytes
        return True


def _page(subject: Subject) -> str:
    every = sorted(subject.models.values(), key=lambda model: begun(model.record))
    trained = [model for model in every if model.is_trained]
    merged = [model for model in every if not model.is_trained]
    names = _unique_names(every)
    figures, texts = _Room(FIGURES), _Room(TEXTS)
    told = trained[-_MODELS:]
    sections = _trained(told, names, subject, figures, texts)
    merges = _merged(merged[-_MODELS:], names, subject, texts)
    again = _again(subject.roots[:_MODELS], names, texts)
    remarks = list(subject.remarks)
    unsaid = len(trained) + len(merged) - len(told) - len(merged[-_MODELS:])
    if unsaid:
        remarks.append(f"{counted(unsaid, 'model')} left out: the last {_MODELS} are told.")
    for room, most, what in ((figures, FIGURES, "figure"), (texts, TEXTS, "text")):
        if room.refused:
            remarks.append(
                f"{counted(room.refused, what)} left out: all {what}s of a page may have "
                f"{sized(most)}."
            )
    now = datetime.now().astimezone()
    body = [
        f"<header><h1>{_text(subject.title)}</h1>",
        f'<p class="soft">{_text(subject.told)}</p>',
        *(f'<p class="flaw">{_text(remark)}</p>' for remark in remarks),
        "</header>",
        *_part("Trees", _trees(subject, names)),
        *_part("Metrics", _comparison(told, names)),
        *_part("Trained", sections),
        *_part("Merged", merges),
        *_part("How to make it again", again),
        f'<footer><p class="soft">Written by modelsoup {_text(__version__)}, '
        f"{now:%Y-%m-%d %H:%M %Z}.</p></footer>",
    ]
    style = (files(__package__) / "report.css").read_text("utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(subject.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _part(heading: str, content: str) -> list[str]:
    return [f"<section><h2>{heading}</h2>{content}</section>"] if content else []


def _text(value: object) -> str:
    """Whatever comes from files, as text of the page."""
    text = str(value)
    if len(text) > _LONG:
        text = f"{text[:_LONG]}… ({len(text):,} characters)"
    return escape(printable(text))


def _lines(text: str) -> str:
    return "\n".join(escape(printable(line)) for line in text.split("\n"))


def _flaws(told: Iterable[object]) -> str:
    return "".join(f'<p class="flaw">{_text(flaw)}</p>' for flaw in told)


def _unique_names(models: Sequence[Model]) -> Names:
    """What models are called, with the beginning of the mark where several have one name."""
    count: dict[str, int] = {}
    for model in models:
        count[model.name] = count.get(model.name, 0) + 1
    return {m.mark: m.name if count[m.name] == 1 else f"{m.name} ({m.mark[:8]})" for m in models}


def _link(mark: str, names: Names) -> str:
    return f'<a href="#m-{_text(mark)}">{_text(names[mark])}</a>'


# Trees


def _trees(subject: Subject, names: Names) -> str:
    drawn, left = [], _NODES
    for root in subject.roots:
        picture = _flaws([root.flaw])
        if root.made is not None:
            try:
                tree, contents = tree_of(root.made, root.names, root=root.model.name, most=left)
                left -= len(tree.graph)
                picture = f'<div class="scroll">{_drawn(tree, contents, root, subject)}</div>'
            except SoupError as error:
                picture = _flaws([f"The tree is not drawn: {error}."])
        plan = f" of {_text(Path(root.plan_name).name)}" if root.plan_name else ""
        caption = f"{_link(root.model.mark, names)}{plan}"
        drawn.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="trees">{"".join(drawn)}</div>' if drawn else ""


def _drawn(tree: Tree, contents: Mapping[str, str], root: Root, subject: Subject) -> str:
    marks = {node: subject.marks.get(content, "") for node, content in contents.items()}
    marks[tree.root] = root.model.mark
    of = {node: subject.models[mark] for node, mark in marks.items() if mark in subject.models}
    plan = Plan(tree, {n: NodePlan(n, made, None, done=True) for n, made in tree.operations()})
    notes = {node: _in_a_box(model.metrics) for node, model in of.items()}
    return svg(plan, notes, links={n: f"#m-{m.mark}" for n, m in of.items()}, styled=False)


def _in_a_box(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {figure(metrics[name])}{_arrow(name)}" for name in _ranked(metrics)][
        :_IN_A_BOX
    ]


# Metrics


_LESS = re.compile(r"(fid|kid)([-_ ].*)?|[fk]d-.+|(.*[^a-z])?(loss|error)(es|s)?([^a-z].*)?", re.I)
_MORE = re.compile(r"psnr|ssim|(st-)?lpips_pairs|(.*[^a-z])?accuracy([^a-z].*)?", re.I)


def better(name: str) -> int:
    """Which way a metric is better, by its name: −1 down, 1 up, 0 where that is not known."""
    if _LESS.fullmatch(name):
        return -1
    return 1 if _MORE.fullmatch(name) else 0


def _arrow(name: str) -> str:
    return {-1: " ↓", 0: "", 1: " ↑"}[better(name)]


def _ranked(names: Iterable[str]) -> list[str]:
    """The most telling metrics first: what was measured, what was minimised, and the rest."""
    return sorted(names, key=lambda name: (better(name) == 0, "loss" in name.lower()))


def figure(value: float) -> str:
    """A figure in four digits, a whole number in all of its."""
    if not math.isfinite(value):
        return str(value)
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def column(values: Sequence[float]) -> list[str]:
    """The figures of a column, with their points below each other where four digits suffice."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    is_whole = all(size == int(size) for size in sizes)
    if is_whole or len(sizes) < len(values) or max(sizes) >= 1e9 or max(sizes) > 1000 * min(sizes):
        return [figure(value) for value in values]
    digits = min(max(3 - math.floor(math.log10(max(sizes))), 0), 9)
    told = [f"{value:.{digits}f}" for value in values]
    while digits and all(text[-1] == "0" for text in told):
        told, digits = [text[:-1] for text in told], digits - 1
    return told


def _comparison(models: Sequence[Model], names: Names) -> str:
    """A table of all metrics, the best of each marked where it is known which that is."""
    measured = [model for model in models if model.metrics]
    every = _ranked(dict.fromkeys(name for model in measured for name in model.metrics))
    columns = every[:_COLUMNS]
    cells: dict[tuple[str, str], str] = {}
    for name in columns:
        having = [model for model in measured if name in model.metrics]
        values = [model.metrics[name] for model in having]
        best = max((better(name) * v for v in values if math.isfinite(v)), default=None)
        is_known = better(name) != 0 and len(set(values)) > 1
        for model, value, told in zip(having, values, column(values), strict=True):
            mark = ' class="best"' if is_known and better(name) * value == best else ""
            cells[model.mark, name] = f"<td{mark}>{_text(told)}</td>"
    if not cells:
        return ""
    head = "".join(f"<th>{_text(name)}{_arrow(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><td>{_link(model.mark, names)}</td>"
        + "".join(cells.get((model.mark, name), "<td></td>") for name in columns)
        + "</tr>"
        for model in measured
    )
    legend = (
        "↓ less is better, ↑ more is better, and the best is marked; of others it is not known."
    )
    if len(every) > len(columns):
        legend += f" {counted(len(every) - len(columns), 'metric')} more are told with each model."
    return (
        f'<div class="scroll"><table class="figures"><tr><th>model</th>{head}</tr>{rows}</table>'
        f'</div><p class="soft">{legend}</p>'
    )


# What was trained


def _trained(
    models: Sequence[Model], names: Names, subject: Subject, figures: _Room, texts: _Room
) -> str:
    looks = {m.mark: look_at(m.notes[SHOWN]) if SHOWN in m.notes else Look() for m in models}
    # Where there is no place for all, each model's newest sheet comes before curves, and those
    # before earlier sheets.
    newest = {m.mark: _sheets(m, looks[m.mark], figures, slice(-1, None)) for m in models}
    drawn = {m.mark: _charts(looks[m.mark], figures) for m in models}
    before = slice(-1 - _EARLIER, -1)
    earlier = {m.mark: _sheets(m, looks[m.mark], figures, before) for m in models}
    sections = []
    for model in models:
        look, mark = looks[model.mark], model.mark
        more = len(look.sheets) - 1 - _EARLIER
        rest = f'<p class="soft">{more:,} more are in the folder.</p>' if more > 0 else ""
        folded = f"<details><summary>Earlier samples</summary>{earlier[mark]}{rest}</details>"
        samples = newest[mark] + (folded if earlier[mark] else "")
        chips, (how, facts) = _chips(model), _facts(model, names, subject)
        if not texts.holds(chips, facts):
            chips = facts = ""
        state = " open" if len(models) <= _OPEN else ""
        sections.append(
            f'<details class="node" id="m-{_text(mark)}"{state}><summary>'
            f'<h3>{_text(names[mark])}</h3><span class="soft">{how}</span></summary>'
            f"{chips}{_flaws(look.flaws)}"
            f"{_headed('Samples', samples)}{_headed('Curves', drawn[mark])}{facts}</details>"
        )
    return "".join(sections)


def _headed(heading: str, content: str) -> str:
    return f"<h4>{heading}</h4>{content}" if content else ""


def _sheets(model: Model, look: Look, room: _Room, which: slice) -> str:
    """Sheets of samples as data, the newest first."""
    shown = []
    for step, file in look.sheets[which][::-1]:
        try:
            content, (width, height) = read_sheet(file)
        except (OSError, ValueError) as error:
            why = error.strerror or error if isinstance(error, OSError) else error
            look.flaws.append(f"{file.name} is not shown: {why}.")
            continue
        alt = _text(f"samples of {model.name} at step {step}")
        sheet = (
            '<figure class="sheet"><img src="data:image/png;base64,'
            f'{base64.b64encode(content).decode()}" width="{width}" height="{height}" '
            f'alt="{alt}"><figcaption>step {step:,}</figcaption></figure>'
        )
        if room.holds(sheet):
            shown.append(sheet)
    return "".join(shown)


def _charts(look: Look, room: _Room) -> str:
    drawn = []
    for file, curves in look.curves.items():
        for names in charts(curves, each=file != LOSSES):
            keys = "".join(map(_key, range(len(names)), names))
            picture = chart(curves, names, smooth=file == LOSSES)
            part = f"<figure>{picture}<figcaption>{keys}</figcaption></figure>"
            if room.holds(part):
                drawn.append(part)
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _key(number: int, name: str) -> str:
    line = f'<svg viewBox="0 0 16 8"><path class="c{number}" d="M0 4H16"/></svg>'
    return f'<span class="key">{line}{_text(name)}{_arrow(name)}</span>'


def _chips(model: Model) -> str:
    """Its last figures."""
    chips = "".join(
        f"<li><b>{_text(figure(model.metrics[name]))}</b>"
        f"<span>{_text(name)}{_arrow(name)}</span></li>"
        for name in _ranked(model.metrics)[:_COLUMNS]
    )
    return f'<ul class="chips">{chips}</ul>' if chips else ""


def _facts(model: Model, names: Names, subject: Subject) -> tuple[str, str]:
    """How a model was made, in a line and in full."""
    record, notes = model.record, model.notes
    frozen = record.get("frozen")
    made = {
        "made of": _made_of(record, names, subject),
        "seed": _text(record.get("seed", "")),
        "frozen": _text(counted(len(frozen), "tensor"))
        if isinstance(frozen, list) and frozen
        else "",
        "key": f"<code>{_text(record['key'])}</code>" if "key" in record else "",
        "folder": f"<code>{_text(notes[SHOWN])}</code>" if SHOWN in notes else "",
    }
    usual, given = _defaults(str(record.get("trainer"))), mapping_of(record.get("options"))
    options = {n: _value(v) for n, v in given.items() if n not in usual or usual[n] != v}
    which = "are not the defaults" if usual else "were given"
    versions = {**mapping_of(record.get("versions")), **mapping_of(notes.get("versions"))}
    noted = {name: _value(value) for name, value in notes.items() if name not in _TOLD}
    noted["versions"] = _value(versions, 1) if versions else ""
    how = [_text(f"{record.get('operation')} by {record.get('trainer')}"), *_took(record)]
    return " · ".join(how), (
        f'<div class="beside">{_listed("How it was made", made)}'
        f"{_listed(f'Options that {which}', options)}</div>{_listed('Notes of the record', noted)}"
    )


def _listed(heading: str, rows: Mapping[str, str]) -> str:
    items = "".join(
        f"<dt>{_text(name)}</dt><dd>{value}</dd>" for name, value in rows.items() if value
    )
    return f"<div><h4>{heading}</h4><dl>{items}</dl></div>" if items else ""


def _took(record: Mapping[str, Any]) -> list[str]:
    """How long it took, on what, when."""
    told = []
    seconds, device = record.get("seconds"), mapping_of(record.get("notes")).get("device")
    if isinstance(seconds, int | float):
        told.append(lasting(seconds))
    if device is not None:
        told.append(f"on {_value(device, 1)}")
    if "host" in record:
        told.append(f"at {_text(record['host'])}")
    if 0 < begun(record) < 1e11:
        told.append(f"{datetime.fromtimestamp(begun(record)).astimezone():%Y-%m-%d %H:%M}")
    return told


def lasting(seconds: float) -> str:
    """`0.4 s`, `42 s`, `12 min 5 s`, `3 h 20 min`, `2 d 3 h`."""
    if not 9.95 <= seconds < 1e11:
        return f"{seconds:.2g} s"
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    for name, size, smaller, small in (("min", 60, "s", 1), ("h", 3600, "min", 60)):
        first, rest = divmod(round(seconds / small), size // small)
        if first < {"min": 60, "h": 24}[name]:
            return f"{first} {name}" + (f" {rest} {smaller}" if rest else "")
    first, rest = divmod(round(seconds / 3600), 24)
    return f"{first:,} d" + (f" {rest} h" if rest else "")


@cache
def _defaults(trainer: str) -> Mapping[str, Any]:
    return trainer_defaults(trainer)


def _made_of(record: Mapping[str, Any], names: Names, subject: Subject) -> str:
    """What went into a model, each with a link to where it is told."""
    told = []
    for entry in inputs_of(record):
        content = str(entry.get("key") or entry.get("digest") or entry.get("xxh3_128"))
        mark = subject.marks.get(content, "")
        name = _text(entry.get("node") or entry.get("name") or content[:8])
        told.append(_link(mark, names) if mark in names else name)
    return ", ".join(told)


def _value(value: Any, depth: int = 0) -> str:
    """A value of a note or an option: of a mapping its entries, of a list of mappings a table."""
    if isinstance(value, Mapping) and value and depth < 2:
        entries = [
            f"{_text(name)}{' ' if depth else ': '}{_value(inner, depth + 1)}"
            for name, inner in value.items()
        ]
        return (", " if depth else "<br>").join(entries)
    if isinstance(value, list) and value and not depth and all(isinstance(v, dict) for v in value):
        columns = list(dict.fromkeys(name for row in value for name in row))[:_COLUMNS]
        head = "".join(f"<th>{_text(name)}</th>" for name in columns)
        rows = "".join(
            "<tr>"
            + "".join(f"<td>{_value(row.get(name, ''), 2)}</td>" for name in columns)
            + "</tr>"
            for row in value
        )
        return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or value in ([], {}):
        return "none"
    return _text(figure(value) if depth and isinstance(value, float) else worded(value))


# Merges, and all of it again


def _merged(models: Sequence[Model], names: Names, subject: Subject, room: _Room) -> str:
    rows = []
    for model in models:
        notices = model.record.get("notices")
        row = (
            f'<tr id="m-{_text(model.mark)}"><td>{_text(names[model.mark])}</td>'
            f"<td>{_text(made_by(model.record).removeprefix('merge '))}"
            f"{_flaws(notices if isinstance(notices, list) else ())}</td>"
            f"<td>{_made_of(model.record, names, subject)}</td>"
            f"<td>{''.join(_took(model.record)[:1])}</td></tr>"
        )
        if room.holds(row):
            rows.append(row)
    head = "<tr><th>model</th><th>how</th><th>of</th><th>took</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>' if rows else ""


def _again(roots: Sequence[Root], names: Names, room: _Room) -> str:
    """How to make each root again: commands, and the plan."""
    parts = []
    for root in roots:
        commands = [root.run] if root.run else []
        if root.run and root.plan:
            commands.append("# or from the checkpoint alone, beside the files that went into it:")
        if root.plan:
            commands.append(f"soup plan --from {quoted(root.path)} > again.yaml")
            commands.append(f"soup run again.yaml -o again{root.path.suffix}")
        plan = f"<pre><code>{_lines(root.plan)}</code></pre>" if root.plan else ""
        plan = f"<details><summary>again.yaml</summary>{plan}</details>" if plan else ""
        part = (
            f"<h4>{_text(names[root.model.mark])}</h4>"
            f"<pre><code>{_lines(chr(10).join(commands))}</code></pre>"
        )
        if commands and room.holds(part):
            parts.append(part + (plan if room.holds(plan) else ""))
    return f'<div class="again">{"".join(parts)}</div>' if parts else ""
