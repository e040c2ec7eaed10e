"""A translator to classes is measured while it trains, and afterwards for its record."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.classifier import Classifier, ClassifierOptions
from modelsoup_i2i.trainers.deepi2i import DeepI2I
from modelsoup_i2i.trainers.gan import Gan, GanOptions
from modelsoup_i2i.training.trainer import ImageTrainer

import modelsoup

NAMES = ("dark", "light", "middle")
SIZES = {"size": "32s", "ch": 8, "chunk": 4, "shared": 8, "attention": 0}
PLAIN = {"batch": 3, "device": "cpu", "threads": 0, "sheet_every": 0, "epochs": 3}
COLLAPSE = ["collapse", "diversity", "duplicates", "spread", "source_use", "noise_use",
            "source_rank"]  # fmt: skip


def make_set(root: Path, count: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name, level in zip(NAMES, (20, 160, 90), strict=True):
        (root / name).mkdir(parents=True)
        for n in range(count):
            noise = rng.integers(0, 90, (32, 32, 3))
            save_png((level + noise).astype(np.uint8), root / name / f"{n}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Training and test pictures, and a classifier of them, `shades`."""
    root = tmp_path_factory.mktemp("data")
    make_set(root / "train", 3)
    make_set(root / "test", 4, seed=1)
    options = ClassifierOptions(
        data=root / "test", load_size=32, crop_size=32, **{**PLAIN, "batch": 6}
    )
    session = Classifier().session(options, None, seed=0)
    session.run(lambda *_: None, lambda _: None)
    session.save(root / "shades.safetensors")
    return root


def train(
    trainer: ImageTrainer, data: Path, folder: Path, **more
) -> tuple[Path, dict[str, float], dict, list[str]]:
    """The result of a training, its last figures, notes and log."""
    figures: dict[str, float] = {}
    notes: dict = {}
    said: list[str] = []
    given = {**PLAIN, "extractor": data / "shades.safetensors", **more}
    if isinstance(trainer, DeepI2I):
        given |= {"scratch": True}
    options = trainer.options(data=data / "train", test=data / "test", **SIZES, **given)
    (folder / "work").mkdir(parents=True)
    job = modelsoup.Job(
        start=None, output=folder / "out.safetensors", work=folder / "work", frozen=(), seed=0,
        options=options, report=lambda _, own: figures.update(own), log=said.append,
        note=notes.update, shown=folder / "shown",
    )  # fmt: skip
    trainer.train(job)
    return job.output, figures, notes, said


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "shown" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_distance_of_classes_comes_with_a_verdict_and_the_use_of_the_source(
    data: Path, tmp_path: Path
):
    given = {"evaluate": ["mfd-shades", "mkd-shades", "rc"], "evaluate_n": 4}
    _, figures, notes, said = train(
        DeepI2I(), data, tmp_path, evaluate_every=2, classifier=data / "shades.safetensors", **given
    )
    names = ["mfd-shades", "mkd-shades", "rc", "rc_ceiling", "rc_floor", *COLLAPSE]
    told = rows(tmp_path)
    assert [row["step"] for row in told] == ["2", "4", "6", "8", "9"]
    for row in told:
        assert set(row) == {"step", "seconds", *names}
        assert all(np.isfinite(float(row[name])) for name in names)
        assert float(row["rc_floor"]) == pytest.approx(100 / 3, rel=1e-5)
    # What the record has is the last row again: of the same weights, sources and noises.
    found = {one["name"]: one for one in notes["evaluated"]}
    assert list(found) == names
    for name in names:
        assert found[name]["value"] == pytest.approx(float(told[-1][name]), rel=1e-3, abs=1e-3)
        assert figures[name] == found[name]["value"]
    assert found["mfd-shades"]["n_fake"] == found["mfd-shades"]["n_real"] == 12
    assert found["mfd-shades"]["note"] in "\n".join(said)


def test_an_evaluation_of_classes_changes_nothing_of_the_training(data: Path, tmp_path: Path):
    plain, *_ = train(DeepI2I(), data, tmp_path / "a")
    looked, *_ = train(
        DeepI2I(), data, tmp_path / "b", evaluate=["mfd-shades", "fc"], evaluate_every=2,
        evaluate_n=4,
    )  # fmt: skip
    first, second = map(modelsoup.open_checkpoint, (plain, looked))
    assert list(first.tensors) == list(second.tensors)
    for name in first.tensors:
        assert np.array_equal(first[name], second[name]), name
    assert {"fc", "fc_ceiling", "fc_floor"} <= set(rows(tmp_path / "b")[0])


def test_a_generator_that_sees_no_picture_is_measured_as_the_control(data: Path, tmp_path: Path):
    _, figures, *_ = train(Gan(), data, tmp_path, evaluate=["mfd-shades"], evaluate_n=4, ema=0.5)
    assert figures["source_use"] == pytest.approx(0, abs=1e-3) and "mfd-shades" in figures


def test_the_best_by_a_metric_of_classes_is_kept_and_what_it_depends_on_is_in_the_key(
    data: Path, tmp_path: Path
):
    more = {"evaluate": ["mkd-shades"], "evaluate_every": 2, "evaluate_n": 4}
    best = {**more, "keep": {"best": "mkd-shades"}}
    _, figures, *_ = train(Gan(), data, tmp_path, **best)
    lowest = min(float(row["mkd-shades"]) for row in rows(tmp_path))
    assert figures["mkd-shades"] == pytest.approx(lowest, rel=1e-3, abs=1e-3)
    file = data / "shades.safetensors"
    last, kept = (
        Gan().files(
            GanOptions(data=data / "train", test=data / "test", extractor=file, **SIZES, **own)
        )
        for own in (more, best)
    )
    assert file not in last and file in kept
    assert not {*(data / "test").rglob("*.png")} & {*last}
    assert {*(data / "test").rglob("*.png")} < {*kept}


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory) -> Path:
    output, *_ = train(DeepI2I(), data, tmp_path_factory.mktemp("model"), epochs=1)
    return output


def told(*asked: object) -> list[dict]:
    done = CliRunner().invoke(i2i, ["evaluate", *map(str, asked), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    found: list[dict] = json.loads(done.stdout)
    return found


def test_the_command_measures_a_translator_to_classes_and_its_control(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MODELSOUP_CACHE", str(tmp_path / "cache"))
    net = data / "shades.safetensors"
    asked = [model, "--data", data / "test", "--extractor", net, "--count", 4]
    found = {one["name"]: one for one in told(*asked, "--classifier", net)}
    assert list(found) == [
        "mfd-shades", "mkd-shades", "rc", "rc_ceiling", "rc_floor", *COLLAPSE,
    ]  # fmt: skip
    assert list(found["mfd-shades"]["classes"]) == list(NAMES)
    assert found["mfd-shades"]["n_fake"] == 12
    assert len([*(tmp_path / "cache" / "features").iterdir()]) == 3  # the real ones of each class
    assert {one["name"]: one for one in told(*asked, "--classifier", net)} == found
    control, rank = told(*asked, "--control", "--metrics", "source_use,source_rank")
    assert rank["name"] == "source_rank"
    assert control["value"] == pytest.approx(0, abs=1e-3)
    assert control["value"] < found["source_use"]["value"]
    (fc, ceiling, floor) = told(*asked[:3], "--metrics", "fc", "--train", data / "train")
    assert [one["name"] for one in (fc, ceiling, floor)] == ["fc", "fc_ceiling", "fc_floor"]


def test_inputs_of_a_class_that_the_model_does_not_know_are_translated_too(
    data: Path, model: Path, tmp_path: Path
):
    test = make_set(tmp_path / "test", 4, seed=1)
    (test / "dark").rename(test / "unseen")
    asked = ["--data", test, "--extractor", data / "shades.safetensors"]
    (found,) = (o for o in told(model, *asked, "--metrics", "mkd-shades") if "mkd" in o["name"])
    assert {name: own["n_fake"] for name, own in found["classes"].items()} == {
        "light": 8, "middle": 8,
    }  # fmt: skip


def test_those_of_some_classes_can_be_measured_alone(data: Path, model: Path, tmp_path: Path):
    asked = [model, "--data", data / "test", "--extractor", data / "shades.safetensors"]
    asked += ["--metrics", "mkd-shades", "--count", 4]
    every = {one["name"]: one for one in told(*asked)}["mkd-shades"]["classes"]
    assert every.keys() == {*NAMES}
    some = {one["name"]: one for one in told(*asked, "--sources", "dark, middle")}["mkd-shades"]
    # Of two classes each becomes the other, and all become the third.
    assert {n: own["n_fake"] for n, own in some["classes"].items()} == dict.fromkeys(NAMES, 4)
    alone = {one["name"]: one for one in told(*asked, "--sources", "dark")}["mkd-shades"]
    assert alone["classes"].keys() == {"light", "middle"}
    assert alone["classes"]["light"]["value"] != every["light"]["value"]
    twice = {one["name"]: one for one in told(*asked, "--sources", "dark,dark")}["mkd-shades"]
    assert twice["classes"] == alone["classes"]
    only = make_set(tmp_path / "test", 4, seed=1)
    for name in ("light", "middle"):
        (only / name).rename(only / f"un{name}")
    for place, given, said in (
        (data / "test", "midle", "the test pictures have no class 'midle' to translate; did you "
         "mean 'middle'? (there are dark, light, middle)"),
        (data / "test", " ,", "--sources names none: leave it out for all classes"),
        (only, "dark", "'dark' alone is translated, and the test pictures have no other class of "
         "the translator"),
    ):  # fmt: skip
        words = [model, "--data", place, *asked[3:], "--sources", given]
        done = CliRunner().invoke(i2i, ["evaluate", *map(str, words)])
        assert isinstance(done.exception, modelsoup.ParameterError)
        assert str(done.exception) == said


def test_options_of_another_kind_of_model_are_told(data: Path, model: Path, tmp_path: Path):
    def refused(said: str, *asked: object) -> None:
        done = CliRunner().invoke(i2i, ["evaluate", *map(str, asked)])
        assert isinstance(done.exception, modelsoup.ParameterError)
        assert said in str(done.exception)

    test, net = data / "test", data / "shades.safetensors"
    refused("name their folder, in which each folder is a class, with --data", model)
    refused("--size is for models of two domains", model, "--data", test, "--size", 32)
    refused("there is no metric 'kid'", model, "--data", test, "--metrics", "kid")
    images = ["--images", test / "dark", "--against", test / "light"]
    refused("--classifier is for translators to classes", *images, "--classifier", net)
    refused("--control is for models whose generator", *images, "--control")
    refused(
        "--train is for fc, and --metrics does not", model, "--data", test, "--metrics",
        "collapse", "--train", test,
    )  # fmt: skip
    other = tmp_path / "strange"
    for name in ("a", "b"):
        (other / name).mkdir(parents=True)
        for n in range(2):
            save_png(np.zeros((32, 32, 3), np.uint8), other / name / f"{n}.png")
    refused("none of the classes of the test pictures (a, b) is one", model, "--data", other,
            "--metrics", "collapse", "--extractor", net)  # fmt: skip


def test_what_cannot_be_measured_costs_no_training(data: Path, tmp_path: Path):
    def refused(said: str, test: Path, error=modelsoup.ParameterError, **more) -> None:
        folder = tmp_path / f"at-{test.name}-{len(list(tmp_path.iterdir()))}"
        with pytest.raises(error, match=said):
            train(Gan(), data, folder, **{"evaluate": ["mfd-shades"], "test": test, **more})
        assert not (folder / "out.safetensors").exists()

    def train(trainer, data: Path, folder: Path, *, test: Path, **more) -> None:
        (folder / "work").mkdir(parents=True)
        given = {**PLAIN, "extractor": data / "shades.safetensors", **more}
        options = GanOptions(data=data / "train", test=test, **SIZES, **given)
        trainer.train(
            modelsoup.Job(
                start=None, output=folder / "out.safetensors", work=folder / "work", frozen=(),
                seed=0, options=options, report=lambda *_: None, log=lambda _: None,
            )
        )  # fmt: skip

    one = make_set(tmp_path / "one", 2)
    (one / "dark" / "0.png").unlink()
    refused("the class 'dark' has 1 test pictures that can be read, where at least 2", one)
    bad = make_set(tmp_path / "bad", 3)
    (bad / "light" / "1.png").write_bytes(b"nothing")
    refused(r"light/1\.png", bad, modelsoup.SoupError)
    gone = tmp_path / "net.safetensors"
    refused("net", data / "test", modelsoup.SoupError, evaluate=["mfd-net"], extractor=gone)
    few = make_set(tmp_path / "few", 3)
    other = ClassifierOptions(
        data=few, classes=("dark", "light"), load_size=32, crop_size=32, **{**PLAIN, "epochs": 1}
    )
    session = Classifier().session(other, None, seed=0)
    session.save(tmp_path / "two.safetensors")
    refused(
        "the classifier two does not know the class 'middle'", data / "test", evaluate=["rc"],
        classifier=tmp_path / "two.safetensors",
    )  # fmt: skip


def test_a_damaged_test_picture_may_be_left_out(data: Path, tmp_path: Path):
    bad = make_set(tmp_path / "bad", 3)
    (bad / "light" / "1.png").write_bytes(b"nothing")
    options = GanOptions(data=data / "train", test=bad, **SIZES)
    sets = options.test_sets(options.transform())
    sound, faults = sets.must_allow(["collapse"], skip=True)
    assert [len(own) for own in sound.test.values()] == [3, 2, 3]
    assert len(faults) == 1 and "1.png" in faults[0]


def test_a_collapse_that_is_asked_for_alone_is_told_with_what_it_is_told_by(data, tmp_path):
    given = {"evaluate": ["collapse"], "evaluate_every": 1, "evaluate_n": 4}
    _, figures, _, said = train(Gan(), data, tmp_path, **given)
    assert figures["collapse"] >= 1  # of noise alone: nothing of a source is used
    assert {"diversity", "duplicates"} <= figures.keys()
    assert not any("not evaluated" in line for line in said)
