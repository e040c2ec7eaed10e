"""Trainings on a GPU beside the published steps: images a second, kernels, waits; are they right?

    python benchmarks/gpu/training.py
    python benchmarks/gpu/training.py --only cyclegan-256 cut-256

One run, within --limit seconds (five minutes), on one card, at the papers' sizes: CycleGAN, with an
image of X and one of Y in a step, and the steps of `benchmarks/i2i.py`. The published steps are in
float32. Ours are in float32; in float32 kernel by kernel, without graphs; and with bf16 autocast,
of which the faster memory layout is to reach the target. For each:

- speed: steps on what is on the card, between two synchronisations, rounds of all rows in turn, the
  median;
- of a step, by torch.profiler: kernels, the time that the GPU works, and how often the host waits
  for it (synchronisations; on a CPU, values that are asked for, by an optimiser's count too);
- the whole training, images from a disk and losses told, beside the bare step;
- checks: CycleGAN's losses are the original's; steps that are replayed tell what they tell kernel
  by kernel; both make the same bits, from a state too, as a training that goes on needs it; a step
  that is not finite is told with its number and leaves finite weights.

`--compile SECONDS` has rows with `torch.compile` too, each of which waits for it at most so long,
and says how long it was, and again from the cache: `--only cyclegan-256 --compile 60`.

`--device cpu --only cyclegan-64 cut-128 --size 32 --width 4 --steps 2` runs it without a GPU. The
exit code says whether a check failed or, on a GPU, a target was missed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

import i2i
from cyclegan_reference import Original
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.step import DivergedError

ORIGINAL, PLAIN, SINGLE = "published", "float32", "kernel by kernel"
FAST, LAST = "bf16", "bf16, channels-last"
KINDS: dict[str, dict[str, Any]] = {
    PLAIN: {}, SINGLE: {"graphs": False}, FAST: {"precision": "bf16"},
    LAST: {"precision": "bf16", "channels_last": True},
}  # fmt: skip
COMPILED: dict[str, dict[str, Any]] = {
    "float32, compiled": {"compile": True}, "bf16, compiled": {"compile": True, "precision": "bf16"}
}  # fmt: skip
BUSY_TARGET, LOOP_TARGET = 1.15, 1.05  # wall beside the GPU's own time, the loop beside the step
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cudaGraphLaunch", "cuLaunchKernel")
ASKS = "aten::_local_scalar_dense"  # a value of a tensor
PROFILED = 2  # steps, of which nothing is read in between
BEFORE, AFTER = 6, 3  # steps before a state is kept, and from it: each is replayed by then
ROUNDED = 0.02  # by which losses may differ after some steps in another order of sums

Steps = Callable[[int], object]  # so many of them


@dataclass(frozen=True)
class Case:
    """A step, and how many times the published one's images a second it is to make."""

    trainer: str
    size: int
    targets: Mapping[str, float]

    @property
    def name(self) -> str:
        return f"{self.trainer}-{self.size}"


OF_I2I = {PLAIN: 1.5, FAST: 3.0}
CASES = (
    Case("cyclegan", 64, {PLAIN: 4.0, FAST: 4.0}), Case("cyclegan", 256, {PLAIN: 2.2, FAST: 4.0}),
    Case("cut", 128, OF_I2I), Case("cut", 256, OF_I2I), Case("balagan", 128, OF_I2I),
    Case("deepi2i", 128, OF_I2I),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--device", default="cuda", metavar="cuda|cpu")
    parser.add_argument("--size", type=int, metavar="SIDE", help="of all, as the next two")
    parser.add_argument("--batch", type=int, metavar="N")
    parser.add_argument("--width", type=int, metavar="N")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="in a round")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="told: the slowest N")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--compile", type=int, default=0, metavar="SECONDS", help="0: not")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA GPU (CUDA), and torch finds none (--device cpu)")
    where = "the CPU" if arguments.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}\n", flush=True)
    cases = [case for case in CASES if case.name in arguments.only]
    end, wrong = time.monotonic() + arguments.limit, []
    for n, case in enumerate(cases):
        left = (end - time.monotonic()) / (len(cases) - n)
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                wrong += measured(arguments, case, Path(folder), begun + left)
            except Exception:  # noqa: BLE001  # the others are measured all the same
                traceback.print_exc()
                wrong.append(f"{case.name}: it failed")
        print(f"{time.monotonic() - begun:.0f} s\n", flush=True)
    for said in wrong:
        print(f"missed: {said}")
    sys.exit(bool(wrong))


def measured(arguments: argparse.Namespace, case: Case, folder: Path, end: float) -> list[str]:
    """A table and checks for a case; what was missed."""
    made = Maker(arguments, case, folder)
    ours = {kind: made.session(KINDS[kind]) for kind in KINDS}
    batch = [{name: values.to(arguments.device) for name, values in own.items()}
             for own in next(ours[PLAIN].batches())]  # fmt: skip
    checks = {}
    if case.trainer == "cyclegan":
        checks["losses of the original"] = losses_agree(made.original(), ours[PLAIN], batch)
    checks |= replays_agree(ours[PLAIN], ours[SINGLE], batch)
    for kind, more in COMPILED.items() if arguments.compile else ():
        for _ in range(2):  # the second one finds what the first one left
            ours[kind] = made.session({**more, "compile_seconds": arguments.compile})
            took = seconds(partial(ours[kind].compile, batch), arguments.device)
            print(f"{kind}, after {took:.1f} s: {'; '.join(ours[kind].news())}", flush=True)
        like = ours[PLAIN if "precision" not in more else FAST]
        checks[f"losses of {kind}"] = losses_are(ours[kind], like, batch)
    rows: dict[str, Steps] = {ORIGINAL: made.published()}
    rows |= {kind: bare(own, batch) for kind, own in ours.items()}
    of_step = {name: profiled(name, steps, arguments) for name, steps in rows.items()}
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    count = len(next(iter(batch[0].values())))
    for _ in range(arguments.repeat):
        for name, steps in rows.items():
            took = seconds(lambda steps=steps: steps(arguments.steps), arguments.device)
            speeds[name].append(arguments.steps * count / took)
        if time.monotonic() > end:
            break
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"| {case.name}, batch {count} | images a second | ratio | kernels | waits "
          f"| wall / GPU | loop / step |")  # fmt: skip
    print("|---|--:|--:|--:|--:|--:|--:|")
    missed = []
    best = {PLAIN: PLAIN, max(FAST, LAST, key=speed.__getitem__): FAST}
    for name, value in speed.items():
        kernels, waits, busy = of_step[name]
        wall = count / value
        ratio, of_gpu = value / speed[ORIGINAL], wall / busy if busy else float("nan")
        loop = float("nan")
        if name in best:
            if case.trainer == "cyclegan":
                loop = looped(made.session({**KINDS[name], "epochs": 2}), arguments) / wall
            figures = {
                f"{ratio:.2f} × the published": ratio >= case.targets[best[name]],
                f"{of_gpu:.2f} × the GPU's time": not of_gpu > BUSY_TARGET,
                f"{loop:.2f} × the bare step": not loop > LOOP_TARGET,
            }
            missed += [f"{case.name} {name}: {said}" for said, good in figures.items() if not good]
        print(
            f"| {name} | {value:.2f} | {ratio:.2f} | {kernels:.0f} | {waits:.1f} | {of_gpu:.2f} "
            f"| {loop:.2f} |", flush=True,
        )  # fmt: skip
    checks["a step that is not finite is told"] = breaks(ours[PLAIN], batch)
    print("\n" + "\n".join(f"{'ok' if good else 'WRONG'}: {what}" for what, good in checks.items()))
    wrong = [f"{case.name}: {what}" for what, good in checks.items() if not good]
    return wrong if arguments.device == "cpu" else wrong + missed


class Maker:
    """Makes the two steps of a case."""

    def __init__(self, arguments: argparse.Namespace, case: Case, folder: Path) -> None:
        self.folder = folder
        self.size, self.batch = arguments.size or case.size, arguments.batch
        self.width, self.device = arguments.width or 64, arguments.device
        self.cyclegan = case.trainer == "cyclegan"
        if self.cyclegan:
            epoch = 2 * arguments.steps if self.device == "cpu" else max(40, 8000 // self.size)
            images(folder, self.size, (self.batch or 1) * epoch)
            return
        told = {"size": self.size, "width": arguments.width, "batch": self.batch}
        words = [f"--{n}={value}" for n, value in told.items() if value is not None]
        self.words = i2i.parser().parse_args(
            [f"--trainer={case.trainer}", f"--device={self.device}", *words]
        )
        # An orthogonal matrix of 14,000 columns takes a second, and nothing here depends on it.
        torch.nn.init.orthogonal_ = partial(torch.nn.init.normal_, std=0.02)
        i2i.prepare(self.words, folder)

    def published(self) -> Steps:
        if not self.cyclegan:
            step = i2i.published(self.words)
            return lambda n: [step() for _ in range(n)]
        shape, first = (self.batch or 1, 3, self.size, self.size), self.original()
        pair = [torch.rand(shape, device=self.device) * 2 - 1 for _ in range(2)]
        return lambda n: [first.step(*pair) for _ in range(n)]

    def original(self) -> Original:
        return Original(self.width, d_width=self.width, device=self.device)

    def session(self, more: Mapping[str, Any]) -> Session:
        if not self.cyclegan:
            return i2i.session(self.words, self.folder, **more)
        given = {"epochs": 100, "batch": self.batch or 1} | {**more}
        options = CycleGANOptions(
            data=self.folder, load_size=self.size * 286 // 256, crop_size=self.size,
            width=self.width, d_width=self.width, device=self.device, sheet_every=0, **given,
        )  # fmt: skip
        return CycleGAN().session(options, None, seed=0)


def images(folder: Path, size: int, count: int) -> None:
    """Noise: what is in them does not matter to time."""
    for kind in "AB":
        (folder / f"train{kind}").mkdir()
        for n in range(count):
            noise = np.random.default_rng((ord(kind), n)).integers(0, 256, (size, size, 3))
            save_png(noise.astype(np.uint8), folder / f"train{kind}" / f"{n}.png")


Batches = list[dict[str, torch.Tensor]]


def bare(own: Session, batch: Batches) -> Callable[[int], list[dict[str, float]]]:
    """Steps on one batch, read as the loop reads them."""

    def steps(count: int) -> list[dict[str, float]]:
        told = []
        for n in range(count):
            own.take(batch)
            if n % (own.behind + 1) == own.behind:
                told += [losses for _, losses in own.read()]
        return told + [losses for _, losses in own.read()]

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


def profiled(name: str, steps: Steps, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Kernels, waits and seconds of the GPU's work, a step; after some for warming up."""
    device = arguments.device
    count = PROFILED if device != "cpu" else 1  # there an event costs more than what it tells of
    steps(4 if device != "cpu" else 1)
    settle(device)
    what = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with profile(activities=what) as seen:
        steps(count)
        settle(device)
    events = seen.events()
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA
              and not event.name.startswith("Optimizer.step")]  # fmt: skip
    kernels = [event for event in on_gpu if not event.name.startswith(("Memcpy", "Memset"))]
    launched = [event.time_range.start for event in events if event.name.startswith(LAUNCHES)]
    awaited = (ASKS,) if device == "cpu" else WAITS
    # What comes after the last launch waits for what all steps told, or to measure.
    waits = [event for event in events if event.name in awaited
             and (not launched or event.time_range.start < max(launched))]  # fmt: skip
    took: Counter[str] = Counter()
    for event in on_gpu:
        took[event.name] += event.time_range.elapsed_us()
    for kernel, spent in took.most_common(arguments.kernels):
        print(f"{name}: {spent / count / 1e3:8.3f} ms {kernel[:110]}")
    busy = sum(took.values()) / 1e6
    return len(kernels) / count, len(waits) / count, busy / count


def looped(own: Session, arguments: argparse.Namespace) -> float:
    """Seconds of a step in the second epoch of a whole training."""
    ends: list[float] = []

    def after_epoch(_: int) -> None:
        settle(arguments.device)
        ends.append(time.perf_counter())

    own.run(lambda *_: None, lambda _: None, after_epoch)
    return (ends[1] - ends[0]) / own.steps_per_epoch


def losses_agree(original: Original, own: Session, batch: Batches) -> bool:
    """From the same weights: to what other orders of sums and another algorithm leave."""
    own.begin()
    for name, network in own.networks.items():
        network.load_state_dict(getattr(original, name).state_dict())
    (made,), plain = bare(own, batch)(1), original.step(batch[0]["a"], batch[0]["b"])
    wanted = {"judge_a": plain.pop("D_A"), "judge_b": plain.pop("D_B")}
    wanted["generator"] = torch.stack(list(plain.values())).sum()
    return all(abs(made[n] - loss.item()) < 1e-2 * abs(made[n]) for n, loss in wanted.items())


def losses_are(own: Session, other: Session, batch: Batches) -> bool:
    """From one state, to rounding."""
    own.load_state_dict(copy.deepcopy(other.state_dict()))
    apart = furthest(*(bare(each, batch)(BEFORE) for each in (own, other)))
    print(f"losses of {BEFORE} steps that are compiled and are not differ by {apart:.1e}")
    return apart < ROUNDED


def furthest(told: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """How far losses are from others, as a share of these."""
    return max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-3)
               for a, b in zip(told, other, strict=True) for name in b)  # fmt: skip


def replays_agree(own: Session, single: Session, batch: Batches) -> dict[str, bool]:
    """From one state, a session that replays its steps, and one that makes them as ever.

    The latter is also what one that begins does: it makes steps some times before it replays them.
    """
    single.load_state_dict(copy.deepcopy(own.state_dict()))
    apart = furthest(*(bare(each, batch)(BEFORE) for each in (own, single)))
    for said in own.news():
        print(said)
    print(f"losses of {BEFORE} steps that are replayed and are not differ by {apart:.1e}")
    state = copy.deepcopy(own.state_dict())
    after = []
    for each in (own, own, single):
        each.load_state_dict(copy.deepcopy(state))
        bare(each, batch)(AFTER)
        after.append([
            tensor.clone() for network in each.networks.values()
            for tensor in network.state_dict().values()
        ])  # fmt: skip
    first, again, gone_on = after
    return {
        "losses kernel by kernel": apart < ROUNDED,
        "the same bits again": all(map(torch.equal, first, again)),
        "the same bits when gone on with": all(map(torch.equal, first, gone_on)),
    }


def breaks(own: Session, batch: Batches) -> bool:
    """The third of three steps on images of which all are NaN."""
    made = own.steps
    name = next(n for n, values in batch[0].items() if values.ndim == 4)
    bad = [{**each, name: each[name] * float("nan")} for each in batch]
    try:
        for n in range(3):
            own.take(bad if n == 2 else batch)
        list(own.read())
    except DivergedError:
        every = [t for network in own.networks.values() for t in network.state_dict().values()]
        return own.steps == made + 2 and all(bool(t.isfinite().all()) for t in every)
    return False


if __name__ == "__main__":
    main()
