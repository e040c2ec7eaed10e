"""The generators and translators of a checkpoint, as they are used.

Which trainer a checkpoint belongs to is found from its names: that of a trainer here, or of any
package's, whose networks are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from modelsoup import (
    Checkpoint,
    CheckpointError,
    MismatchError,
    ParameterError,
    TrainerError,
    get_trainer,
    open_checkpoint,
    trainer_names,
)

from ..networks.described import AVERAGED, Joined, Network
from ..networks.shapes import is_estimate, must_match, part_of
from ..networks.spectral import estimated, folded
from .classes import classes_in, has_attributes
from .models import Model, model_of
from .translator import Translator, parts_of

DIRECTIONS = {"x2y": ("X", "Y"), "y2x": ("Y", "X")}


@runtime_checkable
class Translating(Protocol):
    """What is asked of a trainer; each of its options has a default."""

    options: Any

    def networks(self, o: Any) -> dict[str, Network]:
        """All networks by name."""

    def joined(self, o: Any) -> dict[str, Joined]:
        """Modules that are made of several of them."""

    def translators(self, o: Any) -> dict[str, Translator]:
        """Those that translate, the most wanted one first."""

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The options that names and shapes in a checkpoint decide, or a MismatchError."""


@dataclass(frozen=True)
class Found:
    """A translator in a checkpoint.

    Attributes:
        name: what its trainer calls it.
        how: what it sees, makes and takes.
        parts: the networks that it and what makes its styles are made of, by name.
        stored: what their names in the checkpoint begin with: with averages, those.
        joined: how they are made of several networks, where they are.
    """

    name: str
    how: Translator
    parts: dict[str, Network]
    stored: dict[str, str]
    joined: dict[str, Joined]

    @property
    def channels(self) -> int:
        """Of its pictures, as the sizes of a part tell.

        Raises:
            MismatchError: none does.
        """
        for network in reversed(self.parts.values()):
            if "channels" in network.sizes:
                return int(network.sizes["channels"])
        raise MismatchError(f"no network of {', '.join(self.parts)} has channels among its sizes")


def must_lead(direction: str) -> None:
    """Check the word for a direction.

    Raises:
        ParameterError: it is another one.
    """
    if direction not in DIRECTIONS:
        raise ParameterError(f"the direction is {direction!r}, but must be x2y or y2x")


def find(checkpoint: str | Path, direction: str = "x2y") -> Found:
    """A translator of a checkpoint, or a generator, of the trainer most of whose networks it has.

    Raises:
        as `load_model`.
    """
    must_lead(direction)
    shapes = {name: tuple(i.shape) for name, i in open_checkpoint(checkpoint).tensors.items()}
    present = {name.partition(".")[0] for name in shapes}
    known: list[str] = []
    fitting: list[tuple[bool, int, str, Translating, str]] = []
    faults: dict[str, MismatchError] = {}
    for called in trainer_names():
        try:
            trainer = get_trainer(called)
        except TrainerError as error:  # it may be the one that is looked for
            known.append(str(error))
            continue
        if not isinstance(trainer, Translating):
            continue
        try:
            usual = trainer.options()
            translators = trainer.translators(usual)
        except (TypeError, ValueError, ParameterError) as error:
            known.append(f"{called}, of whose options not all have a default ({error})")
            continue
        if not translators:
            continue
        known.append(f"{' or '.join(map(repr, translators))} of {called}")
        joined = trainer.joined(usual)
        of_all = [part for n, how in translators.items() for part in parts_of(n, how, joined)]
        if not any(_stored(part, present) in present for part in of_all):
            continue
        try:
            name = _leading(translators, direction)
        except MismatchError as error:
            faults[called] = error
            continue
        needed = parts_of(name, translators[name], joined)
        whole = all(_stored(part, present) in present for part in needed)
        own = sum(network in present for network in trainer.networks(usual))
        fitting.append((whole, own, called, trainer, name))
    # Those of which nothing lacks first, then by how many networks are there.
    fitting.sort(key=lambda one: (one[0], one[1]), reverse=True)
    for whole, _, called, fits, name in fitting:
        if faults and not whole:
            break
        try:
            told = _told(fits, name, shapes, present)
            # Names and shapes are the same; only the metadata tell.
            several = has_attributes(Path(checkpoint))
            return replace(told, how=told.how.of_attributes()) if several else told
        except MismatchError as error:
            faults[called] = error
    if len(faults) == 1:
        raise MismatchError(f"{checkpoint}: {next(iter(faults.values()))}")
    if faults:
        said = "; ".join(f"of {called}, {error}" for called, error in faults.items())
        raise MismatchError(f"{checkpoint}: {said}")
    raise MismatchError(
        f"{checkpoint} holds no generator that a trainer here knows: {'; '.join(known)}"
    )


def load_model(checkpoint: str | Path, direction: str = "x2y") -> Model:
    """What a checkpoint is used for: in eval mode, in float32 on the CPU.

    Where there is an average of a network's weights over steps, that is taken. Weights that are
    divided by their largest singular value are so once, and are plain ones then.

    Args:
        checkpoint: a safetensors file with networks of a trainer: `G_A.*` (X to Y) and `G_B.*`
            (Y to X) of CycleGAN, `G.*` of pix2pix or a GAN, `E.*`, `A.*` and `G.*` of DeepI2I, …
        direction: `x2y` or `y2x`; where there is one translator, both are it.

    Raises:
        ParameterError: another direction.
        CheckpointError: the file is missing or damaged.
        MismatchError: it holds no such translator, or one of another kind.
    """
    found, opened = find(checkpoint, direction), open_checkpoint(checkpoint)
    names = () if not found.how.classes else classes_in(Path(checkpoint)) or ()
    if len(names) > found.how.classes:
        raise MismatchError(
            f"{checkpoint} names {len(names)} {found.how.called}, but {found.name} knows "
            f"{found.how.classes}"
        )
    networks = {
        name: _loaded(opened, found.stored[name], told) for name, told in found.parts.items()
    }
    for network in networks.values():
        folded(network)
    return model_of(
        found.name, found.how, found.joined, networks, classes=names, origin=str(checkpoint)
    ).eval()


def load_generator(checkpoint: str | Path, direction: str = "x2y") -> nn.Module:
    """The network alone that `load_model` finds, or the module that is joined of several."""
    return load_model(checkpoint, direction).module


def load_network(
    checkpoint: str | Path, name: str, told: Network, *, averaged: bool = True
) -> nn.Module:
    """One network of a checkpoint, in eval mode, in float32 on the CPU.

    Args:
        checkpoint: a safetensors file, with the network's names and shapes.
        name: what its names begin with there.
        told: what it was built with.
        averaged: take the average of its weights over steps, where there is one.

    Raises:
        CheckpointError: the file is missing or damaged, or the network holds NaN or infinity.
    """
    opened = open_checkpoint(checkpoint)
    present = {key.partition(".")[0] for key in opened.tensors}
    return _loaded(opened, _stored(name, present) if averaged else name, told)


def _loaded(opened: Checkpoint, stored: str, told: Network) -> nn.Module:
    network = told.build()
    state = {}
    for key, value in network.state_dict().items():
        if is_estimate(key) and f"{stored}.{key}" not in opened.tensors:
            state[key] = torch.zeros_like(value)  # which `estimated` sees
            continue
        dtype = np.float32 if value.is_floating_point() else np.int64
        values = np.asarray(opened[f"{stored}.{key}"], dtype)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{opened.path}: {stored}.{key} holds NaN or infinity")
        state[key] = torch.from_numpy(values)
    network.load_state_dict(state)
    estimated(network)
    return network.eval()


def _told(
    trainer: Translating, name: str, shapes: Mapping[str, tuple[int, ...]], present: set[str]
) -> Found:
    """A translator with the sizes that a checkpoint decides.

    Raises:
        MismatchError: a part of it is missing, or of another kind.
    """
    usual = trainer.options()
    needed = parts_of(name, trainer.translators(usual)[name], trainer.joined(usual))
    stored = {part: _stored(part, present) for part in needed}
    if lacking := [part for part, place in stored.items() if place not in present]:
        of = "" if lacking == [name] else f", of which {name} is made"
        raise MismatchError(
            f"there is no tensor of the generator {lacking[0]!r} (names that begin with "
            f"'{lacking[0]}.'){of}"
        )
    own = {
        f"{part}.{n.partition('.')[2]}": shape for part, place in stored.items()
        for n, shape in shapes.items() if n.startswith(f"{place}.")
    }  # fmt: skip
    try:
        options = trainer.options(**trainer.options_in(own))
    except ValueError as error:
        raise MismatchError(f"networks of such sizes are none of its trainer's: {error}") from None
    networks = trainer.networks(options)
    for part in stored:
        there, said = part_of(own, f"{part}.", "network")
        must_match(there, networks[part].shapes(), said)
    return Found(
        name, trainer.translators(options)[name], {part: networks[part] for part in stored},
        stored, trainer.joined(options),
    )  # fmt: skip


def _stored(part: str, present: set[str]) -> str:
    """What a network's names begin with: its average's, where there is one."""
    return part + AVERAGED if part + AVERAGED in present else part


def _leading(translators: Mapping[str, Translator], direction: str) -> str:
    """The one of a direction, or the only one there is, which has been trained for its own."""
    ways = {(how.source, how.target): name for name, how in translators.items()}
    if len(ways) > 1 and DIRECTIONS[direction] not in ways:
        raise MismatchError(f"none of {', '.join(translators)} translates {direction}")
    return next(iter(translators)) if len(ways) == 1 else ways[DIRECTIONS[direction]]
