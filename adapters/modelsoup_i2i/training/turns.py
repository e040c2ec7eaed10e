"""Who moves on which loss: what a trainer tells of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Batch:
    """What was drawn for a pass, by name: `batch.a`.

    A turn may leave something to a later one of the same step: `batch.fake = fake.detach()`.
    """

    def __init__(self, drawn: Mapping[str, torch.Tensor]) -> None:
        self.__dict__.update(drawn)

    def __setattr__(self, name: str, values: torch.Tensor) -> None:
        self.__dict__[name] = values

    def __getattr__(self, name: str) -> torch.Tensor:
        raise AttributeError(f"nothing was drawn as {name!r} (there are {', '.join(vars(self))})")


Loss = Callable[[Any, Batch], Mapping[str, "torch.Tensor"]]
"""`loss(s, batch)`: terms by their names, without weights. `s` is the session: `s["G"](images)`."""


@dataclass(frozen=True)
class Turn:
    """One update of some players.

    Attributes:
        name: what the weighted sum of all terms is told by, where there are several.
        players: who is updated.
        losses: what they minimise: the sum. Each is made, gone back through and freed before the
            next one, which so has the memory.
    """

    name: str
    players: tuple[str, ...]
    losses: tuple[Loss, ...]
