"""A training step of `modelsoup_i2i` beside the published one: time and memory.

    python benchmarks/i2i.py
    python benchmarks/i2i.py --device cuda
    python benchmarks/i2i.py --trainer balagan
    python benchmarks/i2i.py --trainer cut

The published steps are `deepi2i_reference.py` and `balagan_reference.py`. Networks, batch and phase
are the same on both sides: on a CPU small ones of 32 pixels, of DeepI2I with 12 channels and batch
32, of BalaGAN with width 16 and batch 8; on a GPU those of the paper, 128 pixels, with 96 channels
and batch 4, and with width 64 and batch 10. DeepI2I's is of transferring's second phase, unless
told. CUT's is `cut_reference.py`, with the paper's networks and batch 1, of 128 pixels on a CPU and
256 on a GPU; FastCUT is `--trainer fastcut`. Ours draws its pictures and noise within the time that
is told, the published step has its pictures already.

Times are medians of steps made in turn, one of each kind a round; on a GPU of --steps steps between
two synchronisations. Memory is that of a process of its own that makes four steps: on a CPU the
highest resident set, less what it had before its networks were made; on a GPU what torch allocated.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from balagan_reference import Original as OriginalBalaGAN
from cut_reference import Original as OriginalCUT
from deepi2i_reference import Original
from modelsoup_i2i.networks.antialiaseds import tapped_sizes
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.balagan import BalaGAN, BalaGANOptions
from modelsoup_i2i.trainers.cut import CUT, FastCUT
from modelsoup_i2i.trainers.deepi2i import DeepI2I, DeepI2IOptions
from modelsoup_i2i.training.session import Session
from safetensors.torch import save_file

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "size": "32s", "ch": 12, "classes": 10, "chunk": 16, "shared": 64, "attention": 0,
        "batch": 32,
    },
    "cuda": {
        "size": 128, "ch": 96, "classes": 149, "chunk": 20, "shared": 128, "attention": 64,
        "batch": 4,
    },
}  # fmt: skip
BALAGAN: dict[str, dict[str, Any]] = {
    "cpu": {"size": 32, "width": 16, "classes": 5, "batch": 8},
    "cuda": {"size": 128, "width": 64, "classes": 41, "batch": 10},
}
OF_CUT: dict[str, dict[str, Any]] = {
    "cpu": {"size": 128, "width": 64, "blocks": 9, "batch": 1},
    "cuda": {"size": 256, "width": 64, "blocks": 9, "batch": 1},
}
USUAL = {"deepi2i": SIZES, "balagan": BALAGAN, "cut": OF_CUT, "fastcut": OF_CUT}
ORIGINAL, OURS, FAST = "published", "ours", "ours, bf16"
KINDS = {
    "cpu": {OURS: {}}, "cuda": {OURS: {}, FAST: {"precision": "bf16", "channels_last": True}},
}  # fmt: skip
# At most so much of the published step's time and memory; at least so many times its images.
ON_CPU = dict.fromkeys(("balagan", "cut", "fastcut"), (0.85, None)) | {"deepi2i": (0.85, 0.8)}
ON_GPU = {OURS: (1 / 1.5, None), FAST: (1 / 3, None)}
START = "start.safetensors"  # G and D of a GAN, with which a transfer begins
WARM_UP = 3  # steps that allocate, and choose kernels


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda needs an NVIDIA GPU (CUDA), and torch finds none here")
    if arguments.memory:
        kind, folder = arguments.memory
        print(peak(kind, arguments, Path(folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(arguments, folder)
        table(arguments, folder)


def parser() -> argparse.ArgumentParser:
    """What may be said."""
    own = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    own.add_argument("--device", choices=SIZES, default="cpu")
    own.add_argument("--trainer", choices=ON_CPU, default="deepi2i")
    own.add_argument("--size", help="32s, 64s, 64 or 128; of others a number")
    own.add_argument("--ch", type=int)
    own.add_argument("--width", type=int, help="of balagan and cut")
    own.add_argument("--batch", type=int)
    own.add_argument("--classes", type=int)
    own.add_argument("--accumulate", type=int, default=1, metavar="N", help="passes of a step")
    own.add_argument("--first-phase", action="store_true", help="only A and D are trained")
    own.add_argument("--scratch", action="store_true", help="all four networks are trained")
    own.add_argument("--compile", action="store_true", help="ours, on a GPU")
    own.add_argument("--repeat", type=int, default=9, metavar="N", help="rounds")
    own.add_argument("--steps", type=int, default=10, metavar="N", help="of a round on a GPU")
    own.add_argument("--threads", type=int, default=2, metavar="N")
    own.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # a kind, and the folder
    return own


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """What a training of ours begins with: pictures, and G and D of a GAN."""
    pictures(folder / "classes", sizes(arguments))
    if arguments.trainer == "balagan":  # the last class is B
        (folder / "classes" / f"{sizes(arguments)['classes'] - 1}").rename(folder / "B")
    if arguments.trainer not in ("cut", "fastcut"):
        made = original(arguments, "cpu").networks()
        save_file(
            {f"{n}.{tensor}": v for n in "GD" for tensor, v in made[n].state_dict().items()},
            folder / START,
        )


def sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of the device, but for what is told."""
    told = {n: getattr(arguments, n) for n in ("size", "ch", "width", "batch", "classes")}
    usual = USUAL[arguments.trainer][arguments.device]
    own = usual | {n: value for n, value in told.items() if value is not None}
    size = str(own["size"])
    return {**own, "size": int(size) if size.isdigit() else size}


def table(arguments: argparse.Namespace, folder: Path) -> None:
    """A row for each kind of step; the exit code says whether a target is missed."""
    device, own = arguments.device, sizes(arguments)
    kinds = [ORIGINAL, *KINDS[device]]
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, load before "
        f"{os.getloadavg()[0]:.2f}"
        if device == "cpu" else torch.cuda.get_device_name()
    )  # fmt: skip
    told = ", ".join(f"{name} {value}" for name, value in own.items())
    print(f"{where}, torch {torch.__version__}; {told}, {arguments.accumulate} passes a step\n")
    memory = {kind: apart(kind, folder) for kind in kinds}
    taken = seconds(kinds, arguments, folder)
    print("| step | ms | ratio | images a second | MB | ratio | targets |")
    print("|---|--:|--:|--:|--:|--:|---|")
    missed = False
    for kind in kinds:
        time_share, memory_share = (own[kind] / own[ORIGINAL] for own in (taken, memory))
        targets = ON_GPU if device == "cuda" else {OURS: ON_CPU[arguments.trainer]}
        most = targets.get(kind, (None, None))
        verdicts = [
            f"{name} {target:.2f}: {'met' if share <= target else 'missed'}"
            for name, share, target in zip(
                ("time", "memory"), (time_share, memory_share), most, strict=True
            )
            if target is not None
        ]
        missed |= any(verdict.endswith("missed") for verdict in verdicts)
        speed = own["batch"] * arguments.accumulate / taken[kind]
        print(
            f"| {kind} | {1000 * taken[kind]:.1f} | {time_share:.2f} | {speed:.1f} "
            f"| {memory[kind]:.0f} | {memory_share:.2f} | {', '.join(verdicts)} |"
        )
    sys.exit(missed)


def pictures(root: Path, own: dict[str, Any]) -> None:
    """Two of noise a class: what is in them does not matter to time or memory."""
    side = int(str(own["size"]).rstrip("s"))
    for label in range(own.get("classes", 2)):
        (root / f"{label}").mkdir(parents=True)
        for n in range(2):
            noise = np.random.default_rng((label, n)).integers(0, 256, (side, side, 3))
            save_png(noise.astype(np.uint8), root / f"{label}" / f"{n}.png")


def original(arguments: argparse.Namespace, device: str) -> Any:
    """The published one, of the size that is asked for."""
    own = sizes(arguments)
    if arguments.trainer == "balagan":
        return OriginalBalaGAN(own["classes"], own["width"], device=device)
    names = ("ch", "classes", "chunk", "shared", "attention")
    return Original(
        str(own["size"]), *(own[name] for name in names), device=device,
        phase=1 << 30 if arguments.first_phase else 0, scratch=arguments.scratch,
    )  # fmt: skip


def stepper(kind: str, arguments: argparse.Namespace, folder: Path) -> Callable[[], object]:
    """What makes one step, and on a GPU some of those that are read together."""
    if kind == ORIGINAL:
        return published(arguments)
    more = KINDS[arguments.device][kind] | ({"compile": True} if arguments.compile else {})
    own = session(arguments, folder, threads=0, **more)
    drawn = own.batches()

    def step() -> None:
        own.take(next(drawn))
        if own.steps % (own.behind + 1) == 0:
            list(own.read())

    return step


def published(arguments: argparse.Namespace) -> Callable[[], object]:
    """A step of the published code."""
    own, device, trainer = sizes(arguments), arguments.device, arguments.trainer
    side, batch = int(str(own["size"]).rstrip("s")), own["batch"]
    generator = torch.Generator().manual_seed(0)
    if trainer in ("cut", "fastcut"):
        more: dict[str, Any] = {"nce": 10.0, "identity": False} if trainer == "fastcut" else {}
        theirs = OriginalCUT(own["width"], own["blocks"], device=device, **more)
        x, y = (
            (torch.rand(batch, 3, side, side, generator=generator) * 2 - 1).to(device)
            for _ in range(2)
        )
        fast = trainer == "fastcut"
        maps = tapped_sizes(side, side)
        places = [[torch.randperm(n, device=device)[:256] for n in maps] for _ in range(2 - fast)]
        flips = itertools.cycle((False, fast))  # every second time; ours half of the times
        return lambda: theirs.step(x, y, *places, flip=next(flips))
    other = original(arguments, device)
    passes = [
        tuple(
            values.to(device)
            for _ in range(2)
            for values in (
                torch.rand(batch, 3, side, side, generator=generator) * 2 - 1,
                torch.randint(own["classes"], (batch,), generator=generator),
            )
        )
        for _ in range(arguments.accumulate)
    ]
    return (lambda: other.step(*passes[0])) if trainer == "balagan" else lambda: other.step(*passes)


def session(arguments: argparse.Namespace, folder: Path, **more: Any) -> Session:
    """A training of ours, on the pictures of a folder."""
    own, given = sizes(arguments), {"device": arguments.device, "sheet_every": 0, "steps": 1 << 30}
    given |= more
    classes = folder / "classes"
    if arguments.trainer in ("cut", "fastcut"):
        trainer = FastCUT() if arguments.trainer == "fastcut" else CUT()
        size = own.pop("size")
        options = trainer.options(
            **own, data_a=classes / "0", data_b=classes / "1", load_size=size, crop_size=size,
            decay_epochs=0, **given,
        )  # fmt: skip
        return trainer.session(options, None, seed=0)
    start = None if arguments.scratch else folder / START
    del own["classes"]
    if arguments.trainer == "balagan":
        balagan = BalaGANOptions(
            **own, data_a=classes, data_b=folder / "B", modalities="labels", **given
        )
        return BalaGAN().session(balagan, start, seed=0)
    deepi2i = DeepI2IOptions(
        **own, data=classes, accumulate=arguments.accumulate, scratch=arguments.scratch,
        phase1=1 << 30 if arguments.first_phase else 0, **given,
    )  # fmt: skip
    return DeepI2I().session(deepi2i, start, seed=0)


def seconds(kinds: list[str], arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Median seconds of a step of each kind."""
    on_gpu = arguments.device == "cuda"
    steps = {kind: stepper(kind, arguments, folder) for kind in kinds}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in range(arguments.repeat):
        for kind, step in steps.items():
            count = arguments.steps if on_gpu else 1
            if on_gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(count):
                step()
            if on_gpu:
                torch.cuda.synchronize()
            taken[kind].append((time.perf_counter() - begun) / count)
    return {kind: statistics.median(times) for kind, times in taken.items()}


def apart(kind: str, folder: Path) -> float:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory", kind, str(folder)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak(kind: str, arguments: argparse.Namespace, folder: Path) -> float:
    """MB at the highest in four steps, above what an idle torch has."""
    idle = torch.nn.Conv2d(3, 8, 3)
    idle(torch.zeros(1, 3, 16, 16)).sum().backward()  # oneDNN's own
    torch.optim.Adam(idle.parameters()).step()  # imports torch's compiler, 80 MB
    before = status("VmRSS")
    step = stepper(kind, arguments, folder)
    for _ in range(4):
        step()
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return status("VmHWM") - before


def status(name: str) -> float:
    """A line of the process's status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {name}: this part needs Linux")


if __name__ == "__main__":
    main()
