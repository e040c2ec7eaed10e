"""Have torch's weights-only loader read a file, once it is seen to be harmless.

What a file is is told from its first bytes before torch sees it, because torch reads anything that
is no zip file as a pickle and then fails in whatever way its bytes happen to. Then `pickles` goes
through its instructions. The loader refuses classes that it does not know; for each that the file
asks for it is given one of ours, which does nothing.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

from ..errors import CheckpointError, SoupError, listed
from .checkpoint import SUFFIX
from .header import MAX_HEADER
from .pickles import PickleError, Survey, most_bytes
from .reading import open_regular

REMEDY = "if you trust it, load it yourself and `torch.save` its state_dict()"

_REASONS = {
    "code": "{}: " + REMEDY,
    "size": "is not loaded, as it could fill the memory ({}): " + REMEDY,
    "damage": "looks damaged or truncated: {}",
}
# What files of torch < 1.6 begin with, and how many pickles are before their storages: this number,
# a version, the machine, the content, and the storages' keys.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5
# torch's weights-only unpickler is a small stack machine in Python: on damaged bytes it pops from
# empty stacks, looks up absent memos and builds tensors from what is no size. zipfile decodes
# damaged names and meets versions that it does not know.
_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError,
    RuntimeError, TypeError, ValueError, struct.error,
)  # fmt: skip


def load(file: Path) -> tuple[object, os.stat_result]:
    """What a file holds, and which file it was."""
    import torch

    with open(open_regular(file), "rb") as stream:
        status = os.fstat(stream.fileno())
        try:
            survey, mapped = _look(file, stream, status.st_size)
        except PickleError as error:
            raise CheckpointError(f"{file} {_REASONS[error.kind].format(error)}") from None
    try:
        with _standing_in(survey), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that torch may change
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped), status
    except pickle.UnpicklingError as error:
        # It advises to switch the protection off, then says why, then where to read more.
        said = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n\n")
        why = _first_line([p for p in said if not p.startswith("Check the doc")][-1])
        raise CheckpointError(
            f"{file} {_REASONS['code'].format(f'is refused by torch ({why})')}"
        ) from None
    except _DAMAGE as error:
        check_memory(error, f"read {file}")
        raise CheckpointError(
            f"torch cannot read {file}, which looks damaged or truncated "
            f"({type(error).__name__}: {_first_line(str(error))})"
        ) from error


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def check_memory(error: Exception, what: str) -> None:
    """Raise SoupError if it was for want of memory, which torch often tells by a RuntimeError."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        raise SoupError(f"there is not enough memory to {what}") from error


def _look(file: Path, stream: BinaryIO, size: int) -> tuple[Survey, bool]:
    """What loading a file would do, and whether torch may map it.

    Raises:
        CheckpointError: it cannot be one of torch's.
        PickleError: it should not be loaded.
    """
    start = stream.read(64)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        raise CheckpointError(f"{file} is safetensors already: there is nothing to convert")
    is_zip = start.startswith(b"PK\x03\x04")
    if not is_zip and not start.startswith(b"\x80"):
        reason = f"it starts with {start[:12]!r}" if start else "it is empty"
        if start.startswith(b"version https://git-lfs"):
            reason = "it is a Git LFS pointer: fetch the file itself first"
        raise CheckpointError(f"{file} is not a PyTorch checkpoint: {reason}")
    if file.suffix == SUFFIX:
        # torch would go by the name, not by what the file is.
        raise CheckpointError(f"{file} is a PyTorch checkpoint named {SUFFIX}: rename it to .pth")
    survey = Survey(size)
    if is_zip:
        return survey, _look_into_zip(file, stream, survey)
    stream.seek(0)
    if _is_tar(stream.read(tarfile.BLOCKSIZE)):
        # torch < 2.6 would load its pickles with all that is in them.
        raise CheckpointError(f"{file} is a tar file, the oldest of torch's forms: {REMEDY}")
    stream.seek(0)
    survey.read(stream)
    if not start.startswith(_LEGACY):
        raise CheckpointError(f"{file} is a pickle, but none that `torch.save` wrote")
    for _ in range(1, _LEGACY_PICKLES):
        survey.read(stream)
    if sum(survey.storages.values()) > size - stream.tell():
        raise PickleError("damage", "it has fewer bytes than its storages")
    return survey, False


def _is_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "latin1", "strict")
    except tarfile.TarError:
        return False
    return True


def _look_into_zip(file: Path, stream: BinaryIO, survey: Survey) -> bool:
    import torch

    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, *_DAMAGE) as error:
        raise CheckpointError(f"{file} is damaged or truncated: {error}") from error
    # As torch's reader has it: the first entry's folder is the archive's, and case is nothing.
    folder = entries[0].filename.partition("/")[0] + "/" if entries else ""
    sizes = {e.filename.removeprefix(folder).lower(): e.file_size for e in entries}
    if any(name.rpartition("/")[2] == "constants.pkl" for name in sizes):
        raise CheckpointError(f"{file} is a TorchScript archive, which is code: {REMEDY}")
    if "data.pkl" not in sizes:
        raise CheckpointError(f"{file} is a zip file, but not PyTorch's: it has no data.pkl")
    if len(sizes) < len(entries):
        raise PickleError("damage", "two of its entries have one name")
    if sum(sizes.values()) > most_bytes(survey.size):
        raise PickleError("size", f"it expands to {sum(sizes.values()):,} bytes")
    try:
        stream.seek(0)
        reader = torch._C.PyTorchFileReader(stream)
        records = {name.lower() for name in reader.get_all_records()}
        content = reader.get_record("data.pkl") if records == sizes.keys() else b""
    except _DAMAGE as error:
        raise CheckpointError(
            f"{file} is damaged or truncated: {_first_line(str(error))}"
        ) from error
    survey.read(io.BytesIO(content))
    short = [key for key, least in survey.storages.items() if _record(sizes, key) < least]
    if short:
        raise PickleError("damage", f"it has fewer bytes than its storages {listed(short)}")
    # Where another tool has zipped it again, its storages may be compressed: torch would map them
    # as they lie there.
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _record(sizes: Mapping[str, int], key: str) -> int:
    return sizes.get(f"data/{key}".lower(), -1)


class StandIn:
    """Stands for an object: nothing is imported or called, and what it is given is kept.

    It is kept so that tensors in it can be told of.
    """

    __slots__ = ("given",)

    given: list[object]

    def __new__(cls, *given: object) -> Self:
        made = super().__new__(cls)
        made.given = [given]
        return made

    def __setstate__(self, state: object) -> None:
        self.given.append(state)

    def __repr__(self) -> str:
        return f"an object of the class {kind_of(self)}"


def _stand_in(name: str, filled: str | None) -> type:
    """A class of that name, whose results are filled like a `list` or `dict`, or are objects."""
    module, _, short = name.rpartition(".")
    if filled is None:
        return type(short, (StandIn,), {"__module__": module, "__slots__": ()})

    # The loader fills nothing but plain lists and dicts: what is filled must be one.
    def new(cls: type, *given: object) -> object:
        if filled == "list":
            return list(given)
        made: OrderedDict[object, object] = OrderedDict()
        vars(made)["given"] = given
        return made

    return type(short, (), {"__module__": module, "__new__": new})


_loading = threading.Lock()


@contextmanager
def _standing_in(survey: Survey) -> Iterator[None]:
    """Have the loader take a stand-in for each class that it does not know."""
    from torch import serialization

    names = {
        n: survey.filled.get(full) for short, full in survey.names.items() for n in (short, full)
    }
    ours = [_stand_in(name, filled) for name, filled in names.items()]
    with _loading:  # the loader's list of classes is one for the whole process
        serialization.add_safe_globals(ours)
        try:
            yield
        finally:
            others = [known for known in serialization.get_safe_globals() if known not in ours]
            serialization.clear_safe_globals()
            serialization.add_safe_globals(others)


def kind_of(value: object) -> str:
    """What a value is, in a word."""
    import torch

    for plain, word in ((torch.Tensor, "tensor"), (dict, "dict"), (list, "list")):
        if isinstance(value, plain):
            return word
    made = value if isinstance(value, type) else type(value)
    if isinstance(value, StandIn) and made.__name__.startswith("_reconstruct"):
        # numpy's and copyreg's own, whose first argument is the class.
        given = value.given[0]
        made = (
            given[0] if isinstance(given, tuple) and given and isinstance(given[0], type) else made
        )
    return made.__name__ if made.__module__ == "builtins" else f"{made.__module__}.{made.__name__}"
