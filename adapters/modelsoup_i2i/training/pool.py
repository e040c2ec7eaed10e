"""A history of generated images for the discriminators (Shrivastava et al. 2017, section 2.3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from modelsoup import ParameterError

Row = tuple[int, bool, bool]
"""For an image: a place, whether what lies there is shown instead, whether it comes there."""


class ImagePool:
    """The last `size` images, more or less: until it is full, each image is stored and returned.

    Afterwards an image is returned as it is with probability ½; else it takes the place of a random
    stored one, which is returned. Size 0 stores nothing. What is drawn comes from a generator of
    the pool's own, so that its state says everything. The images lie where they were made, on a
    GPU, say, and the host draws without looking at them: it does not wait.

    Attributes:
        images: those that are stored.
        queried: about how many was asked.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 0:
            raise ParameterError(f"the size of an image pool is {size}, but must be at least 0")
        self.size = size
        self.images: list[torch.Tensor] = []
        self.queried = 0
        self._memory: torch.Tensor | None = None  # of which the images are parts
        self._rows: Iterator[torch.Tensor] | None = None
        # The Mersenne twister that torch's generator for CPUs is too, with the same draws.
        self._generator = np.random.RandomState(seed % 2**32)

    def query(self, images: torch.Tensor) -> torch.Tensor:
        """As many images as are given, N × C × H × W, without gradients.

        An image of another size than those stored takes the place of one, but is itself returned:
        a batch has one size.
        """
        images = images.detach()
        if not self.size:
            return images
        self.queried += len(images)
        if self._rows is not None:
            return self._followed(images, self._rows)
        shown = []
        for image in images:
            # A copy: a slice would keep the whole batch alive for as long as it is stored.
            own = image.clone()
            place, other, stored = self._drawn()
            if other:
                own = self._exchanged(place, own)
                if own.shape != image.shape:
                    own = image
            elif stored:
                self.images.append(own if self._memory is None else self._memory[place].copy_(own))
            shown.append(own)
        return torch.stack(shown)

    def plan(self, count: int) -> list[Row]:
        """Draws for so many images, of which a step asks that was recorded: see `following`."""
        assert self._memory is not None
        rows = []
        for _ in range(count):
            place, other, stored = self._drawn()
            if stored and not other:
                self.images.append(self._memory[place])
            rows.append((place, other, stored))
        return rows

    @contextmanager
    def following(self, rows: torch.Tensor) -> Iterator[None]:
        """Within it, what is done with each image is what rows on the device say, as `plan` has it.

        All images lie in one memory from then on.
        """
        if self._memory is None:
            self._memory = torch.stack(self.images[:1] * self.size)
            self._store(self.images)
        self._rows = iter(rows)
        try:
            yield
        finally:
            self._rows = None

    def state_dict(self) -> dict[str, Any]:
        """What is stored, on the CPU, and the generator."""
        drawn = self._generator.get_state(legacy=False)["state"]
        return {
            # Those in the memory become others where they are.
            "images": [image.to("cpu", copy=self._memory is not None) for image in self.images],
            "generator": torch.tensor([*drawn["key"].tolist(), drawn["pos"]]),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from where a pool was, on a device."""
        self._store([image.to(device) for image in state["images"]])
        *words, place = state["generator"].tolist()
        self._generator.set_state(("MT19937", np.array(words, np.uint32), place, 0, 0.0))

    def _store(self, images: list[torch.Tensor]) -> None:
        """Have these and no others, in the memory if there is one."""
        self.images = images
        if self._memory is not None:
            places = self._memory[: len(images)]
            self.images = [place.copy_(own) for place, own in zip(places, images, strict=True)]

    def _exchanged(self, place: int, image: torch.Tensor) -> torch.Tensor:
        """What was stored in a place, where an image is from now on."""
        was = self.images[place]
        if self._memory is None:
            self.images[place] = image
        else:
            was = was.clone()
            self.images[place].copy_(image)
        return was

    def _followed(self, images: torch.Tensor, rows: Iterator[torch.Tensor]) -> torch.Tensor:
        assert self._memory is not None
        shown = []
        for image, row in zip(images, rows, strict=False):
            place, other, stored = row.split(1)
            was = self._memory.index_select(0, place)
            shown.append(torch.where(other > 0, was, image))
            self._memory.index_copy_(0, place, torch.where(stored > 0, image, was))
        return torch.cat(shown)

    def _drawn(self) -> Row:
        if len(self.images) < self.size:
            return len(self.images), False, True
        if self._draw(2):
            return self._draw(self.size), True, True
        return 0, False, False

    def _draw(self, below: int) -> int:
        return int.from_bytes(self._generator.bytes(4), "little") % below
