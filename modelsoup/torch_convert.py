"""Turn a PyTorch pickle checkpoint into safetensors without running any code that is in it.

Only torch's weights-only loader reads the pickle. What a file is is told from its first bytes
before torch sees it, because torch reads anything that is no zip file as a pickle and then fails
in whatever way its bytes happen to.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .checkpoint import SUFFIX, StrPath, read_index
from .dtypes import DTYPES
from .errors import CheckpointError, OutputError, ParameterError, SoupError, listed, nearest
from .header import MAX_HEADER
from .writer import CheckpointWriter, OutputTensor, check_output, layout

if TYPE_CHECKING:
    import torch

_FILE = "pytorch_model.bin"
_INDEX_SUFFIX = ".bin.index.json"
_TOP = "."
_DTYPES = {f"torch.{dtype.numpy}": dtype.name for dtype in DTYPES.values() if dtype.numpy}
_GLOBAL = re.compile(r"GLOBAL (.+?) (?:was not an allowed|whose module)")
_REMEDY = "if you trust it, load it yourself and `torch.save` its state_dict()"
# torch's weights-only unpickler is a small stack machine in Python: on damaged bytes it pops from
# empty stacks, looks up absent memos and builds tensors from what is no size. zipfile decodes
# damaged names and meets versions that it does not know.
_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError,
    TypeError, ValueError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        output: the file that was written.
        tensors: how many tensors it holds.
        parameters: how many elements they have together.
        nbytes: their bytes, the header not counted.
        key: the dotted path of the nested dict that was taken; None for the top level.
        skipped: the dotted paths of the entries left out: those that are not tensors, and those
            beside the dict that was taken.
        shared: groups of names that shared a storage and are now copies of their own.
        stripped: how many names lost a prefix.
    """

    output: Path
    tensors: int
    parameters: int
    nbytes: int
    key: str | None
    skipped: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    stripped: int


def convert(
    source: StrPath, output: StrPath, *, key: str | None = None,
    strip_prefixes: Sequence[str] = (), force: bool = False,
) -> ConvertReport:  # fmt: skip
    """Write the tensors of a PyTorch checkpoint to a safetensors file.

    Args:
        source: a file that `torch.save` wrote; a folder that holds `pytorch_model.bin` or
            `pytorch_model.bin.index.json` and its shards; or such an index.
        output: a path that ends in `.safetensors`.
        key: the dotted path of the dict to take, such as `params_ema` or `model.state_dict`, where
            several hold tensors; `.` is the top level.
        strip_prefixes: removed from the start of the names, as often as they stand there.
        force: replace an existing output.

    Raises:
        CheckpointError: the source is missing, damaged, not a PyTorch checkpoint, asks for code to
            be run, or holds no tensors, several models, or a tensor that safetensors cannot hold.
        ParameterError: `key` or a prefix fits nothing, or names collide without their prefixes.
        OutputError: the output is no `.safetensors` file, exists, or cannot be written.
        SoupError: PyTorch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise SoupError("soup convert needs PyTorch: install modelsoup[torch]") from None
    source, output = Path(source), Path(output)
    if output.suffix != SUFFIX:
        raise OutputError(f"the output {output} must end in {SUFFIX}")
    check_output(output, force=force)
    try:
        loaded, key, skipped = _read(source, key)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {error.filename or source}: {error.strerror or error}"
        ) from error
    names = _strip(loaded, strip_prefixes)
    tensors = {names[name]: tensor for name, tensor in loaded.items()}
    described = [_describe(source, name, tensor) for name, tensor in tensors.items()]
    (file,) = layout(described, file_name=output.name, shard_size=None)
    with CheckpointWriter(output, [file], {"format": "pt"}, force=force) as writer:
        offset = 0
        for entry in file.tensors:
            # Conjugation and negation may be flags only. To be seen as bytes, a tensor needs a
            # dimension, of stride 1, which a contiguous one of few elements need not have.
            plain = tensors[entry.name].detach().resolve_conj().resolve_neg().contiguous()
            flat = plain.as_strided((plain.numel(),), (1,))
            writer.write(file.name, memoryview(flat.view(torch.uint8).numpy()), offset)
            offset += entry.nbytes
        writer.commit()
    return ConvertReport(
        output=output,
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        nbytes=offset,
        key=None if key == _TOP else key,
        skipped=skipped,
        shared=_shared(tensors),
        stripped=sum(new != old for old, new in names.items()),
    )


def _read(
    source: Path, key: str | None
) -> tuple[dict[str, torch.Tensor], str | None, tuple[str, ...]]:
    """The source's tensors, the path of the dict that held them, and what was left out."""
    if not source.exists():
        beside = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
        raise CheckpointError(f"{source} does not exist{nearest(source.name, beside)}")
    if source.is_dir():
        source = _in_folder(source)
    if not source.name.endswith(_INDEX_SUFFIX):
        return _state_dict(source, _load(source), key)
    weight_map = read_index(source)
    tensors: dict[str, torch.Tensor] = {}
    skipped: dict[str, None] = {}
    misplaced = set(weight_map.items())
    for shard in sorted(set(weight_map.values())):
        # Once the first shard has told which dict is the model, the others must have it too.
        found, key, left_out = _state_dict(shard, _load(shard), key)
        tensors.update(found)
        skipped.update(dict.fromkeys(left_out))
        misplaced ^= {(name, shard) for name in found}
    if misplaced:
        wrong = sorted({name for name, _ in misplaced})
        raise CheckpointError(
            f"{source} does not place {len(wrong)} tensors where its shards hold them: "
            f"{listed(wrong)} (are shards of another checkpoint in the folder?)"
        )
    return tensors, key, tuple(skipped)


def _in_folder(folder: Path) -> Path:
    names = (_FILE, _FILE + ".index.json")
    found = [folder / name for name in names if (folder / name).exists()]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder} holds two checkpoints, {' and '.join(names)}: "
            f"give the path of the one to use"
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    hint = f" (give the path of a file: {listed(others)})" if others else ""
    raise CheckpointError(f"{folder} holds neither {' nor '.join(names)}{hint}")


def _load(file: Path) -> object:
    import torch

    mapped = _can_be_mapped(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = _GLOBAL.search(str(error))
        if asked:
            reason = f"asks for the Python object {asked[1]!r}, which could run code when loaded"
        else:  # its paragraphs are advice, the reason, and where to read more
            said = [p for p in str(error).split("\n\n") if not p.startswith("Check the doc")]
            why = _first_line(said[-1]).removeprefix("Weights only load failed. ")
            reason = f"holds more than tensors in plain containers ({why})"
        raise CheckpointError(f"{file} {reason}: {_REMEDY}") from None
    except _DAMAGE as error:
        raise CheckpointError(
            f"torch cannot read {file}, which looks damaged or truncated "
            f"({type(error).__name__}: {_first_line(str(error))})"
        ) from error


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _can_be_mapped(file: Path) -> bool:
    """Whether torch may map the file; raises CheckpointError where it cannot be one of torch's."""
    with file.open("rb") as stream:
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
    if not is_zip:
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, *_DAMAGE) as error:
        raise CheckpointError(f"{file} is damaged or truncated: {error}") from error
    names = {PurePosixPath(entry.filename).name for entry in entries}
    if "data.pkl" not in names:
        raise CheckpointError(f"{file} is a zip file, but not PyTorch's: it has no data.pkl")
    if "constants.pkl" in names:
        raise CheckpointError(f"{file} is a TorchScript archive, which is code: {_REMEDY}")
    # Where another tool has zipped it again, its storages may be compressed: torch would map them
    # as they lie there.
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _state_dict(
    file: Path, loaded: object, key: str | None
) -> tuple[dict[str, torch.Tensor], str, tuple[str, ...]]:
    """The one dict that holds tensors, its path, and the paths of the entries left out."""
    import torch

    if not isinstance(loaded, dict):
        what = "tensor" if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise CheckpointError(f"{file} holds one {what}, not a dict of tensors by their names")
    if _is_optimizer(loaded):
        raise CheckpointError(f"{file} holds the state of an optimizer, not a model")
    dicts = _nested_dicts(loaded)
    tensors = {
        path: {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
        for path, entries in dicts.items()
    }
    holders = [path for path, found in tensors.items() if found]
    if not holders:
        raise CheckpointError(f"{file} holds no tensors: no dict in it has one as a value")
    chosen = [key] if key in holders else [p for p in holders if _lies_in(p, key or _TOP)]
    if not chosen:
        hint = nearest(str(key), holders) or f" (it has {listed(holders)})"
        raise ParameterError(f"{file} has no dict of tensors under the key {key!r}{hint}")
    if len(chosen) > 1:
        raise CheckpointError(
            f"{file} holds tensors under {len(chosen)} keys, {listed(chosen)}: choose with --key"
            f"{f' ({_TOP} is the top level)' if _TOP in chosen else ''}"
        )
    taken = chosen[0]
    left_out = tuple(
        _join(outer, name)
        for outer, entries in dicts.items()
        if _lies_in(taken, outer)
        for name in entries
        if not (name in tensors[taken] if outer == taken else _lies_in(taken, _join(outer, name)))
    )
    for name in tensors[taken]:
        # Pickles can have names that are no text, even lone surrogates; a header cannot.
        if not isinstance(name, str) or name != name.encode("utf-8", "replace").decode():
            raise CheckpointError(f"{file} has a tensor under {name!r}, which is not a name")
        if name == "__metadata__":
            raise CheckpointError(f"{file} has a tensor named {name!r}, as safetensors allows none")
    return tensors[taken], taken, left_out


def _is_optimizer(entries: Mapping[Any, object]) -> bool:
    return {"state", "param_groups"} <= entries.keys()


def _nested_dicts(loaded: dict[Any, object]) -> dict[str, dict[Any, object]]:
    """Every dict within dicts by its dotted path, without the state of optimizers."""
    dicts = {_TOP: loaded}
    entered: set[int] = set()  # pickles can hold a dict twice, and within itself
    queue = [_TOP]
    for outer in queue:  # grows as dicts are found
        if id(dicts[outer]) not in entered:
            entered.add(id(dicts[outer]))
            for name, value in dicts[outer].items():
                if isinstance(value, dict) and not _is_optimizer(value):
                    dicts[_join(outer, name)] = value
                    queue.append(_join(outer, name))
    return dicts


def _join(outer: str, name: object) -> str:
    return str(name) if outer == _TOP else f"{outer}.{name}"


def _lies_in(path: str, outer: str) -> bool:
    return outer in (path, _TOP) or path.startswith(f"{outer}.")


def _strip(names: Iterable[str], prefixes: Sequence[str]) -> dict[str, str]:
    """Old name → new name.

    Raises:
        ParameterError: a prefix is empty or at the start of no name, or two names become one.
    """
    if "" in prefixes:
        raise ParameterError("the prefix to strip is empty")
    # The longest first, so that the order in which they are given does not matter.
    ordered = sorted(prefixes, key=len, reverse=True)
    used: set[str] = set()
    stripped: dict[str, str] = {}
    for name in names:
        rest = name
        # A name that is the prefix itself stays: nothing would be left of it.
        while matches := [p for p in ordered if rest.startswith(p) and rest != p]:
            used.update(matches)
            rest = rest.removeprefix(matches[0])
        stripped[name] = rest
    unused = [prefix for prefix in prefixes if prefix not in used]
    if unused:
        starts = sorted({name.partition(".")[0] + "." for name in stripped if "." in name})
        hint = nearest(unused[0], starts) or f" (they start with {listed(starts)})"
        raise ParameterError(f"no tensor's name has the prefix {unused[0]!r} to strip{hint}")
    for new, count in Counter(stripped.values()).items():
        if count > 1:
            clash = listed([old for old in stripped if stripped[old] == new])
            raise ParameterError(f"without their prefixes, {clash} would all be named {new!r}")
    return stripped


def _describe(source: Path, name: str, tensor: torch.Tensor) -> OutputTensor:
    import torch

    dtype = _DTYPES.get(str(tensor.dtype))
    kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else str(tensor.layout)
    if dtype is None or kind != str(torch.strided):
        raise CheckpointError(
            f"{source}: tensor {name!r} has the dtype {tensor.dtype} and is {kind}, where "
            f"safetensors holds only strided tensors of its own dtypes"
        )
    return OutputTensor(name, dtype, tuple(tensor.shape))


def _shared(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():  # an empty one lies nowhere
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
