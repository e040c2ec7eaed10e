"""Which files of a folder are the model: families, shards, variants, parts; and what goes along."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup import CheckpointError, OutputError, merge, open_checkpoint
from modelsoup.errors import speaking


def save(path: Path, names: str, value: float = 0, **metadata: str) -> Path:
    """A file with a tensor of two elements for each name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.full(2, value, np.float32) for name in names.split()}
    save_file(tensors, path, metadata or None)
    return path


def write(folder: Path, files: Mapping[str, str], value: float = 0) -> Path:
    """A folder: file name → names of its tensors, or, for what holds no weights, its text."""
    for name, content in files.items():
        if name.endswith(".safetensors"):
            save(folder / name, content, value)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
    return folder


def index(**places: str) -> str:
    return json.dumps({"weight_map": places})


def inside(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# Families


@pytest.mark.parametrize("other", ["consolidated", "adapter_model", "ema", "a"])
def test_of_several_families_the_one_called_model_is_taken_and_it_is_said(
    other: str, tmp_path: Path
):
    """Today's repositories carry two formats of one model, or an adapter beside its base."""
    files = {"model.safetensors": "a b", f"{other}.safetensors": "c"}
    a, b = (write(tmp_path / name, files, value) for name, value in (("a", 1), ("b", 3)))
    assert list(open_checkpoint(a)) == ["a", "b"]
    report = merge([a, b], tmp_path / "out")
    assert [n.message for n in report.notices] == [
        f"{folder} holds 2 checkpoints: model was taken, not {other}" for folder in (a, b)
    ]
    assert {n.level for n in report.notices} == {"note"}
    assert inside(tmp_path / "out") == ["model.safetensors"]


def test_families_of_which_none_is_called_model_are_refused(tmp_path: Path):
    write(tmp_path, {"x.safetensors": "a", "y.safetensors": "b"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds 2 checkpoints, x, y: give the path of the one to use"
    )
    assert list(open_checkpoint(tmp_path / "y.safetensors")) == ["b"]


def test_an_index_and_shards_of_its_own_are_one_family(tmp_path: Path):
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    files = {
        first: "a", second: "b", "model.safetensors.index.json": index(a=first, b=second),
        "consolidated-00001-of-00001.safetensors": "c",
    }  # fmt: skip
    checkpoint = open_checkpoint(write(tmp_path, files))
    assert list(checkpoint) == ["a", "b"]
    assert checkpoint.notes == (
        f"{tmp_path} holds 2 checkpoints: model was taken, not consolidated",
    )


def test_a_variant_alone_is_the_model_and_stays_the_variant(tmp_path: Path):
    """As `save_pretrained(variant="fp16")` names it, in the older and the newer way."""
    for number, shards in enumerate(
        (
            [f"model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)],
            [f"model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)],
        )
    ):
        folder = tmp_path / str(number)
        files = dict(zip(shards, ("a", "b"), strict=True))
        files["model.safetensors.index.fp16.json"] = index(a=shards[0], b=shards[1])
        write(folder, {**files, "config.json": "{}"}, 1)
        assert list(open_checkpoint(folder)) == ["a", "b"]
        assert list(open_checkpoint(folder / "model.safetensors.index.fp16.json")) == ["a", "b"]
        out = tmp_path / f"out-{number}"
        merge([folder, folder], out)
        assert inside(out) == ["config.json", "model.fp16.safetensors"]
        assert list(open_checkpoint(out)) == ["a", "b"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards_of_a_variant_have_the_index_that_who_asks_for_it_looks_for(
    stem: str, tmp_path: Path
):
    shards = [f"{stem}.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    listing = f"{stem}.safetensors.index.fp16.json"
    files = {shards[0]: "a", shards[1]: "b", listing: index(a=shards[0], b=shards[1])}
    a = write(tmp_path / "a", files)
    merge([a, a], tmp_path / "out", shard_size=8)
    assert inside(tmp_path / "out") == sorted(files)
    assert list(open_checkpoint(tmp_path / "out")) == ["a", "b"]
    other = write(tmp_path / "b", {"v2.1.safetensors": "a b"})
    merge([other, other], tmp_path / "other", shard_size=8)
    assert "v2.1.safetensors.index.json" in inside(tmp_path / "other")


def test_a_variants_index_is_not_copied_beside_the_model(tmp_path: Path):
    """It would name shards that are not there, and be found first by who asks for the variant."""
    files = {
        "model.safetensors": "a", "model.fp16-00001-of-00002.safetensors": "a",
        "model.fp16-00002-of-00002.safetensors": "b", "config.json": "{}",
        "model.safetensors.index.fp16.json": index(a="model.fp16-00001-of-00002.safetensors"),
    }  # fmt: skip
    merge([write(tmp_path / n, files) for n in "ab"], tmp_path / "out")
    assert inside(tmp_path / "out") == ["config.json", "model.safetensors"]


# Shards


@pytest.mark.parametrize(
    "names",
    [
        ["model-00001-of-00002"],
        ["model-00001-of-00003", "model-00003-of-00003"],
        ["model-00001-of-00002", "model-00002-of-00002", "model-00003-of-00003"],
        ["model-00001-of-00001", "model"],
    ],
)
def test_shards_that_do_not_add_up_are_no_checkpoint(names: list[str], tmp_path: Path):
    write(tmp_path, {f"{name}.safetensors": f"t{n}" for n, name in enumerate(names)})
    with pytest.raises(CheckpointError, match=r"does not hold the \d shards of model, but model"):
        open_checkpoint(tmp_path)


def test_shards_that_hold_a_tensor_twice_are_no_checkpoint(tmp_path: Path):
    """To give one of them, as was once proposed, is refused with the proposal to give all."""
    write(tmp_path, {f"model-0000{n}-of-00002.safetensors": "w" for n in (1, 2)})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: 1 tensor is both in model-00001-of-00002.safetensors and in "
        f"model-00002-of-00002.safetensors (w): is one of them another checkpoint's?"
    )


def test_one_shard_is_half_a_model_and_not_merged(tmp_path: Path):
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    folders = [write(tmp_path / n, {names[0]: "a", names[1]: "b"}) for n in "ab"]
    shards = [folder / names[0] for folder in folders]
    for attempt in (
        lambda: merge(shards, tmp_path / "out.safetensors"),
        lambda: open_checkpoint(shards[0]),
        lambda: modelsoup.check(modelsoup.binary_tree(shards)).raise_problems(),
    ):
        with pytest.raises(modelsoup.SoupError) as caught:
            attempt()
        assert f"{shards[0]} is one of 2 shards, not a whole checkpoint: give its folder" in str(
            caught.value
        )
    assert list(open_checkpoint(shards[0], shard=True)) == ["a"], "to look into it"
    merge(folders, tmp_path / "out")
    assert list(open_checkpoint(tmp_path / "out")) == ["a", "b"]
    single = save(tmp_path / "model-00001-of-00001.safetensors", "a")
    assert list(open_checkpoint(single)) == ["a"]


# Parts

PIPELINE = {
    "model_index.json": json.dumps({"_class_name": "P", "unet": ["d", "U"], "vae": ["d", "V"]}),
    "unet/config.json": '{"torch_dtype": "float32"}',
    "unet/diffusion_pytorch_model.safetensors": "conv.w mid.w",
    "vae/config.json": "{}",
    "vae/diffusion_pytorch_model.safetensors": "conv.w",
    "scheduler/scheduler_config.json": "{}",
    "checkpoint-500/model.safetensors": "other",
    "notes/model.safetensors": "mine",
}


def pipelines(folder: Path) -> list[Path]:
    return [write(folder / n, PIPELINE, v) for n, v in (("a", 1.0), ("b", 3.0))]


def test_a_pipeline_is_merged_part_by_part_by_one_command(tmp_path: Path):
    report = merge(
        pipelines(tmp_path), tmp_path / "out", layers=["vae/*=second"], beta=0.25, dtype="f16"
    )
    out = tmp_path / "out"
    assert inside(out) == sorted(
        name for name in PIPELINE if not name.startswith(("checkpoint-500", "notes"))
    )
    unet = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert {name: t[0] for name, t in unet.items()} == {"conv.w": 2.5, "mid.w": 2.5}
    assert {name: t[0] for name, t in vae.items()} == {"conv.w": 3.0}
    assert json.loads((out / "unet" / "config.json").read_text()) == {"torch_dtype": "float16"}
    assert [row.rule for row in report.plan.rule_counts()] == ["vae/* → second", "(rest) → merge"]
    assert [step.name for step in report.plan.steps] == [
        "unet/conv.w", "unet/mid.w", "vae/conv.w",
    ]  # fmt: skip
    assert any("checkpoint-500, notes are no part of" in n.message for n in report.notices)
    made = modelsoup.read_lineage(open_checkpoint(out))
    assert made is not None
    assert [file["name"] for file in made["inputs"][0]["files"]] == [
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert modelsoup.verify(out, folders=[tmp_path]).sound
    assert [check.intact for check in modelsoup.verify(out, folders=[tmp_path]).inputs] == [
        True
    ] * 2


def test_shards_and_indexes_of_parts_lie_in_the_parts(tmp_path: Path):
    merge(pipelines(tmp_path), tmp_path / "out", shard_size=8)
    out = tmp_path / "out"
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    listing = json.loads(
        (out / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert listing["weight_map"] == {"conv.w": shards[0], "mid.w": shards[1]}
    assert listing["metadata"] == {"total_size": 16}
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").exists()
    assert list(open_checkpoint(out)) == ["unet/conv.w", "unet/mid.w", "vae/conv.w"]


def test_sentence_transformers_keep_their_dense_layer(tmp_path: Path):
    files = {
        "modules.json": json.dumps(
            [{"path": "", "type": "T"}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
        ),
        "model.safetensors": "embeddings.w", "config.json": "{}",
        "1_Pooling/config.json": "{}", "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": "linear.w",
    }  # fmt: skip
    merge([write(tmp_path / n, files, v) for n, v in (("a", 1), ("b", 2))], tmp_path / "out")
    assert inside(tmp_path / "out") == sorted(files)
    found = open_checkpoint(tmp_path / "out")
    assert {name: found[name][0] for name in found} == {
        "embeddings.w": 1.5,
        "2_Dense/linear.w": 1.5,
    }


def test_without_a_list_every_folder_with_weights_is_a_part_but_states_of_a_training(
    tmp_path: Path,
):
    files = {"model.safetensors": "a", "head/model.safetensors": "b",
             "checkpoint-20/model.safetensors": "c"}  # fmt: skip
    checkpoint = open_checkpoint(write(tmp_path, files))
    assert list(checkpoint) == ["a", "head/b"]
    assert checkpoint.notes == (
        f"weights in checkpoint-20 are no part of {tmp_path}, and were left alone",
    )


def test_a_part_that_only_one_model_has_follows_the_rules(tmp_path: Path):
    files = {"unet/model.safetensors": "w", "vae/model.safetensors": "w"}
    a = write(tmp_path / "a", files, 1)
    b = write(tmp_path / "b", {"unet/model.safetensors": "w"}, 3)
    with pytest.raises(modelsoup.MismatchError, match=r"missing from b, the second model: vae/w"):
        merge([a, b], tmp_path / "out")
    merge([a, b], tmp_path / "kept", layers=["vae/*=first"])
    assert load_file(tmp_path / "kept" / "vae" / "model.safetensors")["w"][0] == 1
    assert load_file(tmp_path / "kept" / "unet" / "model.safetensors")["w"][0] == 2
    merge([a, b], tmp_path / "dropped", layers=["vae/*=drop"])
    assert inside(tmp_path / "dropped") == ["unet/model.safetensors"]
    merge([b, a], tmp_path / "added", layers=["vae/*=second"])
    assert inside(tmp_path / "added") == sorted(files)


def test_parts_do_not_go_into_one_file(tmp_path: Path):
    """Their tensors would be called otherwise there than in the lineage."""
    with pytest.raises(OutputError, match=r"weights in unet/, vae/: name a folder$"):
        merge(pipelines(tmp_path), tmp_path / "out.safetensors")
    a = write(tmp_path / "a1", {"unet/model.safetensors": "w"})
    with pytest.raises(OutputError, match=r"weights in unet/: name a folder$"):
        merge([a, a], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_list_of_parts_that_is_not_true_of_the_output_is_told(tmp_path: Path):
    a, b = pipelines(tmp_path)
    report = merge([a, b], tmp_path / "out", layers=["vae/*=drop"])
    assert [n.message for n in report.notices if n.level == "warning"] == [
        "model_index.json names vae, of which the output has no weights"
    ]
    with pytest.raises(modelsoup.MismatchError, match=r"names vae, of which"):
        merge([a, b], tmp_path / "strict", layers=["vae/*=drop"], strict=True, dry_run=True)
    assert not [n for n in merge([a, b], tmp_path / "all").notices if n.level == "warning"]


def test_a_part_of_the_second_model_comes_with_its_config(tmp_path: Path):
    modules = [{"path": ""}, {"path": "2_Dense"}]
    a = write(tmp_path / "a", {"model.safetensors": "w", "modules.json": json.dumps(modules[:1]),
                               "config.json": "{}"}, 1)  # fmt: skip
    files = {"model.safetensors": "w", "modules.json": json.dumps(modules),
             "2_Dense/model.safetensors": "v", "2_Dense/config.json": '{"dtype": "float32"}',
             "2_Dense/pytorch_model.bin": ""}  # fmt: skip
    b = write(tmp_path / "b", files, 3)
    report = merge([a, b], tmp_path / "out", layers=["2_Dense/*=second"], dtype="f16")
    assert inside(tmp_path / "out") == [
        "2_Dense/config.json", "2_Dense/model.safetensors", "config.json", "model.safetensors",
        "modules.json",
    ]  # fmt: skip
    config = (tmp_path / "out" / "2_Dense" / "config.json").read_text()
    assert json.loads(config) == {"dtype": "float16"}
    assert [n.message for n in report.notices if n.level == "warning"] == [
        "modules.json does not name 2_Dense, so that the weights there are not read: name them "
        "in it"
    ]
    (tmp_path / "out" / "modules.json").write_text(json.dumps(modules))
    assert list(open_checkpoint(tmp_path / "out")) == ["w", "2_Dense/v"]


def test_weights_further_down_are_left_alone_and_told(tmp_path: Path):
    files = {"model.safetensors": "w", "x/y/model.safetensors": "v", "head/model.safetensors": "u",
             "head/old/model.safetensors": "u", ".cache/z/model.safetensors": "v"}  # fmt: skip
    checkpoint = open_checkpoint(write(tmp_path / "a", files))
    assert list(checkpoint) == ["w", "head/u"]
    assert checkpoint.notes == (
        f"weights in head/old, x/y are no part of {tmp_path / 'a'}, and were left alone",
    )
    write(tmp_path / "b", {"checkpoint-9/model.safetensors": "v"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "b")
    path = str(caught.value).partition("give the path of ")[2].rstrip(")")
    assert list(open_checkpoint(path)) == ["v"]


def test_a_tree_merges_pipelines_too(tmp_path: Path):
    a, b = pipelines(tmp_path)
    c = write(tmp_path / "c", PIPELINE, 7.0)
    for fuse in (False, True):
        out = tmp_path / f"out-{fuse}"
        tree = modelsoup.binary_tree([a, b, c], odd="last")
        modelsoup.run(tree, out, store=tmp_path / f"store-{fuse}", fuse=fuse)
        found = open_checkpoint(out)
        assert {name: found[name][0] for name in found} == dict.fromkeys(
            ["unet/conv.w", "unet/mid.w", "vae/conv.w"], 4.5
        )


# What is read


def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path: Path):
    for name in ("model.safetensors", "model.safetensors.index.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        os.mkfifo(folder / name)
        for path in (folder, folder / name):
            with pytest.raises(CheckpointError, match="it is not a regular file"):
                open_checkpoint(path)
    link = tmp_path / "x.safetensors.index.json"
    link.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="it is not a regular file"):
        open_checkpoint(link)


def test_a_shard_with_a_pattern_in_its_name_is_only_a_name(tmp_path: Path):
    write(tmp_path, {"model.safetensors.index.json": index(a="model.**x")})
    with pytest.raises(CheckpointError, match=r"names the shard 'model\.\*\*x', which is not"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config", ["[]", "3", "null", '"text"', "[" * 50_000, "{", '{"a":' * 3_000 + "1" + "}" * 3_000]
)
def test_a_config_that_is_none_is_copied_as_it_is(config: str, tmp_path: Path):
    a = write(tmp_path / "a", {"model.safetensors": "w", "config.json": config})
    merge([a, a], tmp_path / "out", dtype="f16", layers=["w"])
    assert (tmp_path / "out" / "config.json").read_text() == config


def test_a_dangling_link_is_the_inputs_fault(tmp_path: Path):
    a = write(tmp_path / "a", {"model.safetensors": "w"})
    (a / "tokenizer.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=rf"^the link {a}/tokenizer.json leads nowhere$"):
        merge([a, a], tmp_path / "out", dry_run=True)


# What is written


@pytest.mark.parametrize(
    "name",
    [
        "x.ckpt",
        "x.bin",
        "x.pth",
        "x.safetensor",
        "x.SafeTensors",
        "x.npz",
        "x.zip",
        "x.gguf",
        "x.tar.gz",
        "x.json",
    ],
)
def test_an_output_that_is_meant_as_another_format_is_no_folder(name: str, tmp_path: Path):
    a = save(tmp_path / "a.safetensors", "w")
    with pytest.raises(OutputError, match=r"\(expected \.safetensors, or a folder's name\)$"):
        merge([a, a], tmp_path / name)
    assert inside(tmp_path) == ["a.safetensors"]
    merge([a, a], tmp_path / "llama-3.1")
    assert inside(tmp_path / "llama-3.1") == ["model.safetensors"]


@pytest.mark.parametrize("name", ["", ".", "..", "/", "x" * 240 + ".safetensors"])
def test_an_output_that_cannot_have_its_name_is_told_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    a = save(tmp_path / "a.safetensors", "w")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for dry_run in (True, False):
        with pytest.raises(OutputError, match=r"empty path|no name|252 bytes|the current folder"):
            merge([a, a], name, dry_run=dry_run, force=True)
    assert inside(tmp_path) == ["a.safetensors"]


def test_digests_of_another_model_are_not_copied(tmp_path: Path):
    of_first = {
        "sshs_model_hash": "1" * 64, "modelspec.hash_sha256": "0x" + "1" * 64,
        "sshs_legacy_hash": "1" * 8, "my_checksum": "1", "ss_sd_model_hash": "1234abcd",
        "format": "pt", "MD5": "1", "crc32": "1", "blake3": "1", "shape": "2",
    }  # fmt: skip
    a = save(tmp_path / "a.safetensors", "w v", 1, **of_first)
    b = save(tmp_path / "b.safetensors", "w v", 2)
    report = merge([a, b], tmp_path / "out.safetensors")
    raw = (tmp_path / "out.safetensors").read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    digest = hashlib.sha256(data).hexdigest()
    metadata = open_checkpoint(tmp_path / "out.safetensors").metadata
    assert {key: text for key, text in metadata.items() if key != "modelsoup"} == {
        "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}", "format": "pt",
        "shape": "2",
        "ss_sd_model_hash": "1234abcd",  # of the model that the training began with
    }  # fmt: skip
    (message,) = [n.message for n in report.notices if n.kind == "metadata"]
    assert message.startswith(
        "MD5, blake3, crc32, my_checksum, sshs_legacy_hash of the metadata were left out"
    )


def test_layers_that_a_config_counts_and_a_gap_leaves_out_are_told(tmp_path: Path):
    names = " ".join(f"model.layers.{n}.w" for n in range(3)) + " head.w"
    files = {"model.safetensors": names, "config.json": '{"num_hidden_layers": 3}'}
    a, b = (write(tmp_path / n, files) for n in "ab")
    options = {"layers": ["model.layers.1.*=drop"]}
    report = merge([a, b], tmp_path / "out", dry_run=True, **options)
    assert [n.message for n in report.notices if n.kind == "config"] == [
        "config.json says num_hidden_layers: 3, but the output lacks 1 layer of them: "
        "model.layers.1"
    ]
    with pytest.raises(modelsoup.MismatchError, match="num_hidden_layers"):
        merge([a, b], tmp_path / "out", strict=True, **options)
    assert not [n for n in merge([a, b], tmp_path / "out").notices if n.kind == "config"]


def test_the_last_layers_that_are_left_out_are_counted_no_more(tmp_path: Path):
    names = [f"{stack}.layers.{n}.w" for stack in ("text", "vision") for n in range(3)]
    config = {
        "text_config": {"num_hidden_layers": 3, "layer_types": ["full", "slid", "full"]},
        "vision_config": {"num_hidden_layers": 3, "sizes": [1, 2]},
    }
    files = {"model.safetensors": " ".join(names), "config.json": json.dumps(config)}
    a, b = (write(tmp_path / n, files) for n in "ab")
    report = merge([a, b], tmp_path / "out", layers=["text.layers.2.*=drop"])
    assert [n for n in report.notices if n.kind == "config"] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["full", "slid"]},
        "vision_config": {"num_hidden_layers": 3, "sizes": [1, 2]},
    }


@pytest.mark.parametrize(
    "config", ['{"num_hidden_layers": 9000000000}', '{"dtype": "float32", "a": "\\ud800"}']
)
def test_a_config_of_any_content_is_no_reason_to_fail(config: str, tmp_path: Path):
    files = {"model.safetensors": "m.layers.0.w m.layers.1.w", "config.json": config}
    a = write(tmp_path / "a", files)
    report = merge([a, a], tmp_path / "out", dtype="f16")
    assert [n for n in report.notices if n.level == "warning"] == []
    assert (tmp_path / "out" / "config.json").read_text() == config


# Hints


def test_a_hint_for_a_shard_names_what_can_be_given(tmp_path: Path):
    write(tmp_path / "a", {"model-00001-of-00002.safetensors": "x",
                           "model-00002-of-00002.safetensors": "y"})  # fmt: skip
    with pytest.raises(CheckpointError) as caught, speaking("command"):
        open_checkpoint(tmp_path / "a" / "model-00001-of-00002.safetensors")
    folder = str(caught.value).partition("give its folder, ")[2].partition(", or")[0]
    assert list(open_checkpoint(folder)) == ["x", "y"]


def test_what_goes_along_with_no_file_is_not_looked_at(tmp_path: Path):
    """A link that leads nowhere is in the way of a folder; to a file nothing goes along."""
    a, b = (write(tmp_path / name, {"model.safetensors": "a"}) for name in "ab")
    (a / "notes.txt").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        merge([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for name in ("out.safetensors", "x.safetensors"):
        assert merge([a, b], tmp_path / name).output.is_file()
