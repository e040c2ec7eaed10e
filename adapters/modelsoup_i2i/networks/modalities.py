"""What is known of labellers by modality without building one; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelsoup import MismatchError

from .described import Joined, Network
from .shapes import must_match, part_of

ROOM = "modelsoup_i2i.networks.modality"
MADE_BY = f"{ROOM}:Labeller"
PROJECTION = Joined(f"{ROOM}:Projection", ("M",))
RECONSTRUCTION = Joined(f"{ROOM}:Reconstruction", ("M",))
VAE_SIDE = 64  # of the pictures that the VAE sees
LATENT = 128  # numbers of its code
_FIRST = {
    "vae": ("encoder.mean.weight", "encoder.layers.0.weight"),
    "small": ("encoder.layers.0.weight", "encoder.layers.0.weight"),
    "resnet18": ("encoder.conv1.weight", "encoder.conv1.weight"),
}  # fmt: skip
"""What tells each from those after it, and a tensor whose second side is the channels."""


def labeller(encoder: str, size: int, k: int, channels: int = 3, embedding: str = "h") -> Network:
    """One of such sizes."""
    sizes = {"encoder": encoder, "size": size, "k": k, "channels": channels}
    return Network(MADE_BY, {**sizes, "embedding": embedding})


def labeller_in(tensors: Mapping[str, Sequence[int]], prefix: str = "M.") -> Network:
    """The labeller in a checkpoint; its tensor `side` has the size.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the network's names begin with.

    Raises:
        MismatchError: there is none, or one of another kind; the message names a tensor.
    """
    own, said = part_of(tensors, prefix, "labeller")
    for encoder, (telling, first) in _FIRST.items():
        shape, centroids = own.get(first, ()), own.get("centroids", ())
        if telling not in own or len(shape) != 4 or len(centroids) != 2:
            continue
        narrow = own.get("head.2.weight", (0,))[0]
        embedding = "z" if centroids[1] == narrow else "h"
        found = labeller(encoder, VAE_SIDE, centroids[0], shape[1], embedding)
        must_match(own, found.shapes(), said)
        return found
    raise MismatchError(
        f"there is no labeller of modalities, which the trainer modality makes: no "
        f"{prefix}centroids beside an encoder of {', '.join(_FIRST)}"
    )
