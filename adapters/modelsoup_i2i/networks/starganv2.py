"""StarGAN v2's networks (Choi et al., CVPR 2020), without the branch for faces.

Written from the paper's tables alone. The names of tensors are ours: what is of one class is a row
of a tensor with a row for each.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .layers import InstanceNorm

SLOPE = 0.2  # of LeakyReLU
DEEPEST = 16  # pixels: the side of the generator's smallest maps
SEEN = 4  # pixels: of those that a whole picture is judged by
SHARED, OWN = 4, 3  # layers of the mapping network: of all classes, and of each before its last


class Convolution(nn.Conv2d):
    """A convolution that begins by He's rule for ReLU: N(0, 2 / fan-in), biases with 0."""

    def __init__(
        self, ins: int, outs: int, kernel: int = 3, padding: int = 1, bias: bool = True
    ) -> None:
        super().__init__(ins, outs, kernel, padding=padding, bias=bias)

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Linear(nn.Linear):
    """A linear layer that begins likewise."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.bias)


class OfClasses(nn.Module):
    """A linear layer for each class, which begins likewise; each vector goes through its own."""

    def __init__(self, classes: int, ins: int, outs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, outs, ins))
        self.bias = nn.Parameter(torch.empty(classes, outs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.normal_(self.weight, 0.0, math.sqrt(2 / self.weight.shape[2]))
        nn.init.zeros_(self.bias)

    def forward(self, vectors: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """N × ins, and int64 N, to N × outs."""
        made: torch.Tensor = (self.weight[classes] @ vectors[:, :, None])[:, :, 0]
        return made + self.bias[classes]


class Norm(InstanceNorm):
    """Instance norm with a scale and a bias."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        return self.as_groups(maps)


class AdaptiveNorm(nn.Module):
    """Instance norm whose scale and bias are a style's: (1 + γ) · norm + β."""

    def __init__(self, channels: int, style: int) -> None:
        super().__init__()
        self.channels = channels
        self.fc = Linear(style, 2 * channels)

    def forward(self, maps: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
        """Of the same shape, with N × style."""
        scale, bias = self.fc(styles)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(bias, 1 + scale, F.group_norm(maps, self.channels))


class Block(nn.Module):
    """Two convolutions beside what they are added to; the sum is divided by √2.

    Args:
        ins: channels of what it sees.
        outs: of what it makes.
        halves: the sides.
        normed: whether instance norm goes before each convolution.
    """

    def __init__(self, ins: int, outs: int, *, halves: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.halves = halves
        self.norm1: nn.Module | None = Norm(ins) if normed else None
        self.norm2: nn.Module | None = Norm(ins) if normed else None
        self.conv1 = Convolution(ins, ins)
        self.conv2 = Convolution(ins, outs)
        self.beside = Convolution(ins, outs, 1, 0, bias=False) if ins != outs else None

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """N × ins × H × W to N × outs × H × W, or half of both."""
        made = self.conv1(_activated(maps if self.norm1 is None else self.norm1(maps)))
        if self.halves:
            # The mean over four pixels commutes with a convolution of one.
            made, maps = F.avg_pool2d(made, 2), F.avg_pool2d(maps, 2)
        made = self.conv2(_activated(made if self.norm2 is None else self.norm2(made)))
        return (made + (maps if self.beside is None else self.beside(maps))) * math.sqrt(0.5)


class StyledBlock(nn.Module):
    """The same with adaptive norms.

    Args:
        ins: channels of what it sees.
        outs: of what it makes.
        style: numbers of a style.
        doubles: the sides.
    """

    def __init__(self, ins: int, outs: int, style: int, *, doubles: bool = False) -> None:
        super().__init__()
        self.doubles = doubles
        self.norm1, self.norm2 = AdaptiveNorm(ins, style), AdaptiveNorm(outs, style)
        self.conv1 = Convolution(ins, outs)
        self.conv2 = Convolution(outs, outs)
        self.beside = Convolution(ins, outs, 1, 0, bias=False) if ins != outs else None

    def forward(self, maps: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
        """N × ins × H × W to N × outs × H × W, or twice both."""
        made = _activated(self.norm1(maps, styles))
        if self.beside is not None:
            maps = self.beside(maps)
        if self.doubles:
            made, maps = (F.interpolate(own, scale_factor=2.0) for own in (made, maps))
        made = self.conv2(_activated(self.norm2(self.conv1(made), styles)))
        return (made + maps) * math.sqrt(0.5)


class Generator(nn.Module):
    """A picture, N × channels × size × size in [−1, 1], becomes one of a style, of the same size.

    Nothing holds what it makes in [−1, 1].

    Args:
        size: pixels of a side.
        width: channels after the first layer; twice as many with each halving.
        most: channels at most.
        style: numbers of a style.
        channels: of the pictures.
    """

    def __init__(
        self, size: int = 256, width: int = 64, most: int = 512, style: int = 64, channels: int = 3
    ) -> None:
        super().__init__()
        self.size, self.channels = size, channels
        wide = widths(width, most, halvings(size, DEEPEST))
        down, up = list(pairwise(wide)), wide[::-1]
        self.first = Convolution(channels, wide[0])
        self.encode = nn.ModuleList(
            [Block(ins, outs, halves=True, normed=True) for ins, outs in down]
            + [Block(wide[-1], wide[-1], normed=True) for _ in range(2)]
        )
        self.decode = nn.ModuleList(
            [StyledBlock(wide[-1], wide[-1], style) for _ in range(2)]
            + [StyledBlock(ins, outs, style, doubles=True) for ins, outs in pairwise(up)]
        )
        self.norm = Norm(wide[0])
        self.last = Convolution(wide[0], channels, 1, 0)

    def forward(self, images: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
        """Pictures, with N × style."""
        maps = self.first(images)
        for block in self.encode:
            maps = block(maps)
        for block in self.decode:
            maps = block(maps, styles)
        made: torch.Tensor = self.last(_activated(self.norm(maps)))
        return made


class Mapping(nn.Module):
    """Noise becomes a style of a class.

    Args:
        noise: numbers of it.
        style: numbers of a style.
        hidden: numbers of each layer between.
        classes: how many there are.
    """

    def __init__(
        self, noise: int = 16, style: int = 64, hidden: int = 512, classes: int = 2
    ) -> None:
        super().__init__()
        self.shared = nn.ModuleList([Linear(hidden if n else noise, hidden) for n in range(SHARED)])
        self.own = nn.ModuleList([OfClasses(classes, hidden, hidden) for _ in range(OWN)])
        self.last = OfClasses(classes, hidden, style)

    def forward(self, noise: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """N × noise, and int64 N, to N × style."""
        for layer in self.shared:
            noise = F.relu(layer(noise))
        for layer in self.own:
            noise = F.relu(layer(noise, classes))
        styles: torch.Tensor = self.last(noise, classes)
        return styles


class Trunk(nn.Module):
    """What sees a whole picture: down to 4 × 4 maps, and those at once.

    Args:
        size: pixels of a side.
        width: channels after the first layer; twice as many with each halving.
        most: channels at most.
        channels: of the pictures.
    """

    def __init__(
        self, size: int = 256, width: int = 64, most: int = 512, channels: int = 3
    ) -> None:
        super().__init__()
        wide = widths(width, most, halvings(size, SEEN))
        self.size, self.channels = size, channels
        self.first = Convolution(channels, wide[0])
        self.blocks = nn.ModuleList([Block(ins, outs, halves=True) for ins, outs in pairwise(wide)])
        self.last = Convolution(wide[-1], wide[-1], SEEN, 0)

    def seen(self, images: torch.Tensor) -> torch.Tensor:
        """N × channels × size × size in [−1, 1] to N × as many as it has channels at most."""
        maps = self.first(images)
        for block in self.blocks:
            maps = block(maps)
        return _activated(self.last(_activated(maps))).flatten(1)


class StyleEncoder(Trunk):
    """The style of a picture, as one of a class.

    Args:
        style: numbers of a style.
        classes: how many there are.
        others: see `Trunk`.
    """

    def __init__(self, style: int = 64, classes: int = 2, **others: int) -> None:
        super().__init__(**others)
        self.style = OfClasses(classes, self.last.weight.shape[0], style)

    def forward(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Pictures, and int64 N, to N × style."""
        styles: torch.Tensor = self.style(self.seen(images), classes)
        return styles


class Discriminator(Trunk):
    """Judges a picture as one of a class.

    Args:
        classes: how many there are.
        others: see `Trunk`.
    """

    def __init__(self, classes: int = 2, **others: int) -> None:
        super().__init__(**others)
        self.verdict = OfClasses(classes, self.last.weight.shape[0], 1)

    def forward(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Pictures, and int64 N, to N verdicts."""
        verdicts: torch.Tensor = self.verdict(self.seen(images), classes)[:, 0]
        return verdicts


def halvings(size: int, least: int) -> int:
    """How often a side is halved until so much is left."""
    return int(math.log2(size / least))


def widths(width: int, most: int, halved: int) -> list[int]:
    """Channels before the first halving, and after each."""
    return [min(width << n, most) for n in range(halved + 1)]


def _activated(maps: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(maps, SLOPE)
