"""Names of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"(.*?(?:^|[./])(?:layers|layer|blocks|block|resblocks|h))\.(\d{1,6})\.")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts `blocks.2` before `blocks.10`."""

    def key(part: str) -> tuple[int, int, str]:
        if "0" <= part[0] <= "9":
            digits = part.lstrip("0")
            return (0, len(digits), digits)  # as numbers order, of any length
        return (1, 0, part)

    return tuple(key(part) for part in re.findall(r"[0-9]+|[^0-9.]+", name))


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
