"""Export a generator or a translator to ONNX; or what makes its styles."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from modelsoup import (
    MismatchError,
    OutputError,
    ParameterError,
    SoupError,
    check_output,
    digest_file,
    how_to_install,
    placed,
)

from .classes import classes_told
from .generators import load_model
from .models import Model
from .translator import Style

_SMALLEST, _LARGEST = 16, 8192  # sides of what an exported generator takes

Part = Literal["translation", "style", "style-of-noise"]
"""What of a model is exported."""
_MAKES = {"style": "styles of pictures", "style-of-noise": "styles of noise"}

# Warns, for each operation of torchvision's, that it is not there; no network here has one.
_TORCHVISION_ASIDE = "torch.onnx._internal.exporter._registration"


def export_onnx(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    direction: str = "x2y",
    size: int | None = None,
    batch: int | None = None,
    part: Part = "translation",
    force: bool = False,
) -> Path:
    """Write a generator or a translator as ONNX; or what makes its styles.

    Its inputs are `image`, N × C × H × W in [−1, 1], where it sees one; then what it takes: noise
    `z`, N × so many numbers, and `class`, the N indices of classes, int64; or `attributes`, N × 0
    or 1 for each, float32; or `style`, N × so many numbers. Those the parts `style` make of
    `image`, and `style-of-noise` of `z`, both with `class` where there are some. Its output, of the
    same kind as `image`, is `translation`, or `picture` where it sees none. C is the model's,
    usually 3.
    N is free unless `batch` is given, H and W unless `size` is or the model has one; they must be
    multiples of what the generator wants, such as four. The file's metadata name the checkpoint,
    its XXH3-128, and the direction or the classes.

    Raises:
        ParameterError: the size is no such multiple, below 16, or not the model's.
        MismatchError: there is no such part.
        OutputError: the output exists, does not end in `.onnx`, or cannot be written.
        SoupError: onnx or onnxscript is not installed.
    """
    output = Path(output)
    if batch is not None and batch < 1:
        raise ParameterError(f"batch is {batch}, where at least 1 is expected")
    if output.suffix != ".onnx":
        raise OutputError(f"the output {output} must end in .onnx")
    check_output(output, force=force, kind="file")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SoupError(f"exporting needs {how_to_install('onnx')} ({error})") from error
    own = load_model(str(model), direction)
    # Of batch 2 where it is free: the exporter would take a size of 1 for a constant.
    count = batch or 2
    of_batch: dict[int, Any] = {} if batch is not None else {0: torch.export.Dim("batch")}
    inputs: dict[str, tuple[torch.Tensor, dict[int, Any]]] = {}
    module, made = _part(own, part)
    if own.how.source is not None and part != "style-of-noise":
        image, free = _image(own, module, size, count)
        inputs["image"] = image, of_batch | free
    elif size not in (None, own.size):
        raise ParameterError(f"size is {size}, but {own.called} makes pictures of {own.size}")
    for name, values in _beside(own, part, count).items():
        inputs[name] = torch.from_numpy(values), of_batch
    told = {} if own.how.takes else {"modelsoup.direction": direction}
    if own.how.classes:
        told = classes_told(own.class_names, attributes=own.how.has_attributes)
    with placed(output, force=force) as partial:
        with warnings.catch_warnings(), _without(_TORCHVISION_ASIDE):
            # torch 2.13's exporter uses a name that its own pytree module calls old.
            warnings.filterwarnings("ignore", r".*treespec, LeafSpec", FutureWarning)
            # The batch is one number for all inputs, which is meant.
            warnings.filterwarnings("ignore", r"# The axis name: batch will not be used")
            program: Any = torch.onnx.export(
                module, tuple(values for values, _ in inputs.values()),
                input_names=list(inputs), output_names=[made],
                dynamo=True, dynamic_shapes=tuple(free for _, free in inputs.values()),
                verbose=False,
            )  # fmt: skip
        program.model.metadata_props.update(
            {
                "modelsoup.checkpoint": Path(model).name,
                "modelsoup.xxh3_128": digest_file(Path(model)).xxh3_128,
                **told,
            }
        )
        program.save(str(partial), external_data=False)
    return output


def _part(model: Model, part: Part) -> tuple[nn.Module, str]:
    """What is exported, and what its output is called.

    Raises:
        MismatchError: the model has no such part.
    """
    if part == "translation":
        return model.module, "picture" if model.how.source is None else "translation"
    style = model.how.style
    name = None
    if style is not None:
        name = style.of_pictures if part == "style" else style.of_noise
    if style is None or name is None:
        raise MismatchError(f"{model.called} has nothing that makes {_MAKES[part]}")
    return model.makers[name], style.name


def _beside(model: Model, part: Part, count: int) -> dict[str, np.ndarray]:
    """What a part is called with beside an image."""
    style, found = model.how.style, {}
    if part == "translation":
        for draw, values in zip(model.how.takes, model.how.given([""] * count), strict=True):
            if isinstance(draw, Style):
                found[draw.name] = np.zeros((count, draw.size), np.float32)
            else:
                found[model.how.input_called(draw)] = values
        return found
    assert style is not None
    if part == "style-of-noise":
        found["z"] = np.zeros((count, style.noise), np.float32)
    return found | ({"class": np.zeros(count, np.int64)} if style.classes else {})


def _image(
    model: Model, module: nn.Module, size: int | None, count: int
) -> tuple[torch.Tensor, dict[int, Any]]:
    """An image for an export, and which of its sides are free.

    Raises:
        ParameterError: the model does not take such a size.
    """
    multiple = int(getattr(module, "multiple", 1))
    least = max(_SMALLEST, multiple)
    if model.size is not None and size not in (None, model.size):
        raise ParameterError(f"size is {size}, but {model.called} takes pictures of {model.size}")
    size = model.size if size is None else size
    if size is not None and (size < least or size % multiple):
        raise ParameterError(
            f"size is {size}, where a multiple of {multiple} from {least} on is expected"
        )
    side = size or max(64, 2 * multiple)
    free: dict[int, Any] = {}
    if size is None:
        limits = {"min": max(_SMALLEST // multiple, 1), "max": _LARGEST // multiple}
        free = {
            axis: multiple * torch.export.Dim(name, **limits)
            for axis, name in ((2, "rows"), (3, "columns"))
        }
    return torch.zeros(count, model.channels, side, side), free


@contextmanager
def _without(name: str) -> Iterator[None]:
    """A logger tells errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
