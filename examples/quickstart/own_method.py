"""A merge method of one's own, which trusts the second model where the two are close.

Run `examples/quickstart/quickstart.py` first: this merges two of what it leaves in `runs/`.

    python examples/quickstart/own_method.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from digits import accuracy

import modelsoup


@modelsoup.method("swap_near", models=(2, 2), summary="swap what is close")
def swap_near(
    x: modelsoup.Tensor,
    t: float = modelsoup.parameter(low=0, doc="how far apart two values may be to be swapped"),
) -> Any:
    """The second model's share is t / |a − b|, at most 1."""

    def merged(b: modelsoup.Block) -> np.ndarray:
        first, second = b.model(0), b.model(1)
        share = np.minimum(t / np.maximum(np.abs(first - second), 1e-6), 1)
        made: np.ndarray = share * second + (1 - share) * first
        return made

    return merged


def main() -> None:
    """Merge two runs with it."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    pair = [folder / "rate-0.1.safetensors", folder / "rate-0.4.safetensors"]
    merged = folder / "swap_near.safetensors"
    modelsoup.merge(pair, merged, method="swap_near", parameters={"t": 0.01}, force=True)
    print(f"{merged}: {accuracy(merged):.1%} of the held-out digits are right")


if __name__ == "__main__":
    main()
