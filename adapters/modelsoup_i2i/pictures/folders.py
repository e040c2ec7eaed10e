"""Two folders of pictures, and subsets of them; without torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelsoup import ParameterError

from .images import left_out, list_images
from .picture import SIDES, Half, Picture


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
                f"{', '.join(map(str, alone[:3]))}{', …' if len(alone) > 3 else ''}"
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


def _found(folder: Path) -> tuple[Path, ...]:
    """The pictures of a folder, of which there must be two."""
    files = list_images(folder)
    if not files:
        rest = left_out(folder)
        raise ParameterError(
            f"there are no images in {folder} (PNG, JPEG, WebP, BMP or TIFF)"
            + ("" if rest is None else f": there are {rest}")
        )
    if len(files) == 1:
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
    # 995 · 0.1 must be 99.5: percent first, and what binary fractions lack is forgiven.
    return math.floor(rich * (100 - imbalance) / 100 + 0.5 + 1e-9)


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
    # Python's shuffle is the same in all its versions, and a prefix of it is nested.
    order = list(range(len(files)))
    random.Random(seed).shuffle(order)  # noqa: S311  # no secret
    return tuple(files[index] for index in order[:count])


def find_domains(
    folders: tuple[Path, Path], *, imbalance: float | None = None, count_b: int | None = None,
    seed: int = 0,
) -> Domains:  # fmt: skip
    """The images of both folders, Y cut down to a subset where that is asked for.

    Raises:
        ParameterError: a folder without images, with a single one, or with too few for the subset.
        ImageError: a folder is missing.
    """
    a, b = (_found(folder) for folder in folders)
    if imbalance is not None:
        count_b = subset_size(len(a), imbalance)
        if count_b > len(b):
            raise ParameterError(
                f"an imbalance of {imbalance:g} % beside the {len(a)} images of {folders[0]} wants "
                f"{count_b} images, but {folders[1]} has {len(b)}"
            )
    if count_b is not None:
        if not 2 <= count_b <= len(b):
            raise ParameterError(
                f"a subset of {count_b} images of {folders[1]} is asked for, but must be of 2 to "
                f"{len(b)}, the images that there are"
            )
        b = choose(b, count_b, seed)
    return Domains(a, b)
