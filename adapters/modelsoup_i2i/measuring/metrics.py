"""How good translations are: distances of sets and of pictures, each with its provenance.

| names | what | needs |
|---|---|---|
| `fid-64` `fid-192` `fid-768` `fid-2048`, `kid` | on the FID Inception | real |
| `fd-st-alex`, `kd-st-alex` | Fréchet and kernel distance on ST-LPIPS' AlexNet | real |
| `lpips_pairs`, `st-lpips_pairs` | mean distance of random pairs of translations | |
| `lpips_to_real`, `st-lpips_to_real` | of translations and random real pictures | real |
| `lpips_to_input`, `st-lpips_to_input` | of each translation and its own input | inputs |
| `lpips_to_truth`, `st-lpips_to_truth`, `psnr`, `ssim` | of each and its truth | truth |

Definitions and choices are those of docs/i2i_metrics.md. The Fréchet and kernel distances, PSNR and
SSIM are torchmetrics' own.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from modelsoup import ParameterError, SoupError, how_to_install

from ..networks.devices import chosen_device
from ..pictures.arrays import in_8_bits
from ..pictures.images import CHANNELS, as_rgb, list_images, read_image, resized
from . import extractors
from .extractors import Extractor
from .kept import Kept
from .metric_names import (
    extractor_of,
    must_be_known,
    must_be_looked_at,
    must_have,
    must_suffice,
    needs,
    reading_of,
)

PAIRS = 1000
"""How many random pairs `_pairs` and `_to_real` average over."""
KEPT = 1 << 30
"""Bytes of activations that are kept, so that a picture of several pairs is seen once."""
Pictures: TypeAlias = str | os.PathLike[str] | Sequence[np.ndarray] | torch.Tensor


@dataclass(frozen=True)
class Result:
    """A value and what it was computed with; `note` warns, or is empty.

    Of a mean over classes, `classes` has each one's `value`, `n_fake` and `n_real`.
    """

    name: str
    value: float
    extractor: str
    sha256: str
    dimension: int
    resize: str
    n_fake: int
    n_real: int
    versions: dict[str, str]
    note: str = ""
    classes: dict[str, dict[str, float]] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data; a value that JSON does not have, such as the PSNR of one picture, is text."""
        plain = asdict(self)
        if self.classes is None:
            del plain["classes"]
        return plain if math.isfinite(self.value) else {**plain, "value": str(self.value)}


def evaluate(
    fake: Pictures,
    real: Pictures | None = None,
    *,
    inputs: Pictures | None = None,
    truth: Pictures | None = None,
    metrics: Sequence[str] = ("fd-st-alex",),
    inception_weights: str | os.PathLike[str] | None = None,
    lpips_backbone: str | os.PathLike[str] | None = None,
    extractor: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch: int = 16,
    device: str = "cpu",
    kept: Kept | None = None,
) -> list[Result]:
    """Measure a set of translations.

    Args:
        fake: translations: a folder, uint8 arrays height × width × 3, or a float tensor
            N × 3 × height × width in [−1, 1], which is rounded to uint8 as a saved picture is.
            Grey and opacity (1 and 4 channels) are compared as they look, over white.
        real: pictures of the target domain.
        inputs: what was translated, in the order of `fake`.
        truth: what the translations should be, in the order of `fake`.
        metrics: names of `METRICS`.
        inception_weights: a file; None looks in torch's cache.
        lpips_backbone: likewise.
        extractor: a checkpoint with a classifier `C.*`, for the distances that have its name.
        seed: of the random pairs and subsets.
        batch: pictures at a time.
        device: where extractors compute: `auto`, `cpu`, `cuda` or `cuda:N`.
        kept: where features of the real pictures are looked for, and kept.

    Raises:
        ParameterError: an unknown metric, or one that needs pictures that were not given.
        MissingWeightsError: an extractor's weights are not there.
        ImageError: a picture or folder cannot be read.
    """
    own = None if extractor is None else Path(extractor)
    must_be_known(metrics, own)
    sets = {
        role: None if given is None else _pictures(given, role)
        for role, given in (("fake", fake), ("real", real), ("inputs", inputs), ("truth", truth))
    }
    n_fake = len(sets["fake"] or [])
    for role in ("inputs", "truth"):
        there = sets[role]
        if there is not None and len(there) != n_fake:
            raise ParameterError(f"there are {n_fake} translations, but {len(there)} {role}")
    must_have(metrics, [role for role, there in sets.items() if there is not None])
    sizes = {
        f"translation {number}": picture.shape[:2]
        for number, picture in enumerate(sets["fake"] or [], 1)
    }
    must_be_looked_at(metrics, (sets["fake"] or [])[0].shape[2])
    for name in metrics:
        must_suffice(name, sizes, len(sets["real"] or []))
    given = {
        "inception_weights": inception_weights, "lpips_backbone": lpips_backbone, "own": own
    }  # fmt: skip
    measure = _Measure(sets, given, seed, batch, chosen_device(device), kept)
    with torch.no_grad():
        return [measure.of(name) for name in metrics]


def features(
    pictures: Sequence[np.ndarray], through: str | Extractor, *, device: str = "cpu",
    like: np.ndarray | None = None, kept: Kept | None = None, batch: int = 16,
) -> np.ndarray:  # fmt: skip
    """What an extractor sees in pictures, as distances of sets compare it: N × d.

    Args:
        pictures: uint8, height × width × channels; as they look is what is seen.
        through: the extractor, or its name.
        device: where it computes.
        like: to whose size all are brought; None is the first one's.
        kept: where they are looked for, and kept.
        batch: pictures at a time.

    Raises:
        MissingWeightsError: the extractor's weights are not there.
    """
    seen = extractors.extractor(through) if isinstance(through, str) else through
    place = chosen_device(device)
    seen.network.to(place)
    size = (pictures[0] if like is None else like).shape[:2]
    alike = [resized(as_rgb(picture), size, smooth=False) for picture in pictures]

    def compute() -> np.ndarray:
        found = []
        with torch.no_grad():
            for start in range(0, len(alike), batch):
                some = _stack(alike[start : start + batch]).to(place)
                found.append(seen.features(some).cpu())
        values: np.ndarray = torch.cat(found).numpy()
        return values

    return compute() if kept is None else kept.features(seen, place.type, alike, compute)


def evaluate_tensors(
    fake: torch.Tensor,
    real: torch.Tensor,
    metrics: Sequence[str],
    *,
    inputs: torch.Tensor | None = None,
    truth: torch.Tensor | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """`evaluate` on float tensors N × 3 × height × width in [−1, 1], values alone, for a record."""
    results = evaluate(fake, real, inputs=inputs, truth=truth, metrics=metrics, seed=seed)
    return {result.name: result.value for result in results}


def frechet(fake: torch.Tensor, real: torch.Tensor) -> float:
    """Fréchet distance of two sets of features, N × d (metrics.md §2), by torchmetrics."""
    metric = _torchmetrics("image.fid", "FrechetInceptionDistance")(feature=_Features(fake))
    return _distance(metric, fake, real)


def kernel(fake: torch.Tensor, real: torch.Tensor, seed: int = 0) -> float:
    """Unbiased squared MMD with the cubic kernel (metrics.md §3), by torchmetrics.

    The mean over 100 random subsets of min(1000, n_real, n_fake), drawn by `seed`; one estimate of
    all where both sets have that many. For small sets of two sizes metrics.md wants that as well,
    but torchmetrics compares sets of one size only. It may be negative.
    """
    size = min(1000, len(fake), len(real))
    made = _torchmetrics("image.kid", "KernelInceptionDistance")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = made(
            feature=_Features(fake), subset_size=size,
            subsets=1 if len(fake) == len(real) == size else 100,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _distance(metric, fake, real)


class _Features(nn.Module):
    """Hands precomputed features to torchmetrics' distances."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.num_features = features.shape[1]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class _Measure:
    """One evaluation: networks are loaded, and features computed, once."""

    def __init__(
        self,
        sets: dict[str, list[np.ndarray] | None],
        given: dict[str, Any],
        seed: int,
        batch: int,
        device: torch.device,
        kept: Kept | None,
    ) -> None:
        self.sets, self.seed, self.batch, self.device = sets, seed, batch, device
        self.real_kept = kept

        def placed(name: str) -> Extractor:
            found = extractors.extractor(name, **given)
            found.network.to(device)
            return found

        self.extractor = cache(placed)
        self.features = cache(self._features)
        self.kept: dict[tuple[str, int], list[torch.Tensor]] = {}

    def of(self, name: str) -> Result:
        through = extractor_of(name)
        if through is None:
            return self._fidelity(name)
        reading, extractor = reading_of(name), self.extractor(through)
        if reading:
            return self._perceptual(name, extractor, reading)
        return self._of_sets(name, extractor)

    def _of_sets(self, name: str, extractor: Extractor) -> Result:
        fake, real = (self.features(extractor.name, role) for role in ("fake", "real"))
        few = min(len(fake), len(real))
        if name.startswith("k"):
            return self._result(name, kernel(fake, real, self.seed), extractor)
        note = ""
        if few < extractor.dimension:
            note = (
                f"{name} of {few} pictures with {extractor.dimension} features is biased upwards: "
                f"compare it only with values of as many pictures"
            )
        return self._result(name, frechet(fake, real), extractor, note)

    def _features(self, name: str, role: str) -> torch.Tensor:
        return torch.from_numpy(
            features(
                self._all(role), self.extractor(name), device=str(self.device),
                like=self._all("fake")[0], batch=self.batch,
                kept=self.real_kept if role == "real" else None,
            )
        )  # fmt: skip

    def _perceptual(self, name: str, extractor: Extractor, reading: str) -> Result:
        fake = self._all("fake")
        random = np.random.default_rng(self.seed)
        if reading == "pairs":
            first = random.integers(0, len(fake), PAIRS)
            other = (first + random.integers(1, len(fake), PAIRS)) % len(fake)
            second = "fake"
        elif reading == "to_real":
            second = "real"
            first, other = (
                random.integers(0, len(self._all(of)), PAIRS) for of in ("fake", second)
            )
        else:
            second = {"to_input": "inputs", "to_truth": "truth"}[reading]
            first = other = np.arange(len(fake))
        total = 0.0
        for start in range(0, len(first), self.batch):
            one = [("fake", int(at)) for at in first[start : start + self.batch]]
            two = [(second, int(at)) for at in other[start : start + self.batch]]
            if extractor.compare is None:
                distances = extractor.distance(self._signed(one), self._signed(two))
            else:
                distances = extractor.compare(self._activations(one), self._activations(two))
            total += float(distances.double().sum())
        return self._result(name, total / len(first), extractor)

    def _activations(self, chosen: Sequence[tuple[str, int]]) -> list[torch.Tensor]:
        """Of some pictures; kept for their next pair while they fit into `KEPT` bytes."""
        extractor = self.extractor("st-alex")
        new = [one for one in dict.fromkeys(chosen) if one not in self.kept]
        found = dict(self.kept)
        if new:
            layers = extractor.activations(self._signed(new))
            for at, one in enumerate(new):
                found[one] = [layer[at] for layer in layers]
            size = sum(layer[0].nbytes for layer in layers)
            for one in new:
                if (len(self.kept) + 1) * size <= KEPT:
                    self.kept[one] = [layer.clone() for layer in found[one]]
        return [torch.stack(layer) for layer in zip(*(found[one] for one in chosen), strict=True)]

    def _signed(self, chosen: Sequence[tuple[str, int]]) -> torch.Tensor:
        """Pictures as float32 N × 3 × H × W in [−1, 1], on the device."""
        pictures = self._alike([self._all(role)[at] for role, at in chosen])
        return _stack(pictures).to(self.device).float().div(127.5).sub(1)

    def _fidelity(self, name: str) -> Result:
        if name == "psnr":  # the mean over pictures; infinite where they are the same
            metric = _torchmetrics("image", "PeakSignalNoiseRatio")(
                data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)
            )
        else:
            metric = _torchmetrics("image", "StructuralSimilarityIndexMeasure")(data_range=1.0)
        metric.set_dtype(torch.float64)
        for fake, truth in zip(self._all("fake"), self._all("truth"), strict=True):
            metric.update(*(_stack([x]).double() / 255 for x in (fake, self._sized(truth, fake))))
        return self._result(name, float(metric.compute()), None)

    def _result(
        self, name: str, value: float, extractor: Extractor | None, note: str = ""
    ) -> Result:
        need = needs(name)
        versions = {"torchmetrics": metadata.version("torchmetrics")}
        if extractor is not None:
            versions |= extractor.versions
        sized = {picture.shape for there in self.sets.values() for picture in there or []}
        resize = "none" if len(sized) == 1 else "to the first translation's size, antialiased"
        if extractor is not None and extractor.resize != "none":
            resize = extractor.resize if resize == "none" else f"{resize}; {extractor.resize}"
        return Result(
            name, value, "" if extractor is None else extractor.name,
            "" if extractor is None else extractor.sha256,
            0 if extractor is None else extractor.dimension, resize,
            len(self._all("fake")), 0 if need == "fake" else len(self._all(need)), versions, note,
        )  # fmt: skip

    def _all(self, role: str) -> list[np.ndarray]:
        there = self.sets[role]
        assert there is not None
        return there

    def _alike(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All at the size of the first translation: a distance of sizes is none of styles."""
        return [self._sized(picture, self._all("fake")[0]) for picture in pictures]

    def _sized(self, picture: np.ndarray, like: np.ndarray) -> np.ndarray:
        return resized(picture, like.shape[:2], smooth=False)


def _pictures(given: Pictures, role: str) -> list[np.ndarray]:
    if isinstance(given, (str, os.PathLike)):
        found = [read_image(file) for file in list_images(given)]
        what = f"the folder {given}"
    elif isinstance(given, torch.Tensor):
        from ..pictures.images import to_image

        found, what = [to_image(image) for image in given], role
    else:
        found, what = list(given), role
    if not found:
        raise ParameterError(f"{what} holds no images")
    return [as_rgb(one) if one.shape[2] in CHANNELS else in_8_bits(one) for one in found]


def _stack(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _distance(metric: Any, fake: torch.Tensor, real: torch.Tensor) -> float:
    metric.update(real, real=True)
    metric.update(fake, real=False)
    value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)


def must_be_importable() -> None:
    """Raise a SoupError where torchmetrics, which every metric wants, cannot be imported."""
    _torchmetrics("image", "PeakSignalNoiseRatio")


def _torchmetrics(module: str, name: str) -> Callable[..., Any]:
    from importlib import import_module

    try:
        found: Callable[..., Any] = getattr(import_module(f"torchmetrics.{module}"), name)
    except (ImportError, RuntimeError) as error:
        raise SoupError(
            f"torchmetrics cannot be imported ({error}): {how_to_install('i2i')}, and take "
            f"away a torchvision that does not fit torch"
        ) from error
    # Of several processes that train, one measures; torchmetrics would wait for the others.
    return partial(found, sync_on_compute=False)
