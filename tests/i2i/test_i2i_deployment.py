"""What a trainer tells of a checkpoint to whoever quantises it, and the images it hands out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from i2i_domains import TINY, make_domains
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions

import modelsoup

torch.set_num_threads(1)
SIZES = ("mode", "load_size", "crop_size")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"), 3, 3)


def made(folder: Path, data: Path, tree: object, **leaves: dict) -> Path:
    """The result of a plan whose leaves and fine-tunings are tiny trainings."""
    common = {"trainer": "cyclegan", "data": str(data), **TINY, "epochs": 1}
    plan = {
        "soup": 1, "tree": tree,
        "models": {name: {"train": {**common, **own}} for name, own in leaves.items()},
        "defaults": {"finetune": common | {"load_size": 20}},
    }  # fmt: skip
    result = folder / "result.safetensors"
    parsed, _ = modelsoup.parse_tree(json.dumps(plan))
    modelsoup.run(parsed, result, store=folder / "store", force=True)
    return result


def sizes(checkpoint: Path) -> dict:
    told = CycleGAN().options_of(checkpoint)
    assert (told["width"], told["blocks"], told["channels"]) == (4, 1, 3)
    assert (told["d_width"], told["d_layers"]) == (4, 1)
    return {name: told[name] for name in SIZES if name in told}


TRAINED = {"mode": "resize_and_crop", "load_size": 18, "crop_size": 16}
KEY = "c" * 32
PLAIN = {"of": ["a", "b"], "finetune": False}


def test_a_trees_result_tells_the_size_of_its_nearest_trainings(data: Path, tmp_path: Path):
    assert sizes(made(tmp_path, data, "a", a={})) == TRAINED
    assert sizes(made(tmp_path, data, PLAIN, a={}, b={"lr": 1e-3})) == TRAINED
    # The root was trained last, and at another size than its leaves.
    tuned = made(tmp_path, data, {"of": ["a", "b"]}, a={}, b={"lr": 1e-3})
    assert sizes(tuned) == TRAINED | {"load_size": 20}
    deep = {"of": [{"of": ["a", "b"]}, {"of": ["c", "d"]}], "finetune": False}
    leaves = {name: {"init": n} for n, name in enumerate("abcd")}
    assert sizes(made(tmp_path, data, deep, **leaves)) == TRAINED | {"load_size": 20}


def test_what_a_training_was_not_told_was_its_default(data: Path, tmp_path: Path):
    common = {"mode": "none", "data": str(data), **TINY, "trainer": "cyclegan"}
    del common["load_size"], common["crop_size"]
    plan = {"soup": 1, "models": {"a": {"train": common}}, "tree": "a"}
    parsed, _ = modelsoup.parse_tree(json.dumps(plan))
    modelsoup.run(parsed, tmp_path / "a.safetensors", store=tmp_path / "store")
    assert sizes(tmp_path / "a.safetensors") == {
        "mode": "none", "load_size": 286, "crop_size": 256,
    }  # fmt: skip


def test_trainings_of_two_sizes_tell_none(data: Path, tmp_path: Path):
    assert sizes(made(tmp_path, data, PLAIN, a={}, b={"load_size": 20})) == {}


def with_lineage(checkpoint: Path, lineage: object) -> Path:
    from safetensors.numpy import load_file, save_file

    out = checkpoint.with_name("other.safetensors")
    save_file(load_file(checkpoint), out, {"modelsoup": json.dumps(lineage)})
    return out


def test_a_lineage_that_says_nonsense_says_no_size(data: Path, tmp_path: Path):
    result = made(tmp_path, data, PLAIN, a={}, b={"lr": 1e-3})
    lineage = modelsoup.read_lineage(modelsoup.open_checkpoint(result))
    assert lineage is not None
    step = {"format": 1, "operation": "train", "trainer": "cyclegan", "options": {}, "seed": 0,
            "inputs": []}  # fmt: skip
    for options in ({"load_size": "x"}, {"crop_size": [16, None]}, {"mode": 3}, {"load_size": {}}):
        assert sizes(with_lineage(result, {**step, "options": options})) == {}
    assert sizes(with_lineage(result, {"format": 99})) == {}
    own = {"name": "a", "key": KEY}
    loop = {**step, "trainer": "other", "inputs": [own]}
    assert sizes(with_lineage(result, {**loop, "ancestors": {KEY: loop}})) == {}


def test_the_sizes_of_what_was_trained_in_int8_are_those_of_its_start(data: Path, tmp_path: Path):
    """Unless it was told others."""
    result = made(tmp_path, data, "a", a={})
    start = modelsoup.read_lineage(modelsoup.open_checkpoint(result))
    for training, expected in (({}, TRAINED), ({"crop_size": 12}, TRAINED | {"crop_size": 12})):
        lineage = {
            "format": 1, "operation": "finetune", "trainer": "openvino-qat", "seed": 0,
            "options": {"of": "cyclegan", "training": training},
            "inputs": [{"name": "a", "key": KEY}], "ancestors": {KEY: start},
        }  # fmt: skip
        assert sizes(with_lineage(result, lineage)) == expected
        # Of a start that said nothing, it was what the training was told, or its defaults.
        del lineage["ancestors"]
        lineage["inputs"] = [{"name": "a", "size": 1, "xxh3_128": KEY}]
        default = {"mode": "resize_and_crop", "load_size": 286, "crop_size": 256}
        assert sizes(with_lineage(result, lineage)) == default | training


def inputs(options: CycleGANOptions, network: str, part: str) -> list[torch.Tensor]:
    """The images; a CycleGAN's generator is called with nothing else."""
    session = CycleGAN().session(options, None, seed=0)
    found = list(CycleGAN().inputs(session, network, part))
    assert all(list(own) == ["image"] for own in found)
    return [own["image"] for own in found]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_inputs_are_pictures_at_the_size_of_training(channels: int, data: Path):
    options = CycleGANOptions(data=data, channels=channels, **TINY)
    for part in ("train", "test"):
        images = inputs(options, "G_B", part)
        assert [image.shape for image in images] == [(1, channels, 16, 16)] * 3
        assert all(-1 <= image.min() < image.max() <= 1 for image in images)


def test_inputs_leave_out_what_the_training_leaves_out(tmp_path: Path):
    """And metrics of what was made of them are of the others."""
    from modelsoup_i2i.pictures.images import to_image

    data = make_domains(tmp_path / "domains", 4, 4)
    (data / "trainA" / "1.png").write_bytes(b"nothing")
    options = CycleGANOptions(data=data, on_bad_image="skip", **TINY)
    images = inputs(options, "G_A", "train")
    assert len(images) == 3
    last = [to_image(images[2][0])]
    own = CycleGAN().quality(options, "G_A", last, ["psnr"], part="train", first=2)
    (data / "trainA" / "3.png").write_bytes((data / "trainB" / "3.png").read_bytes())
    same = [to_image(image[0]) for image in inputs(options, "G_A", "train")][2:]
    truth = CycleGAN().quality(options, "G_A", same, ["psnr"], part="train", first=2)
    assert own["psnr"] < truth["psnr"] == np.inf
    strict = CycleGANOptions(data=data, **TINY)
    with pytest.raises(modelsoup.SoupError, match=r"trainA/1\.png"):
        inputs(strict, "G_A", "train")


def test_two_single_folders_have_test_images_where_they_are_named(data: Path, tmp_path: Path):
    folders = {"data_a": data / "trainA", "data_b": data / "trainB"}
    assert inputs(CycleGANOptions(**folders, **TINY), "G_A", "test") == []
    options = CycleGANOptions(**folders, test_a=data / "testA", test_b=data / "testB", **TINY)
    assert len(inputs(options, "G_A", "test")) == 3
    assert CycleGAN().tested_on(options) == [
        *sorted((data / "testA").iterdir()), *sorted((data / "testB").iterdir())
    ]  # fmt: skip
