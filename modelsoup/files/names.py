"""Names of tensors."""

from __future__ import annotations

import re


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts `blocks.2` before `blocks.10`."""

    def key(part: str) -> tuple[int, int, str]:
        if "0" <= part[0] <= "9":
            digits = part.lstrip("0")
            return (0, len(digits), digits)  # as numbers order, of any length
        return (1, 0, part)

    return tuple(key(part) for part in re.findall(r"[0-9]+|[^0-9.]+", name))
