"""U-GAT-IT's light generator and its discriminators, with the official names: see `cam.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .cam import ILN, OF_INSTANCE, Decoder, attended, judging, pooled, verdict
from .layers import InstanceNorm
from .repeatable import ReflectionPad


class ResidualBlock(nn.Module):
    """x + conv_block(x), without biases."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            ReflectionPad(1), nn.Conv2d(channels, channels, 3, bias=False),
            InstanceNorm(channels), nn.ReLU(inplace=True),
            ReflectionPad(1), nn.Conv2d(channels, channels, 3, bias=False),
            InstanceNorm(channels),
        )  # fmt: skip

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        result: torch.Tensor = maps + self.conv_block(maps)
        return result


class Generator(Decoder):
    """Translates images: N × channels × H × W in [−1, 1], to the same shape and range.

    Heights and widths must be multiples of four; `at_any_size` pads others.
    """

    def __init__(self, width: int = 64, blocks: int = 4, channels: int = 3) -> None:
        """Build it.

        Args:
            width: channels after the first layer, `ch`.
            blocks: residual blocks before the attention, and as many with AdaILN after it.
            channels: of the images, both in and out.
        """
        super().__init__(width, blocks, channels, OF_INSTANCE)
        down = [
            ReflectionPad(3), nn.Conv2d(channels, width, 7, bias=False), InstanceNorm(width),
            nn.ReLU(inplace=True),
        ]  # fmt: skip
        for wide in (width, 2 * width):
            down += [
                ReflectionPad(1), nn.Conv2d(wide, 2 * wide, 3, stride=2, bias=False),
                InstanceNorm(2 * wide), nn.ReLU(inplace=True),
            ]  # fmt: skip
        self.DownBlock = nn.Sequential(*down, *(ResidualBlock(4 * width) for _ in range(blocks)))
        self.gap_fc = nn.Linear(4 * width, 1, bias=False)
        self.gmp_fc = nn.Linear(4 * width, 1, bias=False)
        self.conv1x1 = nn.Conv2d(8 * width, 4 * width, 1)
        up: list[nn.Module] = []
        for wide in (4 * width, 2 * width):
            up += [
                nn.Upsample(scale_factor=2), ReflectionPad(1),
                nn.Conv2d(wide, wide // 2, 3, bias=False), ILN(wide // 2), nn.ReLU(inplace=True),
            ]  # fmt: skip
        last = nn.Conv2d(width, channels, 7, bias=False)
        self.UpBlock2 = nn.Sequential(*up, ReflectionPad(3), last, nn.Tanh())

    def forward(self, images: torch.Tensor, attention: bool = False) -> Any:
        """The translation; with `attention` also logits and heat.

        The logits, N × 2, say whether an image is of the source domain; the heat, N × 1 × H/4 ×
        W/4, where the generator looks.
        """
        maps = self.DownBlock(images)
        importance = torch.cat([self.gap_fc.weight, self.gmp_fc.weight], 1)
        focused = attended(maps, importance, self.conv1x1).relu_()
        made = self.decoded(focused)
        if not attention:
            return made
        mean, most = pooled(maps)
        logits = torch.cat([self.gap_fc(mean), self.gmp_fc(most)], 1)
        return made, logits, focused.sum(1, keepdim=True)


class Discriminator(nn.Module):
    """Judges patches, N × channels × H × W in [−1, 1] to N × 1 × h × w, and the attention's logits.

    The logits are N × 2. Seven layers judge globally, five locally.
    """

    def __init__(self, width: int = 64, layers: int = 7, channels: int = 3) -> None:
        """Build it.

        Args:
            width: channels after the first layer, `ch`; each layer but the last doubles them.
            layers: all but two are of stride 2.
            channels: of the images.
        """
        super().__init__()
        wide = [channels, *(width * 2**n for n in range(layers - 1))]
        model: list[nn.Module] = []
        for n in range(layers - 1):
            model += judging(wide[n], wide[n + 1], 2 if n < layers - 2 else 1)
        self.model = nn.Sequential(*model)
        self.gap_fc = nn.utils.spectral_norm(nn.Linear(wide[-1], 1, bias=False))
        self.gmp_fc = nn.utils.spectral_norm(nn.Linear(wide[-1], 1, bias=False))
        self.conv1x1 = nn.Conv2d(2 * wide[-1], wide[-1], 1)
        self.leaky_relu = nn.LeakyReLU(0.2, inplace=True)
        self.pad = ReflectionPad(1)
        self.conv = verdict(wide[-1])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The verdicts of patches and of the attention; no sigmoid."""
        maps = self.model(images)
        mean, most = pooled(maps)
        logits = torch.cat([self.gap_fc(mean), self.gmp_fc(most)], 1)
        # As the official code: by the weights themselves, which no singular value divides.
        importance = torch.cat([self.gap_fc.weight_orig, self.gmp_fc.weight_orig], 1)
        focused = self.leaky_relu(attended(maps, importance, self.conv1x1))
        return self.conv(self.pad(focused)), logits
