"""The discriminator that judges patches, with the official names (Isola et al. 2017, 6.1.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from modelsoup import MismatchError

from .described import Network
from .layers import Convolution, InstanceNorm, must_match
from .patches import widths

MADE_BY = f"{__name__}:PatchDiscriminator"


class PatchDiscriminator(nn.Module):
    """Judges patches: N × channels × H × W in [−1, 1] to N × 1 × h × w, 1 for real, 0 for fake.

    Images of 256² give 30², of 128² 14², of 64² 6².
    """

    def __init__(self, width: int = 64, layers: int = 3, channels: int = 3) -> None:
        """Build it.

        Args:
            width: channels after the first layer, `ndf`.
            layers: of stride 2; 3 see patches of 70 × 70.
            channels: of the images.
        """
        super().__init__()
        wide = widths(width, layers)
        made: list[nn.Module] = [
            Convolution(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)
        ]  # fmt: skip
        for index in range(1, len(wide)):
            stride = 2 if index < layers else 1
            made += [
                Convolution(wide[index - 1], wide[index], 4, stride=stride, padding=1),
                InstanceNorm(wide[index]), nn.LeakyReLU(0.2),
            ]  # fmt: skip
        made.append(Convolution(wide[-1], 1, 4, padding=1))
        self.model = nn.Sequential(*made)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The verdicts; no sigmoid."""
        result: torch.Tensor = self.model(images)
        return result


def patch_in(tensors: Mapping[str, Sequence[int]], prefix: str = "D_A.") -> dict[str, int]:
    """What a discriminator was built with: width, layers and channels, from names and shapes.

    Raises:
        MismatchError: there is no such discriminator, or it is of another kind.
    """
    own = {n.removeprefix(prefix): tuple(s) for n, s in tensors.items() if n.startswith(prefix)}
    said = f"the discriminator {prefix.rstrip('.')!r}" if prefix else "the discriminator"
    if any(name.startswith("net.") for name in own):
        raise MismatchError(f"{said} is a pixel discriminator, where a PatchGAN is expected")
    first = own.get("model.0.weight")
    if first is None or len(first) != 4:
        raise MismatchError(f"{said} has no model.0.weight of four dimensions, its first layer")
    if "model.3.weight" in own:
        raise MismatchError(f"{said} has batch normalisation, where instance norm is expected")
    weights = [name for name in own if name.endswith(".weight")]
    sizes = {"width": first[0], "layers": max(len(weights) - 2, 1), "channels": first[1]}
    must_match(own, Network(MADE_BY, sizes).shapes(), said)
    return sizes
