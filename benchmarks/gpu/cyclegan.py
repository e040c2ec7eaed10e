"""Training on a GPU beside the original step: images a second, kernels, waits; is it right?

    python benchmarks/gpu/cyclegan.py

One run, within --limit seconds (five minutes), on one card. CycleGAN at its paper's size, batch 1
unless told; the original step is `benchmarks/cyclegan_reference.py` in float32, ours is in float32
and with bf16 autocast in channels-last. An image is one of X with one of Y. For each size:

- speed: steps between two synchronisations, rounds of all rows in turn, the median;
- of a step, by torch.profiler: kernels, the time that the GPU works, and how often the host waits
  for it (synchronisations; on a CPU, values that are asked for, by an optimiser's count too);
- the whole training, images from a disk and losses told, beside the bare step;
- checks: the losses of the first step are the original's; a session that goes on from a state makes
  the same bits; a step that is not finite is told with its number and leaves finite weights.

`--device cpu --size 32 --steps 2` runs all of it without a GPU. The exit code says whether
a check failed or, on a GPU, a target was missed.
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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

from cyclegan_reference import Original
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.step import DivergedError

KINDS = {"float32": {}, "bf16": {"precision": "bf16", "channels_last": True}}
TARGETS = {(64, "float32"): 4.0, (64, "bf16"): 4.0, (256, "float32"): 2.2, (256, "bf16"): 4.0}
BUSY_TARGET, LOOP_TARGET = 1.15, 1.05  # wall beside the GPU's own time, the loop beside the step
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
ASKS = "aten::_local_scalar_dense"  # a value of a tensor
PROFILED = 2  # steps

Steps = Callable[[int], object]  # so many of them


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", metavar="cuda|cpu")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 256], metavar="SIDE")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--width", type=int, default=64, metavar="N")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="in a round")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA GPU (CUDA), and torch finds none (--device cpu)")
    where = "the CPU" if arguments.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, batch {arguments.batch}\n", flush=True)
    end, wrong = time.monotonic() + arguments.limit, []
    for n, size in enumerate(arguments.size):
        left = (end - time.monotonic()) / (len(arguments.size) - n)
        with tempfile.TemporaryDirectory() as folder:
            images(Path(folder), size, 2 * arguments.steps * arguments.batch)
            wrong += measured(arguments, size, folder, time.monotonic() + left)
    for said in wrong:
        print(f"missed: {said}")
    sys.exit(bool(wrong))


def measured(arguments: argparse.Namespace, size: int, folder: str, end: float) -> list[str]:
    """A table and checks for a size; what was missed."""
    shape = (arguments.batch, 3, size, size)
    pair = [torch.rand(shape, device=arguments.device) * 2 - 1 for _ in range(2)]
    first = Original(arguments.width, d_width=arguments.width, device=arguments.device)
    ours = {kind: session(arguments, size, folder, kind) for kind in KINDS}
    checks = {"losses of the original": losses_agree(first, ours["float32"], pair)}
    rows: dict[str, Steps] = {"original": lambda n: [first.step(*pair) for _ in range(n)]}
    rows |= {kind: bare(own, pair) for kind, own in ours.items()}
    of_step = {name: profiled(steps, arguments.device) for name, steps in rows.items()}
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.repeat):
        for name, steps in rows.items():
            took = seconds(lambda steps=steps: steps(arguments.steps), arguments.device)
            speeds[name].append(arguments.steps * arguments.batch / took)
        if time.monotonic() > end:
            break
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"| {size}² | images a second | ratio | kernels | waits | wall / GPU | loop / step |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    missed = []
    for name, value in speed.items():
        kernels, waits, busy = of_step[name]
        wall = arguments.batch / value
        ratio, of_gpu = value / speed["original"], wall / busy if busy else float("nan")
        loop = float("nan")
        if name in KINDS:
            loop = looped(session(arguments, size, folder, name, epochs=2), arguments) / wall
            figures = {
                f"{ratio:.2f} × the original": ratio >= TARGETS.get((size, name), 0),
                f"{of_gpu:.2f} × the GPU's time": not of_gpu > BUSY_TARGET,
                f"{loop:.2f} × the bare step": not loop > LOOP_TARGET,
            }
            missed += [f"{size}² {name}: {said}" for said, good in figures.items() if not good]
        print(
            f"| {name} | {value:.2f} | {ratio:.2f} | {kernels:.0f} | {waits:.1f} | {of_gpu:.2f} "
            f"| {loop:.2f} |"
        )
    checks["the same bits when gone on with"] = goes_on(arguments, size, folder, pair)
    checks["a step that is not finite is told"] = breaks(ours["float32"], pair)
    print("\n" + "\n".join(f"{'ok' if good else 'WRONG'}: {what}" for what, good in checks.items()))
    print(flush=True)
    wrong = [f"{size}²: {what}" for what, good in checks.items() if not good]
    return wrong if arguments.device == "cpu" else wrong + missed


def images(folder: Path, size: int, count: int) -> None:
    """Noise: what is in them does not matter to time."""
    for kind in "AB":
        (folder / f"train{kind}").mkdir()
        for n in range(count):
            noise = np.random.default_rng((ord(kind), n)).integers(0, 256, (size, size, 3))
            save_png(noise.astype(np.uint8), folder / f"train{kind}" / f"{n}.png")


def session(
    arguments: argparse.Namespace, size: int, folder: str, kind: str, epochs: int = 100
) -> Session:
    options = CycleGANOptions(
        data=Path(folder), load_size=size * 286 // 256, crop_size=size, batch=arguments.batch,
        width=arguments.width, d_width=arguments.width, device=arguments.device, sheet_every=0,
        epochs=epochs, **KINDS[kind],
    )  # fmt: skip
    return CycleGAN().session(options, None, seed=0)


def bare(own: Session, pair: list[torch.Tensor]) -> Steps:
    """Steps on one pair, read as the loop reads them."""

    def steps(count: int) -> None:
        for n in range(count):
            own.take([dict(zip("ab", pair, strict=True))])
            if n % (own.behind + 1) == own.behind:
                list(own.read())
        list(own.read())

    return steps


def seconds(what: Callable[[], object], device: str) -> float:
    settle(device)
    begun = time.perf_counter()
    what()
    settle(device)
    return time.perf_counter() - begun


def settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def profiled(steps: Steps, device: str) -> tuple[float, float, float]:
    """Kernels, waits and seconds of the GPU's work, a step; after some for warming up."""
    steps(3 if device != "cpu" else 1)
    settle(device)
    what = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with profile(activities=what) as seen:
        steps(PROFILED)
    events = seen.events()
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = [event for event in on_gpu if not event.name.startswith(("Memcpy", "Memset"))]
    awaited = (ASKS,) if device == "cpu" else WAITS
    waits = [event for event in events if event.name in awaited]
    busy = sum(event.time_range.elapsed_us() for event in on_gpu) / 1e6
    return len(kernels) / PROFILED, len(waits) / PROFILED, busy / PROFILED


def looped(own: Session, arguments: argparse.Namespace) -> float:
    """Seconds of a step in the second epoch of a whole training."""
    ends: list[float] = []

    def after_epoch(_: int) -> None:
        settle(arguments.device)
        ends.append(time.perf_counter())

    own.run(lambda *_: None, lambda _: None, after_epoch)
    return (ends[1] - ends[0]) / own.steps_per_epoch


def losses_agree(original: Original, own: Session, pair: list[torch.Tensor]) -> bool:
    """From the same weights: to what other orders of sums and another algorithm leave."""
    own.begin()
    for name, network in own.networks.items():
        network.load_state_dict(getattr(original, name).state_dict())
    made, plain = own.step(*pair), original.step(*pair)
    wanted = {"judge_a": plain.pop("D_A"), "judge_b": plain.pop("D_B")}
    wanted["generator"] = torch.stack(list(plain.values())).sum()
    return all(abs(made[n] - loss.item()) < 1e-2 * abs(made[n]) for n, loss in wanted.items())


def goes_on(
    arguments: argparse.Namespace, size: int, folder: str, pair: list[torch.Tensor]
) -> bool:
    """Four steps, and two steps from the state after two of them."""
    whole, later = (session(arguments, size, folder, "float32") for _ in range(2))
    bare(whole, pair)(2)
    later.load_state_dict(whole.state_dict())
    for own in (whole, later):
        bare(own, pair)(2)
    first, second = (
        [t for network in own.networks.values() for t in network.state_dict().values()]
        for own in (whole, later)
    )
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def breaks(own: Session, pair: list[torch.Tensor]) -> bool:
    """The third of three steps on images of which one holds NaN."""
    made = own.steps
    try:
        for n in range(3):
            own.take([{"a": pair[0] * (float("nan") if n == 2 else 1), "b": pair[1]}])
        list(own.read())
    except DivergedError:
        every = [t for network in own.networks.values() for t in network.state_dict().values()]
        return own.steps == made + 2 and all(bool(t.isfinite().all()) for t in every)
    return False


if __name__ == "__main__":
    main()
