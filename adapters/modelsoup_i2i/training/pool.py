"""A history of generated images for the discriminators (Shrivastava et al. 2017, section 2.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from modelsoup import ParameterError


class ImagePool:
    """The last `size` images, more or less: until it is full, each image is stored and returned.

    Afterwards an image is returned as it is with probability ½; else it takes the place of a random
    stored one, which is returned. Size 0 stores nothing. What is drawn comes from a generator of
    the pool's own, so that its state says everything. The images lie where they were made, on a
    GPU, say, and the host draws without looking at them: it does not wait.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 0:
            raise ParameterError(f"the size of an image pool is {size}, but must be at least 0")
        self.size = size
        self.images: list[torch.Tensor] = []
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
        shown = []
        for image in images:
            # A copy: a slice would keep the whole batch alive for as long as it is stored.
            own = image.clone()
            if len(self.images) < self.size:
                self.images.append(own)
            elif self._draw(2):
                index = self._draw(self.size)
                own, self.images[index] = self.images[index], own
                if own.shape != image.shape:
                    own = image
            shown.append(own)
        return torch.stack(shown)

    def state_dict(self) -> dict[str, Any]:
        """What is stored, on the CPU, and the generator."""
        drawn = self._generator.get_state(legacy=False)["state"]
        return {
            "images": [image.cpu() for image in self.images],
            "generator": torch.tensor([*drawn["key"].tolist(), drawn["pos"]]),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from where a pool was, on a device."""
        self.images = [image.to(device) for image in state["images"]]
        *words, place = state["generator"].tolist()
        self._generator.set_state(("MT19937", np.array(words, np.uint32), place, 0, 0.0))

    def _draw(self, below: int) -> int:
        return int.from_bytes(self._generator.bytes(4), "little") % below
