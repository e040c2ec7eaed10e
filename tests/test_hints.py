"""Hints, followed to the letter, do what was wanted; what rules leave unsaid is as one expects."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup import MismatchError, ParameterError, Recipe, Rule, RuleError, SoupError, merge
from modelsoup.errors import speaking
from modelsoup.merging.rules import assign, covering, parse_rule
from modelsoup.terminal.cli import main

F32 = np.float32


def save(path: Path, kind: Any = F32, **values: float) -> Path:
    """A tensor of two elements for each name; `__` stands for a dot."""
    tensors = {name.replace("__", "."): np.full(2, v, kind) for name, v in values.items()}
    save_file(tensors, path)
    return path


def named(path: Path, names: list[str], value: float) -> Path:
    save_file({name: np.full(2, value, F32) for name in names}, path)
    return path


def soup(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


# Names with everything that a shell, a glob, a rule or YAML gives a meaning to.
ODD = ["model_ema.decay", "a [b]", "it's", "x=y", "x=first", "re:(a)", "group:g", "all", " lead",
       "trail ", "a*b", "a?b", "a;b", '"q"', "$HOME", "`id`", "{a: b}", "low-level",
       "ü.日"]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("what", ["first", "drop"])
def test_the_hint_for_a_missing_tensor_keeps_or_drops_it_and_merges_the_rest(
    odd: str, what: str, tmp_path: Path
):
    """It once turned the whole merge into a copy of the first model, with exit code 0."""
    a = named(tmp_path / "a.safetensors", ["x.w", odd, "x.b"], 1)
    b = named(tmp_path / "b.safetensors", ["x.w", "x.b"], 3)
    options = ("merge", a, b, "--beta", 0.25, "-o", tmp_path / "out.safetensors", "--strict")
    refused = soup(*options)
    assert refused.exit_code == 1
    hint = re.search(r"\(keep them with (--layers '.*=first'), or '=drop'\)", refused.output)
    assert hint is not None
    words = [re.sub("=first$", f"={what}", word) for word in shlex.split(hint[1])]
    done = soup(*options, *words)
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "out.safetensors")
    assert {name: t[0] for name, t in found.items()} == {
        "x.w": 2.5, "x.b": 2.5, **({odd: 1.0} if what == "first" else {}),
    }  # fmt: skip


def test_the_hint_of_the_library_is_python(tmp_path: Path):
    a = save(tmp_path / "a.safetensors", x=1, ema__x=1, ema__y=1)
    b = save(tmp_path / "b.safetensors", x=3)
    with pytest.raises(MismatchError) as caught:
        merge([a, b], tmp_path / "out.safetensors")
    hint = re.search(r"\(keep them with (layers=\[.*\]), or", str(caught.value))
    assert hint is not None
    options: dict[str, Any] = eval(f"dict({hint[1]})")
    merge([a, b], tmp_path / "out.safetensors", **options)
    found = load_file(tmp_path / "out.safetensors")
    assert {name: t[0] for name, t in found.items()} == {"x": 2, "ema.x": 1, "ema.y": 1}
    for call in (lambda: merge([a, a], a), lambda: merge([a, a], tmp_path / "out.safetensors")):
        with pytest.raises(SoupError) as refused:
            call()
        assert "--" not in str(refused.value)


def test_the_hint_of_a_plan_is_yaml(tmp_path: Path):
    save(tmp_path / "a.safetensors", x=1, ema__x=1)
    save(tmp_path / "b.safetensors", x=3)
    plan: dict[str, Any] = {
        "soup": 1, "models": {"a": "a.safetensors", "b": "b.safetensors"},
        "tree": {"of": ["a", "b"]},
    }  # fmt: skip
    (tmp_path / "tree.yaml").write_text(yaml.safe_dump(plan))
    refused = soup("plan", tmp_path / "tree.yaml")
    assert refused.exit_code == 1
    hint = re.search(r"\(keep them with (layers: \{.*?\}), or", refused.output)
    assert hint is not None, refused.output
    plan["tree"]["merge"] = yaml.safe_load(hint[1])
    (tmp_path / "tree.yaml").write_text(yaml.safe_dump(plan))
    out = tmp_path / "out.safetensors"
    done = soup("run", tmp_path / "tree.yaml", "-o", out, "--store", tmp_path / "store")
    assert done.exit_code == 0, done.output
    assert {n: t[0] for n, t in load_file(out).items()} == {"x": 2, "ema.x": 1}


def test_one_hint_covers_all_that_is_missing(tmp_path: Path):
    names = [f"blocks.{n}.w" for n in range(40)]
    ema = [f"ema.{name}" for name in names]
    counters = [f"{name}.num_updates" for name in names]
    for extra, expected in ((ema, "'ema.*=first'"), (counters, "'*.num_updates=first'")):
        a = named(tmp_path / "a.safetensors", names + extra, 1)
        b = named(tmp_path / "b.safetensors", names, 3)
        with pytest.raises(MismatchError) as caught, speaking("command"):
            merge([a, b], tmp_path / "out.safetensors")
        assert f"(keep them with --layers {expected}, or '=drop')" in str(caught.value)


def test_a_hint_goes_before_rules_that_are_there(tmp_path: Path):
    a = save(tmp_path / "a.safetensors", disc__w=1, disc__ema=1, gen__w=1)
    b = save(tmp_path / "b.safetensors", disc__w=3, gen__w=3)
    refused = soup("merge", a, b, "--layers", "disc.*=0.25", "-o", tmp_path / "out.safetensors")
    assert "--layers 'disc.ema=first', or '=drop' before your other rules" in refused.output
    done = soup(
        "merge", a, b, "--layers", "disc.ema=first", "--layers", "disc.*=0.25",
        "-o", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert done.exit_code == 0
    found = load_file(tmp_path / "out.safetensors")
    assert {n: t[0] for n, t in found.items()} == {"disc.w": 2.5, "disc.ema": 1, "gen.w": 1}


def test_a_hint_for_integers_and_one_for_a_merge_say_what_becomes_of_the_rules(tmp_path: Path):
    for name, last in (("a", 2), ("b", 3)):
        tensors = {"ids": np.array([1, last]), "w": np.full(2, last, F32)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    models, out = [tmp_path / f"{n}.safetensors" for n in "ab"], tmp_path / "out.safetensors"
    with pytest.raises(MismatchError, match=r"'=drop' before your other rules\)$"):
        merge(models, out, layers=["*=0.25"])
    merge(models, out, layers=["ids=first", "*=0.25"])
    assert load_file(out)["w"][0] == 2.75
    place = re.escape("or '=drop' in place of 'ids → merge' and before your other rules)")
    with pytest.raises(MismatchError, match=f"{place}$"):
        merge(models, out, layers=["ids", "w=0.25"], force=True)
    for layers, said, instead in (
        (["*=first"], "layers=['*=merge'] in place of '* → first' does", {"layers": ["*=merge"]}),
        (["ids=first"], "rest='merge' merges those that no rule matches",
         {"layers": ["ids=first"], "rest": "merge"}),
    ):  # fmt: skip
        with pytest.raises(ParameterError) as caught:
            merge(models, out, layers=layers, rest="first", beta=0.25, force=True)
        assert said in str(caught.value)
        merge(models, out, beta=0.25, on_integer="first", force=True, **instead)
        assert load_file(out)["w"][0] == 2.75


def test_a_hint_leaves_the_rest_as_it_was_meant(tmp_path: Path):
    """Rules that only keep have the rest merged, and rules that merge do not."""
    a, b = (named(tmp_path / f"{n}.safetensors", ["y", *["x"] * (n == 1)], n) for n in (1, 3))
    for options, said, y in (
        ({"layers": ["x=0.5"]}, "layers=['x=first'], rest='first', or", 1),
        ({"rest": "drop"}, "layers=['x=first'], rest='merge', or", 2),
        ({"layers": ["x=0.5"], "rest": "second"}, "layers=['x=first'], or", 3),
    ):
        with pytest.raises(MismatchError) as caught:
            merge([a, b], tmp_path / "out.safetensors", **options)
        hint = re.search(r"keep them with (.*), or", str(caught.value))
        assert hint is not None and said in str(caught.value)
        followed = options | eval(f"dict({hint[1]})")
        merge([a, b], tmp_path / "out.safetensors", force=True, **followed)
        found = load_file(tmp_path / "out.safetensors")
        assert {n: t[0] for n, t in found.items()} == {"x": 1, "y": y}


def test_what_is_not_printable_is_a_wildcard_in_a_hint(tmp_path: Path):
    """Spelt out, as it is shown, it would match nothing."""
    a, b = (named(tmp_path / f"{n}.safetensors", ["y", *["n\nl"] * (n == 1)], n) for n in (1, 3))
    refused = soup("merge", a, b, "-o", tmp_path / "out.safetensors")
    assert "--layers 'n?l=first'" in refused.output
    done = soup("merge", a, b, "-o", tmp_path / "out.safetensors", "--layers", "n?l=first")
    assert done.exit_code == 0, done.output
    assert load_file(tmp_path / "out.safetensors")["n\nl"][0] == 1


def test_a_third_model_that_alone_differs_is_noticed(tmp_path: Path):
    """Every check of two models holds for a third."""
    alike = [save(tmp_path / f"{n}.safetensors", x=n, y=n) for n in (1, 2)]
    shapes, dtypes, integers = (tmp_path / f"{n}.safetensors" for n in ("shape", "dtype", "ids"))
    save_file({"x": np.ones(3, F32), "y": np.ones(2, F32)}, shapes)
    save_file({"x": np.ones(2, np.int32), "y": np.ones(2, F32)}, dtypes)
    for third, said in (
        (save(tmp_path / "3.safetensors", x=3), "missing from 3.safetensors, model 3: y"),
        (shapes, "different shapes: x ([2] and [2] and [3])"),
        (dtypes, "different dtypes, which cannot be merged: x (F32 and F32 and I32)"),
    ):
        with pytest.raises(MismatchError) as caught:
            merge([*alike, third], tmp_path / "out.safetensors")
        assert said in str(caught.value)
    for path, last in zip((*alike, integers), (0, 0, 1), strict=True):
        save_file({"ids": np.array([0, 0, last]), "w": np.ones(2, F32)}, path)
    with pytest.raises(MismatchError, match=r"differs between the models: ids \(I64\)"):
        merge([*alike, integers], tmp_path / "out.safetensors")
    merge([*alike, integers], tmp_path / "out.safetensors", on_integer="max")
    assert load_file(tmp_path / "out.safetensors")["ids"].tolist() == [0, 0, 1]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_patterns_of_a_hint_match_just_the_names_that_they_are_for(data: st.DataObject):
    part = st.text("ab[]*?=;: '.", min_size=1, max_size=3)
    name = st.lists(part, min_size=1, max_size=4).map(".".join)
    every = data.draw(st.lists(name, min_size=1, max_size=8, unique=True))
    wanted = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    rules = [parse_rule(f"{pattern}=first") for pattern in covering(wanted, every)]
    chosen = assign(every, rules, rest="drop").chosen
    assert {name for name, rule in chosen.items() if rule < len(rules)} == set(wanted)


# What is meant by the rest


@pytest.mark.parametrize(
    ("layers", "rest", "value"),
    [
        (["x=first"], None, 2), (["x=drop"], None, 2), (["x=second;freeze"], None, 2),
        (["x=first", "y=drop"], None, 2), (["x=first"], "second", 3), (["x=first"], "first", 1),
        (["x"], None, 1), (["x=0.5"], None, 1), (["x=freeze"], None, 1),
        (["x", "y=first"], None, 1), (["x"], "merge", 2),
    ],
)  # fmt: skip
def test_exceptions_leave_the_rest_merged_and_choices_leave_it_alone(
    layers: list[str], rest: Any, value: float, tmp_path: Path
):
    models = [save(tmp_path / f"{n}.safetensors", x=n, y=n, z=n) for n in (1, 3)]
    report = merge(models, tmp_path / "out.safetensors", layers=layers, rest=rest)
    assert load_file(tmp_path / "out.safetensors")["z"][0] == value
    (notice,) = [n for n in report.notices if n.kind == "rest"]
    done = {1: "kept from the first model", 2: "merged", 3: "kept from the second model"}[
        int(value)
    ]
    assert f"matched by no rule and {done}" in notice.message
    assert notice.level == "note"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.3}, "beta was given"),
        ({"weights": [1, 2]}, "weights was given"),
        ({"method": "slerp", "parameters": {"t": 0.5}}, "method and t were given"),
        ({"method": "linear"}, "method was given"),
        ({"parameters": {"weight": 2.0}}, "weight was given"),
    ],
)
@pytest.mark.parametrize("layers", [["*=first"], ["x=first", "y=second"]])
def test_what_asks_for_a_merge_is_no_copy(
    options: dict[str, Any], said: str, layers: list[str], tmp_path: Path
):
    models = [save(tmp_path / f"{n}.safetensors", x=n, y=n) for n in (1, 3)]
    with pytest.raises(ParameterError, match=f"^{said}, but by the rules no tensor is merged"):
        merge(models, tmp_path / "out.safetensors", layers=layers, rest="first", **options)
    assert not (tmp_path / "out.safetensors").exists()
    merge(models, tmp_path / "out.safetensors", layers=layers)  # asked for as what it is


def test_one_model_is_changed_or_refused(tmp_path: Path):
    a = save(tmp_path / "a.safetensors", x=1, y=2)
    base = save(tmp_path / "base.safetensors", x=0, y=0)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ParameterError, match="one model alone is not merged"):
        merge([a], out)
    for options in ({"method": "linear"}, {"weights": [0.5]}, {"parameters": {"weight": 2.0}}):
        with pytest.raises(ParameterError, match="one model alone is not merged"):
            merge([a], out, **options)
    merge([a], out, weights=[0.5], parameters={"normalize": False})
    assert load_file(out)["y"][0] == 1
    out.unlink()
    merge([a], out, dtype="bf16")
    assert load_file(out)["y"].dtype == ml_dtypes.bfloat16
    merge([a], out, layers=["y=drop"], force=True)
    assert load_file(out).keys() == {"x"}
    merge([a], out, base=base, method="task_arithmetic", weights=[0.5], force=True)
    assert load_file(out)["y"][0] == 1


# dtypes


@pytest.mark.parametrize("beta", [0.0, 0.001, 0.5, 0.999, 1.0])
def test_the_dtype_of_a_result_does_not_depend_on_how_much_of_each_there_is(
    beta: float, tmp_path: Path
):
    a = save(tmp_path / "a.safetensors", ml_dtypes.bfloat16, x=1)
    b = save(tmp_path / "b.safetensors", F32, x=1.001)
    for models, kind, name in (([a, b], ml_dtypes.bfloat16, "BF16"), ([b, a], F32, "F32")):
        report = merge(models, tmp_path / "out.safetensors", beta=beta, force=True)
        assert [(n.kind, n.message, n.level) for n in report.notices] == [
            ("dtype", f"1 tensor is stored in different dtypes; the output has {name}: x",
             "warning")
        ]  # fmt: skip
        assert load_file(tmp_path / "out.safetensors")["x"].dtype == kind


def test_what_only_the_base_has_is_told_and_can_be_kept(tmp_path: Path):
    models = [save(tmp_path / f"{n}.safetensors", x=n) for n in (1, 3)]
    base = save(tmp_path / "base.safetensors", x=0, head=7, tail=7)
    options: dict[str, Any] = {"base": base, "method": "task_arithmetic", "weights": [1, 1]}
    report = merge(models, tmp_path / "out.safetensors", **options)
    (notice,) = [n for n in report.notices if n.kind == "dropped"]
    assert notice.names == ("head", "tail")
    assert notice.message == "2 tensors are left out (only in the base model): head, tail"
    merge(models, tmp_path / "out.safetensors", layers=["head=base", "tail=drop"], force=True,
          strict=True, **options)  # fmt: skip
    assert {n: t[0] for n, t in load_file(tmp_path / "out.safetensors").items()} == {
        "x": 4, "head": 7,
    }  # fmt: skip


# The grammar of rules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("G_*=first;frezee", "'frezee'"), ("G_*=first;bta:0.3", "'bta' has no use"),
        ("G_*=drop;slerp", "'slerp' has no use"), ("G_*=second;0.3", "'beta' has no use"),
        ("G_*=first;drop", "both 'first' and 'drop'"),
        ("G_*=merge;second", "both 'merge' and 'second'"),
        ("G_*=frist", "'frist', which is no word of rules and no merge method; did you mean "
                      "'first'"),
        ("G_*=slrep", "did you mean 'slerp'"), ("G_*=frezee", "did you mean 'freeze'"),
        ("G_*=slerp;linear", "the rule for 'G_*' has both 'slerp' and 'linear'"),
        ("G_*=0.3;0.4", "both '0.3' and '0.4'"), ("G_*=beta:0.3;0.4", "both 'beta:0.3' and '0.4'"),
        ("G_*=slerp;t:0.3;t:0.4", "both 't:0.3' and 't:0.4'"),
        ("G_*=0,3", "has '0,3' (expected, separated by ';': a number, merge, keep,"),
        ("G_*=Slerp", "has 'Slerp' (expected,"), ("G_*=slerp;", "has '' (expected,"),
        ("G_*=", "has '' (expected,"),
    ],
)  # fmt: skip
def test_a_typo_in_a_rule_is_told(text: str, said: str):
    with pytest.raises(SoupError) as caught:
        Recipe(layers=[text])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("what", "frozen"),
    [("no", False), ("yes", True), (False, False), (True, True), ("off", False)],
)
def test_a_truth_value_is_one_however_yaml_gives_it(what: object, frozen: bool):
    """In YAML 1.2 `no` is a word, and any word is true to Python."""
    recipe = Recipe(layers={"G_*": {"freeze": what}})
    assert recipe.layers == (Rule("G_*", frozen=frozen),)
    with pytest.raises(RuleError, match="'freeze' is 'maybe', not true or false"):
        Recipe(layers={"G_*": {"freeze": "maybe"}})


@pytest.mark.parametrize(
    "pattern",
    ["re:(a+)+$", "re:(a|aa)+$", "re:(a*)*b", "re:a{99999999999999999999}",
     "re:" + "(" * 5_000 + "a" + ")" * 5_000, "re:(?:(?:a{1000}){1000}){1000}b"],
)  # fmt: skip
def test_a_regular_expression_is_bounded_in_time_and_memory(
    pattern: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("modelsoup.merging.rules._PATIENCE", 2.0)
    names = ["a" * 60 + "!", "b"]
    with pytest.raises(RuleError) as caught:
        assign(names, [Rule(pattern)])
    assert repr(pattern) in str(caught.value) or "matches no tensor" in str(caught.value)


@pytest.mark.parametrize("limit", [1 << 29, 1 << 33])
def test_a_regular_expression_is_used_under_a_limit_of_memory(limit: int):
    """A batch system sets one, which a process may lower and not raise."""
    program = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
        "from modelsoup.merging.rules import Rule, assign\n"
        "print(assign(['ab', 'c'], [Rule('re:a.')], rest='drop').taken(0))\n"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("['ab']\n", "")


def test_a_regular_expression_warns_of_nothing(tmp_path: Path):
    """Python's `re` has warnings of its own, which would be shown raw, or raised here."""
    a, b = (named(tmp_path / f"{n}.safetensors", ["[x", "y"], n) for n in (1, 3))
    done = soup("merge", a, b, "--layers", "re:[[]x=first", "-o", tmp_path / "out.safetensors")
    assert (done.exit_code, "Warning" in done.output) == (0, False)
    assert load_file(tmp_path / "out.safetensors")["[x"][0] == 1


def test_directions_of_weight_normalisation_are_weights(tmp_path: Path):
    names = ["a.weight_g", "a.weight_v", "b.weight_u", "b.weight_v", "c.u0", "c.sv0",
             "d.stored_mean", "d.stored_var"]  # fmt: skip
    models = [named(tmp_path / f"{n}.safetensors", names, n) for n in (1, 3)]
    report = merge(models, tmp_path / "out.safetensors")
    told = {name for n in report.notices if n.kind == "recalibrate" for name in n.names}
    assert told == set(names) - {"a.weight_g", "a.weight_v"}


def test_identical_integers_are_no_reason_to_refuse(tmp_path: Path):
    """BERT's `position_ids` under --strict."""
    models = [tmp_path / f"{n}.safetensors" for n in "ab"]
    for path in models:
        save_file({"position_ids": np.arange(4), "w": np.ones(2, F32)}, path)
    report = merge(models, tmp_path / "out.safetensors", strict=True)
    assert [(n.kind, n.level) for n in report.notices] == [("carried", "note")]


# NaN by name


def test_nan_may_pass_by_pattern(tmp_path: Path):
    for name in "ab":
        save_file(
            {"mask": np.array([0, -np.inf], F32), "w": np.ones(2, F32)},
            tmp_path / f"{name}.safetensors",
        )
    models = [tmp_path / f"{n}.safetensors" for n in "ab"]
    with pytest.raises(modelsoup.NonfiniteError, match=r"allow_nonfinite=\['mask'\] lets them"):
        merge(models, tmp_path / "out.safetensors")
    with pytest.raises(modelsoup.NonfiniteError, match="mask"):
        merge(models, tmp_path / "out.safetensors", allow_nonfinite=["w"])
    with pytest.raises(RuleError, match=r"'mask\*\*x' matches no tensor"):
        merge(models, tmp_path / "out.safetensors", allow_nonfinite="mask**x")
    merge(models, tmp_path / "out.safetensors", allow_nonfinite="ma*")
    made = modelsoup.read_lineage(modelsoup.open_checkpoint(tmp_path / "out.safetensors"))
    assert made is not None
    assert (made["nonfinite"], made["allow_nonfinite"]) == ({"mask": 1}, ["ma*"])
    report = merge(models, tmp_path / "o.safetensors", layers=["mask=first"], strict=True)
    assert [(n.kind, n.level) for n in report.notices if n.kind == "nonfinite"] == [
        ("nonfinite", "note")
    ]


# In Python


def test_one_path_is_no_list_of_paths(tmp_path: Path):
    a = save(tmp_path / "a.safetensors", x=1)
    for path in (a, str(a)):
        with pytest.raises(ParameterError, match="one path, but must be a list of paths"):
            merge(path, tmp_path / "out.safetensors")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"allow_nonfinite": 3}, "allow_nonfinite is 3, not a list of patterns"),
        ({"allow_nonfinite": [3]}, r"allow_nonfinite is \[3\], not a list of patterns"),
        ({"groups": {"a": 3}}, "the group 'a' is no list of patterns: 3"),
        ({"groups": {"a": [3]}}, r"the group 'a' is no list of patterns: \[3\]"),
        ({"groups": {3: ["a"]}}, "groups is .*, not a mapping from names"),
        ({"parameters": {3: 1}}, "parameters is .*, not a mapping from names"),
        ({"seed": 2**63}, "seed is 9223372036854775808, not an integer from 0 to"),
        ({"workers": "3"}, "workers is '3', but must be an integer from 1 to 1,024"),
        ({"workers": True}, "workers is True, but"),
        ({"workers": 0}, "workers is 0, but"),
        ({"workers": 99_999_999}, "workers is 99999999, but must be an integer from 1 to 1,024"),
        ({"models": 3}, "models is 3, but must be a list of paths"),
        ({"models": [3]}, "a checkpoint is 3, but must be a path"),
        ({"base": 3}, "a checkpoint is 3, but must be a path"),
        ({"method": ["slerp"]}, r"method is \['slerp'\], not a name"),
    ],
)
def test_a_value_of_another_type_is_a_sentence(options: dict[str, Any], said: str, tmp_path: Path):
    a = save(tmp_path / "a.safetensors", x=1)
    given: dict[str, Any] = {"models": [a, a], **options}
    with pytest.raises(SoupError, match=said):
        merge(output=tmp_path / "out.safetensors", **given)
    assert not (tmp_path / "out.safetensors").exists()


def test_numbers_and_dtypes_of_numpy_are_taken(tmp_path: Path):
    models = [save(tmp_path / f"{n}.safetensors", x=n) for n in (1, 3)]
    out = tmp_path / "out.safetensors"
    base = models[0]
    for options, value in (
        ({"beta": np.float32(0.25)}, 2.5), ({"weights": np.array([1, 3])}, 2.5),
        ({"parameters": {"weight": np.array([1.0, 3.0]), "normalize": np.True_}}, 2.5),
        ({"seed": np.int64(3)}, 2),
        ({"method": "ties", "base": base, "weights": (np.float64(1), 1),
          "parameters": {"density": np.float32(1)}}, 3),
    ):  # fmt: skip
        merge(models, out, force=True, **options)
        assert load_file(out)["x"][0] == value
    for dtype in (np.float16, np.dtype("float16"), "fp16", "F16"):
        merge(models, out, dtype=dtype, force=True)
        assert load_file(out)["x"].dtype == np.float16
    merge(models, out, dtype=ml_dtypes.bfloat16, force=True)
    assert load_file(out)["x"].dtype == ml_dtypes.bfloat16
    with pytest.raises(ParameterError, match="dtype 'int8' is not a float dtype"):
        merge(models, out, dtype=np.int8, force=True)


@pytest.mark.needs("torch")
def test_dtypes_of_torch_are_taken(tmp_path: Path):
    import torch

    models = [save(tmp_path / f"{n}.safetensors", x=n) for n in (1, 3)]
    merge(models, tmp_path / "out.safetensors", dtype=torch.bfloat16)
    assert load_file(tmp_path / "out.safetensors")["x"].dtype == ml_dtypes.bfloat16


# The file of options


def test_a_file_may_hold_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sub").mkdir()
    for n in (1, 3):
        save(tmp_path / "sub" / f"{n}.safetensors", x=n, y=n)
    (tmp_path / "sub" / "merge.yaml").write_text(
        "models: [1.safetensors, 3.safetensors]\nbase: 1.safetensors\nmethod: task_arithmetic\n"
        "weight: [0, 1e-1]\nlayers: {x: merge, rest: second}\nsha256: true\n"
        "output: out.safetensors\n"
    )
    monkeypatch.chdir(tmp_path)
    done = soup("merge", "--config", "sub/merge.yaml")
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "sub" / "out.safetensors")
    assert (found["x"][0], found["y"][0]) == (np.float32(1.2), 3)
    made = modelsoup.read_lineage(modelsoup.open_checkpoint(tmp_path / "sub" / "out.safetensors"))
    assert made is not None and "sha256" in made["inputs"][0]
    over = soup("merge", "--config", "sub/merge.yaml", "-o", "here.safetensors", "--rest", "first",
                "--layers", "x=merge")  # fmt: skip
    assert over.exit_code == 0, over.output
    assert load_file(tmp_path / "here.safetensors")["y"][0] == 1


@pytest.mark.parametrize("word", ["--weights", "--method", "--rest", "--dtype", "--on-integer"])
def test_an_option_that_is_given_empty_is_not_as_if_it_were_not_given(word: str, tmp_path: Path):
    models = [save(tmp_path / f"{n}.safetensors", x=n) for n in (1, 3)]
    refused = soup("merge", *models, word, "", "-o", tmp_path / "out.safetensors")
    assert refused.exit_code == 1, refused.output
    assert not (tmp_path / "out.safetensors").exists()


def test_shards_of_a_file_are_refused(tmp_path: Path):
    models = [save(tmp_path / f"{n}.safetensors", x=n) for n in (1, 3)]
    refused = soup("merge", *models, "--shard-size", "5GB", "-o", tmp_path / "out.safetensors")
    assert (refused.exit_code, "is one file" in refused.output) == (1, True)


def test_tensors_without_elements_are_told(tmp_path: Path):
    """A shard of ZeRO-3 has every name and no value."""
    for name in "ab":
        save_file({"x": np.ones(2, F32), "gone": np.ones(0, F32)}, tmp_path / f"{name}.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    report = merge([a, b], tmp_path / "out.safetensors")
    assert [n.message for n in report.notices] == ["1 tensor is without elements: gone"]
    for words in (["inspect", a], ["verify", a]):
        done = soup(*words)
        assert "1 tensor is without elements: gone" in done.output
        assert done.exit_code == 0
