"""Quantisation-aware training: quantise, train on with the trainer's own losses, keep the best.

Post-training quantisation is where it starts, and a candidate like the network after each epoch:
training on is not always better. Which one is kept is decided by held-out images: how near, in
PSNR, the quantised network's outputs are to those of the float network that it was made from.

Everything lies in a work folder, so that a killed run goes on: the quantised network as it began,
the training's own state, and of each candidate its figures and its pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from modelsoup import CheckpointError, ParameterError, TrainerError

from .deploy import (
    CLASS,
    IMAGE,
    Deployable,
    Inputs,
    Log,
    Report,
    Session,
    chosen_network,
    content,
    identity,
)
from .measure import mean_psnr, ssim
from .quantise import (
    Quantisation,
    arguments,
    carried_over,
    load_into,
    load_quantised,
    quantised,
    read_quantised,
    save_quantised,
    trained_apart,
)
from .report import as_pixels

if TYPE_CHECKING:
    import torch
    from torch import nn

BEGUN = "begun.safetensors"
CANDIDATES = "candidates.json"
TRAINING = "training"
ORIGIN = "modelsoup.origin"


@dataclass(frozen=True)
class Candidate:
    """A quantised network at some point of its training.

    Attributes:
        epoch: 0 is post-training quantisation alone.
        psnr: dB, the mean over held-out images, between its outputs and the float network's.
        ssim: the same by structural similarity; None for images that are too small for it.
    """

    epoch: int
    psnr: float
    ssim: float | None


@dataclass(frozen=True)
class HeldOut:
    """The images that candidates are compared on.

    Attributes:
        inputs: what the network is called with for each: the image, and noise or a class that it
            keeps, whoever is called.
        part: of which part of the trainer's `inputs` they are, `test` or `train`.
        first: which image of that part the first one is, from 0; the others follow it.
    """

    inputs: tuple[Inputs, ...]
    part: str
    first: int

    @property
    def images(self) -> list[torch.Tensor]:
        """As the network sees them."""
        return [own[IMAGE] for own in self.inputs]


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        network: the name of the quantised network.
        classes: names of the classes whose indices it takes, if it takes such.
        noise: names of its inputs that are noise.
        reference: the float network that it was made from, as it is used.
        multiple: of which the sides of its images must be.
        best: the kept quantised network, likewise, in eval mode on the CPU.
        quantised: its checkpoint in the work folder.
        checkpoint: the float checkpoint in the tree's names: of epoch 0 the start's values, else
            those of all networks after that epoch, the quantised one's without its quantisers.
        kept: which candidate it is.
        candidates: all of them, by epoch.
        held_out: the images that they were compared on.
        expected: the float network's outputs for them.
        pictures: outputs for them, uint8, H × W × channels, by epoch.
        figures: the last epoch's losses.
    """

    network: str
    classes: tuple[str, ...]
    noise: tuple[str, ...]
    reference: nn.Module
    multiple: int
    best: nn.Module
    quantised: Path
    checkpoint: Path
    kept: Candidate
    candidates: tuple[Candidate, ...]
    held_out: HeldOut
    expected: tuple[np.ndarray, ...]
    pictures: Mapping[int, tuple[np.ndarray, ...]]
    figures: Mapping[str, float]


def quantisation_aware(
    trainer: Deployable, options: Any, start: Path, how: Quantisation, *, epochs: int,
    network: str | None, held_out: int, seed: int, frozen: Sequence[str], work: Path,
    lineage: Mapping[str, Any], report: Report, log: Log,
    see: Callable[[str, HeldOut, Sequence[np.ndarray]], None] = lambda *_: None,
) -> Outcome:  # fmt: skip
    """Quantise a trainer's deployed network, train it for some epochs, and keep the best.

    Args:
        trainer: whose networks the start holds, and whose losses are used.
        options: its options, with the epochs and the rate.
        start: the float checkpoint.
        how: what `quantise.quantised` is told.
        epochs: 0 quantises only.
        network: which; None is the first that the trainer deploys. The others stay float.
        held_out: most images for comparing candidates.
        seed: of the training.
        frozen: tensors of the start that keep every bit.
        work: a folder that survives a crash.
        lineage: for the float checkpoint: what it was made by, and of what.
        report: is told progress and figures.
        log: is told lines.
        see: is given the network's name, the images and the float outputs for them, uint8,
            H × W × channels, before anything is quantised; what it raises ends the run while that
            costs nothing.

    Raises:
        TrainerError: the work folder belongs to another run.
        ParameterError: there are no images.
        SoupError: what the trainer or `quantise` raise.
    """
    from modelsoup_i2i.networks.spectral import folded

    training = work / TRAINING
    training.mkdir(parents=True, exist_ok=True)
    session = trainer.session(options, start, seed=seed, frozen=frozen, work=training)
    name = chosen_network(session, network)
    live = session.as_used(name)
    used = session.in_use(name)
    own = deepcopy(used.module).eval()
    reference = folded(deepcopy(own))
    multiple: int = getattr(own, "multiple", trainer.multiple)
    told = {
        "format": 3, "start": _digest(start), "network": name, "seed": seed, "epochs": epochs,
        "frozen": sorted(frozen), "held_out": held_out, "how": asdict(how),
        "training": identity(trainer, options), "images": content(trainer, options),
    }  # fmt: skip
    origin = json.loads(json.dumps(told, default=str))
    held = _held_out(trainer, session, name, held_out, how.subset_size)
    if held.part != "test":
        log(f"there are no test images: {len(held.images)} training images are held out to compare")
    expected = outputs(reference, held.inputs, multiple)
    see(name, held, [as_pixels(image) for image in expected])
    begun = work / BEGUN
    if begun.exists():
        _must_be_same(begun, origin)
        log("the quantised network is in the work folder: this run goes on")
    else:
        height, width = held.images[0].shape[-2:]
        log(f"calibrates {name} on up to {how.subset_size} images (of {height} × {width}, say)")
        called = session.names_in(name)
        ours = [called[tensor] for tensor in frozen if tensor in called]
        calibration = (whole(i, multiple) for i in trainer.inputs(session, name, "train"))
        made = quantised(reference, calibration, how, frozen=ours, say=log)
        made = carried_over(made, reference, own)
        save_quantised(made, begun, {ORIGIN: json.dumps(origin)})
    # From the file in a run that goes on and in one that does not: both do the same from here on.
    twin = load_quantised(own, begun, say=log).eval()
    bench = _Bench(work, session, twin, held.inputs, expected, multiple, lineage)
    if not bench.candidates():
        bench.add(0)
    figures: Mapping[str, float] = {}
    if epochs:
        trained = load_into(live.eval(), begun, say=log)
        if name not in {tensor.partition(".")[0] for tensor in session.names_in(name)}:
            others = [own for other, own in session.networks.items() if other != name]
            trained_apart(trained, whole(held.inputs[0], multiple), others)

        def after_epoch(epoch: int) -> None:
            twin.load_state_dict(trained.state_dict())
            found = bench.add(epoch)
            log(_line(found))

        log(_line(bench.candidates()[0]))
        figures = session.run(report, log, after_epoch)
    best = bench.best()
    path = work / f"quantised-{best.epoch}.safetensors"
    report(1.0, {"psnr": best.psnr, "kept_epoch": float(best.epoch)})
    kept = folded(load_quantised(own, path, say=log))
    classes = used.class_names if CLASS in held.inputs[0] else ()
    return Outcome(
        name, classes, used.noise, reference, multiple, kept, path,
        work / f"float-{best.epoch}.safetensors", best, bench.candidates(), held, expected,
        bench.pictures(), figures,
    )  # fmt: skip


class _Bench:
    """Where candidates are compared and kept; files first, the list that names them last."""

    def __init__(
        self, work: Path, session: Session, twin: nn.Module, inputs: Sequence[Inputs],
        expected: Sequence[np.ndarray], multiple: int, lineage: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._work, self._session, self._twin = work, session, twin
        self._inputs, self._expected = inputs, expected
        self._multiple, self._lineage = multiple, lineage

    def candidates(self) -> tuple[Candidate, ...]:
        """Those that were compared, by epoch."""
        path = self._work / CANDIDATES
        if not path.exists():
            return ()
        try:
            return tuple(Candidate(**told) for told in json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise TrainerError(f"{path} is damaged: remove the folder to begin again") from error

    def best(self) -> Candidate:
        """The one with the highest PSNR; of equals the earliest."""
        return max(self.candidates(), key=lambda one: (one.psnr, -one.epoch))

    def add(self, epoch: int) -> Candidate:
        """Compare the twin as it is now; keep its files if it is the best so far."""
        made = outputs(self._twin, self._inputs, self._multiple)
        found = Candidate(epoch, mean_psnr(made, self._expected), ssim(made, self._expected))
        pictures = self._work / f"pictures-{epoch}.npz"
        with pictures.open("wb") as file:
            np.savez_compressed(file, *map(as_pixels, made))
        # A run that goes on may add an epoch for a second time.
        others = [one for one in self.candidates() if one.epoch < epoch]
        if all(found.psnr > one.psnr for one in others):
            origin = {ORIGIN: json.dumps({"epoch": epoch, "psnr": found.psnr})}
            save_quantised(self._twin, self._work / f"quantised-{epoch}.safetensors", origin)
            self._session.save(self._work / f"float-{epoch}.safetensors", lineage=self._lineage)
        _write(self._work / CANDIDATES, json.dumps([asdict(one) for one in [*others, found]]))
        kept = self.best().epoch
        for one in self.candidates():
            if one.epoch != kept:
                for kind in ("quantised", "float"):
                    (self._work / f"{kind}-{one.epoch}.safetensors").unlink(missing_ok=True)
        return found

    def pictures(self) -> dict[int, tuple[np.ndarray, ...]]:
        """Outputs for the held-out images, uint8, H × W × channels, by epoch."""
        found = {}
        for one in self.candidates():
            with np.load(self._work / f"pictures-{one.epoch}.npz") as file:
                found[one.epoch] = tuple(file[name] for name in file.files)
        return found


def _held_out(
    trainer: Deployable, session: Session, name: str, most: int, calibrated: int
) -> HeldOut:
    """Test images; without any, training images beyond those of the calibration, or the last."""
    inputs = tuple(islice(trainer.inputs(session, name, "test"), most))
    if inputs:
        return HeldOut(inputs, "test", 0)
    own = trainer.inputs(session, name, "train")
    seen = list(islice(own, calibrated))
    inputs = tuple(islice(own, most))
    if inputs:
        return HeldOut(inputs, "train", len(seen))
    if not seen:
        raise ParameterError(f"there is no image for {name}, to calibrate or to compare")
    inputs = tuple(seen[-most:])
    return HeldOut(inputs, "train", len(seen) - len(inputs))


def whole(inputs: Inputs, multiple: int) -> Inputs:
    """With the image continued to multiples of some number; what is beside it has no size."""
    from modelsoup_i2i.networks.layers import padded

    return {**inputs, IMAGE: padded(inputs[IMAGE], multiple)}


def outputs(network: nn.Module, inputs: Sequence[Inputs], multiple: int) -> tuple[np.ndarray, ...]:
    """What a network makes of images, each of the size of its image."""
    import torch

    from .versions import silence

    made = []
    with torch.no_grad(), silence():
        for own in inputs:
            height, width = own[IMAGE].shape[-2:]
            made.append(network(*arguments(whole(own, multiple)))[..., :height, :width])
    return tuple(image.float().numpy() for image in made)


def _digest(start: Path) -> str:
    from .export import digest_of

    return digest_of(start)


def _must_be_same(begun: Path, origin: Mapping[str, Any]) -> None:
    try:
        kept = json.loads(read_quantised(begun)[1][ORIGIN])
    except (CheckpointError, KeyError, ValueError) as error:
        raise TrainerError(f"{begun} is damaged: remove its folder to begin again") from error
    before, now = _flat(kept), _flat(origin)
    changed = [
        f"{key} {before.get(key)!r} → {now.get(key)!r}"
        for key in sorted({*before, *now}) if before.get(key) != now.get(key)
    ]  # fmt: skip
    if changed:
        raise TrainerError(
            f"{begun.parent} is of another run, which cannot be gone on with "
            f"({', '.join(changed)}): remove it to begin again"
        )


def _flat(told: Mapping[str, Any]) -> dict[str, Any]:
    """With what is nested spelt out, so that one difference in it can be told alone."""
    found: dict[str, Any] = {}
    for key, value in told.items():
        inner = value if isinstance(value, dict) else None
        found |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return found


def _line(one: Candidate) -> str:
    alike = "" if one.ssim is None else f", SSIM {one.ssim:.4f}"
    when = "after calibration" if one.epoch == 0 else f"after epoch {one.epoch}"
    return f"INT8 {when}: PSNR {one.psnr:.2f} dB{alike} to the float network"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{uuid4().hex}.tmp")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
