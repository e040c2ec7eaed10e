"""`soup report`: a few lines over the library."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_shared import GivenPath, echo


@click.command(no_args_is_help=True)
@click.argument("path", metavar="STORE_OR_CHECKPOINT", type=GivenPath())
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=GivenPath(),
    default="report.html",
    show_default=True,
    help="The page, one HTML file.",
)
@click.option(
    "--store",
    "folder",
    metavar="DIR",
    type=GivenPath(),
    help="For a checkpoint: where records of what it was made of are.  [default: .soup-store]",
)
@click.option("--force", is_flag=True, help="Replace an existing page.")
def report(path: str, output: str, folder: str | None, force: bool) -> None:
    """Write a page on a store, or on a checkpoint: trees, metrics, curves, samples.

    \b
    soup report .soup-store -o report.html
    """  # noqa: D301
    from ..errors import sized
    from ..files.placing import save_text
    from ..trees.store import DEFAULT_STORE, Store
    from . import report as pages
    from .picture import check_picture

    given, place = Path(path), Path(output)
    is_store = (given / "objects").is_dir()
    if is_store and folder is not None:
        raise click.UsageError("--store goes with a checkpoint, and not with a store")
    known = None
    if not is_store and (folder is not None or (Path(DEFAULT_STORE) / "objects").is_dir()):
        known = Store(folder or DEFAULT_STORE, create=False)
    reads = [given, *([] if known is None else [known.folder])]
    check_picture(place, force=force, reads=reads, what="report", suffixes=(".html", ".htm"))
    page = pages.report(given, known)
    save_text(page, place, force=force)
    echo(f"{place}: {sized(len(page.encode()))}")
