"""Open a checkpoint by its headers alone: one safetensors file, a sharded folder, or an index.

The header reader accepts nothing that the reference library refuses, and refuses a little more:
a name that occurs twice, keys that the format does not know, tensors written as JSON arrays, and
dtypes written as objects.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .dtypes import DTYPES, numpy_dtype
from .errors import CheckpointError, listed, nearest

MAX_HEADER = 100_000_000
"""Bytes: the format's limit; checked before anything of that size is allocated."""

HeaderRow = tuple[str, str, tuple[int, ...], int, int]
"""A tensor's name, dtype, shape, start and nbytes."""

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_PREFERRED_INDEXES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
)
_FOREIGN_INDEXES = (".bin.index.json", ".msgpack.index.json", ".h5.index.json")
_LIMIT = 2**64
_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
_EXPECTED = list(_ENTRY_KEYS)

StrPath = str | os.PathLike[str]


class TensorInfo(NamedTuple):  # quicker to make than a dataclass: there may be 100,000
    """Where one tensor lies.

    Attributes:
        name: its name in the checkpoint.
        dtype: its safetensors dtype, such as `BF16` (see `modelsoup.dtypes.DTYPES`).
        shape: its shape; `()` is a scalar.
        file: the file that holds it.
        start: offset of its first byte in that file.
        nbytes: how many bytes it has.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return self.nbytes * 8 // DTYPES[self.dtype].bits

    @property
    def stop(self) -> int:
        """Offset just past its last byte in the file."""
        return self.start + self.nbytes


class Checkpoint(Mapping[str, np.ndarray]):
    """A checkpoint whose headers were read; a tensor's bytes are read when it is asked for.

    It is a mapping from names to arrays: `checkpoint["conv.weight"]` reads that tensor, in its
    stored dtype (bfloat16 and float8 as `ml_dtypes` types).

    Attributes:
        path: what was opened, a file or a folder.
        files: the safetensors files, in the order of the index or of their names.
        tensors: name → `TensorInfo`, in file order.
        metadata: the `__metadata__` of the first file.
        is_folder: whether a model folder (or its index) was opened, not a single file.
        key: what stands for its content in lineages, in place of its digest; for merges of a tree,
            which have the same lineage whether or not what they merge was ever written.
        digest: the XXH3-128 digest that lineages will have, where it is known beforehand.
    """

    key: str | None = None
    digest: str | None = None

    def __init__(
        self, path: Path, files: tuple[Path, ...], tensors: dict[str, TensorInfo],
        metadata: dict[str, str], *, is_folder: bool,
    ) -> None:  # fmt: skip
        self.path = path
        self.files = files
        self.tensors = tensors
        self.metadata = metadata
        self.is_folder = is_folder

    @property
    def name(self) -> str:
        """The file's or folder's name, without its path."""
        return self.path.resolve().name if self.path.name in ("", "..") else self.path.name

    @property
    def companions(self) -> Path | None:
        """The folder whose config and other files go along with the weights, if there is one."""
        return self.path if self.path.is_dir() else None

    def bytes_to_read(self, info: TensorInfo) -> int:
        """How many bytes are read to have one of its tensors."""
        return info.nbytes

    @property
    def nbytes(self) -> int:
        """The tensors' bytes, headers not counted."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """How many elements all tensors have together."""
        return sum(info.elements for info in self.tensors.values())

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.tensors.get(name)
        if info is None:
            raise KeyError(f"{self.path} has no tensor {name!r}{nearest(name, self.tensors)}")
        buffer = bytearray(info.nbytes)
        with info.file.open("rb", buffering=0) as file:
            read_into(file.fileno(), memoryview(buffer), info.start, info.file)
        try:
            return np.frombuffer(buffer, numpy_dtype(info.dtype)).reshape(info.shape)
        except ValueError:  # an empty tensor may have a size that no array can have
            raise CheckpointError(
                f"{info.file}: no array can have the shape {list(info.shape)} of tensor {name!r}"
            ) from None

    def __eq__(self, other: object) -> bool:
        """Whether both are the same tensors of the same files; `soup diff` compares values."""
        if not isinstance(other, Checkpoint):
            return NotImplemented
        return (self.path, self.tensors, self.metadata) == (
            other.path, other.tensors, other.metadata,
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash(self.path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {len(self)} tensors, {self.nbytes} bytes>"


def open_checkpoint(path: StrPath) -> Checkpoint:
    """Open a checkpoint, reading headers only.

    Args:
        path: a `.safetensors` file; a `*.safetensors.index.json`; or a folder that holds an index,
            or one or several `.safetensors` files without one.

    Raises:
        CheckpointError: missing, damaged, ambiguous, or not safetensors.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.name.endswith(".index.json"):
            return _open_index(path.parent, path)
        return _open_files(path, [path], is_folder=False)
    except FileNotFoundError as error:
        missing = Path(error.filename or path)
        folder = missing.parent
        readable = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
        beside = [p.name for p in folder.iterdir() if p != missing] if readable else []
        raise CheckpointError(f"{missing} does not exist{nearest(missing.name, beside)}") from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read {error.filename or path}: {error.strerror or error}"
        ) from error


def _open_folder(folder: Path) -> Checkpoint:
    indexes = sorted(
        index for index in folder.glob("*.index.json") if not index.name.endswith(_FOREIGN_INDEXES)
    )
    files = sorted(folder.glob("*" + SUFFIX))
    by_name = {index.name: index for index in indexes}
    chosen = next((by_name[name] for name in _PREFERRED_INDEXES if name in by_name), None)
    if chosen is None and len(indexes) > 1:
        raise CheckpointError(
            f"{folder} has {len(indexes)} indexes ({listed([i.name for i in indexes])}): "
            f"give the path of the one to use"
        )
    chosen = chosen or (indexes[0] if indexes else None)
    if chosen is not None:
        rival = folder / chosen.name.removesuffix(".index.json")
        if rival.exists():
            raise CheckpointError(
                f"{folder} holds two checkpoints, {rival.name} and {chosen.name}: "
                f"give the path of the one to use"
            )
        return _open_index(folder, chosen)
    if not files:
        hint = _unconverted(folder)
        raise CheckpointError(f"{folder} holds no .safetensors file and no index{hint}")
    return _open_files(folder, files, is_folder=True)


def _unconverted(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    return f" (convert {pickles[0]} with `soup convert` first)" if pickles else ""


def read_index(index: Path) -> dict[str, Path]:
    """Which shard holds each tensor, from an index as Hugging Face writes it.

    Raises:
        CheckpointError: not an index, a tensor twice, or a shard that is missing or outside the
            index's folder.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=_without_duplicates)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{index}: tensor {error.key!r} occurs twice in the index") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not JSON: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{index} has no 'weight_map' from tensor names to shard files, as an index has"
        )
    if not weight_map:
        raise CheckpointError(f"{index} names no tensors")
    shards: dict[str, Path] = {}
    for shard in dict.fromkeys(weight_map.values()):
        pure = PurePosixPath(shard)
        # A link inside the folder is followed (the Hugging Face cache is made of them); a path
        # that leaves the folder by its name is not.
        if pure.is_absolute() or ".." in pure.parts or "\\" in shard or not pure.parts:
            raise CheckpointError(f"{index} names a shard outside its folder: {shard!r}")
        shards[shard] = index.parent / pure
        if not shards[shard].is_file():
            beside = [p.name for p in index.parent.glob("*" + pure.suffix)]
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not there{nearest(shard, beside)}"
            )
    return {name: shards[shard] for name, shard in weight_map.items()}


def _open_index(folder: Path, index: Path) -> Checkpoint:
    places = read_index(index)
    checkpoint = _open_files(folder, sorted(set(places.values())), is_folder=True)
    absent = [name for name, file in places.items() if not _lies_in(checkpoint, name, file)]
    if absent:
        raise CheckpointError(
            f"{index} places {len(absent)} tensors in shards that do not hold them: "
            f"{listed(absent)}"
        )
    unlisted = [name for name in checkpoint.tensors if name not in places]
    if unlisted:
        raise CheckpointError(
            f"{index} does not list {len(unlisted)} tensors that its shards hold: "
            f"{listed(unlisted)} (are shards of another checkpoint left in the folder?)"
        )
    return checkpoint


def _lies_in(checkpoint: Checkpoint, name: str, file: Path) -> bool:
    info = checkpoint.tensors.get(name)
    return info is not None and info.file == file


def _open_files(path: Path, files: list[Path], *, is_folder: bool) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    for file in files:
        in_file, file_metadata = read_header(file)
        metadata = file_metadata if metadata is None else metadata
        twice = [name for name in in_file if name in tensors]
        if twice:
            raise CheckpointError(
                f"{path}: {len(twice)} tensors are both in {tensors[twice[0]].file.name} and in "
                f"{file.name} ({listed(twice)}): give the path of the file to use"
            )
        tensors.update(in_file)
    return Checkpoint(path, tuple(files), tensors, metadata or {}, is_folder=is_folder)


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(f"the name {key!r} occurs twice")
        self.key = key


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def _integer(text: str) -> int | float:
    """An integer; minus zero, which no unsigned field may be, as a float."""
    return -0.0 if text == "-0" else int(text)


def _said(value: object) -> str:
    """A field of a tensor as an error shows it; objects were parsed to tuples of pairs."""
    return "an object" if isinstance(value, tuple) else str(value)[:60]


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Returns:
        the tensors in file order, and `__metadata__` (empty if there is none).

    Raises:
        CheckpointError: not safetensors, or not sound: see `docs/checkpoints.md` for every reason.
        OSError: the file cannot be read.
    """
    rows, metadata = header_rows(file)
    tensors = {
        name: TensorInfo(name, dtype, shape, file, start, nbytes)
        for name, dtype, shape, start, nbytes in rows
    }
    return tensors, dict(metadata)


def header_rows(file: Path) -> tuple[list[HeaderRow], dict[str, str]]:
    """As `read_header`, but the tensors as plain rows, the same list for the same header.

    Raises:
        CheckpointError, OSError: see `read_header`.
    """
    if not stat.S_ISREG(file.stat().st_mode):  # to open a pipe would wait for who writes to it
        raise CheckpointError(f"{file} is not a regular file")
    with file.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(9)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{file} is not a safetensors file: it has {size} bytes, fewer than the 8 of a "
                f"header's length{_hint(prefix)}"
            )
        length = int.from_bytes(prefix[:8], "little")
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{file} is not a safetensors file: its first 8 bytes give a header of {length} "
                f"bytes, over the limit of {MAX_HEADER}{_hint(prefix)}"
            )
        if length > size - 8:
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file: its header should have {length} "
                f"bytes, but only {size - 8} follow{_hint(prefix)}"
            )
        header = bytearray(length)
        read_into(stream.fileno(), memoryview(header), 8, file)
    try:
        return _parse_header(bytes(header), size - 8 - length)
    except _HeaderError as error:
        raise CheckpointError(f"{file}: {error}") from error.__cause__
    except RecursionError:
        raise CheckpointError(f"{file}: the header is nested too deeply") from None


def _hint(prefix: bytes) -> str:
    """What a file may be, from its first 9 bytes; none if a safetensors header begins there."""
    if prefix[8:] == b"{":
        return ""
    if prefix[:2] == b"PK" or prefix[:1] == b"\x80":
        return " (it looks like a PyTorch pickle: use `soup convert` first)"
    if prefix[:7] == b"version":
        return " (it looks like a Git LFS pointer: fetch the file itself first)"
    if prefix[:4] == b"GGUF":
        return " (it looks like a GGUF file, which is not supported)"
    return ""


class _HeaderError(Exception):
    """What is wrong with a header."""


def _refuse(reason: str) -> NoReturn:
    raise _HeaderError(reason)


# Models that are merged often have the very same header.
@lru_cache(maxsize=1)
def _parse_header(header: bytes, data_size: int) -> tuple[list[HeaderRow], dict[str, str]]:
    """The tensors, in file order, and the metadata."""
    try:
        # Given as text: from bytes, json would guess UTF-16 and skip a byte order mark. Objects
        # become tuples of pairs, without a call of ours for each: a header may have 100,000.
        pairs = json.loads(
            header.decode("utf-8"), object_pairs_hook=tuple, parse_constant=_no_constant,
            parse_int=_integer if b"-0" in header else None,
        )  # fmt: skip
        if b"\\u" in header:
            _check_unicode(pairs)
        if not isinstance(pairs, tuple):
            _refuse(f"the header is a JSON {type(pairs).__name__}, not an object")
        content = _without_duplicates(pairs)
        metadata = content.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if isinstance(metadata, tuple):
            metadata = _without_duplicates(metadata)
    except _DuplicateKeyError as error:
        _refuse(f"the header has the name {error.key!r} twice")
    except ValueError as error:
        _refuse(f"the header is not JSON: {error}")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse("the header's __metadata__ is not an object of strings")

    data_start = 8 + len(header)
    found: list[HeaderRow] = []
    for name, entry in content.items():
        try:
            (key_0, dtype_name), (key_1, shape), (key_2, offsets) = entry
            # A JSON array of arrays would unpack in the same way.
            usual = type(entry) is tuple and (key_0, key_1, key_2) == _ENTRY_KEYS
        except (TypeError, ValueError):
            usual = False
        if not usual:
            dtype_name, shape, offsets = _fields(name, entry)
        dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
        if dtype is None:
            known = nearest(_said(dtype_name), DTYPES)
            said = repr(dtype_name) if isinstance(dtype_name, str) else _said(dtype_name)
            _refuse(f"tensor {name!r} has the unknown dtype {said}{known}")
        if not _unsigned_list(shape):
            _refuse(f"tensor {name!r} has the shape {_said(shape)}, not a list of sizes")
        if not _unsigned_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            _refuse(f"tensor {name!r} has the data_offsets {_said(offsets)}, not [start, end]")
        elements = 1
        for length in shape:
            elements *= length
            if elements >= _LIMIT:  # in the middle too: the reference counts in 64 bits
                break
        bits, nbytes = elements * dtype.bits, offsets[1] - offsets[0]
        if bits >= _LIMIT:
            _refuse(f"tensor {name!r} has the shape {str(shape)[:60]}, more than 2^64 bits")
        if bits % 8:
            _refuse(f"tensor {name!r} has {elements} elements of {dtype.name}: no whole bytes")
        if bits // 8 != nbytes:
            _refuse(
                f"tensor {name!r} of dtype {dtype.name} and shape {shape} needs {bits // 8} bytes, "
                f"but its data_offsets span {nbytes}"
            )
        start = data_start + offsets[0]
        found.append((name, dtype.name, tuple(shape), start, nbytes))

    found.sort(key=itemgetter(3, 4))
    position = data_start
    for name, _, _, start, nbytes in found:
        if start != position:
            fault = "overlaps the tensor before it" if start < position else "leaves a hole"
            _refuse(f"tensor {name!r} {fault}: it starts at byte {start}, not {position}")
        position += nbytes
    if position != data_start + data_size:
        short = data_start + data_size - position
        if short < 0:
            _refuse(
                f"truncated: {-short} bytes of tensor data are missing from the end of the file"
            )
        _refuse(f"{short} bytes at the end of the file belong to no tensor")
    return found, metadata


def _unsigned_list(value: object) -> bool:
    if type(value) is not list:
        return False
    for item in value:  # noqa: SIM110  # three times as fast as all(…), and called this often
        if type(item) is not int or not 0 <= item < _LIMIT:
            return False
    return True


def _fields(name: str, entry: object) -> tuple[Any, ...]:
    """A tensor's dtype, shape and offsets, in whatever order its entry has them."""
    if not isinstance(entry, tuple):
        _refuse(f"tensor {name!r} has {type(entry).__name__} where {_EXPECTED} were expected")
    try:
        fields = _without_duplicates(entry)
    except _DuplicateKeyError as error:
        _refuse(f"the header has the name {error.key!r} twice")
    if fields.keys() != set(_ENTRY_KEYS):
        _refuse(f"tensor {name!r} has {sorted(fields)} where {_EXPECTED} were expected")
    return tuple(fields[key] for key in _ENTRY_KEYS)


def _check_unicode(content: object) -> None:
    """Refuse lone surrogates, which an escape can spell and no UTF-8 text can hold."""
    json.dumps(content, ensure_ascii=False).encode("utf-8")


def read_into(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill `buffer` from `offset` of an open file.

    Raises:
        CheckpointError: the file ended first: it was truncated after it was opened.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{file} ended at byte {offset + done}, before the {len(buffer)} bytes that its "
                f"header places at {offset}: it was truncated while it was read"
            )
        done += count
