"""Domains, subsets, transforms, the sampler and the pool."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from i2i_domains import make_domains
from modelsoup_i2i.pictures.cache import Pictures
from modelsoup_i2i.pictures.draws import Classes, Noise, Sampler, Spot, Unpaired, batches
from modelsoup_i2i.pictures.folders import choose, find_domains, folders_of, subset_size
from modelsoup_i2i.pictures.images import ImageError, save_png
from modelsoup_i2i.pictures.transforms import Transform
from modelsoup_i2i.training.pool import ImagePool

import modelsoup

MODES = ("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none")


@pytest.mark.parametrize(
    ("rich", "sizes"),
    [(995, (100, 50, 10)), (1019, (102, 51, 10)), (1067, (107, 53, 11)), (1334, (133, 67, 13))],
)
def test_subset_sizes_are_those_of_the_papers_second_table(rich: int, sizes: tuple[int, ...]):
    assert tuple(subset_size(rich, percent) for percent in (90, 95, 99)) == sizes


@pytest.mark.parametrize("percent", [-1, 100, float("nan")])
def test_an_imbalance_out_of_range_is_refused(percent: float):
    with pytest.raises(modelsoup.ParameterError, match="imbalance"):
        subset_size(100, percent)


@given(st.integers(2, 60), st.integers(0, 2**40), st.data())
def test_a_smaller_subset_lies_within_a_larger_one(total: int, seed: int, data):
    files = [Path(str(n)) for n in range(total)]
    large = data.draw(st.integers(1, total))
    small = data.draw(st.integers(1, large))
    assert choose(files, small, seed) == choose(files, large, seed)[:small]
    assert len(set(choose(files, large, seed))) == large


def test_a_subset_is_the_same_on_every_machine():
    """A plan's key and its results depend on it: the order may never change."""
    files = [Path(str(n)) for n in range(10)]
    assert [int(f.name) for f in choose(files, 5, 0)] == [7, 8, 1, 5, 3]


def test_folders_are_one_or_two(tmp_path: Path):
    root = make_domains(tmp_path / "set")
    assert folders_of(root, None, None) == (root / "trainA", root / "trainB")
    assert folders_of(root, None, None, "test") == (root / "testA", root / "testB")
    assert folders_of(None, Path("x"), Path("y")) == (Path("x"), Path("y"))
    x = Path("x")
    for wrong in ((None, None, None), (x, x, None), (None, x, None), (x, x, x)):
        with pytest.raises(modelsoup.ParameterError, match="one folder"):
            folders_of(*wrong)


def test_bad_folders_are_named(tmp_path: Path):
    root = make_domains(tmp_path / "set", count_a=3, count_b=1)
    with pytest.raises(modelsoup.ParameterError, match=r"no folder .*nowhere"):
        folders_of(tmp_path / "nowhere", None, None)
    with pytest.raises(modelsoup.ParameterError, match="no folder trainA"):
        folders_of(tmp_path, None, None)
    with pytest.raises(modelsoup.ParameterError, match="trainB has one image"):
        find_domains((root / "trainA", root / "trainB"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(modelsoup.ParameterError, match=r"no images in .*empty"):
        find_domains((root / "trainA", tmp_path / "empty"))
    (tmp_path / "empty" / "1.gif").touch()
    with pytest.raises(
        modelsoup.ParameterError, match=r"there are 1 of .*empty.* not read \(\.gif"
    ):
        find_domains((root / "trainA", tmp_path / "empty"))
    with pytest.raises(ImageError, match="does not exist"):
        find_domains((root / "trainA", tmp_path / "missing"))


def test_y_is_cut_down_to_the_imbalance(tmp_path: Path):
    root = make_domains(tmp_path / "set", count_a=20, count_b=8)
    folders = (root / "trainA", root / "trainB")
    whole = find_domains(folders)
    assert (len(whole.a), len(whole.b)) == (20, 8)
    cut = find_domains(folders, imbalance=75, seed=3)
    assert len(cut.b) == 5 and set(cut.b) < set(whole.b) and cut.a == whole.a
    assert find_domains(folders, count_b=2, seed=3).b == cut.b[:2]
    assert find_domains(folders, count_b=4, seed=4).b != cut.b[:4]
    with pytest.raises(modelsoup.ParameterError, match=r"wants 10 images.*has 8"):
        find_domains(folders, imbalance=50)
    with pytest.raises(modelsoup.ParameterError, match="must be of 2 to 8"):
        find_domains(folders, count_b=9)


def opened(root: Path, transform: Transform, **more) -> Pictures:
    domains = find_domains((root / "trainA", root / "trainB"))
    options = {"cache_bytes": 1 << 20, "threads": 2, "on_bad_image": "error"} | more
    return Pictures({"X": domains.a, "Y": domains.b}, transform, **options)


def pair(sampler: Sampler, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures at one place of an epoch."""
    (draw,) = sampler.draws
    first, second = draw.at(
        sampler.pictures, Spot(sampler.seed, epoch, index, sampler.order(epoch))
    )
    return first, second


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(20, 31), (33, 18), (16, 16)])
def test_every_mode_makes_the_size_that_it_says(mode: str, size: tuple[int, int]):
    transform = Transform(mode, load=(18, 17), crop=(14, 15))
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    ready = transform.prepare(image, "image")
    drawn = transform.draw(ready, np.random.default_rng(1))
    if transform.crops:
        assert drawn.shape == (14, 15, 3)
    if mode == "resize_and_crop":
        assert ready.shape == (18, 17, 3)
    if mode == "scale_width":
        assert ready.shape == (round(17 * size[0] / size[1]), 17, 3)
    if mode == "none":
        assert all(side % 4 == 0 for side in ready.shape[:2])
        assert all(abs(new - old) <= 2 for new, old in zip(ready.shape, size, strict=False))
    assert drawn.dtype == transform.for_test(image).dtype == np.uint8


def test_crops_and_mirror_images_lie_within_the_picture():
    transform = Transform("crop", crop=(3, 4))
    image = np.arange(7 * 9 * 3, dtype=np.uint8).reshape(7, 9, 3)
    windows = {
        image[y : y + 3, x : x + 4][:, ::turn].tobytes()
        for y in range(5) for x in range(6) for turn in (1, -1)
    }  # fmt: skip
    rng = np.random.default_rng(0)
    seen = {transform.draw(image, rng).tobytes() for _ in range(2000)}
    assert seen == windows
    still = Transform("crop", crop=(7, 9), flip=False)
    assert {still.draw(image, rng).tobytes() for _ in range(20)} == {image.tobytes()}


def test_an_image_smaller_than_the_crop_is_named(tmp_path: Path):
    root = make_domains(tmp_path / "set", size=20)
    with pytest.raises(ImageError, match=r"0\.png is 20 × 20, smaller than the crop of 24 × 16"):
        opened(root, Transform("crop", crop=(24, 16)))


def test_a_load_size_smaller_than_the_crop_is_refused():
    with pytest.raises(modelsoup.ParameterError, match="smaller than crop_size"):
        Transform(load=(16, 30), crop=(20, 20))
    said = "load_size is 19 wide, but must be at least as wide as crop_size, 20$"
    with pytest.raises(modelsoup.ParameterError, match=said):
        Transform("scale_width_and_crop", load=(30, 19), crop=(10, 20))
    for option in ("load", "crop"):
        with pytest.raises(modelsoup.ParameterError, match=rf"{option}_size is \[0, 3\], but must"):
            Transform("none", **{option: (0, 3)})


def test_a_picture_that_is_scaled_to_its_width_is_as_high_as_the_crop_at_least():
    transform = Transform("scale_width_and_crop", load=(99, 20), crop=(12, 8))
    flat, high = np.zeros((5, 50, 3), np.uint8), np.zeros((50, 25, 3), np.uint8)
    assert transform.prepare(flat, "flat").shape == (12, 20, 3)
    assert transform.prepare(high, "high").shape == (40, 20, 3)


def test_a_bad_image_is_named_or_left_out(tmp_path: Path):
    root = make_domains(tmp_path / "set")
    bad = root / "trainA" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"trainA/2\.png .*on_bad_image: skip"):
        opened(root, Transform(load=(18, 18), crop=(16, 16)))
    pictures = opened(root, Transform(load=(18, 18), crop=(16, 16)), on_bad_image="skip")
    assert len(pictures.sets["X"]) == 5 and bad not in pictures.sets["X"]
    assert len(pictures.bad) == 1 and "2.png" in pictures.bad[0]


def test_too_few_good_images_are_an_error_even_when_bad_ones_are_skipped(tmp_path: Path):
    root = make_domains(tmp_path / "set", count_b=2)
    (root / "trainB" / "0.png").write_bytes(b"nothing")
    with pytest.raises(modelsoup.TrainerError, match="of the 2 images of Y, 1 can be used"):
        opened(root, Transform(load=(18, 18), crop=(16, 16)), on_bad_image="skip")


@pytest.mark.parametrize(("count_a", "count_b"), [(7, 3), (3, 7), (5, 5)])
def test_an_epoch_is_as_long_as_the_larger_domain(tmp_path: Path, count_a: int, count_b: int):
    root = make_domains(tmp_path / "set", count_a, count_b)
    pictures = opened(root, Transform(load=(18, 18), crop=(16, 16)))
    assert pictures.length == max(count_a, count_b)
    sampler = Sampler(pictures, [Unpaired()], seed=5)
    order = sampler.order(0)
    assert sorted(order) == list(range(pictures.length))
    assert not np.array_equal(order, sampler.order(1))
    a, b = sampler.batch_at(0, 0, order).values()
    assert a.shape == b.shape == (1, 3, 16, 16)
    assert a.dtype == torch.float32 and a.min() >= -1 and a.max() <= 1


def test_each_image_of_the_rich_domain_comes_once_and_the_poor_ones_at_random(tmp_path: Path):
    """Pictures of one grey value say which they are."""
    for kind, count in (("A", 30), ("B", 3)):
        folder = tmp_path / f"train{kind}"
        folder.mkdir()
        for n in range(count):
            save_png(np.full((4, 4, 3), n, np.uint8), folder / f"{n}.png")
    pictures = opened(tmp_path, Transform("none"))
    sampler = Sampler(pictures, [Unpaired()], seed=1)
    for epoch in range(2):
        pairs = [pair(sampler, epoch, n) for n in range(30)]
        assert sorted(int(a[0, 0, 0]) for a, _ in pairs) == list(range(30))
        counts = np.bincount([int(b[0, 0, 0]) for _, b in pairs], minlength=3)
        assert counts.sum() == 30 and counts.min() >= 2


def test_pairs_are_not_aligned_and_others_in_each_epoch(tmp_path: Path):
    """Equal names of both domains meet no more often than others."""
    count, epochs = 8, 40
    for kind in "AB":
        (tmp_path / f"train{kind}").mkdir()
        for n in range(count):
            save_png(np.full((4, 4, 3), n, np.uint8), tmp_path / f"train{kind}" / f"{n}.png")
    sampler = Sampler(opened(tmp_path, Transform("none")), [Unpaired()], seed=1)
    met = np.zeros((epochs, count), int)
    for epoch in range(epochs):
        for n in range(count):
            a, b = pair(sampler, epoch, n)
            met[epoch, int(a[0, 0, 0])] = int(b[0, 0, 0])
    assert len({tuple(pairs) for pairs in met}) == epochs
    assert np.mean(met == np.arange(count)) < 2 / count
    assert all(len(set(partners)) >= count - 1 for partners in met.T)
    orders = {tuple(sampler.order(epoch)) for epoch in range(epochs)}
    assert len(orders) == epochs


@pytest.mark.parametrize("cache", [0, 4000, 1 << 20])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_are_the_same_however_they_are_prepared(tmp_path: Path, cache: int, threads: int):
    root = make_domains(tmp_path / "set")
    pictures = opened(root, Transform(load=(18, 18), crop=(16, 16)), cache_bytes=cache)
    assert pictures.cached_bytes <= cache
    sampler = Sampler(pictures, [Unpaired(), Noise("z", (3,)), Classes("c", 5)], seed=2, batch=2)
    places = [(epoch, first) for epoch in range(2) for first in (0, 2, 4)]
    made = list(batches(sampler, iter(places), threads))
    assert len(made) == len(places)
    for (epoch, first), drawn in zip(places, made, strict=True):
        wanted = sampler.batch_at(epoch, first, sampler.order(epoch))
        assert list(drawn) == list(wanted) == ["a", "b", "z", "c"]
        assert all(torch.equal(drawn[name], values) for name, values in wanted.items())
    # What comes later does not depend on what came before.
    (late,) = batches(sampler, iter(places[4:5]), threads)
    assert all(torch.equal(late[name], values) for name, values in made[4].items())


def test_loading_that_is_given_up_ends_its_threads(tmp_path: Path):
    import threading

    root = make_domains(tmp_path / "set")
    sampler = Sampler(opened(root, Transform(load=(18, 18), crop=(16, 16))), [Unpaired()], seed=2)
    before = threading.active_count()
    stream = batches(sampler, iter([(0, n % 6) for n in range(1000)]), 2)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_a_pool_returns_what_it_gets_until_it_is_full():
    pool = ImagePool(4, seed=0)
    for n in range(4):
        image = torch.full((1, 3, 2, 2), float(n))
        assert torch.equal(pool.query(image), image)
    shown = [
        pool.query(torch.full((1, 3, 2, 2), float(n)))[0, 0, 0, 0].item() for n in range(4, 404)
    ]
    own = sum(value == n for n, value in enumerate(shown, 4))
    assert 150 < own < 250  # as it is with probability ½, else an earlier one
    assert all(value <= n for n, value in enumerate(shown, 4))
    assert len(pool.images) == 4


def test_a_pool_of_size_0_passes_on():
    image = torch.rand(2, 3, 4, 4, requires_grad=True)
    shown = ImagePool(0, seed=0).query(image)
    assert torch.equal(shown, image) and not shown.requires_grad


def test_a_pool_goes_on_from_its_state():
    pool, later = ImagePool(3, seed=1), ImagePool(3, seed=2)
    images = [torch.rand(2, 3, 2, 2) for _ in range(20)]
    for image in images[:10]:
        pool.query(image)
    later.load_state_dict(pool.state_dict())
    for image in images[10:]:
        assert torch.equal(pool.query(image), later.query(image))


def test_stored_images_do_not_keep_the_batch_alive():
    pool = ImagePool(3, seed=1)
    batch = torch.rand(8, 3, 4, 4)
    pool.query(batch[:1])
    assert pool.images[0].untyped_storage().nbytes() == 3 * 4 * 4 * 4


def test_a_negative_pool_is_refused():
    with pytest.raises(modelsoup.ParameterError, match="size of an image pool"):
        ImagePool(-1, seed=0)
