"""Layers whose weights are divided by their largest singular value (Miyato et al., ICLR 2018).

A forward pass in training mode moves the estimate of the singular vector, `u0`, by one step of
power iteration; in evaluation mode it stays. Names of tensors are those of BigGAN's official code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

EPS = 1e-6  # of the norms of singular vectors, as the published runs of BigGAN and DeepI2I have it


class Spectral:
    """What such layers share: they are made beside a layer of torch that has a `weight`."""

    weight: nn.Parameter
    u0: torch.Tensor
    sv0: torch.Tensor
    training: bool

    def divided(self) -> torch.Tensor:
        """The weight over its largest singular value, by one step of power iteration."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            right = F.normalize(self.u0 @ matrix, eps=EPS)
            left = F.normalize(right @ matrix.T, eps=EPS)
            if self.training:
                self.u0.copy_(left)
        value = (right @ matrix.T @ left.T).squeeze()
        if self.training:
            with torch.no_grad():
                self.sv0.fill_(value.detach())
        return self.weight / value

    def reset_parameters(self) -> None:
        """An orthogonal weight; the bias as torch has it. `load_into` finds the vectors."""
        own: Any = super()
        own.reset_parameters()
        nn.init.orthogonal_(self.weight)


class Convolution(Spectral, nn.Conv2d):
    """A convolution of stride 1 that keeps the size."""

    def __init__(self, ins: int, outs: int, kernel: int = 3, bias: bool = True) -> None:
        super().__init__(ins, outs, kernel, padding=kernel // 2, bias=bias)
        self.register_buffer("u0", torch.randn(1, outs))
        self.register_buffer("sv0", torch.ones(1))

    def forward(
        self, images: torch.Tensor, side: Literal["same", "doubled", "halved"] = "same"
    ) -> torch.Tensor:
        """N × ins × H × W to N × outs × H × W.

        Args:
            images: what it sees.
            side: `doubled`: each pixel is doubled before; `halved`: the means of 2 × 2 pixels are
                taken after. Of a kernel of 3 × 3, both are one convolution of 4 × 4, which has 16
                multiplications for 36, and nothing of the larger side but what is asked for.
        """
        kernel = self.divided()
        made: torch.Tensor
        if side == "same":
            made = F.conv2d(images, kernel, self.bias, padding=self.padding)
        elif side == "halved":
            kernel = F.avg_pool2d(kernel, 2, 1, 1)
            made = F.conv2d(images, kernel, self.bias, stride=2, padding=1)
        else:
            # The sums over 2 × 2 pixels that have one value.
            kernel = F.avg_pool2d(kernel, 2, 1, 1, divisor_override=1)
            kernel = kernel.flip(2, 3).transpose(0, 1)
            made = F.conv_transpose2d(images, kernel, self.bias, stride=2, padding=1)
        return made


class Linear(Spectral, nn.Linear):
    """A matrix, with a bias or without."""

    def __init__(self, ins: int, outs: int, bias: bool = True) -> None:
        super().__init__(ins, outs, bias=bias)
        self.register_buffer("u0", torch.randn(1, outs))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """N × ins to N × outs."""
        made: torch.Tensor = F.linear(values, self.divided(), self.bias)
        return made


class Embedding(Spectral, nn.Embedding):
    """A row for each class."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.register_buffer("u0", torch.randn(1, count))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, classes: torch.Tensor) -> torch.Tensor:
        """N indices to N × width."""
        made: torch.Tensor = F.embedding(classes, self.divided())
        return made
