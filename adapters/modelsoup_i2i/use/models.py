"""A translator as it is used: pictures or noise in, pictures out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..networks.layers import at_any_size
from ..pictures.images import to_image, to_tensor
from ..pictures.transforms import Transform
from .translator import Translator


@dataclass(frozen=True)
class Model:
    """A network, or one joined of several, and what it is for.

    Attributes:
        name: what the trainer calls it.
        how: what it sees, makes and takes.
        module: on its device.
        classes: the names of those that it makes pictures of, by their indices, where it has such.
    """

    name: str
    how: Translator
    module: nn.Module
    classes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Of its pictures."""
        return int(self.module.channels)

    @property
    def size(self) -> int | None:
        """The side of its pictures, which are square; None where they have any size."""
        side = getattr(self.module, "size", None)
        return None if side is None else int(side)

    def seen(self, picture: np.ndarray) -> np.ndarray:
        """A picture as the network sees it: of a network of one size, its middle, at that size."""
        if self.size is None:
            return picture
        side = (self.size, self.size)
        return Transform("centre_crop", side, side).for_test(picture)

    def made(
        self, pictures: Sequence[np.ndarray] | None, given: Sequence[np.ndarray] = (), *,
        context: AbstractContextManager[Any] | None = None,
    ) -> list[np.ndarray]:  # fmt: skip
        """What becomes of a batch.

        Args:
            pictures: uint8, height × width × channels, of one size; None where it sees none.
            given: an array for each draw of `how.takes`: see `Translator.given`.
            context: of the computation, such as autocast.

        Returns:
            uint8, height × width × channels.

        Raises:
            NonfiniteImageError: one holds NaN or infinity.
        """
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        others = [torch.from_numpy(values).to(device) for values in given]
        with torch.no_grad(), in_use(self.module), context or nullcontext():
            if pictures is None:
                result = self.module(*others)
            else:
                images = torch.stack([to_tensor(self.seen(picture)) for picture in pictures])
                multiple = getattr(self.module, "multiple", 1)
                # What it takes beside images is of no size.
                result = at_any_size(lambda own: self.module(own, *others), images.to(device),
                                     multiple)  # fmt: skip
        return [to_image(image.float()) for image in result]


@contextmanager
def in_use(network: nn.Module) -> Iterator[None]:
    """As it is after the training: no dropout, and statistics that are used and not moved."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
