"""What is done otherwise on a GPU is what torch does, with its gradients and with theirs."""

from __future__ import annotations

import pytest
import torch
from modelsoup_i2i.networks.repeatable import _convolved, _Doubled, _Reflected
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def must_be_torchs(own, wanted, *given: torch.Tensor) -> None:
    """In what it makes, in its gradients, and in theirs."""
    made, theirs = own(*given), wanted(*given)
    torch.testing.assert_close(made, theirs)
    weight = torch.randn_like(made)
    first, second = (torch.autograd.grad((each * weight).sum(), given) for each in (made, theirs))
    torch.testing.assert_close(first, second)
    assert torch.autograd.gradgradcheck(own, given)


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (3, 3, 3, 3), (2, 0, 1, 3)])
def test_padding_for_a_gpu_is_torchs(padding: tuple[int, ...]):
    images = torch.randn(1, 2, 5, 4, dtype=torch.double, requires_grad=True)
    must_be_torchs(
        lambda x: _Reflected.apply(x, padding), lambda x: F.pad(x, padding, mode="reflect"), images
    )


def test_doubling_for_a_gpu_is_torchs():
    images = torch.randn(1, 2, 3, 4, dtype=torch.double, requires_grad=True)
    must_be_torchs(
        _Doubled.apply, lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), images
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_convolutions_for_a_gpu_are_torchs(stride: int, biased: bool):
    given = [torch.randn(1, 2, 5, 4), torch.randn(2, 2, 2, 2), torch.randn(2)][: 2 + biased]
    more = () if biased else (None,)
    must_be_torchs(
        lambda *own: _convolved(*own, *more, stride), lambda *own: F.conv2d(*own, *more, stride),
        *(own.double().requires_grad_() for own in given),
    )  # fmt: skip


def test_a_slope_of_images_alone_computes_no_gradient_of_a_weight():
    images, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    images.requires_grad_()
    weight.requires_grad_()

    class Computed(TorchDispatchMode):
        weights = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                self.weights += args[-1][1]
            return func(*args, **(kwargs or {}))

    with Computed() as seen:
        made = _convolved(images, weight, None, 1).sum()
        (slope,) = torch.autograd.grad(made, images, create_graph=True)
        assert seen.weights == 0
        torch.autograd.grad(slope.square().sum(), weight)
        assert seen.weights == 1
