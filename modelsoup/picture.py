"""Pictures of a plan: SVG, Graphviz DOT and Mermaid, made without any of their programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from .errors import printable
from .plan import NodePlan, Plan, described
from .tree import Load, Merge, Train, Tree

_WIDTH, _HEIGHT = 168, 64  # of a box, in pixels
_GAP, _RISE = 24, 128  # between neighbours; between levels
_MARGIN = 28
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


@dataclass(frozen=True)
class _Box:
    """A model in the picture: a node, and the merge inside it if it is fine-tuned."""

    node: str
    x: float
    y: float


def what(plan: Plan, node: str) -> str:
    """A few words on what a node does."""
    operation = plan.tree.operation(node)
    if isinstance(operation, Load):
        return operation.path.name
    if isinstance(operation, Merge):
        recipe = described(operation)["recipe"]
        words = [recipe["method"]]
        words += [f"β {recipe['beta']:g}"] if "beta" in recipe else []
        words += ["by layers"] if "rules" in recipe else []
        return " ".join(words)
    name = operation.training.trainer
    rates = [
        f"{key} {value}" for key, value in operation.training.options.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]  # fmt: skip
    return ", ".join([f"{'train' if isinstance(operation, Train) else 'tune'}: {name}", *rates[:1]])


def svg(plan: Plan, notes: Mapping[str, str] | None = None) -> str:
    """The tree as an SVG picture: the root above, each model a box, coloured by what makes it.

    Args:
        plan: what to draw.
        notes: node name → a few words in its box, such as an accuracy.
    """
    tree = plan.tree
    boxes = _boxes(tree)
    place = {box.node: box for box in boxes}
    width = max(box.x for box in boxes) + _WIDTH + _MARGIN
    height = max(box.y for box in boxes) + _HEIGHT + _MARGIN
    lines, shapes = [], []
    for box in boxes:
        for source in _models_below(tree, box.node):
            below = place[source]
            x1, y1 = below.x + _WIDTH / 2, below.y
            x2, y2 = box.x + _WIDTH / 2, box.y + _HEIGHT
            middle = (y1 + y2) / 2
            lines.append(
                f'<path d="M{x1:g} {y1:g} C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}"/>'
            )
        shapes.append(_shape(plan, box, (notes or {}).get(box.node, "")))
    title = escape(f"Tree of {len(boxes)} models in {tree.levels} levels")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">\n<title>{title}</title>\n'
        f'<style>{_STYLE}</style>\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join([*lines, *shapes])
        + "\n</svg>\n"
    )


def _shape(plan: Plan, box: _Box, note: str) -> str:
    node = plan.nodes[box.node]
    fill, edge = _FILL[node.kind]
    dashes = ' stroke-dasharray="5 4"' if not node.done and node.kind != "load" and not note else ""
    inner = next(
        (n for n in plan.tree.inputs(box.node) if plan.tree.is_inner_merge(n)), None
    )  # fmt: skip
    rows = [("name", box.node)]
    rows += [("what", what(plan, inner))] if inner else []
    rows += [("what", what(plan, box.node))]
    rows += [("note", note)] if note else []
    step = _HEIGHT / (len(rows) + 1)
    text = "".join(
        f'<text class="{kind}" x="{box.x + _WIDTH / 2:g}" y="{box.y + step * (i + 1) + 4:g}">'
        f"{escape(_short(words))}</text>"
        for i, (kind, words) in enumerate(rows)
    )
    return (
        f'<g><title>{escape(_tip(node))}</title><rect x="{box.x:g}" y="{box.y:g}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" rx="10" fill="{fill}" stroke="{edge}" '
        f'stroke-width="1.6"{dashes}/>{text}</g>'
    )


def _tip(node: NodePlan) -> str:
    """What a reader sees who points at a box."""
    state = "done" if node.done else "there" if node.kind == "load" else "to do"
    tensors = "" if node.signature is None else f", {len(node.signature)} tensors"
    return printable(f"{node.node}: {node.kind}, {state}{tensors}")


def _short(text: str, limit: int = 24) -> str:
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _models_below(tree: Tree, node: str) -> list[str]:
    """The models that a model is made of, an inner merge looked through."""
    found = []
    for source in tree.inputs(node):
        found += tree.inputs(source) if tree.is_inner_merge(source) else [source]
    return found


def _boxes(tree: Tree) -> list[_Box]:
    """A place for each model: leaves side by side, each other above the middle of its inputs."""
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
    levels = {node: tree.graph.nodes[node]["level"] for node in x}
    return [_Box(node, x[node], _MARGIN + (levels[node] - 1) * _RISE) for node in x]


def dot(plan: Plan) -> str:
    """The operations in Graphviz' language."""
    lines = ["digraph soup {", "  rankdir=BT;", "  node [shape=box, style=rounded];"]
    for node in plan.nodes:
        label = _quoted(f"{node}\n{what(plan, node)}")
        lines.append(f"  {_quoted(node)} [label={label}];")
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in plan.tree.graph.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def mermaid(plan: Plan) -> str:
    """The operations as a Mermaid flowchart, which GitHub draws in Markdown."""
    number = {node: f"n{index}" for index, node in enumerate(plan.nodes)}
    lines = ["flowchart BT"]
    for node in plan.nodes:
        label = f"{node}<br/>{what(plan, node)}".replace('"', "#quot;")
        lines.append(f'  {number[node]}["{label}"]')
    lines += [f"  {number[a]} --> {number[b]}" for a, b in plan.tree.graph.edges]
    return "\n".join(lines) + "\n"
