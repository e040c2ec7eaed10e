"""pix2pix's generator, with the official names, and what a checkpoint tells of one.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, 6.1.1:
an encoder that halves an image down to one pixel, a decoder that doubles it back, and beside each
layer of the first a skip to the second. Its blocks lie within one another, as their names do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modelsoup import MismatchError

from .described import Network
from .layers import Convolution, Norm, TransposedConvolution, norm
from .patches import widths
from .shapes import must_have, must_match
from .unets import LEAST_DOWNS, MADE_BY

_DEEP = 4  # from this halving on, channels stay as many: there is the dropout


class Block(nn.Module):
    """One halving, what lies within, and the doubling; beside the outermost one, a skip."""

    def __init__(self, layers: list[nn.Module], *, outermost: bool) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)
        self.outermost = outermost

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of as many channels as the block has outside, twice that with the skip."""
        made: torch.Tensor = self.model(images)
        # The first layer made LeakyReLU(images) of these images in place, of which the ReLU that
        # follows the skip makes what it would make of them.
        return made if self.outermost else torch.cat([images, made], 1)


class UnetGenerator(nn.Module):
    """Translates images: N × channels × H × W in [−1, 1], to the same shape and range.

    Heights and widths must be multiples of 2 to the power of `downs`, which is `multiple`;
    `at_any_size` pads others.
    """

    def __init__(
        self, width: int = 64, downs: int = 8, channels: int = 3, norm: Norm = "batch",
        dropout: bool = True,
    ) -> None:  # fmt: skip
        """Build it.

        Args:
            width: channels after the first layer, `ngf`.
            downs: halvings, `num_downs`: 8 for 256 × 256, 7 for 128 × 128; at least 2.
            channels: of the images, both in and out.
            norm: after all convolutions but the first, the innermost and the last one.
            dropout: of ½, in the decoder, between the widest layers but the innermost ones.
        """
        super().__init__()
        self.width, self.downs, self.channels, self.multiple = width, downs, channels, 2**downs
        wide = [channels, *widths(width, downs - 1)]
        block: list[nn.Module] = []
        for level in reversed(range(downs)):
            block = [
                Block(
                    _layers(wide[level], wide[level + 1], block, norm, level,
                            dropout=dropout and _DEEP <= level < downs - 1),
                    outermost=level == 0,
                )
            ]  # fmt: skip
        (self.model,) = block

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The translation."""
        result: torch.Tensor = self.model(images)
        return result


def _layers(
    outer: int, inner: int, within: list[nn.Module], kind: Norm, level: int, *, dropout: bool
) -> list[nn.Module]:
    """What a block has one after the other; `within` is empty in the innermost one."""
    first, biased = level == 0, kind == "instance"
    down = Convolution(outer, inner, 4, stride=2, padding=1, bias=biased)
    up = TransposedConvolution(
        2 * inner if within else inner, outer, 4, stride=2, padding=1, bias=first or biased
    )
    if first:
        return [down, *within, nn.ReLU(True), up, nn.Tanh()]
    return [
        nn.LeakyReLU(0.2, True), down, *([norm(kind, inner)] if within else []), *within,
        nn.ReLU(True), up, norm(kind, outer), *([nn.Dropout(0.5)] if dropout else []),
    ]  # fmt: skip


def is_unet(tensors: Collection[str], prefix: str = "") -> bool:
    """Whether a network has the names of a U-Net."""
    return f"{prefix}model.model.0.weight" in tensors


def unet_in(tensors: Mapping[str, Sequence[int]], prefix: str = "G.") -> dict[str, Any]:
    """What a generator was built with: width, halvings, channels and norm; dropout has no tensors.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the generator's names begin with; may be empty.

    Raises:
        MismatchError: there is no such generator, or it is of another kind.
    """
    own, said = must_have(tensors, prefix, "generator")
    first, downs = own.get("model.model.0.weight"), 1
    if first is None or len(first) != 4:
        raise MismatchError(
            f"{said} has no model.model.0.weight of four dimensions, the first layer of a U-Net"
        )
    while f"model.model.1.model.{'3.model.' * (downs - 1)}1.weight" in own:
        downs += 1
    last = own.get("model.model.3.weight", (0, first[1]))[1]
    if last != first[1]:
        raise MismatchError(
            f"{said} makes images of {last} channels out of such of {first[1]}, where as many are "
            f"expected"
        )
    kind = "batch" if any(name.endswith(".running_mean") for name in own) else "instance"
    sizes = {"width": first[0], "downs": max(downs, LEAST_DOWNS), "channels": first[1],
             "norm": kind}  # fmt: skip
    must_match(own, Network(MADE_BY, sizes).shapes(), said)
    return sizes
