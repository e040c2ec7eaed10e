"""The folder that a device gets: models, quantised checkpoint, report and pictures; whole or not.

int8.xml  int8.bin       the quantised network for OpenVINO
fp32.xml  fp32.bin       the float network that it was made from, to compare; also as fp16
quantised.safetensors    NNCF's quantised network, to be trained on
float.safetensors        the checkpoint in the tree's names
report.json  report.md   sizes, speed, likeness, and where it came from
sheet.png                input, float, INT8 by epoch
pictures/                if asked for: all of them, for metrics over folders
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from modelsoup import placed

from . import export, measure
from .deploy import IMAGE, Deployable, Inputs, Log
from .place import REPORT, must_be_ours
from .qat import Outcome, whole
from .quantise import Quantisation
from .report import as_pixels, page, sheet
from .versions import installed

INT8, FP32, FP16 = "int8.xml", "fp32.xml", "fp16.xml"
QUANTISED, FLOAT = "quantised.safetensors", "float.safetensors"
_CHANNELS = {1: "grey", 3: "RGB", 4: "RGB and opacity"}
PAGE, SHEET, PICTURES = "report.md", "sheet.png", "pictures"


def deliver(
    outcome: Outcome, out: Path, *, trainer: Deployable, options: Mapping[str, Any],
    how: Quantisation, start: Path, rounds: int, pictures: bool,
    quality: Mapping[str, Mapping[str, float]], force: bool, log: Log,
) -> dict[str, Any]:  # fmt: skip
    """Export, measure, and write the folder in the place of what is there.

    Args:
        outcome: what was quantised and trained.
        out: the folder.
        trainer: whose network it is.
        options: its options as plain data, for the report.
        how: how it was quantised.
        start: the checkpoint that it came from.
        rounds: in which speed is measured; 0 leaves it out.
        pictures: write all outputs for the held-out images too.
        quality: metric → `float`, `calibrated`, `kept` → value, for the report.
        force: replace the folder of an earlier run.
        log: is told lines.

    Returns:
        the report.

    Raises:
        OutputError: there is something else in its place, or anything without `force`.
        SoupError: the export does not compute what the network does, or cannot be written.
    """
    out = out.absolute()
    must_be_ours(out)
    example = whole(outcome.held_out.inputs[0], outcome.multiple)
    log("converts and compares")
    models = {
        INT8: export.converted(outcome.best, example),
        FP32: export.converted(outcome.reference, example),
    }
    agreed = {
        "int8": export.agreement(outcome.best, models[INT8], example),
        "fp32": export.agreement(outcome.reference, models[FP32], example),
    }
    with placed(out, force=force) as folder:
        folder.mkdir()
        shutil.copyfile(outcome.quantised, folder / QUANTISED)
        shutil.copyfile(outcome.checkpoint, folder / FLOAT)
        origin = _origin(outcome, trainer, start, folder / FLOAT)
        for name, model in models.items():
            export.write(model, folder / name, {**origin, "precision": name.partition(".")[0]})
        export.write(models[FP32], folder / FP16, {**origin, "precision": "fp16"}, half=True)
        outputs = _measured_outputs(models, outcome)
        told = {
            "origin": origin,
            "options": dict(options),
            "quantisation": asdict(how),
            "candidates": [asdict(one) for one in outcome.candidates],
            "kept": outcome.kept.epoch,
            "losses": {name: round(value, 6) for name, value in outcome.figures.items()},
            "held_out": {
                "images": len(outcome.held_out.images),
                "from_test": outcome.held_out.part == "test",
                "first": outcome.held_out.first,
            },
            "likeness": {
                **outputs, "agreement": {k: round(v, 2) for k, v in agreed.items()},
                "takes": [name for name in example if name != IMAGE],
                "saturates": measure.saturates() and how.overflow_fix != "enable",
            },
            "quality": {name: dict(values) for name, values in quality.items()},
            "operations": _operations(models[INT8]),
            "bytes": {n: measure.size_on_disk(folder / n) for n in (INT8, FP32, FP16)},
            "speed": _speed(models, outcome, example, rounds, folder) if rounds else {},
            "machine": measure.machine(),
            "versions": installed(),
        }  # fmt: skip
        (folder / REPORT).write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        (folder / PAGE).write_text(page(told), "utf-8")
        _save_sheet(outcome, folder / SHEET)
        if pictures:
            _save_pictures(outcome, folder / PICTURES)
        must_be_ours(out)  # still
    return told


def _origin(outcome: Outcome, trainer: Deployable, start: Path, plain: Path) -> dict[str, str]:
    """The texts of `rt_info`: what it came from, and what `infer` must know."""
    channels, side = outcome.held_out.images[0].shape[1], getattr(outcome.reference, "size", None)
    return {
        "source": start.name,
        "source_xxh3_128": export.digest_of(start),
        "float_xxh3_128": export.digest_of(plain),
        "trainer": trainer.name,
        "network": outcome.network,
        "qat_epochs": str(outcome.kept.epoch),
        "multiple": str(outcome.multiple),
        "images": f"{_CHANNELS.get(channels, 'arrays')}, 1 x {channels} x height x width, float32 "
        f"in [-1, 1]",
        **({} if side is None else {"side": str(side)}),
        **({"classes": json.dumps(outcome.classes)} if outcome.classes else {}),
        **({"noise": json.dumps(outcome.noise)} if outcome.noise else {}),
    }


def _measured_outputs(models: Mapping[str, Any], outcome: Outcome) -> dict[str, float | None]:
    """INT8 against float32, both by OpenVINO, as they will be used: of one noise, one class."""
    compiled = {name: measure.compiled_for(model, "LATENCY") for name, model in models.items()}
    pairs: dict[str, list[np.ndarray]] = {name: [] for name in compiled}
    size = tuple(outcome.held_out.images[0].shape)
    for inputs in outcome.held_out.inputs:
        if tuple(inputs[IMAGE].shape) != size:  # that would compile both anew
            continue
        seen = as_arrays(whole(inputs, outcome.multiple))
        for name, call in compiled.items():
            made = call(seen)[0][..., : size[2], : size[3]]
            pairs[name].append(np.array(made))
    alike = measure.ssim(pairs[INT8], pairs[FP32])
    each = [measure.psnr(a, b) for a, b in zip(pairs[INT8], pairs[FP32], strict=True)]
    return {
        "psnr": round(statistics.fmean(min(value, 100.0) for value in each), 3),
        "psnr_worst": round(min([*each, 100.0]), 3),
        "ssim": None if alike is None else round(alike, 5),
        "images": float(len(each)),
    }


def _operations(model: Any) -> dict[str, Any]:
    executed = export.executed_operations(measure.compiled_for(model, "LATENCY"))
    return {
        "graph": {k: list(counts) for k, counts in export.integer_operations(model).items()},
        "executed": {kind: dict(found) for kind, found in sorted(executed.items())},
    }


def _speed(
    models: Mapping[str, Any], outcome: Outcome, example: Inputs, rounds: int, folder: Path
) -> dict[str, Any]:
    import torch

    def eager() -> object:
        with torch.inference_mode():
            return outcome.reference(*example.values())

    found = measure.as_json(
        measure.speeds(models, as_arrays(example), rounds=rounds, others={"torch": eager})
    )
    return {
        "image": list(example[IMAGE].shape),
        "rounds": rounds,
        "torch_threads": torch.get_num_threads(),
        "models": found,
        "memory_mib": {name: measure.peak_memory(folder / name) for name in models},
    }


def as_arrays(inputs: Inputs) -> dict[str, np.ndarray]:
    """What OpenVINO is called with."""
    return {name: values.numpy() for name, values in inputs.items()}


def _save_sheet(outcome: Outcome, path: Path) -> None:
    from modelsoup_i2i.pictures.images import save_png

    inputs = [as_pixels(image.numpy()) for image in outcome.held_out.images]
    expected = [as_pixels(image) for image in outcome.expected]
    save_png(sheet(inputs, expected, outcome.pictures, outcome.kept.epoch), path)


def _save_pictures(outcome: Outcome, folder: Path) -> None:
    """`input`, `float32`, `int8-0` (calibrated), … and `int8` (kept); one name for one image."""
    from modelsoup_i2i.pictures.images import save_png

    sets: dict[str, Sequence[np.ndarray]] = {
        "input": [as_pixels(image.numpy()) for image in outcome.held_out.images],
        "float32": [as_pixels(image) for image in outcome.expected],
        "int8": outcome.pictures[outcome.kept.epoch],
        **{f"int8-{epoch}": images for epoch, images in outcome.pictures.items()},
    }
    for name, images in sets.items():
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(images):
            save_png(image, folder / name / f"{number:04d}.png")
