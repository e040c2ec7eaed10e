"""Translators that are joined of networks, and take noise, classes and styles, in INT8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from joined_toys import JoinedToy, ToyOptions
from modelsoup_i2i.networks.spectral import folded
from modelsoup_i2i.pictures.images import read_image, save_png
from modelsoup_i2i.use.translate import translate
from modelsoup_openvino import export, measure
from modelsoup_openvino.infer import Translator
from modelsoup_openvino.qat import outputs
from modelsoup_openvino.quantise import (
    Quantisation,
    load_into,
    load_quantised,
    quantised,
    trained_apart,
)
from safetensors.numpy import load_file

import modelsoup
from modelsoup import get_trainer, open_checkpoint
from modelsoup.terminal.cli import main

PLACE = {"device": "cpu", "threads": 0, "sheet_every": 0}
TINY = {
    "size": "32s", "ch": 8, "chunk": 4, "shared": 8, "attention": 0, "batch": 2, **PLACE,
}  # fmt: skip
LONG = {**PLACE, "load_size": 36, "crop_size": 32, "batch": 2}
FULL = {"overflow_fix": "enable"}  # so that no CPU saturates


def soup(*arguments):
    return CliRunner().invoke(main, ["openvino", *map(str, arguments)])


# DeepI2I: an encoder, an adaptor and a generator, whose weights have spectral norms.


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of coloured squares of each of three classes."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (root / name).mkdir()
        for n in range(4):
            squares = rng.integers(0, 256, (4, 4, 3))
            picture = np.kron(squares, np.ones((8, 8, 1))).astype(np.uint8)
            save_png(picture, root / name / f"{n}.png")
    return root


def deepi2i(classes: Path, **options):
    trainer = get_trainer("deepi2i")
    return trainer, trainer.options(data=classes, **TINY, **options)


@pytest.fixture(scope="module")
def several(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a DeepI2I."""
    trainer, options = deepi2i(classes, scratch=True)
    path = tmp_path_factory.mktemp("several") / "several.safetensors"
    trainer.session(options, None, seed=1).save(path)
    return path


@pytest.fixture(scope="module")
def joined(quantise, several: Path, classes: Path, tmp_path_factory: pytest.TempPathFactory):
    """It in INT8, after one step of training."""
    training = {
        "data": str(classes), "phase1": 0, "per_class": 2, "test_per_class": 2, "batch": 6,
    }  # fmt: skip
    return quantise(
        tmp_path_factory.mktemp("joined"), model=several, of="deepi2i", epochs=1, rate=1e-5,
        training=training, sizes=PLACE, held_out=3,
        quantisation={**FULL, "subset_size": 3},
    )  # fmt: skip


def test_a_joined_translator_is_quantised_as_one(joined):
    model = export.read(joined.out / "int8.xml")
    assert [port.get_any_name() for port in model.inputs] == ["image", "z", "class"]
    assert [list(port.get_shape()) for port in model.inputs] == [[1, 3, 32, 32], [1, 16], [1]]
    assert export.integer_operations(model) == {
        "Convolution": (24, 24), "ConvolutionBackpropData": (3, 3), "MatMul": (13, 13),
    }  # fmt: skip
    assert joined.told["likeness"]["agreement"]["int8"] > 35
    assert joined.told["likeness"]["agreement"]["fp32"] > 90
    assert joined.told["likeness"]["psnr"] > 25
    page = (joined.out / "report.md").read_text()
    assert "T of several.safetensors in INT8" in page
    assert "Each image has `z` and `class` of its own, the same for float32 and INT8" in page


def test_its_networks_stay_what_they_are_called_and_know_their_classes(joined, several):
    before, after = (open_checkpoint(f) for f in (several, joined.out / "float.safetensors"))
    assert {n: i.shape for n, i in after.tensors.items()} == {
        n: i.shape for n, i in before.tensors.items()
    }
    assert {name.partition(".")[0] for name in after.tensors} == {"E", "A", "G", "D"}
    assert after.metadata["modelsoup.classes"] == before.metadata["modelsoup.classes"]
    inside = {name.partition(".")[0] for name in load_file(joined.out / "quantised.safetensors")}
    assert inside == {"E", "A", "G", "__nncf_hooks"}


def test_training_begins_where_calibration_ended(joined):
    """Every quantiser is where it was, or the first step would change much."""
    first, second = (one["psnr"] for one in joined.told["candidates"])
    assert second != first
    assert abs(second - first) < 3


def test_parts_that_losses_call_alone_quantise_as_the_whole_does(joined, several, classes):
    trainer, options = deepi2i(classes, phase1=0)
    session = trainer.session(options, several, seed=0)
    live = session.as_used("T")
    inputs = next(trainer.inputs(session, "T", "train"))
    own = session.in_use("T").module.eval()
    file = joined.out / "quantised.safetensors"
    made = load_quantised(own, file, say=print).eval()
    (expected,), (of_float,) = (outputs(network, [inputs], 1) for network in (made, own))
    # A device has no spectral norms to divide by.
    assert np.allclose(outputs(folded(made), [inputs], 1)[0], expected, atol=1e-6)
    whole = load_into(live, file, say=print).eval()
    others = [network for name, network in session.networks.items() if name != "T"]
    trained_apart(whole, inputs, others)
    session.begin()
    images, z, label = inputs.values()
    with torch.no_grad():
        assert np.array_equal(whole(images, z, label).numpy(), expected)
        features = session["A"](session["E"](images))
        apart = session["G"](z, label, features)
        assert np.array_equal(apart.numpy(), expected)
        assert not np.allclose(apart.numpy(), of_float, atol=1e-3)
        with pytest.raises(modelsoup.TrainerError, match=r"G cannot be trained.*epochs 0 calibr"):
            session["G"](z, label)  # without features, which are added in use
    # Statistics are those of use, and what moves them are the networks' own players.
    assert not any(session.networks[name].training for name in "EAG")
    of_players = {name: {n.partition(".")[0] for n in updates.parameters}
                  for name, updates in session.updates.items()}  # fmt: skip
    assert of_players == {"D": {"D"}, "A": {"A"}, "G": {"G", "T"}}


class Looped(torch.nn.Module):
    """Layers whose places are in no name of NNCF's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 3, 3) for _ in range(3)])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            images = torch.relu(layer(images))
        return images


def test_a_layer_that_is_called_in_a_loop_stays_float_by_its_name():
    image = torch.rand(1, 3, 16, 16)
    how = Quantisation(ignored_names=("layers.1",))
    model = export.converted(quantised(Looped(), [image], how, say=print).eval(), image)
    assert export.integer_operations(model) == {"Convolution": (2, 3)}
    with pytest.raises(modelsoup.ParameterError, match=r"did you mean 'layers\.1'"):
        quantised(Looped(), [image], Quantisation(ignored_names=("layer.1",)), say=print)


def test_openvino_translates_as_torch_does_into_a_class_with_the_same_noise(
    joined, several, classes, tmp_path
):
    source = tmp_path / "in"
    (source / "inner").mkdir(parents=True)
    tall = np.random.default_rng(1).integers(0, 256, (50, 40, 3)).astype(np.uint8)
    save_png(tall, source / "inner" / "tall.png")
    save_png(read_image(classes / "cat" / "0.png"), source / "0.png")
    for seed in (0, 3):
        translate(several, source, tmp_path / f"torch-{seed}", classes="dog", seed=seed)
        done = soup(
            "run", joined.out / "fp32.xml", source, tmp_path / f"ov-{seed}", "--class", "dog",
            "--z-seed", seed,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        for name in ("0.png", "inner/tall.png"):
            expected = read_image(tmp_path / f"torch-{seed}" / name)
            got = read_image(tmp_path / f"ov-{seed}" / name)
            assert got.shape == (32, 32, 3)
            assert np.abs(got.astype(int) - expected).max() <= 1
    first, second = (read_image(tmp_path / f"ov-{seed}" / "0.png") for seed in (0, 3))
    assert not np.array_equal(first, second)


def test_a_model_of_classes_wants_one_and_says_which_there_are(joined, classes, tmp_path):
    source = classes / "cat" / "0.png"
    for arguments, said in (
        ((), "makes pictures of classes: name one (it has cat, dog, owl)"),
        (("--class", "dgo"), "has no class 'dgo'; did you mean 'dog'? (it has cat, dog, owl)"),
        (("--class", "dog", "--given", "z"), "--given z must be NAME=FILE.npy"),
        (("--class", "dog", "--given", "y=a.npy"), "there is no file a.npy with the array 'y'"),
        (("--class", "dog", "--given", f"z={source}"), "is no array as numpy.save writes one"),
    ):
        done = soup("run", joined.out / "int8.xml", source, tmp_path / "out.png", *arguments)
        assert done.exit_code == 1
        assert said in " ".join(done.output.split())
    assert not (tmp_path / "out.png").exists()


def test_noise_may_be_given_in_place_of_a_seed(joined, classes, tmp_path):
    model = Translator(joined.out / "int8.xml")
    assert (model.takes, model.noise) == (("z", "class"), ("z",))
    picture = read_image(classes / "cat" / "0.png")
    drawn = model.given("0.png", "owl", seed=2)
    np.save(tmp_path / "z.npy", drawn["z"][0])
    done = soup(
        "run", joined.out / "int8.xml", classes / "cat" / "0.png", tmp_path / "out.png",
        "--class", "owl", "--given", f"z={tmp_path / 'z.npy'}",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert np.array_equal(read_image(tmp_path / "out.png"), model(picture, drawn))
    for arrays, said in (
        ({"z": np.zeros(5)}, r"'z' has the shape \[5\], where .* takes \[1, 16\]"),
        ({"y": np.zeros(5)}, r"takes no 'y'.*it takes z, class"),
    ):
        with pytest.raises(modelsoup.ParameterError, match=said):
            model.given("", "owl", arrays=arrays)
    with pytest.raises(modelsoup.ParameterError, match="takes no noise that a seed would decide"):
        model.given("", "owl", seed=1, arrays={"z": np.zeros(16)})


# What a translator is called with.


def test_calibration_has_every_class_become_every_class(classes, several):
    trainer, options = deepi2i(classes)
    session = trainer.session(options, several, seed=0)
    inputs = list(trainer.inputs(session, "T", "train"))
    assert [list(own) for own in inputs] == [["image", "z", "class"]] * 12
    shown = [own["image"].numpy() for own in inputs]
    sources = [
        next(place for place, name in enumerate(("cat", "dog", "owl")) for n in range(4)
             if np.allclose(image[0].transpose(1, 2, 0), as_seen(classes / name / f"{n}.png")))
        for image in shown
    ]  # fmt: skip
    assert sources == [0, 1, 2] * 4
    pairs = [(source, int(own["class"][0])) for source, own in zip(sources, inputs, strict=True)]
    assert set(pairs[:9]) == {(one, other) for one in range(3) for other in range(3)}
    assert all(one != other for one, other in pairs[:3])


def as_seen(file: Path) -> np.ndarray:
    return read_image(file).astype(np.float32) / 127.5 - 1


def test_noise_is_the_same_each_time_and_whatever_is_left_out(classes, several, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(classes, other)
    (other / "dog" / "0.png").write_bytes(b"nothing")
    trainer, options = deepi2i(classes)
    own = list(trainer.inputs(trainer.session(options, several, seed=0), "T", "train"))
    _, options = deepi2i(other, on_bad_image="skip")
    rest = list(trainer.inputs(trainer.session(options, several, seed=9), "T", "train"))
    assert len(rest) == len(own) - 1
    del own[1]  # the first picture of the second class
    for one, same in zip(own, rest, strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)
    assert len({tuple(one["z"][0].tolist()) for one in own}) == len(own)


def test_a_network_that_sees_no_pictures_is_told(classes, quantise, tmp_path):
    trainer = get_trainer("gan")
    path = tmp_path / "gan.safetensors"
    trainer.session(trainer.options(data=classes, **TINY), None, seed=1).save(path)
    with pytest.raises(modelsoup.ParameterError, match="G of gan sees no pictures"):
        quantise(tmp_path, model=path, of="gan", sizes=PLACE, training={"data": str(classes)})


# Parts of two networks, a style, averages.


@pytest.fixture(scope="module")
def styled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose averages are others than the last weights."""
    modelsoup.register_trainer(JoinedToy())
    session = JoinedToy().session(ToyOptions(data=data, epochs=1, lr=0.05, **LONG), None, seed=3)
    session.run(lambda *_: None, lambda _: None)
    path = tmp_path_factory.mktemp("styled") / "styled.safetensors"
    session.save(path)
    return path


@pytest.fixture(scope="module")
def styled_int8(quantise, styled: Path, tmp_path_factory: pytest.TempPathFactory):
    """It in INT8, calibrated."""
    return quantise(
        tmp_path_factory.mktemp("int8"), model=styled, of="joined-toy", epochs=0, rounds=1,
        sizes=LONG, quantisation=FULL,
    )  # fmt: skip


class Killed(Exception):
    pass


def test_what_is_trained_in_int8_are_the_averages_in_all_networks_it_has_parts_of(
    quantise, styled, data, tmp_path
):
    given = {"model": styled, "of": "joined-toy", "epochs": 2, "rate": 1e-2, "sizes": LONG}

    def kill_after(line):
        return lambda said: (_ for _ in ()).throw(Killed) if said.startswith(line) else None

    with pytest.raises(Killed):
        quantise(tmp_path, say=kill_after("INT8 after calibration"), **given)
    # Had calibration been as bad as this, an epoch after it would be the nearest.
    candidates = tmp_path / "work" / "candidates.json"
    (calibrated,) = json.loads(candidates.read_text())
    candidates.write_text(json.dumps([calibrated | {"psnr": 0.0}]))
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "work", other / "work")
    run = quantise(tmp_path, **given)
    with pytest.raises(Killed):
        quantise(other, say=kill_after("INT8 after epoch 2"), **given)
    again = quantise(other, **given)
    assert any("goes on after step" in line for line in again.lines)
    before, after, same, inside = (
        load_file(file) for file in (styled, run.out / "float.safetensors",
                                     again.out / "float.safetensors",
                                     run.out / "quantised.safetensors")
    )  # fmt: skip
    assert all(np.array_equal(after[name], same[name]) for name in before)
    assert run.told["kept"] and run.told["kept"] == again.told["kept"]
    assert set(after) == set(before)
    parts = {"G_A.content.": "content.", "G_B.mlp.": "decoding.mlp.",
             "G_B.classes.": "decoding.classes.", "G_B.decoder.": "decoding.decoder."}  # fmt: skip
    for name, value in after.items():
        network, _, key = name.partition(".")
        # Both are the average's, trained on; statistics of norms stay.
        plain = f"{network.removesuffix('_ema')}.{key}"
        assert np.array_equal(value, after[plain])
        place = next((of for part, of in parts.items() if plain.startswith(part)), None)
        if place is not None:
            short = next(part for part in parts if plain.startswith(part))
            assert np.array_equal(inside[place + plain.removeprefix(short)], value)
    for name in ("content.1.running_mean", "content.1.running_var"):
        assert np.array_equal(after[f"G_A.{name}"], before[f"G_A_ema.{name}"])
    assert not np.array_equal(after["G_A.content.0.weight"], before["G_A_ema.content.0.weight"])
    # From the average, not from the last weights, which were far from it.
    moved, apart = (
        np.abs(after["G_A.content.0.weight"] - before[f"{n}.content.0.weight"]).mean()
        for n in ("G_A_ema", "G_A")
    )
    assert moved < apart


def test_a_style_is_given_to_a_model_that_takes_one(styled_int8, styled, data):
    run = styled_int8
    own = JoinedToy()
    session = own.session(ToyOptions(data=data, **LONG), styled, seed=0)
    inputs = list(own.inputs(session, "T", "test"))
    model = session.in_use("T")
    # Of noise and of pictures of the target, in turn.
    drawn, like = (one["style"].numpy() for one in inputs)
    assert np.array_equal(drawn, model.how.given(["test 0"])[0])
    second = session.options.transform().for_test(read_image(data / "testB" / "1.png"))
    np.testing.assert_allclose(like, model.style_of([second]), atol=1e-6)
    translator = Translator(run.out / "fp32.xml")
    assert (translator.takes, translator.classes) == (("style", "class"), ("red", "blue"))
    picture = session.options.transform().for_test(read_image(data / "testA" / "1.png"))
    got = translator(picture, translator.given("", "blue", arrays={"style": like}))
    (expected,) = model.made([picture], [like, np.array([1])])
    assert np.abs(got.astype(int) - expected).max() <= 1
    # Without one it is noise, as styles may be here.
    assert translator.noise == ("style",)
    noise = translator.given("a.png", "blue", seed=2)["style"]
    assert np.array_equal(noise, model.how.given(["a.png"], seed=2)[0])
    assert run.told["likeness"]["agreement"]["int8"] > 40
    kept = load_quantised(model.module, run.out / "quantised.safetensors", say=print).eval()
    image = inputs[0]
    with torch.no_grad():
        fake = kept(*image.values()).numpy()
    real = measure.compiled_for(run.out / "int8.xml", "LATENCY")(
        [values.numpy() for values in image.values()]
    )[0]
    assert measure.psnr(real, fake) > 40


def test_models_that_take_more_than_images_are_measured(styled_int8, joined):
    assert set(styled_int8.told["speed"]["models"]) == {"torch", "fp32.xml", "int8.xml"}
    model = styled_int8.out / "int8.xml"
    done = soup("bench", model, "--rounds", "1", "--size", "16", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["image"] == [1, 3, 16, 16]
    assert all(own["latency"] > 0 and own["throughput"] > 0 for own in told["models"].values())
    done = soup("bench", joined.out / "int8.xml", "--against", model)
    assert done.exit_code == 1
    assert "takes an image and style [1, 4] and class [1], but" in done.output
    assert "an image and z [1, 16] and class [1]" in done.output


def test_other_rates_of_a_trainer_are_that_of_the_training_unless_they_are_given(
    quantise, styled, data
):
    from modelsoup_openvino.deploy import deployable, options_for

    trainer = deployable("joined-toy")
    own = options_for(trainer, None, {"data": str(data)}, epochs=1, rate=1e-5)
    assert (own.lr, own.d_lr) == (1e-5, 1e-5)
    own = options_for(trainer, None, {"data": str(data), "d_lr": 0.5}, epochs=1, rate=1e-5)
    assert (own.lr, own.d_lr) == (1e-5, 0.5)
