"""Use a model: translate a picture, a folder, or a list of arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from modelsoup import (
    MismatchError,
    ParameterError,
    TrainerError,
    nearest,
)

from ..networks.devices import chosen_device
from ..pictures.attributes import read_attributes
from ..pictures.images import left_out, read_image, save_picture
from .generators import find, load_model
from .models import ALL, Model, Wanted
from .places import Way, translations
from .references import References, references_in
from .translator import Label, Switched

Progress = Callable[[int, int], None]
Say = Callable[[str], None]

_LONGEST = 200  # bytes of a class's name, beside which a folder's may have some more


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
    attributes: str | os.PathLike[str] | None = None,
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
            folder in the output. A class that is itself called `all` is named in a list. Of a model
            of attributes those that there are to be, `Blond_Hair+Male`; `Male=0` is to be gone.
        samples: of a model that takes noise, so many of each picture; of several, `-1` and so on
            follow the names.
        seed: of the noise, which else depends on a picture's name below the source; likewise of
            which references it gets.
        reference: of a model that makes pictures look like others, such a picture, or a folder of
            them; where that has folders called like the classes, those.
        references: so many of each picture, each like another one of these.
        k_shot: the mean of so many of these in the place of one.
        attributes: of a model of attributes, a file that says which the pictures have: see
            `pictures.attributes`. What `classes` do not name stays so; without it, that is not
            there.
        batch: how many neighbours of one size are translated at a time.
        device: where, as torch names it; `auto` is a GPU where there is one.
        force: replace pictures that exist.
        progress: is told how many are done, and of how many.
        say: is told which pictures are left out, if any.

    Returns:
        the files that were written.

    Raises:
        ParameterError: a batch below 1, a device that is not there, a folder without images, or a
            class that is lacking, unknown, or named though there are none; or attributes of a model
            without, or a file of them that lacks some, or a picture.
        OutputError: an output exists, or two pictures would have one name.
        ImageError: a picture cannot be read.
        MismatchError: the model has no such generator, or none of pictures.
    """
    source, output = Path(source), Path(output)
    own = _loaded(model, direction, batch, device)
    like, samples = _like(own, reference, classes, samples, references, k_shot, seed)
    outcomes = _outcomes(own, classes, samples, seed, like)
    has = None if attributes is None else _attributes_in(own, Path(attributes))
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
        names = [file.relative_to(root).as_posix() for file in files]
        for name in names:
            if has is not None and name not in has:
                raise ParameterError(f"{attributes} says nothing of {name}{nearest(name, has)}")
        named = (
            (name, read_image(file, own.channels, deep=True))
            for name, file in zip(names, files, strict=True)
        )
        results = own.each(_wanted(own, named, outcomes, seed, like, has), batch)
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


def channels_of(model: str | os.PathLike[str], direction: str = "x2y") -> int:
    """The channels of the pictures that a checkpoint's generator translates.

    Raises:
        MismatchError: there is no such generator.
    """
    return find(str(model), direction).channels


Looks = str | os.PathLike[str] | np.ndarray | Sequence[np.ndarray]
"""A picture whose look is wanted, a folder of such, or some as arrays."""

Outcome = tuple[Label, int]
"""A class by its index, or attributes, and which sample: what is made of a picture."""


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
    labels: list[Label] = model.labels(classes) or [0]
    return [(label, sample) for label in labels for sample in range(samples)]


def _wanted(
    model: Model, named: Iterable[tuple[str, np.ndarray]], outcomes: Sequence[Outcome], seed: int,
    like: References | None, has: Mapping[str, bytes] | None = None,
) -> Iterator[Wanted]:  # fmt: skip
    for name, picture in named:
        seen = model.seen(picture)
        for label, sample in outcomes:
            style = None if like is None else like.style(name, sample, label)
            told = label
            if has is not None and isinstance(label, Switched):
                told = label.of(has[name])
            given = model.given([name], told, seed=seed, sample=sample, style=style)
            yield Wanted(seen, given)


def _attributes_in(model: Model, file: Path) -> Mapping[str, bytes]:
    """The attributes of pictures, by the model's indices.

    Raises:
        ParameterError: it knows none, or the file does not tell of all that it knows.
    """
    if not model.how.has_attributes:
        raise ParameterError(
            f"{model.called} is told a class, and no attributes that pictures could have: leave "
            f"out --attributes"
        )
    return read_attributes(file, model.class_names).of_picture


def folder_of(model: Model, label: Label) -> str:
    """The folder of a class, whose name comes from a file.

    Raises:
        MismatchError: it is none that a folder can have.
    """
    name = model.called_so(label)
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
