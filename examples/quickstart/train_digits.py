"""The same training as a program of its own, as a plan's `command` runs it.

python train_digits.py --out net.safetensors --rate 0.1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from digits import accuracy, start, train_epoch
from safetensors.numpy import load_file, save_file


def main() -> None:
    """Train, telling modelsoup how far it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in", dest="start", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frozen", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=15)
    given = parser.parse_args()
    weights = start() | (load_file(given.start) if given.start else {})
    frozen = tuple(given.frozen.read_text().split()) if given.frozen else ()
    for epoch in range(given.epochs):
        loss = train_epoch(weights, given.rate, np.random.default_rng([given.seed, epoch]), frozen)
        done = (epoch + 1) / given.epochs
        print("soup-progress", json.dumps({"done": done, "loss": loss}), flush=True)
    save_file(weights, given.out)
    print(f"accuracy {accuracy(weights):.1%}")


if __name__ == "__main__":
    main()
