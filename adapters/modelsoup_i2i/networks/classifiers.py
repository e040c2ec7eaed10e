"""What is known of classifiers without building one; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelsoup import MismatchError

from .described import Network
from .shapes import must_match, part_of

ROOM = "modelsoup_i2i.networks.classifier"
MADE_BY = {"small": f"{ROOM}:SmallClassifier", "resnet18": f"{ROOM}:ResNet18"}
LEAST = {"small": 8, "resnet18": 1}
"""The smallest side of a picture, of which three halvings leave a pixel."""
_FIRST = {"small": "layers.0.weight", "resnet18": "conv1.weight"}


def classifier(network: str, classes: int, channels: int) -> Network:
    """One of such sizes."""
    return Network(MADE_BY[network], {"classes": classes, "channels": channels})


def classifier_in(tensors: Mapping[str, Sequence[int]], prefix: str = "C.") -> tuple[str, Network]:
    """The classifier in a checkpoint: its name in `MADE_BY`, and what it was built with.

    Args:
        tensors: name → shape, of a whole checkpoint or one network.
        prefix: what the network's names begin with.

    Raises:
        MismatchError: there is none, or one of another kind; the message names a tensor.
    """
    own, said = part_of(tensors, prefix, "classifier")
    for kind, first in _FIRST.items():
        if len(own.get(first, ())) == 4 and own.get("fc.weight"):
            found = classifier(kind, own["fc.weight"][0], own[first][1])
            must_match(own, found.shapes(), said)
            return kind, found
    firsts = " or ".join(f"{prefix}{first}" for first in _FIRST.values())
    raise MismatchError(f"there is no classifier: no {firsts} beside {prefix}fc.weight")
