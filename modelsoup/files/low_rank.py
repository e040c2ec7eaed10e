"""Low-rank adapters: which tensors are factors of an update, and mean nothing one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable

# PEFT's, MLX', kohya's, diffusers' and XLabs' LoRA, DoRA's magnitudes, LyCORIS' products.
_FACTOR = re.compile(
    r".*(?:lora_(?:[aAbB]|up|mid|down|embedding_[AB]|magnitude_vector|E)\b"
    r"|lora\d*\.(?:up|mid|down)\b|lora_linear_layer\.(?:up|down)\b"
    r"|hada_[tw][12]|lokr_[tw][12]|dora_scale\b).*"
)
_ALPHA = re.compile(r"(.*)\.alpha")
_HOME = re.compile(r"\.(?:lora_|lora\d*\.|hada_|lokr_)")
WORDS = ("lora", "lokr", "hada", "dora", "alpha")
"""One of them is in any name of a factor, in lower case; else in few names."""


def factors(names: Iterable[str]) -> list[str]:
    """The names that belong to a low-rank update: its factors, and what scales their product."""
    every = list(names)
    found = [name for name in every if _FACTOR.fullmatch(name)]
    homes = {_HOME.split(name, maxsplit=1)[0] for name in found}
    alphas = [n for n in every if (match := _ALPHA.fullmatch(n)) and match[1] in homes]
    return [*found, *alphas]


def pattern_for(factor: str) -> str:
    """A short pattern that speaks of a factor, and so of others like it."""
    word = next(word for word in WORDS if word in factor)
    return "*.alpha" if word == "alpha" else f"*{word}*"


def are_named(pattern: str) -> bool:
    """Whether a rule's pattern speaks of factors: whoever writes it knows what they are."""
    return any(word in pattern.lower() for word in WORDS)
