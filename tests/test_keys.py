"""What a result is named by: all that decides its bytes, and nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainers
from safetensors.numpy import save_file

import modelsoup
from modelsoup import FineTune, Load, Merge, Recipe, Rule, Store, Train, Training, Tree, check
from modelsoup.merging.methods import code_version, get_method
from modelsoup.trees.operations import Builder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abcd"):
        save_file(trainers.network(number), f"{name}.safetensors")
    Path("folder").mkdir()
    save_file(trainers.network(7), "folder/model.safetensors")
    Path("folder/config.json").write_text("{}")
    Path("train.py").write_text("print(1)")
    Path("data.csv").write_text("1,2")
    return tmp_path


def keys(tree: Tree) -> dict[str, str]:
    """The key of every node, with what the files hold now."""
    store = Store("store")
    plan = check(tree, digest=store.digest_now, contents=store.contents_now)
    assert plan.problems == ()
    found = {name: node.key for name, node in plan.nodes.items()}
    assert None not in found.values()
    return {name: str(key) for name, key in found.items()}


def two(merge: Merge, *, seed: int = 0, first: str = "a.safetensors") -> Tree:
    builder = Builder(seed)
    inputs = [builder.add("a", Load(Path(first))), builder.add("b", Load(Path("b.safetensors")))]
    builder.add("root", merge, inputs)
    return builder.tree("root")


def trained(training: Training, *, seed: int = 0, start: str | None = None) -> Tree:
    builder = Builder(seed)
    path = None if start is None else Path(start)
    builder.add("leaf", Train(training, path))
    builder.add("root", FineTune(training), ["leaf"])
    return builder.tree("root")


# Recipes

BASED = {"method": "dare_linear", "weights": [1, 2]}
LOW = {"layers": ["low-level"], "low_level": 0.25}
RECIPES: dict[str, tuple[dict[str, Any], Any]] = {  # field → a recipe, and another value
    "method": (BASED, "dare_ties"),
    "beta": ({"beta": 0.5}, 0.25),
    "weights": (BASED, [1, 3]),
    "parameters": ({**BASED, "parameters": {"density": 0.5}}, {"density": 0.25}),
    "layers": ({"layers": ["D.*"]}, ["D.low.*"]),
    "rest": ({"layers": ["D.*"], "rest": "first"}, "drop"),
    "groups": ({"layers": ["group:g"], "groups": {"g": ["D.*"]}}, {"g": ["G.*"]}),
    "low_level": (LOW, 0.75),
    "renames": ({"renames": ["D.*=E.*"]}, ["D.*=F.*"]),
    "slices": (
        {"renames": ["D.*=D.h.0.*"], "slices": ["1[0:1]+2[0:1]"]},
        ["2[0:1]+1[0:1]"],
    ),
    "files_from": ({"files_from": "first"}, "second"),
    "tokenizer_from": ({"tokenizer_from": "first"}, "second"),
    "chat_template": ({"chat_template": "{{ 1 }}"}, "{{ 2 }}"),
    "dtype": ({"dtype": "f32"}, "f16"),
    "seed": (BASED, 2),
    "on_integer": ({}, "first"),
    "allow_nonfinite": ({"allow_nonfinite": ["D.*"]}, ["G.*"]),
    "estimates": ({}, ["D.*"]),
}


def test_every_field_of_a_recipe_is_part_of_a_key() -> None:
    assert RECIPES.keys() == {field.name for field in dataclasses.fields(Recipe)}
    for name, (given, other) in RECIPES.items():
        base = Path("d.safetensors") if given is BASED or "density" in str(given) else None
        before, after = (
            keys(two(Merge(Recipe(**{**given, **change}), base))) for change in ({}, {name: other})
        )
        assert {node for node in before if before[node] != after[node]} == {"root"}, name


RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "pattern": ({"pattern": "D.*"}, "G.*"),
    "action": ({"pattern": "D.*"}, "drop"),
    "source": ({"pattern": "D.*", "action": "keep"}, 1),
    "low_level": ({"pattern": "*"}, True),
    "frozen": ({"pattern": "D.*"}, True),
    "method": ({"pattern": "D.*"}, "linear"),
    "parameters": ({"pattern": "D.*", "parameters": {"beta": 0.5}}, {"beta": 0.25}),
}


def test_every_field_of_a_rule_is_part_of_a_key() -> None:
    assert RULES.keys() == {field.name for field in dataclasses.fields(Rule)}
    groups = {"low-level": ["*.low.*"]}
    for name, (given, other) in RULES.items():
        rules = [Rule(**{**given, **change}) for change in ({}, {name: other})]
        before, after = (
            keys(two(Merge(Recipe(layers=[rule], rest="first", groups=groups))))["root"]
            for rule in rules
        )
        assert before != after, name


def test_the_order_of_rules_and_of_models_is_part_of_a_key() -> None:
    rules = [Rule("D.*"), Rule("*.low.*", "keep")]
    made = [
        keys(two(Merge(Recipe(layers=order, rest="first"))))["root"]
        for order in (rules, rules[::-1])
    ]
    builder = Builder()
    inputs = [builder.add(n, Load(Path(f"{n}.safetensors"))) for n in "ba"]
    builder.add("root", Merge(Recipe(layers=rules, rest="first")), inputs)
    assert len({*made, keys(builder.tree("root"))["root"]}) == 3


def test_the_content_of_whatever_a_node_reads_is_part_of_its_key() -> None:
    based = Recipe(method="task_arithmetic", weights=[1, 1])
    files: dict[str, tuple[str, Tree, str]] = {
        "a leaf": ("a.safetensors", two(Merge()), "a"),
        "a base": ("d.safetensors", two(Merge(based, Path("d.safetensors"))), "root"),
        "a start": (
            "c.safetensors", trained(Training("trainers:Add"), start="c.safetensors"), "leaf",
        ),
    }  # fmt: skip
    for name, (file, tree, node) in files.items():
        before = keys(tree)
        save_file(trainers.network(50), file)
        after = keys(tree)
        changed = {n for n in before if before[n] != after[n]}
        assert changed == {node, "root"}, name
        Path(file).rename(f"moved-{file}")
        Path(f"moved-{file}").rename(file)
        assert keys(tree) == after  # neither its place nor its time


def test_a_folders_config_is_part_of_a_key_and_its_model_card_is_not() -> None:
    for tree in (
        two(Merge(), first="folder"), trained(Training("trainers:Add"), start="folder"),
    ):  # fmt: skip
        before = keys(tree)
        Path("folder/README.md").write_text(str(id(tree)))
        assert keys(tree) == before
        Path("folder/config.json").write_text(json.dumps({"made": id(tree)}))
        assert keys(tree)["root"] != before["root"]


@pytest.mark.parametrize("field", ["files_from", "tokenizer_from"])
def test_a_bases_config_and_tokenizer_are_part_of_a_key_where_they_go_along(field: str) -> None:
    """A result with the old tokenizer was once taken from the store."""
    given: dict[str, Any] = {"method": "task_arithmetic", "weights": [1, 1]}
    along, alone = (
        two(Merge(Recipe(**given, **more), Path("folder"))) for more in ({field: "base"}, {})
    )
    before = keys(along), keys(alone)
    Path("folder/tokenizer_config.json").write_text('{"made": 1}')
    assert keys(along)["root"] != before[0]["root"]
    assert keys(alone) == before[1]


def test_an_empty_chat_template_is_part_of_a_key_and_none_is_not() -> None:
    empty, none = (keys(two(Merge(Recipe(chat_template=text)))) for text in ("", None))
    assert empty["root"] != none["root"]
    assert none == keys(two(Merge()))


# Trainings

TRAINING = Training("trainers:Add", {"add": 1.0}, {"gpus": 1}, 5, Path())
OTHER_TRAININGS = {
    "trainer": dataclasses.replace(TRAINING, trainer="trainers:Plain"),
    "options": dataclasses.replace(TRAINING, options={"add": 2.0}),
    "seed": dataclasses.replace(TRAINING, seed=6),
}
NOT_PART = {
    "resources": dataclasses.replace(TRAINING, resources={"gpus": 2}),
    "folder": dataclasses.replace(TRAINING, folder=Path("folder")),
}


def test_every_field_of_a_training_is_part_of_a_key_but_where_and_with_what_it_runs() -> None:
    every = {field.name for field in dataclasses.fields(Training)}
    assert OTHER_TRAININGS.keys() | NOT_PART.keys() == every
    before = keys(trained(TRAINING))
    for name, training in OTHER_TRAININGS.items():
        after = keys(trained(training))
        assert all(before[node] != after[node] for node in before), name
    for name, training in NOT_PART.items():
        assert keys(trained(training)) == before, name


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(trainers.Options)])
def test_every_option_of_a_trainer_is_part_of_a_key(option: str) -> None:
    other = {"add": 7.0, "steps": 7, "pause": 7.0, "note": "7"}[option]
    after = keys(trained(dataclasses.replace(TRAINING, options={"add": 1.0, option: other})))
    assert all(key != after[node] for node, key in keys(trained(TRAINING)).items())


def test_a_trainers_version_is_part_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [keys(trained(TRAINING))["root"]]
    for version in ("1", "2"):
        monkeypatch.setattr(trainers.Add, "version", version, raising=False)
        found.append(keys(trained(TRAINING))["root"])
    assert len(set(found)) == 3


def test_a_plans_seed_is_part_of_a_key_where_a_seed_is_derived_from_it() -> None:
    derived = dataclasses.replace(TRAINING, seed=None)
    assert keys(trained(TRAINING, seed=1)) == keys(trained(TRAINING, seed=2))
    one, other = (keys(trained(derived, seed=seed)) for seed in (1, 2))
    assert all(one[node] != other[node] for node in one)
    assert keys(two(Merge(), seed=1)) == keys(two(Merge(), seed=2))


COMMAND: dict[str, Any] = {
    "command": ["python", "train.py", "{output}"], "env": {"A": "1"}, "files": ["data.csv"],
    "timeout": 5, "folder": ".",
}  # fmt: skip


def of_command(**change: Any) -> str:
    return keys(trained(Training("command", {**COMMAND, **change}, seed=5)))["root"]


def test_a_commands_words_environment_and_files_are_part_of_a_key_and_its_patience_is_not() -> None:
    from modelsoup.trees.trainer import CommandOptions

    assert COMMAND.keys() == {field.name for field in dataclasses.fields(CommandOptions)}
    before = of_command()
    assert of_command(timeout=6) == before
    assert of_command(folder=str(Path.cwd())) == before
    changed = [
        of_command(command=["python", "-u", "train.py", "{output}"]), of_command(env={"A": "2"}),
        of_command(env={}), of_command(files=[]),
    ]  # fmt: skip
    for file in ("train.py", "data.csv"):
        Path(file).write_text("other")
        changed.append(of_command())
    assert len({before, *changed}) == 7


# The code of a merge method

METHOD = """
import modelsoup
import helping_method

@modelsoup.method(NAME, models=(2, 2), from_beta=helping_method.from_beta, VERSION)
def mix(x, share=modelsoup.parameter(0.5, low=0, high=1)):
    return modelsoup.WeightedSum((share, 1 - share))
"""


@pytest.fixture
def write(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes, or edits, the module of a third party's method, and imports it again."""
    monkeypatch.syspath_prepend(here)
    from modelsoup.merging.methods import registry

    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    def write(text: str, *, version: str = "", helper: str = "") -> str:
        text = text.replace("NAME", '"strange_mix"')
        text = text.replace(", VERSION", f', version="{version}"' if version else "")
        Path("helping_method.py").write_text(f"{helper}\ndef from_beta(b):\n    return {{}}\n")
        Path("strange_method.py").write_text(text)
        for name in ("strange_method", "helping_method"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        importlib.import_module("strange_method")
        return keys(two(Merge(Recipe(method="strange_mix"))))["root"]

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


def test_an_edited_method_makes_its_results_again(write: Callable[..., str]) -> None:
    first = write(METHOD)
    assert write(METHOD) == first
    assert write(METHOD.replace("0.5", "0.25")) != first
    assert write(METHOD, helper="# of another module that defines a part of it") != first
    assert write(METHOD) == first


def test_a_method_with_a_version_is_named_by_that_alone(write: Callable[..., str]) -> None:
    first = write(METHOD, version="1")
    assert write(METHOD.replace("(share, 1 - share)", "[share, 1 - share]"), version="1") == first
    assert write(METHOD, version="2") != first


def test_a_method_that_a_rule_names_is_part_of_a_key(write: Callable[..., str]) -> None:
    def key() -> str:
        return keys(two(Merge(Recipe(layers=["D.*=strange_mix", "*=0.5"]))))["root"]

    write(METHOD, version="1")
    first = key()
    write(METHOD, version="2")
    assert key() != first


def test_a_method_that_another_goes_on_from_is_part_of_a_key() -> None:
    from modelsoup.merging.recipe import methods_of

    assert methods_of(Recipe(method="svc", parameters={"of": "ties"})) == ["svc", "ties"]
    assert "svc" in methods_of(Recipe(layers=["D.*=svc", "*=0.5"]))
    inner = get_method("svc").parameters["of"].default
    assert methods_of(Recipe(layers=["D.*=svc", "*=0.5"])) == sorted({"linear", "svc", inner})


def test_a_method_without_a_text_asks_for_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dataclasses.replace(get_method("linear"), version="", name="typed")
    monkeypatch.delattr(sys.modules["modelsoup.merging.methods.averages"], "__file__")
    with pytest.raises(modelsoup.ParameterError, match="'typed' has no version, and the text of"):
        code_version(made)


def test_every_method_of_ours_has_a_version() -> None:
    names = ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
    assert {code_version(get_method(name)) for name in names} == {"1"}


def test_a_run_makes_again_what_an_edited_method_made(write: Callable[..., str]) -> None:
    def run() -> tuple[tuple[str, ...], np.ndarray]:
        report = modelsoup.run(
            two(Merge(Recipe(method="strange_mix"))), "out.safetensors", store="store", force=True
        )
        return report.computed, modelsoup.open_checkpoint("out.safetensors")["D.high.w"]

    write(METHOD)
    a, b = (modelsoup.open_checkpoint(f"{n}.safetensors")["D.high.w"] for n in "ab")
    np.testing.assert_allclose(run()[1], 0.5 * a + 0.5 * b, rtol=1e-6)
    assert run()[0] == ()
    write(METHOD.replace("0.5", "0.25"))
    computed, made = run()
    assert computed == ("root",)
    np.testing.assert_allclose(made, 0.25 * a + 0.75 * b, rtol=1e-6)
