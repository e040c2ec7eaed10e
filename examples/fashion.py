"""What the rows of examples on Fashion-MNIST share: classifiers that measure, commands, spreads."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
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


def save_pictures(stored: Path, kinds: Sequence[str], count: int, place: Path) -> None:
    """The first pictures of some kinds as files, of several kinds each in a folder; once."""
    from modelsoup_i2i.pictures.folders import find_classes
    from modelsoup_i2i.pictures.images import save_png
    from modelsoup_i2i.pictures.picture import read_picture

    if place.exists():
        return
    partial = place.with_name(f".{place.name}.partial")
    found = find_classes(stored, only=kinds).of_each()
    for name in kinds:
        own = partial / name if len(kinds) > 1 else partial
        own.mkdir(parents=True, exist_ok=True)
        for n, picture in enumerate(found[name][:count]):
            save_png(read_picture(picture, 3), own / f"{n}.png")
    partial.rename(place)


def figures(
    made: Path, real: Path, seen: Path, kinds: Sequence[str], folder: Path
) -> dict[str, float]:
    """What translations in a folder are worth: distances, share seen as real, collapse, rank.

    Args:
        made: the translations.
        real: pictures that they should look like.
        seen: what they are made of; where there are several of each, of all, set after set.
        kinds: of the real pictures.
        folder: with the classifiers.
    """
    from modelsoup_i2i.measuring import extractors
    from modelsoup_i2i.measuring.by_class import accuracy, indices_in
    from modelsoup_i2i.measuring.collapse import collapse, source_rank
    from modelsoup_i2i.measuring.metrics import evaluate, features
    from modelsoup_i2i.pictures.images import list_images, read_image, resized

    fake, there, sources = (
        [read_image(file) for file in list_images(place)] for place in (made, real, seen)
    )
    fake = [resized(one, there[0].shape[:2]) for one in fake]
    own = folder / f"{EXTRACTOR}.safetensors"
    names = [f"fd-{EXTRACTOR}", f"kd-{EXTRACTOR}"]
    found = evaluate(fake, there, metrics=names, extractor=own)
    told = dict(zip(("fd", "kd"), (one.value for one in found), strict=True))
    judge = extractors.classifier(folder / f"{JUDGE}.safetensors")
    places = indices_in(judge, kinds)
    told["rc"] = sum(accuracy(judge, {kind: fake}, places).value for kind in kinds)
    looks = extractors.classifier(own)
    of_fake, of_real = (features(some, looks) for some in (fake, there))
    rank = source_rank(sources * (len(fake) // len(sources)), fake)
    return told | collapse({"": of_fake}, {"": of_real}, rank=rank).figures()


def spread(values: list[float], form: str = ".3f") -> str:
    """The mean, and the standard deviation of several; nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"
