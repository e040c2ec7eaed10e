"""DiffAugment: what a discriminator sees, real and made, is changed at random, differentiably.

Zhao, Liu, Lin, Zhu and Han, "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS
2020. Each change may be made with a probability that follows what the discriminator says of real
pictures: ADA, Karras et al., "Training Generative Adversarial Networks with Limited Data", NeurIPS
2020. All of it is arithmetic on tensors by numbers that the host drew, so nothing waits for a
device, and what is drawn again is the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from modelsoup import ParameterError, listed, nearest

if TYPE_CHECKING:
    import torch

NUMBERS = 10
"""For each picture, in [0, 1): brightness, saturation, contrast, two shifts, two centres; then
whether each of the three changes is made."""
_COINS = 7  # where those begin
_SHIFT, _CUT = 0.125, 0.5  # shares of the sides, as in the paper's appendix


def must_be_known(names: Sequence[str], known: Collection[str]) -> None:
    """Check that each is one of some augmentations, named once.

    Raises:
        ParameterError: one is not; the message has the nearest one.
    """
    for place, name in enumerate(names):
        if name not in known:
            raise ParameterError(
                f"there is no augmentation {name!r}{nearest(name, known)} (of "
                f"{listed(list(known))})"
            )
        if name in names[:place]:
            raise ParameterError(f"the augmentation {name!r} is named twice")


def augmented(
    images: torch.Tensor, policy: Sequence[str], numbers: torch.Tensor,
    probability: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Images after the augmentations of a policy, in its order.

    What a discriminator judges is changed by one policy, be it real or made, but each by numbers of
    its own.

    Args:
        images: N × channels × height × width, in [−1, 1]; the result may leave that range.
        policy: of `color`, `translation` and `cutout`; none returns the images themselves.
        numbers: N × `NUMBERS` in [0, 1), as `draws.Augmentation` draws them.
        probability: that a picture goes through each of them, a tensor on their device without a
            dimension, whose value nobody asks for; None for always.

    Raises:
        ParameterError: there is no such augmentation, or there are not so many numbers.
    """
    must_be_known(policy, POLICY)
    if policy and tuple(numbers.shape) != (len(images), NUMBERS):
        raise ParameterError(
            f"numbers are {list(numbers.shape)}, where {[len(images), NUMBERS]} are expected"
        )
    import torch

    if policy:
        numbers = numbers.to(images.device)
    for name in policy:
        changed = POLICY[name](images, numbers)
        if probability is None:
            images = changed
        else:
            coins = numbers[:, _COINS + list(POLICY).index(name), None, None, None]
            images = torch.where(coins < probability, changed, images)
    return images


def adapted(state: torch.Tensor, target: float, by: float) -> torch.Tensor:
    """ADA's state after its probability was moved, on the state's device.

    r_t, the mean sign of what the discriminator says of real pictures as it sees them, is 0 where
    it cannot tell them from others and 1 where it knows them by heart: above the target the
    probability rises, and below it falls. It stays in [0, 1].

    Args:
        state: the probability; the sum of the signs, and how many there were, since it was moved.
        target: of r_t; 0.6 in the paper.
        by: how far it moves.
    """
    import torch

    probability, signs, count = state.unbind()
    way = torch.sign(signs - target * count)  # where nothing was said, it stays
    return torch.stack([(probability + by * way).clamp(0, 1), signs * 0, count * 0])


def _color(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Brightness by −0.5 to 0.5, saturation by 0 to 2, contrast by 0.5 to 1.5."""
    brightness, saturation, contrast = numbers[:, :3, None, None, None].to(images.dtype).unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _translation(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Up to an eighth of each side, either way; 0, which is grey, comes in from the border."""
    for dimension, drawn in ((2, numbers[:, 3]), (3, numbers[:, 4])):
        most = int(images.shape[dimension] * _SHIFT + 0.5)
        images = _moved(images, dimension, _drawn(drawn, 2 * most + 1) - most)
    return images


def _cutout(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A window of half of each side becomes 0; its centre is anywhere, so it may reach out."""
    import torch

    inside = []
    for side, drawn in zip(images.shape[2:], (numbers[:, 5], numbers[:, 6]), strict=True):
        window = int(side * _CUT + 0.5)
        first = _drawn(drawn, side + 1 - window % 2) - window // 2
        places = torch.arange(side, device=images.device)
        inside.append((places >= first[:, None]) & (places < first[:, None] + window))
    rows, columns = inside
    cut = rows[:, None, :, None] & columns[:, None, None, :]
    return images * (~cut).to(images.dtype)


POLICY: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "color": _color, "translation": _translation, "cutout": _cutout,
}  # fmt: skip


def _drawn(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Integers in [0, count), of numbers in [0, 1); a product may round up to the end."""
    return (numbers * count).long().clamp_(max=count - 1)


def _moved(images: torch.Tensor, dimension: int, by: torch.Tensor) -> torch.Tensor:
    import torch

    side = images.shape[dimension]
    source = torch.arange(side, device=images.device) - by[:, None]
    shape = (len(images), 1, side, 1) if dimension == 2 else (len(images), 1, 1, side)
    inside = ((source >= 0) & (source < side)).view(shape)
    # Beyond the border the edge is read and made 0, so that no pixel's gradient has two summands.
    index = source.clamp(0, side - 1).view(shape).expand_as(images)
    return images.gather(dimension, index) * inside.to(images.dtype)
