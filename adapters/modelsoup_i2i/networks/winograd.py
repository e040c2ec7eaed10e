"""A residual block for training on a CPU: fewer multiplications, less memory, gradients by hand.

Its 3 × 3 convolutions are Winograd's F(2×2, 3×3) (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", CVPR 2016): tiles of 4 × 4 inputs, which overlap by two, give 2 × 2
outputs, Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, with 16 multiplications for 36. Over tiles and channels the
product ⊙ is sixteen matrix products. Gradients are the adjoints of the same maps and save as much,
those of weights the most: at batch 1, oneDNN computes them at a third of what the processor can.

What is large and short-lived has a place of its own in each thread, which is used again: fresh
memory costs page faults, and freed memory leaves holes.

Only the block's input and what its convolutions made are kept for the backward pass; norm, ReLU
and padding are computed again. Channels come last, along which all sums here are vectorised.
Sums are rounded otherwise than in plain convolutions, and no worse.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any

import torch

_G = torch.tensor([[2.0, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64) / 2

Views = tuple[torch.Tensor, ...]
Needed = tuple[bool, ...]
_places = threading.local()


def residual_block(
    images: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    eps: float,
) -> torch.Tensor:
    """The images + norm(conv(pad(ReLU(norm(conv(pad(the images))))))).

    Args:
        images: N × H × W × C, H and W even.
        first: weight, C × C × 3 × 3, and bias of the first convolution.
        second: those of the second one.
        eps: of the norms.

    Returns:
        N × H × W × C.
    """
    result: torch.Tensor = _Block.apply(images, *first, *second, eps)
    return result


def lay_out(weight: torch.nn.Parameter) -> None:
    """Keep a convolution's weight in memory by place in the kernel first, then K and C.

    It has the same shape and values, in the order in which its map to 16 kernels reads it and
    gives its gradient: in any other, both are copied in each pass.
    """
    weight.data = weight.data.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight_1: torch.Tensor, bias_1: torch.Tensor,
        weight_2: torch.Tensor, bias_2: torch.Tensor, eps: float,
    ) -> torch.Tensor:  # fmt: skip
        made_1 = _convolved(images, weight_1, bias_1)
        made_2 = _convolved(_normal(made_1, eps)[0].relu_(), weight_2, bias_2)
        ctx.save_for_backward(images, made_1, made_2, weight_1, weight_2)
        ctx.eps = eps
        return _normal(made_2, eps)[0].add_(images)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        images, made_1, made_2, weight_1, weight_2 = ctx.saved_tensors
        (of_result,) = gradients
        of_images, *needed = ctx.needs_input_grad
        of_made = _normal_adjoint(of_result, *_normal(made_2, ctx.eps))
        hidden, spread = _normal(made_1, ctx.eps)
        any_before = of_images or any(needed[:2])
        back, *second = _adjoint(of_made, hidden.relu(), weight_2, (any_before, *needed[2:4]))
        first: list[torch.Tensor | None] = [None, None]
        if back is not None:
            of_made = _normal_adjoint(back.mul_(hidden > 0), hidden, spread)
            back, *first = _adjoint(of_made, images, weight_1, (of_images, *needed[:2]))
        if back is not None:
            back += of_result
        return back, *first, *second, None


def _normal(values: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel of each image with mean 0 and variance 1, and by what it was multiplied."""
    centred = values - values.mean((1, 2), keepdim=True)
    spread = (centred.square().mean((1, 2), keepdim=True) + eps).rsqrt_()
    return centred.mul_(spread), spread


def _normal_adjoint(
    gradient: torch.Tensor, normal: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    slope = (gradient * normal).mean((1, 2), keepdim=True)
    result = gradient - gradient.mean((1, 2), keepdim=True)
    return result.addcmul_(normal, slope, value=-1).mul_(spread)


def _convolved(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    tiles = _tiles(_padded(images))
    products = _place("products", (16, tiles.shape[1], len(weight)), images)
    torch.bmm(tiles, _kernels(weight).transpose(1, 2), out=products)
    return _outputs(products, images.shape).add_(bias)


def _adjoint(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, needed: Needed
) -> list[torch.Tensor | None]:
    """Gradients of what went into `_convolved`, those that are needed."""
    spread = _outputs_adjoint(gradient)
    of_images = of_weight = of_bias = None
    if needed[1]:
        of_kernels = _place("kernels", (16, *weight.shape[:2]), weight)
        torch.bmm(spread.transpose(1, 2), _tiles(_padded(images)), out=of_kernels)
        flat = _to_kernels(weight.dtype).t() @ of_kernels.flatten(1)
        of_weight = flat.view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1)
    if needed[0]:
        of_tiles = _place("tiles", (16, spread.shape[1], weight.shape[1]), weight)
        torch.bmm(spread, _kernels(weight), out=of_tiles)
        of_images = _padded_adjoint(_tiles_adjoint(of_tiles, images.shape))
    if needed[2]:
        of_bias = gradient.sum((0, 1, 2))
    return [of_images, of_weight, of_bias]


def _place(name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Memory for what is done with before the next thing of that name is made."""
    size = math.prod(shape)
    kept: torch.Tensor | None = getattr(_places, name, None)
    if kept is None or kept.dtype != like.dtype or kept.numel() < size:
        kept = like.new_empty(size)
        setattr(_places, name, kept)
    return kept[:size].view(shape)


def _padded(images: torch.Tensor) -> torch.Tensor:
    """By one, reflected."""
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="reflect")
    return padded.permute(0, 2, 3, 1)


def _padded_adjoint(gradient: torch.Tensor) -> torch.Tensor:
    """Consumes the gradient."""
    for side in (1, 2):
        last = gradient.shape[side] - 1
        for edge, mirrored in ((0, 2), (last, last - 2)):
            gradient.select(side, mirrored).add_(gradient.select(side, edge))
    return gradient[:, 1:-1, 1:-1].contiguous()


def _kernels(weight: torch.Tensor) -> torch.Tensor:
    """G g Gᵀ: 16 × K × C."""
    count, channels = weight.shape[:2]
    made = _place("kernels", (16, count * channels), weight)
    torch.mm(_to_kernels(weight.dtype), weight.permute(2, 3, 0, 1).reshape(9, -1), out=made)
    return made.view(16, count, channels)


@functools.cache
def _to_kernels(dtype: torch.dtype) -> torch.Tensor:
    """G ⊗ G: from the 9 elements of a kernel to 16."""
    return torch.kron(_G, _G).to(dtype)


def _tiles(padded: torch.Tensor) -> torch.Tensor:
    """Bᵀ d B: 16 × tiles × C."""
    n, height, width, channels = padded.shape
    high, wide = height // 2 - 1, width // 2 - 1
    rows = _place("rows", (4, n, high, width, channels), padded)
    _taken([padded[:, at : at + 2 * high : 2] for at in range(4)], rows.unbind(0))
    both = _place("tiles", (4, 4, n, high, wide, channels), padded)
    _taken([rows[:, :, :, at : at + 2 * wide : 2] for at in range(4)], both.unbind(1))
    return both.view(16, n * high * wide, channels)


def _tiles_adjoint(tiles: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """For images of a shape, padded."""
    n, height, width, channels = shape
    both = tiles.view(4, 4, n, height // 2, width // 2, channels)
    rows = _place("rows", (4, n, height // 2, width + 2, channels), tiles)
    _given(both.unbind(1), rows, 3)
    padded = tiles.new_empty(n, height + 2, width + 2, channels)
    _given(rows.unbind(0), padded, 1)
    return padded


def _outputs(products: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Aᵀ m A: N × H × W × K, for images of a shape."""
    n, height, width, _ = shape
    count = products.shape[-1]
    half = (height // 2, width // 2)
    rows = _place("rows", (2, 4, n, *half, count), products)
    _summed(products.view(4, 4, n, *half, count).unbind(0), rows.unbind(0))
    made = products.new_empty(n, half[0], 2, half[1], 2, count)
    _summed(rows.unbind(1), made.permute(4, 2, 0, 1, 3, 5).unbind(0))
    return made.view(n, height, width, count)


def _outputs_adjoint(gradient: torch.Tensor) -> torch.Tensor:
    """16 × tiles × K."""
    n, height, width, count = gradient.shape
    rows = _place("rows", (4, n, height // 2, width, count), gradient)
    _spread(gradient[:, ::2], gradient[:, 1::2], rows.unbind(0))
    both = _place("products", (4, 4, n, height // 2, width // 2, count), gradient)
    _spread(rows[:, :, :, ::2], rows[:, :, :, 1::2], both.unbind(1))
    return both.view(16, -1, count)


# Bᵀ, Aᵀ and their adjoints along one side: sums of strided views.


def _taken(d: list[torch.Tensor], out: Views) -> None:
    """Bᵀ, of the first, second, third and fourth rows of all tiles."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _given(tiles: Views, out: torch.Tensor, side: int) -> None:
    """B, summed where tiles overlap."""
    before = (slice(None),) * side
    even, odd = out[(*before, slice(0, None, 2))], out[(*before, slice(1, None, 2))]
    count = even.shape[side] - 1
    even.narrow(side, 0, count).copy_(tiles[0])
    even.narrow(side, count, 1).zero_()
    even.narrow(side, 1, count).add_(tiles[1]).add_(tiles[2]).sub_(tiles[0])
    odd.narrow(side, 0, count).copy_(tiles[1]).sub_(tiles[2]).add_(tiles[3])
    odd.narrow(side, count, 1).zero_()
    odd.narrow(side, 1, count).sub_(tiles[3])


def _summed(products: Views, out: Views) -> None:
    """Aᵀ."""
    out[0].copy_(products[0]).add_(products[1]).add_(products[2])
    out[1].copy_(products[1]).sub_(products[2]).sub_(products[3])


def _spread(even: torch.Tensor, odd: torch.Tensor, out: Views) -> None:
    """A."""
    out[0].copy_(even)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.neg(odd, out=out[3])
