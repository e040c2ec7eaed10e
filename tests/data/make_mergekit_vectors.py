"""Make `mergekit_vectors.safetensors`: tiny checkpoints, and what mergekit 0.1.5 merges them to.

    pip install mergekit==0.1.5 numpy safetensors
    python tests/data/make_mergekit_vectors.py

The command `mergekit-pytorch` is run over checkpoints in a temporary folder, once for each of
`CASES`; all is in float32. The file holds `input/MODEL/TENSOR` and `CASE/TENSOR`; the cases
themselves are in its metadata, in the words that modelsoup uses. Only methods without random
numbers are here: DARE at density 1 drops nothing.
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


def ties(models: str, weights: list[float], density: list[float], **others: Any) -> Case:
    """A case of `ties`, which has the most parameters."""
    parameters = {"density": density, **others}
    return {"method": "ties", "models": models, "weights": weights, "parameters": parameters}


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
}  # fmt: skip


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

    shared = dict(case.get("parameters", {}))
    density = shared.pop("density", None)
    inputs = []
    for index, model in enumerate(case["models"]):
        own = {}
        if "weights" in case:
            own["weight"] = case["weights"][index]
        if density is not None:
            own["density"] = density[index]
        inputs.append({"model": path(model), "parameters": own})
    content = {
        "merge_method": case["method"],
        "models": inputs,
        "parameters": shared,
        "dtype": "float32",
    }
    if case["method"] == "slerp":
        content["base_model"] = path(case["models"][0])  # t = 0
    elif case["method"] != "linear":
        content["base_model"] = path("base")
    return content


def main() -> None:
    """Run mergekit and write the file."""
    models = make_inputs()
    check_no_ties(models)
    tensors = {f"input/{m}/{name}": x for m, model in models.items() for name, x in model.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in models.items():
            save_file(model, folder / f"{name}.safetensors")
        for name, case in CASES.items():
            config = folder / f"{name}.yml"
            config.write_text(yaml.safe_dump(configuration(case, folder)))
            output = folder / name
            mergekit_pytorch.main([str(config), str(output), "--quiet"], standalone_mode=False)
            (weights,) = output.glob("*.safetensors")
            merged = load_file(weights)
            assert set(merged) == set(models["base"])
            assert all(x.dtype == np.float32 for x in merged.values())
            tensors.update({f"{name}/{tensor}": x for tensor, x in merged.items()})
    made = {"mergekit": version("mergekit"), "cases": CASES}
    save_file(tensors, VECTORS, {"vectors": json.dumps(made)})
    print(f"{len(CASES)} cases, {VECTORS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
