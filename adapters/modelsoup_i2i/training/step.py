"""The step of a training: turns, gradients, updates, averages, and what is not finite.

A step is made with little work and memory:

- a turn's losses are functions: each is made, gone back through and freed before the next one;
- no gradients are computed for parameters that a turn does not update, and frozen ones never;
- on a CPU, an optimiser is applied within the backward pass: see `players.py`;
- on a GPU, the host never waits within a step: the device decides itself whether it updates, and
  what a step told is read some steps later. So a step can be replayed: see `graphs.py`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from ..pictures.augmentation import adapted
from . import compiling
from .cast import Cast
from .graphs import Drawn, Told, UnrecordableError, kind_of
from .players import NonfiniteGradientError, Updates, backward
from .stage import must_be_there
from .turns import Batch, Loss, Turn


class DivergedError(ArithmeticError):
    """A loss or gradient is not finite any more; the weights are still."""


Statistics = list[tuple[list[torch.Tensor], torch.Tensor]]
"""For each dtype tensors, and all of their values in one."""


@dataclass(frozen=True)
class Taken:
    """A step of which nothing was read yet.

    Attributes:
        names: of what it told.
        told: on the device: a number for each name, and whether anything was not finite, 1 or 0.
    """

    names: tuple[str, ...]
    told: torch.Tensor


class Steps(Cast):
    """A training that can be moved on by steps.

    Attributes:
        compiled: the networks that are; None where it was not tried. Of a training that goes on
            those that were before, and no others.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        """As `Cast`."""
        super().__init__(*given, **named)
        self.compiled: tuple[str, ...] | None = None
        self._looked = False
        self._news: list[str] = []
        self._steps = 0
        self._taken: list[Taken] = []

    @property
    def steps(self) -> int:
        """How many were made."""
        if self.recordings is not None and self.recordings.recording:
            raise UnrecordableError("a loss asks which step it is, which `turns` is told")
        return self._steps

    @steps.setter
    def steps(self, made: int) -> None:
        self._steps = made

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

    def news(self) -> Iterator[str]:
        """What there is to say of how steps are made, once."""
        while self._news:
            yield self._news.pop(0)
        if self.recordings is not None:
            yield from self.recordings.news()

    def compile(self, group: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Have networks compiled, once, where that is wanted; see `compiling.py`.

        Args:
            group: batches such as there will be.
        """
        if self._looked:
            return
        self._looked = True
        before, self.compiled = self.compiled, self._compile(group)
        if self._steps and {*(before or ())} != {*(self.compiled or ())}:
            had = ", ".join(before or ()) or "nothing"
            self._news.append(
                f"compiled before the interruption: {had}; the bits are others than without it"
            )

    def _compile(self, group: Sequence[Mapping[str, torch.Tensor]]) -> tuple[str, ...] | None:
        """Which networks now are; None where that was not wanted."""
        if not self.options.compile:
            return None
        self.begin()
        if self._as_used:
            said = f"not compiled: {', '.join(self._as_used)} has modules of others in it"
            self._news.append(said)
            return ()
        self.set_plain(self.networks)
        calls = self._called(group[:1])
        if self.compiled is not None:
            calls = {name: own for name, own in calls.items() if name in self.compiled}
        statistics, begun = self._statistics(), time.monotonic()
        alone = replace(self.options, device=str(self.device), processes=1)
        own = (self.trainer, alone, self._given, self.frozen)
        found = []
        with self._noise(), compiling.in_cache():
            refused = compiling.ahead(own, calls, self.options.compile_seconds)
            for name in [n for n in calls if n not in refused]:
                network = self.networks[name]
                try:
                    made = compiling.compiled(network, calls[name], self, known=True)
                except Exception as error:  # noqa: BLE001  # torch's, of what it has compiled
                    refused[name] = compiling.first_line(error)
                else:
                    found.append(name)
                    self.put(name, network, made)
        _put_back(statistics)
        self.set_plain(found)
        if found:
            took = time.monotonic() - begun
            self._news.append(f"compiled in {took:.0f} s: {', '.join(found)}")
        self._news += compiling.told(refused)
        return tuple(found)

    def _called(self, group: Sequence[Mapping[str, torch.Tensor]]) -> compiling.Calls:
        """How the first step and the last one call each network; nothing of the training moves."""
        calls: compiling.Calls = {}
        for name, network in self.networks.items():
            self.put(name, network, partial(compiling.noted, calls.setdefault(name, []), network))
        statistics = self._statistics()
        for step in (0, self.total_steps - 1):
            self._through(group, step)
        _put_back(statistics)
        for name, network in self.networks.items():
            self.put(name, network)
        return {name: own for name, own in calls.items() if own}

    def take(self, group: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """One step, which `read` must follow: at once where `behind` is 0, else some steps later.

        Of a step that fails neither a gradient nor a moved statistic is left to the next one.

        Raises:
            DivergedError: `behind` is 0, and a loss or gradient is not finite.
        """
        self.begin()
        self.compile(group)
        pace = self.options.pace(self.steps // self.steps_per_epoch, self.steps)
        for updates in self._updates.values():
            updates.set_pace(pace)
        drawn = [{name: self.placed(values) for name, values in batch.items()} for batch in group]
        turns = self.trainer.turns(self.options, self.steps)
        moves = self.adapts and (self.steps + 1) % self.options.ada_every == 0
        step = partial(self._step, turns=turns, moves=moves)
        with self._noise(), _repeatable():
            if self.recordings is None:
                told = step(drawn)
            else:
                kind = kind_of(turns, moves, *self.weights.items())
                told = self.recordings.made(kind, drawn, step)
        self._taken.append(Taken(*told))
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
                self._broken.zero_()
                raise DivergedError
            yield number, dict(zip(one.names, told, strict=True))

    def _step(self, drawn: Drawn, *, turns: Sequence[Turn], moves: bool) -> Told:
        """What is made on the device alone, of what is there; `moves`: ADA's probability does."""
        statistics = self._statistics()
        # Of its own: a loss may let what was drawn require gradients.
        batches = [Batch({n: v.detach() for n, v in values.items()}) for values in drawn]
        seen: list[dict[str, torch.Tensor]] = [{} for _ in batches]
        try:
            for turn in turns:
                self._take(turn, batches, seen)
            self._average({player for turn in turns for player in turn.players})
            if self.adapts:
                self._adapt(seen, moves)
        except BaseException:
            for updates in self._updates.values():
                updates.forget()
            _put_back(statistics)
            raise
        if self.behind:
            _put_back(statistics, where=self._broken)
        names = tuple(seen[0])
        told = torch.stack([torch.stack([s[n] for n in names]) for s in seen]).mean(0)
        return names, torch.cat([told, self._broken.to(told.dtype)[None]])

    def _adapt(self, seen: Sequence[dict[str, torch.Tensor]], moves: bool) -> None:
        """Move ADA's probability, where it is time, and tell it."""
        o, world = self.options, self.place.world
        if moves:
            self.place.average([self.adaptive])
            images = o.batch * o.accumulate * world * o.ada_every
            self.adaptive.copy_(adapted(self.adaptive, o.ada, images / o.ada_images))
        for told in seen:
            told["augment_p"] = self.adaptive[0].clone()

    def settle(self, group: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Have batches go through all losses, of which statistics move and nothing else does."""
        self.begin()
        self._through(group, self.total_steps - 1)
        for name, (of, _) in self._averages.items():
            buffers = dict(self._module[of].named_buffers())
            for key, own in self._module[name].named_buffers():
                own.copy_(buffers[key])

    def _through(self, group: Sequence[Mapping[str, torch.Tensor]], step: int) -> None:
        """Batches go through all losses of a step, of which statistics move and nothing else."""
        pools = {name: pool.state_dict() for name, pool in self.pools.items()}
        adaptive = self.adaptive.clone()
        with self._noise(), self.autocast():
            for drawn in group:
                batch = Batch({name: self.placed(own).detach() for name, own in drawn.items()})
                for turn in self.trainer.turns(self.options, step):
                    for loss in turn.losses:
                        loss(self, batch)
        self.adaptive.copy_(adaptive)
        for name, pool in self.pools.items():
            pool.load_state_dict(pools[name], self.device)

    def _statistics(self) -> Statistics:
        """All buffers and ADA's state, and what they are."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for own in (*self._module.buffers(), self.adaptive):
            by_dtype.setdefault(own.dtype, []).append(own)
        return [(own, _flat(own)) for own in by_dtype.values()]

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
        for name in turn.players:
            must_be_there(name, self._updates, f"the turn {turn.name!r} moves the player")
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

    def _average(self, players: Collection[str]) -> None:
        """Move the averages of what a step updated, once: old · ema + new · (1 − ema)."""
        moved = {name for player in players for name in self.players[player].networks}
        with torch.no_grad():
            for name, (of, ema) in self._averages.items():
                if of not in moved:  # its statistics move all the same, in whatever goes through it
                    theirs = dict(self._module[of].named_buffers())
                    for key, own in self._module[name].named_buffers():
                        own.copy_(theirs[key])
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


def _put_back(statistics: Statistics, *, where: torch.Tensor | None = None) -> None:
    """A pass moves statistics before it is known to be finite.

    Args:
        statistics: what they were.
        where: 0-dimensional, bool: only if it is true. The host never reads it.
    """
    for own, before in statistics:
        values = before if where is None else torch.where(where, before, _flat(own))
        parts = values.split([tensor.numel() for tensor in own])
        views = [part.view(tensor.shape) for part, tensor in zip(parts, own, strict=True)]
        torch._foreach_copy_(own, views)


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@contextmanager
def _repeatable() -> Iterator[None]:
    """Of cuDNN's algorithms those that make the same bits each time."""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before
