"""Quantised weights and low-rank factors: tensors that mean something only together."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import modelsoup
from modelsoup import MismatchError, merge, open_checkpoint
from modelsoup.errors import speaking
from modelsoup.files.quantized import Quantizer, Scales, dequantize
from modelsoup.merging.forms import BLOCK
from modelsoup.terminal.cli import main

F8 = ml_dtypes.float8_e4m3fn
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
ROWS, COLUMNS = 300, 515  # no multiples of a block, more than one slice in small slices

# How a scheme lays its scales out: their shape, the rows and columns of a block.
SCHEMES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "tensor": ((), ROWS, COLUMNS),
    "tensor in a list": ((1,), ROWS, COLUMNS),
    "row": ((ROWS, 1), 1, COLUMNS),
    "flat row": ((ROWS,), 1, COLUMNS),
    "block": ((-(-ROWS // 128), -(-COLUMNS // 128)), 128, 128),
}


def values(seed: int) -> np.ndarray:
    """Weights whose magnitude differs much from block to block, and from row to row."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = 10.0 ** generator.uniform(-3, 1, (ROWS, 1))
    return (generator.standard_normal((ROWS, COLUMNS)) * rows).astype(np.float32)


def quantised(
    weights: np.ndarray, scheme: str, kind: np.dtype[Any] = F32
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales by the definition, block by block."""
    shape, high, wide = SCHEMES[scheme]
    codes = np.empty(weights.shape, F8)
    scales = []
    for top in range(0, ROWS, high):
        for left in range(0, COLUMNS, wide):
            place = slice(top, top + high), slice(left, left + wide)
            scale = np.float32(np.abs(weights[place]).max() / np.float32(448))
            scale = scale.astype(kind).astype(np.float32)
            codes[place] = np.clip(weights[place] / scale, -448, 448).astype(F8)
            scales.append(scale)
    return codes, np.array(scales, np.float32).astype(kind).reshape(shape)


def dequantised(codes: np.ndarray, scales: np.ndarray, scheme: str) -> np.ndarray:
    _, high, wide = SCHEMES[scheme]
    across = -(-COLUMNS // wide)
    row, column = np.arange(ROWS) // high, np.arange(COLUMNS) // wide
    which = row[:, None] * across + column[None, :]
    return codes.astype(np.float32) * scales.astype(np.float32).reshape(-1)[which]


def save(path: Path, **tensors: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({dotted(name): t for name, t in tensors.items()}, path, {"format": "pt"})
    return path


def dotted(keyword: str) -> str:
    """A tensor's name, of a keyword."""
    return keyword.replace("__", ".").replace(".nf4", "__nf4")


def model(path: Path, seed: int, scheme: str, scale: str, kind: np.dtype[Any] = F32) -> Path:
    codes, scales = quantised(values(seed), scheme, kind)
    bias = np.full(4, seed, np.float32)
    return save(path, **{"a__weight": codes, scale: scales, "a__bias": bias})


def pair(folder: Path, scheme: str, scale: str, kind: np.dtype[Any] = F32) -> list[Path]:
    return [model(folder / f"{n}.safetensors", n, scheme, scale, kind) for n in (1, 2)]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("scale", ["a__weight_scale", "a__weight_scale_inv", "a__scale_weight"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_merged_as_the_values_that_they_stand_for(
    scheme: str, scale: str, tmp_path: Path
):
    out = tmp_path / "out.safetensors"
    report = merge(pair(tmp_path, scheme, scale), out, beta=0.25)
    found = open_checkpoint(out)
    name = scale.replace("__", ".")
    assert found.keys() == {"a.weight", "a.bias", name}
    assert (found["a.weight"].dtype, found[name].dtype) == (F8, F32)
    stored = [dequantised(*quantised(values(n), scheme), scheme) for n in (1, 2)]
    mean = np.float32(0.25) * stored[0] + np.float32(0.75) * stored[1]
    codes, scales = quantised(mean, scheme)
    assert found[name].tobytes() == scales.tobytes()
    assert found["a.weight"].tobytes() == codes.tobytes()
    # What is lost is what rounding to eight bits loses anyway.
    assert error(dequantised(found["a.weight"], found[name], scheme), mean) < 0.03
    assert found["a.bias"].tolist() == [1.75] * 4
    (notice,) = [n for n in report.notices if n.kind == "quantized"]
    assert (notice.level, notice.names) == ("note", ("a.weight",))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_wider_dtype_stores_values_and_no_scales(dtype: str, tmp_path: Path):
    folders = []
    for number, file in enumerate(pair(tmp_path, "block", "a__weight_scale_inv"), 1):
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        file.rename(folder / "model.safetensors")
        config = {
            "torch_dtype": "float8_e4m3fn", "quantization_config": {"quant_method": "fp8"},
            "text_config": {"torch_dtype": "bfloat16", "hidden_size": 4},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    merge(folders, tmp_path / "out", dtype=dtype)
    found = open_checkpoint(tmp_path / "out")
    assert found.keys() == {"a.weight", "a.bias"}
    stored = [dequantised(*quantised(values(n), "block"), "block") for n in (1, 2)]
    mean = (np.float32(0.5) * stored[0] + np.float32(0.5) * stored[1]).astype(
        BF16 if dtype == "bf16" else F32
    )
    assert found["a.weight"].tobytes() == mean.tobytes()
    name = "bfloat16" if dtype == "bf16" else "float32"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "torch_dtype": name, "text_config": {"torch_dtype": name, "hidden_size": 4},
    }  # fmt: skip


def test_a_quantised_model_is_merged_with_one_that_is_not(tmp_path: Path):
    quantised_, plain = values(1), values(2).astype(ml_dtypes.bfloat16)
    codes, scales = quantised(quantised_, "row")
    a = save(tmp_path / "a.safetensors", a__weight=codes, a__weight_scale=scales)
    b = save(tmp_path / "b.safetensors", a__weight=plain)
    base = save(tmp_path / "base.safetensors", a__weight=codes, a__weight_scale=scales)
    stored = dequantised(codes, scales, "row")
    mean = np.float32(0.5) * stored + np.float32(0.5) * plain.astype(np.float32)

    merge([b, a], tmp_path / "plain.safetensors")
    found = open_checkpoint(tmp_path / "plain.safetensors")
    assert found.keys() == {"a.weight"}
    assert found["a.weight"].tobytes() == mean.astype(ml_dtypes.bfloat16).tobytes()

    merge([a, b], tmp_path / "codes.safetensors")
    found = open_checkpoint(tmp_path / "codes.safetensors")
    assert found["a.weight"].tobytes() == quantised(mean, "row")[0].tobytes()

    merge([b], tmp_path / "task.safetensors", method="task_arithmetic", weights=[2.0], base=base)
    task = stored + np.float32(2) * (plain.astype(np.float32) - stored)
    found = open_checkpoint(tmp_path / "task.safetensors")
    assert found["a.weight"].tobytes() == task.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "slerp", "parameters": {"t": 0.25}},
        {"method": "ties", "weights": [1, 1], "parameters": {"density": 0.4}},
        {"method": "dare_linear", "weights": [1, 1], "parameters": {"density": 0.5}},
        {"beta": 0.25},
    ],
    ids=lambda options: options.get("method", "linear"),
)
def test_every_kind_of_method_sees_values(options: dict[str, Any], tmp_path: Path):
    """The same as a merge of what the codes stand for, but for rounding to codes again."""
    models = pair(tmp_path, "block", "a__weight_scale_inv")
    plain = [
        save(
            tmp_path / f"plain-{n}.safetensors",
            a__weight=dequantised(*quantised(values(n), "block"), "block"),
            a__bias=np.full(4, n, np.float32),
        )
        for n in (1, 2)
    ]
    bases: list[Any] = [None, None]
    if options.get("method") in ("ties", "dare_linear"):
        bases = [models[0], plain[0]]
    merge(models, tmp_path / "codes.safetensors", base=bases[0], **options)
    merge(plain, tmp_path / "values.safetensors", base=bases[1], **options)
    codes = open_checkpoint(tmp_path / "codes.safetensors")
    wanted = open_checkpoint(tmp_path / "values.safetensors")["a.weight"]
    again, scales = quantised(wanted, "block")
    assert codes["a.weight"].tobytes() == again.tobytes()
    assert codes["a.weight_scale_inv"].tobytes() == scales.tobytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_no_byte_depends_on_workers_or_slices(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    models = pair(tmp_path, "block", "a__weight_scale_inv")
    merge(models, tmp_path / "once.safetensors", beta=0.3)
    monkeypatch.setattr("modelsoup.merging.engine._BUFFERS", 1)  # slices of one block
    merge(models, tmp_path / "sliced.safetensors", beta=0.3, workers=workers)
    assert ROWS * COLUMNS > 2 * BLOCK
    once, sliced = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("once", "sliced"))
    assert once == sliced


def test_scales_of_sixteen_bits_are_rounded_before_codes_are_made(tmp_path: Path):
    models = pair(tmp_path, "row", "a__weight_scale", BF16)
    merge(models, tmp_path / "out.safetensors")
    found = open_checkpoint(tmp_path / "out.safetensors")
    assert found["a.weight_scale"].dtype == BF16
    stored = [dequantised(*quantised(values(n), "row", BF16), "row") for n in (1, 2)]
    mean = np.float32(0.5) * stored[0] + np.float32(0.5) * stored[1]
    again = dequantised(found["a.weight"], found["a.weight_scale"], "row")
    assert np.isfinite(again).all()
    assert error(again, mean) < 0.03


def test_kept_codes_keep_their_scales_byte_for_byte(tmp_path: Path):
    models = pair(tmp_path, "block", "a__weight_scale_inv")
    report = merge(models, tmp_path / "out.safetensors", layers=["a.weight=second"])
    found, second = open_checkpoint(tmp_path / "out.safetensors"), open_checkpoint(models[1])
    for name in ("a.weight", "a.weight_scale_inv"):
        assert found[name].tobytes() == second[name].tobytes()
    assert found["a.bias"].tolist() == [1.5] * 4
    assert not [n for n in report.notices if n.kind == "quantized"]
    merge(models, tmp_path / "drop.safetensors", layers=["a.weight=drop"])
    assert open_checkpoint(tmp_path / "drop.safetensors").keys() == {"a.bias"}
    merge(models, tmp_path / "wide.safetensors", layers=["a.weight=second"], dtype="f32")
    wide = open_checkpoint(tmp_path / "wide.safetensors")
    assert wide.keys() == {"a.weight", "a.bias"}
    stored = dequantised(*quantised(values(2), "block"), "block")
    assert wide["a.weight"].tobytes() == stored.tobytes()


def test_one_model_whose_codes_become_values_is_told(tmp_path: Path):
    a = model(tmp_path / "a.safetensors", 1, "row", "a__weight_scale")
    report = merge([a], tmp_path / "out.safetensors", dtype="bf16", strict=True)
    (notice,) = [n for n in report.notices if n.kind == "quantized"]
    assert (notice.message, notice.level) == (
        "1 tensor is quantised: stored as BF16: a.weight", "note"
    )  # fmt: skip


def test_ranges_of_activations_are_the_largest_and_are_told(tmp_path: Path):
    models = []
    for number, (ones, value) in enumerate(((1, 0.5), (2, 0.25), (3, 0.75))):
        codes = np.full((4, 4), ones, F8)
        extra = {"a__input_scale": np.array([value], np.float32), "scaled_fp8": np.zeros(2, F8)}
        scale = np.array([1.0], np.float32)
        path = tmp_path / f"{number}.safetensors"
        models.append(save(path, a__weight=codes, a__weight_scale=scale, **extra))
    report = merge(models, tmp_path / "out.safetensors")
    found = open_checkpoint(tmp_path / "out.safetensors")
    assert found["a.input_scale"].tolist() == [0.75]
    assert found["scaled_fp8"].tolist() == [0, 0]
    assert [n.names for n in report.notices if n.kind == "recalibrate"] == [("a.input_scale",)]
    merge(models, tmp_path / "wide.safetensors", dtype="f32")
    assert open_checkpoint(tmp_path / "wide.safetensors").keys() == {"a.weight"}


def test_a_block_of_zeros_and_the_smallest_scales_stay_finite(tmp_path: Path):
    scales = Scales("s", "F16", (2, 1), 2, 3, 1, 3)
    quantizer = Quantizer(scales, "F8_E4M3")
    wanted = np.array([0, 0, 0, 1e-9, -1e-9, 5e-10], np.float32)
    for start in (3, 0):  # any order
        quantizer.measure(wanted[start : start + 3], start)
    stored = quantizer.finish()
    assert (stored.astype(np.float32) > 0).all()
    made = quantizer.quantize(wanted, 0)
    dequantize(made, 0, scales, stored.astype(np.float32))
    assert np.isfinite(made).all()
    assert np.abs(made - wanted).max() <= 1e-9


def test_nan_in_codes_is_an_error_as_in_any_tensor(tmp_path: Path):
    models = pair(tmp_path, "block", "a__weight_scale_inv")
    codes, scales = quantised(values(2), "block")
    codes[-1, -1] = np.nan
    save(models[1], a__weight=codes, a__weight_scale_inv=scales, a__bias=np.ones(4, np.float32))
    with pytest.raises(modelsoup.NonfiniteError, match=r"a\.weight \(1 in 2\.safetensors"):
        merge(models, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


U8, I8, I32 = (np.zeros((8, 4), kind) for kind in (np.uint8, np.int8, np.int32))
ONES = np.ones((8, 1), np.float32)
CODES = np.ones((8, 4), F8)
PACKED: dict[str, dict[str, np.ndarray]] = {
    "GPTQ": {"a__qweight": I32, "a__qzeros": I32, "a__scales": ONES, "a__g_idx": I32[0]},
    "NF4": {
        "a__weight": U8, "a__weight__absmax": ONES, "a__weight__quant_map": ONES,
        "a__weight__quant_state__bitsandbytes__nf4": U8[0],
    },
    "ExLlamaV2": {
        "a__q_weight": I32, "a__q_scale": I32, "a__q_scale_max": ONES, "a__q_groups": I32[0],
        "a__q_invperm": I32[0],
    },
    "AQLM": {"a__codes": I8, "a__codebooks": ONES, "a__scales": ONES},
    "QuIP#": {"a__Qidxs": I32, "a__SU": ONES, "a__SV": ONES, "a__Wscale": ONES[0]},
    "VPTQ": {"a__indices": I32, "a__centroids__weight": ONES},
    "LLM.int8": {"a__weight": I8, "a__SCB": ONES},
    "packed": {"a__weight_packed": I32, "a__weight_scale": ONES, "a__weight_shape": I32[0]},
    "MXFP4": {"a__gate_blocks": U8, "a__gate_scales": U8},
    "int8": {"a__weight": I8, "a__weight_scale": ONES},
    "unknown scales": {"a__weight": CODES, "a__weight_scale": np.ones((8, 2), np.float32)},
    "unknown dtype": {
        "a__weight": CODES, "a__weight_scale": ONES.astype(ml_dtypes.float8_e8m0fnu)
    },
}  # fmt: skip


@pytest.mark.parametrize("scheme", PACKED)
def test_packed_weights_are_refused_by_name_and_can_be_kept(scheme: str, tmp_path: Path):
    tensors = {**PACKED[scheme], "b__weight": np.ones(3, np.float32)}
    models = [
        save(tmp_path / "a.safetensors", **tensors),
        save(
            tmp_path / "b.safetensors", **{n: t + 1 if t is I32 else t for n, t in tensors.items()}
        ),
    ]
    with pytest.raises(MismatchError) as caught, speaking("command"):
        merge(models, tmp_path / "out.safetensors")
    sentence = str(caught.value)
    assert "dequantise" in sentence
    assert "on-integer" not in sentence
    assert all(dotted(name) in sentence for name in PACKED[scheme])
    assert "b.weight" not in sentence
    for policy in ("max", "first"):
        with pytest.raises(MismatchError, match="dequantise"):
            merge(models, tmp_path / "out.safetensors", on_integer=policy)
    merge(models, tmp_path / "out.safetensors", layers=["a.*=first"], dtype="bf16")
    found, first = (open_checkpoint(p) for p in (tmp_path / "out.safetensors", models[0]))
    assert {n: found[n].tobytes() for n in found if n != "b.weight"} == {
        n: first[n].tobytes() for n in first if n != "b.weight"
    }
    assert found.tensors["b.weight"].dtype == "BF16"


def test_a_config_tells_of_codes_as_long_as_there_are_any(tmp_path: Path):
    told = {"quantization_config": {"bits": 4}, "torch_dtype": "float16"}
    for name in "ab":
        tensors = {**PACKED["GPTQ"], "b__weight": np.ones(3, np.float32)}
        save(tmp_path / name / "model.safetensors", **tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(told))
    models = [tmp_path / "a", tmp_path / "b"]
    merge(models, tmp_path / "kept", layers=["a.*=first"], dtype="bf16")
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert config == {**told, "torch_dtype": "bfloat16"}
    merge(models, tmp_path / "dropped", layers=["a.*=drop"], dtype="bf16")
    config = json.loads((tmp_path / "dropped" / "config.json").read_text())
    assert config == {"torch_dtype": "bfloat16"}


def test_hints_for_a_packed_and_a_plain_model_lead_to_one_of_them(tmp_path: Path):
    """Each of two hints once led to the other, for ever."""
    plain = {"a__weight": np.ones((2, 2), np.float32), "n": np.full(2, 1, np.float32)}
    packed = {**PACKED["GPTQ"], "n": np.full(2, 3, np.float32)}
    a, b = save(tmp_path / "a.safetensors", **plain), save(tmp_path / "b.safetensors", **packed)
    for models, kept in (([a, b], {"a.weight"}), ([b, a], {dotted(n) for n in PACKED["GPTQ"]})):
        with pytest.raises(MismatchError) as caught:
            merge(models, tmp_path / "out.safetensors")
        hints = re.findall(r"layers=(\[.*?\])[,)]", str(caught.value))
        rules = [rule for hint in hints for rule in eval(hint)]
        merge(models, tmp_path / "out.safetensors", layers=rules, force=True)
        out = open_checkpoint(tmp_path / "out.safetensors")
        assert (out.keys(), out["n"][0]) == (kept | {"n"}, 2)
    with pytest.raises(MismatchError, match=r"in place of 'a\.qweight → first'") as caught:
        merge([a, a, b], tmp_path / "out.safetensors", layers=["a.qweight=first"])
    assert "layers=['a.qweight=drop']" in str(caught.value)


def test_what_only_looks_like_codes_is_merged(tmp_path: Path):
    """Names such as `scale` beside floats, plain float8, and 8-bit tables of indices."""
    tensors = {
        "norm__weight": np.ones(4, np.float32), "norm__scale": np.ones(4, np.float32),
        "plain__weight": np.ones((2, 2), F8), "mlp__blocks": np.ones(2, np.float32),
        "ids": np.arange(4, dtype=np.uint8),
    }  # fmt: skip
    models = [save(tmp_path / f"{n}.safetensors", **tensors) for n in "ab"]
    report = merge(models, tmp_path / "out.safetensors", strict=True)
    assert len(report.plan.steps) == len(tensors)


# Low-rank adapters

PEFT = "base_model.model.layers.0.q_proj.lora_{}.weight"
ADAPTERS = {
    "PEFT": [PEFT.format("A"), PEFT.format("B")],
    "kohya": [f"lora_unet_mid.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")],
    "diffusers": ["unet.attn.processor.to_q_lora.down.weight", "unet.attn.to_q.lora.up.weight"],
    "LyCORIS": ["lycoris_mid.hada_w1_a", "lycoris_mid.hada_w2_b", "lycoris_mid.alpha"],
    "LoKr": ["lycoris_mid.alpha", "lycoris_mid.lokr_w1", "lycoris_mid.lokr_w2"],
    "MLX": ["model.layers.0.q_proj.lora_a", "model.layers.0.q_proj.lora_b"],
    "loralib": ["attn.q_proj.lora_A", "attn.q_proj.lora_B"],
    "XLabs": [f"double_blocks.0.processor.proj_lora1.{part}.weight" for part in ("down", "up")],
    "CP": [f"lora_unet_mid.lora_{part}.weight" for part in ("down", "mid", "up")],
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_factors_of_updates_are_not_averaged_one_by_one(kind: str, tmp_path: Path):
    """The mean of two products is not the product of the means."""
    tensors = {name: np.full((2, 2), 2.0, np.float32) for name in ADAPTERS[kind]}
    models = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        models.append(tmp_path / name)
        save_file(
            {**tensors, "head": np.ones(2, np.float32)},
            tmp_path / name / "adapter_model.safetensors",
        )
    with pytest.raises(MismatchError) as caught, speaking("command"):
        merge(models, tmp_path / "out")
    sentence = str(caught.value)
    assert "low-rank" in sentence
    assert all(name in sentence for name in tensors)
    assert "head" not in sentence
    assert not (tmp_path / "out").exists()
    with pytest.raises(MismatchError, match="low-rank"):
        merge(models, tmp_path / "out", layers=["*", "head"][:1])


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(
    ("words", "merged", "head"),
    [
        ("", 2.0, 2.0), ("--layers *=0.25", 2.5, 2.5), ("--layers head=drop", 2.0, None),
        ("--layers head=first --rest merge", 2.0, 1.0),
        ("--layers head=0.75 --layers *=slerp;t:0.75", 2.5, 1.5),
    ],
)  # fmt: skip
def test_the_hint_to_merge_factors_merges_them_as_all_would_have_been(
    kind: str, words: str, merged: float, head: float | None, tmp_path: Path
):
    models = []
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        models.append(tmp_path / name)
        tensors = dict.fromkeys(
            [*ADAPTERS[kind], "head", "other"], np.full((2, 2), value, np.float32)
        )
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    options = ["merge", *map(str, models), "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, [*options, *words.split()])
    assert refused.exit_code == 1
    hinted = re.search(r"name them: (.*?)(?: before your other rules)?\)$", refused.output)
    assert hinted is not None
    done = CliRunner().invoke(main, [*options, *shlex.split(hinted[1]), *words.split()])
    assert done.exit_code == 0, (refused.output, done.output)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["adapter_model.safetensors"], "the name by which the adapter is found"
    out = open_checkpoint(tmp_path / "out")
    wanted = dict.fromkeys([*ADAPTERS[kind], "other"], merged)
    wanted |= {} if head is None else {"head": head}
    assert {name: out[name][0, 0] for name in out} == pytest.approx(wanted)


def test_an_alpha_that_is_no_adapters_is_merged(tmp_path: Path):
    tensors = {"snake.alpha": np.ones(2, np.float32), "conv.weight": np.ones(2, np.float32)}
    models = [tmp_path / f"{n}.safetensors" for n in "ab"]
    for path in models:
        save_file(tensors, path)
    assert merge(models, tmp_path / "out.safetensors", strict=True).notices == ()


def test_segments_cover_codes_once_with_the_right_scale():
    scales = Scales("s", "F32", (3, 5), ROWS, COLUMNS, 128, 128)
    which = (np.arange(ROWS)[:, None] // 128 * 5 + np.arange(COLUMNS) // 128).ravel()
    for start, stop in ((0, which.size), (7, 8), (COLUMNS - 1, COLUMNS + 1), (1000, 77777)):
        begins, found = scales.segments(start, stop)
        lengths = np.diff(begins, append=stop - start)
        assert (lengths > 0).all()
        assert np.repeat(found, lengths).tolist() == which[start:stop].tolist()
    assert math.prod(scales.shape) == which.max() + 1
