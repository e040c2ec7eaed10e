"""Make `mergekit_vectors.safetensors`: tiny checkpoints, and what mergekit 0.1.5 merges them to.

    pip install mergekit==0.1.5 numpy safetensors
    python tests/data/make_mergekit_vectors.py

The command `mergekit-pytorch` is run over checkpoints in a temporary folder, once for each of
`CASES`; all is in float32. The file holds `input/MODEL/TENSOR` and `CASE/TENSOR`; the cases
themselves are in its metadata, in the words that modelsoup uses. Only merges without random
numbers are here: DARE and DELLA at density 1 drop nothing.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from safetensors.numpy import load_file, save_file

VECTORS = Path(__file__).with_name("mergekit_vectors.safetensors")
SEED = 8
NORMAL_SHAPES = {
    "decoder.weight": (40, 30),
    "decoder.bias": (257,),
    "conv.weight": (3, 4, 5, 6),
    "scale": (),
}

Case = dict[str, Any]


def ties(
    models: str, weights: list[float], density: list[float], *, method: str = "ties", **others: Any
) -> Case:
    """A case of `ties`, or of another method that thins task vectors."""
    parameters = {"density": density, **others}
    return {"method": method, "models": models, "weights": weights, "parameters": parameters}


THREE = [0.5, 0.3, 0.4]
CASES: dict[str, Case] = {
    "linear-2": {"method": "linear", "models": "ab", "weights": [0.3, 0.9]},
    "linear-3": {"method": "linear", "models": "abc", "weights": [0.25, 0.6, 0.4]},
    "linear-3-sum": {
        "method": "linear", "models": "abc", "weights": [0.25, 0.6, -0.4],
        "parameters": {"normalize": False},
    },
    "slerp-0.1": {"method": "slerp", "models": "ab", "parameters": {"t": 0.1}},
    "slerp-0.5": {"method": "slerp", "models": "ab", "parameters": {"t": 0.5}},
    "slerp-0.85": {"method": "slerp", "models": "ab", "parameters": {"t": 0.85}},
    "task_arithmetic-1": {"method": "task_arithmetic", "models": "a", "weights": [0.8]},
    "task_arithmetic-3": {
        "method": "task_arithmetic", "models": "abc", "weights": [0.5, -0.3, 0.4],
    },
    "task_arithmetic-lambda": {
        "method": "task_arithmetic", "models": "abc", "weights": THREE,
        "parameters": {"normalize": True, "lambda": 0.7},
    },
    "ties-default": {"method": "ties", "models": "abc", "weights": THREE},
    "ties-half": ties("abc", THREE, [0.5] * 3),
    "ties-half-sum": ties("abc", THREE, [0.5] * 3, normalize=False, **{"lambda": 0.7}),
    "ties-half-rescale": ties("abc", THREE, [0.5] * 3, rescale=True),
    "ties-mixed": ties("abc", [0.5, -0.3, 0.4], [0.2, 0.6, 1.0], rescale=True, **{"lambda": 1.3}),
    "ties-two-sum": ties("ab", [0.7, 0.6], [0.5, 0.9], normalize=False, rescale=True),
    "dare_linear-all": {
        "method": "dare_linear", "models": "abc", "weights": THREE,
        "parameters": {"density": [1.0] * 3, "lambda": 0.7},
    },
    "dare_ties-all": {
        "method": "dare_ties", "models": "abc", "weights": THREE,
        "parameters": {"density": [1.0] * 3},
    },
    "dare_ties-normalize": {
        "method": "dare_ties", "models": "abc", "weights": THREE,
        "parameters": {"density": [1.0] * 3, "normalize": True, "lambda": 0.7},
    },
    "della-all": ties("abc", THREE, [1.0] * 3, method="della", **{"lambda": 0.7}),
    "della_linear-all": ties("abc", THREE, [1.0] * 3, method="della_linear", epsilon=[0.1] * 3),
    "breadcrumbs": ties(
        "abc", [0.5, -0.3, 0.4], [0.2, 0.95, 1.0], method="breadcrumbs", rescale=True,
        gamma=[0.3, 0.05, 0.05], **{"lambda": 1.3},
    ),
    "breadcrumbs_ties-half": ties("abc", THREE, [0.6] * 3, method="breadcrumbs_ties"),
    "breadcrumbs_ties-mixed": ties(
        "ab", [0.7, 0.6], [0.5, 0.9], method="breadcrumbs_ties", normalize=True, gamma=[0.2, 0.05],
    ),
    "sce-all": {"method": "sce", "models": "abc"},
    "sce-half": {"method": "sce", "models": "abc", "parameters": {"select_topk": 0.5}},
    "sce-tenth": {"method": "sce", "models": "ab", "parameters": {"select_topk": 0.1}},
    "model_stock-2": {"method": "model_stock", "models": "ab"},
    "model_stock-3": {"method": "model_stock", "models": "abc"},
    "model_stock-filters": {
        "method": "model_stock", "models": "abc", "parameters": {"filter_wise": True},
    },
    "nuslerp-flat": {"method": "nuslerp", "models": "ab", "weights": [0.3, 0.9], "base": False},
    "nuslerp-deltas": {"method": "nuslerp", "models": "bc", "weights": [0.3, 0.9]},
    "nuslerp-rows": {
        "method": "nuslerp", "models": "ab", "weights": [0.3, 0.9], "base": False,
        "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp-columns": {
        "method": "nuslerp", "models": "ac", "weights": [0.8, 0.4],
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp-3": {
        "method": "multislerp", "models": "abc", "weights": THREE, "base": False,
        "without": "zero",  # which has no direction: an error
    },
    "multislerp-sum": {
        "method": "multislerp", "models": "abc", "weights": THREE, "base": False,
        "parameters": {"normalize_weights": False}, "without": "zero",
    },
    "multislerp-deltas": {
        "method": "multislerp", "models": "abc", "weights": THREE, "without": "zero",
    },
    "karcher-3": {"method": "karcher", "models": "abc"},
    "karcher-once": {"method": "karcher", "models": "abc", "parameters": {"max_iter": 1}},
    "nearswap": {"method": "nearswap", "models": "ab", "parameters": {"t": 0.01}},
    "arcee_fusion": {"method": "arcee_fusion", "models": "ab"},
    "ram": {"method": "ram", "models": "abc", "parameters": {"epsilon": 0.03}},
    "ramplus_tl": {"method": "ramplus_tl", "models": "abc", "parameters": {"epsilon": 0.02}},
    "passthrough": {"method": "passthrough", "models": "a", "parameters": {"scale": 0.7}},
}  # fmt: skip
# Those that mergekit gives a `base_model` which is no base: none, or the first of two models.
WITHOUT_BASE = ("linear", "karcher", "passthrough")
FROM_THE_FIRST = ("slerp", "nearswap", "arcee_fusion")


def make_inputs() -> dict[str, dict[str, np.ndarray]]:
    """A base and three fine-tuned models."""
    generator = np.random.default_rng(SEED)

    def normal(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return np.asarray(generator.normal(0, scale, shape), np.float32)

    base = {name: normal(shape, 0.05) for name, shape in NORMAL_SHAPES.items()}
    models = {"base": base}
    for model in "abc":
        models[model] = {name: np.asarray(x + normal(x.shape, 0.03)) for name, x in base.items()}
    same = normal((31,), 1)  # model a did not change it
    models["base"]["same"] = models["a"]["same"] = same
    models["b"]["same"], models["c"]["same"] = same + normal((31,), 0.1), normal((31,), 1)
    line = normal((64,), 1)  # |cos θ| > 0.9995 between a and b, and between neither and c
    models["base"]["parallel"], models["c"]["parallel"] = normal((64,), 1), normal((64,), 1)
    models["a"]["parallel"], models["b"]["parallel"] = line, 1.7 * line + normal((64,), 1e-3)
    for model in models.values():
        model["zero"] = np.zeros((4, 4), np.float32)
    return models


def check_no_ties(models: dict[str, dict[str, np.ndarray]]) -> None:
    """mergekit breaks ties between magnitudes as its sort happens to: there must be none."""
    for model in "abc":
        for name, values in models[model].items():
            magnitudes = np.abs(values - models["base"][name])
            changed = magnitudes[magnitudes > 0]
            assert not changed.size or np.unique(changed).size == magnitudes.size, (model, name)


def configuration(case: Case, folder: Path) -> dict[str, Any]:
    """A case in mergekit's words."""

    def path(model: str) -> str:
        return str(folder / f"{model}.safetensors")

    given = dict(case.get("parameters", {}))
    shared = {name: value for name, value in given.items() if not isinstance(value, list)}
    each = {name: value for name, value in given.items() if isinstance(value, list)}
    if "weights" in case:
        each["weight"] = case["weights"]
    inputs = [
        {"model": path(model), "parameters": {name: value[k] for name, value in each.items()}}
        for k, model in enumerate(case["models"])
    ]
    content = {
        "merge_method": case["method"],
        "models": inputs,
        "parameters": shared,
        "dtype": "float32",
    }
    if case["method"] in FROM_THE_FIRST:
        content["base_model"] = path(case["models"][0])
    elif case["method"] not in WITHOUT_BASE and case.get("base", True):
        content["base_model"] = path("base")
    return content


def main() -> None:
    """Run mergekit and write the file."""
    models = make_inputs()
    check_no_ties(models)
    tensors = {f"input/{m}/{name}": x for m, model in models.items() for name, x in model.items()}
    with tempfile.TemporaryDirectory() as temporary:
        for name, case in CASES.items():
            folder = Path(temporary, name)
            folder.mkdir()
            names = set(models["base"]) - {case.get("without")}
            for model, values in models.items():
                save_file({t: values[t] for t in names}, folder / f"{model}.safetensors")
            config = folder / f"{name}.yml"
            config.write_text(yaml.safe_dump(configuration(case, folder)))
            output = folder / name
            mergekit_pytorch.main([str(config), str(output), "--quiet"], standalone_mode=False)
            (weights,) = output.glob("*.safetensors")
            merged = load_file(weights)
            assert set(merged) == names
            assert all(x.dtype == np.float32 for x in merged.values())
            tensors.update({f"{name}/{tensor}": x for tensor, x in merged.items()})
    made = {"mergekit": version("mergekit"), "cases": CASES}
    save_file(tensors, VECTORS, {"vectors": json.dumps(made)})
    print(f"{len(CASES)} cases, {VECTORS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
