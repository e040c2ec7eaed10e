"""What is known of CUT's networks without building one; without torch."""

from __future__ import annotations

GENERATOR = "modelsoup_i2i.networks.antialiased:AntialiasedGenerator"
DISCRIMINATOR = "modelsoup_i2i.networks.antialiased:AntialiasedDiscriminator"
PROJECTION = "modelsoup_i2i.networks.antialiased:Projection"
TAPPED = "modelsoup_i2i.networks.antialiased:Tapped"

FIRST = 12  # where the generator's residual blocks begin
TAPS = (0, 4, 8, 12, 16)  # whose maps are compared: padding, two convolutions, blocks 1 and 5
BLOCKS = TAPS[-1] - FIRST + 1  # at least


def tapped_widths(width: int, channels: int) -> tuple[int, ...]:
    """Channels of the maps that are compared."""
    return channels, 2 * width, 4 * width, 4 * width, 4 * width


def tapped_sizes(height: int, width: int, multiple: int = 4, least: int = 8) -> tuple[int, ...]:
    """How many places the maps have, for images that are first continued to whole sides."""
    high, wide = (max(side, least) + -max(side, least) % multiple for side in (height, width))
    halved = [(high // n) * (wide // n) for n in (1, 2, 4)]
    return (high + 6) * (wide + 6), *halved, halved[-1]


def verdicts(side: int, layers: int) -> int:
    """The side of the map of verdicts for an image's side; below 1 if that is too small."""
    for _ in range(layers):
        if side < 3:  # what a convolution leaves of it is continued by reflection, by one
            return 0
        side //= 2  # kernel 4, padding 1; then every second place of what is blurred
    return side - 2 if side > 2 else 0


def places(layers: int) -> list[int]:
    """Where the discriminator's convolutions stand: 0, 3, 7, 11, 14 for three layers of halves."""
    last = 3 + 4 * layers
    return [0, *range(3, last, 4), last - 1]


def decoder(blocks: int) -> list[int]:
    """Where the generator's last three convolutions stand."""
    first = FIRST + blocks
    return [first + 1, first + 5, first + 9]
