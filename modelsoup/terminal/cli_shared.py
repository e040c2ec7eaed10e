"""What several commands share: paths, the option `--json`, and what is said on stderr."""

from __future__ import annotations

import atexit
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from ..errors import ParameterError, printable, sized

if TYPE_CHECKING:
    from ..merging.merge import MergeReport

# Options of several commands, which take and say the same.
on_integer_option = click.option(
    "--on-integer",
    metavar="max|first|error",
    help="What to take where integer tensors differ.  "
    "[default: max for num_batches_tracked, else error]",
)
workers_option = click.option(
    "--workers", type=int, metavar="N", help="Threads.  [default: the cores, at most 8]"
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check all that headers can tell; write nothing."
)
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")

_MINUTE = 60.0  # seconds after which progress is told again, where there is no terminal


def settings_given(settings: Sequence[str]) -> dict[str, str]:
    """What each `--set NAME=VALUE` says.

    Raises:
        ParameterError: one is not of that form.
    """
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ParameterError(f"--set has {setting!r}, but must be NAME=VALUE")
        found[name] = value
    return found


class GivenPath(click.Path):
    """The type of a command's path.

    An empty one, which a shell makes of a variable that is not set, would mean the current folder.
    """

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:  # fmt: skip
        """The path.

        Raises:
            ParameterError: it is empty.
        """
        if value == "":
            assert param is not None
            is_option = isinstance(param, click.Option)
            name = max(param.opts, key=len) if is_option else param.human_readable_name
            raise ParameterError(f"the path of {name} is empty")
        return super().convert(value, param, ctx)


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
    """Plain data on stdout; what a terminal would not show stands there as an escape.

    JSON has no infinity and no NaN: they are the texts `"inf"`, `"-inf"` and `"nan"`.
    """
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    for line in text.split("\n"):
        click.echo("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line))


def _finite(content: object) -> object:
    if isinstance(content, Mapping):
        return {_finite(name): _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    is_number = not isinstance(content, float) or math.isfinite(content)
    return content if is_number else str(content)


def json_option(command: Any) -> Any:
    """The option `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")(
        command
    )


def progress_shown(title: str, *, shown: bool) -> AbstractContextManager[Any]:
    """A bar on a terminal, elsewhere a line a minute; nothing where nobody wants it."""
    if not shown:
        return nullcontext()
    if not sys.stderr.isatty():
        return nullcontext(_progress_lines(title))
    from . import show

    return show.progress_bar(title)


def _progress_lines(title: str) -> Callable[[int, int], None]:
    start = told = time.monotonic()
    done = 0

    def advance(nbytes: int, total: int) -> None:
        nonlocal done, told
        done += nbytes
        now = time.monotonic()
        if now - told >= _MINUTE:
            told = now
            echo(f"{now - start:7.1f} s  {title}  {done / total:.0%} of {sized(total)}", err=True)

    return advance


def tell_merge(report: MergeReport, options: Mapping[str, Any]) -> None:
    """What a merge did, as its options `as_json` and `quiet` want it told."""
    # The interpreter's last search for garbage, through all that was imported, would take 30 ms.
    atexit.register(gc.freeze)
    if options["as_json"]:
        print_json(report.as_json())
    elif not options["quiet"]:
        from . import show

        show.show_merge(report)
        for notice in report.notices:
            say(notice.level, notice.message)
