"""MUNIT's networks: an auto-encoder for each domain, and a discriminator of several scales.

Huang, Liu, Belongie and Kautz, "Multimodal Unsupervised Image-to-Image Translation", ECCV 2018. The
names of tensors are our own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modelsoup import MismatchError

from .adain import MLP, ContentEncoder, Decoder, LayerNorm, StyleEncoder
from .described import Network
from .layers import Convolution
from .repeatable import reflected
from .shapes import must_match, part_of

GENERATOR = "modelsoup_i2i.networks.munit:AutoEncoder"
DISCRIMINATOR = "modelsoup_i2i.networks.munit:Discriminator"
DOWNS, STYLE_DOWNS = 2, 4  # how often content and style encoders halve a picture


class _Mirrored(Convolution):
    """One whose padding is a reflection."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See `nn.Conv2d`."""
        around = reflected(images, (1, 1, 1, 1))
        made: torch.Tensor = F.conv2d(around, self.weight, self.bias, self.stride)
        return made


class AutoEncoder(nn.Module):
    """One domain's: pictures to content and style, and back."""

    def __init__(
        self, width: int = 64, blocks: int = 4, style: int = 8, mlp: int = 256, channels: int = 3
    ) -> None:
        """Build it.

        Args:
            width: channels after each encoder's first layer.
            blocks: residual blocks, of the content encoder and of the decoder.
            style: numbers of a style.
            mlp: width of what makes the decoder's norms of a style.
            channels: of the pictures.
        """
        super().__init__()
        self.channels = channels
        self.content = ContentEncoder(width, DOWNS, blocks, channels)
        self.style = StyleEncoder(width, STYLE_DOWNS, style, channels)
        self.decoder = Decoder(width, DOWNS, blocks, channels, LayerNorm)
        self.mlp = MLP(style, self.decoder.given, mlp)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Content, N × 4 width × H/4 × W/4, and style, N × style, of N × channels × H × W."""
        return self.content(images), self.style(images)


class Decoding(nn.Module):
    """The second half of an auto-encoder: content and style to pictures."""

    def __init__(self, **networks: AutoEncoder) -> None:
        super().__init__()
        (own,) = networks.values()
        self.mlp, self.decoder = own.mlp, own.decoder

    def forward(self, content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """Pictures in [−1, 1]; the arguments are what `AutoEncoder` gives."""
        made: torch.Tensor = self.decoder(content, self.mlp(style))
        return made


class Styling(nn.Module):
    """The style encoder alone."""

    def __init__(self, **networks: AutoEncoder) -> None:
        super().__init__()
        (own,) = networks.values()
        self.style, self.channels = own.style, own.channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × style."""
        made: torch.Tensor = self.style(images)
        return made


class Translation(nn.Module):
    """One domain's content encoder and the other one's decoder.

    Args:
        source: which of the networks encodes …
        target: … and which decodes.
        networks: both auto-encoders, by their names.
    """

    multiple = 2**DOWNS

    def __init__(self, source: str, target: str, **networks: AutoEncoder) -> None:
        super().__init__()
        self.content, self.channels = networks[source].content, networks[source].channels
        self.mlp, self.decoder = networks[target].mlp, networks[target].decoder

    def forward(self, images: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """Pictures of the target in [−1, 1], as large as what they are made of.

        Args:
            images: N × channels × H × W in [−1, 1]; sides are multiples of four.
            style: N × style.
        """
        made: torch.Tensor = self.decoder(self.content(images), self.mlp(style))
        return made


class Discriminator(nn.Module):
    """Judges patches of a picture and of smaller versions of it: a map of verdicts for each."""

    def __init__(
        self, width: int = 64, layers: int = 4, scales: int = 3, channels: int = 3
    ) -> None:
        """Build it.

        Args:
            width: channels after the first layer, doubled by each further one.
            layers: of stride 2, before that of the verdicts.
            scales: how many; each after the first sees pictures half as large.
            channels: of the pictures.
        """
        super().__init__()
        wide = [channels, *(width << n for n in range(layers))]
        self.scales = nn.ModuleList()
        for _ in range(scales):
            made: list[nn.Module] = []
            for ins, outs in pairwise(wide):
                made.append(_Mirrored(ins, outs, 4, 2, 1, padding_mode="reflect"))
                made.append(nn.LeakyReLU(0.2))
            self.scales.append(nn.Sequential(*made, Convolution(wide[-1], 1, 1)))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """N × 1 × h × w for each scale, the largest first; no sigmoid."""
        verdicts = []
        for place, judge in enumerate(self.scales):
            if place:
                images = F.avg_pool2d(images, 3, 2, 1, count_include_pad=False)
            verdicts.append(judge(images))
        return verdicts


def generator_in(tensors: Mapping[str, Sequence[int]], prefix: str) -> dict[str, Any]:
    """What an auto-encoder was built with, from names and shapes.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the network's names begin with.

    Raises:
        MismatchError: there is no such network, or it is of another kind.
    """
    own, said = part_of(tensors, prefix, "auto-encoder")
    first, hidden = own.get("content.model.0.conv.weight"), own.get("mlp.model.0.fc.weight")
    if first is None or len(first) != 4 or hidden is None or len(hidden) != 2:
        raise MismatchError(
            f"{said} lacks content.model.0.conv.weight of four dimensions or mlp.model.0.fc.weight "
            f"of two, the first layers of MUNIT's networks"
        )
    sizes = {
        "width": first[0], "blocks": _counted(r"decoder\.model\.0\.model\.(\d+)\.", own),
        "style": hidden[1], "mlp": hidden[0], "channels": first[1],
    }  # fmt: skip
    must_match(own, Network(GENERATOR, sizes).shapes(), said)
    return sizes


def discriminator_in(tensors: Mapping[str, Sequence[int]], prefix: str) -> dict[str, Any]:
    """What a discriminator was built with, likewise."""
    own, said = part_of(tensors, prefix, "discriminator")
    first = own.get("scales.0.0.weight")
    if first is None or len(first) != 4:
        raise MismatchError(f"{said} has no scales.0.0.weight of four dimensions, its first layer")
    sizes = {
        "width": first[0], "layers": _counted(r"scales\.0\.(\d+)\.weight", own) - 1,
        "scales": _counted(r"scales\.(\d+)\.", own), "channels": first[1],
    }  # fmt: skip
    must_match(own, Network(DISCRIMINATOR, sizes).shapes(), said)
    return sizes


def _counted(pattern: str, names: Mapping[str, object]) -> int:
    """How many different places names have at the group of a pattern."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
