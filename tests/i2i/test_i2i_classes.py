"""Pictures of classes: folders of them, HDF5, draws, and what a checkpoint says of its classes."""

import json
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.networks.resnet import resnet_in
from modelsoup_i2i.pictures.cache import Pictures
from modelsoup_i2i.pictures.draws import Labelled, Sampler, batches
from modelsoup_i2i.pictures.folders import Division, find_classes
from modelsoup_i2i.pictures.images import ImageError, save_png
from modelsoup_i2i.pictures.picture import labels_of, read_picture
from modelsoup_i2i.pictures.transforms import Transform
from modelsoup_i2i.training.losses import distance
from modelsoup_i2i.training.options import LabelledOptions
from modelsoup_i2i.training.players import Player
from modelsoup_i2i.training.trainer import ImageTrainer
from modelsoup_i2i.training.turns import Turn
from modelsoup_i2i.use.classes import CLASSES, classes_in
from modelsoup_i2i.use.translator import Translator

import modelsoup

COUNTS = {"class 2": 3, "Class 1": 6, "class 10": 2}
IN_ORDER = ("Class 1", "class 2", "class 10")


def grey(value: int, side: int = 20) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def make_classes(root: Path, counts: dict[str, int] = COUNTS) -> Path:
    """A folder for each class; the grey of a picture is 10 · the class's place + its number."""
    for name, count in counts.items():
        (root / name / "deeper").mkdir(parents=True)
        for n in range(count):
            folder = root / name / ("deeper" if n == 1 else "")
            save_png(grey(10 * list(counts).index(name) + n), folder / f"{n}.png")
    return root


def opened(options: LabelledOptions, **more) -> Pictures:
    how = {"cache_bytes": 1 << 20, "threads": 2, "on_bad_image": "error"} | more
    return Pictures(options.images(), Transform("none"), **how)


def shades(drawn: dict[str, torch.Tensor]) -> list[int]:
    return drawn["x"][:, 0, 0, 0].add(1).mul(127.5).round().int().tolist()


def test_a_folder_is_a_class_in_natural_order_with_all_below_it(tmp_path: Path):
    root = make_classes(tmp_path)
    (root / ".hidden").mkdir()
    found = find_classes(root)
    assert found.names == IN_ORDER
    assert found.counts() == {"Class 1": 6, "class 2": 3, "class 10": 2}
    labels = labels_of(found.pictures)
    assert labels.tolist() == [0] * 6 + [1] * 3 + [2] * 2
    assert [read_picture(p)[0, 0, 0] for p in found.pictures[6:]] == [0, 2, 1, 20, 21]


def test_some_classes_and_some_of_each_can_be_used(tmp_path: Path):
    root = make_classes(tmp_path)
    some = find_classes(root, only=("class 10", "Class 1"), division=Division(per_class=2, seed=4))
    assert some.names == ("Class 1", "class 10") and some.counts() == {"Class 1": 2, "class 10": 2}
    assert labels_of(some.pictures).tolist() == [0, 0, 1, 1]
    more = find_classes(root, only=("Class 1",), division=Division(per_class=4, seed=4))
    assert set(some.pictures[:2]) < set(more.pictures)
    other = find_classes(root, only=("Class 1",), division=Division(per_class=4, seed=5))
    assert set(other.pictures) != set(more.pictures)


def test_wrong_folders_of_classes_are_named(tmp_path: Path):
    def refused(said: str, **more) -> None:
        with pytest.raises(modelsoup.ParameterError, match=said):
            find_classes(root, **more)

    root = tmp_path / "none"
    refused("none does not exist, where a folder of classes or an HDF5 file is expected")
    root.mkdir()
    save_png(grey(0), root / "0.png")
    refused("none has no folders, of which each would be a class")
    root = make_classes(tmp_path / "set")
    refused("has no class 'class 3'; did you mean 'class 2'", only=("class 3",))
    three = Division(per_class=3)
    refused("per_class is 3, but the class 'class 10' of .*set has 2 images", division=three)
    refused("has no class 'class 3'; did you mean 'class 2'", exclude=("class 3",))
    refused("exclude leaves no class of .*set: it has Class 1, class 2", exclude=IN_ORDER)
    held = Division(test_share=0.1)
    refused("'class 10' of .* has 2 images, and training takes all of them: none is", division=held)
    (root / "class 10" / "0.png").unlink()
    refused("the class 'class 10' of .*set has one image, where two or more must be")
    (root / "empty").mkdir()
    (root / "class 10" / "0.jpg").touch()
    refused("the class 'empty' of .*set has no images")


def test_each_picture_comes_once_with_its_class(tmp_path: Path):
    sampler = Sampler(opened(LabelledOptions(data=make_classes(tmp_path))), [Labelled()], seed=1)
    orders = set()
    for epoch in range(4):
        drawn = [sampler.batch_at(epoch, n, sampler.order(epoch)) for n in range(11)]
        pairs = [(shades(own)[0], int(own["c"][0])) for own in drawn]
        assert sorted(pairs) == [
            (0, 1), (1, 1), (2, 1), *((10 + n, 0) for n in range(6)), (20, 2), (21, 2),
        ]  # fmt: skip
        assert drawn[0]["c"].dtype == torch.int64
        orders.add(tuple(pairs))
    assert len(orders) == 4


def test_balanced_draws_have_each_class_equally_often(tmp_path: Path):
    pictures = opened(LabelledOptions(data=make_classes(tmp_path)))
    sampler = Sampler(pictures, [Labelled(balanced=True)], seed=1, batch=3)
    seen = []
    for first in range(0, 90, 3):
        drawn = sampler.batch_at(0, first, sampler.order(0))
        assert sorted(drawn["c"].tolist()) == [0, 1, 2]
        assert [{0: 1, 1: 0, 2: 2}[int(c)] for c in drawn["c"]] == [s // 10 for s in shades(drawn)]
        seen += shades(drawn)
    assert len(set(seen)) == 11
    assert min(seen.count(own) for own in (20, 21)) >= 8  # of 30: any picture of the class


def test_draws_of_other_names_are_independent_of_each_other(tmp_path: Path):
    pictures = opened(LabelledOptions(data=make_classes(tmp_path)))
    draws = [Labelled(), Labelled(("y", "d")), Labelled(("z", "e"), balanced=True)]
    sampler = Sampler(pictures, draws, seed=1, batch=110)
    drawn = sampler.batch_at(0, 0, sampler.order(0))
    for one, other in (("c", "d"), ("c", "e"), ("d", "e")):
        assert 20 < int((drawn[one] == drawn[other]).sum()) < 70


def test_a_draw_has_several_pictures_of_one_class(tmp_path: Path):
    pictures = opened(LabelledOptions(data=make_classes(tmp_path)))
    sampler = Sampler(pictures, [Labelled(("x", "x2", "c"), balanced=True)], seed=1, batch=60)
    drawn = sampler.batch_at(0, 0, sampler.order(0))
    second = shades({"x": drawn["x2"]})
    for grey_1, grey_2, label in zip(shades(drawn), second, drawn["c"].tolist(), strict=True):
        place = list(COUNTS).index(IN_ORDER[label])  # a picture is as grey as its class's place
        assert grey_1 // 10 == grey_2 // 10 == place
    assert 10 < sum(map(int.__eq__, shades(drawn), second)) < 40  # drawn apart: some are the same


def test_two_folders_are_the_classes_a_and_b(tmp_path: Path):
    root = make_classes(tmp_path)
    a, b = root / "Class 1", root / "class 10"
    options = LabelledOptions(data_a=a, data_b=b, test_a=b, test_b=a)
    own = options.class_set()
    assert own is not None and own.names == options.class_names() == ("A", "B")
    assert own.counts() == {"A": 6, "B": 2}
    tests = options.class_set("test")
    assert tests is not None and tests.counts() == {"A": 2, "B": 6}
    assert (options.class_count, options.folders()) == (2, (a, b))
    with pytest.raises(ValueError, match="data_a and data_b, the folders of A and of B, go toget"):
        LabelledOptions(data_a=a)
    with pytest.raises(ValueError, match="data and data_a both say where the pictures are"):
        LabelledOptions(data=root, data_a=a, data_b=b)


@pytest.mark.parametrize("balanced", [False, True])
def test_labelled_draws_do_not_depend_on_workers_cache_or_what_came_before(
    tmp_path: Path, balanced: bool
):
    options = LabelledOptions(data=make_classes(tmp_path))
    places = [(epoch, first) for epoch in range(2) for first in (0, 4, 8)]
    wanted = None
    for cache, threads in ((0, 0), (3000, 3), (1 << 20, 1)):
        pictures = opened(options, cache_bytes=cache)
        sampler = Sampler(pictures, [Labelled(balanced=balanced)], seed=2, batch=4)
        made = [(shades(d), d["c"].tolist()) for d in batches(sampler, iter(places), threads)]
        wanted = wanted or made
        assert made == wanted and pictures.cached_bytes <= cache
        (late,) = batches(sampler, iter(places[4:5]), threads)
        assert shades(late) == wanted[4][0]


def test_a_class_with_fewer_than_two_good_pictures_is_an_error(tmp_path: Path):
    root = make_classes(tmp_path)
    (root / "class 10" / "0.png").write_bytes(b"nothing")
    said = r"of the 2 images of the class of .*class 10/0\.png, 1 can be used"
    with pytest.raises(modelsoup.TrainerError, match=said):
        opened(LabelledOptions(data=root), on_bad_image="skip")


def split(root: Path, **more) -> tuple[list[object], list[object]]:
    options = LabelledOptions(data=root, **more)
    train, test = (list(options.images(part)["data"]) for part in ("train", "test"))
    return train, test


def of_class(pictures: list[object], label: int) -> list[object]:
    return [picture for picture in pictures if picture.label == label]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Classes of 3 to 30 pictures; that of 30 is what most are."""
    return make_classes(tmp_path / "many", {"a": 30, "b": 11, "c": 3})


def test_what_is_held_out_is_never_trained_on_and_each_class_has_some(many: Path):
    train, test = split(many, test_share=0.1)
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(find_classes(many).pictures)
    assert [len(of_class(test, label)) for label in range(3)] == [3, 1, 1]
    assert [len(of_class(train, label)) for label in range(3)] == [27, 10, 2]
    assert split(many, test_share=0.1, subset_seed=0) == (train, test)
    assert set(split(many, test_share=0.1, subset_seed=1)[1]) != set(test)


def test_fewer_tests_are_a_prefix_of_more_and_what_is_trained_on_stays(many: Path):
    two = {"per_class": 3, "classes": ("a", "b")}
    few, more = (split(many, test_per_class=n, **two) for n in (2, 8))
    assert few[0] == more[0] and not set(more[0]) & set(more[1])
    for label, count in ((0, 8), (1, 8)):
        own = of_class(more[1], label)
        assert len(own) == count and own[:2] == of_class(few[1], label)
        assert own != sorted(own, key=str)  # drawn, not the last of the folder
    with pytest.raises(modelsoup.ParameterError, match=r"'c' of .*many has 3 images, and tr"):
        split(many, per_class=3, test_per_class=2)


def test_a_class_with_fewer_tests_than_are_asked_for_gives_what_it_has(many: Path):
    train, test = split(many, test_per_class=10)
    assert [len(of_class(test, label)) for label in range(3)] == [10, 9, 1]
    assert [len(of_class(train, label)) for label in range(3)] == [20, 2, 2]


def test_tests_stay_whatever_is_trained_on_and_less_lies_within_more(many: Path):
    more = {"test_share": 0.2, "classes": ("a", "b")}
    whole, test = split(many, **more)
    nested = [split(many, train_fraction=f, **more) for f in (0.1, 0.5)]
    nested += [split(many, per_class=5, **more)]
    assert all(own == test for _, own in nested)
    # Of 24 and 9 that are left, rounded up, and two at least.
    assert [[len(of_class(own, n)) for n in range(2)] for own, _ in nested] == [
        [3, 2], [12, 5], [5, 5],
    ]  # fmt: skip
    assert set(nested[0][0]) < set(nested[2][0]) < set(nested[1][0]) | set(nested[2][0])
    assert all(set(own) < set(whole) for own, _ in nested)
    assert split(many, train_fraction=1.0, **more)[0] == whole


def test_a_share_of_what_binary_fractions_lack_is_not_one_more(tmp_path: Path):
    """0.1 · 710 is 71, the tenth of a class of paper DeepI2I's; in binary it is a little more."""
    assert len(Division(fraction=0.1).of(710, "it")["train"]) == 71
    parts = Division(test_share=0.1).of(15, "it")
    assert [len(parts[part]) for part in ("train", "test")] == [13, 2]  # half is rounded up


def test_a_class_can_be_left_out_of_training_and_tests(many: Path):
    options = LabelledOptions(data=many, test=many, exclude=("b",))
    assert options.class_names() == ("a", "c")
    for part in ("train", "test"):
        found = options.images(part)["data"]
        assert {picture.file.parent.name for picture in found} <= {"a", "c", "deeper"}
        assert np.bincount(labels_of(found)).tolist() == [30, 3]


def test_of_named_tests_some_of_each_class_can_be_used(many: Path, tmp_path: Path):
    test = make_classes(tmp_path / "test", {"a": 9, "b": 4, "c": 1})  # one is enough to test on
    whole = LabelledOptions(data=many, test=test).images("test")["data"]
    assert np.bincount(labels_of(whole)).tolist() == [9, 4, 1]
    few, more = (
        list(LabelledOptions(data=many, test=test, test_per_class=n).images("test")["data"])
        for n in (2, 6)
    )
    assert [len(of_class(more, label)) for label in range(3)] == [6, 4, 1]
    for label in range(3):
        assert of_class(few, label) == of_class(more, label)[:2]
    assert len(LabelledOptions(data=many, test=test, test_per_class=2).images()["data"]) == 44


def test_what_says_one_thing_twice_is_refused(tmp_path: Path):
    for said, more in (
        ("per_class and train_fraction both say", {"per_class": 2, "train_fraction": 0.5}),
        ("test_share and test_per_class both say", {"test_share": 0.5, "test_per_class": 2}),
        ("test_share holds out some of data, but test", {"test_share": 0.5, "test": tmp_path}),
        ("'a' is among both classes and exclude", {"classes": ("a", "b"), "exclude": ("a",)}),
        ("test_share is 1.0, but must be less than 1", {"test_share": 1.0}),
        ("train_fraction is 0.0, but must be positive", {"train_fraction": 0.0}),
        ("test_per_class is 0, but must be at least 1", {"test_per_class": 0}),
    ):
        with pytest.raises(ValueError, match=said):
            LabelledOptions(data=tmp_path, **more)


def test_what_is_held_out_decides_the_result_and_what_is_only_measured_does_not(many: Path):
    def key(**more) -> dict[str, object]:
        return Toy().identity(ToyOptions(data=many, **more))

    assert key(test_share=0.1) != key() != key(test_per_class=1) != key(test_per_class=2)
    assert key(test=many, test_per_class=2) == key(test=many) == key(test=many, test_per_class=3)


def test_sets_to_measure_on_are_the_tests_with_their_classes(many: Path):
    options = LabelledOptions(data=many, test_per_class=1, load_size=9, crop_size=8)
    sets = options.test_sets(options.transform())
    assert [*chain(*sets.test.values())] == list(options.images("test")["data"])
    assert [*chain(*sets.train.values())] == list(options.images()["data"])
    assert tuple(sets.test) == tuple(sets.train) == options.class_names()
    assert [labels_of(own).tolist() for own in sets.test.values()] == [[0], [1], [2]]
    assert sets.folders == (many,) and sets.transform.crop == (8, 8)
    with pytest.raises(modelsoup.ParameterError, match="no test images: they are test, a folder"):
        LabelledOptions(data=many).test_sets(options.transform())


# HDF5.


def stored(path: Path, images, labels=None, classes=None, attribute=None) -> Path:
    import h5py

    with h5py.File(path, "w") as file:
        if images is not None:
            file["imgs"] = images
        if labels is not None:
            file["labels"] = labels
        if classes is not None:
            file["classes"] = classes
        if attribute is not None:
            file.attrs["classes"] = attribute
    return path


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


LABELS = np.array([2, 0, 1, 0, 2, 1])


@pytest.mark.needs("hdf5")
@pytest.mark.parametrize("first", [True, False])
def test_hdf5_gives_the_pictures_and_labels_that_it_holds(tmp_path: Path, first: bool):
    images = random_images(6, 8, 9, 3)
    kept = images.transpose(0, 3, 1, 2) if first else images
    file = stored(tmp_path / "set.h5", kept, LABELS)
    options = LabelledOptions(data=file)
    assert options.class_names() == ("0", "1", "2") and options.folders() == ()
    found = options.images()["data"]
    assert labels_of(found).tolist() == [0, 0, 1, 1, 2, 2]
    for picture, row in zip(found, (1, 3, 2, 5, 0, 4), strict=True):
        assert np.array_equal(read_picture(picture), images[row])
        assert read_picture(picture, 1).shape == (8, 9, 1)
    assert Toy().files(options) == [file]
    drawn = [
        (d["x"].numpy().tobytes(), d["c"].tolist())
        for threads in (0, 4)
        for d in batches(
            Sampler(opened(options, cache_bytes=0), [Labelled()], seed=0, batch=2),
            iter([(0, n) for n in (0, 2, 4)]), threads,
        )
    ]  # fmt: skip
    assert drawn[:3] == drawn[3:]


@pytest.mark.needs("hdf5")
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_hdf5_keeps_16_bits_and_any_number_of_channels(
    tmp_path: Path, channels: int, first: bool, order: str
):
    images = np.random.default_rng(0).integers(0, 1 << 16, (6, 8, 12, channels), np.uint16)
    kept = (images.transpose(0, 3, 1, 2) if first else images).astype(order)
    options = LabelledOptions(
        data=stored(tmp_path / "set.h5", kept, LABELS), channels=channels, load_size=8, crop_size=8
    )
    found = options.images()["data"]
    for picture, row in zip(found, (1, 3, 2, 5, 0, 4), strict=True):
        read = read_picture(picture, channels, deep=True)
        assert read.dtype == np.uint16 and np.array_equal(read, images[row])
        rounded = np.rint(images[row] / 257)
        assert np.array_equal(read_picture(picture, channels), rounded)
    seen = opened(options, channels=channels)[found[0]]
    assert seen.dtype == np.uint16 and np.array_equal(seen, images[1])


@pytest.mark.needs("hdf5")
def test_hdf5_of_pictures_that_are_too_large_is_refused_before_one_is_read(tmp_path: Path):
    import h5py

    with h5py.File(tmp_path / "set.h5", "w") as file:
        file.create_dataset("imgs", (4, 8200, 8200, 3), np.uint8, chunks=(1, 64, 64, 3))
        file["labels"] = [0, 0, 1, 1]
    said = r"set\.h5: a picture of imgs has 8200 × 8200 pixels, where at most"
    with pytest.raises(modelsoup.ParameterError, match=said):
        LabelledOptions(data=tmp_path / "set.h5").images()


@pytest.mark.needs("hdf5")
def test_hdf5_may_name_its_classes(tmp_path: Path):
    images, names = random_images(6, 8, 8, 1), ["cat", "dog", "owl"]
    for n, told in enumerate(
        ({"classes": names}, {"attribute": names}, {"classes": json.dumps(names)},
         {"attribute": json.dumps(names)})
    ):  # fmt: skip
        assert find_classes(stored(tmp_path / f"{n}.h5", images, LABELS, **told)).names == (
            "cat", "dog", "owl",
        )  # fmt: skip


@pytest.mark.needs("hdf5")
def test_wrong_hdf5_is_named(tmp_path: Path):
    good, count = random_images(6, 8, 8, 3), 0

    def refused(said: str, *content, **more) -> None:
        nonlocal count
        count += 1
        with pytest.raises(modelsoup.ParameterError, match=said) as told:
            find_classes(stored(tmp_path / f"{count}.h5", *content, **more))
        assert f"{count}.h5" in str(told.value)

    refused(r"has no dataset labels \(it has imgs\)", good)
    refused(r"has no dataset imgs \(it has labels\)", None, LABELS)
    refused(r"imgs is float32 of \[6, 8, 8, 3\], where uint8", good.astype(np.float32), LABELS)
    refused(r"imgs is uint8 of \[6, 8, 8\], where uint8 or uint16 of N", good[..., 0], LABELS)
    two = stored(tmp_path / "two.h5", random_images(6, 8, 8, 2), LABELS)
    said = r"two\.h5: imgs is of \[6, 8, 8, 2\], where 3 channels are expected, second or last"
    with pytest.raises(modelsoup.ParameterError, match=said):
        LabelledOptions(data=two).images()
    refused(r"labels is float64 of \[6\], where an integer for", good, LABELS.astype(float))
    refused(r"labels is int64 of \[5\], where an integer for each of the 6", good, LABELS[:5])
    refused(r"labels are -1 to 1, where indices of classes, 0 and more", good, LABELS - 1)
    refused(r"labels are 0 to 2, where indices of 2 classes", good, LABELS, ["a", "b"])
    refused(r"classes is no list of names", good, LABELS, "{not json")
    refused(r"classes is no list of names", good, LABELS, ["a", "a", "b"])
    refused(r"the class '1' .* has one image, where two", good, np.array([0, 0, 1, 2, 2, 2]))
    refused(r"the class '1' .* has no images", good, np.array([0, 0, 0, 2, 2, 2]))
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(modelsoup.ParameterError, match=r"text\.h5 cannot be read as HDF5"):
        find_classes(tmp_path / "text.h5")
    with pytest.raises(modelsoup.ParameterError, match=r"gone\.h5 does not exist, where an HDF5"):
        find_classes(tmp_path / "gone.h5")


def test_hdf5_without_h5py_says_how_to_get_it(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    said = r"set\.h5 needs h5py: .*\[hdf5\]"
    with pytest.raises(modelsoup.SoupError, match=said):
        ToyOptions(data=tmp_path / "set.h5").images()


@pytest.mark.needs("hdf5")
def test_hdf5_that_is_cut_off_or_changed_while_it_is_used_is_named(tmp_path: Path):
    file = stored(tmp_path / "set.h5", random_images(6, 8, 8, 3), LABELS)
    found = find_classes(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(modelsoup.ParameterError, match=r"set\.h5 cannot be read as HDF5"):
        find_classes(file)
    stored(file, random_images(6, 8, 8, 5), LABELS)
    with pytest.raises(ImageError, match=r"imgs\[4\]\): .*of \[6, 8, 8, 5\], where 3 channels"):
        read_picture(found.pictures[-1])
    stored(file, random_images(3, 8, 8, 3), LABELS[:3])
    with pytest.raises(ImageError, match=r"imgs\[4\]\): .*set\.h5 cannot be read as HDF5: .*range"):
        read_picture(found.pictures[-1])


@pytest.mark.needs("hdf5")
def test_hdf5_whose_values_lie_in_another_file_is_refused(tmp_path: Path):
    """Results are named by the content of the file that is given."""
    import h5py

    stored(tmp_path / "real.h5", random_images(6, 8, 8, 3), LABELS)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["imgs"] = h5py.ExternalLink("real.h5", "imgs")
        file["labels"] = LABELS
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout((6, 8, 8, 3), np.uint8)
        layout[:] = h5py.VirtualSource(tmp_path / "real.h5", "imgs", (6, 8, 8, 3))
        file.create_virtual_dataset("imgs", layout)
        file["labels"] = LABELS
    for name in ("link", "virtual"):
        with pytest.raises(modelsoup.ParameterError, match="imgs is no dataset whose values lie"):
            find_classes(tmp_path / f"{name}.h5")


# Trainings.


@dataclass(frozen=True)
class ToyOptions(LabelledOptions):
    width: int = 4


class Toy(ImageTrainer):
    """Learns to give a picture the shade of its class's index."""

    name, options = "toy", ToyOptions

    def networks(self, o: ToyOptions) -> dict[str, Network]:
        sizes = {"width": o.width, "blocks": 1, "channels": 3}
        return {"G": Network("modelsoup_i2i.networks.resnet:ResnetGenerator", sizes)}

    def players(self, o: ToyOptions) -> dict[str, Player]:
        return {"G": Player(("G",), o.lr)}

    def draws(self, o: ToyOptions) -> tuple[Labelled, ...]:
        return (Labelled(),)

    def turns(self, o: ToyOptions, step: int) -> tuple[Turn, ...]:
        return (Turn("shade", ("G",), (self.shade,)),)

    def shade(self, s, b) -> dict[str, torch.Tensor]:
        wanted = b.c.float()[:, None, None, None].expand_as(b.x) / 2
        return {"shade": distance(s["G"](b.x), wanted)}

    def translators(self, o: ToyOptions) -> dict[str, Translator]:
        return {"G": Translator("data", "data", "shaded")}

    def options_in(self, shapes) -> dict[str, object]:
        return {"width": resnet_in(shapes, "G.")["width"]}


OPTIONS = {"load_size": 18, "crop_size": 16, "epochs": 2, "device": "cpu", "sheet_every": 0}


def trained(data: Path, output: Path, start: Path | None = None, **more) -> list[str]:
    """Train the toy; what its log says."""
    said: list[str] = []
    session = Toy().session(ToyOptions(data=data, **{**OPTIONS, **more}), start, seed=0)
    session.run(lambda *_: None, said.append)
    session.save(output)
    return said


def test_a_checkpoint_says_which_class_has_which_index(tmp_path: Path):
    root = make_classes(tmp_path / "set")
    save_png(grey(0), root / "stray.png")
    output = tmp_path / "toy.safetensors"
    said = trained(root, output)
    assert classes_in(output) == IN_ORDER
    told = json.loads(modelsoup.open_checkpoint(output).metadata[CLASSES])
    assert told == {"Class 1": 0, "class 2": 1, "class 10": 2}
    assert "images by class, 3: Class 1 6, class 2 3, class 10 2" in said
    assert not any("test images" in line for line in said)
    assert any("left out: 1 of" in line and "stray.png" in line for line in said)
    with_start = tmp_path / "second.safetensors"
    trained(root, with_start, output, epochs=1)
    assert classes_in(with_start) == IN_ORDER


def test_how_many_tests_of_each_class_there_are_is_told(tmp_path: Path):
    root = make_classes(tmp_path / "set", {"a": 6, "b": 4})
    said = trained(root, tmp_path / "toy.safetensors", test_per_class=3, epochs=1)
    assert "images by class, 2: a 3, b 2" in said and "test images by class, 2: a 3, b 2" in said


def test_what_is_merged_knows_its_classes(tmp_path: Path):
    root = make_classes(tmp_path / "set")
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for file, rate in zip(files, (1e-3, 1e-4), strict=False):
        trained(root, file, epochs=1, lr=rate)
    modelsoup.merge(files[:2], files[2], method="linear")
    assert classes_in(files[2]) == IN_ORDER


def test_a_start_with_other_classes_is_refused(tmp_path: Path):
    output = tmp_path / "toy.safetensors"
    trained(make_classes(tmp_path / "set"), output, epochs=1)

    def refused(said: str, **counts: int) -> None:
        root = make_classes(
            tmp_path / said[:9], {n.replace("_", " "): c for n, c in counts.items()}
        )
        with pytest.raises(modelsoup.MismatchError, match=said):
            trained(root, tmp_path / "no.safetensors", output)

    refused(r"the data lack 'class 10'$", Class_1=2, class_2=2)
    refused(r"it lacks 'class 3', 'class 4'$", **dict.fromkeys((*COUNTS, "class 3", "class_4"), 2))
    refused(r"data lack 'class 2', 'class 10'; it lacks 'a'", a=2, Class_1=2)
    known = modelsoup.open_checkpoint(output)
    assert known.metadata[CLASSES]
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.needs("hdf5")
def test_a_start_that_numbers_its_classes_otherwise_is_refused(tmp_path: Path):
    images, output = random_images(6, 20, 20, 3), tmp_path / "toy.safetensors"
    trained(stored(tmp_path / "1.h5", images, LABELS, ["a", "b", "c"]), output)
    with pytest.raises(modelsoup.MismatchError, match="it has 'b' where the data have 'c', at ind"):
        trained(stored(tmp_path / "2.h5", images, LABELS, ["a", "c", "b"]), output, output)


def test_a_picture_that_moves_to_another_class_changes_the_key_and_the_state(tmp_path: Path):
    root = make_classes(tmp_path / "set", {"a": 3, "b": 3})
    options = ToyOptions(data=root, **OPTIONS)
    trainer, work = Toy(), tmp_path / "work"
    work.mkdir()
    before = trainer.identity(options), trainer.files(options)
    session = trainer.session(options, None, seed=0, work=work)
    session.keep()
    (root / "a" / "2.png").rename(root / "b" / "-.png")
    (root / "b" / "-.png").rename(root / "b" / "!2.png")
    assert trainer.identity(options) != before[0]
    other = trainer.session(options, None, seed=0, work=work)
    with pytest.raises(modelsoup.TrainerError, match=r"other options.*classes \{'data'"):
        other.resume()


def test_a_training_of_classes_goes_on_where_it_was_stopped(tmp_path: Path):
    root = make_classes(tmp_path / "set")
    options = ToyOptions(data=root, **OPTIONS)
    whole = Toy().session(options, None, seed=3)
    whole.run(lambda *_: None, lambda _: None)

    class StopError(Exception):
        pass

    def stop(epoch: int) -> None:
        raise StopError

    work = tmp_path / "work"
    work.mkdir()
    every = ToyOptions(data=root, **OPTIONS, checkpoint_every=3)
    with pytest.raises(StopError):
        Toy().session(every, None, seed=3, work=work).run(lambda *_: None, lambda _: None, stop)
    resumed = Toy().session(every, None, seed=3, work=work)
    resumed.run(lambda *_: None, lambda _: None)
    assert resumed.steps == whole.steps == 22
    for name, value in whole.networks["G"].state_dict().items():
        assert torch.equal(value, resumed.networks["G"].state_dict()[name])


def test_metrics_are_those_of_classes(tmp_path: Path):
    def refused(said: str, **more) -> None:
        with pytest.raises(ValueError, match=said):
            ToyOptions(data=tmp_path, **more)

    refused("there is no metric 'kid'; did you mean 'mkid'", evaluate=["kid"], test=tmp_path)
    refused("evaluate needs test images: test, a folder of classes", evaluate=["mkid"])
    refused("evaluate has rc, which needs a classifier", evaluate=["rc"], test=tmp_path)
    own = {"test": tmp_path, "evaluate": ["mfd-net", "rc"], "classifier": Path("other.safetensors")}
    refused(r"'mfd-net'.*seen with extractor, a file net\.safetensors", **own)
    ToyOptions(data=tmp_path, extractor=Path("net.safetensors"), **own)
    with pytest.raises(ValueError, match="per_class is 1, but must be at least 2"):
        ToyOptions(data=tmp_path, per_class=1)


def test_test_images_have_the_classes_of_training(tmp_path: Path):
    root, test = make_classes(tmp_path / "set"), make_classes(tmp_path / "test")
    options = ToyOptions(data=root, test=test, classes=("class 2", "class 10"))
    found = options.images("test")["data"]
    assert labels_of(found).tolist() == [0, 0, 0, 1, 1]
    assert Toy().tested_on(options) == [picture.file for picture in found]
    assert ToyOptions(data=root).images("test") == {"data": ()}
