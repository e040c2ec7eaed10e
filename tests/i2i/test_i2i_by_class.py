"""What is measured by class has the values that are known, where what is made is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from modelsoup_i2i.measuring import extractors
from modelsoup_i2i.measuring.by_class import (
    accuracy,
    indices_in,
    mean_frechet,
    mean_kernel,
    over_noise,
    trained_on,
)
from modelsoup_i2i.measuring.class_evaluation import ClassSets, evaluate_classes, making
from modelsoup_i2i.measuring.extractors import Extractor, predicted
from modelsoup_i2i.measuring.metric_names import CLASS_METRICS, is_better, must_be_known
from modelsoup_i2i.measuring.metrics import Result, frechet, kernel
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.classifier import Classifier, ClassifierOptions
from modelsoup_i2i.trainers.deepi2i import DeepI2I, DeepI2IOptions
from modelsoup_i2i.trainers.gan import Gan, GanOptions
from modelsoup_i2i.use.models import Model
from torch import nn

from modelsoup import ParameterError

NAMES = ("red", "green", "blue")
SIDE = 16


def features(count: int, seed: int, dimension: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def pictures(name: str, count: int, seed: int = 0, side: int = SIDE) -> list[np.ndarray]:
    """Noise around a grey with a bright square, all of one colour, the square somewhere."""
    rng = np.random.default_rng((seed, NAMES.index(name)))
    made = rng.integers(0, 60, (count, side, side, 3)).astype(np.uint8)
    made[..., NAMES.index(name)] += 60
    for one, (top, left) in zip(made, rng.integers(0, side - 8, (count, 2)), strict=True):
        one[top : top + 8, left : left + 8] += 120
    return list(made)


def of_each(count: int, seed: int = 0) -> dict[str, list[np.ndarray]]:
    return {name: pictures(name, count, seed) for name in NAMES}


def coloured(seen, index: int) -> list[np.ndarray]:
    """A translator without fault: the colour becomes the class's, and the rest stays."""
    made = []
    for picture in seen:
        own = int(picture.reshape(-1, 3).mean(axis=0).argmax())
        moved = picture.copy()
        moved[..., own] -= 60
        moved[..., index] += 60
        made.append(moved)
    return made


def sound(seen, index: int, noise) -> list[np.ndarray]:
    return coloured(seen, index)


REAL = of_each(40, 1)
OTHERS = {name: pictures(name, 40, 7) for name in NAMES}


def from_nothing(seen, index: int, noise) -> list[np.ndarray]:
    """A generator of classes that sees no picture: what it makes, its noise says alone."""
    return [OTHERS[NAMES[index]][number % 40] for number in noise]


def constant(seen, index: int, noise) -> list[np.ndarray]:
    return [np.full((SIDE, SIDE, 3), 90, np.uint8)] * len(seen)


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    """A classifier that knows the three colours, by the trainer itself."""
    root = tmp_path_factory.mktemp("net")
    for name in NAMES:
        (root / "set" / name).mkdir(parents=True)
        for n, picture in enumerate(pictures(name, 30, 3)):
            save_png(picture, root / "set" / name / f"{n}.png")
    options = ClassifierOptions(
        data=root / "set", load_size=SIDE, crop_size=SIDE, batch=16, epochs=5, device="cpu",
        sheet_every=0, lr=5e-3,
    )  # fmt: skip
    session = Classifier().session(options, None, seed=0)
    session.run(lambda *_: None, lambda _: None)
    session.save(root / "colours.safetensors")
    return root / "colours.safetensors"


def values(results: list[Result]) -> dict[str, float]:
    return {result.name: result.value for result in results}


# Pure functions.


def test_a_mean_over_classes_is_that_of_each_classs_distance():
    fake = {"a": features(30, 0), "b": features(20, 1) + 2}
    real = {"a": features(30, 2), "b": features(25, 3)}
    own = {n: (torch.from_numpy(fake[n]), torch.from_numpy(real[n])) for n in fake}
    for mean, one in ((mean_frechet, frechet), (mean_kernel, kernel)):
        found = mean(fake, real)
        each = {name: one(*pair) for name, pair in own.items()}
        assert found.value == pytest.approx(np.mean(list(each.values())))
        assert {n: told["value"] for n, told in found.classes.items()} == pytest.approx(each)
        assert (found.classes["b"]["n_fake"], found.classes["b"]["n_real"]) == (20, 25)


def test_classes_that_swapped_their_outputs_are_far_though_the_whole_set_is_the_same():
    """That is what a mean over classes is for."""
    real = {"a": features(30, 0), "b": features(30, 1) + 5}
    swapped = {"a": real["b"], "b": real["a"]}
    whole = [torch.from_numpy(np.concatenate(list(own.values()))) for own in (swapped, real)]
    assert abs(frechet(*whole)) < 1e-2 and mean_frechet(swapped, real).value > 50
    assert abs(mean_frechet(real, real).value) < 1e-2
    assert mean_kernel(swapped, real).value > 100 > mean_kernel(real, real).value


def test_a_distance_of_fewer_pictures_than_features_is_marked():
    enough, few = ({"a": features(count, 0), "b": features(9, 1)} for count in (9, 3))
    assert mean_frechet(enough, enough).note == ""
    assert "of 3 pictures of a class with 4 features it is biased" in mean_frechet(few, few).note
    assert mean_kernel(few, few).note == ""


def test_too_few_pictures_of_a_class_are_told_by_its_name():
    with pytest.raises(ParameterError, match="'b' has 1 and 9"):
        mean_frechet({"a": features(9, 0), "b": features(1, 0)}, {n: features(9, 1) for n in "ab"})


def brightest(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float().mean(dim=(2, 3))


KNOWS = Extractor("colours", "", 3, "none", {}, nn.Identity(), logits=brightest, classes=NAMES)


def test_an_accuracy_is_the_share_that_is_seen_as_its_class():
    given = {"red": pictures("red", 4), "blue": [*pictures("blue", 1), *pictures("red", 3)]}
    assert predicted(KNOWS, given["blue"]).tolist() == [2, 0, 0, 0]
    found = accuracy(KNOWS, given, indices_in(KNOWS, list(given)))
    assert found.value == 62.5
    assert {name: own["value"] for name, own in found.classes.items()} == {"red": 100, "blue": 25}


def test_a_class_that_a_classifier_does_not_know_is_named():
    assert indices_in(KNOWS, ["blue", "red"]) == {"blue": 2, "red": 0}
    with pytest.raises(ParameterError, match="colours does not know the class 'rde'; did you"):
        indices_in(KNOWS, ["red", "rde"])


def test_what_learns_from_outputs_knows_what_is_in_them(tmp_path: Path):
    learnt = trained_on(of_each(20), epochs=4)
    assert learnt.classes == NAMES and learnt.dimension == 64
    right = accuracy(learnt, of_each(10, 5), indices_in(learnt, NAMES)).value
    assert right > 90
    # Outputs without a relation to their class teach nothing.
    mixed = of_each(20)
    shuffled = [one for trio in zip(*mixed.values(), strict=True) for one in trio]
    none = trained_on({name: shuffled[20 * n :][:20] for n, name in enumerate(NAMES)}, epochs=4)
    assert accuracy(none, of_each(10, 5), indices_in(none, NAMES)).value < 70


def test_a_distance_over_noise_is_the_mean_over_pairs_of_one_source():
    def distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first - second).abs().mean(dim=(1, 2, 3)) * 127.5

    greys = [[np.full((4, 4, 3), level, np.uint8) for level in own] for own in ((0, 3, 9), (5, 5))]
    through = Extractor("grey", "", 0, "none", {}, nn.Identity(), distance=distance)
    assert over_noise(greys, through) == pytest.approx(((3 + 9 + 6) / 3 + 0) / 2, rel=1e-5)


# The whole.


def evaluated(make, net: Path, metrics=None, **more) -> dict[str, float]:
    names = metrics or [
        "mfd-colours", "mkd-colours", "rc", "collapse", "diversity", "duplicates", "spread",
        "source_use", "noise_use", "source_rank",
    ]  # fmt: skip
    sets = ClassSets(inputs=of_each(30, 2), real=REAL)
    more = {"extractor": net, "classifier": net, "count": 40} | more
    return values(evaluate_classes(make, NAMES, sets, names, **more))


def test_a_sound_translator_is_found_sound(net: Path):
    found = evaluated(sound, net)
    assert found["rc"] > 95 and found["rc_ceiling"] > 95
    assert found["rc_floor"] == pytest.approx(100 / 3)
    assert found["collapse"] == 0
    assert found["source_rank"] > 0.95
    assert 0.6 < found["source_use"] < 1.5
    assert found["noise_use"] == 0  # it takes none, and that is no collapse


def test_what_is_made_of_a_class_and_noise_alone_is_unmasked_by_the_use_of_the_source(net: Path):
    """Its distances and its RC are as good as a translator's: the papers' tables cannot tell."""
    control, translator = evaluated(from_nothing, net), evaluated(sound, net)
    assert control["rc"] > 95 and control["mfd-colours"] < 3 * translator["mfd-colours"] + 1
    assert control["source_use"] == 0 and control["collapse"] == 1  # a warning
    assert control["noise_use"] > 0.6
    assert 0.4 < control["source_rank"] < 0.6


def test_one_grey_is_dead(net: Path):
    found = evaluated(constant, net)
    assert found["collapse"] == 3 and found["diversity"] < 0.1
    assert found["source_rank"] == pytest.approx(0.5, abs=0.1)
    assert found["mfd-colours"] > 10 * evaluated(sound, net)["mfd-colours"]


def test_a_generator_that_gives_the_real_pictures_back_has_their_accuracy(net: Path):
    def given_back(seen, index: int, noise) -> list[np.ndarray]:
        return [REAL[NAMES[index]][n % 40] for n in range(len(seen))]

    found = evaluated(given_back, net, ["rc", "mfd-colours"])
    assert found["rc"] == found["rc_ceiling"]
    assert abs(found["mfd-colours"]) < 1e-2


def test_what_was_learnt_of_outputs_stands_between_its_ceiling_and_its_floor(net: Path):
    sets = ClassSets(of_each(16, 2), of_each(12, 1), train=of_each(30, 4))

    def wrong(seen, index: int, noise) -> list[np.ndarray]:
        return coloured(seen, (index + 1) % 3)

    good, bad = (
        values(evaluate_classes(make, NAMES, sets, ["fc"], count=16)) for make in (sound, wrong)
    )
    assert good["fc"] > 80 and good["fc_ceiling"] > 80
    assert good["fc_floor"] == bad["fc_floor"] == pytest.approx(100 / 3)
    assert bad["fc"] < 20 and bad["fc_ceiling"] == good["fc_ceiling"]


def test_each_input_of_another_class_comes_once_with_a_noise_of_its_own(net: Path):
    seen: list[tuple[int, list[bytes], list[int]]] = []

    def noted(given, index: int, noise) -> list[np.ndarray]:
        seen.append((index, [one.tobytes() for one in given], list(noise)))
        return coloured(given, index)

    inputs = of_each(10, 2)
    sets = ClassSets(inputs, {name: REAL[name] for name in ("green", "blue")})
    for _ in range(2):
        evaluate_classes(noted, NAMES, sets, ["mkd-colours"], extractor=net, count=15)
    assert seen[:2] == seen[2:]  # drawn by the seed
    assert [index for index, _, _ in seen[:2]] == [1, 2]
    for (index, given, noise), own in zip(seen[:2], ("green", "blue"), strict=True):
        assert index == NAMES.index(own)
        assert len(set(given)) == 15
        assert not set(given) & {one.tobytes() for one in inputs[own]}
        assert noise == list(range(15 * index, 15 * index + 15))
    evaluate_classes(noted, NAMES, sets, ["mkd-colours"], extractor=net, count=15, seed=1)
    assert set(seen[4][1]) != set(seen[0][1])


def test_a_result_says_what_it_was_computed_with(net: Path):
    sets = ClassSets(of_each(9, 2), of_each(8, 1))
    (result,) = evaluate_classes(sound, NAMES, sets, ["mfd-colours"], extractor=net)
    assert (result.n_fake, result.n_real, result.dimension) == (54, 24, 64)
    assert result.extractor == "colours" and result.sha256 == extractors.classifier(net).sha256
    assert "of 8 pictures of a class with 64 features" in result.note
    told = json.loads(json.dumps(result.as_json()))["classes"]
    assert list(told) == list(NAMES) and told["red"]["n_fake"] == 18
    assert np.mean([own["value"] for own in told.values()]) == pytest.approx(result.value)


SIZES = {"size": "32s", "ch": 8, "classes": 3, "chunk": 4, "shared": 8, "attention": 0}


def test_a_model_makes_the_same_of_the_same_numbers_whatever_stands_beside_them():
    options = DeepI2IOptions(**SIZES)
    torch.manual_seed(0)
    networks = {name: own.build() for name, own in DeepI2I().networks(options).items()}
    module = DeepI2I().joined(options)["T"].build(networks)
    make = making(Model("T", DeepI2I().translators(options)["T"], module, NAMES))
    seen = pictures("red", 20, side=32)
    made = make(seen, 1, range(20))
    assert len(made) == 20 and made[0].shape == (32, 32, 3)
    for one, numbers, same in (
        (make(seen[3:5], 1, [3, 4]), (3, 4), True), (make(seen[3:5], 1, [4, 3]), (3, 4), False),
        (make(seen[3:5], 2, [3, 4]), (3, 4), False), (make(seen[:2], 1, [3, 4]), (3, 4), False),
    ):  # fmt: skip
        apart = [np.abs(a.astype(int) - made[n]).max() for a, n in zip(one, numbers, strict=True)]
        assert bool(max(apart) <= 1) is same


def test_a_generator_that_sees_no_picture_is_the_control(net: Path):
    options = GanOptions(**SIZES)
    torch.manual_seed(0)
    module = Gan().networks(options)["G"].build()
    make = making(Model("G", Gan().translators(options)["G"], module, NAMES))
    sets = ClassSets({n: pictures(n, 12, 2, 32) for n in NAMES}, {n: REAL[n] for n in NAMES})
    names = ["source_use", "noise_use", "source_rank"]
    found = values(evaluate_classes(make, NAMES, sets, names, extractor=net))
    assert found["source_use"] == pytest.approx(0, abs=1e-3) and found["noise_use"] > 0.001
    assert 0.3 < found["source_rank"] < 0.7


@pytest.mark.needs("offline")
def test_diversity_over_noise_is_that_of_outputs_of_one_input(net: Path):
    sets = ClassSets(
        {n: pictures(n, 3, 2, side=32) for n in NAMES}, {n: pictures(n, 3, 1, 32) for n in NAMES}
    )

    def shaded(seen, index: int, noise) -> list[np.ndarray]:
        return [np.roll(own, number, axis=1) for own, number in zip(seen, noise, strict=True)]

    of = {
        make: values(evaluate_classes(make, NAMES, sets, ["st-lpips_over_noise"]))
        for make in (sound, shaded)
    }
    assert of[sound] == {"st-lpips_over_noise": 0} and of[shaded]["st-lpips_over_noise"] > 0.01


def test_what_cannot_be_measured_is_told(net: Path):
    sets = ClassSets(of_each(4, 2), of_each(4, 1))

    def refused(said: str, metrics, classes=NAMES, sets=sets, **more) -> None:
        with pytest.raises(ParameterError, match=said):
            evaluate_classes(sound, classes, sets, metrics, **more)

    refused("the metric rc needs a classifier", ["rc"])
    refused("there is no metric 'psnr'", ["psnr"])
    refused(r"'mfd-colours'.*seen with extractor, a file colours\.safetensors", ["mfd-colours"])
    refused("one class: there is none to translate into", ["fc"], ("red",))
    refused("class 'blue', which the translator lacks", ["fc"], ("red", "green"))
    few = ClassSets({"red": REAL["red"]}, of_each(4, 1))
    refused("'red' has 4 real pictures and 0 inputs of other classes", ["fc"], sets=few)
    with pytest.raises(ParameterError, match="1 outputs were made of 8 pictures"):
        evaluate_classes(lambda seen, *_: seen[:1], NAMES, sets, ["fc"])


def test_names_say_which_value_is_better():
    must_be_known(CLASS_METRICS, by_class=True)
    for name in ("rc", "fc", "source_use", "source_rank", "diversity", "st-lpips_over_noise"):
        assert is_better(name, 2, 1)
    for name in ("mfid-64", "mkid", "mfd-my_pairs", "collapse", "duplicates"):
        assert is_better(name, 1, 2)


def test_training_pictures_that_lack_a_class_are_told_before_anything_is_made():
    few = ClassSets(of_each(16, 2), REAL, train={"red": REAL["red"]})

    def make(*_: object) -> list[np.ndarray]:
        raise AssertionError("something was made")

    with pytest.raises(ParameterError, match="fewer than 2 of the class 'green'"):
        evaluate_classes(make, NAMES, few, ["fc"])
