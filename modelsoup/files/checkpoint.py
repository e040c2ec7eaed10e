"""Open a checkpoint by its headers alone: one safetensors file, an index, or a model folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

import numpy as np

from ..errors import CheckpointError, ParameterError, are_counted, counted, listed, nearest, said
from .dtypes import DTYPES, numpy_dtype
from .header import MAX_HEADER, DuplicateKeyError, read_header, read_into, without_duplicates
from .reading import FileState, open_regular, read_small, state_of
from .tokenizer import Vocabulary, vocabulary_of

SUFFIX = ".safetensors"
_PREFERRED = ("model", "diffusion_pytorch_model")
KNOWN_STEMS = (*_PREFERRED, "adapter_model", "pytorch_lora_weights", "open_clip_model")
"""What the weights of a folder may be called so that who loads it finds them."""

# `model.safetensors.index.json`, and a variant's `model.safetensors.index.fp16.json`.
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\.[\w-]+)?\.json")
_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<variant>\.[\w-]+)?\.safetensors"
)
_ONE_OF = re.compile(r".+-\d{5}-of-(?P<total>\d{5})(\.[\w-]+)+")  # a shard in any format
_LISTS_OF_PARTS = ("model_index.json", "modules.json")
_TRAINING_STATE = re.compile(r"checkpoint-\d+")

StrPath = str | os.PathLike[str]


class TensorInfo(NamedTuple):  # quicker to make than a dataclass: there may be 100,000
    """Where one tensor lies.

    Attributes:
        name: its name in the checkpoint: in a folder of several parts, the part's prefix and its
            name in the part's files.
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


class Part(NamedTuple):
    """Weights of a checkpoint that have files of their own.

    Attributes:
        prefix: what its tensors' names begin with: nothing, or its folder, such as `unet/`.
        stem: what its files are called, without suffix and number: `model`.
    """

    prefix: str
    stem: str


class Checkpoint(Mapping[str, np.ndarray]):
    """A checkpoint whose headers were read; a tensor's bytes are read when it is asked for.

    It is a mapping from names to arrays: `checkpoint["conv.weight"]` reads that tensor, in its
    stored dtype (bfloat16 and float8 as `ml_dtypes` types).

    Attributes:
        path: what was opened, a file or a folder.
        files: the safetensors files, part by part, in the order of their names.
        tensors: name → `TensorInfo`, in file order.
        metadata: the `__metadata__` of the first file.
        is_folder: whether a model folder (or its index) was opened, not a single file.
        parts: of a folder with weights in several folders, each; else the one that there is.
        states: file → its state when its header was read. A file that is in another state later is
            another file, of which the header tells nothing.
        notes: sentences on what was taken, where there was a choice.
        key: what stands for its content in lineages, in place of its digest; for merges of a tree,
            which have the same lineage whether or not what they merge was ever written.
        digest: the XXH3-128 digest that lineages will have, where it is known beforehand.
        plan_name: what a plan calls it; lineages keep that.
        is_stored: whether it is a result in a store, whose file's name says nothing.
    """

    key: str | None = None
    digest: str | None = None
    plan_name: str | None = None
    is_stored: bool = False

    def __init__(
        self, path: Path, files: tuple[Path, ...], tensors: dict[str, TensorInfo],
        metadata: dict[str, str], *, is_folder: bool, parts: Sequence[Part] = (Part("", "model"),),
        states: Mapping[Path, FileState] | None = None, notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.path = path
        self.files = files
        self.tensors = tensors
        self.metadata = metadata
        self.is_folder = is_folder
        self.parts = tuple(parts)
        self.states = states or {}
        self.notes = tuple(notes)

    @property
    def name(self) -> str:
        """The file's or folder's name, without its path."""
        return self.path.resolve().name if self.path.name in ("", "..") else self.path.name

    @property
    def companions(self) -> Path | None:
        """The folder whose config and other files go along with the weights, if there is one."""
        return self.path if self.path.is_dir() else None

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The tokens of its tokenizer, where there is one that tells them; it is read each time."""
        return None if self.companions is None else vocabulary_of(self.companions)

    @property
    def nbytes(self) -> int:
        """The tensors' bytes, headers not counted."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """How many elements all tensors have together."""
        return sum(info.elements for info in self.tensors.values())

    def file_name(self, file: Path) -> str:
        """What lineages call one of its files: within a folder, by the way to it."""
        return file.relative_to(self.path).as_posix() if self.is_folder else file.name

    def open(self, file: Path) -> int:
        """A descriptor to read one of its files by, which is what its header was read from.

        Raises:
            CheckpointError: it was replaced or changed since.
            OSError: it cannot be opened.
        """
        descriptor = open_regular(file)
        try:
            self.must_be_unchanged(file, descriptor)
        except CheckpointError:
            os.close(descriptor)
            raise
        return descriptor

    def must_be_unchanged(self, file: Path, descriptor: int) -> None:
        """Whether an open file still is what its header was read from.

        Raises:
            CheckpointError: it was replaced or changed since.
        """
        if file in self.states and state_of(descriptor) != self.states[file]:
            raise CheckpointError(f"{file} changed while it was read: begin again")

    @contextmanager
    def reading(self, info: TensorInfo) -> Iterator[Callable[[memoryview, int], None]]:
        """Read one tensor piece by piece: a function that fills a buffer from one of its bytes.

        Raises:
            CheckpointError: its file was replaced, changed or truncated since it was opened, or
                was meanwhile.
        """
        descriptor = self.open(info.file)
        try:
            yield lambda buffer, offset: read_into(
                descriptor, buffer, info.start + offset, info.file
            )
            self.must_be_unchanged(info.file, descriptor)
        finally:
            os.close(descriptor)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.tensors.get(name)
        if info is None:
            raise KeyError(f"{self.path} has no tensor {name!r}{nearest(name, self.tensors)}")
        buffer = bytearray(info.nbytes)
        with self.reading(info) as read:
            read(memoryview(buffer), 0)
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


def open_checkpoint(path: StrPath, *, shard: bool = False) -> Checkpoint:
    """Open a checkpoint, reading headers only.

    Args:
        path: a `.safetensors` file; a `*.safetensors.index.json`; or a model folder, of which
            `docs/checkpoints.md` says what is taken.
        shard: whether a file may be one of several, as its name tells, and so not the whole.

    Raises:
        CheckpointError: missing, damaged, ambiguous, incomplete, or not safetensors.
        ParameterError: no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ParameterError(f"a checkpoint is {said(path)}, but must be a path")
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.name.endswith(".index.json") or _INDEX.fullmatch(path.name):
            return _opened(path.parent, [_by_index(path)], is_folder=True)
        if not shard:
            must_be_whole(path)
        return _opened(path, [_Found(_stem(path), (path,))], is_folder=False)
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


def must_be_whole(file: Path) -> None:
    """Whether a file is a checkpoint of its own, by its name.

    Raises:
        CheckpointError: it is one of several shards.
    """
    named = _ONE_OF.fullmatch(file.name)
    if named and int(named["total"]) > 1 and file.exists():
        raise CheckpointError(
            f"{file} is one of {int(named['total'])} shards, not a whole checkpoint: give its "
            f"folder, {file.parent}, or its index"
        )


@dataclass(frozen=True)
class _Found:
    """One part's weights.

    Attributes:
        stem: what they are called.
        files: where they lie.
        index: the index, if there is one.
        places: what the index says: tensor name → file.
        prefix: of the names of its tensors.
    """

    stem: str
    files: tuple[Path, ...]
    index: Path | None = None
    places: Mapping[str, Path] = field(default_factory=dict)
    prefix: str = ""


def _stem(file: Path) -> str:
    """What the weights of a file or of an index are called, number aside, a variant included."""
    named = _INDEX.fullmatch(file.name) or _SHARD.fullmatch(file.name)
    if named is not None:
        return named["stem"] + (named["variant"] or "")
    return file.name.removesuffix(".index.json").removesuffix(SUFFIX)


def _by_index(index: Path) -> _Found:
    places = read_index(index)
    return _Found(_stem(index), tuple(sorted(set(places.values()))), index, places)


def _open_folder(folder: Path) -> Checkpoint:
    notes: list[str] = []
    root = _family(folder, notes)
    found = [] if root is None else [root]
    apart = []
    taken = set(root.files if root else ())
    parts = parts_listed(folder)
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for inner in inside:
        if taken.issuperset(_weights(inner.iterdir())):
            continue
        name = inner.name
        is_part = name in parts.names if parts else not _TRAINING_STATE.fullmatch(name)
        part = _family(inner, notes) if is_part else None
        if part is None:
            apart.append(name)
        else:
            found.append(replace(part, prefix=f"{name}/"))
            taken.update(part.files)
    if not found:
        within = listed([str(folder / name) for name in apart])
        elsewhere = f" (parts of it do: give the path of {within})" if apart else ""
        raise CheckpointError(
            f"{folder} holds no .safetensors file and no index{elsewhere or _unconverted(folder)}"
        )
    further = (place for inner in inside for place in _further_down(inner, taken))
    apart = sorted([*apart, *(place.relative_to(folder).as_posix() for place in further)])
    if apart:
        notes.append(f"weights in {listed(apart)} are no part of {folder}, and were left alone")
    return _opened(folder, found, is_folder=True, notes=notes)


def _further_down(inner: Path, taken: set[Path]) -> Iterator[Path]:
    """The folders within a folder that hold weights, but for those that are taken."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    for within, folders, files in os.walk(inner, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = _weights(Path(within, name) for name in files)
        if Path(within) != inner and not taken.issuperset(here):
            yield Path(within)


def _weights(paths: Iterable[Path]) -> Iterator[Path]:
    """Those of some files that are weights, or an index of them."""
    return (p for p in paths if p.suffix == SUFFIX or _INDEX.fullmatch(p.name))


class PartsList(NamedTuple):
    """The list of its parts that a model folder has, and by which it is loaded.

    Attributes:
        file: its name.
        names: of the folders that it names, and of other things.
    """

    file: str
    names: tuple[str, ...]


def parts_listed(folder: Path) -> PartsList | None:
    """The list of its parts, as pipelines of diffusers and sentence-transformers have one."""
    for name in _LISTS_OF_PARTS:
        try:
            content = json.loads(read_small(folder / name, MAX_HEADER))
        except (OSError, ValueError, RecursionError):
            continue  # there is no such list
        if isinstance(content, dict):
            return PartsList(name, tuple(content))
        if isinstance(content, list):
            paths = [module.get("path") for module in content if isinstance(module, dict)]
            return PartsList(name, tuple(path for path in paths if isinstance(path, str)))
    return None


def _family(folder: Path, notes: list[str]) -> _Found | None:
    """The weights of one folder, of all that may lie there: those that are called `model`.

    Raises:
        CheckpointError: there are several, and none of them is called so; or shards are missing.
    """
    inside = sorted(folder.iterdir())
    indexes = {_stem(path): path for path in inside if _INDEX.fullmatch(path.name)}
    families: dict[str, list[Path]] = {}
    for path in inside:
        if path.suffix == SUFFIX:
            families.setdefault(_stem(path), []).append(path)
    stems = list(dict.fromkeys((*indexes, *families)))
    chosen = next((stem for stem in _PREFERRED if stem in stems), None)
    if chosen is None and len(indexes) == 1:
        (chosen,) = indexes
    found = None
    if chosen in indexes:
        found = _by_index(indexes[chosen])
        rival = folder / f"{chosen}{SUFFIX}"
        if rival.exists() and rival not in found.files:
            raise CheckpointError(
                f"{folder} holds two checkpoints, {rival.name} and {indexes[chosen].name}: "
                f"give the path of the one to use"
            )
        stems = [s for s in stems if s in indexes or not set(families[s]) <= set(found.files)]
    if chosen is None and len(stems) > 1:
        raise CheckpointError(
            f"{folder} holds {len(stems)} checkpoints, {listed(stems)}: give the path of the one "
            f"to use"
        )
    if not stems:
        return None
    chosen = chosen or stems[0]
    others = [stem for stem in stems if stem != chosen]
    if others:
        notes.append(
            f"{folder} holds {len(stems)} checkpoints: {chosen} was taken, not {listed(others)}"
        )
    return found or _Found(chosen, _all_shards(folder, chosen, families[chosen]))


def _all_shards(folder: Path, stem: str, files: Sequence[Path]) -> tuple[Path, ...]:
    """The files of a checkpoint without an index, if by their names none is missing."""
    named = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    numbers = sorted((int(match["total"]), int(match["number"])) for match in named)
    total = numbers[0][0] if numbers else 1
    whole = [(total, number) for number in range(1, total + 1)]
    if (named and len(named) < len(files)) or (numbers and numbers != whole):
        raise CheckpointError(
            f"{folder} does not hold the {total} shards of {stem}, but "
            f"{listed([file.name for file in files])}"
        )
    return tuple(files)


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
        content = json.loads(read_small(index, MAX_HEADER), object_pairs_hook=without_duplicates)
    except DuplicateKeyError as error:
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
        unusual = "\\" in shard or "\0" in shard or not pure.parts
        if pure.is_absolute() or ".." in pure.parts or unusual:
            raise CheckpointError(f"{index} names a shard outside its folder: {shard!r}")
        shards[shard] = index.parent / pure
        if not shards[shard].is_file():
            beside = [p.name for p in index.parent.iterdir() if p.suffix == pure.suffix]
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not there{nearest(shard, beside)}"
            )
    return {name: shards[shard] for name, shard in weight_map.items()}


def _opened(
    path: Path, found: Sequence[_Found], *, is_folder: bool, notes: Sequence[str] = ()
) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    states: dict[Path, FileState] = {}
    for part in found:
        before = len(tensors)
        for file in part.files:
            header = read_header(file)
            metadata = header.metadata if metadata is None else metadata
            states[file] = header.state
            infos = [
                TensorInfo(part.prefix + name, dtype, shape, file, start, nbytes)
                for name, dtype, shape, start, nbytes in header.rows
            ]
            twice = [info.name for info in infos if info.name in tensors]
            if twice:
                raise CheckpointError(
                    f"{path}: {are_counted(len(twice), 'tensor')} both in "
                    f"{tensors[twice[0]].file.name} and in {file.name} ({listed(twice)}): is one "
                    f"of them another checkpoint's?"
                )
            tensors.update((info.name, info) for info in infos)
        if part.index is not None:
            _must_agree(part, dict(list(tensors.items())[before:]))
    parts = [Part(part.prefix, part.stem) for part in found]
    return Checkpoint(
        path, tuple(states), tensors, metadata or {}, is_folder=is_folder, parts=parts,
        states=states, notes=notes,
    )  # fmt: skip


def _must_agree(part: _Found, tensors: Mapping[str, TensorInfo]) -> None:
    """Whether an index places exactly what its shards hold."""
    here = {name.removeprefix(part.prefix): info.file for name, info in tensors.items()}
    absent = [name for name, file in part.places.items() if here.get(name) != file]
    if absent:
        raise CheckpointError(
            f"{part.index} places {counted(len(absent), 'tensor')} in shards that do not hold "
            f"them: {listed(absent)}"
        )
    unlisted = [name for name in here if name not in part.places]
    if unlisted:
        raise CheckpointError(
            f"{part.index} does not list {counted(len(unlisted), 'tensor')} that its shards hold: "
            f"{listed(unlisted)} (are shards of another checkpoint left in the folder?)"
        )
