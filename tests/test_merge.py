"""The engine: what a merge writes, records, warns of and refuses, on real files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import networkx
import numpy as np
import pytest
import safetensors
import xxhash
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup import (
    CheckpointError,
    MergeReport,
    MismatchError,
    NonfiniteError,
    OutputError,
    ParameterError,
    RuleError,
    SoupError,
    merge,
)
from modelsoup.errors import speaking
from modelsoup.files.placing import LINEAGE_KEY, PARTIAL_SUFFIX
from modelsoup.files.writer import OutputTensor, layout
from modelsoup.merging import compiled as fused
from modelsoup.merging import merge as engine
from modelsoup.merging.engine import SLICE, Stream
from modelsoup.merging.forms import BLOCK
from modelsoup.merging.inputs import Inputs

Tensors = Mapping[str, np.ndarray]

F32 = np.float32
FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
OTHERS: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64,
}  # fmt: skip


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """A file as the reference library writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata)
    return path


def pair(folder: Path, first: Tensors, second: Tensors) -> list[Path]:
    return [save(folder / "a.safetensors", first), save(folder / "b.safetensors", second)]


def save_raw(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> Path:
    """A file with any dtype of the format, from the bytes of its tensors."""
    entries, stop = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        start, stop = stop, stop + len(content)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    header = json.dumps(entries).encode()
    data = b"".join(content for _, _, content in tensors.values())
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def save_sparse(path: Path, name: str, elements: int) -> Path:
    """A file with one float32 tensor of zeros that takes no space on the disk."""
    entry = {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}
    header = json.dumps({name: entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 4 * elements)
    return path


def save_folder(folder: Path, shards: Mapping[str, Tensors]) -> Path:
    """A model folder with shards, an index, a config and a tokenizer."""
    for shard, tensors in shards.items():
        save(folder / shard, tensors, {"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "bert", "torch_dtype": "float32"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def load(path: Path) -> dict[str, np.ndarray]:
    """What the reference library finds in a file, or in all files of a folder."""
    kinds = {**FLOATS, **OTHERS}
    return {
        name: np.frombuffer(entry["data"], kinds.get(entry["dtype"], np.uint8)).reshape(
            entry["shape"] if entry["dtype"] in kinds else -1
        )
        for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
        for name, entry in safetensors.deserialize(file.read_bytes())
    }


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
        for name, entry in safetensors.deserialize(file.read_bytes())
    }


def linear(weights: Sequence[float], *arrays: np.ndarray) -> np.ndarray:
    """Σ wᵢ·xᵢ in float32 (float64 where an array is), as the formula has it."""
    kind: Any = np.float64 if any(a.dtype == np.float64 for a in arrays) else F32
    total = kind(weights[0]) * arrays[0].astype(kind)
    for weight, array in zip(weights[1:], arrays[1:], strict=True):
        total = total + kind(weight) * array.astype(kind)
    return np.asarray(total, kind)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether dtype, shape and every byte agree."""
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.tobytes() == expected.tobytes()
    )


def refusal(folder: Path, models: Sequence[Path], error: type[SoupError], **options: Any) -> str:
    """The sentence with which `soup merge` refuses; it must leave the folder as it was."""
    before = snapshot(folder)
    with pytest.raises(error) as caught, speaking("command"):
        merge(models, **{"output": folder / "out.safetensors", "fsync": False, **options})
    assert snapshot(folder) == before
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 800
    return sentence


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder, with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def notices(report: MergeReport) -> dict[str, tuple[str, ...]]:
    return {notice.kind: notice.names for notice in report.notices}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


@pytest.fixture
def normal() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture
def numpy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSOUP_FAST", "0")


# What is written


def test_two_models_are_averaged_as_the_formula_says(
    tmp_path: Path, out: Path, normal: np.random.Generator
) -> None:
    a, b = ({n: normal.normal(size=s).astype(F32) for n, s in SHAPES.items()} for _ in range(2))
    merge(pair(tmp_path, a, b), out, beta=0.3)
    found = load_file(out)
    assert found.keys() == a.keys()
    for name in a:
        assert same(found[name], linear([0.3, 0.7], a[name], b[name]))


SHAPES = {"conv.weight": (4, 3, 3), "conv.bias": (4,), "scale": (), "none": (0, 7), "one": (1, 1)}


def test_without_beta_or_weights_models_have_equal_weights(tmp_path: Path, out: Path) -> None:
    models = [
        save(tmp_path / f"{i}.safetensors", {"x": np.array([i, 3 * i], F32)}) for i in (0, 1, 5)
    ]
    merge(models, out)
    assert load_file(out)["x"].tolist() == [2, 6]


def test_each_rule_has_its_own_method_and_parameters(tmp_path: Path, out: Path) -> None:
    def model(value: float) -> dict[str, np.ndarray]:
        names = ("D.low.w", "D.high.w", "D.head.w", "G.a.w", "G.b.w", "norm.w", "rest.w")
        return {name: np.full(3, value, F32) for name in names}

    base = save(tmp_path / "base.safetensors", model(1))
    report = merge(
        pair(tmp_path, model(2), model(6)), out, base=base, beta=0.5,
        layers=[
            "D.low.*=0.25", "D.high.*=second", "D.*=drop",
            "G.a.*=task_arithmetic;weight:1,2;freeze", "G.*=slerp;t:1", "norm.*=base", "re:rest.*",
        ],
    )  # fmt: skip
    assert {name: array.tolist() for name, array in load_file(out).items()} == {
        "D.low.w": [5, 5, 5],  # 0.25·2 + 0.75·6
        "D.high.w": [6, 6, 6],
        "G.a.w": [12, 12, 12],  # 1 + 1·(2 − 1) + 2·(6 − 1)
        "G.b.w": [6, 6, 6],
        "norm.w": [1, 1, 1],
        "rest.w": [4, 4, 4],
    }
    assert report.plan.dropped == ("D.head.w",)
    assert report.plan.frozen == ("G.a.w",)
    assert [(taken.tensors, taken.parameters) for taken in report.plan.rule_counts()] == [
        (1, 3)
    ] * 7


@pytest.mark.parametrize(
    ("rest", "expected"), [("first", 1.0), ("second", 2.0), ("base", 3.0), ("drop", None)]
)
def test_what_no_rule_takes_is_kept_from_the_model_that_was_asked_for(
    rest: Any, expected: float | None, tmp_path: Path, out: Path
) -> None:
    def model(value: float) -> dict[str, np.ndarray]:
        return {"disc.w": np.array([value], F32), "gen.w": np.array([value], F32)}

    base = save(tmp_path / "base.safetensors", model(3)) if rest == "base" else None
    merge(pair(tmp_path, model(1), model(2)), out, base=base, layers="disc.*", rest=rest)
    found = load_file(out)
    assert found["disc.w"] == 1.5
    assert found.get("gen.w", [None])[0] == expected


def test_the_output_is_written_as_the_reference_library_would_write_it(
    tmp_path: Path, out: Path
) -> None:
    tensors = {"b": np.ones(3, np.float16), "z.w": np.ones((2, 2), F32), "a": np.ones(1, F32)}
    model = save(tmp_path / "a.safetensors", tensors)
    merge([model, model], out)
    with safetensors.safe_open(out, "np") as opened:
        metadata = opened.metadata()
    assert metadata.keys() == {LINEAGE_KEY}
    assert out.read_bytes() == safetensors.numpy.save(tensors, metadata)


def test_the_first_models_metadata_is_kept(tmp_path: Path, out: Path) -> None:
    a = save(tmp_path / "a.safetensors", {"x": np.ones(1, F32)}, {"format": "pt", "epoch": "3"})
    b = save(tmp_path / "b.safetensors", {"x": np.ones(1, F32)}, {"format": "tf", "loss": "1"})
    merge([a, b], out)
    with safetensors.safe_open(out, "np") as opened:
        metadata = opened.metadata()
    assert metadata.keys() == {"format", "epoch", LINEAGE_KEY}
    assert (metadata["format"], metadata["epoch"]) == ("pt", "3")


def test_small_tensors_are_each_merged_with_their_own_wherever_they_lie(
    tmp_path: Path, out: Path, normal: np.random.Generator
) -> None:
    # In the second file, others lie between some of the first's neighbours.
    names = [f"t{i:03}" for i in range(200)]
    a = {name: normal.normal(size=int(normal.integers(0, 9))).astype(F32) for name in names}
    b = {name: normal.normal(size=a[name].size).astype(F32) for name in names}
    between = {f"{name}x": normal.normal(size=3).astype(F32) for name in names[::7]}
    models = pair(tmp_path, a, {**b, **between})
    merge(models, out, beta=0.3, layers=["*x=drop", "t1*=0.9", "*"])
    found = load_file(out)
    assert found.keys() == a.keys()
    for name in names:
        beta = 0.9 if name.startswith("t1") else 0.3
        assert same(found[name], linear([beta, 1 - beta], a[name], b[name])), name

    bad = next(name for name in names[100:] if a[name].size > 1)
    b[bad][-1] = np.nan
    save(models[1], {**b, **between})
    sentence = nonfinite(
        tmp_path, models, layers=["*x=drop", "*"], output=tmp_path / "2.safetensors"
    )
    assert sentence.startswith(f"NaN or infinity in 1 tensor: {bad} (1 in b.safetensors")


def test_a_model_may_be_given_twice(tmp_path: Path, out: Path, normal: np.random.Generator) -> None:
    tensors = {"x": normal.normal(size=3 * BLOCK).astype(F32)}
    model = save(tmp_path / "a.safetensors", tensors)
    merge([model, model], out)
    assert same(load_file(out)["x"], tensors["x"])


def test_open_checkpoints_may_be_given_too(tmp_path: Path, out: Path) -> None:
    paths = pair(tmp_path, {"x": np.zeros(2, F32)}, {"x": np.ones(2, F32)})
    merge([modelsoup.open_checkpoint(path) for path in paths], out, beta=0.5)
    assert load_file(out)["x"].tolist() == [0.5, 0.5]


# The same bytes, however they are made


@pytest.fixture
def zoo(tmp_path: Path, normal: np.random.Generator) -> list[Path]:
    """Two models with everything in them, in files whose tensors are in different orders."""

    def model(other: Any) -> dict[str, np.ndarray]:
        return {
            "D.long.weight": normal.normal(size=5 * BLOCK + 3).astype(F32),
            "D.half.weight": normal.normal(size=(2, BLOCK + 1)).astype(other),
            "D.short": normal.normal(size=5).astype(np.float16),
            "G.double": normal.normal(size=BLOCK + 9),
            "G.brain": normal.normal(size=2 * BLOCK).astype(ml_dtypes.bfloat16),
            "G.kept": normal.normal(size=BLOCK + 1).astype(F32),
            "G.seconds": normal.normal(size=BLOCK + 1).astype(F32),
            "G.dropped": normal.normal(size=BLOCK + 1).astype(F32),
            "G.bn.running_mean": normal.normal(size=17).astype(F32),
            "G.bn.num_batches_tracked": np.array(int(normal.integers(1, 100)), np.int64),
            "mask": np.arange(BLOCK) % 3 == 0,
            "scalar": np.array(normal.normal(), F32),
            "none": np.empty((3, 0), F32),
        }

    return pair(tmp_path / "zoo", model(ml_dtypes.bfloat16), model(np.float64))


ZOO: dict[str, Any] = {
    "layers": [
        "G.kept=first", "G.seconds=second", "G.dropped=drop", "D.*=0.3", "G.double=slerp;t:.4", "*",
    ],
}  # fmt: skip


def execute(models: Sequence[Path], output: Path, *, workers: int, slice_elements: int) -> Path:
    """`merge`, with a slice size of one's own."""
    recipe = modelsoup.Recipe(**ZOO)
    plan = modelsoup.plan_merge([modelsoup.open_checkpoint(m) for m in models], recipe)
    tensors = [OutputTensor(step.name, step.dtype, step.shape) for step in plan.steps]
    engine._execute(
        plan, output, layout(tensors, file_name=output.name, shard_size=None), workers=workers,
        force=False, sha256=False, fsync=False, progress=None,
        slice_elements=slice_elements,
    )  # fmt: skip
    return output


@pytest.mark.parametrize(("count", "blocks"), [(2, 16), (23, 2), (24, 1), (60, 1)])
def test_slices_are_as_long_as_all_buffers_allow(count: int, blocks: int, tmp_path: Path) -> None:
    """48 MB, for 4 workers: of each model a slice, and one of the result."""
    model = modelsoup.open_checkpoint(
        save(tmp_path / "a.safetensors", {"x": np.ones(4, np.float32)})
    )
    plan = modelsoup.plan_merge([model] * count, modelsoup.Recipe())
    inputs = Inputs(plan.stored)
    try:
        assert Stream(plan, inputs, 4, SLICE, None).slice_elements == blocks * BLOCK
    finally:
        inputs.close()


def test_a_lineage_with_sha256_moves_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its place is reserved: a header that grew would have the whole file written twice."""
    models = [save(tmp_path / f"{n}.safetensors", {"x": np.full(4, n, np.float32)}) for n in (1, 2)]
    monkeypatch.delattr("modelsoup.files.writer.CheckpointWriter._move_data")
    for sha256 in (True, False):
        merge(models, tmp_path / f"{sha256}.safetensors", sha256=sha256)
        made = modelsoup.read_lineage(tmp_path / f"{sha256}.safetensors")
        assert all(("sha256" in entry) == sha256 for entry in made["inputs"])


def test_no_byte_depends_on_workers_or_slices(zoo: list[Path], tmp_path: Path) -> None:
    results = {
        execute(
            zoo, tmp_path / f"{workers}-{blocks}.safetensors", workers=workers,
            slice_elements=blocks * BLOCK,
        ).read_bytes()
        for workers, blocks in ((1, 1), (1, 8), (2, 2), (5, 1), (5, 3), (64, 8))
    }  # fmt: skip
    assert len(results) == 1
    found, (a, b) = load(tmp_path / "5-3.safetensors"), map(load, zoo)
    for name, beta in (
        ("D.long.weight", 0.3), ("D.half.weight", 0.3), ("D.short", 0.3), ("G.brain", 0.5),
        ("G.kept", 1), ("G.seconds", 0),
    ):  # fmt: skip
        expected = linear([beta, 1 - beta], a[name], b[name]).astype(a[name].dtype)
        assert same(found[name], expected), name


def test_no_byte_of_a_tensor_depends_on_the_shards_it_comes_from_or_goes_to(
    zoo: list[Path], tmp_path: Path
) -> None:
    merge(zoo, tmp_path / "whole.safetensors", **ZOO)
    expected = stored(tmp_path / "whole.safetensors")
    for size in (1_000_000, 300_000, 1):
        folder = tmp_path / f"out-{size}"
        merge(zoo, folder, shard_size=size, **ZOO)
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert stored(folder) == expected

    sharded = []
    for number, model in enumerate(zoo):
        tensors = load(model)
        names = sorted(tensors)[:: 1 if number else -1]  # shards of the two do not correspond
        parts = [{n: tensors[n] for n in names[i::3]} for i in range(3)]
        shards = {f"model-{i}-of-3.safetensors": part for i, part in enumerate(parts, 1)}
        sharded.append(save_folder(tmp_path / f"in-{number}", shards))
    merge(sharded, tmp_path / "from-shards.safetensors", **ZOO)
    assert stored(tmp_path / "from-shards.safetensors") == expected


@pytest.mark.needs("fast")
def test_compiled_loops_give_the_same_bytes_as_numpy(
    zoo: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSOUP_FAST", "0")
    merge(zoo, tmp_path / "numpy.safetensors", **ZOO)
    monkeypatch.setattr(fused, "_loops", {})
    monkeypatch.setenv("MODELSOUP_FAST", "1")
    merge(zoo, tmp_path / "compiled.safetensors", **ZOO)
    assert sum(loop is not None for loop in fused._loops.values()) >= 3  # not numpy twice
    numpys, compiled = tmp_path / "numpy.safetensors", tmp_path / "compiled.safetensors"
    assert numpys.read_bytes() == compiled.read_bytes()


# Dtypes


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_dtype_is_merged_as_numpy_does_it(
    dtype: str, tmp_path: Path, out: Path, normal: np.random.Generator
) -> None:
    a, b = (normal.normal(size=(5, 7)).astype(FLOATS[dtype]) for _ in range(2))
    merge(pair(tmp_path, {"x": a}, {"x": b}), out, beta=0.3)
    expected = linear([0.3, 0.7], a, b).astype(FLOATS[dtype])
    assert same(load(out)["x"], expected)
    if not dtype.startswith("F8"):  # the reference library has no numpy arrays of these
        assert same(load_file(out)["x"], expected)


@pytest.mark.parametrize("second", FLOATS)
@pytest.mark.parametrize("first", FLOATS)
def test_inputs_may_differ_in_dtype_and_the_output_has_the_firsts(
    first: str, second: str, tmp_path: Path, out: Path, normal: np.random.Generator
) -> None:
    a = normal.normal(size=101).astype(FLOATS[first])
    b = normal.normal(size=101).astype(FLOATS[second])
    report = merge(pair(tmp_path, {"x": a}, {"x": b}), out, beta=0.25)
    found = load(out)["x"]
    assert found.dtype == FLOATS[first]
    parts = 0.25 * a.astype(np.float64), 0.75 * b.astype(np.float64)
    spacing = float(ml_dtypes.finfo(FLOATS[first]).eps) + 2.0**-22
    allowed = spacing * (np.abs(parts[0]) + np.abs(parts[1]))
    assert np.all(np.abs(found.astype(np.float64) - sum(parts)) <= allowed)
    assert ("dtype" in notices(report)) == (first != second)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_output_has_the_dtype_that_was_asked_for(
    dtype: str, tmp_path: Path, out: Path, normal: np.random.Generator
) -> None:
    a, b = (
        {
            "merged": normal.normal(size=99).astype(F32),
            "kept": normal.normal(size=99).astype(np.float16),
            "count": np.array([3], np.int64),
            "kept.count": np.array([4], np.int64),
        }
        for _ in range(2)
    )
    merge(pair(tmp_path, a, b), out, beta=0.5, layers=["kept*=second", "*"], dtype=dtype)
    found = load(out)
    kind = FLOATS[dtype]
    assert same(found["merged"], linear([0.5, 0.5], a["merged"], b["merged"]).astype(kind))
    assert same(found["kept"], b["kept"].astype(F32).astype(kind))
    assert same(found["count"], a["count"])  # the dtype is for floats
    assert same(found["kept.count"], b["kept.count"])


def test_bfloat16_stays_bfloat16_by_default(tmp_path: Path, out: Path) -> None:
    # sd-mecha's default output is float16, where this overflows.
    big = np.array([1e30], ml_dtypes.bfloat16)
    merge(pair(tmp_path, {"x": big}, {"x": big}), out)
    assert same(load(out)["x"], big)


def test_sums_of_half_precision_do_not_overflow_on_the_way(tmp_path: Path, out: Path) -> None:
    big = np.array([60000, -60000], np.float16)
    merge(pair(tmp_path, {"x": big}, {"x": big}), out, weights=[3, 3])
    assert same(load(out)["x"], big)


# What is not a float


@pytest.mark.parametrize("dtype", OTHERS)
def test_equal_integers_and_truth_values_are_carried_over(
    dtype: str, tmp_path: Path, out: Path
) -> None:
    values = (np.arange(2 * BLOCK + 5) % 2).astype(OTHERS[dtype])
    report = merge(pair(tmp_path, {"ids": values}, {"ids": values}), out)
    assert same(load(out)["ids"], values)
    assert notices(report) == {"carried": ("ids",)}


@pytest.mark.parametrize("dtype", OTHERS)
def test_unequal_integers_are_never_averaged(dtype: str, tmp_path: Path, out: Path) -> None:
    a = np.zeros(2 * BLOCK + 5, OTHERS[dtype])
    b = a.copy()
    b[-1] = 1
    models = pair(tmp_path, {"w": np.zeros(2, F32), "ids": a}, {"w": np.zeros(2, F32), "ids": b})
    assert refusal(tmp_path, models, MismatchError) == (
        f"1 tensor that is no float differs between the models: ids ({dtype}) (--on-integer "
        f"first or max says what to take, or keep them with --layers 'ids=first', or '=drop')"
    )
    merge(models, tmp_path / "max.safetensors", on_integer="max")
    assert same(load(tmp_path / "max.safetensors")["ids"], b)
    merge(models, tmp_path / "first.safetensors", on_integer="first")
    assert same(load(tmp_path / "first.safetensors")["ids"], a)
    merge(models, tmp_path / "rule.safetensors", layers=["ids=second", "*"])
    assert same(load(tmp_path / "rule.safetensors")["ids"], b)


def test_the_largest_of_signed_integers_is_not_that_of_their_bits(
    tmp_path: Path, out: Path
) -> None:
    a, b = np.array([-5, 5, -(2**63)], np.int64), np.array([3, -7, 2**63 - 1], np.int64)
    merge(pair(tmp_path, {"n": a}, {"n": b}), out, on_integer="max")
    assert load(out)["n"].tolist() == [3, 5, 2**63 - 1]


def test_of_the_counters_of_batchnorm_the_largest_is_taken_and_it_stays_an_integer(
    tmp_path: Path, out: Path
) -> None:
    # mergekit refuses two GANs whose counters differ; sd-mecha makes a float32 of them.
    models = [
        save(tmp_path / f"{n}.safetensors", {"G.bn.num_batches_tracked": np.array(n, np.int64)})
        for n in (1234, 99, 1235)
    ]
    report = merge(models, out)
    assert same(load(out)["G.bn.num_batches_tracked"], np.array(1235, np.int64))
    assert notices(report) == {"carried": ("G.bn.num_batches_tracked",)}
    assert "differs between the models" in refusal(
        tmp_path, models, MismatchError, output=tmp_path / "x.safetensors", on_integer="error"
    )


OPAQUE = {
    "F8_E8M0": ([3], b"\x7f\x80\x00"),
    "F4": ([2, 4], b"\x12\x34\x56\x78"),
    "F6_E2M3": ([4], b"\x01\x02\x03"),
    "F8_E4M3FNUZ": ([2], b"\x01\x80"),
    "C64": ([1], struct.pack("<2f", 1, -1)),
}


@pytest.mark.parametrize("dtype", OPAQUE)
def test_what_numpy_cannot_compute_with_is_carried_over_byte_for_byte(
    dtype: str, tmp_path: Path, out: Path
) -> None:
    shape, content = OPAQUE[dtype]
    models = [
        save_raw(tmp_path / f"{name}.safetensors", {"x": (dtype, shape, content)}) for name in "ab"
    ]
    report = merge(models, out)
    assert stored(out) == {"x": (dtype, tuple(shape), content)}
    assert notices(report) == {"carried": ("x",)}


@pytest.mark.parametrize("dtype", OPAQUE)
def test_what_numpy_cannot_compute_with_is_refused_where_it_differs(
    dtype: str, tmp_path: Path, out: Path
) -> None:
    shape, content = OPAQUE[dtype]
    other = bytes([*content[:-1], content[-1] ^ 1])
    models = [
        save_raw(tmp_path / f"{name}.safetensors", {"x": (dtype, shape, data)})
        for name, data in (("a", content), ("b", other))
    ]
    for policy in (None, "error", "max"):  # there is no largest of these
        assert f"x ({dtype})" in refusal(tmp_path, models, MismatchError, on_integer=policy)
    merge(models, out, on_integer="first")
    assert stored(out)["x"][2] == content


def test_an_integer_in_the_base_is_not_merged_with_floats_in_silence(tmp_path: Path) -> None:
    models = pair(tmp_path, {"x": np.array([1, 2], F32)}, {"x": np.array([3, 1], F32)})
    base = save(tmp_path / "base.safetensors", {"x": np.array([0, 0], np.int32)})
    options: dict[str, Any] = {"base": base, "method": "task_arithmetic", "weights": [1, 1]}
    for policy in (None, "max"):  # 'max' must not take the larger one of two floats
        sentence = refusal(tmp_path, models, MismatchError, on_integer=policy, **options)
        assert "x (" in sentence
        assert "I32" in sentence


# Folders


@pytest.fixture
def model_folder(tmp_path: Path, normal: np.random.Generator) -> Path:
    return save_folder(
        tmp_path / "bert",
        {
            "model-00001-of-00002.safetensors": {"a.w": normal.normal(size=9).astype(F32)},
            "model-00002-of-00002.safetensors": {"b.w": normal.normal(size=8).astype(F32)},
        },
    )


def test_a_sharded_folder_makes_one_file_and_a_folder_again(
    model_folder: Path, tmp_path: Path, out: Path
) -> None:
    merge([model_folder, model_folder], out)
    assert stored(out) == stored(model_folder)
    merge([out, model_folder], tmp_path / "again", shard_size=40)
    assert stored(tmp_path / "again") == stored(model_folder)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 4 * 17},
        "weight_map": {
            "a.w": "model-00001-of-00002.safetensors", "b.w": "model-00002-of-00002.safetensors",
        },
    }  # fmt: skip


def test_config_and_tokenizer_come_along_from_the_first_model(
    model_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model_folder, tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    (other / "extra.txt").write_text("")
    merge([model_folder, other], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    for name in ("config.json", "tokenizer.json"):
        copied = (tmp_path / "out" / name).read_bytes()
        assert copied == (model_folder / name).read_bytes()


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_config_names_the_dtype_that_the_weights_have(
    key: str, model_folder: Path, tmp_path: Path
) -> None:
    (model_folder / "config.json").write_text(json.dumps({"model_type": "é", key: "float32"}))
    merge([model_folder, model_folder], tmp_path / "out", dtype="bf16")
    config = (tmp_path / "out" / "config.json").read_text("utf-8")
    assert json.loads(config) == {"model_type": "é", key: "bfloat16"}
    original = (model_folder / "config.json").read_text()
    assert json.loads(original)[key] == "float32"


def test_a_config_that_is_not_transformers_is_copied_as_it_is(
    model_folder: Path, tmp_path: Path
) -> None:
    for number, text in enumerate(('{"a": 1}', "[1]", "not JSON")):
        (model_folder / "config.json").write_text(text)
        merge([model_folder, model_folder], tmp_path / f"out{number}", dtype="bf16")
        assert (tmp_path / f"out{number}" / "config.json").read_text() == text


def test_a_diffusion_model_keeps_its_file_name(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    save(folder / "diffusion_pytorch_model.safetensors", {"w": np.zeros(2, F32)})
    merge([folder, folder], tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["diffusion_pytorch_model.safetensors"]


def test_a_second_run_into_a_folder_leaves_nothing_of_the_first(
    model_folder: Path, tmp_path: Path
) -> None:
    # mergekit leaves the old shards and index, and its own loader then reads the old model.
    out = tmp_path / "out"
    merge([model_folder, model_folder], out, shard_size=1)
    assert len(list(out.glob("*.safetensors"))) == 2
    zero = save(tmp_path / "zero.safetensors", {"a.w": np.zeros(9, F32), "b.w": np.zeros(8, F32)})
    with pytest.raises(OutputError, match="exists and is not empty"):
        merge([zero, zero], out)
    merge([zero, zero], out, force=True)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert not any(array.any() for array in load(out).values())


def test_several_shards_do_not_go_into_one_file(tmp_path: Path) -> None:
    model = save(tmp_path / "a.safetensors", {"a": np.zeros(9, F32), "b": np.zeros(9, F32)})
    sentence = refusal(tmp_path, [model, model], OutputError, shard_size="40B")
    assert sentence.endswith("is one file, and is not divided into shards: name a folder")


# Lineage


def lineage(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "np") as opened:
        content: dict[str, Any] = json.loads(opened.metadata()[LINEAGE_KEY])
    return content


def test_the_lineage_says_how_the_soup_was_made(tmp_path: Path, out: Path) -> None:
    a, b = pair(
        tmp_path, {"d.w": np.zeros(2, F32), "g.w": np.zeros(2, F32)}, {"d.w": np.ones(2, F32)}
    )
    base = save(tmp_path / "base.safetensors", {"d.w": np.zeros(2, F32)})
    merge(
        [a, b], out, base=base, method="ties", weights=[0.2, 0.8], parameters={"density": 0.5},
        layers=["group:all=weight:1,2;freeze"], groups={"all": ["d.*"]}, dtype="f16", seed=7,
        on_integer="max", rest="first",
    )  # fmt: skip
    content = lineage(out)
    inputs, of_base = content.pop("inputs"), content.pop("base")
    assert content == {
        "format": 1,
        "version": modelsoup.__version__,
        "operation": "merge",
        "method": "ties",
        "weights": [0.2, 0.8],
        "parameters": {"density": 0.5},
        "rules": [
            {
                "pattern": "group:all", "action": "merge", "frozen": True,
                "parameters": {"weight": [1.0, 2.0]},
            }
        ],
        "rest": "first",
        "groups": {"all": ["d.*"]},
        "dtype": "F16",
        "on_integer": "max",
        "seed": 7,
    }  # fmt: skip
    for entry, file in zip([*inputs, of_base], [a, b, base], strict=True):
        assert entry == {
            "name": file.name,
            "size": file.stat().st_size,
            "xxh3_128": xxhash.xxh3_128_hexdigest(file.read_bytes()),
        }
    assert modelsoup.read_lineage(modelsoup.open_checkpoint(out)) == lineage(out)


@pytest.mark.parametrize("workers", [1, 4])
def test_digests_are_those_of_the_whole_files_in_whatever_order_they_were_read(
    workers: int, zoo: list[Path], out: Path
) -> None:
    # The second file's order is another one, and some tensors are dropped or kept.
    report = merge(zoo, out, workers=workers, sha256=True, **ZOO)
    for entry, file in zip(lineage(out)["inputs"], zoo, strict=True):
        content = file.read_bytes()
        assert entry["xxh3_128"] == xxhash.xxh3_128_hexdigest(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert report.sha256


def test_a_folder_has_a_digest_for_each_of_its_files(model_folder: Path, out: Path) -> None:
    merge([model_folder, model_folder], out, sha256=True)
    entry = lineage(out)["inputs"][0]
    files = sorted(model_folder.glob("*.safetensors"))
    assert entry["name"] == "bert"
    assert entry["size"] == sum(file.stat().st_size for file in files)
    assert entry["files"] == [
        {
            "name": file.name,
            "size": file.stat().st_size,
            "xxh3_128": xxhash.xxh3_128_hexdigest(file.read_bytes()),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    ]
    # What `cat DIGESTS | sha256sum` would give.
    joined = "".join(file["sha256"] for file in entry["files"]).encode()
    assert entry["sha256"] == hashlib.sha256(joined).hexdigest()


def test_the_same_merge_gives_the_same_bytes_anywhere_and_at_any_time(
    zoo: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(zoo, tmp_path / "out.safetensors", **ZOO)
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    for model in zoo:
        shutil.copy(model, elsewhere)
    monkeypatch.chdir(elsewhere)
    time.sleep(1.1)  # a time in seconds would be another one
    merge([model.name for model in zoo], "soup.safetensors", workers=1, **ZOO)
    content = (tmp_path / "out.safetensors").read_bytes()
    assert (elsewhere / "soup.safetensors").read_bytes() == content
    assert str(tmp_path).encode() not in content
    assert b"else" not in content


def test_a_soup_of_soups_holds_the_whole_tree(tmp_path: Path, out: Path) -> None:
    def one(name: str, value: float) -> Path:
        return save(tmp_path / name, {"x": np.array([value], F32)}, {"format": "pt"})

    a, b, c = one("a.safetensors", 1), one("b.safetensors", 2), one("c.safetensors", 9)
    inner = tmp_path / "inner.safetensors"
    merge([a, b], inner, beta=0.5)
    merge([inner, c, b], out, weights=[1, 1, 2])
    content = lineage(out)
    assert content["ancestors"] == {content["inputs"][0]["xxh3_128"]: lineage(inner)}
    with safetensors.safe_open(out, "np") as opened:
        assert opened.metadata().keys() == {"format", LINEAGE_KEY}

    graph = modelsoup.lineage_graph(modelsoup.open_checkpoint(out))
    names = networkx.get_node_attributes(graph, "name")
    edges = {(names[u], names[v]) for u, v in graph.edges}
    assert edges == {
        ("inner.safetensors", "out.safetensors"), ("c.safetensors", "out.safetensors"),
        ("b.safetensors", "out.safetensors"), ("a.safetensors", "inner.safetensors"),
        ("b.safetensors", "inner.safetensors"),
    }  # fmt: skip
    assert graph.number_of_nodes() == 5  # b came in by two ways and is one


def test_a_soup_can_be_stirred_again_and_again(tmp_path: Path) -> None:
    # A running average over an epoch's checkpoints nests this deep.
    new = save(tmp_path / "new.safetensors", {"x": np.array([1], F32)})
    soup = save(tmp_path / "0.safetensors", {"x": np.array([0], F32)})
    for number in range(1, 351):
        stirred = tmp_path / f"{number}.safetensors"
        merge([soup, new], stirred, beta=0.5, workers=1, fsync=False)
        soup.unlink()
        soup = stirred
    assert load(soup)["x"] == 1
    assert modelsoup.verify(soup).sound


def test_an_ancestor_that_came_in_by_many_ways_is_recorded_once(tmp_path: Path) -> None:
    # Otherwise the header doubles with each soup, and passes the format's 100 MB after twenty.
    older, soup = pair(tmp_path, {"x": np.array([0], F32)}, {"x": np.array([1], F32)})
    for number in range(14):
        stirred = tmp_path / f"{number}.safetensors"
        merge([soup, older], stirred, beta=0.5, workers=1, fsync=False)
        older, soup = soup, stirred
    assert soup.stat().st_size < 14 * 1000
    graph = modelsoup.lineage_graph(modelsoup.open_checkpoint(soup))
    assert graph.number_of_nodes() == 16


@pytest.mark.parametrize(
    "content",
    [
        "", "null", "{", "[]", "{}", '{"format": 1, "inputs": 3}', '{"format": 2, "inputs": []}',
        '{"format": 1, "inputs": [1]}', '{"format": 1, "inputs": [{}]}',
        '{"format": 1, "inputs": [{"name": "a.safetensors"}]}', '{"format": 1, "inputs": []}',
        '{"format": 1, "method": "linear", "inputs": [{"name": "a.safetensors", "size": 1, '
        '"xxh3_128": "00", "lineage": 5}]}',
    ],
)  # fmt: skip
def test_a_lineage_that_somebody_else_wrote_is_refused_in_one_sentence(
    content: str, tmp_path: Path
) -> None:
    save(tmp_path / "a.safetensors", {"x": np.zeros(2, F32)})
    strange = save(tmp_path / "b.safetensors", {"x": np.zeros(2, F32)}, {LINEAGE_KEY: content})
    checkpoint = modelsoup.open_checkpoint(strange)
    for use in (modelsoup.verify, modelsoup.lineage_graph, modelsoup.read_lineage):
        with pytest.raises(CheckpointError, match=r"b\.safetensors.*lineage"):
            use(checkpoint)


def test_verify_finds_its_inputs_unchanged_changed_or_gone(zoo: list[Path], tmp_path: Path) -> None:
    merge(zoo, zoo[0].parent / "soup.safetensors", **ZOO)
    report = modelsoup.verify(zoo[0].parent / "soup.safetensors")
    assert report.sound
    assert [(check.found, check.intact) for check in report.inputs] == [(f, True) for f in zoo]

    content = bytearray(zoo[1].read_bytes())
    content[-1] ^= 1
    zoo[1].write_bytes(content)
    report = modelsoup.verify(zoo[0].parent / "soup.safetensors")
    assert [check.name for check in report.changed] == [zoo[1].name]
    assert [check.intact for check in report.inputs] == [True, False]

    zoo[1].unlink()
    report = modelsoup.verify(zoo[0].parent / "soup.safetensors")
    assert report.sound
    assert [check.intact for check in report.inputs] == [True, None]


def test_verify_looks_for_folders_file_by_file(model_folder: Path, tmp_path: Path) -> None:
    merge([model_folder, model_folder], tmp_path / "soup", sha256=True)
    assert [c.intact for c in modelsoup.verify(tmp_path / "soup").inputs] == [True, True]
    shard = model_folder / "model-00002-of-00002.safetensors"
    save(shard, {"b.w": np.full(8, 5, F32)}, {"format": "pt"})
    assert [c.intact for c in modelsoup.verify(tmp_path / "soup").inputs] == [False, False]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = modelsoup.verify(tmp_path / "soup", folders=[elsewhere])
    assert [c.intact for c in moved.inputs] == [None, None]


# What the user should know


D_AND_REST_OF_SECOND = {"layers": "d", "rest": "second"}
# What the first and the second model have, the options, the kind of notice and its tensors.
NOTICED: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "dropped": ("d", "d v_head", {"layers": "d"}, "dropped", "v_head"),
    "dropped of the first": ("d v", "d", D_AND_REST_OF_SECOND, "dropped", "v"),
    "added": ("d", "d v", D_AND_REST_OF_SECOND, "added", "v"),
    "batchnorm": (
        "n.running_mean n.running_var w", "n.running_mean n.running_var w", {}, "recalibrate",
        "n.running_mean n.running_var",
    ),
    "spectral norm": (
        "c.weight_u c.weight_v w", "c.weight_u c.weight_v w", {}, "recalibrate",
        "c.weight_u c.weight_v",
    ),
    "spectral norm as a parametrization": (
        "c.parametrizations.weight.0._u", "c.parametrizations.weight.0._u", {}, "recalibrate",
        "c.parametrizations.weight.0._u",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTICED)
def test_what_the_user_did_not_ask_for_is_told_and_refused_where_strict(
    case: str, tmp_path: Path, out: Path
) -> None:
    first, second, options, kind, expected = NOTICED[case]
    names = tuple(expected.split())
    models = pair(tmp_path, *({n: np.ones(2, F32) for n in m.split()} for m in (first, second)))
    sentence = refusal(tmp_path, models, MismatchError, strict=True, **options)
    assert sentence.endswith("(--strict)")
    assert all(name in sentence for name in names)
    refusal(tmp_path, models, MismatchError, strict=True, dry_run=True, **options)
    report = merge(models, out, **options)
    assert notices(report)[kind] == names
    (message,) = [n.message for n in report.notices if n.kind == kind]
    assert message.startswith(f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} ")


def test_what_the_user_did_ask_for_is_not_warned_of(tmp_path: Path, out: Path) -> None:
    a = {n: np.zeros(2, F32) for n in ("d", "head", "bn.running_mean")}
    b = {n: np.zeros(2, F32) for n in ("d", "v_head", "bn.running_mean")}
    report = merge(
        pair(tmp_path, a, b), out, strict=True,
        layers=["v_head=second", "head=drop", "bn.*=first", "*"],
    )  # fmt: skip
    assert report.notices == ()  # not even how the rest was meant: there is none
    assert report.plan.added == ("v_head",)
    assert load(out).keys() == {"d", "v_head", "bn.running_mean"}


def test_estimates_are_left_out_where_they_would_be_merged(tmp_path: Path, out: Path) -> None:
    names = ("D.u0", "D.w", "E.u0", "E.w")
    models = pair(tmp_path, *({n: np.full(2, v, F32) for n in names} for v in (1, 3)))
    given: dict[str, Any] = {
        "layers": ["E.*=second", "D.*=merge;freeze"], "estimates": ["*.u0", "*.nowhere"],
    }  # fmt: skip
    report = merge(models, out, strict=True, **given)
    assert {n: v.tolist() for n, v in load(out).items()} == {
        "D.w": [2, 2], "E.u0": [3, 3], "E.w": [3, 3],
    }  # fmt: skip
    assert [(n.kind, n.names, n.level) for n in report.notices] == [
        ("estimates", ("D.u0",), "note")
    ]
    assert report.plan.frozen == ("D.w",)
    assert report.plan.dropped == ("D.u0",)
    lineage = modelsoup.read_lineage(modelsoup.open_checkpoint(out))
    assert lineage is not None
    assert lineage["estimates"] == ["*.u0", "*.nowhere"]


def test_an_estimate_that_a_model_lacks_need_not_be_in_the_others(
    tmp_path: Path, out: Path
) -> None:
    models = pair(tmp_path, {"w": np.ones(2, F32)}, {n: np.zeros(2, F32) for n in ("w", "u0")})
    assert "u0" in refusal(tmp_path, models, MismatchError, rest="merge")
    merge(models, out, estimates="u0")
    assert load(out).keys() == {"w"}


def test_a_part_kept_from_a_merge_has_its_estimates_found_anew(tmp_path: Path, out: Path) -> None:
    names = ("D.u0", "D.w", "E.u0", "E.w")
    a, b, c = (
        save(tmp_path / f"{v}.safetensors", {n: np.full(2, v, F32) for n in names})
        for v in (1, 3, 5)
    )
    merge([a, b], tmp_path / "ab.safetensors", estimates="*.u0")
    given: dict[str, Any] = {"layers": ["E.*=first"], "rest": "second", "estimates": ["*.u0"]}
    report = merge([tmp_path / "ab.safetensors", c], out, **given)
    assert {n: v.tolist() for n, v in load(out).items()} == {
        "D.u0": [5, 5], "D.w": [5, 5], "E.w": [2, 2],
    }  # fmt: skip
    left = [n for n in report.notices if n.kind == "estimates"]
    assert [(n.names, n.level) for n in left] == [(("E.u0",), "note")]


def test_one_models_estimates_are_its_own(tmp_path: Path, out: Path) -> None:
    model = save(tmp_path / "a.safetensors", {n: np.ones(2, F32) for n in ("w", "u0")})
    merge([model], out, estimates="u0", dtype="float16")
    assert load(out).keys() == {"w", "u0"}


def test_estimates_are_patterns(tmp_path: Path) -> None:
    models = pair(tmp_path, {"w": np.ones(2, F32)}, {"w": np.ones(2, F32)})
    sentence = refusal(tmp_path, models, ParameterError, estimates=[1])
    assert sentence == "estimates is [1], not a list of patterns"


def test_a_depth_that_no_rule_uses_is_not_ignored(tmp_path: Path) -> None:
    models = pair(tmp_path, {"a.w": np.zeros(2, F32)}, {"a.w": np.ones(2, F32)})
    for layers in ([], ["a.*=0.3"]):
        assert "low" in refusal(tmp_path, models, SoupError, low_level=0.3, layers=layers)


# NaN and infinity


def nonfinite(folder: Path, models: Sequence[Path], **options: Any) -> str:
    sentence = refusal(folder, models, NonfiniteError, **options)
    assert re.search(r"\((--allow-nonfinite '[^']+' )+lets them pass\)$", sentence)
    return sentence


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK, -1])
def test_nan_anywhere_in_an_input_is_an_error_that_names_the_tensor(
    place: int, dtype: str, tmp_path: Path, out: Path
) -> None:
    # mergekit writes NaN without a word; sd-mecha drops the tensor from the output.
    good = np.ones(2 * BLOCK + 100, FLOATS[dtype])
    bad = good.copy()
    bad[place] = np.nan
    models = pair(tmp_path, {"c.w": good, "d.w": good}, {"c.w": good, "d.w": bad})
    sentence = nonfinite(tmp_path, models)
    assert sentence.startswith("NaN or infinity in 1 tensor: d.w (1 in ")
    assert "d.w (1 in b.safetensors, the second model)" in sentence
    report = merge(models, out, allow_nonfinite=True)
    found = load(out)["d.w"].astype(F32)
    assert np.flatnonzero(np.isnan(found)).tolist() == [place % good.size]
    assert notices(report)["nonfinite"] == ("d.w",)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_infinity_counts_as_nan_does(value: float, tmp_path: Path) -> None:
    for dtype in (np.float64, F32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
        good, bad = np.zeros(5, dtype), np.array([0, value, 0, value, 0]).astype(dtype)
        models = pair(tmp_path, {"x": bad}, {"x": good})
        assert "x (2 in a.safetensors, the first model)" in nonfinite(tmp_path, models)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("layers", ["x=first", "y", "x=first;freeze", "x=second"])
def test_what_is_only_copied_may_be_nonfinite_as_a_mask_is(
    layers: str, value: float, tmp_path: Path, out: Path
) -> None:
    tensors = {"x": np.array([1, value], F32), "y": np.ones(2, F32)}
    models = pair(tmp_path, tensors, tensors)
    for dtype in (None, "bf16"):
        report = merge(models, out, layers=layers, dtype=dtype, force=True)
        assert load(out)["x"].astype(F32).tobytes() == tensors["x"].tobytes()
        assert notices(report)["nonfinite"] == ("x",)
        assert modelsoup.read_lineage(modelsoup.open_checkpoint(out))["nonfinite"] == {"x": 1}


def test_nan_in_the_base_is_an_error_too(tmp_path: Path) -> None:
    models = pair(tmp_path, {"x": np.ones(2, F32)}, {"x": np.ones(2, F32)})
    base = save(tmp_path / "base.safetensors", {"x": np.array([np.nan, 1], F32)})
    for method in ("task_arithmetic", "ties", "dare_ties"):
        sentence = nonfinite(tmp_path, models, base=base, method=method, weights=[1, 1])
        assert "x (1 in base.safetensors, the base model)" in sentence


def test_nan_in_a_tensor_that_is_dropped_does_not_matter(tmp_path: Path, out: Path) -> None:
    tensors = {"x": np.array([np.nan], F32), "y": np.ones(1, F32)}
    merge(pair(tmp_path, tensors, tensors), out, layers=["x=drop", "*"])
    assert load(out).keys() == {"y"}


@pytest.mark.parametrize(
    ("stored_as", "dtype", "value"),
    [
        ("F32", "F16", 65520), ("F32", "F8_E5M2", 61441), ("F32", "F8_E4M3", 465),
        ("F64", "F32", 1e39), ("F64", "BF16", 3.4e38), ("BF16", "F16", 1e5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layers", ["*", "*=first"])
def test_what_a_dtype_cannot_hold_is_an_error_and_not_an_infinity(
    layers: str, stored_as: str, dtype: str, value: float, tmp_path: Path, out: Path
) -> None:
    tensors = {"big": np.array([1, value, -value], FLOATS[stored_as]), "ok": np.ones(1, F32)}
    models = pair(tmp_path, tensors, tensors)
    sentence = nonfinite(tmp_path, models, layers=layers, dtype=dtype)
    assert sentence.startswith("NaN or infinity in 1 tensor: big (2 in the result)")
    report = merge(models, out, layers=layers, dtype=dtype, allow_nonfinite=True)
    assert not np.isfinite(load(out)["big"].astype(np.float64)[1:]).any()
    assert notices(report)["nonfinite"] == ("big",)


def test_the_largest_value_that_a_dtype_can_hold_is_no_error(tmp_path: Path, out: Path) -> None:
    for dtype, value in (("F16", 65519), ("F8_E5M2", 61439), ("F8_E4M3", 463)):
        tensors = {"big": np.array([value, -value], F32)}
        merge(pair(tmp_path, tensors, tensors), out, dtype=dtype, force=True)
        largest = float(ml_dtypes.finfo(FLOATS[dtype]).max)
        assert load(out)["big"].astype(np.float64).tolist() == [largest, -largest]


def test_a_result_that_overflows_names_the_result(tmp_path: Path) -> None:
    tensors = {"x": np.array([3e38], F32)}
    models = pair(tmp_path, tensors, tensors)
    options: dict[str, Any] = {"weights": [1, 1], "parameters": {"normalize": False}}
    assert "x (1 in the result)" in nonfinite(tmp_path, models, **options)


def test_weights_that_sum_to_zero_are_refused_before_anything_is_read(
    tmp_path: Path, out: Path
) -> None:
    # mergekit: 35104 of 35104 elements non-finite.
    models = pair(tmp_path, {"x": np.ones(2, F32)}, {"x": np.zeros(2, F32)})
    for dry_run in (False, True):
        sentence = refusal(tmp_path, models, ParameterError, weights=[1, -1], dry_run=dry_run)
        assert "the weights of 'linear' sum to 0 and cannot be normalised" in sentence
    merge(models, out, weights=[1, -1], allow_nonfinite=True)
    assert not np.isfinite(load(out)["x"]).any()


def test_many_bad_tensors_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full(3, np.nan, F32) for i in range(9)}
    sentence = nonfinite(tmp_path, pair(tmp_path, tensors, {n: np.ones(3, F32) for n in tensors}))
    assert sentence.startswith("NaN or infinity in 9 tensors: t0 (3 in a.safetensors")
    assert "t6 (" not in sentence


# Models that do not fit together


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, F32) for name, shape in shapes.items()}


def test_tensors_that_only_one_model_has_are_refused_with_what_to_do(
    tmp_path: Path, out: Path
) -> None:
    # mergekit drops them without a word.
    models = pair(tmp_path, zeros(x=(2,), v_head=(2,)), zeros(x=(2,)))
    assert refusal(tmp_path, models, MismatchError) == (
        "the models do not fit together: 1 tensor is missing from b.safetensors, the second "
        "model: v_head (keep them with --layers 'v_head=first', or '=drop')"
    )
    assert "missing from b.safetensors" in refusal(tmp_path, models, MismatchError, dry_run=True)
    merge(models, out, layers=["v_head=first"])
    assert load(out).keys() == {"x", "v_head"}


def test_every_kind_of_mismatch_is_told_at_once(tmp_path: Path) -> None:
    a = {**zeros(x=(2,), s=(2, 3), only_a=(1,)), "i": np.zeros(2, np.int32)}
    b = {**zeros(x=(2,), s=(3, 2), only_b=(1,)), "i": np.zeros(2, np.int64)}
    sentence = refusal(tmp_path, pair(tmp_path, a, b), MismatchError)
    for part in (
        "missing from b.safetensors, the second model: only_a", "--layers 'only_a=first'",
        "missing from a.safetensors, the first model: only_b", "--layers 'only_b=second'",
        "1 tensor is of different shapes: s ([2, 3] and [3, 2])",
        "1 tensor is of different dtypes, which cannot be merged: i (I32 and I64)",
    ):  # fmt: skip
        assert part in sentence


def test_models_whose_files_have_the_same_name_are_told_apart(tmp_path: Path) -> None:
    # As most downloads are called.
    a = save(tmp_path / "a" / "model.safetensors", zeros(x=(2,), y=(2,)))
    b = save(tmp_path / "b" / "model.safetensors", zeros(x=(2,)))
    sentence = refusal(tmp_path, [a, b], MismatchError)
    assert "second" in sentence or str(b.parent) in sentence
    assert not ("first model" in sentence or str(a) in sentence)


def test_a_mismatch_of_shapes_says_which_how_many_and_what_to_do(tmp_path: Path) -> None:
    a, b = ({f"t{i}": np.zeros((i + 1, n), F32) for i in range(8)} for n in (2, 3))
    models = pair(tmp_path, {**a, **zeros(x=(1,))}, {**b, **zeros(x=(1,))})
    for dry_run in (False, True):  # headers are enough
        assert refusal(tmp_path, models, MismatchError, dry_run=dry_run) == (
            "the models do not fit together: 8 tensors are of different shapes: "
            "t0 ([1, 2] and [1, 3]), t1 ([2, 2] and [2, 3]), t2 ([3, 2] and [3, 3]), "
            "t3 ([4, 2] and [4, 3]), t4 ([5, 2] and [5, 3]) and 3 more (keep them with "
            "--layers 't0=first' --layers 't1=first' --layers 't2=first' --layers 't3=first' "
            "--layers 't4=first' …, or '=drop')"
        )


def test_a_float_and_an_integer_are_not_merged(tmp_path: Path) -> None:
    models = pair(tmp_path, {"x": np.zeros(2, F32)}, {"x": np.zeros(2, np.int32)})
    assert "x (F32 and I32)" in refusal(tmp_path, models, MismatchError)


def test_what_the_base_lacks_is_told(tmp_path: Path, out: Path) -> None:
    models = pair(tmp_path, zeros(x=(2,), y=(2,)), zeros(x=(2,), y=(2,)))
    base = save(tmp_path / "base.safetensors", zeros(x=(2,)))
    options: dict[str, Any] = {"base": base, "method": "ties", "weights": [1, 1]}
    assert "1 tensor is missing from the base model: y" in refusal(
        tmp_path, models, MismatchError, **options
    )
    merge(models, out, layers=["y=first", "*"], **options)


def test_a_model_that_a_rule_keeps_from_must_have_the_tensor(tmp_path: Path) -> None:
    models = pair(tmp_path, zeros(x=(2,), y=(2,)), zeros(x=(2,)))
    sentence = refusal(tmp_path, models, MismatchError, layers=["y=second", "*"])
    assert "1 tensor is not in the second model, from which a rule keeps: y" in sentence


def test_a_soup_of_nothing_is_refused(tmp_path: Path) -> None:
    models = pair(tmp_path, zeros(x=(2,)), zeros(x=(2,)))
    assert "no tensors" in refusal(tmp_path, models, MismatchError, layers="*=drop")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 1.5}, "beta is 1.5, but must be between 0 and 1"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": True}, "beta is True"),
        ({"beta": 0.5, "weights": [1, 1]}, "give --beta β or --weights W, not both"),
        ({"weights": [1, 2, 3]}, "3 values for 2 models"),
        ({"weights": [float("nan"), 1]}, "nan, not a finite number"),
        ({"weights": [1, 1], "parameters": {"weight": 2.0}}, "the weights are given twice"),
        ({"weights": 0.5}, "weights"),
        ({"method": "tise"}, "did you mean 'ties'"),
        ({"parameters": {"normalise": False}}, "did you mean 'normalize'"),
        (
            {"method": "ties", "parameters": {"densty": 1}, "weights": [1, 1], "base": "a"},
            "did you mean 'density'",
        ),
        ({"method": "ties", "weights": [1, 1]}, "'ties' needs a base model"),
        ({"base": "a"}, "a base model was given, but linear uses none"),
        ({"layers": "dics.*"}, "'dics.*' matches no tensor (of 1); did you mean 'disc"),
        ({"layers": "disc.*=base"}, "wants a base model"),
        ({"rest": "frist"}, "did you mean 'first'"),
        ({"on_integer": "mx"}, "did you mean 'max'"),
        ({"dtype": "bf61"}, "did you mean 'bf16'"),
        ({"dtype": 16}, "16"),
        ({"dtype": "int8"}, "not a float dtype"),
        ({"workers": 0}, "workers is 0, but must be an integer from 1 to 1,024"),
        ({"shard_size": "5XB"}, "'5XB' is not a size"),
        ({"seed": "abc"}, "seed"),
        ({"groups": ["a"]}, "groups"),
        ({"out_dtpye": "bf16"}, "merge() has no option 'out_dtpye'; did you mean 'dtype'"),
    ],
)  # fmt: skip
def test_an_option_that_makes_no_sense_is_one_sentence(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    models = pair(tmp_path, {"disc.w": np.zeros(2, F32)}, {"disc.w": np.zeros(2, F32)})
    if options.get("base"):
        options = {**options, "base": models[0]}
    assert said in refusal(tmp_path, models, SoupError, **options)


def test_beta_is_for_two_models(tmp_path: Path) -> None:
    models = pair(tmp_path, zeros(x=(1,)), zeros(x=(1,)))
    sentence = refusal(tmp_path, [*models, models[0]], ParameterError, beta=0.5)
    assert "beta is the share of the first of two models, but 3 were given" in sentence


def test_no_model_and_too_few_are_told(tmp_path: Path) -> None:
    model = save(tmp_path / "a.safetensors", zeros(x=(1,)))
    assert "at least one model" in refusal(tmp_path, [], ParameterError)
    assert "one model alone" in refusal(tmp_path, [model], ParameterError)
    assert "exactly 2 models" in refusal(
        tmp_path, [model] * 3, ParameterError, method="slerp", parameters={"t": 0.5}
    )


# Where the output goes


def test_an_existing_output_is_replaced_only_by_force(tmp_path: Path, out: Path) -> None:
    models = pair(tmp_path, zeros(x=(1,)), zeros(x=(1,)))
    out.write_bytes(b"precious")
    assert "exists (--force replaces it)" in refusal(tmp_path, models, OutputError)
    (notice,) = merge(models, out, dry_run=True).notices  # and looks at what would be written
    assert notice.message.endswith("exists (force=True replaces it)")
    assert out.read_bytes() == b"precious"
    merge(models, out, force=True)
    assert load(out)["x"] == 0


def test_a_failed_merge_leaves_the_old_output_alone(tmp_path: Path, out: Path) -> None:
    models = pair(tmp_path, {"x": np.array([np.nan], F32)}, zeros(x=(1,)))
    out.write_bytes(b"precious")
    assert "x (1 in a.safetensors, the first model)" in nonfinite(tmp_path, models, force=True)
    assert out.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "which", ["first", "second", "base", "link", "hard link", "other spelling"]
)
def test_an_output_that_is_an_input_is_refused(which: str, tmp_path: Path) -> None:
    a, b = pair(tmp_path, zeros(x=(1,)), zeros(x=(1,)))
    base = save(tmp_path / "base.safetensors", zeros(x=(1,)))
    link, hard = tmp_path / "link.safetensors", tmp_path / "hard.safetensors"
    link.symlink_to(a)
    hard.hardlink_to(b)
    outputs = {
        "first": a, "second": b, "base": base, "link": link, "hard link": hard,
        "other spelling": tmp_path / "." / ".." / tmp_path.name / "a.safetensors",
    }  # fmt: skip
    options: dict[str, Any] = {"base": base, "method": "task_arithmetic", "weights": [1, 1]}
    sentence = refusal(tmp_path, [a, b], OutputError, output=outputs[which], force=True, **options)
    assert "would replace" in sentence


def test_a_folder_or_shard_that_is_an_input_is_refused(model_folder: Path, tmp_path: Path) -> None:
    models = [model_folder, model_folder]
    for output, said in (
        (model_folder, "was not written by modelsoup"),
        (model_folder / "model-00002-of-00002.safetensors", "would replace"),
    ):
        assert said in refusal(tmp_path, models, OutputError, output=output, force=True)


def test_a_folder_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    # It is ours, so --force would replace it, and the input with it.
    models = pair(tmp_path, zeros(x=(1,)), zeros(x=(1,)))
    merge(models, tmp_path / "soup")
    inner = tmp_path / "soup" / "model.safetensors"
    for output in (tmp_path / "soup", tmp_path / "soup" / ".." / "soup"):
        sentence = refusal(tmp_path, [inner, models[0]], OutputError, output=output, force=True)
        assert "which is read" in sentence


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    models = pair(tmp_path, zeros(x=(1,)), zeros(x=(1,)))
    for dry_run in (False, True):
        sentence = refusal(
            tmp_path, models, OutputError, output=tmp_path / "no" / "o.safetensors", dry_run=dry_run
        )
        assert "no of the output o.safetensors does not exist" in sentence


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path: Path) -> None:
    elements = shutil.disk_usage(tmp_path).free // 4 + 10**9
    models = [save_sparse(tmp_path / f"{n}.safetensors", "x", elements) for n in "ab"]
    start = time.perf_counter()
    with pytest.raises(OutputError, match=r"needs \d\S+ \wB, but the disk has only"):
        merge(models, tmp_path / "out.safetensors")
    assert time.perf_counter() - start < 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


# Interruptions


INTERRUPTED = """
import sys, threading, time
import modelsoup

lock, done = threading.Lock(), 0

def progress(nbytes, total):
    global done
    with lock:
        done += nbytes
        print(done / total, flush=True)
    time.sleep(30 if done == total else 0.01)

*models, output = sys.argv[1:]
modelsoup.merge(models, output, beta=0.5, workers=2, progress=progress)
"""


@contextlib.contextmanager
def running(command: Sequence[str | Path]) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended whatever happens.

    It does not compile loops: what numba makes of an interruption differs from time to time.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "MODELSOUP_FAST": "0"},
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def interruptible(tmp_path: Path, normal: np.random.Generator) -> list[Path]:
    """Models that take long enough: eight slices, each read from both and written."""
    a, b = ({"x": normal.normal(size=64 * BLOCK).astype(F32)} for _ in range(2))
    return pair(tmp_path, a, b)


def wait_until(share: float, process: subprocess.Popen[str]) -> None:
    """Until `INTERRUPTED` has done at least this share of its reading and writing."""
    assert process.stdout is not None
    while (line := process.stdout.readline()) and float(line) < share:
        pass
    assert line, "it ended before it could be interrupted"


@pytest.mark.parametrize("output", ["out.safetensors", "out"])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_kill_at_any_moment_leaves_no_output_and_the_next_run_works_and_cleans(
    share: float, output: str, interruptible: list[Path], tmp_path: Path
) -> None:
    # mergekit leaves a plausible model-N.safetensors, sd-mecha a file with half of the tensors.
    path = tmp_path / output
    with running(["-c", INTERRUPTED, *interruptible, path]) as process:
        wait_until(share, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    left = sorted(p.name for p in tmp_path.iterdir() if p not in interruptible)
    assert len(left) == 1
    assert left[0].startswith(f".{output}.")
    assert left[0].endswith(PARTIAL_SUFFIX)

    merge(interruptible, path, beta=0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", output]
    assert same(load(path)["x"], linear([0.5, 0.5], *(load(m)["x"] for m in interruptible)))


@pytest.mark.parametrize("output", ["out.safetensors", "out"])
def test_ctrl_c_leaves_nothing(output: str, interruptible: list[Path], tmp_path: Path) -> None:
    with running(["-c", INTERRUPTED, *interruptible, tmp_path / output]) as process:
        wait_until(0.3, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    assert sorted(tmp_path.iterdir()) == interruptible


def test_ctrl_c_at_the_command_leaves_nothing_and_says_no_more_than_that(tmp_path: Path) -> None:
    models = [save_sparse(tmp_path / f"{n}.safetensors", "x", 10**9) for n in "ab"]
    out = tmp_path / "out.safetensors"
    with running(["-m", "modelsoup", "merge", *models, "-o", out, "--no-fsync"]) as process:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("*" + PARTIAL_SUFFIX)) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.strip()) == (130, "Interrupted.")
    assert sorted(tmp_path.iterdir()) == models


@pytest.mark.parametrize("workers", [1, 3])
def test_an_input_that_is_truncated_while_it_is_read_is_told(workers: int, tmp_path: Path) -> None:
    tensors = {f"t{i}": np.ones(BLOCK, F32) for i in range(40)}
    models = pair(tmp_path, tensors, tensors)
    size = models[1].stat().st_size

    def truncate(nbytes: int, total: int) -> None:
        os.truncate(models[1], size // 2)

    # Or all of it had been read by then.
    said = r"b\.safetensors (ended at byte .* truncated while|changed while it was read)"
    with pytest.raises(CheckpointError, match=said):
        merge(models, tmp_path / "out.safetensors", workers=workers, progress=truncate)
    assert sorted(tmp_path.iterdir()) == models


def test_an_error_in_the_progress_callback_ends_the_merge_and_leaves_nothing(
    interruptible: list[Path], tmp_path: Path
) -> None:
    def progress(nbytes: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        merge(interruptible, tmp_path / "out.safetensors", progress=progress)
    assert sorted(tmp_path.iterdir()) == interruptible


# The dry run, size and speed


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    zoo: list[Path], tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    planned = merge(zoo, tmp_path / "out.safetensors", dry_run=True, **ZOO)
    assert snapshot(tmp_path) == before
    assert planned.output is None
    done = merge(zoo, tmp_path / "out.safetensors", **ZOO)
    assert planned.plan.rule_counts() == done.plan.rule_counts()
    assert planned.notices == done.notices
    assert planned.plan.bytes_written == sum(
        len(e[2]) for e in stored(tmp_path / "out.safetensors").values()
    )


def test_a_dry_run_reads_headers_only(tmp_path: Path) -> None:
    models = [save_sparse(tmp_path / f"{n}.safetensors", "x", 25 * 10**9) for n in "ab"]
    assert models[0].stat().st_size > 100 * 10**9
    start = time.perf_counter()
    report = merge(models, tmp_path / "out.safetensors", beta=0.5, dry_run=True)
    assert time.perf_counter() - start < 2  # 200 GB would take minutes
    assert report.plan.bytes_read == 200 * 10**9
    assert report.plan.bytes_streamed == 300 * 10**9
    assert report.bytes_read == 0


def test_a_dry_run_of_a_hundred_thousand_tensors_takes_little_more_than_their_headers(
    tmp_path: Path,
) -> None:
    """Ten times as long as parsing two headers: 3 s where that takes 0.3 s, as it does alone.

    CPU seconds, and a ratio: both change little with what else the machine does.
    """
    content = {f"model.layers.{i}.weight": ("F16", [1], b"\0\0") for i in range(100_000)}
    models = [save_raw(tmp_path / f"{n}.safetensors", content) for n in "ab"]
    header = models[0].read_bytes()[8:-200_000]
    start = time.process_time()
    kept = [json.loads(header) for _ in models]
    parsing = time.process_time() - start
    assert len(kept[0]) == 100_000

    before = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "modelsoup", "merge", *models, "--dry-run", "-o", tmp_path / "o"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    took = cpu_seconds_of_children() - before
    assert "would write 100,000 tensors" in done.stdout
    assert took < 10 * parsing


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


MEASURED = """
import sys
import modelsoup

*models, output = sys.argv[1:]
modelsoup.merge(models, output, weights=[0.2, 0.3, 0.5], fsync=False)
# The peak of this program alone: getrusage counts what the parent had before exec.
status = open("/proc/self/status").read()
print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="platform: needs Linux's /proc")
def test_three_models_of_a_gigabyte_are_merged_in_150_megabytes(tmp_path: Path) -> None:
    models = [save_sparse(tmp_path / f"{n}.safetensors", "x", 250 * 10**6) for n in "abc"]
    out = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *models, out], capture_output=True, text=True, check=True,
        env={**os.environ, "MODELSOUP_FAST": "0"},
    )  # fmt: skip
    assert out.stat().st_size > 10**9
    out.unlink()
    assert int(done.stdout) * 1024 < 150e6


# The report and progress


def test_progress_adds_up_to_what_was_announced(zoo: list[Path], tmp_path: Path) -> None:
    floats = [
        save(
            tmp_path / path.name, {n: t for n, t in load(path).items() if t.dtype.kind not in "ib"}
        )
        for path in zoo
    ]
    assert progress_of(floats, tmp_path / "1.safetensors") == 1
    assert progress_of(floats, tmp_path / "2.safetensors", method="slerp", beta=0.3) == 1
    assert progress_of(floats, tmp_path / "3.safetensors", layers="D.*") == 1


def test_progress_adds_up_with_integers_too(zoo: list[Path], tmp_path: Path) -> None:
    assert progress_of(zoo, tmp_path / "out.safetensors") == 1


def progress_of(models: Sequence[Path], output: Path, **options: Any) -> float:
    """The share of the announced total that was reported."""
    lock, done, totals = threading.Lock(), 0, set()

    def progress(nbytes: int, total: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            totals.add(total)

    merge(models, output, workers=3, progress=progress, **options)
    assert len(totals) == 1
    return done / totals.pop()


def test_the_report_counts_bytes(tmp_path: Path, out: Path) -> None:
    tensors = {"a": np.ones(1000, F32), "b": np.ones(500, F32)}
    models = pair(tmp_path, tensors, tensors)
    report = merge(models, out, layers="a")
    header = models[0].stat().st_size - 6000
    # Of the first model all, of the second 'a'; headers and the rest of it for the digests.
    assert report.bytes_read == 2 * (6000 + header)
    assert report.bytes_written == out.stat().st_size
    assert report.plan.bytes_read == 6000 + 4000


def test_the_report_is_json(zoo: list[Path], tmp_path: Path) -> None:
    report = merge(zoo, tmp_path / "out.safetensors", **ZOO)
    content = json.loads(json.dumps(report.as_json()))
    assert content["output"] == str(tmp_path / "out.safetensors")
    assert content["tensors"] == 12
    assert content["dropped"] == ["G.dropped"]
    assert content["lineage"] == lineage(tmp_path / "out.safetensors")
    assert {notice["kind"] for notice in content["notices"]} == {
        "carried", "recalibrate", "dtype", "empty",
    }  # fmt: skip
    assert sum(rule["tensors"] for rule in content["rules"]) == 13


def test_a_recipe_can_be_used_again_and_is_not_mixed_with_its_fields(tmp_path: Path) -> None:
    models = pair(tmp_path, zeros(x=(1,)), {"x": np.ones(1, F32)})
    recipe = modelsoup.Recipe(beta=0.25)
    for name in ("1", "2"):
        merge(models, tmp_path / f"{name}.safetensors", recipe)
        assert load(tmp_path / f"{name}.safetensors")["x"] == 0.75
    assert dataclasses.replace(recipe, beta=1.0).beta == 1
    with pytest.raises(ParameterError, match="give a recipe or its fields, not both: beta"):
        merge(models, tmp_path / "3.safetensors", recipe, beta=0.5)
    with pytest.raises(RuleError):
        modelsoup.Recipe(layers=[""])


# Inputs that change while they are merged


@pytest.mark.parametrize("change", ["replaced", "changed in place", "appended to"])
@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_an_input_that_changes_is_an_error_and_not_garbage(
    change: str, when: str, tmp_path: Path, out: Path
) -> None:
    """The header was read from another file, or the bytes are of two."""
    tensors = {f"t{n}": np.full(1 << 20, n, F32) for n in range(8)}
    models = pair(tmp_path, tensors, tensors)
    # As sound as the one before, with tensors in other places.
    other = save(tmp_path / "other", {n: t + 1 for n, t in reversed(tensors.items())})
    opened = [modelsoup.open_checkpoint(model) for model in models]

    disturbed = threading.Lock()  # for ever by the first

    def disturb() -> None:
        if not disturbed.acquire(blocking=False):
            return
        if change == "replaced":
            os.replace(other, models[1])
            return
        other.unlink()
        with models[1].open("r+b") as file:
            file.seek(-4 if change == "changed in place" else 0, os.SEEK_END)
            file.write(b"\0\0\0\1")

    def progress(nbytes: int, total: int) -> None:
        disturb()

    if when == "before it is read":
        disturb()
    with pytest.raises(CheckpointError, match=rf"^{models[1]} changed while it was read"):
        merge(opened, out, progress=progress if when == "while it is read" else None)
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir() if "soup" in p.name] == []


def test_the_last_element_of_a_large_tensor_is_looked_at_by_every_method(tmp_path: Path) -> None:
    """Also by those in whose result a NaN of an input does not show."""
    good = np.ones(3 * BLOCK + 5, F32)
    bad = good.copy()
    bad[-1] = np.nan
    for place in range(3):
        values = [bad if k == place else good for k in range(3)]
        a, b, base = (
            save(tmp_path / f"{name}.safetensors", {"x": v})
            for name, v in zip(("a", "b", "base"), values, strict=True)
        )
        for density in ([0, 1], [1, 0], [0.5, 0.5], [0, 0]):
            for method in ("ties", "dare_ties", "dare_linear"):
                sentence = refusal(
                    tmp_path, [a, b], modelsoup.NonfiniteError, base=base, method=method,
                    weights=[1, 1], parameters={"density": density},
                )  # fmt: skip
                assert f"x (1 in {('a', 'b', 'base')[place]}.safetensors" in sentence


def test_a_part_that_may_not_be_read_is_told(public: Path) -> None:
    """It was left out without a word, and the output lacked it."""
    for name in "ab":
        save(public / name / "model.safetensors", zeros(w=(2,)))
        for inner in ("head", "configs"):
            (public / name / inner).mkdir()
        save(public / name / "head" / "model.safetensors", zeros(w=(2,)))
        (public / name / "configs" / "x.json").write_text("{}")
    code = textwrap.dedent(f"""
        import os
        import modelsoup
        folder = {str(public)!r}
        modelsoup.merge([folder + "/a", folder + "/b"], folder + "/first")  # imports everything
        os.setuid(65534)
        try:
            modelsoup.merge([folder + "/a", folder + "/b"], folder + "/out")
        except modelsoup.SoupError as error:
            print(error)
    """)
    if os.getuid() != 0:
        pytest.skip("platform: only root can become somebody who may not read")
    public.chmod(0o777)
    for inner in ("head", "configs"):
        (public / "a" / inner).chmod(0o700)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.stdout == f"cannot read {public / 'a' / inner}: Permission denied\n", (
            done.stderr
        )
        (public / "a" / inner).chmod(0o755)
        shutil.rmtree(public / "first")
    assert not (public / "out").exists()
