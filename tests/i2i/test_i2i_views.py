"""Views of pictures: each augmentation does what its numbers say, and nothing to other pictures."""

import math

import numpy as np
import pytest
import torch
from modelsoup_i2i.pictures.augmentation import must_be_known
from modelsoup_i2i.pictures.cache import Pictures
from modelsoup_i2i.pictures.draws import Spot, Views
from modelsoup_i2i.pictures.transforms import Transform
from modelsoup_i2i.pictures.views import JITTER, NUMBERS, crop_boxes, kernel, view
from PIL import Image, ImageEnhance

import modelsoup

COUNT = sum(NUMBERS.values())
FIRST = {name: sum(list(NUMBERS.values())[:n]) for n, name in enumerate(NUMBERS)}


def pictures(count: int = 4, side: int = 16, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, side, side, generator=generator) * 2 - 1


def numbers(count: int, **own: list[float]) -> torch.Tensor:
    """A half everywhere, but for what is told of an augmentation."""
    made = torch.full((count, COUNT), 0.5)
    for name, values in own.items():
        made[:, FIRST[name] : FIRST[name] + len(values)] = torch.tensor(values)
    return made


def test_without_augmentations_a_view_is_the_picture():
    own = pictures()
    assert view(own, [], numbers(4)) is own


def test_a_name_that_is_none_is_told_with_the_nearest():
    with pytest.raises(modelsoup.ParameterError, match=r"no augmentation 'grey'.*gray"):
        must_be_known(["crop", "grey"], NUMBERS)
    with pytest.raises(modelsoup.ParameterError, match="'crop' is named twice"):
        must_be_known(["crop", "crop"], NUMBERS)
    with pytest.raises(modelsoup.ParameterError, match=r"numbers are \[4, 3\], where \[4, 10\d\]"):
        view(pictures(), ["crop"], torch.zeros(4, 3))


@pytest.mark.parametrize("name", NUMBERS)
def test_an_augmentation_looks_at_its_own_numbers_and_its_own_picture(name: str):
    own, drawn = pictures(12), torch.rand(12, COUNT, generator=torch.Generator().manual_seed(1))
    made = view(own, [name], drawn)
    assert made.shape == own.shape and not torch.equal(made, own)
    other = torch.rand(12, COUNT)
    place = slice(FIRST[name], FIRST[name] + NUMBERS[name])
    other[:, place] = drawn[:, place]
    assert torch.equal(view(own, [name], other), made)
    alone = torch.cat([view(own[n : n + 1], [name], drawn[n : n + 1]) for n in range(12)])
    assert torch.allclose(alone, made, atol=1e-6)


def test_a_crop_is_what_pillow_resizes_of_the_box_that_was_drawn():
    own, drawn = pictures(8, 32), torch.rand(8, COUNT, generator=torch.Generator().manual_seed(2))
    boxes = torch.stack(crop_boxes(drawn[:, : NUMBERS["crop"]], 32, 32), 1).int().tolist()
    made = view(own, ["crop"], drawn)
    for picture, (top, left, high, wide), seen in zip(own, boxes, made, strict=True):
        box = (left, top, left + wide, top + high)
        for channel, found in zip(picture, seen, strict=True):
            image = Image.fromarray(channel.numpy()).crop(box)
            expected = image.resize((32, 32), Image.Resampling.BILINEAR)
            assert np.allclose(np.asarray(expected), found.numpy(), atol=1e-4)


def test_crops_have_the_areas_and_ratios_that_are_asked_for_and_lie_inside():
    drawn = torch.rand(4000, NUMBERS["crop"], generator=torch.Generator().manual_seed(3))
    top, left, high, wide = crop_boxes(drawn, 128, 128)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + high <= 128).all() and (left + wide <= 128).all()
    area, ratio = high * wide / 128**2, wide / high
    assert 0.07 < area.min() < 0.1 and area.max() > 0.95
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert abs(float(ratio.log().mean())) < 0.01
    assert abs(float((left + wide / 2).mean()) - 64) < 1  # anywhere alike


def test_where_no_crop_fits_the_whole_picture_is_taken():
    """A wide picture in which a square of its whole area would be too high."""
    drawn = torch.full((1, NUMBERS["crop"]), 0.5)
    drawn[:, :10] = 0.999  # the area of all
    assert [float(own) for own in crop_boxes(drawn, 16, 64)] == [0, 0, 16, 64]
    drawn[:, 3] = 0.0  # the fourth try fits
    top, left, high, wide = (float(own) for own in crop_boxes(drawn, 16, 64))
    assert high == wide == round(math.sqrt(0.08 * 16 * 64))
    assert top == (16 - high + 1) // 2 and left == (64 - wide + 1) // 2


def test_a_number_below_a_half_mirrors():
    own = pictures(2)
    made = view(own, ["flip"], torch.cat([numbers(1, flip=[0.49]), numbers(1, flip=[0.5])]))
    assert torch.allclose(made, torch.stack([own[0].flip(2), own[1]]), atol=1e-6)


def test_shuffled_tiles_are_the_tiles_in_the_order_of_their_numbers():
    own = pictures(1, 32)
    order = np.random.default_rng(0).permutation(64)
    keys = np.empty(64)
    keys[order] = np.arange(64) / 64  # the tile that comes first has the smallest
    made = view(own, ["shuffle"], numbers(1, shuffle=[0.59, *keys.tolist()]))[0]
    for place, tile in enumerate(order):
        (row, column), (y, x) = divmod(place, 8), divmod(int(tile), 8)
        here = made[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        there = own[0, :, y * 4 : y * 4 + 4, x * 4 : x * 4 + 4]
        assert torch.allclose(here, there, atol=1e-6)
    assert torch.allclose(view(own, ["shuffle"], numbers(1, shuffle=[0.6, *keys])), own, atol=1e-6)
    with pytest.raises(modelsoup.ParameterError, match="8 × 8 tiles, but they are 12 × 12"):
        view(pictures(1, 12), ["shuffle"], numbers(1))


def coloured(own: torch.Tensor, strengths: list[float], order: list[int]) -> torch.Tensor:
    """What `color` makes by strengths in [0, 1), 0.5 for none, in an order of the four."""
    keys = [order.index(n) / 4 for n in range(4)]
    return view(own, ["color"], numbers(len(own), color=[0.79, *strengths, *keys]))


def test_brightness_contrast_and_saturation_are_pillows():
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    image, own = Image.fromarray(levels), torch.from_numpy(levels.transpose(2, 0, 1)).float()
    own = (own / 127.5 - 1)[None]
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which, enhance in enumerate(enhancers):
        for drawn in (0.1, 0.4, 0.9):
            strength = [0.5] * 4
            strength[which] = drawn
            made = (coloured(own, strength, [0, 1, 2, 3])[0] + 1) * 127.5
            wanted = np.asarray(enhance(image).enhance(1 + (2 * drawn - 1) * JITTER[which]))
            assert np.abs(made.numpy().transpose(1, 2, 0) - wanted).max() < 2.1


def test_the_hue_is_turned_as_colorsys_turns_it():
    import colorsys

    own = pictures(1, 8)
    drawn = 0.9  # 0.16 of the circle
    made = (coloured(own, [0.5, 0.5, 0.5, drawn], [3, 2, 1, 0])[0] + 1) / 2
    for y in range(8):
        for x in range(8):
            hue, saturation, value = colorsys.rgb_to_hsv(*((own[0, :, y, x] + 1) / 2).tolist())
            turned = colorsys.hsv_to_rgb((hue + 0.8 * JITTER[3]) % 1, saturation, value)
            assert made[:, y, x].tolist() == pytest.approx(turned, abs=1e-5)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]])
def test_the_four_are_done_in_the_order_of_their_numbers(order: list[int]):
    own, strengths = pictures(1), [0.9, 0.2, 0.95, 0.7]
    expected = own
    for which in order:
        alone = [0.5] * 4
        alone[which] = strengths[which]
        expected = coloured(expected, alone, [0, 1, 2, 3])
    assert torch.allclose(coloured(own, strengths, order), expected, atol=1e-5)
    other = coloured(own, strengths, order[::-1])
    assert not torch.allclose(other, expected, atol=1e-2)


def test_jitter_of_0_leaves_its_kind_alone():
    own, drawn = pictures(), torch.rand(4, COUNT, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(view(own, ["color"], drawn, (0, 0, 0, 0)), own, atol=1e-6)
    some = view(own, ["color"], drawn, (0.8, 0.8, 0, 0))
    grey = own.mean(1, keepdim=True).expand_as(own)
    assert torch.allclose(view(grey, ["color"], drawn, (0, 0, 0.8, 0.2)), grey, atol=1e-5)
    assert not torch.allclose(some, own, atol=1e-2)


def test_a_picture_without_colour_has_the_grey_of_luma():
    own = pictures(2)
    made = view(own, ["gray"], torch.cat([numbers(1, gray=[0.19]), numbers(1, gray=[0.2])]))
    luma = (own[0] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    assert torch.allclose(made[0], luma.expand(3, -1, -1), atol=1e-6)
    assert torch.allclose(made[1], own[1], atol=1e-6)


def test_a_blur_is_a_convolution_with_a_mirror_beyond_the_border():
    own, drawn = pictures(2, 128), 0.7
    made = view(own, ["blur"], numbers(2, blur=[0.49, drawn]))
    sigma, reach = 0.1 + 1.9 * drawn, kernel(128) // 2
    assert reach == 5
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    window = (line[:, None] * line / line.sum() ** 2)[None, None].expand(3, 1, -1, -1)
    padded = torch.nn.functional.pad(own, (reach,) * 4, mode="reflect")
    expected = torch.nn.functional.conv2d(padded, window, groups=3)
    assert torch.allclose(made, expected, atol=1e-5)
    assert torch.allclose(view(own, ["blur"], numbers(2, blur=[0.5, drawn])), own, atol=1e-6)


def test_shares_are_those_of_the_paper():
    drawn = torch.rand(4000, COUNT, generator=torch.Generator().manual_seed(7))
    own = pictures(1, 8).expand(4000, -1, -1, -1)
    for name, share in (("flip", 0.5), ("shuffle", 0.6), ("color", 0.8), ("gray", 0.2),
                        ("blur", 0.5)):  # fmt: skip
        changed = (view(own, [name], drawn) - own).abs().amax((1, 2, 3)) > 1e-4
        assert float(changed.float().mean()) == pytest.approx(share, abs=0.03)


def test_the_numbers_of_a_view_depend_on_their_place_alone():
    empty = Pictures({}, Transform(), cache_bytes=0, threads=1, on_bad_image="error")

    def at(index: int, seed: int = 0) -> tuple[np.ndarray, ...]:
        return Views().at(empty, Spot(seed, 0, index, np.arange(9)))

    first, second = at(3)
    assert first.shape == (COUNT,) and first.dtype == np.float32
    assert not np.array_equal(first, second)
    assert np.array_equal(at(3)[0], first) and not np.array_equal(at(4)[0], first)
    assert not np.array_equal(at(3, 1)[0], first)
