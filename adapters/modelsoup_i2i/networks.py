"""CycleGAN's generator and discriminator in torch, with the official names, and their loading.

Zhu et al., "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV
2017, appendix 7.2. InstanceNorm has neither parameters nor statistics, so a checkpoint holds the
weights and biases of convolutions alone, and averaging checkpoints leaves nothing to repair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from modelsoup import CheckpointError, MismatchError, ParameterError, open_checkpoint

from .shapes import (
    DIRECTIONS,
    MULTIPLE,
    DiscriminatorShape,
    GeneratorShape,
    discriminator_tensors,
    discriminator_widths,
    generator_shape_of,
    generator_tensors,
)
from .winograd import lay_out, residual_block

__all__ = [
    "DiscriminatorShape",
    "GeneratorShape",
    "PatchDiscriminator",
    "ResnetGenerator",
    "at_any_size",
    "discriminator_tensors",
    "generator_shape_in",
    "generator_shape_of",
    "generator_tensors",
    "load_generator",
    "padded",
]

SPREAD = 0.02  # the standard deviation of all initial weights


class Convolution(nn.Conv2d):
    """A convolution that initialises itself as CycleGAN does: N(0, 0.02), and biases of 0."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        _reset(self)


class TransposedConvolution(nn.ConvTranspose2d):
    """The same for the layers that double the size."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        _reset(self)


def _reset(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    nn.init.normal_(layer.weight, 0.0, SPREAD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class InstanceNorm(nn.InstanceNorm2d):
    """The same in any memory layout.

    For a single image in channels-last, torch's (2.13, on a CPU) gives wrong gradients without a
    word; a group for each channel is the same norm, and is right.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Each channel of each image with mean 0 and variance 1."""
        result: torch.Tensor
        if images.is_contiguous():
            result = super().forward(images)
        else:
            result = self.as_groups(images)
        return result

    def as_groups(self, images: torch.Tensor) -> torch.Tensor:
        """The same by torch's group norm, which on a CPU is also the faster one."""
        result: torch.Tensor = nn.functional.group_norm(images, self.num_features, eps=self.eps)
        return result


class ResidualBlock(nn.Module):
    """x + conv_block(x), with nothing after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            Convolution(channels, channels, 3),
            InstanceNorm(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            Convolution(channels, channels, 3),
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

    recompute = False
    winograd = False

    def __init__(self, shape: GeneratorShape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or GeneratorShape()
        width, channels = shape.width, shape.channels
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3), Convolution(channels, width, 7),
            InstanceNorm(width), nn.ReLU(),
        ]  # fmt: skip
        for wide in (width, 2 * width):
            layers += [
                Convolution(wide, 2 * wide, 3, stride=2, padding=1),
                InstanceNorm(2 * wide), nn.ReLU(),
            ]  # fmt: skip
        layers += [ResidualBlock(4 * width) for _ in range(shape.blocks)]
        for wide in (4 * width, 2 * width):
            layers += [
                TransposedConvolution(wide, wide // 2, 3, stride=2, padding=1, output_padding=1),
                InstanceNorm(wide // 2), nn.ReLU(),
            ]  # fmt: skip
        layers += [nn.ReflectionPad2d(3), Convolution(width, channels, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

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
            return self._trained(images)
        result: torch.Tensor = self.model(images)
        return result

    def _trained(self, images: torch.Tensor) -> torch.Tensor:
        run = _lean if self.recompute else _in_turn
        layers = list(self.model)
        blocks = [layer for layer in layers if isinstance(layer, ResidualBlock)]
        at = layers.index(blocks[0])
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


class PatchDiscriminator(nn.Module):
    """Judges patches: N × channels × H × W in [−1, 1] to N × 1 × h × w, 1 for real, 0 for fake.

    Images of 256² give 30², of 128² 14², of 64² 6².
    """

    def __init__(self, shape: DiscriminatorShape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or DiscriminatorShape()
        widths = discriminator_widths(shape)
        layers: list[nn.Module] = [
            Convolution(shape.channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)
        ]  # fmt: skip
        for index in range(1, len(widths)):
            stride = 2 if index < shape.layers else 1
            layers += [
                Convolution(widths[index - 1], widths[index], 4, stride=stride, padding=1),
                InstanceNorm(widths[index]), nn.LeakyReLU(0.2),
            ]  # fmt: skip
        layers.append(Convolution(widths[-1], 1, 4, padding=1))
        self.model = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The verdicts; no sigmoid."""
        result: torch.Tensor = self.model(images)
        return result


def padded(images: torch.Tensor, multiple: int = MULTIPLE) -> torch.Tensor:
    """Images continued by reflection at the right and at the bottom, to multiples of some number.

    A side shorter than twice that becomes twice that: where a network halves its images, padding
    by reflection in its middle needs two pixels.
    """
    height, width = images.shape[-2:]
    high, wide = (max(side, 2 * multiple) for side in (height, width))
    below, right = high + -high % multiple - height, wide + -wide % multiple - width
    if not below and not right:
        return images
    kind = "reflect" if below < height and right < width else "replicate"
    made: torch.Tensor = nn.functional.pad(images, (0, right, 0, below), mode=kind)
    return made


def at_any_size(
    network: nn.Module | Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor,
    multiple: int = MULTIPLE,
) -> torch.Tensor:  # fmt: skip
    """Translate images whose sides need not be multiples of what a network wants: cut back."""
    height, width = images.shape[-2:]
    whole = padded(images, multiple)
    result: torch.Tensor = network(whole)
    return result if whole is images else result[..., :height, :width]


def generator_shape_in(checkpoint: str | Path, direction: str = "x2y") -> GeneratorShape:
    """The shape of one generator of a checkpoint.

    Raises:
        as `load_generator`.
    """
    if direction not in DIRECTIONS:
        raise ParameterError(f"the direction is {direction!r}, but must be x2y or y2x")
    shapes = {name: info.shape for name, info in open_checkpoint(checkpoint).tensors.items()}
    try:
        return generator_shape_of(shapes, f"{DIRECTIONS[direction]}.")
    except MismatchError as error:
        raise MismatchError(f"{checkpoint}: {error}") from None


def load_generator(checkpoint: str | Path, direction: str = "x2y") -> ResnetGenerator:
    """One generator of a checkpoint, in eval mode, in float32 on the CPU.

    Args:
        checkpoint: a safetensors file with `G_A.*` (X to Y) or `G_B.*` (Y to X).
        direction: `x2y` or `y2x`.

    Raises:
        ParameterError: another direction.
        CheckpointError: the file is missing or damaged.
        MismatchError: it holds no such generator, or one of another kind.
    """
    shape = generator_shape_in(checkpoint, direction)
    network, opened = ResnetGenerator(shape), open_checkpoint(checkpoint)
    prefix = f"{DIRECTIONS[direction]}."
    state = {}
    for name in generator_tensors(shape):
        values = np.asarray(opened[prefix + name], np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{checkpoint}: {prefix + name} holds NaN or infinity")
        state[name] = torch.from_numpy(values)
    network.load_state_dict(state)
    network.eval()
    return network
