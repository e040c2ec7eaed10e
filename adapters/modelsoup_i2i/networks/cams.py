"""What is known of U-GAT-IT's and NICE-GAN's networks without building one; without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from modelsoup import MismatchError, ParameterError

from .described import Network
from .shapes import Shape, must_match, part_of

UGATIT = "modelsoup_i2i.networks.ugatit"
NICE = "modelsoup_i2i.networks.nicegan"
TRANSLATION = f"{NICE}:Translation"
ESTIMATES = ("*.weight_u", "*.weight_v")
"""Patterns over names: what spectral norm finds of its weights."""
FEWEST = {UGATIT: 3, NICE: 6}
"""Layers that a discriminator has at least: of NICE-GAN's, two make the code, one the next map."""

_FIRST = {
    (UGATIT, "Generator"): ("DownBlock.1.weight", 0, 1),
    (NICE, "Generator"): ("UpBlock2.17.weight", 1, 0),
    (UGATIT, "Discriminator"): ("model.1.weight_orig", 0, 1),
    (NICE, "Discriminator"): ("model.1.weight_orig", 0, 1),
}
"""The layer at the images, and where its shape has the width and the channels."""


def network(room: str, kind: str, **sizes: int) -> Network:
    """One of a file of networks: a `Generator` or a `Discriminator`."""
    return Network(f"{room}:{kind}", sizes)


def must_see(room: str, sides: Sequence[int], layers: int, option: str) -> None:
    """Check that a discriminator of so many layers has a verdict on images of some sides.

    Args:
        room: the file of networks that it is of.
        sides: height and width.
        layers: all but two halve an image, and the last two take 2 of what is left.
        option: which says how many.

    Raises:
        ParameterError: they are too small; the message says what would do.
    """
    small, fewest = min(sides), FEWEST[room]
    if small >= _least(layers):
        return
    fits = max((n for n in range(fewest, layers) if small >= _least(n)), default=None)
    most = f"{option} {fewest}, the fewest, sees {_least(fewest)} × {_least(fewest)}"
    hint = most if fits is None else f"{option} {fits} sees such"
    raise ParameterError(
        f"images of {' × '.join(map(str, sides))} are too small for discriminators of {layers} "
        f"layers, which see {_least(layers)} × {_least(layers)} and more ({hint})"
    )


def _least(layers: int) -> int:
    """The smallest side of what so many layers have a verdict on."""
    return 3 << (layers - 2)


def generator_in(room: str, tensors: Mapping[str, Sequence[int]], prefix: str) -> dict[str, int]:
    """What a generator was built with: width, blocks and channels, from names and shapes.

    Args:
        room: the file of networks that it is to be of.
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what its names begin with; may be empty.

    Raises:
        MismatchError: there is no such generator, or it is of the full version.
    """
    own, said = part_of(tensors, prefix, "generator")
    sizes = _at_images(room, "Generator", own, said)
    seen, wide = own.get("FC.0.weight", ()), 4 * sizes["width"]
    if len(seen) == 2 and seen[1] != wide:
        raise MismatchError(
            f"{said} is of the full version, whose FC.0.weight {list(seen)} sees maps of one size, "
            f"where the light one's is expected, {[wide, wide]}"
        )
    blocks = {m[1] for name in own if (m := re.match(r"UpBlock1_(\d+)\.", name))}
    sizes |= {"blocks": len(blocks)}
    must_match(own, network(room, "Generator", **sizes).shapes(), said)
    return sizes


def discriminator_in(
    room: str, tensors: Mapping[str, Sequence[int]], prefix: str
) -> dict[str, int]:  # fmt: skip
    """What a discriminator was built with: width, layers and channels.

    Args:
        room: the file of networks that it is to be of.
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what its names begin with; may be empty.

    Raises:
        MismatchError: there is no such discriminator.
    """
    own, said = part_of(tensors, prefix, "discriminator")
    sizes = _at_images(room, "Discriminator", own, said)
    pattern, others = (r"Dis0_0\.\d+\.weight_orig", 6) if room == NICE else (
        r"model\.\d+\.weight_orig", 1
    )  # fmt: skip
    sizes |= {"layers": others + sum(bool(re.fullmatch(pattern, name)) for name in own)}
    must_match(own, network(room, "Discriminator", **sizes).shapes(), said)
    return sizes


def _at_images(room: str, kind: str, own: Mapping[str, Shape], said: str) -> dict[str, int]:
    name, width, channels = _FIRST[room, kind]
    shape = own.get(name, ())
    if len(shape) != 4:
        raise MismatchError(f"{said} has no {name} of four dimensions, its layer at the images")
    return {"width": shape[width], "channels": shape[channels]}
