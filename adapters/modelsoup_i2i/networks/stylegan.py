"""StyleGAN, and DeepI2I's encoder and adaptors for it, with the names of the usual torch code.

Karras, Laine and Aila, "A Style-Based Generator Architecture for Generative Adversarial Networks",
CVPR 2019; names are those of rosinality's style-based-gan-pytorch, on which DeepI2I (Wang et al.,
NeurIPS 2020) and TransferI2I (ICCV 2021) build. Only what images of a size go through is built,
under the numbers that it has among all blocks up to 1024 × 1024; nothing is faded in.

Weights are kept as N(0, 1) and scaled when they are used ("equalised learning rate"), so that an
optimiser moves all layers alike. The mapping network, `style`, is meant to learn at
`stylegans.MAPPING_RATE` of the rate. Pictures are N × channels × side × side, about [−1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from . import stylegans
from .layers import InstanceNorm

Features = Mapping[int, torch.Tensor]
_LEAKY = 0.2
_FUSED = 128  # from this side on, a convolution of stride 2 takes the place of two layers
_EPS = 1e-8


class Equalised(nn.Module):
    """A weight of N(0, 1) and a bias; `weight()` is the former times √(2 / what goes in)."""

    def __init__(self, *shape: int, ones: int = 0) -> None:
        """Make them.

        Args:
            shape: of the weight; its first number is what comes out.
            ones: how many biases begin as 1, and not 0.
        """
        super().__init__()
        self.bias = nn.Parameter(torch.empty(shape[0]))
        self.weight_orig = nn.Parameter(torch.empty(*shape))
        self.scale, self.ones = math.sqrt(2 / math.prod(shape[1:])), ones
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.normal_(self.weight_orig)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.bias.detach()[: self.ones])

    def weight(self) -> torch.Tensor:
        """As it is used."""
        return self.weight_orig * self.scale


class Convolution(nn.Module):
    """An equalised convolution of stride 1."""

    def __init__(self, ins: int, outs: int, kernel: int = 3, padding: int | None = None) -> None:
        super().__init__()
        self.conv = Equalised(outs, ins, kernel, kernel)
        self.padding = kernel // 2 if padding is None else padding

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × ins × H × W to N × outs × H × W, where nothing else is said of the padding."""
        made: torch.Tensor = F.conv2d(
            images, self.conv.weight(), self.conv.bias, padding=self.padding
        )
        return made


class Linear(nn.Module):
    """An equalised matrix."""

    def __init__(self, ins: int, outs: int, ones: int = 0) -> None:
        super().__init__()
        self.linear = Equalised(outs, ins, ones=ones)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """N × ins to N × outs."""
        made: torch.Tensor = F.linear(values, self.linear.weight(), self.linear.bias)
        return made


class Fused(nn.Module):
    """A 3 × 3 convolution and a change of size by two in one: 4 × 4 with stride 2."""

    def __init__(self, ins: int, outs: int, *, up: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*((ins, outs) if up else (outs, ins)), 3, 3))
        self.bias = nn.Parameter(torch.empty(outs))
        self.up, self.scale = up, math.sqrt(2 / (9 * ins))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × ins × H × W to N × outs × 2H × 2W, or × H/2 × W/2."""
        # The mean over each 2 × 2 places of the padded kernel.
        kernel = F.avg_pool2d(F.pad(self.weight * self.scale, (1, 1, 1, 1)), 2, stride=1)
        change = F.conv_transpose2d if self.up else F.conv2d
        made: torch.Tensor = change(images, kernel, self.bias, stride=2, padding=1)
        return made


class Blur(nn.Module):
    """Each channel with the kernel 1, 2, 1 in both directions; the buffers are constants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "weight_flip"):  # symmetric: the second is the first
            kernel = torch.empty(channels, 1, 3, 3)
            kernel.copy_(
                torch.tensor([1.0, 2.0, 1.0, 2.0, 4.0, 2.0, 1.0, 2.0, 1.0]).view(3, 3) / 16
            )
            self.register_buffer(name, kernel)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        made: torch.Tensor = F.conv2d(images, self.weight, padding=1, groups=images.shape[1])
        return made


class Noise(nn.Module):
    """One map of noise for all channels, each with a weight of its own that begins as 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight_orig = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.scale = math.sqrt(2 / channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.zeros_(self.weight_orig)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Images with noise, N × 1 × H × W or 1 × 1 × H × W."""
        return images + (self.weight_orig * self.scale * noise).to(images.dtype)


class AdaptiveNorm(nn.Module):
    """Instance normalisation whose scales and shifts a style gives."""

    def __init__(self, channels: int, code: int) -> None:
        super().__init__()
        self.norm = InstanceNorm(channels)
        self.style = Linear(code, 2 * channels, ones=channels)

    def forward(self, images: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """Of the same shape; `style` is N × code."""
        scale, shift = self.style(style)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(shift, scale, self.norm(images))


class Constant(nn.Module):
    """What a generator begins with instead of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.empty(1, channels, 4, 4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.normal_(self.input)

    def forward(self, others: torch.Tensor) -> torch.Tensor:
        """As many as there are others."""
        return self.input.expand(len(others), -1, -1, -1)


class StyledBlock(nn.Module):
    """A doubling, but in the first, and twice noise, LeakyReLU and adaptive normalisation."""

    def __init__(self, side: int, width: int, code: int) -> None:
        super().__init__()
        ins, outs = stylegans.wide(max(side // 2, 4), width), stylegans.wide(side, width)
        self.conv1: nn.Module
        if side == 4:
            self.conv1 = Constant(outs)
        elif side < _FUSED:
            self.conv1 = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"), Convolution(ins, outs), Blur(outs)
            )
        else:
            self.conv1 = nn.Sequential(Fused(ins, outs, up=True), Blur(outs))
        self.noise1, self.adain1 = Noise(outs), AdaptiveNorm(outs, code)
        self.conv2 = Convolution(outs, outs)
        self.noise2, self.adain2 = Noise(outs), AdaptiveNorm(outs, code)

    def forward(
        self, images: torch.Tensor, style: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Features of twice the side; the first block looks only at how many images there are."""
        made = F.leaky_relu(self.noise1(self.conv1(images), noise), _LEAKY)
        made = self.conv2(self.adain1(made, style))
        result: torch.Tensor = self.adain2(F.leaky_relu(self.noise2(made, noise), _LEAKY), style)
        return result


class PixelNorm(nn.Module):
    """Vectors of mean square 1."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Of the same shape, N × any."""
        return values * (values.square().mean(1, keepdim=True) + _EPS).rsqrt()


class Synthesis(nn.Module):
    """Pictures of styles: block by block from 4 × 4 on."""

    def __init__(
        self, size: int, width: int, code: int, channels: int, *, full: bool = False, kept: int = 0
    ) -> None:
        super().__init__()
        built = stylegans.sides(stylegans.MOST if full else size)[kept:]
        self.progression = nn.ModuleDict(
            {stylegans.draws(side): StyledBlock(side, width, code) for side in built}
        )
        self.to_rgb = nn.ModuleDict({
            stylegans.draws(side): Convolution(stylegans.wide(side, width), channels, 1)
            for side in built if side == size or full
        })  # fmt: skip
        for side in stylegans.sides(size):
            fixed = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(side))
            self.register_buffer(f"noise{side}", fixed, persistent=False)

    def block(self, side: int) -> nn.Module:
        """The one that makes maps of a side."""
        return self.progression[stylegans.draws(side)]

    def pictured(self, maps: torch.Tensor) -> torch.Tensor:
        """Pictures, of the last block's maps."""
        made: torch.Tensor = self.to_rgb[stylegans.draws(maps.shape[-1])](maps)
        return made

    def noise(self, side: int, count: int) -> torch.Tensor:
        """Drawn by torch's generator in training, for each picture; otherwise always the same."""
        fixed = self.get_buffer(f"noise{side}")
        return torch.randn_like(fixed.expand(count, -1, -1, -1)) if self.training else fixed


class Generator(nn.Module):
    """Makes pictures out of noise, and of features that are added on the way.

    In training each call draws noise for every block, and with the probability `mixing` the blocks
    from some place on follow the styles of other vectors than `z` (style mixing). In evaluation
    mode the blocks' noise is always the same, so that a picture depends on its `z` alone.

    Args:
        size: pixels of a side: a power of two from 64 to 1024.
        width: channels of maps up to 32 × 32; of larger ones half as many with each doubling.
        code: how many numbers `z` and styles have.
        depth: layers of the mapping network.
        channels: of the pictures.
        mixing: see above.
        official_layout: build all blocks up to 1024, as official code does, though none but those
            of `size` are used.

    Attributes:
        noise: how many numbers `z` has.
        sides: of its maps, in order; the last is that of pictures.
    """

    multiple = 1

    def __init__(
        self, size: int = 256, width: int = 512, code: int = 512, depth: int = 8,
        channels: int = 3, mixing: float = 0.9, official_layout: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        stylegans.must_be_a_size(size)
        self.size, self.channels, self.noise, self.mixing = size, channels, code, mixing
        self.sides = stylegans.sides(size)
        self.generator = Synthesis(size, width, code, channels, full=official_layout)
        layers: list[nn.Module] = [PixelNorm()]
        for _ in range(depth):
            layers += [Linear(code, code), nn.LeakyReLU(_LEAKY)]
        self.style = nn.Sequential(*layers)

    def forward(
        self, z: torch.Tensor, classes: object = None, features: Features | None = None, *,
        taps: bool = False,
    ) -> Any:  # fmt: skip
        """Pictures, N × channels × size × size.

        Args:
            z: N × code, from N(0, 1).
            classes: not looked at, as there is one domain.
            features: by the side of their maps: what is added to the maps of that side.
            taps: return the maps of each side, after what was added, in place of pictures alone.
        """
        found = self.walk(z, classes, features)
        return found if taps else found[self.size]

    def walk(
        self, z: torch.Tensor, classes: object = None, features: Features | None = None
    ) -> dict[int, torch.Tensor]:
        """The maps of each side, after what was added; the pictures in the place of the last."""
        added = features or {}
        maps, found = z, {}  # the first block looks at how many there are
        for side, style in zip(self.sides, self.styles(z), strict=True):
            maps = self.generator.block(side)(maps, style, self.generator.noise(side, len(z)))
            if side in added:
                maps = maps + added[side]
            found[side] = maps
        found[self.size] = self.generator.pictured(maps)
        return found

    def styles(self, z: torch.Tensor) -> list[torch.Tensor]:
        """One for each block, N × code."""
        first, blocks = self.style(z), len(self.sides)
        if not self.training or not self.mixing:
            return [first] * blocks
        # Chosen without a look at values: no GPU is waited for, and memory is known beforehand.
        mixed = torch.rand((), device=z.device) < self.mixing
        place = torch.randint(1, blocks, (), device=z.device)
        other = self.style(torch.randn_like(z))
        return [torch.where(mixed & (place <= n), other, first) for n in range(blocks)]


class OwnBlocks(nn.Module):
    """The last blocks of a generator and its last layer: what another one has for itself.

    Args:
        kept: how many of the first blocks are not among them.
        others: see `Generator`; what is of the mapping network is not used.
    """

    def __init__(
        self, kept: int, size: int, width: int, code: int, channels: int = 3, **others: Any
    ) -> None:
        super().__init__()
        self.generator = Synthesis(size, width, code, channels, kept=kept)


class Auxiliary(nn.Module):
    """A generator with another one's mapping network and first blocks, which sees no features."""

    def __init__(self, G: Generator, X: OwnBlocks) -> None:  # noqa: N803
        super().__init__()
        self.G, self.X = G, X
        own = list(X.generator.progression.values())
        self.blocks = [*list(G.generator.progression.values())[: len(G.sides) - len(own)], *own]

    def forward(self, z: torch.Tensor, classes: object = None) -> torch.Tensor:
        """See `Generator`."""
        maps = z
        for side, block, style in zip(self.G.sides, self.blocks, self.G.styles(z), strict=True):
            maps = block(maps, style, self.G.generator.noise(side, len(z)))
        return self.X.generator.pictured(maps)


class JudgingBlock(nn.Module):
    """Two convolutions; the second halves the side, or ends with one place of a 4 × 4 map."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        ins = stylegans.wide(side, width)
        outs = stylegans.wide(side // 2, width) if side > stylegans.DEEPEST else width
        second: list[nn.Module]
        if side == stylegans.DEEPEST:
            ins, second = ins + 1, [Convolution(outs, outs, 4, padding=0)]
        elif side < _FUSED:
            second = [Blur(outs), Convolution(outs, outs), nn.AvgPool2d(2)]
        else:
            second = [Blur(outs), Fused(outs, outs, up=False)]
        self.conv1 = nn.Sequential(Convolution(ins, outs), nn.LeakyReLU(_LEAKY))
        self.conv2 = nn.Sequential(*second, nn.LeakyReLU(_LEAKY))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of half the side, or of 1 × 1."""
        made: torch.Tensor = self.conv2(self.conv1(images))
        return made


class Pyramid(nn.Module):
    """The blocks that discriminator and encoder share.

    Args:
        size: pixels of a side: a power of two from 64 to 1024.
        width: as the generator's.
        channels: of the pictures.
        rgb_activation: whether LeakyReLU follows the layer that sees the picture. Older code has
            none there, and another name for that layer.
        official_layout: as the generator's.

    Attributes:
        sides: of the maps that its blocks make, the largest first.
    """

    multiple = 1
    judges = False  # whether there is the last block, which makes a verdict

    def __init__(
        self, size: int = 256, width: int = 512, channels: int = 3, rgb_activation: bool = True,
        official_layout: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        stylegans.must_be_a_size(size)
        self.size, self.channels = size, channels
        self.sides = tuple(sorted(stylegans.sides(size // 2), reverse=True))
        built = sorted(stylegans.sides(stylegans.MOST if official_layout else size), reverse=True)
        self.progression = nn.ModuleDict({
            stylegans.judges(side): JudgingBlock(side, width) for side in built
            if side > stylegans.DEEPEST or self.judges
        })  # fmt: skip
        self.from_rgb = nn.ModuleDict({
            stylegans.judges(side): self._first(side, width, rgb_activation)
            for side in built if side == size or official_layout
        })  # fmt: skip

    def _first(self, side: int, width: int, activated: bool) -> nn.Module:
        made = Convolution(self.channels, stylegans.wide(side, width), 1)
        return nn.Sequential(made, nn.LeakyReLU(_LEAKY)) if activated else made

    def walk(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """The maps of each side, from half the picture's to 4."""
        maps, found = self.from_rgb[stylegans.judges(self.size)](images), {}
        for side in self.sides:
            maps = self.progression[stylegans.judges(2 * side)](maps)
            found[side] = maps
        return found


class Discriminator(Pyramid):
    """Judges pictures, each beside the others of its batch (minibatch standard deviation)."""

    judges, compares = True, True  # the latter: `Stage.both` shows it real and made ones apart

    def __init__(
        self, size: int = 256, width: int = 512, channels: int = 3, rgb_activation: bool = True,
        official_layout: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(size, width, channels, rgb_activation, official_layout)
        self.linear = Linear(width, 1)

    def forward(self, images: torch.Tensor, classes: object = None, *, taps: bool = False) -> Any:
        """Verdicts, N × 1; with `taps` also the maps of each side, of the same pass."""
        found = self.walk(images)
        maps = found[stylegans.DEEPEST]
        # In float32, as a variance of few values is lost in less.
        spread = (maps.float().var(0, unbiased=False) + _EPS).sqrt().mean().to(maps.dtype)
        seen = torch.cat([maps, spread.expand(len(maps), 1, *maps.shape[-2:])], 1)
        whole = self.progression[stylegans.judges(stylegans.DEEPEST)](seen)
        verdicts = self.linear(whole.flatten(1))
        return (verdicts, found) if taps else verdicts


class Encoder(Pyramid):
    """A discriminator's blocks but the last, whose maps are what of a picture is kept."""

    def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Maps by their side, of `stylegans.TAPS`."""
        found = self.walk(images)
        return {side: found[side] for side in stylegans.TAPS}


class Adaptor(nn.Module):
    """Turns an encoder's maps into such as are added to the generator's, at each side by itself.

    Args:
        width: of the maps.
        kind: what there is for each side: `single`, one convolution, as TransferI2I has it;
            `deepi2i`, two of them with LeakyReLU after both; `identity`, nothing.
        only: the sides that are adapted; all of `stylegans.TAPS` where none are named.
        strength: by which what it makes is multiplied, by side; in the state as `strength`.
        official_layout: with `deepi2i`, the block for 64 × 64 too, which is not used.
    """

    def __init__(
        self, width: int = 512, kind: stylegans.Kind = "single", only: Sequence[int] = (),
        strength: Mapping[int, float] | None = None, official_layout: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sides = tuple(s for s in sorted(stylegans.TAPS, reverse=True) if not only or s in only)
        built = [2 * max(stylegans.TAPS), *self.sides] if official_layout else self.sides
        self.progression = nn.ModuleDict({
            stylegans.adapts(side): self._block(stylegans.wide(side, width), kind)
            for side in built if kind != "identity"
        })  # fmt: skip
        self.given = tuple(float((strength or {}).get(side, 0.1)) for side in self.sides)
        self.register_buffer("strength", torch.tensor(self.given))

    @staticmethod
    def _block(width: int, kind: stylegans.Kind) -> nn.Module:
        return Convolution(width, width) if kind == "single" else AdaptingBlock(width)

    def prepare_for(self, **_how: object) -> None:
        """A training goes by the strengths that it was given, whatever its start had."""
        self.strength.copy_(torch.tensor(self.given))

    def forward(self, features: Features, *, plain: bool = False) -> dict[int, torch.Tensor]:
        """What is added to the generator's maps, by side; `plain` is before its strength."""
        made = {}
        for place, side in enumerate(self.sides):
            own = features[side]
            if len(self.progression):
                own = self.progression[stylegans.adapts(side)](own)
            made[side] = own if plain else own * self.strength[place]
        return made


class AdaptingBlock(nn.Module):
    """Two convolutions with LeakyReLU after both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Sequential(Convolution(width, width), nn.LeakyReLU(_LEAKY)) for _ in range(2)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        made: torch.Tensor = self.conv2(self.conv1(images))
        return made


class Translation(nn.Module):
    """An encoder, an adaptor and a generator: a picture becomes one of the generator's domain."""

    multiple = 1

    def __init__(self, E: nn.Module, A: nn.Module, G: nn.Module) -> None:  # noqa: N803
        super().__init__()
        self.E, self.A, self.G = E, A, G
        self.size, self.channels = G.size, G.channels

    def forward(self, images: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Pictures for N × channels × size × size, and N × code of noise."""
        made: torch.Tensor = self.G(z, None, self.A(self.E(images)))
        return made
