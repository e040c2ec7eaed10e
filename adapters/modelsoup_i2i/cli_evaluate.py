"""`soup i2i evaluate` and `fluctuation`: how good a model is, and how far it moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from modelsoup import (
    ParameterError,
    cache_folder,
    counted,
    print_json,
    printable,
)

from .cli_shared import DIRECTION, PATH, needed, say
from .measuring.metric_names import COLLAPSE, extractor_of, must_be_known, own_names


@click.command()
@click.argument("model", type=PATH, required=False)
@click.option(
    "--data", "root", type=PATH, metavar="DIR",
    help="With testA and testB in it; for a translator to classes, with a folder a class.",
)  # fmt: skip
@click.option("--test-a", type=PATH, metavar="DIR", help="In place of --data, X's test pictures …")
@click.option("--test-b", type=PATH, metavar="DIR", help="… and Y's.")
@click.option("--images", type=PATH, metavar="FAKE", help="Translations, instead of a model.")
@click.option("--against", type=PATH, metavar="REAL", help="What --images are compared with.")
@DIRECTION
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
@click.option("--inception-weights", type=PATH, metavar="PATH", help="For fid-… and kid.")
@click.option("--lpips-backbone", type=PATH, metavar="PATH", help="For lpips_….")
@click.option(
    "--extractor", type=PATH, metavar="FILE",
    help="A classifier (soup train classifier), for fd-NAME, kd-NAME, … NAME is the file's.",
)  # fmt: skip
@click.option("--classifier", type=PATH, metavar="FILE", help="Another one, for rc.")
@click.option("--train", type=PATH, metavar="DIR", help="Training pictures by class, beside fc.")
@click.option(
    "--count", type=click.IntRange(min=2), default=100, show_default=True,
    help="Of a translator to classes: outputs and real pictures of each, at most.",
)  # fmt: skip
@click.option(
    "--sources", metavar="NAME,NAME,…",
    help="Of a translator to classes: translate pictures of these alone.  [default: all]",
)  # fmt: skip
@click.option(
    "--control", is_flag=True, help="Measure its generator alone, which sees no picture, instead."
)
@click.option(
    "--by-reference", is_flag=True,
    help="Have each translation look like a picture of the target domain, not as noise says.",
)  # fmt: skip
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
    sources: str | None,
    control: bool,
    by_reference: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure a model on a set's test images, or one folder of images against another."""
    if (model is None) == (images is None):
        raise ParameterError("give either a model with --data, or --images with --against")
    names = None if metrics is None else _named(metrics)
    chosen = _named(sources or "")
    if sources is not None and not chosen:
        raise ParameterError("--sources names none: leave it out for all classes")
    with needed("i2i"):
        from .measuring.class_evaluation import evaluate_class_model, must_be_of_classes
        from .measuring.evaluation import evaluate_folders, evaluate_model, find_sets, sets_in
        from .measuring.kept import Kept
        from .pictures.images import left_out
        from .pictures.transforms import Transform
        from .use.generators import find, load_model
    of_classes = None
    asked = model is not None and (model.exists() or classifier or train or control)
    if model is not None and asked and find(model, direction).how.classes:  # by its header
        found = load_model(model, direction)
        must_be_of_classes(found)
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
        "kept": Kept(cache_folder("features"), say),
    }  # fmt: skip
    if of_classes is not None:
        if root is None:
            raise ParameterError(
                "a translator to classes is measured on test pictures of them: name their folder, "
                "in which each folder is a class, with --data"
            )
        results = evaluate_class_model(
            of_classes, root, train=train, classifier=classifier, count=count,
            sources=chosen, given=weights, **given,
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
        results = evaluate_model(
            model, sets, direction=direction, by_reference=by_reference, **weights, **given
        )
        folders = sets.folders
    else:
        if images is None or against is None:
            raise ParameterError("--images are compared with a folder: name it with --against")
        results = evaluate_folders(images, against, **weights, **given)
        folders = [images, against]
    for folder in folders:
        if (rest := left_out(folder)) is not None:
            say(f"left out: {rest}")
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


@click.command(no_args_is_help=True)
@click.argument("before", type=PATH)
@click.argument("after", type=PATH)
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
    with needed("i2i"):
        from .measuring.fluctuation import between
    found = between(before, after, samples=samples, seed=seed, device=device)
    if as_json:
        print_json({name: dataclasses.asdict(own) for name, own in found.items()})
        return
    wide = max(map(len, found))
    for name, own in found.items():
        click.echo(f"{printable(name):<{wide}} {own.sum:>12.4g}   {own.mean:.4g} a weight")


def _named(listed: str) -> list[str]:
    return [own for name in listed.split(",") if (own := name.strip())]


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
            ["root", "test_a", "test_b", "size", "direction", "real", "by_reference"],
            what != "images",
            "is for a model's inputs; --images are there already",
        ),
        (
            ["test_a", "test_b", "size", "direction", "real", "by_reference"], not by_class,
            "is for models of two domains, and this one translates to classes",
        ),
        (
            ["classifier", "train", "count", "sources"], by_class,
            "is for translators to classes; this is none",
        ),
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
