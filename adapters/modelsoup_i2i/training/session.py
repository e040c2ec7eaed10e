"""The loop of a training: batches, logs, samples, what is told, until it ends or diverges."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelsoup import SoupError, counted, listed

from ..measuring.class_evaluation import ClassFiles, making
from ..measuring.evaluation import Sets
from ..measuring.metric_names import is_better
from ..pictures.draws import Sampler, batches
from ..pictures.images import (
    NonfiniteImageError,
    resized,
)
from ..pictures.picture import Attributed, Picture, read_picture
from ..pictures.sheets import grid, save
from ..use.models import Model
from ..use.pages import by_class as page_by_class
from ..use.pages import by_reference, spread
from ..use.references import References
from ..use.translator import Translator
from . import estimates
from .cast import how_trained
from .classes import by_class
from .curves import Curve
from .state import State
from .step import DivergedError
from .watch import Losses, Report, Watch

BEST = "best.safetensors"
COLLAPSED = 2  # of the verdicts' numbers
_SHOWN = 4  # images of each domain on a sheet
_SHOWN_CLASSES = 10  # at most
_LOOKED_AT = 8  # images of each domain, whether what is made of them differs
_CONSTANT = 1.5  # levels of 256

Log = Callable[[str], None]


class Session(State):
    """A training that is carried out.

    Attributes:
        sets: the test images that evaluations look at while it trains; None for no evaluation.
    """

    sets: Sets | ClassFiles | None = None
    _curves: list[Curve] | None = None

    def batches(self) -> Generator[list[dict[str, torch.Tensor]], None, None]:
        """What is drawn for each step that is still to come, a batch for each of its passes."""
        options, world = self.options, self.place.world
        per_epoch, group = self.steps_per_epoch, options.accumulate

        def places() -> Iterator[tuple[int, int]]:
            for step in range(self.steps, self.total_steps):
                epoch, within = divmod(step, per_epoch)
                for n in range(group):
                    yield epoch, ((within * group + n) * world + self.place.rank) * options.batch

        draws = self.trainer.draws(options)
        sampler = Sampler(self.pictures, draws, self.seed, options.batch)
        single = batches(sampler, places(), options.threads)
        try:
            for first in single:
                yield [first, *(next(single) for _ in range(group - 1))]
        finally:
            single.close()

    def run(
        self, report: Report, log: Log, after_epoch: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """Train to the end, from where the work folder's state is.

        `after_epoch` is called with the number of an epoch, from 1, when it ends, before its state
        is kept: after a crash in between it is called again.

        A loss or gradient that is not finite ends the training, and the result has `diverged` 1.
        The weights are the last finite ones: those before that step, or with the part of it that
        was made before it was seen, such as the generators' before a discriminator's loss. As many
        evaluations in a row as `stop_on_collapse` says, all of which find a collapse, end it too:
        the weights are those that were evaluated last, and the result has `collapsed_at`.

        Returns:
            the last epoch's mean losses and other figures, also reported.
        """
        resumed = self.resume()
        self.begin()
        for line in self._opening(resumed):
            log(line)
        for line in self._needs():
            log(line)
        if self.options.compile:
            self.compile([self._first()])
        for said in self.news():
            log(said)
        self.place.meet()
        watch = self._watch()
        if self.shown is not None and not self.place.rank:
            names = ("losses.csv", "metrics.csv")
            self._curves = [Curve(self.shown / name, self.steps) for name in names]
        figures: dict[str, float] = {"diverged": 0.0, **self.losses.means()}
        if self.options.repair and not self.steps:
            self._repair(log)
        steps = self.batches()
        try:
            for group in watch.waiting(steps):
                self.take(group)
                for fault in self.pictures.met():
                    log(f"left out: {fault}")
                for said in self.news():
                    log(said)
                if len(self._taken) <= self.behind and not self._told_now():
                    continue
                for step, losses in self.read():
                    self._add(step, losses, watch)
                if self.steps % self.steps_per_epoch == 0:
                    epoch = self.steps // self.steps_per_epoch
                    if self._is_told(epoch - 1):
                        log(self._line(epoch - 1, watch))
                    figures |= self.losses.means()
                    self.losses.next_epoch()
                    if after_epoch is not None:
                        after_epoch(epoch)
                if self._due(self.options.evaluate_every):
                    figures |= self._evaluated(report, log, watch)
                    if self._gives_up():
                        figures["collapsed_at"] = float(self.steps)
                        log(
                            f"ended at step {self.steps} of {self.total_steps}: "
                            f"{counted(self.collapsed, 'evaluation')} in a row found a collapse "
                            f"(stop_on_collapse); the result is what it is now"
                        )
                        self._page(log)
                        break  # no state is kept: what is done again ends here again
                if self._due(self.options.checkpoint_every or self.steps_per_epoch):
                    self.keep()
                if self._due(self.options.sheet_every):
                    self._page(log)
                watch.tell(report, self.losses.means)
                if (expected := watch.expected()) is not None:
                    log(expected)
            if self.steps % self.steps_per_epoch and self.losses.means():
                log(self._line(self.steps // self.steps_per_epoch, watch))
                figures |= self.losses.means()
        except DivergedError:
            figures = {**self.losses.means(), "diverged": 1.0, "diverged_at": float(self.steps)}
            log(
                f"diverged: a loss or gradient was not finite at step {self.steps + 1} of "
                f"{self.total_steps}; the last finite weights are kept"
            )
        finally:
            steps.close()
            watch.close()
        if not figures["diverged"] and not self.place.rank:
            figures |= self.trainer.finish(self, log)
        figures |= {"steps": float(self.steps), "seconds_left": 0.0}
        report(1.0, figures)
        return figures

    def _repair(self, log: Log) -> None:
        """Find the statistics of norms anew, on the batches of the first steps."""
        steps, count = self.batches(), 0
        try:
            for group in islice(steps, self.options.repair):
                self.settle(group)
                count += 1
        finally:
            steps.close()
        log(f"statistics of norms were found anew on {counted(count, 'step')} of batches")

    def write(self, path: Path) -> None:
        """Write the result: the last networks, or those of the best evaluation.

        The last ones stay beside the samples then.
        """
        best = None if self.work is None else self.work / BEST
        if best is None or not self.best or not best.exists():
            self.save(path)
            return
        shutil.copyfile(best, path)
        if self.shown is not None:
            self.shown.mkdir(parents=True, exist_ok=True)
            self.save(self.shown / "last.safetensors")

    def evaluate(self, sets: Sets | ClassFiles) -> dict[str, float]:
        """Metrics of the first translator as it is, with averaged weights where there are such.

        Nothing of the training changes. Where a metric compares features of sets, a collapse is
        looked for in them: see `measuring.collapse`.

        Raises:
            NonfiniteImageError: a translation holds NaN or infinity.
        """
        from ..measuring.collapse import collapse
        from ..measuring.metric_names import through_features
        from ..measuring.metrics import evaluate, features

        options, device = self.options, str(self.device)
        if isinstance(sets, ClassFiles):
            results = sets.measured(
                making(self.in_use(self.deployed[0]), context=self.autocast), self.classes,
                options.evaluate, count=options.evaluate_n, device=device,
            )  # fmt: skip
            return {result.name: result.value for result in results}
        own = sets.first(options.evaluate_n)
        inputs, real = (own.read(files, options.channels) for files in (own.inputs, own.real))
        model = self.in_use(self.deployed[0])
        like = References(model, real) if model.how.wants_reference else None
        fake = [self._made(model, picture, str(n), like) for n, picture in enumerate(inputs)]
        results = evaluate(
            fake, real, inputs=inputs,
            truth=None if own.truth is None else own.read(own.truth, options.channels),
            metrics=options.evaluate, device=device,
        )  # fmt: skip
        figures = {result.name: result.value for result in results}
        through = through_features(options.evaluate)
        if through is not None:
            made, there = (features(each, through, device=device) for each in (fake, real))
            figures |= collapse({"": made}, {"": there}, deviation=_deviation(fake)).figures()
        return figures

    def told(self) -> dict[str, Any]:
        """What a record should hold of the training, as plain data: with what, on what, where."""
        shown = None if self.shown == self.work else self.shown
        return {
            **({} if shown is None else {"shown": str(shown.absolute())}),
            "images": {
                name: {"count": len(files), "xxh3_128": self.content[f"images of {name}"]}
                for name, files in self.pictures.sets.items()
            },
            **by_class(self.classes, self.pictures.sets),
            "left out": self.left_out(),
            **self.trainer.notes(self.options, self.images),
            "loss weights": dict(self.weights),
            "device": _named(self.device),
            "processes": self.place.world,
            "versions": {name: metadata.version(name) for name in ("torch", "pillow")},
        }

    def constant(self) -> list[str]:
        """The deployed networks that give nearly one picture for whatever they translate.

        Nearly is, on average over pixels, less than a level and a half of the 256 that a picture
        has, where the inputs differ by more.

        Raises:
            NonfiniteImageError: a translation holds NaN or infinity.
        """
        found = []
        for name, how in self.trainer.translators(self.options).items():
            if how.source not in self.pictures.sets:
                continue
            files = self.pictures.first(how.source, _LOOKED_AT)
            both = [self._translated(name, picture=self._picture(file)) for file in files]
            seen, made = (_difference(own) for own in zip(*both, strict=True))
            if made < _CONSTANT < seen:
                found.append(name)
        return found

    def sheet(self) -> None:
        """Write a page of translations, if there is a folder for it.

        Raises:
            NonfiniteImageError: a translation holds NaN or infinity; there is no page.
        """
        if self.shown is None or self.place.rank:
            return
        rows, labels, titles = [], [], ["image", "translated", "and back"]
        for name, how in self.trainer.translators(self.options).items():
            if how.source is not None and how.source not in self.pictures.sets:
                continue
            files = self.pictures.first(how.source, _SHOWN) if how.source else ()
            if how.style is not None and not how.classes:
                sources = [(str(n), self._picture(f)) for n, f in enumerate(files)]
                first = self._references(how) if how.style.of_pictures else ()
                like = [(str(n), picture) for n, picture in enumerate(first)] or None
                page = by_reference(self.in_use(name), sources, (), like, count=_SHOWN)
                own, titles = page.rows, page.titles
            elif how.classes:
                sources = [(str(n), self._picture(f)) for n, f in enumerate(files)]
                shown = spread(how.classes, _SHOWN_CLASSES)
                has = [f.attributes for f in files if isinstance(f, Attributed)]
                page = page_by_class(self.in_use(name), sources or None, shown, own=has)
                own, titles = page.rows, page.titles
            elif how.source is None:
                model = self.in_use(name)
                given = model.given([str(n) for n in range(_SHOWN)])
                own, titles = [model.made(None, given)], ["made"] * _SHOWN
            else:
                names = [name, how.back] if how.back else [name]
                own = [self._translated(*names, picture=self._picture(file)) for file in files]
            rows += own
            labels += [how.label] * len(own)
        if not rows:
            return
        titles = titles[: len(rows[0])]
        folder = self.shown / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save(grid(rows, titles, labels), folder / f"step-{self.steps:07d}.png")

    def _page(self, log: Log) -> None:
        """A page of samples, if there are to be such."""
        if not self.options.sheet_every:
            return
        try:
            self.sheet()
        except NonfiniteImageError:
            log(f"no page of samples at step {self.steps}: they hold NaN or infinity")

    def _told_now(self) -> bool:
        """Whether something is made after this step for which all before must be known."""
        options = self.options
        every = (self.steps_per_epoch, options.evaluate_every, options.checkpoint_every,
                 options.sheet_every)  # fmt: skip
        return any(map(self._due, every))

    def _add(self, step: int, losses: Mapping[str, float], watch: Watch) -> None:
        """What a step told."""
        self.losses.add(losses)
        self.recent.add(losses)
        pace = self.options.pace((step - 1) // self.steps_per_epoch, step - 1)
        watch.add(step, {**losses, "rate": pace * self.options.lr})
        if step % self.options.log_every == 0 or step == self.total_steps:
            if self._curves is not None:
                self._curves[0].add(step, self.recent.means())
            self.recent = Losses()

    def _evaluated(self, report: Report, log: Log, watch: Watch) -> dict[str, float]:
        """Evaluate, tell it, and keep the networks if they are the best so far."""
        if self.sets is None or self.place.rank:
            return {}
        try:
            figures = self.evaluate(self.sets)
        except NonfiniteImageError:
            log(f"not evaluated at step {self.steps}: a translation holds NaN or infinity")
            return {}
        except SoupError as error:  # a test picture is gone, say
            if self.options.judged:
                raise  # the result would be another one
            log(f"not evaluated at step {self.steps}: {error}")
            return {}
        watch.add(self.steps, figures)
        report(self.steps / self.total_steps, figures)
        if self._curves is not None:
            self._curves[1].add(self.steps, figures)
        log(f"step {self.steps}: " + ", ".join(f"{n} {value:.4g}" for n, value in figures.items()))
        if figures.get("collapse", 0.0) >= COLLAPSED:
            self.collapsed += 1
            before = f"at step {self.sound}" if self.sound else "never"
            log(
                f"step {self.steps}: collapsed: {self.deployed[0]} makes few pictures out of many "
                f"(diversity {figures['diversity']:.2f}, duplicates {figures['duplicates']:.2f}); "
                f"last found sound {before}"
            )
        else:
            self.sound, self.collapsed = self.steps, 0
        self._keep_best(figures)
        return figures

    def _gives_up(self) -> bool:
        """Whether so many evaluations in a row found a collapse, that it ends before its end."""
        most = self.options.stop_on_collapse
        if not most or self.steps == self.total_steps:
            return False
        return self.place.agreed(self.collapsed >= most)

    def _keep_best(self, figures: Mapping[str, float]) -> None:
        wanted = self.options.best
        if wanted is None or self.work is None:
            return
        if not self.best or is_better(wanted, figures[wanted], self.best["value"]):
            self.save(self.work / BEST)
            self.best = {"step": float(self.steps), "value": figures[wanted]}

    def _watch(self) -> Watch:
        wanted = self.options.tensorboard and self.shown is not None and not self.place.rank
        events = self.shown / "tensorboard" if wanted and self.shown is not None else None
        return Watch(self.steps, self.total_steps, events)

    def _is_told(self, epoch: int) -> bool:
        """Whether the log has a line at an epoch's end: of short ones among many steps, some."""
        every = -(-self.options.log_every // self.steps_per_epoch)
        return self.options.steps is None or (epoch + 1) % every == 0

    def _line(self, epoch: int, watch: Watch) -> str:
        """The line of the log at the end of an epoch, counted from 0."""
        losses = " ".join(f"{name} {value:.4f}" for name, value in self.losses.means().items())
        if self.options.steps is None:
            place = f"epoch {epoch + 1} of {self.total_steps // self.steps_per_epoch}"
        else:
            place = f"step {self.steps} of {self.total_steps}"
        return f"{place}: {losses}; {watch.speed_told()}"

    def _opening(self, resumed: bool) -> Iterator[str]:
        options = self.options
        if resumed:
            yield f"goes on after step {self.steps} of {self.total_steps}"
            return
        averages = tuple(f"{name}." for name in self._averages)
        total = sum(not name.startswith(averages) for name in self._module.state_dict())
        for name, place in options.init_from.items():
            yield f"{name} begins with {place.name}"
        for name, of in self.begun_as.items():
            yield f"{name} begins as {of}"
        if self.start is None:
            these = "all" if len(self.missing) == total else len(self.missing)
            yield f"initialised {these} of {counted(total, 'tensor')} (init {options.init})"
        elif self.missing:
            whole = [
                name for name in self._module
                if all(f"{name}.{n}" in self.missing for n in self._module[name].state_dict())
            ]  # fmt: skip
            of_these = f", among them all of {', '.join(whole)}" if whole else ""
            yield (
                f"initialised {len(self.missing)} of {counted(total, 'tensor')}, which "
                f"{self.start.name} lacks{of_these} (init {options.init})"
            )
        if self.frozen:
            yield f"frozen: {counted(len(self.frozen), 'tensor')}"
        yield from (f"left out: {fault}" for fault in self.left_out())
        said = [f"{counted(len(files), 'image')} of {name}" if not n else f"{len(files)} of {name}"
                for n, (name, files) in enumerate(self.pictures.sets.items())]  # fmt: skip
        said = said or ["no images"]
        yield (
            f"{' and '.join(said)}, {counted(self.steps_per_epoch, 'step')} an epoch, on "
            f"{self.device}"
        )
        tests = options.images("test") if self.classes and options.has_tests() else {}
        for part, sets in (("images", self.pictures.sets), ("test images", tests)):
            found = by_class(self.classes, sets)
            what = "attribute" if "attributes" in found else "class"
            for counts in (found.get("attributes") or found.get("classes", {})).values():
                of_each = [f"{name} {count}" for name, count in counts.items() if count]
                if of_each:  # others are another set's
                    yield f"{part} by {what}, {len(of_each)}: {listed(of_each)}"
        yield from self.trainer.remarks(options)
        yield from self.trainer.opening(options, self.pictures.sets)

    def _needs(self) -> Iterator[str]:
        """How much memory will be needed, where it may be much.

        Raises:
            TrainerError: there is less.
        """
        options = self.options
        pixels = how_trained(options, self.device)["pixels"]
        if not estimates.is_worth_telling(self.networks, pixels):
            return
        needed = estimates.memory(
            self.trainer, options, self.weights, self._first(), device=self.device,
            early=self.early, last=self.total_steps - 1,
        )  # fmt: skip
        if needed is None:
            yield "how much memory is needed is not known: a loss asks for the values of tensors"
        else:
            yield estimates.must_suffice(needed, estimates.free(self.device), str(self.device))

    def _first(self) -> dict[str, torch.Tensor]:
        """The first batch of all."""
        draws = self.trainer.draws(self.options)
        sampler = Sampler(self.pictures, draws, self.seed, self.options.batch)
        return sampler.batch_at(0, 0, sampler.order(0))

    def left_out(self) -> list[str]:
        """What lies among the training images and is not used: damaged, or of a kind not read."""
        return [*self.pictures.bad, *self.options.left_out()]

    def _due(self, every: int) -> bool:
        """Whether what is done each so many steps, never where they are 0, is done now."""
        return every > 0 and (self.steps % every == 0 or self.steps == self.total_steps)

    def _translated(self, *names: str, picture: np.ndarray) -> list[np.ndarray]:
        """A picture, and what networks make of it one after the other; of one class and noise."""
        shown = [picture]
        for model in map(self.in_use, names):
            like = None
            if model.how.wants_reference:
                like = References(model, self._references(model.how))
            shown.append(self._made(model, shown[-1], "", like))
        return shown

    def _references(self, how: Translator) -> list[np.ndarray]:
        """Pictures of the target; or of the source, where none of the target are trained on."""
        name = how.target if how.target in self.pictures.sets else how.source
        return [self._picture(file) for file in self.pictures.first(name, _SHOWN)] if name else []

    def _made(
        self, model: Model, picture: np.ndarray, name: str, like: References | None
    ) -> np.ndarray:
        """What a translator makes of a picture of that name."""
        given = model.given([name], style=None if like is None else like.style(name))
        (made,) = model.made([picture], given, context=self.autocast())
        return made

    def _picture(self, file: Picture) -> np.ndarray:
        """A training image as it is shown: whole, at the size of training."""
        return self.pictures.transform.for_test(read_picture(file, self.options.channels))


def _deviation(pictures: Sequence[np.ndarray]) -> float:
    """Levels of 256: over all pixels of all pictures."""
    return float(np.concatenate([picture.ravel() for picture in pictures]).std())


def _difference(pictures: Sequence[np.ndarray]) -> float:
    """Levels of 256 by which pictures differ: the mean of each pixel's deviation."""
    size = pictures[0].shape[:2]
    same = np.stack([resized(picture, size) for picture in pictures])
    return float(same.astype(np.float32).std(axis=0).mean())


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}"
