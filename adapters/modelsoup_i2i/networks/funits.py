"""What is known of FUNIT's networks without building one; without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from modelsoup import MismatchError

from .described import Joined, Network
from .shapes import must_match, part_of

ROOM = "modelsoup_i2i.networks.funit"
GENERATOR, DISCRIMINATOR = f"{ROOM}:Generator", f"{ROOM}:Discriminator"
STYLES = Joined(f"{ROOM}:Styles", ("G",))
SIZES = ("width", "downs", "blocks", "style_downs", "latent", "mlp", "channels")
JUDGES = {
    "width": "width", "halvings": "d_halvings", "most": "d_most", "heads": "heads",
    "depth": "head_depth", "channels": "channels",
}  # fmt: skip
"""A discriminator's sizes but for its classes, and which options of a trainer they are."""
_PARTS = {
    "generator": ("",), "content": ("enc_content.",), "style": ("enc_class_model.",),
    "decoder": ("mlp.", "dec."),
}  # fmt: skip


def groups(*generators: str) -> dict[str, list[str]]:
    """Patterns over names of generators: all of them, and each part."""
    return {name: [f"{own}.{part}*" for own in generators for part in parts]
            for name, parts in _PARTS.items()}  # fmt: skip


def must_see(size: int, downs: int, others: int) -> None:
    """Check that pictures can be halved.

    Args:
        size: pixels of a side.
        downs: how often the content is halved.
        others: how often anything else is, at most.

    Raises:
        ValueError: they are too small for it, or odd on the way.
    """
    halved = max(downs, others)
    least, multiple = 2 << halved, 1 << downs
    if size < least or size % multiple:
        raise ValueError(
            f"size is {size}, but must be a multiple of {multiple} and at least {least}: it is "
            f"halved {halved} times, and two pixels must be left"
        )


def both_in(tensors: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A trainer's options that `G` and `D` of a checkpoint decide, as far as they are there.

    Raises:
        MismatchError: one is of another kind; or there is a `D` and no `G`.
    """
    found: dict[str, Any] = {}
    if any(name.startswith("D.") for name in tensors):
        told = discriminator_in(tensors)
        found = {own: told[size] for size, own in JUDGES.items()} | {"classes": told["classes"]}
    whole = any(name.startswith(("G.", "D.")) for name in tensors)
    return found | (generator_in(tensors) if whole else {})


def generator_in(tensors: Mapping[str, Sequence[int]], prefix: str = "G.") -> dict[str, int]:
    """What a generator was built with.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the network's names begin with.

    Raises:
        MismatchError: there is none, or one of another kind; the message names a tensor.
    """
    own, said = part_of(tensors, prefix, "generator")
    first, layer = own.get("enc_content.model.0.conv.weight", ()), own.get("mlp.model.0.fc.weight")
    if len(first) != 4 or layer is None or len(layer) != 2:
        raise MismatchError(
            f"{said} has no enc_content.model.0.conv.weight and mlp.model.0.fc.weight, the first "
            f"layers of FUNIT's"
        )
    downs = _places(own, r"enc_content\.model\.(\d+)\.conv\.weight") - 1
    sizes = {
        "width": first[0],
        "downs": downs,
        "blocks": _places(own, rf"enc_content\.model\.{downs + 1}\.model\.(\d+)\.model\.0\.conv.+"),
        # Before the mean and the layer after it, and without the first.
        "style_downs": _places(own, r"enc_class_model\.model\.(\d+)\.conv\.weight") - 1,
        "latent": layer[1],
        "mlp": layer[0],
        "channels": first[1],
    }
    must_match(own, Network(GENERATOR, sizes).shapes(), said)
    return sizes


def discriminator_in(tensors: Mapping[str, Sequence[int]], prefix: str = "D.") -> dict[str, int]:
    """What a discriminator was built with.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the network's names begin with.

    Raises:
        MismatchError: there is none, or one of another kind; the message names a tensor.
    """
    own, said = part_of(tensors, prefix, "discriminator")
    first = own.get("cnn_f.0.conv.weight", ())
    heads = [name for name in own if re.fullmatch(r"cnn_c\.\d+\.conv\.weight", name)]
    if len(first) != 4 or len(heads) != 1 or len(own[heads[0]]) != 4:
        raise MismatchError(
            f"{said} has no cnn_f.0.conv.weight and cnn_c.0.conv.weight, FUNIT's first layer and "
            f"its head"
        )
    depth = int(heads[0].split(".")[1]) + 1
    blocks = _places(own, r"cnn_f\.(\d+)\.conv_0\.conv\.weight")
    sizes = {
        "classes": own[heads[0]][0],
        "width": first[0],
        "halvings": (blocks - (3 - depth)) // 2,
        "most": own[heads[0]][1],
        "heads": 2 if any(name.startswith("cnn_classifier.") for name in own) else 1,
        "depth": depth,
        "channels": first[1],
    }
    must_match(own, Network(DISCRIMINATOR, sizes).shapes(), said)
    return sizes


def _places(own: Mapping[str, Any], pattern: str) -> int:
    """How many numbers stand where a pattern has one."""
    return len({match[1] for name in own if (match := re.fullmatch(pattern, name))})
