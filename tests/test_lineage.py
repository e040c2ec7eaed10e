"""Lineages: what they keep, what a stranger may write into one, and what `verify` makes of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import networkx
import numpy as np
import pytest
import safetensors
from click.testing import CliRunner, Result
from safetensors.numpy import save_file
from trainers import network

import modelsoup
from modelsoup import CheckpointError, ParameterError, PlanError, Recipe, Rule, SoupError, merge
from modelsoup.files.placing import LINEAGE_KEY
from modelsoup.files.yaml_text import dump_yaml, parse_yaml
from modelsoup.merging.recipe import recipe_as_json, recipe_from_mapping
from modelsoup.merging.rules import BASE, parse_layers, rule_as_json
from modelsoup.terminal.cli import main
from modelsoup.terminal.report import report
from modelsoup.trees.plan import check

F32 = np.float32


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abcd"):
        save_file(network(number), tmp_path / f"{name}.safetensors")
    return tmp_path


def run(text: str, name: str = "out", **more: Any) -> Path:
    tree, _ = modelsoup.parse_tree(text)
    report = modelsoup.run(tree, f"{name}.safetensors", store="store", force=True, **more)
    assert report.output is not None
    return report.output


@pytest.mark.parametrize("estimates", ["", ", merge: {estimates: []}"])
def test_a_plan_from_a_lineage_leaves_out_what_was_left_out_and_nothing_else(estimates: str):
    tuned = "{trainer: 'trainers:Estimating', add: 1}"
    output = run(f"soup: 1\nmodels: {{a: a.safetensors, b: b.safetensors}}\n"
                 f"tree: {{of: [a, b]{estimates}, finetune: {tuned}}}\n")  # fmt: skip
    again = run(modelsoup.plan_text(output), "again")
    assert again.read_bytes() == output.read_bytes()
    first, second = (dict(modelsoup.open_checkpoint(f"{n}.safetensors"))["G.high.w"] for n in "ab")
    made = dict(modelsoup.open_checkpoint(output))["G.high.w"]
    assert np.array_equal(made, (first + second) / 2 + 1) == bool(estimates)


def with_lineage(name: str, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    save_file({"x": np.zeros(2, F32)}, name, {LINEAGE_KEY: text})
    return Path(name)


def soup(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --- what they keep ----------------------------------------------------------------------------

NAMED = """soup: 1
models:
  slow: a.safetensors
  fresh: {train: {trainer: "trainers:Add", add: 0.25}, start: c.safetensors}
  tuned: {of: [slow, b], finetune: {trainer: "trainers:Add", add: 1}}
  b: b.safetensors
tree:
  name: final
  of: [{of: [tuned, fresh], name: stage}, {of: [tuned, slow]}]
  merge: {beta: 0.25}
  finetune: {trainer: "trainers:Add", add: 2}
"""


def test_models_keep_the_names_that_their_plan_gave_them() -> None:
    output = run(NAMED)
    graph = modelsoup.lineage_graph(output)
    names = Counter(networkx.get_node_attributes(graph, "name").values())
    assert names == {
        "out.safetensors": 1, "final.merge": 1, "stage": 1, "final.2": 1, "tuned": 1,
        "tuned.merge": 1, "fresh": 1, "slow (a.safetensors)": 1, "b.safetensors": 1,
        "c.safetensors": 1,
    }  # fmt: skip
    shown = soup("inspect", "--lineage", output).stdout
    assert "model.safetensors" not in shown
    assert "stage ← linear  key" in shown
    plan = parse_yaml(modelsoup.plan_text(output), "made").content
    assert plan["models"].keys() == {"slow", "b", "fresh", "tuned", "stage", "final.2"}
    assert plan["models"]["slow"]["path"] == "a.safetensors"
    assert plan["models"]["tuned"]["of"] == ["slow", "b"]
    assert plan["models"]["fresh"]["start"] == "c.safetensors"
    assert plan["tree"]["name"] == "final"


@pytest.mark.parametrize("fuse", [False, True])
def test_a_plan_from_a_lineage_makes_the_same_bytes_names_included(fuse: bool) -> None:
    output = run(NAMED, fuse=fuse)
    again = run(modelsoup.plan_text(output), "again", fuse=not fuse)
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize("start", ["", ", start: c.safetensors"])
@pytest.mark.parametrize("tuned", ["", ', finetune: {trainer: "trainers:Add", add: 3}'])
def test_what_was_only_trained_comes_back_as_a_plan(start: str, tuned: str) -> None:
    leaf = f'{{train: {{trainer: "trainers:Add", add: 2}}{start}}}'
    output = run(f"soup: 1\nmodels: {{x: {leaf}}}\ntree: {{of: [x]{tuned}}}\n")
    again = run(modelsoup.plan_text(output), "again")
    assert again.read_bytes() == output.read_bytes()
    lineage = modelsoup.read_lineage(again)
    assert lineage is not None
    leaf_of = next(iter(lineage.get("ancestors", {"": lineage}).values()))
    assert [entry["name"] for entry in leaf_of["inputs"]] == (["c.safetensors"] if start else [])


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_that_a_trainer_may_have_comes_back(seed: int) -> None:
    tuned = f'{{trainer: "trainers:Add", add: 1, seed: {seed}}}'
    output = run(f"soup: 1\nmodels: {{a: a.safetensors}}\ntree: {{of: [a], finetune: {tuned}}}\n")
    made = parse_yaml(modelsoup.plan_text(output), "made").content
    assert made["tree"] == {
        "of": ["a"], "finetune": {"trainer": "trainers:Add", "add": 1, "seed": seed},
    }  # fmt: skip


def test_a_model_that_is_used_twice_has_one_name_in_lineages() -> None:
    text = "soup: 1\nmodels: {a: a.safetensors, b: b.safetensors, m: {of: [a, b]}}\n"
    output = run(text + "tree: {of: [m, {of: [m, a]}]}\n")
    lineage = modelsoup.read_lineage(output)
    assert lineage is not None
    nodes = [entry["node"] for entry in lineage["inputs"]]
    (inner,) = (made for made in lineage["ancestors"].values() if "key" in made["inputs"][0])
    assert (nodes, [entry["node"] for entry in inner["inputs"]]) == (["m", "root.2"], ["m", "a"])


def test_the_same_pattern_twice_comes_back_as_two_rules() -> None:
    merge_of = {
        "layers": [{"G.*": ["low-level", 0.3]}, {"G.*": "second"}, {"D.*": ["freeze", 0.6]}],
        "groups": {"low-level": ["*.low.*"]},
    }
    text = dump_yaml(
        {"soup": 1, "models": {n: f"{n}.safetensors" for n in "ab"},
         "tree": {"of": ["a", "b"], "merge": merge_of}}
    )  # fmt: skip
    output = run(text)
    a, b, made = (dict(modelsoup.open_checkpoint(f"{n}.safetensors")) for n in ("a", "b", "out"))
    mixed = F32(0.3) * a["G.low.w"] + F32(1 - 0.3) * b["G.low.w"]
    np.testing.assert_allclose(made["G.low.w"], mixed, rtol=1e-6)
    np.testing.assert_array_equal(made["G.high.w"], b["G.high.w"])
    again = run(modelsoup.plan_text(output), "again")
    assert again.read_bytes() == output.read_bytes()


RULES = [
    Rule("disc.*"),
    Rule("re:(a|b)=.*", "keep"),
    Rule("group:x", "keep", 1),
    Rule("x", "keep", 7),
    Rule("y", "keep", BASE),
    Rule("[!d]*", "drop"),
    Rule("*", low_level=True, frozen=True),
    Rule("all", method="ties", parameters={"density": (0.5, 0.25), "normalize": False, "k": 2.0}),
]


def test_rules_come_back_from_their_json_as_they_were() -> None:
    through_json = json.loads(json.dumps([rule_as_json(rule) for rule in RULES]))
    assert parse_layers(through_json) == RULES
    through_yaml = parse_yaml(dump_yaml(through_json), "x").content
    assert list(Recipe(layers=through_yaml).layers) == RULES
    assert recipe_as_json(Recipe(layers=through_yaml))["rules"] == through_json


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"pattern": 3}, "pattern of a layer rule is 3, not a text"),
        ({"pattern": ""}, "pattern of a layer rule is '', not a text"),
        ({"pattern": "x", "action": "mrge"}, "action of a layer rule is 'mrge', not merge, keep"),
        ({"pattern": "x", "source": True}, "source of a layer rule is True, not a model's number"),
        ({"pattern": "x", "source": -2}, "source of a layer rule is -2"),
        ({"pattern": "x", "frozen": "no"}, "frozen of a layer rule is 'no', not true or false"),
        ({"pattern": "x", "low_level": 1}, "low_level of a layer rule is 1"),
        ({"pattern": "x", "method": 1}, "method of a layer rule is 1, not a name"),
        ({"pattern": "x", "parameters": [1]}, r"parameters of a layer rule is \[1\], not a map"),
        ({"pattern": "x", "parameters": {"t": "a b"}}, "parameter 't' has the value"),
        ({"pattern": "x", "parameters": {"t": 10**400}}, "too large for a number"),
        ({"pattern": "x", "frezen": True}, "unknown key 'frezen'; did you mean 'frozen'"),
    ],
)  # fmt: skip
def test_a_rule_of_the_wrong_form_is_told(item: dict[str, Any], said: str) -> None:
    with pytest.raises(modelsoup.RuleError, match=said):
        parse_layers([item])


def test_words_that_look_like_numbers_come_back_as_words() -> None:
    words = [
        "1e5",
        "0x1f",
        "0o7",
        "12",
        "1_0",
        "no",
        "~",
        "",
        "1:30",
        ".inf",
        "-",
        "null",
        "é",
        "=",
    ]
    assert parse_yaml(dump_yaml({word: [word] for word in words}), "x").content == {
        word: [word] for word in words
    }


def test_inspect_tells_all_that_decides() -> None:
    merge(
        ["a.safetensors", "b.safetensors"], "in.safetensors", base="d.safetensors",
        method="task_arithmetic", weights=[0.3, 0.7], seed=5,
        layers=["G.low.*=weight:0.5,2;freeze", "D.*=linear;beta:0.25", "G.*=second"],
    )  # fmt: skip
    merge(
        ["in.safetensors", "c.safetensors"], "out.safetensors", beta=0.5, rest="drop", layers="D.*"
    )
    first, second, *_ = soup("inspect", "--lineage", "out.safetensors").stdout.splitlines()
    assert first == "out.safetensors ← linear, beta 0.5, rest drop, layers D.* → merge"
    for part in (
        "in.safetensors ← task_arithmetic, weights [0.3, 0.7], rest first, seed 5",
        "layers G.low.* → merge; freeze; weight:0.5,2.0", "layers D.* → linear; beta:0.25",
        "layers G.* → second",
    ):  # fmt: skip
        assert part in second


@pytest.mark.parametrize("read", [modelsoup.read_lineage, modelsoup.lineage_graph])
def test_a_lineage_is_read_from_a_path_or_an_open_checkpoint(read: Any) -> None:
    merge(["a.safetensors", "b.safetensors"], "out.safetensors", beta=0.5)
    by_path, opened = read("out.safetensors"), read(modelsoup.open_checkpoint("out.safetensors"))
    if isinstance(by_path, networkx.DiGraph):
        assert networkx.utils.graphs_equal(by_path, opened)
        assert len(by_path) == 3
    else:
        assert by_path == opened
        assert by_path["beta"] == 0.5
    assert modelsoup.plan_text(Path("out.safetensors")).startswith("# What out.safetensors was")
    with pytest.raises(CheckpointError, match=r"did you mean 'out\.safetensors'"):
        read("ou.safetensors")
    with pytest.raises(PlanError, match=r"^a\.safetensors holds no lineage$"):
        modelsoup.plan_text("a.safetensors")


# --- graphs of any size ------------------------------------------------------------------------


def twice_shared(levels: int) -> Path:
    """Each of two models is made of both of the level below: 2^levels ways to the leaves."""
    pair = ["a.safetensors", "b.safetensors"]
    for level in range(levels):
        made = [f"{level}-{number}.safetensors" for number in range(2)]
        for number, name in enumerate(made):
            merge(pair, name, beta=0.25 + 0.5 * number, workers=1, fsync=False)
        pair = made
    return Path(pair[0])


def test_an_ancestor_that_is_shared_is_written_once() -> None:
    top = twice_shared(18)
    start = time.process_time()
    text = modelsoup.plan_text(top)
    models = parse_yaml(text, "made").content["models"]
    assert time.process_time() - start < 5
    assert len(models) == 2 + 2 * 17
    assert len(text) < 5000
    names = list(models)
    for name, model in models.items():  # each after what it is made of
        assert all(names.index(inner) < names.index(name) for inner in model.get("of", ()))
    with pytest.raises(PlanError, match="more than 20,000 nodes"):
        modelsoup.parse_tree(text)


@pytest.mark.parametrize("count", [60, 200])
def test_a_running_average_comes_back_as_a_plan_that_makes_it(count: int, here: Path) -> None:
    average = "a.safetensors"
    for number in range(1, count + 1):
        merge([average, "b.safetensors"], f"{number}.safetensors", beta=0.9, workers=1, fsync=False)
        average = f"{number}.safetensors"
    (here / "made.yaml").write_text(soup("plan", "--from", average).stdout)
    planned = soup("plan", "made.yaml", "--fuse")
    assert planned.exit_code == 0, planned.stderr
    assert f"{count + 1} levels" in planned.stdout
    again = run((here / "made.yaml").read_text(), "again", fuse=True)
    expected = dict(modelsoup.open_checkpoint(average))
    for name, values in modelsoup.open_checkpoint(again).items():
        np.testing.assert_array_equal(values, expected[name])
    assert soup("inspect", "--lineage", average).stdout.count("← linear") == count


# --- what a stranger wrote ---------------------------------------------------------------------


def whole() -> list[dict[str, Any]]:
    """Sound lineages with everything that one may have."""
    for name in "ef":
        Path(name).mkdir(exist_ok=True)
        save_file(network(7), f"{name}/model.safetensors")
    merge(
        ["a.safetensors", "b.safetensors"], "in.safetensors", base="d.safetensors",
        method="task_arithmetic", weights=[0.3, 0.7], groups={"g": ["G.*"]}, dtype="bf16",
        layers=["G.low.*=weight:0.5,2;freeze", "group:g=linear;beta:0.25"], rest="drop",
        on_integer="max", sha256=True, seed=3, parameters={"normalize": True},
    )  # fmt: skip
    merge(["in.safetensors", "c.safetensors"], "made.safetensors", beta=0.5, layers="G.low.*")
    merge(["e", "f"], "folders", beta=0.5, sha256=True, low_level=0.5, layers="low-level")
    made = [modelsoup.read_lineage(path) for path in ("made.safetensors", "folders", run(NAMED))]
    return [content for content in made if content is not None]


DIGEST = "0" * 32
ENTRY = {"name": "a.safetensors", "size": 1, "xxh3_128": DIGEST}
MADE = {"method": "linear", "inputs": [ENTRY]}
TRAINED = {"operation": "finetune", "trainer": "x", "options": {}, "seed": 1, "inputs": [ENTRY]}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: dict[str, tuple[Any, str]] = {
    "nothing": ("", "Expecting value"),
    "very deep": ("[" * 100_000, "nested too deeply|Expecting|nested more"),
    "deep": ({**MADE, "x": deep(200)}, "nested more than 128 deep"),
    "a long number": ('{"format": ' + "1" * 5000 + "}", "not readable"),
    "a list": ([], r"it is \[\], not an object"),
    "another format": ({"format": 2, "inputs": []}, "it has format 2, this version of modelsoup"),
    "no inputs": ({"method": "linear"}, "its inputs are None, not a list"),
    "no input": ({**MADE, "inputs": []}, "a merge has 0 inputs"),
    "two to fine-tune": ({**TRAINED, "inputs": [ENTRY, ENTRY]}, "a finetune has 2 inputs"),
    "two to train": (
        {**TRAINED, "operation": "train", "inputs": [ENTRY, ENTRY]}, "a train has 2 inputs",
    ),
    "an unknown operation": ({**MADE, "operation": "mix"}, "its operation is 'mix', not merge"),
    "a method in a training": ({**TRAINED, "trainer": 3}, "trainer is 3, not a name"),
    "no options": ({**TRAINED, "options": [1]}, r"options is \[1\], not a mapping"),
    "no seed": ({k: v for k, v in TRAINED.items() if k != "seed"}, "it has no seed"),
    "a seed of a training": ({**TRAINED, "seed": -1}, "seed is -1, not an integer from 0"),
    "no method": ({"inputs": [ENTRY]}, "it has no method"),
    "method": ({**MADE, "method": {}}, r"method is \{\}, not a name"),
    "beta": ({**MADE, "beta": "x"}, "beta is 'x', not a number"),
    "a large beta": ({**MADE, "beta": 10**400}, "beta is 1000.*, not a number"),
    "NaN": ({**MADE, "beta": float("nan")}, "beta is nan, not a number"),
    "weights": ({**MADE, "weights": 3}, "weights is 3, not a list of numbers"),
    "true": ({**MADE, "weights": [True]}, r"weights is \[True\], not a list"),
    "parameters": ({**MADE, "parameters": {"t": "a b"}}, "parameters is .*not a mapping to"),
    "rules": ({**MADE, "rules": [3]}, r"rules is \[3\], not a list of rules"),
    "a rule": ({**MADE, "rules": [{"pattern": 3}]}, "pattern of a layer rule is 3"),
    "no pattern": ({**MADE, "rules": [{}]}, "a layer rule has no pattern"),
    "groups": ({**MADE, "groups": {"g": 3}}, "groups is .*not a mapping"),
    "low_level": ({**MADE, "low_level": 0.5}, "low_level is 0.5, not a mapping"),
    "rest": ({**MADE, "rest": 3}, "rest is 3, not a word"),
    "dtype": ({**MADE, "dtype": 3}, "dtype is 3, not a dtype"),
    "seed": ({**MADE, "seed": 1.5}, "seed is 1.5, not an integer"),
    "an input": ({**MADE, "inputs": [3]}, "an input is 3, which has no name"),
    "no name": ({**MADE, "inputs": [{"size": 1}]}, "an input is .*, which has no name"),
    "a name": ({**MADE, "inputs": [{**ENTRY, "name": 3}]}, "name is 3, not a file's name"),
    "up": ({**MADE, "inputs": [{**ENTRY, "name": "../secret"}]}, "'../secret', not a file's name"),
    "absolute": ({**MADE, "inputs": [{**ENTRY, "name": "/etc/hosts"}]}, "'/etc/hosts', not a file"),
    "dots": ({**MADE, "inputs": [{**ENTRY, "name": ".."}]}, r"'\.\.', not a file's name"),
    "NUL": ({**MADE, "inputs": [{**ENTRY, "name": "a\0"}]}, "not a file's name"),
    "a base up": ({**MADE, "base": {**ENTRY, "name": "../x"}}, "'../x', not a file's name"),
    "a base": ({**MADE, "base": []}, r"an input is \[\], which has no name"),
    "no size": ({**MADE, "inputs": [{"name": "a", "xxh3_128": DIGEST}]}, "it has no size"),
    "a size": ({**MADE, "inputs": [{**ENTRY, "size": -1}]}, "size is -1, not a number of bytes"),
    "a size of 65 bits": ({**MADE, "inputs": [{**ENTRY, "size": 2**64}]}, "size is 18446744073"),
    "a seed of 64 bits": ({**TRAINED, "seed": 2**63}, "seed is 9223372036854775808, not an int"),
    "a large size": ({**MADE, "inputs": [{**ENTRY, "size": 10**300}]}, "size is 1000"),
    "no digest": ({**MADE, "inputs": [{"name": "a", "size": 1}]}, "it has no xxh3_128"),
    "a digest": ({**MADE, "inputs": [{**ENTRY, "xxh3_128": "\x9b"}]}, "not 32 hexadecimal digits"),
    "SHA-256": ({**MADE, "inputs": [{**ENTRY, "sha256": "0"}]}, "sha256 is '0', not 64 hexa"),
    "a key": ({**MADE, "inputs": [{"node": "m", "key": 3}]}, "key is 3, not 32"),
    "a lost key": ({**MADE, "inputs": [{"node": "m", "key": DIGEST}]}, "nothing says how 'm' was"),
    "files": ({**MADE, "inputs": [{**ENTRY, "files": [3]}]}, r"files is \[3\], not a list of"),
    "no files": ({**MADE, "inputs": [{**ENTRY, "files": []}]}, r"files is \[\], not a list"),
    "files up": (
        {**MADE, "inputs": [{**ENTRY, "files": [{**ENTRY, "name": "../x"}]}]},
        "name is '../x', not a file within its folder",
    ),
    "files elsewhere": (
        {**MADE, "inputs": [{**ENTRY, "files": [{**ENTRY, "name": "x//y"}]}]}, "not a file within",
    ),
    "ancestors": ({**MADE, "ancestors": 3}, "its ancestors are 3, not an object"),
    "an ancestor": ({**MADE, "ancestors": {DIGEST: 3}}, f"{DIGEST}: it is 3, not an object"),
    "its digest": ({**MADE, "ancestors": {"\x9b2J": MADE}}, "which is no digest"),
    "its rules": (
        {**MADE, "ancestors": {DIGEST: {**MADE, "rules": [{}]}}}, f"{DIGEST}: a layer rule has no",
    ),
    "itself": ({**MADE, "ancestors": {DIGEST: MADE}}, f"{DIGEST} is made of itself"),
    "a circle": (
        {
            **MADE,
            "ancestors": {
                DIGEST: {**MADE, "inputs": [{**ENTRY, "xxh3_128": "1" * 32}]}, "1" * 32: MADE,
            },
        },
        "is made of itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"beta": 0.3},
        {"weights": [1, 2], "rest": "drop", "layers": ["a.*"]},
        {"method": "slerp", "parameters": {"t": {"*x*": {"gradient": [0, 1]}, "*": 0.5}}},
        {"method": "svc", "parameters": {"of": "ties", "density": [0.2, 0.4], "weight": 1}},
        {"layers": ["a\n=*=slerp;t:0.2;freeze", "re:b[=]c=base", "*=drop"], "dtype": "bf16"},
        {
            "renames": ["second:m.*=*", "a[=]b=c"],
            "slices": ["1[0:2]+2[0:2]", "1[2:4]+2[1:3]+base[2:4]"],
        },
        {"groups": {"g": ["a.*", "b"]}, "layers": "group:g", "low_level": {"G*": 0.5}},
        {"files_from": "second", "tokenizer_from": "base", "chat_template": "", "seed": 9},
        {"on_integer": "first", "allow_nonfinite": ["mask*"], "estimates": ["*.u0"]},
    ],
)
def test_a_recipe_is_what_its_json_is_read_as(fields: dict[str, Any]) -> None:
    recipe = Recipe(**fields)
    written = json.loads(json.dumps(recipe_as_json(recipe)))
    assert recipe_as_json(recipe_from_mapping(written, "it")) == written
    again = recipe_from_mapping(written, "it")
    assert again == dataclasses.replace(recipe, method=recipe.method_name)
    with pytest.raises(ParameterError, match="it has 'layers' and 'rules', which are the same"):
        recipe_from_mapping({"rules": [], "layers": []}, "it")


@pytest.mark.parametrize("where", ["method", "rule"])
def test_a_lineage_has_no_module_imported(where: str, tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("open('imported', 'w')")
    name = "evil_module:function"
    content = {**MADE, "method": name}
    if where == "rule":
        content = {**MADE, "rules": [{"pattern": "*", "action": "merge", "method": name}]}
    strange = with_lineage("strange.safetensors", content)
    done = subprocess.run(
        [sys.executable, "-m", "modelsoup", "report", strange, "-o", "report.html"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not Path("imported").exists()
    assert "Traceback" not in done.stderr
    told = Path("report.html").read_text("utf-8") if Path("report.html").exists() else done.stderr
    assert f"the lineage names {name} as a merge method" in told


@pytest.mark.parametrize(("content", "said"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_lineage_is_one_sentence_for_every_reader(content: Any, said: str) -> None:
    strange = with_lineage("strange.safetensors", content)
    for use in (
        modelsoup.read_lineage, modelsoup.lineage_graph, modelsoup.verify, modelsoup.plan_text,
        report, lambda path: merge([path, path], "out.safetensors", beta=0.5),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"strange.*lineage.*(?:{said})") as caught:
            use(strange)
        assert len(caught.value.args) == 1
        assert len(str(caught.value)) < 400
    assert not Path("out.safetensors").exists()


def test_a_checkpoint_with_a_strange_lineage_can_still_be_looked_into() -> None:
    path = with_lineage("strange.safetensors", {"inputs": 3})
    assert "1 tensor, 2 parameters" in soup("inspect", path).stdout
    assert soup("inspect", "--lineage", path).exit_code == 1


def test_verify_looks_at_nothing_outside_of_the_folders(here: Path) -> None:
    inside = here / "inside"
    inside.mkdir()
    for name in ("../a.safetensors", str(here / "a.safetensors")):
        with_lineage("inside/x.safetensors", {**MADE, "inputs": [{**ENTRY, "name": name}]})
        result = soup("verify", inside / "x.safetensors", "--inputs", inside)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "not a file's name" in result.stderr


def test_lineages_that_are_sound_alone_and_not_together_make_no_soup() -> None:
    one, other = ({**ENTRY, "xxh3_128": digit * 32} for digit in "12")
    with_lineage("x.safetensors", {**MADE, "ancestors": {"1" * 32: {**MADE, "inputs": [other]}}})
    with_lineage("y.safetensors", {**MADE, "ancestors": {"2" * 32: {**MADE, "inputs": [one]}}})
    with pytest.raises(CheckpointError, match=r"x\.safetensors, y\.saf.* do not fit: .* of itself"):
        merge(["x.safetensors", "y.safetensors"], "out.safetensors", beta=0.5)
    assert not Path("out.safetensors").exists()


def test_what_a_lineage_says_can_neither_forge_a_line_nor_drive_a_terminal() -> None:
    strange = "x\ninput b.safetensors: unchanged\x9b2J\u202e\r\x07"
    content = {
        **MADE,
        "method": strange, "dtype": strange, "rest": strange, "groups": {strange: [strange]},
        "rules": [{"pattern": strange, "method": strange, "parameters": {strange: 1}}],
        "inputs": [{**ENTRY, "name": strange, "node": strange}],
        "ancestors": {DIGEST: {**TRAINED, "trainer": strange, "options": {strange: strange},
                               "inputs": [{**ENTRY, "name": strange, "xxh3_128": "1" * 32}]}},
    }  # fmt: skip
    path = with_lineage("strange.safetensors", content)
    for arguments in (
        ("inspect", "--lineage"),
        ("inspect", "--lineage", "--json"),
        ("inspect",),
        ("verify",),
        ("verify", "--json"),
        ("plan", "--from"),
    ):
        result = soup(*arguments, path)
        assert result.exit_code == 0, result.stderr
        assert result.stdout
        lines = (result.stdout + result.stderr).split("\n")
        assert all(line.isprintable() for line in lines), arguments
        assert not any(line.startswith("input b.safetensors: unchanged") for line in lines)


STRANGE: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, 10**400, float("inf"), float("nan"), "", "x", "\x9b", "\ud800",
    "..", "/etc/hosts", "a\0b", "x" * 5000, "1" * 32, DIGEST, [], {}, [[]], {"": {}}, [1, "x"],
    {"name": "a"}, ENTRY, MADE, TRAINED, [ENTRY], {DIGEST: MADE}, {"key": DIGEST, "node": "x"},
    "merge", "train", "finetune", "linear", "command", "keep", "drop", "F32", 2**64, deep(30),
]  # fmt: skip
NAMES = (
    "name", "node", "key", "size", "xxh3_128", "sha256", "files", "base", "inputs", "ancestors",
    "method", "trainer", "operation", "options", "seed", "rules", "beta", "format", "new",
)  # fmt: skip


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in plain data with each of its keys or indices."""
    pending = [content]
    while pending:
        value = pending.pop()
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            if isinstance(value[key], dict | list):
                pending.append(value[key])


def drawn(rng: random.Random, sound: list[dict[str, Any]]) -> Any:
    """A sound lineage, changed in one to three places."""
    content = [copy.deepcopy(rng.choice(sound))]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value, key = rng.choice(list(places(content)))
        match rng.randrange(5):
            case 0 | 1:
                value[key] = copy.deepcopy(rng.choice(STRANGE))
            case 2 if isinstance(value, dict):
                value[rng.choice(NAMES)] = copy.deepcopy(rng.choice(STRANGE))
            case 3 if value is not content:
                del value[key]
            case _:
                value[key] = copy.deepcopy(rng.choice(rng.choice(list(places(content)))[:1]))
    return content[0]


@pytest.mark.parametrize(
    "count",
    [1000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_no_lineage_ends_in_a_traceback(count: int) -> None:
    sound = whole()
    seen: Counter[str] = Counter()
    for seed in range(count):
        rng = random.Random(seed)
        content = drawn(rng, sound)
        path = with_lineage("strange.safetensors", json.dumps(content))
        try:
            modelsoup.read_lineage(path)
            seen["read"] += 1
        except CheckpointError:
            seen["refused"] += 1
        try:
            uses = (modelsoup.verify, modelsoup.lineage_graph, modelsoup.plan_text, report)
            for use in uses if rng.random() < 0.9 else (lambda p: merge([p, p], "o", force=True),):
                try:
                    made = use(path)
                    if use is modelsoup.plan_text:
                        check(modelsoup.parse_tree(made)[0])
                except SoupError as error:
                    assert error.args
            if rng.random() < 0.1:
                for arguments in (("inspect", "--lineage"), ("inspect", "--lineage", "--json")):
                    lines = soup(*arguments, path).stdout.split("\n")
                    assert all(line.isprintable() for line in lines)
        except BaseException as error:
            error.add_note(f"seed {seed}: {json.dumps(content)[:3000]}")
            raise
    assert min(seen["read"], seen["refused"]) > count / 10


# --- what verify makes of them -----------------------------------------------------------------


def falsified(path: Path, change: Any) -> None:
    """Rewrite a checkpoint's lineage."""
    with safetensors.safe_open(path, "np") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    lineage = json.loads(metadata[LINEAGE_KEY])
    change(lineage)
    save_file(tensors, path, {**metadata, LINEAGE_KEY: json.dumps(lineage)})


@pytest.mark.parametrize("algorithm", ["size", "xxh3_128", "sha256"])
@pytest.mark.parametrize("which", [0, 1, 2, "base"])
def test_whatever_is_recorded_of_an_input_is_compared(algorithm: str, which: Any) -> None:
    names = [f"{name}.safetensors" for name in "abc"]
    merge(
        names, "out.safetensors", base="d.safetensors", method="task_arithmetic", weights=[1, 1, 1],
        sha256=True,
    )  # fmt: skip
    assert [check.intact for check in modelsoup.verify("out.safetensors").inputs] == [True] * 4

    def change(lineage: dict[str, Any]) -> None:
        entry = lineage["base"] if which == "base" else lineage["inputs"][which]
        value = entry[algorithm]
        entry[algorithm] = (
            value + 1 if algorithm == "size" else f"{int(value[0], 16) ^ 1:x}{value[1:]}"
        )

    falsified(Path("out.safetensors"), change)
    report = modelsoup.verify("out.safetensors")
    changed = "d.safetensors" if which == "base" else names[which]
    assert [check.name for check in report.changed] == [changed]
    assert report.sound
    assert report.as_json()["changed"] == [changed]


@pytest.mark.parametrize("algorithm", ["size", "xxh3_128", "sha256"])
@pytest.mark.parametrize("of", ["folder", "first file", "last file"])
def test_whatever_is_recorded_of_a_folder_is_compared(algorithm: str, of: str) -> None:
    big = {f"w{n}": np.full(300, n, F32) for n in range(3)}
    for name in ("e", "f", "g"):
        save_file(big, f"{name}.safetensors")
        merge([f"{name}.safetensors"] * 2, name, beta=0.5, shard_size=1300)
    merge(["e", "f", "g"], "out.safetensors", sha256=True)

    def change(lineage: dict[str, Any]) -> None:
        entry = lineage["inputs"][2]
        assert len(entry["files"]) == 3
        part = {"folder": entry, "first file": entry["files"][0], "last file": entry["files"][-1]}[
            of
        ]
        value = part[algorithm]
        part[algorithm] = (
            value + 1 if algorithm == "size" else f"{int(value[0], 16) ^ 1:x}{value[1:]}"
        )

    falsified(Path("out.safetensors"), change)
    assert [check.intact for check in modelsoup.verify("out.safetensors").inputs] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("dtype", [F32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_verify_looks_at_the_last_element_of_a_large_tensor(dtype: Any, value: str) -> None:
    values = np.ones((3, 1_000_001), dtype)  # several of the pieces that it reads
    save_file({"first": np.ones(3, dtype), "large": values}, "x.safetensors")
    assert modelsoup.verify("x.safetensors").sound
    values[-1, -1] = float(value)
    save_file({"first": np.ones(3, dtype), "large": values}, "x.safetensors")
    report = modelsoup.verify("x.safetensors")
    assert report.nonfinite == (("large", 1),)
    assert not report.sound


def test_infinity_that_a_merge_was_allowed_to_make_is_sound_as_long_as_it_is_what_it_made() -> None:
    mask = np.triu(np.full((4, 4), -np.inf, F32), 1)
    for name in "ab":
        save_file({**network(3), "mask": mask}, f"{name}.safetensors")
    merge(["a.safetensors", "b.safetensors"], "out.safetensors", layers=["mask=first", "*=0.5"])
    report = modelsoup.verify("out.safetensors")
    assert (report.sound, report.nonfinite) == (True, (("mask", 6),))
    assert "  mask: 6 elements, as it was made" in soup("verify", "out.safetensors").stdout

    def change(lineage: dict[str, Any]) -> None:
        lineage["nonfinite"] = {"mask": 5, "D.low.w": 1}

    falsified(Path("out.safetensors"), change)
    assert not modelsoup.verify("out.safetensors").sound
    result = soup("verify", "out.safetensors")
    assert result.exit_code == 1
    assert "  mask: 6 elements, made with 5" in result.stdout
    assert "  D.low.w: 0 elements, made with 1" in result.stdout
    assert result.stderr == "Error: out.safetensors is not sound\n"


def test_an_input_that_is_gone_is_said_to_be_so_and_is_no_fault() -> None:
    merge(["a.safetensors", "b.safetensors"], "out.safetensors", beta=0.5)
    Path("b.safetensors").unlink()
    report = modelsoup.verify(modelsoup.open_checkpoint("out.safetensors"))
    assert report.sound and not report.changed
    assert [(check["found"], check["intact"]) for check in report.as_json()["inputs"]] == [
        (str(Path.cwd() / "a.safetensors"), True), (None, None),
    ]  # fmt: skip


def test_an_input_that_changed_is_no_fault_of_the_checkpoint() -> None:
    merge(["a.safetensors", "b.safetensors"], "out.safetensors", beta=0.5)
    save_file(network(9), "b.safetensors")
    result = soup("verify", "out.safetensors")
    assert result.exit_code == 1
    assert "b.safetensors: CHANGED since it was read" in result.stdout
    (said,) = result.stderr.splitlines()
    assert said.startswith("Error: no longer what went into out.safetensors: ")
    assert said.endswith("b.safetensors; out.safetensors itself is sound")
    content = json.loads(soup("verify", "out.safetensors", "--json").stdout)
    assert (content["sound"], content["changed"]) == (True, ["b.safetensors"])


def test_inputs_are_looked_for_in_folders_that_are_there(here: Path) -> None:
    merge(["a.safetensors", "b.safetensors"], "out.safetensors", beta=0.5)
    (here / "inputs").mkdir()
    for folder, said in {
        "no/where": "the folder no/where of the inputs does not exist",
        "input": "the folder input of the inputs does not exist; did you mean 'inputs'",
        "a.safetensors": "the folder a.safetensors of the inputs is no folder",
    }.items():
        with pytest.raises(ParameterError, match=said):
            modelsoup.verify("out.safetensors", folders=["inputs", folder])
        result = soup("verify", "out.safetensors", "--inputs", folder)
        assert result.exit_code == 1
        assert said in result.stderr


def test_of_two_inputs_of_one_name_the_other_is_not_a_changed_one(tmp_path: Path) -> None:
    paths = []
    for seed, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "m.safetensors")
        save_file(network(seed), paths[-1])
    made = merge(paths, tmp_path / "o.safetensors").output
    assert made is not None
    checks = modelsoup.verify(made, folders=[tmp_path / "one"]).inputs
    assert [(c.found, c.intact) for c in checks] == [(paths[0], True), (None, None)]
    save_file(network(3), paths[0])
    checks = modelsoup.verify(made, folders=[tmp_path / "one"]).inputs
    assert [c.intact for c in checks] == [False, False]
