"""Merging arrays in memory: what an engine does with files, said in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ParameterError, option
from .forms import Block, Tensor, blocks_of, evaluated
from .methods.asking import Asked, outline
from .methods.registry import Method, build_parameters, get_method


def merge_arrays(
    method: str | Method, models: Sequence[np.ndarray], *, base: np.ndarray | None = None,
    aux: Mapping[str, Sequence[np.ndarray]] | None = None, name: str = "", seed: int = 0,
    layer: tuple[int, int] | None = None, **parameters: Any,
) -> np.ndarray:  # fmt: skip
    """Merge arrays of one shape, as the tensors of checkpoints are merged.

    >>> modelsoup.merge_arrays("ties", [a, b], base=base, weight=1, density=0.2)

    Args:
        method: a merge method or its name.
        models: their arrays, float32 or float64; narrower floats are widened to float32.
        base: the base model's, for methods that have one.
        aux: auxiliary inputs, by name, one a model.
        name: of the tensor, by which random masks are keyed.
        seed: of random masks.
        layer: its layer's index and how many there are, for methods to which that matters.
        **parameters: of the method.

    Returns:
        the result in the dtype of the arithmetic: float64 where an input is, else float32.

    Raises:
        ParameterError: arrays of different shapes, or what does not fit the method.
    """
    chosen = get_method(method) if isinstance(method, str) else method
    given = [np.asarray(one) for one in (*([] if base is None else [base]), *models)]
    if len({one.shape for one in given}) != 1:
        raise ParameterError(f"arrays of different shapes: {[list(one.shape) for one in given]}")
    low, high = chosen.models
    if len(models) < low or (high is not None and len(models) > high):
        raise ParameterError(f"{chosen.name!r} merges {low} to {high} models, not {len(models)}")
    if (base is None and chosen.base is True) or (base is not None and chosen.base is False):
        has = "needs" if base is None else "uses no"
        raise ParameterError(f"{chosen.name!r} {has} base model ({option('base', 'BASE')})")
    shape, beside = given[0].shape, aux or {}
    for what, arrays in beside.items():
        wanted = chosen.auxiliary(what).shape(shape)
        if len(arrays) != len(models) or any(np.shape(one) != wanted for one in arrays):
            raise ParameterError(
                f"{what!r} is not one array of shape {wanted and list(wanted)} for each model"
            )
        given += map(np.asarray, arrays)
    dtype = np.dtype(np.float64 if any(one.dtype == np.float64 for one in given) else np.float32)
    x = Tensor(
        name, shape, len(models), base is not None, dtype, seed, layer, aux=tuple(beside)
    )  # fmt: skip
    checked = build_parameters(chosen, parameters, len(models))
    return carried_out(chosen, x, [one.astype(dtype) for one in given], checked)


def carried_out(
    chosen: Method, x: Tensor, inputs: Sequence[np.ndarray], parameters: Mapping[str, Any]
) -> np.ndarray:
    """What a method makes of a tensor whose inputs are at hand, in the dtype of the arithmetic."""
    planned = outline(chosen, x, parameters)
    if not x.elements:
        return np.empty(x.shape, x.dtype)
    asked = Asked(chosen, x, parameters, planned)
    while asked.merging is None:
        wide = [one.astype(np.float64) for one in inputs] if asked.wide else inputs
        with np.errstate(all="ignore"):
            if asked.whole:
                asked.add(Block(0, 0, wide, int(x.has_base)))
            else:
                for block in blocks_of(x, wide, rows=asked.rows):
                    asked.add(block)
        asked.end_pass()
    return evaluated(asked.merging, x, inputs)
