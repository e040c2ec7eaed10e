"""The command `soup`: what it prints, where, and with which exit code."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup.terminal.cli import main

F32 = np.float32


def save(path: Path, tensors: Mapping[str, np.ndarray], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata or None)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test runs in a folder of its own, with two models that a command can merge."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 1.0), ("b", 3.0)):
        tensors = {
            "disc.conv.weight": np.full((2, 3), value, F32),
            "disc.conv.bias": np.full(2, value, F32),
            "gen.weight": np.full(4, value, F32),
        }
        save(tmp_path / f"{name}.safetensors", tensors, format="pt")
    yield tmp_path
    gc.enable()  # a command that runs in this process leaves it off


def soup(*arguments: object) -> Result:
    """A command in this process; it must not end in a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: object) -> str:
    """What a command prints that does what it was asked to."""
    result = soup(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(*arguments: object, code: int = 1) -> str:
    """The sentence with which a command ends; it writes nothing, and nothing to stdout."""
    before = sorted(Path().rglob("*"))
    result = soup(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert sorted(Path().rglob("*")) == before
    if code == 1:
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert len(result.stderr) < 600
    assert "Traceback" not in result.stderr
    return result.stderr


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "modelsoup", *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def python(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True,
        text=True, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


A, B = "a.safetensors", "b.safetensors"
MERGE = ("merge", A, B)


# soup merge


def test_the_first_command_of_the_readme_works_as_it_stands(here: Path) -> None:
    run = process("merge", A, B, "--beta", "0.5", "--layers", "disc.*")
    assert run.returncode == 0, run.stderr
    assert run.stderr == (
        "note: 1 tensor is matched by no rule and kept from the first model: gen.weight\n"
    )
    assert run.stdout.startswith("soup.safetensors: 3 tensors, 12 parameters, 48 B\n")
    found = load_file(here / "soup.safetensors")
    assert {name: array.flat[0] for name, array in found.items()} == {
        "disc.conv.weight": 2, "disc.conv.bias": 2, "gen.weight": 1,
    }  # fmt: skip

    again = process("merge", A, B, "--beta", "0.5", "--layers", "disc.*")
    assert again.returncode == 1
    assert again.stderr == "Error: soup.safetensors exists (--force replaces it)\n"
    forced = process("merge", A, B, "--beta", "0.25", "--force")
    assert forced.returncode == 0
    assert load_file(here / "soup.safetensors")["gen.weight"][0] == 2.5


def test_each_rule_is_shown_with_what_it_took() -> None:
    printed = done(*MERGE, "--layers", "disc.*.bias=drop", "--layers", "disc.*=0.3", "--dry-run")
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["would", "write", "2", "tensors,", "10", "parameters,", "40", "B"]
    assert ["disc.*.bias", "→", "drop", "1", "2"] in lines
    assert ["disc.*", "→", "merge;", "beta:0.3", "1", "6"] in lines
    assert ["(rest)", "→", "first", "1", "4"] in lines


def test_a_dry_run_writes_nothing(here: Path) -> None:
    before = sorted(here.iterdir())
    assert "would write 3 tensors" in done(*MERGE, "--dry-run")
    assert "would write 3 tensors" in done(*MERGE, "--dry-run", "-o", "folder")
    assert sorted(here.iterdir()) == before


def merged(*arguments: object) -> dict[str, np.ndarray]:
    done(*MERGE, *arguments, "--force", "-o", "out.safetensors")
    return load_file("out.safetensors")


def test_weights() -> None:
    assert merged("--weights", "0.25,0.75")["gen.weight"][0] == 2.5
    assert merged("--weights", "1,3")["gen.weight"][0] == 2.5
    assert merged("--weights", " 1 , 3 ")["gen.weight"][0] == 2.5


def test_method_base_and_set(here: Path) -> None:
    save(here / "base.safetensors", {n: np.zeros_like(t) for n, t in load_file(A).items()})
    options = ("--method", "task_arithmetic", "--base", "base.safetensors", "--set", "weight=1,2")
    assert merged(*options)["gen.weight"][0] == 7
    assert merged(*options, "--set", "lambda=2")["gen.weight"][0] == 14
    assert merged(*options, "--set", "lambda=3", "--set", "normalize=true")["gen.weight"][0] == 7


def test_rest() -> None:
    assert merged("--layers", "disc.*", "--rest", "second")["gen.weight"][0] == 3
    assert "gen.weight" not in merged("--layers", "disc.*", "--rest", "drop")
    assert "no rule matches 1 tensor: gen.weight" in mistake(
        *MERGE, "--layers", "disc.*", "--rest", "error"
    )


def test_groups_and_depth() -> None:
    options = ("--group", "ends=*.bias", "--group", "ends=gen.*", "--layers", "group:ends=second")
    found = merged(*options)
    assert [found[n].flat[0] for n in sorted(found)] == [3, 2, 3]  # an exception: the rest merges
    found = merged("--low-level", "0.5", "--layers", "disc.*=low-level")
    assert [found[n].flat[0] for n in sorted(found)] == [2, 2, 1]
    found = merged("--low-level", "gen*=1", "--layers", "low-level")
    assert [found[n].flat[0] for n in sorted(found)] == [1, 1, 2]


def test_dtype_and_on_integer(here: Path) -> None:
    assert merged("--dtype", "bf16")["gen.weight"].dtype == ml_dtypes.bfloat16
    for name, value in (("a", 1), ("b", 2)):
        save(here / f"{name}.safetensors", {"n": np.array([value], np.int64)})
    assert "differs between the models: n (I64)" in mistake(*MERGE, "-o", "x.safetensors")
    assert merged("--on-integer", "max")["n"] == 2
    assert merged("--on-integer", "first")["n"] == 1


def test_seed_and_workers(here: Path) -> None:
    tensors = {"x": np.ones(1000, F32)}
    for name in (A, B):
        save(here / name, tensors)
    save(here / "base.safetensors", {"x": np.zeros(1000, F32)})
    options = ("--method", "dare_linear", "--base", "base.safetensors", "--set", "weight=1",
               "--set", "density=0.5")  # fmt: skip
    first = merged(*options, "--workers", 1)["x"]
    assert np.array_equal(first, merged(*options, "--seed", 0, "--workers", 3)["x"])
    assert not np.array_equal(first, merged(*options, "--seed", 1)["x"])


def test_sha256() -> None:
    merged("--sha256", "--no-fsync")
    lineage = modelsoup.read_lineage(modelsoup.open_checkpoint("out.safetensors"))
    assert lineage is not None
    expected = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in (A, B)]
    assert [entry["sha256"] for entry in lineage["inputs"]] == expected


def test_strict(batchnorm: None) -> None:
    assert "bn.running_mean (--strict)" in mistake(*MERGE, "--strict")


def test_allow_nonfinite(here: Path) -> None:
    save(here / A, {"x": np.array([np.nan], F32)})
    save(here / B, {"x": np.array([1], F32)})
    sentence = mistake(*MERGE)
    assert "NaN or infinity in 1 tensor: x" in sentence
    hint = re.search(r"\((--allow-nonfinite '.*') lets them pass\)", sentence)
    assert hint is not None
    result = soup(*MERGE, *shlex.split(hint[1]))
    assert result.exit_code == 0
    assert "note: NaN or infinity in 1 tensor: x" in result.stderr
    assert np.isnan(load_file(here / "soup.safetensors")["x"])


@pytest.fixture
def batchnorm(here: Path) -> None:
    """BatchNorm statistics in both models, so that there is something to warn of."""
    for name in (A, B):
        save(here / name, {**load_file(here / name), "bn.running_mean": np.ones(2, F32)})


def test_a_folder_comes_out_where_a_folder_was_asked_for(here: Path) -> None:
    done(*MERGE, "-o", "out")
    assert [path.name for path in (here / "out").iterdir()] == ["model.safetensors"]
    done(*MERGE, "--shard-size", "32B")  # there is no one file to write to
    assert sorted(path.name for path in (here / "soup").iterdir()) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip


def test_a_folder_merged_into_a_file_leaves_its_config_with_a_note(here: Path) -> None:
    save(here / "bert" / "model.safetensors", load_file(A))
    (here / "bert" / "config.json").write_text("{}")
    result = soup("merge", "bert", B)
    assert result.exit_code == 0
    assert "note: config and tokenizer were not copied" in result.stderr
    assert "note" not in soup("merge", "bert", B, "-o", "out").stderr


def test_warnings_go_to_stderr_and_the_report_to_stdout(batchnorm: None) -> None:
    result = soup(*MERGE)
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: 1 tensor is of BatchNorm's statistics and averaged: estimate them anew: "
        "bn.running_mean\n"
    )
    assert "warning" not in result.stdout


def test_quiet_prints_nothing_but_errors(batchnorm: None) -> None:
    result = soup(*MERGE, "-q")
    assert (result.exit_code, result.output) == (0, "")
    assert "exists" in mistake(*MERGE, "-q")


@pytest.mark.needs("fast")
def test_verbose_says_that_a_compiled_loop_cannot_be_kept(here: Path) -> None:
    Path("file").write_text("where the cache should be")
    settings = {"MODELSOUP_FAST": "1", "MODELSOUP_CACHE": "file"}
    run = process(*MERGE, "-v", **settings)
    assert run.returncode == 0, run.stderr
    kept = r"(modelsoup\.merging\.compiled: the compiled loop could not be kept .*\n)+"
    assert re.fullmatch(kept, run.stderr)
    assert (here / "soup.safetensors").exists()
    assert process(*MERGE, "--force", **settings).stderr == ""


def test_json_is_the_report_and_nothing_else(here: Path, batchnorm: None) -> None:
    result = soup(*MERGE, "--layers", "disc.*=drop", "--layers", "*=0.5", "--json")
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["output"] == "soup.safetensors"
    assert report["tensors"] == 2
    assert report["bytes_written"] == (here / "soup.safetensors").stat().st_size
    assert sorted(report["dropped"]) == ["disc.conv.bias", "disc.conv.weight"]
    assert [rule["tensors"] for rule in report["rules"]] == [2, 2]
    assert [notice["kind"] for notice in report["notices"]] == ["recalibrate"]
    assert [entry["name"] for entry in report["lineage"]["inputs"]] == [A, B]
    planned = json.loads(done(*MERGE, "--json", "--dry-run", "-o", "other.safetensors"))
    assert planned["output"] is None
    assert planned["planned"]["bytes_written"] == 56


# --config


def config(here: Path, text: str) -> str:
    (here / "recipe.yaml").write_text(textwrap.dedent(text))
    return "--config=recipe.yaml"


def test_a_recipe_may_be_a_yaml_file(here: Path) -> None:
    option = config(
        here,
        """
        beta: 0.25
        rest: second
        dtype: f16
        groups: {bias: ['*.bias']}
        layers:
          group:bias: drop
          disc.*: {method: slerp, t: 1}
        """,
    )
    found = merged(option)
    assert found.keys() == {"disc.conv.weight", "gen.weight"}
    assert found["disc.conv.weight"].dtype == np.float16
    assert found["disc.conv.weight"].flat[0] == 3
    assert found["gen.weight"].flat[0] == 3


def test_parameters_of_the_method_are_keys_too(here: Path) -> None:
    save(here / "base.safetensors", {n: np.zeros_like(t) for n, t in load_file(A).items()})
    for text in ("{method: task_arithmetic, weight: [1, 2], lambda: 2}",
                 "{method: task_arithmetic, parameters: {weight: [1, 2], lambda: 2}}"):  # fmt: skip
        found = merged(config(here, text), "--base", "base.safetensors")
        assert found["gen.weight"][0] == 14


@pytest.mark.parametrize(
    ("text", "options", "value"),
    [
        ("beta: 0.25", ("--beta", "0.5"), 2),
        ("weights: [1, 3]", ("--weights", "3,1"), 1.5),
        ("weight: [1, 3]", ("--set", "weight=3,1"), 1.5),
        ("layers: 'gen.*=second'", ("--layers", "gen.*=0.25"), 2.5),
        ("beta: 0.25", ("--weights", "3,1"), 1.5),
        ("weights: [1, 3]", ("--beta", "0.25"), 2.5),
    ],
)  # fmt: skip
def test_the_command_line_wins_over_the_file(
    text: str, options: tuple[str, ...], value: float, here: Path
) -> None:
    assert merged(config(here, text), *options)["gen.weight"][0] == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out_dtpye: bf16", "recipe.yaml has the unknown key 'out_dtpye'"),
        ("dtpye: bf16", "did you mean 'dtype'"),
        ("normalise: true", "did you mean 'normalize'"),
        ("on-intger: max", "did you mean 'on_integer'"),
        ("method: tise", "did you mean 'ties'"),
        ("{", "recipe.yaml:2:1: "),
        ("a: b: c", "recipe.yaml:1:5: "),
        ("!!python/object/apply:os.system ['touch pwned']", "recipe.yaml:1:1: the tag"),
        ("beta: 0.1\nbeta: 0.2", "recipe.yaml:2:1: the key 'beta' occurs twice"),
        ("on-integer: max\non_integer: max", "'on_integer' twice"),
        ("models: a.safetensors", "'a.safetensors' as 'models'"),
        ("workers: two", "'two' as 'workers'"),
        ("- beta", "recipe.yaml is no mapping"),
        ("", "recipe.yaml is no mapping"),
        ("beta: half", "beta is 'half', but must be between 0 and 1"),
        ("beta: .nan", "beta is nan"),
        ("weights: 0.5", "weights"),
        ("weights: [a, b]", "'a', which is no number"),
        ("weights: {a: 1}", "weights is {'a': 1}, not a list of numbers"),
        ("seed: abc", "seed"),
        ("dtype: 16", "16"),
        ("layers: 5", "layers is 5"),
        ("layers: [{gen.*: frist}]", "gen.*"),
        ("layers: {gen.*: {bta: 0.3}}", "bta"),
        ("low_level: deep", "not a fraction"),
        ("groups: [gen.*]", "groups"),
        ("parameters: [1]", "parameters"),
        ("parameters: {normalize: maybe}", "'maybe'"),
        ("1: 2", "unknown key '1'"),
        ("modles: [a.safetensors]", "did you mean 'models'"),
        ("bsae: a.safetensors", "did you mean 'base'"),
        ("allow_nonfinite: 3", "allow_nonfinite is 3, not a list of patterns"),
        ("strict: maybe", "'strict' is 'maybe', not true or false"),
        ("workers: 5000", "workers is 5000, but must be an integer from 1 to 1,024"),
        ("layers: [{}]", "layers has {}, which is no rule"),
        ("layers: [null]", "layers has None, which is no rule"),
        ("layers: {gen.*: {}}", "the rule for 'gen.*' says nothing (expected"),
        ("layers: {gen.*: }", "the rule for 'gen.*' says nothing (expected"),
        ("layers: {gen.*: [slerp, linear]}", "has both 'slerp' and 'linear'"),
        ("layers: {gen.*: {action: 0.3, beta: 0.4}}", "has 'beta' twice"),
        ("seed: 9223372036854775808", "not an integer from 0 to 2^63 - 1"),
        ("seed: -1", "seed is -1, not an integer from 0 to 2^63 - 1"),
        ("groups: {a: [3]}", "the group 'a' is no list of patterns: [3]"),
    ],
)
def test_a_bad_file_is_one_sentence(text: str, said: str, here: Path) -> None:
    assert said in mistake(*MERGE, config(here, text))


def test_a_switch_of_the_file_is_any_word_for_true(here: Path) -> None:
    option = config(here, "strict: yes\nlayers: {gen.*: {action: first, freeze: yes}}")
    save(here / "b.safetensors", {n: t.astype(np.float16) for n, t in load_file(A).items()})
    assert "stored in different dtypes" in mistake(*MERGE, option)


def test_rules_of_the_command_line_come_before_those_of_the_file(here: Path) -> None:
    """They once stood in their place, and a hint that was followed undid all others."""
    tensors = {**load_file(A), "ema": np.ones(1, F32)}
    save(here / "a.safetensors", tensors)
    option = config(here, "layers: {gen.*: 0.25, '*': 0.75}")
    refused = mistake(*MERGE, option)
    assert "--layers 'ema=first', or '=drop' before your other rules" in refused
    found = merged(option, "--layers", "ema=first")
    assert {name: t.flat[0] for name, t in found.items()} == {
        "disc.conv.bias": 1.5, "disc.conv.weight": 1.5, "ema": 1, "gen.weight": 2.5,
    }  # fmt: skip
    found = merged(option, "--layers", "ema=first", "--layers", "gen.*=second", "--force")
    assert (found["gen.weight"][0], found["disc.conv.bias"][0]) == (3, 1.5)


def test_a_parameter_of_a_rules_own_method_is_asked_for_where_it_belongs(here: Path) -> None:
    """`--set` is for the method of the command."""
    refused = mistake(*MERGE, "--set", "weight=1,2", "--rest", "merge", "--layers", "gen.*=slerp")
    assert "needs the parameter 't' (--layers 'gen.*=slerp;t:…')" in refused
    hint = shlex.split(refused.partition("'t' (")[2].partition(")")[0].replace("…", "1"))
    assert merged("--set", "weight=1,2", "--rest", "merge", *hint)["gen.weight"][0] == 3
    assert "weight has no use: every rule that merges" in mistake(
        *MERGE, "--set", "weight=1,2", "--layers", "gen.*=slerp;t:1"
    )
    assert "(--set t=…)" in mistake(*MERGE, "--method", "slerp")
    for rule, asked, value in (
        ("gen.*=task_arithmetic;0.3", "gen.*=task_arithmetic;weight:…", 2.5),
        ("gen.*=freeze;weight:1,-1", "gen.*=merge;freeze;weight:1.0,-1.0;normalize:false", -2),
    ):
        words = ["--base", A] if "task" in rule else []
        assert f"--layers '{asked}'" in mistake(*MERGE, *words, "--layers", rule)
        found = merged(*words, "--layers", asked.replace("…", "0.25,0.75"))
        assert found["gen.weight"][0] == value
    with pytest.raises(modelsoup.ParameterError, match=r"\(parameters=\{'t': …\}\)"):
        modelsoup.merge([A, "b.safetensors"], "x.safetensors", method="slerp")


def test_a_file_that_is_not_there_or_not_text_is_told(here: Path) -> None:
    assert "nope.yaml does not exist" in mistake(*MERGE, "--config", "nope.yaml")
    (here / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "binary.yaml is not UTF-8" in mistake(*MERGE, "--config", "binary.yaml")
    assert mistake(*MERGE, "--config", ".").startswith("Error: cannot read .: it is not")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("merge a.safetensors nope.safetensors", "nope.safetensors"),
        ("merge a.safetensors", "one model alone is not merged"),
        ("merge a.safetensors notes.txt", "notes.txt is not a safetensors file"),
        ("merge a.safetensors empty", "empty holds no .safetensors file"),
        (
            "merge a.safetensors b.safetensors --beta 1.5",
            "beta is 1.5, but must be between 0 and 1",
        ),
        ("merge a.safetensors b.safetensors --beta -1", "beta is -1.0"),
        ("merge a.safetensors b.safetensors --beta nan", "beta is nan"),
        (
            "merge a.safetensors b.safetensors --beta 0.5 --weights 1,1",
            "give --beta β or --weights W, not both",
        ),
        ("merge a.safetensors b.safetensors --weights 1,2,3", "3 values for 2 models"),
        ("merge a.safetensors b.safetensors --weights 1,x", "--weights has '1,x'"),
        ("merge a.safetensors b.safetensors --weights 1,nan", "nan, not a finite number"),
        ("merge a.safetensors b.safetensors --weights 1,-1", "sum to 0"),
        ("merge a.safetensors b.safetensors --method tise", "did you mean 'ties'"),
        ("merge a.safetensors b.safetensors --method ties --set weight=1", "--base BASE"),
        ("merge a.safetensors b.safetensors --method slerp", "needs the parameter 't'"),
        ("merge a.safetensors b.safetensors --base a.safetensors", "but linear uses none"),
        ("merge a.safetensors b.safetensors --set normalise=1", "did you mean 'normalize'"),
        ("merge a.safetensors b.safetensors --set density", "--set has 'density'"),
        ("merge a.safetensors b.safetensors --set =1", "--set has '=1'"),
        (
            "merge a.safetensors b.safetensors --set weight=x",
            "parameter 'weight' of 'linear' is 'x', not a number",
        ),
        ("merge a.safetensors b.safetensors --set weight=", "parameter 'weight' has the value ''"),
        ("merge a.safetensors b.safetensors --layers dics.*", "did you mean 'disc"),
        ("merge a.safetensors b.safetensors --layers re:(", "not a regular expression"),
        ("merge a.safetensors b.safetensors --layers group:low", "no group is called 'low'"),
        ("merge a.safetensors b.safetensors --layers low-level", "--low-level 0.3"),
        ("merge a.safetensors b.safetensors --layers gen.*=tise", "did you mean 'ties'"),
        ("merge a.safetensors b.safetensors --layers gen.*=bta:1", "'bta'"),
        ("merge a.safetensors b.safetensors --low-level 2", "not a fraction"),
        ("merge a.safetensors b.safetensors --low-level 0.3", "low"),
        ("merge a.safetensors b.safetensors --group low", "--group has 'low'"),
        ("merge a.safetensors b.safetensors --rest frist", "did you mean 'first'"),
        ("merge a.safetensors b.safetensors --on-integer mx", "did you mean 'max'"),
        ("merge a.safetensors b.safetensors --dtype bf61", "did you mean 'bf16'"),
        ("merge a.safetensors b.safetensors --dtype int8", "not a float dtype"),
        ("merge a.safetensors b.safetensors --workers 0", "workers is 0"),
        ("merge a.safetensors b.safetensors --shard-size 5XB", "'5XB' is not a size"),
        ("merge a.safetensors b.safetensors --shard-size 9B -o x.safetensors", "name a folder"),
        ("merge a.safetensors b.safetensors -o no/x.safetensors", "folder no of the output"),
        ("merge a.safetensors b.safetensors -o a.safetensors --force", "would replace"),
        ("merge a.safetensors b.safetensors -o notes.txt", "notes.txt ends in .txt"),
        ("merge a.safetensors b.safetensors -o notes", "notes is a file"),
        ("inspect nope.safetensors", "nope.safetensors"),
        ("inspect notes.txt", "notes.txt is not a safetensors file"),
        ("diff a.safetensors nope.safetensors", "nope.safetensors"),
        ("diff a.safetensors b.safetensors --by layr", "did you mean 'layer'"),
        ("methods tise", "did you mean 'ties'"),
        ("verify nope.safetensors", "nope.safetensors"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(arguments: str, said: str, here: Path) -> None:
    for name in ("notes", "notes.txt"):
        (here / name).write_text("these are only notes")
    (here / "empty").mkdir()
    assert said in mistake(*arguments.split())


def test_a_pickle_that_is_not_there_or_torch_that_is_not_is_told() -> None:
    sentence = mistake("convert", "nope.pth", "out.safetensors")
    assert ("nope.pth" if find_spec("torch") else ".[torch]") in sentence


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("mrge a b", "No such command 'mrge'"),
        ("mrge a b", "merge"),
        ("merge a b --methd ties", "--method"),
        ("merge a b --wieghts 1,1", "--weights"),
        ("merge a b --beta half", "'half' is not a valid float"),
        ("merge a b --workers many", "'many' is not a valid integer"),
        ("inspect a b", "unexpected extra argument"),
        ("diff a", "Missing argument 'B'"),
        ("convert a", "Missing argument 'OUT'"),
        ("inspect --bogus a", "No such option"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: str, said: str) -> None:
    assert said in mistake(*arguments.split(), code=2)


@pytest.mark.parametrize("command", ["", "merge", "inspect", "diff", "convert", "train", "verify"])
def test_a_command_without_arguments_shows_its_help(command: str) -> None:
    result = soup(*command.split())
    assert result.exit_code == 2
    assert "Usage:" in result.output
    assert "--help" in result.output
    assert ("Options:" if command else "Commands:") in result.output


@pytest.mark.parametrize(
    "command",
    ["merge", "inspect", "diff", "convert", "methods", "train", "trainers", "verify"],
)
def test_every_command_is_listed_and_has_help(command: str) -> None:
    assert command in done("--help")
    printed = done(command, "--help")
    assert printed == done(command, "-h")
    assert "Usage:" in printed


def test_version() -> None:
    assert done("--version") == f"soup, version {modelsoup.__version__}\n"


def test_an_error_in_a_process_of_its_own_is_one_sentence_too() -> None:
    run = process("merge", A, "nope.safetensors")
    assert run.returncode == 1
    assert run.stdout == ""
    assert re.fullmatch(r"Error: [^\n]*nope\.safetensors[^\n]*\n", run.stderr)
    assert process("mrge").returncode == 2


def test_a_pipe_that_closes_early_is_no_traceback(here: Path) -> None:
    save(here / "many.safetensors", {f"t{i:05}": np.zeros(1, F32) for i in range(2000)})
    command = f"{sys.executable} -m modelsoup inspect many.safetensors --tensors | head -n 1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "many.safetensors" in run.stdout
    assert "Traceback" not in run.stderr
    assert "Exception" not in run.stderr


# soup inspect


@pytest.fixture
def gan(here: Path) -> Path:
    """Four blocks alike, one that is not, a head."""
    tensors: dict[str, np.ndarray] = {}
    for i in range(12):
        tensors[f"G.blocks.{i}.conv.weight"] = np.zeros((4, 4) if i < 11 else (4, 5), F32)
        tensors[f"G.blocks.{i}.conv.bias"] = np.zeros(4, F32)
    tensors["G.head"] = np.zeros(3, np.float16)
    tensors["steps"] = np.array(7, np.int64)
    return save(here / "gan.safetensors", tensors, format="pt", note="x" * 200)


def test_inspect_shows_names_as_a_tree_and_numbered_siblings_alike_as_one(gan: Path) -> None:
    lines = [line.strip() for line in done("inspect", "gan.safetensors").splitlines()]
    assert lines[0].startswith("gan.safetensors 26 tensors, 248 parameters, 990 B in 1 file;")
    assert "format: pt" in lines
    tree = "\n".join(lines)
    assert "0…10 ×11  22 tensors, 220 parameters, 880 B, F32" in tree
    assert "11  2 tensors, 24 parameters, 96 B, F32" in tree
    assert tree.count("conv") == 2
    assert "weight  [4, 4] F32" in tree
    assert "head  [3] F16" in tree
    assert "steps  [] I64" in tree
    assert "x" * 100 not in tree  # long metadata is cut


def test_inspect_lists_every_tensor_where_asked(gan: Path) -> None:
    printed = done("inspect", "gan.safetensors", "--tensors")
    rows = [line.split() for line in printed.splitlines()]
    assert sum(row[0].startswith("G.blocks.") for row in rows) == 24
    row = next(row for row in rows if row[0] == "G.blocks.3.conv.weight")
    content = gan.read_bytes()
    length = int.from_bytes(content[:8], "little")
    offset = json.loads(content[8 : 8 + length])["G.blocks.3.conv.weight"]["data_offsets"][0]
    assert row == [
        "G.blocks.3.conv.weight", "F32", "[4,", "4]", "64", "gan.safetensors",
        f"{8 + length + offset:,}",
    ]  # fmt: skip


def test_long_names_are_not_cut_in_a_pipe(here: Path) -> None:
    name = "model." + "very_long_name." * 20 + "weight"
    save(here / "long.safetensors", {name: np.zeros(2, F32)})
    assert name in done("inspect", "long.safetensors", "--tensors")
    save(here / "other.safetensors", {name: np.ones(2, F32)})
    assert name in done("diff", "long.safetensors", "other.safetensors", "--by", "tensor")
    assert name in done("merge", "long.safetensors", "other.safetensors", "--layers", name)


@pytest.mark.parametrize(
    "name", [".".join(["deep"] * 2000), "x.²", "", ".", "a..b", "[bold]x[/nope]", "x." + "1" * 5000]
)
def test_any_name_can_be_inspected(name: str, here: Path) -> None:
    save(here / "odd.safetensors", {name: np.zeros(2, F32), name + "3": np.zeros(2, F32)})
    done("inspect", "odd.safetensors")
    assert json.loads(done("inspect", "odd.safetensors", "--json"))["tree"]["tensors"] == 2


def test_names_cannot_drive_the_terminal(here: Path) -> None:
    # As a name from the network could: clear the screen, set the title, …
    save(here / "odd.safetensors", {"a\x1b[2J\x1b]0;pwned\x07.w": np.zeros(2, F32)})
    for arguments in (("inspect", "odd.safetensors"), ("inspect", "odd.safetensors", "--tensors")):
        assert "\x1b" not in done(*arguments)
    assert "\x1b" not in mistake("merge", "odd.safetensors", A)


def test_inspect_json(gan: Path) -> None:
    content = json.loads(done("inspect", "gan.safetensors", "--json"))
    assert content["path"] == "gan.safetensors"
    assert content["metadata"] == {"format": "pt", "note": "x" * 200}
    tree = content["tree"]
    assert (tree["tensors"], tree["parameters"], tree["nbytes"]) == (26, 248, 990)
    assert tree["dtypes"] == {"F32": 24, "F16": 1, "I64": 1}
    blocks = tree["children"][0]["children"][0]
    assert blocks["name"] == "blocks"
    assert [(c["name"], c.get("repeats")) for c in blocks["children"]] == [
        ("0…10", 11),
        ("11", None),
    ]
    tensors = json.loads(done("inspect", "gan.safetensors", "--json", "--tensors"))["tensors"]
    assert len(tensors) == 26
    assert {"name": "steps", "dtype": "I64", "shape": [], "nbytes": 8}.items() <= tensors[0].items()


def test_inspect_shows_the_lineage_as_a_tree(here: Path) -> None:
    done(*MERGE, "--beta", "0.5", "-o", "inner.safetensors")
    done("merge", "inner.safetensors", A, "--weights", "1,3", "--layers", "disc.*")
    lines = done("inspect", "soup.safetensors", "--lineage").splitlines()
    assert (
        lines[0]
        == "soup.safetensors ← linear, weights [1.0, 3.0], rest first, layers disc.* → merge"
    )
    assert "inner.safetensors ← linear, beta 0.5" in lines[1]
    assert sum("a.safetensors" in line for line in lines) == 2
    content = json.loads(done("inspect", "soup.safetensors", "--lineage", "--json"))
    assert [made["beta"] for made in content["lineage"]["ancestors"].values()] == [0.5]
    assert "holds no lineage\n" in done("inspect", A, "--lineage")
    assert json.loads(done("inspect", A, "--lineage", "--json"))["lineage"] is None


# soup diff


@pytest.fixture
def differing(here: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    normal = np.random.default_rng(4).normal
    a: dict[str, np.ndarray] = {
        "G.conv.weight": normal(size=(3, 70_000)).astype(F32),
        "G.conv.bias": normal(size=5).astype(F32),
        "G.same": normal(size=5).astype(F32),
        "G.half": normal(size=9).astype(np.float16),
        "G.shape": np.zeros(2, F32),
        "G.kind": np.zeros(2, F32),
        "D.first": np.zeros(2, F32),
        "D.ids": np.arange(3),
        "D.mask": np.array([True, False]),
    }
    b = {
        **{n: a[n] + normal(size=a[n].shape).astype(F32) for n in ("G.conv.weight", "G.conv.bias")},
        "G.same": a["G.same"].copy(),
        "G.half": a["G.half"].astype(np.float64) * 2,
        "G.shape": np.zeros(3, F32),
        "G.kind": np.zeros(2, np.int32),
        "D.second": np.zeros(2, F32),
        "D.ids": np.arange(3),
        "D.mask": np.array([True, True]),
    }
    save(here / A, a)
    save(here / B, b)
    return a, b


@pytest.mark.parametrize(
    ("by", "name", "tensors"),
    [
        ("tensor", "G.conv.weight", ["G.conv.weight"]),
        ("layer", "G.conv", ["G.conv.weight", "G.conv.bias"]),
        ("group", "G", ["G.conv.weight", "G.conv.bias", "G.same", "G.half"]),
    ],
)
def test_diffs_numbers_are_those_of_numpy(
    by: str, name: str, tensors: list[str], differing: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    a, b = (np.concatenate([m[n].reshape(-1).astype(float) for n in tensors]) for m in differing)
    report = json.loads(done("diff", A, B, "--by", by, "--json"))
    row = next(row for row in report["rows"] if row["name"] == name)
    assert (row["tensors"], row["parameters"], row["equal"]) == (len(tensors), a.size, False)
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert row["cosine"] == pytest.approx(cosine, rel=1e-12)
    relative = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    assert row["relative_l2"] == pytest.approx(relative, rel=1e-12)
    assert row["sign_agreement"] == float(np.mean(np.sign(a) == np.sign(b)))


def test_diff_tells_missing_and_mismatched_names(
    differing: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    report = json.loads(done("diff", A, B, "--by", "tensor", "--json"))
    assert report["equal"] is False
    assert report["only_in_first"] == ["D.first"]
    assert report["only_in_second"] == ["D.second"]
    assert sorted(report["mismatched"], key=lambda m: m["name"]) == [
        {"name": "G.kind", "first": "F32 [2]", "second": "I32 [2]"},
        {"name": "G.shape", "first": "F32 [2]", "second": "F32 [3]"},
    ]
    rows = {row["name"]: row for row in report["rows"]}
    assert {name: row["equal"] for name, row in rows.items()} == {
        "G.conv.weight": False, "G.conv.bias": False, "G.same": True, "G.half": False,
        "D.ids": True, "D.mask": False,
    }  # fmt: skip
    assert rows["D.mask"]["cosine"] is None  # not a float

    printed = done("diff", A, B)
    assert "only in the first: 1 tensor\n  D.first\n" in printed
    assert "G.shape: F32 [2] | F32 [3]" in printed
    assert "the two are equal" not in printed


def test_equal_checkpoints_are_equal(here: Path) -> None:
    save(here / "same.safetensors", {n: t.astype(np.float16) for n, t in load_file(A).items()})
    printed = done("diff", A, "same.safetensors")  # 1.0 is the same value in both
    assert printed.splitlines() == ["equal: 2 layers of 2", "the two are equal"]
    report = json.loads(done("diff", A, "same.safetensors", "--json"))
    assert report["equal"] is True
    assert report["total"]["cosine"] == pytest.approx(1)
    assert report["total"]["relative_l2"] == 0
    assert report["total"]["sign_agreement"] == 1


def test_what_has_no_direction_has_no_cosine(here: Path) -> None:
    save(here / A, {"x": np.zeros(2, F32), "e": np.zeros(0, F32)})
    save(here / B, {"x": np.ones(2, F32), "e": np.zeros(0, F32)})
    rows = {r["name"]: r for r in json.loads(done("diff", A, B, "--json"))["rows"]}
    assert (rows["x"]["cosine"], rows["x"]["relative_l2"]) == (None, None)  # 0/0, 1/0
    assert rows["e"]["equal"] is True
    distances = {row.name: row.relative_l2 for row in modelsoup.diff(A, B).rows}
    assert distances == {"x": float("inf"), "e": 0.0}
    assert "inf" in done("diff", A, B, "--by", "tensor")


@pytest.mark.parametrize("by", ["tensor", "layer", "group"])
def test_with_a_base_diff_compares_task_vectors(
    by: str, here: Path, differing: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    a, b = differing
    names = {
        "tensor": ["G.conv.weight"], "layer": ["G.conv.weight", "G.conv.bias"],
        "group": ["G.conv.weight", "G.conv.bias", "G.same", "G.half"],
    }[by]  # fmt: skip
    base = {name: (a[name] + b[name] + 1).astype(F32) for name in names}
    base["G.conv.weight"][0, :9] = b["G.conv.weight"][0, :9]  # which the second did not change
    save(here / "base.safetensors", base)
    report = json.loads(done("diff", A, B, "--by", by, "--base", "base.safetensors", "--json"))
    missing = [n for n in ("G.conv.weight", "G.conv.bias", "G.same", "G.half") if n not in base]
    assert report["not_in_base"] == missing
    flat = [np.concatenate([m[n].reshape(-1).astype(float) for n in names]) for m in (a, b, base)]
    c = flat[2]
    d, e = flat[0] - c, flat[1] - c
    row = next(row for row in report["rows"] if names[0].startswith(row["name"]))
    norms = [float(np.linalg.norm(v)) for v in (c, d, e)]
    assert row["first_moved"] == pytest.approx(norms[1] / norms[0], rel=1e-12)
    assert row["second_moved"] == pytest.approx(norms[2] / norms[0], rel=1e-12)
    assert row["task_cosine"] == pytest.approx(float(d @ e) / norms[1] / norms[2], rel=1e-12)
    changed = (d != 0) & (e != 0)
    assert changed.sum() < c.size
    assert row["task_sign_agreement"] == np.mean(np.sign(d) == np.sign(e), where=changed)
    printed = done("diff", A, B, "--by", by, "--base", "base.safetensors")
    assert f"{row['task_cosine']:.6f}" in printed
    assert ("not in the base: " in printed) == bool(missing)
    assert "task cosine" not in done("diff", A, B)


def test_a_model_that_is_its_base_has_no_task_vector_to_compare(here: Path) -> None:
    row = json.loads(done("diff", A, B, "--base", A, "--json"))["total"]
    assert (row["first_moved"], row["second_moved"]) == (0, 2)  # from 1 to 3
    assert (row["task_cosine"], row["task_sign_agreement"]) == (None, None)


def test_a_base_of_other_models_is_refused_by_diff(here: Path) -> None:
    save(here / "other.safetensors", {"gen.weight": np.ones(5, F32)})
    said = mistake("diff", A, B, "--base", "other.safetensors")
    assert "other.safetensors is no base of these two" in said
    assert "such as disc.conv.bias" in said


@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_nan_is_no_small_difference(which: str, here: Path) -> None:
    nan, one = {"x": np.array([np.nan, 1], F32)}, {"x": np.ones(2, F32)}
    save(here / A, one if which == "second" else nan)
    save(here / B, one if which == "first" else nan)
    report = modelsoup.diff(A, B)
    if which == "both":
        assert report.equal  # NaN counts as equal to NaN
        return
    assert not report.equal
    assert np.isnan(report.total.cosine)
    assert np.isnan(report.total.relative_l2)  # not 0
    assert json.loads(done("diff", A, B, "--json"))["total"]["relative_l2"] is None


# soup verify


def test_verify_finds_a_sound_soup_sound(here: Path) -> None:
    done(*MERGE)
    printed = done("verify", "soup.safetensors")
    assert "headers and byte ranges of 1 file are sound, 3 tensors" in printed
    assert "all float values are finite" in printed
    assert printed.count(": unchanged") == 2
    report = json.loads(done("verify", "soup.safetensors", "--json"))
    assert report["sound"] is True
    assert [check["intact"] for check in report["inputs"]] == [True, True]
    assert "no lineage" in done("verify", A)


def test_verify_fails_on_a_changed_input_and_not_on_one_that_is_gone(here: Path) -> None:
    done(*MERGE)
    save(here / B, load_file(A))
    result = soup("verify", "soup.safetensors")
    assert result.exit_code == 1
    assert "b.safetensors: CHANGED since it was read" in result.stdout
    assert "no longer what went into soup.safetensors: " in result.stderr
    (here / B).unlink()
    assert "input b.safetensors: not at hand" in done("verify", "soup.safetensors")
    (here / "elsewhere").mkdir()
    assert done("verify", "soup.safetensors", "--inputs", "elsewhere").count("not at hand") == 2


def test_verify_fails_on_nan_and_counts_it(here: Path) -> None:
    values = np.ones(200_000, F32)
    values[[0, 70_000, -1]] = [np.nan, np.inf, -np.inf]
    save(here / "bad.safetensors", {"good": np.ones(2, F32), "bad": values})
    result = soup("verify", "bad.safetensors")
    assert result.exit_code == 1
    assert "bad: 3 elements" in result.stdout
    result = soup("verify", "bad.safetensors", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["nonfinite"] == {"bad": 3}


def test_verify_finds_a_file_that_lost_its_end(here: Path) -> None:
    os.truncate(A, (here / A).stat().st_size - 1)
    assert "truncated: 1 bytes of tensor data are missing" in mistake("verify", A)


def test_a_lineage_that_cannot_be_read_is_one_sentence(here: Path) -> None:
    save(here / "odd.safetensors", {"x": np.zeros(1, F32)}, modelsoup='{"format":1,"inputs":[{}]}')
    for arguments in (("verify",), ("inspect", "--lineage")):
        assert "lineage" in mistake(*arguments, "odd.safetensors")


# soup methods


def test_methods_are_listed_and_described() -> None:
    printed = done("methods")
    for name in ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"):
        assert name in printed
    printed = done("methods", "ties")
    assert "Yadav et al." in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line.split()}
    assert "required" in rows["weight"]
    assert "1.0" in rows["density"]
    assert "0 to 1" in rows["density"]
    assert "lambda" in rows
    assert len(json.loads(done("methods", "--json"))) >= 6
    assert json.loads(done("methods", "slerp", "--json"))["parameters"][0]["name"] == "t"
    rows = {line.split()[0]: line for line in done("methods", "karcher").splitlines() if line}
    assert "at least 1" in rows["max_iter"]
    assert rows["reads"].endswith(": 2×")


def test_methods_are_sorted_by_what_they_are_for_and_then_by_what_they_cost() -> None:
    every = json.loads(done("methods", "--json"))
    names = [method["name"] for method in every]
    purposes = list(dict.fromkeys(method["purpose"] for method in every))
    assert purposes[:3] == ["average", "interpolate", "task vectors"]
    assert [m["purpose"] for m in every] == sorted(
        (m["purpose"] for m in every), key=purposes.index
    )  # fmt: skip
    for purpose in purposes:
        passes = [method["passes"] for method in every if method["purpose"] == purpose]
        assert passes == sorted(passes)
    costs = {method["name"]: (method["passes"], method["at_once"]) for method in every}
    assert costs["linear"] == costs["ram"] == (1, "block")
    assert costs["slerp"] == costs["dare_ties"] == (2, "block")  # a gram; a norm
    assert costs["ties"] == (2, "block")  # a threshold, of which a sample tells
    assert costs["della"] == (2, "row")
    lines = [line.split() for line in done("methods").splitlines()]
    printed = [words[0] for words in lines if words and words[0] in names]
    assert printed == names


# Entry points


PLUGIN = """
from pathlib import Path
Path("imported").touch()

from dataclasses import dataclass
import click
import numpy as np
import modelsoup

@click.command()
@click.argument("word")
def hello(word):
    "Say a word."
    click.echo(f"hello {word}")

@click.command()
def collects():
    import gc
    click.echo(gc.isenabled())

share = modelsoup.parameter(0.5, low=0, high=1, doc="of the first model")

@modelsoup.method("blend", models=(2, 2), summary="a blend of two")
def blend(x, share=share):
    return modelsoup.WeightedSum((share, 1 - share))

number = 3
"""
ENTRY_POINTS = """
[modelsoup.commands]
hello = soup_plugin:hello
collects = soup_plugin:collects
number = soup_plugin:number
absent = soup_plugin:absent
broken = soup_no_such_module:broken
merge = soup_plugin:hello

[modelsoup.methods]
blend = soup_plugin:blend
broken_method = soup_no_such_module:broken
"""


@pytest.fixture
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path on which there is another distribution, that offers commands and a method."""
    site = tmp_path_factory.mktemp("site")
    information = site / "soup_plugin-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: soup-plugin\nVersion: 1.0\n"
    )
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "soup_plugin.py").write_text(PLUGIN)
    return f"{site}{os.pathsep}{os.environ['PYTHONPATH']}"


def test_commands_of_other_packages_are_listed_without_an_import(plugin: str, here: Path) -> None:
    run = process("--help", PYTHONPATH=plugin)
    assert run.returncode == 0, run.stderr
    assert re.search(r"hello +\(from soup_plugin\)", run.stdout)
    assert len(re.findall(r"(?m)^ +merge ", run.stdout)) == 1
    near = process("helo", PYTHONPATH=plugin)
    assert near.returncode == 2
    assert "hello" in near.stderr
    assert process(*MERGE, PYTHONPATH=plugin).returncode == 0  # ours, whatever others offer
    assert not (here / "imported").exists()


def test_commands_of_other_packages_are_run_when_they_are_named(plugin: str) -> None:
    run = process("hello", "world", PYTHONPATH=plugin)
    assert (run.returncode, run.stdout) == (0, "hello world\n"), run.stderr
    assert "Say a word." in process("hello", "--help", PYTHONPATH=plugin).stdout


def test_commands_of_other_packages_run_with_the_garbage_collector_on(plugin: str) -> None:
    # A training run that never collects cycles runs out of memory.
    assert process("collects", PYTHONPATH=plugin).stdout == "True\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("number", "is no click command"),
        ("absent", "failed: "),
        ("broken", "No module named 'soup_no_such_module'"),
    ],
)
def test_a_command_of_another_package_that_fails_is_one_sentence(
    name: str, said: str, plugin: str
) -> None:
    run = process(name, PYTHONPATH=plugin)
    assert run.returncode == 1
    assert said in run.stderr
    assert run.stderr.count("\n") == 1
    assert process("--help", PYTHONPATH=plugin).returncode == 0
    assert process("methods", "linear", PYTHONPATH=plugin).returncode == 0


def test_methods_of_other_packages_are_listed_without_an_import(plugin: str, here: Path) -> None:
    run = process("methods", PYTHONPATH=plugin)
    assert run.returncode == 0, run.stderr  # one of them cannot be imported at all
    assert "blend" in run.stdout
    assert "linear" in run.stdout
    assert not (here / "imported").exists()
    assert "blend" in process(*MERGE, "--method", "blnd", PYTHONPATH=plugin).stderr
    assert not (here / "imported").exists()


def test_a_method_of_another_package_is_used_when_it_is_named(plugin: str, here: Path) -> None:
    printed = process("methods", "blend", PYTHONPATH=plugin).stdout
    assert "a blend of two" in printed
    assert "of the first model" in printed
    run = process(*MERGE, "--method", "blend", "--set", "share=0.25", PYTHONPATH=plugin)
    assert run.returncode == 0, run.stderr
    assert load_file(here / "soup.safetensors")["gen.weight"][0] == 2.5


# Start-up, terminals


@pytest.mark.parametrize(
    "code",
    [
        "import modelsoup; dir(modelsoup)",
        "from modelsoup.terminal.cli import main; main(['--help'], standalone_mode=False)",
        "from modelsoup.terminal.cli import main; main(['merge', '--help'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    imported = python(f"{code}\nimport sys; print(); print(*sys.modules)").splitlines()[-1].split()
    heavy = {"numpy", "rich", "networkx", "torch", "yaml", "ml_dtypes", "numba", "safetensors"}
    assert not heavy & set(imported)
    assert "modelsoup" in imported


def test_a_merge_needs_neither_torch_nor_networkx_nor_rich() -> None:
    imported = python(
        """
        import sys
        from modelsoup.terminal.cli import main
        main(["merge", "a.safetensors", "b.safetensors", "-q"], standalone_mode=False)
        print(*sys.modules)
        """
    ).split()
    assert not {"torch", "networkx", "rich", "yaml", "safetensors", "numba"} & set(imported)
    assert "numpy" in imported


def test_every_public_name_is_there() -> None:
    for name in modelsoup.__all__:
        assert getattr(modelsoup, name) is not None
    assert dir(modelsoup) == modelsoup.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        modelsoup.nonsense  # noqa: B018


def test_the_shell_can_complete_commands_and_options() -> None:
    def complete(words: str, number: int) -> list[str]:
        code = "from modelsoup.terminal.cli import main; main(prog_name='soup')"
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False,
            env={**os.environ, "_SOUP_COMPLETE": "bash_complete", "COMP_WORDS": words,
                 "COMP_CWORD": str(number)},
        )  # fmt: skip
        return [line.partition(",")[2] for line in run.stdout.splitlines()]

    assert set(complete("soup ", 1)) >= {"merge", "inspect", "diff", "convert", "methods", "verify"}
    assert complete("soup me", 1) == ["merge", "methods"]
    assert complete("soup merge --lay", 2) == ["--layers"]
    script = python(
        "from modelsoup.terminal.cli import main; main(prog_name='soup')",
        _SOUP_COMPLETE="bash_source",
    )
    assert "complete -o nosort -F _soup_completion soup" in script


def on_a_terminal(*arguments: object, **environment: str) -> tuple[int, str]:
    """Run a command whose every stream is a terminal: the exit code, and all that it wrote."""
    ours, its = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "modelsoup", *map(str, arguments)], stdin=its, stdout=its,
        stderr=its, env={**os.environ, "TERM": "xterm-256color", **environment},
    ) as running:  # fmt: skip
        os.close(its)
        written = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            written += part
        os.close(ours)
    return running.returncode, written.decode()


def test_a_deep_lineage_loses_nothing_on_a_narrow_terminal(here: Path) -> None:
    average = A
    for number in range(40):
        modelsoup.merge([average, B], f"{number}.safetensors", beta=0.9, workers=1, fsync=False)
        average = f"{number}.safetensors"
    code, written = on_a_terminal("inspect", "--lineage", average)
    assert code == 0
    assert written.count("← linear, beta 0.9") == 40
    (here / "tree.yaml").write_text(modelsoup.plan_text(average))
    code, written = on_a_terminal("plan", "tree.yaml")
    assert code == 0
    assert written.count("linear β 0.9 · ") == 40


COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])[0-9;]*m")


def test_a_terminal_shows_a_progress_bar_and_a_pipe_does_not(here: Path) -> None:
    code, written = on_a_terminal(*MERGE)
    assert code == 0
    assert "merging" in written
    assert "━" in written
    assert written.rstrip().count("soup.safetensors:") == 1
    run = process(*MERGE, "--force")
    assert "merging" not in run.stdout + run.stderr
    assert "\x1b" not in run.stdout + run.stderr
    for options in (("-q",), ("--json",), ("--dry-run",)):
        assert "merging" not in on_a_terminal(*MERGE, "--force", *options)[1]


def test_without_a_terminal_a_long_merge_says_each_minute_how_far_it_is(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 40.0)  # seconds: each other time that it is asked is a minute
    monkeypatch.setattr(
        "modelsoup.terminal.cli_shared.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    said = CliRunner().invoke(modelsoup.terminal.cli.main, [*MERGE, "--workers", "1"]).stderr
    lines = [line for line in said.splitlines() if "merging" in line]
    assert lines == ["   80.0 s  merging  100% of 144 B"]


def test_the_cursor_is_shown_again_after_the_bar(here: Path) -> None:
    for arguments in (MERGE, ("merge", A, "nope.safetensors")):
        written = on_a_terminal(*arguments)[1]
        assert written.count("\x1b[?25l") == written.count("\x1b[?25h")


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
@pytest.mark.parametrize("command", ["merge", "inspect", "mistake"])
def test_colours_are_off_where_they_are_not_wanted(
    command: str, environment: dict[str, str], batchnorm: None
) -> None:
    arguments = {"merge": MERGE, "inspect": ("inspect", A), "mistake": ("inspect", "nope")}[command]
    code, written = on_a_terminal(*arguments, **environment)
    assert code == (command == "mistake")
    assert written.strip()
    assert not COLOUR.search(written), written


def test_warnings_and_errors_have_colours_on_a_terminal(batchnorm: None) -> None:
    assert COLOUR.search(on_a_terminal(*MERGE)[1])
    assert COLOUR.search(on_a_terminal("inspect", "nope")[1])
