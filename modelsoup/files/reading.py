"""Files that a stranger may have put there: regular ones only, and no more of them than wanted."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """Which file something was read from, and in which state: any change to it makes another.

    Attributes:
        device, inode: which file, whatever it is called.
        size: in bytes.
        written, changed: when its content and when anything of it changed last, in nanoseconds.
    """

    device: int
    inode: int
    size: int
    written: int
    changed: int


def state_of(descriptor: int) -> FileState:
    """The state of an open file."""
    found = os.fstat(descriptor)
    return FileState(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor to read a regular file by, links followed.

    To open a pipe would wait for who writes to it, and a device may have no end.

    Raises:
        OSError: it cannot be opened, or it is something else.
    """
    # Without waiting: what is no pipe now may be one in the next moment.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))


def read_small(path: Path, limit: int) -> bytes:
    """A regular file's content.

    Args:
        path: where it is.
        limit: how many bytes it may have.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", os.fspath(path))
    return content
