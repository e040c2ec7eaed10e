"""What `modelsoup_openvino` asks of a trainer: the images that a generator sees, and its shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelsoup import open_checkpoint

from .data import folders_of
from .images import list_images, read_image, to_tensor
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
    """The images that a generator translates in use, as it sees them, in order.

    Args:
        options: of the training, with its data and sizes.
        network: `G_A`, which sees X, or `G_B`, which sees Y.
        part: `train`; or `test`, of which there is none where data are two single folders, or the
            folder has no `testA` and `testB`.

    Yields:
        float32, 1 × 3 × height × width in [−1, 1].

    Raises:
        ParameterError: the training folders are missing or do not fit.
        ImageError: a picture is damaged.
    """
    side = GENERATORS.index(network)
    transform = options.transform()
    for file in _files(options, side, part):
        yield to_tensor(transform.for_test(read_image(file)))[None]


def quality(
    options: CycleGANOptions, network: str, images: Sequence[np.ndarray], names: Sequence[str], *,
    part: str, first: int,
) -> dict[str, float]:  # fmt: skip
    """Metrics of what a generator made of some of the images that `inputs` gives.

    Where each of these has a picture of its name in the other domain, that is its truth.

    Args:
        options: of the training.
        network: `G_A` or `G_B`.
        images: uint8, height × width × 3, for neighbours among `inputs`, in their order.
        names: of `metrics.METRICS`.
        part: that of `inputs`.
        first: which of its images the first one was made of, from 0.

    Raises:
        ParameterError: an unknown metric, or one that needs a truth where there is none.
        SoupError: an extractor's weights are not there.
    """
    from .evaluation import paired
    from .metrics import evaluate

    side, transform = GENERATORS.index(network), options.transform()
    own, other = (_files(options, s, part) for s in (side, 1 - side))
    own = own[first : first + len(images)]
    read = [transform.for_test(read_image(file)) for file in own]
    real = [transform.for_test(read_image(file)) for file in other]
    truth = paired(own, *(_folders(options, part)[s] for s in (side, 1 - side)))
    results = evaluate(
        list(images),
        real,
        inputs=read,
        truth=None if truth is None else [transform.for_test(read_image(f)) for f in truth],
        metrics=names,
    )
    return {result.name: result.value for result in results}


def tested_on(options: CycleGANOptions) -> list[Path]:
    """The test images of both domains: what `inputs` gives of them, and what is their truth."""
    return [file for side in (0, 1) for file in _files(options, side, "test")]


def options_of(checkpoint: Path) -> dict[str, Any]:
    """The options that a checkpoint decides: widths, blocks and layers of its networks.

    Raises:
        CheckpointError: it is missing or damaged.
        MismatchError: it holds no such networks.
    """
    shapes = {name: info.shape for name, info in open_checkpoint(checkpoint).tensors.items()}
    present = {name.partition(".")[0] for name in shapes}
    generator = next((name for name in GENERATORS if name in present), GENERATORS[0])
    own = generator_shape_of(shapes, f"{generator}.")
    found = {"width": own.width, "blocks": own.blocks}
    judges = [name for name in DISCRIMINATORS if name in present]
    if judges:
        judge = discriminator_shape_of(shapes, f"{judges[0]}.")
        found |= {"d_width": judge.width, "d_layers": judge.layers}
    return found


def _files(options: CycleGANOptions, side: int, part: str) -> tuple[Path, ...]:
    if part == "train":
        domains = options.domains()
        return (domains.a, domains.b)[side]
    if options.data is None:
        return ()
    if not all((Path(options.data) / f"test{letter}").is_dir() for letter in "AB"):
        return ()
    return tuple(list_images(_folders(options, part)[side]))


def _folders(options: CycleGANOptions, part: str) -> tuple[Path, Path]:
    if part == "train":
        return folders_of(options.data, options.data_a, options.data_b)
    return folders_of(options.data, None, None, part)
