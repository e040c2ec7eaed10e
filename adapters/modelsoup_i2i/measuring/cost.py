"""What a step of a training takes, measured in a process of its own: memory is a whole one's.

That process imports the trainer and nothing that measures pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from modelsoup import ProcessExecutor, build_options, get_trainer


class Cost(Protocol):
    """Of a training.

    Attributes:
        seconds: of a step.
        memory: bytes at the most.
    """

    seconds: float
    memory: int


def cost(trainer: str, options: Mapping[str, Any]) -> Cost:
    """What a trainer's first steps take.

    Raises:
        SoupError: they cannot be made.
    """
    with ProcessExecutor(1) as executor:
        found: Cost = executor.submit(_probed, trainer, options).result()
        return found


def _probed(trainer: str, options: Mapping[str, Any]) -> Any:
    own: Any = get_trainer(trainer)
    return own.probe(build_options(own, options))
