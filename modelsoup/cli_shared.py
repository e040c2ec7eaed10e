"""What several commands share: the option `--json`, and what is said on stderr."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from .errors import printable


def colored(kind: str, message: str, color: str) -> None:
    """`kind: message` on stderr, in colour where that is wanted (https://no-color.org)."""
    wanted = None if "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb" else False
    click.secho(f"{kind}: ", fg=color, bold=True, nl=False, err=True, color=wanted)
    click.echo(printable(message), err=True)


def say(kind: str, message: str) -> None:
    """A warning or note."""
    colored(kind, message, "yellow")


def print_json(content: object) -> None:
    """Plain data on stdout."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))


def json_option(command: Any) -> Any:
    """The option `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")(
        command
    )
