"""Write a checkpoint so that a reader sees all of it or none.

The header comes first, tensors are written to their places in any order, and everything happens
under a temporary name beside the output (`.NAME.XXXXXXXX.soup-partial`) until it is flushed and
renamed. The writer holds a lock on its temporary; one without a lock was left by a process that
was killed, and the next run to the same output removes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from .checkpoint import INDEX_SUFFIX, SUFFIX, StrPath
from .dtypes import DTYPES
from .errors import OutputError, ParameterError

PARTIAL_SUFFIX = ".soup-partial"
REPLACED_SUFFIX = ".soup-replaced"
LINEAGE_KEY = "modelsoup"

_WEIGHTS = frozenset(
    [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".gguf",
        ".onnx",
        ".ot",
        ".pb",
        ".tflite",
        ".mlmodel",
    ]
)
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
    """One file of the output: its name in the output folder and its tensors in file order."""

    name: str
    tensors: tuple[OutputTensor, ...]


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


def header_bytes(file: OutputFile, metadata: Mapping[str, str], *, least: int = 0) -> bytes:
    """The header of one file, with its length before it, padded to 8 bytes and to `least` bytes."""
    content: dict[str, object] = {}
    if metadata:
        content["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for tensor in file.tensors:
        stop = offset + tensor.nbytes
        content[tensor.name] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, stop),
        }  # fmt: skip
        offset = stop
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(max(len(text) + -len(text) % 8, least - 8))
    return struct.pack("<Q", len(text)) + text


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

    Raises:
        OutputError: it exists, its folder is missing or cannot be written to, or the disk is full.
    """

    def __init__(
        self, output: StrPath, files: Sequence[OutputFile], metadata: Mapping[str, str], *,
        force: bool = False, fsync: bool = True, copy_from: Path | None = None,
    ) -> None:  # fmt: skip
        self.output = Path(output)
        self.is_folder = self.output.suffix != SUFFIX
        self._files = {file.name: file for file in files}
        self._metadata = dict(metadata)
        self._force = force
        self._fsync = fsync
        self._copy_from = copy_from
        self._descriptors: dict[str, int] = {}
        self._data_starts: dict[str, int] = {}
        self._lock: int | None = None
        self._partial = self._new_partial()

    def _new_partial(self) -> Path:
        return self.output.with_name(f".{self.output.name}.{os.urandom(4).hex()}{PARTIAL_SUFFIX}")

    def __enter__(self) -> Self:
        check_output(self.output, force=self._force)
        remove_stale(self.output)
        headers = {n: header_bytes(f, self._metadata) for n, f in self._files.items()}
        sizes = {
            n: len(headers[n]) + sum(t.nbytes for t in f.tensors) for n, f in self._files.items()
        }
        free = shutil.disk_usage(self.output.parent).free
        if sum(sizes.values()) > free:
            raise OutputError(
                f"{self.output} needs {sum(sizes.values()) / 1e9:.2f} GB, but the disk has only "
                f"{free / 1e9:.2f} GB free"
            )
        try:
            while not self._claim():
                self._partial = self._new_partial()
            for name in self._files:
                created = os.O_CREAT | os.O_EXCL if self.is_folder else 0
                descriptor = os.open(self.path(name), os.O_RDWR | created, 0o666)
                self._descriptors[name] = descriptor
                os.ftruncate(descriptor, sizes[name])
                self._data_starts[name] = len(headers[name])
                self._pwrite(name, memoryview(headers[name]), 0)
            if self._copy_from is not None:
                copy_companions(self._copy_from, self._partial, without=self.output)
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise self._output_error(error) from error
            raise
        return self

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
        """Replace `__metadata__`, by one whose header is not longer.

        Raises:
            ValueError: the new header is longer.
        """
        for name, file in self._files.items():
            header = header_bytes(file, metadata, least=self._data_starts[name])
            if len(header) != self._data_starts[name]:
                raise ValueError(f"the header of {name} would be longer than it was")
            self._pwrite(name, memoryview(header), 0)
        self._metadata = dict(metadata)

    def commit(self) -> None:
        """Flush everything and rename it into place.

        Raises:
            OutputError: the output appeared meanwhile, or the disk is full.
        """
        try:
            if self.is_folder and len(self._files) > 1:
                self._write_index()
            for descriptor in self._descriptors.values():
                if self._fsync:
                    os.fsync(descriptor)
            if self._fsync and self.is_folder:
                _fsync_folder(self._partial)
            check_output(self.output, force=self._force)
            if self.is_folder:
                replace_folder(self._partial, self.output)
            else:
                os.replace(self._partial, self.output)
            if self._fsync:
                _fsync_folder(self.output.parent)
        except OSError as error:
            raise self._output_error(error) from error

    def _write_index(self) -> None:
        names = list(self._files)
        stem = names[0].rsplit("-", 3)[0]
        weight_map = {t.name: n for n, f in self._files.items() for t in f.tensors}
        total = sum(t.nbytes for f in self._files.values() for t in f.tensors)
        content = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        path = self._partial / (stem + INDEX_SUFFIX)
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            if self._fsync:
                os.fsync(file.fileno())

    def _discard(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        _remove(self._partial)  # gone already when it was committed
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_output(output: Path, *, force: bool) -> None:
    """Whether an output may be written.

    Raises:
        OutputError: its folder is missing or cannot be written to; it exists and `force` is not
            given; or it is a folder that modelsoup did not write.
    """
    parent = output.parent
    if output.is_dir() and output.samefile(os.curdir):
        raise OutputError(f"the output {output} is the current folder: name a folder in it")
    if output.name in ("", ".."):
        raise OutputError(f"the output {output} has no name of its own: name a file or a folder")
    if not parent.is_dir():
        raise OutputError(f"the folder {parent} of the output {output.name} does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {parent} of the output {output.name} is not writable")
    is_folder = output.suffix != SUFFIX
    if is_folder and output.is_dir():
        if not any(output.iterdir()):
            return
        if not force:
            raise OutputError(f"the folder {output} exists and is not empty (--force replaces it)")
        if not _was_written_by_us(output):
            raise OutputError(
                f"the folder {output} was not written by modelsoup, so --force does not replace it:"
                f" remove it yourself or name another output"
            )
    elif output.is_dir() or (is_folder and output.exists()):
        other = "folder" if output.is_dir() else "file"
        raise OutputError(
            f"{output} is a {other}: an output that ends in {SUFFIX} is a file, any other a folder"
        )
    elif output.exists() and not force:
        raise OutputError(f"{output} exists (--force replaces it)")


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
    from .checkpoint import open_checkpoint
    from .errors import CheckpointError

    try:
        return LINEAGE_KEY in open_checkpoint(folder).metadata
    except CheckpointError:
        return False


def remove_stale(output: Path) -> list[Path]:
    """Remove temporaries that killed runs left for this output; those in use are locked."""
    removed = []
    suffixes = [PARTIAL_SUFFIX]
    if output.exists():  # else a replaced folder may be the only copy left: see replace_folder
        suffixes.append(REPLACED_SUFFIX)
    # Not a glob: `.model.*` would find the temporaries of `model.v2` too.
    ours = re.compile(
        rf"\.{re.escape(output.name)}\.[0-9a-f]{{8}}({'|'.join(map(re.escape, suffixes))})"
    )
    for path in sorted(p for p in output.parent.iterdir() if ours.fullmatch(p.name)):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # its owner finished between the listing and now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
            removed.append(path)
        except (BlockingIOError, PermissionError):  # it is in use, or another user's
            continue
        finally:
            os.close(descriptor)
    return removed


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(partial: Path, output: Path) -> None:
    """Put a finished folder in its place; an old one there is lost only once the new one stands."""
    if not output.exists():
        os.rename(partial, output)
        remove_stale(output)  # one that a kill left, as below
        return
    # A kill between the two renames leaves the old folder under a name that is not cleaned away
    # until a new output stands in its place.
    old = partial.with_name(f".{output.name}.{os.urandom(4).hex()}{REPLACED_SUFFIX}")
    os.rename(output, old)
    os.rename(partial, output)
    _remove(old)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_companions(source: Path, target: Path, *, without: Path | None = None) -> list[str]:
    """Copy a model folder's other files (config, tokenizer, …), subfolders included.

    Left out: weights in any format and their indexes, hidden files, links to folders (which could
    lead round in circles), and the model card (`README.md`), which describes the other model.

    Args:
        source: the model folder.
        target: where the copies go.
        without: a folder to leave out: the output, where it lies in the model folder.

    Returns:
        the copied files' paths, relative to `source`.
    """
    copied = []
    for path in companions(source, without=without):
        relative = path.relative_to(source)
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
        copied.append(str(relative))
    return copied


def companions(source: Path, *, without: Path | None = None) -> Iterator[Path]:
    """The files that `copy_companions` copies, in order."""
    left_out = None if without is None else without.resolve()
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and Path(folder, name).resolve() != left_out
        )
        for name in sorted(files):
            path = Path(folder) / name
            if (
                name.startswith(".")
                or name.lower() == "readme.md"
                or name.endswith(".index.json")
                or path.suffix.lower() in _WEIGHTS
            ):
                continue
            yield path
