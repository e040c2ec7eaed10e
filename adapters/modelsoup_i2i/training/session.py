"""The loop of a training: batches, logs, samples, what is told, until it ends or diverges."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelsoup import counted

from ..networks.layers import at_any_size
from ..pictures.draws import Sampler, batches
from ..pictures.images import (
    NonfiniteImageError,
    left_out,
    resized,
    to_image,
    to_tensor,
)
from ..pictures.picture import Picture, read_picture
from ..pictures.sheets import grid, save
from .state import DivergedError, State
from .watch import Report, Watch

_SHOWN = 4  # images of each domain on a sheet
_LOOKED_AT = 8  # images of each domain, whether what is made of them differs
_CONSTANT = 1.5  # levels of 256

Log = Callable[[str], None]


class Session(State):
    """A training that is carried out."""

    @property
    def shown(self) -> Path | None:
        """The folder of samples and events; None where there is no work folder either."""
        if self.work is None or self.options.samples is None:
            return self.work
        samples: Path = self.options.samples
        return samples / self.work.name

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
        was made before it was seen, such as the generators' before a discriminator's loss.

        Returns:
            the last epoch's mean losses and other figures, also reported.
        """
        resumed = self.resume()
        self.prepare()
        for line in self._opening(resumed):
            log(line)
        self.place.meet()
        watch = self._watch()
        figures: dict[str, float] = {"diverged": 0.0, **self.losses.means()}
        steps = self.batches()
        try:
            for group in watch.waiting(steps):
                epoch = self.steps // self.steps_per_epoch
                pace = self.options.pace(epoch)
                losses = self.optimise(group)
                self.losses.add(losses)
                watch.add(self.steps, {**losses, "rate": pace * self.options.lr})
                if self.steps % self.steps_per_epoch == 0:
                    log(self._line(epoch, watch))
                    figures |= self.losses.means()
                    self.losses.next_epoch()
                    if after_epoch is not None:
                        after_epoch(epoch + 1)
                if self._due(self.options.checkpoint_every or self.steps_per_epoch):
                    self.keep()
                if self.options.sheet_every and self._due(self.options.sheet_every):
                    try:
                        self.sheet()
                    except NonfiniteImageError:
                        log(f"no page of samples at step {self.steps}: they hold NaN or infinity")
                watch.tell(report, self.losses.means)
        except DivergedError:
            figures = {**self.losses.means(), "diverged": 1.0, "diverged_at": float(self.steps)}
            log(
                f"diverged: a loss or gradient was not finite at step {self.steps + 1} of "
                f"{self.total_steps}; the last finite weights are kept"
            )
        finally:
            steps.close()
            watch.close()
        figures |= {"steps": float(self.steps), "seconds_left": 0.0}
        report(1.0, figures)
        return figures

    def told(self) -> dict[str, Any]:
        """What a record should hold of the training, as plain data: with what, on what, where."""
        return {
            "images": {
                name: {"count": len(files), "xxh3_128": self.content[f"images of {name}"]}
                for name, files in self.pictures.sets.items()
            },
            "left out": self._left_out(),
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
            files = self.pictures.first(how.source, _LOOKED_AT)
            both = [self._translated(name, file=file) for file in files]
            seen, made = (_difference(own) for own in zip(*both, strict=True))
            if made < _CONSTANT < seen:
                found.append(name)
        return found

    def sheet(self) -> None:
        """Write a page of translations, if there is a work folder.

        Raises:
            NonfiniteImageError: a translation holds NaN or infinity; there is no page.
        """
        if self.shown is None or self.place.rank:
            return
        rows, labels = [], []
        translators = self.trainer.translators(self.options)
        for name, how in translators.items():
            back = [how.back] if how.back else []
            for file in self.pictures.first(how.source, _SHOWN):
                rows.append(self._translated(name, *back, file=file))
                labels.append(how.label)
        titles = ("image", "translated", "and back")[: len(rows[0])]
        folder = self.shown / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save(grid(rows, titles, labels), folder / f"step-{self.steps:07d}.png")

    def _watch(self) -> Watch:
        wanted = self.options.tensorboard and self.shown is not None and not self.place.rank
        events = self.shown / "tensorboard" if wanted and self.shown is not None else None
        return Watch(self.steps, self.total_steps, events)

    def _line(self, epoch: int, watch: Watch) -> str:
        """The line of the log at the end of an epoch, counted from 0."""
        losses = " ".join(f"{name} {value:.4f}" for name, value in self.losses.means().items())
        epochs = self.total_steps // self.steps_per_epoch
        return f"epoch {epoch + 1} of {epochs}: {losses}; {watch.speed_told()}"

    def _opening(self, resumed: bool) -> Iterator[str]:
        options = self.options
        if resumed:
            yield f"goes on after step {self.steps} of {self.total_steps}"
            return
        total = len(self._module.state_dict())
        if self.start is None:
            yield f"initialised all of {counted(total, 'tensor')} (init {options.init})"
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
        yield from (f"left out: {fault}" for fault in self._left_out())
        first, *others = self.pictures.sets.items()
        said = [f"{counted(len(first[1]), 'image')} of {first[0]}"]
        said += [f"{len(files)} of {name}" for name, files in others]
        yield (
            f"{' and '.join(said)}, {counted(self.steps_per_epoch, 'step')} an epoch, on "
            f"{self.device}"
        )
        yield from self.trainer.opening(options, self.pictures.sets)

    def _left_out(self) -> list[str]:
        """What lies among the training images and is not used: damaged, or of a kind not read."""
        folders = self.options.folders()
        rest = [said for folder in folders if (said := left_out(folder)) is not None]
        return [*self.pictures.bad, *rest]

    def _due(self, every: int) -> bool:
        return self.steps % every == 0 or self.steps == self.total_steps

    def _translated(self, *names: str, file: Picture) -> list[np.ndarray]:
        """A picture, and what the networks make of it one after the other."""
        image = self.pictures.transform.for_test(read_picture(file, self.options.channels))
        made, shown = self.placed(to_tensor(image)[None]), [image]
        with torch.no_grad(), self.autocast():
            for name in names:
                network = self._module[name]
                multiple = getattr(network, "multiple", self.trainer.multiple)
                with _in_use(network):
                    made = at_any_size(network, made, multiple)
                shown.append(to_image(made[0].float()))
        return shown


@contextmanager
def _in_use(network: nn.Module) -> Iterator[None]:
    """As it is after the training: no dropout, and statistics that are used and not moved."""
    was = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was)


def _difference(pictures: Sequence[np.ndarray]) -> float:
    """Levels of 256 by which pictures differ: the mean of each pixel's deviation."""
    size = pictures[0].shape[:2]
    same = np.stack([resized(picture, size) for picture in pictures])
    return float(same.astype(np.float32).std(axis=0).mean())


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}"
