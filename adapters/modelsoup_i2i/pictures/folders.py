"""Two folders of pictures, and subsets of them; without torch."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modelsoup import ParameterError, counted, listed, nearest

from .hdf5 import SUFFIXES as HDF5
from .hdf5 import Row, find_rows, names_in
from .images import SUFFIXES as IMAGES
from .images import left_out, list_images, natural
from .picture import SIDES, Half, Member, Picture


@dataclass(frozen=True)
class Domains:
    """The training images of both domains, in order, as they are used.

    Attributes:
        a: images of X, the rich domain where one is.
        b: images of Y.
    """

    a: tuple[Picture, ...]
    b: tuple[Picture, ...]

    @property
    def length(self) -> int:
        """Images of each domain in an epoch: that of the larger domain."""
        return max(len(self.a), len(self.b))


def folders_of(
    data: Path | None, data_a: Path | None, data_b: Path | None, part: str = "train"
) -> tuple[Path, Path]:
    """The folders of both domains: `trainA` and `trainB` of one folder, or any two.

    Raises:
        ParameterError: neither or both are given, or there are no such folders.
    """
    if (data is None) == (data_a is None and data_b is None) or (data_a is None) != (
        data_b is None
    ):
        raise ParameterError(
            "the data are either one folder (data, with trainA and trainB in it) or two (data_a "
            "and data_b)"
        )
    if data is None:
        assert data_a is not None and data_b is not None
        return data_a, data_b
    root = data
    if not root.is_dir():
        raise ParameterError(f"there is no folder {root.absolute()}")
    places = root / f"{part}A", root / f"{part}B"
    for place in places:
        if not place.is_dir():
            there = sorted(p.name for p in root.iterdir() if p.is_dir())
            has = f"it has {', '.join(there[:5])}" if there else "it has no folders"
            raise ParameterError(f"{root} has no folder {place.name} ({has})")
    return places


def halves_in(data: Path | None, part: str = "train") -> tuple[Path] | None:
    """The folder of pictures that are two side by side, `train` in `data`; None if there is none.

    Raises:
        ParameterError: there are `trainA` or `trainB` too.
    """
    if data is None or not (data / part).is_dir():
        return None
    for other in (f"{part}A", f"{part}B"):
        if (data / other).is_dir():
            raise ParameterError(
                f"{data} has {part}, of pictures side by side, and {other} too: data_a and data_b, "
                f"or another folder, say which are meant"
            )
    return (data / part,)


def find_pairs(folders: tuple[Path, Path]) -> Domains:
    """The pictures of two folders that have the same names, whatever their suffixes; in one order.

    Raises:
        ParameterError: a folder has fewer than two pictures, two of one name, or one whose name the
            other folder lacks.
        ImageError: a folder is missing.
    """
    of_name: list[dict[str, Path]] = []
    for folder in folders:
        named: dict[str, Path] = {}
        for file in _found(folder):
            name = file.relative_to(folder).with_suffix("").as_posix()
            if name in named:
                raise ParameterError(
                    f"{folder} has {named[name].name} and {file.name}, where a pair has one "
                    f"picture of a name in each folder"
                )
            named[name] = file
        of_name.append(named)
    for own, other, lacking in zip(of_name, of_name[::-1], folders[::-1], strict=True):
        alone = [file for name, file in own.items() if name not in other]
        if alone:
            raise ParameterError(
                f"{len(alone)} of {len(own)} pictures have no partner of their name in {lacking}: "
                f"{listed(list(map(str, alone)), 3)}"
            )
    first, second = of_name
    return Domains(tuple(first.values()), tuple(second[name] for name in first))


def find_halves(folder: Path) -> Domains:
    """Both halves of each picture of a folder, where two are side by side.

    Raises:
        ParameterError: the folder has fewer than two.
        ImageError: it is missing.
    """
    files = _found(folder)
    left, right = (tuple(Half(file, side) for file in files) for side in SIDES)
    return Domains(left, right)


Classes = Path | Mapping[str, Path]
"""A folder of folders or an HDF5 file; or the folder of each class."""


@dataclass(frozen=True)
class ClassSet:
    """Pictures of classes, class by class.

    Attributes:
        names: of the classes; a picture's label is a place here.
        pictures: of all of them.
    """

    names: tuple[str, ...]
    pictures: tuple[Member | Row, ...]

    def counts(self) -> dict[str, int]:
        """How many pictures each class has."""
        found = [0] * len(self.names)
        for picture in self.pictures:
            found[picture.label] += 1
        return dict(zip(self.names, found, strict=True))

    def in_order(self, names: Sequence[str]) -> ClassSet:
        """The same, with the indices that classes have among others: those of training, say."""
        where = [names.index(name) for name in self.names]
        pictures = tuple(replace(own, label=where[own.label]) for own in self.pictures)
        return ClassSet(tuple(names), pictures)

    def of_each(self) -> dict[str, list[Picture]]:
        """The pictures of each class."""
        found: dict[str, list[Picture]] = {name: [] for name in self.names}
        for picture in self.pictures:
            found[self.names[picture.label]].append(picture)
        return found


@dataclass(frozen=True)
class Division:
    """Which pictures of a class are trained on, and which are held out to test on.

    Both are drawn, with one seed, and apart: tests from one end of one order, training from the
    other. So neither changes with how much the other takes, and fewer are among more.

    Attributes:
        per_class: how many of each class are trained on; None takes all that are not held out.
        fraction: in its place, that share of those, rounded up.
        test_per_class: how many of each class are held out, or what `per_class` leaves, if that is
            less.
        test_share: in its place, that share of each, rounded, but one at least.
        least: how many of a class must be left to train on.
        seed: of the order.
    """

    per_class: int | None = None
    fraction: float | None = None
    test_per_class: int | None = None
    test_share: float | None = None
    least: int = 2
    seed: int = 0

    def of(self, count: int, called: str) -> dict[str, Sequence[int]]:
        """The places among the pictures of a class of each part, `train` and `test`.

        What is trained on keeps its order; tests are in the order in which they were drawn.

        Raises:
            ParameterError: there are too few; `called` is what the message calls the class.
        """
        if self.per_class is not None and self.per_class > count:
            raise ParameterError(
                f"per_class is {self.per_class}, but {called} has {counted(count, 'image')}"
            )
        if self.test_share is not None:
            wanted = max(1, _rounded(count * self.test_share))
        else:
            wanted = self.test_per_class or 0
        held = min(wanted, count - (self.least if self.per_class is None else self.per_class))
        if wanted and held < 1:
            raise ParameterError(
                f"{called} has {counted(count, 'image')}, and training takes all of them: none is "
                f"left to test on"
            )
        kept = count - held
        if self.per_class is not None:
            trained = self.per_class
        elif self.fraction is not None:  # 0.1 · 710 must be 71, and is more in binary fractions
            trained = max(self.least, math.ceil(kept * self.fraction - 1e-9))
        else:
            trained = kept
        order = _drawn(count, self.seed)
        return {"train": sorted(order[:trained]), "test": order[kept:][::-1]}


def find_classes(
    data: Classes, *, only: Sequence[str] = (), exclude: Sequence[str] = (),
    division: Division | None = None, part: str = "train", channels: int | None = None,
) -> ClassSet:  # fmt: skip
    """The pictures of a folder with a folder for each class, of an HDF5 file, or of some folders.

    Classes of folders are in natural order, and whatever lies below one is of it.

    Args:
        data: the folder or file; or the folder of each class.
        only: the classes that are wanted; all where there are none.
        exclude: of those, the classes that are not.
        division: which pictures of each are taken for which part; None trains on all.
        part: which part of them is wanted, `train` or `test`.
        channels: that those of an HDF5 file are to have; None: whatever they are.

    Raises:
        ParameterError: there are no classes, one has too few pictures, or one that is named is not
            there; or an HDF5 file is no such, or has other channels.
        ImageError: a folder is missing.
    """
    division = division or Division()
    of_class: dict[str, list[Path | Row]]
    if isinstance(data, Path) and data.suffix.lower() in HDF5:
        names, rows = find_rows(data, channels)
        of_class = {name: [] for name in names}
        for row in rows:
            of_class[names[row.label]].append(row)
    else:
        of_class = {name: [*list_images(own)] for name, own in _class_folders(data).items()}
    kept = _kept(data, list(of_class), only, exclude)
    pictures: list[Member | Row] = []
    for label, name in enumerate(kept):
        own, called = of_class[name], f"the class {name!r} of {_told(data)}"
        if len(own) < max(1, division.least):
            has = "one image" if own else "no images"
            more = "two or more" if division.least > 1 else "one or more"
            raise ParameterError(f"{called} has {has}, where {more} must be")
        places = division.of(len(own), called)[part]
        pictures += [_labelled(own[place], label) for place in places]
    return ClassSet(tuple(kept), tuple(pictures))


def class_names(
    data: Classes, only: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[str, ...]:
    """The names that `find_classes` gives, of a folder without a look at its pictures.

    Raises:
        ParameterError: there are no classes, or one that is named is not there.
    """
    if isinstance(data, Path) and data.suffix.lower() in HDF5:
        return tuple(_kept(data, names_in(data), only, exclude))
    return tuple(_kept(data, list(_class_folders(data)), only, exclude))


def in_no_class(data: Path) -> list[Path]:
    """The pictures that lie beside the folders of classes; of an HDF5 file none."""
    if not data.is_dir():
        return []
    return [
        path for path in sorted(data.iterdir())
        if path.suffix.lower() in IMAGES and path.name[0] != "." and path.is_file()
    ]  # fmt: skip


def _class_folders(root: Classes) -> dict[str, Path]:
    """The folder of each class."""
    if not isinstance(root, Path):
        return dict(root)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise ParameterError(
            f"{root} {what}, where a folder of classes or an HDF5 file is expected"
        )
    folders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    if not folders:
        raise ParameterError(f"{root} has no folders, of which each would be a class")
    return {own.name: own for own in sorted(folders, key=lambda folder: natural(folder.name))}


def _told(data: Classes) -> str:
    """What errors call it."""
    return str(data) if isinstance(data, Path) else " and ".join(map(str, data.values()))


def _kept(
    data: Classes, names: Sequence[str], only: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    for name in (*only, *exclude):
        if name not in names:
            raise ParameterError(f"{_told(data)} has no class {name!r}{nearest(name, names)}")
    kept = [name for name in names if (name in only or not only) and name not in exclude]
    if not kept:
        raise ParameterError(
            f"exclude leaves no class of {_told(data)}: it has {listed(list(names))}"
        )
    return kept


def _labelled(picture: Path | Row, label: int) -> Member | Row:
    return Member(picture, label) if isinstance(picture, Path) else replace(picture, label=label)


def _found(folder: Path, least: int = 2) -> tuple[Path, ...]:
    """The pictures of a folder, of which there must be two, or at least one."""
    files = list_images(folder)
    if not files:
        rest = left_out(folder)
        raise ParameterError(
            f"there are no images in {folder} (PNG, JPEG, WebP, BMP or TIFF)"
            + ("" if rest is None else f": there are {rest}")
        )
    if len(files) < least:
        raise ParameterError(
            f"{folder} has one image, where a domain must have two or more to be learnt"
        )
    return tuple(files)


def subset_size(rich: int, imbalance: float) -> int:
    """How many images of Y make an imbalance of so many percent: round(|X| · (1 − I / 100)).

    Half is rounded up, which gives the tree paper's Table II.

    Raises:
        ParameterError: not in [0, 100).
    """
    if not 0 <= imbalance < 100:
        raise ParameterError(f"the imbalance is {imbalance} %, but must be in [0, 100)")
    return _rounded(rich * (100 - imbalance) / 100)  # 995 · 0.1 must be 99.5: percent first


def _rounded(value: float) -> int:
    """To the nearest whole number, half up; what binary fractions lack is forgiven."""
    return math.floor(value + 0.5 + 1e-9)


def choose(files: Sequence[Path], count: int, seed: int) -> tuple[Path, ...]:
    """A random subset, in its random order; a smaller one of the same seed lies within it.

    Raises:
        ParameterError: there are not that many files, or fewer than one is asked for.
    """
    if not 1 <= count <= len(files):
        raise ParameterError(
            f"a subset of {count} images is asked for, but must be of 1 to {len(files)}, all that "
            f"there are"
        )
    return tuple(files[index] for index in _drawn(len(files), seed)[:count])


def _drawn(count: int, seed: int) -> list[int]:
    # Python's shuffle is the same in all its versions, and a prefix of it is nested.
    order = list(range(count))
    random.Random(seed).shuffle(order)  # noqa: S311  # no secret
    return order


def find_domains(
    folders: tuple[Path, Path], *, imbalance: float | None = None, count_b: int | None = None,
    seed: int = 0, least: int = 2,
) -> Domains:  # fmt: skip
    """The images of both folders, Y cut down to a subset where that is asked for.

    Raises:
        ParameterError: a folder without images, with a single one, or with too few for the subset.
        ImageError: a folder is missing.
    """
    a, b = (_found(folder, least) for folder in folders)
    if imbalance is not None:
        count_b = subset_size(len(a), imbalance)
        if count_b > len(b):
            raise ParameterError(
                f"an imbalance of {imbalance:g} % beside the {len(a)} images of {folders[0]} wants "
                f"{count_b} images, but {folders[1]} has {len(b)}"
            )
    if count_b is not None:
        if not least <= count_b <= len(b):
            raise ParameterError(
                f"a subset of {count_b} images of {folders[1]} is asked for, but must be of "
                f"{least} to {len(b)}, the images that there are"
            )
        b = choose(b, count_b, seed)
    return Domains(a, b)
