"""What a trained network is used for; without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Translator:
    """A network that makes a picture of one domain out of one of another.

    Attributes:
        source: the domain of what it sees, as the trainer's data call it.
        target: the domain of what it makes.
        label: for sheets.
        back: the network that leads back, if there is one.
    """

    source: str
    target: str
    label: str
    back: str | None = None
