"""What the merge methods promise: mergekit's numbers, the published formulas, laws and errors.

All merges here are done by numpy; `test_compiled_loops` shows that compiled loops give its bytes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

import modelsoup
from modelsoup.errors import speaking
from modelsoup.files.digest import FileReader
from modelsoup.files.writer import layout
from modelsoup.merging import merge as engine
from modelsoup.merging.forms import BLOCK, Block, PerModel, Tensor
from modelsoup.merging.jobs import GROUP, MOST, groups
from modelsoup.merging.kept import either
from modelsoup.merging.methods import registry
from modelsoup.merging.methods.pairs import softmax
from modelsoup.merging.reductions import Gram
from modelsoup.merging.thresholds import Largest, _places

Tensors = Mapping[str, np.ndarray]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NARROW = ("F16", "BF16", "F8_E4M3", "F8_E5M2")
TASK_VECTOR_METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
U32 = 2.0**-24  # the error of rounding once to float32, relative to the result
U64 = 2.0**-53

LAWS = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def numpy_alone() -> Iterator[None]:
    """Loops that another test left in the cache would be taken otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSOUP_FAST", "0")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the many merges of a law use one after the other."""
    return tmp_path_factory.mktemp("merges")


def load(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, as the reference library reads them."""
    return {
        name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def save(folder: Path, models: Sequence[Tensors], base: Tensors | None) -> dict[str, Any]:
    """The arguments `models` and `base` of `merge`."""
    paths = []
    for number, model in enumerate(models, 1):
        paths.append(folder / f"model-{number}.safetensors")
        save_file(dict(model), paths[-1])
    if base is None:
        return {"models": paths, "base": None}
    save_file(dict(base), folder / "base.safetensors")
    return {"models": paths, "base": folder / "base.safetensors"}


def merged(
    folder: Path, models: Sequence[Tensors], *, base: Tensors | None = None, **options: Any
) -> dict[str, np.ndarray]:
    """Write models to files, merge them, read the result."""
    output = folder / "merged.safetensors"
    modelsoup.merge(**save(folder, models, base), output=output, force=True, fsync=False, **options)
    return load(output)


def merged_one(
    folder: Path, models: Sequence[np.ndarray], *, base: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    """`merged` for models of one tensor."""
    wrapped = None if base is None else {"weight": base}
    return merged(folder, [{"weight": x} for x in models], base=wrapped, **options)["weight"]


def merged_in_slices(
    folder: Path, models: Sequence[Tensors], *, base: Tensors | None = None,
    workers: int, slice_elements: int, **recipe: Any,
) -> bytes:  # fmt: skip
    """The bytes of a merge whose workers take `slice_elements` at a time."""
    saved = save(folder, models, base)
    plan = modelsoup.plan_merge(
        [modelsoup.open_checkpoint(path) for path in saved["models"]],
        modelsoup.Recipe(**recipe),
        base=None if base is None else modelsoup.open_checkpoint(saved["base"]),
    )
    output = folder / "merged.safetensors"
    tensors = [modelsoup.OutputTensor(step.name, step.dtype, step.shape) for step in plan.steps]
    engine._execute(
        plan, output, layout(tensors, file_name=output.name, shard_size=None), workers=workers,
        force=True, sha256=False, fsync=False, progress=None,
        slice_elements=slice_elements,
    )  # fmt: skip
    return output.read_bytes()


def bits(array: np.ndarray) -> bytes:
    """What tells −0.0 from 0.0."""
    return array.tobytes()


# --- mergekit -------------------------------------------------------------------------------------

VECTORS = Path(__file__).with_name("data") / "mergekit_vectors.safetensors"
with safetensors.safe_open(VECTORS, "numpy") as _file:
    MERGEKIT = json.loads(_file.metadata()["vectors"])
VECTOR_MODELS = ("base", "a", "b", "c")


@pytest.fixture(scope="module")
def vectors() -> dict[str, dict[str, np.ndarray]]:
    """Case, or `input/` and a model → tensor name → values."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, values in load(VECTORS).items():
        case, _, name = path.rpartition("/")
        found.setdefault(case, {})[name] = values
    return found


@pytest.mark.parametrize("name", MERGEKIT["cases"])
def test_float32_results_are_mergekits(
    name: str, vectors: dict[str, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    # Both round about a dozen times, in different orders; mergekit also sums norms in float32.
    # So they agree within some 16 roundings (2**-20, or 1e-6) of the tensor's largest value.
    case = MERGEKIT["cases"][name]
    needs_base = registry.get_method(case["method"]).base
    with_base = case.get("base", True) if needs_base is None else needs_base
    options = {key: case[key] for key in ("weights", "parameters") if key in case}
    inputs = {
        model: {tensor: vectors[f"input/{model}"][tensor] for tensor in vectors[name]}
        for model in VECTOR_MODELS
    }
    ours = merged(
        tmp_path, [inputs[model] for model in case["models"]],
        base=inputs["base"] if with_base else None, method=case["method"], **options,
    )  # fmt: skip
    assert ours.keys() == vectors[name].keys()
    for tensor, theirs in vectors[name].items():
        scale = max(np.abs(vectors[f"input/{model}"][tensor]).max() for model in VECTOR_MODELS)
        assert ours[tensor].dtype == theirs.dtype
        np.testing.assert_allclose(ours[tensor], theirs, rtol=0, atol=1e-6 * scale, err_msg=tensor)


def test_the_mergekit_vectors_hold_the_cases_that_differ_most(
    vectors: dict[str, dict[str, np.ndarray]],
) -> None:
    a, b = (vectors[f"input/{model}"] for model in "ab")

    def cosine(name: str) -> float:
        x, y = (model[name].astype(np.float64).ravel() for model in (a, b))
        return float(x @ y / math.sqrt((x @ x) * (y @ y)))

    assert MERGEKIT["mergekit"] == "0.1.5"
    assert np.array_equal(a["same"], vectors["input/base"]["same"])
    assert not any(model["zero"].any() for model in (a, b))
    assert cosine("parallel") > 0.9995  # slerp's straight line
    assert cosine("decoder.weight") < 0.9
    changed = vectors["ties-half"]["decoder.weight"] != vectors["ties-default"]["decoder.weight"]
    assert 100 < np.count_nonzero(changed) < changed.size


# --- formulas, in float64 -------------------------------------------------------------------------


def linear_formula(x: list[np.ndarray], weight: list[float], *, normalize: bool) -> np.ndarray:
    total = sum(w * values for w, values in zip(weight, x, strict=True))
    return total / sum(weight) if normalize else total


def slerp_formula(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    angle = math.acos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def task_arithmetic_formula(
    base: np.ndarray, x: list[np.ndarray], weight: list[float], *, normalize: bool, factor: float
) -> np.ndarray:
    total = sum(w * (values - base) for w, values in zip(weight, x, strict=True))
    return base + factor * (total / sum(weight) if normalize else total)


def ties_formula(
    base: np.ndarray, x: list[np.ndarray], weight: list[float], density: list[float], *,
    normalize: bool, rescale: bool, factor: float,
) -> np.ndarray:  # fmt: skip
    trimmed = []
    for values, share in zip(x, density, strict=True):
        delta = values - base
        kept = np.argsort(-np.abs(delta), kind="stable")[: int(share * delta.size)]
        thin = np.zeros_like(delta)
        thin[kept] = delta[kept]
        if rescale:
            thin *= np.abs(delta).sum() / np.abs(thin).sum()
        trimmed.append(thin)
    d = np.array(trimmed)
    w = np.array(weight)[:, None]
    elected = np.where((w * d).sum(axis=0) < 0, -1.0, 1.0)
    agree = np.sign(w * d) == elected
    total = (w * d * agree).sum(axis=0)
    if normalize:
        divisor = (w * agree).sum(axis=0)
        total /= np.where(divisor == 0, 1, divisor)
    return base + factor * total


# No simple fractions: they would put many results exactly between two bfloat16 numbers.
WEIGHT = [0.5317, 0.2939, 0.4523]
MIXED = [0.5317, -0.2939, 0.4523]
FORMULAS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray, list[np.ndarray]], np.ndarray]]] = {
    "linear": (
        {"method": "linear", "weights": WEIGHT},
        lambda base, x: linear_formula(x, WEIGHT, normalize=True),
    ),
    "linear sum": (
        {"method": "linear", "weights": MIXED, "parameters": {"normalize": False}},
        lambda base, x: linear_formula(x, MIXED, normalize=False),
    ),
    "linear beta": (
        {"method": "linear", "beta": 0.3079},
        lambda base, x: 0.3079 * x[0] + 0.6921 * x[1],
    ),
    "slerp": (
        {"method": "slerp", "parameters": {"t": 0.3}},
        lambda base, x: slerp_formula(x[0], x[1], 0.3),
    ),
    "slerp beta": (
        {"method": "slerp", "beta": 0.3079},
        lambda base, x: slerp_formula(x[0], x[1], 0.6921),
    ),
    "task_arithmetic": (
        {"method": "task_arithmetic", "weights": MIXED},
        lambda base, x: task_arithmetic_formula(base, x, MIXED, normalize=False, factor=1),
    ),
    "task_arithmetic mean": (
        {
            "method": "task_arithmetic",
            "weights": WEIGHT,
            "parameters": {"normalize": True, "lambda": 0.7},
        },
        lambda base, x: task_arithmetic_formula(base, x, WEIGHT, normalize=True, factor=0.7),
    ),
    "ties": (
        {"method": "ties", "weights": WEIGHT, "parameters": {"density": [0.5, 0.8, 0.3]}},
        lambda base, x: ties_formula(
            base, x, WEIGHT, [0.5, 0.8, 0.3], normalize=True, rescale=False, factor=1
        ),
    ),
    "ties sum": (
        {
            "method": "ties",
            "weights": MIXED,
            "parameters": {"density": 0.4, "normalize": False, "rescale": True, "lambda": 0.7},
        },
        lambda base, x: ties_formula(
            base, x, MIXED, [0.4] * 3, normalize=False, rescale=True, factor=0.7
        ),
    ),
    "dare_linear all": (
        {"method": "dare_linear", "weights": WEIGHT, "parameters": {"lambda": 0.7}},
        lambda base, x: task_arithmetic_formula(base, x, WEIGHT, normalize=False, factor=0.7),
    ),
    "dare_ties all": (
        {"method": "dare_ties", "weights": WEIGHT},
        lambda base, x: ties_formula(
            base, x, WEIGHT, [1, 1, 1], normalize=False, rescale=False, factor=1
        ),
    ),
}
# Tensor → how the base and three models store it; the first model's dtype is the output's.
STORED = {
    "float64": ("F64", "F64", "F64", "F64"),
    "float32": ("F32", "F32", "F32", "F32"),
    "bfloat16": ("BF16", "BF16", "BF16", "BF16"),
    "float16": ("F16", "F16", "F16", "F16"),
    "mixed": ("F32", "BF16", "F16", "F32"),
    "mixed with float64": ("BF16", "F16", "F64", "F32"),
}
PRECISION = {"F16": (11, -13), "BF16": (8, -125)}  # bits, and frexp's exponent of the least normal


def nearest_even(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values rounded once to a narrower format; they must not overflow it."""
    precision, least = PRECISION[dtype]
    quantum = np.ldexp(1.0, np.maximum(np.frexp(values)[1], least) - precision)
    return np.rint(values / quantum) * quantum


@pytest.mark.parametrize("name", FORMULAS)
def test_a_method_is_its_formula_rounded_once(name: str, tmp_path: Path) -> None:
    options, formula = FORMULAS[name]
    count = 2 if "beta" in options or options["method"] == "slerp" else 3
    generator = np.random.default_rng(3)
    base, *models = ({} for _ in range(1 + count))
    for tensor, dtypes in STORED.items():
        start = generator.normal(0, 0.05, 4001)
        base[tensor] = start.astype(DTYPES[dtypes[0]])
        for model, dtype in zip(models, dtypes[1:], strict=False):
            model[tensor] = (start + generator.normal(0, 0.03, 4001)).astype(DTYPES[dtype])
    with_base = options["method"] in TASK_VECTOR_METHODS
    results = merged(tmp_path, models, base=base if with_base else None, **options)

    for tensor, dtypes in STORED.items():
        used = dtypes[: 1 + count] if with_base else dtypes[1 : 1 + count]
        wide_base = base[tensor].astype(np.float64)
        wide = [model[tensor].astype(np.float64) for model in models]
        exact = formula(wide_base, wide)
        # The arithmetic is in float32, or float64 where an input is; there are at most 16
        # roundings on the way, each of a value no larger than all inputs together.
        unit = U64 if "F64" in used else U32
        error = 16 * unit * sum(np.abs(x) for x in (wide_base, *wide))
        result = results[tensor].astype(np.float64)
        assert results[tensor].dtype == DTYPES[dtypes[1]]
        if dtypes[1] in PRECISION:
            low, high = (nearest_even(exact + e, dtypes[1]) for e in (-error, error))
            assert np.all((low <= result) & (result <= high)), tensor
            assert np.mean(result == nearest_even(exact, dtypes[1])) > 0.999, tensor
        else:
            assert np.all(np.abs(result - exact) <= error), tensor


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_float64_is_rounded_to_half_precision_once(dtype: str, tmp_path: Path) -> None:
    precision, least = PRECISION[dtype]
    exponents = np.repeat(np.arange(least - 3, least + 12), 200)
    steps = np.random.default_rng(1).integers(2 ** (precision - 1), 2**precision, exponents.size)
    # Just beside the middle between two numbers; on the way through float32, they would be on it.
    beside = np.random.default_rng(2).choice([-1, 1], exponents.size) * 2.0**-30
    values = np.ldexp(steps + 0.5 + beside, exponents - precision)
    result = merged_one(tmp_path, [values, values], beta=0.5, dtype=dtype.lower())
    assert np.array_equal(result.astype(np.float64), nearest_even(values, dtype))


def test_slerp_takes_the_straight_line_between_nearly_parallel_tensors(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=1000)
    noise = np.random.default_rng(1).normal(size=1000)
    noise -= x * (x @ noise) / (x @ x)
    noise *= np.linalg.norm(x) / np.linalg.norm(noise)

    def at_angle(cosine: float) -> np.ndarray:
        return 3 * (cosine * x + math.sqrt(1 - cosine**2) * noise)

    results = merged(
        tmp_path,
        [{"above": x, "below": x, "opposite": x}, {
            "above": at_angle(0.99951), "below": at_angle(0.99949), "opposite": at_angle(-0.99951),
        }],
        method="slerp", parameters={"t": 0.25},
    )  # fmt: skip
    line = {c: 0.75 * x + 0.25 * at_angle(c) for c in (0.99951, 0.99949, -0.99951)}
    tight = {"rtol": 0, "atol": 1e-14}
    np.testing.assert_allclose(results["above"], line[0.99951], **tight)
    np.testing.assert_allclose(results["opposite"], line[-0.99951], **tight)
    arc = slerp_formula(x, at_angle(0.99949), 0.25)
    np.testing.assert_allclose(results["below"], arc, **tight)
    assert np.abs(arc - line[0.99949]).max() > 1e-5  # so the two can be told apart


def test_slerp_of_a_zero_tensor_treats_it_as_orthogonal(tmp_path: Path) -> None:
    x = np.array([3.0, -4.0])
    result = merged_one(tmp_path, [np.zeros(2), x], method="slerp", parameters={"t": 0.25})
    np.testing.assert_allclose(result, math.sin(math.pi / 8) * x, rtol=1e-15)


def test_where_signs_balance_ties_elects_plus(tmp_path: Path) -> None:
    base = np.full(4, 8, np.float32)
    up, down = base + np.float32(1), base - np.float32(1)
    for models in ([up, down], [down, up]):
        result = merged_one(tmp_path, models, base=base, method="ties", weights=[0.5, 0.5])
        assert np.array_equal(result, up)


def test_ties_leaves_the_base_where_no_task_vector_has_a_say(tmp_path: Path) -> None:
    base = np.array([8, 8, 8, 8], np.float32)
    model = np.array([8, 9, 10, 4], np.float32)
    result = merged_one(
        tmp_path, [model], base=base, method="ties", weights=[1], parameters={"density": 0.5}
    )
    assert np.array_equal(result, [8, 8, 10, 4])


# --- laws -----------------------------------------------------------------------------------------

BETAS = st.floats(0, 1)
WEIGHTS = st.floats(0.01, 10)


@st.composite
def tensors(draw: st.DrawFn, dtype: str, size: int, share: float) -> np.ndarray:
    """Any finite values, −0.0 and subnormals among them, up to a share of the largest."""
    kind = DTYPES[dtype]
    pattern = np.dtype(f"u{kind.itemsize}")
    width = 8 * kind.itemsize
    sign = 1 << (width - 1)
    one = int(np.ones((), kind).view(pattern))
    corners = st.sampled_from([0, sign, 1, sign + 1, 2, 3, one, one + 1])
    elements = st.one_of(corners, st.integers(0, 2**width - 1))
    values = draw(hnp.arrays(pattern, size, elements=elements)).view(kind)
    with np.errstate(invalid="ignore"):
        wide = np.abs(values.astype(np.float64))
    return np.where(wide <= share * float(ml_dtypes.finfo(kind).max), values, kind.type(-1.5))


@st.composite
def checkpoints(
    draw: st.DrawFn, count: int, *, dtypes: Sequence[str] = tuple(DTYPES), share: float = 1.0
) -> list[dict[str, np.ndarray]]:
    """Models with a tensor of each dtype."""
    size = draw(st.integers(1, 20))
    return [{dtype: draw(tensors(dtype, size, share)) for dtype in dtypes} for _ in range(count)]


@pytest.mark.parametrize("method", ["linear", "slerp"])
@LAWS
@given(models=checkpoints(2))
def test_beta_one_is_the_first_model_and_beta_zero_the_second_bit_for_bit(
    method: str, models: list[dict[str, np.ndarray]], folder: Path
) -> None:
    for beta, model in ((1, models[0]), (0, models[1])):
        results = merged(folder, models, method=method, beta=beta)
        for dtype in DTYPES:
            assert bits(results[dtype]) == bits(model[dtype]), (beta, dtype)


@LAWS
@given(models=checkpoints(2))
def test_slerp_at_t_zero_and_one_is_one_model_bit_for_bit(
    models: list[dict[str, np.ndarray]], folder: Path
) -> None:
    for t, model in enumerate(models):
        results = merged(folder, models, method="slerp", parameters={"t": t})
        assert {n: bits(x) for n, x in results.items()} == {n: bits(x) for n, x in model.items()}


@pytest.mark.parametrize("method", ["linear", "slerp"])
@LAWS
@given(models=checkpoints(1, dtypes=NARROW), beta=BETAS)
def test_a_half_precision_model_merged_with_itself_is_itself(
    method: str, models: list[dict[str, np.ndarray]], beta: float, folder: Path
) -> None:
    if method == "slerp":  # a vector without a direction: see the test of the zero tensor
        assume(all(np.linalg.norm(x.astype(np.float64)) > 1e-7 for x in models[0].values()))
    results = merged(folder, models * 2, method=method, beta=beta)
    for dtype in NARROW:
        assert np.array_equal(results[dtype], models[0][dtype]), dtype


@LAWS
@given(models=checkpoints(1))
def test_a_model_merged_with_itself_half_and_half_is_itself_in_every_dtype(
    models: list[dict[str, np.ndarray]], folder: Path
) -> None:
    # Half of the least normal numbers is subnormal in the dtype of the arithmetic, which costs the
    # last bit: there, and only there, one unit may be missing.
    (model,) = models
    results = merged(folder, models * 2, beta=0.5)
    for dtype in DTYPES:
        x, y = model[dtype], results[dtype]
        if dtype in NARROW:
            assert bits(x) == bits(y), dtype
            continue
        normal = np.abs(x) >= 2 * np.finfo(x.dtype).smallest_normal
        assert bits(x[normal | (x == 0)]) == bits(y[normal | (x == 0)]), dtype
        assert np.all(np.abs(x - y) <= np.finfo(x.dtype).smallest_subnormal), dtype


@LAWS
@given(models=checkpoints(1, dtypes=("F64", "F32"), share=0.25), beta=BETAS)
def test_a_float32_model_merged_with_itself_moves_by_two_units_at_most(
    models: list[dict[str, np.ndarray]], beta: float, folder: Path
) -> None:
    results = merged(folder, models * 2, beta=beta)
    for dtype, x in models[0].items():
        assert np.all(np.abs(results[dtype] - x) <= 2 * np.spacing(np.abs(x))), dtype


@pytest.mark.parametrize("method", ["linear", "slerp"])
@LAWS
@given(models=checkpoints(2, share=2.0**-6))  # slerp goes beyond both where they are opposite
def test_half_and_half_is_symmetric_bit_for_bit(
    method: str, models: list[dict[str, np.ndarray]], folder: Path
) -> None:
    results = merged(folder, models, method=method, beta=0.5)
    swapped = merged(folder, models[::-1], method=method, beta=0.5)
    for dtype in DTYPES:
        assert bits(results[dtype]) == bits(swapped[dtype]), dtype


SUMS = ("linear", "task_arithmetic")


@pytest.mark.parametrize("method", [*SUMS, "ties"])
@LAWS
@given(models=checkpoints(3, dtypes=("F64", "F32", "BF16"), share=2.0**-27), w=st.data())
def test_two_models_may_change_places_with_their_weights(
    method: str, models: list[dict[str, np.ndarray]], w: st.DataObject, folder: Path
) -> None:
    base, *pair = models
    weights = w.draw(st.lists(WEIGHTS, min_size=2, max_size=2))
    based = {"base": None if method == "linear" else base}
    extra = {"parameters": {"density": 0.6}} if method == "ties" else {}
    one = merged(folder, pair, weights=weights, method=method, **based, **extra)
    other = merged(folder, pair[::-1], weights=weights[::-1], method=method, **based, **extra)
    for dtype, values in one.items():
        assert bits(values) == bits(other[dtype]), dtype


@pytest.mark.parametrize("method", SUMS)
@LAWS
@given(
    models=checkpoints(4, dtypes=("F64", "F32"), share=2.0**-27),
    weights=st.lists(WEIGHTS, min_size=3, max_size=3),
    order=st.permutations(range(3)),
)
def test_the_order_of_models_with_their_weights_does_not_matter(
    method: str, models: list[dict[str, np.ndarray]], weights: list[float], order: list[int],
    folder: Path,
) -> None:  # fmt: skip
    base, *three = models
    based = {"base": None if method == "linear" else base}
    one = merged(folder, three, weights=weights, method=method, **based)
    other = merged(
        folder, [three[i] for i in order], weights=[weights[i] for i in order], method=method,
        **based,
    )  # fmt: skip
    for dtype, unit in (("F64", U64), ("F32", U32)):
        # A dozen roundings of values no larger than the sum of all terms, on either side.
        terms = np.abs(base[dtype])
        for weight, model in zip(weights, three, strict=True):
            terms = terms + weight * (np.abs(model[dtype]) + np.abs(base[dtype]))
        bound = 24 * unit * terms + 24 * np.finfo(DTYPES[dtype]).smallest_subnormal
        assert np.all(np.abs(one[dtype] - other[dtype]) <= bound), dtype


@LAWS
@given(models=checkpoints(2, dtypes=("F32",)), beta=BETAS)
def test_a_float32_average_is_two_products_and_a_sum_in_float32(
    models: list[dict[str, np.ndarray]], beta: float, folder: Path
) -> None:
    assume(0 < beta < 1)  # the ends are copies
    a, b = (model["F32"] for model in models)
    with np.errstate(all="ignore"):
        expected = np.float32(beta) * a + np.float32(1 - beta) * b
    assert bits(merged(folder, models, beta=beta)["F32"]) == bits(expected)


@pytest.mark.parametrize("method", TASK_VECTOR_METHODS)
@pytest.mark.parametrize("normalize", [False, True])
@LAWS
@given(models=checkpoints(2, dtypes=("F64", "F32"), share=2.0**-27))
def test_one_task_vector_with_weight_one_leads_to_its_model(
    method: str, normalize: bool, models: list[dict[str, np.ndarray]], folder: Path
) -> None:
    base, model = models
    parameters = {"normalize": normalize}
    results = merged(folder, [model], base=base, method=method, weights=[1], parameters=parameters)
    for dtype, unit in (("F64", U64), ("F32", U32)):
        bound = 2 * unit * (np.abs(model[dtype]) + np.abs(base[dtype]))  # the difference, the sum
        error = np.abs(results[dtype] - model[dtype])
        assert np.all(error <= bound + np.finfo(DTYPES[dtype]).smallest_subnormal), dtype


@pytest.mark.parametrize("method", TASK_VECTOR_METHODS)
@LAWS
@given(models=checkpoints(1), density=st.floats(0, 1))
def test_models_equal_to_the_base_leave_it_exactly(
    method: str, models: list[dict[str, np.ndarray]], density: float, folder: Path
) -> None:
    parameters = {} if method == "task_arithmetic" else {"density": density}
    results = merged(
        folder, models * 2, base=models[0], method=method, weights=[0.7, -3],
        parameters=parameters,
    )  # fmt: skip
    for dtype in DTYPES:
        assert np.array_equal(results[dtype], models[0][dtype]), dtype  # −0.0 may become 0.0


@LAWS
@given(
    signs=hnp.arrays(np.bool_, 50),
    sizes=hnp.arrays(np.float32, (3, 50), elements=st.floats(0.125, 8, width=32)),
    base=hnp.arrays(np.float32, 50, elements=st.floats(-1, 1, width=32)),
    weights=st.lists(WEIGHTS, min_size=3, max_size=3),
)
def test_ties_that_trims_nothing_is_the_mean_task_vector_where_signs_agree(
    signs: np.ndarray, sizes: np.ndarray, base: np.ndarray, weights: list[float], folder: Path
) -> None:
    directions = np.where(signs, 1, -1) * np.ones((3, 1))
    directions[0, :10] *= -1  # ten elements in which the models disagree
    models = list((base + directions * sizes).astype(np.float32))
    options: dict[str, Any] = {"base": base, "weights": weights}
    ties = merged_one(folder, models, method="ties", **options)
    mean = merged_one(
        folder, models, method="task_arithmetic", parameters={"normalize": True}, **options
    )
    np.testing.assert_allclose(ties[10:], mean[10:], rtol=0, atol=16 * U32 * 9)
    # Where they disagree, ties leaves the minority out: it goes further than the mean does.
    assert np.all(np.abs(ties[:10] - base[:10]) > np.abs(mean[:10] - base[:10]))


# --- random methods -------------------------------------------------------------------------------

ELEMENTS = 3 * BLOCK + 1234
RANDOM = ("dare_linear", "dare_ties")


def task_vector(seed: int = 5) -> np.ndarray:
    """No element is zero, so that a kept element can be told from a dropped one."""
    generator = np.random.default_rng(seed)
    sign = generator.choice([-1, 1], ELEMENTS)
    return (sign * generator.uniform(0.01, 1, ELEMENTS)).astype(np.float32)


def thinned(
    folder: Path, method: str = "dare_linear", *, density: float = 0.4, rescale: bool = False,
    name: str = "weight", seed: int = 0, weights: Sequence[float] = (1,),
    others: Tensors | None = None, **options: Any,
) -> np.ndarray:  # fmt: skip
    """A task vector over a base of zeros: what is left of it."""
    tensors = {name: task_vector(), **(others or {})}
    zeros = {key: np.zeros_like(value) for key, value in tensors.items()}
    results = merged(
        folder, [tensors] * len(weights), base=zeros, method=method, weights=weights, seed=seed,
        parameters={"density": density, "rescale": rescale}, **options,
    )  # fmt: skip
    return results[name]


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("density", [0.001, 0.25, 0.5, 0.9])
def test_each_element_is_kept_with_the_probability_density(
    method: str, density: float, tmp_path: Path
) -> None:
    result = thinned(tmp_path, method, density=density)
    kept = result != 0
    deviation = math.sqrt(ELEMENTS * density * (1 - density))
    assert abs(np.count_nonzero(kept) - ELEMENTS * density) < 5 * deviation
    assert np.array_equal(result[kept], task_vector()[kept])


@pytest.mark.parametrize("density", [0.25, 0.7])
def test_elements_are_kept_independently_at_every_distance(density: float, tmp_path: Path) -> None:
    kept = thinned(tmp_path, density=density) != 0
    spectrum = np.fft.rfft(kept - density, 2 * ELEMENTS)  # twice as long: nothing wraps around
    together = np.fft.irfft(np.abs(spectrum) ** 2)[1 : ELEMENTS - 1000]
    pairs = ELEMENTS - 1.0 - np.arange(together.size)
    deviation = np.sqrt(pairs) * density * (1 - density)
    # A normal number lies that far out once in 10**10, and there are 2 * 10**5.
    assert np.abs(together / deviation).max() < 6.5


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("density", [0.01, 0.4, 0.9])
def test_rescaling_multiplies_all_kept_elements_by_what_restores_the_l1_norm(
    method: str, density: float, tmp_path: Path
) -> None:
    delta = task_vector().astype(np.float64)
    result = thinned(tmp_path, method, density=density, rescale=True)
    kept = result != 0
    factor = np.abs(delta).sum() / np.abs(delta[kept]).sum()
    assert factor != pytest.approx(1 / density, rel=1e-6)  # the paper's factor, on average right
    assert np.array_equal(result[kept], np.float32(factor) * task_vector()[kept])
    assert np.abs(result.astype(np.float64)).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-6)


def test_ties_rescales_what_it_trimmed_to_the_l1_norm_too(tmp_path: Path) -> None:
    delta = task_vector()
    result = merged_one(
        tmp_path, [delta], base=np.zeros_like(delta), method="ties", weights=[1],
        parameters={"density": 0.3, "rescale": True},
    )  # fmt: skip
    assert np.count_nonzero(result) == int(0.3 * ELEMENTS)
    total = np.abs(delta.astype(np.float64)).sum()
    assert np.abs(result.astype(np.float64)).sum() == pytest.approx(total, rel=1e-6)


def test_rescaling_is_on_in_dare_and_off_in_ties_by_default(tmp_path: Path) -> None:
    delta = task_vector()
    norms = {
        method: np.abs(
            merged_one(
                tmp_path, [delta], base=np.zeros_like(delta), method=method, weights=[1],
                parameters={"density": 0.5},
            ).astype(np.float64)
        ).sum()
        for method in ("ties", *RANDOM)
    }  # fmt: skip
    total = np.abs(delta.astype(np.float64)).sum()
    assert norms["dare_linear"] == norms["dare_ties"] == pytest.approx(total, rel=1e-6)
    assert norms["ties"] < 0.9 * total


def independent(first: np.ndarray, second: np.ndarray, density: float) -> bool:
    """Whether two masks agree as often as chance has it, within five standard deviations."""
    both = np.count_nonzero((first != 0) & (second != 0))
    share = density**2
    return bool(abs(both - ELEMENTS * share) < 5 * math.sqrt(ELEMENTS * share * (1 - share)))


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_gives_the_same_bytes_and_another_seed_others(method: str, tmp_path: Path) -> None:
    def run(seed: int) -> tuple[np.ndarray, bytes]:
        result = thinned(tmp_path, method, seed=seed)
        return result, (tmp_path / "merged.safetensors").read_bytes()

    (first, first_file), (_, again), (other, _) = run(7), run(7), run(8)
    assert first_file == again
    assert independent(first, other, 0.4)


def test_a_mask_depends_on_the_tensors_name(tmp_path: Path) -> None:
    assert independent(thinned(tmp_path, name="one"), thinned(tmp_path, name="two"), 0.4)


def test_each_model_has_a_mask_of_its_own(tmp_path: Path) -> None:
    first = thinned(tmp_path, weights=[1, 0])
    second = thinned(tmp_path, weights=[0, 1])
    assert independent(first, second, 0.4)
    assert bits(first) == bits(thinned(tmp_path, weights=[1]))  # whatever models come after it


def test_a_mask_does_not_depend_on_other_tensors_or_the_stored_dtype(tmp_path: Path) -> None:
    alone = thinned(tmp_path)
    others = {"a": task_vector(1)[:70_000], "z": task_vector(2)}
    assert bits(thinned(tmp_path, others=others)) == bits(alone)
    delta = task_vector().astype(ml_dtypes.bfloat16).reshape(-1, 2)
    stored = merged_one(
        tmp_path, [delta], base=np.zeros_like(delta), method="dare_linear", weights=[1],
        parameters={"density": 0.4, "rescale": False},
    )  # fmt: skip
    assert np.array_equal(stored.ravel() != 0, alone != 0)


SLICED = {
    "linear": {"weights": [0.3, 0.5]},
    "slerp": {"parameters": {"t": 0.3}},
    "task_arithmetic": {"weights": [0.3, 0.5]},
    "ties": {"weights": [0.3, 0.5], "parameters": {"density": 0.3, "rescale": True}},
    "dare_linear": {"weights": [0.3, 0.5], "parameters": {"density": 0.3}},
    "dare_ties": {"weights": [0.3, 0.5], "parameters": {"density": 0.3}},
}


@pytest.mark.parametrize("method", SLICED)
def test_no_byte_depends_on_workers_or_slices(method: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    base, *models = (
        {
            "float32": generator.normal(size=ELEMENTS).astype(np.float32),
            "float64": generator.normal(size=ELEMENTS),
            "bfloat16": generator.normal(size=(2, ELEMENTS)).astype(ml_dtypes.bfloat16),
            "small": generator.normal(size=17).astype(np.float32),
        }
        for _ in range(3)
    )
    results = {
        merged_in_slices(
            tmp_path, models, base=base if method in TASK_VECTOR_METHODS else None, method=method,
            workers=workers, slice_elements=blocks * BLOCK, **SLICED[method],
        )
        for workers, blocks in ((1, 1), (1, 64), (2, 1), (2, 3), (5, 1), (5, 2))
    }  # fmt: skip
    assert len(results) == 1


# --- the largest magnitudes -----------------------------------------------------------------------


def reference_largest(delta: np.ndarray, kept: int) -> np.ndarray:
    """By sorting: all above the threshold, and of those at it the first."""
    magnitudes = np.abs(delta)
    threshold = np.sort(magnitudes)[delta.size - kept]
    above = magnitudes > threshold
    at = np.flatnonzero(magnitudes == threshold)[: kept - np.count_nonzero(above)]
    result = np.where(above, delta, 0)
    result[at] = delta[at]
    return result


def largest(delta: np.ndarray, kept: int, order: Sequence[int] | None = None) -> np.ndarray:
    """By `Largest`, with the blocks in any order."""
    x = Tensor("x", delta.shape, 1, dtype=delta.dtype)
    selection = Largest(x.model(0), kept).begin(x)
    blocks = [
        Block(number, start, [delta[start : start + BLOCK]], 0)
        for number, start in enumerate(range(0, delta.size, BLOCK))
    ]
    passes = 0
    while selection.needs_pass:
        passes += 1
        assert passes < 20, "it never ends"
        for number in order if order is not None else range(len(blocks)):
            selection.add(blocks[number])
        selection.end_pass()
    made: np.ndarray = np.concatenate([selection.value(b) for b in blocks])
    return made


FAMILIES = (
    "normal", "few values", "all equal", "mostly zero", "neighbours", "subnormal", "all sizes",
)  # fmt: skip


@pytest.mark.parametrize("told", ["rightly", "wrongly", "of the smallest", "of the largest"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.999])
def test_a_sample_changes_nothing_but_the_passes(family: str, told: str, share: float) -> None:
    delta = hard_values(family, np.float32)
    kept = max(1, int(share * delta.size))
    by_size = np.argsort(np.abs(delta), kind="stable")
    places = {
        "rightly": np.arange(0, delta.size, 40), "wrongly": by_size[40_000:44_000],
        "of the smallest": by_size[:4000], "of the largest": by_size[-4000:],
    }[told]  # fmt: skip
    x = Tensor("x", delta.shape, 1, dtype=delta.dtype)
    selection = Largest(x.model(0), kept).begin(x)
    selection.sample([Block(0, 0, [delta[places]], 0)])
    made, passes = in_passes(selection, delta)
    assert bits(made) == bits(largest(delta, kept))
    if told == "rightly" and family == "normal":
        assert passes == 1


def in_passes(selection: Any, delta: np.ndarray) -> tuple[np.ndarray, int]:
    """What is kept of a vector, and how often it was gone through."""
    blocks = [
        Block(number, start, [delta[start : start + BLOCK]], 0)
        for number, start in enumerate(range(0, delta.size, BLOCK))
    ]
    passes = 0
    while selection.needs_pass:
        passes += 1
        for b in blocks:
            selection.add(b)
        selection.end_pass()
    return np.concatenate([selection.value(b) for b in blocks]), passes


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", ["shuffled", "sorted", "half of it zero"])
def test_a_large_tensor_is_trimmed_exactly_in_two_passes(
    dtype: type, order: str, tmp_path: Path
) -> None:
    generator = np.random.default_rng(5)
    delta = generator.normal(size=3 * 2**19 + 11).astype(np.float32)
    if order == "sorted":
        delta = np.sort(delta)
    if order == "half of it zero":
        delta[: delta.size // 2] = 0
    base = np.zeros_like(delta).astype(dtype)
    model = delta.astype(dtype)
    result = merged_one(
        tmp_path, [model], base=base, method="ties",
        parameters={"density": 0.2, "weight": 1, "normalize": False},
    )  # fmt: skip
    expected = reference_largest(model.astype(np.float32), int(0.2 * delta.size))
    assert np.array_equal(result.astype(np.float32), expected)


def hard_values(family: str, dtype: type) -> np.ndarray:
    """Values that lie badly for finding a threshold 16 bits at a time."""
    generator = np.random.default_rng(11)
    size = 3 * BLOCK + 77
    info = np.finfo(dtype)
    made = {
        "normal": lambda: generator.normal(size=size),
        "few values": lambda: generator.integers(-3, 4, size) * 0.25,
        "all equal": lambda: generator.choice([-0.1, 0.1], size),
        "mostly zero": lambda: generator.normal(size=size) * (generator.random(size) < 0.01),
        "neighbours": lambda: 1 + info.eps * generator.integers(0, 5, size),
        "subnormal": lambda: info.smallest_subnormal * generator.integers(-99, 100, size),
        "all sizes": lambda: 2.0 ** generator.uniform(info.minexp, info.maxexp - 1, size),
    }[family]()
    return np.asarray(made, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "family",
    ["normal", "few values", "all equal", "mostly zero", "neighbours", "subnormal", "all sizes"],
)
def test_exactly_k_are_kept_and_the_first_of_equal_ones(family: str, dtype: type) -> None:
    delta = hard_values(family, dtype)
    for kept in (1, 2, 1000, BLOCK, delta.size // 3, delta.size - 1):
        expected = reference_largest(delta, kept)
        assert np.array_equal(largest(delta, kept), expected), kept
        assert np.array_equal(largest(delta, kept, order=[2, 0, 3, 1]), expected), kept


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spread", [5, 2**12])
def test_k_are_found_among_millions_that_nearly_equal_the_threshold(
    spread: int, dtype: type
) -> None:
    size = (5 << 20) + 77
    steps = np.random.default_rng(12).integers(0, spread, size)
    delta = np.asarray(-1 - np.finfo(dtype).eps * steps, dtype)
    assert np.array_equal(largest(delta, size // 3), reference_largest(delta, size // 3))


@LAWS
@given(
    delta=hnp.arrays(
        st.sampled_from([np.float32, np.float64]), st.integers(2, 40),
        elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -1.5, 1e-40, 3e38]),
    ),
    data=st.data(),
)  # fmt: skip
def test_k_of_few_values_are_those_that_sorting_finds(
    delta: np.ndarray, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, delta.size - 1))
    assert np.array_equal(largest(delta, kept), reference_largest(delta, kept))


@pytest.mark.parametrize("blocks", [1, 2, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_trims_a_file_as_sorting_does(blocks: int, dtype: type, tmp_path: Path) -> None:
    delta = hard_values("few values", dtype)
    kept = delta.size // 3
    merged_in_slices(
        tmp_path, [{"weight": delta}], base={"weight": np.zeros_like(delta)}, workers=2,
        slice_elements=blocks * BLOCK, method="ties", weights=[1],
        parameters={"density": (kept + 0.5) / delta.size},
    )  # fmt: skip
    result = load(tmp_path / "merged.safetensors")["weight"]
    assert np.array_equal(result, reference_largest(delta, kept))


def test_a_bfloat16_checkpoint_with_ties_at_the_threshold_keeps_exactly_k(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    steps = generator.choice([-4, -3, -2, -1, 1, 2, 3, 4], (300, 400)) * 2.0**-7
    base = generator.choice([0.5, -0.5, 0.75], steps.shape).astype(ml_dtypes.bfloat16)
    model = (base.astype(np.float64) + steps).astype(ml_dtypes.bfloat16)
    delta = model.astype(np.float32).ravel() - base.astype(np.float32).ravel()
    kept = int(0.3 * delta.size)
    threshold = np.sort(np.abs(delta))[-kept]
    at_threshold = np.count_nonzero(np.abs(delta) == threshold)
    assert at_threshold > 1000  # and only some of them can be kept:
    assert np.count_nonzero(np.abs(delta) > threshold) + at_threshold > kept

    result = merged_one(
        tmp_path, [model], base=base, method="ties", weights=[1], parameters={"density": 0.3}
    )
    changed = (result != base).ravel()
    assert np.count_nonzero(changed) == kept
    assert np.array_equal(changed, reference_largest(delta, kept) != 0)
    assert np.array_equal(result.ravel()[changed], model.ravel()[changed])


@pytest.mark.parametrize(
    ("density", "kept"), [(0, 0), (1e-9, 1), (0.29, 28), (0.999, 99), (1, 100)]
)
def test_density_is_rounded_down_but_keeps_one_element(
    density: float, kept: int, tmp_path: Path
) -> None:
    delta = np.arange(1, 101, dtype=np.float32)
    result = merged_one(
        tmp_path, [delta], base=np.zeros_like(delta), method="ties", weights=[1],
        parameters={"density": density},
    )  # fmt: skip
    assert np.array_equal(result, np.where(delta > 100 - kept, delta, 0))


# --- parameters -----------------------------------------------------------------------------------

NAN = math.nan
A, B = np.array([1, 2, 3], np.float32), np.array([1.5, 1, 4], np.float32)


def refused(folder: Path, count: int, base: bool, options: dict[str, Any]) -> str:
    """The sentence with which a merge is refused; nothing must be left behind."""
    models = [A, B, A][:count]
    with pytest.raises(modelsoup.ParameterError) as caught, speaking("command"):
        merged_one(folder, models, base=B if base else None, **options)
    assert not [path for path in folder.iterdir() if "merged" in path.name]
    return str(caught.value)


TIES_OF_TWO = {"method": "ties", "weights": [1, 1]}
REFUSED: dict[str, tuple[int, bool, dict[str, Any], str]] = {
    "unknown method": (
        2, False, {"method": "sler"},
        "no merge method is called 'sler'; did you mean 'slerp'",
    ),
    "unknown method, nothing near": (
        2, False, {"method": "zzzz"},
        "(there are ",
    ),
    "unknown parameter": (
        2, True, {**TIES_OF_TWO, "parameters": {"densty": 0.5}},
        "the method 'ties' has no parameter 'densty'; did you mean 'density'?",
    ),
    "unknown parameter, nothing near": (
        2, False, {"parameters": {"zzzz": 0.5}},
        "the method 'linear' has no parameter 'zzzz' (it has weight, normalize)",
    ),
    "lambda's Python name": (
        2, True, {**TIES_OF_TWO, "parameters": {"lambda_": 0.5}},
        "the method 'ties' has no parameter 'lambda_'; did you mean 'lambda'?",
    ),
    "slerp without t": (2, False, {"method": "slerp"}, "needs the parameter 't' (--set t=…)"),
    "ties without weights": (2, True, {"method": "ties"}, "needs the parameter 'weight'"),
    "density above 1": (
        2, True, {**TIES_OF_TWO, "parameters": {"density": 1.5}},
        "parameter 'density' of 'ties' is 1.5, but must be between 0 and 1",
    ),
    "one of the densities below 0": (
        2, True, {**TIES_OF_TWO, "parameters": {"density": [0.5, -1]}},
        "parameter 'density' of 'ties' is -1, but must be between 0 and 1",
    ),
    "t below 0": (
        2, False, {"method": "slerp", "parameters": {"t": -0.1}},
        "parameter 't' of 'slerp' is -0.1, but must be between 0 and 1",
    ),
    "NaN as a weight": (
        2, False, {"weights": [1, NAN]},
        "parameter 'weight' of 'linear' is nan, not a finite number",
    ),
    "infinite lambda": (
        2, True, {**TIES_OF_TWO, "parameters": {"lambda": math.inf}},
        "parameter 'lambda' of 'ties' is inf, not a finite number",
    ),
    "a word": (
        2, False, {"method": "slerp", "parameters": {"t": "half"}},
        "parameter 't' of 'slerp' is 'half', not a number",
    ),
    "a truth value for a number": (
        2, False, {"method": "slerp", "parameters": {"t": True}},
        "parameter 't' of 'slerp' is True, not a number",
    ),
    "a number for a truth value": (
        2, False, {"parameters": {"normalize": 2}},
        "parameter 'normalize' of 'linear' is 2, not true or false",
    ),
    "three weights for two models": (
        2, False, {"weights": [1, 2, 3]},
        "parameter 'weight' of 'linear' has 3 values for 2 models",
    ),
    "two densities for three models": (
        3, True, {"method": "ties", "weights": 1, "parameters": {"density": [0.5, 0.5]}},
        "parameter 'density' of 'ties' has 2 values for 3 models",
    ),
    "several numbers for one": (
        2, False, {"method": "slerp", "parameters": {"t": [0.1, 0.2]}},
        "parameter 't' of 'slerp' is one number, but 2 were given",
    ),
    "beta above 1": (2, False, {"beta": 1.5}, "beta is 1.5, but must be between 0 and 1"),
    "beta is NaN": (2, False, {"beta": NAN}, "beta is nan, but must be between 0 and 1"),
    "beta and weights": (
        2, False, {"beta": 0.5, "weights": [1, 1]}, "give --beta β or --weights W, not both"
    ),
    "weights twice": (
        2, False, {"weights": [1, 1], "parameters": {"weight": [1, 2]}},
        "the weights are given twice",
    ),
    "beta for ties": (
        2, True, {"method": "ties", "beta": 0.5}, "beta means nothing to 'ties': use --weights"
    ),
    "beta with three models": (
        3, False, {"beta": 0.5},
        "beta is the share of the first of two models, but 3 were given: use --weights",
    ),
    "weights for slerp": (
        2, False, {"method": "slerp", "weights": [1, 1]},
        "the method 'slerp' has no parameter 'weight'",
    ),
    "weights that sum to zero": (
        2, False, {"weights": [1, -1]},
        "the weights of 'linear' sum to 0 and cannot be normalised (--set normalize=false",
    ),
    "task arithmetic whose weights sum to zero": (
        2, True,
        {"method": "task_arithmetic", "weights": [1, -1], "parameters": {"normalize": True}},
        "the weights of 'task_arithmetic' sum to 0 and cannot be normalised",
    ),
    "no base": (2, False, TIES_OF_TWO, "'ties' needs a base model (--base BASE)"),
    "a base that nothing uses": (
        2, True, {"method": "linear"}, "a base model was given, but linear uses none"
    ),
    "slerp of three": (
        3, False, {"method": "slerp", "parameters": {"t": 0.5}},
        "'slerp' merges exactly 2 models, but 3 were given",
    ),
    "linear of one": (1, False, {}, "one model alone is not merged"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    count, base, options, sentence = REFUSED[name]
    if options.get("weights") == 1:
        options = {**options, "weights": [1] * count}
    said = refused(tmp_path, count, base, options)
    assert sentence in said
    assert "\n" not in said


def test_weights_that_sum_to_zero_pass_where_nan_is_allowed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": [1, -1], "allow_nonfinite": True}
    assert not np.isfinite(merged_one(tmp_path, [A, B], **options)).any()
    # As in mergekit, a task vector is not divided by a sum of zero.
    result = merged_one(
        tmp_path, [A, B], base=B, method="task_arithmetic", parameters={"normalize": True},
        **options,
    )  # fmt: skip
    assert np.array_equal(result, A)


def test_weights_that_sum_to_zero_are_fine_without_normalisation(tmp_path: Path) -> None:
    result = merged_one(tmp_path, [A, B], weights=[1, -1], parameters={"normalize": False})
    assert np.array_equal(result, A - B)


@pytest.mark.parametrize(
    ("method", "parameters"), [("slerp", {"t": 0.2}), ("linear", {"weight": [0.1, 0.9]})]
)
def test_beta_and_the_parameter_it_stands_for_are_refused_together(
    method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(modelsoup.ParameterError, match="twice"):
        merged_one(tmp_path, [A, B], method=method, beta=0.5, parameters=parameters)


def test_one_number_stands_for_all_models(tmp_path: Path) -> None:
    one = merged_one(tmp_path, [A, B, A], parameters={"weight": 0.5})
    assert bits(one) == bits(merged_one(tmp_path, [A, B, A], weights=[0.5] * 3))


# --- methods from elsewhere -----------------------------------------------------------------------


@pytest.mark.usefixtures("own_methods")
def test_a_function_of_blocks_can_be_registered(tmp_path: Path) -> None:
    @modelsoup.method("swap_near", models=(2, 2))
    def swap_near(x: Tensor, t: float = modelsoup.parameter(low=0, doc="how near")) -> Any:
        def merged(b: Block) -> np.ndarray:
            apart = np.maximum(np.abs(b.model(0) - b.model(1)), 1e-6)
            share = np.clip(t / apart, 0, 1)
            made: np.ndarray = share * b.model(1) + (1 - share) * b.model(0)
            return made

        return merged

    a, b = task_vector(1), task_vector(2)
    result = merged_one(tmp_path, [a, b], method="swap_near", parameters={"t": 0.1})
    share = np.clip(0.1 / np.maximum(np.abs(a.astype(np.float64) - b), 1e-6), 0, 1)
    assert 0.05 < np.mean(share == 1) < 0.5  # some are swapped, some are not
    np.testing.assert_allclose(result, share * b + (1 - share) * a, rtol=0, atol=8 * U32)
    assert bits(modelsoup.merge_arrays("swap_near", [a, b], t=0.1)) == bits(result)
    assert "swap_near" in modelsoup.method_names()
    with pytest.raises(modelsoup.ParameterError, match="needs the parameter 't'"):
        merged_one(tmp_path, [a, b], method="swap_near")
    with pytest.raises(modelsoup.ParameterError, match=r"'swap_near' is -1, but .* at least 0"):
        merged_one(tmp_path, [a, b], method="swap_near", parameters={"t": -1})


@pytest.mark.usefixtures("own_methods")
def test_a_method_can_ask_for_inner_products(tmp_path: Path) -> None:
    @modelsoup.method("unit_mean")
    def unit_mean(x: Tensor) -> Any:
        """The mean of the models' directions."""
        (gram,) = yield [Gram()]
        assert gram.dtype == np.float64
        return modelsoup.WeightedSum(1 / np.sqrt(np.diag(gram)) / len(gram))

    x = [scale * task_vector(seed) for seed, scale in enumerate((1, 10, 0.1))]
    result = merged_one(tmp_path, [values.astype(np.float32) for values in x], method="unit_mean")
    expected = sum(values / np.linalg.norm(values.astype(np.float64)) for values in x) / 3
    np.testing.assert_allclose(result, expected, rtol=0, atol=8 * U32 * np.abs(expected).max())


@pytest.mark.parametrize("elements", [1, 1023, 1024, 5000, BLOCK, 2 * BLOCK + 3000])
def test_inner_products_are_added_in_an_order_that_no_machine_changes(elements: int) -> None:
    x = np.random.default_rng(elements).normal(size=(3, elements))
    gram = Gram().begin(Tensor("x", (elements,), 3))
    for start in reversed(range(0, elements, BLOCK)):
        gram.add(Block(start // BLOCK, start, [v[start : start + BLOCK] for v in x], 0))
    gram.end_pass()
    expected = np.zeros((3, 3))
    for i, j in np.ndindex(3, 3):
        sums = []
        for start in range(0, elements, BLOCK):
            lanes = np.zeros(1024)
            for row in range(start, min(start + BLOCK, elements), 1024):
                stop = min(row + 1024, start + BLOCK, elements)
                lanes[: stop - row] += x[i, row:stop] * x[j, row:stop]
            sums.append(lanes.sum())
        expected[i, j] = np.array(sums).sum()
    assert gram.value.tobytes() == expected.tobytes()


@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**120])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_inner_products_reach_beyond_the_range_of_float32(
    dtype: type, scale: float, tmp_path: Path
) -> None:
    seen = []

    @modelsoup.method("looks")
    def looks(x: Tensor) -> Any:
        """The first model, and its matrix."""
        (gram,) = yield [Gram()]
        seen.append(gram)
        return modelsoup.WeightedSum([1, 0])

    x = [(task_vector(seed) * scale).astype(dtype) for seed in range(2)]
    merged_one(tmp_path, x, method="looks")
    wide = np.array([values.astype(np.float64) for values in x])
    np.testing.assert_allclose(seen[-1], wide @ wide.T, rtol=1e-12)


@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize("of", ["inputs", "deltas"])
def test_inner_products_are_of_inputs_or_of_task_vectors(of: Any, tmp_path: Path) -> None:
    seen = []

    @modelsoup.method("looks", base=True)
    def looks(x: Tensor) -> Any:
        (gram,) = yield [Gram(of)]
        seen.append(gram)
        return modelsoup.WeightedSum([0.5, 0.5], of_deltas=True)

    base, *models = (task_vector(seed) for seed in range(3))
    result = merged_one(tmp_path, models, base=base, method="looks")
    wide = np.array([v.astype(np.float64) for v in (base, *models)])
    wide = wide if of == "inputs" else wide[1:] - wide[0]
    np.testing.assert_allclose(seen[-1], wide @ wide.T, rtol=1e-12)
    first, second = (np.float32(0.5) * (model - base) for model in models)
    assert np.array_equal(result, base + (first + second))


@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize("kind", ["largest", "random"])
def test_a_method_can_thin_task_vectors(kind: str, tmp_path: Path) -> None:
    @modelsoup.method("signs", base=True, models=(1, None))
    def signs(
        x: Tensor, weight: PerModel = modelsoup.parameter(doc="the step"), density: float = 1.0
    ) -> Any:
        """A step of the same length along the signs of a part of each task vector."""
        thin = [modelsoup.drawn(x, k, x.delta(k), density) for k in x.models]
        if kind == "largest":
            thin = yield [Largest(x.delta(k), int(density * x.elements)) for k in x.models]
        return lambda b: (
            b.base + sum(w * np.sign(one(b)) for w, one in zip(weight, thin, strict=True))
        )

    base, delta = np.float32(4) * task_vector(1), task_vector(2)
    options: dict[str, Any] = {"base": base, "method": "signs", "weights": [0.25]}
    result = merged_one(tmp_path, [base + delta], parameters={"density": 0.3}, **options)
    stepped = result != base
    assert np.array_equal(result, base + np.float32(0.25) * stepped * np.sign(delta))
    if kind == "largest":
        exact = (base + delta) - base
        assert np.array_equal(stepped, reference_largest(exact, int(0.3 * ELEMENTS)) != 0)
    else:
        deviation = math.sqrt(ELEMENTS * 0.3 * 0.7)
        assert abs(np.count_nonzero(stepped) - 0.3 * ELEMENTS) < 5 * deviation


@pytest.mark.usefixtures("own_methods")
def test_a_method_can_ask_for_sums_and_then_for_others(tmp_path: Path) -> None:
    @modelsoup.method("standardised", models=(1, 1))
    def standardised(x: Tensor) -> Any:
        (total,) = yield [modelsoup.Sum(x.model(0))]
        mean = total / x.elements
        (square,) = yield [modelsoup.Sum(lambda b: (b.model(0).astype(np.float64) - mean) ** 2)]
        deviation = math.sqrt(square / x.elements)
        return lambda b: (b.model(0) - mean) / deviation

    x = 3 + task_vector(1)
    result = merged_one(tmp_path, [x], method="standardised").astype(np.float64)
    assert abs(result.mean()) < 1e-6
    assert abs(result.std() - 1) < 1e-6


@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize("count", [1, 3])
def test_a_weighted_sum_must_have_one_coefficient_an_input(count: int, tmp_path: Path) -> None:
    @modelsoup.method("uneven")
    def uneven(x: Tensor) -> Any:
        return modelsoup.WeightedSum([1.0] * count)

    sentence = f"'uneven' returned {count} coefficients for 2 inputs"
    with pytest.raises(modelsoup.ParameterError, match=sentence):
        merged_one(tmp_path, [A, B], method="uneven")


@pytest.mark.usefixtures("own_methods")
def test_a_function_of_a_block_must_return_a_value_for_each_element(tmp_path: Path) -> None:
    @modelsoup.method("mean")
    def mean(x: Tensor) -> Any:
        return lambda b: b.model(0).mean(keepdims=True)  # of one block, whatever the tensor is

    with pytest.raises(modelsoup.ParameterError, match="mean"):
        merged_one(tmp_path, [A, B], method="mean")


@pytest.mark.usefixtures("own_methods")
def test_a_method_that_gives_nothing_to_do_is_refused(tmp_path: Path) -> None:
    @modelsoup.method("nothing")
    def nothing(x: Tensor) -> Any:
        """Forgot its return."""

    with pytest.raises(modelsoup.ParameterError, match="'nothing' gave NoneType for weight"):
        merged_one(tmp_path, [A, B], method="nothing")


@pytest.mark.usefixtures("own_methods")
def test_a_method_that_asks_by_values_for_something_else_is_refused(tmp_path: Path) -> None:
    @modelsoup.method("fickle")
    def fickle(x: Tensor) -> Any:
        (total,) = yield [modelsoup.Sum(x.model(0))]
        if total > 1:  # a plan's guess is 1
            yield [Gram()]
        return modelsoup.WeightedSum([0.5, 0.5])

    merged_one(tmp_path, [A * 0, B], method="fickle")
    with pytest.raises(modelsoup.ParameterError, match="'fickle' asks of weight something else"):
        merged_one(tmp_path, [np.abs(A) + 1, B], method="fickle")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merged.safetensors", "model-1.safetensors", "model-2.safetensors",
    ]  # fmt: skip
    assert np.array_equal(load(tmp_path / "merged.safetensors")["weight"], (A * 0 + B) / 2)


@pytest.mark.usefixtures("own_methods")
def test_a_parameter_may_have_an_upper_end_alone_and_be_a_word_or_an_integer(
    tmp_path: Path,
) -> None:
    @modelsoup.method("step")
    def step(
        x: Tensor,
        length: float = modelsoup.parameter(0.5, high=1),
        times: int = 2,
        of: Literal["first", "second"] = "first",
        twice: bool = False,
    ) -> Any:
        return modelsoup.WeightedSum([times, 0] if of == "first" else [0, times])

    def made(**parameters: Any) -> np.ndarray:
        return merged_one(tmp_path, [A, B], method="step", parameters=parameters)

    assert np.array_equal(made(of="second", times=3), 3 * B)
    assert np.array_equal(made(), 2 * A)
    for wrong, sentence in (
        ({"length": 2}, "at most 1"),
        ({"times": 1.5}, "'times' of 'step' is 1.5, not an integer"),
        ({"of": "secnd"}, r"'of' of 'step' is 'secnd'; did you mean 'second'"),
        ({"twice": "word"}, "'twice' of 'step' is 'word', not true or false"),
        ({"length": "word"}, "'length' of 'step' is 'word', not a number"),
    ):
        with pytest.raises(modelsoup.ParameterError, match=sentence):
            made(**wrong)


@pytest.mark.usefixtures("own_methods")
def test_a_parameter_of_no_kind_is_refused(tmp_path: Path) -> None:
    @modelsoup.method("odd")
    def odd(x: Tensor, where: Path = Path()) -> Any:
        return modelsoup.WeightedSum([1, 0])

    with pytest.raises(modelsoup.ParameterError, match="'where' of the method 'odd' is of no kind"):
        merged_one(tmp_path, [A, B], method="odd")


@pytest.mark.usefixtures("own_methods")
def test_a_whole_method_sees_tensors_in_their_shape(tmp_path: Path) -> None:
    @modelsoup.method("svd", base=True, models=(1, None))
    def svd(x: Tensor, rank: int = modelsoup.parameter(1, low=1, doc="how many are kept")) -> Any:
        def merged(arrays: Sequence[np.ndarray]) -> np.ndarray:
            mean = sum(values - arrays[0] for values in arrays[1:]) / x.dtype.type(x.count)
            u, s, v = np.linalg.svd(mean, full_matrices=False)
            made: np.ndarray = arrays[0] + (u[:, :rank] * s[:rank]) @ v[:rank]
            return made

        if len(x.shape) == 2:
            return modelsoup.Whole(merged)
        return modelsoup.WeightedSum([1 / x.count] * x.count, of_deltas=True)

    generator = np.random.default_rng(0)

    def model() -> dict[str, np.ndarray]:
        return {
            "matrix": generator.normal(size=(300, 400)).astype(np.float32),
            "narrow": generator.normal(size=(30, 20)).astype(ml_dtypes.bfloat16),
            "bias": generator.normal(size=7).astype(np.float32),
            "scale": np.asarray(generator.normal(), np.float32),
        }

    base, a, b = model(), model(), model()
    results = merged(tmp_path, [a, b], base=base, method="svd", parameters={"rank": 3})
    delta = results["matrix"].astype(np.float64) - base["matrix"]
    singular = np.linalg.svd(delta, compute_uv=False)
    full = np.linalg.svd((a["matrix"] + b["matrix"]) / 2 - base["matrix"], compute_uv=False)
    np.testing.assert_allclose(singular[:3], full[:3], rtol=1e-5)
    assert np.all(singular[3:] < 1e-4)
    for name in ("bias", "scale"):
        np.testing.assert_allclose(results[name], (a[name] + b[name]) / 2, rtol=0, atol=1e-6)
        assert results[name].shape == base[name].shape
    assert results["narrow"].dtype == ml_dtypes.bfloat16


@pytest.mark.usefixtures("own_methods")
def test_a_whole_method_that_changes_the_shape_is_refused(tmp_path: Path) -> None:
    @modelsoup.method("transpose")
    def transpose(x: Tensor) -> Any:
        return modelsoup.Whole(lambda arrays: arrays[0].T)

    tensor = np.ones((2, 3), np.float32)
    sentence = r"'transpose' made weight with the shape \[3, 2\], not \[2, 3\]"
    with pytest.raises(modelsoup.ParameterError, match=sentence):
        merged_one(tmp_path, [tensor, tensor], method="transpose")
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize("shape", [(3, 5), (700, 300), (2, 100_000), (5, 3, 1000), (77,), ()])
def test_a_method_of_rows_gets_whole_rows_however_they_are_sliced(
    shape: tuple[int, ...], folder: Path
) -> None:
    @modelsoup.method("by_row", models=(1, None))
    def by_row(x: Tensor) -> Any:
        """Each row over the largest mean of a row that there is, less its own mean."""
        (largest,) = yield [Largest(lambda b: b.model(0).mean(-1, keepdims=True) + 0 * b.model(0),
                                    1, rows=True)]  # fmt: skip
        return modelsoup.Rows(
            lambda b: b.model(0) / largest.threshold - b.model(0).mean(-1, keepdims=True)
        )

    x = np.asarray(1 + np.random.default_rng(1).random(shape))
    rows = x.reshape(-1, shape[-1] if shape else 1)
    means = rows.mean(-1, keepdims=True)
    expected = (rows / np.abs(means).max() - means).reshape(shape)
    made = {
        merged_in_slices(
            folder, [{"weight": x}, {"weight": x}], workers=workers, slice_elements=elements,
            method="by_row",
        )
        for workers, elements in ((1, BLOCK), (2, 3 * BLOCK), (3, 16 * BLOCK))
    }  # fmt: skip
    assert len(made) == 1
    found = load(folder / "merged.safetensors")["weight"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.array_equal(modelsoup.merge_arrays("by_row", [x]), found)


@pytest.mark.usefixtures("own_methods")
def test_a_rule_can_name_a_registered_method_and_its_parameters(tmp_path: Path) -> None:
    @modelsoup.method("furthest")
    def furthest(x: Tensor, t: float = modelsoup.parameter(low=0)) -> Any:
        def merged(b: Block) -> np.ndarray:
            first, second = b.model(0), b.model(1)
            return np.where(np.abs(first) > np.abs(second), first, second) * t

        return merged

    results = merged(
        tmp_path, [{"head.w": A, "body.w": A}, {"head.w": B, "body.w": B}],
        layers=["head.*=furthest;t:2", "*=0.5"],
    )  # fmt: skip
    assert np.array_equal(results["head.w"], [3, 4, 8])
    assert np.array_equal(results["body.w"], (A + B) / 2)


@pytest.mark.usefixtures("own_methods")
def test_coefficients_may_be_an_array(tmp_path: Path) -> None:
    @modelsoup.method("halves")
    def halves(x: Tensor) -> Any:
        return modelsoup.WeightedSum(np.array([0.5, 0.5]))

    made = merged(tmp_path, [{"a": A, "b": B}, {"a": B, "b": A}], method="halves")
    assert np.array_equal(made["a"], (A + B) / 2)
    assert np.array_equal(made["b"], (A + B) / 2)


@pytest.mark.usefixtures("own_methods")
def test_a_reduction_that_is_in_no_list_is_refused(tmp_path: Path) -> None:
    @modelsoup.method("alone")
    def alone(x: Tensor) -> Any:
        yield Gram()
        return modelsoup.WeightedSum([0.5, 0.5])

    with pytest.raises(modelsoup.ParameterError, match="'alone' yields Gram for weight, and no li"):
        merged_one(tmp_path, [A, B], method="alone")


def test_a_module_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_method.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    sentence = r"the method 'broken_method:mix' \(broken_method:mix\) failed: division by zero"
    with pytest.raises(modelsoup.ParameterError, match=sentence):
        merged_one(tmp_path, [A, B], method="broken_method:mix")


def test_parameters_that_no_rule_has_a_use_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(modelsoup.ParameterError, match="density has no use: every rule that"):
        merged_one(tmp_path, [A, B], parameters={"density": 0.2}, layers=["w*=slerp;t:0.5"])


def test_a_gradient_needs_layers(tmp_path: Path) -> None:
    with pytest.raises(modelsoup.ParameterError, match="'t' goes along the depth, but no tensor"):
        merged_one(tmp_path, [A, B], method="slerp", parameters={"t": {"*": {"gradient": [0, 1]}}})


def test_patterns_of_parameters_are_those_of_rules(tmp_path: Path) -> None:
    models = [{"a.w": A, "b.w": A, "c.w": A}, {"a.w": B, "b.w": B, "c.w": B}]
    t = {"re:a\\..*": 0.25, "group:others": 0.5, "*": 1.0}
    made = merged(tmp_path, models, method="slerp", parameters={"t": t}, groups={"others": ["b.*"]})
    for name, share in (("a.w", 0.25), ("b.w", 0.5), ("c.w", 1.0)):
        one = merged_one(tmp_path, [A, B], method="slerp", parameters={"t": share})
        assert np.array_equal(made[name], one), name
    plan = modelsoup.plan_merge(
        [modelsoup.open_checkpoint(p) for p in save(tmp_path, models, None)["models"]],
        modelsoup.Recipe(method="slerp", parameters={"t": {"z.*": 0.1, "*": 0.2}}),
    )
    (notice,) = [notice for notice in plan.notices if notice.kind == "parameters"]
    assert notice.message == "the pattern 'z.*' of parameter 't' matches no tensor"
    assert notice.level == "warning"


LAYERS = {f"model.layers.{n}.{part}": A for n in range(5) for part in ("attn.w", "mlp.w")}


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        ({"gradient": [0, 1]}, lambda n, part: n / 4),
        ({"gradient": [1, 0, 1]}, lambda n, part: abs(n - 2) / 2),
        (
            {"*attn*": {"gradient": [0, 0.5]}, "*": 0.25},
            lambda n, part: n / 8 if "attn" in part else 0.25,
        ),
        ({"*.3.*": 1, "*": 0}, lambda n, part: float(n == 3)),
    ],
)  # fmt: skip
def test_a_parameter_varies_along_the_depth_and_by_names(
    t: Any, expected: Callable[[int, str], float], tmp_path: Path
) -> None:
    first = {**LAYERS, "embed.w": A}
    second = dict.fromkeys(first, B)
    made = merged(tmp_path, [first, second], method="slerp", parameters={"t": t})
    for name, values in made.items():
        _, _, number, *part = name.split(".") if "layers" in name else ("", "", "0", "embed")
        share = expected(int(number), ".".join(part))
        one = merged(tmp_path, [{"w": A}, {"w": B}], method="slerp", parameters={"t": share})
        assert np.array_equal(values, one["w"]), name


def test_weights_may_vary_by_model(tmp_path: Path) -> None:
    weight = [1.0, {"gradient": [0, 1]}]
    made = merged(
        tmp_path, [LAYERS, dict.fromkeys(LAYERS, B)],
        parameters={"weight": weight, "normalize": False},
    )  # fmt: skip
    for n in range(5):
        expected = A + np.float32(n / 4) * B
        np.testing.assert_allclose(made[f"model.layers.{n}.mlp.w"], expected, rtol=1e-6)


def test_what_varies_is_in_the_lineage_as_it_is_written(tmp_path: Path) -> None:
    t = {"*attn*": {"gradient": [0, 0.5]}, "*": 0.25}
    merged(tmp_path, [LAYERS, LAYERS], method="slerp", parameters={"t": t})
    told = modelsoup.read_lineage(tmp_path / "merged.safetensors")
    assert told is not None
    assert told["parameters"] == {"t": t}
    again = modelsoup.Recipe(method="slerp", parameters=told["parameters"])
    assert again == modelsoup.Recipe(method="slerp", parameters={"t": t})


@pytest.mark.parametrize(
    ("t", "sentence"),
    [
        ({"gradient": [1]}, r"the gradient of parameter 't' is \[1\], not a list of at least two"),
        ({"gradient": [0.5, "word"]}, "the gradient of parameter 't' mixes numbers with others"),
        ({"*": {"*attn*": 1}}, "parameter 't' has a mapping in a mapping"),
        ({}, "no mapping from patterns"),
        ({"*attn*": 0.5}, "needs the parameter 't'"),
        ({"gradient": [0, 2]}, "'t' of 'slerp' is 1.5, but must be between 0 and 1"),
    ],
)
def test_a_value_that_varies_wrongly_is_told(t: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(modelsoup.SoupError, match=sentence):
        merged(tmp_path, [LAYERS, LAYERS], method="slerp", parameters={"t": t})


@pytest.mark.usefixtures("own_methods")
def test_a_name_that_another_module_took_is_refused() -> None:
    with pytest.raises(
        modelsoup.ParameterError,
        match=r"a method called 'slerp' exists already, in modelsoup\.merging\.methods\.spherical",
    ):
        modelsoup.method("slerp")(lambda x: x.model(0))


PLUGIN = """
import modelsoup

@modelsoup.method("blend", models=(2, 2))
def blend(x, share=modelsoup.parameter(0.5, low=0, high=1, doc="of the first model")):
    return modelsoup.WeightedSum((share, 1 - share))

number = 3
"""
ENTRY_POINTS = """
[modelsoup.methods]
blend = soup_blend:blend
number = soup_blend:number
absent = soup_blend:absent
broken = soup_no_such_module:broken
"""
USE_PLUGIN = """
import json, sys
import modelsoup

def refused(name):
    try:
        modelsoup.get_method(name)
    except modelsoup.ParameterError as error:
        return str(error)

a, b, output = sys.argv[1:]
said = {"names": modelsoup.method_names()}
modelsoup.merge([a, b], output, beta=0.5)
said["loaded by another merge"] = "soup_blend" in sys.modules
said["nearest"] = refused("blen")
said["loaded by a look at the names"] = "soup_blend" in sys.modules
modelsoup.merge([a, b], output, method="blend", parameters={"share": 0.25}, force=True)
said["loaded by its merge"] = "soup_blend" in sys.modules
said["refused"] = {name: refused(name) for name in ("number", "absent", "broken")}
print(json.dumps(said))
"""


def test_a_method_of_another_distribution_is_found_and_loaded_only_when_named(
    tmp_path: Path,
) -> None:
    site, data = tmp_path / "site", tmp_path / "data"
    information = site / "soup_blend-1.0.dist-info"
    information.mkdir(parents=True)
    data.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: soup-blend\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(textwrap.dedent(ENTRY_POINTS))
    (site / "soup_blend.py").write_text(PLUGIN)
    saved = save(data, [{"weight": A}, {"weight": B}], None)
    output = data / "merged.safetensors"
    run = subprocess.run(
        [sys.executable, "-c", USE_PLUGIN, *map(str, saved["models"]), str(output)],
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)

    assert {"blend", "linear", "number"} <= set(said["names"])
    assert "did you mean 'blend'" in said["nearest"]
    assert not said["loaded by another merge"]
    assert not said["loaded by a look at the names"]
    assert said["loaded by its merge"]
    assert np.array_equal(load(output)["weight"], 0.25 * A + 0.75 * B)
    assert said["refused"]["number"] == (
        "the method 'number' (soup_blend:number) is no modelsoup Method"
    )
    assert said["refused"]["absent"].startswith("the method 'absent' (soup_blend:absent) failed:")
    assert "No module named 'soup_no_such_module'" in said["refused"]["broken"]


def test_what_is_gathered_of_tensors_is_bounded_before_they_are_read(tmp_path: Path) -> None:
    """A bound that is kept: what several tensors gather at a time is held against it."""
    elements = 3 * BLOCK
    for name in "abc":
        save_file({"w": np.ones(elements, np.float32)}, tmp_path / f"{name}.safetensors")
    models = [modelsoup.open_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab"]
    base = modelsoup.open_checkpoint(tmp_path / "c.safetensors")

    def gathered(method: str, **parameters: Any) -> int:
        recipe = modelsoup.Recipe(method=method, parameters=parameters)
        needs_base = method in ("ties", "task_arithmetic")
        (step,) = modelsoup.plan_merge(models, recipe, base=base if needs_base else None).steps
        return int(step.state_bytes)

    assert gathered("linear") == 0
    assert gathered("ties", weight=1, density=1) == 0
    one = gathered("ties", weight=1, density=[0.5, 1])
    assert one >= 4 * elements  # where all magnitudes are equal, all may be the threshold
    assert gathered("ties", weight=1, density=[0.5, 0.2]) == 2 * one
    assert gathered("slerp", t=0.5) == 8 * 3 * 2**2  # the products of two models, a block


def test_tensors_that_are_read_more_than_once_are_read_in_groups_that_memory_holds() -> None:
    def job(nbytes: int, *, is_gathered: bool) -> Any:
        step = SimpleNamespace(state_bytes=0, elements=nbytes)
        streamed = [(None, SimpleNamespace(nbytes=nbytes))] * 2
        return SimpleNamespace(step=step, streamed=streamed, is_gathered=is_gathered)

    half = GROUP // 4  # of each of two models
    jobs = [job(half, is_gathered=True) for _ in range(5)]
    assert [len(group) for group in groups(jobs)] == [2, 2, 1]
    jobs = [job(half, is_gathered=False) for _ in range(5)]
    assert [len(group) for group in groups(jobs)] == [5]
    jobs = [job(64, is_gathered=True) for _ in range(2 * MOST + 1)]
    assert [len(group) for group in groups(jobs)] == [MOST, MOST, 1]


@pytest.mark.usefixtures("own_methods")
def test_a_method_that_yields_is_asked_once_for_tensors_that_are_alike(tmp_path: Path) -> None:
    asked = []

    @modelsoup.method("asked")
    def asks(x: Tensor) -> Any:
        asked.append(x.name)
        yield [Gram()]
        return modelsoup.WeightedSum([0.5, 0.5])

    shapes = {"a": (4,), "b": (4,), "c": (2, 2), "d": (4,), "e": (2, 2)}
    for number in (1, 2):
        tensors = {name: np.full(shape, number, np.float32) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    models = [modelsoup.open_checkpoint(tmp_path / f"{n}.safetensors") for n in (1, 2)]
    plan = modelsoup.plan_merge(models, modelsoup.Recipe(method="asked"))
    assert asked == ["a", "c"]
    assert [step.passes for step in plan.steps] == [2] * 5
    modelsoup.merge(models, tmp_path / "out.safetensors", method="asked")
    assert sorted(asked) == sorted(["a", "c"] * 2 + [*shapes])
    assert all((load(tmp_path / "out.safetensors")[name] == 1.5).all() for name in shapes)


@pytest.mark.parametrize("workers", [1, 3])
def test_small_tensors_that_lie_side_by_side_are_read_at_once(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    models: list[Tensors] = [
        {f"{n:03}.w": rng.normal(size=1 + n % 31).astype(np.float32) for n in range(500)}
        for _ in "ab"
    ]
    for name, tensors in zip("ab", models, strict=True):
        save_file(dict(tensors), tmp_path / f"{name}.safetensors")
    reads, read = [], FileReader.read

    def counted(self: FileReader, buffer: memoryview, offset: int) -> None:
        reads.append(len(buffer))
        read(self, buffer, offset)

    monkeypatch.setattr(FileReader, "read", counted)
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    modelsoup.merge(
        paths, tmp_path / "out.safetensors", method="slerp", parameters={"t": 0.3}, workers=workers
    )
    assert len(reads) == 4  # of two files, once for the products and once for the merge
    made = load(tmp_path / "out.safetensors")
    for name, values in made.items():
        alone = modelsoup.merge_arrays("slerp", [tensors[name] for tensors in models], t=0.3)
        assert values.tobytes() == alone.tobytes(), name


# What stands in for slower calls of numpy is the same to the bit.


@pytest.mark.parametrize("dtype", [bool, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_either_is_where(dtype: type, share: float) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (2, 7, 130)) if dtype is bool else rng.standard_normal((2, 7, 130))
    values, others = bits.astype(dtype)
    if dtype is not bool:
        values[0, :4], others[1, :4] = [np.nan, np.inf, -np.inf, -0.0], [-np.inf, -0.0, np.nan, 0]
    mask = rng.random((7, 130)) < share
    found = either(mask, values, others)
    assert found.dtype == values.dtype
    assert found.tobytes() == np.where(mask, values, others).tobytes()


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.04, 0.2, 1])
@pytest.mark.parametrize("size", [1, 7, 8, 5000])
def test_places_are_those_where_a_mask_is_true(share: float, size: int) -> None:
    mask = np.random.default_rng(1).random(size) < share
    padded = np.concatenate([mask, np.zeros(size // 8, bool)])
    assert _places(padded, size).tolist() == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("row", [3, 511, 512, 700, 8191, 8192, 9000])
def test_a_softmax_of_rows_has_the_bits_of_one_in_a_line_and_leaves_numpy_as_it_was(
    row: int,
) -> None:
    several = np.random.default_rng(row).standard_normal((2, 5, row)).astype(np.float32)
    before = np.getbufsize()
    found = softmax(list(several))
    assert np.getbufsize() == before
    apart = several - several.max(axis=-1, keepdims=True).astype(np.float64)
    wide = np.exp(apart)
    assert found.tobytes() == (wide / wide.sum(axis=-1, keepdims=True)).tobytes()
