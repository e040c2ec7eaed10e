"""What a person sees of trees: plans, runs as they go, and stores."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Protocol

import click
from rich.live import Live
from rich.table import Table
from rich.tree import Tree as RichTree

from ..errors import count, counted, printable, sized
from ..running.runner import HEARTBEAT, Event
from ..trees.keys import training_of
from ..trees.plan import NodePlan, Plan
from ..trees.store import Entry, Pin
from .cli_shared import say
from .picture import made_by, what
from .show import Text, console

_SIGNS = {
    "waiting": ("·", "dim"), "running": ("▶", "cyan"), "done": ("✓", "green"),
    "kept": ("✓", "dim green"), "failed": ("✗", "red"), "skipped": ("–", "dim"),
    "fused": ("∘", "dim"),
}  # fmt: skip


_ACTIVE = ("running", "waiting")


def show_plan(plan: Plan) -> None:
    """The tree, the steps in order, and what they cost."""
    out = console(wide=True)
    out.print(_rich_tree(plan, lambda node: _planned(plan, node)))
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
            if name == "dropped" and node.estimates:
                parts[-1] += f", {len(node.estimates)} of them to be found anew"
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
def watching(shown: Path | None = None) -> Iterator[View]:
    """A view of a run: a tree that changes on a terminal, plain lines elsewhere.

    Args:
        shown: where that is kept which trainers show, to be told; None tells nothing.
    """
    if not sys.stderr.isatty():
        yield _PlainView(shown)
        return
    view = _LiveView(shown)
    try:
        yield view
    finally:
        view.end()


class View(Protocol):
    """What is shown of a run."""

    def begin(self, plan: Plan) -> None:
        """What is going to be done."""

    def __call__(self, event: Event) -> None:
        """What has changed."""


def _warn(plan: Plan, shown: Path | None) -> None:
    for warning in plan.warnings:
        say("warning", warning)
    if shown is not None and any(training_of(step.operation) for step in plan.steps):
        say("note", f"pictures and curves, where a trainer leaves any, are in {shown}")


def _figures(event: Event) -> str:
    """How far a node is, the most wanted first: what is last may be cut at a terminal's edge."""
    parts = [] if event.done is None or event.state not in _ACTIVE else [f"{event.done:.0%}"]
    parts += [f"{_duration(event.seconds_left)} left"] if event.seconds_left else []
    # A failure's reason is told once, at the end.
    parts += [event.message] if event.message and event.state != "failed" else []
    parts += [f"{name} {value:.4g}" for name, value in event.metrics.items()]
    return " ".join(parts)


def _duration(seconds: float) -> str:
    """`0:42`, `1:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _PlainView:
    """A line for each node that starts, ends or fails, and one a minute while it works."""

    def __init__(self, shown: Path | None) -> None:
        self._shown = shown
        # Node → its state, what was said of it, and when.
        self._told: dict[str, tuple[str, str, float]] = {}
        self._start = time.monotonic()

    def begin(self, plan: Plan) -> None:
        """Its warnings."""
        _warn(plan, self._shown)

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        state, said, then = self._told.get(event.node, ("", "", 0.0))
        is_news = now - then >= HEARTBEAT if event.state in _ACTIVE else event.message != said
        if state == event.state and not is_news:
            return
        self._told[event.node] = event.state, event.message, now
        if event.state in ("skipped", "fused") and not event.message:
            return
        figures = _figures(event)
        line = f"{now - self._start:7.1f} s  {event.state:<8} {event.node}"
        click.echo(printable(f"{line}  {figures}".rstrip()), err=True)


class _LiveView:
    """The tree with the state of every node."""

    def __init__(self, shown: Path | None) -> None:
        self._shown = shown
        self._events: dict[str, Event] = {}
        self._live: Live | None = None

    def begin(self, plan: Plan) -> None:
        """Its warnings; then draw it, again and again."""
        _warn(plan, self._shown)
        self._live = Live(
            get_renderable=lambda: _rich_tree(plan, lambda node: self._label(plan, node)),
            console=console(stderr=True), refresh_per_second=4,
        )  # fmt: skip
        self._live.start()

    def end(self) -> None:
        """Leave the last picture."""
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        self._events[event.node] = event

    def _label(self, plan: Plan, node: NodePlan) -> str:
        event = self._events.get(node.node)
        if event is None:
            return what(plan, node.node)
        sign, _ = _SIGNS[event.state]
        return f"{sign} {event.state}  {_figures(event)}"


def show_entries(entries: Sequence[Entry], pins: Sequence[Pin]) -> None:
    """A row for each result of a store, in the order in which they were begun."""
    out = console(wide=True)
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("key", "plan", "node", "operation", "date", "size", "seconds", "metrics"):
        table.add_column(name, justify="right" if name in ("size", "seconds") else "left")
    for entry in sorted(entries, key=lambda e: e.record.get("started", 0)):
        record = entry.record
        plans = dict.fromkeys(pin.plan or "in Python" for pin in pins if entry.key in pin.keys)
        metrics = record.get("metrics") or {}
        started = datetime.fromtimestamp(record.get("started", 0)).astimezone()
        table.add_row(
            entry.key[:12], Text(", ".join(plans)), Text(str(record.get("node"))),
            Text(made_by(record)), f"{started:%Y-%m-%d %H:%M}", sized(entry.nbytes),
            f"{record.get('seconds', 0):.1f}",
            Text(" ".join(f"{k} {v:.4g}" for k, v in metrics.items())),
        )  # fmt: skip
    out.print(table)
    out.print(f"{counted(len(entries), 'result')}, {sized(sum(e.nbytes for e in entries))}")
