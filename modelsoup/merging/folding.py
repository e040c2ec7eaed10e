"""Low-rank adapters as inputs of a merge: a base model, and what each adapter makes of it.

To a method an adapter is a model like others, of which the task vector happens to be known. Nothing
of it is ever whole: factors are at hand while their tensor is merged, and rows of their product are
computed with the slice that they are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import MismatchError, ParameterError, must_be_several
from ..files.adapters import Adapter, Added, Base, Update, open_adapter
from ..files.checkpoint import Checkpoint, StrPath, TensorInfo
from ..files.quantized import scaled_weights
from .forms import BLOCK
from .methods import get_method
from .recipe import Recipe
from .sources import Product, Read, Source, Stored, Values, computed_info

Lora = Mapping[StrPath, float] | Sequence[StrPath]
"""Adapters with weights or, of weight 1, without."""


class Adapted(Checkpoint):
    """A base model with an adapter applied: the base's tensors, some of them changed.

    Its files are the adapter's.

    Attributes:
        folded: what a lineage says of how such a model is made.

    Args:
        base: the base model.
        adapter: the adapter.
        names: the base's, as adapters call them.

    Raises:
        MismatchError: the adapter is for another base, or cannot be applied to codes.
    """

    folded: Mapping[str, Any] = {"lora": "folded"}

    def __init__(self, base: Checkpoint, adapter: Adapter, names: Base) -> None:
        own = adapter.checkpoint
        super().__init__(
            own.path, own.files, base.tensors, own.metadata, is_folder=own.is_folder,
            parts=own.parts, states=own.states, notes=own.notes,
        )  # fmt: skip
        self.base = base
        self.changes = names.changes(adapter)
        codes = scaled_weights(base.tensors)
        for name, change in self.changes.items():
            if isinstance(change, Update) and change.magnitude is not None and name in codes:
                raise MismatchError(
                    f"{own.path} has DoRA's magnitudes for {name!r}, of which the base has codes: "
                    f"the lengths of its rows are not known, so dequantise it first"
                )

    def source(self, info: TensorInfo) -> Source:
        """Where the values of one of the base's tensors come from."""
        change = self.changes.get(info.name)
        if change is None:
            return Stored(self.base, info)
        if isinstance(change, TensorInfo):
            return Stored(self, change)
        # In the dtype of the arithmetic, and so not rounded before it.
        computed = computed_info(info.name, info.shape, "F64" if info.dtype == "F64" else "F32")
        if isinstance(change, Added):
            return Multiple(computed, Stored(self, change.info), change.scale)
        product = Product(
            computed, Stored(self, change.up), Stored(self, change.down), change.scale,
            change.is_transposed, None if change.mid is None else Stored(self, change.mid),
        )  # fmt: skip
        if change.magnitude is None:
            return product
        return Dora(product, Stored(self.base, info), Stored(self, change.magnitude))


@dataclass(frozen=True)
class Multiple:
    """A task vector that is stored, times a number."""

    info: TensorInfo
    of: Stored
    scale: float
    is_delta = True
    memory = 0
    at_hand = 0

    @property
    def model(self) -> Checkpoint:
        """That of the task vector."""
        return self.of.model

    @property
    def on_demand(self) -> int:
        """All of it."""
        return self.of.info.nbytes

    def opened(self, read: Read) -> Values:
        """Nothing is read beforehand."""
        return lambda start, stop: read(self.of, start, stop) * np.float32(self.scale)


@dataclass(frozen=True)
class Dora:
    """A weight with an update, of which the rows have given lengths (Liu et al., ICML 2024).

    m · (W + ΔW) / ‖W + ΔW‖, where rows are those of the outputs: columns, where a weight is stored
    with its inputs first.

    Attributes:
        product: the update ΔW.
        of: the base's tensor W.
        magnitude: the lengths m.
    """

    product: Product
    of: Stored
    magnitude: Stored
    is_delta = False

    @property
    def model(self) -> Checkpoint:
        """That of the update."""
        return self.product.model

    @property
    def info(self) -> TensorInfo:
        """What is computed."""
        return self.product.info

    @property
    def at_hand(self) -> int:
        """Factors, lengths, and the base's tensor, whose rows are measured first."""
        return self.product.at_hand + self.magnitude.info.nbytes + self.of.info.nbytes

    @property
    def memory(self) -> int:
        """The factors and a number for each output."""
        return self.product.memory + 8 * self.magnitude.info.elements

    @property
    def on_demand(self) -> int:
        """The base's tensor."""
        return self.of.info.nbytes

    def opened(self, read: Read) -> Values:
        """Measure the rows, a few at a time; they are computed again when they are asked for."""
        product, shape = self.product.opened(read), self.of.info.shape
        width = self.of.info.elements // shape[0]
        by_column = self.product.transposed
        squares = np.zeros(width if by_column else shape[0])

        def summed(start: int, stop: int) -> np.ndarray:
            return read(self.of, start, stop) + product(start, stop)

        at_once = max(1, BLOCK // width)
        for row in range(0, shape[0], at_once):
            last = min(row + at_once, shape[0])
            lengths = np.square(
                summed(row * width, last * width).reshape(-1, width), dtype=np.float64
            )
            if by_column:
                squares += lengths.sum(0)
            else:
                squares[row:last] = lengths.sum(1)
        wanted = read(self.magnitude, 0, self.magnitude.info.elements).astype(np.float64)
        # A row of zeros has no direction, and stays one.
        gains = np.divide(wanted, np.sqrt(squares), out=np.zeros_like(wanted), where=squares > 0)

        def values(start: int, stop: int) -> np.ndarray:
            first, last = start // width, -(-stop // width)
            made = summed(start, stop)
            factors = np.tile(gains, last - first) if by_column else gains[first:last].repeat(width)
            made *= factors[start - first * width :][: len(made)].astype(made.dtype)
            return made

        return values


def with_adapters(
    opened: Sequence[Checkpoint], base: Checkpoint | None, recipe: Recipe, lora: Lora
) -> tuple[list[Checkpoint], Checkpoint, Recipe]:
    """A model with adapters as a merge: what they make of it, the model as the base, and how."""
    if len(opened) != 1 or base is not None:
        raise ParameterError(
            f"adapters are applied to one model, but {len(opened)} and {'a' if base else 'no'} "
            f"base model were given"
        )
    if recipe.renames or recipe.slices or recipe.files_from:
        given = "renames" if recipe.renames else "slices" if recipe.slices else "files_from"
        raise ParameterError(f"{given} and adapters do not go together: fold them first")
    must_be_several("lora", lora)
    if not lora:
        raise ParameterError("lora names no adapter")
    weights = list(lora.values()) if isinstance(lora, Mapping) else [1.0] * len(lora)
    names = Base(opened[0].tensors)
    models = [Adapted(opened[0], open_adapter(path), names) for path in lora]
    method = get_method("task_arithmetic" if recipe.method is None else recipe.method)
    if recipe.weights is not None or recipe.beta is not None:
        given = "weights" if recipe.beta is None else "beta"
        raise ParameterError(f"the adapters' weights are given twice: with them and by {given}")
    recipe = replace(recipe, method=method.name)
    if "weight" in method.parameters or any(weight != 1 for weight in weights):
        recipe = replace(recipe, weights=weights)
    return list(models), opened[0], recipe
