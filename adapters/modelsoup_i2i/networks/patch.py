"""Discriminators that judge patches, with the official names (Isola et al. 2017, 6.1.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from modelsoup import MismatchError

from .described import Network
from .layers import Convolution, Norm, norm
from .patches import MADE_BY, PIXELS_BY, widths
from .shapes import must_match, part_of


class PatchDiscriminator(nn.Module):
    """Judges patches: N × channels × H × W in [−1, 1] to N × 1 × h × w, 1 for real, 0 for fake.

    Images of 256² give 30², of 128² 14², of 64² 6².
    """

    def __init__(
        self, width: int = 64, layers: int = 3, channels: int = 3, norm: Norm = "instance"
    ) -> None:
        """Build it.

        Args:
            width: channels after the first layer, `ndf`.
            layers: of stride 2; 3 see patches of 70 × 70.
            channels: of the images.
            norm: between the first layer and the last.
        """
        super().__init__()
        wide = widths(width, layers)
        made: list[nn.Module] = [
            Convolution(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)
        ]  # fmt: skip
        for index in range(1, len(wide)):
            stride = 2 if index < layers else 1
            made += [
                *_normal(norm, wide[index - 1], wide[index], 4, stride=stride, padding=1),
                nn.LeakyReLU(0.2),
            ]
        made.append(Convolution(wide[-1], 1, 4, padding=1))
        self.model = nn.Sequential(*made)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The verdicts; no sigmoid."""
        result: torch.Tensor = self.model(images)
        return result


class PixelDiscriminator(nn.Module):
    """Judges each pixel by itself: N × channels × H × W in [−1, 1] to N × 1 × H × W."""

    def __init__(self, width: int = 64, channels: int = 3, norm: Norm = "instance") -> None:
        """Build it; the arguments are those of `PatchDiscriminator`."""
        super().__init__()
        self.net = nn.Sequential(
            Convolution(channels, width, 1),
            nn.LeakyReLU(0.2),
            *_normal(norm, width, 2 * width, 1),
            nn.LeakyReLU(0.2),
            Convolution(2 * width, 1, 1, bias=norm == "instance"),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The verdicts; no sigmoid."""
        result: torch.Tensor = self.net(images)
        return result


def _normal(kind: Norm, ins: int, outs: int, kernel: int, **how: int) -> list[nn.Module]:
    """A convolution and what normalises it; batch norm has a bias of its own."""
    return [Convolution(ins, outs, kernel, bias=kind == "instance", **how), norm(kind, outs)]


def discriminator_in(tensors: Mapping[str, Sequence[int]], prefix: str) -> Network:
    """A checkpoint's discriminator, of patches or of pixels, from names and shapes.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the discriminator's names begin with; may be empty.

    Raises:
        MismatchError: there is no such discriminator, or it is of another kind.
    """
    own, said = part_of(tensors, prefix, "discriminator")
    of_pixels = "net.0.weight" in own
    first = own.get("net.0.weight" if of_pixels else "model.0.weight")
    if first is None or len(first) != 4:
        raise MismatchError(f"{said} has no model.0.weight of four dimensions, its first layer")
    kind = "batch" if any(name.endswith(".running_mean") for name in own) else "instance"
    sizes = {"width": first[0], "channels": first[1], "norm": kind}
    if of_pixels:
        made = Network(PIXELS_BY, sizes)
    else:
        convolutions = [n for n, s in own.items() if n.endswith(".weight") and len(s) == 4]
        made = Network(MADE_BY, {**sizes, "layers": max(len(convolutions) - 2, 1)})
    must_match(own, made.shapes(), said)
    return made


def patch_in(tensors: Mapping[str, Sequence[int]], prefix: str = "D_A.") -> dict[str, int]:
    """What CycleGAN's discriminator was built with: width, layers and channels.

    Raises:
        MismatchError: there is no such discriminator, or it is of another kind: of pixels, or with
            batch normalisation.
    """
    own, said = part_of(tensors, prefix, "discriminator")
    if any(name.startswith("net.") for name in own):
        raise MismatchError(f"{said} is a pixel discriminator, where a PatchGAN is expected")
    if "model.3.weight" in own:
        raise MismatchError(f"{said} has batch normalisation, where instance norm is expected")
    made = discriminator_in(tensors, prefix)
    return {name: made.sizes[name] for name in ("width", "layers", "channels")}
