"""What a person sees of trees: plans, runs as they go, and stores."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import click
from rich.live import Live
from rich.table import Table
from rich.tree import Tree as RichTree

from .errors import count, counted, printable, sized
from .picture import what
from .plan import NodePlan, Plan, check
from .runner import Event
from .show import Text, console
from .store import Entry
from .tree import Tree

_SIGNS = {
    "waiting": ("·", "dim"), "running": ("▶", "cyan"), "done": ("✓", "green"),
    "kept": ("✓", "dim green"), "failed": ("✗", "red"), "skipped": ("–", "dim"),
    "fused": ("∘", "dim"),
}  # fmt: skip


def show_plan(plan: Plan) -> None:
    """The tree, the steps in order, and what they cost."""
    out = console()
    console(wide=True).print(_rich_tree(plan, lambda node: _planned(plan, node)))
    steps = plan.steps
    if steps:
        out.print()
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for name, justify in (("step", "right"), ("node", "left"), ("does", "left"),
                              ("reads", "right"), ("writes", "right")):  # fmt: skip
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for number, node in enumerate(steps, 1):
            table.add_row(
                str(number), Text(node.node), Text(what(plan, node.node)),
                sized(node.bytes_read) if node.kind == "merge" else "",
                sized(node.bytes_written) if node.signature is not None else "?",
            )  # fmt: skip
        out.print(table)
    out.print()
    models = plan.tree.models()
    unknown = [node.node for node in steps if node.signature is None]
    out.print(
        Text(
            f"{counted(len(models), 'model')} in {counted(plan.tree.levels, 'level')}; "
            f"{counted(len(steps), 'step')} to do; merges read {sized(plan.bytes_read)}, "
            f"the store grows by {sized(plan.bytes_written)}, merges need about "
            f"{sized(plan.memory)} of memory"
        )
    )
    if unknown:
        out.print(Text(f"not counted, as only their trainers know: {', '.join(unknown)}"))


def _planned(plan: Plan, node: NodePlan) -> str:
    parts = [what(plan, node.node)]
    if node.signature is not None:
        tensors = counted(len(node.signature), "tensor")
        parts.append(f"{tensors}, {count(node.parameters or 0)} parameters")
    for name in ("merged", "kept", "dropped", "frozen"):
        if names := getattr(node, name):
            parts.append(f"{name} {len(names)} ({count(node.elements[name])})")
    if node.done:
        parts.append("done")
    elif node.skipped:
        parts.append("not needed")
    elif node.fused:
        parts.append("merged on the way")
    return " · ".join(parts)


def _rich_tree(plan: Plan, label: Callable[[NodePlan], str]) -> RichTree:
    def named(name: str) -> object:
        text = Text(name, "bold")
        text.append(f"  {printable(label(plan.nodes[name]))}", style="not bold")
        return text

    root = RichTree(named(plan.tree.root))  # type: ignore[arg-type]
    pending = [(plan.tree.root, root)]
    while pending:
        node, branch = pending.pop()
        for name in plan.tree.inputs(node):
            pending.append((name, branch.add(named(name))))  # type: ignore[arg-type]
    return root


@contextmanager
def watching(tree: Tree) -> Iterator[Callable[[Event], None]]:
    """A view of a run: a tree that changes on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield _PlainView()
        return
    view = _LiveView(check(tree))
    with Live(
        get_renderable=view.render, console=console(stderr=True), refresh_per_second=4
    ):  # fmt: skip
        yield view


def _figures(event: Event) -> str:
    parts = [] if event.done is None or event.state != "running" else [f"{event.done:.0%}"]
    parts += [f"{name} {value:.4g}" for name, value in event.metrics.items()]
    return " ".join([*parts, *([event.message] if event.message else [])])


class _PlainView:
    """A line for each node that starts, ends or fails."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._start = time.monotonic()

    def __call__(self, event: Event) -> None:
        changed = self._states.get(event.node) != event.state
        self._states[event.node] = event.state
        if not changed or event.state in ("skipped", "fused"):
            return
        seconds = time.monotonic() - self._start
        figures = _figures(event)
        line = f"{seconds:7.1f} s  {event.state:<8} {event.node}{'  ' if figures else ''}{figures}"
        click.echo(printable(line.rstrip()), err=True)


class _LiveView:
    """The tree with the state of every node."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._events: dict[str, Event] = {}

    def __call__(self, event: Event) -> None:
        self._events[event.node] = event

    def render(self) -> RichTree:
        return _rich_tree(self._plan, self._label)

    def _label(self, node: NodePlan) -> str:
        event = self._events.get(node.node)
        if event is None:
            return what(self._plan, node.node)
        sign, _ = _SIGNS[event.state]
        return f"{sign} {event.state}  {_figures(event)}"


def show_entries(entries: Sequence[Entry]) -> None:
    """A row for each result of a store."""
    out = console()
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("key", "node", "operation", "size", "seconds", "metrics"):
        table.add_column(name, justify="right" if name in ("size", "seconds") else "left")
    for entry in sorted(entries, key=lambda e: e.record.get("started", 0)):
        record: Mapping[str, object] = entry.record
        metrics = record.get("metrics") or {}
        said = " ".join(f"{k} {v:.4g}" for k, v in metrics.items())  # type: ignore[attr-defined]
        table.add_row(
            entry.key[:12], Text(str(record.get("node"))), str(record.get("operation")),
            sized(entry.nbytes), f"{record.get('seconds', 0):.1f}", Text(said),
        )  # fmt: skip
    out.print(table)
    out.print(f"{len(entries)} results, {sized(sum(e.nbytes for e in entries))}")
