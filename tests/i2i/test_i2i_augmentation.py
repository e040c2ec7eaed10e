"""DiffAugment, by its arithmetic."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from i2i_domains import make_domains
from modelsoup_i2i.pictures.augmentation import NUMBERS, POLICY, augmented
from modelsoup_i2i.pictures.cache import Pictures
from modelsoup_i2i.pictures.draws import Augmentation, Sampler, Unpaired, batches
from modelsoup_i2i.pictures.folders import find_domains
from modelsoup_i2i.pictures.transforms import Transform
from modelsoup_i2i.training.options import Augmented, UnpairedOptions

import modelsoup


def images(count: int = 3, channels: int = 3, height: int = 8, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, height, width, generator=generator) * 2 - 1


def numbers(*of_each: float, count: int = 3) -> torch.Tensor:
    """The same numbers for each picture; those that are not told are in the middle."""
    told = [*of_each, *[0.5] * (NUMBERS - len(of_each))]
    return torch.tensor([told] * count)


def drawn(seed: int, count: int = 3) -> torch.Tensor:
    return torch.rand(count, NUMBERS, generator=torch.Generator().manual_seed(seed))


def test_without_a_policy_images_are_what_they_were():
    own = images()
    assert augmented(own, [], drawn(0)) is own


def test_the_middle_of_color_and_translation_changes_nothing():
    own = images()
    assert torch.allclose(augmented(own, ["color"], numbers()), own, atol=1e-6)
    assert torch.equal(augmented(own, ["translation"], numbers()), own)


def test_color_changes_brightness_saturation_and_contrast_as_the_paper_says():
    own = images()
    brighter = augmented(own, ["color"], numbers(0.75))
    assert torch.allclose(brighter, own + 0.25, atol=1e-6)
    grey = augmented(own, ["color"], numbers(0.5, 0.0))
    assert torch.allclose(grey, own.mean(1, keepdim=True).expand_as(own), atol=1e-6)
    vivid = augmented(own, ["color"], numbers(0.5, 0.75))
    mean = own.mean(1, keepdim=True)
    assert torch.allclose(vivid, mean + 1.5 * (own - mean), atol=1e-6)
    flat = augmented(own, ["color"], numbers(0.5, 0.5, 0.0))
    mean = own.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(flat, mean + 0.5 * (own - mean), atol=1e-6)


def test_translation_moves_up_to_an_eighth_of_each_side_and_brings_in_grey():
    own = images()
    moved = augmented(own, ["translation"], numbers(0, 0, 0, 0.999, 0.0))
    assert torch.equal(moved[:, :, 1:, :-2], own[:, :, :-1, 2:])  # down by 1 of 8, left by 2 of 16
    assert not moved[:, :, 0].any() and not moved[:, :, :, -2:].any()
    almost_one = float(np.nextafter(np.float32(1), np.float32(0)))
    assert torch.equal(augmented(own, ["translation"], numbers(0, 0, 0, almost_one, 0.0)), moved)


def test_cutout_makes_a_window_of_half_of_each_side_grey():
    own = images()
    cut = augmented(own, ["cutout"], numbers())
    assert not cut[:, :, 2:6, 4:12].any()
    rest = torch.ones(8, 16, dtype=torch.bool)
    rest[2:6, 4:12] = False
    assert torch.equal(cut[:, :, rest], own[:, :, rest])
    corner = augmented(own, ["cutout"], numbers(0, 0, 0, 0, 0, 0.0, 0.0))  # it reaches out
    assert not corner[:, :, :2, :4].any() and corner[:, :, 2:].ne(0).all()


@pytest.mark.parametrize("name", POLICY)
def test_each_picture_is_changed_by_its_own_numbers(name: str):
    own = images()
    together = augmented(own, [name], drawn(5))
    alone = [augmented(own[n : n + 1], [name], drawn(5)[n : n + 1]) for n in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert torch.equal(together, augmented(own, [name], drawn(5)))
    assert not torch.equal(together, augmented(own, [name], drawn(6)))


@given(st.permutations(list(POLICY)), st.integers(0, 1000), st.sampled_from([1, 3, 4]))
@settings(max_examples=20, deadline=None)
def test_policies_are_applied_in_their_order_and_gradients_are_right(
    policy: list[str], seed: int, channels: int
):
    own = images(2, channels, 5, 6).double().requires_grad_()
    chosen = drawn(seed, count=2)
    one_by_one = own
    for name in policy:
        one_by_one = augmented(one_by_one, [name], chosen)
    assert torch.equal(augmented(own, policy, chosen), one_by_one)
    assert torch.autograd.gradcheck(lambda seen: augmented(seen, policy, chosen), own)


def test_images_in_bf16_stay_so():
    assert augmented(images().bfloat16(), list(POLICY), drawn(1)).dtype == torch.bfloat16


def test_what_is_real_and_what_is_made_have_numbers_of_their_own(tmp_path: Path):
    """They depend on the place alone: not on workers, order, or the other draws."""
    root = make_domains(tmp_path, 4, 4)
    domains = find_domains((root / "trainA", root / "trainB"))
    pictures = Pictures(
        {"X": domains.a, "Y": domains.b}, Transform(load=(18, 18), crop=(16, 16)),
        cache_bytes=1 << 20, threads=1, on_bad_image="error",
    )  # fmt: skip
    sampler = Sampler(pictures, [Unpaired(), Augmentation(("real", "fake"))], seed=1, batch=64)
    first = sampler.batch_at(0, 0, sampler.order(0))
    for name in ("real", "fake"):
        assert first[name].shape == (64, NUMBERS) and first[name].dtype == torch.float32
        assert 0 <= first[name].min() < 0.02 and 0.98 < first[name].max() < 1
    assert (first["real"] != first["fake"]).all()
    swapped = Sampler(pictures, [Augmentation(("fake", "real"))], seed=1, batch=64)
    (again,) = batches(swapped, iter([(0, 0)]), 2)
    assert all(torch.equal(again[name], first[name]) for name in again)
    other = sampler.batch_at(1, 0, sampler.order(1))
    assert (other["real"] != first["real"]).all()


@dataclass(frozen=True)
class Options(Augmented, UnpairedOptions):
    pass


def test_augmentations_are_an_option_that_is_off_by_default(tmp_path: Path):
    assert Options(data=tmp_path).augment == []
    assert Options(data=tmp_path, augment=["cutout"]).decisive()["augment"] == ["cutout"]
    with pytest.raises(ValueError, match="augment: there is no augmentation 'colour'; did you mea"):
        Options(data=tmp_path, augment=["colour"])
    with pytest.raises(ValueError, match="augment: the augmentation 'color' is named twice"):
        Options(data=tmp_path, augment=["color", "cutout", "color"])
    with pytest.raises(modelsoup.ParameterError, match=r"numbers are \[2, 7\], where \[3, 7\]"):
        augmented(images(), ["color"], drawn(0, count=2))
