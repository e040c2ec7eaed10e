"""What tests of trainings share: a session's tensors, and which networks a step moved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from modelsoup_i2i.training.state import State
from modelsoup_i2i.training.turns import Batch


def silent(*_: object) -> None:
    """For what a training would tell."""


def flat(own: State) -> dict[str, torch.Tensor]:
    """All tensors by their names, copied."""
    return {
        f"{name}.{key}": value.clone()
        for name, network in own._module.items() for key, value in network.state_dict().items()
    }  # fmt: skip


def moved(own: State, losses: dict[str, float] | None = None) -> set[str]:
    """The networks of which a step changed a parameter."""
    before = flat(own)
    made = own.optimise(next(own.batches()))
    if losses is not None:
        losses.update(made)
    parameters = {f"{n}.{p}" for n, net in own._module.items() for p, _ in net.named_parameters()}
    return {name.partition(".")[0] for name, value in flat(own).items()
            if name in parameters and not torch.equal(value, before[name])}  # fmt: skip


def first_batch(own: State) -> Batch:
    """What a session's first step sees; the session has begun then."""
    own.begin()
    return Batch(next(own.batches())[0])


def numbers(terms: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """A loss's terms."""
    return {name: float(value.detach()) for name, value in terms.items()}
