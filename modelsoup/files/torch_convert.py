"""Turn a PyTorch pickle checkpoint into safetensors without running any code that is in it.

Only torch's weights-only loader reads the pickle (`torch_load`); here is told which of the dicts
in it is the model, and that is written.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import (
    CheckpointError,
    OutputError,
    ParameterError,
    SoupError,
    counted,
    how_to_install,
    listed,
    nearest,
    option,
)
from .checkpoint import SUFFIX, StrPath, must_be_whole, read_index
from .dtypes import DTYPES
from .pickles import most_bytes
from .placing import CONVERTER_KEY, check_output, overlapped
from .torch_load import REMEDY, StandIn, check_memory, kind_of, load
from .writer import CheckpointWriter, OutputTensor, layout, parse_size

if TYPE_CHECKING:
    import torch

_STEMS = {
    "pytorch_model": "model",
    "diffusion_pytorch_model": "diffusion_pytorch_model",
    "adapter_model": "adapter_model",
    "open_clip_pytorch_model": "open_clip_model",
    "pytorch_lora_weights": "pytorch_lora_weights",
}
"""Pickles of model folders, without their suffix → what safetensors of them are called."""

_IN_FOLDERS = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(?P<variant>\.[\w-]+)?\.bin(\.index(?P<of_index>\.[\w-]+)?\.json)?"
)
_MAIN = "pytorch_model.bin"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOP = "."
_LONGEST_PATH = 1000
_DTYPES = {f"torch.{dtype.numpy}": dtype.name for dtype in DTYPES.values() if dtype.numpy}


class LeftOut(NamedTuple):
    """An entry of the source that is not in the output.

    Attributes:
        within: the dotted path of the dict that holds it; `.` is the top level.
        name: its key there.
        kind: what it is: `int`, `dict`, `argparse.Namespace`.
        tensors: how many tensors lie in it.
    """

    within: str
    name: str
    kind: str
    tensors: int

    @property
    def path(self) -> str:
        """Its dotted path."""
        return _join(self.within, self.name)

    def __str__(self) -> str:
        said = [self.kind] if "." in self.kind else []  # numbers and the like need no more words
        if self.tensors:
            said = [self.kind, counted(self.tensors, "tensor")]
        return f"{self.path} ({', '.join(said)})" if said else self.path


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        output: the file or folder that was written.
        source: the file that was read: in a folder, the one that was chosen.
        tensors: how many tensors it holds.
        parameters: how many elements they have together.
        nbytes: their bytes, headers not counted.
        key: the dotted path of the nested dict that was taken; None for the top level.
        skipped: the entries left out: those that are not tensors, and those beside the dict that
            was taken.
        shared: groups of names that shared a storage and are now copies of their own.
        empty: names of tensors without elements.
        parts: sub-folders of a model folder that have weights of their own, not converted.
        stripped: how many names lost a prefix.
    """

    output: Path
    source: Path
    tensors: int
    parameters: int
    nbytes: int
    key: str | None
    skipped: tuple[LeftOut, ...]
    shared: tuple[tuple[str, ...], ...]
    empty: tuple[str, ...]
    parts: tuple[str, ...]
    stripped: int


def convert(
    source: StrPath, output: StrPath, *, key: str | None = None,
    strip_prefixes: Sequence[str] = (), shard_size: str | int | None = None, force: bool = False,
) -> ConvertReport:  # fmt: skip
    """Write the tensors of a PyTorch checkpoint to safetensors.

    What is no tensor is left out and reported. An object of a class that torch's loader does not
    know is not built: something that does nothing stands in its place while the file is read.

    Args:
        source: a file that `torch.save` wrote; a model folder, with `pytorch_model.bin` or another
            of the usual names, or its index and shards; or such an index.
        output: a path that ends in `.safetensors`; for a folder also another folder, into which
            its config, tokenizer and so on are copied.
        key: the dotted path of the dict to take, such as `params_ema` or `model.state_dict`, where
            several hold tensors; `.` is the top level.
        strip_prefixes: removed from the start of the names, as often as they stand there.
        shard_size: divides a folder's weights: `5GB`, `500MB`, or bytes.
        force: replace an existing output.

    Raises:
        CheckpointError: the source is missing, damaged, not a PyTorch checkpoint, asks for code to
            be run, holds no tensors, several models, or a tensor that safetensors cannot hold, or
            would become more than 16 times its size (and more than 100 MB).
        ParameterError: `key` or a prefix fits nothing, names collide without their prefixes, or
            `shard_size` is no size, or is given for one file.
        OutputError: the output has another suffix, exists, or cannot be written.
        SoupError: PyTorch is not installed, or memory is short.
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise SoupError(f"soup convert needs PyTorch: {how_to_install('torch')}") from None
    source, output = Path(source), Path(output)
    as_folder = _is_folder(source, output)
    if shard_size is not None and not as_folder:
        raise ParameterError(
            f"{option('shard_size', 'SIZE')} divides a folder, and {output} is one file"
        )
    shard_bytes = None if shard_size is None else parse_size(shard_size)
    check_output(output, force=force)
    if overlapped(output, [source]) is not None:
        raise OutputError(f"the output {output} would replace what is converted: name another")
    try:
        file = _chosen(source)
        model = _read(file, key)
        parts = tuple(_parts(source))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {error.filename or source}: {error.strerror or error}"
        ) from error
    names = _strip(model.tensors, strip_prefixes)
    tensors = {names[name]: tensor for name, tensor in model.tensors.items()}
    described = [_describe(source, name, tensor) for name, tensor in tensors.items()]
    _check_bytes(source, described, sum(read.st_size for read in model.files.values()))
    file_name = _converted_name(file) if as_folder else output.name
    files = layout(described, file_name=file_name, shard_size=shard_bytes)
    metadata = {"format": "pt"}
    if as_folder:  # so that a folder may be replaced later
        metadata[CONVERTER_KEY] = "modelsoup"
    copied = source if as_folder else None
    with CheckpointWriter(output, files, metadata, force=force, copy_from=copied) as writer:
        for part in files:
            offset = 0
            for entry in part.tensors:
                writer.write(part.name, _bytes(entry.name, tensors[entry.name]), offset)
                offset += entry.nbytes
        model.check_unchanged()
        writer.commit()
    return ConvertReport(
        output=output,
        source=file,
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        nbytes=sum(entry.nbytes for entry in described),
        key=None if model.key == _TOP else model.key,
        skipped=tuple(model.skipped),
        shared=_shared(tensors),
        empty=tuple(name for name, tensor in tensors.items() if not tensor.numel()),
        parts=parts,
        stripped=sum(new != old for old, new in names.items()),
    )


def _is_folder(source: Path, output: Path) -> bool:
    """Whether a folder is to be written.

    Raises:
        OutputError: the output's name fits neither, or it is the source, or holds it.
    """
    if output.suffix == SUFFIX or not source.exists():
        return False
    if not source.is_dir() or output.suffix in _PICKLES:
        whole = "" if not source.is_dir() else ", or name a folder, which needs no suffix"
        raise OutputError(f"the output {output} must end in {SUFFIX}{whole}")
    return True


# --- which file ------------------------------------------------------------------------------


def _chosen(source: Path) -> Path:
    """The file or index to read.

    Raises:
        CheckpointError: there is none, or a folder has several.
    """
    if not source.exists():
        beside = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
        raise CheckpointError(f"{source} does not exist{nearest(source.name, beside)}")
    if not source.is_dir():
        must_be_whole(source)
        return source
    names = sorted(path.name for path in source.iterdir())
    found = [match for name in names if (match := _IN_FOLDERS.fullmatch(name))]
    # Variants, such as .fp16, lie beside what they are variants of.
    chosen = [match[0] for match in found if not _variant(match)] or [m[0] for m in found]
    if len(chosen) == 1:
        return source / chosen[0]
    if chosen:
        raise CheckpointError(
            f"{source} holds {len(chosen)} checkpoints, {listed(chosen)}: "
            f"give the path of the one to use"
        )
    others = [name for name in names if Path(name).suffix in _PICKLES]
    parts = list(_parts(source))
    hint = (
        f" (give the path of a file: {listed([str(source / n) for n in others])})" if others else ""
    )
    hint = hint or (
        f" (parts of it do: give the path of {listed([str(source / part) for part in parts])})"
        if parts
        else ""
    )
    if any(name.endswith(SUFFIX) for name in names):
        hint = " (it holds safetensors already)"
    raise CheckpointError(f"{source} holds neither {_MAIN} nor {_MAIN}.index.json{hint}")


def _parts(folder: Path) -> Iterator[str]:
    """The sub-folders that have weights, as sentence-transformers' and diffusers' models do."""
    for within, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(within) != folder and any(map(_IN_FOLDERS.fullmatch, files)):
            yield str(Path(within).relative_to(folder))


def _variant(match: re.Match[str]) -> str:
    return match["variant"] or match["of_index"] or ""


def _converted_name(file: Path) -> str:
    """What the weights of a model folder are called in safetensors."""
    match = _IN_FOLDERS.fullmatch(file.name)
    assert match is not None  # it was chosen by it
    return f"{_STEMS[match['stem']]}{_variant(match)}{SUFFIX}"


# --- reading ---------------------------------------------------------------------------------


@dataclass
class _Model:
    """What was found: tensors of no other type than Tensor, and where."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    key: str | None = None
    skipped: list[LeftOut] = field(default_factory=list)
    files: dict[Path, os.stat_result] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Storages are read out of the mapped files only when they are written.

        Raises:
            CheckpointError: a file is another one now.
        """
        for file, before in self.files.items():
            now = file.stat() if file.exists() else None
            if now is None or not os.path.samestat(before, now) or (
                (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns)
            ):  # fmt: skip
                raise CheckpointError(f"{file} was changed while it was converted: do it again")


def _read(source: Path, key: str | None) -> _Model:
    """The tensors of a file, or of an index's shards."""
    if not source.name.endswith(".json"):
        loaded, status = load(source)
        return _Model(*_state_dict(source, loaded, key), {source: status})
    weight_map = read_index(source)
    model = _Model(key=key)
    skipped: dict[str, LeftOut] = {}
    misplaced = set(weight_map.items())
    for shard in sorted(set(weight_map.values())):
        loaded, model.files[shard] = load(shard)
        # Once the first shard has told which dict is the model, the others must have it too.
        found, model.key, left_out = _state_dict(shard, loaded, model.key)
        model.tensors.update(found)
        skipped |= {entry.path: entry for entry in left_out}
        misplaced ^= {(name, shard) for name in found}
    if misplaced:
        wrong = sorted({name for name, _ in misplaced})
        raise CheckpointError(
            f"{source} does not place {counted(len(wrong), 'tensor')} where its shards hold them: "
            f"{listed(wrong)} (are shards of another checkpoint in the folder?)"
        )
    model.skipped = list(skipped.values())
    return model


# --- which dict is the model -----------------------------------------------------------------


class _Dict(NamedTuple):
    """A dict within the file.

    Attributes:
        entries: what is in it.
        tensors: those of them that are tensors.
        outer: the place in the list of dicts of the one that holds it; its own for the top level.
        key: under which key.
        length: of its path.
    """

    entries: dict[Any, object]
    tensors: dict[Any, torch.Tensor]
    outer: int
    key: object
    length: int


def _state_dict(
    file: Path, loaded: object, key: str | None
) -> tuple[dict[str, torch.Tensor], str, list[LeftOut]]:
    """The one dict that holds tensors, its path, and the entries left out."""
    import torch

    if not isinstance(loaded, dict):
        remedy = f": {REMEDY}" if _tensors_within(loaded, {})[0] else ""
        raise CheckpointError(
            f"{file} holds one {kind_of(loaded)}, not a dict of tensors by their names{remedy}"
        )
    if _is_optimizer(loaded):
        raise CheckpointError(f"{file} holds the state of an optimizer, not a model")
    dicts = _nested_dicts(loaded)
    holders = [index for index, found in enumerate(dicts) if found.tensors]
    if not holders:
        raise CheckpointError(f"{file} holds no tensors{_objects(dicts)}")
    if key is None and _is_lightnings(loaded):
        key = "state_dict"
    index = _the_model(file, dicts, holders, key)
    # Detached by the class's method: what a pickle sets on a tensor stands before its methods.
    tensors = {name: torch.Tensor.detach(tensor) for name, tensor in dicts[index].tensors.items()}
    for name in tensors:
        # Pickles can have names that are no text, even lone surrogates; a header cannot.
        if _name(name) is not name or name != name.encode("utf-8", "replace").decode():
            said = repr(name) if _name(name) is name else _name(name)
            raise CheckpointError(f"{file} has a tensor under {said}, which is not a name")
        if name == "__metadata__":
            raise CheckpointError(f"{file} has a tensor named {name!r}, as safetensors allows none")
    skipped = []
    seen = {id(tensor): False for tensor in dicts[index].tensors.values()}
    taken = sum(tensor.numel() for tensor in tensors.values())
    for outer, name, value, is_entry in _beside(dicts, index):
        count, elements = _tensors_within(value, seen)
        if not is_entry and not count:
            continue
        skipped.append(LeftOut(outer, _name(name), kind_of(value), count))
        if key is None and elements > taken:
            raise CheckpointError(
                f"{file} holds more in {skipped[-1]} than in the tensors under "
                f"{_path(dicts, index)}: to take these all the same, name them with "
                f"{option('key', _path(dicts, index))}; else, {REMEDY}"
            )
    return tensors, _path(dicts, index), skipped


def _the_model(file: Path, dicts: list[_Dict], holders: list[int], key: str | None) -> int:
    if key is None:
        chosen = [i for i in holders if not all(map(_is_note, dicts[i].tensors.values()))]
        chosen = chosen or holders
    else:
        chosen = [i for i in holders if _path(dicts, i) == key]
        chosen = chosen or [i for i in holders if _lies_in(_path(dicts, i), key)]
    if len(chosen) == 1:
        return chosen[0]
    some = [_path(dicts, i) for i in (chosen or holders)[:100]]
    if not chosen:
        hint = nearest(str(key), some) or f" (it has {listed(some)})"
        raise ParameterError(f"{file} has no dict of tensors under the key {key!r}{hint}")
    raise CheckpointError(
        f"{file} holds tensors under {len(chosen)} keys, {listed(some)}: choose with "
        f"{option('key', 'KEY')}{f' ({_TOP} is the top level)' if _TOP in some else ''}"
    )


def _is_note(tensor: torch.Tensor) -> bool:
    """Whether it is a loss, a score or a random generator's state, which is no model beside one."""
    import torch

    plain = torch.Tensor.detach(tensor)
    return bool(plain.numel() <= 1 or (plain.dtype == torch.uint8 and plain.dim() == 1))


def _is_lightnings(loaded: dict[Any, object]) -> bool:
    """Whether a file is PyTorch Lightning's, whose callbacks may hold tensors too."""
    model = dict.get(loaded, "state_dict")
    marks = ("pytorch-lightning_version", "callbacks")
    return (
        any(mark in loaded for mark in marks) and isinstance(model, dict) and _tensors(model) != {}
    )


def _is_optimizer(entries: dict[Any, object]) -> bool:
    return {"state", "param_groups"} <= dict.keys(entries)


def _tensors(entries: dict[Any, object]) -> dict[Any, torch.Tensor]:
    import torch

    # By dict's own method: attributes that a pickle gives an OrderedDict stand before methods.
    return {name: value for name, value in dict.items(entries) if isinstance(value, torch.Tensor)}


def _nested_dicts(loaded: dict[Any, object]) -> list[_Dict]:
    """Every dict within dicts, each after the one that holds it, without the state of optimizers.

    One that is nested so deep, or under such long names, that its path would fill a page is left
    where it is.
    """
    found = {id(loaded): _tensors(loaded)}  # pickles can hold a dict twice, and within itself
    dicts = [_Dict(loaded, found[id(loaded)], 0, None, 0)]
    entered: set[int] = set()
    for index, outer in enumerate(dicts):  # grows as dicts are found
        if id(outer.entries) in entered:
            continue
        entered.add(id(outer.entries))
        for key, value in dict.items(outer.entries):
            length = outer.length + 1 + len(_name(key))
            if isinstance(value, dict) and length <= _LONGEST_PATH and not _is_optimizer(value):
                if id(value) not in found:
                    found[id(value)] = _tensors(value)
                dicts.append(_Dict(value, found[id(value)], index, key, length))
    return dicts


def _path(dicts: list[_Dict], index: int) -> str:
    names = []
    while index:
        names.append(_name(dicts[index].key))
        index = dicts[index].outer
    return ".".join(reversed(names)) if names else _TOP


def _beside(dicts: list[_Dict], index: int) -> Iterator[tuple[str, object, object, bool]]:
    """What is not taken in the dict that is, and in those that hold it.

    Yields:
        the path of the dict, the key, the value, and whether it is an entry; else it is an
        attribute of the dict, as pickles may set: usually a version, but it could be a tensor.
    """
    chain = [index]
    while chain[-1]:
        chain.append(dicts[chain[-1]].outer)
    for place, inner in zip(chain[::-1], [*chain[-2::-1], None], strict=True):
        path = _path(dicts, place)
        taken = dicts[index].tensors if inner is None else {dicts[inner].key: None}
        for key, value in dict.items(dicts[place].entries):
            if key not in taken:
                yield path, key, value, True
        for key, value in _attributes(dicts[place].entries).items():
            yield path, f"attribute {_name(key)}", value, False


def _attributes(entries: dict[Any, object]) -> dict[Any, object]:
    return getattr(entries, "__dict__", {})  # an OrderedDict has them


def _tensors_within(value: object, seen: dict[int, bool]) -> tuple[int, int]:
    """How many tensors lie in a value, and the elements of those that could be a model's.

    Args:
        value: anything that was loaded.
        seen: ids of what was counted before, and whether as an optimizer's, which also holds the
            parameters; what is counted now is added.
    """
    import torch

    tensors = elements = 0
    queue = [(value, False)]
    while queue:
        item, is_state = queue.pop()
        if item is None or isinstance(item, (str, int, float)):
            continue
        if id(item) in seen and seen[id(item)] <= is_state:
            continue
        seen[id(item)] = is_state
        if isinstance(item, torch.Tensor):
            tensors += 1
            elements += 0 if is_state or _is_note(item) else torch.Tensor.numel(item)
        elif isinstance(item, dict):
            is_state = is_state or _is_optimizer(item)
            held = [*dict.keys(item), *dict.values(item), *_attributes(item).values()]
            queue += [(each, is_state) for each in held]
        elif isinstance(item, (list, tuple, set)):
            queue += [(each, is_state) for each in item]
        elif isinstance(item, StandIn):
            queue += [(each, is_state) for each in item.given]
    return tensors, elements


def _objects(dicts: list[_Dict]) -> str:
    """Why there are no tensors, in an error."""
    seen: dict[int, bool] = {}
    objects = [
        LeftOut(_path(dicts, index), _name(key), kind_of(value), _tensors_within(value, seen)[0])
        for index, found in enumerate(dicts)
        for key, value in dict.items(found.entries)
        if isinstance(value, StandIn)
    ]
    holding = [str(each) for each in objects if each.tensors]
    if holding:
        return f" but in Python objects, which are not built ({listed(holding)}): {REMEDY}"
    others = [str(each) for each in objects]
    return ": no dict in it has one as a value" + (f" (it has {listed(others)})" if others else "")


def _name(key: object) -> str:
    """A key as a part of a path."""
    import torch

    if isinstance(key, str) and len(key) <= _LONGEST_PATH:
        return key
    if isinstance(key, (type, StandIn, torch.Tensor)):
        return f"<{kind_of(key)}>"
    return reprlib.repr(key)


def _join(outer: str, name: str) -> str:
    return name if outer == _TOP else f"{outer}.{name}"


def _lies_in(path: str, outer: str) -> bool:
    return outer in (path, _TOP) or path.startswith(f"{outer}.")


# --- what is written -------------------------------------------------------------------------


def _strip(names: Iterable[str], prefixes: Sequence[str]) -> dict[str, str]:
    """Old name → new name.

    Raises:
        ParameterError: a prefix is empty or at the start of no name, leaves something that is no
            name, or makes two names one.
    """
    if "" in prefixes:
        raise ParameterError("the prefix to strip is empty")
    # The longest first, so that the order in which they are given does not matter.
    ordered = sorted(prefixes, key=len, reverse=True)
    used: set[str] = set()
    stripped: dict[str, str] = {}
    for name in names:
        rest, last = name, ""
        # A name that is the prefix itself stays: nothing would be left of it.
        while matches := [p for p in ordered if rest.startswith(p) and rest != p]:
            used.update(matches)
            last, rest = matches[0], rest.removeprefix(matches[0])
        if rest[:1] == "." and "" not in name.split("."):
            raise ParameterError(
                f"without the prefix {last!r}, {name!r} would be {rest!r}, which is no name "
                f"({f'{last}.'!r} takes the dot off too)"
            )
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


def _check_bytes(source: Path, tensors: Sequence[OutputTensor], size: int) -> None:
    """Refuse what some bytes would blow up.

    Raises:
        CheckpointError: it would.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    if total > most_bytes(size):
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        raise CheckpointError(
            f"{source}: its tensors would take {total:,} bytes, as elements that lie in one place "
            f"are written each by itself; of {size:,} bytes no more than {most_bytes(size):,} are "
            f"made (the largest is {largest.name!r}, of {largest.nbytes:,})"
        )


def _bytes(name: str, tensor: torch.Tensor) -> memoryview:
    import torch

    try:
        # Conjugation and negation may be flags only. To be seen as bytes, a tensor needs a
        # dimension, of stride 1, which a contiguous one of few elements need not have.
        plain = tensor.resolve_conj().resolve_neg().contiguous()
    except RuntimeError as error:
        check_memory(error, f"write the tensor {name!r}")
        raise CheckpointError(f"the tensor {name!r} cannot be read: {error}") from error
    flat = plain.as_strided((plain.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())
