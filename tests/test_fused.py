"""Merges of merges in one pass: the same bytes, fewer of them moved."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import modelsoup
from modelsoup import NonfiniteError, RunError, Store, check, parse_tree, run

MODELS = "abcdef"
NESTED = """
soup: 1
models: {MODELS}
defaults: {merge: {beta: 0.3}}
tree:
  of:
    - {of: [{of: [a, b]}, {of: [c, d], merge: {beta: 0.9}}]}
    - {of: [e, {of: [f, a], merge: {layers: {"*weight": merge, rest: first}}}]}
""".replace("MODELS", ", ".join(f"{name}: {name}.safetensors" for name in MODELS))


@pytest.fixture(params=["bfloat16", "float16", "float32", "mixed"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Six models, in which rounding between two merges changes the result."""
    write(tmp_path, request.param)
    return tmp_path


def write(folder: Path, dtype: str = "float32") -> None:
    for seed, name in enumerate(MODELS):
        rng = np.random.default_rng(seed)
        kind = np.dtype(ml_dtypes.bfloat16 if dtype in ("bfloat16", "mixed") else dtype)
        other = np.dtype(np.float32) if dtype == "mixed" and seed % 2 else kind
        tensors = {
            "body.weight": rng.normal(size=(1100, 1000)).astype(kind),  # more than one slice
            "body.bias": rng.normal(size=1000).astype(other),
            "head.weight": rng.normal(size=(3, 5)).astype(kind),
            "norm.num_batches_tracked": np.array(seed * 7 % 5),
            "empty": np.zeros((0, 4), kind),
        }
        save_file(tensors, folder / f"{name}.safetensors", {"format": "np", "from": name})


def average(beta: float, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """As one merge writes it: computed in float32, rounded to the first one's dtype."""
    parts = np.float32(beta) * first.astype(np.float32), second.astype(np.float32)
    return np.asarray(parts[0] + np.float32(1 - beta) * parts[1]).astype(first.dtype)


def both(folder: Path, text: str, **options: object) -> tuple[bytes, bytes, modelsoup.RunReport]:
    """The result made one merge after the other, that of one pass, and the latter's report."""
    tree, _ = parse_tree(text, folder=folder)
    one_by_one = run(tree, folder / "plain.safetensors", store=folder / "plain", **options)
    fused = run(tree, folder / "fused.safetensors", store=folder / "fused", fuse=True, **options)
    assert len(one_by_one.computed) > len(fused.computed)
    plain = (folder / "plain.safetensors").read_bytes()
    return plain, (folder / "fused.safetensors").read_bytes(), fused


@pytest.mark.parametrize(("workers", "loops"), [(1, "0"), (3, "0"), (3, "1")])
def test_fused_merges_give_the_same_bytes_as_one_after_the_other(
    folder: Path, workers: int, loops: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MODELSOUP_FAST", loops)
    plain, fused, report = both(folder, NESTED, workers=workers)
    assert fused == plain
    found = modelsoup.open_checkpoint(folder / "fused.safetensors")
    for name in ("body.weight", "body.bias", "head.weight"):
        a, b, c, d, e, f = (
            modelsoup.open_checkpoint(folder / f"{model}.safetensors")[name] for model in MODELS
        )
        last = average(0.3, f, a) if name.endswith("weight") else f
        left = average(0.3, average(0.3, a, b), average(0.9, c, d))
        expected = average(0.3, left, average(0.3, e, last))
        assert found[name].dtype == expected.dtype
        assert found[name].tobytes() == expected.tobytes(), name
    assert report.computed == ("root",)
    assert [entry.record["node"] for entry in Store(folder / "fused").entries()] == ["root"]


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_linear", "task_arithmetic"])
def test_a_merge_that_sees_whole_tensors_may_be_the_last_of_a_pass(tmp_path: Path, method: str):
    write(tmp_path, "bfloat16")
    base = ", t: 0.4" if method == "slerp" else ", base: f.safetensors, weight: 0.7"
    base += ", density: 0.4" if method in ("ties", "dare_linear") else ""
    merge = f"{{method: {method}{base}, layers: {{norm*: first, rest: merge}}}}"
    text = f"""
soup: 1
models: {{a: a.safetensors, b: b.safetensors, c: c.safetensors, d: d.safetensors}}
tree: {{of: [{{of: [a, b], finetune: false}}, {{of: [c, d], finetune: false}}], finetune: false,
  merge: {merge}}}
"""
    plain, fused, report = both(tmp_path, text)
    assert fused == plain
    assert report.computed == ("root",)
    # Below the last, such a merge is written: what is above it needs its elements at once.
    outer = text.replace("of: [c, d],", f"of: [c, d], merge: {merge},")
    tree, _ = parse_tree(outer, folder=tmp_path)
    plan = check(tree, fuse=True)
    assert [node.fused for node in plan.nodes.values() if node.kind == "merge"].count(True) == (
        2 if method == "task_arithmetic" else 1
    )


def test_the_plan_predicts_the_bytes_of_a_fused_run(folder: Path):
    tree, _ = parse_tree(NESTED, folder=folder)
    plan = check(tree, fuse=True)
    report = run(tree, None, store=folder / "store", fuse=True)
    assert (plan.bytes_read, plan.bytes_written) == (report.bytes_read, report.bytes_written)
    assert [step.node for step in plan.steps] == list(report.computed)
    assert plan.bytes_read < check(tree).bytes_read
    assert plan.bytes_written < check(tree).bytes_written


def test_the_plan_counts_what_equal_merges_leave_unread_once_for_each(tmp_path: Path):
    """Leaves of equal headers are planned once, and all of their files are read."""
    for seed, name in enumerate("abcd"):
        tensors = {"head": np.full(1000, seed, np.float32), "w": np.full(50, seed, np.float32)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    text = """
soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors, d: d.safetensors}
defaults: {merge: {layers: {head: first, rest: merge}}}
tree: {of: [{of: [a, b]}, {of: [c, d]}]}
"""
    tree, _ = parse_tree(text, folder=tmp_path)
    assert check(tree, fuse=True).bytes_read == 4 * 4 * (1000 + 50)
    report = run(tree, None, store=tmp_path / "store", fuse=True)
    assert report.computed == ("root",)
    assert report.bytes_read == 4 * 4 * (1000 + 50)


def test_what_is_in_the_store_is_read_and_not_made_again(tmp_path: Path):
    write(tmp_path)
    inner = NESTED.rpartition("tree:")[0] + "tree: {of: [c, d], merge: {beta: 0.9}}"
    tree, _ = parse_tree(inner, folder=tmp_path)
    run(tree, None, store=tmp_path / "fused")
    plain, fused, report = both(tmp_path, NESTED)
    assert fused == plain
    root = report.records["root"]
    read = root["inputs"][0]["inputs"][1]
    assert read["digest"] and read["key"] and "inputs" not in read
    store = Store(tmp_path / "fused")
    again, _ = parse_tree(NESTED, folder=tmp_path)
    before = [entry.key for entry in store.entries() if entry.key != root["key"]]
    plan = check(again, done=before.__contains__, digest=store.digest, fuse=True)
    assert plan.bytes_read == report.bytes_read


def test_a_trainer_gets_a_file(tmp_path: Path):
    """Only merges are made on the way; what is fine-tuned is written first."""
    write(tmp_path)
    text = NESTED.replace(
        "{of: [a, b]}", "{of: [a, b], finetune: {trainer: 'trainers:Plain', add: 1}}"
    )
    tree, _ = parse_tree(text, folder=tmp_path)
    kinds = check(tree, fuse=True).nodes
    (tuned,) = [name for name, node in kinds.items() if node.kind == "finetune"]
    assert not kinds[tree.inputs(tuned)[0]].fused
    assert sum(node.fused for node in kinds.values()) == 4


def test_a_folder_and_its_config_come_along(tmp_path: Path):
    write(tmp_path, "float16")
    for name in MODELS:
        model = tmp_path / name
        model.mkdir()
        (tmp_path / f"{name}.safetensors").rename(model / "model.safetensors")
        (model / "config.json").write_text(json.dumps({"torch_dtype": "float16", "of": name}))
    text = NESTED.replace(".safetensors", "").replace("{beta: 0.9}", "{beta: 0.9, dtype: bf16}")
    text = text.replace("- {of: [{of: [a, b]}", "- {of: [{of: [a, b], merge: {dtype: bf16}}")
    tree, _ = parse_tree(text, folder=tmp_path)
    run(tree, tmp_path / "plain", store=tmp_path / "one")
    run(tree, tmp_path / "fused", store=tmp_path / "two", fuse=True)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    assert (
        json.loads((tmp_path / "fused" / "config.json").read_bytes())["torch_dtype"] == "bfloat16"
    )


@pytest.mark.parametrize("outer", ["dtype: bf16", "files_from: second, dtype: bf16", "beta: 0.5"])
def test_a_config_whose_dtype_was_another_on_the_way_is_the_same_bytes(outer: str, tmp_path: Path):
    """It once stayed as it was laid out, where its dtype was changed and changed back."""
    for name in "abcd":
        (tmp_path / name).mkdir()
        weights = {"w": np.ones((3, 2), ml_dtypes.bfloat16)}
        save_file(weights, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(
            json.dumps({"torch_dtype": "bfloat16", "of": name})
        )
    text = f"""
soup: 1
models: {{a: a, b: b, c: c, d: d}}
tree: {{of: [{{of: [a, b], merge: {{dtype: f32}}}}, {{of: [c, d], merge: {{dtype: f16}}}}],
  merge: {{{outer}}}}}
"""
    tree, _ = parse_tree(text, folder=tmp_path)
    assert sum(node.fused for node in check(tree, fuse=True).nodes.values()) == 2
    run(tree, tmp_path / "plain", store=tmp_path / "one")
    run(tree, tmp_path / "fused", store=tmp_path / "two", fuse=True)
    plain, fused = (
        [(tmp_path / out / name).read_bytes() for name in ("config.json", "model.safetensors")]
        for out in ("plain", "fused")
    )
    assert fused == plain
    dtype = "bfloat16" if "bf16" in outer else "float32"
    of = "c" if "second" in outer else "a"
    assert json.loads(fused[0]) == {"torch_dtype": dtype, "of": of}


@pytest.mark.parametrize(
    "inner",
    [
        "slices: ['1[0:2]', '2[1:3]']",
        "layers: {'*.layers.2.*': drop, '*': merge}",
        "chat_template: '{{ 1 }}'",
        "chat_template: ''",
        "tokenizer_from: second",
        "files_from: second",
    ],
)
def test_what_an_inner_merge_changes_in_its_folder_is_there_after_one_pass_too(
    inner: str, tmp_path: Path
):
    """The config once counted the layers of a model of the inner merge; its template was lost."""
    for seed, name in enumerate("abc"):
        stacked = inner.startswith("slices") and name == "c"
        layers = range(4 if stacked else 2 if "drop" in inner and name == "c" else 3)
        rng = np.random.default_rng(seed)
        (tmp_path / name).mkdir()
        weights = {f"model.layers.{n}.mlp.weight": rng.normal(size=(3, 2)) for n in layers}
        save_file(
            {**weights, "lm_head.weight": rng.normal(size=(4, 2))},
            tmp_path / name / "model.safetensors",
        )
        config = json.dumps({"num_hidden_layers": len(layers), "of": name})
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"of": name}))
    text = f"""
soup: 1
models: {{a: a, b: b, c: c}}
tree: {{of: [{{of: [a, b], merge: {{{inner}}}}}, c]}}
"""
    tree, _ = parse_tree(text, folder=tmp_path)
    run(tree, tmp_path / "plain", store=tmp_path / "one")
    run(tree, tmp_path / "fused", store=tmp_path / "two", fuse=True)
    plain, fused = (
        {p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("plain", "fused")
    )
    weights = plain.pop("model.safetensors"), fused.pop("model.safetensors")
    assert fused == plain
    assert len(weights[0]) == len(weights[1])
    first, second = (modelsoup.open_checkpoint(tmp_path / out) for out in ("plain", "fused"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    config = json.loads(plain["config.json"])
    count = {"slices": 4, "layers": 2}.get(inner.partition(":")[0], 3)
    assert config == {"num_hidden_layers": count, "of": "b" if inner[:5] == "files" else "a"}
    assert ("chat_template.jinja" in plain) == inner.startswith("chat_template")


def test_a_part_that_the_first_model_has_not_brings_its_folder_along(tmp_path: Path):
    for seed, name in enumerate("abc"):
        for part in ("unet", "vae") if name == "b" else ("unet",):
            inside = tmp_path / name / part
            inside.mkdir(parents=True)
            weights = np.random.default_rng(seed).normal(size=(3, 4))
            save_file({"w": weights}, inside / "diffusion_pytorch_model.safetensors")
            (inside / "config.json").write_text(json.dumps({"of": f"{name}/{part}"}))
    text = """
soup: 1
models: {a: a, b: b, c: c}
tree:
  of: [{of: [a, b], merge: {layers: {"vae/*": second}}}, c]
  merge: {layers: {"vae/*": first}}
defaults: {merge: {rest: merge}}
"""
    tree, _ = parse_tree(text, folder=tmp_path)
    assert not any(node.fused for node in check(tree, fuse=True).nodes.values())
    run(tree, tmp_path / "out", store=tmp_path / "store", fuse=True)
    vae = tmp_path / "out" / "vae"
    assert json.loads((vae / "config.json").read_text()) == {"of": "b/vae"}
    kept = modelsoup.open_checkpoint(tmp_path / "out")["vae/w"]
    assert np.array_equal(kept, np.random.default_rng(1).normal(size=(3, 4)))


def test_the_lineage_of_a_fused_result_gives_back_its_plan(tmp_path: Path):
    write(tmp_path)
    tree, _ = parse_tree(NESTED, folder=tmp_path)
    run(tree, tmp_path / "out.safetensors", store=tmp_path / "store", fuse=True)
    text = modelsoup.plan_text(modelsoup.open_checkpoint(tmp_path / "out.safetensors"))
    again, _ = parse_tree(text, folder=tmp_path)
    run(again, tmp_path / "again.safetensors", store=tmp_path / "other", fuse=True)
    first, second = (tmp_path / f"{name}.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    graph = modelsoup.lineage_graph(modelsoup.open_checkpoint(first))
    assert sum("method" in data for _, data in graph.nodes(data=True)) == 6  # the output among them
    assert modelsoup.verify(first).has_lineage


def test_infinity_in_between_is_found_where_it_arises(tmp_path: Path):
    write(tmp_path, "float16")
    for name in "ab":
        tensors = modelsoup.open_checkpoint(tmp_path / f"{name}.safetensors")
        large = {key: tensors[key] for key in tensors}
        large["head.weight"] = np.full((3, 5), 60000, np.float16)
        save_file(large, tmp_path / f"{name}.safetensors")
    text = NESTED.replace(
        "{of: [a, b]}", "{of: [a, b], merge: {weights: [1, 1], normalize: false}}"
    )
    tree, _ = parse_tree(text.replace("defaults: {merge: {beta: 0.3}}\n", ""), folder=tmp_path)
    with pytest.raises((NonfiniteError, RunError), match=r"\(15 in the result of root\.1\.1\)"):
        run(tree, None, store=tmp_path / "store", fuse=True)


def test_infinity_in_between_is_counted_once_by_a_merge_of_several_passes(tmp_path: Path):
    write(tmp_path, "float16")
    large = {"w": np.full((3, 5), 60000, np.float16)}
    for name in "abc":
        save_file(large, tmp_path / f"{name}.safetensors")
    text = """
soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors}
tree:
  of: [{of: [a, b], merge: {weights: [1, 1], normalize: false}}, c]
  merge: {method: slerp, t: 0.5}
"""
    tree, _ = parse_tree(text, folder=tmp_path)
    with pytest.raises((NonfiniteError, RunError), match=r"\(15 in the result of root\.1\)"):
        run(tree, None, store=tmp_path / "store", fuse=True)


KEPT = "layers: {mask: first, rest: merge}"
NESTED_MASKS = """
soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors, d: d.safetensors}
tree: {of: [{of: [{of: [a, b], merge: {INNER}}, c], merge: {MIDDLE}}, d], merge: {OUTER}}
"""


def masked(folder: Path, inner: str, middle: str, outer: str) -> str:
    """Models with a mask of which six elements are −∞, and a tree of three merges over them."""
    for seed, name in enumerate("abcd"):
        mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
        weight = np.random.default_rng(seed).normal(size=(50, 7)).astype(np.float32)
        save_file({"mask": mask, "w": weight}, folder / f"{name}.safetensors")
    text = NESTED_MASKS.replace("INNER", inner).replace("MIDDLE", middle)
    return text.replace("OUTER", outer)


@pytest.mark.parametrize(
    "merges",
    [
        (KEPT, KEPT, KEPT),
        (KEPT, f"dtype: bf16, {KEPT}", KEPT),
        (f"dtype: bf16, {KEPT}", KEPT, f"dtype: f32, {KEPT}"),
        (KEPT, "allow_nonfinite: [mask]", KEPT),
        ("allow_nonfinite: [mask]", KEPT, f"dtype: f16, {KEPT}"),
        (KEPT, KEPT, "method: slerp, t: 0.4, allow_nonfinite: true"),
    ],
)
def test_a_mask_of_infinity_passes_and_is_counted_in_every_merge_on_the_way(
    merges: tuple[str, str, str], tmp_path: Path
):
    plain, fused, report = both(tmp_path, masked(tmp_path, *merges))
    assert report.computed == ("root",)
    assert fused == plain
    made = modelsoup.read_lineage(tmp_path / "fused.safetensors")
    steps = [made, *made["ancestors"].values()]
    assert [step["nonfinite"] for step in steps] == [{"mask": 6}] * 3


def test_the_infinity_of_a_layer_that_is_stacked_twice_is_counted_once_below(tmp_path: Path):
    for name in "abc":
        tensors = {"model.layers.0.mask": np.float32([[0, -np.inf]]), "w": np.ones(3, np.float32)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    text = """
soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors}
defaults: {merge: {layers: {"*mask": first, rest: merge}}}
tree: {of: [{of: [a, b]}, c], merge: {slices: ["1[0:1]", "1[0:1]", "2[0:1]"]}}
"""
    plain, fused, _ = both(tmp_path, text)
    assert fused == plain
    made = modelsoup.read_lineage(tmp_path / "fused.safetensors")
    assert made["nonfinite"] == {f"model.layers.{n}.mask": 1 for n in (0, 1, 2)}
    assert [below["nonfinite"] for below in made["ancestors"].values()] == [
        {"model.layers.0.mask": 1}
    ]


def test_an_infinity_that_is_merged_is_refused_on_the_way_and_said_where(tmp_path: Path):
    tree, _ = parse_tree(masked(tmp_path, KEPT, KEPT, "beta: 0.5"), folder=tmp_path)
    said = (
        r"mask \(6 in d.safetensors, the second model\), mask \(6 in the result\), "
        r"mask \(6 in the result of root\.1, the first model\) "
    )
    with pytest.raises(RunError, match=said):
        run(tree, None, store=tmp_path / "store", fuse=True)


def test_integers_that_must_be_compared_first_are_not_fused(tmp_path: Path):
    write(tmp_path)
    for name in MODELS:
        tensors = modelsoup.open_checkpoint(tmp_path / f"{name}.safetensors")
        same = {key: tensors[key] for key in tensors} | {"steps": np.arange(3)}
        save_file(same, tmp_path / f"{name}.safetensors")
    tree, _ = parse_tree(NESTED, folder=tmp_path)
    assert not any(node.fused for node in check(tree, fuse=True).nodes.values())
    said = NESTED.replace("{merge: {beta: 0.3}", "{merge: {beta: 0.3, on_integer: first}")
    tree, _ = parse_tree(said, folder=tmp_path)
    assert sum(node.fused for node in check(tree, fuse=True).nodes.values()) == 5


@pytest.mark.parametrize("outer", ["beta: 0.3", "dtype: f32"])
def test_codes_whose_scales_are_read_first_are_not_fused(outer: str, tmp_path: Path):
    """They were, where the merge below only kept them, and no file had their scales."""
    for seed, name in enumerate("abc"):
        codes = np.arange(seed, seed + 12).reshape(3, 4).astype(ml_dtypes.float8_e4m3fn)
        scales = np.float32([[0.5], [0.25], [seed + 1]])
        tensors = {"w.weight": codes, "w.weight_scale": scales, "w.bias": scales.reshape(-1)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    text = f"""
soup: 1
models: {{a: a.safetensors, b: b.safetensors, c: c.safetensors}}
tree:
  of: [{{of: [a, b], merge: {{layers: {{"*weight": first, rest: merge}}}}}}, c]
  merge: {{{outer}}}
"""
    tree, _ = parse_tree(text, folder=tmp_path)
    assert not any(node.fused for node in check(tree, fuse=True).nodes.values())
    for fuse in (False, True):
        run(tree, tmp_path / f"{fuse}.safetensors", store=tmp_path / f"{fuse}", fuse=fuse)
    plain, fused = ((tmp_path / f"{fuse}.safetensors").read_bytes() for fuse in (False, True))
    assert fused == plain
    copied = text.replace(outer, "layers: {'*weight': first, rest: merge}")
    plain, fused, _ = both(tmp_path, copied)  # codes that are copied need no scales
    assert fused == plain


def test_a_leaf_that_changed_meanwhile_is_an_error(tmp_path: Path):
    write(tmp_path)
    tree, _ = parse_tree(NESTED, folder=tmp_path)

    def change(event: modelsoup.Event) -> None:
        if event.state == "fused" and event.node == "root.1":
            data = bytearray((tmp_path / "d.safetensors").read_bytes())
            data[-1] ^= 1
            (tmp_path / "d.safetensors").write_bytes(data)

    with pytest.raises((RunError, modelsoup.SoupError), match=r"d\.safetensors changed while"):
        run(tree, None, store=tmp_path / "store", fuse=True, watch=change)
