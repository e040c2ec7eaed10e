"""Use a model: translate a picture, a folder, or a list of arrays; export a generator to ONNX."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelsoup import (
    MismatchError,
    OutputError,
    ParameterError,
    SoupError,
    TrainerError,
    check_output,
    digest_file,
    how_to_install,
    placed,
)

from ..networks.devices import chosen_device
from ..networks.layers import at_any_size
from ..pictures.images import (
    CHANNELS,
    left_out,
    read_image,
    save_png,
    to_image,
    to_tensor,
)
from .generators import generator_in, load_generator
from .places import translations

Progress = Callable[[int, int], None]
Say = Callable[[str], None]

_SMALLEST, _LARGEST = 16, 8192  # sides of what an exported generator takes

# Warns, for each operation of torchvision's, that it is not there; no network here has one.
_TORCHVISION_ASIDE = "torch.onnx._internal.exporter._registration"


def translate(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    direction: str = "x2y",
    batch: int = 8,
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> list[Path]:
    """Translate a picture, or all of a folder and its sub-folders, to PNG files.

    Any size: the sides are padded by reflection to multiples of what the generator wants, such as
    four, and cut back. Names are kept, their suffix becomes `.png`; pictures are grey, RGB or RGB
    with opacity as the model's are. Only one batch is in memory. Pictures are put in place when
    all are made, so that a failure leaves no part of them.

    Args:
        model: a checkpoint with generators of a trainer: `G_A.*`, `G_B.*`, `G.*`.
        source: a picture, or a folder.
        output: for a picture a `.png` file, or a folder that exists; for a folder a folder.
        direction: `x2y` or `y2x`; a model of one generator has one way, whichever is named.
        batch: how many neighbours of one size are translated at a time.
        device: where, as torch names it; `auto` is a GPU where there is one.
        force: replace pictures that exist.
        progress: is told how many are done, and of how many.
        say: is told which pictures are left out, if any.

    Returns:
        the files that were written.

    Raises:
        ParameterError: a batch below 1, a device that is not there, or a folder without images.
        OutputError: an output exists, or two pictures would have one name.
        ImageError: a picture cannot be read.
        MismatchError: the model has no such generator, or none of pictures.
    """
    source, output = Path(source), Path(output)
    if batch < 1:
        raise ParameterError(f"batch is {batch}, where at least 1 is expected")
    place = _device(device)
    channels = channels_of(model, direction)
    generator = load_generator(str(model), direction).to(place)
    with translations(source, output, force=force) as wanted:
        if source.is_dir() and (rest := left_out(source)) is not None:
            say(f"left out: {rest}")
        done = 0
        for group in _groups((read_image(one.source, channels) for one in wanted), batch):
            results = _translated(generator, [picture for _, picture in group], place)
            for (at, _), result in zip(group, results, strict=True):
                save_png(result, wanted[at].partial)
                done += 1
                if progress is not None:
                    progress(done, len(wanted))
    return [one.output for one in wanted]


def translated_arrays(
    model: str | os.PathLike[str],
    pictures: Iterable[np.ndarray],
    *,
    direction: str = "x2y",
    batch: int = 8,
    device: str = "auto",
) -> Iterator[np.ndarray]:
    """uint8 height × width × 3 in and out, in order; one batch is in memory, nothing is saved.

    Of a model of grey pictures, or with opacity, it is height × width × 1 or 4.
    """
    if batch < 1:
        raise ParameterError(f"batch is {batch}, where at least 1 is expected")
    place = _device(device)
    channels = channels_of(model, direction)
    generator = load_generator(str(model), direction).to(place)
    for group in _groups(pictures, batch):
        own = group[0][1].shape[2]
        if own != channels:
            raise ParameterError(
                f"a picture has {own} channels, where {model} translates such of {channels}"
            )
        yield from _translated(generator, [picture for _, picture in group], place)


def translate_arrays(
    model: str | os.PathLike[str],
    pictures: Sequence[np.ndarray],
    *,
    direction: str = "x2y",
    device: str = "cpu",
) -> list[np.ndarray]:
    """The same, all in memory."""
    return list(translated_arrays(model, pictures, direction=direction, device=device))


def export_onnx(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    direction: str = "x2y",
    size: int | None = None,
    batch: int | None = None,
    force: bool = False,
) -> Path:
    """Write one generator as ONNX: input `image`, output `translation`, N × C × H × W in [−1, 1].

    C is the generator's, usually 3. N is free unless `batch` is given, H and W unless `size` is; H
    and W must be multiples of what the generator wants, such as four. The file's metadata name the
    checkpoint, its XXH3-128, and the direction.

    Raises:
        ParameterError: the size is no such multiple, or below 16.
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
    generator = load_generator(str(model), direction)
    multiple = int(generator.multiple)
    least = max(_SMALLEST, multiple)
    if size is not None and (size < least or size % multiple):
        raise ParameterError(
            f"size is {size}, where a multiple of {multiple} from {least} on is expected"
        )
    # Of batch 2 where it is free: the exporter would take a size of 1 for a constant.
    side = size or max(64, 2 * multiple)
    example = torch.zeros(batch or 2, generator.channels, side, side)
    free: dict[int, Any] = {}
    if batch is None:
        free[0] = torch.export.Dim("batch")
    if size is None:
        limits = {"min": max(_SMALLEST // multiple, 1), "max": _LARGEST // multiple}
        free[2] = multiple * torch.export.Dim("rows", **limits)
        free[3] = multiple * torch.export.Dim("columns", **limits)
    with placed(output, force=force) as partial:
        with warnings.catch_warnings(), _without(_TORCHVISION_ASIDE):
            # torch 2.13's exporter uses a name that its own pytree module calls old.
            warnings.filterwarnings("ignore", r".*treespec, LeafSpec", FutureWarning)
            program: Any = torch.onnx.export(
                generator, (example,), input_names=["image"], output_names=["translation"],
                dynamo=True, dynamic_shapes=(free,), verbose=False,
            )  # fmt: skip
        program.model.metadata_props.update(
            {
                "modelsoup.checkpoint": Path(model).name,
                "modelsoup.xxh3_128": digest_file(Path(model)).xxh3_128,
                "modelsoup.direction": direction,
            }
        )
        program.save(str(partial), external_data=False)
    return output


def channels_of(model: str | os.PathLike[str], direction: str = "x2y") -> int:
    """The channels of the pictures that a checkpoint's generator translates: 1, 3 or 4.

    Raises:
        MismatchError: there is no such generator, or none of pictures.
    """
    channels = int(generator_in(str(model), direction)[1].sizes["channels"])
    if channels not in CHANNELS:
        raise MismatchError(
            f"{model} translates images of {channels} channels, where pictures have 1, 3 or 4"
        )
    return channels


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


def _groups(pictures: Iterable[np.ndarray], batch: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Neighbours of one size, at most `batch`: indices and pictures."""
    group: list[tuple[int, np.ndarray]] = []
    for at, picture in enumerate(pictures):
        if group and (len(group) == batch or group[0][1].shape != picture.shape):
            yield group
            group = []
        group.append((at, picture))
    if group:
        yield group


def _device(name: str) -> torch.device:
    try:
        return chosen_device(name)
    except TrainerError as error:
        raise ParameterError(str(error)) from None


def _translated(
    generator: nn.Module, pictures: Sequence[np.ndarray], device: torch.device
) -> list[np.ndarray]:
    with torch.inference_mode():
        images = torch.stack([to_tensor(picture) for picture in pictures]).to(device)
        made = at_any_size(generator, images, generator.multiple)
        return [to_image(image) for image in made]
