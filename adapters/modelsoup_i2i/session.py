"""One training in progress: networks, their updates, pools, the step, its exact state, the loop.

Plain torch: the loop is a page long, and a framework's checkpoints hold neither image pools nor
what an exact resume needs of them; what Lightning Fabric would bring (device, bf16, several GPUs)
is three short functions here.

The step is Zhu et al.'s, with the same results but for rounding, and less work:

- each generator translates the images of both domains in one pass: its fakes and its identity
  images (InstanceNorm treats each image alone); a discriminator likewise sees real and fake images;
- the backward pass is made for each way, A to B and back, before the other way's graph exists;
- no gradients are computed for parameters that the step does not update, and frozen ones never;
- on a CPU, wide generators' blocks are Winograd's: see `winograd.py`; and for all but small images,
  what follows a convolution (norm, ReLU, padding) is computed again in the backward pass instead of
  being kept: see `ResnetGenerator`;
- on a CPU, Adam is applied within the backward pass: see `updates.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from modelsoup import TrainerError, counted, digest_files, open_checkpoint
from modelsoup.torch_bridge import freeze, load_into, save_from

from .data import Domains, Pictures, Sampler, batches, folders_of
from .images import NonfiniteImageError, left_out, read_image, resized, to_image, to_tensor
from .losses import LossWeights, deceive, distance, judge
from .networks import PatchDiscriminator, ResnetGenerator, at_any_size
from .pool import ImagePool
from .processes import ALONE, Place, chosen_device
from .shapes import DISCRIMINATORS, GENERATORS, must_fit
from .sheets import grid, save
from .updates import NonfiniteGradientError, Updates
from .watch import Losses, Report, Watch

if TYPE_CHECKING:
    from .cyclegan import CycleGANOptions

STATE = "state.pt"
FORMAT = 3
_SMALL = 96 * 96  # pixels of a batch
_WINOGRAD = 128  # channels from which it is the faster one
_SHOWN = 4  # images of each domain on a sheet
_LOOKED_AT = 8  # images of each domain, whether what is made of them differs
_CONSTANT = 1.5  # levels of 256

Log = Callable[[str], None]
Batch = tuple[torch.Tensor, torch.Tensor]


class DivergedError(ArithmeticError):
    """A loss or gradient is not finite any more; the weights are still."""


class Session:
    """A training of four networks, at some step.

    Attributes:
        networks: `G_A`, `G_B`, `D_A` and `D_B`.
        deployed: those that are used after the training.
        missing: names that the start lacked, and that were initialised.
        steps: how many were made.
        pictures: the training images; decoded when they are first asked for.
    """

    deployed: tuple[str, ...] = GENERATORS

    def __init__(
        self, options: CycleGANOptions, start: Path | None, *, seed: int,
        frozen: Sequence[str] = (), work: Path | None = None, place: Place = ALONE,
    ) -> None:  # fmt: skip
        """Build the networks and load the start.

        Args:
            options: of the training.
            start: a checkpoint, or a part of one; None initialises everything.
            seed: of the order of images, crops, flips and pools, in [0, 2⁶³).
            frozen: names that are not trained.
            work: the folder for state and sheets; None keeps nothing.
            place: which of several processes this is.

        Raises:
            MismatchError: the start has networks of another width, block count or kind.
            TrainerError: the device is not there, or a frozen name is unknown.
            ParameterError: the data are not there, or do not fit the options.
        """
        generator, discriminator = options.generator(), options.discriminator()
        if start is not None:
            shapes = {name: info.shape for name, info in open_checkpoint(start).tensors.items()}
            must_fit(shapes, generator, discriminator, str(start))
        self.options, self.start, self.seed = options, start, seed
        self.frozen, self.work, self.place = tuple(frozen), work, place
        self.device = chosen_device(options.device, place)
        self._module = nn.ModuleDict(
            {name: ResnetGenerator(generator) for name in GENERATORS}
            | {name: PatchDiscriminator(discriminator) for name in DISCRIMINATORS}
        )
        self.missing = load_into(self._module, start, seed=options.init)
        freeze(self._module, self.frozen)
        height, width = options.transform().crop
        plain = self.device.type != "cpu" or options.compile
        for name in GENERATORS:
            network = self._module[name]
            # Below that, weights are most of what is held, and computing again saves little.
            network.recompute = not plain and options.batch * height * width > _SMALL
            network.winograd = (
                not plain and options.precision == 32 and 4 * options.width >= _WINOGRAD
            )
        self.domains: Domains = options.domains()
        self.weights: LossWeights = options.weights(self.domains)
        self._pictures: Pictures | None = None
        self.steps = 0
        self.losses = Losses()
        self._updates: dict[str, Updates] = {}
        self._calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.pools = {
            domain: ImagePool(options.pool_size, (2 * seed + n + 977 * place.rank) % 2**63)
            for n, domain in enumerate("AB")
        }

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The four networks by name."""
        return dict(self._module.items())

    @property
    def updates(self) -> dict[str, Updates]:
        """Who updates the generators (`G`), `D_A` and `D_B`; made when first asked for."""
        self._prepare()
        return self._updates

    @property
    def pictures(self) -> Pictures:
        """The training images; damaged ones are told when this is first asked for."""
        if self._pictures is None:
            options = self.options
            self._pictures = Pictures(
                self.domains, options.transform(), cache_bytes=options.cache_mb << 20,
                threads=max(options.threads, 1), on_bad_image=options.on_bad_image,
                channels=options.channels,
            )  # fmt: skip
        return self._pictures

    @property
    def shown(self) -> Path | None:
        """The folder of samples and events; None where there is no work folder either."""
        if self.work is None or self.options.samples is None:
            return self.work
        return self.options.samples / self.work.name

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each image of the larger domain is seen once."""
        options = self.options
        seen = options.batch * options.accumulate * self.place.world
        return -(-self.pictures.length // seen)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.steps_per_epoch * (self.options.epochs + self.options.decay_epochs)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in a network's place, such as a quantised one.

        Raises:
            TrainerError: there is no such network, or steps were made.
        """
        if name not in self._module:
            raise TrainerError(
                f"no network is called {name!r} (there are {', '.join(self._module)})"
            )
        if self._updates:
            raise TrainerError(f"{name} can be replaced before the first step only")
        if isinstance(module, ResnetGenerator):
            # What traces or wraps it wants one plain pass.
            module.recompute = module.winograd = False
        self._module[name] = module

    # The step.

    def step(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
        """One optimisation step on images of X and Y: N × C × H × W in [−1, 1].

        It is made at the rate of the epoch that it falls into, by `steps`.

        Returns:
            each loss without its weight: `gan_a`, `gan_b`, `cycle_a`, `cycle_b`, `identity_a`,
            `identity_b`, `judge_a`, `judge_b`; and `generator`, the weighted sum that the
            generators minimise.

        Raises:
            DivergedError: a loss or gradient is not finite; all weights still are.
        """
        return self.optimise([(a, b)])

    def optimise(self, group: Sequence[Batch]) -> dict[str, float]:
        """One step whose gradients are the mean over several batches.

        Of a step that fails no gradient is left to the next one.
        """
        try:
            return self._optimise(group)
        except BaseException:
            for updates in self._updates.values():
                updates.forget()
            raise

    def _optimise(self, group: Sequence[Batch]) -> dict[str, float]:
        rate = self.rate(self.steps // self.steps_per_epoch)
        for updates in self.updates.values():
            updates.set_rate(rate)
        early, share = self.updates["G"].early, 1 / len(group)
        seen: list[dict[str, torch.Tensor]] = []
        kept = []
        for images in group:
            a, b = (self._placed(side) for side in images)
            losses: dict[str, torch.Tensor] = {}
            fakes = []
            # One way's graph is freed before the other's is made.
            for letter, source, target in (("a", a, b), ("b", b, a)):
                with self._autocast():
                    terms, fake = self._translate(letter, source, target)
                weighted = [getattr(self.weights, name) * loss for name, loss in terms.items()]
                objective = torch.stack(weighted).sum()
                fakes.append(fake.detach())
                losses |= {name: loss.detach() for name, loss in terms.items()}
                losses["generator"] = losses.get("generator", 0) + objective.detach()
                # Early updates cannot be taken back: the loss is looked at before.
                if early and not losses["generator"].isfinite():
                    raise DivergedError
                del terms, fake, weighted
                self._backward("G", objective * share, complete=letter == "b")
                del objective
            seen.append(losses)
            kept.append((a, b, *fakes))
        self._apply("G", seen)
        for index, (a, b, fake_b, fake_a) in enumerate(kept):
            # D_A judges images of B, and D_B those of A.
            for name, letter, real, fake in (("D_A", "B", b, fake_b), ("D_B", "A", a, fake_a)):
                with self._autocast():
                    loss = self._judge(name, real, self.pools[letter].query(fake))
                term = f"judge_{name[-1].lower()}"
                seen[index][term] = loss.detach()
                if early and not loss.isfinite():
                    raise DivergedError
                self._backward(name, loss * (share * getattr(self.weights, term)))
        for name in DISCRIMINATORS:
            self._apply(name, seen)
        self.steps += 1
        names = list(seen[0])
        means = torch.stack([torch.stack([s[name] for s in seen]).mean() for name in names])
        return dict(zip(names, means.tolist(), strict=True))

    def _translate(
        self, letter: str, source: torch.Tensor, target: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses of one way, from A to B (`a`) or back (`b`), and the translated images."""
        forth, back = GENERATORS if letter == "a" else GENERATORS[::-1]
        losses = {}
        if self.weights.identity_a or self.weights.identity_b:
            fake, same = self._both(forth, source, target)
            losses[f"identity_{letter}"] = distance(same, target)
        else:
            fake = self._call(forth, source)
        losses[f"cycle_{letter}"] = distance(self._call(back, fake), source)
        losses[f"gan_{letter}"] = deceive(self._call(f"D_{letter.upper()}", fake))
        return losses, fake

    def _judge(self, name: str, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return judge(*self._both(name, real, fake))

    def _both(
        self, name: str, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A network's results for two sets of images, in one pass if they have one size."""
        if first.shape[1:] != second.shape[1:]:
            return self._call(name, first), self._call(name, second)
        made = self._call(name, torch.cat([first, second.to(first.dtype)]))
        return made[: len(first)], made[len(first) :]

    def _call(self, name: str, images: torch.Tensor) -> torch.Tensor:
        call = self._calls[name]
        return at_any_size(call, images) if name in GENERATORS else call(images)

    def _backward(self, name: str, loss: torch.Tensor, *, complete: bool = True) -> None:
        try:
            self._updates[name].backward(loss, complete=complete)
        except NonfiniteGradientError:
            raise DivergedError from None

    def _apply(self, name: str, seen: Sequence[Mapping[str, torch.Tensor]]) -> None:
        updates = self._updates[name]
        if updates.early:
            return
        # All processes decide alike: one that stopped alone would leave the others waiting.
        worst = torch.stack([loss for losses in seen for loss in losses.values()]).sum()
        gradients = [p.grad for p in updates.parameters.values() if p.grad is not None]
        self.place.average([worst, *gradients])
        if not worst.isfinite():
            raise DivergedError
        try:
            updates.apply()
        except NonfiniteGradientError:
            raise DivergedError from None

    def _autocast(self) -> AbstractContextManager[Any]:
        wanted = self.options.precision == "bf16"
        manager: AbstractContextManager[Any] = torch.autocast(
            self.device.type, torch.bfloat16, enabled=wanted
        )
        return manager

    def _placed(self, images: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=True, memory_format=layout)

    def _prepare(self) -> None:
        """Before the first step: the device, and who updates what."""
        if self._updates:
            return
        options = self.options
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self._module.to(self.device, memory_format=layout).train()
        for name, network in self._module.items():
            if isinstance(network, ResnetGenerator):
                network.lay_out()
            self._calls[name] = torch.compile(network) if options.compile else network
        early = self.device.type == "cpu" and options.accumulate == 1 and self.place.world == 1
        for name, prefixes in (("G", GENERATORS), ("D_A", ("D_A",)), ("D_B", ("D_B",))):
            own = {
                n: p for n, p in self._module.named_parameters()
                if p.requires_grad and n.partition(".")[0] in prefixes
            }  # fmt: skip
            self._updates[name] = Updates(own, early=early, summed=name == "G")

    # State.

    def state_dict(self) -> dict[str, Any]:
        """All that decides the steps to come, on the CPU or not; `load_state_dict` takes it."""
        return {
            "format": FORMAT,
            "steps": self.steps,
            "networks": {name: net.state_dict() for name, net in self._module.items()},
            "adam": {name: updates.state_dict() for name, updates in self.updates.items()},
            "losses": self.losses.state_dict(),
            "pools": self.place.gathered(
                {name: pool.state_dict() for name, pool in self.pools.items()}
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, updates in self.updates.items():
            updates.load_state_dict(state["adam"][name])
        for name, network in self._module.items():
            network.load_state_dict(state["networks"][name])
        for name, pool in self.pools.items():
            pool.load_state_dict(state["pools"][self.place.rank][name], self.device)
        self.losses.load_state_dict(state["losses"])
        self.steps = state["steps"]

    def keep(self) -> None:
        """Write the state into the work folder, all or nothing, in the place of the last one."""
        state = self.state_dict()
        if self.work is None or self.place.rank:
            return
        partial = self.work / f".{STATE}.partial"
        with partial.open("wb") as file:
            torch.save({**state, "training": self._training()}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.work / STATE)

    def resume(self) -> bool:
        """Go on from the state in the work folder, if there is one.

        Raises:
            TrainerError: it is damaged, or is of a training with other options; the message lists
                those.
        """
        path = None if self.work is None else self.work / STATE
        if path is None or not path.exists():
            return False
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            kept, own = state.pop("training"), self._training()
            if state["format"] != FORMAT:
                raise TrainerError(f"{path} is of another version: remove it to begin again")
        except TrainerError:
            raise
        except Exception as error:  # whatever torch's unpickler meets in a damaged file
            raise TrainerError(f"{path} is damaged: remove it to begin again ({error})") from error
        changed = [
            f"{name} {kept.get(name)!r} → {own.get(name)!r}"
            for name in sorted({*kept, *own}) if kept.get(name) != own.get(name)
        ]  # fmt: skip
        if changed:
            raise TrainerError(
                f"{path} is of a training with other options, which cannot be gone on with: "
                f"{', '.join(changed)}"
            )
        self.load_state_dict(state)
        return True

    def save(self, path: Path) -> None:
        """Write the checkpoint, one safetensors file with the four networks."""
        save_from(self._module, path, like=self.start, frozen=self.frozen)

    def _training(self) -> dict[str, Any]:
        """What a state must agree with to be gone on with."""
        return {
            **self.options.decisive(), "seed": self.seed, "frozen": list(self.frozen),
            **self._content,
        }  # fmt: skip

    @cached_property
    def _content(self) -> dict[str, str]:
        """Digests of what is read: names do not tell whether images or the start were changed."""
        start = () if self.start is None else open_checkpoint(self.start).files
        read = {"images of X": self.domains.a, "images of Y": self.domains.b, "start": start}
        return {what: digest_files(files) for what, files in read.items()}

    # The loop.

    def batches(self) -> Generator[list[Batch], None, None]:
        """The batches of each step that is still to come."""
        options, world = self.options, self.place.world
        per_epoch, group = self.steps_per_epoch, options.accumulate

        def places() -> Iterator[tuple[int, int]]:
            for step in range(self.steps, self.total_steps):
                epoch, within = divmod(step, per_epoch)
                for n in range(group):
                    yield epoch, ((within * group + n) * world + self.place.rank) * options.batch

        sampler = Sampler(self.pictures, self.seed, options.batch)
        single = batches(sampler, places(), options.threads)
        try:
            for first in single:
                yield [first, *(next(single) for _ in range(group - 1))]
        finally:
            single.close()

    def rate(self, epoch: int) -> float:
        """The learning rate during an epoch, counted from 0; after the last one it stays."""
        options = self.options
        beyond = min(max(0, epoch + 1 - options.epochs), options.decay_epochs)
        return options.lr * (1 - beyond / (options.decay_epochs + 1))

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
        self._prepare()
        for line in self._opening(resumed):
            log(line)
        self.place.meet()
        watch = Watch(self)
        figures: dict[str, float] = {"diverged": 0.0, **self.losses.means()}
        steps = self.batches()
        try:
            for group in watch.waiting(steps):
                epoch = self.steps // self.steps_per_epoch
                watch.add(self.optimise(group), self.rate(epoch))
                if self.steps % self.steps_per_epoch == 0:
                    log(watch.line(epoch))
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
                watch.tell(report)
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
        content, pictures = self._content, self.pictures
        return {
            "images": {
                name: {"count": len(files), "xxh3_128": content[f"images of {name}"]}
                for name, files in (("X", pictures.a), ("Y", pictures.b))
            },
            "left out": self._left_out(),
            "balance": self.options.degree(self.domains),
            "loss weights": asdict(self.weights),
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
        for name, files in ((GENERATORS[0], self.pictures.a), (GENERATORS[1], self.pictures.b)):
            both = [self._translated(name, file=file) for file in files[:_LOOKED_AT]]
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
        pictures = self.pictures
        rows, labels = [], []
        for name, back, files, label in (
            ("G_A", "G_B", pictures.a, "A to B"), ("G_B", "G_A", pictures.b, "B to A")
        ):  # fmt: skip
            for file in files[:_SHOWN]:
                rows.append(self._translated(name, back, file=file))
                labels.append(label)
        folder = self.shown / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        page = grid(rows, ("image", "translated", "and back"), labels)
        save(page, folder / f"step-{self.steps:07d}.png")

    def _opening(self, resumed: bool) -> Iterator[str]:
        pictures, options = self.pictures, self.options
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
        yield (
            f"{counted(len(pictures.a), 'image')} of X and {len(pictures.b)} of Y, "
            f"{counted(self.steps_per_epoch, 'step')} an epoch, on {self.device}"
        )
        if options.imbalance is not None or options.count_b is not None:
            yield "images of Y: " + ", ".join(path.name for path in pictures.b)

    def _left_out(self) -> list[str]:
        """What lies among the training images and is not used: damaged, or of a kind not read."""
        options = self.options
        folders = folders_of(options.data, options.data_a, options.data_b)
        rest = [said for folder in folders if (said := left_out(folder)) is not None]
        return [*self.pictures.bad, *rest]

    def _due(self, every: int) -> bool:
        return self.steps % every == 0 or self.steps == self.total_steps

    def _translated(self, *names: str, file: Path) -> list[np.ndarray]:
        """A picture, and what the networks make of it one after the other."""
        image = self.pictures.transform.for_test(read_image(file, self.options.channels))
        made, shown = self._placed(to_tensor(image)[None]), [image]
        with torch.no_grad(), self._autocast():
            for name in names:
                made = at_any_size(self._module[name], made)
                shown.append(to_image(made[0].float()))
        return shown


def _difference(pictures: Sequence[np.ndarray]) -> float:
    """Levels of 256 by which pictures differ: the mean of each pixel's deviation."""
    size = pictures[0].shape[:2]
    same = np.stack([resized(picture, size) for picture in pictures])
    return float(same.astype(np.float32).std(axis=0).mean())


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}"
