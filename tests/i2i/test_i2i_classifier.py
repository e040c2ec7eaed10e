"""A classifier is trained as any other network is, and what it sees is named by its file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.measuring.by_class import predicted
from modelsoup_i2i.measuring.extractors import classifier as load
from modelsoup_i2i.measuring.metrics import evaluate, features
from modelsoup_i2i.networks.classifiers import MADE_BY, classifier, classifier_in
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.classifier import Classifier, ClassifierOptions
from modelsoup_i2i.use.classes import classes_in
from safetensors.torch import load_file, save_file

import modelsoup
from modelsoup.terminal.cli import main

SMALL = {"load_size": 12, "crop_size": 12, "batch": 8, "epochs": 6, "device": "cpu"}
QUIET = {"sheet_every": 0, "threads": 0}


def make_set(root: Path, count: int = 12, seed: int = 0, side: int = 12) -> Path:
    """Pictures that are dark or light, noisy."""
    rng = np.random.default_rng(seed)
    for name, level in (("dark", 40), ("light", 160)):
        (root / name).mkdir(parents=True)
        for n in range(count):
            noise = rng.integers(0, 90, (side, side, 3))
            save_png((level + noise).astype(np.uint8), root / name / f"{n}.png")
    return root


def trained(data: Path, output: Path, **more) -> list[tuple[float, dict[str, float]]]:
    """Train by a job, as a plan does; what was reported."""
    reports: list[tuple[float, dict[str, float]]] = []
    options = ClassifierOptions(data=data, **{**SMALL, **QUIET, **more})
    work = output.with_suffix("")
    work.mkdir()
    job = modelsoup.Job(
        start=None, output=output, work=work, frozen=(), seed=0, options=options,
        report=lambda done, figures: reports.append((done, dict(figures))), log=lambda _: None,
    )  # fmt: skip
    Classifier().train(job)
    return reports


@pytest.mark.parametrize("kind", MADE_BY)
def test_names_and_shapes_are_told_without_building_and_back(kind: str):
    told = classifier(kind, 10, 3)
    built = told.build()
    assert {n: tuple(t.shape) for n, t in built.state_dict().items()} == told.shapes()
    assert list(built.state_dict()) == list(told.shapes())
    assert classifier_in({f"C.{n}": shape for n, shape in told.shapes().items()}) == (kind, told)
    images = torch.rand(2, 3, 32, 40)
    assert built(images).shape == (2, 10)
    assert built.features(images).shape == (2, {"small": 64, "resnet18": 512}[kind])
    assert torch.equal(built.eval()(images), built.fc(built.features(images)))


def test_the_counts_are_those_that_are_known():
    """The small one's by hand; torchvision's ResNet-18 has 11,689,512 for 1000 classes."""

    def trainable(kind: str, classes: int) -> int:
        return sum(p.numel() for p in classifier(kind, classes, 3).build().parameters())

    convolutions = 9 * (3 * 32 + 32 * 64 + 64 * 64)
    assert trainable("small", 10) == convolutions + 2 * (32 + 64 + 64) + 64 * 10 + 10
    assert trainable("resnet18", 1000) == 11_689_512


def test_a_resnet_is_torchvisions(tmp_path: Path):
    """The same weights, by torchvision's names, give the same logits."""
    torchvision = pytest.importorskip("torchvision.models", exc_type=ImportError)
    own, other = classifier("resnet18", 7, 3).build(), torchvision.resnet18(num_classes=7)
    other.load_state_dict(own.state_dict())
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(own.eval()(images), other.eval()(images), atol=1e-5)


def test_it_learns_and_tells_the_share_of_test_pictures_that_it_knows(tmp_path: Path):
    root, test = make_set(tmp_path / "set"), make_set(tmp_path / "test", 9, seed=1)
    output = tmp_path / "net.safetensors"
    reports = trained(root, output, test=test)
    assert classes_in(output) == ("dark", "light")
    figures = {name: value for _, own in reports for name, value in own.items()}
    assert figures["test_accuracy"] == 1 and figures["accuracy"] > 0.9
    assert figures["cross_entropy"] == pytest.approx(figures["classify"])  # accuracy weighs nothing
    assert figures["cross_entropy"] < math.log(2)
    assert not any("test_accuracy" in own for _, own in trained(root, tmp_path / "n.safetensors"))


def test_a_damaged_test_picture_is_told_before_the_training(tmp_path: Path):
    root, test = make_set(tmp_path / "set"), make_set(tmp_path / "test", 3)
    (test / "dark" / "0.png").write_bytes(b"nothing")
    output = tmp_path / "net.safetensors"
    with pytest.raises(modelsoup.SoupError, match=r"dark/0\.png"):
        trained(root, output, test=test)
    assert not output.exists()
    reports = trained(root, tmp_path / "n.safetensors", test=test, on_bad_image="skip", epochs=1)
    assert "test_accuracy" in reports[-1][1]


@pytest.mark.parametrize("optimiser", ["Adam", "AdamW", "SGD"])
def test_any_of_the_optimisers_moves_it(tmp_path: Path, optimiser: str):
    options = ClassifierOptions(
        data=make_set(tmp_path / "set"), optimiser=optimiser, weight_decay=1e-4, lr=0.01,
        **SMALL, **QUIET,
    )  # fmt: skip
    session = Classifier().session(options, None, seed=0)
    figures = session.run(lambda *_: None, lambda _: None)
    assert figures["cross_entropy"] < 0.4


def test_wrong_options_are_told(tmp_path: Path):
    def refused(said: str, **more) -> None:
        with pytest.raises(ValueError, match=said):
            ClassifierOptions(data=tmp_path, **more)

    refused("crop_size is 7, but the classifier small needs at least 8", load_size=9, crop_size=7)
    refused("batch is 1, but batch norm needs two pictures", batch=1)


def test_a_checkpoint_of_something_else_is_no_extractor(tmp_path: Path):
    file, one = tmp_path / "net.safetensors", torch.ones(2)

    def refused(said: str, **tensors) -> None:
        save_file(tensors, file)
        with pytest.raises(modelsoup.MismatchError, match=said):
            load(file)

    refused(r"net\.safetensors: there is no classifier: no C\.layers\.0\.weight or", w=one)
    whole = {f"C.{n}": t for n, t in classifier("small", 3, 3).build().state_dict().items()}
    lacking = {n: t for n, t in whole.items() if n != "C.layers.1.bias"}
    refused(r"net\.safetensors: the classifier 'C' lacks layers\.1\.bias \[32\]", **lacking)
    refused(r"'C' has extra \[2\], which such a network lacks", **whole, **{"C.extra": one})
    with pytest.raises(modelsoup.CheckpointError, match=r"C\.fc\.bias holds NaN"):
        save_file({**whole, "C.fc.bias": torch.full((3,), torch.nan)}, file)
        load(file)


# As an extractor.


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("net")
    make_set(root / "set")
    output = root / "shades.safetensors"
    said = CliRunner().invoke(
        main,
        ["train", "classifier", "-o", str(output), "--set", f"data={root / 'set'}"]
        + [f"--set={name}={value}" for name, value in {**SMALL, **QUIET}.items()],
    )
    assert said.exit_code == 0, said.output
    return output


def test_distances_through_it_are_called_by_its_files_name_and_never_fid(net: Path):
    dark, light = ([np.full((12, 12, 3), own + n, np.uint8) for n in range(9)] for own in (40, 160))
    near, far = (
        {
            r.name: r
            for r in evaluate(dark, other, metrics=["fd-shades", "kd-shades"], extractor=net)
        }
        for other in (dark, light)
    )
    assert abs(near["fd-shades"].value) < 1e-3 and far["fd-shades"].value > 0.1
    assert near["kd-shades"].value < far["kd-shades"].value
    result = far["fd-shades"]
    assert (result.extractor, result.dimension) == ("shades", 64)
    assert len(result.sha256) == 64 and "with 64 features is biased" in result.note
    for name in ("fid-2048", "fd-other", "fd-st-alex "):
        with pytest.raises(modelsoup.SoupError):
            evaluate(dark, light, metrics=[name], extractor=net)


def test_a_file_cannot_lend_its_distances_the_name_of_another_network(net: Path, tmp_path: Path):
    for name in ("st-alex", "inception-2048"):
        copy = tmp_path / f"{name}.safetensors"
        copy.write_bytes(net.read_bytes())
        with pytest.raises(modelsoup.ParameterError, match="the name of another network: rename"):
            evaluate([np.zeros((12, 12, 3), np.uint8)] * 2, metrics=[], extractor=copy)


def test_it_sees_pictures_at_the_size_of_its_training(net: Path):
    """As its lineage says it; a copy without one sees them as they are."""
    seen = load(net)
    assert seen.resize == "12 × 12, as in its training" and seen.classes == ("dark", "light")
    pictures = [np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)]
    bare = net.with_name("bare.safetensors")
    save_file(load_file(net), bare)
    plain = load(bare)
    assert plain.resize == "none" and plain.classes == ()
    through = [features(pictures, one) for one in (seen, plain)]
    assert not np.allclose(*through)
    small = [np.full((12, 12, 3), 200, np.uint8), np.full((12, 12, 3), 30, np.uint8)]
    assert np.allclose(features(small, seen), features(small, plain))
    assert predicted(seen, small).tolist() == [1, 0]


def test_the_command_measures_through_it_and_keeps_what_it_saw_of_the_real_ones(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MODELSOUP_CACHE", str(tmp_path / "cache"))
    root = make_set(tmp_path / "set")
    folders = ["evaluate", "--images", str(root / "dark"), "--against", str(root / "light")]
    given = [*folders, "--extractor", str(net), "--metrics", "fd-shades,kd-shades"]
    first, again = (CliRunner().invoke(i2i, [*given, "--json"]) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.output == again.output
    assert [own["name"] for own in json.loads(first.stdout)] == ["fd-shades", "kd-shades"]
    (kept,) = (tmp_path / "cache" / "features").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    told = CliRunner().invoke(i2i, given)
    assert "features are computed again, since" in told.stderr and told.exit_code == 0


def test_an_extractor_that_no_metric_looks_through_is_told(net: Path, tmp_path: Path):
    root = make_set(tmp_path / "set")
    folders = ["evaluate", "--images", str(root / "dark"), "--against", str(root / "light")]
    told = CliRunner().invoke(i2i, [*folders, "--extractor", str(net), "--metrics", "ssim"])
    assert isinstance(told.exception, modelsoup.ParameterError)
    assert "--extractor is for fd-shades and kd-shades, and --metrics names none" in str(
        told.exception
    )
    with pytest.raises(modelsoup.ParameterError, match=r"extractor, a file shades\.safetensors"):
        evaluate([np.zeros((12, 12, 3), np.uint8)] * 2, metrics=["fd-shades"])
