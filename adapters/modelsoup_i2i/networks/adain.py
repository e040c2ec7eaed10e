"""A picture's content and a style vector, put together again by adaptive instance norm.

What the networks of MUNIT (Huang et al., ECCV 2018) and of FUNIT (Liu et al., ICCV 2019), and so of
BalaGAN, are made of. All convolutions pad by reflection. Names of tensors are those of the official
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .layers import InstanceNorm
from .repeatable import convolved, reflected

EPS = 1e-5


class Convolution(nn.Conv2d):
    """A convolution that pads by reflection, and begins by He's rule for ReLU, biases with 0."""

    def __init__(
        self, ins: int, outs: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__(ins, outs, kernel, stride, padding, bias=bias, padding_mode="reflect")

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """See `nn.Conv2d`."""
        around = reflected(maps, (self.padding[0],) * 4) if self.padding[0] else maps
        return convolved(around, self.weight, self.bias, self.stride[0])

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        _reset(self)


class Linear(nn.Linear):
    """A linear layer that begins likewise."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        _reset(self)


def _reset(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class AdaptiveNorm(nn.Module):
    """Instance norm whose bias and scale are given with each picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, maps: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Of the same shape.

        Args:
            maps: N × channels × H × W.
            given: N × 2 channels: first the biases, then the scales, which are used as they are.
        """
        bias, scale = given[:, :, None, None].chunk(2, 1)
        return torch.addcmul(bias, scale, F.group_norm(maps, self.channels, eps=EPS))


class LayerNorm(nn.Module):
    """Over all of a picture's maps together, as MUNIT has it; scales begin by U(0, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.uniform_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(x − μ) / (σ + 1e-5) · γ + β, where σ is that of a sample: of n − 1."""
        spread, mean = torch.std_mean(maps, (1, 2, 3), keepdim=True)
        scale, bias = (own[:, None, None] for own in (self.gamma, self.beta))
        return torch.addcmul(bias, scale, (maps - mean) / (spread + EPS))


Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """A convolution, and a norm and ReLU after it, where there are such.

    Args:
        ins: channels of what it sees.
        outs: of what it makes.
        kernel: pixels of a side.
        stride: of the convolution.
        padding: pixels at each edge.
        norm: makes one for so many channels.
        rectified: whether ReLU follows.
    """

    def __init__(
        self, ins: int, outs: int, kernel: int, stride: int = 1, padding: int = 0,
        norm: Norm | None = None, rectified: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = Convolution(ins, outs, kernel, stride, padding)
        self.norm = None if norm is None else norm(outs)
        self.rectified = rectified

    def forward(self, maps: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        """What is given is the norm's."""
        maps = self.conv(maps)
        if self.norm is not None:
            maps = self.norm(maps, *given)
        return F.relu(maps) if self.rectified else maps


class ResidualBlock(nn.Module):
    """Two convolutions, whose result is added to what they saw; nothing after the sum."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            [Block(channels, channels, 3, 1, 1, norm, rectified) for rectified in (True, False)]
        )

    def forward(self, maps: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        """What is given are numbers for each of its norms, if they want such."""
        made = maps
        for place, block in enumerate(self.model):
            made = block(made, *given[place : place + 1])
        return maps + made


class ResidualBlocks(nn.Module):
    """Several, each with its own part of what is given."""

    def __init__(self, count: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.model = nn.ModuleList([ResidualBlock(channels, norm) for _ in range(count)])

    def forward(self, maps: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        """What is given are numbers for each of their norms, in their order."""
        for place, block in enumerate(self.model):
            maps = block(maps, *given[2 * place : 2 * place + 2])
        return maps


class ContentEncoder(nn.Module):
    """Pictures to maps of what is where: N × C × H × W to N × width · 2^n × H / 2^n × W / 2^n.

    Args:
        width: channels after the first layer.
        downs: how often it halves the sides, n.
        blocks: residual blocks after that.
        channels: of the pictures.
    """

    def __init__(self, width: int = 64, downs: int = 3, blocks: int = 2, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [Block(channels, width, 7, 1, 3, InstanceNorm)]
        for wide in [width << n for n in range(downs)]:
            layers.append(Block(wide, 2 * wide, 4, 2, 1, InstanceNorm))
        layers.append(ResidualBlocks(blocks, width << downs, InstanceNorm))
        self.model = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        maps: torch.Tensor = self.model(images)
        return maps


class StyleEncoder(nn.Module):
    """Pictures to vectors of how they look, N × style; without norms, which would take that away.

    Args:
        width: channels after the first layer; four times as many at most.
        downs: how often it halves the sides.
        style: numbers of a vector.
        channels: of the pictures.
    """

    def __init__(self, width: int = 64, downs: int = 4, style: int = 64, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [Block(channels, width, 7, 1, 3)]
        wide = width
        for _ in range(downs):
            layers.append(Block(wide, min(2 * wide, 4 * width), 4, 2, 1))
            wide = min(2 * wide, 4 * width)
        layers += [nn.AdaptiveAvgPool2d(1), Convolution(wide, style, 1)]
        self.model = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        style: torch.Tensor = self.model(images).flatten(1)
        return style


class Layer(nn.Module):
    """A linear layer of the MLP, with ReLU after it or not."""

    def __init__(self, ins: int, outs: int, rectified: bool) -> None:
        super().__init__()
        self.fc = Linear(ins, outs)
        self.rectified = rectified

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """N × ins to N × outs."""
        made: torch.Tensor = self.fc(numbers)
        return F.relu(made) if self.rectified else made


class MLP(nn.Module):
    """Styles to the numbers of a decoder's norms: N × style to N × outs."""

    def __init__(self, style: int, outs: int, width: int = 256) -> None:
        super().__init__()
        self.model = nn.Sequential(
            Layer(style, width, True), Layer(width, width, True), Layer(width, outs, False)
        )

    def forward(self, styles: torch.Tensor) -> torch.Tensor:
        """See the class."""
        numbers: torch.Tensor = self.model(styles)
        return numbers


class Decoder(nn.Module):
    """Content and the numbers of its adaptive norms to pictures in [−1, 1].

    Args:
        width: channels before the last layer.
        ups: how often it doubles the sides.
        blocks: residual blocks before that, which have the adaptive norms.
        channels: of the pictures.
        norm: of what follows a doubling: `InstanceNorm` (FUNIT, BalaGAN), or `LayerNorm` (MUNIT).

    Attributes:
        given: how many numbers its adaptive norms want for a picture.
    """

    def __init__(
        self, width: int = 64, ups: int = 3, blocks: int = 2, channels: int = 3,
        norm: Norm = InstanceNorm,
    ) -> None:  # fmt: skip
        super().__init__()
        wide = width << ups
        self.wide, self.given = wide, 4 * blocks * wide
        layers: list[nn.Module] = [ResidualBlocks(blocks, wide, AdaptiveNorm)]
        for _ in range(ups):
            layers += [nn.Upsample(scale_factor=2), Block(wide, wide // 2, 5, 1, 2, norm)]
            wide //= 2
        layers.append(Block(wide, channels, 7, 1, 3, rectified=False))
        self.model = nn.ModuleList(layers)

    def forward(self, content: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Pictures.

        Args:
            content: N × width · 2^ups × H × W.
            numbers: N × given: for each norm in its turn its biases, then its scales.
        """
        blocks, *others = self.model
        maps = blocks(content, *numbers.split(2 * self.wide, 1))
        for layer in others:
            maps = layer(maps)
        return torch.tanh(maps)
