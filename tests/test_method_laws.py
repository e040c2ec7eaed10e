"""Laws that merge methods obey, and their formulas evaluated directly in float64.

`test_methods` has the same for those of the first hour, and mergekit's results for all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup.errors import ParameterError
from modelsoup.files.writer import layout
from modelsoup.merging import kept as kept_values
from modelsoup.merging import merge as merging
from modelsoup.merging.forms import BLOCK, Rows, Tensor, blocks_of
from modelsoup.merging.in_memory import carried_out, merge_arrays
from modelsoup.merging.kept import Norms
from modelsoup.merging.methods import get_method, registry
from modelsoup.merging.methods.listing import cost
from modelsoup.merging.reductions import EachRow
from modelsoup.merging.thresholds import FEW, PART, Largest, Ranked, sampled

Formula = Callable[[np.ndarray, list[np.ndarray], dict[str, Any]], np.ndarray]
WEIGHT = (0.5317, 0.2939, 0.4523)


@dataclass(frozen=True)
class Law:
    """A method with parameters, and what holds for it.

    Attributes:
        method: its name.
        formula: of the base, the models and the parameters, in float64.
        parameters: of three models, or as many as it merges.
        count: how many models.
        base: whether it has one.
        same: whether copies of one model are that model.
        ordered: whether the models' order matters, other than that of their parameters.
        scaling: parameters that grow with the values; None where no law of scale holds.
    """

    method: str
    formula: Formula
    parameters: Mapping[str, Any] = field(default_factory=dict)
    count: int = 3
    base: bool = True
    same: bool = True
    ordered: bool = False
    scaling: tuple[str, ...] | None = ()


def dot(a: np.ndarray, b: np.ndarray, axis: int | None = None) -> Any:
    return (a * b).sum(axis=axis, keepdims=axis is not None)


def arc(a: np.ndarray, b: np.ndarray, t: float, axis: int | None) -> np.ndarray:
    """Two vectors along an axis, none of them zero, interpolated on the sphere.

    In a straight line where sin² θ is one that float32 does not tell from 0, as in mergekit.
    """
    cosine = dot(a, b, axis) / np.sqrt(dot(a, a, axis) * dot(b, b, axis))
    angle = np.arccos(np.clip(cosine, -1, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        made = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return np.where(1 - cosine**2 < 2.0**-24, (1 - t) * a + t * b, made)


def nuslerp(base: np.ndarray, x: list[np.ndarray], p: dict[str, Any], axis: int | None) -> Any:
    t = p["weight"][1] / sum(p["weight"])
    return base + arc(x[0] - base, x[1] - base, t, axis)


def multislerp(_: np.ndarray, x: list[np.ndarray], p: dict[str, Any]) -> np.ndarray:
    """The exponential of the weighted mean of logarithms without their factor θ/sin θ."""
    w = np.array(p["weight"]) / sum(p["weight"])
    norms = [math.sqrt(dot(v, v)) for v in x]
    unit = [v / n for v, n in zip(x, norms, strict=True)]
    mean = sum(k * u for k, u in zip(w, unit, strict=True))
    mean = mean / math.sqrt(dot(mean, mean))
    tangent = sum(k * (u - dot(u, mean) * mean) for k, u in zip(w, unit, strict=True))
    length = math.sqrt(dot(tangent, tangent))
    assert length < 1e-12
    return mean * float(w @ norms)


def karcher(_: np.ndarray, x: list[np.ndarray], p: dict[str, Any]) -> np.ndarray:
    norms = [math.sqrt(dot(v, v)) for v in x]
    unit = [v / n for v, n in zip(x, norms, strict=True)]
    mean = sum(unit) / math.sqrt(dot(sum(unit), sum(unit)))
    for _ in range(p["max_iter"]):
        angles = [math.acos(dot(u, mean)) for u in unit]
        tangent = sum(
            a / math.sin(a) * (u - math.cos(a) * mean) for a, u in zip(angles, unit, strict=True)
        ) / len(x)  # fmt: skip
        step = math.sqrt(dot(tangent, tangent))
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
    return np.asarray(mean * sum(norms) / len(x))


def model_stock(
    base: np.ndarray, x: list[np.ndarray], _: dict[str, Any], axis: int | None = None
) -> np.ndarray:
    d = [v - base for v in x]
    pairs = [(i, j) for i in range(len(d)) for j in range(i)]
    cosine = sum(
        dot(d[i], d[j], axis) / np.sqrt(dot(d[i], d[i], axis) * dot(d[j], d[j], axis))
        for i, j in pairs
    ) / len(pairs)  # fmt: skip
    t = len(x) * cosine / (1 + (len(x) - 1) * cosine)
    return np.asarray(t * sum(x) / len(x) + (1 - t) * base)


def without_outliers(d: np.ndarray, density: float, gamma: float) -> np.ndarray:
    if density == 1:
        return d
    kept, above = int(density * d.size), int(gamma * d.size)
    order = np.argsort(-np.abs(d).reshape(-1), kind="stable")[above : above + kept]
    thin = np.zeros(d.size)
    thin[order] = d.reshape(-1)[order]
    return thin.reshape(d.shape)


def crumbs(base: np.ndarray, x: list[np.ndarray], p: dict[str, Any]) -> list[np.ndarray]:
    found = []
    for v, density, gamma in zip(x, p["density"], p["gamma"], strict=True):
        thin = without_outliers(v - base, density, gamma)
        if p.get("rescale"):
            thin = thin * np.abs(v - base).sum() / np.abs(thin).sum()
        found.append(thin)
    return found


def summed(base: np.ndarray, d: list[np.ndarray], p: dict[str, Any]) -> np.ndarray:
    return np.asarray(base + sum(w * v for w, v in zip(p["weight"], d, strict=True)))


def agreed(base: np.ndarray, d: list[np.ndarray], p: dict[str, Any]) -> np.ndarray:
    weighted = np.array([w * v for w, v in zip(p["weight"], d, strict=True)])
    sign = np.where(weighted.sum(axis=0) < 0, -1, 1)
    agrees = np.sign(weighted) == sign
    total = (weighted * agrees).sum(axis=0)
    if p["normalize"]:
        divisor = np.tensordot(p["weight"], agrees, 1)
        total = total / np.where(divisor == 0, 1, divisor)
    return np.asarray(base + total)


def sce(base: np.ndarray, x: list[np.ndarray], p: dict[str, Any]) -> np.ndarray:
    d = np.array(x) - base
    variance = d.var(axis=0)
    count = int(p["select_topk"] * np.count_nonzero(variance))
    chosen = np.zeros(base.size)
    chosen[np.argsort(-variance.reshape(-1), kind="stable")[:count]] = 1
    if p["select_topk"] < 1:
        d = d * chosen.reshape(base.shape)
    energy = np.array([(v * v).mean() for v in d])
    agrees = np.sign(d) == np.where(d.sum(axis=0) < 0, -1, 1)
    w = energy / energy.sum()
    total, divisor = ((w * np.moveaxis(v, 0, -1)).sum(axis=-1) for v in (d * agrees, agrees))
    return np.asarray(base + total / np.maximum(divisor, 1e-6))


def ram(base: np.ndarray, x: list[np.ndarray], p: dict[str, Any]) -> np.ndarray:
    d = np.array(x) - base
    changed = np.abs(d) > p["epsilon"]
    return np.asarray(base + (d * changed).sum(axis=0) / np.maximum(changed.sum(axis=0), 1))


def ramplus(base: np.ndarray, x: list[np.ndarray], p: dict[str, Any]) -> np.ndarray:
    d = np.array(x) - base
    changed = np.abs(d) > p["epsilon"]
    several = changed.sum(axis=0) > 1
    made = np.where(several, ram(base, x, p) - base, 0)
    for v, own in zip(d, changed, strict=True):
        alone = own & ~several
        share = min((own & several).sum() / max(alone.sum(), 1), p["alpha"])
        made = made + v * alone * (1 + p["r"] * share)
    return np.asarray(base + made)


def nearswap(_: np.ndarray, x: list[np.ndarray], p: dict[str, Any]) -> np.ndarray:
    share = np.clip(p["t"] / np.maximum(np.abs(x[0] - x[1]), 1e-6), 0, 1)
    return np.asarray(share * x[1] + (1 - share) * x[0])


def arcee_fusion(_: np.ndarray, x: list[np.ndarray], p: dict[str, Any]) -> np.ndarray:
    first, second = (np.exp(v) / np.exp(v).sum(axis=-1, keepdims=True) + 1e-8 for v in x)
    divergence = (second * np.log(second / first)).sum(axis=-1, keepdims=True)
    importance = np.abs(x[1] - x[0]) * divergence
    lower, median, upper = (
        np.sort(importance, axis=None)[int((importance.size - 1) * q)] for q in (0.25, 0.5, 0.75)
    )
    return np.where(importance >= median + 1.5 * (upper - lower), x[1], x[0])


THINNED = {"weight": WEIGHT, "density": (0.5, 0.61, 1.0), "gamma": (0.2, 0.01, 0.3)}
LAWS = {
    "nuslerp": Law("nuslerp", lambda b, x, p: nuslerp(b, x, p, None), {"weight": (0.3, 0.9)}, 2),
    "nuslerp rows": Law(
        "nuslerp", lambda b, x, p: nuslerp(b, x, p, -1),
        {"weight": (0.3, 0.9), "nuslerp_flatten": False}, 2,
    ),
    "nuslerp columns": Law(
        "nuslerp", lambda b, x, p: nuslerp(b, x, p, 0),
        {"weight": (0.3, 0.9), "nuslerp_flatten": False, "nuslerp_row_wise": True}, 2,
    ),
    "multislerp": Law("multislerp", multislerp, {"weight": WEIGHT, "eps": 0}, base=False),
    "karcher": Law("karcher", karcher, {"max_iter": 3, "tol": 0}, base=False),
    "model_stock": Law("model_stock", model_stock),
    "model_stock rows": Law(
        "model_stock", lambda b, x, p: model_stock(b, x, p, -1), {"filter_wise": True}
    ),
    "breadcrumbs": Law(
        "breadcrumbs", lambda b, x, p: summed(b, crumbs(b, x, p), p),
        {**THINNED, "rescale": True}, same=False,
    ),
    "breadcrumbs_ties": Law(
        "breadcrumbs_ties", lambda b, x, p: agreed(b, crumbs(b, x, p), p),
        {**THINNED, "normalize": True}, same=False,
    ),
    "della": Law(
        "della", lambda b, x, p: agreed(b, [v - b for v in x], {**p, "normalize": True}),
        {"weight": WEIGHT},
    ),
    "della_linear": Law(
        "della_linear", lambda b, x, p: summed(b, [v - b for v in x], p),
        {"weight": WEIGHT}, same=False,
    ),
    "sce": Law("sce", sce, {"select_topk": 1.0}),
    "sce selected": Law("sce", sce, {"select_topk": 0.43}, same=False),
    "ram": Law("ram", ram, {"epsilon": 0.7}, same=False, scaling=("epsilon",)),
    "ramplus_tl": Law(
        "ramplus_tl", ramplus, {"epsilon": 1.0, "r": 0.5, "alpha": 0.8}, same=False,
        scaling=("epsilon",),
    ),
    "nearswap": Law(
        "nearswap", nearswap, {"t": 0.4}, 2, base=False, ordered=True, scaling=("t",)
    ),
    "arcee_fusion": Law(
        "arcee_fusion", arcee_fusion, {}, 2, base=False, ordered=True, scaling=None
    ),
    "passthrough": Law(
        "passthrough", lambda _, x, p: p["scale"] * x[0], {"scale": 0.7}, 1, base=False, same=False
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", LAWS)
TASK_VECTORS = [name for name, law in LAWS.items() if law.base]

SHAPES = st.sampled_from([(5,), (31,), (7, 6), (64, 33), (3, 4, 5), (2, 3, 4, 5), (130, 70)])
SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=15, deadline=None)


def drawn(law: Law, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base and models about it, in float64."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=shape)
    common = generator.normal(size=shape)
    return base, [base + common + generator.normal(size=shape) for _ in range(law.count)]


def made(
    law: Law, base: np.ndarray, models: list[np.ndarray], dtype: type = np.float64, **changed: Any
) -> np.ndarray:
    return merge_arrays(
        law.method, [v.astype(dtype) for v in models],
        base=base.astype(dtype) if law.base else None, **{**law.parameters, **changed},
    )  # fmt: skip


def close(found: np.ndarray, expected: np.ndarray, within: float) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=within * scale)


@EVERY
@QUICK
@given(shape=SHAPES, seed=SEEDS)
def test_a_method_is_its_formula(name: str, shape: tuple[int, ...], seed: int) -> None:
    law = LAWS[name]
    base, models = drawn(law, shape, seed)
    expected = law.formula(base, models, dict(law.parameters))
    # Between vectors that are nearly alike or opposite any rounding becomes as large as one likes.
    nearly = [v * (1 + 1e-15 * np.sin(np.arange(v.size)).reshape(v.shape)) for v in (base, *models)]
    moved = law.formula(nearly[0], nearly[1:], dict(law.parameters))
    assume(np.abs(moved - expected).max(initial=0) <= 1e-12 * np.abs(expected).max(initial=1))
    close(made(law, base, models), expected, 1e-10)


@pytest.mark.parametrize("name", sorted(LAWS.keys() - {"breadcrumbs", "breadcrumbs_ties"}))
def test_float32_is_the_formula_but_for_rounding(name: str) -> None:
    law = LAWS[name]
    base, models = drawn(law, (64, 33), 3)
    base, models = (v.astype(np.float32).astype(np.float64) for v in (base, np.array(models)))
    found = made(law, base, list(models), np.float32)
    assert found.dtype == np.float32
    close(found, law.formula(base, list(models), dict(law.parameters)), 2e-6)


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.same])
@QUICK
@given(shape=SHAPES, seed=SEEDS)
def test_copies_of_a_model_are_that_model(name: str, shape: tuple[int, ...], seed: int) -> None:
    law = LAWS[name]
    base, (model, *_) = drawn(law, shape, seed)
    close(made(law, base, [model] * law.count, np.float32), model.astype(np.float32), 5e-7)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("karcher", {}), ("multislerp", {"weight": 3}), ("passthrough", {}),
        ("breadcrumbs", {"weight": 1}), ("breadcrumbs_ties", {"weight": 1}),
        ("della", {"weight": 2}), ("della_linear", {"weight": 1}), ("ram", {"epsilon": 0}),
        ("ramplus_tl", {"epsilon": 0}),
    ],
)  # fmt: skip
@QUICK
@given(shape=SHAPES, seed=SEEDS)
def test_one_model_alone_is_itself(
    method: str, parameters: dict[str, Any], shape: tuple[int, ...], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    base, model = (generator.normal(size=shape).astype(np.float32) for _ in range(2))
    with_base = get_method(method).base is True
    found = merge_arrays(method, [model], base=base if with_base else None, **parameters)
    close(found, model, 5e-7 if with_base else 0)


def test_one_model_with_a_base_is_copied_by_multislerp_bit_for_bit() -> None:
    base, model = (np.random.default_rng(k).normal(size=9).astype(np.float32) for k in (1, 2))
    assert np.array_equal(merge_arrays("multislerp", [model], base=base, weight=1), model)


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if not law.ordered])
@QUICK
@given(shape=SHAPES, seed=SEEDS)
def test_models_may_change_places_with_their_parameters(
    name: str, shape: tuple[int, ...], seed: int
) -> None:
    law = LAWS[name]
    base, models = drawn(law, shape, seed)
    own = {k: v[::-1] for k, v in law.parameters.items() if isinstance(v, tuple)}
    close(made(law, base, models[::-1], **own), made(law, base, models), 1e-12)


@pytest.mark.parametrize("name", TASK_VECTORS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_models_equal_to_the_base_leave_it_as_it_is(name: str, dtype: type) -> None:
    law = LAWS[name]
    base, _ = drawn(law, (64, 33), 5)
    found = made(law, base, [base] * law.count, dtype)
    assert np.array_equal(found, base.astype(dtype))


@EVERY
def test_zero_tensors_are_merged_to_zero(name: str) -> None:
    law, zero = LAWS[name], np.zeros((4, 5))
    assert np.array_equal(made(law, zero, [zero] * law.count, np.float32), zero)


@EVERY
def test_a_single_model_that_differs_from_the_base_gives_no_nan(name: str) -> None:
    law = LAWS[name]
    base, (model, *_) = drawn(law, (64, 33), 6)
    for place in range(law.count):
        models = [model if k == place else base for k in range(law.count)]
        assert np.isfinite(made(law, base, models, np.float32)).all()


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.scaling is not None])
@QUICK
@given(shape=SHAPES, seed=SEEDS, exponent=st.integers(-4, 8))
def test_a_method_knows_no_unit(
    name: str, shape: tuple[int, ...], seed: int, exponent: int
) -> None:
    law = LAWS[name]
    base, models = drawn(law, shape, seed)
    factor = 2.0**exponent
    own = {parameter: law.parameters[parameter] * factor for parameter in law.scaling or ()}
    found = made(law, base * factor, [v * factor for v in models], **own)
    close(found, made(law, base, models) * factor, 1e-12)


@EVERY
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (), (1,), (9, 1), (1, 1, 1)])
def test_tensors_of_any_shape_are_merged(name: str, shape: tuple[int, ...]) -> None:
    law = LAWS[name]
    base, models = drawn(law, shape, 7)
    found = made(law, base, models, np.float32)
    assert found.shape == shape
    assert np.isfinite(found).all()


# --- through files --------------------------------------------------------------------------------

# Rows longer than a block, several blocks, a block and one element, rows of one.
SIZES = {
    "long": (2, BLOCK + 77), "matrix": (301, 703), "vector": (3 * BLOCK + 1,),
    "kernel": (7, 5, 3, 3), "column": (1001, 1), "scalar": (), "one": (1,), "empty": (0, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and three models, in float32."""
    folder = tmp_path_factory.mktemp("laws")
    models: dict[str, dict[str, np.ndarray]] = {"base": {}, "0": {}, "1": {}, "2": {}}
    for seed, (name, shape) in enumerate(SIZES.items()):
        base, others = drawn(LAWS["karcher"], shape, seed)
        for model, values in zip(models, [base, *others], strict=True):
            models[model][name] = np.asarray(values, np.float32)
    for model, tensors in models.items():
        save_file(tensors, folder / f"{model}.safetensors")
    return folder


RANDOM = {
    "della drawn": Law(
        "della", agreed, {"weight": WEIGHT, "density": (0.6, 1.0, 0.4), "epsilon": (0.2, 0.1, 0.0)}
    ),
    "della_linear drawn": Law(
        "della_linear", summed, {"weight": WEIGHT, "density": 0.5, "epsilon": 0.3}
    ),
}
FILES = {**LAWS, **RANDOM}


def written(folder: Path, law: Law, *, workers: int, slice_elements: int) -> bytes:
    """The bytes of a merge of the stored models."""
    parameters = {k: list(v) if isinstance(v, tuple) else v for k, v in law.parameters.items()}
    plan = modelsoup.plan_merge(
        [modelsoup.open_checkpoint(folder / f"{k}.safetensors") for k in range(law.count)],
        modelsoup.Recipe(method=law.method, parameters=parameters, seed=3),
        base=modelsoup.open_checkpoint(folder / "base.safetensors") if law.base else None,
    )
    output = folder / "merged.safetensors"
    tensors = [modelsoup.OutputTensor(step.name, step.dtype, step.shape) for step in plan.steps]
    merging._execute(
        plan, output, layout(tensors, file_name=output.name, shard_size=None), workers=workers,
        force=True, sha256=False, fsync=False, progress=None, slice_elements=slice_elements,
    )  # fmt: skip
    return output.read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_no_byte_depends_on_workers_slices_or_compiled_loops(
    name: str, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = FILES[name]
    monkeypatch.setenv("MODELSOUP_FAST", "0")
    first = written(stored, law, workers=1, slice_elements=BLOCK)
    assert written(stored, law, workers=3, slice_elements=5 * BLOCK) == first
    monkeypatch.setenv("MODELSOUP_FAST", "1")
    assert written(stored, law, workers=2, slice_elements=2 * BLOCK) == first
    merged = load_file(stored / "merged.safetensors")
    inputs = [load_file(stored / f"{k}.safetensors") for k in range(law.count)]
    bases = load_file(stored / "base.safetensors")
    for tensor in SIZES:
        expected = merge_arrays(
            law.method, [model[tensor] for model in inputs],
            base=bases[tensor] if law.base else None, name=tensor, seed=3, **law.parameters,
        )  # fmt: skip
        assert merged[tensor].tobytes() == expected.tobytes(), tensor


# --- what single methods promise ------------------------------------------------------------------


def test_vectors_whose_directions_cancel_out_are_merged_on_the_straight_line() -> None:
    model = np.arange(1, 9, dtype=np.float32)
    found = merge_arrays("multislerp", [model, -model], weight=1)
    assert np.array_equal(found, np.zeros(8))
    found = merge_arrays("nuslerp", [model, -model], weight=(1, 3))
    np.testing.assert_allclose(found, -0.5 * model, rtol=1e-6)


def test_karcher_of_opposite_models_is_the_first_at_their_mean_length() -> None:
    model = np.arange(1, 9, dtype=np.float32)
    np.testing.assert_allclose(merge_arrays("karcher", [model, -3 * model]), 2 * model, rtol=1e-6)


def test_karcher_takes_a_zero_model_into_the_length_and_not_into_the_direction() -> None:
    model = np.arange(1, 9, dtype=np.float32)
    found = merge_arrays("karcher", [model, np.zeros(8, np.float32)])
    np.testing.assert_allclose(found, model / 2, rtol=1e-6)


def test_karcher_lies_as_far_from_one_model_as_from_the_other() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 50))
    found = merge_arrays("karcher", [a, 5 * b])
    cosines = [dot(found, v) / math.sqrt(dot(found, found) * dot(v, v)) for v in (a, b)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-9)


def test_nuslerp_goes_half_way_where_its_weights_sum_to_zero() -> None:
    a, b = np.random.default_rng(2).normal(size=(2, 50))
    found = merge_arrays("nuslerp", [a, b], weight=(0.3, -0.3))
    np.testing.assert_allclose(found, arc(a, b, 0.5, None))


def test_model_stock_is_the_base_where_task_vectors_are_at_right_angles_or_cancel_out() -> None:
    base = np.random.default_rng(3).normal(size=6)
    one, other = np.eye(6)[:2]
    assert np.array_equal(merge_arrays("model_stock", [base + one, base + other], base=base), base)
    zero = np.zeros(6)
    assert np.array_equal(merge_arrays("model_stock", [one, -one], base=zero), zero)


@pytest.mark.parametrize("elements", [100, FEW + 1001])
def test_breadcrumbs_keeps_exactly_as_many_as_density_says_below_the_outliers(
    elements: int,
) -> None:
    model = np.random.default_rng(4).permutation(elements).astype(np.float32) + 1
    zero = np.zeros_like(model)
    found = merge_arrays("breadcrumbs", [model], base=zero, weight=1, density=0.25, gamma=0.1)
    above, kept = elements // 10, elements // 4
    expected = np.arange(elements - above - kept + 1, elements - above + 1)
    assert np.array_equal(np.sort(found[found != 0]), expected)


def test_breadcrumbs_drops_the_first_of_equal_outliers() -> None:
    found = merge_arrays(
        "breadcrumbs", [np.ones(10)], base=np.zeros(10), weight=1, density=0.5, gamma=0.3
    )
    assert found.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]


def shares_kept(method: str, model: np.ndarray, **parameters: Any) -> np.ndarray:
    """Which elements are kept of a task vector."""
    kept = merge_arrays(
        method, [model], base=np.zeros_like(model), name="w", seed=9, weight=1, rescale=False,
        **parameters,
    )  # fmt: skip
    return np.asarray(kept != 0)


def test_della_keeps_an_element_with_the_probability_of_its_rank() -> None:
    rows, length = 20_000, 9
    generator = np.random.default_rng(5)
    ranks = np.array([generator.permutation(length) for _ in range(rows)])
    signs = generator.choice([-1, 1], size=ranks.shape)
    kept = shares_kept(
        "della_linear", ((ranks + 1) * signs).astype(np.float32), density=0.5, epsilon=0.2
    )
    for rank in range(length):
        probability = 0.3 + 0.4 * rank / (length - 1)
        found = kept[ranks == rank].mean()
        assert abs(found - probability) < 5 * math.sqrt(probability * (1 - probability) / rows)


@pytest.mark.parametrize("length", [1, 2, 50])
def test_della_keeps_equal_magnitudes_with_the_probability_density(length: int) -> None:
    model = np.ones((100_000 // length, length), np.float32)
    share = shares_kept("della", model, density=0.6, epsilon=0.3).mean()
    assert abs(share - 0.6) < 5 * math.sqrt(0.24 / model.size)


def test_della_without_epsilon_drops_what_dare_drops() -> None:
    model = np.random.default_rng(6).normal(size=(100, 70)).astype(np.float32)
    dare = shares_kept("dare_linear", model, density=0.3)
    assert np.array_equal(shares_kept("della_linear", model, density=0.3, epsilon=0), dare)


def test_della_restores_the_l1_norm() -> None:
    model = np.random.default_rng(7).normal(size=(300, 70)).astype(np.float32)
    found = merge_arrays(
        "della", [model], base=np.zeros_like(model), weight=1, density=0.3, epsilon=0.1
    )
    assert 0.25 < np.mean(found != 0) < 0.4
    assert np.abs(found).sum(dtype=float) == pytest.approx(np.abs(model).sum(dtype=float), rel=1e-5)


def test_sce_that_selects_nothing_is_the_base() -> None:
    base, *models = np.random.default_rng(8).normal(size=(3, 40))
    assert np.array_equal(merge_arrays("sce", models, base=base, select_topk=0), base)


def test_sce_counts_only_elements_in_which_the_models_differ() -> None:
    base, first, second = np.zeros((3, 10))
    first[:] = 0.1  # both changed all, and differ in four
    second[:] = 0.1
    second[:4] = [2, 3, 4, 5]
    found = merge_arrays("sce", [first, second], base=base, select_topk=0.5)
    assert np.flatnonzero(found).tolist() == [2, 3]


def test_ram_keeps_what_one_model_changed_whole() -> None:
    base = np.zeros(4)
    first, second = np.array([3.0, 0, 0, 1]), np.array([0, 5.0, 0, 3])
    assert merge_arrays("ram", [first, second], base=base).tolist() == [3, 5, 0, 2]
    # Each changed one element alone and shared one: amplified by r·min(1/1, alpha).
    found = merge_arrays("ramplus_tl", [first, second], base=base, r=0.5, alpha=0.4)
    np.testing.assert_allclose(found, [3.6, 6, 0, 2])


def test_nearswap_takes_the_second_model_within_t_bit_for_bit() -> None:
    first = np.float32([1, 1, 1, 1])
    second = np.float32([1.1, 0.9, 1.2, 3])
    found = merge_arrays("nearswap", [first, second], t=0.1000001)
    assert np.array_equal(found[:2], second[:2])
    np.testing.assert_allclose(found[2:], [1.1, 1.1], rtol=1e-6)


def test_arcee_fusion_takes_each_element_from_one_of_the_models() -> None:
    first, second = np.random.default_rng(10).normal(size=(2, 60, 50)).astype(np.float32)
    found = merge_arrays("arcee_fusion", [first, second])
    taken = found == second
    assert (taken | (found == first)).all()
    assert 0.02 < taken.mean() < 0.2
    again = merge_arrays("arcee_fusion", [first, found])  # what was taken matters more than most
    assert (again[~taken] == first[~taken]).all()


# --- reductions -----------------------------------------------------------------------------------


@pytest.fixture
def own_method(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Registers a method for the time of a test."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    yield registry.method


@pytest.mark.parametrize("elements", [17, FEW + 5, 3 * BLOCK + 11])
@pytest.mark.parametrize("values", ["normal", "few"])
def test_several_thresholds_are_those_found_one_by_one(
    elements: int, values: str, own_method: Callable[..., Any]
) -> None:
    generator = np.random.default_rng(11)
    model = generator.normal(size=elements)
    model = (np.round(model) if values == "few" else model).astype(np.float32)
    counts = (1, elements // 3, elements // 2, elements)
    found: list[Any] = []

    @own_method("asks", models=(1, 1))
    def asks(x: Tensor) -> Any:
        alone = yield [Largest(x.model(0), count) for count in counts]
        (together,) = yield [Ranked(x.model(0), counts)]
        found.append((alone, together))
        return lambda b: sum(kept(b) for kept in together)

    total = carried_out(asks, Tensor("w", model.shape, 1), [model], {})
    alone, together = found[-1]
    ordered = np.sort(np.abs(model))[::-1]
    assert [kept.threshold for kept in together] == [kept.threshold for kept in alone]
    assert [kept.threshold for kept in together] == [ordered[count - 1] for count in counts]
    expected = np.zeros(elements, np.float32)
    for count in counts:
        kept = np.argsort(-np.abs(model), kind="stable")[:count]
        expected[kept] += model[kept]
    assert np.array_equal(total, expected)


@pytest.mark.parametrize("told", ["rightly", "wrongly", "of one threshold only"])
def test_thresholds_of_a_large_tensor_are_exact_whatever_a_sample_tells(
    told: str, tmp_path: Path
) -> None:
    model = np.random.default_rng(13).normal(size=(1100, 1000)).astype(np.float32)
    x = Tensor("w", model.shape, 1, True, can_be_sampled=True)
    assert x.is_sampled
    for start in sampled(x):
        part = model.reshape(-1)[start : start + PART]
        if told == "wrongly":
            part *= 1e-3
        elif told == "of one threshold only":
            part[np.abs(part) > 2] = 2
    save_file({"w": np.zeros_like(model)}, tmp_path / "base.safetensors")
    save_file({"w": model}, tmp_path / "model.safetensors")
    modelsoup.merge(
        [tmp_path / "model.safetensors"], base=tmp_path / "base.safetensors",
        output=tmp_path / "merged.safetensors", method="breadcrumbs", weights=[1],
        parameters={"density": 0.3, "gamma": 0.01},
    )  # fmt: skip
    merged = load_file(tmp_path / "merged.safetensors")["w"]
    assert np.array_equal(merged, without_outliers(model, 0.3, 0.01))


@pytest.mark.parametrize("shape", [(3, BLOCK + 5), (1000, 131), (70_001, 1), (6,), ()])
def test_each_row_has_its_number(shape: tuple[int, ...], own_method: Callable[..., Any]) -> None:
    model = np.random.default_rng(12).normal(size=shape)

    @own_method("asks", models=(1, 1))
    def asks(x: Tensor) -> Any:
        (numbers,) = yield [EachRow(lambda b: b.model(0).max(axis=-1))]

        def merged(b: Any) -> np.ndarray:
            first = b.start // x.row
            made: np.ndarray = b.model(0) * 0 + numbers[first : first + len(b.model(0)), None]
            return made

        return Rows(merged)

    found = carried_out(asks, Tensor("w", shape, 1, dtype=np.dtype(np.float64)), [model], {})
    highest = np.atleast_1d(model).max(axis=-1, keepdims=True)
    assert np.array_equal(
        found, np.broadcast_to(highest, np.atleast_1d(model).shape).reshape(shape)
    )


@pytest.mark.parametrize("count", [2, 1 << 20])
def test_what_was_drawn_is_the_same_where_it_is_remembered_and_where_it_is_drawn_again(
    count: int,
) -> None:
    model = np.random.default_rng(13).normal(size=2 * BLOCK + 5).astype(np.float32)
    x = Tensor("w", model.shape, count)
    kept = kept_values.drawn(x, 0, x.model(0), 0.3)
    norms = Norms(kept)
    gathering = norms.begin(x)
    blocks = list(blocks_of(x, [model], rows=False))
    for block in reversed(blocks):
        gathering.add(block)
    gathering.end_pass()
    before, after, again = gathering.value
    remembered = len(model) // 8 if count == 2 else 0  # so many models take too much memory
    assert norms.state_bytes(x) == 3 * 16 + remembered
    assert (again is not kept) == (count == 2)
    assert before == pytest.approx(np.abs(model).sum(dtype=float), rel=1e-12)
    expected = np.concatenate([kept(block) for block in blocks])
    assert 0.29 < np.mean(expected != 0) < 0.31
    assert after == pytest.approx(np.abs(expected).sum(dtype=float), rel=1e-12)
    assert np.concatenate([again(block) for block in blocks]).tobytes() == expected.tobytes()


# --- what is told of them -------------------------------------------------------------------------

TABLES = (Path(__file__).parent.parent / "docs" / "methods.md").read_text("utf-8")


MERGEKITS = {
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear",
    "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "model_stock", "sce",
    "arcee_fusion", "nearswap", "ram", "ramplus_tl", "passthrough",
}  # fmt: skip


def test_the_tables_of_methods_have_each_with_its_parameters_and_passes() -> None:
    rows = [line.split(" | ") for line in TABLES.splitlines() if line.startswith("| `")]
    told = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert told.keys() >= MERGEKITS
    for name, (*_, inputs, parameters, reads) in told.items():
        chosen = get_method(name)
        named = {word for word in re.findall(r"`(\w+)`", parameters) if word in chosen.parameters}
        assert named == set(chosen.parameters), name
        assert ("base" in inputs) == (chosen.base is not False), name
        costs = cost(chosen)
        assert costs is not None
        assert f"{costs.passes}×" in reads, name
        assert ("*rows*" in reads) == (costs.at_once == "row"), name


# --- what does not fit ----------------------------------------------------------------------------

REFUSED: dict[str, tuple[int, bool, dict[str, Any], str]] = {
    "karcher, no step": (
        2, False, {"method": "karcher", "parameters": {"max_iter": 0}},
        "parameter 'max_iter' of 'karcher' is 0, but must be at least 1",
    ),
    "karcher, half a step": (
        2, False, {"method": "karcher", "parameters": {"max_iter": 1.5}},
        "parameter 'max_iter' of 'karcher' is 1.5, not an integer",
    ),
    "karcher, weights": (
        2, False, {"method": "karcher", "weights": [1, 1]},
        "the method 'karcher' has no parameter 'weight' (it has max_iter, tol)",
    ),
    "karcher, beta": (
        2, False, {"method": "karcher", "beta": 0.5}, "beta means nothing to 'karcher'"
    ),
    "sce, weights": (
        2, True, {"method": "sce", "weights": [1, 1]},
        "the method 'sce' has no parameter 'weight' (it has select_topk)",
    ),
    "sce, one model": (
        1, True, {"method": "sce"}, "'sce' merges at least 2 models, but 1 were given"
    ),
    "model_stock, one model": (
        1, True, {"method": "model_stock"}, "'model_stock' merges at least 2 models, but 1"
    ),
    "model_stock, no base": (
        2, False, {"method": "model_stock"}, "'model_stock' needs a base model"
    ),
    "nuslerp, three models": (
        3, False, {"method": "nuslerp", "weights": [1, 1, 1]}, "'nuslerp' merges exactly 2 models"
    ),
    "arcee_fusion, one model": (1, False, {"method": "arcee_fusion"}, "merges exactly 2 models"),
    "passthrough, two models": (2, False, {"method": "passthrough"}, "merges exactly 1 models"),
    "nearswap, no t": (2, False, {"method": "nearswap"}, "'nearswap' needs the parameter 't'"),
    "nearswap, t below 0": (
        2, False, {"method": "nearswap", "parameters": {"t": -1}}, "is -1, but must be at least 0"
    ),
    "nearswap, base": (
        2, True, {"method": "nearswap", "parameters": {"t": 1}},
        "a base model was given, but nearswap uses none",
    ),
    "multislerp, weights sum to zero": (
        2, False, {"method": "multislerp", "weights": [1, -1]},
        "the weights of 'multislerp' sum to 0 and cannot be normalised "
        "(parameters={'normalize_weights': False}, or other weights)",
    ),
    "breadcrumbs, gamma pushes density out": (
        2, True,
        {"method": "breadcrumbs", "weights": [1, 1],
         "parameters": {"density": [0.5, 0.9], "gamma": 0.2}},
        "parameter 'density' of 'breadcrumbs' is 0.9 and 'gamma' 0.2: more than 1 together",
    ),
    "della, epsilon pushes density below": (
        2, True,
        {"method": "della", "weights": [1, 1], "parameters": {"density": 0.1}},
        "parameter 'density' of 'della' is 0.1 and 'epsilon' 0.15: the probabilities from -0.05 to "
        "0.25 are not between 0 and 1",
    ),
    "della_linear, epsilon pushes density above": (
        2, True,
        {"method": "della_linear", "weights": [1, 1],
         "parameters": {"density": 0.9, "epsilon": [0.05, 0.1]}},
        "parameter 'density' of 'della_linear' is 0.9 and 'epsilon' 0.1",
    ),
    "ties, gamma": (
        2, True, {"method": "ties", "weights": [1, 1], "parameters": {"gamma": 0.1}},
        "the method 'ties' has no parameter 'gamma'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_method_cannot_do_is_refused_from_headers(name: str, tmp_path: Path) -> None:
    count, base, options, sentence = REFUSED[name]
    paths = [tmp_path / f"{k}.safetensors" for k in range(count + base)]
    for path in paths:
        save_file({"w": np.ones((2, 3), np.float32)}, path)
    with pytest.raises(ParameterError) as caught:
        modelsoup.merge(
            paths[base:], output=tmp_path / "out.safetensors", base=paths[0] if base else None,
            **options,
        )  # fmt: skip
    assert sentence in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_shares_that_are_one_together_but_for_rounding_are_taken() -> None:
    model = np.arange(10, dtype=np.float32)
    density, gamma = 0.3 + 1e-12, 0.7  # as along a gradient
    found = merge_arrays(
        "breadcrumbs", [model], base=np.zeros_like(model), weight=1, density=density, gamma=gamma
    )
    assert np.flatnonzero(found).tolist() == [1, 2]
