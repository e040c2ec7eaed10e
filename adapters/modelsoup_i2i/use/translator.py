"""What a trained network is used for; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from ..networks.described import Joined
from ..pictures.draws import Attributes, Classes, Draw, Noise


@dataclass(frozen=True)
class Switched:
    """Attributes that a picture is to have, and such that it is not to have, by their indices.

    Attributes:
        on: those that it is to have.
        off: those that it is not. What is in neither it has as before where that is known, or else
            not.
    """

    on: tuple[int, ...] = ()
    off: tuple[int, ...] = ()

    def of(self, own: bytes) -> Switched:
        """The same with all that a picture has: a byte for each attribute, 0 or 1."""
        kept = {place for place, has in enumerate(own) if has}
        on = (kept | set(self.on)) - set(self.off)
        return Switched(tuple(sorted(on)), tuple(n for n in range(len(own)) if n not in on))


Label = int | Switched
"""The index of a class, or of an attribute that is had alone; or attributes."""


def turned(own: bytes, index: int) -> Switched:
    """A picture's attributes, a byte for each, of which one is turned into the opposite."""
    return Switched(off=(index,)).of(own) if own[index] else Switched(on=(index,)).of(own)


@dataclass(frozen=True)
class Style:
    """A vector that says how a picture is to look: of reference pictures, of noise, or both ways.

    Attributes:
        size: the numbers in it.
        of_pictures: the network, or the joined one, that makes it of pictures, and of classes where
            there are such; None if none does.
        of_noise: likewise of noise; None with noise means that the noise is the style.
        noise: how many numbers that has; 0: styles are made of pictures alone.
        classes: how many classes both makers are told of; 0 if none.
        name: what an exported translator calls it.
    """

    size: int
    of_pictures: str | None = None
    of_noise: str | None = None
    noise: int = 0
    classes: int = 0
    name: str = "style"

    @property
    def names(self) -> tuple[str, ...]:
        """Its name."""
        return (self.name,)


Taken = Draw | Style
"""What a translator is called with beside pictures."""


@dataclass(frozen=True)
class Translator:
    """A network that makes a picture of one domain out of one of another, or out of noise.

    It is called with pictures, where it has a source, and with what it takes, in that order.

    Attributes:
        source: the domain of what it sees, as the trainer's data call it; None: it sees none.
        target: the domain of what it makes.
        label: for sheets.
        back: the network that leads back, if there is one.
        takes: what else it is called with: noise, and a class; or a style.
        alone: where it is joined of several networks, the one that makes pictures of what it takes
            without seeing one; None if there is none.
    """

    source: str | None
    target: str
    label: str
    back: str | None = None
    takes: tuple[Taken, ...] = ()
    alone: str | None = None

    @property
    def classes(self) -> int:
        """How many classes it makes pictures of; 0 where it is not told one."""
        own = sum(draw.count for draw in self.takes if isinstance(draw, Classes))
        return own + (self.style.classes if self.style is not None else 0)

    @property
    def has_attributes(self) -> bool:
        """Whether what it is told are attributes, of which a picture may have several."""
        return any(isinstance(draw, Attributes) for draw in self.takes)

    @property
    def called(self) -> str:
        """What errors call what it is told: `classes` or `attributes`."""
        return "attributes" if self.has_attributes else "classes"

    def input_called(self, taken: Taken) -> str:
        """What an exported model calls one of what it takes."""
        if isinstance(taken, Classes):
            return "attributes" if isinstance(taken, Attributes) else "class"
        return taken.names[0]

    def of_attributes(self) -> Translator:
        """The same, told attributes in the place of classes."""
        takes = [Attributes(one.name, one.count) if isinstance(one, Classes) else one
                 for one in self.takes]  # fmt: skip
        return replace(self, takes=tuple(takes))

    @property
    def has_noise(self) -> bool:
        """Whether it makes several pictures of one."""
        of_style = self.style is not None and self.style.noise > 0
        return of_style or any(isinstance(draw, Noise) for draw in self.takes)

    @property
    def style(self) -> Style | None:
        """What it takes to say how pictures are to look, if it does."""
        return next((own for own in self.takes if isinstance(own, Style)), None)

    @property
    def wants_reference(self) -> bool:
        """Whether nothing but pictures can say how its own are to look."""
        return self.style is not None and not self.style.noise

    @property
    def modules(self) -> tuple[str, ...]:
        """What makes its styles: networks, or joined ones."""
        own = () if self.style is None else (self.style.of_pictures, self.style.of_noise)
        return tuple(name for name in own if name is not None)

    def given(
        self, names: Sequence[str], label: Label = 0, *, seed: int = 0, sample: int = 0
    ) -> list[np.ndarray]:
        """What it is called with beside pictures: the noise of each one's name, and a class.

        Args:
            names: of the pictures, one for each.
            label: the class's index; or attributes, which become float32, 0 or 1 for each.
            seed: of the noise, which depends on this, the name and the sample alone.
            sample: which of several for one picture.

        Returns:
            for each of `takes`, an array of as many as there are names; for a style the noise that
            it is made of, see `Model.given`.
        """
        found = []
        for draw in self.takes:
            if isinstance(draw, Noise | Style):
                shape = draw.shape if isinstance(draw, Noise) else (draw.noise,)
                items = [
                    np.random.default_rng(
                        (seed, sample, crc32(draw.name.encode()), crc32(name.encode()))
                    ).standard_normal(shape, np.float32)
                    for name in names
                ]
                found.append(np.stack(items))
            elif isinstance(draw, Attributes):
                vectors = np.zeros((len(names), draw.count), np.float32)
                vectors[:, list(label.on) if isinstance(label, Switched) else label] = 1
                found.append(vectors)
            else:
                found.append(np.full(len(names), label, np.int64))
        return found


def parts_of(name: str, how: Translator, joined: Mapping[str, Joined]) -> tuple[str, ...]:
    """The networks that a translator and what makes its styles are made of, each once.

    Args:
        name: of the translator.
        how: what it takes.
        joined: the trainer's modules that are made of several networks.
    """
    found: dict[str, None] = {}
    for own in (name, *how.modules):
        found |= dict.fromkeys(joined[own].parts if own in joined else (own,))
    return tuple(found)
