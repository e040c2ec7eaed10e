"""DiffAugment, by its arithmetic."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from i2i_domains import make_classes, make_domains
from i2i_states import flat, silent
from modelsoup_i2i.pictures.augmentation import NUMBERS, POLICY, adapted, augmented
from modelsoup_i2i.pictures.cache import Pictures
from modelsoup_i2i.pictures.draws import Augmentation, Sampler, Unpaired, batches
from modelsoup_i2i.pictures.folders import find_domains
from modelsoup_i2i.pictures.transforms import Transform
from modelsoup_i2i.trainers.gan import Gan, GanOptions
from modelsoup_i2i.training.options import Augmented, UnpairedOptions
from modelsoup_i2i.training.step import DivergedError

import modelsoup

torch.set_num_threads(1)


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
    with pytest.raises(modelsoup.ParameterError, match=r"numbers are \[2, 10\], where \[3, 10\]"):
        augmented(images(), ["color"], drawn(0, count=2))


# ADA.


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_each_change_of_each_picture_is_made_with_the_probability(share: float):
    count, probability = 4000, torch.tensor(share)
    own, told = images(count, 1, 2, 2), drawn(1, count)
    made = {name: augmented(own, [name], told, probability) for name in POLICY}
    whole = {name: augmented(own, [name], told) for name in POLICY}
    by = {}
    for name, values in made.items():
        by[name] = (values == whole[name]).flatten(1).all(1)
        assert torch.equal(values[~by[name]], own[~by[name]])  # all or nothing
    assert by["color"].float().mean() == pytest.approx(share, abs=0.03)
    if share == 0.3:  # whether one is made says nothing of another one
        for other in ("translation", "cutout"):
            changed = (made[other] != own).flatten(1).any(1)
            alone = changed[~by["color"]].float().mean()
            assert changed[by["color"]].float().mean() == pytest.approx(float(alone), abs=0.05)


def test_numbers_are_those_of_before_there_were_coins():
    first, more = (np.random.default_rng((1, 2)).random(n, np.float32) for n in (7, NUMBERS))
    assert np.array_equal(more[:7], first)


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ((0.5, 7.0, 10.0), 0.6),  # r_t 0.7: D knows too many by heart
        ((0.5, 5.0, 10.0), 0.4),
        ((0.5, 6.0, 10.0), 0.5),
        ((0.5, 0.0, 0.0), 0.5),  # nothing was said
        ((0.95, 10.0, 10.0), 1.0),
        ((0.05, -10.0, 10.0), 0.0),
    ],
)
def test_the_probability_moves_towards_a_share_of_signs_and_begins_to_count_anew(
    state: tuple[float, ...], wanted: float
):
    found = adapted(torch.tensor(state, dtype=torch.float64), 0.6, 0.1)
    assert found.tolist() == pytest.approx([wanted, 0, 0])


ADA = {
    "size": "32s", "ch": 8, "chunk": 4, "shared": 8, "attention": 0, "batch": 2, "steps": 4,
    "sheet_every": 0, "augment": ["color", "translation"], "ada": 0.6, "ada_every": 2,
    "ada_images": 8, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("classes"), {"a": 4, "b": 4})


def gan(data: Path, work: Path | None = None, **options):
    return Gan().session(GanOptions(data=data, **(ADA | options)), None, seed=1, work=work)


def told_by(own, sign: int) -> list[float]:
    """The probability after each step, where D's verdicts on whatever it sees have a sign."""
    own.begin()
    found = []
    for group in own.batches():
        with torch.no_grad():
            own.networks["D"].linear.bias.fill_(1e4 * sign)
        found.append(own.optimise(group)["augment_p"])
    return found


def test_the_probability_of_a_training_follows_what_the_discriminator_says(classes: Path):
    # In two steps of two pictures of eight it moves by a half.
    assert told_by(gan(classes), 1) == [0, 0.5, 0.5, 1]
    assert told_by(gan(classes), -1) == [0] * 4
    assert told_by(gan(classes, accumulate=2, ada_images=32), 1)[1] == 0.25


def test_ada_goes_on_with_the_same_bits(classes: Path, tmp_path: Path):
    whole = gan(classes)
    whole.run(silent, silent)
    early = gan(classes, tmp_path)
    steps = early.batches()
    for _ in range(3):  # between two moves
        early.optimise(next(steps))
    early.keep()
    later = gan(classes, tmp_path)
    later.run(silent, silent)
    assert torch.equal(later.adaptive, whole.adaptive)
    assert all(torch.equal(value, flat(whole)[name]) for name, value in flat(later).items())


def test_a_step_that_is_not_finite_moves_no_probability(classes: Path):
    own = gan(classes)
    steps = own.batches()
    own.optimise(next(steps))
    before = own.adaptive.clone()
    assert before[2] == 2
    broken = [{n: v * torch.nan if n == "y" else v for n, v in b.items()} for b in next(steps)]
    with pytest.raises(DivergedError):
        own.optimise(broken)
    assert torch.equal(own.adaptive, before)


def test_ada_at_no_probability_is_a_training_without_augmentations(classes: Path):
    without, never = gan(classes, augment=[], ada=None), gan(classes, ada_images=10**9)
    for own in (without, never):
        own.run(silent, silent)
    assert all(torch.equal(value, flat(without)[name]) for name, value in flat(never).items())


def test_ada_is_an_option_that_changes_no_key_where_it_is_off(tmp_path: Path):
    plain = Options(data=tmp_path, augment=["color"])
    assert not {"ada", "ada_every", "ada_images"} & set(plain.decisive())
    assert Options(data=tmp_path, augment=["color"], ada=0.6).decisive()["ada_every"] == 4
    with pytest.raises(ValueError, match=r"ada says how often .*, but augment names none"):
        Options(data=tmp_path, ada=0.6)
    with pytest.raises(ValueError, match="say nothing with gan wgan-gp: hinge or softplus"):
        GanOptions(data=tmp_path, **(ADA | {"gan": "wgan-gp"}))
    with pytest.raises(ValueError, match="ada is 1"):
        Options(data=tmp_path, augment=["color"], ada=1)
