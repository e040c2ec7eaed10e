"""What a person sees: tables, trees, sizes and progress. Nothing here is imported for `--json`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text as RichText
from rich.tree import Tree

from ..errors import count, counted, printable, sized, worded
from ..files.checkpoint import Checkpoint
from ..files.inspection import Node
from ..merging.compare import DiffReport, DiffRow
from ..merging.engine import Progress as Callback
from ..merging.lineage import identity, is_merge, label, parents
from ..merging.merge import MergeReport
from ..merging.plan import MergePlan
from ..merging.rules import rule_from_json
from ..merging.verification import VerifyReport

_WIDTH = 1 << 16  # where the output is a file or a pipe: nothing is cut
_DEFAULT = 60  # characters of an option's default, of which `--json` has all


def Text(text: str, style: str = "") -> RichText:  # noqa: N802  # stands for rich's
    """A text without markup, whose control characters are spelt out."""
    return RichText(printable(text), style)


def console(*, stderr: bool = False, wide: bool = False) -> Console:
    """A console that writes plain, unwrapped text where there is no terminal.

    Args:
        stderr: write there.
        wide: let lines go on past a terminal's edge: rich would drop those of a deep tree.
    """
    stream = sys.stderr if stderr else sys.stdout
    plain = os.environ.get("TERM") == "dumb"
    fits = stream.isatty() and not wide
    return Console(
        stderr=stderr, highlight=False, soft_wrap=True, width=None if fits else _WIDTH,
        no_color=True if plain else None,
    )  # fmt: skip


def _plain(path: object) -> str:
    """A path within a text with markup."""
    return escape(printable(str(path)))


def show_merge(report: MergeReport) -> None:
    """What a merge did, or, after a dry run, would do."""
    plan = report.plan
    out = console()
    parameters = sum(step.elements for step in plan.steps)
    done = f"{report.output}:" if report.output else "would write"
    out.print(
        f"[bold]{_plain(done)}[/] {counted(len(plan.steps), 'tensor')}, "
        f"{count(parameters)} parameters, {sized(plan.bytes_written)}"
    )
    show_rules(plan, out)
    if report.output is None:
        out.print(f"reads {sized(plan.bytes_read)} at least once", style="dim")


def show_rules(plan: MergePlan, out: Console) -> None:
    """How many tensors and parameters each rule took."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("rule")
    table.add_column("tensors", justify="right")
    table.add_column("parameters", justify="right")
    for taken in plan.rule_counts():
        table.add_row(Text(taken.rule), f"{taken.tensors:,}", count(taken.parameters))
    out.print(table)


def show_inspection(checkpoint: Checkpoint, root: Node, *, tensors: bool) -> None:
    """The tree of names; with `tensors`, every single tensor instead."""
    out = console()
    files = counted(len(checkpoint.files), "file")
    out.print(
        f"[bold]{_plain(checkpoint.path)}[/] {counted(root.tensors, 'tensor')}, "
        f"{count(root.parameters)} parameters, {sized(root.nbytes)} in {files}; {_dtypes(root)}"
    )
    for key, value in sorted(checkpoint.metadata.items()):
        shown = value if len(value) <= 80 else f"{value[:77]}…"
        out.print(Text(f"  {key}: {shown}", style="dim"))
    if tensors:
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for header, justify in (("tensor", "left"), ("dtype", "left"), ("shape", "left"),
                                ("bytes", "right"), ("file", "left"), ("at", "right")):  # fmt: skip
            table.add_column(header, justify=justify)  # type: ignore[arg-type]
        for info in checkpoint.tensors.values():
            shape = str(list(info.shape))
            table.add_row(
                Text(info.name), info.dtype, Text(shape), f"{info.nbytes:,}", info.file.name,
                f"{info.start:,}",
            )  # fmt: skip
        out.print(table)
        return
    tree = Tree(Text(root.name))
    _grow(tree, root)
    out.print(tree)


def _grow(tree: Tree, node: Node) -> None:
    for child in node.children:
        if child.shape is not None:
            tree.add(Text(f"{child.name}{_times(child)}  {list(child.shape)} {_dtypes(child)}"))
            continue
        label = Text(child.name)
        label.append(
            f"{_times(child)}  {counted(child.tensors, 'tensor')}, {count(child.parameters)} "
            f"parameters, {sized(child.nbytes)}, {_dtypes(child)}",
            style="dim",
        )
        _grow(tree.add(label), child)


def _times(node: Node) -> str:
    return f" ×{node.repeats}" if node.repeats > 1 else ""


def _dtypes(node: Node) -> str:
    if len(node.dtypes) == 1:
        return next(iter(node.dtypes))
    return ", ".join(f"{dtype} ×{n}" for dtype, n in node.dtypes.items())


def show_lineage(checkpoint: Checkpoint, made: Mapping[str, Any] | None) -> None:
    """What a checkpoint was made of, and what that was made of, as a tree."""
    out = console(wide=True)
    if made is None:
        out.print(f"{_plain(checkpoint.path)} holds no lineage")
        return
    tree = Tree(Text(f"{checkpoint.name} ← {described(made)}"))
    ancestors = made.get("ancestors", {})
    shown: set[str] = set()
    branches = [(tree, made)]
    while branches:
        branch, merge = branches.pop()
        for entry in parents(merge):
            digest = identity(entry)
            origin = ancestors.get(digest)
            again = digest in shown
            text = Text(label(entry))
            text.append(" (base)" if entry is merge.get("base") else "")
            text.append(f" ← {printable(described(origin))}" if origin else "")
            text.append(" (its inputs are shown elsewhere)" if origin and again else "")
            known = "key" if "key" in entry else f"{sized(entry['size'])}, xxh3-128"
            text.append(f"  {known} {digest}", style="dim")
            inner = branch.add(text)
            if origin and not again:
                branches.append((inner, origin))
                shown.add(digest)
    out.print(tree)


def described(made: Mapping[str, Any]) -> str:
    """One line on a merge or a training: its method or trainer, and all that was set."""
    if not is_merge(made):
        options = [f"{key} {value}" for key, value in made["options"].items()]
        return ", ".join([f"{made['operation']} {made['trainer']}", *options])
    parts = [made["method"]]
    for key in (
        "experts", "beta", "weights", "rest", "dtype", "low_level", "on_integer", "groups",
        "allow_nonfinite", "estimates", "seed",
    ):  # fmt: skip
        if made.get(key) not in (None, 0) and (key != "rest" or made.get("rules")):
            parts.append(f"{key} {made[key]}")
    parts += [f"{key} {value}" for key, value in made.get("parameters", {}).items()]
    parts += [f"layers {rule_from_json(rule)}" for rule in made.get("rules", ())]
    return ", ".join(parts)


def show_diff(report: DiffReport, by: str) -> None:
    """A row for each layer that differs, and what only one of the two has."""
    out = console()
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column(by)
    of_tasks = report.not_in_base is not None
    headers = ["tensors", "parameters", "cosine", "relative L2", "same sign"]
    if of_tasks:
        headers += ["first moved", "second moved", "task cosine", "same task sign"]
    for header in headers:
        table.add_column(header, justify="right")
    same = [row for row in report.rows if row.equal]
    for row in report.rows:
        if not row.equal:
            table.add_row(*_cells(row, of_tasks=of_tasks))
    if report.rows and len(same) < len(report.rows):
        table.add_section()
        table.add_row(*_cells(report.total, of_tasks=of_tasks), style="bold")
        out.print(table)
        if of_tasks:
            out.print(Text("moved: how long a task vector is, by the base's length"), style="dim")
    if same:
        out.print(f"equal: {counted(len(same), by)} of {len(report.rows)}")
    for title, names in (
        ("only in the first", report.only_in_first),
        ("only in the second", report.only_in_second),
        ("of another shape or kind", [f"{n}: {a} | {b}" for n, a, b in report.mismatched]),
        ("not in the base", report.not_in_base or ()),
    ):
        if names:
            out.print(f"{title}: {counted(len(names), 'tensor')}")
            for name in names:
                out.print(Text(f"  {name}"))
    if report.equal:
        out.print("the two are equal")


def _cells(row: DiffRow, *, of_tasks: bool) -> list[str | RichText]:
    numbers = (
        [f"{row.cosine:.6f}", f"{row.relative_l2:.4g}", f"{row.sign_agreement:.2%}"]
        if not math.isnan(row.sign_agreement)
        else ["differ", "", ""]
    )
    if of_tasks:
        told = (f"{row.first_moved:.4g}", f"{row.second_moved:.4g}", f"{row.task_cosine:.6f}",
                f"{row.task_sign_agreement:.2%}")  # fmt: skip
        numbers += ["" if number.startswith("nan") else number for number in told]
    return [Text(row.name), f"{row.tensors:,}", count(row.parameters), *numbers]


def show_verification(report: VerifyReport) -> None:
    """What was checked, and what was found."""
    out = console()
    checkpoint = report.checkpoint
    out.print(
        f"{_plain(checkpoint.path)}: headers and byte ranges of "
        f"{counted(len(checkpoint.files), 'file')} are sound, {counted(len(checkpoint), 'tensor')}"
    )
    noted = dict(report.noted)
    if report.nonfinite or noted:
        found = dict(report.nonfinite)
        out.print(f"NaN or infinity in {counted(len(found), 'tensor')}:")
        for name in dict.fromkeys((*found, *noted)):
            n, made = found.get(name, 0), noted.get(name, 0)
            right = n == made
            how = "as it was made" if right else f"made with {made:,}" if made else ""
            line = ", ".join(filter(None, [f"  {name}: {counted(n, 'element')}", how]))
            out.print(Text(line), style="" if right else "red")
    else:
        out.print("all float values are finite")
    if not report.has_lineage:
        out.print("no lineage")
    for check in report.inputs:
        if check.found is None:
            out.print(Text(f"input {check.name}: not at hand"))
        elif check.intact:
            out.print(Text(f"input {check.found}: unchanged"))
        else:
            out.print(Text(f"input {check.found}: CHANGED since it was read"), style="red")


def show_methods(described: Sequence[Mapping[str, Any]]) -> None:
    """One line a method, under what it is for."""
    out = console()
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for header in ("method", "models", "reads", "what it does"):
        table.add_column(header)
    shown = None
    for method in described:
        if "from" in method:
            table.add_row(method["name"], "", "", Text(f"(from {method['from']}, not loaded)"))
            continue
        if shown != (shown := method["purpose"]):
            table.add_row(Text(shown, style="bold"))
        name = Text("  " + method["name"])
        table.add_row(name, _models(method), _reads(method), Text(method["summary"]))
    out.print(table)
    out.print(Text("reads: how often inputs are read, as a rule; what must be in memory at once"))


def _reads(method: Mapping[str, Any]) -> str:
    if method["passes"] is None:
        return ""
    at_once = {"block": "", "row": ", rows", "tensor": ", whole tensors"}[method["at_once"]]
    return f"{method['passes']}×{at_once}"


def _models(method: Mapping[str, Any]) -> str:
    low, high = method["models"]
    number = str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    return {True: "base + ", False: "", None: "(base +) "}[method["base"]] + number


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "" if low is high else f"at least {low:g}" if high is None else f"at most {high:g}"
    return f"{low:g} to {high:g}"


def show_method(method: Mapping[str, Any]) -> None:
    """A method with its parameters."""
    out = console()
    out.print(f"[bold]{method['name']}[/]: {escape(method['summary'])}")
    out.print(Text(method["source"], style="dim"))
    out.print(f"models: {_models(method)}{'; takes --beta' if method['beta'] else ''}")
    if reads := _reads(method):
        out.print(f"reads its inputs: {reads}")
    out.print(Text(f"version: {method['version']}"))
    for name, doc in method["aux"].items():
        out.print(Text(f"beside each model: {name}, {doc}"))
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for header in ("parameter", "default", "range", "what it is"):
        table.add_column(header)
    for field in method["parameters"]:
        span = ", ".join(field["words"]) or _span(field["low"], field["high"])
        found = "found" if field["default"] is None else str(field["default"]).lower()
        default = "required" if field["required"] else found
        each = " (one a model)" if field["per_model"] else ""
        table.add_row(field["name"], default, span, Text(field["doc"] + each))
    out.print(table)


def show_trainers(told: Sequence[Mapping[str, Any]]) -> None:
    """One line a trainer."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("trainer")
    table.add_column("what it does")
    for trainer in told:
        said = trainer.get("error") or trainer["summary"]
        table.add_row(
            Text(trainer["name"]),
            Text(f"{said} (needs {trainer['needs']})" if "needs" in trainer else said),
        )
    console().print(table)


def show_trainer(trainer: Mapping[str, Any]) -> None:
    """A trainer with its options."""
    out = console()
    out.print(f"[bold]{_plain(trainer['name'])}[/]: {_plain(trainer['summary'])}")
    out.print(Text(trainer["class"], style="dim"))
    if trainer["version"]:
        out.print(Text(f"version: {trainer['version']}"))
    if not trainer["options"]:
        out.print("it has no options")
        return
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for header in ("option", "type", "default", "range", "what it is"):
        table.add_column(header)
    for option in trainer["options"]:
        default = "required" if option["required"] else worded(option["default"])
        default = default if len(default) <= _DEFAULT else f"{default[: _DEFAULT - 1]}…"
        row = (option["name"], option["type"], default, option["range"], option["doc"])
        table.add_row(*map(Text, row))
    out.print(table)


def show_written(root: Node) -> None:
    """The tree of names of a checkpoint that is not there yet."""
    tree = Tree(Text(
        f"{root.name}: {counted(root.tensors, 'tensor')}, {count(root.parameters)} parameters, "
        f"{sized(root.nbytes)}, {_dtypes(root)}"
    ))  # fmt: skip
    _grow(tree, root)
    console().print(tree)


@contextmanager
def progress_bar(title: str) -> Iterator[Callback]:
    """A bar on stderr with bytes, rate and time left."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(_plain(title), total=None)

        def advance(nbytes: int, total: int) -> None:
            bar.update(task, advance=nbytes, total=total)

        yield advance
