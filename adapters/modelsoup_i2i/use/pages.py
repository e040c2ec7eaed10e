"""Pages of what a model makes: its pictures in rows and columns, and what each of them is."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from modelsoup import OutputError, ParameterError, check_output, placed

from ..pictures.images import list_images, read_image
from ..pictures.sheets import grid, save
from .generators import load_model
from .models import Model, Wanted
from .translate import device_called
from .translator import Label, turned

MOST_CLASSES = 10  # of a page for which none are named
STEPS = 7  # of an interpolation
_COLUMNS = ["row", "column", "source", "class", "z"]
_MORE = ("reference", "t")
KINDS = ("classes", "references", "interpolate")

Source = tuple[str, np.ndarray]
"""A picture by its name."""


@dataclass(frozen=True)
class Page:
    """Pictures in rows of one length, to which rows are added.

    Attributes:
        titles: one a column, or none.
        rows: uint8, height × width × channels.
        tiles: of each picture, in their order: row, column, source, class, z; and where there are
            such, reference, and t, the share of the second of two that are mixed.
        labels: one a row, or none.
    """

    titles: list[str]
    rows: list[list[np.ndarray]] = field(default_factory=list)
    tiles: list[dict[str, Any]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def add(self, pictures: Sequence[np.ndarray], tiles: Iterable[dict[str, Any]]) -> None:
        """Another row, and what its pictures are."""
        row = len(self.rows)
        self.tiles.extend({"row": row, "column": n, **tile} for n, tile in enumerate(tiles))
        self.rows.append([*pictures])

    def transposed(self) -> Page:
        """The same with rows for columns."""
        tiles = [{**one, "row": one["column"], "column": one["row"]} for one in self.tiles]
        places = {(one["row"], one["column"]): one for one in tiles}
        columns = [list(own) for own in zip(*self.rows, strict=True)]
        return Page(self.labels, columns, [places[place] for place in sorted(places)], self.titles)

    def save(self, path: str | os.PathLike[str], *, model: str = "", force: bool = False) -> None:
        """Write it as PNG, and beside it a CSV that tells what each of its pictures is.

        Raises:
            OutputError: one of them exists, or cannot be written.
        """
        png = must_be_page(path, force=force)
        table = png.with_suffix(".csv")
        with placed(table, force=force) as text, placed(png, force=force) as picture:
            save(grid(self.rows, self.titles, self.labels), picture)
            more = [name for name in _MORE if any(name in tile for tile in self.tiles)]
            with text.open("w", newline="", encoding="utf-8") as file:
                told = csv.DictWriter(file, [*_COLUMNS, *more, "checkpoint"], lineterminator="\n")
                told.writeheader()
                told.writerows({**tile, "checkpoint": model} for tile in self.tiles)


def must_be_page(path: str | os.PathLike[str], *, force: bool) -> Path:
    """Check where a page and its table are to be, before they are made.

    Raises:
        OutputError: it is no `.png`, or one of them exists.
    """
    png = Path(path)
    if png.suffix.lower() != ".png":
        raise OutputError(f"the page {png} must end in .png")
    for file in (png, png.with_suffix(".csv")):
        check_output(file, force=force, kind="file")
    return png


def write_page(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    kind: str = "classes",
    data: str | os.PathLike[str] | None = None,
    sources: int = 8,
    classes: str | Sequence[str] | None = None,
    samples: int = 1,
    seed: int = 0,
    reference: str | os.PathLike[str] | None = None,
    references: int = 5,
    direction: str = "x2y",
    transpose: bool = False,
    device: str = "auto",
    force: bool = False,
) -> Page:
    """Make a page of a checkpoint's model, and write it: `.png`, and `.csv` beside it.

    Args:
        model: a checkpoint with a model of classes, or of noise.
        output: a `.png` file.
        kind: `classes`, see `by_class`; `references`, see `by_reference`; or `interpolate`, see
            `interpolated`.
        data: a picture, or a folder of them, for a model that sees pictures.
        sources: how many of these, as far apart as they lie in the order of their names.
        classes: see `Model.labels`; for `by_class` None is all, or ten of more, as far apart as
            they lie.
        samples: rows for each source, of different noise.
        seed: of the noise.
        reference: a picture, or a folder of them, that others are to look like.
        references: how many of these; or of styles of noise, where no pictures are given.
        direction: of a model of two ways, which.
        transpose: rows for columns.
        device: where, as torch names it.
        force: replace what is there.

    Raises:
        ParameterError: pictures are lacking or given in vain, or the classes are others.
        ImageError: a picture cannot be read.
        OutputError: it exists, or cannot be written.
        MismatchError: there is no such model.
    """
    if kind not in KINDS:
        raise ParameterError(f"the kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    numbers = {"sources": sources, "samples": samples, "references": references}
    for name, number in numbers.items():
        if number < 1:
            raise ParameterError(f"{name} is {number}, where at least 1 is expected")
    png, place = must_be_page(output, force=force), device_called(device)
    own = load_model(str(model), direction)
    if classes is None and kind == "classes" and own.how.classes:
        known = own.class_names
        classes = [known[n] for n in spread(len(known), MOST_CLASSES)]
    labels = own.labels(classes)
    seen = None if data is None else _read(Path(data), sources, own.channels)
    own.to(place)
    if reference is None:
        like = None
    elif kind == "classes":
        raise ParameterError("references are of the kinds references and interpolate")
    else:
        like = _read(Path(reference), references, own.channels, ends=kind == "interpolate")
    if kind == "classes":
        page = by_class(own, seen, labels, samples=samples, seed=seed)
    elif kind == "references":
        page = by_reference(own, seen, labels, like, count=references, seed=seed)
    else:
        page = interpolated(own, seen, labels, like, samples=samples, seed=seed)
    if transpose:
        page = page.transposed()
    page.save(png, model=str(model), force=force)
    return page


def by_class(
    model: Model, sources: Sequence[Source] | None, labels: Sequence[Label], *,
    samples: int = 1, seed: int = 0, own: Sequence[bytes] = (),
) -> Page:  # fmt: skip
    """A column for each class; a row for each source and sample, or for each sample alone.

    All rows of a sample have the same noise, so that what differs is the source's.

    Args:
        model: which takes a class.
        sources: names and pictures; None for a model that sees none.
        labels: indices of classes; or which attributes there are to be.
        samples: for each source.
        seed: of the noise.
        own: the attributes that each source has, where they are known, a byte for each: a column
            has them, with the one of its index turned into the opposite.

    Raises:
        ParameterError: the model takes no class, or the sources are what it does not see.
    """
    if not model.how.classes:
        raise ParameterError(f"{model.called} makes pictures of no classes")
    names = [model.called_so(label) for label in labels]
    page = Page([*([] if sources is None else ["image"]), *names])
    for (name, picture), has in zip(_seen(model, sources), own or repeat(None), strict=False):
        told_to = [turned(has, label) if has is not None and isinstance(label, int) else label
                   for label in labels]  # fmt: skip
        for sample in range(samples):
            wanted = [
                Wanted(picture, model.given([""], label, seed=seed, sample=sample))
                for label in told_to
            ]
            told = [{"source": name, "class": called, "z": sample} for called in names]
            _add(page, model, (name, picture), wanted, told)
    return page


def by_reference(
    model: Model, sources: Sequence[Source] | None, labels: Sequence[Label],
    like: Sequence[Source] | None = None, *, count: int = 5, seed: int = 0,
) -> Page:  # fmt: skip
    """A row for each source, a column for each reference picture, below which it is.

    Without pictures there is a column for each of some styles of noise.

    Args:
        model: which takes a style.
        sources: names and pictures.
        labels: the index of a class, where it takes one.
        like: reference pictures.
        count: of styles of noise, without such.
        seed: of the noise.

    Raises:
        ParameterError: it takes no style, or none of noise; or there are several classes.
    """
    if model.how.style is None:
        raise ParameterError(f"{model.called} makes no pictures that look like others")
    if len(labels) > 1:
        raise ParameterError(f"the kind references is of one class, not of {len(labels)}")
    seen, label = _seen(model, sources), labels[0] if labels else 0
    names = [model.called_so(label) for label in labels]
    if like is None:
        columns: list[tuple[dict[str, Any], np.ndarray | None]] = [
            ({"z": n}, None) for n in range(count)
        ]
    else:
        columns = [({"reference": name}, model.style_of([own], label)) for name, own in like]
    page = Page(["image", *(f"z {n}" if like is None else str(n + 1) for n in range(len(columns)))])
    if like is not None:
        shown = [model.seen(own) for _, own in like]
        page.add([np.full_like(shown[0], 255), *shown], [{}, *(tile for tile, _ in columns)])
    for name, picture in seen:
        wanted = [
            Wanted(picture, model.given([""], label, seed=seed, sample=n, style=style))
            for n, (_, style) in enumerate(columns)
        ]
        told = [{"source": name, "class": "".join(names), **tile} for tile, _ in columns]
        _add(page, model, (name, picture), wanted, told)
    return page


def interpolated(
    model: Model, sources: Sequence[Source] | None, labels: Sequence[Label],
    like: Sequence[Source] | None = None, *, samples: int = 1, seed: int = 0,
) -> Page:  # fmt: skip
    """A row for each source and sample, from one class to another by mixtures of their embeddings.

    The noise of a row is one. Of one class, or of a model without, it goes from one noise to
    another instead; or from one reference picture to another. Of a model that takes styles, those
    are mixed.

    Args:
        model: which takes noise.
        sources: names and pictures; None for a model that sees none.
        labels: indices of two classes, or of one; none for a model that takes none.
        like: two reference pictures.
        samples: for each source.
        seed: of the noise.

    Raises:
        ParameterError: the model takes no noise or embeds no classes, there are more of them, or
            the sources are what it does not see; or the references are not two.
    """
    if len(labels) > 2:
        raise ParameterError(f"an interpolation is between two classes, not {len(labels)}")
    if like is not None and (len(like) != 2 or len(labels) > 1):
        raise ParameterError(
            f"an interpolation between reference pictures is between two, of one class, not "
            f"{len(like)} of {max(len(labels), 1)}"
        )
    ends: list[np.ndarray | None] = [None, None]
    if like is not None:
        ends = [model.style_of([own], labels[0] if labels else 0) for _, own in like]
    elif len(labels) < 2 and not model.how.has_noise:
        raise ParameterError(f"{model.called} takes no noise, between two of which it could go")
    shares = [float(share) for share in np.linspace(0, 1, STEPS)]
    names = [model.called_so(label) for label in labels]
    page = Page([*([] if sources is None else ["image"]), *(f"{share:.2f}" for share in shares)])
    label = labels[0] if labels else 0
    mixes = len(labels) == 2 and model.how.style is not None  # of two classes' styles
    for name, picture in _seen(model, sources):
        for sample in range(samples):
            others = labels if mixes else (label, label)
            first, second = (
                model.given([""], of, seed=seed, sample=sample + n * (like is None and not mixes),
                            style=style)
                for n, (of, style) in enumerate(zip(others, ends, strict=True))
            )  # fmt: skip
            wanted, told = [], []
            for share in shares:
                tile: dict[str, Any] = {"source": name, "class": "…".join(names), "t": share}
                if like is not None:
                    tile["reference"] = "…".join(name for name, _ in like)
                if len(labels) == 2 and not mixes:
                    given = model.mixed(first, labels[0], labels[1], share)
                    tile["z"] = sample
                else:
                    given = [_between(a, b, share) for a, b in zip(first, second, strict=True)]
                    one_z = mixes or like is not None
                    tile["z"] = sample if one_z else f"{sample}…{sample + 1}"
                wanted.append(Wanted(picture, given))
                told.append(tile)
            _add(page, model, (name, picture), wanted, told)
    return page


def sampled(model: Model, labels: Sequence[Label], count: int, *, seed: int = 0) -> Page:
    """So many pictures of noise: a row for each class, or a square of one.

    Args:
        model: which sees no pictures.
        labels: indices of classes; none for a model that takes none.
        count: of each class.
        seed: of the noise.
    """
    width = count if len(labels) > 1 else ceil(sqrt(count))
    page = Page([])
    for label in labels or [0]:
        name = model.called_so(label) if labels else ""
        wanted = [Wanted(None, model.given([""], label, seed=seed, sample=n))
                  for n in range(count)]  # fmt: skip
        tiles = [{"class": name, "z": n} for n in range(count)]
        made = list(model.each(wanted))
        blank = np.full_like(made[0], 255)
        made += [blank] * (-count % width)
        for first in range(0, count, width):
            page.add(made[first : first + width], tiles[first : first + width])
        if len(labels) > 1:
            page.labels.append(name)
    return page


def spread(count: int, most: int) -> list[int]:
    """Places of some of so many, as far apart as they lie."""
    some = min(count, most)
    return [n * count // some for n in range(some)]


def _read(data: Path, most: int, channels: int, *, ends: bool = False) -> list[Source]:
    """Some pictures of a folder by their names in it, or the first and the last; or one picture."""
    files, root = ([data], data.parent) if data.is_file() else (list_images(data), data)
    if not files:
        raise ParameterError(f"the folder {data} holds no images")
    chosen = [files[0], files[-1]] if ends else [files[n] for n in spread(len(files), most)]
    return [(file.relative_to(root).as_posix(), read_image(file, channels)) for file in chosen]


def _seen(model: Model, sources: Sequence[Source] | None) -> list[tuple[str, np.ndarray | None]]:
    """The sources, each as the model sees it; or nothing, once.

    Raises:
        ParameterError: they are what it does not see, or lacking.
    """
    if (sources is None) != (model.how.source is None):
        wanted = "sees no pictures" if sources else "wants pictures to translate"
        raise ParameterError(f"{model.called} {wanted}")
    if sources is None:
        return [("", None)]
    return [(name, model.seen(picture)) for name, picture in sources]


def _add(
    page: Page, model: Model, source: tuple[str, np.ndarray | None], wanted: Sequence[Wanted],
    told: Sequence[dict[str, Any]],
) -> None:  # fmt: skip
    name, picture = source
    made = list(model.each(wanted))
    if picture is None:
        page.add(made, told)
    else:
        page.add([picture, *made], [{"source": name}, *told])


def _between(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """A mixture of numbers; a class's index, which is in both the same, is what it is."""
    if first.dtype != np.float32:
        return first
    mixed: np.ndarray = np.float32(1 - share) * first + np.float32(share) * second
    return mixed
