# ruff: noqa: E402
"""INT8 on this CPU beside torch and OpenVINO in float32: time, size, memory, likeness, in one run.

    python benchmarks/openvino.py --data examples/emoji

A ResNet generator of the paper's size (9 blocks, 64 channels) is first trained on the pictures of
--data, whose two domains have the same file names: supervised on these pairs (L1, Adam 2e-4), which
in minutes gives pictures that CycleGAN needs hours for. Then `openvino-qat` quantises it, trains
with CycleGAN's losses, keeps the best, exports. PSNR is that of INT8's outputs to the float
network's, both by OpenVINO, on test images at --side. All rows of the first table take turns on one
image of --size; ratios are those of medians. `plain INT8` is NNCF's preset `mixed` as OpenVINO
converts it. Everything is written into a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# This file must not be what `import openvino` finds.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent]
# NNCF's extension would be compiled into a cache outside the benchmark's own folder.
os.environ.setdefault("CXX", "/bin/false")

import torch
from modelsoup_i2i.images import list_images, read_image, to_tensor
from modelsoup_i2i.networks import GeneratorShape, ResnetGenerator
from modelsoup_openvino import export, measure
from modelsoup_openvino.quantise import Quantisation, load_quantised, quantised
from modelsoup_openvino.trainer import OpenVinoQat, quantise_to
from modelsoup_openvino.versions import installed
from torch import nn

import modelsoup
from modelsoup.torch_bridge import save_from

TORCH_TARGET, FLOAT_TARGET, SIZE_TARGET, PSNR_TARGET = 4.5, 3.2, 0.26, 45.0
TORCH, FLOAT, PLAIN, INT8 = "torch eager, float32", "OpenVINO, float32", "plain INT8", "INT8"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("examples/emoji"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=4, help="of supervised training")
    parser.add_argument("--epochs", type=int, default=2, help="with CycleGAN's losses, after PTQ")
    parser.add_argument("--pairs", type=int, default=40, help="training images of those epochs")
    parser.add_argument("--side", type=int, default=64, help="of images in training and for PSNR")
    parser.add_argument("--size", type=int, default=256, help="of the image that is timed")
    parser.add_argument("--rounds", type=int, default=20, help="the median of N")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small and untrained: does it run?")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes, arguments.epochs, arguments.pairs = 0.1, 1, 2
        arguments.width, arguments.blocks, arguments.size, arguments.rounds = 8, 2, 64, 5
    versions = ", ".join(f"{name} {version}" for name, version in installed().items())
    told = measure.machine()
    print(f"{told['processor']}, {told['cores']} cores, load before {told['load']}; {versions}\n")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        sys.exit(compare(arguments, Path(folder)))


def compare(arguments: argparse.Namespace, folder: Path) -> bool:
    """Print the tables; whether a target is missed."""
    shape = GeneratorShape(arguments.width, arguments.blocks)
    network = supervised(shape, arguments)
    start, out = folder / "start.safetensors", folder / "out"
    save_from(nn.ModuleDict({"G_A": network}), start)
    data = chosen(arguments.data, arguments.pairs, folder / "data")
    begun = time.monotonic()
    quality = quantise(arguments, start, data, out)
    print(f"\nquantised, trained and exported in {time.monotonic() - begun:.0f} s\n")
    missed = likeness(quality)
    return speed(arguments, network, out) or missed


def supervised(shape: GeneratorShape, arguments: argparse.Namespace) -> ResnetGenerator:
    """A generator that was trained for some minutes, and how good its pictures are."""
    torch.manual_seed(0)
    network = ResnetGenerator(shape)
    train, test = (pairs(arguments.data, part, arguments.side) for part in ("train", "test"))
    adam = torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999))
    deadline, steps = time.monotonic() + 60 * arguments.minutes, 0
    while time.monotonic() < deadline:
        chosen_now = torch.randint(len(train[0]), (4,))
        loss = (network(train[0][chosen_now]) - train[1][chosen_now]).abs().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        steps += 1
    network.eval()
    with torch.inference_mode():
        made = torch.cat([network(image[None]) for image in test[0]])
    to_truth, unchanged = (
        measure.mean_psnr(images.numpy()[:, None], test[1].numpy()[:, None])
        for images in (made, test[0])
    )
    print(
        f"trained for {steps} steps of 4 pairs of {arguments.side}²: PSNR to the true picture "
        f"{to_truth:.2f} dB on {len(test[0])} test images ({unchanged:.2f} dB untranslated)"
    )
    return network


def pairs(data: Path, part: str, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both domains of a part, N × 3 × side × side each, in the order of their names."""
    from modelsoup_i2i.data import resized

    names = [path.name for path in list_images(data / f"{part}A")]
    if names != [path.name for path in list_images(data / f"{part}B")]:
        raise SystemExit(f"{data} has not the same file names in {part}A and {part}B")
    first, second = (
        torch.stack(
            [
                to_tensor(resized(read_image(data / f"{part}{domain}" / name), (side, side)))
                for name in names
            ]
        )
        for domain in "AB"
    )
    return first, second


def chosen(data: Path, count: int, folder: Path) -> Path:
    """The same data with fewer training images: links to them."""
    for part in ("trainA", "trainB", "testA", "testB"):
        (folder / part).mkdir(parents=True)
        files = list_images(data / part)
        for path in files[:count] if part.startswith("train") else files:
            (folder / part / path.name).symlink_to(path.absolute())
    return folder


def quantise(arguments: argparse.Namespace, start: Path, data: Path, out: Path) -> dict[str, Any]:
    """The report of `openvino-qat`, made with its own trainer and losses."""
    training = {
        "data": str(data), "load_size": arguments.side * 9 // 8, "crop_size": arguments.side,
        "device": "cpu", "sheet_every": 0,
    }  # fmt: skip
    given = {
        "of": "cyclegan", "out": str(out), "epochs": arguments.epochs, "rounds": 0,
        "training": training,
    }  # fmt: skip
    work = out.with_name("work")
    work.mkdir()
    return quantise_to(
        modelsoup.build_options(OpenVinoQat(), given), start, out, seed=0, frozen=(), work=work,
        report=lambda done, figures: None, log=lambda line: None,
    )  # fmt: skip


def likeness(told: dict[str, Any]) -> bool:
    """The table of candidates; whether the target is missed."""
    print("| epochs with CycleGAN's losses | PSNR, dB | SSIM | |\n|--:|--:|--:|---|")
    for one in told["candidates"]:
        mark = "kept" if one["epoch"] == told["kept"] else ""
        print(f"| {one['epoch']} | {one['psnr']:.2f} | {one['ssim']:.4f} | {mark} |")
    found, whole = told["likeness"]["psnr"], told["bytes"]["fp32.xml"]
    share = told["bytes"]["int8.xml"] / whole
    print(
        f"\nexported: PSNR {found:.2f} dB (worst of {told['likeness']['images']:.0f}: "
        f"{told['likeness']['psnr_worst']:.2f}), target ≥ {PSNR_TARGET:g}; "
        f"{told['bytes']['int8.xml'] / 1e6:.2f} MB, {share:.3f} of float32's {whole / 1e6:.2f} MB, "
        f"target ≤ {SIZE_TARGET}; to NNCF's own outputs {told['likeness']['agreement']['int8']:.1f}"
        f" dB\n"
    )
    return bool(found < PSNR_TARGET or share > SIZE_TARGET)


def speed(arguments: argparse.Namespace, network: ResnetGenerator, out: Path) -> bool:
    """The table of times and memory; whether a target is missed."""
    size = arguments.size
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    own = load_quantised(network, out / "quantised.safetensors", say=lambda _: None).eval()
    mixed = quantised(network, [example], Quantisation(preset="mixed"), say=lambda _: None).eval()
    models = {FLOAT: export.converted(network, example)}
    models[PLAIN] = export.converted(mixed, example, fold=False)
    models[INT8] = export.converted(own, example)

    def eager() -> object:
        with torch.inference_mode():
            return network(example)

    found = measure.speeds(models, example.numpy(), rounds=arguments.rounds, others={TORCH: eager})
    fast = found[INT8].latency
    print(f"one image of {size}², medians of {arguments.rounds} rounds, load {load()}\n")
    print("| | ms | least | INT8 is faster by | target | one thread, ms | images/s | peak MiB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    targets = {TORCH: TORCH_TARGET, FLOAT: FLOAT_TARGET}
    missed = False
    for name, one in found.items():
        ratio, target = one.latency / fast, targets.get(name)
        missed |= target is not None and ratio < target
        memory = "–"
        if name in models:
            path = out.with_name("timed.xml")
            export.write(models[name], path, {})
            memory = str(measure.peak_memory(path)["peak"])
        cells = [
            f"{one.latency:.1f}", f"{one.fastest:.1f}", f"{ratio:.2f}",
            "–" if target is None else f"≥ {target}",
            "–" if one.one_thread is None else f"{one.one_thread:.1f}",
            "–" if one.throughput is None else f"{one.throughput:.2f}", memory,
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")
    counts = export.integer_operations(models[INT8])
    said = ", ".join(f"{own} of {whole} {kind}" for kind, (own, whole) in counts.items())
    print(f"\nin INT8: {said}")
    print("a target is missed" if missed else "all targets of this table are met")
    return missed


def load() -> str:
    return f"{os.getloadavg()[0]:.2f}"


if __name__ == "__main__":
    main()
