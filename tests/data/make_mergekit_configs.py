"""Make `mergekit_configs.safetensors`: tiny Llamas, and what mergekit 0.1.5 makes of them.

    pip install mergekit==0.1.5
    python tests/data/make_mergekit_configs.py

The command `mergekit-yaml` is run over model folders in a temporary folder, once for each of
`CONFIGS`. The file holds `input/MODEL/TENSOR` and `CASE/TENSOR`, all in float32; in its metadata
are the configurations as they stand, the number of layers that each result's config counts, and the
models' config.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.numpy import load_file, save_file

VECTORS = Path(__file__).with_name("mergekit_configs.safetensors")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8,
    "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "vocab_size": 16, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 32, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip

CONFIGS = {
    "gradient": """
merge_method: linear
models:
- model: a
  parameters: {weight: [0, 0.5, 1]}
- model: b
  parameters: {weight: 1}
parameters: {normalize: false}
dtype: float32
""",
    "slerp filters and gradients": """
slices:
- sources:
  - {model: a, layer_range: [0, 4]}
  - {model: b, layer_range: [0, 4]}
merge_method: slerp
base_model: a
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
dtype: float32
""",
    "slerp over models, base second": """
merge_method: slerp
models:
- model: b
- model: a
base_model: a
parameters: {t: 0.3}
dtype: float32
""",
    "stacked": """
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4]}]
- sources: [{model: a, layer_range: [3, 4]}]
merge_method: passthrough
dtype: float32
""",
    "stacked and scaled": """
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources:
  - model: b
    layer_range: [1, 4]
    parameters:
      scale:
      - {filter: o_proj, value: 0.0}
      - {filter: down_proj, value: [1, 0.5, 0]}
      - value: 1.0
merge_method: passthrough
dtype: float32
""",
    "precedence": """
slices:
- sources:
  - model: a
    layer_range: [0, 2]
    parameters: {weight: {filter: mlp, value: 0.9}}
  - {model: b, layer_range: [2, 4]}
  parameters:
    weight: {filter: self_attn, value: 0.2}
- sources:
  - {model: b, layer_range: [0, 1]}
  - model: a
    layer_range: [3, 4]
    parameters: {weight: [0.1, 0.8]}
merge_method: linear
parameters: {weight: 0.6, normalize: false}
dtype: float32
""",
    "two models and one": """
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: 0.25}}
  - {model: b, layer_range: [0, 2], parameters: {weight: 0.5}}
- sources: [{model: b, layer_range: [2, 4], parameters: {weight: 2.0}}]
merge_method: linear
dtype: float32
""",
    "task vectors by name": """
models:
- model: base
- model: a
  parameters:
    weight:
    - {filter: mlp, value: [0.2, 0.8]}
    - value: 0.4
- model: b
  parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: base
parameters: {normalize: false, lambda: 0.9}
dtype: float32
""",
    "ties in slices": """
slices:
- sources:
  - {model: base, layer_range: [0, 2]}
  - {model: a, layer_range: [0, 2], parameters: {weight: 0.6, density: 0.5}}
  - {model: b, layer_range: [0, 2], parameters: {weight: 0.7, density: [0.4, 0.8]}}
- sources:
  - {model: base, layer_range: [2, 4]}
  - {model: b, layer_range: [2, 4]}
  - {model: a, layer_range: [1, 3]}
  parameters: {weight: 0.5, density: 0.6}
merge_method: ties
base_model: base
parameters: {int8_mask: true, normalize: [true, false]}
dtype: float32
""",
    "a base is one more input of a mean": """
models:
- {model: a, parameters: {weight: 1}}
- {model: b, parameters: {weight: 2}}
merge_method: linear
base_model: base
parameters: {weight: 3}
dtype: float32
""",
    "nuslerp over a base": """
models:
- {model: a, parameters: {weight: [0.2, 0.9]}}
- {model: b, parameters: {weight: 0.5}}
merge_method: nuslerp
base_model: base
dtype: float32
""",
    "karcher with a base": """
models: [{model: a}, {model: b}]
merge_method: karcher
base_model: base
dtype: float32
""",
    "nearswap from the base": """
models: [{model: b}, {model: a}]
merge_method: nearswap
base_model: a
parameters: {t: [{filter: mlp, value: 0.01}, {value: 0.02}]}
dtype: float32
""",
    "modules": """
modules:
  default:
    slices:
    - sources:
      - {model: a, layer_range: [0, 1]}
      - {model: b, layer_range: [3, 4]}
    - sources:
      - {model: a, layer_range: [1, 3]}
      - {model: b, layer_range: [0, 2]}
    parameters: {weight: 0.75}
merge_method: linear
parameters: {weight: 0.5, normalize: false}
dtype: float32
""",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """A Llama's tensors."""
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    assert isinstance(width, int) and isinstance(inner, int)
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (16, width), "lm_head.weight": (16, width),
        "model.norm.weight": (width,),
    }  # fmt: skip
    for layer in (f"model.layers.{number}" for number in range(4)):
        found |= {f"{layer}.self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        found |= {f"{layer}.mlp.{n}_proj.weight": (inner, width) for n in ("up", "gate")}
        found[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        found |= {f"{layer}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return found


def main() -> None:
    """Run mergekit and write the file."""
    generator = np.random.default_rng(16)

    def normal(scale: float) -> dict[str, np.ndarray]:
        return {n: generator.normal(0, scale, s).astype(np.float32) for n, s in shapes().items()}

    base = normal(0.1)
    models = {"base": base}
    for name in "ab":
        models[name] = {n: base[n] + delta for n, delta in normal(0.05).items()}
    tensors = {f"input/{m}/{name}": x for m, model in models.items() for name, x in model.items()}
    counts = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, model in models.items():
            folder = Path(temporary, name)
            folder.mkdir()
            save_file(model, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps(CONFIG))
        for case, text in CONFIGS.items():
            config, output = Path(temporary, f"{case}.yml"), Path(temporary, f"{case}-out")
            for name in models:
                text = text.replace(f"model: {name}", f"model: {Path(temporary, name)}")  # noqa: PLW2901
            config.write_text(text)
            arguments = [str(config), str(output), "--quiet", "--no-copy-tokenizer"]
            mergekit_yaml.main(arguments, standalone_mode=False)
            (weights,) = output.glob("*.safetensors")
            tensors |= {f"{case}/{name}": x for name, x in load_file(weights).items()}
            counts[case] = json.loads((output / "config.json").read_text())["num_hidden_layers"]
    made = {
        "mergekit": version("mergekit"), "configs": CONFIGS, "layers": counts, "config": CONFIG,
    }  # fmt: skip
    save_file(tensors, VECTORS, {"vectors": json.dumps(made)})
    print(f"{len(CONFIGS)} configurations, {VECTORS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
