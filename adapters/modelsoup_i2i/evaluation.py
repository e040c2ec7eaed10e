"""What `soup i2i evaluate` measures: a model on a set's test images, or one folder beside another.

A model's translations are compared as they come out, rounded to 8 bits; nothing is saved between.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from modelsoup import ParameterError

from .images import list_images, read_image
from .metrics import OFFLINE, Result, evaluate, must_be_known
from .translate import translate_arrays

StrPath = str | os.PathLike[str]


def evaluate_model(
    model: StrPath,
    data: StrPath,
    *,
    direction: str = "x2y",
    metrics: Sequence[str] | None = None,
    real: str = "test",
    device: str = "cpu",
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
        inception_weights: see `metrics.evaluate`.
        lpips_backbone: likewise.

    Raises:
        ParameterError: a folder is empty, or a metric is unknown or lacks what it needs.
        ImageError: a folder is missing, or a picture damaged.
    """
    must_be_known(metrics or ())
    a, b = ("A", "B") if direction == "x2y" else ("B", "A")
    root = Path(data)
    files = list_images(root / f"test{a}")
    if not files:
        raise ParameterError(f"the folder {root / f'test{a}'} holds no images")
    truth = paired(files, root / f"test{a}", root / f"test{b}")
    inputs = [read_image(file) for file in files]
    fake = translate_arrays(model, inputs, direction=direction, device=device)
    return evaluate(
        fake,
        root / f"{real}{b}",
        inputs=inputs,
        truth=None if truth is None else [read_image(file) for file in truth],
        metrics=_chosen(metrics, inputs=True, truth=truth is not None),
        inception_weights=inception_weights,
        lpips_backbone=lpips_backbone,
    )


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
