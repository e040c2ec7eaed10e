"""Pictures of a plan: SVG, Graphviz DOT and Mermaid, made without any of their programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from ..errors import OutputError, counted, exact, printable
from ..files.placing import check_apart, check_free
from ..merging.rules import rule_from_json
from ..trees.keys import described
from ..trees.operations import Load, Merge, Operation, Train, Tree
from ..trees.plan import NodePlan, Plan

_WIDTH, _HEIGHT = 196, 64  # of a box, in pixels; the height is the least
_GAP, _RISE = 24, 64  # between neighbours; between levels
_LINE = 17
_MARGIN = 28
_USUAL = ("rest", "seed", "resources")  # told only where they differ
_NAMES = {"beta": "β"}
_CHARACTERS = {"name": 22, "what": 30, "note": 26}  # that fit into a line of a box
_FILL = {
    "load": ("#eef2f7", "#8aa0bd"),
    "train": ("#fdf1dc", "#d9a441"),
    "merge": ("#e3f3ea", "#4f9d73"),
    "finetune": ("#f1e8fb", "#8c63c4"),
}
_STYLE = (
    "text{font-family:ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif;"
    "text-anchor:middle;fill:#1d2733}.name{font-size:14px;font-weight:600}"
    ".what{font-size:11px;fill:#52606d}.note{font-size:12px;font-weight:600}"
    "path{fill:none;stroke:#9fb0c3;stroke-width:1.6}"
)


Lines = Sequence[tuple[str, str]]
"""The lines of a box: the class of each, which the style has, and its text."""


def what(plan: Plan, node: str) -> str:
    """A few words on what a node does: what sets it apart from the others of its kind, whole."""
    return _words(plan.tree)[node]


@lru_cache(maxsize=8)
def _words(tree: Tree) -> Mapping[str, str]:
    told = {node: _told(operation) for node, operation in tree.operations()}
    alike: dict[str, list[dict[str, str]]] = {}
    for kind, settings in told.values():
        alike.setdefault(kind, []).append(settings)
    differ = {kind: _differing(settings) for kind, settings in alike.items()}
    words = {}
    for node, (kind, settings) in told.items():
        usual = [name for name in settings if name not in _USUAL][:1]
        shown = [name for name in settings if name in differ[kind]] if differ[kind] else usual
        words[node] = kind + ", ".join(f"{name} {settings[name]}" for name in shown)
        words[node] = words[node].removesuffix(", ").rstrip()
    return words


def _differing(alike: Sequence[Mapping[str, str]]) -> set[str]:
    """The settings that are not the same for all."""
    names = {name for settings in alike for name in settings}
    return {name for name in names if len({settings.get(name) for settings in alike}) > 1}


def _told(operation: Operation) -> tuple[str, dict[str, str]]:
    """How what a node does begins, and what it was told, the most telling first."""
    if isinstance(operation, Load):
        return operation.path.name, {}
    content = described(operation)
    if isinstance(operation, Merge):
        recipe = content["recipe"]
        method, rules = recipe.pop("method"), recipe.pop("rules", ())
        layers = {"layers": " | ".join(str(rule_from_json(r)) for r in rules)} if rules else {}
        first = {name: recipe.pop(name) for name in ("beta", "weights") if name in recipe}
        settings = {**first, **recipe.pop("parameters", {}), **layers, **recipe}
        begin = f"{method} "
    else:
        settings = dict(sorted(content["options"].items(), key=lambda item: not _is_number(item)))
        begin = f"{'train' if isinstance(operation, Train) else 'tune'}: {content['trainer']}, "
    more = ("base", "lora", "aux", "start", "seed", "resources")
    settings |= {name: content[name] for name in more if name in content}
    return begin, {_NAMES.get(name, name): _value(value) for name, value in settings.items()}


def _is_number(option: tuple[str, Any]) -> bool:
    return isinstance(option[1], int | float) and not isinstance(option[1], bool)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value)) if all(map(_is_flat, value)) else json.dumps(value)
    if isinstance(value, float):
        return exact(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _is_flat(value: Any) -> bool:
    return not isinstance(value, list | tuple | dict)


def made_by(record: Mapping[str, Any]) -> str:
    """`finetune digits:Digits rate=0.1`: what made a result, with the options that it was given."""
    if "recipe" in record:
        recipe = dict(record["recipe"])
        words = ["merge", str(recipe.pop("method", ""))]
        parameters = recipe.pop("parameters", None) or {}
        rules = recipe.pop("rules", ())
        given = {**parameters, **recipe}
        if not given.get("seed"):
            given.pop("seed", None)
        if rules:
            given["layers"] = [rule.get("pattern") for rule in rules]
        else:
            given.pop("rest", None)
    else:
        words = [str(record.get("operation")), str(record.get("trainer", ""))]
        given = dict(record.get("options") or {})
        if record.get("seed_is_given"):
            given["seed"] = record["seed"]
    words += [f"{name}={worded(value)}" for name, value in given.items()]
    return " ".join(filter(None, words))


def worded(value: object) -> str:
    """A value of a record, as short as it can be told."""
    if isinstance(value, list):
        return ",".join(map(worded, value))
    return exact(value) if isinstance(value, float) else str(value)


def svg(
    plan: Plan, notes: Mapping[str, str | Sequence[str]] | None = None, *,
    links: Mapping[str, str] | None = None, styled: bool = True,
) -> str:  # fmt: skip
    """The tree as an SVG picture: the root above, each model a box, coloured by what makes it.

    Args:
        plan: what to draw.
        notes: node name → a few words in its box, such as an accuracy, or lines of them.
        links: node name → where its box leads.
        styled: with letters, lines and a white ground of its own; without, they are those of the
            page that it becomes a part of.
    """
    tree = plan.tree
    place = _places(tree)
    lines = {node: _lines(plan, node, (notes or {}).get(node, "")) for node in place}
    box = max(_HEIGHT, _LINE * (1 + max(map(len, lines.values()))))
    y = {node: _MARGIN + (tree.graph.nodes[node]["level"] - 1) * (box + _RISE) for node in place}
    width = max(place.values()) + _WIDTH + _MARGIN
    height = max(y.values()) + box + _MARGIN
    paths, shapes = [], []
    for node, x in place.items():
        for source in _models_below(tree, node):
            x1, y1 = place[source] + _WIDTH / 2, y[source]
            x2, y2 = x + _WIDTH / 2, y[node] + box
            middle = (y1 + y2) / 2
            paths.append(
                f'<path d="M{x1:g} {y1:g} C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}"/>'
            )
        shape = _shape(plan.nodes[node], x, y[node], box, lines[node])
        link = (links or {}).get(node)
        shapes.append(shape if link is None else f'<a href="{escape(link)}">{shape}</a>')
    title = escape(f"Tree of {counted(len(place), 'model')} in {counted(tree.levels, 'level')}")
    style = f'<style>{_STYLE}</style>\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">\n<title>{title}</title>\n'
        + (style if styled else "")
        + "\n".join([*paths, *shapes])
        + "\n</svg>\n"
    )


def _lines(plan: Plan, node: str, note: str | Sequence[str]) -> list[tuple[str, str]]:
    """The lines of a box, each with its class: the name, what is merged in it, what it does."""
    inner = [what(plan, n) for n in plan.tree.inputs(node) if plan.tree.is_inner_merge(n)]
    rows = [("name", node), *(("what", words) for words in (*inner, what(plan, node)))]
    rows += [("note", line) for line in ([note] if isinstance(note, str) else note)]
    return [
        (kind, line)
        for kind, words in rows
        for line in textwrap.wrap(printable(words), _CHARACTERS[kind], break_on_hyphens=False)
    ]


def _shape(node: NodePlan, x: float, y: float, height: float, lines: Lines) -> str:
    fill, edge = _FILL[node.kind]
    is_there = node.done or node.kind == "load" or any(kind == "note" for kind, _ in lines)
    dashes = "" if is_there else ' stroke-dasharray="5 4"'
    top = y + (height - _LINE * (len(lines) - 1)) / 2 + 4
    text = "".join(
        f'<text class="{kind}" x="{x + _WIDTH / 2:g}" y="{top + _LINE * number:g}">'
        f"{escape(line)}</text>"
        for number, (kind, line) in enumerate(lines)
    )
    return (
        f'<g class="{node.kind}"><title>{escape(_tip(node))}</title><rect x="{x:g}" y="{y:g}" '
        f'width="{_WIDTH}" height="{height:g}" rx="10" fill="{fill}" stroke="{edge}" '
        f'stroke-width="1.6"{dashes}/>{text}</g>'
    )


def _tip(node: NodePlan) -> str:
    """What a reader sees who points at a box."""
    state = "done" if node.done else "there" if node.kind == "load" else "to do"
    tensors = "" if node.signature is None else f", {counted(len(node.signature), 'tensor')}"
    return printable(f"{node.node}: {node.kind}, {state}{tensors}")


def _models_below(tree: Tree, node: str) -> list[str]:
    """The models that a model is made of, an inner merge looked through."""
    found = []
    for source in tree.inputs(node):
        found += tree.inputs(source) if tree.is_inner_merge(source) else [source]
    return found


def _places(tree: Tree) -> dict[str, float]:
    """How far to the right each model is: leaves in a row, others above the middle of theirs."""
    x: dict[str, float] = {}
    free = float(_MARGIN)
    pending: list[tuple[str, bool]] = [(tree.root, False)]
    while pending:
        node, ready = pending.pop()
        below = _models_below(tree, node)
        if not below:
            x[node], free = free, free + _WIDTH + _GAP
        elif ready:
            x[node] = (x[below[0]] + x[below[-1]]) / 2
        else:
            pending.append((node, True))
            pending += [(source, False) for source in reversed(below)]
    return x


def check_picture(
    output: Path, *, force: bool, reads: Iterable[Path], what: str = "picture",
    suffixes: Sequence[str] = (".svg",),
) -> None:  # fmt: skip
    """Whether a picture may be written.

    Args:
        output: where.
        force: replace what is there.
        reads: files and folders that are never replaced, nor added to.
        what: what errors call it.
        suffixes: what its name may end in, the usual one first.

    Raises:
        OutputError: it may not.
    """
    if output.suffix.lower() not in suffixes:
        kind = suffixes[0][1:].upper()
        raise OutputError(f"the {what} {output} is {kind}, so its name must end in {suffixes[0]}")
    if not output.parent.is_dir():
        raise OutputError(f"the folder {output.parent} of {output.name} does not exist")
    if output.is_dir():
        raise OutputError(f"{output} is a folder")
    check_apart(output, reads, what=what)
    check_free(output, force=force)


def dot(plan: Plan) -> str:
    """The operations in Graphviz' language."""
    lines = ["digraph soup {", "  rankdir=BT;", "  node [shape=box, style=rounded];"]
    for node in plan.nodes:
        lines.append(f"  {_quoted(node)} [label={_quoted(node, what(plan, node))}];")
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in plan.tree.graph.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(*lines: str) -> str:
    escaped = (printable(line).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'


def mermaid(plan: Plan) -> str:
    """The operations as a Mermaid flowchart, which GitHub draws in Markdown."""
    number = {node: f"n{index}" for index, node in enumerate(plan.nodes)}
    lines = ["flowchart BT"]
    for node in plan.nodes:
        label = "<br/>".join(map(_of_mermaid, (node, what(plan, node))))
        lines.append(f'  {number[node]}["{label}"]')
    lines += [f"  {number[a]} --> {number[b]}" for a, b in plan.tree.graph.edges]
    return "\n".join(lines) + "\n"


def _of_mermaid(text: str) -> str:
    """A text in which nothing is taken for HTML or the end of it; `#…;` is how Mermaid escapes."""
    return "".join(f"#{ord(c)};" if c in '#"<>&`\\' else c for c in printable(text))
