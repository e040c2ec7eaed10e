"""What several networks are made of, and images of any size for those that want multiples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

SPREAD = 0.02  # the standard deviation of all initial weights
MULTIPLE = 4  # a generator that halves an image twice wants sides of such
LEAST = 8  # where it pads by reflection in its middle, that needs two pixels

Norm = Literal["instance", "batch"]


class Convolution(nn.Conv2d):
    """A convolution that initialises itself as CycleGAN does: N(0, 0.02), and biases of 0."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        _reset(self)


class TransposedConvolution(nn.ConvTranspose2d):
    """The same for the layers that double the size."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        _reset(self)


def _reset(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    nn.init.normal_(layer.weight, 0.0, SPREAD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class InstanceNorm(nn.InstanceNorm2d):
    """The same in any memory layout.

    For a single image in channels-last, torch's (2.13, on a CPU) gives wrong gradients without a
    word; a group for each channel is the same norm, and is right.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Each channel of each image with mean 0 and variance 1."""
        result: torch.Tensor
        if images.is_contiguous():
            result = super().forward(images)
        else:
            result = self.as_groups(images)
        return result

    def as_groups(self, images: torch.Tensor) -> torch.Tensor:
        """The same by torch's group norm, which on a CPU is also the faster one."""
        result: torch.Tensor = nn.functional.group_norm(
            images, self.num_features, self.weight, self.bias, self.eps
        )
        return result


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that initialises its weight as the official code does: N(1, 0.02)."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        self.reset_running_stats()
        nn.init.normal_(self.weight, 1.0, SPREAD)
        nn.init.zeros_(self.bias)


def norm(kind: Norm, channels: int) -> nn.Module:
    """A normalisation, before which a convolution has a bias only if it is `instance`."""
    return InstanceNorm(channels) if kind == "instance" else BatchNorm(channels)


def padded(images: torch.Tensor, multiple: int = MULTIPLE) -> torch.Tensor:
    """Images continued by reflection at the right and at the bottom, to multiples of some number.

    A side shorter than `LEAST` becomes that long first.
    """
    height, width = images.shape[-2:]
    high, wide = (max(side, LEAST) for side in (height, width))
    below, right = high + -high % multiple - height, wide + -wide % multiple - width
    if not below and not right:
        return images
    kind = "reflect" if below < height and right < width else "replicate"
    made: torch.Tensor = nn.functional.pad(images, (0, right, 0, below), mode=kind)
    return made


def at_any_size(
    network: nn.Module | Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor,
    multiple: int = MULTIPLE,
) -> torch.Tensor:  # fmt: skip
    """Translate images whose sides need not be multiples of what a network wants: cut back."""
    height, width = images.shape[-2:]
    whole = padded(images, multiple)
    result: torch.Tensor = network(whole)
    return result if whole is images else result[..., :height, :width]
