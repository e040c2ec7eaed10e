"""Merges give the bytes that they gave when these digests were taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file

from modelsoup import merge, open_checkpoint, parse_tree, run

GOLDEN = Path(__file__).parent / "data" / "golden_merges.json"

# Odd sizes around blocks of 2^16 and 2^17 elements, and what is merged side by side.
SHAPES: dict[str, tuple[int, ...]] = {
    "enc.0.weight": (257, 511), "enc.0.bias": (257,), "enc.1.weight": (65537,),
    "dec.0.weight": (3, 5, 7, 11), "dec.0.bias": (1,), "dec.1.weight": (8193,),
    "head.weight": (64, 1024), "empty": (0, 4),
}  # fmt: skip
KINDS = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "f64": np.float64}

TASK = {"weights": [0.7, 0.4], "base": True}
CASES: dict[str, dict[str, Any]] = {
    "linear beta": {"beta": 0.3},
    "linear three": {"models": 3, "weights": [1, 2, 0.5]},
    "linear not normalised": {"weights": [0.5, 0.75], "parameters": {"normalize": False}},
    "linear one": {"beta": 1.0},
    "slerp": {"method": "slerp", "parameters": {"t": 0.35}},
    "task_arithmetic": {"method": "task_arithmetic", **TASK},
    "task_arithmetic lambda": {"method": "task_arithmetic", **TASK,
        "parameters": {"normalize": True, "lambda": 1.3}},
    "ties": {"method": "ties", **TASK, "parameters": {"density": 0.4}},
    "ties three": {"method": "ties", "base": True, "models": 3, "weights": [1, 0.5, -0.25],
        "parameters": {"density": [0.2, 0.9, 1.0], "rescale": True, "lambda": 0.8}},
    "ties not normalised": {"method": "ties", **TASK,
        "parameters": {"density": 0.01, "normalize": False}},
    "dare_linear": {"method": "dare_linear", **TASK, "seed": 7, "parameters": {"density": 0.5}},
    "dare_linear plain": {"method": "dare_linear", **TASK,
        "parameters": {"density": [0.3, 0], "rescale": False}},
    "dare_ties": {"method": "dare_ties", **TASK, "seed": 3,
        "parameters": {"density": 0.6, "normalize": True}},
    "rules": {"beta": 0.5, "layers": ["enc.1.*=slerp;t:0.2", "dec.*=second", "enc.*=0.25"],
        "rest": "first"},
    "dropped": {"beta": 0.5, "layers": ["dec.*=drop"]},
    "from the base": {"method": "ties", **TASK, "layers": ["dec.*=base", "*"],
        "parameters": {"density": 0.5}},
    "stored as bf16": {"beta": 0.4, "dtype": "bf16"},
    "integers": {"models": 3, "weights": [1, 1, 1], "on_integer": "first"},
}  # fmt: skip


def models(folder: Path, kind: str) -> tuple[list[Path], Path]:
    """Three models that differ a little from a base: normal values of many sizes, and zeros."""
    paths = []
    for number in range(4):
        tensors: dict[str, np.ndarray] = {}
        for place, (name, shape) in enumerate(SHAPES.items()):
            base = _drawn(place, shape)
            own = base + 0.1 * _drawn(100 * number + place, shape) if number else base
            tensors[name] = own.astype(KINDS[kind])
        tensors["bn.num_batches_tracked"] = np.array(7 * number, np.int64)
        paths.append(folder / f"{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths[1:], paths[0]


def _drawn(key: int, shape: tuple[int, ...]) -> np.ndarray:
    """Sums of uniform numbers, which need no library's logarithm; a tenth of them is zero."""
    generator = np.random.Generator(np.random.Philox(key=key))
    values = generator.random((4, *shape)).sum(axis=0) - 2
    return values * (generator.random(shape) >= 0.1)


def digest(path: Path) -> str:
    """Of names, dtypes, shapes and bytes."""
    found = xxhash.xxh3_128()
    opened = open_checkpoint(path)
    for name, info in opened.tensors.items():
        found.update(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode())
        with info.file.open("rb") as file:
            file.seek(info.start)
            found.update(file.read(info.nbytes))
    return found.hexdigest()


def made(folder: Path, kind: str, case: dict[str, Any], **options: Any) -> str:
    inputs, base = models(folder, kind)
    fields = {key: value for key, value in case.items() if key not in ("models", "base")}
    output = folder / ("out" if options else "out.safetensors")
    given = base if case.get("base") else None
    merge(inputs[: case.get("models", 2)], output, base=given, **fields, **options)
    return digest(output)


def in_a_tree(folder: Path, kind: str, *, fuse: bool) -> str:
    inputs, base = models(folder, kind)
    made_of = dict(zip(("one", "two", "three"), inputs, strict=True))
    left = {"of": ["one", "two"], "merge": {"beta": 0.25}}
    arithmetic = {"method": "task_arithmetic", "base": str(base), "weights": [0.5]}
    tree, _ = parse_tree(json.dumps({
        "soup": 1,
        "models": {name: str(path) for name, path in made_of.items()},
        "tree": {"of": [left, {"of": ["three"], "merge": arithmetic}], "merge": {"beta": 0.75}},
    }))  # fmt: skip
    run(tree, folder / "top.safetensors", store=folder / "store", fuse=fuse)
    return digest(folder / "top.safetensors")


def every(folder: Path) -> dict[str, str]:
    found = {}
    for kind in KINDS:
        for name, case in CASES.items():
            found[f"{name}, {kind}"] = made(_own(folder, f"{name}{kind}"), kind, case)
        own = _own(folder, f"shards{kind}")
        found[f"shards, {kind}"] = made(own, kind, CASES["ties"], shard_size=200_000)
        for fuse in (False, True):
            own = _own(folder, f"{kind}{fuse}")
            found[f"tree{' fused' * fuse}, {kind}"] = in_a_tree(own, kind, fuse=fuse)
    return found


def _own(folder: Path, name: str) -> Path:
    own = folder / name.replace(" ", "_")
    own.mkdir()
    return own


@pytest.mark.parametrize("kind", KINDS)
def test_merges_give_the_bytes_that_they_always_gave(tmp_path: Path, kind: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    for name, case in CASES.items():
        own = _own(tmp_path, name)
        assert made(own, kind, case) == golden[f"{name}, {kind}"], name


@pytest.mark.parametrize("kind", KINDS)
def test_shards_and_fused_trees_give_the_bytes_that_they_always_gave(
    tmp_path: Path, kind: str
) -> None:
    golden = json.loads(GOLDEN.read_text())
    own = _own(tmp_path, "shards")
    assert made(own, kind, CASES["ties"], shard_size=200_000) == golden[f"shards, {kind}"]
    for fuse in (False, True):
        own = _own(tmp_path, f"tree{fuse}")
        assert in_a_tree(own, kind, fuse=fuse) == golden[f"tree{' fused' * fuse}, {kind}"]


if __name__ == "__main__":  # what they gave, to be looked at before it is kept
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(every(Path(temporary)), indent=1))
