"""What is known of StyleGANs, and of an encoder and adaptors for them; without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from modelsoup import MismatchError, ParameterError

from .described import Network
from .shapes import Shape, must_have, must_match, part_of

Kind = Literal["single", "deepi2i", "identity"]

_FILE = "modelsoup_i2i.networks.stylegan"
GENERATOR, DISCRIMINATOR = f"{_FILE}:Generator", f"{_FILE}:Discriminator"
ENCODER, ADAPTOR = f"{_FILE}:Encoder", f"{_FILE}:Adaptor"
TRANSLATION = f"{_FILE}:Translation"
OWN_BLOCKS, AUXILIARY = f"{_FILE}:OwnBlocks", f"{_FILE}:Auxiliary"
DEEPEST, MOST = 4, 1024  # pixels: where a generator begins, and where official ones end
SIZES = (64, 128, 256, 512, MOST)  # of pictures
TAPS = (4, 8, 16, 32)  # where an encoder's features are taken, and added to a generator's
MAPPING, MAPPING_RATE = "style.", 0.01  # what learns so much slower than the rest, by its names


def wide(side: int, width: int) -> int:
    """Channels of maps of a side: `width` up to 32, and half as many with each doubling."""
    return max(min(width, 32 * width // side), 1)


def must_be_a_size(size: int) -> None:
    """Check the side of pictures.

    Raises:
        ParameterError: there is no StyleGAN of such.
    """
    if size not in SIZES:
        raise ParameterError(
            f"size is {size}, but a StyleGAN's is {', '.join(map(str, SIZES[:-1]))} or {MOST}"
        )


def sides(size: int) -> tuple[int, ...]:
    """Of the maps that lead to pictures of a side."""
    return tuple(DEEPEST * 2**n for n in range((size // DEEPEST).bit_length()))


def draws(side: int) -> str:
    """What the block of a generator that makes maps of a side is called: the smallest is 0."""
    return str((side // DEEPEST).bit_length() - 1)


def judges(side: int) -> str:
    """What the block of a discriminator that sees maps of a side is called: the largest is 0."""
    return str((MOST // side).bit_length() - 1)


def adapts(side: int) -> str:
    """What the block of an adaptor for maps of a side is called: 0 would be that for 64 × 64."""
    return str((64 // side).bit_length() - 1)


def must_agree(one: Mapping[str, Any], other: Mapping[str, Any], said: str) -> None:
    """Raise a MismatchError for two networks of different sizes.

    Args:
        one: what decides a network.
        other: likewise.
        said: what both are called: `G and D`.
    """
    for name in one.keys() & other.keys():
        if one[name] != other[name]:
            raise MismatchError(
                f"{said} do not belong to one model: {name} is {one[name]} in one and "
                f"{other[name]} in the other"
            )


def generator_in(shapes: Mapping[str, Shape], prefix: str = "") -> dict[str, Any]:
    """What a generator was built with: size, width, code, depth and channels.

    Args:
        shapes: name → shape, of a whole checkpoint or one network.
        prefix: what the generator's names begin with; may be empty.

    Raises:
        MismatchError: there is no such generator, or it is of another kind.
    """
    own, said = must_have(shapes, prefix, "StyleGAN generator")
    first = _shape(own, "generator.progression.0.conv1.input", 4, said, "its constant")
    style = _shape(own, "style.1.linear.weight_orig", 2, said, "the mapping network's first layer")
    size, place = _size(own, "generator.to_rgb", said)
    rgb = _shape(own, f"generator.to_rgb.{place}.conv.weight_orig", 4, said, "its last layer")
    depth = len({n for n in own if re.fullmatch(r"style\.\d+\.linear\.weight_orig", n)})
    sizes = {"size": size, "width": first[1], "code": style[0], "depth": depth, "channels": rgb[0]}
    return _matching(own, Network(GENERATOR, sizes), said)


def discriminator_in(shapes: Mapping[str, Shape], prefix: str = "") -> dict[str, Any]:
    """What a discriminator was built with: size, width, channels and rgb_activation.

    Raises:
        MismatchError: there is none, or it is of another kind.
    """
    return _pyramid_in(shapes, prefix, "discriminator", DISCRIMINATOR)


def encoder_in(shapes: Mapping[str, Shape], prefix: str = "") -> dict[str, Any]:
    """The same of an encoder.

    Raises:
        MismatchError: likewise.
    """
    return _pyramid_in(shapes, prefix, "encoder", ENCODER)


def _pyramid_in(shapes: Mapping[str, Shape], prefix: str, called: str, kind: str) -> dict[str, Any]:
    own, said = must_have(shapes, prefix, f"StyleGAN {called}")
    size, place = _size(own, "from_rgb", said)
    activated = f"from_rgb.{place}.0.conv.weight_orig" in own
    name = f"from_rgb.{place}.{'0.' if activated else ''}conv.weight_orig"
    first = _shape(own, name, 4, said, "its first layer")
    deepest = f"progression.{judges(2 * DEEPEST)}.conv1.0.conv.weight_orig"
    width = _shape(own, deepest, 4, said, "its block of 8 × 8")[0]
    sizes = {"size": size, "width": width, "channels": first[1], "rgb_activation": activated}
    return _matching(own, Network(kind, sizes), said)


def adaptor_in(shapes: Mapping[str, Shape], prefix: str = "") -> dict[str, Any]:
    """What an adaptor was built with: kind, width if it has any, and its sides if not all.

    Raises:
        MismatchError: there is none, or it is of another kind.
    """
    own, said = part_of(shapes, prefix, "StyleGAN adaptor")
    sides = [s for s in TAPS if _under(own, f"progression.{adapts(s)}.")]
    if not sides and own.keys() == {"strength"}:
        return _matching(own, Network(ADAPTOR, {"kind": "identity"}), said)
    if not sides:
        raise MismatchError(f"{said} has no block for any of {', '.join(map(str, TAPS))}")
    begins = f"progression.{adapts(sides[0])}."
    kind = "single" if f"{begins}conv.weight_orig" in own else "deepi2i"
    name = f"{begins}{'' if kind == 'single' else 'conv1.0.'}conv.weight_orig"
    width = _shape(own, name, 4, said, "its deepest layer")[0]
    sizes: dict[str, Any] = {"width": width, "kind": kind}
    if len(sides) < len(TAPS):
        sizes["only"] = tuple(sides)
    return _matching(own, Network(ADAPTOR, sizes), said)


def _under(names: Iterable[str], begins: str) -> bool:
    return any(name.startswith(begins) for name in names)


def _size(own: Mapping[str, Shape], room: str, said: str) -> tuple[int, int]:
    """Pixels of a side, and the number of the layer between maps and pictures, which tells them."""
    found = sorted({int(m[1]) for n in own if (m := re.match(rf"{re.escape(room)}\.(\d+)\.", n))})
    if len(found) > 1:
        raise MismatchError(
            f"{said} has {room} of {len(found)} sizes, as official checkpoints have: `soup i2i "
            f"import stylegan` keeps those of one"
        )
    number = draws if room.endswith("to_rgb") else judges
    sizes = {number(size): size for size in SIZES}
    if not found or str(found[0]) not in sizes:
        raise MismatchError(f"{said} has no {room}.N, a StyleGAN's layer between maps and pictures")
    return sizes[str(found[0])], found[0]


def _shape(own: Mapping[str, Shape], name: str, dimensions: int, said: str, what: str) -> Shape:
    shape = own.get(name, ())
    if len(shape) != dimensions:
        raise MismatchError(f"{said} has no {name} of {dimensions} dimensions, {what}")
    return shape


def _matching(own: Mapping[str, Shape], network: Network, said: str) -> dict[str, Any]:
    must_match(own, network.shapes(), said)
    return dict(network.sizes)
