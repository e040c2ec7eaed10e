"""Low-rank adapters: read by all names, merged, made of a difference, folded into a base."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup.errors import MismatchError, SoupError
from modelsoup.files.adapters import Adapter, Base, open_adapter, stored_factors
from modelsoup.files.checkpoint import Checkpoint, TensorInfo
from modelsoup.files.writer import OutputTensor, layout
from modelsoup.merging.engine import SLICE
from modelsoup.merging.factors import CoreSpace, distance, nearest_factors, of_rank, residual
from modelsoup.merging.forms import BLOCK, Tensor, Whole
from modelsoup.merging.merge import _execute
from modelsoup.merging.methods import registry
from modelsoup.terminal.cli import main

Arrays = dict[str, np.ndarray]
PEFT = "base_model.model."


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def peft(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    names = {f"{PEFT}{name}": np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def pair(module: str, rows: int, columns: int, rank: int = 2, seed: int = 0) -> Arrays:
    return {
        f"{module}.lora_A.weight": draw(rank, columns, seed=seed),
        f"{module}.lora_B.weight": draw(rows, rank, seed=seed),
    }


def updates(adapter: Adapter | Path) -> Arrays:
    """What an adapter adds to each weight, whole and in float64."""
    opened = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    found = {}
    for module, update in opened.updates.items():
        up, down = stored_factors(opened, update, np.dtype(np.float64))
        found[module] = update.scale * up @ down
    return found


def assert_close(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6 * np.abs(value).max())


# What an adapter says.


def test_an_update_is_alpha_over_the_rank_of_the_module_times_the_product(tmp_path: Path):
    tensors = {**pair("a.q", 5, 3), **pair("a.v", 4, 3, rank=3), **pair("b.v", 4, 3)}
    adapter = peft(tmp_path / "a", tensors, alpha_pattern={"^a\\.v": 9, "b.v": 1})
    b, a = (tensors[f"a.q.lora_{letter}.weight"].astype(float) for letter in "BA")
    found = updates(adapter)
    np.testing.assert_allclose(found["a.q"], 4 / 2 * b @ a)
    assert {m: u.scale for m, u in open_adapter(adapter).updates.items()} == {
        "a.q": 2, "a.v": 3, "b.v": 0.5,
    }  # fmt: skip


def test_a_rank_stabilised_update_is_scaled_by_the_root_of_its_rank(tmp_path: Path):
    adapter = peft(tmp_path / "a", pair("a", 9, 9, rank=4), use_rslora=True, lora_alpha=3)
    assert open_adapter(adapter).updates["a"].scale == 3 / math.sqrt(4)


def test_of_several_patterns_that_fit_a_module_the_first_says_its_alpha(tmp_path: Path):
    tensors = {**pair("x.proj", 3, 3), **pair("proj", 3, 3)}
    adapter = peft(tmp_path / "a", tensors, alpha_pattern={"x.proj": 2, "proj": 6})
    assert {m: u.scale for m, u in open_adapter(adapter).updates.items()} == {
        "x.proj": 1,
        "proj": 3,
    }


def test_an_embeddings_product_is_added_transposed(tmp_path: Path):
    a, b = draw(2, 11), draw(5, 2)
    tensors = {"emb.lora_embedding_A": a, "emb.lora_embedding_B": b}
    adapter = peft(tmp_path / "a", tensors)
    np.testing.assert_allclose(updates(adapter)["emb"], 2 * (b.astype(float) @ a).T, rtol=1e-6)


def test_weights_that_are_stored_with_inputs_first_get_the_product_transposed(tmp_path: Path):
    tensors = pair("c", 6, 3)
    adapter = peft(tmp_path / "a", tensors, fan_in_fan_out=True)
    assert updates(adapter)["c"].shape == (3, 6)


KOHYA = {
    "lora_unet_mid_to_q.lora_up.weight": draw(4, 2),
    "lora_unet_mid_to_q.lora_down.weight": draw(2, 3),
    "lora_unet_mid_to_q.alpha": np.array(1.0, np.float32),
}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int64])
def test_kohyas_alpha_is_a_tensor_of_any_dtype(tmp_path: Path, kind: Any):
    file = tmp_path / "k.safetensors"
    save_file({**KOHYA, "lora_unet_mid_to_q.alpha": np.array(1, kind)}, file)
    opened = open_adapter(file)
    assert opened.naming == "kohya" and opened.updates["lora_unet_mid_to_q"].scale == 0.5


def test_without_an_alpha_kohyas_and_diffusers_products_are_added_as_they_are(tmp_path: Path):
    file = tmp_path / "k.safetensors"
    save_file({n: v for n, v in KOHYA.items() if not n.endswith("alpha")}, file)
    assert open_adapter(file).updates["lora_unet_mid_to_q"].scale == 1


@pytest.mark.parametrize(
    ("up", "down", "module"),
    [
        ("unet.a.to_q.lora_B.weight", "unet.a.to_q.lora_A.weight", "unet.a.to_q"),
        ("unet.a.to_q.lora_B.x.weight", "unet.a.to_q.lora_A.x.weight", "unet.a.to_q"),
        ("unet.a.to_q.lora.up.weight", "unet.a.to_q.lora.down.weight", "unet.a.to_q"),
        ("te.fc.lora_linear_layer.up.weight", "te.fc.lora_linear_layer.down.weight", "te.fc"),
        ("a.processor.to_q_lora.up.weight", "a.processor.to_q_lora.down.weight", "a.to_q"),
        ("a.processor.to_out_lora.up.weight", "a.processor.to_out_lora.down.weight", "a.to_out.0"),
    ],
)
def test_each_of_diffusers_names_is_of_the_module_that_it_means(
    tmp_path: Path, up: str, down: str, module: str
):
    file = tmp_path / "d.safetensors"
    save_file({up: draw(4, 2), down: draw(2, 3)}, file)
    opened = open_adapter(file)
    assert opened.naming == "diffusers" and [*opened.updates] == [module]


def test_diffusers_metadata_says_how_a_part_is_scaled(tmp_path: Path):
    file = tmp_path / "d.safetensors"
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"b": 2}, "unet.r": 2}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file({**pair("unet.a", 3, 3), **pair("unet.b", 3, 3)}, file, metadata)
    assert [u.scale for u in open_adapter(file).updates.values()] == [4, 1]


def test_a_convolution_is_the_product_of_its_flattened_factors(tmp_path: Path):
    up, down = draw(4, 2, 1, 1), draw(2, 3, 3, 3)
    file = tmp_path / "k.safetensors"
    save_file({"lora_unet_c.lora_up.weight": up, "lora_unet_c.lora_down.weight": down}, file)
    wanted = np.einsum("pr,rckl->pckl", up[..., 0, 0].astype(float), down)
    np.testing.assert_allclose(updates(file)["lora_unet_c"], wanted.reshape(4, -1), rtol=1e-6)


def test_a_convolution_of_three_factors_is_tuckers_product(tmp_path: Path):
    up, mid, down = draw(4, 2, 1, 1), draw(2, 2, 3, 3), draw(2, 5, 1, 1)
    file = tmp_path / "k.safetensors"
    names = ("lora_up", "lora_mid", "lora_down")
    save_file({f"lora_c.{n}.weight": v for n, v in zip(names, (up, mid, down), strict=True)}, file)
    wanted = np.einsum("ijkl,jc,pi->pckl", mid.astype(float), down[..., 0, 0], up[..., 0, 0])
    np.testing.assert_allclose(updates(file)["lora_c"], wanted.reshape(4, -1), rtol=1e-5)


def test_what_an_adapter_saves_whole_is_called_as_the_base_calls_it(tmp_path: Path):
    tensors = {
        **pair("fc", 3, 3),
        "fc.base_layer.bias": draw(3),
        "score.weight": draw(2, 3),
        "old.modules_to_save.weight": draw(2),
        "old.original_module.weight": draw(2),
    }
    opened = open_adapter(peft(tmp_path / "a", tensors))
    assert [*opened.whole] == ["fc.bias", "old.weight", "score.weight"]


# What is none, or of another kind.


def refused(path: Path) -> str:
    with pytest.raises(SoupError) as caught:
        open_adapter(path)
    return str(caught.value).replace(str(path), "X")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_a.hada_w1_a", "LoHa"),
        ("lora_unet_a.lokr_w1", "LoKr"),
        ("lora_unet_a.oft_blocks", "OFT"),
        ("base_model.model.a.ia3_l", "IA3"),
        ("base_model.model.a.lora_E", "AdaLoRA"),
        ("base_model.model.a.vera_lambda_b", "VeRA"),
        ("base_model.model.a.token_adapter.trainable_tokens_delta", "trainable tokens"),
        ("model.a.lora_a", "MLX' LoRA"),
        ("a.processor.proj_lora1.down.weight", "LoRA of several in one module"),
    ],
)
def test_an_adapter_of_another_kind_is_named(tmp_path: Path, name: str, kind: str):
    file = tmp_path / "x.safetensors"
    save_file({name: draw(2, 2)}, file)
    assert refused(file) == (
        f"X is of the kind {kind} ({name}), which is not known to be a product of two factors: it "
        f"cannot be merged"
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "VERA"}, "is of the kind 'VERA'"),
        ({"layer_replication": [[0, 2]]}, "has layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"lora_alpha": "much"}, "alpha is 'much', not a number"),
        ({"alpha_pattern": {".*(q|v)": 3}}, "the regular expression '.*(q|v)'"),
    ],
)
def test_a_config_by_which_products_are_not_what_is_added_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str
):
    assert said in refused(peft(tmp_path / "a", pair("q", 3, 3), **config))


def test_pefts_names_without_a_config_have_no_scale(tmp_path: Path):
    folder = peft(tmp_path / "a", pair("q", 3, 3))
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json beside it" in refused(folder)


def test_a_factor_alone_and_factors_that_do_not_fit_are_named(tmp_path: Path):
    alone = peft(tmp_path / "a", {"q.lora_A.weight": draw(2, 3)})
    assert refused(alone) == (f"X has '{PEFT}q.lora_A.weight' without the factor that goes with it")
    tensors = {"q.lora_A.weight": draw(2, 3), "q.lora_B.weight": draw(3, 3)}
    misfit = refused(peft(tmp_path / "b", tensors))
    assert misfit == (
        f"X: factors that cannot be multiplied: {PEFT}q.lora_B.weight [3, 3] and "
        f"{PEFT}q.lora_A.weight [2, 3]"
    )


@pytest.mark.parametrize(("rank", "rows"), [(0, 3), (2, 0)])
def test_factors_without_elements_are_refused(tmp_path: Path, rank: int, rows: int):
    adapter = peft(tmp_path / "a", pair("q", rows, 3, rank))
    assert "factors that cannot be multiplied" in refused(adapter)


def test_a_model_is_no_adapter(tmp_path: Path):
    file = tmp_path / "m.safetensors"
    save_file({"a.weight": draw(2, 2)}, file)
    assert "X holds no low-rank adapter: of its 1 tensor none is called as factors are" in (
        refused(file)
    )


def test_two_adapters_in_one_file_are_refused(tmp_path: Path):
    tensors = {**pair("q", 3, 3), "q.lora_A.other.weight": draw(2, 3)}
    assert "holds two adapters of 'q'" in refused(peft(tmp_path / "a", tensors))


# Which weight of a base a module means.


def found(names: list[str], module: str, naming: str = "diffusers") -> str:
    checkpoint = Checkpoint(Path("lora"), (), {}, {}, is_folder=False)
    adapter = Adapter(checkpoint, naming, {}, {}, {})  # type: ignore[arg-type]
    infos = {name: TensorInfo(name, "F32", (2, 2), Path(), 0, 16) for name in names}
    return Base(infos).tensor(adapter, f"{module}.weight")


@pytest.mark.parametrize(
    ("naming", "module", "name"),
    [
        ("peft", "model.a.q", "model.a.q.weight"),
        ("peft", "a.q", "model.a.q.weight"),
        ("peft", "transformer.b.q", "b.q.weight"),
        ("diffusers", "unet.down.0.to_q", "unet/down.0.to_q.weight"),
        ("diffusers", "text_encoder_2.fc", "text_encoder_2/fc.weight"),
        ("kohya", "lora_unet_down_0_to_q", "unet/down.0.to_q.weight"),
        ("kohya", "lora_te1_fc", "text_encoder/fc.weight"),
        ("kohya", "lora_te_fc", "text_encoder/fc.weight"),
        ("kohya", "lora_te2_fc", "text_encoder_2/fc.weight"),
        (
            "kohya",
            "lora_unet_input_blocks_1_proj",
            "model.diffusion_model.input_blocks.1.proj.weight",
        ),
    ],
)
def test_a_module_is_found_by_what_the_base_calls_it(naming: str, module: str, name: str):
    names = [
        "model.a.q.weight", "b.q.weight", "unet/down.0.to_q.weight", "text_encoder/fc.weight",
        "text_encoder_2/fc.weight", "model.diffusion_model.input_blocks.1.proj.weight",
    ]  # fmt: skip
    assert found(names, module, naming) == name


def test_a_module_that_the_base_lacks_is_named_with_the_nearest():
    absent = (
        r"lora is for 'layers\.0\.q_proi', which the base does not have; did you mean "
        r"'layers\.0\.q_proj'\?"
    )
    with pytest.raises(MismatchError, match=absent):
        found(["layers.0.q_proj.weight", "norm.weight"], "layers.0.q_proi")
    with pytest.raises(MismatchError, match=r"did you mean 'down\.0\.to_q'"):
        found(["down.0.to_q.weight"], "lora_unet_down_0_to_k", "kohya")


def test_a_module_that_may_be_either_of_two_is_not_guessed():
    with pytest.raises(MismatchError, match=r"which may be any of a_b\.c\.weight, a\.b_c\.weight"):
        found(["a_b.c.weight", "a.b_c.weight"], "lora_unet_a_b_c", "kohya")
    with pytest.raises(MismatchError, match=r"any of encoder\.0\.q\.weight, decoder"):
        found(["encoder.0.q.weight", "decoder.0.q.weight"], "0.q")


# Merged into one.


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_sum_of_adapters_is_the_sum_of_what_they_add(
    tmp_path_factory: pytest.TempPathFactory, ranks: list[int], weights: list[float], seed: int
):
    folder = tmp_path_factory.mktemp("sum")
    made = [
        peft(folder / str(k), pair("q", 7, 6, rank, seed + k), lora_alpha=3 + k, use_rslora=k == 1)
        for k, rank in enumerate(ranks)
    ]
    modelsoup.merge_adapters(made, folder / "out", weights=weights[: len(made)])
    wanted = sum(w * updates(a)["q"] for w, a in zip(weights, made, strict=False))
    scale = max(np.abs(w * updates(a)["q"]).max() for w, a in zip(weights, made, strict=False))
    np.testing.assert_allclose(
        updates(folder / "out")["q"], wanted, rtol=0, atol=1e-6 * scale + 1e-30
    )


def test_one_adapter_of_weight_one_is_itself_bit_by_bit(tmp_path: Path):
    tensors = {**pair("q", 5, 4), **pair("v", 4, 4, rank=3)}
    one = peft(tmp_path / "a", tensors, lora_alpha=0.7, rank_pattern={"v": 3})
    report = modelsoup.merge_adapters([one], tmp_path / "out")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (one, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert [f.scale for f in open_adapter(tmp_path / "out").updates.values()] == [
        pytest.approx(0.7 / 2), pytest.approx(0.7 / 3),
    ]  # fmt: skip
    assert all(fit.error < 1e-15 for fit in report.fits)


def test_ranks_are_cut_to_the_best_product_and_the_error_is_told(tmp_path: Path):
    a, b = (peft(tmp_path / n, pair("q", 8, 6, seed=k)) for k, n in enumerate("ab"))
    report = modelsoup.merge_adapters([a, b], tmp_path / "out", rank=3)
    whole, found = updates(a)["q"] + updates(b)["q"], updates(tmp_path / "out")["q"]
    values = np.linalg.svd(whole, compute_uv=False)
    best = np.linalg.norm(values[3:]) / np.linalg.norm(values)
    (fit,) = report.fits
    assert fit.rank == 3 and fit.error == pytest.approx(best, rel=1e-4)
    assert np.linalg.norm(found - whole) / np.linalg.norm(whole) == pytest.approx(best, rel=1e-4)


def test_in_core_space_a_linear_method_is_the_sum_and_ties_is_ties_of_the_cores(tmp_path: Path):
    a, b = (peft(tmp_path / n, pair("q", 8, 6, seed=k)) for k, n in enumerate("ab"))
    products = [
        tuple(f.astype(np.float64) for f in stored_factors(o, o.updates["q"]))
        for o in map(open_adapter, (a, b))
    ]
    space = CoreSpace(products)  # type: ignore[arg-type]
    up, down = space.factors(0.7 * space.cores[0] + 0.3 * space.cores[1])
    linear = 0.7 * products[0][0] @ products[0][1] + 0.3 * products[1][0] @ products[1][1]
    np.testing.assert_allclose(up @ down, linear, atol=1e-12)

    given: Any = {"weight": [0.7, 0.3], "density": 0.5}
    core = modelsoup.merge_arrays(
        "ties", space.cores, base=np.zeros_like(space.cores[0]), name="q", **given
    )
    up, down = space.factors(core)
    modelsoup.merge_adapters(
        [a, b], tmp_path / "out", weights=[0.7, 0.3], method="ties", parameters={"density": 0.5}
    )
    np.testing.assert_allclose(updates(tmp_path / "out")["q"], 2 * up @ down, atol=1e-5)


def test_lines_scales_what_adapters_add_by_the_depth_of_its_layer(tmp_path: Path):
    modules = [f"model.layers.{i}.q" for i in range(3)]
    head = {"lm_head.lora_A.weight": draw(2, 6, seed=9), "lm_head.lora_B.weight": draw(8, 2)}
    a, b = (
        peft(tmp_path / n, {
            name: value for m in modules for name, value in pair(m, 8, 6, seed=k).items()
        } | head)
        for k, n in enumerate("ab")
    )  # fmt: skip
    out, given = tmp_path / "out", {"shallow": 0.2, "deep": 0.8}
    modelsoup.merge_adapters([a, b], out, weights=[0.7, 0.3], method="lines", parameters=given)
    scales = dict(zip([*modules, "lm_head"], [0.2, 0.5, 0.8, 0.2], strict=True))
    one, other = updates(a), updates(b)
    wanted = {m: s * (0.7 * one[m] + 0.3 * other[m]) for m, s in scales.items()}
    assert_close(updates(out), wanted)


def test_a_method_that_goes_by_depth_is_refused_where_nothing_is_in_a_layer(tmp_path: Path):
    a = peft(tmp_path / "a", pair("q", 5, 4))
    message = merging_fails(a, method="lines", parameters={"shallow": 0.5})
    assert message == (
        "'lines' goes by the depth of layers, but nothing in the adapters is in one: nothing has a "
        "name like 'layers.0.q_proj' or 'blocks.0.to_q'"
    )


def test_in_core_space_singular_vectors_are_made_orthogonal_as_those_of_the_whole(tmp_path: Path):
    a, b = (peft(tmp_path / n, pair("q", 8, 6, seed=k)) for k, n in enumerate("ab"))
    modelsoup.merge_adapters([a, b], tmp_path / "out", method="tsv_m")

    def polar(matrix: np.ndarray) -> np.ndarray:
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        return np.asarray(u @ v)

    triplets = [np.linalg.svd(updates(path)["q"], full_matrices=False) for path in (a, b)]
    left = polar(np.hstack([u[:, :2] for u, _, _ in triplets]))
    values = np.concatenate([s[:2] for _, s, _ in triplets])
    right = polar(np.vstack([v[:2] for _, _, v in triplets]))
    assert_close(updates(tmp_path / "out"), {"q": left * values @ right})


def test_what_asks_of_whole_models_is_done_over_a_base_and_not_in_core_space(tmp_path: Path):
    shapes = {"layers.0.q": (9, 7), "layers.1.q": (6, 8)}
    base = {f"{name}.weight": draw(*shape, seed=9) for name, shape in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    adapters = []
    for seed in (1, 2):
        tensors: Arrays = {}
        for name, shape in shapes.items():
            tensors |= pair(name, *shape, seed=seed)
        adapters.append(peft(tmp_path / f"{seed}", tensors))
        dense = {f"{m}.weight": base[f"{m}.weight"] + d for m, d in updates(adapters[-1]).items()}
        save_file(
            {n: d.astype(np.float32) for n, d in dense.items()}, f"{adapters[-1]}.safetensors"
        )
    out = tmp_path / "out"
    for method in ({"method": "opcm"}, {"method": "emr", "parameters": {"expert": 1}}):
        said = f"'{method['method']}' asks of whole models what the space of the adapters does not"
        with pytest.raises(SoupError, match=said):
            modelsoup.merge_adapters(adapters, out, **method)
        assert not out.exists()
    given = [word for adapter in adapters for word in ("--lora", adapter)]
    done = soup(
        "merge",
        tmp_path / "base.safetensors",
        "--method",
        "opcm",
        *given,
        "-o",
        f"{out}.safetensors",
    )
    assert done.exit_code == 0, done.output
    whole = tmp_path / "whole.safetensors"
    modelsoup.merge(
        [f"{adapter}.safetensors" for adapter in adapters], whole,
        base=tmp_path / "base.safetensors", method="opcm",
    )  # fmt: skip
    assert_close(load_file(f"{out}.safetensors"), load_file(whole))


def test_a_module_of_too_low_a_rank_for_a_method_is_named(tmp_path: Path):
    a, b = (peft(tmp_path / n, pair("row.q", 1, 6)) for n in "ab")
    message = merging_fails(a, b, method="tsv_m")
    assert "which is none of row.q, of rank 1, with 2 models" in message


def test_what_comes_out_of_core_space_has_no_more_rank_than_the_module(tmp_path: Path):
    a, b = (peft(tmp_path / n, pair("q", 3, 6, rank=2, seed=k)) for k, n in enumerate("ab"))
    report = modelsoup.merge_adapters([a, b], tmp_path / "out", method="ties")
    (fit,) = report.fits
    assert fit.rank == 3 and fit.error < 1e-6


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "sce", "model_stock"])
def test_adapters_that_add_nothing_are_merged_to_one_that_adds_nothing(tmp_path: Path, method: str):
    nothing = pair("q", 5, 4) | {"q.lora_B.weight": np.zeros((5, 2), np.float32)}
    a, b = (peft(tmp_path / n, nothing) for n in "ab")
    modelsoup.merge_adapters([a, b], tmp_path / "out", method=method)
    np.testing.assert_array_equal(updates(tmp_path / "out")["q"], np.zeros((5, 4)))


def test_a_module_that_only_one_adapter_has_is_nothing_in_the_others(tmp_path: Path):
    a = peft(tmp_path / "a", {**pair("q", 5, 4), **pair("v", 4, 4)})
    b = peft(tmp_path / "b", pair("q", 5, 4, seed=1))
    for method in ("task_arithmetic", "ties"):
        out = tmp_path / method
        report = modelsoup.merge_adapters([a, b], out, method=method, weights=[0.5, 0.5])
        assert [n.names for n in report.notices] == [("v",)]
        share = 0.5 if method == "task_arithmetic" else 1  # ties divides by what agrees
        np.testing.assert_allclose(updates(out)["v"], share * updates(a)["v"], atol=1e-5)


def test_kohyas_adapters_become_one_of_kohyas(tmp_path: Path):
    files = [tmp_path / f"{n}.safetensors" for n in "ab"]
    for k, file in enumerate(files):
        conv = {
            "lora_te_c.lora_up.weight": draw(4, 3, 1, 1, seed=k),
            "lora_te_c.lora_mid.weight": draw(3, 2, 3, 3, seed=k),
            "lora_te_c.lora_down.weight": draw(2, 5, 1, 1, seed=k),
        }
        save_file({**KOHYA, **conv, "lora_te_c.diff_b": draw(4, seed=k)}, file)
    out = tmp_path / "out.safetensors"
    modelsoup.merge_adapters(files, out, weights=[2, -1])
    tensors = load_file(out)
    assert tensors["lora_te_c.lora_down.weight"].shape == (6, 5, 3, 3)
    np.testing.assert_allclose(
        tensors["lora_te_c.diff_b"], 2 * draw(4) - draw(4, seed=1), rtol=1e-6
    )
    one, other = map(updates, files)
    assert_close(updates(out), {name: 2 * one[name] - other[name] for name in one})


def test_biases_of_factors_are_added_as_their_products_are(tmp_path: Path):
    made = []
    for k, name in enumerate("ab"):
        tensors = {**pair("q", 3, 3, seed=k), "q.lora_B.bias": draw(3, seed=k)}
        made.append(peft(tmp_path / name, tensors, lora_alpha=2 + 4 * k, lora_bias=True))
    modelsoup.merge_adapters(made, tmp_path / "out", weights=[1, 2])
    added = open_adapter(tmp_path / "out").added["q.bias"]
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"{PEFT}q.lora_B.bias"]
    np.testing.assert_allclose(added.scale * stored, draw(3) + 6 * draw(3, seed=1), rtol=1e-6)


def merging_fails(*paths: Path, **how: Any) -> str:
    out = paths[0].parent / "out"
    with pytest.raises(SoupError) as caught:
        modelsoup.merge_adapters(paths, out, **how)
    assert not out.exists() and not [*out.parent.glob(".*")]
    return str(caught.value)


def test_adapters_of_different_models_are_refused_by_module(tmp_path: Path):
    a, b = peft(tmp_path / "a", pair("q", 5, 4)), peft(tmp_path / "b", pair("q", 5, 3))
    assert merging_fails(a, b) == (
        f"the adapters are for different models: 'q' is [5, 4] in {a} and [5, 3] in {b}"
    )


def test_what_cannot_be_added_up_without_the_base_is_refused(tmp_path: Path):
    a, b = (
        peft(tmp_path / n, {**pair("q", 5, 4), "head.weight": draw(2, 2, seed=k)})
        for k, n in enumerate("ab")
    )
    assert merging_fails(a, b) == (
        f"{a} and {b} have 'head.weight' whole, not as an update, and they differ (base=… has them "
        f"merged)"
    )
    tensors = {**pair("q", 5, 4), "q.lora_magnitude_vector": draw(5)}
    dora = peft(tmp_path / "dora", tensors, use_dora=True)
    assert "has DoRA's magnitudes" in merging_fails(dora)


def test_over_the_base_what_adapters_have_whole_is_merged_as_task_vectors_are(tmp_path: Path):
    head = draw(2, 2, seed=9)
    base = saved(tmp_path / "base.safetensors", {"q.weight": draw(5, 4), "head.weight": head})
    a, b, c = (
        peft(tmp_path / n, {**pair("q", 5, 4, seed=k), "head.weight": draw(2, 2, seed=k)})
        for k, n in enumerate("abc")
    )
    (c / "adapter_model.safetensors").unlink()
    save_file(
        {f"{PEFT}{n}": v for n, v in pair("q", 5, 4).items()}, c / "adapter_model.safetensors"
    )
    out = tmp_path / "out"
    modelsoup.merge_adapters([a, b, c], out, weights=[0.7, 0.2, 5], base=base)
    wanted = head + 0.7 * (draw(2, 2) - head) + 0.2 * (draw(2, 2, seed=1) - head)
    found = load_file(out / "adapter_model.safetensors")[f"{PEFT}head.weight"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert_close(fold(base, [out]), fold(base, {a: 0.7, b: 0.2, c: 5}))


def test_a_head_that_all_adapters_share_is_kept(tmp_path: Path):
    a, b = (
        peft(tmp_path / n, {**pair("q", 5, 4, seed=k), "head.weight": draw(2, 2)},
             modules_to_save=["head"])
        for k, n in enumerate("ab")
    )  # fmt: skip
    report = modelsoup.merge_adapters([a, b], tmp_path / "out")
    assert report.whole == ("head.weight",) and [n.kind for n in report.notices] == ["whole"]
    opened = open_adapter(tmp_path / "out")
    assert opened.config["modules_to_save"] == ["head"] and [*opened.whole] == ["head.weight"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"rank": 0}, "rank is 0, but must be a positive integer"),
        ({"weights": [1]}, "weights is [1], but must be 2 numbers, one an adapter"),
        ({"method": "tiess"}, "no merge method is called 'tiess'; did you mean 'ties'"),
        ({"method": "slerp", "parameters": {"t": 0.5}, "weights": [1, 2]}, "mean nothing to"),
        ({"parameters": {"lamda": 2}}, "did you mean 'lambda'?"),
    ],
)
def test_a_wrong_wish_is_one_sentence_and_no_output(tmp_path: Path, how: Any, said: str):
    a, b = (peft(tmp_path / n, pair("q", 5, 4)) for n in "ab")
    assert said in merging_fails(a, b, **how)


@pytest.mark.parametrize("seed", [-1, 2**63, "a", True, 0.5])
def test_a_seed_that_no_lineage_can_hold_is_refused_and_leaves_no_output(tmp_path: Path, seed: Any):
    a = peft(tmp_path / "a", pair("q", 5, 4))
    said = f"seed is {seed!r}, not an integer"
    assert merging_fails(a, seed=seed).startswith(said)
    paths = models(tmp_path, BASE, {**BASE, "q.weight": BASE["q.weight"] + 1})
    with pytest.raises(SoupError, match=said):
        modelsoup.extract_adapter(*paths, tmp_path / "out", seed=seed)
    assert not (tmp_path / "out").exists()


def test_nan_in_a_factor_leaves_no_output(tmp_path: Path):
    bad = pair("q", 5, 4)
    bad["q.lora_A.weight"][0, 0] = np.nan
    message = merging_fails(peft(tmp_path / "a", bad))
    assert message.startswith(f"NaN or infinity in {PEFT}q.lora_A.weight")


def test_pefts_adapters_are_folders_and_others_files(tmp_path: Path):
    a = peft(tmp_path / "a", pair("q", 5, 4))
    with pytest.raises(SoupError, match="name a folder"):
        modelsoup.merge_adapters([a], tmp_path / "out.safetensors")
    save_file(KOHYA, tmp_path / "k.safetensors")
    with pytest.raises(SoupError, match="name one file"):
        modelsoup.merge_adapters([tmp_path / "k.safetensors"], tmp_path / "out")


# Made of a difference.


def models(tmp_path: Path, base: Arrays, tuned: Arrays) -> tuple[Path, Path]:
    paths = tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"
    for path, tensors in zip(paths, (tuned, base), strict=True):
        save_file({name: np.asarray(value) for name, value in tensors.items()}, path)
    return paths


BASE = {
    "embed_tokens.weight": draw(30, 12), "q.weight": draw(20, 12), "q.bias": draw(20),
    "conv.weight": draw(6, 4, 3, 3), "norm.weight": draw(12), "norm.bias": draw(12),
    "same.weight": draw(5, 5), "steps": np.array(3),
}  # fmt: skip


def test_what_was_a_low_rank_update_is_found_again(tmp_path: Path):
    added = {
        "embed_tokens.weight": draw(30, 3, seed=1) @ draw(3, 12, seed=1),
        "q.weight": draw(20, 3, seed=2) @ draw(3, 12, seed=2),
        "conv.weight": (draw(6, 3, seed=3) @ draw(3, 36, seed=3)).reshape(6, 4, 3, 3),
    }
    tuned = {name: value + added.get(name, np.zeros_like(value)) for name, value in BASE.items()}
    report = modelsoup.extract_adapter(*models(tmp_path, BASE, tuned), tmp_path / "out", rank=3)
    assert {fit.module: fit.rank for fit in report.fits} == {
        "conv": 3, "embed_tokens": 3, "q": 3,
    }  # fmt: skip
    assert all(fit.error < 1e-6 for fit in report.fits) and not report.whole
    for name, update in updates(tmp_path / "out").items():
        wanted = added[f"{name}.weight"]
        np.testing.assert_allclose(update.reshape(wanted.shape), wanted, atol=1e-5)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert f"{PEFT}embed_tokens.lora_embedding_A" in names


def test_an_extracted_adapters_error_is_that_of_the_nearest_matrix_nearly(tmp_path: Path):
    tuned = {**BASE, "q.weight": BASE["q.weight"] + draw(20, 12, seed=5)}
    report = modelsoup.extract_adapter(*models(tmp_path, BASE, tuned), tmp_path / "out", rank=4)
    values = np.linalg.svd(draw(20, 12, seed=5), compute_uv=False)
    best = np.linalg.norm(values[4:]) / np.linalg.norm(values)
    (fit,) = report.fits
    assert fit.error == pytest.approx(best, rel=1e-4)
    found = updates(tmp_path / "out")["q"]
    own = np.linalg.norm(found - draw(20, 12, seed=5)) / np.linalg.norm(values)
    assert own == pytest.approx(fit.error, rel=1e-4)


def test_what_no_factors_can_say_is_in_the_adapter_whole(tmp_path: Path):
    tuned = {
        **BASE, "q.weight": BASE["q.weight"] + 1, "q.bias": BASE["q.bias"] + 1,
        "norm.weight": BASE["norm.weight"] + 1, "head.weight": draw(2, 12), "steps": np.array(4),
    }  # fmt: skip
    report = modelsoup.extract_adapter(*models(tmp_path, BASE, tuned), tmp_path / "out", rank=2)
    opened = open_adapter(tmp_path / "out")
    assert [*opened.updates] == ["q"]
    assert {*opened.whole} == {"q.bias", "norm.weight", "norm.bias", "head.weight"}
    assert opened.config["modules_to_save"] == ["head", "norm"] and opened.config["bias"] == "all"
    assert [notice.names for notice in report.notices] == [("steps",)]


def test_the_same_extraction_gives_the_same_bytes_and_a_pattern_keeps_tensors_whole(
    tmp_path: Path,
):
    tuned = {name: value + 1 for name, value in BASE.items()}
    paths = models(tmp_path, BASE, tuned)
    for name in ("one", "two"):
        modelsoup.extract_adapter(*paths, tmp_path / name, rank=2, whole=["conv.*"])
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    np.testing.assert_array_equal(
        load_file(one)[f"{PEFT}conv.weight"], tuned["conv.weight"]
    )  # fmt: skip


def test_a_matrix_that_is_read_by_rows_has_the_factors_of_the_whole():
    matrix = draw(300, 5, seed=1) @ draw(5, 200, seed=2) + 1e-3 * draw(300, 200, seed=3)

    def blocks(rows: int) -> Any:
        return lambda: ((k, matrix[k : k + rows]) for k in range(0, 300, rows))

    found = [
        nearest_factors(blocks(rows), (300, 200), 5, np.random.default_rng(0)) for rows in (300, 7)
    ]
    assert distance(*found) < 1e-5
    best = of_rank((np.eye(300), matrix), 5)
    assert residual(blocks(300), found[1]) == pytest.approx(residual(blocks(300), best), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "does not differ from"),
        ({"q.weight": draw(21, 12)}, r"'q.weight' is \[21, 12\] in .* and \[20, 12\] in"),
        ({"q.weight": np.full((20, 12), np.nan, np.float32)}, "NaN or infinity in q.weight of"),
    ],
)
def test_what_has_no_difference_to_extract_is_refused(tmp_path: Path, change: Any, said: str):
    paths = models(tmp_path, BASE, {**BASE, **change})
    with pytest.raises(SoupError, match=said):
        modelsoup.extract_adapter(*paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The commands.


def soup(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_commands_say_what_is_missed_and_leave_a_lineage(tmp_path: Path):
    a, b = (peft(tmp_path / n, pair("q", 8, 6, seed=k)) for k, n in enumerate("ab"))
    done = soup("lora", "merge", f"{a}=0.5", b, "--rank", 1, "-o", tmp_path / "out")
    assert done.exit_code == 0 and "q  rank 1, misses " in done.output
    made = modelsoup.read_lineage(tmp_path / "out")
    assert made is not None and made["parameters"] == {"weight": [0.5, 1.0], "rank": 1.0}
    assert [entry["name"] for entry in made["inputs"]] == ["a", "b"]
    assert soup("verify", tmp_path / "out").exit_code == 0

    tuned = {**BASE, "q.weight": BASE["q.weight"] + 1}
    paths = models(tmp_path, BASE, tuned)
    done = soup("lora", "extract", *paths, "-o", tmp_path / "ex", "--json")
    assert json.loads(done.output)["modules"][0]["module"] == "q"
    assert soup("lora", "extract", *paths, "-o", tmp_path / "ex").exit_code == 1
    assert soup("lora", "extract", *paths, "-o", tmp_path / "ex", "--force").exit_code == 0


# Folded into a base.


def fold(base: Path, lora: Any, **how: Any) -> Arrays:
    out = base.parent / "folded.safetensors"
    modelsoup.merge([base], out, lora=lora, force=True, **how)
    return {name: np.asarray(value, np.float64) for name, value in load_file(out).items()}


def saved(file: Path, tensors: Arrays, dtype: Any = np.float32) -> Path:
    save_file({name: np.ascontiguousarray(v.astype(dtype)) for name, v in tensors.items()}, file)
    return file


MODEL = {
    "q.weight": draw(300, 400), "v.weight": draw(40, 30), "emb.weight": draw(50, 20),
    "conv.weight": draw(8, 6, 3, 3), "q.bias": draw(300), "norm.weight": draw(20),
}  # fmt: skip


def adapter_of_all(folder: Path, seed: int = 0, **config: Any) -> Path:
    return peft(
        folder,
        {
            **pair("q", 300, 400, rank=3, seed=seed),
            "emb.lora_embedding_A": draw(2, 50, seed=seed),
            "emb.lora_embedding_B": draw(20, 2, seed=seed),
            "conv.lora_A.weight": draw(2, 6, 3, 3, seed=seed),
            "conv.lora_B.weight": draw(8, 2, 1, 1, seed=seed),
        },
        **config,
    )


def added(adapter: Path) -> Arrays:
    return {
        f"{name}.weight": value.reshape(MODEL[f"{name}.weight"].shape)
        for name, value in updates(adapter).items()
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_adapter_of_weight_one_is_the_base_and_its_update_rounded_once(
    tmp_path: Path, dtype: str
):
    kind = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    base = saved(tmp_path / "base.safetensors", MODEL, kind)
    adapter = adapter_of_all(tmp_path / "a", use_rslora=True)
    found, changes = fold(base, [adapter]), added(adapter)
    for name, value in load_file(base).items():
        exact = np.asarray(value, np.float64) + changes.get(name, 0)
        if name not in changes:
            np.testing.assert_array_equal(found[name], exact)
            continue
        # Only what lies between two numbers, but for the rounding of float32, may go either way.
        rounded = exact.astype(np.float32).astype(kind).astype(np.float64)
        step = np.spacing(np.abs(rounded).astype(kind)).astype(np.float64)
        assert np.all(np.abs(found[name] - exact) <= step * 0.5 + 4e-6), name
        assert np.mean(found[name] != rounded) < (0.5 if dtype == "float32" else 0.002)


def test_several_adapters_are_added_up_with_their_weights(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", MODEL)
    a = adapter_of_all(tmp_path / "a")
    b = peft(tmp_path / "b", {**pair("q", 300, 400, seed=5), **pair("v", 40, 30, seed=6)})
    wanted = {name: value.astype(np.float64) for name, value in MODEL.items()}
    for adapter, weight in ((a, 0.7), (b, -1.5)):
        for name, value in added(adapter).items():
            wanted[name] = wanted[name] + weight * value
    assert_close(fold(base, {a: 0.7, b: -1.5}), wanted)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.3}),
        ("dare_linear", {"density": 0.5}),
        ("task_arithmetic", {"normalize": True, "lambda": 0.5}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
        ("model_stock", {}),
        ("sce", {"select_topk": 0.5}),
    ],
)
def test_a_method_over_task_vectors_gets_what_adapters_add(
    tmp_path: Path, method: str, parameters: Any
):
    base = saved(tmp_path / "base.safetensors", MODEL)
    a, b = (adapter_of_all(tmp_path / n, seed=k) for k, n in enumerate("ab"))
    has_weight = "weight" in modelsoup.get_method(method).parameters
    weight = {"weight": [0.5, 2.0]} if has_weight else {}
    found = fold(base, {a: 0.5, b: 2.0} if has_weight else [a, b], method=method,
                 parameters=parameters)  # fmt: skip
    for name, value in added(a).items():
        models = [MODEL[name] + d.astype(np.float32) for d in (value, added(b)[name])]
        wanted = modelsoup.merge_arrays(
            method, models, base=MODEL[name], name=name, **weight, **parameters
        )
        off = np.abs(found[name] - wanted) > 1e-4  # an element near a threshold may fall either way
        assert off.mean() < 0.001, name


def test_a_method_of_whole_matrices_gets_adapted_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @modelsoup.method("first_row_last", base=True, models=(1, None), version="1")
    def first_row_last(x: Tensor) -> Whole:
        return Whole(lambda inputs: np.roll(inputs[1], -1, 0))

    base = saved(tmp_path / "base.safetensors", MODEL, np.float64)
    adapter = peft(tmp_path / "a", pair("v", 40, 30))
    found = fold(base, [adapter], method="first_row_last")
    wanted = np.roll(MODEL["v.weight"] + added(adapter)["v.weight"], -1, 0)
    np.testing.assert_allclose(found["v.weight"], wanted, atol=1e-5)


def test_slices_workers_and_shards_do_not_change_a_byte_of_a_fold(tmp_path: Path):
    tensors = {"wide.weight": draw(9, 70_001), "tall.weight": draw(70_001, 3)}
    base = saved(tmp_path / "base.safetensors", tensors)
    adapter = peft(tmp_path / "a", {**pair("wide", 9, 70_001), **pair("tall", 70_001, 3)})
    plan = modelsoup.merge([base], tmp_path / "x", lora=[adapter], dry_run=True).plan
    made = []
    for slice_elements in (BLOCK, 3 * BLOCK, SLICE):
        for workers in (1, 3):
            out = tmp_path / f"{slice_elements}-{workers}.safetensors"
            tensors_out = [OutputTensor(s.name, s.dtype, s.shape) for s in plan.steps]
            files = layout(tensors_out, file_name=out.name, shard_size=None)
            _execute(
                plan, out, files, workers=workers, force=False, sha256=False, fsync=False,
                progress=None, slice_elements=slice_elements,
            )  # fmt: skip
            made.append(out.read_bytes())
    assert len(set(made)) == 1
    modelsoup.merge([base], tmp_path / "sharded", lora=[adapter], shard_size="1MB")
    whole = load_file(tmp_path / f"{SLICE}-1.safetensors")
    shards = modelsoup.open_checkpoint(tmp_path / "sharded")
    assert len(shards.files) == 2
    assert all(np.array_equal(shards[name], value) for name, value in whole.items())


def with_lengths(weight: np.ndarray, lengths: np.ndarray, axis: int) -> np.ndarray:
    norms = np.linalg.norm(weight, axis=axis, keepdims=True)
    return weight / norms * lengths.reshape(norms.shape)


def test_dora_gives_the_outputs_of_the_sum_their_lengths(tmp_path: Path):
    lengths = np.abs(draw(300)) + 0.1
    inputs_first = {**pair("v", 30, 40), "v.lora_magnitude_vector": np.abs(draw(30)) + 0.1}
    base = saved(tmp_path / "base.safetensors", MODEL)
    straight = peft(
        tmp_path / "a", {**pair("q", 300, 400), "q.lora_magnitude_vector": lengths}, use_dora=True
    )
    turned = peft(tmp_path / "b", inputs_first, use_dora=True, fan_in_fan_out=True)
    q = MODEL["q.weight"] + added(straight)["q.weight"]
    v = MODEL["v.weight"] + added(turned)["v.weight"]
    found = fold(base, [straight])
    np.testing.assert_allclose(found["q.weight"], with_lengths(q, lengths, 1), atol=1e-5)
    found = fold(base, [turned])
    wanted = with_lengths(v, inputs_first["v.lora_magnitude_vector"], 0)
    np.testing.assert_allclose(found["v.weight"], wanted, atol=1e-5)


def test_kohyas_dora_is_of_outputs_and_that_of_inputs_is_refused(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", {"to_q.weight": draw(4, 3)})
    file = tmp_path / "k.safetensors"
    for shape in ((4, 1), (1, 3)):
        names = {n.replace("mid_", ""): v for n, v in KOHYA.items()}
        save_file({**names, "lora_unet_to_q.dora_scale": np.abs(draw(*shape)) + 1}, file)
        if shape == (4, 1):
            found = fold(base, [file])["to_q.weight"]
            summed = draw(4, 3) + 0.5 * draw(4, 2) @ draw(2, 3)
            wanted = with_lengths(summed, np.abs(draw(4, 1)) + 1, 1)
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        else:
            with pytest.raises(MismatchError, match="which are not one for each of 4 outputs"):
                fold(base, [file])


def test_biases_are_added_and_what_is_whole_replaces_the_bases(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", MODEL)
    head = peft(
        tmp_path / "a",
        {
            **pair("q", 300, 400),
            "q.lora_B.bias": draw(300, seed=7),
            "norm.weight": draw(20, seed=8),
        },
        lora_bias=True,
        modules_to_save=["norm"],
    )
    found = fold(base, [head])
    np.testing.assert_allclose(found["q.bias"], MODEL["q.bias"] + 2 * draw(300, seed=7), rtol=1e-5)
    np.testing.assert_array_equal(found["norm.weight"], draw(20, seed=8))
    half = fold(base, {head: 0.5})
    mean = (MODEL["norm.weight"] + draw(20, seed=8)) / 2
    np.testing.assert_allclose(half["norm.weight"], mean, atol=1e-6)


def test_a_tucker_convolution_and_lycoris_whole_differences_are_folded(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", MODEL)
    file = tmp_path / "k.safetensors"
    up, mid, down = draw(8, 2, 1, 1), draw(2, 2, 3, 3), draw(2, 6, 1, 1)
    save_file(
        {
            "lora_unet_conv.lora_up.weight": up, "lora_unet_conv.lora_mid.weight": mid,
            "lora_unet_conv.lora_down.weight": down, "lora_unet_norm.diff": draw(20, seed=9),
        },
        file,
    )  # fmt: skip
    found = fold(base, [file])
    conv = np.einsum("ijkl,jc,pi->pckl", mid.astype(float), down[..., 0, 0], up[..., 0, 0])
    np.testing.assert_allclose(found["conv.weight"], MODEL["conv.weight"] + conv, atol=1e-5)
    np.testing.assert_allclose(
        found["norm.weight"], MODEL["norm.weight"] + draw(20, seed=9), rtol=1e-6
    )


def test_folding_the_merged_adapter_is_folding_the_adapters(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", MODEL)
    a, b = (adapter_of_all(tmp_path / n, seed=k, lora_alpha=k + 1) for k, n in enumerate("ab"))
    modelsoup.merge_adapters([a, b], tmp_path / "both", weights=[0.7, 0.3])
    assert_close(fold(base, [tmp_path / "both"]), fold(base, {a: 0.7, b: 0.3}))


def test_an_extracted_adapter_folded_into_the_base_is_the_tuned_model(tmp_path: Path):
    tuned = {name: value + draw(*value.shape, seed=3) for name, value in MODEL.items()}
    paths = models(tmp_path, MODEL, tuned)
    modelsoup.extract_adapter(*paths, tmp_path / "adapter", rank=300)
    assert_close(fold(paths[1], [tmp_path / "adapter"]), tuned)


def test_codes_are_quantised_again_after_an_update_and_dora_of_them_is_refused(tmp_path: Path):
    scale = np.full((), 0.01, np.float32)
    codes = (draw(40, 30) * 50).astype(ml_dtypes.float8_e4m3fn)
    base = tmp_path / "base.safetensors"
    raw = {"v.weight": codes, "v.weight_scale": scale}
    with_float8(base, raw)
    adapter = peft(tmp_path / "a", pair("v", 40, 30), lora_alpha=0.1)
    out = tmp_path / "out.safetensors"
    modelsoup.merge([base], out, lora=[adapter])
    made = modelsoup.open_checkpoint(out)
    assert made.tensors["v.weight"].dtype == "F8_E4M3"
    values = made["v.weight"].astype(float) * float(made["v.weight_scale"])
    wanted = codes.astype(float) * 0.01 + updates(adapter)["v"]
    assert np.linalg.norm(values - wanted) < 0.05 * np.linalg.norm(wanted)
    tensors = {**pair("v", 40, 30), "v.lora_magnitude_vector": np.ones(40, np.float32)}
    with pytest.raises(MismatchError, match=r"magnitudes for 'v\.weight', of which the base has"):
        modelsoup.merge([base], tmp_path / "x", lora=[peft(tmp_path / "d", tensors)])


@pytest.mark.parametrize("weight", [1, 0.5])
def test_what_is_whole_in_an_adapter_over_codes_is_quantised_with_their_scale(
    tmp_path: Path, weight: float
):
    codes = (draw(40, 30) * 50).astype(ml_dtypes.float8_e4m3fn)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    scale = np.full((), 0.01, np.float32)
    with_float8(base, {"q.weight": draw(5, 4), "v.weight": codes, "v.weight_scale": scale})
    whole = 20 * draw(40, 30, seed=1)
    adapter = peft(tmp_path / "a", {**pair("q", 5, 4), "v.weight": whole})
    report = modelsoup.merge([base], out, lora={adapter: weight})
    made = modelsoup.open_checkpoint(out)
    assert {n: i.dtype for n, i in made.tensors.items()} == {
        "q.weight": "F32", "v.weight": "F8_E4M3", "v.weight_scale": "F32",
    }  # fmt: skip
    values = made["v.weight"].astype(float) * float(made["v.weight_scale"])
    wanted = (1 - weight) * codes.astype(float) * 0.01 + weight * whole
    assert np.linalg.norm(values - wanted) < 0.05 * np.linalg.norm(wanted)
    assert "quantized" in [notice.kind for notice in report.notices]


def test_what_is_whole_in_adapters_is_not_merged_over_a_bases_codes(tmp_path: Path):
    base, scale = tmp_path / "base.safetensors", np.full((), 0.01, np.float32)
    codes = (draw(40, 30) * 50).astype(ml_dtypes.float8_e4m3fn)
    with_float8(base, {"q.weight": draw(5, 4), "v.weight": codes, "v.weight_scale": scale})
    adapters = [
        peft(tmp_path / name, {**pair("q", 5, 4), "v.weight": draw(40, 30, seed=seed)})
        for seed, name in enumerate("ab")
    ]
    with pytest.raises(MismatchError, match=r"has 'v\.weight' as codes with a scale, over which"):
        modelsoup.merge_adapters(adapters, tmp_path / "both", base=base)
    assert not (tmp_path / "both").exists()
    modelsoup.merge([base], tmp_path / "folded.safetensors", lora=dict.fromkeys(adapters, 0.5))


def with_float8(file: Path, tensors: Arrays) -> None:
    infos = [
        OutputTensor(n, "F8_E4M3" if v.dtype.itemsize == 1 else "F32", v.shape)
        for n, v in tensors.items()
    ]
    files = layout(infos, file_name=file.name, shard_size=None)
    with modelsoup.CheckpointWriter(file, files, {}) as writer:
        offset = 0
        for info in files[0].tensors:
            data = np.ascontiguousarray(tensors[info.name]).reshape(-1).view(np.uint8)
            writer.write(file.name, data.data, offset)
            offset += data.nbytes
        writer.commit()


def folding_fails(tmp_path: Path, *words: object) -> str:
    done = soup("merge", *words, "-o", tmp_path / "out.safetensors")
    assert done.exit_code == 1 and not [p for p in tmp_path.iterdir() if "out" in p.name]
    return str(done.output).replace(f"{tmp_path}/", "")


def test_an_adapter_for_another_base_is_named_with_its_module(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", MODEL)
    absent = peft(tmp_path / "absent", pair("conf", 3, 3))
    assert folding_fails(tmp_path, base, "--lora", absent) == (
        "Error: absent is for 'conf', which the base does not have; did you mean 'conv'?\n"
    )
    other = peft(tmp_path / "other", pair("v", 40, 31))
    assert folding_fails(tmp_path, base, "--lora", other) == (
        "Error: other is for another base: what it has for 'v.weight' is [40, 31], and the base's "
        "is [40, 30]\n"
    )


def test_what_makes_no_sense_beside_adapters_is_one_sentence(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", MODEL)
    a = peft(tmp_path / "a", pair("v", 40, 30))
    for words, said in (
        ((base, base, "--lora", a), "adapters are applied to one model, but 2 and no base model"),
        ((base, "--lora", a, "--method", "linear"), "'linear' merges no task vectors"),
        ((base, "--lora", a, "--weights", "1"), "the adapters' weights are given twice"),
        ((base, "--lora", a, "--lora", a), "is given twice"),
        ((base, "--lora", f"{a}=much"), "has the weight 'much', which is no finite number"),
        ((base, "--lora", a, "--rename", "v.*=w.*"), "renames and adapters do not go together"),
        ((base, "--lora", a, "--layers", "v.*=second"), "wants model 2, but there are 1"),
    ):
        assert said in folding_fails(tmp_path, *words), words


def test_nan_in_an_adapter_is_found_and_leaves_no_output(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", MODEL)
    bad = pair("v", 40, 30)
    bad["v.lora_B.weight"][3] = np.inf
    a = peft(tmp_path / "a", bad)
    assert "v.weight" in folding_fails(tmp_path, base, "--lora", a)


def test_rules_and_dtypes_hold_for_a_fold_and_its_lineage_says_what_went_in(tmp_path: Path):
    base, out = saved(tmp_path / "base.safetensors", MODEL), tmp_path / "out.safetensors"
    a = adapter_of_all(tmp_path / "a")
    done = soup(
        "merge", base, "--lora", f"{a}=0.5", "-o", out, "--layers", "q.*=first", "--layers",
        "norm.*=drop", "--dtype", "f64", "--json",
    )  # fmt: skip
    report = json.loads(done.output)
    made = load_file(out)
    np.testing.assert_array_equal(made["q.weight"], MODEL["q.weight"].astype(np.float64))
    assert "norm.weight" not in made and made["emb.weight"].dtype == np.float64
    found, change = made["emb.weight"], added(a)["emb.weight"]
    np.testing.assert_allclose(found, MODEL["emb.weight"] + 0.5 * change, atol=1e-5)
    lineage = modelsoup.read_lineage(out)
    assert lineage == report["lineage"] and lineage is not None and lineage["lora"] == "folded"
    assert lineage["weights"] == [0.5] and lineage["base"]["name"] == "base.safetensors"
    assert [entry["name"] for entry in lineage["inputs"]] == ["a"]
    assert report["bytes_read"] <= report["planned"]["bytes_read"] + 2**16
    assert soup("verify", out).exit_code == 0
    again = soup("plan", "--from", out)
    assert again.exit_code == 0 and "lora: {a: 0.5}" in again.output


@pytest.mark.parametrize("named", [".", "adapter_model.safetensors"])
@pytest.mark.parametrize("is_folded", [True, False])
def test_a_lineage_knows_the_config_by_which_an_adapter_was_scaled(
    tmp_path: Path, named: str, is_folded: bool
):
    adapter = peft(tmp_path / "a", pair("v", 40, 30), lora_alpha=8)
    base = saved(tmp_path / "base.safetensors", MODEL)

    def made(name: str) -> dict[str, Any]:
        out = tmp_path / name
        if is_folded:
            modelsoup.merge([base], out, lora=[adapter / named])
        else:
            modelsoup.merge_adapters([adapter / named], out)
        lineage = modelsoup.read_lineage(out)
        assert lineage is not None
        return dict(lineage["inputs"][0])

    one = made("one")
    config = adapter / "adapter_config.json"
    assert one["name"] == "a"
    assert {file["name"]: file["xxh3_128"] for file in one["files"]} == {
        file.name: modelsoup.digest_file(file).xxh3_128 for file in adapter.iterdir()
    }
    assert soup("verify", tmp_path / "one", "--inputs", tmp_path).exit_code == 0
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 9}))
    verified = soup("verify", tmp_path / "one", "--inputs", tmp_path)
    assert verified.exit_code == 1 and "a" in verified.output
    assert made("other")["xxh3_128"] != one["xxh3_128"]


def test_a_config_file_names_adapters_from_its_own_folder(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", MODEL)
    a = adapter_of_all(tmp_path / "a")
    text = "models: [base.safetensors]\nlora: {a: 0.5}\noutput: out.safetensors\n"
    (tmp_path / "merge.yaml").write_text(text)
    assert soup("merge", "--config", tmp_path / "merge.yaml").exit_code == 0
    wanted = fold(base, {a: 0.5})
    made = load_file(tmp_path / "out.safetensors")
    assert all(np.array_equal(value, wanted[name]) for name, value in made.items())


def test_the_card_of_a_fold_has_a_configuration_that_makes_it_again(tmp_path: Path):
    base, a = saved(tmp_path / "base.safetensors", MODEL), adapter_of_all(tmp_path / "a")
    modelsoup.merge([base], tmp_path / "out", lora={a: 0.5}, model_card=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1 low-rank adapter folded by modelsoup into `base.safetensors`:" in card
    (tmp_path / "again.yaml").write_text(card.split("```")[1].removeprefix("yaml\n"))
    out = tmp_path / "again.safetensors"
    assert soup("merge", "--config", tmp_path / "again.yaml", "-o", out).exit_code == 0
    first, again = load_file(tmp_path / "out" / "model.safetensors"), load_file(out)
    assert all(np.array_equal(value, again[name]) for name, value in first.items())


def test_a_folder_that_adapters_are_folded_into_keeps_its_config(tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    saved(base / "model.safetensors", MODEL)
    (base / "config.json").write_text('{"num_layers": 1}')
    a = adapter_of_all(tmp_path / "a")
    modelsoup.merge([base], tmp_path / "out", lora=[a])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("shape", [(3, 32, 70_000), (40, 64, 2048)])
def test_no_byte_of_a_product_depends_on_how_many_threads_a_blas_has(
    shape: tuple[int, int, int],
) -> None:
    code = f"""
import hashlib, numpy as np
from modelsoup.merging.sources import rows_of_product
rows, rank, width = {shape}
generator = np.random.default_rng(1)
left = generator.standard_normal((rows, rank)).astype(np.float32)
right = generator.standard_normal((rank, width)).astype(np.float32)
made = rows_of_product(left, right)(5, rows * width - 7)
np.testing.assert_allclose(made, (left @ right).reshape(-1)[5:-7], rtol=1e-3, atol=1e-4)
print(hashlib.sha256(made.tobytes()).hexdigest())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "OPENBLAS_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=True,
        ).stdout
        for threads in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1
