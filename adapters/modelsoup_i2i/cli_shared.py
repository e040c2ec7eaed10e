"""What the files of `soup i2i` share: options that several commands have, and how they speak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from modelsoup import (
    GivenPath,
    SoupError,
    how_to_install,
    printable,
)

PATH = GivenPath(path_type=Path)
DIRECTION = click.option(
    "--direction", type=click.Choice(["x2y", "y2x"]), default="x2y", show_default=True,
    help="From the first domain to the second, or back; a model of one generator has one.",
)  # fmt: skip
FORCE = click.option("--force", is_flag=True, help="Replace what is there.")
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)


def say(line: str) -> None:
    """A line on stderr, with what comes from files spelt out where it is not printable."""
    click.echo(printable(line), err=True)


@contextmanager
def needed(extra: str) -> Iterator[None]:
    """An import that fails is a sentence that names the extra."""
    try:
        yield
    except ImportError as error:
        raise SoupError(f"this needs {how_to_install(extra)} ({error})") from error
