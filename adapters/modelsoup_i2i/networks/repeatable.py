"""What torch does otherwise on a GPU, for trainings: with the same bits each time, or faster.

Torch (2.11) sums there the gradients of some layers in any order. And the gradient of a gradient of
a convolution, as R1 takes it, it makes by one whose kernel is as large as the picture. On a CPU,
and where no gradient is asked for, all of these are torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class ReflectionPad(nn.ReflectionPad2d):
    """Pads by reflection; see `reflected`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Larger by what is at each edge."""
        return reflected(images, self.padding)


def reflected(images: torch.Tensor, padding: tuple[int, int, int, int]) -> torch.Tensor:
    """Images continued by reflection.

    Args:
        images: N × C × H × W.
        padding: pixels at the left, at the right, above and below.
    """
    made: torch.Tensor
    if _is_trained_on_gpu(images):
        made = _Reflected.apply(images, padding)
    else:
        made = F.pad(images, padding, mode="reflect")
    return made


class _Reflected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
        ctx.padding, ctx.shape = padding, images.shape
        return F.pad(images, padding, mode="reflect")

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        left, right, above, below = ctx.padding
        for side, before, after in ((2, above, below), (3, left, right)):
            size = ctx.shape[side]
            whole, gradient = gradient, gradient.narrow(side, before, size).clone()
            for at, edge, count in ((1, 0, before), (size - 1 - after, before + size, after)):
                if count:
                    mirrored = whole.narrow(side, edge, count)
                    gradient.narrow(side, at, count).add_(
                        mirrored if count == 1 else mirrored.flip(side)
                    )
        return gradient, None


def doubled(images: torch.Tensor) -> torch.Tensor:
    """Images of twice the sides, by linear interpolation."""
    made: torch.Tensor
    if _is_trained_on_gpu(images):
        made = _Doubled.apply(images)
    else:
        made = F.interpolate(images, scale_factor=2.0, mode="bilinear")
    return made


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: torch.Tensor) -> torch.Tensor:
        return F.interpolate(images, scale_factor=2.0, mode="bilinear")

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        # Three quarters of both pixels that one became, and a quarter of each next to them; the
        # outermost ones are next to themselves.
        (gradient,) = gradients
        for side in (2, 3):
            size = gradient.shape[side] // 2
            first, second = gradient.unflatten(side, (size, 2)).unbind(side + 1)
            gradient = (first + second) * 0.75
            for at, count, other, begin in (
                (1, size - 1, second, 0), (0, 1, first, 0),
                (0, size - 1, first, 1), (size - 1, 1, second, size - 1),
            ):  # fmt: skip
                own = gradient.narrow(side, at, count)
                own.add_(other.narrow(side, begin, count), alpha=0.25)
        return gradient


def convolved(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int = 1
) -> torch.Tensor:
    """A convolution without padding, of which gradients of gradients may be wanted."""
    if not _is_trained_on_gpu(images):
        return F.conv2d(images, weight, bias, stride)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        images, weight = images.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast("cuda", enabled=False):
        return _convolved(images, weight, bias, stride)


def _convolved(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int
) -> torch.Tensor:
    # Two nodes, since who asks for the gradients of images alone is to have no others made.
    seen: torch.Tensor = _Seen.apply(images, weight, stride)
    added: torch.Tensor = _Weighed.apply(weight, bias, (images,), stride, seen.shape)
    return seen + added


class _Seen(torch.autograd.Function):
    """The convolution as a function of images."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride = stride
        return F.conv2d(images, weight, None, stride)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        images, weight = ctx.saved_tensors
        return _Slope.apply(gradients[0], weight, images.detach(), ctx.stride), None, None


class _Slope(torch.autograd.Function):
    """The gradient of images, as a function of that of the result and of the weight."""

    @staticmethod
    def forward(
        ctx: Any, gradient: torch.Tensor, weight: torch.Tensor, images: torch.Tensor, stride: int
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.stride = stride
        return _adjoint(gradient, images, weight, stride, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient, weight = ctx.saved_tensors
        of_gradient = F.conv2d(gradients[0], weight, None, ctx.stride)
        return of_gradient, _adjoint(gradient, gradients[0], weight, ctx.stride, 1), None, None


class _Weighed(torch.autograd.Function):
    """What is added to it: the bias; gradients are those of the weight and of the bias.

    Images come in a tuple: this node does not lead to them, but its gradient is a function of them.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, bias: torch.Tensor | None, images: tuple[torch.Tensor],
        stride: int, shape: torch.Size,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(weight, *images)
        ctx.stride, ctx.biased = stride, bias is not None
        own = weight.new_zeros(1) if bias is None else bias
        return own[:, None, None].expand(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight, images = ctx.saved_tensors
        of_weight = _adjoint(gradients[0], images, weight, ctx.stride, 1)
        of_bias = gradients[0].sum((0, 2, 3)) if ctx.biased else None
        return of_weight, of_bias, None, None, None


def _adjoint(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, stride: int, of: int
) -> torch.Tensor:
    """The gradient of images (0) or of the weight (1)."""
    made: tuple[torch.Tensor, ...] = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1,
        [of == 0, of == 1, False],
    )  # fmt: skip
    return made[of]


def _is_trained_on_gpu(images: torch.Tensor) -> bool:
    return bool(images.is_cuda and images.requires_grad)
