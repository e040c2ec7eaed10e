"""Models of several tokenizers: rows of embeddings by token, as mergekit puts them in one order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup.files.writer import OutputTensor, layout
from modelsoup.merging.engine import SLICE
from modelsoup.merging.forms import BLOCK
from modelsoup.merging.merge import _execute
from modelsoup.terminal.cli import main

VECTORS = Path(__file__).parent / "data" / "mergekit_tokenizers.safetensors"
TENSORS = load_file(VECTORS)
with safe_open(VECTORS, "numpy") as file:
    MADE = json.loads(file.metadata()["vectors"])
CONFIGS: dict[str, str] = MADE["configs"]
OF_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")


def under(name: str) -> dict[str, np.ndarray]:
    start = f"{name}/"
    return {n.removeprefix(start): x for n, x in TENSORS.items() if n.startswith(start)}


def soup(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models base, a and b, as folders with their tokenizers."""
    monkeypatch.chdir(tmp_path)
    for model, text in MADE["tokenizers"].items():
        (tmp_path / model).mkdir()
        tensors = under(f"input/{model}")
        save_file(tensors, tmp_path / model / "model.safetensors")
        (tmp_path / model / "tokenizer.json").write_text(text)
        size = len(tensors["lm_head.weight"])
        config = {**MADE["config"], "vocab_size": size}
        (tmp_path / model / "config.json").write_text(json.dumps(config))
    return tmp_path


def tokens_of(folder: Path) -> dict[str, int]:
    """Token → number, by tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return {**content["model"]["vocab"], **added}


@pytest.mark.parametrize("case", CONFIGS)
def test_embeddings_are_those_that_mergekit_makes_token_by_token(case: str, here: Path):
    (here / "kit.yml").write_text(CONFIGS[case])
    done = soup("merge", "--config", "kit.yml", "-o", "out", "--quiet")
    assert done.exit_code == 0, done.output
    made, expected = load_file(here / "out" / "model.safetensors"), under(case)
    own, its = tokens_of(here / "out"), MADE["tokens"][case]
    assert own.keys() == its.keys() and made.keys() == expected.keys()
    order = [its[token] for token in sorted(own, key=own.__getitem__)]  # a union has any order
    for name, values in expected.items():
        wanted = (
            values[order] if name in ("model.embed_tokens.weight", "lm_head.weight") else values
        )
        np.testing.assert_allclose(made[name], wanted, rtol=2e-6, atol=2e-7, err_msg=name)
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(own)


# What a row is made of


def model(name: str, tokens: str, seed: int, *, tokenizer: bool = True, **more: Any) -> np.ndarray:
    """A model folder with an embedding of a row for each letter, which is its token; and these."""
    rows = np.random.default_rng(seed).normal(size=(len(tokens), 3)).astype(np.float32)
    Path(name).mkdir()
    save_file({"wte.weight": rows, **more}, Path(name, "model.safetensors"))
    if tokenizer:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})
        Path(name, "tokenizer.json").write_text(text)
    return rows


def merged(*arguments: str) -> np.ndarray:
    done = soup("merge", *arguments, "-o", "out", "--force")
    assert done.exit_code == 0, done.output
    found: np.ndarray = load_file("out/model.safetensors")["wte.weight"]
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_a_model_lacks_is_the_mean_of_those_that_have_it(folder: Path):
    a, b, c = model("a", "xyzw", 1), model("b", "zxq", 2), model("c", "qy", 3)
    found = merged("a", "b", "c", "--tokenizer-from", "first", "--weights", "1,2,4")
    rows = {  # of each model: its own, or the mean of the others that have the token
        "x": (a[0], b[1], (a[0] + b[1]) / 2),
        "y": (a[1], (a[1] + c[1]) / 2, c[1]),
        "z": (a[2], b[0], (a[2] + b[0]) / 2),
        "w": (a[3], a[3], a[3]),
    }  # fmt: skip
    wanted = [(x + 2 * y + 4 * z) / 7 for x, y, z in rows.values()]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_what_a_model_lacks_is_that_of_the_model_whose_files_go_along(folder: Path):
    a, b, c = model("a", "xyz", 1), model("b", "yx", 2), model("c", "zy", 3)
    options = ["--tokenizer-from", "first", "--weights", "1,2,4"]
    found = merged("a", "b", "c", *options, "--files-from", "second")
    rows = ((a[0], b[1], b[1]), (a[1], b[0], c[1]), (a[2], (a[2] + c[0]) / 2, c[0]))
    np.testing.assert_allclose(found, [(x + 2 * y + 4 * z) / 7 for x, y, z in rows], rtol=1e-6)


def test_a_task_vector_of_a_token_that_a_model_lacks_is_none(folder: Path):
    base, a, b = model("base", "xy", 1), model("a", "yxz", 2), model("b", "zy", 3)
    options = ["--method", "task_arithmetic", "--base", "base", "--weights", "0.5,0.25"]
    found = merged("a", "b", *options, "--tokenizer-from", "base")
    x = base[0] + 0.5 * (a[1] - base[0])
    y = base[1] + 0.5 * (a[0] - base[1]) + 0.25 * (b[1] - base[1])
    np.testing.assert_allclose(found, [x, y], rtol=1e-5, atol=1e-6)
    z = (a[2] + b[0]) / 2  # the base's, which lacks it
    z = z + 0.5 * (a[2] - z) + 0.25 * (b[0] - z)
    found = merged("a", "b", *options, "--tokenizer-from", "first")
    np.testing.assert_allclose(found, [y, x, z], rtol=1e-5, atol=1e-6)


def test_a_number_that_is_no_tokens_has_a_row_of_zeros(folder: Path):
    a, b = model("a", "xyz", 1), model("b", "yx", 2)
    Path("a/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 2}}}))
    found = merged("a", "b", "--tokenizer-from", "first")
    np.testing.assert_allclose(found, [(a[0] + b[1]) / 2, np.zeros(3), (a[2] + b[0]) / 2])


def test_rows_behind_the_last_token_are_left_out_where_models_have_other_numbers_of_them(
    folder: Path,
):
    a, b = model("a", "xyzw", 1), model("b", "xyzwv", 2)
    for name in "ab":
        Path(name, "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 1}}}))
    np.testing.assert_allclose(
        merged("a", "b", "--tokenizer-from", "first"), (a[:2] + b[:2]) / 2, rtol=1e-6
    )


def test_rows_behind_the_last_token_stay_where_nothing_has_to_be_put_in_order(folder: Path):
    a, b = model("a", "xyz", 1), model("b", "xyz", 2)
    for name in "ab":
        Path(name, "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 1}}}))
    found = merged("a", "b", "--tokenizer-from", "first")
    np.testing.assert_allclose(found, (a + b) / 2, rtol=1e-6)


def test_a_tensor_that_is_kept_is_put_in_order_too_and_is_not_rounded(folder: Path):
    a = model("a", "xyzw", 1)
    model("b", "wyx", 2)
    stored = a.astype(ml_dtypes.bfloat16)
    stored[0] = (-0.0, 1e-40, 3.0)
    save_file({"wte.weight": stored, "other": a[0, :2]}, "a/model.safetensors")
    save_file({"wte.weight": stored[:3], "other": a[0, :2]}, "b/model.safetensors")
    found = merged("a", "b", "--tokenizer-from", "second", "--layers", "wte.*=first")
    assert found.dtype == stored.dtype
    assert found.tobytes() == stored[[3, 1, 0]].tobytes()


def test_biases_of_heads_have_a_number_for_each_token(folder: Path):
    bias = np.arange(3, dtype=np.float32)
    model("a", "xyz", 1, **{"lm_head.bias": bias})
    model("b", "zyx", 2, **{"lm_head.bias": bias})
    merged("a", "b", "--tokenizer-from", "first")
    found = load_file("out/model.safetensors")["lm_head.bias"]
    np.testing.assert_array_equal(found, [1, 1, 1])


def test_slices_workers_and_passes_do_not_change_a_byte_and_read_what_was_planned(folder: Path):
    generator = np.random.default_rng(5)
    count, width = 1001, 167
    for name in "ab":
        order = generator.permutation(count + 200)[:count]
        Path(name).mkdir()
        vocabulary = {f"t{token}": number for number, token in enumerate(order.tolist())}
        Path(name, "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        rows = generator.normal(size=(count, width)).astype(ml_dtypes.bfloat16)
        save_file({"wte.weight": rows}, Path(name, "model.safetensors"))
    for method in (
        {},
        {"method": "ties", "base": "b", "parameters": {"density": 0.5, "weight": 1.0}},
    ):
        models = ["a"] if method else ["a", "b"]
        options: Any = {**method, "tokenizer_from": "first"}
        plan = modelsoup.merge(models, "x", dry_run=True, **options).plan
        made = []
        for slice_elements in (BLOCK, 2 * BLOCK, SLICE):
            for workers in (1, 3):
                out = folder / f"{len(models)}-{slice_elements}-{workers}.safetensors"
                read: list[int] = []
                files = layout(
                    [OutputTensor(s.name, s.dtype, s.shape) for s in plan.steps],
                    file_name=out.name, shard_size=None,
                )  # fmt: skip
                _execute(
                    plan, out, files, workers=workers, force=False, sha256=False, fsync=False,
                    progress=lambda n, _: read.append(n), slice_elements=slice_elements,  # noqa: B023
                )  # fmt: skip
                made.append(out.read_bytes())
                assert sum(read) == plan.bytes_streamed
        assert len(set(made)) == 1


# What goes along


def test_a_config_names_tokens_by_the_numbers_that_they_have_now(folder: Path):
    model("a", "xyz", 1)
    model("b", "zqyx", 2)
    config = {"vocab_size": 3, "eos_token_id": [0, 2], "text_config": {"pad_token_id": 1}, "n": 3}
    Path("a/config.json").write_text(json.dumps(config))
    Path("a/generation_config.json").write_text(json.dumps({"bos_token_id": 2, "pad_token_id": -1}))
    merged("a", "b", "--tokenizer-from", "second")
    assert json.loads(Path("out/config.json").read_text()) == {
        "vocab_size": 4, "eos_token_id": [3, 0], "text_config": {"pad_token_id": 2}, "n": 3,
    }  # fmt: skip
    made = json.loads(Path("out/generation_config.json").read_text())
    assert made == {"bos_token_id": 0, "pad_token_id": -1}
    Path("b/config.json").write_text(json.dumps({"eos_token_id": 1}))
    options = ["b", "a", "--tokenizer-from", "second", "-o", "other"]
    told = "config.json says eos_token_id: 1, but the output has no such token"
    assert told in soup("merge", *options).output
    assert soup("merge", *options, "--force", "--strict").exit_code == 1


def test_what_is_put_in_order_is_told(folder: Path):
    model("a", "xyz", 1)
    model("b", "zy", 2)
    done = soup("merge", "a", "b", "--tokenizer-from", "first", "-o", "out", "--dry-run")
    assert (
        "1 tensor is put in the order of the output's 3 tokens: wte.weight (the second model lacks "
        "1)" in done.output
    )


@pytest.mark.needs("test")
def test_a_union_of_tokenizers_numbers_all_tokens_for_the_library_too(here: Path):
    import tokenizers

    done = soup("merge", "a", "b", "--tokenizer-from", "union", "-o", "out")
    assert done.exit_code == 0, done.output
    loaded = tokenizers.Tokenizer.from_file("out/tokenizer.json")
    found = loaded.get_vocab()
    assert found == tokens_of(here / "out")
    assert found.keys() == {*tokens_of(here / "a"), *tokens_of(here / "b")}
    assert len(load_file("out/model.safetensors")["lm_head.weight"]) == len(found)
    text = "soup<pad>"
    assert loaded.encode(text).tokens[-1] == "<pad>"
    assert tokens_of(here / "a").items() <= found.items()


# What is refused

ORDER = ("a", "b", "--tokenizer-from", "first")


def refused(*arguments: str) -> str:
    done = soup("merge", *arguments, "-o", "out")
    assert done.exit_code == 1 and not Path("out").exists(), done.output
    return done.output.removeprefix("Error: ").rstrip("\n")


def test_a_model_whose_tokens_are_not_known_is_named(folder: Path):
    model("a", "xyz", 1)
    model("b", "zyxw", 2, tokenizer=False)
    wanted = (
        "b has no tokenizer.json that tells the tokens, by which the rows of embeddings are put in "
        "one order"
    )
    assert refused(*ORDER) == wanted
    for text in ("{", "[]", '{"model": {"vocab": {"x": "0"}}}', '{"model": {"vocab": {"x": -1}}}',
                 '{"model": {"vocab": {"x": true}}}', '{"model": {"vocab": []}}',
                 '{"model": {"vocab": {}}, "added_tokens": [1]}'):  # fmt: skip
        Path("b/tokenizer.json").write_text(text)
        assert refused(*ORDER) == wanted, text
    assert refused("b", "a", "--tokenizer-from", "union") == wanted


def test_more_tokens_than_rows_are_refused(folder: Path):
    model("a", "xyz", 1)
    model("b", "zyx", 2)
    Path("b/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 3}}}))
    told = "the tokenizer of b has tokens up to number 3, but its wte.weight has 3 rows"
    assert refused(*ORDER) == told


def test_a_tensor_that_may_have_a_row_for_each_token_is_refused(folder: Path):
    extra = np.zeros((2, 3), np.float32)
    norm = np.ones(3, np.float32)
    inside = {"h.0.weight": extra, "ln_f.weight": norm, "final_norm.bias": norm}
    model("a", "xyz", 1, **inside, **{"final_logits_bias": extra})
    model("b", "zyx", 2, **inside, **{"final_logits_bias": extra})
    assert refused(*ORDER) == (
        "final_logits_bias of a is as long as there are rows of embeddings, but its name does not "
        "tell whether it has a row for each token, which are put in another order"
    )


def test_models_without_a_tensor_of_a_row_for_each_token_are_refused(folder: Path):
    for name, tokens in (("a", "xyz"), ("b", "zyx")):
        model(name, tokens, 1)
        save_file({"strange": np.zeros((3, 2), np.float32)}, f"{name}/model.safetensors")
    assert refused(*ORDER) == (
        "b has other tokens than the output, but by its name no tensor is one of a row for each "
        "token"
    )


def test_rows_of_other_lengths_and_codes_are_refused(folder: Path):
    model("a", "xyz", 1)
    model("b", "zyx", 2)
    save_file({"wte.weight": np.zeros((3, 4), np.float32)}, "b/model.safetensors")
    assert refused(*ORDER) == "the rows of wte.weight are not of one length: [3, 3] and [3, 4]"
    for name in "ab":
        save_file({"wte.weight": np.zeros((3, 3), np.int8)}, f"{name}/model.safetensors")
    assert refused(*ORDER) == (
        "wte.weight of a is quantised, and the rows of codes are not put in another order: "
        "dequantise it first"
    )


def test_auxiliary_inputs_go_by_rows_as_they_were(folder: Path):
    model("a", "xyz", 1)
    model("b", "zyx", 2)
    told = refused(*ORDER, "--method", "fisher", "--aux", "fisher=a,b")
    assert told == (
        "rows of embeddings are put in another order, and auxiliary inputs go by the old one"
    )


# Trees


def test_a_tree_checks_makes_and_names_results_by_tokenizers(folder: Path):
    for seed, (name, tokens) in enumerate({"a": "xyz", "b": "zyx", "c": "qzy"}.items()):
        model(name, tokens, seed)
    Path("tree.yaml").write_text("""
soup: 1
models: {a: a, b: b, c: c}
tree:
  of: [{of: [a, b], merge: {tokenizer_from: second}, name: inner}, c]
  merge: {tokenizer_from: union}
""")
    planned = json.loads(soup("plan", "tree.yaml", "--json").stdout)
    assert planned["problems"] == []
    assert [node["parameters"] for node in planned["nodes"] if node["node"] == "root"] == [12]
    done = soup("run", "tree.yaml", "-o", "out", "--fuse", "-q")
    assert done.exit_code == 0, done.output
    assert tokens_of(folder / "out") == {"z": 0, "y": 1, "x": 2, "q": 3}
    a, b, c = (load_file(f"{name}/model.safetensors")["wte.weight"] for name in "abc")
    inner = (a[[2, 1, 0]] + b) / 2
    wanted = [(inner[0] + c[1]) / 2, (inner[1] + c[2]) / 2, inner[2], c[0]]
    found = load_file("out/model.safetensors")["wte.weight"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    Path("c/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"z": 0, "y": 1, "q": 2}}}))
    assert soup("run", "tree.yaml", "-o", "out", "--force", "-q").exit_code == 0
    again = load_file("out/model.safetensors")["wte.weight"]
    wanted = [(inner[0] + c[0]) / 2, (inner[1] + c[1]) / 2, inner[2], c[2]]
    np.testing.assert_allclose(again, wanted, rtol=1e-6)


def test_a_tree_says_what_tokenizers_do_not_allow_before_it_runs(folder: Path):
    model("a", "xyz", 1)
    model("b", "zyx", 2, tokenizer=False)
    save_file({"wte.weight": np.zeros((4, 3), np.float32)}, "b/model.safetensors")
    Path("tree.yaml").write_text(
        "soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b], merge: {tokenizer_from: first}}\n"
    )
    done = soup("plan", "tree.yaml")
    assert done.exit_code == 1 and "b has no tokenizer.json that tells the tokens" in done.output


def test_a_bases_tokenizer_is_part_of_a_key_where_rows_are_put_in_order(folder: Path):
    for seed, (name, tokens) in enumerate({"a": "xyz", "b": "zyx", "base": "xzy"}.items()):
        model(name, tokens, seed)
    Path("tree.yaml").write_text("""
soup: 1
models: {a: a, b: b}
tree:
  of: [a, b]
  merge: {method: task_arithmetic, weights: [1, 1], base: base, tokenizer_from: first}
""")
    assert soup("run", "tree.yaml", "-o", "out", "-q").exit_code == 0
    first = Path("out/model.safetensors").read_bytes()
    text = json.dumps({"model": {"vocab": {"y": 0, "z": 1, "x": 2}}})
    Path("base/tokenizer.json").write_text(text)
    assert soup("run", "tree.yaml", "-o", "out", "--force", "-q").exit_code == 0
    assert Path("out/model.safetensors").read_bytes() != first
