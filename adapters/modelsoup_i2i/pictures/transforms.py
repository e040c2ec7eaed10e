"""How a picture of any size becomes what a network is trained or measured on; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from modelsoup import ParameterError

from .images import ImageError, resized

Mode = Literal[
    "resize_and_crop", "crop", "centre_crop", "scale_width", "scale_width_and_crop",
    "shorter_side_and_crop", "none",
]  # fmt: skip
ZOOM = 140 / 128  # of FUNIT and BalaGAN: how much longer a shorter side is than what is cropped
SIDES = 4  # `none` rounds sides to multiples of it


@dataclass(frozen=True)
class Transform:
    """From a picture of any size to what a network is trained on.

    Attributes:
        mode: `resize_and_crop`: to the load size, whatever the ratio of sides, then a random crop;
            `crop`: only that; `centre_crop`: the largest part of its middle that has the crop's
            ratio of sides, resized to it; `scale_width`: to the load size's width, the ratio kept;
            `scale_width_and_crop`; `shorter_side_and_crop`: to the load size's shorter side, the
            ratio kept, then a random crop; `none`: sides rounded to multiples of four.
        load: height and width.
        crop: height and width.
        flip: mirror left and right with probability ½.
        parts: of `centre_crop`, the probability that a random part of the middle is shown in its
            place: 0.8 to 1 of its area, with 0.9 to 1.1 times its ratio of sides.
    """

    mode: Mode = "resize_and_crop"
    load: tuple[int, int] = (286, 286)
    crop: tuple[int, int] = (256, 256)
    flip: bool = True
    parts: float = 0.0

    def __post_init__(self) -> None:
        for name, size in (("load_size", self.load), ("crop_size", self.crop)):
            if min(size) < 1:
                raise ParameterError(f"{name} is {list(size)}, but must be at least 1")
        smaller = self.load[0] < self.crop[0] or self.load[1] < self.crop[1]
        if self.mode in ("resize_and_crop", "shorter_side_and_crop") and smaller:
            raise ParameterError(
                f"load_size {list(self.load)} is smaller than crop_size {list(self.crop)}, so that "
                f"nothing can be cropped out of it"
            )
        if self.mode == "scale_width_and_crop" and self.load[1] < self.crop[1]:
            raise ParameterError(
                f"load_size is {self.load[1]} wide, but must be at least as wide as crop_size, "
                f"{self.crop[1]}"
            )

    @property
    def crops(self) -> bool:
        """Whether all results have one size."""
        return self.mode.endswith("crop")

    def prepare(self, image: np.ndarray, name: object) -> np.ndarray:
        """What is the same each time: the resized picture, uint8.

        Raises:
            ImageError: it is smaller than the crop.
        """
        height, width = image.shape[:2]
        if self.mode == "centre_crop":
            middle = _middle(image, self.crop)
            if not self.parts:
                return resized(middle, self.crop)
            # A part is cut out of more pixels than are shown, where there are more.
            most = (2 * self.crop[0], 2 * self.crop[1])
            return middle if middle.shape[0] <= most[0] else resized(middle, most)
        if self.mode == "resize_and_crop":
            wanted = self.load
        elif self.mode == "shorter_side_and_crop":
            share = min(self.load) / min(height, width)
            wanted = (round(height * share), round(width * share))
        elif self.mode in ("scale_width", "scale_width_and_crop"):
            wanted = (max(round(self.load[1] * height / width), 1), self.load[1])
            if self.mode == "scale_width_and_crop":
                wanted = (max(wanted[0], self.crop[0]), wanted[1])
        elif self.mode == "none":
            wanted = (_rounded(height), _rounded(width))
        else:
            wanted = (height, width)
        if self.crops and (wanted[0] < self.crop[0] or wanted[1] < self.crop[1]):
            raise ImageError(
                f"{name} is {height} × {width}, smaller than the crop of {self.crop[0]} × "
                f"{self.crop[1]} (height × width)"
            )
        return resized(image, wanted)

    def draw(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What is drawn each time: the crop, and whether it is mirrored."""
        if self.parts:
            part = _part(image, rng) if rng.random() < self.parts else image
            image = resized(part, self.crop)
        elif self.crops:
            top = int(rng.integers(image.shape[0] - self.crop[0] + 1))
            left = int(rng.integers(image.shape[1] - self.crop[1] + 1))
            image = image[top : top + self.crop[0], left : left + self.crop[1]]
        if self.flip and rng.integers(2):
            image = image[:, ::-1]
        return image

    def for_test(self, image: np.ndarray) -> np.ndarray:
        """The whole picture at the size of training, nothing drawn: for sheets and measuring."""
        height, width = image.shape[:2]
        if self.mode == "resize_and_crop":
            return resized(image, self.crop)
        if self.mode == "centre_crop":
            return resized(_middle(image, self.crop), self.crop)
        if self.mode == "shorter_side_and_crop":
            whole = self.prepare(image, "")
            top, left = (
                (own - side) // 2 for own, side in zip(whole.shape, self.crop, strict=False)
            )
            return whole[top : top + self.crop[0], left : left + self.crop[1]]
        if self.mode.startswith("scale_width"):
            wide = self.crop[1] if self.crops else self.load[1]
            return resized(image, (max(round(wide * height / width), 1), wide))
        return resized(image, (_rounded(height), _rounded(width)))


def zoomed(side: int, *, flip: bool = False) -> Transform:
    """As FUNIT and BalaGAN see pictures: a crop of almost all of the shorter side."""
    return Transform("shorter_side_and_crop", (round(ZOOM * side),) * 2, (side, side), flip)


def _middle(image: np.ndarray, ratio: tuple[int, int]) -> np.ndarray:
    """The largest part of its middle with such a ratio of height and width."""
    height, width = image.shape[:2]
    high = min(height, max(round(width * ratio[0] / ratio[1]), 1))
    wide = min(width, max(round(height * ratio[1] / ratio[0]), 1))
    top, left = (height - high) // 2, (width - wide) // 2
    return image[top : top + high, left : left + wide]


def _part(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random part of a picture, of 0.8 to 1 of its area."""
    height, width = image.shape[:2]
    share, ratio = rng.uniform(0.8, 1), np.exp(rng.uniform(*np.log([0.9, 1.1])))
    high, wide = (
        min(max(round(side * (share * by) ** 0.5), 1), side)
        for side, by in ((height, 1 / ratio), (width, ratio))
    )
    top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
    return image[top : top + high, left : left + wide]


def _rounded(side: int) -> int:
    return max(round(side / SIDES) * SIDES, SIDES)
