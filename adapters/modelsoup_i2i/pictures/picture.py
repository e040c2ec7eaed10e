"""One picture of a training, which a file is, or a part of a file; without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from .hdf5 import Row
from .images import ImageError, read_image

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")


@dataclass(frozen=True, slots=True)
class Half:
    """The left or the right half of a file: one of two pictures side by side."""

    file: Path
    side: Side

    def __str__(self) -> str:
        return f"{self.file} (its {self.side} half)"

    def read(self, channels: int, *, deep: bool = False) -> np.ndarray:
        """The picture, as `read_image` gives one."""
        both = read_image(self.file, channels, deep=deep)
        middle, odd = divmod(both.shape[1], 2)
        if odd or not middle:
            raise ImageError(
                f"{self.file} is {both.shape[1]} wide, where two pictures side by side have an "
                f"even width"
            )
        half: np.ndarray = both[:, :middle] if self.side == "left" else both[:, middle:]
        return half


@dataclass(frozen=True, slots=True)
class Member:
    """A file with the index of its class."""

    file: Path
    label: int

    def __str__(self) -> str:
        return str(self.file)

    def read(self, channels: int, *, deep: bool = False) -> np.ndarray:
        """The picture, as `read_image` gives one."""
        return read_image(self.file, channels, deep=deep)


@dataclass(frozen=True, slots=True)
class Attributed:
    """A file with its attributes, of which it may have several.

    Attributes:
        file: which.
        attributes: a byte for each, by its index: 1 where the picture has it, or else 0.
    """

    file: Path
    attributes: bytes

    def __str__(self) -> str:
        return str(self.file)

    def read(self, channels: int, *, deep: bool = False) -> np.ndarray:
        """The picture, as `read_image` gives one."""
        return read_image(self.file, channels, deep=deep)


Picture: TypeAlias = Path | Half | Member | Row | Attributed
Images = Mapping[str, Sequence[Picture]]
"""Sets of pictures, by what errors call them."""


def read_picture(picture: Picture, channels: int = 3, *, deep: bool = False) -> np.ndarray:
    """Height × width × channels, uint8; with `deep`, uint16 of a file that has so many bits.

    Raises:
        ImageError: the file is missing or damaged, as `read_image` says it.
    """
    if isinstance(picture, Path):
        return read_image(picture, channels, deep=deep)
    return picture.read(channels, deep=deep)


def labels_of(pictures: Iterable[Picture]) -> np.ndarray:
    """The indices of the classes of pictures, of those that have one; int64."""
    return np.array([p.label for p in pictures if isinstance(p, Member | Row)], np.int64)


def in_turn(pictures: Sequence[Picture]) -> list[Picture]:
    """One of each class after the other, as long as it has some; those of no class as they are."""
    met: Counter[int] = Counter()
    order: list[tuple[int, int]] = []
    for picture in pictures:
        label = picture.label if isinstance(picture, Member | Row) else len(order)
        order.append((met[label], label))
        met[label] += 1
    places = sorted(range(len(order)), key=order.__getitem__)
    return [pictures[place] for place in places]


def labelled(pictures: Sequence[Picture], labels: Sequence[int]) -> list[Member | Row]:
    """Pictures with the indices of their classes, in their order.

    Raises:
        TypeError: one is half of a file, or has attributes, and so no class.
    """
    found: list[Member | Row] = []
    for picture, label in zip(pictures, labels, strict=True):
        if isinstance(picture, Half | Attributed):
            raise TypeError(f"{picture} can have no class")
        if isinstance(picture, Path):
            found.append(Member(picture, label))
        else:
            found.append(replace(picture, label=label))
    return found


def files_of(pictures: Iterable[Picture]) -> list[Path]:
    """The files that pictures are or lie in, each once, in their order."""
    return list(dict.fromkeys(p if isinstance(p, Path) else p.file for p in pictures))
