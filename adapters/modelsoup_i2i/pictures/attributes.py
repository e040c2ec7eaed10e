"""Attributes of pictures, of which one may have several, in files that tell them; no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelsoup import ParameterError, counted, listed, nearest

from .images import list_images
from .picture import Attributed

_VALUES = {"1": 1, "0": 0, "-1": 0}
APART = "+=,"  # what joins names where several are asked for, and so is in none


@dataclass(frozen=True)
class AttributeTable:
    """What a file tells.

    Attributes:
        file: which.
        names: of the attributes that are used, by their indices.
        of_picture: a byte for each of them, 0 or 1, by a picture's path below its folder.
    """

    file: Path
    names: tuple[str, ...]
    of_picture: dict[str, bytes]


def attribute_names(file: Path, only: Sequence[str] = ()) -> tuple[str, ...]:
    """The names that `read_attributes` gives, without a look at the pictures' rows.

    Raises:
        ParameterError: as `read_attributes`, as far as the file's head is wrong.
    """
    with _rows(file) as (_, names, _rest):
        return tuple(names[place] for place in _chosen(file, names, only))


def read_attributes(file: Path, only: Sequence[str] = ()) -> AttributeTable:
    """Read CelebA's list of attributes, or a CSV.

    CelebA's `list_attr_celeba.txt` has the number of pictures in its first line, the attributes'
    names in the second, and then a line for each picture: its name, and 1 or −1 for each attribute.
    A CSV has a header, whose first column is the pictures' and whose others are the attributes, and
    1, or 0 or −1, in its rows.

    Args:
        file: which.
        only: the attributes that are wanted, in this order; all where none are named.

    Raises:
        ParameterError: it is missing, of another form, or lacks an attribute; the message names the
            line.
    """
    found: dict[str, bytes] = {}
    told: dict[str, str] = {}  # which values there are, and where the first was
    with _rows(file) as (count, names, rows):
        chosen = _chosen(file, names, only)
        for line, (picture, *values) in rows:
            here = f"line {line} of {file}, of {picture},"
            if len(values) != len(names):
                raise ParameterError(
                    f"{here} has {counted(len(values), 'value')}, where {len(names)} are expected, "
                    f"one for each attribute"
                )
            own = [values[place] for place in chosen]
            for place, value in zip(chosen, own, strict=True):
                if value not in _VALUES:
                    raise ParameterError(
                        f"{here} has {value!r} for {names[place]}, where 1, or 0 or -1, is expected"
                    )
                told.setdefault(value, here)
            if picture in found:
                raise ParameterError(f"{here} is its second one")
            found[picture] = bytes(_VALUES[value] for value in own)
    if {"0", "-1"} <= told.keys():
        raise ParameterError(
            f"{told['0']} has 0, and {told['-1']} has -1: a file says no by one of them"
        )
    if count not in (None, len(found)):
        raise ParameterError(
            f"{file} says in its first line that it is of {count} pictures, but has lines of "
            f"{len(found)}"
        )
    if not found:
        raise ParameterError(f"{file} tells of no picture")
    return AttributeTable(file, tuple(names[place] for place in chosen), found)


def find_attributed(
    folders: Sequence[Path], attributes: AttributeTable
) -> list[tuple[Attributed, ...]]:
    """The pictures of each folder, each with its attributes, in natural order.

    Raises:
        ParameterError: a picture has no row, or a row has no picture, or two folders' have one.
        ImageError: a folder is missing.
    """
    found: list[tuple[Attributed, ...]] = []
    left = dict(attributes.of_picture)
    for folder in folders:
        files = {file.relative_to(folder).as_posix(): file for file in list_images(folder)}
        if unknown := [name for name in files if name not in attributes.of_picture]:
            raise ParameterError(
                f"{attributes.file} says nothing of {len(unknown)} of the {len(files)} pictures in "
                f"{folder}: {listed(unknown, 3)}{nearest(unknown[0], left)}"
            )
        if twice := [name for name in files if name not in left]:
            raise ParameterError(
                f"{attributes.file} has one row for {twice[0]}, which is in both "
                f"{' and '.join(map(str, folders))}"
            )
        found.append(tuple(Attributed(file, left.pop(name)) for name, file in files.items()))
    if left:
        raise ParameterError(
            f"{attributes.file} tells of {counted(len(left), 'picture')} that "
            f"{' and '.join(map(str, folders))} lack{'' if len(folders) > 1 else 's'}: "
            f"{listed(list(left), 3)}"
        )
    return found


def must_be_names(names: Sequence[str], where: object) -> None:
    """Check that attributes can be asked for by their names.

    Raises:
        ParameterError: one is empty, there twice, or has a sign in it that joins names.
    """
    if not names:
        raise ParameterError(f"{where} names no attributes")
    for place, name in enumerate(names):
        if not name or set(name) & set(APART):
            raise ParameterError(
                f"{where} has an attribute {name!r}, where a name without {' '.join(APART)} is "
                f"expected"
            )
        if name in names[:place]:
            raise ParameterError(f"{where} names the attribute {name!r} twice")


def _chosen(file: Path, names: Sequence[str], only: Sequence[str]) -> list[int]:
    """The columns of those that are used."""
    if only:
        must_be_names(only, "attributes")
    for name in only:
        if name not in names:
            raise ParameterError(
                f"{file} has no attribute {name!r}{nearest(name, names)} (it has {listed(names)})"
            )
    return [names.index(name) for name in only or names]


@contextmanager
def _rows(file: Path) -> Iterator[tuple[int | None, list[str], Iterator[tuple[int, list[str]]]]]:
    """How many pictures there should be, names, and each row with the number of its line.

    Raises:
        ParameterError: it is missing, no text, or of another form.
    """
    if not file.is_file():  # a pipe would be waited for
        what = "is no regular file" if file.exists() else "does not exist"
        raise ParameterError(f"{file} {what}, where a list of attributes is expected")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            count = int(first) if first.strip().isdecimal() else None
            if count is not None:
                names = lines.readline().split()
                rows = ((n, line.split()) for n, line in enumerate(lines, 3) if line.strip())
            else:
                (header,) = csv.reader([first])
                names = [name.strip() for name in header[1:]]
                if not names:
                    raise ParameterError(
                        f"{file} is no list of attributes: in its first line a number of pictures "
                        f"is expected, as CelebA's has, or a header of columns, as a CSV has"
                    )
                reader = csv.reader(lines)
                rows = ((reader.line_num + 1, [*map(str.strip, row)]) for row in reader if row)
            must_be_names(names, file)
            yield count, names, rows
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(f"{file} cannot be read as a list of attributes: {error}") from error
