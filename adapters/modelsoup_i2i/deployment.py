"""What `modelsoup_openvino` asks of a trainer: the images that a generator sees, and its shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from modelsoup import Checkpoint, CheckpointError, open_checkpoint, read_lineage

from .data import Mode, folders_of
from .images import ImageError, list_images, read_image, to_tensor
from .shapes import (
    DISCRIMINATORS,
    GENERATORS,
    discriminator_shape_of,
    generator_shape_of,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .cyclegan import CycleGANOptions


def inputs(options: CycleGANOptions, network: str, part: str) -> Iterator[torch.Tensor]:
    """The images that a generator translates in use, at the size of training, in order.

    Args:
        options: of the training, with its data and sizes.
        network: `G_A`, which sees X, or `G_B`, which sees Y.
        part: `train`; or `test`, of which there is none where no test folders are named, or the
            data have no `testA` and `testB`.

    Yields:
        float32, 1 × channels × height × width in [−1, 1].

    Raises:
        ParameterError: the training folders are missing or do not fit.
        ImageError: a picture is damaged, and is not to be left out.
    """
    for _, picture in _pictures(options, GENERATORS.index(network), part):
        yield to_tensor(picture)[None]


def quality(
    options: CycleGANOptions, network: str, images: Sequence[np.ndarray], names: Sequence[str], *,
    part: str, first: int,
) -> dict[str, float]:  # fmt: skip
    """Metrics of what a generator made of some of the images that `inputs` gives.

    Where each of these has a picture of its name in the other domain, that is its truth.

    Args:
        options: of the training.
        network: `G_A` or `G_B`.
        images: uint8, height × width × channels, for neighbours among `inputs`, in their order.
        names: of `metrics.METRICS`.
        part: that of `inputs`.
        first: which of its images the first one was made of, from 0.

    Raises:
        ParameterError: an unknown metric, or one that needs a truth where there is none.
        SoupError: an extractor's weights are not there.
    """
    from .evaluation import paired
    from .metrics import evaluate

    side = GENERATORS.index(network)
    own = dict(islice(_pictures(options, side, part), first, first + len(images)))
    real = dict(_pictures(options, 1 - side, part))
    truth = paired(list(own), *(_folders(options, part)[s] for s in (side, 1 - side)))
    if truth is not None and not real.keys() >= set(truth):  # one of them is damaged
        truth = None
    results = evaluate(
        list(images),
        list(real.values()),
        inputs=list(own.values()),
        truth=None if truth is None else [real[file] for file in truth],
        metrics=names,
    )
    return {result.name: result.value for result in results}


def tested_on(options: CycleGANOptions) -> list[Path]:
    """The test images of both domains: what `inputs` gives of them, and what is their truth."""
    return [file for side in (0, 1) for file in _files(options, side, "test")]


def options_of(checkpoint: Path) -> dict[str, Any]:
    """The options that a checkpoint decides: widths, blocks, layers and channels of its networks.

    Where its lineage says at which size it was trained, that too: the mode and both sizes of the
    trainings that are nearest to it, if they agree.

    Raises:
        CheckpointError: it is missing or damaged.
        MismatchError: it holds no such networks.
    """
    opened = open_checkpoint(checkpoint)
    shapes = {name: info.shape for name, info in opened.tensors.items()}
    present = {name.partition(".")[0] for name in shapes}
    generator = next((name for name in GENERATORS if name in present), GENERATORS[0])
    own = generator_shape_of(shapes, f"{generator}.")
    found: dict[str, Any] = {"width": own.width, "blocks": own.blocks, "channels": own.channels}
    judges = [name for name in DISCRIMINATORS if name in present]
    if judges:
        judge = discriminator_shape_of(shapes, f"{judges[0]}.")
        found |= {"d_width": judge.width, "d_layers": judge.layers}
    return found | _trained_at(opened)


def _trained_at(checkpoint: Checkpoint) -> dict[str, Any]:
    """Mode and sizes of the trainings that a checkpoint was made of; nothing if they differ."""
    try:
        made = read_lineage(checkpoint)
    except CheckpointError:  # of a later version, say: then it tells as little as none
        return {}
    if made is None:
        return {}
    steps: Mapping[str, Any] = made.get("ancestors", {})
    found: list[dict[str, Any]] = []
    pending: list[tuple[Mapping[str, Any], dict[str, Any]]] = [(made, {})]
    seen: set[str] = set()
    while pending:
        step, later = pending.pop()
        options = step.get("options", {})
        own = step.get("trainer") in _NAMES
        # What is trained in INT8 has the trainer's options in its own, and the start's sizes.
        told = _sizes(options if own else options.get("training", {}))
        if told is None:
            return {}
        later = {**told, **later}
        if own:
            found.append({**_DEFAULTS, **later})
            continue
        inputs = [entry.get("key") or entry.get("xxh3_128") for entry in step["inputs"]]
        if options.get("of") in _NAMES and not any(name in steps for name in inputs):
            # Its start said nothing: it was told these, or took them.
            found.append({**_DEFAULTS, **later})
        for name in inputs:
            if name in steps and name not in seen:
                seen.add(name)
                pending.append((steps[name], later))
    return found[0] if found and all(sizes == found[0] for sizes in found) else {}


_NAMES = ("cyclegan", "modelsoup_i2i:CycleGAN", "modelsoup_i2i.cyclegan:CycleGAN")
"""How a plan, and with it a lineage, may call this trainer."""
_DEFAULTS = {"mode": "resize_and_crop", "load_size": 286, "crop_size": 256}


def _sizes(options: object) -> dict[str, Any] | None:
    """Those of the options, from a file that anybody may have written, that say a size.

    None where they are not what such options can be.
    """
    if not isinstance(options, dict):
        return None
    found = {name: options[name] for name in _DEFAULTS if name in options}
    numbers = [found[name] for name in ("load_size", "crop_size") if name in found]
    flat = [n for number in numbers for n in (number if isinstance(number, list) else [number])]
    sound = found.get("mode", "none") in get_args(Mode) and all(type(n) is int for n in flat)
    return found if sound else None


def _pictures(options: CycleGANOptions, side: int, part: str) -> Iterator[tuple[Path, np.ndarray]]:
    """The files of a part that can be read, each with its picture at the size of training."""
    transform = options.transform()
    for file in _files(options, side, part):
        try:
            picture = read_image(file, options.channels)
        except ImageError:
            if options.on_bad_image == "error":
                raise
            continue
        yield file, transform.for_test(picture)


def _files(options: CycleGANOptions, side: int, part: str) -> tuple[Path, ...]:
    if part == "train":
        domains = options.domains()
        return (domains.a, domains.b)[side]
    tests = options.tests()
    if tests is None or (options.test_a is None and not all(map(Path.is_dir, tests))):
        return ()
    return tuple(list_images(tests[side]))


def _folders(options: CycleGANOptions, part: str) -> tuple[Path, Path]:
    tests = options.tests()
    if part == "train" or tests is None:
        return folders_of(options.data, options.data_a, options.data_b)
    return tests
