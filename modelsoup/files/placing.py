"""Where an output may be, and how it comes there at once: all of it, or what was there before."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, OutputError, nearest, option
from .checkpoint import SUFFIX, open_checkpoint
from .companions import WEIGHTS

# Of files that are no weights, and that an output's name may be meant as.
_FILES = (
    ".npz", ".npy", ".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z", ".pkl", ".pickle", ".json",
    ".yaml", ".yml", ".toml", ".txt", ".md", ".csv", ".parquet", ".log", ".py",
)  # fmt: skip

PARTIAL_SUFFIX = ".soup-partial"
REPLACED_SUFFIX = ".soup-replaced"
LINEAGE_KEY = "modelsoup"
CONVERTER_KEY = "converted_by"


class OccupiedError(OutputError):
    """There is something where the output is to be."""


Kind = Literal["checkpoint", "file", "folder"]


def check_output(output: Path, *, force: bool, kind: Kind = "checkpoint") -> None:
    """Whether an output may be written: `check_place`, and what is there may be replaced.

    Args:
        output: a path.
        force: replace what is there.
        kind: a checkpoint is a file or a folder by its suffix.

    Raises:
        OccupiedError: something is there, and `force` is not given.
        OutputError: see `check_place`.
    """
    check_place(output, kind=kind)
    check_free(output, force=force)


def check_place(output: Path, *, kind: Kind = "checkpoint") -> None:
    """Whether an output could be written to a path, perhaps in the place of what is there.

    A link is replaced as what it is, and not followed.

    Raises:
        OutputError: its name is none that it can have; its folder is missing or cannot be written
            to; or what is there is never replaced: the current folder, a mount point, a folder by
            a file or the other way round, and by a checkpoint a folder that modelsoup did not
            write.
    """
    is_checkpoint = kind == "checkpoint"
    is_folder = output.suffix != SUFFIX if is_checkpoint else kind == "folder"
    suffix = output.suffix.lower()
    if is_checkpoint and is_folder and (suffix in (*WEIGHTS, *_FILES) or nearest(suffix, [SUFFIX])):
        raise OutputError(
            f"the output {output} ends in {output.suffix} (expected {SUFFIX}, or a folder's name)"
        )
    if output.is_dir() and output.samefile(os.curdir):
        raise OutputError(f"the output {output} is the current folder: name a folder in it")
    if output.name in ("", ".."):
        raise OutputError(f"the output {output} has no name of its own: name a file or a folder")
    parent = output.parent
    if not parent.is_dir():
        raise OutputError(f"the folder {parent} of the output {output.name} does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {parent} of the output {output.name} is not writable")
    longest = max(len(os.fsencode(temporary(output, s).name)) for s in _TEMPORARIES)
    limit = os.pathconf(parent, "PC_NAME_MAX")
    if longest > limit:
        own = len(os.fsencode(output.name))
        raise OutputError(
            f"the output's name has {own} bytes, and may have {limit - longest + own} here: "
            f"{output.name[:40]}…"
        )
    if output.is_mount():
        raise OutputError(f"the output {output} is a mount point, which cannot be replaced")
    if output.is_dir() != is_folder and os.path.lexists(output):
        other = "folder" if output.is_dir() else "file"
        if not is_checkpoint:
            raise OutputError(f"{output} is a {other}, where a {kind} is to be written")
        raise OutputError(
            f"{output} is a {other}: an output that ends in {SUFFIX} is a file, any other a folder"
        )
    if not is_checkpoint:
        return
    if is_folder and output.is_dir() and any(output.iterdir()) and not _was_written_by_us(output):
        raise OutputError(
            f"the folder {output} is not empty, and was not written by modelsoup, so it is not "
            f"replaced: remove it yourself or name another output"
        )


def check_free(output: Path, *, force: bool) -> None:
    """Whether there is nothing where an output is to be, or it may be replaced.

    Raises:
        OccupiedError: there is something, and `force` is not given.
    """
    is_empty = output.is_dir() and not output.is_symlink() and not any(output.iterdir())
    if force or is_empty or not os.path.lexists(output):
        return
    is_full = output.is_dir() and not output.is_symlink()
    what = f"the folder {output} exists and is not empty" if is_full else f"{output} exists"
    raise OccupiedError(f"{what} ({option('force')} replaces it)")


def check_apart(output: Path, read: Iterable[Path], *, what: str = "output") -> None:
    """Whether an output would neither replace anything that is read nor be added to it.

    Args:
        output: a path, with or without anything there.
        read: files and folders; what is put into a model folder becomes a part of the model.
        what: what the output is called.

    Raises:
        OutputError: it would.
    """
    read = list(read)
    found = overlapped(output, read)
    if found is not None:
        does = "would replace" if output.samefile(found) else "holds"
        raise OutputError(f"the {what} {output} {does} {found}, which is read")
    above = {_identity(place.stat()) for place in output.absolute().parents if place.exists()}
    for folder in filter(os.path.isdir, read):
        if _identity(folder.stat()) in above:
            raise OutputError(f"the {what} {output} would lie in {folder}, which is read")


def overlapped(output: Path, read: Iterable[Path]) -> Path | None:
    """The first of some files and folders that would be lost if an output were replaced.

    They are compared as what they are, and not by name: links, bind mounts and a file system that
    does not tell upper case from lower lead to one place by several names.
    """
    if not output.exists():
        return None
    inside = {
        _identity(Path(folder, name).lstat())
        for folder, folders, files in os.walk(output)
        for name in (*folders, *files)
    }
    inside.add(_identity(output.stat()))
    known: dict[Path, bool] = {}

    def lies_in(place: Path) -> bool:
        if place not in known:
            above = place.parent != place and lies_in(place.parent)
            known[place] = above or (place.exists() and _identity(place.stat()) in inside)
        return known[place]

    for path in read:
        # Where it is, if it is a link, and where that leads.
        if lies_in(path.parent.resolve() / path.name) or lies_in(path.resolve()):
            return path
    return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _was_written_by_us(folder: Path) -> bool:
    try:
        return not open_checkpoint(folder).metadata.keys().isdisjoint((LINEAGE_KEY, CONVERTER_KEY))
    except CheckpointError:
        return False


_TEMPORARIES = (PARTIAL_SUFFIX, REPLACED_SUFFIX)


def temporary(output: Path, suffix: str) -> Path:
    """A name beside an output that nothing else has."""
    return output.with_name(f".{output.name}.{os.urandom(4).hex()}{suffix}")


def remove_stale(output: Path) -> list[Path]:
    """Remove temporaries that killed runs left for this output; those in use are locked."""
    removed = []
    suffixes = [PARTIAL_SUFFIX]
    if output.exists():  # else a replaced folder may be the only copy left: see `place`
        suffixes.append(REPLACED_SUFFIX)
    # Not a glob: `.model.*` would find the temporaries of `model.v2` too.
    ours = re.compile(
        rf"\.{re.escape(output.name)}\.[0-9a-f]{{8}}({'|'.join(map(re.escape, suffixes))})"
    )
    for path in sorted(p for p in output.parent.iterdir() if ours.fullmatch(p.name)):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:  # its owner finished between the listing and now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
            removed.append(path)
        except (BlockingIOError, PermissionError):  # it is in use, or another user's
            continue
        finally:
            os.close(descriptor)
    return removed


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file, or a folder with all that is in it, written to the disk."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            flush_one(Path(folder, name))
        flush_one(Path(folder))
    if not path.is_dir():
        flush_one(path)


def flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place(partial: Path, output: Path, *, force: bool) -> None:
    """Give a finished file or folder its name, in one step where the system can.

    What was there is lost only once the new stands in its place. Without `force` nothing is
    replaced, not even what has appeared in this moment.

    Raises:
        OutputError: something appeared there meanwhile, and `force` is not given.
        OSError: the system refuses; what was there is there as before.
    """
    try:
        if not partial.is_dir():
            if force:
                os.replace(partial, output)
            elif not _renamed(partial, output, _NO_REPLACE):
                _link(partial, output)
            return
        is_free = not os.path.lexists(output) or not (output.is_symlink() or any(output.iterdir()))
        if is_free or not force:
            os.rename(partial, output)  # which the system refuses if there is something by now
        elif not _renamed(partial, output, _EXCHANGE):
            # A kill between the two leaves the old folder under a name that is not cleaned away
            # until a new output stands in its place.
            old = temporary(output, REPLACED_SUFFIX)
            os.rename(output, old)
            try:
                os.rename(partial, output)
            except OSError:
                os.rename(old, output)
                raise
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise OutputError(f"{output} appeared while it was made, and is left alone") from error
        raise
    with contextlib.suppress(OSError):  # else the next run to this output removes it
        remove(partial)  # the old one, if the two were exchanged
        remove_stale(output)  # or if they were renamed, or a kill left it


@contextlib.contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A folder for what becomes an output, in the output's own folder; removed at the end.

    Raises:
        OutputError: the system refuses something within the block, too.
    """
    try:
        remove_stale(output)
        work = temporary(output, PARTIAL_SUFFIX)
        work.mkdir()
        lock = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # so that no other run takes it for a stray
            yield work
        finally:
            os.close(lock)
            remove(work)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error


@contextlib.contextmanager
def placed(output: Path, *, force: bool, fsync: bool = True) -> Iterator[Path]:
    """A path for a file or a folder that takes its place when the block ends, all of it or nothing.

    The path has the output's name, in a folder of its own; nothing is there yet.

    Args:
        output: where it comes to.
        force: replace what is there.
        fsync: flush to the disk before. Without, a power cut can leave a broken file.

    Raises:
        OutputError: it cannot be written, or something is there and `force` is not given.
    """
    check_free(output, force=force)
    with beside(output) as work:
        partial = work / output.name
        yield partial
        if fsync:
            flush(partial)
        place(partial, output, force=force)


def save_text(text: str, output: Path, *, force: bool) -> None:
    """Write a small file, whole or not at all.

    Raises:
        OutputError: it cannot be written, or something is there and `force` is not given.
    """
    with placed(output, force=force) as partial:
        partial.write_text(text, "utf-8")


def _link(partial: Path, output: Path) -> None:
    """Rename by a hard link, which replaces nothing; just rename where there are none."""
    try:
        os.link(partial, output)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK):
            raise
        os.rename(partial, output)
    else:
        partial.unlink()


_NO_REPLACE, _EXCHANGE = "RENAME_NOREPLACE", "RENAME_EXCHANGE"
# The system's call, what stands for the current folder, and its flags.
_RENAMES = {
    "linux": ("renameat2", (-100,), {_NO_REPLACE: 1, _EXCHANGE: 2}),
    "darwin": ("renamex_np", (), {_NO_REPLACE: 4, _EXCHANGE: 2}),
}
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def _renamed(source: Path, target: Path, how: str) -> bool:
    """Rename in one step, with a condition that `os.rename` has not; false where it is unknown.

    Raises:
        OSError: the target exists, or whatever else prevents it.
    """
    name, here, flags = _RENAMES.get(sys.platform, ("", (), {}))
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if call is None:
        return False
    if call(*here, os.fsencode(source), *here, os.fsencode(target), flags[how]) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
