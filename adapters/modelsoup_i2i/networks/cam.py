"""What U-GAT-IT and NICE-GAN share: attention by class activation maps, and norms that are mixed.

Kim et al., "U-GAT-IT: Unsupervised Generative Attentional Networks with Adaptive Layer-Instance
Normalization", ICLR 2020; Chen et al., "Reusing Discriminators for Encoding: Towards Unsupervised
Image-to-Image Translation" (NICE-GAN), CVPR 2020. Names of tensors are those of the official codes.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .layers import MULTIPLE
from .repeatable import ReflectionPad

EPS = 1e-5  # beside variances
OF_LAYER, OF_INSTANCE = (0.0,), (0.9,)  # what a clamped ρ, the share of instance norm, begins with
EVEN = {OF_LAYER: (1.0, 3.2), OF_INSTANCE: (3.2, 1.0)}
"""The numbers that NICE-GAN's two shares begin with, before a softmax over both."""


class Mixture(nn.Module):
    """ρ₀ · instance norm + ρ₁ · layer norm, of shares for each channel, scaled and moved.

    Both norms have unbiased variances.

    Args:
        channels: of the maps.
        begin: one number, ρ₀ itself, which an optimiser must keep in [0, 1], and ρ₁ is 1 − ρ₀; or
            two, of which ρ is the softmax.
    """

    def __init__(self, channels: int, begin: tuple[float, ...]) -> None:
        super().__init__()
        self.channels, self.begin = channels, begin
        shape = (1, channels, 1, 1) if len(begin) == 1 else (1, channels, 2)
        self.rho = nn.Parameter(torch.empty(*shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        for n, value in enumerate(self.begin):
            nn.init.constant_(self.rho.view(self.channels, -1)[:, n], value)

    def mixed(self, maps: torch.Tensor, scale: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        """The mixture, scaled and moved by N × channels or 1 × channels.

        Maps are read once for all means and variances, and once for the result: both norms are a
        factor and a summand for each channel of each image.
        """
        maps = maps.float() if maps.element_size() < 4 else maps
        pixels = maps.shape[2] * maps.shape[3]
        values = pixels * maps.shape[1]
        mean = maps.mean((2, 3))
        spread = (maps - mean[:, :, None, None]).square().sum((2, 3))
        whole = mean.mean(1, keepdim=True)
        # About the mean of all: what is within the channels, and what is between them.
        around = (spread + pixels * (mean - whole).square()).sum(1, keepdim=True)
        if len(self.begin) == 1:
            of_instance = self.rho.view(1, -1)
            of_layer = 1 - of_instance
        else:
            of_instance, of_layer = torch.softmax(self.rho, 2).unbind(2)
        of_instance = of_instance * (spread / (pixels - 1) + EPS).rsqrt()
        of_layer = of_layer * (around / (values - 1) + EPS).rsqrt()
        factor = scale * (of_instance + of_layer)
        summand = move - scale * (of_instance * mean + of_layer * whole)
        return torch.addcmul(summand[:, :, None, None], maps, factor[:, :, None, None])


class ILN(Mixture):
    """Instance and layer norm with a scale and a shift of its own."""

    def __init__(self, channels: int, begin: tuple[float, ...] = OF_LAYER) -> None:
        super().__init__(channels, begin)
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def reset_parameters(self) -> None:
        """As `Mixture`."""
        super().reset_parameters()
        if hasattr(self, "gamma"):
            nn.init.ones_(self.gamma)
            nn.init.zeros_(self.beta)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        return self.mixed(maps, self.gamma.view(1, -1), self.beta.view(1, -1))


class AdaILN(Mixture):
    """The same with a scale and a shift that it is given: N × channels."""

    def forward(
        self, maps: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        """Of the same shape."""
        return self.mixed(maps, gamma, beta)


class AdaILNBlock(nn.Module):
    """x + two convolutions, each with an AdaILN, between which is a ReLU."""

    def __init__(self, channels: int, begin: tuple[float, ...]) -> None:
        super().__init__()
        self.pad = ReflectionPad(1)
        self.conv1 = nn.Conv2d(channels, channels, 3, bias=False)
        self.norm1 = AdaILN(channels, begin)
        self.conv2 = nn.Conv2d(channels, channels, 3, bias=False)
        self.norm2 = AdaILN(channels, begin)

    def forward(
        self, maps: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        """Of the same shape."""
        made = self.norm1(self.conv1(self.pad(maps)), gamma, beta).relu_()
        result: torch.Tensor = maps + self.norm2(self.conv2(self.pad(made)), gamma, beta)
        return result


class Decoder(nn.Module):
    """What generators end with, light: scale and shift of all blocks are made of the maps' means.

    `UpBlock2`, from maps to images, is whoever inherits it's own.

    Args:
        width: channels before the last layer.
        blocks: residual ones with AdaILN.
        channels: of the images.
        begin: of their ρ.
    """

    multiple = MULTIPLE
    UpBlock2: nn.Module

    def __init__(self, width: int, blocks: int, channels: int, begin: tuple[float, ...]) -> None:
        super().__init__()
        self.width, self.blocks, self.channels = width, blocks, channels
        wide = 4 * width
        self.FC = nn.Sequential(
            nn.Linear(wide, wide, bias=False), nn.ReLU(), nn.Linear(wide, wide, bias=False),
            nn.ReLU(),
        )  # fmt: skip
        self.gamma = nn.Linear(wide, wide, bias=False)
        self.beta = nn.Linear(wide, wide, bias=False)
        for n in range(1, blocks + 1):
            setattr(self, f"UpBlock1_{n}", AdaILNBlock(wide, begin))

    def decoded(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps of a quarter of the sides to images."""
        style = self.FC(maps.mean((2, 3)))
        gamma, beta = self.gamma(style), self.beta(style)
        for n in range(1, self.blocks + 1):
            maps = getattr(self, f"UpBlock1_{n}")(maps, gamma, beta)
        result: torch.Tensor = self.UpBlock2(maps)
        return result


def judging(ins: int, outs: int, stride: int = 2) -> list[nn.Module]:
    """A layer of a discriminator: as wide and high, or half as much, less what padding lacks."""
    convolution = nn.utils.spectral_norm(nn.Conv2d(ins, outs, 4, stride=stride))
    return [ReflectionPad(1), convolution, nn.LeakyReLU(0.2, inplace=True)]


def verdict(ins: int) -> nn.Module:
    """The last layer of a discriminator."""
    return nn.utils.spectral_norm(nn.Conv2d(ins, 1, 4, bias=False))


def pooled(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the largest value of each channel: N × C each."""
    return maps.mean((2, 3)), maps.amax((2, 3))


def attended(
    maps: torch.Tensor, importance: torch.Tensor, convolution: nn.Conv2d
) -> torch.Tensor:  # fmt: skip
    """Maps twice over, each channel times its importance, through a convolution of 1 × 1.

    That is one of half as many channels, by a kernel that has the importance in it.

    Args:
        maps: N × C × H × W.
        importance: 1 × 2C, weights of classifiers of pooled maps.
        convolution: of 2C channels.
    """
    kernel = convolution.weight.flatten(1) * importance
    outs, channels = len(kernel), maps.shape[1]
    kernel = kernel.view(outs, 2, channels).sum(1)[:, :, None, None]
    made: torch.Tensor = F.conv2d(maps, kernel, convolution.bias)
    return made
