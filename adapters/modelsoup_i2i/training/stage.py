"""What a loss sees of a training: networks to call, weights of terms, pools of earlier images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from modelsoup import TrainerError, nearest

from ..networks.layers import at_any_size
from ..pictures.augmentation import augmented
from .losses import wide
from .options import Augmented
from .pool import ImagePool

Call = Callable[..., Any]


class Stage:
    """Networks in play.

    Attributes:
        options: of the training.
        weights: of each loss, by its name; 1 where there is none.
        pools: the images that discriminators see again, by name.
        adaptive: on the device, ADA's probability, the sum of the signs of what was said of real
            images since it was moved, and their number: see `pictures.augmentation.adapted`.
    """

    options: Any
    weights: Mapping[str, float]
    pools: Mapping[str, ImagePool]
    _calls: dict[str, Call]
    _trained: dict[str, list[nn.Parameter]]
    _comparing: set[str]

    def __init__(
        self, options: Any, weights: Mapping[str, float], pools: Mapping[str, ImagePool]
    ) -> None:
        self.options, self.weights, self.pools = options, weights, pools
        self._calls, self._trained, self._comparing = {}, {}, set()
        self.adaptive = torch.zeros(3)

    def __getitem__(self, name: str) -> Call:
        """A network, or one joined of several, to be called with images of any size.

        Raises:
            TrainerError: there is no such network.
        """
        must_be_there(name, self._calls, "a loss calls the network")
        return self._calls[name]

    def put(self, name: str, network: nn.Module, call: Call | None = None) -> None:
        """Have a network called by its name: itself, or by what calls it."""
        self._trained[name] = [p for p in network.parameters() if p.requires_grad]
        if getattr(network, "compares", False):
            self._comparing.add(name)
        own: Call = network if call is None else call
        multiple: int = getattr(network, "multiple", 1)
        self._calls[name] = own if multiple == 1 else partial(_whole, own, multiple)

    @property
    def adapts(self) -> bool:
        """Whether augmentations are made with a probability that follows the discriminator."""
        return isinstance(self.options, Augmented) and self.options.ada is not None

    def augmented(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """What the discriminator sees of images, real or made: see `pictures.augmentation`."""
        probability = self.adaptive[0] if self.adapts else None
        return augmented(images, self.options.augment, numbers, probability)

    def said(self, verdicts: torch.Tensor) -> None:
        """Let ADA know what the discriminator says of real images, in its own turn."""
        if self.adapts:
            with torch.no_grad():
                signs = wide(verdicts).sign()
                self.adaptive[1] += signs.sum()
                self.adaptive[2] += signs.numel()

    @contextmanager
    def fixed(self, *names: str) -> Iterator[None]:
        """Within it, gradients go through these networks and not to their weights.

        What a loss keeps of them is less, and no gradient is computed that nobody asks for.
        """
        own = [p for name in names for p in self._trained[name]]
        for parameter in own:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in own:
                parameter.requires_grad_()

    def both(
        self, name: str, first: torch.Tensor, second: torch.Tensor,
        *others: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """A network's results for two sets of images, in one pass if they have one size.

        Right for networks that treat each image alone, as those with InstanceNorm do; what compares
        the images of a batch says so (`compares`), and sees one set after the other.

        Args:
            name: of the network.
            first: images.
            second: others.
            others: what else it is called with, for both.
        """
        call = self[name]
        if first.shape[1:] != second.shape[1:] or name in self._comparing:
            return tuple(call(*own) for own in zip((first, second), *others, strict=True))
        joined = (torch.cat(both) for both in others)
        made = call(torch.cat([first, second.to(first.dtype)]), *joined)
        return made[: len(first)], made[len(first) :]


def must_be_there(name: str, known: Collection[str], said: str) -> None:
    """Raise a TrainerError for what a trainer names and does not have."""
    if name not in known:
        raise TrainerError(f"{said} {name!r}{nearest(name, known)} (there are {', '.join(known)})")


def _whole(call: Call, multiple: int, images: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """A network called with images of any size, and with what else it takes, which is of none."""
    return at_any_size(lambda own: call(own, *others), images, multiple)


def prepare(network: nn.Module, *, plain: bool, precision: str | int = 32, pixels: int = 0) -> None:
    """Tell a network how it will be trained, if it wants to know.

    Args:
        network: which may have `prepare_for`, called with what follows.
        plain: on a GPU, compiled or traced: no tricks that are the CPU's.
        precision: 32 or `bf16`.
        pixels: of a batch.
    """
    if hasattr(network, "prepare_for"):
        network.prepare_for(plain=plain, precision=precision, pixels=pixels)
