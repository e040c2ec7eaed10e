"""Low-rank adapters: merged into one adapter, and made of the difference of two checkpoints.

Adapters are merged in the space of their products: a sum of products is no product of sums, which
is why a mean of `lora_A` and a mean of `lora_B` is none of what the adapters do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import (
    MismatchError,
    ParameterError,
    are_counted,
    counted,
    listed,
    must_be_several,
    option,
    said,
)
from ..files.adapter_writer import Module, config_of, tensors_of, writing
from ..files.adapters import Adapter, Added, Base, Update, factors, open_adapter
from ..files.checkpoint import Checkpoint, StrPath, TensorInfo, open_checkpoint
from ..files.digest import digest_checkpoint
from ..files.dtypes import parse_dtype
from ..files.names import layers_of
from ..files.placing import LINEAGE_KEY
from ..files.quantized import scaled_weights
from ..files.writer import OutputTensor
from ..version import __version__
from .factors import CoreSpace, Factors, distance, of_rank, stacked
from .forms import Tensor, WeightedSum
from .in_memory import merge_arrays
from .lineage import FORMAT, input_entry
from .methods import get_method
from .methods.asking import outline
from .methods.registry import build_parameters
from .plan import Notice
from .recipe import check_seed


class Fit(NamedTuple):
    """How well factors stand for what they were made of.

    Attributes:
        module: whose factors they are.
        rank: their rank.
        error: the norm of what they miss, rounding included, as a share of the whole.
    """

    module: str
    rank: int
    error: float


@dataclass(frozen=True)
class AdapterReport:
    """What became an adapter.

    Attributes:
        output: where it was written.
        fits: of each module with factors, in order.
        whole: names of the tensors that are in it as they are.
        notices: what the user should know.
        bytes_written: of its tensors.
    """

    output: Path
    fits: tuple[Fit, ...]
    whole: tuple[str, ...]
    notices: tuple[Notice, ...]
    bytes_written: int

    def as_json(self) -> dict[str, Any]:
        """Plain data: what `soup lora … --json` prints."""
        return {
            "output": str(self.output),
            "modules": [fit._asdict() for fit in self.fits],
            "whole": list(self.whole),
            "bytes_written": self.bytes_written,
            "notices": [
                {"kind": n.kind, "message": n.message, "level": n.level} for n in self.notices
            ],
        }


def parse_weighted(text: str) -> tuple[Path, float]:
    """`PATH=WEIGHT`, or a path alone, of weight 1.

    Raises:
        ParameterError: the weight is no finite number.
    """
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ParameterError(f"{text!r} has the weight {weight!r}, which is no finite number")
    return Path(path), number


def merge_adapters(
    adapters: Sequence[StrPath],
    output: StrPath,
    *,
    weights: Sequence[float] | None = None,
    method: str = "task_arithmetic",
    parameters: Mapping[str, Any] | None = None,
    base: StrPath | Checkpoint | None = None,
    rank: int | None = None,
    dtype: object = None,
    seed: int = 0,
    force: bool = False,
    fsync: bool = True,
) -> AdapterReport:
    """Merge low-rank adapters into one, in the space of their products.

    A sum is exact, and its rank the sum of the ranks. Any other method merges the small matrices
    that the adapters are in their core space (see `factors.CoreSpace`).

    >>> modelsoup.merge_adapters(["a", "b"], "ab", weights=[0.7, 0.3], rank=16)

    Args:
        adapters: PEFT's folders, or files of kohya's or diffusers'; all of one kind.
        output: a folder for PEFT's, a `.safetensors` file for the others.
        weights: one an adapter; None is 1 for each: what they do is added up.
        method: a merge method.
        parameters: the method's others.
        base: the model that they are for, for tensors that they have whole, such as heads: without
            it these must be the same in all of them.
        rank: factorise anew, to this rank; what is lost is told. None keeps all.
        dtype: of the output's factors; None is the first adapter's.
        seed: of the methods that drop at random.
        force: replace an existing output.
        fsync: flush to the disk before the output appears.

    Raises:
        SoupError: anything that the user can put right; no output is left behind then.
    """
    must_be_several("adapters", adapters)
    if not adapters:
        raise ParameterError("a merge needs at least one adapter")
    check_rank(rank)
    seed = check_seed(seed)
    opened = [open_adapter(path) for path in adapters]
    naming = opened[0].naming
    names = [name for a in opened for name in (*a.updates, *a.added, *a.whole)]
    combined = _Combined(method, parameters or {}, check_weights(weights, len(opened)), seed, names)
    joints = _joints(opened, None if dtype is None else parse_dtype(dtype), rank, combined)
    known = base if base is None or isinstance(base, Checkpoint) else open_checkpoint(base)
    whole, added = _replacements(opened, known), _additions(opened)
    tensors = [t for joint in joints for t in tensors_of(joint.module, naming)]
    tensors += [*(one.tensor for one in whole), *(one.tensor for one in added)]
    told = {**combined.given, **({} if rank is None else {"rank": float(rank)})}
    checkpoints = [adapter.checkpoint for adapter in opened]
    fits = []
    with writing(
        output, naming, tensors, lineage_of(checkpoints, known, "merged", method, told, seed),
        read=[c.path for c in (*checkpoints, *([] if known is None else [known]))],
        force=force, fsync=fsync,
    ) as written:  # fmt: skip
        for joint in joints:
            products = {}
            for k, update in joint.parts.items():
                up, down = factors(opened[k], update)
                products[k] = up * up.dtype.type(update.scale / joint.module.scale), down
            whole_product, product = combined.product(joint, products, rank)
            stored = written.factors(joint.module, *product)
            error = distance(whole_product, (stored[0], stored[1]))
            fits.append(Fit(joint.module.name, joint.module.rank, error))
        for addition in added:
            written.put(addition.tensor, combined.array(addition, opened))
        for replacement in whole:
            written.put(replacement.tensor, combined.whole(replacement, opened, known))
        if naming == "peft":
            written.config(_config(opened, [joint.module for joint in joints], added))
    return AdapterReport(
        Path(output), tuple(fits), tuple(one.name for one in whole),
        tuple(_notices(opened, [one.name for one in whole if known is None])),
        sum(tensor.nbytes for tensor in tensors),
    )  # fmt: skip


def check_rank(rank: object) -> None:
    """Whether a rank that was asked for is one.

    Raises:
        ParameterError: it is not.
    """
    is_whole = isinstance(rank, int) and not isinstance(rank, bool)
    if rank is not None and not (is_whole and rank > 0):  # type: ignore[operator]
        raise ParameterError(f"rank is {said(rank)}, but must be a positive integer")


def check_weights(weights: Any, count: int) -> tuple[float, ...]:
    """One weight an adapter; 1 for each where none were given.

    Raises:
        ParameterError: another number of them.
    """
    if weights is None:
        return (1.0,) * count
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != count:
        raise ParameterError(
            f"weights is {said(weights)}, but must be {counted(count, 'number')}, one an adapter"
        )
    return tuple(weights)


class _Joint(NamedTuple):
    """A module of the output, and what it is made of.

    Attributes:
        module: as it is written.
        parts: adapter → its update.
        coefficients: one an adapter, where the result is a sum; None where values decide it.
    """

    module: Module
    parts: Mapping[int, Update]
    coefficients: tuple[float, ...] | None


def _joints(
    opened: Sequence[Adapter], dtype: str | None, rank: int | None, combined: _Combined
) -> list[_Joint]:
    """The modules of all adapters, which must be for one base."""
    names = dict.fromkeys(name for adapter in opened for name in adapter.updates)
    joints = []
    for name in names:
        parts = {k: a.updates[name] for k, a in enumerate(opened) if name in a.updates}
        first, *others = parts
        one = parts[first]
        for k in others:
            if _form(parts[k]) != _form(one):
                raise MismatchError(
                    f"the adapters are for different models: {name!r} is {_shown(one)} in "
                    f"{opened[first].path} and {_shown(parts[k])} in {opened[k].path}"
                )
        every = sum(update.rank for update in parts.values())
        core = min(every, one.rows), min(every, one.columns)
        coefficients = combined.coefficients(name, core)
        kept = every  # of a sum: columns and rows side by side
        if rank is not None or coefficients is None:
            kept = min(rank or every, *core)
        window = one.down.shape[2:] if one.mid is None else one.mid.shape[2:]
        inner = one.down.shape[1:2]
        scale = one.scale if opened[0].naming != "diffusers" and one.scale else 1.0
        joints.append(
            _Joint(
                Module(
                    name, (one.up.shape[0], kept, *one.up.shape[2:]), (kept, *inner, *window),
                    dtype or one.up.dtype, scale, one.is_embedding,
                ),
                parts, coefficients,
            )
        )  # fmt: skip
    return joints


def _form(update: Update) -> tuple[Any, ...]:
    window = update.down.shape[2:] if update.mid is None else update.mid.shape[2:]
    return update.rows, update.down.shape[1], window, update.is_embedding


def _shown(update: Update) -> str:
    rows, inner, window, _ = _form(update)
    return str([rows, inner, *window])


class _Addition(NamedTuple):
    """A tensor that adapters add to as it is: which it is, and adapter → what it adds."""

    tensor: OutputTensor
    parts: Mapping[int, Added]
    scale: float


class _Combined:
    """What a merge method makes of products, or of tensors that are added as they are.

    Args:
        method: its name.
        parameters: its parameters, but for the weights.
        weights: one an adapter.
        seed: of what is drawn at random.
        names: of all modules and tensors that there are, of which some may be in layers.
    """

    def __init__(
        self, method: str, parameters: Mapping[str, Any], weights: Sequence[float], seed: int,
        names: Sequence[str],
    ) -> None:  # fmt: skip
        self._method = chosen = get_method(method)
        self._count = count = len(weights)
        self._seed = seed
        self.given: dict[str, Any] = dict(parameters)
        if "weight" in self.given:
            raise ParameterError("the weights are given twice: as 'weights' and as 'weight'")
        if "weight" in chosen.parameters:
            self.given["weight"] = list(weights)
        elif any(weight != 1 for weight in weights):
            raise ParameterError(f"weights mean nothing to {method!r}")
        low, high = chosen.models
        if count < low or (high is not None and count > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            raise ParameterError(f"{method!r} merges {wanted} models, but {count} were given")
        self._layers = layers_of(names)
        if chosen.layers and not self._layers:
            raise ParameterError(
                f"{method!r} goes by the depth of layers, but nothing in the adapters is in one: "
                f"nothing has a name like 'layers.0.q_proj' or 'blocks.0.to_q'"
            )
        self._checked = build_parameters(chosen, self.given, count)

    def coefficients(self, name: str, shape: tuple[int, ...]) -> tuple[float, ...] | None:
        """Of a sum the adapters' weights, which no value decides; None of what is no sum.

        Args:
            name: of a module or tensor.
            shape: of what is merged of it, such as its core.
        """
        x = Tensor(
            name, shape, self._count, self._has_base, np.dtype(np.float64), self._seed,
            self._layers.get(name),
        )  # fmt: skip
        asked = outline(self._method, x, self._checked)
        if asked.totals:
            raise ParameterError(
                f"{self._method.name!r} asks of whole models what the space of the adapters does "
                f"not tell: merge what they make of a base (soup merge BASE --lora A --lora B)"
            )
        if asked.rounds or not isinstance(asked.form, WeightedSum):
            return None
        # The base, where it is among them, adds nothing: all are updates.
        return tuple(asked.form.coefficients)[-self._count :]

    @property
    def _has_base(self) -> bool:
        return self._method.base is not False

    def product(
        self, joint: _Joint, products: Mapping[int, Factors], rank: int | None
    ) -> tuple[Factors, Factors]:
        """What a module's updates are merged to, and that as factors of the module's rank."""
        module = joint.module
        if joint.coefficients is not None:
            parts = [(up * up.dtype.type(joint.coefficients[k]), down)
                     for k, (up, down) in products.items()]  # fmt: skip
            whole = stacked(parts)
            return whole, whole if rank is None else of_rank(whole, module.rank)
        space = CoreSpace(list(products.values()))
        cores = dict(zip(products, space.cores, strict=True))
        empty = np.zeros_like(space.cores[0])
        core = self._merged(module.name, [cores.get(k, empty) for k in range(self._count)])
        return space.factors(core), space.factors(core, module.rank)

    def array(self, addition: _Addition, opened: Sequence[Adapter]) -> np.ndarray:
        """What adapters add to a tensor, merged."""
        values = [np.zeros(addition.tensor.shape) for _ in range(self._count)]
        for k, part in addition.parts.items():
            values[k] = opened[k].checkpoint[part.info.name].astype(np.float64)
            values[k] *= part.scale / addition.scale
        return self._merged(addition.tensor.name, values)

    def whole(
        self, of: _Replacement, opened: Sequence[Adapter], base: Checkpoint | None
    ) -> np.ndarray:
        """What adapters put in the place of a tensor, merged over the base's."""
        stored = {k: opened[k].checkpoint[info.name] for k, info in of.parts.items()}
        if base is None or self.coefficients(of.name, of.tensor.shape) == (1,):
            return next(iter(stored.values()))
        own = base[of.base].astype(np.float32)
        models = [stored[k].astype(np.float32) if k in stored else own for k in range(self._count)]
        return self._merged(of.name, models, own)

    def _merged(
        self, name: str, arrays: Sequence[np.ndarray], base: np.ndarray | None = None
    ) -> np.ndarray:
        """Arrays merged, over zeros where there is no base."""
        if self._has_base:
            base = np.zeros_like(arrays[0]) if base is None else base
        return merge_arrays(
            self._method, arrays, base=base if self._has_base else None, name=name,
            seed=self._seed, layer=self._layers.get(name), **self.given,
        )  # fmt: skip


def _additions(opened: Sequence[Adapter]) -> list[_Addition]:
    names = dict.fromkeys(name for adapter in opened for name in adapter.added)
    additions = []
    for name in names:
        parts = {k: a.added[name] for k, a in enumerate(opened) if name in a.added}
        infos = [part.info for part in parts.values()]
        if len({info.shape for info in infos}) > 1:
            shapes = " and ".join(str(list(info.shape)) for info in infos)
            raise MismatchError(f"the adapters are for different models: {name!r} is {shapes}")
        one = next(iter(parts.values()))
        additions.append(_Addition(OutputTensor(*one.info[:3]), parts, one.scale))
    return additions


class _Replacement(NamedTuple):
    """A tensor that adapters have in the place of the base's.

    Attributes:
        name: the base's tensor, as the first of them calls it.
        tensor: as it is written.
        parts: adapter → its tensor.
        base: what the base calls it, where it is known.
    """

    name: str
    tensor: OutputTensor
    parts: Mapping[int, TensorInfo]
    base: str


def _replacements(opened: Sequence[Adapter], base: Checkpoint | None) -> list[_Replacement]:
    """What stands in the place of the base's tensors, and cannot be added up without them."""
    for adapter in opened:
        for module, update in adapter.updates.items():
            if update.magnitude is not None:
                raise MismatchError(
                    f"{adapter.path} has DoRA's magnitudes ({update.magnitude.name}), which mean "
                    f"nothing without the weights of {module!r}: fold it into the base instead, "
                    f"with soup merge BASE --lora {adapter.path}"
                )
    names = dict.fromkeys(name for adapter in opened for name in adapter.whole)
    known = None if base is None else Base(base.tensors)
    codes = {} if base is None else scaled_weights(base.tensors)
    found = []
    for name in names:
        parts = {k: a.whole[name] for k, a in enumerate(opened) if name in a.whole}
        first, *others = parts
        info, own = parts[first], ""
        if known is not None:
            own = known.tensor(opened[first], name)
            if own in codes:
                raise MismatchError(
                    f"{base.path if base else own} has {own!r} as codes with a scale, over which "
                    f"{name!r} of {opened[first].path} cannot be merged into an adapter: fold the "
                    f"adapters into the base instead, with soup merge BASE --lora"
                )
        infos = [*parts.values(), *([known.names[own]] if known is not None else [])]
        alike = len({one.shape for one in infos}) == 1
        if alike and known is None:
            values = opened[first].checkpoint[info.name].tobytes()
            alike = all(values == opened[k].checkpoint[parts[k].name].tobytes() for k in others)
        if not alike:
            paths = " and ".join(str(opened[k].path) for k in parts)
            how = "" if known is not None else f" ({option('base', 'BASE')} has them merged)"
            raise MismatchError(
                f"{paths} have {name!r} whole, not as an update, and they differ{how}"
            )
        found.append(_Replacement(name, OutputTensor(*info[:3]), parts, own))
    return found


def _notices(opened: Sequence[Adapter], whole: Sequence[str]) -> Iterator[Notice]:
    bases = {
        str(base): None for a in opened if (base := a.config.get("base_model_name_or_path"))
    }  # fmt: skip
    if len(bases) > 1:
        yield Notice("base", f"the adapters name different bases: {listed(list(bases))}", ())
    if whole and len(opened) > 1:
        yield Notice(
            "whole", f"{are_counted(len(whole), 'tensor')} in an adapter as a whole, and taken as "
            f"it is, whatever the weights: {listed(whole)}", tuple(whole), "note",
        )  # fmt: skip
    names = dict.fromkeys(name for adapter in opened for name in adapter.updates)
    some = [name for name in names if any(name not in a.updates for a in opened)]
    if some:
        yield Notice(
            "some", f"{are_counted(len(some), 'module')} not in every adapter: {listed(some)}",
            tuple(some), "note",
        )  # fmt: skip


def _config(
    opened: Sequence[Adapter], modules: Sequence[Module], added: Sequence[_Addition]
) -> dict[str, Any]:
    """PEFT's config of what adapters were merged to."""
    first = opened[0].config
    saved = [
        name for adapter in opened for name in adapter.config.get("modules_to_save") or ()
    ]  # fmt: skip
    biases = [b for a in opened if (b := a.config.get("bias", "none")) != "none"]
    kept = ("task_type", "base_model_name_or_path", "fan_in_fan_out", "lora_dropout", "revision")
    return config_of(
        modules,
        **{name: first[name] for name in kept if name in first},
        modules_to_save=list(dict.fromkeys(saved)) or None,
        bias=biases[0] if biases else "none",
        lora_bias=bool(added),
    )


def lineage_of(
    models: Sequence[Checkpoint], base: Checkpoint | None, how: str, method: str,
    parameters: Mapping[str, Any], seed: int,
) -> dict[str, str]:  # fmt: skip
    """The metadata of an adapter: what it was made of, as that of a merge."""
    content: dict[str, Any] = {
        "format": FORMAT, "version": __version__, "operation": "merge", "lora": how,
        "method": method, "parameters": dict(parameters), "seed": seed,
        "inputs": [
            input_entry(model, digest_checkpoint(model), sha256=False) for model in models
        ],
    }  # fmt: skip
    if base is not None:
        content["base"] = input_entry(base, digest_checkpoint(base), sha256=False)
    return {"format": "pt", LINEAGE_KEY: json.dumps(content, separators=(",", ":"))}
