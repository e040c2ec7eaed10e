"""Adapters and auxiliary inputs in trees: what lies beside the models of a merge."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup.terminal.cli import main

Arrays = dict[str, np.ndarray]


def soup(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def adapter(name: str, seed: int, alpha: float = 4) -> np.ndarray:
    """A PEFT adapter for `up.weight`, and what it adds."""
    down, up = draw(2, 5, seed=seed), draw(6, 2, seed=seed + 100)
    Path(name).mkdir()
    start = "base_model.model.up"
    factors = {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    save_file(factors, Path(name, "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
    Path(name, "adapter_config.json").write_text(json.dumps(config))
    found: np.ndarray = up @ down * (alpha / 2)
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three models, data of two of them, and two adapters."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        model = {"up.weight": draw(6, 5, seed=seed), "norm.weight": draw(5, seed=seed)}
        save_file(model, f"{name}.safetensors")
        if name != "c":
            save_file({n: np.square(x) for n, x in model.items()}, f"of_{name}.safetensors")
    return tmp_path


def model(name: str) -> Arrays:
    found: Arrays = load_file(f"{name}.safetensors")
    return found


def planned(**more: Any) -> dict[str, Any]:
    done = soup("plan", "tree.yaml", "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["problems"] == []
    return found


def made(output: str = "out", *options: str) -> Arrays:
    done = soup("run", "tree.yaml", "-o", f"{output}.safetensors", "-q", "--force", *options)
    assert done.exit_code == 0, done.output
    return model(output)


def tree(text: str) -> None:
    models = "{a: a.safetensors, b: b.safetensors, c: c.safetensors}"
    Path("tree.yaml").write_text(f"soup: 1\nmodels: {models}\n{text}")


FISHER = """
tree:
  of:
  - {of: [a, b], merge: {method: fisher, aux: {fisher: [of_a.safetensors, of_b.safetensors]}}}
  - c
"""


def test_data_of_the_models_may_be_named_in_a_node(here: Path):
    tree(FISHER)
    root = next(node for node in planned()["nodes"] if node["node"] == "root.1")
    assert root["aux"] == {"fisher": ["of_a.safetensors", "of_b.safetensors"]}
    a, b, c = map(model, "abc")
    for name, values in made("out", "--fuse").items():
        f, g = a[name] ** 2, b[name] ** 2
        inner = (f * a[name] + g * b[name]) / (f + g)
        np.testing.assert_allclose(values, (inner + c[name]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("file", ["of_b.safetensors", "t/adapter_config.json"])
def test_what_lies_beside_a_merge_is_part_of_its_key(file: str, here: Path):
    """The config of an adapter scales it, and so decides the bytes as its factors do."""
    change = adapter("t", 7)
    tree(FISHER.replace("- c\n", "- {of: [c], merge: {lora: t}}\n"))
    first = made()
    assert planned()["steps"] == []
    if file.startswith("of"):
        save_file({n: np.ones_like(x) for n, x in model("b").items()}, file)
    else:
        config = json.loads(Path(file).read_text())
        Path(file).write_text(json.dumps({**config, "lora_alpha": 8}))
    changed = "root.1" if file.startswith("of") else "root.2"
    assert planned()["steps"] == [changed, "root"]
    again = made()
    if changed == "root.2":
        np.testing.assert_allclose(
            again["up.weight"], first["up.weight"] + change / 2, rtol=1e-4, atol=1e-5
        )
    else:
        assert not np.array_equal(again["norm.weight"], first["norm.weight"])


def test_adapters_are_folded_into_a_leaf_or_into_whatever_a_node_makes(here: Path):
    s, t = adapter("s", 7), adapter("t", 8)
    Path("tree.yaml").write_text("""
soup: 1
models:
  a: {path: a.safetensors, lora: [s]}
  b: b.safetensors
tree:
  of: [{of: [a, b], name: both}]
  merge: {lora: {s: 0.5, t: -0.25}}
""")
    plan = planned()
    assert plan["steps"] == ["a", "both", "root"]
    told = {node["node"]: node for node in plan["nodes"]}
    assert told["root"]["lora"] == {"s": 0.5, "t": -0.25} and told["a"]["inputs"] == ["a.1"]
    found = made()
    a, b = model("a"), model("b")
    wanted = (a["up.weight"] + s + b["up.weight"]) / 2 + 0.5 * s - 0.25 * t
    np.testing.assert_allclose(found["up.weight"], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found["norm.weight"], (a["norm.weight"] + b["norm.weight"]) / 2, rtol=1e-6
    )
    Path("one.yaml").write_text("soup: 1\nmodels: {b: b.safetensors}\ntree: "
                                "{of: [b], merge: {lora: {s: 0.5, t: -0.25}}}\n")  # fmt: skip
    assert soup("run", "one.yaml", "-o", "one.safetensors", "-q").exit_code == 0
    modelsoup.merge(["b.safetensors"], "two.safetensors", lora={"s": 0.5, "t": -0.25})
    one, two = model("one"), model("two")
    assert all(np.array_equal(one[name], two[name]) for name in two)


def test_a_fold_and_its_data_are_priced_as_they_are_read(here: Path):
    adapter("t", 7)
    Path("tree.yaml").write_text("soup: 1\nmodels: {a: a.safetensors, b: b.safetensors}\ntree:\n"
                                 "  of: [{of: [a], merge: {lora: t}}, b]\n  merge: {method: fisher,"
                                 " aux: {fisher: [of_a.safetensors, of_b.safetensors]}}\n"
                                 )  # fmt: skip
    plan = {node["node"]: node for node in planned()["nodes"]}
    own, factors = 4 * (6 * 5 + 5), 4 * 2 * (6 + 5)
    assert plan["root.1"]["bytes_read"] == own + factors
    assert plan["root"]["bytes_read"] == 4 * own
    made()
    keys = {node["node"]: node["key"] for node in planned()["nodes"]}
    for node in ("root.1", "root"):
        record = json.loads(soup("store", "show", keys[node]).stdout)
        assert record["bytes_read"] == plan[node]["bytes_read"], node


def test_a_lineage_of_adapters_and_data_is_a_plan_again(here: Path):
    adapter("s", 7)
    adapter("t", 8)
    tree(FISHER.replace("- c\n", "- {of: [c], merge: {lora: {s: 0.5, t: 2}}, name: folded}\n"))
    first = made()
    lineage = modelsoup.read_lineage("out.safetensors")
    assert lineage is not None
    steps = lineage["ancestors"].values()
    assert sorted(step["method"] for step in steps) == ["fisher", "task_arithmetic"]
    again = soup("plan", "--from", "out.safetensors")
    assert again.exit_code == 0, again.output
    assert "lora: {s: 0.5, t: 2.0}" in again.output
    Path("tree.yaml").write_text(modelsoup.plan_text("out.safetensors"))
    second = made("again", "--store", "another")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    modelsoup.merge(["c.safetensors"], "fold.safetensors", lora=["s"])
    Path("tree.yaml").write_text(modelsoup.plan_text("fold.safetensors"))
    folded, once = made("again", "--store", "another"), model("fold")
    assert all(np.array_equal(folded[name], once[name]) for name in once)


def test_a_model_with_an_adapter_in_a_configuration_of_mergekits_is_folded_first(here: Path):
    t = adapter("t", 7)
    Path("kit.yml").write_text("""
merge_method: linear
models:
- {model: a.safetensors+t, parameters: {weight: 1}}
- {model: b.safetensors, parameters: {weight: 3}}
""")
    done = soup("merge", "--config", "kit.yml", "-o", "out.safetensors")
    assert done.exit_code == 1
    told = "kit.yml folds adapters into models, which is a tree: soup run kit.yml -o "
    assert told in done.output
    done = soup(*done.output.strip().rpartition(": ")[2].split()[1:])
    assert done.exit_code == 0, done.output
    a, b = model("a")["up.weight"], model("b")["up.weight"]
    np.testing.assert_allclose(model("out")["up.weight"], (a + t + 3 * b) / 4, rtol=1e-4, atol=1e-5)


def test_a_tree_writes_a_model_card_where_it_is_asked_for(here: Path):
    adapter("t", 7)
    for name in "abc":
        Path(name).mkdir()
        Path(f"{name}.safetensors").rename(f"{name}/model.safetensors")
        Path(name, "config.json").write_text(json.dumps({"architectures": ["X"]}))
    Path("b/README.md").write_text("---\nlicense: mit\n---\n")
    text = """# a `tree`
soup: 1
models: {a: a, b: b, c: c}
tree:
  of: [{of: [a], merge: {lora: t}}, {of: [b, c], merge: {method: slerp, t: 0.5}}]
  merge: {files_from: second}
"""
    Path("tree.yaml").write_text(text)
    assert soup("run", "tree.yaml", "-o", "plain", "-q").exit_code == 0
    assert not Path("plain/README.md").exists()
    assert soup("run", "tree.yaml", "-o", "out", "-q", "--model-card").exit_code == 0
    card = Path("out/README.md").read_text()
    assert card.startswith(
        "---\nbase_model: [a, b, c, t]\nlicense: mit\nlibrary_name: transformers\n"
        "tags: [merge, modelsoup]\n---\n\n# out\n\nMade by modelsoup, in 3 merges, of:\n\n- `a`\n"
    )
    assert "\n## Method\n\n- `linear`: " in card and "\n- `slerp`: " in card
    assert "\n- `task_arithmetic`: " in card and card.endswith(f"```yaml\n{text}```\n")
    done = soup("run", "tree.yaml", "-o", "one.safetensors", "--model-card")
    assert done.exit_code == 1 and "are folders, so the output" in done.output
    found = modelsoup.read_tree("tree.yaml")[0]
    modelsoup.run(dataclasses.replace(found, file=None), "again", model_card=True)
    assert f"\n```yaml\n{modelsoup.plan_text('again')}```\n" in Path("again/README.md").read_text()
    kit = "merge_method: linear\nmodels: [{model: a+t}, {model: b}]\n"
    Path("kit.yml").write_text(kit)
    assert soup("run", "kit.yml", "-o", "kit", "-q").exit_code == 0
    assert kit in Path("kit/README.md").read_text()
    assert soup("run", "kit.yml", "-o", "bare", "-q", "--no-model-card").exit_code == 0
    assert not Path("bare/README.md").exists()


def test_a_model_card_goes_into_a_folder_alone(here: Path):
    tree("tree: {of: [a, b]}\n")
    done = soup("run", "tree.yaml", "-o", "out.safetensors", "--model-card")
    assert done.exit_code == 1 and "a model card goes into a folder: name a folder" in done.output
    tree("tree: a\n")
    done = soup("run", "tree.yaml", "-o", "out.safetensors", "--model-card")
    assert done.exit_code == 1 and not Path("out.safetensors").exists()
    assert "a model card tells of merges, and there is none in this tree" in done.output


# What is refused

TREES = {
    "merge: {lora: 3}": "tree.yaml:4:28: lora is 3, not a path, a list of paths or a mapping from",
    "merge: {lora: {t: yes}}": "tree.yaml:4:28: lora is {'t': 'yes'}, not a path",
    "merge: {lora: {t: .inf}}": "tree.yaml:4:28: lora is {'t': inf}, not a path",
    "merge: {lora: []}": "tree.yaml:4:28: lora is [], not a path",
    "merge: {lora: [t, t]}": "tree.yaml:4:28: the adapter 't' is there twice",
    "merge: {lroa: t}": "did you mean 'lora'",
    "merge: {lora: t}": "adapters are applied to one model, but 2 and no base model were given",
    "merge: {method: fisher}": "'fisher' needs 'fisher' for each model (aux: {fisher: [A, B]})",
    "merge: {method: fisher, aux: 3}": "tree.yaml:4:44: aux is 3, not a mapping from names to a",
    "merge: {method: fisher, aux: {fisher: []}}": "tree.yaml:4:44: aux is {'fisher': []}, not a",
    "merge: {method: fisher, aux: {fisher: of_a.safetensors}}":
        "there is one 'fisher' for each model, but 1 checkpoint for 2 models",
    "merge: {method: fisher, aux: {fisher: [of_a.safetensors, none.safetensors]}}":
        "none.safetensors",
    "merge: {method: linear, aux: {fisher: [of_a.safetensors, of_b.safetensors]}}":
        "the method 'linear' has no auxiliary input 'fisher'",
}  # fmt: skip


@pytest.mark.parametrize("text", TREES)
def test_what_cannot_lie_beside_a_merge_is_refused(text: str, here: Path):
    adapter("t", 7)
    tree(f"x: 1\ntree: {{of: [a, b], {text}}}\n".replace("x: 1\n", "seed: 0\n"))
    done = soup("plan", "tree.yaml")
    assert done.exit_code == 1 and TREES[text] in done.output, done.output


def test_an_adapter_for_another_model_is_told_before_anything_is_made(here: Path):
    adapter("t", 7)
    save_file({"up.weight": draw(6, 6, seed=1)}, "a.safetensors")
    tree("tree: {of: [{of: [a], merge: {lora: t}}, b]}\n")
    done = soup("plan", "tree.yaml")
    assert done.exit_code == 1 and "t is for another base" in done.output
    tree("tree: {of: [{of: [b], merge: {lora: nowhere}}, c]}\n")
    done = soup("plan", "tree.yaml")
    assert done.exit_code == 1 and "nowhere" in done.output


def test_defaults_that_would_fold_into_a_model_alone_are_told(here: Path):
    adapter("t", 7)
    tree("defaults: {merge: {lora: t}}\ntree: {of: [a]}\n")
    done = soup("plan", "tree.yaml")
    assert "one model is taken as it is, without what `defaults.merge` says of lora" in done.output


def test_an_output_replaces_nothing_that_lies_beside(here: Path):
    adapter("t", 7)
    tree("tree: {of: [b], merge: {lora: t}}\n")
    done = soup("run", "tree.yaml", "-o", "t/adapter_model.safetensors", "--force")
    assert done.exit_code == 1 and Path("t/adapter_model.safetensors").stat().st_size < 1000
    assert "t" in done.output
