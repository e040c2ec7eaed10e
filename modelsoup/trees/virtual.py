"""Checkpoints that need not exist yet: what a plan knows of a result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files.checkpoint import Checkpoint, TensorInfo
from ..files.dtypes import DTYPES
from ..files.tokenizer import Vocabulary

Signature = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name → (safetensors dtype, shape)."""


class Virtual(Checkpoint):
    """A checkpoint that need not exist yet; what its tokenizer will know is told."""

    vocabulary: Vocabulary | None = None


def virtual(name: str, signature: Signature) -> Virtual:
    """A checkpoint that need not exist yet: names, dtypes and shapes, and no bytes to read."""
    path, start = Path(name), 0
    tensors = {}
    for tensor, (dtype, shape) in signature.items():
        nbytes = nbytes_of(dtype, shape)
        tensors[tensor] = TensorInfo(tensor, dtype, shape, path, start, nbytes)
        start += nbytes
    return Virtual(path, (path,), tensors, {}, is_folder=False)


def elements_of(shape: Sequence[int]) -> int:
    """How many elements a tensor has."""
    return math.prod(shape)


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """How many bytes it takes as it is stored."""
    return elements_of(shape) * DTYPES[dtype].bits // 8
