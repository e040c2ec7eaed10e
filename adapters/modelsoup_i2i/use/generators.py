"""The generators of a checkpoint, as they are used.

Which trainer a checkpoint belongs to is found from its names: that of a trainer here, or of any
package's, among whose translators one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from modelsoup import (
    CheckpointError,
    MismatchError,
    ParameterError,
    TrainerError,
    get_trainer,
    open_checkpoint,
    trainer_names,
)

from ..networks.described import AVERAGED, Joined, Network
from .models import Model
from .translator import Translator

DIRECTIONS = {"x2y": ("X", "Y"), "y2x": ("Y", "X")}


@runtime_checkable
class Translating(Protocol):
    """What is asked of a trainer; each of its options has a default."""

    options: Any

    def networks(self, o: Any) -> dict[str, Network]:
        """All networks by name."""

    def translators(self, o: Any) -> dict[str, Translator]:
        """Those that translate, the most wanted one first."""

    def options_in(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The options that names and shapes in a checkpoint decide, or a MismatchError."""


@runtime_checkable
class ClassTranslating(Translating, Protocol):
    """One that gives a model, too."""

    def joined(self, o: Any) -> dict[str, Joined]:
        """Modules that are made of several networks."""

    def model(self, o: Any, checkpoint: Path) -> Model:
        """The first translator of a checkpoint."""


def must_lead(direction: str) -> None:
    """Check the word for a direction.

    Raises:
        ParameterError: it is another one.
    """
    if direction not in DIRECTIONS:
        raise ParameterError(f"the direction is {direction!r}, but must be x2y or y2x")


def generator_in(checkpoint: str | Path, direction: str = "x2y") -> tuple[str, Network]:
    """One generator of a checkpoint: its name, and what it was built with.

    Raises:
        as `load_generator`.
    """
    must_lead(direction)
    shapes = {name: info.shape for name, info in open_checkpoint(checkpoint).tensors.items()}
    present = {name.partition(".")[0] for name in shapes}
    known: list[str] = []
    fault: MismatchError | None = None
    for called in trainer_names():
        try:
            trainer = get_trainer(called)
        except TrainerError as error:  # it may be the one that is looked for
            known.append(str(error))
            continue
        if not isinstance(trainer, Translating):
            continue
        translators = trainer.translators(trainer.options())
        if not translators:
            continue
        known.append(f"{' or '.join(map(repr, translators))} of {called}")
        if not present & translators.keys():
            continue
        try:
            name = _leading(translators, direction)
            own = {n: shape for n, shape in shapes.items() if n.startswith(f"{name}.")}
            if not own:
                raise MismatchError(
                    f"there is no tensor of the generator {name!r} (names that begin with "
                    f"'{name}.')"
                )
            options = trainer.options(**trainer.options_in(own))
        except MismatchError as error:
            fault = fault or MismatchError(f"{checkpoint}: {error}")
            continue
        return name, trainer.networks(options)[name]
    raise fault or MismatchError(
        f"{checkpoint} holds no generator that a trainer here knows: {'; '.join(known)}"
    )


def load_generator(checkpoint: str | Path, direction: str = "x2y") -> nn.Module:
    """One generator of a checkpoint, in eval mode, in float32 on the CPU.

    Where there is an average of its weights over steps, those are taken.

    Args:
        checkpoint: a safetensors file with generators of a trainer: `G_A.*` (X to Y) and `G_B.*`
            (Y to X) of CycleGAN, `G.*` of pix2pix, …
        direction: `x2y` or `y2x`; where there is one generator, both are it.

    Raises:
        ParameterError: another direction.
        CheckpointError: the file is missing or damaged.
        MismatchError: it holds no such generator, or one of another kind.
    """
    return load_network(checkpoint, *generator_in(checkpoint, direction))


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
    network, opened = told.build(), open_checkpoint(checkpoint)
    if averaged and any(key.startswith(f"{name}{AVERAGED}.") for key in opened.tensors):
        name += AVERAGED
    state = {}
    for key, value in network.state_dict().items():
        dtype = np.float32 if value.is_floating_point() else np.int64
        values = np.asarray(opened[f"{name}.{key}"], dtype)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{checkpoint}: {name}.{key} holds NaN or infinity")
        state[key] = torch.from_numpy(values)
    network.load_state_dict(state)
    network.eval()
    return network


def class_model(checkpoint: str | Path, *, sees: bool = True) -> Model | None:
    """The translator to classes in a checkpoint, as it is used; None where there is none.

    Where it has several, as a translator of whose parts one makes pictures alone, it is the one
    with the most parts.

    Args:
        checkpoint: a safetensors file.
        sees: False wants one that sees no picture, as the generator alone.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    shapes = {name: info.shape for name, info in open_checkpoint(checkpoint).tensors.items()}
    present = {name.partition(".")[0] for name in shapes}
    found: tuple[int, Any, Any] | None = None
    for called in trainer_names():
        try:
            trainer = get_trainer(called)
            if not isinstance(trainer, ClassTranslating):
                continue
            options = trainer.options(**trainer.options_in(shapes))
            name, how = next(iter(trainer.translators(options).items()), ("", None))
            if how is None or not how.classes or (not sees and how.source is not None):
                continue
            joined = trainer.joined(options).get(name)
        except (MismatchError, TrainerError):
            continue
        parts = {name} if joined is None else {*joined.parts}
        if parts <= present and (found is None or len(parts) > found[0]):
            found = len(parts), trainer, options
    return None if found is None else found[1].model(found[2], Path(checkpoint))


def _leading(translators: Mapping[str, Translator], direction: str) -> str:
    """The one of a direction, or the only one there is, which has been trained for its own."""
    ways = {(how.source, how.target): name for name, how in translators.items()}
    if len(ways) > 1 and DIRECTIONS[direction] not in ways:
        raise MismatchError(f"none of {', '.join(translators)} translates {direction}")
    return next(iter(translators)) if len(ways) == 1 else ways[DIRECTIONS[direction]]
