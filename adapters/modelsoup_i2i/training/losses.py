"""GAN losses by their names, and the distance of images: what trainers minimise.

The functions take tensors of verdicts of any shape, one a patch or one an image; each gives a mean
over them. Formulas are for a discriminator D that is to tell images y from images made, ŷ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch.nn import functional as F  # noqa: N812

Gan = Literal["lsgan", "vanilla", "softplus", "hinge", "wgan-gp"]


def deceive(verdicts: torch.Tensor, kind: Gan = "lsgan") -> torch.Tensor:
    """A generator's loss, by what D says of its images.

    Args:
        verdicts: D(ŷ), no sigmoid.
        kind: `lsgan`: mean (D(ŷ) − 1)² (Mao et al. 2017); `vanilla` and `softplus`: −log σ(D(ŷ)),
            the non-saturating one (Goodfellow et al. 2014); `hinge` and `wgan-gp`: −D(ŷ).
    """
    own = wide(verdicts)
    if kind == "lsgan":
        return (own - 1).square().mean()
    if kind in ("vanilla", "softplus"):
        return F.softplus(-own).mean()
    return -own.mean()


def judge(of_real: torch.Tensor, of_fake: torch.Tensor, kind: Gan = "lsgan") -> torch.Tensor:
    """A discriminator's loss.

    Args:
        of_real: D(y).
        of_fake: D(ŷ).
        kind: `lsgan`: half of mean (D(y) − 1)² + D(ŷ)²; `vanilla`: half of −log σ(D(y)) − log σ(
            −D(ŷ)); the halves are Isola et al.'s (2017, section 3.3), and `softplus` is without
            them. `hinge`: max(0, 1 − D(y)) +
            max(0, 1 + D(ŷ)) (Lim and Ye 2017); `wgan-gp`: D(ŷ) − D(y), beside `gradient_penalty`.
    """
    real, fake = wide(of_real), wide(of_fake)
    if kind == "lsgan":
        return 0.5 * (deceive(of_real) + fake.square().mean())
    if kind in ("vanilla", "softplus"):
        whole = F.softplus(-real).mean() + F.softplus(fake).mean()
        return 0.5 * whole if kind == "vanilla" else whole
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return fake.mean() - real.mean()


def unmask(of_fake: torch.Tensor, kind: Gan = "hinge") -> torch.Tensor:
    """The part of `judge` that made images have: its half where `judge` has halves."""
    fake = wide(of_fake)
    if kind == "lsgan":
        return 0.5 * fake.square().mean()
    if kind in ("vanilla", "softplus"):
        return F.softplus(fake).mean() * (0.5 if kind == "vanilla" else 1)
    return F.relu(1 + fake).mean() if kind == "hinge" else fake.mean()


def gradient_penalty(
    judged: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor,
    share: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Mean (‖∇D(x̂)‖₂ − 1)² at mixtures of real and fake images (Gulrajani et al. 2017, eq. 3).

    Args:
        judged: D.
        real: N × C × H × W.
        fake: of the same shape.
        share: of the real one in each mixture, in [0, 1]: N numbers.
    """
    of_real = share.view(-1, *[1] * (real.ndim - 1)).to(real)
    mixed = (of_real * real + (1 - of_real) * fake.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(wide(judged(mixed)).sum(), mixed, create_graph=True)
    # As the official code: a norm of 0 has no gradient.
    return ((slope.flatten(1) + 1e-16).norm(dim=1) - 1).square().mean()


def slope_penalty(
    judged: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor
) -> torch.Tensor:
    """R1: the mean of ½ ‖∇D(y)‖² over real images (Mescheder et al. 2018, eq. 9, γ = 1).

    Args:
        judged: D.
        real: N × C × H × W.
    """
    own = real.detach().requires_grad_()
    return steepness(judged(own), own)


def steepness(verdicts: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """R1 of verdicts that there are.

    Args:
        verdicts: D(y).
        real: y, a leaf that requires a gradient.
    """
    (slope,) = torch.autograd.grad(wide(verdicts).sum(), real, create_graph=True)
    return 0.5 * slope.square().flatten(1).sum(1).mean()


def patch_nce(
    queries: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], temperature: float
) -> torch.Tensor:
    """Whether a place in an image made is that of its source: PatchNCE (Park et al. 2020, eq. 3).

    The cross-entropy of the softmax over q · k / τ, in which a place's own key is to be found among
    those of the other places of its image.

    Args:
        queries: for each map N × S × width.
        keys: likewise.
        temperature: τ.

    Returns:
        N numbers, one an image: the mean over places and maps.
    """
    means = []
    for own, sought in zip(queries, keys, strict=True):
        chances = (torch.bmm(wide(own), wide(sought).mT) / temperature).log_softmax(2)
        means.append(-chances.diagonal(dim1=1, dim2=2).mean(1))
    return torch.stack(means).mean(0)


def distance(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean absolute difference over all elements."""
    result: torch.Tensor = F.l1_loss(wide(made), wanted)
    return result


def wide(values: torch.Tensor) -> torch.Tensor:
    """In float32 where autocast gave less: a sum over many patches needs the digits."""
    return values.float() if values.element_size() < 4 else values
