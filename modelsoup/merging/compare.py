"""How two checkpoints differ, tensor by tensor, streamed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ParameterError, nearest
from ..files.checkpoint import Checkpoint, StrPath, TensorInfo, open_checkpoint
from ..files.dtypes import DTYPES, numpy_dtype
from .forms import BLOCK
from .workers import default_workers

By = Literal["tensor", "layer", "group"]
BY: tuple[By, ...] = ("tensor", "layer", "group")


@dataclass(frozen=True)
class DiffRow:
    """How one tensor, layer or group of two checkpoints differs.

    Attributes:
        name: of the tensor; of the layer (all before the last dot); or of the group (all before
            the first dot).
        tensors: how many tensors it has, in both checkpoints, with the same shape.
        parameters: how many elements.
        equal: whether all values are the same, NaN counting as equal to NaN.
        cosine: of the angle between the two, in [−1, 1]; NaN where one is all zero or not a float.
        relative_l2: |a − b| / |a|, at least 0; infinite where only a is all zero.
        sign_agreement: the share of elements whose signs are the same, in [0, 1].
    """

    name: str
    tensors: int
    parameters: int
    equal: bool
    cosine: float
    relative_l2: float
    sign_agreement: float


@dataclass(frozen=True)
class DiffReport:
    """How two checkpoints differ.

    Attributes:
        rows: in the first checkpoint's order.
        total: all that both have, together.
        only_in_first: names that the second has not.
        only_in_second: names that the first has not.
        mismatched: (name, what the first has, what the second has), for another shape or kind.
    """

    rows: tuple[DiffRow, ...]
    total: DiffRow
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    mismatched: tuple[tuple[str, str, str], ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data; a number that JSON cannot hold (NaN, infinity) is null."""
        return {
            "equal": self.equal,
            "rows": [_row_json(row) for row in self.rows],
            "total": _row_json(self.total),
            "only_in_first": list(self.only_in_first),
            "only_in_second": list(self.only_in_second),
            "mismatched": [
                {"name": name, "first": first, "second": second}
                for name, first, second in self.mismatched
            ],
        }

    @property
    def equal(self) -> bool:
        """Whether names, shapes and values are the same."""
        return self.total.equal and not (
            self.only_in_first or self.only_in_second or self.mismatched
        )


def _row_json(row: DiffRow) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in dataclasses.asdict(row).items()
    }


def diff(
    first: StrPath | Checkpoint, second: StrPath | Checkpoint, *, by: By = "layer"
) -> DiffReport:
    """Compare two checkpoints in little memory.

    Float tensors are compared by value, whatever their dtypes; others must be equal in their bytes.

    Args:
        first: a path or an open checkpoint.
        second: likewise.
        by: what a row of the report is.

    Raises:
        CheckpointError: one of them cannot be read.
        ParameterError: `by` is none of `tensor`, `layer` and `group`.
    """
    if by not in BY:
        raise ParameterError(f"by is {by!r}{nearest(by, BY)} (expected {', '.join(BY)})")
    a, b = (x if isinstance(x, Checkpoint) else open_checkpoint(x) for x in (first, second))
    pairs, mismatched = [], []
    for name, info in a.tensors.items():
        other = b.tensors.get(name)
        if other is None:
            continue
        if _comparable(info, other):
            pairs.append((info, other))
        else:
            mismatched.append((name, _described(info), _described(other)))
    with ThreadPoolExecutor(default_workers()) as pool:
        sums = list(pool.map(lambda pair: _compare(a, b, *pair), pairs))
    groups: dict[str, list[_Sums]] = {}
    for (info, _), found in zip(pairs, sums, strict=True):
        groups.setdefault(_row_name(info.name, by), []).append(found)
    return DiffReport(
        tuple(_row(name, found) for name, found in groups.items()),
        _row("all", sums),
        tuple(name for name in a.tensors if name not in b.tensors),
        tuple(name for name in b.tensors if name not in a.tensors),
        tuple(mismatched),
    )


def _comparable(a: TensorInfo, b: TensorInfo) -> bool:
    floats = DTYPES[a.dtype].kind == "float" and DTYPES[b.dtype].kind == "float"
    return a.shape == b.shape and (floats or a.dtype == b.dtype)


def _described(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _row_name(name: str, by: By) -> str:
    if by == "tensor":
        return name
    return (name.rpartition(".")[0] if by == "layer" else name.partition(".")[0]) or name


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of one tensor: Σa², Σb², Σab, Σ(a−b)², and how many signs agree."""

    elements: int
    equal: bool
    aa: float = math.nan
    bb: float = math.nan
    ab: float = math.nan
    dd: float = math.nan
    signs: float = math.nan


def _compare(first: Checkpoint, second: Checkpoint, a: TensorInfo, b: TensorInfo) -> _Sums:
    if DTYPES[a.dtype].kind != "float":
        chunks = _chunks(first, second, a, b, raw=True)
        equal = all(x.tobytes() == y.tobytes() for x, y in chunks)
        return _Sums(a.elements, equal)
    sums = np.zeros(5)
    equal = True
    with np.errstate(all="ignore"):
        for stored_a, stored_b in _chunks(first, second, a, b, raw=False):
            x, y = stored_a.astype(np.float64), stored_b.astype(np.float64)
            equal = equal and bool(np.array_equal(x, y, equal_nan=True))
            gap = x - y
            signs = np.count_nonzero(np.sign(x) == np.sign(y))
            sums += [np.add.reduce(p) for p in (x * x, y * y, x * y, gap * gap)] + [signs]
    return _Sums(a.elements, equal, *sums.tolist())


def _chunks(
    first: Checkpoint, second: Checkpoint, a: TensorInfo, b: TensorInfo, *, raw: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The two tensors' elements (or bytes), a block at a time."""
    with first.reading(a) as read_a, second.reading(b) as read_b:
        kinds = [np.dtype(np.uint8) if raw else numpy_dtype(info.dtype) for info in (a, b)]
        total = a.nbytes if raw else a.elements
        for start in range(0, total, BLOCK):
            count = min(BLOCK, total - start)
            arrays = []
            for read, kind in zip((read_a, read_b), kinds, strict=True):
                array = np.empty(count * kind.itemsize, np.uint8)
                read(array.data, start * kind.itemsize)
                arrays.append(array.view(kind))
            yield arrays[0], arrays[1]


def _row(name: str, found: Sequence[_Sums]) -> DiffRow:
    floats = [s for s in found if not math.isnan(s.signs)]

    def total(field: str) -> float:
        return math.fsum(_finite_or_nan(getattr(s, field) for s in floats))

    elements = sum(s.elements for s in floats)
    equal = all(s.equal for s in found)
    if not floats:
        parameters = sum(s.elements for s in found)
        return DiffRow(name, len(found), parameters, equal, math.nan, math.nan, math.nan)
    aa, bb, ab, dd = (total(field) for field in ("aa", "bb", "ab", "dd"))
    norms = math.sqrt(aa) * math.sqrt(bb)
    cosine = max(-1.0, min(1.0, ab / norms)) if norms > 0 else math.nan
    if aa > 0:
        relative = math.sqrt(dd / aa)
    elif math.isnan(aa) or math.isnan(dd):
        relative = math.nan
    else:
        relative = math.inf if dd > 0 else 0.0
    agreement = total("signs") / elements if elements else math.nan
    return DiffRow(
        name, len(found), sum(s.elements for s in found), equal, cosine, relative, agreement
    )


def _finite_or_nan(values: Iterable[float]) -> list[float]:
    """Fsum raises on ∞ − ∞, where a NaN says what there is to say."""
    return [value if math.isfinite(value) else math.nan for value in values]
