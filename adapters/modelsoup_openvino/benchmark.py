"""`soup openvino bench`: what an exported model takes on this machine, alone or beside another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelsoup import ParameterError, counted

from . import export, measure


def measured(paths: Sequence[Path], rounds: int, size: int | None) -> dict[str, Any]:
    """Speed, bytes, memory and INT8 operations of models that take turns on one image.

    Args:
        paths: of IRs; all get images of one size.
        rounds: that count.
        size: the image's side; None is that of the first model.

    Raises:
        CheckpointError: a file is missing or damaged.
        ParameterError: a model cannot be had for that size, or they are one file.
    """
    there = [path.stat() for path in paths if path.exists()]
    if len({(status.st_dev, status.st_ino) for status in there}) < len(there):
        raise ParameterError(f"{paths[0]} is given twice: name another model to compare with")
    models = {str(path): export.read(path) for path in paths}
    first = next(iter(models.values()))
    shape = list(first.input(0).get_partial_shape().to_shape())
    if size is not None:
        shape[2:] = [size, size]
    for name, model in models.items():
        if _beside(model) != _beside(first):
            raise ParameterError(f"{name} takes {_said(model)}, but {paths[0]} {_said(first)}")
        try:
            model.reshape({0: shape})
        except RuntimeError as error:
            said = " ".join(str(error).split())[-200:]
            raise ParameterError(f"{name} cannot be reshaped to {shape}: {said}") from error
    rng = np.random.default_rng(0)
    example = {0: rng.uniform(-1, 1, shape).astype(np.float32)}
    for place, (_, own, kind) in enumerate(_beside(first), 1):
        # Indices of classes, of which there is a first one; else noise, or a style.
        values = np.zeros(own) if kind == "i64" else rng.standard_normal(own)
        example[place] = values.astype(np.int64 if kind == "i64" else np.float32)
    return {
        "image": shape,
        "rounds": rounds,
        "machine": measure.machine(),
        "models": measure.as_json(measure.speeds(models, example, rounds=rounds)),
        "bytes": {str(path): measure.size_on_disk(path) for path in paths},
        "memory_mib": {str(path): measure.peak_memory(path) for path in paths},
        "operations": {
            name: {kind: list(n) for kind, n in export.integer_operations(model).items()}
            for name, model in models.items()
        },
    }


def _beside(model: Any) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of what a model takes beside an image."""
    return [
        (port.get_any_name(), tuple(port.get_shape()), port.get_element_type().to_string())
        for port in model.inputs[1:]
    ]


def _said(model: Any) -> str:
    own = [f"{name} {list(shape)}" for name, shape, _ in _beside(model)]
    return " and ".join(["an image", *own])


def table(told: Mapping[str, Any]) -> str:
    """The same for people."""
    machine, (height, width) = told["machine"], told["image"][-2:]
    lines = [
        f"{height} × {width} pixels, medians of {counted(told['rounds'], 'round')}, "
        f"{machine['cores']} cores of {machine['processor']}, load {machine['load']}",
        "",
        "| model | ms | one thread, ms | images a second | MB | memory, MiB | INT8 operations |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, own in told["models"].items():
        counts = told["operations"][name].values()
        integer, whole = sum(n[0] for n in counts), sum(n[1] for n in counts)
        lines.append(
            f"| {name} | {own['latency']:.1f} | {own['one_thread']:.1f} | {own['throughput']:.1f} "
            f"| {told['bytes'][name] / 1e6:.2f} | {told['memory_mib'][name]['peak']} "
            f"| {integer} of {whole} |"
        )
    return "\n".join(lines)
