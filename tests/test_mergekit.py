"""mergekit's configurations: the same results as its own run, and what is refused by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup import PlanError
from modelsoup.files.yaml_text import read_documents
from modelsoup.terminal.cli import main
from modelsoup.trees.mergekit import merges_of, read_mergekit

VECTORS = Path(__file__).parent / "data" / "mergekit_configs.safetensors"
TENSORS = load_file(VECTORS)
with safe_open(VECTORS, "numpy") as file:
    MADE = json.loads(file.metadata()["vectors"])
CONFIGS: dict[str, str] = MADE["configs"]


def under(name: str) -> dict[str, np.ndarray]:
    start = f"{name}/"
    return {n.removeprefix(start): x for n, x in TENSORS.items() if n.startswith(start)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models base, a and b, as folders beside the configuration."""
    monkeypatch.chdir(tmp_path)
    for model in ("base", "a", "b"):
        (tmp_path / model).mkdir()
        save_file(under(f"input/{model}"), tmp_path / model / "model.safetensors")
        (tmp_path / model / "config.json").write_text(json.dumps(MADE["config"]))
    return tmp_path


def soup(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def refused(text: str) -> str:
    """What is said of a configuration that cannot be carried out, by both commands."""
    Path("kit.yml").write_text(text)
    merged = soup("merge", "--config", "kit.yml", "-o", "out")
    assert merged.exit_code == 1 and not Path("out").exists(), merged.output
    return merged.output.removeprefix("Error: ").rstrip("\n")


# The same results


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_makes_what_mergekit_makes_of_it(case: str, here: Path):
    (here / "kit.yml").write_text(CONFIGS[case])
    done = soup("merge", "--config", "kit.yml", "-o", "out", "--quiet")
    assert done.exit_code == 0, done.output
    made, expected = load_file(here / "out" / "model.safetensors"), under(case)
    assert made.keys() == expected.keys()
    for name, values in expected.items():
        assert made[name].dtype == values.dtype
        np.testing.assert_allclose(made[name], values, rtol=2e-6, atol=2e-7, err_msg=name)
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == MADE["layers"][case]


@pytest.mark.parametrize("case", ["precedence", "ties in slices"])
def test_a_configuration_is_recorded_and_made_again_by_its_plan(case: str, here: Path):
    (here / "kit.yml").write_text(CONFIGS[case])
    assert soup("merge", "--config", "kit.yml", "-o", "out").exit_code == 0
    (here / "tree.yaml").write_text(modelsoup.plan_text("out"))
    done = soup("run", "tree.yaml", "-o", "again", "-q")
    assert done.exit_code == 0, done.output
    again, made = (load_file(here / name / "model.safetensors") for name in ("again", "out"))
    assert again.keys() == made.keys() and all(np.array_equal(again[n], made[n]) for n in made)


def test_a_configuration_may_be_planned_and_run_like_a_tree(here: Path):
    (here / "kit.yml").write_text(CONFIGS["stacked"])
    planned = json.loads(soup("plan", "kit.yml", "--json").stdout)
    assert planned["problems"] == [] and planned["steps"] == ["root"]
    assert soup("run", "kit.yml", "-o", "out", "-q").exit_code == 0
    made = load_file(here / "out" / "model.safetensors")
    assert made.keys() == under("stacked").keys()
    assert all(np.array_equal(made[name], x) for name, x in under("stacked").items())


STAGES = """
name: first
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]
---
name: second
merge_method: slerp
base_model: a
models: [{model: a}, {model: base}]
parameters: {t: 0.25}
---
merge_method: linear
models:
- {model: first, parameters: {weight: 0.5}}
- {model: second, parameters: {weight: 0.5}}
"""


def test_merges_of_several_stages_are_a_tree(here: Path):
    (here / "kit.yml").write_text(STAGES)
    found = read_mergekit(here / "kit.yml")
    assert found is not None
    tree, warnings = found
    assert warnings == [] and tree.inputs("root") == ["first", "second"]
    assert tree.inputs("first") == ["a", "b"] and tree.inputs("second") == ["a#2", "base"]
    assert soup("run", "kit.yml", "-o", "out", "-q").exit_code == 0
    a, b, base = (under(f"input/{model}") for model in ("a", "b", "base"))
    for name, values in load_file(here / "out" / "model.safetensors").items():
        x, y = a[name].astype(float), base[name].astype(float)
        angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        arc = (np.sin(0.75 * angle) * x + np.sin(0.25 * angle) * y) / np.sin(angle)
        expected = (0.25 * a[name] + 0.75 * b[name] + arc) / 2
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)


def test_a_merge_of_several_stages_says_the_command_that_makes_it(here: Path):
    message = refused(STAGES)
    assert message == ("kit.yml has 3 merges, which are a tree: soup run kit.yml -o out")
    command = message.rpartition(": ")[2].split()[1:]
    assert soup(*command).exit_code == 0 and (here / "out" / "model.safetensors").is_file()


# What is refused, and where

ONE = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
LINEAR = f"merge_method: linear\n{ONE}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINEAR + "out_dtpye: float32", "kit.yml:3:1: unknown key 'out_dtpye'; did you mean"),
        (LINEAR + "parameters: {normalise: false}",
         "kit.yml:3:14: unknown parameter 'normalise'; did you mean 'normalize'"),
        ("merge_method: linaer\n" + ONE,
         "kit.yml:1:1: no merge method is called 'linaer'; did you mean 'linear'"),
        ("merge_method: linear", "kit.yml:1:1: one of models, slices and modules must be given"),
        (LINEAR + "slices: [{sources: []}]",
         "kit.yml:3:1: one of models, slices and modules must be given, not models, slices"),
        (LINEAR.replace("model: b", "model: c"), "kit.yml:2:48: there is no model 'c': neither"),
        (LINEAR.replace("model: b", "modle: b"), "kit.yml:2:48: unknown key 'modle'; did you"),
        (LINEAR.replace("model: b", "model: b+lora"), "kit.yml:2:48: there is no model 'lora': "),
        (LINEAR.replace("model: b", "model: b+"), "kit.yml:2:48: there is no model 'b+': "),
        ("merge_method: ties\nbase_model: base+a\n" + ONE,
         "kit.yml:2:1: the base of task vectors cannot be an adapter's: make that one first"),
        (LINEAR.replace("model: b", "model: a"), "kit.yml:2:1: the model 'a' is there twice"),
        (LINEAR + "tokenizer_source: union",
         "a has no tokenizer.json that tells the tokens, by which the rows of embeddings are"),
        (LINEAR + "tokenizer: {source: a, tokens: {}}",
         "kit.yml:3:24: tokens of a tokenizer is not supported"),
        (LINEAR + "tokenizer: {source: a, pad_to_multiple_of: 8}",
         "kit.yml:3:24: pad_to_multiple_of of a tokenizer is not supported"),
        (LINEAR + "tokenizer_source: base/", "kit.yml:3:1: 'base/' is none of the models"),
        (LINEAR + "chat_template: chatml",
         "kit.yml:3:1: chat_template 'chatml' is one that mergekit brings along: give its text"),
        (LINEAR + "chat_template: x", "kit.yml:3:1: chat_template 'x' is no template"),
        (LINEAR + "dtype: 7", "kit.yml:3:1: dtype is 7, not the name of a dtype"),
        (LINEAR + "dtype: float31", "kit.yml:1:1: "),
        ("merge_method: ties\n" + ONE, "kit.yml:1:1: 'ties' needs a base_model"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: {value: 1, fliter: x}}}]",
         "kit.yml:2:53: unknown key 'fliter'; did you mean 'filter'"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, {value: 1}]}}]",
         "kit.yml:2:43: 1 is not a mapping with value"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}]",
         "kit.yml:2:34: 'normalize' is the same for all models, and cannot be one model's"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]",
         "kit.yml:2:47: there is no 'weight' for this model"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0]}]}]",
         "kit.yml:2:32: layer_range [0] is not [START, STOP]"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]",
         "kit.yml:2:32: layer_range [2, 2] is empty: it goes from the first"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 5]}]}]",
         "the slice 1[2:5] goes past the end: a has 4 layers"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}, "
         "{model: b, layer_range: [0, 2]}]}]", "kit.yml:2:11: the ranges have 1, 2 layers: "),
        ("merge_method: linear\nslices: [{residual_weight: 1, sources: []}]",
         "kit.yml:2:11: residual_weight is not supported"),
        ("merge_method: slerp\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}, "
         "{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]",
         "kit.yml:2:10: slices of different numbers of models are not supported for 'slerp'"),
        ("merge_method: linear\nmodules: {text: {models: [{model: a, parameters: {weight: 1}}]}}",
         "no rule matches 39 tensors|the pattern 'group:text' matches no tensor"),
        ("merge_method: linear\nmodules: {text: {}}",
         "kit.yml:2:11: the module 'text' must have either slices or models"),
        (LINEAR + "---\n" + LINEAR, "kit.yml:4:1: two merges have no name"),
        ("name: x\n" + LINEAR + "---\nname: x\n" + LINEAR, "kit.yml:5:1: two merges are"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: yes}}]",
         "kit.yml:2:34: parameter 'weight' of 'linear' is True, not a number"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: '1,2'}}]",
         "kit.yml:2:34: '1,2' is no value of a parameter"),
        (LINEAR + "parameters: {normalize: 2}",
         "kit.yml:3:14: parameter 'normalize' of 'linear' is 2, not true or false"),
        ("merge_method: ties\nbase_model: base\n" + ONE + "parameters: {density: "
         "[{filter: mlp, value: 0.5}, {value: 1.5}]}",
         "kit.yml:4:52: parameter 'density' of 'ties' is 1.5, but must be between 0 and 1"),
        ("merge_method: linear\nmodels: {a: 1}", "kit.yml:2:1: models is {'a': 1}, not a list"),
        ("merge_method: linear\nmodels: [a]", "kit.yml:2:10: 'a' is not a mapping"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_out_is_said_with_its_line(text: str, message: str, here: Path):
    told = refused(text)
    assert any(part in told for part in message.split("|")), told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n" + LINEAR + "---\nname: y\n" + LINEAR,
         "kit.yml: it does not say which merge is the last (x, y): that one has no name"),
        ("name: x\n" + LINEAR.replace("model: a", "model: y") + "---\nname: y\n"
         + LINEAR.replace("model: b", "model: x") + "---\n"
         + LINEAR.replace("model: a", "model: x"),
         "kit.yml: the merge 'x' is made of itself: x → y → x"),
        ("name: x\n" + LINEAR + "---\n" + LINEAR,
         "kit.yml: the merge 'x' goes into no other, and is not the last"),
        ("name: x\n" + LINEAR + "---\nmerge_method: task_arithmetic\nbase_model: x\n" + ONE,
         "kit.yml:6:1: the base of task vectors cannot be another merge of this"),
    ],
)  # fmt: skip
def test_stages_that_make_no_tree_are_said(text: str, message: str, here: Path):
    (here / "kit.yml").write_text(text)
    done = soup("plan", "kit.yml")
    assert done.exit_code == 1 and message in done.output


def test_what_other_methods_have_is_passed_over_aloud(here: Path):
    """As mergekit passes it over, in silence."""
    (here / "kit.yml").write_text(LINEAR + "parameters: {density: 0.5, int8_mask: true}")
    done = soup("merge", "--config", "kit.yml", "-o", "out", "--dry-run")
    assert done.exit_code == 0
    assert "kit.yml:3:14: linear has no parameter 'density'; it is passed over" in done.output
    assert "int8_mask" not in done.output


def test_options_that_say_something_of_the_merge_do_not_go_with_a_configuration(here: Path):
    (here / "kit.yml").write_text(LINEAR)
    for options, what in (
        (["--method", "slerp"], "--method is"), (["a", "b"], "models are"),
        (["--rename", "a=b"], "--renames is"), (["--beta", "0"], "--beta is"),
    ):  # fmt: skip
        done = soup("merge", "--config", "kit.yml", "-o", "out", *options)
        assert done.exit_code == 1 and f"{what} given, but kit.yml is mergekit's" in done.output


def test_a_gradient_of_one_number_is_that_number(here: Path):
    outs = []
    for weight in ("[0.3]", "0.3"):
        (here / "kit.yml").write_text(LINEAR.replace("weight: 1}}]", f"weight: {weight}}}}}]"))
        assert soup("merge", "--config", "kit.yml", "-o", "o.safetensors", "--force").exit_code == 0
        outs.append((here / "o.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_names_with_special_characters_are_filtered_as_they_stand(here: Path):
    text = LINEAR.replace("{weight: 1}}]", "{weight: [{filter: 'a[0]*', value: 2}, {value: 3}]}}]")
    (here / "kit.yml").write_text(text)
    merges, _ = merges_of(read_documents(here / "kit.yml"), here)
    weight: Any = merges[""].recipe.parameters["weight"]
    assert weight[0] == 1 and weight[1].parts == (("*a[[]0][*]*", 2.0), ("*", 3.0))


# Models of the Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model b as one of the Hub's, in the cache."""
    repository = here / "home" / "hub" / "models--some-one--B.1"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (here / "b").rename(repository / "snapshots" / COMMIT)
    monkeypatch.setenv("HF_HOME", str(here / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return repository


@pytest.mark.parametrize("name", ["some-one/B.1", f"some-one/B.1@{COMMIT}", "some-one/B.1@main"])
def test_a_model_of_the_hub_is_taken_from_the_cache(name: str, hub: Path, here: Path):
    (here / "kit.yml").write_text(LINEAR.replace("model: b", f"model: {name}"))
    done = soup("merge", "--config", "kit.yml", "-o", "out")
    assert done.exit_code == 0, done.output
    made = load_file(here / "out" / "model.safetensors")["lm_head.weight"]
    a, b = (under(f"input/{model}")["lm_head.weight"] for model in "ab")
    np.testing.assert_array_equal(made, (a + b) / 2)
    assert "base_model: [a, some-one/B.1]" in (here / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["some-one/B.2", "some-one/B.1@v2", "../hub/x", "some-one/.."])
def test_a_model_that_is_not_in_the_cache_is_said(name: str, hub: Path, here: Path):
    told = refused(LINEAR.replace("model: b", f"model: {name}"))
    assert f"there is no model {name!r}" in told
    assert told.endswith(f"nor in the cache of Hugging Face ({here / 'home' / 'hub'})")


# What goes along


def test_a_card_names_parents_method_and_configuration(here: Path):
    (here / "a" / "README.md").write_text("---\nlicense: mit\nlicense_link: x\n---\n# a\n")
    (here / "kit.yml").write_text(f"# A `comment`.\n{LINEAR}")
    assert soup("merge", "--config", "kit.yml", "-o", "out").exit_code == 0
    assert (here / "out" / "README.md").read_text() == (
        "---\nbase_model: [a, b]\nlicense: mit\nlicense_link: x\nlibrary_name: transformers\n"
        "tags: [merge, modelsoup]\n---\n\n# out\n\n2 models made one by modelsoup:\n\n- `a`\n"
        "- `b`\n\n## Method\n\n- `linear`: "
        f"{modelsoup.get_method('linear').summary} ({modelsoup.get_method('linear').source})\n\n"
        f"## Configuration\n\n```yaml\n# A `comment`.\n{LINEAR}```\n"
    )


def test_a_card_is_written_where_it_is_asked_for(here: Path):
    options = ["merge", "a", "b", "--method", "ties", "--base", "base", "--set", "weight=1"]
    assert soup(*options, "-o", "plain").exit_code == 0
    assert not (here / "plain" / "README.md").exists()
    assert soup(*options, "-o", "out", "--model-card").exit_code == 0
    card = (here / "out" / "README.md").read_text()
    assert "base_model: [a, b, base]\n" in card and ", over the base `base`:" in card
    assert "\nmethod: ties\nparameters: {weight: 1.0}\n" in card
    (here / "kit.yml").write_text(LINEAR)
    assert soup("merge", "--config", "kit.yml", "-o", "none", "--no-model-card").exit_code == 0
    assert not (here / "none" / "README.md").exists()
    done = soup(*options, "-o", "out.safetensors", "--model-card")
    assert done.exit_code == 1 and "a model card goes into a folder" in done.output


def test_a_configuration_with_a_fence_in_it_stays_within_its_own(here: Path):
    (here / "kit.yml").write_text(f"# ```\n{LINEAR}")
    assert soup("merge", "--config", "kit.yml", "-o", "out").exit_code == 0
    assert f"\n````yaml\n# ```\n{LINEAR}````\n" in (here / "out" / "README.md").read_text()


def tokenizer(folder: Path, *tokens: str) -> None:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"made": folder.name}))


def test_config_and_tokenizer_are_those_of_the_base_and_of_the_model_that_is_named(here: Path):
    for model in ("base", "a", "b"):
        tokenizer(here / model, "x", "y")
        config = {**MADE["config"], "_name": model, "torch_dtype": "bfloat16"}
        (here / model / "config.json").write_text(json.dumps(config))
    text = f"merge_method: task_arithmetic\nbase_model: base\ntokenizer_source: b\n{ONE}"
    (here / "kit.yml").write_text(text + 'chat_template: "{{ x }}"\n')
    assert soup("merge", "--config", "kit.yml", "-o", "out").exit_code == 0
    config = json.loads((here / "out" / "config.json").read_text())
    assert (config["_name"], config["torch_dtype"]) == ("base", "float32")
    assert json.loads((here / "out" / "tokenizer_config.json").read_text()) == {
        "made": "b", "chat_template": "{{ x }}",
    }  # fmt: skip
    assert (here / "out" / "chat_template.jinja").read_text() == "{{ x }}"


def test_a_base_without_a_tokenizer_has_none_to_go_along(here: Path):
    tokenizer(here / "a", "x", "y")
    told = refused(LINEAR.replace("model: b", "model: base") + "tokenizer_source: base\n"
                   "base_model: base")  # fmt: skip
    assert told == "base has no tokenizer: --tokenizer-from MODEL takes another's"


def test_a_plan_that_is_not_mergekits_is_read_as_ours(here: Path):
    (here / "tree.yaml").write_text("# no merge_method here\nsoup: 1\nmodels: {a: a}\ntree: a\n")
    assert read_mergekit(here / "tree.yaml") is None
    assert soup("plan", "tree.yaml").exit_code == 0
    with pytest.raises(PlanError, match="no 'merge_method'"):
        (here / "kit.yml").write_text(LINEAR + "---\nname: x\n")
        read_mergekit(here / "kit.yml")
