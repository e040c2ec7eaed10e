"""What the methods beyond mergekit's promise: their formulas, invariants, laws and errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup.errors import ParameterError
from modelsoup.merging.forms import BLOCK, MANY
from modelsoup.terminal.cli import main

LAWS = settings(max_examples=15, deadline=None)
Arrays = list[np.ndarray]

# Each with parameters by which one model merged alone is that model; None where it never is.
METHODS: dict[str, dict[str, Any] | None] = {
    "tsv_m": {},
    "iso_c": None,
    "iso_cts": None,
    "wudi": {"t": 3.0},
    "svc": {},
    "lines": {},
    "magmax": {},
    "consensus": {"k": 1},
    "emr": {},
    "geometric_median": {},
    "actmat": {},
    "opcm": {},
}
WITH_BASE = [name for name in METHODS if name != "geometric_median"]


def drawn(seed: int, models: int, shape: tuple[int, ...], dtype: Any = np.float64) -> Arrays:
    """A base and models around it."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=shape)
    deltas = [0.1 * generator.normal(size=shape) for _ in range(models)]
    return [base.astype(dtype), *((base + delta).astype(dtype) for delta in deltas)]


def parameters_of(name: str) -> dict[str, Any]:
    given = {"wudi": {"t": 3.0}}.get(name, {})
    return {key.rstrip("_"): value for key, value in given.items()}


def merged(method: str, arrays: Arrays, **options: Any) -> np.ndarray:
    """The base comes first, and is not given to methods that have none."""
    base = arrays[0] if method in WITH_BASE else None
    return modelsoup.merge_arrays(method, arrays[1:], base=base, **options)


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-10) -> None:
    size = abs(wanted).max(initial=1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * size)


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, given in METHODS.items() if given is not None])
@LAWS
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_one_model_alone_is_that_model(name: str, seed: int, rows: int, columns: int) -> None:
    arrays = drawn(seed, 1, (rows, columns))
    own = {key.rstrip("_"): value for key, value in (METHODS[name] or {}).items()}
    close(merged(name, arrays, **own), arrays[1])


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"opcm"}))
@LAWS
@given(seed=st.integers(0, 2**32), order=st.permutations([1, 2, 3]))
def test_the_order_of_models_means_nothing(name: str, seed: int, order: list[int]) -> None:
    arrays = drawn(seed, 3, (7, 5))
    again = [arrays[0], *(arrays[k] for k in order)]
    own = parameters_of(name)
    close(merged(name, again, **own), merged(name, arrays, **own), 1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(6, 4), (5,), (2, 3, 3, 3), ()])
def test_models_that_changed_nothing_merge_to_the_base(name: str, shape: tuple[int, ...]) -> None:
    base = drawn(0, 0, shape, np.float32)[0]
    result = merged(name, [base] * 4, **parameters_of(name))
    assert result.shape == shape
    np.testing.assert_array_equal(result, base)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("tsv_m", "svc")])
def test_an_empty_tensor_stays_empty(name: str) -> None:
    assert merged(name, [np.zeros((0, 4))] * 3, **parameters_of(name)).shape == (0, 4)


def test_copies_of_one_model_are_that_model_where_a_method_promises_it() -> None:
    base, model = drawn(1, 1, (8, 6))
    copies = [base, model, model, model]
    for name in ("svc", "emr", "geometric_median"):
        close(merged(name, copies), model)
    close(merged("opcm", copies), model)  # nothing of a copy is beside the first
    close(merged("wudi", copies, t=1e6), model, 1e-8)
    close(merged("magmax", copies), model)
    # Each is 1 beside 2 of the others, less than the threshold 0.6.
    close(merged("consensus", copies), base)
    close(merged("lines", copies), model)


def test_a_whole_merge_of_files_is_what_is_made_of_the_arrays(tmp_path: Path) -> None:
    """Odd sizes, more than one block, 16-bit floats, and tensors that are no matrices."""
    shapes = {
        "layers.0.w": (37, 19),
        "layers.1.w": (300, 301),
        "b": (BLOCK + 3,),
        "c": (4, 3, 3, 3),
    }
    models = [{} for _ in range(4)]
    for number, (name, shape) in enumerate(shapes.items()):
        for model, array in zip(models, drawn(number, 3, shape, np.float32), strict=True):
            model[name] = array.astype(np.float16)
    paths = [tmp_path / f"{k}.safetensors" for k in range(4)]
    for path, model in zip(paths, models, strict=True):
        save_file(model, path)
    layers = {"layers.0.w": (0, 2), "layers.1.w": (1, 2)}
    for name in METHODS.keys() - {"opcm", "lines"}:  # of which the whole model is one thing
        base = paths[0] if name in WITH_BASE else None
        own = parameters_of(name)
        modelsoup.merge(
            paths[1:], tmp_path / "out.safetensors", method=name, base=base, parameters=own,
            force=True, fsync=False,
        )  # fmt: skip
        found = load_file(tmp_path / "out.safetensors")
        for tensor in shapes:
            arrays = [model[tensor].astype(np.float32) for model in models]
            wanted = modelsoup.merge_arrays(
                name, arrays[1:], base=arrays[0] if base else None, name=tensor,
                layer=layers.get(tensor), **own,
            )  # fmt: skip
            np.testing.assert_array_equal(
                found[tensor], wanted.astype(np.float16), f"{name} {tensor}"
            )


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_shows_in_the_error(name: str, tmp_path: Path) -> None:
    arrays = drawn(0, 2, (6, 4), np.float32)
    arrays[2][1, 2] = np.nan
    for k, array in enumerate(arrays):
        save_file({"layers.0.w": array}, tmp_path / f"{k}.safetensors")
    base = tmp_path / "0.safetensors" if name in WITH_BASE else None
    models = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    with pytest.raises(modelsoup.NonfiniteError, match=r"layers\.0\.w \(1 in 2\.safetensors"):
        modelsoup.merge(
            models, tmp_path / "out.safetensors", method=name, base=base,
            parameters=parameters_of(name),
        )  # fmt: skip
    assert not (tmp_path / "out.safetensors").exists()


# --- singular directions --------------------------------------------------------------------------


def orthogonal(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def whitened(u: np.ndarray) -> np.ndarray:
    """U·(UᵀU)^(−1/2)."""
    values, q = np.linalg.eigh(u.T @ u)
    return u @ (q / np.sqrt(values)) @ q.T


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (8, 8)])
def test_tsv_m_is_the_whitened_form_of_the_paper(shape: tuple[int, int]) -> None:
    base, *models = drawn(3, 3, shape)
    kept = min(shape) // 3
    parts = [np.linalg.svd(model - base, full_matrices=False) for model in models]
    u = whitened(np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1))
    v = whitened(np.concatenate([vt[:kept] for _, _, vt in parts]).T)
    s = np.concatenate([s[:kept] for _, s, _ in parts])
    close(merged("tsv_m", [base, *models], **{"lambda": 0.7}), base + 0.7 * (u * s) @ v.T)


@LAWS
@given(seed=st.integers(0, 2**32), rows=st.integers(3, 12), columns=st.integers(3, 12))
def test_tsv_m_has_the_singular_values_that_it_kept(seed: int, rows: int, columns: int) -> None:
    base, *models = drawn(seed, 3, (rows, columns))
    kept = min(rows, columns) // 3
    values = [np.linalg.svd(m - base, compute_uv=False)[:kept] for m in models]
    wanted = np.sort(np.concatenate(values))[::-1]
    found = np.linalg.svd(merged("tsv_m", [base, *models]) - base, compute_uv=False)
    close(found[: 3 * kept], wanted, 1e-9)
    close(found[3 * kept :], np.zeros(len(found) - 3 * kept), 1e-9)


def tasks_at_right_angles() -> Arrays:
    """Three of rank 2 in 9 × 8, of which no two share a direction; the base is zero."""
    u, v = orthogonal(0, 9, 6), orthogonal(1, 8, 6)
    return [np.zeros((9, 8)), *(u[:, k : k + 2] * [3, 2] @ v[:, k : k + 2].T for k in (0, 2, 4))]


def test_tasks_at_right_angles_are_added_up() -> None:
    arrays = tasks_at_right_angles()
    close(merged("tsv_m", arrays), sum(arrays[1:]))
    for t in (0.0, 0.3, 5.0, 1e4):
        close(merged("wudi", arrays, t=t), sum(arrays[1:]))


def test_tsv_m_takes_two_equal_models_for_one() -> None:
    base, model = drawn(2, 1, (8, 6))
    u, s, vt = np.linalg.svd(model - base, full_matrices=False)
    half = base + (u[:, :3] * s[:3]) @ vt[:3]
    close(merged("tsv_m", [base, model, model]), half)


@LAWS
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_iso_c_has_a_flat_spectrum_in_the_directions_of_the_sum(
    seed: int, rows: int, columns: int
) -> None:
    base, *models = drawn(seed, 2, (rows, columns))
    total = sum(model - base for model in models)
    mean = np.linalg.svd(total, compute_uv=False).mean()
    delta = merged("iso_c", [base, *models]) - base
    close(np.linalg.svd(delta, compute_uv=False), np.full(min(rows, columns), mean), 1e-9)
    # U·Vᵀ of a matrix leaves what is positive where it multiplies the matrix itself.
    product = delta @ total.T
    close(product, product.T, 1e-9)
    assert np.linalg.eigvalsh(product).min() > -1e-9


@pytest.mark.parametrize(("shape", "common"), [((10, 20), 0.8), ((20, 10), 0.5), ((7, 7), 0.0)])
def test_iso_cts_is_the_published_algorithm(shape: tuple[int, int], common: float) -> None:
    base, *models = drawn(5, 2, shape)
    deltas, rank = [model - base for model in models], min(shape)
    each = min(round((rank - math.floor(common * rank)) / 2), rank // 2)
    shared = rank - 2 * each
    u, s, vt = np.linalg.svd(sum(deltas), full_matrices=False)
    c = u[:, :shared]
    us, ss, vs = [], [], []
    for delta in deltas:
        own = np.linalg.svd(delta - c @ c.T @ delta, full_matrices=False)
        us, ss, vs = [*us, own[0][:, :each]], [*ss, own[1][:each]], [*vs, own[2][:each]]
    left = whitened(np.concatenate([*us, c], axis=1))
    right = whitened(np.concatenate([*vs, vt[:shared]]).T)
    flat = np.concatenate([*ss, s[:shared]]).mean()
    found = merged("iso_cts", [base, *models], common=common, **{"lambda": 1.5})
    close(found, base + 1.5 * flat * left @ right.T)


def test_iso_cts_of_one_model_or_of_nothing_but_the_sum_is_iso_c() -> None:
    arrays = drawn(6, 3, (9, 7))
    close(merged("iso_cts", arrays[:2]), merged("iso_c", arrays[:2]))
    close(merged("iso_cts", arrays, common=1.0), merged("iso_c", arrays))


@pytest.mark.parametrize("shape", [(6, 5), (3, 11), (2, 11)])
@pytest.mark.parametrize("t", [0.0, 0.5, 4.0])
def test_wudi_is_where_the_gradient_flow_is_after_t(shape: tuple[int, int], t: float) -> None:
    base, *models = drawn(7, 3, shape)
    deltas = [model - base for model in models]

    def gradient(x: np.ndarray) -> np.ndarray:
        return 2 * sum((x - d) @ d.T @ d / (d**2).sum() for d in deltas)

    x, steps = sum(deltas), 400
    h = t / steps
    for _ in range(steps if t else 0):  # Runge and Kutta's method of order 4
        k1 = gradient(x)
        k2 = gradient(x - h / 2 * k1)
        k3 = gradient(x - h / 2 * k2)
        k4 = gradient(x - h * k3)
        x = x - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    close(merged("wudi", [base, *models], t=t), base + x, 1e-8)


def test_wudi_ends_where_the_objective_is_smallest() -> None:
    base, *models = drawn(8, 2, (5, 9))
    deltas = [model - base for model in models]
    joined = np.concatenate([d / np.linalg.norm(d) for d in deltas])
    wanted = sum(d @ d.T @ d / (d**2).sum() for d in deltas) @ np.linalg.pinv(joined.T @ joined)
    close(merged("wudi", [base, *models], t=1e6), base + wanted, 1e-8)


def test_wudi_means_the_same_at_any_scale_of_the_task_vectors() -> None:
    _, *deltas = drawn(9, 3, (6, 6))
    zero = np.zeros((6, 6))
    one = merged("wudi", [zero, *deltas], t=2.0)
    close(merged("wudi", [zero, *(1e-5 * d for d in deltas)], t=2.0) * 1e5, one)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi"])
def test_what_is_no_matrix_gets_the_mean_times_lambda(name: str) -> None:
    own = {**parameters_of(name), "lambda": 0.7}
    for shape, tensor in (
        ((9,), "norm"), ((4, 3, 3, 3), "conv"), ((6, 5), "model.embed_tokens.weight"),
        ((6, 5), "lm_head.weight"), ((6, 5), "transformer.wte.weight"),
    ):  # fmt: skip
        arrays = drawn(10, 2, shape)
        found = merged(name, arrays, name=tensor, **own)
        mean = (arrays[1] + arrays[2]) / 2
        close(found, arrays[0] + 0.7 * (mean - arrays[0]))


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi"])
def test_kernels_and_embeddings_are_matrices_where_that_is_asked(name: str) -> None:
    own = parameters_of(name)
    arrays = drawn(11, 2, (8, 3, 2, 2))
    flat = [array.reshape(8, 12) for array in arrays]
    close(merged(name, arrays, conv="flatten", **own).reshape(8, 12), merged(name, flat, **own))
    close(
        merged(name, flat, name="head.weight", embeddings=True, **own),
        merged(name, flat, name="attention.weight", **own),
    )


def test_tsv_m_refuses_a_matrix_of_which_no_direction_would_be_left() -> None:
    arrays = drawn(12, 3, (2, 9))
    with pytest.raises(ParameterError, match=r"none of layer\.weight, of rank 2, with 3 models"):
        merged("tsv_m", arrays, name="layer.weight")
    assert merged("tsv_m", arrays[:3], name="layer.weight").shape == (2, 9)


# --- after a merge --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "own"),
    [("task_arithmetic", {"weight": 0.8}), ("ties", {"density": 0.5}), ("iso_c", {"lambda": 1.5})],
)
def test_svc_is_the_published_rule_over_any_merge(of: str, own: dict[str, float]) -> None:
    base, *models = arrays = drawn(13, 3, (7, 5))
    inner = {"weight": 1.0, **own} if of != "iso_c" else own
    delta = modelsoup.merge_arrays(of, models, base=base, **inner) - base
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    scale = []
    for r in range(len(s)):
        mine = u[:, r] @ delta
        ratios = []
        for model in models:
            theirs = u[:, r] @ (model - base)
            ratios.append(max(0.3, mine @ theirs / (theirs @ theirs)))
        scale.append(3 / sum(ratios))
    close(merged("svc", arrays, of=of, alpha=0.3, **own), base + (u * (scale * s)) @ vt)


@LAWS
@given(seed=st.integers(0, 2**32), alpha=st.floats(0.01, 1))
def test_svc_amplifies_no_direction_by_more_than_one_over_alpha(seed: int, alpha: float) -> None:
    base, *models = arrays = drawn(seed, 3, (6, 6))
    u, s, vt = np.linalg.svd(sum(models) - 3 * base, full_matrices=False)
    delta = merged("svc", arrays, alpha=alpha) - base
    factors = np.einsum("mr,mn,rn->r", u, delta, vt) / s
    assert (factors > 0).all()
    assert factors.max() <= 1 / alpha + 1e-9


def test_svc_leaves_what_is_no_matrix_as_it_was_merged() -> None:
    arrays = drawn(14, 2, (11,))
    wanted = modelsoup.merge_arrays("ties", arrays[1:], base=arrays[0], weight=1.0, density=0.4)
    np.testing.assert_array_equal(merged("svc", arrays, of="ties", density=0.4), wanted)


def test_every_method_that_is_offered_can_be_post_processed() -> None:
    arrays = drawn(34, 2, (60, 5))
    words = modelsoup.get_method("svc").parameters["of"].words
    assert {"ties", "dare_linear", "della", "sce", "model_stock", "tsv_m", "emr"} <= set(words)
    for of in words:
        weight = {"weight": 1.0} if "weight" in modelsoup.get_method(of).parameters else {}
        inner = modelsoup.merge_arrays(of, arrays[1:], base=arrays[0], **weight)
        close(merged("lines", arrays, of=of, shallow=1.0), inner)
        assert np.isfinite(merged("svc", arrays, of=of)).all()
    with pytest.raises(ParameterError, match="the method 'sce' merges at least 2 models"):
        merged("svc", arrays[:2], of="sce")


@pytest.mark.parametrize("of", ["task_arithmetic", "ties", "tsv_m", "svc"])
def test_lines_scales_a_merge_by_the_depth_of_its_layer(of: str) -> None:
    base, *models = arrays = drawn(15, 2, (6, 6))
    inner = {} if of in ("tsv_m", "svc") else {"weight": 1.0}
    delta = modelsoup.merge_arrays(of, models, base=base, **inner) - base
    for layer, scale in ((None, 0.25), ((0, 5), 0.25), ((1, 5), 0.4375), ((4, 5), 1.0)):
        found = merged("lines", arrays, of=of, shallow=0.25, layer=layer)
        close(found, base + scale * delta)


STATES = {
    "layers.0.weight": (12, 9), "layers.1.weight": (9, 12), "layers.2.weight": (300, 301),
    "layers.2.bias": (9,), "conv": (4, 3, 3, 3), "lm_head.weight": (11, 6),
    "large": (2 * BLOCK + 7,),
}  # fmt: skip
State = dict[str, np.ndarray]


def states(folder: Path, count: int = 3, dtype: Any = np.float64) -> tuple[list[Path], list[State]]:
    """A base and models around it as files, of which each tensor has a scale of its own."""
    made: list[State] = [{} for _ in range(count + 1)]
    for number, (name, shape) in enumerate(STATES.items()):
        for model, array in zip(made, drawn(number, count, shape, dtype), strict=True):
            model[name] = (number + 1) * array
    paths = [folder / f"{k}.safetensors" for k in range(count + 1)]
    for path, model in zip(paths, made, strict=True):
        save_file(model, path)
    return paths, made


def sizes(state: State, norm: int) -> float:
    """The norm of a whole model."""
    return float(np.linalg.norm(np.concatenate([v.reshape(-1) for v in state.values()]), norm))


def less(state: State, base: State) -> State:
    return {name: values - base[name] for name, values in state.items()}


def layer_scale(name: str, shallow: float, layers: int = 3) -> float:
    depth = int(name.split(".")[1]) / (layers - 1) if name.startswith("layers.") else 0.0
    return shallow + (1 - shallow) * depth


@pytest.mark.parametrize("of", ["task_arithmetic", "ties", "della", "tsv_m", "opcm"])
def test_lines_finds_the_scale_of_the_first_layer_by_the_whole_model(
    of: str, tmp_path: Path
) -> None:
    """By blocks, rows and whole matrices; over a method that asks of the whole model itself."""
    paths, (base, *models) = states(tmp_path)
    weights = {} if of in ("tsv_m", "opcm") else {"weights": [1.0] * 3}
    if of == "ties":
        weights["parameters"] = {"density": 0.3}
    inner, out = tmp_path / "inner.safetensors", tmp_path / "out.safetensors"
    modelsoup.merge(paths[1:], inner, base=paths[0], method=of, fsync=False, **weights)
    own = {"of": of, **weights.get("parameters", {})}
    report = modelsoup.merge(
        paths[1:], out, base=paths[0], method="lines", parameters=own, fsync=False
    )
    merged = less(load_file(inner), base)
    summed = {n: sum(model[n] - values for model in models) for n, values in base.items()}
    shallow = sizes(summed, 1) / sizes(merged, 1) / 3
    found = load_file(out)
    for name in STATES:
        close(found[name], base[name] + layer_scale(name, shallow) * merged[name], 1e-9)
    headers = sum(path.stat().st_size - 8 * sum(map(np.size, base.values())) for path in paths)
    planned = report.plan.bytes_streamed - report.plan.bytes_written
    assert report.bytes_read == planned + headers


def test_what_a_merge_reads_again_for_sums_over_the_model_is_planned(tmp_path: Path) -> None:
    """Thresholds of large tensors, too, which take a sample each time."""
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for path, array in zip(paths, drawn(32, 2, (MANY,), np.float32), strict=True):
        save_file({"layers.0.w": array, "layers.1.w": array[:1000].copy()}, path)
    own = {"of": "ties", "density": 0.3}
    report = modelsoup.merge(
        paths[1:], tmp_path / "out.safetensors", base=paths[0], method="lines", parameters=own,
        fsync=False,
    )  # fmt: skip
    headers = sum(path.stat().st_size for path in paths) - 3 * 4 * (MANY + 1000)
    planned = report.plan.bytes_streamed - report.plan.bytes_written
    assert report.bytes_read == planned + headers


def test_lines_of_a_sum_is_one_over_the_number_of_models(tmp_path: Path) -> None:
    base, *models = drawn(31, 3, (6, 6))
    found = merged("lines", [base, *models], layer=(0, 5))
    close(found, base + sum(model - base for model in models) / 3)


def test_a_parameter_that_the_inner_method_does_not_have_is_refused() -> None:
    arrays = drawn(16, 2, (4, 4))
    with pytest.raises(ParameterError, match="'task_arithmetic' has no parameter 'density'"):
        merged("svc", arrays, density=0.5)
    with pytest.raises(ParameterError, match="'tsv_m' has no parameter 'weight'"):
        merged("lines", arrays, of="tsv_m", weight=0.5, shallow=1.0)


def test_lines_wants_a_model_that_has_layers(tmp_path: Path) -> None:
    for k, array in enumerate(drawn(0, 1, (3, 3), np.float32)):
        save_file({"dense.weight": array}, tmp_path / f"{k}.safetensors")
    with pytest.raises(ParameterError, match=r"'lines' goes by the depth of layers, but no tensor"):
        modelsoup.merge(
            [tmp_path / "1.safetensors"], tmp_path / "out.safetensors", method="lines",
            base=tmp_path / "0.safetensors", parameters={"shallow": 0.5},
        )  # fmt: skip


# --- masks ----------------------------------------------------------------------------------------


def test_magmax_takes_the_largest_and_the_later_of_equals() -> None:
    base = np.zeros(4)
    a, b = np.array([3.0, -1, 2, -2]), np.array([-2.0, 4, -2, 2])
    close(merged("magmax", [base, a, b], **{"lambda": 0.5}), 0.5 * np.array([3.0, 4, -2, 2]))


def test_consensus_keeps_the_sum_where_enough_task_vectors_matter() -> None:
    base, *models = drawn(17, 4, (50,))
    deltas = [model - base for model in models]
    total = sum(deltas)
    limits = (0.2, 0.3, 0.4, 0.5)
    votes = sum(
        (abs(d) > limit * abs(total - d)).astype(int)
        for d, limit in zip(deltas, limits, strict=True)
    )
    for k in range(5):
        found = merged("consensus", [base, *models], k=k, threshold=limits, **{"lambda": 0.3})
        close(found, base + 0.3 * total * (votes >= k))
    plain = modelsoup.merge_arrays("task_arithmetic", models, base=base, weight=0.3)
    close(merged("consensus", [base, *models], k=0, **{"lambda": 0.3}), plain)


def apart() -> Arrays:
    """A base, and three models that changed different elements of it."""
    base, *models = drawn(18, 3, (30,))
    return [base, *(np.where(np.arange(30) % 3 == k, m, base) for k, m in enumerate(models))]


@pytest.mark.parametrize("name", ["consensus", "emr"])
def test_experts_that_do_not_meet_are_given_back_exactly(name: str) -> None:
    arrays = apart()
    for k in (1, 2, 3):
        close(merged(name, arrays, expert=k), arrays[k], 1e-15)


def test_an_expert_of_consensus_is_the_sum_under_its_mask() -> None:
    base, *models = drawn(19, 3, (40,))
    deltas = [model - base for model in models]
    total = sum(deltas)
    mask = abs(deltas[1]) > 0.4 * abs(total - deltas[1])
    found = merged("consensus", [base, *models], expert=2, threshold=0.4)
    close(found, base + total * mask)


def test_emr_elects_signs_and_takes_the_largest_magnitudes() -> None:
    base = np.zeros(5)
    models = [np.array([1.0, -2, 3, 0, 1]), np.array([2.0, 1, -1, 0, -1])]
    unified = np.array([2.0, -2, 3, 0, -1])  # − where the sum is zero
    np.testing.assert_array_equal(merged("emr", [base, *models]), unified)
    # The second agrees in the first and the last element, whose sum is 3; its own L1 norm is 5.
    wanted = np.array([2.0, 0, 0, 0, -1]) * 5 / 3
    close(merged("emr", [base, *models], expert=2), wanted)


def test_emr_restores_the_length_of_an_experts_whole_task_vector(tmp_path: Path) -> None:
    paths, (base, *models) = states(tmp_path)
    out = tmp_path / "out.safetensors"
    modelsoup.merge(
        paths[1:], out, base=paths[0], method="emr", parameters={"expert": 2}, fsync=False
    )
    found = less(load_file(out), base)
    assert sizes(found, 1) == pytest.approx(sizes(less(models[1], base), 1), rel=1e-12)
    unified = {n: merged("emr", [base[n], *(m[n] for m in models)]) - base[n] for n in STATES}
    scales = [
        np.unique((found[n] / unified[n]).round(12)[np.sign(unified[n]) == np.sign(own)])
        for n, own in less(models[1], base).items()
    ]
    assert len({float(scale) for (scale,) in scales}) == 1  # for all tensors the same


@pytest.mark.parametrize("name", ["consensus", "emr"])
def test_an_expert_that_is_not_there_is_refused(name: str) -> None:
    arrays = drawn(20, 2, (4,))
    with pytest.raises(ParameterError, match="expert is 3, but there are 2 models"):
        merged(name, arrays, expert=3)
    with pytest.raises(ParameterError, match="must be at least 0"):
        merged(name, arrays, expert=-1)


# --- one after the other --------------------------------------------------------------------------


def published(base: State, models: list[State], alpha: float) -> State:
    """FusionBench's loop over whole models: projected, added, rescaled, model by model."""
    delta = less(models[0], base)
    before, norms = 1.0, [sizes(delta, 2)]
    for model in models[1:]:
        task = less(model, base)
        norms.append(sizes(task, 2))
        added: State = {}
        for name, d in task.items():
            if d.ndim != 2 or "head" in name:
                added[name] = before * delta[name] + d
                continue
            u, s, vt = np.linalg.svd(delta[name])
            inside = u.T @ d @ vt.T
            q = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
            np.fill_diagonal(inside, 0)
            inside[:q, :q] = 0
            added[name] = before * delta[name] + u @ inside @ vt
        before = sizes(added, 2) / float(np.mean(norms))
        delta = {name: values / before for name, values in added.items()}
    return {name: base[name] + values for name, values in delta.items()}


@pytest.mark.parametrize(("count", "alpha"), [(2, 0.5), (4, 0.5), (3, 0.0), (3, 0.8)])
def test_opcm_is_the_published_loop_over_whole_models(
    count: int, alpha: float, tmp_path: Path
) -> None:
    paths, (base, *models) = states(tmp_path, count)
    out = tmp_path / "out.safetensors"
    modelsoup.merge(
        paths[1:], out, base=paths[0], method="opcm", parameters={"alpha": alpha}, fsync=False
    )
    found, wanted = load_file(out), published(base, models, alpha)
    for name in STATES:
        close(found[name], wanted[name], 1e-9)


@LAWS
@given(seed=st.integers(0, 2**32), rows=st.integers(2, 9), columns=st.integers(2, 9))
def test_opcm_adds_nothing_along_a_direction_that_is_there(
    seed: int, rows: int, columns: int
) -> None:
    base, first, second = drawn(seed, 2, (rows, columns))
    found = merged("opcm", [base, first, second]) - base
    mean = (np.linalg.norm(first - base) + np.linalg.norm(second - base)) / 2
    assert np.linalg.norm(found) == pytest.approx(mean, rel=1e-9)
    u, s, vt = np.linalg.svd(first - base, full_matrices=False)
    along = np.diagonal(u.T @ found @ vt.T)
    close(along / along[0], s / s[0], 1e-8)  # the first's own, rescaled


def test_opcm_of_what_lies_in_other_directions_is_a_sum_of_the_mean_length() -> None:
    left, right = orthogonal(1, 8, 4), orthogonal(2, 7, 4)
    first, second = (left[:, part] @ right[:, part].T for part in (slice(0, 2), slice(2, 4)))
    base = drawn(3, 0, (8, 7))[0]
    length = 2**0.5  # of each; that of the sum is 2
    close(merged("opcm", [base, base + first, base + second]), base + (first + second) / 2 * length)


def test_sums_over_the_model_are_of_the_tensors_of_one_rule(tmp_path: Path) -> None:
    """Two networks in one file that have rules of their own are two models."""
    paths, (base, *models) = states(tmp_path, 2)
    out = tmp_path / "out.safetensors"
    modelsoup.merge(
        paths[1:], out, base=paths[0], method="opcm", layers={"layers.*": "merge", "*": "merge"},
        fsync=False,
    )  # fmt: skip
    found = load_file(out)
    for chosen in (True, False):
        names = [name for name in STATES if name.startswith("layers.") is chosen]
        own = [{name: state[name] for name in names} for state in (base, *models)]
        wanted = published(own[0], own[1:], 0.5)
        for name in names:
            close(found[name], wanted[name], 1e-9)


@pytest.mark.parametrize(
    ("method", "own"),
    [("opcm", {}), ("svc", {"of": "ties", "density": 0.5}), ("lines", {"of": "tsv_m"})],
)
def test_a_head_of_a_matrix_s_shape_is_still_a_head(
    method: str, own: dict[str, Any], tmp_path: Path
) -> None:
    """Methods that ask before they merge tell them apart by their names, in either order."""
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    arrays = [drawn(seed, 2, (300, 301)) for seed in (1, 2, 3)]
    for k, path in enumerate(paths):
        names = ("embed_tokens.weight", "layers.0.weight", "layers.1.weight")
        save_file(dict(zip(names, (of[k] for of in arrays), strict=True)), path)
    found = []
    for prefix in ("", "x."):  # of the same tensors under names that are no head's
        renames = {"embed_tokens.*": "tokens.*"} if prefix else {}
        out = tmp_path / f"{prefix}out.safetensors"
        report = modelsoup.merge(
            paths[1:], out, base=paths[0], method=method, parameters=own, renames=renames,
            fsync=False,
        )  # fmt: skip
        found.append(load_file(out))
        # Whole tensors are merged at once where that is planned, and else slice by slice.
        planned = [bool(step.whole_bytes) for step in report.plan.steps]
        assert planned == [bool(prefix), True, True]
    assert not np.allclose(found[0]["embed_tokens.weight"], found[1]["tokens.weight"])
    base, *models = (of for of in arrays[0])
    if method == "svc":
        wanted = modelsoup.merge_arrays("ties", models, base=base, weight=1.0, density=0.5)
        close(found[0]["embed_tokens.weight"], wanted)


@pytest.mark.parametrize("method", ["opcm", "lines"])
def test_sums_over_the_model_do_not_depend_on_workers_shards_or_slices(
    method: str, tmp_path: Path
) -> None:
    paths, _ = states(tmp_path, dtype=np.float32)
    given = {"parameters": {"of": "ties", "density": 0.4}} if method == "lines" else {}
    found = []
    for name, workers, shard_size in (("a.safetensors", 1, None), ("b", 3, 40_000)):
        modelsoup.merge(
            paths[1:], tmp_path / name, base=paths[0], method=method, workers=workers,
            shard_size=shard_size, fsync=False, **given,
        )  # fmt: skip
        found.append(modelsoup.open_checkpoint(tmp_path / name))
    assert len(found[1].files) > 2
    for name in STATES:
        assert found[0][name].tobytes() == found[1][name].tobytes()


def test_a_tensor_that_is_not_finite_does_not_spoil_the_sums_over_the_model(
    tmp_path: Path,
) -> None:
    paths, (base, *models) = states(tmp_path)
    models[1]["lm_head.weight"][0, 0] = np.inf
    models[2]["layers.0.weight"][0, 0] = np.nan
    for path, model in zip(paths[1:], models, strict=True):
        save_file(model, path)
    out = tmp_path / "out.safetensors"
    modelsoup.merge(
        paths[1:], out, base=paths[0], method="opcm", allow_nonfinite=["*"], fsync=False
    )
    found, spoilt = load_file(out), ("lm_head.weight", "layers.0.weight")
    kept = [{n: v for n, v in state.items() if n not in spoilt} for state in (base, *models)]
    for name, values in published(kept[0], kept[1:], 0.5).items():
        close(found[name], values, 1e-9)
    assert np.isnan(found["layers.0.weight"]).all()


def test_a_method_may_not_ask_of_a_tensor_and_of_the_model_at_once() -> None:
    def both(x: modelsoup.Tensor) -> Any:
        one = modelsoup.Sum(lambda b: b.model(0))
        yield [one, modelsoup.Total("all", one)]
        return modelsoup.WeightedSum((1,))

    mixed = modelsoup.Method("mixed", both, models=(1, 1))
    with pytest.raises(ParameterError, match="asks for t and for the whole model at once"):
        modelsoup.merge_arrays(mixed, [np.ones(3)], name="t")


# --- robust averages ------------------------------------------------------------------------------


@LAWS
@given(seed=st.integers(0, 2**32), count=st.integers(2, 6), weighted=st.booleans())
def test_no_step_away_from_the_geometric_median_is_better(
    seed: int, count: int, weighted: bool
) -> None:
    _, *models = drawn(seed, count, (20,))
    generator = np.random.default_rng(seed)
    weight = tuple(generator.uniform(0.2, 2, count)) if weighted else (1.0,) * count

    def cost(y: np.ndarray) -> float:
        return sum(w * float(np.linalg.norm(m - y)) for w, m in zip(weight, models, strict=True))

    found = modelsoup.merge_arrays("geometric_median", models, weight=weight)
    for scale in (1e-3, 1e-1):
        away = found + scale * generator.normal(size=20)
        assert cost(found) <= cost(away)
    for model in models:
        assert cost(found) <= cost(model) * (1 + 1e-12)


def test_a_majority_of_models_is_the_geometric_median() -> None:
    _, a, b, c = drawn(21, 3, (40,))
    np.testing.assert_array_equal(modelsoup.merge_arrays("geometric_median", [a, b, a, c, a]), a)


def test_a_model_far_away_moves_the_geometric_median_little() -> None:
    base, *models = drawn(22, 4, (100,))
    near = modelsoup.merge_arrays("geometric_median", models)
    far = modelsoup.merge_arrays("geometric_median", [*models[:3], 1e6 * models[3]])
    spread = np.linalg.norm(models[0] - models[1])
    assert np.linalg.norm(far - near) < spread
    assert np.linalg.norm(far - base) < spread


# --- weighted by data -----------------------------------------------------------------------------


def gram_of(seed: int, columns: int, samples: int = 40) -> np.ndarray:
    inputs = np.random.default_rng(seed).normal(size=(samples, columns))
    inputs = inputs @ np.random.default_rng(seed + 100).normal(size=(columns, columns))
    return inputs.T @ inputs


def test_fisher_weighs_each_element_by_its_information() -> None:
    _, *models = drawn(23, 3, (40,))
    fishers = [abs(array) for array in drawn(24, 3, (40,))[1:]]
    fishers[0][:7] = fishers[1][:7] = fishers[2][:7] = 0
    weight = (0.2, 0.3, 0.5)
    wanted = sum(w * f * m for w, f, m in zip(weight, fishers, models, strict=True))
    with np.errstate(invalid="ignore"):
        wanted /= sum(w * f for w, f in zip(weight, fishers, strict=True))
    wanted[:7] = sum(w * m[:7] for w, m in zip(weight, models, strict=True))
    found = modelsoup.merge_arrays("fisher", models, aux={"fisher": fishers}, weight=weight)
    close(found, wanted)


def test_fisher_of_one_model_or_of_copies_is_that_model() -> None:
    _, model = drawn(25, 1, (30,), np.float32)
    some, other = (abs(array) for array in drawn(26, 1, (30,), np.float32))
    one = modelsoup.merge_arrays("fisher", [model], aux={"fisher": [some]})
    np.testing.assert_array_equal(one, model)
    copies = modelsoup.merge_arrays("fisher", [model, model], aux={"fisher": [some, other]})
    close(copies, model, 1e-6)


def test_regmean_is_nearest_to_the_models_outputs_on_their_own_inputs() -> None:
    _, *models = drawn(27, 3, (4, 6))
    inputs = [np.random.default_rng(k).normal(size=(50, 6)) for k in range(3)]
    grams = [x.T @ x for x in inputs]
    options = {"aux": {"gram": grams}, "scale": 1.0}
    found = modelsoup.merge_arrays("regmean", models, **options)
    # Least squares: all inputs together, each with the outputs of its own model.
    outputs = [x @ w.T for x, w in zip(inputs, models, strict=True)]
    best = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs), rcond=None)[0].T
    close(found, best, 1e-9)


def test_regmean_shrinks_what_is_beside_the_diagonal() -> None:
    _, *models = drawn(28, 2, (3, 5))
    grams = [gram_of(k, 5) for k in range(2)]
    shrunk = [0.9 * gram + 0.1 * np.diag(np.diag(gram)) for gram in grams]
    wanted = sum(w @ g for w, g in zip(models, shrunk, strict=True)) @ np.linalg.inv(sum(shrunk))
    close(modelsoup.merge_arrays("regmean", models, aux={"gram": grams}), wanted, 1e-9)


def test_regmean_is_the_mean_where_no_data_tell_of_an_input() -> None:
    _, *models = drawn(29, 2, (3, 5))
    seen = [gram_of(k, 5) for k in range(2)]
    for gram in seen:
        gram[4, :] = gram[:, 4] = 0
    found = modelsoup.merge_arrays("regmean", models, aux={"gram": seen})
    close(found[:, 4], (models[0] + models[1])[:, 4] / 2, 1e-9)
    none = modelsoup.merge_arrays("regmean", models, aux={"gram": [np.zeros((5, 5))] * 2})
    close(none, (models[0] + models[1]) / 2)


def test_actmat_takes_the_task_vectors_for_the_inputs() -> None:
    base, *models = drawn(30, 3, (9, 5))
    deltas = [model - base for model in models]
    grams = [d.T @ d for d in deltas]
    wanted = sum(d @ g for d, g in zip(deltas, grams, strict=True)) @ np.linalg.inv(sum(grams))
    found = merged("actmat", [base, *models], **{"lambda": 0.7})
    close(found, base + 0.7 * wanted, 1e-9)


def with_data(folder: Path) -> tuple[list[Path], list[dict[str, np.ndarray]], list[dict[str, Any]]]:
    """Two models with a linear layer, a bias and a norm that has no data of its own."""
    models, beside, paths = [], [], []
    for k in range(2):
        _, weight = drawn(31 + k, 1, (300, 251), np.float32)
        _, bias, norm = drawn(33 + k, 2, (300,), np.float32)
        models.append({"fc.weight": weight, "fc.bias": bias, "norm": norm})
        fisher = {name: abs(models[-1][name] + k) for name in ("fc.weight", "fc.bias")}
        beside.append({"fisher": fisher, "gram": {"fc.weight": gram_of(k, 251, 400)}})
        paths.append(folder / f"model-{k}.safetensors")
        save_file(models[-1], paths[-1])
        for name, tensors in beside[-1].items():
            save_file(tensors, folder / f"{name}-{k}.safetensors")
    return paths, models, beside


@pytest.mark.parametrize(("method", "aux"), [("fisher", "fisher"), ("regmean", "gram")])
def test_files_are_merged_with_what_lies_beside_them(method: str, aux: str, tmp_path: Path) -> None:
    paths, models, beside = with_data(tmp_path)
    given_aux = [tmp_path / f"{aux}-{k}.safetensors" for k in range(2)]
    output = tmp_path / "out.safetensors"
    report = modelsoup.merge(paths, output, method=method, aux={aux: given_aux})
    found = load_file(output)
    for name in models[0]:
        data = [one[aux].get(name) for one in beside]
        wanted = modelsoup.merge_arrays(
            method, [model[name] for model in models],
            aux=None if data[0] is None else {aux: data}, name=name,
        )  # fmt: skip
        np.testing.assert_array_equal(found[name], wanted.astype(np.float32))
    told = [notice.message for notice in report.notices if notice.kind == "aux"]
    # Regmean has nothing to ask of what is no matrix.
    without = ["1 tensor is merged without fisher, which has none: norm"]
    assert told == (without if method == "fisher" else [])
    assert report.bytes_read == sum(path.stat().st_size for path in (*paths, *given_aux))
    assert modelsoup.verify(output).sound
    assert {check.name for check in modelsoup.verify(output).inputs} == {
        path.name for path in (*paths, *given_aux)
    }


def test_by_command_data_are_named_with_aux(tmp_path: Path) -> None:
    paths, _, _ = with_data(tmp_path)
    data = ",".join(str(tmp_path / f"fisher-{k}.safetensors") for k in range(2))
    outputs = [tmp_path / f"out-{k}.safetensors" for k in range(2)]
    config = tmp_path / "merge.yaml"
    config.write_text(
        "method: fisher\naux: {fisher: [fisher-0.safetensors, fisher-1.safetensors]}\n"
    )
    models = ["merge", *map(str, paths)]
    for output, options in zip(
        outputs,
        (["--method", "fisher", "--aux", f"fisher={data}"], ["--config", str(config)]),
        strict=True,
    ):
        done = CliRunner().invoke(main, [*models, *options, "-o", str(output)])
        assert done.exit_code == 0, done.output
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    known = [str(paths[0]), str(paths[1])]
    for aux, sentence in (
        ("fisher", "--aux has 'fisher', but must be NAME=A,B: one path a model"),
        ("fishr=a,b", "has no auxiliary input 'fishr'"),
    ):
        refused = ["merge", *known, "--method", "fisher", "--aux", aux, "-o", str(tmp_path / "x")]
        if "," in aux:
            refused[refused.index(aux)] = f"fishr={data}"
        done = CliRunner().invoke(main, refused)
        assert done.exit_code == 1
        assert sentence in " ".join(done.stderr.split())


def test_a_methods_page_tells_what_it_takes_beside_models_and_the_words_of_parameters() -> None:
    fisher = CliRunner().invoke(main, ["methods", "fisher"])
    assert "beside each model: fisher, the diagonal of the Fisher matrix" in fisher.stdout
    assert "at least 0" in fisher.stdout
    assert "mean, flatten" in CliRunner().invoke(main, ["methods", "tsv_m"]).stdout


def refused_data(folder: Path, method: str = "fisher", **aux: list[str]) -> str:
    paths = [folder / f"model-{k}.safetensors" for k in range(2)]
    given_aux = {name: [folder / f"{one}.safetensors" for one in of] for name, of in aux.items()}
    with pytest.raises(modelsoup.SoupError) as caught:
        modelsoup.merge(paths, folder / "out.safetensors", method=method, aux=given_aux)
    assert not (folder / "out.safetensors").exists()
    return str(caught.value)


def test_data_that_do_not_fit_are_told_with_their_file_and_tensor(tmp_path: Path) -> None:
    _, models, beside = with_data(tmp_path)
    assert refused_data(tmp_path).startswith(
        "'fisher' needs 'fisher' for each model (aux={'fisher': […]})"
    )
    both = ["fisher-0", "fisher-1"]
    assert "there is one 'fisher' for each model, but 1 checkpoint for 2" in refused_data(
        tmp_path, fisher=both[:1]
    )
    assert "'linear' has no auxiliary input 'fisher' (it has none)" in refused_data(
        tmp_path, "linear", fisher=both
    )
    save_file({"fc.weight": beside[1]["fisher"]["fc.weight"]}, tmp_path / "less.safetensors")
    assert "1 tensor is missing from less.safetensors, fisher of a model: fc.bias" in refused_data(
        tmp_path, fisher=["fisher-0", "less"]
    )
    wrong = {**beside[1]["fisher"], "fc.bias": np.ones(7, np.float32)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    assert (
        "1 tensor is without fisher of floats and the shape [300]: fc.bias (F32 [300] and F32 [7])"
        in refused_data(tmp_path, fisher=["fisher-0", "wrong"])
    )
    save_file({"module.fc.bias": models[0]["fc.bias"]}, tmp_path / "other.safetensors")
    assert (
        "no tensor that is merged has the name of one in 'fisher': module.fc.bias"
        in refused_data(tmp_path, fisher=["other", "other"])
    )
    save_file({"fc.weight": np.ones((300, 251), np.float32)}, tmp_path / "square.safetensors")
    assert "[251, 251]" in refused_data(tmp_path, "regmean", gram=["gram-0", "square"])


def test_data_that_are_not_finite_are_told_with_whose_they_are(tmp_path: Path) -> None:
    _, _, beside = with_data(tmp_path)
    beside[1]["gram"]["fc.weight"][250, 250] = np.nan
    save_file(beside[1]["gram"], tmp_path / "nan.safetensors")
    said = refused_data(tmp_path, "regmean", gram=["gram-0", "nan"])
    assert "fc.weight (1 in nan.safetensors, gram of model 2)" in said


def test_a_merge_with_data_is_known_by_its_lineage_and_is_a_plan_again(tmp_path: Path) -> None:
    paths, _, _ = with_data(tmp_path)
    given_aux = [tmp_path / f"fisher-{k}.safetensors" for k in range(2)]
    output = tmp_path / "out.safetensors"
    modelsoup.merge(paths, output, method="fisher", aux={"fisher": given_aux})
    lineage = modelsoup.read_lineage(output)
    assert lineage is not None
    assert [entry["name"] for entry in lineage["aux"]["fisher"]] == [p.name for p in given_aux]
    done = CliRunner().invoke(main, ["plan", "--from", str(output)])
    assert done.exit_code == 0
    assert "aux:\n      fisher: [fisher-0.safetensors, fisher-1.safetensors]" in done.output


# --- plans ----------------------------------------------------------------------------------------


def test_a_plan_tells_which_tensors_are_merged_as_matrices(tmp_path: Path) -> None:
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for path in paths:
        arrays = {"a.weight": (8, 6), "a.bias": (8,), "lm_head.weight": (9, 6)}
        save_file({name: np.zeros(shape, np.float32) for name, shape in arrays.items()}, path)
    models = [modelsoup.open_checkpoint(path) for path in paths]
    recipe = modelsoup.Recipe(method="iso_c")
    plan = modelsoup.plan_merge(models[1:], recipe, base=models[0])
    (notice,) = [notice for notice in plan.notices if notice.kind == "matrices"]
    # Three inputs, stored and as they are computed with, the result, and what is said of iso_c:
    # in float64 a matrix, its copy, U and Vᵀ twice, and four squares (8 / 6 is less than 11 / 6).
    need = (3 + 1 + 3) * 48 * 4 + 8 * (2 * 48 + 2 * (48 + 36) + 3 * 36)
    assert notice.message == (
        f"iso_c takes 1 tensor (48 parameters) as matrices, in up to {need / 1000:.2f} kB of "
        f"memory, and 2 tensors (62 parameters) otherwise"
    )
    assert set(notice.names) == {"lm_head.weight", "a.bias"}
    assert notice.level == "note"
    linear = modelsoup.plan_merge(models, modelsoup.Recipe())
    assert not [notice for notice in linear.notices if notice.kind == "matrices"]


MEASURE = """
import sys
import modelsoup
import numpy as np

def of_process(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

folder, name, parameters = sys.argv[1], sys.argv[2], eval(sys.argv[3])
small, large = (
    [f"{folder}/{size}-{k}.safetensors" for k in range(3)] for size in ("small", "large")
)
given = dict(method=name, parameters=parameters, workers=2, fsync=False)
out = f"{folder}/out.safetensors"
modelsoup.merge(small[1:], out, base=small[0], force=True, **given)  # what is loaded once
report = modelsoup.merge(large[1:], out, base=large[0], dry_run=True, force=True, **given)
said = max(step.whole_bytes for step in report.plan.steps)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = of_process("VmRSS")
modelsoup.merge(large[1:], out, base=large[0], force=True, **given)
print(said, of_process("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("shape", [(2100, 2000), (5000, 900), (900, 5000)])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tsv_m", {}),
        ("iso_c", {}),
        ("iso_cts", {}),
        ("wudi", {"t": 3.0}),
        ("svc", {}),
        ("actmat", {}),
        ("opcm", {}),
    ],
)
def test_the_memory_that_a_plan_tells_is_what_the_merge_takes(
    name: str, given: dict[str, Any], shape: tuple[int, int], tmp_path: Path
) -> None:
    for size, of in (("small", (40, 30)), ("large", shape)):
        for k, array in enumerate(drawn(0, 2, of, np.float32)):
            save_file({"w": array}, tmp_path / f"{size}-{k}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), name, repr(given)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said, measured = map(int, done.stdout.split())
    assert 0.9 * said <= measured <= 1.1 * said
