"""Write a checkpoint so that a reader sees all of it or none.

The header comes first, tensors are written to their places in any order, and everything happens
under a temporary name beside the output (`.NAME.XXXXXXXX.soup-partial`) until it is flushed and
renamed. The writer holds a lock on its temporary; one without a lock was left by a process that
was killed, and the next run to the same output removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ..errors import OutputError, ParameterError, counted, sized
from .checkpoint import KNOWN_STEMS, SUFFIX, Part, StrPath
from .companions import copy_companions
from .dtypes import DTYPES
from .header import MAX_HEADER, is_taken
from .placing import (
    PARTIAL_SUFFIX,
    check_output,
    flush,
    flush_one,
    place,
    remove,
    remove_stale,
    temporary,
)

_CHUNK = 8 << 20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


class OutputTensor(NamedTuple):
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        elements = 1
        for length in self.shape:
            elements *= length
        return elements * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of the output.

    Attributes:
        name: its name in the output folder, with the way to it.
        tensors: in file order.
        prefix: what their names begin with, but not in the file: that of its part.
    """

    name: str
    tensors: tuple[OutputTensor, ...]
    prefix: str = ""


def parse_size(text: str | int) -> int:
    """Bytes from `5GB`, `250MB`, `1GiB` or a plain number; GB is 10^9 as Hugging Face counts.

    Raises:
        ParameterError: not a size, or not positive.
    """
    stripped = str(text).strip().upper().replace(" ", "")
    digits = stripped.rstrip("BKMGTI")
    unit = stripped[len(digits) :]
    try:
        size = int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ParameterError(f"size {text!r} is not a size such as 5GB, 250MB or 1GiB") from None
    if size <= 0:
        raise ParameterError(f"size {text!r} must be positive")
    return size


def layout(
    tensors: Iterable[OutputTensor], *, file_name: str, shard_size: int | None
) -> list[OutputFile]:
    """Divide tensors into files, in the reference library's order within each.

    That order is by dtype, the widest first, then by name. Shards are filled one after the other,
    in the order of `tensors`, up to `shard_size` bytes; a tensor that is larger has a shard of its
    own. Shards are named as Hugging Face names them, `model-00001-of-00003.safetensors`.
    """
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shard_size is not None and groups[-1] and filled + tensor.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    stem = file_name.removesuffix(SUFFIX)
    total = len(groups)
    return [
        OutputFile(
            file_name if total == 1 else f"{stem}-{number:05d}-of-{total:05d}{SUFFIX}",
            tuple(sorted(group, key=lambda t: (-DTYPES[t.dtype].rank, t.name.encode()))),
        )
        for number, group in enumerate(groups, 1)
    ]


def layout_parts(
    tensors: Sequence[OutputTensor], parts: Sequence[Part], *, shard_size: int | None
) -> list[OutputFile]:
    """As `layout`, for a folder with weights in several folders: the files of one after the other.

    Args:
        tensors: all that is written; each belongs to the part with the longest prefix that its name
            begins with.
        parts: which there may be; one without tensors has no file.
        shard_size: as in `layout`.
    """
    of_part: dict[Part, list[OutputTensor]] = {part: [] for part in parts}
    if len(parts) == 1:
        of_part[parts[0]] = list(tensors)
        tensors = ()
    by_length = sorted(parts, key=lambda part: -len(part.prefix))
    for tensor in tensors:
        of_part[next(p for p in by_length if tensor.name.startswith(p.prefix))].append(tensor)
    return [
        OutputFile(part.prefix + file.name, file.tensors, part.prefix)
        for part, inside in of_part.items() if inside or len(parts) == 1
        for file in layout(inside, file_name=part.stem + SUFFIX, shard_size=shard_size)
    ]  # fmt: skip


def header_bytes(file: OutputFile, metadata: Mapping[str, str], *, least: int = 0) -> bytes:
    """The header of one file, with its length before it, padded to 8 bytes and to `least` bytes."""
    content: dict[str, object] = {}
    if metadata:
        content["__metadata__"] = dict(sorted(metadata.items()))
    offset, skipped = 0, len(file.prefix)
    for tensor in file.tensors:
        stop = offset + tensor.nbytes
        content[tensor.name[skipped:]] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, stop),
        }  # fmt: skip
        offset = stop
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(max(len(text) + -len(text) % 8, least - 8))
    return struct.pack("<Q", len(text)) + text


def index_name(stem: str) -> str:
    """What Hugging Face calls the index of shards: a variant is named at its end."""
    known, _, variant = stem.rpartition(".")
    if known in KNOWN_STEMS:
        return f"{known}{SUFFIX}.index.{variant}.json"
    return f"{stem}{SUFFIX}.index.json"


class CheckpointWriter:
    """Writes one checkpoint, a file or a folder; use it in a `with` statement.

    Leaving the block by an exception removes what was written. `commit()` flushes it, moves it
    into place, and must be the last call.

    Args:
        output: a path that ends in `.safetensors` makes a file, any other a folder.
        files: what to write, from `layout`; several only for a folder.
        metadata: `__metadata__` of every file. `update_metadata` may replace it later by one whose
            header is not longer.
        force: replace an existing output. A folder is replaced only if modelsoup wrote it.
        fsync: flush to the disk before the rename. Without, a power cut can leave a broken file.
        copy_from: a model folder whose other files (config, tokenizer, …) go along.
        parts_from: prefix of a part → the folder whose other files go along with it.

    Raises:
        OutputError: it exists, its folder is missing or cannot be written to, or the disk is full.
    """

    def __init__(
        self, output: StrPath, files: Sequence[OutputFile], metadata: Mapping[str, str], *,
        force: bool = False, fsync: bool = True, copy_from: Path | None = None,
        parts_from: Mapping[str, Path] | None = None,
    ) -> None:  # fmt: skip
        self.output = Path(output)
        self.is_folder = self.output.suffix != SUFFIX
        self._files = {file.name: file for file in files}
        self._metadata = dict(metadata)
        self._force = force
        self._fsync = fsync
        self._copy_from = {**({} if copy_from is None else {"": copy_from}), **(parts_from or {})}
        self._descriptors: dict[str, int] = {}
        self._data_starts: dict[str, int] = {}
        self._lock: int | None = None
        self._partial = self._new_partial()

    def _new_partial(self) -> Path:
        return temporary(self.output, PARTIAL_SUFFIX)

    def __enter__(self) -> Self:
        check_output(self.output, force=self._force)
        remove_stale(self.output)
        headers = {name: self._header(name, self._metadata) for name in self._files}
        sizes = {
            n: len(headers[n]) + sum(t.nbytes for t in f.tensors) for n, f in self._files.items()
        }
        free = shutil.disk_usage(self.output.parent).free
        if sum(sizes.values()) > free:
            raise OutputError(
                f"{self.output} needs {sized(sum(sizes.values()))}, but the disk has only "
                f"{sized(free)} free"
            )
        try:
            while not self._claim():
                self._partial = self._new_partial()
            for name in self._files:
                self.path(name).parent.mkdir(exist_ok=True)
                created = os.O_CREAT | os.O_EXCL if self.is_folder else 0
                descriptor = os.open(self.path(name), os.O_RDWR | created, 0o666)
                self._descriptors[name] = descriptor
                os.ftruncate(descriptor, sizes[name])
                self._data_starts[name] = len(headers[name])
                self._pwrite(name, memoryview(headers[name]), 0)
            for prefix, folder in self._copy_from.items():
                copy_companions(folder, self._partial / prefix, without=self.output)
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise self._output_error(error) from error
            raise
        return self

    def _header(self, file_name: str, metadata: Mapping[str, str], *, least: int = 0) -> bytes:
        header = header_bytes(self._files[file_name], metadata, least=least)
        if len(header) - 8 > MAX_HEADER:
            raise OutputError(
                f"the header of {file_name} in {self.output} would have {len(header):,} bytes, "
                f"more than the {MAX_HEADER:,} that a reader takes"
            )
        if not is_taken(header[8:]):
            raise OutputError(
                f"the header of {file_name} in {self.output} would have {len(header):,} bytes and "
                f"{counted(len(metadata), 'key')} of metadata, more than a reader takes"
            )
        return header

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._discard()

    def _claim(self) -> bool:
        """Create the temporary and lock it; false if another run took it for a stray meanwhile."""
        if self.is_folder:
            self._partial.mkdir()
            self._lock = os.open(self._partial, os.O_RDONLY)
        else:
            self._lock = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # waits only for who is about to remove it
        try:
            if os.path.samestat(os.fstat(self._lock), os.stat(self._partial)):
                return True
        except FileNotFoundError:
            pass
        os.close(self._lock)
        self._lock = None
        return False

    def path(self, file_name: str) -> Path:
        """Where a file of the output is until `commit`."""
        return self._partial / file_name if self.is_folder else self._partial

    def _output_error(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"the disk is full: {self.output} was not written")
        if error.errno == errno.EFBIG:
            return OutputError(f"{self.output} is larger than a file may be here: not written")
        return OutputError(f"cannot write {self.output}: {error.strerror or error}")

    def _pwrite(self, file_name: str, data: memoryview, offset: int) -> None:
        descriptor = self._descriptors[file_name]
        try:
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise self._output_error(error) from error

    def write(self, file_name: str, data: memoryview, offset: int) -> None:
        """Write bytes at `offset` of a file's data section; any thread, any order."""
        self._pwrite(file_name, data, self._data_starts[file_name] + offset)

    def update_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace `__metadata__`; what was written moves if the header becomes longer.

        Raises:
            OutputError: the disk is full, or the header longer than a reader takes.
        """
        for name in self._files:
            start = self._data_starts[name]
            header = self._header(name, metadata, least=start)
            if len(header) > start:
                self._move_data(name, len(header) - start)
            self._pwrite(name, memoryview(header), 0)
        self._metadata = dict(metadata)

    def _move_data(self, name: str, by: int) -> None:
        """Move a file's data towards its end, the last part first."""
        descriptor, start = self._descriptors[name], self._data_starts[name]
        try:
            end = os.fstat(descriptor).st_size
            while end > start:
                begin = max(start, end - _CHUNK)
                self._pwrite(name, memoryview(os.pread(descriptor, end - begin, begin)), begin + by)
                end = begin
        except OSError as error:
            raise self._output_error(error) from error
        self._data_starts[name] = start + by

    def data(self, file_name: str) -> Iterable[bytes]:
        """What the data section of a file holds, piece by piece."""
        descriptor, position = self._descriptors[file_name], self._data_starts[file_name]
        while piece := os.pread(descriptor, _CHUNK, position):
            yield piece
            position += len(piece)

    def commit(self) -> None:
        """Flush everything and rename it into place.

        Raises:
            OutputError: the output appeared meanwhile, or the disk is full.
        """
        try:
            if self.is_folder:
                self._write_indexes()
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
            if self._fsync:
                flush(self._partial)
            check_output(self.output, force=self._force)
            place(self._partial, self.output, force=self._force)
            if self._fsync:
                flush_one(self.output.parent)
        except OSError as error:
            raise self._output_error(error) from error

    def _write_indexes(self) -> None:
        indexes: dict[Path, list[OutputFile]] = {}
        for name, file in self._files.items():
            numbered = self.path(name)
            stem = numbered.name.rsplit("-", 3)[0]
            if numbered.name != stem:
                indexes.setdefault(numbered.with_name(index_name(stem)), []).append(file)
        for path, files in indexes.items():
            if len(files) < 2:  # a name that looks like a shard's
                continue
            weight_map = {
                tensor.name.removeprefix(file.prefix): Path(file.name).name
                for file in files for tensor in file.tensors
            }  # fmt: skip
            content = {
                "metadata": {"total_size": sum(t.nbytes for f in files for t in f.tensors)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def _discard(self) -> None:
        # What cannot be closed or removed here is of no use to anybody, and the next run to this
        # output removes it. (What was replaced, if anything was, is gone already.)
        descriptors = [*self._descriptors.values(), *([] if self._lock is None else [self._lock])]
        self._descriptors.clear()
        with contextlib.suppress(OSError):
            remove(self._partial)
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._lock = None
