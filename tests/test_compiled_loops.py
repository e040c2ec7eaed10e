"""What compiled loops promise: numpy's bytes, or no loop; and a cache that can be trusted.

Every merge here runs in a process of its own, with its own `MODELSOUP_FAST` and `MODELSOUP_CACHE`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup.merging import reductions
from modelsoup.merging.engine import SLICE
from modelsoup.merging.forms import BLOCK, Tensor, blocks_of
from modelsoup.merging.reductions import Gram

# Runs jobs, says what each failed with, which loops there were, and whether numba was imported.
RUNNER = """
import json, sys
import modelsoup
from modelsoup.merging import compiled

job_file, output_folder = sys.argv[1:]
errors = {}
for name, job in json.load(open(job_file)).items():
    try:
        modelsoup.merge(output=f"{output_folder}/{name}.safetensors", fsync=False, **job)
    except modelsoup.SoupError as error:
        errors[name] = str(error)
loops = [
    [key[0].__name__, list(key[1]), key[2], loop is not None]
    for key, loop in compiled._loops.items()
]
print(json.dumps({"errors": errors, "loops": loops, "numba": "numba" in sys.modules}))
"""

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
Job = dict[str, Any]


@dataclass
class Run:
    """What one process did; the outputs are SHA-256 digests of whole files."""

    outputs: dict[str, str]
    errors: dict[str, str]
    numba: bool
    loops: dict[tuple[str, tuple[str, ...], str], bool] = field(default_factory=dict)


def run(
    folder: Path, jobs: dict[str, Job], *, fast: str | None, cache: Path
) -> Run:  # fmt: skip
    """Carry out jobs in a new process."""
    output = folder / "outputs"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MODELSOUP_")}
    environment |= {"MODELSOUP_CACHE": str(cache)}
    if fast is not None:
        environment["MODELSOUP_FAST"] = fast
    arguments = [str(folder / "jobs.json"), str(output)]
    process = subprocess.run(
        [sys.executable, "-c", RUNNER, *arguments], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    said = json.loads(process.stdout)
    return Run(
        {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.iterdir()},
        said["errors"], said["numba"],
        {(name, tuple(inputs), out): used for name, inputs, out, used in said["loops"]},
    )  # fmt: skip


def cached(cache: Path) -> dict[str, tuple[int, bytes]]:
    """The files of a cache, with what tells whether they were written again."""
    files = (path for path in cache.rglob("*") if path.is_file())
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- the same bytes -------------------------------------------------------------------------------

SIZES = (1, 2, 3, 7, 8, 15, 17, 63, 4099, SLICE + 5)


def finite_patterns(dtype: str, largest: float) -> np.ndarray:
    """Every finite number of a 16-bit format, up to a magnitude; the edges of float32's binades."""
    if dtype == "F32":
        powers = np.arange(256, dtype=np.uint32) << 23
        near = powers[:, None] + np.array([0, 1, 2, 3, 0x400000, 0x7FFFFE, 0x7FFFFF], np.uint32)
        every = np.concatenate([near.ravel(), near.ravel() | np.uint32(1 << 31)])
    else:
        every = np.arange(1 << 16, dtype=np.uint16)
    values = every.view(DTYPES[dtype])
    with np.errstate(invalid="ignore"):
        return values[np.abs(values.astype(np.float64)) <= largest]


def model(dtypes: dict[str, str], number: int, largest: float) -> dict[str, np.ndarray]:
    """One model: tensors of odd sizes, and one with every number of the dtype."""
    generator = np.random.default_rng(number)
    tensors = {}
    for group, dtype in dtypes.items():
        for size in SIZES:
            values = generator.standard_normal(size) * 2.0 ** generator.integers(-30, 4, size)
            tensors[f"{group}.{size}"] = values.astype(DTYPES[dtype])
        count = finite_patterns("BF16", 3e38).size  # the same for all, so that they can be mixed
        patterns = np.resize(finite_patterns(dtype, largest), count)
        tensors[f"{group}.every"] = generator.permutation(patterns) if number else patterns
        # Against each other, subnormals and zeros only.
        tiny = (
            np.arange(600, dtype=np.uint16) if dtype != "F32" else np.arange(600, dtype=np.uint32)
        )
        tensors[f"{group}.subnormal"] = generator.permutation(tiny).view(DTYPES[dtype])
    return tensors


# Group of tensors → how the models (the base first, where there is one) store it.
GROUPS = {
    "float32": ("F32", "F32", "F32"),
    "bfloat16": ("BF16", "BF16", "BF16"),
    "float16": ("F16", "F16", "F16"),
    "mixed": ("BF16", "F16", "F32"),
}
SAME_DTYPE = {group: dtypes for group, dtypes in GROUPS.items() if group != "mixed"}
LARGEST = 65504 / 8  # no sum of three overflows, in any dtype


def midpoints(dtype: str) -> np.ndarray:
    """float32 numbers at, just below and just above what lies between neighbours of a format."""
    below_infinity = {"BF16": 0x7F7F, "F16": 0x7BFF}[dtype]
    positive = np.arange(below_infinity + 1, dtype=np.uint16).view(DTYPES[dtype])
    exact = positive.astype(np.float64)
    # In float64, so that between float16's subnormals and at float32's there is an exact middle.
    middle = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)
    three = [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf))]
    values = np.concatenate([*three, exact.astype(np.float32)])
    last = (
        exact[-1] + (exact[-1] - exact[-2]) / 2
    )  # rounds to infinity, all below it to `exact[-1]`
    edge = np.nextafter(np.float32(last), np.float32(0))
    return np.concatenate([values, -values, [edge, -edge, np.float32(exact[-1])]])


# float32 numbers that are just too large for a format.
BEYOND = {"BF16": np.uint32(0x7F7F8000).view(np.float32), "F16": np.float32(65520)}


def with_nonfinite(values: np.ndarray) -> np.ndarray:
    """With an infinity, and a NaN that is not the usual one."""
    patterns = values.view(f"u{values.itemsize}").copy()
    infinity = np.array(np.inf, values.dtype).view(patterns.dtype)
    patterns[[0, 70]] = infinity, infinity + 3
    return patterns.view(values.dtype)


@dataclass
class Both:
    """The same jobs with compiled loops and without."""

    fast: Run
    numpy: Run
    jobs: dict[str, Job]
    cache: Path
    folder: Path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("loops")

    def write(name: str, tensors: dict[str, np.ndarray]) -> str:
        save_file(tensors, folder / f"{name}.safetensors")
        return str(folder / f"{name}.safetensors")

    paths = [
        write(f"model-{i}", model({group: d[i] for group, d in GROUPS.items()}, i, LARGEST))
        for i in range(3)
    ]
    a, b, c = paths
    # A weighted mean stays within the largest number of a dtype.
    wide = [
        write(f"wide-{i}", model({group: d[i] for group, d in SAME_DTYPE.items()}, i, 3.5e38))
        for i in range(2)
    ]
    to_narrow = {d: write(f"to-{d}", {"x": midpoints(d)}) for d in ("BF16", "F16")}
    broken = {}
    for dtype, limit in BEYOND.items():
        values = np.linspace(-1, 1, 1001, dtype=np.float32)
        values[[3, 500]] = limit, -limit
        broken[dtype] = write(f"over-{dtype}", {"x": values, "y": values[4:400]})
    finite = {
        dtype: np.linspace(-1, 1, 2 * SLICE + 1, dtype=np.float32).astype(kind)
        for dtype, kind in DTYPES.items()
    }
    normal = write("normal", finite)
    nonfinite = write("nonfinite", {dtype: with_nonfinite(x) for dtype, x in finite.items()})

    jobs: dict[str, Job] = {
        "linear of two": {"models": [a, b], "beta": 0.3},
        "linear of two, weights": {"models": [a, b], "weights": [0.3, -0.2]},
        "linear of two others": {"models": [b, c], "beta": 0.6},
        "linear of two, all numbers": {"models": wide, "beta": 0.3},
        "linear of three": {"models": [a, b, c], "weights": [0.3, 0.5, 0.9]},
        "linear of three, sum": {
            "models": [a, b, c], "weights": [1, -1, 1], "parameters": {"normalize": False},
        },
        "linear of fifteen": {
            "models": [a, b, c] * 5, "weights": [0.1 * k - 0.6 for k in range(15)],
        },
        "linear of sixteen": {
            "models": [c, a] * 8, "weights": [1, *[-0.07] * 15], "parameters": {"normalize": False},
        },
        "linear of fifteen, all numbers": {"models": [*wide, wide[0]] * 5},
        "slerp": {"models": [a, b], "method": "slerp", "parameters": {"t": 0.3}},
        "model_stock": {"models": [b, c], "base": a, "method": "model_stock"},
        "task_arithmetic of one": {
            "models": [b], "base": a, "method": "task_arithmetic", "weights": [0.7],
        },
        "task_arithmetic of two": {
            "models": [b, c], "base": a, "method": "task_arithmetic", "weights": [0.7, -0.3],
            "parameters": {"lambda": 1.1},
        },
        "to bfloat16": {"models": [to_narrow["BF16"]] * 2, "beta": 0.5, "dtype": "bf16"},
        "to float16": {"models": [to_narrow["F16"]] * 2, "beta": 0.5, "dtype": "f16"},
        "over bfloat16": {
            "models": [broken["BF16"]] * 2, "beta": 0.5, "dtype": "bf16", "allow_nonfinite": True,
        },
        "over float16": {
            "models": [broken["F16"]] * 2, "beta": 0.5, "dtype": "f16", "allow_nonfinite": True,
        },
        "over bfloat16, refused": {"models": [broken["BF16"]] * 2, "beta": 0.5, "dtype": "bf16"},
        "over float16, refused": {"models": [broken["F16"]] * 2, "beta": 0.5, "dtype": "f16"},
        "NaN and infinity": {"models": [nonfinite, normal], "beta": 0.3, "allow_nonfinite": True},
        "NaN and infinity second": {
            "models": [normal, nonfinite], "beta": 0.3, "allow_nonfinite": True,
        },
        "NaN and infinity, task_arithmetic": {
            "models": [nonfinite], "base": normal, "method": "task_arithmetic", "weights": [0.5],
            "allow_nonfinite": True,
        },
        "NaN and infinity among thirteen": {
            "models": [*[normal] * 10, nonfinite, normal, normal], "allow_nonfinite": True,
        },
        "NaN refused": {"models": [nonfinite, normal], "beta": 0.3},
    }  # fmt: skip
    cache = folder / "cache"
    return Both(
        run(folder, jobs, fast="1", cache=cache), run(folder, jobs, fast="0", cache=cache), jobs,
        cache, folder,
    )  # fmt: skip


REFUSED = ("over bfloat16, refused", "over float16, refused", "NaN refused")
MERGED = (
    "linear of two",
    "linear of two, weights",
    "linear of two others",
    "linear of two, all numbers",
    "linear of three",
    "linear of three, sum",
    "linear of fifteen",
    "linear of sixteen",
    "linear of fifteen, all numbers",
    "slerp",
    "model_stock",
    "task_arithmetic of one",
    "task_arithmetic of two",
    "to bfloat16",
    "to float16",
    "over bfloat16",
    "over float16",
    "NaN and infinity",
    "NaN and infinity second",
    "NaN and infinity, task_arithmetic",
    "NaN and infinity among thirteen",
)


@pytest.mark.parametrize("job", MERGED)
def test_a_compiled_loop_gives_numpys_bytes(job: str, both: Both) -> None:
    assert both.numpy.errors.get(job) is None
    assert both.fast.outputs[job] == both.numpy.outputs[job]


@pytest.mark.parametrize("job", REFUSED)
def test_a_compiled_loop_refuses_what_numpy_refuses(job: str, both: Both) -> None:
    assert "NaN or infinity in" in both.numpy.errors[job]
    assert both.fast.errors[job] == both.numpy.errors[job]


def test_every_job_was_in_one_list_and_every_method_and_dtype_had_a_loop(both: Both) -> None:
    assert {*MERGED, *REFUSED} == both.jobs.keys()
    assert both.fast.numba
    expected = {
        ("weighted_sum", ("F32",) * 2, "BF16"), ("weighted_sum", ("F32",) * 2, "F16"),
        ("weighted_sum", ("BF16", "F16"), "BF16"), ("weighted_sum", ("F16", "F32"), "F16"),
        ("weighted_sum", ("BF16", "F16", "F32"), "BF16"),
        ("weighted_deltas", ("BF16", "F16"), "F16"),
        ("weighted_deltas", ("BF16", "F16", "F32"), "F16"),
        *(("weighted_sum", (d,) * k, d) for d in DTYPES for k in (2, 3)),
        *(("weighted_deltas", (d,) * k, d) for d in DTYPES for k in (2, 3)),
        *(("added_to", ("F32", *(d,) * 8), out) for d in DTYPES for out in ("F32", d)),
        ("products_loop", ("BF16", "F16"), "F64"), ("products_loop", ("BF16", "F16", "F32"), "F64"),
        *(("products_loop", (d,) * k, "F64") for d in DTYPES for k in (2, 3)),
    }  # fmt: skip
    assert both.fast.loops == dict.fromkeys(expected, True)
    assert not both.numpy.loops
    assert not both.numpy.numba


@pytest.mark.parametrize("of", ["inputs", "deltas"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_inner_products_are_numpys_to_the_last_bit(
    dtype: str, of: Literal["inputs", "deltas"], both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSOUP_CACHE", str(both.cache))
    generator = np.random.default_rng(4)
    count = 3 if of == "deltas" else 2
    stored = [generator.normal(size=3 * BLOCK + 1027).astype(DTYPES[dtype]) for _ in range(count)]
    x = Tensor("x", stored[0].shape, 2, has_base=of == "deltas")
    compiled, numpys = Gram(of).begin(x), Gram(of).begin(x)
    assert isinstance(compiled, reductions.Products)
    compiled.loop = compiled.loop_over((dtype,) * count)
    assert compiled.loop is not None
    for gathering, values in (compiled, stored), (numpys, [v.astype(np.float64) for v in stored]):
        for block in blocks_of(x, values, rows=False):
            gathering.add(block)
        gathering.end_pass()
    assert numpys.value.shape == (2, 2)
    assert compiled.value.tobytes() == numpys.value.tobytes()


def test_products_that_are_asked_for_beside_other_sums_are_of_values(
    tmp_path: Path, both: Both, monkeypatch: pytest.MonkeyPatch, own_methods: None
) -> None:
    """What is stored goes into compiled loops only where all that is asked for takes it."""
    found: list[np.ndarray] = []

    @modelsoup.method("asks_for_both", models=(2, 2), version="1", summary="", source="here")
    def asks_for_both(x: Tensor) -> Any:
        """As it is asked for."""
        gram, _ = yield [Gram(), modelsoup.Sum(lambda b: b.model(0))]
        (alone,) = yield [Gram()]
        found.extend((gram, alone))
        return modelsoup.WeightedSum((0.5, 0.5))

    monkeypatch.setenv("MODELSOUP_CACHE", str(both.cache))
    generator = np.random.default_rng(5)
    for name in ("a", "b"):
        values = generator.normal(size=70_001).astype(DTYPES["BF16"])
        save_file({"w": values}, tmp_path / f"{name}.safetensors")
    models = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for fast in ("0", "1"):
        monkeypatch.setenv("MODELSOUP_FAST", fast)
        modelsoup.merge(models, tmp_path / f"{fast}.safetensors", method="asks_for_both")
    known = [one for one in found if one[0, 0] != 1]  # a plan asks with guesses
    assert len(known) == 4
    assert {one.tobytes() for one in known} == {known[0].tobytes()}
    assert known[0][0, 0] == pytest.approx(70_001, rel=0.02)


# --- the cache ------------------------------------------------------------------------------------

CACHED_JOBS = ("linear of two", "linear of three", "slerp", "task_arithmetic of two", "to float16")


def chosen(both: Both, *names: str) -> dict[str, Job]:
    return {name: both.jobs[name] for name in names}


def test_a_second_process_takes_loops_from_the_cache_without_numba(
    both: Both, tmp_path: Path
) -> None:
    before = cached(both.cache)
    assert len(before) == len(both.fast.loops)  # each once
    second = run(tmp_path, chosen(both, *CACHED_JOBS), fast="1", cache=both.cache)
    assert not second.numba
    assert second.loops
    assert all(second.loops.values())
    assert cached(both.cache) == before
    for job in CACHED_JOBS:
        assert second.outputs[job] == both.numpy.outputs[job], job


def test_of_more_than_a_dozen_models_loops_add_a_few_at_a_time(both: Both, tmp_path: Path) -> None:
    models = both.jobs["linear of three"]["models"]
    jobs: dict[str, Job] = {
        f"of {count}": {"models": (models * 5)[:count], "weights": [1] * count}
        for count in (12, 13, 15)
    }
    done = run(tmp_path, jobs, fast="1", cache=both.cache)
    assert {(name, len(inputs)) for name, inputs, _ in done.loops} == {
        ("weighted_sum", 12), ("added_to", 9),
    }  # fmt: skip
    assert done.outputs == run(tmp_path, jobs, fast="0", cache=both.cache).outputs


def test_a_small_merge_compiles_nothing_unless_it_is_told_to(both: Both, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    small = run(tmp_path, chosen(both, "linear of two"), fast=None, cache=cache)
    assert not small.numba
    assert not any(small.loops.values())
    assert not cached(cache)
    assert small.outputs["linear of two"] == both.numpy.outputs["linear of two"]


def test_damaged_cache_files_are_compiled_again(both: Both, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(both.cache, cache)
    used = run(tmp_path, chosen(both, "linear of two"), fast="1", cache=cache)
    assert not used.numba
    files = sorted(cache.rglob("weighted_sum-*"))
    damages = [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        lambda content: b"\0" * len(content),
    ]
    assert len(files) >= len(damages)
    for number, file in enumerate(files):
        file.write_bytes(damages[number % len(damages)](file.read_bytes()))

    again = run(tmp_path, chosen(both, "linear of two"), fast="1", cache=cache)
    assert again.numba
    assert again.loops == used.loops
    assert again.outputs == used.outputs
    whole = []
    for file in files:
        content = file.read_bytes()
        whole.append(hashlib.sha256(content[32:]).digest() == content[:32])
    assert sum(whole) == len(used.loops)  # those that this job uses


@pytest.mark.parametrize("fast", ["1", None])
def test_a_cache_folder_that_cannot_be_written_is_no_error(
    fast: str | None, both: Both, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    jobs = chosen(both, "task_arithmetic of one")
    result = run(tmp_path, jobs, fast=fast, cache=tmp_path / "file" / "cache")
    assert result.outputs["task_arithmetic of one"] == both.numpy.outputs["task_arithmetic of one"]
    assert all(used is (fast == "1") for used in result.loops.values())


WITHOUT_A_HOME = """
import pwd, sys

def nobody(uid):
    raise KeyError(uid)

pwd.getpwuid = nobody
from modelsoup import merge
from modelsoup.merging import compiled

merge(sys.argv[1:3], sys.argv[3])
assert any(compiled._loops.values())  # one was compiled
"""


def test_a_user_without_a_home_is_no_error(tmp_path: Path) -> None:
    """As in a container that runs under some number: there is no HOME, and no name for it."""
    models = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for number, path in enumerate(models):
        save_file({"w": np.full(1000, number, np.float32)}, path)
    known = {k: v for k, v in os.environ.items() if not k.startswith(("MODELSOUP_", "XDG_"))}
    known.pop("HOME", None)
    output = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_HOME, *models, output], capture_output=True, text=True,
        env={**known, "MODELSOUP_FAST": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_file(output)["w"].tolist() == [0.5] * 1000
