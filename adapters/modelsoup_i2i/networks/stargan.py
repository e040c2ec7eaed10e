"""StarGAN's networks (Choi et al., CVPR 2018), with the names of official checkpoints.

One generator is told the class that it is to make; the discriminator tells real from made, patch by
patch, and which class it sees. All layers begin as torch's do.
"""

from __future__ import annotations

import torch
from torch import nn

from .layers import InstanceNorm

DOWNS = 2  # how often the generator halves the sides
SLOPE = 0.01  # of the discriminator's LeakyReLU


class ScaledNorm(InstanceNorm):
    """Instance norm with a scale and a bias; of each picture its own statistics, in use too."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        return self.as_groups(images)


class Block(nn.Module):
    """Two convolutions, whose result is added to what they saw."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), ScaledNorm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), ScaledNorm(channels),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        made: torch.Tensor = images + self.main(images)
        return made


class Generator(nn.Module):
    """A picture, N × channels × H × W in [−1, 1], becomes one of a class, of the same size.

    Sides must be multiples of four. It pads with zeros: by reflection, a map that says the class,
    and is the same everywhere, would be taken away by the norm that follows.

    Args:
        width: channels after the first layer.
        blocks: residual blocks.
        classes: how many there are, each with a map beside the picture.
        channels: of the pictures.
    """

    multiple = 2**DOWNS

    def __init__(
        self, width: int = 64, blocks: int = 6, classes: int = 5, channels: int = 3
    ) -> None:
        super().__init__()
        self.classes, self.channels = classes, channels
        layers: list[nn.Module] = [
            nn.Conv2d(channels + classes, width, 7, padding=3, bias=False), ScaledNorm(width),
            nn.ReLU(),
        ]  # fmt: skip
        for wide in [width << n for n in range(DOWNS)]:
            layers += [
                nn.Conv2d(wide, 2 * wide, 4, stride=2, padding=1, bias=False), ScaledNorm(2 * wide),
                nn.ReLU(),
            ]  # fmt: skip
        layers += [Block(width << DOWNS) for _ in range(blocks)]
        for wide in [width << n for n in reversed(range(DOWNS))]:
            layers += [
                nn.ConvTranspose2d(2 * wide, wide, 4, stride=2, padding=1, bias=False),
                ScaledNorm(wide), nn.ReLU(),
            ]  # fmt: skip
        layers += [nn.Conv2d(width, channels, 7, padding=3, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def embedded(self, classes: torch.Tensor) -> torch.Tensor:
        """Classes, int64 N, as vectors N × classes with a one; vectors as they are."""
        if classes.is_floating_point():
            return classes
        known = torch.arange(self.classes, device=classes.device)
        return (classes[:, None] == known).float()

    def forward(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Pictures of classes: int64 N; or float N × classes, such as mixtures of some."""
        told = self.embedded(classes).to(images.dtype)[:, :, None, None]
        maps = told.expand(-1, -1, *images.shape[-2:])
        made: torch.Tensor = self.main(torch.cat([images, maps], 1))
        return made


class Discriminator(nn.Module):
    """Judges patches, and tells the class of the whole picture.

    Args:
        size: pixels of a side.
        width: channels after the first layer, which each further one doubles.
        layers: of stride 2.
        classes: how many it tells apart.
        channels: of the pictures.
    """

    def __init__(
        self, size: int = 128, width: int = 64, layers: int = 6, classes: int = 5, channels: int = 3
    ) -> None:
        super().__init__()
        made: list[nn.Module] = []
        wide = channels
        for outs in [width << n for n in range(layers)]:
            made += [nn.Conv2d(wide, outs, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
            wide = outs
        self.main = nn.Sequential(*made)
        self.conv1 = nn.Conv2d(wide, 1, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(wide, classes, size >> layers, bias=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Verdicts, N × 1 × h × w, and logits of the classes, N × classes."""
        maps = self.main(images)
        return self.conv1(maps), self.conv2(maps).flatten(1)
