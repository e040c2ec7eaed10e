"""The command `soup`: each command is a few lines over the library.

Exit codes: 0, 1 for a mistake that one sentence on stderr explains, 2 for wrong usage, and 128 and
the signal's number where one ended it: 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import LISTED, SoupError, counted, listed, nearest, speaking
from ..version import __version__
from .cli_average import average
from .cli_experts import experts
from .cli_lora import lora
from .cli_merge import merge
from .cli_report import report
from .cli_shared import (
    GivenPath,
    colored,
    echo,
    force_option,
    json_option,
    print_json,
    say,
)
from .cli_train import train, trainers
from .cli_tree import plan, run, store

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "modelsoup.commands"


class _Group(click.Group):
    """Commands of our own, and of other packages, which are imported only when they are named."""

    def _others(self) -> dict[str, EntryPoint]:
        from importlib.metadata import entry_points  # 0.05 s

        return {point.name: point for point in entry_points(group=ENTRY_POINTS)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *sorted(self._others().keys() - self.commands.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        point = self._others().get(cmd_name)
        if point is None:
            return None
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise SoupError(f"the command {cmd_name!r} ({point.value}) failed: {error}") from error
        if not isinstance(loaded, click.Command):
            raise SoupError(f"the command {cmd_name!r} ({point.value}) is no click command")
        return loaded

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            hint = nearest(args[0], self.list_commands(ctx), limit=1)
            if not hint or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message.rstrip('.')}{hint}", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str(90)) for name, command in self.commands.items()]
        rows += [
            (name, f"(from {point.value.partition(':')[0].partition('.')[0]})")
            for name, point in sorted(self._others().items())
            if name not in self.commands
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _stand_in_for_closed_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):  # of which latin-1 has no arrows, say
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _ended_by_signals(), speaking("command"):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            echo(" ".join(["Interrupted.", *getattr(error, "__notes__", ())]), err=True)
            sys.exit(128 + getattr(error, "number", signal.SIGINT))
        except SoupError as error:
            raise _Mistake(error) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise _Mistake(SoupError(f"{where}{error.strerror or error}")) from error


class _Ended(KeyboardInterrupt):
    """A signal that ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 2.0  # seconds in which a signal that comes again is not needed


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have every signal that ends a command do it as Ctrl-C does: what is half-written is removed.

    One that is ignored, as by `nohup`, stays so.
    """
    came, over = -_PATIENCE, False

    def end(number: int, _: object) -> None:
        nonlocal came
        if time.monotonic() - came < _PATIENCE:  # it would interrupt the removing
            return
        if over:  # only threads are waited for, and nobody is left to hear of an exception
            os._exit(128 + number)
        came = time.monotonic()
        raise _Ended(number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    try:
        before = {
            number: signal.signal(number, end)
            for number in _ENDING
            if signal.getsignal(number) in usual
        }
    except ValueError:  # in a thread, which gets no signals
        before = {}
    try:
        yield
    except _Ended:
        over = True
        raise
    finally:
        for number, handler in before.items() if not over else ():
            signal.signal(number, handler)


def _stand_in_for_closed_streams() -> None:
    """Let what is closed lead nowhere: a file that is opened next would be taken for it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


class _Mistake(click.ClickException):
    """The user's mistake: a sentence each line, exit code 1."""

    exit_code = 1

    def __init__(self, error: SoupError) -> None:
        super().__init__(str(error))
        self.lines = error.args or ("",)

    def show(self, file: Any = None) -> None:
        colored("Error", self.lines, "red")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="soup")
def main() -> None:
    """One checkpoint out of several: merge safetensors checkpoints of any size.

    Shell completion: eval "$(_SOUP_COMPLETE=bash_source soup)" (or zsh_source, fish_source).
    """


main.add_command(merge)  # first, as they are listed in this order


@main.command(no_args_is_help=True)
@click.argument("path", type=GivenPath(), metavar="CHECKPOINT")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--lineage", is_flag=True, help="Show what it was made of.")
@json_option
def inspect(path: str, tensors: bool, lineage: bool, as_json: bool) -> None:
    """Show what is in a checkpoint: names as a tree, parameters, bytes, dtypes."""
    from ..files.checkpoint import open_checkpoint
    from ..files.inspection import as_json as node_as_json
    from ..files.inspection import notes_on, summarize
    from ..merging.lineage import read_lineage

    checkpoint = open_checkpoint(path, shard=True)
    made = read_lineage(checkpoint) if lineage else None
    if as_json:
        content: dict[str, Any] = {"path": str(checkpoint.path), "metadata": checkpoint.metadata}
        content["notes"] = notes_on(checkpoint)
        if lineage:
            content["lineage"] = made
        elif tensors:
            content["tensors"] = [
                {
                    "name": info.name, "dtype": info.dtype, "shape": info.shape,
                    "file": info.file.name, "start": info.start, "nbytes": info.nbytes,
                }
                for info in checkpoint.tensors.values()
            ]  # fmt: skip
        else:
            content["tree"] = node_as_json(summarize(checkpoint))
        print_json(content)
        return
    from . import show

    if lineage:
        show.show_lineage(checkpoint, made)
    else:
        show.show_inspection(checkpoint, summarize(checkpoint), tensors=tensors)
    for note in notes_on(checkpoint):
        say("note", note)


@main.command(no_args_is_help=True)
@click.argument("first", type=GivenPath(), metavar="A")
@click.argument("second", type=GivenPath(), metavar="B")
@click.option("--by", default="layer", metavar="layer|tensor|group", show_default=True)
@click.option(
    "--base", metavar="BASE", type=GivenPath(),
    help="What both were tuned from: compare their task vectors too.",
)  # fmt: skip
@json_option
def diff(first: str, second: str, by: str, base: str | None, as_json: bool) -> None:
    """Compare two checkpoints: cosine, relative L2 and signs, missing and mismatched names."""
    from ..merging import compare

    report = compare.diff(first, second, by=by, base=base)  # type: ignore[arg-type]  # it checks
    if as_json:
        print_json(report.as_json())
        return
    from . import show

    show.show_diff(report, by)


@main.command(no_args_is_help=True)
@click.argument("source", type=GivenPath(), metavar="IN")
@click.argument("output", type=GivenPath(), metavar="OUT")
@click.option("--key", help="Which nested state dict to take: 'params_ema', 'model.state_dict'.")
@click.option(
    "--strip-prefix",
    multiple=True,
    metavar="PREFIX",
    help="Take this off the names: 'module.', '_orig_mod.'; may be given several times.",
)
@click.option("--shard-size", metavar="SIZE", help="Divide a folder's weights: 5GB, 500MB.")
@force_option
def convert(
    source: str,
    output: str,
    key: str | None,
    strip_prefix: tuple[str, ...],
    shard_size: str | None,
    force: bool,
) -> None:
    """Convert a PyTorch pickle (.pth, .pt, .ckpt, .bin) to safetensors; no code in it is run.

    IN is a file or a model folder; OUT a .safetensors file or, for a folder, a folder too, where
    config and tokenizer come along.
    """
    from ..files import torch_convert

    report = torch_convert.convert(
        source, output, key=key, strip_prefixes=strip_prefix, shard_size=shard_size, force=force
    )
    echo(f"{report.output}: {counted(report.tensors, 'tensor')}, {report.nbytes:,} bytes")
    if report.source != Path(source):
        say("note", f"read {report.source}")
    if report.key:
        say("note", f"took the state dict under {report.key!r}")
    if report.skipped:
        left_out = [str(entry) for entry in report.skipped[:LISTED]]
        more = len(report.skipped) - len(left_out)
        say("warning", f"left out: {', '.join(left_out)}{f' and {more} more' if more else ''}")
    if report.empty:
        say(
            "warning",
            f"without elements: {listed(report.empty)} (if ZeRO-3 trained the model, its weights "
            f"are in other files, which zero_to_fp32.py gathers)",
        )
    if report.parts:
        say(
            "warning",
            f"not converted: the weights in {listed(report.parts)}; `soup convert` takes each such "
            f"folder by itself, to a .safetensors file",
        )
    if Path(source).is_dir() and report.output.is_file():
        say("note", "config and tokenizer were not copied; with a folder as OUT they are")
    for names in report.shared:
        say("note", f"share memory, and are written as copies: {', '.join(names)}")


@main.command()
@click.argument("name", required=False)
@json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the merge methods by what they are for, or describe one: parameters, defaults, paper."""
    from ..merging.methods import describe, get_method, offered_methods, registered_methods
    from ..merging.methods.listing import sorted_by_purpose

    if name:
        described = describe(get_method(name))
        if as_json:
            print_json(described)
            return
        from . import show

        show.show_method(described)
        return
    loaded = [describe(method) for method in registered_methods()]
    offered = [{"name": n, "from": package} for n, package in offered_methods().items()]
    every = sorted_by_purpose([*loaded, *offered])
    if as_json:
        print_json(every)
        return
    from . import show

    show.show_methods(every)


@main.command(no_args_is_help=True)
@click.argument("path", type=GivenPath(), metavar="CHECKPOINT")
@click.option(
    "--inputs",
    multiple=True,
    type=GivenPath(),
    metavar="FOLDER",
    help="Where the inputs lie.  [default: beside the checkpoint, and the current folder]",
)
@json_option
def verify(path: str, inputs: tuple[str, ...], as_json: bool) -> None:
    """Check headers, byte ranges, values, and the inputs' digests where they are at hand."""
    from ..files.inspection import notes_on
    from ..merging import verification

    report = verification.verify(path, folders=inputs or None)
    if as_json:
        print_json(report.as_json())
    else:
        from . import show

        show.show_verification(report)
    for note in notes_on(report.checkpoint):
        say("note", note)
    faults = [] if report.sound else [f"{path} is not sound"]
    if report.changed:
        names = listed([str(check.found) for check in report.changed])
        is_sound = f"; {path} itself is sound" if report.sound else ""
        faults.append(f"no longer what went into {path}: {names}{is_sound}")
    if faults:
        raise SoupError(*faults)


for _command in (average, plan, run, store, train, trainers, report, lora, experts):
    main.add_command(_command)
