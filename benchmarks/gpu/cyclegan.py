"""Images per second of training on a GPU, beside the original step.

    python benchmarks/gpu/cyclegan.py --size 256

CycleGAN at its paper's size, batch 1 unless told. Rows: the original step in float32
(`benchmarks/cyclegan_reference.py`); ours in float32; ours with bf16 autocast, channels-last and
torch.compile. Each is warmed up, then timed over --steps steps between two synchronisations; rounds
of all rows in turn, the median of --repeat. An image is one of X with one of Y.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from cyclegan_reference import Original
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.training.session import Session

Step = Callable[[torch.Tensor, torch.Tensor], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=256, metavar="SIDE")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--steps", type=int, default=20, metavar="N")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA GPU (CUDA), and torch finds none here")
    with tempfile.TemporaryDirectory() as folder:
        images(Path(folder))
        measure(arguments, folder)


def measure(arguments: argparse.Namespace, folder: str) -> None:
    size, batch = arguments.size, arguments.batch
    fast = {"precision": "bf16", "channels_last": True, "compile": True}
    rows: dict[str, Step] = {
        "original, float32": Original(device="cuda").step,
        "ours, float32": session(size, folder, {}).step,
        "ours, bf16, channels-last, compiled": session(size, folder, fast).step,
    }
    a, b = (torch.rand(batch, 3, size, size, device="cuda") * 2 - 1 for _ in range(2))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {size}², batch {batch}\n")
    for step in rows.values():
        for _ in range(5):
            step(a, b)
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.repeat):
        for name, step in rows.items():
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(arguments.steps):
                step(a, b)
            torch.cuda.synchronize()
            speeds[name].append(arguments.steps * batch / (time.perf_counter() - begun))
    first = statistics.median(next(iter(speeds.values())))
    print("| step | images a second | ratio |\n|---|--:|--:|")
    for name, values in speeds.items():
        speed = statistics.median(values)
        print(f"| {name} | {speed:.1f} | {speed / first:.2f} |")


def images(folder: Path) -> None:
    """Two black images a domain: a session wants data, the steps here have their own."""
    for kind in "AB":
        (folder / f"train{kind}").mkdir()
        for n in range(2):
            save_png(np.zeros((8, 8, 3), np.uint8), folder / f"train{kind}" / f"{n}.png")


def session(size: int, folder: str, more: dict[str, object]) -> Session:
    options = CycleGANOptions(
        data=Path(folder), load_size=size, crop_size=size, device="cuda", sheet_every=0, **more
    )
    return CycleGAN().session(options, None, seed=0)


if __name__ == "__main__":
    main()
