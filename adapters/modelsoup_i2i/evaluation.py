"""What `soup i2i evaluate` measures: a model on a set's test images, or one folder beside another.

A model's translations are compared as they come out, rounded to 8 bits; nothing is saved between.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelsoup import ParameterError

from .extractors import extractor
from .images import list_images, read_image
from .metric_names import OFFLINE, extractor_of, must_be_known, must_have
from .metrics import Result, evaluate
from .translate import translate_arrays

if TYPE_CHECKING:
    import numpy as np

    from .data import Transform

StrPath = str | os.PathLike[str]


def evaluate_model(
    model: StrPath,
    data: StrPath,
    *,
    direction: str = "x2y",
    metrics: Sequence[str] | None = None,
    real: str = "test",
    device: str = "cpu",
    transform: Transform | None = None,
    inception_weights: StrPath | None = None,
    lpips_backbone: StrPath | None = None,
) -> list[Result]:
    """Translate all test images of the source domain and measure them against the target's.

    Where every one of them has a picture of its name among the target's test images, that is its
    truth.

    Args:
        model: a checkpoint with `G_A.*` or `G_B.*`.
        data: a folder with `testA` and `testB`, and `trainA` or `trainB` for `real="train"`.
        direction: `x2y` or `y2x`.
        metrics: None for those that need no weights but a package's, and no truth if there is none.
        real: `test` or `train`: which pictures of the target domain.
        device: where the model translates.
        transform: by whose test part all pictures come to size first; None takes them as they are.
        inception_weights: see `metrics.evaluate`.
        lpips_backbone: likewise.

    Raises:
        ParameterError: a folder is empty, or a metric is unknown or lacks what it needs.
        ImageError: a folder is missing, or a picture damaged.
    """
    must_be_known(metrics or ())
    files, truth = _test_images(Path(data), direction)
    target = list_images(Path(data) / f"{real}{_letters(direction)[1]}")

    def read(chosen: Sequence[Path]) -> list[np.ndarray]:
        pictures = [read_image(file) for file in chosen]
        return pictures if transform is None else [transform.for_test(p) for p in pictures]

    inputs = read(files)
    fake = translate_arrays(model, inputs, direction=direction, device=device)
    return evaluate(
        fake,
        read(target),
        inputs=inputs,
        truth=None if truth is None else read(truth),
        metrics=_chosen(metrics, inputs=True, truth=truth is not None),
        inception_weights=inception_weights,
        lpips_backbone=lpips_backbone,
    )


def must_be_measurable(data: StrPath, metrics: Sequence[str], direction: str = "x2y") -> None:
    """Raise now what `evaluate_model` would raise after a training, but for damaged pictures.

    Raises:
        ParameterError: a folder is empty, or a metric is unknown or lacks what it needs.
        ImageError: a folder is missing.
        MissingWeightsError: an extractor's weights are not there.
    """
    must_be_known(metrics)
    _, truth = _test_images(Path(data), direction)
    if not list_images(target := Path(data) / f"test{_letters(direction)[1]}"):
        raise ParameterError(f"the folder {target} holds no images")
    roles = {"fake", "real", "inputs"} | ({"truth"} if truth is not None else set())
    must_have(metrics, roles)
    must_have_weights(metrics)


def must_have_weights(metrics: Sequence[str]) -> None:
    """Raise now that a metric's extractor is not there.

    Raises:
        MissingWeightsError: its weights are missing, or not what they must be.
        SoupError: a package cannot be imported.
    """
    for name in dict.fromkeys(map(extractor_of, metrics)):
        if name:
            extractor(name)


def _test_images(root: Path, direction: str) -> tuple[list[Path], list[Path] | None]:
    """Those that are translated, and what they should become, if all have it."""
    own, other = (root / f"test{letter}" for letter in _letters(direction))
    files = list_images(own)
    if not files:
        raise ParameterError(f"the folder {own} holds no images")
    return files, paired(files, own, other)


def _letters(direction: str) -> tuple[str, str]:
    return ("A", "B") if direction == "x2y" else ("B", "A")


def evaluate_folders(
    fake: StrPath,
    real: StrPath,
    *,
    metrics: Sequence[str] | None = None,
    inception_weights: StrPath | None = None,
    lpips_backbone: StrPath | None = None,
) -> list[Result]:
    """Measure one folder of pictures against another; the same names are pairs, if all are there.

    Raises:
        as `evaluate_model`.
    """
    truth = paired(list_images(fake), Path(fake), Path(real))
    return evaluate(
        fake,
        real,
        truth=None if truth is None else [read_image(file) for file in truth],
        metrics=_chosen(metrics, inputs=False, truth=truth is not None),
        inception_weights=inception_weights,
        lpips_backbone=lpips_backbone,
    )


def paired(files: Sequence[Path], root: Path, other: Path) -> list[Path] | None:
    """For each file under `root` the one of the same name under `other`; None unless all have."""
    there = [other / file.relative_to(root) for file in files]
    return there if there and all(file.is_file() for file in there) else None


def _chosen(metrics: Sequence[str] | None, *, inputs: bool, truth: bool) -> Sequence[str]:
    if metrics is not None:
        return metrics
    without = () if inputs else ("_to_input",)
    if not truth:
        without = (*without, "_to_truth", "psnr", "ssim")
    return [name for name in OFFLINE if not name.endswith(without)]
