"""What a trainer of images tells, and what follows from it for plans, `soup` and other adapters.

A trainer is a class with a name, options, a version, and methods that take the options: which
networks there are, who updates them, what is drawn, which turns are taken. They are told without
torch; only losses compute. The rest, from keys to several processes, is here and in `state.py`.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelsoup import (
    Job,
    MismatchError,
    ParameterError,
    SoupError,
    TrainerError,
    how_to_install,
    open_checkpoint,
)

from ..measuring.metric_names import METRICS
from ..networks.described import AVERAGED, Network
from ..networks.shapes import Shape
from ..pictures.images import ImageError, NonfiniteImageError, left_out
from ..pictures.picture import Attributed, Picture, files_of, in_turn, labels_of, read_picture
from ..use.classes import classes_in
from ..use.translator import turned
from .begun import files_begun_with, source_of, vector_of
from .classes import by_class, must_have_classes
from .description import Description
from .lineages import trained_at

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..measuring.class_evaluation import ClassFiles
    from ..measuring.evaluation import Sets
    from ..use.models import Model
    from ..use.translator import Translator
    from .probe import Probe
    from .processes import Place
    from .session import Session


class ImageTrainer(Description):
    """A trainer of a plan, by what its class says of it.

    Attributes:
        multiple: 1: a network whose images need sides that are multiples says so by its own.
    """

    multiple = 1

    # What the core asks.

    def tensors(self, o: Any) -> dict[str, tuple[str, Shape]]:
        """What is written."""
        return {
            f"{name}.{tensor}": told
            for name, network in self._written(o).items()
            for tensor, told in network.tensors().items()
        }

    def buffers(self, o: Any) -> set[str]:
        """What of it is no parameter, such as statistics of norms."""
        return {f"{name}.{tensor}" for name, network in self._written(o).items()
                for tensor in network.buffers()}  # fmt: skip

    def reshapes(self, o: Any) -> dict[str, str]:
        """Rows of classes, and the vectors of spectral norm that are as long, where re-made."""
        return {name: "" for row in self.rows(o) for name in (row, vector_of(row))}

    def identity(self, o: Any) -> dict[str, Any]:
        """What decides the result, beside the images' content."""
        images = self.images(o)
        return {
            **o.decisive(),
            "images": [len(own) for own in images.values()],
            **by_class(self.classes(o), images),
            **{f"{n} from": source_of(p, n)[1] for n, p in o.init_from.items()},
        }

    def files(self, o: Any) -> list[Path]:
        """The images that are used, whose content is part of a result's key.

        Where evaluations decide the result, those are among them that it is measured on and with.
        """
        chosen = [*self.tested_on(o), *o.measured_with()] if o.judged else []
        used = files_of(picture for own in self.images(o).values() for picture in own)
        return list(dict.fromkeys([*used, *chosen, *files_begun_with(o.init_from)]))

    def train(self, job: Job) -> None:
        """Train to the end, or go on from what a crash left in the work folder."""
        options = job.options
        sets = self._sets(job) if options.evaluate else None  # before hours of training, not after
        if job.shown is not None and options.samples is None and options.sheet_every:
            options.must_be_apart("the folder for samples, beside the output,", job.shown)
        of_all: dict[str, Any] = {
            "seed": job.seed, "frozen": job.frozen, "work": job.work, "shown": job.shown,
        }  # fmt: skip
        if options.processes == 1:
            session = self.session(options, job.start, **of_all)
            with _threads_for(session):
                figures = self._trained(session, job, sets)
        else:
            _needed()
            from .processes import together

            arguments = (self, options, job.start, job.seed, job.frozen)
            with together(options.processes, options.device, job.work, arguments) as place:
                session = self.session(options, job.start, **of_all, place=place)
                figures = self._trained(session, job, sets)
        session.write(job.output)
        device = str(session.device)
        del session  # a GPU's memory is wanted for measuring
        if sets is not None and figures["diverged"]:
            job.log("not evaluated: it diverged")
        elif sets is not None:
            self._evaluate(job, sets, device)

    # What other adapters ask.

    def session(
        self, options: Any, start: Path | None, *, seed: int, frozen: Sequence[str] = (),
        work: Path | None = None, shown: Path | None = None, place: Place | None = None,
    ) -> Session:  # fmt: skip
        """A training that has not begun, for those who make its steps themselves."""
        _needed()
        from .processes import ALONE
        from .session import Session

        if start is not None:
            self.must_start(options, start)
        return Session(
            self, options, start, seed=seed, frozen=frozen, work=work, shown=shown,
            place=place or ALONE,
        )  # fmt: skip

    def probe(self, options: Any, seconds: float = 3.0) -> Probe:
        """What a training takes: see `Probe`. In a process of its own, memory is what it needs.

        Raises:
            TrainerError: its first steps diverge.
        """
        session = self.session(options, None, seed=0)
        from .probe import probe
        from .step import DivergedError

        with _threads_for(session):
            try:
                return probe(session, seconds)
            except DivergedError:
                raise TrainerError(f"the first steps of {self.name} diverge") from None

    def inputs(
        self, session: Session, network: str, part: str = "train"
    ) -> Iterator[dict[str, torch.Tensor]]:
        """What a translator is called with in use, in that order: pictures, and what it takes.

        Pictures come at the size of training, in order; those of classes in turn, one of each. What
        else there is depends on a picture's place alone: noise, and classes, so that as many rounds
        as there are classes have each picture's class with each that it becomes.

        Args:
            session: with its networks, data and sizes.
            network: one of `translators`.
            part: `train`; or `test`, of which there is none where no test folders are named, or
                the data have no `testA` and `testB`.

        Yields:
            by the names that an exported model has for them: `image`, float32, 1 × channels ×
            height × width in [−1, 1]; `class`, the index, or `attributes`, those of the picture
            with one turned into the opposite; and others, each 1 × ….

        Raises:
            ParameterError: the training folders are missing or do not fit; or the network sees no
                pictures.
            ImageError: a picture is damaged, and is not to be left out.
        """
        import torch

        from ..pictures.images import to_tensor

        options, model = session.options, session.in_use(network)
        how, source = model.how, self._source(options, network)
        names = [how.input_called(own) for own in how.takes]
        for place, (picture_of, picture) in self._pictures(options, source, part):
            label = (place + place // how.classes + 1) % how.classes if how.classes else 0
            of_pictures = how.style is not None and how.style.of_pictures is not None
            like = None
            # Styles of noise and, where there are such, of pictures, in turn.
            if of_pictures and (how.wants_reference or place % 2):
                reference = self._reference(options, how, part, place, label)
                like = model.style_of([reference], label)
            own = picture_of.attributes if isinstance(picture_of, Attributed) else None
            told = label if own is None else turned(own, label)
            given = model.given([f"{part} {place}"], told, style=like)
            taken = zip(names, map(torch.from_numpy, given), strict=True)
            # Some networks compute otherwise on images in another order in memory.
            image = to_tensor(picture)[None].contiguous()
            yield {"image": image, **dict(taken)}

    def tested_on(self, options: Any) -> list[Path]:
        """The test images, by which somebody else may choose among networks."""
        return files_of(picture for own in options.images("test").values() for picture in own)

    def metric_names(self) -> tuple[str, ...]:
        """The names that `quality` knows."""
        return METRICS

    def quality(
        self, options: Any, network: str, images: Sequence[np.ndarray], names: Sequence[str], *,
        part: str, first: int,
    ) -> dict[str, float]:  # fmt: skip
        """Metrics of what a network made of some of the images that `inputs` gives.

        Where each of these has a picture of its name in the other domain, that is its truth.

        Args:
            options: of the training.
            network: one of `translators`.
            images: uint8, height × width × channels, for neighbours among `inputs`, in their order.
            names: of `metric_names`.
            part: that of `inputs`.
            first: which of its images the first one was made of, from 0.

        Raises:
            ParameterError: an unknown metric, or one that needs a truth where there is none.
            SoupError: an extractor's weights are not there.
        """
        from ..measuring.metrics import evaluate

        source, target = self._source(options, network), self.translators(options)[network].target
        seen = (own for _, own in self._pictures(options, source, part))
        own = dict(islice(seen, first, first + len(images)))
        real = dict(own for _, own in self._pictures(options, target, part))
        truth = options.truth(list(own), source, target, part)
        if truth is not None and not real.keys() >= set(truth):  # one of them is damaged
            truth = None
        results = evaluate(
            list(images), list(real.values()), inputs=list(own.values()),
            truth=None if truth is None else [real[file] for file in truth], metrics=names,
        )  # fmt: skip
        return {result.name: result.value for result in results}

    def model(self, o: Any, checkpoint: Path, device: str = "cpu") -> Model:
        """The first translator of a result, with the averages of its weights, as it is used.

        Raises:
            CheckpointError: the file is missing or damaged, or holds NaN or infinity.
        """
        from ..use.generators import load_network
        from ..use.models import model_of
        from ..use.translator import parts_of

        name, how = next(iter(self.translators(o).items()))
        joined, networks = self.joined(o), self.networks(o)
        parts = {
            part: load_network(checkpoint, part, networks[part]).to(device)
            for part in parts_of(name, how, joined)
        }
        return model_of(name, how, joined, parts, classes=classes_in(checkpoint) or ()).eval()

    def options_of(self, checkpoint: Path) -> dict[str, Any]:
        """The options that a checkpoint decides, such as widths; classes are the data's.

        Where its lineage says at which size it was trained, that too: the mode and both sizes of
        the trainings that are nearest to it, if they agree.

        Raises:
            CheckpointError: it is missing or damaged.
            MismatchError: it holds no such networks.
        """
        opened = open_checkpoint(checkpoint)
        shapes = {name: info.shape for name, info in opened.tensors.items()}
        kind = type(self)
        names = (self.name, f"{kind.__module__}:{kind.__name__}", *self.called)
        sizes = trained_at(opened, names)
        known = {field.name for field in dataclasses.fields(self.options)}
        told = self.options_in(shapes) | {n: own for n, own in sizes.items() if n in known}
        return {name: value for name, value in told.items() if name != "classes"}

    def must_start(self, o: Any, start: Path) -> None:
        """Check that what a start checkpoint holds, which may be a part, fits the options.

        Raises:
            MismatchError: a tensor of another shape, or of a network with more blocks or layers;
                the message names the tensor and both shapes. Or classes that are not the data's.
        """
        remade = self.rows(o)
        if not remade:
            must_have_classes(
                start, self.classes(o), more=self.knows_more(o), attributes=self.has_attributes(o)
            )
        shapes = {name: info.shape for name, info in open_checkpoint(start).tensors.items()}
        networks = self.networks(o)
        expected = {name: shape for name, (_, shape) in self.tensors(o).items()}
        # In the order of layers, so that the first that is told is the one that tells most.
        order = {name: place for place, name in enumerate(expected)}
        for name in sorted(shapes, key=lambda name: order.get(name, len(order))):
            if name in expected and tuple(shapes[name]) == expected[name]:
                continue
            if name in remade and tuple(shapes[name])[1:] == expected[name][1:]:
                continue  # other classes
            if name in map(vector_of, remade):
                continue
            network, has = name.partition(".")[0], list(shapes[name])
            if not any(known.startswith(f"{network}.") for known in expected):
                raise MismatchError(
                    f"{start} has the tensor {name!r} {has}, which belongs to none of "
                    f"{', '.join(networks)}{_of_average(network)}"
                )
            sizes = networks.get(network)
            here = f"it has the shape {list(expected[name])}" if name in expected else "there is no"
            raise MismatchError(
                f"{start}: tensor {name!r} has the shape {has}, but with {sizes} {here}"
                f"{'' if name in expected else ' such tensor'}{self._instead(o, shapes)}"
            )

    def fitting(self, o: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The options that would fit a start, where they are others."""
        try:
            told = self.options_in(shapes)
        except MismatchError:
            return {}
        own = self.options_in({name: shape for name, (_, shape) in self.tensors(o).items()})
        return {name: value for name, value in told.items() if own.get(name) != value}

    def _instead(self, o: Any, shapes: Mapping[str, Sequence[int]]) -> str:
        """What a refusal of a start says of them."""
        other = ", ".join(f"{name}: {value}" for name, value in self.fitting(o, shapes).items())
        return f" (the start has {other})" if other else ""

    def _source(self, options: Any, network: str) -> str:
        """The set of what a translator sees."""
        source = self.translators(options)[network].source
        if source is None:
            raise ParameterError(
                f"{network} of {self.name} sees no pictures, and nothing else says what it is "
                f"called with in use"
            )
        return source

    def _reference(
        self, options: Any, how: Translator, part: str, place: int, label: int
    ) -> np.ndarray:
        """A picture whose style another one is to have: of the target, and of the class."""
        own = options.images(part)[how.target] or options.images("train")[how.target]
        of_class = [one for one in own if [label] == labels_of([one]).tolist()]
        chosen = of_class or own
        picture: np.ndarray = options.transform().for_test(
            read_picture(chosen[place % len(chosen)], options.channels)
        )
        return picture

    def _pictures(
        self, options: Any, name: str, part: str
    ) -> Iterator[tuple[int, tuple[Picture, np.ndarray]]]:
        """The pictures of a part of a set that can be read, each at the size of training.

        Before it stands its place among all of them, so that what is left out moves no other.
        """
        transform = options.transform()
        for place, file in enumerate(in_turn(options.images(part)[name])):
            try:
                picture = read_picture(file, options.channels)
            except ImageError:
                if options.on_bad_image == "error":
                    raise
                continue
            yield place, (file, transform.for_test(picture))

    def _written(self, o: Any) -> dict[str, Network]:
        """The networks of a checkpoint, averages too."""
        own = self.networks(o)
        own |= {name: own.get(name, own[of]) for name, (of, _) in self.averages(o).items()}
        return {name: own[of] for name, of in self.written(o).items()}

    # The end of a training.

    def _trained(
        self, session: Session, job: Job, sets: Sets | ClassFiles | None
    ) -> dict[str, float]:
        """Carry a training out, look at what it makes, and tell the record what it was."""
        session.sets = sets
        job.note(session.told())
        figures = session.run(job.report, job.log)
        job.note({"left out": session.left_out()})  # of a large set, what was met
        if figures["diverged"]:
            return figures
        try:
            constant = session.constant()
        except NonfiniteImageError:
            # Its last step was too large: every weight is finite, and what they make is not.
            job.log("diverged: the translation of a training image holds NaN or infinity")
            figures["diverged"] = 1.0
        else:
            for name in constant:
                job.log(f"{name} gives nearly one picture for all inputs")
            figures["constant"] = float(len(constant))
        job.report(1.0, figures)
        return figures

    def _sets(self, job: Job) -> Sets | ClassFiles:
        """The test images, all of which can be measured with the metrics that are asked for."""
        options = job.options
        found: Sets | ClassFiles = options.test_sets(options.transform())
        sets: Sets | ClassFiles = dataclasses.replace(found, channels=options.channels)
        sets, bad = sets.must_allow(options.evaluate, skip=options.on_bad_image == "skip")
        rest = [said for folder in sets.folders if (said := left_out(folder)) is not None]
        for fault in (*bad, *rest):
            job.log(f"left out of the test images: {fault}")
        return sets

    def _evaluate(self, job: Job, sets: Sets | ClassFiles, device: str) -> None:
        """Metrics of a result, for its record. What fails here costs no training."""
        from ..measuring.class_evaluation import ClassFiles, making
        from ..measuring.evaluation import evaluate_model

        o = job.options
        try:
            if isinstance(sets, ClassFiles):
                model = self.model(o, job.output, device)
                results = sets.measured(
                    making(model), model.classes, o.evaluate, count=o.evaluate_n, device=device
                )
            else:
                results = evaluate_model(job.output, sets, metrics=o.evaluate, device=device)
        except NonfiniteImageError:
            job.log("diverged: the translation of a test image holds NaN or infinity")
            job.report(1.0, {"diverged": 1.0})
        except Exception as error:  # noqa: BLE001  # a disk, a GPU's memory, a library: all of it
            if not isinstance(error, SoupError):
                job.log(traceback.format_exc())
            job.log(f"not evaluated: {error} (soup i2i evaluate measures the result)")
            job.note({"not evaluated": str(error)})
            job.report(1.0, {"not_evaluated": 1.0})
        else:
            for result in results:
                if result.note:
                    job.log(f"warning: {result.note}")
            job.note({"evaluated": [result.as_json() for result in results]})
            job.report(1.0, {result.name: result.value for result in results})


def _of_average(network: str) -> str:
    """What may be done about an average that a trainer without one does not take."""
    if not network.endswith(AVERAGED):
        return ""
    return (
        f": it is an average, which ema goes on with; and init_from takes it, "
        f"{network.removesuffix(AVERAGED)}: file:{network}"
    )


_SMALL = 1e8  # multiplications of a pass: for fewer, a second thread costs more than it brings


@contextmanager
def _threads_for(session: Session) -> Iterator[None]:
    """As many threads as the size of a step is worth, on a CPU."""
    import torch

    before = torch.get_num_threads()
    if session.device.type == "cpu" and session.effort < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _needed() -> None:
    try:
        import PIL
        import torch
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "PIL"):
            raise
        raise SoupError(
            f"training needs {error.name}, which is not installed: {how_to_install('i2i')}"
        ) from None
    del PIL, torch
