"""What `soup i2i evaluate` measures: a model on a set's test images, or one folder beside another.

A model's translations are compared as they come out, rounded to 8 bits; nothing is saved between.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelsoup import ParameterError

from ..pictures.images import CHANNELS, ImageError, list_images, read_image
from ..pictures.picture import Picture, read_picture
from ..use.generators import find
from ..use.translate import channels_of, translate_arrays
from . import extractors
from .kept import Kept
from .metric_names import (
    ANY_CHANNELS,
    OFFLINE,
    extractor_of,
    must_be_known,
    must_be_looked_at,
    must_have,
    must_suffice,
    own_names,
)
from .metrics import Result, evaluate, must_be_importable

if TYPE_CHECKING:
    import numpy as np

    from ..pictures.transforms import Transform

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Sets:
    """The files of test pictures that a model is measured on, and how they come to size.

    Attributes:
        inputs: what is translated.
        real: pictures of the target domain.
        truth: what the inputs should become, in their order; None where not all have it.
        folders: where inputs and real pictures were found.
        transform: by whose test part all come to size; None takes them as they are.
        channels: as many as will be looked at.
    """

    inputs: tuple[Picture, ...]
    real: tuple[Picture, ...]
    truth: tuple[Picture, ...] | None
    folders: tuple[Path, ...]
    transform: Transform | None = None
    channels: int = 3

    def read(self, files: Sequence[Picture], channels: int = 3) -> list[np.ndarray]:
        """Some of them, uint8, height × width × channels."""
        return [self._read(file, channels) for file in files]

    def first(self, most: int) -> Sets:
        """At most so many of each."""
        truth = None if self.truth is None else self.truth[:most]
        return replace(self, inputs=self.inputs[:most], real=self.real[:most], truth=truth)

    def must_allow(self, metrics: Sequence[str], *, skip: bool = False) -> tuple[Sets, list[str]]:
        """Raise now what measuring a translation of them would raise: before hours of training.

        All are decoded once.

        Args:
            metrics: names of them.
            skip: leave damaged pictures out.

        Returns:
            the sets without damaged pictures, and what is wrong with those.

        Raises:
            ParameterError: a set is empty, or a metric is unknown or lacks what it needs.
            ImageError: a picture is damaged, and is not to be left out.
            MissingWeightsError: an extractor's weights are not there.
        """
        must_be_known(metrics)
        roles = {"fake", "real", "inputs"} | ({"truth"} if self.truth is not None else set())
        must_have(metrics, roles)
        must_have_weights(metrics)
        bad: dict[Picture, str] = {}
        sizes: dict[Picture, tuple[int, int]] = {}
        for file in dict.fromkeys((*self.inputs, *self.real, *(self.truth or ()))):
            try:
                height, width, _ = self._read(file, self.channels).shape
                sizes[file] = height, width
            except ImageError as error:
                if not skip:
                    raise
                bad[file] = str(error)
        truth: Sequence[Picture | None] = self.truth or [None] * len(self.inputs)
        kept = [
            (file, true) for file, true in zip(self.inputs, truth, strict=True)
            if file not in bad and true not in bad
        ]  # fmt: skip
        paired_with = tuple(true for _, true in kept if true is not None)
        sound = replace(
            self,
            inputs=tuple(file for file, _ in kept),
            real=tuple(file for file in self.real if file not in bad),
            truth=None if self.truth is None else paired_with,
        )
        for name, files in (("to translate", sound.inputs), ("of the target domain", sound.real)):
            if not files:
                raise ParameterError(f"no test image {name} can be read")
        own = {str(file): sizes[file] for file in sound.inputs}
        for name in metrics:
            must_suffice(name, own, len(sound.real))
        return sound, list(bad.values())

    def _read(self, file: Picture, channels: int) -> np.ndarray:
        picture = read_picture(file, channels)
        return picture if self.transform is None else self.transform.for_test(picture)


def find_sets(
    folders: tuple[Path, Path], *, real: Path | None = None, transform: Transform | None = None
) -> Sets:
    """The test pictures of two folders: of the domain that is translated, and of its target.

    Where every one of the first has a picture of its name in the second, that is its truth.

    Args:
        folders: of the source's and the target's test pictures.
        real: a folder of the target's pictures, in place of the second one.
        transform: see `Sets`.

    Raises:
        ParameterError: a folder is empty.
        ImageError: a folder is missing.
    """
    own, other = folders
    looked_in = (own, real or other)
    found = []
    for folder in looked_in:
        files = list_images(folder)
        if not files:
            raise ParameterError(f"the folder {folder} holds no images")
        found.append(tuple(files))
    inputs, target = found
    truth = paired(inputs, own, other)
    return Sets(inputs, target, None if truth is None else tuple(truth), looked_in, transform)


def sets_in(
    root: Path, direction: str, *, real: str = "test", transform: Transform | None = None
) -> Sets:
    """The test pictures of a folder with `testA` and `testB`, as `find_sets` has them.

    Args:
        root: the folder.
        direction: `x2y` or `y2x`.
        real: `test` or `train`: which pictures of the target domain.
        transform: see `Sets`.

    Raises:
        ParameterError: a folder is empty.
        ImageError: a folder is missing.
    """
    own, other = ("A", "B") if direction == "x2y" else ("B", "A")
    return find_sets(
        (root / f"test{own}", root / f"test{other}"), real=root / f"{real}{other}",
        transform=transform,
    )  # fmt: skip


def evaluate_model(
    model: StrPath,
    data: StrPath | Sets,
    *,
    direction: str = "x2y",
    metrics: Sequence[str] | None = None,
    real: str = "test",
    device: str = "cpu",
    transform: Transform | None = None,
    inception_weights: StrPath | None = None,
    lpips_backbone: StrPath | None = None,
    extractor: StrPath | None = None,
    by_reference: bool = False,
    kept: Kept | None = None,
) -> list[Result]:
    """Translate all test images of the source domain and measure them against the target's.

    Where every one of them has a picture of its name among the target's test images, that is its
    truth. Pictures have as many channels as the model's; they are read as 8 bits and compared as
    they look, or, of other channels than people see, by `psnr` and `ssim` alone.

    Args:
        model: a checkpoint with `G_A.*` or `G_B.*`.
        data: a folder with `testA` and `testB`, and `trainA` or `trainB` for `real="train"`; or
            sets of files, of which `real` and `transform` are known then.
        direction: `x2y` or `y2x`.
        metrics: None for those that need no weights but a package's, and no truth if there is none.
        real: `test` or `train`: which pictures of the target domain.
        device: where the model translates, and extractors compute.
        transform: by whose test part all pictures come to size first; None takes them as they are.
        inception_weights: see `metrics.evaluate`.
        lpips_backbone: likewise.
        extractor: likewise.
        by_reference: of a model whose pictures may look like others, each like one of the target
            domain, drawn at random; as those do that know no other way.
        kept: see `metrics.evaluate`.

    Raises:
        ParameterError: a folder is empty, or a metric is unknown or lacks what it needs.
        ImageError: a folder is missing, or a picture damaged.
    """
    must_be_known(metrics or (), None if extractor is None else Path(extractor))
    if isinstance(data, Sets):
        sets = data
    else:
        sets = sets_in(Path(data), direction, real=real, transform=transform)
    channels = channels_of(model, direction)
    chosen = _chosen(metrics, extractor, inputs=True, truth=sets.truth is not None)
    if metrics is None and channels not in CHANNELS:
        chosen = [name for name in chosen if name in ANY_CHANNELS] or chosen
    must_be_looked_at(chosen, channels)
    inputs, there = (sets.read(files, channels) for files in (sets.inputs, sets.real))
    found = find(str(model), direction)
    if by_reference and (found.how.style is None or found.how.style.of_pictures is None):
        raise ParameterError(f"{found.name} of {model} does not look at reference pictures")
    like = there if by_reference or found.how.wants_reference else None
    fake = translate_arrays(model, inputs, direction=direction, reference=like, device=device)
    return evaluate(
        fake,
        there,
        inputs=inputs,
        truth=None if sets.truth is None else sets.read(sets.truth, channels),
        metrics=chosen,
        inception_weights=inception_weights,
        lpips_backbone=lpips_backbone,
        extractor=extractor,
        device=device,
        kept=kept,
    )


def must_have_weights(metrics: Sequence[str]) -> None:
    """Raise now that a metric's extractor is not there.

    Raises:
        MissingWeightsError: its weights are missing, or not what they must be.
        SoupError: a package cannot be imported.
    """
    must_be_importable()
    for name in dict.fromkeys(map(extractor_of, metrics)):
        if name:
            extractors.extractor(name)


def evaluate_folders(
    fake: StrPath,
    real: StrPath,
    *,
    metrics: Sequence[str] | None = None,
    inception_weights: StrPath | None = None,
    lpips_backbone: StrPath | None = None,
    extractor: StrPath | None = None,
    device: str = "cpu",
    kept: Kept | None = None,
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
        metrics=_chosen(metrics, extractor, inputs=False, truth=truth is not None),
        inception_weights=inception_weights,
        lpips_backbone=lpips_backbone,
        extractor=extractor,
        device=device,
        kept=kept,
    )


def paired(files: Sequence[Path], root: Path, other: Path) -> list[Path] | None:
    """For each file under `root` the one of the same name under `other`; None unless all have."""
    there = [other / file.relative_to(root) for file in files]
    return there if there and all(file.is_file() for file in there) else None


def _chosen(
    metrics: Sequence[str] | None, extractor: StrPath | None, *, inputs: bool, truth: bool
) -> Sequence[str]:
    if metrics is not None:
        return metrics
    without = () if inputs else ("_to_input",)
    if not truth:
        without = (*without, "_to_truth", "psnr", "ssim")
    own = own_names(None if extractor is None else Path(extractor))
    return [*(name for name in OFFLINE if not name.endswith(without)), *own]
