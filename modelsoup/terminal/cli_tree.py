"""`soup plan`, `soup run` and `soup store`: each a few lines over the library."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import PlanError, StoreError, are_counted, counted
from .cli_shared import GivenPath, echo, force_option, json_option, print_json, quiet_option, say

_STORE = ".soup-store"
_PICTURES = ("dot", "mermaid")


def store_option(command: Any) -> Any:
    """The option `--store`."""
    return click.option(
        "--store",
        "folder",
        metavar="DIR",
        type=GivenPath(),
        default=_STORE,
        show_default=True,
        help="The folder of results.",
    )(command)


def _fuse_option(command: Any) -> Any:
    return click.option(
        "--fuse", is_flag=True, help="Merge merges of merges in one pass, with no files in between."
    )(command)


def _read(path: str) -> tuple[Any, list[str]]:
    """The tree of a file, ours or mergekit's; trainers given as `module:Class` may lie beside."""
    from ..files.checkpoint import SUFFIX
    from ..trees.mergekit import read_mergekit
    from ..trees.tree_yaml import read_tree

    if path.endswith(SUFFIX) or any(Path(path).glob(f"*{SUFFIX}")):
        raise PlanError(
            f"{path} is a checkpoint and no plan (soup plan --from {shlex.quote(path)} prints the "
            f"plan that it was made by)"
        )
    if (found := read_mergekit(Path(path))) is not None:
        return found
    find_modules_in(Path(path).resolve().parent)
    return read_tree(path)


def find_modules_in(folder: Path) -> None:
    """Let a trainer that is given as `module:Class` lie in a folder."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: it must not stand in for other modules


def known_plan(
    tree: Any, warnings: list[str], folder: str, *, fuse: bool = False
) -> tuple[Any, Any]:  # fmt: skip
    """A tree's plan, with what a store has of it already; and the store, None where none is."""
    from ..trees.plan import check
    from ..trees.store import Store

    if not (Path(folder) / "objects").is_dir():
        return check(tree, fuse=fuse, warnings=warnings), None
    from ..running.runner import made_otherwise

    known = Store(folder, create=False)
    checked = check(
        tree, done=known.has, digest=known.digest, companions=known.companions,
        contents=known.contents, fuse=fuse, warnings=warnings,
    )  # fmt: skip
    warnings = [*checked.warnings, *made_otherwise(checked, known)]
    return dataclasses.replace(checked, warnings=tuple(warnings)), known


def print_plan(checked: Any, *, as_json: bool) -> None:
    """What a plan will do, and its warnings."""
    if as_json:
        print_json(checked.as_json())
        return
    from .show_tree import show_plan

    show_plan(checked)
    _warn(checked)


def _warn(checked: Any) -> None:
    for warning in checked.warnings:
        say("warning", warning)


@click.command(no_args_is_help=True)
@click.argument("path", required=False, metavar="TREE.yaml", type=GivenPath())
@store_option
@_fuse_option
@json_option
@click.option("--dot", is_flag=True, help="Print the operations for Graphviz.")
@click.option("--mermaid", is_flag=True, help="Print the operations as a Mermaid flowchart.")
@click.option(
    "--svg",
    metavar="FILE",
    type=GivenPath(),
    help="Write a picture of the tree, with the metrics that the store has.",
)
@click.option("--force", is_flag=True, help="Replace an existing picture.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of tree.yaml, for editors.")
@click.option(
    "--from",
    "made",
    metavar="CHECKPOINT",
    type=GivenPath(),
    help="Print the plan that a checkpoint was made by, from its lineage.",
)
def plan(path: str | None, folder: str, as_json: bool, svg: str | None, **flags: Any) -> None:
    """Check a tree of merges and fine-tunings and say what it will do, from headers alone.

    \b
    soup plan tree.yaml
    """  # noqa: D301
    for name, is_alone in (("--schema", flags["schema"]), ("--from", flags["made"])):
        if is_alone and (path or svg):
            raise click.UsageError(f"{name} goes with no {'--svg' if svg else 'TREE.yaml'}")
    if flags["force"] and not svg:
        raise click.UsageError("--force is for --svg: nothing else is written")
    if flags["schema"]:
        from ..trees.tree_yaml import json_schema

        print_json(json_schema())
        return
    if flags["made"]:
        from ..files.checkpoint import open_checkpoint
        from ..trees.reproduce import plan_text

        click.echo(plan_text(open_checkpoint(flags["made"])), nl=False)
        return
    if path is None:
        raise click.UsageError("TREE.yaml is missing")
    tree, warnings = _read(path)
    if svg:
        from ..trees.keys import files_read
        from .picture import check_picture

        check_picture(Path(svg), force=flags["force"], reads=files_read(tree))
    checked, known = known_plan(tree, warnings, folder, fuse=flags["fuse"])
    if not checked.problems:
        told = (*checked.warnings, *checked.unrelated())
        checked = dataclasses.replace(checked, warnings=told)
    wanted = [kind for kind in _PICTURES if flags[kind]]
    if svg:
        from ..files.placing import save_text
        from .picture import svg as drawn

        save_text(drawn(checked, _metrics(checked, known)), Path(svg), force=flags["force"])
    for kind in wanted:
        from . import picture as pictures

        click.echo(getattr(pictures, kind)(checked), nl=False)
    if as_json or not wanted:
        print_plan(checked, as_json=as_json)
    else:
        _warn(checked)
    checked.raise_problems()


def _metrics(checked: Any, known: Any) -> dict[str, str]:
    """What the store knows of each node that is done, in a few words."""
    found = {}
    for name, node in checked.nodes.items():
        metrics = known.entry(node.key).record.get("metrics") if node.done else None
        if metrics:
            found[name] = " ".join(f"{k} {v:.4g}" for k, v in metrics.items())
    return found


@click.command(no_args_is_help=True)
@click.argument("path", metavar="TREE.yaml", type=GivenPath())
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=GivenPath(),
    default="soup.safetensors",
    show_default=True,
    help="A .safetensors file; or a folder, where the leaves are model folders.",
)
@store_option
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many nodes run at the same time.  [default: 1]",
)
@click.option(
    "--executor",
    default="local",
    show_default=True,
    metavar="WHERE",
    help="local, processes:N, dask://HOST:PORT, ray or ray://HOST:PORT.",
)
@click.option(
    "--keep",
    default="all",
    show_default=True,
    metavar="all|root",
    help="Which results stay in the store.",
)
@click.option(
    "--model-card/--no-model-card",
    default=None,
    help="Write a README.md into a folder: parents, methods, the plan.  "
    "[default: for configurations of mergekit]",
)
@_fuse_option
@force_option
@json_option
@quiet_option
def run(
    path: str, output: str, folder: str, executor: str, model_card: bool | None, **options: Any
) -> None:  # fmt: skip
    """Carry out a tree; run it again after any interruption, and it goes on.

    \b
    soup run tree.yaml -o out.safetensors
    """  # noqa: D301
    from ..files.checkpoint import SUFFIX
    from ..trees.mergekit import speaks_mergekit

    if model_card is None:
        model_card = Path(output).suffix != SUFFIX and speaks_mergekit(Path(path))
    carry_out(
        lambda: _read(path), output, folder, executor, shown=beside(output, path),
        model_card=model_card, **options,
    )  # fmt: skip


def beside(output: str, name: str) -> Path:
    """Where that is kept which trainers show of what is made by a plan, or of one model."""
    return Path(output).parent / f"{Path(name).stem}-shown"


def carry_out(
    read: Callable[[], tuple[Any, list[str]]], output: str, folder: str, executor: str = "local", *,
    shown: Path, workers: int | None = None, keep: str = "all", fuse: bool = False,
    force: bool = False, quiet: bool = False, as_json: bool = False, model_card: bool = False,
) -> None:  # fmt: skip
    """Carry out a tree, and tell how far it is.

    Args:
        read: gives the tree, and warnings.
        output: where the root's checkpoint goes.
        folder: the store's.
        executor: where nodes run, by its name.
        shown: for what trainers show.
        workers: how many nodes run at the same time.
        keep: see `run`, as `fuse` and `force`.
        fuse: see there.
        force: see there.
        quiet: print errors only.
        as_json: print the report as JSON, and nothing else.
        model_card: see `run`.
    """
    # Nearly all that is imported and read lives to the end: looking for garbage among it, now and
    # when the process ends, would take a quarter of the time until the first node begins.
    gc.disable()
    click.get_current_context().call_on_close(gc.enable)
    talks = not (quiet or as_json)
    try:
        from ..running.executors import executor_from

        with contextlib.ExitStack() as stack:
            # Local processes get ready while the plan is read; a cluster is not asked for nothing.
            is_local = executor.partition(":")[0] in ("local", "processes")
            where = stack.enter_context(executor_from(executor, workers)) if is_local else None

            from ..running import runner

            tree, warnings = read()
            for warning in warnings if talks else ():
                say("warning", warning)
            if where is None:
                where = stack.enter_context(executor_from(executor, workers))
            view = None
            if talks:
                from .show_tree import watching

                view = stack.enter_context(watching(shown))
            gc.freeze()
            gc.enable()
            report = runner.run(
                tree, output, store=folder, executor=where, workers=workers, keep=keep, fuse=fuse,
                force=force, planned=None if view is None else view.begin, watch=view, shown=shown,
                model_card=model_card,
            )  # fmt: skip
    except KeyboardInterrupt as error:
        from ..trees.store import Store

        there = (Path(folder) / "objects").is_dir()
        kept = sum(1 for _ in Store(folder, create=False).entries()) if there else 0
        error.add_note(
            f"{are_counted(kept, 'finished result')} kept in {folder}; the same command goes on."
        )
        raise
    if as_json:
        print_json(report.as_json())
    elif talks:
        if shown.is_dir():
            say("note", f"pictures and curves are in {shown}")
        reused = len(report.records) - len(report.computed)
        already = " was this result already" if report.was_there else ""
        computed = counted(len(report.computed), "node")
        echo(f"{report.output}{already}: {computed} computed, {reused} reused")


@click.group()
def store() -> None:
    """Look after a store of results."""


def _open(folder: str) -> Any:
    from ..trees.store import Store

    return Store(folder, create=False)


@store.command("list")
@store_option
@json_option
def store_list(folder: str, as_json: bool) -> None:
    """List the finished results."""
    opened = _open(folder)
    entries = list(opened.entries())
    if as_json:
        print_json([{**e.record, "path": str(e.path), "nbytes": e.nbytes} for e in entries])
        return
    from .show_tree import show_entries

    show_entries(entries, opened.pinned())


@store.command("show", no_args_is_help=True)
@click.argument("key")
@store_option
def store_show(key: str, folder: str) -> None:
    """Print one result's record; KEY may be the beginning of a key."""
    entry = _open(folder).find(key)
    print_json({**entry.record, "path": str(entry.path), "nbytes": entry.nbytes})


@store.command("gc")
@click.option(
    "--keep",
    default="trees",
    show_default=True,
    metavar="trees|roots|none",
    help="Keep what the trees need that were run here, only their final results, or nothing.",
)
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Forget the trees that were not run for so many days.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@store_option
def store_gc(keep: str, older_than: float | None, dry_run: bool, folder: str) -> None:
    """Remove results that nothing needs."""
    cleaned = _open(folder).gc(keep=keep, older_than=older_than, dry_run=dry_run)
    from ..errors import sized

    would = "would be " if dry_run else ""
    echo(f"{counted(len(cleaned.keys), 'result')}, {sized(cleaned.nbytes)} {would}removed")


@store.command("verify")
@store_option
def store_verify(folder: str) -> None:
    """Compare every result with the digest that it had when it was made."""
    opened = _open(folder)
    entries = list(opened.entries())
    damaged = [entry for entry in entries if not opened.intact(entry.key)]
    click.echo(f"{are_counted(len(entries) - len(damaged), 'result')} intact")
    names = [f"{entry.record.get('node')} ({entry.key})" for entry in damaged]
    names += [f"{key} (its record)" for key in opened.damaged_records()]
    if names:
        raise StoreError(
            f"{are_counted(len(names), 'result')} damaged: {', '.join(names)} (a run of the plan "
            f"makes what is damaged again)"
        )
