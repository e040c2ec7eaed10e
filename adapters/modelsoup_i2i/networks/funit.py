"""FUNIT's generator and discriminator (Liu et al., ICCV 2019), as BalaGAN has them too.

Patashnik, Danon, Zhang and Cohen-Or, "BalaGAN: Image Translation Between Imbalanced Domains via
Cross-Modality Knowledge Transfer", 2020, adds a second head to the discriminator. Names of tensors
are those of the official checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .adain import MLP, ContentEncoder, Convolution, Decoder, StyleEncoder
from .repeatable import ReflectionPad


class Generator(nn.Module):
    """Gives a picture the style of others.

    Args:
        width: channels after the first layer of both encoders.
        downs: how often the content is halved.
        blocks: residual blocks of the content encoder, and of the decoder.
        style_downs: how often the style encoder halves.
        latent: numbers of a style.
        mlp: width of the MLP.
        channels: of the pictures.
    """

    def __init__(
        self, width: int = 64, downs: int = 3, blocks: int = 2, style_downs: int = 4,
        latent: int = 64, mlp: int = 256, channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.multiple, self.channels = 1 << downs, channels
        self.enc_class_model = StyleEncoder(width, style_downs, latent, channels)
        self.enc_content = ContentEncoder(width, downs, blocks, channels)
        self.dec = Decoder(width, downs, blocks, channels)
        self.mlp = MLP(latent, self.dec.given, mlp)

    def forward(self, images: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
        """Pictures in [−1, 1], as many as there are styles.

        Args:
            images: N × channels × H × W in [−1, 1].
            styles: N × latent, or m · N × latent: each picture in m styles, the first N first.
        """
        content = self.enc_content(images)
        several = len(styles) // len(content)
        if several > 1:  # a picture's content is found once
            content = content.repeat(several, 1, 1, 1)
        made: torch.Tensor = self.dec(content, self.mlp(styles))
        return made


class Styles(nn.Module):
    """The style encoder of a generator."""

    def __init__(self, G: Generator) -> None:  # noqa: N803
        super().__init__()
        self.G, self.channels = G, G.channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × channels × H × W in [−1, 1] to N × latent."""
        styles: torch.Tensor = self.G.enc_class_model(images)
        return styles


class Activated(nn.Module):
    """A convolution of what LeakyReLU leaves."""

    def __init__(
        self, ins: int, outs: int, kernel: int = 3, padding: int = 1, bias: bool = True,
        activated: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = Convolution(ins, outs, kernel, 1, padding, bias)
        self.activated = activated

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Of the same sides."""
        made: torch.Tensor = self.conv(F.leaky_relu(maps, 0.2) if self.activated else maps)
        return made


class Residual(nn.Module):
    """Two convolutions, whose result is added to what they saw."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        least = min(ins, outs)
        self.conv_0 = Activated(ins, least)
        self.conv_1 = Activated(least, outs)
        self.conv_s = (
            Activated(ins, outs, 1, 0, bias=False, activated=False) if ins != outs else None
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """N × ins × H × W to N × outs × H × W."""
        beside = maps if self.conv_s is None else self.conv_s(maps)
        made: torch.Tensor = beside + self.conv_1(self.conv_0(maps))
        return made


class Judged(NamedTuple):
    """What a discriminator says of pictures.

    Attributes:
        verdicts: of each patch, as pictures of the classes that they are said to be of: N × H × W.
        features: means of the trunk's maps: N × channels.
        logits: of which class they are: N × classes; None where there is no such head.
    """

    verdicts: torch.Tensor
    features: torch.Tensor
    logits: torch.Tensor | None


class Discriminator(nn.Module):
    """Judges pictures as those of a class; with two heads, also tells their class.

    Args:
        classes: how many there are.
        width: channels after the first layer.
        halvings: of the sides; channels double with each.
        most: channels at most.
        heads: 1, or 2 for BalaGAN's.
        depth: layers of a head: 1 is a convolution of one pixel; 2 has a residual block before,
            which otherwise is the trunk's.
        channels: of the pictures.
    """

    multiple = 1

    def __init__(
        self, classes: int, width: int = 64, halvings: int = 4, most: int = 1024, heads: int = 2,
        depth: int = 1, channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = [Activated(channels, width, 7, 3, activated=False)]
        wide = width
        for _ in range(halvings):
            wider = min(2 * wide, most)
            layers += [
                Residual(wide, wide), Residual(wide, wider),
                ReflectionPad(1), nn.AvgPool2d(3, 2),
            ]  # fmt: skip
            wide = wider
        layers += [Residual(wide, wide) for _ in range(3 - depth)]
        self.cnn_f = nn.Sequential(*layers)
        self.cnn_c = _head(wide, classes, depth)
        self.cnn_classifier = _head(wide, classes, depth) if heads > 1 else None

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Judged:
        """What it says.

        Args:
            images: N × channels × H × W in [−1, 1].
            labels: int64 N, the classes as pictures of which they are judged.
        """
        maps = self.cnn_f(images)
        *before, last = self.cnn_c
        asked = maps
        for layer in before:
            asked = layer(asked)
        asked = F.leaky_relu(asked, 0.2)
        # Of all classes' verdicts one is wanted: only that is computed.
        weight, bias = last.conv.weight.flatten(1)[labels], last.conv.bias[labels]
        verdicts = torch.einsum("nchw,nc->nhw", asked, weight) + bias[:, None, None]
        logits = None
        if self.cnn_classifier is not None:
            *before, last = self.cnn_classifier
            told = maps
            for layer in before:
                told = layer(told)
            # The mean over patches commutes with a convolution of one pixel.
            means = F.leaky_relu(told, 0.2).mean((2, 3))
            logits = F.linear(means, last.conv.weight.flatten(1), last.conv.bias)
        return Judged(verdicts, maps.mean((2, 3)), logits)


def _head(width: int, classes: int, depth: int) -> nn.Sequential:
    before = [Residual(width, width) for _ in range(depth - 1)]
    return nn.Sequential(*before, Activated(width, classes, 1, 0))
