"""Pictures of several attributes: the files that tell them, StarGAN on them, and its use."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from i2i_domains import make_classes
from i2i_states import first_batch, numbers, silent
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.measuring.class_evaluation import evaluate_class_model
from modelsoup_i2i.pictures.attributes import attribute_names, find_attributed, read_attributes
from modelsoup_i2i.pictures.draws import Attributes, Spot
from modelsoup_i2i.pictures.images import read_image, save_png
from modelsoup_i2i.pictures.picture import Attributed, labelled
from modelsoup_i2i.trainers.stargan import StarGAN, StarGANOptions
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.use.classes import classes_in, has_attributes, switched
from modelsoup_i2i.use.export import export_onnx
from modelsoup_i2i.use.generators import load_model
from modelsoup_i2i.use.official_stargan import import_stargan
from modelsoup_i2i.use.pages import write_page
from modelsoup_i2i.use.translate import translate, translate_arrays
from modelsoup_i2i.use.translator import Switched, turned
from torch._subclasses.fake_tensor import FakeTensorMode

import modelsoup
from modelsoup import MismatchError, ParameterError

torch.set_num_threads(1)
NAMES = ("Warm", "Bright", "Left")
TINY = {
    "size": 16, "width": 4, "blocks": 1, "d_width": 4, "batch": 3, "steps": 10, "device": "cpu",
    "threads": 0, "sheet_every": 0,
}  # fmt: skip


def drawn(vector: Sequence[int], seed: int, size: int = 16) -> np.ndarray:
    """A square, red or else blue, on the left or the right of a bright ground or a dark."""
    warm, bright, left = vector
    rng = np.random.default_rng((*vector, seed))
    image = np.full((size, size, 3), 190 if bright else 40, np.uint8)
    image += rng.integers(0, 25, dtype=np.uint8)
    side, y = size // 3, int(rng.integers(1, size - size // 3 - 1))
    x = 1 + int(rng.integers(2)) + (0 if left else size - side - 3)
    shade = int(rng.integers(200, 256))
    image[y : y + side, x : x + side] = (shade, 60, 60) if warm else (60, 60, shade)
    return image


def seen(image: np.ndarray) -> tuple[bool, bool, bool]:
    """The attributes that a picture has, by how it was drawn."""
    own = image.astype(float)
    ground = np.median(own.reshape(-1, 3), 0)
    away = np.abs(own - ground).sum(2)
    columns = (away * np.arange(own.shape[1])).sum() / max(away.sum(), 1e-9)
    inside = own[away >= np.quantile(away, 0.93)]
    warm = inside[:, 0].mean() > inside[:, 2].mean()
    return bool(warm), bool(ground.mean() > 115), bool(columns < (own.shape[1] - 1) / 2)


def make_attributed(root: Path, count: int = 2, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Pictures of all eight vectors, some of each; whose is which is returned."""
    (root / "more").mkdir(parents=True)
    told = {}
    for place, (n, vector) in enumerate(product(range(count), product((0, 1), repeat=3))):
        name = f"{'more/' if place % 3 == 2 else ''}{place}.png"
        save_png(drawn(vector, seed + n), root / name)
        told[name] = vector
    return told


def celeba(file: Path, told: dict[str, tuple[int, ...]], names: Sequence[str] = NAMES) -> Path:
    rows = [f"{name} {' '.join(f'{2 * v - 1:2d}' for v in own)}" for name, own in told.items()]
    file.write_text("\n".join([str(len(told)), " ".join(names), *rows]) + "\n", "utf-8")
    return file


def table(file: Path, told: dict[str, tuple[int, ...]], names: Sequence[str] = NAMES) -> Path:
    rows = [",".join([name, *map(str, own)]) for name, own in told.items()]
    file.write_text("\n".join([",".join(["file", *names]), *rows]) + "\n", "utf-8")
    return file


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, dict[str, tuple[int, ...]]]:
    root = tmp_path_factory.mktemp("attributed") / "squares"
    return root, make_attributed(root)


@pytest.fixture(scope="module")
def data(told) -> dict[str, Path]:
    root, vectors = told
    return {"data": root, "attributes_file": celeba(root.parent / "list_attr.txt", vectors)}


def session(data: dict[str, Path], work: Path | None = None, **more) -> Session:
    options = StarGANOptions(**data, **{**TINY, **more})
    return StarGAN().session(options, None, seed=0, **({} if work is None else {"work": work}))


# --- files -------------------------------------------------------------------------------------


def test_celebas_list_and_a_csv_say_the_same(told, tmp_path: Path):
    root, vectors = told
    first = read_attributes(celeba(tmp_path / "list.txt", vectors))
    second = read_attributes(table(tmp_path / "list.csv", vectors))
    assert first.names == second.names == NAMES == attribute_names(first.file)
    expected = {name: bytes(own) for name, own in vectors.items()}
    assert first.of_picture == second.of_picture == expected
    minus = (tmp_path / "list.csv").read_text("utf-8").replace(",0", ", -1")
    (tmp_path / "minus.csv").write_text(f"\ufeff{minus}\n\n", "utf-8")
    assert read_attributes(tmp_path / "minus.csv").of_picture == expected
    (pictures,) = find_attributed([root], first)
    assert [p.file.relative_to(root).as_posix() for p in pictures][:3] == [
        "0.png",
        "1.png",
        "3.png",
    ]
    assert all(p.attributes == expected[p.file.relative_to(root).as_posix()] for p in pictures)


def test_some_attributes_are_used_in_the_order_in_which_they_are_named(told, tmp_path: Path):
    _, vectors = told
    file = table(tmp_path / "list.csv", vectors)
    some = read_attributes(file, ("Left", "Warm"))
    assert some.names == attribute_names(file, ("Left", "Warm")) == ("Left", "Warm")
    assert some.of_picture == {name: bytes((own[2], own[0])) for name, own in vectors.items()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2\nA B\na.png 1 -1\nb.png 1\n", "line 4 of .*, of b.png, has 1 value, where 2 are exp"),
        ("file,A,B\na.png,1,0\nb.png,1,0,1\n", "line 3 of .*, of b.png, has 3 values, where 2"),
        ("1\nA B\na.png 1 2\n", "line 3 of .*, of a.png, has '2' for B, where 1, or 0 or -1, is"),
        ("file,A\na.png,1\nb.png,\n", "line 3 of .*, of b.png, has '' for A"),
        (
            "file,A,B\na.png,1,0\nb.png,-1,1\n",
            "line 2 of .* has 0, and line 3 of .* has -1: a file",
        ),
        (
            "3\nA B\na.png 1 1\n",
            "says in its first line that it is of 3 pictures, but has lines of",
        ),
        ("file,A\na.png,1\na.png,1\n", "line 3 of .*, of a.png, is its second one"),
        ("file,A,A\na.png,1,1\n", "names the attribute 'A' twice"),
        (
            "file,A+B\na.png,1\n",
            "has an attribute 'A[+]B', where a name without [+] = , is expected",
        ),
        ("file,A,\na.png,1,0\n", "has an attribute ''"),
        ("a.png 1 -1\n", "is no list of attributes: in its first line a number of pictures is exp"),
        ("2\n\n", "names no attributes"),
        ("file,A\n", "tells of no picture"),
        ("", "is no list of attributes"),
        ("file,A\n\xff\xfe", "cannot be read as a list of attributes"),
    ],
)
def test_what_is_no_list_is_told_with_its_line(tmp_path: Path, text: str, said: str):
    file = tmp_path / "list"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ParameterError, match=said):
        read_attributes(file)


def test_a_list_that_is_not_there_and_an_attribute_it_lacks_are_told(data, tmp_path: Path):
    with pytest.raises(
        ParameterError, match=r"none\.txt does not exist, where a list of attributes"
    ):
        read_attributes(tmp_path / "none.txt")
    with pytest.raises(ParameterError, match="is no regular file"):
        attribute_names(tmp_path)
    for read in (read_attributes, attribute_names):
        with pytest.raises(ParameterError, match=r"'Brigth'; did you mean 'Bright'\? \(it has Wa"):
            read(data["attributes_file"], ("Brigth",))
    with pytest.raises(ParameterError, match="attributes names the attribute 'Warm' twice"):
        read_attributes(data["attributes_file"], ("Warm", "Warm"))


def test_each_picture_has_a_row_and_each_row_a_picture(told, tmp_path: Path):
    root, vectors = told
    fewer = dict(list(vectors.items())[:-2])
    with pytest.raises(ParameterError, match=r"says nothing of 2 of the 16 pictures in .*14.png"):
        find_attributed([root], read_attributes(table(tmp_path / "few.csv", fewer)))
    more = {**vectors, "gone.png": (1, 1, 1)}
    with pytest.raises(ParameterError, match=r"tells of 1 picture that .*squares lacks: gone\.png"):
        find_attributed([root], read_attributes(table(tmp_path / "more.csv", more)))
    whole = read_attributes(table(tmp_path / "whole.csv", vectors))
    with pytest.raises(ParameterError, match=r"has one row for 0\.png, which is in both"):
        find_attributed([root, root], whole)


# --- options -----------------------------------------------------------------------------------


def test_some_are_held_out_or_lie_in_a_folder_of_their_own(told, data, tmp_path: Path):
    root, vectors = told
    assert len(StarGANOptions(**data).images("test")["data"]) == 0
    options = StarGANOptions(**data, test_share=0.25)
    train, test = (options.images(part)["data"] for part in ("train", "test"))
    assert (len(train), len(test), options.has_tests()) == (12, 4, True)
    assert not set(train) & set(test)
    fewer = StarGANOptions(**data, test_share=0.25, train_fraction=0.5)
    assert set(fewer.images()["data"]) < set(train) and len(fewer.images()["data"]) == 6
    assert fewer.images("test") == options.images("test")
    apart = tmp_path / "test"
    more = {f"own {name}": own for name, own in vectors.items()}
    for name, vector in more.items():
        (apart / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(drawn(vector, 9), apart / name)
    both = table(tmp_path / "both.csv", {**vectors, **more})
    options = StarGANOptions(data=root, test=apart, attributes_file=both, attributes=("Left",))
    assert options.class_names() == ("Left",) and options.class_count == 1
    for part, own in (("train", vectors), ("test", more)):
        found = options.images(part)["data"]
        where = root if part == "train" else apart
        assert {p.file.relative_to(where).as_posix(): [*p.attributes] for p in found} == {
            name: [vector[2]] for name, vector in own.items()
        }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": ("oak",)}, "classes is of pictures by class, and these have attributes"),
        ({"exclude": ("oak",)}, "exclude is of pictures by class"),
        ({"per_class": 3}, "per_class is of pictures by class"),
        ({"test_per_class": 3}, "test_per_class is of pictures by class"),
        (
            {"data": None, "data_a": Path("a"), "data_b": Path("b")},
            "data_a is of pictures by class",
        ),
        ({"test_a": Path("a"), "test_b": Path("b")}, "test_a is of pictures by class"),
        ({"attributes": 3}, "attributes is 3, but beside attributes_file it names those that are"),
        ({"attributes": ("Warm",), "attributes_file": None}, "attributes_file, which is missing"),
        ({"attributes": 3, "attributes_file": None}, "attributes_file, which is missing"),
        ({"evaluate": ["mfd-st-alex"], "test_share": 0.5}, "evaluate measures by class, and these"),
    ],
)
def test_options_that_have_no_meaning_beside_attributes_are_refused(data, options, said):
    with pytest.raises(ValueError, match=said):
        StarGANOptions(**{**data, **options})


def test_what_lacks_is_told_when_pictures_are_looked_for(data, tmp_path: Path):
    with pytest.raises(ParameterError, match=r"has no attribute 'Wram'; did you mean 'Warm'\?"):
        StarGANOptions(**data, attributes=("Wram",)).images()
    with pytest.raises(ParameterError, match=r"data is missing: the folder of .*list_attr\.txt's"):
        StarGANOptions(attributes_file=data["attributes_file"]).images()
    (tmp_path / "one").mkdir()
    save_png(drawn((0, 0, 0), 0), tmp_path / "one" / "a.png")
    file = table(tmp_path / "one.csv", {"a.png": (0, 1)}, ("A", "B"))
    with pytest.raises(ParameterError, match="one has one image, where two or more must be"):
        StarGANOptions(data=tmp_path / "one", attributes_file=file).images()


def test_networks_are_as_large_as_those_of_as_many_classes(data):
    trainer = StarGAN()
    of_classes = trainer.tensors(StarGANOptions(classes=5))
    assert trainer.tensors(StarGANOptions(attributes=5)) == of_classes
    assert len(trainer.images(StarGANOptions(**data))["data"]) == 16


def test_what_decides_a_training_of_classes_is_what_it_was(tmp_path: Path, data):
    trees = make_classes(tmp_path / "trees", {"ash": 4, "oak": 3})
    told = StarGANOptions(data=trees).decisive()
    assert not [name for name in told if "attributes" in name]
    own = StarGAN().identity(StarGANOptions(data=trees))
    assert own["classes"] == {"data": {"ash": 4, "oak": 3}} and "vectors" not in own
    assert StarGANOptions(**data).decisive()["attributes"] == ()


def test_a_key_depends_on_which_picture_has_what_and_not_on_the_lists_form(told, tmp_path: Path):
    root, vectors = told

    def identity(file: Path) -> dict:
        return StarGAN().identity(StarGANOptions(data=root, attributes_file=file))

    own = identity(table(tmp_path / "a.csv", vectors))
    assert own["attributes"] == {"data": dict.fromkeys(NAMES, 8)} and own["images"] == [16]
    assert identity(celeba(tmp_path / "b.txt", dict(reversed(vectors.items())))) == own
    swapped = {**vectors, "0.png": vectors["1.png"], "1.png": vectors["0.png"]}
    other = identity(table(tmp_path / "c.csv", swapped))
    assert other["attributes"] == own["attributes"] and other["vectors"] != own["vectors"]


# --- draws, losses, training -------------------------------------------------------------------


def test_pictures_come_as_those_of_classes_do_with_their_vectors(tmp_path: Path):
    trees = make_classes(tmp_path / "trees", {"ash": 4, "oak": 3, "yew": 2}, size=20)
    names = [
        f"{kind}/{n}.png" for kind, m in (("ash", 4), ("oak", 3), ("yew", 2)) for n in range(m)
    ]
    one = {name: tuple(int(name.startswith(kind)) for kind in ("ash", "oak", "yew"))
           for name in names}  # fmt: skip
    file = table(tmp_path / "one.csv", one, ("ash", "oak", "yew"))
    of_classes = session({"data": trees})
    of_attributes = session({"data": trees, "attributes_file": file})
    assert of_classes.steps_per_epoch == of_attributes.steps_per_epoch
    both = zip(of_classes.batches(), of_attributes.batches(), strict=True)
    for (first,), (second,) in islice(both, 8):
        assert second["c"].dtype == torch.float32 and second["c"].shape == (3, 3)
        assert torch.equal(second["c"].argmax(1), first["c"]) and bool(
            (second["c"].sum(1) == 1).all()
        )
        for name in ("x", "order", "share"):
            assert torch.equal(first[name], second[name])
    # What G makes and how D judges are the same; only how classes are told apart differs.
    a, b = (first_batch(own) for own in (of_classes, of_attributes))
    told = [numbers(StarGAN().judge(*own)) for own in ((of_classes, a), (of_attributes, b))]
    assert told[0]["judge"] == told[1]["judge"] and told[0]["class_real"] != told[1]["class_real"]


def test_the_losses_of_attributes_are_binary_summed_and_divided_by_the_batch(data):
    own = session(data, batch=4)
    b = first_batch(own)
    generator, judge = own.networks["G"], own.networks["D"]
    told = {**StarGAN().judge(own, b), **StarGAN().translate(own, b)}
    assert torch.equal(b.target, b.c[b.order.argsort()]) and set(b.c.unique().tolist()) == {0, 1}

    def summed(logits: torch.Tensor, c: torch.Tensor) -> float:
        right = c * logits.sigmoid().log() + (1 - c) * (1 - logits.sigmoid()).log()
        return float(-right.sum() / len(c))

    with torch.no_grad():
        made = generator(b.x, b.target)
        verdicts, logits = judge(made)
        expected = {
            "judge": verdicts.mean() - judge(b.x)[0].mean(),
            "class_real": summed(judge(b.x)[1], b.c), "gan": -verdicts.mean(),
            "class": summed(logits, b.target), "rec": (generator(made, b.c) - b.x).abs().mean(),
        }  # fmt: skip
    assert numbers(told) == pytest.approx({n: float(v) for n, v in expected.items()}, rel=1e-4)


def test_attributes_alone_are_drawn_as_classes_are(data):
    draw, pictures = Attributes("c", 3), session(data).pictures
    spots = [Spot(7, 0, n, np.arange(16)) for n in range(60)]
    made = np.stack([draw.at(pictures, spot)[0] for spot in spots])
    assert made.dtype == np.float32 and (made.sum(1) == 1).all() and (made.sum(0) > 8).all()
    with pytest.raises(TypeError, match="can have no class"):
        labelled(pictures.sets["data"], [0] * 16)


def test_a_training_that_was_stopped_ends_as_one_that_was_not(data, tmp_path: Path):
    whole = session(data, steps=6, n_critic=2)
    whole.run(silent, silent)
    whole.save(tmp_path / "whole.safetensors")
    (tmp_path / "work").mkdir()
    first = session(data, tmp_path / "work", steps=6, n_critic=2)
    first.resume()
    first.begin()
    for group in islice(first.batches(), 3):
        first.take(group)
        dict(first.read())
    first.keep()
    second, said = session(data, tmp_path / "work", steps=6, n_critic=2), []
    second.run(silent, said.append)
    assert said[0].startswith("goes on after step 3 of 6")
    second.save(tmp_path / "second.safetensors")
    assert (tmp_path / "second.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()


def test_no_step_asks_the_device_for_a_value(data):
    class Device(Session):
        early, behind = False, 3

    own = Device(
        StarGAN(), StarGANOptions(**data, **{**TINY, "n_critic": 1, "steps": 2}), None, seed=1
    )
    batches = list(own.batches())
    own.begin()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for group in batches:
            own.take([{n: torch.empty_like(v) for n, v in batch.items()} for batch in group])
        assert own.steps == 2


def test_the_log_and_the_record_say_how_many_have_each_and_a_page_shows_them_turned(
    data, tmp_path: Path
):
    own, said = session(data, tmp_path, sheet_every=5, test_share=0.25), []
    own.run(silent, said.append)
    assert any(line.startswith("images by attribute, 3: Warm ") for line in said)
    assert any(line.startswith("test images by attribute, 3: Warm ") for line in said)
    record = own.told()
    assert record["attributes"]["data"].keys() == set(NAMES) and "classes" not in record
    pages = sorted((tmp_path / "samples").iterdir())
    assert [page.name for page in pages] == ["step-0000005.png", "step-0000010.png"]


# --- checkpoints -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> Path:
    own, output = session(data), tmp_path_factory.mktemp("model") / "squares.safetensors"
    own.begin()
    own.save(output)
    return output


def test_a_checkpoint_says_that_they_are_attributes(model: Path, data, tmp_path: Path):
    metadata = modelsoup.open_checkpoint(model).metadata
    assert json.loads(metadata["modelsoup.attributes"]) == {n: i for i, n in enumerate(NAMES)}
    assert "modelsoup.classes" not in metadata
    assert classes_in(model) == NAMES and has_attributes(model)
    modelsoup.merge([model, model], tmp_path / "merged.safetensors", method="linear")
    assert has_attributes(tmp_path / "merged.safetensors")
    own = load_model(model)
    assert own.how.has_attributes and own.class_names == NAMES
    StarGAN().must_start(StarGANOptions(**data, **TINY), model)


def test_a_start_of_others_is_refused(model: Path, data, tmp_path: Path):
    trainer = StarGAN()
    trees = make_classes(tmp_path / "trees", dict.fromkeys(NAMES, 3), size=20)
    with pytest.raises(MismatchError, match="was trained on attributes, and the data have classes"):
        trainer.must_start(StarGANOptions(data=trees, **TINY), model)
    own = session({"data": trees})
    own.begin()
    own.save(tmp_path / "trees.safetensors")
    options = StarGANOptions(**data, **TINY)
    with pytest.raises(MismatchError, match="was trained on classes, and the data have attributes"):
        trainer.must_start(options, tmp_path / "trees.safetensors")
    with pytest.raises(
        MismatchError, match=r"other attributes than those .*: the data lack 'Left'"
    ):
        trainer.must_start(replace(options, attributes=("Warm", "Bright")), model)


def test_metadata_that_are_none_are_refused(model: Path, tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    save_file(load_file(model), tmp_path / "x.safetensors", {"modelsoup.attributes": '{"A": 1}'})
    with pytest.raises(
        MismatchError, match=r"modelsoup\.attributes .* gives no index to each attrib"
    ):
        load_model(tmp_path / "x.safetensors")


# --- use ---------------------------------------------------------------------------------------


def test_attributes_are_asked_for_by_their_names():
    assert switched("Warm+Left", NAMES, "G") == Switched((0, 2))
    assert switched(" Left = 1 + Warm=0", NAMES, "G") == Switched((2,), (0,))
    for text, said in (
        ("Worm", r"G has no attribute 'Worm'; did you mean 'Warm'\?"),
        ("Warm+", "G has no attribute ''"),
        ("Warm+Left+Warm=0", "the attribute 'Warm' is named twice in"),
        ("Warm=2", "Warm is '2' in 'Warm=2', where 0 or 1 is expected"),
        ("Warm=", "Warm is '' in 'Warm=', where 0 or 1 is expected"),
    ):
        with pytest.raises(ParameterError, match=said):
            switched(text, NAMES, "G")


def test_what_is_not_named_stays_as_it_was_where_that_is_known():
    asked = Switched((0,), (1,))
    assert asked.of(bytes((0, 1, 1))) == Switched((0, 2), (1,))
    assert asked.of(bytes((1, 0, 0))) == Switched((0,), (1, 2))
    assert turned(bytes((1, 0, 1)), 0) == Switched((2,), (0, 1))
    assert turned(bytes((1, 0, 1)), 1) == Switched((0, 1, 2))


def made_by(model: Path, picture: np.ndarray, vector: Sequence[float]) -> np.ndarray:
    own = load_model(model)
    (made,) = own.made([picture], [np.array([vector], np.float32)])
    return made


def test_a_model_translates_to_several_at_once(model: Path, told, tmp_path: Path):
    root, vectors = told
    words = ["translate", str(model), str(root), str(tmp_path / "out"), "--device", "cpu"]
    asked = CliRunner().invoke(i2i, [*words, "--class", "Warm+Left"])
    assert asked.exit_code == 0, asked.output
    for name in vectors:
        made = made_by(model, read_image(root / name, 3), (1, 0, 1))
        assert np.abs(read_image(tmp_path / "out" / name, 3).astype(int) - made).max() <= 1
    asked = CliRunner().invoke(
        i2i, [*words[:3], str(tmp_path / "each"), "--classes", "Warm+Left,Bright,Left=0"]
    )
    assert asked.exit_code == 0, asked.output
    folders = sorted(folder.name for folder in (tmp_path / "each").iterdir())
    assert folders == ["Bright", "Left=0", "Warm+Left"]
    asked = CliRunner().invoke(i2i, [*words[:3], str(tmp_path / "all"), "--classes", "all"])
    assert asked.exit_code == 0, asked.output
    assert sorted(folder.name for folder in (tmp_path / "all").iterdir()) == sorted(NAMES)
    alone = read_image(tmp_path / "all" / "Bright" / "0.png", 3)
    assert (
        np.abs(alone.astype(int) - made_by(model, read_image(root / "0.png", 3), (0, 1, 0))).max()
        <= 1
    )
    one, other = (
        translate_arrays(model, [drawn((0, 0, 0), 1)], classes=c) for c in ("Warm", "Warm+Left")
    )
    assert not np.array_equal(one[0], other[0])


def test_with_a_list_of_what_pictures_have_the_rest_stays(model: Path, told, data, tmp_path: Path):
    root, vectors = told
    words = ["translate", str(model), str(root), str(tmp_path / "out"), "--class", "Bright+Left=0"]
    asked = CliRunner().invoke(
        i2i, [*words, "--attributes", str(data["attributes_file"]), "--device", "cpu"]
    )
    assert asked.exit_code == 0, asked.output
    for name, (warm, _, _) in vectors.items():
        made = made_by(model, read_image(root / name, 3), (warm, 1, 0))
        assert np.abs(read_image(tmp_path / "out" / name, 3).astype(int) - made).max() <= 1
    fewer = table(tmp_path / "few.csv", dict(list(vectors.items())[1:]))
    with pytest.raises(ParameterError, match=r"few\.csv says nothing of 0\.png"):
        translate(model, root, tmp_path / "none", classes="Warm", attributes=fewer)
    other = table(tmp_path / "other.csv", {"0.png": (1,)}, ("Warm",))
    with pytest.raises(ParameterError, match=r"other\.csv has no attribute 'Bright'"):
        translate(model, root / "0.png", tmp_path / "none.png", classes="Warm", attributes=other)
    assert not (tmp_path / "none").exists()


def test_what_is_asked_for_wrongly_is_told(model: Path, told, data, tmp_path: Path):
    root, _ = told
    for classes, said in (
        (None, r"makes pictures of attributes: name one of them, or several, or all \(it has Warm"),
        ("Wram", r"has no attribute 'Wram'; did you mean 'Warm'\?"),
        (["Warm", "Warm=1"], "'Warm=1' is asked for twice"),
    ):
        with pytest.raises(ParameterError, match=said):
            translate(model, root, tmp_path / "out", classes=classes)
    trees = make_classes(tmp_path / "trees", {"ash": 2, "oak": 2}, size=20)
    own = session({"data": trees})
    own.begin()
    own.save(tmp_path / "trees.safetensors")
    with pytest.raises(ParameterError, match="is told a class, and no attributes that pictures"):
        translate(
            tmp_path / "trees.safetensors", root, tmp_path / "out", classes="oak",
            attributes=data["attributes_file"],
        )  # fmt: skip
    with pytest.raises(ParameterError, match=r"has no class 'ash\+oak'"):
        translate(tmp_path / "trees.safetensors", root, tmp_path / "out", classes="ash+oak")


def test_it_is_not_measured_by_class(model: Path, told):
    root, _ = told
    asked = CliRunner().invoke(i2i, ["evaluate", str(model), "--data", str(root)])
    assert asked.exit_code and "is of attributes, of which a picture may have several" in str(
        asked.exception
    )
    with pytest.raises(ParameterError, match="--images OUT --against"):
        evaluate_class_model(load_model(model), root, None)


def test_pages_show_each_alone_or_lead_from_some_to_others(model: Path, told, tmp_path: Path):
    root, _ = told
    page = write_page(model, tmp_path / "page.png", data=root, sources=3, device="cpu")
    assert page.titles == ["image", *NAMES] and len(page.rows) == 3
    page = write_page(
        model, tmp_path / "way.png", kind="interpolate", data=root / "0.png",
        classes=["Warm", "Warm+Left"], device="cpu",
    )  # fmt: skip
    ends = (
        made_by(model, read_image(root / "0.png", 3), (1, 0, 0)),
        made_by(model, read_image(root / "0.png", 3), (1, 0, 1)),
    )
    for place, end in ((1, ends[0]), (-1, ends[1])):
        assert np.abs(page.rows[0][place].astype(int) - end).max() <= 1


def test_what_it_is_called_with_are_a_pictures_own_with_one_turned(data):
    own = session(data)
    own.begin()
    found = list(StarGAN().inputs(own, "G"))
    assert [[*one] for one in found] == [["image", "attributes"]] * 16
    changed = []
    for one, file in zip(found, own.images["data"], strict=True):
        assert isinstance(file, Attributed)
        has = np.frombuffer(file.attributes, np.uint8)
        (vector,) = one["attributes"].numpy()
        (place,) = np.flatnonzero(vector != has)
        changed.append(int(place))
    assert set(changed) == {0, 1, 2}


@pytest.mark.needs("onnx")
@pytest.mark.timeout(120)
def test_its_onnx_takes_the_whole_vector(model: Path, tmp_path: Path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    stored = onnx.load(export_onnx(model, tmp_path / "squares.onnx", size=16))
    assert [one.name for one in stored.graph.input] == ["image", "attributes"]
    told = {own.key: own.value for own in stored.metadata_props}
    assert json.loads(told["modelsoup.attributes"]) == {n: i for i, n in enumerate(NAMES)}
    assert "modelsoup.classes" not in told
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    vectors = np.array([[1, 0, 1], [0, 1, 0]], np.float32)
    (made,) = ReferenceEvaluator(stored).run(None, {"image": image, "attributes": vectors})
    with torch.no_grad():
        own = load_model(model).module(torch.from_numpy(image), torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(made, own, atol=2e-4)


def test_an_official_folder_is_of_the_attributes_that_are_named(model: Path, data, tmp_path: Path):
    own = session(data)
    own.begin()
    folder = tmp_path / "models"
    folder.mkdir()
    for network in "GD":
        torch.save(own.networks[network].state_dict(), folder / f"200000-{network}.ckpt")
    output = tmp_path / "out.safetensors"
    words = ["import", "stargan", str(folder), str(output), "--attributes", "Warm, Bright,Left"]
    done = CliRunner().invoke(i2i, words)
    assert done.exit_code == 0, done.output
    assert classes_in(output) == NAMES and has_attributes(output)
    picture = drawn((0, 0, 1), 3)
    (made,) = translate_arrays(output, [picture], classes="Warm+Left")
    assert np.array_equal(made, made_by(model, picture, (1, 0, 1)))
    StarGAN().must_start(StarGANOptions(**data, **TINY), output)
    with pytest.raises(
        ParameterError, match=r"2 attributes are named, but .*200000-G\.ckpt knows 3"
    ):
        import_stargan(folder, output, force=True, attributes=("A", "B"))
    with pytest.raises(ParameterError, match="attributes names the attribute 'A' twice"):
        import_stargan(folder, output, force=True, attributes=("A", "A", "B"))
    import_stargan(folder, output, force=True, say=silent)
    assert classes_in(output) is None and not load_model(output).how.has_attributes


# --- what it learns ----------------------------------------------------------------------------


def switches(
    own: Session, pictures: Sequence[tuple[np.ndarray, tuple[int, ...]]]
) -> Iterator[float]:
    """Of pictures of which one attribute was turned, the share that show the vector asked for."""
    generator = own.in_use("G")
    for place in range(len(NAMES)):
        right = 0
        for picture, vector in pictures:
            asked = turned(bytes(vector), place)
            (made,) = generator.made([picture], generator.given([""], asked))
            right += [n for n, there in enumerate(seen(made)) if there] == [*asked.on]
        yield right / len(pictures)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_a_minute_is_enough_to_turn_one_attribute_and_leave_the_others(tmp_path: Path):
    """The control sees the same pictures, with each one's attributes another one's."""
    vectors = make_attributed(tmp_path / "train", 60)
    unseen = [(drawn(own, 5000 + n), own) for n in range(6) for own in product((0, 1), repeat=3)]
    assert all(seen(picture) == tuple(map(bool, own)) for picture, own in unseen)
    shuffled = np.random.default_rng(0).permutation(np.array([*vectors.values()])).tolist()
    wrong = dict(zip(vectors, map(tuple, shuffled), strict=True))
    found = {}
    for name, told in (("right", vectors), ("control", wrong)):
        file = celeba(tmp_path / f"{name}.txt", told)
        own = session(
            {"data": tmp_path / "train", "attributes_file": file}, width=16, blocks=2, d_width=16,
            batch=16, steps=700, lr=5e-4, n_critic=2, rate="constant", flip=False,
        )  # fmt: skip
        own.begin()
        for group in own.batches():
            own.optimise(group)
        found[name] = [*switches(own, unseen)]
    assert min(found["right"]) >= 0.8
    assert max(found["control"]) <= 0.5
