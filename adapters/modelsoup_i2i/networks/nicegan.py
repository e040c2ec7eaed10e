"""NICE-GAN's light generator, and discriminators that are encoders too: see `cam.py`.

Names are the official ones. There is no other encoder: what a discriminator makes of an image in
its first layers, the code, is what the generator of the other domain translates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .cam import EVEN, ILN, OF_INSTANCE, OF_LAYER, Decoder, attended, judging, pooled, verdict
from .layers import MULTIPLE
from .repeatable import ReflectionPad


class Generator(Decoder):
    """Makes images of codes: N × 2 width × H/4 × W/4 to N × channels × H × W in [−1, 1]."""

    multiple = 1  # what it sees are no images

    def __init__(self, width: int = 64, blocks: int = 6, channels: int = 3) -> None:
        """Build it.

        Args:
            width: channels before the last layer, `ch`.
            blocks: residual blocks with AdaILN.
            channels: of the images.
        """
        super().__init__(width, blocks, channels, EVEN[OF_INSTANCE])
        begin = EVEN[OF_LAYER]
        self.UpBlock0 = nn.Sequential(
            ReflectionPad(1), nn.Conv2d(2 * width, 4 * width, 3), ILN(4 * width, begin),
            nn.ReLU(inplace=True),
        )  # fmt: skip
        up: list[nn.Module] = []
        for wide in (4 * width, 2 * width):
            half = wide // 2
            up += [
                ReflectionPad(1), nn.Conv2d(wide, half, 3, bias=False), ILN(half, begin),
                nn.ReLU(inplace=True), nn.Conv2d(half, 4 * half, 1), nn.PixelShuffle(2),
                ILN(half, begin), nn.ReLU(inplace=True),
            ]  # fmt: skip
        last = nn.Conv2d(width, channels, 7, bias=False)
        self.UpBlock2 = nn.Sequential(*up, ReflectionPad(3), last, nn.Tanh())

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """The images."""
        return self.decoded(self.UpBlock0(codes))


class Discriminator(nn.Module):
    """Judges images, N × channels × H × W in [−1, 1], and makes codes of them.

    Sides must be multiples of four.
    """

    def __init__(self, width: int = 64, layers: int = 7, channels: int = 3) -> None:
        """Build it.

        Args:
            width: channels after the first layer, `ch`; each layer but the last doubles them.
            layers: of the global verdicts, all but two of stride 2; the local ones have two fewer.
            channels: of the images.
        """
        super().__init__()
        self.width, self.layers, self.channels = width, layers, channels
        code, shared = 2 * width, width * 2 ** (layers - 5)
        self.model = nn.Sequential(*judging(channels, width), *judging(width, code))
        self.fc = nn.utils.spectral_norm(nn.Linear(2 * code, 1, bias=False))
        # In use the weight itself is wanted, and nobody asks for logits.
        self.fc.undivided = True
        self.conv1x1 = nn.Conv2d(2 * code, code, 1)
        self.leaky_relu = nn.LeakyReLU(0.2, inplace=True)
        self.lamda = nn.Parameter(torch.zeros(1))
        together: list[nn.Module] = []
        for n in range(2, layers - 4):
            together += judging(width * 2 ** (n - 1), width * 2**n)
        self.Dis0_0 = nn.Sequential(*together)
        self.Dis0_1 = nn.Sequential(*judging(shared, 2 * shared, 1))
        self.conv0 = verdict(2 * shared)
        self.Dis1_0 = nn.Sequential(*judging(shared, 2 * shared), *judging(2 * shared, 4 * shared))
        self.Dis1_1 = nn.Sequential(*judging(4 * shared, 8 * shared, 1))
        self.conv1 = verdict(8 * shared)
        self.pad = ReflectionPad(1)

    def reset_parameters(self) -> None:
        """What `torch_bridge.load_into` calls for tensors that a start lacks: λ."""
        nn.init.zeros_(self.lamda)

    def forward(self, images: torch.Tensor, code: bool = False) -> Any:
        """Verdicts, local and global and of the attention (N × 1), no sigmoid; and the code.

        With `code` that alone: N × 2 width × H/4 × W/4.
        """
        maps = self.model(images)
        # As the official code: by the weight itself, which no singular value divides.
        focused = attended(maps, self.fc.weight_orig, self.conv1x1)
        codes = self.leaky_relu(torch.addcmul(maps, self.lamda, focused))
        if code:
            return codes
        logits = self.fc(torch.cat(pooled(maps), 1))
        seen = self.Dis0_0(codes)
        local = self.conv0(self.pad(self.Dis0_1(seen)))
        whole = self.conv1(self.pad(self.Dis1_1(self.Dis1_0(seen))))
        return local, whole, logits, codes


class Translation(nn.Module):
    """A discriminator of one domain, as its encoder, and the generator of the other.

    Heights and widths must be multiples of four; `at_any_size` pads others.
    """

    multiple = MULTIPLE

    def __init__(self, **parts: nn.Module) -> None:
        """Join them: `D_A` and `G_B`, or `D_B` and `G_A`."""
        super().__init__()
        (self.encoder, self.decoder) = (parts[name] for name in sorted(parts))
        self.channels = self.decoder.channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The translation, of the same shape and range."""
        result: torch.Tensor = self.decoder(self.encoder(images, code=True))
        return result
