"""Which picture becomes which file, and how translations come there: all of them, or none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from modelsoup import OutputError, ParameterError, beside, check_output, place, placed

from ..pictures.images import CHANNELS, ImageError, list_images


@dataclass(frozen=True)
class Way:
    """One of the ways in which a picture is translated, by what it adds to names.

    Attributes:
        folder: in the output, such as a class's; none where it is the output itself.
        ending: of a name, before its suffix.
    """

    folder: str = ""
    ending: str = ""

    def called(self, file: Path, channels: int) -> Path:
        """A file's name after it: `.png`, or its own suffix where PNG cannot hold the channels."""
        suffix = ".png" if channels in CHANNELS else file.suffix
        return file.with_name(f"{file.stem}{self.ending}{suffix}")


@dataclass(frozen=True)
class Translation:
    """A picture that is to be translated.

    Attributes:
        source: the picture.
        partial: where its translation is to be saved.
        output: where that will be when all are made.
    """

    source: Path
    partial: Path
    output: Path


@contextmanager
def translations(
    source: Path, output: Path, *, force: bool, ways: Sequence[Way] = (Way(),), channels: int = 3
) -> Iterator[list[Translation]]:
    """What becomes of a picture, or of a folder's; it is put in place when the block ends.

    Names are kept, their suffix becomes `.png`, or stays where PNG cannot hold the channels. Other
    files of a folder that exists stay. Only an error of the system in the midst of moving into such
    a folder leaves a part of the pictures.

    Args:
        source: a picture, or a folder.
        output: for a picture a `.png` file, or a folder that exists; for a folder, and where there
            are several ways, a folder, which is made with those above it.
        force: replace pictures that exist.
        ways: in which each picture is translated: in the list they follow each other.
        channels: of what is made.

    Raises:
        ParameterError: the folder holds no images.
        ImageError: there is no source.
        OutputError: an output exists, is one of the pictures or of two of them, or cannot be
            written.
    """
    pairs = _pairs(source, output, force, ways, channels)
    if not source.is_dir() and tuple(ways) == (Way(),):
        ((file, into),) = pairs
        with placed(into, force=force, fsync=False) as partial:
            yield [Translation(file, partial, into)]
        return
    names = [into.relative_to(output) for _, into in pairs]
    with pictures_in(output, names, force=force) as partials:
        yield [
            Translation(file, partial, into)
            for (file, into), partial in zip(pairs, partials, strict=True)
        ]


@contextmanager
def pictures_in(output: Path, names: Sequence[Path], *, force: bool) -> Iterator[list[Path]]:
    """Where a folder's files are to be saved, by their names in it; see `translations`.

    Raises:
        OutputError: one of them exists, or cannot be written.
    """
    _must_be_free(output, [output / name for name in names], force)
    root = output.resolve()
    missing = [parent for parent in root.parents if not parent.exists()]
    try:
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
        with beside(root) as work:
            made = work / root.name
            for parent in {name.parent for name in names}:
                (made / parent).mkdir(parents=True, exist_ok=True)
            yield [made / name for name in names]
            if not root.exists() or not any(root.iterdir()):
                place(made, root, force=False)
                return
            for name in names:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                place(made / name, root / name, force=force)
    finally:
        if not root.exists():
            for parent in missing:
                with suppress(OSError):  # somebody put something there
                    parent.rmdir()


def _pairs(
    source: Path, output: Path, force: bool, ways: Sequence[Way], channels: int
) -> list[tuple[Path, Path]]:
    """Each input with its outputs; checked before anything is made."""
    if source.is_dir():
        files, root = list_images(source), source
        if not files:
            raise ParameterError(f"the folder {source} holds no images")
    else:
        if not source.exists():
            raise ImageError(f"{source} does not exist, where images are expected")
        files, root = [source], source.parent
    suffix = Way().called(source, channels).suffix
    if source.is_dir() or tuple(ways) != (Way(),):
        is_named = suffix and output.suffix.lower() == suffix.lower()
        if not source.is_dir() and not output.is_dir() and is_named:
            raise OutputError(
                f"{output} is a picture's name, where a folder is expected for what becomes of "
                f"{source}"
            )
        pairs = [
            (file, way.called(output / way.folder / file.relative_to(root), channels))
            for file in files for way in ways
        ]  # fmt: skip
    else:
        into = output / f"{source.stem}{suffix}" if output.is_dir() else output
        if into.suffix.lower() != suffix.lower():
            raise OutputError(
                f"the image {into} must end in {suffix} (a folder that exists takes it under its "
                f"name)"
            )
        check_output(into, force=True, kind="file")
        if os.path.lexists(into):
            check_output(into, force=force, kind="file")
        pairs = [(source, into)]
    sources = {file.resolve() for file in files}
    taken: dict[Path, Path] = {}
    for file, into in pairs:
        if into in taken:
            raise OutputError(f"{taken[into]} and {file} would both become {into}")
        taken[into] = file
        if into.resolve() in sources:
            raise OutputError(f"{into} would replace its own input")
    return pairs


def _must_be_free(output: Path, files: Sequence[Path], force: bool) -> None:
    """Raise an OutputError where something is in the way of files below a folder."""
    if os.path.lexists(output) and not output.is_dir():
        raise OutputError(f"{output} is a file, where a folder is expected")
    folders = {output}
    for into in files:
        if os.path.lexists(into):
            check_output(into, force=force, kind="file")
        for folder in into.parents:
            if folder in folders or not folder.is_relative_to(output):
                break
            folders.add(folder)
            if os.path.lexists(folder) and not folder.is_dir():
                raise OutputError(f"{folder} is a file, where a folder is expected for {into}")
