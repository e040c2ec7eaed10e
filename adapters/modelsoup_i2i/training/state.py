"""The exact state of a training, and the step that moves it: networks, optimisers, pools.

Nothing here knows a trainer by name. A trainer tells what there is (`networks`, `players`, `draws`,
`pools`, `weights`) and, for each step, the turns that are taken in it; the state owns the rest:
device, precision, accumulation, several processes, averages, what is not finite, and the state.

A step is made with little work and memory:

- a turn's losses are functions: each is made, gone back through and freed before the next one;
- no gradients are computed for parameters that a turn does not update, and frozen ones never;
- on a CPU, an optimiser is applied within the backward pass: see `players.py`;
- on a GPU, the host never waits within a step: the device decides itself whether it updates, and
  what a step told is read some steps later.

Plain torch: a framework's checkpoints hold neither image pools nor what an exact resume needs of
them; what Lightning Fabric would bring (device, bf16, several GPUs) is three short functions here.
"""

from __future__ import annotations

import copy
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import nn

from modelsoup import ParameterError, TrainerError, digest_files, open_checkpoint
from modelsoup.torch_bridge import freeze, load_into, save_from

from ..networks.described import AVERAGED
from ..networks.devices import chosen_device
from ..pictures.cache import Pictures
from ..pictures.draws import Paired
from ..pictures.picture import files_of
from ..use.classes import classes_in
from ..use.models import Model
from .begun import files_begun_with, must_have_network, values_for, with_rows
from .classes import by_class, classes_told
from .description import Description
from .players import NonfiniteGradientError, Updates, backward
from .pool import ImagePool
from .processes import ALONE, Place
from .stage import Stage, prepare
from .turns import Batch, Loss, Turn
from .watch import Losses

STATE = "state.pt"
REMADE = "start.safetensors"
FORMAT = 5
BEHIND = 16  # steps that a GPU makes before the host reads what they told


class DivergedError(ArithmeticError):
    """A loss or gradient is not finite any more; the weights are still."""


Statistics = tuple[list[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Taken:
    """A step of which nothing was read yet.

    Attributes:
        names: of what it told.
        told: on the device: a number for each name, and whether anything was not finite, 1 or 0.
        statistics: all buffers, and what they were before it.
    """

    names: tuple[str, ...]
    told: torch.Tensor
    statistics: Statistics


class State(Stage):
    """A training of some networks, at some step.

    Attributes:
        trainer: whose.
        deployed: the networks that are used after the training.
        missing: names that the start lacked, and that were initialised.
        begun_as: networks that the start lacked, and that began with another one's weights.
        steps: how many were made.
        losses: their means over the epoch.
        recent: their means since they were last written down.
        best: the step and the value of the best evaluation, where one is kept.
        sound: the step of the last evaluation that found no collapse; 0 where there was none.
    """

    def __init__(
        self, trainer: Description, options: Any, start: Path | None, *, seed: int,
        frozen: Sequence[str] = (), work: Path | None = None, shown: Path | None = None,
        place: Place = ALONE,
    ) -> None:  # fmt: skip
        """Build the networks and load the start.

        Args:
            trainer: tells what there is.
            options: of the training.
            start: a checkpoint, or a part of one; None initialises everything.
            seed: of everything that is drawn, in [0, 2⁶³).
            frozen: names that are not trained.
            work: the folder for the state; None keeps none.
            shown: the folder for pages of samples and events; None is where the options say, or
                else the work folder.
            place: which of several processes this is.

        Raises:
            MismatchError: the start has networks of another width, block count or kind.
            TrainerError: the device is not there, or a frozen name is unknown.
            ParameterError: the data are not there, or do not fit the options.
        """
        self.images = trainer.images(options)
        pools = {
            name: ImagePool(size, (2 * seed + n + 977 * place.rank) % 2**63)
            for n, (name, size) in enumerate(trainer.pools(options).items())
        }
        super().__init__(options, trainer.weights(options, self.images), pools)
        self.trainer, self.seed = trainer, seed
        self.start, self._given = self._fitted(start, work), start
        self.frozen, self.work, self.place = tuple(frozen), work, place
        self.shown = options.shown(work) or shown or work
        self.device = chosen_device(options.device, place.rank)
        self.players = trainer.players(options)
        built = {name: network.build() for name, network in trainer.networks(options).items()}
        self._averages = trainer.averages(options)
        for name, (of, _) in self._averages.items():
            built.setdefault(name, copy.deepcopy(built[of]))
        self._module = nn.ModuleDict(built)
        self._joined = {name: one.build(built) for name, one in trainer.joined(options).items()}
        self.missing = load_into(self._module, self.start, seed=options.init)
        self._begin_with(options.init_from)
        self.begun_as = {
            name: of for name, of in trainer.begin_as(options).items()
            if self._lacks(name) and not self._lacks(of)
        }  # fmt: skip
        for name, of in self.begun_as.items():
            self._follow(name, of)
        for name, (of, _) in self._averages.items():
            self._module[name].requires_grad_(False)
            if self._lacks(name) or of in options.init_from:
                self._follow(name, of)
        begun = tuple(f"{n}." for n in (*options.init_from, *self.begun_as, *self._averages))
        self.missing = tuple(name for name in self.missing if not name.startswith(begun))
        fixed = [n for n in self._module.state_dict()
                 if any(fnmatchcase(n, pattern) for pattern in trainer.fixed(options))]  # fmt: skip
        freeze(self._module, [*self.frozen, *fixed])
        for network in self._module.values():
            prepare(network, **how_trained(options, self.device))
        known = None if start is None else classes_in(start)
        self.classes = tuple(trainer.classes(options)) or known or ()
        self.deployed = tuple(trainer.translators(options))
        self._pictures: Pictures | None = None
        self.steps = 0
        self.losses, self.recent = Losses(), Losses()
        self.best: dict[str, float] = {}
        self.sound = 0
        self._updates: dict[str, Updates] = {}
        self._taken: list[Taken] = []
        self._broken = torch.zeros((), dtype=torch.bool)

    def _fitted(self, start: Path | None, work: Path | None) -> Path | None:
        """A start, with rows for the classes that there are now, where the trainer wants such."""
        rows = self.trainer.rows(self.options)
        if start is None or not rows:
            return start
        if work is None:
            work = Path(mkdtemp())
            weakref.finalize(self, shutil.rmtree, work, ignore_errors=True)
        return with_rows(start, rows, work / REMADE, seed=self.options.init)

    def _lacks(self, network: str) -> bool:
        """Whether the start had nothing of a network, and neither had `init_from`."""
        names = self._module[network].state_dict()
        lacking = all(f"{network}.{name}" in self.missing for name in names)
        return lacking and network not in self.options.init_from

    def _must_have_begun(self, network: str) -> None:
        """Raise a TrainerError for a network that nobody trains and nothing was loaded into."""
        own = any(True for _ in self._module[network].parameters())
        if own and network not in self._averages and self._lacks(network):
            whose = self.trainer.begin_as(self.options).get(network)
            other = f", or of {whose}" if whose else ""
            raise TrainerError(
                f"{network} is not trained here, so it must begin with weights: of a start or of "
                f"init_from{other}"
            )

    def _follow(self, network: str, of: str) -> None:
        """Give a network what another one has under the same names."""
        given = self._module[of].state_dict()
        own = self._module[network].state_dict()
        self._module[network].load_state_dict({n: given.get(n, value) for n, value in own.items()})

    def _begin_with(self, given: Mapping[str, Path]) -> None:
        """Give networks the weights of others; frozen ones are the start's."""
        must_have_network(given, list(self.trainer.networks(self.options)))
        for network, place in given.items():
            own = self._module[network].state_dict()
            kept = [n for n in self.frozen if n.startswith(f"{network}.")]
            if kept:
                raise ParameterError(
                    f"init_from has {network!r}, of which {kept[0]} is frozen and stays the start's"
                )
            shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
            remade = {n.partition(".")[2] for n in self.trainer.rows(self.options)
                      if n.startswith(f"{network}.")}  # fmt: skip
            found = values_for(network, place, shapes, rows=remade, seed=self.options.init)
            for name, values in found.items():
                dtype = np.float32 if own[name].is_floating_point() else None
                own[name].copy_(torch.from_numpy(np.array(values, dtype)))

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks by name, averages and those that are joined of others too."""
        return {**dict(self._module.items()), **self._joined}

    def in_use(self, name: str) -> Model:
        """A translator, with the averages of its weights where there are such."""
        own = {n: self._module.get_submodule(n + AVERAGED if n + AVERAGED in self._averages else n)
               for n in self.trainer.networks(self.options)}  # fmt: skip
        joined = self.trainer.joined(self.options).get(name)
        if joined is None:
            module = own[name]
        elif any(part + AVERAGED in self._averages for part in joined.parts):
            module = joined.build(own)
        else:
            module = self._joined[name]
        return Model(name, self.trainer.translators(self.options)[name], module, self.classes)

    @property
    def updates(self) -> dict[str, Updates]:
        """Who updates each player's networks; made when first asked for."""
        self.begin()
        return self._updates

    @property
    def pictures(self) -> Pictures:
        """The training images; damaged ones are told when this is first asked for."""
        if self._pictures is None:
            options = self.options
            self._pictures = Pictures(
                self.images, options.transform(), cache_bytes=options.cache_mb << 20,
                threads=max(options.threads, 1), on_bad_image=options.on_bad_image,
                channels=options.channels,
                aligned=[d.sets for d in self.trainer.draws(options) if isinstance(d, Paired)],
            )  # fmt: skip
        return self._pictures

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each image of the largest set is seen once."""
        options = self.options
        seen: int = options.batch * options.accumulate * self.place.world
        return -(-self.pictures.length // seen)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        epochs: int = self.options.epochs + self.options.decay_epochs
        return self.options.steps or self.steps_per_epoch * epochs

    @property
    def early(self) -> bool:
        """Whether optimisers are applied within the backward pass: see `players.py`."""
        plain = self.options.accumulate == 1 and self.place.world == 1
        return plain and self.device.type == "cpu"

    @property
    def behind(self) -> int:
        """Steps that may be made before what they told is read; 0 where reading costs nothing."""
        return 0 if self.device.type == "cpu" else BEHIND

    @property
    def effort(self) -> float:
        """Multiplications of a pass through all networks, roughly: images are halved twice."""
        pixels = how_trained(self.options, self.device)["pixels"]
        made: float = sum(p.numel() for p in self._module.parameters()) * pixels / 16
        return made

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in a network's place, such as a quantised one.

        Raises:
            TrainerError: there is no such network, or steps were made.
        """
        if name not in self.networks:
            raise TrainerError(
                f"no network is called {name!r} (there are {', '.join(self.networks)})"
            )
        if self._updates:
            raise TrainerError(f"{name} can be replaced before the first step only")
        # What traces or wraps it wants one plain pass.
        prepare(module, plain=True)
        if name in self._joined:
            self._joined[name] = module
        else:
            self._module[name] = module

    # The step.

    def step(self, *drawn: torch.Tensor) -> dict[str, float]:
        """One optimisation step on what the trainer draws, in its order.

        Images are N × C × H × W in [−1, 1]. It is made at the rate of the epoch that it falls into,
        by `steps`.

        Returns:
            each loss without its weight, by name; and of a turn with several the weighted sum, by
            the turn's name.

        Raises:
            DivergedError: a loss or gradient is not finite; all weights still are.
        """
        names = [name for draw in self.trainer.draws(self.options) for name in draw.names]
        return self.optimise([dict(zip(names, drawn, strict=True))])

    def optimise(self, group: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
        """One step whose gradients are the mean over several batches, and what it told."""
        self.take(group)
        *_, (_, losses) = self.read()
        return losses

    def take(self, group: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """One step, which `read` must follow: at once where `behind` is 0, else some steps later.

        Of a step that fails neither a gradient nor a moved statistic is left to the next one.

        Raises:
            DivergedError: `behind` is 0, and a loss or gradient is not finite.
        """
        self.begin()
        statistics = self._statistics()
        try:
            told = self._step(group)
        except BaseException:
            for updates in self._updates.values():
                updates.forget()
            _put_back(statistics)
            raise
        flag = self._broken.to(told[1].dtype)
        self._taken.append(Taken(told[0], torch.cat([told[1], flag[None]]), statistics))
        self.steps += 1

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """What was told by each step that was made since the last reading, and its number, from 1.

        On a GPU this waits for the last of them, and is one copy from there. From a step on in
        which something was not finite the device has updated nothing more.

        Raises:
            DivergedError: at such a step, which and the ones after it count as not made.
        """
        taken, self._taken = self._taken, []
        numbers = torch.cat([one.told for one in taken]).tolist() if taken else []
        first = self.steps - len(taken)
        for number, one in enumerate(taken, first + 1):
            *told, broken = numbers[: len(one.names) + 1]
            del numbers[: len(one.names) + 1]
            if broken:
                self.steps = number - 1
                _put_back(one.statistics)
                self._broken.zero_()
                raise DivergedError
            yield number, dict(zip(one.names, told, strict=True))

    def _step(
        self, group: Sequence[Mapping[str, torch.Tensor]]
    ) -> tuple[tuple[str, ...], torch.Tensor]:
        """Names and, on the device, means of what is told."""
        pace = self.options.pace(self.steps // self.steps_per_epoch)
        for updates in self._updates.values():
            updates.set_pace(pace)
        batches = [
            Batch({name: self.placed(values) for name, values in drawn.items()}) for drawn in group
        ]
        seen: list[dict[str, torch.Tensor]] = [{} for _ in batches]
        with self._noise():
            for turn in self.trainer.turns(self.options, self.steps):
                self._take(turn, batches, seen)
        names = tuple(seen[0])
        return names, torch.stack([torch.stack([s[n] for n in names]) for s in seen]).mean(0)

    def settle(self, group: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Have batches go through all losses, of which statistics move and nothing else does."""
        self.begin()
        pools = {name: pool.state_dict() for name, pool in self.pools.items()}
        with self._noise(), self.autocast():
            for drawn in group:
                batch = Batch({name: self.placed(values) for name, values in drawn.items()})
                for turn in self.trainer.turns(self.options, self.total_steps - 1):
                    for loss in turn.losses:
                        loss(self, batch)
        for name, pool in self.pools.items():
            pool.load_state_dict(pools[name], self.device)
        for name, (of, _) in self._averages.items():
            buffers = dict(self._module[of].named_buffers())
            for key, own in self._module[name].named_buffers():
                own.copy_(buffers[key])

    def _statistics(self) -> Statistics:
        own = list(self._module.buffers())
        before = [torch.empty_like(buffer) for buffer in own]
        if own:
            torch._foreach_copy_(before, own)
        return own, before

    @contextmanager
    def _noise(self) -> Iterator[None]:
        """What networks and losses draw themselves, as dropout does, is drawn again if resumed.

        Torch's generators are seeded by the seed, the step and the process; the caller's come back.
        """
        gpus = [] if self.device.type == "cpu" else [self.device.index]
        place = np.random.SeedSequence((self.seed, self.steps, self.place.rank))
        with torch.random.fork_rng(devices=gpus):
            # torch.manual_seed would seed every GPU, also those that are not forked here.
            for generator in (
                torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)
            ):  # fmt: skip
                generator.manual_seed(int(place.generate_state(1, np.uint64)[0] >> 1))
            yield

    def _take(
        self, turn: Turn, batches: Sequence[Batch], seen: Sequence[dict[str, torch.Tensor]]
    ) -> None:
        players = [self._updates[name] for name in turn.players]
        share, early = 1 / len(batches), any(player.early for player in players)
        own: list[torch.Tensor] = []
        for batch, told in zip(batches, seen, strict=True):
            for n, loss in enumerate(turn.losses):
                objective = self._objective(loss, batch, turn, told)
                own.append(objective.detach())
                # Early updates cannot be taken back: the loss is looked at before.
                if early and not told.get(turn.name, own[-1]).isfinite():
                    raise DivergedError
                try:
                    backward(objective * share, players, complete=n + 1 == len(turn.losses))
                except NonfiniteGradientError:
                    raise DivergedError from None
                del objective
        for player in players:
            self._apply(player, own)
        self._average(turn.players)

    def _objective(
        self, loss: Loss, batch: Batch, turn: Turn, told: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The weighted sum of a loss's terms, which are told."""
        with self.autocast():
            terms = loss(self, batch)
        weighted = [self.weights.get(name, 1.0) * value for name, value in terms.items()]
        objective = torch.stack(weighted).sum()
        for name, value in terms.items():
            told[name] = value.detach()
        if len(turn.losses) > 1 or len(terms) > 1:
            told[turn.name] = told.get(turn.name, 0) + objective.detach()
        return objective

    def _apply(self, updates: Updates, losses: Sequence[torch.Tensor]) -> None:
        if updates.early:
            try:
                updates.apply()
            except NonfiniteGradientError:
                raise DivergedError from None
            return
        # All processes decide alike: one that stopped alone would leave the others waiting.
        worst = torch.stack(list(losses)).sum()
        gradients = [p.grad for p in updates.parameters.values() if p.grad is not None]
        self.place.average([worst, *gradients])
        finite = worst.isfinite() & updates.finite()
        if self.behind:
            self._broken |= ~finite
            updates.apply(unless=self._broken)
        elif finite:
            updates.apply()
        else:
            raise DivergedError

    def _average(self, players: Sequence[str]) -> None:
        """Move the averages of what was updated: old · ema + new · (1 − ema)."""
        moved = {name for player in players for name in self.players[player].networks}
        with torch.no_grad():
            for name, (of, ema) in self._averages.items():
                if of not in moved:
                    continue
                values = self._module[of].state_dict()
                mixed: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
                for key, average in self._module[name].state_dict().items():
                    if ema and average.is_floating_point() and key in self._parameters[of]:
                        mixed[0].append(average)
                        mixed[1].append(values[key])
                    else:  # a plain copy; and statistics and counts are the network's own
                        average.copy_(values[key])
                if not mixed[0]:
                    continue
                if self.behind:  # a step that is not finite moves no average
                    moves = torch._foreach_sub(mixed[1], mixed[0])
                    torch._foreach_mul_(moves, (1 - ema) * ~self._broken)
                    torch._foreach_add_(mixed[0], moves)
                else:
                    torch._foreach_lerp_(*mixed, 1 - ema)

    @cached_property
    def _parameters(self) -> dict[str, set[str]]:
        return {
            name: {n for n, _ in network.named_parameters()}
            for name, network in self._module.items()
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the training."""
        wanted = self.options.precision == "bf16"
        manager: AbstractContextManager[Any] = torch.autocast(
            self.device.type, torch.bfloat16, enabled=wanted
        )
        return manager

    def placed(self, values: torch.Tensor) -> torch.Tensor:
        """What was drawn on the device, images in the memory layout of the training."""
        wanted = self.options.channels_last and values.ndim == 4
        layout = torch.channels_last if wanted else torch.contiguous_format
        if self.device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()  # else the host waits until all before it is done
        return values.to(self.device, non_blocking=True, memory_format=layout)

    def begin(self) -> None:
        """Before the first step: the device, and who updates what."""
        if self._updates:
            return
        options = self.options
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self._module.to(self.device, memory_format=layout).train()
        # What nobody moves is as in use: it has no gradients, and its statistics stay.
        moved = {name for player in self.players.values() for name in player.networks}
        for name, network in self._module.items():
            if hasattr(network, "lay_out"):
                network.lay_out()
            if name not in moved:
                self._must_have_begun(name)
                network.requires_grad_(False)
            if not any(parameter.requires_grad for parameter in network.parameters()):
                network.eval()
            self.put(name, network, compiled=options.compile)
        for name, network in self._joined.items():
            self.put(name, network, compiled=options.compile)
        early = self.early
        several = {
            name for turn in self.trainer.turns(options, 0) if len(turn.losses) > 1
            for name in turn.players
        }  # fmt: skip
        for name, player in self.players.items():
            own = {
                n: p for n, p in self._module.named_parameters()
                if p.requires_grad and n.partition(".")[0] in player.networks
            }  # fmt: skip
            self._updates[name] = Updates(player, own, early=early, summed=name in several)
        self._broken = torch.zeros((), dtype=torch.bool, device=self.device)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """All that decides the steps to come, on the CPU or not; `load_state_dict` takes it.

        Of every step that was made, `read` has read what it told.
        """
        return {
            "format": FORMAT,
            "steps": self.steps,
            "networks": {name: net.state_dict() for name, net in self._module.items()},
            "optimisers": {name: updates.state_dict() for name, updates in self.updates.items()},
            "losses": self.losses.state_dict(),
            "recent": self.recent.state_dict(),
            "best": dict(self.best),
            "sound": self.sound,
            "pools": self.place.gathered(
                {name: pool.state_dict() for name, pool in self.pools.items()}
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, updates in self.updates.items():
            updates.load_state_dict(state["optimisers"][name])
        for name, network in self._module.items():
            network.load_state_dict(state["networks"][name])
        for name, pool in self.pools.items():
            pool.load_state_dict(state["pools"][self.place.rank][name], self.device)
        self.losses.load_state_dict(state["losses"])
        self.recent.load_state_dict(state["recent"])
        self.best = dict(state["best"])
        self.sound = state["sound"]
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
        """Write the checkpoint, one safetensors file with all networks."""
        written = self.trainer.written(self.options)
        save_from(
            nn.ModuleDict({name: self._module[of] for name, of in written.items()}),
            path,
            like=self.start,
            frozen=self.frozen,
            metadata=classes_told(self.classes),
        )

    def _training(self) -> dict[str, Any]:
        """What a state must agree with to be gone on with."""
        return {
            "trainer": f"{self.trainer.name} {self.trainer.version}",
            **self.options.decisive(), "seed": self.seed, "frozen": list(self.frozen),
            **self.content, **by_class(self.classes, self.images),
        }  # fmt: skip

    @cached_property
    def content(self) -> dict[str, str]:
        """Digests of what is read: names do not tell whether images or the start were changed."""
        start = () if self._given is None else open_checkpoint(self._given).files
        images = {f"images of {name}": files_of(own) for name, own in self.images.items()}
        begun = {
            f"init_from of {name}": files_begun_with({name: place})
            for name, place in self.options.init_from.items()
        }
        every = {**images, "start": start, **begun}
        return {what: digest_files(files) for what, files in every.items()}


def _put_back(statistics: Statistics) -> None:
    """A pass moves statistics before it is known to be finite."""
    for own, before in zip(*statistics, strict=True):
        own.copy_(before)


def how_trained(options: Any, device: torch.device) -> dict[str, Any]:
    """What `stage.prepare` tells networks of a training."""
    height, width = options.transform().crop
    return {
        "plain": device.type != "cpu" or options.compile, "precision": options.precision,
        "pixels": options.batch * height * width,
    }  # fmt: skip
