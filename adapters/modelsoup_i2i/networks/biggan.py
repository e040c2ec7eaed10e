"""BigGAN's generator and discriminator, and the encoder and adaptor that DeepI2I adds to them.

Brock, Donahue and Simonyan, ICLR 2019; Wang, Yu and van de Weijer, NeurIPS 2020. Tensors have the
names of the official code; `strength` of the adaptor is ours. Pictures are N × channels × side ×
side in [−1, 1]; features are told by the side of their maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from . import biggans
from .spectral import Convolution, Embedding, Linear

Features = Mapping[int, torch.Tensor]
MOMENTUM, VARIANCE = 0.1, 1e-5  # of batch norms: what a batch moves; what is added


class Norm(nn.Module):
    """Batch normalisation whose statistics have BigGAN's names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.momentum = MOMENTUM
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def normal(self, images: torch.Tensor) -> torch.Tensor:
        """Each channel with mean 0 and variance 1: over the batch, in use by the statistics."""
        made: torch.Tensor = F.batch_norm(
            images, self.stored_mean, self.stored_var, None, None, self.training, self.momentum,
            VARIANCE,
        )  # fmt: skip
        return made


class PlainNorm(Norm):
    """One with a gain and a bias for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.ones_(self.gain)
        nn.init.zeros_(self.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        return self.normal(images) * self.gain[:, None, None] + self.bias[:, None, None]


class ConditionalNorm(Norm):
    """One whose gain and bias are made of a condition: 1 + L_g(y), L_b(y); then a ReLU."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__(channels)
        self.gain = Linear(condition, channels, bias=False)
        self.bias = Linear(condition, channels, bias=False)

    def forward(self, images: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Of the same shape, rectified."""
        gain, bias = 1 + self.gain(condition), self.bias(condition)
        if not self.training:
            spread = (self.stored_var + VARIANCE).sqrt()
            return _modulated(images, self.stored_mean, 1 / spread, gain, bias)
        own = images.detach()
        own = own.float() if own.element_size() < 4 else own  # of bf16 statistics want more digits
        variance, mean = torch.var_mean(own, (0, 2, 3), correction=0)
        count = images.numel() // images.shape[1]
        with torch.no_grad():
            self.stored_mean.lerp_(mean, self.momentum)
            self.stored_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        inverse = (variance + VARIANCE).rsqrt()
        made: torch.Tensor = _Modulated.apply(images, gain, bias, mean, inverse)
        return made


def _modulated(
    images: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor, gain: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """relu(gain · (x − mean) · inverse + bias), as one product and sum for each pixel."""
    factor = gain * inverse
    offset = bias - mean * factor
    return _sum(offset[:, :, None, None], images, factor[:, :, None, None], images).relu_()


def _sum(
    offset: torch.Tensor, values: torch.Tensor, factor: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Values · factor + offset, of the dtype of others: of bf16, numbers of each map are wider."""
    place = None
    if like.element_size() < 4 and not torch.is_grad_enabled():
        place = torch.empty_like(like)
    return torch.addcmul(offset, values, factor, out=place)


class _Modulated(torch.autograd.Function):
    """The same, of a batch whose own moments these are.

    Kept for the backward pass are the images and the result, which what follows keeps anyway; with
    torch's own norm, product and ReLU there would be a third. Its gradient for the images is a sum
    of three terms too: of the gradient, the images and a constant.
    """

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor,
        inverse: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        made = _modulated(images, mean, inverse, gain, bias)
        ctx.save_for_backward(images, made, gain, mean, inverse)
        return made

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, made, gain, mean, inverse = ctx.saved_tensors
        through = torch.ops.aten.threshold_backward(given, made, 0)
        of_bias = through.sum((2, 3), dtype=mean.dtype)
        # Σ g · n, of the images n with mean 0 and variance 1.
        of_gain = ((through * images).sum((2, 3), dtype=mean.dtype) - of_bias * mean) * inverse
        count = images.numel() // images.shape[1]
        first, second = ((gain * own).sum(0) / count for own in (of_bias, of_gain))
        slope = -second * inverse.square()
        constant = -inverse * first - slope * mean
        result = torch.addcmul(constant[:, None, None], images, slope[:, None, None])
        result = _sum(result, through, (gain * inverse)[:, :, None, None], images)
        return result, of_gain, of_bias, None, None


class Rows(nn.Embedding):
    """A vector for each class, orthogonal at first."""

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.orthogonal_(self.weight)


class Attention(nn.Module):
    """Self-attention over places, as BigGAN has it: γ · o(g βᵀ) + x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = Convolution(channels, channels // 8, 1, bias=False)
        self.phi = Convolution(channels, channels // 8, 1, bias=False)
        self.g = Convolution(channels, channels // 2, 1, bias=False)
        self.o = Convolution(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks."""
        nn.init.zeros_(self.gamma)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        height, width = images.shape[-2:]
        asked = self.theta(images).flatten(2)
        keys, values = (F.max_pool2d(of(images), 2).flatten(2) for of in (self.phi, self.g))
        shares = torch.softmax(asked.transpose(1, 2) @ keys, dim=2)
        found = (values @ shares.transpose(1, 2)).unflatten(2, (height, width))
        return torch.addcmul(images, self.gamma, self.o(found))


class Up(nn.Module):
    """A block of the generator, which doubles the side."""

    def __init__(self, ins: int, outs: int, condition: int) -> None:
        super().__init__()
        self.conv1 = Convolution(ins, outs, side="doubled")
        self.conv2 = Convolution(outs, outs)
        self.conv_sc = Convolution(ins, outs, 1)
        self.bn1 = ConditionalNorm(ins, condition)
        self.bn2 = ConditionalNorm(outs, condition)

    def forward(self, images: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """N × ins × H × W to N × outs × 2H × 2W."""
        made = self.conv1(self.bn1(images, condition))
        made = self.conv2(self.bn2(made, condition))
        # A convolution of one pixel commutes with the doubling, which then has a quarter to do.
        return made + F.interpolate(self.conv_sc(images), scale_factor=2.0)


class Down(nn.Module):
    """A block of the discriminator, the encoder and the adaptor.

    Args:
        ins: channels of what it sees.
        outs: of what it makes.
        halves: the side.
        first: it sees pictures: nothing is activated before.
    """

    def __init__(self, ins: int, outs: int, *, halves: bool, first: bool = False) -> None:
        super().__init__()
        self.halves, self.first = halves, first
        self.conv1 = Convolution(ins, outs)
        self.conv2 = Convolution(outs, outs, side="halved" if halves else "same")
        self.conv_sc = Convolution(ins, outs, 1) if halves or ins != outs else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × ins × H × W to N × outs × H × W, or half of both."""
        inner = F.relu(self.conv1(images if self.first else F.relu(images)))
        made = self.conv2(inner)
        if self.conv_sc is None:
            return images + made
        # The mean over four pixels commutes with a convolution of one.
        return made + self.conv_sc(_halved(images) if self.halves else images)


def _halved(images: torch.Tensor) -> torch.Tensor:
    """The means of 2 × 2 pixels; unlike torch's pooling it keeps nothing for the backward pass."""
    rows = images[..., ::2, :] + images[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) * 0.25


class Generator(nn.Module):
    """Makes pictures of classes out of noise, and of features that are added on the way.

    Args:
        arch: see `biggans`.
        ch: the width that all others are multiples of.
        classes: rows of the embedding.
        chunk: numbers of noise for the first layer, and for each block.
        shared: the width of the embedding.
        attention: the side of the maps that it follows; 0 is none.
        channels: of the pictures.
        least: the side of the maps that it begins with.

    Attributes:
        size: pixels of a side.
        noise: how many numbers `z` has.
    """

    multiple = 1

    def __init__(
        self, arch: biggans.Arch, ch: int, classes: int, chunk: int = 20, shared: int = 128,
        attention: int = 64, channels: int = 3, least: int = biggans.DEEPEST,
    ) -> None:  # fmt: skip
        super().__init__()
        made = {r: wide * ch for r, wide in biggans.made(arch).items() if r >= least}
        self.size, self.channels, self.least, self.chunk = max(made), channels, least, chunk
        self.noise = chunk * len(made)
        self.shared = Rows(classes, shared)
        # Where it begins later, with the width that its first block expects.
        first = made[least]
        self.linear = Linear(chunk, first * least * least)
        blocks = []
        for r in sorted(made)[1:]:
            follows = [Attention(made[r])] if r == attention else []
            blocks.append(nn.ModuleList([Up(made[r // 2], made[r], shared + chunk), *follows]))
        self.blocks = nn.ModuleList(blocks)
        self.output_layer = nn.Sequential(
            PlainNorm(made[self.size]), nn.ReLU(), Convolution(made[self.size], channels)
        )

    def embedded(self, classes: torch.Tensor) -> torch.Tensor:
        """Rows of classes, int64 N to float N × shared; of what is embedded, that itself."""
        return classes if classes.is_floating_point() else self.shared(classes)

    def conditions(self, z: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the first layer sees, and each block's condition."""
        first, *others = z.split(self.chunk, 1)
        embedded = self.embedded(classes)
        return (first, *(torch.cat([embedded, own], 1) for own in others))

    def forward(
        self, z: torch.Tensor, classes: torch.Tensor, features: Features | None = None, *,
        taps: bool = False,
    ) -> Any:  # fmt: skip
        """Pictures, N × channels × size × size in [−1, 1].

        Args:
            z: N × noise, from N(0, 1).
            classes: int64 N; or float N × shared, mixtures of rows of `shared`.
            features: by the side of their maps: what is added to the maps of that side.
            taps: return the maps of each side, after what was added, in place of pictures alone.
        """
        found = self.walk(z, classes, features)
        return found if taps else found[self.size]

    @property
    def sides(self) -> tuple[int, ...]:
        """Of its maps, in order; the last is that of pictures."""
        return tuple(self.least * 2**n for n in range(len(self.blocks) + 1))

    def walk(
        self, z: torch.Tensor, classes: torch.Tensor, features: Features | None = None
    ) -> dict[int, torch.Tensor]:
        """The maps of each side, after what was added; the pictures in the place of the last."""
        added = features or {}
        first, *conditions = self.conditions(z, classes)
        maps = self.linear(first).unflatten(1, (-1, self.least, self.least))
        found = {}
        for place, side in enumerate(self.sides):
            if place:
                maps = through(self.blocks[place - 1], maps, conditions[place - 1])
            if side in added:
                maps = maps + added[side]
            found[side] = maps
        found[side] = torch.tanh(self.output_layer(maps))
        return found


def through(
    block: Iterable[nn.Module], maps: torch.Tensor, condition: torch.Tensor
) -> torch.Tensor:
    """A block, and the attention that follows it, if one does."""
    for layer in block:
        maps = layer(maps, condition) if isinstance(layer, Up) else layer(maps)
    return maps


class OwnBlocks(nn.Module):
    """The last blocks of a generator and its last layers: what another one has for itself.

    Args:
        kept: how many of the first blocks are not among them.
        others: see `Generator`.
    """

    def __init__(self, kept: int, **others: Any) -> None:
        super().__init__()
        whole = Generator(**others)
        self.blocks = nn.ModuleDict(
            {str(n): block for n, block in enumerate(whole.blocks) if n >= kept}
        )
        self.output_layer = whole.output_layer


class Auxiliary(nn.Module):
    """A generator that has its first layers in common with another one, and sees no features.

    The batches that go through it are not those of use, so they leave the statistics of what is
    common as they are.
    """

    def __init__(self, G: Generator, X: OwnBlocks) -> None:  # noqa: N803
        super().__init__()
        self.G, self.X = G, X
        kept = len(G.blocks) - len(X.blocks)
        self.blocks = [*list(G.blocks)[:kept], *X.blocks.values()]
        self._common = [own for block in self.blocks[:kept] for own in block.modules()
                        if isinstance(own, Norm)]  # fmt: skip

    def forward(self, z: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """See `Generator`."""
        first, *conditions = self.G.conditions(z, classes)
        maps = self.G.linear(first).unflatten(1, (-1, self.G.least, self.G.least))
        for norm in self._common:
            norm.momentum = 0.0
        try:
            for block, condition in zip(self.blocks, conditions, strict=True):
                maps = through(block, maps, condition)
        finally:
            for norm in self._common:
                norm.momentum = MOMENTUM
        return torch.tanh(self.X.output_layer(maps))


class Pyramid(nn.Module):
    """The blocks that discriminator and encoder share."""

    multiple = 1

    def __init__(
        self, arch: biggans.Arch, ch: int, attention: int = 64, channels: int = 3,
        least: int = biggans.DEEPEST,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.channels = biggans.side(arch), channels
        self.sides: list[int] = []
        blocks: list[nn.Module] = []
        width, before = channels, self.size
        for side, wide in biggans.seen(arch):
            if side < least:
                break
            block = Down(width, wide * ch, halves=side < before, first=not blocks)
            width, before = wide * ch, side
            follows = [Attention(width)] if side == attention else []
            blocks.append(nn.ModuleList([block, *follows]))
            self.sides.append(side)
        self.width = width
        self.blocks = nn.ModuleList(blocks)

    def walk(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """The maps of each side: after the last block that makes such."""
        found, maps = {}, images
        for side, block in zip(self.sides, self.blocks, strict=True):
            for layer in block:
                maps = layer(maps)
            found[side] = maps
        return found


class Discriminator(Pyramid):
    """Judges pictures of classes by projection (Miyato and Koyama, ICLR 2018)."""

    def __init__(
        self, arch: biggans.Arch, ch: int, classes: int, attention: int = 64, channels: int = 3
    ) -> None:
        super().__init__(arch, ch, attention, channels)
        self.linear = Linear(self.width, 1)
        self.embed = Embedding(classes, self.width)

    def forward(self, images: torch.Tensor, classes: torch.Tensor, *, taps: bool = False) -> Any:
        """Verdicts, N × 1; with `taps` also the maps of each side, of the same pass."""
        found = self.walk(images)
        whole = F.relu(found[self.sides[-1]]).sum((2, 3))
        verdicts = self.linear(whole) + (self.embed(classes) * whole).sum(1, keepdim=True)
        return (verdicts, found) if taps else verdicts


class Encoder(Pyramid):
    """A discriminator's blocks, whose maps are what of a picture is kept.

    The deepest map is rectified, as the official code's is.
    """

    def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Maps by their side, from the deepest to a quarter of the picture's."""
        found = self.walk(images)
        last = self.sides[-1]
        found[last] = F.relu(found[last])
        return {side: found[side] for side in sorted(found) if 4 * side <= self.size}


class Adaptor(nn.Module):
    """Turns an encoder's maps into such as the generator has: a block for each side.

    Args:
        arch: see `biggans`.
        ch: of both networks.
        only: the sides that it has blocks for; all where none are named.
        least: the side of the encoder's deepest maps.
        identity: no blocks: maps are repeated until they are as wide as the generator's.
        strength: by which what it makes is multiplied, by side; in the state as `strength`.
    """

    def __init__(
        self, arch: biggans.Arch, ch: int, only: tuple[int, ...] = (), least: int = biggans.DEEPEST,
        identity: bool = False, strength: Mapping[int, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        between = {
            side: (ins * ch, outs * ch)
            for side, (ins, outs) in biggans.widths_between(arch, least).items()
            if not only or side in only
        }
        # Official code counts from the largest maps.
        self.sides = tuple(sorted(between, reverse=True))
        self.widths = between
        self.blocks = nn.ModuleList(
            [] if identity
            else [nn.ModuleList([Down(*between[side], halves=False)]) for side in self.sides]
        )  # fmt: skip
        self.given = tuple(float((strength or {}).get(side, 0.1)) for side in self.sides)
        self.register_buffer("strength", torch.tensor(self.given))

    def prepare_for(self, **_how: object) -> None:
        """A training goes by the strengths that it was given, whatever its start had."""
        self.strength.copy_(torch.tensor(self.given))

    def forward(self, features: Features, *, plain: bool = False) -> dict[int, torch.Tensor]:
        """What is added to the generator's maps, by side; `plain` is before its strength."""
        made = {}
        for place, side in enumerate(self.sides):
            own = features[side]
            if len(self.blocks):
                (block,) = self.blocks[place]
                own = block(own)
            else:
                wide = self.widths[side][1]
                own = own.repeat(1, -(-wide // own.shape[1]), 1, 1)[:, :wide]
            made[side] = own if plain else own * self.strength[place]
        return made


class Translation(nn.Module):
    """An encoder, an adaptor and a generator: a picture becomes one of a class."""

    multiple = 1

    def __init__(self, E: nn.Module, A: nn.Module, G: nn.Module) -> None:  # noqa: N803
        super().__init__()
        self.E, self.A, self.G = E, A, G
        self.size, self.channels = G.size, G.channels

    def embedded(self, classes: torch.Tensor) -> torch.Tensor:
        """See `Generator`."""
        made: torch.Tensor = self.G.embedded(classes)
        return made

    def forward(self, images: torch.Tensor, z: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Pictures of classes, for N × channels × size × size in [−1, 1]; see `Generator`."""
        made: torch.Tensor = self.G(z, classes, self.A(self.E(images)))
        return made
