"""A soup of real models in a few seconds: handwritten digits, numpy, four learning rates.

Trains a small network on scikit-learn's digits (1,797 real scans of 8 × 8 pixels) four times from
one shared start, writes the runs as safetensors files, averages them, and prints the accuracy of
each run and of the soup on scans that none has seen.

    python examples/digits_soup.py [FOLDER]        (default: runs)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

import modelsoup

Weights = dict[str, np.ndarray]
LEARNING_RATES = (0.05, 0.1, 0.2, 0.4)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training scans (1,200 × 64, in [0, 1]) and labels, then held-out scans and labels."""
    scans, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    scans = (scans[order] / 16).astype(np.float32)
    labels = labels[order]
    return scans[:1200], labels[:1200], scans[1200:], labels[1200:]


def start(seed: int = 0) -> Weights:
    """A network of one hidden layer, untrained."""
    rng = np.random.default_rng(seed)
    return {
        "hidden.weight": rng.normal(0, 0.15, (64, 64)).astype(np.float32),
        "hidden.bias": np.zeros(64, np.float32),
        "output.weight": rng.normal(0, 0.15, (64, 10)).astype(np.float32),
        "output.bias": np.zeros(10, np.float32),
    }


def forward(weights: Weights, scans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hidden activations, and the logarithm of each digit's score."""
    hidden = np.maximum(scans @ weights["hidden.weight"] + weights["hidden.bias"], 0)
    return hidden, hidden @ weights["output.weight"] + weights["output.bias"]


def train(weights: Weights, rate: float, seed: int, epochs: int = 15) -> Weights:
    """Gradient descent on the cross-entropy, 32 scans at a time."""
    weights = {name: values.copy() for name, values in weights.items()}
    scans, labels, _, _ = digits()
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(labels)), len(labels) // 32):
            x = scans[batch]
            hidden, scores = forward(weights, x)
            gradient = np.exp(scores - scores.max(axis=1, keepdims=True))
            gradient /= gradient.sum(axis=1, keepdims=True)
            gradient[np.arange(len(batch)), labels[batch]] -= 1
            gradient /= len(batch)
            inner = (gradient @ weights["output.weight"].T) * (hidden > 0)
            weights["output.weight"] -= rate * (hidden.T @ gradient)
            weights["output.bias"] -= rate * gradient.sum(axis=0)
            weights["hidden.weight"] -= rate * (x.T @ inner)
            weights["hidden.bias"] -= rate * inner.sum(axis=0)
    return weights


def accuracy(checkpoint: Path) -> float:
    """The share of held-out digits that a checkpoint reads correctly."""
    _, _, scans, labels = digits()
    _, scores = forward(dict(modelsoup.open_checkpoint(checkpoint)), scans)
    return float((scores.argmax(axis=1) == labels).mean())


def main() -> None:
    """Train, merge, compare."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    folder.mkdir(parents=True, exist_ok=True)
    shared = start()
    save_file(shared, folder / "start.safetensors")
    runs = []
    for seed, rate in enumerate(LEARNING_RATES):
        runs.append(folder / f"rate-{rate}.safetensors")
        save_file(train(shared, rate, seed), runs[-1])
        print(f"{runs[-1]}: {accuracy(runs[-1]):.1%} of the held-out digits are right")

    soup = folder / "soup.safetensors"
    modelsoup.merge(runs, soup, force=True)
    print(f"{soup}: {accuracy(soup):.1%}, the average of the four")


if __name__ == "__main__":
    main()
