"""Make `mergekit_tokenizers.safetensors`: tiny Llamas of several tokenizers, and what mergekit
0.1.5 makes of them.

    pip install mergekit==0.1.5
    python tests/data/make_mergekit_tokenizers.py

The command `mergekit-yaml` is run over model folders in a temporary folder, once for each of
`CONFIGS`. The file holds `input/MODEL/TENSOR` and `CASE/TENSOR`, all in float32; in its metadata
are the configurations as they stand, each model's `tokenizer.json`, each result's tokens with their
numbers, and the models' config, where each has as many rows of embeddings as it has tokens.
"""

from __future__ import annotations

import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

VECTORS = Path(__file__).with_name("mergekit_tokenizers.safetensors")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4,
    "intermediate_size": 6, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu", "eos_token_id": 1,
    "max_position_embeddings": 32, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
TEXTS = {
    "base": "soup of soups, a pot of soup: onion, leek, pea and bean",
    "a": "soup of soups, a pot of soup: onion, leek, pea and bean",
    "b": "bean and pea and leek; onion! broth in a bowl, broth in a pot, and no soup",
}
ADDED = {"base": ["<s>", "</s>"], "a": ["<s>", "</s>", "<|user|>"], "b": ["</s>", "<pad>", "<s>"]}

CONFIGS = {
    "of the base": """
merge_method: linear
base_model: base
models:
- {model: base, parameters: {weight: 1}}
- {model: a, parameters: {weight: 2}}
- {model: b, parameters: {weight: 3}}
tokenizer_source: base
dtype: float32
""",
    "of a model, without a base": """
merge_method: linear
models:
- {model: b, parameters: {weight: 1}}
- {model: a, parameters: {weight: 2}}
- {model: base, parameters: {weight: 4}}
tokenizer: {source: a}
dtype: float32
""",
    "of the second of two": """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters: {t: 0.3}
tokenizer_source: b
dtype: float32
""",
    "the union": """
merge_method: linear
models:
- {model: a, parameters: {weight: 1}}
- {model: b, parameters: {weight: 2}}
- {model: base, parameters: {weight: 4}}
tokenizer_source: union
dtype: float32
""",
    "the union over a base": """
merge_method: task_arithmetic
base_model: base
models:
- {model: a, parameters: {weight: 0.5}}
- {model: b, parameters: {weight: 0.7}}
tokenizer: {source: union}
dtype: float32
""",
    "stacked": """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b, layer_range: [1, 2]}]
tokenizer_source: a
dtype: float32
""",
    "ties": """
merge_method: ties
base_model: base
models:
- {model: a, parameters: {weight: 0.5, density: 0.5}}
- {model: b, parameters: {weight: 0.7, density: 0.6}}
tokenizer_source: base
dtype: float32
""",
}


def tokenizer(name: str) -> Tokenizer:
    """A tokenizer of pairs of bytes, as small as may be."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ADDED[name][: 2 if name != "b" else 3]
    trainer = trainers.BpeTrainer(vocab_size=36, special_tokens=special, show_progress=False)
    made.train_from_iterator([TEXTS[name]], trainer)
    made.add_special_tokens([AddedToken(token) for token in ADDED[name]])
    return made


def shapes(tokens: int) -> dict[str, tuple[int, ...]]:
    """A Llama's tensors."""
    width, inner = 4, 6
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (tokens, width), "lm_head.weight": (tokens, width),
        "model.norm.weight": (width,),
    }  # fmt: skip
    for layer in (f"model.layers.{number}" for number in range(2)):
        found |= {f"{layer}.self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        found |= {f"{layer}.mlp.{n}_proj.weight": (inner, width) for n in ("up", "gate")}
        found[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        found |= {f"{layer}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return found


def main() -> None:
    """Run mergekit and write the file."""
    generator = np.random.default_rng(16)
    tensors: dict[str, np.ndarray] = {}
    texts, tokens = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in TEXTS:
            folder = Path(temporary, name)
            folder.mkdir()
            own = tokenizer(name)
            own.save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").write_text(
                json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
            )
            texts[name] = (folder / "tokenizer.json").read_text()
            config = {**CONFIG, "vocab_size": own.get_vocab_size()}
            (folder / "config.json").write_text(json.dumps(config))
            model = {
                n: generator.normal(0, 0.1, s).astype(np.float32)
                for n, s in shapes(own.get_vocab_size()).items()
            }
            save_file(model, folder / "model.safetensors", {"format": "pt"})
            tensors |= {f"input/{name}/{n}": x for n, x in model.items()}
        for case, text in CONFIGS.items():
            config_file, output = Path(temporary, f"{case}.yml"), Path(temporary, f"{case}-out")
            paths = "|".join(TEXTS)
            content = re.sub(
                rf"(model: |\{{source: |tokenizer_source: )({paths})(?=[,}}\n])",
                lambda found: (
                    found[0]
                    if found[0] == "tokenizer_source: base"
                    else f"{found[1]}{Path(temporary, found[2])}"
                ),
                text,
            )
            config_file.write_text(content)
            mergekit_yaml.main([str(config_file), str(output), "--quiet"], standalone_mode=False)
            (weights,) = output.glob("*.safetensors")
            tensors |= {f"{case}/{name}": x for name, x in load_file(weights).items()}
            tokens[case] = AutoTokenizer.from_pretrained(output).get_vocab()
            size = json.loads((output / "config.json").read_text())["vocab_size"]
            assert size == len(tokens[case])
    made = {
        "mergekit": version("mergekit"), "configs": CONFIGS, "config": CONFIG, "tokenizers": texts,
        "tokens": tokens,
    }  # fmt: skip
    save_file(tensors, VECTORS, {"vectors": json.dumps(made)})
    print(f"{len(CONFIGS)} configurations, {VECTORS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
