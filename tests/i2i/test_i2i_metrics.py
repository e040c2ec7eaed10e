"""Distances are what they are called, and never lend a canonical name to another network."""

import hashlib
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from modelsoup_i2i import ResnetGenerator
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.measuring import extractors, metrics
from modelsoup_i2i.measuring.evaluation import evaluate_folders, evaluate_model
from modelsoup_i2i.measuring.metric_names import OFFLINE
from modelsoup_i2i.pictures.images import list_images, read_image, save_png, to_tensor
from modelsoup_i2i.pictures.transforms import Transform
from safetensors.torch import load_file, save_file

from modelsoup import ParameterError, SoupError

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"
needs_alex = pytest.mark.needs("offline")


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PAIRS", 100)


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def emoji(folder: str, count: int) -> list[np.ndarray]:
    return [read_image(file) for file in list_images(EMOJI / folder)[:count]]


def noisy(pictures: list[np.ndarray], strength: float) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        np.clip(p + random.normal(0, strength, p.shape), 0, 255).astype(np.uint8) for p in pictures
    ]


def test_a_set_is_at_distance_zero_from_itself():
    features = normal(50, 8)
    assert abs(metrics.frechet(features, features)) < 1e-3


def test_a_shift_costs_its_square():
    features, shift = normal(200, 6), torch.arange(6.0)
    assert metrics.frechet(features, features + shift) == pytest.approx(55, rel=1e-3)


def test_two_gaussians_have_the_closed_form():
    first, second = normal(400, 3), normal(400, 3, 1) * torch.tensor([2.0, 1.0, 0.5]) + 1

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag(np.sqrt(values)) @ vectors.T

    a, b = (x.double().numpy() for x in (first, second))
    s, t = np.cov(a.T), np.cov(b.T)
    middle = root(root(s) @ t @ root(s))  # tr √(st), by symmetric matrices alone
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * middle)
    assert metrics.frechet(first, second) == pytest.approx(expected, rel=1e-4)


def test_the_kernel_distance_is_the_unbiased_estimate():
    x, y = normal(12, 4).double(), normal(12, 4, 1).double() + 1
    kxx, kyy, kxy = ((a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off = 12 * 11
    expected = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / off - 2 * kxy.mean()
    assert metrics.kernel(x, y) == pytest.approx(float(expected), rel=1e-5)
    assert metrics.kernel(x, y) == pytest.approx(metrics.kernel(y, x), rel=1e-5)
    assert metrics.kernel(normal(40, 4), normal(40, 4, 1)) < 0.3  # and it may be negative


def test_sets_of_two_sizes_give_the_same_kernel_distance_each_time():
    before = torch.get_rng_state()
    x, y = normal(20, 4), normal(35, 4, 1)
    assert metrics.kernel(x, y, 3) == metrics.kernel(x, y, 3) != metrics.kernel(x, y, 4)
    assert torch.equal(before, torch.get_rng_state())


@needs_alex
def test_distances_on_real_pictures_are_in_the_right_order():
    """The other half of a style, the same a little and much noisier."""
    train = emoji("trainA", 96)
    values = {
        name: metrics.evaluate(
            pictures, train[:48], metrics=["fd-st-alex", "kd-st-alex", "st-lpips_to_real"]
        )
        for name, pictures in (
            ("same", train[48:]), ("noisy", noisy(train[48:], 20)),
            ("noise", noisy(train[48:], 80)),
        )
    }  # fmt: skip
    for at in range(3):
        same, some, most = (values[name][at].value for name in ("same", "noisy", "noise"))
        assert same < some < most
    assert abs(values["same"][1].value) < 0.2


@needs_alex
def test_perceptual_distances_are_those_of_the_pairs_that_they_name():
    inputs, truth = emoji("testA", 6), emoji("testB", 6)
    own = ["st-lpips_to_input", "st-lpips_to_truth", "st-lpips_pairs", "psnr", "ssim"]

    def of(fake: list[np.ndarray]) -> dict[str, float]:
        results = metrics.evaluate(fake, inputs=inputs, truth=truth, metrics=own)
        return {result.name: result.value for result in results}

    same, perfect = of(inputs), of(truth)
    assert same["st-lpips_to_input"] == 0 < same["st-lpips_to_truth"]
    assert perfect["st-lpips_to_truth"] == 0 < perfect["st-lpips_to_input"]
    assert perfect["psnr"] == np.inf and perfect["ssim"] == pytest.approx(1)
    assert of(inputs[:1] * 6)["st-lpips_pairs"] == 0 < same["st-lpips_pairs"]
    extractor = extractors.shift_tolerant()
    a, b = (torch.stack([to_tensor(x) for x in pictures]) for pictures in (inputs, truth))
    with torch.no_grad():
        direct = float(extractor.distance(a, b).mean())
    assert same["st-lpips_to_truth"] == pytest.approx(direct, rel=1e-5)


@needs_alex
def test_the_seed_draws_the_pairs_and_the_subsets():
    """Of sets of two sizes; the same seed gives the same values."""
    fake, real = emoji("testA", 12), emoji("testB", 9)

    def of(seed: int) -> dict[str, float]:
        names = ["st-lpips_pairs", "st-lpips_to_real", "kd-st-alex", "fd-st-alex"]
        results = metrics.evaluate(fake, real, metrics=names, seed=seed)
        return {result.name: result.value for result in results}

    first, other = of(1), of(2)
    assert first == of(1)
    assert first.pop("fd-st-alex") == other.pop("fd-st-alex")  # draws nothing
    assert all(first[name] != other[name] for name in first)


def test_psnr_is_that_of_a_constant_error():
    dark, light = (np.full((16, 16, 3), value, np.uint8) for value in (100, 110))
    (result,) = metrics.evaluate([dark], truth=[light], metrics=["psnr"])
    assert result.value == pytest.approx(20 * np.log10(255 / 10), rel=1e-6)


@pytest.mark.needs("offline", "pretrained")  # it imports torchvision
def test_the_network_is_the_packages_own(monkeypatch: pytest.MonkeyPatch):
    """Its modules are run as a reference, with what they import and do not need left out."""
    import sys
    import types

    for name in ("IPython", "torchsummary"):
        fake = types.ModuleType(name)
        fake.embed = fake.summary = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, fake)
    reference = importlib.import_module("stlpips_pytorch.stlpips")
    theirs = reference.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    a, b = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    with torch.no_grad():
        expected = theirs(a * 2 - 1, b * 2 - 1).flatten()
        ours = extractors.shift_tolerant().distance(a * 2 - 1, b * 2 - 1)
    assert torch.allclose(ours, expected, rtol=1e-5)


@needs_alex
def test_a_result_says_what_it_was_computed_with():
    pictures = emoji("testA", 5)
    (result,) = metrics.evaluate(pictures, emoji("testB", 4), metrics=["fd-st-alex"])
    assert (result.n_fake, result.n_real, result.dimension) == (5, 4, 256)
    assert result.extractor == "st-alex" and result.sha256 == extractors.ST_SHA256
    assert {"torch", "torchmetrics", "stlpips-pytorch"} <= result.versions.keys()
    assert re.search(r"of 4 pictures with 256 features", result.note)
    assert json.loads(json.dumps(result.as_json()))["resize"] == "none"


@needs_alex
def test_pictures_of_another_size_are_compared_at_the_translations_size():
    big = [np.repeat(np.repeat(p, 2, 0), 2, 1) for p in emoji("testA", 4)]
    (result,) = metrics.evaluate(emoji("testA", 4), big, truth=big, metrics=["st-lpips_to_truth"])
    assert result.value < 0.05 and "first translation's size" in result.resize


def test_canonical_names_need_canonical_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither a missing file nor one that only bears the name gives a number."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pictures = [np.zeros((32, 32, 3), np.uint8)] * 3
    for name, file in (
        ("fid-64", extractors.INCEPTION), ("kid", extractors.INCEPTION),
        ("lpips_pairs", extractors.ALEXNET),
    ):  # fmt: skip
        with pytest.raises(extractors.MissingWeightsError, match=rf"put {re.escape(file)}"):
            metrics.evaluate(pictures, pictures, metrics=[name])
    wrong = tmp_path / "hub" / "checkpoints" / extractors.INCEPTION
    wrong.parent.mkdir(parents=True)
    wrong.write_bytes(b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()[:12]
    with pytest.raises(extractors.MissingWeightsError, match=f"{digest}.*begins with 6726825d"):
        metrics.evaluate(pictures, pictures, metrics=["fid-2048"])


@needs_alex
def test_other_weights_are_not_taken_for_the_packages(tmp_path: Path):
    (tmp_path / "other.pth").write_bytes(b"no")
    with pytest.raises(extractors.MissingWeightsError, match="SHA-256"):
        extractors.shift_tolerant(tmp_path / "other.pth")


@pytest.mark.needs("pretrained")
@pytest.mark.filterwarnings("ignore:::torchvision")  # of the reference; ours says nothing
def test_canonical_lpips_is_the_package_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a backbone of random values whose file is made to bear its own hash."""
    import lpips

    torch.manual_seed(0)
    plain = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    backbone = {f"features.{k.split('.', 1)[1]}": v for k, v in plain.net.state_dict().items()}
    torch.save(backbone, tmp_path / "any.pth")
    digest = hashlib.sha256((tmp_path / "any.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "ALEXNET", f"alexnet-owt-{digest[:8]}.pth")
    extractor = extractors.lpips_alexnet(tmp_path / "any.pth")
    a, b = normal(1, 3 * 64 * 64).reshape(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(extractor.distance(a, b), plain(a, b).flatten())
        assert float(extractor.distance(a, a)) == 0


def test_what_is_asked_wrongly_is_one_sentence():
    pictures = [np.zeros((16, 16, 3), np.uint8)] * 3
    with pytest.raises(ParameterError, match="no metric 'fid-65'; did you mean 'fid-64'"):
        metrics.evaluate(pictures, pictures, metrics=["fid-65"])
    with pytest.raises(ParameterError, match="psnr needs the truth: a picture"):
        metrics.evaluate(pictures, pictures, metrics=["psnr"])
    with pytest.raises(ParameterError, match="3 translations, but 2 truth"):
        metrics.evaluate(pictures, truth=pictures[:2], metrics=["psnr"])
    with pytest.raises(ParameterError, match="fake holds no images"):
        metrics.evaluate([], pictures, metrics=["fd-st-alex"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = ResnetGenerator(4, 1).state_dict()
    save_file({f"G_A.{name}": value for name, value in state.items()}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def small_set(folder: Path, count: int = 4) -> Path:
    for part in ("testA", "testB", "trainB"):
        (folder / part).mkdir(parents=True)
        for at, picture in enumerate(emoji(part, count)):
            save_png(picture, folder / part / f"{at}.png")
    return folder


@needs_alex
def test_a_model_is_measured_as_its_saved_translations_are(model: Path, tmp_path: Path):
    data = small_set(tmp_path / "data")
    from modelsoup_i2i.use.translate import translate

    translate(model, data / "testA", tmp_path / "out")
    direct = evaluate_model(model, data)
    saved = evaluate_folders(tmp_path / "out", data / "testB")
    values = {result.name: result.value for result in direct}
    assert set(OFFLINE) == set(values)
    for result in saved:
        assert values[result.name] == pytest.approx(result.value, rel=1e-6)
    (train,) = evaluate_model(model, data, metrics=["fd-st-alex"], real="train")
    assert train.value != values["fd-st-alex"]


@needs_alex
def test_a_model_is_measured_at_the_size_of_training_on_request(model: Path, tmp_path: Path):
    """All pictures come to size first: the same as if they had been saved so."""
    data, small = small_set(tmp_path / "data"), tmp_path / "small"
    size = Transform(load=(28, 28), crop=(24, 24))
    for part in ("testA", "testB"):
        for file in list_images(data / part):
            (small / part).mkdir(parents=True, exist_ok=True)
            save_png(size.for_test(read_image(file)), small / part / file.name)
    names = ["fd-st-alex", "st-lpips_to_truth", "psnr"]
    (direct, saved, whole) = (
        [result.value for result in evaluate_model(model, folder, metrics=names, transform=how)]
        for folder, how in ((data, size), (small, None), (data, None))
    )
    assert direct == saved != whole
    asked = ["evaluate", str(model), "--data", str(data), "--metrics", "psnr", "--json"]
    told = json.loads(CliRunner().invoke(i2i, [*asked, "--size", "24"]).stdout)
    assert told[0]["value"] == direct[2]
    refused = CliRunner().invoke(
        i2i, ["evaluate", "--images", "x", "--against", "y", "--size", "24"]
    )
    assert "--size is for a model's inputs" in str(refused.exception)


@needs_alex
def test_pictures_that_are_too_small_for_a_network_are_refused():
    """As small as it says is fine."""
    for side in (20, 21):
        pictures = list(np.random.default_rng(0).integers(0, 256, (3, side, 30, 3), np.uint8))
        for name in ("fd-st-alex", "st-lpips_pairs"):
            if side == 21:
                (result,) = metrics.evaluate(pictures, pictures[::-1], metrics=[name])
                assert np.isfinite(result.value)
                continue
            with pytest.raises(ParameterError, match=f"{name} needs.*21 pixels.*is 20 × 30"):
                metrics.evaluate(pictures, pictures, metrics=[name])


def test_each_translation_is_large_enough_for_a_window_not_the_first_alone():
    pictures = [np.full((side, 9, 3), 99, np.uint8) for side in (9, 6, 5)]
    (result,) = metrics.evaluate(pictures[:2], truth=pictures[:2], metrics=["ssim"])
    assert result.value == pytest.approx(1)
    with pytest.raises(ParameterError, match=r"ssim needs.*6 pixels a.* translation 3 is 5"):
        metrics.evaluate(pictures, truth=pictures, metrics=["psnr", "ssim"])


@needs_alex
def test_without_truth_no_truth_is_compared(model: Path, tmp_path: Path):
    data = small_set(tmp_path / "data")
    (data / "testB" / "0.png").rename(data / "testB" / "other.png")
    assert "psnr" not in {result.name for result in evaluate_model(model, data)}
    with pytest.raises(ParameterError, match="psnr needs the truth: a picture"):
        evaluate_model(model, data, metrics=["psnr"])


@needs_alex
def test_the_command_prints_a_table_or_json(model: Path, tmp_path: Path):
    data = small_set(tmp_path / "data")
    asked = ["evaluate", str(model), "--data", str(data), "--metrics", "fd-st-alex,psnr"]
    shown = CliRunner().invoke(i2i, asked)
    assert shown.exit_code == 0 and "fd-st-alex" in shown.stdout
    assert "Warning: fd-st-alex of 4 pictures with 256 features" in shown.stderr
    (data / "testB" / "later.gif").touch()
    asked = CliRunner().invoke(i2i, [*asked, "--json"])
    assert [result["name"] for result in json.loads(asked.stdout)] == ["fd-st-alex", "psnr"]
    assert asked.stderr.startswith("left out: 1 of ") and "later.gif" in asked.stderr


@pytest.mark.parametrize("direction", ["x2y", "y2x"])
def test_test_pictures_may_lie_in_any_two_folders(model: Path, tmp_path: Path, direction: str):
    data = small_set(tmp_path / "data", 3)
    there = load_file(model)
    back = {name.replace("G_A", "G_B"): value.flip(0) for name, value in there.items()}
    save_file(there | back, model)
    asked = ["evaluate", str(model), "--direction", direction, "--metrics", " psnr, ssim", "--json"]
    in_one = CliRunner().invoke(i2i, [*asked, "--data", str(data)])
    (data / "testA").rename(tmp_path / "x")
    (data / "testB").rename(tmp_path / "y")
    (tmp_path / "y" / "later.gif").touch()
    folders = ["--test-a", str(tmp_path / "x"), "--test-b", str(tmp_path / "y")]
    in_two = CliRunner().invoke(i2i, [*asked, *folders])
    assert in_two.exit_code == 0 and "later.gif" in in_two.stderr
    told = json.loads(in_two.stdout)
    assert told == json.loads(in_one.stdout) and [r["name"] for r in told] == ["psnr", "ssim"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["m", "--data", "d", "--against", "y"], "--against is what --images are compared with"),
        (["--images", "x", "--against", "y", "--data", "d"], "--data is for a model's inputs"),
        (["--images", "x", "--against", "y", "--test-b", "d"], "--test-b is for a model's inputs"),
        (["--images", "x", "--against", "y", "--real", "test"], "--real is for a model's inputs"),
        (["--images", "x", "--against", "y", "--direction", "x2y"], "--direction is for a model"),
        (["m", "--test-a", "x", "--test-b", "y", "--real", "test"], "--real chooses among the"),
        (["m", "--data", "d", "--test-a", "x", "--test-b", "y"], "a model is measured on a set"),
        (["m", "--test-a", "x"], "--test-a and --test-b"),
        (["m", "--data", "d", "--metrics", "psnr", "--lpips-backbone", "w"], "is for lpips_…, and"),
        (["m", "--data", "d", "--inception-weights", "w"], "--inception-weights is for fid-… and"),
        (["m", "--data", "d", "--metrics", " ,"], "--metrics names none"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(asked: list[str], said: str):
    result = CliRunner().invoke(i2i, ["evaluate", *asked])
    assert isinstance(result.exception, ParameterError) and said in str(result.exception)


def test_the_command_wants_a_model_or_two_folders(tmp_path: Path):
    for asked, said in (
        ([], "either a model"), (["m", "--images", "x"], "either a model"),
        (["m"], "--data"), (["--images", "x"], "--against"),
    ):  # fmt: skip
        result = CliRunner().invoke(i2i, ["evaluate", *asked])
        assert isinstance(result.exception, SoupError) and said in str(result.exception)
