"""Views of pictures: what SimCLR changes of one at random, twice, to learn what stays.

Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations", ICML 2020; `shuffle` is BalaGAN's (Patashnik et al. 2021). All of it is arithmetic
on tensors, by numbers that the host drew: nothing waits for a device, and what is drawn again is
the same again. A picture is resized and blurred by two small matrices of its own, one for its rows
and one for its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from modelsoup import ParameterError

from .augmentation import must_be_known

if TYPE_CHECKING:
    import torch

JITTER = (0.8, 0.8, 0.8, 0.2)
"""How far brightness, contrast, saturation and hue go; the last in turns of the colour circle."""
TILES = 8  # of a side, that are shuffled
_TRIES = 10  # crops, of which the first one that fits is taken
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_SHUFFLED, _COLOURED, _GREY, _BLURRED = 0.6, 0.8, 0.2, 0.5  # of the pictures
_SIGMA = (0.1, 2.0)
_LUMA = (0.299, 0.587, 0.114)

Numbers = Mapping[str, int]
NUMBERS: Numbers = {
    "crop": 2 * _TRIES + 2, "flip": 1, "shuffle": 1 + TILES**2, "color": 9, "gray": 1, "blur": 2,
}  # fmt: skip
"""The augmentations in their order, and how many numbers in [0, 1) each wants for a picture."""


def view(
    images: torch.Tensor, names: Sequence[str], numbers: torch.Tensor,
    jitter: Sequence[float] = JITTER,
) -> torch.Tensor:  # fmt: skip
    """Images as they are seen once: after some augmentations, always in the order of `NUMBERS`.

    Args:
        images: N × channels × height × width, in [−1, 1], as what comes back.
        names: of `NUMBERS`; without any, the images themselves come back.
        numbers: N × the sum of all `NUMBERS`, in [0, 1), as `draws.Views` draws them. What
            one augmentation does depends on its own ones alone.
        jitter: how far `color` goes: brightness, contrast, saturation, hue.

    Raises:
        ParameterError: there is no such augmentation, or there are not so many numbers.
    """
    import torch

    must_be_known(names, NUMBERS)
    wanted = [len(images), sum(NUMBERS.values())]
    if list(numbers.shape) != wanted:
        raise ParameterError(f"numbers are {list(numbers.shape)}, where {wanted} are expected")
    if not names:
        return images
    own = dict(zip(NUMBERS, numbers.to(images).split(list(NUMBERS.values()), 1), strict=True))
    with torch.autocast(images.device.type, enabled=False):
        seen = (images.float() + 1) / 2
        for name, change in _CHANGES.items():
            if name in names:
                seen = change(seen, own[name])
            if name == "shuffle" and "color" in names:
                seen = _colour(seen, own["color"], jitter)
        return (seen * 2 - 1).to(images.dtype)


def _crop(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A part of 8 % to all of the area, of sides 3 : 4 to 4 : 3, resized to the whole."""
    top, left, high, wide = crop_boxes(numbers, *images.shape[2:])
    rows = _resizing(top, high, images.shape[2])
    return _through(images, rows, _resizing(left, wide, images.shape[3]))


def crop_boxes(
    numbers: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top, left, height and width of the part that each picture's numbers mean, in pixels.

    Ten times an area and a ratio are drawn; the first that fit are taken, or else the whole.
    """
    import torch

    area, ratio = numbers[:, :_TRIES], numbers[:, _TRIES : 2 * _TRIES]
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * (height * width)
    ends = [math.log(end) for end in _RATIO]
    ratio = (ends[0] + (ends[1] - ends[0]) * ratio).exp()
    high, wide = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (high <= height) & (wide <= width) & (high >= 1) & (wide >= 1)
    first = fits.int().argmax(dim=1, keepdim=True)  # the first, where several are alike
    some = fits.any(dim=1)
    high = torch.where(some, high.gather(1, first)[:, 0], float(height))
    wide = torch.where(some, wide.gather(1, first)[:, 0], float(width))
    top = (numbers[:, -2] * (height - high + 1)).floor().minimum(height - high)
    left = (numbers[:, -1] * (width - wide + 1)).floor().minimum(width - wide)
    return top, left, high, wide


def _flip(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Half of them, mirrored."""
    import torch

    return torch.where((numbers < 0.5)[:, :, None, None], images.flip(3), images)


def _shuffle(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Six tenths of them, cut into 8 × 8 tiles, which change their places."""
    import torch

    count, channels, height, width = images.shape
    if height % TILES or width % TILES:
        raise ParameterError(
            f"shuffle cuts pictures into {TILES} × {TILES} tiles, but they are {height} × {width}"
        )
    high, wide = height // TILES, width // TILES
    tiles = images.reshape(count, channels, TILES, high, TILES, wide).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(count, TILES**2, channels * high * wide)
    order = numbers[:, 1:].argsort(dim=1)
    stays = torch.arange(TILES**2, device=images.device)
    order = torch.where(numbers[:, :1] < _SHUFFLED, order, stays)
    moved = tiles.gather(1, order[:, :, None].expand_as(tiles))
    moved = moved.view(count, TILES, TILES, channels, high, wide).permute(0, 3, 1, 4, 2, 5)
    return moved.reshape(images.shape)


def _colour(images: torch.Tensor, numbers: torch.Tensor, jitter: Sequence[float]) -> torch.Tensor:
    """Eight tenths of them in other brightness, contrast, saturation and hue, in any order.

    Hue, which costs most, is turned once: before it, all do what comes before it in their own
    order, and after it the rest.
    """
    import torch

    drawn, keys = 2 * numbers[:, 1:5] - 1, numbers[:, 5:]
    chosen, hue = numbers[:, :1] < _COLOURED, keys[:, 3:]
    strengths = torch.stack([1 + drawn[:, n] * jitter[n] for n in range(3)], 1)
    plain = [n for n in range(3) if jitter[n]]
    # The ones that there are come first, in the order of their keys.
    sorted_keys = torch.stack([keys[:, n] + 2 * (n not in plain) for n in range(3)], 1)
    order = sorted_keys.argsort(dim=1)[:, : len(plain)]
    strengths, keys = strengths.gather(1, order), keys.gather(1, order)
    if not jitter[3]:
        return _mixed(images, order, torch.where(chosen, strengths, 1.0))
    images = _mixed(images, order, torch.where(chosen & (keys < hue), strengths, 1.0))
    images = _turned(images, drawn[:, 3] * jitter[3] * chosen[:, 0])
    return _mixed(images, order, torch.where(chosen & (keys > hue), strengths, 1.0))


def _mixed(images: torch.Tensor, order: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation of each picture, in its own order.

    A picture x becomes s · x + (1 − s) · o, where o is black, the mean of its grey, or its grey.

    Args:
        images: N × channels × height × width in [0, 1].
        order: N × those that there are: 0, 1 and 2 for the three.
        strengths: s of each, in that order; 1 changes nothing.
    """
    for which, strength in zip(order.unbind(1), strengths.unbind(1), strict=True):
        grey, rest = _grey(images), 1 - strength
        mean = grey.mean((1, 2, 3)) * rest * (which == 1)
        of_pixel = grey * _of(rest * (which == 2)) + _of(mean)
        images = (images * _of(strength) + of_pixel).clamp_(0, 1)
    return images


def _turned(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """With other hues, in HSV: of each pixel the largest and the smallest channel stay as large."""
    import torch

    red, green, blue = images.unbind(1)
    most, least = images.amax(1), images.amin(1)
    span = most - least
    safe = span.clamp(min=1e-12)
    hue = torch.where(
        most == red, (green - blue) / safe,
        torch.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # fmt: skip
    hue = hue + 6 * turns[:, None, None]
    offsets = 5 - 2 * torch.arange(3, device=images.device)[:, None, None]
    place = (offsets + hue[:, None]).remainder(6)
    share = torch.minimum(place, 4 - place).clamp_(0, 1)
    turned = most[:, None] - span[:, None] * share
    return torch.where(_of(turns) == 0, images, turned)


def _gray(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A fifth of them, without colour."""
    import torch

    return torch.where((numbers < _GREY)[:, :, None, None], _grey(images), images)


def kernel(side: int) -> int:
    """The pixels of a blur's side, odd: 11 of 128, a tenth."""
    return max(int(0.1 * side - 1) | 1, 3)


def _blur(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Half of them, by a normal distribution of 0.1 to 2 pixels; beyond the border is a mirror."""
    sigma = _SIGMA[0] + (_SIGMA[1] - _SIGMA[0]) * numbers[:, 1]
    rows, columns = (_blurring(sigma, numbers[:, 0] < _BLURRED, side) for side in images.shape[2:])
    return _through(images, rows, columns)


_CHANGES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "crop": _crop, "flip": _flip, "shuffle": _shuffle, "gray": _gray, "blur": _blur,
}  # fmt: skip


def _grey(images: torch.Tensor) -> torch.Tensor:
    """N × 1 × height × width: as luma has it; pictures of one channel are so."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (images[:, n : n + 1] * own for n, own in enumerate(_LUMA))
    return red + green + blue


def _of(numbers: torch.Tensor) -> torch.Tensor:
    """One for each picture."""
    return numbers[:, None, None, None]


def _through(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """R · x · Cᵀ for each channel x of each picture.

    Args:
        images: N × channels × height × width.
        rows: N × height × height.
        columns: N × width × width.
    """
    count, channels, height, width = images.shape
    wide = images.reshape(count, channels * height, width) @ columns.transpose(1, 2)
    turned = wide.view(count, channels, height, width).transpose(2, 3)
    high = turned.reshape(count, channels * width, height) @ rows.transpose(1, 2)
    return high.view(count, channels, width, height).transpose(2, 3).contiguous()


def _resizing(first: torch.Tensor, length: torch.Tensor, side: int) -> torch.Tensor:
    """What stretches `length` pixels from `first` on to a side, bilinear: N × side × side."""
    import torch

    pixels = torch.arange(side, device=first.device)
    wanted = (pixels + 0.5) * (length / side)[:, None] - 0.5
    wanted = wanted.clamp(min=0).minimum(length[:, None] - 1) + first[:, None]
    return (1 - (wanted[:, :, None] - pixels).abs()).clamp_(min=0)


def _blurring(sigma: torch.Tensor, chosen: torch.Tensor, side: int) -> torch.Tensor:
    """What blurs along a side: N × side × side; the identity where it is not chosen."""
    import torch

    reach = kernel(side) // 2
    apart = torch.arange(-reach, reach + 1, device=sigma.device)
    weights = (-0.5 * (apart / sigma[:, None]).square()).exp()
    weights = weights / weights.sum(1, keepdim=True)
    weights = torch.where(chosen[:, None], weights, (apart == 0).to(weights))
    weights = torch.nn.functional.pad(weights, (0, 1))  # beyond its reach: 0
    pixels = torch.arange(side, device=sigma.device)
    into, of = pixels[:, None], pixels
    made = weights[:, _place(of - into, reach)]
    # A pixel is also read where the mirror at either border shows it, but not the border itself.
    for mirrored, border in ((-of, 0), (2 * (side - 1) - of, side - 1)):
        own = weights[:, _place(mirrored - into, reach)]
        made = made + own * (of != border)
    return made


def _place(apart: torch.Tensor, reach: int) -> torch.Tensor:
    """Where the weight of a distance stands; the last place is for those out of reach."""
    return apart.add(reach).masked_fill(apart.abs() > reach, 2 * reach + 1)
