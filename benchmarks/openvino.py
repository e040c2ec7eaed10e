# ruff: noqa: E402
"""INT8 on this CPU beside torch and OpenVINO in float32: time, size, memory, likeness, in one run.

    soup i2i data emoji emoji
    python benchmarks/openvino.py --data emoji --dir work

A ResNet generator of the paper's size (9 blocks, 64 channels) is first trained to draw the pictures
of --data's domain B from themselves at half of their size: pairs that fit to the pixel, so that L1
alone gives good pictures much sooner than CycleGAN does, and how good can be told in dB beside
bicubic interpolation. Then `openvino-qat` quantises it, trains with CycleGAN's losses, keeps the
best, exports. PSNR is that of INT8's outputs to the float network's, both by OpenVINO, on test
images at --side. All rows of the first table take turns on one image of --size; ratios are those of
medians. `plain INT8` is NNCF's preset `mixed` as OpenVINO converts it.

What --dir has of an earlier run (the trained network, the quantised one) is not made again, and
trainings that were killed go on, the first from its last hundred steps, the other from its last
epoch; so with --prepare, which stops before anything is timed, the rest can be run when the machine
is idle. Without --dir all goes into a temporary folder.

--choices is another table, of the same generator: what it gives and costs to leave the first or the
last convolution float, and what NNCF's other settings do. Nothing is trained for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
from modelsoup_i2i.networks.resnet import ResnetGenerator
from modelsoup_i2i.pictures.images import list_images, read_image, resized, save_png, to_tensor
from modelsoup_i2i.use.generators import load_generator
from modelsoup_openvino import export, measure
from modelsoup_openvino.quantise import Quantisation, load_quantised, quantised
from modelsoup_openvino.trainer import OpenVinoQat, quantise_to
from modelsoup_openvino.versions import installed
from torch import nn

import modelsoup
from modelsoup.running.torch_bridge import save_from

TORCH_TARGET, FLOAT_TARGET, SIZE_TARGET, PSNR_TARGET = 4.5, 3.2, 0.26, 45.0
TORCH, FLOAT, PLAIN, INT8 = "torch eager, float32", "OpenVINO, float32", "plain INT8", "INT8"
HELD_OUT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("examples/emoji"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=8000, help="of training")
    parser.add_argument("--batch", type=int, default=2, help="pictures in each of them")
    parser.add_argument("--lr", type=float, default=4e-4, help="of those, falling from the half on")
    parser.add_argument("--threads", type=int, help="of torch, but when it is timed")
    parser.add_argument("--epochs", type=int, default=2, help="with CycleGAN's losses, after PTQ")
    parser.add_argument("--pairs", type=int, default=40, help="training images of those epochs")
    parser.add_argument("--side", type=int, default=64, help="of images in training and for PSNR")
    parser.add_argument("--size", type=int, default=256, help="of the image that is timed")
    parser.add_argument("--rounds", type=int, default=20, help="the median of N")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--overflow-fix", default="first_layer_only", help="as in soup openvino")
    parser.add_argument("--prepare", action="store_true", help="stop before times are taken")
    parser.add_argument("--choices", action="store_true", help="compare settings of calibration")
    parser.add_argument("--images", type=int, default=100, help="calibration images for those")
    parser.add_argument("--quick", action="store_true", help="small and untrained: does it run?")
    parser.add_argument("--dir", type=Path, help="where to work, and what is there is used")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.epochs, arguments.pairs = 20, 1, 2
        arguments.width, arguments.blocks, arguments.size, arguments.rounds = 8, 2, 64, 5
    versions = ", ".join(f"{name} {version}" for name, version in installed().items())
    told = measure.machine()
    print(f"{told['processor']}, {told['cores']} cores, load before {told['load']}; {versions}\n")
    if arguments.dir is None:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(compare(arguments, Path(folder)))
    arguments.dir.mkdir(exist_ok=True)
    sys.exit(compare(arguments, arguments.dir))


def compare(arguments: argparse.Namespace, folder: Path) -> bool:
    """Print the tables; whether a target is missed."""
    start, out = folder / "start.safetensors", folder / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or threads)
    data = prepared(arguments.data, arguments.side, folder / "data")
    network = trained(arguments, data, start)
    if arguments.choices:
        torch.set_num_threads(threads)
        choices(arguments, data, network)
        return False
    if not (out / "report.json").exists():
        begun = time.monotonic()
        quantise(arguments, data, start, out)
        print(f"\nquantised, trained and exported in {time.monotonic() - begun:.0f} s")
    missed = likeness(json.loads((out / "report.json").read_text("utf-8")))
    paths = timed(arguments, network, folder)
    torch.set_num_threads(threads)
    if arguments.prepare:
        return missed
    return speed(arguments, network, paths) or missed


def trained(arguments: argparse.Namespace, data: Path, start: Path) -> ResnetGenerator:
    """The generator that is there, or one that is trained now; and how good its pictures are."""
    record, unfinished = (start.with_suffix(kind) for kind in (".txt", ".unfinished"))
    if not start.exists():
        network, said = supervised(arguments, data, unfinished)
        record.write_text(said, "utf-8")
        save_from(nn.ModuleDict({"G_A": network}), start)
    unfinished.unlink(missing_ok=True)
    network = load_generator(start)
    print(record.read_text("utf-8"), judged(network, data), sep="\n")
    return network


def judged(network: ResnetGenerator, data: Path) -> str:
    """How near its pictures are to the true ones, beside those that it was given."""
    inputs, truth = (images[:HELD_OUT] for images in pairs(data, "test"))
    with torch.inference_mode():
        made = torch.cat([network.eval()(image[None]) for image in inputs])
    lines = []
    for name, images in (("drawn", made), ("bicubic, which it was given", inputs)):
        one, other = images.numpy()[:, None], truth.numpy()[:, None]
        alike = measure.ssim(one, other)
        lines.append(
            f"{name}: PSNR to the true picture {measure.mean_psnr(one, other):.2f} dB"
            + ("" if alike is None else f", SSIM {alike:.3f}")
            + f", {len(truth)} test images of {truth.shape[-1]}²"
        )
    return "\n".join(lines)


def supervised(
    arguments: argparse.Namespace, data: Path, unfinished: Path
) -> tuple[ResnetGenerator, str]:
    """A generator that was trained to make the second picture of a pair out of the first.

    What `unfinished` has of an earlier run with the same arguments is gone on from.
    """
    torch.manual_seed(0)
    network = ResnetGenerator(arguments.width, arguments.blocks)
    network.winograd = True
    network.lay_out()
    inputs, truth = pairs(data, "train")
    steps, batch, begun = arguments.steps, arguments.batch, time.monotonic()
    first, spent, mean = 0, 0.0, 0.0
    adam = torch.optim.Adam(network.parameters(), arguments.lr, (0.5, 0.999), fused=True)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: min(1.0, 2 - 2 * n / steps))
    epochs = -(-steps * batch // len(inputs))
    order = torch.cat([torch.randperm(len(inputs)) for _ in range(epochs)])
    asked = [steps, batch, arguments.lr, arguments.side, arguments.width, arguments.blocks]
    if unfinished.exists():
        told = torch.load(unfinished, weights_only=True)
        if told["asked"] != asked:
            sys.exit(f"{unfinished} is of a training with other arguments; remove it to begin anew")
        first, spent, mean = told["step"], told["spent"], told["mean"]
        network.load_state_dict(told["network"])
        adam.load_state_dict(told["adam"])
        falling.load_state_dict(told["falling"])
        torch.set_rng_state(told["random"])
    for number in range(first + 1, steps + 1):
        own = order[(number - 1) * batch : number * batch]
        sides = (3,) if torch.rand(()) < 0.5 else ()  # mirrored or not
        coarse, whole = (images[own].flip(sides) for images in (inputs, truth))
        loss = (network(coarse) - whole).abs().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        falling.step()
        mean += (float(loss.detach()) - mean) * max(0.01, 1 / number)
        if number % 100 == 0 or number == steps:
            taken = time.monotonic() - begun
            print(f"step {number} of {steps}: L1 {mean:.4f}, {taken:.0f} s", file=sys.stderr)
            partial = unfinished.with_suffix(".partial")
            torch.save(
                {
                    "asked": asked, "step": number, "spent": spent + time.process_time(),
                    "mean": mean, "network": network.state_dict(), "adam": adam.state_dict(),
                    "falling": falling.state_dict(), "random": torch.get_rng_state(),
                },
                partial,
            )  # fmt: skip
            partial.replace(unfinished)
    return network, (
        f"trained for {steps} steps on {batch} of {len(inputs)} pictures each, "
        f"{(spent + time.process_time()) / 60:.0f} minutes of processor time"
    )


def prepared(data: Path, side: int, folder: Path) -> Path:
    """A set of two domains: coarse pictures, and the same as they are; made if it is not there."""
    if (folder / "testB").exists():
        return folder
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    for part in ("train", "test"):
        for domain in "AB":
            (partial / f"{part}{domain}").mkdir()
        for path in list_images(data / f"{part}B"):
            whole = resized(read_image(path), (side, side))
            coarse = resized(resized(whole, (side // 2, side // 2)), (side, side))
            save_png(coarse, partial / f"{part}A" / f"{path.stem}.png")
            save_png(whole, partial / f"{part}B" / f"{path.stem}.png")
    partial.rename(folder)
    return folder


def pairs(data: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both domains of a part, N × 3 × side × side each, in the order of their names."""
    first, second = (
        torch.stack([to_tensor(read_image(path)) for path in list_images(data / f"{part}{domain}")])
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


def quantise(arguments: argparse.Namespace, data: Path, start: Path, out: Path) -> None:
    """What `openvino-qat` delivers, made with CycleGAN's losses."""
    work = out.parent / "work"
    shutil.rmtree(work / "data", ignore_errors=True)
    few = chosen(data, arguments.pairs, work / "data")
    training = {
        "data": str(few), "load_size": arguments.side, "crop_size": arguments.side,
        "device": "cpu", "sheet_every": 0,
    }  # fmt: skip
    given = {
        "of": "cyclegan", "out": str(out), "epochs": arguments.epochs, "rounds": 0,
        "training": training, "quantisation": {"overflow_fix": arguments.overflow_fix},
    }  # fmt: skip
    quantise_to(
        modelsoup.build_options(OpenVinoQat(), given), start, out, seed=0, frozen=(), work=work,
        report=lambda done, figures: None, log=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    shutil.rmtree(work)


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


def timed(arguments: argparse.Namespace, network: ResnetGenerator, folder: Path) -> dict[str, Path]:
    """The IRs that are timed, for one image of --size: row → path."""
    paths = {FLOAT: folder / "float.xml", PLAIN: folder / "plain.xml", INT8: folder / "int8.xml"}
    if not paths[INT8].exists():
        small, example = (example_of(side) for side in (arguments.side, arguments.size))
        kept = folder / "out" / "quantised.safetensors"
        own = load_quantised(network, kept, say=lambda _: None).eval()
        mixed = quantised(network, [small], Quantisation(preset="mixed"), say=lambda _: None).eval()
        export.write(export.converted(network, example), paths[FLOAT], {})
        export.write(export.converted(mixed, example, fold=False), paths[PLAIN], {})
        export.write(export.converted(own, example), paths[INT8], {})
    return paths


def example_of(side: int) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def speed(
    arguments: argparse.Namespace, network: ResnetGenerator, paths: dict[str, Path]
) -> bool:  # fmt: skip
    """The table of times and memory; whether a target is missed."""
    size, example = arguments.size, example_of(arguments.size)
    models = {name: export.read(path) for name, path in paths.items()}

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
        memory = str(measure.peak_memory(paths[name])["peak"]) if name in paths else "–"
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


def choices(arguments: argparse.Namespace, data: Path, network: ResnetGenerator) -> None:
    """The table of calibration's settings."""
    first, last = "model.1", f"model.{len(network.model) - 2}"
    settings: dict[str, dict[str, Any]] = {
        "the defaults": {},
        "first convolution float": {"ignored_names": (first,)},
        "last convolution float": {"ignored_names": (last,)},
        "both float": {"ignored_names": (first, last)},
        "preset mixed": {"preset": "mixed"},
        "one scale for each weight": {"per_channel": False},
        "overflow fix for all weights": {"overflow_fix": "enable"},
        "overflow fix for none": {"overflow_fix": "disable"},
    }
    inputs = pairs(data, "train")[0]
    seen = inputs[torch.linspace(0, len(inputs) - 1, arguments.images).long()].split(1)
    held_out = [image.numpy() for image in pairs(data, "test")[0][:HELD_OUT].split(1)]
    example = example_of(arguments.side)
    models = {FLOAT: export.converted(network, example)}
    for name, given in settings.items():
        print(f"calibrating: {name}", file=sys.stderr)
        how = Quantisation(subset_size=len(seen), **given)
        made = quantised(network, seen, how, say=lambda _: None).eval()
        models[name] = export.converted(made, example)
    outputs = {name: seen_by(model, held_out) for name, model in models.items()}
    for model in models.values():
        model.reshape([1, 3, arguments.size, arguments.size])
    larger = example_of(arguments.size).numpy()
    found = measure.speeds(models, larger, rounds=arguments.rounds, whole=False)
    print(
        f"\nPSNR to the float network's outputs for {len(held_out)} test images of "
        f"{arguments.side}², {len(seen)} calibration images; one image of {arguments.size}², "
        f"medians of {arguments.rounds} rounds, load {load()}\n"
    )
    print("| | PSNR, dB | worst, dB | ms | of the defaults' |\n|---|--:|--:|--:|--:|")
    usual = found["the defaults"].latency
    for name, one in found.items():
        each = [measure.psnr(*two) for two in zip(outputs[name], outputs[FLOAT], strict=True)]
        told = ("–", "–") if name == FLOAT else (f"{sum(each) / len(each):.2f}", f"{min(each):.2f}")
        print(f"| {name} | {' | '.join(told)} | {one.latency:.0f} | {one.latency / usual:.2f} |")


def seen_by(model: Any, images: list[Any]) -> list[Any]:
    """A model's outputs, by OpenVINO."""
    compiled = measure.compiled_for(model, "LATENCY")
    return [compiled(image)[0].copy() for image in images]


def load() -> str:
    return f"{os.getloadavg()[0]:.2f}"


if __name__ == "__main__":
    main()
