"""Names of tensors."""

from __future__ import annotations

import re
from typing import NamedTuple

# GPT-NeoX calls its head `embed_out`.
_EMBEDDING = re.compile(
    r"emb(?!ed_out)|\b(?:wte|wpe|ln_pre|pre_norm|conv1|stem|cls_token|shared)\b", re.I
)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts `blocks.2` before `blocks.10`."""

    def key(part: str) -> tuple[int, int, str]:
        if "0" <= part[0] <= "9":
            digits = part.lstrip("0")
            return (0, len(digits), digits)  # as numbers order, of any length
        return (1, 0, part)

    return tuple(key(part) for part in re.findall(r"[0-9]+|[^0-9.]+", name))


class Layer(NamedTuple):
    """A tensor's place among numbered layers: `model.layers.3.mlp.up.weight`.

    Attributes:
        stack: what the layers are part of: `model.layers`.
        number: of the layer: 3.
        rest: the name within the layer: `mlp.up.weight`.
    """

    stack: str
    number: int
    rest: str

    def numbered(self, number: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stack}.{number}.{self.rest}"


# The outermost: T5's `block.3.layer.0`, and experts within a layer, are parts of one.
_LAYER = re.compile(
    r"((?:.*?[./])??(?:layers|layer|blocks|block|resblocks|h))\.(\d{1,5})\.(.+)", re.DOTALL | re.A
)


def layer_of(name: str) -> Layer | None:
    """The layer that a tensor belongs to, None where its name has none."""
    found = _LAYER.fullmatch(name)
    return None if found is None else Layer(found[1], int(found[2]), found[3])


def is_embedding(name: str) -> bool:
    """Whether a tensor stands before the first layer, as far as its name tells.

    What has no layer and is no embedding stands behind the last one: norms and heads do.
    """
    return _EMBEDDING.search(name) is not None
