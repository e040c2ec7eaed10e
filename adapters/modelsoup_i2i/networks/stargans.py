"""What is known of StarGAN's networks without building one; without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from modelsoup import MismatchError

from .described import Network
from .shapes import must_match, part_of

ROOM = "modelsoup_i2i.networks.stargan"
GENERATOR, DISCRIMINATOR = f"{ROOM}:Generator", f"{ROOM}:Discriminator"
MOST_LAYERS = 6  # of the discriminator, where nothing is said
_CONVOLUTION = re.compile(r"main\.(\d+)\.weight")


def layers_for(size: int) -> int:
    """Layers of stride 2 that leave 2 × 2 of a picture, at most 6."""
    return max(1, min(MOST_LAYERS, size.bit_length() - 2))


def generator_in(tensors: Mapping[str, Sequence[int]], prefix: str = "G.") -> dict[str, int]:
    """What a checkpoint's generator was built with: width, blocks, classes and channels.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the network's names begin with; may be empty.

    Raises:
        MismatchError: there is none, or one of another kind; the message names a tensor.
    """
    own, said = part_of(tensors, prefix, "generator")
    places = sorted(int(m[1]) for name in own if (m := _CONVOLUTION.fullmatch(name)))
    ends = [own[f"main.{place}.weight"] for place in (*places[:1], *places[-1:])]
    if len(ends) != 2 or {len(shape) for shape in ends} != {4}:
        raise MismatchError(f"{said} has no main.0.weight of four dimensions, its first layer")
    (width, seen, *_), (channels, *_) = ends
    blocks = {name.split(".")[1] for name in own if re.match(r"main\.\d+\.main\.", name)}
    sizes = {"width": width, "blocks": len(blocks), "classes": seen - channels,
             "channels": channels}  # fmt: skip
    if sizes["classes"] < 0:
        raise MismatchError(f"{said} makes {channels} channels, but sees only {seen}")
    must_match(own, Network(GENERATOR, sizes).shapes(), said)
    return sizes


def discriminator_in(tensors: Mapping[str, Sequence[int]], prefix: str = "D.") -> dict[str, int]:
    """What its discriminator was built with: size, width, layers, classes and channels.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the network's names begin with; may be empty.

    Raises:
        MismatchError: there is none, or one of another kind; the message names a tensor.
    """
    own, said = part_of(tensors, prefix, "discriminator")
    first, head = own.get("main.0.weight", ()), own.get("conv2.weight", ())
    if len(first) != 4 or len(head) != 4:
        raise MismatchError(f"{said} has no main.0.weight and conv2.weight of four dimensions")
    layers = sum(_CONVOLUTION.fullmatch(name) is not None for name in own)
    sizes = {"size": head[2] << layers, "width": first[0], "layers": layers, "classes": head[0],
             "channels": first[1]}  # fmt: skip
    must_match(own, Network(DISCRIMINATOR, sizes).shapes(), said)
    return sizes
