"""A small network that reads handwritten digits, in numpy, and its trainer for modelsoup.

The data are scikit-learn's digits: 1,797 real scans of 8 × 8 pixels. `Digits` at the end is all
that a framework of your own needs to take part in a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits

import modelsoup

Weights = dict[str, np.ndarray]
HIDDEN = 64


@cache
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
        "hidden.weight": rng.normal(0, 0.15, (64, HIDDEN)).astype(np.float32),
        "hidden.bias": np.zeros(HIDDEN, np.float32),
        "output.weight": rng.normal(0, 0.15, (HIDDEN, 10)).astype(np.float32),
        "output.bias": np.zeros(10, np.float32),
    }


def forward(weights: Weights, scans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hidden activations, and the logarithm of each digit's score."""
    hidden = np.maximum(scans @ weights["hidden.weight"] + weights["hidden.bias"], 0)
    return hidden, hidden @ weights["output.weight"] + weights["output.bias"]


def train_epoch(
    weights: Weights, rate: float, rng: np.random.Generator, frozen: tuple[str, ...] = ()
) -> float:
    """Gradient descent on the cross-entropy, 32 scans at a time, in place; the mean loss."""
    scans, labels, _, _ = digits()
    losses = []
    for batch in np.array_split(rng.permutation(len(labels)), len(labels) // 32):
        x = scans[batch]
        hidden, scores = forward(weights, x)
        share = np.exp(scores - scores.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        losses.append(-np.log(share[np.arange(len(batch)), labels[batch]] + 1e-9).mean())
        share[np.arange(len(batch)), labels[batch]] -= 1
        share /= len(batch)
        inner = (share @ weights["output.weight"].T) * (hidden > 0)
        gradients = {
            "output.weight": hidden.T @ share, "output.bias": share.sum(axis=0),
            "hidden.weight": x.T @ inner, "hidden.bias": inner.sum(axis=0),
        }  # fmt: skip
        for name, gradient in gradients.items():
            if name not in frozen:
                weights[name] -= rate * gradient
    return float(np.mean(losses))


def accuracy(checkpoint: Path | Weights) -> float:
    """The share of held-out digits that a network reads correctly."""
    _, _, scans, labels = digits()
    weights = checkpoint
    if not isinstance(weights, dict):
        weights = dict(modelsoup.open_checkpoint(weights))
    _, scores = forward(weights, scans)
    return float((scores.argmax(axis=1) == labels).mean())


@dataclass(frozen=True)
class Options:
    """What a plan may say to the trainer."""

    rate: float
    epochs: int = 15
    init: int = 0  # the seed of tensors that the start checkpoint lacks: one for all leaves


class Digits:
    """Trains the network; `digits:Digits` in a plan that lies beside this file."""

    name = "digits"
    options = Options

    def groups(self, options: Options) -> dict[str, list[str]]:
        """Layer groups for rules."""
        return {"low-level": ["hidden.*"]}

    def tensors(self, options: Options) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What is written, so that a plan can be checked before anything is trained."""
        return {name: ("F32", values.shape) for name, values in start().items()}

    def train(self, job: modelsoup.Job) -> None:
        """Go on from the start checkpoint, or from what a crash left in the work folder."""
        options: Options = job.options
        weights = start(options.init) | ({} if job.start is None else load_file(job.start))
        state, first = job.work / "state.safetensors", 0
        if state.exists():
            weights = load_file(state)
            first = int(weights.pop("epoch")[0])
        for epoch in range(first, options.epochs):
            # A generator for each epoch: a resumed training sees the same batches.
            rng = np.random.default_rng([job.seed, epoch])
            loss = train_epoch(weights, options.rate, rng, job.frozen)
            partial = state.with_suffix(".new")
            save_file(weights | {"epoch": np.array([epoch + 1])}, partial)
            partial.replace(state)
            job.report((epoch + 1) / options.epochs, {"loss": loss})
        job.report(1.0, {"accuracy": accuracy(weights)})
        save_file(weights, job.output)
