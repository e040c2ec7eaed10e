"""A classifier of pictures: what RC, FC and distances of a set's own features look through.

`C` tells classes apart; importable without torch. A small network, as small sets want one, or a
ResNet-18 (He, Zhang, Ren and Sun, CVPR 2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modelsoup import Job

from ..networks import classifiers
from ..networks.described import Network
from ..pictures.draws import Labelled
from ..pictures.images import ImageError
from ..pictures.picture import Images, labels_of
from ..training.options import LabelledOptions
from ..training.players import Player
from ..training.ranges import Count, Rate, Weight
from ..training.trainer import ImageTrainer
from ..training.turns import Batch, Turn
from ..use.translator import Translator

if TYPE_CHECKING:
    import torch

    from ..training.session import Session


@dataclass(frozen=True)
class ClassifierOptions(LabelledOptions):
    """What a plan may say to the trainer, beside what all trainers of classes share.

    Attributes:
        network: `small`: three convolutions, 64 features; or `resnet18`, 512.
        optimiser: of torch's.
        weight_decay: its own.
        momentum: of SGD.
    """

    network: Literal["small", "resnet18"] = "small"
    optimiser: Literal["Adam", "AdamW", "SGD"] = "Adam"
    weight_decay: Weight = 0.0
    momentum: Weight = 0.9
    batch: Count = 128
    lr: Rate = 2e-3

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.evaluate:
            raise ValueError("evaluate measures translators; a classifier is measured on test")
        least, crop = classifiers.LEAST[self.network], min(self.transform().crop)
        if crop < least:
            raise ValueError(
                f"crop_size is {crop}, but the classifier {self.network} needs at least {least}"
            )
        if self.batch < 2:
            raise ValueError("batch is 1, but batch norm needs two pictures")


class Classifier(ImageTrainer):
    """Trains one network on pictures of classes."""

    name, options = "classifier", ClassifierOptions

    def networks(self, o: ClassifierOptions) -> dict[str, Network]:
        """See `Description`, as all that follows."""
        return {"C": classifiers.classifier(o.network, o.class_count, o.channels)}

    def translators(self, o: ClassifierOptions) -> dict[str, Translator]:
        """None: it makes no pictures."""
        return {}

    def players(self, o: ClassifierOptions) -> dict[str, Player]:
        """The one."""
        own = {"momentum": o.momentum} if o.optimiser == "SGD" else {}
        settings = {"weight_decay": o.weight_decay, **own}
        return {"C": Player(("C",), o.lr, o.optimiser, settings)}

    def draws(self, o: ClassifierOptions) -> tuple[Labelled, ...]:
        """`x`, and `c`, its class."""
        return (Labelled(),)

    def turns(self, o: ClassifierOptions, step: int) -> tuple[Turn, ...]:
        """One."""
        return (Turn("classify", ("C",), (self.classify,)),)

    def weights(self, o: ClassifierOptions, images: Images) -> dict[str, float]:
        """The share of training pictures that it knows is told, and decides nothing."""
        return {"accuracy": 0.0}

    def classify(self, s: Session, b: Batch) -> dict[str, torch.Tensor]:
        """Cross entropy."""
        from torch.nn.functional import cross_entropy

        logits = s["C"](b.x).float()
        right = (logits.detach().argmax(dim=1) == b.c).float().mean()
        return {"cross_entropy": cross_entropy(logits, b.c), "accuracy": right}

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Which network, how many classes it tells apart, and the channels of what it sees."""
        kind, found = classifiers.classifier_in(shapes)
        return {"network": kind, **found.sizes}

    def train(self, job: Job) -> None:
        """See `ImageTrainer`; and which share of the test pictures it knows, if there are any."""
        tests = job.options.has_tests()
        for _ in self._pictures(job.options, "data", "test") if tests else ():
            pass  # a damaged one is told before the training, not after it
        super().train(job)
        if not tests:
            return
        from ..measuring.extractors import classifier, predicted

        try:
            seen = [own for _, own in self._pictures(job.options, "data", "test")]
        except ImageError as error:
            job.log(f"not evaluated: {error}")
            job.report(1.0, {"not_evaluated": 1.0})
            return
        files, pictures = zip(*seen, strict=True)
        right = predicted(classifier(job.output), pictures) == labels_of(files)
        job.report(1.0, {"test_accuracy": float(right.mean())})
