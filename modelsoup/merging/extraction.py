"""A low-rank adapter made of what a model was tuned to: the difference of two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ..errors import MismatchError, NonfiniteError, are_counted, listed
from ..files.adapter_writer import Module, config_of, prefixed, tensors_of, writing
from ..files.checkpoint import Checkpoint, StrPath, TensorInfo, open_checkpoint
from ..files.dtypes import DTYPES, has_nonfinite, numpy_dtype, parse_dtype
from ..files.quantized import packed_weights, scaled_weights
from ..files.writer import OutputTensor
from .factors import nearest_factors, residual
from .lora import AdapterReport, Fit, check_rank, lineage_of
from .plan import Notice
from .recipe import check_seed
from .rules import matching

_ROWS = 1 << 20  # elements of a difference that are in memory at a time
_EMBEDDINGS = ("embed", "wte", "wpe")  # in names of modules of which the weight is a table


def extract_adapter(
    tuned: StrPath | Checkpoint,
    base: StrPath | Checkpoint,
    output: StrPath,
    *,
    rank: int = 16,
    whole: Sequence[str] = (),
    dtype: object = "float32",
    seed: int = 0,
    force: bool = False,
    fsync: bool = True,
) -> AdapterReport:
    """Make a low-rank adapter, for PEFT, of what a model was tuned to.

    Of each weight matrix that differs it has the nearest one of the rank, nearly: singular vectors
    are found at random (`factors.nearest_factors`), a block of rows at a time. What has one axis,
    and what the base has not, is in it whole.

    >>> modelsoup.extract_adapter("tuned", "base", "adapter", rank=16)

    Args:
        tuned: the tuned model, a path or an open checkpoint.
        base: what it was tuned from.
        output: a folder.
        rank: of the factors.
        whole: patterns of tensors that it is to have whole.
        dtype: of the factors.
        seed: of what is drawn at random.
        force: replace an existing output.
        fsync: flush to the disk before the output appears.

    Raises:
        SoupError: anything that the user can put right; no output is left behind then.
    """
    check_rank(rank)
    seed = check_seed(seed)
    stored = parse_dtype(dtype)
    after, before = (m if isinstance(m, Checkpoint) else open_checkpoint(m) for m in (tuned, base))
    changes = _changes(after, before, matching(whole, list(after.tensors), {}) if whole else set())
    modules = [_module(after.tensors[name], rank, stored) for name in changes.factored]
    kept = [after.tensors[name] for name in (*changes.whole, *changes.biases)]
    copies = {i.name: OutputTensor(_name_inside(i.name, changes), i.dtype, i.shape) for i in kept}
    tensors = [t for module in modules for t in tensors_of(module, "peft")] + [*copies.values()]
    fits = []
    with writing(
        output, "peft", tensors,
        lineage_of([after], before, "extracted", "svd", {"rank": rank}, seed),
        read=[path for m in (after, before) for path in (m.path, *m.files)],
        force=force, fsync=fsync,
    ) as written:  # fmt: skip
        for name, module in zip(changes.factored, modules, strict=True):
            info = after.tensors[name]
            blocks = partial(_differences, (after, before), (info, before.tensors[name]))
            random = np.random.Generator(
                np.random.Philox(key=[seed, xxhash.xxh3_64_intdigest(name.encode())])
            )
            matrix = (info.shape[0], math.prod(info.shape[1:]))
            up, down = nearest_factors(blocks, matrix, module.rank, random)
            if module.is_embedding:  # the product is added transposed
                right, left = written.factors(module, down.T, up.T)
                up, down = left.T, right.T
            else:
                up, down = written.factors(module, up, down)
            fits.append(Fit(module.name, module.rank, residual(blocks, (up, down))))
        for name, tensor in copies.items():
            written.put(tensor, after[name])
        saved = sorted({name.rpartition(".")[0] for name in changes.whole})
        biases = "all" if changes.biases else "none"
        written.config(config_of(modules, modules_to_save=saved or None, bias=biases))
    return AdapterReport(
        Path(output), tuple(fits), tuple(copies), tuple(changes.notices),
        sum(tensor.nbytes for tensor in tensors),
    )  # fmt: skip


def _module(info: TensorInfo, rank: int, dtype: str) -> Module:
    """The module that a weight's factors are written as."""
    name, (rows, *inner) = info.name.removesuffix(".weight"), info.shape
    kept = min(rank, rows, math.prod(inner))
    is_table = any(word in name.rpartition(".")[2] for word in _EMBEDDINGS)
    if is_table and len(inner) == 1:
        return Module(name, (inner[0], kept), (kept, rows), dtype, is_embedding=True)
    return Module(name, (rows, kept, *(1 for _ in inner[1:])), (kept, *inner), dtype)


class _Changes(NamedTuple):
    """What of a model differs from its base: names of tensors, and what is to be said."""

    factored: list[str]
    biases: list[str]
    whole: list[str]
    notices: list[Notice]


def _changes(after: Checkpoint, before: Checkpoint, wanted: set[str]) -> _Changes:
    """Which tensors are written as factors, which whole, after a look at all values.

    PEFT saves modules, not tensors: of one that has a tensor which is whole, all are.
    """
    for model in (after, before):
        codes = [*scaled_weights(model.tensors), *packed_weights(model.tensors)]
        if codes:
            raise MismatchError(
                f"{model.path} holds codes ({listed(codes)}), whose differences mean nothing: "
                f"dequantise it first"
            )
    changed = [name for name in after.tensors if _differs(after, before, name)]
    if not changed:
        raise MismatchError(f"{after.path} does not differ from {before.path}")
    matrices = [
        name for name in changed
        if name in before.tensors and name not in wanted and name.endswith(".weight")
        and len(after.tensors[name].shape) > 1
        and DTYPES[after.tensors[name].dtype].kind == "float"
    ]  # fmt: skip
    biases = [n for n in changed if n.endswith(".bias") and n in before.tensors and n not in wanted]
    rest = [name for name in changed if name not in {*matrices, *biases}]
    homes = {name.rpartition(".")[0] for name in rest}
    lost = [name for name in rest if "." not in name]
    whole = [
        name for name in after.tensors
        if any(home in homes for home in _homes(name)) and name not in lost
    ]  # fmt: skip
    notices = []
    if lost:
        notices.append(
            Notice("lost", f"{are_counted(len(lost), 'tensor')} of no module, and left out, since "
                   f"PEFT has no place for it: {listed(lost)}", tuple(lost))
        )  # fmt: skip
    gone = [name for name in before.tensors if name not in after.tensors]
    if gone:
        notices.append(
            Notice("gone", f"{are_counted(len(gone), 'tensor')} in the base alone, and will be "
                   f"there after the adapter is applied: {listed(gone)}", tuple(gone))
        )  # fmt: skip
    taken = set(whole)
    return _Changes(
        [n for n in matrices if n not in taken], [n for n in biases if n not in taken], whole,
        notices,
    )  # fmt: skip


def _homes(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _name_inside(name: str, changes: _Changes) -> str:
    """What PEFT calls a tensor that is in an adapter whole."""
    home, _, last = name.rpartition(".")
    inside = f"{home}.base_layer.{last}" if f"{home}.weight" in changes.factored else name
    return prefixed(inside, "peft")


def _differs(after: Checkpoint, before: Checkpoint, name: str) -> bool:
    info, other = after.tensors[name], before.tensors.get(name)
    if other is None:
        return True
    if info.shape != other.shape:
        raise MismatchError(
            f"{name!r} is {list(info.shape)} in {after.path} and {list(other.shape)} in "
            f"{before.path}: an adapter has no place for that"
        )
    models, pair = (after, before), (info, other)
    if info.dtype == other.dtype:
        return not _are_alike(models, pair)
    is_float = {DTYPES[i.dtype].kind for i in pair} == {"float"}
    return not is_float or any(block.any() for _, block in _differences(models, pair))


def _are_alike(models: tuple[Checkpoint, Checkpoint], pair: tuple[TensorInfo, TensorInfo]) -> bool:
    """Whether two tensors have the same bytes."""
    buffers = [bytearray(min(_ROWS, pair[0].nbytes)) for _ in pair]
    with ExitStack() as stack:
        reads = [stack.enter_context(m.reading(info)) for m, info in zip(models, pair, strict=True)]
        for start in range(0, pair[0].nbytes, _ROWS):
            views = [memoryview(b)[: min(_ROWS, pair[0].nbytes - start)] for b in buffers]
            for read, view in zip(reads, views, strict=True):
                read(view, start)
            if views[0] != views[1]:
                return False
    return True


def _differences(
    models: tuple[Checkpoint, Checkpoint], pair: tuple[TensorInfo, TensorInfo]
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of one model's tensor less another's, flattened, some at a time, in float32."""
    shape = pair[0].shape
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    at_once = max(1, _ROWS // max(1, columns))
    with ExitStack() as stack:
        reads = [stack.enter_context(m.reading(info)) for m, info in zip(models, pair, strict=True)]
        for start in range(0, rows, at_once):
            values = []
            for read, info, model in zip(reads, pair, models, strict=True):
                stored = np.empty((min(at_once, rows - start), columns), numpy_dtype(info.dtype))
                read(stored.reshape(-1).view(np.uint8).data, start * columns * stored.itemsize)
                if has_nonfinite(stored.reshape(-1), info.dtype):
                    raise NonfiniteError(f"NaN or infinity in {info.name} of {model.path}")
                values.append(stored.astype(np.float32))
            yield start, values[0] - values[1]
