"""Compiled loops: a weighted sum, its casts and the search for NaN fused into one pass.

Where numba is installed (extra `modelsoup[fast]`), the same function that numpy runs on arrays is
compiled for scalars, once per number of models and dtypes; and inner products, which are added up
in numpy's order. Sums of more than a dozen models go through loops that add a few at a time. The
machine code is kept in the user's cache folder, and llvmlite, which comes with numba, loads it from
there: importing numba would take a second of every run. A loop gives the same bytes as numpy or is
not used:

- a loaded loop is compared with numpy on a sample first;
- a slice in which a loop met NaN or infinity is done again by numpy.

`MODELSOUP_FAST=0` turns the loops off; `MODELSOUP_FAST=1` uses them for small merges too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import dtypes
from ..files.cache import cache_folder
from .forms import BLOCK, added_to, pairs, products_in_lanes, weighted_sum

_SYMBOL = "soup_loop"
_SUPPORTED = ("F32", "BF16", "F16")

_log = logging.getLogger(__name__)

Loop = Callable[[Sequence[int], int, int, np.ndarray], bool]
"""`loop(input addresses, output address, elements, parameters)` → whether all was finite."""

_LOADS = {
    "F32": "x{k} = a{k}[i]\n",
    "BF16": "x{k} = u32(u32(a{k}[i]) << u32(16)).view(f32)\n",
    # The exponent moves into place by a multiplication that is exact, subnormals included.
    "F16": (
        "h = u32(a{k}[i])\n"
        "m = f32(u32(u32(h & u32(0x7FFF)) << u32(13)).view(f32) * f32(2.0**112)).view(u32)\n"
        "m = u32(m | u32(0x7F800000)) if u32(h & u32(0x7C00)) == u32(0x7C00) else m\n"
        "x{k} = u32(m | u32(u32(h & u32(0x8000)) << u32(16))).view(f32)\n"
    ),
}
_STORES = {
    "F32": "out[i] = y\n",
    "BF16": (
        "b = f32(y).view(u32)\n"
        "out[i] = u16(u32(b + u32(u32(0x7FFF) + u32(u32(b >> u32(16)) & u32(1)))) >> u32(16))\n"
    ),
    # Small values get their last bit where float32 addition to 0.5 rounds; others by adding half.
    "F16": (
        "b = f32(y).view(u32)\n"
        "m = u32(b & u32(0x7FFFFFFF))\n"
        "small = u32(f32(m.view(f32) + f32(0.5)).view(u32) - u32(0x3F000000))\n"
        "half = u32(u32(0xFFF) + u32(u32(m >> u32(13)) & u32(1)))\n"
        "large = u32(u32(u32(m - u32(0x38000000)) + half) >> u32(13))\n"
        "r = small if m < u32(0x38800000) else large\n"
        "r = u32(0x7C00) if m >= u32(0x477FF000) else r\n"
        "out[i] = u16(r | u32(u32(b >> u32(16)) & u32(0x8000)))\n"
    ),
}
# The largest magnitude, as float32, that still rounds to a finite number.
_LIMITS = {"F32": 0x7F7FFFFF, "BF16": 0x7F7F7FFF, "F16": 0x477FEFFF}
_POINTERS = {"F32": "float32", "BF16": "uint16", "F16": "uint16", "F64": "float64"}
_MOST_SUMMED = 12  # of more LLVM makes no vectors, and takes minutes for fifty
_ADDED_AT_ONCE = 8  # of more than that
_ADDED_LENGTH = BLOCK // 2  # elements: two sums of float32 stay in the second-level cache
_MOST_MULTIPLIED = 4  # to compile the products of more takes long


def available() -> bool:
    """Whether loops can be compiled here and are not turned off."""
    return os.environ.get("MODELSOUP_FAST") != "0" and all(
        importlib.util.find_spec(name) is not None for name in ("llvmlite", "numba")
    )


_loops: dict[tuple[Any, ...], Loop | None] = {}  # None: there is none, and why was logged


def loop_for(
    function: Callable[..., Any], inputs: tuple[str, ...], output: str, example: Any
) -> Loop | None:
    """The compiled loop of an elementwise function, or None where numpy does the work.

    Args:
        function: `weighted_sum` or `weighted_deltas`.
        inputs: the stored dtypes of the inputs, such as `("BF16", "BF16")`.
        output: the stored dtype of the result.
        example: parameters as `p`, any values: a named tuple of float32 numbers, tuples of such,
            and truth values.
    """
    if not available() or not set(inputs) | {output} <= set(_SUPPORTED):
        return None
    if len(inputs) > _MOST_SUMMED:
        is_plain = function is weighted_sum and len(set(inputs)) == 1
        return _long_sum(inputs[0], output, type(example)) if is_plain else None
    lengths = tuple(len(value) if isinstance(value, tuple) else 0 for value in example)
    key = (function, inputs, output, type(example), lengths)
    if key not in _loops:
        _loops[key] = _make(function, inputs, output, example)
    return _loops[key]


def _long_sum(dtype: str, output: str, weights: Callable[..., Any]) -> Loop | None:
    """The loop of a weighted sum of any number of models that are stored in the same dtype.

    One loop adds the next few to a float32 sum, and another the last few and rounds. A sum begins
    with −0, and what is missing to a few are zeros times −0: to add −0 changes nothing, not even
    the sign of a zero.
    """
    several = weights(tuple(np.float32(0.1 * k - 0.3) for k in range(_ADDED_AT_ONCE)))
    inputs = ("F32", *[dtype] * _ADDED_AT_ONCE)
    more, last = (loop_for(added_to, inputs, kind, several) for kind in ("F32", output))
    if more is None or last is None:
        return None
    size, result_size = (dtypes.DTYPES[kind].bits // 8 for kind in (dtype, output))

    def loop(sources: Sequence[int], result: int, elements: int, parameters: np.ndarray) -> bool:
        rounds = -(-len(sources) // _ADDED_AT_ONCE)
        lacking = rounds * _ADDED_AT_ONCE - len(sources)
        factors = np.append(parameters, np.full(lacking, -0.0, np.float32))
        of_each = factors.reshape(rounds, _ADDED_AT_ONCE)
        zeros = np.zeros(_ADDED_LENGTH * size, np.uint8)
        totals = np.empty((2, _ADDED_LENGTH), np.float32)
        for start in range(0, elements, _ADDED_LENGTH):
            length = min(_ADDED_LENGTH, elements - start)
            places = [source + start * size for source in sources] + [zeros.ctypes.data] * lacking
            totals[0] = -0.0
            for n, weight in enumerate(of_each):
                total, other = (totals[k % 2].ctypes.data for k in (n, n + 1))
                few = [total, *places[n * _ADDED_AT_ONCE : (n + 1) * _ADDED_AT_ONCE]]
                is_last = n == rounds - 1
                add, into = (last, result + start * result_size) if is_last else (more, other)
                if not add(few, into, length, weight):
                    return False
        return True

    return loop


def products_loop(inputs: tuple[str, ...], lanes: int, *, of_deltas: bool) -> Loop | None:
    """The compiled loop of a block's inner products, or None where numpy does the work.

    It adds to a float64 array that has a row of lanes for each pair of vectors, in the order of
    `pairs`; its parameters are not looked at.

    Args:
        inputs: the stored dtypes of the inputs.
        lanes: element i is added to lane i modulo this.
        of_deltas: the vectors are the others' differences from the first.
    """
    if not available() or not set(inputs) <= set(_SUPPORTED) or len(inputs) > _MOST_MULTIPLIED:
        return None
    key = (products_loop, inputs, "F64", lanes, of_deltas)
    if key not in _loops:
        source = _products_source(inputs, lanes, of_deltas=of_deltas)
        loop = _loaded("products", source, {}, inputs, "F64")
        agrees = _agrees_in_products(loop, inputs, lanes, of_deltas=of_deltas)
        _loops[key] = _if(loop, "products", agrees=agrees)
    return _loops[key]


def _make(
    function: Callable[..., Any], inputs: tuple[str, ...], output: str, example: Any
) -> Loop | None:
    name, text = function.__name__, inspect.getsource(function)
    used = {"f": function, "P": type(example)}
    loop = _loaded(name, _source(inputs, output, example), used, inputs, output, text)
    return _if(loop, name, agrees=_agrees_with_numpy(loop, function, inputs, output, example))


def _if(loop: Loop, name: str, *, agrees: bool) -> Loop | None:
    if not agrees:
        _log.info("the compiled loop of %s differs from numpy: not used", name)
    return loop if agrees else None


def _loaded(
    name: str, source: str, used: dict[str, Any], inputs: tuple[str, ...], output: str,
    text: str = "",
) -> Loop:  # fmt: skip
    """A loop from the cache, or compiled and kept there; `text` is that of a function it uses."""
    cached = _cache_file(name, source, text)
    code = _read(cached)
    if code is None:
        code = _compile(source, used, inputs, output)
        _store(cached, code)
    return _load(code, len(inputs))


def parameter_array(p: Any) -> np.ndarray:
    """A method's numbers as a loop takes them: one float32 after the other."""
    flat: list[float] = []
    for value in p:
        flat.extend(value if isinstance(value, tuple) else (value,))
    return np.array(flat or [0.0], np.float32)


def _source(inputs: tuple[str, ...], output: str, example: Any) -> str:
    """The text of the loop, unrolled over the models."""
    names = [f"a{k}" for k in range(len(inputs))]
    lines = [f"def loop({', '.join(names)}, result, n, parameters):"]
    lines += [f"    {name} = carray({name}, n)" for name in names]
    lines += ["    out = carray(result, n)", f"    c = carray(parameters, {_count(example)})"]
    lines += [f"    p = P({_construct(example)})", "    found = u32(0)", "    for i in range(n):"]
    body = "".join(_LOADS[dtype].format(k=k) for k, dtype in enumerate(inputs))
    body += f"y = f32(f(({', '.join(f'x{k}' for k in range(len(inputs)))},), p))\n"
    body += f"bad = u32(f32(y).view(u32) & u32(0x7FFFFFFF)) > u32({_LIMITS[output]:#x})\n"
    for k in range(len(inputs)):
        body += f"bad = bad | (u32(f32(x{k}).view(u32) & u32(0x7FFFFFFF)) >= u32(0x7F800000))\n"
    # One reduction, of a kind that LLVM makes vectors of.
    body += "found = u32(found | u32(bad))\n"
    body += _STORES[output]
    lines += ["        " + line for line in body.splitlines()]
    lines.append("    return found")
    return "\n".join(lines) + "\n"


def _products_source(inputs: tuple[str, ...], lanes: int, *, of_deltas: bool) -> str:
    """The text of the loop: a row of products after the other, and of that a pair after the other.

    So each innermost loop writes to one place, and LLVM sees that it can make vectors of it.
    """
    names = [f"a{k}" for k in range(len(inputs))]
    lines = [f"def loop({', '.join(names)}, result, n, parameters):"]
    lines += [f"    {name} = carray({name}, n)" for name in names]
    products = pairs(len(inputs) - of_deltas)
    lines += [
        f"    out = carray(result, ({len(products)}, {lanes}))",
        f"    for start in range(0, n, {lanes}):",
    ]
    for row, (i, j) in enumerate(products):
        lines.append(f"        for lane in range(min({lanes}, n - start)):")
        used = {i + of_deltas, j + of_deltas, *([0] if of_deltas else [])}
        # Unsigned, since numba makes sure of others that they are not below 0.
        body = "i = u64(start) + u64(lane)\n"
        body += "".join(_LOADS[inputs[k]].format(k=k) for k in sorted(used))
        one, other = (f"f64(x{k + of_deltas})" + " - f64(x0)" * of_deltas for k in (i, j))
        body += f"out[{row}, lane] += ({one}) * ({other})\n"
        lines += ["            " + line for line in body.splitlines()]
    lines.append("    return u32(0)")
    return "\n".join(lines) + "\n"


def _count(example: Any) -> int:
    return sum(len(value) if isinstance(value, tuple) else 1 for value in example)


def _construct(example: Any) -> str:
    parts, position = [], 0
    for value in example:
        if isinstance(value, tuple):
            items = [f"c[{position + k}]" for k in range(len(value))]
            parts.append(f"({', '.join(items)},)")
            position += len(value)
        else:
            parts.append(f"c[{position}]" + (" != f32(0)" if isinstance(value, bool) else ""))
            position += 1
    return ", ".join(parts)


def _cache_file(name: str, source: str, text: str) -> Path:
    import llvmlite
    import llvmlite.binding as llvm

    parts = (
        source, text, llvmlite.__version__, llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
    )  # fmt: skip
    digest = _sha256("\0".join(parts).encode()).hex()
    return cache_folder("loops") / f"{name}-{digest[:32]}.o"


def _sha256(content: bytes) -> bytes:
    import hashlib  # not where there are no loops: it loads OpenSSL

    return hashlib.sha256(content).digest()


def _read(file: Path) -> bytes | None:
    """A loop's machine code, behind the digest that tells whether it is whole."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if _sha256(code) == digest else None


def _store(file: Path, code: bytes) -> None:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        import tempfile

        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(_sha256(code) + code)
        os.replace(temporary.name, file)
    except OSError as error:
        _log.info("the compiled loop could not be kept for the next run: %s", error)


def _target() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        opt=3, cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(),
        jit=True,
    )  # fmt: skip


def _compile(
    source: str, used: dict[str, Any], inputs: tuple[str, ...], output: str
) -> bytes:  # fmt: skip
    """Machine code with the one symbol `soup_loop`."""
    import llvmlite.binding as llvm
    import numba
    from numba import types

    names: dict[str, Any] = {
        "carray": numba.carray, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
        "f32": np.float32, "f64": np.float64, **used,
    }  # fmt: skip
    if "f" in names:
        names["f"] = numba.njit(error_model="numpy")(names["f"])
    # The text was made above: no part of it comes from a user or a file.
    exec(source, names)  # noqa: S102
    pointers = [types.CPointer(getattr(types, _POINTERS[dtype])) for dtype in (*inputs, output)]
    signature = types.uint32(*pointers, types.intp, types.CPointer(types.float32))
    compiled = numba.cfunc(signature, error_model="numpy")(names["loop"])
    text = _only_the_loop(str(compiled.inspect_llvm()))
    module = llvm.parse_assembly(text)
    module.verify()
    return bytes(_target().emit_object(module))


def _only_the_loop(text: str) -> str:
    """LLVM's text without the functions around the loop, which need numba's runtime.

    Numba puts the loop into a function `int32 f(result *, exception *, arguments …)` that returns
    0 where no exception was raised.
    """

    def keep(found: re.Match[str]) -> str:
        return found.group() if "%retptr" in found.group().partition("\n")[0] else ""

    text = re.sub(r"^define .*?^}$", keep, text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r'(?m)^(define [^@]*)@"?[^"(]+"?\(', rf"\1@{_SYMBOL}(", text)


_engines: list[Any] = []  # a loop lives as long as the engine that loaded it


def _load(code: bytes, models: int) -> Loop:
    import llvmlite.binding as llvm

    target = _target()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    pointer = ctypes.c_void_p
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int32, *[pointer] * (models + 3), ctypes.c_ssize_t, pointer
    )  # result, exception, inputs, output, elements, parameters
    call = kind(engine.get_function_address(_SYMBOL))

    def loop(inputs: Sequence[int], output: int, elements: int, parameters: np.ndarray) -> bool:
        found, exception = ctypes.c_uint32(), ctypes.c_void_p()
        status = call(
            ctypes.addressof(found), ctypes.addressof(exception), *inputs, output, elements,
            parameters.ctypes.data,
        )  # fmt: skip
        return status == 0 and not found.value

    return loop


def _agrees_with_numpy(
    loop: Loop, function: Callable[..., Any], inputs: tuple[str, ...], output: str, example: Any
) -> bool:
    stored = _sample(inputs)
    expected = np.empty(stored[0].size, dtypes.numpy_dtype(output))
    with np.errstate(all="ignore"):
        result = function(tuple(a.astype(np.float32) for a in stored), example)
    dtypes.narrow(np.asarray(result, np.float32), expected)
    found = np.empty_like(expected)
    finite = loop(
        [a.ctypes.data for a in stored], found.ctypes.data, found.size, parameter_array(example)
    )
    return finite and found.tobytes() == expected.tobytes()


def _agrees_in_products(
    loop: Loop, inputs: tuple[str, ...], lanes: int, *, of_deltas: bool
) -> bool:
    stored = _sample(inputs)
    vectors = [array.astype(np.float64) for array in stored]
    if of_deltas:
        vectors = [one - vectors[0] for one in vectors[1:]]
    expected = np.stack(list(products_in_lanes(vectors, lanes)))
    found = np.zeros_like(expected)
    loop([a.ctypes.data for a in stored], found.ctypes.data, stored[0].size, np.zeros(1))
    return found.tobytes() == expected.tobytes()


def _sample(inputs: tuple[str, ...]) -> list[np.ndarray]:
    """Values of all sizes to compare with numpy on, zeros and ties in rounding among them."""
    generator = np.random.Generator(np.random.Philox(key=1))
    size = BLOCK // 16 + 7  # no multiple of a vector
    stored = []
    for dtype in inputs:
        values = generator.standard_normal(size) * 2.0 ** generator.integers(-20, 8, size)
        values[:64] = 0
        values[64:128] *= 1e-36  # subnormal in most dtypes
        array = np.empty(size, dtypes.numpy_dtype(dtype))
        dtypes.narrow(values.astype(np.float32), array)
        stored.append(array)
    for array in stored[1:]:
        if array.dtype == stored[0].dtype:
            array[128:512] = stored[0][128:512]
    return stored
