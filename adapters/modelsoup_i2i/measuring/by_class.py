"""What is measured class by class, of a translator to classes.

Distances and accuracies alone do not tell a translation from pictures that a class and noise are
enough for: how much of the source is used stands beside them (see `collapse`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from modelsoup import ParameterError, get_trainer, nearest

from ..networks.devices import chosen_device
from ..pictures.images import as_rgb, save_png
from . import extractors
from .extractors import Extractor, predicted
from .metrics import frechet, kernel

Pictures = Sequence[np.ndarray]


@dataclass(frozen=True)
class Mean:
    """A mean over classes, unweighted.

    Attributes:
        value: the mean.
        classes: of each class its `value`, `n_fake` and `n_real`.
        note: what warns of it, or is empty.
    """

    value: float
    classes: dict[str, dict[str, float]]
    note: str = ""


def mean_frechet(fake: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray]) -> Mean:
    """The Fréchet distance of features, N × d, of each class: of mFID and its like."""
    found = _mean(lambda made, there: frechet(_tensor(made), _tensor(there)), fake, real)
    few = min(min(len(made), len(real[name])) for name, made in fake.items())
    dimension = next(iter(fake.values())).shape[1]
    if few >= dimension:
        return found
    note = (
        f"of {few} pictures of a class with {dimension} features it is biased upwards: compare it "
        f"only with values of as many pictures"
    )
    return replace(found, note=note)


def mean_kernel(
    fake: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray], seed: int = 0
) -> Mean:
    """The kernel distance of features, N × d, of each class: of mKID and its like."""
    return _mean(lambda made, there: kernel(_tensor(made), _tensor(there), seed), fake, real)


def _mean(
    distance: Callable[[np.ndarray, np.ndarray], float],
    fake: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray],
) -> Mean:  # fmt: skip
    classes = {}
    for name, made in fake.items():
        there = real[name]
        if min(len(made), len(there)) < 2:
            raise ParameterError(
                f"a distance of a class needs at least 2 outputs and 2 real pictures, but "
                f"{name!r} has {len(made)} and {len(there)}"
            )
        own = {"value": distance(made, there), "n_fake": len(made), "n_real": len(there)}
        classes[name] = own
    return Mean(float(np.mean([own["value"] for own in classes.values()])), classes)


def accuracy(
    classifier: Extractor, pictures: Mapping[str, Pictures], indices: Mapping[str, int], *,
    device: str = "cpu",
) -> Mean:  # fmt: skip
    """The percentage of pictures whose class a classifier sees, over all: RC, if they are outputs.

    Args:
        classifier: trained on real pictures, for RC; on outputs, for FC.
        pictures: by their class.
        indices: what the classifier calls the classes.
        device: where it computes.
    """
    classes, right, count = {}, 0, 0
    for name, own in pictures.items():
        seen = predicted(classifier, own, device=device) == indices[name]
        classes[name] = {
            "value": 100 * float(seen.mean()), "n_fake": len(own), "n_real": 0.0
        }  # fmt: skip
        right, count = right + int(seen.sum()), count + len(own)
    return Mean(100 * right / count, classes)


def indices_in(classifier: Extractor, names: Sequence[str]) -> dict[str, int]:
    """What a classifier calls classes: by its own names; by their order, where it has none.

    Raises:
        ParameterError: it does not know one.
    """
    if not classifier.classes:
        return {name: index for index, name in enumerate(names)}
    for name in names:
        if name not in classifier.classes:
            raise ParameterError(
                f"the classifier {classifier.name} does not know the class {name!r}"
                f"{nearest(name, classifier.classes)} (of {', '.join(classifier.classes)})"
            )
    return {name: classifier.classes.index(name) for name in names}


def trained_on(
    pictures: Mapping[str, Pictures], *, epochs: int = 10, seed: int = 0, device: str = "cpu",
    network: str = "small",
) -> Extractor:  # fmt: skip
    """A classifier that has learnt from pictures, by the trainer `classifier`; for FC.

    Args:
        pictures: by class, two or more of each; all are brought to the size of the first one.
        epochs: how often it sees them, at a rate that falls to nearly 0.
        seed: of its weights and of what is drawn.
        device: where it is trained.
        network: `small` or `resnet18`.
    """
    trainer: Any = get_trainer("classifier")
    size = next(iter(pictures.values()))[0].shape[:2]
    with TemporaryDirectory(prefix="modelsoup-") as folder:
        for index, own in enumerate(pictures.values()):
            place = Path(folder, "pictures", f"{index:06}")  # names may be no names of folders
            place.mkdir(parents=True)
            for number, picture in enumerate(own):
                save_png(as_rgb(picture), place / f"{number:06}.png")
        options = trainer.options(
            data=Path(folder, "pictures"), network=network, load_size=size, crop_size=size,
            epochs=1, decay_epochs=epochs - 1, init=seed, device=device, sheet_every=0, threads=0,
        )  # fmt: skip
        session = trainer.session(options, None, seed=seed)
        figures = session.run(lambda *_: None, lambda _: None)
        if figures["diverged"]:
            raise ParameterError("a classifier of the outputs diverged: FC is not known")
        file = Path(folder, "trained-on-outputs.safetensors")
        session.save(file)
        return replace(extractors.classifier(file), classes=tuple(pictures))


def over_noise(groups: Sequence[Pictures], perceptual: Extractor, *, device: str = "cpu") -> float:
    """How far pictures lie apart that differ by their noise alone: the mean over all pairs.

    Args:
        groups: of each input the outputs, two or more, of one size.
        perceptual: with a `distance`.
        device: where it computes.
    """
    place = chosen_device(device)
    perceptual.network.to(place)
    means = []
    with torch.no_grad():
        for group in groups:
            stacked = torch.from_numpy(np.stack([as_rgb(one) for one in group]))
            images = stacked.permute(0, 3, 1, 2).to(place).float().div(127.5).sub(1)
            pairs = zip(*combinations(range(len(group)), 2), strict=True)
            first, second = (list(side) for side in pairs)
            found = perceptual.distance(images[first], images[second])
            means.append(float(found.double().mean()))
    return float(np.mean(means))


def _tensor(values: np.ndarray) -> torch.Tensor:
    made: torch.Tensor = torch.from_numpy(values)
    return made
