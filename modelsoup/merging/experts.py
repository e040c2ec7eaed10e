"""Several experts in one file: what they share, and of each a mask of bits and a factor.

A task vector is elected of all (EMR, TALL masks), and each expert is the base and a part of that:
base + c·u∘m. Besides u, which is as large as a model, an expert takes a bit for each parameter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import (
    CheckpointError,
    MismatchError,
    NonfiniteError,
    OutputError,
    ParameterError,
    are_counted,
    counted,
    listed,
    must_be_several,
    nearest,
)
from ..files.checkpoint import SUFFIX, Checkpoint, StrPath, TensorInfo, open_checkpoint
from ..files.digest import digest_checkpoint
from ..files.dtypes import (
    DTYPES,
    compute_dtype,
    has_nonfinite,
    narrow,
    numpy_dtype,
    parse_dtype,
    widen,
)
from ..files.placing import LINEAGE_KEY, check_apart, check_free, check_place
from ..files.quantized import packed_weights, scaled_weights
from ..files.writer import CheckpointWriter, OutputTensor, layout
from ..version import __version__
from .engine import Progress
from .folding import Adapted
from .forms import BLOCK, Block, Tensor
from .lineage import FORMAT, input_entry
from .merge import MergeReport, merge
from .methods import build_parameters, get_method
from .methods.masks import agrees, matters, summed, unified
from .plan import Notice
from .recipe import Recipe
from .reductions import total_of
from .sources import Read, Source, Stored, Values, computed_info
from .threads import default_workers

METHODS = ("emr", "consensus")
"""Those of which a single expert can be had back."""

KEY = "modelsoup.experts"
_SHARED, _MASKS = "shared.", "masks."  # what names of tensors begin with
_MOST = 1 << 20  # bytes read at a time for a digest


@dataclass(frozen=True)
class PackReport:
    """What became of experts that were put into one file.

    Attributes:
        output: where it was written.
        experts: what they are called, in order.
        tensors: how many tensors they share.
        parameters: how many elements these have.
        bytes_written: of tensors.
        bytes_of_models: what the experts' own tensors take.
        notices: what the user should know.
    """

    output: Path
    experts: tuple[str, ...]
    tensors: int
    parameters: int
    bytes_written: int
    bytes_of_models: int
    notices: tuple[Notice, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data: what `soup experts pack --json` prints."""
        return {
            "output": str(self.output),
            "experts": list(self.experts),
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes_written": self.bytes_written,
            "bytes_of_models": self.bytes_of_models,
            "notices": [
                {"kind": n.kind, "message": n.message, "level": n.level} for n in self.notices
            ],
        }


def pack_experts(
    models: Sequence[StrPath | Checkpoint],
    output: StrPath,
    *,
    base: StrPath | Checkpoint,
    method: str = "emr",
    parameters: Mapping[str, Any] | None = None,
    dtype: object = None,
    force: bool = False,
    fsync: bool = True,
) -> PackReport:
    """Put what several models were tuned to into one file, out of which each can be had back.

    >>> modelsoup.pack_experts(["a", "b", "c"], "experts.safetensors", base="base")

    Args:
        models: what was tuned from the base, paths or open checkpoints, each an expert.
        output: a path that ends in `.safetensors`.
        base: the base model, which is needed again to have an expert back.
        method: `emr`, or `consensus` for TALL masks.
        parameters: of the method, but for those that decide what is merged.
        dtype: of what is shared; None is the first model's, bfloat16 for what has 8 bits.
        force: replace an existing output.
        fsync: flush to the disk before the output appears.

    Raises:
        SoupError: anything that the user can put right; no output is left behind then.
    """
    must_be_several("models", models)
    if not models:
        raise ParameterError("there are no models to pack")
    if method not in METHODS:
        raise ParameterError(
            f"no single expert can be had back of {method!r}{nearest(method, METHODS)} "
            f"(it can of {' and '.join(METHODS)})"
        )
    chosen = get_method(method)
    refused = [name for name in parameters or {} if name in ("expert", "k")]
    if refused:
        raise ParameterError(f"{refused[0]!r} decides what is merged, and here nothing is")
    checked = build_parameters(chosen, dict(parameters or {}), len(models))
    opened = [one if isinstance(one, Checkpoint) else open_checkpoint(one) for one in models]
    before = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    output = Path(output)
    if output.suffix != SUFFIX:
        raise OutputError(f"experts are one file, and {output} does not end in {SUFFIX}")
    check_place(output)
    check_apart(output, [path for m in (*opened, before) for path in (m.path, *m.files)])
    check_free(output, force=force)
    shared, notices = _shared(opened, before)
    stored = {name: _stored(opened[0].tensors[name].dtype, dtype) for name in shared}
    tensors = [OutputTensor(_SHARED + n, stored[n], i.shape) for n, i in shared.items()] + [
        OutputTensor(_MASKS + n, "U8", (len(opened), -(-i.elements // 8)))
        for n, i in shared.items()
    ]
    (file,) = layout(tensors, file_name=output.name, shard_size=None)
    places, offset = {}, 0
    for tensor in file.tensors:
        places[tensor.name] = offset
        offset += tensor.nbytes
    inputs = [input_entry(model, digest_checkpoint(model), sha256=False) for model in opened]
    lineage = {
        "format": FORMAT, "version": __version__, "operation": "merge", "experts": "packed",
        "method": method, "parameters": dict(parameters or {}), "seed": 0, "inputs": inputs,
        "base": input_entry(before, digest_checkpoint(before), sha256=False),
    }  # fmt: skip
    metadata = {LINEAGE_KEY: json.dumps(lineage, separators=(",", ":"))}
    names = [model.name.removesuffix(SUFFIX) for model in opened]
    with CheckpointWriter(output, [file], metadata, force=force, fsync=fsync) as writer:

        def put(name: str, values: np.ndarray, start: int) -> None:
            data = values.reshape(-1).view(np.uint8).data
            writer.write(file.name, data, places[name] + start)

        def pack(name: str) -> list[tuple[float, float]]:
            x = Tensor(
                name, shared[name].shape, len(opened), True,
                compute_dtype(tuple(m.tensors[name].dtype for m in (before, *opened))),
            )  # fmt: skip
            return _pack((before, *opened), x, checked.get("threshold"), stored[name], put)

        with ThreadPoolExecutor(default_workers()) as pool:
            norms = list(pool.map(pack, shared))
            digests = list(pool.map(lambda info: _digest(before, info), shared.values()))
        scales = [float(checked["lambda_"])] * len(opened)
        if method == "emr":
            totals = [total_of(of_tensors) for of_tensors in zip(*norms, strict=True)]
            scales = [
                scale * (wanted / there if there else 1.0)
                for scale, (wanted, there) in zip(scales, totals, strict=True)
            ]
        told = {
            "format": FORMAT, "method": method, "experts": names, "scales": scales,
            "base": dict(zip(shared, digests, strict=True)),
        }  # fmt: skip
        metadata[KEY] = json.dumps(told, separators=(",", ":"))
        writer.update_metadata(metadata)
        writer.commit()
    return PackReport(
        output, tuple(names), len(shared), sum(info.elements for info in shared.values()), offset,
        sum(model.nbytes for model in opened), tuple(notices),
    )  # fmt: skip


def _stored(dtype: str, wanted: object) -> str:
    """The dtype of what is shared: differences are too small for what has 8 bits."""
    if wanted is not None:
        return parse_dtype(wanted)
    return "BF16" if DTYPES[dtype].bits < 16 else dtype


def _shared(
    models: Sequence[Checkpoint], base: Checkpoint
) -> tuple[dict[str, TensorInfo], list[Notice]]:
    """The base's float tensors, which all models must have, and what is said of the others.

    Raises:
        MismatchError: a model has others, or one of them holds codes.
    """
    for model in (base, *models):
        codes = [*scaled_weights(model.tensors), *packed_weights(model.tensors)]
        if codes:
            raise MismatchError(
                f"{model.path} holds codes ({listed(codes)}), whose differences mean nothing: "
                f"dequantise it first"
            )
    floats = {n: i for n, i in base.tensors.items() if DTYPES[i.dtype].kind == "float"}
    for model in models:
        own = {n: i for n, i in model.tensors.items() if DTYPES[i.dtype].kind == "float"}
        for names, what in (
            ([n for n in floats if n not in own], f"lacks {{}}, which {base.name} has"),
            ([n for n in own if n not in floats], f"has {{}}, which {base.name} has not"),
            (
                [n for n in own if n in floats and own[n].shape != floats[n].shape],
                f"has another shape than {base.name} in {{}}",
            ),
        ):
            if names:
                raise MismatchError(
                    f"{model.path} {what.format(listed(names))}: experts are tuned from one base, "
                    f"and have its tensors"
                )
    if not floats:
        raise MismatchError(f"{base.path} has no float tensors, which experts differ in")
    others = [name for name in base.tensors if name not in floats]
    if not others:
        return floats, []
    message = f"{are_counted(len(others), 'tensor')} no floats, and an expert has the base's"
    return floats, [Notice("carried", f"{message}: {listed(others)}", tuple(others), "note")]


def _pack(
    models: Sequence[Checkpoint], x: Tensor, thresholds: Sequence[float] | None, dtype: str,
    put: Any,
) -> list[tuple[float, float]]:  # fmt: skip
    """Write what is shared of a tensor, and the masks, block by block.

    Returns:
        of each expert how long its task vector is, and how long what it has of the shared one.
    """
    partial = [np.zeros((x.blocks, 2)) for _ in x.models]
    with np.errstate(all="ignore"):
        for b in _blocks(models, x):
            shared = unified(x, b) if thresholds is None else summed(map(b.delta, x.models))
            for k in x.models:
                delta = b.delta(k)
                if thresholds is None:
                    mask = agrees(b, k, shared)
                else:
                    mask = matters(shared, delta, thresholds[k])
                bits = np.packbits(mask)
                put(_MASKS + x.name, bits, k * -(-x.elements // 8) + b.start // 8)
                for place, values in enumerate((delta, shared * mask)):
                    partial[k][b.number, place] = np.add.reduce(np.abs(values), dtype=np.float64)
            rounded = np.empty(shared.size, numpy_dtype(dtype))
            narrow(shared, rounded)
            if has_nonfinite(rounded, dtype):
                raise NonfiniteError(f"{x.name} is too large for {dtype}: give another dtype")
            put(_SHARED + x.name, rounded, b.start * rounded.itemsize)
    sums = [of.sum(axis=0) for of in partial]
    return [(float(wanted), float(there)) for wanted, there in sums]


def _blocks(models: Sequence[Checkpoint], x: Tensor) -> Iterator[Block]:
    """The blocks of a tensor of a base and models, read as they are needed."""
    infos = [model.tensors[x.name] for model in models]
    with ExitStack() as stack:
        reads = [stack.enter_context(m.reading(i)) for m, i in zip(models, infos, strict=True)]
        for number, start in enumerate(range(0, x.elements, BLOCK)):
            values = []
            for model, info, read in zip(models, infos, reads, strict=True):
                stored = np.empty(min(BLOCK, x.elements - start), numpy_dtype(info.dtype))
                read(stored.view(np.uint8).data, start * stored.itemsize)
                if has_nonfinite(stored, info.dtype):
                    raise NonfiniteError(f"NaN or infinity in {x.name} of {model.path}")
                values.append(np.empty(stored.size, x.dtype))
                widen(stored, values[-1])
            yield Block(number, start, values, 1)


def _digest(model: Checkpoint, info: TensorInfo) -> str:
    """XXH3 of a tensor's bytes."""
    digest = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(_MOST, info.nbytes)))
    with model.reading(info) as read:
        for start in range(0, info.nbytes, _MOST):
            part = buffer[: info.nbytes - start]
            read(part, start)
            digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class Packed:
    """Experts in one file, read back.

    Attributes:
        checkpoint: the file.
        experts: what they are called.
        scales: the factor of each.
        base: tensor → the digest that it had in the base.
    """

    checkpoint: Checkpoint
    experts: tuple[str, ...]
    scales: tuple[float, ...]
    base: Mapping[str, str]

    def number(self, expert: int | str) -> int:
        """The place of an expert, counted from 0, by its number from 1 on or its name.

        Raises:
            ParameterError: there is none, or several have the name.
        """
        count = len(self.experts)
        there = listed([f"{k} {name}" for k, name in enumerate(self.experts, 1)])
        named = [k for k, name in enumerate(self.experts) if name == expert]
        if len(named) > 1:
            numbers = " or ".join(str(k + 1) for k in named)
            raise ParameterError(f"the expert {expert!r} may be {numbers}: say its number")
        if named:
            return named[0]
        if str(expert).isdecimal() and 0 < int(expert) <= count:
            return int(expert) - 1
        raise ParameterError(
            f"{self.checkpoint.name} has no expert {expert!r}{nearest(str(expert), self.experts)} "
            f"(it has {there})"
        )


def open_experts(path: StrPath | Checkpoint) -> Packed:
    """Read what a file of experts says of itself.

    Raises:
        CheckpointError: it is no such file.
    """
    opened = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    text = opened.metadata.get(KEY)
    if text is None:
        raise CheckpointError(f"{opened.path} holds no experts: soup experts pack makes such files")
    try:
        told = json.loads(text)
        packed = Packed(
            opened, tuple(map(str, told["experts"])), tuple(map(float, told["scales"])),
            {str(name): str(digest) for name, digest in told["base"].items()},
        )  # fmt: skip
        fits = told["format"] == FORMAT and len(packed.experts) == len(packed.scales) > 0
        fits = fits and all(map(math.isfinite, packed.scales))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise CheckpointError(f"{opened.path}: what it says of its experts is not readable")
    wanted = {name for start in (_SHARED, _MASKS) for name in (start + n for n in packed.base)}
    faulty = sorted(wanted ^ opened.tensors.keys()) or [
        name for name in packed.base if not _is_sound(packed, name)
    ]
    if faulty:
        raise CheckpointError(f"{opened.path} does not hold what it says: {listed(faulty)}")
    return packed


def _is_sound(packed: Packed, name: str) -> bool:
    shared, masks = (packed.checkpoint.tensors[start + name] for start in (_SHARED, _MASKS))
    shape = (len(packed.experts), -(-shared.elements // 8))
    is_float = DTYPES[shared.dtype].kind == "float" and DTYPES[shared.dtype].bits >= 8
    return is_float and (masks.dtype, masks.shape) == ("U8", shape)


class Expert(Adapted):
    """A base model and one of several experts that are in one file.

    Its file is that one.

    Args:
        base: the base model.
        packed: the experts.
        number: which, counted from 0.

    Raises:
        MismatchError: they were packed over another base.
    """

    def __init__(self, base: Checkpoint, packed: Packed, number: int) -> None:
        own = packed.checkpoint
        Checkpoint.__init__(
            self, own.path, own.files, base.tensors, own.metadata, is_folder=own.is_folder,
            parts=own.parts, states=own.states, notes=own.notes,
        )  # fmt: skip
        self.base = base
        self.changes = {name: own.tensors[_SHARED + name] for name in packed.base}
        self.folded = {"experts": number + 1}
        self._masks = {name: own.tensors[_MASKS + name] for name in packed.base}
        self._scale = packed.scales[number]
        self._number = number
        _must_be_the_base(base, packed)

    def source(self, info: TensorInfo) -> Source:
        """Where the values of one of the base's tensors come from."""
        shared = self.changes.get(info.name)
        if not isinstance(shared, TensorInfo):
            return Stored(self.base, info)
        masks = self._masks[info.name]
        length = masks.shape[1]
        start = masks.start + self._number * length
        mask = masks._replace(shape=(length,), start=start, nbytes=length)
        wide = "F64" in (info.dtype, shared.dtype)
        computed = computed_info(info.name, info.shape, "F64" if wide else "F32")
        return Masked(computed, Stored(self, shared), Stored(self, mask), self._scale)


def _must_be_the_base(base: Checkpoint, packed: Packed) -> None:
    """Whether a base has, byte by byte, the tensors over which experts were packed."""
    floats = [n for n, info in base.tensors.items() if DTYPES[info.dtype].kind == "float"]
    differing = sorted(packed.base.keys() ^ floats)
    if not differing:
        infos = [base.tensors[name] for name in packed.base]
        with ThreadPoolExecutor(default_workers()) as pool:
            found = pool.map(lambda info: _digest(base, info), infos)
            differing = [i.name for i, now in zip(infos, found, strict=True)
                         if now != packed.base[i.name]]  # fmt: skip
    if differing:
        raise MismatchError(
            f"{packed.checkpoint.path} was packed over another base than {base.path}: "
            f"{counted(len(differing), 'tensor')} of {len(packed.base)} differ, {listed(differing)}"
        )


@dataclass(frozen=True)
class Masked:
    """An expert's task vector: scale · shared, where its bits are set.

    Attributes:
        info: name and shape of what is computed.
        shared: what all experts share.
        mask: the expert's own bits, eight in a byte, the first the highest.
        scale: the factor.
    """

    info: TensorInfo
    shared: Stored
    mask: Stored
    scale: float
    is_delta = True
    memory = 0
    at_hand = 0

    @property
    def model(self) -> Checkpoint:
        """The input that has it."""
        return self.shared.model

    @property
    def on_demand(self) -> int:
        """What is shared, and the bits."""
        return self.shared.info.nbytes + self.mask.info.nbytes

    def opened(self, read: Read) -> Values:
        """Nothing is read beforehand."""

        def values(start: int, stop: int) -> np.ndarray:
            first = start // 8
            stored = read(self.mask, first, -(-stop // 8)).astype(np.uint8)
            bits = np.unpackbits(stored)[start - 8 * first : stop - 8 * first]
            made = read(self.shared, start, stop).astype(numpy_dtype(self.info.dtype), copy=False)
            made *= bits
            made *= made.dtype.type(self.scale)
            return made

        return values


def get_expert(
    packed: StrPath | Checkpoint,
    output: StrPath,
    *,
    base: StrPath | Checkpoint,
    expert: int | str,
    dtype: object = None,
    shard_size: int | str | None = None,
    workers: int | None = None,
    force: bool = False,
    fsync: bool = True,
    progress: Progress | None = None,
) -> MergeReport:
    """Have one expert back, as a model, out of the file that several were put into.

    >>> modelsoup.get_expert("experts.safetensors", "b", base="base", expert=2)

    Args:
        packed: the file of experts.
        output: a path that ends in `.safetensors` makes a file, any other a model folder, into
            which the base's config and tokenizer are copied.
        base: the base model, the one over which they were packed.
        expert: its number, from 1 on, or its name.
        dtype: as which floats are stored; None is the base's.
        shard_size: as of `merge`, like what follows.
        workers: threads.
        force: replace an existing output.
        fsync: flush to the disk before the output appears.
        progress: told of every read and write.

    Raises:
        SoupError: anything that the user can put right; no output is left behind then.
    """
    found = open_experts(packed)
    number = found.number(expert)
    before = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    recipe = Recipe(method="task_arithmetic", weights=[1.0], dtype=dtype)
    return merge(
        [Expert(before, found, number)], output, recipe, base=before, shard_size=shard_size,
        workers=workers, force=force, fsync=fsync, progress=progress,
    )  # fmt: skip
