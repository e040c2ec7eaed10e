"""What several commands share: the option `--json`, and what is said on stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import click

from .errors import printable


def colored(kind: str, lines: Sequence[str], color: str) -> None:
    """`kind: message` on stderr, in colour where that is wanted (https://no-color.org)."""
    wanted = None if "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb" else False
    click.secho(f"{kind}: ", fg=color, bold=True, nl=False, err=True, color=wanted)
    for line in lines:
        echo(line, err=True)


def say(kind: str, message: str) -> None:
    """A warning or note."""
    colored(kind, [message], "yellow")


def echo(line: str, *, err: bool = False) -> None:
    """One line, with what comes from files spelt out where it is not printable."""
    click.echo(printable(line), err=err)


def print_json(content: object) -> None:
    """Plain data on stdout; what a terminal would not show stands there as an escape."""
    for line in json.dumps(content, indent=2, ensure_ascii=False).split("\n"):
        click.echo("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line))


def json_option(command: Any) -> Any:
    """The option `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")(
        command
    )
