"""`soup openvino …`: each command is a few lines over the API."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelsoup import (
    GivenPath,
    ParameterError,
    SoupError,
    parse_yaml,
    print_json,
    printable,
)

if TYPE_CHECKING:
    import numpy as np

    from .trainer import OpenVinoOptions

_MINUTE = 60.0  # seconds after which progress is told again, where there is no terminal


@click.group()
def openvino() -> None:
    """INT8 models for a CPU: quantise with NNCF, train on, export to OpenVINO, run, measure."""


@openvino.command(no_args_is_help=True)
@click.argument("model", type=GivenPath(path_type=Path))
@click.option("--trainer", "of", required=True, metavar="NAME", help="Which trainer made MODEL.")
@click.option(
    "--data",
    metavar="DIR",
    type=GivenPath(),
    help="The trainer's data: calibration, training and test.",
)
@click.option("-o", "--output", required=True, metavar="OUT", type=GivenPath(path_type=Path),
              help="The folder to write.")  # fmt: skip
@click.option("--epochs", default=2, show_default=True, help="After calibration; 0 is none.")
@click.option("--rate", type=float, metavar="η", help="Learning rate of those.  [default: 1e-6]")
@click.option("--network", metavar="NAME", help="Which network, such as G_B.  [default: first]")
@click.option("--set", "training", multiple=True, metavar="NAME=VALUE",
              help="Another option of the trainer, as in a plan; repeat it.")  # fmt: skip
@click.option("--preset", type=click.Choice(["performance", "mixed"]), default="performance",
              show_default=True, help="NNCF's: symmetric or asymmetric activations.")  # fmt: skip
@click.option("--subset-size", default=300, show_default=True, help="Calibration images, ≤ 300.")
@click.option("--weights", type=click.Choice(["symmetric", "asymmetric"]), help="Their mode.")
@click.option("--activations", type=click.Choice(["symmetric", "asymmetric"]), help="Their mode.")
@click.option("--per-channel/--per-tensor", default=True, show_default=True,
              help="Scales of weights.")  # fmt: skip
@click.option("--overflow-fix", type=click.Choice(["first_layer_only", "enable", "disable"]),
              default="first_layer_only", show_default=True,
              help="Which weights use half of the range, for CPUs without VNNI.")  # fmt: skip
@click.option("--accurate-bias-correction", is_flag=True, help="NNCF's slower way.")
@click.option("--ignore", multiple=True, metavar="NAME",
              help="A layer (model.26) or operation that stays float; repeat it.")  # fmt: skip
@click.option("--ignore-pattern", multiple=True, metavar="REGEX", help="NNCF's names by pattern.")
@click.option("--ignore-type", multiple=True, metavar="TYPE", help="Types of operations.")
@click.option("--held-out", default=64, show_default=True, help="Images to compare on, at most.")
@click.option("--rounds", default=20, show_default=True, help="Of measuring speed; 0 is none.")
@click.option("--quality", multiple=True, metavar="METRIC",
              help="A metric of the trainer's, before and after; repeat it.")  # fmt: skip
@click.option("--pictures", is_flag=True, help="Write all held-out images, for metrics.")
@click.option("--seed", default=0, show_default=True, help="Of the training.")
@click.option("--force", is_flag=True, help="Replace OUT, if an earlier run wrote it.")
@click.option("--json", "as_json", is_flag=True, help="Print the report.")
def quantize(
    model: Path, of: str, data: str | None, output: Path, epochs: int, rate: float | None,
    network: str | None, training: tuple[str, ...], preset: str, subset_size: int,
    weights: str | None, activations: str | None, per_channel: bool, overflow_fix: str,
    accurate_bias_correction: bool, ignore: tuple[str, ...], ignore_pattern: tuple[str, ...],
    ignore_type: tuple[str, ...], held_out: int, rounds: int, pictures: bool,
    quality: tuple[str, ...], seed: int, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Quantise a deployed network of MODEL to INT8, train on, and write a folder for a device.

    A run that was interrupted is gone on with by the same command.
    """
    from .deliver import PAGE
    from .place import must_be_free
    from .qat import BEGUN
    from .trainer import quantise_to

    given: dict[str, Any] = {
        "of": of, "out": str(output), "epochs": epochs, "network": network,
        "training": _training(data, training), "held_out": held_out, "rounds": rounds,
        "pictures": pictures, "quality": quality,
        "quantisation": {
            "preset": preset, "subset_size": subset_size, "weights": weights,
            "activations": activations, "per_channel": per_channel, "overflow_fix": overflow_fix,
            "fast_bias_correction": not accurate_bias_correction, "ignored_names": ignore,
            "ignored_patterns": ignore_pattern, "ignored_types": ignore_type,
        },
    }  # fmt: skip
    if rate is not None:
        given["rate"] = rate
    options = _options(given)
    if not model.exists():
        raise ParameterError(f"there is no checkpoint {model}")
    output = output.absolute()
    must_be_free(output, force=force)
    work = output.with_name(f".{output.name}.unfinished")
    work.mkdir(exist_ok=True)
    try:
        told = quantise_to(
            options, model, output, seed=seed, frozen=(), work=work, report=_progress(), log=_say,
            force=force,
        )  # fmt: skip
    except SoupError:
        if not (work / BEGUN).exists():  # nothing was computed that could be gone on with
            shutil.rmtree(work)
        raise
    shutil.rmtree(work)
    if as_json:
        print_json(told)
    else:
        click.echo((output / PAGE).read_text("utf-8"))


@openvino.command(no_args_is_help=True)
@click.argument("model", type=GivenPath(path_type=Path))
@click.argument("source", metavar="IN", type=GivenPath(path_type=Path))
@click.argument("target", metavar="OUT", type=GivenPath(path_type=Path))
@click.option("--class", "of_class", metavar="NAME", help="Which class the pictures become.")
@click.option("--z-seed", "seed", type=click.IntRange(0), default=0, show_default=True,
              help="Of the noise, as soup i2i translate draws it.")  # fmt: skip
@click.option("--given", multiple=True, metavar="NAME=FILE.npy",
              help="What else MODEL takes, such as a style; repeat it.")  # fmt: skip
@click.option("--precision", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True,
              help="Of what is not INT8.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace what is there.")
def run(
    model: Path, source: Path, target: Path, of_class: str | None, seed: int,
    given: tuple[str, ...], precision: str, force: bool,
) -> None:  # fmt: skip
    """Translate an image, or a folder of them, with an exported MODEL.xml; torch is not needed."""
    from modelsoup_i2i.pictures.images import left_out

    from .infer import translate

    if source.is_dir() and (rest := left_out(source)) is not None:
        _say(f"left out: {rest}")
    show = _progress()
    for written in translate(
        model, source, target, force=force, precision=precision, of_class=of_class, seed=seed,
        arrays=_arrays(given), progress=lambda done, of: show(done / of, {}),
    ):  # fmt: skip
        click.echo(printable(str(written)))


@openvino.command(no_args_is_help=True)
@click.argument("model", type=GivenPath(path_type=Path))
@click.option("--against", type=GivenPath(path_type=Path), metavar="XML",
              help="Another model that takes turns with it.")  # fmt: skip
@click.option("--rounds", default=20, show_default=True, help="That count.")
@click.option(
    "--size", type=int, metavar="PIXELS", help="Side of the image.  [default: as exported]"
)
@click.option("--json", "as_json", is_flag=True, help="Print figures for programs.")
def bench(model: Path, against: Path | None, rounds: int, size: int | None, as_json: bool) -> None:
    """Latency, throughput, one thread and memory of an exported MODEL.xml on this machine."""
    from .benchmark import measured, table

    if rounds < 1 or (size is not None and size < 1):
        raise ParameterError("rounds and size must be at least 1")
    told = measured([model] if against is None else [model, against], rounds, size)
    if as_json:
        print_json(told)
    else:
        click.echo(table(told))


def _options(given: Mapping[str, Any]) -> OpenVinoOptions:
    from modelsoup import build_options

    from .trainer import OpenVinoQat

    options: OpenVinoOptions = build_options(OpenVinoQat(), given)
    return options


def _training(data: str | None, pairs: tuple[str, ...]) -> dict[str, Any]:
    """`--set`, read as a plan's values are."""
    found: dict[str, Any] = {} if data is None else {"data": data}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ParameterError(f"--set {pair} must be NAME=VALUE")
        found[name] = parse_yaml(text, f"--set {name}").content
    return found


def _arrays(pairs: tuple[str, ...]) -> dict[str, np.ndarray]:
    """`--given`: arrays of numbers, each from a file of its own; no pickle."""
    import numpy as np

    found = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or not name or not file:
            raise ParameterError(f"--given {pair} must be NAME=FILE.npy")
        if not Path(file).is_file():  # to open a pipe would wait for who writes to it
            raise ParameterError(f"there is no file {file} with the array {name!r}")
        try:
            values = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ParameterError(f"{file} is no array as numpy.save writes one: {error}") from error
        numbers = isinstance(values, np.ndarray) and values.dtype.kind in "fiu"
        if not numbers or not np.isfinite(values).all():
            raise ParameterError(f"{file} holds something else than finite numbers")
        found[name] = values
    return found


def _say(line: str) -> None:
    click.echo(printable(line), err=True)


def _progress() -> Callable[[float | None, Mapping[str, float]], None]:
    """A line that changes on a terminal, elsewhere one a minute."""
    told = time.monotonic()

    def show(done: float | None, figures: Mapping[str, float]) -> None:
        nonlocal told
        is_due = time.monotonic() - told >= _MINUTE
        if done is None or not (os.isatty(2) or is_due):
            return
        told = time.monotonic()
        left = figures.get("seconds_left")
        line = f"{done:6.1%}" + ("" if left is None else f", {left:.0f} s left")
        if os.isatty(2):
            click.echo(f"\r{line}   ", err=True, nl=done >= 1)
        else:
            click.echo(line, err=True)

    return show
