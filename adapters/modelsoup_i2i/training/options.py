"""Options that trainers share: a trainer's own inherit those that it has. Without torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from modelsoup import ParameterError, nearest

from ..measuring.metric_names import finds_collapse, must_be_known, must_be_looked_at
from ..pictures.augmentation import POLICY
from ..pictures.augmentation import must_be_known as must_be_augmentations
from ..pictures.transforms import Transform
from .data import Cropped, Data, LabelledImages, PairedImages, Pixels, TwoDomains
from .ranges import FREE, Count, Number, Options, Rate

if TYPE_CHECKING:
    from ..measuring.class_evaluation import ClassFiles


@dataclass(frozen=True)
class Steps(Options):
    """How long is trained, how fast, and on how much at once.

    Attributes:
        batch: images of each kind in a pass.
        accumulate: passes whose gradients make one step.
        lr: the learning rate.
        epochs: epochs, as long as the largest set of images, or as those together of which one
            picture is drawn, at this rate.
        decay_epochs: further ones, in which it falls to nearly 0.
        decay: how: in a line, or as half a period of the cosine.
        steps: how many steps are made, at this rate, in place of epochs.
        decay_steps: further ones, in which it falls likewise.
        halve_every: steps after which the rate is halved, each time; None for never.
        repair: batches that go through all losses before the first step, and move nothing but the
            statistics of norms and singular vectors: those of a merge are no model's.
        init: the seed of what the start lacks: one for all leaves, or they do not average.
        init_from: networks that begin with those of another checkpoint, whatever the start has:
            `G: file`, or `E: file:D`, which gives E the weights of the file's D.
    """

    batch: Count = 1
    accumulate: Count = 1
    lr: Rate = 2e-4
    epochs: Number = 50
    decay_epochs: Number = 0
    decay: Literal["linear", "cosine"] = "linear"
    steps: Count | None = None
    decay_steps: Number = 0
    halve_every: Count | None = None
    repair: Number = 0
    init: Number = 0
    # Files decide by their content, wherever they lie.
    init_from: Annotated[dict[str, Path], FREE] = field(default_factory=dict)

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.epochs + self.decay_epochs < 1:
            raise ValueError("epochs and decay_epochs are both 0: there is nothing to train")
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        if usual["steps"] == self.steps is not None and self.epochs != usual["epochs"]:
            instead = " and decay_steps: 0" if self.decay_steps else ""
            raise ValueError(
                f"epochs is {self.epochs}, but steps, {self.steps}, go before it: with steps: null"
                f"{instead} they do not"
            )
        if self.steps is not None and self.decay_epochs not in (0, usual["decay_epochs"]):
            raise ValueError(
                "steps take the place of epochs: beside them decay_epochs is 0, and decay_steps "
                "may follow"
            )
        if self.steps is None and self.decay_steps:
            raise ValueError(
                "decay_steps follow steps: beside epochs it is 0, and decay_epochs may follow"
            )

    def decisive(self) -> dict[str, Any]:
        """See `Options`; what is as it was before there were such options is left out."""
        told = super().decisive()
        for name in ("steps",) if self.steps is None else ("epochs", "decay_epochs"):
            del told[name]
        if not self.repair:
            del told["repair"]
        if not (self.decay_epochs or self.decay_steps) or self.decay == "linear":
            del told["decay"]
        if not self.decay_steps:
            del told["decay_steps"]
        if self.halve_every is None:
            del told["halve_every"]
        return told

    def pace(self, epoch: int, step: int = 0) -> float:
        """The share of its learning rate that a player has in a step of an epoch, both from 0.

        After the last one it stays.
        """
        place, steady, falling = epoch, self.epochs, self.decay_epochs
        if self.steps is not None:
            place, steady, falling = step, self.steps, self.decay_steps
        share = min(max(0, place + 1 - steady), falling) / (falling + 1)
        own = 1 - share if self.decay == "linear" else (1 + math.cos(math.pi * share)) / 2
        return own if self.halve_every is None else own * 0.5 ** (step // self.halve_every)


@dataclass(frozen=True)
class Augmented(Options):
    """What a discriminator's images go through: see `modelsoup_i2i.pictures.augmentation`.

    Attributes:
        augment: DiffAugment's `color`, `translation`, `cutout`, in their order; none by default.
        ada: the share of real pictures, 0.6 in ADA's paper, by which the discriminator's verdicts
            on them may be positive rather than negative: each change is made with a probability,
            0 at first, that rises where it is more, and falls where it is less. None: always.
        ada_every: steps after which the probability is moved.
        ada_images: real pictures after which it could have come from 0 to 1.
    """

    augment: list[str] = field(default_factory=list)
    ada: Annotated[float, Gt(0), Lt(1)] | None = None
    ada_every: Count = 4
    ada_images: Count = 500_000

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        try:
            must_be_augmentations(self.augment, POLICY)
        except ParameterError as error:
            raise ValueError(f"augment: {error}") from None
        if self.ada is not None and not self.augment:
            raise ValueError(
                "ada says how often augmentations are made, but augment names none (it has color, "
                "translation and cutout)"
            )

    def decisive(self) -> dict[str, Any]:
        """See `Options`; what is as it was before there was ADA is left out."""
        told = super().decisive()
        if self.ada is None:
            for name in ("ada", "ada_every", "ada_images"):
                del told[name]
        return told


@dataclass(frozen=True)
class Machine(Options):
    """Where and in which precision is trained.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        processes: how many train together, a GPU each; their gradients are averaged.
        precision: 32, or `bf16` for autocast.
        channels_last: the memory layout.
        compile: let `torch.compile` make networks, one by one, but for losses that take gradients
            of gradients; what it has compiled stays in the user's cache.
        compile_seconds: how long the compiler is waited for; what is not done then goes without.
        graphs: replay steps as CUDA graphs on a GPU, where they can be.
    """

    device: Annotated[str, FREE] = "auto"
    processes: Count = 1
    precision: Literal[32, "bf16"] = 32
    channels_last: Annotated[bool, FREE] = False
    compile: Annotated[bool, FREE] = False
    compile_seconds: Annotated[Count, FREE] = 120
    graphs: Annotated[bool, FREE] = True

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        kind, _, number = self.device.partition(":")
        known = kind in ("auto", "cpu", "cuda")
        if not known or (":" in self.device and (kind != "cuda" or not number.isdigit())):
            raise ValueError(f"device is {self.device!r}, but must be auto, cpu, cuda or cuda:N")
        if self.processes > 1 and number:
            raise ValueError(f"device {self.device} is one GPU, but there are to be processes")


@dataclass(frozen=True)
class Telling(Options):
    """What is kept and told of a training.

    Attributes:
        checkpoint_every: steps between states that a crash leaves; 0 is an epoch.
        sheet_every: steps between pages of samples; 0 for none.
        tensorboard: write events.
        samples: the folder in which pages and events stay, in one of the node's key; None is the
            node's own beside the plan's result.
        log_every: steps between rows of `losses.csv`, each the mean of those steps.
        evaluate: metrics of the first translator on the test images, for the node's record.
        evaluate_every: steps between evaluations while it trains, rows of `metrics.csv`; 0 for
            none. They change nothing of the training.
        evaluate_n: most test images of a domain that those look at.
        keep: the result: `last`, the weights after the last step; or `{best: METRIC}`, those of the
            evaluation that was best in a metric of `evaluate`; the last ones stay beside the
            samples.
        stop_on_collapse: evaluations in a row that find a collapse, after which the training ends;
            0 for never.
    """

    checkpoint_every: Annotated[Number, FREE] = 0
    sheet_every: Annotated[Number, FREE] = 1000
    tensorboard: Annotated[bool, FREE] = False
    samples: Annotated[Path | None, FREE] = None
    log_every: Annotated[Count, FREE] = 100
    evaluate: Annotated[list[str], FREE] = field(default_factory=list)
    evaluate_every: Annotated[Number, FREE] = 0
    evaluate_n: Annotated[int, Ge(2), FREE] = 100
    keep: Literal["last"] | dict[Literal["best"], str] = "last"
    stop_on_collapse: Number = 0

    @property
    def best(self) -> str | None:
        """The metric by which the result is chosen, if it is."""
        return None if isinstance(self.keep, str) else self.keep.get("best")

    @property
    def judged(self) -> bool:
        """Whether evaluations while it trains decide the result, and so what they look at."""
        return self.best is not None or self.stop_on_collapse > 0

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        self.must_know_metrics()
        if not self.keep:
            raise ValueError("keep is {}, but must be last, or {best: METRIC}")
        if self.evaluate_every and not self.evaluate:
            raise ValueError("evaluate_every needs metrics: evaluate, a list of their names")
        if self.best is not None and (self.best not in self.evaluate or not self.evaluate_every):
            said = f"evaluate has {', '.join(self.evaluate) or 'none'}"
            near = nearest(self.best, self.evaluate)
            raise ValueError(
                f"keep wants the best {self.best}, which is not evaluated while it trains{near} "
                f"({said}; evaluate_every is {self.evaluate_every})"
            )
        if self.stop_on_collapse and not (self.evaluate_every and finds_collapse(self.evaluate)):
            said = f"evaluate has {', '.join(self.evaluate) or 'none'}"
            raise ValueError(
                f"stop_on_collapse is {self.stop_on_collapse}, but a collapse is looked for in "
                f"evaluations while it trains, through the features of a distance of sets, such as "
                f"fd-st-alex ({said}; evaluate_every is {self.evaluate_every})"
            )

    def measured_with(self) -> list[Path]:
        """Files that an evaluation depends on, beside the pictures."""
        return []

    def must_know_metrics(self) -> None:
        """Raise a ParameterError for a name in `evaluate` that is no metric of such a trainer."""
        must_be_known(self.evaluate)

    def decisive(self) -> dict[str, Any]:
        """See `Options`; what is evaluated decides where it chooses, or ends the training."""
        told = super().decisive()
        chosen = ["evaluate_every", "evaluate_n"] if self.judged else []
        if self.stop_on_collapse:
            chosen.append("evaluate")  # through whose features it is looked for
        else:
            del told["stop_on_collapse"]
        return told | {name: getattr(self, name) for name in chosen}

    def shown(self, work: Path | None) -> Path | None:
        """Where pages and events of the training in a work folder are to stay, if that is said."""
        return None if self.samples is None or work is None else self.samples / work.name


@dataclass(frozen=True)
class Shared(Telling, Machine, Steps, Pixels, Data):
    """Those of every trainer, beside where its pictures come from."""

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.evaluate and not self.has_tests():
            raise ValueError(f"evaluate needs test images: {self.tests_are}")
        must_be_looked_at(self.evaluate, self.channels)
        if self.samples is not None:
            self.must_be_apart("samples", self.samples)
        if not self.transform().crops and self.batch > 1:
            mode = getattr(self, "mode", None)
            raise ValueError(f"mode {mode} leaves images of many sizes, so batch must be 1")


@dataclass(frozen=True)
class UnpairedOptions(Shared, Cropped, TwoDomains):
    """Those of a trainer of two domains."""


@dataclass(frozen=True)
class PairedOptions(Shared, Cropped, PairedImages):
    """Those of a trainer of pairs."""


@dataclass(frozen=True)
class ClassOptions(Shared, LabelledImages):
    """Those of a trainer of classes, beside how its pictures come to size.

    Attributes:
        extractor: a classifier, through whose features `evaluate` has `mfd-NAME` and `mkd-NAME`,
            NAME the file's.
        classifier: another one, for `rc`.
    """

    extractor: Annotated[Path | None, FREE] = None
    classifier: Annotated[Path | None, FREE] = None

    def must_know_metrics(self) -> None:
        """See `Telling`."""
        must_be_known(self.evaluate, self.extractor, by_class=True)
        if "rc" in self.evaluate and self.classifier is None:
            raise ValueError("evaluate has rc, which needs a classifier: the file of one")

    def measured_with(self) -> list[Path]:
        """See `Telling`."""
        return [file for file in (self.extractor, self.classifier) if file is not None]

    def test_sets(self, transform: Transform) -> ClassFiles:
        """See `Data`."""
        return replace(
            super().test_sets(transform), channels=self.channels, extractor=self.extractor,
            classifier=self.classifier,
        )  # fmt: skip

    def decisive(self) -> dict[str, Any]:
        """See `Options`; how much of `test` is used decides nothing, but for which one is best."""
        told = super().decisive()
        if self._tests is not None and not self.judged:
            del told["test_per_class"]
        return told


@dataclass(frozen=True)
class LabelledOptions(ClassOptions, Cropped):
    """The same, with pictures that are resized and cropped."""


@dataclass(frozen=True)
class SquareOptions(ClassOptions):
    """The same, with the middle of each picture, of which one makes another class's.

    Attributes:
        size: pixels of a side.
    """

    size: Annotated[int, Ge(8)] = 128

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.class_count == 1 and not self.has_attributes:
            raise ValueError("one class: there is none to translate into from another one")

    def transform(self) -> Transform:
        """The largest square of a picture's middle."""
        side = (self.size, self.size)
        return Transform("centre_crop", side, side, self.flip)
