"""Use a model: translate a picture, a folder, or a list of arrays; export a generator to ONNX."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from modelsoup import (
    MismatchError,
    OutputError,
    ParameterError,
    SoupError,
    TrainerError,
    check_output,
    digest_file,
    how_to_install,
    placed,
)

from ..networks.devices import chosen_device
from ..pictures.draws import Classes
from ..pictures.images import left_out, read_image, save_picture
from .classes import CLASSES
from .generators import find, load_model
from .models import ALL, Model, Wanted
from .places import Way, translations
from .references import References, references_in
from .translator import Style

Progress = Callable[[int, int], None]
Say = Callable[[str], None]

_SMALLEST, _LARGEST = 16, 8192  # sides of what an exported generator takes
_LONGEST = 200  # bytes of a class's name, beside which a folder's may have some more

Part = Literal["translation", "style", "style-of-noise"]
"""What of a model is exported."""
_MAKES = {"style": "styles of pictures", "style-of-noise": "styles of noise"}

# Warns, for each operation of torchvision's, that it is not there; no network here has one.
_TORCHVISION_ASIDE = "torch.onnx._internal.exporter._registration"


def translate(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    direction: str = "x2y",
    classes: str | Sequence[str] | None = None,
    samples: int = 1,
    seed: int = 0,
    reference: str | os.PathLike[str] | None = None,
    references: int = 1,
    k_shot: int = 1,
    batch: int = 8,
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> list[Path]:
    """Translate a picture, or all of a folder and its sub-folders.

    Any size: the sides are padded by reflection to multiples of what the generator wants, such as
    four, and cut back; of a model of one size, the middle of each picture is brought to it. Names
    are kept, their suffix becomes `.png`; pictures are grey, RGB or RGB with opacity as the model's
    are, and of 16 bits where the file is. Those of other channels stay of their kind: `.npy`,
    `.npz`, or TIFF with a page for each. Only one batch is in memory. Pictures are put in place
    when all are made, so that a failure leaves no part of them.

    Args:
        model: a checkpoint with the networks of a trainer that translates: `G_A.*`, `G_B.*`, `G.*`,
            or `E.*`, `A.*` and `G.*`.
        source: a picture, or a folder.
        output: for a picture a `.png` file, or a folder that exists; for a folder a folder.
        direction: `x2y` or `y2x`; a model of one generator has one way, whichever is named.
        classes: of a model of classes, which one; or a list, or `all`, each of which becomes a
            folder in the output. A class that is itself called `all` is named in a list.
        samples: of a model that takes noise, so many of each picture; of several, `-1` and so on
            follow the names.
        seed: of the noise, which else depends on a picture's name below the source; likewise of
            which references it gets.
        reference: of a model that makes pictures look like others, such a picture, or a folder of
            them; where that has folders called like the classes, those.
        references: so many of each picture, each like another one of these.
        k_shot: the mean of so many of these in the place of one.
        batch: how many neighbours of one size are translated at a time.
        device: where, as torch names it; `auto` is a GPU where there is one.
        force: replace pictures that exist.
        progress: is told how many are done, and of how many.
        say: is told which pictures are left out, if any.

    Returns:
        the files that were written.

    Raises:
        ParameterError: a batch below 1, a device that is not there, a folder without images, or a
            class that is lacking, unknown, or named though there are none.
        OutputError: an output exists, or two pictures would have one name.
        ImageError: a picture cannot be read.
        MismatchError: the model has no such generator, or none of pictures.
    """
    source, output = Path(source), Path(output)
    own = _loaded(model, direction, batch, device)
    like, samples = _like(own, reference, classes, samples, references, k_shot, seed)
    outcomes = _outcomes(own, classes, samples, seed, like)
    flat = classes is None or (isinstance(classes, str) and classes != ALL)
    ways = [
        Way("" if flat else folder_of(own, label), f"-{sample + 1}" if samples > 1 else "")
        for label, sample in outcomes
    ]
    way = translations(source, output, force=force, ways=ways, channels=own.channels)
    with way as wanted:
        if source.is_dir() and (rest := left_out(source)) is not None:
            say(f"left out: {rest}")
        files = [one.source for one in wanted[:: len(ways)]]
        root = source if source.is_dir() else source.parent
        named = (
            (file.relative_to(root).as_posix(), read_image(file, own.channels, deep=True))
            for file in files
        )
        results = own.each(_wanted(own, named, outcomes, seed, like), batch)
        for done, (one, result) in enumerate(zip(wanted, results, strict=True), 1):
            save_picture(result, one.partial)
            if progress is not None:
                progress(done, len(wanted))
    return [one.output for one in wanted]


def translated_arrays(
    model: str | os.PathLike[str],
    pictures: Iterable[np.ndarray],
    *,
    direction: str = "x2y",
    classes: str | Sequence[str] | None = None,
    samples: int = 1,
    seed: int = 0,
    reference: Looks | None = None,
    k_shot: int = 1,
    batch: int = 8,
    device: str = "auto",
) -> Iterator[np.ndarray]:
    """uint8 or uint16, height × width × 3, in and out, in order; nothing is saved.

    One batch is in memory. Of a model of other channels, it is height × width × so many. Of a
    picture come its classes, and of each class its samples, one after the other: see `translate`.
    The noise depends on the seed and the picture's place, from 0. A reference may be an array too,
    or a list of such; then `samples` says how many of each picture are made.
    """
    own = _loaded(model, direction, batch, device)
    several = 1 if reference is None else samples
    like, _ = _like(own, reference, classes, 1, several, k_shot, seed)
    outcomes = _outcomes(own, classes, samples, seed, like)

    def named() -> Iterator[tuple[str, np.ndarray]]:
        for place, picture in enumerate(pictures):
            if picture.shape[2] != own.channels:
                raise ParameterError(
                    f"a picture has {picture.shape[2]} channels, where {model} translates such of "
                    f"{own.channels}"
                )
            yield str(place), picture

    yield from own.each(_wanted(own, named(), outcomes, seed, like), batch)


def translate_arrays(
    model: str | os.PathLike[str],
    pictures: Sequence[np.ndarray],
    *,
    direction: str = "x2y",
    classes: str | Sequence[str] | None = None,
    samples: int = 1,
    seed: int = 0,
    reference: Looks | None = None,
    k_shot: int = 1,
    device: str = "cpu",
) -> list[np.ndarray]:
    """The same, all in memory."""
    return list(
        translated_arrays(
            model, pictures, direction=direction, classes=classes, samples=samples, seed=seed,
            reference=reference, k_shot=k_shot, device=device,
        )
    )  # fmt: skip


def export_onnx(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    direction: str = "x2y",
    size: int | None = None,
    batch: int | None = None,
    part: Part = "translation",
    force: bool = False,
) -> Path:
    """Write a generator or a translator as ONNX; or what makes its styles.

    Its inputs are `image`, N × C × H × W in [−1, 1], where it sees one; then what it takes: noise
    `z`, N × so many numbers, and `class`, the N indices of classes, int64; or `style`, N × so many
    numbers. Those the parts `style` make of `image`, and `style-of-noise` of `z`, both with `class`
    where there are some. Its output, of the same
    kind as `image`, is `translation`, or `picture` where it sees none. C is the model's, usually 3.
    N is free unless `batch` is given, H and W unless `size` is or the model has one; they must be
    multiples of what the generator wants, such as four. The file's metadata name the checkpoint,
    its XXH3-128, and the direction or the classes.

    Raises:
        ParameterError: the size is no such multiple, below 16, or not the model's.
        MismatchError: there is no such part.
        OutputError: the output exists, does not end in `.onnx`, or cannot be written.
        SoupError: onnx or onnxscript is not installed.
    """
    output = Path(output)
    if batch is not None and batch < 1:
        raise ParameterError(f"batch is {batch}, where at least 1 is expected")
    if output.suffix != ".onnx":
        raise OutputError(f"the output {output} must end in .onnx")
    check_output(output, force=force, kind="file")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SoupError(f"exporting needs {how_to_install('onnx')} ({error})") from error
    own = load_model(str(model), direction)
    # Of batch 2 where it is free: the exporter would take a size of 1 for a constant.
    count = batch or 2
    of_batch: dict[int, Any] = {} if batch is not None else {0: torch.export.Dim("batch")}
    inputs: dict[str, tuple[torch.Tensor, dict[int, Any]]] = {}
    module, made = _part(own, part)
    if own.how.source is not None and part != "style-of-noise":
        image, free = _image(own, module, size, count)
        inputs["image"] = image, of_batch | free
    elif size not in (None, own.size):
        raise ParameterError(f"size is {size}, but {own.called} makes pictures of {own.size}")
    for name, values in _beside(own, part, count).items():
        inputs[name] = torch.from_numpy(values), of_batch
    told = {} if own.how.takes else {"modelsoup.direction": direction}
    if own.how.classes:
        told = {CLASSES: json.dumps({name: n for n, name in enumerate(own.class_names)})}
    with placed(output, force=force) as partial:
        with warnings.catch_warnings(), _without(_TORCHVISION_ASIDE):
            # torch 2.13's exporter uses a name that its own pytree module calls old.
            warnings.filterwarnings("ignore", r".*treespec, LeafSpec", FutureWarning)
            # The batch is one number for all inputs, which is meant.
            warnings.filterwarnings("ignore", r"# The axis name: batch will not be used")
            program: Any = torch.onnx.export(
                module, tuple(values for values, _ in inputs.values()),
                input_names=list(inputs), output_names=[made],
                dynamo=True, dynamic_shapes=tuple(free for _, free in inputs.values()),
                verbose=False,
            )  # fmt: skip
        program.model.metadata_props.update(
            {
                "modelsoup.checkpoint": Path(model).name,
                "modelsoup.xxh3_128": digest_file(Path(model)).xxh3_128,
                **told,
            }
        )
        program.save(str(partial), external_data=False)
    return output


def _part(model: Model, part: Part) -> tuple[nn.Module, str]:
    """What is exported, and what its output is called.

    Raises:
        MismatchError: the model has no such part.
    """
    if part == "translation":
        return model.module, "picture" if model.how.source is None else "translation"
    style = model.how.style
    name = None
    if style is not None:
        name = style.of_pictures if part == "style" else style.of_noise
    if style is None or name is None:
        raise MismatchError(f"{model.called} has nothing that makes {_MAKES[part]}")
    return model.makers[name], style.name


def _beside(model: Model, part: Part, count: int) -> dict[str, np.ndarray]:
    """What a part is called with beside an image."""
    style, found = model.how.style, {}
    if part == "translation":
        for draw, values in zip(model.how.takes, model.how.given([""] * count), strict=True):
            if isinstance(draw, Style):
                found[draw.name] = np.zeros((count, draw.size), np.float32)
            else:
                found["class" if isinstance(draw, Classes) else draw.names[0]] = values
        return found
    assert style is not None
    if part == "style-of-noise":
        found["z"] = np.zeros((count, style.noise), np.float32)
    return found | ({"class": np.zeros(count, np.int64)} if style.classes else {})


def _image(
    model: Model, module: nn.Module, size: int | None, count: int
) -> tuple[torch.Tensor, dict[int, Any]]:
    """An image for an export, and which of its sides are free.

    Raises:
        ParameterError: the model does not take such a size.
    """
    multiple = int(getattr(module, "multiple", 1))
    least = max(_SMALLEST, multiple)
    if model.size is not None and size not in (None, model.size):
        raise ParameterError(f"size is {size}, but {model.called} takes pictures of {model.size}")
    size = model.size if size is None else size
    if size is not None and (size < least or size % multiple):
        raise ParameterError(
            f"size is {size}, where a multiple of {multiple} from {least} on is expected"
        )
    side = size or max(64, 2 * multiple)
    free: dict[int, Any] = {}
    if size is None:
        limits = {"min": max(_SMALLEST // multiple, 1), "max": _LARGEST // multiple}
        free = {
            axis: multiple * torch.export.Dim(name, **limits)
            for axis, name in ((2, "rows"), (3, "columns"))
        }
    return torch.zeros(count, model.channels, side, side), free


def channels_of(model: str | os.PathLike[str], direction: str = "x2y") -> int:
    """The channels of the pictures that a checkpoint's generator translates.

    Raises:
        MismatchError: there is no such generator.
    """
    return find(str(model), direction).channels


@contextmanager
def _without(name: str) -> Iterator[None]:
    """A logger tells errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


Looks = str | os.PathLike[str] | np.ndarray | Sequence[np.ndarray]
"""A picture whose look is wanted, a folder of such, or some as arrays."""

Outcome = tuple[int, int]
"""A class by its index, and which sample: what is made of a picture."""


def _loaded(model: str | os.PathLike[str], direction: str, batch: int, device: str) -> Model:
    """A model that translates pictures, on its device.

    Raises:
        MismatchError: it sees no pictures, or makes none.
    """
    must_be_batch(batch)
    place = device_called(device)
    channels_of(model, direction)
    own = load_model(str(model), direction)
    if own.how.source is None:
        raise MismatchError(
            f"{own.called} makes pictures of noise, and sees none that it could translate: soup "
            f"i2i sample has it make some"
        )
    own.to(place)
    return own


def _like(
    model: Model, reference: Looks | None, classes: str | Sequence[str] | None, samples: int,
    references: int, k_shot: int, seed: int,
) -> tuple[References | None, int]:  # fmt: skip
    """What pictures are to look like, and how many are made of each."""
    if reference is None:
        if references > 1 or k_shot > 1:
            raise ParameterError(
                "references and k_shot say how many reference pictures are looked at, of which "
                "there are none: name them (--reference)"
            )
        return None, samples
    if samples > 1:
        raise ParameterError(
            "samples are of noise: with reference pictures, references says how many are made of "
            "each picture (--references)"
        )
    if references < 1:
        raise ParameterError(f"references is {references}, where at least 1 is expected")
    labels = model.labels(classes)
    if isinstance(reference, str | os.PathLike):
        like = references_in(
            model, Path(reference), labels=labels, k_shot=k_shot, samples=references, seed=seed
        )
    else:
        several = [reference] if isinstance(reference, np.ndarray) else [*reference]
        like = References(model, several, k_shot=k_shot, samples=references, seed=seed)
    return like, references


def _outcomes(
    model: Model, classes: str | Sequence[str] | None, samples: int, seed: int,
    like: References | None,
) -> list[Outcome]:  # fmt: skip
    if samples < 1:
        raise ParameterError(f"samples is {samples}, where at least 1 is expected")
    if like is None and not model.how.has_noise and (samples > 1 or seed):
        raise ParameterError(f"{model.called} takes no noise: it makes one picture of each")
    labels = model.labels(classes) or [0]
    return [(label, sample) for label in labels for sample in range(samples)]


def _wanted(
    model: Model, named: Iterable[tuple[str, np.ndarray]], outcomes: Sequence[Outcome], seed: int,
    like: References | None,
) -> Iterator[Wanted]:  # fmt: skip
    for name, picture in named:
        seen = model.seen(picture)
        for label, sample in outcomes:
            style = None if like is None else like.style(name, sample, label)
            given = model.given([name], label, seed=seed, sample=sample, style=style)
            yield Wanted(seen, given)


def folder_of(model: Model, label: int) -> str:
    """The folder of a class, whose name comes from a file.

    Raises:
        MismatchError: it is none that a folder can have.
    """
    name = model.class_names[label]
    plain = name.isprintable() and "/" not in name and name not in ("", ".", "..")
    if not plain or len(name.encode()) > _LONGEST:
        raise MismatchError(
            f"{model.called} has the class {name!r}, after which no folder can be called: "
            f"translate to it alone"
        )
    return name


def must_be_batch(batch: int) -> None:
    """Raise a ParameterError for a batch below 1."""
    if batch < 1:
        raise ParameterError(f"batch is {batch}, where at least 1 is expected")


def device_called(name: str) -> torch.device:
    """The device of a name: see `chosen_device`.

    Raises:
        ParameterError: it is none, or not there.
    """
    try:
        return chosen_device(name)
    except TrainerError as error:
        raise ParameterError(str(error)) from None
