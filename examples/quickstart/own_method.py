"""A merge method of one's own: NearSwap, which trusts the second model where the two are close.

Run `examples/quickstart/quickstart.py` first: this merges two of what it leaves in `runs/`.

    python examples/quickstart/own_method.py [FOLDER]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from digits import accuracy

import modelsoup


@dataclass(frozen=True)
class NearSwapParameters:
    """Parameters of `nearswap`."""

    t: float = modelsoup.parameter(low=0, doc="how far apart two values may be to be swapped")


@modelsoup.method("nearswap", NearSwapParameters, models=(2, 2), summary="swap what is close")
def nearswap(x: Any, p: Any) -> Any:
    """The second model's share is t / |a − b|, at most 1."""
    share = np.minimum(p.t / np.maximum(np.abs(x[0] - x[1]), np.float32(1e-6)), np.float32(1))
    return share * x[1] + (1 - share) * x[0]


def main() -> None:
    """Merge two runs with it."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    pair = [folder / "rate-0.1.safetensors", folder / "rate-0.4.safetensors"]
    merged = folder / "nearswap.safetensors"
    modelsoup.merge(pair, merged, method="nearswap", parameters={"t": 0.01}, force=True)
    print(f"{merged}: {accuracy(merged):.1%} of the held-out digits are right")


if __name__ == "__main__":
    main()
