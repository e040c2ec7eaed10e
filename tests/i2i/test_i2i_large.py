"""Sets too large to be decoded before the first step."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from i2i_domains import make_domains
from modelsoup_i2i.pictures.cache import LOOKED_AT, Pictures
from modelsoup_i2i.pictures.draws import Labelled, Paired, Sampler, Unpaired, batches
from modelsoup_i2i.pictures.folders import find_classes, find_domains, find_pairs
from modelsoup_i2i.pictures.images import ImageError, save_png
from modelsoup_i2i.pictures.transforms import Transform
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions

import modelsoup

SMALL = Transform(load=(18, 18), crop=(16, 16))
DAMAGED = ("0.png", "3.png", "7.png")


def damaged(folder: Path) -> None:
    for name in DAMAGED:
        (folder / name).write_bytes(b"nothing")


def two_domains(root: Path) -> tuple[dict, list, dict]:
    make_domains(root, 10, 10)
    damaged(root / "trainB")
    domains = find_domains((root / "trainA", root / "trainB"))
    return {"X": domains.a, "Y": domains.b}, [Unpaired()], {}


def pairs(root: Path) -> tuple[dict, list, dict]:
    make_domains(root, 10, 10)
    damaged(root / "trainB")
    found = find_pairs((root / "trainA", root / "trainB"))
    return {"X": found.a, "Y": found.b}, [Paired()], {"aligned": [("X", "Y")]}


def classes(root: Path) -> tuple[dict, list, dict]:
    make_domains(root, 10, 10)
    for part in ("testA", "testB"):
        for file in (root / part).iterdir():
            file.unlink()
        (root / part).rmdir()
    damaged(root / "trainB")
    draws = [Labelled(), Labelled(("y", "d"), balanced=True)]
    return {"data": find_classes(root).pictures}, draws, {}


@pytest.mark.parametrize("made", [two_domains, pairs, classes])
def test_what_takes_a_damaged_pictures_place_depends_on_nothing_that_came_before(
    tmp_path: Path, made
):
    sets, draws, more = made(tmp_path)
    places = [(epoch, first) for epoch in range(3) for first in range(0, 18, 2)]

    def drawn(places, threads: int = 0, cache: int = 1 << 20) -> tuple[list, Pictures]:
        pictures = Pictures(
            sets, SMALL, cache_bytes=cache, threads=2, on_bad_image="skip", looked_at=0, **more
        )
        assert not pictures.bad and pictures.cached_bytes == 0  # nothing was decoded
        made = list(batches(Sampler(pictures, draws, seed=1, batch=2), iter(places), threads))
        assert 0 < pictures.cached_bytes <= cache or not cache
        return made, pictures

    wanted, pictures = drawn(places)
    assert len(pictures.bad) == len(pictures.met()) == len(DAMAGED)
    assert not pictures.met()  # each is told once
    for threads, cache in ((3, 0), (1, 3000)):
        again, _ = drawn(places, threads, cache)
        for own, other in zip(again, wanted, strict=True):
            assert all(torch.equal(own[name], other[name]) for name in other)
    late, _ = drawn(places[13:])
    for own, other in zip(late, wanted[13:], strict=True):
        assert all(torch.equal(own[name], other[name]) for name in other)


def test_a_pair_takes_a_pairs_place_and_a_balanced_picture_one_of_its_class(tmp_path: Path):
    """Pictures are grey, and say by it what they are."""
    for kind, more in (("a", 0), ("b", 100)):
        (tmp_path / kind).mkdir()
        for n in range(10):
            save_png(np.full((4, 4, 3), n + more, np.uint8), tmp_path / kind / f"{n}.png")
    damaged(tmp_path / "b")
    how = {"cache_bytes": 0, "threads": 1, "on_bad_image": "skip", "looked_at": 0}
    found = find_pairs((tmp_path / "a", tmp_path / "b"))
    pictures = Pictures(
        {"X": found.a, "Y": found.b}, Transform("none"), aligned=[("X", "Y")], **how
    )
    labelled = Pictures({"data": find_classes(tmp_path).pictures}, Transform("none"), **how)
    seen = set()
    for sampler in (
        Sampler(pictures, [Paired(("x", "y"))], seed=0, batch=40),
        Sampler(labelled, [Labelled(balanced=True)], seed=0, batch=40),
    ):
        drawn = sampler.batch_at(0, 0, sampler.order(0))
        shades = drawn["x"][:, 0, 0, 0].add(1).mul(127.5).round().int()
        if "y" in drawn:
            partners = drawn["y"][:, 0, 0, 0].add(1).mul(127.5).round().int()
            assert torch.equal(shades + 100, partners)
            assert set(shades.tolist()) == set(range(10)) - {0, 3, 7}
        else:
            assert drawn["c"].bincount().tolist() == [20, 20]
            assert torch.equal(drawn["c"], (shades >= 100).long())
            seen = set(shades.tolist())
    assert seen.isdisjoint({100, 103, 107}) and {0, 3, 7} <= seen


def test_a_large_set_of_which_one_picture_is_good_is_an_error(tmp_path: Path):
    make_domains(tmp_path, 4, 4)
    for n in range(3):
        (tmp_path / "trainB" / f"{n}.png").write_bytes(b"nothing")
    domains = find_domains((tmp_path / "trainA", tmp_path / "trainB"))
    pictures = Pictures(
        {"X": domains.a, "Y": domains.b}, SMALL, cache_bytes=0, threads=1, on_bad_image="skip",
        looked_at=0,
    )  # fmt: skip
    sampler = Sampler(pictures, [Unpaired()], seed=0, batch=64)
    with pytest.raises(modelsoup.TrainerError, match="of the 4 images of Y, 1 can be used"):
        sampler.batch_at(0, 0, sampler.order(0))


def large(root: Path, count: int, bad: int = 0) -> Path:
    """Two domains of hard links, so many pictures each, of which some of X are damaged."""
    make_domains(root, 2, 2)
    (root / "damaged").write_bytes(b"nothing")
    for n in range(2, count):
        for kind in "AB":
            source = (
                root / "damaged" if kind == "A" and n < 2 + bad else root / f"train{kind}/1.png"
            )
            os.link(source, root / f"train{kind}" / f"{n}.png")
    return root


def options(root: Path, **more) -> CycleGANOptions:
    tiny = {"width": 2, "blocks": 1, "d_width": 2, "d_layers": 1, "device": "cpu", "pool_size": 0}
    sizes = {"load_size": 16, "crop_size": 16, "epochs": 1, "batch": 256, "sheet_every": 0}
    return CycleGANOptions(data=root, **tiny, **sizes, **more)


def test_a_damaged_picture_of_a_large_set_stops_the_training_or_is_named_in_its_log(tmp_path: Path):
    root = large(tmp_path / "set", LOOKED_AT // 2 + 1, bad=2)
    said: list[str] = []
    session = CycleGAN().session(options(root), None, seed=0)
    with pytest.raises(ImageError, match=r"trainA/\d\.png is not a .*on_bad_image: skip leaves"):
        session.run(lambda *_: None, said.append)
    session = CycleGAN().session(options(root, on_bad_image="skip"), None, seed=0)
    assert session.told()["left out"] == []
    session.run(lambda *_: None, said.append)
    named = [line for line in said if line.startswith("left out: ")]
    assert len(named) == 2 and "2.png" in "".join(named) and "3.png" in "".join(named)
    assert len(session.told()["left out"]) == 2
    assert session.constant() is not None  # the first eight pictures are looked at, without these


def test_a_hundred_thousand_pictures_are_opened_within_seconds_and_none_is_decoded(tmp_path: Path):
    """All but two of X are damaged: whatever decoded them would fail."""
    root = large(tmp_path / "set", 50_000, bad=49_998)
    begun = time.perf_counter()
    session = CycleGAN().session(options(root), None, seed=0)
    pictures = session.pictures
    taken = time.perf_counter() - begun
    assert sum(map(len, pictures.sets.values())) == 100_000
    assert not pictures.bad and pictures.cached_bytes == 0
    assert taken < 60  # it is 2 s on an idle machine


def test_the_cache_keeps_what_fits_and_no_more(tmp_path: Path):
    make_domains(tmp_path, 8, 2)
    domains = find_domains((tmp_path / "trainA", tmp_path / "trainB"))
    one = 18 * 18 * 3
    for looked_at in (0, 100):
        pictures = Pictures(
            {"X": domains.a, "Y": domains.b}, SMALL, cache_bytes=3 * one + 5, threads=4,
            on_bad_image="error", looked_at=looked_at,
        )  # fmt: skip
        sampler = Sampler(pictures, [Unpaired()], seed=0)
        for _ in batches(sampler, ((epoch, n) for epoch in range(2) for n in range(8)), 3):
            assert pictures.cached_bytes <= 3 * one
        assert pictures.cached_bytes == 3 * one
        with pytest.raises(ImageError, match="there is no image"):
            pictures[tmp_path / "nothing.png"]
