"""Use of models of classes: which one a checkpoint has, translations, samples, pages, ONNX."""

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from i2i_domains import make_classes
from modelsoup_i2i.networks import biggans
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.networks.spectral import Spectral, folded
from modelsoup_i2i.networks.unet import UnetGenerator
from modelsoup_i2i.pictures.draws import Noise
from modelsoup_i2i.pictures.images import read_image, save_png, to_image, to_tensor
from modelsoup_i2i.trainers.deepi2i import DeepI2I, DeepI2IOptions
from modelsoup_i2i.use.classes import CLASSES
from modelsoup_i2i.use.export import export_onnx
from modelsoup_i2i.use.generators import load_generator, load_model
from modelsoup_i2i.use.models import Model, Wanted
from modelsoup_i2i.use.pages import by_class, interpolated, sampled, write_page
from modelsoup_i2i.use.sampling import sample
from modelsoup_i2i.use.translate import translate, translate_arrays, translated_arrays
from modelsoup_i2i.use.translator import Translator
from safetensors.torch import save_file

import modelsoup
from modelsoup.terminal.cli import main

torch.set_num_threads(1)
NAMES = ("cat", "dog", "bird")
SIZES = {"arch": "32s", "ch": 8, "attention": 0}
OF_G = SIZES | {"classes": 3, "chunk": 4, "shared": 8}


def networks(*names: str) -> dict[str, torch.nn.Module]:
    told = {
        "G": Network(biggans.GENERATOR, OF_G),
        "D": Network(biggans.DISCRIMINATOR, SIZES | {"classes": 3}),
        "E": Network(biggans.ENCODER, SIZES),
        "A": Network(biggans.ADAPTOR, {"arch": "32s", "ch": 8}),
    }  # fmt: skip
    torch.manual_seed(0)
    made = {name: told[name.removesuffix("_ema")].build() for name in names}
    with torch.no_grad():
        for network in made.values():
            for name, parameter in network.named_parameters():
                if parameter.ndim > 1 and not name.startswith(("shared", "embed")):
                    torch.nn.init.orthogonal_(parameter)
            for part in network.modules():
                if isinstance(part, Spectral):  # a training brings the vectors to rest
                    part.train()
                    for _ in range(20):
                        part.divided()
            network.eval()
    return made


def written(path: Path, names: tuple[str, ...] = NAMES, **own: torch.nn.Module) -> Path:
    state = {f"{n}.{key}": v for n, net in own.items() for key, v in net.state_dict().items()}
    told = {CLASSES: json.dumps({name: n for n, name in enumerate(names)})} if names else None
    save_file(state, path, told)
    return path


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of deepi2i."""
    own = networks("E", "A", "G", "D", "A_ema", "G_ema")
    with torch.no_grad():
        own["A_ema"].strength.fill_(2.0)  # so that the source is seen in what is made
    return written(tmp_path_factory.mktemp("deepi2i") / "model.safetensors", **own)


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of gan."""
    return written(tmp_path_factory.mktemp("gan") / "gan.safetensors", **networks("G", "D"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (32, 40), "b.png": (20, 16), "sub/c.png": (64, 64)}.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(rng.integers(0, 256, (*size, 3), np.uint8), tmp_path / "photos" / name)
    return tmp_path / "photos"


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


def soup(*words: object) -> Result:
    return CliRunner().invoke(main, ["i2i", *map(str, words)])


# Which model a checkpoint has.


def test_a_translators_averages_are_used_each_where_there_is_one(translator):
    model = load_model(translator)
    own = modelsoup.open_checkpoint(translator)
    assert (model.name, model.classes, model.size, model.channels) == ("T", NAMES, 32, 3)
    assert not any(part.training for part in model.module.modules())
    for network, stored in (("E", "E"), ("A", "A_ema"), ("G", "G_ema")):
        bias = model.module.get_submodule(network).state_dict()["blocks.0.0.conv1.bias"]
        assert np.array_equal(bias.numpy(), own[f"{stored}.blocks.0.0.conv1.bias"])
    assert model.module.A.strength.tolist() == [2.0, 2.0]


def test_the_trainer_is_the_one_most_of_whose_networks_are_there(translator, gan, tmp_path):
    assert load_model(gan).how.source is None
    assert load_model(translator).how.source == "data"
    # A GAN that has its discriminator's blocks as an encoder too has no adaptor.
    began = written(tmp_path / "e.safetensors", **networks("E", "G", "D"))
    assert load_model(began).name == "G"
    unet = written(tmp_path / "unet.safetensors", (), G=UnetGenerator(4, 2))
    assert isinstance(load_generator(unet), UnetGenerator)


def test_a_training_leaves_a_model_of_its_classes_and_its_options_are_found(tmp_path):
    """A training whose pictures come to size as the network wants it has no sizes to tell."""
    data = make_classes(tmp_path / "data", {"cat": 2, "dog": 2})
    tiny = {"data": data, "size": "32s", "ch": 8, "chunk": 4, "shared": 8, "attention": 0,
            "scratch": "true", "steps": 1, "batch": 2, "device": "cpu"}  # fmt: skip
    words = [word for name, value in tiny.items() for word in ("--set", f"{name}={value}")]
    model = tmp_path / "model.safetensors"
    done = CliRunner().invoke(main, ["train", "deepi2i", "-o", str(model), *words])
    assert done.exit_code == 0, done.output
    translate(model, data / "cat", tmp_path / "out", classes="all", device="cpu")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cat", "dog"}
    told = DeepI2I().options_of(model)
    options = modelsoup.build_options(DeepI2I(), told)
    assert (options.size, options.ch, options.rows, options.chunk) == ("32s", 8, 2, 4)


def test_a_network_that_is_none_of_several_trainers_is_told_by_each(tmp_path):
    save_file({"G.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(modelsoup.MismatchError, match=r"of gan, .* lacks .*; of pix2pix, "):
        load_model(tmp_path / "other.safetensors")


def test_a_part_that_is_missing_of_a_translator_is_named(tmp_path):
    only = written(tmp_path / "part.safetensors", **networks("E", "A"))
    with pytest.raises(
        modelsoup.MismatchError, match=r"no tensor of the generator 'G'.* T is made"
    ):
        load_model(only)


def test_a_trainer_that_wants_options_keeps_no_other_from_being_found(gan, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Wanting(DeepI2IOptions):
        depth: int = None  # type: ignore[assignment]

        def must_fit(self) -> None:
            if self.depth is None:
                raise ValueError("depth is missing")

    class Deep(DeepI2I):
        name, options = "another", Wanting

    monkeypatch.setattr("modelsoup.trees.trainer._trainers", {"another": Deep()})
    assert load_model(gan).name == "G"
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(modelsoup.MismatchError, match=r"another, of whose options .*depth is miss"):
        load_model(tmp_path / "other.safetensors")


def test_more_classes_than_the_generator_knows_are_refused(tmp_path):
    path = written(tmp_path / "gan.safetensors", ("a", "b", "c", "d"), **networks("G"))
    with pytest.raises(modelsoup.MismatchError, match="names 4 classes, but G knows 3"):
        load_model(path)


def test_divided_weights_are_constants_in_use_and_give_the_same():
    own = networks("G", "D")
    z, classes = torch.randn(2, 16), torch.tensor([0, 2])
    with torch.no_grad():
        before = own["G"](z, classes)
        verdicts = own["D"](before, classes)
        torch.testing.assert_close(folded(own["G"])(z, classes), before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(folded(own["D"])(before, classes), verdicts)
    for network in own.values():
        assert not any(isinstance(part, Spectral) for part in network.modules())
        assert not [name for name in network.state_dict() if name.endswith(("u0", "sv0"))]


# Translating.


def test_each_class_gets_a_folder_with_the_names_of_the_sources(translator, photos, tmp_path):
    out = tmp_path / "out"
    done = soup("translate", translator, photos, out, "--classes", "all", "--device", "cpu")
    assert done.exit_code == 0 and done.output == f"9 written to {out}\n"
    assert files(out) == sorted(f"{c}/{name}" for c in NAMES for name in files(photos))
    model = load_model(translator)
    for name in files(photos):
        picture = read_image(photos / name)
        for label, called in enumerate(NAMES):
            (own,) = model.made([picture], model.how.given([name], label))
            made = read_image(out / called / name)
            assert made.shape == (32, 32, 3)
            assert np.abs(made.astype(int) - own).max() <= 1  # another batch


def test_one_class_needs_no_folder_and_samples_are_numbered(translator, photos, tmp_path):
    words = ("--class", "dog", "--samples", "2", "--z-seed", "3", "--device", "cpu")
    assert soup("translate", translator, photos, tmp_path / "out", *words).exit_code == 0
    names = ["a-1.png", "a-2.png", "b-1.png", "b-2.png", "sub/c-1.png", "sub/c-2.png"]
    assert files(tmp_path / "out") == names
    first, second = (read_image(tmp_path / "out" / f"a-{n}.png").astype(int) for n in (1, 2))
    assert np.abs(first - second).max() > 5
    # A picture alone becomes what it becomes among others.
    soup("translate", translator, photos / "a.png", tmp_path / "one", *words)
    assert files(tmp_path / "one") == ["a-1.png", "a-2.png"]
    assert np.abs(read_image(tmp_path / "one/a-1.png").astype(int) - first).max() <= 1
    again = translate(translator, photos, tmp_path / "other", classes="dog", samples=2, seed=4,
                      device="cpu")  # fmt: skip
    assert np.abs(read_image(again[0]).astype(int) - first).max() > 5


def test_arrays_come_by_picture_then_class_then_sample(translator):
    pictures = [np.full((32, 32, 3), shade, np.uint8) for shade in (0, 250)]
    made = translate_arrays(translator, pictures, classes=["bird", "cat"], samples=2, seed=1)
    assert len(made) == 8
    model = load_model(translator)
    place = 0
    for name, picture in enumerate(pictures):
        for label in (2, 0):
            for n in range(2):
                given = model.how.given([str(name)], label, seed=1, sample=n)
                (own,) = model.made([picture], given)
                assert np.abs(made[place].astype(int) - own).max() <= 1
                place += 1


def test_a_batch_is_all_that_is_read_ahead_whatever_the_number_of_classes(translator):
    read = []

    def pictures():
        for n in range(6):
            read.append(n)
            yield np.full((32, 32, 3), n, np.uint8)

    made = translated_arrays(translator, pictures(), classes="all", batch=2, device="cpu")
    next(made)
    assert len(read) == 1
    assert len(list(made)) == 17


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), r"of classes: name one of them, or several, or all \(it has cat, dog, bird\)"),
        (("--classes", ","), "name one of them"),
        (("--class", "brid"), r"no class 'brid'; did you mean 'bird'\? \(it has cat, dog, bird\)"),
        (("--classes", "cat,dgo"), "no class 'dgo'; did you mean 'dog'"),
        (("--classes", "cat,cat"), "'cat' is named twice"),
        (("--class", "cat", "--classes", "all"), "give one of the two"),
        (("--class", "cat", "--samples", "0"), "samples is 0"),
    ],
)
def test_a_class_that_is_lacking_or_unknown_is_told_and_nothing_is_left(
    translator, photos, tmp_path, words, said
):
    done = soup("translate", translator, photos, tmp_path / "out", "--device", "cpu", *words)
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(said, done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_leaves_no_class_behind(translator, photos, tmp_path):
    (photos / "sub/d.png").write_bytes(b"no picture")
    with pytest.raises(modelsoup.SoupError, match=r"d\.png"):
        translate(translator, photos, tmp_path / "out", classes="all", batch=1, device="cpu")
    assert not (tmp_path / "out").exists()


def test_several_pictures_of_one_want_a_folder(translator, photos, tmp_path):
    words = ("--classes", "cat,dog", "--device", "cpu")
    done = soup("translate", translator, photos / "a.png", tmp_path / "made.png", *words)
    assert done.exit_code == 1 and "where a folder is expected" in done.stderr
    assert soup("translate", translator, photos / "a.png", tmp_path / "made", *words).exit_code == 0
    assert files(tmp_path / "made") == ["cat/a.png", "dog/a.png"]


def test_classes_and_noise_are_for_models_that_take_them(photos, tmp_path):
    unet = written(tmp_path / "unet.safetensors", (), G=UnetGenerator(4, 2))
    for words, said in ((("--class", "cat"), "of no classes"), (("--samples", "2"), "no noise"),
                        (("--z-seed", "1"), "no noise")):  # fmt: skip
        done = soup("translate", unet, photos, tmp_path / "out", "--device", "cpu", *words)
        assert done.exit_code == 1 and said in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_class_whose_name_leads_elsewhere_is_no_folder(photos, tmp_path):
    own = networks("E", "A", "G")
    path = written(tmp_path / "model.safetensors", ("../../cat", "a\nb", ".."), **own)
    with pytest.raises(modelsoup.MismatchError, match="after which no folder can be called"):
        translate(path, photos, tmp_path / "out", classes="all", device="cpu")
    translate(path, photos, tmp_path / "out", classes="../../cat", device="cpu")
    assert files(tmp_path / "out") == files(photos)


def test_classes_without_names_are_called_by_their_indices(photos, tmp_path):
    path = written(tmp_path / "model.safetensors", (), **networks("E", "A", "G"))
    translate(path, photos / "a.png", tmp_path / "out", classes=["2", "0"], device="cpu")
    assert files(tmp_path / "out") == ["0/a.png", "2/a.png"]


def test_a_generator_that_sees_no_pictures_translates_none(gan, photos, tmp_path):
    with pytest.raises(modelsoup.MismatchError, match="soup i2i sample has it make some"):
        translate(gan, photos, tmp_path / "out", classes="cat", device="cpu")


# Sampling.


def test_a_gans_samples_are_files_or_one_page_and_the_same_for_the_same_seed(gan, tmp_path):
    words = ("--class", "dog", "-n", "5", "--seed", "2", "--device", "cpu")
    done = soup("sample", gan, tmp_path / "out", *words, "--batch", "2")
    assert done.exit_code == 0 and done.output == f"5 written to {tmp_path / 'out'}\n"
    assert files(tmp_path / "out") == [f"{n}.png" for n in range(1, 6)]
    assert soup("sample", gan, tmp_path / "page.png", *words, "--sheet").exit_code == 0
    page = read_image(tmp_path / "page.png")
    assert page.shape[:2] == (2 * 36 + 4, 3 * 36 + 4)  # three in a row, 4 pixels about each
    for n in range(5):
        top, left = 4 + 36 * (n // 3), 4 + 36 * (n % 3)
        own = read_image(tmp_path / "out" / f"{n + 1}.png").astype(int)
        assert np.abs(page[top : top + 32, left : left + 32] - own).max() <= 1
    assert (page[40:, 76:] == 255).all()
    rows = table(tmp_path / "page.csv")
    assert [(r["row"], r["column"], r["class"], r["z"]) for r in rows] == [
        ("0", "0", "dog", "0"), ("0", "1", "dog", "1"), ("0", "2", "dog", "2"),
        ("1", "0", "dog", "3"), ("1", "1", "dog", "4"),
    ]  # fmt: skip
    before = (tmp_path / "page.png").read_bytes()
    assert soup("sample", gan, tmp_path / "page.png", *words, "--sheet").exit_code == 1
    assert soup("sample", gan, tmp_path / "page.png", *words, "--sheet", "--force").exit_code == 0
    assert (tmp_path / "page.png").read_bytes() == before


def test_samples_of_several_classes_have_a_folder_each(gan, tmp_path):
    sample(gan, tmp_path / "out", classes="all", count=2, device="cpu")
    assert files(tmp_path / "out") == sorted(f"{c}/{n}.png" for c in NAMES for n in (1, 2))
    sample(gan, tmp_path / "page.png", classes=["cat", "bird"], count=3, sheet=True, device="cpu")
    rows = table(tmp_path / "page.csv")
    assert [r["class"] for r in rows] == ["cat"] * 3 + ["bird"] * 3


def test_a_translators_generator_is_sampled_without_a_source(translator, tmp_path):
    """The control of what the source does: nothing is added to the generator's maps."""
    words = ("--class", "cat", "-n", "2", "--device", "cpu")
    done = soup("sample", translator, tmp_path / "out", *words)
    assert done.exit_code == 1 and "--source none has its generator make some" in done.stderr
    assert not (tmp_path / "out").exists()
    assert soup("sample", translator, tmp_path / "out", *words, "--source", "none").exit_code == 0
    model = load_model(translator)
    for n in range(2):
        z, label = map(torch.from_numpy, model.how.given([""], 0, sample=n))
        with torch.no_grad():
            own = to_image(model.module.G(z, label)[0]).astype(int)
        assert np.abs(read_image(tmp_path / "out" / f"{n + 1}.png") - own).max() <= 1


def test_what_cannot_be_sampled_is_told(gan, tmp_path):
    unet = written(tmp_path / "unet.safetensors", (), G=UnetGenerator(4, 2))
    with pytest.raises(modelsoup.MismatchError, match="of others, and of nothing else"):
        sample(unet, tmp_path / "out", without_source=True)
    for wrong, said in (({"count": 0}, "pictures is 0"), ({"batch": 0}, "batch is 0"),
                        ({}, "name one of them")):  # fmt: skip
        with pytest.raises(modelsoup.ParameterError, match=said):
            sample(gan, tmp_path / "out", device="cpu", **wrong)
    with pytest.raises(modelsoup.OutputError, match=r"page must end in \.png"):
        sample(gan, tmp_path / "page", classes="cat", sheet=True, device="cpu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1.png").write_bytes(b"mine")
    with pytest.raises(modelsoup.OutputError, match="exists"):
        sample(gan, tmp_path / "out", classes="cat", device="cpu")
    assert files(tmp_path / "out") == ["1.png"]


# Pages.


def test_a_page_has_a_row_for_each_source_and_z_and_its_table_tells_each_picture(
    translator, photos, tmp_path
):
    page = tmp_path / "page.png"
    words = ("--data", photos, "--classes", "cat,bird", "--z", "2", "--device", "cpu")
    done = soup("grid", translator, "-o", page, *words)
    assert done.exit_code == 0 and done.output == f"{page}: 18 pictures\n"
    rows = table(tmp_path / "page.csv")
    assert list(rows[0]) == ["row", "column", "source", "class", "z", "checkpoint"]
    assert {r["checkpoint"] for r in rows} == {str(translator)}
    told = [(int(r["row"]), int(r["column"]), r["source"], r["class"], r["z"]) for r in rows]
    assert told == [
        (2 * n + z, column, name, called, str(z) if called else "")
        for n, name in enumerate(files(photos)) for z in range(2)
        for column, called in enumerate(["", "cat", "bird"])
    ]  # fmt: skip
    # Pixels are the network's, rounded: neither scaled nor normalised.
    image, model = read_image(page), load_model(translator)
    for row, column, name, called, z in told:
        seen = model.seen(read_image(photos / name))
        if called:
            given = model.how.given([""], NAMES.index(called), sample=int(z))
            (seen,) = model.made([seen], given)
        top, left = 20 + 36 * row, 4 + sum(widths(image, 3)[:column]) + 4 * column
        left += (widths(image, 3)[column] - 32) // 2
        assert np.abs(image[top : top + 32, left : left + 32].astype(int) - seen).max() <= 1
    before = page.read_bytes()
    assert soup("grid", translator, "-o", page, *words).exit_code == 1
    assert soup("grid", translator, "-o", page, *words, "--force").exit_code == 0
    assert page.read_bytes() == before


def widths(image: np.ndarray, count: int) -> list[int]:
    """Of columns that are as wide as a picture or its title."""
    from math import ceil

    from PIL import Image, ImageDraw

    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    own = [max(32, ceil(ruler.textlength(t)) + 8) for t in ("image", "cat", "bird")][:count]
    assert image.shape[1] == sum(own) + 4 * (count + 1)
    return own


def test_a_page_is_transposed(gan, tmp_path):
    kinds = {"classes": ["dog", "cat"], "samples": 3, "device": "cpu"}
    plain = write_page(gan, tmp_path / "a.png", **kinds)
    turned = write_page(gan, tmp_path / "b.png", transpose=True, **kinds)
    assert (turned.labels, turned.titles, plain.titles) == (["dog", "cat"], [], ["dog", "cat"])
    assert (len(plain.rows), len(turned.rows)) == (3, 2)
    for z in range(3):
        for n in range(2):
            assert np.array_equal(plain.rows[z][n], turned.rows[n][z])
    rows = table(tmp_path / "b.csv")
    assert [(r["row"], r["column"], r["class"], r["z"]) for r in rows] == [
        (str(n), str(z), called, str(z)) for n, called in enumerate(["dog", "cat"])
        for z in range(3)
    ]  # fmt: skip


def test_a_page_goes_from_one_class_to_another_through_the_embedding(translator, photos, tmp_path):
    page = write_page(
        translator, tmp_path / "page.png", kind="interpolate", data=photos / "a.png",
        classes=["cat", "dog"], device="cpu",
    )  # fmt: skip
    model, shares = load_model(translator), np.linspace(0, 1, 7)
    (row,) = page.rows
    image = to_tensor(model.seen(read_image(photos / "a.png")))[None]
    z, label = map(torch.from_numpy, model.how.given([""], 0))
    with torch.no_grad():
        cat, dog = model.module.G.shared(torch.tensor([0, 1]))
        for share, made in zip(shares, row[1:], strict=True):
            own = to_image(model.module(image, z, ((1 - share) * cat + share * dog)[None])[0])
            assert np.abs(made.astype(int) - own).max() <= 1
        ends = [to_image(model.module(image, z, label + n)[0]).astype(int) for n in (0, 1)]
    assert np.abs(row[1] - ends[0]).max() <= 1 and np.abs(row[-1] - ends[1]).max() <= 1
    rows = table(tmp_path / "page.csv")
    assert [float(r["t"]) for r in rows[1:]] == list(shares) and rows[0]["t"] == ""
    assert {r["class"] for r in rows[1:]} == {"cat…dog"} and {r["z"] for r in rows[1:]} == {"0"}


def test_of_one_class_a_page_goes_from_one_noise_to_another(gan, tmp_path):
    done = soup("grid", gan, "-o", tmp_path / "page.png", "--kind", "interpolate", "--classes",
                "bird", "--z", "2", "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0
    page = write_page(gan, tmp_path / "b.png", kind="interpolate", classes="bird", samples=2,
                      device="cpu")  # fmt: skip
    assert (tmp_path / "page.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    model = load_model(gan)
    ends = [model.made(None, model.how.given([""], 2, sample=n))[0] for n in range(3)]
    for row, (first, last) in zip(page.rows, [(0, 1), (1, 2)], strict=True):
        assert np.abs(row[0].astype(int) - ends[first]).max() <= 1
        assert np.abs(row[-1].astype(int) - ends[last]).max() <= 1
    assert page.tiles[0]["z"] == "0…1" and page.tiles[-1]["z"] == "1…2"


def test_a_model_of_noise_alone_needs_no_class(tmp_path):
    class Shades(torch.nn.Module):
        channels, size = 3, 8

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return torch.tanh(z)[:, :, None, None].expand(-1, -1, 8, 8)

    model = Model("G", Translator(None, "X", "made", takes=(Noise("z", (3,)),)), Shades())
    (row,) = interpolated(model, None, model.labels(None)).rows
    first, last = (torch.from_numpy(model.how.given([""], sample=n)[0]) for n in (0, 1))
    for share, made in zip(np.linspace(0, 1, 7), row, strict=True):
        own = torch.tanh(torch.lerp(first, last, float(share)))[0, :, None, None].expand(3, 8, 8)
        assert np.abs(made.astype(int) - to_image(own)).max() <= 1
    assert len(sampled(model, model.labels(None), 5).tiles) == 5
    with pytest.raises(modelsoup.ParameterError, match="G makes pictures of no classes"):
        by_class(model, None, [])


def test_a_net_that_ignores_its_noise_has_equal_pictures_for_it(tmp_path):
    own = networks("G")
    with torch.no_grad():
        for name, weight in own["G"].named_parameters():
            if ".bn" in name:
                weight[:, 8:] = 0  # what follows the class's row is noise
    model = load_model(written(tmp_path / "gan.safetensors", **own))
    with torch.no_grad():
        model.module.linear.weight.zero_()
    page = by_class(model, None, [0, 1], samples=2)
    for first, second in zip(*page.rows, strict=True):
        assert np.array_equal(first, second)
    assert not np.array_equal(*page.rows[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kind", "interpolate"), "name one of them"),
        (("--kind", "interpolate", "--classes", "all"), "between two classes, not 3"),
        (("--data", "{photos}"), "sees no pictures"), (("--z", "0"), "samples is 0"),
        (("--classes", "cow"), "no class 'cow'"),
    ],
)  # fmt: skip
def test_a_page_that_cannot_be_made_is_told_and_nothing_is_left(gan, photos, tmp_path, words, said):
    words = [word.format(photos=photos) for word in words]
    done = soup("grid", gan, "-o", tmp_path / "page.png", "--device", "cpu", *words)
    assert done.exit_code == 1 and said in done.stderr
    assert not list(tmp_path.glob("*page*"))


def test_a_page_of_a_translator_wants_pictures_and_takes_them_from_all_parts(translator, tmp_path):
    with pytest.raises(modelsoup.ParameterError, match="wants pictures to translate"):
        write_page(translator, tmp_path / "page.png", device="cpu")
    for n in range(10):
        folder = tmp_path / "data" / f"class{n // 5}"
        folder.mkdir(parents=True, exist_ok=True)
        save_png(np.full((32, 32, 3), 20 * n, np.uint8), folder / f"{n}.png")
    page = write_page(translator, tmp_path / "page.png", data=tmp_path / "data", sources=4,
                      classes="cat", device="cpu")  # fmt: skip
    assert [t["source"] for t in page.tiles if "class" not in t] == [
        "class0/0.png", "class0/2.png", "class1/5.png", "class1/7.png"
    ]  # fmt: skip


def test_pictures_are_made_a_batch_at_a_time(gan):
    model, seen = load_model(gan), []
    model.module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    wanted = [Wanted(None, model.how.given([""], 0, sample=n)) for n in range(5)]
    assert len(list(model.each(wanted, 2))) == 5
    assert seen == [2, 2, 1]


# Export.


@pytest.mark.needs("onnx")
@pytest.mark.timeout(120)
def test_an_onnx_translator_takes_image_noise_and_class_in_any_number(translator, tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    done = soup("export", translator, tmp_path / "model.onnx")
    assert done.exit_code == 0, done.output
    stored = onnx.load(tmp_path / "model.onnx")
    told = {p.key: p.value for p in stored.metadata_props}
    assert json.loads(told[CLASSES]) == {"cat": 0, "dog": 1, "bird": 2}
    assert told["modelsoup.xxh3_128"] == modelsoup.digest_file(translator).xxh3_128
    assert [one.name for one in stored.graph.input] == ["image", "z", "class"]
    evaluator, module = ReferenceEvaluator(stored), load_model(translator).module
    for count in (1, 3):
        image, z = torch.rand(count, 3, 32, 32) * 2 - 1, torch.randn(count, 16)
        label = torch.arange(count) % 3
        with torch.no_grad():
            own = module(image, z, label).numpy()
        given = {"image": image.numpy(), "z": z.numpy(), "class": label.numpy()}
        (made,) = evaluator.run(["translation"], given)
        np.testing.assert_allclose(made, own, atol=1e-5)
    with pytest.raises(modelsoup.ParameterError, match=r"size is 64, but .* takes pictures of 32"):
        export_onnx(translator, tmp_path / "other.onnx", size=64)
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.needs("onnx")
@pytest.mark.timeout(120)
def test_an_onnx_gan_takes_noise_and_class(gan, tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    stored = onnx.load(export_onnx(gan, tmp_path / "gan.onnx", batch=2))
    assert [one.name for one in stored.graph.input] == ["z", "class"]
    z, label = torch.randn(2, 16), torch.tensor([2, 1])
    with torch.no_grad():
        own = load_generator(gan)(z, label).numpy()
    given = {"z": z.numpy(), "class": label.numpy()}
    (made,) = ReferenceEvaluator(stored).run(["picture"], given)
    np.testing.assert_allclose(made, own, atol=1e-5)
