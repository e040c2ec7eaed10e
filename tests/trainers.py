"""Trainers for the tests: each does one thing right, or one thing wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from modelsoup import CheckpointError, Job, open_checkpoint

SHAPES = {"D.low.w": (4, 3), "D.high.w": (3,), "G.low.w": (5,), "G.high.w": (2, 2)}


def network(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@dataclass(frozen=True)
class Options:
    add: float = 1.0
    steps: int = 1
    pause: float = 0.0
    note: str = ""


class Add:
    """Adds a number in steps, keeps its state after each, and initialises what is missing."""

    name = "add"
    options = Options

    def groups(self, options: Options) -> dict[str, list[str]]:
        return {"low-level": ["*.low.*"]}

    def tensors(self, options: Options) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: ("F32", shape) for name, shape in SHAPES.items()}

    def train(self, job: Job) -> None:
        options = job.options
        weights = network(job.seed % 1000) | (dict(open_checkpoint(job.start)) if job.start else {})
        state, first = job.work / "state.safetensors", 0
        if state.exists():
            weights = load_file(state)
            first = int(weights.pop("step")[0])
            job.log(f"resumed at {first}")
        for step in range(first, options.steps):
            time.sleep(options.pause)
            for name in weights:
                if name not in job.frozen:
                    weights[name] = weights[name] + np.float32(options.add / options.steps)
            save_file(weights | {"step": np.array([step + 1])}, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            job.report((step + 1) / options.steps, {"step": step + 1.0})
        save_file(weights, job.output)


class Plain(Add):
    """Cannot tell its tensors."""

    name = "plain"
    tensors = None  # type: ignore[assignment]
    groups = None  # type: ignore[assignment]


class Estimating(Add):
    """Finds tensors anew where a start lacks them: `high.w` is four times its seed's."""

    name = "estimating"

    def estimates(self, options: Options) -> list[str]:
        return ["*.high.w", "*.nowhere"]


class Writes:
    """Writes whatever a subclass says."""

    name = "writes"
    options = Options

    def train(self, job: Job) -> None:
        made = self.made(dict(open_checkpoint(job.start)) if job.start else network(0), job)
        if made is not None:
            save_file(made, job.output)

    def made(self, weights: dict[str, np.ndarray], job: Job) -> dict[str, np.ndarray] | None:
        return weights


class Nothing(Writes):
    def made(self, weights, job):
        return None


class Garbage(Writes):
    def made(self, weights, job):
        job.output.write_bytes(b"not a checkpoint at all")


class Forgets(Writes):
    def made(self, weights, job):
        return {"D.low.w": weights["D.low.w"]}


class Thaws(Writes):
    def made(self, weights, job):
        return {name: values + 1 for name, values in weights.items()}


class Infinite(Writes):
    def made(self, weights, job):
        return {name: values * np.float32(np.inf) for name, values in weights.items()}


class Fails(Writes):
    def made(self, weights, job):
        raise RuntimeError("the learning rate is a poem")


class FailsAtLength(Writes):
    """Fails with a message of several lines, from deep within."""

    def made(self, weights, job):
        job.log("so far, so good")
        return self.deeper(job)

    def deeper(self, job):
        raise ValueError(f"no such layer\n  {job.options.note}\nlook at its name")


class Raises(Writes):
    """Fails with an error of the kind that its note names."""

    def made(self, weights, job):
        kinds = {
            "FileNotFoundError": FileNotFoundError, "CheckpointError": CheckpointError,
            "CancelledError": asyncio.CancelledError,
        }  # fmt: skip
        self.raised_deep_down(kinds[job.options.note])

    def raised_deep_down(self, kind):
        raise kind("nothing of the kind")


class WontTravel(Writes):
    """Fails with an exception that no process can send to another."""

    def made(self, weights, job):
        class Stuck(RuntimeError):
            def __init__(self, one, two):
                super().__init__(one)
                self.lock = threading.Lock()

        raise Stuck("stuck", 2)


class Sees(Writes):
    """Waits for a file, and says nothing meanwhile."""

    def made(self, weights, job):
        while not Path(job.options.note).exists():
            time.sleep(0.05)
        return weights


class Talks(Writes):
    """Reports many losses, and the time left behind them."""

    def made(self, weights, job):
        losses = {f"cycle_consistency_loss_{number}": number / 7 for number in range(12)}
        for step in range(int(job.options.add)):
            job.report(step / 10, {**losses, "seconds_left": 200.0 - step})
            time.sleep(0.3)
        job.report(1.0, {**losses, "seconds_left": 0.0})
        return weights


class Prints(Writes):
    """Prints, in every way, and reports what is no figure."""

    def made(self, weights, job):
        print("from Python")
        print("to stderr", file=sys.stderr)
        subprocess.run(["echo", "from a program"], check=True)
        job.log("in the log")
        for done, loss in ((-1.0, 1.0), (7.0, float("nan")), (None, float("inf"))):
            job.report(done, {"loss": loss, "steps": 3})
        return weights


class Looks(Writes):
    """Has an option that is no part of its result."""

    def identity(self, options):
        return {"add": options.add}


class FailsOnce(Writes):
    """Fails until a file exists beside the store."""

    def made(self, weights, job):
        if not Path(job.options.note).exists():
            raise RuntimeError("not yet")
        return weights


class Beside(Writes):
    """Tells that it writes something beside its result."""

    def outputs(self, options):
        return [Path(options.note)]


class Shows(Writes):
    """Leaves something to be looked at, and notes where."""

    def made(self, weights, job):
        job.note({"shown": None if job.shown is None else str(job.shown)})
        if job.shown is not None:
            job.shown.mkdir(parents=True, exist_ok=True)
            (job.shown / "picture.txt").write_text(f"seed {job.seed}")
        return weights


class Dies(Writes):
    """Its process is killed, the first times."""

    def made(self, weights, job):
        count = job.work / "deaths"
        deaths = len(count.read_bytes()) if count.exists() else 0
        if deaths < int(job.options.add):
            with count.open("ab") as file:
                file.write(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        return weights


class Exits(Writes):
    def made(self, weights, job):
        raise SystemExit(2)


class Needy(Writes):
    def __init__(self, something):
        self.something = something


class BadTensors(Writes):
    def tensors(self, options):
        return {"w": ("float32", (2,))}


class BadGroups(Writes):
    def groups(self, options):
        raise RuntimeError("no groups today")


class NoTrainer:
    name = "none"
