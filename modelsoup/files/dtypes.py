"""safetensors' dtypes, and the way to float32 or float64 and back.

Arithmetic is in float32 (float64 where an input is float64) whatever the stored dtype; a result is
rounded once, to nearest even, when it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from ..errors import ParameterError, nearest

Kind = Literal["float", "integer", "opaque"]


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype of the safetensors format.

    Attributes:
        name: the name in a header, such as `BF16`.
        bits: the size of one element.
        kind: `float` can be merged; `integer` (booleans too) is never averaged; `opaque` is what
            numpy cannot compute with, and is carried over byte for byte.
        numpy: the numpy (or ml_dtypes) name, or None for sub-byte dtypes.
        rank: position in the order in which the reference library writes tensors, high first.
    """

    name: str
    bits: int
    kind: Kind
    numpy: str | None
    rank: int


# In the reference library's order, which its writer sorts by, descending.
_TABLE: tuple[tuple[str, int, Kind, str | None], ...] = (
    ("BOOL", 8, "integer", "bool"),
    ("F4", 4, "opaque", None),
    ("F6_E2M3", 6, "opaque", None),
    ("F6_E3M2", 6, "opaque", None),
    ("U8", 8, "integer", "uint8"),
    ("I8", 8, "integer", "int8"),
    ("F8_E5M2", 8, "float", "float8_e5m2"),
    ("F8_E4M3", 8, "float", "float8_e4m3fn"),
    ("F8_E8M0", 8, "opaque", "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "opaque", "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "opaque", "float8_e5m2fnuz"),
    ("I16", 16, "integer", "int16"),
    ("U16", 16, "integer", "uint16"),
    ("F16", 16, "float", "float16"),
    ("BF16", 16, "float", "bfloat16"),
    ("I32", 32, "integer", "int32"),
    ("U32", 32, "integer", "uint32"),
    ("F32", 32, "float", "float32"),
    ("C64", 64, "opaque", "complex64"),
    ("F64", 64, "float", "float64"),
    ("I64", 64, "integer", "int64"),
    ("U64", 64, "integer", "uint64"),
)

DTYPES: dict[str, DType] = {
    name: DType(name, bits, kind, numpy, rank)
    for rank, (name, bits, kind, numpy) in enumerate(_TABLE)
}

_ALIASES = {
    "f64": "F64", "float64": "F64", "fp64": "F64", "double": "F64",
    "f32": "F32", "float32": "F32", "fp32": "F32", "float": "F32",
    "f16": "F16", "float16": "F16", "fp16": "F16", "half": "F16",
    "bf16": "BF16", "bfloat16": "BF16",
    "f8_e4m3": "F8_E4M3", "float8_e4m3fn": "F8_E4M3", "fp8_e4m3": "F8_E4M3",
    "f8_e5m2": "F8_E5M2", "float8_e5m2": "F8_E5M2", "fp8_e5m2": "F8_E5M2",
}  # fmt: skip

# The bits of the largest finite magnitude; anything above, sign aside, is infinity or NaN.
_LARGEST_FINITE: dict[str, int] = {
    "F64": 0x7FEF_FFFF_FFFF_FFFF,
    "F32": 0x7F7F_FFFF,
    "F16": 0x7BFF,
    "BF16": 0x7F7F,
    "F8_E5M2": 0x7B,
    "F8_E4M3": 0x7E,  # no infinity: 0x7F is NaN
}


def parse_dtype(dtype: object) -> str:
    """The safetensors name of a float dtype.

    Args:
        dtype: a name such as `bf16`, `float32` or `F8_E4M3`, or a dtype of numpy, ml_dtypes or
            torch.

    Raises:
        ParameterError: not a dtype that can be merged.
    """
    text = str(getattr(dtype, "name", getattr(dtype, "__name__", dtype))).removeprefix("torch.")
    name = _ALIASES.get(text.lower())
    if name is None:
        raise ParameterError(
            f"dtype {text!r} is not a float dtype that can be written"
            f"{nearest(text.lower(), _ALIASES)} (expected f64, f32, f16, bf16, f8_e4m3 or f8_e5m2)"
        )
    return name


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a safetensors dtype.

    Raises:
        ParameterError: the dtype is smaller than a byte, so that no array can hold it.
    """
    numpy_name = DTYPES[name].numpy
    if numpy_name is None:
        raise ParameterError(f"dtype {name} is smaller than a byte and has no numpy array")
    if numpy_name.startswith(("bfloat", "float8")):
        import ml_dtypes  # 0.1 s to import, and only these dtypes need it

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, numpy_name))
        return found
    return np.dtype(numpy_name)


def compute_dtype(names: tuple[str, ...]) -> np.dtype[Any]:
    """float64 if any of the stored dtypes is F64, else float32."""
    return np.dtype("float64" if "F64" in names else "float32")


def widen(stored: np.ndarray, out: np.ndarray) -> None:
    """Write the values of `stored` (any float dtype) into `out` (float32 or float64), exactly."""
    with np.errstate(invalid="ignore"):  # a signalling NaN; `has_nonfinite` tells
        np.copyto(out, stored)


def narrow(values: np.ndarray, out: np.ndarray) -> None:
    """Round `values` (float32 or float64) into `out` (any float dtype), once, to nearest even.

    What is too large becomes infinity, or NaN where the dtype has no infinity; the caller finds it
    with `has_nonfinite`.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        round_into(values, out)


def round_into(values: np.ndarray, out: np.ndarray) -> None:
    """As `narrow`, where numpy is told already to ignore what happens: that takes several calls."""
    if values.dtype == np.float64 and out.dtype.name not in ("float64", "float32", "float16"):
        # ml_dtypes goes by way of float32, which would round twice.
        values = _round_to_odd(values)
    np.copyto(out, values, casting="unsafe")


def _round_to_odd(values: np.ndarray) -> np.ndarray:
    """float64 → float32, inexact results with an odd last bit.

    Rounding such a value once more, to nearest even in a format of at most 22 bits, gives what
    rounding the float64 directly would (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    rounded = values.astype(np.float32)
    bits = rounded.view(np.uint32)
    inexact = (rounded.astype(np.float64) != values) & np.isfinite(values)
    away = inexact & (np.abs(rounded).astype(np.float64) > np.abs(values))
    bits[away] -= 1  # back towards zero: truncation
    bits[inexact] |= 1
    return rounded


def has_nonfinite(stored: np.ndarray, name: str) -> bool:
    """Whether any element of `stored`, an array of the dtype `name`, is infinite or NaN.

    Two integer maxima, one over each sign, are several times faster than `isfinite` and its mask.
    """
    if stored.size == 0:
        return False
    size = stored.dtype.itemsize
    largest = _LARGEST_FINITE[name]
    sign = 1 << (8 * size - 1)
    return bool(
        int(stored.view(f"i{size}").max()) > largest
        or int(stored.view(f"u{size}").max()) > largest + sign
    )


def count_nonfinite(stored: np.ndarray) -> int:
    """How many elements of a float array of any dtype are infinite or NaN."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return int(stored.size - np.count_nonzero(np.isfinite(stored)))
