"""How two checkpoints differ, tensor by tensor, streamed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import MismatchError, ParameterError, nearest
from ..files.checkpoint import Checkpoint, StrPath, TensorInfo, open_checkpoint
from ..files.dtypes import DTYPES, numpy_dtype
from .forms import BLOCK
from .threads import default_workers

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
        first_moved: |a − base| / |base|, at least 0; this and what follows is NaN without a base,
            and where the base has no such float tensor.
        second_moved: the same of the second.
        task_cosine: of the angle between the task vectors a − base and b − base; NaN where one is
            all zero.
        task_sign_agreement: of the elements that both changed, the share that both made larger or
            both smaller; NaN where there are none.
    """

    name: str
    tensors: int
    parameters: int
    equal: bool
    cosine: float
    relative_l2: float
    sign_agreement: float
    first_moved: float = math.nan
    second_moved: float = math.nan
    task_cosine: float = math.nan
    task_sign_agreement: float = math.nan


@dataclass(frozen=True)
class DiffReport:
    """How two checkpoints differ.

    Attributes:
        rows: in the first checkpoint's order.
        total: all that both have, together.
        only_in_first: names that the second has not.
        only_in_second: names that the first has not.
        mismatched: (name, what the first has, what the second has), for another shape or kind.
        not_in_base: float tensors that both have, and the base not, or in another shape; None where
            no base was given.
    """

    rows: tuple[DiffRow, ...]
    total: DiffRow
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    mismatched: tuple[tuple[str, str, str], ...]
    not_in_base: tuple[str, ...] | None = None

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
            "not_in_base": None if self.not_in_base is None else list(self.not_in_base),
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
    first: StrPath | Checkpoint, second: StrPath | Checkpoint, *, by: By = "layer",
    base: StrPath | Checkpoint | None = None,
) -> DiffReport:  # fmt: skip
    """Compare two checkpoints in little memory.

    Float tensors are compared by value, whatever their dtypes; others must be equal in their bytes.

    Args:
        first: a path or an open checkpoint.
        second: likewise.
        by: what a row of the report is.
        base: likewise, what both were tuned from: then task vectors are compared as well.

    Raises:
        CheckpointError: one of them cannot be read.
        MismatchError: the base has none of the float tensors that both have.
        ParameterError: `by` is none of `tensor`, `layer` and `group`.
    """
    if by not in BY:
        raise ParameterError(f"by is {by!r}{nearest(by, BY)} (expected {', '.join(BY)})")
    a, b = (x if isinstance(x, Checkpoint) else open_checkpoint(x) for x in (first, second))
    c = base if isinstance(base, Checkpoint) or base is None else open_checkpoint(base)
    pairs: list[list[_Input]] = []
    mismatched, lacking = [], []
    for name, info in a.tensors.items():
        other = b.tensors.get(name)
        if other is None:
            continue
        if not _comparable(info, other):
            mismatched.append((name, _described(info), _described(other)))
            continue
        pairs.append([(a, info), (b, other)])
        if c is None or DTYPES[info.dtype].kind != "float":
            continue
        before = c.tensors.get(name)
        if before is None or not _comparable(info, before):
            lacking.append(name)
        else:
            pairs[-1].append((c, before))
    if c is not None and pairs and not any(len(pair) == 3 for pair in pairs):
        raise MismatchError(
            f"{c.path} is no base of these two: it has none of their float tensors in their shape"
            f"{f', such as {lacking[0]}' if lacking else ''}"
        )
    with ThreadPoolExecutor(default_workers()) as pool:
        sums = list(pool.map(_compare, pairs))
    groups: dict[str, list[_Sums]] = {}
    for ((_, info), *_), found in zip(pairs, sums, strict=True):
        groups.setdefault(_row_name(info.name, by), []).append(found)
    return DiffReport(
        tuple(_row(name, found) for name, found in groups.items()),
        _row("all", sums),
        tuple(name for name in a.tensors if name not in b.tensors),
        tuple(name for name in b.tensors if name not in a.tensors),
        tuple(mismatched),
        None if c is None else tuple(lacking),
    )


_Input = tuple[Checkpoint, TensorInfo]


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
    """Of one tensor: Σa², Σb², Σab, Σ(a−b)², and how many signs agree.

    With a base c also Σc², Σ(a−c)², Σ(b−c)², Σ(a−c)(b−c), how many elements both a and b changed,
    and of how many of these the signs of the changes agree.
    """

    elements: int
    equal: bool
    aa: float = math.nan
    bb: float = math.nan
    ab: float = math.nan
    dd: float = math.nan
    signs: float = math.nan
    of_tasks: tuple[float, ...] | None = None


def _compare(inputs: Sequence[_Input]) -> _Sums:
    """Two tensors, and perhaps that of a base."""
    (_, a), *_ = inputs
    if DTYPES[a.dtype].kind != "float":
        equal = all(x.tobytes() == y.tobytes() for x, y in _chunks(inputs, raw=True))
        return _Sums(a.elements, equal)
    sums, of_tasks = np.zeros(5), np.zeros(6)
    equal = True
    with np.errstate(all="ignore"):
        for x, y, *base in _chunks(inputs, raw=False):
            equal = equal and bool(np.array_equal(x, y, equal_nan=True))
            gap = x - y
            alike = np.count_nonzero(np.sign(x) == np.sign(y))
            sums += [np.add.reduce(p) for p in (x * x, y * y, x * y, gap * gap)] + [alike]
            if base:
                of_tasks += _of_tasks(x, y, base[0])
    tasks = tuple(of_tasks.tolist()) if len(inputs) > 2 else None
    aa, bb, ab, dd, signs = sums.tolist()
    return _Sums(a.elements, equal, aa, bb, ab, dd, signs, tasks)


def _of_tasks(x: np.ndarray, y: np.ndarray, base: np.ndarray) -> list[float]:
    a, b = x - base, y - base
    along = a * b
    told = [float(np.add.reduce(p)) for p in (base * base, a * a, b * b, along)]
    signs = np.sign(a) * np.sign(b)  # the product of small changes might be rounded to 0
    return [*told, float(np.count_nonzero(signs)), float(np.count_nonzero(signs > 0))]


def _chunks(inputs: Sequence[_Input], *, raw: bool) -> Iterator[list[np.ndarray]]:
    """The tensors' elements in float64, or their bytes, a block at a time."""
    with ExitStack() as stack:
        reads = [stack.enter_context(model.reading(info)) for model, info in inputs]
        kinds = [np.dtype(np.uint8) if raw else numpy_dtype(info.dtype) for _, info in inputs]
        first = inputs[0][1]
        total = first.nbytes if raw else first.elements
        for start in range(0, total, BLOCK):
            count = min(BLOCK, total - start)
            arrays = []
            for read, kind in zip(reads, kinds, strict=True):
                array = np.empty(count * kind.itemsize, np.uint8)
                read(array.data, start * kind.itemsize)
                arrays.append(array if raw else array.view(kind).astype(np.float64))
            yield arrays


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
    agreement = total("signs") / elements if elements else math.nan
    return DiffRow(
        name, len(found), sum(s.elements for s in found), equal, _cosine(aa, bb, ab),
        _relative(dd, aa), agreement, *_row_of_tasks([s.of_tasks for s in floats if s.of_tasks]),
    )  # fmt: skip


def _row_of_tasks(sums: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """How far both moved from the base; of their task vectors the cosine and the signs."""
    if not sums:
        return (math.nan,) * 4
    cc, aa, bb, ab, changed, agree = (
        math.fsum(_finite_or_nan(of)) for of in zip(*sums, strict=True)
    )
    agreement = agree / changed if changed else math.nan
    return _relative(aa, cc), _relative(bb, cc), _cosine(aa, bb, ab), agreement


def _cosine(aa: float, bb: float, ab: float) -> float:
    norms = math.sqrt(aa) * math.sqrt(bb)
    return max(-1.0, min(1.0, ab / norms)) if norms > 0 else math.nan


def _relative(dd: float, aa: float) -> float:
    """√(dd / aa); infinite where only the divisor is zero."""
    if aa > 0:
        return math.sqrt(dd / aa)
    if math.isnan(aa) or math.isnan(dd):
        return math.nan
    return math.inf if dd > 0 else 0.0


def _finite_or_nan(values: Iterable[float]) -> list[float]:
    """Fsum raises on ∞ − ∞, where a NaN says what there is to say."""
    return [value if math.isfinite(value) else math.nan for value in values]
