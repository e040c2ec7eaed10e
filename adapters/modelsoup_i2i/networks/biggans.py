"""What is known of BigGANs, and of DeepI2I's networks, without building one; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from modelsoup import ParameterError

from .described import Network

Arch = Literal["32", "32s", "64", "64s", "128", "256"]
_FILE = "modelsoup_i2i.networks.biggan"
GENERATOR, DISCRIMINATOR = f"{_FILE}:Generator", f"{_FILE}:Discriminator"
ENCODER, ADAPTOR = f"{_FILE}:Encoder", f"{_FILE}:Adaptor"
TRANSLATION = f"{_FILE}:Translation"

# Multiples of `ch`: what each block of the generator sees, and the last one makes; what each of the
# discriminator's makes; and how many of those halve. An `s` is ours, for pictures of few pixels.
_GENERATORS = {
    "32": (4, 4, 4, 4), "32s": (8, 8, 4, 2), "64": (16, 16, 8, 4, 2), "64s": (8, 8, 8, 4, 2),
    "128": (16, 16, 8, 4, 2, 1), "256": (16, 16, 8, 8, 4, 2, 1),
}  # fmt: skip
_DISCRIMINATORS = {
    "32": ((4, 4, 4, 4), 2), "32s": ((1, 2, 4, 8), 3), "64": ((1, 2, 4, 8, 16), 4),
    "64s": ((1, 2, 4, 8, 8), 4), "128": ((1, 2, 4, 8, 16, 16), 5),
    "256": ((1, 2, 4, 8, 8, 16, 16), 6),
}  # fmt: skip
DEEPEST = 4  # pixels: where the generator begins


def side(arch: Arch) -> int:
    """Pixels of a picture's side."""
    return int(arch.rstrip("s"))


def made(arch: Arch) -> dict[int, int]:
    """What the generator has at each resolution, as multiples of `ch`: 4 is before its blocks."""
    return {DEEPEST * 2**n: wide for n, wide in enumerate(_GENERATORS[arch])}


def seen(arch: Arch) -> list[tuple[int, int]]:
    """The discriminator's blocks: the side of what each makes, and its width as multiples."""
    widths, halving = _DISCRIMINATORS[arch]
    return [(side(arch) // 2 ** min(n + 1, halving), wide) for n, wide in enumerate(widths)]


def taps(arch: Arch, least: int = DEEPEST) -> tuple[int, ...]:
    """Resolutions at which features are taken and added: from `least` to a quarter of the side.

    Raises:
        ParameterError: the discriminator has no such one, as that of 32 pixels has none of 4.
    """
    own = {resolution for resolution, _ in seen(arch)}
    if DEEPEST not in own:
        raise ParameterError(f"the networks of {arch} pixels have no features of 4 × 4: 32s have")
    return tuple(r for r in sorted(own) if least <= r <= side(arch) // 4)


def deepest(arch: Arch, downs: int | None) -> int:
    """The resolution that so many halvings leave; None is as many as there are.

    Raises:
        ParameterError: there are not that many, or so few that nothing is left to take.
    """
    most = (side(arch) // DEEPEST).bit_length() - 1
    if downs is not None and not 2 <= downs <= most:
        raise ParameterError(f"n_down is {downs}, but must be 2 to {most} for {side(arch)} pixels")
    return DEEPEST if downs is None else side(arch) // 2**downs


def adapted(network: str, sizes: Mapping[str, Any], **others: Any) -> Network:
    """One of such sizes."""
    return Network(network, {**sizes, **others})


def widths_between(arch: Arch, least: int = DEEPEST) -> dict[int, tuple[int, int]]:
    """What an adaptor sees and makes at each tap, as multiples of `ch`."""
    own = dict(seen(arch))  # of several blocks of one resolution the last
    return {r: (own[r], made(arch)[r]) for r in taps(arch, least)}


def rows(shapes: Mapping[str, Sequence[int]], network: str) -> int | None:
    """The classes that a generator or discriminator knows."""
    for name in (f"{network}.shared.weight", f"{network}.embed.weight"):
        if name in shapes:
            return int(shapes[name][0])
    return None
