"""Features of real pictures are kept, and a cache that cannot be trusted is told and not used."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from modelsoup_i2i.measuring.extractors import Extractor
from modelsoup_i2i.measuring.kept import Kept
from modelsoup_i2i.measuring.metrics import features
from torch import nn


class Counting:
    """An extractor that knows how often it was used."""

    def __init__(self, **more) -> None:
        self.seen = 0
        given = {"name": "means", "sha256": "1" * 64, "dimension": 3, "resize": "none"} | more
        self.extractor = Extractor(
            versions={"torch": "2"}, network=nn.Identity(), features=self.of, **given
        )

    def of(self, pictures: torch.Tensor) -> torch.Tensor:
        self.seen += len(pictures)
        return pictures.float().mean(dim=(2, 3))


PICTURES = list(np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3)).astype(np.uint8))


def test_features_are_computed_once_for_the_same_pictures(tmp_path: Path):
    said: list[str] = []
    kept, through = Kept(tmp_path / "new" / "folder", said.append), Counting()
    first = features(PICTURES, through.extractor, kept=kept)
    again = features(PICTURES, through.extractor, kept=kept)
    assert through.seen == 5 and not said
    assert np.array_equal(first, again) and first.dtype == again.dtype == np.float32
    assert np.array_equal(first, features(PICTURES, through.extractor))
    assert [file.suffix for file in kept.folder.iterdir()] == [".npy"]


def test_whatever_decides_features_names_them(tmp_path: Path):
    kept, used = Kept(tmp_path, pytest.fail), Counting()
    features(PICTURES, used.extractor, kept=kept)
    for other in ({"sha256": "2" * 64}, {"name": "other"}, {"resize": "8 × 8"}):
        through = Counting(**other)
        features(PICTURES, through.extractor, kept=kept)
        assert through.seen == 5
    changed = [*PICTURES[:4], PICTURES[4] ^ 1]
    turned = [PICTURES[1], PICTURES[0], *PICTURES[2:]]
    for pictures in (changed, turned, PICTURES[:4]):
        before = used.seen
        features(pictures, used.extractor, kept=kept)
        assert used.seen == before + len(pictures)
    before = used.seen
    features(PICTURES, used.extractor, kept=kept, like=np.zeros((4, 4, 3), np.uint8))
    assert used.seen == before + 5  # they are seen at another size


@pytest.mark.parametrize("damage", ["cut", "changed", "text"])
def test_damaged_features_are_told_and_computed_again(tmp_path: Path, damage: str):
    said: list[str] = []
    kept, through = Kept(tmp_path, said.append), Counting()
    wanted = features(PICTURES, through.extractor, kept=kept)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-3], "changed": whole[:-1] + b"\xff", "text": b"none"}[damage])
    assert np.array_equal(features(PICTURES, through.extractor, kept=kept), wanted)
    assert through.seen == 10
    assert said == [f"features are computed again, since {file} is damaged"]
    assert file.read_bytes() == whole  # and are as they were


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    said: list[str] = []
    (tmp_path / "file").touch()
    through = Counting()
    found = features(
        PICTURES, through.extractor, kept=Kept(tmp_path / "file" / "inner", said.append)
    )
    assert found.shape == (5, 3) and through.seen == 5
    assert any(line.startswith("features are not kept in") for line in said)


def test_those_that_were_not_used_for_longest_make_room(tmp_path: Path):
    through = Counting()
    kept = Kept(tmp_path, pytest.fail)
    sets = [[one + n for one in PICTURES] for n in range(4)]
    files = []
    for n, own in enumerate(sets[:3]):
        features(own, through.extractor, kept=kept)
        (new,) = {*tmp_path.iterdir()} - {*files}
        files.append(new)
        os.utime(new, (n, n))
    features(sets[0], through.extractor, kept=kept)  # used again
    size = files[0].stat().st_size
    features(sets[3], through.extractor, kept=Kept(tmp_path, pytest.fail, most=2 * size))
    left = {*tmp_path.iterdir()}
    assert len(left) == 2 and files[0] in left and not {*files[1:]} & left
