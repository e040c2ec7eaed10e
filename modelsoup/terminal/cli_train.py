"""`soup trainers` and `soup train`: what trainers there are, and one model with no plan written."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import ParameterError, SoupError, TrainerError, listed
from .cli_shared import GivenPath, json_option, print_json
from .cli_tree import beside, carry_out, find_modules_in, known_plan, print_plan, store_option

_OUTPUT = "model.safetensors"
_START = "start"  # what the node is called that loads a start
_HERE = "soup train"  # where such a tree is written, for problems and for `soup store list`

OfShortForm = tuple[Mapping[str, Any], Mapping[str, str]]
"""Options of a trainer, and what each of them is called on the command line."""


def _names(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """For the shell: trainers whose names begin so."""
    from ..trees.trainer import trainer_names

    return [name for name in trainer_names() if name.startswith(begun)]


def _settings_option(command: Any) -> Any:
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="OPTION=VALUE",
        help="An option of the trainer, its value as in a plan: lr=1e-4, evaluate=[fd-st-alex].",
    )(command)


@click.command()
@click.argument("name", required=False, metavar="TRAINER", shell_complete=_names)
@_settings_option
@click.option("--tensors", is_flag=True, help="Show what a checkpoint of it will hold.")
@json_option
def trainers(name: str | None, settings: Sequence[str], tensors: bool, as_json: bool) -> None:
    """List the trainers, or describe one: options, defaults, ranges.

    \b
    soup trainers command
    """  # noqa: D301
    from ..trees import trainer_options

    if name is None:
        if tensors or settings:
            raise click.UsageError(f"{'--tensors' if tensors else '--set'} needs a TRAINER")
        rows = trainer_options.describe_all()
        if as_json:
            print_json(rows)
            return
        from .show import show_trainers

        show_trainers(rows)
        return
    if settings and not tensors:
        raise click.UsageError("--set is for --tensors")
    from ..trees.trainer import get_trainer

    find_modules_in(Path.cwd())
    trainer = get_trainer(name)
    if not tensors:
        told = trainer_options.describe(trainer)
        if as_json:
            print_json(told)
            return
        from .show import show_trainer

        show_trainer(told)
        return
    from ..files.inspection import summarize
    from ..trees.keys import trainer_of
    from ..trees.trainer import trainer_buffers

    _, options = trainer_of(_training(name, settings, ({}, {}), None))
    checkpoint = trainer_options.written(trainer, options)
    buffers = trainer_buffers(trainer, options)
    if as_json:
        print_json({"trainer": name, **trainer_options.contents(checkpoint, buffers)})
        return
    from .show import show_written

    show_written(summarize(checkpoint, buffers))


def training_command(function: Callable[..., OfShortForm]) -> Any:
    """For a command that trains one model: all that `soup train` takes and does.

    Args:
        function: gets the trainer's name and whatever else its own command takes, and returns
            options of the trainer, and what each of them is called on the command line.
    """

    @functools.wraps(function)
    def command(trainer: str, settings: Sequence[str], **words: Any) -> None:
        shared = {name: words.pop(name) for name in _SHARED}
        find_modules_in(Path.cwd())
        _train(trainer, settings, function(trainer, **words), **shared)

    for option in reversed((
        click.argument("trainer", shell_complete=_names),
        click.option(
            "-o", "--output", metavar="OUT", type=GivenPath(), default=_OUTPUT, show_default=True,
            help="A .safetensors file; or a folder, where the start is a model folder.",
        ),
        click.option(
            "--start", metavar="CHECKPOINT", type=GivenPath(),
            help="What it begins with.  [default: the trainer initialises all]",
        ),
        _settings_option,
        click.option(
            "--seed", type=int, metavar="N",
            help="For everything random.  [default: one that the trainer's name gives]",
        ),
        store_option,
        click.option("--dry-run", is_flag=True, help="Check, and say what would be done."),
        click.option("--force", is_flag=True, help="Replace an existing output."),
        json_option,
        click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    )):  # fmt: skip
        command = option(command)
    return command


_SHARED = ("output", "start", "seed", "folder", "dry_run", "force", "as_json", "quiet")


@click.command(no_args_is_help=True)
@training_command
def train(trainer: str) -> OfShortForm:
    """Train one model; run it again after any interruption, and it goes on.

    `soup trainers TRAINER` has the options for --set; paths are relative to the current folder.

    \b
    soup train command -o out.safetensors --set 'command=python train.py --out {output}'
    """  # noqa: D301
    return {}, {}


def _train(
    trainer: str, settings: Sequence[str], short: OfShortForm, *, output: str, start: str | None,
    seed: int | None, folder: str, dry_run: bool, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Carry out a plan of one leaf."""

    def read() -> tuple[Any, list[str]]:
        return _tree(trainer, _training(trainer, settings, short, seed), start), []

    if dry_run:
        checked, _ = known_plan(*read(), folder)
        print_plan(checked, as_json=as_json)
        checked.raise_problems()
        return
    carry_out(
        read, output, folder, shown=beside(output, output), force=force, quiet=quiet,
        as_json=as_json,
    )  # fmt: skip


def _tree(trainer: str, training: Any, start: str | None) -> Any:
    """The tree of a single model, whose name decides the seed, and so may not be the output's."""
    from ..trees.operations import Builder, FineTune, Load, Train

    name = trainer.rpartition(":")[2]
    builder = Builder()
    builder.place = _HERE
    if start is None:
        return builder.tree(builder.add(name, Train(training)))
    loaded = builder.add(_START, Load(Path(start)))
    return builder.tree(builder.add(builder.free_name(name), FineTune(training), [loaded]))


def _training(
    name: str, settings: Sequence[str], short: OfShortForm, seed: int | None
) -> Any:  # fmt: skip
    """A training from `--set` and what a short form says, checked.

    Raises:
        SoupError: told by the word of the command line that is at fault.
    """
    from ..trees.trainer import get_trainer
    from ..trees.trainer_options import needed
    from ..trees.tree_yaml import key_at_fault, training_from

    trainer = get_trainer(name)
    options, called = short
    own = _set(name, settings)
    given = {**options, **own}
    with_it = {"trainer": name, **({} if seed is None else {"seed": seed})}

    def make(given: Mapping[str, Any]) -> Any:
        return training_from({**given, **with_it}, Path())

    try:
        return make(given)
    except SoupError as error:
        at_fault = key_at_fault(make, given, error)
        if at_fault is not None:
            word = f"--set {at_fault}" if at_fault in own else called[at_fault]
            raise TrainerError(*(f"{word}: {line}" for line in error.args)) from None
        missing = [option for option in needed(trainer) if option not in given]
        if not missing:
            raise
        wanted = listed([f"--set {option}=…" for option in missing])
        raise TrainerError(f"the trainer {name!r} needs {wanted}") from None


def _set(trainer: str, settings: Sequence[str]) -> dict[str, Any]:
    """What `--set` says, read as a plan's values are; a command's words as a shell has them."""
    from ..files.yaml_text import parse_yaml
    from ..trees.trainer import COMMAND
    from ..trees.tree_yaml import RESERVED

    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ParameterError(f"--set has {setting!r}, but must be OPTION=VALUE")
        if name in RESERVED:
            instead = " (--seed N gives the seed)" if name == "seed" else ""
            raise ParameterError(f"--set {name}: the trainer has no such option{instead}")
        if trainer == COMMAND == name and not text.lstrip().startswith("["):
            try:
                found[name] = shlex.split(text)
            except ValueError as error:
                raise ParameterError(
                    f"--set {name}: {text!r} is no command: {str(error).lower()}"
                ) from None
            continue
        found[name] = parse_yaml(text, f"--set {name}").content
    return found
