"""File digests that are computed while the file is read for something else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path

import xxhash

from ..errors import CheckpointError
from .checkpoint import Checkpoint, StrPath
from .header import read_into
from .reading import open_regular, state_of

_BUFFER = 1 << 20
_opened = count(1)


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file's identity: its name, size in bytes, and digests in hexadecimal.

    `xxh3_128` is what `xxh128sum` prints; `sha256`, where it was asked for, what `sha256sum` does.
    """

    name: str
    size: int
    xxh3_128: str
    sha256: str | None = None


class FileReader:
    """Reads slices of one file and hashes the whole file from the bytes that pass by.

    Args:
        file: which.
        of: the checkpoint whose file it is: one that is no more what its header was read from is
            refused.
        sha256: compute that digest too.

    A digest needs the bytes in order. Slices that are read in file order, as a merge reads them,
    are hashed as they come, at no extra read; what a slice jumps over is read for the hash alone;
    a slice that lies behind is only read. The lock must be held by the caller during `read`.
    """

    def __init__(self, file: Path, *, of: Checkpoint | None = None, sha256: bool = False) -> None:
        self.file = file
        self.lock = threading.Lock()
        self.number = next(_opened)  # among all of a process, in the order of opening
        self.extra_bytes = 0  # read for the digest alone
        self._of = of
        self._descriptor = open_regular(file) if of is None else of.open(file)
        if hasattr(os, "posix_fadvise"):  # farther ahead, while other files have their turn
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._state = state_of(self._descriptor)
        self._size = self._state.size
        self._position = 0
        self._xxh3 = xxhash.xxh3_128()
        self._sha256 = None
        if sha256:
            import hashlib  # loads OpenSSL, which a merge seldom needs

            self._sha256 = hashlib.sha256()

    def peek(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`, which the digest will meet later."""
        read_into(self._descriptor, buffer, offset, self.file)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`, and take them into the digest."""
        if offset > self._position:
            self._advance(offset)
        self.peek(buffer, offset)
        if offset <= self._position < offset + len(buffer):
            self._update(buffer[self._position - offset :])

    def _update(self, data: memoryview) -> None:
        self._xxh3.update(data)
        if self._sha256 is not None:
            self._sha256.update(data)
        self._position += len(data)

    def _advance(self, target: int) -> None:
        view = memoryview(bytearray(min(_BUFFER, target - self._position)))
        while self._position < target:
            part = view[: target - self._position]
            read_into(self._descriptor, part, self._position, self.file)
            self.extra_bytes += len(part)
            self._update(part)

    def finish(self) -> FileDigest:
        """Hash what was not read yet, and give the digest.

        Raises:
            CheckpointError: the file changed while it was read.
        """
        self._advance(self._size)
        if state_of(self._descriptor) != self._state:
            raise CheckpointError(f"{self.file} changed while it was read: begin again")
        name = self.file.name if self._of is None else self._of.file_name(self.file)
        return FileDigest(
            name, self._size, self._xxh3.hexdigest(),
            None if self._sha256 is None else self._sha256.hexdigest(),
        )  # fmt: skip

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def digest_file(file: Path, *, of: Checkpoint | None = None, sha256: bool = False) -> FileDigest:
    """The digest of a whole file, read once from front to back; arguments as of `FileReader`."""
    reader = FileReader(file, of=of, sha256=sha256)
    try:
        return reader.finish()
    finally:
        reader.close()


def combined(digests: list[FileDigest], algorithm: str) -> str:
    """One digest of several files: of their digests, in hexadecimal, one after the other."""
    text = "".join(str(getattr(digest, algorithm)) for digest in digests).encode()
    if algorithm == "sha256":
        import hashlib

        return hashlib.sha256(text).hexdigest()
    return xxhash.xxh3_128(text).hexdigest()


def digest_checkpoint(checkpoint: Checkpoint) -> list[FileDigest]:
    """The digests of a checkpoint's files, in order."""
    return [digest_file(file, of=checkpoint) for file in checkpoint.files]


def content_of(files: Iterable[StrPath]) -> list[list[str]]:
    """Name and XXH3-128 digest of each file, for keys."""
    found = []
    for file in map(Path, files):
        status = file.stat()
        digest = _remembered(
            file.absolute(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
        )
        found.append([file.name, digest])
    return found


def digest_files(files: Iterable[StrPath]) -> str:
    """One XXH3-128, in hexadecimal, of the names and the content of files, in their order."""
    told = "".join(f"{name}\0{digest}\0" for name, digest in content_of(files))
    return xxhash.xxh3_128(told.encode(errors="surrogateescape")).hexdigest()


@lru_cache(maxsize=1 << 17)
def _remembered(file: Path, size: int, written: int, changed: int, inode: int) -> str:
    """Every node of a tree may name the same thousands of images."""
    return digest_file(file).xxh3_128
