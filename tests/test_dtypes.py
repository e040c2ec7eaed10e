"""Arithmetic is exact where it says so and rounds once, to nearest even, where it must round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelsoup import ParameterError
from modelsoup.files.dtypes import (
    DTYPES,
    compute_dtype,
    count_nonfinite,
    has_nonfinite,
    narrow,
    numpy_dtype,
    parse_dtype,
    widen,
)

SOURCES = [np.float32, np.float64]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format, as a standard describes it.

    `precision` counts the leading 1; `lowest` is the exponent of the smallest normal number and
    of all subnormals; `largest` is the pattern of the largest finite number.
    """

    name: str
    bits: int
    precision: int
    lowest: int
    largest: int
    infinity: int | None

    def value(self, pattern: int) -> Fraction:
        """The exact value of a finite pattern without its sign; one past the largest goes on."""
        exponent, fraction = divmod(pattern, 1 << (self.precision - 1))
        if exponent:
            fraction += 1 << (self.precision - 1)
            exponent -= 1
        return fraction * Fraction(2) ** (self.lowest - self.precision + 1 + exponent)

    def nearest(self, value: float) -> int | None:
        """The pattern that a number rounds to, to nearest even; None is NaN.

        In integers and fractions alone, so that nothing is rounded on the way.
        """
        if math.isnan(value):
            return None
        sign = (1 << (self.bits - 1)) if math.copysign(1, value) < 0 else 0
        pattern = self.largest + 1
        if value == 0:
            pattern = 0
        elif not math.isinf(value):
            magnitude = abs(Fraction(value))
            exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
            if Fraction(2) ** exponent > magnitude:
                exponent -= 1  # now 2^exponent <= magnitude < 2^(exponent + 1)
            exponent = max(exponent, self.lowest)
            quantum = Fraction(2) ** (exponent - self.precision + 1)
            n = round(magnitude / quantum)  # Python rounds a Fraction half to even
            pattern = ((exponent - self.lowest) << (self.precision - 1)) + n
        if pattern <= self.largest:
            return sign + pattern
        return None if self.infinity is None else sign + self.infinity


F32 = Format("F32", 32, 24, -126, 0x7F7FFFFF, 0x7F800000)
F16 = Format("F16", 16, 11, -14, 0x7BFF, 0x7C00)
BF16 = Format("BF16", 16, 8, -126, 0x7F7F, 0x7F80)
F8_E5M2 = Format("F8_E5M2", 8, 3, -14, 0x7B, 0x7C)
F8_E4M3 = Format("F8_E4M3", 8, 4, -6, 0x7E, None)
FORMATS = [F32, F16, BF16, F8_E5M2, F8_E4M3]
SMALL_FORMATS = FORMATS[1:]
by_name = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
small_by_name = pytest.mark.parametrize("form", SMALL_FORMATS, ids=lambda form: form.name)


def narrowed(values: np.ndarray, form: Format) -> np.ndarray:
    """The patterns that `narrow` stores."""
    out = np.empty(values.shape, numpy_dtype(form.name))
    narrow(values, out)
    return out.view(f"u{form.bits // 8}")


def assert_rounds_exactly(values: np.ndarray, form: Format) -> None:
    before = values.copy()
    patterns = narrowed(values, form).tolist()
    assert values.tobytes() == before.tobytes(), "narrow must not change its input"
    for value, pattern in zip(values.tolist(), patterns, strict=True):
        expected = form.nearest(value)
        if expected is None:
            assert pattern & ((1 << (form.bits - 1)) - 1) > (form.infinity or form.largest)
        else:
            assert pattern == expected, f"{value.hex()} → {pattern:#x}, not {expected:#x}"


def test_the_reference_agrees_with_known_values() -> None:
    """A reference that is wrong proves nothing."""
    assert F16.nearest(65504.0) == 0x7BFF
    assert F16.nearest(65519.99) == 0x7BFF
    assert F16.nearest(65520.0) == 0x7C00
    assert F16.nearest(2.0**-24) == 1
    assert F16.nearest(2.0**-25) == 0
    assert F16.nearest(-(2.0**-25)) == 0x8000
    assert F16.nearest(1.0) == 0x3C00
    assert BF16.nearest(1.0) == 0x3F80
    assert BF16.nearest(3.14159274) == 0x4049
    assert F32.nearest(0.1) == 0x3DCCCCCD
    assert F32.nearest(1e39) == 0x7F800000
    assert F8_E4M3.nearest(448.0) == 0x7E
    assert F8_E4M3.nearest(464.0) == 0x7E
    assert F8_E4M3.nearest(465.0) is None
    assert F8_E5M2.nearest(57344.0) == 0x7B
    assert F8_E5M2.nearest(-61440.0) == 0xFC
    assert F8_E5M2.nearest(2.0**-16) == 1
    for form in FORMATS:
        assert form.nearest(-0.0) == 1 << (form.bits - 1)
        assert form.nearest(math.nan) is None
        for pattern in (0, 1, 2, 3, form.largest // 2, form.largest - 1, form.largest):
            assert form.nearest(float(form.value(pattern))) == pattern


def source_values(form: Format, source: type) -> st.SearchStrategy[float]:
    """Numbers of the source dtype, most of them where rounding can go wrong."""
    width = 64 if source is np.float64 else 32

    @st.composite
    def near_a_point(draw: st.DrawFn) -> float:
        """Beside a halfway point, or beside a number of the format."""
        pattern = draw(st.integers(0, form.largest) | st.integers(0, 40) | st.just(form.largest))
        low, high = form.value(pattern), form.value(pattern + 1)
        point = draw(st.sampled_from([low, (low + high) / 2, high]))
        towards = draw(st.sampled_from([-math.inf, math.inf]))
        with np.errstate(over="ignore", under="ignore"):
            value = source(float(point))
            for _ in range(draw(st.integers(0, 3))):
                value = np.nextafter(value, source(towards))
        return float(-value if draw(st.booleans()) else value)

    @st.composite
    def with_a_distant_bit(draw: st.DrawFn) -> float:
        """A halfway point and one bit far below it: a second rounding would lose that bit."""
        pattern = draw(st.integers(0, form.largest))
        middle = (form.value(pattern) + form.value(pattern + 1)) / 2
        distance = draw(st.integers(1, 52 - form.precision))
        bit = middle / 2**distance * draw(st.sampled_from([-1, 1]))
        with np.errstate(over="ignore", under="ignore"):
            return float(source(float(middle + bit)))

    traps = [near_a_point(), with_a_distant_bit()]
    return st.one_of(*traps, *traps, st.floats(width=width))


@by_name
@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_narrow_rounds_to_nearest_even_exactly(
    form: Format, source: type, data: st.DataObject
) -> None:
    values = data.draw(st.lists(source_values(form, source), min_size=1, max_size=10))
    assert_rounds_exactly(np.array(values, source), form)


@by_name
@pytest.mark.parametrize("source", SOURCES)
def test_narrow_rounds_random_patterns_and_traps_exactly(form: Format, source: type) -> None:
    rng = np.random.default_rng(7)
    bits = rng.bytes(4_000 * np.dtype(source).itemsize)
    assert_rounds_exactly(np.frombuffer(bits, source), form)

    spread = rng.standard_normal(4_000) * np.exp2(
        rng.integers(form.lowest - form.precision - 2, 20, 4_000)
    )
    assert_rounds_exactly(spread.astype(source), form)

    # Halfway points with a bit far below, which a rounding on the way would lose.
    patterns = rng.integers(0, form.largest, 4_000)
    middles = np.array([float(form.value(int(p)) + form.value(int(p) + 1)) / 2 for p in patterns])
    distances = rng.integers(form.precision + 1, 53, 4_000)
    with np.errstate(under="ignore"):
        traps = middles * (1 + rng.choice([-1, 1], 4_000) * np.exp2(-distances))
        assert_rounds_exactly((rng.choice([-1, 1], 4_000) * traps).astype(source), form)


@small_by_name
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_halfway_point_goes_to_even_and_its_neighbours_to_their_own_side(
    form: Format, source: type, sign: int
) -> None:
    patterns = np.arange(form.largest)
    values = np.array([float(form.value(int(p))) for p in range(form.largest + 1)], source)
    middles = (values[:-1].astype(np.float64) + values[1:]) / 2
    assert (middles == middles.astype(source)).all(), "halfway points are exact in the source"
    middles = middles.astype(source)
    minus = 0 if sign > 0 else 1 << (form.bits - 1)
    below = np.nextafter(middles, source(0))
    above = np.nextafter(middles, source(math.inf))
    assert (narrowed(sign * middles, form) == minus + patterns + patterns % 2).all()
    assert (narrowed(sign * below, form) == minus + patterns).all()
    assert (narrowed(sign * above, form) == minus + patterns + 1).all()
    assert (narrowed(sign * values, form) == minus + np.arange(form.largest + 1)).all()


@by_name
@pytest.mark.parametrize("source", SOURCES)
def test_narrow_overflows_to_infinity_or_to_nan_where_there_is_none(
    form: Format, source: type
) -> None:
    largest, beyond = form.value(form.largest), form.value(form.largest + 1)
    with np.errstate(over="ignore"):
        limit = source(float((largest + beyond) / 2))  # from here on, to nearest is to infinity
    values = np.array([limit, -limit, np.finfo(source).max, math.inf, -math.inf, math.nan], source)
    assert_rounds_exactly(values, form)
    below = np.nextafter(limit, source(0)) if math.isfinite(limit) else np.finfo(source).max
    assert narrowed(np.array([below, -below], source), form).tolist() == [
        form.largest, form.largest + (1 << (form.bits - 1))
    ]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_narrow_to_float64_changes_nothing(source: type) -> None:
    values = np.array([0.0, -0.0, 1e-45, 0.1, -3e38, math.inf, math.nan], source)
    out = np.empty(values.shape, np.float64)
    narrow(values, out)
    assert out.tobytes() == np.array([float(v) for v in values]).tobytes()


def test_narrow_takes_arrays_of_any_shape() -> None:
    values = np.arange(24, dtype=np.float64).reshape(2, 3, 4) / 7
    for form in FORMATS:
        out = np.empty(values.shape, numpy_dtype(form.name))
        narrow(values, out)
        flat = narrowed(values.reshape(-1), form)
        assert (out.view(flat.dtype).reshape(-1) == flat).all()
        narrow(values[:0], out[:0])
    scalar = np.empty((), ml_dtypes.bfloat16)
    narrow(np.array(1 / 3), scalar)
    assert scalar == ml_dtypes.bfloat16(1 / 3)


@small_by_name
@pytest.mark.parametrize("target", SOURCES)
def test_widen_is_exact_for_every_pattern(form: Format, target: type) -> None:
    patterns = np.arange(1 << form.bits, dtype=f"u{form.bits // 8}")
    out = np.empty(patterns.shape, target)
    widen(patterns.view(numpy_dtype(form.name)), out)
    half = 1 << (form.bits - 1)
    for pattern, value in enumerate(out.tolist()):
        magnitude = pattern % half
        if magnitude <= form.largest:
            assert Fraction(value) == form.value(magnitude) * (-1 if pattern >= half else 1)
        elif magnitude == form.infinity:
            assert math.isinf(value)
        else:
            assert math.isnan(value)
            continue
        assert math.copysign(1, value) == (-1 if pattern >= half else 1)


@small_by_name
@pytest.mark.parametrize("through", SOURCES)
def test_what_was_widened_is_narrowed_back_to_the_same_bits(form: Format, through: type) -> None:
    patterns = np.arange(1 << form.bits, dtype=f"u{form.bits // 8}")
    stored = patterns.view(numpy_dtype(form.name))
    wide = np.empty(patterns.shape, through)
    widen(stored, wide)
    same = narrowed(wide, form) == patterns
    assert (same | np.isnan(wide)).all()
    assert same.sum() >= 2 * form.largest + 2


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.floats(width=32), max_size=50))
def test_widen_is_exact_for_float32(values: list[float]) -> None:
    stored = np.array(values, np.float32)
    for target in SOURCES:
        out = np.empty(stored.shape, target)
        widen(stored, out)
        assert out.astype(np.float32).tobytes() == stored.tobytes()
        assert np.array_equal(out, np.array(values, np.float64), equal_nan=True)


# NaN and infinity


def is_finite(stored: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.isfinite(stored)


@small_by_name
def test_every_pattern_that_is_not_finite_is_found(form: Format) -> None:
    patterns = np.arange(1 << form.bits, dtype=f"u{form.bits // 8}")
    stored = patterns.view(numpy_dtype(form.name))
    finite = is_finite(stored)
    assert finite.sum() == 2 * form.largest + 2
    for pattern in range(len(patterns)):
        one = stored[pattern : pattern + 1]
        assert has_nonfinite(one, form.name) is not bool(finite[pattern]), hex(pattern)
    assert count_nonfinite(stored) == len(patterns) - (2 * form.largest + 2)
    assert not has_nonfinite(stored[finite], form.name)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: str, data: st.DataObject) -> None:
    array_type = numpy_dtype(dtype)
    numbers = st.integers(0, 2 ** (8 * array_type.itemsize) - 1)
    patterns = data.draw(st.lists(numbers, max_size=40))
    stored = np.array(patterns, f"u{array_type.itemsize}").view(array_type)
    assert has_nonfinite(stored, dtype) == (not is_finite(stored).all())
    assert count_nonfinite(stored) == np.count_nonzero(~is_finite(stored))
    finite = stored[is_finite(stored)].copy()
    assert not has_nonfinite(finite, dtype)
    if len(finite):
        place = data.draw(st.integers(0, len(finite) - 1))
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            spoilt = finite.copy()
            spoilt[place] = array_type.type(bad)
            assert has_nonfinite(spoilt, dtype)
            assert count_nonfinite(spoilt) == 1


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_the_edges_of_the_finite_numbers(dtype: str) -> None:
    kind = numpy_dtype(dtype).type
    limits = np.finfo(kind)
    values = [limits.max, limits.min, limits.smallest_subnormal, -limits.tiny, -0.0, 0.0]
    for sign in (1, -1):
        assert not has_nonfinite(sign * np.array(values, kind), dtype)
        for bad in (math.inf, -math.inf, math.nan):
            assert has_nonfinite(sign * np.array([*values, bad], kind), dtype)
            assert has_nonfinite(np.array([bad], kind), dtype)


def test_an_empty_array_is_finite() -> None:
    for dtype, described in DTYPES.items():
        if described.kind == "float":
            assert not has_nonfinite(np.empty(0, numpy_dtype(dtype)), dtype)
            assert count_nonfinite(np.empty((0, 3), numpy_dtype(dtype))) == 0


# Names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("f64", "F64"), ("float64", "F64"), ("fp64", "F64"), ("double", "F64"),
        ("f32", "F32"), ("float32", "F32"), ("fp32", "F32"), ("float", "F32"),
        ("f16", "F16"), ("float16", "F16"), ("fp16", "F16"), ("half", "F16"),
        ("bf16", "BF16"), ("bfloat16", "BF16"),
        ("f8_e4m3", "F8_E4M3"), ("float8_e4m3fn", "F8_E4M3"),
        ("f8_e5m2", "F8_E5M2"), ("float8_e5m2", "F8_E5M2"),
    ],
)  # fmt: skip
def test_a_dtype_may_be_called_as_numpy_torch_or_safetensors_call_it(text: str, name: str) -> None:
    assert parse_dtype(text) == parse_dtype(text.upper()) == parse_dtype(text.title()) == name


def test_every_float_dtype_can_be_named_by_its_own_name() -> None:
    floats = [name for name, dtype in DTYPES.items() if dtype.kind == "float"]
    assert [parse_dtype(name) for name in floats] == floats


def test_a_misspelt_dtype_is_told_with_the_nearest_one() -> None:
    with pytest.raises(ParameterError) as caught:
        parse_dtype("BF61")
    assert str(caught.value).startswith(
        "dtype 'BF61' is not a float dtype that can be written; did you mean 'bf16'"
    )
    assert str(caught.value).endswith("(expected f64, f32, f16, bf16, f8_e4m3 or f8_e5m2)")


@pytest.mark.parametrize("text", ["I64", "int8", "bool", "F4", "C64", "F8_E8M0", "", "xyz"])
def test_what_cannot_be_merged_into_is_no_dtype_for_a_result(text: str) -> None:
    with pytest.raises(ParameterError, match=f"^dtype '{text}' is not a float dtype that can be"):
        parse_dtype(text)


def test_the_table_agrees_with_numpy_about_sizes_and_kinds() -> None:
    for name, dtype in DTYPES.items():
        assert dtype.name == name
        if dtype.numpy is None:
            assert dtype.bits < 8
            with pytest.raises(ParameterError, match=f"^dtype {name} is smaller than a byte"):
                numpy_dtype(name)
        else:
            assert numpy_dtype(name).itemsize * 8 == dtype.bits
            assert (dtype.kind == "integer") == (numpy_dtype(name).kind in "biu")


def test_float64_computes_in_float64_and_everything_else_in_float32() -> None:
    assert compute_dtype(("BF16", "F16", "F32")) == np.float32
    assert compute_dtype(("BF16", "F64")) == np.float64
