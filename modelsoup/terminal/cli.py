"""The command `soup`: each command is a few lines over the library.

Exit codes: 0, 1 for a mistake that one sentence on stderr explains, 2 for wrong usage, and 128 and
the signal's number where one ended it: 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import LISTED, ParameterError, SoupError, counted, listed, nearest, speaking
from ..version import __version__
from .cli_average import average
from .cli_lora import lora
from .cli_report import report
from .cli_shared import (
    GivenPath,
    colored,
    echo,
    json_option,
    print_json,
    progress_shown,
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


@main.command(no_args_is_help=True)
@click.argument("models", nargs=-1, metavar="A B [C …]", type=GivenPath())
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=GivenPath(),
    help="A .safetensors file; or a folder, where config and tokenizer come along.  "
    "[default: soup.safetensors]",
)
@click.option("--method", metavar="NAME", help="See `soup methods`.  [default: linear]")
@click.option(
    "--beta",
    type=float,
    metavar="β",
    help="The first of two models' share, from 0 to 1.  [default: equal weights]",
)
@click.option("--weights", metavar="W,W,…", help="One weight a model.")
@click.option(
    "--base", metavar="BASE", type=GivenPath(), help="The base model of task-vector methods."
)
@click.option(
    "--lora",
    multiple=True,
    metavar="ADAPTER[=W]",
    help="Apply a low-rank adapter to the one model; again for more.  [default: W is 1]",
)
@click.option(
    "--aux",
    multiple=True,
    metavar="NAME=A,B",
    help="What a method takes beside the models, a checkpoint for each: fisher=a.f,b.f.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the method; one number, or one a model: density=0.5,0.3.",
)
@click.option(
    "--layers",
    multiple=True,
    metavar="PATTERN[=WHAT]",
    help="A layer rule: 'disc.*', 're:G_.*', 'G_*=0.3', 'head.*=drop', 'bn.*=second'. "
    "The first that matches decides.",
)
@click.option(
    "--rest",
    metavar="WHAT",
    help="Tensors that no rule matches: merge, first, second or base (kept from that model), "
    "drop, error.  [default: merge if all rules only keep or drop, else first]",
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="NAME=PATTERN",
    help="Define 'group:NAME' for rules; given again, it adds a pattern.",
)
@click.option(
    "--low-level",
    multiple=True,
    metavar="FRACTION",
    help="The depth that the preset low-level takes of each subnetwork: 0.3, or 'D_*=0.6'.",
)
@click.option(
    "--rename",
    "renames",
    multiple=True,
    metavar="PATTERN=NEW",
    help="Have tensors of a model go by another name: 'module.*=*', 'second:net.*=model.*'.",
)
@click.option(
    "--strip-prefix",
    "prefixes",
    multiple=True,
    metavar="PREFIX",
    help="Take this off the names: 'module.', '_orig_mod.'; --rename 'module.*=*' does the same.",
)
@click.option(
    "--rename-map",
    metavar="FILE",
    type=GivenPath(),
    help="A YAML or JSON file with renames: a mapping from patterns to new names.",
)
@click.option(
    "--slice",
    "slices",
    multiple=True,
    metavar="MODEL[START:STOP]",
    help="Stack layers anew: '1[0:16]' and then '2[8:24]'; '1[0:8]+2[0:8]' merges those of two.",
)
@click.option(
    "--files-from",
    metavar="MODEL",
    help="Whose config and other files go along into a folder: first, second, 3, base.  "
    "[default: first]",
)
@click.option(
    "--tokenizer-from", metavar="MODEL", help="Whose tokenizer does.  [default: as --files-from]"
)
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="Stored dtype of float tensors: f32, f16, bf16, ….  [default: the first model's]",
)
@click.option(
    "--on-integer",
    metavar="max|first|error",
    help="What to take where integer tensors differ.  "
    "[default: max for num_batches_tracked, else error]",
)
@click.option("--seed", type=int, help="Seeds the methods that drop at random.  [default: 0]")
@click.option(
    "--config",
    metavar="FILE",
    type=GivenPath(),
    help="A YAML file with these options as keys, models and output too; the command line wins. "
    "Or a configuration of mergekit.",
)
@click.option("--shard-size", metavar="SIZE", help="Divide a folder's weights: 5GB, 500MB.")
@click.option("--workers", type=int, metavar="N", help="Threads.  [default: the cores, at most 8]")
@click.option("--dry-run", is_flag=True, help="Check all that headers can tell; write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--strict", is_flag=True, help="Make warnings errors.")
@click.option(
    "--allow-nonfinite",
    multiple=True,
    metavar="PATTERN",
    help="Let NaN and infinity pass in these tensors; '*': in all, and weights that sum to zero.",
)
@click.option(
    "--model-card/--no-model-card",
    default=None,
    help="Write a README.md into a folder: parents, method, configuration.  "
    "[default: for configurations of mergekit]",
)
@click.option("--sha256", is_flag=True, help="Record SHA-256 digests of the inputs too.")
@click.option(
    "--no-fsync",
    is_flag=True,
    help="Do not wait for the disk: quicker, but a power cut may leave a broken file.",
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Say more of what happens.")
def merge(models: tuple[str, ...], **options: Any) -> None:
    """Merge checkpoints into one.

    \b
    soup merge a.safetensors b.safetensors --beta 0.5 --layers 'disc.*'
    """  # noqa: D301
    from ..files.checkpoint import SUFFIX
    from ..merging import merge as engine
    from ..merging.lora import parse_weighted

    # The objects of a merge live until it ends: looking for cycles among those of 100,000 tensors
    # would take as long as planning them.
    gc.disable()
    click.get_current_context().call_on_close(gc.enable)
    if options["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    talks = not (options["quiet"] or options["as_json"])
    in_file = {} if options["config"] is None else _config(options, models)
    told = {name: in_file.pop(name) for name in _BESIDE_THE_RECIPE if name in in_file}
    of_command = {
        name: options.get(name) for name in _BESIDE_THE_RECIPE if name not in ("lora", "aux")
    }
    told |= {n: value for n, value in of_command.items() if not (value is None or value is False)}
    paths = list(models) or told.pop("models", None)
    told.pop("models", None)
    if options["aux"]:
        told["aux"] = _auxiliary(options["aux"])
    if options["lora"]:
        told["lora"] = _adapters(map(parse_weighted, options["lora"]))
    if not paths:
        raise click.UsageError("Missing argument 'A B [C …]': the models")
    output = told.pop("output", "soup" if "shard_size" in told else engine.DEFAULT_OUTPUT)
    text = in_file.pop("text", False)  # a configuration of mergekit
    recipe = in_file.pop("recipe", None) or _recipe(options, in_file)
    wants_card = options["model_card"]
    if wants_card is None:
        wants_card = told.pop("model_card", bool(text) and Path(output).suffix != SUFFIX)
    told["model_card"] = (text or True) if wants_card else False
    if options["config"]:
        from ..files.placing import check_apart, check_place

        check_place(Path(output))
        check_apart(Path(output), [Path(options["config"])])
    with progress_shown("merging", shown=talks and not options["dry_run"]) as progress:
        report = engine.merge(
            paths, output, recipe, force=options["force"], fsync=not options["no_fsync"],
            dry_run=options["dry_run"], progress=progress, **told,
        )  # fmt: skip
    if options["as_json"]:
        print_json(report.as_json())
    if not talks:
        return
    from . import show

    show.show_merge(report)
    for notice in report.notices:
        say(notice.level, notice.message)
    if report.output is not None and report.output.is_file() and Path(paths[0]).is_dir():
        say("note", "config and tokenizer were not copied; with a folder as --output they are")


# Options of `soup merge` that a --config file may have, and the types that they have there.
_BESIDE_THE_RECIPE: dict[str, Any] = {
    "models": list, "output": str, "base": str, "shard_size": (str, int), "workers": int,
    "strict": bool, "sha256": bool, "model_card": bool, "lora": (list, dict),
    "aux": dict,
}  # fmt: skip


def _auxiliary(given: Iterable[str]) -> dict[str, list[str]]:
    """Checkpoints beside the models, by name; what is given again is added."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, paths = text.partition("=")
        if not name or not equals or not all(paths.split(",")):
            raise ParameterError(f"--aux has {text!r}, but must be NAME=A,B: one path a model")
        found.setdefault(name, []).extend(paths.split(","))
    return found


def _adapters(weighted: Iterable[tuple[Path, Any]]) -> dict[Path, float]:
    """Adapters and their weights."""
    found: dict[Path, float] = {}
    for path, weight in weighted:
        if path in found:
            raise ParameterError(f"the adapter {path} is given twice")
        found[path] = weight
    return found


# Options that a merge of mergekit's does not say: what decides its result is in its file.
_BESIDE_MERGEKIT = (
    "config", "output", "shard_size", "workers", "dry_run", "force", "strict", "sha256", "no_fsync",
    "allow_nonfinite", "on_integer", "seed", "as_json", "quiet", "verbose", "model_card",
)  # fmt: skip


def _of_mergekit(options: Mapping[str, Any], models: tuple[str, ...]) -> dict[str, Any]:
    """What a configuration of mergekit says, with the recipe that it makes."""
    from dataclasses import replace

    from ..files.yaml_text import read_documents
    from ..trees.mergekit import merges_of

    path = Path(options["config"])
    source = click.get_current_context().get_parameter_source
    given = [name for name in options if source(name) is not ParameterSource.DEFAULT]
    others = [name for name in given if name not in _BESIDE_MERGEKIT]
    if models or others:
        what = "models are" if models else f"--{others[0].replace('_', '-')} is"
        raise ParameterError(f"{what} given, but {path} is mergekit's and says all of the merge")
    merges, warnings = merges_of(read_documents(path), path.parent)
    if len(merges) > 1:
        output = options["output"] or "OUT"
        raise ParameterError(
            f"{path} has {len(merges)} merges, which are a tree: soup run {shlex.quote(str(path))} "
            f"-o {shlex.quote(output)}"
        )
    for warning in warnings if not options["quiet"] else ():
        say("warning", warning)
    (merge,) = merges.values()
    named = {n: options[n] for n in ("allow_nonfinite", "on_integer", "seed") if n in given}
    recipe = replace(merge.recipe, **named)
    found = {"models": list(merge.models), "recipe": recipe, "text": path.read_text("utf-8")}
    return found if merge.base is None else {**found, "base": merge.base}


def _config(options: Mapping[str, Any], models: tuple[str, ...]) -> dict[str, Any]:
    """What a --config file says; paths in it are relative to it, as in a plan."""
    from ..files.yaml_text import read_yaml
    from ..merging.recipe import plain_keys
    from ..merging.values import truth
    from ..trees.mergekit import speaks_mergekit

    path = options["config"]
    if speaks_mergekit(Path(path)):
        return _of_mergekit(options, models)
    content = plain_keys(read_yaml(Path(path)).content, path)
    for name, kind in _BESIDE_THE_RECIPE.items():
        if name in content and kind is bool:
            content[name] = truth(name, content[name])
        if name in content and not isinstance(content[name], kind):
            raise ParameterError(f"{path} has {content[name]!r} as {name!r}")
    folder = Path(path).parent
    for name in ("output", "base"):
        if name in content:
            content[name] = folder / content[name]
    if "lora" in content:
        given = content["lora"]
        weighted = given.items() if isinstance(given, dict) else ((path, 1.0) for path in given)
        content["lora"] = _adapters((folder / str(path), weight) for path, weight in weighted)
    if "aux" in content:
        content["aux"] = {
            name: [folder / str(one) for one in ([given] if isinstance(given, str) else given)]
            for name, given in content["aux"].items()
        }
    if "models" in content:
        content["models"] = [folder / str(model) for model in content["models"]]
    return content


def _recipe(options: Mapping[str, Any], in_file: dict[str, Any]) -> Any:
    """The recipe of the --config file and, over it, of the command line."""
    from ..merging.recipe import Recipe, recipe_fields
    from ..merging.renames import parse_renames
    from ..merging.rules import parse_layers

    where = options["config"] or "the command line"
    content: dict[str, Any] = dict(recipe_fields(in_file, where, _BESIDE_THE_RECIPE))
    if options["method"] not in (None, content.get("method")):
        content["parameters"] = {}  # another method's
    for name, other in (("beta", "weights"), ("weights", "beta")):
        if options[name] is not None:
            content.pop(other, None)  # the file's, which the command line's replaces
    for name in (
        "method", "beta", "rest", "dtype", "on_integer", "seed", "files_from", "tokenizer_from",
    ):  # fmt: skip
        if options[name] is not None:
            content[name] = options[name]
    if options["weights"] is not None:
        content["weights"] = _numbers("--weights", options["weights"])
    for name in ("low_level", "allow_nonfinite"):
        if options[name]:
            content[name] = list(options[name])
    if options["layers"]:
        own = parse_layers(list(options["layers"]))
        over = {rule.pattern for rule in own if not rule.low_level}
        of_file = parse_layers(content.get("layers", ()))
        content["layers"] = [*own, *(rule for rule in of_file if rule.pattern not in over)]
    if options["groups"]:
        content["groups"] = _groups(options["groups"])
    renames = _renames(options)
    content["renames"] = [*renames, *parse_renames(content.get("renames", ()))]
    if options["slices"]:
        content["slices"] = list(options["slices"])
    for setting in options["settings"]:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ParameterError(f"--set has {setting!r}, but must be NAME=VALUE")
        parameters = {"parameters": {name.strip(): value}}
        given = recipe_fields({"method": content.get("method"), **parameters}, "the command line")
        content["parameters"] = {**content["parameters"], **given["parameters"]}
    return Recipe(**content)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ParameterError(f"{option} has {text!r}, but must be numbers with commas") from None


def _groups(definitions: tuple[str, ...]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for definition in definitions:
        name, equals, pattern = definition.partition("=")
        if not equals or not name or not pattern:
            raise ParameterError(f"--group has {definition!r}, but must be NAME=PATTERN")
        groups.setdefault(name, []).append(pattern)
    return groups


def _renames(options: Mapping[str, Any]) -> list[Any]:
    """What the command line says of names, in the order in which it is tried."""
    from ..merging.renames import parse_renames, strip_prefix

    found = [*parse_renames(options["renames"]), *map(strip_prefix, options["prefixes"])]
    if options["rename_map"] is not None:
        from ..files.yaml_text import read_yaml

        content = read_yaml(Path(options["rename_map"])).content
        if not isinstance(content, dict):
            raise ParameterError(
                f"{options['rename_map']} is no mapping from patterns of names to new names"
            )
        found += parse_renames(content)
    return found


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
@json_option
def diff(first: str, second: str, by: str, as_json: bool) -> None:
    """Compare two checkpoints: cosine, relative L2 and signs, missing and mismatched names."""
    from ..merging import compare

    report = compare.diff(first, second, by=by)  # type: ignore[arg-type]  # it checks
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
@click.option("--force", is_flag=True, help="Replace an existing output.")
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


for _command in (average, plan, run, store, train, trainers, report, lora):
    main.add_command(_command)
