"""Names of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# The outermost: T5's `block.3.layer.0`, and experts within a layer, are parts of one.
_LAYER = re.compile(
    r"(.*?(?:^|[./])(?:layers|layer|blocks|block|resblocks|h))\.(\d{1,6})\.(?=.)", re.DOTALL | re.A
)
# GPT-NeoX calls its head `embed_out`.
_EMBEDDING = re.compile(
    r"emb(?!ed_out)|\b(?:wte|wpe|ln_pre|pre_norm|conv1|stem|cls_token|shared)\b", re.I
)
# As Llama, GPT-2, GPT-NeoX, BERT, BLOOM, T5, Falcon and Mistral's own files have them.
_OF_TOKENS = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|embed_in|embed_out|lm_head|word_embeddings|tok_embeddings"
    r"|tokens_embed|token_embedding|shared|cls\.predictions\.decoder|cls\.predictions(?=\.bias))"
    r"(?:\.(?:weight|bias))?|output\.weight"
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


def layer_of(name: str) -> Layer | None:
    """The layer that a tensor belongs to, None where its name has none."""
    found = _LAYER.match(name)
    return None if found is None else Layer(found[1], int(found[2]), name[found.end() :])


def is_embedding(name: str) -> bool:
    """Whether a tensor stands before the first layer, as far as its name tells.

    What has no layer and is no embedding stands behind the last one: norms and heads do.
    """
    return _EMBEDDING.search(name) is not None


def layers_of(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Of names that are in one of a model's layers: the layer's index, and how many there are.

    `model.layers.3.mlp.weight` is in layer 3, of as many as the highest index there says; stacks
    with other names before the index are counted for themselves.
    """
    found = {name: match for name in names if (match := _LAYER.match(name))}
    counts: dict[str, int] = {}
    for match in found.values():
        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return {name: (int(match[2]), counts[match[1]]) for name, match in found.items()}


def is_of_tokens(name: str) -> bool:
    """Whether a tensor has a row for each token, as far as its name tells: embeddings, a head."""
    return layer_of(name) is None and _OF_TOKENS.fullmatch(name) is not None
