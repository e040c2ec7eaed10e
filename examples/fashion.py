"""What the rows of examples on Fashion-MNIST share: classifiers that measure, commands, spreads."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXTRACTOR, JUDGE = "fmnist-cnn64", "judge"  # classifiers: of features, and of RC


def arguments(text: str | None, rows: Iterable[str], results: str) -> argparse.ArgumentParser:
    """What the command line of such rows has."""
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)}")
    parser.add_argument("--data", type=Path, required=True, help="the folder of `soup i2i data`")
    parser.add_argument("--results", type=Path, default=Path(results))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[None], metavar="N",
        help="of the trainings  [default: the one that soup train takes]",
    )  # fmt: skip
    parser.add_argument("--print", action="store_true", help="the commands, carried out by nobody")
    parser.add_argument("--table", action="store_true", help="what was measured so far")
    return parser


def classifier(name: str, data: Path) -> list[str]:
    """The command of a classifier of all training pictures, of a seed of its own."""
    seed = (EXTRACTOR, JUDGE).index(name)
    words = ["soup", "train", "classifier", "-o", f"{name}.safetensors", "--seed", str(seed)]
    options = {
        "data": (data / "train.h5").resolve(), "test": (data / "test.h5").resolve(),
        "load_size": 32, "crop_size": 32, "epochs": 5, "init": seed, "threads": 0, "sheet_every": 0,
    }  # fmt: skip
    return words + [
        word for name, value in options.items() for word in ("--set", f"{name}={value}")
    ]


def file_of(name: str, seed: int | None, suffix: str = ".safetensors") -> str:
    """A row's checkpoint, or what was measured of it."""
    return f"{name}{'' if seed is None else f'-seed-{seed}'}{suffix}"


def carry_out(words: list[str], folder: Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """A command in the folder of results, with one thread: two rows fit side by side."""
    print("+", shlex.join(words), flush=True)
    program = [sys.executable, "-m", "modelsoup", *words[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, cwd=folder, check=True, text=True, env=environment, **how)


def make(trainings: Iterable[list[str]], folder: Path, *, printed: bool) -> None:
    """Print commands, or carry out those whose result is not there."""
    for words in trainings:
        if printed:
            print(shlex.join(words))
        elif not (folder / words[words.index("-o") + 1]).exists():
            carry_out(words, folder)


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation of several; nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"
