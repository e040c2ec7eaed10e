"""The pretrained networks that metrics look through, and where their weights are.

| name | network | weights | licence |
|---|---|---|---|
| `inception-<d>` | the FID Inception of 2015-12-05, d of 64, 192, 768, 2048 | a file or torch's cache | Apache-2.0 |
| `lpips-alex` | AlexNet under LPIPS' heads v0.1 | a file or torch's cache | BSD |
| `st-alex` | shift-tolerant AlexNet and heads, ST-LPIPS v0.0 | in PyPI's stlpips-pytorch | BSD-2 |
| a file's name | a classifier that `soup train classifier` made | that file | its owner's |

Nothing is downloaded. A file of canonical weights must have the hash that its name promises. A
network that is not the canonical one never lends its values a canonical name.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from modelsoup import (
    MismatchError,
    SoupError,
    get_trainer,
    how_to_install,
    open_checkpoint,
)

from ..networks.classifiers import classifier_in
from ..networks.devices import chosen_device
from ..pictures.images import as_rgb, resized, with_channels
from ..use.classes import classes_in
from ..use.generators import load_network

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
ALEXNET = "alexnet-owt-7be5be79.pth"
ST_PACKAGE = "stlpips-pytorch"
ST_FILE = "alex_shift_tolerant.pth"
ST_SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
_FIT = f"is it installed: {how_to_install('pretrained')}, and does torchvision fit torch?"


class MissingWeightsError(SoupError):
    """A metric's pretrained weights are not there, or not what they must be."""


@dataclass(frozen=True)
class Extractor:
    """A network with its provenance, on the CPU until its `network` is moved.

    `features` maps uint8 N × 3 × H × W to float N × dimension; `distance` maps two float batches in
    [−1, 1] to N distances. A metric uses the one or the other. Where the distance is one of
    `activations` (a list of tensors, N × …) by `compare`, those of a picture can be used again.
    `logits` maps as `features` does, to N × classes, where it is a classifier; `classes` are their
    names, where it says them.
    """

    name: str
    sha256: str
    dimension: int
    resize: str
    versions: dict[str, str]
    network: nn.Module
    features: Any = None
    distance: Any = None
    activations: Any = None
    compare: Any = None
    logits: Any = None
    classes: tuple[str, ...] = ()


def extractor(
    name: str, *, inception_weights: str | os.PathLike[str] | None = None,
    lpips_backbone: str | os.PathLike[str] | None = None,
    own: str | os.PathLike[str] | None = None,
) -> Extractor:  # fmt: skip
    """One by its name, with its weights; `own` is the file of a classifier, whose name it has.

    Raises:
        MissingWeightsError: they are missing, or not what they must be.
        CheckpointError: the classifier's file is missing or damaged.
        MismatchError: it holds none.
        SoupError: a package cannot be imported.
    """
    if name == "st-alex":
        return shift_tolerant()
    if name == "lpips-alex":
        return lpips_alexnet(lpips_backbone)
    if own is not None and name == Path(own).stem:
        return classifier(own)
    return inception(int(name.removeprefix("inception-")), inception_weights)


def inception(dimension: int, path: str | os.PathLike[str] | None = None) -> Extractor:
    """The FID Inception through torchmetrics, with torch-fidelity's resize (metrics.md §2).

    Raises:
        MissingWeightsError: the weights are missing or not the canonical ones.
        SoupError: torchmetrics or torch-fidelity cannot be imported.
    """
    file, digest = _canonical(INCEPTION, path, "--inception-weights")
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3(
            "inception-v3-compat", [str(dimension)], str(file), antialias=False
        )
    except (ImportError, RuntimeError) as error:
        raise SoupError(f"FID needs torchmetrics and torch-fidelity ({error}): {_FIT}") from error
    return Extractor(
        f"inception-{dimension}", digest, dimension, "299×299, bilinear as TensorFlow 1",
        _versions("torch", "torchmetrics", "torch-fidelity"), network, features=network,
    )  # fmt: skip


def lpips_alexnet(path: str | os.PathLike[str] | None = None) -> Extractor:
    """LPIPS v0.1 on AlexNet through the package lpips, whose heads are in its wheel.

    Raises:
        MissingWeightsError: the backbone is missing or not the canonical one.
        SoupError: lpips cannot be imported.
    """
    file, digest = _canonical(ALEXNET, path, "--lpips-backbone")
    try:
        import lpips
    except (ImportError, RuntimeError) as error:
        raise SoupError(f"LPIPS needs the package lpips ({error}): {_FIT}") from error
    with warnings.catch_warnings():  # it calls torchvision in an old manner
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    state = torch.load(file, map_location="cpu", weights_only=True)
    network.net.load_state_dict(
        {key: state["features." + key.split(".", 1)[1]] for key in network.net.state_dict()}
    )
    return Extractor(
        "lpips-alex", digest, 0, "none", _versions("torch", "lpips"), network,
        distance=lambda first, second: network(first, second).flatten(),
    )  # fmt: skip


def shift_tolerant(path: str | os.PathLike[str] | None = None) -> Extractor:
    """ST-LPIPS' AlexNet, read from the installed package without importing it.

    Features are the last layer's, averaged over the picture and scaled to one length: 256 of them.

    Raises:
        MissingWeightsError: the package is not installed, or its file is another one.
    """
    file = _in_package() if path is None else Path(path)
    digest = _sha256(file)
    if digest != ST_SHA256:
        raise MissingWeightsError(
            f"{file} has the SHA-256 {digest[:12]}…, where {ST_SHA256[:12]}… is expected"
        )
    network = ShiftTolerantAlexNet()
    state = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict({_renamed(name): tensor for name, tensor in state.items()})
    network.eval().requires_grad_(False)
    return Extractor(
        "st-alex", digest, 256, "none", _versions("torch", ST_PACKAGE), network,
        features=network.features, distance=network.distance,
        activations=network.activations, compare=network.compare,
    )  # fmt: skip


class ShiftTolerantAlexNet(nn.Module):
    """AlexNet whose strides are blurs (Ghildyal and Liu, ECCV 2022), with the five linear heads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.layers = nn.ModuleDict({
            "0": nn.Conv2d(3, 64, 11, padding=2), "1": Blur(64),
            "4": Blur(64), "5": nn.Conv2d(64, 192, 5, padding=2),
            "8": Blur(192), "9": nn.Conv2d(192, 384, 3, padding=1),
            "11": nn.Conv2d(384, 256, 3, padding=1), "13": nn.Conv2d(256, 256, 3, padding=1),
        })  # fmt: skip
        self.heads = nn.ModuleList(nn.Conv2d(n, 1, 1, bias=False) for n in (64, 192, 384, 256, 256))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Activations after each of the five ReLUs, of pictures in [−1, 1]."""
        layer = self.layers
        values = (images - self.shift) / self.scale
        found = [functional.relu(layer["1"](layer["0"](values)))]
        pooled = layer["4"](functional.max_pool2d(found[-1], 3, 1))
        found.append(functional.relu(layer["5"](pooled)))
        pooled = layer["8"](functional.max_pool2d(found[-1], 3, 1))
        found.append(functional.relu(layer["9"](pooled)))
        found.append(functional.relu(layer["11"](found[-1])))
        found.append(functional.relu(layer["13"](found[-1])))
        return found

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 N × 3 × H × W to float32 N × 256, each of the length √256.

        They are averages of activations of a few hundredths; the kernel (aᵀb/d + 1)³ would be flat
        there.
        """
        last: torch.Tensor = self(images.float().div(127.5).sub(1))[-1]
        means = last.mean(dim=(2, 3))
        scaled: torch.Tensor = functional.normalize(means) * means.shape[1] ** 0.5
        return scaled

    def activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Of pictures in [−1, 1]: each layer's activations, every pixel of length 1."""
        return [_unit(values) for values in self(images)]

    def compare(self, first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
        """N distances: weighed squared differences, mean over pixels, sum (metrics.md §6)."""
        parts = [
            (a - b).square_().mean(dim=(2, 3)) @ head.weight.flatten()  # the mean commutes
            for a, b, head in zip(first, second, self.heads, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)

    def distance(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """N distances of two batches in [−1, 1]."""
        return self.compare(self.activations(first), self.activations(second))


class Blur(nn.Module):
    """A binomial 3 × 3 filter of stride 2 after two pixels of reflection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N × channels × H × W, of half the size and a little more."""
        padded = functional.pad(images, (2, 2, 2, 2), mode="reflect")
        return functional.conv2d(padded, self.filt, stride=2, groups=images.shape[1])


def classifier(path: str | os.PathLike[str]) -> Extractor:
    """A classifier in a checkpoint, seen at the size of its training where its lineage says that.

    Raises:
        CheckpointError: the file is missing or damaged, or holds NaN or infinity.
        MismatchError: it holds no classifier, or its classes have no indices.
    """
    file, opened = Path(path), open_checkpoint(path)
    try:
        _, told = classifier_in({name: info.shape for name, info in opened.tensors.items()})
    except MismatchError as error:
        raise MismatchError(f"{path}: {error}") from None
    network: Any = load_network(file, "C", told).requires_grad_(False)
    trainer: Any = get_trainer("classifier")
    sizes = _size_of(trainer.options_of(file))
    channels = int(told.sizes["channels"])

    def seen(pictures: torch.Tensor) -> torch.Tensor:
        """uint8 N × 3 × H × W as the network was trained on them."""
        rows = pictures.permute(0, 2, 3, 1).cpu().numpy()
        made = np.stack([_seen(row, sizes, channels) for row in rows])
        placed = torch.from_numpy(made).permute(0, 3, 1, 2).to(pictures.device)
        result: torch.Tensor = placed.float().div(127.5).sub(1)
        return result

    return Extractor(
        file.stem, _sha256(file), network.fc.in_features,
        "none" if sizes is None else f"{sizes[0]} × {sizes[1]}, as in its training",
        _versions("torch"), network,
        features=lambda pictures: network.features(seen(pictures)),
        logits=lambda pictures: network(seen(pictures)), classes=classes_in(file) or (),
    )  # fmt: skip


def predicted(
    classifier: Extractor, pictures: Sequence[np.ndarray], *, device: str = "cpu", batch: int = 64
) -> np.ndarray:
    """The indices of the classes that a classifier sees in pictures, uint8 of one size; int64."""
    place = chosen_device(device)
    classifier.network.to(place)
    found = []
    with torch.no_grad():
        for start in range(0, len(pictures), batch):
            some = np.stack([as_rgb(one) for one in pictures[start : start + batch]])
            images = torch.from_numpy(some).permute(0, 3, 1, 2).to(place)
            found.append(classifier.logits(images).argmax(dim=1).cpu().numpy())
    return np.concatenate(found)


def _seen(picture: np.ndarray, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    own = with_channels(picture, channels)
    return own if size is None else resized(own, size)


def _size_of(options: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size at which tests were seen in a training; None where that is each picture's own."""
    if options.get("mode", "none") != "resize_and_crop":
        return None
    size = options["crop_size"]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _unit(features: torch.Tensor) -> torch.Tensor:
    length = features.square().sum(1, keepdim=True).sqrt()
    return features / (length + 1e-10)


def _renamed(name: str) -> str:
    pieces = name.split(".")
    if pieces[0] == "scaling_layer":
        return pieces[1]
    if pieces[0] == "net":  # net.slice2.5.weight
        return ".".join(["layers", *pieces[2:]])
    return f"heads.{pieces[0].removeprefix('lin')}.weight"  # lin0.model.1.weight


def _in_package() -> Path:
    try:
        files = metadata.files(ST_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == ST_FILE:
            return Path(str(file.locate()))
    raise MissingWeightsError(
        f"the extractor st-alex needs {ST_FILE}, which the package {ST_PACKAGE} ships: "
        f"pip install --no-deps {ST_PACKAGE}"
    )


def _canonical(name: str, path: str | os.PathLike[str] | None, option: str) -> tuple[Path, str]:
    """The file and its SHA-256, which begins as the name's last part says."""
    prefix = name.removesuffix(".pth").rpartition("-")[2]
    cache = Path(torch.hub.get_dir()) / "checkpoints" / name
    file = cache if path is None else Path(path)
    if not file.is_file():
        raise MissingWeightsError(
            f"there is no {file}: put {name}, whose SHA-256 begins with {prefix}, there, or name "
            f"it with {option} of soup i2i evaluate; nothing is downloaded"
        )
    digest = _sha256(file)
    if not digest.startswith(prefix):
        raise MissingWeightsError(
            f"{file} has the SHA-256 {digest[:12]}…, where that of {name} begins with {prefix}"
        )
    return file, digest


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise MissingWeightsError(f"{file} cannot be read: {error.strerror}") from error


def _versions(*packages: str) -> dict[str, str]:
    return {package: metadata.version(package) for package in packages}
