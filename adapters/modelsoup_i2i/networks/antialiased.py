"""CUT's networks, with the official names: a ResNet and a PatchGAN that blur where they halve.

Park, Efros, Zhang and Zhu, "Contrastive Learning for Unpaired Image-to-Image Translation", ECCV
2020; the filters are Zhang's, "Making Convolutional Networks Shift-Invariant Again", ICML 2019. A
strided convolution is one of stride 1 and a blurred choice of every second place.

The filters are constants, which official files have as `filt`, so they are buffers here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modelsoup import MismatchError

from . import antialiaseds as known
from .described import Network
from .layers import SPREAD, InstanceNorm, padded
from .patches import widths
from .repeatable import ReflectionPad, doubled, reflected
from .resnet import ResidualBlock, ResnetGenerator
from .shapes import must_have, must_match, part_of


class XavierConvolution(nn.Conv2d):
    """A convolution that initialises itself as CUT does: Xavier's normal, and biases of 0."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        _reset(self)


class XavierLinear(nn.Linear):
    """The same for vectors."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        _reset(self)


def _reset(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.xavier_normal_(layer.weight, SPREAD)
    nn.init.zeros_(layer.bias)


class _Filter(nn.Module):
    """A filter for each channel, the same for all."""

    numbers: tuple[float, ...] = ()

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor(self.numbers)
        filt = torch.zeros(channels, 1, len(self.numbers), len(self.numbers))
        filt.copy_(row[:, None] * row)
        self.register_buffer("filt", filt)


class Halved(_Filter):
    """Blurred by [1 2 1] ⊗ [1 2 1] / 16, and every second place of it."""

    numbers = (0.25, 0.5, 0.25)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × C × H × W to half the height and width, rounded up."""
        around = reflected(images, (1, 1, 1, 1))
        result: torch.Tensor = F.conv2d(around, self.filt, stride=2, groups=len(self.filt))
        return result


class Doubled(_Filter):
    """Blurred by [1 3 3 1] ⊗ [1 3 3 1] / 16 after zeros between all places, edges continued.

    That is linear interpolation, by which it is computed: twenty times as fast as the transposed
    convolution, forth and back, where channels come last.
    """

    numbers = (0.25, 0.75, 0.75, 0.25)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × C × H × W to twice the height and width."""
        return doubled(images)


class AntialiasedGenerator(ResnetGenerator):
    """Translates images: N × channels × H × W in [−1, 1], to the same shape and range.

    Sizes and switches are those of `ResnetGenerator`.
    """

    def layers_of(self, width: int, blocks: int, channels: int) -> list[nn.Module]:
        """See `ResnetGenerator`."""
        layers: list[nn.Module] = [
            ReflectionPad(3), XavierConvolution(channels, width, 7),
            InstanceNorm(width), nn.ReLU(),
        ]  # fmt: skip
        for wide in (2 * width, 4 * width):
            layers += [
                XavierConvolution(wide // 2, wide, 3, padding=1), InstanceNorm(wide), nn.ReLU(),
                Halved(wide),
            ]  # fmt: skip
        layers += [ResidualBlock(4 * width, XavierConvolution) for _ in range(blocks)]
        for wide in (4 * width, 2 * width):
            layers += [
                Doubled(wide), XavierConvolution(wide, wide // 2, 3, padding=1),
                InstanceNorm(wide // 2), nn.ReLU(),
            ]  # fmt: skip
        return [*layers, ReflectionPad(3), XavierConvolution(width, channels, 7), nn.Tanh()]

    def tapped(self, images: torch.Tensor, *, to_the_end: bool) -> list[torch.Tensor]:
        """The maps that PatchNCE compares, N × C × h × w, and with `to_the_end` the translation."""
        layers, maps, first = list(self.model), [], 0
        ends = [*(tap + 1 for tap in known.TAPS), *([len(layers)] if to_the_end else [])]
        for end in ends:
            if (self.recompute or self.winograd) and self.training:
                images = self.trained(layers[first:end], images)
            else:
                for layer in layers[first:end]:
                    images = layer(images)
            maps.append(images)
            first = end
        return maps


class Tapped(nn.Module):
    """A generator that gives the maps within it, for images of any size."""

    def __init__(self, G: AntialiasedGenerator) -> None:  # noqa: N803
        super().__init__()
        self.G = G

    def forward(self, images: torch.Tensor, to_the_end: bool = True) -> list[torch.Tensor]:
        """Five maps, N × C × h × w, and with `to_the_end` a translation as large as the images."""
        height, width = images.shape[-2:]
        made = self.G.tapped(padded(images, self.G.multiple), to_the_end=to_the_end)
        if to_the_end:
            made[-1] = made[-1][..., :height, :width]
        return made


class AntialiasedDiscriminator(nn.Module):
    """Judges patches: N × channels × H × W in [−1, 1] to N × 1 × h × w, 1 for real, 0 for fake.

    Images of 256² give 30², of 128² 14², of 64² 6².
    """

    def __init__(self, width: int = 64, layers: int = 3, channels: int = 3) -> None:
        """Build it.

        Args:
            width: channels after the first layer, `ndf`.
            layers: that halve.
            channels: of the images.
        """
        super().__init__()
        made: list[nn.Module] = [
            XavierConvolution(channels, width, 4, padding=1), nn.LeakyReLU(0.2), Halved(width)
        ]  # fmt: skip
        wide = widths(width, layers)
        for n in range(1, layers + 1):
            made += [
                XavierConvolution(wide[n - 1], wide[n], 4, padding=1), InstanceNorm(wide[n]),
                nn.LeakyReLU(0.2), *([Halved(wide[n])] if n < layers else []),
            ]  # fmt: skip
        self.model = nn.Sequential(*made, XavierConvolution(wide[-1], 1, 4, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The verdicts; no sigmoid."""
        result: torch.Tensor = self.model(images)
        return result


class Projection(nn.Module):
    """Vectors of length 1 for places in maps: two linear layers for the channels of each map."""

    def __init__(self, width: int = 256, of: int = 64, channels: int = 3) -> None:
        """Build it at once; the official one is built by the first batch.

        Args:
            width: numbers in a vector.
            of: the width of the generator.
            channels: of its images.
        """
        super().__init__()
        for n, wide in enumerate(known.tapped_widths(of, channels)):
            layers = nn.Sequential(XavierLinear(wide, width), nn.ReLU(), XavierLinear(width, width))
            self.add_module(f"mlp_{n}", layers)

    def forward(
        self, maps: Sequence[torch.Tensor], places: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The vectors.

        Args:
            maps: five, N × C × h × w.
            places: in each of them, N × S, row by row.

        Returns:
            for each map N × S × width.
        """
        made = []
        for n, (own, at) in enumerate(zip(maps, places, strict=True)):
            rows = at[:, None].expand(-1, own.shape[1], -1)
            seen = own.flatten(2).gather(2, rows).transpose(1, 2)
            vectors = self.get_submodule(f"mlp_{n}")(seen)
            vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            made.append(vectors / (vectors.norm(dim=2, keepdim=True) + 1e-7))
        return made


def generator_in(tensors: Mapping[str, Sequence[int]], prefix: str = "G.") -> dict[str, int]:
    """What a generator was built with: width, blocks and channels, from names and shapes.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the generator's names begin with; may be empty.

    Raises:
        MismatchError: there is no such generator, or it is of another kind.
    """
    own, said = must_have(tensors, prefix, "generator")
    first = _first(own, "model.1.weight", said)
    if not any(name.endswith(".filt") for name in own):
        raise MismatchError(f"{said} has no anti-aliasing filters (model.7.filt), as CUT's has")
    blocks = {match[1] for name in own if (match := re.match(r"model\.(\d+)\.conv_block\.", name))}
    if len(blocks) < known.BLOCKS:
        raise MismatchError(
            f"{said} has {len(blocks)} residual blocks, of which the fifth is compared"
        )
    sizes = {"width": first[0], "blocks": len(blocks), "channels": first[1]}
    must_match(own, Network(known.GENERATOR, sizes).shapes(), said)
    return sizes


def discriminator_in(tensors: Mapping[str, Sequence[int]], prefix: str = "D.") -> dict[str, int]:
    """What a discriminator was built with: width, layers and channels; as `generator_in`."""
    own, said = part_of(tensors, prefix, "discriminator")
    first = _first(own, "model.0.weight", said)
    layers = max(sum(name.endswith(".weight") for name in own) - 2, 1)
    sizes = {"width": first[0], "layers": layers, "channels": first[1]}
    must_match(own, Network(known.DISCRIMINATOR, sizes).shapes(), said)
    return sizes


def projection_in(tensors: Mapping[str, Sequence[int]], prefix: str = "F.") -> dict[str, int]:
    """What a projection was built with: width, that of the generator, channels; likewise."""
    own, said = part_of(tensors, prefix, "projection")
    wide, channels = _first(own, "mlp_0.0.weight", said, 2)
    of = own.get("mlp_1.0.weight", (0, 2))[1] // 2
    sizes = {"width": wide, "of": of, "channels": channels}
    must_match(own, Network(known.PROJECTION, sizes).shapes(), said)
    return sizes


def _first(
    own: Mapping[str, tuple[int, ...]], name: str, said: str, dimensions: int = 4
) -> tuple[int, ...]:
    first = own.get(name)
    if first is None or len(first) != dimensions:
        words = {2: "two", 4: "four"}[dimensions]
        raise MismatchError(f"{said} has no {name} of {words} dimensions, its first layer")
    return first
