"""The header of one safetensors file: read, checked, and told as rows.

It accepts nothing that the reference library refuses, and refuses a little more: a name that
occurs twice, keys that the format does not know, tensors written as JSON arrays, and dtypes
written as objects.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..errors import CheckpointError, nearest
from .dtypes import DTYPES
from .reading import FileState, open_regular, state_of

MAX_HEADER = 100_000_000
"""Bytes: the format's limit; checked before anything of that size is allocated."""

Row = tuple[str, str, tuple[int, ...], int, int]
"""A tensor's name, dtype, shape, start and nbytes."""

_LIMIT = 2**64
_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
_EXPECTED = list(_ENTRY_KEYS)
_LARGE = 16 << 20  # bytes: above, a header's form is looked at before objects are made of it


class Header(NamedTuple):
    """What a file's header says.

    Attributes:
        rows: the tensors in file order, the same list for the same header.
        metadata: `__metadata__`, empty if there is none.
        state: which file it was read from, and in which state.
    """

    rows: list[Row]
    metadata: dict[str, str]
    state: FileState


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: not safetensors, or not sound: see `docs/checkpoints.md` for every reason.
        OSError: the file cannot be read, or is no regular file.
    """
    descriptor = open_regular(file)
    try:
        state = state_of(descriptor)
        prefix = os.pread(descriptor, 9, 0)
        size = state.size
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
        read_into(descriptor, memoryview(header), 8, file)
    finally:
        os.close(descriptor)
    collects = gc.isenabled()
    if length > _LARGE:  # looking for cycles among millions of objects takes longer than all else
        gc.disable()
    try:
        rows, metadata = _parse_header(bytes(header), size - 8 - length)
    except _HeaderError as error:
        raise CheckpointError(f"{file}: {error}") from error.__cause__
    except RecursionError:
        raise CheckpointError(f"{file}: the header is nested too deeply") from None
    finally:
        if collects:
            gc.enable()
    return Header(rows, dict(metadata), state)


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the name {key!r} occurs twice")
        self.key = key


def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its pairs; raises `DuplicateKeyError` where a key occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
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
def _parse_header(header: bytes, data_size: int) -> tuple[list[Row], dict[str, str]]:
    """The tensors, in file order, and the metadata."""
    if len(header) > _LARGE:
        _must_be_flat(header)
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
        content = without_duplicates(pairs)
        metadata = content.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if isinstance(metadata, tuple):
            metadata = without_duplicates(metadata)
    except DuplicateKeyError as error:
        _refuse(f"the header has the name {error.key!r} twice")
    except ValueError as error:
        _refuse(f"the header is not JSON: {error}")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse("the header's __metadata__ is not an object of strings")

    data_start = 8 + len(header)
    found: list[Row] = []
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
            _refuse(f"tensor {name!r} has the shape {_said(shape)}, more than 2^64 bits")
        if bits % 8:
            _refuse(f"tensor {name!r} has {elements} elements of {dtype.name}: no whole bytes")
        if bits // 8 != nbytes:
            _refuse(
                f"tensor {name!r} of dtype {dtype.name} and shape {_said(shape)} needs "
                f"{bits // 8} bytes, but its data_offsets span {nbytes}"
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


_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_VALUE = rb"(?:%s|\[[0-9,\s.eE+-]{0,65536}\]|[a-z0-9.E+-]{1,40})" % _STRING
_FIELD = rb"\s*+%s\s*+:\s*+%s\s*+" % (_STRING, _VALUE)
_MEMBER = re.compile(
    rb"\s*+(?:%s\s*+:\s*+\{(?:%s(?:,%s){0,2}|\s*+)\}|"
    rb'"__metadata__"\s*+:\s*+(?:null|\{(?:%s(?:,%s){0,99999}+)?\s*+\}))\s*+([,}])'
    % (_STRING, _FIELD, _FIELD, _FIELD, _FIELD), re.DOTALL,
)  # fmt: skip


def is_taken(header: bytes) -> bool:
    """Whether a header has the length and form that `read_header` takes."""
    try:
        if len(header) > _LARGE:
            _must_be_flat(header)
    except _HeaderError:
        return False
    return len(header) <= MAX_HEADER


def _must_be_flat(header: bytes) -> None:
    """Refuse what is no object of small flat objects, before other objects take 30 times its size.

    Millions of lists within lists would be parsed for many seconds, to be refused all the same.
    """
    position, follows = header.find(b"{") + 1, b","
    while position and follows == b",":
        member = _MEMBER.match(header, position)
        if member is None:
            break
        position, follows = member.end(), member[1]
    if follows == b"," and header[position:].strip() != b"}":
        _refuse(f"the header is no object of tensors: what stands at its byte {position} is none")


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
        fields = without_duplicates(entry)
    except DuplicateKeyError as error:
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
