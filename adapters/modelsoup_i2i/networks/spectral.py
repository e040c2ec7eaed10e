"""Layers whose weights are divided by their largest singular value (Miyato et al., ICLR 2018).

A forward pass in training mode moves the estimate of the singular vector, `u0`, by one step of
power iteration; in evaluation mode it stays. Names of tensors are those of BigGAN's official code.
For use `folded` divides once: what is left are torch's own layers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

Side = Literal["same", "doubled", "halved"]
ROUNDED = 1e-3  # what a unit vector's norm may be off by
ITERATIONS = 30  # of the power method
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

    def plain(self) -> nn.Module:
        """A layer of torch that computes the same, and has nothing to divide."""
        raise NotImplementedError


class Convolution(Spectral, nn.Conv2d):
    """A convolution of stride 1 that keeps the size.

    Args:
        ins: channels of what it sees.
        outs: of what it makes.
        kernel: pixels of a side, odd.
        bias: whether there is one.
        side: `doubled`: each pixel is doubled before; `halved`: the means of 2 × 2 pixels are taken
            after. Of a kernel of 3 × 3, both are one convolution of 4 × 4, which has 16
            multiplications for 36, and nothing of the larger side but what is asked for.
    """

    def __init__(
        self, ins: int, outs: int, kernel: int = 3, bias: bool = True, side: Side = "same"
    ) -> None:
        super().__init__(ins, outs, kernel, padding=kernel // 2, bias=bias)
        self.side = side
        self.register_buffer("u0", torch.randn(1, outs))
        self.register_buffer("sv0", torch.ones(1))

    def kernel(self) -> torch.Tensor:
        """What is computed with."""
        kernel = self.divided()
        if kernel.is_cuda and torch.is_autocast_enabled("cuda"):
            kernel = kernel.to(torch.get_autocast_dtype("cuda"))  # as it is computed with
        if self.side == "halved":
            kernel = F.avg_pool2d(kernel, 2, 1, 1)
        elif self.side == "doubled":
            # The sums over 2 × 2 pixels that have one value.
            kernel = F.avg_pool2d(kernel, 2, 1, 1, divisor_override=1)
            kernel = kernel.flip(2, 3).transpose(0, 1)
        return kernel

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × ins × H × W to N × outs × H × W, or twice or half of both."""
        made: torch.Tensor
        if self.side == "same":
            made = F.conv2d(images, self.kernel(), self.bias, padding=self.padding)
        elif self.side == "halved":
            made = F.conv2d(images, self.kernel(), self.bias, stride=2, padding=1)
        else:
            made = F.conv_transpose2d(images, self.kernel(), self.bias, stride=2, padding=1)
        return made

    def plain(self) -> nn.Module:
        """See `Spectral`."""
        kind = nn.ConvTranspose2d if self.side == "doubled" else nn.Conv2d
        kernel, stride, padding = self.kernel_size, 1, self.padding
        if self.side != "same":
            kernel, stride, padding = 4, 2, 1
        made = nn.utils.skip_init(
            kind, self.in_channels, self.out_channels, kernel, stride=stride, padding=padding,
            bias=self.bias is not None,
        )  # fmt: skip
        return _with(made, self.kernel(), self.bias)


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

    def plain(self) -> nn.Module:
        """See `Spectral`."""
        sizes = self.in_features, self.out_features
        return _with(
            nn.utils.skip_init(nn.Linear, *sizes, bias=self.bias is not None),
            self.divided(),
            self.bias,
        )


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

    def plain(self) -> nn.Module:
        """See `Spectral`."""
        sizes = self.num_embeddings, self.embedding_dim
        return _with(nn.utils.skip_init(nn.Embedding, *sizes), self.divided())


def folded(network: nn.Module) -> nn.Module:
    """A network for use, in which each such layer has become a plain one; it is changed itself.

    Its state has no `u0` and `sv0` any more, and it is in evaluation mode. So are layers under
    torch's own spectral norm, but for those that are marked `undivided`, whose weight itself is
    wanted. Vectors that are none are found before: see `estimated`.
    """
    network.eval()
    estimated(network)
    for part in list(network.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, Spectral):
                setattr(part, name, layer.plain())
            elif "weight_u" in layer._buffers and not hasattr(layer, "undivided"):
                nn.utils.remove_spectral_norm(layer)
    return network


def estimated(network: nn.Module) -> None:
    """Find singular vectors and values anew, by power iteration, where vectors are no unit ones.

    Such are those of a merge that averaged them, whose signs are arbitrary, and zeros that stand
    for what a merge left out. What is a unit vector stays.
    """
    for layer in network.modules():
        if isinstance(layer, Spectral):
            weight, vectors, value = layer.weight, [layer.u0], layer.sv0
        elif "weight_u" in layer._buffers:
            weight, vectors, value = layer.weight_orig, [layer.weight_u, layer.weight_v], None
        else:
            continue
        if all(abs(float(own.norm()) - 1) < ROUNDED for own in vectors):
            continue
        matrix = weight.detach().flatten(1)
        left = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0)).to(matrix)
        for _ in range(ITERATIONS):
            right = F.normalize(left @ matrix, dim=0)
            left = F.normalize(matrix @ right, dim=0)
        for own, found in zip(vectors, (left, right), strict=False):
            own.copy_(found.view_as(own))
        if value is not None:
            value.fill_(left @ matrix @ right)


def _with(made: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """A plain layer with the weights that another one computes with."""
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made.eval()
