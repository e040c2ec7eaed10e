"""How long trees take beside the shortest time that they could, and how long their plans take.

    python benchmarks/tree.py --workers 1 2 4 8

A tree of 8 leaves: every leaf is trained, every pair is merged and fine-tuned, and every training
sleeps for --sleep seconds, so that W workers need no W cores. The critical path is the shortest
schedule that W workers have (Hu, Operations Research 9, 1961); wall seconds are those of one `soup
run --executor processes:W` with a new store, the start of the interpreter included. The plan is
that of a tree over 64 leaves of 10,000 tensors, with nothing known of them. The last table has a
tree of merges alone, over 8 leaves of 256 MB, one merge after the other and with `--fuse`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SOUP = [sys.executable, "-m", "modelsoup"]
LEAVES = 8
TARGET = 1.25  # wall / critical path
PLANNED = 64  # leaves
TENSORS = 10_000  # in each
PLAN_TARGET = 2.0  # seconds
SLEEPER = """
import time
from dataclasses import dataclass
import numpy as np
from safetensors.numpy import load_file, save_file

@dataclass(frozen=True)
class Options:
    seconds: float

class Sleeper:
    name = "sleeper"
    options = Options

    def train(self, job):
        time.sleep(job.options.seconds)
        fresh = {"w": np.full(4, job.seed % 100, np.float32)}
        save_file(load_file(job.start) if job.start else fresh, job.output)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], metavar="W")
    parser.add_argument("--sleep", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="take the median of N")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        print(f"load before: {os.getloadavg()[0]:.2f}\n")
        missed = trees(Path(folder), arguments.workers, arguments.sleep, arguments.repeat)
        missed |= plans(Path(folder), arguments.repeat)
        fusing(Path(folder), arguments.repeat)
    sys.exit(missed)


def trees(folder: Path, workers: list[int], sleep: float, repeat: int) -> bool:
    """A row for each number of workers; whether one misses the target."""
    (folder / "sleeper.py").write_text(SLEEPER)
    (folder / "tree.yaml").write_text(plan_text(sleep))
    trainings = 2 * LEAVES - 1
    print(f"{LEAVES} leaves, {trainings} trainings of {sleep:g} s, {LEAVES - 1} merges")
    print("| W | wall, s | critical path, s | ratio | target |\n|--:|--:|--:|--:|---|")
    missed = False
    for count in workers:
        bound = rounds(count) * sleep
        walls = [tree_seconds(folder, count) for _ in range(repeat)]
        ratio = statistics.median(walls) / bound
        missed |= ratio > TARGET
        print(
            f"| {count} | {statistics.median(walls):.2f} | {bound:.2f} | {ratio:.3f} "
            f"| ≤ {TARGET} {verdict(ratio <= TARGET)} |",
            flush=True,
        )
    return missed


def rounds(workers: int) -> int:
    """How many trainings after each other W workers need at least; Hu's schedule needs no more.

    All trainings from some depth on must be done, W at a time, before those above, one a level.
    """
    levels = LEAVES.bit_length()  # leaves, then one fine-tuning a level
    below = {depth: 2 * LEAVES - 2**depth for depth in range(levels)}
    return max(depth - (-count // workers) for depth, count in below.items())


def plan_text(sleep: float) -> str:
    trainer = f"{{trainer: 'sleeper:Sleeper', seconds: {sleep}}}"
    models = [f"  m{n}: {{train: {trainer}}}" for n in range(LEAVES)]
    return "\n".join([
        "soup: 1", "models:", *models, f"defaults: {{finetune: {trainer}}}",
        f"tree: {{pair: [{', '.join(f'm{n}' for n in range(LEAVES))}]}}", "",
    ])  # fmt: skip


def tree_seconds(folder: Path, workers: int) -> float:
    shutil.rmtree(folder / ".soup-store", ignore_errors=True)
    options = ["-q", "--force", "--executor", f"processes:{workers}"]
    return seconds([*SOUP, "run", "tree.yaml", *options], folder)


def plans(folder: Path, repeat: int) -> bool:
    """One row: `soup plan` over many leaves; whether it misses the target."""
    zeros = {f"layer.{n}.weight": np.zeros(1, np.float32) for n in range(TENSORS)}
    save_file(zeros, folder / "0.safetensors")
    for number in range(1, PLANNED):
        shutil.copy(folder / "0.safetensors", folder / f"{number}.safetensors")
    models = "".join(f"  m{n}: {n}.safetensors\n" for n in range(PLANNED))
    pair = ", ".join(f"m{n}" for n in range(PLANNED))
    (folder / "large.yaml").write_text(f"soup: 1\nmodels:\n{models}tree: {{pair: [{pair}]}}\n")
    command = [*SOUP, "plan", "large.yaml", "--json"]
    wall = statistics.median(seconds(command, folder) for _ in range(repeat))
    print(f"\nPlan over {PLANNED} leaves of {TENSORS:,} tensors\n| wall, s | target |\n|--:|---|")
    print(f"| {wall:.2f} | ≤ {PLAN_TARGET} {verdict(wall <= PLAN_TARGET)} |")
    return wall > PLAN_TARGET


def fusing(folder: Path, repeat: int) -> None:
    """A row without `--fuse` and one with it."""
    names = [f"big{n}" for n in range(LEAVES)]
    for seed, name in enumerate(names):
        rng = np.random.default_rng(seed)
        save_file({"w": rng.standard_normal(1 << 26, np.float32)}, folder / f"{name}.safetensors")
    models = "".join(f"  {name}: {name}.safetensors\n" for name in names)
    text = f"soup: 1\nmodels:\n{models}tree: {{pair: [{', '.join(names)}]}}\n"
    (folder / "merges.yaml").write_text(text)
    print(f"\n{LEAVES - 1} merges over {LEAVES} leaves of {1 << 28:,} bytes, digests known")
    print("| | wall, s | written to the store, MB |\n|---|--:|--:|")
    for label, options in (("one after the other", []), ("`--fuse`", ["--fuse"])):
        walls = []
        for _ in range(repeat + 1):  # the first finds the digests of the leaves
            shutil.rmtree(folder / ".soup-store" / "objects", ignore_errors=True)
            command = [*SOUP, "run", "merges.yaml", "-q", "--force", *options]
            walls.append(seconds(command, folder))
        written = sum(
            file.stat().st_size for file in folder.glob(".soup-store/objects/*/*.safetensors")
        )
        print(f"| {label} | {statistics.median(walls[1:]):.2f} | {written / 1e6:.0f} |", flush=True)


def seconds(command: list[str], folder: Path) -> float:
    # Interpreters that may not keep bytecode compile modelsoup anew at every start.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return wall


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
