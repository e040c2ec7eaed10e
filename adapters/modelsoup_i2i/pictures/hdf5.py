"""Pictures with labels in one HDF5 file, read one at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from modelsoup import OutputError, ParameterError, SoupError, how_to_install, listed

from .arrays import in_8_bits
from .images import CHANNELS, MAX_PIXELS, ImageError, with_channels

SUFFIXES = (".h5", ".hdf5")
_KINDS = (np.dtype(np.uint8), np.dtype(np.uint16))


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of the many in an HDF5 file.

    Attributes:
        file: which.
        row: of its dataset `imgs`.
        label: the index of its class.
    """

    file: Path
    row: int
    label: int

    def __str__(self) -> str:
        return f"{self.file} (imgs[{self.row}])"

    def read(self, channels: int, *, deep: bool = False) -> np.ndarray:
        """The picture, height × width × channels: uint8, or with `deep` uint16 where it is so.

        Raises:
            ImageError: the file is missing or damaged, or has other channels.
        """
        try:
            with _opened(self.file) as stored:
                images = stored["imgs"]
                first = _channels_first(self.file, images.shape, channels)
                _must_be_small(self.file, images.shape, first=first)
                picture: np.ndarray = images[self.row]
        except ParameterError as error:
            raise ImageError(f"{self}: {error}") from error
        picture = picture.astype(picture.dtype.newbyteorder("="))
        picture = picture if deep else in_8_bits(picture)
        picture = np.ascontiguousarray(picture.transpose(1, 2, 0) if first else picture)
        return picture if channels not in CHANNELS else with_channels(picture, channels)


@dataclass(frozen=True)
class Labelled:
    """Pictures of classes in memory, to be written to one file.

    Attributes:
        images: uint8 or uint16, N × channels × height × width.
        labels: N indices of classes.
        classes: their names.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def divided(self, count: int) -> tuple[Labelled, Labelled]:
        """The first so many, and the others."""
        first, others = slice(count), slice(count, None)
        return (
            Labelled(self.images[first], self.labels[first], self.classes),
            Labelled(self.images[others], self.labels[others], self.classes),
        )


def must_write() -> None:
    """Check that HDF5 files can be written.

    Raises:
        SoupError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise SoupError(f"this needs h5py: {how_to_install('hdf5')} ({error})") from error
    del h5py


def write_rows(file: Path, pictures: Labelled) -> None:
    """Write pictures as `find_rows` reads them: not packed, so that one is read without others.

    Raises:
        OutputError: the file cannot be written.
    """
    import h5py

    made = BytesIO()  # where a disk is full, h5py neither says so plainly nor lets go of the file
    with h5py.File(made, "w") as stored:
        stored["imgs"] = pictures.images
        stored["labels"] = pictures.labels.astype(np.int64)
        stored["classes"] = list(pictures.classes)
    try:
        file.write_bytes(made.getbuffer())
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}") from error


def find_rows(file: Path, channels: int | None = None) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """The classes of an HDF5 file, and its pictures in its order.

    It holds `imgs`, uint8 or uint16, N × C × H × W or N × H × W × C, and `labels`, N integers. The
    classes' names are `classes`, a dataset or an attribute: strings, or JSON of a list; without it
    they are the labels' digits.

    Args:
        file: the file.
        channels: that its pictures are to have; None: whatever they are.

    Raises:
        ParameterError: it is missing or damaged, or holds something else.
    """
    names, labels = _labels(file, channels)
    return names, tuple(Row(file, row, label) for row, label in enumerate(labels.tolist()))


def names_in(file: Path) -> tuple[str, ...]:
    """The classes alone, which many an option asks for.

    Raises:
        as `find_rows`.
    """
    return _labels(file)[0]


def _labels(file: Path, channels: int | None = None) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes of a file that is sound, and the index of each picture's."""
    with _opened(file) as stored:
        images, labels = _dataset(stored, file, "imgs"), _dataset(stored, file, "labels")
        shape = images.shape
        if images.dtype.newbyteorder("=") not in _KINDS or len(shape) != 4 or 0 in shape:
            raise ParameterError(
                f"{file}: imgs is {images.dtype} of {list(shape)}, where uint8 or uint16 of N × C "
                f"× H × W or N × H × W × C is expected"
            )
        if channels is not None:
            _must_be_small(file, shape, first=_channels_first(file, shape, channels))
        if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
            raise ParameterError(
                f"{file}: labels is {labels.dtype} of {list(labels.shape)}, where an integer for "
                f"each of the {shape[0]} pictures is expected"
            )
        values: np.ndarray = labels[:]
        names = _names(stored, file)
    least, most = int(values.min()), int(values.max())
    if names is None and 0 <= least <= most <= len(values):
        names = tuple(map(str, range(most + 1)))
    if names is None or least < 0 or most >= len(names):
        raise ParameterError(
            f"{file}: labels are {least} to {most}, where indices of "
            + ("classes, 0 and more, are expected" if names is None else f"{len(names)} classes "
               f"are expected")
        )  # fmt: skip
    return names, values


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file; opened anew each time, so that no thread and no process shares it."""
    try:
        import h5py
    except ImportError as error:
        raise SoupError(f"{file} needs h5py: {how_to_install('hdf5')} ({error})") from error
    if not file.is_file():  # a pipe would be waited for
        what = "is no regular file" if file.exists() else "does not exist"
        raise ParameterError(f"{file} {what}, where an HDF5 file of images is expected")
    try:
        with h5py.File(file, "r") as stored:
            yield stored
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        raise ParameterError(f"{file} cannot be read as HDF5: {error}") from error


def _dataset(stored: Any, file: Path, name: str) -> Any:
    import h5py

    link = stored.get(name, getlink=True)
    if link is None:
        has = listed(sorted(stored)) or "nothing"
        raise ParameterError(f"{file} has no dataset {name} (it has {has})")
    found = stored.get(name) if isinstance(link, h5py.HardLink) else None
    # What lies in other files is no part of this one's content, by which results are named.
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise ParameterError(f"{file}: {name} is no dataset whose values lie in this file")
    return found


def _names(stored: Any, file: Path) -> tuple[str, ...] | None:
    if "classes" in stored:
        told = _dataset(stored, file, "classes")[()]
    elif "classes" in stored.attrs:
        told = stored.attrs["classes"]
    else:
        return None
    if isinstance(told, np.ndarray):
        names: Any = told.tolist()
    else:
        try:
            names = json.loads(told)
        except (ValueError, TypeError):
            names = None
    if isinstance(names, list):
        names = [n.decode(errors="replace") if isinstance(n, bytes) else n for n in names]
    if not (
        isinstance(names, list) and names and all(isinstance(n, str) and n for n in names)
        and len(set(names)) == len(names)
    ):  # fmt: skip
        raise ParameterError(
            f"{file}: classes is no list of names, each another, as strings or in JSON"
        )
    return tuple(names)


def _channels_first(file: Path, shape: tuple[int, ...], channels: int) -> bool:
    """Whether pictures have their channels first; where both could be, they have.

    Raises:
        ParameterError: neither has as many as are wanted, or else 1, 3 or 4.
    """
    for wanted in ((channels,), CHANNELS if channels in CHANNELS else ()):
        if shape[1] in wanted or shape[3] in wanted:
            return shape[1] in wanted
    raise ParameterError(
        f"{file}: imgs is of {list(shape)}, where {channels} channels are expected, second or last "
        f"(the option channels says how many)"
    )


def _must_be_small(file: Path, shape: tuple[int, ...], *, first: bool) -> None:
    height, width = shape[2:] if first else shape[1:3]
    if height * width > MAX_PIXELS:
        raise ParameterError(
            f"{file}: a picture of imgs has {height} × {width} pixels, where at most {MAX_PIXELS} "
            f"are read"
        )
