"""The report as a page, and the sheet of pictures: the tree paper's figure 4 for any run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelsoup import counted, printable

COLUMNS = (0, 2, 5)
"""The paper's epochs; the sheet has those that there are, the kept one, and the last."""

SHOWN = 6
"""How many images a sheet shows."""

_GAP = 4  # pixels
_BAND = 16  # for a heading

_SATURATES = (
    "",
    "The processor that measured this has no VNNI: it adds products of 8-bit integers in 16 bits, "
    "and what does not fit is cut off. On one with VNNI, or with `overflow_fix: enable`, INT8 can "
    "be nearer to NNCF's network.",
)


def page(told: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    origin, likeness = told["origin"], told["likeness"]
    lines = [
        f"# {origin['network']} of {printable(origin['source'])} in INT8",
        "",
        f"Made from the checkpoint with the XXH3-128 `{origin['source_xxh3_128']}` by the trainer "
        f"`{origin['trainer']}`, with {_versions(told['versions'])}.",
        "",
        *_candidates(told),
        "",
        f"INT8 against float32, both by OpenVINO, on "
        f"{counted(round(likeness['images']), 'image')}: PSNR "
        f"{likeness['psnr']:.2f} dB (worst {likeness['psnr_worst']:.2f}), SSIM "
        f"{_number(likeness['ssim'], 4)}. The INT8 graph against NNCF's fake-quantised network: "
        f"{likeness['agreement']['int8']:.1f} dB.",
        *_beside(likeness["takes"]),
        *(_SATURATES if likeness["saturates"] else ()),
        "",
        *_sizes(told["bytes"]),
        "",
    ]
    if told["speed"]:
        lines += [*_speed(told["speed"], told["machine"]), ""]
    if told["quality"]:
        lines += [*_quality(told["quality"]), ""]
    lines += [*_operations(told["operations"]), ""]
    return "\n".join(lines)


def sheet(
    inputs: Sequence[np.ndarray], expected: Sequence[np.ndarray],
    pictures: Mapping[int, Sequence[np.ndarray]], kept: int,
) -> np.ndarray:  # fmt: skip
    """A page of pictures, uint8, H × W × C each: a row an image; input, float, INT8 by epoch.

    Args:
        inputs: images of any sizes; at most `SHOWN` become rows.
        expected: the float network's outputs for them.
        pictures: INT8's outputs for them, by epoch.
        kept: the epoch that was kept, marked with a star.

    Returns:
        uint8, height × width × 3.
    """
    from modelsoup_i2i.pictures.images import as_rgb, pillow_image
    from PIL import Image, ImageDraw

    epochs = sorted({e for e in (*COLUMNS, kept, max(pictures)) if e in pictures})
    headings = ["input", "float32"]
    headings += [f"INT8, {counted(e, 'epoch')}{' *' if e == kept else ''}" for e in epochs]
    rows = [
        [inputs[n], expected[n], *(pictures[e][n] for e in epochs)]
        for n in range(min(len(inputs), SHOWN))
    ]
    wide = max(96, *(image.shape[1] for row in rows for image in row)) + _GAP
    heights = [max(image.shape[0] for image in row) + _GAP for row in rows]
    canvas = Image.new("RGB", (wide * len(headings) + _GAP, sum(heights) + _BAND), "white")
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(headings):
        draw.text((_GAP + column * wide, 2), heading, fill="black")
    top = _BAND
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            canvas.paste(pillow_image(as_rgb(image)), (_GAP + column * wide, top))
        top += height
    return np.asarray(canvas)


def as_pixels(image: np.ndarray) -> np.ndarray:
    """float32, 1 × C × H × W in [−1, 1] to uint8, H × W × C; rounded to nearest even, clamped."""
    values = np.rint((image[0].astype(np.float32) + 1) * 127.5)
    return np.ascontiguousarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _candidates(told: Mapping[str, Any]) -> list[str]:
    held, kept = told["held_out"], told["kept"]
    of = counted(held["images"], "test image" if held["from_test"] else "training image")
    why = "" if held["from_test"] else ", for there are no test images"
    candidates = told["candidates"]
    first, best = candidates[0], next(one for one in candidates if one["epoch"] == kept)
    lines = [
        f"Likeness to the float network on {of}{why}:",
        "",
        "| epochs after calibration | PSNR, dB | SSIM | |",
        "|--:|--:|--:|---|",
    ]
    for one in candidates:
        mark = "kept" if one["epoch"] == kept else ""
        alike = _number(one["ssim"], 4)
        lines.append(f"| {one['epoch']} | {one['psnr']:.2f} | {alike} | {mark} |")
    lines.append("")
    if len(candidates) > 1:
        lines += [
            f"The kept one is the nearest of {len(candidates)} on these same images, so what is "
            f"reported of it on them, here and below, is rather too good: on other images it may "
            f"be less near.",
            "",
        ]
    if len(candidates) == 1:
        lines.append("It was calibrated, and not trained after that.")
    elif kept:
        lines.append(
            f"Training after calibration gained {best['psnr'] - first['psnr']:.2f} dB; its best "
            f"epoch was kept."
        )
    else:
        lines.append("No epoch after calibration was nearer to the float network: none was kept.")
    return lines


def _beside(takes: Sequence[str]) -> list[str]:
    if not takes:
        return []
    own = " and ".join(f"`{name}`" for name in takes)
    return ["", f"Each image has {own} of its own, the same for float32 and INT8, here and above."]


def _sizes(sizes: Mapping[str, int]) -> list[str]:
    whole = sizes["fp32.xml"]
    rows = [
        f"| {name.removesuffix('.xml')} | {size / 1e6:.2f} | {size / whole:.3f} |"
        for name, size in sizes.items()
    ]
    return ["| model | MB | of float32 |", "|---|--:|--:|", *rows]


def _speed(told: Mapping[str, Any], machine: Mapping[str, str]) -> list[str]:
    height, width = told["image"][-2:]
    models = told["models"]
    names = {"torch": "torch, eager float32", "fp32.xml": "OpenVINO float32",
             "int8.xml": "OpenVINO INT8"}  # fmt: skip
    fast = models["int8.xml"]["latency"]
    lines = [
        f"One image of {height} × {width}, medians of {counted(told['rounds'], 'round')} in which "
        f"all took turns, on {machine['cores']} cores of {machine['processor']}, load "
        f"{machine['load']}:",
        "",
        "| | ms | INT8 is faster by | one thread, ms | images a second | memory, MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, said in names.items():
        own = models[name]
        memory = told["memory_mib"].get(name)
        lines.append(
            f"| {said} | {own['latency']:.1f} | {own['latency'] / fast:.2f} | "
            f"{_number(own['one_thread'], 1)} | {_number(own['throughput'], 1)} | "
            f"{'–' if memory is None else memory['peak']} |"
        )
    return lines


def _operations(told: Mapping[str, Any]) -> list[str]:
    lines = ["| operations | INT8 | of |", "|---|--:|--:|"]
    lines += [f"| {kind} | {own} | {whole} |" for kind, (own, whole) in told["graph"].items()]
    return lines


def _quality(told: Mapping[str, Any]) -> list[str]:
    lines = ["| metric | float32 | INT8 after calibration | INT8 kept |", "|---|--:|--:|--:|"]
    for name, values in told.items():
        cells = " | ".join(f"{values[which]:.4f}" for which in ("float", "calibrated", "kept"))
        lines.append(f"| {name} | {cells} |")
    return lines


def _versions(told: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in told.items())


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
