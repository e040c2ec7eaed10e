"""Reference pictures, whose style what is made takes on: which of them, for which picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import numpy as np

from modelsoup import ParameterError

from ..pictures.images import list_images, read_image
from .models import Model, mean_of
from .translator import Label

Reference = Path | np.ndarray


@dataclass(frozen=True)
class References:
    """Some of many pictures for each one that is made, drawn by its name.

    Attributes:
        model: which looks at them.
        pictures: all of them: files, or uint8, height × width × channels.
        of_class: in their place, those of a class, by its index.
        k_shot: of how many each style is the mean.
        samples: how many are made of each picture at most.
        seed: of which are drawn.
    """

    model: Model
    pictures: Sequence[Reference]
    of_class: Mapping[Label, Sequence[Reference]] = field(default_factory=dict)
    k_shot: int = 1
    samples: int = 1
    seed: int = 0
    _made: dict[tuple[int, Label], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = min(map(len, (self.pictures, *self.of_class.values())))
        if not 1 <= self.k_shot <= least:
            raise ParameterError(
                f"k_shot is {self.k_shot}, but must be from 1 to {least}, of which there are "
                f"reference pictures"
            )
        if self.k_shot * self.samples > least:
            raise ParameterError(
                f"{self.samples} references of {self.k_shot} each are more than the {least} "
                f"pictures that there are: at most {least // self.k_shot} can differ"
            )

    def chosen(self, name: str, sample: int = 0, label: Label = 0) -> list[Reference]:
        """Those of a picture's n-th sample, which no other of its samples has."""
        own = self.of_class.get(label, self.pictures)
        order = np.random.default_rng((self.seed, crc32(name.encode()))).permutation(len(own))
        return [own[n] for n in order[sample * self.k_shot : (sample + 1) * self.k_shot]]

    def style(self, name: str, sample: int = 0, label: Label = 0) -> np.ndarray:
        """The mean of their styles, float32, 1 × size."""
        made = [self._style(one, label) for one in self.chosen(name, sample, label)]
        return mean_of(made)

    def _style(self, one: Reference, label: Label) -> np.ndarray:
        key = (id(one), label)  # they stay as long as this does
        if key not in self._made:
            self._made[key] = self.model.style_of([read(self.model, one)], label)
        return self._made[key]


def read(model: Model, one: Reference) -> np.ndarray:
    """A reference picture, uint8, height × width × channels."""
    return read_image(one, model.channels) if isinstance(one, Path) else one


def references_in(
    model: Model, place: Path, *, labels: Sequence[Label] = (), k_shot: int = 1, samples: int = 1,
    seed: int = 0,
) -> References:  # fmt: skip
    """A picture, or a folder of them; where that has folders called like classes, theirs.

    Raises:
        ParameterError: there are none, or fewer than `k_shot`; or the model looks at none.
    """
    if model.how.style is None or model.how.style.of_pictures is None:
        raise ParameterError(f"{model.called} does not look at reference pictures: give none")
    files = [place] if place.is_file() else list_images(place)
    if not files:
        raise ParameterError(f"the folder {place}, of references, holds no images")
    names = {label: model.called_so(label) for label in labels}
    own = {label: list_images(place / name) for label, name in names.items()
           if (place / name).is_dir()}  # fmt: skip
    for label, found in own.items():
        if not found:
            raise ParameterError(
                f"the folder {place / names[label]}, of references, holds no images"
            )
    return References(model, files, own, k_shot, samples, seed)
