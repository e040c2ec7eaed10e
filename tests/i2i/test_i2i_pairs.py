"""Pictures in pairs: two folders with the same names, or two pictures side by side."""

from pathlib import Path

import numpy as np
import pytest
import torch
from modelsoup_i2i.pictures.cache import Pictures
from modelsoup_i2i.pictures.draws import Paired, Sampler, batches
from modelsoup_i2i.pictures.folders import find_halves, find_pairs
from modelsoup_i2i.pictures.images import ImageError, save_png
from modelsoup_i2i.pictures.picture import Half, read_picture
from modelsoup_i2i.pictures.transforms import Transform
from modelsoup_i2i.training.options import PairedOptions

import modelsoup

CROP = Transform("crop", crop=(6, 8))


def numbered(n: int, side: int = 12) -> np.ndarray:
    """A picture in which each pixel says where it is, and the last channel which picture it is."""
    y, x = np.mgrid[:side, :side]
    return np.stack([y, x, np.full_like(y, n)], axis=2).astype(np.uint8)


def make_pairs(root: Path, count: int = 5) -> Path:
    """`trainA` and `trainB`, equal but for 100 that B's number is more."""
    for kind, more in (("A", 0), ("B", 100)):
        for part in ("train", "test"):
            (root / f"{part}{kind}").mkdir(parents=True)
            for n in range(count):
                save_png(numbered(n + more), root / f"{part}{kind}" / f"{n}.png")
    return root


def make_halves(root: Path, count: int = 5) -> Path:
    """`train` and `test`, of the same pairs side by side."""
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        for n in range(count):
            both = np.concatenate([numbered(n), numbered(n + 100)], axis=1)
            save_png(both, root / part / f"{n}.png")
    return root


def opened(options: PairedOptions, transform: Transform = CROP, **more) -> Pictures:
    how = {"cache_bytes": 1 << 20, "threads": 2, "on_bad_image": "error"} | more
    return Pictures(options.images(), transform, aligned=[Paired().sets], **how)


@pytest.mark.parametrize("made", [make_pairs, make_halves])
def test_partners_have_one_crop_and_are_mirrored_together(tmp_path: Path, made):
    sampler = Sampler(opened(PairedOptions(data=made(tmp_path))), [Paired()], seed=3, batch=5)
    seen = set()
    for epoch in range(8):
        drawn = sampler.batch_at(epoch, 0, sampler.order(epoch))
        a, b = (drawn[name].add(1).mul(127.5).round().int() for name in "ab")
        assert a.shape == (5, 3, 6, 8)
        assert torch.equal(a[:, :2], b[:, :2])  # the same places of the picture
        assert torch.equal(a[:, 2] + 100, b[:, 2])  # of partners
        assert sorted(a[:, 2, 0, 0].tolist()) == list(range(5))  # each pair once an epoch
        seen |= {(int(own[0, 0, 0]), bool(own[1, 0, 0] > own[1, 0, -1])) for own in a}
    assert len(seen) > 8  # other places, mirrored or not


def test_pairs_do_not_depend_on_workers_cache_or_what_came_before(tmp_path: Path):
    options = PairedOptions(data=make_pairs(tmp_path))
    places = [(epoch, first) for epoch in range(2) for first in (0, 2, 4)]
    wanted = None
    for cache, threads in ((0, 0), (500, 3), (1 << 20, 1)):
        sampler = Sampler(opened(options, cache_bytes=cache), [Paired()], seed=2, batch=2)
        made = [drawn["b"] for drawn in batches(sampler, iter(places), threads)]
        wanted = wanted or made
        assert all(torch.equal(own, other) for own, other in zip(made, wanted, strict=True))
        (late,) = batches(sampler, iter(places[4:5]), threads)
        assert torch.equal(late["b"], wanted[4])


@pytest.mark.parametrize("made", [make_pairs, make_halves])
def test_the_direction_says_which_of_both_is_translated(tmp_path: Path, made):
    root = made(tmp_path)
    for direction, first in (("AtoB", 3), ("BtoA", 103)):
        for part in ("train", "test"):
            found = PairedOptions(data=root, direction=direction).images(part)
            assert read_picture(found["X"][3])[0, 0, 2] == first
            assert read_picture(found["Y"][3])[0, 0, 2] == 106 - first
    forth, back = (PairedOptions(data=root, direction=way).decisive() for way in ("AtoB", "BtoA"))
    assert forth != back


def test_names_pair_whatever_their_suffixes_and_folders_below(tmp_path: Path):
    for kind, suffix in (("a", "png"), ("b", "jpg")):
        (tmp_path / kind / "deep").mkdir(parents=True)
        for name in ("10", "9", "deep/1"):
            (tmp_path / kind / f"{name}.{suffix}").touch()
    pairs = find_pairs((tmp_path / "a", tmp_path / "b"))
    assert [str(file.relative_to(tmp_path)) for file in pairs.a] == [
        "a/9.png", "a/10.png", "a/deep/1.png",
    ]  # fmt: skip
    assert [str(file.relative_to(tmp_path)) for file in pairs.b] == [
        "b/9.jpg", "b/10.jpg", "b/deep/1.jpg",
    ]  # fmt: skip


def test_names_that_lack_a_partner_are_counted_and_the_first_are_named(tmp_path: Path):
    root = make_pairs(tmp_path, count=6)
    for n in range(4):
        (root / "trainB" / f"{n}.png").unlink()
    said = (
        r"4 of 6 pictures have no partner of their name in .*trainB: .*trainA/0\.png, .*1\.png, "
        r".*2\.png, …$"
    )
    with pytest.raises(modelsoup.ParameterError, match=said):
        PairedOptions(data=root).images()
    (root / "trainA" / "0.jpg").touch()
    with pytest.raises(modelsoup.ParameterError, match=r"trainA has 0\.\w+ and 0\.\w+, where a"):
        PairedOptions(data=root).images()


def test_a_folder_of_pairs_and_of_side_by_side_pictures_is_ambiguous(tmp_path: Path):
    root = make_halves(make_pairs(tmp_path))
    with pytest.raises(modelsoup.ParameterError, match=r"has train, of .* and trainA too: data_a"):
        PairedOptions(data=root).images()
    named = PairedOptions(data_a=root / "trainA", data_b=root / "trainB")
    assert len(named.images()["X"]) == 5


def test_side_by_side_pictures_of_an_odd_width_are_named(tmp_path: Path):
    save_png(np.zeros((4, 7, 3), np.uint8), tmp_path / "odd.png")
    with pytest.raises(ImageError, match=r"odd\.png is 7 wide, .* have an even width"):
        read_picture(Half(tmp_path / "odd.png", "left"))
    with pytest.raises(modelsoup.ParameterError, match="has one image"):
        find_halves(tmp_path)


def test_partners_of_other_sizes_are_named_unless_both_are_resized(tmp_path: Path):
    options = PairedOptions(data=make_pairs(tmp_path))
    save_png(numbered(102, side=14), tmp_path / "trainB" / "2.png")
    said = r"trainA/2\.png is 12 × 12 and .*trainB/2\.png is 14 × 14: a pair .* skip leaves it out"
    with pytest.raises(ImageError, match=said):
        opened(options)
    kept = opened(options, on_bad_image="skip")
    assert [p.name for p in kept.sets["Y"]] == ["0.png", "1.png", "3.png", "4.png"]
    resizing = opened(options, Transform(load=(10, 10), crop=(8, 8)))
    assert len(resizing.sets["X"]) == len(resizing.sets["Y"]) == 5


def test_a_damaged_picture_takes_its_partner_with_it(tmp_path: Path):
    root = make_pairs(tmp_path)
    (root / "trainB" / "1.png").write_bytes(b"nothing")
    pictures = opened(PairedOptions(data=root), on_bad_image="skip")
    assert [p.name for p in pictures.sets["X"]] == [p.name for p in pictures.sets["Y"]]
    assert len(pictures.sets["X"]) == 4 and len(pictures.bad) == 1
    with pytest.raises(ImageError, match=r"trainB/1\.png is not a"):
        opened(PairedOptions(data=root))


def test_a_translation_is_measured_against_its_partner(tmp_path: Path):
    for root in (make_pairs(tmp_path / "two"), make_halves(tmp_path / "one")):
        options = PairedOptions(data=root, direction="BtoA", evaluate=["psnr"])
        sets = options.test_sets(Transform("none"))
        assert [own[0, 0, 2] for own in sets.read(sets.inputs)] == [100, 101, 102, 103, 104]
        assert [own[0, 0, 2] for own in sets.read(sets.truth)] == [0, 1, 2, 3, 4]
        found = options.images("test")
        assert options.truth(found["Y"][2:4], "Y", "X", "test") == list(found["X"][2:4])
    bare = PairedOptions(data_a=tmp_path, data_b=tmp_path)
    assert bare.images("test") == {"X": (), "Y": ()}
    with pytest.raises(modelsoup.ParameterError, match="no test images: they are in data"):
        bare.test_sets(Transform("none"))
    with pytest.raises(ValueError, match=r"evaluate needs test images: data, .* or test where two"):
        PairedOptions(data_a=tmp_path, data_b=tmp_path, evaluate=["psnr"])
    with pytest.raises(ValueError, match="test_a and test_b, the folders of test images, go"):
        PairedOptions(data=tmp_path, test_a=tmp_path)
