"""A tiny generator all the way: quantise, train, save, reload, export, run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from modelsoup_i2i.measuring.metrics import evaluate
from modelsoup_i2i.pictures.images import read_image
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.use.generators import load_generator
from modelsoup_openvino import export, measure
from modelsoup_openvino.deliver import FLOAT
from modelsoup_openvino.quantise import Quantisation, load_quantised, quantised
from modelsoup_openvino.trainer import OpenVinoOptions, OpenVinoQat
from PIL import Image
from safetensors.numpy import load_file

import modelsoup
from modelsoup.files.digest import content_of
from modelsoup.terminal.cli import main

from conftest import SHAPE, SIZES, device_plan  # isort: skip

LEVEL = 2 / 255
"""One of the 256 levels that a picture's values have."""


def held_out(data, part="test"):
    options = CycleGANOptions(data=data, **SIZES, **SHAPE)
    session = CycleGAN().session(options, None, seed=0)
    return [own["image"] for own in CycleGAN().inputs(session, "G_A", part)]


def test_a_run_leaves_models_checkpoints_report_and_pictures(made):
    names = {path.name for path in made.out.iterdir()}
    assert names == {
        "int8.xml", "int8.bin", "fp32.xml", "fp32.bin", "fp16.xml", "fp16.bin",
        "quantised.safetensors", "float.safetensors", "report.json", "report.md", "sheet.png",
    }  # fmt: skip
    told = json.loads((made.out / "report.json").read_text())
    assert told == json.loads(json.dumps(made.told))
    assert [one["epoch"] for one in told["candidates"]] == [0, 1, 2]
    page = (made.out / "report.md").read_text()
    assert "| 2 |" in page
    assert "8 | 8 |" in page
    with Image.open(made.out / "sheet.png") as sheet:
        # Two held-out pictures under a heading; input, float32, and epochs 0, kept and last.
        shown = len({0, 2, told["kept"]})
        assert sheet.size == ((2 + shown) * 100 + 4, 2 * 36 + 16)
    models = told["speed"]["models"]
    assert set(models) == {"torch", "fp32.xml", "int8.xml"}
    assert all(one["latency"] > 0 for one in models.values())
    assert told["speed"]["memory_mib"]["int8.xml"]["peak"] > 0
    assert told["likeness"]["saturates"] == measure.saturates() == ("has no VNNI" in page)


def test_the_nearest_candidate_is_kept_and_all_are_reported(made):
    told = {one["epoch"]: one["psnr"] for one in made.told["candidates"]}
    assert told[made.told["kept"]] == max(told.values())
    assert len(set(told.values())) == 3  # the training did change the network


def test_all_convolutions_of_the_export_are_int8_and_of_the_float_model_none(made):
    integer = export.integer_operations(export.read(made.out / "int8.xml"))
    assert integer == {"Convolution": (8, 8), "ConvolutionBackpropData": (2, 2)}
    plain = export.integer_operations(export.read(made.out / "fp32.xml"))
    assert plain == {"Convolution": (0, 8), "ConvolutionBackpropData": (0, 2)}


def test_openvino_carries_them_out_in_int8(made):
    compiled = measure.compiled_for(made.out / "int8.xml", "LATENCY")
    found = export.executed_operations(compiled)
    assert set(found["Convolution"]) <= {"i8", "u8"}
    assert set(found["Deconvolution"]) <= {"i8", "u8"}
    assert found["Convolution"].total() == 8


def test_the_export_computes_what_the_fake_quantised_network_does(made, start, data):
    network = load_quantised(
        load_generator(start, "x2y"), made.out / "quantised.safetensors", say=print
    ).eval()
    call = measure.compiled_for(made.out / "int8.xml", "LATENCY")
    for image in held_out(data):
        with torch.no_grad():
            expected = network(image).numpy()
        got = call(image.numpy())[0]
        # A value between two integers may be rounded to the other one; the norms spread that.
        assert np.abs(got - expected).mean() < (2 if measure.saturates() else 1) * LEVEL
        assert measure.psnr(got, expected) > 40
    assert made.told["likeness"]["agreement"]["int8"] > 40
    assert made.told["likeness"]["agreement"]["fp32"] > 90


def test_weights_of_half_the_range_are_computed_without_saturation(start, data):
    plain = load_generator(start, "x2y")
    image, calibration = held_out(data)[0], held_out(data, "train")
    agreed, largest = {}, {}
    for fix in ("disable", "enable"):
        own = quantised(plain, calibration, Quantisation(overflow_fix=fix), say=print).eval()
        model = export.converted(own, image)
        agreed[fix] = export.agreement(own, model, image)
        stored = [np.array(node.data).astype(int) for node in model.get_ordered_ops()
                  if node.get_type_name() == "Constant"
                  and node.get_element_type().to_string() == "i8"]  # fmt: skip
        largest[fix] = max(np.abs(integers).max() for integers in stored)
    assert largest["enable"] <= 64
    assert largest["disable"] >= 127
    assert agreed["enable"] > 45
    assert not measure.saturates() or agreed["enable"] > agreed["disable"] + 3


def test_a_range_that_cannot_be_cut_off_is_not_warned_of(quantise, tmp_path, monkeypatch):
    """Though the processor would; and one of anything is not several."""
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx2\n")
    monkeypatch.setattr(measure, "CPU_INFO", tmp_path / "cpuinfo")
    assert measure.saturates()
    how = {"overflow_fix": "enable"}
    run = quantise(tmp_path, epochs=0, rounds=1, held_out=1, quantisation=how)
    page = (run.out / "report.md").read_text()
    assert run.told["likeness"]["saturates"] is False and "has no VNNI" not in page
    assert "on 1 test image:" in page and "on 1 image:" in page and "of 1 round in" in page


def test_int8_is_near_to_float_and_smaller(made):
    assert made.told["likeness"]["psnr"] > 30
    sizes = {name: (made.out / name).stat().st_size for name in ("int8.bin", "fp32.bin")}
    assert sizes["int8.bin"] < 0.3 * sizes["fp32.bin"]


def test_the_float_result_has_the_names_of_the_tree(made, start):
    before, after = load_file(start), load_file(made.out / "float.safetensors")
    assert list(after) == list(before)
    assert all(after[name].shape == value.shape for name, value in before.items())
    assert {name.partition(".")[0] for name in after} == {"G_A", "G_B", "D_A", "D_B"}


def test_only_the_deployed_generator_has_quantisers(made):
    names = load_file(made.out / "quantised.safetensors")
    own = {name for name in names if not name.startswith("__nncf_hooks.")}
    assert own == set(load_generator(made.out / "float.safetensors", "x2y").state_dict())
    weights = [n for n in names if n.startswith("__nncf_hooks.pre_hooks.") and n.endswith(".scale")]
    assert len(weights) == 10


def test_the_model_for_half_precision_holds_half_the_bytes(made):
    whole, half = ((made.out / f"{name}.bin").stat().st_size for name in ("fp32", "fp16"))
    assert 0.5 * whole <= half < 0.6 * whole


def test_the_models_tell_the_digest_of_the_checkpoint_they_came_from(made, start):
    for name in ("int8.xml", "fp32.xml", "fp16.xml"):
        told = export.about(export.read(made.out / name))
        assert told["source_xxh3_128"] == modelsoup.digest_file(start).xxh3_128
        own = modelsoup.digest_file(made.out / "float.safetensors").xxh3_128
        assert told["float_xxh3_128"] == own
        assert told["network"] == "G_A"
        assert made.told["origin"].items() <= told.items()


def test_a_quantised_checkpoint_is_reloaded_to_the_bit_and_can_be_trained_on(made, start, data):
    plain = load_generator(start, "x2y")
    first, second = (
        load_quantised(plain, made.out / "quantised.safetensors", say=print) for _ in range(2)
    )
    image = held_out(data)[0]
    with torch.no_grad():
        assert torch.equal(first.eval()(image), second.eval()(image))
    optimizer = torch.optim.SGD([p for p in first.parameters() if p.requires_grad], 0.1)
    first.train()(image).square().mean().backward()
    scales = [p for n, p in first.named_parameters() if "scale" in n and p.grad is not None]
    assert scales
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(first.eval()(image), second.eval()(image))


def test_four_pixels_in_the_channels_give_the_same_values(made, start, data):
    plain = load_generator(start, "x2y")
    images = held_out(data)
    network = load_quantised(plain, made.out / "quantised.safetensors", say=print).eval()
    folded = export.converted(network, images[0])
    usual = export.converted(network, images[0], fold=False)
    for model, count in ((folded, 1), (usual, 0)):
        kinds = [node.get_type_name() for node in model.get_ordered_ops()]
        assert kinds.count("DepthToSpace") == count
    got, expected = (
        measure.compiled_for(model, "LATENCY")(images[1].numpy())[0] for model in (folded, usual)
    )
    assert np.abs(got - expected).max() <= 1e-6  # integers are the same; only a tanh may differ


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bytes(quantise, made, tmp_path):
    def kill(line):
        if line.startswith("INT8 after epoch 2"):
            raise Killed

    with pytest.raises(Killed):
        quantise(tmp_path, epochs=2, rate=1e-3, say=kill)
    assert not (tmp_path / "out").exists()
    again = quantise(tmp_path, epochs=2, rate=1e-3)
    assert any("goes on" in line for line in again.lines)
    assert again.told["candidates"] == made.told["candidates"]
    for name in ("float.safetensors", "quantised.safetensors"):
        own, other = load_file(again.out / name), load_file(made.out / name)
        assert all(np.array_equal(own[key], other[key]) for key in other)
    assert (again.out / "int8.bin").read_bytes() == (made.out / "int8.bin").read_bytes()


def test_a_command_that_was_killed_goes_on_to_the_same_bytes(made, start, data, tmp_path):
    out, left = tmp_path / "out", tmp_path / ".out.unfinished"
    arguments = [
        "openvino", "quantize", str(start), "--trainer", "cyclegan", "--data", str(data),
        "-o", str(out), "--epochs", "2", "--rate", "1e-3", "--rounds", "0", "--seed", "5",
        *(part for name, value in SIZES.items() for part in ("--set", f"{name}={value}")),
    ]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "modelsoup", *arguments], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as running:  # fmt: skip
        assert any(line.startswith("INT8 after epoch 1") for line in running.stderr)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "this run goes on" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name in ("int8.bin", "float.safetensors"):
        assert (out / name).read_bytes() == (made.out / name).read_bytes()


def true_pictures(data):
    """What the test images should become, at the size of training."""
    transform = CycleGANOptions(data=data, **SIZES, **SHAPE).transform()
    return [transform.for_test(read_image(file)) for file in sorted((data / "testB").iterdir())]


def test_calibration_asks_for_training_images_alone(quantise, tmp_path):
    asked = []

    class Watched(CycleGAN):
        """Tells which images it was asked for."""

        name = "watched"

        def inputs(self, session, network, part="train"):
            for own in super().inputs(session, network, part):
                asked.append(part)
                yield own

    modelsoup.register_trainer(Watched())
    quantise(tmp_path, of="watched", epochs=0, say=asked.append)
    begun = next(n for n, what in enumerate(asked) if what.startswith("calibrates G_A"))
    assert set(asked[:begun]) >= {"test"}
    assert [part for part in asked[begun:] if part in ("train", "test")] == ["train"] * 4


def test_a_better_epoch_is_kept_with_frozen_tensors_as_they_were(quantise, start, data, tmp_path):
    frozen = ("G_A.model.1.weight", "G_A.model.1.bias", "G_A.model.19.bias", "D_A.model.0.weight")

    def kill(line):
        if line.startswith("INT8 after calibration"):
            raise Killed

    with pytest.raises(Killed):
        quantise(tmp_path, epochs=1, rate=1e-3, frozen=frozen, say=kill)
    with pytest.raises(
        modelsoup.TrainerError, match=r"another run.*how\.preset 'performance'.*'mixed'"
    ):
        quantise(tmp_path, epochs=1, frozen=frozen, quantisation={"preset": "mixed"})
    with pytest.raises(modelsoup.TrainerError, match=r"\(training\.lr 0\.001 → 0\.01\): remove"):
        quantise(tmp_path, epochs=1, frozen=frozen, rate=1e-2)
    for changed in ("trainB/1.png", "testA/1.png"):  # other pictures of the same names
        other = shutil.copytree(data, tmp_path / changed.partition("/")[0])
        shutil.copyfile(other / "trainA/0.png", other / changed)
        with pytest.raises(modelsoup.TrainerError, match=r"\(images '\w{32}' → '\w{32}'\): remove"):
            quantise(tmp_path, epochs=1, rate=1e-3, frozen=frozen, training={"data": str(other)})
    # Had calibration been as bad as this, the epoch after it would be the nearest.
    candidates = tmp_path / "work" / "candidates.json"
    (calibrated,) = json.loads(candidates.read_text())
    candidates.write_text(json.dumps([calibrated | {"psnr": 0.0}]))
    run = quantise(tmp_path, epochs=1, rate=1e-3, frozen=frozen, pictures=True, quality=("psnr",))
    assert run.told["kept"] == 1
    # The metrics are those of the pictures of the network that each is said to be of.
    for which, folder in (("float", "float32"), ("calibrated", "int8-0"), ("kept", "int8-1")):
        made = evaluate(run.out / "pictures" / folder, truth=true_pictures(data), metrics=["psnr"])
        assert run.told["quality"]["psnr"][which] == pytest.approx(made[0].value, abs=1e-6)
    assert len(set(run.told["quality"]["psnr"].values())) == 3
    kept, first = (
        [read_image(file) for file in sorted((run.out / "pictures" / name).iterdir())]
        for name in ("int8", "int8-1")
    )
    assert np.array_equal(kept, first)
    assert "gained" in (run.out / "report.md").read_text()
    assert "the nearest of 2 on these same images" in (run.out / "report.md").read_text()
    before, after = load_file(start), load_file(run.out / "float.safetensors")
    inside = load_file(run.out / "quantised.safetensors")
    assert list(after) == list(before)
    for name, value in before.items():
        network, _, own = name.partition(".")
        assert np.array_equal(after[name], value) == (name in frozen), name
        if network == "G_A":
            assert np.array_equal(inside[own], after[name])
    told = export.about(export.read(run.out / "int8.xml"))
    assert told["qat_epochs"] == "1"
    digests = [modelsoup.digest_file(file).xxh3_128 for file in (start, run.out / FLOAT)]
    assert [told["source_xxh3_128"], told["float_xxh3_128"]] == digests
    assert len(set(digests)) == 2  # the second is of what was trained


def test_a_trees_result_is_quantised_at_the_size_and_channels_of_its_training(data, tmp_path):
    """Grey, of a side that is no multiple of four; neither is said again."""
    from modelsoup_i2i.networks.layers import at_any_size
    from modelsoup_i2i.pictures.images import to_image, to_tensor
    from modelsoup_openvino import Translator

    training = {
        "trainer": "cyclegan", "data": str(data), **SIZES, **SHAPE, "channels": 1,
        "load_size": 34, "crop_size": 30, "epochs": 1,
    }  # fmt: skip
    models = {name: {"train": training | {"lr": lr}} for name, lr in (("a", 1e-4), ("b", 1e-3))}
    plan = {"soup": 1, "models": models, "tree": {"of": ["a", "b"]}}
    tree, _ = modelsoup.parse_tree(json.dumps(plan))
    modelsoup.run(tree, tmp_path / "tree.safetensors", store=tmp_path / "store")
    out = tmp_path / "out"
    arguments = ["quantize", tmp_path / "tree.safetensors", "--trainer", "cyclegan", "--data", data]
    quick = ["--epochs", "0", "--rounds", "0", "--pictures", "--set", "device=cpu"]
    done = CliRunner().invoke(main, ["openvino", *map(str, [*arguments, "-o", out]), *quick])
    assert done.exit_code == 0, done.output
    assert "tree.safetensors decides: width 8, blocks 2, channels 1" in done.output
    told = json.loads((out / "report.json").read_text())
    sizes = {name: told["options"][name] for name in ("load_size", "crop_size", "channels")}
    assert sizes == {"load_size": 34, "crop_size": 30, "channels": 1}
    for file in sorted((out / "pictures").rglob("*.png")):
        with Image.open(file) as picture:
            assert (picture.mode, picture.size) == ("L", (30, 30)), file
    # So is what came out of it, whose lineage has the tree's.
    again = ["quantize", out / "float.safetensors", *arguments[2:], "-o", tmp_path / "again"]
    done = CliRunner().invoke(main, ["openvino", *map(str, again), *quick])
    assert done.exit_code == 0, done.output
    assert "mode resize_and_crop, load_size 34, crop_size 30" in done.output
    lineage = modelsoup.read_lineage(out / "float.safetensors")
    assert (lineage["operation"], lineage["trainer"]) == ("finetune", "openvino-qat")
    digest = modelsoup.digest_file(tmp_path / "tree.safetensors").xxh3_128
    assert [entry["xxh3_128"] for entry in lineage["inputs"]] == [digest]
    assert lineage["ancestors"][digest]["operation"] == "merge"
    told_of = modelsoup.plan_text(out / "float.safetensors")
    assert "trainer: openvino-qat" in told_of and str(out) not in told_of
    model = export.read(out / "int8.xml")
    assert list(model.input(0).get_shape()) == [1, 1, 32, 32]
    assert export.about(model)["images"].startswith("grey, 1 x 1 x ")
    assert told["likeness"]["psnr"] > 30
    # In use as in the training: the picture is continued, and the result cut back.
    picture = read_image(data / "testA/0.png", 1)[:30, :30]
    network = load_generator(tmp_path / "tree.safetensors", "x2y")
    with torch.no_grad():
        expected = to_image(at_any_size(network, to_tensor(picture)[None])[0])
    got = Translator(out / "fp32.xml")(picture)
    assert got.shape == (30, 30, 1)
    assert np.abs(got.astype(int) - expected).max() <= 1
    with pytest.raises(modelsoup.ParameterError, match=r"has 3 channels, where .* such of 1"):
        Translator(out / "fp32.xml")(np.zeros((30, 30, 3), np.uint8))


def key(folder, start, data, *, trainer="openvino-qat", seed=0, training=None, **more):
    """What the result of one quantisation is named by."""
    options = {"of": "cyclegan", "out": "edge", **more}
    options["training"] = {"data": str(data), **SIZES, **SHAPE, **(training or {})}
    plan = {
        "soup": 1, "seed": seed, "models": {"start": str(start)},
        "tree": {"of": ["start"], "finetune": {"trainer": trainer, **options}},
    }  # fmt: skip
    (folder / "tree.yaml").write_text(json.dumps(plan))
    tree, _ = modelsoup.read_tree(folder / "tree.yaml")
    made = modelsoup.check(tree, digest=lambda path: path.name, contents=content_of)
    assert made.problems == ()
    found = made.nodes["root"].key
    assert found is not None
    return found


class Alike(CycleGAN):
    """The same under another name."""

    name = "alike"


DECIDE = {
    "of": "alike", "out": "elsewhere", "epochs": 3, "rate": 1e-5, "network": "G_B",
    "training": {"loss": "tree-paper"}, "held_out": 1, "rounds": 3, "pictures": True,
    "quality": ["psnr"],
}  # fmt: skip
QUANTISATION = {
    "preset": "mixed", "subset_size": 2, "fast_bias_correction": False, "weights": "asymmetric",
    "activations": "asymmetric", "per_channel": False, "overflow_fix": "enable",
    "ignored_names": ["model.1"], "ignored_patterns": ["x"], "ignored_types": ["y"],
}  # fmt: skip
OF_THE_PLAN = {"folder", "quantisation"}  # where it lies; and what the second list has


def test_every_option_is_known_to_decide_the_key():
    known = {field.name for field in dataclasses.fields(OpenVinoOptions)}
    assert known == {*DECIDE, *OF_THE_PLAN}
    assert {field.name for field in dataclasses.fields(Quantisation)} == {*QUANTISATION}


def test_each_option_changes_the_key(data, start, tmp_path):
    modelsoup.register_trainer(Alike())
    keys = {"": key(tmp_path, start, data)}
    keys |= {name: key(tmp_path, start, data, **{name: other}) for name, other in DECIDE.items()}
    keys |= {
        f"quantisation.{name}": key(tmp_path, start, data, quantisation={name: other})
        for name, other in QUANTISATION.items()
    }
    keys["seed"] = key(tmp_path, start, data, seed=1)
    assert len(set(keys.values())) == len(keys), keys
    # Neither where the plan lies, nor what only the trainer's progress is.
    (tmp_path / "moved").mkdir()
    assert key(tmp_path / "moved", start, data) == keys[""]
    assert key(tmp_path, start, data, training={"threads": 3}) == keys[""]


def test_the_key_depends_on_the_trainers_name_and_version(data, start, tmp_path, monkeypatch):
    class Versioned(OpenVinoQat):
        name = "versioned-qat"

    modelsoup.register_trainer(Versioned())
    first = key(tmp_path, start, data, trainer="versioned-qat")
    assert first != key(tmp_path, start, data)
    monkeypatch.setattr(Versioned, "version", "0")
    assert key(tmp_path, start, data, trainer="versioned-qat") != first


def test_pictures_that_decide_the_choice_are_part_of_the_key(data, start, tmp_path):
    own = shutil.copytree(data, tmp_path / "data")
    before = key(tmp_path, start, own)
    for changed in ("trainA/1.png", "trainB/1.png", "testA/1.png", "testB/1.png"):
        content = (own / changed).read_bytes()
        shutil.copyfile(own / "trainA/0.png", own / changed)
        assert key(tmp_path, start, own) != before
        (own / changed).write_bytes(content)
    assert key(tmp_path, start, own) == before


def test_a_tree_may_end_in_a_device(data, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = device_plan(
        tmp_path / "plans" / "tree.yaml", start, data, out="edge", epochs=0, rounds=3,
        quantisation={"subset_size": 2}, quality=["psnr"],
    )  # fmt: skip
    tree, _ = modelsoup.read_tree(plan)
    report = modelsoup.run(tree, "device.safetensors", store="store")
    assert Path("plans/edge/int8.xml").is_file()  # beside the plan
    # Calibrated and not trained: the float weights are those of the start.
    before, after = load_file(start), load_file("device.safetensors")
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    (record,) = (one for one in report.records.values() if one.get("metrics"))
    told = json.loads(Path("plans/edge/report.json").read_text())
    speed = told["speed"]["models"]
    sizes = [sum(Path(f"plans/edge/{name}{end}").stat().st_size for end in (".xml", ".bin"))
             for name in ("int8", "fp32")]  # fmt: skip
    assert record["metrics"] == {
        "kept_epoch": 0, "psnr": told["candidates"][0]["psnr"],
        "psnr_calibrated": told["candidates"][0]["psnr"],
        "faster_than_torch": speed["torch"]["latency"] / speed["int8.xml"]["latency"],
        "faster_than_float": speed["fp32.xml"]["latency"] / speed["int8.xml"]["latency"],
        "size_ratio": sizes[0] / sizes[1],
    }  # fmt: skip
    assert told["candidates"][0]["psnr"] > 30
    assert record["notes"]["quality"] == told["quality"]
    assert record["notes"]["origin"]["float_xxh3_128"] == told["origin"]["float_xxh3_128"]
    assert record["notes"]["versions"]["nncf"] == metadata.version("nncf")
    assert modelsoup.run(tree, "device.safetensors", store="store", force=True).computed == ()


def test_a_model_that_cannot_be_put_in_place_is_told_and_leaves_nothing(made, tmp_path):
    """A folder has its name, in which there is something."""
    (tmp_path / "model.xml").mkdir()
    (tmp_path / "model.xml" / "notes").write_text("kept")
    model = export.read(made.out / "fp32.xml")
    with pytest.raises(modelsoup.OutputError, match=r"model\.xml cannot be written: .*directory"):
        export.write(model, tmp_path / "model.xml", {})
    assert {path.name for path in tmp_path.iterdir()} <= {"model.xml", "model.bin"}
    assert (tmp_path / "model.xml" / "notes").read_text() == "kept"


def test_a_network_of_another_trainer_is_quantised_at_sides_that_it_wants(data, tmp_path):
    """A U-Net that halves three times sees pictures of 20 × 20, continued to 24 × 24."""
    from modelsoup_i2i.trainers.pix2pix import Pix2Pix, Pix2PixOptions

    sizes = {"load_size": 20, "crop_size": 20, "sheet_every": 0}
    shape = {"width": 8, "downs": 3, "d_width": 8, "patch": 1}
    pairs = tmp_path / "pairs"
    for part in ("train", "test"):
        for kind in "AB":
            (pairs / f"{part}{kind}").mkdir(parents=True)
            for n, file in enumerate(sorted((data / "trainA").iterdir())):
                shutil.copy(file, pairs / f"{part}{kind}" / f"{n}.png")
    session = Pix2Pix().session(Pix2PixOptions(data=pairs, **sizes, **shape), None, seed=0)
    session.save(tmp_path / "start.safetensors")
    out = tmp_path / "out"
    words = ["--data", pairs, "-o", out, "--epochs", 1, "--rounds", 0, "--json"]
    words += [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
    made = CliRunner().invoke(
        main, ["openvino", "quantize", str(tmp_path / "start.safetensors"), "--trainer", "pix2pix",
               *map(str, words)],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    told = json.loads((out / "report.json").read_text())
    assert told["origin"]["network"] == "G" and told["origin"]["multiple"] == "8"
    assert len(told["candidates"]) == 2 and told["candidates"][0]["psnr"] > 20
    done = CliRunner().invoke(
        main, ["openvino", "run", str(out / "int8.xml"), str(pairs / "testA" / "0.png"),
               str(tmp_path / "made.png")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    picture, given = read_image(tmp_path / "made.png"), read_image(pairs / "testA" / "0.png")
    assert picture.shape == given.shape
