"""Renames and slices: which tensor of which model becomes a tensor of the output."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup import MismatchError, ParameterError, Recipe, RuleError, merge, open_checkpoint
from modelsoup.errors import speaking
from modelsoup.files.checkpoint import Checkpoint, TensorInfo
from modelsoup.files.names import is_embedding, layer_of
from modelsoup.merging.layout import parse_slices, slice_text
from modelsoup.merging.proposals import proposal
from modelsoup.merging.recipe import recipe_as_json
from modelsoup.merging.renames import Rename, literally, parse_renames, strip_prefix
from modelsoup.terminal.cli import main

WIDTH = 8


def shapes(layers: int, width: int = WIDTH, stack: str = "model.layers") -> dict[str, Any]:
    """A small language model's tensors."""
    found = {
        "model.embed_tokens.weight": (16, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (16, width),
    }
    for n in range(layers):
        found[f"{stack}.{n}.self_attn.q_proj.weight"] = (width, width)
        found[f"{stack}.{n}.mlp.up_proj.weight"] = (2 * width, width)
    return found


def write(
    path: Path, layers: int = 4, *, seed: int, prefix: str = "", width: int = WIDTH,
    stack: str = "model.layers",
) -> Path:  # fmt: skip
    generator = np.random.default_rng(seed)
    tensors = {
        prefix + name: generator.normal(size=shape).astype(np.float32)
        for name, shape in shapes(layers, width, stack).items()
    }
    save_file(tensors, path)
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write(tmp_path / "a.safetensors", seed=1)


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return write(tmp_path / "b.safetensors", layers=6, seed=2)


def made(tmp_path: Path, *models: Path, **options: Any) -> dict[str, np.ndarray]:
    merge(list(models), tmp_path / "out.safetensors", force=True, **options)
    return load_file(tmp_path / "out.safetensors")


# Names of layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up.weight", ("model.layers", 12, "mlp.up.weight")),
        ("h.0.ln_1.weight", ("h", 0, "ln_1.weight")),
        ("visual.transformer.resblocks.3.attn.w", ("visual.transformer.resblocks", 3, "attn.w")),
        (
            "encoder.block.3.layer.0.SelfAttention.q",
            ("encoder.block", 3, "layer.0.SelfAttention.q"),
        ),
        ("model.layers.3.mlp.experts.7.w1", ("model.layers", 3, "mlp.experts.7.w1")),
        ("unet/layers.1.w", ("unet/layers", 1, "w")),
        ("down_blocks.1.resnets.0.w", None),
        ("path.1.w", None),
        ("layers.w", None),
        ("layers.٣.w", None),
    ],
)
def test_the_layer_of_a_name_is_that_of_its_outermost_numbered_stack(
    name: str, layer: tuple[str, int, str] | None
):
    assert layer_of(name) == layer


def test_embeddings_stand_before_the_first_layer_and_heads_behind_the_last():
    before = (
        "model.embed_tokens.weight transformer.wte.weight pos_embed class_embedding shared.weight"
    )
    behind = "model.norm.weight lm_head.weight transformer.ln_f.bias embed_out.weight score.weight"
    assert all(map(is_embedding, before.split()))
    assert not any(map(is_embedding, behind.split()))


# Renames


def test_a_prefix_is_taken_off_the_model_that_has_it(a: Path, tmp_path: Path):
    other = write(tmp_path / "m.safetensors", seed=3, prefix="module.")
    first, second = load_file(a), load_file(other)
    for options in ({"renames": ["module.*=*"]}, {"renames": {"module.*": "*"}}):
        out = made(tmp_path, a, other, beta=0.25, **options)
        assert out.keys() == first.keys()
        for name, values in out.items():
            expected = np.float32(0.25) * first[name] + np.float32(0.75) * second[f"module.{name}"]
            np.testing.assert_array_equal(values, expected)


def test_by_command_a_prefix_a_rename_and_a_map_file_are_the_same(a: Path, tmp_path: Path):
    other = write(tmp_path / "m.safetensors", seed=3, prefix="module.")
    (tmp_path / "map.yaml").write_text("'module.*': '*'\n")
    outs = []
    for number, options in enumerate((
        ["--strip-prefix", "module."], ["--rename", "module.*=*"],
        ["--rename-map", str(tmp_path / "map.yaml")],
    )):  # fmt: skip
        out = tmp_path / f"{number}.safetensors"
        done = CliRunner().invoke(main, ["merge", str(a), str(other), "-o", str(out), *options])
        assert done.exit_code == 0, done.output
        outs.append(out.read_bytes())
    assert len(set(outs)) == 1


def test_a_prefix_without_its_dot_is_refused_and_the_hint_takes_both_off(a: Path, tmp_path: Path):
    """It once made `.layers.0.…`, and exited with 0."""
    other = write(tmp_path / "m.safetensors", seed=3, prefix="module.")
    out = tmp_path / "out.safetensors"
    merging = ["merge", str(a), str(other), "-o", str(out)]
    done = CliRunner().invoke(main, [*merging, "--strip-prefix", "module"])
    assert done.exit_code == 1 and not out.exists()
    assert done.output == (
        "Error: the rename 'module*=*' makes '.lm_head.weight' of 'module.lm_head.weight', "
        "no name (--rename 'module.*=*' takes the dot off too)"
        "\n"
    )
    assert CliRunner().invoke(main, [*merging, "--rename", "module.*=*"]).exit_code == 0
    assert load_file(out).keys() == load_file(a).keys()


def test_rules_speak_of_the_new_names_and_the_first_rename_that_matches_decides(
    a: Path, tmp_path: Path
):
    renames = ["lm_head.weight=head.w", "*.weight=*.w"]
    out = made(tmp_path, a, a, renames=renames, layers=["head.*=drop"])
    expected = {name.replace(".weight", ".w") for name in load_file(a)} - {"lm_head.w"}
    assert out.keys() == expected


def test_a_rename_of_one_model_leaves_the_others_alone(a: Path, tmp_path: Path):
    prefixed = write(tmp_path / "m.safetensors", seed=3, prefix="model.")
    out = made(tmp_path, prefixed, a, renames=["second:*=model.*"])
    assert out.keys() == load_file(prefixed).keys()


def test_a_base_model_is_renamed_too(a: Path, b: Path, tmp_path: Path):
    base = write(tmp_path / "base.safetensors", seed=5, prefix="module.")
    options: dict[str, Any] = {"method": "task_arithmetic", "weights": [1], "base": base}
    out = made(tmp_path, a, renames=["base:module.*=*"], **options)
    for name, values in load_file(a).items():
        np.testing.assert_allclose(out[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("renames", "message"),
    [
        (["modul.*=*"], r"the rename 'modul\.\*=\*' matches no tensor; did you mean 'model'"),
        (["model.norm.weight=lm_head.weight"],
         "the renames make one tensor of two in a.safetensors: lm_head.weight and "
         "model.norm.weight would both be lm_head.weight"),
        (["*.weight=*.w", "model.*=*"], r"'model.\*=\*' never applies: earlier ones take all"),
        (["module.*"], "is not PATTERN=NEW, such as 'module"),
        (["a*b*=*"], r"has 2 \* in its pattern and 1 in the new name"),
        (["=x"], "is empty on one side"),
        (["*weight=*"], r"makes 'lm_head\.' of 'lm_head\.weight', no name$"),
        (["lm_head.*=lm_head..*"], r"makes 'lm_head\.\.weight' of 'lm_head\.weight', no name$"),
        (["lm_head.weight*=*"], "leaves nothing of the name 'lm_head.weight'"),
        (["3:*=x.*"], "a rename is of model 3, but there are 2"),
        (["base:*=x.*"], r"a rename is of the base model \(base=…\)"),
        ([3], "renames has 3, which is no rename"),
        (7, "renames is 7, not 'PATTERN=NEW'"),
        ({"a": 1}, "renames has 'a' → 1, which are no names"),
    ],
)  # fmt: skip
def test_a_wrong_rename_is_one_sentence(renames: Any, message: str, a: Path, tmp_path: Path):
    with pytest.raises((RuleError, ParameterError), match=message):
        made(tmp_path, a, a, renames=renames)
    assert not (tmp_path / "out.safetensors").exists()


@given(st.text(min_size=1), st.text(min_size=1), st.sampled_from([None, 0, 1, 6, -1]))
def test_any_name_can_be_renamed_to_any_other(old: str, new: str, model: int | None):
    rename = Rename(literally(old), literally(new), model)
    assert parse_renames(str(rename)) == (rename,)
    assert parse_renames({rename.of_whom: rename.new}) == (rename,)


def test_a_prefix_of_any_characters_is_taken_off():
    assert parse_renames(str(strip_prefix("first:*[=."))) == (Rename("[f]irst:[*][[][=].*", "*"),)


# Renames that an error proposes


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "other",
    [{"prefix": "module."}, {"prefix": "_orig_mod."}, {"stack": "transformer.h"},
     {"prefix": "net.", "stack": "h"}],
)  # fmt: skip
def test_what_the_error_proposes_merges_the_models(
    other: dict[str, str], order: tuple[int, int], a: Path, tmp_path: Path
):
    models = [str(a), str(write(tmp_path / "o.safetensors", seed=3, **other))]
    models = [models[k] for k in order]
    out = tmp_path / "out.safetensors"
    done = CliRunner().invoke(main, ["merge", *models, "-o", str(out)])
    assert done.exit_code == 1 and "call the same tensors otherwise: " in done.output
    hint = shlex.split(done.output.rpartition(" (")[2].partition(" has them called alike")[0])
    assert CliRunner().invoke(main, ["merge", *models, "-o", str(out), *hint]).exit_code == 0
    assert load_file(out).keys() == load_file(models[0]).keys()
    with pytest.raises(MismatchError) as caught:
        merge(models, out, force=True)
    renames = eval(str(caught.value).rpartition("renames=")[2].partition(" has them")[0])
    merge(models, out, force=True, renames=renames)


def test_a_whole_other_naming_is_told_apart_by_shapes(tmp_path: Path):
    """Each shape is there once in a layer, so that no pair can be a wrong one."""
    first = {"model.norm.weight": 3, "model.layers.0.a.weight": 4, "model.layers.1.a.weight": 4,
             "model.layers.0.b.weight": 5, "model.layers.1.b.weight": 5}  # fmt: skip
    second = {"f": 3, "blocks.0.x": 4, "blocks.1.x": 4, "blocks.0.y": 5, "blocks.1.y": 5}
    paths = []
    for number, sizes in enumerate((first, second)):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(
            {n: np.full(size, n.count("1"), np.float32) for n, size in sizes.items()}, paths[-1]
        )
    with pytest.raises(MismatchError) as caught, speaking("plan"):
        merge(paths, tmp_path / "out.safetensors")
    assert str(caught.value).endswith(
        "(renames: {'blocks.*.x': 'model.layers.*.a.weight', 'blocks.*.y': "
        "'model.layers.*.b.weight', 'f': 'model.norm.weight'} has them called alike)"
    )


def test_tensors_that_could_be_taken_for_others_are_not_paired(tmp_path: Path):
    """Which of two tensors of one shape is which, nothing tells: a wrong pair would be merged."""
    for name, tensors in (("a", ("layers.0.q", "layers.0.k")), ("b", ("h.0.one", "h.0.two"))):
        save_file({n: np.ones(4, np.float32) for n in tensors}, tmp_path / f"{name}.safetensors")
    with pytest.raises(MismatchError, match="the models do not fit together: 2 tensors"):
        merge([tmp_path / f"{n}.safetensors" for n in "ab"], tmp_path / "out.safetensors")


# Slices


def test_layers_of_two_models_are_stacked_and_numbered_anew(a: Path, b: Path, tmp_path: Path):
    out = made(tmp_path, a, b, slices=["1[0:3]", "2[1:5]", "1[3:4]"])
    first, second = load_file(a), load_file(b)
    assert len(out) == 3 + 2 * 8
    sources = [(first, 0), (first, 1), (first, 2), *((second, n) for n in range(1, 5)), (first, 3)]
    for number, (model, layer) in enumerate(sources):
        for rest in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
            np.testing.assert_array_equal(
                out[f"model.layers.{number}.{rest}"], model[f"model.layers.{layer}.{rest}"]
            )


def test_embeddings_are_the_first_slices_norm_and_head_the_last_ones(
    a: Path, b: Path, tmp_path: Path
):
    out = made(tmp_path, a, b, slices=["1[0:3]", "2[1:5]"])
    first, second = load_file(a), load_file(b)
    np.testing.assert_array_equal(
        out["model.embed_tokens.weight"], first["model.embed_tokens.weight"]
    )
    for name in ("model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(out[name], second[name])


@pytest.mark.parametrize("workers", [1, 4])
def test_slices_merge_a_file_with_itself_and_files_in_any_order(
    workers: int, a: Path, b: Path, tmp_path: Path
):
    """Readers wait for each other's files: what one holds and another wants must have an order."""
    slices = ["1[0:2]+2[2:4]", "2[0:2]+1[0:2]", "1[0:4]+1[0:4]"]
    out = made(tmp_path, a, b, slices=slices, method="slerp", parameters={"t": 0.25},
               workers=workers)  # fmt: skip
    first, second = load_file(a), load_file(b)
    pairs = [((first, n), (second, n + 2)) for n in range(2)]
    pairs += [((second, n), (first, n)) for n in range(2)]
    pairs += [((first, n), (first, n)) for n in range(4)]
    for number, pair in enumerate(pairs):
        x, y = (model[f"model.layers.{n}.mlp.up_proj.weight"].astype(float) for model, n in pair)
        angle = np.arccos(min(1, (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)))
        parts = (
            (0.75, 0.25) if angle < 1e-3 else np.sin([0.75 * angle, 0.25 * angle]) / np.sin(angle)
        )
        np.testing.assert_allclose(
            out[f"model.layers.{number}.mlp.up_proj.weight"], parts[0] * x + parts[1] * y, atol=1e-5
        )


def test_task_vectors_of_slices_are_over_layers_of_the_base(a: Path, b: Path, tmp_path: Path):
    base = write(tmp_path / "base.safetensors", layers=5, seed=9)
    out = made(
        tmp_path, a, b, base=base, method="task_arithmetic", parameters={"weight": 0.25},
        slices=["1[0:2]+2[1:3]+base[3:5]", "base[0:1]+2[0:1]+1[2:3]"],
    )  # fmt: skip
    x, y, z = (load_file(path) for path in (a, b, base))

    def layer(model: dict[str, np.ndarray], number: int) -> np.ndarray:
        return model[f"model.layers.{number}.self_attn.q_proj.weight"]

    for number, (i, j, k) in enumerate([(0, 1, 3), (1, 2, 4), (2, 0, 0)]):
        # base + ¼·(x − base) + ¼·(y − base)
        expected = (layer(x, i) + layer(y, j)) / 4 + layer(z, k) / 2
        np.testing.assert_allclose(layer(out, number), expected, atol=1e-6)


def test_rules_may_speak_of_a_slice(a: Path, b: Path, tmp_path: Path):
    slices = ["1[0:2]+2[0:2]", "1[2:4]+2[2:4]"]
    out = made(tmp_path, a, b, slices=slices, layers=["slice:1=first"], rest="second")
    first, second = load_file(a), load_file(b)
    for name, values in out.items():
        layer = layer_of(name)
        is_first = is_embedding(name) if layer is None else layer.number < 2
        np.testing.assert_array_equal(values, (first if is_first else second)[name])
    with pytest.raises(RuleError, match="the pattern 'slice:3' matches no tensor"):
        made(tmp_path, a, b, slices=slices, layers=["slice:3=first"])


def test_of_several_stacks_those_are_sliced_that_are_named(tmp_path: Path):
    path = tmp_path / "t5.safetensors"
    names = ["shared.weight", *(f"{s}.block.{n}.layer.0.w" for s in ("encoder", "decoder")
                                for n in range(3))]  # fmt: skip
    save_file({name: np.full(2, k, np.float32) for k, name in enumerate(names)}, path)
    with pytest.raises(MismatchError) as caught:
        made(tmp_path, path, slices=["1[0:2]"])
    assert str(caught.value).endswith(
        "has several stacks of layers, decoder.block (3), encoder.block (3): say which, as in "
        "1:decoder.block[0:2]"
    )
    out = made(tmp_path, path, slices=["1:decoder.block[1:3]", "1:decoder.block[1:2]"])
    assert {name: int(values[0]) for name, values in out.items()} == {
        "shared.weight": 0, "encoder.block.0.layer.0.w": 1, "encoder.block.1.layer.0.w": 2,
        "encoder.block.2.layer.0.w": 3, "decoder.block.0.layer.0.w": 5,
        "decoder.block.1.layer.0.w": 6, "decoder.block.2.layer.0.w": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (["1[0:3]", "2[4:7]"], r"the slice 2\[4:7\] goes past the end: b.safetensors has 6 layers"),
        (["1[2:2]"], r"the slice '1\[2:2\]' has no layers"),
        (["1[0:2]+2[0:3]"], "merges ranges of different lengths"),
        (["1[0:2]+2[0:2]", "1[2:4]"], "is of 2 models, and '1.2:4.' of 1: all must be of as many"),
        (["1[0:2]"], "no slice has layers of the second model"),
        (["1[0:2]", "3[0:2]"], "a slice is of model 3, but there are 2"),
        (["1[0:2]+base[0:2]", "2[0:1]"], r"a slice is of the base model \(base=…\)"),
        (["base[0:2]"], "must have layers of models, and of the base once"),
        (["1[0:2"], "has '1.0:2', which is not MODEL"),
        (["1[-1:2]"], "which is not MODEL"),
        (["1:encoder.layers[0:2]", "2[0:2]"], "no layers called 'encoder.layers'; did you"),
        ([7], "slices has 7, which is no slice"),
        (7, "slices is 7, not 'MODEL"),
    ],
)  # fmt: skip
def test_a_wrong_slice_is_one_sentence(slices: Any, message: str, a: Path, b: Path, tmp_path: Path):
    with pytest.raises((RuleError, ParameterError, MismatchError), match=message) as caught:
        made(tmp_path, a, b, slices=slices)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.safetensors").exists()


def test_layers_of_models_of_other_widths_are_not_stacked(a: Path, tmp_path: Path):
    other = write(tmp_path / "w.safetensors", seed=4, width=4)
    with pytest.raises(MismatchError) as caught:
        made(tmp_path, a, other, slices=["1[0:2]", "2[2:4]"])
    assert str(caught.value) == (
        "layers of a.safetensors and of w.safetensors cannot be stacked: 2 tensors are of other "
        "shapes, such as mlp.up_proj.weight ([16, 8] and [8, 4])"
    )


def test_a_model_without_layers_is_not_sliced(a: Path, tmp_path: Path):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(MismatchError, match=r"w.safetensors has no layers that a slice could take"):
        made(tmp_path, a, tmp_path / "w.safetensors", slices=["1[0:2]", "2[0:1]"])


def test_layers_that_are_called_otherwise_are_renamed_first(a: Path, tmp_path: Path):
    other = write(tmp_path / "h.safetensors", seed=3, stack="transformer.h")
    slices = ["1[0:2]", "2[2:4]"]
    with pytest.raises(
        MismatchError, match=r"calls its layers model.layers.*transformer.h"
    ) as caught:
        made(tmp_path, a, other, slices=slices)
    renames = eval(str(caught.value).rpartition("renames=")[2].partition(" has them")[0])
    out = made(tmp_path, a, other, slices=slices, renames=renames)
    np.testing.assert_array_equal(
        out["model.layers.3.mlp.up_proj.weight"],
        load_file(other)["transformer.h.3.mlp.up_proj.weight"],
    )


def test_float8_codes_keep_the_scales_of_their_layer(tmp_path: Path):
    import ml_dtypes

    from modelsoup.files.checkpoint import SUFFIX
    from modelsoup.files.writer import CheckpointWriter, OutputTensor, layout

    paths = []
    for model in range(2):
        codes = {f"layers.{n}.w": np.full((4, 4), n + 1, ml_dtypes.float8_e4m3fn) for n in range(3)}
        scales = {f"layers.{n}.w_scale": np.float32(10.0**n * (model + 1)) for n in range(3)}
        arrays: dict[str, Any] = {**codes, **{n: np.asarray(v) for n, v in scales.items()}}
        path = tmp_path / f"{model}{SUFFIX}"
        (file,) = layout(
            (
                OutputTensor(name, "F8_E4M3" if name in codes else "F32", array.shape)
                for name, array in arrays.items()
            ),
            file_name=path.name, shard_size=None,
        )  # fmt: skip
        with CheckpointWriter(path, [file], {}) as writer:
            offset = 0
            for tensor in file.tensors:
                raw = np.ascontiguousarray(arrays[tensor.name]).reshape(-1).view(np.uint8)
                writer.write(file.name, raw.data, offset)
                offset += raw.nbytes
            writer.commit()
        paths.append(path)
    merge(paths, tmp_path / "out.safetensors", slices=["1[2:3]+2[1:2]"], dtype="f32")
    out = load_file(tmp_path / "out.safetensors")
    assert list(out) == ["layers.0.w"]
    np.testing.assert_allclose(out["layers.0.w"], (3 * 100 + 2 * 20) / 2)
    merge(paths, tmp_path / "codes.safetensors", slices=["1[2:3]", "2[1:2]"])
    codes = open_checkpoint(tmp_path / "codes.safetensors")
    assert float(codes["layers.1.w"][0, 0]) == 2 and float(codes["layers.1.w_scale"]) == 20


# What is recorded, and what goes along


def test_a_lineage_makes_the_same_checkpoint_again(a: Path, b: Path, tmp_path: Path):
    prefixed = write(tmp_path / "m.safetensors", seed=3, prefix="module.", layers=6)
    recipe = Recipe(
        slices=["2[2:4]+1[1:3]", "1[0:2]+2[0:2]"], renames=["module.*=*"],
        layers=["slice:2=0.25"], rest="merge",
    )  # fmt: skip
    merge([a, prefixed], tmp_path / "out.safetensors", recipe)
    found = modelsoup.read_lineage(tmp_path / "out.safetensors")
    assert found is not None
    assert found["slices"] == ["2[2:4]+1[1:3]", "1[0:2]+2[0:2]"]
    assert found["renames"] == ["module.*=*"]
    plan = modelsoup.plan_text(tmp_path / "out.safetensors")
    (tmp_path / "tree.yaml").write_text(plan)
    done = CliRunner().invoke(
        main, ["run", str(tmp_path / "tree.yaml"), "-o", str(tmp_path / "again.safetensors"),
               "--store", str(tmp_path / "store")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    again, out = (load_file(tmp_path / f"{n}.safetensors") for n in ("again", "out"))
    assert again.keys() == out.keys() and all(np.array_equal(again[n], out[n]) for n in out)


def test_a_damaged_lineage_with_a_slice_that_is_none_is_refused(a: Path, tmp_path: Path):
    merge([a, a], tmp_path / "out.safetensors", slices=["1[0:2]+2[0:2]"])
    tensors = load_file(tmp_path / "out.safetensors")
    content = json.loads(open_checkpoint(tmp_path / "out.safetensors").metadata["modelsoup"])
    content["slices"] = ["1[2:0]"]
    save_file(tensors, tmp_path / "bad.safetensors", {"modelsoup": json.dumps(content)})
    with pytest.raises(modelsoup.CheckpointError, match=r"the slice '1\[2:0\]' has no layers"):
        modelsoup.read_lineage(tmp_path / "bad.safetensors")


def test_the_key_of_a_node_knows_renames_and_slices():
    plain, renamed, sliced = (
        recipe_as_json(Recipe(**o)) for o in ({}, {"renames": "a=b"}, {"slices": "1[0:1]"})
    )
    assert "renames" not in plain and "slices" not in plain
    assert renamed == {**plain, "renames": ["a=b"]} and sliced == {**plain, "slices": ["1[0:1]"]}


def test_a_slice_is_read_as_it_is_written():
    for text in ("1[0:16]", "1[0:16]+2[8:24]+base[0:16]", "3:encoder.layers[0:1]"):
        (found,) = parse_slices(text)
        assert slice_text(found) == text and parse_slices([found]) == (found,)
    assert parse_slices("first[0:1]+second[0:1]") == parse_slices("1[0:1]+2[0:1]")


def test_renames_and_slices_are_made_in_one_pass_with_what_is_below(
    a: Path, b: Path, tmp_path: Path
):
    text = f"""
soup: 1
models: {{a: {a}, b: {b}, m: {write(tmp_path / "m.safetensors", seed=3, prefix="module.")}}}
tree:
  of:
  - {{of: [a, m], merge: {{renames: {{'module.*': '*'}}, beta: 0.25}}}}
  - b
  merge: {{slices: ['1[0:2]+2[4:6]', '2[0:2]+1[2:4]']}}
"""
    (tmp_path / "tree.yaml").write_text(text)
    outs = []
    for number, options in enumerate(([], ["--fuse"])):
        out = tmp_path / f"{number}.safetensors"
        done = CliRunner().invoke(
            main, ["run", str(tmp_path / "tree.yaml"), "-o", str(out), "--store",
                   str(tmp_path / f"store{number}"), *options],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        outs.append(out.read_bytes())
    assert outs[0] == outs[1]
    x, y, z = (load_file(tmp_path / f"{n}.safetensors") for n in "abm")
    rest = "mlp.up_proj.weight"
    inner = 0.25 * x[f"model.layers.2.{rest}"] + 0.75 * z[f"module.model.layers.2.{rest}"]
    np.testing.assert_allclose(
        load_file(tmp_path / "0.safetensors")[f"model.layers.2.{rest}"],
        (y[f"model.layers.0.{rest}"] + inner) / 2, rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    made = [entry.record["node"] for entry in modelsoup.Store(tmp_path / "store1").entries()]
    assert made == ["root"]


def folder(path: Path, layers: int, config: dict[str, Any], seed: int) -> Path:
    path.mkdir()
    write(path / "model.safetensors", layers=layers, seed=seed)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_config_counts_the_layers_that_were_stacked(tmp_path: Path):
    types = [["full", "sliding", "full", "sliding"], ["f0", "f1", "f2", "f3", "f4", "f5"]]
    a, b = (
        folder(
            tmp_path / name, len(types[k]),
            {"num_hidden_layers": len(types[k]), "layer_types": types[k], "hidden_size": WIDTH}, k,
        ) for k, name in enumerate("ab")
    )  # fmt: skip
    report = merge([a, b], tmp_path / "out", slices=["1[0:3]", "2[2:6]"])
    assert [n.message for n in report.notices] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "num_hidden_layers": 7, "layer_types": ["full", "sliding", "full", "f2", "f3", "f4", "f5"],
        "hidden_size": WIDTH,
    }  # fmt: skip


def test_a_file_of_options_may_have_renames_and_slices(a: Path, tmp_path: Path):
    write(tmp_path / "m.safetensors", seed=3, prefix="module.")
    (tmp_path / "merge.yaml").write_text(
        f"models: [{a.name}, m.safetensors]\noutput: out.safetensors\n"
        "renames: {'module.*': '*'}\nslices: ['1[0:1]', '2[2:4]']\n"
    )
    done = CliRunner().invoke(main, ["merge", "--config", str(tmp_path / "merge.yaml")])
    assert done.exit_code == 0, done.output
    out, other = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "m.safetensors")
    for number in (1, 2):
        rest = f"{number + 1}.mlp.up_proj.weight"
        np.testing.assert_array_equal(
            out[f"model.layers.{number}.mlp.up_proj.weight"], other[f"module.model.layers.{rest}"]
        )


def test_a_map_file_that_is_no_mapping_is_refused(a: Path, tmp_path: Path):
    (tmp_path / "map.json").write_text('["a"]')
    options = ["--rename-map", str(tmp_path / "map.json"), "-o", str(tmp_path / "out.safetensors")]
    done = CliRunner().invoke(main, ["merge", str(a), str(a), *options])
    assert done.exit_code == 1
    assert "map.json is no mapping from patterns of names to new names" in done.output


def test_a_config_of_another_model_goes_along_where_it_is_named(tmp_path: Path):
    a, b = (folder(tmp_path / name, 4, {"made": name, "dtype": "float64"}, k)
            for k, name in enumerate("ab"))  # fmt: skip
    merge([a, b], tmp_path / "out", files_from="second", model_card=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "made": "b", "dtype": "float32",
    }  # fmt: skip
    assert "base_model: [a, b]" in (tmp_path / "out" / "README.md").read_text()
    for options, message in (
        ({"files_from": "third"}, "files_from is 'third', not a model: first, second, base or"),
        ({"files_from": "3"}, "files_from is model 3, but there are 2"),
        ({"tokenizer_from": "base"}, "tokenizer_from is the base model, but there is none"),
        ({"tokenizer_from": 1}, "a has no tokenizer: tokenizer_from=… takes another's"),
        ({"chat_template": 1}, "chat_template is 1, not a text"),
    ):
        with pytest.raises((ParameterError, MismatchError), match=message):
            merge([a, b], tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_one_layer_of_a_slice_is_at_the_end_of_a_gradient(a: Path, b: Path, tmp_path: Path):
    gradient = {"gradient": [0, 1]}
    out = made(tmp_path, a, b, slices=["1[0:1]+2[0:1]", "1[1:4]+2[1:4]"], method="slerp",
               parameters={"t": gradient})  # fmt: skip
    first, second = load_file(a), load_file(b)
    for number, model in ((0, second), (1, first), (3, second)):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        np.testing.assert_allclose(out[name], model[name], atol=1e-6)
    np.testing.assert_allclose(
        out["model.embed_tokens.weight"], first["model.embed_tokens.weight"], atol=1e-6
    )


@pytest.mark.parametrize("options", [{"renames": ["lm_head.*=head.*"]}, {"slices": ["1[0:1]"]}])
def test_adapters_are_folded_in_before_names_and_layers_are_others(
    options: dict[str, Any], a: Path, tmp_path: Path
):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    home = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{home}.lora_A.weight": (1, WIDTH), f"{home}.lora_B.weight": (WIDTH, 1)}
    save_file({n: np.ones(s, np.float32) for n, s in factors.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    out = tmp_path / "out.safetensors"
    with pytest.raises(ParameterError, match=r"adapters .*fold"):
        merge([a], out, lora={adapter: 1.0}, **options)
    merge([a], tmp_path / "folded.safetensors", lora={adapter: 1.0})
    merge([tmp_path / "folded.safetensors"], out, **options)
    assert len(load_file(out)) == (11 if "renames" in options else 5)


def test_names_of_many_tensors_are_paired_in_time():
    """Of 20,000 that all have other shapes, and names that have nothing in common."""

    def model(name: str) -> Checkpoint:
        infos = [
            TensorInfo(f"{name}.{n}.{name}", "F32", (n + 1,), Path(name), 0, 4 * n + 4)
            for n in range(20_000)
        ]
        return Checkpoint(Path(name), (), {i.name: i for i in infos}, {}, is_folder=False)

    begun = time.monotonic()
    assert proposal([model("a"), model("b")], None) is None  # more renames than a hint can have
    assert time.monotonic() - begun < 10
