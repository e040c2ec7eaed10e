"""A training step of `modelsoup_i2i` beside the original one: time, memory, loading of data.

    python benchmarks/cyclegan.py --sizes 64 128

Both train CycleGAN at its paper's size (9 blocks, 64 channels, 28.3 million parameters), batch 1 in
float32 on the CPU. The original step is `cyclegan_reference.py`. Times are medians of steps made in
turn, one of each. Memory is the highest resident set of a process of its own that makes four steps,
less what it had before its networks were made. Loading is the share of their time for which
four steps wait for images, the decoding of all of them before the first one included.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from cyclegan_reference import Original
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.training.session import Session

TIME_TARGET, MEMORY_TARGET = 0.85, 0.8
KINDS = ("original", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], metavar="SIDE")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="steps that are timed")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--memory", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        images(Path(folder))
        if arguments.memory:
            print(peak(arguments.memory, arguments.sizes[0], folder, arguments.channels_last))
            return
        table(arguments, folder)


def table(arguments: argparse.Namespace, folder: str) -> None:
    """A row for each size; the exit code says whether a target is missed."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, "
        f"torch {torch.__version__}, load before {os.getloadavg()[0]:.2f}\n"
    )
    print("| side | original, s | ours, s | ratio | original, MB | ours, MB | ratio | loading |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    missed = False
    for size in arguments.sizes:
        original, ours = seconds(size, folder, arguments)
        before, now = (apart(kind, size, arguments) for kind in KINDS)
        share = loading(size, folder, arguments)
        print(
            f"| {size} | {original:.3f} | {ours:.3f} | {ours / original:.2f} | {before:.0f} "
            f"| {now:.0f} | {now / before:.2f} | {share:.2%} |",
            flush=True,
        )
        missed |= ours > TIME_TARGET * original or now > MEMORY_TARGET * before
    print(f"\ntargets: time {TIME_TARGET}, memory {MEMORY_TARGET}")
    sys.exit(missed)


def images(folder: Path) -> None:
    """Eight images a domain, of noise: what is in them does not matter to time or memory."""
    for kind in "AB":
        (folder / f"train{kind}").mkdir()
        for n in range(8):
            noise = np.random.default_rng((ord(kind), n)).integers(0, 256, (256, 256, 3))
            save_png(noise.astype(np.uint8), folder / f"train{kind}" / f"{n}.png")


def session(size: int, folder: str, *, channels_last: bool) -> Session:
    options = CycleGANOptions(
        data=Path(folder), load_size=size * 286 // 256, crop_size=size, device="cpu", sheet_every=0,
        epochs=2, channels_last=channels_last,
    )  # fmt: skip
    return CycleGAN().session(options, None, seed=0)


def pair(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))
    return a, b


def seconds(size: int, folder: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a step of the original and of ours."""
    both = (Original(), session(size, folder, channels_last=arguments.channels_last))
    a, b = pair(size)
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(arguments.repeat + 2):
        for own, times in zip(both, taken, strict=True):
            begun = time.perf_counter()
            own.step(a, b)
            if turn >= 2:  # the first ones allocate
                times.append(time.perf_counter() - begun)
    return statistics.median(taken[0]), statistics.median(taken[1])


def apart(kind: str, size: int, arguments: argparse.Namespace) -> float:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--memory", kind, "--sizes", str(size)]
    command += ["--threads", str(arguments.threads)]
    command += ["--channels-last"] * arguments.channels_last
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(kind: str, size: int, folder: str, channels_last: bool) -> float:
    """MB above what an idle torch has, at the highest, in four steps."""
    torch.nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 16, 16)).sum().backward()  # oneDNN's own
    before = status("VmRSS")
    if kind == "ours":
        own: Session | Original = session(size, folder, channels_last=channels_last)
    else:
        own = Original()
    a, b = pair(size)
    for _ in range(4):
        own.step(a, b)
    return status("VmHWM") - before


def status(name: str) -> float:
    """A line of the process's status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {name}: this part needs Linux")


def loading(size: int, folder: str, arguments: argparse.Namespace) -> float:
    """The share of its time for which a training waits for images."""
    own = session(size, folder, channels_last=arguments.channels_last)
    begun, waited = time.perf_counter(), 0.0
    steps = own.batches()
    for _ in range(4):
        asked = time.perf_counter()
        (drawn,) = next(steps)
        waited += time.perf_counter() - asked
        own.optimise([drawn])
    steps.close()
    return waited / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
