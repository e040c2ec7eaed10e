"""The trainer `openvino-qat`: a node of a tree that ends in a device. Importable without torch.

    finetune:
      trainer: openvino-qat
      of: cyclegan
      out: edge
      epochs: 2
      training: {data: data/apple2orange, loss: tree-paper}

The node's result is a float checkpoint in the tree's names, so that it can be merged, tuned and
quantised again. Models, quantised checkpoint, report and pictures go to `out`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from modelsoup import (
    FineTune,
    Job,
    TrainerError,
    Training,
    check_apart,
    open_checkpoint,
    options_as_json,
    record_training,
)

from .deploy import Deployable, Log, Report, deployable, files, identity, must_measure, options_for
from .place import must_be_free, must_be_ours
from .quantise import Quantisation

if TYPE_CHECKING:
    import numpy as np

    from .qat import HeldOut

RATE = 1e-6
"""A float network's rate, 2e-4, undoes in steps what calibration found; the paper does not tell
its own, and OpenVINO advises 1e-5 and less."""


_OF_THE_REPORT = ("out", "rounds", "pictures", "quality")
"""Options that decide nothing of the float checkpoint."""


@dataclass(frozen=True)
class OpenVinoOptions:
    """What a plan may say to the trainer.

    Attributes:
        of: the trainer that made the start, and whose losses are used.
        out: the folder for models, report and pictures; one of an earlier run is replaced.
        folder: what paths in `training` are relative to; a plan's own folder.
        epochs: epochs after calibration; 0 calibrates only.
        rate: the learning rate of those.
        network: which one is quantised; None is the first that the trainer deploys.
        training: the trainer's own options, as a plan gives them to it, without epochs and rate;
            what the start tells, such as widths, can be left out.
        quantisation: presets and exceptions.
        held_out: most images on which float and quantised network are compared.
        rounds: in which speed is measured; 0 leaves it out.
        pictures: write all outputs for the held-out images too, for `soup i2i evaluate`.
        quality: metrics that the trainer knows, before and after; the paper's are `fid-64` and
            `lpips_pairs`, `fd-st-alex` and `st-lpips_pairs` need no weights but a package's.
    """

    of: str
    out: Path
    folder: Path = Path()
    epochs: int = 2
    rate: float = RATE
    network: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    quantisation: Quantisation = field(default_factory=Quantisation)
    held_out: int = 64
    rounds: int = 20
    pictures: bool = False
    quality: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("held_out", 1), ("rounds", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {low}")
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"rate is {self.rate}, but must be positive")


class OpenVinoQat:
    """Quantises a network of another trainer's checkpoint, and trains on with its losses."""

    name = "openvino-qat"
    options = OpenVinoOptions
    version = "3"

    def groups(self, options: OpenVinoOptions) -> dict[str, Sequence[str]]:
        """The layer groups of the trainer whose networks they are."""
        trainer, own = self._of(options)
        tell = getattr(trainer, "groups", None)
        return {} if tell is None else dict(tell(own))

    def identity(self, options: OpenVinoOptions) -> dict[str, Any]:
        """What decides the result; `out` too, for a result from the store would not fill it.

        Both are as a plan writes them, so that it may be moved.
        """
        trainer, own = self._of(options)
        out = Path(os.path.relpath(options.out, options.folder)).as_posix()
        values = {**options_as_json(options), "out": out, "training": identity(trainer, own)}
        del values["folder"]
        return values

    def files(self, options: OpenVinoOptions) -> list[Path]:
        """What the training and the choice among its candidates depend on."""
        return files(*self._of(options))

    def notices(self, options: OpenVinoOptions) -> list[str]:
        """None; a plan whose `out` is somebody's folder is refused before anything is computed.

        Raises:
            OutputError: it is.
        """
        must_be_ours(options.out)
        return []

    def outputs(self, options: OpenVinoOptions) -> list[Path]:
        """The folder that is replaced: nothing else of a plan may be there."""
        return [options.out]

    def train(self, job: Job) -> None:
        """Calibrate, train, export and report; or go on from what a crash left."""
        options: OpenVinoOptions = job.options
        if job.start is None:
            raise TrainerError(
                "openvino-qat quantises a checkpoint: a leaf that is trained from nothing has none"
            )
        told = quantise_to(
            options, job.start, options.out, seed=job.seed, frozen=job.frozen, work=job.work,
            report=job.report, log=job.log,
        )  # fmt: skip
        from .deliver import FLOAT

        job.report(1.0, summary(told))
        job.note({name: told[name] for name in ("origin", "quality", "versions", "machine")})
        shutil.copyfile(options.out / FLOAT, job.output)

    def _of(self, options: OpenVinoOptions) -> tuple[Deployable, Any]:
        trainer = deployable(options.of)
        own = options_for(
            trainer,
            None,
            options.training,
            epochs=options.epochs,
            rate=options.rate,
            folder=options.folder,
        )
        return trainer, own


def quantise_to(
    options: OpenVinoOptions, start: Path, out: Path, *, seed: int, frozen: Sequence[str],
    work: Path, report: Report, log: Log, force: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Calibrate, train, keep the best, export, measure and write `out`: the report.

    Args:
        options: all but `out`, which counts as given.
        start: the float checkpoint.
        out: the folder; one of an earlier run is replaced when the new one is whole.
        seed: of the training.
        frozen: tensors that keep every bit.
        work: a folder that survives a crash.
        report: is told progress and figures.
        log: is told lines.
        force: replace the folder of an earlier run, also one that ended meanwhile.

    Raises:
        OutputError: `out` may not be replaced.
        VersionError: NNCF or OpenVINO is missing or of another version.
        SoupError: the start, the data or the options do not fit.
    """
    from .versions import need

    must_be_free(out, force=force)
    check_apart(out, [start])
    need("torch", "nncf", "openvino")
    trainer = deployable(options.of)
    must_measure(trainer, options.quality)
    own = options_for(
        trainer,
        start,
        options.training,
        epochs=options.epochs,
        rate=options.rate,
        folder=options.folder,
    )
    told = {n: v for n, v in options_as_json(options).items() if n not in _OF_THE_REPORT}
    step = FineTune(Training(OpenVinoQat.name, told))
    lineage = record_training(step, open_checkpoint(start), seed=seed)
    known = trainer.options_of(start)
    log(f"{start.name} decides: " + ", ".join(f"{name} {value}" for name, value in known.items()))
    from .deliver import deliver
    from .qat import quantisation_aware

    quality: dict[str, dict[str, float]] = {name: {} for name in options.quality}

    def judge(which: str, network: str, held: HeldOut, pictures: Sequence[np.ndarray]) -> None:
        if quality:
            values = cast(Any, trainer).quality(
                own, network, pictures, options.quality, part=held.part, first=held.first
            )
            for name, value in values.items():
                quality[name][which] = value

    outcome = quantisation_aware(
        trainer, own, start, options.quantisation, epochs=options.epochs, network=options.network,
        held_out=options.held_out, seed=seed, frozen=frozen, work=work, lineage=lineage,
        report=report, log=log, see=lambda *seen: judge("float", *seen),
    )  # fmt: skip
    for which, epoch in (("calibrated", 0), ("kept", outcome.kept.epoch)):
        judge(which, outcome.network, outcome.held_out, outcome.pictures[epoch])
    return deliver(
        outcome, out, trainer=trainer, options=options_as_json(own), how=options.quantisation,
        start=start, rounds=options.rounds, pictures=options.pictures, quality=quality,
        force=force, log=log,
    )  # fmt: skip


def summary(told: Mapping[str, Any]) -> dict[str, float]:
    """A report's figures for a node's record."""
    candidates = {one["epoch"]: one for one in told["candidates"]}
    kept = candidates[told["kept"]]
    found = {
        "psnr": kept["psnr"],
        "psnr_calibrated": candidates[0]["psnr"],
        "kept_epoch": float(told["kept"]),
        "size_ratio": told["bytes"]["int8.xml"] / told["bytes"]["fp32.xml"],
    }
    if told["speed"]:
        models = told["speed"]["models"]
        for name, other in (("faster_than_torch", "torch"), ("faster_than_float", "fp32.xml")):
            found[name] = models[other]["latency"] / models["int8.xml"]["latency"]
    return found
