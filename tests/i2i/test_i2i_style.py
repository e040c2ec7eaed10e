"""Translators whose pictures are to look like others: styles of references, of noise, mixed."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from i2i_domains import make_domains
from modelsoup_i2i.networks.described import Joined
from modelsoup_i2i.pictures.images import read_image, save_png
from modelsoup_i2i.trainers.munit import MUNIT, MUNITOptions
from modelsoup_i2i.use.generators import load_model
from modelsoup_i2i.use.models import Model, model_of
from modelsoup_i2i.use.pages import by_reference, interpolated
from modelsoup_i2i.use.references import References, references_in
from modelsoup_i2i.use.translator import Style, Translator, parts_of

from modelsoup import ParameterError
from modelsoup.terminal.cli import main


class Painter(torch.nn.Module):
    """Adds a style's numbers to the colours of a picture."""

    channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        return images + self.share * style[:, :, None, None]


class Look(torch.nn.Module):
    """The mean colour of pictures, a class's number more."""

    def forward(self, images: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        made = images.mean((2, 3))
        return made if classes is None else made + classes[:, None] / 8


class Dream(torch.nn.Module):
    def forward(self, z: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return z[:, :3] / 8 + classes[:, None] / 8


def painter(classes: int = 0, noise: int = 0, own: bool = False) -> Model:
    style = Style(3, "E", None if own else "F" if noise else None, noise, classes)
    how = Translator("X", "Y", "A to B", takes=(style,))
    networks = {"G": Painter(), "E": Look(), "F": Dream()}
    return model_of("G", how, {}, networks, origin="file").eval()


def plain(value: int, side: int = 4) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def level(value: float) -> float:
    """A level of 256 as networks see it."""
    return value / 127.5 - 1


def test_the_networks_of_a_translator_are_those_of_its_styles_too():
    style = Style(4, "S", "F", 2)
    how = Translator("X", "Y", "A to B", takes=(style,))
    joined = {"S": Joined("module:Class", ("G", "M"))}
    assert parts_of("G", how, joined) == ("G", "M", "F")
    assert parts_of("T", Translator("X", "Y", ""), {"T": Joined("module:Class", ("E", "G"))}) == (
        "E", "G",
    )  # fmt: skip
    assert (how.style, how.has_noise, how.classes) == (style, True, 0)


def test_a_style_is_the_mean_of_those_of_its_references():
    model = painter()
    one, other, both = (model.style_of(own) for own in (
        [plain(0)], [plain(255)], [plain(0), plain(255, 8)]
    ))  # fmt: skip
    assert (one.dtype, one.shape) == (np.float32, (1, 3))
    np.testing.assert_allclose(one, -1)
    np.testing.assert_allclose(other, 1)
    np.testing.assert_allclose(both, 0, atol=1e-6)
    (given,) = model.given(["a", "b"], style=one)
    (made, _) = model.made([plain(255), plain(255)], [given])
    assert (made == 128).all() or (made == 127).all()


def test_a_style_of_noise_is_each_pictures_own_and_knows_its_class():
    model = painter(classes=2, noise=5)
    (first,), (again,), (other,) = (
        model.given(["a", "b"], label, seed=3) for label in (0, 0, 1)
    )  # fmt: skip
    np.testing.assert_array_equal(first, again)
    assert first.shape == (2, 3) and not np.allclose(first[0], first[1])
    np.testing.assert_allclose(other - first, 0.125, atol=1e-6)
    np.testing.assert_allclose(model.style_of([plain(0)], 1), -1 + 0.125)
    own = painter(noise=3, own=True)  # the noise is the style
    (style,) = own.given(["a"], seed=3)
    np.testing.assert_array_equal(style, own.how.given(["a"], seed=3)[0])


def test_a_model_that_knows_no_other_way_wants_a_reference():
    with pytest.raises(ParameterError, match="wants a picture, or a folder of them, as reference"):
        painter().given(["a"])
    plain_one = Model("G", Translator("X", "Y", ""), Painter())
    with pytest.raises(ParameterError, match="G does not look at reference pictures"):
        plain_one.style_of([plain(0)])


def test_references_are_drawn_by_a_pictures_name_and_no_two_of_one_mean_are_one():
    model = painter()
    all_of_them = [plain(n) for n in range(0, 250, 10)]
    own = References(model, all_of_them, k_shot=3, samples=8, seed=1)
    levels = [[int(one[0, 0, 0]) for one in own.chosen("a", n)] for n in range(8)]
    assert len({shade for some in levels for shade in some}) == 24  # none of them twice
    again = References(model, all_of_them, k_shot=3, samples=8, seed=1)
    assert [int(one[0, 0, 0]) for one in again.chosen("a", 4)] == levels[4]
    assert [int(one[0, 0, 0]) for one in own.chosen("b", 4)] != levels[4]
    wanted = np.mean([level(shade) for shade in levels[4]])
    np.testing.assert_allclose(own.style("a", 4), wanted, atol=1e-5)
    with pytest.raises(ParameterError, match="9 references of 3 each are more than the 25 pictur"):
        References(model, all_of_them, k_shot=3, samples=9)
    for few in (0, 26):
        with pytest.raises(ParameterError, match=f"k_shot is {few}, but must be from 1 to 25"):
            References(model, all_of_them, k_shot=few)


def test_references_in_folders_of_classes_are_those_of_the_class(tmp_path):
    for name, value in (("0", 0), ("1", 255)):
        (tmp_path / name).mkdir()
        save_png(plain(value), tmp_path / name / "1.png")
    own = references_in(painter(classes=2), tmp_path, labels=[0, 1])
    np.testing.assert_allclose(own.style("a", 0, 0), -1)
    np.testing.assert_allclose(own.style("a", 0, 1), 1 + 0.125)
    with pytest.raises(ParameterError, match="of references, holds no images"):
        (tmp_path / "empty").mkdir()
        references_in(painter(), tmp_path / "empty")


def test_a_page_has_the_references_above_what_looks_like_them(tmp_path):
    model = painter()
    sources = [("s", plain(127)), ("t", plain(127))]
    page = by_reference(model, sources, (), [("dark", plain(100)), ("light", plain(150))])
    assert page.titles == ["image", "1", "2"]
    assert [int(own[0, 0, 0]) for own in page.rows[0]] == [255, 100, 150]
    assert [int(own[0, 0, 0]) for own in page.rows[1]] == [127, 100, 150]
    page.save(tmp_path / "page.png", model="file")
    rows = list(csv.DictReader((tmp_path / "page.csv").read_text("utf-8").splitlines()))
    assert [(row["source"], row["reference"]) for row in rows[3:6]] == [
        ("s", ""), ("s", "dark"), ("s", "light"),
    ]  # fmt: skip
    with pytest.raises(ParameterError, match="of one class, not of 2"):
        by_reference(painter(classes=2), sources, (0, 1), [("dark", plain(100))])
    with pytest.raises(ParameterError, match="wants a picture"):
        by_reference(model, sources, ())
    of_noise = by_reference(painter(classes=2, noise=5), sources, (1,), count=3)
    assert of_noise.titles == ["image", "z 0", "z 1", "z 2"] and len(of_noise.rows) == 2
    first, second = of_noise.rows[0], of_noise.rows[1]
    assert all(np.array_equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def test_an_interpolation_between_references_ends_with_each_alone():
    model = painter()
    dark, light = ("dark", plain(20)), ("light", plain(220))
    page = interpolated(model, [("s", plain(127))], (), [dark, light])
    alone = by_reference(model, [("s", plain(127))], (), [dark, light]).rows[1]
    (row,) = page.rows
    np.testing.assert_array_equal(row[1], alone[1])
    np.testing.assert_array_equal(row[-1], alone[2])
    shades = [int(own[0, 0, 0]) for own in row[1:]]
    assert shades == sorted(shades) and abs(shades[3] - 120) <= 1
    assert {tile["reference"] for tile in page.tiles if "reference" in tile} == {"dark…light"}
    with pytest.raises(ParameterError, match="is between two, of one class, not 1 of 1"):
        interpolated(model, [("s", plain(127))], (), [dark])
    of_classes = painter(classes=2, noise=5)
    (row,) = interpolated(of_classes, [("s", plain(127))], (0, 1)).rows
    given = [of_classes.given([""], label)[0] for label in (0, 1)]
    (first,), (last,) = (of_classes.made([plain(127)], [own]) for own in given)
    np.testing.assert_array_equal(row[1], first)
    np.testing.assert_array_equal(row[-1], last)


# By command, with a model.


@pytest.fixture(scope="module")
def munit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model.safetensors` of MUNIT beside its pictures."""
    root = make_domains(tmp_path_factory.mktemp("munit"), count_a=3, count_b=4, size=24)
    options = MUNITOptions(
        data=root, width=4, blocks=1, style=3, mlp=8, d_width=4, d_layers=2, d_scales=2,
        load_size=18, crop_size=16, steps=1, device="cpu", sheet_every=0,
    )  # fmt: skip
    MUNIT().session(options, None, seed=0).save(root / "model.safetensors")
    return root


def soup(*words: object) -> Result:
    return CliRunner().invoke(main, ["i2i", *map(str, words)])


def test_by_command_pictures_look_like_references_or_as_noise_says(munit: Path, tmp_path: Path):
    model, testa, testb = munit / "model.safetensors", munit / "testA", munit / "testB"
    like = ("--reference", testb, "--references", 2, "--k-shot", 2)
    done = soup("translate", model, testa, tmp_path / "like", *like)
    assert done.exit_code == 0, done.output
    files = sorted(file.name for file in (tmp_path / "like").iterdir())
    assert files == ["0-1.png", "0-2.png", "1-1.png", "1-2.png", "2-1.png", "2-2.png"]
    own = load_model(model)
    seen = read_image(testa / "1.png")
    style = References(own, sorted(testb.iterdir()), k_shot=2, samples=2).style("1.png", 1)
    (expected,) = own.made([seen], own.given(["1.png"], style=style))
    np.testing.assert_array_equal(read_image(tmp_path / "like" / "1-2.png"), expected)
    done = soup("translate", model, testa, tmp_path / "drawn", "--z-seed", 3, "--samples", 2)
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "drawn").iterdir())) == 6
    for kind, more, wide in (("references", (), 4), ("interpolate", (), 7)):
        page = tmp_path / f"{kind}.png"
        done = soup("grid", model, "-o", page, "--data", testa, "--kind", kind,
                    "--reference", testb, *more)  # fmt: skip
        assert done.exit_code == 0, done.output
        columns = {int(row["column"]) for row in csv.DictReader(
            page.with_suffix(".csv").read_text("utf-8").splitlines())}  # fmt: skip
        assert columns == set(range(wide + 1))


def test_by_command_what_cannot_be_looked_like_is_told(munit: Path, tmp_path: Path):
    model, testa, testb = munit / "model.safetensors", munit / "testA", munit / "testB"
    for words, said in (
        (("--k-shot", 2), "of which there are none: name them (--reference)"),
        (("--reference", testb, "--references", 5), "5 references of 1 each are more than the 4"),
        (("--reference", testb, "--samples", 2), "references says how many are made of each"),
        (("--reference", tmp_path), "of references, holds no images"),
        (("--reference", testb, "--class", "B"), "makes pictures of no classes"),
    ):
        done = soup("translate", model, testa, tmp_path / "out", *words)
        assert done.exit_code == 1 and said in " ".join(done.output.split()), done.output
        assert not (tmp_path / "out").exists()
    done = soup("export", model, tmp_path / "styles.onnx", "--part", "style-of-noise")
    assert done.exit_code == 1 and "has nothing that makes styles of noise" in done.output


@pytest.mark.needs("offline")
def test_an_evaluation_by_reference_is_another_one(munit: Path):
    found = []
    for more in ((), ("--by-reference",)):
        words = ("--data", munit, "--metrics", "fd-st-alex", "--json", *more)
        done = soup("evaluate", munit / "model.safetensors", *words)
        assert done.exit_code == 0, done.output
        found.append(json.loads(done.output)[0]["value"])
    assert found[0] != found[1]
