"""What of a step of `modality` its augmentations take, and how long its clusters take.

    python benchmarks/modality.py
    python benchmarks/modality.py --device cuda

A step is SimCLR's: two views of each picture, embedded in one pass, NT-Xent, Adam. On a CPU the
encoder is the small one, on 32 pixels; on a GPU the ResNet-18 of BalaGAN, on 128. Times are medians
of steps, and of both views of a batch alone. What is clustered is of the size that is asked of
BalaGAN's largest set: 100,000 embeddings of 512 numbers, 40 modalities.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from modelsoup_i2i.measuring.clusters import spherical_kmeans
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.pictures.views import JITTER, NUMBERS, view
from modelsoup_i2i.trainers.modality import Modality, ModalityOptions

SIZES = {
    "cpu": {"encoder": "small", "size": 32, "batch": 128},
    "cuda": {"encoder": "resnet18", "size": 128, "batch": 256},
}  # fmt: skip
SETS = {
    "plain": (("crop", "flip", "color", "blur"), (0.8, 0.8, 0.0, 0.0)),
    "BalaGAN's": (("crop", "flip", "color", "gray", "blur"), JITTER),
    "all": (tuple(NUMBERS), JITTER),
}
MOST = 0.5  # of a step: more would be its bottleneck
SECONDS = 10.0  # that the clusters may take
PICTURES = 64  # of each domain, of noise: what is in them does not matter to time


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--repeat", type=int, default=15, metavar="N", help="steps")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch")
    parser.add_argument("--rows", type=int, default=100_000, metavar="N", help="embeddings")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda needs an NVIDIA GPU (CUDA), and torch finds none here")
    torch.set_num_threads(asked.threads)
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, {asked.threads} threads, load before "
        f"{os.getloadavg()[0]:.2f}"
        if asked.device == "cpu" else torch.cuda.get_device_name()
    )  # fmt: skip
    told = ", ".join(f"{name} {value}" for name, value in SIZES[asked.device].items())
    print(f"{where}, torch {torch.__version__}; {told}\n")
    print("| augmentations | step, ms | both views, ms | share | target |")
    print("|---|--:|--:|--:|---|")
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder), SIZES[asked.device]["size"])
        for name, (augment, jitter) in SETS.items():
            step, views = seconds(asked, Path(folder), augment, jitter)
            missed |= views / step > MOST
            verdict = f"{MOST:.2f}: {'missed' if views / step > MOST else 'met'}"
            print(
                f"| {name} | {1000 * step:.1f} | {1000 * views:.1f} | {views / step:.2f} "
                f"| {verdict} |"
            )
    taken = clustered(asked.rows)
    missed |= taken > SECONDS
    verdict = "missed" if taken > SECONDS else "met"
    print(f"\n{asked.rows} embeddings of 512 numbers in 40 clusters: {taken:.1f} s ({SECONDS:g} s: "
          f"{verdict})")  # fmt: skip
    sys.exit(missed)


def pictures(root: Path, side: int) -> None:
    for domain in "AB":
        (root / domain).mkdir()
        for n in range(PICTURES):
            noise = np.random.default_rng((ord(domain), n)).integers(0, 256, (side, side, 3))
            save_png(noise.astype(np.uint8), root / domain / f"{n}.png")


def seconds(
    asked: argparse.Namespace, folder: Path, augment: tuple[str, ...], jitter: tuple[float, ...]
) -> tuple[float, float]:
    """Median seconds of a step, and of the views in it."""
    options = ModalityOptions(
        data_a=folder / "A", data_b=folder / "B", k=2, augment=augment, jitter=jitter,
        device=asked.device, threads=0, steps=1 << 30, sheet_every=0, **SIZES[asked.device],
    )  # fmt: skip
    session = Modality().session(options, None, seed=0)
    drawn = session.batches()
    group = next(drawn)
    batch = {name: session.placed(values) for name, values in group[0].items()}

    def views() -> None:
        for numbers in (batch["first"], batch["second"]):
            view(batch["x"], augment, numbers, jitter)

    steps = timed(lambda: session.optimise([batch]), asked)
    return steps, timed(views, asked)


def timed(make: Callable[[], object], asked: argparse.Namespace) -> float:
    taken = []
    for n in range(asked.repeat + 3):
        if asked.device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        make()
        if asked.device == "cuda":
            torch.cuda.synchronize()
        if n >= 3:  # the first ones allocate, and choose kernels
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def clustered(count: int) -> float:
    """Seconds of k-means."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 512), np.float32)
    rows = centres[rng.integers(40, size=count)]
    rows += rng.standard_normal(rows.shape, np.float32)
    begun = time.perf_counter()
    spherical_kmeans(rows, 40)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
