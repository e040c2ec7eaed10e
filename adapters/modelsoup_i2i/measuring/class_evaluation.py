"""A translator to classes, measured: each class by itself, and what of the source is used.

One function makes all outputs, whatever makes them: a translator, a generator that sees no picture,
the control, or what gives its inputs back, as a test has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from modelsoup import ParameterError, listed, nearest

from ..networks.devices import chosen_device
from ..pictures.folders import find_classes
from ..pictures.images import ImageError, as_rgb, resized
from ..pictures.picture import Picture, read_picture
from ..pictures.transforms import Transform
from ..use.models import AT_ONCE, Model
from . import extractors
from .by_class import (
    Mean,
    Pictures,
    accuracy,
    indices_in,
    mean_frechet,
    mean_kernel,
    over_noise,
    trained_on,
)
from .collapse import MOST, Collapse, collapse, source_rank
from .extractors import Extractor
from .kept import Kept
from .metric_names import (
    COLLAPSE,
    extractor_of,
    finds_collapse,
    is_of_sets,
    must_be_known,
    must_be_seen,
    own_names,
    through_features,
)
from .metrics import Result, features, must_be_importable

Make = Callable[[Pictures, int, Sequence[int]], Pictures]
"""`make(pictures, class, noise)`: what becomes of pictures in a class, by its index: uint8 arrays.
`noise` has a number for each; the same number is the same noise."""
AMONG, SAMPLES = 16, 10
"""Outputs among which the use of the source, and of the noise, is told; outputs of one input."""


@dataclass(frozen=True)
class ClassSets:
    """Pictures by class, uint8, height × width × channels.

    Attributes:
        inputs: what is translated; its classes need be none of the targets.
        real: test pictures of the targets.
        train: training pictures of the targets, for FC's ceiling.
    """

    inputs: Mapping[str, Pictures]
    real: Mapping[str, Pictures]
    train: Mapping[str, Pictures] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassFiles:
    """The test pictures of classes that a training is measured on, as files.

    Attributes:
        test: by class: what is translated, and, of the translator's classes, what translations are
            compared with.
        train: by class, of training, for FC's ceiling.
        folders: where the test pictures were found.
        transform: by whose test part all come to size.
        channels: of them.
        extractor: see `evaluate_classes`.
        classifier: likewise.
        sources: the classes of the test pictures that are translated; all where none are named.
    """

    test: Mapping[str, Sequence[Picture]]
    train: Mapping[str, Sequence[Picture]]
    folders: tuple[Path, ...]
    transform: Transform
    channels: int = 3
    extractor: Path | None = None
    classifier: Path | None = None
    sources: Sequence[str] = ()

    def must_allow(
        self, metrics: Sequence[str], *, skip: bool = False
    ) -> tuple[ClassFiles, list[str]]:
        """Raise now what measuring would raise: before hours of training. All are decoded once.

        Args:
            metrics: names of them.
            skip: leave damaged pictures out.

        Returns:
            those without damaged pictures, and what is wrong with those.

        Raises:
            ParameterError: a class has too few, or a metric is unknown or lacks what it needs.
            ImageError: a picture is damaged, and is not to be left out.
            MissingWeightsError: an extractor's weights are not there.
        """
        must_be_known(metrics, self.extractor, by_class=True)
        must_be_importable()
        through = {one for name in metrics if (one := extractor_of(name)) is not None}
        if {*metrics} & {*COLLAPSE}:
            through.add(seen_through(metrics, self.extractor))
        for name in sorted(through):
            extractors.extractor(name, own=self.extractor)
        if "rc" in metrics and self.classifier is not None:
            indices_in(extractors.classifier(self.classifier), list(self.test))
        bad: dict[Picture, str] = {}
        size = (0, 0)
        read = (*self.test.values(), *(self.train.values() if "fc" in metrics else ()))
        for picture in chain.from_iterable(read):
            try:
                size = self._read(picture).shape[:2]
            except ImageError as error:
                if not skip:
                    raise
                bad[picture] = str(error)
        kept, rest = (
            {name: [one for one in own if one not in bad] for name, own in of.items()}
            for of in (self.test, self.train)
        )
        for name, own in kept.items():
            if len(own) < 2:
                raise ParameterError(
                    f"the class {name!r} has {len(own)} test pictures that can be read, where at "
                    f"least 2 are needed"
                )
        for name in sorted(through):
            must_be_seen(name, "a test picture", size)
        return replace(self, test=kept, train=rest), list(bad.values())

    def measured(
        self, make: Make, classes: Sequence[str], metrics: Sequence[str], *, count: int,
        seed: int = 0, device: str = "cpu", given: Mapping[str, Any] | None = None,
        kept: Kept | None = None,
    ) -> list[Result]:  # fmt: skip
        """What `evaluate_classes` finds: with a distance of sets, a collapse and the use of source.

        Args:
            make: see `Make`.
            classes: of the translator, by its indices.
            metrics: names of them.
            count: outputs of a class, and real pictures of each, at most.
            seed: of what is drawn.
            device: where extractors compute.
            given: see `evaluate_classes`.
            kept: likewise.
        """
        if finds_collapse(metrics):
            metrics = list(dict.fromkeys((*metrics, *COLLAPSE)))
        test = {name: [self._read(one) for one in own[:count]] for name, own in self.test.items()}
        train = {}
        if "fc" in metrics:
            train = {n: [self._read(one) for one in own[:count]] for n, own in self.train.items()}
        if not classes:
            raise ParameterError("the model does not say which class has which index")
        for name in self.sources:
            if name not in test:
                raise ParameterError(
                    f"the test pictures have no class {name!r} to translate"
                    f"{nearest(name, test)} (there are {listed(list(test))})"
                )
        inputs = {name: test[name] for name in self.sources or test}
        real = {name: own for name, own in test.items() if name in classes}
        if not real:
            raise ParameterError(
                f"none of the classes of the test pictures ({listed(list(test))}) is one of the "
                f"translator ({listed(list(classes))})"
            )
        if self.sources and len(inputs) == 1:  # and these become none of their own class
            (alone,) = inputs
            real.pop(alone, None)
            if not real:
                raise ParameterError(
                    f"{alone!r} alone is translated, and the test pictures have no other class of "
                    f"the translator"
                )
        return evaluate_classes(
            make, classes, ClassSets(inputs, real, train), metrics, count=count, seed=seed,
            device=device, extractor=self.extractor, classifier=self.classifier, given=given,
            kept=kept,
        )  # fmt: skip

    def _read(self, picture: Picture) -> np.ndarray:
        return self.transform.for_test(read_picture(picture, self.channels))


def making(
    model: Model, *, seed: int = 0,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Make:  # fmt: skip
    """What a model makes, in batches; a number is the noise that `seed` draws for it.

    Of a model that sees no pictures they are left aside: that is the control.

    Args:
        model: of classes.
        seed: of the noise.
        context: of each batch, such as autocast.
    """

    def make(pictures: Pictures, index: int, noise: Sequence[int]) -> list[np.ndarray]:
        made: list[np.ndarray] = []
        for start in range(0, len(pictures), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            given = model.given([str(number) for number in noise[some]], index, seed=seed)
            seen = None if model.how.source is None else pictures[some]
            made += model.made(seen, given, context=context())
        return made

    return make


def evaluate_classes(
    make: Make, classes: Sequence[str], sets: ClassSets, metrics: Sequence[str], *,
    count: int = 100, extractor: Path | None = None, classifier: Path | None = None,
    given: Mapping[str, Any] | None = None, seed: int = 0, device: str = "cpu",
    kept: Kept | None = None,
) -> list[Result]:  # fmt: skip
    """Measure what a translator to classes makes.

    Into each target come `count` inputs of all other classes, those that `seed` draws, each with a
    noise of its own. The same seed takes the same ones, so that evaluations of one training differ
    by its weights alone.

    Args:
        make: see `Make`.
        classes: of the translator, by its indices.
        sets: pictures; the targets are the classes of `real`.
        metrics: names of `CLASS_METRICS`, or with an extractor those of `own_names`.
        count: outputs of a class, at most.
        extractor: a checkpoint with a classifier, for the distances that have its name.
        classifier: a checkpoint with another one, for `rc`.
        given: `inception_weights`, `lpips_backbone`: see `metrics.evaluate`.
        seed: of what is drawn, and of FC's classifier.
        device: where extractors compute.
        kept: where features of the real pictures are looked for, and kept.

    Returns:
        a result for each name; after `rc` and `fc` their `_ceiling`, the same classifier, or one of
        the training pictures, on real test pictures, and `_floor`, a guess.

    Raises:
        ParameterError: an unknown metric or class, too few pictures, or no classifier for `rc`.
        MissingWeightsError: an extractor's weights are not there.
    """
    must_be_known(metrics, extractor, by_class=True)
    _must_have_classes(classes, sets)
    if "rc" in metrics and classifier is None:
        raise ParameterError("the metric rc needs a classifier, of real pictures of the classes")
    measure = _Measure(
        make, classes, sets, seed, device, kept, {**(given or {}), "own": extractor}
    )  # fmt: skip
    for needed in map(extractor_of, metrics):  # before anything is made
        if needed is not None:
            measure.extractor(needed)
    if {*metrics} & {*COLLAPSE}:
        measure.extractor(seen_through(metrics, extractor))
    judge = None if classifier is None else extractors.classifier(classifier)
    if judge is not None:
        indices_in(judge, list(measure.index))
    measure.make_outputs(count)
    results: list[Result] = []
    found: Collapse | None = None
    for name in metrics:
        if name in COLLAPSE:
            found = found or measure.collapse(metrics)
            value = found.figures().get(name)
            if value is not None:
                through = measure.extractor(seen_through(metrics, extractor))
                results.append(measure.result(name, Mean(value, {}), through))
        elif is_of_sets(name):
            results.append(measure.distance(name))
        elif name == "rc":
            assert judge is not None
            results += measure.recognised(judge)
        elif name == "fc":
            results += measure.learnt_from()
        else:
            results.append(measure.diversity(name))
    return results


def seen_through(metrics: Sequence[str], own: Path | None) -> str:
    """What a collapse is looked for in: features of the first distance, or those of one's own."""
    return through_features(metrics) or ("st-alex" if own is None else own.stem)


def _must_have_classes(classes: Sequence[str], sets: ClassSets) -> None:
    if len(classes) < 2:
        raise ParameterError("one class: there is none to translate into from another one")
    for name, own in sets.real.items():
        if name not in classes:
            raise ParameterError(
                f"the real pictures have the class {name!r}, which the translator lacks (it has "
                f"{', '.join(classes)})"
            )
        others = sum(len(there) for source, there in sets.inputs.items() if source != name)
        if min(len(own), others) < 2:
            raise ParameterError(
                f"{name!r} has {len(own)} real pictures and {others} inputs of other classes, but "
                f"2 of both are the least"
            )
        if sets.train and len(sets.train.get(name, ())) < 2:
            raise ParameterError(
                f"the training pictures have fewer than 2 of the class {name!r}, which fc's "
                f"ceiling needs"
            )


class _Measure:
    """One evaluation: outputs are made once, and seen once by each extractor."""

    def __init__(
        self, make: Make, classes: Sequence[str], sets: ClassSets, seed: int, device: str,
        kept: Kept | None, given: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.make, self.sets, self.seed, self.device, self.kept = make, sets, seed, device, kept
        self.given = given
        self.index = {name: classes.index(name) for name in sets.real}
        self.inputs: dict[str, list[np.ndarray]] = {}
        self.outputs: dict[str, list[np.ndarray]] = {}
        self._extractors: dict[str, Extractor] = {}
        self._features: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}

    def make_outputs(self, count: int) -> None:
        """Of each target, of inputs of all other classes."""
        for name, index in self.index.items():
            others = [
                picture for source, own in self.sets.inputs.items() if source != name
                for picture in own
            ]  # fmt: skip
            rng = np.random.default_rng((self.seed, index))
            own = [others[at] for at in rng.permutation(len(others))[:count]]
            self.inputs[name] = own
            # No two outputs have one noise.
            self.outputs[name] = self._made(
                own, name, range(index * count, index * count + len(own))
            )

    def _made(self, pictures: Pictures, name: str, noise: Sequence[int]) -> list[np.ndarray]:
        made = [as_rgb(one) for one in self.make(pictures, self.index[name], noise)]
        if len(made) != len(pictures):
            raise ParameterError(f"{len(made)} outputs were made of {len(pictures)} pictures")
        return made

    def extractor(self, name: str) -> Extractor:
        """One by its name; loaded once."""
        if name not in self._extractors:
            self._extractors[name] = extractors.extractor(name, **self.given)
        return self._extractors[name]

    @property
    def like(self) -> np.ndarray:
        """The output to whose size all are brought."""
        return next(iter(self.outputs.values()))[0]

    def seen(self, through: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Features of outputs and of real pictures, by class."""
        if through not in self._features:
            self._features[through] = (
                {name: self.of(own, through) for name, own in self.outputs.items()},
                {name: self.of(own, through, self.kept) for name, own in self.sets.real.items()},
            )
        return self._features[through]

    def of(self, pictures: Pictures, through: str, kept: Kept | None = None) -> np.ndarray:
        """Features of some pictures."""
        return features(
            pictures, self.extractor(through), device=self.device, like=self.like, kept=kept
        )

    def distance(self, name: str) -> Result:
        """A mean over classes of a distance of sets."""
        through = extractor_of(name)
        assert through is not None
        made, there = self.seen(through)
        if name.startswith("mk"):
            found = mean_kernel(made, there, self.seed)
        else:
            found = mean_frechet(made, there)
        return self.result(name, found, self.extractor(through))

    def collapse(self, metrics: Sequence[str]) -> Collapse:
        """See `collapse`; the use of source and noise where it is asked for."""
        through = seen_through(metrics, self.given["own"])
        made, there = self.seen(through)
        groups: dict[str, dict[str, list[np.ndarray]]] = {}
        for which, wanted in (("same_noise", "source_use"), ("same_source", "noise_use")):
            if wanted in metrics or "collapse" in metrics:
                groups[which] = {name: [self._group(name, which, through)] for name in self.index}
        ranks = [source_rank(self._sized(self.inputs[n]), own) for n, own in self.outputs.items()]
        some = [one.ravel() for own in self.outputs.values() for one in own[:MOST]]
        return collapse(
            made, there, same_noise=groups.get("same_noise"),
            same_source=groups.get("same_source"), rank=float(np.mean(ranks)),
            deviation=float(np.concatenate(some).std()),
        )  # fmt: skip

    def _group(self, name: str, which: str, through: str) -> np.ndarray:
        own = self.inputs[name][:AMONG]
        if which == "same_noise":
            return self.of(self._made(own, name, [0] * len(own)), through)
        return self.of(self._made([own[0]] * AMONG, name, range(AMONG)), through)

    def diversity(self, name: str) -> Result:
        """The mean distance of outputs that differ by their noise alone: ten of each input."""
        through = extractor_of(name)
        assert through is not None
        groups = [
            self._made([source] * SAMPLES, target, range(SAMPLES))
            for target, own in self.inputs.items() for source in own[:AMONG]
        ]  # fmt: skip
        perceptual = self.extractor(through)
        value = over_noise(groups, perceptual, device=self.device)
        return self.result(name, Mean(value, {}), perceptual)

    def recognised(self, classifier: Extractor) -> list[Result]:
        """RC: the share of outputs that a classifier of real pictures takes for their class."""
        # Without names its classes are the translator's, by their indices.
        known = indices_in(classifier, list(self.index)) if classifier.classes else self.index
        made, there = (
            accuracy(classifier, own, known, device=self.device)
            for own in (self.outputs, self._real())
        )
        return self._between("rc", made, there, len(known), classifier)

    def learnt_from(self) -> list[Result]:
        """FC: the share of real pictures that a classifier of outputs takes for their class."""
        known = {name: number for number, name in enumerate(self.outputs)}
        of_outputs = trained_on(self.outputs, seed=self.seed, device=self.device)
        found = accuracy(of_outputs, self._real(), known, device=self.device)
        ceiling = None
        if self.sets.train:
            # As many of each as there are outputs, or the comparison is one of amounts.
            some = {n: self._sized(self.sets.train[n][: len(o)]) for n, o in self.outputs.items()}
            of_real = trained_on(some, seed=self.seed, device=self.device)
            ceiling = accuracy(of_real, self._real(), known, device=self.device)
        return self._between("fc", found, ceiling, len(known), of_outputs)

    def _between(
        self, name: str, found: Mean, ceiling: Mean | None, count: int, classifier: Extractor
    ) -> list[Result]:
        told = {name: found, f"{name}_ceiling": ceiling, f"{name}_floor": Mean(100 / count, {})}
        return [self.result(n, mean, classifier) for n, mean in told.items() if mean is not None]

    def _real(self) -> dict[str, list[np.ndarray]]:
        return {name: self._sized(own) for name, own in self.sets.real.items()}

    def _sized(self, pictures: Pictures) -> list[np.ndarray]:
        return [resized(as_rgb(one), self.like.shape[:2], smooth=False) for one in pictures]

    def result(self, name: str, found: Mean, through: Extractor) -> Result:
        """With what it was computed with."""
        n_fake, n_real = (sum(map(len, own.values())) for own in (self.outputs, self.sets.real))
        versions = {"torchmetrics": metadata.version("torchmetrics"), **through.versions}
        return Result(
            name, found.value, through.name, through.sha256, through.dimension, through.resize,
            n_fake, n_real, versions, f"{name} {found.note}" if found.note else "",
            found.classes or None,
        )  # fmt: skip


def must_be_of_classes(model: Model) -> None:
    """Raise a ParameterError for a model of attributes."""
    if model.how.has_attributes:
        raise ParameterError(
            f"{model.called} is of attributes, of which a picture may have several, and is not "
            f"measured by class: translate pictures, and measure those (--images OUT --against "
            f"PICTURES)"
        )


def evaluate_class_model(
    model: Model, test: Path, metrics: Sequence[str] | None, *, train: Path | None = None,
    extractor: Path | None = None, classifier: Path | None = None, count: int = 100,
    sources: Sequence[str] = (), seed: int = 0, device: str = "cpu",
    given: Mapping[str, Any] | None = None, kept: Kept | None = None,
) -> list[Result]:  # fmt: skip
    """Measure a model of classes on a folder of folders, or an HDF5 file, of test pictures.

    Args:
        model: whose classes have names.
        test: the pictures; what is of no class of the model is translated, too.
        metrics: None for distances through the extractor, or through a package's where there is
            none, with what comes with them, and `rc` with a classifier.
        train: training pictures, for FC's ceiling.
        extractor: see `evaluate_classes`, as what follows.
        classifier: likewise.
        count: likewise.
        sources: see `ClassFiles`.
        seed: likewise.
        device: where the model and extractors compute.
        given: likewise.
        kept: likewise.

    Raises:
        ParameterError: the model is of attributes.
        and as `evaluate_classes`.
    """
    must_be_of_classes(model)
    place = chosen_device(device)
    model.module.to(place)
    side = None if model.size is None else (model.size, model.size)
    transform = Transform("none") if side is None else Transform("centre_crop", side, side)
    files = ClassFiles(
        find_classes(test).of_each(), {} if train is None else find_classes(train).of_each(),
        (test,), transform, model.channels, extractor, classifier, sources,
    )  # fmt: skip
    if metrics is None:
        own = own_names(extractor, by_class=True) or ("mfd-st-alex", "mkd-st-alex")
        metrics = [*own, *(["rc"] if classifier is not None else [])]
    return files.measured(
        making(model, seed=seed), model.classes, metrics, count=count, seed=seed,
        device=str(place), given=given, kept=kept,
    )  # fmt: skip
