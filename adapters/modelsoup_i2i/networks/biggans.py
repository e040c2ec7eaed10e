"""What is known of BigGANs, and of DeepI2I's networks, without building one; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from modelsoup import MismatchError, ParameterError

from .described import Network
from .shapes import Shape, must_match, part_of

Arch = Literal["32", "32s", "64", "64s", "128", "256"]
_FILE = "modelsoup_i2i.networks.biggan"
GENERATOR, DISCRIMINATOR = f"{_FILE}:Generator", f"{_FILE}:Discriminator"
ENCODER, ADAPTOR = f"{_FILE}:Encoder", f"{_FILE}:Adaptor"
TRANSLATION = f"{_FILE}:Translation"
OWN_BLOCKS, AUXILIARY = f"{_FILE}:OwnBlocks", f"{_FILE}:Auxiliary"

# Multiples of `ch`: what each block of the generator sees, and the last one makes; what each of the
# discriminator's makes; and how many of those halve. An `s` is ours, for pictures of few pixels.
_GENERATORS: dict[Arch, tuple[int, ...]] = {
    "32": (4, 4, 4, 4), "32s": (8, 8, 4, 2), "64": (16, 16, 8, 4, 2), "64s": (8, 8, 8, 4, 2),
    "128": (16, 16, 8, 4, 2, 1), "256": (16, 16, 8, 8, 4, 2, 1),
}  # fmt: skip
_DISCRIMINATORS: dict[Arch, tuple[tuple[int, ...], int]] = {
    "32": ((4, 4, 4, 4), 2), "32s": ((1, 2, 4, 8), 3), "64": ((1, 2, 4, 8, 16), 4),
    "64s": ((1, 2, 4, 8, 8), 4), "128": ((1, 2, 4, 8, 16, 16), 5),
    "256": ((1, 2, 4, 8, 8, 16, 16), 6),
}  # fmt: skip
DEEPEST = 4  # pixels: where the generator begins
ESTIMATES = ("*.u0", "*.sv0")
"""Patterns over names: what spectral norm finds of its weights."""


def side(arch: Arch) -> int:
    """Pixels of a picture's side."""
    return int(arch.rstrip("s"))


def must_be_a_size(arch: str) -> None:
    """Check the word for a size.

    Raises:
        ParameterError: there is no BigGAN of such.
    """
    if arch not in _GENERATORS:
        raise ParameterError(f"size is {arch}, but a BigGAN's is {', '.join(_GENERATORS)}")


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


def widths_between(arch: Arch, least: int = DEEPEST) -> dict[int, tuple[int, int]]:
    """What an adaptor sees and makes at each tap, as multiples of `ch`."""
    own = dict(seen(arch))  # of several blocks of one resolution the last
    return {r: (own[r], made(arch)[r]) for r in taps(arch, least)}


def noise(arch: Arch, chunk: int, least: int = DEEPEST) -> int:
    """How many numbers the generator's noise has: a chunk for its first layer and each block."""
    return chunk * sum(r >= least for r in made(arch))


def must_agree(generator: Mapping[str, Any], discriminator: Mapping[str, Any]) -> None:
    """Raise a MismatchError for two networks of different sizes."""
    for name in ("arch", "ch", "classes", "channels"):
        if generator[name] != discriminator[name]:
            raise MismatchError(
                f"the networks do not belong to one model: {name} is {generator[name]} in G and "
                f"{discriminator[name]} in D"
            )


def generator_in(shapes: Mapping[str, Shape], prefix: str = "") -> dict[str, Any]:
    """The sizes that a generator's names and shapes decide.

    Raises:
        MismatchError: they are not of such a one; the message names what is missing or else.
    """
    own, said = part_of(shapes, prefix, "BigGAN generator")
    for name in ("shared.weight", "linear.weight", "output_layer.2.weight"):
        if name not in own:
            raise MismatchError(f"{said} lacks {name}")
    channels, last = own["output_layer.2.weight"][:2]
    widths = _widths(own)
    arch: Arch
    for arch, multiples in _GENERATORS.items():
        ch, rest = divmod(last, multiples[-1])
        kept = multiples[len(multiples) - len(widths) :]
        if rest or not widths or widths != [ch * m for m in kept]:
            continue
        least = side(arch) // 2 ** len(widths)
        # Where blocks were left out, those that are there may be another one's, too.
        if own["linear.weight"][0] != ch * made(arch)[least] * least**2:
            continue
        sizes = {
            "arch": arch, "ch": ch, "classes": own["shared.weight"][0],
            "chunk": own["linear.weight"][1], "shared": own["shared.weight"][1],
            "attention": _followed(own, [least * 2 ** (n + 1) for n in range(len(widths))]),
            "channels": channels, "least": least,
        }  # fmt: skip
        must_match(own, Network(GENERATOR, sizes).shapes(), said)
        return sizes
    raise _unknown(said, widths)


def discriminator_in(shapes: Mapping[str, Shape], prefix: str = "") -> dict[str, Any]:
    """The sizes that a discriminator's names and shapes decide.

    Raises:
        MismatchError: likewise.
    """
    own, said = part_of(shapes, prefix, "BigGAN discriminator")
    widths = _widths(own)
    arch: Arch
    for arch, (multiples, _) in _DISCRIMINATORS.items():
        ch = widths[0] // multiples[0] if widths else 0
        if not ch or widths != [ch * m for m in multiples]:
            continue
        sizes = {
            "arch": arch, "ch": ch, "classes": own.get("embed.weight", (0,))[0],
            "attention": _followed(own, [side for side, _ in seen(arch)]),
            "channels": own["blocks.0.0.conv1.weight"][1],
        }  # fmt: skip
        must_match(own, Network(DISCRIMINATOR, sizes).shapes(), said)
        return sizes
    raise _unknown(said, widths)


def encoder_in(
    shapes: Mapping[str, Shape], generator: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """The sizes of an encoder beside a generator of such sizes.

    Raises:
        MismatchError: likewise.
    """
    own, said = part_of(shapes, prefix, "BigGAN encoder")
    blocks = seen(generator["arch"])[: len(_widths(own))]
    sizes = {name: generator[name] for name in ("arch", "ch", "attention", "channels")}
    sizes["least"] = blocks[-1][0] if blocks else DEEPEST
    must_match(own, Network(ENCODER, sizes).shapes(), said)
    return sizes


def adaptor_in(
    shapes: Mapping[str, Shape], encoder: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """The sizes of an adaptor behind an encoder of such sizes.

    Raises:
        MismatchError: likewise.
    """
    own, said = part_of(shapes, prefix, "DeepI2I adaptor")
    sizes = {name: encoder[name] for name in ("arch", "ch", "least")}
    every = widths_between(sizes["arch"], sizes["least"])
    found = [own[f"blocks.{n}.0.conv1.weight"][:2] for n in range(len(_widths(own)))]
    if not found:
        sizes["identity"] = True
    elif len(found) < len(every):
        ch = sizes["ch"]
        sizes["only"] = tuple(
            side for side, (ins, outs) in every.items() if (outs * ch, ins * ch) in found
        )
    must_match(own, Network(ADAPTOR, sizes).shapes(), said)
    return sizes


def remade(values: Any, count: int, seed: int) -> np.ndarray:
    """Rows for other classes: about the mean of those that there are, as far apart as they.

    Integers, which have no mean, are 0.
    """
    if np.asarray(values).dtype.kind == "i":
        return np.zeros((count, *np.shape(values)[1:]), np.asarray(values).dtype)
    own = np.asarray(values, np.float32)
    drawn = np.random.default_rng(seed).standard_normal((count, *own.shape[1:]), np.float32)
    made: np.ndarray = own.mean(0) + drawn * own.std(0)
    return made


def _unknown(said: str, widths: Sequence[int]) -> MismatchError:
    return MismatchError(
        f"{said} has blocks of the widths {list(widths)}, as none of {', '.join(_GENERATORS)} has"
    )


def _widths(own: Mapping[str, Shape]) -> list[int]:
    found: list[int] = []
    while (name := f"blocks.{len(found)}.0.conv1.weight") in own:
        found.append(own[name][0])
    return found


def _followed(own: Mapping[str, Shape], sides: Sequence[int]) -> int:
    """The side of the maps that attention follows; 0 where there is none."""
    return next((s for n, s in enumerate(sides) if f"blocks.{n}.1.gamma" in own), 0)
