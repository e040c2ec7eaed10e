"""CycleGAN's generator, with the official names, and what a checkpoint tells of one.

Zhu et al., "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV
2017, appendix 7.2. InstanceNorm has neither parameters nor statistics, so a checkpoint holds the
weights and biases of convolutions alone, and averaging checkpoints leaves nothing to repair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from modelsoup import MismatchError

from .described import Network
from .layers import MULTIPLE, Convolution, InstanceNorm, TransposedConvolution
from .repeatable import ReflectionPad
from .shapes import must_have, must_match
from .winograd import lay_out, residual_block

MADE_BY = f"{__name__}:ResnetGenerator"
_SMALL = 96 * 96  # pixels of a batch
_WINOGRAD = 128  # channels from which it is the faster one


class ResidualBlock(nn.Module):
    """x + conv_block(x), with nothing after the sum."""

    def __init__(self, channels: int, convolution: type[nn.Conv2d] = Convolution) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            ReflectionPad(1),
            convolution(channels, channels, 3),
            InstanceNorm(channels),
            nn.ReLU(),
            ReflectionPad(1),
            convolution(channels, channels, 3),
            InstanceNorm(channels),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        result: torch.Tensor = images + self.conv_block(images)
        return result


class ResnetGenerator(nn.Module):
    """Translates images: N × channels × H × W in [−1, 1], to the same shape and range.

    Heights and widths must be multiples of four; `at_any_size` pads others.

    Two switches for trainings on a CPU; results are the same but for rounding:

    - `recompute`: of each layer outside the blocks only what its convolution made is kept: norm,
      ReLU and padding are computed again in the backward pass, which costs little beside a
      convolution;
    - `winograd`: the blocks are those of `winograd.py`, where they have even sides.
    """

    multiple = MULTIPLE
    recompute = False
    winograd = False

    def __init__(self, width: int = 64, blocks: int = 9, channels: int = 3) -> None:
        """Build it.

        Args:
            width: channels after the first layer, `ngf`.
            blocks: residual blocks: by convention 6 for 128 × 128, 9 for larger images.
            channels: of the images, both in and out.
        """
        super().__init__()
        self.width, self.blocks, self.channels = width, blocks, channels
        self.model = nn.Sequential(*self.layers_of(width, blocks, channels))

    def layers_of(self, width: int, blocks: int, channels: int) -> list[nn.Module]:
        """What it is made of, in order."""
        layers: list[nn.Module] = [
            ReflectionPad(3), Convolution(channels, width, 7),
            InstanceNorm(width), nn.ReLU(),
        ]  # fmt: skip
        for wide in (width, 2 * width):
            layers += [
                Convolution(wide, 2 * wide, 3, stride=2, padding=1),
                InstanceNorm(2 * wide), nn.ReLU(),
            ]  # fmt: skip
        layers += [ResidualBlock(4 * width) for _ in range(blocks)]
        for wide in (4 * width, 2 * width):
            layers += [
                TransposedConvolution(wide, wide // 2, 3, stride=2, padding=1, output_padding=1),
                InstanceNorm(wide // 2), nn.ReLU(),
            ]  # fmt: skip
        return [*layers, ReflectionPad(3), Convolution(width, channels, 7), nn.Tanh()]

    def prepare_for(self, *, plain: bool, precision: str | int, pixels: int) -> None:
        """Choose the switches for a training.

        Args:
            plain: neither: it runs on a GPU, or is compiled or traced.
            precision: 32 or `bf16`.
            pixels: of a batch.
        """
        # Below that, weights are most of what is held, and computing again saves little.
        self.recompute = not plain and pixels > _SMALL
        self.winograd = not plain and precision == 32 and 4 * self.width >= _WINOGRAD

    def lay_out(self) -> None:
        """With `winograd`, the order of weights in memory that it is fast with."""
        if self.winograd:
            for block in self.model:
                if isinstance(block, ResidualBlock):
                    for layer in (block.conv_block[1], block.conv_block[5]):
                        lay_out(layer.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The translation."""
        if (self.recompute or self.winograd) and self.training and torch.is_grad_enabled():
            return self.trained(list(self.model), images)
        result: torch.Tensor = self.model(images)
        return result

    def trained(self, layers: list[nn.Module], images: torch.Tensor) -> torch.Tensor:
        """Some of its layers one after the other, by the switches."""
        run = _lean if self.recompute else _in_turn
        blocks = [layer for layer in layers if isinstance(layer, ResidualBlock)]
        at = layers.index(blocks[0]) if blocks else len(layers)
        images = run(layers[:at], images)
        if self.winograd and not images.shape[2] % 2 and not images.shape[3] % 2:
            images = _by_winograd(blocks, images)
        else:
            for block in blocks:
                images = images + run(block.conv_block, images)
        return run(layers[at + len(blocks) :], images)


def _lean(layers: Iterable[nn.Module], images: torch.Tensor) -> torch.Tensor:
    """The same as the layers one after the other, keeping what convolutions made and little else.

    Recomputation stops at the last thing that is wanted, the convolution's input: the convolution
    itself is not made twice.
    """
    segment: list[nn.Module] = []
    for layer in layers:
        segment.append(layer)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            images = recomputed(
                _in_turn, segment, images, use_reentrant=False, preserve_rng_state=False
            )
            segment = []
    return _in_turn(segment, images)


def _in_turn(layers: Iterable[nn.Module], images: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        if isinstance(layer, InstanceNorm):
            images = layer.as_groups(images)
        elif isinstance(layer, nn.ReLU):
            images = images.relu_()  # of a norm, which does not ask for its result again
        else:
            images = layer(images)
    return images


def _by_winograd(blocks: Iterable[ResidualBlock], images: torch.Tensor) -> torch.Tensor:
    last = images.permute(0, 2, 3, 1).contiguous()
    for block in blocks:
        one, norm, two = (block.conv_block[n] for n in (1, 2, 5))
        last = residual_block(last, (one.weight, one.bias), (two.weight, two.bias), norm.eps)
    back = last.permute(0, 3, 1, 2)
    return back if not images.is_contiguous() else back.contiguous()


def resnet_in(tensors: Mapping[str, Sequence[int]], prefix: str = "G_A.") -> dict[str, int]:
    """What a generator was built with: width, blocks and channels, from names and shapes.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the generator's names begin with; may be empty.

    Raises:
        MismatchError: there is no such generator, or it is of another kind: with dropout, batch
            normalisation or anti-aliasing, or with other layers.
    """
    own, said = must_have(tensors, prefix, "generator")
    _must_be_plain(own, said)
    first = own.get("model.1.weight")
    if first is None or len(first) != 4:
        raise MismatchError(f"{said} has no model.1.weight of four dimensions, its first layer")
    blocks = {match[1] for name in own if (match := re.match(r"model\.(\d+)\.conv_block\.", name))}
    if not blocks:
        raise MismatchError(f"{said} has no residual block (model.10.conv_block.1.weight, …)")
    sizes = {"width": first[0], "blocks": len(blocks), "channels": first[1]}
    must_match(own, Network(MADE_BY, sizes).shapes(), said)
    return sizes


def _must_be_plain(own: Mapping[str, Sequence[int]], said: str) -> None:
    if any(".conv_block.6.weight" in name and len(shape) == 4 for name, shape in own.items()):
        raise MismatchError(
            f"{said} has dropout (conv_block.6.weight), where one without is expected"
        )
    if len(own.get("model.2.weight", ())) == 1 or "model.2.running_mean" in own:
        raise MismatchError(
            f"{said} has batch normalisation (model.2), where instance norm is expected"
        )
    if any(name.endswith(".filt") for name in own):
        raise MismatchError(
            f"{said} has anti-aliasing filters, as those of CUT, where strided convolutions are "
            f"expected (the trainers cut and fastcut have such a generator, as G)"
        )
