"""Quantised weights: which tensors are codes and which their scales; to values and back.

A code means nothing without its scale, so the two are one tensor to a merge. Float8 codes are
known with one scale for a tensor, for a row, or for a block of 128 × 128, as compressed-tensors,
DeepSeek, FBGEMM and ComfyUI store them; the value is code × scale. What packs several codes into
one integer (GPTQ, AWQ, bitsandbytes, MXFP4, …) is recognised, and is not merged.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .checkpoint import TensorInfo
from .dtypes import DTYPES, narrow, numpy_dtype

_BLOCK = 128
_LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
# Ranges of activations, which are calibrated, and what tells that weights are codes.
_ACTIVATIONS = re.compile(r"(?:.*\.)?(?:input_scale|scale_input|output_scale|[qkv]_scale)")
_MARKERS = re.compile(r"(?:.*\.)?(?:scaled_fp8|comfy_quant)")

_PACKED = {
    "GPTQ or AWQ": r"(.*\.)?(qweight|qzeros|g_idx)",
    "bitsandbytes": r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)"
    r"|.*\.quant_state\.bitsandbytes__\w+",
    "compressed-tensors": r".*_(packed|zero_point|global_scale)|.*\.weight_g_idx",
    "MXFP4": r".*_(blocks|scales)",
    "HQQ": r".*\.W_q",
    "Quanto": r".*\._(data|scale)",
    "ExLlamaV2": r".*\.q_(weight|scale|scale_max|groups|group_map|perm|invperm)",
    "AQLM": r".*\.(codes|codebooks|scales)",
    "QuIP#": r".*\.(Qidxs(_\d+)?|SU|SV|Wscale|codebook_id)",
    "VPTQ": r".*\.(indices|centroids\.weight|(res|outlier)_(indices|centroids\.weight))",
}
# Schemes with names that other things have as well → what lies beside, with integers in it.
_CODES = {"ExLlamaV2": "q_weight", "AQLM": "codes", "QuIP#": "Qidxs", "VPTQ": "indices"}
_BESIDE_CODES = {"AQLM": "codebooks", "VPTQ": "centroids.weight"}
_PACKED_NAMES = {scheme: re.compile(pattern) for scheme, pattern in _PACKED.items()}
_BESIDE = re.compile(r"weight\w*|\w*scales?")
_OF_CODES = re.compile(r"(.*?)[._](?:scale|scales|scale_inv|scale_2|scb|absmax)", re.IGNORECASE)


@dataclass(frozen=True)
class Scales:
    """Where the scale of each code of a tensor is found.

    Attributes:
        name: of the tensor of scales.
        dtype: its safetensors dtype.
        shape: its shape.
        rows, columns: of the codes, as a matrix.
        block_rows, block_columns: of a block that has one scale.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @cached_property
    def blocks_across(self) -> int:
        """How many scales a row of codes has."""
        return -(-self.columns // self.block_columns)

    def segments(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Where, from `start` to `stop`, codes with another scale begin, and which scale they have.

        Args:
            start: the first code, counted through the tensor.
            stop: just past the last.

        Returns:
            offsets from `start`, and indices into the scales, flattened; one each a segment.
        """
        if self.rows <= self.block_rows and self.columns <= self.block_columns:
            return np.zeros(1, np.intp), np.zeros(1, np.intp)
        rows = np.arange(start // self.columns, -(-stop // self.columns))
        begins = rows[:, None] * self.columns + np.arange(self.blocks_across) * self.block_columns
        begins = begins.ravel()
        begins = begins[np.searchsorted(begins, start, "right") - 1 :]
        begins = begins[: np.searchsorted(begins, stop)].copy()
        begins[0] = start
        row, column = np.divmod(begins, self.columns)
        return begins - start, (
            row // self.block_rows * self.blocks_across + column // self.block_columns
        )


WORDS = (
    "scale", "absmax", "quant", "qweight", "qzeros", "g_idx", "scb", "weight_format", "_packed",
    "zero_point", "_blocks", "w_q", "_data", "q_weight", "codebooks", "qidxs", "centroids",
)  # fmt: skip
"""One of them is in any name of a scale or of packed codes, in lower case; else in few names."""


def scaled_weights(tensors: Mapping[str, TensorInfo]) -> dict[str, Scales]:
    """The float8 tensors that have scales beside them, of schemes that are known."""
    found = {}
    for name, info in tensors.items():
        if info.dtype not in _LARGEST:
            continue
        scale = _scale_of(name, info, tensors)
        scales = None if scale is None else _scheme(info, scale)
        if scales is not None:
            found[name] = scales
    return found


def _scale_of(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    if not info.elements:
        return None
    home, dot, last = name.rpartition(".")
    names = (f"{name}_scale_inv", f"{name}_scale", f"{home}{dot}scale_{last}")
    return next((tensors[n] for n in names if n in tensors), None)


def _scheme(codes: TensorInfo, scale: TensorInfo) -> Scales | None:
    """What of the codes each scale is for, by its shape; None where that is not known."""
    rows = codes.shape[0] if codes.shape else 1
    columns = math.prod(codes.shape[1:])
    across = (-(-rows // _BLOCK), -(-columns // _BLOCK))
    if scale.dtype not in ("F32", "BF16", "F16"):
        return None
    if scale.elements == 1:
        block = (rows, columns)
    elif scale.elements == rows and scale.shape[0] == rows:
        block = (1, columns)
    elif len(codes.shape) == 2 and scale.shape == across:
        block = (_BLOCK, _BLOCK)
    else:
        return None
    return Scales(scale.name, scale.dtype, scale.shape, rows, columns, *block)


def packed_weights(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Codes and scales that are not to be merged: name → the scheme, as far as it is known."""
    known = {scales.name for scales in scaled_weights(tensors).values()}
    found: dict[str, str] = {}
    for name, info in tensors.items():
        for scheme, pattern in _PACKED_NAMES.items():
            if pattern.fullmatch(name) and _is_packed(scheme, name, tensors):
                found[name] = scheme
        codes = _OF_CODES.fullmatch(name)
        if codes is None or name in known:
            continue
        of = next((n for n in (codes[1], f"{codes[1]}.weight") if n in tensors), None)
        if of is not None and (tensors[of].dtype in _LARGEST or not _is_float(tensors[of])):
            scheme = f"{tensors[of].dtype} with scales of shape {list(info.shape)}"
            found.setdefault(of, scheme)
            found.setdefault(name, found[of])
    homes = {name.rpartition(".")[0]: scheme for name, scheme in found.items()}
    for name in tensors if homes else ():  # scales that lie beside codes, under any name
        home, _, last = name.rpartition(".")
        if home in homes and _BESIDE.fullmatch(last):
            found.setdefault(name, homes[home])
    return found


def _is_packed(scheme: str, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a name that other things may have as well stands for codes."""
    if scheme in _CODES:
        home = name.removesuffix(".weight").rpartition(".")[0]
        codes = tensors.get(f"{home}.{_CODES[scheme]}")
        beside = _BESIDE_CODES.get(scheme, _CODES[scheme])
        return codes is not None and not _is_float(codes) and f"{home}.{beside}" in tensors
    if scheme != "MXFP4":
        return scheme != "Quanto" or not _is_float(tensors[name])
    other = name.removesuffix("_blocks") + "_scales"
    if name.endswith("_scales"):
        other = name.removesuffix("_scales") + "_blocks"
    return other in tensors and tensors[name].dtype == "U8"


def _is_float(info: TensorInfo) -> bool:
    return DTYPES[info.dtype].kind == "float"


def is_activation_scale(name: str) -> bool:
    """Whether a tensor of a quantised model holds a calibrated range of activations."""
    return _ACTIVATIONS.fullmatch(name) is not None


def tells_of_codes(name: str) -> bool:
    """Whether a tensor of a quantised model has no use where its weights are codes no more."""
    return _ACTIVATIONS.fullmatch(name) is not None or _MARKERS.fullmatch(name) is not None


def dequantize(values: np.ndarray, start: int, scales: Scales, scale: np.ndarray) -> None:
    """Codes to values, in place.

    Args:
        values: float32 or float64, the codes from number `start` on.
        start: counted through the tensor.
        scales: where each code's scale is found.
        scale: the scales, flattened, of the dtype of `values`.
    """
    begins, which = scales.segments(start, start + values.size)
    if begins.size == 1:
        values *= scale[which[0]]
        return
    values *= np.repeat(scale[which], np.diff(begins, append=values.size))


class Quantizer:
    """Finds the scales of a tensor from its values, and then makes codes of these.

    The largest magnitude of each block gets the largest code; a block of zeros the scale 1.

    Args:
        scales: where each code's scale is found.
        dtype: of the codes.
    """

    def __init__(self, scales: Scales, dtype: str) -> None:
        self.scales = scales
        self._dtype = dtype
        self._largest = np.zeros(math.prod(scales.shape), np.float32)
        self._scale: np.ndarray | None = None
        self._lock = threading.Lock()

    def measure(self, values: np.ndarray, start: int) -> None:
        """Take in float32 values from number `start` on; any order, any thread."""
        begins, which = self.scales.segments(start, start + values.size)
        largest = np.maximum.reduceat(np.abs(values), begins)
        with self._lock:
            np.maximum.at(self._largest, which, largest)

    def finish(self) -> np.ndarray:
        """The scales, as they are stored."""
        stored = np.empty(self._largest.size, numpy_dtype(self.scales.dtype))
        wanted = np.where(self._largest > 0, self._largest / _LARGEST[self._dtype], 1)
        narrow(wanted.astype(np.float32), stored)
        self._scale = stored.astype(np.float32)
        tiny = np.float32(np.finfo(np.float16).tiny if self.scales.dtype == "F16" else 1e-38)
        if (small := self._scale == 0).any():  # too small for the dtype of the scales
            self._scale[small] = tiny
            narrow(self._scale, stored)
        return stored

    def quantize(self, values: np.ndarray, start: int) -> np.ndarray:
        """What is to be rounded to codes: values over their scales, within the codes' range."""
        assert self._scale is not None
        begins, which = self.scales.segments(start, start + values.size)
        made: Any = values / np.repeat(self._scale[which], np.diff(begins, append=values.size))
        largest = _LARGEST[self._dtype]
        np.clip(made, -largest, largest, out=made, where=np.isfinite(made))
        return np.asarray(made)
