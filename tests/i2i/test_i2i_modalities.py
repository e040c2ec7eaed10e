"""`soup i2i modalities`: one format, whoever found the modalities, and what it says of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from i2i_domains import make_classes
from modelsoup_i2i.cli import i2i
from modelsoup_i2i.measuring.modalities import figures, told, warnings
from modelsoup_i2i.pictures.folders import find_classes
from modelsoup_i2i.pictures.images import ImageError, list_images, read_image
from modelsoup_i2i.pictures.modalities import (
    Item,
    Modalities,
    class_names,
    in_folders,
    known,
    read_modalities,
)
from modelsoup_i2i.pictures.sheets import GAP
from modelsoup_i2i.trainers.modality import Modality, ModalityOptions
from modelsoup_i2i.use.modalities import modalities_of, montage

import modelsoup

KINDS = {"red": 5, "green": 4, "blue": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("modalities")
    make_classes(root / "A", KINDS, 36)
    make_classes(root / "B", {"other": 4}, 40)
    return root


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory) -> Path:
    """Trained for a moment; what it found lies in `shown` beside it."""
    folder = tmp_path_factory.mktemp("model")
    options = ModalityOptions(
        data_a=data / "A", data_b=data / "B", encoder="small", size=32, k=3, k_b=2, batch=8,
        steps=2, device="cpu", threads=0,
    )  # fmt: skip
    job = modelsoup.Job(
        start=None, output=folder / "it.safetensors", work=folder, frozen=(), seed=0,
        options=options, report=lambda *_: None, log=lambda _: None, shown=folder / "shown",
    )  # fmt: skip
    Modality().train(job)
    return job.output


def soup(*words: object) -> Result:
    """`soup i2i modalities …`, which succeeds."""
    ran = CliRunner().invoke(i2i, ["modalities", *map(str, words)])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    assert ran.exit_code == 0, ran.output
    return ran


def test_a_folder_gets_the_labels_that_the_training_gave_it(
    model: Path, data: Path, tmp_path: Path
):
    output = tmp_path / "own.json"
    said = soup(model, data / "A", "--b", data / "B", "-o", output).stdout
    own = read_modalities(output)
    there = read_modalities(model.parent / "shown" / "modalities.json")
    assert [(i.path, i.domain, i.label) for i in own.items] == [
        (i.path, i.domain, i.label) for i in there.items
    ]
    assert [i.score for i in own.items] == pytest.approx([i.score for i in there.items], abs=1e-4)
    for name in ("encoder", "embedding", "centroids"):
        assert own.found[name] == there.found[name]
    assert own.classes == ("A_00", "A_01", "A_02", "B_00", "B_01")
    assert "modalities of A, 3: A_00 " in said and "mean cosine to own centroid" in said


def test_pictures_that_were_not_trained_on_are_labelled(model: Path, data: Path, tmp_path: Path):
    make_classes(tmp_path / "new", {"red": 2}, 50)
    own = modalities_of(model, tmp_path / "new", device="cpu")
    assert len(own.items) == 2 and all(0 <= item.label < 3 for item in own.items)
    copy = read_image(next(iter(list_images(data / "A"))))
    assert copy.shape == (36, 36, 3)


def test_folders_files_and_an_encoder_give_one_format_and_it_is_read_back(
    model: Path, data: Path, tmp_path: Path
):
    """Export, import, export: the same bytes."""
    ways = [("encoder", model), ("folders", data / "A")]
    for name, way in ways:
        first, again = tmp_path / f"{name}.json", tmp_path / f"{name} again.json"
        soup(way, data / "A", "-o", first)
        assert set(json.loads(first.read_text())) == {
            "version", "classes", "k_source", "k_target", "seed", "encoder", "embedding",
            "normalised", "centroids", "items",
        }  # fmt: skip
        soup(first, data / "A", "-o", again)
        assert again.read_bytes() == first.read_bytes()
        table, by_table = tmp_path / f"{name}.csv", tmp_path / f"{name} by table.csv"
        soup(first, data / "A", "-o", table)
        soup(table, data / "A", "-o", by_table)
        assert by_table.read_bytes() == table.read_bytes()
        assert table.read_text().splitlines()[0] == "path,label,domain"
    labels = read_modalities(tmp_path / "folders.csv")
    assert labels.classes == ("blue", "green", "red", "B") and labels.k_source == 3
    assert labels.sizes == [3, 4, 5, 0]


def test_modalities_become_the_class_folders_of_another_trainer(
    model: Path, data: Path, tmp_path: Path
):
    linked, copied = tmp_path / "linked", tmp_path / "copied"
    soup(model, data / "A", "--b", data / "B", "-o", linked)
    soup(model, data / "A", "--b", data / "B", "-o", copied, "--as", "folders", "--copy")
    own = modalities_of(model, data / "A", data / "B", device="cpu")
    names = [name for name, size in zip(own.classes, own.sizes, strict=True) if size]
    for folder in (linked, copied):
        files = list_images(folder)
        assert len(files) == 16
        assert all(file.is_symlink() is (folder == linked) for file in files)
        assert {file.relative_to(folder).parts[0] for file in files} == set(names)
        for item in own.items:
            there = folder / own.classes[item.label] / item.path
            source = data / item.domain / item.path
            assert there.read_bytes() == source.read_bytes()
    classes = find_classes(
        linked, only=[n for n, s in zip(own.classes, own.sizes, strict=True) if s > 1]
    )
    assert set(classes.names) <= set(names)


def test_a_page_has_a_row_for_each_modality_and_blanks_where_one_is_small():
    items = [Item(f"{n}.png", "A", 0, 1 - n / 10) for n in range(7)] + [Item("z.png", "A", 1, 0.5)]
    own = Modalities(("A_00", "A_01", "B"), 2, tuple(items))

    def read(_domain: str, path: str) -> np.ndarray:
        shade = 100 if path == "z.png" else 10 * int(path[0])
        return np.full((20, 20, 3), shade, np.uint8)

    page = np.asarray(montage(own, read, 3).convert("RGB"))
    left = page.shape[1] - 3 * (20 + GAP)
    middle = [[page[GAP + 10 + row * (20 + GAP), left + 10 + n * (20 + GAP), 0] for n in range(3)]
              for row in range(2)]  # fmt: skip
    assert middle[0] == [0, 20, 40]  # of seven, as far apart as they lie
    assert middle[1] == [100, 255, 255]
    with pytest.raises(modelsoup.ParameterError, match="columns is 0"):
        montage(own, read, 0)


def test_the_command_makes_a_page(model: Path, data: Path, tmp_path: Path):
    page = tmp_path / "page.png"
    soup(model, data / "A", "--montage", page, "--columns", 2)
    assert read_image(page).shape[1] > 2 * 128
    with pytest.raises(modelsoup.OutputError, match="exists"):
        soup(model, data / "A", "--montage", page)


def test_known_classes_tell_how_pure_modalities_are(model: Path, data: Path, tmp_path: Path):
    table = tmp_path / "classes.csv"
    soup(data / "A", data / "A", "-o", table)
    said = soup(data / "A", data / "A", "--labels", table).stdout
    assert "purity                       1.0000" in said and "to 1   1.0000" in said
    assert "purity" in soup(model, data / "A", "--labels", table).stdout
    assert "purity" not in soup(model, data / "A").stdout
    with pytest.raises(modelsoup.ParameterError, match=r"of no picture of .*/B a class is known"):
        soup(model, data / "B", "--labels", table)


def test_figures_are_those_of_a_and_by_hand():
    items = [
        *(Item(f"{n}", "A", n // 3, 0.5 + n / 10) for n in range(4)), Item("b", "B", 2, None),
    ]  # fmt: skip
    own = Modalities(class_names(2, 1), 2, tuple(items))
    assert figures(own) == pytest.approx(
        {"modalities": 2, "smallest": 1, "largest": 3, "cosine": 0.65}
    )
    names = {"0": "x", "1": "x", "2": "y", "b": "z"}
    found = figures(own, names)
    assert found["purity"] == pytest.approx(2 / 3) and found["nmi"] == 0
    assert list(told(own)) == ["modalities of A, 2: A_00 3, A_01 1", "modalities of B, 1: B 1"]


def test_sizes_that_a_translator_has_trouble_with_are_told():
    def of(*sizes: int) -> Modalities:
        items = [Item(f"{label} {n}", "A", label) for label, size in enumerate(sizes)
                 for n in range(size)]  # fmt: skip
        return Modalities(class_names(len(sizes), 1), len(sizes), tuple(items))

    assert list(warnings(of(20, 20), 10)) == []
    assert list(warnings(of(21, 19, 22), 10)) == [
        "modalities of more than twice as many pictures as B, which has 10: A_00 21, A_02 22 (a "
        "larger k makes smaller ones)"
    ]
    assert list(warnings(of(30, 4, 14))) == []
    assert list(warnings(of(30, 3, 15))) == [
        "modalities of less than a quarter of the mean, 16: A_01 3"
    ]
    assert list(warnings(of(30, 0))) == ["modalities without pictures: A_01"]
    assert list(warnings(of(0, 0))) == []


def test_names_are_numbered_and_b_is_one_class_or_several():
    assert class_names(2, 1) == ("A_00", "A_01", "B")
    assert class_names(1, 2) == ("A_00", "B_00", "B_01")
    own = known([("x", "A", "10"), ("y", "A", "9"), ("z", "B", "only")])
    assert own.classes == ("9", "10", "only") and [i.label for i in own.items] == [1, 0, 2]


# What is wrong.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,class\nx.png,1\n", "has the columns path, class, where path and label"),
        ("path,label\n", "names no pictures"),
        ("path,label,domain\nx.png,1,C\n", "line 2: the domain is 'C', but must be A or B"),
        ("path,label\nx.png,\n", "line 2 lacks a path or a label"),
        ("path,label\nx.png,1\nx.png,2\n", "has the picture x.png of A twice"),
        ("", "has the columns none"),
    ],
)
def test_a_table_that_is_none_is_told(tmp_path: Path, text: str, said: str):
    file = tmp_path / "labels.csv"
    file.write_text(text)
    with pytest.raises(modelsoup.ParameterError, match=said):
        read_modalities(file)


ITEM = {"path": "x", "domain": "A", "label": 0, "score": 0.5}
WHOLE = {"version": 1, "classes": ["a", "B"], "k_source": 1, "items": [ITEM]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "its version is 2, not 1"),
        ({"classes": ["a", "a"]}, "classes are no list of different names"),
        ({"k_source": 3}, "k_source is 3"),
        ({"k_source": True}, "k_source is True"),
        ({"items": {}}, "items are no list"),
        ({"items": [1]}, "item 0 is no object"),
        ({"items": [{**ITEM, "path": ""}]}, "item 0 has no path"),
        ({"items": [{**ITEM, "domain": "C"}]}, "domain of item 0 is 'C'"),
        ({"items": [{**ITEM, "label": 2}]}, "the label of item 0 is 2"),
        ({"items": [{**ITEM, "label": 1}]}, "the label 1 of item 0 is none of A"),
        ({"items": [{**ITEM, "score": "high"}]}, "the score of item 0 is 'high'"),
    ],
)
def test_a_json_that_is_none_is_told(tmp_path: Path, changes: dict, said: str):
    file = tmp_path / "modalities.json"
    file.write_text(json.dumps(WHOLE))
    assert read_modalities(file).items == (Item("x", "A", 0, 0.5),)
    file.write_text(json.dumps({**WHOLE, **changes}))
    with pytest.raises(modelsoup.ParameterError, match=said):
        read_modalities(file)
    file.write_text("[" * 100_000)
    with pytest.raises(modelsoup.ParameterError, match=r"is no modalities\.json"):
        read_modalities(file)


def test_pictures_without_a_modality_and_modalities_without_pictures_are_told(
    data: Path, tmp_path: Path
):
    table = tmp_path / "labels.csv"
    soup(data / "A", data / "A", "-o", table)
    make_classes(tmp_path / "more", {"red": 6}, 36)
    with pytest.raises(modelsoup.ParameterError, match=r"1 of 6 pictures .* such as red/5\.png"):
        modalities_of(table, tmp_path / "more")
    make_classes(tmp_path / "few", {"red": 2, "blue": 1}, 36)
    with pytest.raises(modelsoup.ParameterError, match=r"the modality 'green' .* is empty"):
        modalities_of(table, tmp_path / "few")
    (tmp_path / "few" / "none").mkdir()
    with pytest.raises(modelsoup.ParameterError, match=r"'none' .* is empty: it has no pictures"):
        in_folders(tmp_path / "few")
    with pytest.raises(modelsoup.ParameterError, match="has no folders"):
        in_folders(tmp_path / "few" / "red")


def test_b_of_a_file_that_names_none_of_its_pictures_is_one_class(data: Path, tmp_path: Path):
    own = modalities_of(data / "A", data / "A", data / "B")
    assert own.sizes == [3, 4, 5, 4] and own.classes[3] == "B"
    assert [item.label for item in own.items if item.domain == "B"] == [3] * 4


def test_what_is_not_there_is_told(model: Path, data: Path, tmp_path: Path):
    def refused(kind: type[Exception], said: str, *words: object) -> None:
        with pytest.raises(kind, match=said):
            soup(*words)

    (tmp_path / "empty").mkdir()
    refused(modelsoup.ParameterError, "holds no images", model, tmp_path / "empty")
    refused(ImageError, "does not exist", model, tmp_path / "gone")
    refused(modelsoup.ParameterError, "does not exist", tmp_path / "gone.csv", data / "A")
    refused(modelsoup.ParameterError, "--as is for OUT", model, data / "A", "--as", "csv")
    refused(modelsoup.ParameterError, "--columns is 0", model, data / "A", "--columns", 0)
    jpeg = tmp_path / "page.jpg"
    refused(modelsoup.OutputError, "must end in .png", model, data / "A", "--montage", jpeg)
    table = tmp_path / "x.csv"
    refused(
        modelsoup.ParameterError, "--copy is for folders", model, data / "A", "--copy", "-o", table
    )
    inside = data / "A" / "sorted"
    refused(modelsoup.OutputError, "lies in", model, data / "A", "-o", inside)
    assert not inside.exists() and not table.exists()


def test_a_checkpoint_of_something_else_has_no_modalities(data: Path, tmp_path: Path):
    from safetensors.numpy import save_file

    file = tmp_path / "other.safetensors"
    save_file({"G.weight": np.zeros(3, np.float32)}, file)
    with pytest.raises(modelsoup.MismatchError, match="no labeller of modalities"):
        modalities_of(file, data / "A")
